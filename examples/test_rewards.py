"""The rewards of nft.py and the short ones in examples/: what they promise.

    pip install pytest peft rapidocr-onnxruntime; python -m pytest -q examples/test_rewards.py

Learned rewards run on tiny random weights under their real names (untrained.py), the reader of ocr.py on its own.
SPDX-License-Identifier: MIT
"""
import io
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import types

TEMP = tempfile.TemporaryDirectory()
ROOT = pathlib.Path(os.environ.setdefault("NFT_TEST_ROOT", TEMP.name))      # of all test files
os.environ.update(HF_HUB_CACHE=f"{ROOT}/hub", HF_HUB_OFFLINE="1")
HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from PIL import Image, ImageDraw, ImageFont  # noqa: E402
from torch.testing import assert_close  # noqa: E402

import nft  # noqa: E402
import untrained  # noqa: E402

CPU, RNG = torch.device("cpu"), np.random.default_rng(0)
PROMPTS = ["a red circle", "two blue squares", "a green triangle left of a yellow cross", "x" * 200]
# Pictures of 4 colours that no resize keeps as they are, 300 x 400 pixels, as numbers and as nft.py hands them on
ARRAYS = RNG.integers(256, size=(4, 6, 8, 3), dtype=np.uint8).repeat(50, 1).repeat(50, 2)
IMAGES = torch.tensor(ARRAYS).permute(0, 3, 1, 2) / 255


@pytest.fixture(scope="session", autouse=True)
def hub():
    """The hub's cache with tiny models, unless another test file has built it in this process."""
    if not (ROOT / "hub").exists():
        untrained.build(ROOT)


def load(spec, flag="--reward"):
    """The function of one reward."""
    (_, _, call), = nft.load_rewards(spec, flag)
    return torch.no_grad()(lambda *batch: torch.as_tensor(call(*batch)))


def embeddings(repository):
    """CLIP's of ARRAYS and PROMPTS, written out in float64: towers, projection, length 1."""
    clip = transformers.CLIPModel.from_pretrained(repository).double()
    tokens = transformers.CLIPTokenizer.from_pretrained("openai/clip-vit-large-patch14")
    pixels = untrained.image_processor()([*ARRAYS], return_tensors="pt")["pixel_values"].double()
    numbers = [tokens(p, truncation=True, return_tensors="pt").input_ids for p in PROMPTS]      # one by one: no padding
    x = clip.vision_model(pixels).pooler_output @ clip.visual_projection.weight.T
    y = torch.cat([clip.text_model(n).pooler_output for n in numbers]) @ clip.text_projection.weight.T
    return x / x.norm(dim=1, keepdim=True), y / y.norm(dim=1, keepdim=True), clip.logit_scale


@torch.no_grad()
@pytest.mark.parametrize("name", ["aesthetic", "clip", "pickscore"])
def test_learned_rewards_are_their_formulas(name):
    """aesthetic is LAION's head on CLIP's image embedding, clip a cosine, pickscore a scaled cosine over 26."""
    x, y, scale = embeddings("yuvalkirstain/PickScore_v1" if name == "pickscore" else "openai/clip-vit-large-patch14")
    expected = (x * y).sum(1) * (scale.exp() / 26 if name == "pickscore" else 1)
    if name == "aesthetic":
        head, = (ROOT / "hub").rglob("snapshots/*/aesthetic-model.pth")
        head = [w.double() for w in torch.load(head, weights_only=True).values()]
        for weight, bias in zip(head[::2], head[1::2]):
            x = x @ weight.T + bias
        expected = x[:, 0]
    ours = load(name)(IMAGES, PROMPTS, [{}] * 4)
    assert_close(ours.double(), expected, atol=1e-3 * expected.abs().max().item(), rtol=0)
    assert expected.std() > 0.01 * expected.abs().max()
    assert ours.dtype == torch.float32


@pytest.mark.parametrize("name", ["aesthetic", "clip", "pickscore", "jpeg", "incompressible",
                                  f"{HERE}/custom_reward.py:colourful"])
def test_a_score_is_the_image_s_own(name):
    """Batch and order change no score, and nothing that a reward does to its images reaches the next."""
    call, metadata, order = load(name), [{"n": i} for i in range(4)], [2, 0, 3, 1]
    whole = call(IMAGES, PROMPTS, metadata)
    single = [call(IMAGES[i:i + 1], PROMPTS[i:i + 1], metadata[i:i + 1]) for i in order]
    assert_close(torch.cat(single), whole[order], atol=1e-5, rtol=1e-5)
    def spoil(images, *_):
        return images.zero_().sum((1, 2, 3))
    total, parts = nft.score([("spoil", 1.0, spoil), (name, 2.0, call)], IMAGES, PROMPTS, metadata)
    assert_close(total, 2 * whole.float())
    assert IMAGES.max() == 1 and [*parts] == ["spoil", name]


def test_kilobytes():
    """incompressible is DDPO's size of the JPEG of quality 95 in kilobytes (of 1000), jpeg its negative."""
    sizes = []
    for picture in ARRAYS:
        Image.fromarray(picture).save(file := io.BytesIO(), "JPEG", quality=95)
        sizes.append(len(file.getvalue()) / 1000)
    for name, sign in (("incompressible", 1), ("jpeg", -1)):
        assert load(name)(IMAGES, PROMPTS, [{}] * 4).tolist() == pytest.approx([sign * x for x in sizes])


STYLES = '''
import numpy as np, torch
def ddpo():                     # ddpo-pytorch: uint8 arrays (B, H, W, 3) inside, a tuple with metadata out
    def f(images, prompts, metadata):
        if isinstance(images, torch.Tensor):
            images = (images * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy().transpose(0, 2, 3, 1)
        assert images.dtype == np.uint8 and images.shape[3] == 3
        return np.array([x.mean() for x in images]), {}
    return f
def trl():                      # TRL's DDPOTrainer: tensors inside, a tensor and a dict out
    def f(images, prompts, metadata):
        return (images * 255).round().clamp(0, 255).to(torch.uint8).float().mean((1, 2, 3)), {"prompts": prompts}
    return f
def flow_grpo(device=None):     # flow_grpo: a list of python floats and metadata out
    def f(images, prompts, metadata, only_strict=True):
        images = (images * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
        return [float(x.mean()) for x in images.transpose(0, 2, 3, 1)], [dict(m) for m in metadata]
    return f
ddpo, trl, flow_grpo = ddpo(), trl(), flow_grpo()
'''


@pytest.mark.parametrize("style", ["ddpo", "trl", "flow_grpo"])
def test_rewards_of_other_projects_run_unchanged(style, tmp_path):
    """A reward function written for ddpo-pytorch, TRL or flow_grpo is a reward here."""
    (tmp_path / "theirs.py").write_text(STYLES)
    rewards = nft.load_rewards(f"{tmp_path}/theirs.py:{style}")
    total, _ = nft.score(rewards, IMAGES, PROMPTS, [{}] * 4)
    assert_close(total.double(), torch.tensor(ARRAYS.mean((1, 2, 3))), atol=1e-3, rtol=0)


def test_one_file_is_loaded_once_a_run(tmp_path):
    """Two rewards of one file, trained on or watched, share what it loads; another run loads it anew."""
    for name in ("one", "two"):
        assert command(tmp_path, name, "first", watch=f"{tmp_path}/own.py:second") == 0
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert rows[0]["eval_reward/own:first"] == 3 and rows[0]["eval_reward/own:second"] == 4  # 1 and 2: a trial


@pytest.mark.parametrize("missing, reward", [("openai/clip-vit-large-patch14", "clip"),
                                             ("trl-lib/ddpo-aesthetic-predictor", "aesthetic"),
                                             ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "pickscore")])
def test_what_does_not_load_is_named(missing, reward, tmp_path, monkeypatch, capsys):
    """One line names the repository, likely causes and the way round: a directory of its name, which then works."""
    monkeypatch.chdir(tmp_path)
    whole = load(reward)(IMAGES, PROMPTS, [{}] * 4)
    folder, = (ROOT / "hub").glob("models--" + missing.replace("/", "--"))
    shutil.copytree(folder / "snapshots/1", tmp_path / "copy")
    shutil.move(folder, tmp_path / "away")
    try:
        says = f"reward {reward}: {missing} did not load .*offline.*[.]/{missing}"
        assert command(tmp_path, "run", "first", reward=reward) == 2 and not (tmp_path / "run").exists()
        line, = capsys.readouterr().err.splitlines()
        assert re.match(f"nft.py: {says}", line)
        shutil.move(tmp_path / "copy", tmp_path / missing)
        assert_close(load(reward)(IMAGES, PROMPTS, [{}] * 4), whole)
    finally:
        shutil.move(tmp_path / "away", folder)


def test_nan_names_image_and_prompt():
    """A score that is not finite stops the run with the image's number and its prompt."""
    def nan(images, prompts, metadata):
        return [1, 2, float("nan"), 3]
    with pytest.raises(nft.Failure, match="reward nan: .*nan for image 18, prompt .*a green triangle"):
        nft.score([("nan", 1.0, nan)], IMAGES, PROMPTS, [{}] * 4, first=16)


CONSTANT = '''
def constant(images, prompts, metadata):
    return [len(p) / 3 for p in prompts]
def varied(images, prompts, metadata):
    return images.mean((1, 2, 3))
counted = []
def first(images, prompts, metadata):
    counted.append(1)
    return [float(len(counted))] * len(images)
second = lambda *batch: first(*batch)
'''


def command(tmp_path, out, function, **flags):
    """A run of a few seconds on tiny-sd15."""
    (tmp_path / "own.py").write_text(CONSTANT)
    flags = dict(reward=f"{tmp_path}/own.py:{function}", out=tmp_path / out, iterations=3, groups=2, group_size=3,
                 batch_size=4, steps=2, updates=1, eval_every=9, eval_prompts=tmp_path / "p.txt", device="cpu") | flags
    (tmp_path / "p.txt").write_text("a red circle\n")
    return nft.main([x for k, v in flags.items() for x in ("--" + k.replace("_", "-"), str(v))])


def test_constant_reward_warns_once(tmp_path, capsys):
    """Where all images of a prompt get the same reward there is nothing to learn: one line says so, once."""
    assert command(tmp_path, "constant", "constant") == 0
    said = capsys.readouterr().out
    assert said.count("teach nothing") == 1 and "iteration 1: equal rewards" in said
    assert command(tmp_path, "varied", "varied") == 0
    assert "teach nothing" not in capsys.readouterr().out
    r = nft.optimality_reward([0.112] * 24, [0] * 12 + [1] * 12)
    assert (r == 0.5).all()                                 # exactly, whatever the rounding of a mean


def test_scores_stay_with_their_images():
    """What collect returns is in the order of its prompts; the pictures that it keeps are the first sixteen."""
    class Painter:
        config, device = types.SimpleNamespace(batch_size=2), CPU
        def sample(self, texts, seeds, policy):
            images = torch.stack([torch.full((3, 4, 4), i / 100) for _, i in seeds])
            return {"x_0": images, "images": images, "condition": {"t": torch.tensor([float(t) for t in texts])}}
    def brightness(images, prompts, metadata):
        return images.mean((1, 2, 3))
    prompts = [(str(i), {}) for i in range(37)]
    rollout, raw, parts = nft.collect(Painter(), [("b", 2.0, brightness)], prompts, ("k",), None)
    expected = torch.arange(37) / 100
    assert_close(raw, 2 * expected)
    assert_close(parts["b"], expected)
    assert_close(rollout["condition"]["t"], torch.arange(37.0))
    assert_close(rollout["images"][:, 0, 0, 0], expected[:16])
    assert rollout["laplacian"].shape == rollout["pixel_std"].shape == (37,)


def sign(text, damage=0):
    """A picture (3, 128, 384) with text in black on white, `damage` of its letters' pixels painted over."""
    picture = Image.new("RGB", (384, 128), "white")
    ImageDraw.Draw(picture).text((20, 40), text, fill="black", font=ImageFont.load_default(44))
    pixels = torch.tensor(np.asarray(picture)).permute(2, 0, 1) / 255
    pixels[:, :, :int(384 * damage)] = 1
    return pixels


def test_ocr_reads():
    """ocr.py reads clean text, gives less the more of it is missing, 0 to a blank picture, and ignores case."""
    pytest.importorskip("rapidocr_onnxruntime", reason="pip install rapidocr-onnxruntime")
    call = load(f"{HERE}/ocr.py:reward")
    prompts = [f'a sign "{text}"' for text in ("Hello World", "hello world", "World", "Hello World", "Hello")]
    images = torch.stack([sign("Hello World")] * 3 + [sign("Hello World", 0.35), torch.ones(3, 128, 384)])
    clean, lower, part, damaged, blank = call(images, prompts, [{}] * 5).tolist()
    assert (clean, lower, part, blank) == (1, 1, 1, 0) and 0.3 < damaged < 0.8
    assert call(images[:1], ["a sign"], [{"text": "Hello Word"}]).item() == pytest.approx(1 - 1 / 9)
    with pytest.raises(nft.Failure, match="a sign without words.*must quote"):
        nft.score([("ocr", 1.0, call)], images[:1], ["a sign without words"], [{}])


def test_edit_distance():
    """ocr.py's distance is Levenshtein's: known values, symmetric, and zero only between equals."""
    import ocr
    for a, b, d in (("kitten", "sitting", 3), ("", "abc", 3), ("flaw", "lawn", 2), ("same", "same", 0)):
        assert ocr.edit_distance(a, b) == ocr.edit_distance(b, a) == d
    assert ocr.similarity("Grand 0pening", "Grand Opening") == pytest.approx(11 / 12)
    assert ocr.similarity("what is this at all", "OPEN") == 0


def test_colourful():
    """custom_reward.py gives grey 0, colours more, and -1 times that where the metadata wish for grey."""
    call = load(f"{HERE}/custom_reward.py:colourful")
    grey, red = torch.full((3, 8, 8), 0.4), torch.tensor([1.0, 0, 0]).view(3, 1, 1).expand(3, 8, 8)
    scores = call(torch.stack([grey, red, red]), [""] * 3, [{}, {}, {"colourful": -1}])
    assert_close(scores, torch.tensor([0, 1, -1]) * 0.3 * (255 ** 2 + 127.5 ** 2) ** 0.5 / 100)


def test_rewards_in_a_script(tmp_path):
    """As a script, too: what a reward says through nft.refuse is the line that the user reads."""
    (tmp_path / "own.py").write_text("import nft\ndef no(*_):\n    nft.refuse('own words; mend')\n")
    done = subprocess.run([sys.executable, HERE.parent / "nft.py", "--reward", f"{tmp_path}/own.py:no", "--out",
                           tmp_path / "run", "--steps", "2"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "nft.py: reward own:no: own words; mend" in done.stderr
    assert "Traceback" not in done.stderr
