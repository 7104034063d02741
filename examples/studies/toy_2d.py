"""Figure 3 of the paper on a plane: v_old, v+, v- and Delta as arrows; Eq. (6) exact and learned.

    pip install matplotlib                  # the one package that nft.py itself does not need
    python examples/studies/toy_2d.py       # a table, runs/toy_2d.png and runs/toy_2d.gif

The old policy is a ring of eight Gaussians under rectified flow. The reward r(x_0) = p(o=1 | x_0)
is a Gaussian bump beside it. Products of Gaussians are Gaussians, so four things have closed forms,
which need no network: alpha(x_t) = E[r | x_t], v_old = E[v | x_t], v+ = E[r v | x_t] / alpha and
v- = E[(1 - r) v | x_t] / (1 - alpha).

One round: a small network, pretrained on the ring, learns by nft.nft_loss from samples of the old
policy. Let d = v_theta - v_old. With the squared distance, the gradient of Eq. (5) by d at x_t is

    2 beta [alpha (v_old + beta d - v+) - (1 - alpha) (v_old - beta d - v-)].

This is zero where beta d = alpha (v+ - v_old) + (1 - alpha) (v_old - v-). By Theorem 3.1 each of
the two terms is Delta. So v* = v_old + (2 / beta) Delta, which is Eq. (6). The adaptive loss of
section 3.3 moves v*, because each sample's own error weighs it. Therefore the distance is squared.
Online, it is nft.py's own: Algorithm 1 without KL term, from the same pretrained network.
SPDX-License-Identifier: MIT
"""

import argparse
import copy
import functools
import math
import sys
from collections import namedtuple
from pathlib import Path

import torch
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.figure import Figure
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import nft

# The old policy: the centres of its Gaussians, and their standard deviation.
ANGLES = torch.arange(8).double() * math.pi / 4
CENTRES = 2 * torch.stack([ANGLES.cos(), ANGLES.sin()], 1)
STD = 0.4
# The reward: the centre of its bump, and its width.
PEAK = 1.6 * torch.ones(2).double()
WIDTH = 1.2
# The time t of the arrows in the pictures.
SHOWN = 0.5 * torch.ones(1, 1).double()

# What is exact at B points x_t: alpha = E[r | x_t] (B, 1), the velocities of the old, the positive
# and the negative policy (B, 2), and p(x_t) under the old one (B,).
Fields = namedtuple("Fields", "alpha v_old v_positive v_negative density")


# ---- What is exact: the old policy, the reward, and the fields of Theorem 3.1 --------------------
def squared(a, b):
    """||a - b||^2 of each sample: (B, 2), (B, 2) -> (B,)."""
    return (a - b).square().sum(1)


def draw_old(n):
    """n exact samples x_0 of the old policy: (n, 2)."""
    centres = CENTRES[torch.randint(8, (n,))]
    return centres + STD * torch.randn(n, 2).double()


def reward(x_0):
    """r(x_0) = p(o=1 | x_0), in (0, 1]: (B, 2) -> (B,)."""
    return (-squared(x_0, PEAK) / (2 * WIDTH**2)).exp()


def exact_fields(x_t, t):
    """The Fields at x_t (B, 2) and the times t in (0, 1]: (B, 1), or (1, 1) for all."""
    alpha_t, sigma_t = nft.alpha_sigma(t)
    # The variance of x_t in one Gaussian k of the ring, and p(x_t, k): (B, 8).
    variance = (alpha_t * STD) ** 2 + sigma_t**2
    offset = x_t[:, None] - alpha_t[:, None] * CENTRES
    distance = offset.square().sum(2)
    joint = (-distance / (2 * variance)).exp() / (16 * math.pi * variance)
    share = joint / joint.sum(1, keepdim=True)
    # The mean (B, 8, 2) and the variance (B, 1) of x_0 given x_t and k.
    gain = alpha_t * STD**2 / variance
    mean = CENTRES + gain[:, None] * offset
    spread = (STD * sigma_t) ** 2 / variance
    # Times the reward: p(o=1, k | x_t).
    wide = WIDTH**2 + spread
    from_peak = (mean - PEAK).square().sum(2)
    good = share * WIDTH**2 / wide * (-from_peak / (2 * wide)).exp()
    # Over all Gaussians; o=1 draws x_0 to the peak.
    alpha = good.sum(1, keepdim=True)
    all_x_0 = torch.einsum("bk,bkd->bd", share, mean)
    good_mean = torch.einsum("bk,bkd->bd", good, mean)
    good_x_0 = (WIDTH**2 * good_mean + spread * alpha * PEAK) / wide
    # v = eps - x_0 = (x_t - x_0) / t.
    v_old = (x_t - all_x_0) / t
    v_positive = (x_t - good_x_0 / alpha) / t
    v_negative = (x_t - (all_x_0 - good_x_0) / (1 - alpha)) / t
    return Fields(alpha, v_old, v_positive, v_negative, joint.sum(1))


def delta(fields):
    """Delta of Eq. (4), from the positive policy: (B, 2)."""
    return fields.alpha * (fields.v_positive - fields.v_old)


def exact_old(x_t, t):
    """v_old: (B, 2), (B, 1) -> (B, 2)."""
    return exact_fields(x_t, t).v_old


def optimum(x_t, t, beta):
    """v* = v_old + (2 / beta) Delta, Eq. (6): (B, 2), (B, 1) -> (B, 2)."""
    fields = exact_fields(x_t, t)
    return fields.v_old + 2 / beta * delta(fields)


# ---- What is learned -----------------------------------------------------------------------------
class Net(nn.Module):
    """v_theta(x_t, t): (B, 2), (B, 1) -> (B, 2)."""

    def __init__(self):
        super().__init__()
        layers = []
        for n in (5, 64, 64):
            layers += [nn.Linear(n, 64), nn.GELU()]
        self.layers = nn.Sequential(*layers, nn.Linear(64, 2))

    def forward(self, x_t, t):
        """The velocity, in x_t's precision."""
        t = t.expand(len(x_t), 1)
        angle = math.pi * t
        features = torch.cat([x_t, t, angle.cos(), angle.sin()], 1)
        return self.layers(features.float()).to(x_t.dtype)


def noised(x_0):
    """A time in (0.02, 1] for each x_0, x_t, and v = eps - x_0: (B, 1), (B, 2), (B, 2)."""
    t = 1 - 0.98 * torch.rand(len(x_0), 1).to(x_0)
    eps = torch.randn_like(x_0)
    alpha_t, sigma_t = nft.alpha_sigma(t)
    return t, alpha_t * x_0 + sigma_t * eps, eps - x_0


def fit(net, loss, steps=2500):
    """Train `net` by `loss(net, x_0)` -> (B,) on fresh samples of the old policy; returns `net`."""
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(net, draw_old(1024)).mean().backward()
        optimizer.step()
        schedule.step()
    return net


def flow_matching(net, x_0):
    """Eq. (1), the loss of the pretraining: (B,)."""
    t, x_t, v = noised(x_0)
    return squared(net(x_t, t), v)


def positive_only(x0_theta, x0_old, x_0, r, beta, distance=nft.adaptive_loss):
    """Eq. (5) without its negative branch, which r = 1 leaves out; otherwise as nft.nft_loss."""
    branch = nft.nft_loss(x0_theta, x0_old, x_0, torch.ones_like(r), beta, distance)
    return r * branch


def one_round(net, x_0, beta):
    """Eq. (5) with the exact v_old: (B,). Velocities are mixed as clean samples are: line 10."""
    t, x_t, v = noised(x_0)
    v_theta = net(x_t, t)
    return nft.nft_loss(v_theta, exact_old(x_t, t), v, reward(x_0), beta, squared)


@torch.no_grad()
def sample(field, n, steps=20):
    """n samples (n, 2) by the midpoint rule from t = 1 to 0, which never asks for t = 0."""
    x = torch.randn(n, 2).double()
    for i in range(steps, 0, -1):
        t = torch.full((n, 1), i / steps).double()
        halfway = x - field(x, t) / (2 * steps)
        x = x - field(halfway, t - 0.5 / steps) / steps
    return x


def clean(net, x_t, t):
    """The clean sample that the network predicts: (B, 2)."""
    return x_t - t * net(x_t, t)


def online(
    net, beta, iterations=40, n=512, steps=20, updates=4, eta="0,0.001,0.5", loss=nft.nft_loss
):
    """Algorithm 1 for one prompt, by clean samples as in nft.py.

    An iteration has n samples, of `steps` solver steps, and `updates` optimizer steps; eta is
    nft.py's. Returns the trained network, and copies of it: before and after each iteration.
    """
    theta = copy.deepcopy(net)
    old = copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.Adam(theta.parameters(), 3e-4)
    copies = [copy.deepcopy(net)]
    for i in range(1, iterations + 1):
        # Collect and score.
        x_0 = sample(old, n, steps)
        r = nft.optimality_reward(reward(x_0), torch.zeros(n))
        # Optimize.
        for _ in range(updates):
            t, x_t, _ = noised(x_0)
            x0_theta = clean(theta, x_t, t)
            x0_old = clean(old, x_t, t)
            optimizer.zero_grad()
            loss(x0_theta, x0_old, x_0, r, beta).mean().backward()
            optimizer.step()
        # Update the old policy.
        keep = nft.soft_update_decay(i, eta)
        for p_old, p in zip(old.parameters(), theta.parameters(), strict=True):
            p_old.lerp_(p.detach(), 1 - keep)
        copies.append(copy.deepcopy(theta))
    return theta, copies


@torch.no_grad()
def error(net, beta):
    """RMS of v_theta - v* at t = SHOWN, where the old policy puts x_t, as a share of that of v*."""
    x_t = (1 - SHOWN) * draw_old(20000) + SHOWN * torch.randn(20000, 2)
    best = optimum(x_t, SHOWN, beta)
    gap = net(x_t, SHOWN) - best
    return (gap.norm() / best.norm()).item()


# ---- What is drawn -------------------------------------------------------------------------------
def grid(end, n):
    """n^2 points of the square from -end to end: (n^2, 2)."""
    axis = torch.linspace(-end, end, n, dtype=torch.float64)
    return torch.cartesian_prod(axis, axis)


def seen_points():
    """Points x_t (n, 2) where the old policy goes at t = SHOWN."""
    x_t = grid(1.8, 13)
    return x_t[exact_fields(x_t, SHOWN).density > 0.01]


def draw_field(ax, title, **fields):
    """Arrows against {color: a field (n, 2) at `seen_points`}: the way that sampling moves."""
    density = exact_fields(grid(2.1, 80), SHOWN).density.view(80, 80).T.numpy()
    square = (-2.1, 2.1, -2.1, 2.1)
    ax.imshow(density, origin="lower", extent=square, cmap="Greys", vmax=3 * density.max())
    for color, field in fields.items():
        arrows = torch.cat([seen_points(), -0.2 * field], 1).T.numpy()
        ax.quiver(*arrows, color=color, width=0.008, angles="xy", scale_units="xy", scale=1)
    ax.plot(*0.5 * PEAK, "k*", markersize=9)
    ax.set_title(title)


def draw_fields(axes, learned, beta):
    """Six panels: the fields of Theorem 3.1, Eq. (6), and what a network has learned of it."""
    x_t = seen_points()
    fields = exact_fields(x_t, SHOWN)
    old = fields.v_old
    draw_field(axes[0], "$v_{old}$", C0=old)
    draw_field(axes[1], "$v^+$: posterior weighted by r", darkgray=old, C2=fields.v_positive)
    draw_field(axes[2], "$v^-$: weighted by 1 - r", darkgray=old, C3=fields.v_negative)
    draw_field(axes[3], r"$\Delta$, length x 2", C1=2 * delta(fields))
    title = rf"Eq. (6): $v_{{old}} + (2/\beta)\,\Delta$, $\beta$ = {beta:g}"
    draw_field(axes[4], title, darkgray=old, C4=optimum(x_t, SHOWN, beta))
    title = rf"learned $v_\theta$: error {error(learned, beta):.1%}"
    draw_field(axes[5], title, darkgray=old, C4=learned(x_t, SHOWN))


def draw_samples(ax, title, x_0):
    """A histogram of samples x_0 (n, 2), with rings of equal reward."""
    ax.hist2d(*x_0.T.numpy(), bins=torch.linspace(-3, 3, 91), cmap="Greys")
    height = reward(grid(3, 60)).view(60, 60).T.numpy()
    ax.contour(height, [0.25, 0.5, 0.75], extent=(-3, 3, -3, 3), colors="C2")
    ax.plot(*PEAK, "k*", markersize=9)
    ax.set_title(title)
    ax.set_aspect("equal")


@torch.no_grad()
def draw(path, learned, before, after, beta):
    """Eight panels: the fields, and the samples (n, 2) before and after the rounds."""
    figure = Figure(figsize=(14, 7.4), layout="constrained")
    axes = figure.subplots(2, 4).flatten()
    draw_fields(axes[:6], learned, beta)
    draw_samples(axes[6], f"$x_0$ before: mean reward {reward(before).mean():.2f}", before)
    draw_samples(axes[7], f"$x_0$ after: mean reward {reward(after).mean():.2f}", after)
    figure.supxlabel(
        "Arrows: minus a field at t = 0.5, the way that sampling moves. Grey: $v_{old}$, density.\n"
        "Star: the reward's peak, at half its place among arrows. Rings: reward 0.25, 0.5, 0.75."
    )
    figure.savefig(path, dpi=90)


@torch.no_grad()
def film(path, copies):
    """A GIF of samples and field after every second round of `online`; the last stays longer."""
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    x_t = seen_points()
    v_old = exact_old(x_t, SHOWN)
    rounds = list(range(0, len(copies), 2))
    rounds += 9 * rounds[-1:]

    def show(i):
        left.clear()
        right.clear()
        # From the same noise, so that points move.
        torch.manual_seed(0)
        x_0 = sample(copies[i], 6000)
        draw_samples(left, f"$x_0$ after round {i}: mean reward {reward(x_0).mean():.2f}", x_0)
        draw_field(right, r"$v_\theta$", darkgray=v_old, C4=copies[i](x_t, SHOWN))

    FuncAnimation(figure, show, rounds).save(path, PillowWriter(5), dpi=75)


def main(argv=None):
    """Learn, print a table, and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--beta", type=float, default=1.0, help="beta of Eq. (5), > 0")
    parser.add_argument("--out", default="runs/toy_2d", help="path of the pictures, without suffix")
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    # The layers are small, and threads would change the last digits.
    torch.set_num_threads(1)
    net = fit(Net(), flow_matching)
    learned = fit(copy.deepcopy(net), functools.partial(one_round, beta=args.beta))
    theta, copies = online(net, args.beta)
    samples = {
        "old policy, exact": draw_old(20000),
        "pretrained network": sample(net, 20000),
        "one round, Eq. (6) exact": sample(functools.partial(optimum, beta=args.beta), 20000),
        "one round, learned": sample(learned, 20000),
        f"online, {len(copies) - 1} rounds": sample(theta, 20000),
    }
    print("Mean reward of 20000 samples")
    for name, x_0 in samples.items():
        print(f"  {name:26s}{reward(x_0).mean():.3f}")
    _, before, _, _, after = samples.values()
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    draw(f"{args.out}.png", learned, before, after, args.beta)
    film(f"{args.out}.gif", copies)
    print(f"{args.out}.png, {args.out}.gif")


if __name__ == "__main__":
    main()
