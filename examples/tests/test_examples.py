"""The shipped shapes, the example scripts, the README: each test's docstring states a law.

    python -m pytest -q examples/test_examples.py
SPDX-License-Identifier: MIT
"""
import dataclasses
import pathlib
import random
import re
import sys

import numpy as np
import pytest
import torch

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import epsilon_study  # noqa: E402
import nft  # noqa: E402
import shapes  # noqa: E402


@pytest.mark.parametrize("category", shapes.CATEGORIES)
def test_checker(category):
    """It accepts 99% of clean renders and VAE round trips, and refuses 99% with a wrong caption."""
    from diffusers import AutoencoderKL
    rng = random.Random(0)
    texts = [rng.choice(shapes.captions(split)[category]) for split in ("train", "heldout") * 150]
    images, wrong = shapes.render(texts, seed=5), [shapes.wrong_caption(t, rng) for t in texts]
    vae = AutoencoderKL.from_pretrained(HERE / "tiny-sd15/vae", torch_dtype=torch.float32)
    with torch.no_grad():
        again = vae.decode(vae.encode(images * 2 - 1).latent_dist.mean).sample / 2 + 0.5
    for pictures in (images, again.clamp(0, 1)):
        assert np.mean(shapes.check(pictures, texts)) >= 0.99
        assert np.mean(shapes.check(pictures, wrong)) <= 0.01


def test_held_out_captions_are_never_trained_on():
    """No caption is in both splits or both prompt files, nor with the two of an "and" swapped."""
    seen = {}
    for split in ("train", "heldout"):
        lines = (HERE / f"shapes_{split}.txt").read_text().splitlines()
        for text in sum(shapes.captions(split).values(), lines):
            kind, things, relation = shapes.parse(text)
            same = kind, frozenset(things) if kind == "two" else things, relation
            assert seen.setdefault(same, split) == split


@pytest.mark.parametrize("row", ["default", "released", "x_0", "eps", "kl-x_0"])
def test_epsilon_study_changes_one_thing(row, monkeypatch):
    """A row's loss and KL at a noise level are the default's, times a factor of that noise level alone."""
    weight, on_x0, highest = epsilon_study.ROWS[row][2:]
    model = nft.Model(nft.parse(["--model", "tiny", "--device", "cpu", "--out", "x"] +
                                ["--kl", "1e-4"] * (row == "released")))
    torch.manual_seed(0)
    for x in model.lora.sets["theta"]:
        x.data += 0.01 * torch.randn_like(x)
    rollout = model.sample(["a red circle"] * 10, [(i,) for i in range(10)], "old")
    args = model, rollout, torch.arange(10), model.times, torch.randn(10, 4, 8, 8), torch.full((10,), 0.7)
    with torch.no_grad():
        before = nft.pair_losses(*args)
        with epsilon_study.patched(weight, on_x0, highest):
            after = nft.pair_losses(*args)
    alpha, sigma = model.alpha_sigma(model.times)
    factor = {"x_0": (alpha + sigma) / alpha, "eps": (alpha + sigma) / sigma}.get(weight, sigma / sigma)
    kl_factor = (sigma / alpha) ** 2 if on_x0 else sigma / sigma
    for i, expected in enumerate((factor, kl_factor, sigma / sigma)):
        found = after[i] / before[i]
        torch.testing.assert_close(found / found[0], expected / expected[0], rtol=1e-3, atol=0)
    if row in ("default", "released"):
        torch.testing.assert_close(after[0], before[0] * factor)


def test_readme_flags():
    """The README's table of flags names every field of Config with its default, and none else."""
    table, show = r"^\| `--([\w-]+)` \|.*?\| `([^`]*)` \|", {"": '""', "False": "off"}
    rows = re.findall(table, (HERE.parent / "README.md").read_text(), re.M)
    fields = ((f.name.replace("_", "-"), str(f.default)) for f in dataclasses.fields(nft.Config))
    assert sorted(rows) == sorted((name, show.get(default, default)) for name, default in fields)
