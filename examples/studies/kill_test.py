"""Kill a training run (kill -9) again and again, resume it, and compare it with an undisturbed one.

    python examples/studies/kill_test.py                # 30 kills, five to ten minutes on two cores
    python examples/studies/kill_test.py --kills 3 --seed 1 --out /tmp/killed

One run of the shipped tiny pipeline is left alone. Another one is killed at random moments,
start-up included, and some kills are aimed at the moment after a temporary file has appeared in its
directory. Just before each kill a signal makes the process print its stack, which says where it
was.

The exit status is 0 only if each kill left metrics.jsonl whole and lost at most the iteration that
it hit, and if the two runs are the same in the end: all metrics but the seconds, all that the
checkpoint holds, the weights and the pictures, with no file more.
SPDX-License-Identifier: MIT
"""

import argparse
import collections
import dataclasses
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.utils._pytree import tree_flatten

REPOSITORY = Path(__file__).resolve().parents[2]
HELD_OUT = REPOSITORY / "examples" / "tiny" / "heldout.txt"
SMALL = [
    "--groups=2",
    "--group-size=4",
    "--steps=4",
    "--batch-size=8",
    "--updates=2",
    "--train-times=2",
    "--eval-every=2",
    "--device=cpu",
    "--precision=fp32",
]
# nft.py as it is, in a process that prints its stack at SIGUSR1.
LAUNCHER = f"""
import faulthandler, signal, sys
faulthandler.register(signal.SIGUSR1, all_threads=False)
sys.path.insert(0, {str(REPOSITORY)!r})
import nft
sys.exit(nft.main())
"""
START_UP = "start-up"
# Functions of nft.py, and what it does while they run. The first one that is on the stack counts.
PHASES = {
    "write_file": "writing a file",
    "evaluate": "evaluation",
    # Of the model.
    "__init__": START_UP,
    "collect": "rollout",
    "save": "checkpoint",
    "optimize": "update",
    "average": "update",
    "train": "between these",
}
# What a kill is aimed at, and how often.
AIMS = {"any moment": 3, "training": 4, "a new file": 4}


class Broken(Exception):
    """nft.py did not keep its promise."""


@dataclasses.dataclass
class Pace:
    """Seconds that an undisturbed run takes to start, and for an iteration."""

    startup: float
    iteration: float


# ---- Processes -----------------------------------------------------------------------------------


def start(flags, out, log):
    """A process of nft.py that trains in `out`, or resumes the run there; log: an open file."""
    own = flags
    if (out / "config.json").exists():
        own = ["--resume"]
    command = [sys.executable, "-c", LAUNCHER, *own, f"--out={out}"]
    return subprocess.Popen(command, stdout=log, stderr=log)


def finish(process, log):
    """Wait for the end of a process that nobody kills. Raises Broken unless it succeeds."""
    status = process.wait()
    if status:
        text = Path(log.name).read_text()
        raise Broken(f"status {status}: {text[-2000:]}")


def wait_until(condition, process, seconds=600.0):
    """Wait for a condition, the end of the process or of the time: does the condition hold?"""
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > end:
            return condition()
        time.sleep(0.0005)
    return True


def kill(process, log):
    """kill -9, now; returns what the process was doing, and the innermost function of nft.py."""
    file = Path(log.name)
    position = file.stat().st_size

    def stack():
        return file.read_bytes()[position:].decode(errors="replace")

    process.send_signal(signal.SIGUSR1)
    # The outermost frame is printed last.
    wait_until(lambda: "<module>" in stack(), process, seconds=0.05)
    process.kill()
    if process.wait() == -signal.SIGUSR1:
        # It had not even begun to listen.
        return START_UP, "python"
    functions = re.findall(r'nft\.py", line \d+ in (\w+)', stack())
    if not functions:
        return START_UP, "import"
    inner = next(name for name in functions if name != "write_file")
    for name, phase in PHASES.items():
        if name in functions and "train" in functions:
            return phase, inner
    return START_UP, inner


# ---- What a run has left -------------------------------------------------------------------------


def logged(out):
    """The rows of metrics.jsonl. Raises Broken if it is torn, has a gap, or an iteration twice."""
    file = out / "metrics.jsonl"
    if not file.exists():
        return []
    text = file.read_text()
    try:
        rows = [json.loads(line) for line in text.splitlines()]
    except ValueError as error:
        raise Broken(f"{file} is torn: {error}, {text[-300:]!r}") from error
    numbers = [row["iteration"] for row in rows]
    if numbers != list(range(len(rows))) or not text.endswith("\n"):
        raise Broken(f"{file} has a gap, or an iteration twice: {text[-300:]!r}")
    return rows


def count_rows(out):
    """The number of rows of metrics.jsonl, cheaply."""
    file = out / "metrics.jsonl"
    if not file.exists():
        return 0
    return file.read_bytes().count(b"\n")


def saved(out):
    """The iteration that the checkpoint holds, -1 before the first. Raises Broken if it is torn."""
    file = out / "checkpoint.pt"
    if not file.exists():
        return -1
    try:
        state = torch.load(file, weights_only=True)
    except Exception as error:  # whatever a torn file may raise
        raise Broken(f"{file} is torn: {error!r}") from error
    return len(state["rows"]) - 1


def comparable(file):
    """What a file of a run holds, without the seconds that it took."""
    if file.suffix == ".jsonl":
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        return [row | {"seconds": 0} for row in rows]
    if file.suffix != ".pt":
        # The model card names the directory.
        return file.read_bytes().replace(str(file.parent).encode(), b"DIR")
    state = torch.load(file, weights_only=True)
    state["rows"] = [row | {"seconds": 0} for row in state["rows"]]
    leaves, form = tree_flatten(state)
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor):
            leaves[i] = (leaf.dtype, leaf.shape, leaf.numpy().tobytes())
    return form, leaves


def differences(one, other):
    """The names of the files that differ between two runs, or that only one of them has."""
    files = []
    for out in (one, other):
        paths = [path for path in out.rglob("*") if path.is_file()]
        files.append({str(path.relative_to(out)) for path in paths})
    names = files[0] ^ files[1]
    # config.json holds the directory's name.
    for name in files[0] & files[1] - {"config.json"}:
        if comparable(one / name) != comparable(other / name):
            names.add(name)
    return sorted(names)


# ---- The two runs --------------------------------------------------------------------------------


def undisturbed(flags, out, log):
    """A run from its start to its end; returns its Pace."""
    began = time.monotonic()
    process = start(flags, out, log)
    wait_until((out / "metrics.jsonl").exists, process)
    ready = time.monotonic()
    finish(process, log)
    training = time.monotonic() - ready
    return Pace(ready - began, training / count_rows(out))


def take_aim(aim, process, out, most, pace, rng):
    """Wait for the moment of a kill; no longer than for row `most` of the metrics."""
    if aim == "any moment":
        time.sleep(rng.uniform(0.2, 1.5 * pace.startup))
        return
    before = count_rows(out)

    def has_a_new_row():
        return count_rows(out) > before

    def has_gone_far():
        return count_rows(out) > most

    def writes_a_file():
        return any(out.rglob("*.tmp"))

    wait_until(has_a_new_row, process)
    if wait_until(has_gone_far, process, rng.uniform(0, 10 * pace.iteration)):
        time.sleep(rng.uniform(0, 2 * pace.iteration))
    if aim == "a new file" and wait_until(writes_a_file, process):
        time.sleep(rng.uniform(0, 0.005))


def disturbed(flags, out, log, kills, iterations, pace, rng):
    """A run that is killed so many times, resumed each time, and then goes to its end.

    rng: of the moments. Returns how often each phase was hit. Raises Broken as soon as a kill has
    lost more than the iteration that it hit.
    """
    hits = collections.Counter()
    print(f"{'kill':>4}  {'aimed at':12} {'went on from':>12} {'hit in':>8}  while", flush=True)
    for k in range(1, kills + 1):
        aim = rng.choices(list(AIMS), AIMS.values())[0]
        kept = saved(out)
        # Leaves iterations to the kills that come after this one.
        most = iterations * k // (kills + 1)
        process = start(flags, out, log)
        take_aim(aim, process, out, most, pace, rng)
        if process.poll() is not None:
            finish(process, log)
            raise Broken(f"it ended before kill {k}: give it more iterations")
        phase, function = kill(process, log)
        done = len(logged(out)) - 1
        if saved(out) < max(kept, done - 1):
            raise Broken(
                f"kill {k} lost work: checkpoint of {saved(out)}, before the kill {kept}, metrics "
                f"to {done}"
            )
        hits[phase] += 1
        origin = "the start" if kept < 0 else kept
        print(f"{k:4}  {aim:12} {origin:>12} {done + 1:8}  {phase} ({function})", flush=True)
    finish(start(flags, out, log), log)
    return hits


def compare(out, kills, seed):
    """Both runs, in the directory `out`; returns the exit status. Raises Broken."""
    began = time.monotonic()
    prompts = HELD_OUT.read_text().splitlines()[:8]
    held_out = out / "held_out.txt"
    held_out.write_text("\n".join(prompts) + "\n")
    iterations = 5 * kills
    flags = [*SMALL, f"--iterations={iterations}", f"--eval-prompts={held_out}"]
    whole = out / "undisturbed"
    killed = out / "killed"
    with open(out / "log.txt", "ab") as log:
        pace = undisturbed(flags, whole, log)
        times = f"{pace.startup:.1f} s to start, {pace.iteration:.2f} an iteration"
        print(f"{iterations} iterations undisturbed: {times}", flush=True)
        hits = disturbed(flags, killed, log, kills, iterations, pace, random.Random(seed))
    different = differences(whole, killed)
    counts = [f"{n} in {phase}" for phase, n in hits.most_common()]
    seconds = time.monotonic() - began
    print(f"{kills} kills survived in {seconds:.0f} s: {', '.join(counts)}")
    print(f"different from the undisturbed run: {', '.join(different) or 'nothing'}")
    return 1 if different else 0


def main(argv=None):
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--out", type=Path, help="a new directory; default: a temporary one")
    args = parser.parse_args(argv)
    if args.out is None:
        out = Path(tempfile.mkdtemp(prefix="kill_test_"))
    else:
        out = args.out.resolve()
        out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        parser.error(f"--out {out}: must be new or empty")
    try:
        return compare(out, args.kills, args.seed)
    except Broken as error:
        print(f"kill_test.py: {error}; see {out}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
