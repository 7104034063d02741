"""What a run survives and notices: kills, several processes, half precision, faults from reports.

Each test's docstring states a promise.
SPDX-License-Identifier: MIT
"""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types

import common
import pytest
import torch
from common import checkpoint, finished, metrics, new_model, root, run, settings, start, train
from torch.testing import assert_close

import nft


def red(images, prompts, metadata):
    """How much redder than green and blue each picture is."""
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


def equal(one, two):
    """Two checkpoints hold the same adapters, bit for bit."""
    for name, adapter in checkpoint(one)["lora"].items():
        for x, y in zip(adapter, checkpoint(two)["lora"][name], strict=True):
            assert torch.equal(x, y), name


# ---- Kill and resume -----------------------------------------------------------------------------
def test_kill_9_and_resume(tmp_path):
    """Killed at any moment, a run with --resume ends bit for bit as if nothing had happened."""
    words = common.command_line("sd15", out=tmp_path / "run", iterations=10**6)
    call = [sys.executable, common.REPOSITORY / "nft.py", *words]
    process = subprocess.Popen(call, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while process.poll() is None and not (tmp_path / "run/samples/000002.png").exists():
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    last = checkpoint(tmp_path / "run")["rows"][-1]["iteration"] + 2
    run("sd15", tmp_path / "run", iterations=last, resume=True)
    run("sd15", tmp_path / "whole", iterations=last)
    assert metrics(tmp_path / "run", "seconds") == metrics(tmp_path / "whole", "seconds")
    equal(tmp_path / "run", tmp_path / "whole")


def test_resume_needs_the_checkpoint_alone(tmp_path):
    """checkpoint.pt is all that --resume needs: settings, rows and adapters; no other flag."""
    shutil.copytree(finished("sd15"), tmp_path / "whole")
    (tmp_path / "moved").mkdir()
    shutil.copy(finished("sd15") / "checkpoint.pt", tmp_path / "moved")
    for out in ("whole", "moved"):
        assert nft.main(["--out", str(tmp_path / out), "--resume", "--iterations=4"]) == 0
    assert metrics(tmp_path / "moved", "seconds") == metrics(tmp_path / "whole", "seconds")
    equal(tmp_path / "moved", tmp_path / "whole")


def test_resume_begins_where_there_is_no_run(tmp_path):
    """So that a job that is queued again needs one command."""
    run("sd15", tmp_path / "run", resume=True)
    equal(tmp_path / "run", finished("sd15"))


def test_flags_given_win(tmp_path, capsys):
    """--lr takes effect in the optimizer and `images` accumulates; model and rank must stay."""
    out = shutil.copytree(finished("sd15"), tmp_path / "run")
    words = ["--out", str(out), "--resume", "--iterations=3", "--groups=1", "--lr=1e-9", "--ema=0"]
    assert nft.main(words) == 0
    assert metrics(out)[-1]["images"] == 12 + 3
    before = checkpoint(finished("sd15"))["lora"]["theta"]
    for x, y in zip(checkpoint(out)["lora"]["theta"], before, strict=True):
        assert_close(x, y, atol=1e-7, rtol=0)
    for word in ("--rank=5", f"--model={root()}/sd3"):
        assert nft.main([*words, word]) == 2
        assert "must stay" in capsys.readouterr().err


def test_settings_are_used_once(tmp_path):
    """The same settings once more would train nothing: the directory's run is kept, and named."""
    config = nft.configure(out=tmp_path / "run", **settings("sd15", iterations=1))
    nft.train(config)
    with pytest.raises(nft.UserError, match="holds a run"):
        nft.train(config)


def test_a_function_must_be_given_again(tmp_path):
    """A reward that is no text is in no checkpoint."""
    train("sd15", tmp_path / "run", reward=red, iterations=1)
    with pytest.raises(nft.UserError, match="function"):
        nft.configure(out=tmp_path / "run", resume=True)
    assert nft.configure(out=tmp_path / "run", resume=True, reward=red).reward is red


def test_a_path_with_spaces_can_be_pasted(tmp_path, capsys):
    """The advice after a failure quotes the directory."""
    out = tmp_path / "my run"
    (tmp_path / "bad.py").write_text("def reward(images, prompts, metadata):\n    return [0.0]\n")
    run("sd15", out, status=1, reward=f"{tmp_path}/bad.py:reward")
    assert f"--out '{out}' --resume" in capsys.readouterr().err


# ---- Several processes ---------------------------------------------------------------------------
def test_processes_do_the_work_of_one(tmp_path):
    """Two and four processes, which divide nothing evenly, agree with one within 1e-4."""
    (tmp_path / "p.txt").write_text("\n".join([*common.TEXTS, "a cat", "a dog"]))
    changes = {"groups": 3, "group_size": 5, "batch_size": 3, "eval_prompts": tmp_path / "p.txt"}
    # The default run's. AdamW turns the rounding of a gradient near 0 into a part of the rate.
    changes["lr"] = 2e-3
    run("sd15", tmp_path / "1", **changes)
    for n in (2, 4):
        words = common.command_line("sd15", out=tmp_path / str(n), **changes)
        done = start(words, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}")
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("iteration    1   reward") == 1
        rows = zip(metrics(tmp_path / str(n), "seconds"), metrics(tmp_path / "1"), strict=True)
        for row, other in rows:
            other.pop("seconds")
            assert row == pytest.approx(other, rel=1e-4, abs=1e-6)
        theirs = checkpoint(tmp_path / str(n))["lora"]
        assert_close(theirs, checkpoint(tmp_path / "1")["lora"], atol=1e-4, rtol=0)


def test_every_process_has_work(tmp_path, monkeypatch):
    """Fewer images or held-out prompts than processes are refused, and nothing is written."""
    monkeypatch.setattr(nft, "WORLD", 5)
    with pytest.raises(nft.UserError, match="processes"):
        nft.configure(**settings("sd15", out=tmp_path / "run", groups=1))
    with pytest.raises(nft.UserError, match="--eval-prompts"):
        nft.load_prompt_sets(types.SimpleNamespace(**settings("sd15", seed=0)))


def test_rank_alone_is_no_torchrun():
    """Some job queues set RANK alone."""
    done = start(["--help"], env={"RANK": "1"})
    assert done.returncode == 0, done.stderr


# ---- Precision -----------------------------------------------------------------------------------
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_like_fp32(tmp_path, precision):
    """Base in half, adapters in fp32; rows near those of fp32; fp16 scales its loss."""
    out = run("sd15", tmp_path / "run", precision=precision)
    assert {x.dtype for x in checkpoint(out)["lora"]["theta"]} == {torch.float32}
    assert bool(checkpoint(out)["scaler"]) == (precision == "fp16")
    exact = metrics(finished("sd15"))[1]
    assert metrics(out)[1]["loss"] == pytest.approx(exact["loss"], rel=0.1)


def not_a_number(model, pairs, t, eps):
    """A loss whose gradient is NaN."""
    loss, kl, deviation = nft.pair_losses(model, pairs, t, eps)
    return loss * float("nan"), kl, deviation


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_gradient_that_is_never_finite_stops_the_run(tmp_path, precision):
    """In fp32 at once; in fp16 as soon as no smaller scale can help."""
    with pytest.raises(FloatingPointError, match="gradient"):
        parts = {"losses": not_a_number}
        train("sd15", tmp_path / "run", parts, precision=precision, iterations=20, eval_every=99)
    assert len(metrics(tmp_path / "run")) < 10


def test_the_default_dtype_is_not_ours(monkeypatch):
    """A scorer that leaves torch's default dtype at bf16 changes no adapter."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        adapters = new_model("sd15").lora.adapters
    finally:
        torch.set_default_dtype(torch.float32)
    assert {x.dtype for x in adapters["theta"] + adapters["old"]} == {torch.float32}


# ---- Rewards and prompts -------------------------------------------------------------------------
def test_a_reward_may_edit_its_metadata(tmp_path):
    """It is given copies, also of what is nested."""
    (tmp_path / "p.jsonl").write_text('{"prompt": "a red circle", "tags": {"n": [1]}}\n')

    def edits(images, prompts, metadata):
        seen.extend(len(row["tags"]["n"]) for row in metadata)
        for row in metadata:
            row["tags"]["n"].append(2)
        return red(images, prompts, metadata)

    seen = []
    prompts = {"prompts": tmp_path / "p.jsonl", "eval_prompts": tmp_path / "p.jsonl"}
    train("sd15", tmp_path / "run", reward=edits, **prompts)
    assert set(seen) == {1}


def test_a_reward_may_refuse_the_prompts(tmp_path, capsys):
    """Its `check` sees all prompts first; what it raises is a line, exit 2, nothing written."""
    text = "def f(images, prompts, metadata):\n    return [0.0] * len(prompts)\n"
    text += "def check(prompts, metadata):\n    raise ValueError(f'no tags in {len(prompts)}')\n"
    (tmp_path / "r.py").write_text(text + "f.check = check\n")
    run("sd15", tmp_path / "run", status=2, reward=f"{tmp_path}/r.py:f")
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert "no tags in 6" in line
    assert not (tmp_path / "run").exists()


def test_a_reward_s_file_hides_no_package(tmp_path):
    """A file json.py is loaded as reward_json, and what lies beside it can be imported."""
    (tmp_path / "beside_json.py").write_text("ONE = 1.0\n")
    text = "import json\nimport beside_json\n\n\ndef reward(images, prompts, metadata):\n"
    (tmp_path / "json.py").write_text(text + "    return [beside_json.ONE] * len(images)\n")
    ((_, function),) = nft.load_rewards(f"{tmp_path}/json.py:reward").values()
    assert function(torch.zeros(2, 3, 4, 4), ["", ""], [{}, {}]) == [1.0, 1.0]
    assert sys.modules["json"] is json
    assert "reward_json" in sys.modules


@pytest.mark.parametrize("line", ["{", "[1]", '{"text": "a"}', '{"prompt": 3}', '{"prompt": " "}'])
def test_a_broken_line_is_named(tmp_path, line):
    """A line of a .jsonl that is no object with a prompt is refused by its number."""
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n\n' + line + "\n")
    with pytest.raises(nft.UserError, match="line 3"):
        nft.load_prompts(str(tmp_path / "p.jsonl"), "--prompts")


# ---- The model -----------------------------------------------------------------------------------
def test_evaluation_keeps_pictures_alone():
    """Neither x_0 nor the conditions of held-out prompts stay; a rollout's lie on the CPU."""
    model = new_model("sd15")
    numbered = [(i, text, {}) for i, text in enumerate(common.TEXTS)]
    assert nft.collect(model, {}, numbered, ("k",), "ema").keys() == {"images", "scores"}
    D = nft.collect(model, {}, numbered, ("k",), "old")
    assert D.keys() == {"x_0", "condition", "scores"}
    assert D["x_0"].device.type == "cpu"


def test_layers_that_are_never_called_are_told(monkeypatch, capsys):
    """A denoiser whose projections are fused leaves adapters idle: that is said."""
    load = nft.load_pipeline

    def fused(config, dtype):
        pipe = load(config, dtype)
        pipe.unet.fuse_qkv_projections()
        return pipe

    monkeypatch.setattr(nft, "load_pipeline", fused)
    new_model("sd15")
    assert "never called" in capsys.readouterr().out


def test_missing_weights_are_told(tmp_path):
    """What a pipeline lacks is begun at random: the library says so, once."""
    import safetensors.torch

    folder = shutil.copytree(root() / "sd15", tmp_path / "sd15")
    (file,) = folder.glob("text_encoder/*.safetensors")
    weights = safetensors.torch.load_file(file)
    lost = next(name for name in weights if "layers.0.mlp.fc1.weight" in name)
    del weights[lost]
    safetensors.torch.save_file(weights, file, {"format": "pt"})
    out = tmp_path / "run"
    done = start(common.command_line(str(folder), out=out, iterations=1))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("fc1.weight") == 1
    assert "torchvision" not in done.stderr


def test_a_pipeline_that_breaks_the_law_is_refused(tmp_path, monkeypatch):
    """Where x_0 is not what the denoiser's output says, nothing is trained."""
    root()
    folder = common.copy_of("sd15", tmp_path / "sd15", prediction_type="sample")
    with pytest.raises(nft.UserError, match="flow, epsilon or v"):
        new_model(str(folder))
    model = new_model("sd3")
    solver = type(model.pipe.scheduler)
    step = solver.step

    @functools.wraps(step)
    def negated(self, out, *args, **kwargs):
        return step(self, -out, *args, **kwargs)

    # As a pipeline does whose denoiser's output is x_0 - eps.
    monkeypatch.setattr(solver, "step", negated)
    with pytest.raises(nft.UserError, match="flow, epsilon or v"):
        model.check_sampling()


def test_a_solver_of_other_noise_levels_is_refused():
    """The solver's sigmas must be those of its times, in all steps."""
    model = new_model("sd15", solver="euler")
    solver = model.pipe.scheduler
    set_timesteps = solver.set_timesteps

    def shifted(*args, **kwargs):
        set_timesteps(*args, **kwargs)
        solver.sigmas[0] = solver.sigmas[0] * 0.5

    solver.set_timesteps = shifted
    with pytest.raises(nft.UserError, match="noise levels"):
        model.check_sampling()
