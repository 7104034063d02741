"""What goes wrong around a run: bad flags and files, damage, kills, full disks. Each docstring states what is promised.

    pip install pytest peft hypothesis; python -m pytest -q examples/test_faults.py     # about two minutes on two cores

SPDX-License-Identifier: MIT
"""
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import math
import os
import pathlib
import pickle
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile

TEMP = tempfile.TemporaryDirectory()
ROOT = pathlib.Path(os.environ.setdefault("NFT_TEST_ROOT", TEMP.name))      # of all test files
os.environ.update(HF_HUB_CACHE=f"{ROOT}/hub", HF_HUB_OFFLINE="1")
HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import hypothesis.strategies as st  # noqa: E402
import kill_test  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, given, settings  # noqa: E402

import nft  # noqa: E402
import untrained  # noqa: E402

AREA = ROOT / "faults"
FILES = {
    "p.txt": b"a red circle\na blue square\n", "empty.txt": b"", "blank.txt": b" \n\t\r\n\n",
    "bom.txt": b"\xef\xbb\xbf\n",
    "latin.txt": "un café\n".encode("latin-1"), "utf16.txt": "a red circle\n".encode("utf-16"),
    "binary.txt": random.Random(0).randbytes(4096), "picture.txt": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
    "empty.jsonl": b"\n", "torn.jsonl": b'{"prompt": "a"}\n{"prompt": "a red ci', "text.jsonl": b"a red circle\n",
    "string.jsonl": b'"a red circle"\n', "number.jsonl": b"7\n", "null.jsonl": b"null\n",
    "array.jsonl": b'["a red circle"]\n',
    "no_prompt.jsonl": b'{"prompt": "a"}\n{"Prompt": "b"}\n', "null_prompt.jsonl": b'{"prompt": null}\n',
    "number_prompt.jsonl": b'{"prompt": 7}\n', "list_prompt.jsonl": b'{"prompt": ["a", "b"]}\n',
    "empty_prompt.jsonl": b'{"prompt": "a"}\n{"prompt": " "}\n', "surrogate.jsonl": b'{"prompt": "a \\ud800 b"}\n',
    "deep.jsonl": b'{"prompt": "a", "x": ' + 50000 * b"[" + 50000 * b"]" + b"}\n",
    "whole_array.jsonl": b'[{"prompt": "a"},\n {"prompt": "b"}]\n', "latin.jsonl": b'{"prompt": "caf\xe9"}\n',
    "syntax.py": b"def reward(:\n", "imports.py": b"import no_such_package\n", "binary.py": b"\0\1\2",
    "exits.py": b"import sys\nsys.exit(3)\n", "raises.py": b"1 / 0\n", "recursive.py": b"def f(): f()\nf()\n",
    "rewards.py": b'''
import os, pathlib, shutil, sys
def red(images, prompts, metadata):
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))
number, text = 3, "not a function"
none = lambda *_: None
empty = lambda *_: []
long = lambda images, *_: [0.0] * (len(images) + 1)
matrix = lambda images, *_: images.mean(3)
scalar = lambda images, *_: images.mean()
strings = lambda images, *_: ["good"] * len(images)
table = lambda images, *_: {"score": [0.0] * len(images)}
infinite = lambda images, *_: [float("inf")] * len(images)
huge = lambda images, *_: [3e38] * len(images)
exits = lambda *_: sys.exit(3)
raises = lambda *_: 1 / 0
recursive = lambda *_: recursive()
no_arguments = lambda: 0
calls = []
def gone(images, prompts, metadata):                # in iteration 2 somebody removes the run's directory
    calls.append(1)
    if len(calls) == 3:
        shutil.rmtree(os.environ["NFT_TEST_GONE"])
    return red(images, prompts, metadata)
'''}


class Hostile:
    """Pickled, it is a command that leaves a file."""
    def __reduce__(self):
        return os.system, (f"touch {AREA}/hacked",)


def argv(**flags):
    """The command line of a run of about a second; `flags` win, and None leaves one out."""
    small = dict(model=ROOT / "sd15", reward=AREA / "rewards.py:red", prompts=AREA / "p.txt",
                 eval_prompts=AREA / "p.txt", out=AREA / "new", iterations=2, groups=2, group_size=2, batch_size=4,
                 updates=2, train_times=2, steps=2, rank=2, lr=0.01, resolution=32, eval_every=2, save_every=1,
                 device="cpu") | flags
    return [f"--{k.replace('_', '-')}" + f"={v}" * (v is not True) for k, v in small.items() if v is not None]


@pytest.fixture(scope="session", autouse=True)
def area():
    """In AREA: prompt files and rewards, good and bad, and a finished run of two iterations."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                            # as `here`: runs are compared bit for bit
    if not (ROOT / "hub").exists():
        untrained.build(ROOT)
    AREA.mkdir()
    for file, content in FILES.items():
        (AREA / file).write_bytes(content)
    (AREA / "loop").symlink_to("loop")
    (AREA / "nowhere").symlink_to("gone/away")
    (AREA / "folder").mkdir()
    (AREA / "bad").mkdir()
    assert nft.main(argv(out=AREA / "run")) == 0
    torch.set_num_threads(threads)                      # of the tests of other files


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """On busy cores two threads wait for each other at layers as small as these; paths are relative to AREA."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")          # of other processes
    shutil.rmtree(AREA / "new", ignore_errors=True)     # of a test that failed
    monkeypatch.chdir(AREA)
    monkeypatch.setattr(sys, "path", sys.path[:])
    yield
    torch.set_num_threads(threads)


def tree(folder=ROOT):
    """All that is on disk: {path: what it holds}."""
    return {path: os.readlink(path) if path.is_symlink() else path.is_file() and
            (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
            for path in folder.rglob("*") if "__pycache__" not in path.parts}


def said(capfd):
    """The lines on stderr."""
    return [line for line in capfd.readouterr().err.splitlines() if line.strip()]


def refused(capfd, command, says, status=2):
    """The command is refused: one line with value and mend, the right status, no traceback, nothing changed on disk."""
    before, _ = tree(), capfd.readouterr()
    got, lines = nft.main(command), said(capfd)
    assert (got, len(lines)) == (status, 1), lines
    assert re.search(rf"^nft\.py: .*{says}.*; \S", lines[0]), lines[0]
    after = tree()
    assert [p for p in {**before, **after} if before.get(p, "") != after.get(p, "")] == []


# ---- Bad command lines and files -------------------------------------------------------------------------------------
BAD = [(dict([row.split(" ")[0].split("=", 1)]), row.split(" ", 1)[1]) for row in """
prompts=empty.txt --prompts empty.txt
prompts=blank.txt --prompts blank.txt
prompts=bom.txt --prompts bom.txt
prompts=latin.txt --prompts latin.txt.*UTF-8
prompts=utf16.txt --prompts utf16.txt.*UTF-8
prompts=binary.txt --prompts binary.txt.*UTF-8
prompts=picture.txt --prompts picture.txt.*UTF-8
prompts=none.txt --prompts none.txt
prompts=folder --prompts folder
prompts=loop --prompts loop
prompts=nowhere --prompts nowhere
prompts=/dev/null --prompts /dev/null
prompts=p.txt/x --prompts p.txt/x
prompts= --prompts
prompts=empty.jsonl --prompts empty.jsonl
prompts=torn.jsonl --prompts torn.jsonl
prompts=text.jsonl --prompts text.jsonl
prompts=array.jsonl --prompts array.jsonl
prompts=whole_array.jsonl --prompts whole_array.jsonl
prompts=string.jsonl --prompts string.jsonl
prompts=number.jsonl --prompts number.jsonl
prompts=null.jsonl --prompts null.jsonl
prompts=no_prompt.jsonl --prompts no_prompt.jsonl.*prompt
prompts=null_prompt.jsonl --prompts null_prompt.jsonl.*prompt
prompts=number_prompt.jsonl --prompts number_prompt.jsonl.*prompt
prompts=list_prompt.jsonl --prompts list_prompt.jsonl.*prompt
prompts=empty_prompt.jsonl --prompts empty_prompt.jsonl.*prompt
prompts=surrogate.jsonl --prompts surrogate.jsonl
prompts=deep.jsonl --prompts deep.jsonl
prompts=latin.jsonl --prompts latin.jsonl.*UTF-8
eval_prompts=torn.jsonl --eval-prompts torn.jsonl
eval_prompts=blank.txt --eval-prompts blank.txt
reward=none.py:f --reward none.py:f
reward=syntax.py:reward --reward syntax.py:reward.*SyntaxError
reward=imports.py:reward --reward imports.py:reward.*no_such_package
reward=exits.py:reward --reward exits.py:reward.*SystemExit
reward=raises.py:reward --reward raises.py:reward.*ZeroDivisionError
reward=recursive.py:reward --reward recursive.py:reward.*RecursionError
reward=binary.py:reward --reward binary.py:reward
reward=rewards.py:nope --reward rewards.py:nope.*nope
reward=rewards.py:number --reward rewards.py:number
reward=rewards.py:text --reward rewards.py:text
reward=rewards.py: --reward rewards.py:
reward=rewards.py --reward rewards.py
reward=folder.py:f --reward folder.py:f
reward=.py:f --reward .py:f
reward=: --reward :
reward== --reward =
reward=, --reward
reward=jpeg=x --reward jpeg=x
reward=jpeg=nan --reward jpeg=nan
reward=jpeg=1e999 --reward jpeg=1e999
reward=jpeg;clip --reward jpeg;clip
reward=jpeg,JPEG --reward JPEG
reward=__import__ --reward __import__
watch=rewards.py:nope --watch rewards.py:nope
watch=jpeg=-inf --watch jpeg=-inf
model=none --model none
model=folder --model folder
model=p.txt --model p.txt
model=../hub --model ../hub
model=/dev/null --model /dev/null
model= --model
resolution=33 --resolution 33
resolution=-32 --resolution -32
resolution=4 --resolution 4
resolution=100000000 --resolution 100000000
resolution=32.0 --resolution.*32.0
resolution=32x32 --resolution.*32x32
max_sequence_length=-1 --max-sequence-length -1
solver=Nope --solver Nope
solver=FlowMatchEulerDiscrete --solver FlowMatchEulerDiscrete
solver=EDMEuler --solver EDMEuler
solver=DiffusionPipeline --solver DiffusionPipeline
solver=__name__ --solver __name__
solver=Scheduler --solver Scheduler
steps=1001 --steps 1001
steps=2.5 --steps.*2.5
eta=-0.001 --eta -0.001
eta=nan --eta nan
eta=0,inf,0.5 --eta 0,inf,0.5
eta=0,0.1 --eta 0,0.1
eta=0,0.1,0.5,1 --eta 0,0.1,0.5,1
eta=0;0.1;0.5 --eta 0;0.1;0.5
eta= --eta
z=-1 --z -1
z=nan --z nan
z=inf --z inf
beta=0 --beta 0
beta=nan --beta nan
beta=1,0 --beta.*1,0
kl=nan --kl nan
lr=-1e-4 --lr -0.0001
lr=1e400 --lr inf
lr=fast --lr.*fast
guidance=nan --guidance nan
guidance=0.99 --guidance 0.99
ema=1.5 --ema 1.5
warmup=-1 --warmup -1
iterations=1e3 --iterations.*1e3
iterations=-5 --iterations -5
groups=two --groups.*two
group_size=1 --group-size 1
updates=5 --updates 5
rank=10000000000 --rank 10000000000
seed=1.5 --seed.*1.5
device=cuda:99 --device cuda:99
device=tpu --device tpu
device= --device
precision=half --precision.*half
times=never --times.*never
out=p.txt --out p.txt
out=p.txt/x --out p.txt/x
out=run --out run
out=loop --out loop
out=nowhere/x/\\0 --out nowhere
out=/proc/nft --out /proc/nft
out=/dev/null/x --out /dev/null/x
abbrev=1 --abbrev
iter=1 --iter
""".strip().splitlines()]
BAD = [({k: v.replace("\\0", "\0") for k, v in flags.items()}, re.escape(says).replace(r"\.\*", ".*"))
       for flags, says in BAD]
BAD += [(dict(out=f"{AREA}/{'x' * 300}"), "--out .*xxx"), (dict(model="a\nb\0"), "--model a"),
        (dict(prompts="a\0b"), "--prompts a"), (dict(out="run", resume="yes"), "--resume"),
        (dict(out="none", resume=True), "--out none"), (dict(out=None, resume=True), "--out DIR"),
        (dict(out="folder", resume=True), "--out folder"), (dict(out="p.txt", resume=True), "--out p.txt"),
        (dict(out="run\0", resume=True), "--out run"),
        (dict(model=ROOT / "sd3", solver="ddim", resolution=None), "--solver ddim"),
        (dict(model=ROOT / "sd3", solver="PNDM", resolution=None), "--solver PNDM")]


@pytest.mark.parametrize("flags, says", BAD, ids=lambda x: ascii(x).replace(str(ROOT), "ROOT")[:60])
def test_bad_input_is_refused(capfd, flags, says):
    """One line that names the value and a mend, exit status 2, no traceback, nothing changed on disk."""
    refused(capfd, argv(**flags), says)


@pytest.mark.parametrize("given, says", [
    (["--lr"], "--lr"), (["train"], "train"), (["--no-lr"], "--no-lr"), (["-r", "jpeg"], "-r"),
    (["--", "--"], "--"), (["--resume", "--out"], "--out"), (["--groups=3", "--groups=-3"], "--groups -3")], ids=str)
def test_bad_syntax_is_refused(capfd, given, says):
    """A command line that cannot be read is refused like one with a bad value."""
    refused(capfd, argv() + given, says)


@pytest.mark.parametrize("given, says", [(argv(updates=9), "--updates 9"), (argv(model="p.txt"), "--model p.txt"),
                                         (["--resume", "--out=p.txt"], "--out p.txt")], ids=["range", "model", "run"])
def test_refusals_of_a_process(given, says):
    """As people start it, too: status 2, one line and nothing else on stderr, nothing changed on disk."""
    before = tree()
    done = subprocess.run([sys.executable, HERE.parent / "nft.py", *given], capture_output=True, text=True)
    assert done.returncode == 2 and re.fullmatch(rf"nft\.py: .*{says}.*; \S.*\n", done.stderr), done.stderr
    assert tree() == before


# ---- Directories that are not pipelines ------------------------------------------------------------------------------
def edit(file, **changes):
    """Change entries of a JSON file; None takes one out."""
    new = {k: v for k, v in (json.loads(file.read_text()) | changes).items() if v is not None}
    file.unlink()                                       # it may be a link to the good one
    file.write_text(json.dumps(new))


def replace(file, content):
    """Put bytes in the place of a file."""
    file.unlink()
    file.write_bytes(content)


def hostile_code(model):
    """A component that is code of the directory itself."""
    edit(model / "model_index.json", unet=["evil", "Evil"])
    (model / "unet/evil.py").write_text(f"open({str(AREA / 'hacked')!r}, 'w')\nclass Evil: pass\n")
    (model / "evil.py").write_text(f"open({str(AREA / 'hacked')!r}, 'w')\nclass Evil: pass\n")


def hostile_weights(model):
    """The denoiser's weights as a pickle that runs a command."""
    (model / "unet/diffusion_pytorch_model.safetensors").unlink()
    torch.save(Hostile(), model / "unet/diffusion_pytorch_model.bin")


MODELS = {
    "index is empty": lambda d: replace(d / "model_index.json", b""),
    "index is binary": lambda d: replace(d / "model_index.json", b"\xff\xfe\0"),
    "index is a list": lambda d: replace(d / "model_index.json", b"[]"),
    "index is gone": lambda d: (d / "model_index.json").unlink(),
    "class is unknown": lambda d: edit(d / "model_index.json", _class_name="Nope"),
    "class is not a pipeline": lambda d: edit(d / "model_index.json", _class_name="UNet2DModel"),
    "class is missing": lambda d: edit(d / "model_index.json", _class_name=None),
    "no denoiser": lambda d: shutil.rmtree(d / "unet"),
    "no text encoder": lambda d: shutil.rmtree(d / "text_encoder"),
    "no tokenizer": lambda d: shutil.rmtree(d / "tokenizer"),
    "no VAE": lambda d: shutil.rmtree(d / "vae"),
    "no scheduler": lambda d: shutil.rmtree(d / "scheduler"),
    "VAE is null": lambda d: edit(d / "model_index.json", vae=[None, None]),
    "no weights": lambda d: (d / "unet/diffusion_pytorch_model.safetensors").unlink(),
    "weights are torn": lambda d: replace(d / "unet/diffusion_pytorch_model.safetensors", (
        ROOT / "sd15/unet/diffusion_pytorch_model.safetensors").read_bytes()[:100000]),
    "weights are empty": lambda d: replace(d / "unet/diffusion_pytorch_model.safetensors", b""),
    "weights of another size": lambda d: edit(d / "unet/config.json", cross_attention_dim=48),
    "denoiser of another pipeline": lambda d: shutil.rmtree(d / "unet") or shutil.copytree(
        ROOT / "sdxl/unet", d / "unet"),
    "config is torn": lambda d: replace(d / "unet/config.json", b'{"_class_name": "UNet2DCon'),
    "beta schedule is unknown": lambda d: edit(d / "scheduler/scheduler_config.json", beta_schedule="nope"),
    "prediction is unknown": lambda d: edit(d / "scheduler/scheduler_config.json", prediction_type="nope"),
    "hostile code": hostile_code, "hostile weights": hostile_weights}


@pytest.mark.parametrize("damage", MODELS)
def test_what_is_not_a_pipeline_is_refused(capfd, damage):
    """A directory of which a part is missing, damaged or hostile is refused like a bad flag; none of it is executed."""
    model = AREA / "bad/model"
    shutil.rmtree(model, ignore_errors=True)
    MODELS[damage](shutil.copytree(ROOT / "sd15", model, copy_function=os.link))
    refused(capfd, argv(model=model), f"--model {model}")


# ---- Damaged runs ----------------------------------------------------------------------------------------------------
def broken(change):
    """A damage to all checkpoints of a run: what they hold, changed."""
    def damage(run):
        for file in run.glob("checkpoint*.pt"):
            state = torch.load(file, weights_only=True)
            torch.save(change(state) or state, file)
    return damage


def bytes_of(change):
    """A damage to all checkpoints of a run: their bytes, changed."""
    return lambda run: [file.write_bytes(change(file.read_bytes())) for file in run.glob("checkpoint*.pt")]


def adapters(f):
    """All tensors of the adapters, changed."""
    return broken(lambda state: state.update(lora=nft.map_tensors(f, state["lora"])))


def config(**changes):
    """Entries of config.json, changed."""
    return lambda run: edit(run / "config.json", **changes)


RUNS = {
    "checkpoint is torn": bytes_of(lambda x: x[:len(x) // 2]),
    "checkpoint lacks its end": bytes_of(lambda x: x[:-1]),
    "checkpoint is empty": bytes_of(lambda x: b""),
    "checkpoint is text": bytes_of(lambda x: b"not a checkpoint\n"),
    "checkpoint has a wrong bit": bytes_of(lambda x: bytes(b ^ (i == len(x) // 2) for i, b in enumerate(x))),
    "checkpoint is hostile": broken(lambda state: Hostile()),
    "checkpoint is hostile inside": broken(lambda state: state.update(scaler=Hostile())),
    "checkpoint is a hostile pickle": bytes_of(lambda x: pickle.dumps(Hostile())),
    "checkpoint is a list": broken(lambda state: [state]),
    "checkpoint is a state dict": broken(lambda state: {"unet.conv_in.weight": torch.zeros(3)}),
    "checkpoint is another program's": broken(lambda state: {"epoch": 3, "model": state["lora"], "optimizer": {}}),
    "adapters of another rank": adapters(lambda x: torch.zeros([2 * n if n == 2 else n for n in x.shape])),
    "adapters are transposed": adapters(lambda x: x.T.contiguous()),
    "adapters are scalars": adapters(lambda x: x.sum()),
    "adapters are single numbers": adapters(lambda x: x.sum().view(1, 1)),
    "adapters have an axis more": adapters(lambda x: x[None]),
    "adapters are complex": adapters(lambda x: x * 1j),
    "adapters lack a layer": broken(lambda s: s.update(lora={k: v[2:] for k, v in s["lora"].items()})),
    "adapters have a layer more": broken(lambda s: s.update(lora={k: v + v[:2] for k, v in s["lora"].items()})),
    "adapters lack a set": broken(lambda s: s["lora"].pop("old") and None),
    "adapters have a set more": broken(lambda s: s["lora"].update(other=s["lora"]["old"])),
    "adapters have other names": broken(lambda s: s.update(lora=dict(zip("abc", s["lora"].values())))),
    "adapters are null": broken(lambda s: s.update(lora=None)),
    "no adapters": broken(lambda s: s.pop("lora") and None),
    "no optimizer": broken(lambda s: s.pop("optimizer") and None),
    "optimizer is empty": broken(lambda s: s.update(optimizer={})),
    "rows are no dicts": broken(lambda s: s.update(rows=[1, 2, 3])),
    "rows lack an iteration": broken(lambda s: s["rows"].pop(0) and None),
    "config is empty": lambda run: (run / "config.json").write_text(""),
    "config is torn": lambda run: (run / "config.json").write_text((run / "config.json").read_text()[:99]),
    "config is binary": lambda run: (run / "config.json").write_bytes(b"\x89PNG\xff\0"),
    "config is a list": lambda run: (run / "config.json").write_text("[]"),
    "config is a number": lambda run: (run / "config.json").write_text("3"),
    "config is a folder": lambda run: (run / "config.json").unlink() or (run / "config.json").mkdir(),
    "config is gone": lambda run: (run / "config.json").unlink(),
    "config has an unknown key": config(nonsense=1),
    "config has text for a number": config(lr="fast"),
    "config has a float for an integer": config(groups=2.5),
    "config has a list for a number": config(save_every=[2]),
    "config has a number for a path": config(prompts=5),
    "config has a list for text": config(solver=["dpm2"]),
    "config has nan": config(beta=float("nan")),
    "config has an unknown choice": config(precision="fp8"),
    "config is out of range": config(group_size=-1),
    "config names prompts that are gone": config(prompts="gone.txt"),
    "config names another model": config(model=str(ROOT / "sdxl"))}


@pytest.mark.parametrize("damage", RUNS)
def test_damaged_run_is_refused(capfd, damage):
    """--resume of a run that is damaged, foreign or hostile is refused in one line; it is not executed, nor changed."""
    run = AREA / "bad/run"
    shutil.rmtree(run, ignore_errors=True)
    RUNS[damage](shutil.copytree(AREA / "run", run))
    refused(capfd, ["--resume", "--out", str(run), "--iterations", "3"], f"({run}|gone.txt|--[a-z]+-?[a-z]+ \\S)")


@pytest.mark.parametrize("flags, says", [
    ("--lr 0.5", "--lr 0.5: .*0.01"), ("--groups 3", "--groups 3: .* 2"), ("--seed 1", "--seed 1: .* 0"),
    ("--model tiny", "--model tiny: .*sd15"), ("--reward jpeg", "--reward jpeg: .*red"),
    ("--updates 1", "--updates 1: .* 2"), ("--prompts bom.txt", "--prompts bom.txt: .*p.txt"),
    ("--precision fp32", "--precision fp32: .*auto"), ("--eta 0.1", "--eta 0.1: .*0,0.001,0.5"),
    ("--iterations 1", "--iterations 1.* 2"), ("--iterations 0", "--iterations 0"),
    ("--device tpu", "--device tpu"), ("--batch-size 0", "--batch-size 0"), ("--nonsense 1", "--nonsense")])
def test_a_resumed_run_keeps_its_settings(capfd, flags, says):
    """A flag that would change the run is refused with the new and the old value; so are fewer iterations than done."""
    refused(capfd, ["--resume", "--out", str(AREA / "run"), *flags.split()], says)


@pytest.mark.parametrize("which", ["prompts", "eval_prompts"])
def test_changed_prompts_are_refused(capfd, which):
    """A prompts file that has changed since the run began is named, and the run does not go on with it."""
    shutil.rmtree(AREA / "bad/run", ignore_errors=True)
    (AREA / "bad/own.txt").write_text("a red circle\na blue square\n")
    assert nft.main(argv(out=AREA / "bad/run", **{which: AREA / "bad/own.txt"})) == 0
    (AREA / "bad/own.txt").write_text("a red circle\na blue cross\n")
    refused(capfd, ["--resume", "--out", str(AREA / "bad/run"), "--iterations", "3"], f"{AREA}/bad/own.txt")


# ---- What fails later, and what works --------------------------------------------------------------------------------
@pytest.mark.parametrize("reward, says", [
    ("none", "none"), ("empty", r"empty: .*\[0\] for"), ("long", r"long: .*\[\d\] for"), ("matrix", "matrix"),
    ("scalar", "scalar"), ("strings", "strings"), ("table", "table"), ("infinite", "infinite: .*image 0.*a red circle"),
    ("huge=1e9", "huge"), ("exits", "exits: .*SystemExit"), ("raises", "raises: .*ZeroDivisionError"),
    ("no_arguments", "no_arguments"), ("recursive", "recursive: .*RecursionError")])
def test_bad_rewards_are_refused(capfd, reward, says):
    """Rewards are tried before anything is written: one that fails, or gives no finite number an image, is refused."""
    refused(capfd, argv(reward=f"rewards.py:{reward}"), f"reward rewards:{says}")


def test_the_directory_may_vanish(capfd, tmp_path, monkeypatch):
    """When the run directory is removed under it, a run ends with status 1 and one line that names what is missing."""
    monkeypatch.setenv("NFT_TEST_GONE", str(tmp_path / "run"))
    assert nft.main(argv(out=tmp_path / "run", reward="rewards.py:gone", iterations=9)) == 1
    line, = said(capfd)
    assert re.search(rf"^nft\.py: .*{tmp_path}/run", line), line


def test_links_are_followed(tmp_path):
    """DIR and all files that flags name may be links; a run goes on through another link to it."""
    for link, to in (("out", "real"), ("again", "out"), ("p.txt", AREA / "p.txt"), ("model", ROOT / "sd15")):
        (tmp_path / link).symlink_to(to)
    (tmp_path / "real").mkdir()
    assert nft.main(argv(out=tmp_path / "out", model=tmp_path / "model", prompts=tmp_path / "p.txt")) == 0
    assert nft.main(["--resume", "--out", f"{tmp_path}/again", "--iterations", "3"]) == 0
    assert len(kill_test.logged(tmp_path / "real")) == 4 and (tmp_path / "out").is_symlink()


@pytest.mark.parametrize("text", [
    "a red circle\n" * 30000, "a red circle " * 3000, "\ufeffa red circle\r\n\r\n \u2028",
    "{\n%s\n\\\n--lr\n\u202e\U0001f600 \u0301\n\0\n" + "x" * 9999], ids=["many", "long", "windows", "odd"])
def test_odd_prompts_work(tmp_path, text):
    """Prompts may be many, long, without words, of any characters of Unicode."""
    (tmp_path / "odd.txt").write_text(text, "utf-8")
    flags = dict(prompts=tmp_path / "odd.txt", eval_prompts=AREA / "p.txt", iterations=1)
    assert nft.main(argv(out=tmp_path / "run", **flags)) == 0


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_long_prompts_are_cut_with_one_warning(capfd, tmp_path, name):
    """Prompts beyond the tokenizer's limit are cut; one line for all of them says so, and names one."""
    (tmp_path / "long.txt").write_text("".join(f"{n} red circles " * 40 + "\n" for n in range(9)))
    own = dict(model=ROOT / name, max_sequence_length=2 if name == "sd3" else None)
    told = dict(prompts=tmp_path / "long.txt", eval_prompts=tmp_path / "long.txt")
    assert nft.main(argv(out=tmp_path / "run", **own, **told)) == 0
    told = capfd.readouterr()
    assert len(re.findall(r"(?m)^.*\b(?:truncated|cut)\b.*red circles.*$", told.out + told.err)) == 1
    assert nft.main(argv(out=tmp_path / "short", **own)) == 0
    told = capfd.readouterr()
    assert not re.search(r"\b(truncated|cut)\b", told.out + told.err)


# ---- Nothing lost ----------------------------------------------------------------------------------------------------
@functools.cache
def undisturbed(iterations):
    """The directory of a run with a checkpoint every iteration that nobody disturbed."""
    out = AREA / f"undisturbed{iterations}"
    assert nft.main(argv(out=out, iterations=iterations)) == 0
    return out


def test_a_damaged_checkpoint_is_passed_over(capfd, tmp_path):
    """If the last checkpoint is damaged one line says so, and the run goes on from the one before, to the same end."""
    whole, out = undisturbed(3), shutil.copytree(AREA / "run", tmp_path / "run")
    (out / "checkpoint.pt").write_bytes((out / "checkpoint.pt").read_bytes()[:1000])
    capfd.readouterr()
    assert nft.main(["--resume", "--out", str(out), "--iterations", "3"]) == 0
    line, = said(capfd)
    assert re.search("checkpoint.pt", line) and not kill_test.differences(whole, out)


class Killed(BaseException):
    """As kill -9: nothing in nft.py catches it."""


@pytest.mark.parametrize("damaged", [False, True])
def test_a_whole_checkpoint_at_every_moment(tmp_path, monkeypatch, damaged):
    """A kill before any rename leaves a whole checkpoint and leads to the same end, also where the last was damaged."""
    whole, real, n = undisturbed(3), os.replace, 0
    while True:
        out, left = shutil.copytree(AREA / "run", tmp_path / f"run{n}"), [n]
        if damaged:
            (out / "checkpoint.pt").write_bytes(b"torn")
        def killed(source, target, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            real(source, target)
        monkeypatch.setattr(nft.os, "replace", killed)
        resume = ["--resume", "--out", str(out), "--iterations", "3"]
        try:
            assert nft.main(resume) == 0
        except Killed:
            monkeypatch.setattr(nft.os, "replace", real)
            assert kill_test.saved(out) > 0 and nft.main(resume) == 0, n
            assert kill_test.differences(whole, out) == [], n
        else:
            break
        n += 1
    assert n > 4                    # settings, metrics, checkpoint, weights, pictures


def test_a_full_disk_harms_nothing(tmp_path):
    """Where a checkpoint can't be written the run ends with 1 and one line; the one before is whole and goes on."""
    size = {i: (undisturbed(1) / f"checkpoint{x}.pt").stat().st_size for i, x in ((1, ""), (0, "-before"))}
    limit, command = sum(size.values()) // 2, [sys.executable, HERE.parent / "nft.py"]
    def small_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    done = subprocess.run(command + argv(out=tmp_path / "run", iterations=3), capture_output=True, text=True,
                          preexec_fn=small_disk, env=os.environ | {"OMP_NUM_THREADS": "1"})
    line, = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode == 1 and re.search(r"^nft\.py: .*(too large|space|full).*--resume", line), done.stderr
    assert kill_test.saved(tmp_path / "run") == 0 and size[0] < limit < size[1]
    done = subprocess.run([*command, "--resume", "--out", tmp_path / "run"], env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and kill_test.differences(undisturbed(3), tmp_path / "run") == []


def test_no_space_left(capfd, tmp_path):
    """No space left on the device: status 1, one line that says so, and what was saved before is whole."""
    out = shutil.copytree(AREA / "run", tmp_path / "run")
    (out / "checkpoint.pt.tmp").symlink_to("/dev/full")
    capfd.readouterr()
    assert nft.main(["--resume", "--out", str(out), "--iterations", "4"]) == 1
    line, = said(capfd)
    assert re.search(r"^nft\.py: .*No space left.*--resume", line) and kill_test.saved(out) >= 2
    (out / "checkpoint.pt.tmp").unlink(missing_ok=True)
    assert nft.main(["--resume", "--out", str(out)]) == 0 and not kill_test.differences(undisturbed(4), out)


def test_three_kills(tmp_path, monkeypatch):
    """Killed three times with kill -9 at random moments and resumed, a run ends as if nothing had happened."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    flags, out = argv(out=None, iterations=16), tmp_path / "killed"
    with open(tmp_path / "log.txt", "ab") as log:
        pace = kill_test.undisturbed(flags, tmp_path / "whole", log)
        hits = kill_test.disturbed(flags, out, log, 3, 16, pace, random.Random(0))
    assert hits.total() == 3 and kill_test.differences(tmp_path / "whole", out) == []


# ---- Any input at all ------------------------------------------------------------------------------------------------
FUZZ = settings(max_examples=150, derandomize=True, deadline=None, database=None,
                suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8), max_leaves=6, extend=lambda x:
    st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=4) | st.just("prompt"), x, max_size=3))


@FUZZ
@given(st.lists(st.tuples(st.floats(-1e300, 1e300) | st.floats(-1, 1, width=32) | st.sampled_from([0.0, 1.0]),
                          st.integers(-2 ** 63, 2 ** 63 - 1) | st.integers(0, 2)), min_size=1, max_size=12),
       st.floats(1e-9, 1e9), st.randoms(use_true_random=False))
def test_any_rewards(pairs, z, rng):
    """r lies in [0, 1], averages 1/2 in a group where nothing is clipped, rises with the reward, knows no order."""
    raw, groups = map(list, zip(*pairs))
    r = nft.optimality_reward(raw, groups, z)
    assert r.shape == (len(raw),) and r.dtype == torch.float32 and ((0 <= r) & (r <= 1)).all()
    double, order = torch.tensor(raw, dtype=torch.float64), rng.sample(range(len(raw)), len(raw))
    rounding = 1e-6 + 1e-15 * len(raw) * double.abs().max() / (z * (double.std(correction=0) + 1e-4))
    again = nft.optimality_reward(double[order], torch.tensor(groups)[order], z)
    assert ((again - r[order]).abs() <= rounding).all()
    for group in {*groups}:
        of = [i for i, g in enumerate(groups) if g == group]
        if ((0 < r[of]) & (r[of] < 1)).all():
            assert abs(r[of].double().mean() - 0.5) <= rounding
        assert all(r[i] <= r[j] for i in of for j in of if raw[i] <= raw[j])


@FUZZ
@given(st.floats(width=32, allow_nan=False, allow_infinity=False), st.integers(1, 50))
def test_equal_rewards_teach_nothing(value, n):
    """However many images have the same reward, whatever it is: r is 1/2, exactly."""
    assert (nft.optimality_reward([value] * n, [7] * n) == 0.5).all()


@FUZZ
@given(st.integers(1, 4), st.integers(1, 5), st.floats(1e-3, 10), st.floats(0, 1), st.data())
def test_any_loss(B, n, beta, r, data):
    """Finite and not negative where samples are finite and r in [0, 1]; (r L+ + (1 - r) L-) / beta, affine in r."""
    numbers = st.lists(st.floats(-1e12, 1e12), min_size=B * n, max_size=B * n)
    theta, old, x_0 = (torch.tensor(data.draw(numbers)).double().view(B, n) for _ in range(3))
    def loss(r):
        return nft.nft_loss(theta, old, x_0, torch.full((B,), r, dtype=torch.float64), beta)
    def branch(x):
        error = x - x_0
        return (error ** 2).mean(1) / error.abs().mean(1).clamp_min(1e-5) / beta
    positive, negative = branch((1 - beta) * old + beta * theta), branch((1 + beta) * old - beta * theta)
    value = loss(r)
    assert value.shape == (B,) and value.isfinite().all() and (value >= 0).all()
    torch.testing.assert_close(value, r * positive + (1 - r) * negative, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(value, r * loss(1.0) + (1 - r) * loss(0.0), rtol=1e-9, atol=1e-9)


@FUZZ
@given(st.text("0123456789.,-e") | st.text() | st.floats() | st.lists(st.floats(), min_size=3, max_size=3) |
       st.tuples(st.integers(-9, 99) | st.floats(), st.sampled_from([-1, -0.01, 0.001, 1]), st.floats(0, 1)))
def test_any_eta(schedule):
    """eta lies in [0, 1] and never falls, or the schedule is refused with ValueError."""
    schedule = ",".join(map(str, schedule)) if isinstance(schedule, (list, tuple)) else schedule
    try:
        etas = [nft.soft_update_decay(i, schedule) for i in (1, 2, 3, 10, 99, 1000, 10 ** 6)]
    except ValueError:
        return
    assert all(0 <= a <= b <= 1 for a, b in zip(etas, etas[1:]))


@FUZZ
@given(st.sampled_from(["txt", "jsonl"]), st.binary() | st.text().map(str.encode) | st.lists(
    JSON.map(json.dumps) | st.dictionaries(st.just("prompt"), st.text() | JSON, min_size=1).map(json.dumps)).map(
        lambda lines: "\n".join(lines).encode()), st.sampled_from([b"", b"\xef\xbb\xbf"]))
def test_any_prompts_file(tmp_path, kind, content, mark):
    """Any file gives prompts that are text, not empty, stripped, and encodable, with a dict each, or is refused."""
    content = mark + content
    (tmp_path / f"any.{kind}").write_bytes(content)
    try:
        prompts = nft.load_prompts(f"{tmp_path}/any.{kind}")
    except nft.Failure as e:
        assert f"any.{kind}" in str(e)
        return
    assert prompts
    for prompt, metadata in prompts:
        assert isinstance(metadata, dict) and prompt.encode() and prompt == prompt.strip()
    if kind == "txt":
        assert [prompt for prompt, _ in prompts] == [s.strip() for s in re.split(
            "\r\n|\n|\r", content.decode("utf-8-sig")) if s.strip()]


@FUZZ
@given(st.text(max_size=12) | st.lists(st.sampled_from(["jpeg", "incompressible", "rewards.py", ":", ":red", "=", ",",
                                                       "1", "0.5", "-", "nan", "1e999", " ", "\0", "/"])).map("".join))
def test_any_reward(spec):
    """Any --reward gives (name, finite weight, function) for each of its parts, or is refused."""
    try:
        rewards = nft.load_rewards(spec)
    except nft.Failure as e:
        assert str(e).startswith("--reward")
        return
    assert len(rewards) == len([part for part in spec.split(",") if part.strip()])
    assert all(isinstance(name, str) and math.isfinite(weight) and callable(call) for name, weight, call in rewards)


def well_typed(config):
    """Is every setting of its type and in its range?"""
    return all(isinstance(value := getattr(config, f.name), (float, int) if f.type is float else f.type) and
               (f.metadata["low"] is None or f.metadata["low"] <= value < f.metadata["high"]) and
               (f.metadata["choices"] is None or value in f.metadata["choices"]) for f in dataclasses.fields(config))


FLAGS = ["--" + f.name.replace("_", "-") for f in dataclasses.fields(nft.Config)]
VALUES = st.sampled_from(["0", "-1", "inf"]) | st.text(max_size=5) | st.integers().map(str) | st.floats().map(str)
WORDS = st.tuples(st.sampled_from(FLAGS), VALUES).map("=".join) | st.sampled_from([*FLAGS, "-h", "--", "run"]) | VALUES


@FUZZ
@given(st.lists(WORDS, max_size=6))
def test_any_command_line(words):
    """Any command line gives settings of their types and in their ranges, or is refused; -h ends with 0."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            config = nft.parse(words)
    except nft.Failure as e:
        assert ";" in str(e)
    except SystemExit as e:
        assert e.code == 0 and {"-h", "--help"} & {*words}
    else:
        assert well_typed(config)


@FUZZ
@given(JSON | st.dictionaries(st.sampled_from([f.name for f in dataclasses.fields(nft.Config)]), JSON, max_size=3))
def test_any_settings_of_a_run(tmp_path, settings):
    """Any config.json of a run that is to go on gives settings of their types and in their ranges, or is refused."""
    (tmp_path / "config.json").write_text(json.dumps(settings))
    try:
        config = nft.parse(["--resume", "--out", str(tmp_path)])
    except nft.Failure as e:
        assert ";" in str(e)
    else:
        assert well_typed(config)
