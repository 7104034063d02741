"""A miniature of GenEval that is exactly checkable: the captions, pictures and reward of `tiny`.

    python examples/tiny/shapes.py      # the checker's accuracy on clean renders, per category
    python nft.py --reward examples/tiny/shapes.py:reward

There are four categories: `single` ("a red circle"), `count` ("two blue squares"), `two` ("a red
circle and a blue cross") and `position` ("a green triangle left of a yellow cross"). A picture is
32x32 pixels on white. `check` finds the objects by segmentation and shape matching. It has no
learned model, so there is no noise pattern that fools one. It needs no package beyond nft.py's own.
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
    relation: str | None = None


def plural(shape):
    """The plural noun of a shape."""
    if shape == "cross":
        return "crosses"
    return shape + "s"


@functools.cache
def captions(split):
    """{category: [caption]} for split "train" or "heldout"; no composition is in both.

    The lists are shared by all callers, who must not change them.
    """
    train = {category: [] for category in CATEGORIES}
    held_out = {category: [] for category in CATEGORIES}
    # Of all colours x shapes, diagonals are held out.
    for i, color in enumerate(COLORS):
        for j, shape in enumerate(SHAPES):
            part = held_out if i == j else train
            part["single"].append(f"a {color} {shape}")
            for k, number in enumerate(COUNTS, 1):
                part = held_out if (i + k) % 4 == j else train
                part["count"].append(f"{number} {color} {plural(shape)}")
    rng = random.Random(0)

    def random_split():
        return held_out if rng.random() < 0.2 else train

    things = [f"{color} {shape}" for color in COLORS for shape in SHAPES]
    for a, b in itertools.permutations(things, 2):
        # The order of "a and b" means nothing: both belong to one split.
        if a.split() < b.split():
            pair = f"a {a} and a {b}", f"a {b} and a {a}"
            random_split()["two"].extend(pair)
        for relation in RELATIONS:
            random_split()["position"].append(f"a {a} {relation} a {b}")
    return {"train": train, "heldout": held_out}[split]


def prompt_list(split, per_category):
    """A shuffled list with `per_category` captions of each category.

    They are repeated where a category has fewer.
    """
    rng = random.Random(0)
    lines = []
    for category in CATEGORIES:
        pool = captions(split)[category]
        pool = rng.sample(pool, len(pool))
        lines += [pool[i % len(pool)] for i in range(per_category)]
    return rng.sample(lines, len(lines))


def _parse_thing(words):
    """["a", color, shape] -> (color, shape); None for other words."""
    if len(words) != 3 or words[0] != "a":
        return None
    _, color, shape = words
    if color in COLORS and shape in SHAPES:
        return color, shape
    return None


@functools.cache
def parse(caption):
    """A Caption for its text; None where that is not of this grammar."""
    words = caption.lower().split()
    first = _parse_thing(words[:3])
    second = _parse_thing(words[-3:])
    relation = " ".join(words[3:-3])
    if len(words) == 3 and first:
        return Caption("single", (first,))
    if len(words) == 3:
        return _parse_count(*words)
    if not first or not second:
        return None
    if relation == "and":
        return Caption("two", (first, second))
    if relation in RELATIONS:
        return Caption("position", (first, second), relation)
    return None


def _parse_count(number, color, noun):
    """A Caption for "two blue squares"; None for other words."""
    singular = {plural(shape): shape for shape in SHAPES}
    if number not in COUNTS or color not in COLORS or noun not in singular:
        return None
    thing = color, singular[noun]
    return Caption("count", (thing,) * COUNTS[number])


def _parse_or_raise(caption):
    """As `parse`. Raises ValueError where it gives None."""
    parsed = parse(caption)
    if parsed is None:
        raise ValueError(
            f"prompt {caption!r}: must be a caption of shapes.py's grammar, such as "
            "'two blue squares'; take examples/tiny/train.txt"
        )
    return parsed


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
    inside = (shape == 0) & circle
    inside = inside | ((shape == 1) & square)
    inside = inside | ((shape == 2) & triangle)
    return inside | ((shape == 3) & (upright | level))


def _fit(parsed, half, xy):
    """Which of B random layouts keep their objects apart and their relations true: (B,) bools.

    parsed: B Captions. half: (B, 3) half sizes. xy: (B, 3, 2) centres, both in pixels.
    """
    counts = np.array([len(caption.things) for caption in parsed])
    fits = np.ones(len(parsed), bool)
    for j, i in itertools.combinations(range(MOST), 2):
        distance = np.abs(xy[:, i] - xy[:, j]).max(1)
        gap = distance - half[:, i] - half[:, j]
        fits &= (gap > 2) | (counts <= i)
    for k, caption in enumerate(parsed):
        if caption.relation:
            axis, sign = RELATIONS[caption.relation]
            first, second, _ = xy[k, :, axis]
            fits[k] &= sign * (second - first) > 2 * MARGIN
    return fits


def _layout(parsed, rng):
    """Random places of up to three objects in the pictures of B Captions: (B, 3, 3).

    The last axis has x, y and half size, in pixels.
    """
    layout = np.zeros((len(parsed), MOST, 3))
    counts = np.array([len(caption.things) for caption in parsed])
    largest = np.where(counts == 1, 7.5, 5.8)
    todo = np.arange(len(parsed))
    # Those that do not fit are drawn again.
    while len(todo) > 0:
        shape = len(todo), MOST
        half = rng.uniform(4.2, largest[todo, None], shape)
        free = SIZE - 2 - 2 * half[..., None]
        xy = rng.uniform(0, 1, (*shape, 2)) * free + 1 + half[..., None]
        fits = _fit([parsed[i] for i in todo], half, xy)
        done = todo[fits]
        layout[done, :, :2] = xy[fits]
        layout[done, :, 2] = half[fits]
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
    parsed = [_parse_or_raise(text) for text in texts]
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


def _match(masks):
    """The shape that fits each of N soft masks (N, 32, 32) best.

    Returns N times (shape, [overlap, half size, x, y]), in pixels. A shape is placed by the mask's
    moments (its area gives the size, its centroid the place), so the comparison is exact to a
    fraction of a pixel for the renderer's own shapes. The overlap is a soft intersection over
    union, in [0, 1].
    """
    # Of the four shapes: areas at half size 1, and how far the centroid lies below the centre.
    units = torch.tensor([torch.pi, 4 * 0.95**2, 2.0, 20 / 9])
    drop = torch.tensor([0, 0, 1 / 3, 0])
    at = torch.arange(SIZE) + 0.5
    area = masks.sum((1, 2))
    # (N, 4), a column a shape
    half = (area[:, None] / units).sqrt()
    x = masks.sum(1) @ at / area
    x = x[:, None].expand(-1, 4)
    y = masks.sum(2) @ at / area
    y = y[:, None] - drop * half
    # Each shape, drawn there at twice the resolution: (N, 4, 64, 64), then (N, 4, 32, 32).
    fine = (torch.arange(SIZE * 2) + 0.5) / 2
    u = (fine - x[..., None]) / half[..., None]
    v = (fine - y[..., None]) / half[..., None]
    index = torch.arange(4).view(1, 4, 1, 1)
    drawn = _inside(index, u[:, :, None], v[..., None])
    ideal = F.avg_pool2d(drawn.float(), 2)
    both = torch.minimum(ideal, masks[:, None]).sum((2, 3))
    either = torch.maximum(ideal, masks[:, None]).sum((2, 3))
    overlap, best = (both / either).max(1)
    rows = torch.arange(len(masks))
    measures = [overlap, half[rows, best], x[rows, best], y[rows, best]]
    measures = torch.stack(measures, 1).tolist()
    shapes = [SHAPES[i] for i in best.tolist()]
    return list(zip(shapes, measures, strict=True))


def detect(images):
    """Objects of each image (B, 3, 32, 32): B lists of (color, shape, x, y), x and y in pixels.

    A list is None where a picture holds anything else: a part that matches no shape, or more than
    8 stray pixels, such as speckle and smears.
    """
    images = torch.as_tensor(images).detach().float().cpu()
    cover, labels, unknown = _segment(images)
    stray = unknown.sum((1, 2)).tolist()
    masks = []
    owners = []
    for image, color in (labels.amax((2, 3)) > 0).nonzero().tolist():
        mine = labels[image, color]
        for label in mine.unique().tolist():
            if label == 0:
                continue
            part = mine == label
            area = int(part.sum())
            # Too small for an object.
            if area < 12:
                stray[image] += area
                continue
            # With its antialiased rim.
            rim = F.max_pool2d(part[None].float(), 3, 1, 1)[0]
            masks.append(cover[image, color] * rim)
            owners.append((image, color))

    found = [[] for _ in images]
    matches = _match(torch.stack(masks)) if masks else []
    for owner, match in zip(owners, matches, strict=True):
        image, color = owner
        shape, measures = match
        overlap, half, x, y = measures
        if overlap > 0.72 and 3.5 < half < 8.5:
            found[image].append((list(COLORS)[color], shape, x, y))
        else:
            # No object: all of it is stray.
            stray[image] = SIZE * SIZE
    for image, count in enumerate(stray):
        if count > 8:
            found[image] = None
    return found


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
    parsed = [_parse_or_raise(text) for text in texts]
    found = detect(images)
    return [_shows(objects, caption) for objects, caption in zip(found, parsed, strict=True)]


def reward(images, prompts, metadata):
    """1.0 where the picture shows exactly what the prompt says, else 0.0: B floats."""
    return [float(right) for right in check(images, prompts)]


# ---- The checker's accuracy ----------------------------------------------------------------------
def _contradict(a, b):
    """Whether no picture shows both of two Captions of one category."""
    if sorted(a.things) != sorted(b.things):
        return True
    if a.things != b.things or a.relation == b.relation:
        return False
    # Of the same objects, opposite relations; those on two axes may both hold.
    axis, _ = RELATIONS[a.relation]
    other, _ = RELATIONS[b.relation]
    return axis == other


def wrong_caption(text, rng):
    """A caption of the same category that a picture of `text` does not show."""
    right = parse(text)
    while True:
        other = rng.choice(captions("train")[right.category])
        if _contradict(right, parse(other)):
            return other


def main():
    """Print the checker's accuracy on clean renders, right and wrong captions, per category."""
    rng = random.Random(0)
    for category in CATEGORIES:
        pool = captions("train")[category] + captions("heldout")[category]
        texts = [rng.choice(pool) for _ in range(1000)]
        images = render(texts, seed=1)
        wrong = [wrong_caption(text, rng) for text in texts]
        accepted = np.mean(check(images, texts))
        refused = 1 - np.mean(check(images, wrong))
        print(f"{category:9s} right captions accepted {accepted:.3f}", end="  ")
        print(f"wrong captions refused {refused:.3f}")


if __name__ == "__main__":
    main()
