"""helpers.py: what it promises, and what it refuses."""

import contextlib
import doctest
import os
import random
import re
import time
from types import SimpleNamespace

import gymnasium as gym
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from gymnasium.envs.registration import register
from PIL import Image

import helpers
from helpers import OfflineDataset, collect, discounted_return, evaluate, read_table, save_table

CHEETAH = "HalfCheetahShort-v0"
helpers.use_style()
short = {"max_episode_steps": 12}
register("CartPoleShort-v0", "gymnasium.envs.classic_control:CartPoleEnv", **short)
register(CHEETAH, "gymnasium.envs.mujoco.half_cheetah_v5:HalfCheetahEnv", **short)


@pytest.fixture
def figs(tmp_path, monkeypatch):
    monkeypatch.setattr(helpers, "FIGS", tmp_path)
    yield tmp_path
    plt.close("all")


def refuses(error, words, function, *args, **options):
    with pytest.raises(error, match=words):
        function(*args, **options)


def arrays(n=6, width=3, action_dim=None):
    """Columns of a small data set in which each row is told apart by its number."""
    obs, action = np.arange(n)[:, None] + np.linspace(0, 0.5, width), np.arange(n) % 2
    if action_dim:
        action = np.random.default_rng(0).uniform(-1, 1, (n, action_dim))
    columns = {"obs": obs, "action": action, "reward": np.arange(n) * 0.25, "next_obs": obs + 1}
    return columns | {"terminated": np.arange(n) % 3 == 2, "truncated": np.arange(n) % 4 == 1}


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


def play(env_id, act, steps, seed):
    """Rows of one environment, one episode after the other, each with its own seed."""
    env, rows, episode = gym.make(env_id), [], 0
    while len(rows) < steps:
        (obs, _), done = env.reset(seed=seed + episode), False
        while not done:
            action = act(torch.as_tensor(obs, dtype=torch.float32)[None])[0].numpy()
            next_obs, reward, terminated, truncated, _ = env.step(action)
            rows.append((obs, action, float(reward), next_obs, terminated, truncated))
            obs, done = next_obs, terminated or truncated
        episode += 1
    return rows[:steps]


def plain_loop(*arguments):
    return OfflineDataset(*map(np.stack, zip(*play(*arguments), strict=True)))


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


def test_npz(tmp_path):
    """Round trip; refused are damaged, cut and foreign files, and nothing to save."""
    path, content = tmp_path / "x.npz", {"a": np.arange(300.0), "b": np.ones((20, 3), dtype=bool)}
    helpers.save_npz(path, content, {"seed": 0})
    whole = path.read_bytes()

    def unharmed():
        loaded, about = helpers.load_npz(path, required=content)
        assert about == {"seed": 0} and list(loaded) == list(content)
        for name, array in content.items():
            np.testing.assert_array_equal(loaded[name], array, strict=True)

    unharmed()
    refuses(ValueError, r"\['c'\] missing", helpers.load_npz, path, required=["a", "c"])
    refuses(FileNotFoundError, "no.npz", helpers.load_npz, tmp_path / "no.npz")
    for arrays, about in [({}, {"a": 0}), (content, {}), ({"a": np.array([None])}, {"a": 0})]:
        with pytest.raises(ValueError):
            helpers.save_npz(tmp_path / "y.npz", arrays, about)
    for place in np.random.default_rng(0).integers(len(whole), size=60):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 85]) + whole[place + 1 :])
        with contextlib.suppress(ValueError):
            unharmed()
    pickled = {"provenance": "{}", "a": np.array([{"a": 1}], dtype=object)}
    for arrays in (pickled, {"a": np.ones(3)}):
        np.savez(path, **arrays)
        refuses(ValueError, "x.npz: expected an .npz archive", helpers.load_npz, path)
    for bad in (b"some text", *(whole[:-cut] for cut in (1, 100, len(whole)))):
        path.write_bytes(bad)
        refuses(ValueError, "x.npz: expected an .npz archive", helpers.load_npz, path)
    assert os.listdir(tmp_path) == ["x.npz"]


POLICY = {"w0": np.ones((17, 8)), "b0": np.zeros(8), "w1": np.ones((8, 12)), "b1": np.zeros(12)}
POLICY |= {"obs_mean": np.zeros(17), "obs_scale": np.ones(17)}
ABOUT = {"env_id": "HalfCheetah-v5", "seed": 0, "steps": 10, "return_mean": 1.0, "return_std": 0.5}
BAD_POLICIES = [{key: None} for key in ("b1", "obs_scale")] + [{"extra": np.ones(3)}]
BAD_POLICIES += [{"w1": np.ones(shape)} for shape in ((12, 8), (9, 12), (8, 13))]
BAD_POLICIES += [{"w1": np.ones((8, 11)), "b1": np.zeros(11)}]  # odd: means and deviations
BAD_POLICIES += [{"w1": None, "b1": None, "w2": np.ones((8, 12)), "b2": np.zeros(12)}]
BAD_POLICIES += [{"b0": x} for x in (np.zeros(7), np.zeros((1, 8)), np.zeros(8, dtype=int))]
BAD_POLICIES += [{"b0": np.full(8, np.nan)}, {"w0": np.full((17, 8), np.inf)}]
BAD_POLICIES += [{"obs_mean": np.zeros(())}]
BAD_POLICIES += [{"obs_scale": scale} for scale in (np.ones(16), np.zeros(17))]


def test_load_policy(tmp_path):
    path = tmp_path / "p.npz"
    helpers.save_npz(path, POLICY, ABOUT)
    loaded, about = helpers.load_policy(path)
    assert about == ABOUT and list(loaded) == list(POLICY)
    assert all(np.array_equal(loaded[name], array) for name, array in POLICY.items())
    whole = path.read_bytes()
    for length in (len(whole) - 100, len(whole) // 2):
        path.write_bytes(whole[:length])
        refuses(ValueError, "p.npz: expected", helpers.load_policy, path)
    for change in BAD_POLICIES:
        content = {k: v for k, v in (POLICY | change).items() if v is not None}
        helpers.save_npz(path, content, ABOUT)
        refuses(ValueError, "p.npz: (expected|.* missing)", helpers.load_policy, path)
    for key in ABOUT:
        helpers.save_npz(path, POLICY, {k: v for k, v in ABOUT.items() if k != key})
        refuses(ValueError, f"p.npz: expected a provenance .*{key}", helpers.load_policy, path)


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


def bad_columns():
    """Pairs (array that the message must name, change)."""
    z, words = np.zeros, np.array(["a"] * 6)
    nan, inf = z((6, 3)) + np.nan, z((6, 3)) + np.inf
    yield "obs", {key: column[:0] for key, column in arrays().items()}
    for bad in (np.float64(1), z(6), z((6, 3, 3)), z((6, 3), int), z((6, 3), complex), nan, inf):
        yield "obs", {"obs": bad}
    for bad in (z(7, int), z(6), z((6, 2), int), nan):
        yield "action", {"action": bad}
    for bad in (z(5), z((6, 1)), z(6, int), words, np.r_[np.nan, z(5)], z(6) + 1e300):
        yield "reward", {"reward": bad}
    for bad in (z((6, 2)), inf):
        yield "next_obs", {"next_obs": bad}
    for name in ("terminated", "truncated"):
        for bad in (z(6), z(6, int), z(5, bool), z((6, 1), bool)):
            yield name, {name: bad}


@pytest.mark.parametrize("name, change", list(bad_columns()))
def test_bad_columns_are_refused(name, change):
    words = rf"^{name}: expected .*got"
    refuses((ValueError, TypeError), words, OfflineDataset, **arrays() | change)


def test_sample():
    """Rows stay together, uniform, with replacement; the global generator is left alone."""
    d, state = OfflineDataset(**arrays(10)), torch.get_rng_state()
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
    words = "batch_size: expected an integer from 1 to the 10 transitions"
    for size in (0, -1, 11, 2.5, None, "3"):
        refuses(ValueError, words, d.sample, size)


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
        refuses(ValueError, "n: expected 1 to 12", d.states, n)


def test_take_and_concat():
    d = OfflineDataset(**arrays(20), provenance={"seed": 1})
    first = d.take(5, standardise=True)
    assert torch.equal(first.obs, d.obs[:5]) and len(first) == 5 and first.standardise
    assert first.provenance == {"seed": 1} and same(d.take(20), d)
    torch.testing.assert_close(first.obs_mean, d.obs[:5].mean(0))
    for n in (0, -3, 21):
        refuses(ValueError, "n: expected 1 to the 20 transitions", d.take, n)
    other = OfflineDataset(**arrays(4), provenance={"seed": 2})
    both = OfflineDataset.concat(d, other, standardise=True)
    assert len(both) == 24 and same(both.take(20), d) and torch.equal(both.obs[20:], other.obs)
    torch.testing.assert_close(both.obs_mean, torch.cat([d.obs, other.obs]).mean(0))
    assert both.provenance == {"parts": [{"seed": 1}, {"seed": 2}]}
    for name, options in (("obs", {"width": 4}), ("action", {"action_dim": 2})):
        foreign = OfflineDataset(**arrays(**options))
        refuses(ValueError, f"one environment, got {name}", OfflineDataset.concat, d, foreign)


def test_episodes():
    """Four complete ones (the second one timed out) and one that was cut."""
    lengths = [2, 3, 1, 1, 2]
    obs = np.concatenate([np.arange(k) + 100.0 * i for i, k in enumerate(lengths)])[:, None]
    flags = np.zeros((2, 9), dtype=bool)
    flags[0, [1, 5, 6]] = flags[1, 4] = True
    reward = np.array([1.0, 1, 2, 2, 2, 5, 100, 900, 900])
    d = OfflineDataset(obs, np.zeros(9, int), reward, obs + 1, *flags, {"seed": 3})
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
    refuses(ValueError, "at least one complete episode", d.take(1).best_episodes)
    refuses(ValueError, "fraction: expected", d.best_episodes, 0)
    card = d.describe()
    assert "9" in card and "4 of them complete" in card and "from 2 to 100" in card
    assert "3 terminated, 1 truncated" in card and "0: 100%" in card
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
    for key in d4rl():
        words = "timeouts or next_observations" if key == "timeouts" else f"'{key}'.* missing"
        part = {k: v for k, v in d4rl().items() if k != key}
        refuses(KeyError, words, OfflineDataset.from_d4rl, part)
    refuses(TypeError, "dictionary of arrays", OfflineDataset.from_d4rl, "file.hdf5")
    bad = [("rewards", np.zeros(5)), ("timeouts", np.zeros(5, dtype=bool))]
    bad += [("rewards", np.full(6, np.nan)), ("observations", np.zeros((6, 0, 2)))]
    for spoilt in (*(d4rl(**{key: column}) for key, column in bad), d4rl(0)):
        refuses((ValueError, TypeError), "expected .*got", OfflineDataset.from_d4rl, spoilt)


def test_minari(tmp_path, monkeypatch):
    """A real Minari data set: two episodes of HalfCheetah, the first timed out, the second cut."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    import minari
    from minari.data_collector import EpisodeBuffer

    d, buffers = plain_loop(CHEETAH, swing, 17, 0), []
    for i, (rows, _) in enumerate(d.episodes()):
        columns = (list(getattr(d, name)[rows].numpy()) for name in OfflineDataset.columns)
        obs, action, reward, next_obs, *ends = columns
        buffers.append(EpisodeBuffer(i, None, None, [*obs, next_obs[-1]], action, reward, *ends))
    stored = minari.create_dataset_from_buffers("test/cheetah-v0", buffers, env=gym.make(CHEETAH))
    read = OfflineDataset.from_minari(stored, standardise=True)
    assert same(read, d) and read.standardise and "test/cheetah-v0" in str(read.provenance)
    assert [(rows.stop, whole) for rows, whole in read.episodes()] == [(12, True), (17, False)]
    odd = SimpleNamespace(observations={"a": np.zeros(3)})
    empty, other = (SimpleNamespace(iterate_episodes=lambda x=x: iter(x)) for x in ([], [odd]))
    refuses(ValueError, "at least one episode", OfflineDataset.from_minari, empty)
    refuses(TypeError, "one array, got dict", OfflineDataset.from_minari, other)
    refuses(TypeError, "minari.load_dataset", OfflineDataset.from_minari, {"observations": 0})


# ---- acting: collect, evaluate, the truth -------------------------------------------------------
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


def test_bad_actions_are_refused():
    zeros, full, integer = torch.zeros, torch.full, {"dtype": torch.int64}
    bad = [lambda obs: zeros(len(obs) - 1, **integer), lambda obs: zeros(len(obs), 3, **integer)]
    bad += [lambda obs: full((len(obs),), 0.7), lambda obs: None]
    worse = [lambda obs: zeros(6, len(obs)), lambda obs: full((len(obs), 6), torch.nan)]
    errors, words = (ValueError, TypeError), "act: expected"
    for env_id, width, acts in (("CartPole-v1", 4, bad), ("HalfCheetah-v5", 17, worse)):
        for act in acts:
            refuses(errors, words, collect, env_id, act, 10, 0, n_envs=2)
            refuses(errors, words, evaluate, env_id, act, [0, 1])
            refuses(errors, words, discounted_return, env_id, act, np.zeros((2, width)), 0.9)


def test_acting_refuses():
    for steps, n_envs in ((0, 1), (-1, 1), (10, 0)):
        refuses(ValueError, "at least one", collect, "CartPole-v1", good, steps, 0, n_envs)
    refuses(ValueError, "seeds: expected at least one", evaluate, "CartPole-v1", good, [])
    refuses(gym.error.Error, "NoSuchPole", evaluate, "NoSuchPole-v0", good, [0])
    right = {"env_id": "CartPole-v1", "act": good, "obs": np.zeros((1, 4)), "gamma": 0.9}
    bad = [{"obs": x} for x in (np.zeros(4), np.zeros((0, 4)), np.zeros((2, 3)), [[np.nan] * 4])]
    bad += [{"gamma": gamma} for gamma in (1.5, -0.1, np.nan)] + [{"horizon": 0}]
    for change in (*bad, {"env_id": "MountainCar-v0", "obs": np.zeros((1, 2))}):
        refuses(ValueError, "expected|can be restored", discounted_return, **right | change)


SIDES = [("CartPole-v1", [sloppy, good, left]), (CHEETAH, [swing, lambda obs: -swing(obs)])]


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


@pytest.mark.parametrize("env_id, act", [("CartPole-v1", sloppy), ("HalfCheetah-v5", swing)])
def test_truth_is_what_follows(env_id, act):
    """From the middle of an episode: the rewards, and a bonus, that it goes on to collect."""
    rows = play(env_id, act, 80, 0)
    ends = [t for t, row in enumerate(rows, 1) if row[4]] + [1000]
    starts = [0, 1, 13, 26, 39]
    states = np.stack([rows[t][0] for t in starts])
    for gamma, horizon, bonus in ((0.0, 9, 0), (0.9, 20, 0), (1.0, 1, 0), (0.99, 25, 0.25)):
        expected = []
        for t in starts:
            rewards = [row[2] for row in rows[t : min(e for e in ends if e > t)][:horizon]]
            expected.append(sum(gamma**k * (r + bonus * (k > 0)) for k, r in enumerate(rewards)))
        pair = lambda obs, bonus=bonus: (act(obs), torch.full(obs.shape[:-1], bonus))  # noqa: E731
        for play_on in (pair, act) if not bonus else (pair,):
            truth = discounted_return(env_id, play_on, states, gamma, horizon)
            np.testing.assert_allclose(truth, expected, rtol=1e-9, atol=1e-10)


def test_truth_has_no_time_limit():
    """The environment itself would stop at 500."""
    for gamma, horizon, truth in ((1.0, 30, 30), (1.0, 700, 700), (0.9, 700, 10)):
        long = discounted_return("CartPole-v1", good, np.zeros((1, 4)), gamma, horizon)
        np.testing.assert_allclose(long, truth, rtol=1e-7)


def test_truth_of_agents_side_by_side():
    states = np.random.default_rng(0).uniform(-0.1, 0.1, (2, 5, 4))
    both = lambda obs: torch.stack([sloppy(obs[0]), left(obs[1])])  # noqa: E731
    for given in (states, states[0]):  # states of their own, or the same for both
        truth = discounted_return("CartPole-v1", both, given, 0.9, agents=2)
        starts = np.broadcast_to(given, states.shape)
        for row, act, own in zip(truth, (sloppy, left), starts, strict=True):
            np.testing.assert_allclose(row, discounted_return("CartPole-v1", act, own, 0.9))


# ---- tables and verdicts ------------------------------------------------------------------------
def runs(datasets=("narrow", "mixed"), alphas=(0.0, 0.5, 1.0, 5.0, 20.0), seeds=3):
    """A small sweep with numbers that no two rows share; mean and median of its seeds differ."""
    keys = [datasets, alphas, range(seeds), range(10, 50, 10)]
    names = ["dataset", "alpha_cql", "seed", "step"]
    table = pd.MultiIndex.from_product(keys, names=names).to_frame(index=False)
    i, step, alpha = np.arange(len(table)), table["step"], table["alpha_cql"]
    best = alpha.isin([0.5, 5]) | (alpha == 1) & (table["dataset"] == "narrow")
    table["return"] = i / 10 + 7.0 ** table["seed"] + step + 900 * best
    table["prediction"] = i / 9 + step + 5.0 ** table["seed"] + 900 * (alpha == 0)
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
        refuses(ValueError, "expected (rows|finite)", save_table, bad, "y", **about)
    refuses(FileNotFoundError, "no figs/data/y.csv", read_table, "y")


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
    for rows in (9, 12):
        save_table(table[:rows], "long/x", seed=0)
    for other in (table[:12], table[:9], table[1:20], table[:20].assign(truth=0.0)):
        words = "can be extended and not replaced"
        refuses(FileExistsError, words, save_table, other, "long/x", seed=0)
    assert len(read_table("long/x")) == 12


def test_damaged_tables_are_refused(figs):
    """Cut anywhere, its last number included; a row with too much; another kind of file."""
    save_table(runs(seeds=1)[:6], "x", seed=0)
    path = figs / "data/x.csv"
    whole = path.read_text()
    for cut in range(len(whole)):
        path.write_text(whole[:cut])
        refuses(ValueError, "x.csv: expected a table", read_table, "x")
    more, other = whole.replace(",0,10,", ",0,10,7,"), whole.replace("rows: 6", "rows: six")
    for damaged in (more, other, "\0"):
        path.write_text(damaged)
        refuses(ValueError, "x.csv: expected a table", read_table, "x")


def test_failed_save_leaves_the_old_file(figs, monkeypatch):
    for write in (
        lambda value: helpers.save_npz(figs / "x.npz", {"a": np.full(3, value)}, {"seed": value}),
        lambda value: helpers.save_figure(plt.figure(figsize=(value, 1)), "x"),
        lambda value: save_table(pd.DataFrame({"a": [value]}), "x", seed=0),
    ):
        write(2)
        before = {p: p.read_bytes() for p in figs.rglob("*") if p.is_file()}
        with monkeypatch.context() as patch, pytest.raises(TypeError):
            patch.setattr(os, "replace", None)
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
        with pytest.raises(AssertionError, match="not reproduced: second$"):
            helpers.verdict(("first", "> 0", True), ("second", "> 0", ok), ("third", "> 0", True))
        assert re.findall("OK|FAIL", capsys.readouterr().out) == ["OK", "FAIL", "OK"]
    for ok in (np.zeros(0, dtype=bool), np.array([0.0, np.nan]), np.nan, None, 1, "yes"):
        refuses(ValueError, "verdict: expected", helpers.verdict, ("claim", "> 0", ok))
    refuses(ValueError, "verdict: expected", helpers.verdict)


# ---- figures ------------------------------------------------------------------------------------
def drawn(ax, label):
    (line,) = [line for line in ax.get_lines() if line.get_label() == label]
    return line


def test_plot_seeds():
    ax, table = plt.figure().subplots(), runs(["mixed"], [0.0])
    curves = table["return"].to_numpy().reshape(3, 4)
    mixed = table.sample(frac=1, random_state=0)
    line = helpers.plot_seeds(ax, mixed, "step", "return", color="C3")
    np.testing.assert_allclose(line.get_data(), [[10, 20, 30, 40], curves.mean(0)])
    thin = [line.get_ydata().tolist() for line in ax.get_lines()[1:]]
    assert thin == curves.tolist() and {line.get_color() for line in ax.get_lines()} == {"C3"}
    twice = pd.concat([table, table]), "was a training cell run twice"
    for bad, words in (twice, (table[1:], "expected every step of every seed")):
        refuses(ValueError, words, helpers.plot_seeds, ax, bad, "step", "return")


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


def weight(text):
    return float(re.search(r"= ([\d.]+)", text).group(1))


def test_plot_alpha_reward():
    """Numbers drawn are the table's, and so are those, and the weights, that a title names."""
    table = runs().drop(columns=["prediction", "truth"]).assign(BC=3.0, data=9.0)
    fig = helpers.plot_alpha_reward(table)
    for name, left, right in zip(("narrow", "mixed"), fig.axes[::2], fig.axes[1::2], strict=True):
        part = table[table["dataset"] == name]
        mean = part.groupby(["alpha_cql", "step"])["return"].mean()
        late = part[part["step"] > 20].groupby("alpha_cql")["return"].mean()
        lines = [line for line in left.get_lines() if "=" in line.get_label()]
        weights = [weight(line.get_label()) for line in lines]
        assert {0, late.idxmax(), 20} <= set(weights) and weights == sorted(set(weights))
        for line, alpha, style in zip(lines, weights, helpers.STYLES, strict=False):
            np.testing.assert_allclose(line.get_ydata(), mean[alpha])
            assert {key: getattr(line, f"get_{key}")() for key in style} == style
            assert rf"{late[alpha]:.0f} at $\alpha$ = {alpha:g}" in left.get_title("left")
        np.testing.assert_allclose(drawn(right, "CQL").get_data(), [range(5), late])
        for level, height in (("BC", 3.0), ("data", 9.0)):
            assert set(drawn(right, level).get_ydata()) == {height}
        claimed = right.get_title("left").split("=")[1].split(",")
        assert list(map(float, claimed)) == list(late.index[late > 0.95 * late.max()]), claimed
        assert [text.get_text() for text in right.get_xticklabels()] == ["0", "0.5", "1", "5", "20"]


def test_plot_q_value():
    table = runs()
    fig, sides = helpers.plot_q_value(table, tau=0.02, gamma=0.9), set()
    panels = [(ax.get_title("left"), ax) for ax in fig.axes]
    assert {weight(title) for title, _ in panels} >= {0, 20}
    for title, ax in panels:
        rows = (table["dataset"] == title.split(",")[0]) & (table["alpha_cql"] == weight(title))
        part, step = table[rows], np.arange(10, 50, 10)
        prediction, truth = (part.groupby("step")[c].mean() for c in ("prediction", "truth"))
        lag = helpers.lag_line(step, truth.to_numpy(), 0.02, 0.9)
        lines = {"prediction": prediction, "truth": truth, "lag line": lag, "ceiling": [10] * 4}
        for label, y in lines.items():
            np.testing.assert_allclose(drawn(ax, label).get_data(), [step, y])
        excess = (part["prediction"] - part["truth"])[part["step"] == 40].median()
        sides.add(excess > 0)
        words = f"{abs(excess):.0f} {'above' if excess > 0 else 'below'} the truth"
        assert title.endswith(f": {words}"), (title, words)
    assert sides == {True, False}


def test_draw_cheetah(figs):
    """Both pictures show the same limbs from the first frame on, and how far each cheetah came."""
    columns = [f"q{i}" for i in range(9)]
    rows = [{"method": m, "step": t} | dict.fromkeys(columns, 0.0) for m in "ab" for t in range(3)]
    table = pd.DataFrame(rows)
    table.loc[(table["method"] == "b") & (table["step"] == 2), "q0"] = 2.0  # four ticks on
    fig = helpers.draw_cheetah(table, "film", moments=(0, 2))
    titles = [ax.get_title() for ax in fig.axes]
    assert titles == ["a 0.0 m", "a 0.0 m", "b 0.0 m", "b 2.0 m"]
    limbs = [ax.collections[0] for ax in fig.axes]
    assert {len(one.get_segments()) for one in limbs} == {8}  # torso, head, two legs of three
    for one in limbs:  # seen from the cheetah, wherever it is; none is clipped
        np.testing.assert_allclose(one.get_segments(), limbs[0].get_segments(), atol=1e-12)
        assert np.abs(one.get_segments()).max() < 1.3
        assert min(one.get_linewidths()) > 3
    with Image.open(figs / "film.gif") as film:
        first, second = (np.asarray(film.convert("RGB")) for _ in map(film.seek, range(2)))
    change = np.abs(first.astype(int) - second).max(axis=2)
    assert change[: len(change) * 2 // 5].max() < 64  # a did not move; colours are a palette's
    assert change.max() > 128 and (figs / "film.gif").stat().st_size < 500_000
    refuses(KeyError, "q8", helpers.draw_cheetah, table.drop(columns="q8"), "film", (0,))


def test_show(figs, monkeypatch, capsys):
    shown, alt = [], "A straight line that rises from the origin to one, drawn over two points."
    monkeypatch.setattr(helpers, "display", lambda *args, **_: shown.append(args[0]))
    fig = plt.figure()
    refuses(FileNotFoundError, "save its numbers first", helpers.show, fig, "line", alt)
    save_table(runs(), "line", seed=0)
    for bad in ("", "a line"):
        refuses(ValueError, "alt: expected a sentence", helpers.show, fig, "line", bad)
    assert not shown and not (figs / "line.png").exists()
    helpers.show(fig, "line", alt)
    png = (figs / "line.png").read_bytes()
    assert shown == [{"image/png": png, "text/plain": alt}] and png.startswith(b"\x89PNG")
    assert capsys.readouterr().out == alt + "\n" and not plt.fignum_exists(fig.number)
