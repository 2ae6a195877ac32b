"""Checks of what notebook 03 exports: discrete CQL."""

import itertools
import math

import torch
from exported import close, double, numbers, refuses, spy
from torch.nn import functional as F


def loss_of_several_agents(m):
    """One number per agent, each with its own alpha_cql, each what the agent alone would get."""
    q, action, target = double(3, 8, 2), torch.randint(2, (3, 8)), double(3, 8, seed=1)
    alpha_cql = numbers(0.0, 0.5, 2.0)
    together = m.cql_dqn_loss(q, action, target, alpha_cql)
    assert together.shape == (3,)
    for e in range(3):
        td = (q[e].gather(1, action[e][:, None])[:, 0] - target[e]).square().mean() / 2
        close(together[e], td + alpha_cql[e] * F.cross_entropy(q[e], action[e]))
        close(m.cql_dqn_loss(q[e], action[e], target[e], alpha_cql[e].item()), together[e])
    close(m.cql_gap(numbers([1000.0, 1000.0]), torch.tensor([1])), [math.log(2)])
    single, q = target.float(), q.float()
    assert m.cql_dqn_loss(q, action, single, 1.0).dtype == torch.float32
    assert m.td_target(single, single, q, q, 0.9).dtype == torch.float32


def a_batch(*lead):
    obs, next_obs, reward = double(*lead, 4), double(*lead, 4, seed=1), double(*lead, seed=2)
    terminated = (double(*lead, seed=3) > 0).double()
    return obs, torch.randint(2, lead), reward, next_obs, terminated


def update_is_gradient_descent(m):
    """One step: the target is a constant, and its network follows by tau."""
    torch.manual_seed(0)
    online, slow = (torch.nn.Linear(4, 2).double() for _ in range(2))
    nets = (online, slow)
    before, slow_before = ([p.detach().clone() for p in net.parameters()] for net in nets)
    batch, row = a_batch(64), torch.arange(64)
    obs, action, reward, next_obs, terminated = batch
    with torch.no_grad():
        next_q = slow(next_obs)[row, online(next_obs).max(1).indices]
        target = reward + 0.9 * next_q * (terminated == 0)
    q = online(obs)
    loss = (q[row, action] - target).square().mean() / 2 + 0.3 * F.cross_entropy(q, action)
    gradient = torch.autograd.grad(loss, list(online.parameters()))
    optimizer = torch.optim.SGD(online.parameters(), lr=0.1)
    said = m.update(online, slow, optimizer, batch, 0.3, 0.9, 0.25)
    close(said, loss.detach())
    assert not said.requires_grad and all(p.grad is None for p in slow.parameters())
    for p, old, g in zip(online.parameters(), before, gradient, strict=True):
        close(p, old - 0.1 * g)
    for s, old, p in zip(slow.parameters(), slow_before, online.parameters(), strict=True):
        close(s, 0.75 * old + 0.25 * p)


def agents_side_by_side(m):
    """They compute and learn what each would alone; no ReLU on Q; weights of either sign."""
    torch.manual_seed(0)
    both = [m.QNetwork(4, 2, (8, 8), agents=3).double() for _ in range(2)]
    alone = [[m.QNetwork(4, 2, (8, 8)).double() for _ in range(2)] for _ in range(3)]
    for e, k in itertools.product(range(3), range(2)):
        for one, many in zip(alone[e][k].parameters(), both[k].parameters(), strict=True):
            assert one.abs().max() <= 0.5 and (len(one.flatten()) < 8 or one.min() < 0 < one.max())
            one.data = many.data[e].clone()
    batch, alpha_cql = a_batch(3, 16), numbers(0.0, 0.5, 2.0)
    q = both[0](batch[0])
    assert q.shape == (3, 16, 2) and q.min() < 0 < q.max()
    obs = batch[0][0]
    curve = alone[0][0](2 * obs) - 2 * alone[0][0](obs) + alone[0][0](0 * obs)
    assert curve.abs().max() > 1e-3, "a linear network"
    m.update(*both, torch.optim.SGD(both[0].parameters(), lr=0.1), batch, alpha_cql, 0.9, 0.5)
    for e in range(3):
        close(alone[e][0](batch[0][e]), q[e])
        optimizer = torch.optim.SGD(alone[e][0].parameters(), lr=0.1)
        m.update(*alone[e], optimizer, tuple(x[e] for x in batch), alpha_cql[e], 0.9, 0.5)
        for k in range(2):
            for one, many in zip(alone[e][k].parameters(), both[k].parameters(), strict=True):
                close(one.data, many.data[e])


def train_calls_update(m):
    """Once a step, with a new batch each time and with what it was given itself."""
    torch.manual_seed(0)
    net, drawn, reports = m.QNetwork(4, 2, (8,)), [], []

    def sample(batch_size):
        drawn.append(a_batch(batch_size))
        return drawn[-1]

    options = {"gamma": 0.9, "tau": 0.25, "learning_rate": 0.01, "batch_size": 7}
    with spy(m, "update", lambda *_, **__: torch.ones(())) as calls:
        m.train(sample, net, 0.3, 23, report=lambda *x: reports.append(x), **options)
    assert len(calls) == len(drawn) == 23 and {len(batch[0]) for batch in drawn} == {7}
    for call, batch in zip(calls, drawn, strict=True):
        assert call.q_net is net and call.q_target_net is calls[0].q_target_net is not net
        assert (call.alpha_cql, call.gamma, call.tau) == (0.3, 0.9, 0.25) and call.batch is batch
        assert call.optimizer is calls[0].optimizer
        (group,) = call.optimizer.param_groups
        assert group["lr"] == 0.01 and group["params"] == list(net.parameters())
    for p, slow in zip(net.parameters(), calls[0].q_target_net.parameters(), strict=True):
        assert torch.equal(p, slow) and p.data_ptr() != slow.data_ptr()
    steps = [step for step, q_net in reports if q_net is net]
    assert steps == sorted(set(steps)) and len(steps) == len(reports) and 8 <= len(steps) <= 12
    assert 1 <= steps[0] <= 3 and steps[-1] > 20


def train_stops_at_nan(m):
    """Of one agent, whichever it is."""
    for sick in range(2):

        def sample(batch_size, sick=sick):
            obs, action, reward, next_obs, terminated = (x for x in a_batch(2, batch_size))
            reward[sick] = torch.nan
            return obs.float(), action, reward.float(), next_obs.float(), terminated.float()

        net = m.QNetwork(4, 2, (8,), agents=2)
        refuses(FloatingPointError, ["step"], lambda: m.train(sample, net, 1.0, 20))  # noqa: B023


CHECKS = [
    loss_of_several_agents, update_is_gradient_descent, agents_side_by_side, train_calls_update,
    train_stops_at_nan,
]  # fmt: skip
