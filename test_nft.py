"""The laws of nft.py and its promises to the user: each test's docstring states one.

    pip install pytest peft; python -m pytest -q test_nft.py       # two to three minutes on two cores

No network and no GPU are needed; peft serves pipe.load_lora_weights alone.
SPDX-License-Identifier: MIT
"""
# ruff: noqa: E302, E305, E306, E401, E402, E731
import functools, json, os, pathlib, re, shutil
import signal, subprocess, sys, tempfile, time, types

HERE, TEMP = pathlib.Path(__file__).resolve().parent, tempfile.TemporaryDirectory()
ROOT = pathlib.Path(os.environ.setdefault("NFT_TEST_ROOT", TEMP.name))      # of all test files
os.environ.update(HF_HUB_CACHE=f"{ROOT}/hub", HF_HUB_OFFLINE="1")      # no hub but ours, no network
sys.path[:0] = [str(HERE), str(HERE / "examples")]

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
import untrained
import nft

# ---- The method: Eq. (1) to (6) on tensors -------------------------------------------------------
KINDS = pytest.mark.parametrize("kind", ("flow_prediction", "epsilon", "v_prediction"))
def problem(kind):
    """Six float64 samples, what a denoiser should say of them, what theta and old say, and r."""
    rng = np.random.default_rng(1)
    x_0, eps, off, off_old = torch.tensor(rng.normal(size=(4, 6, 5)))
    r, sigma = torch.tensor(rng.uniform(size=6)), torch.linspace(0.1, 0.9, 6).double()[:, None]
    alpha = 1 - sigma if kind == "flow_prediction" else (1 - sigma ** 2).sqrt()
    target = {"flow_prediction": eps - x_0, "epsilon": eps}.get(kind, alpha * eps - sigma * x_0)
    theta, old = (target + off).requires_grad_(), target + off_old
    def predict(out):
        return nft.predict_x0(alpha * x_0 + sigma * eps, out, alpha, sigma, kind)
    def loss(r, beta, distance):                    # of each sample, and its gradient by theta
        value = nft.nft_loss(predict(theta)[0], predict(old)[0], x_0, r, beta, distance)
        return value.detach(), torch.autograd.grad(value.sum(), theta)[0]
    return types.SimpleNamespace(**locals())
squared = lambda x0_hat, x_0: (x0_hat - x_0).square().sum(1)

def test_implicit_policies_mirror_each_other():
    """v+ + v- = 2 v_old, and v+ lies the share beta of the way from v_old to v_theta."""
    p, seen = problem("epsilon"), []
    nft.nft_loss(p.theta, p.old, p.x_0, p.r, 0.3, lambda *a: seen.append(a[0]) or squared(*a))
    assert_close(torch.stack(seen) - p.old, 0.3 * torch.stack([p.theta - p.old, p.old - p.theta]))

def test_all_positive_is_flow_matching():
    """r = 1, beta = 1, unweighted: Eq. (1) with w(t) = t^2, in value and in gradient."""
    p = problem("flow_prediction")
    off = (p.theta - p.target).detach()
    assert_close(p.loss(1.0, 1.0, squared), (squared(p.sigma * off, 0), 2 * p.sigma ** 2 * off))

@KINDS
def test_gradient_identity(kind):
    """Unweighted: slope^2 / beta times 2 beta [(2r - 1)(v_old - v) + beta (v_theta - v_old)]."""
    p, beta = problem(kind), 0.4
    bracket = (2 * p.r[:, None] - 1) * (p.old - p.target) + beta * (p.theta.detach() - p.old)
    assert_close(p.loss(p.r, beta, squared)[1], p.predict(p.old)[1] ** 2 * 2 * bracket)

@KINDS
def test_loss_is_the_paper_s(kind):
    """(r L+ + (1 - r) L-) / beta, adaptive: a loop over output space has its value and gradient."""
    p, beta = problem(kind), 0.6
    loss, gradient = p.loss(p.r, beta, nft.adaptive_loss)
    for i, r in enumerate(p.r.tolist()):
        expected = [0.0] * 6                        # the loss, and its gradient by five numbers
        slope = p.sigma[i].item() / (p.alpha[i].item() if kind == "epsilon" else 1)
        for share, sign in ((r, 1), (1 - r, -1)):
            error = [slope * ((1 - sign * beta) * o + sign * beta * v - target) for v, o, target in
                     zip(p.theta[i].tolist(), p.old[i].tolist(), p.target[i].tolist())]
            scale = sum(map(abs, error)) / 5        # its gradient is stopped
            terms = [sum(e * e for e in error), *(2 * e * slope * sign * beta for e in error)]
            expected = [x + share * y / 5 / scale / beta for x, y in zip(expected, terms)]
        assert [loss[i].item(), *gradient[i].tolist()] == pytest.approx(expected, 1e-10)

def test_minimiser_of_equation_6():
    """Where v_old is exact, the minimiser is v_old + (2 / beta) Delta, with Delta of Eq. (4)."""
    rng = np.random.default_rng(3)
    x_0, x_t = torch.tensor(rng.normal(size=(7, 2))), torch.tensor([0.3, -0.4]).double()
    prior, r = torch.tensor(rng.uniform(size=(2, 7)))           # seven pictures are all there are
    for t, beta in ((0.3, 1.0), (0.5, 0.2), (0.8, 1.7)):
        eps = (x_t - (1 - t) * x_0) / t
        p, v = prior * (-eps.square().sum(1) / 2).exp(), eps - x_0      # p(x_0 | x_t), by Bayes
        old, positive, negative = (w @ v / w.sum() for w in (p, p * r, p * (1 - r)))
        delta = p @ r / p.sum() * (positive - old)
        assert_close(delta, p @ (1 - r) / p.sum() * (old - negative))   # Theorem 3.1
        def risk(theta):
            x0_theta, x0_old = ((x_t - t * out).expand(7, 2) for out in (theta, old))
            return p @ nft.nft_loss(x0_theta, x0_old, x_0, r, beta, squared)
        slope, curvature = (d(risk)(0 * old) for d in (torch.func.jacrev, torch.func.hessian))
        assert_close(-torch.linalg.solve(curvature, slope), old + 2 / beta * delta)

RNG = np.random.default_rng(0)                      # 24 rewards in 4 groups, which differ much
GROUPS = RNG.permutation(np.arange(24) % 4)
RAW = 10.0 * GROUPS + RNG.normal(size=24) * (1 + GROUPS)
@pytest.mark.parametrize("z, unit", [(0.1, 1), (1.0, 1), (5.0, 1), (1.0, 1e-5)])
def test_r_is_the_paper_s(z, unit):
    """r = 1/2 + 1/2 clip[(r_raw - mean of the prompt) / (z (std of all + 1e-4)), -1, 1]; z is 5."""
    raw = RAW * unit                                # the last one feels the 1e-4
    mean = np.array([raw[GROUPS == g].mean() for g in GROUPS])
    Z_c = z * (np.sqrt(np.mean((raw - np.mean(raw)) ** 2)) + 1e-4)
    r = nft.optimality_reward(raw, GROUPS, **{"z": z} if z != 5 else {}).numpy()
    np.testing.assert_allclose(r, 0.5 + 0.5 * np.clip((raw - mean) / Z_c, -1, 1), atol=2e-6)

def test_r_compares_within_a_prompt():
    """r averages 1/2 in each group, is 1/2 throughout a constant one, and knows no order."""
    raw, order = np.where(GROUPS == 2, 7.0, RAW), RNG.permutation(24)
    r = nft.optimality_reward(raw, GROUPS)
    assert [r[GROUPS == g].mean().item() for g in range(4)] == pytest.approx([0.5] * 4)
    assert (r[GROUPS == 2] == 0.5).all() and (r[GROUPS != 2] != 0.5).all()
    assert_close(nft.optimality_reward(raw[order], 100 - 7 * GROUPS[order]), r[order])
    pytest.raises(ValueError, nft.optimality_reward, [1.0, np.nan, 0.0], [0, 0, 0])

def test_eta_schedules():
    """eta_i = min(0.001 i, 0.5); for OCR 0 until 75, then 0.0075 (i - 75), at most 0.999."""
    eta, ocr = nft.soft_update_decay, "75,0.0075,0.999"
    assert [eta(i) for i in (1, 100, 500, 1000)] == pytest.approx([0.001, 0.1, 0.5, 0.5])
    assert [eta(i, ocr) for i in (0, 75, 76, 100, 300)] == pytest.approx([0, 0, .0075, .1875, .999])
    assert [eta(i, s) for i in (1, 10 ** 6) for s in ("0", "0.9", "1", 0.3)] == [0, 0.9, 1, 0.3] * 2
    for bad in ("-0.1", "1.5", "a", "", "0,1", "0,-1,0.5", "0,0.1,2", "nan", "nan,0.1,0.5"):
        pytest.raises(ValueError, eta, 1, bad)

def test_forward_process():
    """alpha_t x_0 + sigma_t eps is DDIMScheduler.add_noise at every time; predict_x0 inverts it."""
    from diffusers import DDIMScheduler
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    t, (x_0, eps), curve = torch.arange(1000), torch.randn(2, 1000, 3), scheduler.alphas_cumprod
    alpha, sigma = (a[:, None] for a in nft.alpha_sigma(t.float(), curve))
    assert_close(alpha * x_0 + sigma * eps, scheduler.add_noise(x_0, eps, t))
    assert all(map(torch.equal, nft.alpha_sigma(sigma), (1 - sigma, sigma)))    # rectified flow
    for p in map(problem, ("flow_prediction", "epsilon", "v_prediction")):
        assert_close(p.predict(p.target)[0], p.x_0)     # and alpha = 0 divides nothing
        assert nft.predict_x0(eps, eps, 0 * sigma, 1 + 0 * sigma, p.kind)[0].isfinite().all()

# ---- Pipelines, untrained where pictures don't matter, and small runs of them --------------------
PIPES = pytest.mark.parametrize("name", ("sd15", "sdxl", "sd15-v", "sd3", "flux"))
FILES = {"empty.txt": " \n\n", "bad.jsonl": '{"text": "a red circle"}\n', "binary.txt": "\xff",
         "train.txt": "a red circle\n\n two blue squares \na green cross\n",
         "told.jsonl": '{"prompt": "a red circle", "n": 2}\n{"prompt": "a dog", "n": 5}\n',
         "reward.py": '''
import io, torch
from PIL import Image
def red(images, prompts, metadata):
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))
minus_red = lambda *a: -red(*a)
shuffled = lambda *a, rng=torch.Generator(): red(*a)[torch.randperm(len(a[0]), generator=rng)]
def jpeg(images, prompts, metadata):
    files = [io.BytesIO() for _ in images]
    for file, x in zip(files, (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()):
        Image.fromarray(x).save(file, "JPEG", quality=95)
    return [-len(file.getvalue()) / 1000 for file in files]
def blue(images, prompts, metadata):
    assert images.shape == (len(prompts), 3, 32, 32) and 0 <= images.min() and images.max() <= 1
    return images[:, 2].numpy().mean((1, 2))
def told(images, prompts, metadata):
    return [m.pop("n") + (p == "a red circle") for p, m in zip(prompts, metadata)], {"no": "matter"}
calls = []
def fifth(how):                     # the fifth call, after a trial, is the first of iteration 2
    return lambda *a: (how if calls.append(a) or len(calls) > 4 else list)(red(*a).tolist())
raises, short = fifth(lambda x: {}["lost"]), fifth(lambda x: x[1:])
nan = fifth(lambda x: [*x[1:], float("nan")])
'''}
@pytest.fixture(scope="session", autouse=True)
def files_and_pipelines():
    """In ROOT: rewards, prompts good and bad, small untrained pipelines, the hub's cache."""
    if not (ROOT / "hub").exists():
        untrained.build(ROOT)
    for file, text in FILES.items():
        (ROOT / file).write_text(text, "latin-1")
    scheduler, index = "scheduler/scheduler_config.json", "model_index.json"
    for name, file, changes in (    # v with no signal at the first step; and what nft.py refuses
            ("sd15-v", scheduler, {"epsilon": "v_prediction", "leading": "trailing",
                                   '_zero_snr": false': '_zero_snr": true'}),
            ("sample", scheduler, {"epsilon": "sample"}),
            ("edm", index, {"DDIM": "EDMEuler"}),
            ("inpaint", index, {"StableDiffusionPip": "StableDiffusionInpaintPip"})):
        text = (shutil.copytree(ROOT / "sd15", ROOT / name, dirs_exist_ok=True) / file).read_text()
        for old, new in changes.items():
            assert old in text
            text = text.replace(old, new)
        (ROOT / name / file).write_text(text)
def argv(name, **flags):
    """The command line of a small run of a pipeline in ROOT; `flags` win."""
    given = dict(model=ROOT / name, reward="red") | flags
    given |= {} if "sd15" in str(name) else {"max_sequence_length": 2}
    given["reward"] = re.sub(r"^(\w+)$", rf"{ROOT}/reward.py:\1", given["reward"])
    small = f"""--prompts {ROOT}/train.txt --eval-prompts {ROOT}/train.txt --iterations 2 --groups 2
        --group-size 3 --batch-size 4 --updates 2 --train-times 2 --steps 3 --rank 4 --lr 0.01 --z 2
        --warmup 3 --beta 0.7 --kl 0.5 --ema 0.8 --eta 0.4 --resolution 32 --eval-every 2
        --device cpu""".split()
    pairs = [("--" + k.replace("_", "-"), str(v)) for k, v in given.items()]
    return small + [x for pair in pairs for x in pair if x != "True"]
def run(name, status=0, **flags):
    assert nft.main(argv(name, **flags)) == status
    return flags["out"]
@functools.cache
def finished(name):
    """The directory of a run of two iterations: change only copies of it."""
    return run(name, out=ROOT / "runs" / name)
def new_model(name, fill=False, **flags):
    """A Model of those settings; with `fill`, its adapters all differ and matter."""
    model = nft.Model(nft.parse(argv(name, **flags)))
    torch.manual_seed(0)
    for x in sum(model.lora.sets.values(), []) if fill else ():
        x.data = 0.1 * torch.randn(x.shape)
    return model
def checkpoint(out, part="lora"):
    return torch.load(out / "checkpoint.pt", weights_only=True)[part]
def metrics(out, *without):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in without} for row in rows]
TEXTS = ["a red circle", "two blue squares", "a green cross"]
SEEDS = [("evaluation", i) for i in range(3)]
def draw(pipe, form="pt"):
    return pipe(TEXTS, generator=[nft.generator(*s) for s in SEEDS], num_inference_steps=3,
                height=32, width=32, guidance_scale=1.0, output_type=form,
                max_sequence_length=2).images

# ---- The model: base, adapters, conditioning, forward process ------------------------------------
DPM = "DPMSolverMultistepScheduler"                 # it rounds flow times down to integers
@pytest.mark.parametrize("name, guidance, solver, bound", [
    ("sd15", 1.0, DPM, 1e-5), ("sd15", 3.0, DPM, 1e-5), ("sd3", 1.0, "", 1e-6),
    ("flux", 1.0, "", 1e-6), ("sd3", 3.0, DPM, 1.001e-3)])
def test_training_sees_what_the_sampler_saw(name, guidance, solver, bound):
    """Conditioning recorded is conditioning used; times and noise are the solver's; W + 2 B A."""
    model, calls = new_model(name, fill=True, guidance=guidance, solver=solver), []
    model.net.register_forward_hook(lambda _, args, kwargs, out: calls.append(
        (dict(model.signature.bind(*args, **kwargs).arguments), out[0])), with_kwargs=True)
    condition = model.sample(TEXTS, SEEDS, "old")["condition"]
    assert len(calls) == len(model.times) == 3
    for (given, out), level in zip(calls[:], model.pipe.scheduler.sigmas):
        x_t, t = given[model.input][-3:], torch.as_tensor(given["timestep"]).flatten()[-1]
        same = x_t, t.expand(3), condition
        for ours in (model.predict(*same, "old"), folded(model, model.lora.sets["old"], *same)):
            assert_close(ours, out[-3:], atol=1e-4, rtol=1e-4)  # of two halves the conditional one
        assert t in model.times and (guidance == 1 or (ours - out[:3]).abs().max() > 1e-3)
        alpha, sigma = model.alpha_sigma(t[None])
        assert_close((sigma / alpha if name == "sd15" else sigma)[0], level, atol=bound, rtol=0)

@pytest.mark.parametrize("name", ["tiny", "tiny-sd3"])
def test_solvers(name):
    """Every solver paints; those of an ODE, of any order, paint the same picture in the end."""
    pictures = {}
    for solver in ["", *nft.SOLVERS]:
        flags = dict(model=name, solver=solver, steps=40)
        if name == "tiny-sd3" and solver in ("ddim", "ddpm", "euler-a"):
            pytest.raises(nft.Failure, new_model, name, **flags)
        else:
            model = new_model(name, **flags)
            pictures[solver] = model.sample(TEXTS, SEEDS, "old")["images"]
    for solver, x in pictures.items():
        off = (x - pictures["dpm2"]).abs().mean()
        assert (off > 0.01) == (solver in ("ddpm", "euler-a", "lcm", "dpm2-sde")), (solver, off)

@PIPES
def test_theta_old_and_reference_share_one_base(name):
    """Without its adapter, or with a fresh one, the model is the pipeline, bit for bit."""
    plain = draw(nft.load_pipeline(nft.parse(argv(name)), torch.float32))
    assert torch.equal(new_model(name, fill=True).sample(TEXTS, SEEDS, None)["images"], plain)
    for policy in ("theta", "old", "ema"):
        assert torch.equal(new_model(name).sample(TEXTS, SEEDS, policy)["images"], plain)
    assert 0.2 < new_model(name).lora.sets["theta"][0].std() < 0.3      # as in peft: 1 / rank

@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux"])
def test_diffusers_loads_the_weights(name):
    """pipe.load_lora_weights(DIR) paints the images that the run evaluated, by theta's EMA."""
    from diffusers import DiffusionPipeline
    model, pipe = new_model(name), DiffusionPipeline.from_pretrained(ROOT / name)
    model.lora.sets["ema"] = checkpoint(finished(name))["ema"]
    ours, base = (model.sample(TEXTS, SEEDS, policy) for policy in ("ema", None))
    pipe.load_lora_weights(str(finished(name)))
    theirs = dict(images=draw(pipe), x_0=draw(pipe, "latent"))
    assert_close(theirs, {k: ours[k] for k in theirs}, atol=1e-5, rtol=1e-5)
    red = (ours["images"][:, 0] - ours["images"][:, 1:].mean(1)).mean().item()
    assert metrics(finished(name))[2]["eval_reward"] == pytest.approx(red, abs=1e-6)
    assert (ours["x_0"] - base["x_0"]).abs().max() > 1e-3

# ---- Training: one iteration a second time, and where many lead ----------------------------------
def folded(model, adapter, x_t, t, condition):
    """The denoiser with W + 2 B A in place of W: LoRA a second way."""
    weights = {f"{name}.weight": model.net.get_submodule(name).weight + 2 * B @ A
               for name, A, B in zip(model.lora.names, adapter[::2], adapter[1::2])}
    given = {k: v() if callable(v) else v for k, v in condition.items()}    # FLUX's ids
    inputs = {model.input: x_t, "timestep": t, **given, "return_dict": False}
    model.lora.active = None                        # the hooks' own adapter stays out
    return torch.func.functional_call(model.net, weights, (), inputs)[0]
def pair_loss(model, sets, theta, one, t, eps, r):
    """Loss, KL, old deviation of one image at one time, in the space of the denoiser's output."""
    x_0, beta, kind = one["x_0"], 0.7, model.pipe.scheduler.config.get("prediction_type")
    sigma = t / (1 if "img_ids" in one["condition"] else 1000)         # FLUX: t in [0, 1]
    if kind:
        sigma = (1 - model.pipe.scheduler.alphas_cumprod[t.long()]).sqrt()
    alpha = (1 - sigma ** 2).sqrt() if kind else 1 - sigma
    target = {None: eps - x_0, "epsilon": eps, "v_prediction": alpha * eps - sigma * x_0}[kind]
    out, old, ref = (folded(model, adapter, alpha * x_0 + sigma * eps, t, one["condition"])
                     for adapter in (theta, sets["old"], [0 * x for x in theta]))
    old, ref, loss = old.detach(), ref.detach(), 0
    for share, sign in ((r, 1), (1 - r, -1)):
        error = old + sign * beta * (out - old) - target        # of v+, of v-
        loss = loss + share * error.square().mean() / error.abs().mean().detach() / beta
    kl, deviation = (out - ref).square().mean(), (out - old).detach().square().mean()
    return torch.stack([(sigma / (alpha + sigma) * loss).squeeze(), kl, deviation])

@PIPES
def test_one_iteration_is_algorithm_1(name, tmp_path, monkeypatch):
    """An iteration equals Algorithm 1 written a second time: Collect, Reward, Optimize, Update."""
    out, calls = shutil.copytree(finished(name), tmp_path / "run"), []
    sets, moments = checkpoint(out), checkpoint(out, "optimizer")["state"]
    for f in (nft.collect, nft.pair_losses):
        spy = lambda *a, f=f: calls.append((f, a, f(*a))) or calls[-1][2]
        monkeypatch.setattr(nft, f.__name__, spy)
    run(name, out=out, resume=True, iterations=3)
    _, (collect, (_, _, drawn, key, _), (collected, *_)), *others = calls   # the first is a trial
    pairs = [args for f, args, _ in others if f is not collect]
    after, row, model = checkpoint(out), metrics(out)[3], new_model(name)
    trained = pairs[0][0].net.state_dict()          # its base has not changed: adapters alone learn
    assert all(torch.equal(x, trained[k]) for k, x in model.net.state_dict().items())
    # Collect and Reward: three images of each prompt, no noise twice, by theta_old
    texts = [text for text, _ in drawn]
    assert texts == [texts[0]] * 3 + [texts[3]] * 3 and texts[0] != texts[3]
    model.lora.sets = sets
    rollout = model.sample(texts, [(*key, i) for i in range(6)], "old")     # one batch, not two
    assert_close(collected["x_0"], rollout["x_0"], atol=1e-4, rtol=1e-4)
    raw = rollout["images"][:, 0].mean((1, 2)) - rollout["images"][:, 1:].mean((1, 2, 3))
    mean = raw.view(2, 3).mean(1).repeat_interleave(3)
    r = 0.5 + 0.5 * ((raw - mean) / (2 * (raw.std(correction=0) + 1e-4))).clamp(-1, 1)
    # Optimize: each image at two of the sampler's times, in two steps of AdamW
    index, t, eps = (torch.cat([args[k] for args in pairs]) for k in (2, 3, 4))
    assert sorted(index.tolist()) == sorted([*range(6)] * 2) and len(eps.unique()) > 3000
    assert len({*zip(index.tolist(), t.tolist())}) == 12 and all(x in model.times for x in t)
    theta, ema, logged = sets["theta"], sets["ema"], torch.zeros(4)
    for step, part in enumerate(torch.arange(12).split(6), 5):  # four steps were before
        theta, terms = [x.requires_grad_() for x in theta], 0
        for k, i in zip(part.tolist(), index[part].tolist()):
            one = nft.map_tensors(lambda x: x[i:i + 1] if len(x) == 6 else x, rollout)
            terms = terms + pair_loss(model, sets, theta, one, t[k:k + 1], eps[k:k + 1], r[i]) / 6
        gradient = torch.autograd.grad(terms[0] + 0.5 * terms[1], theta)
        norm = torch.stack([g.norm() for g in gradient]).norm()
        logged += torch.stack([*terms.detach(), norm]) / 2
        theta = [x.detach() for x in theta]
        for k, g in enumerate(gradient):
            g, m, v = g * min(1, 1 / norm), moments[k]["exp_avg"], moments[k]["exp_avg_sq"]
            m.copy_(0.9 * m + 0.1 * g)
            v.copy_(0.999 * v + 0.001 * g * g)
            change = (m / (1 - 0.9 ** step)) / ((v / (1 - 0.999 ** step)).sqrt() + 1e-8)
            theta[k] = theta[k] - 0.01 * (change + 1e-4 * theta[k])
        ema = [0.8 * x + 0.2 * y for x, y in zip(ema, theta)]
    # Update
    old = [0.4 * x + 0.6 * y for x, y in zip(sets["old"], theta)]
    for key, mine in (("theta", theta), ("ema", ema), ("old", old)):
        was, now, mine = map(torch.nn.utils.parameters_to_vector, (sets[key], after[key], mine))
        assert (now - mine).norm() < 2e-3 * (now - was).norm(), key
    logged = [*logged, raw.mean(), raw.std(correction=0), r.std(correction=0), torch.tensor(0.4)]
    keys = "loss kl old_deviation grad_norm reward reward_std r_std eta".split()
    assert [row[k] for k in keys] == pytest.approx([x.item() for x in logged], rel=1e-3)

@pytest.mark.parametrize("name, top", [("sd15", 999), ("flux", 1)])
def test_uniform_times(name, top, tmp_path, monkeypatch):
    """--times uniform spreads the noise levels evenly over the whole schedule."""
    times, losses = [], nft.pair_losses
    monkeypatch.setattr(nft, "pair_losses", lambda *a: times.append(a[3]) or losses(*a))
    run(name, out=tmp_path / "run", times="uniform", train_times=40, batch_size=120)
    t = torch.cat(times).double().sort().values / top           # 480: Kolmogorov's test at 0.1%
    assert (t - torch.linspace(0, 1, 480)).abs().max() < 1.95 / 480 ** 0.5

def test_reward_rises(tmp_path):
    """The held-out reward rises; negated, it falls; shuffled, it stays where it was."""
    def change(reward):
        out = run(HERE / "examples/tiny-sd15", reward=reward, watch=f"{ROOT}/reward.py:red", eta=0,
                  out=tmp_path / reward, prompts=HERE / "examples/shapes_train.txt", beta=0.5,
                  eval_prompts=HERE / "examples/shapes_heldout.txt", iterations=8, groups=4, kl=.01,
                  group_size=12, rank=16, batch_size=64, updates=4, steps=4, lr=5e-3, eval_every=9)
        return np.diff([metrics(out)[i]["eval_reward/reward:red"] for i in (0, -1)])[0]
    assert change("red") > 0.04 and change("minus_red") < -0.02 and abs(change("shuffled")) < 0.02

# ---- The command line ----------------------------------------------------------------------------
def test_files_and_fields():
    """DIR holds settings, one JSON object an iteration, pictures and weights, as documented."""
    out, (first, one, last) = finished("sd15"), metrics(finished("sd15"))
    assert json.loads((out / "config.json").read_text())["lr"] == 0.01
    evaluated = {"iteration", "images", "eval_reward", "eval_reward_std", "eval_reward/reward:red"}
    trained = {"iteration", "images", "seconds", "reward", "reward_std", "reward/reward:red", "eta",
               "loss", "kl", "old_deviation", "grad_norm", "roughness"}
    assert evaluated <= {*first} and trained <= {*one} and evaluated | trained <= {*last}
    assert "eval_reward" not in one and one["roughness"] == 1
    assert [(x["iteration"], x["images"]) for x in (first, one, last)] == [(0, 0), (1, 6), (2, 12)]
    assert len([Image.open(p).size for p in out.rglob("*.png")]) == 3   # before_after, two samples

def test_interrupt_and_resume(tmp_path):
    """Ctrl-C saves, says how to go on, exits 130; --resume then ends as if nothing had happened."""
    out, wish = tmp_path / "run", argv("sd15", out=tmp_path / "run", iterations=10 ** 6)
    process = subprocess.Popen([sys.executable, HERE / "nft.py", *wish], stderr=subprocess.PIPE)
    while process.poll() is None and not (out / "samples/000002.png").exists():
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    last = process.communicate(timeout=60)[1].decode().strip().splitlines()[-1]
    done = int(re.search(r"nft.py: .*iteration (\d+) is saved.*--resume", last)[1])
    assert process.returncode == 130 and metrics(out)[done]["iteration"] == done
    with open(out / "metrics.jsonl", "a") as f:     # what a kill after the checkpoint would leave
        f.write(f'{{"iteration": {done + 1}, "images": 18}}\n{{"iteration": {done + 2}, "ima')
    run("sd15", out=out, iterations=done + 2, resume=True)
    whole = run("sd15", out=tmp_path / "whole", iterations=done + 2)
    assert metrics(out, "seconds") == metrics(whole, "seconds")
    assert_close(checkpoint(out), checkpoint(whole), atol=0, rtol=0)
    assert len({(d / "pytorch_lora_weights.safetensors").read_bytes() for d in (out, whole)}) == 1

@pytest.mark.parametrize("flags, says", [
    (dict(reward="raises"), "raises: .*KeyError.*lost"),
    (dict(reward="nan"), "nan: .*one finite number .*nan for image 3, prompt"),
    (dict(reward="short"), "short: .*one finite number an image"),
    (dict(lr=1e30, eta=1, updates=1), "loss of prompt .* is not finite; try")])
def test_failure_is_named_and_nothing_lost(tmp_path, capsys, flags, says):
    """What fails in iteration 2 exits 1 with one line that names it, and iteration 1 is saved."""
    out = run("sd15", 1, out=tmp_path / "run", iterations=9, **flags)
    error = capsys.readouterr().err
    assert re.search(f"{says}.*iteration 2.*iteration 1 is saved.*--resume", error.strip().splitlines()[-1])
    assert "Traceback" not in error and checkpoint(out) and len(metrics(out)) == 2

BAD = """model=no/such model={ROOT} reward=a-b reward={ROOT}/none.py:f reward={ROOT}/reward.py:none
reward=jpeg=x reward= watch=none prompts=none.txt prompts={ROOT}/empty.txt prompts={ROOT}/binary.txt
prompts={ROOT}/bad.jsonl eval_prompts=none.txt resolution=30 groups=0 groups=x group_size=-1 steps=0
batch_size=0 iterations=0 updates=0 updates=7 train_times=0 rank=0 eval_every=0 save_every=0 lr=0.0
lr=nan lr=inf beta=-1.0 z=0.0 kl=-0.1 guidance=-1.0 eta=1.5 solver=Nope device=gpu9 precision=fp8
nonsense=1 ema=-0.1 ema=1.0 times=all model={ROOT}/sample model={ROOT}/edm model={ROOT}/inpaint
solver=euler-a&model={ROOT}/sd3 model={ROOT}/sd15-v&solver=heun out={ROOT}/runs/sd15
out={ROOT}/train.txt/x resume=True lr=9.0&resume=True&out={ROOT}/runs/sd15"""
@pytest.mark.parametrize("flags", BAD.split())
def test_bad_input_is_refused(tmp_path, monkeypatch, capsys, flags):
    """Exit 2, one line with value, rule and mend, no traceback; nothing made, nothing changed."""
    flags = dict(x.split("=", 1) for x in flags.format(ROOT=ROOT).split("&"))
    def tree():
        return {p: p.lstat().st_mtime_ns for folder in (finished("sd15"), ROOT, tmp_path)
                for p in folder.rglob("*") if "__pycache__" not in p.parts}
    monkeypatch.chdir(tmp_path)
    before, (key, value), _ = tree(), [*flags.items()][0], capsys.readouterr()
    run("sd15", 2, **{"out": "here"} | flags)
    line, = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    says = f"--{key.replace('_', '-')}" + f" ?{value}: .*; .*\\w" * (value != "True")
    if key in ("precision", "times", "nonsense") or value == "x":        # argparse's own words
        says = f"{key}.*{value}"
    assert re.search(says, line) and tree() == before, line

def test_presets_only_set_defaults():
    """A flag wins over the preset, the preset over Config; own prompts bring their own held-out."""
    plain, preset, won = (nft.parse([*x, "--out", "x"]) for x in (["--model=x"], [], ["--lr=9"]))
    row = {k: v for k, v in nft.PRESETS["tiny"].items() if k != "path"} | {"out": "x"}
    assert plain == nft.Config(model="x", out="x") and preset == nft.Config(**row)
    assert won == nft.Config(**row | {"lr": 9.0}) and nft.parse(["--prompts=x"]).eval_prompts == ""

def test_rewards_add_up_and_watching_does_not(tmp_path):
    """Rewards are told prompts and metadata, and add up; a watched one is never trained on."""
    flags = dict(prompts=ROOT / "told.jsonl", eval_prompts=ROOT / "told.jsonl", precision="bf16",
                 reward=f"{ROOT}/reward.py:blue=2,{ROOT}/reward.py:told=-0.5,jpeg=1")
    one = run("sd15", out=tmp_path / "one", **flags)
    two = run("sd15", out=tmp_path / "two", watch=f"{ROOT}/reward.py:jpeg", **flags)
    for row, key in ((metrics(one)[1], "reward"), (metrics(two)[2], "eval_reward")):
        blue, told, jpeg = (row[f"{key}/{name}"] for name in ("reward:blue", "reward:told", "jpeg"))
        assert (told, row[key]) == (4, pytest.approx(2 * blue - 2 + jpeg))  # (2 + 1 + 5) / 2 = 4
    assert metrics(two, "seconds", "eval_reward/reward:jpeg") == metrics(one, "seconds")
    assert metrics(two)[0]["eval_reward/reward:jpeg"] == metrics(two)[0]["eval_reward/jpeg"] < -0.3
    assert_close(checkpoint(one), checkpoint(two), atol=0, rtol=0)
    assert {x.dtype for x in checkpoint(one)["theta"]} == {torch.float32}   # whatever --precision

@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux"])
def test_the_command_that_people_type(name, tmp_path):
    """`python nft.py --model NAME --reward aesthetic` trains, from the hub's cache alone."""
    command = f"--model {name} --reward aesthetic --out {tmp_path}/run --device cpu".split()
    small = "--iterations 2 --groups 2 --group-size 2".split()
    if name == "sd15":
        assert not subprocess.run([sys.executable, HERE / "nft.py", *command, *small]).returncode
        assert nft.load_pipeline(nft.parse(command), torch.float32).safety_checker is None
    else:
        assert nft.main([*command, *small, "--resolution", "32", "--steps", "2"]) == 0
    assert len({row.get("eval_reward/aesthetic") for row in metrics(tmp_path / "run")}) == 3

def test_nft_is_light():
    """nft.py has at most 800 lines of 100 columns; `import nft` is silent and needs torch alone."""
    code = "import sys, nft; print({'diffusers', 'transformers', 'peft', 'PIL'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    lines = [len(line) for line in (HERE / "nft.py").read_text().splitlines()]
    assert (done.stdout, done.stderr, len(lines) <= 800, max(lines) <= 100) == ("set()\n", "", 1, 1)
