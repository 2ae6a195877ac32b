"""hygiene.py passes this repository and a minimal good one, and refuses each way to spoil it."""

import base64
import json
from pathlib import Path

import hygiene
import pytest
from fakes import code, markdown, printed

from helpers import fingerprint

ROOT = Path(__file__).resolve().parent.parent
ALT = "Two curves over ten steps: the predicted value climbs, the truth stays where it was."
FIRST = """# {0} · Title\n
**Question.** Why?\n\n**Answer.** So.\n\n**You will be able to**\n\n* see\n
**You need.** [helpers](../helpers.py)\n\n**Time.** 1 minute\n\n
![{1}](../figs/schematic_loop.svg)"""
LAST = "## Exercises\n\n## Takeaways and limits\n\n## Reading\n\n**Next.** [the end](#Reading)"
SAID = printed("one is one   = 1   OK\n")
BADGE = "[![All tests pass](https://x.org/badge.svg)](notebooks/01_one.ipynb#Verdict)"
NO_LINKS = "```python\n## 7. no\nx = a[0](missing.md)\n```\n[w](https://x.org/home)"
PNG = b"\x89PNG\r\n\x1a\nand so on"


def picture(alt=ALT, png=PNG):
    data = {"image/png": base64.b64encode(png).decode(), "text/plain": alt}
    return {"output_type": "display_data", "metadata": {}, "data": data}


def notebook(number):
    equation = f"{number.removeprefix('0')}.1"
    cells = [
        markdown(FIRST.format(number, ALT)),
        code("import sys\n\nstarted = 0", "twin:setup"),
        code("steps = 10", "parameters"),
        markdown("### Symbols\n\n| symbol | meaning |\n|---|---|\n| q | value |"),
        markdown(f"## 1. One\n\n$$q = r \\tag{{{equation}}}$$"),
        code("def actor(obs):\n    return obs", "export exercise twin:actor"),
        code("assert actor(1) == 1", "check"),
        code(f"q = r = 1.0  # ({equation})\nax.plot([q], alpha=0.5)", "numbers-vary"),
        code(f'show(fig, "{number}_curve", "{ALT}")', "", picture()),
        markdown("## Verdict"),
        code('verdict(("one is one", "= 1", q == r))', "nbval-check-output", SAID),
        markdown(LAST),
        code("run_summary(started)", "numbers-vary"),
    ]
    return {"nbformat": 4, "metadata": {"kernelspec": {"name": "python3"}}, "cells": cells}


class Repository:
    """A minimal good repository on disk; each spoiler changes one thing in it."""

    def __init__(self, root):
        self.root, self.books = root, {"01_one": notebook("01"), "A1_two": notebook("A1")}
        self.book, self.cells = self.books["01_one"], self.books["01_one"]["cells"]
        for number in ("01", "A1"):
            self.file(f"figs/{number}_curve.png", PNG)
            self.file(f"figs/data/{number}_curve.csv", "# seed: 0\n# rows: 1\nx,y\n0,1\n")
            cells = [code("import sys\n\nstarted = 0", "twin:setup"), code("run_summary(started)")]
            self.books[f"solutions/{number}_solutions"] = notebook(number) | {"cells": cells}
        self.file("README.md", BADGE)
        self.file("helpers.py", "def show(fig, name, alt):\n    pass\n")
        for name in ("requirements.txt", "LICENSE", "figs/schematic_loop.svg"):
            self.file(name, "words")
        self.file("notebooks/policies/weak.npz", "weights")
        digest = "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c"
        self.file(".ci/checksums.txt", f"{digest}  notebooks/policies/weak.npz\n")
        self.run()

    def file(self, name, content):
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    def run(self):
        """Execution counts, and the fingerprint of the cells that are run."""
        for book in self.books.values():
            cells = [c for c in book["cells"] if c["cell_type"] == "code" and c["source"].strip()]
            for n, cell in enumerate(cells, 1):
                cell["execution_count"] = n
            letters = fingerprint(cell["source"] for cell in cells)
            cells[-1]["outputs"] = [printed(f"Python 3\ncells run: {letters}\n")]

    def refusals(self):
        for name, book in self.books.items():
            self.file(f"notebooks/{name}.ipynb", json.dumps(book))
        return hygiene.check(self.root)


@pytest.fixture
def repo(tmp_path):
    return Repository(tmp_path)


def test_this_repository_passes():
    assert hygiene.check(ROOT) == []


# ---- what is done to a repository: a function of it ---------------------------------------------
def change(i, **what):
    """Another source, other outputs or metadata of cell i; nothing is run again."""
    return lambda r: r.cells[i].update(what)


def rerun(i, source):
    return lambda r: (r.cells[i].update(source=source), r.run())


def out(i, output):
    return lambda r: r.cells[i]["outputs"].append(output)


def add(source, tags="", *outputs, times=1):
    """More code cells before the last one, and a run."""
    new = [code(source, tags, *outputs) for _ in range(times)]
    return lambda r: (r.cells.__setitem__(slice(-1, -1), new), r.run())


def say(source, i=4):
    return lambda r: r.cells.insert(i, markdown(source))


def swap(i, old, new):
    return lambda r: (r.cells[i].update(source=r.cells[i]["source"].replace(old, new)), r.run())


def tag(i, tags):
    return lambda r: r.cells[i]["metadata"].update(tags=tags.split())


def file(name, content=None):
    return lambda r: (r.root / name).unlink() if content is None else r.file(name, content)


def claim(ok):
    return rerun(10, f'verdict(("one is one", "= 1", {ok}))')


def test_minimal_repository_passes(repo):
    assert repo.refusals() == []
    add("# alpha, NBVAL and /usr/bin may be spoken of\nx = 0.5")(repo)
    add("%matplotlib inline\nax.plot(x, alpha=x)")(repo)
    repo.cells.insert(-1, code(""))  # an empty cell has no execution count
    say(f"`[no](link)`, $q[s](a)$\n{NO_LINKS}")(repo)
    assert repo.refusals() == []


WIDGET = {"output_type": "display_data", "data": {"application/vnd.jupyter.widget-view+json": {}}}
FIGURE = "<Figure size 640x480 with 1 Axes and quite some text behind it>"
STALE = "other cells were run than stand here now"
TWO = [printed("a   = 1   OK\nb   = 1   FAIL\n")]
SPOILERS = [  # the message, what is done to the repository
    ("execution_count is None", change(2, execution_count=None)),
    ("execution_count is 9, not 2", change(2, execution_count=9)),
    ("stored stderr", out(2, printed("UserWarning", "stderr"))),
    ("stored error ValueError", out(2, {"output_type": "error", "ename": "ValueError"})),
    ("stored widget", out(2, WIDGET)),
    ("widget state", lambda r: r.book["metadata"].update(widgets={"state": {}})),
    ("kernelspec is not python3", lambda r: r.book["metadata"].update(kernelspec={"name": "x"})),
    ("1.6 MB, more than 1.5", say("x" * 1_600_000)),
    (STALE, change(2, source="steps = 11")),
    (STALE, change(6, source="assert actor(1) == 1  # a comment")),
    (STALE, lambda r: r.cells.insert(2, r.cells.pop(7))),
    (STALE, change(12, outputs=[printed("cells run: abcdefgh\n")])),
    ("is not run_summary(started) alone", rerun(12, "x = 1\nrun_summary(started)")),
    ("unknown tag 'nbval-skip'", tag(7, "nbval-skip")),
    ("unknown tag 'nbval-ignore-output'", tag(7, "nbval-ignore-output")),
    ("unknown tag 'raises-exception'", tag(7, "raises-exception")),
    ("tag 'export' on a cell that is not code", tag(0, "export")),
    ("to the letter, and with its numbers masked", tag(10, "nbval-check-output numbers-vary")),
    ("on 2 cells", add("x = 1", "parameters")),
    ("nbval comment", add("# NBVAL_IGNORE_OUTPUT\nprint(1)")),
    ("a raw cell", change(7, cell_type="raw")),
    ("41 lines", add("x = 1\n" * 41)),
    ("does not parse", add("x = (")),
    ("first code cell is not tagged twin:setup", tag(1, "")),
    ("an exercise that is no export", tag(5, "exercise twin:actor")),
    ("next code cell is not tagged check", tag(6, "")),
    ("bare name alpha in line 2", add("x = 1\nalpha = 2")),
    ("bare name alpha", add("def loss(q, alpha):\n    return q")),
    ("helpers.py: bare name alpha", file("helpers.py", "alpha = 1")),
    ("an export cell imports helpers", add("from helpers import show", "export")),
    ("no verdict", rerun(10, "print('one is one')")),
    ("without the tag nbval-check-output", tag(10, "")),
    ("do not end in OK", change(10, outputs=TWO)),
    ("do not end in OK", change(10, outputs=[])),
    ("is a constant", claim("True")),
    ("is a constant", claim("np.ones(3) > 0")),
    ("holds either way", claim("q == r or not q == r")),
    ("holds either way", claim("np.all((q > r) | ~(q > r))")),
    ("asks for any", claim("(q == r).any()")),
    ("compares a thing with itself", claim("q >= q")),
    ("without a claim written as", rerun(10, "claims = judge(q)\nverdict(*claims)")),
    ("is a constant", rerun(10, 'verdict(*[(f"{x}", "= 1", 1 > 0) for x in q])')),
    ("picture without alt text", change(8, outputs=[picture(FIGURE)])),
    ("0 pictures stored, 1 calls", change(8, outputs=[])),
    ("is no PNG", change(8, outputs=[picture(png=b"GIF89a")])),
    ("is not figs/01_curve.png", change(8, outputs=[picture(png=PNG + b"!")])),
    ("is not figs/01_curve.png", file("figs/01_curve.png", PNG + b"!")),
    ("a name that is not written out", rerun(8, f'show(fig, name, "{ALT}")')),
    ("alt text of ../figs/01_curve.png", say("![](../figs/01_curve.png)")),
    ("fewer than 40", say("![E[Q] grows](../figs/01_curve.png)")),
    ("fewer than 40", say('<img src="../figs/01_curve.png" alt="short">')),
    ("(1.2) is cited by no comment", say(r"$$q \tag{1.2}$$")),
    ("the code cites (1.7)", add("x = 1  # as in (1.1, 1.7)")),
    ("tag 1.1 used twice", say(r"$$q \tag{1.1}$$")),
    ("tag 2.1 does not begin with 1.", say(r"$$q \tag{2.1}$$")),
    ("(1.1) is cited by no comment", rerun(7, '"# (1.1)"')),
    ("twin:actor differs from its twin in 01_one", rerun(5, "def actor(obs):\n    return 2 * obs")),
    ("twin:setup differs from its twin in 01_one", rerun(1, "started = 0")),
    ("twin:critic has no twin", add("x = 1", "twin:critic")),
    ("defines what twin:actor defines", tag(5, "export exercise")),
    ("figs/data/01_curve.csv is missing", file("figs/data/01_curve.csv")),
    ("no notebook names this figure in show()", file("figs/01_old.png", PNG)),
    ("no text shows this picture", file("figs/01_old.gif", "x")),
    ("no text shows this picture", file("figs/schematic_old.svg", "x")),
    ("a figure is named NN_what", file("figs/cql_old.png", PNG)),
    ("without a provenance header", file("figs/data/01_curve.csv", "# rows: 1\nx,y\n0,1\n")),
    ("01_curve.csv: path of one", file("figs/data/01_curve.csv", "# at: /work/x\n# b: 0\n")),
    ("weak.npz: not the file whose sum", file("notebooks/policies/weak.npz", "stronger")),
    ("weak.npz: not the file whose sum", file("notebooks/policies/weak.npz")),
    ("a.csv: not the file whose sum", file("figs/data/long/a.csv", "# a: 0\n# rows: 0\n")),
    ("weak.npz: not the file whose sum", file(".ci/checksums.txt")),
    ("link leads nowhere: 09_nine.ipynb", say("[next](09_nine.ipynb)")),
    ("link leads nowhere: ../figs/no.png", say(f"![{ALT}](../figs/no.png)")),
    ("link leads nowhere", say("[up](../../)")),
    ("link leads nowhere", say("[etc](/etc/hostname)")),
    ("link leads nowhere", say('<a href="no.ipynb">next</a>')),
    ("no such heading", say("[two](A1_two.ipynb#Nowhere)")),
    ("README.md: link leads nowhere", file("README.md", "[x](no.md)")),
    ("TODO.txt: does not belong to the top level", file("TODO.txt", "")),
    ("LICENSE: is missing", file("LICENSE")),
    ("path of one machine: /tmp", add('open("/tmp/x")')),
    ("path of one machine: /home/me", out(2, printed("saved in /home/me/x"))),
    ("helpers.py: path of one machine", file("helpers.py", "x = '/root/x'")),
    ("is no notebook", lambda r: r.books.update({"01_one": "text"})),
    ("no notebook found", lambda r: [(r.root / "notebooks").rename(r.root / "x"), r.books.clear()]),
    ("does not hold Question, Answer", swap(0, "**Question.**", "Question.")),
    ("does not hold Question, Answer", swap(0, "**Time.**", "**Answer.** **Time.**")),
    ("headings are not", swap(4, "## 1. One", "## 2. One")),
    ("headings are not", swap(4, "## 1. One", "## 1. One\n\n## More")),
    ("headings are not", swap(11, "## Takeaways and limits", "## Takeaways")),
    ("no table headed Symbols", swap(3, "Symbols", "Names")),
    ("no **Next.**", swap(11, "**Next.**", "Next: ")),
    ("0 cells with the tag parameters", tag(2, "")),
    ("93 cells, more than 75", add("x = 1", times=80)),
    ("words of markdown, more than", say("word " * 200)),
    ("median code cell has 11 lines", add("x = 1\n" * 11, times=9)),
    ("a figure cell of 13 lines", add("x = 1\n" * 12 + f'show(fig, "01_curve", "{ALT}")')),
    ("01_solutions.ipynb is missing", lambda r: r.books.pop("solutions/01_solutions")),
]


@pytest.mark.parametrize("i", range(len(SPOILERS)), ids=lambda i: f"{i} {SPOILERS[i][0]}")
def test_refuses(repo, i):
    message, spoil = SPOILERS[i]
    spoil(repo)
    refusals = repo.refusals()
    assert any(message in line for line in refusals), refusals


@pytest.mark.parametrize("change", [{"metadata": {}}, {"source": "x = 1"}, {"execution_count": 7}])
def test_solutions_are_checked_too(repo, change):
    repo.books["solutions/01_solutions"]["cells"][0].update(change)
    assert any("solutions/01_solutions" in line for line in repo.refusals())
