"""The implementations of others, on the weights of ours."""

import importlib.util
import platform
import sys
import types
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / ".ci")]
from exported import NOTEBOOKS, as_module, export_source  # noqa: E402

OBS_DIM, ACTION_DIM = 17, 6  # HalfCheetah's


def notebook(number):
    """The export cells of a notebook, as a module."""
    return as_module(export_source(number))


def export_of(path):
    """The source of the export cells of a notebook anywhere."""
    NOTEBOOKS["elsewhere"] = Path(path)
    return export_source("elsewhere")


def load_corl(path):
    """CORL's algorithms/offline/cql.py as a module.

    It imports d4rl, wandb, pyrallis and, once more than is needed here, gym: its script uses them,
    its classes do not. Empty modules stand in for those that are not installed.
    """
    for name in ("d4rl", "wandb", "pyrallis"):
        if importlib.util.find_spec(name) is None:
            sys.modules[name] = types.ModuleType(name)
    sys.modules["pyrallis"].wrap = lambda: lambda function: function
    spec = importlib.util.spec_from_file_location("corl_cql", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["corl_cql"] = module  # its dataclass looks itself up by this name
    spec.loader.exec_module(module)
    return module


def linears(net):
    return [layer for layer in net.modules() if isinstance(layer, nn.Linear)]


@torch.no_grad()
def copy_layers(source, target):
    """Weights and biases of linear layers (lists of equal length) from source to target."""
    for ours, theirs in zip(source, target, strict=True):
        assert ours.weight.shape == theirs.weight.shape, (ours, theirs)
        theirs.weight.copy_(ours.weight)
        theirs.bias.copy_(ours.bias)


def corl_trainer(corl, hidden, **settings):
    """CORL's trainer. Its layers of the policy and the critics are 256 wide: others are put in."""
    actor = corl.TanhGaussianPolicy(OBS_DIM, ACTION_DIM, 1.0)
    critics = [corl.FullyConnectedQFunction(OBS_DIM, ACTION_DIM) for _ in range(2)]

    def stack(*sizes):
        pairs = zip(sizes[:-1], sizes[1:], strict=True)
        return nn.Sequential(*[m for i, o in pairs for m in (nn.Linear(i, o), nn.ReLU())][:-1])

    actor.base_network = stack(OBS_DIM, *hidden, 2 * ACTION_DIM)
    for critic in critics:
        critic.network = stack(OBS_DIM + ACTION_DIM, *hidden, 1)
    adam = [torch.optim.Adam(net.parameters(), 3e-4) for net in (actor, *critics)]
    return corl.ContinuousCQL(
        critics[0], adam[1], critics[1], adam[2], actor, adam[0],
        target_entropy=-float(ACTION_DIM), bc_steps=0, **settings,
    )  # fmt: skip


def corl_from(agent, corl, hidden, **settings):
    """CORL's trainer with the weights of our agent. Its log std is its layer's output minus 1."""
    trainer = corl_trainer(corl, hidden, **settings)
    nets = trainer.critic_1, trainer.critic_2, trainer.target_critic_1, trainer.target_critic_2
    for net in (trainer.actor, *nets):
        net.to(agent.log_alpha_ent.dtype)
    copy_layers(linears(agent.actor.net), linears(trainer.actor.base_network))
    with torch.no_grad():
        linears(trainer.actor.base_network)[-1].bias[ACTION_DIM:] -= trainer.actor.log_std_offset()
    for ours, theirs in zip([*agent.critic.twins, *agent.critic_target.twins], nets, strict=True):
        copy_layers(linears(ours), linears(theirs.network))
    return trainer


def d3rlpy_cql(hidden, **settings):
    """The part of d3rlpy's CQL that computes losses and updates."""
    import d3rlpy

    encoder = d3rlpy.models.VectorEncoderFactory(list(hidden))
    config = d3rlpy.algos.CQLConfig(
        actor_encoder_factory=encoder, critic_encoder_factory=encoder, **settings
    )
    algo = config.create(device="cpu:0")
    algo.create_impl((OBS_DIM,), ACTION_DIM)
    return algo.impl


def d3rlpy_from(agent, hidden, **settings):
    """d3rlpy's CQL with the weights of our agent."""
    impl = d3rlpy_cql(hidden, **settings)
    parts = impl._modules
    for module in (parts.policy, parts.q_funcs, parts.targ_q_funcs, parts.log_temp):
        module.to(agent.log_alpha_ent.dtype)
    next(parts.log_temp.parameters()).data.fill_(agent.log_alpha_ent.item())
    layers = linears(agent.actor.net)
    policy = [*linears(parts.policy._encoder), parts.policy._mu, parts.policy._logstd]
    copy_layers(layers[:-1], policy[:-2])
    with torch.no_grad():
        for half, theirs in zip((0, 1), policy[-2:], strict=True):
            rows = slice(half * ACTION_DIM, (half + 1) * ACTION_DIM)
            theirs.weight.copy_(layers[-1].weight[rows])
            theirs.bias.copy_(layers[-1].bias[rows])
    for ours, theirs in (agent.critic, parts.q_funcs), (agent.critic_target, parts.targ_q_funcs):
        for twin, q_func in zip(ours.twins, theirs, strict=True):
            copy_layers(linears(twin), [*linears(q_func._encoder), q_func._fc])
    return impl


def d3rlpy_discrete(obs_dim, n_actions, hidden, **settings):
    import d3rlpy

    config = d3rlpy.algos.DiscreteCQLConfig(
        encoder_factory=d3rlpy.models.VectorEncoderFactory(list(hidden)), **settings
    )
    algo = config.create(device="cpu:0")
    algo.create_impl((obs_dim,), n_actions)
    return algo.impl


def d3rlpy_batch(obs, action, reward, next_obs, terminated):
    """A batch in d3rlpy's form: reward and terminated are columns."""
    from d3rlpy.torch_utility import TorchMiniBatch

    column = reward.unsqueeze(-1)
    action = action if action.dim() == 2 else action.unsqueeze(-1)
    return TorchMiniBatch(
        observations=obs, actions=action, rewards=column, next_observations=next_obs,
        next_actions=action, returns_to_go=torch.zeros_like(column),
        terminals=terminated.unsqueeze(-1), intervals=torch.ones_like(column), device="cpu:0",
    )  # fmt: skip


def processor():
    """Maker and model of the processor, as the kernel names it, and the family of AMD's."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
    name = facts.get("model name", platform.machine())
    number = int(facts["model"]) if facts.get("model", "").isdigit() else -1
    if facts.get("vendor_id") == "AuthenticAMD" and facts.get("cpu family") == "25":
        # family 25 is Zen 3 and Zen 4; of the server processors, Genoa and later are Zen 4
        zen4 = 0x10 <= number <= 0x1F or 0x60 <= number <= 0x7F or number >= 0xA0
        name += " Zen 4" if zen4 else " Zen 3"
    return name


def free_name(name):
    """The name, if no such table is stored: said before an hour is spent, and not after it."""
    import helpers  # not at the top: JAX's environment has none of what it imports

    path = helpers.FIGS / "data" / f"{name}.csv"
    if path.exists():
        raise FileExistsError(f"{path}: expected no such file; remove it, or set CQL_FIGS")
    return name
