"""Checks of what notebook 02 exports: backups of tables, and CQL(H) in one state."""

import math

import torch
from exported import close, double, numbers
from torch.nn import functional as F


def world(*lead):
    """Random (policy, behaviour policy, reward, transition) of four states and three actions."""
    policy, beta = (double(*lead, 4, 3, seed=s).softmax(-1) for s in (0, 1))
    return policy, beta, double(*lead, 4, 3, seed=2), double(*lead, 4, 3, 4, seed=3).softmax(-1)


def backup_sums_by_hand(m):
    policy, _, reward, transition = world()
    q, expected = double(4, 3, seed=4), reward.clone()
    for s in range(4):
        for a in range(3):
            for t in range(4):
                mean = sum(policy[t, b] * q[t, b] for b in range(3))
                expected[s, a] += 0.7 * transition[s, a, t] * mean
    close(m.backup(q, policy, reward, transition, 0.7), expected)


def evaluation_is_the_limit_of_backups(m):
    policy, _, reward, transition = world(2)
    q, v = m.evaluate_policy(policy, reward, transition, 0.7)
    for i in range(2):  # several worlds at once
        limit = torch.zeros(4, 3, dtype=torch.float64)
        for _ in range(120):
            value = (policy[i] * limit).sum(1)
            limit = reward[i] + 0.7 * torch.einsum("sat,t->sa", transition[i], value)
        close(q[i], limit)
        close(v[i], (policy[i] * limit).sum(1))
    single = m.evaluate_policy(*(x[0].float() for x in (policy, reward, transition)), 0.7)
    assert [x.dtype for x in single] == [torch.float32] * 2


def conservative_reward_and_chi_square(m):
    policy, beta, reward, _ = world(2)
    for i, s, a in ((0, 0, 0), (1, 3, 2)):
        lowered = reward[i, s, a] - 0.3 * (policy[i, s, a] / beta[i, s, a] - 1)
        close(m.conservative_reward(reward, policy, beta, 0.3)[i, s, a], lowered)
    close(m.chi_square(policy, beta), (policy * (policy / beta - 1)).sum(-1))


def inner_maximum_beats_its_neighbours(m):
    q, rho = double(5, 3), double(5, 3, seed=1).softmax(-1)
    mu, value = m.inner_maximum(q, rho, 0.5)

    def inner(mu):
        return (mu * q).sum(-1) - 0.5 * (mu * (mu / rho).log()).sum(-1)

    close(mu.sum(-1), torch.ones(5))
    close(inner(mu), value)
    for seed in range(20):
        other = (mu.log() + 0.1 * double(5, 3, seed=seed)).softmax(-1)
        assert (inner(other) < value).all()


def gap_is_the_cross_entropy(m):
    q, action = double(2, 6, 3), torch.randint(3, (2, 6))
    expected = F.cross_entropy(q.flatten(0, 1), action.flatten(), reduction="none")
    close(m.cql_gap(q, action), expected.view(2, 6))
    close(m.cql_gap(numbers([1000.0, 1000.0]), torch.tensor([1])), [math.log(2)])


def bandit_has_no_gradient(m):
    target, beta = double(5, 3), double(5, 3, seed=1).softmax(-1)
    target[0] = beta[0].log()  # solved at once, which must not stop the others
    q = m.solve_bandit(target, beta, 0.4).requires_grad_()
    assert q.shape == target.shape
    gap = q.logsumexp(-1) - (beta * q).sum(-1)
    loss = 0.4 * gap + 0.5 * (beta * (q - target) ** 2).sum(-1)
    (gradient,) = torch.autograd.grad(loss.sum(), q)
    close(gradient, torch.zeros(5, 3), 1e-10)
    for weight in (0.0, 1e5):  # Newton's method arrives: no conservatism, and cloning
        q = m.solve_bandit(target, beta, weight)
        close(q if weight == 0 else q.softmax(-1), beta if weight else target, 1e-4)
    # quadratic convergence: six steps are as good as many, which a wrong curvature would not be
    close(m.solve_bandit(target, beta, 0.4, 6), m.solve_bandit(target, beta, 0.4, 60), 1e-9)


CHECKS = [
    backup_sums_by_hand, evaluation_is_the_limit_of_backups, conservative_reward_and_chi_square,
    inner_maximum_beats_its_neighbours, gap_is_the_cross_entropy, bandit_has_no_gradient,
]  # fmt: skip
