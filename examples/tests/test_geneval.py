"""GenEval's rules on detections made by hand, its prompts, and the whole on untrained models.

    python -m pytest examples/tests/test_geneval.py

SPDX-License-Identifier: MIT
"""

import functools
import json
import re
from types import SimpleNamespace

import common  # noqa: F401 (offline, and the hub's cache is one of our own)
import geneval
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
import untrained
from PIL import Image
from torch.testing import assert_close

import nft

# COCO's categories, in order
COCO = """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light,
fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear,
zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball,
kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup,
fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut,
cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, mouse, remote, keyboard,
cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear,
hair drier, toothbrush"""
COCO = COCO.replace("\n", " ").split(", ")
IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def at(x, y, score=0.99, size=10):
    """An object of `size` x `size` pixels around (x, y)."""
    half = size / 2
    return geneval.Object((x - half, y - half, x + half, y + half), score)


def apart(n, score=0.99):
    """n objects, far from each other."""
    return [at(100 * k, 0, score) for k in range(n)]


def some(**numbers):
    """Detections {class: [Object]}, so many of each class."""
    return {name: apart(n) for name, n in numbers.items()}


def along(**places):
    """Detections {class: [Object]}, at these x of a line."""
    return {name: [at(x, 0) for x in xs] for name, xs in places.items()}


def item(name, count=1, **more):
    """What a prompt lists: `count` of a class, maybe with a color or position."""
    return {"class": name, "count": count, **more}


def wants(tag, *include, exclude=None):
    """A prompt's metadata."""
    metadata = {"tag": tag, "include": list(include)}
    if exclude:
        metadata["exclude"] = [exclude]
    return metadata


def scores(metadata, found, **colors):
    """(strict, partial) of detections, which CLIP sees in `colors`, {class: [color]}."""
    kept = geneval.keep(found, metadata["tag"])

    def look(name, objects):
        return [colors[name][found[name].index(x)] for x in objects]

    strict = geneval.strict_score(kept, metadata, look)
    partial = geneval.partial_score(kept, metadata, look)
    return strict, partial


# ---- Detections that count -----------------------------------------------------------------------
@pytest.mark.parametrize("tag", geneval.CATEGORIES)
def test_confidence(tag):
    """A detection counts above, not at, 0.3, and for counting 0.9; the surest come first."""
    dogs = [at(0, 0, score) for score in (0.2, 0.3, 0.9, 0.31, 0.899, 0.95)]
    kept = geneval.keep({"dog": dogs}, tag)["dog"]
    expected = [0.95, 0.9, 0.899, 0.31]
    if tag == "counting":
        expected = [0.95]
    assert [x.score for x in kept] == expected


def test_most_objects():
    """Of each class the 16 surest count, and overlapping ones do: nothing is suppressed."""
    dogs = [at(0, 0, 0.5 + k / 100) for k in range(20)]
    kept = geneval.keep({"dog": dogs, "cat": apart(3)}, "single_object")
    assert kept["dog"] == dogs[:3:-1]
    assert len(kept["cat"]) == 3


# ---- Positions -----------------------------------------------------------------------------------
RELATIONS = [
    (30, 0, {"right of"}),
    (-30, 0, {"left of"}),
    (0, -30, {"above"}),
    (0, 30, {"below"}),
    # (10 - 2) / 14.1 = 0.57 on both axes
    (10, -10, {"right of", "above"}),
    # 18 / 23.3 = 0.77 and 10 / 23.3 = 0.43
    (20, 12, {"right of"}),
    # (4 - 2) / 4 is 0.5, not more, and (4.1 - 2) / 4.1 = 0.51
    (4, 0, set()),
    (4.1, 0, {"right of"}),
    # The margin itself, and the same place
    (0, 2, set()),
    (0, 0, set()),
]


@pytest.mark.parametrize(("x", "y", "expected"), RELATIONS)
def test_relations(x, y, expected):
    """Beyond a tenth of both sizes, here 2, more than half of the distance must remain."""
    assert geneval.relations(at(50 + x, 50 + y).box, at(50, 50).box) == expected


def test_relations_use_each_axis_own_size():
    """A wide object must be farther to the side, not farther up; "below" mirrors "above"."""
    # The margins are 10 and 2 of 19: 9 / 26.9 = 0.33 and 17 / 26.9 = 0.63
    wide = (0, 0, 90, 10)
    small = at(45 + 19, 5 - 19).box
    assert geneval.relations(small, wide) == {"above"}
    assert geneval.relations(wide, small) == {"below"}


# ---- Scores by hand: GenEval's verdict, FlowGRPO's partial score ---------------------------------
RED_DOG = item("dog", color="red")
BLUE_CAT = item("cat", color="blue")
LEFT_DOG = item("dog", position=["left of", 0])

ONE_OBJECT = [
    (0, 0, 0),
    (1, 1, 1),
    (2, 1, 0),
    (3, 1, -1),
    (99, 1, -14),
]


@pytest.mark.parametrize(("dogs", "strict", "partial"), ONE_OBJECT)
def test_one_object(dogs, strict, partial):
    """Too many are right for GenEval; the partial score loses 1 for each, up to 16 of them."""
    metadata = wants("single_object", item("dog"))
    assert scores(metadata, some(dog=dogs, cat=1)) == (strict, partial)


def test_excluded_object():
    """What `exclude` names makes GenEval's verdict 0, and does nothing to the partial score."""
    metadata = wants("single_object", item("dog"), exclude=item("cat"))
    assert scores(metadata, some(dog=1)) == (1, 1)
    assert scores(metadata, some(dog=1, cat=1)) == (0, 1)


TWO_OBJECTS = [
    (1, 1, 1),
    (0, 0, 0.5),
    (3, 1, 0),
]


@pytest.mark.parametrize(("cats", "strict", "partial"), TWO_OBJECTS)
def test_two_objects(cats, strict, partial):
    """GenEval wants all that is listed; the partial score is the mean over it."""
    metadata = wants("two_object", item("dog"), item("cat"))
    assert scores(metadata, some(dog=1, cat=cats)) == (strict, partial)


COUNTS = [
    (4, 1, 1),
    (3, 0, 0.75),
    (5, 0, 0.75),
    (9, 0, -0.25),
]


@pytest.mark.parametrize(("dogs", "strict", "partial"), COUNTS)
def test_counting(dogs, strict, partial):
    """GenEval wants four, as five are excluded; the partial score is 1 - |4 - found| / 4."""
    metadata = wants("counting", item("dog", 4), exclude=item("dog", 5))
    assert scores(metadata, some(dog=dogs)) == (strict, partial)


def test_counting_without_exclude():
    """Where `exclude` doesn't say so, too many are right for GenEval."""
    metadata = wants("counting", item("dog", 4))
    assert scores(metadata, some(dog=5)) == (1, 0.75)


def test_unsure_objects():
    """What is seen with 0.9 is not there for counting, and is for all else."""
    found = {"dog": apart(4) + apart(3, score=0.9)}
    metadata = wants("counting", item("dog", 4), exclude=item("dog", 5))
    assert scores(metadata, found) == (1, 1)
    metadata["tag"] = "two_object"
    assert scores(metadata, found) == (0, 0.25)


def test_color():
    """A wrong colour makes GenEval's verdict 0, and is one of two parts of the partial score."""
    metadata = wants("colors", RED_DOG)
    assert scores(metadata, some(dog=1), dog=["red"]) == (1, 1)
    assert scores(metadata, some(dog=1), dog=["blue"]) == (0, 0.5)
    assert scores(metadata, some(dog=0)) == (0, 0)


def test_color_of_the_surest():
    """Of too many GenEval looks at the surest; the partial score looks at none."""
    metadata = wants("colors", RED_DOG)
    found = {"dog": [at(0, 0, 0.5), at(0, 0, 0.6)]}
    assert scores(metadata, found, dog=["blue", "red"]) == (1, 0)
    assert scores(metadata, found, dog=["red", "blue"]) == (0, 0)


def test_color_of_two():
    """GenEval wants both in the colour; the partial score gives their share, beside the number."""
    metadata = wants("colors", item("dog", 2, color="red"))
    assert scores(metadata, some(dog=2), dog=["red", "blue"]) == (0, 0.75)


PLACES = [
    ([50], [0], 1, 1),
    # FlowGRPO's server adds 1 after a wrong place: (1 + 1 + 0 + 1) / 4
    ([0], [50], 0, 0.75),
    # (0 + 1 + 0) / 3 and (1 + 0 + 0) / 3
    ([], [50], 0, 1 / 3),
    ([50], [], 0, 1 / 3),
]


@pytest.mark.parametrize(("cats", "dogs", "strict", "partial"), PLACES)
def test_position(cats, dogs, strict, partial):
    """A position is one more part: that of an item's objects to those of the earlier item."""
    metadata = wants("position", item("cat"), LEFT_DOG)
    assert scores(metadata, along(cat=cats, dog=dogs)) == (strict, partial)


def test_position_of_the_surest():
    """Of too many GenEval looks at the surest; the partial score looks at none."""
    metadata = wants("position", item("cat"), LEFT_DOG)
    found = along(cat=[50], dog=[0])
    unsure = at(99, 0, score=0.4)
    found["dog"].append(unsure)
    assert scores(metadata, found) == (1, 1 / 3)
    found = along(cat=[50], dog=[99])
    unsure = at(0, 0, score=0.4)
    found["dog"].append(unsure)
    assert scores(metadata, found) == (0, 1 / 3)


def test_position_to_two():
    """An object must stand left of both, not of one of them."""
    metadata = wants("position", item("cat", 2), LEFT_DOG)
    assert scores(metadata, along(cat=[50, -50], dog=[0])) == (0, 0.75)


TWO_COLORS = [
    ("red", "blue", 1, 1),
    ("blue", "red", 0, 0.5),
    ("red", "red", 0, 0.75),
]


@pytest.mark.parametrize(("dog", "cat", "strict", "partial"), TWO_COLORS)
def test_two_colors(dog, cat, strict, partial):
    """Each of two objects has its own colour: swapped ones are wrong."""
    metadata = wants("color_attr", RED_DOG, BLUE_CAT)
    found = some(dog=1, cat=1)
    assert scores(metadata, found, dog=[dog], cat=[cat]) == (strict, partial)


def test_two_colors_of_one_object():
    """A missing object has no colour either: it gives 0 for both."""
    metadata = wants("color_attr", RED_DOG, BLUE_CAT)
    assert scores(metadata, some(dog=1), dog=["red"]) == (0, 0.5)


def test_color_before_position():
    """A wrong colour ends an item, and what stands beside it has nothing to stand beside."""
    found = along(cat=[50], dog=[0])
    metadata = wants("position", BLUE_CAT, LEFT_DOG)
    assert scores(metadata, found, cat=["red"]) == (0, 0.5)
    metadata = wants("position", item("cat"), LEFT_DOG | {"color": "red"})
    assert scores(metadata, found, dog=["blue"]) == (0, 2 / 3)


# ---- From logits and pixels to detections --------------------------------------------------------
def class_logits(**probabilities):
    """Logits of the 80 classes and of "nothing", which has the rest."""
    values = torch.full((81,), 1e-9)
    for name, probability in probabilities.items():
        values[geneval.CLASSES.index(name)] = probability
    values[80] = 1 - values[:80].sum()
    return values.log()


def small_detections(padded, inner, size):
    """A dog, a cat that may be a cow, and two queries that find nothing, in masks of 8 x 12."""
    dog = class_logits(dog=0.9)
    cat_or_cow = class_logits(cat=0.55, cow=0.44)
    empty = class_logits(dog=0.8)
    unsure = class_logits(dog=0.29)
    masks = torch.full((4, 8, 12), -9.0)
    masks[0, 2:5, 1:4] = 2.0
    masks[1] = -50.0
    # On past the image's corner, into the padding
    masks[1, 6:, 5:] = 50.0
    masks[3] = 50.0
    classes = torch.stack([dog, cat_or_cow, empty, unsure])
    return geneval.instances(classes, masks, padded, inner, size)


def test_instances():
    """A detection's confidence is its class's probability times the mean of its mask's."""
    found = small_detections((8, 12), (8, 10), (8, 10))
    ((dog,), (cat,), (cow,)) = (found.pop(name) for name in ("dog", "cat", "cow"))
    assert not found
    assert dog.score == pytest.approx(0.9 / (1 + np.exp(-2)))
    assert cat.score == pytest.approx(0.55)
    assert cow.score == pytest.approx(0.44)


def test_boxes():
    """A box is its mask's, in the image's own pixels and up to the image's border."""
    found = small_detections((8, 12), (8, 10), (8, 10))
    assert found["dog"][0].box == (1, 2, 4, 5)
    assert found["cat"][0].box == found["cow"][0].box == (5, 6, 10, 8)
    expected = torch.zeros(8, 10, dtype=torch.bool)
    expected[2:5, 1:4] = True
    assert torch.equal(found["dog"][0].mask, expected)
    larger = small_detections((16, 24), (16, 20), (24, 30))
    assert larger["cat"][0].box == (15, 18, 30, 24)


def test_most_probable_hundred():
    """Of all pairs of query and class at most a hundred become detections, the most probable."""
    order = torch.randperm(150, generator=torch.Generator().manual_seed(0))
    classes = torch.full((150, 81), -20.0)
    classes[:, geneval.CLASSES.index("dog")] = torch.linspace(1, 5, 150)[order]
    classes[:, 80] = 0
    masks = torch.full((150, 2, 2), 30.0)
    found = geneval.instances(classes, masks, (2, 2), (2, 2), (2, 2))["dog"]
    expected = torch.linspace(1, 5, 150)[50:].sigmoid()
    assert sorted(x.score for x in found) == pytest.approx(expected.tolist(), abs=1e-6)


VIEWS = [
    # Height and width; what the short side 800 or the long side 1333 makes of them; in 32s
    ((512, 512), (800, 800), (800, 800)),
    ((32, 32), (800, 800), (800, 800)),
    ((800, 1000), (800, 1000), (800, 1024)),
    ((480, 640), (800, 1067), (800, 1088)),
    ((512, 1024), (667, 1333), (672, 1344)),
    ((600, 300), (1333, 667), (1344, 672)),
]


@pytest.mark.parametrize(("shape", "inner", "padded"), VIEWS)
def test_detector_view(shape, inner, padded):
    """The image is enlarged as by Pillow, within a level of 255, and padded by the mean colour."""
    image = torch.rand(3, *shape, generator=torch.Generator().manual_seed(0))
    pixels, size = geneval.resized(image)
    assert size == inner
    assert pixels.shape == (1, 3, *padded)
    h, w = inner
    assert not pixels[..., h:, :].any()
    assert not pixels[..., w:].any()
    levels = 255 * (pixels[0, :, :h, :w] * IMAGENET_STD + IMAGENET_MEAN)
    expected = nft.to_pil(image).resize((w, h), Image.Resampling.BILINEAR)
    expected = torch.tensor(np.asarray(expected)).permute(2, 0, 1)
    assert (levels - expected).abs().max() < 1.01


# ---- Colours -------------------------------------------------------------------------------------
def test_cut_out():
    """CLIP sees the object's box, and grey #999 where its mask is not."""
    image = torch.zeros(3, 6, 8)
    mask = torch.zeros(6, 8, dtype=torch.bool)
    mask[1:4, 2:8] = True
    mask[1, 2] = False
    crop = geneval.cut_out(image, geneval.Object((2, 1, 8, 4), 1, mask))
    expected = torch.zeros(3, 3, 6)
    expected[:, 0, 0] = 0x99 / 255
    assert_close(crop, expected)


class Sentences:
    """Stands for CLIP: embeds each sentence in some other direction, and remembers it."""

    def texts(self, sentences):
        self.said = sentences
        numbers = torch.arange(5.0 * len(sentences)).view(-1, 5)
        self.embeddings = F.normalize(numbers.sin(), dim=1)
        return self.embeddings


def test_color_texts():
    """A colour is the normalised mean of the embeddings of GenEval's three sentences about it."""
    clip = Sentences()
    found = geneval.color_texts(clip, "cup")
    assert found.shape == (10, 5)
    for i, color in enumerate(geneval.COLORS):
        three = slice(3 * i, 3 * i + 3)
        first = f"a photo of a {color}"
        assert clip.said[three] == [f"{first} cup", f"{first}-colored cup", f"{first} object"]
        mean = clip.embeddings[three].mean(0)
        assert_close(found[i], mean / mean.norm())


# ---- Metadata ------------------------------------------------------------------------------------
WRONG = [
    {},
    {"tag": "colors"},
    {"tag": "colors", "include": []},
    {"tag": "colors", "include": ["dog"]},
    {"include": [item("dog")]},
    wants("colours", item("dog")),
    wants("colors", item("mouse")),
    wants("colors", item("dog", 0)),
    wants("colors", item("dog", 1.5)),
    wants("colors", item("dog", color="grey")),
    wants("counting", item("dog"), exclude=item("wolf")),
    # The first item has nothing to stand beside
    wants("position", LEFT_DOG),
    wants("position", item("cat"), item("dog", position=["under", 0])),
    wants("position", item("cat"), item("dog", position="left of")),
]


@pytest.mark.parametrize("metadata", WRONG)
def test_other_metadata_is_refused(metadata, monkeypatch):
    """Other metadata than GenEval's is refused in a line that names the prompt, before loading."""
    monkeypatch.delattr(geneval, "load_detector")
    given = [wants("two_object", item("dog")), metadata]
    with pytest.raises(ValueError, match=r"prompt 'my prompt'.*geneval\.py") as error:
        geneval.reward(torch.rand(2, 3, 8, 8), ["a photo of a dog", "my prompt"], given)
    assert "\n" not in str(error.value)


def test_null_metadata():
    """Keys that a dataset of one schema filled with null are keys that are not there."""
    metadata = wants("colors", item("dog", color=None, position=None)) | {"exclude": None}
    geneval.check("", metadata)
    assert scores(metadata, some(dog=1)) == (1, 1)


# ---- Prompts -------------------------------------------------------------------------------------
ROWS = geneval.generate(300)


def test_prompt_files(tmp_path):
    """A file has the categories in equal shares, is the same for a seed, and is for --prompts."""
    files = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        file = tmp_path / f"{name}.jsonl"
        geneval.main([str(file), "--count=420", f"--seed={seed}"])
        files.append(file)
    one, again, other = (file.read_text() for file in files)
    assert one == again
    assert one != other
    pairs = nft.load_prompts(str(files[0]), "--prompts")
    assert [metadata["tag"] for _, metadata in pairs] == 70 * list(geneval.CATEGORIES)
    for prompt, metadata in pairs:
        geneval.check(prompt, metadata)


@pytest.mark.parametrize("rows", [ROWS, geneval.generate(1500, 0, ["two_object"])])
def test_prompts_differ(rows):
    """No prompt is there twice, nor with its two things swapped."""
    listed = set()
    for row in rows:
        listed.add(frozenset(json.dumps(thing) for thing in row["include"]))
    assert len(listed) == len(rows)
    assert len({row["prompt"] for row in rows}) == len(rows)


def words_of(row):
    """A prompt for what is listed, in GenEval's words."""
    include = row["include"]
    things = []
    for listed in include:
        words = [listed["class"]]
        if "color" in listed:
            words.insert(0, listed["color"])
        things.append("a " + " ".join(words))
    if row["tag"] == "counting":
        number = {2: "two", 3: "three", 4: "four"}[include[0]["count"]]
        return f"{number} {geneval.plural(include[0]['class'])}"
    if row["tag"] == "position":
        relation, k = include[1]["position"]
        return f"{things[1]} {relation} {things[k]}"
    return " and ".join(things)


def test_prompts_say_what_is_listed():
    """A prompt says in English what its metadata lists, in GenEval's words."""
    for row in ROWS:
        text = row["prompt"].removeprefix("a photo of ")
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text)
        assert text.replace("an ", "a ") == words_of(row)


def test_what_is_listed():
    """Things are of different classes; nobody is asked to be blue; counting excludes one more."""
    for row in ROWS:
        include = row["include"]
        names = {thing["class"] for thing in include}
        assert len(names) == len(include)
        if row["tag"] in ("colors", "color_attr"):
            assert "person" not in names
        if row["tag"] == "counting":
            (thing,) = include
            assert row["exclude"] == [thing | {"count": thing["count"] + 1}]
        else:
            assert "exclude" not in row


ACROSS = {"left of": (-60, 0), "right of": (60, 0), "above": (0, -60), "below": (0, 60)}


def picture_of(row):
    """Detections and colours that are just what a prompt lists."""
    found = {}
    colors = {}
    for thing in row["include"]:
        place = (0, 0)
        if "position" in thing:
            place = ACROSS[thing["position"][0]]
        found[thing["class"]] = [at(*place)] * thing["count"]
        colors[thing["class"]] = [thing.get("color")] * thing["count"]
    return found, colors


def is_worse(row, found, colors):
    """Whether the verdict is 0 and the score below 1."""
    strict, partial = scores(row, found, **colors)
    return strict == 0 and partial < 1


def test_perfect_and_imperfect_pictures():
    """What a prompt lists scores 1 by both rules; one less, or another colour or place, less."""
    for row in ROWS:
        found, colors = picture_of(row)
        assert scores(row, found, **colors) == (1, 1)
        include = row["include"]
        last = include[-1]["class"]
        assert is_worse(row, found | {last: found[last][1:]}, colors)
        if row["tag"] in ("colors", "color_attr"):
            assert is_worse(row, found, colors | {last: ["grey"]})
        if row["tag"] == "position":
            relation, _ = include[1]["position"]
            x, y = ACROSS[relation]
            assert is_worse(row, found | {last: [at(-x, -y)]}, colors)


def test_mix():
    """A category named k times gets k shares; one that is used up leaves the rest to the others."""
    rows = geneval.generate(300, 0, ["position", "position", "colors"])
    assert [row["tag"] for row in rows] == 100 * ["position", "position", "colors"]
    rows = geneval.generate(300, 0, ["single_object", "counting"])
    tags = [row["tag"] for row in rows]
    assert tags.count("single_object") == 80
    assert tags.count("counting") == 220


REFUSED = [
    ("x.jsonl --count=81 --categories single_object", "--count 81: must be from 1 to 80"),
    ("x.jsonl --count=0", "--count 0"),
    ("x.txt --count=6", "x.txt: must end with .jsonl"),
    ("no/x.jsonl --count=6", "no/x.jsonl: must be writable"),
]


@pytest.mark.parametrize(("arguments", "says"), REFUSED)
def test_command_refuses(arguments, says, tmp_path, monkeypatch, capsys):
    """What cannot be done ends with status 2, a line that names value and rule, and no file."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        geneval.main(arguments.split())
    assert end.value.code == 2
    assert says in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_class_names():
    """The classes are COCO's 80 in COCO's order, three of them under GenEval's names."""
    theirs = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}
    assert list(geneval.CLASSES) == [theirs.get(name, name) for name in COCO]


PLURALS = {
    "bus": "buses",
    "bench": "benches",
    "toothbrush": "toothbrushes",
    "knife": "knives",
    "computer mouse": "computer mice",
    "wine glass": "wine glasses",
    "cup": "cups",
}


def test_plurals():
    """Plurals are English, where GenEval's own are not."""
    assert {name: geneval.plural(name) for name in PLURALS} == PLURALS


# ---- The whole, on tiny untrained models in their real classes -----------------------------------
SMALL = {
    "feature_size": 32,
    "mask_feature_size": 32,
    "hidden_dim": 32,
    "encoder_feedforward_dim": 32,
    "dim_feedforward": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "num_attention_heads": 2,
    "num_queries": 6,
}
FOUND = ["dog", "cat", "cup"]


@torch.no_grad()
def make_detector():
    """A tiny Mask2Former that finds dogs, cats and cups, here and there, in anything."""
    backbone = transformers.SwinConfig(
        embed_dim=16,
        depths=[1, 1, 1, 1],
        num_heads=[1, 2, 2, 4],
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = transformers.Mask2FormerConfig(backbone_config=backbone, num_labels=80, **SMALL)
    # Some names are spelt in other ways on the hub
    config.id2label = dict(enumerate(COCO)) | {57: "sofa", 60: "diningtable"}
    detector = transformers.Mask2FormerForUniversalSegmentation(config).eval()
    # Sharp masks, and classes that differ from query to query
    predictor = detector.model.transformer_module.decoder.mask_predictor
    predictor.get_submodule("mask_embedder.2.0").weight *= 99
    detector.class_predictor.weight *= 60
    detector.class_predictor.bias -= 40
    for name in FOUND:
        detector.class_predictor.bias[geneval.CLASSES.index(name)] += 46
    return detector


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Tiny models, in a working directory that has them under their repositories' names."""
    root = tmp_path_factory.mktemp("repositories")
    torch.manual_seed(2)
    code = "transformers.models.mask2former.modeling_mask2former"
    with pytest.MonkeyPatch.context() as patch:
        # Its training loss, which is never called, asks for scipy
        patch.setattr(f"{code}.requires_backends", lambda *_: None)
        detector = make_detector()
    clip, words = untrained.make_clip()
    # Answers that depend on the colour of the picture
    for p in clip.parameters():
        p.data += 0.2 * torch.randn(p.shape)
    detector.save_pretrained(root / geneval.DETECTOR)
    for part in (clip, words, untrained.image_processor()):
        part.save_pretrained(root / geneval.CLIP)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        geneval.load.cache_clear()
        yield SimpleNamespace(detector=detector, clip=clip.eval(), words=words)
        geneval.load.cache_clear()


def scene(rng):
    """A picture (3, 800, 800), which needs no resize: flat rectangles that lie over each other."""
    image = torch.rand(3, 1, 1, generator=rng).expand(3, 800, 800).clone()
    for _ in range(6):
        y, x = torch.randint(0, 700, (2,), generator=rng)
        h, w = torch.randint(100, 500, (2,), generator=rng)
        image[:, y : y + h, x : x + w] = torch.rand(3, 1, 1, generator=rng)
    return image


def box_of(mask):
    """The box of the pixels of a mask (H, W)."""
    y, x = mask.nonzero().unbind(1)
    corners = [x.min(), y.min(), x.max() + 1, y.max() + 1]
    return tuple(int(corner) for corner in corners)


def other_detections(models, image):
    """Detections by another path: whole masks at once, class by class."""
    levels = torch.tensor(np.asarray(nft.to_pil(image))).permute(2, 0, 1) / 255
    pixels = (levels - IMAGENET_MEAN) / IMAGENET_STD
    out = models.detector(pixels[None])
    logits = F.interpolate(out.masks_queries_logits, scale_factor=4, mode="bilinear")[0]
    probabilities = out.class_queries_logits[0].softmax(1)[:, :80]
    found = {}
    for query, label in (probabilities > 0.3).nonzero().tolist():
        mask = logits[query] > 0
        if mask.any():
            score = probabilities[query, label] * logits[query][mask].sigmoid().mean()
            detected = geneval.Object(box_of(mask), score.item(), mask)
            found.setdefault(geneval.CLASSES[label], []).append(detected)
    return found


def other_colors(models, image, name, objects):
    """Colours by another path: Pillow, and the classes of transformers themselves."""
    sentences = []
    for color in geneval.COLORS:
        for ending in (f" {name}", f"-colored {name}", " object"):
            sentences.append(f"a photo of a {color}{ending}")
    given = models.words(sentences, padding=True, return_tensors="pt")
    texts = F.normalize(models.clip.get_text_features(**given).pooler_output, dim=1)
    texts = texts.view(10, 3, -1).mean(1)
    picture = nft.to_pil(image)
    grey = Image.new("RGB", picture.size, "#999")
    colors = []
    for x in objects:
        crop = Image.composite(picture, grey, Image.fromarray(x.mask.numpy())).crop(x.box)
        given = untrained.image_processor()(crop, return_tensors="pt")
        seen = models.clip.get_image_features(**given).pooler_output
        colors.append(geneval.COLORS[F.cosine_similarity(seen, texts).argmax()])
    return colors


def about(tag, found, look):
    """Metadata of which much, but not all, is true of what was found."""
    a, b, _ = sorted(FOUND, key=lambda name: -len(found.get(name, [])))
    n = max(1, len(found.get(a, [])))
    m = max(1, len(found.get(b, [])))
    colors = look(a, found.get(a, []))
    color = colors[0] if colors else "red"
    return {
        "single_object": wants(tag, item(a)),
        "two_object": wants(tag, item(a, n), item(b, m)),
        "counting": wants(tag, item(a, n + 1), exclude=item(a, n + 2)),
        "colors": wants(tag, item(a, n, color=color)),
        "position": wants(tag, item(a, n), item(b, m, position=["left of", 0])),
        "color_attr": wants(tag, item(a, n, color=color), item(b, 1, color="red")),
    }[tag]


@torch.no_grad()
def test_end_to_end(models):
    """For all categories both rewards are what another path to the same models gives."""
    rng = torch.Generator().manual_seed(0)
    images = []
    metadata = []
    expected = []
    for tag in geneval.CATEGORIES:
        image = scene(rng)
        look = functools.partial(other_colors, models, image)
        kept = geneval.keep(other_detections(models, image), tag)
        wanted = about(tag, kept, look)
        partial = geneval.partial_score(kept, wanted, look)
        strict = geneval.strict_score(kept, wanted, look)
        images.append(image)
        metadata.append(wanted)
        expected.append([partial, strict])
    prompts = [f"prompt {tag}" for tag in geneval.CATEGORIES]
    rewards = [
        nft.Reward("partial", 1.0, geneval.reward),
        nft.Reward("strict", 1.0, geneval.strict),
    ]
    scores = nft.score(rewards, torch.stack(images), prompts, metadata)
    found = torch.stack([scores["reward/partial"], scores["reward/strict"]], 1)
    assert_close(found, torch.tensor(expected))
    # The comparison says something
    assert 0 < found[:, 1].sum() < 6
    assert len(found[:, 0].unique()) > 2


def test_batches_do_not_matter(models):
    """A score is bitwise the same in any batch, in any order."""
    rng = torch.Generator().manual_seed(0)
    images = torch.stack([scene(rng)[:, ::20, ::15] for _ in range(3)])
    prompts = ["two", "one", "four"]
    metadata = [
        wants("color_attr", item("dog", color="red"), item("cat", color="blue")),
        wants("single_object", item("dog")),
        wants("counting", item("cat", 4)),
    ]
    whole = geneval.reward(images, prompts, metadata)
    last = geneval.reward(images[2:], prompts[2:], metadata[2:])
    first = geneval.reward(images[:2].flip(0), ["one", "two"], metadata[1::-1])
    assert whole == [*reversed(first), *last]
    assert len(set(whole)) > 1


def test_what_does_not_load(models, tmp_path, monkeypatch):
    """A repository out of reach, and a detector of other classes, are named in a line."""
    labels = {k: f"LABEL_{k}" for k in range(80)}
    monkeypatch.setattr(models.detector.config, "id2label", labels)
    models.detector.save_pretrained(tmp_path / "other" / geneval.DETECTOR)
    (tmp_path / "nothing").mkdir()
    for folder in ("other", "nothing"):
        monkeypatch.chdir(tmp_path / folder)
        geneval.load.cache_clear()
        with pytest.raises(RuntimeError, match=f"^{geneval.DETECTOR} did not load") as error:
            geneval.load_detector(torch.device("cpu"))
        assert "\n" not in str(error.value)
