"""The set-up itself: what pytest collects, what a run leaves behind, what README and .ci/run promise."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def code_cells(path):
    return [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]


def test_all_kinds_are_collected():
    """A bare `pytest` finds every code cell, every test file here, and the doctests."""
    output = subprocess.run([sys.executable, "-m", "pytest", "--collect-only", "-q"], cwd=ROOT,
                            capture_output=True, text=True).stdout
    assert NOTEBOOKS
    for path in NOTEBOOKS:
        found = len(re.findall(rf"^notebooks/{re.escape(path.name)}::", output, re.M))
        assert found == len(code_cells(path)) > 0, path.name
    for path in (ROOT / ".ci").glob("test_*.py"):
        assert f"\n.ci/{path.name}::" in output, path.name
    assert "\n.ci/test_doctests.py::test_doctests" in output


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_notebook_is_valid(path):
    nbformat.validate(nbformat.read(path, as_version=4))


def test_figures_are_rewritten(request):
    """Notebooks run before this file: each picture and table of figs/ was made again, of the same form."""
    ran = sum(item.path.suffix == ".ipynb" for item in request.session.items)
    if ran != sum(len(code_cells(path)) for path in NOTEBOOKS):
        pytest.skip("not all notebooks ran")
    figs, again = ROOT / "figs", Path(os.environ["CQL_FIGS"])
    stored = [p for p in figs.rglob("*") if p.is_file() and p.parent.name != "long"]
    assert stored
    names = [str(p.relative_to(figs)) for p in stored]
    assert not [name for name in names if not (again / name).exists()], "written by no notebook"
    changed = [name for name in names if name.endswith(".csv") and form(again / name) != form(figs / name)]
    assert not changed, "other columns or another number of rows than stored"


def form(table):
    """Column names and number of rows."""
    lines = [line for line in table.read_text().splitlines() if not line.startswith("# ")]
    return lines[0], len(lines)


def test_readme_holds_the_command_of_run():
    command = (ROOT / ".ci" / "run").read_text().splitlines()[-1]
    assert command.startswith("python3 -m venv .venv && ") and command.endswith("/pytest")
    assert command in (ROOT / "README.md").read_text().splitlines()


def test_everything_is_pinned():
    for name in ("requirements.txt", ".ci/requirements.txt"):
        for line in (ROOT / name).read_text().splitlines():
            line = line.partition("#")[0].strip()
            assert not line or line.startswith("-r") or re.fullmatch(r"[\w.\[\]-]+==[\w.]+", line), line
