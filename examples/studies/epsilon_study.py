"""What keeps DiffusionNFT healthy on an eps-prediction model: weighting, times, KL and warm-up.

    python examples/studies/epsilon_study.py                # 10 rows x 3 seeds on tiny
    python examples/studies/epsilon_study.py --rows default,released --seeds 0
    python examples/studies/epsilon_study.py --plot study.png       # of the runs that are there
    python examples/studies/epsilon_study.py --reward learned --iterations 60 --out runs/learned

A row changes `settings`, on the pipeline `tiny`, in one thing, at an equal budget. All
run at a learning rate of 2e-3: at half of it nearly everything works for a while, and the study
would show luck alone. Runs that --out already holds are not repeated; one that was cut off starts
anew. Besides roughness the table has three numbers of the held-out pictures: mean and standard
deviation of the pixels, and saturation. A grey or speckled picture fails, whatever its reward. The
plot needs matplotlib.
SPDX-License-Identifier: MIT
"""

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))
import nft

# The exact reward, which is watched where another one is trained on.
EXACT = "examples/tiny/shapes.py:reward"
ACCURACY = "eval_reward/shapes:reward"


# ---- Numbers of the held-out pictures, watched as rewards ----------------------------------------
def pixel_mean(images, prompts, metadata):
    """Mean of an image's pixels, in [0, 1]."""
    return images.mean((1, 2, 3))


def pixel_std(images, prompts, metadata):
    """Standard deviation of an image's pixels: 0 is one grey."""
    return images.std((1, 2, 3))


def saturation(images, prompts, metadata):
    """Mean spread of a pixel's channels, in [0, 1]: 0 is grey."""
    return (images.amax(1) - images.amin(1)).mean((1, 2))


HEALTH = ("pixel_mean", "pixel_std", "saturation")


# ---- How a pair at noise level (alpha, sigma) is weighted: the gradient by the output ------------
# An error of eps moves x_0 by sigma / alpha, and the adaptive loss is linear in an error's size.
def flow_weight(alpha, sigma):
    """What nft.pair_losses does: the weight that a flow has."""
    return sigma / (alpha + sigma)


def x0_weight(alpha, sigma):
    """The paper's loss of x_0, word for word."""
    return sigma / alpha


def eps_weight(alpha, sigma):
    """An adaptive loss of eps itself."""
    return torch.ones_like(sigma)


def capped_weight(alpha, sigma):
    """That of x_0, at most 1."""
    return (sigma / alpha).clamp(max=1)


def squared_x0_weight(alpha, sigma):
    """What makes of a squared distance of eps that of x_0."""
    return (sigma / alpha).square()


# ---- Rows ----------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Row:
    """One change of the default."""

    # In the table.
    text: str
    # Of nft.Config.
    settings: dict = dataclasses.field(default_factory=dict)
    weight: Callable = flow_weight
    # What the squared distance of eps to the base model is multiplied by; None: by 1.
    kl_weight: Callable | None = None
    # Whether the weights' means over the sampler's times are made equal to the default's.
    scaled: bool = True
    # The highest sigma / alpha that is trained on.
    highest: float = float("inf")


ROWS = {
    "default": Row("weight σ/(α+σ), KL 0.1, sampler's times"),
    "released": Row(
        "the flow code's loss: x_0 weight σ/α, KL 1e-4, no warm-up",
        {"kl": 1e-4, "warmup": 0},
        x0_weight,
        scaled=False,
    ),
    "x_0": Row("x_0-adaptive weight σ/α", weight=x0_weight),
    "eps": Row("ε self-normalised, weight 1", weight=eps_weight),
    "capped": Row("weight min(σ/α, 1)", weight=capped_weight),
    "low-noise": Row("sampler's times with σ/α ≤ 5", highest=5.0),
    "kl-0": Row("KL 0", {"kl": 0}),
    "kl-0.3": Row("KL 0.3", {"kl": 0.3}),
    "kl-x_0": Row("KL 0.1 measured on x_0", kl_weight=squared_x0_weight),
    "no-warmup": Row("no warm-up", {"warmup": 0}),
}


def noise_level(model, t):
    """alpha and sigma (b,) at times t (b,), in float64."""
    alpha, sigma = model.noise_level(t)
    return alpha.double(), sigma.double()


def reweighted(model, D, index, t, eps, row):
    """nft.pair_losses with the row's weights."""
    loss, kl, deviation = nft.pair_losses(model, D, index, t, eps)
    here = noise_level(model, t)
    sampled = noise_level(model, model.times)
    factor = row.weight(*here) / flow_weight(*here)
    if row.scaled:
        factor = factor * flow_weight(*sampled).mean() / row.weight(*sampled).mean()
    loss = loss * factor.float()
    if row.kl_weight is not None:
        kl = kl * (row.kl_weight(*here) / row.kl_weight(*sampled).mean()).float()
    return loss, kl, deviation


class LowNoise(nft.Model):
    """A model that is trained only at times with sigma / alpha up to `highest`."""

    def __init__(self, config, highest):
        super().__init__(config)
        alpha, sigma = noise_level(self, self.times)
        self.times = self.times[(sigma / alpha <= highest).cpu()]


def parts(row):
    """The row as parts of nft.train."""
    return {
        "make_model": functools.partial(LowNoise, highest=row.highest),
        "losses": functools.partial(reweighted, row=row),
    }


# ---- Runs ----------------------------------------------------------------------------------------
def read(folder, iterations):
    """The rows of a run's metrics.jsonl, up to `iterations`; none of an unfinished run."""
    file = folder / "metrics.jsonl"
    if not file.exists():
        return []
    logged = [json.loads(line) for line in file.read_text().splitlines()]
    if len(logged) <= iterations:
        return []
    return logged[: iterations + 1]


def settings(name, seed, args):
    """The settings of nft.Config of a row's run."""
    watched = [f"{Path(__file__).resolve()}:{function}" for function in HEALTH]
    if args.reward != EXACT:
        watched.append(EXACT)
    common = {
        "model": args.model,
        "seed": seed,
        "iterations": args.iterations,
        "lr": args.lr,
        "eval_every": 15,
        "out": args.out / f"{name}-{seed}",
        "reward": args.reward,
        "watch": ",".join(watched),
        "beta": 1.0,
        "updates": 4,
        "batch_size": 64,
        # Presets may move.
        "steps": 10,
        "eval_steps": 10,
        "train_times": 3,
        "warmup": 10,
        "z": 5.0,
        "ema": 0.9,
        "kl": 0.1,
    }
    return common | ROWS[name].settings


def run(name, seed, args):
    """Train a row with a seed, unless that is done."""
    folder = args.out / f"{name}-{seed}"
    if read(folder, args.iterations):
        return
    # Where a run was cut off a new one may begin.
    (folder / "config.json").unlink(missing_ok=True)
    config = nft.configure(**settings(name, seed, args))
    nft.train(config, **parts(ROWS[name]))


# ---- Table and plot ------------------------------------------------------------------------------
def load(args):
    """{name: runs} of the finished runs of each row; a run is the rows of its metrics.jsonl."""
    found = {}
    for name in args.rows:
        runs = []
        for seed in args.seeds:
            logged = read(args.out / f"{name}-{seed}", args.iterations)
            if logged:
                runs.append(logged)
        if runs:
            found[name] = runs
    return found


def column(entries, field):
    """A field of rows of metrics.jsonl, as an array."""
    return np.array([entry[field] for entry in entries])


def joined(values, form):
    """Numbers as text."""
    return ", ".join(format(value, form) for value in values)


def health(entries):
    """Means over runs of the numbers in HEALTH, as text."""
    means = [column(entries, f"eval_reward/epsilon_study:{name}").mean() for name in HEALTH]
    return joined(means, ".2f")


def table_line(name, runs, learned):
    """A row of the table: means over seeds, and each seed's."""
    last = [logged[-1] for logged in runs]
    accuracy = column(last, ACCURACY)
    growth = column(last, "loss") / column([logged[1] for logged in runs], "loss")
    line = [ROWS[name].text]
    if learned:
        line.append(f"{column(last, 'eval_reward').mean():.3f}")
    line += [
        f"{accuracy.mean():.3f} ({joined(accuracy, '.3f')})",
        joined(column(last, "eval_roughness"), ".2f"),
        health(last),
        f"{growth.mean():.2f}",
        f"{column(last, 'old_deviation').mean():.1e}",
    ]
    return line


def table(found, learned):
    """A markdown table of the runs of `load`; learned: whether another reward was trained on."""
    titles = [
        "row",
        "held-out accuracy",
        "roughness",
        "pixel mean, std, saturation",
        "loss, last / first",
        "old_deviation",
    ]
    if learned:
        titles.insert(1, "trained reward")
    lines = [titles, ["---"] * len(titles)]
    for name, runs in found.items():
        lines.append(table_line(name, runs, learned))
    if found:
        # Every run begins at the base model.
        base = next(iter(found.values()))[0][0]
        line = ["the base model", f"{base[ACCURACY]:.3f}", "1", health([base]), "", ""]
        if learned:
            line.insert(1, f"{base['eval_reward']:.3f}")
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(found, title, path):
    """Accuracy against roughness, a point a seed, as a PNG: best is high up, at roughness 1."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axis = figure.add_subplot()
    for i, (name, runs) in enumerate(found.items()):
        last = [logged[-1] for logged in runs]
        axis.scatter(
            column(last, "eval_roughness"),
            column(last, ACCURACY),
            label=name,
            marker="os^Dv"[i % 5],
            color=colormaps["tab20"](i),
        )
    axis.axvspan(0.8, 1.25, alpha=0.1, color="green")
    axis.set(
        xscale="log",
        xlabel="roughness (1: as clean as the base; green: 0.8 to 1.25)",
        ylabel="held-out accuracy",
        title=title,
    )
    axis.grid(alpha=0.3)
    axis.legend(bbox_to_anchor=(1, 1), loc="upper left")
    figure.savefig(path, dpi=100)


def words(text):
    """A comma-separated list."""
    return text.split(",")


def numbers(text):
    """A comma-separated list of integers."""
    return [int(word) for word in text.split(",")]


def main(argv=None):
    """Command line: run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=words, default=list(ROWS), help=f"of {', '.join(ROWS)}")
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--reward", default=EXACT, help="to train on; accuracy is shapes.py's")
    parser.add_argument("--out", type=Path, default=Path("runs/epsilon"))
    parser.add_argument("--plot", type=Path, help="write a plot here and run nothing")
    args = parser.parse_args(argv)
    unknown = set(args.rows) - set(ROWS)
    if unknown:
        parser.error(f"--rows {','.join(unknown)}: must be of {', '.join(ROWS)}")
    if not args.plot:
        for seed in args.seeds:
            for name in args.rows:
                run(name, seed, args)
    found = load(args)
    print(table(found, learned=args.reward != EXACT))
    if args.plot:
        title = f"{args.model}, {args.iterations} iterations, learning rate {args.lr:g}"
        plot(found, title, args.plot)


if __name__ == "__main__":
    main()
