"""Black-box optimisation: a flow of vectors, improved by the value of a function as its reward.

    pip install cma matplotlib
    python examples/studies/blackbox.py             # three functions: a table, runs/blackbox.png
    python examples/studies/blackbox.py --quick     # Ackley's alone, 2000 calls, under two minutes

Each function has 20 dimensions and its minimum, 0, at a known point off the centre. Offline data
are 5000 uniform points of the box, and the best tenth is held out. A small flow is fitted to the
rest. Then it proposes 100 points a round, each is a call of the function, and nft.nft_loss improves
the flow. Beside it: random search, CMA-ES from the best point of the data (in its own batches of 12
and in batches of 100), and reward-weighted regression (RWR) of the same flow in the same rounds.

The neighbour for which this stands is Diffusion-BBO (arXiv 2407.00610). That method models the
inverse: it trains p(x | y) on all data so far, an acquisition function picks a value y beyond the
best one by the uncertainty of an ensemble, and guided sampling asks the model for points of that
value. It keeps every point, and its next points come from conditioning. Here there is no y, no
ensemble and no guidance: the model itself moves to where the function is lower, and forgets the
points of earlier rounds.

Not claimed: that this is a good optimiser of smooth functions. CMA-ES is a better one.
Diffusion-BBO itself is not run, and these are not its tasks.

The settings of NFT and RWR are each the best of 12 on Ackley's function with other data (learning
rate 1e-3, 3e-3 or 1e-2; 4 or 16 updates a round; two values of beta or of the temperature). On
Rastrigin's, other settings did a little better for both. Rosenbrock's was not swept.
SPDX-License-Identifier: MIT
"""

import argparse
import copy
import functools
import importlib.util
import math
import sys
import time
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))
import nft

DIMENSIONS = 20
# Points of the box [-1, 1]^20 are in units of its half width.
HALF_WIDTH = 5.0
# Where each function has its minimum, in [-2, 2]^20 of the functions' own units.
MINIMUM = 4 * torch.rand(DIMENSIONS, generator=torch.Generator().manual_seed(1234)) - 2
BATCH = 100
CALLS = 5000
SEEDS = (0, 1, 2)


# ---- The functions: z (B, 20), the offset from the minimum -> (B,), at least 0 -------------------
def ackley(z):
    """Many shallow pits around one funnel."""
    bowl = (-0.2 * z.square().mean(1).sqrt()).exp()
    waves = (2 * math.pi * z).cos().mean(1).exp()
    return 20 * (1 - bowl) + math.e - waves


def rastrigin(z):
    """A bowl with a deep pit at every point of whole numbers."""
    return (z.square() - 10 * (2 * math.pi * z).cos() + 10).sum(1)


def rosenbrock(z):
    """A curved valley with steep walls; moved so that its minimum is at z = 0."""
    x = z + 1
    walls = x[:, 1:] - x[:, :-1].square()
    return (100 * walls.square() + (1 - x[:, :-1]).square()).sum(1)


FUNCTIONS = {"ackley": ackley, "rastrigin": rastrigin, "rosenbrock": rosenbrock}


class Oracle:
    """A function that may be called `calls` times, and the best value after each call."""

    def __init__(self, function, calls):
        self.function = function
        self.calls = calls
        self.best = []

    def __call__(self, x):
        """The values (B,) at points x (B, 20) of the box; outside, of its nearest point."""
        z = HALF_WIDTH * x.clamp(-1, 1) - MINIMUM
        values = self.function(z)
        for value in values.tolist():
            best = min([value, *self.best[-1:]])
            self.best.append(best)
        del self.best[self.calls :]
        return values

    def spent(self):
        """Whether no call is left."""
        return len(self.best) >= self.calls


def offline_data(function, n=5000):
    """The worse nine tenths of n uniform points, with their values; and the best value left out."""
    x = 2 * torch.rand(n, DIMENSIONS) - 1
    values = Oracle(function, n)(x)
    order = values.argsort()
    kept = order[n // 10 :]
    return x[kept], values[kept], values[order[0]].item()


# ---- The flow ------------------------------------------------------------------------------------
class Net(torch.nn.Module):
    """v_theta(x_t, t): (B, 20), (B, 1) -> (B, 20)."""

    def __init__(self, width=128):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(DIMENSIONS + 3, width),
            torch.nn.GELU(),
            torch.nn.Linear(width, width),
            torch.nn.GELU(),
            torch.nn.Linear(width, width),
            torch.nn.GELU(),
            torch.nn.Linear(width, DIMENSIONS),
        )

    def forward(self, x_t, t):
        """The velocity."""
        angle = math.pi * t
        return self.layers(torch.cat([x_t, t, angle.cos(), angle.sin()], 1))


def noised(x_0):
    """A time in (0.02, 1] for each x_0, x_t, and v = eps - x_0: (B, 1), (B, 20), (B, 20)."""
    t = 1 - 0.98 * torch.rand(len(x_0), 1)
    eps = torch.randn_like(x_0)
    alpha_t, sigma_t = nft.alpha_sigma(t)
    return t, alpha_t * x_0 + sigma_t * eps, eps - x_0


def fit(x, steps=1500, batch=512, lr=2e-3):
    """A flow of the points x (N, 20), by flow matching, Eq. (1)."""
    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        t, x_t, v = noised(x[torch.randint(len(x), (batch,))])
        optimizer.zero_grad()
        (net(x_t, t) - v).square().mean().backward()
        optimizer.step()
        schedule.step()
    return net


@torch.no_grad()
def sample(net, n, steps=10):
    """n samples (n, 20) by the midpoint rule, from t = 1 to 0."""
    x = torch.randn(n, DIMENSIONS)
    for i in range(steps, 0, -1):
        t = torch.full((n, 1), i / steps)
        halfway = x - net(x, t) / (2 * steps)
        x = x - net(halfway, t - 0.5 / steps) / steps
    return x


# ---- The methods: each spends an oracle's calls --------------------------------------------------
def optimality(raw):
    """NFT's r in [0, 1] of a round's rewards (B,), which are one group: all answer one question."""
    return nft.optimality_reward(raw, torch.zeros(len(raw)), z=1.0)


def nft_losses(x0_theta, x0_old, x_0, r):
    """Eq. (5): (B,)."""
    return nft.nft_loss(x0_theta, x0_old, x_0, r, beta=0.3)


def exponential_weights(raw):
    """RWR's exp(r / temperature) / Z of a round's rewards (B,); the weights average 1."""
    temperature = 0.3 * raw.std()
    return len(raw) * (raw / temperature).softmax(0)


def rwr_losses(x0_theta, x0_old, x_0, weight):
    """The same distance as NFT's, weighted; RWR has no use for the old policy: (B,)."""
    return weight * nft.adaptive_loss(x0_theta, x_0)


def improve(oracle, flow, weigh, losses, updates=16, copies=8, lr=1e-2):
    """Algorithm 1 of a flow; returns the trained flow, and each round's mean value."""
    theta = copy.deepcopy(flow)
    old = copy.deepcopy(flow).requires_grad_(False)
    optimizer = torch.optim.Adam(theta.parameters(), lr)
    means = []
    while not oracle.spent():
        points = sample(old, BATCH)
        values = oracle(points)
        means.append(values.mean().item())
        weight = weigh(-values).repeat(copies)
        x_0 = points.repeat(copies, 1)
        for _ in range(updates):
            t, x_t, _ = noised(x_0)
            # nft.predict_x0 of a rectified flow.
            x0_theta = x_t - t * theta(x_t, t)
            x0_old = x_t - t * old(x_t, t)
            optimizer.zero_grad()
            losses(x0_theta, x0_old, x_0, weight).mean().backward()
            torch.nn.utils.clip_grad_norm_(theta.parameters(), 1.0)
            optimizer.step()
        # eta = 0: the next round's points are of the policy as it is now.
        old.load_state_dict(theta.state_dict())
    return theta, means


def random_search(oracle, seed):
    """Uniform points of the box."""
    # A stream of its own: that of `seed` would begin with the points of the offline data.
    generator = torch.Generator().manual_seed(1000 + seed)
    while not oracle.spent():
        oracle(2 * torch.rand(BATCH, DIMENSIONS, generator=generator) - 1)


def cma_es(oracle, start, seed, batch):
    """CMA-ES from `start` (20,), a quarter of the box wide; anew from there when it stops."""
    import cma

    settings = {"bounds": [-1, 1], "popsize": batch, "verbose": -9}
    while not oracle.spent():
        # A seed of 0 would mean the clock.
        settings["seed"] = 1 + seed + 1000 * len(oracle.best)
        search = cma.CMAEvolutionStrategy(start.tolist(), 0.5, settings)
        while not search.stop() and not oracle.spent():
            points = search.ask()
            rows = [point.tolist() for point in points]
            search.tell(points, oracle(torch.tensor(rows)).tolist())


def compare(function, calls, seed):
    """{method: best value after each call}, and the best value of the data kept and held out."""
    torch.manual_seed(seed)
    x, values, held_out = offline_data(function)
    flow = fit(x)
    cma = {"start": x[values.argmin()], "seed": seed}
    by_nft = {"weigh": optimality, "losses": nft_losses}
    by_rwr = {"weigh": exponential_weights, "losses": rwr_losses}
    methods = {
        "random search": functools.partial(random_search, seed=seed),
        "RWR": functools.partial(improve, flow=flow, **by_rwr),
        "NFT": functools.partial(improve, flow=flow, **by_nft),
        f"CMA-ES, batches of {BATCH}": functools.partial(cma_es, batch=BATCH, **cma),
        "CMA-ES": functools.partial(cma_es, batch=12, **cma),
    }
    curves = {}
    for name, method in methods.items():
        torch.manual_seed(seed)
        oracle = Oracle(function, calls)
        method(oracle)
        curves[name] = oracle.best
    return curves, values.min().item(), held_out


# ---- What is printed and drawn -------------------------------------------------------------------
def print_table(name, found, calls):
    """Best values after a tenth, a half and all of the calls: the mean, and each seed's."""
    marks = (calls // 10, calls // 2, calls)
    kept = [f"{kept:.4g}" for _, kept, _ in found]
    held_out = [f"{held_out:.4g}" for _, _, held_out in found]
    print(f"{name}: best of the data {', '.join(kept)}; held out {', '.join(held_out)}")
    print(f"  {'best value after':24s}" + "".join(f"{mark:<40d}" for mark in marks))
    for method in found[0][0]:
        line = f"  {method:24s}"
        for mark in marks:
            best = torch.tensor([curves[method][mark - 1] for curves, _, _ in found])
            each = ", ".join(f"{value:.3g}" for value in best.tolist())
            cell = f"{best.mean():.3g} ({each})"
            line += f"{cell:40s}"
        print(line, flush=True)


def draw(path, results):
    """A panel a function: the best value against calls, a thin line a seed, the mean bold."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(results), 4), layout="constrained")
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    for panel, (name, found) in zip(panels, results.items(), strict=True):
        for i, method in enumerate(found[0][0]):
            # A minimum found to rounding has no logarithm.
            best = torch.tensor([curves[method] for curves, _, _ in found]).clamp_min(1e-3)
            for line in best:
                panel.plot(line, color=f"C{i}", linewidth=0.6, alpha=0.6)
            panel.plot(best.log().mean(0).exp(), color=f"C{i}", label=method)
        for _, kept, held_out in found:
            panel.axhline(kept, color="0.7", linewidth=0.6)
            panel.axhline(held_out, color="0.7", linewidth=0.6, linestyle="dashed")
        panel.set_yscale("log")
        panel.set_title(name)
        panel.set_xlabel("function calls")
    panels[0].set_ylabel("best value so far (the minimum is 0)")
    panels[0].legend(fontsize=8)
    figure.suptitle("Grey: the best of the offline data; dashed: of its held-out tenth", fontsize=9)
    figure.savefig(path, dpi=90)


def compare_all(functions, calls):
    """{name: what `compare` returns for each of SEEDS}; prints a table a function.

    functions: names of FUNCTIONS.
    """
    # The layers are small, and threads would change the last digits.
    torch.set_num_threads(1)
    results = {}
    for name in functions:
        results[name] = [compare(FUNCTIONS[name], calls, seed) for seed in SEEDS]
        print_table(name, results[name], calls)
    return results


def main(argv=None):
    """Compare the methods on each function, print tables and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="Ackley's function, 2000 calls")
    parser.add_argument("--out", type=Path, default=Path("runs/blackbox.png"))
    args = parser.parse_args(argv)
    for package in ("cma", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            parser.error(f"this study needs {package}: pip install {package}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    calls = CALLS
    functions = list(FUNCTIONS)
    if args.quick:
        calls = 2000
        functions = functions[:1]
    results = compare_all(functions, calls)
    draw(args.out, results)
    print(f"{args.out}, {time.process_time():.0f} s of CPU")


if __name__ == "__main__":
    main()
