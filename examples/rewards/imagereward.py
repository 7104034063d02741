"""ImageReward-v1.0 as a reward: what people would say of an image, for its prompt.

    python nft.py --model sd3 --reward imagereward

Xu et al., "ImageReward", arXiv 2304.05977: BLIP, whose text encoder looks at the image by
cross-attention, with five linear layers on its first token. The weights are the released ones,
1.8 GB in fp32 (zai-org/ImageReward, formerly THUDM, ImageReward.pt). Here they go into
transformers' BlipVisionModel and BlipTextModel, so that neither the image-reward package nor its
old transformers is needed. As there, a picture's shorter side is resized to 224 pixels and its
middle cut out, and a prompt is cut at 35 tokens. On equal random weights the scores are those of
image-reward 1.5's own classes, to 1e-5.
SPDX-License-Identifier: MIT
"""

import math
import re
import sys
from pathlib import Path

import numpy as np
import torch
from clip import load, make_tokenizer, tells_cuts
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import nft

REPOSITORY = "zai-org/ImageReward"
FILE = "ImageReward.pt"
TOKENIZER = "google-bert/bert-base-uncased"
# Of the raw scores, as in the released code.
MEAN = 0.16717362830052426
STD = 1.0333394966054072
# The longest prompt.
TOKENS = 35
# Width of an attention head, in both encoders.
HEAD = 64
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
# BLIP's names of its vision encoder -> transformers'.
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


# ---- The model -----------------------------------------------------------------------------------
def below(weights, prefix):
    """The part of a state dict whose names start with `prefix`, without it."""
    part = {}
    for name, x in weights.items():
        # transformers does not keep the numbers of positions.
        if name.startswith(prefix) and "position_ids" not in name:
            part[name.removeprefix(prefix)] = x
    return part


def depth(weights):
    """The number of layers in an encoder's state dict."""
    found = set()
    for name in weights:
        found.update(re.findall(r"^encoder\.layers?\.(\d+)\.", name))
    return len(found)


def vision_encoder(weights):
    """BlipVisionModel with the weights of BLIP's ViT; sizes are read off them."""
    from transformers import BlipVisionConfig, BlipVisionModel

    for old, new in RENAME.items():
        weights = {re.sub(old, new, name): x for name, x in weights.items()}
    # The first position is no patch.
    _, positions, width = weights["embeddings.position_embedding"].shape
    patch = weights["embeddings.patch_embedding.weight"].shape[2]
    config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(weights["encoder.layers.0.mlp.fc1.bias"]),
        patch_size=patch,
        image_size=math.isqrt(positions - 1) * patch,
        num_hidden_layers=depth(weights),
        num_attention_heads=width // HEAD,
        layer_norm_eps=1e-6,
    )
    model = BlipVisionModel(config)
    model.load_state_dict(weights)
    return model


def text_encoder(weights, vision_width):
    """BlipTextModel with the weights of BLIP's BERT, whose names are the same."""
    from transformers import BlipTextConfig, BlipTextModel

    vocabulary, width = weights["embeddings.word_embeddings.weight"].shape
    config = BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=vision_width,
        num_hidden_layers=depth(weights),
        intermediate_size=len(weights["encoder.layer.0.intermediate.dense.bias"]),
        num_attention_heads=width // HEAD,
        max_position_embeddings=len(weights["embeddings.position_embeddings.weight"]),
        layer_norm_eps=1e-12,
        # A decoder has cross-attention; the first call does not mask what comes later.
        is_decoder=True,
    )
    model = BlipTextModel(config, add_pooling_layer=False)
    model.load_state_dict(weights)
    return model


def linear_layers(weights):
    """The head: linear layers without activations between them, as it was trained."""
    layers = []
    for i in (0, 2, 4, 6, 7):
        weight = weights[f"layers.{i}.weight"]
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": weights[f"layers.{i}.bias"]})
        layers.append(layer)
    return nn.Sequential(*layers)


class ImageReward(nn.Module):
    """Pixels (B, 3, size, size) and B tokenized prompts -> (B,), from the released state dict."""

    def __init__(self, weights):
        super().__init__()
        self.vision = vision_encoder(below(weights, "blip.visual_encoder."))
        width = self.vision.config.hidden_size
        self.text = text_encoder(below(weights, "blip.text_encoder."), width)
        self.head = linear_layers(below(weights, "mlp."))

    def forward(self, pixels, tokens):
        # (B, patches + 1, width)
        seen = self.vision(pixels).last_hidden_state
        read = self.text(
            tokens["input_ids"],
            tokens["attention_mask"],
            encoder_hidden_states=seen,
        )
        raw = self.head(read.last_hidden_state[:, 0])[:, 0]
        return (raw - MEAN) / STD


def make_imagereward(repository):
    """ImageReward with its released weights, in fp32."""
    from transformers.utils import cached_file

    file = cached_file(repository, FILE)
    weights = torch.load(file, map_location="cpu", weights_only=True)
    return ImageReward(weights)


# ---- The reward ----------------------------------------------------------------------------------
def preprocess(image, size):
    """(3, H, W) in [0, 1] -> (3, size, size), normalised.

    The shorter side is resized, and the middle cut out.
    """
    from PIL import Image

    picture = nft.to_pil(image)
    shorter = min(picture.size)
    w, h = (int(side * size / shorter) for side in picture.size)
    # Rounded as in torchvision; transformers rounds down.
    left = round((w - size) / 2)
    top = round((h - size) / 2)
    picture = picture.resize((w, h), Image.Resampling.BICUBIC)
    picture = picture.crop((left, top, left + size, top + size))
    pixels = (np.asarray(picture) / 255 - PIXEL_MEAN) / PIXEL_STD
    return torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1)


@torch.no_grad()
def reward(images, prompts, metadata):
    """ImageReward, about -2 to 2, of mean 0 and standard deviation 1 over its own data.

    images: (B, 3, H, W) in [0, 1]. prompts: B strings, cut at 35 tokens. Returns (B,).
    """
    tokenizer = load(make_tokenizer, TOKENIZER)
    model = load(make_imagereward, REPOSITORY, images.device)
    size = model.vision.config.image_size
    pixels = torch.stack([preprocess(image, size) for image in images])
    tokens = tokenizer(
        list(prompts),
        padding=True,
        truncation=True,
        max_length=TOKENS,
        return_tensors="pt",
    )
    return model(pixels.to(images.device), tokens.to(images.device))


reward.check = tells_cuts("imagereward", TOKENIZER, TOKENS)
