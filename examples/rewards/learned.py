"""A learned reward for the shapes, which can be fooled: what reward hacking looks like, in small.

    python nft.py --reward learned,examples/tiny/shapes.py:reward=0,roughness=0

A small network judges whether picture and caption match. It has seen clean renders alone, with
right and wrong captions, as a preference model has seen photographs. What it thinks of pictures
like no render is up to chance, and training by it goes looking for them. The exact reward of
shapes.py stands beside it with weight 0, and so does the roughness. It trains itself once, in some
ten minutes of one core, into runs/learned.pt. It needs no package beyond nft.py's own.
SPDX-License-Identifier: MIT
"""

import random
import sys
from pathlib import Path

import torch
from torch import nn

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "examples/tiny"))
import shapes

FILE = REPOSITORY / "runs/learned.pt"
# Words of the longest caption: "a red circle left of a blue cross".
LENGTH = 9


def grammar_words():
    """All words of all captions, sorted."""
    words = set()
    for split in ("train", "heldout"):
        for captions in shapes.captions(split).values():
            words.update(" ".join(captions).split())
    return sorted(words)


WORDS = grammar_words()


# ---- The network ---------------------------------------------------------------------------------
def block(inputs, outputs):
    """Two convolutions that halve the resolution."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, 2, 1),
        nn.GroupNorm(8, outputs),
        nn.SiLU(),
        nn.Conv2d(outputs, outputs, 3, 1, 1),
        nn.GroupNorm(8, outputs),
        nn.SiLU(),
    )


def one_hot(captions):
    """B captions -> (B, LENGTH * number of words): a one for the word at each place."""
    words = torch.zeros(len(captions), LENGTH, len(WORDS))
    for i, caption in enumerate(captions):
        for k, word in enumerate(caption.split()):
            words[i, k, WORDS.index(word)] = 1
    return words.flatten(1)


class Judge(nn.Module):
    """Pictures (B, 3, 32, 32) in [0, 1] and B captions -> B logits of "it shows that caption"."""

    def __init__(self):
        super().__init__()
        # (B, 128, 4, 4)
        self.see = nn.Sequential(block(3, 32), block(32, 64), block(64, 128))
        self.read = nn.Sequential(
            nn.Linear(LENGTH * len(WORDS), 256),
            nn.SiLU(),
            nn.Linear(256, 256),
        )
        self.judge = nn.Sequential(
            nn.Linear(128 * 16, 256),
            nn.SiLU(),
            nn.Linear(256, 128),
            nn.SiLU(),
            nn.Linear(128, 1),
        )

    def forward(self, images, captions):
        read = self.read(one_hot(captions).to(images.device))
        scale, shift = read[..., None, None].chunk(2, 1)
        seen = self.see(2 * images - 1) * (1 + scale) + shift
        return self.judge(nn.functional.silu(seen).flatten(1))[:, 0]


# ---- Its training --------------------------------------------------------------------------------
def batch(size, seed):
    """Clean renders of training captions, half of them with a wrong caption.

    Returns images (size, 3, 32, 32), captions and labels (size,), 1 for right. size: a multiple of
    4, as the categories have equal shares.
    """
    rng = random.Random(seed)
    right = []
    for category in shapes.CATEGORIES:
        pool = shapes.captions("train")[category]
        right += [rng.choice(pool) for _ in range(size // 4)]
    labels = [rng.random() < 0.5 for _ in right]
    captions = []
    for caption, label in zip(right, labels, strict=True):
        captions.append(caption if label else shapes.wrong_caption(caption, rng))
    return shapes.render(right, seed), captions, torch.tensor(labels).float()


def train(steps=3000, size=128, pool=150):
    """A judge, from nothing: binary cross-entropy and AdamW, on `pool` batches in turn."""
    torch.manual_seed(0)
    judge = Judge()
    batches = []
    optimizer = torch.optim.AdamW(judge.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(steps):
        if step < pool:
            batches.append(batch(size, step))
        images, captions, labels = batches[step % pool]
        logits = judge(images, captions)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, labels)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return judge


# ---- The reward ----------------------------------------------------------------------------------
def reward():
    """Make the judge, trained if need be: the probability that a picture shows its caption."""
    if not FILE.exists():
        print(f"learned.py: training {FILE}, once: some ten minutes of one core", file=sys.stderr)
        weights = train().state_dict()
        FILE.parent.mkdir(exist_ok=True)
        torch.save(weights, FILE)
    judge = Judge()
    judge.load_state_dict(torch.load(FILE, weights_only=True))

    def match(images, prompts, metadata):
        """(B, 3, 32, 32) in [0, 1] and B captions of shapes.py -> (B,) in [0, 1]."""
        return judge.to(images.device)(images, prompts).sigmoid()

    return match
