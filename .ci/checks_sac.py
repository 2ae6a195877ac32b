"""Checks of what notebooks 01, 04 and A1 export: soft actor-critic, and A1's online loop."""

import copy
import math

import gymnasium as gym
import numpy as np
import torch
from exported import close, double, refuses, spy

BOX = {"low": -2.0, "high": 3.0}


def boxes():
    for box in ({}, BOX):
        yield box, box.get("low", -1.0), box.get("high", 1.0)


def an_actor(m, obs_dim=3, action_dim=2, hidden=(8,), **box):
    torch.manual_seed(0)
    return m.TanhGaussianActor(obs_dim, action_dim, hidden, **box).double()


# ---- the actor ----------------------------------------------------------------------------------
def density_integrates_to_one(m):
    for box, low, high in boxes():
        grid = torch.linspace(low, high, 100_002, dtype=torch.float64)[1:-1, None]
        density = an_actor(m, action_dim=1, **box).log_prob(double(2, 3), grid.expand(2, -1, -1))
        close(density.exp().sum(-1) * (high - low) / 100_001, [1.0, 1.0], 1e-4)
    line = torch.linspace(-1, 1, 802, dtype=torch.float64)[1:-1]
    grid = torch.cartesian_prod(line, line)[None]  # two dimensions are independent
    density = an_actor(m).log_prob(double(1, 3), grid).exp()
    close(density.sum(-1) * (2 / 801) ** 2, [1.0], 2e-3)


def density_far_out(m):
    """At u = 12, where tanh is 1 to ten digits: the Gaussian's tail, and 2 (log 2 - u) of slope."""
    u, mean, log_std, scale = (torch.tensor([[x]]).double() for x in (12.0, 11.0, 0.5, 2.0))
    tail = -0.5 * math.exp(-1) - 0.5 - 0.5 * math.log(2 * math.pi)
    exact = tail - 2 * (math.log(2) - 12) - math.log(2)
    close(m.squashed_log_density(u, mean, log_std, scale), [exact], 1e-9)


def sample_and_log_prob_agree(m):
    for box, low, high in boxes():
        actor, obs = an_actor(m, **box), double(5, 3)
        action, log_pi = actor.sample(obs)
        close(actor.log_prob(obs, action), log_pi, 1e-7)
        actions, log_pis = actor.sample(obs, 4)
        assert actions.shape == (5, 4, 2) and log_pis.shape == (5, 4) and action.shape == (5, 2)
        close(actor.log_prob(obs, actions), log_pis, 1e-7)
        assert actions.dtype == torch.float64 and actions[:, 0].ne(actions[:, 1]).all()
        assert (actions >= low).all() and (actions <= high).all()


def samples_follow_the_density(m):
    for box, low, high in boxes():
        actor, obs = an_actor(m, action_dim=1, **box), double(1, 3)
        action, _ = actor.sample(obs, 100_000)
        grid = torch.linspace(low, high, 20_002, dtype=torch.float64)[1:-1]
        density = actor.log_prob(obs, grid[None, :, None])[0].softmax(-1)
        mean = (density * grid).sum()
        spread = (density * (grid - mean) ** 2).sum().sqrt()
        assert abs(action.mean() - mean) < 0.02 * (high - low)
        assert abs(action.std() / spread - 1) < 0.02
        close(actor.mode(obs).detach(), action.median(1).values.detach(), 0.05)


def actor_stays_finite(m):
    """At the very bounds of the box, and where the network asks for more spread."""
    for box, low, high in boxes():
        actor = m.TanhGaussianActor(3, 2, (8,), **box)
        bounds = torch.tensor([[low] * 2, [high] * 2])
        assert actor.log_prob(torch.zeros(2, 3), bounds).isfinite().all()
    actor.sample(torch.zeros(4, 3))[1].sum().backward()
    assert all(p.grad.isfinite().all() for p in actor.parameters())
    _, log_std = actor(1e9 * torch.randn(50, 3))
    assert -10 < log_std.min() < log_std.max() < 5, "log_std is not clamped"


# ---- the critic and the losses ------------------------------------------------------------------
def critic_shapes(m):
    torch.manual_seed(0)
    critic = m.TwinCritic(3, 2, (8, 8)).double()
    obs, actions = double(5, 3), double(5, 4, 2)
    many = critic(obs, actions)
    assert many.shape == (2, 5, 4) and many.dtype == torch.float64
    for k in range(4):
        close(critic(obs, actions[:, k]), many[..., k])
    assert many[0].ne(many[1]).all()  # two networks, not one twice
    assert critic(obs + 1, actions).ne(many).all() and critic(obs, actions + 1).ne(many).all()
    gradients = torch.autograd.grad(many[0].sum(), list(critic.parameters()), allow_unused=True)
    moved = sum(int(g.ne(0).sum()) for g in gradients if g is not None)
    assert 0 < moved <= sum(p.numel() for p in critic.parameters()) / 2  # nothing is shared


# ---- one gradient step, against the same step written out ---------------------------------------
def a_fresh_agent(m):
    """It learns by plain gradient descent, its target network is another; and a batch for it."""
    torch.manual_seed(0)
    agent = m.make_agent(3, 2, (16,), 0.1, 0.1, 0.2)
    agent.critic_target.load_state_dict(m.TwinCritic(3, 2, (16,)).state_dict())
    for name, optimizer in vars(agent).items():
        if isinstance(optimizer, torch.optim.Optimizer):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            setattr(agent, name, torch.optim.SGD(parameters, lr=0.1))
    obs, next_obs, reward = torch.randn(32, 3), torch.randn(32, 3), torch.randn(32)
    return agent, (obs, torch.rand(32, 2) * 2 - 1, reward, next_obs, (torch.randn(32) > 0).float())


def descend(loss, parameters):
    parameters = list(parameters)
    gradients = torch.autograd.grad(loss, parameters)
    for p, gradient in zip(parameters, gradients, strict=True):
        p.data -= 0.1 * gradient
    return gradients


def written_out(agent, batch, bonus=0.2, combine=torch.amin, propose=None, alpha_cql=0.0):
    """The step on critics, actor and temperature; returns the critics' gradients, td and gap."""
    obs, action, reward, next_obs, terminated = batch
    critic, actor = agent.critic, agent.actor
    with torch.no_grad():
        next_action, log_pi = actor.sample(next_obs)
        q_next = agent.critic_target(next_obs, next_action)
        target = reward + 0.9 * (combine(q_next, 0) - bonus * log_pi) * (terminated == 0)
        samples, log_density = propose(actor, obs, next_obs, 5) if propose else (None, None)
    q_data, gap = critic(obs, action), torch.zeros(2)
    td = ((q_data - target) ** 2).mean(-1).sum() / 2
    if propose:
        gap = ((critic(obs, samples) - log_density).exp().mean(-1).log() - q_data).mean(-1)
    gradients = descend(td + alpha_cql * gap.sum(), critic.parameters())
    pi_action, log_pi = actor.sample(obs)
    q_pi = combine(critic(obs, pi_action), 0)
    descend((0.2 * log_pi - q_pi).mean(), actor.parameters())
    temperature = agent.log_alpha_ent
    descend(-(temperature.exp() * (log_pi.detach() - 2)).mean(), [temperature])
    for s, p in zip(agent.critic_target.parameters(), critic.parameters(), strict=True):
        s.data = 0.75 * s.data + 0.25 * p.data
    return gradients, td.detach(), gap.detach()


def same_agent(agent, expected, gradients, tolerance=1e-5):
    for part in ("critic", "actor", "critic_target"):
        pairs = (getattr(one, part).parameters() for one in (agent, expected))
        for p, q in zip(*pairs, strict=True):
            close(p.data, q.data, 1e-5)
    close(agent.log_alpha_ent.data, expected.log_alpha_ent.data, 1e-5)
    for p, gradient in zip(agent.critic.parameters(), gradients, strict=True):
        close(p.grad, gradient, tolerance)  # the actor's loss does not reach the critics
        assert p.requires_grad


def update_is_what_it_says(m):
    first = lambda q, dim: q[0]  # noqa: E731
    variants = (torch.amin, True), (torch.mean, True), (first, True), (torch.amin, False)
    for combine, entropy in variants:
        agent, batch = a_fresh_agent(m)
        expected, state = copy.deepcopy(agent), torch.get_rng_state()
        with spy(m, "sac_critic_loss") as calls:
            said = m.sac_update(agent, batch, 0.9, 0.25, combine, entropy)
        assert len(calls) == 1 and not calls[0].target.requires_grad
        torch.set_rng_state(state)
        gradients, td, _ = written_out(expected, batch, 0.2 * entropy, combine)
        same_agent(agent, expected, gradients)
        assert not said["loss"].requires_grad
        close(said["loss"], td, 1e-4)


def make_agent_keeps_the_box(m):
    agent = m.make_agent(3, 2, (8,), 1e-3, 1e-2, 0.1, **BOX)
    action, _ = agent.actor.sample(double(1, 3).float(), 1000)
    assert action.min() < -1.5 and action.max() > 2.5
    rates = [opt.param_groups[0]["lr"] for opt in (agent.actor_opt, agent.critic_opt)]
    assert rates == [1e-3, 1e-2] and abs(agent.log_alpha_ent.exp() - 0.1) < 1e-6


# ---- cells that not every notebook has ----------------------------------------------------------
def cloning_is_maximum_likelihood(m):
    log_prob = double(8)
    close(m.bc_loss(log_prob), -log_prob.mean())
    torch.manual_seed(0)
    actor, obs, action = m.TanhGaussianActor(3, 2, (16,)), torch.randn(64, 3), torch.rand(64, 2)
    before = actor.log_prob(obs, action).mean()
    m.train_bc(actor, lambda: (obs, action, None, None, None), 50, 1e-2)
    assert actor.log_prob(obs, action).mean() > before + 0.5


def actor_is_read_from_arrays(m):
    rng, sizes = np.random.default_rng(0), (3, 8, 5, 4)
    arrays = {"obs_mean": np.zeros(3), "obs_scale": np.ones(3)}
    x = obs = rng.normal(size=(6, 3)).astype(np.float32)
    for i, (n, k) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        w, b = rng.normal(size=(n, k)).astype(np.float32), rng.normal(size=k).astype(np.float32)
        arrays |= {f"w{i}": w, f"b{i}": b}
        x = (np.maximum(x, 0) if i else x) @ w + b
    mode = m.actor_from_arrays(arrays).mode(torch.as_tensor(obs))
    close(mode, np.tanh(x[:, :2]), 1e-5)


def loop_reports(m):
    """`report` sees step 0 and every so often; every step has a batch of its own."""
    drawn, seen, updated = [], [], []

    def sample():
        drawn.append(object())
        return drawn[-1]

    def update(batch):
        updated.append(batch)
        return {"loss": torch.tensor(-1e6), "td": torch.tensor(0.0)}

    m.train_offline(update, sample, 7, seen.append, 3)
    assert seen == [0, 3, 6] and updated == drawn and len(drawn) == 7
    m.train_offline(update, sample, 1)  # no report


def loop_stops(m):
    """It names the step and the likely cause, at once, and does not go on."""
    fine, spoilt = torch.ones(4), torch.tensor([1.0, math.nan])
    for batch, loss, td, words in (
        ([fine, spoilt], math.nan, math.nan, ["step 1", "NaN", "the data"]),
        ([fine, fine, fine], math.nan, 0.0, ["nan", "learning rate"]),
        ([fine, fine, torch.tensor([1.0, -7.0])], 3e3, 2e3, ["TD error", "3e+03", "is 7"]),
        ([fine, fine, fine], -2e3, 10.0, ["gap runs away"]),
    ):
        parts, calls = {"loss": torch.tensor(loss), "td": torch.tensor(td)}, []

        def update(batch, parts=parts, calls=calls):
            calls.append(batch)
            return parts

        def run(update=update, batch=batch):
            m.train_offline(update, lambda: batch, 5, limit=1e3)

        refuses(FloatingPointError, words, run)
        assert len(calls) == 1


class ShortEpisodes:
    """Episodes of three steps: odd ones hit a time limit, even ones end. States: episode, step."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Box(-1, 1, (1,))
    episode, seeds = 0, ()

    def reset(self, seed=None):
        self.episode, self.step_number, self.seeds = self.episode + 1, 0, (*self.seeds, seed)
        return self.seen(), {}

    def step(self, action):
        self.step_number += 1
        last, odd = self.step_number == 3, self.episode % 2 == 1
        return self.seen(), 1.0, last and not odd, last and odd, {}

    def seen(self):
        return np.array([self.episode, self.step_number], dtype=np.float32)


def online_data_are_true(m):
    """A time limit starts an episode and is no end: its last successor is stored, not terminal."""
    torch.manual_seed(0)
    env, agent, states = ShortEpisodes(), m.make_agent(2, 1, (8,), 1e-3, 1e-3, 0.1), []
    sample = agent.actor.sample

    def watched(obs):
        states.append((obs[0], torch.as_tensor(env.seen())))
        return sample(obs)

    agent.actor.sample = watched
    reports = []
    with spy(m, "sac_update", lambda *_: None) as calls:
        memory = m.train_online(env, agent, 5, 40, 20, 16, 0.99, 0.01, reports.append, 8)
    assert reports == [8, 16, 24, 32, 40] and memory.added == len(memory.columns[0]) == 40
    assert len(calls) == len(states) == 20, "one sampled action and one update a step"
    assert all(torch.equal(acted, seen) for acted, seen in states)
    assert env.seeds[0] == 5 and set(env.seeds[1:]) == {None}, "episodes must not repeat a start"
    for call in calls:
        obs, action, reward, next_obs, terminated = call.batch
        episode, step = obs.unbind(1)
        assert step.max() <= 2 and torch.equal(next_obs, obs + torch.tensor([0.0, 1.0]))
        assert torch.equal(terminated, ((episode % 2 == 0) & (step == 2)).float())
        assert reward.eq(1).all() and action.abs().max() <= 1


CHECKS = [
    critic_shapes, sample_and_log_prob_agree, density_integrates_to_one,
    samples_follow_the_density, actor_stays_finite, density_far_out, update_is_what_it_says,
    make_agent_keeps_the_box,
]  # fmt: skip
LOOP = [loop_reports, loop_stops]
READ = [actor_is_read_from_arrays]
ONLINE = [*READ, online_data_are_true]
OFFLINE = [*LOOP, *READ, cloning_is_maximum_likelihood]
