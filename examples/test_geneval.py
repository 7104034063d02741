"""GenEval's rules on made-up detections, its prompts, and the whole on tiny untrained models: laws, one a test.

    python -m pytest -q examples/test_geneval.py
SPDX-License-Identifier: MIT
"""
import itertools
import json
import os
import pathlib
import re
import sys
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

os.environ.setdefault("HF_HUB_OFFLINE", "1")
HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import geneval  # noqa: E402
import nft  # noqa: E402
import pretrain_tiny  # noqa: E402
import untrained  # noqa: E402

FILE, CPU = str(HERE / "geneval.py"), torch.device("cpu")


def at(x, y, score=0.99, size=10):
    """An object of `size` x `size` pixels around (x, y)."""
    return geneval.Object((x - size / 2, y - size / 2, x + size / 2, y + size / 2), score)


def row(n, score=0.99):
    """n objects, far from each other."""
    return [at(100 * k, 0, score) for k in range(n)]


def wants(tag, *include, exclude=None):
    """Metadata from (class, count, {color, position}) items."""
    items = [{"class": name, "count": n, **dict(*more)} for name, n, *more in include]
    return {"tag": tag, "include": items} | ({"exclude": [dict(zip(("class", "count"), exclude))]} if exclude else {})


def scores(found, metadata, colors=()):
    """(strict, partial) of detections, where `colors`, {class: colours}, says what CLIP sees."""
    kept = geneval.keep(found, metadata["tag"])
    def look(name, objects):
        return [dict(colors)[name][found[name].index(x)] for x in objects]
    return tuple(rule(kept, metadata, look) for rule in (geneval.strict_score, geneval.partial_score))


# ---- Detections that count -----------------------------------------------------------------------
@pytest.mark.parametrize("tag", geneval.CATEGORIES)
def test_confidence(tag):
    """A detection counts above, not at, 0.3, and for counting 0.9; the surest come first."""
    values = [0.2, 0.3, 0.9, 0.31, 0.899, 0.95]
    kept = geneval.keep({"dog": [at(0, 0, v) for v in values]}, tag)["dog"]
    assert [x.score for x in kept] == ([0.95] if tag == "counting" else [0.95, 0.9, 0.899, 0.31])


def test_most_objects():
    """Of a class the 16 surest count, of overlapping ones each (no suppression), and classes don't share the 16."""
    found = {"dog": [at(0, 0, 0.5 + k / 100) for k in range(20)], "cat": row(3)}
    kept = geneval.keep(found, "single_object")
    assert [x.score for x in kept["dog"]] == [0.5 + k / 100 for k in range(19, 3, -1)] and len(kept["cat"]) == 3


# ---- Positions -----------------------------------------------------------------------------------
@pytest.mark.parametrize("x, y, expected", [
    (30, 0, {"right of"}), (-30, 0, {"left of"}), (0, -30, {"above"}), (0, 30, {"below"}),
    (10, -10, {"right of", "above"}),       # (10 - 2) / 14.1 = 0.57 on both axes
    (20, 12, {"right of"}),                 # 18 / 23.3 = 0.77, 10 / 23.3 = 0.43
    (4, 0, set()), (4.1, 0, {"right of"}),  # (4 - 2) / 4 is 0.5, not more; (4.1 - 2) / 4.1 = 0.51
    (0, 2, set()), (0, 0, set()),           # the margin itself; the same place
])
def test_relations(x, y, expected):
    """Beyond a tenth of both sizes, 2 of 10 + 10 pixels here, more than half of the distance must remain."""
    assert geneval.relations(at(50 + x, 50 + y).box, at(50, 50).box) == expected


def test_relations_use_each_axis_own_size():
    """A wide object must be farther to the side, not farther up; and "left of" is the mirror of "right of"."""
    wide, small = (0, 0, 90, 10), at(45 + 19, 5 - 19).box        # margins 0.1 * (90 + 10) = 10 and 2 of 19
    assert geneval.relations(small, wide) == {"above"}           # 9 / 26.9 = 0.33; 17 / 26.9 = 0.63
    assert geneval.relations(wide, small) == {"below"}


# ---- Verdicts and scores, by hand: strict, partial -----------------------------------------------
DOG, CAT = ("dog", 1), ("cat", 1)
RED_DOG, BLUE_CAT = ("dog", 1, {"color": "red"}), ("cat", 1, {"color": "blue"})
LEFT = ("dog", 1, {"position": ["left of", 0]})


@pytest.mark.parametrize("found, metadata, colors, expected", [
    # one object: too many are no fault for GenEval; FlowGRPO takes off one for each
    ({"dog": row(1)}, wants("single_object", DOG), {}, (1, 1)),
    ({"dog": row(2)}, wants("single_object", DOG), {}, (1, 0)),
    ({"dog": row(3)}, wants("single_object", DOG), {}, (1, -1)),
    ({"dog": row(99)}, wants("single_object", DOG), {}, (1, -14)),                      # 16 of them
    ({"cat": row(1)}, wants("single_object", DOG), {}, (0, 0)),
    ({"dog": [at(0, 0, 0.3)]}, wants("single_object", DOG), {}, (0, 0)),
    ({"dog": row(1), "cat": row(1)}, wants("single_object", DOG, exclude=("cat", 1)), {}, (0, 1)),
    # two
    ({"dog": row(1), "cat": row(1)}, wants("two_object", DOG, CAT), {}, (1, 1)),
    ({"dog": row(1)}, wants("two_object", DOG, CAT), {}, (0, 0.5)),
    ({"dog": row(1), "cat": row(3)}, wants("two_object", DOG, CAT), {}, (1, 0)),
    # counting: one more is excluded; 1 - |4 - found| / 4; what is seen with 0.9 is not there
    ({"dog": row(4)}, wants("counting", ("dog", 4), exclude=("dog", 5)), {}, (1, 1)),
    ({"dog": row(3)}, wants("counting", ("dog", 4), exclude=("dog", 5)), {}, (0, 0.75)),
    ({"dog": row(5)}, wants("counting", ("dog", 4), exclude=("dog", 5)), {}, (0, 0.75)),
    ({"dog": row(5)}, wants("counting", ("dog", 4)), {}, (1, 0.75)),
    ({"dog": row(4) + row(3, 0.9)}, wants("counting", ("dog", 4), exclude=("dog", 5)), {}, (1, 1)),
    ({"dog": row(4) + row(3, 0.9)}, wants("two_object", ("dog", 4), exclude=("dog", 5)), {}, (0, 0.25)),
    ({"dog": row(9)}, wants("counting", ("dog", 4), exclude=("dog", 5)), {}, (0, -0.25)),
    # colours: looked at only in the surest of enough objects, by FlowGRPO only if the number is right
    ({"dog": row(1)}, wants("colors", RED_DOG), {"dog": ["red"]}, (1, 1)),
    ({"dog": row(1)}, wants("colors", RED_DOG), {"dog": ["blue"]}, (0, 0.5)),
    ({}, wants("colors", RED_DOG), {}, (0, 0)),
    ({"dog": [at(0, 0, 0.5), at(0, 0, 0.6)]}, wants("colors", RED_DOG), {"dog": ["blue", "red"]}, (1, 0)),
    ({"dog": [at(0, 0, 0.6), at(0, 0, 0.5)]}, wants("colors", RED_DOG), {"dog": ["blue", "red"]}, (0, 0)),
    ({"dog": row(2)}, wants("colors", ("dog", 2, {"color": "red"})), {"dog": ["red", "blue"]}, (0, 0.75)),
    # position: the item's objects to those that matched the earlier item
    ({"cat": [at(50, 0)], "dog": [at(0, 0)]}, wants("position", CAT, LEFT), {}, (1, 1)),
    ({"cat": [at(0, 0)], "dog": [at(50, 0)]}, wants("position", CAT, LEFT), {}, (0, 0.75)),     # (1 + 1 + 0 + 1) / 4
    ({"dog": [at(50, 0)]}, wants("position", CAT, LEFT), {}, (0, 1 / 3)),                       # (0 + 1 + 0) / 3
    ({"cat": [at(50, 0)]}, wants("position", CAT, LEFT), {}, (0, 1 / 3)),                       # (1 + 0 + 0) / 3
    ({"cat": [at(50, 0)], "dog": [at(0, 0), at(99, 0, 0.4)]}, wants("position", CAT, LEFT), {}, (1, 1 / 3)),
    ({"cat": [at(50, 0)], "dog": [at(0, 0, 0.4), at(99, 0)]}, wants("position", CAT, LEFT), {}, (0, 1 / 3)),
    ({"cat": [at(50, 0), at(-50, 0)], "dog": [at(0, 0)]}, wants("position", ("cat", 2), LEFT), {}, (0, 0.75)),
    # two colours
    ({"dog": row(1), "cat": row(1)}, wants("color_attr", RED_DOG, BLUE_CAT), {"dog": ["red"], "cat": ["blue"]}, (1, 1)),
    ({"dog": row(1), "cat": row(1)}, wants("color_attr", RED_DOG, BLUE_CAT), {"dog": ["blue"], "cat": ["red"]},
     (0, 0.5)),
    ({"dog": row(1), "cat": row(1)}, wants("color_attr", RED_DOG, BLUE_CAT), {"dog": ["red"], "cat": ["red"]},
     (0, 0.75)),
    ({"dog": row(1)}, wants("color_attr", RED_DOG, BLUE_CAT), {"dog": ["red"]}, (0, 0.5)),
    # colour and position together: a wrong colour ends the item, and takes the place of what stands beside it
    ({"cat": [at(50, 0)], "dog": [at(0, 0)]}, wants("position", BLUE_CAT, LEFT), {"cat": ["red"]}, (0, 0.5)),
    ({"cat": [at(50, 0)], "dog": [at(0, 0)]}, wants("position", CAT, ("dog", 1, LEFT[2] | {"color": "red"})),
     {"dog": ["blue"]}, (0, 2 / 3)),
])
def test_scores_by_hand(found, metadata, colors, expected):
    """GenEval's verdict and FlowGRPO's score are those computed by hand."""
    assert scores(found, metadata, colors) == pytest.approx(expected)


# ---- From logits and pixels to detections --------------------------------------------------------
def test_instances():
    """Confidence is the class's probability times the mask's mean; a box is its mask's, up to the image's border."""
    def probabilities(**p):                                 # the rest for "nothing"
        p = {geneval.CLASSES.index(name): value for name, value in p.items()}
        return torch.tensor([p.get(k, 1e-9) for k in range(80)] + [1 - sum(p.values())]).log()
    classes = torch.stack([probabilities(dog=0.9), probabilities(cat=0.55, cow=0.44), probabilities(dog=0.8),
                           probabilities(dog=0.29)])
    masks = torch.full((4, 8, 12), -9.0)
    masks[0, 2:5, 1:4] = 2.0
    masks[1] = -50.0
    masks[1, 6:, 5:] = 50.0                                 # on past the image's corner, into the padding
    masks[3] = 50.0                                         # query 2 is sure but shows nothing, 3 is unsure
    found = geneval.instances(classes, masks, (8, 12), (8, 10), (8, 10))
    assert {name: len(objects) for name, objects in found.items()} == {"dog": 1, "cat": 1, "cow": 1}
    (dog,), (cat,), (cow,) = found["dog"], found["cat"], found["cow"]
    assert dog.box == (1, 2, 4, 5) and cat.box == cow.box == (5, 6, 10, 8)
    assert torch.equal(dog.mask.nonzero(), (masks[0] > 0).nonzero()) and cat.mask.shape == (8, 10)
    assert [dog.score, cat.score, cow.score] == pytest.approx([0.9 / (1 + np.exp(-2)), 0.55, 0.44], abs=1e-6)
    larger = geneval.instances(classes, masks, (16, 24), (16, 20), (24, 30))["cat"][0]
    assert larger.box == (15, 18, 30, 24)                   # in the image's own pixels


def test_most_probable_hundred():
    """Of all pairs of query and class at most a hundred become detections, the most probable."""
    classes = torch.full((150, 81), -20.0)
    classes[:, 16] = torch.linspace(1, 5, 150)[torch.randperm(150, generator=torch.Generator().manual_seed(0))]
    classes[:, 80] = 0
    found = geneval.instances(classes, torch.full((150, 2, 2), 30.0), (2, 2), (2, 2), (2, 2))["dog"]
    assert sorted(x.score for x in found) == pytest.approx(classes.softmax(-1)[:, 16].sort().values[50:].tolist())


@pytest.mark.parametrize("h, w, inner, padded", [
    (512, 512, (800, 800), (800, 800)), (32, 32, (800, 800), (800, 800)), (800, 1000, (800, 1000), (800, 1024)),
    (480, 640, (800, 1067), (800, 1088)), (512, 1024, (667, 1333), (672, 1344)), (600, 300, (1333, 667), (1344, 672))])
def test_detector_view(h, w, inner, padded):
    """The short side becomes 800, the long at most 1333, sides are padded to 32s with the mean colour; the pixels
    are those of PIL's bilinear resize of the 8-bit picture, within one level."""
    image = torch.rand(3, h, w, generator=torch.Generator().manual_seed(0))
    pixels, size = geneval.resized(image)
    assert size == inner and pixels.shape == (1, 3, *padded)
    assert not pixels[..., inner[0]:, :].any() and not pixels[..., inner[1]:].any()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])    # ImageNet's
    levels = (pixels[0].permute(1, 2, 0)[:inner[0], :inner[1]] * std + mean) * 255
    if min(h, w) <= 800 and max(inner) / max(h, w) >= 1:            # PIL shrinks another way
        expected = np.asarray(nft.to_pil(image).resize(inner[::-1], 2), dtype=np.float32)
        assert (levels - torch.tensor(expected)).abs().max() < 1.01


# ---- Colours -------------------------------------------------------------------------------------
def test_cut_out():
    """CLIP sees the object's box, and grey #999 where its mask is not."""
    image = torch.zeros(3, 6, 8)
    mask = torch.zeros(6, 8, dtype=torch.bool)
    mask[1:4, 2:8] = True
    mask[1, 2] = False
    crop = np.asarray(nft.to_pil(geneval.cut_out(image, geneval.Object((2, 1, 8, 4), 1, mask))))
    expected = np.zeros((3, 6, 3))
    expected[0, 0] = 0x99
    assert np.array_equal(crop, expected)


def test_color_texts():
    """A colour's embedding is the normalised mean of the embeddings of GenEval's three sentences about it."""
    said = []
    def texts(sentences):
        said.extend(sentences)
        return F.normalize(torch.arange(len(sentences) * 5.).view(-1, 5).sin(), dim=-1)
    found = geneval.color_texts(mock.Mock(texts=texts), "cup")
    assert said[:3] == ["a photo of a red cup", "a photo of a red-colored cup", "a photo of a red object"]
    assert said[-1] == "a photo of a white object" and found.shape == (10, 5)
    mean = F.normalize(torch.arange(150.).view(-1, 5).sin(), dim=-1)[3:6].mean(0)
    torch.testing.assert_close(found[1], mean / mean.norm())


# ---- Metadata and prompts ------------------------------------------------------------------------
@pytest.mark.parametrize("metadata", [
    {}, {"tag": "colors"}, {"tag": "colors", "include": []}, {"include": [{"class": "dog", "count": 1}]},
    {"tag": "colours", "include": [{"class": "dog", "count": 1}]}, {"tag": "colors", "include": ["dog"]},
    wants("colors", ("mouse", 1)), wants("colors", ("dog", 0)), wants("colors", ("dog", 1.5)),
    wants("colors", ("dog", 1, {"color": "grey"})), wants("counting", DOG, exclude=("wolf", 1)),
    wants("position", LEFT), wants("position", CAT, ("dog", 1, {"position": ["under", 0]})),
    wants("position", CAT, ("dog", 1, {"position": "left of"}))])
def test_other_metadata_is_refused(metadata):
    """Without GenEval's metadata a prompt is refused before anything is loaded, in one line that names it."""
    with mock.patch.object(geneval, "models", side_effect=AssertionError), pytest.raises(nft.Failure) as error:
        geneval.reward(torch.rand(2, 3, 8, 8), ["a photo of a dog", "my prompt"], [wants("two_object", DOG), metadata])
    line = error.value.args[0]
    assert "\n" not in line and "'my prompt'" in line and "geneval.py" in line


def test_null_metadata():
    """Keys that a dataset filled with null, as datasets of one schema do, are keys that are not there."""
    null = {"class": "dog", "count": 1, "color": None, "position": None}
    geneval.check("", {"tag": "colors", "include": [null], "exclude": None})
    assert scores({"dog": row(1)}, {"tag": "colors", "include": [null], "exclude": None}) == (1, 1)


def test_prompts(tmp_path, capsys):
    """The six categories go in equal shares through nft.load_prompts; prompts and their objects are different
    ones, the same for a seed, and say what their metadata lists in GenEval's words."""
    file, again, other = (str(tmp_path / f"{k}.jsonl") for k in range(3))
    for path, seed in ((file, 3), (again, 3), (other, 4)):
        geneval.main([path, "--count", "420", "--seed", str(seed)])
    assert pathlib.Path(file).read_text() == pathlib.Path(again).read_text() != pathlib.Path(other).read_text()
    rows = nft.load_prompts(file)
    assert [metadata["tag"] for _, metadata in rows] == 70 * list(geneval.CATEGORIES)
    assert len({prompt for prompt, _ in rows}) == 420
    assert len({json.dumps(sorted(map(str, m["include"]))) for _, m in rows}) == 420
    pairs = [frozenset(item["class"] for item in p["include"]) for p in geneval.generate(1500, 0, ["two_object"])]
    assert len(set(pairs)) == 1500                          # "A and B" or "B and A"
    for prompt, metadata in rows:
        geneval.check(prompt, metadata)
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", prompt)
        include = metadata["include"]
        assert len({item["class"] for item in include}) == len(include)
        assert not any(item["class"] == "person" and "color" in item for item in include)
        text = prompt.removeprefix("a photo of ").replace("an ", "a ")
        a = [" ".join(filter(None, ("a", item.get("color"), item["class"]))) for item in include]
        if metadata["tag"] == "counting":
            n = {"two": 2, "three": 3, "four": 4}[text.split()[0]]
            assert include[0]["count"] == n and metadata["exclude"] == [include[0] | {"count": n + 1}]
        elif metadata["tag"] == "position":
            relation, k = include[1]["position"]
            assert (k, text) == (0, f"{a[1]} {relation} {a[0]}")
        else:
            assert text == " and ".join(a) and "exclude" not in metadata


def test_perfect_and_imperfect_pictures():
    """Detections that are just what a generated prompt lists score 1 by both rules; with one object less,
    another colour or the mirrored place, strict is 0 and the score below 1."""
    across = {"left of": (-60, 0), "right of": (60, 0), "above": (0, -60), "below": (0, 60)}
    for prompt in geneval.generate(300):
        places = [across[item["position"][0]] if "position" in item else (0, 0) for item in prompt["include"]]
        found = {item["class"]: [at(*place)] * item["count"] for item, place in zip(prompt["include"], places)}
        colors = {item["class"]: [item.get("color")] * item["count"] for item in prompt["include"]}
        assert scores(found, prompt, colors) == (1, 1)
        name = prompt["include"][-1]["class"]
        worse = [(found | {name: found[name][1:]}, colors)]
        if prompt["tag"] in ("colors", "color_attr"):
            worse.append((found, colors | {name: ["grey"]}))
        if prompt["tag"] == "position":
            worse.append((found | {name: [at(*(-n for n in places[1]))]}, colors))
        for objects, seen in worse:
            verdict, score = scores(objects, prompt, seen)
            assert verdict == 0 and score < 1


@pytest.mark.parametrize("arguments, said", [
    ("x.jsonl --count 81 --categories single_object", "--count 81: must be from 1 to 80"),
    ("x.jsonl --count 0", "--count 0"), ("x.txt --count 6", "x.txt: must end with .jsonl"),
    ("no/x.jsonl --count 6", "no/x.jsonl: must be writable")])
def test_command_refuses(arguments, said, tmp_path, monkeypatch, capsys):
    """What cannot be done ends with status 2, a line that names the value and the rule, and no file."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        geneval.main(arguments.split())
    assert end.value.code == 2 and said in capsys.readouterr().err and not [*tmp_path.iterdir()]


def test_mix():
    """A category named k times gets k shares; one that is used up leaves the rest to the others."""
    tags = [r["tag"] for r in geneval.generate(300, 0, ["position", "position", "colors"])]
    assert tags == 100 * ["position", "position", "colors"]
    tags = [r["tag"] for r in geneval.generate(300, 0, ["single_object", "counting"])]
    assert (tags.count("single_object"), tags.count("counting")) == (80, 220)


def test_class_names():
    """The classes are COCO's 80 in COCO's order, three under GenEval's names; plurals are English."""
    names = coco_names()
    ours = {"computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard"}
    assert [ours.get(name, name) for name in geneval.CLASSES] == names
    assert [geneval.plural(n) for n in ("bus", "bench", "toothbrush", "knife", "computer mouse", "wine glass", "cup")] \
        == ["buses", "benches", "toothbrushes", "knives", "computer mice", "wine glasses", "cups"]


# ---- The whole, on tiny untrained models in their real classes -----------------------------------
def coco_names():
    """COCO's category names, in order."""
    return ["person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
            "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
            "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee",
            "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
            "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple",
            "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
            "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard",
            "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors",
            "teddy bear", "hair drier", "toothbrush"]


def make_mask2former():
    """A tiny Mask2Former that finds dogs, cats and cups, here and there, in anything."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig
    backbone = SwinConfig(embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 4],
                          out_features=["stage1", "stage2", "stage3", "stage4"])
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32,
        dim_feedforward=32, encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=6, num_labels=80)
    config.id2label = dict(enumerate(coco_names())) | {57: "sofa", 60: "diningtable"}      # as the hub's may be
    with mock.patch.object(sys.modules[Mask2FormerForUniversalSegmentation.__module__], "requires_backends"):
        model = Mask2FormerForUniversalSegmentation(config).eval()
    mask_head = [m for m in model.modules() if isinstance(m, torch.nn.Linear)][-2]      # the queries' masks
    with torch.no_grad():
        mask_head.weight *= 99                          # sharp masks
        model.class_predictor.weight *= 60              # classes that differ from query to query
        model.class_predictor.bias -= 40
        for name in ("dog", "cat", "cup"):
            model.class_predictor.bias[geneval.CLASSES.index(name)] += 46
    return model


def make_clip():
    """A tiny CLIP, with its tokenizer, whose answers depend on the colour of the picture."""
    from transformers import CLIPConfig, CLIPModel
    words = pretrain_tiny.make_tokenizer()
    words.model_max_length = 77
    part = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, projection_dim=16)
    clip = CLIPModel(CLIPConfig(text_config=part | dict(
        vocab_size=len(words), bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id),
                                vision_config=part, projection_dim=16))
    with torch.no_grad():
        for p in clip.parameters():
            p += 0.2 * torch.randn_like(p)
    return clip, words


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    """A working directory with both models in directories of the repositories' names; yields them."""
    root = tmp_path_factory.mktemp("repositories")
    torch.manual_seed(2)
    detector, (clip, words) = make_mask2former(), make_clip()
    detector.save_pretrained(root / geneval.DETECTOR)
    for part in (clip, words, untrained.image_processor()):
        part.save_pretrained(root / geneval.CLIP)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        geneval.models.cache_clear()
        yield detector, clip.eval(), words
        geneval.models.cache_clear()


def look(image, tag, detector, clip, words):
    """What counts in an image, and the colours of such objects, by another path: whole masks at once, PIL, and
    the classes of transformers themselves."""
    from PIL import Image
    picture, process = nft.to_pil(image), untrained.image_processor()
    pixels = torch.tensor(np.asarray(picture) / 255.0).float().permute(2, 0, 1)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    out, found = detector((pixels - mean)[None] / std), {}
    logits = F.interpolate(out.masks_queries_logits, scale_factor=4, mode="bilinear")[0]
    for q, k in itertools.product(range(len(logits)), range(80)):
        mask, score = logits[q] > 0, out.class_queries_logits[0, q].softmax(-1)[k]
        if score > 0.3 and mask.any():
            y, x = mask.nonzero().unbind(1)
            box = [int(n) for n in (x.min(), y.min(), x.max() + 1, y.max() + 1)]
            score = score * (logits[q].sigmoid() * mask).sum() / mask.sum()
            found.setdefault(geneval.CLASSES[k], []).append(geneval.Object(box, float(score), mask))

    def colors(name, objects):
        ways = [f"a photo of a {c}{s}" for c in geneval.COLORS for s in (f" {name}", f"-colored {name}", " object")]
        text = clip.get_text_features(**words(ways, padding=True, return_tensors="pt")).pooler_output
        text, seen = F.normalize(text, dim=-1).view(10, 3, -1).mean(1), []
        for x in objects:
            grey = Image.new("RGB", picture.size, "#999")
            crop = Image.composite(picture, grey, Image.fromarray(x.mask.numpy())).crop(x.box)
            view = clip.get_image_features(**process(crop, return_tensors="pt")).pooler_output
            seen.append(geneval.COLORS[F.cosine_similarity(view, text).argmax()])
        return seen
    return geneval.keep(found, tag), colors


def scene(rng):
    """A picture (3, 800, 800), in which a few flat rectangles lie over each other: it needs no resize."""
    image = torch.rand(3, 1, 1, generator=rng).expand(3, 800, 800).clone()
    for _ in range(6):
        (y, x), (h, w) = torch.randint(0, 700, (2,), generator=rng), torch.randint(100, 500, (2,), generator=rng)
        image[:, y:y + h, x:x + w] = torch.rand(3, 1, 1, generator=rng)
    return image


@torch.no_grad()
def test_end_to_end(repositories):
    """Through nft.load_rewards both rewards are what another path to the same models gives, for prompts of all
    categories."""
    rewards = nft.load_rewards(f"{FILE}:reward,{FILE}:strict")
    rng = torch.Generator().manual_seed(0)
    images, prompts, expected, seen = [], [], [], set()
    for k, tag in enumerate(2 * geneval.CATEGORIES):
        images.append(scene(rng))
        kept, colors = look(images[-1], tag, *repositories)
        a, b, _ = sorted(("dog", "cat", "cup"), key=lambda name: -len(kept.get(name, [])))
        n, m = (max(1, len(kept.get(name, []))) for name in (a, b))
        red, blue = ((colors(name, kept.get(name, [])) or ["red"])[0] for name in (a, b))
        seen |= {red, blue}
        metadata = {                        # by what is there: much of it right, not all
            "single_object": wants(tag, (a, 1)), "two_object": wants(tag, (a, n), (b, m)),
            "counting": wants(tag, (a, n + k // 6), exclude=(a, n + 1)),
            "colors": wants(tag, (a, n, {"color": red})),
            "position": wants(tag, (a, n), (b, m, {"position": [geneval.RELATIONS[k % 4], 0]})),
            "color_attr": wants(tag, (a, 1, {"color": red}), (b, 1, {"color": blue}))}[tag]
        prompts.append((f"prompt {k}", metadata))
        expected.append([rule(kept, metadata, colors) for rule in (geneval.partial_score, geneval.strict_score)])
    _, parts = nft.score(rewards, torch.stack(images), *zip(*prompts))
    found = torch.stack([parts["geneval:reward"], parts["geneval:strict"]], 1)
    torch.testing.assert_close(found, torch.tensor(expected))
    assert len(seen) > 2 and 0 < found[:, 1].sum() < 12 and len(found[:, 0].unique()) > 3      # the test has teeth


def test_batching(repositories):
    """A score is bitwise the same in any batch, in any order."""
    rng = torch.Generator().manual_seed(0)
    images = torch.stack([scene(rng)[:, ::20, ::15] for _ in range(4)])
    prompts = [(p.pop("prompt"), p) for p in geneval.generate(4, 0, ["color_attr", "counting"])]
    for _, metadata in prompts:                         # what the tiny models find
        for item, name in zip(metadata["include"], ("dog", "cat")):
            item["class"] = name
    whole = geneval.reward(images, *zip(*prompts))
    parts = geneval.reward(images[:1], *zip(prompts[0])) + geneval.reward(images[1:], *zip(*prompts[1:]))
    turned = geneval.reward(images.flip(0), *zip(*prompts[::-1]))[::-1]
    assert whole == parts == turned and len(set(whole)) > 1


def test_what_does_not_load(repositories, tmp_path, monkeypatch):
    """A repository out of reach, and a detector of other classes, end in one line that names it."""
    detector, _, _ = repositories
    with monkeypatch.context() as patch:
        patch.setattr(detector.config, "id2label", {k: f"LABEL_{k}" for k in range(80)})
        detector.save_pretrained(tmp_path / geneval.DETECTOR)
    for folder in (tmp_path, tmp_path / "nowhere"):
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)
        with pytest.raises(nft.Failure) as error:
            geneval.load_detector(CPU)
        assert error.value.args[0].startswith(geneval.DETECTOR + " did not load") and "\n" not in error.value.args[0]
