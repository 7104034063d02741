"""Control: a diffusion policy of a pendulum, cloned from a poor controller, improved by its return.

    pip install gymnasium matplotlib
    python examples/studies/control.py              # a table and runs/control.png, three seeds
    python examples/studies/control.py --quick      # one seed, 10 iterations: too few to gain

The task is gymnasium's Pendulum-v1: swing a rod up by a motor that is too weak to lift it, and hold
it. The policy is a small flow of four torques given the observation. It is cloned from a controller
that overshoots. Then nft.nft_loss improves it: an observation is the prompt, four torques are the
picture, and the reward is the discounted return from there on. A group is 8 episodes from one start
anywhere in the state space, each 60 steps long. Their first three choices are trained on, because
later ones no longer stand in equal states, and the group's mean says nothing about them.

The neighbours for which this stands fine-tune diffusion policies online. DPPO (arXiv 2409.00588)
makes each denoising step a decision, whose Gaussian likelihood PPO needs. FPO (arXiv 2507.21053)
puts the difference of two flow-matching losses where PPO has its ratio. Both are PPO with a critic.
Here there is neither a critic nor a likelihood nor a ratio.

Not claimed: that this is a good method of reinforcement learning. One small task is shown, neither
DPPO nor FPO is run, and a group needs a simulator that starts where it is told. The third method
has no such starts: episodes of 200 steps from the task's own, and every choice is trained on. It
collapses.

The settings were chosen among four tried on seed 100, which is not among those shown: squared or
adaptive distance, one or three choices trained on, discount 0.9 or 0.95.
SPDX-License-Identifier: MIT
"""

import argparse
import copy
import functools
import importlib.util
import math
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))
import nft

# Torques of one choice, in units of the motor's limit, 2 N m.
CHUNK = 4
LIMIT = 2.0
# The discount of a step.
GAMMA = 0.95
GROUP_SIZE = 8
ITERATIONS = 30
SEEDS = (0, 1, 2)
# The task's own length of an episode.
STEPS = 200
# Iterations from one evaluation to the next.
EVERY = 5


class Episodes(NamedTuple):
    """B episodes of D choices."""

    # What is seen before each choice, (D, B, 3): cosine, sine, and speed / 8.
    seen: torch.Tensor
    # The torques, (D, B, 4), in [-1, 1].
    chunks: torch.Tensor
    # The reward of each choice, (D, B): the sum over its four steps.
    rewards: torch.Tensor


def some_starts(n, fastest=1.0):
    """n starts (n, 2): any angle, 0 upright, and a speed up to `fastest` (1 is the task's own)."""
    uniform = 2 * torch.rand(n, 2) - 1
    return uniform * torch.tensor([math.pi, fastest])


def play(choose, starts, steps=STEPS, chunk=CHUNK):
    """Episodes from starts (B, 2) of choose, which is seen (B, 3) -> torques (B, chunk)."""
    import gymnasium

    # The task's step is arithmetic on its state, so one pendulum of arrays is all B at once.
    pendulum = gymnasium.make("Pendulum-v1").unwrapped
    pendulum.reset()
    pendulum.state = starts.T.double().numpy()
    angle, speed = starts.T
    now = torch.stack([angle.cos(), angle.sin(), speed]).numpy()
    rows = []
    for _ in range(steps // chunk):
        seen = torch.from_numpy(now).T / torch.tensor([1.0, 1.0, 8.0])
        torques = choose(seen).clamp(-1, 1)
        rewards = 0
        for torque in torques.T:
            now, reward, *_ = pendulum.step(LIMIT * torque[None].numpy())
            rewards = rewards + torch.from_numpy(reward).float()
        rows.append((seen, torques, rewards))
    return Episodes(*(torch.stack(part) for part in zip(*rows, strict=True)))


def mediocre(seen):
    """The controller that is cloned, (B, 3) -> (B, 1): it brakes too little at the top."""
    cosine, sine, speed = (seen * torch.tensor([1.0, 1.0, 8.0])).T
    angle = torch.atan2(sine, cosine)
    # Below the energy of standing upright, push along; above it, against.
    missing = 15 * (1 - cosine) - speed.square() / 2
    swing = torch.where((speed >= 0) == (missing > 0), 1.0, -1.0)
    hold = -6 * angle - 0.3 * speed
    torque = torch.where(cosine > 0.9, hold, swing) + 0.7 * torch.randn(len(seen))
    return (torque / LIMIT).clamp(-1, 1)[:, None]


# ---- The policy ----------------------------------------------------------------------------------
class Net(torch.nn.Module):
    """v_theta(x_t, t, seen): (B, 4), (B, 1), (B, 3) -> (B, 4)."""

    def __init__(self, width=128):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(CHUNK + 6, width),
            torch.nn.GELU(),
            torch.nn.Linear(width, width),
            torch.nn.GELU(),
            torch.nn.Linear(width, width),
            torch.nn.GELU(),
            torch.nn.Linear(width, CHUNK),
        )

    def forward(self, x_t, t, seen):
        """The velocity."""
        angle = math.pi * t
        return self.layers(torch.cat([x_t, t, angle.cos(), angle.sin(), seen], 1))


def noised(x_0):
    """A time in (0.02, 1] for each x_0, x_t, and v = eps - x_0: (B, 1), (B, 4), (B, 4)."""
    t = 1 - 0.98 * torch.rand(len(x_0), 1)
    eps = torch.randn_like(x_0)
    alpha_t, sigma_t = nft.alpha_sigma(t)
    return t, alpha_t * x_0 + sigma_t * eps, eps - x_0


@torch.no_grad()
def sample(net, seen, steps=5):
    """Torques (B, 4) by the midpoint rule, from t = 1 to 0."""
    x = torch.randn(len(seen), CHUNK)
    for i in range(steps, 0, -1):
        t = torch.full((len(seen), 1), i / steps)
        halfway = x - net(x, t, seen) / (2 * steps)
        x = x - net(halfway, t - 0.5 / steps, seen) / steps
    return x


def mean_return(episodes):
    """The mean over episodes of the whole reward, as the task counts it."""
    return episodes.rewards.sum(0).mean().item()


def clone(seed, episodes=128, updates=2000, batch=512, lr=2e-3):
    """A policy fitted to the controller by flow matching, Eq. (1); and the controller's return."""
    torch.manual_seed(seed)
    shown = play(mediocre, some_starts(episodes), chunk=1)
    # Each window of four torques follows what was seen before its first: (N, 4).
    x_0 = shown.chunks[:, :, 0].unfold(0, CHUNK, 1).flatten(0, 1)
    seen = shown.seen[: 1 - CHUNK].flatten(0, 1)
    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    for _ in range(updates):
        index = torch.randint(len(x_0), (batch,))
        t, x_t, v = noised(x_0[index])
        optimizer.zero_grad()
        (net(x_t, t, seen[index]) - v).square().mean().backward()
        optimizer.step()
        schedule.step()
    return net, mean_return(shown)


def evaluate(net):
    """Episodes of 64 held-out starts, the same every time, as is the noise."""
    with torch.random.fork_rng():
        torch.manual_seed(1234)
        return play(functools.partial(sample, net), some_starts(64))


# ---- The method ----------------------------------------------------------------------------------
def to_go(rewards):
    """The discounted reward from each choice on: (D, B) -> (D, B)."""
    returns = rewards.clone()
    for d in range(len(rewards) - 2, -1, -1):
        returns[d] += GAMMA**CHUNK * returns[d + 1]
    return returns


def optimality(returns, z=2.0):
    """r (D, B) in [0, 1] of returns (D, B); a group is one choice of the episodes of one start."""
    grouped = returns.view(len(returns), -1, GROUP_SIZE)
    # Starts differ far more than a start's episodes do, so Z_c is the spread within the groups.
    raw = (grouped - grouped.mean(2, keepdim=True)).flatten()
    groups = torch.arange(len(raw)) // GROUP_SIZE
    return nft.optimality_reward(raw, groups, z).view_as(returns)


def positive_loss(x0_theta, x0_old, x_0, r, beta):
    """Eq. (5) without its negative branch: (B,)."""
    x0_positive = (1 - beta) * x0_old + beta * x0_theta
    return r * nft.adaptive_loss(x0_positive, x_0) / beta


class Method(NamedTuple):
    """How a method plays and learns; all play 15,360 or 16,000 steps an iteration."""

    loss: object = nft.nft_loss
    groups: int = 32
    steps: int = 60
    # The choices of each episode that are trained on, from its first.
    trained_on: int = 3
    # Of the starts, rad/s; 8 is the fastest that the task allows.
    fastest: float = 8.0


METHODS = {
    "NFT": Method(),
    "without the negative branch": Method(loss=positive_loss),
    "NFT, whole episodes": Method(groups=10, steps=STEPS, trained_on=STEPS // CHUNK, fastest=1.0),
}


def learn(theta, old, optimizer, D, method, updates=10, batch=1024):
    """The optimizer steps of an iteration on its episodes D."""
    first = slice(method.trained_on)
    seen = D.seen[first].flatten(0, 1)
    x_0 = D.chunks[first].flatten(0, 1)
    r = optimality(to_go(D.rewards)[first]).flatten()
    for _ in range(updates):
        index = torch.randint(len(x_0), (batch,))
        t, x_t, _ = noised(x_0[index])
        # nft.predict_x0 of a rectified flow.
        x0_theta = x_t - t * theta(x_t, t, seen[index])
        x0_old = x_t - t * old(x_t, t, seen[index])
        optimizer.zero_grad()
        method.loss(x0_theta, x0_old, x_0[index], r[index], beta=1.0).mean().backward()
        torch.nn.utils.clip_grad_norm_(theta.parameters(), 1.0)
        optimizer.step()


def improve(net, method, iterations=ITERATIONS):
    """Algorithm 1; returns the trained policy, and its mean held-out returns as it learned."""
    theta = copy.deepcopy(net)
    old = copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.Adam(theta.parameters(), 1e-3)
    curve = [mean_return(evaluate(theta))]
    for i in range(1, iterations + 1):
        starts = some_starts(method.groups, method.fastest).repeat_interleave(GROUP_SIZE, 0)
        D = play(functools.partial(sample, old), starts, method.steps)
        learn(theta, old, optimizer, D, method)
        eta = nft.soft_update_decay(i)
        with torch.no_grad():
            for p_old, p in zip(old.parameters(), theta.parameters(), strict=True):
                p_old.lerp_(p, 1 - eta)
        if i % EVERY == 0:
            curve.append(mean_return(evaluate(theta)))
    return theta, curve


# ---- What is printed and drawn -------------------------------------------------------------------
def draw_strip(panel, title, seen):
    """An episode's rod, left to right, every 12 steps: seen (D, 3) of choices."""
    for x, (cosine, sine, _) in enumerate(seen[::3].tolist()):
        panel.plot([2.4 * x, 2.4 * x + sine], [0, cosine], color="C3", linewidth=2.5)
        panel.plot(2.4 * x, 0, "k.", markersize=3)
    panel.set_title(title, fontsize=9, loc="left")
    panel.set_aspect("equal")
    panel.set_ylim(-1.15, 1.15)
    panel.axis("off")


def draw(path, curves, before, after):
    """Returns against steps, a thin line a seed; below it an episode before and after."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.5), layout="constrained")
    top, first, second = figure.subplots(3, 1, height_ratios=[5, 1, 1])
    for color, (name, of_seeds) in enumerate(curves.items()):
        played = METHODS[name].groups * GROUP_SIZE * METHODS[name].steps
        mean = np.mean(of_seeds, 0)
        x = EVERY * played / 1000 * np.arange(len(mean))
        for curve in of_seeds:
            top.plot(x, curve, color=f"C{color}", linewidth=0.6, alpha=0.6)
        top.plot(x, mean, color=f"C{color}", label=name)
    cloned = np.mean([curve[0] for curve in curves["NFT"]])
    top.axhline(cloned, color="0.6", linestyle="dashed", label="cloned policy")
    top.set_xlabel("thousands of steps played (NFT: 1000 are 16.7 episodes)")
    top.set_ylabel("mean return of 64 held-out starts")
    top.legend()
    # The held-out start that hangs lowest.
    i = before.seen[0, :, 0].argmin()
    for panel, name, D in ((first, "cloned", before), (second, "NFT", after)):
        score = D.rewards[:, i].sum()
        title = f"{name}, seed 0: an episode from near the bottom, return {score:.0f}"
        draw_strip(panel, title, D.seen[:, i])
    figure.savefig(path, dpi=90)


def print_table(curves, controllers):
    """The controller, the cloned policy, and each method at the end: the mean and each seed's."""
    rows = {"controller, its own starts": controllers}
    rows["cloned policy"] = [curve[0] for curve in curves["NFT"]]
    for method, of_seeds in curves.items():
        rows[method] = [curve[-1] for curve in of_seeds]
    for name, returns in rows.items():
        each = ", ".join(f"{x:.0f}" for x in returns)
        print(f"  {name:28s} {np.mean(returns):6.0f} ({each})")


def compare(seeds, iterations):
    """Clone, and improve by each method; prints the returns. iterations: a multiple of EVERY.

    Returns the controller's returns, {method: a curve a seed}, and the evaluations of the first
    seed's cloned policy and of what NFT made of it.
    """
    # The layers are small, and threads would change the last digits.
    torch.set_num_threads(1)
    controllers = []
    curves = {name: [] for name in METHODS}
    for seed in seeds:
        net, controller = clone(seed)
        controllers.append(controller)
        for name, method in METHODS.items():
            torch.manual_seed(seed)
            theta, curve = improve(net, method, iterations)
            curves[name].append(curve)
            print(f"seed {seed}, {name}:", *[f"{x:.0f}" for x in curve], flush=True)
            if seed == seeds[0] and name == "NFT":
                before = evaluate(net)
                after = evaluate(theta)
    print_table(curves, controllers)
    return controllers, curves, before, after


def main(argv=None):
    """Clone, improve by each method, print a table and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed, 10 iterations")
    parser.add_argument("--out", type=Path, default=Path("runs/control.png"))
    args = parser.parse_args(argv)
    for package in ("gymnasium", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            parser.error(f"this study needs {package}: pip install {package}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    seeds = SEEDS
    iterations = ITERATIONS
    if args.quick:
        seeds = SEEDS[:1]
        iterations = 10
    _, curves, before, after = compare(seeds, iterations)
    draw(args.out, curves, before, after)
    print(f"{args.out}, {time.process_time():.0f} s of CPU")


if __name__ == "__main__":
    main()
