"""Figure 3 of the paper on a plane: v_old, v+, v- and Delta as arrows; Eq. (6) exact and learned.

    pip install matplotlib                      # the one package that nft.py itself does not need
    python examples/studies/toy_2d.py           # two tables and runs/toy_2d.png, in a minute
    python examples/studies/toy_2d.py --seed 1 --beta 0.5 --out toy.png
    python examples/studies/toy_2d.py --no-negative     # likewise --eta 0.9, --z 1, --rounds 100

Both committed pictures come from one command:

    python examples/studies/toy_2d.py --out examples/studies/toy_2d.png \\
        --animate examples/studies/toy_2d.gif

The old policy is a ring of eight Gaussians under rectified flow. The reward r(x_0) = p(o=1 | x_0)
is a Gaussian bump beside it. Products of Gaussians are Gaussians, so four things have closed forms,
which need no network: alpha(x_t) = E[r | x_t], v_old = E[v | x_t], v+ = E[r v | x_t] / alpha and
v- = E[(1 - r) v | x_t] / (1 - alpha).

One round: a small network, pretrained on the ring, learns by nft.nft_loss from samples of the old
policy. Let d = v_theta - v_old. With the squared distance, the expectation of Eq. (5) given x_t is

    E[r |v_old + beta d - v|^2 + (1 - r) |v_old - beta d - v|^2 | x_t]

and its gradient by d is

    2 beta [alpha (v_old + beta d - v+) - (1 - alpha) (v_old - beta d - v-)].

This is zero where beta d = alpha (v+ - v_old) + (1 - alpha) (v_old - v-). By Theorem 3.1 each of
the two terms is Delta. So v* = v_old + (2 / beta) Delta, which is Eq. (6): the factor is 2 because
both branches pull the same way. As t falls, x_t gives x_0 away, and Delta, which is
Cov[r, v | x_t], vanishes: the same noise is then a larger share of it. The adaptive loss of section
3.3 moves v*, because each sample's own error weighs it. Therefore the distance here is squared.
With --no-negative the first term alone is left, and v* = v_old + (v+ - v_old) / beta.

Online: Algorithm 1 as in nft.py, with its adaptive loss, optimality_reward and soft update, from
the same pretrained network, which is its own old policy. There is no KL term, so many more rounds
would end at the reward's peak. --eta, --z and --rounds change this part alone.
SPDX-License-Identifier: MIT
"""

import argparse
import copy
import importlib.util
import io
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))
import nft

# The old policy: the centres of its Gaussians, and their standard deviation.
ANGLES = torch.arange(8).double() * math.pi / 4
CENTRES = 2 * torch.stack([ANGLES.cos(), ANGLES.sin()], 1)
STD = 0.4
# The reward: the centre of its bump, and its width.
PEAK = torch.tensor([1.6, 1.6], dtype=torch.float64)
WIDTH = 1.2
# The time t of the arrows in the picture.
SHOWN = 0.5


class Fields(NamedTuple):
    """What is exact at B points x_t."""

    # E[r | x_t], (B, 1).
    alpha: torch.Tensor
    # The velocities of the old, the positive and the negative policy, (B, 2) each.
    v_old: torch.Tensor
    v_positive: torch.Tensor
    v_negative: torch.Tensor
    # p(x_t) under the old policy, (B,).
    density: torch.Tensor


# ---- What is exact: the old policy, the reward, and the fields of Theorem 3.1 --------------------


def draw_old(n):
    """n exact samples x_0 of the old policy: (n, 2)."""
    centres = CENTRES[torch.randint(8, (n,))]
    return centres + STD * torch.randn(n, 2).double()


def reward(x_0):
    """r(x_0) = p(o=1 | x_0), in (0, 1]: (B, 2) -> (B,)."""
    distance = (x_0 - PEAK).square().sum(1)
    return (-distance / (2 * WIDTH**2)).exp()


def exact_fields(x_t, t):
    """The Fields at x_t (B, 2) and the times t (B, 1) in (0, 1]."""
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
    # Times the reward: p(o=1, k | x_t), and the mean of x_0 given o=1, k and x_t.
    wide = WIDTH**2 + spread
    from_peak = (mean - PEAK).square().sum(2)
    good = share * WIDTH**2 / wide * (-from_peak / (2 * wide)).exp()
    good_mean = (WIDTH**2 * mean + spread[..., None] * PEAK) / wide[..., None]
    # Over all Gaussians.
    alpha = good.sum(1, keepdim=True)
    all_x_0 = (share[..., None] * mean).sum(1)
    good_x_0 = (good[..., None] * good_mean).sum(1)
    bad_x_0 = all_x_0 - good_x_0
    # v = eps - x_0 = (x_t - x_0) / t.
    return Fields(
        alpha=alpha,
        v_old=(x_t - all_x_0) / t,
        v_positive=(x_t - good_x_0 / alpha) / t,
        v_negative=(x_t - bad_x_0 / (1 - alpha)) / t,
        density=joint.sum(1),
    )


def delta(fields):
    """Delta of Eq. (4), both ways: from the positive and from the negative policy, (B, 2) each."""
    alpha, v_old, v_positive, v_negative, _ = fields
    return alpha * (v_positive - v_old), (1 - alpha) * (v_old - v_negative)


def exact_old(x_t, t):
    """v_old: (B, 2), (B, 1) -> (B, 2)."""
    return exact_fields(x_t, t).v_old


def optimum(x_t, t, beta, negative=True):
    """v* = v_old + (2 / beta) Delta, Eq. (6): (B, 2), (B, 1) -> (B, 2).

    negative=False: that of Eq. (5) without its negative branch.
    """
    fields = exact_fields(x_t, t)
    if not negative:
        return fields.v_old + (fields.v_positive - fields.v_old) / beta
    from_positive, _ = delta(fields)
    return fields.v_old + 2 / beta * from_positive


# ---- What is learned -----------------------------------------------------------------------------


class Net(torch.nn.Module):
    """v_theta(x_t, t): (B, 2), (B, 1) -> (B, 2)."""

    def __init__(self, width=64):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(5, width),
            torch.nn.GELU(),
            torch.nn.Linear(width, width),
            torch.nn.GELU(),
            torch.nn.Linear(width, width),
            torch.nn.GELU(),
            torch.nn.Linear(width, 2),
        )

    def forward(self, x_t, t):
        """The velocity, in x_t's precision."""
        angle = math.pi * t
        features = torch.cat([x_t, t, angle.cos(), angle.sin()], 1)
        return self.layers(features.float()).to(x_t.dtype)


def noised(x_0, low=0.02):
    """A time in (low, 1] for each x_0, x_t, and v = eps - x_0: (B, 1), (B, 2), (B, 2)."""
    uniform = torch.rand(len(x_0), 1).to(x_0)
    t = 1 - (1 - low) * uniform
    eps = torch.randn_like(x_0)
    alpha_t, sigma_t = nft.alpha_sigma(t)
    return t, alpha_t * x_0 + sigma_t * eps, eps - x_0


def squared(a, b):
    """||a - b||^2 of each sample: (B, 2), (B, 2) -> (B,)."""
    return (a - b).square().sum(1)


def fit(net, loss, steps=2500, lr=1e-2, batch=1024):
    """Train `net` by `loss(net, x_0)` -> (B,) on fresh samples of the old policy; returns `net`."""
    optimizer = torch.optim.Adam(net.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(net, draw_old(batch)).mean().backward()
        optimizer.step()
        schedule.step()
    return net


def flow_matching(net, x_0):
    """Eq. (1), the loss of the pretraining: (B,)."""
    t, x_t, v = noised(x_0)
    return squared(net(x_t, t), v)


def positive_only(x0_theta, x0_old, x_0, r, beta, distance=nft.adaptive_loss):
    """Eq. (5) without its negative branch, with the arguments of nft.nft_loss: (B,)."""
    # At r = 1 the loss is the positive branch.
    branch = nft.nft_loss(x0_theta, x0_old, x_0, torch.ones_like(r), beta, distance)
    return r * branch


def one_round(net, x_0, beta, loss=nft.nft_loss):
    """Eq. (5) with the exact v_old: (B,).

    `loss` mixes clean samples. Its two mixtures are affine, so it mixes velocities as well.
    """
    t, x_t, v = noised(x_0)
    v_theta = net(x_t, t)
    return loss(v_theta, exact_old(x_t, t), v, reward(x_0), beta, squared)


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
    alpha_t, sigma_t = nft.alpha_sigma(t)
    x_0, _ = nft.predict_x0(x_t, net(x_t, t), alpha_t, sigma_t, "flow_prediction")
    return x_0


class Online(NamedTuple):
    """Settings of `online`."""

    iterations: int = 40
    # Samples of an iteration, and solver steps of each.
    n: int = 512
    steps: int = 20
    # Optimizer steps of an iteration.
    updates: int = 4
    lr: float = 3e-4
    # As nft.py's --eta and --z.
    eta: str = "0,0.001,0.5"
    z: float = 5.0
    loss: Callable = nft.nft_loss


def online(net, beta, watch=None, **settings):
    """Algorithm 1 for one prompt, by clean samples as in nft.py.

    settings: those of Online. watch(i, theta) is called after each iteration i, from 1, and with 0
    before the first. Returns the trained network, and the mean reward of each iteration's samples.
    """
    how = Online(**settings)
    theta = copy.deepcopy(net)
    old = copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.Adam(theta.parameters(), how.lr)
    rewards = []
    if watch:
        watch(0, theta)
    for i in range(1, how.iterations + 1):
        # Collect and score.
        x_0 = sample(old, how.n, how.steps)
        raw = reward(x_0)
        r = nft.optimality_reward(raw, torch.zeros(how.n), how.z)
        rewards.append(raw.mean().item())
        # Optimize.
        for _ in range(how.updates):
            t, x_t, _ = noised(x_0)
            x0_theta = clean(theta, x_t, t)
            x0_old = clean(old, x_t, t)
            optimizer.zero_grad()
            how.loss(x0_theta, x0_old, x_0, r, beta).mean().backward()
            optimizer.step()
        # Update the old policy.
        eta = nft.soft_update_decay(i, how.eta)
        with torch.no_grad():
            for p_old, p in zip(old.parameters(), theta.parameters(), strict=True):
                p_old.lerp_(p, 1 - eta)
        if watch:
            watch(i, theta)
    return theta, rewards


# ---- What is printed -----------------------------------------------------------------------------


@torch.no_grad()
def errors(net, t, beta, n=20000, negative=True):
    """The network's RMS error against v* at time t, where the old policy puts x_t.

    Returns it as a share of the RMS of v*, and of the RMS of the step v* - v_old.
    """
    times = torch.full((n, 1), t).double()
    eps = torch.randn(n, 2).double()
    x_t = (1 - times) * draw_old(n) + times * eps
    best = optimum(x_t, times, beta, negative)
    step = best - exact_old(x_t, times)
    error = (net(x_t, times) - best).square().mean()
    of_best = error / best.square().mean()
    of_step = error / step.square().mean()
    return of_best.sqrt().item(), of_step.sqrt().item()


def print_errors(pretrained, learned, beta, negative=True):
    """The first table: one round, at four times."""
    print("One round: error of v_theta as a share of v*, and of the step v* - v_old")
    print("(pretrained: the latter before the round)")
    print("  t     of v*   of the step   pretrained   Theorem 3.1: Delta both ways, difference")
    for t in (0.2, 0.4, 0.6, 0.8):
        of_best, of_step = errors(learned, t, beta, negative=negative)
        _, before = errors(pretrained, t, beta, negative=negative)
        times = torch.full((2000, 1), t).double()
        from_positive, from_negative = delta(exact_fields(draw_old(2000), times))
        apart = (from_positive - from_negative).abs().max()
        print(f"  {t}   {of_best:5.3f}   {of_step:11.3f}   {before:10.3f}   {apart:.0e}")


def print_rewards(samples):
    """The second table; samples: {name: (n, 2)}."""
    print("Mean reward of 20000 samples")
    for name, x_0 in samples.items():
        print(f"  {name:26s}{reward(x_0).mean():.3f}")


# ---- What is drawn -------------------------------------------------------------------------------


def grid(low, high, n):
    """n^2 points of a square, (n^2, 2), and SHOWN for each, (n^2, 1)."""
    axis = torch.linspace(low, high, n).double()
    times = torch.full((n * n, 1), SHOWN).double()
    return torch.cartesian_prod(axis, axis), times


def draw_field(ax, title, x_t, fields, scale=1.0):
    """Arrows against `fields`, [((n, 2), color)], at x_t (n, 2), over the density of x_t."""
    points, times = grid(-2.1, 2.1, 80)
    density = exact_fields(points, times).density.view(80, 80).T.numpy()
    square = [-2.1, 2.1, -2.1, 2.1]
    ax.imshow(density, origin="lower", extent=square, cmap="Greys", vmax=3 * density.max())
    for field, color in fields:
        draw_arrows(ax, x_t, field, color, scale)
    star_x, star_y = ((1 - SHOWN) * PEAK).numpy()
    ax.plot(star_x, star_y, "k*", markersize=9)
    if scale != 1:
        title += f", length x {scale:.2g}"
    ax.set_title(title)


def draw_arrows(ax, x_t, field, color, scale=1.0):
    """Arrows against a field (n, 2) at x_t (n, 2): the way that sampling moves."""
    x, y = x_t.T.numpy()
    dx, dy = (-0.2 * scale * field).T.numpy()
    as_data = {"angles": "xy", "scale_units": "xy", "scale": 1}
    ax.quiver(x, y, dx, dy, width=0.008, color=color, **as_data)


def seen_points():
    """Points x_t (n, 2) where the old policy goes at t = SHOWN, and t (n, 1)."""
    x_t, t = grid(-1.8, 1.8, 13)
    seen = exact_fields(x_t, t).density > 0.01
    return x_t[seen], t[seen]


def draw_fields(axes, learned, beta, negative=True):
    """The six panels of arrows at t = SHOWN."""
    x_t, t = seen_points()
    fields = exact_fields(x_t, t)
    step, _ = delta(fields)
    best = optimum(x_t, t, beta, negative)
    of_best, _ = errors(learned, SHOWN, beta, negative=negative)
    # A small beta makes v* too long to draw.
    scale = min(1, 4 / best.norm(dim=1).max().item())
    grey = (fields.v_old, "0.6")
    draw_field(axes[0], "$v_{old}$", x_t, [grey, (fields.v_old, "C0")])
    positive = [grey, (fields.v_positive, "C2")]
    draw_field(axes[1], "$v^+$: posterior weighted by r", x_t, positive)
    bad = [grey, (fields.v_negative, "C3")]
    draw_field(axes[2], "$v^-$: weighted by 1 - r", x_t, bad)
    draw_field(axes[3], r"$\Delta$", x_t, [(step, "C1")], scale=2)
    title = rf"Eq. (6): $v_{{old}} + (2/\beta)\,\Delta$, $\beta$ = {beta:g}"
    if not negative:
        title = rf"$v_{{old}} + (v^+ - v_{{old}})/\beta$, $\beta$ = {beta:g}"
    draw_field(axes[4], title, x_t, [grey, (best, "C4")], scale)
    title = rf"learned $v_\theta$: error {of_best:.1%}"
    draw_field(axes[5], title, x_t, [grey, (learned(x_t, t), "C4")], scale)


def draw_samples(ax, title, x_0):
    """A histogram of samples x_0 (n, 2), with rings of equal reward."""
    x, y = x_0.T.numpy()
    ax.hist2d(x, y, 90, range=[(-3, 3), (-3, 3)], cmap="Greys")
    points, _ = grid(-3, 3, 60)
    x, y = points.T.reshape(2, 60, 60).numpy()
    height = reward(points).view(60, 60).numpy()
    ax.contour(x, y, height, [0.25, 0.5, 0.75], colors="C2")
    star_x, star_y = PEAK.numpy()
    ax.plot(star_x, star_y, "k*", markersize=9)
    ax.set_title(title)
    ax.set_aspect("equal")


def draw_curve(ax, title, rounds, rewards, last):
    """Mean rewards over their rounds, on an axis that has room for round `last`."""
    ax.plot(rounds, rewards, "C4.-")
    ax.set_xlim(0, last + 0.5)
    ax.set_ylim(0, 1)
    ax.set_xlabel("round")
    ax.set_title(title)
    ax.set_box_aspect(1)


def draw_key(ax):
    """How to read the other panels."""
    ax.set_axis_off()
    ax.set_title("How to read this")
    ax.set_xlim(0, 1)
    ax.set_ylim(0, 1)
    lines = [
        (
            "star",
            "the reward's peak. At t = 0.5\nit is drawn at half its place,\nas $x_t$ is half $x_0$",
        ),
        ("C4", f"minus a field at t = {SHOWN}: the\nway that sampling moves"),
        ("0.6", r"the same for $v_{old}$"),
        ("ring", "reward 0.25, 0.5, 0.75"),
        ("grey", "grey: density of $x_t$ under\n$v_{old}$, or of samples $x_0$"),
    ]
    heights = (0.88, 0.62, 0.44, 0.3, 0.12)
    for (kind, text), y in zip(lines, heights, strict=True):
        if kind == "star":
            ax.plot(0.07, y, "k*", markersize=12)
        elif kind == "ring":
            ax.plot(0.07, y, "o", markersize=13, fillstyle="none", color="C2", markeredgewidth=2)
        elif kind == "grey":
            ax.plot(0.07, y, "s", markersize=13, color="0.75")
        else:
            straight = {"arrowstyle": "-|>", "color": kind, "linewidth": 2}
            ax.annotate("", (0.14, y), (0.0, y), arrowprops=straight)
        ax.text(0.19, y, text, va="center", fontsize=11)


@torch.no_grad()
def draw(path, learned, samples, rewards, beta, negative=True):
    """Ten panels: the fields; samples {"before": (n, 2), "after": (n, 2)}; the reward; a key."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 7.2), layout="constrained")
    axes = figure.subplots(2, 5)
    fields = [*axes[0, :4], *axes[1, :2]]
    draw_fields(fields, learned, beta, negative)
    draw_key(axes[0, 4])
    for ax, (name, x_0) in zip(axes[1, 2:4], samples.items(), strict=True):
        draw_samples(ax, f"$x_0$ {name}: mean reward {reward(x_0).mean():.2f}", x_0)
    last = len(rewards)
    draw_curve(axes[1, 4], "online: mean reward", range(1, last + 1), rewards, last)
    figure.savefig(path, dpi=90)


class Recorder:
    """Frames of an animation: called as `watch` of `online`."""

    def __init__(self, rounds):
        self.rounds = rounds
        self.rewards = []
        self.frames = []

    @torch.no_grad()
    def __call__(self, i, theta):
        # The run's own random numbers stay as they are without an animation.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            x_0 = sample(theta, 6000)
            eps = torch.randn_like(x_0)
        self.rewards.append(reward(x_0).mean().item())
        # Every second round is enough.
        if i % 2 == 0:
            self.frames.append(self.frame(i, theta, x_0, eps))

    def frame(self, i, theta, x_0, eps):
        """One picture: the samples x_0 (n, 2), the field, and the reward up to round i."""
        from matplotlib.figure import Figure
        from PIL import Image

        figure = Figure(figsize=(9.6, 3.5), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        draw_samples(left, f"samples $x_0$ after round {i}", x_0)
        x, y = ((1 - SHOWN) * x_0 + SHOWN * eps).T.numpy()
        middle.hist2d(x, y, 60, range=[(-2.1, 2.1), (-2.1, 2.1)], cmap="Greys", vmax=40)
        x_t, t = seen_points()
        draw_arrows(middle, x_t, exact_old(x_t, t), "0.6")
        draw_arrows(middle, x_t, theta(x_t, t), "C4")
        star_x, star_y = ((1 - SHOWN) * PEAK).numpy()
        middle.plot(star_x, star_y, "k*", markersize=9)
        middle.set_title(rf"$x_t$ and $-v_\theta$ at t = {SHOWN}")
        middle.set_aspect("equal")
        title = f"mean reward: {self.rewards[-1]:.2f}"
        draw_curve(right, title, range(i + 1), self.rewards, self.rounds)
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=75)
        return Image.open(buffer).convert("RGB")

    def save(self, path):
        """Write the GIF; the last frame stays longer."""
        # One palette for all, so that what stands still does not flicker.
        palette = self.frames[-1].quantize(64)
        frames = [frame.quantize(palette=palette, dither=0) for frame in self.frames]
        milliseconds = [200] * (len(frames) - 1) + [2000]
        more = {"save_all": True, "append_images": frames[1:], "loop": 0, "optimize": True}
        frames[0].save(path, duration=milliseconds, **more)


def parse(argv):
    """The command line's settings."""
    usual = Online()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--beta", type=float, default=1.0, help="beta of Eq. (5), > 0")
    parser.add_argument("--rounds", type=int, default=usual.iterations, help="online, at least 1")
    parser.add_argument("--eta", default=usual.eta, help="online: a constant or START,SLOPE,MAX")
    parser.add_argument("--z", type=float, default=usual.z, help="online: Z_c in spreads, > 0")
    parser.add_argument("--no-negative", action="store_true", help="drop Eq. (5)'s second term")
    parser.add_argument("--out", type=Path, default=Path("runs/toy_2d.png"))
    parser.add_argument("--animate", type=Path, help="also write the rounds as a .gif")
    args = parser.parse_args(argv)
    if not 0 < args.beta < math.inf:
        parser.error(f"--beta {args.beta}: must be > 0; try 1")
    if not 0 < args.z < math.inf:
        parser.error(f"--z {args.z}: must be > 0; try {usual.z:g}")
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: must be at least 1; try {usual.iterations}")
    if args.animate and args.animate.suffix != ".gif":
        parser.error(f"--animate {args.animate}: must end in .gif; try {args.animate}.gif")
    try:
        nft.soft_update_decay(1, args.eta)
    except ValueError as error:
        parser.error(f"--{error}; try {usual.eta}")
    if importlib.util.find_spec("matplotlib") is None:
        parser.error("the figure needs matplotlib: pip install matplotlib")
    return args


def main(argv=None):
    """Learn, print two tables, and draw."""
    args = parse(argv)
    torch.manual_seed(args.seed)
    # The layers are small, and threads would change the last digits.
    torch.set_num_threads(1)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    started = time.time()
    negative = not args.no_negative
    loss = nft.nft_loss if negative else positive_only

    def beta_round(net, x_0):
        return one_round(net, x_0, args.beta, loss)

    def beta_optimum(x_t, t):
        return optimum(x_t, t, args.beta, negative)

    net = fit(Net(), flow_matching)
    learned = fit(copy.deepcopy(net), beta_round)
    print_errors(net, learned, args.beta, negative)
    recorder = Recorder(args.rounds) if args.animate else None
    settings = {"iterations": args.rounds, "eta": args.eta, "z": args.z, "loss": loss}
    theta, rewards = online(net, args.beta, recorder, **settings)
    before = sample(net, 20000)
    after = sample(theta, 20000)
    best = "Eq. (6)" if negative else "optimum"
    samples = {
        "old policy, exact": draw_old(20000),
        "pretrained network": before,
        f"one round, {best} exact": sample(beta_optimum, 20000),
        "one round, learned": sample(learned, 20000),
        f"online, {len(rewards)} rounds": after,
    }
    print_rewards(samples)
    shown = {"before": before, "after": after}
    draw(args.out, learned, shown, rewards, args.beta, negative)
    if recorder:
        args.animate.parent.mkdir(parents=True, exist_ok=True)
        recorder.save(args.animate)
        print(f"{args.animate}, {args.animate.stat().st_size / 1e6:.2f} MB")
    print(f"{args.out}, {time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
