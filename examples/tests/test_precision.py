"""Precision and memory: --precision and --checkpointing change these alone.

Each test's docstring states a law. Tests of CUDA are skipped without it.
SPDX-License-Identifier: MIT
"""

import functools
import types

import common
import pytest
import torch
from torch.testing import assert_close

import nft

MODELS = pytest.mark.parametrize("name", ("sd15", "sdxl", "sd3", "flux"))


def pass_back(model):
    """Images of three prompts; the losses of a pair each; theta's gradients."""
    numbered = []
    for i, text in enumerate(common.TEXTS):
        numbered.append((i, text, {}))
    D = nft.collect(model, [], numbered, ("evaluation",), "old")
    D["r"] = torch.tensor([0.1, 0.5, 0.8])
    eps = torch.ones_like(D["x_0"])
    index = torch.arange(3)
    losses = nft.pair_losses(model, D, index, model.times[index], eps)
    loss, kl, _ = losses
    theta = model.lora.adapters["theta"]
    gradients = torch.autograd.grad((loss + kl).sum(), theta)
    return D, losses, gradients


def count_kept(name, **changes):
    """As pass_back, and how many numbers were kept for the backward pass."""
    model = common.new_model(name, filled=True, **changes)
    kept = []

    def keep(x):
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        _, losses, gradients = pass_back(model)
    return losses, gradients, sum(kept)


@MODELS
def test_checkpointing_changes_memory_alone(name):
    """With --checkpointing losses and gradients stay, from less than half of the activations."""
    losses, gradients, kept = count_kept(name)
    same_losses, same_gradients, fewer = count_kept(name, checkpointing=True)
    assert_close(same_losses, losses, atol=1e-6, rtol=1e-5)
    assert_close(same_gradients, gradients, atol=1e-6, rtol=1e-5)
    assert max(gradient.abs().max() for gradient in gradients) > 1e-3
    assert fewer < kept / 2


def test_checkpointing_trains_and_resumes(tmp_path):
    """An iteration with --checkpointing and one without it are two without it."""
    out = common.run("sd15", tmp_path / "run", iterations=1, checkpointing=True)
    resume = ["--resume", f"--out={out}", "--iterations=2"]
    assert nft.main([*resume, "--no-checkpointing"]) == 0
    mixed = common.checkpoint(out)["lora"]
    without = common.checkpoint(common.finished("sd15"))["lora"]
    assert_close(mixed, without, atol=1e-5, rtol=1e-4)


def test_fp16_gradients_are_unscaled_before_clipping(tmp_path):
    """fp16 has fp32's loss, reward and gradient norm, and skips no step."""
    out = common.run("sd15", tmp_path / "half", iterations=1, precision="fp16")
    half = common.metrics(out)[1]
    full = common.metrics(common.finished("sd15"))[1]
    assert half["skipped_steps"] == 0
    for name in ("loss", "reward", "grad_norm"):
        assert half[name] == pytest.approx(full[name], rel=0.03)


def test_fp16_gradients_are_scaled(tmp_path, monkeypatch):
    """A step that overflows is left out and counted, and halves the scale, also after a resume."""
    huge = functools.partial(torch.amp.GradScaler, init_scale=2.0**60)
    monkeypatch.setattr(torch.amp, "GradScaler", huge)
    out = common.run("sd15", tmp_path / "huge", iterations=1, precision="fp16")
    monkeypatch.undo()
    assert nft.main(["--resume", f"--out={out}", "--iterations=2"]) == 0
    # Each iteration has two steps.
    rows = common.metrics(out)
    assert [row["skipped_steps"] for row in rows] == [0, 2, 4]
    assert rows[1]["grad_norm"] == 0
    state = common.checkpoint(out)
    assert state["scaler"]["scale"] == 2.0 ** (60 - 4)
    # B is where it began.
    for B in state["lora"]["theta"][1::2]:
        assert (B == 0).all()


@pytest.mark.parametrize("bf16, dtype", ((True, torch.bfloat16), (False, torch.float16)))
def test_auto_precision(bf16, dtype, monkeypatch):
    """auto is bf16 on a GPU that has it, else fp16, and fp32 on a CPU; a flag wins."""

    def empty(size, device):
        return types.SimpleNamespace(device=torch.device(device))

    def is_supported(including_emulation):
        return bf16

    def pick(*words):
        config = nft.parse(["--out=unused", *words])
        device, found = nft.pick_device(config)
        return device.type, found

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    assert pick() == ("cuda", dtype)
    assert pick("--precision=fp32") == ("cuda", torch.float32)
    assert pick("--device=cpu") == ("cpu", torch.float32)


def test_adapters_learn_in_fp32():
    """With a bf16 base, adapters, samples, losses and gradients are fp32."""
    model = common.new_model("sd15", filled=True, precision="bf16")
    D, losses, gradients = pass_back(model)
    theta = model.lora.adapters["theta"]
    full = [*losses, *gradients, *theta, D["x_0"]]
    assert {x.dtype for x in full} == {torch.float32}
    assert {x.dtype for x in model.net.parameters()} == {torch.bfloat16}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("precision", ("bf16", "fp16", "fp32"))
@MODELS
def test_cuda(name, precision, tmp_path):
    """A run on CUDA has the CPU's loss and reward, to its precision."""
    changes = {"device": "cuda", "precision": precision, "checkpointing": True}
    out = common.run(name, tmp_path / "run", **changes)
    on_cuda = common.metrics(out)[1]
    on_cpu = common.metrics(common.finished(name))[1]
    assert on_cuda["loss"] == pytest.approx(on_cpu["loss"], rel=0.05)
    assert on_cuda["reward"] == pytest.approx(on_cpu["reward"], rel=0.05)
