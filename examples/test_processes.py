"""Several processes do the work of one: `torchrun --standalone --nproc_per_node=N nft.py ...`, here on CPUs (gloo).

    pip install pytest; python -m pytest -q examples/test_processes.py

SPDX-License-Identifier: MIT
"""
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
import types

TEMP = tempfile.TemporaryDirectory()
ROOT = pathlib.Path(os.environ.setdefault("NFT_TEST_ROOT", TEMP.name))      # of all test files
os.environ.update(HF_HUB_CACHE=f"{ROOT}/hub", HF_HUB_OFFLINE="1")
HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import pytest  # noqa: E402
import torch  # noqa: E402
from torch.testing import assert_close  # noqa: E402

import nft  # noqa: E402
import untrained  # noqa: E402

REWARDS = '''
import os, pathlib, time
def red(images, prompts, metadata):
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))
calls = []
def end(batch, how):                    # in the second process, in the first iteration
    calls.append(1)
    if len(calls) < 4 or os.environ.get("RANK") != "1":
        return red(*batch)
    pathlib.Path(__file__).with_name("ended").write_text(str(time.time()))
    return how(batch)
dies = lambda *batch: end(batch, lambda _: os._exit(9))
fails = lambda *batch: end(batch, lambda _: [float("nan")] * len(batch[1]))
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rewards, prompts and the untrained pipelines."""
    if not (ROOT / "hub").exists():
        untrained.build(ROOT)
    folder = tmp_path_factory.mktemp("processes")
    (folder / "rewards.py").write_text(REWARDS)
    (folder / "prompts.txt").write_text("a red circle\ntwo blue squares\na green cross\n")
    return folder


def run(folder, processes, out, reward="red", **flags):
    """A small run by so many processes, of 5 images a prompt: no number of processes divides them."""
    flags = dict(model=ROOT / "sd15", reward=f"{folder}/rewards.py:{reward}", prompts=folder / "prompts.txt",
                 eval_prompts=folder / "prompts.txt", out=folder / out, device="cpu", iterations=3, groups=3,
                 group_size=5, batch_size=2, updates=2, steps=3, rank=4, resolution=32, eval_every=2, kl=0.5, eta=0.3,
                 lr=0.01, beta=0.7) | flags
    argv = [x for k, v in flags.items() for x in ("--" + k.replace("_", "-"), str(v)) if x != "True"]
    if processes == 1:                                  # this one
        return types.SimpleNamespace(returncode=nft.main(argv), stderr="")
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.run([sys.executable, *launch, HERE.parent / "nft.py", *argv], capture_output=True, text=True,
                          timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})


def metrics(out):
    """Rows of metrics.jsonl without the time."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def adapters(out):
    """theta, old and ema of the checkpoint."""
    return torch.load(out / "checkpoint.pt", weights_only=True)["lora"]


def test_processes_make_no_difference(folder):
    """One, two and four give the same metrics and adapters from the same seed and global batch, but for rounding;
    so does one that goes on where two stopped. The first alone prints and writes."""
    done = run(folder, 1, "1")
    assert done.returncode == 0, done.stderr
    one = metrics(folder / "1")
    assert one[-1]["kl"] > 1e-6 and one[-1]["grad_norm"] > 0
    for n in (2, 4):
        done = run(folder, n, str(n))
        assert done.returncode == 0 and done.stdout.count("held-out reward") == 4, done.stderr
        for row, expected in zip(metrics(folder / str(n)), one, strict=True):
            assert row == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert_close(adapters(folder / str(n)), adapters(folder / "1"), rtol=0, atol=1e-4)
    assert run(folder, 2, "mixed", iterations=2).returncode == 0
    assert run(folder, 1, "mixed", resume=True).returncode == 0
    assert metrics(folder / "mixed")[-1] == pytest.approx(one[-1], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("reward, says", [("fails", "process 1: reward rewards:fails: .*nan for image"), ("dies", "")])
def test_one_ends_all(folder, reward, says):
    """A process that fails or dies ends the others within a minute, without a hang; what it said is to be read."""
    done = run(folder, 2, reward, reward)
    assert done.returncode != 0 and time.time() - float((folder / "ended").read_text()) < 60
    assert re.search(says, done.stderr), done.stderr
    assert "exitcode" in done.stderr                    # torchrun's own report of who it was
    if (folder / reward / "checkpoint.pt").exists():
        assert len(adapters(folder / reward)) == 3
