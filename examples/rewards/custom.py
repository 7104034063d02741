"""A reward of your own: copy this file, and change what is measured.

    python nft.py --reward examples/rewards/custom.py:reward
    python nft.py --reward examples/tiny/shapes.py:reward=1,custom=0.5

nft.py calls it for a batch of images, and adds up what several rewards give, by their weights. It
runs without gradient, so any measure will do: numpy, PIL, a model of yours, a person. A function
without arguments may load a model and return such a function, as in ocr.py beside this file. Where
something is wrong, raise an exception: the run stops and shows it.
SPDX-License-Identifier: MIT
"""

import torch


def reward(images, prompts, metadata):
    """How colourful each image is, over 100: 0 is grey, and above 1 is garish.

    Hasler and Suesstrunk, "Measuring colourfulness in natural images", 2003.

    images: (B, 3, H, W), floats in [0, 1], on the run's device. prompts: B strings. metadata: B
    dicts, the other keys of a .jsonl prompt; here `colourful` (default 1) turns the wish around,
    with -1 for "a grey sea". Returns B numbers of any unit and range: a tensor, an array or a list.
    """
    images = 255 * images
    # Each (B, H, W)
    red, green, blue = images.unbind(1)
    # Opponent colours, as the eye has them.
    yellow = (red + green) / 2
    opponent = torch.stack([red - green, yellow - blue], 1)
    # (B, 2, H * W)
    opponent = opponent.flatten(2)
    spread = opponent.std(2, correction=0)
    shift = opponent.mean(2)
    score = spread.norm(dim=1) + 0.3 * shift.norm(dim=1)
    wishes = [float(row.get("colourful", 1)) for row in metadata]
    sign = score.new_tensor(wishes)
    return sign * score / 100
