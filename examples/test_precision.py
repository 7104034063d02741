"""Precision and memory: --precision and --checkpointing change these alone. Each docstring states a law.

    pip install pytest peft; python -m pytest -q examples/test_precision.py

Tests of CUDA are skipped without it. Small runs and their pipelines are those of test_nft.py.
SPDX-License-Identifier: MIT
"""
import functools
import json
import pathlib
import sys
import types

import pytest
import torch
from torch.testing import assert_close

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from test_nft import (  # noqa: E402, F401
    PIPES, SEEDS, TEXTS, argv, checkpoint, files_and_pipelines, finished, metrics, new_model, run)

import nft  # noqa: E402


@PIPES
def test_checkpointing_changes_memory_alone(name):
    """--checkpointing: the same losses and gradients, from less than half of the activations."""
    def measure(**flags):
        model, kept = new_model(name, fill=True, **flags), []
        rollout, i = model.sample(TEXTS, SEEDS, "old"), torch.arange(3)
        eps, r = torch.ones_like(rollout["x_0"]), torch.tensor([0.1, 0.5, 0.8])
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            losses = nft.pair_losses(model, rollout, i, model.times[i], eps, r)
        theta = model.lora.sets["theta"]
        return sum(kept), (*losses, *torch.autograd.grad(sum(losses).sum(), theta))
    (more, plain), (less, again) = measure(), measure(checkpointing=True)
    assert_close(again, plain, atol=1e-6, rtol=1e-5)
    assert less < more / 2


def test_checkpointing_trains_and_resumes(tmp_path):
    """A run with --checkpointing is the run without it, and may go on with or without it."""
    out = run("sd15", out=tmp_path / "run", checkpointing=True)
    assert_close(checkpoint(out), checkpoint(finished("sd15")), atol=1e-5, rtol=1e-4)
    for iterations, flag in ((3, "--no-checkpointing"), (4, "--checkpointing"), (5, "--resume")):
        assert nft.main([*argv("sd15", out=out, iterations=iterations), "--resume", flag]) == 0
        with_it = json.loads((out / "config.json").read_text())["checkpointing"]
        assert with_it == (iterations > 3) and metrics(out)[-1]["iteration"] == iterations


def test_fp16_is_scaled_and_unscaled(tmp_path, monkeypatch):
    """fp16 has fp32's gradient norm before clipping; a step that overflows is skipped and counted."""
    half = metrics(run("sd15", out=tmp_path / "half", precision="fp16"))
    assert half[2]["skipped_steps"] == 0
    for key in ("loss", "grad_norm", "reward"):
        assert half[1][key] == pytest.approx(metrics(finished("sd15"))[1][key], rel=0.03)
    huge = functools.partial(torch.amp.GradScaler, init_scale=2.0 ** 60)
    monkeypatch.setattr(torch.amp, "GradScaler", huge)
    out = run("sd15", out=tmp_path / "huge", precision="fp16")
    assert [row["skipped_steps"] for row in metrics(out)] == [0, 2, 4]      # both of an iteration
    assert all((B == 0).all() for B in checkpoint(out)["theta"][1::2])      # B where it began


@pytest.mark.parametrize("native, dtype", [(True, torch.bfloat16), (False, torch.float16)])
def test_auto_precision_of_cuda(native, dtype, monkeypatch):
    """--precision auto: bf16 where CUDA has it natively, else fp16; on a CPU fp32; a flag wins."""
    fake = types.SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    monkeypatch.setattr(torch, "empty", lambda *a, device: (
        fake if device == "cuda" else types.SimpleNamespace(device=torch.device(device))))
    for flags, wish in (([], dtype), (["--device=cpu"], torch.float32),
                        (["--precision=fp32"], torch.float32)):
        assert nft.pick_device(nft.parse(["--out=x", *flags]))[1] == wish


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux"])
def test_cuda(name, precision, tmp_path):
    """A run on CUDA, also with --checkpointing, has the CPU's losses within the precision's."""
    out = run(name, out=tmp_path / "run", device="cuda", precision=precision, checkpointing=True)
    for key in ("loss", "reward"):
        assert metrics(out)[1][key] == pytest.approx(metrics(finished(name))[1][key], rel=0.05)
