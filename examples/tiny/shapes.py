"""A miniature of GenEval that is exactly checkable: the captions, pictures and reward of `tiny`.

    python nft.py --reward examples/tiny/shapes.py:reward

There are four categories: `single` ("a red circle"), `count` ("two blue squares"), `two` ("a red
circle and a blue cross") and `position` ("a green triangle left of a yellow cross"). A picture is
32x32 pixels on white. `check` finds the objects by segmentation and shape matching. It has no
learned model, so there is no noise pattern that fools one. Of 1228 pictures of held-out captions
that it called right, by `tiny` trained with two seeds, a person saw 8 otherwise and doubted 7. It
takes rougher shapes by `tiny-sd3`: after 15 iterations 10 of 184 looked wrong. It needs no package
beyond nft.py's own.
SPDX-License-Identifier: MIT
"""

import functools
import itertools
import random
import typing

import numpy as np
import torch
import torch.nn.functional as F

# Pixels, both sides.
SIZE = 32
COLORS = {
    "red": (0.90, 0.10, 0.10),
    "green": (0.10, 0.65, 0.20),
    "blue": (0.15, 0.30, 0.90),
    "yellow": (0.98, 0.80, 0.05),
}
SHAPES = ("circle", "square", "triangle", "cross")
COUNTS = {"two": 2, "three": 3}
# The axis, 0 for x and 1 for y, and the sign of second minus first on it.
RELATIONS = {"left of": (0, 1), "right of": (0, -1), "above": (1, 1), "below": (1, -1)}
CATEGORIES = ("single", "count", "two", "position")
# Objects nearer than this on an axis are not beside each other: GenEval's 10% of the size.
MARGIN = 0.1 * SIZE
# Objects of a picture, at most.
MOST = max(COUNTS.values())


# ---- Captions ------------------------------------------------------------------------------------
class Caption(typing.NamedTuple):
    """What a caption says: (color, shape) of each object, and one of RELATIONS or None."""

    category: str
    things: tuple
    held_out: bool
    relation: str | None = None


@functools.cache
def grammar():
    """{text: Caption} of all captions; no composition is both trained on and held out."""
    found = {}
    things = list(itertools.product(COLORS, SHAPES))
    # Of all colours x shapes, diagonals are held out.
    for i, color in enumerate(COLORS):
        for j, shape in enumerate(SHAPES):
            thing = color, shape
            plural = "crosses" if shape == "cross" else f"{shape}s"
            found[f"a {color} {shape}"] = Caption("single", (thing,), i == j)
            for number, count in COUNTS.items():
                held_out = (i + count - 1) % 4 == j
                found[f"{number} {color} {plural}"] = Caption("count", (thing,) * count, held_out)
    rng = random.Random(0)
    for first, second in itertools.permutations(things, 2):
        a = "a " + " ".join(first)
        b = "a " + " ".join(second)
        # The order of "a and b" means nothing: both are held out, or neither.
        if first < second:
            held_out = rng.random() < 0.2
            found[f"{a} and {b}"] = Caption("two", (first, second), held_out)
            found[f"{b} and {a}"] = Caption("two", (second, first), held_out)
        for relation in RELATIONS:
            caption = Caption("position", (first, second), rng.random() < 0.2, relation)
            found[f"{a} {relation} {b}"] = caption
    return found


def parse(text):
    """The Caption of a text, in any case. Raises ValueError where it is none of `grammar`."""
    words = " ".join(text.lower().split())
    if words not in grammar():
        raise ValueError(f"prompt {text!r}: must be a caption as in examples/tiny/train.txt")
    return grammar()[words]


@functools.cache
def captions(split):
    """{category: [text]} for split "train" or "heldout", shared: callers must not change them."""
    found = {category: [] for category in CATEGORIES}
    for text, caption in grammar().items():
        if caption.held_out == (split == "heldout"):
            found[caption.category].append(text)
    return found


def prompt_list(split, per_category):
    """A shuffled list with `per_category` captions of each category, repeated if it has fewer."""
    rng = random.Random(0)
    lines = []
    for category in CATEGORIES:
        pool = captions(split)[category]
        pool = rng.sample(pool, len(pool))
        lines += [pool[i % len(pool)] for i in range(per_category)]
    return rng.sample(lines, len(lines))


def wrong_caption(text, rng):
    """A caption of the same category, to train with, that a picture of `text` does not show."""
    right = parse(text)
    while True:
        other = rng.choice(captions("train")[right.category])
        seen = parse(other)
        if sorted(seen.things) != sorted(right.things):
            return other
        # Of the same objects, opposite relations; those on two axes may both hold.
        if seen.things == right.things and seen.relation != right.relation:
            axis, _ = RELATIONS[right.relation]
            if axis == RELATIONS[seen.relation][0]:
                return other


# ---- The renderer --------------------------------------------------------------------------------
def _inside(shape, u, v):
    """Whether points lie in a shape of half size 1 around 0, as a bool tensor.

    shape: its index in SHAPES. u, v (downwards): coordinates. All are tensors that broadcast.
    """
    across = u.abs()
    along = v.abs()
    circle = u * u + v * v <= 1
    square = (across <= 0.95) & (along <= 0.95)
    triangle = (along <= 1) & (across <= (v + 1) / 2)
    upright = (across <= 1 / 3) & (along <= 1)
    level = (along <= 1 / 3) & (across <= 1)
    inside = torch.zeros_like(circle)
    for i, mask in enumerate((circle, square, triangle, upright | level)):
        inside = inside | ((shape == i) & mask)
    return inside


def _fit(parsed, layout):
    """Which of B layouts (B, 3, 3) keep objects apart and their relation true: (B,) bools."""
    fits = np.ones(len(parsed), bool)
    for k, caption in enumerate(parsed):
        places = layout[k, : len(caption.things)]
        for one, other in itertools.combinations(places, 2):
            distance = np.abs(one[:2] - other[:2]).max()
            fits[k] &= distance - one[2] - other[2] > 2
        if caption.relation:
            axis, sign = RELATIONS[caption.relation]
            fits[k] &= sign * (places[1, axis] - places[0, axis]) > 2 * MARGIN
    return fits


def _layout(parsed, rng):
    """Random places of up to three objects in the pictures of B Captions: (B, 3, 3).

    The last axis has x, y and half size, in pixels.
    """
    layout = np.zeros((len(parsed), MOST, 3))
    largest = np.array([7.5 if len(caption.things) == 1 else 5.8 for caption in parsed])
    todo = np.arange(len(parsed))
    # Those that do not fit are drawn again.
    while len(todo) > 0:
        half = rng.uniform(4.2, largest[todo, None], (len(todo), MOST))
        half = half[..., None]
        free = SIZE - 2 - 2 * half
        xy = rng.uniform(0, 1, (len(todo), MOST, 2)) * free + 1 + half
        layout[todo] = np.concatenate([xy, half], 2)
        fits = _fit([parsed[i] for i in todo], layout[todo])
        todo = todo[~fits]
    return layout


def _paint(images, things, places):
    """Images (B, 3, 32, 32) with an object painted over each.

    things: B times (color, shape). places: (B, 3) of x, y and half size, in pixels.
    """
    # Supersampling, for antialiased edges.
    fine = 4
    x, y, half = places[:, :, None, None].unbind(1)
    grid = (torch.arange(SIZE * fine) + 0.5) / fine
    u = (grid.view(1, 1, -1) - x) / half
    v = (grid.view(1, -1, 1) - y) / half
    shapes = torch.tensor([SHAPES.index(shape) for _, shape in things])
    mask = _inside(shapes.view(-1, 1, 1), u, v)
    # The share of each pixel that the object covers.
    cover = F.avg_pool2d(mask.float()[:, None], fine)
    colors = torch.tensor([COLORS[color] for color, _ in things])
    return cover * colors.view(-1, 3, 1, 1) + (1 - cover) * images


def render(texts, seed=0):
    """Ground-truth pictures of B captions: (B, 3, 32, 32), floats in [0, 1].

    Raises ValueError for a caption that is not of the grammar.
    """
    parsed = [parse(text) for text in texts]
    layout = _layout(parsed, np.random.default_rng(seed))
    places = torch.tensor(layout, dtype=torch.float32)
    images = torch.ones(len(texts), 3, SIZE, SIZE)
    for k in range(MOST):
        rows = [i for i, caption in enumerate(parsed) if len(caption.things) > k]
        # Some at a time, for memory.
        for start in range(0, len(rows), 2048):
            some = rows[start : start + 2048]
            things = [parsed[i].things[k] for i in some]
            images[some] = _paint(images[some], things, places[some, k])
    return images


# ---- The checker ---------------------------------------------------------------------------------
def _segment(images):
    """Find the coloured parts of images (B, 3, H, W).

    Returns cover and labels, each (B, C, H, W), and unknown (B, H, W). A pixel is modelled as
    cover * colour + (1 - cover) * white, which antialiasing keeps exact. It belongs to the one of
    C colours with the smallest residual, and is unknown where that is large. Where cover > 1/2 is
    connected, all pixels have one label, a number above 0.
    """
    # (B, H, W, 3)
    ink = 1 - images.permute(0, 2, 3, 1)
    # (C, 3)
    axes = 1 - torch.tensor(list(COLORS.values()))
    # (B, H, W, C)
    cover = (ink @ axes.T) / (axes * axes).sum(1)
    residual = (ink[..., None, :] - cover[..., None] * axes).norm(dim=-1)
    smallest, best = residual.min(-1, keepdim=True)
    unknown = (smallest > 0.25) | (cover.gather(-1, best) > 1.4)
    owned = torch.arange(len(COLORS)) == best
    cover = (cover * owned).clamp(0, 1)
    cover = cover.permute(0, 3, 1, 2)
    solid = cover > 0.5
    numbers = torch.arange(1, SIZE * SIZE + 1, dtype=torch.float32)
    grown = solid * numbers.view(1, 1, SIZE, SIZE)
    labels = torch.zeros_like(grown)
    # The largest number spreads through each connected part.
    while not torch.equal(grown, labels):
        labels = grown
        grown = F.max_pool2d(labels, 3, 1, 1) * solid
    return cover, labels, unknown[..., 0]


def _match(mask):
    """The shape that fits a soft mask (32, 32) best: overlap, shape, half size, x and y in pixels.

    A shape is placed by the mask's moments (its area gives the size, its centroid the place), so
    the comparison is exact to a fraction of a pixel for the renderer's own shapes. The overlap is a
    soft intersection over union, in [0, 1].
    """
    # Of the four shapes: areas at half size 1, and how far the centroid lies below the centre.
    units = torch.tensor([torch.pi, 4 * 0.95**2, 2.0, 20 / 9])
    drop = torch.tensor([0, 0, 1 / 3, 0])
    at = torch.arange(SIZE) + 0.5
    area = mask.sum()
    half = (area / units).sqrt()
    x = mask.sum(0) @ at / area
    y = mask.sum(1) @ at / area - drop * half
    # Each shape, drawn there at twice the resolution: (4, 64, 64), then (4, 32, 32).
    fine = (torch.arange(SIZE * 2) + 0.5) / 2
    u = (fine - x) / half[:, None]
    v = (fine - y[:, None]) / half[:, None]
    index = torch.arange(4).view(4, 1, 1)
    drawn = _inside(index, u[:, None], v[..., None])
    ideal = F.avg_pool2d(drawn.float(), 2)
    both = torch.minimum(ideal, mask).sum((1, 2))
    either = torch.maximum(ideal, mask).sum((1, 2))
    overlap = both / either
    best = overlap.argmax().item()
    return overlap[best].item(), SHAPES[best], half[best].item(), x.item(), y[best].item()


def _objects(cover, labels, stray):
    """The objects of one picture, as `detect` returns them.

    cover, labels: (C, 32, 32), of `_segment`. stray: the number of pixels of unknown colour.
    """
    found = []
    for color, soft, label in zip(COLORS, cover, labels, strict=True):
        for number in label[label > 0].unique():
            part = label == number
            area = int(part.sum())
            # Too small for an object.
            if area < 12:
                stray += area
                continue
            # With its antialiased rim.
            rim = F.max_pool2d(part[None].float(), 3, 1, 1)[0]
            overlap, shape, half, x, y = _match(soft * rim)
            if overlap <= 0.72 or not 3.5 < half < 8.5:
                return None
            found.append((color, shape, x, y))
    return None if stray > 8 else found


def detect(images):
    """Objects of each image (B, 3, 32, 32): B lists of (color, shape, x, y), x and y in pixels.

    A list is None where a picture holds anything else: a part that matches no shape, or more than
    8 stray pixels, such as speckle and smears.
    """
    cover, labels, unknown = _segment(images.float().cpu())
    stray = unknown.sum((1, 2)).tolist()
    return list(map(_objects, cover, labels, stray))


def _shows(objects, caption):
    """Whether the objects of a picture, as `detect` returns them, are what a Caption says."""
    if objects is None:
        return False
    seen = sorted((color, shape) for color, shape, _, _ in objects)
    if seen != sorted(caption.things):
        return False
    if caption.relation is None:
        return True
    axis, sign = RELATIONS[caption.relation]
    at = {(color, shape): (x, y)[axis] for color, shape, x, y in objects}
    first, second = caption.things
    return sign * (at[second] - at[first]) > MARGIN


def check(images, texts):
    """Whether each picture (B, 3, 32, 32), in [0, 1], shows exactly what its caption says: B bools.

    Raises ValueError for a caption that is not of the grammar.
    """
    parsed = [parse(text) for text in texts]
    found = detect(images)
    return list(map(_shows, found, parsed))


def reward(images, prompts, metadata):
    """1.0 where the picture shows exactly what the prompt says, else 0.0: B floats."""
    return [float(right) for right in check(images, prompts)]
