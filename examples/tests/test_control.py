"""control.py: its episodes, its groups, its policy. Each test's docstring states a law.

SPDX-License-Identifier: MIT
"""

import control
import pytest
import torch
from torch.testing import assert_close

gymnasium = pytest.importorskip("gymnasium")


def test_episodes_are_the_tasks_own():
    """All at once they see and earn what each does in Pendulum-v1 by itself, step by step."""
    torch.manual_seed(0)
    starts = control.some_starts(3)
    torques = torch.full((3, control.CHUNK), 0.3)
    seen, _, rewards = control.play(lambda seen: torques, starts)
    for i, start in enumerate(starts):
        pendulum = gymnasium.make("Pendulum-v1")
        pendulum.reset()
        pendulum.unwrapped.state = start.double().numpy()
        total = 0.0
        for step in range(200):
            if step % control.CHUNK == 0:
                angle, speed = torch.tensor(pendulum.unwrapped.state)
                now = torch.stack([angle.cos(), angle.sin(), speed / 8]).float()
                assert_close(seen[step // control.CHUNK, i], now, rtol=0, atol=1e-2)
            _, reward, *_ = pendulum.step([0.6])
            total += reward
        assert rewards[:, i].sum().item() == pytest.approx(total, rel=1e-3)


def test_optimality_compares_discounted_returns_within_groups():
    """r follows the order of the returns to go in a group; a start's own value moves no r."""
    torch.manual_seed(0)
    rewards = torch.randn(6, 4 * control.GROUP_SIZE)
    r = control.optimality(rewards, 3)
    powers = 0.95 ** (4 * torch.arange(6))
    returns = torch.stack([powers[: 6 - d] @ rewards[d:] for d in range(3)])
    order = returns.view(3, 4, -1).argsort(2)
    grouped = r.view(3, 4, -1)
    assert (grouped.gather(2, order).diff(dim=2) >= 0).all()
    assert_close(grouped.mean(2), torch.full((3, 4), 0.5), rtol=0, atol=0.05)
    assert r.std() > 0.1
    of_starts = 100 * torch.randn(6, 4).repeat_interleave(control.GROUP_SIZE, 1)
    assert_close(control.optimality(rewards + of_starts, 3), r, rtol=0, atol=1e-3)


def test_policy_is_cloned_and_its_return_rises(tmp_path):
    """It plays like its poor controller; thirty iterations raise its held-out return."""
    pytest.importorskip("matplotlib")
    net, controller = control.clone(0, episodes=48)
    assert -750 < controller < -400
    before, *_, after = control.improve(net, control.ITERATIONS)
    first = before[2].sum(0).mean().item()
    assert first == pytest.approx(controller, abs=120)
    assert after[2].sum(0).mean() > first + 100
    # Evaluation repeats exactly, and the cloned policy is as it was.
    assert torch.equal(control.evaluate(net)[2], before[2])
    control.draw(tmp_path / "control.png", [{"NFT": torch.tensor([1.0, 2.0])}], before, after)
    assert (tmp_path / "control.png").read_bytes().startswith(b"\x89PNG")
