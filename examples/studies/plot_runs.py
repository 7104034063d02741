"""Held-out reward and roughness of runs against iterations, as a PNG and a table.

    for s in 0 1 2; do python nft.py --seed $s --out runs/tiny-$s; done
    python examples/studies/plot_runs.py curve.png tiny=runs/tiny-0,runs/tiny-1,runs/tiny-2

Each LABEL=DIR,DIR,... is one line: the mean over its runs, with their range shaded. Needs
matplotlib.
SPDX-License-Identifier: MIT
"""

import json
import sys
from pathlib import Path

import numpy as np

# Field of metrics.jsonl: (its name in the plot, lowest, highest value shown).
FIELDS = {
    "eval_reward": ("held-out reward", 0, 1),
    "eval_roughness": ("roughness (base = 1)", 0.6, 1.6),
}


def read(folder):
    """The evaluated rows of a run's metrics.jsonl, as {iteration: row}."""
    rows = {}
    for line in (Path(folder) / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "eval_reward" in row:
            rows[row["iteration"]] = row
    return rows


def parse(group):
    """A label and its directories from "LABEL=DIR,DIR"."""
    label, _, folders = group.partition("=")
    return label, folders.split(",")


def common_iterations(runs):
    """The iterations that all runs were evaluated at, in order."""
    shared = set(runs[0])
    for run in runs[1:]:
        shared &= set(run)
    return sorted(shared)


def summary(label, folder, first, last):
    """A line on a run, from its first and last row."""
    return (
        f"{label:10s} {folder:24s}"
        f" reward {first['eval_reward']:.3f} -> {last['eval_reward']:.3f}"
        f"  roughness {last['eval_roughness']:.2f}  images {last['images']}"
        f"  seconds {last['seconds']:.0f}"
    )


def main(path, *groups):
    """Plot `groups` ("LABEL=DIR,DIR") into `path`, and print a line a run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.8), layout="constrained")
    axes = figure.subplots(1, 2)
    for group in groups:
        label, folders = parse(group)
        runs = [read(folder) for folder in folders]
        iterations = common_iterations(runs)
        for axis, field in zip(axes, FIELDS, strict=True):
            y = np.array([[run[i][field] for i in iterations] for run in runs])
            axis.plot(iterations, y.mean(0), label=label)
            axis.fill_between(iterations, y.min(0), y.max(0), alpha=0.2)
        for folder, run in zip(folders, runs, strict=True):
            print(summary(label, folder, run[iterations[0]], run[iterations[-1]]))
    for axis, (name, low, high) in zip(axes, FIELDS.values(), strict=True):
        axis.set(xlabel="iteration", ylabel=name, ylim=(low, high))
        axis.grid(alpha=0.3)
    axes[0].legend(loc="lower right")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
