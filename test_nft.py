"""The laws of nft.py and its promises to the user; each test's docstring states one.

    pip install -r requirements.txt -r examples/tests/requirements.txt
    python -m pytest test_nft.py

No network, no GPU and no weights are needed: examples/tests/common.py builds small untrained
pipelines in their real classes. More tests are in examples/tests/.
SPDX-License-Identifier: MIT
"""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import common
import numpy as np
import pytest
import torch
from common import SEEDS, TEXTS, checkpoint, finished, metrics, new_model, root, run, train
from torch.testing import assert_close

import nft

HERE = Path(__file__).resolve().parent
KINDS = pytest.mark.parametrize("kind", ["flow_prediction", "epsilon", "v_prediction"])
PIPELINES = pytest.mark.parametrize("name", ["sd15", "sdxl", "sd15-v", "sd3", "flux"])
HUB = pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux"])


# ---- The method: Eq. (1) to (6) on tensors -------------------------------------------------------
def problem(kind):
    """Six samples in float64: x_0, and as clean samples the target, theta's output and old's."""
    rng = np.random.default_rng(1)
    x_0, eps, off, off_old = torch.tensor(rng.normal(size=(4, 6, 5)))
    sigma = torch.linspace(0.1, 0.9, 6).double()[:, None]
    alpha = 1 - sigma
    target = eps - x_0
    if kind != "flow_prediction":
        alpha = (1 - sigma**2).sqrt()
        target = eps if kind == "epsilon" else alpha * eps - sigma * x_0
    x_t = alpha * x_0 + sigma * eps
    samples = [x_0]
    for out in (target, target + off, target + off_old):
        x0_hat, _ = nft.predict_x0(x_t, out, alpha, sigma, kind)
        samples.append(x0_hat.requires_grad_())
    return samples


@KINDS
def test_predict_x0_inverts_the_forward_process(kind):
    """The right output stands for x_0 itself; alpha = 0, pure noise, divides nothing by zero."""
    x_0, x0_hat, _, _ = problem(kind)
    assert_close(x0_hat, x_0)
    x0_hat, _ = nft.predict_x0(x_0, x_0, torch.zeros(6, 1), torch.ones(6, 1), kind)
    assert x0_hat.isfinite().all()


@KINDS
def test_loss_is_the_released_one(kind):
    """(r L+ + (1 - r) L-) / beta, each branch over its own mean error, to 1e-6.

    No gradient runs into the old policy, also in a loop of one's own without torch.no_grad().
    """
    beta = 0.6
    x_0, _, x0_theta, x0_old = problem(kind)
    r = torch.linspace(0, 1, 6).double()
    loss = nft.nft_loss(x0_theta, x0_old, x_0, r, beta)
    for i in range(6):
        expected = 0.0
        for share, sign in ((r[i], 1), (1 - r[i], -1)):
            error = (1 - sign * beta) * x0_old[i] + sign * beta * x0_theta[i] - x_0[i]
            expected += share * error.square().mean() / error.abs().mean() / beta
        assert_close(loss[i], expected, rtol=1e-6, atol=0)
    loss.sum().backward()
    assert x0_old.grad is None
    assert x0_theta.grad.abs().min() > 0


def squared(x0_hat, x_0):
    """The unweighted distance."""
    return (x0_hat - x_0).square().sum(1)


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
    old = p @ v
    alpha = p @ r
    positive = (p * r) @ v / alpha
    delta = alpha * (positive - old)

    # The risk is quadratic, and its gradient is 0 in the minimum alone.
    minimiser = (old + 2 / beta * delta).requires_grad_()
    x0_theta = (x_t - t * minimiser).expand(7, 2)
    x0_old = (x_t - t * old).expand(7, 2)
    risk = p @ nft.nft_loss(x0_theta, x0_old, x_0, r, beta, squared)
    risk.backward()
    assert_close(minimiser.grad, 0 * old, atol=1e-12, rtol=0)
    assert delta.abs().min() > 0.01


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
    np.testing.assert_allclose(r.numpy(), expected, atol=1e-6)


def test_equal_rewards_teach_nothing():
    """r is 1/2, to the last digit, throughout a prompt of equal rewards; nan is refused."""
    raw = np.where(GROUPS == 2, 0.1, RAW)
    r = nft.optimality_reward(raw, GROUPS)
    assert ((r == 0.5).numpy() == (GROUPS == 2)).all()
    with pytest.raises(ValueError, match="finite"):
        nft.optimality_reward([1.0, np.nan, 0.0], [0, 0, 0])


def test_eta_schedules():
    """eta_i = min(0.001 i, 0.5); for OCR 0 until 37.5, then 0.015 (i - 37.5), at most 0.999."""
    default = {1: 0.001, 100: 0.1, 500: 0.5, 1000: 0.5}
    for i, expected in default.items():
        assert nft.soft_update_decay(i) == pytest.approx(expected)
    for i in (1, 37, 38, 80, 104, 105, 300):
        # The released one counts optimizer steps, two an iteration.
        released = min(max(0.0075 * (2 * i - 75), 0), 0.999)
        assert nft.soft_update_decay(i, "37.5,0.015,0.999") == pytest.approx(released)
    for constant in ("0", "0.9", "1", 0.3):
        assert nft.soft_update_decay(10**6, constant) == float(constant)
    for bad in ("1.5", "nan", "x", "0,1", "0,-1,0.5", "nan,1,0.5"):
        with pytest.raises(ValueError, match="START,SLOPE,MAX"):
            nft.soft_update_decay(1, bad)


# ---- The model: base, adapters, conditioning, forward process ------------------------------------
def red(images, prompts, metadata):
    """How much redder than green and blue each of (B, 3, H, W) is: common.red a second time."""
    others = images[:, 1:].mean((1, 2, 3))
    return images[:, 0].mean((1, 2)) - others


# The bound is that of a solver that rounds flow times down to integers.
CASES = [
    ("sd15", 1.0, "dpm2", 1e-5),
    ("sd15", 3.0, "dpm2", 1e-5),
    ("sd3", 1.0, "", 1e-6),
    ("flux", 1.0, "", 1e-6),
    ("sd3", 3.0, "dpm2", 1.001e-3),
]


@pytest.mark.parametrize("name, guidance, solver, bound", CASES)
def test_training_sees_what_the_sampler_saw(name, guidance, solver, bound):
    """Conditioning recorded is conditioning used; times and noise are the solver's.

    With guidance the conditional half of the batch is what is trained.
    """
    model = new_model(name, filled=True, guidance=guidance, solver=solver)
    condition = model.sample(TEXTS, SEEDS, "old")["condition"]
    assert len(model.calls) == len(model.times) == 3
    levels = model.pipe.scheduler.sigmas
    for (x_t, t, _, out), level in zip(model.calls, levels, strict=False):
        assert t in model.times
        ours = model.predict(x_t[-3:], t.expand(3), condition, "old")
        assert_close(ours, out[-3:], atol=1e-4, rtol=1e-4)
        if guidance > 1:
            assert (ours - out[:3]).abs().max() > 1e-3
        alpha, sigma = model.noise_level(t)
        noise = sigma / alpha if name == "sd15" else sigma
        assert_close(noise[0], level, atol=bound, rtol=0)


@PIPELINES
def test_theta_old_and_reference_share_one_base(name):
    """A fresh adapter changes no bit, and without one the model is the pipeline to 1e-5."""
    fresh = new_model(name)
    base = fresh.sample(TEXTS, SEEDS, None)["images"]
    assert_close(
        base, common.paint(nft.load_pipeline(fresh.config, torch.float32)), atol=1e-5, rtol=0
    )
    for policy in ("theta", "old", "ema"):
        assert torch.equal(fresh.sample(TEXTS, SEEDS, policy)["images"], base)
    filled = new_model(name, filled=True)
    assert torch.equal(filled.sample(TEXTS, SEEDS, None)["images"], base)
    assert not torch.equal(filled.sample(TEXTS, SEEDS, "old")["images"], base)
    # As peft's "gaussian" start: 1 / rank.
    assert 0.2 < fresh.lora.adapters["theta"][0].std() < 0.3


@HUB
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
    assert_close(common.paint(pipe), ours["images"], atol=1e-5, rtol=1e-5)
    assert_close(common.paint(pipe, "latent"), ours["x_0"], atol=1e-5, rtol=1e-5)
    reward = red(ours["images"], TEXTS, None).mean().item()
    assert metrics(finished(name))[2]["eval_reward"] == pytest.approx(reward, abs=1e-6)
    assert (ours["x_0"] - base["x_0"]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["tiny", "tiny-sd3"])
def test_any_solver(name):
    """Every solver paints; those of an ODE, of any order, paint the same picture in the end."""
    model = new_model(name, model=name, max_sequence_length=None, eval_steps=2, steps=20)
    own = model.pipe.scheduler
    pictures = {}
    for solver in nft.SOLVERS:
        model.pipe.scheduler = nft.pick_solver(solver, own)
        if name == "tiny-sd3" and solver in ("ddim", "ddpm", "euler-a"):
            with pytest.raises(nft.UserError, match="flow_prediction"):
                model.check_sampling()
            continue
        model.check_sampling()
        pictures[solver] = model.sample(TEXTS[:1], SEEDS[:1], "old")["images"]
    for solver, images in pictures.items():
        off = (images - pictures["dpm2"]).abs().mean()
        assert (off > 0.005) == (solver in ("ddpm", "euler-a", "lcm", "dpm2-sde")), (solver, off)


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
def second_loss(model, adapters, theta, pairs, t, eps):
    """Loss and KL of a step's pairs, in the space of the output."""
    beta = 0.7
    x_0 = pairs["x_0"]
    times = t.view(-1, *[1] * (x_0.ndim - 1))
    kind = model.pipe.scheduler.config.get("prediction_type")
    if kind is None:
        # FLUX takes t in [0, 1], SD3 in [0, 1000].
        sigma = times / (1 if "img_ids" in model.shared else 1000)
        alpha = 1 - sigma
        target = eps - x_0
    else:
        sigma = (1 - model.pipe.scheduler.alphas_cumprod[times.long()]).sqrt()
        alpha = (1 - sigma**2).sqrt()
        target = eps if kind == "epsilon" else alpha * eps - sigma * x_0
    given = (alpha * x_0 + sigma * eps, t, pairs["condition"])
    out = common.folded(model, theta, *given)
    old = common.folded(model, adapters["old"], *given).detach()
    ref = common.folded(model, [0 * x for x in theta], *given).detach()
    loss = 0
    for share, sign in ((pairs["r"], 1), (1 - pairs["r"], -1)):
        error = (old + sign * beta * (out - old) - target).flatten(1)
        loss = loss + share * error.square().mean(1) / error.abs().mean(1).detach() / beta
    weight = (sigma / (alpha + sigma)).flatten()
    return (weight * loss).mean(), (out - ref).square().mean()


@PIPELINES
def test_one_iteration_is_algorithm_1(name, tmp_path):
    """An iteration equals Algorithm 1 written a second time: Collect, Reward, Optimize, Update."""
    passed = []

    def losses(model, pairs, t, eps):
        passed.append((pairs["x_0"], t, eps))
        return nft.pair_losses(model, pairs, t, eps)

    out = shutil.copytree(finished(name), tmp_path / "run")
    # EMA's decay would be 6/15 and 7/16 in its two steps.
    config = nft.configure(out=out, resume=True, iterations=3, ema=0.41)
    row = nft.train(config, losses=losses)[3]
    state = checkpoint(finished(name))
    adapters = state["lora"]
    model = new_model(name)

    # Collect and Reward: three images of each of the next two prompts, from noise of their own.
    prompts, _ = nft.load_prompt_sets(config)
    texts = [prompts[(4 + i // 3) % 3][0] for i in range(6)]
    model.lora.adapters = adapters
    D = model.sample(texts, [(0, 3, i) for i in range(6)], "old")
    raw = red(D["images"], texts, None)
    mean = raw.view(2, 3).mean(1).repeat_interleave(3)
    Z_c = 2 * (raw.std(correction=0) + 1e-4)
    D["r"] = 0.5 + 0.5 * ((raw - mean) / Z_c).clamp(-1, 1)

    # Optimize: each image at two of the sampler's times, in two steps of AdamW.
    x_0, t, eps = (torch.cat(parts) for parts in zip(*passed, strict=True))
    index = torch.cdist(x_0.flatten(1), D["x_0"].flatten(1)).argmin(1)
    assert sorted(index.tolist()) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert_close(x_0, D["x_0"][index], atol=1e-4, rtol=1e-4)
    assert len(set(zip(index.tolist(), t.tolist(), strict=True))) == 12
    assert torch.isin(t, model.times).all()
    assert eps.mean().abs() < 0.05
    assert abs(eps.std() - 1) < 0.05
    theta = [x.clone().requires_grad_() for x in adapters["theta"]]
    ema = adapters["ema"]
    optimizer = torch.optim.AdamW(theta)
    optimizer.load_state_dict(state["optimizer"])
    optimizer.param_groups[0].update(lr=0.01, betas=(0.9, 0.999), weight_decay=1e-4)
    logged = torch.zeros(2)
    # Four optimizer steps were before.
    for step, part in enumerate(torch.arange(12).split(6), 5):
        pairs = nft.map_tensors(lambda x, i=index[part]: x[i], D)
        loss, kl = second_loss(model, adapters, theta, pairs, t[part], eps[part])
        optimizer.zero_grad()
        (loss + 0.5 * kl).backward()
        norm = torch.nn.utils.clip_grad_norm_(theta, 0.2)
        optimizer.step()
        logged += torch.stack([loss, kl]).detach() / 2
        decay = min((1 + step) / (10 + step), 0.41)
        ema = [decay * x + (1 - decay) * y.detach() for x, y in zip(ema, theta, strict=True)]

    # Update.
    old = [0.4 * x + 0.6 * y.detach() for x, y in zip(adapters["old"], theta, strict=True)]
    after = checkpoint(out)["lora"]
    for policy, mine in {"theta": theta, "ema": ema, "old": old}.items():
        vectors = (adapters[policy], after[policy], mine)
        before, now, expected = map(torch.nn.utils.parameters_to_vector, vectors)
        assert (now - expected).norm() < 2e-3 * (now - before).norm(), policy
    values = {"loss": logged[0], "kl": logged[1], "grad_norm": norm, "reward": raw.mean()}
    for field, value in values.items():
        assert row[field] == pytest.approx(value.item(), rel=1e-3)


def test_gradients_are_clipped_at_a_fifth(tmp_path):
    """The released norm is 1 for five times our loss: AdamW's first moment is a tenth of 0.2."""

    def steep(*pairs):
        loss, kl, deviation = nft.pair_losses(*pairs)
        return 1000 * loss, kl, deviation

    rows = train("sd15", tmp_path / "run", {"losses": steep}, iterations=1, updates=1)
    assert rows[1]["grad_norm"] > 2
    moments = checkpoint(tmp_path / "run")["optimizer"]["state"].values()
    norm = sum(m["exp_avg"].square().sum() for m in moments).sqrt()
    assert norm.item() == pytest.approx(0.02, rel=1e-4)


def test_only_adapters_learn(tmp_path):
    """The base stays bit for bit; adapters are fp32 whatever the base and torch's default are."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = new_model("sd15", precision="bf16")
        before = nft.map_tensors(torch.clone, dict(model.net.state_dict()))
        train("sd15", tmp_path / "run", {"make_model": lambda config: model}, precision="bf16")
    finally:
        torch.set_default_dtype(torch.float32)
    assert_close(dict(model.net.state_dict()), before, atol=0, rtol=0)
    state = checkpoint(tmp_path / "run")
    learned = [x for adapter in state["lora"].values() for x in adapter]
    learned += [m["exp_avg"] for m in state["optimizer"]["state"].values()]
    assert {x.dtype for x in learned} == {torch.float32}


def minus_red(images, prompts, metadata):
    return -red(images, prompts, metadata)


def shuffled_red(images, prompts, metadata):
    """The rewards of a batch, given to the wrong images."""
    rewards = red(images, prompts, metadata)
    noise = nft.generator("shuffled", rewards.sum().item())
    order = torch.randperm(len(rewards), generator=noise)
    return rewards[order]


def test_reward_rises(tmp_path):
    """The held-out reward rises; negated, it falls; shuffled, it stays where it was."""
    # An eighth of them: evaluation would take most of the time.
    captions = (HERE / "examples/tiny/heldout.txt").read_text().splitlines()[:32]
    (tmp_path / "heldout.txt").write_text("\n".join(captions))
    settings = {"iterations": 5, "groups": 4, "group_size": 8, "steps": 4, "eval_steps": 4}
    settings |= {"lr": 5e-3, "beta": 0.3, "kl": 0, "eta": 0, "z": 1.0, "ema": 0.5, "rank": 8}
    changes = []
    for reward in (red, minus_red, shuffled_red):
        rewards = {"trained": reward, "redness": (0, red)}
        out = tmp_path / reward.__name__
        files = {"out": out, "eval_prompts": tmp_path / "heldout.txt"}
        rows = nft.train(nft.configure(model="tiny", reward=rewards, **files, **settings))
        changes.append(rows[-1]["eval_reward/redness"] - rows[0]["eval_reward/redness"])
    rises, falls, stays = changes
    assert rises > 0.03
    assert falls < -0.03
    assert abs(stays) < 0.015


# ---- A run, whole and broken ---------------------------------------------------------------------
def test_what_a_run_leaves():
    """DIR holds settings, one JSON object an iteration, pictures and weights, as documented."""
    out = finished("sd15")
    assert json.loads((out / "config.json").read_text())["lr"] == 0.01
    base, one, last = metrics(out)
    always = {"iteration", "images", "seconds"}
    part = f"reward/{root()}/reward.py:red"
    evaluated = always | {"eval_reward", "eval_reward_std", f"eval_{part}"}
    trained = always | {"reward", "reward_std", part}
    trained |= {"r_std", "loss", "kl", "old_deviation", "grad_norm", "eta"}
    assert base.keys() == evaluated
    assert one.keys() == trained
    assert last.keys() == evaluated | trained
    assert [row["iteration"] for row in metrics(out)] == [0, 1, 2]
    assert [row["images"] for row in metrics(out)] == [0, 6, 12]
    files = "000000.png 000002.png before_after.png config.json metrics.jsonl checkpoint.pt \
        pytorch_lora_weights.safetensors scheduler_config.json"
    assert {file.name for file in out.rglob("*.*")} == set(files.split())


FAILING = """
import signal

calls = []


def reward(images, prompts, metadata):
    calls.append(len(images))
    # Held-out prompts, then an iteration's images in one batch.
    if len(calls) == 3:
        {how}
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))
"""
# What a reward does in iteration 2: exit status, and what the last line begins with.
FAILURES = {
    "signal.raise_signal(signal.SIGINT)": (130, "interrupted;"),
    "1 / 0": (1, "failed;"),
    "return [0.0] * (len(images) - 1)": (1, "failed;"),
    "return [float('nan')] * len(images)": (1, "reward {}: must be finite, not [nan,"),
}


@pytest.mark.parametrize("how", FAILURES)
def test_ctrl_c_and_failures_of_a_reward(tmp_path, capsys, how):
    """A traceback where Python has one, then one line; --resume ends as if nothing had happened.

    The line names what is saved, and how to go on; status 1, for Ctrl-C 130.
    """
    (tmp_path / "failing.py").write_text(FAILING.format(how=how))
    reward = f"{tmp_path}/failing.py:reward"
    status, says = FAILURES[how]
    out = run("sd15", tmp_path / "a run", status, reward=reward)
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("nft.py: " + says.format(reward))
    assert "iteration 1 is saved" in lines[-1]
    assert f"add --out '{out}' --resume" in lines[-1]
    assert any("Traceback" in line for line in lines) == (says == "failed;")
    assert checkpoint(out)["rows"][-1]["iteration"] == 1
    run("sd15", out, reward=reward, resume=True)
    resumed, whole = checkpoint(out), checkpoint(finished("sd15"))
    for part in ("lora", "optimizer"):
        assert_close(resumed[part], whole[part], atol=0, rtol=0)
    assert resumed["rows"][2]["eval_reward"] == whole["rows"][2]["eval_reward"]


# ---- Flags, presets, rewards and prompts ---------------------------------------------------------
# examples/tests/test_robust.py has more.
BAD = "model=no/such reward=no-such-reward reward=jpeg=x reward=jpeg=0 eta=1.5 eta=abc \
    prompts=none.txt prompts=examples/tiny eval-prompts=none.txt lr=nan group-size=1 updates=7 \
    resolution=30 device=gpu9"


@pytest.mark.parametrize("word", BAD.split())
def test_bad_input_is_refused(tmp_path, monkeypatch, capsys, word):
    """Exit 2, one line with the value and the rule, no traceback, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    words = common.command_line("sd15", out="here")
    capsys.readouterr()
    assert nft.main([*words, f"--{word}"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("nft.py: ")
    assert word.split("=")[-1] in line
    assert "must" in line
    assert list(tmp_path.iterdir()) == []


def test_presets_only_set_defaults():
    """A flag wins over the preset, the preset over Config; own prompts bring their own held-out."""
    assert nft.parse(["--model=x", "--out=x"]) == nft.Config(model="x", out="x")
    assert nft.parse(["--out=x"]) == nft.Config(**nft.PRESETS["tiny"], out="x")
    assert nft.parse(["--lr=9", "--out=x"]).lr == 9
    assert nft.configure(prompts=Path("x"), out="x").eval_prompts == ""
    # argparse refuses what is no flag, abbreviations too, and what is no choice.
    for word in ("--iter=1", "--solver=Nope", "--precision=fp8"):
        with pytest.raises(SystemExit, match="2"):
            nft.main([word])


def test_kl_of_the_presets():
    """2e-5 is the released weight, 1e-4, for a loss without its factor of 5; for eps it is 0.1."""
    for model in ("sd3", "flux", "a/directory"):
        assert nft.configure(model=model, out="x").kl == 2e-5
    for model in ("sd15", "sdxl"):
        assert nft.configure(model=model, out="x").kl == 0.1


def test_rewards_add_up_and_weight_0_is_only_logged(tmp_path):
    """Rewards are weighted and summed; one of weight 0 is evaluated, and never trained on."""
    file = f"{root()}/reward.py"
    rewards = f"{file}:red=2,jpeg=-0.5"
    name = f"eval_reward/{file}:minus_red"
    one = run("sd15", tmp_path / "one", reward=rewards)
    two = run("sd15", tmp_path / "two", reward=f"{rewards},{file}:minus_red=0")
    assert metrics(one, "seconds") == metrics(two, "seconds", name)
    last = metrics(two)[2]
    total = 2 * last[f"eval_reward/{file}:red"] - 0.5 * last["eval_reward/jpeg"]
    assert last["eval_reward"] == pytest.approx(total)
    assert last[name] == -last[f"eval_reward/{file}:red"]


@pytest.mark.parametrize("n, number", [(1, 1), (20, 10), (100, 16), (400, 40), (1000, 64)])
def test_held_out_prompts_are_never_trained_on(tmp_path, n, number):
    """A tenth of the distinct prompts, 16 to 64, never over half, by seed; one is all there is."""
    lines = [f"picture {i // 2}" for i in range(2 * n)]
    (tmp_path / "p.txt").write_text("\n".join(lines))
    config = nft.configure(model="x", prompts=tmp_path / "p.txt", out="x")
    trained, held_out = nft.load_prompt_sets(config)
    hidden = dict(held_out).keys()
    assert len(hidden) == number
    if n > 1:
        assert dict(trained).keys() == set(lines) - hidden
        # Not the head of a file that may be sorted.
        assert hidden != set(lines[: 2 * number])


@HUB
def test_the_command_that_people_type(name, tmp_path):
    """`python nft.py --model NAME --reward aesthetic` trains, from the hub's cache alone."""
    root()
    words = ["--model", name, "--reward", "aesthetic", "--out", str(tmp_path / "run")]
    words += ["--device", "cpu", "--iterations", "2", "--groups", "2", "--group-size", "2"]
    if name != "sd15":
        words += ["--resolution", "32", "--steps", "2"]
    assert nft.main(words) == 0
    scores = {row.get("eval_reward/aesthetic") for row in metrics(tmp_path / "run")}
    assert len(scores) == 3


# ---- Copied alone, and as a library --------------------------------------------------------------
def test_nft_py_alone_trains(tmp_path):
    """Copied alone it takes a hub id, its two rewards, and prompts of its own."""
    root()
    words = ["--model=stable-diffusion-v1-5/stable-diffusion-v1-5", "--reward=aesthetic,jpeg=0"]
    words += ["--iterations=1", "--groups=2", "--group-size=2", "--steps=2", "--out=run"]
    done = common.start(words, script=shutil.copy(HERE / "nft.py", tmp_path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {"eval_reward/aesthetic", "eval_reward/jpeg"} <= metrics(tmp_path / "run")[0].keys()


def test_nft_py_alone_names_what_is_missing(tmp_path, monkeypatch, capsys):
    """What needs the repository says so in one line that names the file, and exits 2."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(nft, "__file__", str(tmp_path / "nft.py"))
    for words in ([], ["--model=sd3", "--reward=clip"]):
        assert nft.main(words) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert "examples/" in line
        assert "clone" in line
    assert list(tmp_path.iterdir()) == []


def process_state():
    """What a library must not leave changed."""
    return [
        signal.getsignal(signal.SIGINT),
        sys.stdout,
        torch.get_num_threads(),
        torch.get_float32_matmul_precision(),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.get_rng_state().tolist(),
    ]


def test_the_library_does_what_the_command_does(tmp_path):
    """train(configure(...)) returns the rows of metrics.jsonl, and leaves the process as it was."""
    before = process_state()
    rows = train("sd15", tmp_path / "run", reward={f"{root()}/reward.py:red": red})
    assert rows == metrics(tmp_path / "run")
    assert metrics(tmp_path / "run", "seconds") == metrics(finished("sd15"), "seconds")
    assert process_state() == before


def test_import_is_light():
    """`import nft` is silent, and brings neither diffusers nor transformers nor PIL."""
    code = "import sys, nft; print({'diffusers', 'transformers', 'peft', 'PIL'} & {*sys.modules})"
    call = [sys.executable, "-c", code]
    done = subprocess.run(call, cwd=HERE, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("set()\n", "")
