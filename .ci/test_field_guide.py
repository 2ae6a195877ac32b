"""A3 explains wrong functions; here each is planted in the code that it warns of."""

import ast
import json
import types

import pytest
import test_helpers
from exported import NOTEBOOKS, as_module, export_source
from test_export import EXPORTS


def definitions(number):
    """What the cells of a notebook import and define, and its list PLANTED."""
    cells, names = json.loads(NOTEBOOKS[number].read_text("utf-8"))["cells"], {}
    sources = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    nodes = ast.parse("\n".join(sources)).body
    listed = next(n for n in nodes if ast.unparse(n).startswith("PLANTED = "))
    wanted = {n.id for n in ast.walk(listed) if isinstance(n, ast.Name)}
    imports = [n for n in nodes if isinstance(n, ast.Import | ast.ImportFrom)]
    functions = [n for n in nodes if isinstance(n, ast.FunctionDef) and n.name in wanted]
    kept = [*imports, *functions, listed]
    exec(compile(ast.Module(kept, []), f"{number}.py", "exec"), names)
    return names


PLANTED = definitions("A3")["PLANTED"]


class Right:
    """The module, but for the function that was replaced in it: of that, the right one."""

    def __init__(self, module, name):
        self.module, self.right = module, {name: getattr(module, name)} if "." not in name else {}

    def __getattr__(self, name):
        return self.right.get(name, getattr(self.module, name))


def plant(wrong, module, name, number):
    setattr(module, f"nb{number}", Right(module, name))
    owner, _, method = name.rpartition(".")
    owner = getattr(module, owner) if owner else module
    new = types.FunctionType(wrong.__code__, vars(module), name, wrong.__defaults__)
    assert method in vars(owner), f"no {name} to replace"
    setattr(owner, method, new)


@pytest.mark.parametrize("row", list(PLANTED.itertuples(index=False)), ids=lambda r: r[1].__name__)
def test_named_check_fails(row, monkeypatch):
    section, wrong, number, name, check = row
    error = RuntimeError if section == 15 else AssertionError  # PyTorch itself refuses that one
    if number == "helpers":
        monkeypatch.setattr(test_helpers, name, wrong)
        with pytest.raises(error):
            getattr(test_helpers, check)("CartPoleShort-v0", test_helpers.good, 3)
        return
    module = as_module(export_source(number))
    (check, *_) = [c for c in EXPORTS[number][1] if c.__name__ == check]
    check(module)
    plant(wrong, module, name, "04" if number == "01" else number)  # A3 calls 01's by 04's name
    with pytest.raises(error):
        check(module)


def test_list_is_whole():
    """Each of the sections 1 to 15 has a wrong function on it, and none stands there twice."""
    names = [f.__name__ for f in PLANTED["wrong"]]
    assert len(set(names)) == len(names) and set(PLANTED["section"]) == set(range(1, 16))
