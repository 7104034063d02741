"""HPSv2.1 as a reward: how far people would prefer an image, for its prompt.

    python nft.py --model sd3 --reward hpsv2
    python nft.py --model sd3 --reward pickscore,clip,hpsv2      # the paper's multi-reward

Wu et al., "Human Preference Score v2", arXiv 2306.09341: a CLIP ViT-H/14 fine-tuned on 800k
choices. The weights are open_clip's, 3.9 GB in fp32 (xswu/HPSv2, HPS_v2.1_compressed.pt). Here they
go into transformers' CLIPModel, so that neither open_clip nor the hpsv2 package is needed. Pictures
are prepared as hpsv2 1.2.0 does: the longer side becomes 224 pixels, bicubic and antialiased
(torchvision's default since 0.17), with black bars beside the shorter one. Two things differ: the
package runs in half precision on a GPU, and it repairs text by ftfy and html.unescape first, so
that it reads a curly quote as a straight one. Otherwise, on equal random weights, the scores are
those of its own code, to 1e-5.
SPDX-License-Identifier: MIT
"""

import math
import re

import torch
import torch.nn.functional as F
from clip import load, make_tokenizer, tells_cuts

REPOSITORY = "xswu/HPSv2"
FILE = "HPS_v2.1_compressed.pt"
# Open_clip's byte-pair encoding, in transformers' form.
TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
# Width of an attention head in ViT-H/14.
HEADS = {"vision_model": 80, "text_model": 64}
# Of CLIP's pixels.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
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


# ---- The weights ---------------------------------------------------------------------------------
def rename(name):
    """Open_clip's name of a weight -> transformers'."""
    for old, new in RENAME.items():
        name = re.sub(old, new, name)
    return name


def translate(weights):
    """The state dict of open_clip's CLIP -> that of transformers' CLIPModel."""
    translated = {}
    for old, x in weights.items():
        name = rename(old)
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


def encoder_settings(weights, encoder):
    """The sizes of one of the two encoders, read off a translated state dict."""
    layers = f"{encoder}.encoder.layers."
    numbers = {name.split(".")[3] for name in weights if name.startswith(layers)}
    width = len(weights[layers + "0.mlp.fc2.bias"])
    return {
        "hidden_size": width,
        "num_attention_heads": width // HEADS[encoder],
        "hidden_act": "gelu",
        "intermediate_size": len(weights[layers + "0.mlp.fc1.bias"]),
        "num_hidden_layers": len(numbers),
    }


def configure(weights):
    """The CLIPConfig that a translated state dict was made with: sizes are read off the weights."""
    from transformers import CLIPConfig

    words = len(weights["text_model.embeddings.token_embedding.weight"])
    longest = len(weights["text_model.embeddings.position_embedding.weight"])
    # A text's embedding is that of its last token.
    text = {
        "vocab_size": words,
        "max_position_embeddings": longest,
        "bos_token_id": words - 2,
        "eos_token_id": words - 1,
    }
    # The first position is no patch.
    patches = len(weights["vision_model.embeddings.position_embedding.weight"]) - 1
    # Pixels, one side.
    patch = weights["vision_model.embeddings.patch_embedding.weight"].shape[2]
    vision = {"patch_size": patch, "image_size": math.isqrt(patches) * patch}
    return CLIPConfig(
        projection_dim=len(weights["text_projection.weight"]),
        text_config=encoder_settings(weights, "text_model") | text,
        vision_config=encoder_settings(weights, "vision_model") | vision,
    )


def make_hpsv2(repository):
    """The CLIPModel of HPSv2.1, in fp32."""
    from transformers import CLIPModel
    from transformers.utils import cached_file

    file = cached_file(repository, FILE)
    released = torch.load(file, map_location="cpu", weights_only=True)
    weights = translate(released["state_dict"])
    model = CLIPModel(configure(weights))
    model.load_state_dict(weights)
    return model


# ---- The reward ----------------------------------------------------------------------------------
def preprocess(images, size):
    """(B, 3, H, W) in [0, 1] -> (B, 3, size, size), normalised.

    The longer side is resized, and what is left beside the shorter one is black.
    """
    # As a saved picture.
    images = (images.float() * 255).round() / 255
    longer = max(images.shape[2:])
    h, w = (round(side * size / longer) for side in images.shape[2:])
    images = F.interpolate(images, (h, w), mode="bicubic", antialias=True)
    top = (size - h) // 2
    left = (size - w) // 2
    images = F.pad(images, (left, size - w - left, top, size - h - top))
    mean = images.new_tensor(MEAN).view(3, 1, 1)
    std = images.new_tensor(STD).view(3, 1, 1)
    return (images - mean) / std


@torch.no_grad()
def reward(images, prompts, metadata):
    """HPSv2.1, the cosine of image and text, about 0.2 to 0.35.

    images: (B, 3, H, W) in [0, 1]. prompts: B strings, cut at 77 tokens. Returns (B,).
    """
    tokenizer = load(make_tokenizer, TOKENIZER)
    model = load(make_hpsv2, REPOSITORY, images.device)
    tokens = tokenizer(
        list(prompts),
        padding=True,
        truncation=True,
        max_length=model.config.text_config.max_position_embeddings,
        return_tensors="pt",
    )
    text = model.get_text_features(**tokens.to(images.device)).pooler_output
    pixels = preprocess(images, model.config.vision_config.image_size)
    image = model.get_image_features(pixels).pooler_output
    return F.cosine_similarity(image, text)


reward.check = tells_cuts("hpsv2", TOKENIZER)
