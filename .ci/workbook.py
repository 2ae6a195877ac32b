"""`python .ci/workbook.py 03` writes workbook/03_*.ipynb: the notebook with functions left to you.

Outputs are gone, and so are the bodies of the functions in cells tagged `exercise`. The cell that
follows each says whether you are right.
"""

import ast
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def without_bodies(source):
    """The code with each function's body replaced: its docstring stays, and an error follows."""
    lines, tree = source.splitlines(), ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    inner = {n for f in functions for n in ast.walk(f) if n is not f}
    for function in sorted(set(functions) - inner, key=lambda f: -f.lineno):
        first = function.body[0]
        start = first.end_lineno if ast.get_docstring(function) else first.lineno - 1
        while lines[start - 1].lstrip().startswith("#"):
            start -= 1  # a comment above the first line of the body
        words = f"{function.name}: write this function, then run the next cell"
        error = f'{" " * first.col_offset}raise NotImplementedError("{words}")'
        lines[start : function.end_lineno] = [error]
    return "\n".join(lines)


def from_workbook(markdown):
    """Links to neighbours of the notebook, as they look from workbook/."""
    local = r"(?![a-z][a-z0-9+.-]*:|/|\.\./|#)"
    return re.sub(rf"""(\]\(|(?:href|src)=["']){local}""", r"\1../notebooks/", markdown)


def workbook(book):
    for cell in book["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            cell["source"] = from_workbook(source)
        else:
            exercise = "exercise" in cell["metadata"].get("tags", [])
            cell["source"] = without_bodies(source) if exercise else source
            cell.update(outputs=[], execution_count=None)
    return book


def write(number, root=ROOT):
    (path,) = (root / "notebooks").glob(f"{number}_*.ipynb")
    target = root / "workbook" / path.name
    target.parent.mkdir(exist_ok=True)
    content = workbook(json.loads(path.read_text("utf-8")))
    target.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return target


if __name__ == "__main__":
    print(*map(write, sys.argv[1:]), sep="\n")
