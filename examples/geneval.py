"""GenEval as a reward: are the objects of a prompt in its picture, in number, colour and place?

    python examples/geneval.py prompts.jsonl --count 2000 --seed 0          # prompts with what they list
    python nft.py --model sd3 --prompts prompts.jsonl --reward examples/geneval.py:reward \\
        --watch examples/geneval.py:strict

`strict` is GenEval's verdict, 0 or 1 (Ghosh et al., arXiv 2310.11513; djghosh13/geneval, evaluation/
evaluate_images.py). `reward` is FlowGRPO's partial score, for training (Liu et al., arXiv 2505.05470;
yifan123/reward-server, reward_server/gen_eval.py): the mean over what the prompt lists, 1 where all of
it is there, below 0 where far too many are. FlowGRPO's own "strict" asks for exact numbers, GenEval's
only where `exclude` does. The detector is transformers' Mask2Former with its authors' weights, at the
resolution of mmdet's tests; colours are CLIP's: neither mmdet nor mmcv is needed. mmdet's weights are
another training of the same network, so a score is not exactly the published benchmark's.

Metadata, a line of the .jsonl each, is GenEval's own, so its evaluation_metadata.jsonl works as well:
    {"tag": "position", "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1,
     "position": ["left of", 0]}], "prompt": "a photo of a dog left of a cat"}
tag: the category. include: all of these, with a `color` and, relative to an earlier item, a `position`
where they have one. exclude: fewer than `count` of these. FlowGRPO trains on a mix of categories, which
repeated names make: --categories with position x 7, counting x 5, color_attr x 3, colors, two_object.
SPDX-License-Identifier: MIT
"""
import argparse
import collections
import functools
import json
import math
import pathlib
import random
import re
import sys
import typing
from unittest import mock

import torch
import torch.nn.functional as F

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import nft  # noqa: E402
from named_rewards import Clip, fetching  # noqa: E402

DETECTOR, CLIP = "facebook/mask2former-swin-small-coco-instance", "openai/clip-vit-large-patch14"
CATEGORIES = "single_object", "two_object", "counting", "colors", "position", "color_attr"
COLORS = "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"
RELATIONS = "left of", "right of", "above", "below"
# COCO's 80 classes in their order, the detector's; GenEval calls three of them by a clearer name ("tv remote")
CLASSES = re.split(r",\s+", """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat,
    traffic light, fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant,
    bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite,
    baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork, knife,
    spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch,
    potted plant, bed, dining table, toilet, tv, laptop, computer mouse, tv remote, computer keyboard, cell phone,
    microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear, hair drier,
    toothbrush""")

# ---- The rules: functions of plain detections ----------------------------------------------------
CONFIDENCE, COUNTING_CONFIDENCE = 0.3, 0.9      # a detection counts above this
MOST = 16                                       # objects a class
MARGIN = 0.1                                    # of both objects' sizes: nearer than this is not beside


class Object(typing.NamedTuple):
    """A detection: box (left, top, right, bottom) in pixels, the last two exclusive; confidence in [0, 1];
    mask, a bool tensor (H, W) of the whole image."""
    box: tuple
    score: float
    mask: torch.Tensor = None


def keep(found, tag):
    """The detections that count for a prompt of category `tag`: {class: [Object]}, the surest first.

    Boxes that overlap all stay: GenEval has a suppression (NMS), switched off by default.
    """
    least = COUNTING_CONFIDENCE if tag == "counting" else CONFIDENCE
    return {name: sorted((x for x in objects if x.score > least), key=lambda x: -x.score)[:MOST]
            for name, objects in found.items()}


def relations(a, b):
    """Where box a lies from box b, a set of at most two of RELATIONS.

    On either axis a tenth of the sum of both sizes is taken off the distance of the centres; what is left
    must be more than half of the whole distance, so that "above" lies within 60 degrees of straight up.
    """
    size = [a[k + 2] - a[k] + b[k + 2] - b[k] for k in (0, 1)]
    offset = [(a[k] + a[k + 2] - b[k] - b[k + 2]) / 2 for k in (0, 1)]
    rest = [math.copysign(max(abs(d) - MARGIN * s, 0), d) for d, s in zip(offset, size)]
    if max(map(abs, rest)) < 1e-3:
        return set()
    x, y = (d / math.hypot(*offset) for d in rest)
    return {name for name, share in zip(RELATIONS, (-x, x, -y, y)) if share > 0.5}


def in_place(objects, position, matched):
    """Whether each of the objects stands in `position`, [relation, k], to each that matched item k."""
    relation, k = position
    return matched[k] is not None and all(relation in relations(a.box, b.box) for a in objects for b in matched[k])


def strict_score(objects, metadata, colors):
    """GenEval's verdict, 0.0 or 1.0. objects: what `keep` returns. colors(class, objects): their colours.

    An item that asks for n is judged by the n surest: more than n are wrong only where `exclude` says so.
    """
    matched = []
    for item in metadata["include"]:
        top = objects.get(item["class"], [])[:item["count"]]
        good = len(top) == item["count"]
        if good and item.get("color"):
            good = set(colors(item["class"], top)) == {item["color"]}
        if good and item.get("position"):
            good = in_place(top, item["position"], matched)
        matched.append(top if good else None)
    crowded = any(len(objects.get(item["class"], [])) >= item["count"] for item in metadata.get("exclude") or [])
    return float(None not in matched and not crowded)


def partial_score(objects, metadata, colors):
    """FlowGRPO's score: the mean over the items' parts, at most 1 and without a lower bound; as strict_score.

    Parts of an item that asks for n: 1 - |n - found| / n, and for a colour or position, which are looked at
    only if exactly n are found and else give 0, the share of n in that colour, and 1 or 0 for the position.
    """
    matched, parts = [], []
    for item in metadata["include"]:
        n, found = item["count"], objects.get(item["class"], [])
        parts.append(1 - abs(n - len(found)) / n)
        good = len(found) == n
        if not good and (item.get("color") or item.get("position")):
            parts.append(0.0)
        if good and item.get("color"):
            parts.append(colors(item["class"], found).count(item["color"]) / n)
            good = parts[-1] == 1
        if good and item.get("position"):
            good = in_place(found, item["position"], matched)
            # the released server adds 1 after a wrong place as well, so that its prompt gets 3/4 and not 2/3
            parts += [1.0] if good else [0.0] if matched[item["position"][1]] is None else [0.0, 1.0]
        matched.append(found if good else None)
    return sum(parts) / len(parts)


def check(prompt, metadata):
    """Raise nft.Failure unless the metadata of `prompt` is GenEval's."""
    def fits(item, earlier):
        relation, k = item.get("position") or (RELATIONS[0], 0)
        return (item["class"] in CLASSES and type(item["count"]) is int and item["count"] > 0
                and (not item.get("color") or item["color"] in COLORS)
                and (not item.get("position") or relation in RELATIONS and k in range(earlier)))
    try:
        include, exclude = metadata["include"], metadata.get("exclude") or []
        good = metadata["tag"] in CATEGORIES and len(include) > 0 and all(
            fits(item, k) for k, item in [*enumerate(include), *((0, item) for item in exclude)])
    except (LookupError, TypeError, ValueError, AttributeError):
        good = False
    if not good:
        nft.refuse(f"prompt {prompt!r}: its metadata must be GenEval's, tag and include [{{class, count, color?, "
                   f"position?}}] with its names, and is {metadata!r:.300}; make prompts with examples/geneval.py")


# ---- The detector --------------------------------------------------------------------------------
def resized(image):
    """Detector's view of an image (3, H, W) in [0, 1]: normalised pixels (1, 3, H', W'), and the part of H', W'
    that is not padding. As mmdet's test pipeline: short side 800, long side at most 1333, sides padded to 32s.
    """
    scale = min(800 / min(image.shape[1:]), 1333 / max(image.shape[1:]))
    h, w = (int(n * scale + 0.5) for n in image.shape[1:])
    pixels = (image[None].clamp(0, 1) * 255).round()                # the 8 bits of a saved picture
    pixels = F.interpolate(pixels, (h, w), mode="bilinear").round()
    mean, std = image.new_tensor([[123.675, 116.28, 103.53], [58.395, 57.12, 57.375]]).view(2, 3, 1, 1)
    return F.pad((pixels - mean) / std, (0, -w % 32, 0, -h % 32)), (h, w)


def instances(classes, masks, padded, inner, size):
    """Detections from logits of Q queries, classes (Q, C + 1) and masks (Q, h, w): {class: [Object]}.

    Of all pairs of query and class the 100 most probable, each with its probability times the mean of its
    mask's as confidence. padded, inner, size: heights and widths of the detector's view, of what of it is
    no padding, and of the image, where mask and box are found, in these steps, as in mmdet.
    """
    probability = classes.softmax(-1)[:, :-1]
    best, index = probability.flatten().topk(min(100, probability.numel()))
    index = index[best > CONFIDENCE]                        # a mask's mean can but lower it: spare us the others
    query, label = index // probability.shape[1], index % probability.shape[1]
    found = collections.defaultdict(list)
    for q, name, p in zip(query.tolist(), label.tolist(), probability[query, label].tolist()):
        mask = F.interpolate(masks[None, None, q], padded, mode="bilinear")[..., :inner[0], :inner[1]]
        mask = F.interpolate(mask, size, mode="bilinear")[0, 0]
        inside = mask > 0
        if inside.any():
            rows, columns = (inside.any(k).nonzero().flatten().tolist() for k in (1, 0))
            box = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
            found[CLASSES[name]].append(Object(box, p * mask[inside].sigmoid().mean().item(), inside))
    return dict(found)


def load_detector(device):
    """Mask2Former in fp32, (1, 3, H, W) -> the logits that `instances` takes."""
    from transformers import Mask2FormerForUniversalSegmentation as Mask2Former
    code = sys.modules[Mask2Former.__module__]
    # its training loss, never called here, asks for scipy
    with fetching(DETECTOR), mock.patch.object(code, "requires_backends", create=True):
        model = Mask2Former.from_pretrained(DETECTOR, dtype=torch.float32).to(device)
        names = model.config.id2label
        if len(names) != 80 or (names[0], names[79]) != (CLASSES[0], CLASSES[79]):     # spellings between vary
            raise ValueError(f"{len(names)} classes from {names[0]} on, not COCO's 80")

    def detect(pixels):
        out = model(pixels)
        return out.class_queries_logits[0], out.masks_queries_logits[0]
    return detect


# ---- Colours: CLIP, zero-shot, on the object alone -----------------------------------------------
def cut_out(image, found):
    """The pixels of an object's box, (3, h, w), with those outside its mask grey: #999, 153 of 255."""
    left, top, right, bottom = found.box
    return image.where(found.mask, image.new_tensor(153 / 255))[:, top:bottom, left:right]


def color_texts(clip, name):
    """An embedding a colour, (10, d), for objects of a class: the mean over three ways to say it."""
    ways = "a photo of a {0} {1}", "a photo of a {0}-colored {1}", "a photo of a {0} object"
    texts = clip.texts([way.format(color, name) for color in COLORS for way in ways])
    return F.normalize(texts.unflatten(0, (len(COLORS), len(ways))).mean(1), dim=-1)


# ---- The rewards ---------------------------------------------------------------------------------
@functools.cache
def models(device):
    """The detector, CLIP, and color_texts by class."""
    clip = Clip(CLIP, device)
    return load_detector(device), clip, functools.cache(functools.partial(color_texts, clip))


@torch.no_grad()
def rate(rule, images, prompts, metadata):
    """rule's score of each of B images: one at a time, so that none depends on its neighbours."""
    for prompt, wanted in zip(prompts, metadata):
        check(prompt, wanted)
    detector, clip, texts = models(images.device)
    scores = []
    for image, wanted in zip(images.float(), metadata):
        def colors(name, objects, image=image):
            seen = clip.images([cut_out(image, x) for x in objects])
            return [COLORS[k] for k in (seen @ texts(name).T).argmax(1).tolist()]
        pixels, inner = resized(image)
        found = instances(*detector(pixels), pixels.shape[2:], inner, image.shape[1:])
        scores.append(rule(keep(found, wanted["tag"]), wanted, colors))
    return scores


def reward(images, prompts, metadata):
    """FlowGRPO's partial score of each image, at most 1 (nft.py's reward interface)."""
    return rate(partial_score, images, prompts, metadata)


def strict(images, prompts, metadata):
    """GenEval's verdict on each image, 0.0 or 1.0 (nft.py's reward interface)."""
    return rate(strict_score, images, prompts, metadata)


# ---- The prompts ---------------------------------------------------------------------------------
def article(name):
    """"an umbrella", "a cup"."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def plural(name):
    """"cups", "benches": GenEval's own prompts have "benchs" and "scissorses"."""
    *rest, last = name.split(" ")
    odd = {"person": "people", "mouse": "mice", "knife": "knives", "sheep": "sheep", "skis": "skis",
           "scissors": "scissors", "broccoli": "broccoli"}
    return " ".join([*rest, odd.get(last, last + ("es" if last.endswith(("s", "x", "ch", "sh")) else "s"))])


def make(category, rng):
    """A prompt of a category with its metadata, drawn as in GenEval (prompts/create_prompts.py)."""
    colored = category in ("colors", "color_attr")
    a, b = rng.sample(CLASSES[1:] if colored else CLASSES, 2)           # nobody is asked to be blue
    color_a, color_b = rng.sample(COLORS, 2)
    one, two, extra = {"class": a, "count": 1}, {"class": b, "count": 1}, {}
    if category == "single_object":
        include, text = [one], article(a)
    elif category == "two_object":
        include, text = [one, two], f"{article(a)} and {article(b)}"
    elif category == "counting":
        n = rng.randint(2, 4)
        include, text = [one | {"count": n}], f"{('two', 'three', 'four')[n - 2]} {plural(a)}"
        extra = {"exclude": [one | {"count": n + 1}]}
    elif category == "colors":
        include, text = [one | {"color": color_a}], f"{article(color_a)} {a}"
    elif category == "position":
        relation = rng.choice(RELATIONS)
        include, text = [two, one | {"position": [relation, 0]}], f"{article(a)} {relation} {article(b)}"
    else:
        include = [one | {"color": color_a}, two | {"color": color_b}]
        text = f"{article(color_a)} {a} and {article(color_b)} {b}"
    return {"tag": category, "include": include, **extra, "prompt": f"a photo of {text}"}


def generate(count, seed=0, categories=CATEGORIES):
    """`count` different prompts, of each category in turn; fewer, where these have no more.

    "A and B" is "B and A": with a part held out, no held-out prompt is trained on in the other order.
    """
    rng, rows, seen, turns = random.Random(seed), [], set(), collections.deque(categories)
    while turns and len(rows) < count:
        category = turns.popleft()
        for _ in range(1000):               # single_object has 80 prompts, counting 240: then it drops out
            row = make(category, rng)
            key = frozenset(json.dumps(item) for item in row["include"])
            if key not in seen:
                seen.add(key)
                rows.append(row)
                turns.append(category)
                break
    return rows


def main(argv=None):
    """Command line: write prompts with their metadata as .jsonl, for --prompts."""
    parser = argparse.ArgumentParser(description="GenEval prompts with metadata, for nft.py's --prompts.")
    parser.add_argument("file", help="where to: must end with .jsonl")
    parser.add_argument("--count", type=int, default=2000, help="prompts in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--categories", nargs="+", choices=CATEGORIES, default=CATEGORIES, metavar="CATEGORY",
                        help=f"in equal shares; a name may be repeated. {', '.join(CATEGORIES)}")
    args = parser.parse_args(argv)
    rows = generate(args.count, args.seed, args.categories)
    if not 0 < len(rows) == args.count:
        parser.error(f"--count {args.count}: must be from 1 to {len(rows)} for these categories; correct it")
    if not args.file.endswith(".jsonl"):
        parser.error(f"{args.file}: must end with .jsonl, or nft.py takes it for plain prompts; rename it")
    try:
        pathlib.Path(args.file).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    except OSError as e:
        parser.error(f"{args.file}: must be writable ({e}); take another place")
    print(f"{args.file}: {dict(collections.Counter(row['tag'] for row in rows))}")


if __name__ == "__main__":
    main()
