"""The rewards that nft.py knows by name: --reward aesthetic, clip, pickscore, jpeg, incompressible.

    python nft.py --model sd15 --reward aesthetic
    python nft.py --model sd15 --reward "pickscore,clip=0.5" --watch aesthetic

The first three fetch CLIP models from the hub (aesthetic 1.7 GB, clip the same, pickscore 3.9 GB) when they are first
called, and score in fp32 on the images' own device. `Clip` and `fetching` serve the other examples, too.
SPDX-License-Identifier: MIT
"""
import contextlib
import functools
import io
import pathlib
import sys

import torch
import torch.nn.functional as F

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import nft


@contextlib.contextmanager
def fetching(repository):
    """Any failure to load from `repository` of the hub becomes one line with the way round it."""
    try:
        yield
    except Exception as e:
        nft.refuse(f"{repository} did not load ({e!r:.120}); offline, gated (`hf auth login`), disk full? a copy in "
                   f"./{repository} is taken first: hf download REPO --local-dir REPO")


class Clip:
    """CLIP of a hub repository in fp32, with the preprocessing of one: embeddings of length 1."""
    def __init__(self, repository, device, preprocessing=None, reads=True):
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel
        with fetching(repository):
            self.model = CLIPModel.from_pretrained(repository, dtype=torch.float32)
        with fetching(source := preprocessing or repository):
            self.tokens = AutoTokenizer.from_pretrained(source) if reads else None
            self.pixels = AutoImageProcessor.from_pretrained(source, backend="pil")
        self.model.to(device)

    def images(self, images):
        """(B, 3, H, W) in [0, 1] -> (B, d)."""
        given = self.pixels([nft.to_pil(x) for x in images], return_tensors="pt")
        x = self.model.get_image_features(**given.to(self.model.device))
        return F.normalize(x.pooler_output, dim=-1)

    def texts(self, texts):
        """B strings, cut at the tokenizer's limit of 77 tokens -> (B, d)."""
        given = self.tokens(texts, padding=True, truncation=True, return_tensors="pt")
        x = self.model.get_text_features(**given.to(self.model.device))
        return F.normalize(x.pooler_output, dim=-1)


load = functools.cache(Clip)                # once for all rewards of a run


@functools.cache
def aesthetic_head(device):
    """{"layers.0.weight": ..., ...}."""
    from transformers.utils import cached_file
    with fetching(repository := "trl-lib/ddpo-aesthetic-predictor"):
        return torch.load(cached_file(repository, "aesthetic-model.pth"), device, weights_only=True)


def aesthetic(images, prompts, metadata):
    """LAION aesthetics V2, about 1 to 10: five linear layers on CLIP ViT-L/14's image embedding."""
    x = load("openai/clip-vit-large-patch14", images.device, reads=False).images(images)
    head = aesthetic_head(images.device)
    for i in (0, 2, 4, 6, 7):                           # no activation between: it was trained so
        x = F.linear(x, head[f"layers.{i}.weight"], head[f"layers.{i}.bias"])
    return x[:, 0]


def clip(images, prompts, metadata):
    """CLIPScore as a cosine, about 0.1 to 0.4: image against prompt by CLIP ViT-L/14."""
    model = load("openai/clip-vit-large-patch14", images.device)
    return (model.images(images) * model.texts(prompts)).sum(1)


def pickscore(images, prompts, metadata):
    """PickScore v1 over 26, as in the paper, about 0.7 to 0.9: people's choice between images."""
    model = load("yuvalkirstain/PickScore_v1", images.device, "laion/CLIP-ViT-H-14-laion2B-s32B-b79K")
    return model.model.logit_scale.exp() / 26 * (model.images(images) * model.texts(prompts)).sum(1)


def kilobytes(image):
    """Of a (3, H, W) image as JPEG of quality 95."""
    nft.to_pil(image).save(buffer := io.BytesIO(), "JPEG", quality=95)
    return len(buffer.getvalue()) / 1000


def jpeg(images, prompts, metadata):
    """Minus the kilobytes of each image as JPEG of quality 95: DDPO's compressibility."""
    return [-kilobytes(image) for image in images]


def incompressible(images, prompts, metadata):
    """The kilobytes themselves."""
    return [kilobytes(image) for image in images]
