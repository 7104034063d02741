"""Each reward against an independent formula of what it measures, on equal random weights.

    python -m pytest examples/tests/test_rewards.py
    pip install --no-deps open_clip_torch ftfy wcwidth      # what hpsv2.py is compared with

The models are tiny, of the real classes, in the files and formats of the real repositories: in the
hub's cache, or in directories of the repositories' names. What lacks a package is skipped: hpsv2.py
without open_clip, ocr.py without its reader.
SPDX-License-Identifier: MIT
"""

import functools
import io
import re
import sys
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

import clip
import common
import custom
import hpsv2
import imagereward
import learned
import numpy as np
import ocr
import pickscore
import pytest
import roughness
import torch
import torch.nn.functional as F
import transformers
import untrained
import vlm
from PIL import Image, ImageDraw, ImageFont
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from torch.testing import assert_close

import nft

# The last one is longer than what any scorer reads.
PROMPTS = ["a red circle", "two blue squares", "a green triangle", "a yellow cross " * 40]
WORDS = sorted(set(" ".join(PROMPTS).split()))
# Pictures of 6 x 8 tiles, 300 x 400 pixels, as numbers and as nft.py hands them on.
TILES = np.random.default_rng(0).integers(256, size=(4, 6, 8, 3), dtype=np.uint8)
ARRAYS = TILES.repeat(50, 1).repeat(50, 2)
IMAGES = torch.tensor(ARRAYS).permute(0, 3, 1, 2) / 255


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The hub's cache with tiny models, and an empty directory to work in."""
    common.root()
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


@torch.no_grad()
def score(reward, images=IMAGES, prompts=PROMPTS, metadata=None):
    """A reward's numbers, (B,)."""
    if metadata is None:
        metadata = [{} for _ in prompts]
    found = reward(images, prompts, metadata)
    if isinstance(found, tuple):
        found = found[0]
    return torch.as_tensor(found, dtype=torch.float32)


def score_each(reward, images, prompts):
    """The same, an image at a time."""
    pairs = zip(images, prompts, strict=True)
    return torch.cat([score(reward, image[None], [prompt]) for image, prompt in pairs])


def save(state, repository, file):
    """Write a checkpoint where the repository's would be."""
    Path(repository).mkdir(parents=True)
    torch.save(state, Path(repository) / file)


def randomise(model, scale=1.0):
    """Weights that pass everything on, and biases that matter, so that a wrong one shows."""
    torch.manual_seed(0)
    for x in model.parameters():
        size = scale * x[0].numel() ** -0.5 if x.ndim > 1 else 0.5
        x.data = size * torch.randn(x.shape)
    return model.eval()


# ---- What needs no model -------------------------------------------------------------------------
def test_jpeg():
    """jpeg is minus the size of the JPEG of quality 95 in kilobytes, of 1000: DDPO's."""
    sizes = []
    for picture in ARRAYS:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=95)
        sizes.append(len(file.getvalue()) / 1000)
    assert_close(score(nft.jpeg), -torch.tensor(sizes))


def test_custom():
    """custom.py gives grey 0, colours more, and -1 times that where the metadata wish for grey."""
    images = torch.zeros(3, 3, 8, 8)
    images[0] = 0.4
    images[1:, 0] = 1
    found = score(custom.reward, images, [""] * 3, [{}, {}, {"colourful": -1}])
    # Of pure red: opponents 255 and 127.5, no spread, 0.3 of the shift, over 100.
    expected = 0.3 * (255**2 + 127.5**2) ** 0.5 / 100
    assert_close(found, torch.tensor([0.0, expected, -expected]))


def test_roughness():
    """A ramp has none. A chessboard of steps of 0.1 has 0.4; less if blurred, more with speckle."""
    ramp = torch.linspace(0, 1, 30).expand(3, 20, 30)
    square = torch.arange(20)[:, None] + torch.arange(30)
    board = (0.1 * (square % 2)).expand(3, 20, 30)
    blurred = F.avg_pool2d(board, 5, 1)
    speckled = board + 0.1 * torch.randn(board.shape)
    found = []
    for image in (ramp, board, blurred, speckled):
        found += score(roughness.reward, image[None], [""]).tolist()
    assert found[:2] == pytest.approx([0, 0.4], abs=1e-6)
    assert found[2] < 0.1
    assert found[3] > 0.45


def test_brightness_and_saturation():
    """Grey has a brightness and no saturation, pure red all saturation, and pink half of it."""
    images = torch.zeros(4, 3, 8, 8)
    images[1] = 0.5
    images[2:, 0] = 1
    images[3, 1:] = 0.5
    brightness = score(roughness.brightness, images)
    saturation = score(roughness.saturation, images)
    assert_close(brightness, torch.tensor([0, 0.5, 1 / 3, 2 / 3]))
    assert_close(saturation, torch.tensor([0, 0, 1, 0.5]))


# ---- CLIP ----------------------------------------------------------------------------------------
def tokenizer():
    """That of CLIP, in the hub's cache."""
    return transformers.CLIPTokenizer.from_pretrained(untrained.CLIP)


def preprocess(arrays):
    """CLIP's preprocessing by Pillow: (B, H, W, 3) -> (B, 3, 224, 224)."""
    return untrained.image_processor()(list(arrays), return_tensors="pt").pixel_values


@torch.no_grad()
def embeddings(repository):
    """CLIP's of ARRAYS and PROMPTS in float64: two (4, 768) of length 1, and its scale."""
    model = transformers.CLIPModel.from_pretrained(repository).double()
    pooled = model.vision_model(preprocess(ARRAYS).double()).pooler_output
    seen = pooled @ model.visual_projection.weight.T
    read = []
    # One by one, so that nothing is padded.
    for prompt in PROMPTS:
        ids = tokenizer()(prompt, truncation=True, return_tensors="pt").input_ids
        read.append(model.text_model(ids).pooler_output @ model.text_projection.weight.T)
    scale = model.logit_scale.exp().item()
    return F.normalize(seen, dim=1), F.normalize(torch.cat(read), dim=1), scale


def assert_measures(reward, expected):
    """A reward gives the expected numbers, which differ, to a thousandth."""
    size = expected.abs().max().item()
    assert_close(score(reward).double(), expected, atol=1e-3 * size, rtol=0)
    assert expected.std() > 0.01 * size


def test_clip_and_pickscore_are_cosines():
    """clip is the cosine of image and prompt, pickscore its own CLIP's, times its scale over 26."""
    seen, read, _ = embeddings(untrained.CLIP)
    assert_measures(clip.reward(), (seen * read).sum(1))
    seen, read, scale = embeddings(untrained.PICKSCORE)
    assert_measures(pickscore.reward(), (seen * read).sum(1) * scale / 26)


def test_aesthetic_is_a_linear_head():
    """aesthetic is LAION's head on CLIP's embedding of the image."""
    (file,) = (common.root() / "hub").rglob("snapshots/*/aesthetic-model.pth")
    head = torch.load(file, weights_only=True)
    x, _, _ = embeddings(untrained.CLIP)
    for i in untrained.HEAD:
        weight = head[f"layers.{i}.weight"].double()
        x = x @ weight.T + head[f"layers.{i}.bias"].double()
    assert_measures(nft.aesthetic(), x[:, 0])


# ---- hpsv2.py ------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def open_clip():
    """open_clip's model and tokenizer use nothing of torchvision: stand-ins will do for it."""
    with pytest.MonkeyPatch.context() as patch:
        for part in ("", ".transforms", ".transforms.functional", ".ops", ".ops.misc"):
            patch.setitem(sys.modules, f"torchvision{part}", MagicMock())
        # These two would look closer at the stand-ins.
        patch.setitem(sys.modules, "timm", None)
        patch.setitem(sys.modules, "transformers", None)
        reason = "pip install --no-deps open_clip_torch ftfy wcwidth"
        return pytest.importorskip("open_clip", reason=reason)


def save_hpsv2(open_clip):
    """The checkpoint of HPSv2, tiny, of the sizes that the hub's cache has: open_clip's model."""
    vision = {"image_size": 224, "patch_size": 32, "layers": 2, "width": 32, "head_width": 16}
    text = {"vocab_size": len(tokenizer()), "layers": 2, "width": 32, "heads": 2}
    text |= {"mlp_ratio": 2.0, "pool_type": "eos", "eos_id": tokenizer().eos_token_id}
    model = open_clip.CLIP(768, vision | {"mlp_ratio": 2.0}, text, quick_gelu=True)
    save({"state_dict": randomise(model).state_dict()}, hpsv2.REPOSITORY, hpsv2.FILE)
    return model


@torch.no_grad()
def test_hpsv2_is_open_clip(open_clip):
    """From one checkpoint open_clip and hpsv2.py get equal scores; what is not square gets bars."""
    model = save_hpsv2(open_clip)
    tokens = tokenizer()(PROMPTS, padding="max_length", truncation=True, return_tensors="pt")
    seen = model.encode_image(preprocess(ARRAYS[:, :, :300]), normalize=True)
    read = model.encode_text(tokens.input_ids, normalize=True)
    reward = hpsv2.reward()
    found = score(reward, IMAGES[..., :300])
    assert_close(found, (seen * read).sum(1), atol=2e-5, rtol=0)
    assert found.std() > 1e-3
    wide = IMAGES[:, :, :112, :224]
    assert_close(score(reward, wide), score(reward, F.pad(wide, (0, 0, 56, 56))))


# ---- imagereward.py ------------------------------------------------------------------------------
TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
# PyTorch's names in a transformer -> those of the released file.
RELEASED = {
    "visual_encoder.layers": "visual_encoder.blocks",
    "self_attn.in_proj_": "attn.qkv.",
    "self_attn.out_proj": "attn.proj",
    "linear": "mlp.fc",
}


class Blip(nn.Module):
    """ImageReward of PyTorch's own transformer and of a BERT; a picture is four patches."""

    def __init__(self):
        super().__init__()
        block = nn.TransformerEncoderLayer(32, 2, 48, 0.0, "gelu", 1e-6, True, norm_first=True)
        see = nn.TransformerEncoder(block, 2, nn.LayerNorm(32, 1e-6), enable_nested_tensor=False)
        see.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, 32, 112, 112)})
        see.cls_token = nn.Parameter(torch.zeros(1, 1, 32))
        see.pos_embed = nn.Parameter(torch.zeros(1, 5, 32))
        config = transformers.BertConfig(
            **SIZES, vocab_size=len(TOKENS), is_decoder=True, add_cross_attention=True
        )
        read = transformers.BertModel(config, add_pooling_layer=False)
        self.blip = nn.ModuleDict({"visual_encoder": see, "text_encoder": read})
        layers = []
        for n, m in ((32, 1024), (1024, 128), (128, 64), (64, 16), (16, 1)):
            layers += [nn.Linear(n, m), nn.Identity()]
        # The last two layers follow each other.
        del layers[7]
        self.mlp = nn.ModuleDict({"layers": nn.Sequential(*layers)})

    def forward(self, pixels, prompt):
        """(3, 224, 224) and a prompt of TOKENS -> its score."""
        see, read = self.blip.values()
        patches = see.patch_embed["proj"](pixels[None]).flatten(2).transpose(1, 2)
        seen = see(torch.cat([see.cls_token, patches], 1) + see.pos_embed)
        ids = [2, *[TOKENS.index(word) for word in prompt.split()][:33], 3]
        # Nothing is masked, though BERT can look at pictures as a decoder alone.
        mask = torch.ones(1, 1, len(ids), len(ids), dtype=torch.bool)
        x = read(torch.tensor([ids]), mask, encoder_hidden_states=seen).last_hidden_state[0, 0]
        return (self.mlp["layers"](x)[0] - 0.16717362830052426) / 1.0333394966054072


def save_imagereward(monkeypatch):
    """The files of ImageReward, tiny: returns the Blip of them."""
    blip = randomise(Blip())
    # BLIP's BERT does not tell kinds of tokens apart.
    blip.blip["text_encoder"].embeddings.token_type_embeddings.weight.data.zero_()
    # What the released file has, too, and the score does not use.
    unused = ("blip.text_proj.weight", "blip.text_encoder.embeddings.position_ids")
    weights = dict.fromkeys(unused, torch.zeros(1))
    for name, x in blip.state_dict().items():
        for old, new in RELEASED.items():
            name = name.replace(old, new)
        if "token_type" not in name:
            weights[name] = x
    save(weights, imagereward.REPOSITORY, imagereward.FILE)
    vocabulary = {word: i for i, word in enumerate(TOKENS)}
    transformers.BertTokenizer(vocab=vocabulary).save_pretrained(imagereward.TOKENIZER)
    vision = SIZES | {"patch_size": 112}
    text = SIZES | {"encoder_hidden_size": 32, "vocab_size": len(TOKENS)}
    monkeypatch.setattr(imagereward, "VISION", imagereward.VISION | vision)
    monkeypatch.setattr(imagereward, "TEXT", imagereward.TEXT | text)
    return blip


@torch.no_grad()
def test_imagereward_is_blip(monkeypatch):
    """imagereward.py gives the score of such a BLIP, to 1e-4 of its spread."""
    blip = save_imagereward(monkeypatch)
    expected = [blip(*pair) for pair in zip(preprocess(ARRAYS), PROMPTS, strict=True)]
    found = score(imagereward.reward())
    assert_close(found, torch.stack(expected), atol=1e-4 * found.std().item(), rtol=0)


# ---- vlm.py --------------------------------------------------------------------------------------
@pytest.mark.parametrize("answer", ["Score: 3.5", "1. 0.5\n2. 2\nScore: 3.5.", "3.5 out of 5"])
def test_vlm_reads(answer):
    """An answer's score is its last number over 5."""
    assert vlm.read(answer) == 0.7


@pytest.mark.parametrize("answer", ["", "good", "Score: 85", "4 of the 12 cats"])
def test_vlm_reads_nothing(answer):
    """An answer whose last number is no number up to 5 scores 0, and is warned of."""
    with pytest.warns(UserWarning, match=re.escape(repr(answer))):
        assert vlm.read(answer) == 0


# Also numbers that may be scores: 0, 0.5 ... 6.5.
VOCABULARY = ["<pad>", "<unk>", "<s>", "</s>", "<image>", "rate", "now", *WORDS]
VOCABULARY += [f"{i / 2:g}" for i in range(14)]


def save_vlm(monkeypatch):
    """The files of a tiny LLaVA, whose settings would spoil its answers: it and its processor."""
    text = {"vocab_size": len(VOCABULARY), "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**SIZES, image_size=28, patch_size=14),
        text_config=transformers.LlamaConfig(**SIZES, **text),
        image_token_id=4,
    )
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(VOCABULARY)}, "<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    special |= {"unk_token": "<unk>", "additional_special_tokens": ["<image>"]}
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=28),
        transformers.PreTrainedTokenizerFast(tokenizer_object=core, **special),
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template="<image> {{ messages[0].content[1].text }} now",
        num_additional_image_tokens=1,
    )
    model = randomise(transformers.LlavaForConditionalGeneration(config), 3)
    # It says no image.
    model.get_output_embeddings().weight.data[4] = 0
    model.generation_config.update(do_sample=True, repetition_penalty=3.0, max_new_tokens=2)
    model.bfloat16().save_pretrained("judge/tiny")
    processor.save_pretrained("judge/tiny")
    monkeypatch.setenv("NFT_VLM", "judge/tiny")
    monkeypatch.setenv("NFT_VLM_TEMPLATE", "rate {prompt}")
    monkeypatch.setattr(vlm, "TOKENS", 6)
    return model.float(), processor


@torch.no_grad()
def greedy(model, processor, image, text):
    """The six likeliest next tokens, one after the other: no padding, no cache, no generate()."""
    given = processor(images=nft.to_pil(image), text=text, return_tensors="pt")
    ids = given["input_ids"]
    start = ids.shape[1]
    while ids.shape[1] < start + 6 and ids[0, -1] != 3:
        logits = model(input_ids=ids, pixel_values=given["pixel_values"]).logits[:, -1:]
        ids = torch.cat([ids, logits.argmax(2)], 1)
    return processor.decode(ids[0, start:], skip_special_tokens=True)


@pytest.mark.filterwarnings("ignore:vlm")
def test_vlm_is_greedy_decoding(monkeypatch):
    """Answers are those of greedy decoding in fp32, whatever the model's own settings."""
    model, processor = save_vlm(monkeypatch)
    images = torch.linspace(0.1, 1, 8).view(8, 1, 1, 1) * torch.rand(8, 3, 40, 40)
    prompts = ["a circle", "red", "the red cross the blue", "a", "blue", "a dog", "red", "now"]
    expected = []
    for image, prompt in zip(images, prompts, strict=True):
        expected.append(greedy(model, processor, image, f"<image> rate {prompt} now"))
    scores, answers = vlm.reward()(images, prompts, [{}] * 8)
    assert answers == expected
    assert scores == [vlm.read(answer) for answer in expected]
    # The comparison says something: one prompt has two answers.
    assert expected[1] != expected[6]


# ---- learned.py ----------------------------------------------------------------------------------
def test_learned_trains_once(tmp_path, monkeypatch):
    """It trains its judge where the file is missing, else reads it; a reward is its probability."""
    monkeypatch.setattr(learned, "FILE", tmp_path / "runs/learned.pt")
    train = functools.partial(learned.train, steps=2, size=8, pool=1)
    monkeypatch.setattr(learned, "train", train)
    first = learned.reward()
    monkeypatch.setattr(learned, "train", None)
    judge = learned.Judge()
    judge.load_state_dict(torch.load(learned.FILE, weights_only=True))
    images = torch.rand(3, 3, 32, 32)
    expected = torch.sigmoid(judge(images, PROMPTS[:3])).detach()
    for reward in (first, learned.reward()):
        assert_close(score(reward, images, PROMPTS[:3]), expected)


# ---- ocr.py --------------------------------------------------------------------------------------
def sign(text, missing=0.0):
    """A picture (3, 128, 384) of text in black on white; a share of it, on the left, is missing."""
    picture = Image.new("RGB", (384, 128), "white")
    font = ImageFont.load_default(44)
    ImageDraw.Draw(picture).text((20, 40), text, fill="black", font=font)
    pixels = torch.tensor(np.asarray(picture)).permute(2, 0, 1) / 255
    pixels[:, :, : int(384 * missing)] = 1
    return pixels


def test_ocr_reads():
    """It gives 1 to the text, less where some is missing, 0 to none; metadata's text goes first."""
    pytest.importorskip("rapidocr_onnxruntime", reason="pip install rapidocr-onnxruntime")
    images = torch.stack([sign("Hello World"), sign("Hello World", 0.35), sign("")])
    prompts = ['a sign "Goodbye"', 'a sign "hello world"', 'a sign "Hello"']
    metadata = [{"text": "Hello World"}, {}, {}]
    whole, damaged, blank = score(ocr.reward(), images, prompts, metadata).tolist()
    assert whole == 1
    assert 0.3 < damaged < 0.8
    assert blank == 0


def test_ocr_wants_a_text():
    """A prompt that quotes no text is refused, and how to quote one is said."""
    with pytest.raises(ValueError, match=r"'a sign without words' must quote"):
        ocr.check(['a "sign"', "a sign without words"], [{}, {}])


SIMILARITIES = [
    ("Grand 0pening", "Grand Opening", 11 / 12),
    ("sitting", "kitten", 1 - 3 / 6),
    ("the GRAND opening!", "Grand Opening", 1),
    ("what is this at all", "OPEN", 0),
]


@pytest.mark.parametrize(("found", "text", "similarity"), SIMILARITIES)
def test_similarity(found, text, similarity):
    """1 - edit distance / length, without spaces and case; 1 if found whole among other text."""
    assert ocr.similarity(found, text) == pytest.approx(similarity)


# ---- What holds for all --------------------------------------------------------------------------
MAKERS = [
    nft.aesthetic,
    clip.reward,
    pickscore.reward,
    hpsv2.reward,
    imagereward.reward,
    vlm.reward,
]
FUNCTIONS = [nft.jpeg, custom.reward, roughness.reward, roughness.brightness, roughness.saturation]


@pytest.mark.parametrize("reward", MAKERS + FUNCTIONS)
@pytest.mark.filterwarnings("ignore:vlm")
def test_a_score_is_the_images_own(reward, monkeypatch, request):
    """Batch and order change no score."""
    if reward is hpsv2.reward:
        save_hpsv2(request.getfixturevalue("open_clip"))
    if reward is imagereward.reward:
        save_imagereward(monkeypatch)
    if reward is vlm.reward:
        save_vlm(monkeypatch)
    if reward in MAKERS:
        reward = reward()
    whole = score(reward)
    order = [2, 0, 3, 1]
    single = score_each(reward, IMAGES[order], [PROMPTS[i] for i in order])
    assert_close(single, whole[order], atol=1e-5, rtol=1e-5)
    assert whole.std() > 1e-3


@pytest.mark.parametrize(("module", "limit"), [(clip, 77), (imagereward, 35)])
def test_prompts_that_are_cut(module, limit, monkeypatch):
    """A scorer of text says once how many prompts it cuts, and where; of others it says nothing."""
    save_imagereward(monkeypatch)
    reward = module.reward()
    with pytest.warns(UserWarning, match=f"1 of 4 prompts are cut at {limit} tokens") as told:
        reward.check(PROMPTS, [{}] * 4)
        reward.check(PROMPTS[:3], [{}] * 3)
    assert len(told) == 1


def test_by_name(tmp_path, monkeypatch):
    """Rewards go by name, FILE.py:FUNCTION and weight, though a package be called clip, too."""
    monkeypatch.setitem(sys.modules, "clip", ModuleType("clip"))
    saturation = "examples/rewards/roughness.py:saturation"
    reward = f"aesthetic,clip=2,pickscore=0,{saturation}=0"
    row = common.metrics(common.run("sd15", tmp_path / "run", reward=reward))[0]
    trained = row["eval_reward/aesthetic"] + 2 * row["eval_reward/clip"]
    assert row["eval_reward"] == pytest.approx(trained, rel=1e-4)
    assert row.keys() >= {"eval_reward/pickscore", f"eval_reward/{saturation}"}
