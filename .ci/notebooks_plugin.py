"""pytest plugin: how notebooks are compared, in which order they run, and where they draw."""

import json
import os
import re
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from nbval.kernel import RunningKernel

# Longest first, so that no worker is left alone with the longest one; then solutions, then tests.
ORDER = ("04_", "01_", "03_", "A2_", "A4_", "A1_", "A3_", "02_")

# A cell tagged numbers-vary trains or measures time: another processor prints other numbers there
# and the same words. Both the stored output and the new one go through `mask` before they are
# compared: a number (sign, thousands, decimals, exponent, %, nan and inf) becomes # together with
# the blanks around it, since numbers are padded; remaining blanks are folded and trimmed, since
# headers of tables are padded, too. Digits inside a word (q1) are letters of that word. The kind
# of processor and the peak memory, which Windows does not tell, are left out.
MACHINE = re.compile(r" on (?:x86_64|AMD64|arm64|aarch64)\b|, at most [\d.]+ GB")
NUMBER = re.compile(
    r"[ \t]*(?<![\w.])[+\-\u2212]?"
    r"(?:(?:\d+(?:,\d{3})*(?:\.\d*)*|\.\d+)(?:e[+-]?\d+)?(?:\+[a-z]+\d*)?|(?:nan|inf)\b)"
    r"(?:[ \t]?%)?[ \t]*",
    re.IGNORECASE,
)


def mask(output):
    if not isinstance(output, str):
        return output
    text = re.sub(r"[ \t]+", " ", NUMBER.sub("#", MACHINE.sub("", output)))
    return re.sub(r"^ | $", "", text, flags=re.MULTILINE)


def execute(kernel, source, allow_stdin=None):
    """As nbval does it, but with a history, whose fingerprint run_summary prints."""
    return kernel.kc.execute(source, allow_stdin=allow_stdin, stop_on_error=False)


def pytest_configure(config):
    RunningKernel.execute_cell_input = execute
    if hasattr(config, "workerinput"):
        return  # a worker inherits the folder of the process that started it
    config.passed, config.drawn = Counter(), Path(tempfile.mkdtemp(prefix="figs-"))
    stored = config.rootpath / "figs" / "data" / "long"  # curves of long runs are only read
    if stored.exists():
        shutil.copytree(stored, config.drawn / "data" / "long")
    os.environ["CQL_FIGS"] = str(config.drawn)  # read by helpers.FIGS in every kernel
    os.environ["IPYTHONDIR"] = str(config.drawn / ".ipython")  # nobody's own start-up files
    config.add_cleanup(lambda: shutil.rmtree(config.drawn, ignore_errors=True))
    config.pluginmanager.register(Controller(config))


def place(item):
    """Sort key: notebooks in ORDER, their solutions, tests."""
    if item.path.suffix != ".ipynb":
        return 3, 0
    known = [i for i, name in enumerate(ORDER) if item.path.name.startswith(name)]
    return 1 + (item.path.parent.name == "solutions"), *(known or [len(ORDER)])


def pytest_collection_modifyitems(items):
    items.sort(key=place)
    for item in items:
        if hasattr(item, "cell") and "numbers-vary" in item.cell.metadata.get("tags", []):
            item.sanitize = mask


class Controller:
    """Counts the cells that passed; after a full run looks at what the notebooks have drawn."""

    def __init__(self, config):
        self.config = config

    def pytest_runtest_logreport(self, report):
        self.config.passed[report.nodeid.split("::")[0]] += report.when == "call" and report.passed

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session):
        root = self.config.rootpath
        notebooks = sorted((root / "notebooks").glob("*.ipynb"))
        whole = [self.config.passed[f"notebooks/{p.name}"] == code_cells(p) for p in notebooks]
        if not notebooks or not all(whole):
            return
        refusals = list(unlike(root / "figs", self.config.drawn))
        terminal = self.config.pluginmanager.get_plugin("terminalreporter")
        for line in refusals:
            terminal.ensure_newline()
            terminal.write_line(f"figs/{line}", red=True)
        if refusals:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def code_cells(path):
    return sum(c["cell_type"] == "code" for c in json.loads(path.read_text("utf-8"))["cells"])


def form(table):
    """Column names and number of rows."""
    lines = [line for line in table.read_text("utf-8").splitlines() if not line.startswith("#")]
    return lines[0], len(lines)


def unlike(stored, drawn):
    """Complaints about pictures and tables of `stored` that no notebook wrote, or otherwise."""
    for path in sorted(stored.rglob("*.*")):
        name = path.relative_to(stored)
        if "long" in name.parts or name.name.startswith("schematic_"):
            continue
        if not (drawn / name).exists():
            yield f"{name}: written by no notebook"
        elif path.suffix == ".csv" and form(drawn / name) != form(path):
            yield f"{name}: columns and rows are {form(drawn / name)}, stored are {form(path)}"
