"""Checks of what notebook A4 exports: densities, samples that count, and the Lagrange version."""

import math
from types import SimpleNamespace

import torch
from exported import close, double, numbers


class Bumps:
    """An actor of one known density: Gaussians around obs, in a box that need not be [-1, 1]."""

    scale = numbers(2.5, 0.25, 1.0)

    def log_prob(self, obs, actions):
        return torch.distributions.Normal(obs[:, None], numbers(0.3)[0]).log_prob(actions).sum(-1)


def mixture_is_the_mean_of_three_densities(m):
    """Each proposal has its third, and far from both actors the uniform is a floor."""
    actor, obs, next_obs, actions = Bumps(), double(4, 3), double(4, 3, seed=1), double(4, 7, 3)
    densities = [
        torch.exp(-0.5 * ((actions - x[:, None]) / 0.3) ** 2).prod(-1) / (0.3**2 * math.tau) ** 1.5
        for x in (obs, next_obs)
    ]
    expected = (sum(densities) + 1 / (5.0 * 0.5 * 2.0)) / 3
    close(m.mixture_log_density(actor, obs, next_obs, actions), expected.log())
    far = m.mixture_log_density(actor, obs + 90, next_obs - 90, actions)
    close(far, torch.full((4, 7), -math.log(3 * 5), dtype=torch.float64))
    narrow = SimpleNamespace(scale=actor.scale.float(), log_prob=lambda o, a: a.float().sum(-1))
    assert m.mixture_log_density(narrow, obs, next_obs, actions).dtype == torch.float32


def share_by_its_definition(m):
    """(sum w)^2 / sum w^2 / M, for each twin, however large Q is."""
    q, log_density = double(2, 5, 9), double(5, 9, seed=1)
    w = q.exp() / log_density.exp()
    expected = w.sum(-1) ** 2 / (w**2).sum(-1) / 9
    close(m.effective_share(q, log_density), expected)
    close(m.effective_share(q - 900.0, log_density), expected, 1e-9)
    close(m.effective_share(q.float() + 90.0, log_density.float()), expected, 1e-4)


def lagrange_by_hand(m):
    gap, alpha_cql = numbers(2.0, -3.0, 4.0).requires_grad_(), numbers(0.7)[0].requires_grad_()
    loss = m.lagrange_loss(alpha_cql, gap, -1.0)
    close(loss, torch.tensor(-0.7 * (1.0 + 1.0), dtype=torch.float64))
    loss.backward()
    close(alpha_cql.grad, torch.tensor(-2.0, dtype=torch.float64))
    assert gap.grad is None and loss.shape == ()
    close(m.lagrange_loss(alpha_cql, gap[1], -1.0), torch.tensor(0.7 * 2.0, dtype=torch.float64))


def gap_without_its_constants(m):
    """Zero at Q = 0 in a box of any volume; otherwise the integral minus the data's value."""
    integral, q_data = double(2, 3), double(2, 3, seed=1)
    close(m.normalised_gap(integral, q_data, 8.0), integral - math.log(8) - q_data)
    close(m.normalised_gap(numbers(math.log(30.0)), numbers(0.0), 30.0), [0.0])


CHECKS = [
    mixture_is_the_mean_of_three_densities, share_by_its_definition, lagrange_by_hand,
    gap_without_its_constants,
]  # fmt: skip
