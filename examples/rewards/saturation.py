"""How strong a picture's colours are, whatever it shows: to watch, as brightness.py.

    python nft.py --reward aesthetic --watch brightness,saturation

SPDX-License-Identifier: MIT
"""


def reward(images, prompts, metadata):
    """Mean saturation of each image, as in HSV: 0 is grey, 1 is pure colour; black counts as 0.

    images: (B, 3, H, W) in [0, 1].
    """
    highest = images.amax(1)
    lowest = images.amin(1)
    return ((highest - lowest) / highest.clamp_min(1e-6)).mean((1, 2))
