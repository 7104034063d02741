"""Black-box optimisation: a flow of vectors, improved by the value of a function as its reward.

    pip install cma matplotlib
    python examples/studies/blackbox.py         # a table, and blackbox.png beside this file

A flow of 5000 uniform points, but for their best tenth, proposes 100 points a round and learns by
nft.nft_loss. Beside it: random search, reward-weighted regression (RWR) and CMA-ES. Settings of NFT
and RWR are the best of 12 on Ackley's with other data. Diffusion-BBO (2407.00610) is not run.
SPDX-License-Identifier: MIT
"""

import argparse
import copy
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import nft

DIMENSIONS = 20
BATCH = 100
CALLS = 5000
SEEDS = (0, 1, 2)
# Where each function has its minimum, in [-2, 2]^20 of the box [-5, 5]^20.
MINIMUM = 4 * torch.rand(DIMENSIONS, generator=torch.Generator().manual_seed(1234)) - 2


# ---- The functions: x (B, 20), points in [-1, 1] half widths of the box -> (B,), at least 0 ------
def ackley(x):
    """Many shallow pits around one funnel."""
    z = 5 * x - MINIMUM
    bowl = (-0.2 * z.square().mean(1).sqrt()).exp()
    waves = (2 * math.pi * z).cos().mean(1).exp()
    return 20 * (1 - bowl) + math.e - waves


def rastrigin(x):
    """A bowl with a deep pit at every point of whole numbers."""
    z = 5 * x - MINIMUM
    return (z.square() - 10 * (2 * math.pi * z).cos() + 10).sum(1)


def rosenbrock(x):
    """A curved valley with steep walls."""
    z = 5 * x - MINIMUM + 1
    walls = z[:, 1:] - z[:, :-1].square()
    return (100 * walls.square() + (1 - z[:, :-1]).square()).sum(1)


FUNCTIONS = {"Ackley": ackley, "Rastrigin": rastrigin, "Rosenbrock": rosenbrock}


# ---- A flow of vectors x (B, n) given c (B, m): nothing here, what a policy sees in control.py ---
def velocity(net, x_t, t, c):
    """v_theta(x_t, t, c): (B, n), (B, 1), (B, m) -> (B, n)."""
    angle = math.pi * t
    return net(torch.cat([x_t, t, angle.cos(), angle.sin(), c], 1))


def noised(x_0):
    """A time in (0.02, 1] for each x_0, x_t, and v = eps - x_0: (B, 1), (B, n), (B, n)."""
    t = 1 - 0.98 * torch.rand(len(x_0), 1)
    eps = torch.randn_like(x_0)
    alpha_t, sigma_t = nft.alpha_sigma(t)
    return t, alpha_t * x_0 + sigma_t * eps, eps - x_0


def fit(x_0, c, steps=1500):
    """A flow of the points x_0 (N, n) given c (N, m), by flow matching, Eq. (1)."""
    n = x_0.shape[1]
    net = torch.nn.Sequential(
        torch.nn.Linear(n + 3 + c.shape[1], 128),
        torch.nn.GELU(),
        torch.nn.Linear(128, 128),
        torch.nn.GELU(),
        torch.nn.Linear(128, 128),
        torch.nn.GELU(),
        torch.nn.Linear(128, n),
    )
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        index = torch.randint(len(x_0), (512,))
        t, x_t, v = noised(x_0[index])
        optimizer.zero_grad()
        (velocity(net, x_t, t, c[index]) - v).square().mean().backward()
        optimizer.step()
        schedule.step()
    return net


@torch.no_grad()
def sample(net, c, steps=10):
    """Samples (B, n) given c (B, m) by the midpoint rule, from t = 1 to 0."""
    x = torch.randn(len(c), net[-1].out_features)
    for i in range(steps, 0, -1):
        t = torch.full((len(c), 1), i / steps)
        halfway = x - velocity(net, x, t, c) / (2 * steps)
        x = x - velocity(net, halfway, t - 0.5 / steps, c) / steps
    return x


def take_step(theta, old, optimizer, x_0, c, r, loss, beta):
    """Lines 9 to 12 of Algorithm 1, for loss(x0_theta, x0_old, x_0, r, beta) -> (B,)."""
    t, x_t, _ = noised(x_0)
    # nft.predict_x0 of a rectified flow.
    x0_theta = x_t - t * velocity(theta, x_t, t, c)
    with torch.no_grad():
        x0_old = x_t - t * velocity(old, x_t, t, c)
    optimizer.zero_grad()
    loss(x0_theta, x0_old, x_0, r, beta).mean().backward()
    torch.nn.utils.clip_grad_norm_(theta.parameters(), 1.0)
    optimizer.step()


def positive_loss(x0_theta, x0_old, x_0, r, beta):
    """Eq. (5) without its negative branch: (B,). For beta = 1, and weights as r, RWR's loss."""
    x0_positive = (1 - beta) * x0_old + beta * x0_theta
    return r * nft.adaptive_loss(x0_positive, x_0) / beta


# ---- The methods: each returns the values of its calls in their order, as many or a few more -----
def exponential_weights(raw, groups, z):
    """RWR's weights of a group's rewards (B,), average 1; the temperature is z of their spread."""
    return len(raw) * (raw / (z * raw.std())).softmax(0)


# The weights of a round's rewards, z of these, the loss and its beta.
RWR = (exponential_weights, 0.3, positive_loss, 1.0)
NFT = (nft.optimality_reward, 1.0, nft.nft_loss, 0.3)


def improve(function, calls, seed, flow, weigh, z, loss, beta):
    """Algorithm 1 of a copy of a flow, on 8 copies of each point; none gains by leaving the box."""
    torch.manual_seed(seed)
    theta = copy.deepcopy(flow)
    old = copy.deepcopy(flow)
    optimizer = torch.optim.Adam(theta.parameters(), 1e-2)
    nothing = torch.empty(8 * BATCH, 0)
    one_group = torch.zeros(BATCH)
    rounds = []
    for _ in range(calls // BATCH):
        points = sample(old, nothing[:BATCH])
        values = function(points.clamp(-1, 1))
        rounds.append(values)
        x_0 = points.repeat(8, 1)
        r = weigh(-values, one_group, z).repeat(8)
        for _ in range(16):
            take_step(theta, old, optimizer, x_0, nothing, r, loss, beta)
        # eta = 0: the next round's points are of the policy as it is now.
        old.load_state_dict(theta.state_dict())
    return torch.cat(rounds)


def cma_es(function, calls, seed, start, batch):
    """CMA-ES from `start` (20,), a quarter of the box wide; anew from there when it stops."""
    import cma

    settings = {"bounds": [-1, 1], "popsize": batch, "verbose": -9}
    values = []
    while len(values) < calls:
        # A seed of 0 would mean the clock.
        settings["seed"] = 1 + seed + 1000 * len(values)
        search = cma.CMAEvolutionStrategy(start.tolist(), 0.5, settings)
        while not search.stop() and len(values) < calls:
            points = search.ask()
            rows = [point.tolist() for point in points]
            found = function(torch.tensor(rows)).tolist()
            search.tell(points, found)
            values += found
    return torch.tensor(values)


def compare(function, calls, seed):
    """{method: the best value after each call, (calls,)}; the data's and their best tenth's too."""
    torch.manual_seed(seed)
    data = 2 * torch.rand(5000, DIMENSIONS) - 1
    values, order = function(data).sort()
    x_0 = data[order[500:]]
    flow = fit(x_0, torch.empty(len(x_0), 0))
    # Another stream than the data's.
    torch.manual_seed(1000 + seed)
    uniform = 2 * torch.rand(calls, DIMENSIONS) - 1
    found = {
        "random search": function(uniform),
        "RWR": improve(function, calls, seed, flow, *RWR),
        "NFT": improve(function, calls, seed, flow, *NFT),
        "CMA-ES, batches of 100": cma_es(function, calls, seed, x_0[0], 100),
        "CMA-ES": cma_es(function, calls, seed, x_0[0], 12),
        "the data": function(x_0).min().expand(calls),
        "held-out data": values[:1].expand(calls),
    }
    return {method: values[:calls].cummin(0).values for method, values in found.items()}


def print_table(results):
    """How each method ended, mean (each seed). results: {column: {method: curve}, one a seed}."""
    print(f"| method | {' | '.join(results)} |")
    print("| --- " * (1 + len(results)) + "|")
    for method in next(iter(results.values()))[0]:
        line = f"| {method} |"
        for of_seeds in results.values():
            last = torch.stack([curves[method][-1] for curves in of_seeds])
            each = ", ".join(f"{value:.4g}" for value in last)
            line += f" {last.mean():.4g} ({each}) |"
        print(line)


def plot(panel, of_seeds):
    """A thin line a seed, and the mean. of_seeds: {method: curve}, one a seed."""
    for i, method in enumerate(of_seeds[0]):
        lines = torch.stack([curves[method] for curves in of_seeds], 1)
        panel.plot(lines, color=f"C{i}", linewidth=0.6)
        panel.plot(lines.mean(1), color=f"C{i}", label=method)


def draw(path, results):
    """A panel a function. results: {function: {method: curve}, one a seed}."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4), layout="constrained")
    panels = figure.subplots(1, len(results))
    for panel, (name, of_seeds) in zip(panels, results.items(), strict=True):
        plot(panel, of_seeds)
        panel.set(title=name, xlabel="function calls", ylabel="best value so far", yscale="log")
    panels[0].legend()
    figure.savefig(path)


def main(argv=None):
    """Compare the methods on each function, on one thread; print a table and draw."""
    argparse.ArgumentParser(description=__doc__).parse_args(argv)
    torch.set_num_threads(1)
    results = {}
    for name, function in FUNCTIONS.items():
        results[name] = [compare(function, CALLS, seed) for seed in SEEDS]
    print_table(results)
    draw(Path(__file__).with_suffix(".png"), results)


if __name__ == "__main__":
    main()
