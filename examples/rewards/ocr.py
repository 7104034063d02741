"""Text rendering as a reward: does the picture show the words that the prompt puts in quotes?

    pip install rapidocr-onnxruntime                    # its wheel carries the PP-OCRv4 models
    python nft.py --model sd3 --reward ocr --prompts signs.txt

A prompt quotes its text once, with double quotes: `a shop with the sign "OPEN"`; or its metadata
have `text`. The reward is 1 - min(edit distance, length) / length between the text and all that was
read, in reading order, without spaces and case. Text that is found whole among other text counts as
right, as in FlowGRPO (github.com/yifan123/flow_grpo, flow_grpo/ocr.py), which reads with PaddleOCR.
It runs on the CPU.
SPDX-License-Identifier: MIT
"""

import numpy as np

import nft


def plain(text):
    """A text without spaces and case."""
    return "".join(text.split()).lower()


def wanted(prompt, metadata):
    """The text that a prompt asks for. Raises ValueError where it asks for none."""
    text = metadata.get("text")
    if not text and '"' in prompt:
        text = prompt.split('"')[1]
    if not text or not plain(text):
        raise ValueError(f'prompt {prompt!r} must quote its text, as in: a sign that says "OPEN"')
    return text


def edit_distance(a, b):
    """Insertions, deletions and substitutions of characters that turn a into b (Levenshtein)."""
    # Distances from a's first i characters to b's first 0, 1, ... characters.
    above = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            substitution = above[j - 1] + (x != y)
            row.append(min(above[j] + 1, row[j - 1] + 1, substitution))
        above = row
    return above[-1]


def similarity(found, text):
    """1 where `text` was found, whole and maybe among other text, down to 0."""
    found = plain(found)
    text = plain(text)
    if text in found:
        return 1.0
    distance = min(edit_distance(found, text), len(text))
    return 1 - distance / len(text)


def check(prompts, metadata):
    """Raise ValueError for a prompt that asks for no text."""
    for prompt, row in zip(prompts, metadata, strict=True):
        wanted(prompt, row)


def reward():
    """Make the reader: how much of its text each picture shows, in [0, 1]."""
    from rapidocr_onnxruntime import RapidOCR

    reader = RapidOCR(use_angle_cls=False)

    def read(image):
        """All text in a picture (3, H, W) in [0, 1], line by line from the top, as one string."""
        # OpenCV's order of colours: blue first.
        pixels = np.asarray(nft.to_pil(image))[:, :, ::-1]
        lines, _ = reader(np.ascontiguousarray(pixels), use_cls=False)
        # None where nothing was found.
        if lines is None:
            return ""
        return " ".join(text for _, text, _ in lines)

    def rate(images, prompts, metadata):
        """(B, 3, H, W) in [0, 1], B strings and B dicts -> B floats."""
        scores = []
        for image, prompt, row in zip(images, prompts, metadata, strict=True):
            scores.append(similarity(read(image), wanted(prompt, row)))
        return scores

    rate.check = check
    return rate
