"""hygiene.py passes this repository and a minimal good one, and refuses every way of spoiling it."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import hygiene
import pytest

ROOT = Path(__file__).resolve().parent.parent
ALT = "Two curves over ten steps: the predicted value climbs, the truth stays where it was."


def markdown(source):
    return {"cell_type": "markdown", "id": "m", "metadata": {}, "source": source}


def code(source, n, outputs=(), tags=()):
    metadata = {"tags": list(tags)} if tags else {}
    return {"cell_type": "code", "id": "c", "execution_count": n, "metadata": metadata,
            "outputs": list(outputs), "source": source}


def printed(words, name="stdout"):
    return {"output_type": "stream", "name": name, "text": words}


def picture(alt=ALT):
    return {"output_type": "display_data", "metadata": {}, "data": {"image/png": "AAAA", "text/plain": alt}}


def notebook(number):
    return {"nbformat": 4, "nbformat_minor": 5, "metadata": {"kernelspec": {"name": "python3"}}, "cells": [
        markdown("# Title\n\nSee [the helpers](../helpers.py) and [the end](#The-end).\n\n"
                 f"$$q = r \\tag{{{number}.1}}$$"),
        code("steps = 10", 1, tags=["parameters"]),
        code("def actor(obs):\n    return obs", 2, tags=["export", "twin:actor"]),
        code(f"q = r = 1.0  # ({number}.1)\nax.plot([q], alpha=0.5)", 3),
        code(f'show(fig, "curve_{number}", "{ALT}")', 4, [picture()]),
        code('verdict(("one is one", "= 1", q == r))', 5, [printed("one is one   = 1   OK\n")],
             ["nbval-check-output"]),
        markdown(f"# The end\n\n![{ALT}](../figs/curve_{number}.png)"),
    ]}


class Repository:
    """A minimal good repository on disk; each spoiler changes one thing in it."""

    def __init__(self, root):
        self.root = root
        for folder in ("notebooks", "figs/data", ".ci"):
            (root / folder).mkdir(parents=True)
        self.write("README.md", "# Title\n\n[![All tests pass](https://x.org/badge.svg)](notebooks/01_one.ipynb#The-end)\n")
        self.write("requirements.txt", "numpy==2.4.6\n")
        self.write("helpers.py", "def show(fig, name, alt):\n    pass\n")
        self.write("LICENSE", "MIT\n")
        self.books = {"01_one": notebook("1"), "A1_two": notebook("A1")}
        for number in ("1", "A1"):
            self.write(f"figs/curve_{number}.png", "picture")
            self.write(f"figs/data/curve_{number}.csv", "# seed: 0\n# rows: 1\nx,y\n0,1\n")
        shutil.copy(ROOT / ".ci" / "hygiene.py", root / ".ci")

    def write(self, name, content):
        (self.root / name).write_text(content)

    def save(self):
        for name, book in self.books.items():
            self.write(f"notebooks/{name}.ipynb", json.dumps(book))

    @property
    def book(self):
        return self.books["01_one"]

    def cell(self, i):
        return self.book["cells"][i - 1]

    def append(self, source, outputs=(), tags=()):
        """One more code cell at the end of the first notebook."""
        n = 1 + sum(c["cell_type"] == "code" for c in self.book["cells"])
        self.book["cells"].append(code(source, n, outputs, tags))

    def say(self, source):
        self.book["cells"].append(markdown(source))


@pytest.fixture
def repo(tmp_path):
    return Repository(tmp_path)


def test_this_repository_passes():
    assert hygiene.check(ROOT) == []


def test_minimal_repository_passes(repo):
    repo.append("# alpha, NBVAL and /usr/bin may be spoken of\nx = 0.5")
    repo.append("%matplotlib inline\nax.plot(x, alpha=x)")
    repo.append("")                                          # an empty cell has no execution count
    repo.cell(len(repo.book["cells"]))["execution_count"] = None
    repo.say("`[no](link)`, $q[s](a)$\n```python\nx = a[0](missing.md)\n```\n[web](https://example.org/home/x)")
    repo.save()
    assert hygiene.check(repo.root) == []


def test_exit_status(repo):
    command = [sys.executable, repo.root / ".ci" / "hygiene.py"]
    repo.save()
    good = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert good.returncode == 0 and "nothing to refuse" in good.stdout
    repo.cell(4)["execution_count"] = None
    repo.save()
    bad = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert bad.returncode == 1
    assert "notebooks/01_one.ipynb, cell 4: execution_count is None, not 3" in bad.stdout


SPOILERS = {  # name: (the message, what is done to the repository)
    "cleared": ("execution_count is None", lambda r: r.cell(2).update(execution_count=None)),
    "out of order": ("execution_count is 9, not 3", lambda r: r.cell(4).update(execution_count=9)),
    "stderr": ("stored stderr", lambda r: r.cell(2)["outputs"].append(printed("UserWarning", "stderr"))),
    "error": ("stored error ValueError",
              lambda r: r.cell(2)["outputs"].append({"output_type": "error", "ename": "ValueError"})),
    "widget state": ("widget state", lambda r: r.book["metadata"].update(widgets={"state": {}})),
    "widget": ("stored widget", lambda r: r.cell(2)["outputs"].append(
        {"output_type": "display_data", "data": {"application/vnd.jupyter.widget-view+json": {}}})),
    "kernel": ("the kernelspec is not python3",
               lambda r: r.book["metadata"].update(kernelspec={"name": "my-venv"})),
    "size": ("1.6 MB, more than 1.5", lambda r: r.say("x" * 1_600_000)),
    "skip": ("nbval-skip", lambda r: r.append("x = 1", tags=["nbval-skip"])),
    "unknown tag": ("unknown tag 'nbval-ignore-outputs'",
                    lambda r: r.append("x = 1", tags=["nbval-ignore-outputs"])),
    "raises": ("unknown tag", lambda r: r.append("x = 1", tags=["nbval-raises-exception"])),
    "tag on prose": ("not code", lambda r: r.cell(1)["metadata"].update(tags=["export"])),
    "two minds": ("both checked and ignored",
                  lambda r: r.cell(6)["metadata"]["tags"].append("nbval-ignore-output")),
    "two parameter cells": ("on 2 cells", lambda r: r.append("x = 1", tags=["parameters"])),
    "nbval comment": ("nbval comment", lambda r: r.append("# NBVAL_IGNORE_OUTPUT\nprint(1)")),
    "nbval skip comment": ("nbval comment", lambda r: r.append("#nbval_skip\nprint(1)")),
    "long cell": ("41 lines", lambda r: r.append("x = 1\n" * 41)),
    "syntax": ("does not parse", lambda r: r.append("x = (")),
    "alpha bound": ("bare name alpha in line 2", lambda r: r.append("x = 1\nalpha = 2")),
    "alpha read": ("bare name alpha", lambda r: r.append("print(alpha)")),
    "alpha argument": ("bare name alpha", lambda r: r.append("def loss(q, alpha):\n    return q")),
    "alpha attribute": ("bare name alpha", lambda r: r.append("agent.alpha = 1")),
    "alpha in helpers": ("helpers.py: bare name alpha", lambda r: r.write("helpers.py", "alpha = 1")),
    "helpers in export": ("an export cell imports helpers",
                          lambda r: r.append("from helpers import show", tags=["export"])),
    "no verdict": ("no verdict", lambda r: r.cell(6).update(source="print('one is one')")),
    "unchecked verdict": ("without the tag nbval-check-output", lambda r: r.cell(6).update(metadata={})),
    "failed verdict": ("do not end in OK",
                       lambda r: r.cell(6).update(outputs=[printed("a   = 1   OK\nb   = 1   FAIL\n")])),
    "verdict cleared": ("do not end in OK", lambda r: r.cell(6).update(outputs=[])),
    "default alt": ("picture without alt text", lambda r: r.cell(5).update(
        outputs=[picture("<Figure size 640x480 with 1 Axes and quite some text behind it>")])),
    "short alt": ("picture without alt text", lambda r: r.cell(5).update(outputs=[picture("a curve")])),
    "no alt": ("picture without alt text", lambda r: r.cell(5)["outputs"][0]["data"].pop("text/plain")),
    "picture cleared": ("show() without a stored picture", lambda r: r.cell(5).update(outputs=[])),
    "image without alt": ("alt text of ../figs/curve_1.png", lambda r: r.say("![](../figs/curve_1.png)")),
    "image, short alt": ("fewer than 40", lambda r: r.say("![E[Q] grows](../figs/curve_1.png)")),
    "html image": ("fewer than 40", lambda r: r.say('<img src="../figs/curve_1.png" alt="short">')),
    "badge": ("fewer than 10", lambda r: r.say("![CI](https://x.org/badge.svg)")),
    "tag without code": ("equation (1.2) is cited by no comment", lambda r: r.say(r"$$q \tag{1.2}$$")),
    "code without tag": ("the code cites (1.7)", lambda r: r.append("x = 1  # as in (1.1, 1.7)")),
    "tag twice": ("tag 1.1 used twice", lambda r: r.say(r"$$q \tag{1.1}$$")),
    "foreign tag": ("tag 2.1 does not begin with 1.", lambda r: r.say(r"$$q \tag{2.1}$$")),
    "citation in a string": ("equation (1.1) is cited by no", lambda r: r.cell(4).update(source='"# (1.1)"')),
    "twins differ": ("twin:actor differs from its twin in 01_one.ipynb",
                     lambda r: r.cell(3).update(source="def actor(obs):\n    return 2 * obs")),
    "lone twin": ("twin:critic has no twin", lambda r: r.append("x = 1", tags=["twin:critic"])),
    "figure without data": ("figs/data/curve_1.csv is missing",
                            lambda r: (r.root / "figs/data/curve_1.csv").unlink()),
    "orphan figure": ("no notebook names this figure", lambda r: (
        r.write("figs/old.png", "x"), r.write("figs/data/old.csv", "# seed: 0\n# rows: 0\n"))),
    "orphan film": ("old.gif: no notebook names this file", lambda r: r.write("figs/old.gif", "x")),
    "figure missing": ("figs/curve_1.png: a notebook shows this figure",
                       lambda r: (r.root / "figs/curve_1.png").unlink()),
    "no provenance": ("without a provenance header",
                      lambda r: r.write("figs/data/curve_1.csv", "x,y\n0,1\n")),
    "thin provenance": ("without a provenance header",
                        lambda r: r.write("figs/data/curve_1.csv", "# rows: 1\nx,y\n0,1\n")),
    "dead link": ("link leads nowhere: 09_nine.ipynb", lambda r: r.say("[next](09_nine.ipynb)")),
    "dead image": ("link leads nowhere: ../figs/no.png", lambda r: r.say(f"![{ALT}](../figs/no.png)")),
    "link outside": ("link leads nowhere", lambda r: r.say("[up](../../)")),
    "absolute link": ("link leads nowhere", lambda r: r.say("[etc](/etc/hostname)")),
    "dead html link": ("link leads nowhere", lambda r: r.say('<a href="no.ipynb">next</a>')),
    "dead anchor": ("no such heading", lambda r: r.say("[two](A1_two.ipynb#Nowhere)")),
    "own dead anchor": ("no such heading", lambda r: r.say("[here](#Nowhere)")),
    "dead link in README": ("README.md: link leads nowhere", lambda r: r.write("README.md", "[x](no.md)")),
    "stray file": ("TODO.txt: does not belong to the top level", lambda r: r.write("TODO.txt", "")),
    "no license": ("LICENSE: is missing", lambda r: (r.root / "LICENSE").unlink()),
    "path in code": ("path of one machine: /tmp", lambda r: r.append('open("/tmp/x")')),
    "path in output": ("path of one machine: /home/me",
                       lambda r: r.cell(2)["outputs"].append(printed("saved in /home/me/x"))),
    "path in helpers": ("helpers.py: path of one machine", lambda r: r.write("helpers.py", "x = '/root/x'")),
    "path in csv": ("path of one machine",
                    lambda r: r.write("figs/data/curve_1.csv", "# command: /work/x\n# rows: 0\n")),
    "not json": ("is no notebook", lambda r: r.books.update({"01_one": "text"})),
    "no notebooks": ("no notebook found", lambda r: r.books.clear()),
}


@pytest.mark.parametrize("name", SPOILERS)
def test_refuses(repo, name):
    message, spoil = SPOILERS[name]
    spoil(repo)
    repo.save()
    refusals = hygiene.check(repo.root)
    assert any(message in line for line in refusals), refusals


@pytest.mark.parametrize("name", sorted(p.name for p in (ROOT / "notebooks").glob("*.ipynb")))
def test_refuses_this_notebook_once_cleared(tmp_path, name):
    """The same on the real thing: a notebook with all outputs cleared passes nbval and must not pass here."""
    shutil.copytree(ROOT, tmp_path / "copy", ignore=shutil.ignore_patterns(".venv", ".git"))
    path = tmp_path / "copy" / "notebooks" / name
    book = json.loads(path.read_text())
    for cell in book["cells"]:
        if cell["cell_type"] == "code":
            cell.update(outputs=[], execution_count=None)
    path.write_text(json.dumps(book))
    assert f"notebooks/{name}" in "".join(hygiene.check(tmp_path / "copy"))


def test_ruff():
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
