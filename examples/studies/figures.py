"""The paper's comparison and its ablations, at the size of a laptop.

    python examples/studies/figures.py --quick              # one seed, short runs, few figures
    python examples/studies/figures.py                      # three seeds
    python examples/studies/figures.py --figures default    # the presets, as nft.py runs them
    python examples/studies/figures.py --figures beta,eta   # some of the figures
    python examples/studies/figures.py --figures sweep      # what the settings were chosen from
    python examples/studies/figures.py --figures precision  # where the CPU or GPU has bf16 and fp16
    python examples/studies/figures.py --plot               # report the runs that are there

rows.py says what is run, report.py what is made of it. Runs are ordinary run directories under
--out, beside tables.md and the plots. Finished ones are not repeated; one that was cut off starts
anew, as does one of another method in nft.py or of other settings. But for --quick, what came out
is written to results.json, and from there into README.md and STUDIES.md: see results.py. The
tables of other studies are by tables.py.

Every method has the same base, prompts, reward, LoRA, evaluation (the same noise and solver),
number of images an iteration and, where a row does not change it, of updates (4). Accuracy counts
only beside roughness and the pictures. The plots need matplotlib.
SPDX-License-Identifier: MIT
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import importlib.util
import io
import json
import multiprocessing
import signal
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))
import baselines
import report
import results
import rows

import nft

# Whatever the preset's.
PINNED = {"updates": 4, "batch_size": 64}
# Settings of baselines.parts, not of nft.Config.
OWN = ("clip_range", "noise_level", "temperature")
# Every row is evaluated by this solver, whatever its own is.
EVALUATION_SOLVER = "dpm2"
# Seconds of a core an iteration, about; the other methods take 5.
SECONDS = {"ddpo": 6, "dpok": 8, "loop": 6, "coca": 7, "rtb": 9, "flowgrpo": 8}
# Run only on request. "precision" takes a CPU without bf16 and fp16 eight times as long.
LEFT_OUT = ("sweep", "precision")


# ---- Runs ----------------------------------------------------------------------------------------
class Meter:
    """Counts what a run spends; its make_model and evaluate are parts of nft.train.

    Rows that are evaluated get `cpu`, seconds of the process, and `evaluations`, samples that went
    through the denoiser. Both leave out loading and evaluation. A forward pass with a backward one
    counts as one evaluation. The seconds are not a clock's, which other processes would slow down.
    """

    def __init__(self, make_model=nft.Model, evaluate=nft.evaluate, clock=time.process_time):
        self.inner_model = make_model
        self.inner_evaluate = evaluate
        self.clock = clock
        self.count = None
        self.cpu = 0.0
        # The clock when the last evaluation ended.
        self.since = None

    def make_model(self, config):
        """The model, with a counter on its denoiser."""
        model = self.inner_model(config)
        self.count = baselines.Count(model)
        return model

    def evaluate(self, run, rewards, prompts, iteration):
        """The part by EVALUATION_SOLVER, and what was spent before it."""
        if iteration == 0:
            # Without the trial image.
            self.count.n = 0
        else:
            self.cpu += self.clock() - self.since
        evaluations = self.count.n
        pipe = run.model.pipe
        own = pipe.scheduler
        pipe.scheduler = nft.pick_solver(EVALUATION_SOLVER, own)
        fields = self.inner_evaluate(run, rewards, prompts, iteration)
        pipe.scheduler = own
        self.count.n = evaluations
        self.since = self.clock()
        return fields | {"cpu": self.cpu, "evaluations": evaluations}


def split(row):
    """A row's settings, with its method's: those of nft.Config, and those of baselines.parts."""
    if not row.pinned:
        return row.settings, {}
    given = PINNED | rows.SCHEDULE
    if row.model in rows.KL:
        given["kl"] = rows.KL[row.model]
    if row.method != "nft":
        given |= baselines.METHODS[row.method].settings
    given |= row.settings
    own = {name: given.pop(name) for name in OWN if name in given}
    return given, own


def parts(row, own):
    """What the row changes in nft.train, as keyword arguments. own: its method's own settings."""
    if row.method != "nft":
        return baselines.parts(row.method, **own)
    changed = {}
    if row.change is not None:
        changed = row.change()
    if row.reuse > 1:
        changed["collect"] = rows.Reuse(row.reuse)
    return changed


def configure(row, folder, seed):
    """The row's nft.Config. Raises nft.UserError."""
    settings, _ = split(row)
    return nft.configure(
        model=row.model, iterations=row.iterations, out=folder, seed=seed, **settings
    )


def is_done(row, folder, seed):
    """Whether `folder` has the row's run, finished, of today's method and settings."""
    if not report.finished(row, folder):
        return False
    return results.is_current(folder, vars(configure(row, folder, seed)))


def run(row, folder, seed):
    """Train a row in `folder`, on one thread, unless that is done.

    Raises nft.UserError or RuntimeError.
    """
    if is_done(row, folder, seed):
        return
    torch.set_num_threads(1)
    # Where a run was cut off a new one may begin.
    for name in ("config.json", "origin.json"):
        (folder / name).unlink(missing_ok=True)
    config = configure(row, folder, seed)
    origin = results.origin()
    _, own = split(row)
    changed = parts(row, own)
    meter = Meter(changed.get("make_model", nft.Model), changed.get("evaluate", nft.evaluate))
    changed |= {"make_model": meter.make_model, "evaluate": meter.evaluate}
    quiet = io.StringIO()
    try:
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            nft.train(config, **changed)
    except nft.UserError as error:
        if error.status == 2:
            raise
        # Training has begun. Leave out the advice to resume: the row begins anew.
        raise RuntimeError(nft.reason(error.__cause__)) from error
    (folder / "origin.json").write_text(json.dumps(origin))


def begin():
    """Start of a worker process: it leaves Ctrl-C to its parent, which ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def duration(task):
    """How long a task takes, about."""
    row, _, _ = task
    return row.iterations * SECONDS.get(row.method, 5)


def run_all(tasks, jobs):
    """Run tasks (row, folder, seed) in worker processes, the longest first.

    Returns the exit status: 0, 1 if a run failed, 130 if interrupted.
    """
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(jobs, context, begin)
    names = {}
    for task in sorted(tasks, key=duration, reverse=True):
        names[pool.submit(run, *task)] = task[1].name
    failed = []
    try:
        ended = concurrent.futures.as_completed(names)
        for future in tqdm(ended, "runs", len(names), disable=False):
            if future.exception() is not None:
                failed.append(f"{names[future]}: {future.exception()}")
    except KeyboardInterrupt:
        for process in multiprocessing.active_children():
            process.terminate()
        pool.shutdown(cancel_futures=True)
        print("figures.py: interrupted; the same command goes on", file=sys.stderr)
        return 130
    pool.shutdown()
    for text in sorted(failed):
        print(f"figures.py: failed: {text}; the same command tries again", file=sys.stderr)
    return min(1, len(failed))


# ---- Command line --------------------------------------------------------------------------------
def quick(row):
    """A row in a third of its iterations, or so: 4 to 8. It is evaluated every fourth one.

    An evaluation costs almost as much as an iteration.
    """
    iterations = min(8, max(4, row.iterations // 3))
    settings = row.settings | {"eval_every": 4}
    return dataclasses.replace(row, iterations=iterations, settings=settings)


def words(text):
    """A comma-separated list."""
    return text.split(",")


def numbers(text):
    """A comma-separated list of integers."""
    return [int(word) for word in text.split(",")]


def parse(argv):
    """The command line; asks for matplotlib before the runs, not after."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--figures", type=words, help=f"of {', '.join(rows.FIGURES)}")
    parser.add_argument("--quick", action="store_true", help="one seed, few iterations")
    parser.add_argument("--seeds", type=numbers)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--jobs", type=int, default=2, help="processes, each on one core")
    parser.add_argument("--plot", action="store_true", help="report what is there, run nothing")
    args = parser.parse_args(argv)
    if importlib.util.find_spec("matplotlib") is None:
        parser.error("the plots need matplotlib: pip install matplotlib")
    wanted = [name for name in rows.FIGURES if name not in LEFT_OUT]
    seeds = [0, 1, 2]
    out = Path("runs/figures")
    if args.quick:
        wanted = list(rows.QUICK)
        seeds = [0]
        out = Path("runs/figures-quick")
    args.figures = args.figures or wanted
    args.seeds = args.seeds or seeds
    args.out = args.out or out
    unknown = set(args.figures) - set(rows.FIGURES)
    if unknown:
        parser.error(f"--figures {','.join(unknown)}: must be of {', '.join(rows.FIGURES)}")
    return args


def plan(figures, seeds, out):
    """Tasks (row, folder, seed) of figures {name: rows}; a row of several figures is one task."""
    tasks = {}
    for name, wanted in figures.items():
        # The sweep has one seed.
        own = seeds[:1] if name == "sweep" else seeds
        for row in wanted:
            for seed in own:
                folder = out / f"{row.name}-{seed}"
                tasks[folder] = (row, folder, seed)
    return list(tasks.values())


def main(argv=None):
    """Run what is missing, report what is there. Returns the exit status."""
    args = parse(argv)
    figures = {name: rows.FIGURES[name] for name in args.figures}
    if args.quick:
        for name in set(figures) - {"sweep"}:
            figures[name] = [quick(row) for row in figures[name]]
    status = 0
    tasks = plan(figures, args.seeds, args.out)
    if not args.plot:
        # So that a kill ends the worker processes, too.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        status = run_all(tasks, args.jobs)
    report.report(figures, args.seeds, args.out)
    if not args.quick:
        results.update([task for task in tasks if is_done(*task)])
    return status


if __name__ == "__main__":
    sys.exit(main())
