"""Held-out rewards and roughness of runs against iterations, as a picture and a table.

    python examples/studies/plot_runs.py curve.png runs/tiny
    python examples/studies/plot_runs.py curve.png runs/tiny runs/other     # a line a directory
    for s in 0 1 2; do python nft.py --seed $s --out runs/tiny-$s; done
    python examples/studies/plot_runs.py curve.png tiny=runs/tiny-0,runs/tiny-1,runs/tiny-2

A line is LABEL=DIR,DIR,...: the mean over its runs, with their range shaded. Without LABEL= it has
its directory's name. Beside the name stands what its longest run took. There is a plot for the
held-out reward that is trained on, for each of its parts where it is a sum, for each reward that is
only watched, and for the roughness. A run may still be going on. Needs matplotlib.
SPDX-License-Identifier: MIT
"""

import json
import math
import sys
from pathlib import Path

import numpy as np

REWARD = "eval_reward"
# Mean absolute Laplacian of the held-out images, over that of the base model's.
ROUGHNESS = "eval_roughness"
# A plot's width and height in inches, and the plots in a row.
SIZE = (4, 2.8)
COLUMNS = 3
# The least that the axis of roughness shows, so that its noise does not look like a change.
ROUGHNESS_RANGE = (0.9, 1.1)


# ---- Runs ----------------------------------------------------------------------------------------
def read(folder):
    """The evaluated rows of a run's metrics.jsonl, as {iteration: row}. ValueError without any.

    "watched", in each row, is the set of its fields whose rewards are not trained on.
    """
    file = Path(folder) / "metrics.jsonl"
    if not file.is_file():
        raise ValueError(f"{folder}: must be a run's directory, with metrics.jsonl; correct it")
    logged = [json.loads(line) for line in file.read_text().splitlines()]
    trained = {f"eval_{name}" for row in logged[1:] for name in row}
    rows = {}
    for row in logged:
        if REWARD in row:
            parts = {name for name in row if name.startswith(f"{REWARD}/")}
            # Before the first iteration nothing tells them apart.
            watched = set()
            if trained:
                watched = parts - trained
            rows[row["iteration"]] = row | {"watched": watched}
    if not rows:
        raise ValueError(f"{folder}: must have been evaluated once; wait for it")
    return rows


def parse(group):
    """A label and its directories from "LABEL=DIR,DIR" or "DIR,DIR"."""
    label, equals, folders = group.partition("=")
    # A directory may have such a sign in its name.
    if not equals or Path(group).is_dir():
        folders = group
        label = Path(group.split(",")[0]).resolve().name
    return label, folders.split(",")


def common_iterations(runs, field=REWARD):
    """The iterations at which all runs have a field, in order."""
    shared = set(runs[0])
    for run in runs:
        shared &= {i for i, row in run.items() if field in row}
    return sorted(shared)


def all_rows(lines):
    """The evaluated rows of all runs of {label: runs}."""
    rows = []
    for runs in lines.values():
        for run in runs:
            rows += run.values()
    return rows


def fields(lines):
    """What is plotted: the reward, its parts and the watched rewards, and the roughness, if there.

    lines: {label: runs}. A part that is the whole reward, in all rows, is not plotted again.
    """
    rows = all_rows(lines)
    names = {}
    for row in rows:
        names |= dict.fromkeys(name for name in row if name.startswith(f"{REWARD}/"))
    chosen = [REWARD]
    for name in names:
        if any(not math.isclose(row.get(name, math.nan), row[REWARD]) for row in rows):
            chosen.append(name)
    if any(ROUGHNESS in row for row in rows):
        chosen.append(ROUGHNESS)
    return chosen


def title(field, lines):
    """A field's name in the plot."""
    if field == REWARD:
        return "held-out reward"
    if field == ROUGHNESS:
        return "roughness (base = 1)"
    name = field.removeprefix(f"{REWARD}/")
    rows = [row for row in all_rows(lines) if field in row]
    # What one run watches another may be trained on.
    if all(field in row["watched"] for row in rows):
        name += " (watched)"
    return name


def summary(label, folder, first, last):
    """A line on a run, from its first row and the last one that is compared."""
    return (
        f"{label:10s} {folder:24s}"
        f" reward {first[REWARD]:.3f} -> {last[REWARD]:.3f} at iteration {last['iteration']}"
        f"  roughness {last.get(ROUGHNESS, math.nan):.2f}  images {last.get('images', 0)}"
        f"  seconds {last.get('seconds', math.nan):.0f}"
    )


def spent(label, runs):
    """A line's label with the images and minutes of its longest run, where they are known."""
    last = [run[max(run)] for run in runs]
    images = max(row.get("images", 0) for row in last)
    minutes = max(row.get("seconds", 0) for row in last) / 60
    if not images:
        return label
    return f"{label} ({images:,} images, {minutes:.1f} minutes)"


# ---- The picture ---------------------------------------------------------------------------------
def draw(axis, field, lines):
    """Plot one field of all lines that have it."""
    for number, (label, runs) in enumerate(lines.items()):
        iterations = common_iterations(runs, field)
        if not iterations:
            continue
        y = np.array([[run[i][field] for i in iterations] for run in runs])
        # A label has one colour in all plots.
        color = f"C{number}"
        axis.plot(iterations, y.mean(0), marker=".", color=color, label=spent(label, runs))
        axis.fill_between(iterations, y.min(0), y.max(0), color=color, alpha=0.2, linewidth=0)
    if field == ROUGHNESS:
        low, high = axis.get_ylim()
        axis.set_ylim(min(low, ROUGHNESS_RANGE[0]), max(high, ROUGHNESS_RANGE[1]))
    axis.set(xlabel="iteration", title=title(field, lines))
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)


def make_figure(lines):
    """A figure with a plot for each field of {label: runs}."""
    from matplotlib.figure import Figure

    shown = fields(lines)
    columns = min(len(shown), COLUMNS)
    height = math.ceil(len(shown) / columns)
    size = (SIZE[0] * columns, SIZE[1] * height)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(height, columns, squeeze=False).flatten()
    for axis, field in zip(axes, shown, strict=False):
        draw(axis, field, lines)
    for axis in axes[len(shown) :]:
        axis.remove()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    return figure


def main(path, *groups):
    """Plot `groups` ("LABEL=DIR,DIR" or "DIR") into `path`, and print a line a run.

    Raises ValueError, one line, where there is nothing to plot.
    """
    lines = {}
    for group in groups:
        label, folders = parse(group)
        if label in lines:
            # Another directory of that name.
            label = group
        runs = [read(folder) for folder in folders]
        iterations = common_iterations(runs)
        if not iterations:
            raise ValueError(f"{group}: must be evaluated at some iteration in common; plot apart")
        lines[label] = runs
        for folder, run in zip(folders, runs, strict=True):
            print(summary(label, folder, run[iterations[0]], run[iterations[-1]]))
    make_figure(lines).savefig(path, dpi=110)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    if Path(sys.argv[1]).is_dir() or "=" in sys.argv[1]:
        sys.exit(f"plot_runs.py: {sys.argv[1]}: must be the picture to write; begin with curve.png")
    try:
        main(*sys.argv[1:])
    except ValueError as error:
        sys.exit(f"plot_runs.py: {error}")
    except ModuleNotFoundError as error:
        sys.exit(f"plot_runs.py: {error}; pip install {error.name}")
