"""What was silently wrong once, or unclear: each test's docstring states what holds now.

    python -m pytest examples/tests/test_silent.py

SPDX-License-Identifier: MIT
"""

import importlib
import json
import pickle
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import common
import diffusers
import numpy as np
import pytest
import torch
from common import REPOSITORY, SEEDS, TEXTS, checkpoint, metrics, new_model, root, run

import nft


def train(pipeline, out, **changes):
    """A small run as a library; returns its rows."""
    return nft.train(nft.configure(out=out, **common.settings(pipeline, **changes)))


# ---- The model card ------------------------------------------------------------------------------
CARDS = [
    ("sd15", {"solver": "dpm2"}),
    ("sd15", {"solver": "dpm2-sde"}),
    ("sd15", {"solver": "lcm", "guidance": 3.0}),
    ("sd15", {"precision": "bf16"}),
    ("sdxl", {"solver": "unipc"}),
    ("sd3", {"solver": "dpm2", "eval_steps": 5}),
    ("sd3", {"solver": "dpm2-sde", "guidance": 2.0}),
    ("sd3", {}),
    ("flux", {"solver": "unipc"}),
]


@pytest.mark.parametrize("name, changes", CARDS, ids=str)
def test_the_card_paints_the_run_s_own_picture(name, changes, tmp_path, monkeypatch):
    """The block of DIR/README.md leaves the first held-out picture of the last evaluation."""
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    kept = []

    def evaluate(state, rewards, prompts, iteration):
        """As nft.evaluate; keeps the first picture."""
        D = nft.collect(state.model, rewards, [(0, *prompts[0])], ("evaluation",), "ema")
        kept.append(nft.to_pil(D["images"][0]))
        return nft.evaluate(state, rewards, prompts, iteration)

    settings = common.settings(name, **{"eval_prompts": None, "solver": "", **changes})
    nft.train(nft.configure(out="here", **settings), evaluate=evaluate)
    text = Path("here/README.md").read_text()
    assert text.startswith("---\nbase_model: ")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)
    found = {}
    exec(code, found)
    difference = np.asarray(found["image"], float) - np.asarray(kept[-1], float)
    assert abs(difference).max() <= 1
    assert abs(np.asarray(kept[0], float) - np.asarray(kept[-1], float)).max() > 1


def test_the_card_names_what_a_hub_wants(tmp_path):
    """Front matter: base_model by its hub id, library, pipeline tag, tags."""
    from huggingface_hub import ModelCard

    root()
    out = run("sd15", tmp_path / "run", model="sd15")
    data = ModelCard.load(out / "README.md").data
    assert data.base_model == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert (data.library_name, data.pipeline_tag) == ("diffusers", "text-to-image")
    assert "lora" in data.tags
    assert (out / "scheduler/scheduler_config.json").exists()


# ---- Noise levels --------------------------------------------------------------------------------
def changed_scheduler(folder, **changes):
    """A copy of the small sd15 whose scheduler's settings are changed."""
    shutil.copytree(root() / "sd15", folder)
    index = json.loads((folder / "model_index.json").read_text())
    kind = changes.pop("kind", index["scheduler"][1])
    index["scheduler"] = ["diffusers", kind]
    (folder / "model_index.json").write_text(json.dumps(index))
    file = folder / "scheduler/scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_class_name": kind} | changes))
    return folder


CONTINUOUS = {"timestep_type": "continuous", "use_karras_sigmas": True, "sigma_max": 120.0}
CONTINUOUS |= {"sigma_min": 0.002}


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon"])
def test_times_that_are_no_indexes_are_refused(tmp_path, prediction):
    """A scheduler whose times are 1/4 ln sigma would be trained at wrong noise levels."""
    kind = {"kind": "EulerDiscreteScheduler", "prediction_type": prediction}
    folder = changed_scheduler(tmp_path / "edm", **kind, **CONTINUOUS)
    with pytest.raises(nft.UserError, match=r"noise levels|must be those of the model"):
        new_model(str(folder))


def test_levels_of_another_schedule_are_refused(tmp_path, monkeypatch):
    """Our alpha and sigma are held against the solver's own at every step, not at the ends."""
    real = nft.solver_level

    def bent(scheduler, t):
        level = real(scheduler, t)
        return level + 0.05 * (200 < t < 900)

    monkeypatch.setattr(nft, "solver_level", bent)
    with pytest.raises(nft.UserError, match="noise levels"):
        new_model("sd15")


@pytest.mark.parametrize("pipeline", ["sd15", "sd3"])
@pytest.mark.parametrize("solver", ["dpm2", "dpm2-sde", "unipc", "euler", "heun"])
def test_sane_solvers_pass(pipeline, solver):
    """With and without Karras's spacing, their levels are those that their times stand for."""
    new_model(pipeline, solver=solver, steps=7)


# ---- Prompts -------------------------------------------------------------------------------------
def test_prompts_trained_on_and_evaluated_on_are_told(tmp_path, capsys):
    """One line says how many there are of each, and warns where they overlap."""
    (tmp_path / "a.txt").write_text("\n".join(f"picture {i}" for i in range(50)))
    (tmp_path / "b.txt").write_text("picture 3\nanother\n")
    given = {"prompts": tmp_path / "a.txt", "iterations": 1}
    run("sd15", tmp_path / "one", eval_prompts=None, **given)
    assert "45 prompts to train on, 5 to evaluate on\n" in capsys.readouterr().out
    run("sd15", tmp_path / "two", eval_prompts=tmp_path / "b.txt", **given)
    assert "50 prompts to train on, 2 to evaluate on; 1 of these" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["p.json", "p.csv", "p.tsv", "p", "list.txt"])
def test_other_formats_are_refused(tmp_path, name):
    """Only .txt and .jsonl are read; text that is JSON is told so; the line says how to convert."""
    (tmp_path / name).write_text('[{"prompt": "a cat"}, {"prompt": "a dog"}]\n')
    with pytest.raises(nft.UserError, match=r"--prompts .*\.jsonl.*convert"):
        nft.load_prompts(str(tmp_path / name), "--prompts")


def test_suffixes_have_no_case(tmp_path):
    """P.JSONL keeps its metadata."""
    (tmp_path / "P.JSONL").write_text('{"prompt": "a cat", "n": 1}\n')
    assert nft.load_prompts(str(tmp_path / "P.JSONL"), "--prompts") == [("a cat", {"n": 1})]


# ---- Rewards -------------------------------------------------------------------------------------
@pytest.fixture
def kennels(tmp_path, monkeypatch):
    """a/r.py and b/r.py, each with a helpers.py of its own."""
    for folder, factor in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "helpers.py").write_text(f"FACTOR = {factor}\n")
        text = "from helpers import FACTOR\ndef score(images, prompts, metadata):\n"
        (tmp_path / folder / "r.py").write_text(text + "    return [FACTOR] * len(images)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    yield tmp_path
    for name in ("r", "helpers", "pack", "pack.judge", "classes"):
        sys.modules.pop(name, None)


def test_reward_files_do_not_share_imports(kennels):
    """Each file gets its own helpers.py, and its part a name of its own, over both flags."""
    (kennels / "p.txt").write_text("a cat\n")
    spec = {"reward": "a/r.py:score=1,b/r.py:score=10", "watch": "b/r.py:score"}
    rows = train("sd15", kennels / "run", prompts="p.txt", eval_prompts=None, **spec)
    assert rows[0]["eval_reward"] == 21
    parts = {name: x for name, x in rows[0].items() if name.startswith("eval_reward/")}
    assert sorted(parts.values()) == [1, 2]
    both = train("sd15", kennels / "two", reward="a/r.py:score", watch="b/r.py:score")
    parts = [x for name, x in both[0].items() if name.startswith("eval_reward/")]
    assert sorted(parts) == [1, 2]


def test_reward_files_are_real_modules(kennels):
    """Dataclasses, pickling and relative imports of packages work."""
    text = "from __future__ import annotations\nimport dataclasses\n@dataclasses.dataclass\n"
    text += "class Judge:\n    n: int = 3\n    def __call__(self, images, prompts, metadata):\n"
    text += "        return [self.n] * len(images)\nscore = Judge()\n"
    (kennels / "classes.py").write_text(text)
    (reward,) = nft.load_rewards("classes.py:score", "--reward")
    assert pickle.loads(pickle.dumps(reward.function)).n == 3
    (kennels / "pack").mkdir()
    (kennels / "pack/__init__.py").write_text("")
    (kennels / "pack/parts.py").write_text("N = 4\n")
    text = "def score(images, prompts, metadata):\n    from .parts import N\n"
    (kennels / "pack/judge.py").write_text(text + "    return [N] * len(images)\n")
    importlib.invalidate_caches()
    (reward,) = nft.load_rewards("pack.judge:score", "--reward")
    assert reward.function(["x"], [""], [{}]) == [4]
    assert pickle.loads(pickle.dumps(reward.function)) is reward.function


def test_a_factory_is_called(kennels):
    """A function without arguments returns the reward, as those of ddpo-pytorch do."""
    text = "def make():\n    return lambda images, prompts, metadata: [7] * len(images)\n"
    (kennels / "r.py").write_text(text)
    (reward,) = nft.load_rewards("r.py:make", "--reward")
    assert reward.function(["x"], [""], [{}]) == [7]


BROKEN = [
    ("import nothing_like_it\n", "r.py:score", ["nothing_like_it", "r.py:1"]),
    ("x = 1\n", "r.py:score", ["no attribute 'score'"]),
    ("x = 1\n", "missing.py:score", ["missing.py"]),
    ("x = 1\n", "r.py", ["r.py:FUNCTION"]),
    ("x = 1\n", "no-such-name", ["examples/rewards/no-such-name.py"]),
]


@pytest.mark.parametrize("text, spec, words", BROKEN, ids=[spec for _, spec, _ in BROKEN])
def test_what_is_wrong_with_a_reward_is_told_apart(kennels, text, spec, words):
    """An unknown name, a missing file or function and an error inside have lines of their own."""
    (kennels / "r.py").write_text(text)
    with pytest.raises(nft.UserError) as refusal:
        nft.load_rewards(spec, "--reward")
    for word in (f"--reward {spec}", *words):
        assert word in str(refusal.value)


def test_an_error_in_a_reward_names_its_line(kennels, capsys):
    """FILE:LINE of the user's own frame, not of a library that it called."""
    text = "import json\ndef score(images, prompts, metadata):\n    return json.loads('{')\n"
    (kennels / "r.py").write_text(text)
    run("sd15", "run", status=2, reward="r.py:score")
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.split("JSONDecodeError")[1].split(";")[0].endswith(f"{kennels}/r.py:3)")


def test_an_error_below_the_prefix_names_its_line(kennels, monkeypatch):
    """A project may lie where Python does, as in a container: what counts is who wrote the file."""
    (kennels / "r.py").write_text("def score(images, prompts, metadata):\n    return 1 / 0\n")
    monkeypatch.setattr(sys, "prefix", "/")
    monkeypatch.setattr(sys, "base_prefix", "/")
    (reward,) = nft.load_rewards("r.py:score", "--reward")
    with pytest.raises(ZeroDivisionError) as failure:
        reward.function([], [], [])
    assert nft.reason(failure.value).endswith(f"at {kennels}/r.py:2")


def test_one_name_is_one_reward(tmp_path):
    """A watched reward of the same name would hide the one that is trained on."""

    def jpeg(images, prompts, metadata):
        return [0.0] * len(images)

    with pytest.raises(nft.UserError, match="reward jpeg: must be one reward"):
        train("sd15", tmp_path / "run", reward=jpeg, watch="jpeg")
    assert not (tmp_path / "run").exists()


def test_uneven_calls_of_the_denoiser_are_refused():
    """Where the steps have different numbers of calls, nobody knows which call is which step's."""
    model = common.new_model("sd15")
    with pytest.raises(nft.UserError, match="equally often"):
        model.check_solver(torch.zeros(2, len(model.steps) + 1))


def test_a_pipeline_that_pads_to_the_longest_prompt_is_refused(monkeypatch):
    """As QwenImage does: the images of two batches could not be joined."""
    encode = diffusers.StableDiffusionPipeline.encode_prompt

    def trimmed(self, prompt, *args, **kwargs):
        embeds, others = encode(self, prompt, *args, **kwargs)
        longest = max(len(text.split()) for text in prompt)
        return embeds[:, : longest + 2], others

    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "encode_prompt", trimmed)
    with pytest.raises(nft.UserError, match="as much of a short prompt as of a long one"):
        common.new_model("sd15")


def test_watched_rewards_are_told(tmp_path, capsys):
    """The line of an evaluation has each reward, as metrics.jsonl has it."""
    logged = train("sd15", tmp_path / "run", reward="jpeg", watch="brightness", iterations=1)
    text = capsys.readouterr().out
    for row in logged:
        parts = [f"{name} {row[f'eval_reward/{name}']:.3f}" for name in ("jpeg", "brightness")]
        assert f"reward {row['eval_reward']:.3f}, {', '.join(parts)}   rough" in text


@pytest.mark.parametrize("settings", [{"reward": 5}, {"watch": None}, {"resume": True, "foo": 1}])
def test_settings_of_a_library_are_refused_in_a_line(settings):
    """What the command line cannot say is a UserError, too."""
    settings = {"out": common.finished("sd15")} | settings
    with pytest.raises(nft.UserError):
        nft.configure(**settings)


CHECKED = """
def score(images, prompts, metadata):
    return [len(prompt) for prompt in prompts]

def check(prompts, metadata):
    for prompt, data in zip(prompts, metadata, strict=True):
        if "dog" in prompt:
            raise ValueError(f"{prompt!r} has a dog")

score.check = check
"""


def test_a_reward_may_check_all_prompts_first(kennels, capsys):
    """Its `check(prompts, metadata)` sees every prompt before anything is written."""
    (kennels / "r.py").write_text(CHECKED)
    (kennels / "p.txt").write_text("a cat\na dog\nan owl\n")
    run("sd15", "run", status=2, reward="r.py:score", prompts="p.txt", eval_prompts=None)
    assert "'a dog' has a dog" in capsys.readouterr().err
    assert not (kennels / "run").exists()


def test_mended_lines_and_edited_rewards_go_on_and_are_told(kennels, capsys):
    """--resume accepts other prompts in the same places and an edited reward, and says so."""
    (kennels / "r.py").write_text(CHECKED)
    (kennels / "p.txt").write_text("a cat\nan owl\n")
    given = {"reward": "r.py:score", "prompts": "p.txt", "eval_prompts": None}
    run("sd15", "run", **given)
    run("sd15", "run", resume=True, iterations=3, **given)
    assert "edited" not in capsys.readouterr().out
    (kennels / "p.txt").write_text("a cat\nan eagle\n")
    (kennels / "r.py").write_text(CHECKED + "\n# another\n")
    run("sd15", "run", resume=True, iterations=4, **given)
    said = capsys.readouterr().out
    assert "prompts: edited since" in said
    assert "r:score: edited since" in said
    assert checkpoint("run")["rows"][-1]["iteration"] == 4
    (kennels / "p.txt").write_text("a cat\n")
    run("sd15", "run", status=2, resume=True, iterations=5, **given)
    assert "--prompts" in capsys.readouterr().err


# ---- The pipeline --------------------------------------------------------------------------------
class Words:
    """A tokenizer: a word is a token."""

    def __call__(self, prompts):
        return types.SimpleNamespace(input_ids=[prompt.split() for prompt in prompts])


def test_cut_prompts_are_told(tmp_path, capsys):
    """What text encoders cut, of held-out prompts as well, is said by encoder and number."""
    (tmp_path / "p.txt").write_text("a cat\na dog\n")
    (tmp_path / "e.txt").write_text("a red circle " * 60 + "\n")
    prompts = {"prompts": tmp_path / "p.txt", "eval_prompts": tmp_path / "e.txt"}
    for name in ("sd15", "flux"):
        run(name, tmp_path / name, max_sequence_length=None, **prompts)
    said = capsys.readouterr().out.splitlines()
    cut = [line for line in said if "are cut" in line]
    # FLUX gives its T5, text_encoder_2, 512 tokens, so that nothing is cut there.
    assert cut == ["1 of 3 prompts are cut: the pipeline's text_encoder takes 12 tokens"] * 2


def test_max_sequence_length_cuts(tmp_path, capsys):
    """--max-sequence-length is what a T5 takes, and CLIP its own number."""
    (tmp_path / "p.txt").write_text("a red circle\na red circle and a blue cross\n")
    file = tmp_path / "p.txt"
    changes = {"prompts": file, "eval_prompts": file, "max_sequence_length": 6}
    run("flux", tmp_path / "run", **changes)
    cut = [line for line in capsys.readouterr().out.splitlines() if "are cut" in line]
    assert cut == ["1 of 2 prompts are cut: the pipeline's text_encoder_2 takes 6 tokens"]


@pytest.mark.parametrize("name", ["clip", "pickscore", "hpsv2", "imagereward"])
def test_rewards_tell_what_they_cut(name, monkeypatch, capsys):
    """A reward that reads prompts says how many it does not see whole."""
    reward = importlib.import_module(name).reward
    # Of its own clip.py: runs of other tests may have loaded that anew.
    own = reward.check.__globals__
    monkeypatch.setitem(own, "load", lambda make, repository: Words())
    reward.check(["a red circle", "a red circle " * 40], [{}, {}])
    limit = 35 if name == "imagereward" else 77
    said = f"1 of 2 prompts are cut: the reward {name} takes {limit} tokens"
    assert capsys.readouterr().out.splitlines() == [said]


def test_a_resolution_that_is_rounded_is_refused(tmp_path, capsys):
    """FLUX makes 32 of 38; a run never paints another size than was asked."""
    run("flux", tmp_path / "run", status=2, resolution=38)
    assert "--resolution 38" in capsys.readouterr().err


@pytest.mark.parametrize("channels", [1, 4])
def test_pictures_that_are_not_rgb_are_refused(tmp_path, capsys, channels):
    """A VAE of one or of four channels is refused at the start."""
    from diffusers import AutoencoderKL

    folder = tmp_path / "grey"
    shutil.copytree(root() / "sd15", folder)
    settings = dict(AutoencoderKL.load_config(folder / "vae"))
    settings |= {"in_channels": channels, "out_channels": channels}
    AutoencoderKL.from_config(settings).save_pretrained(folder / "vae")
    run(str(folder), tmp_path / "run", status=2)
    assert "red, green, blue" in capsys.readouterr().err


def test_half_precision_variants_load(tmp_path):
    """A directory that holds variant="fp16" weights alone."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(root() / "sd15", safety_checker=None)
    pipe.to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    new_model(str(tmp_path / "half"))


def test_sd3_without_its_third_encoder_loads(tmp_path):
    """Components that were saved as [null, null]."""
    folder = tmp_path / "two"
    shutil.copytree(root() / "sd3", folder)
    index = json.loads((folder / "model_index.json").read_text())
    for name in ("text_encoder_3", "tokenizer_3"):
        index[name] = [None, None]
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "model_index.json").write_text(json.dumps(index))
    model = new_model(str(folder), max_sequence_length=2)
    assert model.sample(TEXTS, SEEDS, None)["images"].isfinite().all()


def test_a_single_file_is_told_how_to_convert(tmp_path, capsys):
    """from_single_file(...).save_pretrained(DIR)."""
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 100)
    run(str(tmp_path / "model.safetensors"), tmp_path / "run", status=2)
    assert "from_single_file" in capsys.readouterr().err


# ---- The command line ----------------------------------------------------------------------------
def start(*words, **environment):
    """python nft.py in a process of its own, without a terminal."""
    words = [sys.executable, REPOSITORY / "nft.py", *words]
    environment = common.os.environ | environment
    return subprocess.run(words, capture_output=True, env=environment, check=False)


def test_no_message_ends_a_run(tmp_path):
    """A prompt that the terminal cannot print; off it, each iteration has a line."""
    (tmp_path / "p.txt").write_text("一只猫\n")
    words = common.command_line("sd15", out=tmp_path / "猫", prompts=tmp_path / "p.txt")
    done = start(*words, PYTHONIOENCODING="cp1252")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.decode("cp1252").splitlines()
    told = [line for line in lines if "minutes left" in line]
    assert len(told) == 2
    assert all("reward" in line for line in told)


def test_runs_without_out_do_not_meet(monkeypatch):
    """The directory's name holds the model's, the time and the process."""
    monkeypatch.setattr(nft.os, "getpid", lambda: 17)
    one = nft.configure(model=".").out
    monkeypatch.setattr(nft.os, "getpid", lambda: 18)
    assert one != nft.configure(model=".").out
    assert re.fullmatch(rf"runs/{Path.cwd().name}-\d{{4}}-\d{{6}}-17", one)


def test_captions_are_readable():
    """Accents stay, other letters are ?; a long caption ends in dots and stays in its cell."""
    sheet = nft.picture_grid(torch.zeros(3, 3, 32, 32), ["é", "一只猫", "word " * 99])
    plain = nft.picture_grid(torch.zeros(3, 3, 32, 32), ["é", "???", "word " * 99])
    assert sheet == plain
    other = nft.picture_grid(torch.zeros(3, 3, 32, 32), ["e", "???", "word " * 99])
    assert other != plain
    # The last row of pixels is background: nothing is cut.
    assert len(sheet.crop((0, sheet.height - 2, sheet.width, sheet.height)).getcolors()) == 1


def test_captions_say_before_and_after_and_the_reward(tmp_path, monkeypatch):
    """Of each picture of an evaluation."""
    captions = []
    real = nft.picture_grid
    monkeypatch.setattr(
        nft, "picture_grid", lambda images, texts: captions.append(texts) or real(images, texts)
    )
    train("sd15", tmp_path / "run", reward={"seven": lambda images, *_: [7.0] * len(images)})
    before, after = captions
    assert before == [f"before (7): {text}" for text in TEXTS]
    assert after == [f"after (7): {text}" for text in TEXTS]


def test_help_shows_the_presets():
    """A table of what each preset changes."""
    text = start("--help").stdout.decode()
    assert "{'" not in text
    assert re.search(r"tiny-sd3 .*--lr 0.003", text)
    assert all(f"\n{title}:\n" in text for title in nft.GROUPS.values())


def test_equal_rewards_are_told_when_they_last(tmp_path, capsys):
    """Not of one iteration, which may be all right, but of five in a row."""
    changes = {"reward": {"same": lambda images, *_: [1.0] * len(images)}, "eval_every": 9}
    train("sd15", tmp_path / "four", iterations=4, **changes)
    assert "in a row" not in capsys.readouterr().out
    train("sd15", tmp_path / "five", iterations=5, **changes)
    assert capsys.readouterr().out.count("five iterations in a row") == 1


def test_evaluation_has_steps_of_its_own(tmp_path):
    """--eval-steps: evaluation's steps, whose noise levels are trained; rollouts take --steps."""
    model = new_model("sd15", steps=2, eval_steps=5)
    assert len(model.times) == 5
    for policy, count in (("old", 2), ("ema", 5), (None, 5)):
        model.sample(TEXTS, SEEDS, policy)
        assert len(model.steps) == count
    rows = metrics(run("sd15", tmp_path / "run", steps=2, eval_steps=3))
    same = metrics(run("sd15", tmp_path / "same", steps=3))
    assert rows[0]["eval_reward"] == same[0]["eval_reward"]
    assert rows[1]["reward"] != same[1]["reward"]
