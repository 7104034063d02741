"""blackbox.py: its functions, its flow, its methods. Each test's docstring states a law.

SPDX-License-Identifier: MIT
"""

import blackbox
import pytest
import torch
from torch.testing import assert_close

import nft


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("function", blackbox.FUNCTIONS.values())
def test_minimum_is_known(function):
    """A function is 0 at its minimum, and more around it and elsewhere."""
    minimum = blackbox.MINIMUM[None] / 5
    assert_close(function(minimum), torch.zeros(1), rtol=0, atol=1e-4)
    offsets = torch.randn(100, blackbox.DIMENSIONS)
    assert function(minimum + 0.02 * offsets).min() > 0.01
    assert function(minimum + offsets).min() > function(minimum + 0.02 * offsets).max()


def test_weights():
    """Both follow the rewards' order; r averages 1/2 and RWR's weights 1, in any unit."""
    raw = torch.linspace(-3, 1, 50)
    for (weigh, z, _, _), mean in ((blackbox.NFT, 0.5), (blackbox.RWR, 1.0)):
        weight = weigh(raw, torch.zeros(50), z)
        assert weight.mean().item() == pytest.approx(mean)
        assert weight.diff().min() >= 0
        assert weight[-1] > 1.5 * weight[25]
        assert_close(weigh(10 * raw + 7, torch.zeros(50), z), weight, rtol=1e-3, atol=1e-3)


def test_positive_loss_is_half_of_eq_5():
    """With the negative branch, which is its mirror about the old policy, it is nft.nft_loss."""
    theta, old, x_0 = torch.randn(3, 10, 4)
    r = torch.rand(10)
    positive = blackbox.positive_loss(theta, old, x_0, r, 0.7)
    negative = blackbox.positive_loss(2 * old - theta, old, x_0, 1 - r, 0.7)
    assert_close(positive + negative, nft.nft_loss(theta, old, x_0, r, 0.7))


def test_flow_has_the_mean_and_spread_of_its_data():
    """Flow matching and the solver return the distribution given the condition."""
    c = torch.randint(2, (4000, 1)) - 0.5
    x = c + 0.3 * torch.randn(4000, blackbox.DIMENSIONS)
    residual = blackbox.sample(blackbox.fit(x, c, steps=400), c) - c
    assert residual.mean(0).abs().max() < 0.06
    assert residual.std(0).mean().item() == pytest.approx(0.3, abs=0.04)


@pytest.mark.parametrize("method", (blackbox.NFT, blackbox.RWR))
def test_flow_improves(method):
    """Six rounds lower the mean value of a round, and repeat exactly."""
    data = 2 * torch.rand(5000, blackbox.DIMENSIONS) - 1
    flow = blackbox.fit(data, torch.empty(5000, 0), steps=300)
    values = blackbox.improve(blackbox.ackley, 600, 0, flow, *method)
    assert values[-100:].mean() < values[:100].mean() - 2
    # So the flow that it began with is as it was.
    assert_close(blackbox.improve(blackbox.ackley, 200, 0, flow, *method), values[:200])


def test_no_point_gains_by_leaving_the_box():
    """A flow far outside gets the values of the corner nearest to it."""
    flow = torch.nn.Sequential(torch.nn.Linear(23, blackbox.DIMENSIONS))
    torch.nn.init.constant_(flow[0].bias, -9.0)
    values = blackbox.improve(blackbox.rastrigin, 100, 0, flow, *blackbox.RWR)
    assert_close(values, blackbox.rastrigin(torch.ones(100, blackbox.DIMENSIONS)))


def test_methods_are_compared(tmp_path):
    """Each has one best value a call, never rising; the data's best tenth is held out."""
    pytest.importorskip("cma")
    pytest.importorskip("matplotlib")
    curves = blackbox.compare(blackbox.ackley, 200, 0)
    for best in curves.values():
        assert len(best) == 200
        assert (best.diff() <= 0).all()
    assert curves["CMA-ES"][-1] < curves["random search"][-1]
    torch.manual_seed(0)
    values = blackbox.ackley(2 * torch.rand(5000, blackbox.DIMENSIONS) - 1).sort().values
    assert (curves["held-out data"][0], curves["the data"][0]) == (values[0], values[500])
    blackbox.draw(tmp_path / "two.png", {"one": [curves], "two": [curves]})
    assert (tmp_path / "two.png").read_bytes().startswith(b"\x89PNG")


def test_table_has_the_mean_and_each_seed(capsys):
    """It is of Markdown, a line a method."""
    of_seeds = [{"NFT": torch.tensor([9.0, 3.0])}, {"NFT": torch.tensor([8.0, 4.0])}]
    blackbox.print_table({"a": of_seeds, "b": of_seeds})
    assert "\n| NFT | 3.5 (3, 4) | 3.5 (3, 4) |\n" in capsys.readouterr().out
