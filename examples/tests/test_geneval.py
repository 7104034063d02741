"""GenEval's rules on detections made by hand, the whole on untrained models, and its prompts.

SPDX-License-Identifier: MIT
"""

import functools
import json
from unittest import mock

import common  # noqa: F401 (offline, and the hub's cache is one of our own)
import geneval
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
import untrained
from PIL import Image

import nft


# ---- The rules: GenEval's verdict, FlowGRPO's partial score --------------------------------------
def at(x, y, score=0.99):
    """An object of 10 x 10 pixels around (x, y)."""
    return geneval.Object((x - 5, y - 5, x + 5, y + 5), score)


@pytest.mark.parametrize("tag", geneval.CATEGORIES)
def test_detections_that_count(tag):
    """Of each class the 16 surest above, not at, 0.3 count, and for counting above 0.9."""
    dogs = [at(0, 0, score) for score in (0.2, 0.3, 0.9, 0.31, 0.95)]
    cats = [at(0, 0, 0.91 + k / 1000) for k in range(20)]
    kept = geneval.keep({"dog": dogs, "cat": cats}, tag)
    expected = [0.95] if tag == "counting" else [0.95, 0.9, 0.31]
    assert [x.score for x in kept["dog"]] == expected
    assert kept["cat"] == cats[:3:-1]


RELATIONS = [
    (30, 0, {"right of"}),
    (-30, 0, {"left of"}),
    (0, -30, {"above"}),
    (0, 30, {"below"}),
    # (10 - 2) / 14.1 = 0.57 on both axes
    (10, -10, {"right of", "above"}),
    # 18 / 23.3 = 0.77 and 10 / 23.3 = 0.43
    (20, 12, {"right of"}),
    # (4 - 2) / 4 = 0.5 is not more
    (4, 0, set()),
]


@pytest.mark.parametrize(("x", "y", "expected"), RELATIONS)
def test_relations(x, y, expected):
    """Beyond a tenth of both sizes, here 2, more than half of the distance must remain."""
    assert geneval.relations(at(50 + x, 50 + y).box, at(50, 50).box) == expected


def item(name, count=1, **more):
    """What a prompt lists: `count` of a class, maybe with a color or position."""
    return {"class": name, "count": count, **more}


def wants(*include, exclude=None):
    """A prompt's metadata. As a dataset of one schema has it, `exclude` may be null."""
    return {"tag": "colors", "include": list(include), "exclude": exclude}


DOG = wants(item("dog"))
NO_CAT = wants(item("dog"), exclude=[item("cat")])
BOTH = wants(item("dog"), item("cat"))
FOUR = wants(item("dog", 4))
RED = wants(item("dog", color="red"))
TWO_RED = wants(item("dog", 2, color="red"))
RED_AND_BLUE = wants(item("dog", color="red"), item("cat", color="blue"))
LEFT_DOG = item("dog", position=["left of", 0])
LEFT = wants(item("cat"), LEFT_DOG)
LEFT_OF_TWO = wants(item("cat", 2), LEFT_DOG)
LEFT_OF_BLUE = wants(item("cat", color="blue"), LEFT_DOG)
SCORES = [
    (DOG, "cup", 0, 0),
    (DOG, "dog", 1, 1),
    # Too many are right for GenEval; the partial score loses 1 for each, up to 16 of them
    (DOG, "dog, dog, dog", 1, -1),
    (DOG, "dog, " * 98 + "dog", 1, -14),
    # What `exclude` names makes GenEval's verdict 0, and does nothing to the partial score
    (NO_CAT, "dog, cat", 0, 1),
    (BOTH, "dog", 0, 0.5),
    # 1 - |4 - found| / 4
    (FOUR, "dog, dog, dog", 0, 0.75),
    # Of too many GenEval looks at the surest; the partial score looks at none
    (RED, "red dog, blue dog", 1, 0),
    (RED, "blue dog, red dog", 0, 0),
    # A colour is a part beside the number: (1 + 1 / 2) / 2
    (TWO_RED, "red dog, blue dog", 0, 0.75),
    (RED_AND_BLUE, "red dog, blue cat", 1, 1),
    (RED_AND_BLUE, "blue dog, red cat", 0, 0.5),
    # So is a position. FlowGRPO's server adds 1 after a wrong one: (1 + 1 + 0 + 1) / 4
    (LEFT, "dog, cat", 1, 1),
    (LEFT, "cat, dog", 0, 0.75),
    (LEFT, "dog", 0, 1 / 3),
    (LEFT, "dog, cat, dog", 1, 1 / 3),
    # It must stand left of both
    (LEFT_OF_TWO, "cat, dog, cat", 0, 0.75),
    # What is not of its colour is nothing to stand beside: (1 + 0 + 1 + 0) / 4
    (LEFT_OF_BLUE, "dog, red cat", 0, 0.5),
]


@pytest.mark.parametrize(("metadata", "seen", "strict", "partial"), SCORES)
def test_scores(metadata, seen, strict, partial):
    """GenEval's verdict, and the mean over the items' parts. Seen: from left to right."""
    found = {}
    colors = {}
    for k, words in enumerate(seen.split(", ")):
        *color, name = words.split()
        # The surest comes first
        detected = at(100 * k, 0, 1 - k / 1000)
        found.setdefault(name, []).append(detected)
        colors[detected] = " ".join(color)

    def look(name, objects):
        return [colors[x] for x in objects]

    kept = geneval.keep(found, metadata["tag"])
    assert geneval.strict_score(kept, metadata, look) == strict
    assert geneval.partial_score(kept, metadata, look) == partial


# ---- The whole, on tiny untrained models in their real classes -----------------------------------
# Numbers in COCO
FOUND = {"cat": 15, "dog": 16, "cup": 41}


@torch.no_grad()
def make_detector():
    """A tiny Mask2Former that finds dogs, cats and cups, here and there, in anything."""
    backbone = transformers.SwinConfig(
        embed_dim=16,
        depths=[1, 1, 1, 1],
        num_heads=[1, 2, 2, 4],
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone,
        num_labels=80,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_layers=1,
        decoder_layers=2,
        num_queries=6,
    )
    # Its training loss, which is never called, asks for scipy
    with mock.patch("transformers.models.mask2former.modeling_mask2former.requires_backends"):
        detector = transformers.Mask2FormerForUniversalSegmentation(config).eval()
    # Sharp masks, and classes that differ from query to query
    predictor = detector.model.transformer_module.decoder.mask_predictor
    predictor.get_submodule("mask_embedder.2.0").weight *= 99
    detector.class_predictor.weight *= 60
    detector.class_predictor.bias -= 40
    detector.class_predictor.bias[list(FOUND.values())] += 46
    return detector


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Tiny models, in a working directory that has them under their repositories' names."""
    root = tmp_path_factory.mktemp("repositories")
    torch.manual_seed(5)
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
        yield detector, clip.eval(), words


def scene(rng):
    """A picture (3, 400, 600): flat rectangles that lie over each other."""
    image = torch.rand(3, 1, 1, generator=rng).expand(3, 400, 600).clone()
    for _ in range(6):
        y, x, h, w = torch.randint(50, 350, (4,), generator=rng)
        image[:, y : y + h, x : x + w] = torch.rand(3, 1, 1, generator=rng)
    return image


def other_detections(detector, image):
    """Detections by another path: Pillow, whole masks at once, class by class."""
    picture = nft.to_pil(image).resize((1200, 800), Image.Resampling.BILINEAR)
    pixels = np.asarray(picture) / 255 - [0.485, 0.456, 0.406]
    pixels = torch.tensor(pixels / [0.229, 0.224, 0.225])
    # 1216 is a multiple of 32
    view = torch.zeros(1, 3, 800, 1216)
    view[..., :1200] = pixels.permute(2, 0, 1)
    out = detector(view)
    logits = F.interpolate(out.masks_queries_logits, (800, 1216), mode="bilinear")
    logits = F.interpolate(logits[..., :1200], (400, 600), mode="bilinear")
    probabilities = out.class_queries_logits.softmax(2)
    found = {name: [] for name in FOUND}
    for query, mask in enumerate(logits[0]):
        inside = mask > 0
        box = Image.fromarray(inside.numpy()).getbbox()
        for name, number in FOUND.items():
            score = probabilities[0, query, number] * mask[inside].sigmoid().mean()
            found[name].append(geneval.Object(box, score.item(), inside))
    return found


def other_colors(clip, words, image, name, objects):
    """Colours by another path: Pillow, and the classes of transformers themselves."""
    sentences = []
    for color in geneval.COLORS:
        for ending in (f" {name}", f"-colored {name}", " object"):
            sentences.append(f"a photo of a {color}{ending}")
    given = words(sentences, padding=True, return_tensors="pt")
    texts = F.normalize(clip.get_text_features(**given).pooler_output, dim=1)
    texts = texts.view(10, 3, -1).mean(1)
    picture = nft.to_pil(image)
    grey = Image.new("RGB", picture.size, "#999")
    colors = []
    for x in objects:
        crop = Image.composite(picture, grey, Image.fromarray(x.mask.numpy())).crop(x.box)
        given = untrained.image_processor()(crop, return_tensors="pt")
        seen = clip.get_image_features(**given).pooler_output
        colors.append(geneval.COLORS[F.cosine_similarity(seen, texts).argmax()])
    return colors


@torch.no_grad()
def test_end_to_end(models):
    """Detections, colours and both rewards are what another path to the same models gives."""
    detector, clip, words = models
    rng = torch.Generator().manual_seed(0)
    for tag, truth in (("counting", 1), ("colors", 0)):
        image = scene(rng)
        look = functools.partial(other_colors, clip, words, image)
        kept = geneval.keep(other_detections(detector, image), tag)
        found = geneval.keep(geneval.detect(detector, image), tag)
        for name in found:
            for x, y in zip(found[name], kept[name], strict=True):
                assert x.score == pytest.approx(y.score, abs=2e-3)
                assert x.box == pytest.approx(y.box, abs=5)
                # Pillow's edges are other ones in a few places
                assert (x.mask != y.mask).float().mean() < 0.01
        name = max(kept, key=lambda name: len(kept[name]))
        seen = look(name, kept[name])
        wanted = wants(item(name, len(seen), color=seen[0])) | {"tag": tag}
        partial = geneval.partial_score(kept, wanted, look)
        assert geneval.reward(image[None], [""], [wanted]) == [partial]
        assert geneval.strict(image[None], [""], [wanted]) == [truth]


def test_batches_do_not_matter(models):
    """A score is bitwise the same in any batch, in any order."""
    rng = torch.Generator().manual_seed(0)
    images = torch.stack([scene(rng)[:, ::10, ::8] for _ in range(3)])
    metadata = [BOTH, DOG, LEFT]
    scores = geneval.reward(images, ["", "", ""], metadata)
    turned = geneval.reward(images[1:].flip(0), ["", ""], metadata[:0:-1])
    assert scores[1:] == turned[::-1]
    assert len(set(scores)) > 1


# ---- Prompts -------------------------------------------------------------------------------------
@pytest.mark.parametrize("metadata", [{}, wants(), wants(item("wolf"))])
def test_other_metadata_is_refused(metadata):
    """`check` refuses a prompt without GenEval's metadata, and names it."""
    with pytest.raises(ValueError, match="my prompt"):
        geneval.reward.check(["a dog", "my prompt"], [DOG, metadata])


def test_prompts(tmp_path):
    """The command writes different prompts, of single_object all 80, in shares that names give."""
    file = tmp_path / "prompts.jsonl"
    mix = ["position", "position", "single_object"]
    geneval.main([str(file), "--count=300", "--categories", *mix])
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["tag"] for row in rows] == 80 * mix + 60 * ["position"]
    prompts = [row["prompt"] for row in rows]
    assert len(set(prompts)) == 300
    geneval.strict.check(prompts, rows)


def test_prompts_say_what_is_listed():
    """Two things are joined by "and", or by where the second item stands to the first."""
    for row in geneval.generate(100, 0, ["position", "color_attr"]):
        first, second = (geneval.article(thing) for thing in row["include"])
        expected = f"{first} and {second}"
        if row["tag"] == "position":
            relation, _ = row["include"][1]["position"]
            expected = f"{second} {relation} {first}"
        assert row["prompt"] == f"a photo of {expected}"
        assert " a o" not in expected
