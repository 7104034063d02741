"""How --reward names its functions, what these may return, and what the short rewards measure.

    python -m pytest examples/tests/test_rewards.py

Learned rewards run on tiny random weights under their real names, and ocr.py with its own reader.
SPDX-License-Identifier: MIT
"""

import functools
import io
import shutil
import subprocess
import sys
from types import SimpleNamespace

import common
import learned
import numpy as np
import ocr
import pytest
import torch
import torch.nn.functional as F
import untrained
from PIL import Image, ImageDraw, ImageFont
from torch.testing import assert_close
from transformers import CLIPModel, CLIPTokenizer

import nft

ROOM = common.EXAMPLES / "rewards"
# The last one is longer than the 77 tokens that CLIP reads
PROMPTS = ["a red circle", "two blue squares", "a green triangle", "a yellow cross " * 40]
# Pictures of 6 x 8 tiles, 300 x 400 pixels, as numbers and as nft.py hands them on
TILES = np.random.default_rng(0).integers(256, size=(4, 6, 8, 3), dtype=np.uint8)
ARRAYS = TILES.repeat(50, 1).repeat(50, 2)
IMAGES = torch.tensor(ARRAYS).permute(0, 3, 1, 2) / 255


def load(reward):
    """The rewards of --reward."""
    return nft.load_rewards(reward, "--reward")


def score(rewards, prompts=PROMPTS, images=IMAGES, metadata=None):
    """What `nft.score` gives for a batch: r_raw, and its parts by the rewards' names."""
    if metadata is None:
        metadata = [{} for _ in prompts]
    scores = nft.score(rewards, images, prompts, metadata)
    raw = scores.pop("reward")
    return raw, {name.removeprefix("reward/"): part for name, part in scores.items()}


def clear_clip():
    """Forget the models that examples/rewards/clip.py has loaded."""
    if "clip" in sys.modules:
        sys.modules["clip"].load.cache_clear()


@pytest.fixture(scope="module", autouse=True)
def hub():
    """The hub's cache, with tiny models."""
    common.root()


@pytest.fixture(autouse=True)
def path(monkeypatch):
    """Python's path goes back to what it was, as after a run."""
    monkeypatch.setattr(sys, "path", sys.path.copy())


# ---- What --reward names -------------------------------------------------------------------------
OWN = """
from beside import FACTOR

number = 3


def length(images, prompts, metadata):
    return [FACTOR * len(prompt) for prompt in prompts]


def minus_length(images, prompts, metadata):
    return [-FACTOR * len(prompt) for prompt in prompts]


calls = []


def count(images, prompts, metadata):
    calls.append(len(images))
    return [float(len(calls))] * len(images)


def count_on(images, prompts, metadata):
    return count(images, prompts, metadata)
"""
LENGTHS = torch.tensor([10.0 * len(prompt) for prompt in PROMPTS])


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A directory to work in with a user's own.py, which imports the file beside it."""
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "beside.py").write_text("FACTOR = 10\n")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("own", "beside", "kennel", "kennel.judges"):
        sys.modules.pop(name, None)


NAMES = ["aesthetic", "jpeg", *sorted(file.stem for file in ROOM.glob("*.py"))]


@pytest.mark.parametrize("name", NAMES)
def test_bare_names(name, own):
    """The two of nft.py, and each file of examples/rewards, go by their name, from anywhere."""
    (reward,) = load(name)
    assert reward.name == name
    assert reward.weight == 1
    assert callable(reward.function)


def test_functions_of_files(own, monkeypatch):
    """FILE.py:FUNCTION goes by the file's stem; it may import what lies beside it."""
    (reward,) = load("own.py:length")
    assert reward.name == "own:length"
    monkeypatch.chdir("/")
    (reward,) = load(f"{own}/own.py:length")
    assert reward.name == "own:length"
    raw, _ = score([reward])
    assert_close(raw, LENGTHS)


def test_functions_of_modules(own):
    """package.module:FUNCTION is imported, from the working directory as well."""
    (own / "kennel").mkdir()
    (own / "kennel/judges.py").write_text("from own import length\n")
    raw, _ = score(load("kennel.judges:length"))
    assert_close(raw, LENGTHS)


def test_functions_themselves():
    """As a library nft.py takes a function, by its name, or a dict of them by any."""

    def bright(images, prompts, metadata):
        return images.mean((1, 2, 3))

    assert load(bright) == [nft.Reward("bright", 1.0, bright)]
    one, other = load({"light": bright, "text": ocr.reward})
    assert one == nft.Reward("light", 1.0, bright)
    assert other == nft.Reward("text", 1.0, ocr.reward)


def test_weights(own):
    """The reward is the sum by NAME=W, and 1 without; its parts are as they were returned."""
    rewards = load("own.py:length=2.5, own.py:minus_length,jpeg=-0.5")
    raw, parts = score(rewards)
    assert list(parts) == ["own:length", "own:minus_length", "jpeg"]
    assert_close(parts["own:minus_length"], -LENGTHS)
    assert_close(raw, 1.5 * LENGTHS - 0.5 * parts["jpeg"])


def test_a_file_is_loaded_once_a_run(own):
    """Rewards of one file, trained on or watched, share what it loads; a run loads it anew."""
    for _ in range(2):
        files = {}
        rewards = nft.load_rewards("own.py:count", "--reward", files)
        rewards += nft.load_rewards("own.py:count_on", "--watch", files)
        _, parts = score(rewards)
        assert parts["own:count"].tolist() == [1, 1, 1, 1]
        assert parts["own:count_on"].tolist() == [2, 2, 2, 2]


BAD_FILES = {
    "syntax.py": "def reward(:\n",
    "imports.py": "import no_such_package\n",
    "exits.py": "import sys\n\nsys.exit(3)\n",
    "raises.py": "1 / 0\n",
    "recursive.py": "def f():\n    f()\n\n\nf()\n",
    "binary.py": "\0\1\2",
}
REFUSED = [
    ("own.py:", "no attribute ''"),
    (":length", "ValueError"),
    ("own.py:nothing", "no attribute 'nothing'"),
    ("own.py:number", "must be"),
    ("none.py:length", "none.py"),
    ("no_such_package.module:length", "No module named 'no_such_package'"),
    ("jpeg=x", "number"),
    ("jpeg=nan", "number"),
    ("jpeg=1e999", "number"),
    ("syntax.py:reward", "SyntaxError"),
    ("imports.py:reward", "No module named 'no_such_package'"),
    ("exits.py:reward", "SystemExit: 3"),
    ("raises.py:reward", "ZeroDivisionError"),
    ("recursive.py:reward", "RecursionError"),
    ("binary.py:reward", "null byte"),
]


@pytest.mark.parametrize(("reward", "says"), REFUSED)
def test_what_is_no_reward(reward, says, own):
    """What names no function, or no number as its weight, is refused in a line that names it."""
    for name, content in BAD_FILES.items():
        (own / name).write_text(content)
    with pytest.raises(nft.UserError, match=rf"^--reward {reward}: .*{says}") as error:
        load(f"jpeg,{reward}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["nothing", "JPEG", "jpeg;clip", "own.py"])
def test_unknown_names(name, own):
    """A NAME that is no file of examples/rewards is refused in a line that names it."""
    with pytest.raises(nft.UserError, match=name) as error:
        load(f"jpeg,{name}")
    assert "\n" not in str(error.value)


def test_refused_before_anything_is_written(own, capsys):
    """On the command line that is status 2 and one line, and no run directory."""
    common.run("sd15", own / "run", status=2, reward="own.py:nothing")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("nft.py: --reward own.py:nothing: must be ")
    assert not (own / "run").exists()


def test_rewards_in_a_script(own):
    """Run as a script, too, a reward may import nft, and what it raises is the line one reads."""
    (own / "importing.py").write_text("import nft\n\nraise ValueError(nft.Reward.__name__)\n")
    words = common.command_line("sd15", out=own / "run", reward="importing.py:reward")
    command = [sys.executable, str(common.REPOSITORY / "nft.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("nft.py: --reward importing.py:reward: must be ")
    assert "ValueError: Reward" in line


# ---- What a reward may do and return -------------------------------------------------------------
def ddpo(images, prompts, metadata):
    """As in ddpo-pytorch: from uint8 arrays (B, H, W, 3), a tuple with metadata."""
    if isinstance(images, torch.Tensor):
        images = (images * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
        images = images.transpose(0, 2, 3, 1)
    return np.array([x.mean() for x in images]), {}


def trl(images, prompts, metadata):
    """As for TRL's DDPOTrainer: a tensor and a dict."""
    levels = (images * 255).round().clamp(0, 255).to(torch.uint8)
    return levels.float().mean((1, 2, 3)), {"prompts": prompts}


def flow_grpo(images, prompts, metadata, only_strict=True):
    """As in flow_grpo: a list of floats, and the metadata."""
    images = (images * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
    return [float(x.mean()) for x in images], [dict(m) for m in metadata]


@pytest.mark.parametrize("function", [ddpo, trl, flow_grpo])
def test_rewards_of_other_projects(function):
    """A reward function written for ddpo-pytorch, TRL or flow_grpo is one here, unchanged."""
    raw, _ = score(load(function))
    assert_close(raw, torch.tensor(ARRAYS.mean((1, 2, 3))).float(), atol=1e-3, rtol=0)
    assert raw.dtype == torch.float32


def returning(value, weight=1.0):
    """A list of one reward, which gives `value` whatever it sees."""

    def reward(images, prompts, metadata):
        return value

    return [nft.Reward("bad", weight, reward)]


NO_NUMBERS = [
    None,
    [],
    0.5,
    [0.5, 0.5, 0.5],
    [0.5, 0.5, 0.5, 0.5, 0.5],
    torch.zeros(4, 1),
    ["good", "good", "bad", "good"],
    {"score": [0.5, 0.5, 0.5, 0.5]},
    ([], {}),
]


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_other_returns(value):
    """A reward must return a number an image: anything else is refused in a line."""
    with pytest.raises(nft.UserError, match=r"^reward bad: must return one finite number an image"):
        score(returning(value))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_numbers_that_are_not_finite(value):
    """A score that is not finite, or not after its weight, is refused with its prompt."""
    rewards = returning([1.0, 2.0, value, 3.0], weight=10.0)
    with pytest.raises(nft.UserError, match=r"^reward bad: .*'a green triangle'"):
        score(rewards)


def raises(images, prompts, metadata):
    raise RuntimeError("two\nlines")


def exits(images, prompts, metadata):
    sys.exit(3)


def recurses(images, prompts, metadata):
    return recurses(images, prompts, metadata)


def takes_no_arguments():
    return 0.5


FAILURES = [
    (raises, "RuntimeError: two lines"),
    (exits, "SystemExit: 3"),
    (recurses, "RecursionError"),
    (takes_no_arguments, "TypeError"),
]


@pytest.mark.parametrize(("function", "says"), FAILURES)
def test_failing_rewards(function, says):
    """A reward that fails is refused by its name, with its error, in a line."""
    rewards = [nft.Reward("bad", 1.0, function)]
    with pytest.raises(nft.UserError, match=rf"^reward bad: .*{says}") as error:
        score(rewards)
    assert "\n" not in str(error.value)


def test_rewards_cannot_spoil_their_arguments():
    """Whatever a reward does to its images, prompts and metadata, the next one sees them whole."""

    def spoil(images, prompts, metadata):
        images.zero_()
        prompts[0] = ""
        metadata[0].clear()
        return [0.0] * 4

    def see(images, prompts, metadata):
        assert torch.equal(images, IMAGES)
        assert prompts == PROMPTS
        assert metadata == [{"n": 1}] * 4
        return images.mean((1, 2, 3))

    rewards = load({"spoil": spoil, "see": see})
    raw, _ = score(rewards, metadata=[{"n": 1}] * 4)
    assert_close(raw, IMAGES.mean((1, 2, 3)))


class Painter:
    """Stands for a Model: paints image i in grey i / 100."""

    config = SimpleNamespace(batch_size=2)
    device = torch.device("cpu")

    def sample(self, prompts, seeds, policy):
        grey = torch.tensor([i / 100 for _, i in seeds])
        images = grey.view(-1, 1, 1, 1).expand(-1, 3, 4, 4)
        condition = {"text": torch.tensor([float(prompt) for prompt in prompts])}
        return {"x_0": images, "images": images, "condition": condition}


def test_scores_stay_with_their_images():
    """All that `collect` returns is in the order of its images; it keeps sixteen pictures."""
    rewards = [nft.Reward("grey", 2.0, lambda images, *_: images.mean((1, 2, 3)))]
    numbered = [(i, str(i), {}) for i in range(37)]
    D = nft.collect(Painter(), rewards, numbered, ("key",), None)
    grey = torch.arange(37) / 100
    assert D["prompts"] == [str(i) for i in range(37)]
    assert_close(D["x_0"][:, 0, 0, 0], grey)
    assert_close(D["condition"]["text"], torch.arange(37.0))
    assert_close(D["scores"]["reward/grey"], grey)
    assert_close(D["scores"]["reward"], 2 * grey)
    assert_close(D["images"][:, 0, 0, 0], grey[:16])
    assert D["scores"]["laplacian"].shape == (37,)


# ---- What the rewards measure --------------------------------------------------------------------
PURE = ["aesthetic", "clip", "pickscore", "jpeg", "custom"]


@pytest.mark.parametrize("name", PURE)
def test_a_score_is_the_images_own(name):
    """Batch and order change no score."""
    rewards = load(name)
    whole, _ = score(rewards)
    order = [2, 0, 3, 1]
    single = []
    for i in order:
        raw, _ = score(rewards, [PROMPTS[i]], IMAGES[[i]])
        single.append(raw)
    assert_close(torch.cat(single), whole[order], atol=1e-5, rtol=1e-5)
    assert whole.std() > 1e-3


def embeddings(repository):
    """CLIP's of ARRAYS and PROMPTS in float64: two (4, 768) of length 1, and its scale."""
    model = CLIPModel.from_pretrained(repository).double()
    tokenizer = CLIPTokenizer.from_pretrained(untrained.CLIP)
    given = untrained.image_processor()(list(ARRAYS), return_tensors="pt")
    pooled = model.vision_model(given["pixel_values"].double()).pooler_output
    seen = pooled @ model.visual_projection.weight.T
    read = []
    # One by one, so that nothing is padded
    for prompt in PROMPTS:
        ids = tokenizer(prompt, truncation=True, return_tensors="pt").input_ids
        read.append(model.text_model(ids).pooler_output @ model.text_projection.weight.T)
    return F.normalize(seen, dim=1), F.normalize(torch.cat(read), dim=1), model.logit_scale.exp()


def assert_measures(name, expected):
    """A reward gives the expected numbers, which differ, to a thousandth."""
    found, _ = score(load(name))
    size = expected.abs().max().item()
    assert_close(found.double(), expected, atol=1e-3 * size, rtol=0)
    assert expected.std() > 0.01 * size


@torch.no_grad()
def test_clip_is_a_cosine():
    """clip is the cosine of image and prompt."""
    seen, read, _ = embeddings(untrained.CLIP)
    assert_measures("clip", (seen * read).sum(1))


@torch.no_grad()
def test_pickscore_is_a_scaled_cosine():
    """pickscore is the cosine by PickScore's CLIP, times its scale, over 26 as in the paper."""
    seen, read, scale = embeddings(untrained.PICKSCORE)
    assert_measures("pickscore", (seen * read).sum(1) * scale / 26)


@torch.no_grad()
def test_aesthetic_is_a_linear_head():
    """aesthetic is LAION's head on CLIP's embedding of the image."""
    (file,) = (common.root() / "hub").rglob("snapshots/*/aesthetic-model.pth")
    head = torch.load(file, weights_only=True)
    x, _, _ = embeddings(untrained.CLIP)
    for i in untrained.HEAD:
        weight = head[f"layers.{i}.weight"].double()
        x = x @ weight.T + head[f"layers.{i}.bias"].double()
    assert_measures("aesthetic", x[:, 0])


NEEDS = [
    ("aesthetic", untrained.CLIP, "--reward aesthetic"),
    ("aesthetic", untrained.AESTHETIC, "--reward aesthetic"),
    ("clip", untrained.CLIP, f"{untrained.CLIP} did not load"),
    ("pickscore", untrained.PICKSCORE, f"{untrained.PICKSCORE} did not load"),
    ("pickscore", untrained.LAION, f"{untrained.LAION} did not load"),
]


@pytest.mark.parametrize(("reward", "repository", "says"), NEEDS)
def test_what_does_not_load(reward, repository, says, tmp_path, monkeypatch, capsys):
    """One line says what is out of reach; a directory of the repository's name is taken first."""
    monkeypatch.chdir(tmp_path)
    folder = common.root() / "hub" / ("models--" + repository.replace("/", "--"))
    whole, _ = score(load(reward))
    clear_clip()
    shutil.copytree(folder / "snapshots/1", tmp_path / "copy")
    shutil.move(folder, tmp_path / "away")
    capsys.readouterr()
    try:
        common.run("sd15", tmp_path / "run", status=2, reward=reward)
        line = capsys.readouterr().err.splitlines()[-1]
        assert f"reward {reward}: must" in line
        assert says in line
        assert not (tmp_path / "run").exists()
        shutil.move(tmp_path / "copy", tmp_path / repository)
        again, _ = score(load(reward))
        assert_close(again, whole)
    finally:
        shutil.move(tmp_path / "away", folder)


def test_jpeg():
    """jpeg is minus the size of the JPEG of quality 95 in kilobytes, of 1000: DDPO's."""
    sizes = []
    for picture in ARRAYS:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=95)
        sizes.append(len(file.getvalue()) / 1000)
    raw, _ = score(load("jpeg"))
    assert_close(raw, -torch.tensor(sizes))


def test_custom():
    """custom.py gives grey 0, colours more, and -1 times that where the metadata wish for grey."""
    grey = torch.full((3, 8, 8), 0.4)
    red = torch.zeros(3, 8, 8)
    red[0] = 1
    metadata = [{}, {}, {"colourful": -1}]
    rewards = load("custom")
    raw, _ = score(rewards, [""] * 3, torch.stack([grey, red, red]), metadata)
    # Of pure red: opponents 255 and 127.5, no spread, 0.3 of the shift, over 100
    expected = 0.3 * (255**2 + 127.5**2) ** 0.5 / 100
    assert_close(raw, torch.tensor([0.0, expected, -expected]))


def test_brightness_and_saturation():
    """Grey has a brightness and no saturation, pure red all saturation, and pink half of it."""
    pixels = torch.tensor([[0, 0, 0], [1, 1, 1], [0.5, 0.5, 0.5], [1, 0, 0], [1, 0.5, 0.5]])
    images = pixels[:, :, None, None].expand(5, 3, 8, 8)
    rewards = load("brightness,saturation")
    scores = nft.score(rewards, images, [""] * 5, [{}] * 5)
    assert_close(scores["reward/brightness"], torch.tensor([0, 1, 0.5, 1 / 3, 2 / 3]))
    assert_close(scores["reward/saturation"], torch.tensor([0, 0, 0, 1, 0.5]))


@torch.no_grad()
def test_learned_trains_once(tmp_path, monkeypatch, capsys):
    """It trains its judge when first asked, then reads it; a reward is its probability."""
    train = functools.partial(learned.train, steps=2, size=8, pool=1)
    monkeypatch.setattr(learned, "train", train)
    monkeypatch.setattr(learned, "FILE", tmp_path / "learned.pt")
    images = torch.rand(3, 3, 32, 32)
    judged = []
    for _ in range(2):
        learned.load_judge.cache_clear()
        judged.append(learned.reward(images, PROMPTS[:3], [{}] * 3))
    learned.load_judge.cache_clear()
    assert capsys.readouterr().err.count("training") == 1
    judge = learned.Judge()
    judge.load_state_dict(torch.load(learned.FILE, weights_only=True))
    expected = torch.sigmoid(judge(images, PROMPTS[:3]))
    assert_close(judged, [expected, expected])


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
    raw, _ = score(load("ocr"), prompts, images, metadata)
    whole, damaged, blank = raw.tolist()
    assert whole == 1
    assert 0.3 < damaged < 0.8
    assert blank == 0


def test_ocr_wants_a_text():
    """A prompt that quotes no text is named, and how to quote one."""
    rewards = load("ocr")
    with pytest.raises(nft.UserError, match=r"ocr: .*'a sign without words'.*must quote"):
        score(rewards, ["a sign without words"], IMAGES[:1])


DISTANCES = [("kitten", "sitting", 3), ("", "abc", 3), ("flaw", "lawn", 2), ("same", "same", 0)]


@pytest.mark.parametrize(("a", "b", "distance"), DISTANCES)
def test_edit_distance(a, b, distance):
    """ocr.py's distance is Levenshtein's: known values, and symmetric."""
    assert ocr.edit_distance(a, b) == distance
    assert ocr.edit_distance(b, a) == distance


SIMILARITIES = [
    ("Grand 0pening", "Grand Opening", 11 / 12),
    ("the GRAND opening!", "Grand Opening", 1),
    ("what is this at all", "OPEN", 0),
    ("", "OPEN", 0),
]


@pytest.mark.parametrize(("found", "text", "similarity"), SIMILARITIES)
def test_similarity(found, text, similarity):
    """It is over the text's length, without spaces and case; 1 if found whole among other text."""
    assert ocr.similarity(found, text) == pytest.approx(similarity)
