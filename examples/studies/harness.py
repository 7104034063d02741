"""Run the rows of rows.py, and write what came out to results.json, the pages and the plots.

    python examples/studies/harness.py --quick                     # short runs: some minutes
    python examples/studies/harness.py                             # all tables but the sweep
    python examples/studies/harness.py --rows default,ablations    # some tables
    python examples/studies/harness.py --rows tiny-nft,sweep-tiny-ddpo-* --seeds 0
    python examples/studies/harness.py --write                     # pages and plots alone

Two runs at a time, each a process of one thread; its directory is OUT/ROW-SEED. What is in
results.json for this nft.py, row and seed is not run again; what was cut off begins anew. --quick
keeps its results and plots in OUT. Plots need matplotlib.
SPDX-License-Identifier: MIT
"""

import argparse
import dataclasses
import fnmatch
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import baselines
import report
import rows

import nft

# Settings of baselines.parts, not of nft.Config.
OWN = ("clip_range", "temperature")


# ---- One run, in a process of its own ------------------------------------------------------------
class Meter:
    """Counts what a run spends: its make_model and evaluate are parts of nft.train.

    Rows that are evaluated get `evaluations`, samples that went through the denoiser, and `cpu`,
    seconds of the process, which others do not slow down; loading and evaluation are left out. With
    guidance a sample counts twice; a forward pass with a backward one counts once.
    """

    def __init__(self, parts):
        self.parts = {"make_model": nft.Model, "evaluate": nft.evaluate} | parts
        self.evaluations = 0
        self.cpu = 0.0
        # process_time when the last evaluation ended.
        self.since = None

    def count(self, net, args, out):
        """The hook of the denoiser: out[0] is (B, ...)."""
        self.evaluations += len(out[0])

    def make_model(self, config):
        """The part, with the hook."""
        model = self.parts["make_model"](config)
        model.net.register_forward_hook(self.count)
        return model

    def evaluate(self, run, rewards, prompts, iteration):
        """The part, and what was spent before it."""
        if iteration:
            self.cpu += time.process_time() - self.since
        evaluations = self.evaluations if iteration else 0
        pipe = run.model.pipe
        own = pipe.scheduler
        # The same for every row, whatever solver its rollouts have.
        pipe.scheduler = nft.pick_solver("dpm2", own)
        row = self.parts["evaluate"](run, rewards, prompts, iteration)
        pipe.scheduler = own
        self.evaluations = evaluations
        self.since = time.process_time()
        return row | {"evaluations": evaluations, "cpu": self.cpu}


def prepare(row, seed, folder):
    """A row's nft.Config, and its parts of nft.train. Raises nft.UserError."""
    own = {name: value for name, value in row.settings.items() if name in OWN}
    settings = {name: value for name, value in row.settings.items() if name not in OWN}
    parts = rows.PARTS.get(row.parts, {})
    if row.method != "nft":
        settings = baselines.METHODS[row.method].settings | settings
        parts = baselines.parts(row.method, **own)
    return nft.configure(seed=seed, out=folder, **settings), parts


def command(row, seed, folder):
    """The words of a script's row."""
    words = [sys.executable, *row.script.split()]
    if not row.prints:
        for name, value in (row.settings | {"seed": seed, "out": folder}).items():
            words += ["--" + name.replace("_", "-"), str(value)]
    return words


def train_row(row, seed, folder):
    """Run a row in a process of its own: what it prints goes to log.txt in its folder."""
    with open(folder / "log.txt", "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    if row.script:
        # For its paths.
        folder = folder.resolve()
        os.chdir(rows.REPOSITORY)
        os.execv(sys.executable, command(row, seed, folder))
    config, parts = prepare(row, seed, folder)
    meter = Meter(parts)
    nft.train(config, **parts | {"make_model": meter.make_model, "evaluate": meter.evaluate})


# ---- All of them ---------------------------------------------------------------------------------
def is_done(run, row):
    """Whether a run of results.json, or None, is of this row and of this nft.py."""
    return bool(run) and run["nft"] == report.sha() and run["row"] == row.digest()


def summarize(row, folder):
    """What results.json keeps of a finished run."""
    if row.prints:
        tables = re.findall(r"(?:^\|.*\n)+", (folder / "log.txt").read_text(), re.MULTILINE)
        return {"table": "\n".join(tables)}
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluated = [entry for entry in logged if "eval_reward" in entry]
    curve = []
    for entry in evaluated:
        # A script has no Meter.
        spent = [entry.get("evaluations", 0), round(entry.get("cpu", 0), 1)]
        curve.append([*spent, round(entry[f"eval_reward/{rows.EXACT}"], 4)])
    watched = {}
    for field in evaluated[0]:
        if field.startswith("eval_reward/") and not field.endswith(rows.EXACT):
            name = field.replace(":", "/").rpartition("/")[2]
            watched[name] = [round(evaluated[i][field], 4) for i in (0, -1)]
    return {"curve": curve, "images": logged[-1]["images"], "watched": watched}


def start(row, seed, folder):
    """A process that runs a row in a new folder."""
    # Of a run that was cut off, or of another nft.py.
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=train_row, args=(row, seed, folder))
    process.start()
    return process


def run_all(tasks, out, file, jobs):
    """Run tasks (name, row, seed), `jobs` at a time, into results.json; how many failed."""
    # A kill ends those that run, too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    waiting = list(tasks)
    running = {}
    failed = 0
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                name, row, seed = waiting.pop(0)
                folder = out / f"{name}-{seed}"
                running[start(row, seed, folder)] = (name, row, seed, folder, report.sha())
            time.sleep(0.2)
            for process in [process for process in running if not process.is_alive()]:
                name, row, seed, folder, code = running.pop(process)
                if process.exitcode or report.sha() != code:
                    failed += 1
                    print(f"{folder}/log.txt: failed, or nft.py changed meanwhile", flush=True)
                    continue
                results = report.read(file)
                found = summarize(row, folder)
                made = report.origin() | {"row": row.digest()}
                results[f"{name}/{seed}"] = made | found
                report.write(results, file)
                print(f"{folder}: {found.get('curve', ['done'])[-1]}", flush=True)
    finally:
        for process in running:
            process.terminate()
    return failed


def chosen(words):
    """The names of ROWS that words of --rows stand for: tables, rows, or patterns as sweep-*."""
    names = []
    for word in words.split(","):
        found = fnmatch.filter(rows.ROWS, word)
        if word in rows.TABLES:
            found, _ = rows.TABLES[word]
        if not found:
            sys.exit(f"harness.py: --rows {word}: must be of {', '.join(rows.TABLES)}, or a row")
        names += found
    # Each once.
    return list(dict.fromkeys(names))


def main(argv=None):
    """Run what is missing, and show it. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    everything = ",".join(name for name in rows.TABLES if name != "sweep")
    parser.add_argument("--rows", default=everything, help="rows, tables, patterns; without: most")
    parser.add_argument("--seeds", help="such as 0,1; without: each row's own")
    parser.add_argument("--quick", action="store_true", help="a few rows, four iterations, seed 0")
    parser.add_argument("--out", type=Path, default=Path("runs/studies"))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="run nothing")
    args = parser.parse_args(argv)
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    file = report.FILE
    named = {name: rows.ROWS[name] for name in chosen(args.rows)}
    if args.quick:
        file = args.out / "quick/results.json"
        named = {}
        for name in rows.QUICK:
            settings = rows.ROWS[name].settings | {"iterations": 4, "eval_every": 2}
            named[name] = dataclasses.replace(rows.ROWS[name], settings=settings, seeds=(0,))
        rows.ROWS.update(named)
    results = report.read(file)
    tasks = []
    for name, row in named.items():
        for seed in map(int, args.seeds.split(",")) if args.seeds else row.seeds:
            if not args.write and not is_done(results.get(f"{name}/{seed}"), row):
                tasks.append((name, row, seed))
    failed = run_all(tasks, file.parent if args.quick else args.out, file, args.jobs)
    results = report.read(file)
    for name, (inside, _) in rows.TABLES.items():
        if set(inside) & set(named):
            print(f"{name}\n{report.table(name, results)}")
    if not args.quick:
        for page in report.PAGES:
            page.write_text(report.fill(page.read_text("utf-8"), results), "utf-8")
    report.draw(results, file.parent)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
