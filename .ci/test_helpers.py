"""helpers.py: what it promises, and what it refuses."""
import os
import random
import re
import subprocess
import sys
import zipfile

import gymnasium as gym
import hypothesis.extra.numpy as hnp
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from gymnasium.envs.registration import register
from hypothesis import given, settings
from hypothesis import strategies as st

import helpers
from helpers import (
    OfflineDataset,
    RunLog,
    collect,
    discounted_return,
    evaluate,
    load_npz,
    load_policy,
    save_npz,
)

settings.register_profile("ci", deadline=None, max_examples=40, database=None, derandomize=True)
settings.load_profile("ci")

register("CartPoleShort-v0", "gymnasium.envs.classic_control:CartPoleEnv", max_episode_steps=12)
register("HalfCheetahShort-v0", "gymnasium.envs.mujoco.half_cheetah_v5:HalfCheetahEnv", max_episode_steps=12)


@pytest.fixture
def figs(tmp_path, monkeypatch):
    monkeypatch.setattr(helpers, "FIGS", tmp_path)
    return tmp_path


def arrays(n=6, width=3, action_dim=None, seed=0):
    """Columns of a small data set in which each row is told apart by its number."""
    rng = np.random.default_rng(seed)
    obs = np.arange(n)[:, None] + np.linspace(0, 0.5, width)
    action = np.arange(n) % 2 if action_dim is None else rng.uniform(-1, 1, (n, action_dim))
    return {"obs": obs, "action": action, "reward": np.arange(n) * 0.25, "next_obs": obs + 1,
            "terminated": np.arange(n) % 3 == 2, "truncated": np.arange(n) % 4 == 1}


def dataset(n=6, **options):
    return OfflineDataset(**arrays(n), **options)


def same(a, b):
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in OfflineDataset.columns)


def good(obs):
    """CartPole's transparent controller."""
    return (obs[..., 2] + 0.5 * obs[..., 3] + 0.1 * obs[..., 1] > 0).long()


def sloppy(obs):
    return (obs[..., 2] > 0).long()


def always_left(obs):
    return torch.zeros(obs.shape[:-1], dtype=torch.int64)


def swing(obs):
    """A deterministic policy for HalfCheetah."""
    return torch.sin(3 * obs[..., :6])


def alone(act, obs):
    """The action for one observation."""
    return act(torch.as_tensor(obs, dtype=torch.float32)[None])[0].numpy()


# ---- seeds --------------------------------------------------------------------------------------------

def draws(seed):
    generator = helpers.seed_everything(seed)
    numbers = random.random(), np.random.rand(), torch.rand(1).item()      # noqa: NPY002
    return *numbers, torch.rand(1, generator=generator).item()


def test_seed_everything_repeats():
    assert draws(3) == draws(3)
    assert all(a != b for a, b in zip(draws(3), draws(4), strict=True))


def test_versions_name_the_libraries():
    build = torch.__version__.partition("+")[0]               # 2.13.0 of 2.13.0+cpu
    for name in ("Python 3", f"torch {build}", f"numpy {np.__version__}", "mujoco", "gymnasium"):
        assert name in helpers.versions()


# ---- npz files ----------------------------------------------------------------------------------------

ANY_ARRAY = hnp.arrays(st.sampled_from([np.float32, np.float64, np.int64, np.bool_]),
                       hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=4))


@given(st.dictionaries(st.text("abcxyz_", min_size=1).map("k".__add__), ANY_ARRAY, min_size=1, max_size=3),
       st.dictionaries(st.text(), st.one_of(st.integers(), st.text(), st.booleans()), min_size=1))
def test_npz_round_trip(tmp_path_factory, content, provenance):
    path = tmp_path_factory.mktemp("npz") / "x.npz"
    save_npz(path, content, provenance)
    loaded, said = load_npz(path, required=content)
    assert said == provenance and set(loaded) == set(content)
    for name, array in content.items():
        assert loaded[name].dtype == array.dtype
        np.testing.assert_array_equal(loaded[name], array)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "x.npz"
    save_npz(path, {"a": np.arange(300.0), "b": np.ones((20, 3))}, {"seed": 0})
    return path


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.9, 0.99])
def test_truncated_file_is_refused(saved, share):
    content = saved.read_bytes()
    saved.write_bytes(content[:int(share * len(content))])
    with pytest.raises(ValueError, match="x.npz: expected an .npz archive"):
        load_npz(saved)


@given(st.integers(0, 10**6), st.integers(1, 255))
@settings(max_examples=150)
def test_damaged_file_is_refused_or_harmless(tmp_path_factory, where, change):
    path = tmp_path_factory.getbasetemp() / "damaged.npz"
    save_npz(path, {"a": np.arange(300.0)}, {"seed": 0})
    content = bytearray(path.read_bytes())
    content[where % len(content)] ^= change
    path.write_bytes(content)
    try:
        loaded, provenance = load_npz(path, required=["a"])
    except ValueError as error:
        assert "damaged.npz: expected" in str(error)
    else:
        assert provenance == {"seed": 0} and np.array_equal(loaded["a"], np.arange(300.0))


def foreign_text(path):
    path.write_text("some text")


def foreign_npy(path):
    with path.open("wb") as file:
        np.save(file, np.ones(3))


def foreign_pickle(path):
    np.savez(path, provenance="{}", a=np.array([{"a": 1}], dtype=object))


def foreign_zip(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme.txt", "hello")


def without_provenance(path):
    np.savez(path, a=np.ones(3))


FOREIGN = [foreign_text, foreign_npy, foreign_pickle, foreign_zip, without_provenance]


@pytest.mark.parametrize("write", FOREIGN)
def test_foreign_file_is_refused(tmp_path, write):
    write(tmp_path / "x.npz")
    with pytest.raises(ValueError, match="x.npz: expected"):
        load_npz(tmp_path / "x.npz")


def test_missing_file_and_missing_array(saved):
    with pytest.raises(FileNotFoundError, match="no.npz"):
        load_npz(saved.parent / "no.npz")
    with pytest.raises(ValueError, match=r"\['c'\] missing"):
        load_npz(saved, required=["a", "c"])


def test_save_npz_refuses(tmp_path):
    for content, provenance in [({}, {"seed": 0}), ({"a": np.ones(3)}, {}),
                                ({"a": np.array([None])}, {"seed": 0}), ({"a": np.ones(3)}, {"f": print})]:
        with pytest.raises((ValueError, TypeError)):
            save_npz(tmp_path / "x.npz", content, provenance)
    assert not list(tmp_path.iterdir())


def full_disk(*_, **__):
    raise OSError("no space left on device")


@pytest.mark.parametrize("failing", ["replace", "fdopen"])
@pytest.mark.parametrize("kind", ["npz", "csv", "png"])
def test_failed_save_leaves_the_old_file(figs, monkeypatch, failing, kind):
    log = RunLog("x")
    log.add(x=1)

    def save(value):
        if kind == "npz":
            dataset(value).save(figs / "x.npz")
        elif kind == "csv":
            log.save("x", value=value)
        else:
            log.save("x", value=0)
            fig, ax = plt.subplots()
            ax.plot([0, value])
            helpers.show(fig, "x", "A straight line from the origin upwards, and nothing else.")

    save(2)
    before = {p: p.read_bytes() for p in figs.rglob("*") if p.is_file()}
    monkeypatch.setattr(os, failing, full_disk)
    with pytest.raises(OSError, match="no space"):
        save(3)
    assert {p: p.read_bytes() for p in figs.rglob("*") if p.is_file()} == before    # and no litter beside it
    plt.close("all")


# ---- policies -----------------------------------------------------------------------------------------

def policy():
    rng = np.random.default_rng(0)
    return {"w0": rng.normal(size=(17, 8)), "b0": np.zeros(8),
            "w1": rng.normal(size=(8, 12)), "b1": np.zeros(12),
            "obs_mean": np.zeros(17), "obs_scale": np.ones(17)}


PROVENANCE = {"env_id": "HalfCheetah-v5", "seed": 0, "steps": 10, "return_mean": 1.0, "return_std": 0.5}


def test_policy_round_trip(tmp_path):
    save_npz(tmp_path / "p.npz", policy(), PROVENANCE)
    loaded, provenance = load_policy(tmp_path / "p.npz")
    assert provenance == PROVENANCE and list(loaded) == list(policy())
    assert all(np.array_equal(loaded[name], array) for name, array in policy().items())


BAD_POLICIES = {
    "transposed layer": {"w1": np.ones((12, 8))},
    "bias of another length": {"b0": np.zeros(7)},
    "bias with two dimensions": {"b0": np.zeros((1, 8))},
    "odd number of outputs": {"w1": np.ones((8, 11)), "b1": np.zeros(11)},
    "no bias": {"b1": None},
    "a layer left out": {"w1": None, "b1": None, "w2": np.ones((8, 12)), "b2": np.zeros(12)},
    "layers that do not meet": {"w1": np.ones((9, 12))},
    "scalar mean": {"obs_mean": np.zeros(())},
    "no scale": {"obs_scale": None},
    "scale of another length": {"obs_scale": np.ones(16)},
    "a scale of zero": {"obs_scale": np.zeros(17)},
    "another array": {"extra": np.ones(3)},
    "NaN": {"b0": np.full(8, np.nan)},
    "infinite": {"w0": np.full((17, 8), np.inf)},
    "integers": {"b0": np.zeros(8, dtype=int)},
}


@pytest.mark.parametrize("name", BAD_POLICIES)
def test_bad_policy_is_refused(tmp_path, name):
    content = {k: v for k, v in (policy() | BAD_POLICIES[name]).items() if v is not None}
    save_npz(tmp_path / "p.npz", content, PROVENANCE)
    with pytest.raises(ValueError, match="p.npz: expected"):
        load_policy(tmp_path / "p.npz")


@pytest.mark.parametrize("key", PROVENANCE)
def test_policy_without_provenance_is_refused(tmp_path, key):
    save_npz(tmp_path / "p.npz", policy(), {k: v for k, v in PROVENANCE.items() if k != key})
    with pytest.raises(ValueError, match=f"p.npz: expected a provenance .*{key}"):
        load_policy(tmp_path / "p.npz")


# ---- OfflineDataset -----------------------------------------------------------------------------------

def test_dataset_keeps_the_data():
    given_ = arrays()
    data = OfflineDataset(**given_)
    assert len(data) == 6
    kinds = [torch.float32, torch.int64, torch.float32, torch.float32, torch.bool, torch.bool]
    for name, kind in zip(OfflineDataset.columns, kinds, strict=True):
        column = getattr(data, name)
        assert column.dtype == kind
        np.testing.assert_array_equal(column.numpy(), given_[name].astype(column.numpy().dtype))
    assert (data.obs_mean == 0).all() and (data.obs_scale == 1).all()
    given_["obs"][:] = 99                                     # what happens to the caller's arrays is theirs
    assert data.obs.max() < 99


def test_dataset_with_continuous_actions():
    data = OfflineDataset(**arrays(action_dim=2))
    assert data.action.shape == (6, 2) and data.action.dtype == torch.float32
    assert data.sample(4)[1].shape == (4, 2)


BAD_COLUMNS = {  # name: (array that the message must name, change)
    "empty": ("obs", {k: v[:0] for k, v in arrays().items()}),
    "scalar": ("obs", {"obs": np.float64(1.0)}),
    "flat obs": ("obs", {"obs": np.zeros(6)}),
    "obs as pictures": ("obs", {"obs": np.zeros((6, 3, 3))}),
    "short reward": ("reward", {"reward": np.zeros(5)}),
    "long action": ("action", {"action": np.zeros(7, dtype=int)}),
    "short flags": ("terminated", {"terminated": np.zeros(5, dtype=bool)}),
    "reward as a column": ("reward", {"reward": np.zeros((6, 1))}),
    "flags as a column": ("truncated", {"truncated": np.zeros((6, 1), dtype=bool)}),
    "narrow next_obs": ("next_obs", {"next_obs": np.zeros((6, 2))}),
    "obs of integers": ("obs", {"obs": np.zeros((6, 3), dtype=int)}),
    "reward of integers": ("reward", {"reward": np.zeros(6, dtype=int)}),
    "reward of text": ("reward", {"reward": np.array(["a"] * 6)}),
    "floating flags": ("terminated", {"terminated": np.zeros(6)}),
    "integer flags": ("truncated", {"truncated": np.zeros(6, dtype=int)}),
    "floating action, one-dimensional": ("action", {"action": np.zeros(6)}),
    "integer action, two-dimensional": ("action", {"action": np.zeros((6, 2), dtype=int)}),
    "complex obs": ("obs", {"obs": np.zeros((6, 3), dtype=complex)}),
    "NaN reward": ("reward", {"reward": np.r_[np.nan, np.zeros(5)]}),
    "infinite obs": ("obs", {"obs": np.full((6, 3), np.inf)}),
    "NaN in next_obs": ("next_obs", {"next_obs": np.full((6, 3), np.nan)}),
    "NaN action": ("action", {"action": np.full((6, 2), np.nan)}),
    "too large for float32": ("reward", {"reward": np.full(6, 1e300)}),
}


@pytest.mark.parametrize("case", BAD_COLUMNS)
def test_bad_columns_are_refused(case):
    name, change = BAD_COLUMNS[case]
    with pytest.raises((ValueError, TypeError), match=rf"^{name}: expected .*(got|came)"):
        OfflineDataset(**arrays() | change)


@given(st.integers(1, 40), st.data(), st.integers(0, 2**31))
def test_sampling(n, data, seed):
    """Rows stay together, come from the data, repeat with the seed, and leave the global generator alone."""
    batch_size = data.draw(st.integers(1, n))
    d = dataset(n)
    state = torch.get_rng_state()
    batch = d.sample(batch_size, torch.Generator().manual_seed(seed))
    assert torch.equal(state, torch.get_rng_state())
    obs, action, reward, next_obs, terminated = batch
    again = d.sample(batch_size, torch.Generator().manual_seed(seed))
    assert all(torch.equal(x, y) for x, y in zip(batch, again, strict=True))
    rows = obs[:, 0].long()                                   # each row is told apart by its first number
    assert obs.shape == (batch_size, 3) and reward.shape == terminated.shape == action.shape == (batch_size,)
    assert torch.equal(obs, d.obs[rows]) and torch.equal(next_obs, d.next_obs[rows])
    assert torch.equal(action, d.action[rows]) and torch.equal(reward, d.reward[rows])
    assert terminated.dtype == torch.float32 and torch.equal(terminated, d.terminated[rows].float())


@given(st.lists(st.integers(0, 2**31), min_size=1, max_size=4), st.booleans())
def test_sampling_for_several_agents(seeds, standardise):
    """Row e of the batch is what generator e alone would draw."""
    d = dataset(9, standardise=standardise)
    together = d.sample(5, [torch.Generator().manual_seed(s) for s in seeds])
    for e, seed in enumerate(seeds):
        alone = d.sample(5, torch.Generator().manual_seed(seed))
        assert all(torch.equal(x[e], y) for x, y in zip(together, alone, strict=True))


def test_sampling_is_uniform():
    d, g = dataset(10), helpers.seed_everything(0)
    rows = torch.cat([d.sample(10, g)[0][:, 0] for _ in range(2000)]).long()
    counts = torch.bincount(rows, minlength=10)
    assert len(counts) == 10 and (counts - 2000).abs().max() < 5 * (2000 * 0.9) ** 0.5


@pytest.mark.parametrize("size", [0, -1, 7, 2.5, None, "3"])
def test_senseless_batch_is_refused(size):
    with pytest.raises(ValueError, match="batch_size: expected an integer from 1 to the 6 transitions"):
        dataset().sample(size)


@given(hnp.arrays(np.float64, (12, 3), elements=st.floats(-100, 100)))
def test_standardised_states(obs):
    columns = arrays(12) | {"obs": obs}
    d = OfflineDataset(**columns, standardise=True)
    np.testing.assert_allclose(d.obs_mean, obs.astype(np.float32).mean(0), atol=1e-4)
    spread = obs.astype(np.float32).astype(float).std(0)
    np.testing.assert_allclose(d.obs_scale, np.maximum(spread, 1e-6), rtol=1e-4)
    g = helpers.seed_everything(0)
    seen, _, _, next_seen, _ = d.sample(12, g)
    raw, _, _, next_raw, _ = OfflineDataset(**columns).sample(12, helpers.seed_everything(0))
    torch.testing.assert_close(seen, (raw - d.obs_mean) / d.obs_scale)
    torch.testing.assert_close(next_seen, (next_raw - d.obs_mean) / d.obs_scale)


def test_constant_state_is_no_division_by_zero():
    d = OfflineDataset(**arrays() | {"obs": np.full((6, 3), 7.0)}, standardise=True)
    assert torch.isfinite(d.sample(6)[0]).all()


def test_states():
    d = dataset(20, standardise=True)
    states = d.states(20, helpers.seed_everything(0))
    assert states.dtype == np.float64 and states.shape == (20, 3)
    np.testing.assert_array_equal(np.sort(states[:, 0]), np.arange(20))          # each once, not standardised
    once, again = (d.states(4, torch.Generator().manual_seed(1)) for _ in range(2))
    np.testing.assert_array_equal(once, again)
    for n in (0, 21):
        with pytest.raises(ValueError, match="n: expected 1 to 20"):
            d.states(n)


def test_take():
    d = dataset(20)
    first = d.take(5, standardise=True)
    assert torch.equal(first.obs, d.obs[:5]) and len(first) == 5 and first.standardise
    torch.testing.assert_close(first.obs_mean, d.obs[:5].mean(0))
    assert same(d.take(20), d)
    for n in (0, -3, 21):
        with pytest.raises(ValueError, match="n: expected 1 to the 20 transitions"):
            d.take(n)


def test_concat():
    a, b = dataset(5, provenance={"seed": 1}), dataset(4, provenance={"seed": 2})
    both = OfflineDataset.concat(a, b, standardise=True)
    assert len(both) == 9 and same(both.take(5), a) and torch.equal(both.obs[5:], b.obs)
    torch.testing.assert_close(both.obs_mean, torch.cat([a.obs, b.obs]).mean(0))
    assert "1" in str(both.provenance) and "2" in str(both.provenance)
    with pytest.raises(ValueError, match="one environment, got obs"):
        OfflineDataset.concat(a, OfflineDataset(**arrays(width=4)))
    with pytest.raises(ValueError, match="one environment, got action"):
        OfflineDataset.concat(a, OfflineDataset(**arrays(action_dim=2)))


def episodic():
    """Three complete episodes (lengths 2, 3, 1; the second one timed out) and one that was cut."""
    lengths, n = [2, 3, 1, 2], 8
    obs = np.concatenate([np.arange(k) + 100.0 * i for i, k in enumerate(lengths)])[:, None]
    flags = np.zeros((2, n), dtype=bool)
    flags[0, [1, 5]] = flags[1, 4] = True
    return OfflineDataset(obs, np.zeros(n, int), np.array([1.0, 1, 2, 2, 2, 5, 9, 9]), obs + 1, *flags)


def test_episodes():
    d = episodic()
    assert [(rows.start, rows.stop, complete) for rows, complete in d.episodes()] == [
        (0, 2, True), (2, 5, True), (5, 6, True), (6, 8, False)]
    np.testing.assert_array_equal(d.episode_returns(), [2.0, 6.0, 5.0])
    assert len(d.take(1).episode_returns()) == 0
    glued = OfflineDataset.concat(d, d)                       # the cut episode does not run on
    np.testing.assert_array_equal(glued.episode_returns(), [2.0, 6.0, 5.0] * 2)


def test_better_half():
    better = episodic().better_half()
    np.testing.assert_array_equal(better.episode_returns(), [6.0, 5.0])
    assert len(better) == 4
    with pytest.raises(ValueError, match="at least one complete episode"):
        episodic().take(1).better_half()


def test_data_card():
    card = episodic().describe()
    for words in ("8", "3 of them complete", "from 2 to 6", "2 terminated, 1 truncated", "0: 100%"):
        assert words in card
    assert "2 dimensions" in OfflineDataset(**arrays(action_dim=2)).describe()
    assert dataset(1).describe()


@given(st.integers(1, 30), st.sampled_from([None, 1, 3]), st.integers(0, 99))
def test_dataset_round_trip(tmp_path_factory, n, action_dim, seed):
    path = tmp_path_factory.getbasetemp() / "data.npz"
    d = OfflineDataset(**arrays(n, action_dim=action_dim, seed=seed), provenance={"seed": seed})
    d.save(path)
    loaded = OfflineDataset.load(path, standardise=True)
    assert same(d, loaded) and loaded.provenance == {"seed": seed} and loaded.standardise


def test_dataset_refuses_a_foreign_file(saved):
    with pytest.raises(ValueError, match="x.npz: expected the arrays"):
        OfflineDataset.load(saved)


# ---- other people's data ------------------------------------------------------------------------------

def d4rl(n=6, **change):
    a = arrays(n, action_dim=2)
    return {"observations": a["obs"].astype(np.float32), "actions": a["action"].astype(np.float32),
            "rewards": a["reward"].astype(np.float32), "terminals": np.zeros(n, dtype=bool),
            "timeouts": np.zeros(n, dtype=bool)} | change


def test_d4rl_with_next_observations():
    content = d4rl(terminals=np.arange(6) == 2, timeouts=np.arange(6) == 5)
    content["next_observations"] = content["observations"] + 1
    d = OfflineDataset.from_d4rl(content, standardise=True)
    assert len(d) == 6 and d.standardise and torch.equal(d.next_obs, d.obs + 1)
    assert d.terminated.tolist() == [False, False, True, False, False, False]
    assert d.truncated.tolist() == [False] * 5 + [True]
    np.testing.assert_array_equal(d.action.numpy(), content["actions"])


def test_d4rl_without_next_observations():
    """Row 1 terminated and stays; row 3 timed out and row 5 is the last: their successors are unknown."""
    d = OfflineDataset.from_d4rl(d4rl(terminals=np.arange(6) == 1, timeouts=np.arange(6) == 3))
    assert d.obs[:, 0].tolist() == [0, 1, 2, 4]
    assert d.terminated.tolist() == [False, True, False, False]
    assert d.truncated.tolist() == [False, False, True, False]
    keep = ~d.terminated
    assert torch.equal(d.next_obs[keep], d.obs[keep] + 1)     # never the first state of another episode
    plain = d4rl()
    del plain["timeouts"]                                     # some sets have none
    assert len(OfflineDataset.from_d4rl(plain)) == 5


@pytest.mark.parametrize("key", ["observations", "actions", "rewards", "terminals"])
def test_d4rl_refuses_a_missing_key(key):
    content = d4rl()
    del content[key]
    with pytest.raises(KeyError, match=f"'{key}'.* missing"):
        OfflineDataset.from_d4rl(content)


@pytest.mark.parametrize("change", [
    {"rewards": np.zeros(5, np.float32)}, {"terminals": np.zeros(7, bool)}, {"actions": np.zeros((5, 2))},
    {"timeouts": np.zeros(5, bool)}, {"rewards": np.full(6, np.nan)}, {"observations": np.zeros((6, 0, 2))},
    {k: v[:0] for k, v in d4rl().items()}], ids=str)
@pytest.mark.parametrize("successors", [True, False])
def test_d4rl_refuses_bad_columns(change, successors):
    content = d4rl(**change)
    if successors:
        content["next_observations"] = content["observations"] + 1
    with pytest.raises((ValueError, TypeError), match="expected .*got"):
        OfflineDataset.from_d4rl(content)


@pytest.fixture
def minari_set(tmp_path, monkeypatch):
    """A real Minari data set: two episodes of HalfCheetah, one of them timed out, and what was recorded."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    minari = pytest.importorskip("minari")
    from minari.data_collector import EpisodeBuffer

    env, rng, buffers = gym.make("HalfCheetahShort-v0"), np.random.default_rng(0), []
    for episode, steps in enumerate((12, 5)):
        first, _ = env.reset(seed=episode)
        buffer = EpisodeBuffer(id=episode, observations=[first], actions=[])
        for _ in range(steps):
            action = rng.uniform(-1, 1, 6).astype(np.float32)
            obs, reward, terminated, truncated, _ = env.step(action)
            buffer.observations.append(obs)
            buffer.actions.append(action)
            buffer.rewards.append(reward)
            buffer.terminations.append(terminated)
            buffer.truncations.append(truncated)
        buffers.append(buffer)
    return minari.create_dataset_from_buffers("test/cheetah-v0", buffers, env=env), buffers


def test_minari(minari_set):
    stored, buffers = minari_set
    d = OfflineDataset.from_minari(stored, standardise=True)
    assert len(d) == 17 and d.standardise and "test/cheetah-v0" in str(d.provenance)
    obs = np.concatenate([b.observations[:-1] for b in buffers]).astype(np.float32)
    next_obs = np.concatenate([b.observations[1:] for b in buffers]).astype(np.float32)
    np.testing.assert_array_equal(d.obs.numpy(), obs)
    np.testing.assert_array_equal(d.next_obs.numpy(), next_obs)
    np.testing.assert_array_equal(d.action.numpy(), np.concatenate([b.actions for b in buffers]))
    np.testing.assert_allclose(d.reward.numpy(), np.concatenate([b.rewards for b in buffers]), rtol=1e-6)
    assert not d.terminated.any() and np.flatnonzero(d.truncated.numpy()).tolist() == [11]
    assert [complete for _, complete in d.episodes()] == [True, False]


def test_minari_refuses_an_empty_or_foreign_object():
    class Empty:
        def iterate_episodes(self):
            return iter(())

    with pytest.raises(ValueError, match="at least one episode"):
        OfflineDataset.from_minari(Empty())
    with pytest.raises((TypeError, ValueError), match="expected"):
        OfflineDataset.from_minari({"observations": np.zeros((3, 2))})


# ---- collect ------------------------------------------------------------------------------------------

def plain_loop(env_id, act, steps, seed):
    """The same by hand: one environment, one episode after the other."""
    env, rows, episode = gym.make(env_id), [], 0
    while len(rows) < steps:
        (obs, _), done = env.reset(seed=seed + episode), False
        while not done:
            action = alone(act, obs)
            next_obs, reward, terminated, truncated, _ = env.step(action)
            rows.append((obs, action, float(reward), next_obs, terminated, truncated))
            obs, done = next_obs, terminated or truncated
        episode += 1
    columns = [np.stack(column) for column in zip(*rows[:steps], strict=True)]
    return OfflineDataset(*columns)


@pytest.mark.parametrize("env_id, act", [("CartPoleShort-v0", good), ("HalfCheetahShort-v0", swing),
                                         ("CartPole-v1", lambda obs: (obs[:, 2] > 0).long())])
@pytest.mark.parametrize("n_envs", [1, 3])
def test_collect_is_the_plain_loop(env_id, act, n_envs):
    d, expected = collect(env_id, act, 100, 7, n_envs), plain_loop(env_id, act, 100, 7)
    assert len(d) == 100 and d.provenance["env_id"] == env_id and d.provenance["seed"] == 7
    for name in OfflineDataset.columns:
        torch.testing.assert_close(getattr(d, name), getattr(expected, name), rtol=0, atol=1e-6)


def test_collect_keeps_the_true_successor_at_time_limits():
    d = collect("CartPoleShort-v0", good, 60, 0, n_envs=2)
    ends = np.flatnonzero(d.truncated.numpy())
    assert ends.tolist() == [11, 23, 35, 47, 59] and not d.terminated.any()
    jump = (d.next_obs - d.obs).abs().amax(1)
    assert jump.max() < 1                                      # one step never moves the cart or the pole far
    assert not torch.equal(d.next_obs[11], d.obs[12])          # the next row belongs to another episode


def test_collect_passes_on_provenance():
    assert collect("CartPole-v1", good, 5, 0, epsilon=0.3).provenance["epsilon"] == 0.3


BAD_ACTS = {
    "too few": lambda obs: torch.zeros(len(obs) - 1, dtype=torch.int64),
    "too many": lambda obs: torch.zeros(len(obs), 3, dtype=torch.int64),
    "probabilities": lambda obs: torch.full((len(obs),), 0.7),
    "NaN": lambda obs: torch.full((len(obs),), torch.nan),
    "nothing": lambda obs: None,
}


@pytest.mark.parametrize("name", BAD_ACTS)
@pytest.mark.parametrize("play", [
    lambda act: collect("CartPole-v1", act, 10, 0, n_envs=2),
    lambda act: evaluate("CartPole-v1", act, [0, 1]),
    lambda act: discounted_return("CartPole-v1", act, np.zeros((2, 4)), 0.9),
], ids=["collect", "evaluate", "truth"])
def test_bad_actions_are_refused(play, name):
    with pytest.raises((ValueError, TypeError), match="act: expected"):
        play(BAD_ACTS[name])


def test_transposed_actions_are_refused():
    with pytest.raises(ValueError, match="act: expected"):
        evaluate("HalfCheetahShort-v0", lambda obs: torch.zeros(6, len(obs)), [0, 1])


@pytest.mark.parametrize("change", [{"steps": 0}, {"steps": -1}, {"n_envs": 0}])
def test_collect_refuses(change):
    with pytest.raises(ValueError, match="at least one"):
        collect("CartPole-v1", good, **{"steps": 10, "seed": 0} | change)


def test_unknown_environment():
    for play in (lambda: collect("NoSuchEnv-v0", good, 10, 0), lambda: evaluate("NoSuchEnv-v0", good, [0]),
                 lambda: discounted_return("NoSuchEnv-v0", good, np.zeros((1, 4)), 0.9)):
        with pytest.raises(gym.error.Error, match="NoSuchEnv"):
            play()


# ---- evaluate -----------------------------------------------------------------------------------------

def plain_return(env_id, act, seed):
    env = gym.make(env_id)
    (obs, _), total, done = env.reset(seed=seed), 0.0, False
    while not done:
        obs, reward, terminated, truncated, _ = env.step(alone(act, obs))
        total, done = total + reward, terminated or truncated
    return total


@pytest.mark.parametrize("env_id, act, expected", [
    ("CartPole-v1", sloppy, None), ("CartPole-v1", good, 500), ("CartPole-v1", always_left, None),
    ("HalfCheetahShort-v0", swing, None)])
def test_evaluate_is_the_plain_loop(env_id, act, expected):
    seeds = [3, 0, 3, 11]
    returns = evaluate(env_id, act, seeds)
    np.testing.assert_allclose(returns, [plain_return(env_id, act, s) for s in seeds], atol=1e-9)
    assert returns.shape == (4,) and (expected is None or (returns == expected).all())
    assert returns[0] == returns[2] and (expected or returns[0] != returns[1])
    np.testing.assert_array_equal(returns, evaluate(env_id, act, seeds))         # fixed seeds, fixed returns


def test_evaluate_standardises():
    mean, scale = torch.tensor([0.0, 1, 2, 3]), torch.tensor([1.0, 2, 3, 4])
    seen = evaluate("CartPole-v1", lambda obs: sloppy(obs * scale + mean), [0, 1, 2], mean, scale)
    np.testing.assert_allclose(seen, evaluate("CartPole-v1", sloppy, [0, 1, 2]), atol=5)


@pytest.mark.parametrize("env_id, act, agents", [
    ("CartPole-v1", lambda obs: torch.stack([sloppy(obs[0]), good(obs[1]), always_left(obs[2])]),
     [sloppy, good, always_left]),
    ("HalfCheetahShort-v0", lambda obs: torch.stack([swing(obs[0]), -swing(obs[1])]),
     [swing, lambda obs: -swing(obs)])])
def test_evaluate_agents_side_by_side(env_id, act, agents):
    together = evaluate(env_id, act, range(4), agents=len(agents))
    assert together.shape == (len(agents), 4)
    np.testing.assert_allclose(together, [evaluate(env_id, a, range(4)) for a in agents], atol=1e-9)


def test_evaluate_refuses_no_seeds():
    with pytest.raises(ValueError, match="seeds: expected at least one"):
        evaluate("CartPole-v1", good, [])


# ---- discounted_return: the truth ---------------------------------------------------------------------

def test_cheetah_is_restored_exactly():
    """Play on from a state in the middle of an episode: the same rewards as when the episode goes on."""
    env, rng = gym.make("HalfCheetah-v5"), np.random.default_rng(0)
    obs, _ = env.reset(seed=0)
    actions, rewards, states = rng.uniform(-1, 1, (60, 6)).astype(np.float32), [], []
    for action in actions:
        states.append(obs)
        obs, reward, *_ = env.step(action)
        rewards.append(reward)
    for start in (0, 17, 40):
        clock = iter(actions[start:])
        truth = discounted_return("HalfCheetah-v5", lambda _: next(clock)[None],  # noqa: B023
                                  states[start][None], 0.9, horizon=20)
        expected = sum(0.9**t * r for t, r in enumerate(rewards[start:start + 20]))
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


@given(hnp.arrays(np.float64, (3, 4), elements=st.floats(-0.2, 0.2)), st.floats(0, 1), st.integers(1, 40))
@settings(max_examples=15)
def test_truth_is_the_hand_loop(states, gamma, horizon):
    truth = discounted_return("CartPole-v1", sloppy, states, gamma, horizon)
    np.testing.assert_allclose(truth, [hand_loop(s, sloppy, gamma, horizon) for s in states], rtol=1e-9)


def test_truth_knows_no_time_limit_but_the_horizon():
    for horizon in (30, 700):
        truth = discounted_return("CartPole-v1", good, np.zeros((1, 4)), 1.0, horizon)
        assert truth == horizon                               # the environment itself would stop at 500


def test_bonus_counts_from_the_second_step():
    states = np.array([[0.0, 0, 0, 0], [0, 0, 0.1, 0.5]])
    truth = discounted_return("CartPole-v1", lambda o: (0 * good(o), torch.full((2,), 0.25)), states, 0.9, 50)
    expected = [hand_loop(s, always_left, 0.9, 50, bonus=0.25) for s in states]
    np.testing.assert_allclose(truth, expected, rtol=1e-9)


def test_truth_of_agents_side_by_side():
    states = np.random.default_rng(0).uniform(-0.1, 0.1, (5, 4))

    def act(obs):
        return torch.stack([sloppy(obs[0]), always_left(obs[1])])

    both = discounted_return("CartPole-v1", act, states, 0.9, agents=2)
    assert both.shape == (2, 5)
    np.testing.assert_allclose(both[0], discounted_return("CartPole-v1", sloppy, states, 0.9))
    np.testing.assert_allclose(both[1], discounted_return("CartPole-v1", always_left, states, 0.9))


@pytest.mark.parametrize("change", [
    {"obs": np.zeros(4)}, {"obs": np.zeros((0, 4))}, {"obs": np.zeros((2, 3))},
    {"obs": np.full((1, 4), np.nan)}, {"gamma": 1.5}, {"gamma": -0.1}, {"gamma": np.nan}, {"horizon": 0},
    {"env_id": "MountainCar-v0", "obs": np.zeros((1, 2))}], ids=str)
def test_truth_refuses(change):
    with pytest.raises(ValueError, match="expected|can be restored"):
        discounted_return(**dict(env_id="CartPole-v1", act=good, obs=np.zeros((1, 4)), gamma=0.9) | change)


# ---- run logs -----------------------------------------------------------------------------------------

@given(st.lists(st.tuples(st.integers(-10**12, 10**12), st.floats(-1e30, 1e30),
                          st.text("abc ,;'\"#[]é", min_size=1)), min_size=1, max_size=8),
       st.dictionaries(st.text("abc", min_size=1), st.integers() | st.text() | st.lists(st.floats(0, 1)),
                       min_size=1))
def test_run_log_round_trip(tmp_path_factory, rows, provenance):
    folder, old = tmp_path_factory.getbasetemp(), helpers.FIGS
    log = RunLog("word", "i", "x")
    for i, x, word in rows:
        log.add(i=i, x=x, word=word)
    try:
        helpers.FIGS = folder
        log.save("trip", **provenance)
        loaded = RunLog.load("trip")
    finally:
        helpers.FIGS = old
    assert loaded.columns == log.columns and len(loaded) == len(log)
    assert loaded["i"].tolist() == log["i"].tolist() and loaded["word"].tolist() == log["word"].tolist()
    np.testing.assert_allclose(loaded["x"], log["x"], rtol=1e-6)
    assert {k: loaded.provenance[k] for k in provenance} == provenance


def run_log():
    log = RunLog("seed", "step", "value")
    for seed in range(3):
        log.add(seed=seed, step=np.arange(4), value=np.arange(4) * 0.5 + seed)
    return log


def test_run_log_selects():
    log = run_log()
    assert len(log) == 12 and len(log.where(seed=1)) == 4 and len(log.where(seed=9)) == 0
    np.testing.assert_array_equal(log.where(seed=2, step=3)["value"], [3.5])
    x, y = log.seeds("step", "value")
    assert x.tolist() == [0, 1, 2, 3] and y.shape == (3, 4) and y[2, 1] == 2.5
    log.add(seed=0, step=9, value=0.0)
    with pytest.raises(ValueError, match="one curve value over step per seed"):
        log.seeds("step", "value")
    with pytest.raises(KeyError, match="'reward'"):
        log["reward"]
    with pytest.raises(KeyError, match="'reward'"):
        log.where(reward=1)


@pytest.mark.parametrize("row", [
    {"seed": 0, "step": 1}, {"seed": 0, "step": 1, "value": 2.0, "more": 3},
    {"seed": 0, "step": 1, "value": np.nan},
    {"seed": 0, "step": 1, "value": [1.0, np.inf]}, {"seed": [0, 1], "step": [0, 1, 2], "value": 1.0},
    {"seed": 0, "step": 0, "value": np.zeros((2, 2))}], ids=str)
def test_run_log_refuses_rows(row):
    log = run_log()
    with pytest.raises(ValueError):
        log.add(**row)
    assert len(log) == 12


def test_run_log_refuses_columns():
    for columns in ((), ("x", "x")):
        with pytest.raises(ValueError, match="columns: expected distinct names"):
            RunLog(*columns)


def test_run_log_needs_rows_and_provenance(figs):
    with pytest.raises(ValueError, match="expected rows and a provenance"):
        run_log().save("x")
    with pytest.raises(ValueError, match="expected rows and a provenance"):
        RunLog("x").save("x", seed=0)
    assert not list(figs.rglob("*.csv"))


def test_long_runs_are_not_overwritten(figs):
    run_log().save("long/x", seed=0)
    with pytest.raises(FileExistsError, match="is not overwritten"):
        run_log().save("long/x", seed=1)
    assert RunLog.load("long/x").provenance["seed"] == 0
    run_log().save("x", seed=0)
    run_log().save("x", seed=1)                              # short ones are


def test_long_runs_may_be_extended(figs):
    """A resumed run stores its curve again, with more rows; another run's rows are no extension."""
    first, longer, other = run_log(), run_log(), run_log()
    first.save("long/x", seed=0)
    longer.add(**{column: 9.0 for column in longer.columns})
    longer.save("long/x", seed=0)
    assert len(RunLog.load("long/x")) == len(longer) == len(first) + 1
    other.rows[0], other.rows[1] = other.rows[1], other.rows[0]
    other.rows += longer.rows
    for refused in (first, longer, other):
        with pytest.raises(FileExistsError, match="is not overwritten"):
            refused.save("long/x", seed=0)
    assert len(RunLog.load("long/x")) == len(longer)


def test_damaged_run_log_is_refused(figs):
    path = run_log().save("x", seed=0)
    content = path.read_text()
    for damaged in (content[:len(content) // 2], content.rsplit("\n", 2)[0], "", "a,b\n1,2\n",
                    content.replace("\n0,1,", "\n0,1,7,"), content.replace("# rows: 12", "# rows: twelve")):
        path.write_text(damaged)
        with pytest.raises(ValueError, match="x.csv: expected a run log"):
            RunLog.load("x")
    path.write_bytes(b"\x89PNG\xff\xfe\x00")
    with pytest.raises(ValueError, match="x.csv: expected a run log"):
        RunLog.load("x")
    with pytest.raises(FileNotFoundError, match="no figs/data/y.csv"):
        RunLog.load("y")


# ---- verdicts and pictures ----------------------------------------------------------------------------

def test_verdict_holds(capsys):
    helpers.verdict(("every seed returns", "> 200", np.array([True, True])), ("one", "= 1", True))
    assert capsys.readouterr().out == "every seed returns   > 200   OK\none                  = 1     OK\n"


@pytest.mark.parametrize("ok", [False, np.array([True, False]), np.array([1.0, np.nan]) > 0, np.nan > 0])
def test_verdict_fails(capsys, ok):
    with pytest.raises(AssertionError, match="second"):
        helpers.verdict(("first", "> 0", True), ("second", "> 0", ok), ("third", "> 0", True))
    assert re.findall(r"(\w+) +> 0 +(\w+)", capsys.readouterr().out) == [
        ("first", "OK"), ("second", "FAIL"), ("third", "OK")]


@pytest.mark.parametrize("ok", [np.zeros(0, dtype=bool), np.array([0.0, np.nan]), np.nan, None, 1, "yes"],
                         ids=repr)
def test_verdict_refuses_what_is_not_true_or_false(ok):
    with pytest.raises(ValueError, match="verdict: expected"):
        helpers.verdict(("claim", "> 0", ok))


def test_verdict_refuses_no_claims():
    with pytest.raises(ValueError, match="verdict: expected"):
        helpers.verdict()


def test_show(figs, monkeypatch):
    shown, alt = [], "A straight line that rises from the origin to one, drawn over two points."
    monkeypatch.setattr(helpers, "display", lambda data, **_: shown.append(data))
    fig, ax = plt.subplots()
    with pytest.raises(FileNotFoundError, match="save the numbers"):
        helpers.show(fig, "line", alt)
    run_log().save("line", seed=0)
    for bad in ("", "a line"):
        with pytest.raises(ValueError, match="alt: expected a sentence"):
            helpers.show(fig, "line", bad)
    assert not shown and not (figs / "line.png").exists()
    helpers.show(fig, "line", alt)
    assert shown[0]["text/plain"] == alt and shown[0]["image/png"] == (figs / "line.png").read_bytes()
    assert (figs / "line.png").read_bytes().startswith(b"\x89PNG")
    assert not plt.fignum_exists(fig.number)


def test_plot_seeds_draws_every_seed():
    helpers.use_style()
    fig, ax = plt.subplots()
    mean = helpers.plot_seeds(ax, np.arange(5), np.arange(15.0).reshape(3, 5), color="black")
    assert mean.get_ydata().tolist() == [5.0, 6, 7, 8, 9] and len(ax.lines) == 4
    assert [0.0, 1, 2, 3, 4] in [line.get_ydata().tolist() for line in ax.lines]
    with pytest.raises(ValueError, match="expected ys"):
        helpers.plot_seeds(ax, np.arange(4), np.zeros((3, 5)))
    plt.close(fig)


def curves():
    """A run log that plot_curves draws: two panels, two lines, three seeds."""
    log = RunLog("panel", "line", "seed", "x", "y")
    for panel in ("left", "right"):
        for line in ("BC", "CQL"):
            for seed in range(3):
                x = np.arange(4)
                log.add(panel=panel, line=line, seed=seed, x=x, y=x * (line == "CQL") + seed)
    panels = {"left": {"title": "Left", "ylim": [0, 9]}, "right": {"yscale": "symlog", "linthresh": 1}}
    look = {"panels": panels,
            "lines": {"BC": {"color": "blue", "linestyle": "--"}, "CQL": {"color": "green"}}}
    return log, look


def test_plot_curves(figs):
    log, look = curves()
    log.save("curves", **look)
    fig = helpers.plot_curves(RunLog.load("curves"))
    left, right = fig.axes
    assert left.get_title(loc="left") == "Left" and left.get_ylim() == (0, 9)
    assert right.get_yscale() == "symlog"
    for ax in fig.axes:
        assert len(ax.lines) == 8 and {text.get_text() for text in ax.texts} == {"BC", "CQL"}
    with pytest.raises(KeyError, match="CQL"):
        log.save("curves", **look | {"lines": {"BC": {"color": "blue"}}})
        helpers.plot_curves(RunLog.load("curves"))
    plt.close("all")


def test_labels_do_not_overlap():
    fig, ax = plt.subplots()
    heights = {"a": 1.0, "b": 1.001, "c": 1.002, "d": 0.0}
    lines = {name: ax.plot([0, 1], [0, y])[0] for name, y in heights.items()}
    helpers.label_ends(ax, lines)
    fig.canvas.draw()
    boxes = sorted(text.get_window_extent().y0 for text in ax.texts)
    assert len(boxes) == 4 and min(np.diff(boxes)) > 8
    plt.close(fig)


def test_python_helpers_redraws(figs):
    """Every csv of that form becomes a picture, without training; other tables are left alone."""
    log, look = curves()
    log.save("curves", **look)
    run_log().save("other", seed=0)
    subprocess.run([sys.executable, helpers.ROOT / "helpers.py"], check=True, cwd="/",
                   env=os.environ | {"CQL_FIGS": str(figs)})
    assert [p.name for p in figs.glob("*.png")] == ["curves.png"]


def test_no_network_loss_or_update():
    """helpers.py is plumbing: what is taught stands in the notebooks."""
    source = (helpers.ROOT / "helpers.py").read_text()
    for word in ("torch.nn", "nn.", ".backward(", "torch.optim", "requires_grad"):
        assert word not in source
