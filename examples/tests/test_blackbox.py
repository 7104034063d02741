"""blackbox.py: its functions, its count of calls, its methods.

Each test's docstring states a law.
SPDX-License-Identifier: MIT
"""

import importlib.util

import blackbox
import pytest
import torch
from torch.testing import assert_close

CALLS = 600


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in blackbox.compare_all."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def flow():
    """A flow fitted, for a shorter time, to the worse nine tenths of Ackley's data."""
    torch.manual_seed(0)
    x, _, _ = blackbox.offline_data(blackbox.ackley)
    return blackbox.fit(x, steps=300)


@pytest.mark.parametrize("function", blackbox.FUNCTIONS.values())
def test_minimum_is_known(function):
    """A function is 0 at its minimum, inside the box, and more around it and elsewhere."""
    at_minimum = blackbox.MINIMUM[None] / blackbox.HALF_WIDTH
    assert at_minimum.abs().max() < 0.5
    oracle = blackbox.Oracle(function, 1)
    assert_close(oracle(at_minimum), torch.zeros(1), rtol=0, atol=1e-4)
    near = 0.1 * torch.randn(100, blackbox.DIMENSIONS)
    far = 5 * torch.randn(100, blackbox.DIMENSIONS)
    assert function(near).min() > 0.01
    assert function(far).min() > function(near).max()


def test_best_tenth_is_held_out():
    """500 of 5000 points are left out, and every kept one is worse than the best of them."""
    x, values, held_out = blackbox.offline_data(blackbox.ackley)
    assert x.shape == (4500, blackbox.DIMENSIONS)
    torch.manual_seed(0)
    points = 2 * torch.rand(5000, blackbox.DIMENSIONS) - 1
    everything = blackbox.Oracle(blackbox.ackley, 5000)(points)
    assert held_out == everything.min().item()
    assert values.min() > everything.sort().values[499]


def test_oracle_keeps_the_best_of_its_calls():
    """The record is the running minimum, one entry a call, and ends with the calls."""
    oracle = blackbox.Oracle(blackbox.rastrigin, 150)
    points = torch.rand(200, blackbox.DIMENSIONS)
    values = torch.cat([oracle(points[:100]), oracle(points[100:])])
    assert oracle.spent()
    assert_close(torch.tensor(oracle.best), values[:150].cummin(0).values)


def test_points_outside_count_as_the_nearest_inside():
    """No method gains by leaving the box."""
    oracle = blackbox.Oracle(blackbox.rosenbrock, 2)
    outside = 3 * torch.randn(2, blackbox.DIMENSIONS)
    assert_close(oracle(outside), oracle(outside.clamp(-1, 1)))


def test_weights():
    """Both orders are the reward's; r averages 1/2 and RWR's weights 1; only its share moves."""
    raw = torch.linspace(-3, 1, 50)
    r = blackbox.optimality(raw)
    weight = blackbox.exponential_weights(raw)
    assert r.mean().item() == pytest.approx(0.5)
    assert weight.mean().item() == pytest.approx(1)
    assert r.diff().min() >= 0
    assert weight.diff().min() > 0
    # Units and origin of the function do not matter.
    assert_close(blackbox.exponential_weights(10 * raw + 7), weight)
    assert_close(blackbox.optimality(10 * raw + 7), r, rtol=0, atol=1e-3)


def test_flow_has_the_mean_and_spread_of_its_data():
    """Flow matching and the solver return the distribution that they were given."""
    centre = torch.linspace(-0.5, 0.5, blackbox.DIMENSIONS)
    x = centre + 0.3 * torch.randn(4000, blackbox.DIMENSIONS)
    samples = blackbox.sample(blackbox.fit(x, steps=400), 4000)
    assert_close(samples.mean(0), centre, rtol=0, atol=0.06)
    assert samples.std(0).mean().item() == pytest.approx(0.3, abs=0.04)


NFT = (blackbox.optimality, blackbox.nft_losses)
RWR = (blackbox.exponential_weights, blackbox.rwr_losses)


@pytest.mark.parametrize("parts", (NFT, RWR))
def test_flow_improves(flow, parts):
    """Six rounds find better points than as many uniform ones."""
    oracle = blackbox.Oracle(blackbox.ackley, CALLS)
    _, means = blackbox.improve(oracle, flow, *parts)
    uniform = blackbox.Oracle(blackbox.ackley, CALLS)
    blackbox.random_search(uniform, seed=0)
    assert len(oracle.best) == len(uniform.best) == CALLS
    assert means[-1] < means[0] - 2
    assert oracle.best[-1] < uniform.best[-1] - 1


def two_rounds(flow, parts):
    """The best values of two seeded rounds."""
    torch.manual_seed(1)
    oracle = blackbox.Oracle(blackbox.ackley, 200)
    blackbox.improve(oracle, flow, *parts)
    return oracle.best


@pytest.mark.parametrize("parts", (NFT, RWR))
def test_seed_fixes_everything(flow, parts):
    """A run repeats exactly, and leaves the flow that it began with as it was."""
    assert two_rounds(flow, parts) == two_rounds(flow, parts)


def test_random_search_draws_other_points_than_the_data():
    """With equal seeds, its best is not the data's."""
    torch.manual_seed(0)
    _, _, held_out = blackbox.offline_data(blackbox.ackley)
    torch.manual_seed(0)
    oracle = blackbox.Oracle(blackbox.ackley, 5000)
    blackbox.random_search(oracle, seed=0)
    assert oracle.best[-1] != held_out
    assert oracle.best[-1] == pytest.approx(held_out, abs=1)


@pytest.mark.parametrize("batch", (12, 100))
def test_cma_es(batch):
    """It spends exactly its calls, and finds a better point than uniform search does."""
    pytest.importorskip("cma")
    x, values, _ = blackbox.offline_data(blackbox.ackley)
    oracle = blackbox.Oracle(blackbox.ackley, CALLS)
    blackbox.cma_es(oracle, x[values.argmin()], seed=0, batch=batch)
    uniform = blackbox.Oracle(blackbox.ackley, CALLS)
    blackbox.random_search(uniform, seed=0)
    assert len(oracle.best) == CALLS
    assert oracle.best[-1] < uniform.best[-1]


def test_picture_is_drawn(tmp_path):
    """A panel a function, also where a method has found the minimum itself."""
    pytest.importorskip("matplotlib")
    found = [({"one": [3.0, 0.0], "other": [2.0, 1.0]}, 4.0, 1.5)] * 2
    blackbox.draw(tmp_path / "blackbox.png", {"ackley": found, "rastrigin": found})
    assert (tmp_path / "blackbox.png").read_bytes().startswith(b"\x89PNG")


def test_table_has_means_and_seeds(capsys):
    """The mean, then each seed, after a tenth, a half and all of the calls."""
    curves = [[9.0] * 2 + [8.0] * 8 + [7.0] * 10, [5.0] * 2 + [4.0] * 8 + [3.0] * 10]
    found = [({"method": curve}, 4.0, 1.5) for curve in curves]
    blackbox.print_table("ackley", found, 20)
    words = capsys.readouterr().out
    for cell in ("7 (9, 5)", "6 (8, 4)", "5 (7, 3)"):
        assert cell in words


@pytest.mark.parametrize("package", ("cma", "matplotlib"))
def test_missing_package_is_named(package, monkeypatch, capsys):
    """One clear line before anything is learned."""
    missing = {package: None}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: missing.get(name, True))
    with pytest.raises(SystemExit):
        blackbox.main([])
    assert f"pip install {package}" in capsys.readouterr().err
