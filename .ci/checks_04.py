"""Checks of what notebook 04 exports: CQL(H) on top of SAC, on one agent."""

import copy
import math

import numpy as np
import torch
from checks_sac import a_fresh_agent, an_actor, boxes, same_agent, written_out
from exported import close, double, numbers, refuses, spy


def integral_by_hand(m):
    """Q = c and uniform samples on [-1, 1]^D: the log of the integral is c + D log 2."""
    q = numbers(1.5, -700.0, 900.0)[:, None].expand(2, 3, 8)
    log_density = torch.full((3, 8), -6 * math.log(2), dtype=torch.float64)
    close(m.log_integral_exp_q(q, log_density), q[..., 0] + 6 * math.log(2))
    assert m.log_integral_exp_q(q.float(), log_density.float()).dtype == torch.float32
    refuses(ValueError, ["(2, 8, 3)"], lambda: m.log_integral_exp_q(q.mT, log_density))


def proposals_are_what_they_say(m):
    """Own densities; the uniform fills the box; next_obs only moves the second block."""
    for box, low, high in boxes():
        actor, obs, next_obs = an_actor(m, **box), double(6, 3), double(6, 3, seed=1)
        actions, log_density = m.propose(actor, obs, next_obs, 400)
        assert actions.shape == (6, 1200, 2) and actions.dtype == torch.float64
        here, there, uniform = actions.split(400, 1)
        flat = torch.full((6, 400), -2 * math.log(high - low), dtype=torch.float64)
        expected = actor.log_prob(obs, here), actor.log_prob(next_obs, there), flat
        close(log_density, torch.cat(expected, 1), 1e-6)
        assert low <= uniform.min() < low + 0.1 and high - 0.1 < uniform.max() <= high
        assert (uniform.std((0, 1)) / (high - low) - 12**-0.5).abs().max() < 0.02
        assert uniform[:, :, 0].ne(uniform[:, :, 1]).all()


def box_is_checked(m):
    """Each dimension has bounds of its own; the message names the widest of both."""
    actor = an_actor(m, low=(-2.0, -1.0), high=(3.0, 1.0))
    corners = torch.stack([actor.centre - actor.scale, actor.centre + actor.scale])
    m.check_box(actor, corners)
    for outside, got in ((corners + numbers(0.0, 0.01), "-2 to 3"), (1.5 * corners, "-3 to 4.5")):
        words = ["-2 to 3", f"got {got}", "make_agent"]
        refuses(ValueError, words, lambda: m.check_box(actor, outside))  # noqa: B023


def update_is_what_it_says(m):
    """One step of gradient descent against the same step written out."""
    variants = (False, torch.amin), (True, torch.amin), (False, torch.mean)
    for entropy_in_target, combine in variants:
        agent, batch = a_fresh_agent(m)
        expected, state = copy.deepcopy(agent), torch.get_rng_state()
        with spy(m, "cql_sac_critic_loss") as calls:
            said = m.cql_sac_update(agent, batch, 0.7, 5, 0.9, 0.25, combine, entropy_in_target)
        assert len(calls) == 1
        assert not any(c.target.requires_grad or c.log_density.requires_grad for c in calls)
        assert not said["loss"].requires_grad and not said["gap"].requires_grad
        torch.set_rng_state(state)
        bonus = 0.2 if entropy_in_target else 0.0
        gradients, td, gap = written_out(expected, batch, bonus, combine, m.propose, 0.7)
        same_agent(agent, expected, gradients, 1e-4)
        for name, value in (("td", td), ("gap", gap), ("loss", td + 0.7 * gap.sum())):
            close(said[name], value, 1e-4)
    outside = (batch[0], 2 * batch[1], *batch[2:])
    refuses(ValueError, ["box"], lambda: m.cql_sac_update(agent, outside, 1, 2, 1, 1))


def pendulum_trains(m):
    """Copied code on Pendulum-v1, whose actions lie within +-2, with data of a plain loop."""
    import gymnasium as gym

    env, rows = gym.make("Pendulum-v1"), []
    env.action_space.seed(0)
    obs, _ = env.reset(seed=0)
    for _ in range(300):
        action = env.action_space.sample()
        next_obs, reward, terminated, truncated, _ = env.step(action)
        rows.append((obs, action, reward / 10, next_obs, float(terminated)))
        obs = env.reset()[0] if truncated else next_obs
    data = [torch.tensor(np.stack(column)).float() for column in zip(*rows, strict=True)]

    def sample():
        rows = torch.randint(len(data[0]), (64,))
        return [column[rows] for column in data]

    torch.manual_seed(0)
    agent = m.make_agent(3, 1, (32, 32), 3e-4, 1e-3, 0.2, low=-2.0, high=2.0)
    losses = []

    def update(batch, agent=agent):
        parts = m.cql_sac_update(agent, batch, 1.0, 4, 0.99, 0.01)
        losses.append(parts["loss"].item())
        return parts

    m.train_offline(update, sample, 30)
    assert len(losses) == 30 and losses[-1] < losses[0] and max(map(abs, losses)) < 1e3
    narrow = m.make_agent(3, 1, (32, 32), 3e-4, 1e-3, 0.2)  # low and high forgotten
    step = lambda batch: update(batch, narrow)  # noqa: E731
    refuses(ValueError, ["-1 to 1"], lambda: m.train_offline(step, sample, 1))


CHECKS = [
    integral_by_hand, proposals_are_what_they_say, box_is_checked, update_is_what_it_says,
    pendulum_trains,
]  # fmt: skip
