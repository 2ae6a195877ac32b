"""The plugin: what a masked comparison refuses, and a run of small notebooks on two cores."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from fakes import code
from nbclient import NotebookClient
from nbformat.v4 import new_notebook
from notebooks_plugin import mask, place, unlike

ROOT = Path(__file__).resolve().parent.parent
TABLE = "step   return\n   0   -12.5\n 100 1,030.0  (3 % of 1e6)\nq1 on x86_64: nan, inf"


def test_other_numbers_are_equal():
    assert mask("step return\n0 8\n9000 .5 (12% of 3.5e-7)\nq1 on x86_64: 1.5, -2") == mask(TABLE)
    wide = "step      return\n    3     nan\n    1    +inf  (0.1 % of 2)\nq1 on x86_64: 0, -inf"
    assert mask(wide) == mask(TABLE) and mask(None) is None


WORDS = [("return", "returns"), ("step   return", "return   step"), ("   0   -12.5\n", "")]
WORDS += [("\n 100", " 100"), ("1,030.0", "1,030.0 7"), ("3 % of", "3 of them, % of")]
WORDS += [("q1", "q2"), (": nan", " nan"), ("inf", "info"), (TABLE, "")]


@pytest.mark.parametrize("old, new", WORDS)
def test_other_words_are_refused(old, new):
    assert old in TABLE and mask(TABLE.replace(old, new)) != mask(TABLE)


def test_html_tables():
    row = '<tr style="text-align: right;">\n  <td>{}</td><td>{}</td></tr>'
    assert mask(row.format(1.5, -3)) == mask(row.format("nan", "1,000.25"))
    assert mask(row.format(1.5, -3)) != mask(row.format(1.5, "three"))


# ---- runs of pytest on small notebooks ----------------------------------------------------------
NOISE = 'import random\nprint(f"about {random.random():.3f} minutes")'
SUMMARY = "import time\nfrom helpers import run_summary\nrun_summary(time.perf_counter())"
PID = 'import os, pathlib\n_ = pathlib.Path(f"{os.getpid()}.pid").write_text("")'
DRAW = """import os, pathlib
data = pathlib.Path(os.environ["CQL_FIGS"]) / "data"
data.mkdir(parents=True, exist_ok=True)
_ = (data / "x.csv").write_text("# rows: 1\\na,b\\n1,2\\n")"""


@pytest.fixture
def repo(tmp_path, monkeypatch):
    """A folder for small notebooks, in which pytest runs as it does here."""
    shutil.copy(ROOT / ".pytest.ini", tmp_path)
    for folder in (".ci", "notebooks/solutions", "figs/data/long"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "figs/data/long/run.csv").write_text("a\n1\n")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / '.ci'}")
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    monkeypatch.setenv("CQL_FIGS", str(tmp_path / "figs"))
    return tmp_path


def write(repo, name, *sources, tags="numbers-vary"):
    """Run a notebook and store it."""
    book = new_notebook(cells=[code(source, tags) for source in sources])
    NotebookClient(book, resources={"metadata": {"path": str(repo / "notebooks")}}).execute()
    nbformat.write(book, repo / f"notebooks/{name}.ipynb")


def run(repo, *arguments):
    """The exit status of pytest, and what it says."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "CQL"))}
    command = [sys.executable, "-m", "pytest", "-q", "--color=no", *arguments]
    options = {"cwd": repo, "env": clean | {"TMPDIR": str(repo)}, "text": True}
    done = subprocess.run(command, capture_output=True, **options)
    return done.returncode, done.stdout + done.stderr


def edit(repo, name, old, new):
    path = repo / f"notebooks/{name}.ipynb"
    text = path.read_text("utf-8")
    assert old in text
    path.write_text(text.replace(old, new), "utf-8")


def test_numbers_may_differ_and_words_may_not(repo):
    """Finding C7: an output that the present source could not have printed."""
    write(repo, "01_one", NOISE, SUMMARY)
    status, said = run(repo, "notebooks/01_one.ipynb", "-n", "0")
    assert status == 0, said
    edit(repo, "01_one", '(f\\"about', '(f\\"beside')
    status, said = run(repo, "notebooks/01_one.ipynb", "-n", "0")
    assert status == 1 and "beside#minutes" in said, said
    assert "2 failed" in said, "the fingerprint of the cells run differs, too"


def test_two_cores(repo):
    """A notebook in one worker, failures reported, kernels and folders gone."""
    write(repo, "A1_short", PID, "x = 1", "print(x)", tags="")
    write(repo, "04_long", PID, "import time; time.sleep(1)", "print(1 + 1)", DRAW, tags="")
    write(repo, "solutions/04_solutions", PID)
    for pid in repo.glob("notebooks/**/*.pid"):
        pid.unlink()
    (repo / "figs/data/y.csv").write_text("# rows: 1\na\n1\n")
    status, said = run(repo, "-vv")
    assert status == 1 and "8 passed" in said, said
    assert said.count("figs/") == 1 and "figs/data/y.csv: written by no notebook" in said, said
    ran = set(re.findall(r"\[(gw\d)\].* PASSED (\S+)::", said))
    assert len(ran) == 3 and len({worker for worker, _ in ran}) == 2, ran
    processes = [int(p.stem) for p in repo.glob("notebooks/**/*.pid")]
    assert len(processes) == 3
    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
    assert not list(repo.glob("figs-*"))

    edit(repo, "A1_short", "print(x)", "print(x + 1)")
    status, said = run(repo)
    assert status == 1 and "1 failed, 7 passed" in said and "Cell outputs differ" in said, said
    assert "written by no" not in said, "only a run in which all cells pass is a full one"


def test_longest_first():
    names = ".ci/test_a.py notebooks/01_a.ipynb notebooks/02_b.ipynb notebooks/04_c.ipynb"
    paths = map(Path, [*names.split(), "notebooks/solutions/04_d.ipynb"])
    items = sorted((SimpleNamespace(path=path) for path in paths), key=place)
    assert [item.path.stem for item in items] == ["04_c", "01_a", "02_b", "04_d", "test_a"]


def test_tables_of_another_form(tmp_path):
    for folder, text in (("stored", "# seed: 0\na,b\n1,2\n"), ("drawn", "# seed: 1\na,b\n3,4\n")):
        (tmp_path / folder).mkdir()
        for name in ("same", "rows", "columns"):
            (tmp_path / folder / f"{name}.csv").write_text(text)
    (tmp_path / "drawn/rows.csv").write_text("# seed: 1\na,b\n3,4\n5,6\n")
    (tmp_path / "drawn/columns.csv").write_text("# seed: 1\na,c\n3,4\n")
    (tmp_path / "stored/schematic_loop.svg").write_text("<svg/>")
    complaints = list(unlike(tmp_path / "stored", tmp_path / "drawn"))
    assert [line.split(":")[0] for line in complaints] == ["columns.csv", "rows.csv"], complaints
