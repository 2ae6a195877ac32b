"""Refuses what nbval lets pass; `python .ci/hygiene.py` lists what is wrong with the repository."""

import ast
import base64
import hashlib
import io
import json
import re
import statistics
import sys
import tokenize
from collections import Counter, defaultdict
from functools import cached_property
from pathlib import Path
from urllib.parse import unquote

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from helpers import fingerprint  # noqa: E402

LAYOUT = {"README.md", "requirements.txt", "helpers.py", "notebooks", "figs", "LICENSE"}
IGNORED = {"__pycache__", "workbook", "MUJOCO_LOG.TXT"}  # .gitignore has them, too
TAGS = "parameters|export|reuse|exercise|check|twin:[\\w-]+|numbers-vary|nbval-check-output"
CHAPTER = "CQL_alpha_reward|CQL_q_value|CQL_overestimateQ_pic"
FIGURE = re.compile(rf"(0\d|A\d|schematic)_\w+|{CHAPTER}")
EQUATION = r"(?:[1-9]|A\d)\.\d+"
CITATION = re.compile(rf"\(({EQUATION}(?:(?:, | and |-){EQUATION})*)\)")
MACHINE = re.compile(r"(?<![\w.:/~-])/(work|tmp|root|home)\b")
MAX_LINES, MAX_BYTES, MIN_ALT, MIN_BADGE = 40, 1_500_000, 40, 10
# The frame: paragraphs of the first cell, sections after the numbered ones, and what fits into it.
OPENING = ["Question", "Answer", "You will be able to", "You need", "Time"]
CLOSING = ["Verdict", "Exercises", "Takeaways and limits", "Reading"]
MAX_CELLS, MAX_APPENDIX = {"01": 75, "02": 70, "03": 75, "04": 90}, 70
MAX_WORDS, MAX_WORDS_A_LINE, MAX_MEDIAN, MAX_FIGURE = 5000, 9, 10, 12


class Cell:
    def __init__(self, i, cell):
        self.i, self.kind = i, cell["cell_type"]
        self.source = "".join(cell["source"])  # nbformat: one string, or a list of lines
        self.tags = cell.get("metadata", {}).get("tags", [])
        self.count, self.outputs = cell.get("execution_count"), cell.get("outputs", [])
        self.printed = "".join("".join(out.get("text", "")) for out in self.outputs)
        self.python = re.sub(r"^\s*[%!].*", "", self.source, flags=re.M)

    @cached_property
    def tree(self):
        try:
            return ast.parse(self.python if self.kind == "code" else "")
        except SyntaxError:
            return None

    def __len__(self):
        return sum(bool(line.strip()) for line in self.source.splitlines())

    def calls(self, function):
        """The calls of `function` made here, not those inside a function that is defined here."""
        todo = [self.tree] if self.tree else []
        while todo:
            node = todo.pop(0)
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == function:
                yield node
            inner = ast.FunctionDef | ast.Lambda
            todo += [n for n in ast.iter_child_nodes(node) if not isinstance(n, inner)]


class Notebook:
    def __init__(self, path):
        self.path, self.number = path, path.name.split("_")[0]
        self.json = json.loads(path.read_text(encoding="utf-8"))
        self.cells = [Cell(i, cell) for i, cell in enumerate(self.json["cells"], 1)]
        self.code = [c for c in self.cells if c.kind == "code" and c.source.strip()]
        self.prose = [c for c in self.cells if c.kind == "markdown"]
        self.solutions = path.parent.name == "solutions"

    def tagged(self, tag):
        return [c for c in self.code if tag in c.tags]


def bare_alpha(tree):
    """The keyword in plot(..., alpha=0.5) is none."""
    names = {ast.Name: "id", ast.arg: "arg", ast.Attribute: "attr"}
    found = [n for n in ast.walk(tree) if getattr(n, names.get(type(n), ""), None) == "alpha"]
    if found:
        lines = ", ".join(str(n) for n in sorted({n.lineno for n in found}))
        yield f"bare name alpha in line {lines}: alpha_cql or alpha_ent?"


# ---- one notebook -------------------------------------------------------------------------------
def check_run(nb):
    """Executed from top to bottom, in one go, as it stands, without a word on stderr."""
    for n, c in enumerate(nb.code, 1):
        if c.count != n:
            yield c.i, f"execution_count is {c.count}, not {n}: run the notebook in order"
        for out in c.outputs:
            if out.get("name") == "stderr":
                yield c.i, "stored stderr"
            if out["output_type"] == "error":
                yield c.i, f"stored error {out.get('ename')}"
            if any("widget" in mime for mime in out.get("data", {})):
                yield c.i, "stored widget"
    if nb.code and nb.code[-1].source.strip() != "run_summary(started)":
        yield nb.code[-1].i, "the last code cell is not run_summary(started) alone"
    elif nb.code:
        now = f"cells run: {fingerprint(c.source for c in nb.code)}"
        if nb.code[-1].printed.strip().split("\n")[-1] != now:
            yield nb.code[-1].i, "other cells were run than stand here now: run the notebook again"
    if "widgets" in nb.json["metadata"]:
        yield 0, "widget state in the metadata"
    if nb.json["metadata"].get("kernelspec", {}).get("name") != "python3":
        yield 0, "the kernelspec is not python3"
    if nb.path.stat().st_size > MAX_BYTES:
        yield 0, f"{nb.path.stat().st_size / 1e6:.1f} MB, more than {MAX_BYTES / 1e6:.1f}"


def check_tags(nb):
    for c in nb.cells:
        if c.kind not in ("code", "markdown"):
            yield c.i, f"a {c.kind} cell"
        for tag in c.tags:
            if not re.fullmatch(TAGS, tag):
                yield c.i, f"unknown tag {tag!r}"
            elif c.kind != "code":
                yield c.i, f"tag {tag!r} on a cell that is not code"
        if c.kind == "code" and re.search(r"#\s*(NBVAL_|PYTEST_VALIDATE)", c.source, re.I):
            yield c.i, "nbval comment in the code: use a tag"
        if {"numbers-vary", "nbval-check-output"} <= set(c.tags):
            yield c.i, "output compared to the letter, and with its numbers masked"
        if len(c.source.splitlines()) > MAX_LINES:
            yield c.i, f"{len(c.source.splitlines())} lines, more than {MAX_LINES}"
    for tag, n in Counter(tag for c in nb.cells for tag in c.tags).items():
        if n > 1 and tag.startswith(("twin:", "parameters")):
            yield 0, f"tag {tag!r} on {n} cells, at most 1"
    if not nb.code or "twin:setup" not in nb.code[0].tags:
        yield nb.code[0].i if nb.code else 0, "the first code cell is not tagged twin:setup"
    for c, following in zip(nb.code, [*nb.code[1:], None], strict=True):
        if "exercise" in c.tags and "export" not in c.tags:
            yield c.i, "an exercise that is no export"
        if "exercise" in c.tags and not (following and "check" in following.tags):
            yield c.i, "an exercise, and the next code cell is not tagged check"


def check_code(nb):
    for c in nb.code:
        if c.tree is None:
            yield c.i, "code that does not parse"
            continue
        for message in bare_alpha(c.tree):
            yield c.i, message
        if "export" in c.tags and re.search(r"^\s*(import|from) helpers\b", c.source, re.M):
            yield c.i, "an export cell imports helpers"


def says_nothing(ok):
    """Why the expression `ok` of a claim would hold whatever was measured, or ''."""
    known = set("np torch math bool all len abs min max sum float int".split())
    if not {n.id for n in ast.walk(ok) if isinstance(n, ast.Name)} - known:
        return "is a constant"
    for node in ast.walk(ok):
        if getattr(node, "attr", getattr(node, "id", "")) == "any":
            return "asks for any: claims hold on every seed"
        parts = [ast.unparse(part) for part in ast.iter_child_nodes(node)]
        negated = [n for n in ast.iter_child_nodes(node) if isinstance(n, ast.UnaryOp)]
        if any(ast.unparse(n.operand) in parts for n in negated):
            return "holds either way"
        if isinstance(node, ast.Compare) and parts[0] in parts[1:]:
            return "compares a thing with itself"
    return ""


def claims(c):
    """The tuples (text, threshold, ok) of a cell, however they get into verdict()."""
    for node in ast.walk(c.tree):
        if isinstance(node, ast.Tuple) and len(node.elts) == 3:
            text = node.elts[0]
            if isinstance(text, ast.JoinedStr) or isinstance(getattr(text, "value", 0), str):
                yield node.elts


def check_verdict(nb):
    cells = [c for c in nb.code if any(c.calls("verdict"))]
    if not any("nbval-check-output" in c.tags for c in cells):
        yield 0, "no verdict: no cell with the tag nbval-check-output calls verdict"
    for c in cells:
        if "nbval-check-output" not in c.tags:
            yield c.i, "verdict in a cell without the tag nbval-check-output"
        if not re.search(r" OK$", c.printed, re.M) or re.search(r" FAIL$", c.printed, re.M):
            yield c.i, "a verdict whose stored lines do not end in OK"
        if not any(claims(c)):
            yield c.i, "a verdict without a claim written as (claim, threshold, ok) in its cell"
        for claim, _, ok in claims(c):
            if why := says_nothing(ok):
                yield c.i, f"the claim {ast.unparse(claim)} {why}"


def shown(c):
    """The name in each call of show(), or None where it is not written out."""
    for call in c.calls("show"):
        names = [*call.args[1:2], *(k.value for k in call.keywords if k.arg == "name")]
        yield names[0].value if names and isinstance(names[0], ast.Constant) else None


def check_pictures(nb, figs):
    for c in nb.code:
        names, data = list(shown(c)), [out.get("data", {}) for out in c.outputs]
        images = [d for d in data if any(mime.startswith("image/") for mime in d)]
        if len(names) != len(images):
            yield c.i, f"{len(images)} pictures stored, {len(names)} calls of show()"
        if None in names:
            yield c.i, "show() with a name that is not written out"
        for name, data in zip(names, images, strict=False):
            alt, png = ("".join(data.get(mime, "")) for mime in ("text/plain", "image/png"))
            png, file = base64.b64decode(png), figs / f"{name}.png"
            if len(alt) < MIN_ALT or alt.startswith("<"):
                yield c.i, f"picture without alt text (text/plain is {alt!r})"
            if not png.startswith(b"\x89PNG\r\n\x1a\n"):
                yield c.i, f"the stored picture {name} is no PNG"
            if not file.exists() or file.read_bytes() != png:
                yield c.i, f"the stored picture is not figs/{file.name}"


def check_paths(nb):
    for c in nb.cells:
        data = [v for out in c.outputs for k, v in out.get("data", {}).items() if "text/" in k]
        traces = [out.get("traceback", "") for out in c.outputs]
        for part in map("".join, [c.source, c.printed, *data, *traces]):
            if found := MACHINE.search(part):
                yield c.i, f"path of one machine: {part[found.start() :].split()[0]}"


def check_frame(nb):
    """The same parts in the same order in each notebook, and no more than can be read."""
    first = nb.cells[0].source if nb.cells else ""
    if not first.startswith(f"# {nb.number} · "):
        yield 1, f"the first line does not begin with # {nb.number} · "
    if [w for w in re.findall(r"\*\*([^*]+?)[.:]?\*\*", first) if w in OPENING] != OPENING:
        yield 1, f"the first cell does not hold {', '.join(OPENING)} in this order, in bold"
    texts = [(c.i, without_fences(c.source)) for c in nb.prose]
    found = [(i, h) for i, t in texts for h in re.findall(r"^## +(.+?) *$", t, re.M)]
    found = [(i, h) for i, h in found if h != "Symbols"]
    numbers = [int(m.group(1)) for _, h in found if (m := re.match(r"(\d+)\. ", h))]
    names = [h for _, h in found]
    if numbers != list(range(1, len(numbers) + 1)) or names[len(numbers) :] != CLOSING:
        yield 0, f"headings are not ## 1. ..., ## 2. ..., {', '.join(CLOSING)} but {names}"
    start = found[0][0] if found else len(nb.cells)
    symbols = r"^(#+ |\*\*)Symbols\b(?s:.*)^\|"
    if not any(re.search(symbols, c.source, re.M) for c in nb.prose if c.i < start):
        yield 0, "no table headed Symbols before section 1"
    reading = next((i for i, h in found if h == "Reading"), len(nb.cells) + 1)
    if not any("**Next.**" in c.source for c in nb.prose if c.i >= reading):
        yield 0, "no **Next.** in the section Reading"
    if len(nb.tagged("parameters")) != 1:
        yield 0, f"{len(nb.tagged('parameters'))} cells with the tag parameters, not 1"
    name = f"{nb.number}_solutions.ipynb"
    if not (nb.path.parent / "solutions" / name).exists():
        yield 0, f"solutions/{name} is missing"
    limit = MAX_CELLS.get(nb.number, MAX_APPENDIX)
    words = sum(bool(re.search(r"\w", word)) for c in nb.prose for word in c.source.split())
    lines, median = sum(map(len, nb.code)), statistics.median(map(len, nb.code or [""]))
    if len(nb.cells) > limit:
        yield 0, f"{len(nb.cells)} cells, more than {limit}"
    if words > min(MAX_WORDS, MAX_WORDS_A_LINE * lines):
        most = f"{MAX_WORDS}, or than {MAX_WORDS_A_LINE} for each of {lines} lines of code"
        yield 0, f"{words} words of markdown, more than {most}"
    for c in nb.code:
        if any(c.calls("show")) and len(c) > MAX_FIGURE:
            yield c.i, f"a figure cell of {len(c)} lines, more than {MAX_FIGURE}"
    if median > MAX_MEDIAN:
        yield 0, f"the median code cell has {median:g} lines, more than {MAX_MEDIAN}"


# ---- markdown: alt texts and links --------------------------------------------------------------
def without_fences(markdown):
    return re.sub(r"^( *)(```|~~~).*?^ *\2 *$", "", markdown, flags=re.M | re.S)


def without_code(markdown):
    code = r"(`+)((?!\n\n).)+?\1|\$\$.*?\$\$|\$[^$\n]+\$"
    return re.sub(code, "", without_fences(markdown), flags=re.S)


def attribute(tag, name):
    found = re.search(rf"""\b{name}\s*=\s*(["'])(.*?)\1""", tag, re.S)
    return found.group(2) if found else ""


def images(source):
    """Pairs (alt text, target)."""
    source = without_code(source)
    tags = re.findall(r"<img\b[^>]*>", source, re.S)
    marked = re.findall(r"!\[((?:[^][]|\[[^][]*\])*)\]\(\s*<?([^)\s>]+)", source)
    return marked + [(attribute(tag, "alt"), attribute(tag, "src")) for tag in tags]


def anchors(path):
    """What a link may name: explicit ids, and headings as Jupyter or GitHub name them."""
    source, jupyter = path.read_text(encoding="utf-8"), path.suffix == ".ipynb"
    if jupyter:
        source = "\n\n".join(c.source for c in Notebook(path).prose)
    ids = set(re.findall(r"""<\w+[^>]*\b(?:id|name)=["']([^"']+)""", source))
    for heading in re.findall(r"^#+ +(.+?)\s*#*$", without_fences(source), re.M):
        heading = re.sub(r"\[([^]]*)\]\([^)]*\)|[`*]", r"\1", heading)
        github = re.sub(r"[^\w\- ]", "", heading.lower())
        ids.add((heading if jupyter else github).replace(" ", "-"))
    return ids


def check_markdown(source, path, root):
    for alt, target in images(source):
        least = MIN_BADGE if re.search(r"badge|shields\.io", target) else MIN_ALT
        if len(alt) < least:
            yield f"alt text of {target} has {len(alt)} characters, fewer than {least}"
    source = without_code(source)
    links = re.findall(r"\]\(\s*<?([^)\s>]+)>?(?:\s+[\"'][^)]*)?\s*\)", source)
    links += re.findall(r"^\s*\[[^]]+\]:\s*(\S+)", source, re.M)
    for tag in re.findall(r"<(?:img|a)\b[^>]*>", source, re.S):
        links += filter(None, [attribute(tag, "href"), attribute(tag, "src")])
    for link in links:
        if re.match(r"[a-z][a-z0-9+.-]*:", link):
            continue
        target, _, anchor = unquote(link).partition("#")
        file = (path.parent / target).resolve() if target else path
        if target.startswith("/") or not file.is_relative_to(root) or not file.exists():
            yield f"link leads nowhere: {link}"
        elif anchor and file.suffix in (".md", ".ipynb") and anchor not in anchors(file):
            yield f"link leads nowhere: {link} (no such heading)"


# ---- all notebooks together ---------------------------------------------------------------------
def comments(c):
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(c.python).readline))
    except (tokenize.TokenError, SyntaxError):  # reported elsewhere as code that does not parse
        return ""
    return "\n".join(t.string for t in tokens if t.type == tokenize.COMMENT)


def check_equations(notebooks):
    known, cited = {}, defaultdict(set)
    for nb in notebooks:
        number = nb.number.removeprefix("0")
        for c in nb.prose:
            for tag in re.findall(r"\\tag\*?\{([^}]*)\}", c.source):
                if not re.fullmatch(rf"{re.escape(number)}\.\d+", tag):
                    yield nb.path, c.i, f"equation tag {tag} does not begin with {number}."
                if tag in known:
                    yield nb.path, c.i, f"equation tag {tag} used twice"
                known[tag] = nb, c.i
    for nb in notebooks:
        for c in nb.code:
            for tag in re.findall(EQUATION, " ".join(CITATION.findall(comments(c)))):
                cited[nb].add(tag)
                if tag not in known:
                    yield nb.path, c.i, f"the code cites ({tag}), and no equation has that tag"
    for tag, (nb, i) in known.items():
        if tag not in cited[nb]:
            yield nb.path, i, f"equation ({tag}) is cited by no comment in this notebook's code"


def defined(c):
    kinds = ast.FunctionDef | ast.ClassDef
    return {node.name for node in getattr(c.tree, "body", []) if isinstance(node, kinds)}


def check_twins(notebooks):
    twins = defaultdict(list)
    for nb in notebooks:
        for c in nb.code:
            for tag in c.tags:
                if tag.startswith("twin:"):
                    twins[tag].append((nb.path, c))
    for tag, ((path, first), *others) in twins.items():
        for other, c in others:
            if c.source != first.source:
                yield other, c.i, f"{tag} differs from its twin in {path.name}, cell {first.i}"
        if not others:
            yield path, first.i, f"{tag} has no twin in another notebook"
        names = defined(first)
        for nb in notebooks:
            for c in nb.tagged("export"):
                if tag not in c.tags and names & defined(c):
                    yield nb.path, c.i, f"defines what {tag} defines elsewhere, and has no such tag"


def check_figures(notebooks, root):
    named = {name for nb in notebooks for c in nb.code for name in shown(c)}
    texts = [(root / "README.md").read_text("utf-8")] if (root / "README.md").exists() else []
    texts += [c.source for nb in notebooks for c in nb.prose]
    used = {target.split("/")[-1] for source in texts for _, target in images(source)}
    figs = root / "figs"
    for figure in sorted(p for p in figs.glob("*") if p.is_file()):
        name = figure.stem
        drawn = figure.suffix == ".png" and not name.startswith("schematic")
        if not FIGURE.fullmatch(name):
            yield figure, 0, "a figure is named NN_what, schematic_what or as in the chapter"
        if drawn and not (figs / "data" / f"{name}.csv").exists():
            yield figure, 0, f"figure without data: figs/data/{name}.csv is missing"
        if drawn and name not in named:
            yield figure, 0, "no notebook names this figure in show()"
        if not drawn and figure.name not in used:
            yield figure, 0, "no text shows this picture"
    for table in sorted(figs.glob("data/**/*.csv")):
        content = table.read_text(encoding="utf-8")
        header = re.match(r"(# \w+: .*\n)+", content)
        if not header or header.group().count("\n") < 2:  # one line counts the rows
            yield table, 0, "csv without a provenance header (lines such as '# seed: 0')"
        if MACHINE.search(content):
            yield table, 0, "path of one machine"


def check_sums(root):
    """Files that cost hours are those whose SHA-256 sums stand in .ci/checksums.txt."""
    sums = root / ".ci" / "checksums.txt"
    lines = sums.read_text(encoding="utf-8").splitlines() if sums.exists() else []
    stored = {name: digest for digest, name in map(str.split, lines)}
    files = [*root.glob("notebooks/policies/*.npz"), *root.glob("figs/data/long/*.csv")]
    found = {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    for name in sorted(stored.keys() | found.keys()):
        if stored.get(name) != found.get(name):
            files = "notebooks/policies/*.npz figs/data/long/*.csv"
            meant = f"if that is meant: sha256sum {files} > .ci/checksums.txt"
            yield root / name, 0, f"not the file whose sum is in .ci/checksums.txt ({meant})"


def check_layout(root):
    names = {p.name for p in root.iterdir() if not p.name.startswith(".")} - IGNORED
    for name in sorted(names ^ LAYOUT):
        yield root / name, 0, "is missing" if name in LAYOUT else "does not belong to the top level"
    for name in sorted({"README.md", "helpers.py"} & names):
        path, content = root / name, (root / name).read_text(encoding="utf-8")
        if found := MACHINE.search(content):
            yield path, 0, f"path of one machine: {found.group()}"
        readme = name == "README.md"
        messages = check_markdown(content, path, root) if readme else bare_alpha(ast.parse(content))
        yield from ((path, 0, message) for message in messages)


def check(root):
    """All refusals, as lines of text."""
    root, notebooks, refusals = Path(root).resolve(), [], []
    for path in sorted((root / "notebooks").glob("**/*.ipynb")):
        try:
            nb = Notebook(path)
        except (ValueError, KeyError, TypeError) as error:
            return [f"{path.relative_to(root)}: is no notebook ({type(error).__name__}: {error})"]
        notebooks.append(nb)
        rules = [check_run, check_tags, check_code, check_paths]
        rules += [] if nb.solutions else [check_verdict, check_frame]
        found = [complaint for rule in rules for complaint in rule(nb)]
        found += check_pictures(nb, root / "figs")
        found += [(c.i, m) for c in nb.prose for m in check_markdown(c.source, path, root)]
        refusals += [(path, i, message) for i, message in found]
    if not notebooks:
        refusals.append((root / "notebooks", 0, "no notebook found"))
    refusals += [*check_equations(notebooks), *check_twins(notebooks)]
    refusals += [*check_figures(notebooks, root), *check_sums(root), *check_layout(root)]
    cells = [f", cell {i}" if i else "" for _, i, _ in refusals]
    found = zip(refusals, cells, strict=True)
    return [f"{path.relative_to(root)}{cell}: {what}" for (path, _, what), cell in found]


if __name__ == "__main__":
    lines = check(Path(__file__).resolve().parent.parent)
    print("\n".join(lines) or "hygiene: nothing to refuse")
    sys.exit(bool(lines))
