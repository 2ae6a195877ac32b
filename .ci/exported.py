"""The cells tagged `export` of a notebook, joined in order, and independent checks of what they define.

A check is a function of the module and raises where the module is wrong. test_export.py runs each check on
the code as it stands, and then on copies with one planted bug each: every copy must fail at least one check.
"""
import copy
import itertools
import json
import math
import tempfile
import types
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = {p.name.split("_")[0]: p for p in sorted((ROOT / "notebooks").glob("*.ipynb"))}


def export_source(number):
    cells = json.loads(NOTEBOOKS[number].read_text())["cells"]
    parts = ["".join(c["source"]) for c in cells if "export" in c["metadata"].get("tags", [])]
    return "\n\n\n".join(parts) + "\n" if parts else ""


def as_module(source):
    module = types.ModuleType("exported")
    exec(compile(source, "exported.py", "exec"), module.__dict__)
    return module


def close(a, b, tolerance=1e-12):
    """Equal values, and the same shape and dtype."""
    b = torch.as_tensor(b, dtype=a.dtype)
    assert a.shape == b.shape, (a.shape, b.shape)
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def double(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---- 03: discrete CQL ---------------------------------------------------------------------------------

def gap_by_hand(m):
    q = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0], [1000.0, 1000.0]], dtype=torch.float64)
    close(m.cql_gap(q, torch.tensor([0, 1, 1])), [math.log(4 / 3), math.log(2), math.log(2)])


def gap_shapes_and_dtypes(m):
    for lead in [(), (5,), (2, 3)]:
        q, action = double(*lead, 7, 4), torch.randint(4, (*lead, 7))
        gap = m.cql_gap(q, action)
        close(gap, F.cross_entropy(q.reshape(-1, 4), action.reshape(-1), reduction="none").view(*lead, 7))
        assert m.cql_gap(q.float(), action).dtype == torch.float32


def gap_gradient(m):
    q, action = double(6, 3).requires_grad_(), torch.tensor([0, 1, 2, 0, 1, 2])
    assert torch.autograd.gradcheck(lambda q: m.cql_gap(q, action), q)
    (gradient,) = torch.autograd.grad(m.cql_gap(q, action).sum(), q)
    close(gradient, q.softmax(-1) - F.one_hot(action, 3))


def target_by_hand(m):
    reward, terminated = torch.tensor([1.0, 1.0, -2.0]).double(), torch.tensor([0.0, 1.0, 0.0]).double()
    online = torch.tensor([[5.0, 0.0], [0.0, 5.0], [0.0, 9.0]]).double()
    target = torch.tensor([[3.0, 7.0], [3.0, 7.0], [6.0, 4.0]]).double()
    close(m.td_target(reward, terminated, online, target, 0.5), [2.5, 1.0, 0.0])


def target_shapes_and_dtypes(m):
    reward, terminated = double(3, 5), (double(3, 5) > 0).double()
    online, target = double(3, 5, 2), double(3, 5, 2, seed=1)
    both = m.td_target(reward, terminated, online, target, 0.9)
    for e, b in itertools.product(range(3), range(5)):
        best = target[e, b, online[e, b].argmax()]
        close(both[e, b], reward[e, b] + 0.9 * (1 - terminated[e, b]) * best)
    singles = [x.float() for x in (reward, terminated, online, target)]
    assert m.td_target(*singles, 0.9).dtype == torch.float32


def dqn_loss_by_hand(m):
    q = torch.tensor([[1.0, 1.0], [3.0, 3.0]], dtype=torch.float64)
    action, target = torch.tensor([0, 1]), torch.tensor([0.0, 1.0], dtype=torch.float64)
    close(m.cql_dqn_loss(q, action, target, 0.0), (1 + 4) / 4)
    close(m.cql_dqn_loss(q, action, target, 2.0), (1 + 4) / 4 + 2 * math.log(2))


def dqn_loss_of_several_agents(m):
    """One number per agent, each with its own alpha_cql, each what the agent alone would get."""
    q, action, target = double(3, 8, 2), torch.randint(2, (3, 8)), double(3, 8, seed=1)
    alpha_cql = torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64)
    together = m.cql_dqn_loss(q, action, target, alpha_cql)
    assert together.shape == (3,)
    for e in range(3):
        q_data = q[e].gather(1, action[e][:, None])[:, 0]
        expected = ((q_data - target[e]) ** 2).mean() / 2 + alpha_cql[e] * F.cross_entropy(q[e], action[e])
        close(together[e], expected)
        close(m.cql_dqn_loss(q[e], action[e], target[e], alpha_cql[e].item()), expected)
    twice = m.cql_dqn_loss(q[0].repeat(2, 1), action[0].repeat(2), target[0].repeat(2), 0.5)
    close(twice, m.cql_dqn_loss(q[0], action[0], target[0], 0.5))              # a mean over the batch
    assert m.cql_dqn_loss(q.float(), action, target.float(), 1.0).dtype == torch.float32


def dqn_loss_gradient(m):
    q, action, target = double(6, 3).requires_grad_(), torch.randint(3, (6,)), double(6, seed=1)
    assert torch.autograd.gradcheck(lambda q: m.cql_dqn_loss(q, action, target, 0.7), q)


def dqn_update(m):
    """One step of gradient descent: the target is a constant, and its network follows by tau."""
    torch.manual_seed(0)
    online, slow = (torch.nn.Linear(4, 2).double() for _ in range(2))
    before, slow_before = ([p.detach().clone() for p in net.parameters()] for net in (online, slow))
    obs, next_obs = double(64, 4), double(64, 4, seed=1)
    action, reward = torch.randint(2, (64,)), double(64, seed=2)
    terminated = (double(64, seed=3) > 0).double()
    with torch.no_grad():
        next_q = slow(next_obs)[torch.arange(64), online(next_obs).max(1).indices]
        target = reward + 0.9 * next_q * (terminated == 0)
    q = online(obs)
    loss = ((q[torch.arange(64), action] - target) ** 2).mean() / 2 + 0.3 * F.cross_entropy(q, action)
    gradient = torch.autograd.grad(loss, list(online.parameters()))
    optimizer = torch.optim.SGD(online.parameters(), lr=0.1)
    said = m.update(online, slow, optimizer, (obs, action, reward, next_obs, terminated), 0.3, 0.9, 0.25)
    close(said, loss.detach())
    assert not said.requires_grad and all(p.grad is None for p in slow.parameters())
    for p, old, g in zip(online.parameters(), before, gradient, strict=True):
        close(p, old - 0.1 * g)
    for s, old, p in zip(slow.parameters(), slow_before, online.parameters(), strict=True):
        close(s, 0.75 * old + 0.25 * p)


class Agents(torch.nn.Module):
    """E linear Q functions side by side, or one alone: obs (E, B, 4) or (B, 4) -> (..., 2)."""

    def __init__(self, *lead):
        super().__init__()
        self.weight = torch.nn.Parameter(double(*lead, 4, 2))

    def forward(self, obs):
        return obs @ self.weight


def dqn_update_of_several_agents(m):
    """Agents trained side by side learn what each would learn alone."""
    obs, next_obs, action = double(3, 16, 4), double(3, 16, 4, seed=1), torch.randint(2, (3, 16))
    reward, terminated = double(3, 16, seed=2), torch.zeros(3, 16).double()
    alpha_cql, both = torch.tensor([0.0, 0.5, 2.0]).double(), (Agents(3), Agents(3))
    alone = [(Agents(), Agents()) for _ in range(3)]
    for e, k in itertools.product(range(3), range(2)):
        alone[e][k].weight.data = both[k].weight.data[e].clone()
    batch = obs, action, reward, next_obs, terminated
    m.update(*both, torch.optim.SGD(both[0].parameters(), lr=0.1), batch, alpha_cql, 0.9, 0.5)
    for e in range(3):
        optimizer = torch.optim.SGD(alone[e][0].parameters(), lr=0.1)
        m.update(*alone[e], optimizer, tuple(x[e] for x in batch), alpha_cql[e], 0.9, 0.5)
        for k in range(2):
            close(both[k].weight.data[e], alone[e][k].weight.data)


# ---- 01, 04, A1: soft actor-critic --------------------------------------------------------------------

BOX = {"low": -2.0, "high": 3.0}


def an_actor(m, obs_dim=3, action_dim=1, hidden=(8,), **box):
    torch.manual_seed(0)
    return m.TanhGaussianActor(obs_dim, action_dim, hidden, **box).double()


def density_integrates_to_one(m):
    for box in ({}, BOX):
        low, high = box.get("low", -1.0), box.get("high", 1.0)
        grid = torch.linspace(low, high, 400_002, dtype=torch.float64)[1:-1]
        obs = double(2, 3)
        density = an_actor(m, **box).log_prob(obs, grid.expand(2, -1).unsqueeze(-1)).exp()
        close(density.sum(-1) * (high - low) / 400_001, [1.0, 1.0], 1e-4)


def dimensions_are_independent(m):
    """In two dimensions: the integral over a grid is one as well."""
    line = torch.linspace(-1, 1, 802, dtype=torch.float64)[1:-1]
    grid = torch.cartesian_prod(line, line)
    density = an_actor(m, action_dim=2).log_prob(double(1, 3), grid.unsqueeze(0)).exp()
    close(density.sum(-1) * (2 / 801) ** 2, [1.0], 2e-3)


def sample_and_log_prob_agree(m):
    for box in ({}, BOX):
        actor, obs = an_actor(m, action_dim=2, **box), double(5, 3)
        action, log_pi = actor.sample(obs)
        close(actor.log_prob(obs, action), log_pi, 1e-7)
        actions, log_pis = actor.sample(obs, 4)
        assert actions.shape == (5, 4, 2) and log_pis.shape == (5, 4) and action.shape == (5, 2)
        close(actor.log_prob(obs, actions), log_pis, 1e-7)
        close(actor.log_prob(obs, actions[:, 0]), log_pis[:, 0], 1e-7)
        assert actions.dtype == torch.float64 and actions[:, 0].ne(actions[:, 1]).all()
        low, high = box.get("low", -1.0), box.get("high", 1.0)
        assert (actions >= low).all() and (actions <= high).all()


def samples_follow_the_density(m):
    for box in ({}, BOX):
        actor, obs = an_actor(m, **box), double(1, 3)
        low, high = box.get("low", -1.0), box.get("high", 1.0)
        action, _ = actor.sample(obs, 100_000)
        grid = torch.linspace(low, high, 20_002, dtype=torch.float64)[1:-1]
        density = actor.log_prob(obs, grid[None, :, None]).exp()[0]
        density = density / density.sum()
        mean = (density * grid).sum()
        spread = (density * (grid - mean) ** 2).sum().sqrt()
        assert abs(action.mean() - mean) < 0.02 * (high - low)
        assert abs(action.std() / spread - 1) < 0.02


def bounds_are_finite(m):
    """Data holds actions at the very bounds, in float32."""
    for box in ({}, BOX):
        actor = m.TanhGaussianActor(3, 2, (8,), **box)
        bounds = torch.tensor([[box.get("low", -1.0)] * 2, [box.get("high", 1.0)] * 2])
        assert actor.log_prob(torch.zeros(2, 3), bounds).isfinite().all()


def actor_of_any_depth(m):
    for hidden in [(8,), (8, 8, 8), [4, 5]]:
        actor = m.TanhGaussianActor(3, 2, hidden)
        action, log_pi = actor.sample(torch.zeros(4, 3))
        assert action.shape == (4, 2) and log_pi.shape == (4,)
        log_pi.sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in actor.parameters())


def entropy_ceiling(m):
    """No density on the box has more entropy than the uniform one: log of its volume."""
    for box in ({}, BOX):
        _, log_pi = an_actor(m, action_dim=2, **box).sample(double(50, 3), 500)
        volume = (box.get("high", 1.0) - box.get("low", -1.0)) ** 2
        assert (-log_pi.mean(-1) < math.log(volume) + 0.05).all()


def critic_shapes(m):
    torch.manual_seed(0)
    critic = m.TwinCritic(3, 2, (8, 8)).double()
    obs, actions = double(5, 3), double(5, 4, 2)
    many = critic(obs, actions)
    assert many.shape == (2, 5, 4) and many.dtype == torch.float64
    for k in range(4):
        close(critic(obs, actions[:, k]), many[..., k])
    assert many[0].ne(many[1]).all()                          # two networks, not one twice
    assert critic(obs + 1, actions).ne(many).all() and critic(obs, actions + 1).ne(many).all()
    gradients = torch.autograd.grad(many[0].sum(), list(critic.parameters()), allow_unused=True)
    moved = sum(int(g.ne(0).sum()) for g in gradients if g is not None)
    assert 0 < moved <= sum(p.numel() for p in critic.parameters()) / 2        # the twins share nothing


def critic_of_several_agents(m):
    """With agents=E an axis E stands before the batch, and no agent depends on another's data."""
    torch.manual_seed(0)
    critic, actor = m.TwinCritic(3, 2, (8,), 4), m.TanhGaussianActor(3, 2, (8,), agents=4)
    obs, action = torch.randn(4, 5, 3, requires_grad=True), torch.rand(4, 5, 2)
    q = critic(obs, action)
    assert q.shape == (2, 4, 5) and critic(obs, torch.rand(4, 5, 7, 2)).shape == (2, 4, 5, 7)
    sample, log_pi = actor.sample(obs)
    assert sample.shape == (4, 5, 2) and log_pi.shape == (4, 5)
    (gradient,) = torch.autograd.grad(q[:, 1].sum(), obs)
    assert gradient[1].ne(0).any() and gradient[[0, 2, 3]].eq(0).all()


def mode_is_the_median(m):
    for box in ({}, BOX):
        actor, obs = an_actor(m, action_dim=2, **box), 5 * double(3, 3)
        samples, _ = actor.sample(obs, 50_000)
        close(actor.mode(obs).detach(), samples.median(1).values.detach(), 0.05)


def losses_of_several_agents_add_up(m):
    q, target, log_pi = double(2, 4, 6), double(4, 6, seed=1), double(4, 6, seed=2)
    for loss, arguments in [
        (m.sac_critic_loss, lambda e: (q[:, e], target[e])),
        (m.sac_actor_loss, lambda e: (q[:, e], log_pi[e], 0.3)),
        (m.temperature_loss, lambda e: (double(4, 1, seed=3)[e], log_pi[e], -2.0)),
    ]:
        close(loss(*arguments(slice(None))), sum(loss(*arguments(e)) for e in range(4)))


def sac_critic_loss_by_hand(m):
    q_data = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    target = torch.tensor([0.0, 2.0], dtype=torch.float64)
    close(m.sac_critic_loss(q_data, target), (1 + 0) / 4 + (9 + 4) / 4)
    q, y = double(2, 50), double(50, seed=1)
    close(m.sac_critic_loss(q, y), sum((q[k, b] - y[b]) ** 2 for k in range(2) for b in range(50)) / 100)
    assert m.sac_critic_loss(q.float(), y.float()).dtype == torch.float32
    assert torch.autograd.gradcheck(lambda q: m.sac_critic_loss(q, y), q.requires_grad_())


def sac_target_by_hand(m):
    reward, terminated = double(3), torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    q_next = torch.tensor([[1.0, 2.0, 3.0], [2.0, 1.0, 5.0]], dtype=torch.float64)
    log_pi = torch.tensor([0.5, 0.5, -2.0], dtype=torch.float64)
    expected = reward + torch.tensor([0.9 * (1 - 0.05), 0.0, 0.9 * (3 + 0.2)], dtype=torch.float64)
    close(m.sac_target(reward, terminated, q_next, log_pi, 0.1, 0.9), expected)


def sac_actor_loss_by_hand(m):
    q_pi = torch.tensor([[1.0, 2.0], [3.0, 0.0]], dtype=torch.float64)
    close(m.sac_actor_loss(q_pi, torch.tensor([2.0, 4.0], dtype=torch.float64), 0.1), (0.2 - 1 + 0.4 - 0) / 2)


def temperature_follows_the_entropy(m):
    """Below the target entropy the temperature rises, above it falls; the policy does not move."""
    for entropy, sign in [(-3.0, -1), (-1.0, 1)]:
        log_alpha_ent = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        log_pi = torch.full((4,), -entropy, dtype=torch.float64, requires_grad=True)
        m.temperature_loss(log_alpha_ent, log_pi, -2.0).backward()
        assert log_alpha_ent.grad.sign() == sign and log_pi.grad is None
        close(log_alpha_ent.grad, math.exp(0.3) * (entropy + 2.0))


def an_agent(m, gamma, terminated, steps=300):
    """SAC on a bandit: reward -(action - 0.5)^2 whatever the state, which is one and the same."""
    torch.manual_seed(0)
    agent = m.make_agent(1, 1, (32,), 3e-3, 3e-3, 0.01)
    for _ in range(steps):
        action = 2 * torch.rand(64, 1) - 1
        reward = -(action[:, 0] - 0.5) ** 2
        obs = torch.zeros(64, 1)
        m.sac_update(agent, (obs, action, reward, obs, torch.full((64,), terminated)), gamma, 0.1)
        agent.log_alpha_ent.data.fill_(math.log(0.01))
    return agent


def sac_learns_a_bandit(m):
    agent, action = an_agent(m, 0.9, 1.0), torch.tensor([[0.5], [-0.5]])
    close(agent.critic(torch.zeros(2, 1), action).detach(), [[0.0, -1.0]] * 2, 0.1)
    assert abs(agent.actor.sample(torch.zeros(1, 1), 1000)[0].mean() - 0.5) < 0.1


def sac_sees_the_future(m):
    """Without an end the best action is worth the entropy bonus of all later steps, more or less."""
    agent = an_agent(m, 0.5, 0.0, steps=500)
    _, log_pi = agent.actor.sample(torch.zeros(1, 1), 1000)
    action, later = agent.actor.sample(torch.zeros(1, 1), 1000)
    reward = -((action - 0.5) ** 2).mean()
    value = (reward - 0.01 * log_pi.mean()) / (1 - 0.5)
    q = agent.critic(torch.zeros(1, 1), torch.full((1, 1), 0.5)).min()
    assert abs(q - 0.5 * value) < 0.05, (q, 0.5 * value)


def a_fresh_agent(m):
    """An agent that learns by plain gradient descent, its target network a different one, and a batch for it."""
    torch.manual_seed(0)
    agent = m.make_agent(3, 2, (16,), 0.1, 0.1, 0.2)
    agent.critic_target.load_state_dict(m.TwinCritic(3, 2, (16,)).state_dict())
    for name, optimiser in vars(agent).items():
        if isinstance(optimiser, torch.optim.Optimizer):
            parameters = [p for group in optimiser.param_groups for p in group["params"]]
            setattr(agent, name, torch.optim.SGD(parameters, lr=0.1))
    obs, action, next_obs = torch.randn(32, 3), torch.rand(32, 2) * 2 - 1, torch.randn(32, 3)
    return agent, (obs, action, torch.randn(32), next_obs, (torch.randn(32) > 0).float())


def sac_update_is_what_it_says(m):
    """One step of gradient descent, against the same step written out: critics, actor, temperature."""
    agent, (obs, action, reward, next_obs, terminated) = a_fresh_agent(m)
    expected, state = copy.deepcopy(agent), torch.get_rng_state()

    targets, critic_loss = [], m.sac_critic_loss
    m.sac_critic_loss = lambda q, y: (targets.append(y), critic_loss(q, y))[1]
    m.sac_update(agent, (obs, action, reward, next_obs, terminated), 0.9, 0.25)
    m.sac_critic_loss = critic_loss
    assert not any(y.requires_grad for y in targets)

    torch.set_rng_state(state)
    critic, actor = expected.critic, expected.actor
    with torch.no_grad():
        next_action, log_pi = actor.sample(next_obs)
        v_next = expected.critic_target(next_obs, next_action).amin(0) - 0.2 * log_pi
        target = reward + 0.9 * v_next * (terminated == 0)
    gradients = descend(((critic(obs, action) - target) ** 2).mean(-1).sum() / 2, critic.parameters())
    pi_action, log_pi = actor.sample(obs)
    descend((0.2 * log_pi - critic(obs, pi_action).amin(0)).mean(), actor.parameters())
    descend(-(expected.log_alpha_ent.exp() * (log_pi.detach() - 2)).mean(), [expected.log_alpha_ent])
    for s, p in zip(expected.critic_target.parameters(), critic.parameters(), strict=True):
        s.data = 0.75 * s.data + 0.25 * p.data
    for part in ("critic", "actor", "critic_target"):
        for p, q in zip(getattr(agent, part).parameters(), getattr(expected, part).parameters(), strict=True):
            close(p.data, q.data, 1e-5)
    close(agent.log_alpha_ent.data, expected.log_alpha_ent.data, 1e-5)
    for p, gradient in zip(agent.critic.parameters(), gradients, strict=True):
        close(p.grad, gradient, 1e-5)                         # the actor's loss does not reach the critics
        assert p.requires_grad


def descend(loss, parameters):
    parameters = list(parameters)
    gradients = torch.autograd.grad(loss, parameters)
    for p, gradient in zip(parameters, gradients, strict=True):
        p.data -= 0.1 * gradient
    return gradients


class ShortEpisodes:
    """Episodes of three steps: odd ones hit a time limit, even ones terminate. States show episode, step."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Box(-1, 1, (1,))
    episode = 0

    def reset(self, seed=None):
        self.episode, self.step_number = self.episode + 1, 0
        return self.seen(), {}

    def step(self, action):
        self.step_number += 1
        last, odd = self.step_number == 3, self.episode % 2 == 1
        return self.seen(), 1.0, last and not odd, last and odd, {}

    def seen(self):
        return np.array([self.episode, self.step_number], dtype=np.float32)


def online_data_are_true(m):
    """A time limit starts an episode and is no end: the last successor is stored, and is not terminal."""
    torch.manual_seed(0)
    env, agent, batches = ShortEpisodes(), m.make_agent(2, 1, (8,), 1e-3, 1e-3, 0.1), []
    sample, update = agent.actor.sample, m.sac_update

    def watched(obs):
        assert torch.equal(obs[0], torch.as_tensor(env.seen()))                # acts on the state it is in
        return sample(obs)

    agent.actor.sample, m.sac_update = watched, lambda agent, batch, *_: batches.append(batch)
    m.train_online(env, agent, 0, 40, 20, 16, 0.99, 0.01, lambda *_: None)
    m.sac_update = update
    assert len(batches) == 20
    for obs, action, reward, next_obs, terminated in batches:
        episode, step = obs.unbind(1)
        assert step.max() <= 2 and torch.equal(next_obs, obs + torch.tensor([0.0, 1.0]))
        assert torch.equal(terminated, ((episode % 2 == 0) & (step == 2)).float())
        assert reward.eq(1).all() and action.abs().max() <= 1


# ---- 04: CQL(H) on top of SAC -------------------------------------------------------------------------

def integral_of_a_constant(m):
    """Q = c and uniform samples on [-1, 1]^D: the log of the integral is c + D log 2."""
    q = torch.tensor([1.5, -700.0, 900.0], dtype=torch.float64)[:, None].expand(2, 3, 8)
    log_density = torch.full((3, 8), -6 * math.log(2), dtype=torch.float64)
    close(m.log_integral_exp_q(q, log_density), q[..., 0] + 6 * math.log(2))


def integral_by_hand(m):
    q, log_density = double(2, 5, 4), double(5, 4, seed=1)
    expected = (q.exp() / log_density.exp()).mean(-1).log()
    close(m.log_integral_exp_q(q, log_density), expected, 1e-10)
    close(m.log_integral_exp_q(q[0], log_density), expected[0], 1e-10)
    assert m.log_integral_exp_q(q.float(), log_density.float()).dtype == torch.float32
    assert torch.autograd.gradcheck(lambda q: m.log_integral_exp_q(q, log_density), q.requires_grad_())


def cql_sac_loss_by_hand(m):
    q_data, target = double(2, 5), double(5, seed=1)
    q_samples, log_density = double(2, 5, 4, seed=2), double(5, 4, seed=3)
    sac = ((q_data - target) ** 2).mean(-1).sum() / 2
    gap = (q_samples.exp() / log_density.exp()).mean(-1).log() - q_data
    for alpha_cql in (0.0, 0.7, 5.0):
        loss, parts = m.cql_sac_critic_loss(q_data, target, q_samples, log_density, alpha_cql)
        close(loss, sac + alpha_cql * gap.mean(-1).sum(), 1e-10)
        assert isinstance(parts, dict) and parts
    loss, _ = m.cql_sac_critic_loss(q_data.requires_grad_(), target, q_samples, log_density, 1.0)
    (slope,) = torch.autograd.grad(loss, q_data)
    close(slope, (q_data.detach() - target - 1) / 5, 1e-10)


def proposals_are_what_they_say(m):
    """Own densities; the uniform fills the box, whatever its bounds; next_obs only moves the second block."""
    for box in ({}, BOX):
        actor, obs, next_obs = an_actor(m, action_dim=2, **box), double(6, 3), double(6, 3, seed=1)
        low, high = box.get("low", -1.0), box.get("high", 1.0)
        actions, log_density = m.propose(actor, obs, next_obs, 400)
        assert actions.shape == (6, 1200, 2) and actions.dtype == torch.float64
        here, there, uniform = actions.split(400, 1)
        uniform_density = torch.full((6, 400), -2 * math.log(high - low))
        expected = actor.log_prob(obs, here), actor.log_prob(next_obs, there), uniform_density.double()
        close(log_density, torch.cat(expected, 1), 1e-6)
        assert low <= uniform.min() < low + 0.1 and high - 0.1 < uniform.max() <= high
        assert (uniform.mean((0, 1)) - (low + high) / 2).abs().max() < 0.03 * (high - low)
        assert (uniform.std((0, 1)) / (high - low) - 12**-0.5).abs().max() < 0.02
        assert uniform[:, :, 0].ne(uniform[:, :, 1]).all()


def cql_update_is_what_it_says(m):
    """One step of gradient descent in chunks, against the same step written out: critics, actor, temperature."""
    for entropy_in_target, chunk in ((False, 8), (True, 32), (False, 20)):
        agent, batch = a_fresh_agent(m)
        expected, state = copy.deepcopy(agent), torch.get_rng_state()

        seen, critic_loss = [], m.cql_sac_critic_loss
        m.cql_sac_critic_loss = lambda *args, seen=seen, f=critic_loss: (seen.extend([args[1], args[3]]), f(*args))[1]
        said = m.cql_sac_update(agent, batch, 0.7, 5, 0.9, 0.25, entropy_in_target, chunk)
        m.cql_sac_critic_loss = critic_loss
        assert not any(x.requires_grad for x in seen) and not said["loss"].requires_grad

        torch.set_rng_state(state)
        gradients = written_out(m, expected, batch, 0.2 if entropy_in_target else 0.0, said)
        for p, gradient in zip(agent.critic.parameters(), gradients, strict=True):
            close(p.grad, gradient, 1e-4)                     # the actor's loss does not reach the critics
        for part in ("critic", "actor", "critic_target"):
            for p, q in zip(getattr(agent, part).parameters(), getattr(expected, part).parameters(), strict=True):
                close(p.data, q.data, 1e-5)
        close(agent.log_alpha_ent.data, expected.log_alpha_ent.data, 1e-5)
        assert all(p.requires_grad for p in agent.critic.parameters())


def written_out(m, expected, batch, bonus, said):
    obs, action, reward, next_obs, terminated = batch
    critic, actor = expected.critic, expected.actor
    with torch.no_grad():
        next_action, log_pi = actor.sample(next_obs)
        v_next = expected.critic_target(next_obs, next_action).amin(0) - bonus * log_pi
        target = reward + 0.9 * v_next * (terminated == 0)
        samples, log_density = m.propose(actor, obs, next_obs, 5)
    q_data = critic(obs, action)
    gap = ((critic(obs, samples) - log_density).exp().mean(-1).log() - q_data).mean(-1)
    td = ((q_data - target) ** 2).mean(-1).sum() / 2
    gradients = descend(td + 0.7 * gap.sum(), critic.parameters())
    close(said["gap"], gap.detach(), 1e-4)
    close(said["td"], td.detach(), 1e-4)
    close(said["loss"], (td + 0.7 * gap.sum()).detach(), 1e-4)
    pi_action, log_pi = actor.sample(obs)
    descend((0.2 * log_pi - critic(obs, pi_action).amin(0)).mean(), actor.parameters())
    descend(-(expected.log_alpha_ent.exp() * (log_pi.detach() - 2)).mean(), [expected.log_alpha_ent])
    for s, p in zip(expected.critic_target.parameters(), critic.parameters(), strict=True):
        s.data = 0.75 * s.data + 0.25 * p.data
    return gradients


def bfloat16_is_an_approximation(m):
    """The option changes the gradient of the critics a little, and nothing else; the data's own term not at all."""
    batch = double(64, 3).float(), torch.rand(64, 2), torch.randn(64), torch.randn(64, 3), torch.zeros(64)
    for step, tolerance in ((m.critic_step, 1e-6), (m.sparse_critic_step, 0.0)):
        gradients = []
        for bf16, alpha_cql in ((False, 2.0), (True, 2.0), (False, 0.0), (True, 0.0)):
            torch.manual_seed(0)
            agent = m.make_agent(3, 2, (16, 16), 0.0, 0.0, 0.2)
            agent.critic_target.load_state_dict(m.TwinCritic(3, 2, (16, 16)).state_dict())
            agent.critic_opt = torch.optim.SGD(agent.critic.parameters(), lr=0.0)
            said = m.cql_sac_update(agent, batch, alpha_cql, 4, 0.9, 0.1, False, 32, bf16, step)
            gradients.append((torch.cat([p.grad.flatten() for p in agent.critic.parameters()]), said))
        (exact, one), (rough, two), (plain, _), (same, _) = gradients
        close(plain, same, tolerance)
        assert rough.ne(exact).any() and (rough - exact).norm() < 0.05 * exact.norm()
        close(two["gap"], one["gap"], 0.02)


def cql_update_of_several_agents(m):
    """Agents side by side with a weight each: raising one agent's weight moves that agent alone."""
    batch = torch.randn(3, 16, 4), torch.rand(3, 16, 2), torch.randn(3, 16), torch.randn(3, 16, 4), torch.zeros(3, 16)
    weights = []
    for alpha_cql in ([1.0, 1.0, 1.0], [1.0, 9.0, 1.0]):
        torch.manual_seed(0)
        agent = m.make_agent(4, 2, (8,), 0.0, 0.1, 0.2, agents=3)
        agent.critic_opt = torch.optim.SGD(agent.critic.parameters(), lr=0.1)
        said = m.cql_sac_update(agent, batch, torch.tensor(alpha_cql), 3, 0.9, 0.1, False, 5)
        assert said["gap"].shape == (2, 3)
        weights.append(agent.critic.net.weights[0].detach().view(2, 3, -1))
    moved = (weights[0] - weights[1]).abs().amax((0, 2)) > 1e-6
    assert moved.tolist() == [False, True, False], moved


def rows_with_gradient(critic):
    """A list that grows, at each call of the critic, by the number of actions it is asked about with gradients."""
    rows = []
    critic.register_forward_pre_hook(lambda _, args: rows.append(args[1].shape[:-1].numel() * torch.is_grad_enabled()))
    return rows


def sparse_step_is_the_same_step(m):
    """Samples without weight left out: the gradient of `critic_step` from fewer rows, for one agent or several."""
    two = torch.tensor([0.7, 3.0], dtype=torch.float64)
    for agents, alpha_cql, steep in ((None, 0.7, 700.0), (2, two, torch.tensor([9000.0, 600.0] * 2).view(4, 1, 1))):
        shape = (agents, 64) if agents else (64,)
        torch.manual_seed(0)
        agent = m.make_agent(3, 2, (16, 16), 0.1, 0.1, 0.2, agents=agents)
        agent.critic.double()
        agent.critic.net.weights[-1].data *= steep             # so that most samples have no weight
        agent.critic_opt = torch.optim.SGD(agent.critic.parameters(), lr=0.1)
        data = double(*shape, 3), double(*shape, 2, seed=1), double(*shape, seed=2)
        samples, log_density = double(*shape, 12, 2, seed=3), double(*shape, 12, seed=4)
        with torch.no_grad():
            weight = (agent.critic(data[0], samples) - log_density).softmax(-1).amax(0)
            counts = (weight > 1e-8).flatten(-2).sum(-1).view(-1)
        assert counts[-1] > 256 and counts.max() < 512 and (len(counts) == 1 or counts[0] < 256), counts

        steps = {}
        for step in (m.critic_step, m.sparse_critic_step):
            one = copy.deepcopy(agent)
            rows = rows_with_gradient(one.critic)
            options = {"floor": 1e-8} if step is m.sparse_critic_step else {}
            said = step(one, *data, samples, log_density, alpha_cql, 16, **options)
            steps[step] = one, sum(rows) / (agents or 1), said
        (full, all_rows, expected), (sparse, fewer, said) = steps.values()
        assert (all_rows, fewer) == (64 * 13, 64 + 512), (all_rows, fewer)       # 512: the next multiple of 256
        for p, q in zip(full.critic.parameters(), sparse.critic.parameters(), strict=True):
            close(q.grad, p.grad, 1e-6 * p.grad.abs().max().item())
            close(q.data, p.data, 1e-6 * p.data.abs().max().item())
        assert not any(x.requires_grad for x in said.values())
        for name, value in expected.items():
            close(said[name], value, 1e-9 * value.abs().max().item())


def update_hands_on_its_options(m):
    """`cql_sac_update` gives weight, chunk and bf16 to the step on the critics that it is asked to use."""
    agent, batch = a_fresh_agent(m)
    seen = []
    m.cql_sac_update(agent, batch, 0.7, 5, 0.9, 0.25, False, 8, True, lambda *args: seen.extend(args[-3:]) or {})
    assert seen == [0.7, 8, True], f"expected the step on the critics to get weight, chunk, bf16; it got {seen}"


def sparse_step_hears_what_counts(m):
    """Without a floor given, samples count down to a weight of epsilon / M, epsilon of the arithmetic in use."""
    for bf16, epsilon in ((False, 2.0**-23), (True, 2.0**-7)):
        for weight, heard in ((0.5 * epsilon, 64 * 12), (0.05 * epsilon, 256)):          # 1 / M = 0.083
            agent = m.make_agent(3, 2, (16,), 0.1, 0.1, 0.2)
            rows = rows_with_gradient(agent.critic)
            for p in agent.critic.parameters():
                p.data.zero_()                                   # Q = 0: a weight is one over its density
            log_density = torch.full((64, 12), -math.log(weight))
            log_density[:, 0] = 0.0                              # one sample of each state has nearly all of it
            data = double(64, 3).float(), double(64, 2, seed=1).float(), double(64, seed=2).float()
            m.sparse_critic_step(agent, *data, double(64, 12, 2, seed=3).float(), log_density, 1.0, 64, bf16)
            assert sum(rows) == 64 + heard, (bf16, weight, sum(rows) - 64, heard)


def the_look_in_bfloat16(m):
    """`q_in_bfloat16` gives the bits of autocast, for one agent or several; a NaN in critic or actor shows."""
    for agents in (None, 2):
        shape = (agents, 32) if agents else (32,)
        torch.manual_seed(0)
        agent = m.make_agent(3, 2, (16, 16), 0.1, 0.1, 0.2, agents=agents)
        obs, samples = double(*shape, 3).float(), double(*shape, 5, 2, seed=1).float()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            expected = agent.critic(obs, samples).float()
        said = m.q_in_bfloat16(agent.critic, obs, samples)
        assert said.dtype == torch.float32 and not said.requires_grad and (expected < 0).any()
        assert torch.equal(said, expected)

        action, number = double(*shape, 2, seed=2).float(), double(*shape, seed=3).float()
        for name in ("critic", "actor"):
            sick = copy.deepcopy(agent)
            getattr(sick, name).net.weights[0].data[..., 0, 0] = -math.nan
            batch = obs, action, number, obs, torch.zeros(shape)
            parts = m.cql_sac_update(sick, batch, 1.0, 5, 0.9, 0.1, bf16=True, step_critics=m.sparse_critic_step)
            assert parts["loss"].isnan()


def runs_resume_and_stop(m):
    """A resumed run equals an uninterrupted one; NaN stops a run, and its last checkpoint stays."""
    def run(path, steps, spoil=None, **options):
        torch.manual_seed(0)
        generator, agent, seen = torch.Generator().manual_seed(1), m.make_agent(2, 1, (8,), 1e-3, 1e-3, 0.1), []

        def sample(n):
            x = torch.rand(n, 6, generator=generator)
            reward = x[:, 0] * (float("nan") if len(seen) == spoil else 1.0)
            seen.append(1)
            return x[:, :2], 2 * x[:, 2:3] - 1, reward, x[:, 3:5], torch.zeros(n)

        m.train_cql(agent, sample, steps, 16, 1.0, 2, 0.9, 0.1, lambda *_: None, 5, path, [generator],
                    **options)
        return torch.cat([p.detach().flatten() for p in [*agent.critic.parameters(), *agent.actor.parameters()]])

    with tempfile.TemporaryDirectory() as folder:
        whole, half = f"{folder}/whole.pt", f"{folder}/half.pt"
        expected = run(whole, 20)
        run(half, 10)
        assert torch.equal(run(half, 20), expected)
        before = Path(half).read_bytes()
        for _ in range(2):
            try:
                run(half, 40, spoil=2)
                raise RuntimeError("a NaN in the rewards went unnoticed")
            except FloatingPointError as error:
                assert "step 23" in str(error) and "batch" in str(error) and "step 20" in str(error), error
        assert Path(half).read_bytes() == before and len(list(Path(folder).iterdir())) == 2
        Path(half).write_bytes(before[:100])
        try:
            run(half, 40)
            raise RuntimeError("a damaged checkpoint went unnoticed")
        except ValueError as error:
            assert "half.pt" in str(error)
        try:
            run(f"{folder}/new.pt", 5, step_critics=lambda *_: None, chunk=None)
            raise RuntimeError("an option that no checkpoint can hold went unnoticed")
        except TypeError as error:
            assert "chunk" in str(error) and not Path(f"{folder}/new.pt").exists()


def lagrange_by_hand(m):
    gap, log_alpha_cql = torch.tensor([2.0, -3.0], dtype=torch.float64, requires_grad=True), double(2)
    log_alpha_cql.requires_grad_()
    loss = m.lagrange_loss(log_alpha_cql, gap, -1.0)
    close(loss, -(log_alpha_cql.exp() * torch.tensor([3.0, -2.0])).sum())
    loss.backward()
    assert gap.grad is None and log_alpha_cql.grad[0] < 0 < log_alpha_cql.grad[1]      # minimising: up, down
    close(m.normalised_gap(double(3), double(3, seed=1), 8.0), double(3) - math.log(8) - double(3, seed=1))


DISCRETE = [gap_by_hand, gap_shapes_and_dtypes, gap_gradient, target_by_hand, target_shapes_and_dtypes,
            dqn_loss_by_hand, dqn_loss_of_several_agents, dqn_loss_gradient, dqn_update,
            dqn_update_of_several_agents]
SAC = [sac_critic_loss_by_hand, sac_target_by_hand, sac_actor_loss_by_hand, temperature_follows_the_entropy,
       losses_of_several_agents_add_up, critic_shapes, critic_of_several_agents, sample_and_log_prob_agree,
       density_integrates_to_one, dimensions_are_independent, samples_follow_the_density, mode_is_the_median,
       bounds_are_finite, actor_of_any_depth, entropy_ceiling, sac_update_is_what_it_says,
       sac_learns_a_bandit, sac_sees_the_future]
CQL_SAC = [integral_of_a_constant, integral_by_hand, cql_sac_loss_by_hand, proposals_are_what_they_say,
           cql_update_is_what_it_says, bfloat16_is_an_approximation, cql_update_of_several_agents,
           sparse_step_is_the_same_step, update_hands_on_its_options, sparse_step_hears_what_counts,
           the_look_in_bfloat16,
           runs_resume_and_stop, lagrange_by_hand]
CHECKS = {"01": SAC, "03": DISCRETE, "04": CQL_SAC + SAC, "A1": [online_data_are_true, *SAC]}
