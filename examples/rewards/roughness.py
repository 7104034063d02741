"""What a picture looks like, whatever it shows: three numbers to watch, not to train on.

    python nft.py --reward aesthetic,roughness=0
    python nft.py --reward aesthetic,examples/rewards/roughness.py:saturation=0

A reward may rise because pictures speckle, blur, brighten or turn garish. Then one of these moves,
too. To read one, divide its `eval_reward/NAME` in metrics.jsonl by the base model's, in the row of
iteration 0: 1 is as before training. What a picture shows moves them as well, so look at it.

images: (B, 3, H, W) in [0, 1]. Each returns (B,).
SPDX-License-Identifier: MIT
"""

import torch.nn.functional as F


def reward(images, prompts, metadata):
    """Roughness: the mean absolute Laplacian. It rises with speckle, and falls with blur."""
    kernel = images.new_tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]]).expand(3, 1, 3, 3)
    return F.conv2d(images, kernel, groups=3).abs().mean((1, 2, 3))


def brightness(images, prompts, metadata):
    """Mean of the pixels: 0 is black, 1 is white."""
    return images.mean((1, 2, 3))


def saturation(images, prompts, metadata):
    """Mean saturation, as in HSV: 0 is grey, 1 is pure colour; black counts as 0."""
    highest = images.amax(1)
    lowest = images.amin(1)
    return ((highest - lowest) / highest.clamp_min(1e-6)).mean((1, 2))
