"""A run that is killed, or finds no room on the disk, goes on as if nothing had happened.

Also here: what a run must take as it comes, such as links and odd prompts, and what it must leave
behind where it fails.

    python -m pytest examples/tests/test_nothing_lost.py

SPDX-License-Identifier: MIT
"""

import contextlib
import functools
import os
import random
import re
import resource
import shutil
import subprocess
import sys

import common
import faults
import kill_test
import pytest
import torch

import nft

# A reward in whose third call somebody removes the run's directory.
GONE = """
import os
import shutil

calls = []


def gone(images, prompts, metadata):
    calls.append(len(images))
    if len(calls) == 3:
        shutil.rmtree(os.environ["NFT_TEST_GONE"])
    return images.mean((1, 2, 3))
"""
ODD_PROMPTS = {
    "many": "a red circle\n" * 30000,
    "odd": "\ufeffa red circle\r\n\r\n \u2028{\n%s\n\\\n--lr\n\u202e\U0001f600 \u0301\n\0\n"
    + "x" * 9999,
}
# Smaller still than the other tests' runs.
SMALL = {"group_size": 2, "steps": 2}


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """One thread, in this process and in those that it starts: runs are compared bit for bit."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with faults.one_thread():
        faults.area()
        yield


@functools.cache
def undisturbed(iterations):
    """The directory of a run that nobody disturbed."""
    out = faults.AREA / f"undisturbed{iterations}"
    return common.run("sd15", out, iterations=iterations, **SMALL)


def copy_of_undisturbed(iterations, to):
    """A copy of such a run, which a test may go on with."""
    return shutil.copytree(undisturbed(iterations), to)


def goes_on(out, iterations):
    """A run is resumed, and ends as an undisturbed one of so many iterations."""
    assert nft.main(faults.resume(out, iterations=iterations)) == 0
    assert kill_test.differences(undisturbed(iterations), out) == []


# ---- Kills -------------------------------------------------------------------------------------
class Killed(BaseException):
    """As kill -9: nothing in nft.py catches it."""


class Renames:
    """os.replace, until the process is killed just before a rename."""

    def __init__(self, before_the_kill):
        self.left = before_the_kill
        self.replace = os.replace

    def __call__(self, source, target):
        if self.left == 0:
            raise Killed
        self.left -= 1
        self.replace(source, target)


def killed_at_rename(n, words, monkeypatch):
    """Run a command line that is killed before its rename number n: was there one?"""
    with monkeypatch.context() as patches:
        patches.setattr(os, "replace", Renames(n))
        try:
            assert nft.main(words) == 0
        except Killed:
            return True
    return False


@pytest.mark.parametrize("n", range(6))
def test_kill_before_the_first_checkpoint(tmp_path, monkeypatch, n):
    """A kill before the first renames leads to the same end: settings, card, pictures, metrics,
    weights, checkpoint.
    """
    out = tmp_path / "run"
    words = common.command_line("sd15", out=out, iterations=1, **SMALL)
    assert killed_at_rename(n, words, monkeypatch)
    assert kill_test.saved(out) == -1
    if n > 0:
        goes_on(out, 1)
    else:
        # Nothing is there: the run begins once more.
        assert nft.main(words) == 0


def test_parts_are_not_forgotten(tmp_path):
    """A run of other parts is gone on with by a call that takes them, not by the command line."""
    broken = [True]

    def losses(*args):
        if broken:
            raise KeyError("lost")
        return [0 * term for term in nft.pair_losses(*args)]

    config = nft.configure(**common.settings("sd15", out=tmp_path / "run", iterations=1))
    with pytest.raises(nft.UserError) as failure:
        nft.train(config, losses=losses)
    told = re.search(r"nft\.train of (nft\.configure\(.*\)) with the same", str(failure.value))
    broken.clear()
    nft.train(eval(told[1]), losses=losses)
    # The loss of the part is 0, so that theta has not moved.
    assert not any(B.any() for B in common.checkpoint(tmp_path / "run")["lora"]["theta"][1::2])


@pytest.mark.parametrize("n", range(8))
def test_kill_of_a_resumed_run(tmp_path, monkeypatch, n):
    """A kill before any rename leaves a whole checkpoint, and leads to the same end.

    They are of settings, card, pictures, pictures before and after, metrics, weights, checkpoint.
    """
    out = copy_of_undisturbed(2, tmp_path / "run")
    killed = killed_at_rename(n, faults.resume(out, iterations=3), monkeypatch)
    assert killed == (n < 7)
    assert kill_test.saved(out) == (2 if n < 7 else 3)
    goes_on(out, 3)


def test_a_killed_run_may_end_where_it_is(tmp_path, monkeypatch):
    """--iterations may be what is done, also where nothing was evaluated there."""
    out = copy_of_undisturbed(2, tmp_path / "run")
    # Settings, card; metrics, weights and checkpoint of iteration 3; pictures of iteration 4.
    assert killed_at_rename(5, faults.resume(out, iterations=4), monkeypatch)
    assert kill_test.saved(out) == 3
    assert nft.main(faults.resume(out, iterations=3)) == 0
    assert (out / "before_after.png").exists()


def test_three_kills(tmp_path):
    """Killed three times with kill -9 at random moments, a run ends as if nothing had happened."""
    flags = common.command_line("sd15", iterations=16, **SMALL)
    whole = tmp_path / "whole"
    killed = tmp_path / "killed"
    with open(tmp_path / "log.txt", "ab") as log:
        pace = kill_test.undisturbed(flags, whole, log)
        hits = kill_test.disturbed(flags, killed, log, 3, 16, pace, random.Random(0))
    assert hits.total() == 3
    assert kill_test.differences(whole, killed) == []


# ---- Disks -------------------------------------------------------------------------------------
@contextlib.contextmanager
def files_limited_to(size):
    """No file may grow beyond so many bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk(capfd, tmp_path):
    """Where a checkpoint can't be written the run ends with 1, and the one before is whole."""
    out = tmp_path / "run"
    # The first checkpoint has three adapters; with AdamW's two moments of theta it has five.
    limit = (undisturbed(1) / "checkpoint.pt").stat().st_size * 4 // 5
    with files_limited_to(limit):
        words = common.command_line("sd15", out=out, iterations=1, **SMALL)
        says = ["too large", "iteration 0 is saved", f"{out} --resume"]
        faults.fails(capfd, words, 1, *says)
    assert kill_test.saved(out) == 0
    goes_on(out, 1)


def test_no_space_left(capfd, tmp_path):
    """No space left on the device: status 1, and what was saved before is whole."""
    out = copy_of_undisturbed(2, tmp_path / "run")
    (out / "checkpoint.pt.tmp").symlink_to("/dev/full")
    says = ["No space left", "iteration 2 is saved", f"{out} --resume"]
    faults.fails(capfd, faults.resume(out, iterations=3), 1, *says)
    assert kill_test.saved(out) == 2
    (out / "checkpoint.pt.tmp").unlink()
    goes_on(out, 3)


def test_vanishing_directory(capfd, tmp_path, monkeypatch):
    """When its directory is removed under it, a run ends with status 1 and says what is missing."""
    out = tmp_path / "run"
    monkeypatch.setenv("NFT_TEST_GONE", str(out))
    (tmp_path / "gone.py").write_text(GONE)
    reward = f"{tmp_path}/gone.py:gone"
    words = common.command_line("sd15", out=out, reward=reward, iterations=9, **SMALL)
    faults.fails(capfd, words, 1, f"{out}/")
    assert not out.exists()


# ---- What a run takes as it comes --------------------------------------------------------------
def test_links(tmp_path):
    """DIR and all files that flags name may be links; a run goes on through another one to it."""
    links = {
        "out": tmp_path / "real",
        "again": tmp_path / "out",
        "prompts": common.root() / "train.txt",
        "model": common.root() / "sd15",
    }
    (tmp_path / "real").mkdir()
    for name, target in links.items():
        (tmp_path / name).symlink_to(target)
    changes = SMALL | {"prompts": tmp_path / "prompts", "max_sequence_length": None}
    common.run(tmp_path / "model", tmp_path / "out", **changes)
    assert nft.main(faults.resume(tmp_path / "again", iterations=3)) == 0
    assert len(kill_test.logged(tmp_path / "real")) == 4
    assert (tmp_path / "out").is_symlink()


@pytest.mark.parametrize("text", ODD_PROMPTS.values(), ids=ODD_PROMPTS.keys())
def test_odd_prompts(tmp_path, text):
    """Prompts may be many, long, without words, and of any characters."""
    file = tmp_path / "odd.txt"
    file.write_text(text, "utf-8")
    common.run("sd15", tmp_path / "run", prompts=file, iterations=1, **SMALL)


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_long_prompts(tmp_path, name):
    """Prompts beyond the tokenizer's limit are cut, which is said once: it fills no screen."""
    file = tmp_path / "long.txt"
    file.write_text("\n".join(f"{n} red circles " * 40 for n in range(9)))
    changes = {"prompts": file, "eval_prompts": file, "iterations": 1, **SMALL}
    words = common.command_line(name, out=tmp_path / "run", **changes)
    call = [sys.executable, common.REPOSITORY / "nft.py", *words]
    done = subprocess.run(call, capture_output=True, text=True, check=True)
    said = done.stdout.splitlines()
    cut = [line for line in said if line.startswith("9 of 9 prompts are cut")]
    # SD3 has two CLIPs and a T5.
    assert len(cut) == {"sd15": 1, "sd3": 3}[name]
    assert "truncated" not in done.stderr


# ---- What a failure leaves behind --------------------------------------------------------------
def test_a_failing_pipeline_is_left_as_it_was(monkeypatch):
    """Where a pipeline fails, its solver's `step` is its own again, and no adapter stays on."""
    model = common.new_model("sd15", filled=True)
    before = model.sample(common.TEXTS, common.SEEDS, "old")

    def fail(*args, **kwargs):
        raise OSError("broken")

    with monkeypatch.context() as patches:
        patches.setattr(model.pipe.vae, "decode", fail)
        with pytest.raises(OSError, match="broken"):
            model.sample(common.TEXTS, common.SEEDS, "old")
    assert "step" not in vars(model.pipe.scheduler)
    assert model.lora.active is None
    after = model.sample(common.TEXTS, common.SEEDS, "old")
    torch.testing.assert_close(after, before, rtol=0, atol=0)
