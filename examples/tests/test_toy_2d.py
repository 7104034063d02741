"""toy_2d.py: its closed forms, its optimum and its network.

Each test's docstring states a law.
SPDX-License-Identifier: MIT
"""

import copy
import importlib.util

import pytest
import torch
import toy_2d
from torch.testing import assert_close

import nft

TIMES = pytest.mark.parametrize("time", (0.2, 0.5, 0.9))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in toy_2d.main: at layers as small as these, two threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def square_of_points(width, n):
    """n^2 points of a square around 0, and the area of the plane that each stands for."""
    axis = torch.linspace(-width / 2, width / 2, n, dtype=torch.float64)
    return torch.cartesian_prod(axis, axis), (width / (n - 1)) ** 2


def some_points(time, n=6):
    """x_t (n, 2) and t (n, 1)."""
    x_t = 1.5 * torch.randn(n, 2, dtype=torch.float64)
    return x_t, torch.full((n, 1), time, dtype=torch.float64)


def gaussian(squares, std):
    """A density, not normalised, from squared distances."""
    return (-squares / (2 * std**2)).exp()


def posterior(x_t, time):
    """All x_0 of a grid (N, 2), and p(x_0 | x_t) of each (6, N), from the two densities alone.

    For Gaussians as smooth as these, sums over the grid are exact to rounding.
    """
    x_0, _ = square_of_points(10, 201)
    prior = torch.zeros(len(x_0), dtype=torch.float64)
    for centre in toy_2d.CENTRES:
        prior += gaussian(toy_2d.squared(x_0, centre), toy_2d.STD)
    from_mean = x_t[:, None] - (1 - time) * x_0
    weight = prior * gaussian(from_mean.square().sum(2), time)
    return x_0, weight / weight.sum(1, keepdim=True)


def average(values, weight):
    """Averages (6, 2) of values (6, N, 2) by weights (6, N)."""
    return (weight[..., None] * values).sum(1) / weight.sum(1, keepdim=True)


@TIMES
def test_closed_forms_are_posterior_means(time):
    """alpha, v_old, v+ and v- are means over p(x_0 | x_t), weighted by 1, r and 1 - r."""
    x_t, t = some_points(time)
    x_0, weight = posterior(x_t, time)
    v = (x_t[:, None] - x_0) / time
    r = toy_2d.reward(x_0)
    fields = toy_2d.exact_fields(x_t, t)
    tight = {"rtol": 1e-9, "atol": 1e-10}
    assert_close(fields.alpha, (weight * r).sum(1, keepdim=True), **tight)
    assert_close(fields.v_old, average(v, weight), **tight)
    assert_close(fields.v_positive, average(v, weight * r), **tight)
    assert_close(fields.v_negative, average(v, weight * (1 - r)), **tight)


@TIMES
def test_theorem_3_1(time):
    """Delta is the same from the positive policy and from the negative one."""
    x_t, t = some_points(time)
    from_positive, from_negative = toy_2d.delta(toy_2d.exact_fields(x_t, t))
    assert_close(from_positive, from_negative, rtol=1e-9, atol=1e-10)
    assert from_positive.norm() > 0.01


@TIMES
def test_density_is_a_density(time):
    """p(x_t) has integral 1."""
    points, area = square_of_points(16, 201)
    t = torch.full((len(points), 1), time)
    density = toy_2d.exact_fields(points, t).density
    assert area * density.sum().item() == pytest.approx(1)


def expected_loss(v_theta, v_old, x_t, time, beta, loss=nft.nft_loss):
    """The expectation of `loss` given each x_t, over every x_0 of the grid: (6,)."""
    x_0, weight = posterior(x_t, time)
    r = toy_2d.reward(x_0)
    losses = []
    for i in range(len(x_t)):
        v = (x_t[i] - x_0) / time
        theta = v_theta[i].expand_as(x_0)
        old = v_old[i].expand_as(x_0)
        values = loss(theta, old, v, r, beta, toy_2d.squared)
        losses.append(weight[i] @ values)
    return torch.stack(losses)


@TIMES
@pytest.mark.parametrize("beta", (0.1, 1.0, 2.0))
def test_eq_6_minimises_eq_5(time, beta):
    """Eq. (5) has gradient 0 at v_old + (2 / beta) Delta, and is higher all around."""
    x_t, t = some_points(time)
    v_old = toy_2d.exact_old(x_t, t)
    best = toy_2d.optimum(x_t, t, beta).requires_grad_()
    lowest = expected_loss(best, v_old, x_t, time, beta)
    (gradient,) = torch.autograd.grad(lowest.sum(), best)
    assert_close(gradient, torch.zeros_like(best), rtol=0, atol=1e-9)
    start = v_old.clone().requires_grad_()
    loss = expected_loss(start, v_old, x_t, time, beta)
    (gradient,) = torch.autograd.grad(loss.sum(), start)
    assert gradient.norm() > 0.1
    # It is a quadratic of curvature 2 beta.
    off = torch.randn_like(best)
    higher = expected_loss(best + off, v_old, x_t, time, beta)
    assert_close(higher - lowest, beta * off.square().sum(1))


@TIMES
@pytest.mark.parametrize("beta", (0.1, 2.0))
def test_optimum_without_the_negative_branch(time, beta):
    """The positive branch alone has its minimum at v_old + (v+ - v_old) / beta."""
    x_t, t = some_points(time)
    v_old = toy_2d.exact_old(x_t, t)
    best = toy_2d.optimum(x_t, t, beta, negative=False).requires_grad_()
    loss = expected_loss(best, v_old, x_t, time, beta, toy_2d.positive_only)
    (gradient,) = torch.autograd.grad(loss.sum(), best)
    assert_close(gradient, torch.zeros_like(best), rtol=0, atol=1e-9)
    # It lies elsewhere than that of both branches.
    assert (best - toy_2d.optimum(x_t, t, beta)).norm() > 0.01


@pytest.fixture(scope="module")
def net():
    """A network pretrained on the ring, for a shorter time."""
    torch.manual_seed(0)
    return toy_2d.fit(toy_2d.Net(), toy_2d.flow_matching, steps=500)


@pytest.mark.parametrize("beta", (0.5, 1.0))
def test_learned_field_approaches_eq_6(net, beta):
    """A short round leaves under a quarter of the step from v_old to v*."""

    def loss(net, x_0):
        return toy_2d.one_round(net, x_0, beta)

    learned = toy_2d.fit(copy.deepcopy(net), loss, steps=500)
    for time in (0.5, 0.7):
        _, before = toy_2d.errors(net, time, beta)
        _, after = toy_2d.errors(learned, time, beta)
        assert before > 0.9
        assert after < 0.25


def test_online_rounds_raise_the_reward(net):
    """Algorithm 1 doubles the mean reward, and a seed fixes all of it."""
    _, rewards = toy_2d.online(net, 1.0, iterations=20, lr=1e-3)
    assert rewards[-1] > 2 * rewards[0]
    torch.manual_seed(0)
    _, again = toy_2d.online(net, 1.0, iterations=20, lr=1e-3)
    assert rewards == again


def test_sampling_is_of_second_order():
    """Twice the steps leave a quarter of the error: the ratio against 80 steps is 5."""
    samples = {}
    for steps in (20, 40, 80):
        torch.manual_seed(0)
        samples[steps] = toy_2d.sample(toy_2d.exact_old, 2000, steps)
    error_20 = (samples[20] - samples[80]).norm()
    error_40 = (samples[40] - samples[80]).norm()
    # (1 - 1/16) / (1/4 - 1/16) = 5; a method of first order, as Euler's, would have 3.
    assert 4 < error_20 / error_40 < 6


def test_solver_returns_the_old_policy():
    """The solver on the exact v_old has the old policy's mean reward, on Eq. (6) more."""

    def best(x_t, t):
        return toy_2d.optimum(x_t, t, beta=1.0)

    # The mean of a Gaussian bump over a Gaussian is a Gaussian of the summed variance.
    variance = toy_2d.STD**2 + toy_2d.WIDTH**2
    distance = toy_2d.squared(toy_2d.CENTRES, toy_2d.PEAK)
    bumps = toy_2d.WIDTH**2 / variance * gaussian(distance, variance**0.5)
    exact = bumps.mean().item()
    of_old = toy_2d.reward(toy_2d.sample(toy_2d.exact_old, 5000)).mean().item()
    of_best = toy_2d.reward(toy_2d.sample(best, 5000)).mean().item()
    assert of_old == pytest.approx(exact, abs=0.02)
    assert of_best > 1.5 * exact


def mean_reward(net, **settings):
    """Of samples after some rounds from `net`, all from the same noise."""
    torch.manual_seed(0)
    theta, _ = toy_2d.online(net, 1.0, iterations=25, lr=1e-3, **settings)
    return toy_2d.reward(toy_2d.sample(theta, 2000)).mean().item()


def test_switches_of_the_rounds(net):
    """Without the negative branch the reward is lost, a large eta is slow, z changes the path."""
    usual = mean_reward(net)
    assert usual > 0.6
    assert mean_reward(net, loss=toy_2d.positive_only) < 0.2
    assert mean_reward(net, eta="0.9") < usual - 0.1
    assert mean_reward(net, z=0.5) != usual
    assert mean_reward(net, steps=3) > 0.5


def test_picture_is_drawn(net, tmp_path):
    """A small beta, whose v* is long, is drawn, too."""
    pytest.importorskip("matplotlib")
    x_0 = toy_2d.draw_old(500)
    shown = {"before": x_0, "after": x_0}
    toy_2d.draw(tmp_path / "toy.png", net, shown, [0.2, 0.3], beta=0.05)
    assert (tmp_path / "toy.png").read_bytes().startswith(b"\x89PNG")


def test_animation_does_not_change_the_run(net, tmp_path):
    """A recorded run ends with the same rewards; the file has a frame for every second round."""
    pytest.importorskip("matplotlib")
    from PIL import Image

    torch.manual_seed(0)
    _, usual = toy_2d.online(net, 1.0, iterations=4)
    torch.manual_seed(0)
    recorder = toy_2d.Recorder(4)
    _, recorded = toy_2d.online(net, 1.0, recorder, iterations=4)
    recorder.save(tmp_path / "toy.gif")
    assert recorded == usual
    with Image.open(tmp_path / "toy.gif") as film:
        assert film.n_frames == 3


def test_committed_pictures_are_small():
    """The picture and the animation of the README: each under 1 MB."""
    for name in ("toy_2d.png", "toy_2d.gif"):
        assert (toy_2d.REPOSITORY / "examples/studies" / name).stat().st_size < 1e6


@pytest.mark.parametrize(
    "flags, message",
    (
        ([], "pip install matplotlib"),
        (["--beta=0"], "--beta 0.0: must be > 0"),
        (["--z=nan"], "--z nan: must be > 0"),
        (["--rounds=0"], "--rounds 0: must be at least 1"),
        (["--eta=2"], "--eta 2: must be a constant in [0, 1], or START,SLOPE,MAX"),
        (["--animate=film.png"], "must end in .gif"),
    ),
)
def test_refusals(flags, message, monkeypatch, capsys):
    """No matplotlib, or a wrong flag: one clear line before anything is learned."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        toy_2d.main(flags)
    assert message in capsys.readouterr().err
