"""What harness.py runs: ROWS by name, the TABLES of them that pages show, and the PLOTS.

A row is `python nft.py` with some settings and seeds; another method's (baselines.py); parts of
nft.train in place of its own (PARTS); or a script's. To add one, give it a name in ROWS and a place
in TABLES. The settings of the comparison were chosen by the rows "sweep-...", on seed 0.
SPDX-License-Identifier: MIT
"""

import dataclasses
import functools
import hashlib
import json
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))
import blackbox

import nft


@dataclasses.dataclass(frozen=True)
class Row:
    """One setting of one method."""

    # Of nft.Config, and a baseline's own; the model's preset has what is left open.
    settings: dict = dataclasses.field(default_factory=dict)
    # "nft", or one of baselines.METHODS.
    method: str = "nft"
    # A name in PARTS.
    parts: str = ""
    # Words of a command that takes nft.py's flags: it is given the settings, --seed and --out.
    script: str = ""
    # The script is given nothing, and prints a table of Markdown.
    prints: bool = False
    seeds: tuple = (0, 1, 2)

    def digest(self):
        """12 hexadecimal digits for all that changes a result."""
        told = {name: value for name, value in vars(self).items() if name != "seeds"}
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12]


# ---- Parts of nft.train --------------------------------------------------------------------------
def weighted_losses(model, pairs, t, eps, a, b):
    """nft.pair_losses of a flow by Eq. (5)'s w(t) ||v_theta - v||^2, w(t) = a + b t, not adaptive.

    w is scaled so that its mean over the sampler's times is that of t, which is the weight of the
    adaptive loss: so the KL term counts alike.
    """
    _, sigma = model.noise_level(t, eps.ndim)
    _, sampled = model.noise_level(model.times)
    w = (a + b * sigma) * sampled.mean() / (a + b * sampled).mean()

    def distance(x0_hat, x_0):
        # For a flow, v_hat - v is (x_0 - x0_hat) / t.
        return (w * ((x0_hat - x_0) / sigma).square()).flatten(1).mean(1)

    loss = functools.partial(nft.nft_loss, distance=distance)
    return nft.pair_losses(model, pairs, t, eps, loss=loss)


def eps_losses(model, pairs, t, eps, power):
    """nft.pair_losses of an eps-model with errors of eps weighed by (sigma / alpha)^power.

    1 is how the flow's code would weigh them, 0 is alike; nft.py's is sigma / (alpha + sigma).
    """
    loss, kl, deviation = nft.pair_losses(model, pairs, t, eps)
    alpha, sigma = model.noise_level(t)
    return loss * (sigma / alpha) ** power * (alpha + sigma) / sigma, kl, deviation


def guided_evaluate(run, rewards, prompts, iteration):
    """nft.evaluate, and `eval_reward/guidance S`: the held-out reward when sampled so."""
    row = nft.evaluate(run, rewards, prompts, iteration)
    numbered = [(i, *prompt) for i, prompt in enumerate(prompts)]
    own = run.model.settings
    for scale in (1, 2, 3):
        run.model.settings = own | {"guidance_scale": float(scale)}
        D = nft.collect(run.model, rewards, numbered, ("evaluation",), "ema")
        row[f"eval_reward/guidance {scale}"] = D["scores"]["reward"].mean().item()
    run.model.settings = own
    return row


PARTS = {
    "positive only": {"losses": functools.partial(nft.pair_losses, loss=blackbox.positive_loss)},
    "w = 1": {"losses": functools.partial(weighted_losses, a=1, b=0)},
    "w = t": {"losses": functools.partial(weighted_losses, a=0, b=1)},
    "w = 1 - t": {"losses": functools.partial(weighted_losses, a=1, b=-1)},
    "weight σ/α": {"losses": functools.partial(eps_losses, power=1)},
    "weight 1": {"losses": functools.partial(eps_losses, power=0)},
    "guidance 1, 2, 3": {"evaluate": guided_evaluate},
}

# ---- The default runs, guided ones, and with the settings of Stable Diffusion 1.5 ----------------
EXACT = nft.PRESETS["tiny"]["reward"]
# Beside the reward, and only logged.
ROUGH = f"{EXACT},roughness=0"


def as_sd15(lr):
    """A row on tiny with the settings of sd15, wherever the two presets differ."""
    own = ("model", "reward", "prompts", "eval_prompts", "batch_size")
    sd15 = nft.Config(**nft.PRESETS["sd15"])
    settings = {name: getattr(sd15, name) for name in nft.PRESETS["tiny"] if name not in own}
    return Row(settings | {"model": "tiny", "lr": lr})


ROWS = {
    "tiny": Row({"model": "tiny", "reward": ROUGH, "eval_every": 1}),
    "tiny-sd3": Row({"model": "tiny-sd3", "reward": ROUGH, "eval_every": 4}),
    "guidance-1": Row({"model": "tiny", "guidance": 1.0}, parts="guidance 1, 2, 3"),
    "guidance-2": Row({"model": "tiny", "guidance": 2.0}, parts="guidance 1, 2, 3"),
    "as-sd15": as_sd15(lr=3e-4),
    "as-sd15-lr-1e-3": as_sd15(lr=1e-3),
}

# ---- The comparison, and the sweep that its settings are chosen from -----------------------------
SCHEDULE = {"steps": 10, "eval_steps": 10, "z": 5.0, "ema": 0.9, "updates": 4, "batch_size": 64}
# These train some noise levels of an image, the others all steps of its rollout.
DENOISING = ("nft", "rwr", "rft")
# What the sweep chose.
TUNED = {
    "nft": {"lr": 2e-3, "beta": 0.3},
    "ddpo": {"lr": 3e-3, "clip_range": 1e-2},
    "dpok": {"lr": 1.5e-3, "clip_range": 3e-4},
    "loop": {"lr": 3e-3, "clip_range": 1e-3},
    "coca": {"lr": 3e-3, "clip_range": 1e-2},
    "flowgrpo": {"lr": 3e-3, "clip_range": 1e-2},
    "rtb": {"lr": 1e-3, "temperature": 1e-3},
    "rwr": {"lr": 2e-3, "temperature": 0.1},
    "rft": {"lr": 2e-3, "kl": 0.0},
}
# On tiny-sd3 two methods were swept, the others are as on tiny.
TUNED_SD3 = TUNED | {
    "nft": {"lr": 3e-3, "beta": 0.3},
    "flowgrpo": {"lr": 7.5e-4, "clip_range": 1e-3},
}


def compared(method, model="tiny", parts="", seeds=Row.seeds, **changes):
    """A row of SCHEDULE with a method's tuned settings, and changes to these."""
    settings = SCHEDULE | {"model": model, "iterations": 24, "eval_every": 2}
    if method in DENOISING:
        settings["train_times"] = 3
    tuned = TUNED if model == "tiny" else TUNED_SD3
    return Row(settings | tuned[method] | changes, method, parts, seeds=seeds)


ROWS |= {f"tiny-{method}": compared(method) for method in TUNED}
ROWS |= {f"sd3-{method}": compared(method, "tiny-sd3") for method in TUNED}
# Few steps, on tiny: fewer levels, too.
FEW = {"iterations": 12, "steps": 5, "ema": 0.8}
ROWS |= {f"few-{method}": compared(method, **FEW) for method in ("ddpo", "dpok", "loop")}
ROWS |= {f"few-{method}": compared(method, train_times=2, **FEW) for method in DENOISING}
ROWS |= {
    # Ten times as long as NFT.
    "sd3-flowgrpo": compared("flowgrpo", "tiny-sd3", iterations=192, eval_every=6),
    # The order of work of the released script: all levels, its KL of 1e-4 over its loss's factor 5.
    "sd3-released": compared("nft", "tiny-sd3", train_times=9, kl=2e-5),
    # The presets as they are, but for the quickest beta.
    "tiny-nft-preset": Row({"model": "tiny", "beta": 0.1, "eval_every": 1}),
    "sd3-nft-preset": Row({"model": "tiny-sd3", "beta": 0.1, "eval_every": 2}),
}

KNOBS = dict.fromkeys(TUNED, ("clip_range", (1e-3, 1e-2, 1e-1))) | {
    "nft": ("beta", (0.1, 0.3, 1.0)),
    "rtb": ("temperature", (1e-4, 1e-3, 1e-2)),
    "rwr": ("temperature", (0.1, 0.3)),
    "rft": ("kl", (0.0, 0.1)),
}
RATES = {"tiny": (1e-3, 2e-3, 4e-3), "tiny-sd3": (7.5e-4, 1.5e-3, 3e-3)}


def swept(model, method):
    """{name: row}: learning rates times values of the method's knob, ten iterations of seed 0."""
    knob, values = KNOBS[method]
    found = {}
    for lr in RATES[model]:
        for value in values:
            changes = {"iterations": 10, "eval_every": 5, "lr": lr, knob: value}
            name = f"sweep-{model}-{method}-{lr:g}-{value:g}"
            found[name] = compared(method, model, seeds=(0,), **changes)
    return found


SWEEP = {}
for model in RATES:
    for method in KNOBS:
        SWEEP |= swept(model, method)
ROWS |= SWEEP


# ---- Ablations: at a beta at which not everything works ------------------------------------------
def ablated(parts="", model="tiny", **changes):
    """A row that changes what is said."""
    settings = {"iterations": 12, "eval_every": 3, "beta": 1.0} | changes
    return compared("nft", model, parts, **settings)


ROWS |= {
    "base": ablated(),
    "positive": ablated("positive only"),
    "beta-0.1": ablated(beta=0.1),
    "beta-0.3": ablated(beta=0.3),
    "beta-3": ablated(beta=3.0),
    "eta-0": ablated(eta="0"),
    "eta-0.5": ablated(eta="0.5"),
    "eta-0.9": ablated(eta="0.9"),
    "ddim": ablated(solver="ddim"),
    "dpm2-sde": ablated(solver="dpm2-sde"),
    "levels-1": ablated(train_times=1),
    "levels-10": ablated(train_times=10),
    "bf16": ablated(precision="bf16"),
    "fp16": ablated(precision="fp16"),
    "sd3-base": ablated(model="tiny-sd3"),
    "sd3-positive": ablated("positive only", "tiny-sd3"),
    "sd3-w=1": ablated("w = 1", "tiny-sd3"),
    "sd3-w=t": ablated("w = t", "tiny-sd3"),
    "sd3-w=1-t": ablated("w = 1 - t", "tiny-sd3"),
}
ABLATIONS = {
    "the negative branch": ["base", "positive", "sd3-base", "sd3-positive"],
    "β": ["base", "beta-0.1", "beta-0.3", "beta-3"],
    "η": ["base", "eta-0", "eta-0.5", "eta-0.9"],
    "the rollouts' solver": ["base", "ddim", "dpm2-sde"],
    "noise levels": ["base", "levels-1", "levels-10"],
    "weighting": ["sd3-base", "sd3-w=1", "sd3-w=t", "sd3-w=1-t"],
}

# ---- What keeps eps-prediction healthy -----------------------------------------------------------
LOOKS = ",examples/rewards/roughness.py:brightness=0,examples/rewards/roughness.py:saturation=0"
LEARNED = f"learned,{EXACT}=0,roughness=0"


def epsilon(parts="", reward=ROUGH, **changes):
    """The default run, twice as long, with one thing changed; the pictures' looks are logged."""
    settings = {"model": "tiny", "iterations": 22, "eval_every": 11, "reward": reward + LOOKS}
    return Row(settings | changes, parts=parts)


EPSILON = {
    "eps-base": epsilon(),
    "eps-flow": epsilon("weight σ/α", kl=2e-5),
    "eps-even": epsilon("weight 1"),
    "eps-kl-0": epsilon(kl=0.0),
    "eps-kl-0.3": epsilon(kl=0.3),
    "eps-large-lr": epsilon(lr=1e-2),
}
ROWS |= EPSILON | {
    "learned": epsilon(reward=LEARNED),
    "learned-flow": epsilon("weight σ/α", reward=LEARNED, kl=2e-5),
}

# ---- Studies that print a table of their own -----------------------------------------------------
ROWS |= {
    "blackbox": Row(script="examples/studies/blackbox.py", prints=True, seeds=(0,)),
    "control": Row(script="examples/studies/control.py", prints=True, seeds=(0,)),
    "memory": Row(script="examples/studies/bench.py --simulate", prints=True, seeds=(0,)),
    "speed": Row(script="examples/studies/bench.py", prints=True, seeds=(0,)),
}


# ---- Tables {name: (rows, columns)}, plots {file: {title: rows}}; columns are report.cell's ------
ENDS = ["end", "best"]
SPENT = ["images", "evaluations", "minutes"]
RACE = [*ENDS, "evaluations to 0.5", "evaluations to 0.7", "seconds to 0.5", "seconds to 0.7"]
LOOK = [*ENDS, "roughness", "brightness", "saturation"]
COMPARED = [f"tiny-{method}" for method in TUNED] + ["tiny-nft-preset"]
COMPARED_SD3 = [f"sd3-{method}" for method in TUNED] + ["sd3-nft-preset", "sd3-released"]
ABLATED = list(dict.fromkeys(name for names in ABLATIONS.values() for name in names))
TABLES = {
    "default": (["tiny", "tiny-sd3"], ["accuracy", "roughness", *SPENT]),
    "guidance": (["guidance-1", "guidance-2"], ["guidance 1", "guidance 2", "guidance 3"]),
    "as-sd15": (["as-sd15", "as-sd15-lr-1e-3"], [*ENDS, *SPENT]),
    "comparison": (COMPARED, RACE),
    "comparison-sd3": (COMPARED_SD3, [*RACE, "evaluations to 0.6", "seconds to 0.6"]),
    "few": ([f"few-{method}" for method in (*DENOISING, "ddpo", "dpok", "loop")], RACE[:4]),
    "sweep": (list(SWEEP), ENDS),
    "ablations": (ABLATED, [*ENDS, "evaluations to 0.5"]),
    "precision": (["base", "bf16", "fp16"], ENDS),
    "epsilon": (list(EPSILON), LOOK),
    "learned": (["learned", "learned-flow"], [*LOOK, "learned"]),
}
PLOTS = {
    "reward_curve.png": {"the default runs": ["tiny", "tiny-sd3"]},
    "comparison.png": {"on tiny": COMPARED, "on tiny-sd3": COMPARED_SD3},
    "ablations.png": ABLATIONS,
    "as_sd15.png": {"tiny, trained as sd15 is": ["as-sd15", "as-sd15-lr-1e-3"]},
}
# Those of --quick, cut to four iterations.
QUICK = ["tiny", "tiny-nft", "tiny-ddpo", "tiny-rft", "base", "positive", "sd3-flowgrpo"]
