"""The set-up itself: form of all code, what is stored, what README and .ci/run promise."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("**/*.ipynb"))


@pytest.mark.parametrize("command", ["check", "format --check"])
def test_ruff(command):
    """Code of notebooks included; lines of at most 100 characters."""
    command = f"-m ruff {command} --no-cache --output-format concise helpers.py .ci notebooks"
    command = [sys.executable, *command.split()]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_notebook_is_valid(path):
    nbformat.validate(nbformat.read(path, as_version=4))


def test_python_helpers_redraws(tmp_path):
    """The sweep's figures, to the pixel, from their tables alone; no other file changes."""
    figs, copy = ROOT / "figs", tmp_path / "figs"
    shutil.copytree(figs, copy)
    for name in ("CQL_alpha_reward.png", "CQL_q_value.png"):
        (copy / name).unlink()
    command, env = [sys.executable, ROOT / "helpers.py"], os.environ | {"CQL_FIGS": str(copy)}
    subprocess.run(command, check=True, cwd="/", env=env, timeout=60)
    stored = {p.relative_to(figs): p for p in figs.rglob("*") if p.is_file()}
    assert stored.keys() == {p.relative_to(copy) for p in copy.rglob("*") if p.is_file()}
    for name, path in stored.items():
        if (copy / name).read_bytes() != path.read_bytes():
            assert np.array_equal(plt.imread(copy / name), plt.imread(path)), name


def test_readme_holds_the_command_of_run():
    command = (ROOT / ".ci" / "run").read_text("utf-8").splitlines()[-1]
    assert command.startswith("python3 -m venv .venv && ") and command.endswith("/pytest")
    assert command in (ROOT / "README.md").read_text("utf-8").splitlines()


def test_everything_is_pinned():
    for name in ("requirements.txt", ".ci/requirements.txt"):
        for line in (ROOT / name).read_text("utf-8").splitlines():
            line = line.partition("#")[0].strip()
            assert not line or re.fullmatch(r"-r .+|[\w.\[\]-]+==[\w.]+", line), line
