"""The tables of STUDIES.md that are not of training runs, and their plots.

    pip install cma gymnasium matplotlib
    python examples/studies/tables.py                    # all of them, on one core
    python examples/studies/tables.py memory,speed       # some

Each runs the study of its name, writes what came out to tables.json, with its commit and machine,
and from there into STUDIES.md: see results.py. "speed" is to be run on a quiet machine.
SPDX-License-Identifier: MIT
"""

import argparse
import importlib.util
import statistics
import sys
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))
sys.path.insert(0, str(REPOSITORY / "examples" / "studies"))
import bench
import blackbox
import control
import results
import simulate

import nft

MODELS = ("tiny", "tiny-sd3")
PARTS = {
    "rollout": "the rollout",
    "old": "the old policy",
    "reference": "the reference",
    "theta forward": "θ, forward",
    "backward and rest": "backward, and the rest",
    "reward": "the reward",
}


# ---- Markdown ------------------------------------------------------------------------------------
def table(heading, lines):
    """A Markdown table of a heading and lines of cells."""
    rule = ["---"] * len(heading)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (heading, rule, *lines))


def number(value):
    """Three digits, or all those of a large number."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def mean_and_each(values):
    """The mean (each seed's)."""
    each = ", ".join(map(number, values))
    return f"{number(statistics.mean(values))} ({each})"


def median_and_range(values):
    """The median (lowest to highest)."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


# ---- The tables ----------------------------------------------------------------------------------
def blackbox_table(found):
    """Best values after all calls, a column a function. found: of blackbox.compare_all."""
    methods = next(iter(found.values()))[0][0]
    lines = []
    for method in methods:
        cells = [method]
        for of_seeds in found.values():
            cells.append(mean_and_each([curves[method][-1] for curves, _, _ in of_seeds]))
        lines.append(cells)
    return table(["method", *[name.capitalize() for name in found]], lines)


def run_blackbox():
    """The table, and blackbox.png."""
    found = blackbox.compare_all(blackbox.FUNCTIONS, blackbox.CALLS)
    blackbox.draw(results.FILE.parent / "blackbox.png", found)
    return blackbox_table(found)


def control_table(controllers, curves):
    """Mean returns at the end. controllers: a return a seed; curves: {method: a curve a seed}."""
    lines = [["the poor controller, from its own starts", mean_and_each(controllers)]]
    cloned = [curve[0] for curve in curves["NFT"]]
    lines.append(["cloned from it", mean_and_each(cloned)])
    for method, of_seeds in curves.items():
        lines.append([method, mean_and_each([curve[-1] for curve in of_seeds])])
    return table(["policy", "return"], lines)


def run_control():
    """The table, and control.png."""
    controllers, curves, before, after = control.compare(control.SEEDS, control.ITERATIONS)
    control.draw(results.FILE.parent / "control.png", curves, before, after)
    return control_table(controllers, curves)


def memory_table(found):
    """Peaks in GB. found: rows of simulate.main."""
    lines = []
    for label, batch, peaks in found:
        sizes = [peaks[key] / 1e9 for key in ("rollout", "training", "checkpointing")]
        lines.append([label, str(batch), *[f"{size:.2f}" for size in sizes]])
    heading = ["model, pixels", "batch", "rollout", "training", "training, `--checkpointing`"]
    return table(heading, lines)


def run_memory():
    """The simulated peaks."""
    return memory_table(simulate.main(list(simulate.PIPELINES), []))


def speed_table(found):
    """Ratios, and shares of an iteration. found: {model: what bench.bench returns}."""
    ratios = {
        "a plain loop in the released code's order of work": 0,
        "the same without KL, where the released code computes a reference that weighs nothing": 1,
        "nft.py's rollout beside the pipeline alone": 2,
    }
    lines = []
    for text, i in ratios.items():
        lines.append([text, *[median_and_range(measured[i]) for measured in found.values()]])
    for part, text in PARTS.items():
        shares = [measured[3][part] for measured in found.values()]
        lines.append([f"share of {text}", *[f"{share:.0%}" for share in shares]])
    heading = [f"`{model}`" for model in found]
    return table(["beside nft.py's iteration", *heading], lines)


def run_speed():
    """bench.py on both shipped models."""
    found = {}
    for model in MODELS:
        config = nft.configure(model=model, groups=4)
        found[model] = bench.bench(config, model, repeats=5)
    return speed_table(found)


TABLES = dict(zip(results.OTHERS, (run_blackbox, run_control, run_memory, run_speed), strict=True))
PACKAGES = {"blackbox": "cma", "control": "gymnasium"}


def main(argv=None):
    """Make the tables that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="?", default=",".join(TABLES), help="all without it")
    names = parser.parse_args(argv).names.split(",")
    unknown = set(names) - set(TABLES)
    if unknown:
        parser.error(f"{','.join(unknown)}: must be of {', '.join(TABLES)}")
    for name in names:
        package = PACKAGES.get(name)
        for needed in (package, "matplotlib"):
            if package and importlib.util.find_spec(needed) is None:
                parser.error(f"{name} needs {needed}: pip install {needed}")
    torch.set_num_threads(1)
    for name in names:
        results.record(name, TABLES[name]())


if __name__ == "__main__":
    main()
