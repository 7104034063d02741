"""A miniature of GenEval that is exactly checkable: captions, pictures, and the reward of `--model tiny`.

    python examples/shapes.py              # the checker's accuracy on clean renders, per category
    python nft.py --reward examples/shapes.py:reward

Four categories: `single` ("a red circle"), `count` ("two blue squares"), `two` ("a red circle and a
blue cross") and `position` ("a green triangle left of a yellow cross"). A picture is 32x32 pixels on
white. `check` finds the objects by segmentation and shape matching: no learned model, so no noise
pattern that fools one. Needs nothing beyond nft.py's own dependencies.
SPDX-License-Identifier: MIT
"""
import functools
import random

import numpy as np
import torch

SIZE = 32                                              # pixels, both sides
COLORS = {"red": (0.90, 0.10, 0.10), "green": (0.10, 0.65, 0.20),
          "blue": (0.15, 0.30, 0.90), "yellow": (0.98, 0.80, 0.05)}
SHAPES = ("circle", "square", "triangle", "cross")
COUNTS = {"two": 2, "three": 3}
RELATIONS = {"left of": (0, 1), "right of": (0, -1), "above": (1, 1), "below": (1, -1)}
CATEGORIES = ("single", "count", "two", "position")
MARGIN = 0.1 * SIZE                                    # GenEval's 10% of the size, for relations


# ------------------------------------------------------------------------------------ captions
def captions(split):
    """{category: [caption]} for split "train" or "heldout"; no composition is in both."""
    things = [(c, s) for c in COLORS for s in SHAPES]
    held = {"single": [], "count": [], "two": [], "position": []}
    train = {"single": [], "count": [], "two": [], "position": []}
    for i, c in enumerate(COLORS):                     # held out: diagonals of colour x shape
        for j, s in enumerate(SHAPES):
            (held if i == j else train)["single"].append(f"a {c} {s}")
            for k, n in enumerate(COUNTS, 1):
                (held if (i + k) % 4 == j else train)["count"].append(f"{n} {c} {plural(s)}")
    rng = random.Random(0)
    for a in things:
        for b in things:
            if a == b:
                continue
            a_, b_ = " ".join(a), " ".join(b)
            if a < b:                                  # the order of "A and B" means nothing
                part = held if rng.random() < 0.2 else train
                part["two"] += [f"a {a_} and a {b_}", f"a {b_} and a {a_}"]
            for rel in RELATIONS:
                (held if rng.random() < 0.2 else train)["position"].append(f"a {a_} {rel} a {b_}")
    return held if split == "heldout" else train


def prompt_list(split, per_category):
    """A shuffled list with `per_category` captions of each category (repeated where there are few)."""
    rng, lines = random.Random(0), []
    for category in CATEGORIES:
        pool = captions(split)[category]
        pool = rng.sample(pool, len(pool))
        lines += [pool[i % len(pool)] for i in range(per_category)]
    return rng.sample(lines, len(lines))


def plural(shape):
    """Plural noun of a shape."""
    return shape + ("es" if shape == "cross" else "s")


@functools.lru_cache(maxsize=None)
def parse(caption):
    """Caption -> (category, ((color, shape), ...), relation or None); None if it is not of this grammar."""
    words = caption.lower().split()
    singular = {plural(s): s for s in SHAPES}
    def thing(w):
        ok = len(w) == 3 and w[0] == "a" and w[1] in COLORS and w[2] in SHAPES
        return (w[1], w[2]) if ok else None
    if len(words) == 3 and thing(words):
        return "single", (thing(words),), None
    if len(words) == 3 and words[0] in COUNTS and words[1] in COLORS and words[2] in singular:
        return "count", ((words[1], singular[words[2]]),) * COUNTS[words[0]], None
    a, rel, b = thing(words[:3]), " ".join(words[3:-3]), thing(words[-3:])
    if a and b and (rel == "and" or rel in RELATIONS):
        return ("two", (a, b), None) if rel == "and" else ("position", (a, b), rel)
    return None


# ---------------------------------------------------------------------------------- the renderer
def _inside(shape, u, v):
    """Membership of points with coordinates u, v in [-1, 1] (v downwards) in a shape, by its index."""
    inside = [u * u + v * v <= 1, (abs(u) <= 0.95) & (abs(v) <= 0.95),
              (abs(v) <= 1) & (abs(u) <= (v + 1) / 2),
              ((abs(u) <= 1 / 3) & (abs(v) <= 1)) | ((abs(v) <= 1 / 3) & (abs(u) <= 1))]
    return sum((shape == i) * m for i, m in enumerate(inside))


def _layout(specs, rng):
    """Random positions and half sizes (pixels) that keep objects apart and relations true: (B, 3, 3)."""
    n = np.array([len(s[1]) for s in specs])
    out, todo = np.zeros((len(specs), 3, 3)), np.arange(len(specs))
    while len(todo):
        half = rng.uniform(4.2, np.where(n[todo] == 1, 7.5, 5.8)[:, None], (len(todo), 3))
        xy = rng.uniform(0, 1, (len(todo), 3, 2)) * (SIZE - 2 - 2 * half[..., None]) + 1 + half[..., None]
        ok = np.ones(len(todo), bool)
        for i in range(3):
            for j in range(i):
                gap = np.abs(xy[:, i] - xy[:, j]).max(1) - half[:, i] - half[:, j]
                ok &= (gap > 2) | (n[todo] <= i)
        for k, row in enumerate(todo):
            if specs[row][2]:
                axis, sign = RELATIONS[specs[row][2]]
                ok[k] &= sign * (xy[k, 1, axis] - xy[k, 0, axis]) > 2 * MARGIN
        out[todo[ok], :, :2], out[todo[ok], :, 2] = xy[ok], half[ok]
        todo = todo[~ok]
    return out


def render(texts, seed=0):
    """Ground-truth pictures of `texts` (B captions of the grammar): (B, 3, 32, 32) float in [0, 1]."""
    specs = [parse(t) for t in texts]
    if None in specs:
        raise ValueError(f"{texts[specs.index(None)]!r} is not a caption of shapes.py's grammar")
    objects = torch.tensor(_layout(specs, np.random.default_rng(seed)), dtype=torch.float32)
    fine = 4                                           # supersampling for antialiased edges
    grid = (torch.arange(SIZE * fine) + 0.5) / fine
    images = torch.ones(len(texts), 3, SIZE, SIZE)
    palette = torch.tensor(list(COLORS.values()))
    for k in range(3):
        rows = torch.tensor([i for i, s in enumerate(specs) if len(s[1]) > k], dtype=torch.long)
        for part in rows.split(2048) if len(rows) else ():
            x, y, half = (objects[part, k, d].view(-1, 1, 1) for d in range(3))
            shape = torch.tensor([SHAPES.index(specs[i][1][k][1]) for i in part]).view(-1, 1, 1)
            color = [list(COLORS).index(specs[i][1][k][0]) for i in part]
            mask = _inside(shape, (grid.view(1, 1, -1) - x) / half, (grid.view(1, -1, 1) - y) / half)
            cover = torch.nn.functional.avg_pool2d(mask.float()[:, None], fine)
            images[part] = cover * palette[color].view(-1, 3, 1, 1) + (1 - cover) * images[part]
    return images


# ----------------------------------------------------------------------------------- the checker
def _segment(images):
    """Per pixel: cover (B, C, H, W) by each colour, component labels (B, C, H, W; 0 = none), unknown (B, H, W).

    A pixel is modelled as cover * colour + (1 - cover) * white, which antialiasing keeps exact. It
    belongs to the colour with the smallest residual; a component is where cover > 1/2 is connected.
    """
    ink = 1 - images.permute(0, 2, 3, 1)                                        # (B, H, W, 3)
    axes = 1 - torch.tensor(list(COLORS.values()))                              # (C, 3)
    cover = (ink @ axes.T) / (axes * axes).sum(1)                               # (B, H, W, C)
    residual = (ink[..., None, :] - cover[..., None] * axes).norm(dim=-1)       # (B, H, W, C)
    smallest, best = residual.min(-1, keepdim=True)
    unknown = (smallest > 0.25) | (cover.gather(-1, best) > 1.4)
    cover = (cover * (torch.arange(len(COLORS)) == best)).clamp(0, 1).permute(0, 3, 1, 2)
    ids = torch.arange(1, SIZE * SIZE + 1, dtype=torch.float32).view(1, 1, SIZE, SIZE)
    labels = (cover > 0.5) * ids                       # the largest id spreads through a component
    while True:
        grown = torch.nn.functional.max_pool2d(labels, 3, 1, 1) * (cover > 0.5)
        if torch.equal(grown, labels):
            return cover, labels, unknown[..., 0]
        labels = grown


def _match(masks):
    """Best shape for soft masks (N, H, W): index, overlap (soft IoU), half size, centre x, y, each (N,).

    A shape is placed by the mask's moments (its area gives the size, its centroid the place), so
    the comparison is exact to a fraction of a pixel for the renderer's own shapes.
    """
    units = torch.tensor([torch.pi, 4 * 0.95 ** 2, 2.0, 20 / 9])                # areas at half size 1
    drop = torch.tensor([0, 0, 1 / 3, 0])                                       # centroid below centre
    at = torch.arange(SIZE) + 0.5
    area = masks.sum((1, 2))
    x = (masks.sum(1) @ at / area)[:, None].expand(-1, 4)                       # (N, 4 shapes)
    half = (area[:, None] / units).sqrt()
    y = (masks.sum(2) @ at / area)[:, None] - drop * half
    fine = ((torch.arange(SIZE * 2) + 0.5) / 2).view(1, 1, -1)
    u, v = (fine - x[..., None]) / half[..., None], (fine - y[..., None]) / half[..., None]
    index = torch.arange(4).view(1, 4, 1, 1)
    ideal = torch.nn.functional.avg_pool2d(_inside(index, u[:, :, None], v[..., None]).float(), 2)
    both = masks[:, None]
    overlap = torch.minimum(ideal, both).sum((2, 3)) / torch.maximum(ideal, both).sum((2, 3))
    overlap, best = overlap.max(1)
    pick = lambda z: z.gather(1, best[:, None])[:, 0].tolist()  # noqa: E731
    return best.tolist(), overlap.tolist(), pick(half), pick(x), pick(y)


def detect(images):
    """Objects of each image: a list of (color, shape, x, y) in pixels, or None where a picture holds
    anything else (a shape that matches nothing, or more than 8 stray pixels: speckle, smears)."""
    images = torch.as_tensor(images).detach().float().cpu()
    cover, labels, unknown = _segment(images)
    masks, owners = [], []
    stray = unknown.sum((1, 2)).tolist()
    for b, c in (labels.amax((2, 3)) > 0).nonzero().tolist():
        for label in labels[b, c].unique().tolist():
            part = (labels[b, c] == label) if label else None
            if part is not None and part.sum() < 12:   # too small for an object
                stray[b] += int(part.sum())
            elif part is not None:                     # with its antialiased rim
                rim = torch.nn.functional.max_pool2d(part[None].float(), 3, 1, 1)[0]
                masks.append(cover[b, c] * rim)
                owners.append((b, c))
    found = [[] if stray[b] <= 8 else None for b in range(len(images))]
    if masks:
        for (b, c), shape, overlap, half, x, y in zip(owners, *_match(torch.stack(masks))):
            if found[b] is not None and overlap > 0.72 and 3.5 < half < 8.5:
                found[b].append((list(COLORS)[c], SHAPES[shape], x, y))
            else:
                found[b] = None
    return found


def check(images, texts):
    """Whether each picture (B, 3, 32, 32), [0, 1], shows exactly what its caption says: B bools."""
    results = []
    for objects, text in zip(detect(images), texts):
        spec = parse(text)
        if spec is None:
            raise ValueError(f"{text!r} is not a caption of shapes.py's grammar, such as 'two blue squares'")
        ok = objects is not None and sorted(o[:2] for o in objects) == sorted(spec[1])
        if ok and spec[2]:
            axis, sign = RELATIONS[spec[2]]
            at = {o[:2]: o[2 + axis] for o in objects}
            ok = sign * (at[spec[1][1]] - at[spec[1][0]]) > MARGIN
        results.append(bool(ok))
    return results


def reward(images, prompts, metadata):
    """1.0 where the picture shows exactly what the prompt says, else 0.0 (nft.py's reward interface)."""
    return [float(ok) for ok in check(images, prompts)]


def wrong_caption(text, rng):
    """A caption of the same category that a picture of `text` does not show."""
    _, things, relation = parse(text)
    while True:
        other = rng.choice(captions("train")[parse(text)[0]])
        _, things_, relation_ = parse(other)
        if sorted(things_) != sorted(things):
            return other
        if relation and things_ == things and RELATIONS[relation][0] == RELATIONS[relation_][0] \
                and relation != relation_:
            return other


def main():
    """Print the checker's accuracy on clean renders, right and wrong captions, per category."""
    rng = random.Random(0)
    for category in CATEGORIES:
        pool = captions("train")[category] + captions("heldout")[category]
        texts = [rng.choice(pool) for _ in range(1000)]
        images = render(texts, seed=1)
        right = np.mean(check(images, texts))
        refused = 1 - np.mean(check(images, [wrong_caption(t, rng) for t in texts]))
        print(f"{category:9s} right captions accepted {right:.3f}  wrong captions refused {refused:.3f}")


if __name__ == "__main__":
    main()
