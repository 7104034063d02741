"""CLIPScore as a reward, and how the rewards beside it load their models.

    python nft.py --model sd15 --reward clip
    python nft.py --model sd15 --reward aesthetic,clip=2 --watch pickscore

Hessel et al., "CLIPScore", arXiv 2104.08718. The reward fetches CLIP ViT-L/14 from the hub (1.7 GB)
when it is first called, and scores in fp32 on the images' own device.
SPDX-License-Identifier: MIT
"""

import functools
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import nft

CLIP = "openai/clip-vit-large-patch14"


# ---- Loading -------------------------------------------------------------------------------------
@functools.cache
def load(make, repository, device="cpu"):
    """make(repository), once a process for each maker, repository and device.

    make: a function that loads something from a repository of the hub. A model goes to `device`.
    Raises RuntimeError, one line that names the repository, where it fails.
    """
    try:
        made = make(repository)
    # The hub, the disk and the file's format each have errors of their own.
    except Exception as error:
        raise RuntimeError(
            f"{repository} did not load ({error!r:.90}): must be in reach; if it is gated "
            f"(`hf auth login`) or you are offline, put a copy into ./{repository}"
        ) from error
    if isinstance(made, torch.nn.Module):
        made = made.eval().to(device)
    return made


def make_clip(repository):
    """CLIP in fp32."""
    from transformers import CLIPModel

    return CLIPModel.from_pretrained(repository, dtype=torch.float32)


def make_tokenizer(repository):
    """The tokenizer of a repository."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(repository)


def make_image_processor(repository):
    """The image processor of a repository, in the form that needs no torchvision."""
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(repository, backend="pil")


# ---- CLIP ----------------------------------------------------------------------------------------
class Clip:
    """CLIP of a hub repository in fp32, with the preprocessing of one: embeddings of length 1.

    preprocessing: the repository of the tokenizer and the image processor, if it is another.
    Raises RuntimeError where something does not load.
    """

    def __init__(self, repository, device, preprocessing=None):
        source = preprocessing or repository
        self.device = device
        self.model = load(make_clip, repository, device)
        self.tokenizer = load(make_tokenizer, source)
        self.processor = load(make_image_processor, source)

    def images(self, images):
        """(B, 3, H, W) in [0, 1] -> (B, d)."""
        pictures = [nft.to_pil(image) for image in images]
        inputs = self.processor(pictures, return_tensors="pt").to(self.device)
        embeddings = self.model.get_image_features(**inputs).pooler_output
        return F.normalize(embeddings, dim=-1)

    def texts(self, texts):
        """B strings, cut at the tokenizer's limit of 77 tokens -> (B, d)."""
        inputs = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        embeddings = self.model.get_text_features(**inputs.to(self.device)).pooler_output
        return F.normalize(embeddings, dim=-1)


def tells_cuts(name, tokenizer, limit=77):
    """A reward's `check`: it says how many prompts have more tokens than the reward sees.

    tokenizer: its repository.
    """

    def check(prompts, metadata):
        nft.say_cut(f"the reward {name}", load(make_tokenizer, tokenizer), limit, prompts)

    return check


@torch.no_grad()
def reward(images, prompts, metadata):
    """CLIPScore as a cosine, about 0.1 to 0.4: image against prompt by CLIP ViT-L/14.

    images: (B, 3, H, W) in [0, 1]. prompts: B strings. Returns (B,).
    """
    clip = Clip(CLIP, images.device)
    return (clip.images(images) * clip.texts(prompts)).sum(1)


reward.check = tells_cuts("clip", CLIP)
