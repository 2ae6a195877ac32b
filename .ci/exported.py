"""The cells tagged `export` of a notebook, joined in order, and tools for the checks of them.

A check is a function of the module and raises where the module is wrong. test_export.py runs each
on the code as it stands, and then on copies with one planted bug each: each copy must fail one.
"""

import contextlib
import inspect
import json
import types
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)  # two threads fight over the core of another test, fifty times slower
NOTEBOOKS = {p.name.split("_")[0]: p for p in sorted((ROOT / "notebooks").glob("*.ipynb"))}


BELOW = {"A2": "04"}  # its code goes below that of another notebook


def export_source(number, whole=True):
    cells = json.loads(NOTEBOOKS[number].read_text("utf-8"))["cells"]
    parts = ["".join(c["source"]) for c in cells if "export" in c["metadata"].get("tags", [])]
    if whole and number in BELOW:
        parts.insert(0, export_source(BELOW[number]).strip())
    return "\n\n\n".join(parts) + "\n" if parts else ""


def as_module(source):
    module = types.ModuleType("exported")
    exec(compile(source, "exported.py", "exec"), module.__dict__)
    return module


def close(a, b, tolerance=1e-12):
    """Equal values, and the same shape and dtype."""
    b = torch.as_tensor(b, dtype=a.dtype)
    assert a.shape == b.shape, (a.shape, b.shape)
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def double(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


@contextlib.contextmanager
def spy(owner, name, answer=None):
    """A list of the arguments, by name, of each call of owner.name; `answer` answers instead."""
    real, calls = getattr(owner, name), []
    signature = inspect.signature(real)

    def watched(*args, **kwargs):
        calls.append(types.SimpleNamespace(**signature.bind(*args, **kwargs).arguments))
        return (answer or real)(*args, **kwargs)

    setattr(owner, name, watched)
    try:
        yield calls
    finally:
        setattr(owner, name, real)


def refuses(error, words, action):
    """The action raises this error, and its message holds these words."""
    try:
        action()
    except error as raised:
        missing = [word for word in words if word not in str(raised)]
        assert not missing, f"{missing} not in: {raised}"
    else:
        raise AssertionError(f"no {error.__name__}")
