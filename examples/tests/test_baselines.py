"""The steps, weights and losses of baselines.py are the papers', and its methods train.

Each test's docstring states a law.
SPDX-License-Identifier: MIT
"""

import dataclasses

import baselines
import common
import pytest
import torch
from diffusers import DDIMScheduler
from torch.distributions import Normal, kl_divergence

import nft

STEP_METHODS = [name for name, row in baselines.METHODS.items() if row.loss]
# The pairs of three images and five steps, and a weight for each.
INDEX = torch.arange(3).repeat_interleave(5)
K = torch.arange(5).repeat(3)
A = torch.linspace(-2, 2.5, 15)


def assert_near(found, expected, tolerance):
    """Both are equal but for rounding, whatever their precision is."""
    expected = expected.detach().to(found.dtype)
    torch.testing.assert_close(found.detach(), expected, atol=tolerance, rtol=tolerance)


def average(x):
    """The mean of each sample: (b, ...) -> (b,)."""
    return x.flatten(1).mean(1)


class Case:
    """A chain of five steps, its samples D of three images, and the pairs (15, ...) of an image and
    a step; shift: how far theta, old and base are apart."""

    def __init__(self, name, shift):
        settings = common.settings(name, steps=5, eta="0", out=common.root() / "unused")
        self.chain = baselines.Chain(nft.configure(**settings))
        torch.manual_seed(1)
        adapters = self.chain.lora.adapters
        for x in adapters["old"]:
            x.data += shift * torch.randn(x.shape)
        self.D = self.chain.sample(common.TEXTS, common.SEEDS, "old")
        for x in adapters["theta"]:
            x.data += shift * torch.randn(x.shape)
        self.theta = adapters["theta"]
        self.pairs = nft.map_tensors(lambda x: x[INDEX], self.D)
        self.x = self.D["path"][INDEX, K]
        self.x_next = self.D["path"][INDEX, K + 1]
        self.old = self.D["outs"][INDEX, K]
        self.t = self.chain.step_times[K]

    def out(self, policy):
        """What the denoiser says now."""
        return self.chain.predict(self.x, self.t, self.pairs["condition"], policy)

    def step(self, out):
        """The Gaussian steps that `out` means."""
        mean, std = self.chain.solver.gaussian(self.x, out, K)
        return Normal(mean.double(), std.double())

    def log_prob(self, out):
        """log p of the next x, averaged over dimensions."""
        return average(self.step(out).log_prob(self.x_next))

    def losses(self, method, r, **own):
        """Loss and KL, five times those that are returned, and deviation. r: (15,)."""
        part = baselines.parts(method, **own)
        t = K if method in STEP_METHODS else self.t
        torch.manual_seed(2)
        self.eps = torch.randn(self.pairs["x_0"].shape)
        pairs = self.pairs | {"r": r}
        loss, kl, deviation = part["losses"](self.chain, pairs, t, self.eps)
        return 5 * loss, 5 * kl, deviation

    def gradient(self, loss):
        """The gradient of a sum of losses by theta, in one row."""
        for x in self.theta:
            x.grad = torch.zeros_like(x)
        loss.sum().backward()
        return torch.cat([x.grad.flatten() for x in self.theta])


# FLUX's denoiser takes other times than its solver, and latents without height and width.
@pytest.fixture(scope="module", params=("sd15", "sd3", "flux"))
def still(request):
    """A case where theta, old and base are one."""
    return Case(request.param, shift=0)


@pytest.fixture(params=("sd15", "sd3"))
def moved(request):
    """A case where they are apart."""
    return Case(request.param, shift=0.03)


def ddim_step(case, k, x, out, noise):
    """A step of diffusers' DDIM, with eta = 1."""
    scheduler = DDIMScheduler.from_config(case.chain.solver.config)
    scheduler.set_timesteps(5)
    t = scheduler.timesteps[k]
    return scheduler.step(out, t, x, eta=1.0, variance_noise=noise)[0]


def sde_step(case, k, x, v, noise):
    """A step of dx = (v - sigma^2 / 2 score) dt + sigma dw, where the score is -eps / t."""
    levels = case.chain.solver.sigmas
    t = levels[k]
    dt = levels[k + 1] - t
    # At t = 1 the code of FlowGRPO takes the next time.
    below_1 = min(t, levels[1])
    sigma = 0.7 * (t / (1 - below_1)).sqrt()
    eps = x + (1 - t) * v
    drift = v + sigma**2 / 2 * eps / t
    return x + drift * dt + sigma * (-dt).sqrt() * noise


def test_rollout_is_the_recorded_chain(still):
    """path and outs are what the pipeline went through, by DDIM's steps or those of FlowGRPO's
    equation, and each image is drawn by its own key. Evaluation is by the run's own solver."""
    step = ddim_step if still.chain.prediction == "epsilon" else sde_step
    for i, key in enumerate(common.SEEDS):
        path = still.D["path"][i]
        generator = nft.generator(*key)
        # The pipeline's own noise, where the chain begins.
        torch.randn(path[0].shape, generator=generator)
        for k, out in enumerate(still.D["outs"][i]):
            noise = torch.randn(path[k].shape, generator=generator)
            expected = step(still, k, path[k], out, noise)
            assert_near(path[k + 1], expected, 1e-4)
    assert torch.equal(still.D["path"][:, -1], still.D["x_0"])
    assert "path" not in still.chain.sample(common.TEXTS, common.SEEDS, "ema")


# ---- Weights -------------------------------------------------------------------------------------
def weigh(method, raw, **changes):
    """The weights of a prompt's rewards (K,)."""
    row = dataclasses.replace(baselines.METHODS[method], **changes)
    return row.weigh(raw, torch.zeros(len(raw)), 5.0)


def test_weights_by_hand():
    """Each method's weights of four images are those worked out by hand. Equal rewards weigh 0, to
    the bit. One image of n stands out by sqrt(n - 1); FlowGRPO's weights end at 5, DDPO's at 10."""
    raw = torch.tensor([2.0, 4, 6, 8])
    centred = torch.tensor([-3.0, -1, 1, 3])
    std = 5**0.5
    assert_near(weigh("dpok", raw), centred, 1e-6)
    # 2 - 6, 4 - 16/3, 6 - 14/3 and 8 - 4.
    assert_near(weigh("loop", raw), centred * 4 / 3, 1e-6)
    assert_near(weigh("flowgrpo", raw), centred / (std + 1e-4), 1e-6)
    assert_near(weigh("ddpo", raw), centred / (std + 1e-6), 1e-6)
    assert_near(weigh("rft", raw), centred > 0, 0)
    exponentials = (raw / 3).exp()
    share = exponentials / exponentials.sum()
    assert_near(weigh("rwr", raw, temperature=3), 4 * share, 1e-6)
    for method in ("flowgrpo", "ddpo", "dpok", "loop", "rft"):
        assert not weigh(method, torch.full((12,), 0.7)).any()
    outlier = torch.eye(401)[0]
    assert weigh("flowgrpo", outlier).max() == 5
    assert weigh("ddpo", outlier).max() == 10


def test_coca_shares_out_by_gains(still):
    """A step gets the part of the advantage that it and later steps earn, standardized."""
    alpha_t, sigma_t = still.chain.noise_level(still.t, still.x.ndim)
    x0_hat, _ = nft.predict_x0(still.x, still.old, alpha_t, sigma_t, still.chain.prediction)
    x_0 = still.pairs["x_0"].flatten(1)
    s = torch.cosine_similarity(x0_hat.flatten(1), x_0)
    # (3 images, 5 steps), and the end.
    s = torch.cat([s.view(3, 5), torch.ones(3, 1)], 1)
    shares = s.diff() / (1 - s[:, :1])
    raw = torch.tensor([1.0, 0, 0.3])
    to_go = shares.flip(1).cumsum(1).flip(1)
    earned = weigh("ddpo", raw).view(3, 1) * to_go
    expected = (earned - earned.mean()) / earned.std(correction=0)
    measured = baselines.similarities(still.chain, still.D)
    assert_near(weigh("coca", raw, measured=measured), expected, 1e-3)


def test_balance_is_of_whole_trajectories(moved):
    """RTB weighs a trajectory by its reward minus temperature log p_old / p_base, in nats."""
    ratio = moved.log_prob(moved.old) - moved.log_prob(moved.out(None))
    nats = ratio.view(3, 5).sum(1) * moved.x[0].numel()
    assert nats.std() > 0.1
    raw = torch.tensor([1.0, 0, 0.3])
    expected = raw - 0.3 * nats
    measured = baselines.log_ratios(moved.chain, moved.D)
    found = weigh("rtb", raw, measured=measured, temperature=0.3)
    assert_near(found, expected - expected.mean(), 1e-3)


# ---- Losses --------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", STEP_METHODS)
def test_first_gradient_is_the_policy_gradient(still, method):
    """Before theta moves the gradient of a step's loss is -A d log p; KL and deviation are 0."""
    # A weight of each step, as CoCA has them.
    weights = A.view(3, 5)[INDEX]
    loss, kl, deviation = still.losses(method, weights)
    found = still.gradient(loss)
    assert max(kl.max(), deviation.max()) < 1e-8
    log_p = still.log_prob(still.out("theta"))
    expected = still.gradient(-A * log_p)
    largest = expected.abs().max()
    assert_near(found / largest, expected / largest, 1e-3)


def test_losses_after_a_move(moved):
    """Once theta has moved, ratio, clipping, KL and deviation are those of Gaussians."""
    out = moved.out("theta")
    base = moved.out(None)
    ratio = (moved.log_prob(out) - moved.log_prob(moved.old)).exp()
    # Half of the pairs lie beyond it.
    limit = (ratio - 1).abs().median().item()
    clipped = A * ratio.clamp(1 - limit, 1 + limit)
    loss, kl, deviation = moved.losses("flowgrpo", A, clip_range=limit)
    assert_near(loss, -torch.minimum(A * ratio, clipped), 1e-5)
    divergence = kl_divergence(moved.step(out), moved.step(base))
    assert_near(kl, average(divergence), 1e-5)
    assert_near(deviation, average((out - moved.old) ** 2), 1e-5)
    loss, kl, _ = moved.losses("dpok", A, clip_range=limit)
    assert_near(loss, -clipped, 1e-5)
    assert_near(kl, average((out - base) ** 2), 1e-5)


def test_denoising_loss_is_that_of_pretraining(moved):
    """w |out - target|^2 at alpha x_0 + sigma eps; the target is eps, or eps - x_0 of a flow."""
    # With KL an image of weight 0 matters, too.
    weights = A.clamp(min=0)
    loss, kl, _ = moved.losses("rwr", weights)
    x_0 = moved.pairs["x_0"]
    alpha_t, sigma_t = moved.chain.noise_level(moved.t, 4)
    moved.x = alpha_t * x_0 + sigma_t * moved.eps
    out = moved.out("theta")
    target = moved.eps
    if moved.chain.prediction == "flow_prediction":
        target = moved.eps - x_0
    assert_near(loss, weights * average((out - target) ** 2), 1e-5)
    assert_near(kl, average((out - moved.out(None)) ** 2), 1e-5)


@pytest.mark.parametrize("method", ("flowgrpo", "rft"))
def test_images_of_weight_zero_cost_nothing(moved, method):
    """Without KL the denoiser sees no image of weight 0, and the gradient is that of the others."""
    moved.chain.config.kl = 0
    count = baselines.Count(moved.chain)
    others = INDEX != 1
    loss, _, _ = moved.losses(method, torch.ones(15))
    expected = moved.gradient(loss * others)
    assert count.n == 15
    loss, _, _ = moved.losses(method, others.float())
    assert_near(moved.gradient(loss), expected, 1e-5)
    assert count.n == 15 + 10
    loss, _, _ = moved.losses(method, torch.zeros(15))
    assert not moved.gradient(loss).any()
    assert count.n == 15 + 10


# ---- Runs through the command line ---------------------------------------------------------------
def run(method, out, **changes):
    """The rows of a small run, where the method's own settings hold."""
    own = {"out": out, "eta": None, "kl": None, "train_times": None}
    model = "sd3" if method == "flowgrpo" else "sd15"
    words = common.command_line(model, **own | changes)
    assert baselines.main([method, *words]) == 0
    return common.metrics(out, "seconds")


@pytest.mark.parametrize("method", baselines.METHODS)
def test_run_of_each_method(method, tmp_path):
    """A run trains theta, which samples next, and can be resumed; what plays no part is 0."""
    rows = run(method, tmp_path / "run")
    assert bool(rows[2]["old_deviation"]) == (method in STEP_METHODS)
    assert bool(rows[2]["kl"]) == (method in ("flowgrpo", "dpok"))
    lora = common.checkpoint(tmp_path / "run")["lora"]
    # B started at 0.
    assert lora["theta"][1].abs().max() > 1e-3
    assert torch.equal(lora["theta"][1], lora["old"][1])
    if method in ("rft", "flowgrpo"):
        run(method, tmp_path / "parts", iterations=1, eval_every=9)
        again = run(method, tmp_path / "parts", resume=True)
        assert again[2] == rows[2]


def test_flags(tmp_path, capsys):
    """Flags win over a method's settings; one that is none of the method's is refused."""
    rows = run("rwr", tmp_path / "run", iterations=1, temperature=1e-3, kl=0.25)
    assert '"kl": 0.25' in (tmp_path / "run/config.json").read_text()
    # Rewards differ by about 0.01: the best image of a prompt has almost all of the weight.
    assert rows[1]["r_std"] > 0.5
    with pytest.raises(SystemExit, match="2"):
        baselines.main(["ddpo", "--temperature=1"])
    words = common.command_line("sd15", guidance=3, out=tmp_path)
    assert baselines.main(["ddpo", *words]) == 2
    assert "--guidance 3.0: must be 1" in capsys.readouterr().err
