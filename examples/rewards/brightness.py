"""How bright a picture is, whatever it shows: to watch, not to train on.

    python nft.py --reward aesthetic --watch brightness,saturation

A reward may rise because pictures brighten. Then `eval_reward/brightness` in metrics.jsonl rises,
too.
SPDX-License-Identifier: MIT
"""


def reward(images, prompts, metadata):
    """Mean of each image's pixels: 0 is black, 1 is white. images: (B, 3, H, W) in [0, 1]."""
    return images.mean((1, 2, 3))
