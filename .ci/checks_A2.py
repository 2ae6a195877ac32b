"""Checks of what A2 exports: SAC and CQL(H) for several agents, faster steps, long runs."""

import copy
import math
import tempfile
from pathlib import Path

import numpy as np
import torch
from exported import close, double, numbers, refuses, spy

BOX = {"low": -2.0, "high": 3.0}


def boxes():
    for box in ({}, BOX):
        yield box, box.get("low", -1.0), box.get("high", 1.0)


def an_actor(m, obs_dim=3, action_dim=2, hidden=(8,), **box):
    torch.manual_seed(0)
    return m.TanhGaussianActor(obs_dim, action_dim, hidden, **box).double()


# ---- networks, losses, proposals ----------------------------------------------------------------
def density_integrates_to_one(m):
    for box, low, high in boxes():
        grid = torch.linspace(low, high, 100_002, dtype=torch.float64)[1:-1, None]
        density = an_actor(m, action_dim=1, **box).log_prob(double(2, 3), grid.expand(2, -1, -1))
        close(density.exp().sum(-1) * (high - low) / 100_001, [1.0, 1.0], 1e-4)
    line = torch.linspace(-1, 1, 802, dtype=torch.float64)[1:-1]
    grid = torch.cartesian_prod(line, line)[None]  # two dimensions are independent
    density = an_actor(m).log_prob(double(1, 3), grid).exp()
    close(density.sum(-1) * (2 / 801) ** 2, [1.0], 2e-3)


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


def agents_side_by_side(m):
    """An axis E stands before the batch, no agent depends on another's data, losses add up."""
    torch.manual_seed(0)
    critic, actor = m.TwinCritic(3, 2, (8,), 4), m.TanhGaussianActor(3, 2, (8,), agents=4)
    obs, action = torch.randn(4, 5, 3, requires_grad=True), torch.rand(4, 5, 2)
    q = critic(obs, action)
    assert q.shape == (2, 4, 5) and critic(obs, torch.rand(4, 5, 7, 2)).shape == (2, 4, 5, 7)
    sample, log_pi = actor.sample(obs)
    assert sample.shape == (4, 5, 2) and log_pi.shape == (4, 5)
    (gradient,) = torch.autograd.grad(q[:, 1].sum(), obs)
    assert gradient[1].ne(0).any() and gradient[[0, 2, 3]].eq(0).all()
    q, target, log_pi, log_alpha = (double(*s) for s in ((2, 4, 6), (4, 6), (4, 6), (4, 1)))
    for loss, arguments in [
        (m.sac_critic_loss, lambda e: (q[:, e], target[e])),
        (m.sac_actor_loss, lambda e: (q[:, e], log_pi[e], 0.3)),
        (m.temperature_loss, lambda e: (log_alpha[e], log_pi[e], -2.0)),
    ]:
        close(loss(*arguments(slice(None))), sum(loss(*arguments(e)) for e in range(4)))


def make_agent_keeps_the_box(m):
    agent = m.make_agent(3, 2, (8,), 1e-3, 1e-2, 0.1, **BOX)
    action, _ = agent.actor.sample(double(1, 3).float(), 1000)
    assert action.min() < -1.5 and action.max() > 2.5
    rates = [opt.param_groups[0]["lr"] for opt in (agent.actor_opt, agent.critic_opt)]
    assert rates == [1e-3, 1e-2] and abs(agent.log_alpha_ent.exp() - 0.1) < 1e-6


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


def integral_by_hand(m):
    """Q = c and uniform samples on [-1, 1]^D: the log of the integral is c + D log 2."""
    q = numbers(1.5, -700.0, 900.0)[:, None].expand(2, 3, 8)
    log_density = torch.full((3, 8), -6 * math.log(2), dtype=torch.float64)
    close(m.log_integral_exp_q(q, log_density), q[..., 0] + 6 * math.log(2))
    assert m.log_integral_exp_q(q.float(), log_density.float()).dtype == torch.float32


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


# ---- one gradient step, against the same step written out ---------------------------------------
def a_fresh_agent(m, agents=None):
    """It learns by plain gradient descent, its target network is another; and a batch for it."""
    torch.manual_seed(0)
    agent, lead = m.make_agent(3, 2, (16,), 0.1, 0.1, 0.2, agents=agents), (agents or 1, 32)
    agent.critic_target.load_state_dict(m.TwinCritic(3, 2, (16,), agents).state_dict())
    for name, optimizer in vars(agent).items():
        if isinstance(optimizer, torch.optim.Optimizer):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            setattr(agent, name, torch.optim.SGD(parameters, lr=0.1))
    obs, next_obs, reward = torch.randn(*lead, 3), torch.randn(*lead, 3), torch.randn(lead)
    batch = obs, torch.rand(*lead, 2) * 2 - 1, reward, next_obs, (torch.randn(lead) > 0).float()
    return agent, batch if agents else tuple(x[0] for x in batch)


def descend(loss, parameters):
    parameters = list(parameters)
    gradients = torch.autograd.grad(loss, parameters)
    for p, gradient in zip(parameters, gradients, strict=True):
        p.data -= 0.1 * gradient
    return gradients


def written_out(agent, batch, bonus=0.2, propose=None, alpha_cql=0.0):
    """The step on critics, actor and temperature; returns the critics' gradients, td and gap."""
    obs, action, reward, next_obs, terminated = batch
    critic, actor = agent.critic, agent.actor
    with torch.no_grad():
        next_action, log_pi = actor.sample(next_obs)
        q_next = agent.critic_target(next_obs, next_action)
        target = reward + 0.9 * (q_next.amin(0) - bonus * log_pi) * (terminated == 0)
        samples, log_density = propose(actor, obs, next_obs, 5) if propose else (None, None)
    q_data, gap = critic(obs, action), torch.zeros(2)
    td = ((q_data - target) ** 2).mean(-1).sum() / 2
    if propose:
        gap = ((critic(obs, samples) - log_density).exp().mean(-1).log() - q_data).mean(-1)
    gradients = descend(td + alpha_cql * gap.sum(), critic.parameters())
    pi_action, log_pi = actor.sample(obs)
    q_pi = critic(obs, pi_action).amin(0)
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
    """One step of gradient descent, SAC's and CQL's in chunks, against the step written out."""
    agent, batch = a_fresh_agent(m)
    expected, state = copy.deepcopy(agent), torch.get_rng_state()
    with spy(m, "sac_critic_loss") as calls:
        m.sac_update(agent, batch, 0.9, 0.25)
    assert len(calls) == 1 and not calls[0].target.requires_grad
    torch.set_rng_state(state)
    same_agent(agent, expected, written_out(expected, batch)[0])
    for entropy_in_target, chunk in ((False, 8), (True, 32), (False, 20)):
        agent, batch = a_fresh_agent(m)
        expected, state = copy.deepcopy(agent), torch.get_rng_state()
        with spy(m, "cql_sac_critic_loss") as calls:
            said = m.cql_sac_update(agent, batch, 0.7, 5, 0.9, 0.25, entropy_in_target, chunk)
        assert not any(c.target.requires_grad or c.log_density.requires_grad for c in calls)
        assert [len(call.target) for call in calls] == [len(x) for x in batch[2].split(chunk)]
        assert not said["loss"].requires_grad
        torch.set_rng_state(state)
        bonus = 0.2 if entropy_in_target else 0.0
        gradients, td, gap = written_out(expected, batch, bonus, m.propose, 0.7)
        same_agent(agent, expected, gradients, 1e-4)
        for name, value in (("td", td), ("gap", gap), ("loss", td + 0.7 * gap.sum())):
            close(said[name], value, 1e-4)


def update_of_several_agents(m):
    """A weight each: raising one agent's weight moves that agent alone."""
    weights = []
    for alpha_cql in ([1.0, 1.0, 1.0], [1.0, 9.0, 1.0]):
        agent, batch = a_fresh_agent(m, 3)
        said = m.cql_sac_update(agent, batch, torch.tensor(alpha_cql), 3, 0.9, 0.1, False, 5)
        assert said["gap"].shape == (2, 3)
        weights.append(agent.critic.net.weights[0].detach().view(2, 3, -1))
    moved = (weights[0] - weights[1]).abs().amax((0, 2)) > 1e-6
    assert moved.tolist() == [False, True, False], moved


# ---- faster steps -------------------------------------------------------------------------------
def bfloat16_is_an_approximation(m):
    """It changes the critics' gradient a little; the data's own term not at all."""
    obs, next_obs = double(64, 3).float(), torch.randn(64, 3)
    batch = obs, torch.rand(64, 2), torch.randn(64), next_obs, torch.zeros(64)
    for step, tolerance in ((m.critic_step, 1e-6), (m.sparse_critic_step, 0.0)):
        results = []
        for bf16, alpha_cql in ((False, 2.0), (True, 2.0), (False, 0.0), (True, 0.0)):
            torch.manual_seed(0)
            agent = m.make_agent(3, 2, (16, 16), 0.0, 0.0, 0.2)
            agent.critic_target.load_state_dict(m.TwinCritic(3, 2, (16, 16)).state_dict())
            agent.critic_opt = torch.optim.SGD(agent.critic.parameters(), lr=0.0)
            said = m.cql_sac_update(agent, batch, alpha_cql, 4, 0.9, 0.1, False, 32, bf16, step)
            gradient = torch.cat([p.grad.flatten() for p in agent.critic.parameters()])
            results.append((gradient, said["gap"]))
        (exact, gap), (rough, near), (plain, _), (same, _) = results
        close(plain, same, tolerance)
        assert rough.ne(exact).any() and (rough - exact).norm() < 0.05 * exact.norm()
        close(near, gap, 0.02)


def rows_with_gradient(critic):
    """A list of the number of actions, with gradients, that each call of the critic is about."""
    rows = []

    def count(_, args):
        rows.append(args[1].shape[:-1].numel() * torch.is_grad_enabled())

    critic.register_forward_pre_hook(count)
    return rows


def sparse_step_is_the_same_step(m):
    """Samples without weight left out: the gradient of `critic_step` from fewer rows."""
    steep = numbers(9000.0, 600.0, 9000.0, 600.0).view(4, 1, 1)
    for agents, alpha_cql, factor in ((None, 0.7, 700.0), (2, numbers(0.7, 3.0), steep)):
        shape = (agents, 64) if agents else (64,)
        torch.manual_seed(0)
        agent = m.make_agent(3, 2, (16, 16), 0.1, 0.1, 0.2, agents=agents)
        agent.critic.double()
        agent.critic.net.weights[-1].data *= factor  # so that most samples have no weight
        agent.critic_opt = torch.optim.SGD(agent.critic.parameters(), lr=0.1)
        data = double(*shape, 3), double(*shape, 2, seed=1), double(*shape, seed=2)
        samples, log_density = double(*shape, 12, 2, seed=3), double(*shape, 12, seed=4)
        with torch.no_grad():
            weight = (agent.critic(data[0], samples) - log_density).softmax(-1).amax(0)
            counts = (weight > 1e-8).flatten(-2).sum(-1).view(-1)
        assert 256 < counts[-1] < 512 and counts.max() < 512, counts
        assert len(counts) == 1 or counts[0] < 256, counts
        results = []
        for step, options in ((m.critic_step, {}), (m.sparse_critic_step, {"floor": 1e-8})):
            one = copy.deepcopy(agent)
            rows = rows_with_gradient(one.critic)
            said = step(one, *data, samples, log_density, alpha_cql, 16, **options)
            results.append((one, sum(rows) / (agents or 1), said))
        (full, all_rows, expected), (sparse, fewer, said) = results
        assert (all_rows, fewer) == (64 * 13, 64 + 512), (all_rows, fewer)  # multiples of 256
        for p, q in zip(full.critic.parameters(), sparse.critic.parameters(), strict=True):
            close(q.data, p.data, 1e-6 * p.data.abs().max().item())
        for name, value in expected.items():
            assert not said[name].requires_grad
            close(said[name], value, 1e-9 * value.abs().max().item())


def floor_is_that_of_the_arithmetic(m):
    """Samples count down to a weight of epsilon / M, epsilon of the arithmetic in use."""
    for bf16, epsilon in ((False, 2.0**-23), (True, 2.0**-7)):
        for weight, counted in ((0.5 * epsilon, 64 * 12), (0.05 * epsilon, 256)):  # 1 / M = 0.083
            agent = m.make_agent(3, 2, (16,), 0.1, 0.1, 0.2)
            rows = rows_with_gradient(agent.critic)
            for p in agent.critic.parameters():
                p.data.zero_()  # Q = 0: a weight is one over its density
            log_density = torch.full((64, 12), -math.log(weight))
            log_density[:, 0] = 0.0  # one sample of each state has nearly all of it
            data = [x.float() for x in (double(64, 3), double(64, 2), double(64))]
            samples = double(64, 12, 2, seed=3).float()
            m.sparse_critic_step(agent, *data, samples, log_density, 1.0, 64, bf16)
            assert sum(rows) == 64 + counted, (bf16, weight, sum(rows) - 64, counted)


def the_look_in_bfloat16(m):
    """`q_in_bfloat16` gives the bits of autocast; a NaN in critic or actor shows."""
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
        action, reward = double(*shape, 2, seed=2).float(), double(*shape, seed=3).float()
        for name in ("critic", "actor"):
            sick = copy.deepcopy(agent)
            getattr(sick, name).net.weights[0].data[..., 0, 0] = -math.nan
            batch = obs, action, reward, obs, torch.zeros(shape)
            step = {"bf16": True, "step_critics": m.sparse_critic_step}
            assert m.cql_sac_update(sick, batch, 1.0, 5, 0.9, 0.1, **step)["loss"].isnan()


# ---- long runs ----------------------------------------------------------------------------------
def runs_resume_and_stop(m):
    """A resumed run equals an uninterrupted one; NaN stops a run, and its last checkpoint stays."""

    def run(path, steps, spoil=None, alpha_cql=1.0, **options):
        torch.manual_seed(0)
        generator, drawn, rows, after = torch.Generator().manual_seed(1), [], [], []
        agent = m.make_agent(2, 1, (8,), 1e-3, 1e-3, 0.1)

        def sample(n):
            x = torch.rand(n, 6, generator=generator)
            drawn.append(x)
            reward = x[:, 0] * (math.nan if len(drawn) - 1 == spoil else 1.0)
            return x[:, :2], 2 * x[:, 2:3] - 1, reward, x[:, 3:5], torch.zeros(n)

        settings = (16, alpha_cql, 2, 0.9, 0.1, lambda step, _: rows.append(step), 5, path)
        options |= {"rows": rows, "after": lambda: after.append(1)}
        m.train_cql(agent, sample, steps, *settings, [generator], **options)
        weights = [*agent.critic.parameters(), *agent.actor.parameters()]
        return torch.cat([p.detach().flatten() for p in weights]), rows, len(after)

    with tempfile.TemporaryDirectory() as folder:
        whole, half = f"{folder}/whole.pt", f"{folder}/half.pt"
        expected, rows, after = run(whole, 20)
        assert rows == [0, 5, 10, 15, 20] and after == 5
        assert run(half, 10)[2] == 3
        resumed, rows, after = run(half, 20)
        assert torch.equal(resumed, expected) and rows == [0, 5, 10, 15, 20] and after == 2
        before = Path(half).read_bytes()
        for _ in range(2):
            refuses(FloatingPointError, ["step 23", "batch", "step 20"], lambda: run(half, 40, 2))
        assert Path(half).read_bytes() == before and len(list(Path(folder).iterdir())) == 2
        refuses(ValueError, ["half.pt"], lambda: run(half, 40, alpha_cql=2.0))
        Path(half).write_bytes(before[:100])
        refuses(ValueError, ["half.pt"], lambda: run(half, 40))
        new = f"{folder}/new.pt"
        refuses(TypeError, ["chunk"], lambda: run(new, 5, chunk=None))
        assert not Path(new).exists()
    for loss in torch.tensor([-1e8, 1e8, math.nan]):
        parts = {"loss": loss, "td": torch.ones(()), "gap": torch.ones(2)}
        refuses(FloatingPointError, ["step 1"], lambda: m.check_loss(1, parts, (), 1e7, "none"))  # noqa: B023


CHECKS = [
    critic_shapes, agents_side_by_side, sample_and_log_prob_agree, density_integrates_to_one,
    samples_follow_the_density, actor_stays_finite, make_agent_keeps_the_box,
    actor_is_read_from_arrays, integral_by_hand, proposals_are_what_they_say,
    update_is_what_it_says, update_of_several_agents, bfloat16_is_an_approximation,
    sparse_step_is_the_same_step, floor_is_that_of_the_arithmetic, the_look_in_bfloat16,
    runs_resume_and_stop,
]  # fmt: skip
