"""Our losses beside those of d3rlpy and CORL: the same weights, batch and noise.

Each library runs its own code from the noise on: actions, densities, Q values, loss, gradient.
"""

import argparse
import contextlib
import copy
import datetime
import importlib.metadata
import math
import platform
from types import SimpleNamespace

import pandas as pd
import torch
from others import (
    ACTION_DIM,
    OBS_DIM,
    corl_from,
    d3rlpy_batch,
    d3rlpy_discrete,
    d3rlpy_from,
    free_name,
    linears,
    load_corl,
    notebook,
    processor,
)

import helpers

HIDDEN, N, B = (256, 256), 10, 256
WEIGHT, GAMMA = 5.0, 0.99
LOG_COUNT = math.log(3 * N)  # theirs is a log of a sum, ours of a mean: they differ by this a twin
COLUMNS = ["library", "version", "quantity", "definition", "theirs", "ours",
           "relative_difference", "relative_difference_float64", "parts_at"]  # fmt: skip
AGREES = "-"


@contextlib.contextmanager
def draws(noise):
    """Hand out these draws, in order, wherever a code asks torch for random numbers.

    A Gaussian is asked for by Normal.rsample (both libraries) or randn_like (ours), a uniform by
    uniform_ on -1 to 1 (both libraries) or rand_like, on 0 to 1 (ours). Draws are (B, D) or
    (B, N, D); d3rlpy wants (N, B, D). All must be used.
    """
    left = list(noise)

    def take(kind, shape):
        asked, draw = left.pop(0)
        assert asked == kind, (asked, kind)
        draw = draw.transpose(0, 1) if tuple(shape) == (N, B, ACTION_DIM) else draw
        return draw.reshape(shape)

    normal = torch.distributions.normal
    saved = normal._standard_normal, torch.Tensor.uniform_, torch.randn_like, torch.rand_like
    normal._standard_normal = lambda shape, dtype, device: take("gauss", shape)
    torch.Tensor.uniform_ = lambda x, low, high: low + (high - low) * take("unit", x.shape)
    torch.randn_like = lambda x: take("gauss", x.shape)
    torch.rand_like = lambda x: take("unit", x.shape)
    try:
        yield
    finally:
        normal._standard_normal, torch.Tensor.uniform_, torch.randn_like, torch.rand_like = saved
    assert not left, f"{len(left)} draws were not used"


def gradient(loss, layers):
    """The gradient of a loss with respect to linear layers, as one vector."""
    parameters = [p for layer in layers for p in (layer.weight, layer.bias)]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])


def compare(theirs, ours):
    """Two numbers, or for gradients their lengths, and the relative difference."""
    theirs, ours = (x.detach().double() for x in (theirs, ours))
    return (
        theirs.norm().item() if theirs.dim() else theirs.item(),
        (ours.norm().item() if ours.dim() else ours.item()),
        ((theirs - ours).norm() / theirs.norm()).item(),
    )


def world(dtype):
    """Agent, batch and noise: the same numbers whatever the precision."""
    torch.manual_seed(0)
    agent = nb04.make_agent(OBS_DIM, ACTION_DIM, HIDDEN, 1e-4, 3e-4, 0.2)
    batch = (torch.randn(B, OBS_DIM), torch.rand(B, ACTION_DIM) * 1.8 - 0.9, 3 * torch.randn(B),
             torch.randn(B, OBS_DIM), (torch.rand(B) < 0.1).float())  # fmt: skip
    for net in (*agent.critic.twins, agent.actor.net):
        with torch.no_grad():  # a fresh network's values hardly differ between actions
            linears(net)[-1].weight *= 10
    agent.critic_target = copy.deepcopy(agent.critic)
    for p in agent.critic_target.parameters():
        p.data += 0.01 * torch.randn_like(p)
    noise = SimpleNamespace(
        next=("gauss", torch.randn(B, ACTION_DIM)), here=("gauss", torch.randn(B, N, ACTION_DIM)),
        there=("gauss", torch.randn(B, N, ACTION_DIM)), box=("unit", torch.rand(B, N, ACTION_DIM)),
    )  # fmt: skip
    for name, (kind, draw) in vars(noise).items():
        setattr(noise, name, (kind, draw.to(dtype)))
    for net in (agent.actor, agent.critic, agent.critic_target):
        net.to(dtype)
    agent.log_alpha_ent = agent.log_alpha_ent.detach().to(dtype)
    return agent, tuple(x.to(dtype) for x in batch), noise


def our_target(agent, batch, noise, mean_action=False, entropy=False):
    """Our TD target: from a sampled action, or from the mean action that d3rlpy takes."""
    _, _, reward, next_obs, terminated = batch
    with torch.no_grad(), draws([] if mean_action else [noise.next]):
        action, log_pi = (
            (agent.actor.mode(next_obs), 0.0) if mean_action else agent.actor.sample(next_obs)
        )
        bonus = agent.log_alpha_ent.exp() if entropy else 0.0
        q_next = agent.critic_target(next_obs, action)
        return nb04.sac_target(reward, terminated, q_next, log_pi, bonus, GAMMA)


def our_loss(agent, batch, noise, target, weight):
    """Loss of 04, with its parts (TD and gap, with gradients), as cql_sac_update calls them."""
    obs, action, _, next_obs, _ = batch
    with torch.no_grad(), draws([noise.here, noise.there, noise.box]):
        samples, log_density = nb04.propose(agent.actor, obs, next_obs, N)
    q = agent.critic(obs, torch.cat([action.unsqueeze(-2), samples], dim=-2))
    arguments = q[..., 0], target, q[..., 1:], log_density
    return (
        nb04.cql_sac_critic_loss(*arguments, weight)[0],
        nb04.cql_sac_critic_loss(*arguments, 0.0)[0],
        nb04.cql_sac_critic_loss(*arguments, 1.0)[0] - nb04.cql_sac_critic_loss(*arguments, 0.0)[0],
    )


def d3rlpy_loss(agent, batch, noise, target_noise, **settings):
    """d3rlpy's whole critic loss, its two parts and its layers."""
    impl = d3rlpy_from(agent, HIDDEN, gamma=GAMMA, n_action_samples=N,
                       conservative_weight=WEIGHT, alpha_learning_rate=0, **settings)  # fmt: skip
    theirs = d3rlpy_batch(*batch)
    with draws([*target_noise, noise.here, noise.there, noise.box]):
        target = impl.compute_target(theirs)
        loss = impl.compute_critic_loss(theirs, target)
    target = batch[2] + GAMMA * (1 - batch[4]) * target.squeeze(-1)
    layers = [x for q in impl._modules.q_funcs for x in (*linears(q._encoder), q._fc)]
    whole, gap = loss.critic_loss, loss.conservative_loss
    return SimpleNamespace(whole=whole, td=whole - gap, gap=gap, target=target, layers=layers)


def corl_loss(agent, batch, noise, **settings):
    """CORL's whole critic loss, its parts, its layers."""
    trainer = corl_from(agent, corl, HIDDEN, discount=GAMMA, cql_n_actions=N, **settings)
    obs, action, reward, next_obs, terminated = batch
    with draws([noise.next, noise.box, noise.here, noise.there]):
        whole, _, _ = trainer._q_loss(
            obs, action, next_obs, reward.unsqueeze(-1), terminated.unsqueeze(-1),
            agent.log_alpha_ent.exp(), {},
        )  # fmt: skip
    layers = [x for q in (trainer.critic_1, trainer.critic_2) for x in linears(q.network)]
    return SimpleNamespace(whole=whole, trainer=trainer, layers=layers)


def continuous_d3rlpy(dtype):
    agent, batch, noise = world(dtype)
    layers = linears(agent.critic)
    half = WEIGHT / 2  # their squared error has no 1/2
    plain = d3rlpy_loss(agent, batch, noise, [], alpha_threshold=0.0)
    target = our_target(agent, batch, noise, mean_action=True)
    whole, td, gap = our_loss(agent, batch, noise, target, half)
    yield "CQL: target", "the mean action in place of a sampled one", plain.target, target, AGREES
    yield "CQL: TD part", "halved; the mean action in the target", plain.td / 2, td, AGREES
    yield ("CQL: conservative part", "divided by the weight; minus log 3N a twin; threshold 0",
           plain.gap / WEIGHT - 2 * LOG_COUNT, gap, AGREES)  # fmt: skip
    words = "halved, so that weight 5 is our 2.5; minus 2.5 log 3N a twin; threshold 0"
    yield "CQL: critic loss", words, plain.whole / 2 - WEIGHT * LOG_COUNT, whole, AGREES
    yield ("CQL: gradient of the critic loss", "halved, so that weight 5 is our 2.5",
           gradient(plain.whole / 2, plain.layers), gradient(whole, layers), AGREES)  # fmt: skip

    soft = d3rlpy_loss(agent, batch, noise, [noise.next], alpha_threshold=0.0, soft_q_backup=True)
    target = our_target(agent, batch, noise, entropy=True)
    words = "soft_q_backup on; ours with entropy_in_target"
    yield "CQL: target", words, soft.target, target, AGREES

    default = d3rlpy_loss(agent, batch, noise, [])  # threshold 10, multiplier 1: its defaults
    whole, _, _ = our_loss(agent, batch, noise, our_target(agent, batch, noise), WEIGHT)
    words = "nothing converted: weight 5 in both; their threshold is 10"
    parts = "no 1/2 in their TD part; no log 3N; 10 off each gap; the mean action in the target"
    yield "CQL: critic loss", words, default.whole, whole, parts
    parts = "no 1/2 in their TD part; the mean action in the target"
    yield ("CQL: gradient of the critic loss", words, gradient(default.whole, default.layers),
           gradient(whole, layers), parts)  # fmt: skip


def continuous_corl(dtype):
    agent, batch, noise = world(dtype)
    layers = linears(agent.critic)
    theirs = corl_loss(agent, batch, noise, cql_alpha=WEIGHT)
    only_td = corl_loss(agent, batch, noise, cql_alpha=0.0).whole
    target = our_target(agent, batch, noise)
    whole, td, gap = our_loss(agent, batch, noise, target, WEIGHT / 2)
    yield "critic loss, TD part", "halved", only_td / 2, td, AGREES
    yield ("critic loss, conservative part", "divided by the weight; minus log 3N a twin",
           (theirs.whole - only_td) / WEIGHT - 2 * LOG_COUNT, gap, AGREES)  # fmt: skip
    words = "halved, so that weight 5 is our 2.5; minus 2.5 log 3N a twin"
    yield "critic loss", words, theirs.whole / 2 - WEIGHT * LOG_COUNT, whole, AGREES
    yield ("gradient of the critic loss", "halved, so that weight 5 is our 2.5",
           gradient(theirs.whole / 2, theirs.layers), gradient(whole, layers), AGREES)  # fmt: skip

    soft = corl_loss(agent, batch, noise, cql_alpha=0.0, backup_entropy=True).whole
    target = our_target(agent, batch, noise, entropy=True)
    words = "halved; backup_entropy on; ours with entropy_in_target"
    yield ("critic loss, TD part", words, soft / 2,
           our_loss(agent, batch, noise, target, 0.0)[1], AGREES)  # fmt: skip

    whole, _, _ = our_loss(agent, batch, noise, our_target(agent, batch, noise), WEIGHT)
    words = "nothing converted: weight 5 in both"
    parts = "no 1/2 in their TD part; no log 3N"
    yield "critic loss", words, theirs.whole, whole, parts

    with draws([noise.next]):  # their function draws, though it is asked about given actions
        answer = theirs.trainer.actor.log_prob(batch[0], batch[1])
    ours = agent.actor.log_prob(batch[0], batch[1])
    words = "the density of the recorded actions, mean over the batch"
    parts = "theirs answers for an action that it draws, and never reads the one that it is given"
    yield "log_prob of the policy", words, answer.mean(), ours.mean(), parts


def discrete(dtype):
    """d3rlpy's DiscreteCQL on CartPole's sizes."""
    torch.manual_seed(0)
    obs_dim, n_actions, hidden = 4, 2, (64, 64)
    net = nb03.QNetwork(obs_dim, n_actions, hidden)
    target_net = copy.deepcopy(net)
    for p in target_net.parameters():
        p.data += 0.02 * torch.randn_like(p)
    net, target_net = net.to(dtype), target_net.to(dtype)
    obs, next_obs = torch.randn(2, B, obs_dim).to(dtype)
    action = torch.randint(n_actions, (B,))
    terminated = (torch.rand(B) < 0.1).to(dtype)
    noise = torch.rand(B).to(dtype)
    impl = d3rlpy_discrete(obs_dim, n_actions, hidden, gamma=GAMMA, alpha=WEIGHT)
    with torch.no_grad():
        for ours, theirs in (net, impl._modules.q_funcs), (target_net, impl._modules.targ_q_funcs):
            theirs.to(dtype)
            layers = [*linears(theirs[0]._encoder), theirs[0]._fc]
            for k, layer in enumerate(layers):
                layer.weight.copy_(ours.weights[k].T)
                layer.bias.copy_(ours.biases[k].flatten())

    def our_gradient(loss):
        g = torch.autograd.grad(loss, [*net.weights, *net.biases], retain_graph=True)
        return torch.cat([x.flatten() for x in g])

    def their_gradient(loss):
        layers = [*linears(impl._modules.q_funcs[0]._encoder), impl._modules.q_funcs[0]._fc]
        weights = [x.weight for x in layers] + [x.bias for x in layers]
        g = torch.autograd.grad(loss, weights, retain_graph=True)
        return torch.cat([(x.T if x.dim() == 2 else x).flatten() for x in g])

    for size in (0.2, 10.0):  # TD errors within 1, where their Huber loss is half a square; beyond
        with torch.no_grad():
            q, q_next = (
                net(obs),
                nb03.td_target(
                    torch.zeros(B, dtype=dtype),
                    terminated,
                    net(next_obs),
                    target_net(next_obs),
                    GAMMA,
                ),
            )
            q_data = q.gather(-1, action.unsqueeze(-1)).squeeze(-1)
            reward = q_data - q_next + size * (noise - 0.5)  # errors of this size
        batch = d3rlpy_batch(obs, action, reward, next_obs, terminated)
        theirs = impl.compute_loss(batch, impl.compute_target(batch))
        with torch.no_grad():
            target = nb03.td_target(reward, terminated, net(next_obs), target_net(next_obs), GAMMA)
        q = net(obs)
        whole, td = (nb03.cql_dqn_loss(q, action, target, weight) for weight in (WEIGHT, 0.0))
        assert ((target - q_data).abs().max() < 1) == (size < 1)
        if size < 1:
            yield ("DiscreteCQL: conservative part", "as it is", theirs.conservative_loss,
                   nb03.cql_gap(q, action).mean(), AGREES)  # fmt: skip
            words = "as it is: each TD error is below 1, where their Huber loss is half a square"
            yield "DiscreteCQL: TD part", words, theirs.td_loss, td, AGREES
            yield "DiscreteCQL: loss", words, theirs.loss, whole, AGREES
            yield ("DiscreteCQL: gradient of the loss", words, their_gradient(theirs.loss),
                   our_gradient(whole), AGREES)  # fmt: skip
        else:
            words = "nothing converted: TD errors up to 5"
            parts = "their Huber loss is linear where a TD error exceeds 1"
            yield "DiscreteCQL: TD part", words, theirs.td_loss, td, parts
            yield ("DiscreteCQL: gradient of the loss", words, their_gradient(theirs.loss),
                   our_gradient(whole), parts)  # fmt: skip


def table(library, version, cases):
    """The rows of a library, in float32, with the relative difference in float64 beside it."""
    for single, double in zip(cases(torch.float32), cases(torch.float64), strict=True):
        quantity, definition, *values, parts = single
        theirs, ours, difference = compare(*values)
        _, _, fine = compare(*double[2:4])
        numbers = f"{theirs:.9g}", f"{ours:.9g}", f"{difference:.2e}", f"{fine:.2e}"
        print(f"{library:7}{quantity:36}{numbers[0]:>14}{numbers[1]:>14}  {numbers[2]}  "
              f"{numbers[3]}  {parts}")  # fmt: skip
        yield [library, version, quantity, definition, *numbers, parts]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corl", required=True, help="algorithms/offline/cql.py of a clone")
    parser.add_argument("--corl-version", default="eeeeef2", help="the commit of that clone")
    options, name = parser.parse_args(), free_name("long/A3_agreement")
    nb03, nb04 = notebook("03"), notebook("04")
    corl = load_corl(options.corl)
    d3rlpy_version = importlib.metadata.version("d3rlpy")
    rows = [
        *table("d3rlpy", d3rlpy_version, discrete),
        *table("d3rlpy", d3rlpy_version, continuous_d3rlpy),
        *table("CORL", options.corl_version, continuous_corl),
    ]
    helpers.save_table(
        pd.DataFrame(rows, columns=COLUMNS), name,
        command="python .ci/bench/agreement.py --corl CORL/algorithms/offline/cql.py",
        seed=0,
        about="same weights, batch of 256 and noise; hidden 256-256, N = 10 (DiscreteCQL: 64-64); "
        "relative difference of a gradient: length of the difference over the length of theirs; "
        "d3rlpy adds up the TD part in float32 whatever the weights are; "
        "CORL's log std is its layer's output minus 1, so that its bias got 1 more",
        versions=f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"d3rlpy {d3rlpy_version}, CORL {options.corl_version}",
        hardware=processor(),
        date=datetime.date.today().isoformat(),
    )  # fmt: skip
