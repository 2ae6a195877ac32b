"""Gradient steps per second of d3rlpy, CORL, JaxCQL and ours: the same sizes, in turns.

JaxCQL runs in a process of its own, which waits while others are timed. Run it on an idle machine.
"""

import argparse
import datetime
import importlib.metadata
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import types
from pathlib import Path

import torch
from others import (
    ACTION_DIM,
    OBS_DIM,
    ROOT,
    corl_trainer,
    d3rlpy_batch,
    d3rlpy_cql,
    d3rlpy_discrete,
    export_of,
    free_name,
    linears,
    load_corl,
    notebook,
    processor,
)

B, GAMMA, TAU, WEIGHT = 256, 0.99, 0.005, 5.0
SETTINGS = (((256, 256), 10), ((128, 128), 4))  # hidden, N
CHUNKS = (8, 16, 32, 64, 128, 256)  # states at a time: which is best depends on the caches
COLUMNS = ["code", "hidden", "samples", "threads", "steps_per_second", "low", "high"]
# notebook 03: its network, batch, and agents of a sweep, seven weights times five seeds
DQN_HIDDEN, DQN_BATCH = (64, 64), 64
DQN_WEIGHTS = torch.tensor([0.0, 1.0, 2.0, 5.0, 10.0, 20.0, 100.0]).repeat_interleave(5)


def random_batch(generator, *lead):
    """obs, action, reward, next_obs, terminated of HalfCheetah's sizes."""

    def draw(*shape):
        return torch.randn(*lead, B, *shape, generator=generator)

    return draw(OBS_DIM), draw(ACTION_DIM).tanh(), draw(), draw(OBS_DIM), torch.zeros(*lead, B)


def batches(count=20):
    generator = torch.Generator().manual_seed(0)
    return [random_batch(generator) for _ in range(count)]


def repeat(step, data):
    """run(k): k steps, each on the next batch."""
    endless = itertools.cycle(data)

    def run(k):
        for _ in range(k):
            step(next(endless))

    return run


def timed(run, k):
    start = time.perf_counter()
    run(k)
    return time.perf_counter() - start


def d3rlpy_run(hidden, n):
    impl = d3rlpy_cql(hidden, n_action_samples=n, conservative_weight=WEIGHT, gamma=GAMMA, tau=TAU,
                      alpha_learning_rate=0)  # fmt: skip
    return repeat(lambda batch: impl.update(batch, 1), [d3rlpy_batch(*x) for x in batches()])


def corl_run(corl, hidden, n):
    trainer = corl_trainer(corl, hidden, cql_n_actions=n, cql_alpha=WEIGHT, discount=GAMMA)
    data = [(o, a, r[:, None], o2, t[:, None]) for o, a, r, o2, t in batches()]
    return repeat(trainer.train, data)


def agent_of_04(hidden):
    return nb04.make_agent(OBS_DIM, ACTION_DIM, hidden, 1e-4, 3e-4, 0.2)


def ours_run(hidden, n):
    agent = agent_of_04(hidden)
    # their 5 without a 1/2 is our 2.5; the cost is the same
    return repeat(lambda x: nb04.cql_sac_update(agent, x, WEIGHT / 2, n, GAMMA, TAU), batches())


def fast_run(a2, hidden, n, chunk):
    agent = agent_of_04(hidden)
    step = a2.FastCriticStep(agent.critic, B, n, chunk)
    return repeat(
        lambda x: a2.fast_cql_sac_update(agent, step, x, WEIGHT / 2, n, GAMMA, TAU), batches()
    )


def products_run(hidden, n, chunk):
    """The matrix products of the critics' step and nothing else, into memory made once.

    For each of the twins and each layer: output, gradient of the weights, and, but for the first
    layer, gradient of the input. State and action are one input, as in the usual code.
    """
    layers = linears(agent_of_04(hidden).critic.twins[0])
    rows = chunk * (3 * n + 1)
    weights = [layer.weight.detach().T.contiguous() for layer in layers]  # (inputs, outputs)
    inputs = [torch.randn(rows, w.shape[0]) for w in weights]
    grads = [torch.randn(rows, w.shape[1]) for w in weights]
    outputs, of_input, of_weight = (
        [torch.empty_like(x) for x in like] for like in (grads, inputs, weights)
    )

    def step(_):
        for _ in range(2 * B // chunk):
            for x, w, y in zip(inputs, weights, outputs, strict=True):
                torch.mm(x, w, out=y)
            for k in reversed(range(len(weights))):
                torch.mm(inputs[k].T, grads[k], out=of_weight[k])
                if k:
                    torch.mm(grads[k], weights[k].T, out=of_input[k])

    return repeat(step, [None])


def dqn_data(agents=None):
    generator = torch.Generator().manual_seed(0)
    shape = (DQN_BATCH,) if agents is None else (agents, DQN_BATCH)

    def batch():
        obs, next_obs = torch.randn(2, *shape, 4, generator=generator)
        action = torch.randint(2, shape, generator=generator)
        return obs, action, torch.ones(shape), next_obs, torch.zeros(shape)

    return [batch() for _ in range(20)]


def discrete_run():
    impl = d3rlpy_discrete(4, 2, DQN_HIDDEN, gamma=GAMMA, alpha=WEIGHT)
    return repeat(lambda batch: impl.update(batch, 1), [d3rlpy_batch(*x) for x in dqn_data()])


def sweep_run(weights):
    """Notebook 03's training step; with several weights their agents side by side."""
    agents = len(weights) if len(weights) > 1 else None
    net = nb03.QNetwork(4, 2, DQN_HIDDEN, agents=agents)
    target_net = nb03.copy.deepcopy(net)
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-4, fused=True)
    weights = weights if agents else weights.item()
    return repeat(
        lambda x: nb03.update(net, target_net, optimizer, x, weights, GAMMA, 0.02), dqn_data(agents)
    )


class JaxChild:
    """JaxCQL in a process that may use so many processors. child(k) takes k steps."""

    def __init__(self, python, jaxcql, hidden, n, threads):
        task = {"path": str(jaxcql), "hidden": hidden, "n": n, "threads": threads}
        command = [python, __file__, "--child", json.dumps(task)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.ask("ready")

    def ask(self, words):
        self.process.stdin.write(f"{words}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().strip()
        if answer != "done":
            raise RuntimeError(f"JaxCQL's process ended, or said {answer!r}")

    def __call__(self, k):
        self.ask(k)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def child(task):
    """JaxCQL's own trainer, jitted: reads numbers of steps, answers when they are done."""
    if hasattr(os, "sched_setaffinity"):  # before XLA makes its threads
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: task["threads"]])
    sys.path.insert(0, task["path"])
    import jax
    import jax.numpy as jnp
    from JaxCQL.conservative_sac import ConservativeSAC
    from JaxCQL.jax_utils import batch_to_jax, init_rng
    from JaxCQL.model import FullyConnectedQFunction, TanhGaussianPolicy

    init_rng(0)
    arch = "-".join(map(str, task["hidden"]))
    nets = (net(OBS_DIM, ACTION_DIM, arch) for net in (TanhGaussianPolicy, FullyConnectedQFunction))
    config = {"cql_n_actions": task["n"], "cql_min_q_weight": WEIGHT, "discount": GAMMA,
              "soft_target_update_rate": TAU, "target_entropy": -float(ACTION_DIM)}  # fmt: skip
    sac = ConservativeSAC(ConservativeSAC.get_default_config(config), *nets)
    # its scalars begin as Python numbers and come back as arrays: jit would compile twice
    sac._train_states = jax.tree.map(
        lambda x: jnp.array(x, dtype=jnp.asarray(x).dtype), sac._train_states
    )
    names = "observations", "actions", "rewards", "next_observations", "dones"
    data = [
        batch_to_jax(dict(zip(names, (x.numpy() for x in batch), strict=True)))
        for batch in batches()
    ]
    run = repeat(sac.train, data)
    for line in sys.stdin:
        run(2 if line.strip() == "ready" else int(line))  # the first call compiles
        jax.block_until_ready(sac.train_states["qf1"].params)
        print("done", flush=True)


def best_chunk(make):
    """Of CHUNKS the fastest for make(chunk), by the best of three short runs each."""
    runs = {chunk: make(chunk) for chunk in CHUNKS}
    for run in runs.values():
        run(1)
    return min(CHUNKS, key=lambda chunk: min(timed(runs[chunk], 2) for _ in range(3)))


def in_turns(runs, seconds, rounds):
    """Steps per second of each code in each round: {code: [...]}; every round has all codes."""
    steps = {}
    for code, run in runs.items():
        run(2)  # warm
        steps[code] = max(1, round(seconds / (timed(run, 3) / 3)))
    rates = {code: [] for code in runs}
    order = list(runs)
    for _ in range(rounds):
        for code in order:
            rates[code].append(steps[code] / timed(runs[code], steps[code]))
        order = [*order[1:], order[0]]  # nobody always follows the same neighbour
    return rates


def rows_of(rates, hidden, n, threads, agents=None):
    for code, values in rates.items():
        values = [x * (agents or {}).get(code, 1) for x in values]
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        row = [code, "-".join(map(str, hidden)), n, threads]
        print(f"{code:28}{row[1]:>9}{n:>4}{threads:>3}{middle:10.2f}  ({low:.2f} to {high:.2f})")
        yield [*row, middle, low, high]


def load_a2(path):
    """The export cells of A2, which build on 04's; None if the fast step is not among them."""
    module = types.ModuleType("a2")
    vars(module).update(vars(nb04))
    source = export_of(path) if Path(path).exists() else ""
    exec(compile(source, str(path), "exec"), vars(module))
    missing = {"FastCriticStep", "fast_cql_sac_update"} - vars(module).keys()
    if missing:
        print(f"{path} does not export {sorted(missing)}: left out")
    return None if missing else module


def measure(options):
    """All rows, and which chunks were chosen."""
    a2, corl = load_a2(options.a2), load_corl(options.corl)
    rows, chosen = [], {}
    for (hidden, n), threads in itertools.product(SETTINGS, options.threads):
        torch.set_num_threads(threads)
        name = f"{hidden[0]}-{hidden[1]}, N = {n}, {threads} thread(s)"
        chunk = best_chunk(lambda c, h=hidden, n=n: products_run(h, n, c))
        chosen[f"products, {name}"] = chunk
        runs = {
            "products": products_run(hidden, n, chunk),
            "d3rlpy": d3rlpy_run(hidden, n),
            "CORL": corl_run(corl, hidden, n),
            "ours": ours_run(hidden, n),
        }
        if a2:
            chunk = best_chunk(lambda c, h=hidden, n=n: fast_run(a2, h, n, c))
            chosen[f"ours, by hand, {name}"] = chunk
            runs["ours, by hand"] = fast_run(a2, hidden, n, chunk)
        jaxcql = None
        if options.jaxcql:
            jaxcql = JaxChild(options.jax_python, options.jaxcql, hidden, n, threads)
            runs["JaxCQL"] = jaxcql
        rows += rows_of(in_turns(runs, options.seconds, options.rounds), hidden, n, threads)
        if jaxcql:
            jaxcql.close()
    side_by_side = f"ours, {len(DQN_WEIGHTS)} side by side"
    for threads in options.threads:
        torch.set_num_threads(threads)
        runs = {"d3rlpy DiscreteCQL": discrete_run(), "ours": sweep_run(DQN_WEIGHTS[5:6]),
                side_by_side: sweep_run(DQN_WEIGHTS)}  # fmt: skip
        rates = in_turns(runs, options.seconds, options.rounds)
        agents = {side_by_side: len(DQN_WEIGHTS)}
        rows += rows_of(rates, DQN_HIDDEN, 0, threads, agents)
    return rows, chosen


def versions(options):
    names = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "d3rlpy")]
    words = [f"Python {platform.python_version()}", *names, f"CORL {options.corl_version}"]
    if options.jaxcql:
        words.append(f"JaxCQL {options.jaxcql_version}")
        code = "import jax, flax; print(f'jax {jax.__version__}, flax {flax.__version__}')"
        answer = subprocess.run([options.jax_python, "-c", code], capture_output=True, text=True)
        words.append(answer.stdout.strip())
    return ", ".join(words)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(json.loads(sys.argv[2]))
        sys.exit()
    import pandas as pd

    import helpers

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="a short name of the processor, for the file: zen3")
    parser.add_argument("--corl", required=True, help="algorithms/offline/cql.py of a clone")
    parser.add_argument("--jaxcql", help="the folder of a clone of young-geng/JaxCQL")
    parser.add_argument("--jax-python", default=sys.executable, help="Python of JAX's environment")
    parser.add_argument("--corl-version", default="eeeeef2", help="the commit of that clone")
    parser.add_argument("--jaxcql-version", default="bac4299", help="the commit of that clone")
    parser.add_argument("--a2", default=ROOT / "notebooks" / "A2_speed.ipynb", help="a notebook")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a code in a round, about")
    options = parser.parse_args()
    name = free_name(f"long/A2_speed_{options.name}")
    nb03, nb04 = notebook("03"), notebook("04")
    rows, chosen = measure(options)
    helpers.save_table(
        pd.DataFrame(rows, columns=COLUMNS), name,
        command=f"python .ci/bench/speed.py {options.name} --corl CORL/algorithms/offline/cql.py "
        + "--jaxcql JaxCQL --jax-python PYTHON " * bool(options.jaxcql)
        + f"--threads {' '.join(map(str, options.threads))} "
        + f"--rounds {options.rounds} --seconds {options.seconds:g}",
        seed=0,
        about="gradient steps per second, median and quartiles over the rounds, all codes in turns "
        "in every round; critics, policy and temperature, batch 256, obs 17, action 6, fixed "
        "weight, random batches made before; products: the critics' matrix products alone; "
        "samples 0: notebook 03's step, batch 64, agents times steps per second",
        chunks=chosen,
        versions=versions(options),
        hardware=f"{processor()}, {os.cpu_count()} processors",
        date=datetime.date.today().isoformat(),
    )  # fmt: skip
