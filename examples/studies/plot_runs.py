"""Held-out rewards of runs against iterations, as a picture and a table.

    python examples/studies/plot_runs.py curve.png runs/tiny
    for s in 0 1 2; do python nft.py --seed $s --out runs/tiny-$s; done
    python examples/studies/plot_runs.py curve.png tiny=runs/tiny-0,runs/tiny-1,runs/tiny-2 runs/one

A line is LABEL=DIR,DIR,...: the mean over its runs at the iterations at which all were evaluated,
with their range shaded. Without LABEL= it has the name of its first directory. There is a plot for
the reward that is trained on, and, where there are several, for each by itself. A run may still be
going on. Needs matplotlib.
SPDX-License-Identifier: MIT
"""

import json
import sys
from pathlib import Path
from statistics import fmean


def read(folder):
    """{iteration: row} of the evaluated rows of a run's metrics.jsonl."""
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return {row["iteration"]: row for row in rows if "eval_reward" in row}


def parse(group):
    """A label and its runs from "LABEL=DIR,DIR" or "DIR,DIR"."""
    label, _, folders = group.rpartition("=")
    folders = folders.split(",")
    return label or Path(folders[0]).resolve().name, [read(folder) for folder in folders]


def curve(runs, field):
    """The iterations at which all runs have a field, in order, and there the value of each run."""
    shared = set(runs[0])
    for run in runs:
        shared &= {i for i, row in run.items() if field in row}
    iterations = sorted(shared)
    return iterations, [[run[i][field] for run in runs] for i in iterations]


def fields(lines):
    """The fields to plot of [(label, runs)]: the reward, and several rewards each by itself."""
    names = {}
    for _, runs in lines:
        for run in runs:
            for row in run.values():
                names |= dict.fromkeys(name for name in row if name.startswith("eval_reward/"))
    return ["eval_reward", *names] if len(names) > 1 else ["eval_reward"]


def make_figure(lines):
    """A figure with a plot for each field of [(label, runs)]."""
    from matplotlib.figure import Figure

    shown = fields(lines)
    figure = Figure(figsize=(4 * len(shown), 2.8), layout="constrained")
    axes = figure.subplots(1, len(shown), squeeze=False)[0]
    for axis, field in zip(axes, shown, strict=True):
        for number, (label, runs) in enumerate(lines):
            iterations, values = curve(runs, field)
            color = f"C{number}"
            axis.plot(iterations, list(map(fmean, values)), ".-", color=color, label=label)
            low = [min(each) for each in values]
            high = [max(each) for each in values]
            axis.fill_between(iterations, low, high, color=color, alpha=0.2, linewidth=0)
        axis.set(xlabel="iteration", title=field.removeprefix("eval_").removeprefix("reward/"))
        axis.grid(alpha=0.3)
    axes[0].legend()
    return figure


def main(path, *groups):
    """Plot `groups` ("LABEL=DIR,DIR" or "DIR") into `path`, and print a line a group."""
    lines = [parse(group) for group in groups]
    make_figure(lines).savefig(path, dpi=110)
    for label, runs in lines:
        iterations, values = curve(runs, "eval_reward")
        each = ", ".join(f"{value:.3f}" for value in values[-1])
        change = f"{fmean(values[0]):.3f} -> {fmean(values[-1]):.3f}"
        print(f"{label}: held-out reward {change} ({each}) at iteration {iterations[-1]}")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
