"""Notebook 03's own functions in a small world whose values are known; and the whole of it, tiny.

The small world is its crossing: collect, train, evaluate, table and picture, end to end.
"""

import time
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient

import helpers

(PATH,) = (Path(__file__).resolve().parent.parent / "notebooks").glob("03_*.ipynb")
SMALL = {"N_SEEDS": 2, "GRID_ALPHAS": (0.003, 3.0), "GRID_STEPS": 2500}
TINY = {"STEPS": 200, "N_SEEDS": 2, "ALPHAS": (0.0, 1.0), "DATA_SIZE": 2000}
TINY |= {"GRID_STEPS": 200, "LONG_STEPS": 400}


def tagged(cell, *tags):
    return set(tags) & set(cell["metadata"].get("tags", []))


def slowness():
    """Processor time of small networks and CartPole steps, in units of the machine of the bound."""
    net = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.Linear(64, 2))
    env, begin = gym.make("CartPole-v1"), time.process_time()
    for step in range(3000):
        net(torch.ones(10, 4))
        if step % 10 == 0:
            env.reset(seed=0)
        env.step(step % 2)
    return (time.process_time() - begin) / 3000 / 50e-6  # 50 us there for the two


def test_tiny_parameters(tmp_path, monkeypatch):
    """The notebook runs to its end, without its verdicts: a minute, longer on slower machines."""
    monkeypatch.setenv("CQL_FIGS", str(tmp_path))
    book = nbformat.read(PATH, as_version=4)
    book.cells = [cell for cell in book.cells if not tagged(cell, "nbval-check-output")]
    for cell in book.cells:
        if tagged(cell, "parameters"):
            cell.source += f"\nglobals().update({TINY})"
    book.cells.append(nbformat.v4.new_code_cell("import time; print(time.process_time())"))
    folder = {"metadata": {"path": str(PATH.parent)}}
    NotebookClient(book, timeout=600, resources=folder).execute()
    assert float(book.cells[-1].outputs[0].text) < 60 * max(1, slowness())


@pytest.fixture(scope="module")
def world():
    names = {}
    for cell in nbformat.read(PATH, as_version=4).cells:
        if tagged(cell, "parameters", "export", "reuse"):
            exec(cell.source, names)
            names |= {name: value for name, value in SMALL.items() if name in names}
    return SimpleNamespace(**names)


def test_recorded_walks_obey_the_world(world):
    data = world.crossing_data(0)
    before, after = ((x.numpy() * 4 + 4).round() for x in (data.obs, data.next_obs))
    asked = np.clip(before + world.Crossing.moves[data.action.numpy()], 0, 8)
    open_cell = (asked == 4).any(1, keepdims=True)
    assert (after == np.where(open_cell, asked, before)).all()
    goal = (after == [4, 8]).all(1)
    assert (data.reward.numpy() == goal).all() and (data.terminated.numpy() == goal).all()
    lengths = [rows.stop - rows.start for rows, whole in data.episodes() if whole]
    assert max(lengths) == 12 and data.truncated.any()
    assert set(data.episode_returns()) == {0.0, 1.0}


def test_truth_of_known_policies(world):
    here = {tuple(cell): i for i, cell in enumerate(world.cells)}
    best, east = np.ones(17, dtype=int), np.ones(17, dtype=int)
    best[[here[4, y] for y in range(4, 8)]] = 0  # north from the crossing on
    assert world.exact(best)[world.start] == pytest.approx(0.95**7)
    assert world.exact(east)[world.start] == 0
    for policy, arrives in ((best, 1.0), (east, 0.0)):

        def act(obs, policy=policy):
            found = [here[tuple(cell)] for cell in (obs * 4 + 4).round().int().tolist()]
            return policy[found]

        assert helpers.evaluate("FromTheWest-v0", act, seeds=[0, 1]).tolist() == [arrives] * 2


def test_from_data_to_picture(world, tmp_path, monkeypatch):
    monkeypatch.setattr(helpers, "FIGS", tmp_path)
    table = world.stitch([world.crossing_data(seed) for seed in world.SEEDS])
    stored = helpers.save_table(table, "03_stitching", source="test")
    assert stored.attrs["rows"] == len(table) == 2 * 2 * 10
    late = helpers.late_mean(stored, "prediction", "alpha_cql")
    truth = helpers.late_mean(stored, "truth", "alpha_cql")
    assert truth[0.003] == pytest.approx(0.95**7, abs=1e-6) and truth[3.0] == 0
    assert late[0.003] == pytest.approx(0.95**7, abs=0.1) and late[3.0] > 2
    ax, small = plt.subplots()[1], table[table["alpha_cql"] == 0.003]
    line = helpers.plot_seeds(ax, small, "step", "prediction", label="prediction")
    assert np.allclose(line.get_ydata(), small.groupby("step")["prediction"].mean())
    helpers.label_ends(ax)
    alt = "Prediction over gradient steps in a world with known values."
    helpers.show(ax.figure, "03_stitching", alt)
    assert (tmp_path / "03_stitching.png").read_bytes().startswith(b"\x89PNG")
