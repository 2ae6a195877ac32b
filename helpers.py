"""Plumbing shared by the notebooks: data, evaluation, run logs, verdicts, figures. No network, loss or update.

``python helpers.py`` redraws, without training, every figure that is curves over a csv file of ``figs/data/``.
"""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import random
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import gymnasium as gym
import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

ROOT = Path(__file__).resolve().parent
FIGS = Path(os.environ.get("CQL_FIGS", ROOT / "figs"))  # pictures and their data; the tests send them elsewhere
# A second thread makes networks this small a fifth faster, and ten times slower when another program wants its core.
torch.set_num_threads(1)


def _expect(ok: object, message: str, error: type[Exception] = ValueError) -> None:
    if not ok:
        raise error(message)


# ------------------------------------------------------------------------------------------ reproducibility
def seed_everything(seed: int) -> torch.Generator:
    """Seed Python, NumPy and torch, and return a fresh torch.Generator with the same seed to draw batches from.

    Results repeat on one machine with one version of torch; across machines they agree in distribution only.

    >>> torch.equal(torch.rand(3, generator=seed_everything(0)), torch.rand(3, generator=seed_everything(0)))
    True
    """
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  (other people's code may draw from the old global generator)
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


def versions() -> str:
    """One line that names Python, the libraries and the machine's architecture, for the last cell of a notebook."""
    libraries = ("torch", "gymnasium", "mujoco", "numpy", "matplotlib")
    python = f"Python {platform.python_version()} on {platform.machine()}"
    return ", ".join([python, *(f"{name} {version(name)}" for name in libraries)])


# ------------------------------------------------------------------------------------------------------ files
def _write(path: Path, content: bytes) -> None:
    """Write to a temporary file beside `path`, then rename it: a failure leaves the old file as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def save_npz(path: str | Path, arrays: Mapping[str, np.ndarray], provenance: Mapping[str, object]) -> None:
    """Write arrays and their provenance (a dictionary that json can hold) as one compressed .npz without pickle."""
    got = f"{len(arrays)} arrays and {dict(provenance)}"
    _expect(arrays and provenance, f"{path}: expected at least one array and a provenance, got {got}")
    buffer = io.BytesIO()
    np.savez_compressed(buffer, provenance=np.array(json.dumps(dict(provenance))), **arrays, allow_pickle=False)
    _write(Path(path), buffer.getvalue())


def load_npz(path: str | Path, required: Iterable[str] = ()) -> tuple[dict[str, np.ndarray], dict]:
    """Read what `save_npz` wrote: (arrays, provenance).

    Raises FileNotFoundError, or ValueError for a truncated or foreign file and for missing keys.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        provenance = json.loads(str(arrays.pop("provenance")))
    except FileNotFoundError:
        raise
    except KeyError:
        raise ValueError(f"{path}: expected an array named 'provenance', found {sorted(arrays)}") from None
    except Exception as error:  # a damaged archive fails in a dozen ways
        raise ValueError(f"{path}: expected an .npz archive written by save_npz, not readable ({error})") from error
    missing, found = sorted(set(required) - set(arrays)), sorted(arrays)
    _expect(not missing, f"{path}: expected the arrays {sorted(required)}, {missing} missing, found {found}")
    return arrays, provenance


def load_policy(path: str | Path) -> tuple[dict[str, np.ndarray], dict]:
    """Read the arrays of a tanh-Gaussian policy and their provenance; the notebook builds its own actor from them.

    Returns (arrays, provenance): `w0` (O, H), `b0` (H,), `w1`, ... layer by layer, the last with 2 D outputs (mean,
    then log standard deviation), and `obs_mean`, `obs_scale` (O,). Provenance names env_id, seed, steps, return_mean
    and return_std (undiscounted, actions sampled, over 20 episodes).

    Raises ValueError for a file that is truncated, lacks provenance, holds other shapes or non-finite numbers.
    """
    arrays, provenance = load_npz(path, required=("w0", "b0", "obs_mean", "obs_scale"))
    keys = {"env_id", "seed", "steps", "return_mean", "return_std"}
    missing = sorted(keys - set(provenance))
    _expect(not missing, f"{path}: expected a provenance with {sorted(keys)}, {missing} missing")
    depth = sum(name.startswith("w") for name in arrays)
    width = len(arrays["obs_mean"]) if arrays["obs_mean"].ndim == 1 else -1
    expected: dict[str, tuple[int, ...]] = {"obs_mean": (width,), "obs_scale": (width,)}
    for i in range(depth):
        out = arrays[f"w{i}"].shape[-1] if f"w{i}" in arrays else -1
        expected |= {f"w{i}": (width, out), f"b{i}": (out,)}
        width = out
    found = {name: array.shape for name, array in arrays.items()}
    fit = found == expected and width % 2 == 0
    _expect(fit, f"{path}: expected layers that fit together, ending in 2 D outputs: {expected}; found {found}")
    bad = [name for name, array in arrays.items() if array.dtype.kind != "f" or not np.isfinite(array).all()]
    _expect(not bad, f"{path}: expected finite floating point numbers, not so in {bad}")
    scale = arrays["obs_scale"]
    _expect((scale > 0).all(), f"{path}: expected a positive obs_scale, got {scale}")
    return arrays, provenance


# ------------------------------------------------------------------------------------------------------- data
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class OfflineDataset:
    """A fixed set of n transitions in memory, in the order in which they were recorded.

    Arguments: obs and next_obs (n, O) floating; action (n,) integer or (n, D) floating; reward (n,) floating;
    terminated and truncated (n,) boolean. They become tensors of the same names on `device` (float32, int64,
    bool), in the environment's own units. `terminated` says that the task ended there (no future, no bootstrap),
    `truncated` that the recording did.

    With `standardise=True`, `obs_mean` and `obs_scale` (O,) are the states' mean and standard deviation and
    `sample` returns standardised states; otherwise they are 0 and 1.

    Raises TypeError or ValueError that names the array, what was expected and what came: wrong shape or dtype,
    lengths that differ, no transitions, NaN or infinite values.
    """

    columns = ("obs", "action", "reward", "next_obs", "terminated", "truncated")

    def __init__(self, obs, action, reward, next_obs, terminated, truncated, provenance: Mapping | None = None, *,
                 standardise: bool = False, device: str | torch.device = "cpu"):  # fmt: skip
        given = (obs, action, reward, next_obs, terminated, truncated)
        arrays = dict(zip(self.columns, map(np.asarray, given), strict=True))
        shape = arrays["obs"].shape
        _expect(shape and shape[0], f"obs: expected at least one transition, got an array of shape {shape}")
        for name, array in arrays.items():
            dims = {2} if "obs" in name else {1, 2} if name == "action" else {1}
            fits = array.ndim in dims and len(array) == shape[0] and ("obs" not in name or array.shape == shape)
            rows = f"{shape[0]} rows and {sorted(dims)} dimensions, obs and next_obs alike"
            _expect(fits, f"{name}: expected {rows}; got shape {array.shape}")
            kinds = {"action": "f" if array.ndim == 2 else "iu", "terminated": "b", "truncated": "b"}.get(name, "f")
            wanted = f"dtype kind {kinds!r} (i, u integer, f floating, b boolean)"
            got = f"{array.dtype} of shape {array.shape}"
            _expect(array.dtype.kind in kinds, f"{name}: expected {wanted}, got {got}", TypeError)
            with np.errstate(over="ignore"):
                array = array.astype({"f": np.float32, "b": np.bool_}.get(array.dtype.kind, np.int64))
            bad = int((~np.isfinite(array)).sum())
            _expect(not bad, f"{name}: expected finite numbers, got {bad} NaN or infinite ones")
            setattr(self, name, torch.as_tensor(array, device=device))
        self.provenance, self.standardise = dict(provenance or {}), standardise
        self.device, one = torch.device(device), torch.ones_like(self.obs[0])
        self.obs_mean = self.obs.double().mean(0).float() if standardise else 0 * one
        self.obs_scale = self.obs.double().std(0, correction=0).clamp_min(1e-6).float() if standardise else one

    def __len__(self) -> int:
        return len(self.reward)

    def sample(self, batch_size: int, generator: torch.Generator | Sequence[torch.Generator] | None = None) -> Batch:
        """Draw transitions uniformly, with replacement: obs (B, O), action (B,) or (B, D), reward (B,), next_obs
        (B, O) and terminated (B,), which is floating, 0. or 1. A sequence of E generators gives every array a leading
        dimension E, row e being what generator e alone would draw.

        >>> zeros = np.zeros((4, 2)); flags = np.zeros(4, dtype=bool)
        >>> data = OfflineDataset(zeros, np.arange(4), np.ones(4), zeros, flags, flags)
        >>> [tuple(x.shape) for x in data.sample(3, seed_everything(0))]
        [(3, 2), (3,), (3,), (3, 2), (3,)]
        """
        wanted = f"an integer from 1 to the {len(self)} transitions there are"
        fits = isinstance(batch_size, int) and 1 <= batch_size <= len(self)
        _expect(fits, f"batch_size: expected {wanted}, got {batch_size!r}")
        one = generator is None or isinstance(generator, torch.Generator)
        draws = [
            torch.randint(len(self), (batch_size,), generator=g, device=g.device if g else self.device)
            for g in ([generator] if one else generator)
        ]
        i = (draws[0] if one else torch.stack(draws)).to(self.device)
        obs, next_obs = self.obs[i], self.next_obs[i]
        if self.standardise:
            obs, next_obs = (obs - self.obs_mean) / self.obs_scale, (next_obs - self.obs_mean) / self.obs_scale
        return obs, self.action[i], self.reward[i], next_obs, self.terminated[i].float()

    def states(self, n: int, generator: torch.Generator | None = None) -> np.ndarray:
        """n states (n, O), drawn without replacement, float64, in the environment's units: where truth starts."""
        _expect(1 <= n <= len(self), f"n: expected 1 to {len(self)} states, got {n}")
        return self.obs.cpu().double().numpy()[torch.randperm(len(self), generator=generator)[:n].numpy()]

    def _select(self, rows, standardise: bool) -> OfflineDataset:
        arrays = [getattr(self, name).cpu().numpy()[rows] for name in self.columns]
        return OfflineDataset(*arrays, self.provenance, standardise=standardise, device=self.device)

    def take(self, n: int, standardise: bool = False) -> OfflineDataset:
        """The first n transitions as a data set of their own. ValueError unless 1 <= n <= len(self)."""
        _expect(1 <= n <= len(self), f"n: expected 1 to the {len(self)} transitions there are, got {n}")
        return self._select(slice(n), standardise)

    def episodes(self) -> list[tuple[slice, bool]]:
        """(rows, complete) of each episode; one without a flag at its end, cut by the recording, is not complete."""
        flagged = (self.terminated | self.truncated).cpu().numpy()
        breaks = (self.next_obs[:-1] != self.obs[1:]).any(1).cpu().numpy()
        ends = np.flatnonzero(flagged | np.append(breaks, True))
        starts = np.append(0, ends[:-1] + 1)
        return [(slice(int(a), int(b) + 1), bool(flagged[b])) for a, b in zip(starts, ends, strict=True)]

    def episode_returns(self) -> np.ndarray:
        """Undiscounted return of every complete episode, (number of complete episodes,)."""
        reward = self.reward.cpu().double().numpy()
        return np.array([reward[rows].sum() for rows, complete in self.episodes() if complete])

    def better_half(self, standardise: bool = False) -> OfflineDataset:
        """Transitions of the complete episodes whose return is at least the median: what filtered cloning clones."""
        returns = self.episode_returns()
        _expect(len(returns), "better_half: expected at least one complete episode, got none")
        complete = [rows for rows, whole in self.episodes() if whole]
        keep = [np.r_[rows] for rows, value in zip(complete, returns, strict=True) if value >= np.median(returns)]
        return self._select(np.concatenate(keep), standardise)

    @classmethod
    def concat(cls, first: OfflineDataset, second: OfflineDataset, standardise: bool = False) -> OfflineDataset:
        """Both data sets, one after the other. ValueError where their shapes do not fit."""
        pairs = [[getattr(data, name).cpu().numpy() for data in (first, second)] for name in cls.columns]
        for name, (a, b) in zip(cls.columns, pairs, strict=True):
            fits = a.shape[1:] == b.shape[1:]
            _expect(fits, f"concat: expected transitions of one environment, got {name} {a.shape} and {b.shape}")
        provenance = {"parts": [first.provenance, second.provenance]}
        return cls(*map(np.concatenate, pairs), provenance, standardise=standardise, device=first.device)

    def describe(self) -> str:
        """A data card: size, episodes, returns, how episodes end, which actions occur."""
        returns = self.episode_returns()
        span, action = "no return to report", self.action.cpu().numpy()
        if len(returns):
            span = f"return {returns.mean():.0f} on average, from {returns.min():.0f} to {returns.max():.0f}"
        if action.ndim == 1:
            values, counts = np.unique(action, return_counts=True)
            actions = ", ".join(f"{v}: {c / len(self):.0%}" for v, c in zip(values, counts, strict=True))
        else:
            actions = f"{action.shape[1]} dimensions, mean {action.mean():+.2f}, standard deviation {action.std():.2f}"
        return (
            f"transitions  {len(self):,}, observations with {self.obs.shape[1]} numbers\n"
            f"episodes     {len(self.episodes()):,}, {len(returns):,} of them complete: {span}\n"
            f"ends         {int(self.terminated.sum()):,} terminated, {int(self.truncated.sum()):,} truncated\n"
            f"actions      {actions}"
        )

    def save(self, path: str | Path) -> None:
        """Write one .npz without pickle, with the provenance. A failed save leaves an older file intact."""
        arrays = {name: getattr(self, name).cpu().numpy() for name in self.columns}
        save_npz(path, arrays, self.provenance or {"source": "unknown"})

    @classmethod
    def load(cls, path: str | Path, **options) -> OfflineDataset:
        """Read what `save` wrote; options as in the constructor. ValueError for a truncated or foreign file."""
        arrays, provenance = load_npz(path, required=cls.columns)
        return cls(*(arrays[name] for name in cls.columns), provenance, **options)

    @classmethod
    def from_d4rl(cls, data: Mapping[str, np.ndarray], **options) -> OfflineDataset:
        """A D4RL dictionary: observations, actions, rewards, terminals; timeouts and next_observations if it has them.

        Without next_observations they are the next row's observations; the last row of a timed-out episode, whose
        successor was not recorded, is dropped and the flag moves to the row before. KeyError names a missing key.
        """
        keys = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")
        missing, found = sorted(set(keys[:4]) - set(data)), sorted(data)
        _expect(not missing, f"a D4RL dictionary has {keys[:4]}; {missing} missing, found {found}", KeyError)
        lengths = {key: len(np.atleast_1d(value)) for key, value in data.items() if key in keys}
        _expect(len(set(lengths.values())) == 1, f"expected arrays of one length, got {lengths}")
        obs, action, reward = (np.asarray(data[key]) for key in ("observations", "actions", "rewards"))
        terminated = np.asarray(data["terminals"]).astype(bool)
        truncated = np.asarray(data.get("timeouts", np.zeros(len(obs)))).astype(bool) & ~terminated
        keep = np.ones(len(obs), dtype=bool)
        if "next_observations" in data:
            next_obs = np.asarray(data["next_observations"])
        else:
            next_obs = np.concatenate([obs[1:], obs[-1:]])
            keep = terminated | ~(truncated | (np.arange(len(obs)) == len(obs) - 1))
            truncated = truncated | (np.append(truncated[1:], False) & ~terminated)
        arrays = (obs, action, reward, next_obs, terminated, truncated)
        return cls(*(array[keep] for array in arrays), {"source": "D4RL dictionary"}, **options)

    @classmethod
    def from_minari(cls, dataset, **options) -> OfflineDataset:
        """A Minari data set (`minari.load_dataset(...)`): its episodes, end to end, with true next observations."""
        wanted = f"a data set as minari.load_dataset gives it, got {type(dataset).__name__}"
        _expect(hasattr(dataset, "iterate_episodes"), f"from_minari: expected {wanted}", TypeError)
        parts = [
            (e.observations[:-1], e.actions, e.rewards.astype(float), e.observations[1:], e.terminations, e.truncations)
            for e in dataset.iterate_episodes()
        ]  # fmt: skip
        _expect(parts, "from_minari: expected at least one episode, got none")
        name = getattr(getattr(dataset, "spec", None), "dataset_id", "unknown")
        return cls(*map(np.concatenate, zip(*parts, strict=True)), {"source": f"Minari {name}"}, **options)


# ------------------------------------------------------------------------------------ acting in environments
Act = Callable[[torch.Tensor], object]  # (n, O) float32 -> actions (n,) or (n, D), a tensor or an array


def _actions(action, envs: gym.vector.VectorEnv) -> np.ndarray:
    """What `act` returned, as the environments want it. ValueError for another number or kind of actions, or NaN."""
    space = envs.action_space
    action = np.array(None) if action is None else torch.as_tensor(action).detach().cpu().numpy()
    fits = action.size == np.prod(space.shape) and (len(space.shape) == 1 or action.shape[-1:] == space.shape[-1:])
    kinds = "iub" if space.dtype.kind == "i" else "iuf"
    fits = fits and action.dtype.kind in kinds and np.isfinite(action).all()
    wanted, got = f"{space.shape} for {space.dtype}", f"shape {action.shape}, {action.dtype}"
    _expect(fits, f"act: expected finite actions of shape {wanted}, got {got}")
    return action.reshape(space.shape).astype(space.dtype)


@torch.no_grad()
def collect(env_id: str, act: Act, steps: int, seed: int, n_envs: int = 1, **provenance) -> OfflineDataset:
    """Play whole episodes, numbered 0, 1, 2, ... and reset with seed + number, and keep the first `steps` transitions.

    `act` maps observations (n_envs, O), float32 and not standardised, to actions. `next_obs` is the true successor
    at time limits, too. Episodes stand in the order of their numbers however many environments play them, so that
    short ones are not preferred. Further keyword arguments are kept as provenance. gymnasium raises its own error
    for an unknown environment.
    """
    got = f"steps={steps}, n_envs={n_envs}"
    _expect(steps >= 1 and n_envs >= 1, f"collect: expected at least one step and one environment, got {got}")
    autoreset = gym.vector.AutoresetMode.DISABLED
    envs = gym.vector.SyncVectorEnv([lambda: gym.make(env_id)] * n_envs, autoreset_mode=autoreset)
    number, started, length = np.arange(n_envs), n_envs, np.zeros(n_envs, dtype=int)
    finished: dict[int, int] = {}  # number of an episode -> its length
    whole, prefix = 0, 0  # episodes 0 ... whole - 1 are finished and hold `prefix` transitions
    obs, _ = envs.reset(seed=[seed + int(k) for k in number])
    rows: list[tuple] = []
    while prefix + length[number == whole].sum() < steps:
        action = _actions(act(torch.as_tensor(obs, dtype=torch.float32)), envs)
        next_obs, reward, terminated, truncated, _ = envs.step(action)
        rows.append((number.copy(), obs, action, reward.copy(), next_obs, terminated.copy(), truncated.copy()))
        length, obs, done = length + 1, next_obs, terminated | truncated
        if done.any():
            for i in np.flatnonzero(done):
                finished[int(number[i])] = int(length[i])
                number[i], length[i], started = started, 0, started + 1
            while whole in finished:
                whole, prefix = whole + 1, prefix + finished[whole]
            obs, _ = envs.reset(seed=[seed + int(k) for k in number], options={"reset_mask": done})
    envs.close()
    columns = (np.stack(column) for column in zip(*rows, strict=True))
    episode, *columns = (column.reshape(-1, *column.shape[2:]) for column in columns)
    order = np.argsort(episode, kind="stable")[:steps]
    about = {"env_id": env_id, "steps": steps, "seed": seed, "n_envs": n_envs, "versions": versions()}
    return OfflineDataset(*(column[order] for column in columns), about | provenance)


def _restore(env_id: str, envs: gym.vector.VectorEnv, obs: np.ndarray) -> None:
    """Put copy i of the environment into the state that obs[i] shows. Exact for CartPole and HalfCheetah, where it
    shows all that matters (HalfCheetah hides its position along the track, on which nothing depends: it becomes 0).
    """
    if env_id.startswith("CartPole"):
        envs.unwrapped.state = np.array(obs, dtype=np.float64).T
    elif env_id.startswith("HalfCheetah"):
        for env, state in zip(envs.unwrapped.envs, np.asarray(obs, dtype=np.float64), strict=True):
            env.unwrapped.set_state(np.append(0.0, state[:8]), state[8:])
    else:
        raise ValueError(f"env_id: states can be restored for CartPole and HalfCheetah, got {env_id!r}")


@torch.no_grad()
def _returns(envs, obs, act: Act, gamma: float, horizon: int, obs_mean, obs_scale, agents) -> np.ndarray:
    """Discounted sum of rewards of each copy's first episode, (n,) or (agents, n)."""
    alive, total, discount = np.ones(envs.num_envs, dtype=bool), np.zeros(envs.num_envs), 1.0
    obs_mean, obs_scale = (torch.as_tensor(x, dtype=torch.float32).cpu() for x in (obs_mean, obs_scale))
    for t in range(horizon):
        seen = (torch.as_tensor(obs, dtype=torch.float32) - obs_mean) / obs_scale
        action = act(seen if agents is None else seen.reshape(agents, -1, seen.shape[-1]))
        action, bonus = action if isinstance(action, tuple) else (action, torch.zeros(()))
        obs, reward, terminated, truncated, _ = envs.step(_actions(action, envs))
        extra = np.broadcast_to(torch.as_tensor(bonus).cpu().numpy().reshape(-1), reward.shape) if t else 0.0
        total, discount = total + discount * alive * (reward + extra), discount * gamma
        alive &= ~(terminated | truncated)
        if not alive.any():
            break
    envs.close()
    return total if agents is None else total.reshape(agents, -1)


def evaluate(env_id: str, act: Act, seeds: Sequence[int],
             obs_mean=0.0, obs_scale=1.0, agents: int | None = None) -> np.ndarray:  # fmt: skip
    """Undiscounted return of one episode per seed, (len(seeds),): the same start states for whatever is compared.

    `act` maps observations (len(seeds), O), standardised with `obs_mean` and `obs_scale`, to actions. With `agents=E`
    it maps (E, len(seeds), O) to (E, len(seeds)) or (E, len(seeds), D), and the result is (E, len(seeds)).
    """
    _expect(len(seeds), "seeds: expected at least one, got none")
    copies = agents or 1
    envs = gym.make_vec(env_id, copies * len(seeds))
    if env_id.startswith("CartPole"):  # gymnasium's vectorised CartPole takes one seed for all copies
        single = gym.make(env_id)
        start = np.stack([single.reset(seed=int(seed)) and single.unwrapped.state for seed in seeds])
        envs.reset(seed=0)
        _restore(env_id, envs, np.tile(start, (copies, 1)))
        obs = np.tile(start, (copies, 1))
    else:
        obs, _ = envs.reset(seed=[int(seed) for seed in seeds] * copies)
    return _returns(envs, obs, act, 1.0, 1_000_000, obs_mean, obs_scale, agents)


def discounted_return(env_id: str, act: Act, obs: np.ndarray, gamma: float, horizon: int = 1000,
                      obs_mean=0.0, obs_scale=1.0, agents: int | None = None) -> np.ndarray:  # fmt: skip
    """The truth that a predicted value is judged by: the discounted return of `act`, from the given states (n, O).

    States are in the environment's units and restored exactly; there is no time limit but `horizon`. If `act`
    returns a pair (action, bonus), the bonus (n,) is added to the reward from the second step on: with
    -alpha_ent * log_pi that is the soft value which SAC's critic predicts. The result is (n,), or (agents, n), where
    each agent starts from all n states.
    """
    obs = np.asarray(obs, dtype=np.float64)
    fits = obs.ndim == 2 and len(obs) and np.isfinite(obs).all()
    _expect(fits, f"obs: expected finite states of shape (n, O), got shape {obs.shape}")
    wanted, got = "0 <= gamma <= 1 and horizon >= 1", f"gamma={gamma}, horizon={horizon}"
    _expect(0.0 <= gamma <= 1.0 and horizon >= 1, f"expected {wanted}, got {got}")
    obs = np.tile(obs, (agents or 1, 1))
    envs = gym.make_vec(env_id, len(obs), max_episode_steps=horizon + 1)
    width = envs.single_observation_space.shape
    _expect(obs.shape[1:] == width, f"obs: expected states of {env_id}, {width} each, got {obs.shape[1:]}")
    envs.reset(seed=0)
    _restore(env_id, envs, obs)
    return _returns(envs, obs, act, gamma, horizon, obs_mean, obs_scale, agents)


# -------------------------------------------------------------------------------------- run logs and verdicts
class RunLog:
    """A table with named columns, one row per measurement; the csv files of figs/data/ are run logs.

    >>> log = RunLog("alpha_cql", "seed", "value")
    >>> log.add(alpha_cql=0.5, seed=np.arange(3), value=[1.0, 2.0, 4.0])
    >>> float(log.where(alpha_cql=0.5, seed=2)["value"][0]), len(log)
    (4.0, 3)
    """

    def __init__(self, *columns: str, provenance: Mapping | None = None):
        distinct = columns and len(set(columns)) == len(columns)
        _expect(distinct, f"columns: expected distinct names, got {columns}")
        self.columns, self.rows, self.provenance = columns, [], dict(provenance or {})

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, **values) -> None:
        """Append rows: for each column a scalar or a one-dimensional array. ValueError for other shapes or NaN."""
        _expect(set(values) == set(self.columns), f"expected the columns {self.columns}, got {tuple(values)}")
        arrays = np.broadcast_arrays(*(np.atleast_1d(np.asarray(values[name])) for name in self.columns))
        for name, array in zip(self.columns, arrays, strict=True):
            fits = array.ndim == 1 and (array.dtype.kind != "f" or np.isfinite(array).all())
            _expect(fits, f"{name}: expected finite values in one dimension, got shape {array.shape}: {array}")
        self.rows += zip(*(array.tolist() for array in arrays), strict=True)

    def __getitem__(self, column: str) -> np.ndarray:
        """A column as an array. KeyError names the columns there are."""
        known = column in self.columns
        _expect(known, f"expected one of the columns {self.columns}, got {column!r}", KeyError)
        return np.array([row[self.columns.index(column)] for row in self.rows])

    def where(self, **equal) -> RunLog:
        """The rows in which every named column has the value given, which may be empty."""
        keep = np.ones(len(self), dtype=bool)
        for column, value in equal.items():
            keep &= self[column] == value
        part = RunLog(*self.columns, provenance=self.provenance)
        part.rows = [row for row, k in zip(self.rows, keep, strict=True) if k]
        return part

    def seeds(self, x: str, y: str, **equal) -> tuple[np.ndarray, np.ndarray]:
        """Curves of the selected rows, one per seed: x (T,) and y (S, T). ValueError unless all share one x."""
        part = self.where(**equal)
        curves = [part.where(seed=s) for s in np.unique(part["seed"])]
        fits = curves and all(np.array_equal(c[x], curves[0][x]) for c in curves)
        got = f"{len(part)} rows with {equal}"
        _expect(fits, f"expected one curve {y} over {x} per seed, on common points, got {got}")
        return curves[0][x], np.stack([c[y] for c in curves])

    def save(self, name: str, **provenance) -> Path:
        """Write figs/data/<name>.csv, seven digits a number, under a header that says where the numbers come from.

        A long run (a name that begins with "long/") costs hours: one that is there already may be extended, by a log
        that begins with all its rows and has more, and raises FileExistsError otherwise.
        """
        path = FIGS / "data" / f"{name}.csv"
        got = f"{len(self)} rows and {provenance}"
        _expect(provenance and self.rows, f"{name}: expected rows and a provenance, got {got}")
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows([f"{v:.7g}" if isinstance(v, float) else v for v in row] for row in self.rows)
        table = buffer.getvalue()
        if name.startswith("long/") and path.exists():
            stored = "".join(s for s in path.read_text(encoding="utf-8").splitlines(True) if not s.startswith("# "))
            longer = table.startswith(stored) and table != stored
            _expect(longer, f"{path} holds a long run and is not overwritten: remove it first", FileExistsError)
        header = "".join(f"# {key}: {json.dumps(value)}\n" for key, value in (provenance | {"rows": len(self)}).items())
        _write(path, (header + table).encode())
        return path

    @classmethod
    def load(cls, name: str) -> RunLog:
        """Read figs/data/<name>.csv: columns of integers, floats or else text. ValueError if the file is cut off."""
        path = next((p for f in (FIGS, ROOT / "figs") if (p := f / "data" / f"{name}.csv").exists()), None)
        _expect(path, f"no figs/data/{name}.csv: run the notebook that draws {name}.png first", FileNotFoundError)
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
            top = next(i for i, line in enumerate([*lines, ""]) if not line.startswith("# "))
            header = dict(line[2:].split(": ", 1) for line in lines[:top])
            columns, *rows = csv.reader(io.StringIO("\n".join(lines[top:])))
            log = cls(*columns, provenance={key: json.loads(value) for key, value in header.items()})
            whole = len(rows) == log.provenance["rows"] and all(len(row) == len(columns) for row in rows)
            _expect(whole, f"{len(rows)} rows")
        except (ValueError, KeyError) as error:
            raise ValueError(f"{path}: expected a run log whose header counts its rows, got {error}") from error
        log.rows = list(zip(*(_parse(column) for column in zip(*rows, strict=True)), strict=True))
        return log


def _parse(column: Sequence[str]) -> list:
    for kind in (int, float):
        try:
            return [kind(value) for value in column]
        except ValueError:
            continue
    return list(column)


def verdict(*claims: tuple[str, str, object]) -> None:
    """Print one line per (claim, threshold, ok), ending in OK or FAIL, and raise AssertionError if any failed.

    `ok` is a boolean or an array of them, one per seed; comparisons with NaN are false, and an empty array is an error.

    >>> verdict(("two and two make four", "exactly", 2 + 2 == 4))
    two and two make four   exactly   OK
    """
    fits = claims and all(np.size(ok) and np.asarray(ok).dtype == bool for _, _, ok in claims)
    _expect(fits, "verdict: expected claims with a boolean each, or an array of booleans that is not empty")
    wide, wider = (max(len(claim[i]) for claim in claims) for i in (0, 1))
    for claim, threshold, ok in claims:
        print(f"{claim:<{wide}}   {threshold:<{wider}}   {'OK' if np.all(ok) else 'FAIL'}")
    failed = [claim for claim, _, ok in claims if not np.all(ok)]
    assert not failed, "not reproduced: " + "; ".join(failed)


# --------------------------------------------------------------------------------------------------- figures
# Okabe-Ito: distinguishable with any colour vision; line styles and markers say the same a second time.
COLORS = dict(blue="#0072b2", vermilion="#d55e00", green="#009e73", purple="#cc79a7", orange="#e69f00",
              sky="#56b4e9", black="#000000", grey="#767676")  # fmt: skip


def use_style() -> None:
    """The series' look: white ground, left-aligned titles that state the finding, text of about 9 points or more."""
    plt.rcParams.update({
        "figure.dpi": 110, "savefig.dpi": 110, "figure.facecolor": "white", "savefig.facecolor": "white",
        "font.size": 9.5, "axes.titlesize": 10.5, "axes.titlelocation": "left", "axes.spines.top": False,
        "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "legend.frameon": False,
        "figure.constrained_layout.use": True, "axes.prop_cycle": plt.cycler(color=list(COLORS.values())),
    })  # fmt: skip


def plot_seeds(ax: Axes, x: np.ndarray, ys: np.ndarray, **style) -> Line2D:
    """Every seed as a thin line, their mean as a thick one, which is returned: x (T,), ys (S, T)."""
    ys = np.atleast_2d(ys)
    _expect(ys.shape[1] == len(x), f"expected ys (S, {len(x)}), got {ys.shape}")
    (line,) = ax.plot(x, ys.mean(0), **({"linewidth": 2.0} | style))
    if len(ys) > 1:
        ax.plot(x, ys.T, color=line.get_color(), linestyle="-", linewidth=0.6, alpha=0.4)
    return line


def label_ends(ax: Axes, lines: Mapping[str, Line2D], size: float = 8.5) -> None:
    """Write each label at the right end of its line, moved apart vertically where two would overlap."""
    ax.figure.canvas.draw()
    low, high = ax.transAxes.transform([(0, 0), (0, 1)])[:, 1]
    gap = 1.2 * size * ax.figure.dpi / 72 / (high - low)  # height of a line of text, as a fraction of the axes
    last = {label: (line.get_xdata()[-1], line.get_ydata()[-1]) for label, line in lines.items()}
    end = {label: (ax.transData.transform(point)[1] - low) / (high - low) for label, point in last.items()}
    y = -np.inf
    for left, label in enumerate(sorted(end, key=end.get)):
        y = max(y + gap, min(np.clip(end[label], 0, 1), 1 - gap * (len(end) - 1 - left)))
        color = lines[label].get_color()
        ax.annotate(label, (1.01, y), xycoords="axes fraction", va="center", fontsize=size, color=color)


def plot_curves(log: RunLog) -> Figure:
    """Draw a run log with the columns panel, line, seed, x, y: one thin line per seed, their mean thick and labelled.

    The provenance holds the look. `panels`: panel -> {title, xlabel, ylabel and, as needed, xscale, yscale,
    linthresh, xlim, ylim, xticks {position: label}, yticks}, in reading order. `lines`: line -> {color (a key of
    COLORS), linestyle, marker, linewidth}. Optionally `ncols` and `size` (inches, inches) of one panel.
    ``python helpers.py`` redraws every csv of this form. Raises KeyError for a line without a style.
    """
    panels, styles = log.provenance["panels"], log.provenance["lines"]
    ncols = min(log.provenance.get("ncols", 2), len(panels))
    nrows, (width, height) = -(-len(panels) // ncols), log.provenance.get("size", (4.6, 3.0))
    fig, axes = plt.subplots(nrows, ncols, figsize=(width * ncols, height * nrows), squeeze=False)
    for ax in axes.flat[len(panels) :]:
        ax.remove()
    for ax, (panel, look) in zip(axes.flat, panels.items(), strict=False):
        part = log.where(panel=panel)
        unknown = sorted(set(part["line"].tolist()) - set(styles))
        _expect(not unknown, f"expected a style for every line, none for {unknown}", KeyError)
        drawn = {}
        for name in (name for name in styles if name in part["line"]):
            style = styles[name] | {"color": COLORS[styles[name]["color"]]}
            drawn[name] = plot_seeds(ax, *part.seeds("x", "y", line=name), **style)
        ax.set_xscale(look.get("xscale", "linear"))
        ax.set_yscale(look.get("yscale", "linear"), **{k: look[k] for k in ("linthresh",) if k in look})
        ax.set(**{k: look[k] for k in ("title", "xlabel", "ylabel", "xlim", "ylim") if k in look})
        if "xticks" in look:
            ax.set_xticks([float(position) for position in look["xticks"]], list(look["xticks"].values()))
        if "yticks" in look:
            ax.set_yticks(look["yticks"], [f"{tick:,g}" for tick in look["yticks"]])
        label_ends(ax, drawn)
    return fig


def save_figure(fig: Figure, name: str) -> bytes:
    """Write figs/<name>.png, close the figure and return the picture."""
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", metadata={"Software": None}, pil_kwargs={"optimize": True})
    plt.close(fig)
    _write(FIGS / f"{name}.png", buffer.getvalue())
    return buffer.getvalue()


def show(fig: Figure, name: str, alt: str) -> None:
    """Save figs/<name>.png and display it, with the alt text as its text form, which nbval compares.

    Raises ValueError for an alt text shorter than a sentence, FileNotFoundError if figs/data/<name>.csv is missing.
    """
    _expect(len(alt) >= 40, f"alt: expected a sentence that says what the picture shows, got {alt!r}")
    saved = (FIGS / "data" / f"{name}.csv").exists()
    wanted = f"save the numbers behind the picture first, as RunLog.save({name!r}, ...)"
    _expect(saved, f"{name}: {wanted}", FileNotFoundError)
    png = save_figure(fig, name)
    display({"image/png": png, "text/plain": alt}, raw=True, metadata={"image/png": {"alt": alt}})


if __name__ == "__main__":
    use_style()
    for path in sorted((FIGS / "data").glob("*.csv")):
        if "panels" in (run_log := RunLog.load(path.stem)).provenance:
            save_figure(plot_curves(run_log), path.stem)
            print(f"figs/{path.stem}.png drawn from figs/data/{path.name}, {len(run_log)} rows")
