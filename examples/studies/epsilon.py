"""What might keep DiffusionNFT healthy on an eps-prediction model: weighting, times, KL, warm-up.

CHANGES are rows of figures.py (--figures epsilon,learned). Each changes one thing of the default
run.
SPDX-License-Identifier: MIT
"""

import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))
import nft


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


# ---- Changes -------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Change:
    """One change of the default run."""

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


CHANGES = {
    "default": Change("weight σ/(α+σ), KL 0.1, sampler's times"),
    "released": Change(
        "the flow code's loss: x_0 weight σ/α, KL 1e-4, no warm-up",
        {"kl": 1e-4, "warmup": 0},
        x0_weight,
        scaled=False,
    ),
    "x_0": Change("x_0-adaptive weight σ/α", weight=x0_weight),
    "eps": Change("ε self-normalised, weight 1", weight=eps_weight),
    "capped": Change("weight min(σ/α, 1)", weight=capped_weight),
    "low-noise": Change("sampler's times with σ/α ≤ 5", highest=5.0),
    "kl-0": Change("KL 0", {"kl": 0}),
    "kl-0.3": Change("KL 0.3", {"kl": 0.3}),
    "kl-x_0": Change("KL 0.1 measured on x_0", kl_weight=squared_x0_weight),
    "no-warmup": Change("no warm-up", {"warmup": 0}),
}


def noise_level(model, t):
    """alpha and sigma (b,) at times t (b,), in float64."""
    alpha, sigma = model.noise_level(t)
    return alpha.double(), sigma.double()


def reweighted(model, D, index, t, eps, change):
    """nft.pair_losses with the change's weights."""
    loss, kl, deviation = nft.pair_losses(model, D, index, t, eps)
    here = noise_level(model, t)
    sampled = noise_level(model, model.times)
    factor = change.weight(*here) / flow_weight(*here)
    if change.scaled:
        factor = factor * flow_weight(*sampled).mean() / change.weight(*sampled).mean()
    loss = loss * factor.float()
    if change.kl_weight is not None:
        kl = kl * (change.kl_weight(*here) / change.kl_weight(*sampled).mean()).float()
    return loss, kl, deviation


class LowNoise(nft.Model):
    """A model that is trained only at times with sigma / alpha up to `highest`."""

    def __init__(self, config, highest):
        super().__init__(config)
        alpha, sigma = noise_level(self, self.times)
        self.times = self.times[(sigma / alpha <= highest).cpu()]


def parts(change):
    """A change as parts of nft.train."""
    return {
        "make_model": functools.partial(LowNoise, highest=change.highest),
        "losses": functools.partial(reweighted, change=change),
    }
