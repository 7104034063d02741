"""What bench.py compares is the same work: each test's docstring states a law.

    python -m pytest -q examples/test_bench.py
SPDX-License-Identifier: MIT
"""
import pathlib
import re
import sys

import pytest
import torch

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import bench  # noqa: E402
import nft  # noqa: E402
import untrained  # noqa: E402


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """A directory with untrained pipelines, one a model family."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("pipelines")
    for name, pipe in untrained.make_pipelines().items():
        pipe.save_pretrained(root / name)
    return root


@pytest.mark.parametrize("name", ("sd15", "sdxl", "sd3", "flux"))
@pytest.mark.parametrize("more", (["--kl", "0.1"], ["--kl", "0"], ["--kl", "0.1", "--checkpointing"]))
def test_plain_computes_the_same(pipelines, name, more):
    """The plain loop's images, losses and gradients are nft.py's to rounding, and those of three unlike networks."""
    model = nft.Model(nft.parse([
        "--model", f"{pipelines / name}", "--device", "cpu", "--resolution", "32", "--steps", "3", "--beta", "0.3",
        "--out", "x", "--rank", "4", "--batch-size", "3", *more]))
    noise = nft.generator("test")
    for policy in ("theta", "old"):
        for x in model.lora.sets[policy]:
            x.data += 0.1 * torch.randn(x.shape, generator=noise)
    loops = (bench.Loop("nft.py", model, nft.pair_losses, 1),
             bench.Loop("plain", bench.Plain(model), bench.plain_losses, 1))
    prompts = [("a red circle", {}), ("a blue cross", {})] * 2
    assert max(bench.differences(loops, prompts).values()) < 1e-5
    rollout, t = nft.collect(model, [], prompts, (0,), "old")[0], model.times[:1].repeat(4)
    with torch.no_grad():
        outs = [loops[1].model.predict(rollout["x_0"], t, rollout["condition"], x) for x in ("theta", "old", None)]
    assert min((outs[i] - outs[i - 1]).abs().max() for i in range(3)) > 1e-4


def test_kept_is_what_checkpointing_saves(pipelines):
    """The bytes kept for a backward pass leave out the frozen weights, and grow with the batch."""
    def kept(batch_size, *more):
        model = nft.Model(nft.parse([
            "--model", f"{pipelines / 'sd15'}", "--device", "cpu", "--resolution", "32", "--rank", "2", "--out", "x",
            "--steps", "2", "--batch-size", f"{batch_size}", *more]))
        return bench.kept(model, [("a red circle", {})] * 4)
    one, two = kept(1), kept(2)
    assert 1.9 < two / one < 2 and kept(2, "--checkpointing") < two / 2      # the adapters come once


def test_bench_prints_its_tables(pipelines, capsys):
    """A row a loop and KL weight, a cost model a row that sums to one, and the growth."""
    flags = "--repeats 2 --growth --device cpu --resolution 32 --steps 2 --rank 4 --reward jpeg --groups 1"
    assert bench.main(["--model", f"{pipelines / 'sd15'}", *flags.split(), "--group-size", "2"]) == 0
    text = capsys.readouterr().out
    rows = [line for line in text.splitlines() if line.startswith(("| 0", "| 0.0001"))]
    assert re.search(r"pipeline alone: \d.*; kept for the backward pass of 2 pairs: \d.* MB", text)
    assert [row.split(" | ")[1] for row in rows] == ["nft.py", "plain"] * 2
    costs = [line.split(": ")[1] for line in text.splitlines() if line.startswith("kl ")]
    for cost in costs:
        assert sum(float(part.split()[-1].strip("%")) for part in cost.split(", ")) == pytest.approx(100, abs=0.5)
    assert ["reference" in cost for cost in costs] == [True, True, False, True]     # plain always computes it
    assert [line.split()[1] for line in text.splitlines()[-4:]] == ["2", "4", "8", "16"]


def test_random_weights_are_for_known_models(capsys):
    """A model whose full size bench.py does not know is refused in one line."""
    assert bench.main(["--random-weights", "--model", "tiny", "--device", "cpu"]) == 2
    assert capsys.readouterr().err.startswith("bench.py: --random-weights: --model tiny must be")


@pytest.mark.parametrize("name, millions", (("sd15", 860), ("sd3", 2243)))
def test_full_size(name, millions):
    """The denoiser has as many parameters as the released one."""
    with torch.device("meta"):
        pipe = bench.random_pipeline(name)
    net = pipe.unet if name == "sd15" else pipe.transformer
    assert round(sum(x.numel() for x in net.parameters()) / 1e6) == millions
