"""Solutions of the exercises of lesson.ipynb, each a function that prints a small table.

    python examples/lesson/solutions.py             # all, in half a minute of one core
    python examples/lesson/solutions.py 3 7         # the third and the seventh
    python examples/lesson/solutions.py --seed 1

Each returns the numbers that it prints, so that a test can hold it to what the lesson says.
SPDX-License-Identifier: MIT
"""

import argparse
import functools
import sys
from pathlib import Path

import torch

LESSON = Path(__file__).resolve().parent
sys.path += [str(LESSON), str(LESSON / "../studies"), str(LESSON / "../..")]
import minimal
import toy_2d

import nft


@functools.cache
def ring(seed):
    """The pretrained network of minimal.py."""
    torch.manual_seed(seed)
    return minimal.pretrain()


@functools.cache
def base(seed):
    """The toy's pretrained network: shorter than toy_2d.py's own."""
    torch.manual_seed(seed)
    return toy_2d.fit(toy_2d.Net(), toy_2d.flow_matching, steps=1000)


def plane(seed, beta=1.0, **settings):
    """Rounds of Algorithm 1 from `base`: samples (4000, 2) of the trained network."""
    net = base(seed)
    torch.manual_seed(seed)
    theta, _ = toy_2d.online(net, beta, **settings)
    return toy_2d.sample(theta, 4000)


def mean_reward(x_0):
    return toy_2d.reward(x_0).mean().item()


def drop_the_negative_branch(seed=0):
    """1. Without the negative branch, learning turns into drifting away."""
    squared_alone = functools.partial(toy_2d.positive_only, distance=toy_2d.squared)
    losses = {
        "both branches": nft.nft_loss,
        "positive only": toy_2d.positive_only,
        "positive only, squared": squared_alone,
    }
    found = {}
    print("                           mean reward   distance from 0 (ring: 2)")
    for name, loss in losses.items():
        x_0 = plane(seed, loss=loss)
        found[name] = (mean_reward(x_0), x_0.norm(dim=1).mean().item())
        print(f"  {name:24s} {found[name][0]:11.2f} {found[name][1]:17.2f}")
    return found


def change_beta(seed=0):
    """2. beta says how far the optimum of one iteration lies: the smaller, the farther."""
    found = {}
    torch.manual_seed(seed)
    print("         at Eq. (6)'s optimum   online, 10 rounds of 100 updates")
    print("  beta   reward      spread     reward      spread")
    for beta in (0.05, 0.3, 1.0, 3.0):

        def best(x_t, t, beta=beta):
            return toy_2d.optimum(x_t, t, beta)

        found[beta] = []
        print(f"  {beta:4.2f}", end="")
        for x_0 in (
            toy_2d.sample(best, 4000),
            plane(seed, beta, iterations=10, updates=100, n=128),
        ):
            found[beta] += [mean_reward(x_0), x_0.std(0).mean().item()]
            print("{:9.2f} {:11.2f}".format(*found[beta][-2:]), end=" ")
        print()
    return found


def change_eta(seed=0):
    """3. eta says how slowly the old policy follows."""
    found = {}
    print("  eta             mean reward after 40 rounds")
    for eta in ("0", "0,0.001,0.5", "0.9"):
        found[eta] = mean_reward(plane(seed, eta=eta))
        print(f"  {eta:14s} {found[eta]:10.2f}")
    return found


def per_prompt(raw, groups):
    """nft.optimality_reward with Z_c of each prompt's own images, as section 3.3 allows: (B,)."""
    r = torch.empty(len(raw))
    for group in groups.unique():
        mine = groups == group
        r[mine] = nft.optimality_reward(raw[mine], groups[mine])
    return r


def loud(c):
    """Which prompts (B, 2) pay in a unit twenty times as large: those of the upper half."""
    return c[:, 1] > 0


def uneven_reward(x_0, c):
    """minimal.py's reward, in two units."""
    unit = torch.where(loud(c), 1.0, 0.05)
    return unit * minimal.reward(x_0, c)


def change_z(seed=0):
    """4. One Z_c for all prompts lets the loud ones drown the quiet ones."""
    found = {}
    print("                          loud prompts   quiet prompts   (mean cosine)")
    names = {"Z_c of the iteration": nft.optimality_reward, "Z_c of each prompt": per_prompt}
    for name, weigh in names.items():
        net = ring(seed)
        torch.manual_seed(seed)
        theta, _ = minimal.train(net, 15, weigh=weigh, reward=uneven_reward)
        c = minimal.prompts(4000)
        cosine = minimal.reward(minimal.sample(theta, c), c)
        found[name] = (cosine[loud(c)].mean().item(), cosine[~loud(c)].mean().item())
        print(f"  {name:22s} {found[name][0]:10.2f} {found[name][1]:15.2f}")
    return found


def projection(x_0, c):
    """A reward that looks like minimal.py's: how far a point lies in the prompt's direction."""
    return (x_0 * c).sum(1)


def hack_a_reward(seed=0):
    """5. A reward without a top is pushed beyond all that the base model ever painted."""
    found = {}
    net = ring(seed)
    print("  trained on   projection   cosine   distance from the ring")
    for name, reward in (("nothing", None), ("cosine", minimal.reward), ("projection", projection)):
        torch.manual_seed(seed)
        theta = net
        if reward:
            theta, _ = minimal.train(net, 60, reward=reward)
        c = minimal.prompts(4000)
        x_0 = minimal.sample(theta, c)
        off = (x_0.norm(dim=1) - 2).abs()
        values = [projection(x_0, c), minimal.reward(x_0, c), off]
        found[name] = [value.mean().item() for value in values]
        print("  {:12s} {:10.2f} {:8.2f} {:24.2f}".format(name, *found[name]))
    return found


def compare_predictions(seed=0):
    """6. eps-, v- and flow-prediction: other outputs, the same x_0, the same loss."""
    torch.manual_seed(seed)
    x_0, eps, x0_theta, x0_old = torch.randn(4, 8, 2).double()
    r = torch.rand(8).double()
    beta = 0.3
    # The three kinds at once, on a schedule that all of them allow.
    t = torch.rand(8, 1).double()
    alpha_t = (torch.pi / 2 * t).cos()
    sigma_t = (torch.pi / 2 * t).sin()
    found = {}
    print("  prediction         loss by x_0   loss by mixed outputs")
    for kind in ("epsilon", "v_prediction", "flow_prediction"):
        if kind == "flow_prediction":
            alpha_t, sigma_t = nft.alpha_sigma(t)
        x_t = alpha_t * x_0 + sigma_t * eps

        def output(x_0_hat, kind=kind, x_t=x_t, alpha_t=alpha_t, sigma_t=sigma_t):
            """What a network says that means the clean sample x_0_hat."""
            eps_hat = (x_t - alpha_t * x_0_hat) / sigma_t
            if kind == "epsilon":
                return eps_hat
            if kind == "v_prediction":
                return alpha_t * eps_hat - sigma_t * x_0_hat
            return eps_hat - x_0_hat

        out_theta = output(x0_theta)
        out_old = output(x0_old)
        out_positive = (1 - beta) * out_old + beta * out_theta
        out_negative = (1 + beta) * out_old - beta * out_theta
        positive, _ = nft.predict_x0(x_t, out_positive, alpha_t, sigma_t, kind)
        negative, _ = nft.predict_x0(x_t, out_negative, alpha_t, sigma_t, kind)
        mixed = r * nft.adaptive_loss(positive, x_0) + (1 - r) * nft.adaptive_loss(negative, x_0)
        direct = nft.nft_loss(x0_theta, x0_old, x_0, r, beta)
        found[kind] = (direct.mean().item(), (mixed / beta).mean().item())
        print(f"  {kind:16s} {found[kind][0]:13.6f} {found[kind][1]:18.6f}")
    return found


def check_eq_6(seed=0):
    """7. A world of three clean samples: Eq. (6) from the table, and by gradient descent."""
    x_0 = torch.tensor([[-1.0], [0.5], [2.0]], dtype=torch.float64)
    r = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    # p(x_0 | x_t) at one point x_t, which is all that Eq. (5) needs there.
    posterior = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    x_t = 0.4
    t = 0.6
    beta = 0.5
    v = (x_t - x_0) / t
    v_old = posterior @ v
    alpha = posterior @ r
    v_positive = (posterior * r) @ v / alpha
    delta = alpha * (v_positive - v_old)
    v_theta = v_old.clone().requires_grad_()
    for _ in range(200):
        squared = nft.nft_loss(v_theta.expand(3, 1), v_old.expand(3, 1), v, r, beta, toy_2d.squared)
        (gradient,) = torch.autograd.grad(posterior @ squared, v_theta)
        with torch.no_grad():
            v_theta -= 0.3 * gradient
    predicted = (v_old + 2 / beta * delta).item()
    print(f"  v_old {v_old.item():.6f}   v* by Eq. (6) {predicted:.6f}", end="   ")
    print(f"by gradient descent {v_theta.item():.6f}")
    return predicted, v_theta.item()


def use_rough_samples(seed=0):
    """8. Train on samples of three solver steps, and sample with twenty afterwards."""
    found = {}
    print("  steps of the rollouts   mean reward, sampled with 20 steps")
    for steps in (20, 3):
        found[steps] = mean_reward(plane(seed, steps=steps))
        print(f"  {steps:15d} {found[steps]:20.2f}")
    return found


EXERCISES = (
    drop_the_negative_branch,
    change_beta,
    change_eta,
    change_z,
    hack_a_reward,
    compare_predictions,
    check_eq_6,
    use_rough_samples,
)


def main(argv=None):
    """Solve the exercises that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    everything = range(1, len(EXERCISES) + 1)
    parser.add_argument("numbers", nargs="*", type=int, help="of exercises; none: all")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for number in args.numbers:
        if number not in everything:
            parser.error(f"{number}: must be from 1 to {len(EXERCISES)}; leave it out for all")
    # The networks are small: threads would wait for each other.
    torch.set_num_threads(1)
    for number in args.numbers or everything:
        solve = EXERCISES[number - 1]
        print(solve.__doc__)
        solve(args.seed)


if __name__ == "__main__":
    main()
