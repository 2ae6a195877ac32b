"""Copied code: the `export` cells of a notebook are a script of their own, and right: bugs do not hide."""
import ast
import copy
import inspect
import os
import re
import subprocess
import sys

import exported
import pytest
from exported import CHECKS, NOTEBOOKS, as_module, export_source

PROSE_ONLY = {"02"}                                           # a derivation: nothing to copy
NUMBERS = [number for number in NOTEBOOKS if number not in PROSE_ONLY]
NAMES = {"03": ["cql_gap", "td_target", "cql_dqn_loss"],
         "01": ["TanhGaussianActor", "TwinCritic", "sac_critic_loss"],
         "A1": ["TanhGaussianActor", "TwinCritic", "sac_critic_loss"],
         "04": ["TanhGaussianActor", "TwinCritic", "sac_critic_loss", "log_integral_exp_q",
                "cql_sac_critic_loss"]}
DEFINITIONS = ast.Import | ast.ImportFrom | ast.Assign | ast.AnnAssign | ast.FunctionDef | ast.ClassDef


@pytest.mark.parametrize("number", NUMBERS)
def test_export_cells_define_the_names(number):
    source = export_source(number)
    assert source, f"{NOTEBOOKS[number].name} has no export cells"
    module = as_module(source)
    for name in NAMES.get(number, []):
        assert callable(getattr(module, name, None)), name
    for node in ast.parse(source).body:                       # cells that only define
        main = isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        assert main or isinstance(node, DEFINITIONS), ast.unparse(node)


# ---- a few updates in an empty folder, on random data, without helpers.py -------------------------------

USE = {
    "03": """
        net = torch.nn.Linear(4, 2)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        for _ in range(3):
            obs, next_obs = torch.randn(32, 4), torch.randn(32, 4)
            with torch.no_grad():
                target = m.td_target(torch.randn(32), torch.zeros(32), net(next_obs), net(next_obs), 0.99)
            loss = m.cql_dqn_loss(net(obs), torch.randint(2, (32,)), target, 1.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert loss.isfinite() and m.cql_gap(net(obs), torch.zeros(32, dtype=torch.int64)).min() >= 0
        """,
    "SAC": """
        actor, critic = m.TanhGaussianActor(3, 2, (16, 16)), m.TwinCritic(3, 2, (16, 16))
        slow = m.TwinCritic(3, 2, (16, 16))
        optimizers = [torch.optim.Adam(net.parameters(), lr=1e-3) for net in (actor, critic)]
        for _ in range(3):
            obs, next_obs, action = torch.randn(32, 3), torch.randn(32, 3), 2 * torch.rand(32, 2) - 1
            with torch.no_grad():
                next_action, log_pi = actor.sample(next_obs)
                target = torch.randn(32) + 0.99 * (slow(next_obs, next_action).amin(0) - 0.1 * log_pi)
            critic_loss = m.sac_critic_loss(critic(obs, action), target)
            pi_action, log_pi = actor.sample(obs)
            actor_loss = (0.1 * log_pi - critic(obs, pi_action).amin(0)).mean()
            for optimizer, loss in zip(optimizers[::-1], (critic_loss, actor_loss)):
                optimizer.zero_grad()
                loss.backward(retain_graph=True)
            for optimizer in optimizers:
                optimizer.step()
        assert critic_loss.isfinite() and actor_loss.isfinite()
        """,
    "04": """
        critic, actor = m.TwinCritic(3, 2, (16,)), m.TanhGaussianActor(3, 2, (16,))
        optimizer = torch.optim.Adam(critic.parameters(), lr=1e-3)
        for _ in range(3):
            obs, action = torch.randn(32, 3), 2 * torch.rand(32, 2) - 1
            with torch.no_grad():
                samples, log_density = actor.sample(obs, 8)
            q_data, q_samples = critic(obs, action), critic(obs, samples)
            loss, _ = m.cql_sac_critic_loss(q_data, torch.randn(32), q_samples, log_density, 1.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert loss.isfinite() and m.log_integral_exp_q(critic(obs, samples), log_density).shape == (2, 32)
        """,
}
USES = {"03": ["03"], "01": ["SAC"], "A1": ["SAC"], "04": ["SAC", "04"]}


@pytest.mark.parametrize("number", NUMBERS)
def test_copied_code_runs_alone(tmp_path, number):
    """Imported by another script, and run as a script itself."""
    (tmp_path / "copied.py").write_text(export_source(number))
    lines = ["import importlib.util", "import torch", "import copied as m", "",
             'assert importlib.util.find_spec("helpers") is None']
    lines += [inspect.cleandoc(USE[use]) for use in USES.get(number, [])]
    (tmp_path / "use.py").write_text("\n".join(lines))
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    for script in ("use.py", "copied.py"):
        result = subprocess.run([sys.executable, script], cwd=tmp_path, env=clean, capture_output=True,
                                text=True, timeout=300)
        assert result.returncode == 0, result.stderr


# ---- right ----------------------------------------------------------------------------------------------

def applies(check, module):
    """Some checks need names that the series does not fix; a notebook without them is not asked."""
    source = inspect.getsource(check)
    for helper in ("an_actor", "an_agent", "a_fresh_agent"):
        if f"{helper}(" in source:
            source += inspect.getsource(getattr(exported, helper))
    return all(hasattr(module, name) for name in re.findall(r"\bm\.(\w+)", source))


def applicable(number):
    module = as_module(export_source(number))
    return [check for check in CHECKS.get(number, []) if applies(check, module)]


@pytest.mark.parametrize("number, check", [(n, c) for n in NUMBERS for c in applicable(n)],
                         ids=lambda x: getattr(x, "__name__", x))
def test_export_is_right(number, check):
    check(as_module(export_source(number)))


# ---- planted bugs ---------------------------------------------------------------------------------------

MUTATED = {
    "03": ["cql_gap", "td_target", "cql_dqn_loss", "update"],
    "01": ["squashed_log_density", "TanhGaussianActor", "TwinCritic", "sac_target", "sac_critic_loss",
           "sac_actor_loss", "temperature_loss", "sac_update", "polyak_update"],
    "04": ["log_integral_exp_q", "cql_sac_critic_loss", "propose", "critic_step", "cql_sac_update", "lagrange_loss",
           "normalised_gap", "sparse_critic_step", "q_in_bfloat16"],
    "A1": ["train_online"],
}
SWAP_METHODS = {"mean": "sum", "sum": "mean", "min": "max", "max": "min", "amin": "amax", "argmax": "argmin"}
DROP_METHODS = {"detach", "squeeze", "square", "exp", "log", "tanh", "atanh"}
SWAP_NAMES = [{"next_q_online", "next_q_target"}, {"q_net", "q_target_net"}, {"obs", "next_obs"},
              {"critic", "critic_target"}, {"terminated", "truncated"}]
HARMLESS = {                                                  # changes of the text that change nothing
    "mean + log_std.exp() * torch.randn_like(mean)",          # noise is symmetric
    "actor.centre + actor.scale * (2.0 * torch.rand_like(here) - 1.0)",
    "chunk * m",                                              # pieces of another size
    "count / 256",                                            # without the divisor all samples are kept
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
        if not isinstance(node.operand, ast.Constant):        # dim=-1 and the like
            yield "minus dropped", node.operand
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        method, receiver = node.func.attr, node.func.value
        if method in SWAP_METHODS:
            swapped = ast.Attribute(receiver, SWAP_METHODS[method], node.func.ctx)
            yield f"{method} -> {SWAP_METHODS[method]}", ast.Call(swapped, node.args, node.keywords)
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
                if isinstance(node, ast.AST) and not isinstance(node, ast.Assert | ast.Raise | ast.Dict):
                    yield parent, field, (i if isinstance(value, list) else None)
                    todo.append(node)


def planted(source, names):
    """Pairs (description, source with that one bug)."""
    tree = ast.parse(source)
    for parent, field, i in list(places(tree, names)):
        value = getattr(parent, field)
        node = value if i is None else value[i]
        for what, new in variants(node):
            new = ast.copy_location(new, node)
            put(parent, field, i, new)
            yield f"line {node.lineno}: {what} in {ast.unparse(node).splitlines()[0]}", ast.unparse(tree)
            put(parent, field, i, node)


def put(parent, field, i, node):
    if i is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[i] = node


def caught(source, checks):
    module = as_module(source)
    for check in checks:
        try:
            check(module)
        except Exception:
            return True
    return False


@pytest.mark.parametrize("number", [n for n in NUMBERS if n in MUTATED])
def test_planted_bugs_are_caught(number):
    """A sign, factor, mean, minimum, detach, network or argument changed, one at a time: a check notices."""
    source, checks = export_source(number), applicable(number)
    bugs = list(planted(source, MUTATED[number]))
    assert len(bugs) > len(MUTATED[number])
    survivors = [what for what, spoilt in bugs if not caught(spoilt, checks)]
    assert not survivors, "\n".join(survivors)
