"""Copied code: the `export` cells of a notebook are a script of their own, and bugs do not hide."""

import ast
import subprocess
import sys

import checks_02
import checks_03
import checks_04
import checks_A2
import checks_A4
import checks_sac
import pytest
from exported import NOTEBOOKS, as_module, export_source

PROSE_ONLY = {"A3"}  # nothing to copy
SAC = """squashed_log_density TanhGaussianActor TwinCritic sac_target sac_critic_loss sac_actor_loss
    temperature_loss sac_update polyak_update"""
REST = "mlp make_agent minimise actor_update"
LOOP = "likely_cause train_offline"
CQL = "log_integral_exp_q propose check_box cql_sac_critic_loss cql_sac_update"
STORE = "ReplayBuffer train_online"
CLONE = "bc_loss train_bc"
TABLE = "backup evaluate_policy conservative_reward chi_square inner_maximum cql_gap solve_bandit"
DQN = "cql_gap td_target cql_dqn_loss QNetwork update train"
GAP = "mixture_log_density effective_share normalised_gap lagrange_loss"
FAST = """multiply_adds forward_by_hand backward_by_hand grad_q_by_hand FastCriticStep
    fast_cql_sac_update save_checkpoint load_checkpoint check_weights train_long"""

# Notebook: the names that its export cells define, what is checked, where bugs are planted.
OFFLINE, ONLINE = (checks_sac.CHECKS + more for more in (checks_sac.OFFLINE, checks_sac.ONLINE))
CONSERVATIVE = checks_04.CHECKS + checks_sac.CHECKS + checks_sac.LOOP
EXPORTS = {
    "01": (f"{SAC} {REST} {LOOP} {CLONE} actor_from_arrays", OFFLINE, f"{SAC} {REST} {LOOP}"),
    "02": (TABLE, checks_02.CHECKS, TABLE),
    "03": (DQN, checks_03.CHECKS, DQN),
    "04": (f"{SAC} {REST} {LOOP} {CQL}", CONSERVATIVE, CQL),
    "A1": (f"{SAC} {REST} actor_from_arrays {STORE}", ONLINE, STORE),
    "A4": (GAP, checks_A4.CHECKS, GAP),
    "A2": (FAST, checks_A2.CHECKS, FAST),
}
NUMBERS = [number for number in NOTEBOOKS if number not in PROSE_ONLY]
PAIRS = [(n, check) for n in NUMBERS for check in EXPORTS.get(n, ("", []))[1]]
DEFINED = ast.FunctionDef | ast.ClassDef


@pytest.mark.parametrize("number", NUMBERS)
def test_export_cells_define_the_names(number):
    """Neither more nor fewer than listed above: an export tag removed is no check less."""
    body = ast.parse(export_source(number, whole=False)).body
    defined = {node.name for node in body if isinstance(node, DEFINED)}
    assert defined == set(EXPORTS[number][0].split())
    for node in body:  # cells that only define
        main = isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        only = DEFINED | ast.Import | ast.ImportFrom | ast.Assign | ast.AnnAssign
        assert main or isinstance(node, only), ast.unparse(node)


@pytest.mark.parametrize("number", NUMBERS)
def test_copied_code_runs_alone(tmp_path, number):
    """In an empty folder: nothing is used that is not defined there, or imported and not used."""
    (tmp_path / "copied.py").write_text(export_source(number))
    for options in ("-m ruff check --isolated --select F copied.py", "-I copied.py"):
        command = [sys.executable, *options.split()]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("number, check", PAIRS, ids=lambda x: getattr(x, "__name__", x))
def test_export_is_right(number, check):
    check(as_module(export_source(number)))


# ---- planted bugs -------------------------------------------------------------------------------
SWAP_METHODS = {"mean": "sum", "sum": "mean", "min": "max", "max": "min"}
SWAP_METHODS |= {"amin": "amax", "argmax": "argmin"}
DROP_METHODS = {"detach", "squeeze", "square", "exp", "log", "tanh", "atanh"}
SWAP_NAMES = [{"next_q_online", "next_q_target"}, {"q_net", "q_target_net"}, {"obs", "next_obs"}]
SWAP_NAMES += [{"critic", "critic_target"}, {"terminated", "truncated"}]
HARMLESS = {  # changes of the text that change nothing
    "mean + log_std.exp() * torch.randn_like(mean)",  # noise is symmetric
    "actor.centre + actor.scale * (2.0 * torch.rand_like(here) - 1.0)",
    "x @ weight + bias",  # so are fresh biases
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
                (name,) = pair - {getattr(node, field)}
                new = type(node)(**vars(node) | {field: name})
                yield f"{getattr(node, field)} -> {name}", new


def inside(node):
    """The node and all below, but for signatures of functions and for messages of errors."""
    yield node
    below = node.body if isinstance(node, ast.FunctionDef) else ast.iter_child_nodes(node)
    for child in below:
        if not isinstance(child, ast.Assert | ast.Raise | ast.Dict):
            yield from inside(child)


class Replace(ast.NodeTransformer):
    def __init__(self, old, new):
        self.old, self.new = old, new

    def visit(self, node):
        return self.new if node is self.old else self.generic_visit(node)


def planted(source, names):
    """Pairs (description, source with that one bug)."""
    tree = ast.parse(source)
    tops = [node for node in tree.body if getattr(node, "name", "") in names]
    for node in [node for top in tops for node in inside(top)]:
        for what, new in variants(node):
            Replace(node, new).visit(tree)
            yield f"{what} in {ast.unparse(node).splitlines()[0]}", ast.unparse(tree)
            Replace(new, node).visit(tree)


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
