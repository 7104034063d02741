"""PickScore v1 as a reward: which of two images people would choose, for a prompt.

    python nft.py --model sd3 --reward pickscore
    python nft.py --model sd3 --reward pickscore,clip,hpsv2      # the paper's multi-reward

Kirstain et al., "Pick-a-Pic", arXiv 2305.01569: a CLIP ViT-H/14 fine-tuned on people's choices. It
fetches 3.9 GB from the hub.
SPDX-License-Identifier: MIT
"""

from nft_clip import Clip

REPOSITORY = "yuvalkirstain/PickScore_v1"
PREPROCESSING = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class PickScore(Clip):
    """The cosine of image and prompt, scaled as it was trained: over 26, as in the paper."""

    def forward(self, images, prompts, metadata):
        """(B, 3, H, W) in [0, 1] and B strings -> (B,)."""
        cosine = super().forward(images, prompts, metadata)
        return self.model.logit_scale.exp() / 26 * cosine


def reward():
    """Make PickScore over 26, about 0.7 to 0.9."""
    return PickScore(REPOSITORY, PREPROCESSING)
