"""The laws of nft.py and its promises to the user; each test's docstring states one.

    pip install -r requirements.txt -r examples/tests/requirements.txt
    python -m pytest test_nft.py                    # two to three minutes on two cores

No network, no GPU and no weights are needed: examples/tests/common.py builds small untrained
pipelines in their real classes. More tests are in examples/tests/.
SPDX-License-Identifier: MIT
"""

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import common
import numpy as np
import pytest
import torch
from common import SEEDS, TEXTS, checkpoint, finished, metrics, new_model, root, run
from torch.testing import assert_close

import nft

HERE = Path(__file__).resolve().parent
KINDS = pytest.mark.parametrize("kind", ["flow_prediction", "epsilon", "v_prediction"])
PIPELINES = pytest.mark.parametrize("name", ["sd15", "sdxl", "sd15-v", "sd3", "flux"])


# ---- The method: Eq. (1) to (6) on tensors -------------------------------------------------------
def problem(kind):
    """Six samples in float64, what a denoiser should say of them, and what theta and old say."""
    rng = np.random.default_rng(1)
    drawn = torch.tensor(rng.normal(size=(4, 6, 5)))
    x_0, eps, off, off_old = drawn
    sigma = torch.linspace(0.1, 0.9, 6).double()[:, None]
    alpha = (1 - sigma**2).sqrt()
    if kind == "flow_prediction":
        alpha = 1 - sigma
    targets = {"flow_prediction": eps - x_0, "epsilon": eps}
    target = targets.get(kind, alpha * eps - sigma * x_0)
    p = types.SimpleNamespace(kind=kind, x_0=x_0, eps=eps, target=target)
    p.alpha = alpha
    p.sigma = sigma
    p.theta = (target + off).requires_grad_()
    p.old = target + off_old
    p.r = torch.tensor(rng.uniform(size=6))
    return p


def clean(p, out):
    """x_0 as the denoiser's output has it, and its slope."""
    x_t = p.alpha * p.x_0 + p.sigma * p.eps
    return nft.predict_x0(x_t, out, p.alpha, p.sigma, p.kind)


def loss_and_gradient(p, r, beta, distance):
    """The loss of each sample, and its gradient by theta's output."""
    x0_theta, _ = clean(p, p.theta)
    x0_old, _ = clean(p, p.old)
    loss = nft.nft_loss(x0_theta, x0_old, p.x_0, r, beta, distance)
    (gradient,) = torch.autograd.grad(loss.sum(), p.theta)
    return loss.detach(), gradient


def squared(x0_hat, x_0):
    """The unweighted distance."""
    return (x0_hat - x_0).square().sum(1)


def test_implicit_policies_mirror_each_other():
    """v+ + v- = 2 v_old, and v+ lies the share beta of the way from v_old to v_theta."""
    p = problem("epsilon")
    policies = []

    def distance(x0_hat, x_0):
        policies.append(x0_hat.detach())
        return squared(x0_hat, x_0)

    nft.nft_loss(p.theta, p.old, p.x_0, p.r, 0.3, distance)
    positive, negative = policies
    assert_close(positive + negative, 2 * p.old)
    assert_close(positive - p.old, 0.3 * (p.theta.detach() - p.old))


def test_all_positive_is_flow_matching():
    """r = 1, beta = 1, unweighted: Eq. (1) with w(t) = t^2, in value and in gradient."""
    p = problem("flow_prediction")
    off = (p.theta - p.target).detach()
    loss, gradient = loss_and_gradient(p, 1.0, 1.0, squared)
    assert_close(loss, squared(p.sigma * off, 0))
    assert_close(gradient, 2 * p.sigma**2 * off)


@KINDS
def test_gradient_identity(kind):
    """Unweighted: slope^2 / beta times 2 beta [(2r - 1)(v_old - v) + beta (v_theta - v_old)]."""
    p = problem(kind)
    beta = 0.4
    _, slope = clean(p, p.old)
    pull = (2 * p.r[:, None] - 1) * (p.old - p.target)
    bracket = pull + beta * (p.theta.detach() - p.old)
    _, gradient = loss_and_gradient(p, p.r, beta, squared)
    assert_close(gradient, slope**2 * 2 * bracket)


@KINDS
def test_loss_is_the_released_one(kind):
    """(r L+ + (1 - r) L-) / beta, each branch over its own mean error: a loop agrees to 1e-6."""
    p = problem(kind)
    beta = 0.6
    loss, _ = loss_and_gradient(p, p.r, beta, nft.adaptive_loss)
    x0_theta, _ = clean(p, p.theta.detach())
    x0_old, _ = clean(p, p.old)
    for i in range(6):
        expected = 0.0
        r = p.r[i].item()
        for share, sign in ((r, 1), (1 - r, -1)):
            errors = []
            for theta, old, x in zip(x0_theta[i], x0_old[i], p.x_0[i], strict=True):
                mixed = (1 - sign * beta) * old + sign * beta * theta
                errors.append((mixed - x).item())
            scale = sum(abs(error) for error in errors) / 5
            squares = sum(error**2 for error in errors) / 5
            expected += share * squares / scale / beta
        assert loss[i].item() == pytest.approx(expected, rel=1e-6)


def test_no_gradient_runs_into_the_old_policy():
    """A loop of one's own that forgot torch.no_grad() trains theta alone, and as it should."""
    p = problem("flow_prediction")
    old = p.old.clone().requires_grad_()
    nft.nft_loss(p.theta, old, p.x_0, p.r, 0.5).sum().backward()
    assert old.grad is None
    x0_theta = p.theta.detach().requires_grad_()
    nft.nft_loss(x0_theta, p.old, p.x_0, p.r, 0.5).sum().backward()
    assert_close(p.theta.grad, x0_theta.grad)


@pytest.mark.parametrize("t, beta", [(0.3, 1.0), (0.5, 0.2), (0.8, 1.7)])
def test_minimiser_of_equation_6(t, beta):
    """Where v_old is exact, the minimiser is v_old + (2 / beta) Delta, with Delta of Eq. (4)."""
    rng = np.random.default_rng(3)
    # Seven pictures are all there are.
    x_0 = torch.tensor(rng.normal(size=(7, 2)))
    x_t = torch.tensor([0.3, -0.4]).double()
    prior = torch.tensor(rng.uniform(size=7))
    r = torch.tensor(rng.uniform(size=7))
    eps = (x_t - (1 - t) * x_0) / t
    v = eps - x_0
    # p(x_0 | x_t), by Bayes.
    p = prior * (-eps.square().sum(1) / 2).exp()
    p = p / p.sum()
    good = p * r
    bad = p * (1 - r)
    old = p @ v
    positive = good @ v / good.sum()
    negative = bad @ v / bad.sum()
    # Theorem 3.1: both ways to Delta.
    delta = good.sum() * (positive - old)
    assert_close(delta, bad.sum() * (old - negative))

    def risk(theta):
        x0_theta = (x_t - t * theta).expand(7, 2)
        x0_old = (x_t - t * old).expand(7, 2)
        return p @ nft.nft_loss(x0_theta, x0_old, x_0, r, beta, squared)

    slope = torch.func.jacrev(risk)(0 * old)
    curvature = torch.func.hessian(risk)(0 * old)
    minimiser = -torch.linalg.solve(curvature, slope)
    assert_close(minimiser, old + 2 / beta * delta)


RNG = np.random.default_rng(0)
# 24 rewards in 4 groups, which differ much in mean and spread.
GROUPS = RNG.permutation(np.arange(24) % 4)
RAW = 10.0 * GROUPS + RNG.normal(size=24) * (1 + GROUPS)


@pytest.mark.parametrize("z, unit", [(0.1, 1), (1.0, 1), (5.0, 1), (1.0, 1e-5)])
def test_r_is_the_paper_s(z, unit):
    """r = 1/2 + 1/2 clip[(r_raw - mean of the prompt) / (z (std of all + 1e-4)), -1, 1]."""
    # The smallest unit feels the 1e-4.
    raw = RAW * unit
    mean = np.array([raw[group == GROUPS].mean() for group in GROUPS])
    variance = np.mean((raw - np.mean(raw)) ** 2)
    Z_c = z * (np.sqrt(variance) + 1e-4)
    expected = 0.5 + 0.5 * np.clip((raw - mean) / Z_c, -1, 1)
    r = nft.optimality_reward(raw, GROUPS, z)
    np.testing.assert_allclose(r.numpy(), expected, atol=2e-6)


def test_r_compares_within_a_prompt():
    """r averages 1/2 in each group, is 1/2 throughout a constant one, and knows no order."""
    raw = np.where(GROUPS == 2, 7.0, RAW)
    r = nft.optimality_reward(raw, GROUPS)
    for group in range(4):
        mean = r[group == GROUPS].mean()
        assert mean.item() == pytest.approx(0.5)
    assert (r[GROUPS == 2] == 0.5).all()
    assert (r[GROUPS != 2] != 0.5).all()
    order = RNG.permutation(24)
    names = 100 - 7 * GROUPS
    assert_close(nft.optimality_reward(raw[order], names[order]), r[order])


def test_a_reward_that_is_not_finite_is_refused():
    """One nan among the rewards would make every r of the iteration nan."""
    with pytest.raises(ValueError, match="finite"):
        nft.optimality_reward([1.0, np.nan, 0.0], [0, 0, 0])


def test_eta_schedules():
    """eta_i = min(0.001 i, 0.5); for OCR 0 until 75, then 0.0075 (i - 75), at most 0.999."""
    eta = nft.soft_update_decay
    default = {1: 0.001, 100: 0.1, 500: 0.5, 1000: 0.5}
    for i, expected in default.items():
        assert eta(i) == pytest.approx(expected)
    ocr = {0: 0, 75: 0, 76: 0.0075, 100: 0.1875, 300: 0.999}
    for i, expected in ocr.items():
        assert eta(i, "75,0.0075,0.999") == pytest.approx(expected)
    for constant in ("0", "0.9", "1", 0.3):
        assert eta(1, constant) == eta(10**6, constant) == float(constant)


@pytest.mark.parametrize("schedule", ["-0.1", "1.5", "a", "", "0,1", "0,-1,0.5", "0,0.1,2", "nan"])
def test_bad_eta_schedules_are_refused(schedule):
    """eta lies in [0, 1] and does not fall."""
    with pytest.raises(ValueError, match=r"eta|float"):
        nft.soft_update_decay(1, schedule)


def test_forward_process_is_the_scheduler_s():
    """alpha_t x_0 + sigma_t eps is DDIMScheduler.add_noise at every time."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    t = torch.arange(1000)
    x_0 = torch.randn(1000, 3)
    eps = torch.randn(1000, 3)
    alpha, sigma = nft.alpha_sigma(t.float(), scheduler.alphas_cumprod)
    x_t = alpha[:, None] * x_0 + sigma[:, None] * eps
    assert_close(x_t, scheduler.add_noise(x_0, eps, t))


@KINDS
def test_predict_x0_inverts_the_forward_process(kind):
    """The right output stands for x_0 itself; alpha = 0, pure noise, divides nothing by zero."""
    p = problem(kind)
    x0_hat, _ = clean(p, p.target)
    assert_close(x0_hat, p.x_0)
    nothing = torch.zeros_like(p.sigma)
    at_the_end, _ = nft.predict_x0(p.eps, p.eps, nothing, nothing + 1, kind)
    assert at_the_end.isfinite().all()


# ---- The model: base, adapters, conditioning, forward process ------------------------------------
def redness(images):
    """How much redder than green and blue each of (B, 3, H, W) is: common.red a second time."""
    others = images[:, 1:].mean((1, 2, 3))
    return images[:, 0].mean((1, 2)) - others


@pytest.fixture(scope="session", autouse=True)
def a_v_prediction_pipeline():
    """root()/sd15-v: v-prediction, whose schedule ends in pure noise."""
    folder = root() / "sd15-v"
    if folder.exists():
        return
    shutil.copytree(root() / "sd15", folder)
    file = folder / "scheduler/scheduler_config.json"
    settings = json.loads(file.read_text())
    settings |= {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    settings |= {"timestep_spacing": "trailing"}
    file.write_text(json.dumps(settings))


def draw(pipe, form="pt"):
    """The held-out pictures, or their latents, by the pipeline alone."""
    noise = [nft.generator(*seed) for seed in SEEDS]
    settings = {"num_inference_steps": 3, "height": 32, "width": 32, "guidance_scale": 1.0}
    if hasattr(pipe, "transformer"):
        settings["max_sequence_length"] = 2
    return pipe(TEXTS, generator=noise, output_type=form, **settings).images


def folded(model, adapter, x_t, t, condition):
    """The denoiser with W + 2 B A in the place of W: LoRA a second way."""
    weights = {}
    for i, name in enumerate(model.lora.layers):
        A, B = adapter[2 * i : 2 * i + 2]
        W = model.net.get_submodule(name).weight
        weights[f"{name}.weight"] = W + 2 * B @ A
    inputs = {model.input: x_t, "timestep": t, "return_dict": False}
    model.lora.active = None
    given = condition | model.shared | inputs
    return torch.func.functional_call(model.net, weights, (), given)[0]


DPM = "DPMSolverMultistepScheduler"
# With guidance the bound is that of a solver that rounds flow times down to integers.
CASES = [
    ("sd15", 1.0, DPM, 1e-5),
    ("sd15", 3.0, DPM, 1e-5),
    ("sd3", 1.0, "", 1e-6),
    ("flux", 1.0, "", 1e-6),
    ("sd3", 3.0, DPM, 1.001e-3),
]


@pytest.mark.parametrize("name, guidance, solver, bound", CASES)
def test_training_sees_what_the_sampler_saw(name, guidance, solver, bound):
    """Conditioning recorded is conditioning used; times and noise are the solver's; W + 2 B A.

    With guidance the conditional half of the batch is what is trained.
    """
    model = new_model(name, filled=True, guidance=guidance, solver=solver)
    calls = []

    def hear(net, args, kwargs, out):
        given = model.signature.bind(*args, **kwargs).arguments
        calls.append((dict(given), out[0]))

    hook = model.net.register_forward_hook(hear, with_kwargs=True)
    condition = model.sample(TEXTS, SEEDS, "old")["condition"]
    hook.remove()
    assert len(calls) == len(model.times) == 3
    old = model.lora.adapters["old"]
    levels = model.pipe.scheduler.sigmas
    for (given, out), level in zip(calls, levels, strict=False):
        x_t = given[model.input][-3:]
        t = torch.as_tensor(given["timestep"]).flatten()[-1]
        assert t in model.times
        ours = model.predict(x_t, t.expand(3), condition, "old")
        second = folded(model, old, x_t, t.expand(3), condition)
        for prediction in (ours, second):
            assert_close(prediction, out[-3:], atol=1e-4, rtol=1e-4)
        if guidance > 1:
            assert (ours - out[:3]).abs().max() > 1e-3
        alpha, sigma = model.noise_level(t[None])
        noise = sigma / alpha if name == "sd15" else sigma
        assert_close(noise[0], level, atol=bound, rtol=0)


@PIPELINES
def test_theta_old_and_reference_share_one_base(name):
    """Without its adapter, or with a fresh one, the model is the pipeline, bit for bit."""
    fresh = new_model(name)
    plain = draw(nft.load_pipeline(fresh.config, torch.float32)[0])
    for policy in ("theta", "old", "ema"):
        assert torch.equal(fresh.sample(TEXTS, SEEDS, policy)["images"], plain)
    filled = new_model(name, filled=True)
    off = filled.sample(TEXTS, SEEDS, None)
    assert torch.equal(off["images"], plain)
    old = filled.sample(TEXTS, SEEDS, "old")
    assert not torch.equal(old["images"], plain)
    # As peft's "gaussian" start: 1 / rank.
    assert 0.2 < fresh.lora.adapters["theta"][0].std() < 0.3


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux"])
def test_diffusers_loads_the_weights(name):
    """pipe.load_lora_weights(DIR) paints the images that the run evaluated, by theta's EMA."""
    pytest.importorskip("peft")
    from diffusers import DiffusionPipeline

    model = new_model(name)
    base = model.sample(TEXTS, SEEDS, None)
    model.lora.adapters["ema"] = checkpoint(finished(name))["lora"]["ema"]
    ours = model.sample(TEXTS, SEEDS, "ema")
    pipe = DiffusionPipeline.from_pretrained(root() / name)
    pipe.load_lora_weights(str(finished(name)))
    assert_close(draw(pipe), ours["images"], atol=1e-5, rtol=1e-5)
    assert_close(draw(pipe, "latent"), ours["x_0"], atol=1e-5, rtol=1e-5)
    reward = redness(ours["images"]).mean().item()
    last = metrics(finished(name))[2]
    assert last["eval_reward"] == pytest.approx(reward, abs=1e-6)
    assert (ours["x_0"] - base["x_0"]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["tiny", "tiny-sd3"])
def test_any_solver(name):
    """Every solver paints; those of an ODE, of any order, paint the same picture in the end."""
    pictures = {}
    for solver in ["", *nft.SOLVERS]:
        settings = {"model": name, "solver": solver, "steps": 40}
        if name == "tiny-sd3" and solver in ("ddim", "ddpm", "euler-a"):
            with pytest.raises(nft.UserError, match="--solver"):
                new_model("sd3", **settings)
            continue
        model = new_model("sd3", **settings)
        pictures[solver] = model.sample(TEXTS, SEEDS, "old")["images"]
    random_ones = ("ddpm", "euler-a", "lcm", "dpm2-sde")
    for solver, images in pictures.items():
        off = (images - pictures["dpm2"]).abs().mean()
        assert (off > 0.01) == (solver in random_ones), (solver, off)


def test_noise_of_a_random_solver_is_the_image_s_own():
    """An SDE's picture depends on its own key: not on its batch, nor on a global generator."""
    model = new_model("sd3", solver="dpm2-sde")
    together = model.sample(TEXTS, SEEDS, "old")["images"]
    torch.manual_seed(17)
    alone = model.sample(TEXTS[1:2], SEEDS[1:2], "old")["images"]
    assert_close(alone[0], together[1], atol=1e-5, rtol=1e-5)


def test_a_failing_pipeline_gives_back_what_it_borrowed():
    """After an error within the pipeline its solver's step, hooks and adapters are as before."""
    model = new_model("sd15")
    with pytest.raises(ValueError, match="text input"):
        model.sample([3], [("x",)], "old")
    assert "step" not in vars(model.pipe.scheduler)
    assert not model.net._forward_hooks
    assert model.lora.active is None


# ---- Training: one iteration a second time -------------------------------------------------------
def pair_terms(model, adapters, theta, one, t, eps, r):
    """Loss, KL and old deviation of one image at one time, in the space of the output."""
    beta = 0.7
    x_0 = one["x_0"]
    kind = model.pipe.scheduler.config.get("prediction_type")
    if kind is None:
        # FLUX takes t in [0, 1], SD3 in [0, 1000].
        sigma = t / (1 if "img_ids" in model.shared else 1000)
        alpha = 1 - sigma
        target = eps - x_0
    else:
        sigma = (1 - model.pipe.scheduler.alphas_cumprod[t.long()]).sqrt()
        alpha = (1 - sigma**2).sqrt()
        target = eps if kind == "epsilon" else alpha * eps - sigma * x_0
    x_t = alpha * x_0 + sigma * eps
    out = folded(model, theta, x_t, t, one["condition"])
    old = folded(model, adapters["old"], x_t, t, one["condition"]).detach()
    ref = folded(model, [0 * x for x in theta], x_t, t, one["condition"]).detach()
    loss = 0
    for share, sign in ((r, 1), (1 - r, -1)):
        error = old + sign * beta * (out - old) - target
        scale = error.abs().mean().detach()
        loss = loss + share * error.square().mean() / scale / beta
    weighted = (sigma / (alpha + sigma) * loss).squeeze()
    kl = (out - ref).square().mean()
    deviation = (out - old).square().mean().detach()
    return torch.stack([weighted, kl, deviation])


def adamw(theta, gradient, moments, step, lr):
    """One step of AdamW, its gradient clipped to norm 1; `moments` are changed in place."""
    norms = [g.norm() for g in gradient]
    norm = torch.stack(norms).norm()
    after = []
    for k, (x, g) in enumerate(zip(theta, gradient, strict=True)):
        g = g * min(1, 1 / norm)
        m = moments[k]["exp_avg"]
        v = moments[k]["exp_avg_sq"]
        m.copy_(0.9 * m + 0.1 * g)
        v.copy_(0.999 * v + 0.001 * g * g)
        m_hat = m / (1 - 0.9**step)
        v_hat = v / (1 - 0.999**step)
        change = m_hat / (v_hat.sqrt() + 1e-8)
        x = x - lr * (change + 1e-4 * x)
        after.append(x.detach())
    return after, norm


def one_iteration(out):
    """Resume a run for one iteration; what passed through collect and pair_losses in it."""
    passed = types.SimpleNamespace(collected=[], pairs=[])

    def collect(model, rewards, numbered, key, policy):
        D = nft.collect(model, rewards, numbered, key, policy)
        passed.collected.append((numbered, key, policy, D["x_0"].clone()))
        return D

    def losses(model, D, index, t, eps):
        passed.pairs.append((index, t, eps))
        return nft.pair_losses(model, D, index, t, eps)

    config = nft.configure(out=out, resume=True, iterations=3)
    nft.train(config, collect=collect, losses=losses)
    (passed.rollout,) = passed.collected
    return passed


@PIPELINES
def test_one_iteration_is_algorithm_1(name, tmp_path):
    """An iteration equals Algorithm 1 written a second time: Collect, Reward, Optimize, Update."""
    out = shutil.copytree(finished(name), tmp_path / "run")
    state = checkpoint(out)
    adapters = state["lora"]
    moments = state["optimizer"]["state"]
    passed = one_iteration(out)
    after = checkpoint(out)["lora"]
    row = metrics(out)[3]
    model = new_model(name)

    # Collect and Reward: three images of each of two prompts, each from noise of its own.
    numbered, key, _, x_0 = passed.rollout
    texts = [prompt for _, prompt, _ in numbered]
    assert texts == [texts[0]] * 3 + [texts[3]] * 3
    assert texts[0] != texts[3]
    model.lora.adapters = adapters
    keys = [(*key, i) for i in range(6)]
    rollout = model.sample(texts, keys, "old")
    assert_close(x_0, rollout["x_0"], atol=1e-4, rtol=1e-4)
    raw = redness(rollout["images"])
    mean = raw.view(2, 3).mean(1).repeat_interleave(3)
    Z_c = 2 * (raw.std(correction=0) + 1e-4)
    r = 0.5 + 0.5 * ((raw - mean) / Z_c).clamp(-1, 1)

    # Optimize: each image at two of the sampler's times, in two steps of AdamW.
    index, t, eps = (torch.cat(parts) for parts in zip(*passed.pairs, strict=True))
    assert sorted(index.tolist()) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    pairs = zip(index.tolist(), t.tolist(), strict=True)
    assert len(set(pairs)) == 12
    assert all(time in model.times for time in t)
    assert len(eps.unique()) > 3000
    theta = adapters["theta"]
    ema = adapters["ema"]
    logged = torch.zeros(4)
    # Four optimizer steps were before.
    for step, part in enumerate(torch.arange(12).split(6), 5):
        theta = [x.requires_grad_() for x in theta]
        terms = 0
        for k in part.tolist():
            i = index[k].item()
            one = nft.map_tensors(lambda x, i=i: x[i : i + 1], rollout)
            pair = (t[k : k + 1], eps[k : k + 1], r[i])
            found = pair_terms(model, adapters, theta, one, *pair)
            terms = terms + found / 6
        gradient = torch.autograd.grad(terms[0] + 0.5 * terms[1], theta)
        theta, norm = adamw(theta, gradient, moments, step, lr=0.01)
        logged += torch.stack([*terms.detach(), norm]) / 2
        ema = [0.8 * x + 0.2 * y for x, y in zip(ema, theta, strict=True)]

    # Update.
    old = [0.4 * x + 0.6 * y for x, y in zip(adapters["old"], theta, strict=True)]
    second = {"theta": theta, "ema": ema, "old": old}
    for policy, mine in second.items():
        vectors = (adapters[policy], after[policy], mine)
        was, now, expected = map(torch.nn.utils.parameters_to_vector, vectors)
        assert (now - expected).norm() < 2e-3 * (now - was).norm(), policy
    expected = dict(zip(["loss", "kl", "old_deviation", "grad_norm"], logged, strict=True))
    expected["reward"] = raw.mean()
    expected["reward_std"] = raw.std(correction=0)
    expected["r_std"] = r.std(correction=0)
    for field, value in expected.items():
        assert row[field] == pytest.approx(value.item(), rel=1e-3)
    assert row["eta"] == 0.4


def test_gradients_are_clipped_at_norm_1(tmp_path):
    """A gradient of norm above 1 makes the step of one of norm 1: AdamW's moments tell."""

    def steep(*pairs):
        loss, kl, deviation = nft.pair_losses(*pairs)
        return 1000 * loss, kl, deviation

    settings = common.settings("sd15", out=tmp_path / "run", iterations=1, updates=1)
    rows = nft.train(nft.configure(**settings), losses=steep)
    assert rows[1]["grad_norm"] > 2
    moments = checkpoint(tmp_path / "run")["optimizer"]["state"].values()
    # After one step the first moment is a tenth of the gradient.
    squares = [(10 * m["exp_avg"]).square().sum() for m in moments]
    norm = sum(squares).sqrt()
    assert norm.item() == pytest.approx(1, rel=1e-4)


def test_only_adapters_learn(tmp_path):
    """The base is bit for bit the same after training; adapters are fp32 whatever the base is."""
    model = new_model("sd15")
    before = {name: x.clone() for name, x in model.net.state_dict().items()}
    settings = common.settings("sd15", out=tmp_path / "run", precision="bf16")
    config = nft.configure(**settings)
    made = []

    def make_model(config):
        made.append(nft.Model(config))
        return made[-1]

    nft.train(config, make_model=make_model)
    for name, x in made[0].net.state_dict().items():
        assert torch.equal(x, before[name].bfloat16())
    for adapter in checkpoint(tmp_path / "run")["lora"].values():
        assert {x.dtype for x in adapter} == {torch.float32}


def red(images, prompts, metadata):
    return redness(images)


def minus_red(images, prompts, metadata):
    return -redness(images)


def shuffled_red(images, prompts, metadata):
    """The rewards of a batch, given to the wrong images."""
    rewards = redness(images)
    noise = nft.generator("shuffled", rewards.sum().item())
    order = torch.randperm(len(rewards), generator=noise)
    return rewards[order]


def test_reward_rises(tmp_path):
    """The held-out reward rises; negated, it falls; shuffled, it stays where it was."""
    # A quarter of them: evaluation would take most of the time.
    captions = (HERE / "examples/tiny/heldout.txt").read_text().splitlines()[:64]
    held_out = tmp_path / "heldout.txt"
    held_out.write_text("\n".join(captions))

    def change(reward):
        """Of the held-out redness, over eight iterations on the tiny pipeline."""
        settings = {"iterations": 8, "groups": 4, "group_size": 12, "updates": 4, "steps": 4}
        settings |= {"lr": 5e-3, "beta": 0.5, "kl": 0.01, "eta": 0, "rank": 16, "eval_every": 9}
        settings |= {"z": 2.0, "warmup": 3, "ema": 0.8, "train_times": 2}
        settings |= {"eval_prompts": held_out}
        out = tmp_path / reward.__name__
        tiny = nft.configure(
            model="tiny", reward=reward, watch={"redness": red}, out=out, **settings
        )
        rows = nft.train(tiny)
        return rows[-1]["eval_reward/redness"] - rows[0]["eval_reward/redness"]

    assert change(red) > 0.04
    assert change(minus_red) < -0.02
    assert abs(change(shuffled_red)) < 0.02


# ---- The command line ----------------------------------------------------------------------------
def command(*words, **options):
    """python nft.py, as people start it."""
    words = [sys.executable, HERE / "nft.py", *words]
    return subprocess.run(words, capture_output=True, text=True, check=False, **options)


def test_what_a_run_leaves():
    """DIR holds settings, one JSON object an iteration, pictures and weights, as documented."""
    out = finished("sd15")
    assert json.loads((out / "config.json").read_text())["lr"] == 0.01
    base, one, last = metrics(out)
    evaluated = {"eval_reward", "eval_reward_std", "eval_reward/reward:red", "eval_roughness"}
    trained = {"iteration", "images", "seconds", "reward", "reward_std", "reward/reward:red"}
    trained |= {"loss", "kl", "old_deviation", "grad_norm", "eta", "roughness"}
    assert evaluated <= base.keys()
    assert trained <= one.keys()
    assert evaluated | trained <= last.keys()
    assert "eval_reward" not in one
    assert [row["iteration"] for row in metrics(out)] == [0, 1, 2]
    assert [row["images"] for row in metrics(out)] == [0, 6, 12]
    pictures = {str(file.relative_to(out)) for file in out.rglob("*.png")}
    assert pictures == {"samples/000000.png", "samples/000002.png", "before_after.png"}


def test_ctrl_c_and_resume(tmp_path):
    """Ctrl-C says what is saved, exits 130; --resume then ends as if nothing had happened."""
    out = tmp_path / "run"
    words = common.command_line("sd15", out=out, iterations=10**6)
    environment = common.os.environ | {"OMP_NUM_THREADS": "1"}
    call = [sys.executable, HERE / "nft.py", *words]
    process = subprocess.Popen(call, stderr=subprocess.PIPE, env=environment, text=True)
    while process.poll() is None and not (out / "samples/000002.png").exists():
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    line = said.strip().splitlines()[-1]
    assert process.returncode == 130
    done = checkpoint(out)["rows"][-1]["iteration"]
    # One behind where the signal fell into the last rename, and never ahead.
    assert f"iteration {done} is saved" in line or f"iteration {done - 1} is saved" in line
    assert f"--out {out} --resume" in line
    # What a kill after the checkpoint would leave.
    with open(out / "metrics.jsonl", "a") as file:
        file.write(f'{{"iteration": {done + 1}, "ima')
    more = ["--out", str(out), "--resume", "--iterations", str(done + 2)]
    assert command(*more, env=environment).returncode == 0
    whole = common.command_line("sd15", out=tmp_path / "whole", iterations=done + 2)
    assert command(*whole, env=environment).returncode == 0
    assert metrics(out, "seconds") == metrics(tmp_path / "whole", "seconds")
    resumed = checkpoint(out)["lora"]
    unbroken = checkpoint(tmp_path / "whole")["lora"]
    for name in ("theta", "old", "ema"):
        for x, y in zip(resumed[name], unbroken[name], strict=True):
            assert torch.equal(x, y)
    weights = "pytorch_lora_weights.safetensors"
    whole = tmp_path / "whole" / weights
    assert (out / weights).read_bytes() == whole.read_bytes()


def fails_at(iteration, how):
    """A reward that is `how` from some iteration on: batches of six images, and a trial of one."""
    calls = []

    def reward(images, prompts, metadata):
        calls.append(len(images))
        # One trial image, three held-out ones, then batches of 4 and 2 an iteration.
        if len(calls) > 2 + 2 * (iteration - 1):
            return how(images)
        return [0.0] * len(images)

    return reward


FAILURES = {
    "raises": lambda images: {}["lost"],
    "one too few": lambda images: [0.0] * (len(images) - 1),
    "nan": lambda images: [float("nan")] * len(images),
}


@pytest.mark.parametrize("how", FAILURES)
def test_a_failure_names_its_iteration_and_loses_nothing(tmp_path, how):
    """What fails in iteration 2 is told in one line, with what is saved and how to go on."""
    reward = fails_at(2, FAILURES[how])
    settings = common.settings("sd15", out=tmp_path / "run", reward=reward, iterations=9)
    with pytest.raises(nft.UserError) as failure:
        nft.train(nft.configure(**settings))
    line = str(failure.value)
    assert failure.value.status == 1
    assert "\n" not in line
    for words in ("iteration 2: reward reward:", "iteration 1 is saved", "resume=True"):
        assert words in line
    assert checkpoint(tmp_path / "run")["rows"][-1]["iteration"] == 1
    # The reward was a function, which config.json cannot hold.
    with pytest.raises(nft.UserError, match="reward of this run must be given again"):
        nft.configure(out=tmp_path / "run", resume=True)
    assert nft.configure(out=tmp_path / "run", resume=True, reward=reward).reward is reward


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, capsys):
    """It exits 1 and names the iteration; fp32 never trains on past a nan."""
    run("sd15", tmp_path / "run", status=1, lr=1e30, eta=1, updates=1, iterations=9)
    assert "not finite; try a smaller --lr" in capsys.readouterr().err
    assert len(metrics(tmp_path / "run")) == 2


# A dozen refusals; examples/tests/test_refusals.py has more.
BAD = [
    {"model": "no/such"},
    {"reward": "no-such-reward"},
    {"reward": "jpeg=x"},
    {"reward": "jpeg=nan"},
    {"prompts": "none.txt"},
    {"eval_prompts": "none.txt"},
    {"lr": "nan"},
    {"group_size": 1},
    {"updates": 7},
    {"eta": "1.5"},
    {"solver": "Nope"},
    {"resolution": 30},
    {"precision": "fp8"},
    {"device": "gpu9"},
]


@pytest.mark.parametrize("flags", BAD, ids=str)
def test_bad_input_is_refused(tmp_path, monkeypatch, capsys, flags):
    """Exit 2, one line with value, rule and mend, no traceback, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    root()
    capsys.readouterr()
    run("sd15", "here", status=2, **flags)
    (line,) = capsys.readouterr().err.strip().splitlines()
    ((name, value),) = flags.items()
    assert line.startswith("nft.py: ")
    assert "--" + name.replace("_", "-") in line
    assert str(value) in line
    assert "; " in line
    assert list(tmp_path.iterdir()) == []


def test_presets_only_set_defaults():
    """A flag wins over the preset, the preset over Config; own prompts bring their own held-out."""
    plain = nft.parse(["--model=x", "--out=x"])
    assert plain == nft.Config(model="x", out="x")
    tiny = nft.parse(["--out=x"])
    assert tiny == nft.Config(**nft.PRESETS["tiny"], out="x")
    assert nft.parse(["--lr=9", "--out=x"]).lr == 9
    assert nft.parse(["--prompts=x", "--out=x"]).eval_prompts == ""


def test_rewards_add_up_and_watching_does_not(tmp_path):
    """Rewards are weighted and summed; a watched one is logged, and never trained on."""
    settings = {"reward": f"{root()}/reward.py:red=2,jpeg=-0.5", "precision": "fp32"}
    one = metrics(run("sd15", tmp_path / "one", **settings), "seconds")
    both = run("sd15", tmp_path / "two", watch=f"{root()}/reward.py:minus_red", **settings)
    two = metrics(both, "seconds", "eval_reward/reward:minus_red")
    assert one == two
    row = one[2]
    total = 2 * row["eval_reward/reward:red"] - 0.5 * row["eval_reward/jpeg"]
    assert row["eval_reward"] == pytest.approx(total)
    watched = metrics(both)[2]
    assert watched["eval_reward/reward:minus_red"] == -watched["eval_reward/reward:red"]


def test_held_out_prompts_are_never_trained_on(tmp_path):
    """A tenth of the distinct prompts is drawn, by seed, and taken out of those trained on."""
    lines = [f"picture {i // 2}" for i in range(80)]
    (tmp_path / "p.txt").write_text("\n".join(lines))
    config = nft.configure(model="x", prompts=tmp_path / "p.txt", out="x")
    trained, held_out = nft.load_prompt_sets(config)
    shown = {prompt for prompt, _ in trained}
    hidden = {prompt for prompt, _ in held_out}
    assert len(held_out) == len(hidden) == 4
    assert shown.isdisjoint(hidden)
    assert len(trained) == 72
    # Not the tail of a file that may be sorted.
    assert hidden != {f"picture {i}" for i in range(36, 40)}


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux"])
def test_the_command_that_people_type(name, tmp_path):
    """`python nft.py --model NAME --reward aesthetic` trains, from the hub's cache alone."""
    root()
    words = ["--model", name, "--reward", "aesthetic", "--out", str(tmp_path / "run")]
    words += ["--device", "cpu", "--iterations", "2", "--groups", "2", "--group-size", "2"]
    if name != "sd15":
        words += ["--resolution", "32", "--steps", "2"]
    done = command(*words)
    assert done.returncode == 0, done.stderr
    scores = {row.get("eval_reward/aesthetic") for row in metrics(tmp_path / "run")}
    assert len(scores) == 3


# ---- Copied alone, and as a library --------------------------------------------------------------
@pytest.fixture
def alone(tmp_path):
    """A directory that holds nft.py and nothing else."""
    shutil.copy(HERE / "nft.py", tmp_path)
    return tmp_path


def run_alone(folder, *words):
    """python nft.py in that directory."""
    small = ["--iterations", "1", "--groups", "2", "--group-size", "2", "--steps", "2"]
    call = [sys.executable, "nft.py", "--out", "run", *small, *words]
    return subprocess.run(call, cwd=folder, capture_output=True, text=True, check=False)


def test_nft_py_alone_trains(alone):
    """Copied alone it takes a directory or a hub id, its two rewards, and prompts of its own."""
    done = run_alone(alone, "--model", str(root() / "sd15"), "--reward", "jpeg")
    assert done.returncode == 0, done.stderr
    shutil.rmtree(alone / "run")
    done = run_alone(alone, "--model", "sd15", "--reward", "aesthetic")
    assert done.returncode == 0, done.stderr
    assert "eval_reward/aesthetic" in metrics(alone / "run")[0]


@pytest.mark.parametrize("words", [[], ["--model", "sd3", "--reward", "clip"]])
def test_nft_py_alone_names_what_is_missing(alone, words):
    """What needs the repository says so in one line that names the file, and exits 2."""
    call = [sys.executable, "nft.py", *words]
    done = subprocess.run(call, cwd=alone, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "examples/" in line
    files = {file.name for file in alone.iterdir()}
    assert files - {"__pycache__"} == {"nft.py"}


def process_state():
    """What a library must not leave changed."""
    return {
        "SIGINT": signal.getsignal(signal.SIGINT),
        "SIGTERM": signal.getsignal(signal.SIGTERM),
        "path": list(sys.path),
        "stdout": sys.stdout,
        "threads": torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
    }


def test_the_library_does_what_the_command_does(tmp_path):
    """train(configure(...)) returns the rows of metrics.jsonl, and leaves the process as it was."""
    before = process_state()
    settings = common.settings("sd15", reward={"redness": red}, out=tmp_path / "one")
    rows = nft.train(nft.configure(**settings))
    assert rows == metrics(tmp_path / "one")
    command_rows = metrics(
        finished("sd15"), "seconds", "reward/reward:red", "eval_reward/reward:red"
    )
    mine = metrics(tmp_path / "one", "seconds", "reward/redness", "eval_reward/redness")
    assert mine == command_rows
    run("sd15", tmp_path / "two")
    assert process_state() == before


def test_the_library_runs_in_a_thread(tmp_path):
    """As in a notebook: no signal handler is asked for."""
    results = []

    def work():
        config = nft.configure(**common.settings("sd15", out=tmp_path / "run", reward=red))
        results.append(nft.train(config))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(results[0]) == 3


def test_configure_refuses_what_the_command_refuses():
    """A bad value or name is a UserError that names the flag; whole numbers and paths are fine."""
    with pytest.raises(nft.UserError, match="--group-size 1"):
        nft.configure(group_size=1)
    with pytest.raises(nft.UserError, match="nonsense"):
        nft.configure(nonsense=3)
    assert nft.configure(lr=1, out=Path("x")).out == "x"


def test_import_is_light():
    """`import nft` is silent, and brings neither diffusers nor transformers nor PIL."""
    code = "import sys, nft; print({'diffusers', 'transformers', 'peft', 'PIL'} & {*sys.modules})"
    call = [sys.executable, "-c", code]
    done = subprocess.run(call, cwd=HERE, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("set()\n", "")
