"""What bench.py compares is the same work, and what it simulates takes as many bytes as real work.

SPDX-License-Identifier: MIT
"""

import re

import bench
import common
import pytest
import torch
import torch.nn.functional as F
import untrained
from torch.testing import assert_close

import nft

PROMPTS = [("a red circle", {}), ("a blue cross", {})] * 3
TRACKERS = pytest.mark.parametrize("fake", (False, True))


def config(name, **changes):
    """A small run's nft.Config."""
    return nft.configure(out="unused", **common.settings(name, **changes))


@pytest.mark.parametrize("name", ("sd15", "sdxl", "sd3", "flux"))
@pytest.mark.parametrize("changes", ({"kl": 0.1}, {"kl": 0.0, "checkpointing": True}))
def test_plain_computes_the_same(name, changes):
    """The plain loop's images, losses and gradients are nft.py's, but for rounding."""
    loops = bench.make_loops(config(name, beta=0.3, **changes))
    apart = bench.differences(loops, PROMPTS)
    assert apart.keys() == {"images", "losses", "gradients"}
    assert all(x < 1e-5 for x in apart.values())


def test_rounds_do_the_same_work():
    """An iteration of either loop leaves theta and old as they are, which differ."""
    loops = bench.make_loops(config("sd15"))
    before = {
        name: [x.clone() for x in loops[0].model.lora.adapters[name]] for name in ("theta", "old")
    }
    for loop in loops:
        loop.train(loop.collect({}, PROMPTS))
        adapters = loop.model.lora.adapters
        assert_close({name: adapters[name] for name in before}, before)
        assert (adapters["theta"][0] - adapters["old"][0]).abs().max() > 1e-3


def test_seconds(capsys):
    """A row a model, whose shares sum to one."""
    words = common.flags(device="cpu", resolution=32, steps=2, rank=4, reward="jpeg", groups=1)
    bench.main(["--of", str(common.root() / "sd15"), *words, "--group-size=2"])
    head, line, row = capsys.readouterr().out.splitlines()[-3:]
    assert head.count("|") == line.count("|") == row.count("|")
    assert sum(map(int, re.findall(r"(\d+)%", row))) == pytest.approx(100, abs=3)


@TRACKERS
def test_bytes_live_as_long_as_a_tensor_is_held(fake):
    """A storage counts once, views and all, until the last of them dies; the peak remains."""
    with bench.Tracker(fake) as tracker:
        x = torch.empty(10_000)
        view = x[5_000:].view(50, 100)
        y = x.double()
        assert tracker.live == 120_000
        x.add_(1)
        del x, y
        assert tracker.live == 40_000
        del view
        assert tracker.live == 0
        torch.empty(5_000)
        assert tracker.peak == 120_000


@TRACKERS
def test_linear_layer(fake):
    """A linear layer's forward pass makes its output, its backward pass the gradients."""
    n, m = 200, 300
    with bench.Tracker(fake) as tracker:
        x = torch.empty(100, n, requires_grad=True)
        W = torch.empty(m, n, requires_grad=True)
        y = F.linear(x, W)
        y.backward(torch.empty(100, m))
        assert tracker.peak == 4 * (2 * (100 * n + m * n) + 2 * 100 * m)


def test_simulation_takes_no_memory():
    """What no machine could hold is held; its numbers are all 1, and small tensors are real."""
    with bench.Tracker(fake=True) as tracker:
        x = torch.randn(1 << 44, generator=nft.generator("noise")).bfloat16()
        assert (tracker.live, tracker.peak) == (2 << 44, 6 << 44)
        assert x.isfinite().all()
        assert x.sum().item() == 1
        assert torch.arange(5).tolist() == [0, 1, 2, 3, 4]


def test_a_simulated_iteration_takes_what_a_real_one_does():
    """The peaks of rollout and training are those of real tensors; checkpointing saves some."""
    peaks = []
    for fake in (False, True):
        torch.manual_seed(0)
        with bench.Tracker(fake) as tracker:
            own = config("sd15", steps=2, groups=1, updates=1, train_times=1, precision="fp32")
            loop = bench.make_loop(own, lambda: untrained.make_pipelines()["sd15"])
            peaks.append(bench.peaks_of(loop, tracker, 2))
    assert peaks[1] == pytest.approx(peaks[0], rel=0.01)
    _, training, checkpointing = peaks[0]
    assert checkpointing < training


@pytest.mark.parametrize(
    "name, millions", (("sd15", 860), ("sdxl", 2567), ("sd3", 2243), ("flux", 11901))
)
def test_full_size(name, millions):
    """The denoiser has as many parameters as the released one."""
    with torch.device("meta"):
        net = bench.make_denoiser(name)
    assert round(sum(x.numel() for x in net.parameters()) / 1e6) == millions
