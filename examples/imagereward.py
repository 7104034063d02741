"""ImageReward-v1.0 as a reward: about -2 to 2, of mean 0 and standard deviation 1 over its own data.

    python nft.py --model sd3 --reward examples/imagereward.py:reward

Xu et al., "ImageReward", arXiv 2304.05977: BLIP, whose text encoder looks at the image by cross-attention, with
five linear layers on its first token. The weights are the released ones, 1.8 GB in fp32 (zai-org/ImageReward,
formerly THUDM, ImageReward.pt); here they go into transformers' BlipVisionModel and BlipTextModel, so that
neither the image-reward package nor its old transformers is needed. As there, a picture's shorter side is
resized to 224 pixels and its middle cut out, and a prompt is cut at 35 tokens. On equal random weights the scores
are those of image-reward 1.5's own classes, to 1e-5.
SPDX-License-Identifier: MIT
"""
import functools
import math
import pathlib
import re
import sys

import numpy as np
import torch
import torch.nn.functional as F

sys.path[:0] = map(str, pathlib.Path(__file__).resolve().parents[:2])
import nft
from named_rewards import fetching

REPOSITORY, FILE = "zai-org/ImageReward", "ImageReward.pt"
TOKENIZER = "google-bert/bert-base-uncased"
MEAN, STD = 0.16717362830052426, 1.0333394966054072     # of the raw scores, as in the released code
TOKENS = 35                                             # longest prompt
HEAD = 64                                               # width of an attention head, in both encoders
PIXEL_MEAN, PIXEL_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
RENAME = {                                              # BLIP's names of its vision encoder -> transformers'
    r"^cls_token$": "embeddings.class_embedding", r"^pos_embed$": "embeddings.position_embedding",
    r"^patch_embed\.proj\.": "embeddings.patch_embedding.", r"^norm\.": "post_layernorm.",
    r"^blocks\.": "encoder.layers.", r"\.norm([12])\.": r".layer_norm\1.", r"\.attn\.qkv\.": ".self_attn.qkv.",
    r"\.attn\.proj\.": ".self_attn.projection."}


def below(weights, prefix):
    """The part of a state dict whose names start with `prefix`, without it."""
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix) and "position_ids" not in k}


def depth(weights):
    """Number of layers in an encoder's state dict."""
    return len({match[0] for name in weights if (match := re.match(r"encoder\.layers?\.\d+\.", name))})


def vision_encoder(weights):
    """BlipVisionModel with the weights of BLIP's ViT; sizes are read off them."""
    from transformers import BlipVisionConfig, BlipVisionModel
    for old, new in RENAME.items():
        weights = {re.sub(old, new, name): x for name, x in weights.items()}
    _, positions, width = weights["embeddings.position_embedding"].shape        # the first is no patch
    patch = weights["embeddings.patch_embedding.weight"].shape[2]
    model = BlipVisionModel(BlipVisionConfig(
        hidden_size=width, intermediate_size=len(weights["encoder.layers.0.mlp.fc1.bias"]), patch_size=patch,
        image_size=math.isqrt(positions - 1) * patch, num_hidden_layers=depth(weights),
        num_attention_heads=width // HEAD, layer_norm_eps=1e-6))
    model.load_state_dict(weights)
    return model


def text_encoder(weights, vision_width):
    """BlipTextModel with the weights of BLIP's BERT, whose names are the same."""
    from transformers import BlipTextConfig, BlipTextModel
    vocabulary, width = weights["embeddings.word_embeddings.weight"].shape
    model = BlipTextModel(BlipTextConfig(               # is_decoder: has cross-attention; reward masks nothing
        vocab_size=vocabulary, hidden_size=width, encoder_hidden_size=vision_width, num_hidden_layers=depth(weights),
        intermediate_size=len(weights["encoder.layer.0.intermediate.dense.bias"]), num_attention_heads=width // HEAD,
        max_position_embeddings=len(weights["embeddings.position_embeddings.weight"]), layer_norm_eps=1e-12,
        is_decoder=True), add_pooling_layer=False)
    model.load_state_dict(weights)
    return model


@functools.cache
def load(device):
    """The two encoders and the head [(weight, bias), ...] in fp32, and the tokenizer."""
    from transformers import AutoTokenizer
    from transformers.utils import cached_file
    with fetching(TOKENIZER):
        tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    with fetching(REPOSITORY):
        weights = torch.load(cached_file(REPOSITORY, FILE), "cpu", weights_only=True)
        vision = vision_encoder(below(weights, "blip.visual_encoder."))
        text = text_encoder(below(weights, "blip.text_encoder."), vision.config.hidden_size)
        head = [[weights[f"mlp.layers.{i}.{part}"].float().to(device) for part in ("weight", "bias")]
                for i in (0, 2, 4, 6, 7)]
    return vision.eval().to(device), text.eval().to(device), head, tokenizer


def preprocess(image, size):
    """(3, H, W) in [0, 1] -> (3, size, size), normalised: the shorter side resized, the middle cut out."""
    from PIL import Image
    image = nft.to_pil(image)
    w, h = (int(n * size / min(image.size)) for n in image.size)
    left, top = round((w - size) / 2), round((h - size) / 2)    # torchvision's; transformers' rounds down
    image = image.resize((w, h), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    return torch.tensor((np.asarray(image) / 255 - PIXEL_MEAN) / PIXEL_STD, dtype=torch.float32).permute(2, 0, 1)


@torch.no_grad()
def reward(images, prompts, metadata):
    """ImageReward: (B, 3, H, W) in [0, 1] and B strings -> (B,)."""
    vision, text, head, tokenizer = load(images.device)
    pixels = torch.stack([preprocess(x, vision.config.image_size) for x in images]).to(images.device)
    tokens = tokenizer(list(prompts), padding=True, truncation=True, max_length=TOKENS, return_tensors="pt")
    tokens, seen = tokens.to(images.device), vision(pixels).last_hidden_state   # (B, patches + 1, width)
    x = text(tokens["input_ids"], tokens["attention_mask"], encoder_hidden_states=seen).last_hidden_state[:, 0]
    for weight, bias in head:                           # no activation between: it was trained so
        x = F.linear(x, weight, bias)
    return (x[:, 0] - MEAN) / STD
