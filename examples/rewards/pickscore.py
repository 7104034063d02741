"""PickScore v1 as a reward: which of two images people would choose, for a prompt.

    python nft.py --model sd3 --reward pickscore
    python nft.py --model sd3 --reward pickscore,clip,hpsv2      # the paper's multi-reward

Kirstain et al., "Pick-a-Pic", arXiv 2305.01569: a CLIP ViT-H/14 fine-tuned on people's choices. It
fetches 3.9 GB from the hub when it is first called.
SPDX-License-Identifier: MIT
"""

import torch
from clip import Clip, tells_cuts

REPOSITORY = "yuvalkirstain/PickScore_v1"
PREPROCESSING = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


@torch.no_grad()
def reward(images, prompts, metadata):
    """PickScore over 26, as in the paper, about 0.7 to 0.9.

    images: (B, 3, H, W) in [0, 1]. prompts: B strings. Returns (B,).
    """
    clip = Clip(REPOSITORY, images.device, PREPROCESSING)
    cosine = (clip.images(images) * clip.texts(prompts)).sum(1)
    return clip.model.logit_scale.exp() / 26 * cosine


reward.check = tells_cuts("pickscore", PREPROCESSING)
