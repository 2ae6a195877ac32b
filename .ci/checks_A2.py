"""Checks of what A2 exports: SAC and CQL(H) for several agents, faster steps, long runs."""

import copy
import math
import tempfile
from pathlib import Path

import torch
from checks_04 import integral_by_hand, proposals_are_what_they_say
from checks_sac import (
    actor_is_read_from_arrays,
    actor_stays_finite,
    critic_shapes,
    density_integrates_to_one,
    descend,
    make_agent_keeps_the_box,
    same_agent,
    sample_and_log_prob_agree,
    samples_follow_the_density,
)
from exported import close, double, numbers, refuses, spy

# ---- networks, losses, proposals ----------------------------------------------------------------


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
