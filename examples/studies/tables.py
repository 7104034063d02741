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
import os
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
import report
import results
import simulate

import nft

MODELS = ("tiny", "tiny-sd3")
# What bench.bench returns, in its order.
RATIOS = (
    "a plain loop in the released code's order of work",
    "the same without KL, where the released code computes a reference that weighs nothing",
    "nft.py's rollout beside the pipeline alone",
)
PARTS = {
    "rollout": "the rollout",
    "old": "the old policy",
    "reference": "the reference",
    "theta forward": "θ, forward",
    "backward and rest": "backward, and the rest",
    "reward": "the reward",
}
PACKAGES = {"blackbox": ("cma", "matplotlib"), "control": ("gymnasium", "matplotlib")}


def mean_and_each(values):
    """The mean (each seed's)."""
    each = ", ".join(map(report.number, values))
    return f"{report.number(statistics.mean(values))} ({each})"


def median_and_range(values):
    """The median (lowest to highest)."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def blackbox_table(found):
    """Best values after all calls, a column a function. found: of blackbox.compare_all."""
    first = next(iter(found.values()))
    curves_of_a_seed, _, _ = first[0]
    lines = []
    for method in curves_of_a_seed:
        cells = [method]
        for of_seeds in found.values():
            cells.append(mean_and_each([curves[method][-1] for curves, _, _ in of_seeds]))
        lines.append(cells)
    return report.table(["method", *[name.capitalize() for name in found]], lines)


def run_blackbox():
    """The table, and blackbox.png."""
    found = blackbox.compare_all(list(blackbox.FUNCTIONS), blackbox.CALLS)
    table = blackbox_table(found)
    blackbox.draw(results.FILE.parent / "blackbox.png", found)
    return table


def control_table(controllers, curves):
    """Mean returns at the end. controllers: a return a seed; curves: {method: a curve a seed}."""
    lines = [["the poor controller, from its own starts", mean_and_each(controllers)]]
    cloned = [curve[0] for curve in curves["NFT"]]
    lines.append(["cloned from it", mean_and_each(cloned)])
    for method, of_seeds in curves.items():
        lines.append([method, mean_and_each([curve[-1] for curve in of_seeds])])
    return report.table(["policy", "return"], lines)


def run_control():
    """The table, and control.png."""
    controllers, curves, before, after = control.compare(control.SEEDS, control.ITERATIONS)
    table = control_table(controllers, curves)
    control.draw(results.FILE.parent / "control.png", curves, before, after)
    return table


def memory_table(found):
    """Peaks in GB. found: rows of simulate.main."""
    lines = []
    for label, batch, peaks in found:
        sizes = [peaks[key] / 1e9 for key in ("rollout", "training", "checkpointing")]
        lines.append([label, str(batch), *[f"{size:.2f}" for size in sizes]])
    heading = ["model, pixels", "batch", "rollout", "training", "training, `--checkpointing`"]
    return report.table(heading, lines)


def run_memory():
    """The simulated peaks."""
    return memory_table(simulate.main(list(simulate.PIPELINES), []))


def speed_table(found):
    """Ratios, and shares of an iteration. found: {model: what bench.bench returns}."""
    lines = []
    for i, text in enumerate(RATIOS):
        lines.append([text, *[median_and_range(measured[i]) for measured in found.values()]])
    for part, text in PARTS.items():
        shares = [measured[-1][part] for measured in found.values()]
        lines.append([f"share of an iteration: {text}", *[f"{share:.0%}" for share in shares]])
    heading = [f"`{model}`" for model in found]
    return report.table(["beside nft.py's iteration", *heading], lines)


def run_speed():
    """bench.py on both shipped models, on the CPU."""
    found = {}
    for model in MODELS:
        config = nft.configure(model=model, groups=4, device="cpu")
        found[model] = bench.bench(config, model, repeats=5)
    return speed_table(found)


TABLES = {
    "blackbox": run_blackbox,
    "control": run_control,
    "memory": run_memory,
    "speed": run_speed,
}


def main(argv=None):
    """Make the tables that the command line names; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="?", default=",".join(TABLES), help="all without it")
    names = parser.parse_args(argv).names.split(",")
    for name in names:
        if name not in TABLES:
            parser.error(f"{name}: must be of {', '.join(TABLES)}")
        for package in PACKAGES.get(name, ()):
            if importlib.util.find_spec(package) is None:
                parser.error(f"{name} needs {package}: pip install {package}")
    # For the presets' files of this repository, not of another one that we may be in.
    os.chdir(REPOSITORY)
    torch.set_num_threads(1)
    made = results.origin()
    # The files may be edited while a study runs.
    studies = {name: results.study_fingerprint(name) for name in names}
    for name in names:
        try:
            table = TABLES[name]()
        except KeyboardInterrupt:
            print(f"tables.py: interrupted in {name}; earlier tables are kept", file=sys.stderr)
            return 130
        results.record(name, table, made, studies[name])
    return 0


if __name__ == "__main__":
    sys.exit(main())
