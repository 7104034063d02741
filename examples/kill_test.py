"""Kill a training run (kill -9) again and again, go on with --resume, and compare it with one that nobody disturbed.

    python examples/kill_test.py                        # 30 kills, five to ten minutes on two idle cores
    python examples/kill_test.py --kills 3 --seed 1 --out /tmp/killed

One run of the shipped tiny pipeline is left alone; another is killed at random moments, start-up included, and, aimed,
soon after a temporary file has appeared in its directory. Just before each kill a signal makes the process print its
stack, which says where it was. Exit status 0 only if metrics.jsonl was whole at every kill, and if in the end all
metrics but the seconds, all that is in the checkpoints, the weights and the pictures are the same, and no file more.
SPDX-License-Identifier: MIT
"""
import argparse
import collections
import functools
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import time

import torch
from torch.utils._pytree import tree_flatten

HERE = pathlib.Path(__file__).resolve().parent
SMALL = """--groups 2 --group-size 4 --steps 4 --batch-size 8 --updates 2 --train-times 2 --eval-every 2 --save-every 1
           --device cpu --precision fp32""".split()
# nft.py as it is, in a process that prints its stack at SIGUSR1
LAUNCHER = ("import faulthandler, signal, sys; faulthandler.register(signal.SIGUSR1, all_threads=False); "
            f"sys.path[:0] = [{str(HERE.parent)!r}]; import nft; sys.exit(nft.main())")
PHASES = {"replace_file": "writing a file", "evaluate": "evaluation", "conclude": "conclusion", "collect": "rollout",
          "save": "checkpoint", "snapshot": "checkpoint", "pair_losses": "update", "average": "update",
          "__init__": "start-up", "train": "update"}    # functions of nft.py; the first that is on the stack counts


class Bad(Exception):
    """nft.py did not keep its promise."""


def start(flags, out, log):
    """A process of nft.py that trains in `out`, or goes on with the run that is there."""
    own = ["--resume"] if (out / "config.json").exists() else flags
    return subprocess.Popen([sys.executable, "-c", LAUNCHER, *own, "--out", str(out)], stdout=log, stderr=log)


def finish(process, log):
    """Wait for the end of a process that nobody kills."""
    if process.wait():
        raise Bad(f"status {process.returncode}: {pathlib.Path(log.name).read_text()[-2000:]}")


def logged(out):
    """The rows of metrics.jsonl. Raises Bad if it is torn, has a gap, or has an iteration twice."""
    file = out / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    try:
        rows = [json.loads(line) for line in text.splitlines()]
    except ValueError as e:
        raise Bad(f"{file} is torn: {e}, {text[-300:]!r}")
    if [row["iteration"] for row in rows] != [*range(len(rows))] or text and not text.endswith("\n"):
        raise Bad(f"{file} has a gap, a torn line or an iteration twice: {text[-300:]!r}")
    return rows


def wait(process, condition, seconds=600.0):
    """Until the condition holds, the process has ended, or the time is over: does the condition hold?"""
    end = time.monotonic() + seconds
    while not (met := condition()) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.0005)
    return met


def kill(process, log):
    """kill -9, now; returns what the process was doing, and the innermost function of nft.py."""
    text, position = pathlib.Path(log.name), log.seek(0, os.SEEK_END)
    process.send_signal(signal.SIGUSR1)
    wait(process, lambda: "<module>" in text.read_text()[position:], 0.05)
    process.kill()
    if process.wait() == -signal.SIGUSR1:               # it had not even begun to listen
        return "start-up", "python"
    stack = re.findall(r'nft\.py", line \d+ in (\w+)', text.read_text()[position:])      # lambdas have no name
    phases = [phase for name, phase in PHASES.items() if name in stack and "train" in stack]
    return (phases or ["start-up"])[0], next((name for name in stack if name != "replace_file"), "import")


def undisturbed(flags, out, log):
    """A run from its start to its end; returns how long it took to start, and to train."""
    began, process = time.monotonic(), start(flags, out, log)
    wait(process, (out / "metrics.jsonl").exists)
    ready = time.monotonic()
    finish(process, log)
    return ready - began, time.monotonic() - ready


def saved(out):
    """The last iteration that a checkpoint of the run holds; -1 where there is none yet. Raises Bad if none loads."""
    files, done = [*out.glob("checkpoint*.pt")], -1
    for file in files:
        try:
            done = max(done, len(torch.load(file, weights_only=True)["rows"]) - 1)
        except Exception as e:
            if file is files[-1] and done < 0:
                raise Bad(f"no checkpoint of {files} is whole: {e!r}")
    return done


def disturbed(flags, out, log, kills, iterations, pace, rng, tell=functools.partial(print, flush=True)):
    """A run that is killed so many times, goes on each time, and then to its end. pace: what undisturbed returned.
    Returns how often each phase was hit. Raises Bad as soon as a kill has lost more than the iteration it hit."""
    (startup, training), hits, metrics = pace, collections.Counter(), out / "metrics.jsonl"
    tell(f"{'kill':>4}  {'aimed at':12} {'went on from':>12} {'hit in':>8}  while")
    for k in range(1, kills + 1):
        aim = rng.choices(("any moment", "training", "a new file"), (3, 4, 4))[0]
        kept, stale = saved(out), metrics.exists() and os.stat(metrics)
        most = iterations * k // (kills + 1)            # leaves iterations to those that come after it
        process = start(flags, out, log)
        if aim == "any moment":
            wait(process, lambda: False, rng.uniform(0.2, 1.5 * startup))
        else:
            wait(process, lambda: metrics.exists() and os.stat(metrics) != stale)
            if wait(process, lambda: metrics.read_bytes().count(b"\n") > most,
                    rng.uniform(0, 2 * training / (kills + 1))):
                wait(process, lambda: False, rng.uniform(0, 2 * training / iterations))
        if aim == "a new file" and wait(process, lambda: [*out.rglob("*.tmp")]):
            wait(process, lambda: False, rng.uniform(0, 0.005))
        if process.poll() is not None:
            finish(process, log)
            raise Bad(f"it ended before kill {k}: give it more iterations")
        phase, function = kill(process, log)
        done = len(logged(out)) - 1
        if saved(out) < max(kept, done - 1):
            raise Bad(f"kill {k} lost work: checkpoint of {saved(out)}, before the kill {kept}, metrics to {done}")
        hits[phase] += 1
        tell(f"{k:4}  {aim:12} {'the start' if kept < 0 else kept:>12} {done + 1:8}  {phase} ({function})")
    finish(start(flags, out, log), log)
    return hits


def differences(one, two):
    """What differs between two runs: the names of files, with what differs in them."""
    def contents(out, file):
        if file == "metrics.jsonl":
            return [row.items() - {("seconds", row["seconds"])} for row in logged(out)]
        if not file.endswith(".pt"):
            return (out / file).read_bytes()
        state = torch.load(out / file, weights_only=True)
        state["rows"] = [{**row, "seconds": 0} for row in state["rows"]]
        leaves, form = tree_flatten(state)
        return form, [(x.dtype, x.shape, x.numpy().tobytes()) if isinstance(x, torch.Tensor) else x for x in leaves]
    names = [{str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()} for out in (one, two)]
    return sorted(names[0] ^ names[1]) + [file for file in sorted(names[0] & names[1] - {"config.json"})
                                          if contents(one, file) != contents(two, file)]


def main(argv=None):
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--out", type=pathlib.Path, help="a new directory for the two runs; default: a temporary one")
    args = parser.parse_args(argv)
    out = (args.out or pathlib.Path(tempfile.mkdtemp(prefix="kill_test_"))).resolve()
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        parser.error(f"--out {out}: must be new or empty")
    (out / "held_out.txt").write_text("".join(open(HERE / "shapes_heldout.txt").readlines()[:8]))
    iterations, began = 5 * args.kills, time.monotonic()
    flags = [*SMALL, "--iterations", str(iterations), "--eval-prompts", str(out / "held_out.txt")]
    try:
        with open(out / "log.txt", "ab") as log:
            pace = undisturbed(flags, out / "undisturbed", log)
            print(f"{iterations} iterations undisturbed: {pace[0]:.1f} s to start, {pace[1]:.1f} to train", flush=True)
            hits = disturbed(flags, out / "killed", log, args.kills, iterations, pace, random.Random(args.seed))
        different = differences(out / "undisturbed", out / "killed")
    except Bad as e:
        print(f"kill_test.py: {e}; see {out}", file=sys.stderr)
        return 1
    print(f"{args.kills} kills survived in {time.monotonic() - began:.0f} s: "
          + ", ".join(f"{n} in {phase}" for phase, n in hits.most_common()))
    print(f"different from the undisturbed run: {', '.join(different) or 'nothing'}")
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main())
