"""Several processes of torchrun do the work of one, here on CPUs (gloo).

    torchrun --standalone --nproc_per_node=N nft.py ...

Each test's docstring states a law.
SPDX-License-Identifier: MIT
"""

import os
import re
import subprocess
import sys
import time

import common
import pytest
from torch.testing import assert_close

import nft

# With two processes the second one fails in the third iteration, or dies at once.
REWARDS = """
import os
import time
from pathlib import Path

TWO = os.environ.get("WORLD_SIZE") == "2" and os.environ.get("RANK") == "1"
calls = []


def red(images, prompts, metadata):
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


def note_the_time():
    Path(__file__).with_name("ended").write_text(str(time.time()))


def fails(images, prompts, metadata):
    calls.append(1)
    # Before: the trial, held-out prompts, two iterations of eight images, held-out prompts.
    if TWO and len(calls) == 1 + 1 + 3 + 3 + 1 + 1:
        note_the_time()
        return [float("nan")] * len(prompts)
    return red(images, prompts, metadata)


def dies(images, prompts, metadata):
    if TWO:
        note_the_time()
        os._exit(9)
    return red(images, prompts, metadata)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A directory for runs, with the rewards and the held-out prompts."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "rewards.py").write_text(REWARDS)
    (folder / "held_out.txt").write_text("\n".join([*common.TEXTS, "a cat", "a dog"]))
    return folder


def small(folder, out, **changes):
    """The command line of a run whose 15 images and 5 prompts neither 2 nor 4 processes divide."""
    settings = {
        "out": folder / out,
        "reward": f"{folder}/rewards.py:fails",
        "eval_prompts": folder / "held_out.txt",
        "iterations": 3,
        "groups": 3,
        "group_size": 5,
        "batch_size": 3,
    }
    return common.command_line("sd15", **(settings | changes))


def launch(processes, words):
    """nft.py by torchrun in so many processes; returns what subprocess.run does."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.run(
        [sys.executable, *torchrun, str(common.REPOSITORY / "nft.py"), *words],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )


@pytest.fixture(scope="module")
def alone(folder):
    """The rows and the adapters of one process."""
    assert nft.main(small(folder, "alone")) == 0
    rows = common.metrics(folder / "alone", "seconds")
    assert rows[-1]["kl"] > 1e-6
    assert rows[-1]["grad_norm"] > 0
    return rows, common.checkpoint(folder / "alone")["lora"]


@pytest.fixture(scope="module")
def failed(folder):
    """How a run of two processes ended, of which one failed in the third iteration."""
    return launch(2, small(folder, "two"))


def assert_same_rows(rows, expected):
    for row, other in zip(rows, expected, strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-6)


def assert_ended_soon(folder, done):
    """All processes ended within a minute of the moment when one did."""
    ended = float((folder / "ended").read_text())
    assert time.time() - ended < 60
    assert done.returncode != 0


def test_four_processes_do_the_work_of_one(folder, alone):
    """Metrics and adapters are those of one process; the first process alone prints."""
    done = launch(4, small(folder, "four"))
    assert done.returncode == 0, done.stderr
    # Three evaluations, and the closing line.
    assert done.stdout.count("held-out reward") == 4
    rows, adapters = alone
    assert_same_rows(common.metrics(folder / "four", "seconds"), rows)
    assert_close(common.checkpoint(folder / "four")["lora"], adapters, rtol=0, atol=1e-4)


def test_one_that_fails_ends_all(folder, failed):
    """Where one process fails, all end within a minute; what it said is shown."""
    assert_ended_soon(folder, failed)
    message = "process 1: iteration 3: reward rewards:fails: .*nan.*iteration 2 is saved"
    assert re.search(message, failed.stderr), failed.stderr


def test_two_processes_do_the_work_of_one(folder, failed, alone):
    """Two iterations of two processes and a third by one are three of one process."""
    rows, adapters = alone
    assert_same_rows(common.metrics(folder / "two", "seconds"), rows[:3])
    assert nft.main(small(folder, "two", resume=True)) == 0
    assert_same_rows(common.metrics(folder / "two", "seconds"), rows)
    assert_close(common.checkpoint(folder / "two")["lora"], adapters, rtol=0, atol=1e-4)


def test_one_that_dies_ends_all(folder):
    """Where one process dies, all end within a minute; torchrun tells which one it was."""
    done = launch(2, small(folder, "dies", reward=f"{folder}/rewards.py:dies"))
    assert_ended_soon(folder, done)
    assert re.search("exitcode *: 9", done.stderr), done.stderr


@pytest.mark.parametrize(
    "changes, message",
    (
        ({"groups": 1, "group_size": 5}, "images"),
        ({"eval_prompts": common.ROOT / "train.txt"}, "--eval-prompts"),
    ),
)
def test_every_process_has_work(tmp_path, monkeypatch, changes, message):
    """Fewer images or held-out prompts than processes are refused, and nothing is written."""
    monkeypatch.setattr(nft, "WORLD", 6)
    out = tmp_path / "run"
    with pytest.raises(nft.UserError, match=message):
        nft.train(nft.configure(out=out, **common.settings("sd15", **changes)))
    assert not out.exists()
