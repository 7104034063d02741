"""Held-out reward and roughness of one or more runs against iterations, as a PNG and a table.

    for s in 0 1 2; do python nft.py --seed $s --out runs/tiny-$s; done
    python examples/plot_runs.py curve.png tiny=runs/tiny-0,runs/tiny-1,runs/tiny-2

Each LABEL=DIR,DIR,... is one line: the mean over its runs, with their range shaded. Needs matplotlib.
SPDX-License-Identifier: MIT
"""
import json
import pathlib
import sys

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def read(folder):
    """The evaluated rows of a run's metrics.jsonl."""
    lines = (pathlib.Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "eval_reward" in row]


def main(path, *groups):
    """Plot `groups` ("LABEL=DIR,DIR") into `path` and print their first and last rows."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 2.8), constrained_layout=True)
    for group in groups:
        label, _, folders = group.partition("=")
        runs = [read(folder) for folder in folders.split(",")]
        shared = set.intersection(*({row["iteration"] for row in run} for run in runs))
        runs = [[row for row in run if row["iteration"] in shared] for run in runs]
        x = sorted(shared)
        for axis, key in zip(axes, ("eval_reward", "roughness")):
            y = np.array([[row[key] for row in run] for run in runs])
            axis.plot(x, y.mean(0), label=label)
            axis.fill_between(x, y.min(0), y.max(0), alpha=0.2)
        for folder, run in zip(folders.split(","), runs):
            print(f"{label:10s} {folder:24s} reward {run[0]['eval_reward']:.3f} -> {run[-1]['eval_reward']:.3f}"
                  f"  roughness {run[-1]['roughness']:.2f}  images {run[-1]['images']}"
                  f"  seconds {run[-1]['seconds']:.0f}")
    for axis, name in zip(axes, ("held-out reward", "roughness (base = 1)")):
        axis.set(xlabel="iteration", ylabel=name)
        axis.grid(alpha=0.3)
    axes[0].set_ylim(0, 1)
    axes[1].set_ylim(0.6, 1.6)
    axes[0].legend(loc="lower right")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
