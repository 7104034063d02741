"""GenEval as a reward: are the objects of a prompt in its picture, in number, colour and place?

    python examples/rewards/geneval.py prompts.jsonl --count 2000   # prompts with what they list
    python nft.py --model sd3 --prompts prompts.jsonl \\
        --reward geneval,examples/rewards/geneval.py:strict=0

`strict` is GenEval's verdict, 0 or 1 (Ghosh et al., arXiv 2310.11513; djghosh13/geneval,
evaluation/evaluate_images.py). `reward` is FlowGRPO's partial score, for training (Liu et al.,
arXiv 2505.05470; yifan123/reward-server, reward_server/gen_eval.py). The detector is transformers'
Mask2Former with its authors' weights, at the resolution of mmdet's tests, and colours are CLIP's.
mmdet's weights are another training of the same network, so a score is not exactly GenEval's own.

Metadata, a line of the .jsonl each, is GenEval's own, so its evaluation_metadata.jsonl works, too:
    {"tag": "position", "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1,
     "position": ["left of", 0]}], "prompt": "a photo of a dog left of a cat"}
tag: the category. include: all of these, with a `color` and, relative to an earlier item, a
`position` where they have one. exclude: fewer than `count` of these. FlowGRPO's mix is --categories
with the names position x 7, counting x 5, color_attr x 3, colors and two_object.
SPDX-License-Identifier: MIT
"""

import argparse
import collections
import functools
import json
import operator
import random
import typing
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

DETECTOR = "facebook/mask2former-swin-small-coco-instance"
CLIP = "openai/clip-vit-large-patch14"
CATEGORIES = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
# COCO's 80 classes in their order, which is the detector's; three have GenEval's clearer names.
COCO = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant,
stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe,
backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite,
baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork,
knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake,
chair, couch, potted plant, bed, dining table, toilet, tv, laptop, computer mouse, tv remote,
computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase,
scissors, teddy bear, hair drier, toothbrush
"""
CLASSES = [name.strip() for name in COCO.split(",")]


# ---- The rules: functions of plain detections ----------------------------------------------------
# A detection counts above this.
CONFIDENCE = 0.3
COUNTING_CONFIDENCE = 0.9


class Object(typing.NamedTuple):
    """A detection.

    box: left, top, right, bottom in pixels, the last two exclusive. score: its confidence, in
    [0, 1]. mask: a bool tensor (H, W) of the whole image.
    """

    box: tuple
    score: float
    mask: torch.Tensor = None


def keep(found, tag):
    """The detections that count for a prompt of category `tag`: {class: [Object]}, surest first.

    At most 16 of a class. Overlapping boxes stay: GenEval's suppression (NMS) is off by default.
    """
    least = COUNTING_CONFIDENCE if tag == "counting" else CONFIDENCE
    kept = {}
    for name, objects in found.items():
        sure = [x for x in objects if x.score > least]
        kept[name] = sorted(sure, key=operator.attrgetter("score"), reverse=True)[:16]
    return kept


def relations(a, b):
    """Where box a lies from box b: a set of at most two of RELATIONS.

    On either axis a tenth of the sum of both sizes is taken off the distance of the centres. What
    is left must be more than half of the whole distance, so that "above" lies within 60 degrees of
    straight up.
    """
    a, b = torch.tensor([a, b], dtype=torch.float64)
    sizes = a[2:] - a[:2] + b[2:] - b[:2]
    distance = (a[:2] + a[2:] - b[:2] - b[2:]) / 2
    rest = (distance.abs() - 0.1 * sizes).clamp_min(0) * distance.sign()
    if rest.abs().max() < 1e-3:
        return set()
    x, y = (rest / distance.norm()).tolist()
    shares = {"left of": -x, "right of": x, "above": -y, "below": y}
    return {name for name, share in shares.items() if share > 0.5}


def in_place(objects, position, matched):
    """Whether each of the objects stands in `position` to each that matched an earlier item.

    position: [relation, number of the item]. matched: its objects for each item, None for none.
    """
    relation, k = position
    if matched[k] is None:
        return False
    return all(relation in relations(a.box, b.box) for a in objects for b in matched[k])


def strict_score(objects, metadata, colors):
    """GenEval's verdict, 0.0 or 1.0.

    objects: what `keep` returns. colors(class, objects): a list of their colours. An item that asks
    for n is judged by the n surest: more than n are wrong only where `exclude` says so.
    """
    matched = []
    for item in metadata["include"]:
        name = item["class"]
        top = objects.get(name, [])[: item["count"]]
        good = len(top) == item["count"]
        if good and item.get("color"):
            good = set(colors(name, top)) == {item["color"]}
        if good and item.get("position"):
            good = in_place(top, item["position"], matched)
        matched.append(top if good else None)
    if None in matched:
        return 0.0
    for item in metadata.get("exclude") or []:
        if len(objects.get(item["class"], [])) >= item["count"]:
            return 0.0
    return 1.0


def partial_score(objects, metadata, colors):
    """FlowGRPO's score: the mean over the items' parts, at most 1 and without a lower bound.

    The arguments are strict_score's. An item that asks for n has the part 1 - |n - found| / n. If
    exactly n are found, a colour has the share of n in that colour as its part, and a position 1 or
    0; otherwise both together have 0.
    """
    matched = []
    parts = []
    for item in metadata["include"]:
        name = item["class"]
        n = item["count"]
        found = objects.get(name, [])
        parts.append(1 - abs(n - len(found)) / n)
        good = len(found) == n
        if not good and (item.get("color") or item.get("position")):
            parts.append(0.0)
        if good and item.get("color"):
            share = colors(name, found).count(item["color"]) / n
            parts.append(share)
            good = share == 1
        if good and item.get("position"):
            good = in_place(found, item["position"], matched)
            parts.append(float(good))
            _, k = item["position"]
            # The released server adds 1 after a wrong place: its prompt gets 3/4 and not 2/3.
            if not good and matched[k] is not None:
                parts.append(1.0)
        matched.append(found if good else None)
    return sum(parts) / len(parts)


# ---- The detector --------------------------------------------------------------------------------
def resized(image):
    """The detector's view of an image (3, H, W) in [0, 1], as in mmdet's test pipeline.

    Returns normalised pixels (1, 3, H', W'), and the part of H', W' that is not padding. The short
    side becomes 800 pixels, the long side at most 1333, and sides are padded to multiples of 32.
    """
    scale = min(800 / min(image.shape[1:]), 1333 / max(image.shape[1:]))
    h, w = (int(side * scale + 0.5) for side in image.shape[1:])
    # The 8 bits of a saved picture.
    pixels = (image[None].clamp(0, 1) * 255).round()
    pixels = F.interpolate(pixels, (h, w), mode="bilinear").round()
    mean = image.new_tensor([123.675, 116.28, 103.53]).view(3, 1, 1)
    std = image.new_tensor([58.395, 57.12, 57.375]).view(3, 1, 1)
    return F.pad((pixels - mean) / std, (0, -w % 32, 0, -h % 32)), (h, w)


@functools.cache
def load_models(device):
    """Mask2Former and CLIP in fp32, on a device."""
    from nft_clip import Clip
    from transformers import Mask2FormerForUniversalSegmentation as Mask2Former

    # The detector's training loss, which is never called here, would ask for scipy.
    with mock.patch("transformers.models.mask2former.modeling_mask2former.requires_backends"):
        detector = Mask2Former.from_pretrained(DETECTOR, dtype=torch.float32)
    return detector.to(device), Clip(CLIP).to(device)


def detect(detector, image):
    """What the detector finds in an image (3, H, W) in [0, 1]: {class: [Object]}.

    As in mmdet, of all pairs of query and class the 100 most probable count, each with its
    probability times the mean of its mask's as confidence.
    """
    pixels, (h, w) = resized(image)
    out = detector(pixels)
    masks = out.masks_queries_logits
    probability = out.class_queries_logits[0].softmax(-1)[:, :-1]
    best, index = probability.flatten().topk(min(100, probability.numel()))
    found = collections.defaultdict(list)
    for p, i in zip(best.tolist(), index.tolist(), strict=True):
        # A mask's mean can but lower it: spare us the others.
        if p <= CONFIDENCE:
            break
        query, label = divmod(i, probability.shape[1])
        # To the padded pixels, without their padding, to the image's own.
        mask = F.interpolate(masks[:, query, None], pixels.shape[2:], mode="bilinear")
        mask = F.interpolate(mask[..., :h, :w], image.shape[1:], mode="bilinear")[0, 0]
        inside = mask > 0
        if inside.any():
            score = p * mask[inside].sigmoid().mean().item()
            rows = inside.any(1).nonzero().flatten().tolist()
            columns = inside.any(0).nonzero().flatten().tolist()
            box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
            found[CLASSES[label]].append(Object(box, score, inside))
    return found


# ---- Colours: CLIP, zero-shot, on the object alone -----------------------------------------------
@functools.cache
def color_texts(clip, name):
    """Embeddings of the ten colours, (10, d), for a class: the mean over three ways to say it."""
    sentences = []
    for color in COLORS:
        sentences.append(f"a photo of a {color} {name}")
        sentences.append(f"a photo of a {color}-colored {name}")
        sentences.append(f"a photo of a {color} object")
    texts = clip.texts(sentences).unflatten(0, (len(COLORS), 3))
    return F.normalize(texts.mean(1), dim=-1)


def see_colors(clip, image, name, objects):
    """The colour of each Object in an image. CLIP sees its box, and grey #999 outside its mask."""
    grey = image.new_tensor(0x99 / 255)
    crops = []
    for (left, top, right, bottom), _, mask in objects:
        crops.append(image.where(mask, grey)[:, top:bottom, left:right])
    best = (clip.images(crops) @ color_texts(clip, name).T).argmax(1)
    return [COLORS[k] for k in best.tolist()]


# ---- The rewards ---------------------------------------------------------------------------------
@torch.no_grad()
def rate(rule, images, metadata):
    """rule's score of each of B images: one at a time, so that none depends on its neighbours."""
    detector, clip = load_models(images.device)
    scores = []
    for image, wanted in zip(images.float(), metadata, strict=True):
        colors = functools.partial(see_colors, clip, image)
        objects = keep(detect(detector, image), wanted["tag"])
        scores.append(rule(objects, wanted, colors))
    return scores


def reward(images, prompts, metadata):
    """FlowGRPO's partial score of each image: B floats, at most 1.

    images: (B, 3, H, W) in [0, 1]. prompts: B strings. metadata: B dicts of GenEval's form.
    """
    return rate(partial_score, images, metadata)


def strict(images, prompts, metadata):
    """GenEval's verdict on each image: B floats, 0.0 or 1.0. As `reward` otherwise."""
    return rate(strict_score, images, metadata)


def check(prompts, metadata):
    """Raise ValueError where a prompt lacks GenEval's metadata."""
    for prompt, wanted in zip(prompts, metadata, strict=True):
        classes = {item["class"] for item in wanted.get("include", [])}
        if wanted.get("tag") not in CATEGORIES or not classes or not classes <= set(CLASSES):
            raise ValueError(f"{prompt!r} needs GenEval's `tag` and `include`, not {wanted!r:.80}")


reward.check = check
strict.check = check


# ---- The prompts ---------------------------------------------------------------------------------
NUMBERS = {2: "two", 3: "three", 4: "four"}
INVARIABLE = ("broccoli", "scissors", "sheep", "skis")
IRREGULAR = {"person": "people", "knife": "knives", "computer mouse": "computer mice"}


def article(item):
    """An item of `include` with its article: "an umbrella", "a red cup"."""
    text = item["class"]
    if "color" in item:
        text = f"{item['color']} {text}"
    if text[0] in "aeiou":
        return f"an {text}"
    return f"a {text}"


def plural(name):
    """The plural of a class: "cups", "benches", where GenEval's own prompts have "benchs"."""
    if name in INVARIABLE:
        return name
    if name in IRREGULAR:
        return IRREGULAR[name]
    if name.endswith(("s", "x", "ch", "sh")):
        return f"{name}es"
    return f"{name}s"


def make(category, rng):
    """A prompt of a category with its metadata, drawn as in GenEval (prompts/create_prompts.py)."""
    # Nobody is asked to be blue.
    colored = category in ("colors", "color_attr")
    a, b = rng.sample(CLASSES[1:] if colored else CLASSES, 2)
    color_a, color_b = rng.sample(COLORS, 2)
    relation = rng.choice(RELATIONS)
    n = rng.randint(2, 4)
    one = {"class": a, "count": 1}
    two = {"class": b, "count": 1}
    include = {
        "single_object": [one],
        "two_object": [one, two],
        "counting": [one | {"count": n}],
        "colors": [one | {"color": color_a}],
        "position": [two, one | {"position": [relation, 0]}],
        "color_attr": [one | {"color": color_a}, two | {"color": color_b}],
    }
    row = {"tag": category, "include": include[category]}
    text = " and ".join(article(item) for item in row["include"])
    if category == "position":
        text = f"{article(one)} {relation} {article(two)}"
    if category == "counting":
        text = f"{NUMBERS[n]} {plural(a)}"
        row["exclude"] = [one | {"count": n + 1}]
    return row | {"prompt": f"a photo of {text}"}


def generate(count, seed=0, categories=CATEGORIES):
    """`count` different prompts, of each category in turn; fewer, where these have no more.

    "A and B" is "B and A": with a part held out, no held-out prompt is trained on in another order.
    """
    rng = random.Random(seed)
    rows = {}
    turns = collections.deque(categories)
    while turns and len(rows) < count:
        category = turns.popleft()
        # single_object has 80 prompts, counting 240: then they drop out.
        for _ in range(1000):
            row = make(category, rng)
            key = frozenset(json.dumps(item) for item in row["include"])
            if key not in rows:
                rows[key] = row
                turns.append(category)
                break
    return list(rows.values())


def main(argv=None):
    """Write prompts with their metadata as .jsonl, for --prompts."""
    parser = argparse.ArgumentParser(description="GenEval prompts with metadata, for --prompts.")
    parser.add_argument("file", type=Path, help="where to: a .jsonl")
    parser.add_argument("--count", type=int, default=2000, help="prompts in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--categories", nargs="+", choices=CATEGORIES, default=CATEGORIES)
    args = parser.parse_args(argv)
    rows = generate(args.count, args.seed, args.categories)
    args.file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    print(f"{args.file}: {len(rows)} prompts")


if __name__ == "__main__":
    main()
