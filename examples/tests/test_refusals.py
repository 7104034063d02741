"""Bad flags, prompt files, rewards and model directories are refused.

A refusal is one line with the value, the rule and a mend, and exit status 2. It comes before
anything is written, and nothing of a directory is executed.

    python -m pytest examples/tests/test_refusals.py

SPDX-License-Identifier: MIT
"""

import json
import os
import random
import shutil
import subprocess
import sys

import common
import faults
import pytest
import torch

# Files that do not hold prompts.
PROMPT_FILES = {
    "empty.txt": b"",
    "blank.txt": b" \n\t\r\n\n",
    "bom.txt": b"\xef\xbb\xbf\n",
    "latin.txt": "un café\n".encode("latin-1"),
    "utf16.txt": "a red circle\n".encode("utf-16"),
    "binary.txt": random.Random(0).randbytes(4096),
    "picture.txt": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
    "empty.jsonl": b"\n",
    "torn.jsonl": b'{"prompt": "a"}\n{"prompt": "a red ci',
    "text.jsonl": b"a red circle\n",
    "string.jsonl": b'"a red circle"\n',
    "number.jsonl": b"7\n",
    "null.jsonl": b"null\n",
    "array.jsonl": b'["a red circle"]\n',
    "whole_array.jsonl": b'[{"prompt": "a"},\n {"prompt": "b"}]\n',
    "no_prompt.jsonl": b'{"prompt": "a"}\n{"Prompt": "b"}\n',
    "null_prompt.jsonl": b'{"prompt": null}\n',
    "number_prompt.jsonl": b'{"prompt": 7}\n',
    "list_prompt.jsonl": b'{"prompt": ["a", "b"]}\n',
    "empty_prompt.jsonl": b'{"prompt": "a"}\n{"prompt": " "}\n',
    "surrogate.jsonl": b'{"prompt": "a \\ud800 b"}\n',
    "deep.jsonl": b'{"prompt": "a", "x": ' + 50000 * b"[" + 50000 * b"]" + b"}\n",
    "latin.jsonl": b'{"prompt": "caf\xe9"}\n',
}
NOT_UTF8 = ["latin.txt", "utf16.txt", "binary.txt", "picture.txt", "latin.jsonl"]

# Files that hold no reward.
REWARD_FILES = {
    "syntax.py": b"def reward(:\n",
    "imports.py": b"import no_such_package\n",
    "binary.py": b"\0\1\2",
    "exits.py": b"import sys\nsys.exit(3)\n",
    "raises.py": b"1 / 0\n",
    "recursive.py": b"def f(): f()\nf()\n",
}

# Functions that give no finite number an image.
REWARDS = """
import sys

number = 3
text = "not a function"


def none(images, prompts, metadata):
    return None


def empty(images, prompts, metadata):
    return []


def long(images, prompts, metadata):
    return [0.0] * (len(images) + 1)


def matrix(images, prompts, metadata):
    return images.mean(3)


def scalar(images, prompts, metadata):
    return images.mean()


def strings(images, prompts, metadata):
    return ["good"] * len(images)


def table(images, prompts, metadata):
    return {"score": [0.0] * len(images)}


def infinite(images, prompts, metadata):
    return [float("inf")] * len(images)


def huge(images, prompts, metadata):
    return [3e38] * len(images)


def exits(images, prompts, metadata):
    sys.exit(3)


def raises(images, prompts, metadata):
    return 1 / 0


def recursive(images, prompts, metadata):
    return recursive(images, prompts, metadata)


def no_arguments():
    return 0
"""

# {setting: values that are refused as "--setting value"}, before a model is loaded ...
BAD_VALUES = {
    "prompts": ["none.txt", "folder", "loop", "nowhere", "/dev/null", "p.txt/x", "a\0b"],
    "eval_prompts": ["torn.jsonl", "blank.txt"],
    "reward": [
        "none.py:f",
        "folder.py:f",
        "folder:f",
        "no_such_package:f",
        "json:nope",
        ".py:f",
        "..:f",
        "binary.py:reward",
        "rewards.py:nope",
        "rewards.py:number",
        "rewards.py:text",
        "rewards.py:",
        "rewards.py",
        "__import__",
        ":",
        "=",
        "jpeg=x",
        "jpeg=nan",
        "jpeg=1e999",
        "jpeg;clip",
    ],
    "watch": ["rewards.py:nope", "jpeg=-inf"],
    "model": ["none", "folder", "p.txt", "../hub", "/dev/null", ""],
    "resolution": ["-32"],
    "max_sequence_length": ["-1"],
    "eta": ["", "-0.001", "nan", "0,inf,0.5", "0,0.1", "0,0.1,0.5,1", "0;0.1;0.5"],
    "z": ["-1", "nan", "inf"],
    "beta": ["0", "nan"],
    "kl": ["nan"],
    "guidance": ["nan", "0.99"],
    "ema": ["1.5"],
    "warmup": ["-1"],
    "iterations": ["-5"],
    "group_size": ["1"],
    "updates": ["7"],
    "rank": ["10000000000"],
    "device": ["cuda:99", "tpu", ""],
}
# ... and after that.
BAD_FOR_THE_MODEL = {
    "resolution": ["33", "4", "100000000"],
    "steps": ["1001"],
    "solver": [
        "Nope",
        "FlowMatchEulerDiscrete",
        "EDMEuler",
        "DiffusionPipeline",
        "__name__",
        "Scheduler",
    ],
    "out": ["p.txt", "p.txt/x", "run", "loop", "/proc/nft", "/dev/null/x", "x" * 300],
}

# {setting: values of another type}.
MISTYPED = {
    "resolution": ["32.0", "32x32"],
    "steps": ["2.5"],
    "beta": ["1,0"],
    "lr": ["fast"],
    "iterations": ["1e3"],
    "groups": ["two"],
    "seed": ["1.5"],
    "precision": ["half"],
}

# (settings, what the message says).
SD3 = {"max_sequence_length": 2, "resolution": None}
OTHERS = [
    ({"prompts": "torn.jsonl"}, ["--prompts torn.jsonl", "; line 2 ("]),
    ({"prompts": "empty_prompt.jsonl"}, ["--prompts empty_prompt.jsonl", "; line 2 ("]),
    ({"reward": "asthetic"}, ["--reward asthetic", "check the name"]),
    ({"reward": "syntax.py:reward"}, ["--reward syntax.py:reward", "SyntaxError"]),
    ({"reward": "imports.py:reward"}, ["--reward imports.py:reward", "no_such_package"]),
    ({"reward": "exits.py:reward"}, ["--reward exits.py:reward", "SystemExit"]),
    ({"reward": "raises.py:reward"}, ["--reward raises.py:reward", "ZeroDivisionError"]),
    ({"reward": "recursive.py:reward"}, ["--reward recursive.py:reward", "RecursionError"]),
    ({"reward": "jpeg,JPEG"}, ["--reward JPEG"]),
    ({"reward": ","}, ["--reward"]),
    ({"reward": " "}, ["--reward"]),
    ({"reward": ""}, ["--reward"]),
    ({"lr": "-1e-4"}, ["--lr -0.0001"]),
    ({"lr": "1e400"}, ["--lr inf"]),
    ({"model": "a\nb\0"}, ["--model a"]),
    ({"out": "nowhere/x/\0"}, ["--out nowhere"]),
    ({"iter": "1"}, ["--iter"]),
    ({"out": "run", "resume": "yes"}, ["--resume"]),
    ({"out": None, "resume": True}, ["--out DIR"]),
    ({"out": "none", "resume": True}, ["--out none"]),
    ({"out": "folder", "resume": True}, ["--out folder"]),
    ({"out": "p.txt", "resume": True}, ["--out p.txt"]),
    ({"out": "run\0", "resume": True}, ["--out run"]),
    ({"model": "../sd3", "solver": "ddim"} | SD3, ["--solver ddim"]),
    ({"model": "../sd3", "solver": "PNDM"} | SD3, ["--solver PNDM"]),
]

# Words after a good command line that make it one that cannot be read.
BAD_SYNTAX = [
    (["--lr"], "--lr"),
    (["train"], "train"),
    (["--no-lr"], "--no-lr"),
    (["-r", "jpeg"], "-r"),
    (["--", "--"], "--"),
    (["--resume", "--out"], "--out"),
    (["--groups=3", "--groups=-3"], "--groups -3"),
]

# (function of REWARDS, what the message says).
BAD_REWARDS = [
    ("none", ["one finite number an image"]),
    ("empty", ["(0,) of 1"]),
    ("long", ["(2,) of 1"]),
    ("matrix", ["one finite number an image"]),
    ("scalar", ["() of 1"]),
    ("strings", ["one finite number an image"]),
    ("table", ["one finite number an image"]),
    ("infinite", ["inf", "a red circle"]),
    ("huge=1e9", ["a red circle"]),
    ("exits", ["SystemExit"]),
    ("raises", ["ZeroDivisionError"]),
    ("no_arguments", ["TypeError"]),
    ("recursive", ["RecursionError"]),
]


def pairs(table):
    """{key: values} as a list of pairs of a key and a value."""
    return [(key, value) for key, values in table.items() for value in values]


@pytest.fixture(scope="module")
def bad_files():
    """AREA with the files above."""
    area = faults.area()
    for name, content in (PROMPT_FILES | REWARD_FILES).items():
        (area / name).write_bytes(content)
    (area / "rewards.py").write_text(REWARDS)
    return area


@pytest.fixture(autouse=True)
def here(bad_files, monkeypatch):
    """Names of files are relative to AREA, and no test leaves a run for the next one."""
    monkeypatch.chdir(bad_files)
    with faults.one_thread():
        yield
    shutil.rmtree(bad_files / "new", ignore_errors=True)


# ---- Command lines -----------------------------------------------------------------------------
@pytest.mark.parametrize("name", PROMPT_FILES)
def test_what_holds_no_prompts(capfd, name):
    """A prompts file without prompts is refused, and one that is not UTF-8 as just that."""
    says = [f"--prompts {name}"]
    if name in NOT_UTF8:
        says.append("UTF-8")
    faults.refused(capfd, faults.command(prompts=name), *says)


@pytest.mark.parametrize("name, value", pairs(BAD_VALUES) + pairs(BAD_FOR_THE_MODEL), ids=ascii)
def test_bad_values(capfd, name, value):
    """The flag is named with its value."""
    flag = "--" + name.replace("_", "-")
    faults.refused(capfd, faults.command(**{name: value}), f"{flag} {value}")


@pytest.mark.parametrize("name, value", pairs(MISTYPED))
def test_values_of_another_type(capfd, name, value):
    """The flag is named, and the value as it was typed."""
    flag = "--" + name.replace("_", "-")
    faults.refused(capfd, faults.command(**{name: value}), flag, repr(value))


@pytest.mark.parametrize("changes, says", OTHERS, ids=ascii)
def test_other_bad_settings(capfd, changes, says):
    """What does not go together is refused like a bad value."""
    faults.refused(capfd, faults.command(**changes), *says)


@pytest.mark.parametrize("words, says", BAD_SYNTAX, ids=str)
def test_bad_syntax(capfd, words, says):
    """A command line that cannot be read is refused like one with a bad value."""
    faults.refused(capfd, faults.command() + words, says)


def test_refusal_of_a_process():
    """As people start it: status 2, one line and nothing else, and nothing changed on disk."""
    before = faults.tree()
    script = common.REPOSITORY / "nft.py"
    words = [sys.executable, script, "--model=p.txt", "--reward=jpeg"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("nft.py: --model p.txt")
    assert faults.tree() == before


@pytest.mark.parametrize("name, says", BAD_REWARDS)
def test_bad_rewards(capfd, name, says):
    """A reward is tried before anything is written; it must give a finite number an image."""
    function = name.partition("=")[0]
    command = faults.command(reward=f"rewards.py:{name}")
    faults.refused(capfd, command, f"reward rewards:{function}", *says)


# ---- Directories that are not pipelines --------------------------------------------------------
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"

# Parts of the pipeline that are missing: files and folders.
MISSING = ["model_index.json", "unet", "text_encoder", "tokenizer", "vae", "scheduler", WEIGHTS]
# {what is wrong: (file, what it holds instead)}.
OVERWRITTEN = {
    "index is empty": ("model_index.json", b""),
    "index is binary": ("model_index.json", b"\xff\xfe\0"),
    "index is a list": ("model_index.json", b"[]"),
    "config is torn": ("unet/config.json", b'{"_class_name": "UNet2DCon'),
    "weights are empty": (WEIGHTS, b""),
}
# {what is wrong: (JSON file, entries that change; None takes one out)}.
EDITED = {
    "class is unknown": ("model_index.json", {"_class_name": "Nope"}),
    "class is not a pipeline": ("model_index.json", {"_class_name": "UNet2DModel"}),
    "class is missing": ("model_index.json", {"_class_name": None}),
    "VAE is null": ("model_index.json", {"vae": [None, None]}),
    "weights of another size": ("unet/config.json", {"cross_attention_dim": 48}),
    "beta schedule is unknown": ("scheduler/scheduler_config.json", {"beta_schedule": "nope"}),
    "prediction is unknown": ("scheduler/scheduler_config.json", {"prediction_type": "nope"}),
}


@pytest.fixture
def model(bad_files):
    """A copy of a pipeline's directory, by links to its files: they are replaced, never changed."""
    copy = bad_files / "model"
    shutil.copytree(common.ROOT / "sd15", copy, copy_function=os.link)
    yield copy
    shutil.rmtree(copy)


def overwrite(file, content):
    """Put another file in the place of one that is shared with the good pipeline."""
    file.unlink()
    file.write_bytes(content)


def edit(file, changes):
    """Change entries of a JSON file; None takes one out."""
    entries = json.loads(file.read_text()) | changes
    kept = {name: value for name, value in entries.items() if value is not None}
    overwrite(file, json.dumps(kept).encode())


def refused_model(capfd, model):
    """The directory is refused as --model."""
    faults.refused(capfd, faults.command(model=model), f"--model {model}")


@pytest.mark.parametrize("part", MISSING)
def test_pipelines_with_a_part_missing(capfd, model, part):
    """A pipeline that lacks a file or a folder is refused."""
    if (model / part).is_dir():
        shutil.rmtree(model / part)
    else:
        (model / part).unlink()
    refused_model(capfd, model)


@pytest.mark.parametrize("damage", OVERWRITTEN)
def test_damaged_files_of_a_pipeline(capfd, model, damage):
    """A pipeline of which a file is not what it should be is refused."""
    name, content = OVERWRITTEN[damage]
    overwrite(model / name, content)
    refused_model(capfd, model)


@pytest.mark.parametrize("damage", EDITED)
def test_foreign_configs_of_a_pipeline(capfd, model, damage):
    """A pipeline with a config that says something else is refused."""
    name, changes = EDITED[damage]
    edit(model / name, changes)
    refused_model(capfd, model)


def test_torn_weights(capfd, model):
    """Weights of which the end is missing are refused."""
    overwrite(model / WEIGHTS, (model / WEIGHTS).read_bytes()[:100_000])
    refused_model(capfd, model)


def test_denoiser_of_another_pipeline(capfd, model):
    """The denoiser of an SDXL in a Stable Diffusion 1.5 is refused."""
    shutil.rmtree(model / "unet")
    shutil.copytree(common.ROOT / "sdxl/unet", model / "unet")
    refused_model(capfd, model)


def test_hostile_code(capfd, model):
    """A component that is code of the directory itself is refused, not executed."""
    edit(model / "model_index.json", {"unet": ["evil", "Evil"]})
    code = f"open({str(faults.HACKED)!r}, 'w')\n\n\nclass Evil:\n    pass\n"
    (model / "unet/evil.py").write_text(code)
    (model / "evil.py").write_text(code)
    refused_model(capfd, model)


def test_hostile_weights(capfd, model):
    """A denoiser whose weights are a pickle that runs a command is refused, not executed."""
    (model / WEIGHTS).unlink()
    torch.save(faults.Hostile(), model / "unet/diffusion_pytorch_model.bin")
    refused_model(capfd, model)
