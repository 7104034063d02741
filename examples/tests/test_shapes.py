"""The shapes of the tiny presets: the checker is exact, and the held-out captions are new.

    python -m pytest examples/tests/test_shapes.py

SPDX-License-Identifier: MIT
"""

import random

import common
import pytest
import shapes
import torch
from diffusers import AutoencoderKL

TINY = common.EXAMPLES / "tiny"


@torch.no_grad()
def round_trip(images):
    """Images through the tiny pipeline's VAE and back."""
    vae = AutoencoderKL.from_pretrained(TINY / "sd15/vae", torch_dtype=torch.float32)
    latents = vae.encode(images * 2 - 1).latent_dist.mean
    decoded = vae.decode(latents).sample
    return (decoded / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("category", shapes.CATEGORIES)
def test_checker(category):
    """It accepts 99% of clean renders and VAE round trips, and refuses 99% with a wrong caption."""
    rng = random.Random(0)
    pools = [shapes.captions(split)[category] for split in ("train", "heldout")]
    right = [rng.choice(pools[i % 2]) for i in range(120)]
    wrong = [shapes.wrong_caption(caption, rng) for caption in right]
    images = shapes.render(right, seed=5)
    for pictures in (images, round_trip(images)):
        assert sum(shapes.check(pictures, right)) >= 119
        assert sum(shapes.check(pictures, wrong)) <= 1


def test_reward():
    """It is 1 for just what the caption says; objects too many, speckle and smears make it 0."""
    caption = "a red circle"
    clean, several, other = shapes.render([caption, "two red circles", "a blue circle"], seed=0)
    speckled = clean.clone()
    speckled[:, 0, ::2] = 0
    blank = torch.ones(3, 32, 32)
    smear = blank.clone()
    smear[1:, 12:18, 8:24] = 0.1
    noise = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    images = torch.stack([clean, several, other, speckled, blank, smear, noise])
    assert shapes.reward(images, [caption] * 7, [{}] * 7) == [1.0] + 6 * [0.0]


def mean_place(image, channel):
    """Mean (x, y) of the pixels of an image (3, H, W) that are mostly of one channel."""
    others = image.sum(0) - image[channel]
    y, x = (2 * image[channel] > others + 0.5).nonzero().unbind(1)
    return x.float().mean(), y.float().mean()


def test_places():
    """Left of, right of, above and below are where people see them, and exclude each other."""
    captions = [f"a red circle {place} a blue square" for place in shapes.RELATIONS]
    images = shapes.render(captions, seed=0)
    left, right, above, below = images
    assert mean_place(left, 0)[0] < mean_place(left, 2)[0]
    assert mean_place(right, 0)[0] > mean_place(right, 2)[0]
    assert mean_place(above, 0)[1] < mean_place(above, 2)[1]
    assert mean_place(below, 0)[1] > mean_place(below, 2)[1]
    opposite = [captions[1], captions[0], captions[3], captions[2]]
    assert shapes.check(images, captions) == [True, True, True, True]
    assert shapes.check(images, opposite) == [False, False, False, False]


@pytest.mark.parametrize("caption", ["a red", "a purple circle", "four red circles"])
def test_other_captions_are_refused(caption):
    """A caption that the grammar does not have is named, as nothing can be said of its pictures."""
    with pytest.raises(ValueError, match=f"'{caption}'"):
        shapes.reward(torch.ones(1, 3, 32, 32), [caption], [{}])


def compositions(split, file):
    """What all captions of a split ask for; the order of "a and b" means nothing."""
    texts = (TINY / file).read_text().splitlines()
    for group in shapes.captions(split).values():
        texts += group
    found = set()
    for caption in map(shapes.parse, texts):
        things = frozenset(caption.things) if caption.category == "two" else caption.things
        found.add((caption.category, things, caption.relation))
    return found


def test_held_out_captions_are_never_trained_on():
    """No composition is in both splits or both prompt files, nor with the two of "and" swapped."""
    train = compositions("train", "train.txt")
    held_out = compositions("heldout", "heldout.txt")
    assert len(train) > len(held_out) > 0
    assert train.isdisjoint(held_out)
