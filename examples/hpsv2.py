"""HPSv2.1 as a reward: how far people would prefer an image, for its prompt; a cosine, about 0.2 to 0.35.

    python nft.py --model sd3 --reward examples/hpsv2.py:reward
    python nft.py --model sd3 --reward pickscore,clip,examples/hpsv2.py:reward        # the paper's multi-reward

Wu et al., "Human Preference Score v2", arXiv 2306.09341: a CLIP ViT-H/14 fine-tuned on 800k choices. The
weights are open_clip's, 3.9 GB in fp32 (xswu/HPSv2, HPS_v2.1_compressed.pt); here they go into transformers'
CLIPModel, so that neither open_clip nor the hpsv2 package is needed. Pictures are prepared as hpsv2 1.2.0 does:
the longer side to 224 pixels, bicubic and antialiased (torchvision's default since 0.17), black bars beside the
shorter one. Two things differ: the package runs in half precision on a GPU, and it repairs text by ftfy and
html.unescape first, so that it reads a curly quote as a straight one. Otherwise, on equal random weights, the scores
are those of its own code, to 1e-5.
SPDX-License-Identifier: MIT
"""
import functools
import math
import pathlib
import re
import sys

import torch
import torch.nn.functional as F

sys.path[:0] = map(str, pathlib.Path(__file__).resolve().parents[:2])
import nft
from named_rewards import fetching

REPOSITORY, FILE = "xswu/HPSv2", "HPS_v2.1_compressed.pt"
TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"     # open_clip's byte-pair encoding, in transformers' form
HEADS = {"vision_model": 80, "text_model": 64}          # width of an attention head in ViT-H/14
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)       # of CLIP's pixels
RENAME = {                                              # open_clip's names -> transformers', one after the other
    r"^visual\.proj$": "visual_projection.weight", r"^text_projection$": "text_projection.weight",
    r"^visual\.": "vision_model.", r"^(?=transformer|token_|positional_|ln_final)": "text_model.",
    r"\.transformer\.resblocks\.": ".encoder.layers.", r"\.attn\.": ".self_attn.", r"\.c_fc\.": ".fc1.",
    r"\.c_proj\.": ".fc2.", r"\.ln_([12])\.": r".layer_norm\1.", r"\.ln_pre\.": ".pre_layrnorm.",
    r"\.ln_post\.": ".post_layernorm.", r"\.ln_final\.": ".final_layer_norm.",
    r"\.conv1\.": ".embeddings.patch_embedding.", r"\.(class|token)_embedding": r".embeddings.\1_embedding",
    r"\.positional_embedding$": ".embeddings.position_embedding.weight"}


def translate(weights):
    """The state dict of open_clip's CLIP -> that of transformers' CLIPModel."""
    translated = {}
    for name, x in weights.items():
        for old, new in RENAME.items():
            name = re.sub(old, new, name)
        if ".in_proj_" in name:                         # queries, keys and values are one matrix in open_clip
            translated |= {name.replace("in_proj_", f"{part}_proj."): y for part, y in zip("qkv", x.chunk(3))}
        else:                                           # open_clip multiplies x W, transformers x W^T
            translated[name] = x.T if name.endswith("_projection.weight") else x
    return translated


def configure(weights):
    """The CLIPConfig that a translated state dict was made with: sizes are read off the weights."""
    from transformers import CLIPConfig
    def part(model):
        layers = f"{model}.encoder.layers."
        width = len(weights[layers + "0.mlp.fc2.bias"])
        return {"hidden_size": width, "num_attention_heads": width // HEADS[model], "hidden_act": "gelu",
                "intermediate_size": len(weights[layers + "0.mlp.fc1.bias"]),
                "num_hidden_layers": len({name.split(".")[3] for name in weights if name.startswith(layers)})}
    words, longest = (len(weights[f"text_model.embeddings.{x}_embedding.weight"]) for x in ("token", "position"))
    patches = len(weights["vision_model.embeddings.position_embedding.weight"]) - 1     # the first is no patch
    patch = weights["vision_model.embeddings.patch_embedding.weight"].shape[2]          # pixels, one side
    return CLIPConfig(
        projection_dim=len(weights["text_projection.weight"]),
        text_config=part("text_model") | {
            "vocab_size": words, "max_position_embeddings": longest,
            "bos_token_id": words - 2, "eos_token_id": words - 1},          # a text's embedding is its end's
        vision_config=part("vision_model") | {"patch_size": patch, "image_size": math.isqrt(patches) * patch})


@functools.cache
def load(device):
    """CLIPModel in fp32 and its tokenizer."""
    from transformers import AutoTokenizer, CLIPModel
    from transformers.utils import cached_file
    with fetching(TOKENIZER):
        tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    with fetching(REPOSITORY):
        weights = translate(torch.load(cached_file(REPOSITORY, FILE), "cpu", weights_only=True)["state_dict"])
        model = CLIPModel(configure(weights))
        model.load_state_dict(weights)
    return model.eval().to(device), tokenizer


def preprocess(images, size):
    """(B, 3, H, W) in [0, 1] -> (B, 3, size, size), normalised: the longer side resized, the rest black."""
    images = (images.float() * 255).round() / 255       # as a saved picture
    h, w = (round(n * size / max(images.shape[2:])) for n in images.shape[2:])
    images = F.interpolate(images, (h, w), mode="bicubic", antialias=True)
    top, left = (size - h) // 2, (size - w) // 2
    images = F.pad(images, (left, size - w - left, top, size - h - top))
    mean, std = (images.new_tensor(x).view(3, 1, 1) for x in (MEAN, STD))
    return (images - mean) / std


@torch.no_grad()
def reward(images, prompts, metadata):
    """HPSv2.1: (B, 3, H, W) in [0, 1] and B strings, cut at 77 tokens -> (B,), the cosine of image and text."""
    model, tokenizer = load(images.device)
    config = model.config
    tokens = tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt",
                       max_length=config.text_config.max_position_embeddings).to(images.device)
    image = model.get_image_features(preprocess(images, config.vision_config.image_size)).pooler_output
    return F.cosine_similarity(image, model.get_text_features(**tokens).pooler_output)
