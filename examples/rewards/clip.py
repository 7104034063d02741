"""CLIPScore as a reward: how well an image fits its prompt.

    python nft.py --model sd15 --reward clip
    python nft.py --model sd15 --reward aesthetic,clip=2,pickscore=0

Hessel et al., "CLIPScore", arXiv 2104.08718. It fetches CLIP ViT-L/14 from the hub (1.7 GB) and
scores in fp32 on the images' own device.
SPDX-License-Identifier: MIT
"""

from nft_clip import Clip


def reward():
    """Make CLIPScore: the cosine of image and prompt by CLIP ViT-L/14, about 0.1 to 0.4."""
    return Clip("openai/clip-vit-large-patch14")
