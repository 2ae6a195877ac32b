"""helpers.py: what it promises, and what it refuses."""

import doctest
import os
import random
import re
import time

import gymnasium as gym
import helpers
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from gymnasium.envs.registration import register
from helpers import OfflineDataset, collect, discounted_return, evaluate, read_table, save_table

CHEETAH = "HalfCheetahShort-v0"
short = {"max_episode_steps": 12}
register("CartPoleShort-v0", "gymnasium.envs.classic_control:CartPoleEnv", **short)
register(CHEETAH, "gymnasium.envs.mujoco.half_cheetah_v5:HalfCheetahEnv", **short)


@pytest.fixture
def figs(tmp_path, monkeypatch):
    monkeypatch.setattr(helpers, "FIGS", tmp_path)
    yield tmp_path
    plt.close("all")


def refused(error, words):
    return pytest.raises(error, match=words)


def arrays(n=6, width=3, action_dim=None):
    """Columns of a small data set in which each row is told apart by its number."""
    obs, action = np.arange(n)[:, None] + np.linspace(0, 0.5, width), np.arange(n) % 2
    if action_dim:
        action = np.random.default_rng(0).uniform(-1, 1, (n, action_dim))
    columns = {"obs": obs, "action": action, "reward": np.arange(n) * 0.25, "next_obs": obs + 1}
    return columns | {"terminated": np.arange(n) % 3 == 2, "truncated": np.arange(n) % 4 == 1}


def dataset(n=6, **options):
    return OfflineDataset(**arrays(n), **options)


def same(a, b):
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in OfflineDataset.columns)


def good(obs):
    """CartPole's transparent controller."""
    return (obs[..., 2] + 0.5 * obs[..., 3] + 0.1 * obs[..., 1] > 0).long()


def sloppy(obs):
    return (obs[..., 2] > 0).long()


def left(obs):
    return torch.zeros(obs.shape[:-1], dtype=torch.int64)


def swing(obs):
    """A deterministic policy for HalfCheetah."""
    return torch.sin(3 * obs[..., :6])


def alone(act, obs):
    """The action for one observation."""
    return act(torch.as_tensor(obs, dtype=torch.float32)[None])[0].numpy()


# ---- seeds, summary, files ----------------------------------------------------------------------
def test_doctests():
    result = doctest.testmod(helpers)
    assert result.attempted > 0 and result.failed == 0, result


def test_no_network_loss_or_update():
    """helpers.py is plumbing: what is taught stands in the notebooks."""
    source = (helpers.ROOT / "helpers.py").read_text("utf-8")
    for word in ("torch.nn", "nn.", ".backward(", "torch.optim", "requires_grad"):
        assert word not in source


def test_seed_everything():
    def draws(seed):
        generator = helpers.seed_everything(seed)
        numbers = random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002
        return *numbers, torch.rand(1, generator=generator).item()

    assert draws(3) == draws(3)
    assert all(a != b for a, b in zip(draws(3), draws(4), strict=True))
    generator, state = helpers.seed_everything(0), torch.get_rng_state()
    torch.rand(5, generator=generator)
    assert torch.equal(state, torch.get_rng_state()), "it draws from the global generator"


def test_run_summary(capsys):
    helpers.run_summary(time.perf_counter() - 90)
    said = capsys.readouterr().out
    assert said.startswith("Python 3") and "torch 2" in said and "\n1.5 minutes" in said
    prints = [helpers.fingerprint(x) for x in (["a", "b"], ["b", "a"], ["ab"], ["a", "b", "c"])]
    assert len(set(prints)) == 4 and all(re.fullmatch("[a-z]{8}", letters) for letters in prints)
    assert helpers.fingerprint(["a\n", "b"]) == prints[0]


def write_text(path):
    path.write_text("some text")


def write_pickle(path):
    np.savez(path, provenance="{}", a=np.array([{"a": 1}], dtype=object))


def write_without_provenance(path):
    np.savez(path, a=np.ones(3))


def test_npz(tmp_path):
    path, content = tmp_path / "x.npz", {"a": np.arange(300.0), "b": np.ones((20, 3), dtype=bool)}
    helpers.save_npz(path, content, {"seed": 0})
    loaded, said = helpers.load_npz(path, required=content)
    assert said == {"seed": 0} and list(loaded) == list(content)
    assert all(
        np.array_equal(loaded[k], v) and loaded[k].dtype == v.dtype for k, v in content.items()
    )
    with refused(ValueError, r"\['c'\] missing"):
        helpers.load_npz(path, required=["a", "c"])
    with refused(FileNotFoundError, "no.npz"):
        helpers.load_npz(tmp_path / "no.npz")
    for arrays, about in [({}, {"a": 0}), (content, {}), ({"a": np.array([None])}, {"a": 0})]:
        with pytest.raises(ValueError):
            helpers.save_npz(tmp_path / "y.npz", arrays, about)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for place in rng.integers(len(whole), size=60):
        damaged = bytearray(whole)
        damaged[place] ^= rng.integers(1, 256)
        path.write_bytes(damaged)
        try:  # refused, or harmless
            assert all(np.array_equal(helpers.load_npz(path)[0][k], content[k]) for k in content)
        except ValueError as error:
            assert "x.npz: expected" in str(error)
    for write in (write_text, write_pickle, write_without_provenance):
        write(path)
        with refused(ValueError, "x.npz: expected"):
            helpers.load_npz(path)
    for share in (0, 0.1, 0.5, 0.99):
        path.write_bytes(whole[: int(share * len(whole))])
        with refused(ValueError, "x.npz: expected an .npz archive"):
            helpers.load_npz(path)
    assert os.listdir(tmp_path) == ["x.npz"]


POLICY = {"w0": np.ones((17, 8)), "b0": np.zeros(8), "w1": np.ones((8, 12)), "b1": np.zeros(12)}
POLICY |= {"obs_mean": np.zeros(17), "obs_scale": np.ones(17)}
ABOUT = {"env_id": "HalfCheetah-v5", "seed": 0, "steps": 10, "return_mean": 1.0, "return_std": 0.5}
BAD_POLICIES = [
    {"w1": np.ones((12, 8))},
    {"w1": np.ones((9, 12))},
    {"w1": np.ones((8, 11)), "b1": np.zeros(11)},  # odd: a mean and a deviation each
    {"w1": None, "b1": None, "w2": np.ones((8, 12)), "b2": np.zeros(12)},
    {"b0": np.zeros(7)},
    {"b0": np.zeros((1, 8))},
    {"b0": np.zeros(8, dtype=int)},
    {"b0": np.full(8, np.nan)},
    {"w0": np.full((17, 8), np.inf)},
    {"b1": None},
    {"obs_mean": np.zeros(())},
    {"obs_scale": None},
    {"obs_scale": np.ones(16)},
    {"obs_scale": np.zeros(17)},
    {"extra": np.ones(3)},
]


def test_load_policy(tmp_path):
    path = tmp_path / "p.npz"
    helpers.save_npz(path, POLICY, ABOUT)
    loaded, about = helpers.load_policy(path)
    assert about == ABOUT and list(loaded) == list(POLICY)
    path.write_bytes(path.read_bytes()[:-100])
    with refused(ValueError, "p.npz: expected"):
        helpers.load_policy(path)
    for change in BAD_POLICIES:
        content = {k: v for k, v in (POLICY | change).items() if v is not None}
        helpers.save_npz(path, content, ABOUT)
        with refused(ValueError, "p.npz: expected"):
            helpers.load_policy(path)
    for key in ABOUT:
        helpers.save_npz(path, POLICY, {k: v for k, v in ABOUT.items() if k != key})
        with refused(ValueError, f"p.npz: expected a provenance .*{key}"):
            helpers.load_policy(path)


# ---- OfflineDataset -----------------------------------------------------------------------------
def test_dataset_keeps_the_data():
    given = arrays()
    data = OfflineDataset(**given)
    kinds = [torch.float32, torch.int64, torch.float32, torch.float32, torch.bool, torch.bool]
    for name, kind in zip(OfflineDataset.columns, kinds, strict=True):
        column = getattr(data, name)
        assert len(column) == len(data) == 6 and column.dtype == kind
        np.testing.assert_array_equal(column, given[name].astype(column.numpy().dtype))
    assert (data.obs_mean == 0).all() and (data.obs_scale == 1).all()
    given["obs"][:] = 99  # the caller's arrays are the caller's
    assert data.obs.max() < 99
    many = OfflineDataset(**arrays(action_dim=2))
    assert many.action.dtype == torch.float32 and many.sample(4)[1].shape == (4, 2)


BAD_COLUMNS = [  # the array that the message must name, change
    ("obs", {k: v[:0] for k, v in arrays().items()}),
    ("obs", {"obs": np.float64(1.0)}),
    ("obs", {"obs": np.zeros(6)}),
    ("obs", {"obs": np.zeros((6, 3, 3))}),
    ("obs", {"obs": np.zeros((6, 3), dtype=int)}),
    ("obs", {"obs": np.zeros((6, 3), dtype=complex)}),
    ("obs", {"obs": np.full((6, 3), np.inf)}),
    ("action", {"action": np.zeros(7, dtype=int)}),
    ("action", {"action": np.zeros(6)}),
    ("action", {"action": np.zeros((6, 2), dtype=int)}),
    ("action", {"action": np.full((6, 2), np.nan)}),
    ("reward", {"reward": np.zeros(5)}),
    ("reward", {"reward": np.zeros((6, 1))}),
    ("reward", {"reward": np.zeros(6, dtype=int)}),
    ("reward", {"reward": np.array(["a"] * 6)}),
    ("reward", {"reward": np.r_[np.nan, np.zeros(5)]}),
    ("reward", {"reward": np.full(6, 1e300)}),  # too large for float32
    ("next_obs", {"next_obs": np.zeros((6, 2))}),
    ("next_obs", {"next_obs": np.full((6, 3), np.nan)}),
    ("terminated", {"terminated": np.zeros(5, dtype=bool)}),
    ("terminated", {"terminated": np.zeros(6)}),
    ("truncated", {"truncated": np.zeros((6, 1), dtype=bool)}),
    ("truncated", {"truncated": np.zeros(6, dtype=int)}),
]


@pytest.mark.parametrize("name, change", BAD_COLUMNS)
def test_bad_columns_are_refused(name, change):
    with refused((ValueError, TypeError), rf"^{name}: expected .*got"):
        OfflineDataset(**arrays() | change)


def test_sample():
    """Rows stay together, uniform, with replacement; the global generator is left alone."""
    d, state = dataset(10), torch.get_rng_state()
    draws = [d.sample(10, torch.Generator().manual_seed(seed)) for seed in (*range(2000), 0)]
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(x, y) for x, y in zip(draws[0], draws[-1], strict=True))
    rows = torch.stack([batch[0][:, 0] for batch in draws[:-1]]).long()
    counts = torch.bincount(rows.flatten(), minlength=10)
    assert len(counts) == 10 and (counts - 2000).abs().max() < 5 * (2000 * 0.9) ** 0.5
    assert any(len(set(row.tolist())) < 10 for row in rows), "without replacement"
    for batch, row in zip(draws[:20], rows, strict=False):
        columns = d.obs, d.action, d.reward, d.next_obs, d.terminated.float()
        assert all(torch.equal(x, c[row]) for x, c in zip(batch, columns, strict=True))
        assert batch[4].dtype == torch.float32
    for size in (0, -1, 11, 2.5, None, "3"):
        with refused(ValueError, "batch_size: expected an integer from 1 to the 10 transitions"):
            d.sample(size)


def test_standardised_states():
    obs = np.random.default_rng(0).normal(3, 20, (12, 3))
    obs[:, 2] = 7.0  # a constant is no division by zero
    plain, d = (OfflineDataset(**arrays(12) | {"obs": obs}, standardise=s) for s in (False, True))
    np.testing.assert_allclose(d.obs_mean, obs.mean(0), atol=1e-5)
    np.testing.assert_allclose(d.obs_scale, np.maximum(obs.std(0), 1e-6), rtol=1e-5)
    seen, raw = (x.sample(12, helpers.seed_everything(0)) for x in (d, plain))
    for i in (0, 3):
        torch.testing.assert_close(seen[i], (raw[i] - d.obs_mean) / d.obs_scale)
    states = d.states(12, helpers.seed_everything(0))  # each once, as the environment has them
    assert states.dtype == np.float64
    np.testing.assert_array_equal(np.sort(states, axis=0), np.sort(plain.obs.double(), axis=0))
    once, again = (d.states(4, torch.Generator().manual_seed(1)) for _ in range(2))
    np.testing.assert_array_equal(once, again)
    for n in (0, 13):
        with refused(ValueError, "n: expected 1 to 12"):
            d.states(n)


def test_take_and_concat():
    d = dataset(20, provenance={"seed": 1})
    first = d.take(5, standardise=True)
    assert torch.equal(first.obs, d.obs[:5]) and len(first) == 5 and first.standardise
    assert first.provenance == {"seed": 1} and same(d.take(20), d)
    torch.testing.assert_close(first.obs_mean, d.obs[:5].mean(0))
    for n in (0, -3, 21):
        with refused(ValueError, "n: expected 1 to the 20 transitions"):
            d.take(n)
    other = dataset(4, provenance={"seed": 2})
    both = OfflineDataset.concat(d, other, standardise=True)
    assert len(both) == 24 and same(both.take(20), d) and torch.equal(both.obs[20:], other.obs)
    torch.testing.assert_close(both.obs_mean, torch.cat([d.obs, other.obs]).mean(0))
    assert both.provenance == {"parts": [{"seed": 1}, {"seed": 2}]}
    for name, options in (("obs", {"width": 4}), ("action", {"action_dim": 2})):
        with refused(ValueError, f"one environment, got {name}"):
            OfflineDataset.concat(d, OfflineDataset(**arrays(**options)))


def episodic():
    """Four complete episodes (the second one timed out) and one that was cut."""
    lengths = [2, 3, 1, 1, 2]
    obs = np.concatenate([np.arange(k) + 100.0 * i for i, k in enumerate(lengths)])[:, None]
    flags = np.zeros((2, 9), dtype=bool)
    flags[0, [1, 5, 6]] = flags[1, 4] = True
    reward = np.array([1.0, 1, 2, 2, 2, 5, 100, 900, 900])
    return OfflineDataset(obs, np.zeros(9, int), reward, obs + 1, *flags, {"seed": 3})


def test_episodes():
    d = episodic()
    spans = [(rows.start, rows.stop, complete) for rows, complete in d.episodes()]
    assert spans == [(0, 2, True), (2, 5, True), (5, 6, True), (6, 7, True), (7, 9, False)]
    returns = [2.0, 6.0, 5.0, 100.0]
    np.testing.assert_array_equal(d.episode_returns(), returns)
    glued = OfflineDataset.concat(d, d)  # the cut episode does not run on
    np.testing.assert_array_equal(glued.episode_returns(), returns * 2)
    for fraction, best in ((0.5, [6, 100]), (0.1, [100]), (0.51, [6, 5, 100]), (1, returns)):
        chosen = d.best_episodes(fraction)  # by number, not by the mean return
        np.testing.assert_array_equal(chosen.episode_returns(), best)
        assert len(chosen.episodes()) == len(best) and chosen.provenance == {"seed": 3}
    assert d.best_episodes(standardise=True).standardise
    with refused(ValueError, "at least one complete episode"):
        d.take(1).best_episodes()
    with refused(ValueError, "fraction: expected"):
        d.best_episodes(0)
    for words in (
        "9",
        "4 of them complete",
        "from 2 to 100",
        "3 terminated, 1 truncated",
        "0: 100%",
    ):
        assert words in d.describe()
    assert "2 dimensions" in OfflineDataset(**arrays(action_dim=2)).describe()


def d4rl(n=6, ends=(), cuts=(), **change):
    a = arrays(n, action_dim=2)
    content = {"observations": a["obs"], "actions": a["action"], "rewards": a["reward"]}
    flags = {"terminals": np.isin(np.arange(n), ends), "timeouts": np.isin(np.arange(n), cuts)}
    return content | flags | change


def test_d4rl():
    successors = {"next_observations": d4rl()["observations"] + 1}
    d = OfflineDataset.from_d4rl(d4rl(ends=[2], cuts=[2, 5], **successors), standardise=True)
    assert len(d) == 6 and d.standardise and torch.equal(d.next_obs, d.obs + 1)
    assert d.terminated.tolist() == [False, False, True, False, False, False]
    assert d.truncated.tolist() == [False] * 5 + [True], "both flags: the task ended"
    # Without: row 1 ended and stays; 3 timed out and 5 is the last, their successors are unknown.
    d = OfflineDataset.from_d4rl(d4rl(ends=[1], cuts=[1, 3]))
    assert d.obs[:, 0].tolist() == [0, 1, 2, 4] and d.terminated.tolist() == [0, 1, 0, 0]
    assert d.truncated.tolist() == [False, False, True, False]
    keep = ~d.terminated
    assert torch.equal(d.next_obs[keep], d.obs[keep] + 1)  # never another episode's first state
    last = OfflineDataset.from_d4rl(d4rl(ends=[5]))
    assert len(last) == 6 and last.terminated[5], "a last row that ended is whole"
    for key in ("observations", "actions", "rewards", "terminals"):
        with refused(KeyError, f"'{key}'.* missing"):
            OfflineDataset.from_d4rl({k: v for k, v in d4rl().items() if k != key})
    with refused(KeyError, "timeouts or next_observations"):
        OfflineDataset.from_d4rl({k: v for k, v in d4rl().items() if k != "timeouts"})
    with refused(TypeError, "dictionary of arrays"):
        OfflineDataset.from_d4rl("file.hdf5")
    for change in (
        {"rewards": np.zeros(5)},
        {"timeouts": np.zeros(5, dtype=bool)},
        {"rewards": np.full(6, np.nan)},
        {"observations": np.zeros((6, 0, 2))},
        {key: column[:0] for key, column in d4rl().items()},
    ):
        with refused((ValueError, TypeError), "expected .*got"):
            OfflineDataset.from_d4rl(d4rl(**change))


def test_minari(tmp_path, monkeypatch):
    """A real Minari data set: two episodes of HalfCheetah, one of them timed out."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    import minari
    from minari.data_collector import EpisodeBuffer

    env, rng, buffers = gym.make(CHEETAH), np.random.default_rng(0), []
    for episode, steps in enumerate((12, 5)):
        first, _ = env.reset(seed=episode)
        buffer = EpisodeBuffer(id=episode, observations=[first], actions=[])
        for action in rng.uniform(-1, 1, (steps, 6)).astype(np.float32):
            obs, reward, terminated, truncated, _ = env.step(action)
            buffer.observations.append(obs)
            buffer.actions.append(action)
            buffer.rewards.append(reward)
            buffer.terminations.append(terminated)
            buffer.truncations.append(truncated)
        buffers.append(buffer)
    stored = minari.create_dataset_from_buffers("test/cheetah-v0", buffers, env=env)
    d = OfflineDataset.from_minari(stored, standardise=True)
    assert d.standardise and "test/cheetah-v0" in str(d.provenance)
    for name, column in {
        "obs": [b.observations[:-1] for b in buffers],
        "next_obs": [b.observations[1:] for b in buffers],
        "action": [b.actions for b in buffers],
        "reward": [b.rewards for b in buffers],
    }.items():
        np.testing.assert_allclose(getattr(d, name), np.concatenate(column), rtol=1e-6, atol=1e-6)
    assert not d.terminated.any() and np.flatnonzero(d.truncated).tolist() == [11]
    assert [complete for _, complete in d.episodes()] == [True, False]

    class Foreign:
        episodes = ()

        def iterate_episodes(self):
            return iter(self.episodes)

    with refused(ValueError, "at least one episode"):
        OfflineDataset.from_minari(Foreign())
    Foreign.episodes = (EpisodeBuffer(id=0, observations={"a": np.zeros(3)}, actions=[]),)
    with refused(TypeError, "one array, got dict"):
        OfflineDataset.from_minari(Foreign())
    with refused(TypeError, "minari.load_dataset"):
        OfflineDataset.from_minari({"observations": np.zeros((3, 2))})


# ---- acting: collect, evaluate, the truth -------------------------------------------------------
def plain_loop(env_id, act, steps, seed):
    """One environment, one episode after the other, each with its own seed."""
    env, rows, episode = gym.make(env_id), [], 0
    while len(rows) < steps:
        (obs, _), done = env.reset(seed=seed + episode), False
        while not done:
            action = alone(act, obs)
            next_obs, reward, terminated, truncated, _ = env.step(action)
            rows.append((obs, action, float(reward), next_obs, terminated, truncated))
            obs, done = next_obs, terminated or truncated
        episode += 1
    return OfflineDataset(*map(np.stack, zip(*rows[:steps], strict=True)))


RUNS = [("CartPoleShort-v0", good), (CHEETAH, swing), ("CartPole-v1", sloppy)]


@pytest.mark.parametrize("env_id, act", RUNS)
@pytest.mark.parametrize("n_envs", [1, 3])
def test_collect_is_the_plain_loop(env_id, act, n_envs):
    """The order of episodes, their seeds, true successors at time limits, however many copies."""
    d = collect(env_id, act, 100, 7, n_envs, epsilon=0.3)
    expected = plain_loop(env_id, act, 100, 7)
    about = {"env_id": env_id, "seed": 7, "steps": 100, "epsilon": 0.3}
    assert len(d) == 100 and about.items() <= d.provenance.items()
    for name in OfflineDataset.columns:
        torch.testing.assert_close(getattr(d, name), getattr(expected, name), rtol=0, atol=1e-6)
    if env_id == "CartPoleShort-v0":
        assert np.flatnonzero(d.truncated).tolist() == list(range(11, 100, 12))
        assert (d.next_obs - d.obs).abs().max() < 1 and not torch.equal(d.next_obs[11], d.obs[12])


@pytest.mark.parametrize("play", [
    lambda env_id, act: collect(env_id, act, 10, 0, n_envs=2),
    lambda env_id, act: evaluate(env_id, act, [0, 1]),
    lambda env_id, act: discounted_return(env_id, act, np.zeros((2, 4 if "Pole" in env_id else 17)), 0.9),
])  # fmt: skip
def test_bad_actions_are_refused(play):
    for act in (
        lambda obs: torch.zeros(len(obs) - 1, dtype=torch.int64),
        lambda obs: torch.zeros(len(obs), 3, dtype=torch.int64),
        lambda obs: torch.full((len(obs),), 0.7),
        lambda obs: None,
    ):
        with refused((ValueError, TypeError), "act: expected"):
            play("CartPole-v1", act)
    for act in (lambda obs: torch.zeros(6, len(obs)), lambda obs: torch.full((2, 6), torch.nan)):
        with refused(ValueError, "act: expected"):
            play("HalfCheetah-v5", act)
    with refused(gym.error.Error, "NoSuchPole"):
        play("NoSuchPole-v0", good)


def test_collect_and_evaluate_refuse():
    for change in ({"steps": 0}, {"steps": -1}, {"n_envs": 0}):
        with refused(ValueError, "at least one"):
            collect("CartPole-v1", good, **{"steps": 10, "seed": 0} | change)
    with refused(ValueError, "seeds: expected at least one"):
        evaluate("CartPole-v1", good, [])


def back(obs):
    return -swing(obs)


SIDES = [("CartPole-v1", [sloppy, good, left]), (CHEETAH, [swing, back])]


@pytest.mark.parametrize("env_id, acts", SIDES)
def test_evaluate_is_the_plain_loop(env_id, acts):
    """Fixed seeds, fixed returns; agents side by side get what each gets alone."""
    seeds, expected = [3, 0, 3, 11], []
    for act in acts:
        ends = [plain_loop(env_id, act, 600, s).episode_returns()[0] for s in seeds]
        expected.append(evaluate(env_id, act, seeds))
        np.testing.assert_allclose(expected[-1], ends, atol=1e-4)
    assert expected[0][0] == expected[0][2] != expected[0][1]

    def together(obs):
        return torch.stack([act(o) for act, o in zip(acts, obs, strict=True)])

    both = evaluate(env_id, together, seeds, agents=len(acts))
    np.testing.assert_allclose(both, expected, atol=1e-9)
    if env_id == "CartPole-v1":
        assert (expected[1] == 500).all()
        mean, scale = torch.arange(4.0), torch.arange(1.0, 5.0)
        seen = evaluate(env_id, lambda obs: sloppy(obs * scale + mean), seeds, mean, scale)
        np.testing.assert_allclose(seen, expected[0], atol=5)


def test_cheetah_is_restored_exactly():
    """Play on from the middle of an episode: the same rewards as when the episode goes on."""
    env, rng = gym.make("HalfCheetah-v5"), np.random.default_rng(0)
    obs, _ = env.reset(seed=0)
    actions, rewards, states = rng.uniform(-1, 1, (60, 6)).astype(np.float32), [], []
    for action in actions:
        states.append(obs)
        obs, reward, *_ = env.step(action)
        rewards.append(reward)
    for start in (0, 17, 40):
        clock = iter(actions[start:])
        act = lambda _, clock=clock: next(clock)[None]  # noqa: E731
        truth = discounted_return("HalfCheetah-v5", act, states[start][None], 0.9, horizon=20)
        expected = sum(0.9**t * r for t, r in enumerate(rewards[start : start + 20]))
        assert abs(truth[0] - expected) < 1e-10


def hand_loop(obs, act, gamma, horizon, bonus=0.0):
    env = gym.make("CartPole-v1").unwrapped
    env.reset(seed=0)
    env.state, total = np.array(obs, dtype=np.float64), 0.0
    for t in range(horizon):
        obs, reward, terminated, _, _ = env.step(alone(act, obs))
        total += gamma**t * (reward + (bonus if t else 0.0))
        if terminated:
            break
    return total


def test_truth_is_the_hand_loop():
    states = np.random.default_rng(0).uniform(-0.2, 0.2, (6, 4))
    for gamma, horizon in ((0.0, 9), (0.9, 40), (1.0, 1), (0.99, 25)):
        truth = discounted_return("CartPole-v1", sloppy, states, gamma, horizon)
        expected = [hand_loop(s, sloppy, gamma, horizon) for s in states]
        np.testing.assert_allclose(truth, expected, rtol=1e-9)
    for horizon in (30, 700):  # the environment itself would stop at 500
        assert discounted_return("CartPole-v1", good, np.zeros((1, 4)), 1.0, horizon) == horizon
    long = discounted_return("CartPole-v1", good, np.zeros((1, 4)), 0.9, 700)
    np.testing.assert_allclose(long, (1 - 0.9**700) / (1 - 0.9))
    soft = lambda obs: (left(obs), torch.full(obs.shape[:-1], 0.25))  # noqa: E731
    truth = discounted_return("CartPole-v1", soft, states, 0.9, 50)
    np.testing.assert_allclose(truth, [hand_loop(s, left, 0.9, 50, bonus=0.25) for s in states])


def test_truth_of_agents_side_by_side():
    states = np.random.default_rng(0).uniform(-0.1, 0.1, (2, 5, 4))
    both = lambda obs: torch.stack([sloppy(obs[0]), left(obs[1])])  # noqa: E731
    for given in (states, states[0]):  # states of their own, or the same for both
        truth = discounted_return("CartPole-v1", both, given, 0.9, agents=2)
        assert truth.shape == (2, 5)
        for row, act, own in zip(
            truth, (sloppy, left), given if given.ndim == 3 else states[[0, 0]], strict=True
        ):
            np.testing.assert_allclose(row, discounted_return("CartPole-v1", act, own, 0.9))


@pytest.mark.parametrize("change", [
    {"obs": np.zeros(4)}, {"obs": np.zeros((0, 4))}, {"obs": np.zeros((2, 3))},
    {"obs": np.full((1, 4), np.nan)}, {"gamma": 1.5}, {"gamma": -0.1}, {"gamma": np.nan},
    {"horizon": 0}, {"env_id": "MountainCar-v0", "obs": np.zeros((1, 2))},
], ids=str)  # fmt: skip
def test_truth_refuses(change):
    right = {"env_id": "CartPole-v1", "act": good, "obs": np.zeros((1, 4)), "gamma": 0.9}
    with refused(ValueError, "expected|can be restored"):
        discounted_return(**right | change)


# ---- tables and verdicts ------------------------------------------------------------------------
def runs(datasets=("narrow", "mixed"), alphas=(0.0, 0.5, 1.0, 5.0, 20.0), seeds=3):
    """A small sweep with numbers that no two rows share; mean and median of its seeds differ."""
    keys = [datasets, alphas, range(seeds), range(10, 50, 10)]
    names = ["dataset", "alpha_cql", "seed", "step"]
    table = pd.MultiIndex.from_product(keys, names=names).to_frame(index=False)
    i, step, alpha = np.arange(len(table)), table["step"], table["alpha_cql"]
    table["return"] = i + 7.0 ** table["seed"] + 100 * (alpha == 1) * (table["dataset"] == "narrow")
    table["prediction"] = 3 * i + step + 1000.0 * (alpha == 0)
    table["truth"] = 2.5 * step + 40
    return table


def test_table_round_trip(figs):
    words = ["é, ;'\"", "a", "b"]
    table = pd.DataFrame({"word": words, "n": [10**12, -1, 0], "x": [1 / 3, -1e30, 123456789.0]})
    stored = save_table(table, "x", seed=[0, 1], source="a: b # c")
    assert stored.equals(read_table("x")) and list(stored) == ["word", "n", "x"]
    assert stored["word"].tolist() == words and stored["n"].tolist() == [10**12, -1, 0]
    assert stored["x"].tolist() == [0.3333333, -1e30, 123456800.0], "seven digits"
    assert stored.attrs == {"seed": [0, 1], "source": "a: b # c", "rows": 3}
    save_table(table[:2], "x", seed=1)  # a short run is replaced
    assert len(read_table("x")) == 2
    for bad, about in ((table, {}), (table[:0], {"a": 0}), (table.assign(x=np.nan), {"a": 0})):
        with refused(ValueError, "expected (rows|finite)"):
            save_table(bad, "y", **about)
    with refused(FileNotFoundError, "no figs/data/y.csv"):
        read_table("y")


def test_a_fresh_table_is_preferred(figs, monkeypatch):
    monkeypatch.setattr(helpers, "ROOT", figs / "repository")
    for folder, seed in ((figs / "repository/figs", 0), (figs, 1)):
        monkeypatch.setattr(helpers, "FIGS", folder)
        save_table(runs(), "x", seed=seed)
    assert read_table("x").attrs["seed"] == 1
    (figs / "data/x.csv").unlink()
    assert read_table("x").attrs["seed"] == 0, "the repository's own is read where none is fresh"


def test_long_tables_are_extended_and_not_replaced(figs):
    table = runs()
    save_table(table[:9], "long/x", seed=0)
    save_table(table[:12], "long/x", seed=0)
    for other in (table[:12], table[:9], table[1:20], table[:20] * 1):
        if len(other) == 20:
            other = other.assign(truth=0.0)
        with refused(FileExistsError, "can be extended and not replaced"):
            save_table(other, "long/x", seed=0)
    assert len(read_table("long/x")) == 12


def test_damaged_tables_are_refused(figs):
    """Cut anywhere, its last number included; a row with too much; another kind of file."""
    save_table(runs(seeds=1)[:6], "x", seed=0)
    path = figs / "data/x.csv"
    whole = path.read_text()
    for cut in range(len(whole)):
        path.write_text(whole[:cut])
        with refused(ValueError, "x.csv: expected a table"):
            read_table("x")
    for damaged in (
        whole.replace(",0,10,", ",0,10,7,"),
        whole.replace("rows: 6", "rows: six"),
        "\0",
    ):
        path.write_text(damaged)
        with refused(ValueError, "x.csv: expected a table"):
            read_table("x")


def test_failed_save_leaves_the_old_file(figs, monkeypatch):
    def save(value):
        helpers.save_npz(figs / "x.npz", {"a": np.full(3, value)}, {"seed": value})

    def draw(value):
        helpers.save_figure(plt.figure(figsize=(value, 1)), "x")

    def table(value):
        save_table(pd.DataFrame({"a": [value]}), "x", seed=0)

    def full_disk(*_):
        raise OSError("no space left on device")

    for write in (save, draw, table):
        write(2)
        before = {p: p.read_bytes() for p in figs.rglob("*") if p.is_file()}
        with monkeypatch.context() as patch, refused(OSError, "no space"):
            patch.setattr(os, "replace", full_disk)
            write(3)
        assert {p: p.read_bytes() for p in figs.rglob("*") if p.is_file()} == before  # no litter


def test_late_mean():
    table = runs(["mixed"], [0.5, 1.0], 2)
    table["return"] = [1.0, 2, 3, 5, 10, 20, 30, 50, 0, 0, 7, 9, 0, 0, 0, 4]
    late = helpers.late_mean(table, "return", ["alpha_cql", "seed"])
    assert late.to_dict() == {(0.5, 0): 4, (0.5, 1): 40, (1.0, 0): 8, (1.0, 1): 2}
    assert helpers.late_mean(table, "return", "alpha_cql").to_dict() == {0.5: 22, 1.0: 5}


def test_lag_line():
    """Against the closed form for a constant truth, and small steps of the equation for others."""
    step, tau, gamma = np.array([50.0, 100, 400, 3000]), 0.02, 0.9
    line = helpers.lag_line(step, np.full((2, 4), 7.0), tau, gamma)
    np.testing.assert_allclose(line, [7 * (1 - np.exp(-step * tau * (1 - gamma)))] * 2)
    truth, at = np.array([3.0, 9, -4, 5]), []
    value, dt = 0.0, 0.02
    for t in np.arange(0, 3000, dt) + dt / 2:
        value += dt * tau * (1 - gamma) * (np.interp(t, step, truth) - value)
        if (step - t < dt).sum() > len(at):
            at.append(value)
    np.testing.assert_allclose(helpers.lag_line(step, truth, tau, gamma), at, atol=1e-3)


def test_verdict(capsys):
    helpers.verdict(("every seed returns", "> 200", np.array([True, True])), ("one", "= 1", True))
    said = "every seed returns   > 200   OK\none                  = 1     OK\n"
    assert capsys.readouterr().out == said
    for ok in (False, np.array([True, False]), np.array([1.0, np.nan]) > 0, np.nan > 0):
        with refused(AssertionError, "not reproduced: second$"):
            helpers.verdict(("first", "> 0", True), ("second", "> 0", ok), ("third", "> 0", True))
        assert re.findall("OK|FAIL", capsys.readouterr().out) == ["OK", "FAIL", "OK"]
    for ok in (np.zeros(0, dtype=bool), np.array([0.0, np.nan]), np.nan, None, 1, "yes"):
        with refused(ValueError, "verdict: expected"):
            helpers.verdict(("claim", "> 0", ok))
    with refused(ValueError, "verdict: expected"):
        helpers.verdict()


# ---- figures ------------------------------------------------------------------------------------
def drawn(ax, label):
    (line,) = [line for line in ax.get_lines() if line.get_label() == label]
    return line


def test_plot_seeds():
    ax, table = plt.figure().subplots(), runs(["mixed"], [0.0])
    curves = table["return"].to_numpy().reshape(3, 4)
    line = helpers.plot_seeds(
        ax, table.sample(frac=1, random_state=0), "step", "return", color="C3"
    )
    np.testing.assert_allclose(line.get_data(), [[10, 20, 30, 40], curves.mean(0)])
    thin = [line.get_ydata().tolist() for line in ax.get_lines()[1:]]
    assert thin == curves.tolist() and {line.get_color() for line in ax.get_lines()} == {"C3"}
    with refused(ValueError, "was a training cell run twice"):
        helpers.plot_seeds(ax, pd.concat([table, table]), "step", "return")
    with refused(ValueError, "expected every step of every seed"):
        helpers.plot_seeds(ax, table[1:], "step", "return")


def test_label_ends():
    ax = plt.figure().subplots()
    for i, y in enumerate([1.0, 1.001, 0.0, 1.002]):
        ax.plot([0, 1], [5 - y, y], label="abcd"[i], color=f"C{i}")
    ax.plot([0, 1], [0, 0.5])
    helpers.label_ends(ax)
    ax.figure.canvas.draw()
    texts = sorted(ax.texts, key=lambda text: text.get_window_extent().y0)
    assert [text.get_text() for text in texts] == ["c", "a", "b", "d"]
    assert [text.get_color() for text in texts] == ["C2", "C0", "C1", "C3"]
    assert min(np.diff([text.get_window_extent().y0 for text in texts])) > 8


def test_plot_alpha_reward():
    """Numbers drawn are the table's; the title names the weight that the points put highest."""
    table = runs().drop(columns=["prediction", "truth"]).assign(BC=3.0, data=9.0)
    fig = helpers.plot_alpha_reward(table)
    assert len(fig.axes) == 4
    for name, left, right in zip(("narrow", "mixed"), fig.axes[::2], fig.axes[1::2], strict=True):
        part = table[table["dataset"] == name]
        mean = part.groupby(["alpha_cql", "step"])["return"].mean()
        for alpha, style in zip((0, 0.5, 5, 20), helpers.STYLES, strict=True):
            line = drawn(left, rf"$\alpha$ = {alpha:g}")
            np.testing.assert_allclose(line.get_ydata(), mean[alpha])
            assert line.get_color() == style["color"] and line.get_linestyle() == style["linestyle"]
        late = part[part["step"] > 20].groupby("alpha_cql")["return"].mean()
        np.testing.assert_allclose(drawn(right, "CQL").get_data(), [range(5), late])
        assert right.get_title("left") == rf"{name}: highest at $\alpha$ = {late.idxmax():g}"
        assert [text.get_text() for text in right.get_xticklabels()] == ["0", "0.5", "1", "5", "20"]
        for level, height in (("BC", 3.0), ("data", 9.0)):
            assert set(drawn(right, level).get_ydata()) == {height}
    assert fig.axes[1].get_title("left") != fig.axes[3].get_title("left").replace("mixed", "narrow")


def test_plot_q_value():
    table = runs()
    fig = helpers.plot_q_value(table, tau=0.02, gamma=0.9)
    panels = [(name, alpha) for name in ("narrow", "mixed") for alpha in (0, 1, 20)]
    sides = set()
    for ax, (name, alpha) in zip(fig.axes, panels, strict=True):
        part = table[(table["dataset"] == name) & (table["alpha_cql"] == alpha)]
        prediction, truth = (part.groupby("step")[c].mean() for c in ("prediction", "truth"))
        step = truth.index.to_numpy()
        lag = helpers.lag_line(step, truth.to_numpy(), 0.02, 0.9)
        lines = {"prediction": prediction, "truth": truth, "lag line": lag, "ceiling": [10] * 4}
        for label, y in lines.items():
            np.testing.assert_allclose(drawn(ax, label).get_data(), [step, y])
        excess = prediction.iloc[-1] - truth.iloc[-1]
        sides.add(excess > 0)
        words = f"{abs(excess):.0f} {'above' if excess > 0 else 'below'} the truth"
        assert ax.get_title("left") == rf"{name}, $\alpha$ = {alpha:g}: {words}"
    assert sides == {True, False}


def test_show(figs, monkeypatch, capsys):
    shown, alt = [], "A straight line that rises from the origin to one, drawn over two points."
    monkeypatch.setattr(helpers, "display", lambda *args, **_: shown.append(args[0]))
    fig = plt.figure()
    with refused(FileNotFoundError, "save its numbers first"):
        helpers.show(fig, "line", alt)
    save_table(runs(), "line", seed=0)
    for bad in ("", "a line"):
        with refused(ValueError, "alt: expected a sentence"):
            helpers.show(fig, "line", bad)
    assert not shown and not (figs / "line.png").exists()
    helpers.show(fig, "line", alt)
    png = (figs / "line.png").read_bytes()
    assert shown == [{"image/png": png, "text/plain": alt}] and png.startswith(b"\x89PNG")
    assert capsys.readouterr().out == alt + "\n" and not plt.fignum_exists(fig.number)
