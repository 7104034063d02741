"""The paper's comparison and its ablations, at the size of a laptop.

    python examples/figures.py --quick                  # the paper's figures, one seed, short runs
    python examples/figures.py                          # three seeds; goes on where it was cut off
    python examples/figures.py --figures beta,eta       # some of them
    python examples/figures.py --figures sweep          # what each method's settings were chosen from
    python examples/figures.py --plot                   # tables and plots of the runs that are there

A row is one setting of one method; its runs are ordinary run directories under --out, beside tables.md and the plots,
and finished ones are not repeated. Every method has the same base, prompts, reward, LoRA, evaluation (the same noise
and solver), number of images an iteration and, where a row does not change it, of updates (4); accuracy counts only
beside roughness and the pictures. The plots need matplotlib.
SPDX-License-Identifier: MIT
"""
import argparse
import concurrent.futures
import contextlib
import functools
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import signal
import sys
import time
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import baselines  # noqa: E402
import nft  # noqa: E402


# ---- What a row changes in nft.py, where no flag does --------------------------------------------------------------
def positive_only(x0_theta, x0_old, x0, r, beta, distance=nft.adaptive_loss):
    """Eq. (5) without its negative branch."""
    return r * distance((1 - beta) * x0_old + beta * x0_theta, x0) / beta


def weighted(w):
    """nft.pair_losses with Eq. (5)'s w(t) ||v_theta - v||^2 in place of the adaptive weighting, for a flow.

    w's mean over the sampler's times is made that of t, the adaptive loss's own weight, so that --kl weighs alike."""
    original, loss = nft.pair_losses, nft.nft_loss
    def pair_losses(model, rollout, index, t, eps, r):
        sigma, grid = (model.alpha_sigma(x, d)[1] for x, d in ((t, eps.ndim), (model.times, 1)))
        weight = w(sigma) * grid.mean() / w(grid).mean()
        def distance(x, x_0):
            return (weight * ((x - x_0) / sigma).square()).flatten(1).mean(1)
        with mock.patch.object(nft, "nft_loss", functools.partial(loss, distance=distance)):
            return original(model, rollout, index, t, eps, r)
    return mock.patch.object(nft, "pair_losses", pair_losses)


def reused(k):
    """nft.collect that samples new images in every k-th iteration alone: between, the last ones train on."""
    original, kept = nft.collect, []
    def collect(model, rewards, prompts, key, policy):
        if policy != "old":
            return original(model, rewards, prompts, key, policy)
        if key[-1] % k == 1 or not kept:
            kept[:] = [original(model, rewards, prompts, key, policy)]
        return kept[0]
    return mock.patch.object(nft, "collect", collect)


class Rounded(TorchDispatchMode):
    """Each operation on fp32 tensors is computed in fp32 and rounded to `dtype`, as hardware that has it does."""
    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        """The result of f; views, in-place operations and numbers stay as they are: what they hold is rounded."""
        out = f(*args, **(kwargs or {}))
        if f.is_view or f._schema.is_mutable:
            return out
        return nft.map_tensors(lambda x: x.to(self.dtype).float() if x.dtype == torch.float32 else x, out)


@contextlib.contextmanager
def rounded(dtype):
    """nft.py as with a base in `dtype`, which itself takes a CPU without it ten times as long: the pipeline's weights
    and each operation of it are rounded, forward and backward; LoRA and optimizer stay fp32. More is rounded than with
    --precision: the loss's own backward pass, too. fp16 has its scaler, from 1024, as its 65536 would be infinite."""
    load, sample, predict = nft.load_pipeline, nft.Model.sample, nft.Model.predict
    backward, scaler = torch.Tensor.backward, torch.amp.GradScaler
    def loaded(config, _):
        pipe = load(config, dtype)
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.float()
        return pipe
    def inside(f):
        def call(*args):
            with Rounded(dtype):
                return f(*args)
        return call
    def scaled(device, enabled):
        return scaler(device, init_scale=1024.0, enabled=dtype == torch.float16)
    with mock.patch.object(nft, "load_pipeline", loaded), mock.patch.object(torch.amp, "GradScaler", scaled), \
            mock.patch.object(torch.Tensor, "backward", inside(backward)), \
            mock.patch.multiple(nft.Model, sample=inside(sample), predict=inside(predict)):
        yield


def skipping():
    """nft.pair_losses that leaves out the pairs of r = 1/2, images with their prompt's mean reward, as where all are
    equal: with them goes their pull to the old and to the base model, and the log counts them as 0."""
    original = nft.pair_losses
    def pair_losses(model, rollout, index, t, eps, r):
        useful = (r != 0.5).nonzero().flatten()
        nothing = torch.zeros_like(r) + 0 * model.lora.sets["theta"][0].sum()       # has a gradient: 0
        found = original(model, rollout, index[useful], t[useful.cpu()], eps[useful], r[useful]) if len(useful) else ()
        return tuple(nothing.index_put((useful,), x) for x in found) or (nothing,) * 3
    return mock.patch.object(nft, "pair_losses", pair_losses)


CHANGES = {
    "": contextlib.nullcontext,
    "skip": skipping,
    "bf16": lambda: rounded(torch.bfloat16),
    "fp16": lambda: rounded(torch.float16),
    "positive": lambda: mock.patch.object(nft, "nft_loss", positive_only),
    "w=1": lambda: weighted(lambda t: t ** 0),
    "w=t": lambda: weighted(lambda t: t),
    "w=1-t": lambda: weighted(lambda t: 1 - t),
    "reused-2": lambda: reused(2),
    "reused-4": lambda: reused(4),
}

# ---- Rows: figure -> [(name, method, model, iterations, flags, change)] --------------------------------------------
GRIDS = {   # method: (model, learning rates, its own knob, values)
    "nft": ("tiny", (1e-3, 2e-3, 4e-3), "beta", (1, 0.3)),
    "ddpo": ("tiny", (1e-3, 3e-3), "clip_range", (1e-3, 1e-2, 1e-1)),
    "loop": ("tiny", (1e-3, 3e-3), "clip_range", (1e-3, 1e-2, 1e-1)),
    "dpok": ("tiny", (1e-3, 3e-3), "clip_range", (1e-3, 1e-2, 1e-1)),
    "rwr": ("tiny", (1e-3, 2e-3, 4e-3), "temperature", (0.1, 0.3)),
    "rft": ("tiny", (1e-3, 2e-3, 4e-3), "kl", (0, 0.1)),
    "flowgrpo": ("tiny-sd3", (1.5e-3, 3e-3, 6e-3), "clip_range", (1e-3, 1e-2, 1e-1)),
    "nft-sd3": ("tiny-sd3", (1.5e-3, 3e-3, 6e-3), "beta", (1, 0.3)),
}


EDGES = [   # where the best of a grid lay at its edge, and FlowGRPO without its KL
    ("nft", {"lr": 2e-3, "beta": 0.1}), ("flowgrpo", {"lr": 3e-3, "clip_range": 1e-3, "kl": 0}),
    ("flowgrpo", {"lr": 3e-3, "clip_range": 1e-2, "kl": 0}), ("ddpo", {"lr": 6e-3, "clip_range": 1e-2}),
    ("loop", {"lr": 6e-3, "clip_range": 1e-2}), ("dpok", {"lr": 3e-3, "clip_range": 3e-4}),
    ("nft-sd3", {"lr": 3e-3, "beta": 0.1})]
LONG = [    # ten iterations flatter a learning rate that collapses later: candidates at the comparison's full length
    ("flowgrpo", {"lr": 3e-3, "clip_range": 1e-3, "kl": 0}), ("flowgrpo", {"lr": 3e-3, "clip_range": 1e-3, "kl": 0.04}),
    ("flowgrpo", {"lr": 1.5e-3, "clip_range": 1e-3, "kl": 0.04}), ("ddpo", {"lr": 3e-3, "clip_range": 1e-2}),
    ("ddpo", {"lr": 1.5e-3, "clip_range": 1e-2}), ("loop", {"lr": 1.5e-3, "clip_range": 1e-3}),
    ("dpok", {"lr": 3e-3, "clip_range": 3e-4}), ("dpok", {"lr": 1.5e-3, "clip_range": 3e-4})]


def sweep():
    """Rows of GRIDS and EDGES, ten iterations each, and of LONG."""
    grids = [(name, {"lr": lr, knob: value}) for name, (_, rates, knob, values) in GRIDS.items()
             for value, lr in itertools.product(values, rates)]
    for kind, chosen in (("sweep", grids + EDGES), ("long", LONG)):
        for name, flags in chosen:
            model, knobs = GRIDS[name][0], sorted(flags, key=lambda knob: knob == "lr")
            iterations = 10 if kind == "sweep" else 60 if name == "flowgrpo" else 24
            more = {"eval_every": {10: 5, 24: 2, 60: 4}[iterations]} | ({"ema": 0.9} if model == "tiny-sd3" else {})
            yield ("-".join([kind, name, *(f"{knob}{flags[knob]:g}" for knob in knobs)]), name.removesuffix("-sd3"),
                   model, iterations, flags | more, "")


# What the sweep chose, by the held-out accuracy after ten iterations, within 0.02 of it by the training reward; of
# LONG's by the best accuracy on the way.
TUNED = {
    "nft": {"lr": 2e-3, "beta": 0.3},
    "ddpo": {"lr": 3e-3, "clip_range": 1e-2},
    "loop": {"lr": 3e-3, "clip_range": 1e-3},
    "dpok": {"lr": 1.5e-3, "clip_range": 3e-4},
    "rwr": {"lr": 2e-3, "temperature": 0.1},
    "rft": {"lr": 2e-3, "kl": 0},
    "flowgrpo": {"lr": 1.5e-3, "clip_range": 1e-3},
    "nft-sd3": {"lr": 3e-3, "beta": 0.3},
}
# The ablations' own settings: a learning rate at which not everything works for a while, and on tiny-sd3 the average of
# theta of tiny, which follows a short run.
ABLATED = {"tiny": {"lr": 2e-3, "beta": 1.0, "eval_every": 3},
           "tiny-sd3": {"lr": 3e-3, "beta": 1.0, "ema": 0.9, "eval_every": 4}}


def compared(key, model, iterations, flags):
    """A row of a comparison: a method of TUNED."""
    method = key.removesuffix("-sd3")
    return f"{model}-{method}", method, model, iterations, flags | TUNED[key], ""


def ablated(name="", model="tiny", change="", **flags):
    """A row of an ablation, and without arguments the default that rows of this model are compared with."""
    return (f"{name or 'default'}-{model}", "nft", model, 12 if model == "tiny" else 16, ABLATED[model] | flags, change)


def signal_row(name="", change="", **flags):
    """A row of the study of what an image is worth, and without arguments what its rows are compared with."""
    return f"signal-{name or 'default'}", "nft", "tiny", 12, TUNED["nft"] | {"eval_every": 2} | flags, change


FIGURES = {
    "tiny": [compared(key, "tiny", 24, {"eval_every": 2}) for key in ("nft", "ddpo", "dpok", "loop", "rwr", "rft")],
    "tiny-sd3": [compared(key, "tiny-sd3", iterations, {"eval_every": 4, "ema": 0.9})
                 for key, iterations in (("nft-sd3", 32), ("flowgrpo", 60))],
    "negative": [row for model in ABLATED for row in (ablated("", model), ablated("positive", model, "positive"))],
    "solvers": [ablated(), *(ablated(f"solver-{x}", solver=x) for x in ("ddim", "dpm2-sde"))],
    "eta": [ablated(), *(ablated(f"eta-{name}", eta=eta) for name, eta in (
        ("0", "0"), ("0.9", "0.9"), ("slow", "4,0.1,0.999")))],
    "weighting": [ablated("", "tiny-sd3"), *(ablated(w, "tiny-sd3", w) for w in ("w=1", "w=t", "w=1-t"))],
    "beta": [ablated(), *(ablated(f"beta-{beta:g}", beta=beta) for beta in (0.1, 0.3, 3))],
    "off-policy": [ablated(), ablated("reused-4", change="reused-4")],
    "signal": [signal_row(), signal_row("skip", "skip"), signal_row("times-1", train_times=1),
               *(signal_row(f"updates-{n}", updates=n) for n in (2, 8)),
               *(signal_row(f"groups-{n}", groups=n, group_size=192 // n) for n in (8, 32))],
    "precision": [signal_row(), signal_row("bf16", "bf16"), signal_row("fp16", "fp16")],
    "sweep": list(sweep()),
}
TITLES = {
    "sweep": "Sweep",
    "tiny": "Comparison on tiny, which predicts eps",
    "tiny-sd3": "Comparison on tiny-sd3, a flow",
    "negative": "Negative branch: default, or without it",
    "solvers": "Figure 7, solver of the rollouts: default dpm2",
    "eta": "Figure 8, eta: default 0,0.001,0.5",
    "weighting": "Figure 9, weighting: default adaptive",
    "beta": "Figure 10, beta: default 1",
    "off-policy": "Images trained on k times: default once",
    "precision": "Precision of the base: default fp32",
    "signal": "What an image is worth: default 16 groups of 12, 3 times, 4 updates, beta 0.3",
}
NOTE = """An accuracy is that of 256 held-out prompts, one picture each, with a standard error of about 0.03; all rows
share prompts and noise. `>` marks what was spent where the accuracy was not reached, and what rests on that (a ratio
to an NFT run that did not reach it: `<`). Images are those sampled, evaluations samples through the denoiser, seconds
those of one core; the evaluation of accuracy is left out.
"""
COSTS = {"images": "images", "evaluations": "network evaluations", "seconds": "seconds of a core"}
TARGETS = 0.5, 0.7                                      # a low and a high accuracy
SECONDS = {"ddpo": 6, "dpok": 8, "loop": 6, "flowgrpo": 8}      # of a core an iteration, about; the others: 5
worker = {}                                             # what `begin` leaves in a worker process


# ---- Runs ----------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def measured(solver):
    """Evaluation by `solver` whatever the run's own is. Rows get `cpu`, the process's seconds, and `evaluations`, the
    samples that went through the denoiser, both without evaluation: a forward pass with a backward one counts as one.

    These are seconds of a core, not of a clock, which other processes would slow down. A resumed run goes on from its
    last row's; loading is left out."""
    collect, evaluate, log, since, count = nft.collect, nft.evaluate, nft.Run.log, [], []   # since: the last row's
    def counted(model, rewards, prompts, key, policy):
        if policy == "old":
            since[:] = since or [time.process_time()]
            count[:] = count or [baselines.Count(getattr(model, "model", model))]        # a Chain's
        return collect(model, rewards, prompts, key, policy)
    def timed(model, *args):
        began, n, pipe = time.process_time(), [c.n for c in count], model.pipe
        own = nft.pick_solver(solver, pipe.scheduler.config, model.alphas_cumprod is None)
        with mock.patch.object(pipe, "scheduler", own):
            row = evaluate(model, *args)
        since[:] = [start + time.process_time() - began for start in since]
        for c, before in zip(count, n):
            c.n = before
        return row
    def add(run, row):
        now, last = time.process_time(), run.rows[-1] if run.rows else {"cpu": 0.0, "evaluations": 0}
        log(run, {"evaluations": last["evaluations"] + sum(c.n for c in count)} | row | {
            "cpu": last["cpu"] + sum(now - start for start in since)})
        since[:] = [now]
        for c in count:
            c.n = 0
    with mock.patch.multiple(nft, collect=counted, evaluate=timed), mock.patch.object(nft.Run, "log", add):
        yield


def read(folder):
    """The rows of a run's metrics.jsonl, none where there is no run."""
    file = pathlib.Path(folder) / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def run(row, folder, seed):
    """A row's run in `folder`, on one thread, unless it is there; goes on with one that was cut off. Exit status."""
    torch.set_num_threads(1)
    _, method, model, iterations, flags, change = row
    if (read(folder) or [{"iteration": -1}])[-1]["iteration"] >= iterations:
        return 0
    resume = any(folder.glob("checkpoint*.pt"))
    if not resume:                                      # killed before it could save: it starts anew
        (folder / "config.json").unlink(missing_ok=True)
    pinned = {"updates": 4, "batch_size": 64}           # whatever the preset's
    flags = {"model": model, "seed": seed, "iterations": iterations, "out": folder} | pinned | flags
    argv = [x for k, v in flags.items() for x in ("--" + k.replace("_", "-"), str(v))] + ["--resume"] * resume
    with CHANGES[change](), measured("dpm2"), contextlib.redirect_stdout(io.StringIO()):
        return nft.main(argv) if method == "nft" else baselines.main([method, *argv])


def begin(stop):
    """A worker process: Ctrl-C is for `run_all` to hear, which sets `stop` and ends the runs by SIGTERM: they save."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    worker.update(stop=stop, leave=lambda *_: stop.is_set() or os._exit(143))       # no run: nothing to save
    signal.signal(signal.SIGTERM, worker["leave"])


def work(*task):
    """`run` in a worker process."""
    try:
        return 130 if worker["stop"].is_set() else run(*task)
    finally:
        signal.signal(signal.SIGTERM, worker["leave"])


def run_all(tasks, jobs):
    """Run [(row, folder, seed)], the longest first. Returns the exit status: 0, 1 if one failed, 130 interrupted."""
    from tqdm import tqdm
    def length(task, iterations=None):
        """Seconds of a core, about: of all of its iterations, or so many."""
        return (task[0][3] if iterations is None else iterations) * SECONDS.get(task[0][1], 5)
    def done():
        return sum(length(task, (read(task[1]) or [{"iteration": 0}])[-1]["iteration"]) for task in tasks)
    context, failed = multiprocessing.get_context("spawn"), []
    os.environ["TQDM_DISABLE"] = "1"                    # of the workers
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    stop = context.Event()
    pool = concurrent.futures.ProcessPoolExecutor(jobs, context, begin, (stop,))
    named = {pool.submit(work, *task): task[1].name for task in sorted(tasks, key=length, reverse=True)}
    pending = set(named)
    try:
        with tqdm(desc="runs", total=sum(map(length, tasks)), initial=done(), disable=False,
                  bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}, {remaining} to go") as bar:
            while pending:
                ended, pending = concurrent.futures.wait(pending, 5, concurrent.futures.FIRST_COMPLETED)
                bar.update(done() - bar.n)
                bar.set_description(f"{len(named) - len(pending)} of {len(named)} runs")
                for task in ended:
                    if status := task.exception() or task.result():
                        failed.append(f"{named[task]}: {status}")
    except KeyboardInterrupt:
        stop.set()
        for process in multiprocessing.active_children():
            process.terminate()
        pool.shutdown(cancel_futures=True)
        print("figures.py: interrupted; the same command goes on", file=sys.stderr)
        return 130
    pool.shutdown()
    for text in sorted(failed):
        print(f"figures.py: failed, with exit status {text}; the same command tries again", file=sys.stderr)
    return int(bool(failed))


# ---- What a run spent, and what came out ----------------------------------------------------------------------------
def points(row, folder):
    """A finished run's evaluated rows with `accuracy`, `roughness` and what it had spent (COSTS); else none."""
    rows, reused = read(folder), int((row[5].partition("reused-")[2]) or 1)
    if not rows or rows[-1]["iteration"] < row[3]:
        return []
    c = json.loads((folder / "config.json").read_text())
    return [{"images": c["groups"] * c["group_size"] * math.ceil(r["iteration"] / reused), "seconds": r["cpu"],
             "accuracy": r["eval_reward"], "roughness": r["roughness"], "evaluations": r["evaluations"]}
            for r in rows if "eval_reward" in r]


def reach(run, key, target):
    """What a run had spent when its accuracy first came to `target`: ("", x), interpolated, or (">", all it spent)."""
    for a, b in itertools.pairwise(run):
        if b["accuracy"] >= target:
            share = max(0, target - a["accuracy"]) / max(1e-9, b["accuracy"] - a["accuracy"])
            return "", a[key] + share * (b[key] - a[key])
    return ">", run[-1][key]


def ratio(theirs, ours):
    """theirs / ours, of two results of `reach`: a lower bound where only theirs is one, "<" an upper one where ours."""
    mark = {("", ""): "", (">", ""): ">", ("", ">"): "<"}.get((theirs[0], ours[0]))
    return None if mark is None else (mark, theirs[1] / ours[1])


def spread(found):
    """Median and range over seeds of results of `reach` or `ratio`, marked as a bound where one rests on a bound."""
    known = sorted((f for f in found if f), key=lambda f: f[1])
    def text(i):
        below, above = any(mark == ">" for mark, _ in known[:i + 1]), any(mark == "<" for mark, _ in known[i:])
        x = known[i][1]
        return ">" * below + "<" * above + (f"{x:,.0f}" if x >= 100 else f"{x:.3g}")
    if not known:
        return "unknown"
    middle, low, high = text((len(known) - 1) // 2), text(0), text(len(known) - 1)
    return middle + f" ({low} to {high})" * (low != high) + f" {len(known)} of {len(found)} seeds" * (
        len(known) < len(found))


def mean(values, form=".3f"):
    """Mean over seeds, and in parentheses each where there are several."""
    each = [f"{x:{form}}" for x in values]
    return f"{sum(values) / len(values):{form}}" + f" ({', '.join(each)})" * (len(each) > 1)


def settings(row):
    """The flags of a row that say what it is."""
    return ", ".join(f"{k} {v}" for k, v in row[4].items() if k not in ("eval_every", "ema"))


def label(row):
    """A row's name in tables and plots: its method, or what it changes."""
    name, method, model, _, flags, change = row
    if name == f"{model}-{method}":
        return {"nft": "NFT", "flowgrpo": "FlowGRPO"}.get(method, method.upper())
    usual = TUNED["nft"] if name.startswith("signal") else ABLATED[model]
    return change or settings((*row[:4], {k: v for k, v in flags.items() if usual.get(k) != v})) or "default"


def table(titles, lines):
    """A table of markdown."""
    return "".join(f"| {' | '.join(line)} |\n" for line in [titles, ["---"] * len(titles), *lines])


def sweep_table(rows, out, seed):
    """Each setting of each method, the best of a method and length in bold."""
    done = [(row[0].split("-")[1], row, read(out / f"{row[0]}-{seed}")) for row in rows
            if points(row, out / f"{row[0]}-{seed}")]
    lines = []
    for method, row, run in done:
        def best(run):
            return max(r["eval_reward"] for r in run if "eval_reward" in r)
        group = [best(r) for m, other, r in done if (m, *other[2:4]) == (method, *row[2:4])]
        mark = "**" * (best(run) == max(group))
        lines.append([f"{method}, {row[2]}", settings(row), str(row[3]), f"{run[-1]['eval_reward']:.3f}",
                      f"{mark}{best(run):.3f}{mark}",
                      f"{sum(r['reward'] for r in run[-3:]) / 3:.3f}", f"{run[-1]['roughness']:.2f}",
                      f"{run[-1]['cpu'] / 60:.1f}"])
    titles = ["method", "settings", "iterations", "accuracy at the end", "at its best",
              "training reward, last 3 iterations", "roughness", "minutes"]
    minutes = sum(run[-1]["cpu"] for *_, run in done) / 60
    return table(titles, lines) + f"\nThe sweep took {minutes:.0f} minutes of a core.\n"


def result_tables(rows, runs, costs):
    """What each row came to and what it spent to reach TARGETS; where methods differ that over NFT's, seed by seed."""
    wanted, there, ratios = list(itertools.product(TARGETS, costs)), [row for row in rows if runs[row[0]]], []
    def line(row):
        mine = runs[row[0]].values()
        return [label(row), f"{row[2]}, {settings(row)}", mean([run[-1]["accuracy"] for run in mine]),
                mean([max(point["accuracy"] for point in run) for run in mine]),
                mean([run[-1]["roughness"] for run in mine], ".2f"),
                *(spread([reach(run, cost, target) for run in mine]) for target, cost in wanted)]
    titles = [f"{COSTS[cost]} to {target}" for target, cost in wanted]
    text = table(["row", "settings", "accuracy at the end", "at its best", "roughness", *titles], map(line, there))
    ours = runs[rows[0][0]]
    for row in there:
        if row[1] != "nft":
            pairs = [(run, ours[seed]) for seed, run in runs[row[0]].items() if seed in ours]
            ratios.append([f"{label(row)} / NFT", *(
                spread([ratio(reach(run, cost, target), reach(nfts, cost, target)) for run, nfts in pairs])
                for target, cost in wanted)])
    return text + ("\n" + table(["median (range)", *titles], ratios) if ratios else "")


# ---- Plots and pictures ---------------------------------------------------------------------------------------------
def plot(panels, runs, file):
    """Panels (title, rows, cost): accuracy against it, a line a row, the mean over seeds with their range shaded."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
    colours = "#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00"     # Okabe and Ito's, for all eyes
    lines = math.ceil(len(panels) / 3)
    figure, axes = plt.subplots(lines, 3, figsize=(13, 3.8 * lines), layout="constrained", squeeze=False)
    for axis, panel in itertools.zip_longest(axes.flat, panels):
        if not panel:
            axis.remove()
            continue
        title, rows, cost = panel
        for colour, marker, row in zip(colours, "osD^v<", rows):
            if mine := list(runs[row[0]].values()):
                x, y = (np.array([[point[key] for point in run] for run in mine]) for key in (cost, "accuracy"))
                other = row[2] != rows[0][2]            # model
                axis.plot(x.mean(0), y.mean(0), "--" if other else "-", color=colour, marker=marker, ms=3,
                          label=label(row) + f", {row[2]}" * other)
                axis.fill_between(x.mean(0), y.min(0), y.max(0), color=colour, alpha=0.15, lw=0)
        axis.set_title(title, fontsize=11)
        axis.set(xlabel=COSTS[cost], ylabel="held-out accuracy", ylim=(0, 1))
        if cost != "images":
            axis.set_xscale("log", nonpositive="mask")
            axis.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter=StrMethodFormatter("{x:,.0f}"),
                           minor_formatter=NullFormatter())
        for target in TARGETS:
            axis.axhline(target, color="gray", ls="--", lw=0.8)
        axis.legend(fontsize=8)
    figure.savefig(file, dpi=100)


def pictures(rows, out, seed, file):
    """Each row's last pictures of the same held-out prompts and noise, under those of the base model."""
    from PIL import Image, ImageDraw, ImageFont
    samples = {f"{label(row)}\n{row[2]}": sorted((out / f"{row[0]}-{seed}/samples").glob("*.png")) for row in rows}
    strips = {text: files[-1] for text, files in samples.items() if files}
    if strips:
        strips = {"base model": next(iter(filter(None, samples.values())))[0]} | strips
        tops = [(text, (im := Image.open(p)).crop((0, 0, im.width, im.height // 2))) for text, p in strips.items()]
        width, height = tops[0][1].size
        sheet = Image.new("RGB", (140 + width, height * len(tops)), "white")
        for i, (text, top) in enumerate(tops):
            sheet.paste(top, (140, i * height))
            ImageDraw.Draw(sheet).text((8, i * height + 30), text, fill=0, font=ImageFont.load_default(14))
        sheet.save(file)


def report(figures, seeds, out):
    """Print the tables of what is there, write them to tables.md, and draw."""
    runs = {row[0]: {seed: run for seed in seeds if (run := points(row, out / f"{row[0]}-{seed}"))}
            for rows in figures.values() for row in rows}
    figures = {name: rows for name, rows in figures.items() if any(runs[row[0]] for row in rows)}
    compared = [name for name in ("tiny", "tiny-sd3") if name in figures]
    ablated = [name for name in figures if name not in ("sweep", "signal", "precision", *compared)]
    text = ""
    for name, rows in figures.items():
        made = sweep_table(rows, out, seeds[0]) if name == "sweep" else \
            result_tables(rows, runs, COSTS if name in ("signal", *compared) else ["images"])
        text += f"### {TITLES[name]}\n\n{made}\n"
    out.mkdir(parents=True, exist_ok=True)
    (out / "tables.md").write_text(text + NOTE)
    print(text + NOTE)
    if compared:
        plot([(TITLES[name], figures[name], cost) for name in compared for cost in COSTS], runs, out / "comparison.png")
    if ablated:
        plot([(TITLES[name], figures[name], "images") for name in ablated], runs, out / "ablations.png")
    for name in figures.keys() - {"sweep"}:
        pictures(figures[name], out, seeds[0], out / f"grids-{name}.png")


def quick(row):
    """A row in about a third of its iterations, evaluated every other one: it costs almost as much as one."""
    *row, iterations, flags, change = row
    return (*row, max(4, iterations // 3), flags | {"eval_every": 2}, change)


def main():
    """Command line: run what is missing, draw what is there. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--figures", type=lambda s: s.split(","))
    parser.add_argument("--quick", action="store_true", help="one seed, a third of the iterations, the paper's figures")
    parser.add_argument("--seeds", type=lambda s: [int(x) for x in s.split(",")])
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--jobs", type=int, default=2, help="processes, each on one core")
    parser.add_argument("--plot", action="store_true", help="draw what is there and run nothing")
    args = parser.parse_args()
    if not importlib.util.find_spec("matplotlib"):      # before the runs, not after
        parser.error("the plots need matplotlib: pip install matplotlib")
    left_out = {"sweep", "precision", "signal"} if args.quick else {"sweep"}
    args.figures = args.figures or [name for name in FIGURES if name not in left_out]
    if unknown := set(args.figures) - set(FIGURES):
        parser.error(f"--figures {','.join(unknown)}: must be of {', '.join(FIGURES)}")
    args.seeds = args.seeds or ([0] if args.quick else [0, 1, 2])
    args.out = args.out or pathlib.Path("runs/figures-quick" if args.quick else "runs/figures")
    figures = {name: [quick(row) if args.quick and name != "sweep" else row for row in FIGURES[name]]
               for name in args.figures}
    tasks = {folder: (row, folder, seed) for name, rows in figures.items() for row in rows
             for seed in (args.seeds[:1] if name == "sweep" else args.seeds)
             for folder in [args.out / f"{row[0]}-{seed}"]}         # a row of several figures runs once
    status = 0 if args.plot else run_all(list(tasks.values()), args.jobs)
    report(figures, args.seeds, args.out)
    return status


if __name__ == "__main__":
    sys.exit(main())
