"""simulate.py counts the bytes that there are, and a simulated model takes as many as a real one.

Each test's docstring states a law.
SPDX-License-Identifier: MIT
"""

import re

import bench
import common
import pytest
import simulate
import torch
import torch.nn.functional as F

import nft

TRACKERS = pytest.mark.parametrize("kind", (simulate.Tracker, simulate.Simulation))
MODELS = pytest.mark.parametrize("name", ("sd15", "flux"))


@TRACKERS
def test_bytes_live_as_long_as_a_tensor_is_held(kind):
    """A storage counts once, views and all, until the last of them dies; the peak remains."""
    with kind() as tracker:
        x = torch.empty(10_000)
        view = x[5_000:].view(50, 100)
        assert tracker.live == 40_000
        y = x.double()
        assert tracker.live == 120_000
        x.add_(1)
        del x, y
        assert tracker.live == 40_000
        del view
        assert tracker.live == 0
        assert tracker.peak() == 120_000
        tracker.restart()
        assert tracker.peak() == 0


@TRACKERS
def test_linear_layer(kind):
    """A linear layer's forward pass makes its output, its backward pass the gradients."""
    batch, n, m = 100, 200, 300
    with kind() as tracker:
        x = torch.empty(batch, n, requires_grad=True)
        W = torch.empty(m, n, requires_grad=True)
        start = torch.empty(batch, m)
        given = 4 * (batch * n + m * n + batch * m)
        assert tracker.live == given
        y = F.linear(x, W)
        assert tracker.live == given + 4 * batch * m
        y.backward(start)
        del y
        assert tracker.live == given + 4 * (batch * n + m * n)
        # Nothing else was alive with the output and both gradients.
        assert tracker.peak() == given + 4 * (batch * m + batch * n + m * n)


@TRACKERS
def test_checkpointing_is_seen(kind):
    """Ten layers keep ten activations, or the input of each layer's recomputation alone."""

    def layer(x):
        return x.sin().exp().sin()

    def peak(call):
        with kind() as tracker:
            x = torch.empty(10_000, requires_grad=True)
            for _ in range(10):
                x = call(layer, x)
            x.backward(torch.empty(10_000))
            return tracker.peak() / 40_000

    def checkpointed(function, x):
        return torch.utils.checkpoint.checkpoint(function, x, use_reentrant=False)

    plain = peak(lambda function, x: function(x))
    # sin, exp and sin keep their inputs or outputs: two or three a layer.
    assert 20 <= plain <= 34
    assert 11 <= peak(checkpointed) <= 18


def test_simulation_takes_no_memory():
    """What no machine could hold is held; its numbers are all 1, and small tensors are real."""
    with simulate.Simulation() as tracker:
        x = torch.randn(1 << 44, generator=nft.generator("noise")).bfloat16()
        assert tracker.live == 2 << 44
        assert tracker.peak() == 6 << 44
        assert x.isfinite().all()
        assert x.sum().item() == 1
        assert not x.mean() <= 0
        assert torch.arange(5).tolist() == [0, 1, 2, 3, 4]


def pipeline(name):
    """A tiny untrained pipeline, as the maker of one of full size."""
    import untrained

    torch.manual_seed(0)
    return untrained.make_pipelines()[name]


@MODELS
def test_a_simulated_iteration_takes_what_a_real_one_does(name):
    """The peaks of rollout and training are those that real tensors have, part by part."""
    words = common.command_line(name, steps=2, batch_size=2, group_size=2, reward="jpeg", kl=0.1)
    config = nft.parse(words)

    def make():
        return pipeline(name)

    with simulate.Simulation() as tracker:
        pipe = simulate.build_fake(make, torch.float32, tracker)
        run = simulate.make_run(config, pipe, tracker)
        simulated = simulate.measure(run, tracker, 2)
    with simulate.Tracker() as tracker:
        pipe = simulate.build(make, torch.float32)
        run = simulate.make_run(nft.parse(words), pipe, tracker)
        real = simulate.measure(run, tracker, 2)
    assert simulated == pytest.approx(real, rel=0.01)
    assert simulated["checkpointing"] < simulated["training"]


def test_without_text_encoders():
    """The largest of denoiser, sliced decoder and checkpointed training decides."""
    peaks = {"text": 20, "decoder": 20, "denoiser": 11, "sliced": 13, "checkpointing": 12}
    assert simulate.without_text(peaks, text=2) == 11


def test_table(capsys, monkeypatch):
    """The table says that it is simulated; a row a batch size."""
    monkeypatch.setattr(simulate, "PIPELINES", {"sd15": lambda: pipeline("sd15")})
    monkeypatch.setattr(simulate, "BATCHES", (1, 2))
    words = ["--simulate=sd15", "--rank=4", "--groups=1", "--group-size=2"]
    assert bench.main(words) == 0
    text = capsys.readouterr().out
    assert text.startswith("simulated, ")
    assert re.findall(r"^\| sd15 32 \| (\d)", text, re.MULTILINE) == ["1", "2"]
    found = simulate.main(["sd15"], words[1:])
    assert [(label, batch) for label, batch, _ in found] == [("sd15 32", 1), ("sd15 32", 2)]
    for label, batch, peaks in found:
        numbers = [f"{peaks[key] / 1e9:.2f}" for key in simulate.COLUMNS]
        assert f"| {label} | {batch} | {' | '.join(numbers)} |" in text


def test_models_are_known(capsys):
    """A model whose full size is not known is refused in one line."""
    assert bench.main(["--simulate=sd15,tiny"]) == 2
    error = capsys.readouterr().err
    rule = "must be of sd15, sdxl, sd3, flux; leave it out for all"
    assert error == f"bench.py: --simulate tiny: {rule}\n"


@pytest.mark.parametrize(
    "make, millions",
    (
        (simulate.make_sdxl_unet, 2567),
        (simulate.make_flux_transformer, 11901),
        (simulate.make_t5, 4762),
    ),
)
def test_full_size(make, millions):
    """The networks have as many parameters as the released ones."""
    with torch.device("meta"):
        network = make()
    assert round(sum(x.numel() for x in network.parameters()) / 1e6) == millions
