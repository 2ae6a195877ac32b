"""Refuses what nbval lets pass. No arguments; reads the repository this file lies in; exits with 0 or 1."""
import ast
import io
import json
import re
import sys
import tokenize
from collections import Counter, defaultdict
from pathlib import Path
from urllib.parse import unquote

LAYOUT = {"README.md", "requirements.txt", "helpers.py", "notebooks", "figs", "LICENSE"}
TAGS = re.compile(r"parameters|export|twin:[\w-]+|nbval-ignore-output|nbval-check-output")
EQUATION = r"(?:[1-9]|A\d)\.\d+"
CITATION = re.compile(rf"\(({EQUATION}(?:(?:, | and |-){EQUATION})*)\)")
MACHINE = re.compile(r"(?<![\w.:/~-])/(work|tmp|root|home)\b")
MAX_LINES, MAX_BYTES, MIN_ALT, MIN_BADGE = 40, 1_500_000, 40, 10


def text(value):
    """nbformat stores a text as one string or as a list of lines."""
    return "".join(value)


class Notebook:
    def __init__(self, path):
        self.path, self.number = path, re.match(r"0?([^_.]*)", path.name).group(1)
        self.json = json.loads(path.read_text(encoding="utf-8"))
        self.cells = [(i, c["cell_type"], text(c["source"]), c) for i, c in enumerate(self.json["cells"], 1)]
        self.code = [(i, source, c) for i, kind, source, c in self.cells if kind == "code" and source.strip()]
        self.prose = [(i, source, c) for i, kind, source, c in self.cells if kind == "markdown"]
        self.trees = {}

    def calls(self, i, function):
        """The calls of `function` that cell i makes itself (not those inside a function that it defines)."""
        todo = [self.trees[i]] if i in self.trees else []
        while todo:
            node = todo.pop()
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == function:
                yield node
            todo += [n for n in ast.iter_child_nodes(node) if not isinstance(n, ast.FunctionDef | ast.Lambda)]


def tags(cell):
    return cell.get("metadata", {}).get("tags", [])


def plain_python(source):
    """The code without IPython's % and ! lines."""
    return "".join("\n" if re.match(r"\s*[%!]", line) else line for line in source.splitlines(True))


def comments(source):
    tokens = tokenize.generate_tokens(io.StringIO(plain_python(source)).readline)
    try:
        return [t.string for t in tokens if t.type == tokenize.COMMENT]
    except (tokenize.TokenError, SyntaxError):     # reported elsewhere as code that does not parse
        return []


def bare_alpha(tree):
    """Complaint about a variable, argument or attribute `alpha`; the keyword in plot(..., alpha=0.5) is none."""
    names = {ast.Name: "id", ast.arg: "arg", ast.Attribute: "attr"}
    lines = {n.lineno for n in ast.walk(tree) if type(n) in names and getattr(n, names[type(n)]) == "alpha"}
    if lines:
        yield f"bare name alpha in line {', '.join(map(str, sorted(lines)))}: alpha_cql or alpha_ent?"


# ---- one notebook -------------------------------------------------------------------------------------

def check_run(nb):
    """Executed from top to bottom, in one go, without a word on stderr."""
    for n, (i, _, cell) in enumerate(nb.code, 1):
        if cell.get("execution_count") != n:
            yield i, f"execution_count is {cell.get('execution_count')}, not {n}: run the notebook in order"
        for out in cell.get("outputs", []):
            if out.get("name") == "stderr":
                yield i, "stored stderr"
            if out["output_type"] == "error":
                yield i, f"stored error {out.get('ename')}"
            if any("widget" in mime for mime in out.get("data", {})):
                yield i, "stored widget"
    if "widgets" in nb.json["metadata"]:
        yield 0, "widget state in the metadata"
    if nb.json["metadata"].get("kernelspec", {}).get("name") != "python3":
        yield 0, "the kernelspec is not python3"
    if nb.path.stat().st_size > MAX_BYTES:
        yield 0, f"{nb.path.stat().st_size / 1e6:.1f} MB, more than {MAX_BYTES / 1e6:.1f}"


def check_tags(nb):
    for i, kind, source, cell in nb.cells:
        for tag in tags(cell):
            if tag == "nbval-skip":
                yield i, "nbval-skip: every cell runs"
            elif not TAGS.fullmatch(tag):
                yield i, f"unknown tag {tag!r}"
            elif kind != "code":
                yield i, f"tag {tag!r} on a cell that is not code"
        if kind == "code" and re.search(r"#\s*(NBVAL_|PYTEST_VALIDATE)", source, re.I):
            yield i, "nbval comment in the code: use a tag"
        if {"nbval-ignore-output", "nbval-check-output"} <= set(tags(cell)):
            yield i, "output both checked and ignored"
        if len(source.splitlines()) > MAX_LINES:
            yield i, f"{len(source.splitlines())} lines, more than {MAX_LINES}"
    for tag, n in Counter(t for _, _, _, cell in nb.cells for t in tags(cell)).items():
        if n > 1 and tag.startswith(("twin:", "parameters")):
            yield 0, f"tag {tag!r} on {n} cells, at most 1"


def check_code(nb):
    for i, source, cell in nb.code:
        if i not in nb.trees:
            yield i, "code that does not parse"
            continue
        for message in bare_alpha(nb.trees[i]):
            yield i, message
        if "export" in tags(cell) and re.search(r"^\s*(import|from) helpers\b", source, re.M):
            yield i, "an export cell imports helpers"


def check_verdict(nb):
    found = False
    for i, _, cell in nb.code:
        if any(nb.calls(i, "verdict")):
            if "nbval-check-output" not in tags(cell):
                yield i, "verdict in a cell without the tag nbval-check-output"
            else:
                found = True
            printed = "".join(text(out.get("text", "")) for out in cell.get("outputs", []))
            if not re.search(r" OK$", printed, re.M) or re.search(r" FAIL$", printed, re.M):
                yield i, "a verdict whose stored lines do not end in OK"
    if not found:
        yield 0, "no verdict: no cell with the tag nbval-check-output calls verdict"


def check_pictures(nb):
    for i, _, cell in nb.code:
        data = [out["data"] for out in cell.get("outputs", []) if "data" in out]
        images = [d for d in data if any(mime.startswith("image/") for mime in d)]
        for d in images:
            alt = text(d.get("text/plain", ""))
            if len(alt) < MIN_ALT or alt.startswith("<"):
                yield i, f"picture without alt text (text/plain is {alt!r})"
        if len(images) < len(list(nb.calls(i, "show"))):
            yield i, "show() without a stored picture"


def check_paths(nb):
    for i, _, source, cell in nb.cells:
        parts = [source]
        for out in cell.get("outputs", []):
            data = [value for mime, value in out.get("data", {}).items() if mime.startswith("text/")]
            parts += map(text, [*data, out.get("text", ""), out.get("traceback", "")])
        for part in parts:
            if found := MACHINE.search(part):
                yield i, f"path of one machine: {part[found.start():].split()[0]}"


def check_prose(nb, root):
    for i, source, _ in nb.prose:
        for message in check_markdown(source, nb.path, root):
            yield i, message


# ---- markdown: alt texts and links --------------------------------------------------------------------

def without_fences(markdown):
    return re.sub(r"^( *)(```|~~~).*?^ *\2 *$", "", markdown, flags=re.M | re.S)


def without_code(markdown):
    return re.sub(r"(`+)((?!\n\n).)+?\1|\$\$.*?\$\$|\$[^$\n]+\$", "", without_fences(markdown), flags=re.S)


def attribute(tag, name):
    found = re.search(rf"""\b{name}\s*=\s*(["'])(.*?)\1""", tag, re.S)
    return found.group(2) if found else ""


def anchors(path):
    """Places in a file that a link may name: explicit ids, and headings as Jupyter or GitHub name them."""
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = json.loads(source)["cells"]
        source = "\n\n".join(text(c["source"]) for c in cells if c["cell_type"] == "markdown")
    ids = set(re.findall(r"""<\w+[^>]*\b(?:id|name)=["']([^"']+)""", source))
    for heading in re.findall(r"^#+ +(.+?)\s*#*$", without_fences(source), re.M):
        heading = re.sub(r"\[([^]]*)\]\([^)]*\)|[`*]", r"\1", heading)
        if path.suffix == ".ipynb":
            ids.add(heading.replace(" ", "-"))
        else:
            ids.add(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-"))
    return ids


def check_markdown(source, path, root):
    source = without_code(source)
    links = re.findall(r"\]\(\s*<?([^)\s>]+)>?(?:\s+[\"'][^)]*)?\s*\)", source)
    links += re.findall(r"^\s*\[[^]]+\]:\s*(\S+)", source, re.M)
    images = re.findall(r"!\[((?:[^][]|\[[^][]*\])*)\]\(\s*<?([^)\s>]+)", source)
    for tag in re.findall(r"<(?:img|a)\b[^>]*>", source, re.S):
        if tag.startswith("<img"):
            images.append((attribute(tag, "alt"), attribute(tag, "src")))
        links += [value for value in [attribute(tag, "href"), attribute(tag, "src")] if value]
    for alt, target in images:
        least = MIN_BADGE if re.search(r"badge|shields\.io", target) else MIN_ALT
        if len(alt) < least:
            yield f"alt text of {target} has {len(alt)} characters, fewer than {least}"
    for link in links:
        if re.match(r"[a-z][a-z0-9+.-]*:", link):
            continue
        target, _, anchor = unquote(link).partition("#")
        file = (path.parent / target).resolve() if target else path
        if target.startswith("/") or not file.is_relative_to(root) or not file.exists():
            yield f"link leads nowhere: {link}"
        elif anchor and file.suffix in (".md", ".ipynb") and anchor not in anchors(file):
            yield f"link leads nowhere: {link} (no such heading)"


# ---- all notebooks together ---------------------------------------------------------------------------

def check_equations(notebooks):
    known, cited = {}, defaultdict(set)
    for nb in notebooks:
        for i, source, _ in nb.prose:
            for tag in re.findall(r"\\tag\*?\{([^}]*)\}", source):
                if not re.fullmatch(rf"{re.escape(nb.number)}\.\d+", tag):
                    yield nb.path, i, f"equation tag {tag} does not begin with {nb.number}."
                if tag in known:
                    yield nb.path, i, f"equation tag {tag} used twice"
                known[tag] = nb, i
    for nb in notebooks:
        for i, source, _ in nb.code:
            for comment in comments(source):
                for group in CITATION.findall(comment):
                    for tag in re.findall(EQUATION, group):
                        cited[nb].add(tag)
                        if tag not in known:
                            yield nb.path, i, f"the code cites ({tag}), and no equation has that tag"
    for tag, (nb, i) in known.items():
        if tag not in cited[nb]:
            yield nb.path, i, f"equation ({tag}) is cited by no comment in this notebook's code"


def check_twins(notebooks):
    twins = defaultdict(list)
    for nb in notebooks:
        for i, source, cell in nb.code:
            for tag in tags(cell):
                if tag.startswith("twin:"):
                    twins[tag].append((nb, i, source))
    for tag, copies in twins.items():
        first = copies[0]
        for nb, i, source in copies[1:]:
            if source != first[2]:
                yield nb.path, i, f"{tag} differs from its twin in {first[0].path.name}, cell {first[1]}"
        if len(copies) == 1:
            yield first[0].path, first[1], f"{tag} has no twin in another notebook"


def check_figures(notebooks, root):
    shown, code = set(), "\n".join(source for nb in notebooks for _, source, _ in nb.code)
    for nb in notebooks:
        for i, _, _ in nb.code:
            for call in nb.calls(i, "show"):
                values = [*call.args, *(k.value for k in call.keywords)]
                shown |= {str(v.value) for v in values if isinstance(v, ast.Constant)}
    figs = root / "figs"
    for figure in sorted(p for p in figs.glob("*") if p.is_file()):
        if figure.suffix == ".png" and not (figs / "data" / f"{figure.stem}.csv").exists():
            yield figure, 0, f"figure without data: figs/data/{figure.stem}.csv is missing"
        if figure.suffix == ".png" and figure.stem not in shown:
            yield figure, 0, "no notebook names this figure in show()"
        if figure.suffix != ".png" and figure.name not in code:
            yield figure, 0, "no notebook names this file"
    for name in sorted(n for n in shown if re.fullmatch(r"\w+", n)):
        if not (figs / f"{name}.png").exists():
            yield figs / f"{name}.png", 0, "a notebook shows this figure, and it is missing"
    for table in sorted(figs.glob("data/**/*.csv")):
        content = table.read_text(encoding="utf-8")
        header = re.match(r"(# \w+: .*\n)+", content)
        if not header or header.group().count("\n") < 2:     # one line counts the rows
            yield table, 0, "csv without a provenance header (lines such as '# seed: 0')"
        if MACHINE.search(content):
            yield table, 0, "path of one machine"


def check_layout(root):
    names = {p.name for p in root.iterdir() if not p.name.startswith(".")} - {"__pycache__"}
    for name in sorted(names - LAYOUT):
        yield root / name, 0, "does not belong to the top level"
    for name in sorted(LAYOUT - names):
        yield root / name, 0, "is missing"
    for name in sorted({"README.md", "helpers.py"} & names):
        path, content = root / name, (root / name).read_text(encoding="utf-8")
        if found := MACHINE.search(content):
            yield path, 0, f"path of one machine: {found.group()}"
        if name == "README.md":
            for message in check_markdown(content, path, root):
                yield path, 0, message
        else:
            for message in bare_alpha(ast.parse(content)):
                yield path, 0, message


def check(root):
    """All refusals, as lines of text."""
    root, notebooks, refusals = Path(root).resolve(), [], []
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        try:
            nb = Notebook(path)
        except (ValueError, KeyError, TypeError) as error:
            return [f"{path.relative_to(root)}: is no notebook ({type(error).__name__}: {error})"]
        for i, source, _ in nb.code:
            try:
                nb.trees[i] = ast.parse(plain_python(source))
            except SyntaxError:
                pass
        notebooks.append(nb)
        for rule in (check_run, check_tags, check_code, check_verdict, check_pictures, check_paths):
            refusals += [(path, i, message) for i, message in rule(nb)]
        refusals += [(path, i, message) for i, message in check_prose(nb, root)]
    if not notebooks:
        refusals.append((root / "notebooks", 0, "no notebook found"))
    refusals += [*check_equations(notebooks), *check_twins(notebooks), *check_figures(notebooks, root)]
    refusals += check_layout(root)
    return [f"{path.relative_to(root)}{f', cell {i}' if i else ''}: {what}" for path, i, what in refusals]


if __name__ == "__main__":
    lines = check(Path(__file__).resolve().parent.parent)
    print("\n".join(lines) or "hygiene: nothing to refuse")
    sys.exit(bool(lines))
