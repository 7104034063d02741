"""epsilon.py: what its changes are.

    python -m pytest examples/tests/test_epsilon.py

Each test's docstring states a law.
SPDX-License-Identifier: MIT
"""

import functools

import common
import epsilon
import pytest
import torch
from torch.testing import assert_close

import nft

# At noise level (alpha, sigma): a change's loss over the default's, up to a factor for all levels.
LOSS_FACTORS = {
    "x_0": lambda alpha, sigma: (alpha + sigma) / alpha,
    "eps": lambda alpha, sigma: (alpha + sigma) / sigma,
    "capped": lambda alpha, sigma: (alpha + sigma) / torch.maximum(alpha, sigma),
    "released": lambda alpha, sigma: (alpha + sigma) / alpha,
}
KL_FACTORS = {"kl-x_0": lambda alpha, sigma: (sigma / alpha) ** 2}


@functools.cache
def losses_of(name):
    """A change's three losses, nft.py's own, alpha and sigma, at the ten times of its sampler."""
    change = epsilon.CHANGES[name]
    parts = epsilon.parts(change)
    config = nft.configure(model="tiny", device="cpu", out="x", **change.settings)
    model = parts["make_model"](config)
    torch.manual_seed(0)
    for x in model.lora.adapters["theta"]:
        x.data += 0.01 * torch.randn_like(x)
    n = len(model.times)
    D = model.sample([common.TEXTS[0]] * n, [(i,) for i in range(n)], "old")
    D["r"] = torch.full((n,), 0.7)
    eps = torch.randn(D["x_0"].shape)
    pairs = model, D, torch.arange(n), model.times, eps
    with torch.no_grad():
        found = parts["losses"](*pairs)
        plain = nft.pair_losses(*pairs)
    return found, plain, model.noise_level(model.times)


@pytest.mark.parametrize("name", ["default", "low-noise", "kl-x_0", *LOSS_FACTORS])
def test_a_change_is_one_thing(name):
    """Loss and KL at a noise level are nft.py's own, times a factor of that level alone."""
    found, plain, level = losses_of(name)
    loss_factor = torch.ones_like(level[0])
    kl_factor = torch.ones_like(level[0])
    if name in LOSS_FACTORS:
        loss_factor = LOSS_FACTORS[name](*level)
    if name in KL_FACTORS:
        kl_factor = KL_FACTORS[name](*level)
    if name != "released":
        # The default's mean weight stays.
        alpha, sigma = level
        default = sigma / (alpha + sigma)
        loss_factor = loss_factor * default.mean() / (default * loss_factor).mean()
        kl_factor = kl_factor / kl_factor.mean()
    assert_close(found[0], plain[0] * loss_factor, rtol=1e-4, atol=0)
    assert_close(found[1], plain[1] * kl_factor, rtol=1e-4, atol=0)
    assert_close(found[2], plain[2], rtol=0, atol=0)


def test_low_noise_is_trained_at_low_noise_alone():
    """It trains at exactly the sampler's times with sigma / alpha up to 5; others at all."""
    _, _, (alpha, sigma) = losses_of("default")
    _, _, (low_alpha, low_sigma) = losses_of("low-noise")
    low = sigma / alpha <= 5
    assert 0 < low.sum() < len(low) == 10
    assert_close(low_sigma / low_alpha, (sigma / alpha)[low])
