"""Control: a diffusion policy of a pendulum, cloned from a poor controller, improved by its return.

    pip install gymnasium matplotlib
    python examples/studies/control.py          # a table, and control.png beside this file

In gymnasium's Pendulum-v1 what is seen is the prompt, four torques are the picture, and the reward
is the discounted return from there on. A group is 8 episodes from one start; only their first three
choices are trained on: later ones do not stand in equal states. "Whole episodes" trains on every
choice of episodes from the task's own starts, and collapses. Settings: the best of four on another
seed. DPPO (arXiv 2409.00588) and FPO (2507.21053) are not run. blackbox.py has the flow, finds nft.
SPDX-License-Identifier: MIT
"""

import argparse
import copy
import functools
from pathlib import Path

import blackbox
import torch

import nft

# Torques of one choice, in units of the motor's limit, 2 N m.
CHUNK = 4
GROUP_SIZE = 8
ITERATIONS = 30
EVERY = 5
# What is seen: the cosine and sine of the angle, 0 upright, and the speed in units of 8 rad/s.
UNITS = torch.tensor([1.0, 1.0, 8.0])


def some_starts(n, fastest=1.0):
    """n starts (n, 2): any angle, and a speed up to `fastest` (1 is the task's own)."""
    return (2 * torch.rand(n, 2) - 1) * torch.tensor([torch.pi, fastest])


def play(choose, starts, steps=200, chunk=CHUNK):
    """B episodes from starts (B, 2) of D choices by choose: seen (B, 3) -> torques (B, chunk).

    Returns what is seen (D, B, 3), the torques (D, B, chunk) in [-1, 1] and the rewards (D, B).
    """
    import gymnasium

    # The task's step is arithmetic on its state, so one pendulum of arrays is all B at once.
    pendulum = gymnasium.make("Pendulum-v1").unwrapped
    pendulum.state = starts.T.double().numpy()
    angle, speed = starts.T
    now = torch.stack([angle.cos(), angle.sin(), speed]).numpy()
    rows = []
    for _ in range(steps // chunk):
        seen = torch.from_numpy(now).T / UNITS
        torques = choose(seen).clamp(-1, 1)
        rewards = torch.zeros(len(starts))
        for torque in torques.T:
            now, reward, *_ = pendulum.step(2 * torque[None].numpy())
            rewards += torch.from_numpy(reward).float()
        rows.append((seen, torques, rewards))
    return [torch.stack(parts) for parts in zip(*rows, strict=True)]


def mediocre(seen):
    """The controller that is cloned, (B, 3) -> (B, 1): it brakes too little at the top."""
    cosine, sine, speed = (seen * UNITS).T
    # Below the energy of standing upright, push along; above it, against.
    missing = 15 * (1 - cosine) - speed.square() / 2
    swing = torch.where((speed >= 0) == (missing > 0), 1.0, -1.0)
    hold = -6 * torch.atan2(sine, cosine) - 0.3 * speed
    torque = torch.where(cosine > 0.9, hold, swing) + 0.7 * torch.randn(len(seen))
    return torque[:, None] / 2


def clone(seed, episodes=128):
    """A policy fitted to the controller, and the controller's return."""
    torch.manual_seed(seed)
    seen, torques, rewards = play(mediocre, some_starts(episodes), chunk=1)
    # Each window of four torques follows what was seen before its first: (N, 4).
    x_0 = torques[:, :, 0].unfold(0, CHUNK, 1).flatten(0, 1)
    return blackbox.fit(x_0, seen[: 1 - CHUNK].flatten(0, 1), steps=2000), rewards.sum(0).mean()


def evaluate(net):
    """Episodes of 64 held-out starts, the same every time, as is the noise."""
    with torch.random.fork_rng():
        torch.manual_seed(1234)
        return play(functools.partial(blackbox.sample, net, steps=5), some_starts(64))


def optimality(rewards, choices):
    """r in [0, 1] of episodes' first choices, by the discounted return: (D, B) -> (choices, B)."""
    returns = rewards.clone()
    for d in range(len(rewards) - 2, -1, -1):
        returns[d] += 0.95**CHUNK * returns[d + 1]
    grouped = returns[:choices].view(choices, -1, GROUP_SIZE)
    # Starts differ far more than a start's episodes do, so Z_c is the spread within the groups.
    raw = (grouped - grouped.mean(2, keepdim=True)).flatten()
    groups = torch.arange(len(raw)) // GROUP_SIZE
    return nft.optimality_reward(raw, groups, z=2.0).view(choices, -1)


def improve(net, iterations, loss=nft.nft_loss, groups=32, steps=60, choices=3, fastest=8.0):
    """Algorithm 1; returns the evaluations, before it and every EVERY iterations."""
    theta = copy.deepcopy(net)
    old = copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.Adam(theta.parameters(), 1e-3)
    evaluations = [evaluate(theta)]
    for i in range(1, iterations + 1):
        starts = some_starts(groups, fastest).repeat_interleave(GROUP_SIZE, 0)
        seen, x_0, rewards = play(functools.partial(blackbox.sample, old, steps=5), starts, steps)
        seen = seen[:choices].flatten(0, 1)
        x_0 = x_0[:choices].flatten(0, 1)
        r = optimality(rewards, choices).flatten()
        for _ in range(10):
            j = torch.randint(len(x_0), (1024,))
            blackbox.take_step(theta, old, optimizer, x_0[j], seen[j], r[j], loss, beta=1.0)
        eta = nft.soft_update_decay(i)
        for p_old, p in zip(old.parameters(), theta.parameters(), strict=True):
            p_old.lerp_(p.detach(), 1 - eta)
        if i % EVERY == 0:
            evaluations.append(evaluate(theta))
    return evaluations


METHODS = {
    "NFT": {},
    "without the negative branch": {"loss": blackbox.positive_loss},
    "NFT, whole episodes": {"groups": 10, "steps": 200, "choices": 50, "fastest": 1.0},
}


def compare(seeds, iterations):
    """{policy: its returns as it learns}, one a seed; the last NFT's first and last evaluation."""
    torch.set_num_threads(1)
    of_seeds = []
    evaluations = {}
    for seed in seeds:
        net, controller = clone(seed)
        curves = {"the poor controller": controller.expand(1 + iterations // EVERY)}
        for name, method in METHODS.items():
            torch.manual_seed(seed)
            evaluations[name] = improve(net, iterations, **method)
            curves[name] = torch.stack([rewards.sum(0).mean() for *_, rewards in evaluations[name]])
        curves["cloned from it"] = curves["NFT"][:1].expand(1 + iterations // EVERY)
        of_seeds.append(curves)
    return of_seeds, evaluations["NFT"][0], evaluations["NFT"][-1]


def draw(path, of_seeds, before, after):
    """Returns as it learns, a thin line a seed; below, an episode before and after."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.5), layout="constrained")
    top, below = figure.subplots(2, 1, height_ratios=[5, 2])
    blackbox.plot(top, of_seeds)
    top.set(xlabel=f"evaluations, {EVERY} iterations apart", ylabel="return of 64 held-out starts")
    top.legend()
    # The held-out start that hangs lowest: its rod every 12 steps, from left to right.
    i = before[0][0, :, 0].argmin()
    for row, (seen, _, _) in enumerate((after, before)):
        cosine, sine, _ = seen[::3, i].T
        below.quiver(range(len(sine)), row + 0 * sine, sine, cosine, color="C3", width=0.003)
    below.set(ylim=(-0.7, 1.7), yticks=(0, 1), yticklabels=("NFT", "cloned"))
    figure.savefig(path, dpi=90)


def main(argv=None):
    """Clone, improve by each method, print a table and draw."""
    argparse.ArgumentParser(description=__doc__).parse_args(argv)
    of_seeds, before, after = compare(blackbox.SEEDS, ITERATIONS)
    blackbox.print_table({"return": of_seeds})
    draw(Path(__file__).with_suffix(".png"), of_seeds, before, after)


if __name__ == "__main__":
    main()
