"""What the scorers of this room share: CLIP's embeddings, and the warning that prompts are cut.

It is no reward itself, and its name is one that no package has: `clip` may be installed.
SPDX-License-Identifier: MIT
"""

import warnings

import torch
import torch.nn.functional as F
from torch import nn

import nft

# The longest text that a CLIP reads.
TOKENS = 77


def warn_cut(name, tokenizer, limit, prompts):
    """Warn where prompts have more tokens than a scorer reads: it does not see what follows."""
    lengths = [len(tokens) for tokens in tokenizer(list(prompts), verbose=False).input_ids]
    cut = sum(length > limit for length in lengths)
    if cut:
        warnings.warn(
            f"{name}: {cut} of {len(prompts)} prompts are cut at {limit} tokens", stacklevel=2
        )


class Clip(nn.Module):
    """CLIP of a hub repository in fp32. Called as a reward it gives the cosine of image and prompt.

    preprocessing: the repository of the tokenizer and the image processor, if it is another.
    """

    def __init__(self, repository, preprocessing=None):
        from transformers import AutoTokenizer, CLIPImageProcessorPil

        super().__init__()
        source = preprocessing or repository
        self.repository = repository
        self.model = self.load(repository, source)
        self.tokenizer = AutoTokenizer.from_pretrained(source)
        self.processor = CLIPImageProcessorPil.from_pretrained(source)

    def load(self, repository, source):
        """The CLIPModel."""
        from transformers import CLIPModel

        return CLIPModel.from_pretrained(repository, dtype=torch.float32)

    def preprocess(self, images):
        """(3, H, W) in [0, 1] each -> (B, 3, size, size), normalised."""
        pictures = [nft.to_pil(image) for image in images]
        return self.processor(pictures, return_tensors="pt").pixel_values

    def images(self, images):
        """(3, H, W) in [0, 1] each -> embeddings of length 1, (B, d)."""
        pixels = self.preprocess(images).to(self.model.device)
        return F.normalize(self.model.get_image_features(pixels).pooler_output, dim=-1)

    def texts(self, texts):
        """B strings, cut at 77 tokens -> embeddings of length 1, (B, d)."""
        tokens = self.tokenizer(
            texts, padding=True, truncation=True, max_length=TOKENS, return_tensors="pt"
        ).to(self.model.device)
        return F.normalize(self.model.get_text_features(**tokens).pooler_output, dim=-1)

    def forward(self, images, prompts, metadata):
        """The cosine of each image (B, 3, H, W) and its prompt: (B,)."""
        self.to(images.device)
        return (self.images(images) * self.texts(prompts)).sum(1)

    def check(self, prompts, metadata):
        """Warn of prompts that are cut."""
        warn_cut(self.repository, self.tokenizer, TOKENS, prompts)
