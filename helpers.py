"""Plumbing shared by the notebooks: data, evaluation, tables, figures. No network, loss or update.

``python helpers.py`` redraws the two alpha-sweep figures from their tables, without training.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import gymnasium as gym
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from IPython import get_ipython
from IPython.display import display
from matplotlib.animation import PillowWriter
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

ROOT = Path(__file__).resolve().parent
# Where pictures and their tables are written.
FIGS = Path(os.environ.get("CQL_FIGS", ROOT / "figs"))
# A second thread makes networks this small a fifth faster, and ten times slower when another
# program wants its core.
torch.set_num_threads(1)


def _expect(ok: object, message: str, error: type[Exception] = ValueError) -> None:
    if not ok:
        raise error(message)


# ---------------------------------------------------------------------------------- reproducibility
def seed_everything(seed: int) -> torch.Generator:
    """Seed Python, NumPy and torch; returns a fresh torch.Generator with that seed, to draw from.

    Results repeat on one machine with one version of torch; elsewhere in distribution only.

    >>> a, b = (torch.rand(3, generator=seed_everything(0)) for _ in range(2))
    >>> torch.equal(a, b)
    True
    """
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  (other people's code may draw from the old generator)
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


def versions() -> str:
    """One line that names Python, the libraries and the machine's architecture."""
    libraries = ("torch", "gymnasium", "mujoco", "numpy", "pandas", "matplotlib")
    python = f"Python {platform.python_version()} on {platform.machine()}"
    return ", ".join([python, *(f"{name} {version(name)}" for name in libraries)])


def fingerprint(sources: Iterable[str]) -> str:
    """Eight letters that change with any change of the code cells, or of their order."""
    digest = hashlib.sha256("\0".join(source.strip() for source in sources).encode()).digest()
    return "".join(chr(ord("a") + byte % 26) for byte in digest[:8])


def run_summary(started: float) -> None:
    """Print versions, minutes since `started` (a time.perf_counter()), peak memory where the system
    tells it, and the fingerprint of the cells that were run, which the tests compare."""
    print(versions())
    took = f"{(time.perf_counter() - started) / 60:.1f} minutes"
    try:
        import resource  # not on Windows

        unit = 1e9 if platform.system() == "Darwin" else 1e6  # bytes there, kilobytes on Linux
        took += f", at most {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit:.1f} GB"
    except ImportError:
        pass
    print(took)
    if shell := get_ipython():
        print("cells run:", fingerprint(shell.history_manager.input_hist_raw[1:]))


# -------------------------------------------------------------------------------------------- files
def _write(path: Path, content: bytes) -> None:
    """Write to a temporary file beside `path`, then rename it: a failure leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        Path(name).write_bytes(content)
        os.chmod(name, 0o644)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def save_npz(path: str | Path, arrays: Mapping[str, np.ndarray], provenance: Mapping) -> None:
    """Write arrays and their provenance (which json can hold) as one compressed .npz, no pickle."""
    got = f"{len(arrays)} arrays and {dict(provenance)}"
    _expect(arrays and provenance, f"{path}: expected arrays and a provenance, got {got}")
    buffer, text = io.BytesIO(), np.array(json.dumps(dict(provenance)))
    np.savez_compressed(buffer, provenance=text, **arrays, allow_pickle=False)
    _write(Path(path), buffer.getvalue())


def load_npz(path: str | Path, required: Iterable[str] = ()) -> tuple[dict[str, np.ndarray], dict]:
    """Read what `save_npz` wrote: (arrays, provenance).

    Raises FileNotFoundError, or ValueError for a truncated or foreign file and for missing arrays.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        provenance = json.loads(str(arrays.pop("provenance")))
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged archive fails in a dozen ways
        wanted = "expected an .npz archive written by save_npz, with an array named 'provenance'"
        raise ValueError(f"{path}: {wanted}; not readable ({error})") from error
    missing, found = sorted(set(required) - set(arrays)), sorted(arrays)
    _expect(not missing, f"{path}: {missing} missing of {sorted(required)}, found {found}")
    return arrays, provenance


def load_policy(path: str | Path) -> tuple[dict[str, np.ndarray], dict]:
    """Read a tanh-Gaussian policy; the notebook builds its own actor from the arrays.

    Returns (arrays, provenance): `w0` (O, H), `b0` (H,), `w1`, ... layer by layer, the last with
    2 D outputs (mean, then log standard deviation), `obs_mean` and `obs_scale` (O,). Provenance
    names env_id, seed, steps, return_mean and return_std (undiscounted, actions sampled).

    Raises ValueError for a file that is truncated or holds other arrays, shapes or values.
    """
    arrays, provenance = load_npz(path, required=("w0", "b0", "obs_mean", "obs_scale"))
    keys = {"env_id", "seed", "steps", "return_mean", "return_std"}
    missing = sorted(keys - set(provenance))
    _expect(not missing, f"{path}: expected a provenance with {sorted(keys)}, {missing} missing")
    width, expected = arrays["obs_mean"].size, {}
    expected["obs_mean"] = expected["obs_scale"] = (width,)
    for i in range(sum(name.startswith("w") for name in arrays)):
        out = arrays[f"w{i}"].shape[-1] if f"w{i}" in arrays else -1
        expected |= {f"w{i}": (width, out), f"b{i}": (out,)}
        width = out
    found = {name: array.shape for name, array in arrays.items()}
    fit = found == expected and width % 2 == 0
    _expect(fit, f"{path}: expected layers that end in 2 D outputs, {expected}; found {found}")
    good = all(a.dtype.kind == "f" and np.isfinite(a).all() for a in arrays.values())
    good = good and (arrays["obs_scale"] > 0).all()
    _expect(good, f"{path}: expected finite floating point numbers and a positive obs_scale")
    return arrays, provenance


# --------------------------------------------------------------------------------------------- data
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class OfflineDataset:
    """A fixed set of n transitions in memory, in the order in which they were recorded.

    Arguments: obs and next_obs (n, O) floating; action (n,) integer or (n, D) floating; reward (n,)
    floating; terminated and truncated (n,) boolean. They become tensors of the same names on
    `device` (float32, int64, bool), in the environment's own units. `terminated` says that the task
    ended there (no future, no bootstrap), `truncated` that the recording did.

    With `standardise=True`, `obs_mean` and `obs_scale` (O,) are the states' mean and standard
    deviation and `sample` returns standardised states; otherwise they are 0 and 1.

    Raises TypeError or ValueError that names the array, what was expected and what came: wrong
    shape or dtype, lengths that differ, no transitions, NaN or infinite values.
    """

    columns = ("obs", "action", "reward", "next_obs", "terminated", "truncated")

    def __init__(
        self,
        obs,
        action,
        reward,
        next_obs,
        terminated,
        truncated,
        provenance: Mapping | None = None,
        *,
        standardise: bool = False,
        device: str | torch.device = "cpu",
    ):
        given = (obs, action, reward, next_obs, terminated, truncated)
        arrays = dict(zip(self.columns, map(np.asarray, given), strict=True))
        shape = arrays["obs"].shape
        _expect(shape and shape[0], f"obs: expected at least one transition, got shape {shape}")
        for name, array in arrays.items():
            dims = {2} if "obs" in name else {1, 2} if name == "action" else {1}
            fits = array.ndim in dims and len(array) == shape[0]
            fits = fits and ("obs" not in name or array.shape == shape)
            rows = f"{shape[0]} rows and {sorted(dims)} dimensions, obs and next_obs alike"
            _expect(fits, f"{name}: expected {rows}; got shape {array.shape}")
            kinds = "b" if name in ("terminated", "truncated") else "f"
            kinds = "iu" if name == "action" and array.ndim == 1 else kinds
            wanted = f"dtype kind {kinds!r} (i, u integer, f floating, b boolean)"
            got = f"{array.dtype} of shape {array.shape}"
            _expect(array.dtype.kind in kinds, f"{name}: expected {wanted}, got {got}", TypeError)
            dtype = {"f": np.float32, "b": np.bool_}.get(array.dtype.kind, np.int64)
            with np.errstate(over="ignore"):
                array = array.astype(dtype)
            bad = int((~np.isfinite(array)).sum())
            _expect(not bad, f"{name}: expected finite numbers, got {bad} NaN or infinite ones")
            setattr(self, name, torch.as_tensor(array, device=device))
        self.provenance, self.standardise = dict(provenance or {}), standardise
        self.device, one = torch.device(device), torch.ones_like(self.obs[0])
        spread = self.obs.double().std(0, correction=0).clamp_min(1e-6).float()
        self.obs_mean = self.obs.double().mean(0).float() if standardise else 0 * one
        self.obs_scale = spread if standardise else one

    def __len__(self) -> int:
        return len(self.reward)

    def sample(self, batch_size: int, generator: torch.Generator | None = None) -> Batch:
        """Draw transitions uniformly, with replacement: obs (B, O), action (B,) or (B, D),
        reward (B,), next_obs (B, O), and terminated (B,), which is floating, 0. or 1.

        Raises ValueError unless 1 <= batch_size <= len(self).

        >>> zeros = np.zeros((4, 2)); flags = np.zeros(4, dtype=bool)
        >>> data = OfflineDataset(zeros, np.arange(4), np.ones(4), zeros, flags, flags)
        >>> [tuple(x.shape) for x in data.sample(3, seed_everything(0))]
        [(3, 2), (3,), (3,), (3, 2), (3,)]
        """
        wanted = f"an integer from 1 to the {len(self)} transitions there are"
        fits = isinstance(batch_size, int) and 1 <= batch_size <= len(self)
        _expect(fits, f"batch_size: expected {wanted}, got {batch_size!r}")
        place = generator.device if generator else self.device
        i = torch.randint(len(self), (batch_size,), generator=generator, device=place)
        i = i.to(self.device)
        obs, next_obs = self.obs[i], self.next_obs[i]
        if self.standardise:
            obs = (obs - self.obs_mean) / self.obs_scale
            next_obs = (next_obs - self.obs_mean) / self.obs_scale
        return obs, self.action[i], self.reward[i], next_obs, self.terminated[i].float()

    def states(self, n: int, generator: torch.Generator | None = None) -> np.ndarray:
        """n states (n, O), drawn without replacement, float64, in the environment's units."""
        _expect(1 <= n <= len(self), f"n: expected 1 to {len(self)} states, got {n}")
        rows = torch.randperm(len(self), generator=generator)[:n].numpy()
        return self.obs.cpu().double().numpy()[rows]

    def _select(self, rows, standardise: bool) -> OfflineDataset:
        arrays = [getattr(self, name).cpu().numpy()[rows] for name in self.columns]
        options = {"standardise": standardise, "device": self.device}
        return OfflineDataset(*arrays, self.provenance, **options)

    def take(self, n: int, standardise: bool = False) -> OfflineDataset:
        """The first n transitions as a data set. ValueError unless 1 <= n <= len(self)."""
        _expect(1 <= n <= len(self), f"n: expected 1 to the {len(self)} transitions, got {n}")
        return self._select(slice(n), standardise)

    def episodes(self) -> list[tuple[slice, bool]]:
        """(rows, complete) of each episode; one that the recording cut off is not complete."""
        flagged = (self.terminated | self.truncated).cpu().numpy()
        breaks = (self.next_obs[:-1] != self.obs[1:]).any(1).cpu().numpy()
        ends = np.flatnonzero(flagged | np.append(breaks, True))
        starts = np.append(0, ends[:-1] + 1)
        pairs = zip(starts, ends, strict=True)
        return [(slice(int(a), int(b) + 1), bool(flagged[b])) for a, b in pairs]

    def episode_returns(self) -> np.ndarray:
        """Undiscounted return of every complete episode, (number of complete episodes,)."""
        reward = self.reward.cpu().double().numpy()
        return np.array([reward[rows].sum() for rows, complete in self.episodes() if complete])

    def best_episodes(self, fraction: float = 0.5, standardise: bool = False) -> OfflineDataset:
        """The complete episodes with the highest returns, that `fraction` of them (at least one;
        ties stay in): what filtered behaviour cloning clones. ValueError without a complete one."""
        _expect(0 < fraction <= 1, f"fraction: expected 0 < fraction <= 1, got {fraction}")
        returns = self.episode_returns()
        _expect(len(returns), "best_episodes: expected at least one complete episode, got none")
        complete = [np.r_[rows] for rows, whole in self.episodes() if whole]
        least = np.sort(returns)[-int(np.ceil(fraction * len(returns)))]
        keep = [rows for rows, value in zip(complete, returns, strict=True) if value >= least]
        return self._select(np.concatenate(keep), standardise)

    @classmethod
    def concat(
        cls, first: OfflineDataset, second: OfflineDataset, standardise: bool = False
    ) -> OfflineDataset:
        """Both data sets, one after the other. ValueError where their shapes do not fit."""
        pairs = [[getattr(d, name).cpu().numpy() for d in (first, second)] for name in cls.columns]
        for name, (a, b) in zip(cls.columns, pairs, strict=True):
            wanted = f"expected transitions of one environment, got {name} {a.shape} and {b.shape}"
            _expect(a.shape[1:] == b.shape[1:], f"concat: {wanted}")
        provenance = {"parts": [first.provenance, second.provenance]}
        options = {"standardise": standardise, "device": first.device}
        return cls(*map(np.concatenate, pairs), provenance, **options)

    def describe(self) -> str:
        """A data card: size, episodes, returns, how episodes end, which actions occur."""
        returns, action = self.episode_returns(), self.action.cpu().numpy()
        span = "no return to report"
        if len(returns):
            span = f"return {returns.mean():.0f} on average"
            span += f", from {returns.min():.0f} to {returns.max():.0f}"
        if action.ndim == 1:
            values, counts = np.unique(action, return_counts=True)
            shares = zip(values, counts / len(self), strict=True)
            actions = ", ".join(f"{value}: {share:.0%}" for value, share in shares)
        else:
            actions = f"{action.shape[1]} dimensions, mean {action.mean():+.2f}"
            actions += f", standard deviation {action.std():.2f}"
        return (
            f"transitions  {len(self):,}, observations with {self.obs.shape[1]} numbers\n"
            f"episodes     {len(self.episodes()):,}, {len(returns):,} of them complete: {span}\n"
            f"ends         {int(self.terminated.sum()):,} terminated, "
            f"{int(self.truncated.sum()):,} truncated\n"
            f"actions      {actions}"
        )

    @classmethod
    def from_d4rl(cls, data: Mapping[str, np.ndarray], **options) -> OfflineDataset:
        """A D4RL dictionary: observations, actions, rewards, terminals, and timeouts or
        next_observations or both: without either, nobody can tell where an episode was cut.

        Without next_observations they are the next row's observations; the last row of a timed-out
        episode, whose successor was not recorded, is dropped, and the flag moves one row up.
        Raises TypeError for anything but a mapping, KeyError for a missing key, else ValueError.
        """
        wanted = "a dictionary of arrays, such as h5py or d4rl.qlearning_dataset gives"
        mapping = isinstance(data, Mapping)
        _expect(mapping, f"from_d4rl: expected {wanted}, got {type(data).__name__}", TypeError)
        keys = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")
        missing, found = sorted(set(keys[:4]) - set(data)), sorted(data)
        wanted = f"expected the keys {keys[:4]}"
        _expect(not missing, f"from_d4rl: {wanted}; {missing} missing, found {found}", KeyError)
        wanted = "expected timeouts or next_observations: without both, episodes run together"
        _expect(set(keys[4:]) & set(data), f"from_d4rl: {wanted}; found {found}", KeyError)
        columns = {key: np.asarray(data[key]) for key in keys if key in data}
        lengths = {key: len(np.atleast_1d(array)) for key, array in columns.items()}
        same = len(set(lengths.values())) == 1
        _expect(same, f"from_d4rl: expected arrays of one length, got {lengths}")
        obs, terminated = columns["observations"], columns["terminals"].astype(bool)
        truncated = np.asarray(columns.get("timeouts", np.zeros(len(obs)))).astype(bool)
        truncated, keep = truncated & ~terminated, np.ones(len(obs), dtype=bool)
        next_obs = columns.get("next_observations", np.concatenate([obs[1:], obs[-1:]]))
        if "next_observations" not in columns:
            keep = terminated | ~(truncated | (np.arange(len(obs)) == len(obs) - 1))
            truncated = truncated | (np.append(truncated[1:], False) & ~terminated)
        flags = (next_obs, terminated, truncated)
        arrays = (obs, columns["actions"], columns["rewards"], *flags)
        return cls(*(array[keep] for array in arrays), {"source": "D4RL dictionary"}, **options)

    @classmethod
    def from_minari(cls, dataset, **options) -> OfflineDataset:
        """A Minari data set (`minari.load_dataset(...)`), with true next observations.

        Raises TypeError for another object and for observations that are not plain arrays.
        """
        got = f"expected what minari.load_dataset returns, got {type(dataset).__name__}"
        _expect(hasattr(dataset, "iterate_episodes"), f"from_minari: {got}", TypeError)
        parts = []
        for e in dataset.iterate_episodes():
            got = f"expected observations as one array, got {type(e.observations).__name__}"
            plain = isinstance(e.observations, np.ndarray)
            _expect(plain, f"from_minari: {got}; flatten them first", TypeError)
            states = (e.observations[:-1], e.observations[1:])
            ends = (e.terminations, e.truncations)
            parts.append((states[0], e.actions, e.rewards.astype(float), states[1], *ends))
        _expect(parts, "from_minari: expected at least one episode, got none")
        name = getattr(getattr(dataset, "spec", None), "dataset_id", "unknown")
        arrays = map(np.concatenate, zip(*parts, strict=True))
        return cls(*arrays, {"source": f"Minari {name}"}, **options)


# --------------------------------------------------------------------------- acting in environments
Act = Callable[[torch.Tensor], object]  # (n, O) float32 -> actions (n,) or (n, D)


def _actions(action, envs: gym.vector.VectorEnv) -> np.ndarray:
    """What `act` returned, as the environments want it. ValueError for other actions, or NaN."""
    space = envs.action_space
    empty = action is None
    action = np.array(None) if empty else torch.as_tensor(action).detach().cpu().numpy()
    fits = action.size == np.prod(space.shape)
    fits = fits and (len(space.shape) == 1 or action.shape[-1:] == space.shape[-1:])
    kinds = "iub" if space.dtype.kind == "i" else "iuf"
    fits = fits and action.dtype.kind in kinds and np.isfinite(action).all()
    if not fits:  # said only then: this runs at every step of every environment
        wanted, got = f"{space.shape} for {space.dtype}", f"shape {action.shape}, {action.dtype}"
        raise ValueError(f"act: expected finite actions of shape {wanted}, got {got}")
    return action.reshape(space.shape).astype(space.dtype)


@torch.no_grad()
def collect(
    env_id: str, act: Act, steps: int, seed: int, n_envs: int = 1, **provenance
) -> OfflineDataset:
    """Play whole episodes 0, 1, 2, ..., reset with seed + number, and keep the first `steps` rows.

    `act` maps observations (n_envs, O), float32 and not standardised, to actions. `next_obs` is the
    true successor at time limits, too. Episodes stand in the order of their numbers however many
    environments play them, so that short ones are not preferred. Further arguments are kept as
    provenance. gymnasium raises its own error for an unknown environment.
    """
    got = f"steps={steps}, n_envs={n_envs}"
    _expect(steps >= 1 and n_envs >= 1, f"collect: expected at least one of each, got {got}")
    autoreset = gym.vector.AutoresetMode.DISABLED
    makers = [lambda: gym.make(env_id)] * n_envs
    envs = gym.vector.SyncVectorEnv(makers, autoreset_mode=autoreset)
    number, started, length = np.arange(n_envs), n_envs, np.zeros(n_envs, dtype=int)
    finished: dict[int, int] = {}  # number of an episode -> its length
    whole, prefix = 0, 0  # episodes 0 ... whole - 1 are finished and hold `prefix` transitions
    obs, _ = envs.reset(seed=[seed + int(k) for k in number])
    rows: list[tuple] = []
    while prefix + length[number == whole].sum() < steps:
        action = _actions(act(torch.as_tensor(obs, dtype=torch.float32)), envs)
        next_obs, reward, terminated, truncated, _ = envs.step(action)
        flags = (terminated.copy(), truncated.copy())
        rows.append((number.copy(), obs, action, reward.copy(), next_obs, *flags))
        length, obs, done = length + 1, next_obs, terminated | truncated
        if done.any():
            for i in np.flatnonzero(done):
                finished[int(number[i])] = int(length[i])
                number[i], length[i], started = started, 0, started + 1
            while whole in finished:
                whole, prefix = whole + 1, prefix + finished[whole]
            seeds = [seed + int(k) for k in number]
            obs, _ = envs.reset(seed=seeds, options={"reset_mask": done})
    envs.close()
    columns = (np.stack(column) for column in zip(*rows, strict=True))
    episode, *columns = (column.reshape(-1, *column.shape[2:]) for column in columns)
    order = np.argsort(episode, kind="stable")[:steps]
    about = {"env_id": env_id, "steps": steps, "seed": seed, "versions": versions()}
    return OfflineDataset(*(column[order] for column in columns), about | provenance)


def _restore(env_id: str, envs: gym.vector.VectorEnv, obs: np.ndarray) -> None:
    """Put copy i of the environment into the state that obs[i] shows; exact, since what HalfCheetah
    does not show is its position along the track, on which nothing depends: it becomes 0."""
    if env_id.startswith("CartPole"):
        envs.unwrapped.state = np.array(obs, dtype=np.float64).T
    elif env_id.startswith("HalfCheetah"):
        for env, state in zip(envs.unwrapped.envs, np.float64(obs), strict=True):
            env.unwrapped.set_state(np.append(0.0, state[:8]), state[8:])
    else:
        wanted = "states can be restored for CartPole and HalfCheetah"
        raise ValueError(f"env_id: {wanted}, got {env_id!r}")


@torch.no_grad()
def _returns(envs, obs, act: Act, gamma: float, horizon: int, obs_mean, obs_scale, agents):
    """Discounted sum of rewards of each copy's first episode, (n,) or (agents, n)."""
    alive, total, discount = np.ones(envs.num_envs, dtype=bool), np.zeros(envs.num_envs), 1.0
    obs_mean, obs_scale = (torch.as_tensor(x).float().cpu() for x in (obs_mean, obs_scale))
    for t in range(horizon):
        seen = torch.as_tensor(obs, dtype=torch.float32)
        seen = seen if agents is None else seen.reshape(agents, -1, seen.shape[-1])
        action = act((seen - obs_mean) / obs_scale)
        action, bonus = action if isinstance(action, tuple) else (action, torch.zeros(()))
        obs, reward, terminated, truncated, _ = envs.step(_actions(action, envs))
        extra = torch.as_tensor(bonus).cpu().numpy().reshape(-1) if t else 0.0
        total, discount = total + discount * alive * (reward + extra), discount * gamma
        alive &= ~(terminated | truncated)
        if not alive.any():
            break
    envs.close()
    return total if agents is None else total.reshape(agents, -1)


def evaluate(
    env_id: str,
    act: Act,
    seeds: Sequence[int],
    obs_mean=0.0,
    obs_scale=1.0,
    agents: int | None = None,
) -> np.ndarray:
    """Undiscounted return of one episode per seed, (len(seeds),): the same starts for everybody.

    `act` maps observations (len(seeds), O), standardised with `obs_mean` and `obs_scale`, to
    actions. With `agents=E` it maps (E, len(seeds), O) to (E, len(seeds)) or (E, len(seeds), D),
    the result is (E, len(seeds)), and `obs_mean`, `obs_scale` may be (E, 1, O).
    """
    _expect(len(seeds), "seeds: expected at least one, got none")
    copies = agents or 1
    envs = gym.make_vec(env_id, copies * len(seeds))
    if env_id.startswith("CartPole"):  # its vectorised form takes one seed for all copies
        single = gym.make(env_id)
        start = [single.reset(seed=int(seed)) and single.unwrapped.state for seed in seeds]
        envs.reset(seed=0)
        obs = np.tile(np.stack(start), (copies, 1))
        _restore(env_id, envs, obs)
    else:
        obs, _ = envs.reset(seed=[int(seed) for seed in seeds] * copies)
    return _returns(envs, obs, act, 1.0, 1_000_000, obs_mean, obs_scale, agents)


def discounted_return(
    env_id: str,
    act: Act,
    obs: np.ndarray,
    gamma: float,
    horizon: int = 1000,
    obs_mean=0.0,
    obs_scale=1.0,
    agents: int | None = None,
) -> np.ndarray:
    """The truth that a prediction is judged by: the discounted return of `act` from states (n, O).

    States are in the environment's units and restored exactly; there is no time limit but
    `horizon`. If `act` returns a pair (action, bonus), the bonus (n,) is added to the reward from
    the second step on: with -alpha_ent * log_pi that is the soft value which SAC's critic predicts.
    The result is (n,). With `agents=E` it is (E, n): every agent starts from all n states, or from
    its own where obs is (E, n, O).
    """
    obs = np.asarray(obs, dtype=np.float64)
    dims = {2} if agents is None else {2, 3}
    fits = obs.ndim in dims and obs.size and np.isfinite(obs).all()
    _expect(fits, f"obs: expected finite states of shape (n, O), got shape {obs.shape}")
    got = f"gamma={gamma}, horizon={horizon}"
    _expect(0 <= gamma <= 1 and horizon >= 1, f"expected 0 <= gamma <= 1, horizon >= 1; got {got}")
    obs = obs.reshape(-1, obs.shape[-1]) if obs.ndim == 3 else np.tile(obs, (agents or 1, 1))
    envs = gym.make_vec(env_id, len(obs), max_episode_steps=horizon + 1)
    width = envs.single_observation_space.shape
    wanted = f"states of {env_id}, {width} each"
    _expect(obs.shape[1:] == width, f"obs: expected {wanted}, got {obs.shape[1:]}")
    envs.reset(seed=0)
    _restore(env_id, envs, obs)
    return _returns(envs, obs, act, gamma, horizon, obs_mean, obs_scale, agents)


# ----------------------------------------------------------------------------- tables and verdicts
def save_table(table: pd.DataFrame, name: str, **provenance) -> pd.DataFrame:
    """Write figs/data/<name>.csv, seven digits a number, under comment lines that say where the
    numbers come from; returns the table as it reads back, so that figures show what is stored.

    Raises ValueError for an empty table, no provenance, NaN or infinite numbers. A long run (a name
    that begins with "long/") costs hours: one that is there may be extended, by a table that begins
    with all its rows and has more, and is never replaced: FileExistsError.
    """
    _expect(len(table) and provenance, f"{name}: expected rows and a provenance, got {len(table)}")
    numbers = table.select_dtypes("number")
    bad = [column for column in numbers if not np.isfinite(numbers[column]).all()]
    _expect(not bad, f"{name}: expected finite numbers, got NaN or infinite ones in {bad}")
    path = FIGS / "data" / f"{name}.csv"
    text = table.to_csv(index=False, float_format="%.7g", lineterminator="\n")
    if name.startswith("long/") and path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        stored = "".join(line for line in lines if not line.startswith("#"))
        wanted = "holds a long run, which can be extended and not replaced: remove it first"
        longer = text.startswith(stored) and text != stored
        _expect(longer, f"{path} {wanted}", FileExistsError)
    about = provenance | {"rows": len(table)}
    header = "".join(f"# {key}: {json.dumps(value)}\n" for key, value in about.items())
    _write(path, (header + text).encode())
    return read_table(name)


def read_table(name: str) -> pd.DataFrame:
    """Read figs/data/<name>.csv; its comment lines become `table.attrs`.

    Raises FileNotFoundError, or ValueError if the file was cut off or is not of this form.
    """
    paths = [folder / "data" / f"{name}.csv" for folder in (FIGS, ROOT / "figs")]
    path = next((path for path in paths if path.exists()), None)
    wanted = f"no figs/data/{name}.csv: run the notebook that makes it first"
    _expect(path, wanted, FileNotFoundError)
    try:
        text = path.read_text(encoding="utf-8")
        header = [line[2:].split(": ", 1) for line in text.splitlines() if line.startswith("# ")]
        about = {key: json.loads(value) for key, value in header}
        table = pd.read_csv(io.StringIO(text), comment="#")
        whole = len(table) == about["rows"] and text.endswith("\n") and table.notna().all(axis=None)
        _expect(whole, f"{len(table)} rows, the last one {text.splitlines()[-1]!r}")
    except (ValueError, KeyError) as error:
        wanted = "expected a table whose comment lines count its rows"
        raise ValueError(f"{path}: {wanted}, got {error}") from error
    table.attrs = about
    return table


def late_mean(table: pd.DataFrame, column: str, by: str | list[str]) -> pd.Series:
    """Mean of a column over the reports of the second half of training, for each group `by`."""
    late = table[table["step"] > table["step"].max() / 2]
    return late.groupby(by, sort=False)[column].mean()


def lag_line(step: np.ndarray, truth: np.ndarray, tau: float, gamma: float) -> np.ndarray:
    """What an honest critic would predict that learns at the pace of its target network alone.

    Solves d l/dt = tau (1 - gamma) (V(t) - l) with l(0) = 0, exactly for a truth V that is linear
    between reports: step (T,), ascending, and truth (T,) or (S, T) -> the same shape. Before the
    first report V is constant. For a constant V: (1 - exp(-t tau (1 - gamma))) V.
    """
    step, truth = np.append(0.0, step), np.asarray(truth, dtype=float)
    truth = np.concatenate([truth[..., :1], truth], axis=-1)
    line = np.zeros_like(truth)
    for t in range(1, len(step)):
        k = tau * (1 - gamma) * (step[t] - step[t - 1])
        keep, slope = np.exp(-k), (truth[..., t] - truth[..., t - 1]) / max(k, 1e-12)
        excess = keep * (line[..., t - 1] - truth[..., t - 1])
        line[..., t] = truth[..., t] + excess - slope * (1 - keep)
    return line[..., 1:]


def verdict(*claims: tuple[str, str, object]) -> None:
    """Print a line per (claim, threshold, ok), OK or FAIL; AssertionError if any failed.

    `ok` is a boolean or an array of them, one per seed. An empty array is an error.

    >>> verdict(("two and two make four", "exactly", 2 + 2 == 4))
    two and two make four   exactly   OK
    """
    oks = [np.asarray(ok) for _, _, ok in claims]
    fits = claims and all(ok.size and ok.dtype == bool for ok in oks)
    _expect(fits, "verdict: expected claims with a boolean each, or a non-empty array of them")
    wide, wider = (max(len(claim[i]) for claim in claims) for i in (0, 1))
    for (claim, threshold, _), ok in zip(claims, oks, strict=True):
        print(f"{claim:<{wide}}   {threshold:<{wider}}   {'OK' if ok.all() else 'FAIL'}")
    failed = [claim for (claim, _, _), ok in zip(claims, oks, strict=True) if not ok.all()]
    assert not failed, "not reproduced: " + "; ".join(failed)


# ------------------------------------------------------------------------------------------ figures
# Okabe-Ito: distinguishable with any colour vision; line styles say the same a second time.
COLORS = dict(blue="#0072b2", vermilion="#d55e00", green="#009e73", purple="#cc79a7")
COLORS |= dict(orange="#e69f00", sky="#56b4e9", black="#000000", grey="#767676")
STYLES = [  # of lines that are told apart by a number, from the first to the last
    {"color": COLORS["vermilion"], "linestyle": "--", "marker": "v"},
    {"color": COLORS["orange"], "linestyle": "-.", "marker": "s"},
    {"color": COLORS["blue"], "linestyle": "-", "marker": "o"},
    {"color": COLORS["purple"], "linestyle": ":", "marker": "D"},
]


def use_style() -> None:
    """The series' look: white ground, left-aligned titles that state the finding."""
    sizes = {"font.size": 9.5, "axes.titlesize": 10.5, "figure.dpi": 110, "savefig.dpi": 110}
    ground = {"figure.facecolor": "white", "savefig.facecolor": "white"}
    axes = {"axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left"}
    grid = {"axes.grid": True, "grid.alpha": 0.25, "figure.constrained_layout.use": True}
    cycle = {"axes.prop_cycle": plt.cycler(color=list(COLORS.values()))}
    plt.rcParams.update(sizes | ground | axes | grid | cycle | {"legend.frameon": False})


def plot_seeds(ax: Axes, table: pd.DataFrame, x: str, y: str, **style) -> Line2D:
    """Every seed of a table as a thin line, their mean as a thick one, which is returned.

    Raises ValueError where a seed has one x twice (a run recorded twice) or lacks one.
    """
    repeated = table.duplicated(["seed", x]).any()
    _expect(not repeated, f"{y} over {x}: a seed has one {x} twice; was a training cell run twice?")
    curves = table.pivot(index=x, columns="seed", values=y)
    _expect(len(curves) and curves.notna().all(axis=None), f"{y}: expected every {x} of every seed")
    (line,) = ax.plot(curves.index, curves.mean(axis=1), **({"linewidth": 2.0} | style))
    if curves.shape[1] > 1:
        ax.plot(curves.index, curves, color=line.get_color(), linewidth=0.6, alpha=0.4)
    return line


def label_ends(ax: Axes, size: float = 8.5) -> None:
    """Write each line's label at its right end, moved apart vertically where two would overlap."""
    ax.figure.draw_without_rendering()  # lays out the axes and sets their limits
    lines = [line for line in ax.get_lines() if not line.get_label().startswith("_")]
    low, high = ax.transAxes.transform([(0, 0), (0, 1)])[:, 1]
    gap = 1.2 * size * ax.figure.dpi / 72 / (high - low)  # a line of text, as a share of the axes
    ends = [ax.transData.transform((line.get_xdata()[-1], line.get_ydata()[-1])) for line in lines]
    height = [(end[1] - low) / (high - low) for end in ends]
    y = -np.inf
    for left, i in enumerate(np.argsort(height, kind="stable")):
        y = max(y + gap, min(np.clip(height[i], 0, 1), 1 - gap * (len(lines) - 1 - left)))
        look = {"va": "center", "fontsize": size, "color": lines[i].get_color()}
        ax.annotate(lines[i].get_label(), (1.01, y), xycoords="axes fraction", **look)


def plot_alpha_reward(table: pd.DataFrame) -> Figure:
    """Return of an alpha sweep: a row of two panels for each data set.

    `table` has the columns dataset, alpha_cql, seed, step and return; every further column is drawn
    as a level to compare with (a clone's return, the data's own). Left: return over gradient steps,
    of the smallest, middle, best and largest weight. Right: mean return of the second half of
    training over alpha_cql, every seed.
    """
    names, alphas = list(table["dataset"].unique()), sorted(table["alpha_cql"].unique())
    levels = [c for c in table if c not in ("dataset", "alpha_cql", "seed", "step", "return")]
    size = (10.0, 2.5 * len(names))
    fig, axes = plt.subplots(len(names), 2, figsize=size, squeeze=False, sharey=True)
    for (left, right), name in zip(axes, names, strict=True):
        part = table[table["dataset"] == name]
        late = late_mean(part, "return", ["alpha_cql", "seed"]).reset_index()
        late["place"] = late["alpha_cql"].map(alphas.index)  # evenly spaced: 0 has no logarithm
        means = late.groupby("alpha_cql")["return"].mean()
        good = means.index[means >= 0.95 * means.max()]
        drawn = sorted({alphas[0], alphas[len(alphas) // 2], means.idxmax(), alphas[-1]})
        for alpha_cql, style in zip(drawn, STYLES, strict=False):
            style = style | {"label": rf"$\alpha$ = {alpha_cql:g}", "markersize": 4}
            plot_seeds(left, part[part["alpha_cql"] == alpha_cql], "step", "return", **style)
        plot_seeds(right, late, "place", "return", label="CQL", color=COLORS["blue"], marker="o")
        for i, level in enumerate(levels):
            color = COLORS[("black", "green", "purple", "grey", "orange")[i % 5]]
            dash = ("--", "-.", ":", "-", (0, (1, 3)))[i % 5]
            look = {"label": level, "color": color, "linestyle": dash, "linewidth": 1.3}
            height = part.groupby("seed")[level].first().mean()
            right.plot([0, len(alphas) - 1], [height] * 2, **look)
        ends = ", ".join(rf"{means[a]:.0f} at $\alpha$ = {a:g}" for a in drawn)
        left.set(title=f"{name}: {ends}", xlabel="gradient steps", ylabel="return [steps]")
        listed = ", ".join(f"{alpha_cql:g}" for alpha_cql in good)
        title = rf"{name}: within 5 % of the best at $\alpha$ = {listed}"
        right.set(title=title, xlabel=r"$\alpha_{cql}$ (not to scale)")
        right.set_xticks(range(len(alphas)), [f"{alpha_cql:g}" for alpha_cql in alphas])
        label_ends(left)
        label_ends(right)
    return fig


def plot_q_value(table: pd.DataFrame, tau: float, gamma: float) -> Figure:
    """Predicted value beside the truth, the lag line and the ceiling 1/(1 - gamma).

    `table` has the columns dataset, alpha_cql, seed, step, prediction and truth. A row of panels
    for each data set, one for each of three weights; the axis is logarithmic above the ceiling.
    The titles say how far the median seed ends from the truth.
    """
    names, alphas = list(table["dataset"].unique()), sorted(table["alpha_cql"].unique())
    alphas = sorted({alphas[0], alphas[len(alphas) // 2], alphas[-1]})
    ceiling, shape = 1 / (1 - gamma), (len(names), len(alphas))
    size = (3.7 * shape[1], 2.2 * shape[0])
    fig, axes = plt.subplots(*shape, figsize=size, squeeze=False, sharex=True, sharey=True)
    panels = [(name, alpha_cql) for name in names for alpha_cql in alphas]
    for ax, (name, alpha_cql) in zip(axes.flat, panels, strict=True):
        part = table[(table["dataset"] == name) & (table["alpha_cql"] == alpha_cql)]
        step, truth = np.unique(part["step"]), part.groupby("step")["truth"].mean()
        plot_seeds(ax, part, "step", "prediction", label="prediction", color=COLORS["blue"])
        plot_seeds(ax, part, "step", "truth", label="truth", color=COLORS["black"], linestyle="--")
        lag = lag_line(step, truth.to_numpy(), tau, gamma)
        ax.plot(step, lag, label="lag line", color=COLORS["green"], linestyle=":")
        look = {"label": "ceiling", "color": COLORS["vermilion"], "linestyle": "-."}
        ax.plot(step, 0 * step + ceiling, **look)
        last = part[part["step"] == step[-1]]
        excess = (last["prediction"] - last["truth"]).median()
        side = "above" if excess > 0 else "below"
        ax.set(title=rf"{name}, $\alpha$ = {alpha_cql:g}: {abs(excess):.0f} {side} the truth")
        ax.set_yscale("symlog", linthresh=ceiling, linscale=2.5)
        ax.set_yticks([0, ceiling / 2, *ceiling * np.array([1, 10, 100, 1000])], minor=False)
        ax.yaxis.set_major_formatter("{x:,.0f}")
        ax.set_ylim(bottom=0)
    for ax in axes.flat:
        label_ends(ax)
    for ax in axes[-1]:
        ax.set_xlabel("gradient steps")
    for ax in axes[:, 0]:
        ax.set_ylabel(f"value, log above {ceiling:.0f}")
    return fig


def draw_cheetah(table: pd.DataFrame, name: str, moments: Sequence[int]) -> Figure:
    """HalfCheetahs side by side: figs/<name>.gif, and a strip of these moments, which is returned.

    `table` has the columns method, step and q0 ... q8, the simulator's positions; q0 is the metres
    run, a step takes 0.05 s. The bodies are capsules whose ends the simulator knows: no OpenGL.
    """
    env = gym.make("HalfCheetah-v5").unwrapped
    env.reset(seed=0)
    capsule = env.model.geom_type == 3  # mujoco.mjtGeom.mjGEOM_CAPSULE
    radius, half = env.model.geom_size[capsule, :2].T
    methods, steps = list(table["method"].unique()), sorted(table["step"].unique())
    places = table.set_index(["method", "step"])[[f"q{i}" for i in range(9)]]
    colors = [COLORS[c] for c in ("vermilion", "orange", "green", "blue", "purple", "black")]

    def draw(ax: Axes, method: str, step: int) -> None:
        q = places.loc[method, step].to_numpy()
        env.set_state(q, np.zeros(9))
        axis = half[:, None] * env.data.geom_xmat[capsule].reshape(-1, 3, 3)[:, :, 2]
        middle = env.data.geom_xpos[capsule] - [q[0], 0, 0]
        ends = np.stack([middle - axis, middle + axis], axis=1)[:, :, [0, 2]]
        ax.clear()
        ax.axis("off")
        ax.set(xlim=(-1.3, 1.3), ylim=(-0.1, 1.8), aspect="equal")
        ax.set_title(f"{method} {q[0]:z.1f} m", fontsize=9, loc="center")
        points = 72 * ax.get_window_extent().width / ax.figure.dpi / 2.6  # of a metre
        color = colors[methods.index(method) % len(colors)]
        look = {"linewidths": 2 * radius * points, "colors": color, "capstyle": "round"}
        ax.add_collection(LineCollection(ends, **look))
        marks = np.arange(np.ceil(2 * (q[0] - 1.3)), 2 * (q[0] + 1.3)) / 2 - q[0]
        ax.plot(marks, 0 * marks, "|", color=COLORS["grey"], markersize=5)  # every half metre
        ax.axhline(0, color=COLORS["grey"], linewidth=1)

    def stage(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, np.ndarray]:
        fig, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
        for ax in axes.flat:
            ax.set(xlim=(-1.3, 1.3), ylim=(-0.1, 1.8), aspect="equal", title="x")
            ax.axis("off")
        fig.canvas.draw()  # gives the axes the size that the width of the limbs depends on
        return fig, axes

    fig, axes = stage(len(methods), 1, (3.0, 1.35 * len(methods)))
    with tempfile.TemporaryDirectory() as folder:
        film, writer = Path(folder) / "film.gif", PillowWriter(fps=20)
        with writer.saving(fig, film, dpi=80):
            for step in steps[::2]:
                for ax, method in zip(axes[:, 0], methods, strict=True):
                    draw(ax, method, step)
                writer.grab_frame()
        _write(FIGS / f"{name}.gif", film.read_bytes())
    plt.close(fig)
    fig, axes = stage(len(methods), len(moments), (1.6 * len(moments), 1.35 * len(methods)))
    for row, method in zip(axes, methods, strict=True):
        for ax, step in zip(row, moments, strict=True):
            draw(ax, method, step)
    return fig


def save_figure(fig: Figure, name: str) -> bytes:
    """Write figs/<name>.png, close the figure and return the picture."""
    buffer = io.BytesIO()
    options = {"metadata": {"Software": None}, "pil_kwargs": {"optimize": True}}
    fig.savefig(buffer, format="png", **options)
    plt.close(fig)
    _write(FIGS / f"{name}.png", buffer.getvalue())
    return buffer.getvalue()


def show(fig: Figure, name: str, alt: str) -> None:
    """Save figs/<name>.png and display it, with the sentence `alt` as its caption and text form.

    Raises ValueError for less than a sentence, FileNotFoundError without figs/data/<name>.csv.
    """
    _expect(len(alt) >= 40, f"alt: expected a sentence on what the picture shows, got {alt!r}")
    saved, wanted = (FIGS / "data" / f"{name}.csv").exists(), f"save_table(table, {name!r}, ...)"
    _expect(saved, f"{name}: save its numbers first, with {wanted}", FileNotFoundError)
    png = save_figure(fig, name)
    data = {"image/png": png, "text/plain": alt}
    display(data, raw=True, metadata={"image/png": {"alt": alt}})
    print(alt)


if __name__ == "__main__":
    use_style()
    save_figure(plot_alpha_reward(read_table("CQL_alpha_reward")), "CQL_alpha_reward")
    sweep = read_table("CQL_q_value")
    clock = {"tau": sweep.attrs["tau"], "gamma": sweep.attrs["gamma"]}
    save_figure(plot_q_value(sweep, **clock), "CQL_q_value")
    print("drawn from figs/data: CQL_alpha_reward.png, CQL_q_value.png")
