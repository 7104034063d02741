"""toy_2d.py: its closed forms, Eq. (6), its network and its pictures.

SPDX-License-Identifier: MIT
"""

import copy
import functools

import pytest
import torch
import toy_2d
from torch.testing import assert_close

import nft

TIMES = pytest.mark.parametrize("time", (0.2, 0.5, 0.9))
TIGHT = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def some_points(time):
    """x_t (6, 2) and t (6, 1)."""
    return 1.5 * torch.randn(6, 2).double(), torch.full((6, 1), time, dtype=torch.float64)


def posterior(x_t, time):
    """All x_0 of a grid (N, 2), and p(x_0 | x_t) of each (6, N), from the two densities alone.

    For Gaussians as smooth as these, sums over the grid are exact to rounding.
    """
    x_0 = toy_2d.grid(5, 201)
    from_centres = (x_0[:, None] - toy_2d.CENTRES).square().sum(2)
    prior = (-from_centres / (2 * toy_2d.STD**2)).exp().sum(1)
    from_mean = (x_t[:, None] - (1 - time) * x_0).square().sum(2)
    weight = prior * (-from_mean / (2 * time**2)).exp()
    return x_0, weight / weight.sum(1, keepdim=True)


@TIMES
def test_closed_forms_are_posterior_means(time):
    """alpha, v_old, v+ and v- are means over p(x_0 | x_t), weighted by 1, r and 1 - r."""
    x_t, t = some_points(time)
    x_0, weight = posterior(x_t, time)
    v = (x_t[:, None] - x_0) / time
    r = toy_2d.reward(x_0)

    def mean(weight):
        return torch.einsum("bn,bnd->bd", weight, v) / weight.sum(1, keepdim=True)

    fields = toy_2d.exact_fields(x_t, t)
    assert_close(fields.alpha, (weight * r).sum(1, keepdim=True), **TIGHT)
    assert_close(fields.v_old, mean(weight), **TIGHT)
    assert_close(fields.v_positive, mean(weight * r), **TIGHT)
    assert_close(fields.v_negative, mean(weight * (1 - r)), **TIGHT)


@TIMES
def test_theorem_3_1(time):
    """Delta is the same from the positive policy and from the negative one."""
    fields = toy_2d.exact_fields(*some_points(time))
    from_negative = (1 - fields.alpha) * (fields.v_old - fields.v_negative)
    assert_close(toy_2d.delta(fields), from_negative, **TIGHT)
    assert from_negative.norm() > 0.01


@TIMES
@pytest.mark.parametrize("beta", (0.1, 1.0, 2.0))
def test_eq_6_minimises_eq_5(time, beta):
    """The expected loss of nft.py, Eq. (5), has gradient 0 at v*, and not at v_old."""
    x_t, t = some_points(time)
    x_0, weight = posterior(x_t, time)
    v = (x_t[:, None] - x_0) / time
    v_old = toy_2d.exact_old(x_t, t)
    norms = []
    for start in (v_old, toy_2d.optimum(x_t, t, beta)):
        theta = start.clone().requires_grad_()
        loss = 0
        for i in range(6):
            pair = (theta[i].expand_as(x_0), v_old[i].expand_as(x_0))
            losses = nft.nft_loss(*pair, v[i], toy_2d.reward(x_0), beta, toy_2d.squared)
            loss += weight[i] @ losses
        (gradient,) = torch.autograd.grad(loss, theta)
        norms.append(gradient.norm().item())
    assert norms[1] < 1e-7 * norms[0]


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return toy_2d.fit(toy_2d.Net(), toy_2d.flow_matching, steps=500)


def test_learning(net):
    """A short round of Eq. (5) leaves under a quarter of the way from v_old to v*."""
    one_round = functools.partial(toy_2d.one_round, beta=1.0)
    learned = toy_2d.fit(copy.deepcopy(net), one_round, steps=500)
    assert toy_2d.error(learned, 1.0) < toy_2d.error(net, 1.0) / 4


def test_rounds(net, tmp_path):
    """Twenty rounds raise the reward by half, and pictures are drawn of them."""
    theta, copies = toy_2d.online(net, 1.0, 20)
    before = toy_2d.sample(net, 2000)
    after = toy_2d.sample(theta, 2000)
    assert toy_2d.reward(after).mean() > 1.5 * toy_2d.reward(before).mean()
    toy_2d.draw(tmp_path / "toy.png", theta, before, after, 1.0)
    toy_2d.film(tmp_path / "toy.gif", copies[::10])
    assert (tmp_path / "toy.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "toy.gif").read_bytes().startswith(b"GIF89a")


def test_solver_returns_the_old_policy():
    """The solver on the exact v_old has the old policy's mean reward."""
    exact = toy_2d.reward(toy_2d.draw_old(20000)).mean().item()
    x_0 = toy_2d.sample(toy_2d.exact_old, 5000)
    assert toy_2d.reward(x_0).mean().item() == pytest.approx(exact, abs=0.02)
