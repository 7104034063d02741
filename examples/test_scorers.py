"""The scorers of examples/ against independent implementations on random weights; each docstring states a law.

    python -m pytest -q examples/test_scorers.py
    pip install --no-deps open_clip_torch ftfy wcwidth      # what hpsv2.py is compared with; skipped without

The models are tiny, of the real classes, in the files and formats of the real repositories, which are taken from
directories of the same name. No test needs a network or a GPU. That of Qwen2.5-VL is skipped without torchvision.
SPDX-License-Identifier: MIT
"""
import functools
import os
import pathlib
import sys
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

os.environ.setdefault("HF_HUB_OFFLINE", "1")
HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import hpsv2
import imagereward
import pretrain_tiny
import vlm

import nft

SHAPES = [(28, 28), (40, 64), (100, 70), (20, 24), (33, 47)]        # of pictures: larger, smaller, tall, wide


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty directory to work in, where repositories go; nothing is loaded yet."""
    monkeypatch.chdir(tmp_path)
    for module in (hpsv2, imagereward, vlm):
        module.load.cache_clear()
    torch.manual_seed(0)
    return tmp_path


def randomise(model, scale=1.0):
    """Weights that pass everything on and biases that matter, so that a wrong one shows."""
    torch.manual_seed(0)
    for x in model.parameters():
        x.data = torch.randn_like(x) * (scale * x[0].numel() ** -0.5 if x.ndim > 1 else 0.5)
    return model.eval()


def save(state, repository, file):
    """Write a checkpoint where the repository's would be."""
    pathlib.Path(repository).mkdir(parents=True)
    torch.save(state, pathlib.Path(repository, file))


def scores(module, images, prompts):
    """A module's rewards, an image at a time."""
    rewards = [("one", 1.0, module.reward)]
    return torch.cat([nft.score(rewards, x[None], [p], [{}])[0] for x, p in zip(images, prompts)])


# ---- all -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("module", [hpsv2, imagereward, vlm])
def test_absent_weights(module, monkeypatch):
    """A file is loaded without its model, whose absence is told at the first image, by its repository's name."""
    nft.load_rewards(f"{module.__file__}:reward")
    name = "MODEL" if module is vlm else "TOKENIZER"
    monkeypatch.setattr(module, name, "nobody/nothing")
    with pytest.raises(nft.Failure, match="nobody/nothing did not load"):
        scores(module, torch.rand(1, 3, 8, 8), ["a cat"])


class Trap:
    """What unpickles by running code."""
    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path("sprung"),)


@pytest.mark.parametrize("module", [hpsv2, imagereward])
def test_code_in_a_checkpoint(module):
    """A checkpoint that would run code is refused, by its repository's name, and runs none."""
    save({"state_dict": Trap()}, module.REPOSITORY, module.FILE)
    pretrain_tiny.make_tokenizer().save_pretrained(module.TOKENIZER)
    with pytest.raises(nft.Failure, match=f"{module.REPOSITORY} did not load"):
        scores(module, torch.rand(1, 3, 8, 8), ["a cat"])
    assert not os.path.exists("sprung")


# ---- hpsv2.py --------------------------------------------------------------------------------------------------
@functools.cache
def import_open_clip():
    """open_clip's model and tokenizer, which use nothing of torchvision: a stand-in will do where it imports that."""
    import transformers  # kept from it: it would look at the stand-in
    modules = [f"torchvision{x}" for x in ("", ".transforms", ".transforms.functional", ".ops", ".ops.misc")]
    stand_ins = {x: mock.MagicMock() for x in modules} | {"timm": None, transformers.__name__: None}
    with mock.patch.dict(sys.modules, stand_ins):
        return pytest.importorskip("open_clip", reason="pip install --no-deps open_clip_torch ftfy wcwidth")


def letterbox(image, size, mean, std):
    """hpsv2's preprocessing by Pillow, in floats: (3, H, W) -> (1, 3, size, size)."""
    pixels = np.asarray(nft.to_pil(image), np.float32) / 255
    h, w = (round(n * size / max(pixels.shape)) for n in pixels.shape[:2])
    top, left, canvas = (size - h) // 2, (size - w) // 2, np.zeros((size, size, 3))
    for i in range(3):
        plane = Image.fromarray(np.ascontiguousarray(pixels[..., i])).resize((w, h), Image.Resampling.BICUBIC)
        canvas[top:top + h, left:left + w, i] = plane
    return torch.tensor(((canvas - mean) / std).transpose(2, 0, 1)[None]).float()


def test_hpsv2_is_open_clip():
    """From one checkpoint open_clip and hpsv2.py give the same tokens and the same score to 1e-5."""
    open_clip = import_open_clip()
    from transformers import CLIPTokenizer
    model = randomise(open_clip.CLIP(
        24, {"image_size": 28, "layers": 2, "width": 320, "head_width": 80, "patch_size": 14},
        {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 2}))
    save({"state_dict": model.state_dict()}, hpsv2.REPOSITORY, hpsv2.FILE)
    simple = open_clip.SimpleTokenizer()                # open_clip names the first and last token otherwise
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    tokenizer = CLIPTokenizer(vocab={names.get(k, k): v for k, v in simple.encoder.items()},
                              merges=list(simple.bpe_ranks))
    tokenizer.save_pretrained(hpsv2.TOKENIZER)
    images = [torch.rand(3, *shape) for shape in SHAPES]
    prompts = ["A cat, two dogs; it's 2024!", "a photo of a red table " * 30, "", "Zürich's café ☕\n日本", "x"]
    expected = []
    for image, prompt in zip(images, prompts):
        tokens = open_clip.tokenize([prompt])
        ours = tokenizer(prompt, truncation=True, max_length=77)["input_ids"]
        assert tokens[0, :len(ours)].tolist() == ours and not tokens[0, len(ours):].any()
        pixels = letterbox(image, 28, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
        with torch.no_grad():
            pair = model.encode_image(pixels, normalize=True), model.encode_text(tokens, normalize=True)
        expected.append((pair[0] * pair[1]).sum())
    found = scores(hpsv2, images, prompts)
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=0)
    assert found.std() > 0.02                           # the comparison says something
    square = torch.rand(5, 3, 40, 40)                   # a batch, padded, is its parts
    torch.testing.assert_close(hpsv2.reward(square, prompts, [{}] * 5), scores(hpsv2, square, prompts))


# ---- imagereward.py --------------------------------------------------------------------------------------------
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]",
              "a", "photo", "of", "the", "red", "blue", "cat", "dog", "on", "table"]


def blip_weights(width=192, text=128):
    """A state dict in the released file's names, sizes apart: ViT, BERT with cross-attention, head."""
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, 5, width), "patch_embed.proj": (width, 3, 16, 16),
              "norm": (width,)}
    for i in range(2):
        shapes |= {f"blocks.{i}.{k}": v for k, v in {
            "norm1": (width,), "attn.qkv": (3 * width, width), "attn.proj": (width, width), "norm2": (width,),
            "mlp.fc1": (80, width), "mlp.fc2": (width, 80)}.items()}
    shapes = {f"blip.visual_encoder.{k}": v for k, v in shapes.items()}
    bert = {"embeddings.word_embeddings.weight": (len(VOCABULARY), text), "embeddings.LayerNorm": (text,),
            "embeddings.position_embeddings.weight": (64, text), "embeddings.position_ids": (1, 64)}
    for i in range(2):
        for part, seen in (("attention", text), ("crossattention", width)):
            bert |= {f"encoder.layer.{i}.{part}.{k}": v for k, v in {
                "self.query": (text, text), "self.key": (text, seen), "self.value": (text, seen),
                "output.dense": (text, text), "output.LayerNorm": (text,)}.items()}
        bert |= {f"encoder.layer.{i}.{k}": v for k, v in {
            "intermediate.dense": (96, text), "output.dense": (text, 96), "output.LayerNorm": (text,)}.items()}
    shapes |= {f"blip.text_encoder.{k}": v for k, v in bert.items()} | {"blip.text_proj": (8, text)}
    sizes = (text, 1024, 128, 64, 16, 1)
    shapes |= {f"mlp.layers.{i}": (m, n) for i, n, m in zip((0, 2, 4, 6, 7), sizes, sizes[1:])}
    weights = {}
    for name, shape in shapes.items():
        bare = name.endswith(("token", "embed", "weight", "ids"))       # the others have a weight and a bias
        weights[name if bare else f"{name}.weight"] = torch.randn(shape) * np.prod(shape[1:]) ** -0.5
        if not bare:
            weights[f"{name}.bias"] = 0.5 * torch.randn(shape[0])
    return weights


class Blip:
    """ImageReward written out from its state dict: nothing but matrix products."""
    def __init__(self, weights):
        self.w = weights

    def linear(self, x, name):
        return x @ self.w[f"{name}.weight"].flatten(1).T + self.w[f"{name}.bias"]

    def norm(self, x, name, eps):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + eps).sqrt()
        return x * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def attend(self, q, k, v, mask=None):
        """Heads of 64; mask: which keys count."""
        heads = []
        for q_, k_, v_ in zip(*(x.split(64, -1) for x in (q, k, v))):
            weight = (q_ @ k_.T / 8).exp() * (1 if mask is None else mask)
            heads.append(weight / weight.sum(-1, keepdim=True) @ v_)
        return torch.cat(heads, -1)

    def see(self, pixels, v="blip.visual_encoder."):
        """(3, 32, 32) -> (5, 192)."""
        patches = pixels.view(3, 2, 16, 2, 16).permute(1, 3, 0, 2, 4).reshape(4, -1)
        x = torch.cat([self.w[v + "cls_token"][0], self.linear(patches, v + "patch_embed.proj")])
        x = x + self.w[v + "pos_embed"][0]
        for b in (f"{v}blocks.{i}." for i in range(2)):
            q, k, value = self.linear(self.norm(x, b + "norm1", 1e-6), b + "attn.qkv").split(192, -1)
            x = x + self.linear(self.attend(q, k, value), b + "attn.proj")
            x = x + self.linear(F.gelu(self.linear(self.norm(x, b + "norm2", 1e-6), b + "mlp.fc1")), b + "mlp.fc2")
        return self.norm(x, v + "norm", 1e-6)

    def read(self, seen, ids, t="blip.text_encoder."):
        """(5, 192), 35 token ids -> (35, 128)."""
        words, positions = (self.w[f"{t}embeddings.{n}_embeddings.weight"] for n in ("word", "position"))
        x = self.norm(words[ids] + positions[:35], t + "embeddings.LayerNorm", 1e-12)
        for b in (f"{t}encoder.layer.{i}." for i in range(2)):
            for a, keys, mask in ((b + "attention.", None, (ids != 0).float()), (b + "crossattention.", seen, None)):
                q, k, v = (self.linear(x if y is None else y, f"{a}self.{n}")
                           for y, n in ((x, "query"), (keys, "key"), (keys, "value")))
                y = self.linear(self.attend(q, k, v, mask), a + "output.dense")
                x = self.norm(y + x, a + "output.LayerNorm", 1e-12)
            y = self.linear(F.gelu(self.linear(x, b + "intermediate.dense")), b + "output.dense")
            x = self.norm(y + x, b + "output.LayerNorm", 1e-12)
        return x

    def score(self, pixels, ids):
        x = self.read(self.see(pixels), ids)[0]
        for i in (0, 2, 4, 6, 7):
            x = self.linear(x, f"mlp.layers.{i}")
        return (x[0] - 0.16717362830052426) / 1.0333394966054072


def bert_ids(prompt):
    """35 token ids of words in VOCABULARY: [CLS] words [SEP] [PAD] ..."""
    words = [VOCABULARY.index(w) for w in prompt.lower().split()][:33]
    return torch.tensor([2, *words, 3] + [0] * (33 - len(words)))


def save_imagereward(state):
    """The checkpoint and a tokenizer of VOCABULARY."""
    from transformers import BertTokenizer
    save(state, imagereward.REPOSITORY, imagereward.FILE)
    BertTokenizer(vocab={w: i for i, w in enumerate(VOCABULARY)}).save_pretrained(imagereward.TOKENIZER)


def test_imagereward_is_blip():
    """imagereward.py gives the score of BLIP written out as matrix products, to 1e-4 of its spread."""
    from transformers import CLIPImageProcessorPil
    save_imagereward(weights := blip_weights())
    process = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    images = [torch.rand(3, *shape) for shape in ((32, 32), (100, 70), (20, 24), (64, 48), (47, 33))]
    prompts = ["a red cat", "A photo of the dog " * 9, "blue table", "", "the cat on the table"]
    expected = [Blip(weights).score(torch.tensor(process(nft.to_pil(x))["pixel_values"][0]), bert_ids(p))
                for x, p in zip(images, prompts)]
    found = scores(imagereward, images, prompts)
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-4 * found.std().item(), rtol=0)
    columns = torch.arange(51).expand(3, 32, 51) / 255  # of 19 to cut, torchvision cuts 10 on the left
    cut = imagereward.preprocess(columns, 32)[0, 0] * imagereward.PIXEL_STD[0] + imagereward.PIXEL_MEAN[0]
    torch.testing.assert_close(cut * 255, torch.arange(10.0, 42.0))
    square = torch.rand(5, 3, 40, 40)                   # a batch, padded, is its parts
    torch.testing.assert_close(imagereward.reward(square, prompts, [{}] * 5), scores(imagereward, square, prompts))


# ---- vlm.py ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("answer, score", [
    ("Final Score: 3.5", 0.7), ("4", 0.8), ("1. Objects: 0.5\n2. Style: 2\nFinal Score: 4.", 0.8), ("5.0/5", 1.0),
    ("I give it 4 out of 5", 0.8), ("Score: 0", 0.0), ("Final Score: 2 / 5.", 0.4),
    ("", None), ("good", None), ("Score: 85", None), ("4 of the 12 cats", None)])
def test_vlm_reads(answer, score):
    """An answer's score is its last number over 5; without a number up to 5 it has none."""
    assert vlm.read(answer) == (score if score is None else pytest.approx(score))


def make_tokenizer(image_tokens, others=()):
    """A tokenizer of 27 words and some tokens more, and a chat template with `image_tokens` where the image goes."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = ["<pad>", "<unk>", "<s>", "</s>", "rate", "a", "the", "red", "blue", "cat", "now", "good", "bad"]
    words += [f"{i / 2:g}" for i in range(14)]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=[*image_tokens, *others])
    return tokenizer, ("{% for m in messages %}{% for c in m.content %}{{ '" + " ".join(image_tokens) + " ' if "
                       "c.type == 'image' else c.text }}{% endfor %}{% endfor %}{{ ' now' if add_generation_prompt }}")


PART = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = PART | {"vocab_size": 31, "num_key_value_heads": 2, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}


def make_llava(image_tokens):
    """LLaVA: CLIP and Llama; model and processor."""
    import transformers as t
    tokenizer, template = make_tokenizer(image_tokens)
    config = t.LlavaConfig(vision_config=t.CLIPVisionConfig(**PART, image_size=28, patch_size=14),
                           text_config=t.LlamaConfig(**TEXT), image_token_id=27)
    pixels = t.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return t.LlavaForConditionalGeneration(config), t.LlavaProcessor(
        pixels, tokenizer, 14, "default", template, num_additional_image_tokens=1)


def make_qwen(image_tokens):
    """Qwen2.5-VL, what UnifiedReward is made of; model and processor."""
    pytest.importorskip("torchvision", reason="pip install torchvision, of the build that fits torch")
    import transformers as t
    tokenizer, template = make_tokenizer(image_tokens, ["<|video_pad|>"])
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    config = t.Qwen2_5_VLConfig(
        text_config=TEXT | {"rope_parameters": rope},
        vision_config={"hidden_size": 32, "depth": 2, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 32,
                       "fullatt_block_indexes": [1], "window_size": 56},
        vision_start_token_id=27, image_token_id=28, vision_end_token_id=29, video_token_id=30)
    size = {"shortest_edge": 28 ** 2, "longest_edge": 56 ** 2}
    return t.Qwen2_5_VLForConditionalGeneration(config), t.Qwen2_5_VLProcessor(
        t.Qwen2VLImageProcessor(size=size), tokenizer, t.Qwen2VLVideoProcessor(size=size), chat_template=template)


def greedy(model, processor, image, text, longest):
    """The likeliest next token again and again, by the whole model each time: no padding, no cache, no generate()."""
    given, tokens = dict(processor(images=nft.to_pil(image), text=text, return_tensors="pt")), []
    while len(tokens) < longest:
        with torch.no_grad():
            tokens.append(model(**given).logits[0, -1].argmax().item())
        if tokens[-1] == processor.tokenizer.eos_token_id:
            break
        for name, x in (("input_ids", tokens[-1]), ("attention_mask", 1), ("mm_token_type_ids", 0)):
            if name in given:
                given[name] = torch.cat([given[name], torch.tensor([[x]])], 1)
    return processor.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("make, image_tokens", [
    (make_llava, ["<image>"]), (make_qwen, ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"])])
def test_vlm_is_greedy_decoding(make, image_tokens, monkeypatch):
    """The answers are those of greedy decoding, image by image, in a batch of any order, whatever the repository's
    settings; and the scores those of the answers."""
    model, processor = make(image_tokens)
    randomise(model, 3)
    model.get_output_embeddings().weight.data[27:] = 0  # it says no image tokens
    settings = {"do_sample": True, "temperature": 2.0, "repetition_penalty": 3.0, "max_new_tokens": 2}
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    model.bfloat16().save_pretrained("judge/tiny")      # whatever they are saved in, they are used in fp32
    model.float()
    processor.save_pretrained("judge/tiny")
    for name, value in {"MODEL": "judge/tiny", "TEMPLATE": "rate {prompt}", "TOKENS": 6}.items():
        monkeypatch.setattr(vlm, name, value)
    images = torch.rand(8, 3, 40, 40) * torch.linspace(0.1, 1, 8).view(8, 1, 1, 1)
    prompts = ["a cat", "red", "the red cat the blue cat", "a", "blue the", "a dog", "red", "now"]
    texts = [f"{' '.join(image_tokens)} rate {prompt} now" for prompt in prompts]
    expected = [greedy(model, processor, x, text, 6) for x, text in zip(images, texts)]
    for order in (torch.arange(8), torch.arange(8).flip(0), torch.tensor([2, 3])):
        found, extra = vlm.reward(images[order], [prompts[i] for i in order], [{}] * len(order))
        assert extra["answers"] == [expected[i] for i in order]
        assert found == [vlm.read(expected[i]) or 0.0 for i in order]
    assert vlm.load(images.device).model.dtype == torch.float32
    assert len(set(expected)) > 4 and expected[1] != expected[6]        # the comparison says something


def test_vlm_without_a_number(monkeypatch):
    """An answer without a number scores 0, but the first answers must have one: else the run stops."""
    answers, judge = [], vlm.types.SimpleNamespace(readable=False)
    monkeypatch.setattr(vlm, "load", lambda device: judge)
    monkeypatch.setattr(vlm, "ask", lambda judge, images, prompts: list(answers))
    images, prompts = torch.rand(2, 3, 8, 8), ["a", "b"]
    answers[:] = ["no idea", "none"]
    with pytest.raises(nft.Failure, match=r"'no idea': must give a number"):
        vlm.reward(images, prompts, [{}, {}])
    answers[:] = ["no idea", "2"]
    assert vlm.reward(images, prompts, [{}, {}])[0] == [0.0, 0.4]
    answers[:] = ["no idea", "none"]
    assert vlm.reward(images, prompts, [{}, {}])[0] == [0.0, 0.0]
