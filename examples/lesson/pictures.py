"""The drawings of lesson.ipynb, so that its cells hold the method alone.

It needs matplotlib.
SPDX-License-Identifier: MIT
"""

import inspect
import math
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path += [str(REPOSITORY), str(REPOSITORY / "examples/studies")]
import toy_2d

import nft

# The noise of a stochastic sampler at time t is NOISE * sqrt(t).
NOISE = 0.7


# ---- The lines of nft.py -------------------------------------------------------------------------
def lines(function, **marks):
    """Print the lines of `function` that hold a mark, under the mark's name and their number."""
    source, first = inspect.getsourcelines(function)
    for name, mark in marks.items():
        for number, line in enumerate(source, first):
            if mark in line:
                print(f"{name:12s} nft.py:{number:<5d} {line.strip()}")
                break
        else:
            raise ValueError(f"{function.__name__} has no line with {mark}")


# ---- Likelihoods of the reverse process ----------------------------------------------------------
def stochastic_paths(start, steps):
    """Paths of FlowGRPO's stochastic sampler on the exact old policy, from noise `start` (n, 2).

    Returns the points (steps + 1, n, 2), and the log-likelihood of each path given its start, (n,).
    """
    x = start
    points = [x]
    total = torch.zeros(len(x)).double()
    for i in range(steps, 0, -1):
        time = i / steps
        t = torch.full((len(x), 1), time).double()
        v = toy_2d.exact_old(x, t)
        # What is added to the drift keeps the density of x_t as it is under the noise.
        drift = v + NOISE**2 / 2 * (x + (1 - t) * v)
        std = NOISE * math.sqrt(time / steps)
        z = torch.randn_like(x)
        x = x - drift / steps + std * z
        points.append(x)
        # The logarithm of the Gaussian density of this step.
        total += -z.square().sum(1) / 2 - math.log(2 * math.pi * std**2)
    return torch.stack(points), total


def show_likelihoods(steps=20):
    """Paths and their likelihoods, beside the forward process; returns a correlation."""
    _, axes = plt.subplots(1, 3, figsize=(14, 4.4), layout="constrained")
    one_start = torch.tensor([[0.3, -0.2]]).double().expand(6, 2)
    points, _ = stochastic_paths(one_start, steps)
    axes[0].plot(*points.unbind(2), ".-", alpha=0.7)
    axes[0].plot(*one_start[0], "k*", markersize=12)
    axes[0].plot(*points[-1].T, "ko", fillstyle="none", markersize=9)
    axes[0].set_title(
        f"reverse: 6 paths from one noise (star),\n{steps} densities each, all stored"
    )
    points, path = stochastic_paths(torch.randn(2000, 2).double(), steps)
    ends = points[-1]
    # At this time x_t is x_0 to three digits.
    t = torch.full((len(ends), 1), 1e-3).double()
    true = toy_2d.exact_fields(ends, t).density.log()
    axes[1].plot(true, path, ".", markersize=3)
    correlation = torch.corrcoef(torch.stack([true, path]))[0, 1].item()
    axes[1].set_xlabel("log p(x_0), exact")
    axes[1].set_ylabel("log-likelihood of the path")
    axes[1].set_title(
        f"2000 samples, and how likely their\npaths were: correlation {correlation:.2f}"
    )
    x_0 = toy_2d.draw_old(1)
    for t in torch.linspace(0.1, 0.9, 6).double():
        eps = torch.randn(1, 2).double()
        x_t = (1 - t) * x_0 + t * eps
        axes[2].plot(*torch.cat([x_0, eps]).T, "-", color="0.75")
        axes[2].plot(*x_t.T, "C0o")
    axes[2].plot(*x_0.T, "ko", fillstyle="none", markersize=9)
    axes[2].set_title("forward: from one clean sample (ring)\nstraight to any time, no path")
    for ax in (axes[0], axes[2]):
        ax.set_xlim(-3.3, 3.3)
        ax.set_ylim(-3.3, 3.3)
        ax.set_box_aspect(1)
    plt.show()
    return correlation


# ---- The plane -----------------------------------------------------------------------------------
def scatter(ax, title, points, color="C0"):
    """Points (n, 2) on the plane."""
    ax.plot(*points.T, ".", markersize=2, color=color)
    ax.set_xlim(-3.3, 3.3)
    ax.set_ylim(-3.3, 3.3)
    ax.set_box_aspect(1)
    ax.set_title(title)


def show_forward(x_0):
    """The clean samples x_0 (n, 2) at five times of the forward process."""
    _, axes = plt.subplots(1, 5, figsize=(15, 3.4), layout="constrained")
    eps = torch.randn_like(x_0)
    for ax, time in zip(axes, (0.0, 0.25, 0.5, 0.75, 1.0), strict=True):
        alpha_t, sigma_t = nft.alpha_sigma(torch.tensor(time))
        scatter(ax, f"t = {time}", alpha_t * x_0 + sigma_t * eps)
    plt.show()


def show_samples(**samples):
    """A panel for each name: points (n, 2), the reward's rings, its peak and its mean."""
    width = 3.6 * len(samples)
    _, axes = plt.subplots(1, len(samples), figsize=(width, 3.9), layout="constrained")
    for ax, (name, x_0) in zip(axes, samples.items(), strict=True):
        mean = toy_2d.reward(x_0).mean()
        name = name.replace("_", " ")
        toy_2d.draw_samples(ax, f"{name}: mean reward {mean:.2f}", x_0)
    plt.show()


def show_sets(x_0, r):
    """Each sample falls into the positive set with probability r, else into the negative one."""
    positive = torch.rand(len(r)) < r
    _, axes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
    axes[0].scatter(*x_0.T, c=r, s=3, cmap="RdYlGn", vmin=0, vmax=1)
    scatter(axes[0], "r of each sample (red 0, green 1)", x_0[:0])
    scatter(axes[1], f"positive set: {positive.sum()} of {len(r)}", x_0[positive], "C2")
    scatter(axes[2], f"negative set: {(~positive).sum()}", x_0[~positive], "C3")
    for ax in axes:
        ax.plot(*toy_2d.PEAK, "k*", markersize=10)
    plt.show()


@torch.no_grad()
def show_fields(learned, beta):
    """The six panels of toy_2d.py: the exact fields, Eq. (6), and the learned one."""
    _, axes = plt.subplots(2, 3, figsize=(12, 8.3), layout="constrained")
    toy_2d.draw_fields(axes.flatten(), learned, beta)
    plt.show()


# ---- Runs of nft.py ------------------------------------------------------------------------------
def show_rewards(runs):
    """Held-out rewards; runs: {label: (rows of metrics.jsonl, name of a reward)}."""
    _, ax = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
    for label, (rows, name) in runs.items():
        seen = [row for row in rows if f"eval_reward/{name}" in row]
        iterations = [row["iteration"] for row in seen]
        ax.plot(iterations, [row[f"eval_reward/{name}"] for row in seen], "o-", label=label)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("iteration")
    ax.set_ylabel("held-out reward")
    ax.legend()
    plt.show()


def show_both(rows, proxy, watched):
    """The reward that is trained on, and one that is only watched, each on its own axis."""
    _, left = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
    right = left.twinx()
    seen = [row for row in rows if "eval_reward" in row]
    iterations = [row["iteration"] for row in seen]
    for ax, name, color in ((left, proxy, "C3"), (right, watched, "C0")):
        ax.plot(iterations, [row[f"eval_reward/{name}"] for row in seen], "o-", color=color)
        ax.set_ylabel(f"held out: {name}", color=color)
        ax.set_ylim(bottom=0)
    left.set_xlabel("iteration")
    left.set_title("red is trained on, blue is only watched")
    plt.show()
