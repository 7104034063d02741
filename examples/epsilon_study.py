"""What makes DiffusionNFT hold on an eps-prediction model: weighting, times, KL and warm-up, one at a time.

    python examples/epsilon_study.py                     # 11 rows x 3 seeds on tiny-sd15: 90 minutes of one core
    python examples/epsilon_study.py --rows default,released --seeds 0
    python examples/epsilon_study.py --plot examples/epsilon_study.png       # the table and plot, from --out
    python examples/epsilon_study.py --reward examples/learned.py:match --iterations 60 --out runs/learned

A row changes the preset `tiny`, with beta 1 and 4 updates, in one thing, at an equal budget, and all run at
a learning rate of 2e-3: at half of it nearly everything works for a while, and the study would show luck alone. Runs
that --out already holds are not repeated. Besides roughness the table has three numbers of the held-out
pictures, mean and standard deviation of the pixels and saturation (the spread between a pixel's
channels): a grey or speckled picture fails, whatever its reward. The plot needs matplotlib.
SPDX-License-Identifier: MIT
"""
import argparse
import contextlib
import json
import pathlib
import sys
from unittest import mock

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import nft  # noqa: E402

EXACT = "examples/shapes.py:reward"
# The gradient by the output, at noise level (alpha, sigma), for each way to weight a pair. An error of eps
# moves x_0 by sigma / alpha, and the adaptive loss is linear in the size of the error.
WEIGHTS = {
    "flow's": lambda alpha, sigma: sigma / (alpha + sigma),         # what nft.pair_losses does
    "x_0": lambda alpha, sigma: sigma / alpha,                      # the paper's x_0 loss, word for word
    "eps": lambda alpha, sigma: sigma / sigma,                      # self-normalised in eps
    "capped": lambda alpha, sigma: (sigma / alpha).clamp(max=1),
}
# name: (what it changes, flags, weight, KL in the space of x_0, highest sigma / alpha trained on)
ROWS = {
    "default": ("weight σ/(α+σ), KL 0.1, sampler's times", {}, "flow's", False, None),
    "released": ("the flow code's loss: x_0 weight σ/α, KL 1e-4, no warm-up",
                 dict(kl=1e-4, warmup=0), "x_0", False, None),
    "x_0": ("x_0-adaptive weight σ/α", {}, "x_0", False, None),
    "eps": ("ε self-normalised, weight 1", {}, "eps", False, None),
    "capped": ("weight min(σ/α, 1)", {}, "capped", False, None),
    "uniform": ("times uniform", dict(times="uniform"), "flow's", False, None),
    "low-noise": ("sampler's times with σ/α ≤ 5", {}, "flow's", False, 5.0),
    "kl-0": ("KL 0", dict(kl=0), "flow's", False, None),
    "kl-0.3": ("KL 0.3", dict(kl=0.3), "flow's", False, None),
    "kl-x_0": ("KL 0.1 measured on x_0", {}, "flow's", True, None),
    "no-warmup": ("no warm-up", dict(warmup=0), "flow's", False, None),
}


def pixel_mean(images, prompts, metadata):
    """Mean of an image's pixels, in [0, 1]."""
    return images.mean((1, 2, 3))


def pixel_std(images, prompts, metadata):
    """Standard deviation of an image's pixels: 0 is grey."""
    return images.std((1, 2, 3))


def saturation(images, prompts, metadata):
    """Mean spread of a pixel's channels, in [0, 1]: 0 is grey."""
    return (images.amax(1) - images.amin(1)).mean((1, 2))


@contextlib.contextmanager
def patched(weight, kl_of_x0, highest):
    """nft.pair_losses with another weight and KL, each scaled so that its mean over the sampler's times is
    the default's (the released row apart, where nothing is scaled); nft.Model with its times capped."""
    pair_losses, sample = nft.pair_losses, nft.Model.sample

    def noise(model, t):
        alpha, sigma = model.alpha_sigma(t)
        return alpha.double(), sigma.double()

    def reweighted(model, rollout, index, t, eps, r):
        loss, kl, deviation = pair_losses(model, rollout, index, t, eps, r)
        here, grid = noise(model, t), noise(model, model.times)
        ours, old = WEIGHTS[weight], WEIGHTS["flow's"]
        scale = 1 if model.config.kl == 1e-4 else old(*grid).mean() / ours(*grid).mean()
        loss = loss * (scale * ours(*here) / old(*here)).float()
        if kl_of_x0:
            kl = kl * ((here[1] / here[0]) ** 2 / ((grid[1] / grid[0]) ** 2).mean()).float()
        return loss, kl, deviation

    def capped(model, *args):
        rollout = sample(model, *args)
        alpha, sigma = noise(model, model.times)
        model.times = model.times[(sigma / alpha <= (highest or np.inf)).cpu()]
        return rollout

    with mock.patch.object(nft, "pair_losses", reweighted), mock.patch.object(nft.Model, "sample", capped):
        yield


def read(folder):
    """The rows of a run's metrics.jsonl, none where there is no run."""
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def run(name, seed, args):
    """One row for one seed, unless it is there already; goes on with one that was cut off."""
    folder, (_, flags, *how) = args.out / f"{name}-{seed}", ROWS[name]
    rows = read(folder)
    if rows and rows[-1]["iteration"] >= args.iterations:
        return
    watch = ",".join(f"{HERE / 'epsilon_study.py'}:{f}" for f in ("pixel_mean", "pixel_std", "saturation"))
    watch += f",{EXACT}" * (args.reward != EXACT)
    flags = dict(model=args.model, seed=seed, iterations=args.iterations, lr=args.lr, eval_every=15, out=folder,
                 reward=args.reward, watch=watch, beta=1.0, updates=4, batch_size=64, **flags)
    command = [x for k, v in flags.items() for x in ("--" + k.replace("_", "-"), str(v))]
    with patched(*how):
        if nft.main(command + ["--resume"] * (folder / "checkpoint.pt").exists()):
            sys.exit(1)


def table(args):
    """Print a markdown table: mean over seeds (lowest to highest), and where the pictures stand."""
    learned = args.reward != EXACT
    print("| row |" + " trained reward |" * learned + " held-out accuracy | roughness | pixel mean, std, saturation |"
          " loss, last / first | old_deviation |\n" + "| --- " * (6 + learned) + "|")
    found = {}
    for name in args.rows:
        runs = [rows for s in args.seeds if (rows := read(args.out / f"{name}-{s}"))
                and rows[-1]["iteration"] >= args.iterations]
        if not runs:
            continue
        found[name] = runs
        def column(key, rows=runs):
            return np.array([r[args.iterations][key] for r in rows])
        watched = [column(f"eval_reward/epsilon_study:{f}").mean() for f in ("pixel_mean", "pixel_std", "saturation")]
        reward, rough = column("eval_reward/shapes:reward"), column("roughness")
        trained = f" {column('eval_reward').mean():.3f} |" * learned
        growth = np.mean([r[args.iterations]["loss"] / r[1]["loss"] for r in runs])
        print(f"| {ROWS[name][0]} |{trained} {reward.mean():.3f} ({', '.join(f'{x:.3f}' for x in reward)}) | "
              f"{', '.join(f'{x:.2f}' for x in rough)} | {', '.join(f'{x:.2f}' for x in watched)} | "
              f"{growth:.2f} | {column('old_deviation').mean():.1e} |")
    if found:
        base = next(iter(found.values()))[0][0]
        health = [base[f"eval_reward/epsilon_study:{f}"] for f in ("pixel_mean", "pixel_std", "saturation")]
        trained = f" {base['eval_reward']:.3f} |" * learned
        accuracy = base["eval_reward/shapes:reward"]
        print(f"| the base model |{trained} {accuracy:.3f} | 1 | {', '.join(f'{x:.2f}' for x in health)} | | |")
    return found


def plot(found, args):
    """Accuracy against roughness, a point a seed: up is better, 1.0 across is as clean as the base."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axis = plt.subplots(figsize=(8, 3.6), constrained_layout=True)
    for i, (name, runs) in enumerate(found.items()):
        last = [rows[args.iterations] for rows in runs]
        axis.scatter([row["roughness"] for row in last], [row["eval_reward/shapes:reward"] for row in last],
                     label=name, marker="os^Dv"[i % 5], color=plt.cm.tab20(i))
    axis.axvspan(0.8, 1.25, alpha=0.1, color="green")
    axis.set(xscale="log", xlabel="roughness (1: as clean as the base; green: 0.8 to 1.25)", ylabel="held-out accuracy",
             title=f"{args.model}, {args.iterations} iterations, learning rate {args.lr:g}")
    axis.grid(alpha=0.3)
    axis.legend(bbox_to_anchor=(1, 1), loc="upper left")
    figure.savefig(args.plot, dpi=100)


def main():
    """Command line: run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=lambda s: s.split(","), default=list(ROWS))
    parser.add_argument("--seeds", type=lambda s: s.split(","), default=["0", "1", "2"])
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--reward", default=EXACT, help="one reward to train on; accuracy is always shapes.py's")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/epsilon"))
    parser.add_argument("--plot", type=pathlib.Path, help="write a plot here and run nothing")
    args = parser.parse_args()
    for seed in args.seeds if not args.plot else ():
        for name in args.rows:
            run(name, seed, args)
    found = table(args)
    if args.plot:
        plot(found, args)


if __name__ == "__main__":
    main()
