"""control.py: its episodes, its groups, its loss and its network.

Each test's docstring states a law. Without gymnasium those that play are skipped.
SPDX-License-Identifier: MIT
"""

import importlib.util

import control
import pytest
import torch
from torch.testing import assert_close

import nft

NEEDS_GYMNASIUM = pytest.mark.skipif(
    importlib.util.find_spec("gymnasium") is None, reason="needs gymnasium"
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in control.compare."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def some_torques(seen):
    """A choice that differs from episode to episode."""
    return torch.randn(len(seen), control.CHUNK)


def constant_torques(seen):
    """The same choice always."""
    return torch.full((len(seen), control.CHUNK), 0.3)


@NEEDS_GYMNASIUM
def test_episodes_are_the_tasks_own():
    """All at once they see and earn what each does in Pendulum-v1 by itself, step by step."""
    import gymnasium

    starts = control.some_starts(3)
    D = control.play(constant_torques, starts)
    for i, start in enumerate(starts):
        pendulum = gymnasium.make("Pendulum-v1")
        pendulum.reset()
        pendulum.unwrapped.state = start.double().numpy()
        total = 0.0
        for step in range(control.STEPS):
            seen, reward, _, over, _ = pendulum.step([0.3 * control.LIMIT])
            total += reward
            if (step + 1) % control.CHUNK == 0 and not over:
                row = D.seen[(step + 1) // control.CHUNK, i] * torch.tensor([1, 1, 8])
                assert_close(row, torch.tensor(seen), rtol=0, atol=1e-2)
        assert over
        assert D.rewards[:, i].sum().item() == pytest.approx(total, rel=1e-3)


@NEEDS_GYMNASIUM
def test_first_sight_is_the_start():
    """What is seen first is the start; equal starts part by their choices."""
    starts = control.some_starts(2, fastest=8.0)[[0, 0, 1]]
    D = control.play(some_torques, starts, steps=40)
    angle, speed = starts.T
    assert_close(D.seen[0], torch.stack([angle.cos(), angle.sin(), speed / 8], 1))
    assert D.seen.shape == (10, 3, 3)
    assert D.chunks.abs().max() <= 1
    assert (D.seen[-1, 0] - D.seen[-1, 1]).norm() > 0.01


def test_starts_have_any_angle_and_bounded_speed():
    """Angles fill a turn; speeds fill their range."""
    angle, speed = control.some_starts(1000, fastest=8.0).T
    assert 3.1 < angle.abs().max() <= 3.1416
    assert 7.9 < speed.abs().max() <= 8
    assert control.some_starts(1000)[:, 1].abs().max() <= 1


@NEEDS_GYMNASIUM
def test_controller_is_mediocre():
    """It is better than no torque at all, and far from what the task allows, about -150."""
    starts = control.some_starts(32)
    controller = control.mean_return(control.play(control.mediocre, starts, chunk=1))
    idle = control.mean_return(control.play(lambda seen: torch.zeros(len(seen), 4), starts))
    assert idle + 300 < controller < -400


def test_return_to_go():
    """Each choice's return is its reward and the discounted rewards after it."""
    rewards = torch.randn(6, 4)
    returns = control.to_go(rewards)
    discount = control.GAMMA**control.CHUNK
    for d in range(6):
        powers = discount ** torch.arange(6 - d)
        assert_close(returns[d], powers @ rewards[d:])


def test_optimality_compares_within_groups_alone():
    """A start's own value moves no r; r follows the order in a group and averages 1/2."""
    returns = torch.randn(3, 4 * control.GROUP_SIZE)
    r = control.optimality(returns)
    of_starts = 100 * torch.randn(3, 4).repeat_interleave(control.GROUP_SIZE, 1)
    assert_close(control.optimality(returns + of_starts), r, rtol=0, atol=1e-3)
    grouped = r.view(3, 4, control.GROUP_SIZE)
    assert_close(grouped.mean(2), torch.full((3, 4), 0.5), rtol=0, atol=0.05)
    order = returns.view(3, 4, control.GROUP_SIZE).argsort(2)
    assert (grouped.gather(2, order).diff(dim=2) >= 0).all()
    assert r.std() > 0.1


def test_positive_loss_is_half_of_eq_5():
    """With the negative branch, which is its mirror about the old policy, it is nft.nft_loss."""
    theta, old, x_0 = torch.randn(3, 10, control.CHUNK)
    r = torch.rand(10)
    positive = control.positive_loss(theta, old, x_0, r, 0.7)
    negative = control.positive_loss(2 * old - theta, old, x_0, 1 - r, 0.7)
    assert_close(positive + negative, nft.nft_loss(theta, old, x_0, r, 0.7))


def bandit():
    """The mean torque after 20 iterations in which the first torque of a choice is its reward."""
    net = control.Net(width=32)
    old = control.Net(width=32)
    old.load_state_dict(net.state_dict())
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    seen = torch.zeros(32 * control.GROUP_SIZE, 3)
    for _ in range(20):
        chunks = control.sample(old, seen)
        D = control.Episodes(seen[None], chunks[None], chunks[None, :, 0])
        control.learn(net, old, optimizer, D, control.METHODS["NFT"], batch=256)
        old.load_state_dict(net.state_dict())
    return control.sample(net, seen).mean(0)


def test_loss_moves_torques_to_reward():
    """One choice an episode: the torque that is paid grows, the others stay about as they are."""
    mean = bandit()
    assert mean[0] > 1
    assert mean[1:].abs().max() < mean[0] / 2


@pytest.fixture(scope="module")
def cloned():
    """A policy cloned from fewer episodes, and the controller's return."""
    return control.clone(0, episodes=48)


@NEEDS_GYMNASIUM
def test_cloned_policy_plays_like_the_controller(cloned):
    """Its return is near the controller's, and evaluation repeats exactly."""
    net, controller = cloned
    first = control.mean_return(control.evaluate(net))
    assert first == pytest.approx(controller, abs=120)
    # Neither starts nor noise depend on what was drawn before.
    torch.rand(1)
    assert control.mean_return(control.evaluate(net)) == first


@NEEDS_GYMNASIUM
def test_return_rises(cloned):
    """Thirty iterations raise the held-out return, and leave the cloned policy as it was.

    It may fall during the first ten.
    """
    net, _ = cloned
    kept = [p.clone() for p in net.parameters()]
    _, curve = control.improve(net, control.METHODS["NFT"])
    assert curve[-1] > curve[0] + 100
    for p, q in zip(net.parameters(), kept, strict=True):
        assert torch.equal(p, q)


@NEEDS_GYMNASIUM
def test_picture_is_drawn(tmp_path):
    """Curves of two seeds and a strip before and after."""
    pytest.importorskip("matplotlib")
    D = control.play(some_torques, control.some_starts(2))
    curves = {name: [[-600.0, -300.0], [-700.0, -400.0]] for name in control.METHODS}
    control.draw(tmp_path / "control.png", curves, D, D)
    assert (tmp_path / "control.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("package", ("gymnasium", "matplotlib"))
def test_missing_package_is_named(package, monkeypatch, capsys):
    """One clear line before anything is learned."""
    missing = {package: None}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: missing.get(name, True))
    with pytest.raises(SystemExit):
        control.main([])
    assert f"pip install {package}" in capsys.readouterr().err
