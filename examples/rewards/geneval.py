"""GenEval as a reward: are the objects of a prompt in its picture, in number, colour and place?

    python examples/rewards/geneval.py prompts.jsonl --count 2000   # prompts with what they list
    python nft.py --model sd3 --prompts prompts.jsonl --reward geneval \\
        --watch examples/rewards/geneval.py:strict

`strict` is GenEval's verdict, 0 or 1 (Ghosh et al., arXiv 2310.11513; djghosh13/geneval,
evaluation/evaluate_images.py). `reward` is FlowGRPO's partial score, for training (Liu et al.,
arXiv 2505.05470; yifan123/reward-server, reward_server/gen_eval.py): the mean over what the prompt
lists, 1 where all of it is there, below 0 where far too many are. FlowGRPO's own "strict" asks for
exact numbers, GenEval's only where `exclude` does. The detector is transformers' Mask2Former with
its authors' weights, at the resolution of mmdet's tests, and colours are CLIP's: neither mmdet nor
mmcv is needed. mmdet's weights are another training of the same network, so a score is not exactly
the published benchmark's.

Metadata, a line of the .jsonl each, is GenEval's own, so its evaluation_metadata.jsonl works, too:
    {"tag": "position", "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1,
     "position": ["left of", 0]}], "prompt": "a photo of a dog left of a cat"}
tag: the category. include: all of these, with a `color` and, relative to an earlier item, a
`position` where they have one. exclude: fewer than `count` of these. FlowGRPO trains on a mix of
categories, which repeated names make: --categories with position x 7, counting x 5, color_attr x 3,
colors, two_object.
SPDX-License-Identifier: MIT
"""

import argparse
import collections
import functools
import json
import math
import operator
import random
import sys
import typing
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from clip import Clip, load

DETECTOR = "facebook/mask2former-swin-small-coco-instance"
CLIP = "openai/clip-vit-large-patch14"
CATEGORIES = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
# COCO's 80 classes in their order, which is the detector's. GenEval calls three of them by a
# clearer name, such as "tv remote".
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
# Objects a class.
MOST = 16
# Nearer than this share of both objects' sizes is not beside.
MARGIN = 0.1


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

    Boxes that overlap all stay: GenEval has a suppression (NMS), switched off by default.
    """
    least = COUNTING_CONFIDENCE if tag == "counting" else CONFIDENCE
    kept = {}
    for name, objects in found.items():
        sure = [x for x in objects if x.score > least]
        sure.sort(key=operator.attrgetter("score"), reverse=True)
        kept[name] = sure[:MOST]
    return kept


def relations(a, b):
    """Where box a lies from box b: a set of at most two of RELATIONS.

    On either axis a tenth of the sum of both sizes is taken off the distance of the centres. What
    is left must be more than half of the whole distance, so that "above" lies within 60 degrees of
    straight up.
    """
    distances = []
    rests = []
    for k in (0, 1):
        size = a[k + 2] - a[k] + b[k + 2] - b[k]
        distance = (a[k] + a[k + 2] - b[k] - b[k + 2]) / 2
        rest = max(abs(distance) - MARGIN * size, 0)
        distances.append(distance)
        rests.append(math.copysign(rest, distance))
    if max(map(abs, rests)) < 1e-3:
        return set()
    x, y = (rest / math.hypot(*distances) for rest in rests)
    shares = {"left of": -x, "right of": x, "above": -y, "below": y}
    return {name for name, share in shares.items() if share > 0.5}


def in_place(objects, position, matched):
    """Whether each of the objects stands in `position` to each that matched an earlier item.

    position: [relation, number of the item]. matched: its objects for each item, None for none.
    """
    relation, k = position
    if matched[k] is None:
        return False
    for a in objects:
        for b in matched[k]:
            if relation not in relations(a.box, b.box):
                return False
    return True


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
            parts += position_parts(good, item["position"], matched)
        matched.append(found if good else None)
    return sum(parts) / len(parts)


def position_parts(good, position, matched):
    """The parts of a position in partial_score."""
    _, k = position
    if good:
        return [1.0]
    if matched[k] is None:
        return [0.0]
    # The released server adds 1 after a wrong place as well: its prompt gets 3/4 and not 2/3.
    return [0.0, 1.0]


# ---- Metadata ------------------------------------------------------------------------------------
def is_item(item, earlier):
    """Whether an item of `include` or `exclude`, after `earlier` others, is GenEval's."""
    if not isinstance(item, dict):
        return False
    count = item.get("count")
    if item.get("class") not in CLASSES or type(count) is not int or count < 1:
        return False
    # A dataset of one schema may fill with null what an item does not have.
    if item.get("color") and item["color"] not in COLORS:
        return False
    position = item.get("position")
    if not position:
        return True
    if not isinstance(position, list) or len(position) != 2:
        return False
    relation, k = position
    return relation in RELATIONS and k in range(earlier)


def is_geneval(metadata):
    """Whether the metadata of a prompt are GenEval's."""
    include = metadata.get("include")
    exclude = metadata.get("exclude") or []
    if metadata.get("tag") not in CATEGORIES:
        return False
    if not isinstance(include, list) or not isinstance(exclude, list):
        return False
    included = [is_item(item, k) for k, item in enumerate(include)]
    excluded = [is_item(item, 0) for item in exclude]
    return bool(include) and all(included + excluded)


def check(prompt, metadata):
    """Raise ValueError unless the metadata of `prompt` are GenEval's."""
    if not is_geneval(metadata):
        raise ValueError(
            f"prompt {prompt!r}: its metadata must be GenEval's, `tag` and `include`, and are "
            f"{metadata!r:.80}; make prompts with examples/rewards/geneval.py"
        )


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
    padding = (0, -w % 32, 0, -h % 32)
    return F.pad((pixels - mean) / std, padding), (h, w)


def instances(classes, masks, padded, inner, size):
    """Detections from the logits of Q queries, classes (Q, C + 1) and masks (Q, h, w), as in mmdet.

    Of all pairs of query and class the 100 most probable count, each with its probability times the
    mean of its mask's as confidence. padded, inner, size: heights and widths of the detector's
    view, of what of it is no padding, and of the image. Returns {class: [Object]}.
    """
    probability = classes.softmax(-1)[:, :-1]
    best, index = probability.flatten().topk(min(100, probability.numel()))
    found = collections.defaultdict(list)
    for p, i in zip(best.tolist(), index.tolist(), strict=True):
        # A mask's mean can but lower it: spare us the others.
        if p <= CONFIDENCE:
            continue
        query, label = divmod(i, probability.shape[1])
        mask = F.interpolate(masks[None, None, query], padded, mode="bilinear")
        mask = mask[..., : inner[0], : inner[1]]
        mask = F.interpolate(mask, size, mode="bilinear")[0, 0]
        inside = mask > 0
        if inside.any():
            score = p * mask[inside].sigmoid().mean().item()
            detected = Object(bounding_box(inside), score, inside)
            found[CLASSES[label]].append(detected)
    return dict(found)


def bounding_box(mask):
    """left, top, right, bottom of a bool mask (H, W), the last two exclusive."""
    rows = mask.any(1).nonzero().flatten().tolist()
    columns = mask.any(0).nonzero().flatten().tolist()
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


def make_detector(repository):
    """Mask2Former in fp32."""
    from transformers import Mask2FormerForUniversalSegmentation as Mask2Former

    code = sys.modules[Mask2Former.__module__]
    # Its training loss, which is never called here, would ask for scipy.
    with mock.patch.object(code, "requires_backends", create=True):
        model = Mask2Former.from_pretrained(repository, dtype=torch.float32)
    names = model.config.id2label
    # Spellings of those between vary.
    if len(names) != 80 or [names[0], names[79]] != [CLASSES[0], CLASSES[79]]:
        raise ValueError(f"{len(names)} classes from {names[0]} on, not COCO's 80")
    return model


def load_detector(device):
    """Mask2Former on a device. Raises RuntimeError where it does not load."""
    return load(make_detector, DETECTOR, device)


def detect(detector, image):
    """What the detector finds in an image (3, H, W) in [0, 1]: {class: [Object]}."""
    pixels, inner = resized(image)
    out = detector(pixels)
    classes = out.class_queries_logits[0]
    masks = out.masks_queries_logits[0]
    return instances(classes, masks, pixels.shape[2:], inner, image.shape[1:])


# ---- Colours: CLIP, zero-shot, on the object alone -----------------------------------------------
def cut_out(image, found):
    """The pixels of an Object's box, (3, h, w): those outside its mask are grey, #999."""
    left, top, right, bottom = found.box
    grey = image.new_tensor(153 / 255)
    return image.where(found.mask, grey)[:, top:bottom, left:right]


def color_texts(clip, name):
    """An embedding of each of ten colours, (10, d), for objects of a class.

    It is the mean over three ways to say it.
    """
    sentences = []
    for color in COLORS:
        sentences.append(f"a photo of a {color} {name}")
        sentences.append(f"a photo of a {color}-colored {name}")
        sentences.append(f"a photo of a {color} object")
    texts = clip.texts(sentences).unflatten(0, (len(COLORS), 3))
    return F.normalize(texts.mean(1), dim=-1)


def see_colors(clip, texts, image, name, objects):
    """The colour of each Object in an image. texts: {class: color_texts}, which this fills."""
    if name not in texts:
        texts[name] = color_texts(clip, name)
    seen = clip.images([cut_out(image, x) for x in objects])
    best = (seen @ texts[name].T).argmax(1)
    return [COLORS[k] for k in best.tolist()]


# ---- The rewards ---------------------------------------------------------------------------------
@torch.no_grad()
def rate(rule, images, prompts, metadata):
    """rule's score of each of B images: one at a time, so that none depends on its neighbours."""
    for prompt, wanted in zip(prompts, metadata, strict=True):
        check(prompt, wanted)
    detector = load_detector(images.device)
    clip = Clip(CLIP, images.device)
    texts = {}
    scores = []
    for image, wanted in zip(images.float(), metadata, strict=True):
        colors = functools.partial(see_colors, clip, texts, image)
        objects = keep(detect(detector, image), wanted["tag"])
        scores.append(rule(objects, wanted, colors))
    return scores


def reward(images, prompts, metadata):
    """FlowGRPO's partial score of each image: B floats, at most 1.

    images: (B, 3, H, W) in [0, 1]. prompts: B strings. metadata: B dicts of GenEval's form. Raises
    ValueError for another form, RuntimeError where a model does not load.
    """
    return rate(partial_score, images, prompts, metadata)


def strict(images, prompts, metadata):
    """GenEval's verdict on each image: B floats, 0.0 or 1.0. As `reward` otherwise."""
    return rate(strict_score, images, prompts, metadata)


# ---- The prompts ---------------------------------------------------------------------------------
NUMBERS = {2: "two", 3: "three", 4: "four"}
# Plurals that are not made by rule.
IRREGULAR = {
    "person": "people",
    "mouse": "mice",
    "knife": "knives",
    "sheep": "sheep",
    "skis": "skis",
    "scissors": "scissors",
    "broccoli": "broccoli",
}


def article(name):
    """A noun with its article: "an umbrella", "a cup"."""
    if name[0] in "aeiou":
        return f"an {name}"
    return f"a {name}"


def plural(name):
    """A noun's plural: "cups", "benches", where GenEval's own prompts have "benchs"."""
    first, space, last = name.rpartition(" ")
    if last in IRREGULAR:
        last = IRREGULAR[last]
    elif last.endswith(("s", "x", "ch", "sh")):
        last += "es"
    else:
        last += "s"
    return first + space + last


def make(category, rng):
    """A prompt of a category with its metadata, drawn as in GenEval (prompts/create_prompts.py)."""
    # Nobody is asked to be blue.
    colored = category in ("colors", "color_attr")
    a, b = rng.sample(CLASSES[1:] if colored else CLASSES, 2)
    color_a, color_b = rng.sample(COLORS, 2)
    one = {"class": a, "count": 1}
    two = {"class": b, "count": 1}
    exclude = []
    if category == "single_object":
        include = [one]
        text = article(a)
    elif category == "two_object":
        include = [one, two]
        text = f"{article(a)} and {article(b)}"
    elif category == "counting":
        n = rng.randint(2, 4)
        include = [one | {"count": n}]
        exclude = [one | {"count": n + 1}]
        text = f"{NUMBERS[n]} {plural(a)}"
    elif category == "colors":
        include = [one | {"color": color_a}]
        text = f"{article(color_a)} {a}"
    elif category == "position":
        relation = rng.choice(RELATIONS)
        include = [two, one | {"position": [relation, 0]}]
        text = f"{article(a)} {relation} {article(b)}"
    else:
        include = [one | {"color": color_a}, two | {"color": color_b}]
        text = f"{article(color_a)} {a} and {article(color_b)} {b}"
    row = {"tag": category, "include": include}
    if exclude:
        row["exclude"] = exclude
    return row | {"prompt": f"a photo of {text}"}


def make_new(category, rng, seen):
    """A prompt, as `make`, that is not in `seen`, and then is; None where none can be found.

    "A and B" is "B and A": with a part held out, no held-out prompt is trained on in another order.
    """
    for _ in range(1000):
        row = make(category, rng)
        key = frozenset(json.dumps(item) for item in row["include"])
        if key not in seen:
            seen.add(key)
            return row
    return None


def generate(count, seed=0, categories=CATEGORIES):
    """`count` different prompts, of each category in turn; fewer, where these have no more."""
    rng = random.Random(seed)
    rows = []
    seen = set()
    turns = collections.deque(categories)
    while turns and len(rows) < count:
        category = turns.popleft()
        row = make_new(category, rng, seen)
        # single_object has 80 prompts, counting 240: then they drop out.
        if row is not None:
            rows.append(row)
            turns.append(category)
    return rows


def make_parser():
    """The parser of the command line."""
    parser = argparse.ArgumentParser(description="GenEval prompts with metadata, for --prompts.")
    parser.add_argument("file", help="where to: must end with .jsonl")
    parser.add_argument("--count", type=int, default=2000, help="prompts in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--categories",
        nargs="+",
        choices=CATEGORIES,
        default=CATEGORIES,
        metavar="CATEGORY",
        help=f"in equal shares; a name may be repeated. {', '.join(CATEGORIES)}",
    )
    return parser


def main(argv=None):
    """Write prompts with their metadata as .jsonl, for --prompts."""
    parser = make_parser()
    args = parser.parse_args(argv)
    rows = generate(args.count, args.seed, args.categories)
    if args.count < 1:
        parser.error(f"--count {args.count}: must be at least 1; correct it")
    if len(rows) < args.count:
        rule = f"must be from 1 to {len(rows)} for these categories"
        parser.error(f"--count {args.count}: {rule}; correct it")
    if not args.file.endswith(".jsonl"):
        rule = "must end with .jsonl, or nft.py takes it for plain prompts"
        parser.error(f"{args.file}: {rule}; rename it")
    lines = [json.dumps(row) + "\n" for row in rows]
    try:
        Path(args.file).write_text("".join(lines), "utf-8")
    except OSError as error:
        parser.error(f"{args.file}: must be writable ({error}); take another place")
    counts = collections.Counter(row["tag"] for row in rows)
    print(f"{args.file}: {dict(counts)}")


if __name__ == "__main__":
    main()
