"""pytest plugin: notebooks draw into a temporary folder, so that a run leaves the repository as it was."""
import os
import shutil
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path(tempfile.mkdtemp(prefix="figs-"))


def pytest_configure(config):
    stored = ROOT / "figs" / "data" / "long"          # curves of long runs are read, never redrawn
    if stored.exists():
        shutil.copytree(stored, FOLDER / "data" / "long")
    os.environ["CQL_FIGS"] = str(FOLDER)              # the kernels inherit it; helpers.FIGS reads it


def pytest_unconfigure(config):
    shutil.rmtree(FOLDER, ignore_errors=True)
