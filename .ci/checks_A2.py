"""Checks of what A2 exports: the critics' gradient by hand, its update, and long runs."""

import copy
import math
import tempfile
import warnings
from pathlib import Path

import torch
from checks_sac import a_fresh_agent, same_agent
from exported import close, double, refuses, spy
from torch.utils.flop_counter import FlopCounterMode


def counts_are_pytorchs(m):
    for size, n, hidden in ((5, 0, (8,)), (4, 3, (16, 8)), (6, 2, (8, 4, 2))):
        critic = m.TwinCritic(3, 2, hidden)
        with FlopCounterMode(display=False) as counter:
            critic(torch.zeros(size, 3), torch.zeros(size, 3 * n + 1, 2)).sum().backward()
        assert counter.get_total_flops() == 2 * m.multiply_adds(size, n, (5, *hidden, 1))


def step_is_autograd(m):
    """The gradient of 04's loss, for any sizes and chunks; with a floor, without small weights."""
    small, wide = ((8,), 10, 4, 0.0), ((8, 16, 4), 10, 5, 0.0)
    for hidden, size, chunk, floor in (small, wide, ((), 9, 2, 0.0), ((8, 16), 10, 16, 0.1)):
        torch.manual_seed(0)
        critic = m.TwinCritic(3, 2, hidden).double()
        obs, action, target = double(size, 3), double(size, 2, seed=1), double(size, seed=2)
        samples, log_density = double(size, 12, 2, seed=3), double(size, 12, seed=4)
        step = m.FastCriticStep(critic, size, 4, chunk, floor)
        for weight in (0.7, 0.0):
            q = critic(obs, torch.cat([action[:, None], samples], 1))
            rest = q[..., 1:], log_density, weight
            loss, parts = m.cql_sac_critic_loss(q[..., 0], target, *rest)
            omega = (q[..., 1:] - log_density).softmax(-1).detach()
            left_out = (omega * (omega <= floor) * q[..., 1:]).sum(-1).mean(-1).sum()
            gradients = torch.autograd.grad(loss - weight * left_out, critic.parameters())
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # a buffer that does not fit
                said = step(obs, action, target, samples, log_density, weight)
            for name, value in (parts | {"loss": loss.detach()}).items():
                close(said[name], value)
            for p, gradient in zip(critic.parameters(), gradients, strict=True):
                close(p.grad, gradient)
    assert sum(x.numel() for x in step.outputs) == 10 * 13 * (8 + 16 + 1), "larger than the batch"


def update_is_04s(m):
    agent, batch = a_fresh_agent(m)
    expected, step = copy.deepcopy(agent), m.FastCriticStep(agent.critic, 32, 5, 10)

    def step_without_gradients(*given):
        assert not any(x.requires_grad for x in given[:-1])
        return step(*given)

    for _ in range(3):
        state = torch.get_rng_state()
        said = m.fast_cql_sac_update(agent, step_without_gradients, batch, 0.7, 5, 0.9, 0.25)
        torch.set_rng_state(state)
        parts = m.cql_sac_update(expected, batch, 0.7, 5, 0.9, 0.25)
        same_agent(agent, expected, [p.grad for p in expected.critic.parameters()], 1e-4)
        for name, value in parts.items():
            close(said[name], value, 1e-4)
    outside = (batch[0], 2 * batch[1], *batch[2:])
    refuses(ValueError, ["box"], lambda: m.fast_cql_sac_update(agent, step, outside, 1, 5, 1, 1))


def tiny_run(m, path, steps, reward=1.0, width=8, **settings):
    """Weights after a run on random data, rows, and the steps that were reported."""
    torch.manual_seed(0)
    generator, reported = torch.Generator().manual_seed(1), []
    agent = m.make_agent(2, 1, (width,), 1e-3, 1e-3, 0.1)

    def sample():
        x = torch.rand(16, 6, generator=generator)
        return x[:, :2], 2 * x[:, 2:3] - 1, reward * x[:, 0], x[:, 3:5], torch.zeros(16)

    def update(batch):
        return m.cql_sac_update(agent, batch, 1.0, 2, 0.9, 0.1)

    def report(step):
        reported.append(step)
        return {"step": step, "random": torch.rand(()).item()}

    given = report, path, [generator], {"n": 2} | settings
    with spy(m, "check_weights") as looks:
        rows = m.train_long(agent, update, sample, steps, 5, *given)
    assert len(looks) == len([step for step in reported if step])
    parts = agent.critic, agent.actor, agent.critic_target
    weights = [p.detach().flatten() for part in parts for p in part.parameters()]
    return torch.cat([*weights, agent.log_alpha_ent.detach()[None]]), rows, reported


def runs_resume_and_stop(m):
    """A resumed run equals an uninterrupted one; bad numbers stop it, and the checkpoint stays."""
    with tempfile.TemporaryDirectory() as folder:
        whole, half = Path(folder) / "whole.pt", Path(folder) / "half.pt"
        expected, rows, reported = tiny_run(m, whole, 20)
        assert reported == [row["step"] for row in rows] == [0, 5, 10, 15, 20]
        assert tiny_run(m, half, 10)[2] == [0, 5, 10]
        resumed, again, reported = tiny_run(m, half, 20)
        assert torch.equal(resumed, expected) and again == rows and reported == [15, 20]
        before, bad = half.read_bytes(), {"reward": math.nan}
        for error, words, options in (
            (FloatingPointError, ["after step 20", "step 1:", "batch"], bad),
            (ValueError, ["half.pt", "0.5"], {"tau": 0.5}),
            (ValueError, ["half.pt", "size"], {"width": 4}),
        ):
            refuses(error, words, lambda o=options: tiny_run(m, half, 40, **o))
        assert half.read_bytes() == before and len(list(Path(folder).iterdir())) == 2
        half.write_bytes(before[:100])
        refuses(ValueError, ["half.pt"], lambda: tiny_run(m, half, 40))


def bad_weights_are_noticed(m):
    for name in ("log_alpha_ent", "actor", "critic"):
        agent = m.make_agent(2, 1, (8,), 1e-3, 1e-3, 0.1)
        m.check_weights(agent)
        part = getattr(agent, name)
        (part if name == "log_alpha_ent" else next(part.parameters())).data.fill_(math.inf)
        refuses(FloatingPointError, ["weight"], lambda agent=agent: m.check_weights(agent))


CHECKS = [
    counts_are_pytorchs, step_is_autograd, update_is_04s, runs_resume_and_stop,
    bad_weights_are_noticed,
]  # fmt: skip
