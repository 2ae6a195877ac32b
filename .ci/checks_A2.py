"""Checks of what A2 exports: the critics' gradient by hand, its update, and long runs."""

import copy
import math
import tempfile
import warnings
from pathlib import Path

import torch
from checks_sac import a_fresh_agent, same_agent
from exported import close, double, refuses
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


def runs_resume_and_stop(m):
    """A resumed run equals an uninterrupted one; bad numbers stop it, and the checkpoint stays."""

    def run(path, steps, spoil=None, width=8, bad=None, **settings):
        torch.manual_seed(0)
        generator, drawn, reported = torch.Generator().manual_seed(1), [], []
        agent = m.make_agent(2, 1, (width,), 1e-3, 1e-3, 0.1)

        def sample():
            x = torch.rand(16, 6, generator=generator)
            drawn.append(x)
            reward = x[:, 0] * (math.nan if len(drawn) == spoil else 1.0)
            return x[:, :2], 2 * x[:, 2:3] - 1, reward, x[:, 3:5], torch.zeros(16)

        def update(batch):
            said = m.cql_sac_update(agent, batch, 1.0, 2, 0.9, 0.1)
            if bad and len(drawn) % 5 == 0:  # just before it would be stored
                part = getattr(agent, bad)
                (part if bad == "log_alpha_ent" else next(part.parameters())).data.fill_(math.nan)
                said["loss"] = torch.zeros(())
            return said

        def report(step):
            reported.append(step)
            return {"step": step, "random": torch.rand(()).item()}

        given = report, path, [generator], {"n": 2} | settings
        rows = m.train_long(agent, update, sample, steps, 5, *given)
        parts = agent.critic, agent.actor, agent.critic_target
        weights = [p.detach().flatten() for part in parts for p in part.parameters()]
        return torch.cat([*weights, agent.log_alpha_ent.detach()[None]]), rows, reported

    with tempfile.TemporaryDirectory() as folder:
        whole, half, new = (Path(folder) / name for name in ("whole.pt", "half.pt", "new.pt"))
        expected, rows, reported = run(whole, 20)
        assert reported == [row["step"] for row in rows] == [0, 5, 10, 15, 20]
        assert run(half, 10)[2] == [0, 5, 10]
        resumed, again, reported = run(half, 20)
        assert torch.equal(resumed, expected) and again == rows and reported == [15, 20]
        before = half.read_bytes()
        words = ["after step 20", "step 3", "batch"]
        refuses(FloatingPointError, words, lambda: run(half, 40, spoil=3))
        words[1:] = ["weight"]
        for name in ("log_alpha_ent", "actor", "critic"):
            refuses(FloatingPointError, words, lambda name=name: run(half, 40, bad=name))
        assert half.read_bytes() == before and len(list(Path(folder).iterdir())) == 2
        refuses(ValueError, ["half.pt", "0.5"], lambda: run(half, 40, tau=0.5))
        refuses(ValueError, ["half.pt", "size"], lambda: run(half, 40, width=4))
        half.write_bytes(before[:100])
        refuses(ValueError, ["half.pt"], lambda: run(half, 40))
        refuses(FloatingPointError, ["after step 0"], lambda: run(new, 5, spoil=1))
        assert not new.exists()


CHECKS = [counts_are_pytorchs, step_is_autograd, update_is_04s, runs_resume_and_stop]
