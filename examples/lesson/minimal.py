"""DiffusionNFT whole, on a plane: a model that ignores its prompt learns to obey it.

    python examples/lesson/minimal.py

It needs torch and tqdm, and nft.py beside it or two directories above. A prompt c is a direction,
an image x_0 is a point. The base model paints points of a ring, whatever the prompt says. The
reward tells how near to its prompt's direction a point lies. Nobody shows the model a right one.
SPDX-License-Identifier: MIT
"""

import copy
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.append(str(Path(__file__).parent / "../.."))
from nft import nft_loss, optimality_reward, soft_update_decay


def prompts(n):
    """n random directions c: (n, 2)."""
    return nn.functional.normalize(torch.randn(n, 2))


def predict(net, x_t, t, c):
    """The velocity v = eps - x_0 at x_t (B, 2), time t (B, 1) and prompt c (B, 2): (B, 2)."""
    return net(torch.cat([x_t, t, c], 1))


def noised(x_0):
    """The forward process: a random time t, x_t = (1 - t) x_0 + t eps, and v = eps - x_0."""
    t = torch.rand(len(x_0), 1)
    eps = torch.randn_like(x_0)
    return t, (1 - t) * x_0 + t * eps, eps - x_0


@torch.no_grad()
def sample(net, c, steps=20):
    """The reverse process: from noise at t = 1 against the velocity to x_0 at t = 0."""
    x = torch.randn_like(c)
    for i in range(steps, 0, -1):
        t = torch.full((len(c), 1), i / steps)
        x = x - predict(net, x, t, c) / steps
    return x


def reward(x_0, c):
    """The cosine of the angle between image and prompt: (B,), -1 to 1."""
    return nn.functional.cosine_similarity(x_0, c)


def pretrain(steps=1000):
    """The base model, by Eq. (1), flow matching: images of a ring, with prompts at random."""
    width = 128
    layers = [nn.Linear(5, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()]
    net = nn.Sequential(*layers, nn.Linear(width, 2))
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(steps):
        x_0 = 2 * prompts(512) + 0.1 * torch.randn(512, 2)
        t, x_t, v = noised(x_0)
        loss = (predict(net, x_t, t, prompts(512)) - v).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


def train(base, iterations=40, beta=1.0, reward=reward, weigh=optimality_reward):
    """Algorithm 1. Returns the trained model, and the mean reward of each iteration."""
    theta, old = copy.deepcopy(base), copy.deepcopy(base)
    optimizer = torch.optim.Adam(theta.parameters(), 1e-3)
    # 16 prompts an iteration, and 24 images of each.
    group = torch.arange(16).repeat_interleave(24)
    rewards = []
    for i in range(1, iterations + 1):
        # Collect: by the old policy, and any solver.
        c = prompts(16)[group]
        x_0 = sample(old, c)
        # Reward: how good is an image among those of its prompt? r is in [0, 1].
        raw = reward(x_0, c)
        r = weigh(raw, group)
        # Optimize: noise the images, and contrast the good with the bad.
        for _ in range(4):
            t, x_t, _ = noised(x_0)
            x0_theta = x_t - t * predict(theta, x_t, t, c)
            x0_old = x_t - t * predict(old, x_t, t, c)
            optimizer.zero_grad()
            nft_loss(x0_theta, x0_old, x_0, r, beta).mean().backward()
            optimizer.step()
        # Update: the old policy follows.
        keep = soft_update_decay(i)
        for p_old, p in zip(old.parameters(), theta.parameters(), strict=True):
            p_old.data.lerp_(p.data, 1 - keep)
        rewards.append(raw.mean().item())
        if i % 10 == 0:
            print(f"iteration {i:3d}   mean reward {rewards[-1]:+.2f}")
    return theta, rewards


if __name__ == "__main__":
    torch.manual_seed(0)
    train(pretrain())
