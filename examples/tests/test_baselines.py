"""The steps, weights and losses of baselines.py are the papers', and its methods train.

Each test's docstring states a law.
SPDX-License-Identifier: MIT
"""

import functools
import itertools
import re
import types

import baselines
import common
import pytest
import torch
from torch.distributions import Normal, kl_divergence

import nft

MODELS = pytest.mark.parametrize("name", ("sd15", "sd3"))
STEP_METHODS = [name for name, row in baselines.METHODS.items() if row.loss]
# All steps of an image have its advantage, and its ratio is clipped.
RATIO_METHODS = [name for name in STEP_METHODS if not baselines.METHODS[name].spread]
# The pairs of three images and five steps.
INDEX = torch.arange(3).repeat(5)
K = torch.arange(5).repeat_interleave(3)
# An advantage for each of the three images.
A = torch.tensor([-2.0, 0.5, 2.0])


def assert_near(found, expected, atol, rtol=0.0):
    """Both are equal but for rounding; whatever their precision is."""
    found = found.detach().double()
    torch.testing.assert_close(found, expected.detach().double(), atol=atol, rtol=rtol)


# ---- Chains and Gaussians ------------------------------------------------------------------------
def configured(name, **changes):
    """The settings of a small run of a baseline."""
    own = {"out": common.root() / "unused", "steps": 5, "eta": "0"}
    return nft.configure(**common.settings(name, **(own | changes)))


def rollout(chain):
    """Three images of a chain."""
    return chain.sample(common.TEXTS, common.SEEDS, "old")


@functools.cache
def sampled(name):
    """A chain of five steps and its images: change neither."""
    chain = baselines.Chain(configured(name))
    return chain, rollout(chain)


def shift(adapter):
    """Add noise to an adapter."""
    for x in adapter:
        x.data += 0.03 * torch.randn(x.shape)


def moved_chain(name, **changes):
    """A new chain and its images: theta, old and base are apart."""
    chain = baselines.Chain(configured(name, **changes))
    torch.manual_seed(1)
    shift(chain.lora.adapters["old"])
    D = rollout(chain)
    shift(chain.lora.adapters["theta"])
    return chain, D


def predicted(chain, D, policy):
    """The denoiser's outputs (15, ...) for all pairs."""
    condition = nft.map_tensors(lambda c: c[INDEX], D["condition"])
    x = D["path"][INDEX, K]
    t = chain.step_times[K]
    return chain.predict(x, t, condition, policy)


def gradient(chain, loss):
    """The gradient of a sum of losses by theta, in one row."""
    theta = chain.lora.adapters["theta"]
    options = {"allow_unused": True, "materialize_grads": True}
    gradients = torch.autograd.grad(loss.sum(), theta, **options)
    return torch.cat([x.flatten() for x in gradients])


def made_up_steps():
    """k (30,) and x, out, x_next (30, 4, 8, 8) in float64: six samples at each of five steps."""
    torch.manual_seed(0)
    k = torch.arange(5).repeat_interleave(6)
    x, out, noise = torch.randn(3, 30, 4, 8, 8, dtype=torch.float64)
    x_next = x + 0.3 * noise
    return k, x, out, x_next


def as_rows(numbers):
    """(b,) -> (b, 1, 1, 1)."""
    return numbers.view(-1, 1, 1, 1)


def posterior(chain, k, x, eps):
    """DDPM's q(x_{t-1} | x_t, x_0), Eq. (6) and (7), at the predicted x_0, in float64."""
    # Stable Diffusion's schedule, and the times of five steps.
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas_cumprod = (1 - betas).cumprod(0)
    t = torch.tensor([801, 601, 401, 201, 1])[k]
    t_next = (t - 200).clamp(min=0)
    bar = as_rows(alphas_cumprod[t])
    bar_next = as_rows(alphas_cumprod[t_next])
    alpha = bar / bar_next
    x_0 = (x - (1 - bar).sqrt() * eps) / bar.sqrt()
    mean = bar_next.sqrt() * (1 - alpha) / (1 - bar) * x_0
    mean = mean + alpha.sqrt() * (1 - bar_next) / (1 - bar) * x
    std = ((1 - bar_next) / (1 - bar) * (1 - alpha)).sqrt()
    return Normal(mean, std.expand_as(x))


def reverse_sde(chain, k, x, v):
    """A step of dx = (v - sigma^2 / 2 score) dt + sigma dw, score = -eps / t, in float64."""
    levels = chain.solver.sigmas.double()
    t = as_rows(levels[k])
    dt = as_rows(levels[k + 1]) - t
    # At t = 1 the code of FlowGRPO takes the next time.
    t_below_1 = torch.where(t == 1, levels[1], t)
    sigma = 0.7 * (t / (1 - t_below_1)).sqrt()
    # x_0 = x - t v and eps = x_0 + v.
    eps = x + (1 - t) * v
    mean = x + (v + sigma**2 / 2 * eps / t) * dt
    std = sigma * (-dt).sqrt()
    return Normal(mean, std.expand_as(x))


GAUSSIANS = {"sd15": posterior, "sd3": reverse_sde}


@MODELS
def test_log_probability_of_a_step(name):
    """Mean, std and log-probability of a step are those of a Gaussian derived another way."""
    chain, _ = sampled(name)
    k, x, out, x_next = made_up_steps()
    expected = GAUSSIANS[name](chain, k, x, out)
    mean, std = chain.solver.gaussian(x.float(), out.float(), k)
    assert_near(mean, expected.mean, 2e-5, 2e-5)
    # 1 - alpha_bar cancels at t = 1.
    assert_near(std.expand_as(x), expected.stddev, 0, 1e-3)
    found = baselines.log_prob(x_next, mean.double(), std.double())
    averaged = expected.log_prob(x_next).mean((1, 2, 3))
    assert_near(found, averaged, 1e-3, 3e-3)


def test_ddim_step_is_diffusers():
    """Given the noise, a step is DDIMScheduler.step with eta = 1."""
    from diffusers import DDIMScheduler

    chain, _ = sampled("sd15")
    k, x, out, noise = made_up_steps()
    scheduler = DDIMScheduler.from_pretrained(common.root() / "sd15/scheduler")
    scheduler.set_timesteps(5)
    mean, std = chain.solver.gaussian(x, out, k)
    found = mean + std * noise
    for i, t in enumerate(scheduler.timesteps):
        rows = k == i
        options = {"eta": 1.0, "variance_noise": noise[rows]}
        expected = scheduler.step(out[rows], t, x[rows], **options)
        assert_near(found[rows], expected.prev_sample, 1e-5, 1e-5)


def test_flow_step_without_noise_is_euler():
    """As a -> 0 a step of FlowGRPO is FlowMatchEulerDiscreteScheduler's, and its std is 0."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    k, x, v, _ = made_up_steps()
    folder = common.root() / "sd3/scheduler"
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder)
    scheduler.set_timesteps(5)
    levels = scheduler.sigmas.double()
    t = as_rows(levels[k])
    t_next = as_rows(levels[k + 1])
    mean, std = baselines.flow_step(x, v, t, t_next, 1e-9, levels[1])
    assert (std < 1e-8).all()
    for i, time in enumerate(scheduler.timesteps):
        rows = k == i
        expected = scheduler.step(v[rows], time, x[rows])
        assert_near(mean[rows], expected.prev_sample, 1e-5, 1e-5)


@MODELS
def test_rollout_is_the_recorded_chain(name):
    """path and outs are what the pipeline went through, with noise of the images' own keys."""
    chain, D = sampled(name)
    assert torch.equal(D["path"][:, -1], D["x_0"])
    for i, seed in enumerate(common.SEEDS):
        path = D["path"][i]
        mean, std = chain.solver.gaussian(path[:-1], D["outs"][i], torch.arange(5))
        generator = nft.generator(*seed, "steps")
        expected = [torch.randn(path.shape[1:], generator=generator) for _ in range(5)]
        assert_near((path[1:] - mean) / std, torch.stack(expected), 3e-3)
        alone = chain.sample([common.TEXTS[i]], [seed], "old")
        assert_near(alone["path"][0], path, 1e-3, 1e-3)


# FLUX's denoiser takes other times than its solver, and latents without height and width.
@pytest.mark.parametrize("name", ("sd15", "sd3", "flux"))
def test_denoiser_says_again_what_it_said(name):
    """The denoiser's output at the recorded latents, times and conditions is the recorded one."""
    chain, D = sampled(name)
    again = predicted(chain, D, "old")
    assert_near(again, D["outs"][INDEX, K], 1e-4, 1e-4)


@MODELS
def test_evaluation_is_by_the_own_solver(name):
    """Other policies than the one that is trained sample as nft.py does."""
    chain, _ = sampled(name)
    plain = nft.Model(chain.config)
    for policy in ("ema", None):
        found = chain.sample(common.TEXTS, common.SEEDS, policy)
        expected = plain.sample(common.TEXTS, common.SEEDS, policy)
        assert found.keys() == expected.keys()
        assert torch.equal(found["images"], expected["images"])


# ---- Weights -------------------------------------------------------------------------------------
def weigh(method, raw, **own):
    """The weights of rewards (prompts, K), in that shape."""
    groups = torch.arange(raw.numel()) // raw.shape[1]
    function = baselines.parts(method, **own)["weigh"]
    weights = function(raw.flatten().float(), groups, 5.0)
    assert weights.shape == groups.shape
    assert weights.dtype == torch.float32
    return weights.view(raw.shape)


def test_weights_by_hand():
    """Each method's weights of two prompts with four images each are those worked out by hand."""
    raw = torch.tensor([[1, 0, 0, 0], [2, 4, 6, 8]])
    # 1 - 0 and 0 - 1/3; 2 - 6, 4 - 16/3, 6 - 14/3 and 8 - 4.
    leave_one_out = torch.tensor([[3, -1, -1, -1], [-12, -4, 4, 12]]) / 3
    centred = torch.tensor([[3, -1, -1, -1], [-12, -4, 4, 12]]) / 4
    # The variances are 3/16 and 5.
    std = torch.tensor([[3 / 16], [5]]).sqrt()
    expected = {
        "loop": leave_one_out,
        "dpok": centred,
        "flowgrpo": centred / (std + 1e-4),
        "ddpo": centred / (std + 1e-6),
        "coca": centred / (std + 1e-6),
        "rtb": centred,
        "rft": torch.tensor([[1, 0, 0, 0], [0, 0, 1, 1]]),
    }
    for method, weights in expected.items():
        assert_near(weigh(method, raw), weights, 1e-6)
    exponentials = (raw / 2).exp()
    shares = exponentials / exponentials.sum(1, keepdim=True)
    assert_near(weigh("rwr", raw, temperature=2.0), 4 * shares, 1e-6)


def test_outliers_are_limited():
    """One image of n stands out by sqrt(n - 1); FlowGRPO's advantages end at 5, DDPO's at 10."""
    raw = torch.zeros(1, 401)
    raw[0, 7] = 1
    assert weigh("flowgrpo", raw).max() == 5
    assert weigh("ddpo", raw).max() == 10
    assert_near(weigh("ddpo", raw[:, :50]).max(), torch.tensor(7), 1e-4)


@pytest.mark.parametrize("method", [*STEP_METHODS, "rft"])
def test_equal_rewards_weigh_nothing(method):
    """Where all rewards of a prompt are equal their weights are 0, to the bit."""
    assert not weigh(method, torch.full((3, 12), 0.7)).any()


def test_leave_one_out_has_no_bias():
    """LOOP's mean of A d log p over all draws is the gradient of the mean reward.

    With the mean of all K as the baseline, as in DPOK's row, it is (K - 1) / K of that.
    """
    logits = torch.tensor([0.3, -0.5, 0.9], requires_grad=True)
    rewards = torch.tensor([1.0, 0, 5])
    p = logits.softmax(0)

    def by_logits(x):
        return torch.autograd.grad(x, logits, retain_graph=True)[0]

    true = by_logits(p @ rewards)
    for method, share in (("loop", 1), ("dpok", 2 / 3)):
        mean = torch.zeros(3)
        for draw in itertools.product(range(3), repeat=3):
            arms = torch.tensor(draw)
            weights = weigh(method, rewards[arms].view(1, 3))[0]
            score = (weights * p[arms].log()).mean()
            mean += p[arms].prod().item() * by_logits(score)
        assert_near(mean, share * true, 1e-6)


# ---- Losses --------------------------------------------------------------------------------------
def losses_of(method, chain, D, weights, **own):
    """The three losses of all pairs of a chain's images and steps. weights: (3,)."""
    losses = baselines.parts(method, **own)["losses"]
    torch.manual_seed(2)
    eps = torch.randn(15, 4, 8, 8)
    t = K if method in STEP_METHODS else chain.step_times[K]
    return losses(chain, D | {"r": weights}, INDEX, t, eps)


@MODELS
@pytest.mark.parametrize("method", STEP_METHODS)
def test_first_gradient_is_the_policy_gradient(name, method):
    """Before theta moves the loss is -A, its gradient -A d log p; KL and deviation are 0.

    RTB's loss is known up to a constant: it is 0.
    """
    chain, D = sampled(name)
    loss, kl, deviation = losses_of(method, chain, D, A)
    spread = baselines.parts(method)["losses"].keywords["spread"]
    weights = baselines.pair_weights(chain, D | {"r": A}, INDEX, K, spread)
    assert_near(loss, -weights * (method != "rtb"), 5e-5, 2e-5)
    assert_near(kl, torch.zeros(15), 1e-8)
    assert_near(deviation, torch.zeros(15), 1e-8)

    x = D["path"][INDEX, K].double()
    x_next = D["path"][INDEX, K + 1].double()
    out = predicted(chain, D, "theta").double()
    step = GAUSSIANS[name](chain, K, x, out)
    log_p = step.log_prob(x_next).mean((1, 2, 3))
    expected = gradient(chain, -weights * log_p)
    largest = expected.abs().max().item()
    assert largest > 1e-6
    assert_near(gradient(chain, loss), expected, 0.02 * largest)


@MODELS
def test_losses_after_a_move(name):
    """Once theta has moved, ratio, clipping, KL and deviation are those of Gaussians."""
    chain, D = moved_chain(name)
    x = D["path"][INDEX, K].double()
    x_next = D["path"][INDEX, K + 1].double()
    out = predicted(chain, D, "theta").double()
    out_old = D["outs"][INDEX, K].double()
    out_ref = predicted(chain, D, None).double()
    new = GAUSSIANS[name](chain, K, x, out)
    old = GAUSSIANS[name](chain, K, x, out_old)
    base = GAUSSIANS[name](chain, K, x, out_ref)
    log_ratio = new.log_prob(x_next) - old.log_prob(x_next)
    ratio = log_ratio.mean((1, 2, 3)).exp()
    assert ratio.min() < 0.999
    assert ratio.max() > 1.001
    from_old = (out - out_old).square().mean((1, 2, 3))
    from_base = (out - out_ref).square().mean((1, 2, 3))
    divergence = kl_divergence(new, base).mean((1, 2, 3))
    for sign, method in itertools.product((1.0, -1.0), RATIO_METHODS):
        weights = torch.full((3,), sign)
        loss, kl, deviation = losses_of(method, chain, D, weights, clip_range=1e-3)
        gain = sign * ratio.clamp(0.999, 1.001)
        if method != "dpok":
            gain = torch.minimum(sign * ratio, gain)
        assert_near(loss, -gain, 1e-4)
        assert_near(deviation, from_old, 1e-7, 1e-3)
        expected_kl = from_base if method == "dpok" else divergence
        assert_near(kl, expected_kl, 1e-7, 5e-3)


def test_clipping_stops_the_gradient():
    """Beyond the range PPO learns no more of what the advantage wants; DPOK learns nothing."""
    ratio = torch.tensor([0.8, 1, 1.2, 0.8, 1, 1.2], requires_grad=True)
    advantages = torch.tensor([2.0, 2, 2, -2, -2, -2])
    ppo = torch.tensor([1, 1, 0, 0, 1, 1])
    dpok = torch.tensor([0, 1, 0, 0, 1, 0])
    losses = {baselines.clipped_loss: ppo, baselines.one_sided_loss: dpok}
    # RTB never clips, and has no ratio in its gradient.
    losses[baselines.balance_loss] = 1 / ratio.detach()
    for function, learnt in losses.items():
        loss = function(ratio, advantages, 0.1)
        (found,) = torch.autograd.grad(loss.sum(), ratio)
        assert_near(found, -advantages * learnt, 1e-6)


@MODELS
def test_coca_shares_out_by_gains(name):
    """A step gets the part of the advantage that it and later steps earn, standardized."""
    chain, D = sampled(name)
    x = D["path"][INDEX, K].double()
    out = D["outs"][INDEX, K].double()
    if name == "sd15":
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        bar = as_rows((1 - betas).cumprod(0)[torch.tensor([801, 601, 401, 201, 1])[K]])
        x0_hat = (x - (1 - bar).sqrt() * out) / bar.sqrt()
    else:
        x0_hat = x - as_rows(chain.solver.sigmas.double()[K]) * out
    x_0 = D["x_0"][INDEX].double()
    lengths = x0_hat.flatten(1).norm(dim=1) * x_0.flatten(1).norm(dim=1)
    cosine = (x0_hat * x_0).sum((1, 2, 3)) / lengths
    # (3 images, 5 steps), and the end.
    s = torch.cat([cosine.view(5, 3).T, torch.ones(3, 1)], 1)
    gains = s.diff()
    shares = gains / gains.sum(1, keepdim=True)
    assert_near(shares.sum(1), torch.ones(3), 1e-9)
    earned = A.view(3, 1) * shares.flip(1).cumsum(1).flip(1)
    expected = (earned - earned.mean()) / earned.std(correction=0)
    found = baselines.shared_out(chain, D | {"r": A})
    assert_near(found, expected, 1e-4, 1e-3)
    assert not baselines.shared_out(chain, D | {"r": torch.zeros(3)}).any()


# ---- Relative trajectory balance -----------------------------------------------------------------
@MODELS
def test_balance_is_of_whole_trajectories(name):
    """RTB weighs a trajectory by its reward minus temperature log p_old / p_base, in nats."""
    chain, D = moved_chain(name)
    x = D["path"][INDEX, K].double()
    x_next = D["path"][INDEX, K + 1].double()
    old = GAUSSIANS[name](chain, K, x, D["outs"][INDEX, K].double())
    base = GAUSSIANS[name](chain, K, x, predicted(chain, D, None).double())
    nats = (old.log_prob(x_next) - base.log_prob(x_next)).sum((1, 2, 3)).view(5, 3).sum(0)
    assert nats.std() > 0.1
    assert_near(baselines.log_ratios(chain, D), nats, 2e-3, 1e-2)
    found = baselines.balanced(chain, D | {"r": A}, temperature=0.3)
    expected = A - 0.3 * (nats - nats.mean())
    assert_near(found, expected.view(3, 1).expand(3, 5), 1e-3, 1e-2)


class GaussianChain:
    """A chain of T = 5 Gaussian steps of a flow in float64, where everything is known.

    The denoiser of step k says slope_k x + offset_k of x (b, 2). theta = [offset (5, 2)] is learnt,
    the base's is `base`. All trajectories start at the same point: so Z is one number.
    """

    def __init__(self, images):
        torch.manual_seed(3)
        self.device = torch.device("cpu")
        self.config = types.SimpleNamespace(kl=0, group_size=images, batch_size=images // 2)
        self.solver = baselines.GaussianSolver(None, "flow_prediction", 0.7)
        self.solver.levels = torch.tensor([1, 0.8, 0.6, 0.4, 0.2, 0.0], dtype=torch.float64)
        self.step_times = torch.arange(5)
        self.slope = torch.randn(5, 1, dtype=torch.float64)
        self.base = torch.randn(5, 2, dtype=torch.float64)
        self.offset = self.base.clone().requires_grad_()
        self.lora = types.SimpleNamespace(adapters={"theta": [self.offset]})
        self.start = torch.tensor([0.3, -1.0], dtype=torch.float64)

    def predict(self, x, t, condition, policy):
        offset = self.base if policy is None else self.offset
        return self.slope[t] * x + offset[t]

    @torch.no_grad()
    def sample(self):
        """An iteration's trajectories, as Chain.sample has them."""
        N = self.config.group_size
        path = [self.start.expand(N, 2)]
        outs = []
        for step in range(5):
            k = torch.full((N,), step)
            outs.append(self.predict(path[-1], k, None, "theta"))
            mean, std = self.solver.gaussian(path[-1], outs[-1], k)
            path.append(mean + std * torch.randn(N, 2, dtype=torch.float64))
        D = {"x_0": path[-1], "condition": {}}
        return D | {"path": torch.stack(path, 1), "outs": torch.stack(outs, 1)}

    @torch.no_grad()
    def final(self, policy):
        """Mean (2,) and variance of x_0: steps are affine, so that two points tell each."""
        mean = self.start
        variance = 0.0
        for step in range(5):
            k = torch.full((2,), step)
            x = torch.stack([mean, mean + 1])
            next_mean, std = self.solver.gaussian(x, self.predict(x, k, None, policy), k)
            slope = (next_mean[1] - next_mean[0])[0].item()
            mean = next_mean[0]
            variance = slope**2 * variance + std[0].item() ** 2
        return mean, variance


def test_balance_has_the_tilted_distribution_as_its_optimum():
    """RTB learns p_base exp(r / temperature) / Z: its closed form on Gaussians, in float64.

    For r = g x_0 that is the base's Gaussian, moved by variance g / temperature. There each
    trajectory's residual is 0, not only their mean: so learning ends to many digits.
    """
    chain = GaussianChain(images=32)
    temperature = 0.5
    g = torch.tensor([0.4, -0.2], dtype=torch.float64)
    mean, variance = chain.final(None)
    parts = baselines.parts("rtb", temperature=temperature)
    optimizer = torch.optim.Adam([chain.offset], lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.98)
    index = torch.arange(32).repeat(5)
    k = torch.arange(5).repeat_interleave(32)
    for _ in range(300):
        D = chain.sample()
        D["r"] = parts["weigh"](D["x_0"] @ g, torch.zeros(32), 5.0).double()
        loss, _, _ = parts["losses"](chain, D, index, k, torch.zeros(160))
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        schedule.step()
    learnt, learnt_variance = chain.final("theta")
    assert (variance * g / temperature).norm() > 0.1
    assert_near(learnt, mean + variance * g / temperature, 1e-4)
    assert learnt_variance == pytest.approx(variance, abs=1e-12)
    D = chain.sample()
    D["r"] = D["x_0"] @ g
    D["r"] -= D["r"].mean()
    assert D["r"].std() > 0.1
    residual = baselines.balanced(chain, D, temperature)
    assert residual.abs().max() < 1e-3


def test_flow_kl_is_the_closed_form():
    """KL = dt / 2 (sigma (1 - t) / 2t + 1 / sigma)^2 |v - v_ref|^2, FlowGRPO Eq. (10)."""
    chain, _ = sampled("sd3")
    k, x, v, v_ref = made_up_steps()
    mean, std = chain.solver.gaussian(x, v, k)
    mean_ref, _ = chain.solver.gaussian(x, v_ref, k)
    levels = chain.solver.sigmas.double()
    t = levels[k]
    t_next = levels[k + 1]
    sigma = 0.7 * (t / (1 - t.clamp(max=levels[1]))).sqrt()
    factor = sigma * (1 - t) / (2 * t) + 1 / sigma
    factor = (t - t_next) / 2 * factor**2
    squared = (v - v_ref).square().mean((1, 2, 3))
    found = baselines.gaussian_kl(mean, mean_ref, std)
    assert_near(found, factor * squared, 0, 1e-5)


@MODELS
def test_denoising_loss_is_that_of_pretraining(name):
    """w |out - target|^2 at alpha x_0 + sigma eps; the target is eps, or eps - x_0 of a flow."""
    model, D = moved_chain(name)
    t = model.step_times[[0, 4, 2]]
    x_0 = D["x_0"]
    eps = torch.randn(x_0.shape)
    if name == "sd15":
        noised = model.pipe.scheduler.add_noise(x_0, eps, t.long())
        target = eps
    else:
        level = as_rows(t / 1000)
        noised = (1 - level) * x_0 + level * eps
        target = eps - x_0
    out = model.predict(noised, t, D["condition"], "theta")
    out_ref = model.predict(noised, t, D["condition"], None)

    # With KL an image of weight 0 matters, too.
    weights = torch.tensor([1.0, 0, 3])
    losses = baselines.parts("rwr")["losses"]
    loss, kl, deviation = losses(model, D | {"r": weights}, torch.arange(3), t, eps)
    error = (out - target).square().mean((1, 2, 3))
    assert_near(loss, weights * error, 1e-4, 1e-3)
    distance = (out - out_ref).square().mean((1, 2, 3))
    assert distance.min() > 1e-6
    assert_near(kl, distance, 1e-6, 1e-3)
    assert not deviation.any()


@pytest.mark.parametrize("name, method", [("sd3", "flowgrpo"), ("sd15", "rft")])
def test_images_of_weight_zero_cost_nothing(name, method):
    """Without KL the denoiser sees no image of weight 0, and the gradient is that of the others."""
    chain, D = moved_chain(name, kl=0)
    count = baselines.Count(chain)
    each = []
    for i in range(3):
        only = torch.zeros(3)
        only[i] = 2
        loss, _, _ = losses_of(method, chain, D, only)
        each.append(gradient(chain, loss))
    assert count.n == 15
    count.n = 0
    loss, kl, deviation = losses_of(method, chain, D, torch.tensor([2.0, 0, 2]))
    assert count.n == 10
    assert loss.shape == kl.shape == deviation.shape == (15,)
    assert loss[INDEX == 1].abs().max() == 0
    assert_near(gradient(chain, loss), each[0] + each[2], 1e-5, 1e-3)
    loss, _, _ = losses_of(method, chain, D, torch.zeros(3))
    assert count.n == 10
    assert not gradient(chain, loss).any()


@pytest.mark.parametrize("name, method", [("sd3", "flowgrpo"), ("sd15", "rwr")])
def test_checkpointing_changes_no_gradient(name, method):
    """With --checkpointing the gradient is the same, also beside the base's own predictions."""
    gradients = []
    for checkpointing in (False, True):
        chain, D = moved_chain(name, checkpointing=checkpointing)
        # Only in training mode do the layers compute twice.
        chain.net.train()
        loss, kl, _ = losses_of(method, chain, D, A, clip_range=1.0)
        gradients.append(gradient(chain, loss + kl))
    assert_near(gradients[1], gradients[0], 1e-5, 1e-4)


def test_trained_steps():
    """DDPO trains each of an image's steps once; FlowGRPO never the last."""
    for method, steps in (("ddpo", 5), ("flowgrpo", 4)):
        own = baselines.METHODS[method].settings
        config = configured("sd15", updates=1, **own)
        model = baselines.parts(method, noise_level=0.3)["make_model"](config)
        assert model.solver.noise_level == 0.3
        ((index, t),) = nft.draw_pairs(config, model.times, 1)
        pairs = zip(index.tolist(), t.tolist(), strict=True)
        images = config.groups * config.group_size
        every = itertools.product(range(images), range(steps))
        assert sorted(pairs) == list(every)


# ---- Runs through the command line ---------------------------------------------------------------
def run(method, out, **changes):
    """Run the command line of a small run, where the method's own settings hold."""
    own = {"out": out, "eta": None, "kl": None, "train_times": None}
    model = "sd3" if method == "flowgrpo" else "sd15"
    words = common.command_line(model, **(own | changes))
    assert baselines.main([method, *words]) == 0


@pytest.mark.parametrize("method", baselines.METHODS)
def test_run_of_each_method(method, tmp_path):
    """A run trains theta, which samples next, and logs; what plays no part is logged as 0."""
    run(method, tmp_path / "run")
    rows = common.metrics(tmp_path / "run")
    assert [row["iteration"] for row in rows] == [0, 1, 2]
    for row in rows[1:]:
        assert row["eta"] == 0
        assert row["grad_norm"] > 0
        assert row["r_std"] > 0
    assert (rows[2]["old_deviation"] > 0) == (method in STEP_METHODS)
    assert (rows[2]["kl"] > 0) == (method in ("flowgrpo", "dpok"))
    lora = common.checkpoint(tmp_path / "run")["lora"]
    # B started at 0.
    assert lora["theta"][1].abs().max() > 1e-3
    for theta, old in zip(lora["theta"], lora["old"], strict=True):
        assert torch.equal(theta, old)


def test_flags_win(tmp_path):
    """What the command line says holds, for nft.py's flags and for those of a method."""
    run("rwr", tmp_path / "run", iterations=1, temperature=1e-3, kl=0.25)
    config = (tmp_path / "run/config.json").read_text()
    assert '"kl": 0.25' in config
    assert '"eta": "0"' in config
    # Rewards differ by about 0.01: the best image of a prompt has almost all of the weight.
    assert common.metrics(tmp_path / "run")[1]["r_std"] > 0.5


def test_words_left_for_nft():
    """Flags are a method's own only where they are written out; the others go on as they are."""
    words = ["flowgrpo", "--noise-level=0.3", "--lr=1", "--clip-range=0.1", "--temp=2"]
    own = {"noise_level": 0.3, "clip_range": 0.1}
    assert baselines.parse(words) == ("flowgrpo", own, ["--lr=1", "--temp=2"])


@pytest.mark.parametrize(
    "command, says",
    [
        ("nft", "method.*nft"),
        ("", "required: method"),
        ("rwr --nonsense 1", "nonsense"),
        ("ddpo --temperature 0", "temperature: 0: must be a number above 0"),
        ("ddpo --clip-range big", "clip-range"),
        ("ddpo --temperature 1", "temperature: must be of another method, ddpo has none"),
        ("rtb --clip-range 1", "clip-range: must be of another method, rtb has none"),
        ("rft --noise-level 1", "noise-level: must be of another method, rft has none"),
        ("ddpo --guidance 3", "guidance 3.0: must be 1"),
        ("ddpo --eta 0.5", "eta 0.5: must be 0"),
        ("rft --precision fp16", "precision fp16: must"),
    ],
)
def test_bad_input_is_refused(command, says, tmp_path, capsys):
    """Exit 2 and one line, no traceback, nothing written."""
    out = tmp_path / "run"
    small = common.command_line("sd15", out=out, eta=None)
    words = command.split()
    method = words[:1]
    flags = words[1:]
    assert baselines.main(method + small + flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(says, line)
    assert not out.exists()


def test_a_failed_run_tells_to_begin_anew(tmp_path, capsys):
    """nft.py's own hint would go on by another method; what `main` is given replaces a part."""

    def evaluate(run, rewards, prompts, iteration):
        raise RuntimeError("no disk")

    words = common.command_line("sd15", out=tmp_path / "run", eta=None)
    assert baselines.main(["rft", *words], evaluate=evaluate) == 1
    assert "a run of rft cannot go on; begin anew" in capsys.readouterr().err


def test_what_only_nft_can_is_refused(monkeypatch):
    """A baseline runs in one process, and from its start."""
    make_model = baselines.parts("rft")["make_model"]
    config = configured("sd15")
    config.resume = True
    with pytest.raises(nft.UserError, match="--resume: must not"):
        make_model(config)
    config.resume = False
    monkeypatch.setattr(nft, "WORLD", 2)
    with pytest.raises(nft.UserError, match="torchrun with 2 processes: must be 1"):
        make_model(config)
