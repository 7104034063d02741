"""The learned scorers against independent implementations, on equal random weights.

    python -m pytest examples/tests/test_scorers.py
    pip install --no-deps open_clip_torch ftfy wcwidth      # what hpsv2.py is compared with

The models are tiny, of the real classes, in the files and formats of the real repositories. They
lie in directories of the repositories' names, which are taken before the hub. Without open_clip
the test of hpsv2.py is skipped, without torchvision that of Qwen2.5-VL.
SPDX-License-Identifier: MIT
"""

import sys
from pathlib import Path
from unittest.mock import MagicMock

import clip
import common  # noqa: F401 (offline, and the hub's cache is one of our own)
import hpsv2
import imagereward
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
import vlm
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch.testing import assert_close

import nft


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty directory to work in, where repositories go; nothing is loaded yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vlm, "READABLE", set())
    clip.load.cache_clear()
    torch.manual_seed(0)


def save(state, repository, file):
    """Write a checkpoint where the repository's would be."""
    folder = Path(repository)
    folder.mkdir(parents=True)
    torch.save(state, folder / file)


def randomise(model, scale=1.0):
    """Weights that pass everything on, and biases that matter, so that a wrong one shows."""
    torch.manual_seed(0)
    for x in model.parameters():
        size = 0.5
        if x.ndim > 1:
            size = scale * x[0].numel() ** -0.5
        x.data = size * torch.randn(x.shape)
    return model.eval()


def scores(module, images, prompts):
    """A module's rewards, an image at a time: (B,)."""
    rewards = [nft.Reward("one", 1.0, module.reward)]
    found = []
    for image, prompt in zip(images, prompts, strict=True):
        found.append(nft.score(rewards, image[None], [prompt], [{}])["reward"])
    return torch.cat(found)


def assert_batches_do_not_matter(module, prompts):
    """A batch, whose texts are padded to one length, is scored as its images are one by one."""
    images = torch.rand(len(prompts), 3, 40, 40)
    whole = module.reward(images, prompts, [{}] * len(prompts))
    assert_close(whole, scores(module, images, prompts))


# ---- What does not load --------------------------------------------------------------------------
ABSENT = [(hpsv2, "TOKENIZER"), (imagereward, "TOKENIZER"), (vlm, "MODEL")]


@pytest.mark.parametrize(("module", "name"), ABSENT)
def test_absent_weights(module, name, monkeypatch):
    """A model that does not load is named by its repository, at the first image."""
    monkeypatch.setattr(module, name, "nobody/nothing")
    with pytest.raises(nft.UserError, match="nobody/nothing did not load"):
        scores(module, torch.rand(1, 3, 8, 8), ["a cat"])


class Trap:
    """What unpickles by running code."""

    def __reduce__(self):
        return Path.touch, (Path("sprung"),)


@pytest.mark.parametrize("module", [hpsv2, imagereward])
def test_code_in_a_checkpoint(module):
    """A checkpoint that would run code is refused, by its repository's name, and runs none."""
    save({"state_dict": Trap()}, module.REPOSITORY, module.FILE)
    small_tokenizer().save_pretrained(module.TOKENIZER)
    with pytest.raises(nft.UserError, match=f"{module.REPOSITORY} did not load"):
        scores(module, torch.rand(1, 3, 8, 8), ["a cat"])
    assert not Path("sprung").exists()


# ---- hpsv2.py ------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def open_clip():
    """open_clip's model and tokenizer use nothing of torchvision: stand-ins will do for it."""
    with pytest.MonkeyPatch.context() as patch:
        for part in ("", ".transforms", ".transforms.functional", ".ops", ".ops.misc"):
            patch.setitem(sys.modules, f"torchvision{part}", MagicMock())
        # These two would look closer at the stand-ins
        for package in ("timm", "transformers"):
            patch.setitem(sys.modules, package, None)
        reason = "pip install --no-deps open_clip_torch ftfy wcwidth"
        return pytest.importorskip("open_clip", reason=reason)


def save_hpsv2(open_clip):
    """The files of HPSv2, tiny: returns open_clip's model of them and our tokenizer."""
    vision = {"image_size": 28, "patch_size": 14, "layers": 2, "width": 320, "head_width": 80}
    text = {"context_length": 77, "vocab_size": 49408, "layers": 2, "width": 128, "heads": 2}
    model = randomise(open_clip.CLIP(24, vision, text))
    save({"state_dict": model.state_dict()}, hpsv2.REPOSITORY, hpsv2.FILE)
    theirs = open_clip.SimpleTokenizer()
    # open_clip names the first and the last token in another way
    vocabulary = dict(theirs.encoder)
    vocabulary["<|startoftext|>"] = vocabulary.pop("<start_of_text>")
    vocabulary["<|endoftext|>"] = vocabulary.pop("<end_of_text>")
    merges = list(theirs.bpe_ranks)
    tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=merges)
    tokenizer.save_pretrained(hpsv2.TOKENIZER)
    return model, tokenizer


def letterbox(image, size, mean, std):
    """hpsv2's preprocessing by Pillow, in floats: (3, H, W) -> (1, 3, size, size)."""
    pixels = np.asarray(nft.to_pil(image), np.float32) / 255
    height, width, _ = pixels.shape
    h = round(height * size / max(height, width))
    w = round(width * size / max(height, width))
    top = (size - h) // 2
    left = (size - w) // 2
    canvas = np.zeros((size, size, 3))
    for i in range(3):
        plane = Image.fromarray(np.ascontiguousarray(pixels[..., i]))
        plane = plane.resize((w, h), Image.Resampling.BICUBIC)
        canvas[top : top + h, left : left + w, i] = plane
    normalised = (canvas - mean) / std
    return torch.tensor(normalised.transpose(2, 0, 1)[None]).float()


@torch.no_grad()
def test_hpsv2_is_open_clip(open_clip):
    """From one checkpoint open_clip and hpsv2.py get equal tokens and, to 1e-5, equal scores."""
    model, tokenizer = save_hpsv2(open_clip)
    shapes = [(28, 28), (40, 64), (100, 70), (20, 24), (33, 47)]
    images = [torch.rand(3, *shape) for shape in shapes]
    prompts = [
        "A cat, two dogs; it's 2024!",
        "a red table " * 30,
        "",
        "Zürich's café ☕\n日本",
        "x",
    ]
    expected = []
    for image, prompt in zip(images, prompts, strict=True):
        tokens = open_clip.tokenize([prompt])
        ours = tokenizer(prompt, truncation=True, max_length=77)["input_ids"]
        assert tokens[0, : len(ours)].tolist() == ours
        assert not tokens[0, len(ours) :].any()
        pixels = letterbox(image, 28, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
        seen = model.encode_image(pixels, normalize=True)
        read = model.encode_text(tokens, normalize=True)
        expected.append((seen * read).sum())
    found = scores(hpsv2, images, prompts)
    assert_close(found, torch.stack(expected), atol=1e-5, rtol=0)
    # The comparison says something
    assert found.std() > 0.02
    assert_batches_do_not_matter(hpsv2, prompts)


# ---- imagereward.py ------------------------------------------------------------------------------
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS += ["a", "photo", "of", "the", "red", "blue", "cat", "dog", "on", "table"]
SEEN = "blip.visual_encoder."
READ = "blip.text_encoder."
HEAD = [f"mlp.layers.{i}" for i in (0, 2, 4, 6, 7)]
VISION_WIDTH = 192
TEXT_WIDTH = 128


def add_linear(weights, name, size, *inputs):
    """A random linear layer (or convolution) to `size` numbers."""
    weight = torch.randn(size, *inputs)
    weights[f"{name}.weight"] = weight * weight[0].numel() ** -0.5
    weights[f"{name}.bias"] = 0.5 * torch.randn(size)


def add_norm(weights, name, width):
    """A random LayerNorm."""
    weights[f"{name}.weight"] = torch.randn(width)
    weights[f"{name}.bias"] = 0.5 * torch.randn(width)


def add_vision(weights):
    """The ViT: 32x32 pixels in four patches, two blocks."""
    width = VISION_WIDTH
    weights[f"{SEEN}cls_token"] = torch.randn(1, 1, width)
    weights[f"{SEEN}pos_embed"] = torch.randn(1, 5, width)
    add_linear(weights, f"{SEEN}patch_embed.proj", width, 3, 16, 16)
    add_norm(weights, f"{SEEN}norm", width)
    for i in range(2):
        block = f"{SEEN}blocks.{i}"
        add_norm(weights, f"{block}.norm1", width)
        add_linear(weights, f"{block}.attn.qkv", 3 * width, width)
        add_linear(weights, f"{block}.attn.proj", width, width)
        add_norm(weights, f"{block}.norm2", width)
        add_linear(weights, f"{block}.mlp.fc1", 80, width)
        add_linear(weights, f"{block}.mlp.fc2", width, 80)


def add_text(weights):
    """The BERT with cross-attention: two layers."""
    width = TEXT_WIDTH
    embeddings = f"{READ}embeddings"
    weights[f"{embeddings}.word_embeddings.weight"] = torch.randn(len(WORDS), width)
    weights[f"{embeddings}.position_embeddings.weight"] = torch.randn(64, width)
    weights[f"{embeddings}.position_ids"] = torch.arange(64)[None]
    add_norm(weights, f"{embeddings}.LayerNorm", width)
    for i in range(2):
        layer = f"{READ}encoder.layer.{i}"
        for name, source in (("attention", width), ("crossattention", VISION_WIDTH)):
            attention = f"{layer}.{name}"
            add_linear(weights, f"{attention}.self.query", width, width)
            add_linear(weights, f"{attention}.self.key", width, source)
            add_linear(weights, f"{attention}.self.value", width, source)
            add_linear(weights, f"{attention}.output.dense", width, width)
            add_norm(weights, f"{attention}.output.LayerNorm", width)
        add_linear(weights, f"{layer}.intermediate.dense", 96, width)
        add_linear(weights, f"{layer}.output.dense", width, 96)
        add_norm(weights, f"{layer}.output.LayerNorm", width)


def imagereward_weights():
    """A random state dict under the released file's names, of smaller sizes."""
    weights = {}
    add_vision(weights)
    add_text(weights)
    # The released file has layers that the score does not use
    add_linear(weights, "blip.text_proj", 8, TEXT_WIDTH)
    sizes = [TEXT_WIDTH, 1024, 128, 64, 16, 1]
    for i, name in enumerate(HEAD):
        add_linear(weights, name, sizes[i + 1], sizes[i])
    return weights


class Blip:
    """ImageReward written out from its state dict: nothing but matrix products."""

    def __init__(self, weights):
        self.weights = weights

    def linear(self, x, name):
        weight = self.weights[f"{name}.weight"].flatten(1)
        return x @ weight.T + self.weights[f"{name}.bias"]

    def norm(self, x, name, eps):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
        return x * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def attend(self, query, key, value, counts):
        """Heads of 64; counts: 1 for a key that counts, 0 for padding."""
        heads = []
        for k in range(0, query.shape[1], 64):
            head = slice(k, k + 64)
            weight = (query[:, head] @ key[:, head].T / 8).exp() * counts
            weight = weight / weight.sum(1, keepdim=True)
            heads.append(weight @ value[:, head])
        return torch.cat(heads, 1)

    def see(self, pixels):
        """Pixels (3, 32, 32) -> (5, 192)."""
        patches = pixels.view(3, 2, 16, 2, 16).permute(1, 3, 0, 2, 4).reshape(4, -1)
        patches = self.linear(patches, f"{SEEN}patch_embed.proj")
        x = torch.cat([self.weights[f"{SEEN}cls_token"][0], patches])
        x = x + self.weights[f"{SEEN}pos_embed"][0]
        for i in range(2):
            block = f"{SEEN}blocks.{i}"
            y = self.norm(x, f"{block}.norm1", 1e-6)
            query, key, value = self.linear(y, f"{block}.attn.qkv").chunk(3, 1)
            y = self.attend(query, key, value, torch.ones(5))
            x = x + self.linear(y, f"{block}.attn.proj")
            y = self.norm(x, f"{block}.norm2", 1e-6)
            y = F.gelu(self.linear(y, f"{block}.mlp.fc1"))
            x = x + self.linear(y, f"{block}.mlp.fc2")
        return self.norm(x, f"{SEEN}norm", 1e-6)

    def attention(self, x, source, counts, name):
        """Attention from x to `source`, and the sum with x, normalised."""
        query = self.linear(x, f"{name}.self.query")
        key = self.linear(source, f"{name}.self.key")
        value = self.linear(source, f"{name}.self.value")
        y = self.attend(query, key, value, counts)
        y = self.linear(y, f"{name}.output.dense")
        return self.norm(y + x, f"{name}.output.LayerNorm", 1e-12)

    def read(self, seen, ids):
        """What was seen (5, 192) and 35 token ids -> (35, 128)."""
        words = self.weights[f"{READ}embeddings.word_embeddings.weight"]
        positions = self.weights[f"{READ}embeddings.position_embeddings.weight"]
        x = words[ids] + positions[:35]
        x = self.norm(x, f"{READ}embeddings.LayerNorm", 1e-12)
        for i in range(2):
            layer = f"{READ}encoder.layer.{i}"
            x = self.attention(x, x, (ids != 0).float(), f"{layer}.attention")
            x = self.attention(x, seen, torch.ones(5), f"{layer}.crossattention")
            y = F.gelu(self.linear(x, f"{layer}.intermediate.dense"))
            y = self.linear(y, f"{layer}.output.dense")
            x = self.norm(y + x, f"{layer}.output.LayerNorm", 1e-12)
        return x

    def score(self, pixels, prompt):
        words = [WORDS.index(word) for word in prompt.lower().split()][:33]
        padding = [0] * (33 - len(words))
        ids = torch.tensor([2, *words, 3, *padding])
        x = self.read(self.see(pixels), ids)[0]
        for name in HEAD:
            x = self.linear(x, name)
        return (x[0] - 0.16717362830052426) / 1.0333394966054072


def save_imagereward():
    """The files of ImageReward, tiny: returns the weights."""
    weights = imagereward_weights()
    save(weights, imagereward.REPOSITORY, imagereward.FILE)
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    transformers.BertTokenizer(vocab=vocabulary).save_pretrained(imagereward.TOKENIZER)
    return weights


def test_imagereward_is_blip():
    """imagereward.py gives BLIP's score, written out as matrix products, to 1e-4 of its spread."""
    blip = Blip(save_imagereward())
    size = {"height": 32, "width": 32}
    process = transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=size)
    shapes = [(32, 32), (100, 70), (20, 24), (64, 48), (47, 33)]
    images = [torch.rand(3, *shape) for shape in shapes]
    long = "A photo of the dog " * 9
    prompts = ["a red cat", long, "blue table", "", "the cat on the table"]
    expected = []
    for image, prompt in zip(images, prompts, strict=True):
        pixels = process(nft.to_pil(image))["pixel_values"][0]
        expected.append(blip.score(torch.tensor(pixels), prompt))
    found = scores(imagereward, images, prompts)
    assert_close(found, torch.stack(expected), atol=1e-4 * found.std().item(), rtol=0)
    assert_batches_do_not_matter(imagereward, prompts)


def test_imagereward_cuts_as_torchvision():
    """Of 19 columns too many torchvision cuts 10 on the left, where transformers cuts 9."""
    columns = torch.arange(51).expand(3, 32, 51) / 255
    pixels = imagereward.preprocess(columns, 32)
    red = pixels[0, 0] * imagereward.PIXEL_STD[0] + imagereward.PIXEL_MEAN[0]
    assert_close(255 * red, torch.arange(10.0, 42.0))


# ---- vlm.py --------------------------------------------------------------------------------------
ANSWERS = [
    ("Final Score: 3.5", 0.7),
    ("4", 0.8),
    ("1. Objects: 0.5\n2. Style: 2\nFinal Score: 4.", 0.8),
    ("5.0/5", 1.0),
    ("I give it 4 out of 5", 0.8),
    ("Score: 0", 0.0),
    ("Final Score: 2 / 5.", 0.4),
]


@pytest.mark.parametrize(("answer", "score"), ANSWERS)
def test_vlm_reads(answer, score):
    """An answer's score is its last number over 5."""
    assert vlm.read(answer) == pytest.approx(score)


@pytest.mark.parametrize("answer", ["", "good", "Score: 85", "4 of the 12 cats"])
def test_vlm_reads_nothing(answer):
    """An answer whose last number is no number up to 5 has no score."""
    assert vlm.read(answer) is None


VOCABULARY = ["<pad>", "<unk>", "<s>", "</s>"]
VOCABULARY += ["rate", "a", "the", "red", "blue", "cat", "now", "good", "bad"]
# Numbers that may be scores: 0, 0.5 ... 6.5
VOCABULARY += [f"{i / 2:g}" for i in range(14)]
PART = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
TEXT = PART | {
    "vocab_size": 31,
    "num_key_value_heads": 2,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "pad_token_id": 0,
}
QWEN_TEXT = TEXT | {
    "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
}
QWEN_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "depth": 2,
    "num_heads": 2,
    "out_hidden_size": 32,
    "fullatt_block_indexes": [1],
    "window_size": 56,
}
# Says the image's tokens where the image goes, and " now" before an answer
CHAT = """\
{% for message in messages %}{% for part in message.content %}\
{{ 'IMAGE ' if part.type == 'image' else part.text }}\
{% endfor %}{% endfor %}{{ ' now' if add_generation_prompt }}"""


def small_tokenizer(more=()):
    """A tokenizer of the 27 words of VOCABULARY and some special tokens more."""
    numbers = {word: i for i, word in enumerate(VOCABULARY)}
    core = Tokenizer(WordLevel(numbers, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=list(more),
    )


def make_llava():
    """LLaVA, of CLIP and Llama: model, processor, the tokens of an image."""
    image = "<image>"
    vision = transformers.CLIPVisionConfig(**PART, image_size=28, patch_size=14)
    text = transformers.LlamaConfig(**TEXT)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_id=27)
    pixels = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    )
    processor = transformers.LlavaProcessor(
        image_processor=pixels,
        tokenizer=small_tokenizer([image]),
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=CHAT.replace("IMAGE", image),
        num_additional_image_tokens=1,
    )
    return transformers.LlavaForConditionalGeneration(config), processor, image


def make_qwen():
    """Qwen2.5-VL, what UnifiedReward is made of: model, processor, the tokens of an image."""
    pytest.importorskip("torchvision", reason="pip install torchvision, the build that fits torch")
    special = ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>"]
    image = " ".join(special[:3])
    config = transformers.Qwen2_5_VLConfig(
        text_config=QWEN_TEXT,
        vision_config=QWEN_VISION,
        vision_start_token_id=27,
        image_token_id=28,
        vision_end_token_id=29,
        video_token_id=30,
    )
    size = {"shortest_edge": 28**2, "longest_edge": 56**2}
    processor = transformers.Qwen2_5_VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(size=size),
        tokenizer=small_tokenizer(special),
        video_processor=transformers.Qwen2VLVideoProcessor(size=size),
        chat_template=CHAT.replace("IMAGE", image),
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config), processor, image


@torch.no_grad()
def greedy(model, processor, image, text, longest):
    """The likeliest next token, again and again: no padding, no cache, no generate()."""
    given = dict(processor(images=nft.to_pil(image), text=text, return_tensors="pt"))
    tokens = []
    while len(tokens) < longest:
        token = model(**given).logits[0, -1].argmax().item()
        tokens.append(token)
        if token == processor.tokenizer.eos_token_id:
            break
        following = {"input_ids": token, "attention_mask": 1, "mm_token_type_ids": 0}
        for name in following.keys() & given.keys():
            added = torch.tensor([[following[name]]])
            given[name] = torch.cat([given[name], added], 1)
    return processor.decode(tokens, skip_special_tokens=True)


def save_judge(model, processor):
    """The files of a judge, in half precision, with settings that would spoil its answers."""
    randomise(model, 3)
    # It says no image tokens
    model.get_output_embeddings().weight.data[27:] = 0
    model.generation_config.do_sample = True
    model.generation_config.temperature = 2.0
    model.generation_config.repetition_penalty = 3.0
    model.generation_config.max_new_tokens = 2
    model.bfloat16().save_pretrained("judge/tiny")
    processor.save_pretrained("judge/tiny")
    model.float()


@pytest.mark.parametrize("make", [make_llava, make_qwen])
def test_vlm_is_greedy_decoding(make, monkeypatch):
    """Answers are those of greedy decoding in fp32, whatever the batch and the model's settings."""
    model, processor, image_tokens = make()
    save_judge(model, processor)
    monkeypatch.setattr(vlm, "MODEL", "judge/tiny")
    monkeypatch.setattr(vlm, "TEMPLATE", "rate {prompt}")
    monkeypatch.setattr(vlm, "TOKENS", 6)
    brightness = torch.linspace(0.1, 1, 8).view(8, 1, 1, 1)
    images = brightness * torch.rand(8, 3, 40, 40)
    prompts = ["a cat", "red", "the red cat the blue cat", "a", "blue the", "a dog", "red", "now"]
    expected = []
    for image, prompt in zip(images, prompts, strict=True):
        text = f"{image_tokens} rate {prompt} now"
        expected.append(greedy(model, processor, image, text, 6))
    for order in ([0, 1, 2, 3, 4, 5, 6, 7], [7, 6, 5, 4, 3, 2, 1, 0], [2, 3]):
        texts = [prompts[i] for i in order]
        found, extra = vlm.reward(images[order], texts, [{}] * len(order))
        assert extra["answers"] == [expected[i] for i in order]
        assert found == [vlm.read(expected[i]) or 0.0 for i in order]
    assert vlm.load(vlm.make_judge, "judge/tiny", images.device).dtype == torch.float32
    # The comparison says something: many answers, two for one prompt
    assert len(set(expected)) > 4
    assert expected[1] != expected[6]


def test_vlm_without_a_number(monkeypatch):
    """An answer without a number scores 0, but the first ones must have one: else it is refused."""
    answers = ["no idea", "none"]
    monkeypatch.setattr(vlm, "ask", lambda images, prompts: answers)
    batch = torch.rand(2, 3, 8, 8), ["a", "b"], [{}, {}]
    with pytest.raises(ValueError, match=r"'no idea': must give a number"):
        vlm.reward(*batch)
    answers[1] = "2"
    assert vlm.reward(*batch)[0] == [0.0, 0.4]
    answers[1] = "none"
    assert vlm.reward(*batch)[0] == [0.0, 0.0]
