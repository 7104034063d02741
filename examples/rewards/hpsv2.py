"""HPSv2.1 as a reward: how far people would prefer an image, for its prompt.

    python nft.py --model sd3 --reward hpsv2
    python nft.py --model sd3 --reward pickscore,clip,hpsv2      # the paper's multi-reward

Wu et al., "Human Preference Score v2", arXiv 2306.09341: a CLIP ViT-H/14 fine-tuned on 800k
choices. The weights are open_clip's, 3.9 GB in fp32 (xswu/HPSv2, HPS_v2.1_compressed.pt). Here they
go into transformers' CLIPModel, so that neither open_clip nor the hpsv2 package is needed. Two
things differ: the package runs in half precision on a GPU, and it repairs text by ftfy and
html.unescape first, so that it reads a curly quote as a straight one.
SPDX-License-Identifier: MIT
"""

import re

import torch
import torch.nn.functional as F
from nft_clip import Clip

REPOSITORY = "xswu/HPSv2"
FILE = "HPS_v2.1_compressed.pt"
# The sizes of the network, and open_clip's tokenizer, in transformers' form.
LAION = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
# Open_clip's names -> transformers', one after the other.
RENAME = {
    r"^visual\.proj$": "visual_projection.weight",
    r"^text_projection$": "text_projection.weight",
    r"^visual\.": "vision_model.",
    r"^(?=transformer|token_|positional_|ln_final)": "text_model.",
    r"\.transformer\.resblocks\.": ".encoder.layers.",
    r"\.attn\.": ".self_attn.",
    r"\.c_fc\.": ".fc1.",
    r"\.c_proj\.": ".fc2.",
    r"\.ln_([12])\.": r".layer_norm\1.",
    r"\.ln_pre\.": ".pre_layrnorm.",
    r"\.ln_post\.": ".post_layernorm.",
    r"\.ln_final\.": ".final_layer_norm.",
    r"\.conv1\.": ".embeddings.patch_embedding.",
    r"\.(class|token)_embedding": r".embeddings.\1_embedding",
    r"\.positional_embedding$": ".embeddings.position_embedding.weight",
}


def translate(weights):
    """The state dict of open_clip's CLIP -> that of transformers' CLIPModel."""
    translated = {}
    for name, x in weights.items():
        for old, new in RENAME.items():
            name = re.sub(old, new, name)
        if ".in_proj_" in name:
            # Queries, keys and values are one matrix in open_clip.
            for part, rows in zip("qkv", x.chunk(3), strict=True):
                translated[name.replace("in_proj_", f"{part}_proj.")] = rows
        elif name.endswith("_projection.weight"):
            # Open_clip multiplies x W, transformers x W^T.
            translated[name] = x.T
        else:
            translated[name] = x
    return translated


class HPSv2(Clip):
    """The cosine of image and prompt by the released weights."""

    def load(self, repository, source):
        """The CLIPModel of HPSv2.1, in fp32."""
        from transformers import CLIPConfig, CLIPModel
        from transformers.utils import cached_file

        file = cached_file(repository, FILE)
        released = torch.load(file, map_location="cpu", weights_only=True)
        model = CLIPModel(CLIPConfig.from_pretrained(source))
        model.load_state_dict(translate(released["state_dict"]))
        return model.eval()

    def preprocess(self, images):
        """(B, 3, H, W) in [0, 1] -> (B, 3, size, size), normalised, as hpsv2 1.2.0 does it.

        The longer side is resized, and what is left beside the shorter one is black.
        """
        size = self.model.config.vision_config.image_size
        # As a saved picture.
        images = (images.float() * 255).round() / 255
        longer = max(images.shape[2:])
        h, w = (round(side * size / longer) for side in images.shape[2:])
        images = F.interpolate(images, (h, w), mode="bicubic", antialias=True)
        top = (size - h) // 2
        left = (size - w) // 2
        images = F.pad(images, (left, size - w - left, top, size - h - top))
        mean = images.new_tensor(self.processor.image_mean).view(3, 1, 1)
        std = images.new_tensor(self.processor.image_std).view(3, 1, 1)
        return (images - mean) / std


def reward():
    """Make HPSv2.1: the cosine of image and prompt, about 0.2 to 0.35."""
    return HPSv2(REPOSITORY, LAION)
