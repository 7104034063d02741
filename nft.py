"""DiffusionNFT in one file: online reinforcement learning of diffusion on the forward process.

Sample images with any solver, score them, and fine-tune with a supervised loss that contrasts an
implicit positive and an implicit negative policy: no likelihoods, no trajectories, no guidance.
Paper: "DiffusionNFT: Online Diffusion Reinforcement with Forward Process", arXiv 2509.16117.

    python nft.py                                       # a tiny pipeline, on a CPU, in minutes
    python nft.py --model sd15 --reward aesthetic       # Stable Diffusion 1.5, LAION aesthetics
    python nft.py --model DIR --reward my.py:reward --prompts my.txt

    symbol    here           meaning
    x_0       x_0            a clean sample: the pipeline's final latents
    x_t       x_t            alpha_t x_0 + sigma_t eps, with eps ~ N(0, I): the forward process
    v_theta   out_theta      the trained denoiser's output (velocity, eps or v); x0_theta as sample
    v_old     out_old        the sampling policy, which follows theta slowly; x0_old as sample
    v_ref     out_ref        the model before training (adapter off)
    r_raw, r  raw, r         the reward, and the optimality in [0, 1] that it is normalised to
    beta      beta           how far the implicit policies lie from v_old, Eq. (5)
    eta_i     eta            share of theta_old that stays after iteration i, Algorithm 1 line 14
    Z_c, K    z, group_size  Z_c = z * std of the rewards; K images a prompt

Equation, section and line numbers are the paper's; README.md lists the departures from it.
SPDX-License-Identifier: MIT
"""
import argparse
import dataclasses
import functools
import io
import json
import math
import os
import pathlib
import random
import re
import runpy
import signal
import sys
import textwrap
import time
import zipfile
from inspect import signature

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._pytree import tree_map

# ---- Config: one typed field a flag --------------------------------------------------------------
def flag(default, help, low=None, high=math.inf, choices=None):
    """A field of Config and a command-line flag; a number lies in [low, high)."""
    return dataclasses.field(default=default, metadata=locals())

@dataclasses.dataclass
class Config:
    """Every setting. A preset (--model) replaces defaults; a flag always wins."""
    model: str = flag("tiny", "tiny, tiny-sd3, sd15, sdxl, sd3, flux, a directory or a hub id")
    reward: str = flag("aesthetic", "NAME, NAME=W,NAME=W or FILE.py:FUNCTION; see the README")
    watch: str = flag("", "same form as --reward: logged at evaluation, never trained on")
    prompts: str = flag("examples/animals.txt", ".txt (one a line) or .jsonl (`prompt`, metadata)")
    eval_prompts: str = flag("", "held-out prompts; empty: a tenth of --prompts, 64 at most")
    out: str = flag("", "run directory; empty: a new one under runs/")
    resume: bool = flag(False, "go on with the run in --out")
    iterations: int = flag(100, "iterations i of Algorithm 1", 1)
    groups: int = flag(16, "prompts an iteration", 1)
    group_size: int = flag(12, "images a prompt, K", 2)
    batch_size: int = flag(4, "images in one forward pass: memory and speed", 1)
    updates: int = flag(1, "optimizer steps an iteration, which share its images", 1)
    train_times: int = flag(2, "noise levels t an image, at most those of the sampler", 1)
    times: str = flag("sampler", "where these lie", choices=("sampler", "uniform"))
    lr: float = flag(3e-4, "learning rate of AdamW", 1e-9)
    warmup: int = flag(10, "optimizer steps over which the learning rate rises", 0)
    beta: float = flag(1.0, "beta of Eq. (5): smaller is faster and less stable", 1e-9)
    kl: float = flag(1e-4, "weight of the mean squared distance to the base model's output", 0)
    eta: str = flag("0,0.001,0.5", "soft update eta_i: a constant, or START,SLOPE,MAX")
    z: float = flag(5.0, "Z_c = z * std of the iteration's rewards: smaller spreads r more", 1e-9)
    ema: float = flag(0.9, "decay a step of the average of theta that is evaluated and saved", 0, 1)
    rank: int = flag(32, "LoRA rank; alpha is twice the rank", 1)
    solver: str = flag("", "dpm2, euler ... or a class of diffusers; empty: the pipeline's own")
    steps: int = flag(10, "sampling steps", 1)
    guidance: float = flag(1.0, "guidance scale of the rollout; 1 is none, as in the paper", 1)
    resolution: int = flag(0, "height and width in pixels; 0: the pipeline's own", 0)
    max_sequence_length: int = flag(0, "text tokens, where a pipeline takes it; 0: its own", 0)
    precision: str = flag("auto", "of the base", choices=("auto", "fp32", "bf16", "fp16"))
    checkpointing: bool = flag(False, "recompute activations: less memory, a slower backward pass")
    device: str = flag("auto", "auto, cpu, cuda, cuda:1 ...")
    seed: int = flag(0, "fixes prompts, noise and the adapter's start")
    eval_every: int = flag(10, "iterations between evaluations; the first is before training", 1)
    save_every: int = flag(10, "iterations between checkpoints", 1)

TINY = dict(reward="examples/shapes.py:reward", prompts="examples/shapes_train.txt",
            eval_prompts="examples/shapes_heldout.txt", solver="dpm2", batch_size=64, updates=4)
PRESETS = {                                     # rows of defaults: no code depends on a name
    "tiny": dict(TINY, path="examples/tiny-sd15", iterations=24, train_times=3, lr=2e-3,
                 beta=0.3, kl=0.1, eval_every=6),
    "tiny-sd3": dict(TINY, path="examples/tiny-sd3", max_sequence_length=2, iterations=130,
                     train_times=3, lr=1.5e-3, kl=0.03, ema=0.99, eval_every=20),
    "sd15": dict(path="stable-diffusion-v1-5/stable-diffusion-v1-5", kl=0.1, solver="dpm2"),
    "sdxl": dict(path="stabilityai/stable-diffusion-xl-base-1.0", kl=0.1, solver="dpm2"),
    "sd3": dict(path="stabilityai/stable-diffusion-3.5-medium", resolution=512, solver="dpm2"),
    "flux": dict(path="black-forest-labs/FLUX.1-dev", resolution=512, guidance=3.5)}  # an input
SOLVERS = {                 # short names of diffusers' schedulers; flow takes the FlowMatch ones
    "ddim": "DDIM", "ddpm": "DDPM", "euler": "EulerDiscrete", "euler-a": "EulerAncestralDiscrete",
    "heun": "HeunDiscrete", "lcm": "LCM", "unipc": "UniPCMultistep", "dpm2": "DPMSolverMultistep",
    "dpm2-sde": "DPMSolverMultistep"}

class Failure(Exception):
    """One line for the user: the value, the rule, the mend."""

def refuse(message):
    """Raise Failure."""
    raise Failure(message)

# ---- The method: pure functions of tensors and scalars -------------------------------------------
def alpha_sigma(t, alphas_cumprod=None):
    """Coefficients of the forward process x_t = alpha_t x_0 + sigma_t eps (section 2).
    Rectified flow (alphas_cumprod None): t in [0, 1], alpha = 1 - t, sigma = t. Otherwise t in
    [0, T - 1], rounded, indexes alphas_cumprod (T,) = alpha^2. Both are shaped like t."""
    if alphas_cumprod is None:
        return 1 - t, t
    alpha_squared = alphas_cumprod[t.round().long()]
    return alpha_squared.sqrt(), (1 - alpha_squared).sqrt()

def predict_x0(x_t, out, alpha_t, sigma_t, prediction):
    """The clean sample that a denoiser's output stands for, and its slope |d x_0 / d out|.
    x_t, out: (B, ...); alpha_t, sigma_t: broadcastable to them. prediction, as diffusers names it:
    "flow_prediction" (v = eps - x_0), "epsilon", "v_prediction" (v = alpha eps - sigma x_0). x_0 is
    affine in out with coefficients of (x_t, t) alone: mixing outputs mixes clean samples."""
    if prediction == "flow_prediction":
        return x_t - sigma_t * out, sigma_t
    if prediction == "epsilon":
        alpha_t = alpha_t.clamp_min(2 ** -12)           # 0 where the schedule ends in pure noise
        return (x_t - sigma_t * out) / alpha_t, sigma_t / alpha_t
    return alpha_t * x_t - sigma_t * out, sigma_t

def optimality_reward(raw, groups, z=5.0):
    """r = 1/2 + 1/2 clip[(r_raw - mean of its group) / Z_c, -1, 1], the optimality (section 3.3).
    raw: (B,) rewards, finite, of any unit. groups: (B,) integers, equal for images of one prompt.
    Z_c = z * (population std of all B rewards + 1e-4), as in the released code: with z = 5, a
    reward one std above its group's mean gets r = 0.6, so r stays near 1/2, hardly ever clipped.
    Returns r (B,), float32, in [0, 1]. Raises ValueError for a reward that is not finite."""
    raw = torch.as_tensor(raw, dtype=torch.float64)     # the mean of equal rewards is theirs
    groups = torch.as_tensor(groups, device=raw.device)
    if not torch.isfinite(raw).all():
        raise ValueError("a reward is not finite")
    mean = torch.stack([raw[groups == group].mean() for group in groups])
    Z_c = z * (raw.std(correction=0) + 1e-4)        # Departs from section 3.3: as the released code
    return (0.5 + 0.5 * ((raw - mean) / Z_c).clamp(-1, 1)).float()

def adaptive_loss(x0_hat, x_0):
    """||x0_hat - x_0||^2 / sg(mean |x0_hat - x_0|), section 3.3, for Eq. (1)'s w(t): -> (B,)."""
    error = (x0_hat - x_0).flatten(1)
    return error.square().mean(1) / error.detach().abs().mean(1).clamp_min(1e-5)

def nft_loss(x0_theta, x0_old, x0, r, beta, distance=adaptive_loss):
    """The DiffusionNFT loss of each sample, Eq. (5), in the space of clean samples: (B,).
    x0_theta, x0_old: (B, ...), predicted from the same (x_t, t) by the trained and by the old
    policy, the latter without gradient. x0: (B, ...), the sampled x_0. r: (B,) in [0, 1]. beta > 0.
    distance: (B, ...), (B, ...) -> (B,). No schedule enters: x_0 is affine in v (predict_x0)."""
    x0_positive = (1 - beta) * x0_old + beta * x0_theta     # implicit positive policy, line 10
    x0_negative = (1 + beta) * x0_old - beta * x0_theta     # implicit negative policy, line 11
    loss = r * distance(x0_positive, x0) + (1 - r) * distance(x0_negative, x0)      # Eq. (5)
    # Departs from Eq. (5): over beta, as in the released code, so that beta moves the optimum
    # v_old + (2 / beta) Delta of Eq. (6), with Eq. (4)'s Delta, and not the size of the gradient.
    return loss / beta

def soft_update_decay(i, schedule="0,0.001,0.5"):
    """eta_i of theta_old <- eta_i theta_old + (1 - eta_i) theta, Algorithm 1 line 14.
    i: the iteration just completed, counted from 1. schedule: a constant, or "START,SLOPE,MAX" for
    min(max(SLOPE (i - START), 0), MAX): the paper's default is 0,0.001,0.5, its OCR run
    75,0.0075,0.999. Returns a float in [0, 1]; raises ValueError where that cannot be."""
    numbers = [float(x) for x in str(schedule).split(",")]
    start, slope, top = numbers if len(numbers) == 3 else (0.0, 1e9, *numbers)
    if not (0 <= top <= 1 and 0 <= slope < math.inf and abs(start) < math.inf):
        raise ValueError(f"eta {schedule}: must lie in [0, 1] and not fall")
    return min(max(slope * (i - start), 0.0), top)

# ---- The denoiser and its LoRA: theta, old, EMA and reference share one frozen base --------------
# Attention projections, by the names of their roles in every UNet and transformer of diffusers.
TARGETS = re.compile(r"\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)$")

class LoRA:
    """Adapter sets "theta", "old" and "ema" on the attention projections of `net`, by hooks.
    `active` names the set in use; None is the base model, v_ref. A set is a list of fp32 tensors
    [A (rank, in), B (out, rank), A, B, ...]; a layer computes W x + 2 B A x (alpha = 2 rank)."""
    def __init__(self, net, rank, seed):
        net.requires_grad_(False)
        self.names = [name for name, layer in net.named_modules()
                      if isinstance(layer, torch.nn.Linear) and TARGETS.search(name)]
        if not self.names:
            raise ValueError("no attention projections in the denoiser")
        noise, start, self.active = generator(seed, "lora"), [], None   # layer i: 2i, 2i + 1
        for i, name in enumerate(self.names):
            layer = net.get_submodule(name)
            A = torch.randn(rank, layer.in_features, generator=noise) / rank    # peft's "gaussian"
            B = torch.zeros(layer.out_features, rank)       # theta = old = base, line 1
            start += [A.to(layer.weight.device), B.to(layer.weight.device)]
            layer.register_forward_hook(lambda _, args, out, i=i: self.add(args[0], out, i))
        self.sets = {name: [x.clone().requires_grad_(name == "theta") for x in start]
                     for name in ("theta", "old", "ema")}

    def add(self, x, out, i):
        """out + 2 B A x for layer i, in the base's precision; gradients add up in fp32 A and B."""
        if self.active is None:
            return out
        A, B = self.sets[self.active][2 * i:2 * i + 2]
        return out + F.linear(F.linear(x, A.to(x.dtype)), 2 * B.to(x.dtype))

    @torch.no_grad()
    def average(self, name, decay):
        """set[name] <- decay * set[name] + (1 - decay) * theta."""
        for average, theta in zip(self.sets[name], self.sets["theta"]):
            average.copy_(decay * average + (1 - decay) * theta)

def generator(*key):
    """A CPU random generator that depends on `key` alone: nothing to save, no device to match."""
    return torch.Generator().manual_seed(random.Random(repr(key)).getrandbits(63))

def map_tensors(f, *trees):
    """One tree (dicts, lists, tuples) for several of equal form: f(tensors) at each tensor."""
    return tree_map(lambda x, *rest: f(x, *rest) if isinstance(x, torch.Tensor) else x, *trees)

class Model:
    """A text-to-image pipeline as a black box: a sampler, a denoiser, a forward process."""
    def __init__(self, config):
        self.config, (self.device, self.dtype) = config, pick_device(config)
        self.pipe = pipe = load_pipeline(config, self.dtype).to(self.device)
        try:                                        # what cannot run fails before we write anything
            pipe.set_progress_bar_config(disable=True)
            self.component = "unet" if hasattr(pipe, "unet") else "transformer"
            self.net, solver = getattr(pipe, self.component), pipe.scheduler
            self.T, self.signature = solver.config.num_train_timesteps, signature(self.net.forward)
            self.input = next(iter(self.signature.parameters))          # "sample", "hidden_states"
            named = "flow_prediction" if "FlowMatch" in str(type(solver)) else None
            self.prediction = named or solver.config.get("prediction_type")
            flow, known = self.prediction == "flow_prediction", hasattr(solver, "alphas_cumprod")
            if not (flow or known and self.prediction in ("epsilon", "v_prediction")):
                raise ValueError(f"{type(solver).__name__} of {self.prediction}: no flow, eps or v")
            self.alphas_cumprod = None if flow else solver.alphas_cumprod.to(self.device)
            if config.solver:
                pipe.scheduler = pick_solver(config.solver, solver.config, flow)
            if pipe.vae.config.get("force_upcast") and self.dtype == torch.float16:     # overflows
                decode = pipe.vae.float().decode
                pipe.vae.decode = lambda z, *args, **kwargs: decode(z.float(), *args, **kwargs)
            call = dict(num_inference_steps=config.steps, guidance_scale=config.guidance,
                        height=config.resolution, width=config.resolution,
                        max_sequence_length=config.max_sequence_length)
            self.call = {name: value for name, value in call.items() if value}  # 0: its own default
            self.lora = LoRA(self.net, config.rank, config.seed)
            self.sample([""], [("probe",)], None)
            if config.checkpointing:
                self.net.enable_gradient_checkpointing()
        except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, ImportError,
                ArithmeticError) as e:
            refuse(f"--model {config.model}: must be text to image with a VAE, one denoiser with "
                   f"attention and a known forward process, and fit --solver {config.solver}, "
                   f"--steps {config.steps}, --rank {config.rank} and --resolution "
                   f"{config.resolution}: {e!r:.300}; change one of them")

    @torch.no_grad()
    def sample(self, prompts, seeds, policy):
        """One image a prompt from the pipeline itself, under `policy`: "old", "ema" or None (base),
        from noise of the keys in `seeds`, one an image. Returns {x_0: latents (B, ...) in fp32,
        images: (B, 3, H, W) in [0, 1], condition: the denoiser's other arguments, by name}."""
        seen, heard = [], []            # what the denoiser got and said; what the solver made of it
        noise, step = [generator(*seed) for seed in seeds], self.pipe.scheduler.step
        def record(_, args, kwargs, out):
            given = dict(self.signature.bind(*args, **kwargs).arguments)
            t = torch.as_tensor(given.pop("timestep")).flatten()[:1].cpu()
            seen.append((t, out[0][:, :given.pop(self.input).shape[1]], given))
        own = {"generator": noise} if "generator" in signature(step).parameters else {}
        @functools.wraps(step)                          # pipelines look at its signature
        def listen(out, t, *args, **kwargs):            # SD3 and FLUX give no generator: ours, then
            heard.append((float(t), out, result := step(out, t, *args, **own | kwargs)))
            return result
        self.lora.active, self.pipe.scheduler.step = policy, listen
        with self.net.register_forward_hook(record, with_kwargs=True):      # for this call only
            images = self.pipe(list(prompts), generator=noise, output_type="pt", **self.call).images
        self.lora.active = None
        del self.pipe.scheduler.step
        _, out, condition = seen[0]
        if not hasattr(self, "times"):                  # the probe: one image
            self.check_clock(seen, heard)
            self.shared = map_tensors(lambda x: x.shape[:1] != out.shape[:1], condition)
        # With guidance the conditional half, the second, is what we train. What has no row an image
        # (FLUX's ids) hides behind a function, so that it is never joined and never indexed.
        condition = map_tensors(lambda x, shared: functools.partial(x.clone) if shared else
                                x[-len(prompts):], condition, self.shared)
        x_0 = heard[-1][2][0].float()                   # what the solver's last step arrived at
        if not (x_0.isfinite().all() and images.isfinite().all()):
            refuse("a sample is not finite; try --precision bf16 or fp32, or a smaller --lr")
        return {"x_0": x_0, "images": images.float().clamp(0, 1), "condition": condition}

    def check_clock(self, seen, heard):
        """Learn how the pipeline scales time; refuse another direction, sign or noise schedule."""
        times, solver = torch.cat([t for t, _, _ in seen]), self.pipe.scheduler
        self.times, self.time_scale = times.unique(), times[0].item() / (heard[0][0] or 1)
        _, sigma = self.alpha_sigma(times[::len(seen) // len(heard)])
        ours, theirs = (sigma, solver.sigmas[:len(sigma)]) if self.alphas_cumprod is None else (
            self.alphas_cumprod, solver.alphas_cumprod)
        off = (ours.cpu() - theirs.cpu()).abs().max()
        agree = (seen[-1][1][-1:].float() * heard[-1][1][-1:]).sum() > 0    # as with guidance, too
        if not (agree and times[0] >= times[-1] and off < 0.02):
            raise ValueError(f"{type(solver).__name__} has another sign, or other noise levels")

    def predict(self, x_t, t, condition, policy):
        """The denoiser's output, fp32, like x_t (B, ...), under "theta", "old", "ema" or None."""
        self.lora.active = policy                       # and stays: see pair_losses
        given = tree_map(lambda x: x() if callable(x) else x, condition)
        out = self.net(**given, **{self.input: x_t.to(self.dtype)}, timestep=t.to(self.device))[0]
        return out[:, :x_t.shape[1]].float()            # a learned variance would come after it

    def alpha_sigma(self, t, ndim=1):
        """alpha_t, sigma_t at times (B,) as the denoiser takes them, shaped (B, 1, ...) of ndim."""
        t = t.to(self.device).float().view(-1, *[1] * (ndim - 1)) / self.time_scale
        return alpha_sigma(t / self.T if self.alphas_cumprod is None else t, self.alphas_cumprod)

def pick_device(config):
    """--device and the dtype of --precision; auto is CUDA with bf16 or fp16, else CPU with fp32."""
    auto, precision = "cuda" if torch.cuda.is_available() else "cpu", config.precision
    try:
        device = torch.empty(0, device=config.device.replace("auto", auto)).device
    except (RuntimeError, AssertionError) as e:
        refuse(f"--device {config.device}: must be usable here ({e!r:.200}); try --device auto")
    if precision == "auto" and device.type == "cuda":       # T4 and V100 only emulate bf16
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return device, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)

def locate(path):
    """A path as it is, or else beside nft.py: presets work from any directory."""
    beside = pathlib.Path(__file__).resolve().parent / path
    return str(beside if beside.exists() and not os.path.exists(path) else path)

def load_pipeline(config, dtype):
    """The pipeline of --model, without its safety checker, which would black images out."""
    import diffusers
    import transformers
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    path = locate(PRESETS.get(config.model, {}).get("path", config.model))
    try:
        return diffusers.DiffusionPipeline.from_pretrained(
            path, dtype=dtype, safety_checker=None, feature_extractor=None, add_watermarker=False)
    except Exception as e:
        refuse(f"--model {config.model}: must be a preset ({', '.join(PRESETS)}), a pipeline "
               f"directory or a hub id within reach ({e!r:.200}); correct it")

def pick_solver(name, own, flow):
    """A scheduler of diffusers by short or class name, with the forward process of config `own`."""
    import diffusers
    kind = SOLVERS.get(name, name.removesuffix("Scheduler")) + "Scheduler"
    kind = flow and getattr(diffusers, f"FlowMatch{kind}", None) or getattr(diffusers, kind, None)
    known = {*signature(kind).parameters} if hasattr(kind, "set_timesteps") else set()
    if not known & ({"shift", "use_flow_sigmas"} if flow else {"beta_schedule"}):
        refuse(f"--solver {name}: must be a diffusers scheduler {'' if flow else 'not '}for flow, "
               f"by class name or as {', '.join(SOLVERS)}; leave it out")
    given = {"clip_sample": False}                      # latents are not confined to [-1, 1]
    given |= {"algorithm_type": "sde-" * ("sde" in name) + "dpmsolver++"} if "dpm2" in name else {}
    if flow:
        shift = own.get("shift", own.get("flow_shift", 1.0))
        given.update(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift)
    return kind.from_config(own, **{k: given[k] for k in known & given.keys()})

# ---- Rewards: f(images (B, 3, H, W) in [0, 1], prompts, metadata) -> B numbers -------------------
REWARDS = "aesthetic", "clip", "pickscore", "jpeg", "incompressible"    # examples/named_rewards.py

def load_rewards(spec, flag="--reward", run=runpy.run_path):
    """"NAME=W,FILE.py:FUNCTION" -> [(name, weight, function)]. Raises Failure."""
    rewards = []
    for part in filter(None, map(str.strip, spec.split(","))):
        name, _, weight = part.partition("=")
        path, _, function = (f"examples/named_rewards.py:{name}" if name in REWARDS else name
                             ).rpartition(":")
        try:
            math.ceil(weight := float(weight or 1))     # raises for nan and inf
            sys.path.insert(0, os.path.dirname(os.path.abspath(locate(path))))  # for its imports
            call = run(locate(path))[function].__call__     # raises for what is no function
        except (Exception, SystemExit) as e:
            refuse(f"{flag} {part}: " + (e.args[0] if isinstance(e, Failure) else
                   f"must be one of {', '.join(REWARDS)}, or FILE.py:FUNCTION such as "
                   f"examples/ocr.py:reward, and a finite =WEIGHT ({e!r:.200}); correct it"))
        short = name if name in REWARDS else f"{pathlib.Path(path).stem}:{function}"
        rewards.append((short, weight, call))
    return rewards

@torch.no_grad()
def score(rewards, images, prompts, metadata, first=0):
    """r_raw (B,), a weighted sum, and its parts {name: (B,)}, fp32 on the CPU; images[0] is number
    `first` of the iteration's. Raises Failure where a reward does not give a number an image."""
    parts, total = {}, torch.zeros(len(images))
    for name, weight, call in rewards:
        try:
            result = call(images.clone(), list(prompts), [dict(m) for m in metadata])
            result = result[0] if isinstance(result, tuple) else result
            parts[name] = torch.as_tensor(result, dtype=torch.float32).detach().cpu()
            if parts[name].shape != total.shape:
                raise ValueError(f"{[*parts[name].shape]} for {len(images)} images")
            for i in (~(weight * parts[name]).isfinite()).nonzero().flatten():
                raise ValueError(f"{parts[name][i]} for image {first + i}, prompt {prompts[i]!r}")
        except (Exception, SystemExit) as e:            # what nft.refuse said is said
            refuse(f"reward {name}: " + (e.args[0] if isinstance(e, Failure) else "must return one "
                   f"finite number an image, and gave {e!r:.300}; correct it"))
        total += weight * parts[name]
    return total, parts

# ---- Prompts, pictures, the run directory, processes --------------------------------------------
def load_prompts(path, flag="--prompts"):
    """.txt (one a line) or .jsonl ({"prompt": ..., metadata}) -> [(prompt, metadata)]."""
    try:
        lines = pathlib.Path(locate(path)).read_text("utf-8-sig").split("\n")
        rows = [json.loads(s) if path.endswith(".jsonl") else {"prompt": s.strip()}
                for s in lines if s.strip()]
        pairs = [(row.pop("prompt").strip(), row) for row in rows]
        "".join(prompt or pairs[-1] for prompt, _ in pairs or rows[0]).encode()     # none empty
        return pairs
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as e:
        refuse(f"{flag} {path}: must be a UTF-8 .txt, a prompt a line, or .jsonl, objects with "
               f"`prompt`, and hold at least one ({e!r:.200}); correct it")

def draw_prompts(prompts, iteration, config):
    """The next `groups` prompts of a deck that is shuffled anew each time it is used up."""
    n, end = len(prompts), iteration * config.groups
    return [random.Random(f"{config.seed} {k // n}").sample(prompts, n)[k % n]
            for k in range(end - config.groups, end)]

def laplacian(images):
    """Mean absolute Laplacian of each image (B, 3, H, W): rises with speckle, falls with blur."""
    kernel = images.new_tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]]).expand(3, 1, 3, 3)
    return F.conv2d(images, kernel, groups=3).abs().mean((1, 2, 3))

def to_pil(image):
    """(3, H, W) in [0, 1] -> an 8-bit PIL image."""
    from PIL import Image
    pixels = (image.float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    return Image.fromarray(pixels.cpu().numpy())

def picture_grid(images, prompts, path, columns):
    """Save images (N, 3, H, W), enlarged where they are small, with their prompts under them."""
    from PIL import Image, ImageDraw
    h = 96 if images.shape[2] < 96 else 256
    w, rows = h * images.shape[3] // images.shape[2], math.ceil(len(images) / columns)
    sheet = Image.new("RGB", ((w + 12) * columns, (h + 38) * rows), "lightgray")
    for n, (image, (caption, _)) in enumerate(zip(images, prompts)):
        x, y = n % columns * (w + 12) + 6, n // columns * (h + 38) + 4
        sheet.paste(to_pil(image).resize((w, h), Image.Resampling.NEAREST), (x, y))
        ImageDraw.Draw(sheet).text((x, y + h + 2), textwrap.fill(caption[:w // 2], w // 6), fill=0)
    sheet.save(buffer := io.BytesIO(), "PNG")
    replace_file(path, buffer.getvalue())

def replace_file(path, data, before=None):
    """Write bytes, sync, rename: whoever reads `path` finds it whole. The old one is `before`."""
    if RANK == 0:
        with open(f"{path}.tmp", "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if before and os.path.exists(path):
            os.replace(path, before)
        os.replace(f"{path}.tmp", path)

class Run:
    """The run directory and its files. restore(dict of a checkpoint) raises if it does not fit."""
    def __init__(self, config, restore):
        self.dir, self.rows, self.damaged = pathlib.Path(config.out), [], ""
        file, text = self.dir / "config.json", json.dumps(vars(config), indent=1) + "\n"
        try:
            if state := self.read() if config.resume else None:
                restore(state)
                self.rows = state["rows"]
            elif file.exists() and not config.resume and RANK == 0:
                raise FileExistsError("a run is there")
            (self.dir / "samples").mkdir(parents=True, exist_ok=True)
            replace_file(file, text.encode())
        except Exception as e:
            refuse(e.args[0] if isinstance(e, Failure) else f"--out {self.dir}: must be writable, "
                   f"hold a run if there is --resume, else none ({e!r:.200}); take another one")

    def read(self):
        """The newest whole checkpoint, by its checksums; None before the first. Raises Failure."""
        for file in (self.dir / "checkpoint.pt", self.dir / "checkpoint-before.pt"):
            try:
                state = dict(zipfile.ZipFile(file).testzip() or torch.load(file, weights_only=True))
                sys.stderr.write(self.damaged)
                return state
            except FileNotFoundError:
                pass
            except Exception:
                self.damaged = f"nft.py: {file} is damaged, the one before it is taken\n"
        return self.damaged and refuse(f"--out {self.dir}: no checkpoint is whole; begin anew")

    def log(self, row):
        """Add an object to metrics.jsonl, which is written whole: no torn or repeated line."""
        self.rows.append(row)
        text = "".join(json.dumps(row) + "\n" for row in self.rows)
        replace_file(self.dir / "metrics.jsonl", text.encode())

    def save(self, state, names, component):
        """Write the EMA weights for pipe.load_lora_weights(DIR), and the checkpoint."""
        from safetensors.torch import save
        ema, tensors = state["lora"]["ema"], {}
        for name, A, B in zip(names, ema[::2], ema[1::2]):
            tensors[f"{component}.{name}.lora_A.weight"] = A.contiguous()
            tensors[f"{component}.{name}.lora_B.weight"] = (2 * B).contiguous()     # alpha / rank
        replace_file(self.dir / "pytorch_lora_weights.safetensors", save(tensors, {"format": "pt"}))
        torch.save(state, buffer := io.BytesIO())
        before = None if self.damaged else self.dir / "checkpoint-before.pt"    # that one is whole
        replace_file(self.dir / "checkpoint.pt", buffer.getvalue(), before)
        self.damaged = ""

# Under torchrun each process samples, scores and trains its share of the images.
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
def join():
    """Meet the other processes of torchrun, if there are any; only the first one prints."""
    if WORLD > 1 and not dist.is_initialized():
        if (local := int(os.environ["LOCAL_RANK"])) < torch.cuda.device_count():
            torch.cuda.set_device(local)
        dist.init_process_group()                       # NCCL for CUDA tensors, gloo for others
        sys.stdout = open(os.devnull, "w") if RANK else sys.stdout

def gather(x):
    """[x of process 0, x of process 1, ...], for anything on the CPU."""
    everyone = [x] * WORLD
    if WORLD > 1:
        dist.all_gather_object(everyone, x)
    return everyone

def share(n):
    """This process's part of range(n)."""
    return range(n * RANK // WORLD, n * (RANK + 1) // WORLD)

# ---- Training: Algorithm 1 -----------------------------------------------------------------------
def collect(model, rewards, prompts, key, policy):
    """Sample and score an image a (prompt, metadata), image i from the noise of (*key, i). Returns
    {x_0, condition} of this process's share with the first 16 images, and the Laplacian and the
    standard deviation of the pixels of all; r_raw (B,); its parts."""
    from tqdm import tqdm
    kept, shown, mine, size = [], [], share(len(prompts)), model.config.batch_size
    for i in tqdm(mine[::size], policy or "base", leave=False, disable=RANK > 0 or None):
        texts, metadata = zip(*prompts[i:min(i + size, mine.stop)])
        rollout = model.sample(texts, [(*key, i + k) for k in range(len(texts))], policy)
        images = rollout.pop("images")
        first = images[:max(0, 16 - i)].to("cpu", copy=True)            # for picture grids
        shown.append(({"images": first, "laplacian": laplacian(images).cpu(),
                       "pixel_std": images.flatten(1).std(1).cpu()},
                      *score(rewards, images, texts, metadata, i)))
        kept.append(rollout)
    of_all, raw, parts = map_tensors(lambda *x: torch.cat(x), *sum(gather(shown), []))
    return (map_tensors(lambda *x: torch.cat(x), *kept) if kept else {}) | of_all, raw, parts

def evaluate(model, run, rewards, prompts, iteration):
    """Held-out metrics: one image a prompt, the same noise every time. Saves a grid of sixteen.
    Departs from section 4: by theta's EMA and the run's own solver, not 40 first-order steps."""
    from tqdm import tqdm
    rollout, raw, parts = collect(model, rewards, prompts, ("evaluation",), "ema")
    row = {"eval_reward": raw.mean().item(), "eval_reward_std": raw.std(correction=0).item(),
           **{f"eval_{name}": rollout[name].mean().item() for name in ("laplacian", "pixel_std")},
           **{f"eval_reward/{name}": x.mean().item() for name, x in parts.items()}}
    base = run.rows[0] if run.rows else row
    row["roughness"] = ratio = row["eval_laplacian"] / max(base["eval_laplacian"], 1e-9)
    flat = [name for name in ("eval_pixel_std", "eval_reward_std") if row[name] < base[name] / 10]
    advice = "" if 0.67 < ratio < 1.5 else ": grainy or blurred; try larger --kl or smaller --lr"
    advice += f"; {flat} under a tenth of the base's: collapsed, if not solved" if flat else ""
    picture_grid(rollout["images"], prompts, run.dir / f"samples/{iteration:06d}.png", 8)
    tqdm.write(f"iteration {iteration:4d}   held-out reward {raw.mean():.3f}   "
               f"roughness {ratio:.2f}{advice}")
    return row

def pair_losses(model, rollout, index, t, eps, r):
    """Lines 9 to 11 and the loss of line 12, for b pairs of an image and a time: three, each (b,).
    index: (b,) images of rollout. t: (b,) as the denoiser takes it. eps: (b, ...). r: (b,).
    Returns Eq. (5)'s loss, ||v_theta - v_ref||^2, and ||v_theta - v_old||^2 without gradient."""
    config, x_0 = model.config, rollout["x_0"][index]
    condition = map_tensors(lambda x: x[index], rollout["condition"])
    alpha_t, sigma_t = model.alpha_sigma(t, x_0.ndim)
    x_t = alpha_t * x_0 + sigma_t * eps                     # forward process, line 9
    with torch.no_grad():
        out_old = model.predict(x_t, t, condition, "old")
        out_ref = model.predict(x_t, t, condition, None) if config.kl else None
    out_theta = model.predict(x_t, t, condition, "theta")   # last: --checkpointing recomputes it
    x0_old, _ = predict_x0(x_t, out_old, alpha_t, sigma_t, model.prediction)
    x0_theta, slope = predict_x0(x_t, out_theta, alpha_t, sigma_t, model.prediction)
    # Departs from section 3.3 for eps- and v-prediction: an error of the output moves x_0 by slope,
    # for eps sigma / alpha = 14.6 at SD1.5's t = 999, and high noise would drive all learning. With
    # this factor the gradient by the output weighs sigma / (alpha + sigma), as t does for flow.
    weight = (sigma_t / (alpha_t + sigma_t) / slope).flatten()                      # flow: 1
    loss = weight * nft_loss(x0_theta, x0_old, x_0, r, config.beta)                 # Eq. (5)
    kl, deviation = ((out_theta - out).square().flatten(1).mean(1)
                     for out in (out_ref if config.kl else out_theta, out_old))
    return loss, kl, deviation.detach()

def train(config):
    """Algorithm 1: Collect, Reward, Optimize, Update. Returns the closing line for the user."""
    from tqdm import tqdm
    # Set up: whatever can be refused is refused before the run directory is written
    prompts = load_prompts(config.prompts)
    held_out = load_prompts(config.eval_prompts, "--eval-prompts") if config.eval_prompts else \
        [prompts.pop() for _ in range(min(64, len(prompts) // 10))] or prompts
    files = functools.cache(runpy.run_path)                 # a file is run once for both flags
    rewards, watched = (load_rewards(getattr(config, name), f"--{name}", files)
                        for name in ("reward", "watch"))
    watched = rewards + [(name, 0.0, call) for name, _, call in watched]
    model = Model(config) if rewards else refuse("--reward: must name one; try jpeg")
    device, lora, theta = model.device, model.lora, model.lora.sets["theta"]
    collect(model, watched, prompts[:1] * WORLD, ("probe",), None)     # rewards load, and are tried
    words = model.pipe.tokenizer
    for cut in [p for p, _ in prompts if len(words(p).input_ids) > words.model_max_length][:1]:
        tqdm.write(f"prompts over {words.model_max_length} tokens are cut, such as {cut!r:.200}")
    torch.set_float32_matmul_precision("high")                                      # TF32 on CUDA
    optimizer = torch.optim.AdamW(theta, lr=config.lr, betas=(0.9, 0.999), weight_decay=1e-4)
    scaler = torch.amp.GradScaler(device.type, enabled=model.dtype == torch.float16)
    scaler.scale(torch.zeros((), device=device))        # ready, should this process have no pair
    data = generator(prompts, held_out).initial_seed()
    def snapshot():                     # all that --resume needs: random draws have keys instead
        return map_tensors(lambda x: x.detach().to("cpu", copy=True), {
            "rows": list(run.rows), "lora": lora.sets, "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(), "data": data})
    def restore(state):
        if state["data"] != data:
            refuse(f"--prompts {config.prompts} or --eval-prompts {config.eval_prompts}: changed "
                   "since the run began; bring them back")
        if (done := len(state["rows"]) - 1) > config.iterations:
            refuse(f"--iterations {config.iterations}: {done} are done; give more")
        forms = [map_tensors(lambda x: (x.shape, x.dtype), x) for x in (lora.sets, state["lora"])]
        assert forms[0] == forms[1], "its adapters have another form"
        assert [row["iteration"] for row in state["rows"]] == [*range(done + 1)], "rows are missing"
        map_tensors(lambda x, y: x.data.copy_(y), lora.sets, state["lora"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"] or scaler.state_dict())
    run = Run(config, restore)
    last, started, warned = snapshot(), time.time(), False
    try:
        if not run.rows:
            row = {"iteration": 0, "images": 0, **evaluate(model, run, watched, held_out, 0)}
            run.log(row | {"skipped_steps": 0, "seconds": time.time() - started})
            run.save(last := snapshot(), lora.names, model.component)
        started, done = time.time() - run.rows[-1]["seconds"], run.rows[-1]["iteration"]
        bar = tqdm(range(done + 1, config.iterations + 1), "train", config.iterations,
                   initial=done, position=1, disable=RANK > 0 or None)
        K, N = config.group_size, config.groups * config.group_size
        mine = share(N)                         # images of an iteration that this process has
        for iteration in bar:
            # Collect: K images of each prompt from the old policy, by any solver (lines 2 and 3)
            drawn = [c for c in draw_prompts(prompts, iteration, config) for _ in range(K)]
            rollout, raw, parts = collect(model, rewards, drawn, (config.seed, iteration), "old")

            # Reward: from r_raw of each image its optimality r in [0, 1] (lines 4 to 6)
            r = optimality_reward(raw, torch.arange(N) // K, config.z).to(device)
            if (r == 0.5).all() and not warned:
                warned = not tqdm.write(f"iteration {iteration}: equal rewards for all images of a "
                                        "prompt teach nothing; try another --reward")

            # Optimize: pairs of an image and a time of the solver, Eq. (5), AdamW (lines 8 to 13)
            noise = generator(config.seed, iteration, "training")
            shuffled = torch.rand(N, len(model.times), generator=noise).argsort(1)
            chosen = model.times[shuffled[:, :config.train_times]]  # Departs: not all of them
            if config.times == "uniform":                           # Departs, too: at any time
                t = model.T * (1 - torch.rand(N, config.train_times, generator=noise))  # (0, T]
                chosen = t * model.time_scale if model.alphas_cumprod is None else t.ceil() - 1
            log = torch.zeros(4, dtype=torch.float64)       # loss, kl, old_deviation, grad_norm
            first, skipped = (iteration - 1) * config.updates + 1, run.rows[-1]["skipped_steps"]
            shards = torch.randperm(N, generator=noise).tensor_split(config.updates)
            for step, shard in enumerate(shards, first):
                index, t = shard.repeat_interleave(chosen.shape[1]), chosen[shard].flatten()
                pairs = ((index >= mine.start) & (index < mine.stop)).nonzero().flatten()
                for x in theta:
                    x.grad = torch.zeros_like(x)
                for some in pairs.split(config.batch_size) if len(pairs) else ():
                    eps = torch.stack([torch.randn(rollout["x_0"].shape[1:], generator=generator(
                        "eps", config.seed, step, pair)) for pair in some.tolist()])
                    i = (index[some] - mine.start).to(device)
                    losses = pair_losses(model, rollout, i, t[some], eps.to(device),
                                         r[index[some].to(device)])
                    total = (losses[0] + config.kl * losses[1]).sum() / len(index)  # Departs: KL
                    if len(bad := index[some][~(losses[0] + losses[1]).isfinite().cpu()]):
                        refuse(f"the loss of prompt {drawn[bad[0]][0]!r} is not finite; try a "
                               "smaller --lr, or --precision bf16 or fp32")
                    scaler.scale(total).backward()
                    log[:3] += torch.stack(losses).detach().cpu().double().sum(1) / chosen.numel()
                for x in theta if WORLD > 1 else ():
                    dist.all_reduce(x.grad)                 # each process holds a part of the sum
                scaler.unscale_(optimizer)
                norm = torch.nn.utils.clip_grad_norm_(theta, 1.0)   # Departs: as the released code
                if not (scaler.is_enabled() or norm.isfinite()):    # fp16 may overflow: no step
                    refuse("the gradient is not finite; try a smaller --lr")
                optimizer.param_groups[0]["lr"] = config.lr * min(1, step / max(1, config.warmup))
                scale = scaler.get_scale()
                scaler.step(optimizer)
                scaler.update()
                skipped += scaler.get_scale() < scale               # overflow in fp16: no step made
                log[3] += norm.nan_to_num(0, 0, 0).item() / config.updates / WORLD  # 0: skipped
                lora.average("ema", config.ema)                 # what is evaluated and saved

            # Update: theta_old <- eta_i theta_old + (1 - eta_i) theta (line 14)
            lora.average("old", eta := soft_update_decay(iteration, config.eta))

            # Log, evaluate, save
            rough = rollout["laplacian"].mean().item()
            base = max(1e-9, run.rows[1]["laplacian"] if iteration > 1 else rough)  # of old = base
            log = dict(zip(("loss", "kl", "old_deviation", "grad_norm"), sum(gather(log)).tolist()))
            row = {"iteration": iteration, "images": iteration * N, "eta": eta, **log,
                   "reward": raw.mean().item(), "reward_std": raw.std(correction=0).item(),
                   **{f"reward/{name}": x.mean().item() for name, x in parts.items()},
                   "r_std": r.std(correction=0).item(),
                   "laplacian": rough, "roughness": rough / base, "skipped_steps": skipped}
            final = iteration == config.iterations
            if final or iteration % config.eval_every == 0:
                row.update(evaluate(model, run, watched, held_out, iteration))
            run.log(row | {"seconds": time.time() - started})
            last = snapshot()
            if final or iteration % config.save_every == 0:
                run.save(last, lora.names, model.component)
            bar.set_postfix(reward=f"{row['reward']:.3f}", refresh=False)
        return conclude(model, run, [*dict(held_out).items()][:16])
    except (Exception, KeyboardInterrupt) as e:
        signal.signal(signal.SIGTERM, signal.SIG_IGN if WORLD > 1 else signal.SIG_DFL)
        done = max(0, len(last["rows"]) - 1)
        saved = f"iteration {done} is saved"
        try:
            run.save(last, lora.names, model.component)
        except OSError:
            saved = "what was saved before stands"
        e.saved = f" (iteration {min(done + 1, config.iterations)}); {saved}, go on with: " \
                  f"python nft.py --out {run.dir} --resume"
        raise

def conclude(model, run, prompts):
    """Draw before_after.png, from the same noise by base and trained model; say where all is."""
    pair = [F.pad(collect(model, [], prompts, ("evaluation",), policy)[0]["images"], (0, 2),
                  value=0.83) for policy in (None, "ema")]      # a grey line between the two
    picture_grid(torch.cat(pair, 3), prompts, run.dir / "before_after.png", 4)
    first, last = run.rows[0], [row for row in run.rows if "eval_reward" in row][-1]
    return (f"held-out reward {first['eval_reward']:.3f} -> {last['eval_reward']:.3f} in "
            f"{last['seconds']:.0f} s; pictures: {run.dir}/before_after.png; to use the result "
            f'(needs peft): pipe.load_lora_weights("{run.dir}") and sample as the run did, by '
            f"{type(model.pipe.scheduler).__name__} with {model.call}")

def parse(argv):
    """Command line -> Config. Raises Failure."""
    parser = argparse.ArgumentParser(epilog=f"Presets change these: {PRESETS}", allow_abbrev=False)
    parser.error = lambda message: refuse(f"{message}; see python nft.py --help")
    for f in dataclasses.fields(Config):
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {
            "type": f.type, "choices": f.metadata["choices"]}
        parser.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS,
                            help=f"{f.metadata['help']} ({f.default!r})", **kind)
    given = vars(parser.parse_args(argv))       # over the preset's row, or a resumed run's settings
    own = {"path", "eval_prompts" if "prompts" in given else ""}    # those held out go with others
    preset = {k: v for k, v in PRESETS.get(given.get("model", "tiny"), {}).items() if k not in own}
    if given.get("resume"):
        try:
            preset = json.loads((pathlib.Path(given["out"]) / "config.json").read_text())
            preset = vars(parser.parse_args([
                f"--{'no-' * (v is False)}{k.replace('_', '-')}" + f"={v}" * (type(v) is not bool)
                for k, v in preset.items() if k not in ("out", "resume")]))
        except (OSError, LookupError, ValueError, AttributeError, Failure) as e:
            refuse(f"--resume: --out {given.get('out', 'DIR')} must be a run ({e!r:.200}); fix it")
        free = "out resume iterations eval_every save_every device batch_size checkpointing".split()
        for key in {key for key in given.keys() - free if given[key] != preset.get(key)}:
            refuse(f"--{key.replace('_', '-')} {given[key]}: must stay {preset.get(key)} in "
                   "this run; leave it out, or take another --out without --resume")
    config = Config(**{**preset, **given})
    for f in dataclasses.fields(Config):
        low, value, high = f.metadata["low"], getattr(config, f.name), f.metadata["high"]
        if low is not None and not low <= value < high:
            refuse(f"--{f.name.replace('_', '-')} {value}: must be a number >= {low} and < {high}; "
                   f"try {preset.get(f.name, f.default)}")
    if config.updates > (images := config.groups * config.group_size):
        refuse(f"--updates {config.updates}: must be at most the iteration's images; try {images}")
    try:
        soft_update_decay(1, config.eta)
    except ValueError:
        refuse(f"--eta {config.eta}: must be in [0, 1], or START,SLOPE,MAX; try {Config.eta}")
    names = (f"runs/{pathlib.Path(config.model).name}{n}" for n in ("", *range(-2, -10000, -1)))
    config.out = config.out or gather(next(name for name in names if not os.path.exists(name)))[0]
    return config

def main(argv=None):
    """Run the command line; returns the exit status: 0, 1 failed, 2 bad input, 128 + a signal's."""
    sys.modules.setdefault("nft", sys.modules[__name__])    # for rewards that import nft
    def stop(number, frame):        # a second signal ends at once, and the last checkpoint stands
        signal.signal(number, signal.SIG_DFL)
        raise KeyboardInterrupt(128 + number)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        join()
        print(train(parse(argv)))
        return 0
    except (Exception, KeyboardInterrupt) as e:
        saved = getattr(e, "saved", "")                     # nothing saved yet: bad input
        what, status = {Failure: (str(e), 1 if saved else 2),
                        KeyboardInterrupt: ("interrupted", *e.args, 130)[:2]}.get(
            type(e), (f"{type(e).__name__}: {e}"[:300], 1))
        who = f"process {RANK}: " * (WORLD > 1)
        print(f"nft.py: {who}{' '.join(what.split())}{saved}", file=sys.stderr)
        return status

if __name__ == "__main__":
    sys.exit(main())
