"""What bench.py compares is the same work.

Each test's docstring states a law.
SPDX-License-Identifier: MIT
"""

import re

import bench
import common
import pytest
import tables
import torch
from torch.testing import assert_close

MODELS = pytest.mark.parametrize("name", ("sd15", "sdxl", "sd3", "flux"))
PROMPTS = [("a red circle", {}), ("a blue cross", {})] * 2


@MODELS
@pytest.mark.parametrize("changes", ({"kl": 0.1}, {"kl": 0.0, "checkpointing": True}))
def test_plain_computes_the_same(name, changes):
    """The plain loop's images, losses and gradients are nft.py's, but for rounding."""
    model = common.new_model(name, filled=True, beta=0.3, batch_size=3, **changes)
    apart = bench.differences(bench.make_loops(model), PROMPTS)
    assert apart.keys() == {"images", "losses", "gradients"}
    assert max(apart.values()) < 1e-5


@pytest.mark.parametrize("name", ("sd15", "sd3"))
def test_loops_share_adapters_but_not_hooks(name):
    """Under each policy the plain loop's network is nft.py's; the policies differ."""
    model = common.new_model(name, filled=True)
    plain = bench.make_loops(model)[1].model
    D = bench.collect(model, [], PROMPTS, (0,))
    t = model.times[:1].repeat(len(PROMPTS))
    outs = []
    for policy in ("theta", "old", None):
        given = (D["x_0"], t, D["condition"], policy)
        with torch.no_grad():
            outs.append(plain.predict(*given))
            plain.lora.active = None
            assert_close(outs[-1], model.predict(*given))
            model.lora.active = None
    for i in range(3):
        assert (outs[i] - outs[i - 1]).abs().max() > 1e-4


def test_rounds_do_the_same_work():
    """An iteration leaves the weights as they are, and its hooks at rest."""
    model = common.new_model("sd15", filled=True)
    model.lora.average("ema", 0.0)
    before = {name: [x.clone() for x in xs] for name, xs in model.lora.adapters.items()}
    prompts = PROMPTS + PROMPTS[:2]
    for loop in bench.make_loops(model):
        rollout, training = bench.iterate(loop, [], prompts)
        assert rollout > 0
        assert training > 0
        assert loop.model.lora.active is None
    assert_close(model.lora.adapters, before)


def test_kept_grows_with_the_batch():
    """The bytes kept for a backward pass double with the pairs, for frozen weights are left out."""

    def kept(batch_size, **changes):
        model = common.new_model("sd15", batch_size=batch_size, rank=2, **changes)
        return bench.kept(model, PROMPTS)

    one = kept(1)
    two = kept(2)
    # The adapters come once.
    assert 1.9 < two / one < 2
    assert kept(2, checkpointing=True) < two / 2


def test_tables(capsys, monkeypatch):
    """A row a loop and KL weight; the parts of an iteration sum to one."""
    words = common.flags(
        model=common.root() / "sd15",
        device="cpu",
        resolution=32,
        steps=2,
        rank=4,
        reward="jpeg",
        groups=1,
        group_size=2,
    )
    returned = []
    measure = bench.bench
    monkeypatch.setattr(bench, "bench", lambda *args: returned.append(measure(*args)))
    assert bench.main(["--repeats=2", *words]) == 0
    (measured,) = returned
    *ratios, found = measured
    text = capsys.readouterr().out
    rows = re.findall(r"^\| ([\d.]+) \| (\S+) \|", text, re.MULTILINE)
    assert rows == [("0.0001", "nft.py"), ("0.0001", "plain"), ("0", "nft.py"), ("0", "plain")]
    assert re.search(r"pipeline alone: \d", text)
    assert re.search(r"backward pass of 2 pairs: \d.* MB", text)
    # What tables.py is given: the ratios with KL, without, and of the rollout.
    told = re.findall(r"^\| (?:0.0001|0) \| nft.py .* \| ([\d.]+ \[.*?\]) \|$", text, re.MULTILINE)
    told += re.findall(r"pipeline alone: (.*)", text)
    assert [bench.show(values) for values in ratios] == told
    assert found.keys() == tables.PARTS.keys()
    parts = re.findall(r"^kl .*", text, re.MULTILINE)
    assert parts[0] == "kl 0.0001, nft.py: " + ", ".join(
        f"{part} {100 * share:.1f}%" for part, share in found.items()
    )
    for line in parts:
        shares = [float(share) for share in re.findall(r"([\d.]+)%", line)]
        assert sum(shares) == pytest.approx(100, abs=0.5)
    # The plain loop always computes the reference.
    assert ["reference" in line for line in parts] == [True, True, False, True]


def test_random_weights_are_for_known_models(capsys, tmp_path):
    """A model whose full size bench.py does not know is refused in one line."""
    words = ["--model=tiny", "--device=cpu", f"--random-weights={tmp_path}"]
    assert bench.main(words) == 2
    error = capsys.readouterr().err
    assert error == "bench.py: --random-weights: --model tiny must be sd15 or sd3\n"


@pytest.mark.parametrize("name, millions", (("sd15", 860), ("sd3", 2243)))
def test_full_size(name, millions):
    """The denoiser has as many parameters as the released one."""
    with torch.device("meta"):
        pipe = bench.FULL_SIZE[name]()
    net = pipe.unet if name == "sd15" else pipe.transformer
    parameters = sum(x.numel() for x in net.parameters())
    assert round(parameters / 1e6) == millions
