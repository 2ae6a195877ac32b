"""Copied code: the `export` cells of a notebook are a script of their own, and bugs do not hide."""

import ast
import copy
import os
import subprocess
import sys

import checks_03
import checks_04
import checks_sac
import pytest
from exported import NOTEBOOKS, as_module, export_source

PROSE_ONLY = {"02", "A3"}  # nothing to copy
SAC = """squashed_log_density TanhGaussianActor TwinCritic sac_target sac_critic_loss sac_actor_loss
    temperature_loss sac_update polyak_update"""
REST = "ParallelMLP make_agent minimise actor_from_arrays"
CQL = "log_integral_exp_q propose cql_sac_critic_loss critic_step cql_sac_update"
FAST = "q_in_bfloat16 sparse_critic_step normalised_gap lagrange_loss"
LONG = "save_checkpoint load_checkpoint check_loss check_weights train_cql"
CLONE = "bc_loss train_bc q_slice"
DQN = "cql_gap td_target cql_dqn_loss QNetwork update train"

# Notebook: the names that its export cells define, what is checked, where bugs are planted.
EXPORTS = {
    "01": (
        f"{SAC} {REST} {CLONE} train_offline",
        checks_sac.CHECKS + checks_sac.OFFLINE,
        f"{SAC} q_slice",
    ),
    "03": (DQN, checks_03.CHECKS, DQN),
    "04": (
        f"{SAC} {REST} {CQL} {FAST} {LONG} {CLONE}",
        checks_04.CHECKS + checks_sac.CHECKS,
        f"{CQL} {FAST}",
    ),
    "A1": (
        f"{SAC} {REST} ReplayBuffer train_online",
        checks_sac.CHECKS + checks_sac.ONLINE,
        "train_online",
    ),
}
NUMBERS = [number for number in NOTEBOOKS if number not in PROSE_ONLY]
PAIRS = [(n, check) for n in NUMBERS for check in EXPORTS.get(n, ("", []))[1]]
DEFINITIONS = (
    ast.Import | ast.ImportFrom | ast.Assign | ast.AnnAssign | ast.FunctionDef | ast.ClassDef
)


@pytest.mark.parametrize("number", NUMBERS)
def test_export_cells_define_the_names(number):
    """Neither more nor fewer than listed above: an export tag removed is no check less."""
    body = ast.parse(export_source(number)).body
    defined = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert defined == set(EXPORTS[number][0].split())
    for node in body:  # cells that only define
        main = isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        assert main or isinstance(node, DEFINITIONS), ast.unparse(node)


@pytest.mark.parametrize("number", NUMBERS)
def test_copied_code_runs_alone(tmp_path, number):
    """In an empty folder: nothing is used that is not defined there, or imported and not used."""
    (tmp_path / "copied.py").write_text(export_source(number))
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    ruff = ["-m", "ruff", "check", "--isolated", "--select", "F", "copied.py"]
    for command in (ruff, ["copied.py"]):
        options = {"cwd": tmp_path, "env": clean, "capture_output": True, "text": True}
        result = subprocess.run([sys.executable, *command], **options)
        assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("number, check", PAIRS, ids=lambda x: getattr(x, "__name__", x))
def test_export_is_right(number, check):
    check(as_module(export_source(number)))


# ---- planted bugs -------------------------------------------------------------------------------
SWAP_METHODS = {"mean": "sum", "sum": "mean", "min": "max", "max": "min"}
SWAP_METHODS |= {"amin": "amax", "argmax": "argmin"}
DROP_METHODS = {"detach", "squeeze", "square", "exp", "log", "tanh", "atanh"}
SWAP_NAMES = [
    {"next_q_online", "next_q_target"},
    {"q_net", "q_target_net"},
    {"obs", "next_obs"},
    {"critic", "critic_target"},
    {"terminated", "truncated"},
]
HARMLESS = {  # changes of the text that change nothing
    "mean + log_std.exp() * torch.randn_like(mean)",  # noise is symmetric
    "actor.centre + actor.scale * (2.0 * torch.rand_like(here) - 1.0)",
    "x @ weight + bias",  # so are fresh biases
    "chunk * m",  # pieces of another size
    "count / 256",  # without the divisor all samples are kept
}


def variants(node):
    """Pairs (what was done, new node) of one-step bugs at this node of the syntax tree."""
    if ast.unparse(node) in HARMLESS:
        return
    if isinstance(node, ast.BinOp):
        if isinstance(node.op, ast.Add | ast.Sub):
            other = ast.Sub() if isinstance(node.op, ast.Add) else ast.Add()
            yield "sign swapped", ast.BinOp(node.left, other, node.right)
        if isinstance(node.op, ast.Mult):
            yield "left factor dropped", node.right
            yield "right factor dropped", node.left
        if isinstance(node.op, ast.Div):
            yield "divisor dropped", node.left
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        if not isinstance(node.operand, ast.Constant):  # dim=-1 and the like
            yield "minus dropped", node.operand
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        method, receiver = node.func.attr, node.func.value
        if method in SWAP_METHODS:
            swapped = ast.Attribute(receiver, SWAP_METHODS[method], node.func.ctx)
            yield f"{method} swapped", ast.Call(swapped, node.args, node.keywords)
        if method in DROP_METHODS:
            yield f"{method} dropped", receiver
    if isinstance(node, ast.With) and "no_grad" in ast.unparse(node.items[0]):
        yield "no_grad dropped", ast.If(ast.Constant(True), node.body, [])
    for pair in SWAP_NAMES:
        for field in ("id", "attr"):
            if getattr(node, field, None) in pair and isinstance(node.ctx, ast.Load):
                new = copy.copy(node)
                (name,) = pair - {getattr(node, field)}
                setattr(new, field, name)
                yield f"{getattr(node, field)} -> {name}", new


def places(tree, names):
    """(parent, field, index) of every node in the bodies of the named functions and classes."""
    todo = [node for node in tree.body if getattr(node, "name", "") in names]
    while todo:
        parent = todo.pop()
        for field, value in ast.iter_fields(parent):
            if isinstance(parent, ast.FunctionDef | ast.arg) and field != "body":
                continue
            for i, node in enumerate(value if isinstance(value, list) else [value]):
                skipped = ast.Assert | ast.Raise | ast.Dict
                if isinstance(node, ast.AST) and not isinstance(node, skipped):
                    yield parent, field, (i if isinstance(value, list) else None)
                    todo.append(node)


def put(parent, field, i, node):
    if i is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[i] = node


def planted(source, names):
    """Pairs (description, source with that one bug)."""
    tree = ast.parse(source)
    for parent, field, i in list(places(tree, names)):
        node = getattr(parent, field) if i is None else getattr(parent, field)[i]
        for what, new in variants(node):
            put(parent, field, i, ast.copy_location(new, node))
            yield f"{what} in {ast.unparse(node).splitlines()[0]}", ast.unparse(tree)
            put(parent, field, i, node)


def caught(source, checks):
    """Puts the check that noticed first: it is the likeliest to notice the next bug, too."""
    module = as_module(source)
    for check in list(checks):
        try:
            check(module)
        except Exception:
            checks.remove(check)
            checks.insert(0, check)
            return True
    return False


@pytest.mark.parametrize("number", NUMBERS)
def test_planted_bugs_are_caught(number):
    """A sign, factor, mean, minimum, detach, network or name changed: a check notices."""
    _, checks, names = EXPORTS[number]
    checks = list(checks)
    bugs = list(planted(export_source(number), names.split()))
    assert len(bugs) > len(names.split())
    survivors = [what for what, spoilt in bugs if not caught(spoilt, checks)]
    assert not survivors, "\n".join(survivors)
