"""What figures.py compares: a row is one setting of one method.

`FIGURES` names the rows of each figure. `TUNED` holds the settings that the rows of the figure
"sweep" were run to choose. What no setting can say, a row's `change` does: it returns parts of
nft.train. A new figure needs a place in FIGURES and in TITLES; a new method one in
baselines.METHODS, in TUNED and LABELS, and in report.py's COLOURS and MARKERS.
SPDX-License-Identifier: MIT
"""

import collections
import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))
import nft


@dataclasses.dataclass(frozen=True)
class Row:
    """One setting of one method; its run with a seed lies in OUT/name-seed."""

    name: str
    # Its name in tables and plots.
    label: str
    # "nft", or a key of baselines.METHODS.
    method: str
    # A preset.
    model: str
    iterations: int
    # Of nft.Config, and the method's own.
    settings: dict
    # () -> parts of nft.train.
    change: Callable | None = None
    # So many iterations train on the same images; 1/2: half of the images are trained on, once.
    reuse: float = 1
    # Whether what the settings leave open is SCHEDULE's; else the preset's, whatever it becomes.
    pinned: bool = True


# The schedule of every row but where it or its method says otherwise: presets may move, and
# tiny's is coarser.
SCHEDULE = {"steps": 10, "eval_steps": 10, "train_times": 3, "warmup": 10, "z": 5.0, "ema": 0.9}
# And the weight of its KL term.
KL = {"tiny": 0.1, "tiny-sd3": 0.03}
# Of guidance, at which some rows are evaluated.
SCALES = (1, 2, 3)


def describe(settings, method="nft"):
    """The settings that say what a row is, as text."""
    # Other methods have schedules of their own.
    usual = SCHEDULE if method == "nft" else {}
    words = []
    for name, value in settings.items():
        if name not in ("eval_every", "watch") and value != usual.get(name):
            words.append(f"{name} {value}")
    return ", ".join(words)


# ---- What a row changes in nft.py, where no setting does -----------------------------------------
def positive_only_loss(x0_theta, x0_old, x_0, r, beta, distance=nft.adaptive_loss):
    """Eq. (5) without its negative branch: as nft.nft_loss."""
    x0_positive = (1 - beta) * x0_old + beta * x0_theta
    return r * distance(x0_positive, x_0) / beta


def positive_only():
    """Parts for a loss without the negative branch."""
    return {"losses": functools.partial(nft.pair_losses, loss=positive_only_loss)}


def constant_weight(t):
    """w(t) = 1."""
    return torch.ones_like(t)


def rising_weight(t):
    """w(t) = t."""
    return t


def falling_weight(t):
    """w(t) = 1 - t."""
    return 1 - t


def weighted_losses(model, D, index, t, eps, w):
    """nft.pair_losses of a flow with Eq. (5)'s w(t) ||v_theta - v||^2, not the adaptive weighting.

    w is scaled so that its mean over the sampler's times is that of t. This is the weight of the
    adaptive loss itself, so that the KL term counts alike in all rows.
    """
    _, sigma = model.noise_level(t, eps.ndim)
    _, sampled = model.noise_level(model.times)
    weight = w(sigma) * sampled.mean() / w(sampled).mean()

    def distance(x0_hat, x_0):
        # For a flow, v_hat - v is (x_0 - x0_hat) / t.
        error = (x0_hat - x_0) / sigma
        return (weight * error.square()).flatten(1).mean(1)

    loss = functools.partial(nft.nft_loss, distance=distance)
    return nft.pair_losses(model, D, index, t, eps, loss=loss)


def weighted(w):
    """Parts for the loss that is weighted by w(t)."""
    return {"losses": functools.partial(weighted_losses, w=w)}


def x0_weight(alpha, sigma):
    """How a loss of x_0, as the flow's, weighs errors of eps: one of eps moves x_0 by this much."""
    return sigma / alpha


def even_weight(alpha, sigma):
    """How an adaptive loss of eps itself weighs them."""
    return torch.ones_like(sigma)


def eps_weighted_losses(model, D, index, t, eps, weight, scaled):
    """nft.pair_losses of an eps-model whose pairs have another weight than a flow's.

    nft.py's is sigma / (alpha + sigma). scaled: so that the mean over the sampler's times stays.
    """
    loss, kl, deviation = nft.pair_losses(model, D, index, t, eps)

    def weights(t):
        alpha, sigma = model.noise_level(t)
        return sigma / (alpha + sigma), weight(alpha, sigma)

    flow, ours = weights(t)
    change = ours / flow
    if scaled:
        flow, ours = weights(model.times)
        change = change * flow.mean() / ours.mean()
    return loss * change, kl, deviation


def eps_weighted(weight, scaled=True):
    """Parts for eps_weighted_losses."""
    return {"losses": functools.partial(eps_weighted_losses, weight=weight, scaled=scaled)}


def skipping_losses(model, D, index, t, eps):
    """nft.pair_losses without the pairs of r = 1/2: images with just their prompt's mean reward.

    Their loss has no direction of its own. With them goes their pull to the old policy and to the
    base model; in the log they count as 0.
    """
    useful = (D["r"][index] != 0.5).nonzero().flatten()
    # Zeros that have a gradient (it is 0), for the case that no pair is useful.
    theta = model.lora.adapters["theta"][0]
    nothing = torch.zeros_like(D["r"][index]) + 0 * theta.sum()
    if len(useful) == 0:
        return nothing, nothing, nothing.detach()
    found = nft.pair_losses(model, D, index[useful], t[useful.cpu()], eps[useful])
    loss, kl, deviation = (nothing.index_put((useful,), x) for x in found)
    return loss, kl, deviation.detach()


def skipping():
    """Parts for a loss of the images alone that are better or worse than their prompt's mean."""
    return {"losses": skipping_losses}


class Reuse:
    """nft.collect that samples in iterations 1, k + 1, 2 k + 1 ... alone.

    The k - 1 iterations after each of these get its images once more.
    """

    def __init__(self, k):
        self.k = k
        self.kept = None

    def __call__(self, model, rewards, numbered, key, policy):
        """As nft.collect."""
        if key == ("probe",):
            # The trial image.
            return nft.collect(model, rewards, numbered, key, policy)
        _, iteration = key
        if (iteration - 1) % self.k == 0:
            self.kept = nft.collect(model, rewards, numbered, key, policy)
        # A copy: nft.train empties its D at the end of an iteration.
        return dict(self.kept)


class Literature:
    """nft.pair_losses at times, and with noise, that are drawn otherwise.

    shared: the images of a group have the same (t, eps), as V-GRPO's, arXiv 2604.23380.
    stratified: an image's times lie in equal parts of the sampler's, one in each.
    """

    def __init__(self, shared=False, stratified=False):
        self.shared = shared
        self.stratified = stratified
        self.iteration = 0
        self.D = None
        # So many pairs there were of each image of the iteration.
        self.seen = collections.Counter()

    def times(self, model, who):
        """The times of an image, or group, in this iteration."""
        g = nft.generator("times", model.config.seed, self.iteration, who)
        order = torch.rand(len(model.times), generator=g).argsort()
        if not self.stratified:
            return model.times[order]
        parts = torch.arange(len(model.times)).tensor_split(model.config.train_times)
        return model.times[torch.stack([part[order[0] % len(part)] for part in parts])]

    def __call__(self, model, D, index, t, eps):
        """As nft.pair_losses, in one process."""
        if D is not self.D:
            self.D = D
            self.iteration += 1
            self.seen.clear()
        times = []
        noise = []
        for image, own in zip(index.tolist(), eps, strict=True):
            slot = self.seen[image]
            self.seen[image] += 1
            who = image
            if self.shared:
                who = image // model.config.group_size
                g = nft.generator("noise", model.config.seed, self.iteration, who, slot)
                own = torch.randn(own.shape, generator=g).to(own)
            times.append(self.times(model, who)[slot])
            noise.append(own)
        return nft.pair_losses(model, D, index, torch.stack(times), torch.stack(noise))


def literature(**settings):
    """Parts for times and noise by Literature."""
    return {"losses": Literature(**settings)}


def hinged_losses(model, D, index, t, eps, weight):
    """nft.pair_losses with a penalty where the velocity is longer than the base model's.

    After NormGuard, arXiv 2606.27771: weight * max(0, ||v_theta|| / ||v_ref|| - 1)^2, with
    v = eps_hat - x0_hat. In the log `old_deviation` is the ratio of the norms. Needs --kl.
    """
    outs = {}
    predict = model.predict

    def hear(x_t, t, condition, policy):
        outs[policy] = x_t, predict(x_t, t, condition, policy)
        return outs[policy][1]

    model.predict = hear
    try:
        loss, kl, _ = nft.pair_losses(model, D, index, t, eps)
    finally:
        # The method shows again.
        del model.predict

    alpha, sigma = model.noise_level(t, eps.ndim)
    norms = {}
    for policy in ("theta", None):
        x_t, out = outs[policy]
        x0_hat, _ = nft.predict_x0(x_t, out, alpha, sigma, model.prediction)
        eps_hat = (x_t - alpha * x0_hat) / sigma
        norms[policy] = (eps_hat - x0_hat).flatten(1).norm(dim=1)
    ratio = norms["theta"] / norms[None]
    return loss + weight * (ratio - 1).relu().square(), kl, ratio.detach()


def hinged(weight):
    """Parts for a loss with hinged_losses's penalty."""
    return {"losses": functools.partial(hinged_losses, weight=weight)}


def by_rank(raw, groups, z):
    """r by an image's rank among those of its prompt: from 0, the worst, to 1, the best."""
    rewards = raw.view(len(groups.unique()), -1)
    below = (rewards[:, :, None] > rewards[:, None]).double().sum(2)
    # An image is its own equal.
    equal = (rewards[:, :, None] == rewards[:, None]).double().sum(2) - 1
    return ((below + equal / 2) / (rewards.shape[1] - 1)).flatten().float()


def ranked():
    """Parts for r by rank."""
    return {"weigh": by_rank}


def extreme_images(model, rewards, numbered, key, policy):
    """nft.collect of twice as many images: each prompt's worst and best, half and half, are kept.

    After Sol-RL, arXiv 2604.06916: many cheap candidates, of which the most different are trained.
    """
    D = nft.collect(model, rewards, numbered, key, policy)
    if key == ("probe",):
        # The trial image.
        return D
    more = [(i + len(numbered), *rest) for i, *rest in numbered]
    others = nft.collect(model, rewards, more, key, policy)
    K = model.config.group_size
    candidates = [x["scores"]["reward"].view(-1, K) for x in (D, others)]
    order = torch.cat(candidates, 1).argsort(dim=1, stable=True)
    chosen = torch.cat([order[:, : K // 2], order[:, K // 2 - K :]], 1)
    # Candidate j of a prompt is its image j of the first half, or j - K of the second.
    first = torch.arange(len(chosen))[:, None] * K
    index = (first + chosen % K + len(numbered) * (chosen >= K)).flatten()

    def choose(x, y):
        return torch.cat([x, y])[index.to(x.device)]

    kept = {}
    for name in ("x_0", "condition", "scores"):
        kept[name] = nft.map_tensors(choose, D[name], others[name])
    return D | kept


def extremes():
    """Parts for images that are chosen from twice as many."""
    return {"collect": extreme_images}


def half_resolution_images(model, rewards, numbered, key, policy):
    """nft.collect of pictures of half the height and width, which are enlarged to be scored."""
    if key == ("probe",):
        return nft.collect(model, rewards, numbered, key, policy)
    size = model.net.config.sample_size * model.pipe.vae_scale_factor
    enlarged = []
    for name, weight, function in rewards:

        def score(images, prompts, metadata, function=function):
            images = F.interpolate(images, (size, size), mode="bilinear")
            return function(images, prompts, metadata)

        enlarged.append(nft.Reward(name, weight, score))
    own = model.settings
    model.settings = own | {"height": size // 2, "width": size // 2}
    try:
        return nft.collect(model, enlarged, numbered, key, policy)
    finally:
        model.settings = own


def half_resolution():
    """Parts for rollouts at half the resolution."""
    return {"collect": half_resolution_images}


def guided_evaluate(run, rewards, prompts, iteration):
    """nft.evaluate, and `eval_reward/guidance S`: the held-out reward when sampled so.

    In one process.
    """
    fields = nft.evaluate(run, rewards, prompts, iteration)
    numbered = [(i, *prompt) for i, prompt in enumerate(prompts)]
    own = run.model.settings
    try:
        for scale in SCALES:
            run.model.settings = own | {"guidance_scale": scale}
            D = nft.collect(run.model, rewards, numbered, ("evaluation",), "ema")
            fields[f"eval_reward/guidance {scale}"] = D["scores"]["reward"].mean().item()
    finally:
        run.model.settings = own
    return fields


def guided():
    """Parts for evaluation at SCALES of guidance, too."""
    return {"evaluate": guided_evaluate}


# ---- The sweep: what each method's settings were chosen from -------------------------------------
@dataclasses.dataclass(frozen=True)
class Grid:
    """Learning rates times values of a method's own knob."""

    model: str
    rates: tuple
    knob: str
    values: tuple


GRIDS = {
    "nft": Grid("tiny", (1e-3, 2e-3, 4e-3), "beta", (1, 0.3)),
    "ddpo": Grid("tiny", (1e-3, 3e-3), "clip_range", (1e-3, 1e-2, 1e-1)),
    "loop": Grid("tiny", (1e-3, 3e-3), "clip_range", (1e-3, 1e-2, 1e-1)),
    "dpok": Grid("tiny", (1e-3, 3e-3), "clip_range", (1e-3, 1e-2, 1e-1)),
    "rwr": Grid("tiny", (1e-3, 2e-3, 4e-3), "temperature", (0.1, 0.3)),
    "rft": Grid("tiny", (1e-3, 2e-3, 4e-3), "kl", (0, 0.1)),
    "coca": Grid("tiny", (1e-3, 3e-3), "clip_range", (1e-3, 1e-2, 1e-1)),
    "rtb": Grid("tiny", (1e-3, 3e-3), "temperature", (1e-3, 1e-2, 1e-1)),
    "flowgrpo": Grid("tiny-sd3", (1.5e-3, 3e-3, 6e-3), "clip_range", (1e-3, 1e-2, 1e-1)),
    "nft-sd3": Grid("tiny-sd3", (1.5e-3, 3e-3, 6e-3), "beta", (1, 0.3)),
}
# Where the best of a grid lay at its edge, and FlowGRPO without its KL.
EDGES = [
    ("nft", {"lr": 2e-3, "beta": 0.1}),
    ("flowgrpo", {"lr": 3e-3, "clip_range": 1e-3, "kl": 0}),
    ("flowgrpo", {"lr": 3e-3, "clip_range": 1e-2, "kl": 0}),
    ("ddpo", {"lr": 6e-3, "clip_range": 1e-2}),
    ("loop", {"lr": 6e-3, "clip_range": 1e-2}),
    ("dpok", {"lr": 3e-3, "clip_range": 3e-4}),
    ("coca", {"lr": 6e-3, "clip_range": 1e-2}),
    ("rtb", {"lr": 5e-4, "temperature": 1e-3}),
    ("rtb", {"lr": 1e-3, "temperature": 1e-4}),
    ("nft-sd3", {"lr": 3e-3, "beta": 0.1}),
]
# Ten iterations flatter a learning rate that collapses later: these are run as long as in the
# comparison, which has one more of DDPO, LOOP and DPOK each; FlowGRPO for 60 iterations.
LONG = [
    ("flowgrpo", {"lr": 3e-3, "clip_range": 1e-3, "kl": 0}),
    ("flowgrpo", {"lr": 3e-3, "clip_range": 1e-3, "kl": 0.04}),
    ("flowgrpo", {"lr": 1.5e-3, "clip_range": 1e-3, "kl": 0.04}),
    ("flowgrpo", {"lr": 7.5e-4, "clip_range": 1e-3, "kl": 0.04}),
    ("ddpo", {"lr": 1.5e-3, "clip_range": 1e-2}),
    ("loop", {"lr": 3e-3, "clip_range": 1e-2}),
    ("loop", {"lr": 1.5e-3, "clip_range": 1e-3}),
    ("dpok", {"lr": 3e-3, "clip_range": 3e-4}),
]
# Rollouts of few steps for NFT, and for FlowGRPO training on a part of the steps, as its authors'
# faster variant has it.
FEW_NFT = {"warmup": 4, "beta": 0.3, "lr": 3e-3}
FEW_FLOWGRPO = {"warmup": 4, "clip_range": 1e-3, "train_times": 3}
FEW = [
    ("nft-sd3", FEW_NFT | {"steps": 5, "train_times": 3, "z": 5.0}),
    ("nft-sd3", FEW_NFT | {"steps": 5, "train_times": 3, "z": 1.5}),
    ("nft-sd3", FEW_NFT | {"steps": 5, "train_times": 5, "z": 1.5}),
    ("nft-sd3", FEW_NFT | {"steps": 3, "train_times": 3, "z": 1.5}),
    ("flowgrpo", FEW_FLOWGRPO | {"lr": 1.5e-3}),
    ("flowgrpo", FEW_FLOWGRPO | {"lr": 3e-3}),
    ("flowgrpo", FEW_FLOWGRPO | {"lr": 3e-3, "clip_range": 1e-2}),
    ("flowgrpo", FEW_FLOWGRPO | {"lr": 3e-3, "train_times": 5}),
    ("flowgrpo", FEW_FLOWGRPO | {"lr": 1.5e-3, "steps": 6}),
    ("flowgrpo", FEW_FLOWGRPO | {"lr": 7.5e-4, "steps": 6}),
]


def sweep_row(kind, key, iterations, eval_every, settings):
    """A row of the sweep: `kind` is "sweep", "long" or "few", `key` one of GRIDS."""
    model = GRIDS[key].model
    # The learning rate stands last.
    names = [name for name in settings if name != "lr"]
    words = [f"{name}{settings[name]:g}" for name in [*names, "lr"]]
    settings = settings | {"eval_every": eval_every}
    method = key.removesuffix("-sd3")
    name = "-".join([kind, key, *words])
    return Row(name, method, method, model, iterations, settings)


def sweep():
    """The rows of GRIDS and EDGES, ten iterations each, of LONG, and of FEW."""
    rows = []
    for key, grid in GRIDS.items():
        for value in grid.values:
            for lr in grid.rates:
                rows.append(sweep_row("sweep", key, 10, 5, {"lr": lr, grid.knob: value}))
    for key, settings in EDGES:
        rows.append(sweep_row("sweep", key, 10, 5, settings))
    for key, settings in LONG:
        if key == "flowgrpo":
            rows.append(sweep_row("long", key, 60, 4, settings))
        else:
            rows.append(sweep_row("long", key, 24, 2, settings))
    for key, settings in FEW:
        iterations = 60 if key == "flowgrpo" else 20
        rows.append(sweep_row("few", key, iterations, 4, settings))
    return rows


# ---- The other figures ---------------------------------------------------------------------------
# What the sweep chose. Of the ten-iteration rows: the best held-out accuracy at the end, and where
# several lie within 0.02 of it, the best training reward. Of LONG: the best accuracy on the way.
TUNED = {
    "nft": {"lr": 2e-3, "beta": 0.3},
    "ddpo": {"lr": 3e-3, "clip_range": 1e-2},
    "loop": {"lr": 3e-3, "clip_range": 1e-3},
    "dpok": {"lr": 1.5e-3, "clip_range": 3e-4},
    "rwr": {"lr": 2e-3, "temperature": 0.1},
    "rft": {"lr": 2e-3, "kl": 0},
    "coca": {"lr": 3e-3, "clip_range": 1e-2},
    "rtb": {"lr": 1e-3, "temperature": 1e-3},
    "flowgrpo": {"lr": 7.5e-4, "clip_range": 1e-3},
    "nft-sd3": {"lr": 3e-3, "beta": 0.3},
}
LABELS = {
    "nft": "NFT",
    "ddpo": "DDPO",
    "loop": "LOOP",
    "dpok": "DPOK",
    "rwr": "RWR",
    "rft": "RFT",
    "coca": "CoCA",
    "rtb": "RTB",
}
# The ablations' own settings: a learning rate at which not everything works for a while.
ABLATED = {
    "tiny": {"lr": 2e-3, "beta": 1.0, "eval_every": 3},
    "tiny-sd3": {"lr": 3e-3, "beta": 1.0, "eval_every": 4},
}
ABLATED_ITERATIONS = {"tiny": 12, "tiny-sd3": 16}


def compared(method):
    """A row of the comparison on tiny."""
    settings = TUNED[method] | {"eval_every": 2}
    return Row(f"tiny-{method}", LABELS[method], method, "tiny", 24, settings)


def compared_few(method, **settings):
    """A row of the comparison on tiny with few steps; all share these, the warm-up and the EMA."""
    shared = {"steps": 5, "warmup": 4, "ema": 0.8, "eval_every": 2}
    label = f"{LABELS[method]}, 5 steps"
    settings = TUNED[method] | shared | settings
    return Row(f"few-tiny-{method}", label, method, "tiny", 12, settings)


def third(name, iterations, **settings):
    """The default run, `python nft.py`, with some flags, on the way to it or beside it."""
    return preset("tiny", f"third-{name}", iterations, **settings)


def ablated(name="default", model="tiny", label="", change=None, reuse=1, **settings):
    """A row of an ablation; without arguments the one that all others of its model change."""
    return Row(
        name=f"{name}-{model}",
        label=label or describe(settings) or name,
        method="nft",
        model=model,
        iterations=ABLATED_ITERATIONS[model],
        settings=ABLATED[model] | settings,
        change=change,
        reuse=reuse,
    )


def signal_row(name="default", change=None, reuse=1, **settings):
    """A row on what an image is worth; without arguments the one that all others change."""
    label = describe(settings) or name
    if change is not None:
        label = name.replace("-", " ")
    return Row(
        name=f"signal-{name}",
        label=label,
        method="nft",
        model="tiny",
        iterations=12,
        settings=TUNED["nft"] | {"eval_every": 2} | settings,
        change=change,
        reuse=reuse,
    )


def epsilon_row(name, label, change=None, **settings):
    """The default run, twice as long, with one thing changed."""
    settings = {"eval_every": 11, "watch": "brightness,saturation"} | settings
    return Row(f"epsilon-{name}", label, "nft", "tiny", 22, settings, change, pinned=False)


# The flow code's loss: of x_0, word for word, with its KL and without warm-up.
FLOW_LOSS = functools.partial(eps_weighted, x0_weight, scaled=False)
FLOW_SETTINGS = {"kl": 1e-4, "warmup": 0}
# A learned reward; the exact one is watched.
EXACT = nft.PRESETS["tiny"]["reward"]
LEARNED = {"reward": "learned", "watch": f"{EXACT},brightness,saturation"}


def order_of_work(name, label, iterations, **settings):
    """A row on tiny-sd3; all share learning rate and beta."""
    settings = TUNED["nft-sd3"] | {"eval_every": 2} | settings
    return Row(f"order-{name}", f"NFT, {label}", "nft", "tiny-sd3", iterations, settings)


# The released script's order of work, by nft.py.
RELEASED = order_of_work("released", "released order", 24, train_times=9, warmup=0, kl=2e-5)
FIVE_STEPS = order_of_work("5-steps", "5 steps", 32, steps=5)


def flowgrpo(name, label, iterations, **settings):
    """A row on tiny-sd3, longer than NFT's."""
    settings = TUNED["flowgrpo"] | {"eval_every": 6} | settings
    return Row(f"tiny-sd3-{name}", label, "flowgrpo", "tiny-sd3", iterations, settings)


def preset(model, name="preset", iterations=None, change=None, **settings):
    """A row that is `python nft.py --model MODEL`, with some settings."""
    command = f"python nft.py --model {model}"
    if model == "tiny":
        command = "python nft.py"
    if iterations:
        command += f" --iterations {iterations}"
    for key, value in settings.items():
        command += f" {nft.FLAGS[key]} {value}"
    return Row(
        name=f"{name}-{model}",
        label=command,
        method="nft",
        model=model,
        iterations=iterations or nft.PRESETS[model]["iterations"],
        settings=settings,
        change=change,
        pinned=False,
    )


# The default run before rollouts were coarser than evaluation, and r was spread more.
BEFORE = {"batch_size": 64, "train_times": 3, "z": 5.0, "warmup": 10, "ema": 0.9}


FIGURES = {
    "default": [preset("tiny"), preset("tiny-sd3")],
    "third": [
        third("before", 24, **BEFORE, steps=10),
        third("5-steps", 16, **BEFORE),
        third("2-levels", 12, batch_size=64),
        third("z-2", 12, batch_size=64, z=2.0),
        third("updates-6", 12, batch_size=64, updates=6),
        third("4-steps", 12, batch_size=64, steps=4),
        third("lr-3e-3", 12, batch_size=64, lr=3e-3),
        third("1-level", 16, batch_size=64, train_times=1),
        third("kl-0", 12, batch_size=64, kl=0.0),
        preset("tiny"),
        preset("tiny-sd3", "third-5-steps", steps=5, eval_steps=10),
        preset("tiny-sd3", "third-8-updates", updates=8, train_times=3),
        preset("tiny-sd3", "third-8-groups", groups=8),
        preset("tiny-sd3"),
    ],
    "tiny": [
        compared(method) for method in ("nft", "ddpo", "dpok", "loop", "coca", "rtb", "rwr", "rft")
    ],
    "few-tiny": [
        compared_few("nft", train_times=2, z=1.5),
        compared_few("rwr", train_times=2),
        compared_few("rft", train_times=2),
        # They train all steps of their rollouts.
        compared_few("ddpo"),
        compared_few("dpok"),
        compared_few("loop"),
    ],
    "tiny-sd3": [RELEASED, flowgrpo("flowgrpo", "FlowGRPO", 192)],
    "few": [
        FIVE_STEPS,
        flowgrpo("few", "FlowGRPO, 3 of 6 steps", 60, **FEW_FLOWGRPO, steps=6),
    ],
    "negative": [
        ablated(),
        ablated("positive", label="without it", change=positive_only),
        ablated(model="tiny-sd3"),
        ablated("positive", "tiny-sd3", label="without it", change=positive_only),
    ],
    "solvers": [
        ablated(),
        ablated("solver-ddim", solver="ddim"),
        ablated("solver-dpm2-sde", solver="dpm2-sde"),
    ],
    "eta": [
        ablated(),
        ablated("eta-0", eta="0"),
        ablated("eta-0.9", eta="0.9"),
        ablated("eta-slow", eta="4,0.1,0.999"),
    ],
    "weighting": [
        ablated(model="tiny-sd3"),
        ablated("w=1", "tiny-sd3", change=functools.partial(weighted, constant_weight)),
        ablated("w=t", "tiny-sd3", change=functools.partial(weighted, rising_weight)),
        ablated("w=1-t", "tiny-sd3", change=functools.partial(weighted, falling_weight)),
    ],
    "beta": [
        ablated(),
        ablated("beta-0.1", beta=0.1),
        ablated("beta-0.3", beta=0.3),
        ablated("beta-3", beta=3),
    ],
    "off-policy": [ablated(), ablated("reused-4", reuse=4)],
    "signal": [
        signal_row(),
        signal_row("skip", change=skipping),
        signal_row("times-1", train_times=1),
        signal_row("updates-2", updates=2),
        signal_row("updates-8", updates=8),
        signal_row("groups-8", groups=8, group_size=24),
        signal_row("groups-32", groups=32, group_size=6),
    ],
    "released": [
        RELEASED,
        FIVE_STEPS,
        order_of_work("5-steps-1-time", "1 level", 32, steps=5, train_times=1, warmup=3),
        order_of_work("z-1.5", "wide r", 24, steps=5, train_times=9, warmup=4, kl=0, z=1.5),
    ],
    "literature": [
        signal_row(),
        signal_row("shared", functools.partial(literature, shared=True)),
        signal_row("stratified", functools.partial(literature, stratified=True)),
        signal_row("rank", ranked),
        # As wide a spread of r, without ranks.
        signal_row("z-1.5", z=1.5),
        signal_row("extremes", extremes, reuse=1 / 2, steps=3),
        signal_row("half-resolution", half_resolution),
        # A weight of 0 measures the ratio of the norms, and changes nothing.
        signal_row("norm-hinge-0", functools.partial(hinged, 0.0)),
        signal_row("norm-hinge-10", functools.partial(hinged, 10.0)),
    ],
    "epsilon": [
        epsilon_row("default", "default: weight σ/(α+σ), KL 0.1"),
        epsilon_row("released", "the flow code's loss", FLOW_LOSS, **FLOW_SETTINGS),
        epsilon_row(
            "eps", "weight 1: ε normalised by itself", functools.partial(eps_weighted, even_weight)
        ),
        epsilon_row("kl-0", "KL 0", kl=0),
        epsilon_row("kl-0.3", "KL 0.3", kl=0.3),
        epsilon_row("no-warmup", "no warm-up", warmup=0),
        epsilon_row("large-step", "learning rate 0.01", lr=1e-2),
    ],
    "learned": [
        epsilon_row("learned", "default", **LEARNED),
        epsilon_row("learned-released", "the flow code's", FLOW_LOSS, **FLOW_SETTINGS, **LEARNED),
    ],
    "long": [
        preset("tiny", "long", 100, eval_every=10),
        preset("tiny-sd3", "long", 80, eval_every=20),
    ],
    "guidance": [
        preset("tiny", "guidance-1", change=guided, guidance=1),
        preset("tiny", "guidance-2", change=guided, guidance=2),
    ],
    "precision": [
        signal_row(),
        signal_row("bf16", precision="bf16"),
        signal_row("fp16", precision="fp16"),
    ],
    "sweep": sweep(),
}
# Those of --quick.
QUICK = ("default", "tiny", "negative")
TITLES = {
    "default": "The default runs",
    "third": "On the way to the default runs, and beside it",
    "sweep": "Sweep",
    "tiny": "Comparison on tiny, which predicts eps",
    "few-tiny": "Comparison on tiny, few steps",
    "tiny-sd3": "Comparison on tiny-sd3, a flow",
    "few": "Comparison on tiny-sd3, few steps",
    "negative": "Negative branch: default, or without it",
    "solvers": "Figure 7, solver of the rollouts: default dpm2",
    "eta": "Figure 8, eta: default 0,0.001,0.5",
    "weighting": "Figure 9, weighting: default adaptive",
    "beta": "Figure 10, beta: default 1",
    "off-policy": "Images trained on k times: default once",
    "released": "The released order of work, and coarser rollouts, on tiny-sd3",
    "literature": "From the literature: default as above",
    "epsilon": "What keeps eps-prediction healthy",
    "learned": "The same with a learned reward",
    "long": "Long runs",
    "guidance": "Sampled with guidance 1, 2 and 3",
    "precision": "Precision of the base: default fp32",
    "signal": "What an image is worth: default 16 groups of 12, 3 times, 4 updates, beta 0.3",
}
