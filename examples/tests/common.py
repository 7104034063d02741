"""Small runs on small untrained pipelines, for all tests.

Importing this module points the hub's cache at one of our own, which holds tiny models under the
real repository names. So nothing here needs a network, and every test goes through the real
loading code. It must be imported before diffusers and transformers are.
SPDX-License-Identifier: MIT
"""

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLES = REPOSITORY / "examples"
# One temporary directory for all test files of a process; it goes when the process ends.
_TEMPORARY = tempfile.TemporaryDirectory(prefix="nft_tests_")
ROOT = Path(_TEMPORARY.name)
os.environ["HF_HUB_CACHE"] = str(ROOT / "hub")
os.environ["HF_HUB_OFFLINE"] = "1"
# For test processes that are started without pytest's own paths.
for room in (REPOSITORY, EXAMPLES / "tiny"):
    if str(room) not in sys.path:
        sys.path.insert(0, str(room))

import torch
import untrained

import nft

TEXTS = ["a red circle", "two blue squares", "a green cross"]
SEEDS = [("evaluation", i) for i in range(3)]

REWARDS = '''
def red(images, prompts, metadata):
    """How much redder than green and blue each picture is."""
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


def minus_red(images, prompts, metadata):
    return -red(images, prompts, metadata)
'''


def copy_of(name, folder, **scheduler):
    """A copy of a pipeline's directory that a test may change; settings of its scheduler."""
    shutil.copytree(ROOT / name, folder)
    file = folder / "scheduler/scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | scheduler))
    return folder


@functools.cache
def root():
    """ROOT: untrained pipelines sd15, sdxl, sd15-v, sd3, flux, the hub cache and small files."""
    untrained.build(ROOT)
    (ROOT / "reward.py").write_text(REWARDS)
    (ROOT / "train.txt").write_text("\n".join(TEXTS) + "\n")
    # v-prediction, whose schedule ends in pure noise.
    v = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    copy_of("sd15", ROOT / "sd15-v", **v, timestep_spacing="trailing")
    return ROOT


def settings(pipeline, **changes):
    """The settings of a run of a second or two; `changes` win, and None leaves a setting out."""
    small = {
        "model": pipeline if "/" in str(pipeline) else root() / pipeline,
        "reward": f"{root()}/reward.py:red",
        "prompts": root() / "train.txt",
        "eval_prompts": root() / "train.txt",
        "iterations": 2,
        "groups": 2,
        "group_size": 3,
        "batch_size": 4,
        "updates": 2,
        "train_times": 2,
        "steps": 3,
        "rank": 4,
        "lr": 0.01,
        "z": 2.0,
        "beta": 0.7,
        "kl": 0.5,
        "ema": 0.8,
        "eta": "0.4",
        "resolution": 32,
        "eval_every": 2,
        "device": "cpu",
    }
    if Path(pipeline).name in ("sd3", "flux"):
        small["max_sequence_length"] = 2
    small |= changes
    return {name: value for name, value in small.items() if value is not None}


def flags(**given):
    """Settings as words of a command line."""
    words = []
    for name, value in given.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            words.append(flag)
        elif value is not False:
            words.append(f"{flag}={value}")
    return words


def command_line(pipeline, **changes):
    """The words of a small run's command line."""
    return flags(**settings(pipeline, **changes))


def run(pipeline, out, status=0, **changes):
    """Run the command line of a small run in this process; returns its directory."""
    assert nft.main(command_line(pipeline, out=out, **changes)) == status
    return Path(out)


def train(pipeline, out, parts=None, **changes):
    """A small run as a library, with parts of Algorithm 1; returns its rows."""
    config = nft.configure(out=out, **settings(pipeline, **changes))
    return nft.train(config, **(parts or {}))


def start(words, *launcher, script=REPOSITORY / "nft.py", **options):
    """python [launcher] nft.py in a process of its own, with one thread; how it ended."""
    call = [sys.executable, *launcher, script, *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | options.pop("env", {})
    return subprocess.run(call, capture_output=True, text=True, env=environment, **options)


@functools.cache
def finished(pipeline):
    """The directory of a finished run of two iterations: change only copies of it."""
    return run(pipeline, root() / "runs" / pipeline)


def new_model(pipeline, filled=False, **changes):
    """A Model of a small run's settings; `filled`: its adapters all differ and matter."""
    made = nft.Model(nft.configure(out=ROOT / "unused", **settings(pipeline, **changes)))
    if filled:
        torch.manual_seed(0)
        for adapter in made.lora.adapters.values():
            for x in adapter:
                x.data = 0.1 * torch.randn(x.shape)
    return made


def paint(pipe, form="pt"):
    """The pictures of TEXTS and SEEDS, or their latents, by the pipeline alone."""
    noise = [nft.generator(*seed) for seed in SEEDS]
    small = {"num_inference_steps": 3, "height": 32, "width": 32, "guidance_scale": 1.0}
    if hasattr(pipe, "transformer"):
        small["max_sequence_length"] = 2
    return pipe(TEXTS, generator=noise, output_type=form, **small).images


def folded(model, adapter, x_t, t, condition):
    """The denoiser with W + 2 B A in the place of W: LoRA a second way."""
    weights = {}
    for i, name in enumerate(model.lora.layers):
        A, B = adapter[2 * i : 2 * i + 2]
        W = model.net.get_submodule(name).weight
        weights[f"{name}.weight"] = W + 2 * B @ A
    inputs = {model.input: x_t, "timestep": t, "return_dict": False}
    given = condition | model.shared | inputs
    return torch.func.functional_call(model.net, weights, (), given)[0]


def checkpoint(out):
    """What a run's checkpoint holds: config, rows, lora, optimizer, scaler."""
    return torch.load(Path(out) / "checkpoint.pt", weights_only=True)


def metrics(out, *without):
    """The rows of metrics.jsonl, some of their fields left out."""
    rows = []
    for line in (Path(out) / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows.append({name: value for name, value in row.items() if name not in without})
    return rows
