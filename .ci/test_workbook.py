"""The workbook: a cell tagged `check` fails while the function is missing, passes with it."""

import copy
import json
from pathlib import Path

import hygiene
import pytest
import workbook
from fakes import code, markdown, printed
from nbformat.v4 import new_notebook

ROOT = Path(__file__).resolve().parent.parent
BOOKS = {p.name: json.loads(p.read_text("utf-8")) for p in (ROOT / "notebooks").glob("*.ipynb")}
BEFORE = {"twin:setup", "parameters", "export"}


LINKS = "[a]({0}01_one.ipynb) [b](../figs/c.png) [d](#e) [f](https://x.org) <img src='{0}g.png'>"
TWO = 'def log(x, *, base=base):\n    """Of x."""\n{}\n\n\ndef plus(\n    x,\n):\n{}'
ERROR = '    raise NotImplementedError("{}: write this function, then run the next cell")'
LOG = "    # by hand\n\n    def f(y):\n        return math.log(y)\n\n    return f(x) / f(base)"
PLUS = "    # the comment goes, too\n    return x + 1"
CHECK = 'assert log(base) == 1, "log(base) is 1"\nassert plus(1) == 2'
FAKE = new_notebook(
    cells=[
        code("import math", "export", printed("1")),
        code("raise OSError('training takes hours')"),
        code("from math import e\nbase = e"),
        markdown(LINKS.format("")),
        code(TWO.format(LOG, PLUS), "export exercise"),
        code(CHECK, "check"),
    ]
)


def cells_run(book, exercise):
    """Imports, parameters and exports above cell `exercise`, that cell, and its check."""
    cells = [c for c in book["cells"][:exercise] if c["cell_type"] == "code"]
    for cell in cells:
        source = "".join(cell["source"])
        if BEFORE & set(cell["metadata"].get("tags", [])) or source.startswith(("import", "from")):
            yield source
    for cell in [c for c in book["cells"][exercise:] if c["cell_type"] == "code"][:2]:
        yield "".join(cell["source"])


def run(sources):
    names = {"__name__": "exercise"}
    for source in sources:
        exec(compile(source, "cell", "exec"), names)


EXERCISES = [
    pytest.param(book, i, id=f"{name[:2]}, cell {i + 1}")
    for name, book in {"fake": FAKE, **BOOKS}.items()
    for i, cell in enumerate(book["cells"])
    if "exercise" in cell["metadata"].get("tags", [])
]


@pytest.mark.parametrize("book, i", EXERCISES)
def test_check_cell_tells_right_from_missing(book, i, monkeypatch):
    monkeypatch.chdir(ROOT / "notebooks")
    run(cells_run(book, i))
    missing = copy.deepcopy(book)
    missing["cells"][i] = workbook.workbook(copy.deepcopy(book))["cells"][i]
    with pytest.raises(NotImplementedError, match=r"^\w+: write this function, then run the next"):
        run(cells_run(missing, i))


def test_what_is_left_of_a_notebook():
    book = workbook.workbook(copy.deepcopy(FAKE))
    assert book["cells"][4]["source"] == TWO.format(ERROR.format("log"), ERROR.format("plus"))
    assert book["cells"][3]["source"] == LINKS.format("../notebooks/")
    assert all(cell.get("outputs", []) == [] for cell in book["cells"])


@pytest.mark.parametrize("name", BOOKS)
def test_links_work_from_the_workbook(name):
    book = workbook.workbook(copy.deepcopy(BOOKS[name]))
    for cell in book["cells"]:
        if cell["cell_type"] == "markdown":
            path = ROOT / "workbook" / name
            complaints = hygiene.check_markdown(cell["source"], path, ROOT)
            assert not [c for c in complaints if "leads nowhere: #" not in c]


def test_write(tmp_path):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks/07_seven.ipynb").write_text(json.dumps(FAKE))
    path = workbook.write("07", tmp_path)
    assert path == tmp_path / "workbook/07_seven.ipynb"
    assert json.loads(path.read_text()) == workbook.workbook(copy.deepcopy(FAKE))
