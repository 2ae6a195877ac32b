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
from nbclient import NotebookClient
from notebooks_plugin import mask, place, unlike

ROOT = Path(__file__).resolve().parent.parent
TABLE = "step   return\n   0   -12.5\n 100 1,030.0  (3 % of 1e6)\nq1 on x86_64: nan, inf"


@pytest.mark.parametrize(
    "other",
    [
        "step return\n0 8\n9000 .5 (12% of 3.5e-7)\nq1 on x86_64: 1.5, -2",
        "step      return\n    3     nan\n    1    +inf  (0.1 % of 2)\nq1 on x86_64: 0, -inf",
    ],
)
def test_other_numbers_are_equal(other):
    assert mask(other) == mask(TABLE) and mask(None) is None


@pytest.mark.parametrize(
    "old, new",
    [
        ("return", "returns"),
        ("step   return", "return   step"),
        ("   0   -12.5\n", ""),
        ("\n 100", " 100"),
        ("1,030.0", "1,030.0 7"),
        ("3 % of", "3 of them, % of"),
        ("q1", "q2"),
        (": nan", " nan"),
        ("inf", "info"),
        (TABLE, ""),
    ],
)
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
def repo(tmp_path):
    """write(name, *sources) runs a notebook and stores it; run(...) is pytest in that folder."""
    shutil.copy(ROOT / ".pytest.ini", tmp_path)
    for folder in (".ci", "notebooks/solutions", "figs/data/long"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "figs/data/long/run.csv").write_text("a\n1\n")
    path = os.pathsep.join([str(ROOT), str(ROOT / ".ci")])
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "CQL"))}
    clean |= {"PYTHONPATH": path, "JUPYTER_PLATFORM_DIRS": "1", "TMPDIR": str(tmp_path)}

    class Repo:
        root = tmp_path

        def write(self, name, *cells):
            cells = [
                (source, ["numbers-vary"]) if isinstance(source, str) else source
                for source in cells
            ]
            book = nbformat.v4.new_notebook(
                cells=[nbformat.v4.new_code_cell(s, metadata={"tags": t}) for s, t in cells]
            )
            folder = {"path": str(tmp_path / "notebooks")}
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("CQL_FIGS", str(tmp_path / "figs"))
                patch.setenv("PYTHONPATH", path)
                NotebookClient(book, resources={"metadata": folder}).execute()
            self.save(name, book)
            return book

        def save(self, name, book):
            nbformat.write(book, tmp_path / "notebooks" / f"{name}.ipynb")

        def run(self, *arguments):
            command = [sys.executable, "-m", "pytest", "-q", "--color=no", *arguments]
            done = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True)
            return done.returncode, done.stdout + done.stderr

    return Repo()


def test_numbers_may_differ_and_words_may_not(repo):
    """Finding C7: an output that the present source could not have printed."""
    book = repo.write("01_one", NOISE, SUMMARY)
    assert book.cells[0].outputs[0].text != "about 0.5 minutes\n"
    status, said = repo.run("notebooks/01_one.ipynb", "-n", "0")
    assert status == 0, said
    book.cells[0].source = NOISE.replace("about", "beside")
    repo.save("01_one", book)
    status, said = repo.run("notebooks/01_one.ipynb", "-n", "0")
    assert status == 1 and "beside#minutes" in said, said
    assert "2 failed" in said, "the fingerprint of the cells run differs, too"


def test_two_cores(repo):
    """A notebook in one worker, failures reported, kernels and folders gone."""
    repo.write("A1_short", PID, ("x = 1", []), ("print(x)", []))
    repo.write("04_long", PID, ("import time; time.sleep(1)", []), ("print(1 + 1)", []), DRAW)
    repo.write("solutions/04_solutions", PID)
    for pid in repo.root.glob("notebooks/**/*.pid"):
        pid.unlink()
    (repo.root / "figs/data/y.csv").write_text("# rows: 1\na\n1\n")
    status, said = repo.run("-vv")
    assert status == 1 and "8 passed" in said, said
    assert said.count("figs/") == 1 and "figs/data/y.csv: written by no notebook" in said, said
    ran = set(re.findall(r"\[(gw\d)\].* PASSED (\S+)::", said))
    assert len(ran) == 3 and len({worker for worker, _ in ran}) == 2, ran
    processes = [int(p.stem) for p in repo.root.glob("notebooks/**/*.pid")]
    assert len(processes) == 3
    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
    assert not list(repo.root.glob("figs-*"))

    path = repo.root / "notebooks/A1_short.ipynb"
    path.write_text(path.read_text().replace("print(x)", "print(x + 1)"))
    status, said = repo.run()
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
