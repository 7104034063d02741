"""ImageReward-v1.0 as a reward: what people would say of an image, for its prompt.

    python nft.py --model sd3 --reward imagereward

Xu et al., "ImageReward", arXiv 2304.05977: BLIP, whose text encoder looks at the image by
cross-attention, with five linear layers on its first token. The weights are the released ones,
1.8 GB in fp32 (zai-org/ImageReward, formerly THUDM, ImageReward.pt). Here they go into
transformers' BlipVisionModel and BlipTextModel, so that neither the image-reward package nor its
old transformers is needed. As there, a picture's shorter side is resized to 224 pixels and its
middle cut out. Where an odd number of columns or rows is left over, the cut may lie a pixel beside
theirs.
SPDX-License-Identifier: MIT
"""

import re

import torch
from nft_clip import warn_cut
from torch import nn

import nft

REPOSITORY = "zai-org/ImageReward"
FILE = "ImageReward.pt"
TOKENIZER = "google-bert/bert-base-uncased"
# Of the raw scores, as in the released code.
MEAN = 0.16717362830052426
STD = 1.0333394966054072
# The longest prompt.
TOKENS = 35
# The sizes of BLIP's ViT-L/16 and of its BERT.
VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 16,
    "layer_norm_eps": 1e-6,
}
TEXT = {
    "vocab_size": 30524,
    "hidden_size": 768,
    "encoder_hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
    "layer_norm_eps": 1e-12,
    # A decoder has cross-attention; the first call does not mask what comes later.
    "is_decoder": True,
}
# BLIP's names of its vision encoder -> transformers'; those of the text encoder are the same.
RENAME = {
    r"^cls_token$": "embeddings.class_embedding",
    r"^pos_embed$": "embeddings.position_embedding",
    r"^patch_embed\.proj\.": "embeddings.patch_embedding.",
    r"^norm\.": "post_layernorm.",
    r"^blocks\.": "encoder.layers.",
    r"\.norm([12])\.": r".layer_norm\1.",
    r"\.attn\.qkv\.": ".self_attn.qkv.",
    r"\.attn\.proj\.": ".self_attn.projection.",
}


def below(weights, prefix):
    """The part of a state dict whose names start with `prefix`, without it."""
    part = {}
    for name, x in weights.items():
        # transformers does not keep the numbers of positions.
        if name.startswith(prefix) and "position_ids" not in name:
            part[name.removeprefix(prefix)] = x
    return part


def rename(weights):
    """The state dict of BLIP's vision encoder -> that of transformers'."""
    for old, new in RENAME.items():
        weights = {re.sub(old, new, name): x for name, x in weights.items()}
    return weights


class ImageReward(nn.Module):
    """BLIP and its head, in fp32, from the released weights."""

    def __init__(self):
        import transformers

        super().__init__()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(TOKENIZER)
        # What it does by default is CLIP's preprocessing for 224 pixels.
        self.processor = transformers.CLIPImageProcessorPil()
        self.vision = transformers.BlipVisionModel(transformers.BlipVisionConfig(**VISION))
        config = transformers.BlipTextConfig(**TEXT)
        self.text = transformers.BlipTextModel(config, add_pooling_layer=False)
        # Without activations between its layers, as it was trained.
        self.head = nn.Sequential(
            nn.Linear(config.hidden_size, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )
        file = transformers.utils.cached_file(REPOSITORY, FILE)
        weights = torch.load(file, map_location="cpu", weights_only=True)
        self.vision.load_state_dict(rename(below(weights, "blip.visual_encoder.")))
        self.text.load_state_dict(below(weights, "blip.text_encoder."))
        self.head.load_state_dict(below(weights, "mlp.layers."))
        self.eval()

    def forward(self, images, prompts, metadata):
        """(B, 3, H, W) in [0, 1] and B strings, cut at 35 tokens -> (B,)."""
        self.to(images.device)
        pictures = [nft.to_pil(image) for image in images]
        pixels = self.processor(pictures, return_tensors="pt").pixel_values
        tokens = self.tokenizer(
            prompts, padding=True, truncation=True, max_length=TOKENS, return_tensors="pt"
        ).to(images.device)
        # (B, patches + 1, width)
        seen = self.vision(pixels.to(images.device)).last_hidden_state
        read = self.text(tokens.input_ids, tokens.attention_mask, encoder_hidden_states=seen)
        raw = self.head(read.last_hidden_state[:, 0])[:, 0]
        return (raw - MEAN) / STD

    def check(self, prompts, metadata):
        """Warn of prompts that are cut."""
        warn_cut(REPOSITORY, self.tokenizer, TOKENS, prompts)


def reward():
    """Make ImageReward: about -2 to 2, of mean 0 and standard deviation 1 over its own data."""
    return ImageReward()
