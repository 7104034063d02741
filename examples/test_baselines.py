"""baselines.py: its steps, its weights, its losses, its runs; each test's docstring states a law.

    pip install pytest peft; python -m pytest -q examples/test_baselines.py     # peft: for load_lora_weights alone

SPDX-License-Identifier: MIT
"""
import functools
import json
import pathlib
import re
import sys

import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import baselines

import nft

POLICY_GRADIENTS = [name for name, row in baselines.METHODS.items() if row.loss]
MODELS = pytest.mark.parametrize("name", ("tiny", "tiny-sd3"))
SMALL = {"device": "cpu", "precision": "fp32", "reward": "jpeg", "groups": 2, "group_size": 3, "steps": 3,
         "iterations": 2, "updates": 1, "batch_size": 4, "train_times": 3, "rank": 2, "warmup": 0, "lr": 0.01,
         "eval_every": 1}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """On busy cores two threads wait for each other at layers as small as these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def sampled(name):
    """A chain of 5 steps on a shipped pipeline, its rollout of three images, and the prompts and seeds of these."""
    flags = f"--model {name} --device cpu --precision fp32 --out x --steps 5 --rank 4 --kl 0.5".split()
    chain = baselines.Chain(nft.Model(baselines.Config(**vars(nft.parse(flags)), method="ddpo")))
    told = ["a red circle", "two blue squares", "a green cross"], [(7, i) for i in range(3)]
    return chain, chain.sample(*told, "old"), told


def steps_of(name):
    """(chain, k (30,), x, out, x_next (30, 4, 8, 8) in float64): made-up latents at each of the five steps."""
    chain, rollout, _ = sampled(name)
    torch.manual_seed(0)
    k = torch.arange(5).repeat_interleave(6)
    x, out = torch.randn(2, 30, *rollout["x_0"].shape[1:], dtype=torch.float64)
    return chain, k, x, out, x + 0.3 * torch.randn_like(x)


def posterior(chain, k, x, eps):
    """N(x_{t-1}) in float64: the posterior q(x_{t-1} | x_t, x_0) of DDPM, Eq. (6) and (7), at the predicted x_0."""
    betas = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2        # Stable Diffusion's
    bar = (1 - betas).cumprod(0)
    t = torch.tensor([801, 601, 401, 201, 1])[k]                                # 200 apart, from 1 on
    bar_t, bar_s = (bar[i].view(-1, 1, 1, 1) for i in (t, (t - 200).clamp(min=0)))
    alpha, x_0 = bar_t / bar_s, (x - (1 - bar_t).sqrt() * eps) / bar_t.sqrt()
    mean = bar_s.sqrt() * (1 - alpha) / (1 - bar_t) * x_0 + alpha.sqrt() * (1 - bar_s) / (1 - bar_t) * x
    return Normal(mean, ((1 - bar_s) / (1 - bar_t) * (1 - alpha)).sqrt().expand_as(x))


def reverse_sde(chain, k, x, v, a=0.7):
    """N(x) after a step in float64 of dx = (v - sigma^2 / 2 score) dt + sigma dw, where the score is -eps / t."""
    levels = chain.solver.sigmas.double()
    t, s = (levels[i].view(-1, 1, 1, 1) for i in (k, k + 1))
    sigma = a * (t / (1 - torch.where(t == 1, levels[1], t))).sqrt()
    score = -(x + (1 - t) * v) / t                                              # eps = x_0 + v, x_0 = x - t v
    return Normal(x + (v - sigma ** 2 / 2 * score) * (s - t), (sigma * (t - s).sqrt()).expand_as(x))


@MODELS
def test_log_probability_of_a_step(name):
    """Mean, std and log-probability of each step are those of a float64 Gaussian derived another way."""
    chain, k, x, out, x_next = steps_of(name)
    expected = (posterior if name == "tiny" else reverse_sde)(chain, k, x, out)
    mean, std = chain.gaussian(x.float(), out.float(), k)
    assert_close(mean.double(), expected.mean, atol=2e-5, rtol=2e-5)
    assert_close(std.double().expand_as(x), expected.stddev, atol=0, rtol=1e-3)     # 1 - alpha_bar cancels at t = 1
    found = baselines.log_prob(x_next, *(y.double() for y in (mean, std)))
    assert_close(found, expected.log_prob(x_next).mean((1, 2, 3)), atol=1e-3, rtol=3e-3)


def test_ddim_step_is_diffusers():
    """Given the noise, a step is DDIMScheduler.step with eta = 1."""
    from diffusers import DDIMScheduler
    chain, k, x, out, noise = (y.float() if torch.is_tensor(y) and y.is_floating_point() else y
                               for y in steps_of("tiny"))
    scheduler = DDIMScheduler.from_pretrained(HERE / "tiny-sd15/scheduler")
    scheduler.set_timesteps(5)
    mean, std = chain.gaussian(x, out, k)
    for i in range(5):
        theirs = scheduler.step(out[k == i], scheduler.timesteps[i], x[k == i], eta=1.0, variance_noise=noise[k == i])
        assert_close((mean + std * noise)[k == i], theirs.prev_sample, atol=1e-5, rtol=1e-5)


def test_flow_step_without_noise_is_euler():
    """As a -> 0 a step of FlowGRPO's equation is FlowMatchEulerDiscreteScheduler's, and its std is 0."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    _, k, x, v, _ = steps_of("tiny-sd3")
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(HERE / "tiny-sd3/scheduler")
    scheduler.set_timesteps(5)
    levels = scheduler.sigmas.double()
    t, s = (levels[i].view(-1, 1, 1, 1) for i in (k, k + 1))
    mean, std = baselines.flow_step(x, v, t, s, 1e-9, levels[1])
    assert (std < 1e-8).all()
    for i, time in enumerate(scheduler.timesteps):
        assert_close(mean[k == i].float(), scheduler.step(v[k == i], time, x[k == i]).prev_sample.float())


@MODELS
def test_rollout_is_the_recorded_chain(name):
    """path and outs are what the pipeline went through: its noise is the seeds', and image i owes all to seed i."""
    chain, rollout, (texts, seeds) = sampled(name)
    path, outs, k = rollout["path"], rollout["outs"], torch.arange(5)
    assert_close(path[:, -1], rollout["x_0"], atol=0, rtol=0)
    for i in range(3):
        mean, std = chain.gaussian(path[i, :-1], outs[i], k)
        noise = (path[i, 1:] - mean) / std
        generator = nft.generator(*seeds[i], "steps")
        expected = torch.stack([torch.randn(path.shape[2:], generator=generator) for _ in k])
        assert_close(noise, expected, atol=3e-3, rtol=0)
        condition = nft.map_tensors(lambda x, i=i: x[i:i + 1].expand(5, *x.shape[1:]), rollout["condition"])
        with torch.no_grad():
            again = chain.model.predict(path[i, :-1], chain.times, condition, "old")
        assert_close(again, outs[i], atol=1e-4, rtol=1e-4)
        alone = chain.sample(texts[i:i + 1], seeds[i:i + 1], "old")
        assert_close(alone["path"][0], path[i], atol=1e-3, rtol=1e-3)


@MODELS
@pytest.mark.parametrize("method", POLICY_GRADIENTS)
def test_first_ratio_is_one(name, method):
    """Before theta moves the ratio is 1: the loss is -A, KL and deviation are 0, and the gradient is not."""
    chain, rollout, _ = sampled(name)
    chain.config.method, theta = method, chain.model.lora.sets["theta"]
    i, k = torch.arange(3).repeat(5), torch.arange(5).repeat_interleave(3)
    A = torch.linspace(-2, 2, 15)
    loss, kl, deviation = baselines.step_losses(chain, rollout, i, k, A)
    assert_close(loss, -A, atol=0, rtol=2e-5)
    assert_close(torch.stack([kl.detach(), deviation]), torch.zeros(2, 15), atol=1e-8, rtol=0)
    assert max(g.abs().max() for g in torch.autograd.grad(loss.sum(), theta[1::2])) > 1e-6


@MODELS
def test_ratio_and_kl_after_a_move(name):
    """Once theta has moved, ratio, clipping and KL are those of the two Gaussians, by Normal in float64."""
    chain, rollout, _ = sampled(name)
    theta, start = chain.model.lora.sets["theta"], [x.detach().clone() for x in chain.model.lora.sets["theta"]]
    torch.manual_seed(1)
    for x in theta:
        x.data += 0.01 * torch.randn_like(x)
    chain.config.clip_range = 1e-3
    i, k, A = torch.arange(3).repeat(5), torch.arange(5).repeat_interleave(3), torch.ones(15)
    x, x_next, old = (rollout[key][i, j].double() for key, j in (("path", k), ("path", k + 1), ("outs", k)))
    condition = nft.map_tensors(lambda x: x[i], rollout["condition"])
    with torch.no_grad():
        out = chain.model.predict(x.float(), chain.times[k], condition, "theta").double()
        gaussian = posterior if name == "tiny" else reverse_sde
        new, was = gaussian(chain, k, x, out), gaussian(chain, k, x, old)
        ratio = (new.log_prob(x_next) - was.log_prob(x_next)).mean((1, 2, 3)).exp()
        assert ratio.min() < 0.999 and 1.001 < ratio.max()
        for sign in (1, -1):
            clipped = sign * ratio.clamp(0.999, 1.001)
            for method in POLICY_GRADIENTS:
                chain.config.method = method
                loss, kl, deviation = baselines.step_losses(chain, rollout, i, k, sign * A)
                gain = clipped if method == "dpok" else torch.minimum(sign * ratio, clipped)
                assert_close(loss.double(), -gain, atol=1e-4, rtol=0)
                squared = (out - old).square().mean((1, 2, 3))              # old is the base here
                assert_close(deviation.double(), squared, atol=1e-7, rtol=1e-3)
                expected_kl = squared if method == "dpok" else kl_divergence(new, was).mean((1, 2, 3))
                assert_close(kl.double(), expected_kl, atol=1e-7, rtol=5e-3)
    for x, saved in zip(theta, start):
        x.data.copy_(saved)


def test_flow_kl_is_the_closed_form():
    """KL = dt / 2 (sigma (1 - t) / 2t + 1 / sigma)^2 |v - v_ref|^2, FlowGRPO Eq. (10), here over the dimensions."""
    chain, k, x, v, v_ref = steps_of("tiny-sd3")
    (mean, std), (mean_ref, _) = (chain.gaussian(x, u, k) for u in (v, v_ref))
    t, s = (chain.levels[i].double() for i in (k, k + 1))
    sigma = 0.7 * (t / (1 - t.clamp(max=chain.levels[1].item()))).sqrt()
    expected = (t - s) / 2 * (sigma * (1 - t) / (2 * t) + 1 / sigma) ** 2 * (v - v_ref).square().mean((1, 2, 3))
    assert_close(baselines.gaussian_kl(mean, mean_ref, std, v, v_ref), expected, rtol=1e-5, atol=0)


def test_weights_by_hand():
    """Each method's weights of two prompts with four images each are those worked out by hand."""
    raw = torch.tensor([[1.0, 0, 0, 0], [2, 4, 6, 8]], dtype=torch.float64)
    def weigh(method, raw=raw, names="ab", memory=None, **knobs):
        return baselines.METHODS[method].weigh(raw, names, {} if memory is None else memory, baselines.Config(**knobs))
    def close(found, *rows):
        assert_close(found, torch.tensor(rows, dtype=torch.float64), atol=2e-4, rtol=0)
    close(weigh("loop"), [1, -1 / 3, -1 / 3, -1 / 3], [-4, -4 / 3, 4 / 3, 4])       # 2 - 6, 4 - 16/3, 6 - 14/3, 8 - 4
    close(weigh("dpok"), [0.75, -0.25, -0.25, -0.25], [-3, -1, 1, 3])
    s, z = 0.1875 ** 0.5 + 1e-4, 5 ** 0.5 + 1e-4                                    # variances 3/16 and 5
    close(weigh("flowgrpo"), [0.75 / s, -0.25 / s, -0.25 / s, -0.25 / s], [-3 / z, -1 / z, 1 / z, 3 / z])
    close(weigh("rft"), [1, 0, 0, 0], [0, 0, 1, 1])
    e = [2.718281828 ** (x / 2) for x in (1, 0, 0, 0)]
    close(weigh("rwr", raw[:1], temperature=2.0), [4 * x / sum(e) for x in e])
    memory = {"b": [0.0] * 30}
    found = weigh("ddpo", memory=memory)
    assert memory == {"a": [1.0, 0, 0, 0], "b": [0.0] * 28 + [2.0, 4, 6, 8]}        # the last 32
    mean, std = 20 / 32, (120 / 32 - (20 / 32) ** 2) ** 0.5
    close(found, [3 ** 0.5] + 3 * [-(3 ** -0.5)], [(x - mean) / std for x in (2, 4, 6, 8)])
    assert all((weigh(m, torch.full((2, 4), 0.1)) == 0).all() for m in (*POLICY_GRADIENTS, "rft"))


@MODELS
def test_denoising_loss_is_pretraining_s(name):
    """w |out - target|^2 at x_t = alpha x_0 + sigma eps, whose target is eps, or eps - x_0 for a flow."""
    chain, rollout, _ = sampled(name)
    model, i, eps = chain.model, torch.tensor([2, 0, 1]), torch.randn(3, 4, 8, 8)
    t, w, x_0 = model.times[[0, 4, 2]], torch.tensor([1.0, 0.5, 3]), rollout["x_0"][i]
    if name == "tiny":
        noised, target = model.pipe.scheduler.add_noise(x_0, eps, t.long()), eps
    else:
        share = (t / 1000).view(-1, 1, 1, 1)
        noised, target = (1 - share) * x_0 + share * eps, eps - x_0
    condition = nft.map_tensors(lambda x: x[i], rollout["condition"])
    with torch.no_grad():
        out = model.predict(noised, t, condition, "theta")
        loss, kl, _ = baselines.denoising_losses(model, rollout, i, t, w, eps)
    assert_close(loss, w * (out - target).square().mean((1, 2, 3)), atol=1e-4, rtol=1e-3)
    assert (kl == 0).all()


def test_trained_steps():
    """No step twice; train_times of them; FlowGRPO never trains the last, DDPO does; rwr takes the sampler's times."""
    chain, _, _ = sampled("tiny")
    def drawn(method, times):
        chain.config.method, chain.config.train_times = method, times
        which = baselines.draw_times(chain.model, None if method == "rwr" else chain, 200, torch.Generator())
        assert all(len(set(row)) == len(row) for row in which.tolist())
        return which.shape[1], set(which.flatten().tolist())
    assert drawn("flowgrpo", 1000) == (4, {0, 1, 2, 3}) and drawn("flowgrpo", 2) == (2, {0, 1, 2, 3})
    assert drawn("ddpo", 1000) == (5, {0, 1, 2, 3, 4})
    assert drawn("rwr", 3) == (3, set(chain.model.times.tolist()))


# ---- Runs through the command line ----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with prompts, and a reward that is the same for all images."""
    folder = tmp_path_factory.mktemp("baselines")
    (folder / "prompts.txt").write_text("a red circle\ntwo blue squares\n")
    (folder / "same.py").write_text("def reward(images, prompts, metadata):\n    return [0.7] * len(images)\n")
    return folder


def run(root, out, command, main=baselines.main, status=0, **flags):
    """Run a command line of small flags; returns its directory."""
    told = {"prompts": root / "prompts.txt", "eval_prompts": root / "prompts.txt", "out": root / out}
    flags = {**SMALL, **told, **flags}
    given = [x for key, value in flags.items() for x in ("--" + key.replace("_", "-"), str(value))]
    assert main([*command, *given]) == status
    return root / out


def metrics(out):
    """The rows of metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def theta(out):
    """The trained set of a finished run, and as it started."""
    start = nft.LoRA(nft.load_pipeline(nft.parse(["--out", "x"]), torch.float32).unet, SMALL["rank"], 0)
    return torch.load(out / "checkpoint.pt", weights_only=True)["lora"]["theta"], start.sets["theta"]


@pytest.mark.parametrize("method", baselines.METHODS)
def test_run_of_each_method(root, method):
    """A run logs what nft.py's logs, and `evaluations`, without evaluation's; theta moves; the weights load."""
    model = "tiny-sd3" if method == "flowgrpo" else "tiny"
    out, rows = run(root, method, [method, "--model", model]), metrics(root / method)
    ours = metrics(root / "nft" if (root / "nft").exists() else run(root, "nft", [], nft.main))
    assert [set(row) for row in rows] == [set(row) | {"evaluations"} for row in ours]
    trained = {"flowgrpo": 2, "rft": 0}.get(method, 3) * (2 if method in ("flowgrpo", "dpok") else 1)  # 2: and the base
    count = [row["evaluations"] for row in rows]
    if method == "rft":                                     # the images above their group's mean alone
        assert 2 * 6 * 3 < count[2] < 2 * 6 * (3 + 3) and (count[2] - 36) % 3 == 0
    else:
        assert count == [0, 6 * (3 + trained), 12 * (3 + trained)]
    state = torch.load(out / "checkpoint.pt", weights_only=True)["lora"]
    assert rows[2]["grad_norm"] > 0 and state["theta"][1].abs().max() > 1e-3        # B started at 0
    assert all(map(torch.equal, state["theta"], state["old"]))                      # which would sample next
    assert json.loads((out / "config.json").read_text())["method"] == method
    pipe = nft.load_pipeline(nft.parse(["--model", model, "--out", "x"]), torch.float32)
    pipe.set_progress_bar_config(disable=True)
    def paint():
        return pipe("a red circle", generator=torch.Generator().manual_seed(0), num_inference_steps=2,
                    guidance_scale=1.0, output_type="latent").images
    before = paint()
    pipe.load_lora_weights(out)
    assert (paint() - before).abs().max() > 1e-4


@pytest.mark.parametrize("method", [*POLICY_GRADIENTS, "rft"])
def test_equal_rewards_teach_nothing(root, method):
    """Where all rewards are equal, and without KL, theta stays as it was, to the bit, and costs no evaluation."""
    out = run(root, f"same-{method}", [method], reward=f"{root}/same.py:reward", kl=0)
    assert all(map(torch.equal, *theta(out)))
    assert metrics(out)[2]["evaluations"] == 2 * 6 * 3


@pytest.mark.parametrize("method", ["flowgrpo", "rwr"])
def test_checkpointing_changes_nothing(root, method):
    """--checkpointing trains what a run without it trains, also beside the base's own predictions."""
    model = "tiny-sd3" if method == "flowgrpo" else "tiny"
    outs = [run(root, f"{method}{more}", [method, "--model", model, *more], kl=0.1, iterations=1)
            for more in ([], ["--checkpointing"])]
    plain, again = (torch.load(out / "checkpoint.pt", weights_only=True)["lora"]["theta"] for out in outs)
    assert_close(again, plain, atol=1e-6, rtol=1e-5)


def test_resume_goes_on_where_it_was(root):
    """One iteration and one more are two in one go: weights, counts, and DDPO's memory of the prompts' rewards."""
    run(root, "whole", ["ddpo"])
    run(root, "parts", ["ddpo"], iterations=1)
    assert baselines.main(["ddpo", "--out", str(root / "parts"), "--resume", "--iterations", "2"]) == 0
    states = [torch.load(root / out / "checkpoint.pt", weights_only=True) for out in ("whole", "parts")]
    assert_close(*[state["lora"]["theta"] for state in states], atol=0, rtol=0)
    assert states[0]["memory"] == states[1]["memory"] and len(states[0]["memory"]["a red circle"]) == 6
    assert [[row["evaluations"] for row in state["rows"]] for state in states] == [[0, 36, 72]] * 2


@pytest.mark.parametrize("command, says", [
    (["nft"], "method.*nft"), ([], "METHOD.*must be one of flowgrpo"),
    (["ddpo", "--guidance", "3"], "guidance 3.0: must"), (["rwr", "--nonsense", "1"], "nonsense"),
    (["ddpo", "--temperature", "0"], "temperature 0.0: must")])
def test_bad_input_is_refused(root, capsys, command, says):
    """Exit 2 and one line, no traceback, nothing written."""
    run(root, "none", command, status=2)
    line, = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert re.search(says, line) and not (root / "none").exists()
