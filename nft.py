"""DiffusionNFT in one file: online reinforcement learning of diffusion on the forward process.

Sample images with any solver, score them, and fine-tune with a supervised loss that contrasts an
implicit positive and an implicit negative policy: no likelihoods, no trajectories, no guidance.
Equations, sections and lines are the paper's, arXiv 2509.16117; "Departs" marks what differs.

    python nft.py                                       # a tiny pipeline, on a CPU, in minutes
    python nft.py --model sd15 --reward aesthetic       # Stable Diffusion 1.5, LAION aesthetics
    python nft.py --model DIR --reward my.py:reward --prompts my.txt

    symbol    here           meaning
    x_0       x_0            a clean sample: the pipeline's final latents
    x_t       x_t            alpha_t x_0 + sigma_t eps, with eps ~ N(0, I): the forward process
    t         t              in the denoiser's own unit: to 999 for SD, 1000 for SD3, 1 for FLUX
    c         prompt, condition  the prompt, and what the denoiser is given of it
    v_theta   out_theta      the trained denoiser's output (of any prediction); x0_theta as sample
    v_old     out_old        the sampling policy, which follows theta by eta; x0_old as sample
    v_ref     out_ref        the model before training: its adapter is off
    v_theta+- x0_positive/negative  the implicit policies of Eq. (5), as samples
    r_raw, r  raw, r         the reward, and the optimality in [0, 1] that it is normalised to
    beta      beta           how far the implicit policies lie from v_old, Eq. (5)
    eta_i     eta            share of theta_old that stays after iteration i, Algorithm 1 line 14
    Z_c, K    z, group_size  Z_c = z * std of the rewards; K images a prompt
    D         D              an iteration's x_0 (lines 3 and 6), what belongs to them, and their r

SPDX-License-Identifier: MIT
"""

import argparse
import copy
import dataclasses
import functools
import importlib.util
import inspect
import io
import json
import logging
import math
import os
import random
import re
import shlex
import sys
import textwrap
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves, tree_map
from tqdm import tqdm

# Under torchrun each process samples, scores and trains its share of the images.
WORLD = int(os.environ.get("WORLD_SIZE", "1"))
# Some job queues set RANK alone.
RANK = int(os.environ["RANK"]) if WORLD > 1 else 0


class UserError(ValueError):
    """A flag, file or directory is at fault: the value, the rule and the mend, in one line."""


# ---- Config ------------------------------------------------------------------------------------
def flag(default, help, **limits):
    """A field of Config and flag of the command line; limits: low, a number, or choices."""
    return dataclasses.field(default=default, metadata={"help": help, **limits})


SOLVERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpm2": "DPMSolverMultistepScheduler",
    "dpm2-sde": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "lcm": "LCMScheduler",
    "unipc": "UniPCMultistepScheduler",
}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass
class Config:
    """Every setting. `reward` may be a function or {name: function or (weight, function)}, too."""

    model: str = flag("tiny", "tiny, tiny-sd3, sd15, sdxl, sd3, flux, a directory or a hub id")
    reward: str = flag("aesthetic", "NAME or FILE.py:FUNCTION, several as A=W,B=W; W 0: log only")
    prompts: str = flag("", ".txt (one a line) or .jsonl (`prompt`, metadata); empty: animals")
    eval_prompts: str = flag("", "held-out prompts; empty: a tenth of --prompts, 16 to 64")
    out: str = flag("", "run directory; empty: a new one under runs/")
    resume: bool = flag(False, "go on with the run in --out, or begin it")
    # Algorithm 1
    iterations: int = flag(100, "iterations i of Algorithm 1", low=1)
    groups: int = flag(16, "prompts an iteration", low=1)
    group_size: int = flag(12, "images a prompt, K", low=2)
    batch_size: int = flag(
        4, "pairs of an image and t in a training pass; paints 4x as many", low=1
    )
    updates: int = flag(1, "optimizer steps an iteration: each takes its part of the images", low=1)
    train_times: int = flag(2, "noise levels t an image, at most those of the sampler", low=1)
    lr: float = flag(3e-4, "learning rate of AdamW", low=1e-9)
    beta: float = flag(1.0, "beta of Eq. (5): smaller is faster and less stable", low=1e-9)
    kl: float = flag(2e-5, "weight of the squared distance to the base model's output", low=0)
    eta: str = flag("0,0.001,0.5", "soft update eta_i: a constant, or START,SLOPE,MAX")
    z: float = flag(5.0, "Z_c = z * std of the rewards: smaller spreads r more", low=1e-9)
    ema: float = flag(0.9, "highest decay of the EMA of theta, which is saved", low=0)
    # Adapter and sampler
    rank: int = flag(32, "LoRA rank; alpha is twice the rank", low=1)
    solver: str = flag("", f"{', '.join(SOLVERS)}; or empty", choices=("", *SOLVERS))
    steps: int = flag(10, "sampling steps of the rollouts", low=1)
    eval_steps: int = flag(0, "of evaluation, whose times are trained; 0: as --steps", low=0)
    guidance: float = flag(1.0, "guidance scale of sampling; 1 is none, as in the paper", low=1)
    resolution: int = flag(0, "height and width in pixels; 0: the pipeline's own", low=0)
    max_sequence_length: int = flag(0, "text tokens, if a pipeline takes it; 0: its own", low=0)
    # Hardware and the rest
    precision: str = flag("auto", "of the frozen base", choices=("auto", *PRECISIONS))
    checkpointing: bool = flag(False, "recompute activations: less memory, slower")
    device: str = flag("auto", "auto, cpu, cuda, cuda:1 ...")
    seed: int = flag(0, "fixes prompts, noise and the adapter's start")
    eval_every: int = flag(10, "iterations between evaluations, from iteration 0 on", low=1)
    save_every: int = flag(1, "iterations between saves: what a failure can lose", low=1)

    def __post_init__(self):
        """Raise UserError for a number that is none of its flag's."""
        for field in dataclasses.fields(self):
            value, low = getattr(self, field.name), field.metadata.get("low", -math.inf)
            if field.type in (int, float) and not low <= value < math.inf:
                name = field.name.replace("_", "-")
                raise UserError(f"--{name} {value}: must be {low} or more; try {field.default}")
        if max(self.updates, WORLD) > self.groups * self.group_size:
            rule = "must be at most the images, as processes must; add --groups"
            raise UserError(f"--updates {self.updates}: {rule}")
        soft_update_decay(1, self.eta)


# What a model's name stands for: settings in place of the defaults. A flag always wins.
PRESETS = {
    "tiny": dict(
        model="examples/tiny/sd15",
        reward="examples/tiny/shapes.py:reward",
        prompts="examples/tiny/train.txt",
        eval_prompts="examples/tiny/heldout.txt",
        iterations=11,
        batch_size=96,
        updates=4,
        lr=2e-3,
        beta=0.3,
        kl=0.1,
        z=1.5,
        ema=0.8,
        solver="dpm2",
        steps=5,
        eval_steps=10,
        eval_every=6,
    ),
    "tiny-sd3": dict(
        model="examples/tiny/sd3",
        reward="examples/tiny/shapes.py:reward",
        prompts="examples/tiny/train.txt",
        eval_prompts="examples/tiny/heldout.txt",
        iterations=40,
        batch_size=96,
        updates=4,
        train_times=9,
        lr=3e-3,
        kl=0.03,
        z=1.5,
        ema=0.95,
        solver="dpm2",
        max_sequence_length=2,
    ),
    "sd15": dict(model="stable-diffusion-v1-5/stable-diffusion-v1-5", kl=0.1, solver="dpm2"),
    "sdxl": dict(
        model="stabilityai/stable-diffusion-xl-base-1.0",
        kl=0.1,
        solver="dpm2",
        checkpointing=True,
        save_every=10,
    ),
    "sd3": dict(
        model="stabilityai/stable-diffusion-3.5-medium",
        solver="dpm2",
        resolution=512,
        checkpointing=True,
    ),
    # Departs from section 4, which has no guidance: to this distilled model it is an input.
    "flux": dict(
        model="black-forest-labs/FLUX.1-dev",
        guidance=3.5,
        resolution=512,
        checkpointing=True,
        save_every=10,
    ),
}


# ---- The method: pure functions of tensors and scalars -----------------------------------------
def alpha_sigma(t, alphas_cumprod=None):
    """alpha_t, sigma_t of x_t = alpha_t x_0 + sigma_t eps (section 2), shaped like t.

    t: for a rectified flow in [0, 1]; else in [0, T - 1], and alphas_cumprod (T,) has alpha_t^2.
    """
    if alphas_cumprod is None:
        return 1 - t, t
    alpha_squared = alphas_cumprod[t.round().long()]
    return alpha_squared.sqrt(), (1 - alpha_squared).sqrt()


def predict_x0(x_t, out, alpha_t, sigma_t, prediction):
    """The clean sample (B, ...) that a denoiser's output means, and its slope |d x_0 / d out|.

    prediction: "flow_prediction" (eps - x_0), "epsilon", "v_prediction" (alpha eps - sigma x_0).
    """
    if prediction == "flow_prediction":
        return x_t - sigma_t * out, sigma_t
    if prediction == "epsilon":
        # alpha is 0 where the schedule ends in pure noise.
        alpha_t = alpha_t.clamp_min(2**-12)
        return (x_t - sigma_t * out) / alpha_t, sigma_t / alpha_t
    return alpha_t * x_t - sigma_t * out, sigma_t


def optimality_reward(raw, groups, z=5.0):
    """r = 1/2 + 1/2 clip[(r_raw - mean of its group) / Z_c, -1, 1]: (B,) in [0, 1], section 3.3.

    raw: (B,) rewards of any unit. groups: (B,) integers, equal for images of one prompt.
    Z_c = z * (population std of all B rewards + 1e-4), the global std of section 3.3; its factor z
    is the released code's. Raises ValueError where a reward is not finite.
    """
    # In double precision, so that equal rewards have r = 1/2 exactly.
    raw = torch.as_tensor(raw, dtype=torch.float64)
    if not raw.isfinite().all():
        raise ValueError("a reward is not finite")
    groups = torch.as_tensor(groups, device=raw.device)
    _, groups, sizes = groups.unique(return_inverse=True, return_counts=True)
    # Line 4 takes off the mean of a prompt's images.
    mean = raw.new_zeros(len(sizes)).index_add(0, groups, raw) / sizes
    r_norm = raw - mean[groups]
    # Line 5 scales, clips, moves to [0, 1].
    Z_c = z * (raw.std(correction=0) + 1e-4)
    return (0.5 + 0.5 * (r_norm / Z_c).clamp(-1, 1)).float()


def adaptive_loss(x0_hat, x_0):
    """||x0_hat - x_0||^2 / sg(mean |x0_hat - x_0|), section 3.3, ||.||^2 being a mean: -> (B,)."""
    error = (x0_hat - x_0).flatten(1)
    return error.square().mean(1) / error.detach().abs().mean(1).clamp_min(1e-5)


def nft_loss(x0_theta, x0_old, x_0, r, beta, distance=adaptive_loss):
    """The DiffusionNFT loss of each sample, Eq. (5), in the space of clean samples: (B,).

    x0_theta, x0_old: (B, ...), predicted from the same (x_t, t) by the trained and the old policy;
    no gradient flows into the latter. x_0: (B, ...), the sampled images. r: (B,), in [0, 1].

    Eq. (4): Delta = alpha(x_t) (v+ - v_old) = [1 - alpha(x_t)] (v_old - v-) leads to better images,
    with v+ and v- the velocities of the positive and of the negative ones, and alpha(x_t), not
    alpha_t, the expected r of the images that x_t may come from. Eq. (3) aims at
    v_old + Delta / beta. With squared distances the optimum of this loss lies twice as far, at
    v_old + (2 / beta) Delta: Eq. (6).
    """
    x0_old = x0_old.detach()
    # The paper mixes velocities:
    #   v_positive = (1 - beta) v_old + beta v_theta        (line 10)
    #   v_negative = (1 + beta) v_old - beta v_theta        (line 11)
    # x_0 is affine in v, with coefficients of (x_t, t) alone (predict_x0), and the weights sum to
    # one: so the clean samples of these mixtures are the same mixtures of the clean samples.
    x0_positive = (1 - beta) * x0_old + beta * x0_theta
    x0_negative = (1 + beta) * x0_old - beta * x0_theta
    # The loss of line 12, Eq. (5): r weights the positive branch, 1 - r the negative one.
    loss = r * distance(x0_positive, x_0) + (1 - r) * distance(x0_negative, x_0)
    # Departs from Eq. (5): divided by beta, as in the released code (but for its factor of 5), so
    # that beta moves the optimum and not the size of the gradient.
    return loss / beta


def soft_update_decay(i, schedule="0,0.001,0.5"):
    """eta_i in [0, 1] of theta_old <- eta_i theta_old + (1 - eta_i) theta, Algorithm 1 line 14.

    i: the iteration just completed, from 1. schedule: a constant, or "START,SLOPE,MAX" for
    min(max(SLOPE (i - START), 0), MAX). The released code's for OCR, which counts optimizer steps,
    two an iteration, is 37.5,0.015,0.999. Raises UserError for what is no schedule.
    """
    try:
        numbers = [float(number) for number in str(schedule).split(",")]
    except ValueError:
        numbers = []
    if len(numbers) == 1 and 0 <= numbers[0] <= 1:
        return numbers[0]
    if len(numbers) == 3 and all(map(math.isfinite, numbers)):
        start, slope, maximum = numbers
        if slope >= 0 and 0 <= maximum <= 1:
            return min(max(slope * (i - start), 0.0), maximum)
    raise UserError(f"--eta {schedule}: must be a constant in [0, 1], or START,SLOPE,MAX")


# ---- LoRA: theta, old, EMA and reference share one frozen base ---------------------------------
SCALE = 2  # alpha / rank
TARGETS = re.compile(r"\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)$")


def generator(*key):
    """A CPU random generator that depends on `key` alone: no state to save, no device to match."""
    return torch.Generator().manual_seed(random.Random(repr(key)).getrandbits(63))


class LoRA:
    """Adapters on the attention projections of `net`, by hooks: W x becomes W x + SCALE B A x.

    `active` names the one in use: "theta", "old", "ema", or None for the base model, v_ref. Each is
    a list of fp32 tensors [A_0, B_0, A_1, B_1, ...], A: (rank, in), B: (out, rank).
    """

    def __init__(self, net, rank, seed):
        net.requires_grad_(False)
        self.active = None
        self.layers = []
        # Numbers of the layers that were called with an adapter.
        self.called = set()
        start = []
        noise = generator(seed, "lora")
        for name, layer in net.named_modules():
            if isinstance(layer, torch.nn.Linear) and TARGETS.search(name):
                # peft's "gaussian" start, and B = 0: theta = old = base, as before line 1.
                A = torch.randn(rank, layer.in_features, generator=noise, dtype=torch.float32)
                start += [A / rank, torch.zeros(layer.out_features, rank, dtype=torch.float32)]
                layer.register_forward_hook(functools.partial(self.add_adapter, len(self.layers)))
                self.layers.append(name)
        self.adapters = {}
        for name in ("theta", "old", "ema"):
            self.adapters[name] = [x.to(net.device, copy=True) for x in start]
        for x in self.adapters["theta"]:
            x.requires_grad_()

    def add_adapter(self, i, layer, args, out):
        """The hook of layer i: out + SCALE B A x, in the base's precision."""
        if self.active is None:
            return out
        self.called.add(i)
        A, B = self.adapters[self.active][2 * i : 2 * i + 2]
        low_rank = F.linear(args[0], A.to(out.dtype)).flatten(0, -2)
        total = torch.addmm(out.flatten(0, -2), low_rank, B.to(out.dtype).T, alpha=SCALE)
        return total.view_as(out)

    @torch.no_grad()
    def average(self, name, decay):
        """adapter <- decay * adapter + (1 - decay) * theta: line 14 for "old", and the EMA."""
        for x, theta in zip(self.adapters[name], self.adapters["theta"], strict=True):
            x.copy_(decay * x + (1 - decay) * theta)


# ---- Mixed precision ---------------------------------------------------------------------------
# In half precision, on a GPU: the frozen base (denoiser, text encoders, VAE) and what flows through
# it; bf16 where the GPU has it, else fp16. Departs from the released code, where base and VAE stay
# in fp32 and the denoiser runs under autocast.
# In fp32: the adapters (cast where a layer uses them), their gradients, AdamW; x_0, x_t, and the
# denoiser's outputs from `predict` on; the loss, r, and what rewards return.
# fp16 has no gradients below 6e-8: so `optimize` scales the loss, and steps where none overflowed.
def pick_device(config):
    """The device of --device, and the dtype of the frozen base. Raises UserError."""
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(0, device=config.device.replace("auto", automatic)).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {config.device}: must be usable here; try auto") from error
    if config.precision != "auto":
        return device, PRECISIONS[config.precision]
    if device.type != "cuda":
        return device, torch.float32
    # T4 and V100 only emulate bf16.
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    return device, torch.bfloat16 if native else torch.float16


# ---- The pipeline: sampler, denoiser and forward process ---------------------------------------
HEARD = set()


def first_time(record):
    """A filter of loggers: lets a message pass once, by its beginning, and none on torchvision."""
    # What follows, where prompts are cut, is their text.
    start = record.getMessage()[:80]
    new = start not in HEARD and "torchvision" not in start
    HEARD.add(start)
    return new


def locate(path):
    """A file or directory as it is, else beside nft.py, so that presets work from anywhere."""
    for place in (Path(path), Path(__file__).resolve().parent / path):
        if place.exists():
            return place
    raise UserError(f"{path}: must exist, here or beside nft.py; name your own, or clone all of it")


def map_tensors(f, *trees):
    """Apply f to the tensors of nested dicts, lists and tuples of equal form; other leaves stay."""
    return tree_map(lambda x, *others: f(x, *others) if torch.is_tensor(x) else x, *trees)


def load_pipeline(config, dtype):
    """The pipeline of --model, without its safety checker, which would black images out. Warnings
    of the libraries are left on, each once. Raises OSError where something is missing."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        for handler in logging.getLogger(library.__name__).handlers:
            handler.addFilter(first_time)
    path = locate(config.model) if config.model.startswith("examples/") else config.model
    index = diffusers.DiffusionPipeline.load_config(path)
    # Components that were saved as missing, such as SD3's T5, must be named.
    off = {name: None for name, kind in index.items() if kind == [None, None]}
    if "safety_checker" in index:
        off |= dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe = diffusers.DiffusionPipeline.from_pretrained(path, dtype=dtype, **off)
    pipe.set_progress_bar_config(disable=True)
    # As add_watermarker=False, which SDXL alone takes.
    pipe.watermark = None
    return pipe


def is_flow(scheduler):
    """Is it the scheduler of a rectified flow?"""
    named = scheduler.config.get("prediction_type") == "flow_prediction"
    return named or "FlowMatch" in type(scheduler).__name__


def pick_solver(name, scheduler):
    """The solver of this name, for the forward process of `scheduler`."""
    import diffusers

    solver = getattr(diffusers, SOLVERS[name])
    options = {"clip_sample": False}
    if name in ("dpm2", "dpm2-sde"):
        kind = "dpmsolver++" if name == "dpm2" else "sde-dpmsolver++"
        # From the last time on, where the noise is pure, whatever the model's own solver does.
        options |= dict(algorithm_type=kind, timestep_spacing="trailing")
    if is_flow(scheduler):
        solver = getattr(diffusers, f"FlowMatch{SOLVERS[name]}", solver)
        shift = scheduler.config.get("shift", scheduler.config.get("flow_shift", 1.0))
        options |= dict(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift)
    known = inspect.signature(solver).parameters
    return solver.from_config(scheduler.config, **{k: options[k] for k in options if k in known})


class Model:
    """A text-to-image pipeline as a black box: a sampler, a denoiser, a forward process."""

    def __init__(self, config):
        self.config = config
        self.device, self.dtype = pick_device(config)
        try:
            self.pipe = load_pipeline(config, self.dtype).to(self.device)
        except OSError as error:
            rule = f"must be {', '.join(PRESETS)}, a pipeline's directory, or a hub id in reach"
            raise UserError(f"--model {config.model}: {rule} ({error})") from error
        self.component = "unet" if hasattr(self.pipe, "unet") else "transformer"
        self.net = getattr(self.pipe, self.component, None)
        scheduler = self.pipe.scheduler
        flow = is_flow(scheduler)
        self.prediction = "flow_prediction" if flow else scheduler.config.get("prediction_type")
        known = self.prediction in ("flow_prediction", "epsilon", "v_prediction")
        if self.net is None or not known or not (flow or hasattr(scheduler, "alphas_cumprod")):
            self.refuse("must have one denoiser, unet or transformer, of flow, epsilon or v")
        if self.component == "unet":
            # Convolutions are faster so.
            self.net.to(memory_format=torch.channels_last)
            self.pipe.vae.to(memory_format=torch.channels_last)
        self.alphas_cumprod = None if flow else scheduler.alphas_cumprod.to(self.device)
        self.signature = inspect.signature(self.net.forward)
        # The argument that takes x_t: "sample" or "hidden_states".
        self.input = next(iter(self.signature.parameters))
        self.T = scheduler.config.num_train_timesteps
        if config.solver:
            self.pipe.scheduler = pick_solver(config.solver, scheduler)
        self.eval_steps = config.eval_steps or config.steps
        size, length = config.resolution, config.max_sequence_length
        given = dict(height=size, width=size, max_sequence_length=length, guidance_scale=1.0)
        self.settings = {name: value for name, value in given.items() if value}
        self.shared = {}
        self.lora = LoRA(self.net, config.rank, config.seed)
        self.check_sampling()
        # Departs from Eq. (6) above 1: guided images have another E[v | x_t] than v_old.
        self.settings["guidance_scale"] = config.guidance
        if config.checkpointing:
            self.net.enable_gradient_checkpointing()

    def refuse(self, rule):
        """Raise the UserError that this pipeline is none for us."""
        solver = self.config.solver or "of its own"
        raise UserError(f"--model {self.config.model}, --solver {solver}: {rule}; change one")

    @torch.no_grad()
    def sample(self, prompts, keys, policy):
        """The pipeline's own picture of each prompt, from the noise of its key; `policy` "old" in
        --steps, others in --eval-steps. Returns x_0: latents (B, ...), fp32; images: (B, 3, H, W)
        in [0, 1]; condition: the denoiser's arguments with a row an image."""
        settings = self.settings | {"generator": [generator(*key) for key in keys]}
        settings["num_inference_steps"] = self.config.steps if policy == "old" else self.eval_steps
        self.calls, latents = [], []

        def hear_denoiser(net, args, kwargs, out):
            given = dict(self.signature.bind(*args, **kwargs).arguments)
            x_t = given.pop(self.input)
            t = torch.as_tensor(given.pop("timestep")).flatten()[:1].cpu()
            # A learned variance would come after the sample's channels.
            self.calls.append((x_t, t, given, out[0][:, : x_t.shape[1]]))

        def hear_solver(pipe, step, t, tensors):
            latents.append(tensors["latents"])
            return tensors

        settings |= {"callback_on_step_end": hear_solver, "output_type": "pt"}
        scheduler = self.pipe.scheduler
        if "generator" in inspect.signature(scheduler.step).parameters:
            # SD3 and FLUX do not hand theirs on to a solver that draws noise.
            scheduler.step = functools.partial(scheduler.step, generator=settings["generator"])
        hook = self.net.register_forward_hook(hear_denoiser, with_kwargs=True)
        self.lora.active = policy
        try:
            images = self.pipe(list(prompts), **settings).images
        finally:
            self.lora.active = None
            hook.remove()
            vars(scheduler).pop("step", None)
        x_0 = latents[-1].float()
        if not (x_0.isfinite().all() and images.isfinite().all()):
            raise FloatingPointError("a sample is not finite; try --precision bf16 or a smaller lr")
        arguments = {k: v for k, v in self.calls[0][2].items() if k not in self.shared}
        # With guidance the batch is [unconditional, conditional]: we train the latter.
        condition = map_tensors(lambda x: x[-len(prompts) :], arguments)
        return {"x_0": x_0, "images": images.float().clamp(0, 1), "condition": condition}

    def check_sampling(self):
        """Set times (S,), those of evaluation in the denoiser's unit; time_scale, this unit over
        the solver's; shared, the denoiser's arguments without a row an image. Raises UserError
        where training would not fit sampling."""
        prompts = ["", "two", "three"]
        try:
            # theta still is the base, and shows which layers its adapter reaches.
            x_0 = self.sample(prompts, [("check", i) for i in range(3)], "theta")["x_0"]
        except (ValueError, TypeError) as error:
            self.refuse(f"must fit the flags on sampling ({error})")
        for name, value in self.calls[0][2].items():
            rows = [x.shape[:1] for x in tree_leaves(value) if torch.is_tensor(x)]
            if x_0.shape[:1] not in rows:
                self.shared[name] = map_tensors(torch.clone, value)
        idle = len(self.lora.layers) - len(self.lora.called)
        if idle:
            say(f"{idle} of the layers with adapters are never called: they train nothing")
        scheduler = self.pipe.scheduler
        times = torch.cat([t for _, t, _, _ in self.calls])
        if len(times) != len(scheduler.timesteps):
            self.refuse("must call its denoiser once in each step")
        self.times = times.unique()
        self.time_scale = times[0].item() / (scheduler.timesteps[0].item() or 1)
        # One law: at the last step the clean sample that is read off the denoiser's output is the
        # pipeline's own, and nearer to it than what the negated output says. "not <" refuses NaN.
        alpha_t, sigma_t = self.noise_level(times)
        x_t, _, _, out = map_tensors(torch.Tensor.float, self.calls[-1])
        level = (alpha_t[-1], sigma_t[-1], self.prediction)
        error = (predict_x0(x_t, out, *level)[0] - x_0).abs().mean()
        negated = (predict_x0(x_t, -out, *level)[0] - x_0).abs().mean()
        if not error < min(negated, 0.1 * x_0.abs().mean()):
            self.refuse("must give its solver the denoiser's output as flow, epsilon or v")
        # And our noise levels are the solver's in all steps: sigma_t, or sigma_t / alpha_t.
        theirs = getattr(scheduler, "sigmas", sigma_t)[: len(times)].to(self.device)
        if hasattr(scheduler, "sigmas") and self.alphas_cumprod is not None:
            theirs = theirs / (1 + theirs**2).sqrt()
        if not (theirs - sigma_t).abs().max() < 0.02:
            self.refuse("must have a solver that visits the noise levels of its times")

    def predict(self, x_t, t, condition, policy):
        """The denoiser's output in fp32, like x_t (B, ...), at its times t (B,); see `sample`."""
        # It stays active: with --checkpointing the backward pass calls the layers once more.
        self.lora.active = policy
        inputs = {self.input: x_t.to(self.dtype), "timestep": t.to(self.device)}
        return self.net(**inputs, **condition, **self.shared)[0][:, : x_t.shape[1]].float()

    def noise_level(self, t, ndim=1):
        """alpha_t, sigma_t at times (B,) as the denoiser takes them, shaped (B, 1, ...) of ndim."""
        # From the denoiser's unit to the solver's; a flow's is then divided by T, into [0, 1].
        t = t.to(self.device).float().view(-1, *[1] * (ndim - 1)) / self.time_scale
        if self.alphas_cumprod is None:
            return alpha_sigma(t / self.T)
        return alpha_sigma(t, self.alphas_cumprod)


# ---- Rewards: f(images (B, 3, H, W) in [0, 1], prompts, metadata) -> B numbers -----------------
def to_pil(image):
    """(3, H, W) in [0, 1] -> an 8-bit PIL image."""
    from PIL import Image

    pixels = (image.float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    return Image.fromarray(pixels.cpu().numpy())


def jpeg(images, prompts, metadata):
    """Minus the kilobytes of each image as JPEG of quality 95: DDPO's compressibility."""
    rewards = []
    for image in images:
        buffer = io.BytesIO()
        to_pil(image).save(buffer, "JPEG", quality=95)
        rewards.append(-len(buffer.getvalue()) / 1000)
    return rewards


def aesthetic():
    """Make LAION aesthetics V2, about 1 to 10: five linear layers on an image by CLIP ViT-L/14."""
    from transformers import CLIPImageProcessorPil, CLIPModel
    from transformers.utils import cached_file

    name = "openai/clip-vit-large-patch14"
    clip = CLIPModel.from_pretrained(name, dtype=torch.float32)
    processor = CLIPImageProcessorPil.from_pretrained(name)
    file = cached_file("trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth")
    head = torch.load(file, map_location="cpu", weights_only=True)

    def reward(images, prompts, metadata):
        inputs = processor([to_pil(image) for image in images], return_tensors="pt")
        clip.to(images.device)
        x = clip.get_image_features(**inputs.to(images.device)).pooler_output
        x = F.normalize(x, dim=-1).cpu()
        # No activation between the layers: the head was trained so.
        for i in (0, 2, 4, 6, 7):
            x = F.linear(x, head[f"layers.{i}.weight"], head[f"layers.{i}.bias"])
        return x[:, 0]

    return reward


@functools.cache
def load_file(file):
    """Run a reward's file as the module reward_STEM."""
    # What lies beside it can be imported; last, so that a file clip.py hides no package.
    sys.path.append(str(file.parent))
    spec = importlib.util.spec_from_file_location(f"reward_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def load_reward(name):
    """The function of jpeg, aesthetic, a file in examples/rewards/, or FILE.py:FUNCTION."""
    function = {"jpeg": jpeg, "aesthetic": aesthetic}.get(name)
    if function is None:
        path, _, attribute = name.rpartition(":")
        file = locate(path or f"examples/rewards/{name}.py").resolve()
        if file.suffix == ".py":
            function = getattr(load_file(file), attribute if path else "reward", None)
    if function is None:
        raise UserError(f"--reward {name}: must be a function of {file.name}; correct it")
    return function


def load_rewards(spec):
    """ "NAME=WEIGHT,FILE.py:FUNCTION", a function or a dict -> {name: (weight, function)}."""
    if callable(spec):
        spec = {getattr(spec, "__name__", "reward"): spec}
    if isinstance(spec, dict):
        rewards = {k: f if isinstance(f, tuple) else (1.0, f) for k, f in spec.items()}
    else:
        rewards = {}
        for part in spec.split(","):
            name, _, weight = part.strip().partition("=")
            try:
                weight = float(weight or 1)
            except ValueError as error:
                raise UserError(f"--reward {part}: must be NAME=WEIGHT, a number") from error
            rewards[name] = (weight, load_reward(name))
    for name, (weight, function) in rewards.items():
        # One without arguments loads a model, and returns the reward.
        if not inspect.signature(function).parameters:
            rewards[name] = (weight, function())
    return rewards


@torch.no_grad()
def score(rewards, images, prompts, metadata):
    """{"reward": r_raw, their weighted sum, "reward/NAME": ...}, each (B,) in fp32 on the CPU."""
    scores = {"reward": torch.zeros(len(images), dtype=torch.float32)}
    for name, (weight, function) in rewards.items():
        # Copies, as a reward may change what it is given.
        result = function(images.clone(), list(prompts), copy.deepcopy(list(metadata)))
        result = result[0] if isinstance(result, tuple) else result
        part = torch.as_tensor(result, dtype=torch.float32).cpu()
        if part.shape != (len(images),):
            raise ValueError(f"reward {name}: must be a number an image, not {tuple(part.shape)}")
        if not part.isfinite().all():
            raise FloatingPointError(f"reward {name}: must be finite, not {part.tolist()}")
        scores[f"reward/{name}"] = part
        scores["reward"] += weight * part
    return scores


# ---- Prompts and pictures ----------------------------------------------------------------------
ANIMALS = "bear camel cat cow deer dog duck elephant fox frog goat horse lion owl rabbit tiger"
PLACES = ["in a forest", "on a beach", "in the snow", "in a meadow", "at sunset", "by a lake"]
PLACES += ["in a city", "in a desert", "in a garden", "on a mountain"]
SHOWN = 16  # images in a grid


def load_prompts(path, flag):
    """.txt (one a line) or .jsonl ({"prompt": ..., metadata}) -> [(prompt, metadata)]."""
    file = locate(path)
    rule = f"{flag} {path}: must be a .txt of a prompt a line, or a .jsonl of an object a line"
    if not file.is_file() or file.suffix not in (".txt", ".jsonl"):
        raise UserError(f"{rule}; convert it")
    prompts = []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            text = line.decode("utf-8-sig")
            row = json.loads(text) if file.suffix == ".jsonl" else {"prompt": text}
            prompt = row.pop("prompt").strip()
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{rule}; mend line {number} ({error!r})") from error
        if not prompt:
            raise UserError(f"{rule}; mend line {number}, which has no prompt")
        prompts.append((prompt, row))
    if not prompts:
        raise UserError(f"{rule}, and not empty")
    return prompts


def load_prompt_sets(config):
    """The prompts to train on, shuffled, and those to evaluate on: lists of (prompt, metadata)."""
    prompts = [(f"a photo of a {x} {y}", {}) for x in ANIMALS.split() for y in PLACES]
    if config.prompts:
        prompts = load_prompts(config.prompts, "--prompts")
    random.Random(config.seed).shuffle(prompts)
    if config.eval_prompts:
        held_out = load_prompts(config.eval_prompts, "--eval-prompts")
    else:
        distinct = dict(prompts)
        number = min(max(16, len(distinct) // 10), 64, len(distinct) // 2)
        chosen = dict(list(distinct.items())[:number])
        prompts = [pair for pair in prompts if pair[0] not in chosen]
        # A single prompt is all there is.
        held_out = list(chosen.items()) or prompts
    if len(held_out) < WORLD:
        raise UserError(f"--eval-prompts: must be {WORLD} or more, one a process; give more")
    return prompts, held_out


def picture_grid(images, captions):
    """A picture of images (N, 3, H, W), 96 or 256 pixels high and eight a row, over captions."""
    from PIL import Image, ImageDraw

    height = 96 if images.shape[2] < 96 else 256
    width = height * images.shape[3] // images.shape[2]
    size = ((width + 12) * 8, (height + 62) * math.ceil(len(images) / 8))
    sheet = Image.new("RGB", size, "lightgray")
    for n, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = n % 8 * (width + 12) + 6, n // 8 * (height + 62) + 4
        sheet.paste(to_pil(image).resize((width, height), Image.Resampling.BOX), (x, y))
        text = textwrap.fill(caption, width // 6, max_lines=4, placeholder=" ...")
        ImageDraw.Draw(sheet).text((x, y + height + 2), text, fill="black")
    return sheet


# ---- Processes, and the run directory ----------------------------------------------------------
def gather(x):
    """[x of process 0, x of process 1, ...], for anything on the CPU."""
    everyone = [x] * WORLD
    if WORLD > 1:
        dist.all_gather_object(everyone, x)
    return everyone


def share(n):
    """This process's part of range(n)."""
    return range(n * RANK // WORLD, n * (RANK + 1) // WORLD)


def say(text):
    """Print a line above the progress bars, from the first process alone."""
    if RANK == 0:
        tqdm.write(text)


def load_checkpoint(out):
    """What Run.save saved in this directory, or None; nothing of it is executed."""
    file = Path(out) / "checkpoint.pt"
    if file.exists():
        return torch.load(file, map_location="cpu", weights_only=True)
    return None


class Run:
    """What a run changes: the adapters, the optimizer, and the rows of metrics.jsonl."""

    def __init__(self, config, model):
        self.config, self.model = config, model
        self.dir = Path(config.out)
        self.rows = []
        theta = model.lora.adapters["theta"]
        self.optimizer = torch.optim.AdamW(theta, betas=(0.9, 0.999), weight_decay=1e-4)
        half = model.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(model.device.type, enabled=half)
        # GradScaler makes its scale at first use, and a process may have no pair in a step.
        self.scaler.scale(torch.zeros((), device=model.device))
        state = load_checkpoint(self.dir)
        if state and not config.resume:
            raise UserError(f"--out {self.dir}: holds a run; add --resume, or take another one")
        if state:
            for name, adapter in state["lora"].items():
                for x, saved in zip(model.lora.adapters[name], adapter, strict=True):
                    x.data.copy_(saved)
            self.optimizer.load_state_dict(state["optimizer"])
            self.rows = state["rows"]
        # Empty where the run was not in fp16.
        if state and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.optimizer.param_groups[0]["lr"] = config.lr
        try:
            (self.dir / "samples").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {self.dir}: must be a directory to write to") from error
        if RANK == 0:
            text = json.dumps(vars(config), indent=1, default=str)
            (self.dir / "config.json").write_text(text)
            model.pipe.scheduler.save_pretrained(self.dir / "scheduler")

    def save(self):
        """Write the checkpoint, metrics.jsonl, the EMA of theta for pipe.load_lora_weights(DIR)."""
        import safetensors.torch

        if RANK > 0:
            return
        lora = self.model.lora
        # All that --resume needs: random draws have keys, and no state. What is no text or number,
        # such as a reward's function, must be given again.
        settings = {k: x for k, x in vars(self.config).items() if isinstance(x, (str, int, float))}
        state = {"config": settings, "rows": self.rows}
        state |= {"lora": map_tensors(torch.Tensor.detach, lora.adapters)}
        state |= {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        torch.save(state, self.dir / "checkpoint.tmp")
        # A kill while writing leaves the last checkpoint whole.
        os.replace(self.dir / "checkpoint.tmp", self.dir / "checkpoint.pt")
        lines = [json.dumps(row) + "\n" for row in self.rows]
        (self.dir / "metrics.jsonl").write_text("".join(lines))
        weights = {}
        for i, name in enumerate(lora.layers):
            A, B = lora.adapters["ema"][2 * i : 2 * i + 2]
            weights[f"{self.model.component}.{name}.lora_A.weight"] = A
            weights[f"{self.model.component}.{name}.lora_B.weight"] = SCALE * B
        safetensors.torch.save_file(weights, self.dir / "pytorch_lora_weights.safetensors")


# ---- Algorithm 1 -------------------------------------------------------------------------------
def collect(model, rewards, numbered, key, policy):
    """Lines 2 and 3: an image, scored, for each (i, prompt, metadata), from the noise of (*key, i).
    On the CPU: scores {"reward": (B,), "reward/NAME": (B,)}; by the policy "old" x_0 and condition,
    which are trained on; else SHOWN images."""
    # Without gradients four times as many images fit.
    size = 4 * model.config.batch_size
    # None hides the bar where there is no terminal.
    hidden = True if RANK > 0 else None
    batches = []
    for start in tqdm(range(0, len(numbered), size), policy, leave=False, disable=hidden):
        numbers, prompts, metadata = zip(*numbered[start : start + size], strict=True)
        batch = model.sample(prompts, [(*key, i) for i in numbers], policy)
        images = batch.pop("images")
        scores = score(rewards, images, prompts, metadata)
        if policy != "old":
            batch = {"images": images[: max(0, SHOWN - start)]}
        batches.append(map_tensors(torch.Tensor.cpu, batch | {"scores": scores}))
    return map_tensors(lambda *x: torch.cat(x), *batches)


def means(scores, prefix=""):
    """Fields of a row, and r_raw (N,), from the scores of all processes."""
    scores = map_tensors(lambda *x: torch.cat(x), *gather(scores))
    row = {f"{prefix}{name}": x.mean().item() for name, x in scores.items()}
    row[f"{prefix}reward_std"] = scores["reward"].std(correction=0).item()
    return row, scores["reward"]


def evaluate(run, rewards, prompts, iteration):
    """Fields of a row: held-out rewards by the EMA of theta, from the same noise every time."""
    from diffusers.utils import make_image_grid
    from PIL import Image

    # Departs from section 4: by the run's own solver, not by 40 first-order steps.
    numbered = [(i, *prompts[i]) for i in share(len(prompts))]
    D = collect(run.model, rewards, numbered, ("evaluation",), "ema")
    row, raw = means(D["scores"], "eval_")
    parts = ", ".join(f"{name} {row[f'eval_reward/{name}']:.3f}" for name in rewards)
    say(f"iteration {iteration:4d}   held-out reward {row['eval_reward']:.3f} ({parts})")

    # The pictures, and those of the base model above them.
    images = torch.cat(gather(D["images"]))[:SHOWN]
    when = "after" if iteration else "before"
    captions = [f"{when} ({x:.3g}): {c}" for x, (c, _) in zip(raw, prompts, strict=True)]
    grid = picture_grid(images, captions[:SHOWN])
    if RANK == 0:
        grid.save(run.dir / f"samples/{iteration:06d}.png")
        before = run.dir / "samples/000000.png"
        # A run that was moved may have lost it.
        if iteration and before.exists():
            both = make_image_grid([Image.open(before), grid], rows=2, cols=1)
            both.save(run.dir / "before_after.png")
    return row


def pair_losses(model, pairs, t, eps, loss=nft_loss):
    """Lines 9 to 12 for b pairs of an image and a time: pairs {"x_0": (b, ...), "condition",
    "r": (b,)}, times t (b,), noise eps (b, ...). Three tensors (b,): Eq. (5)'s loss; and as means
    over elements ||out_theta - out_ref||^2, the KL term, and ||out_theta - out_old||^2, which is
    only logged. `loss` may be any function like nft_loss; what depends on t calls
    model.noise_level(t, eps.ndim) for alpha_t and sigma_t."""
    config = model.config
    x_0, condition = pairs["x_0"], pairs["condition"]
    # Line 9: the forward process. Its target v, as a clean sample, is x_0 itself.
    alpha_t, sigma_t = model.noise_level(t, x_0.ndim)
    x_t = alpha_t * x_0 + sigma_t * eps
    with torch.no_grad():
        out_old = model.predict(x_t, t, condition, "old")
        if config.kl:
            out_ref = model.predict(x_t, t, condition, None)
    # Last, so that theta's adapter is on in the backward pass.
    out_theta = model.predict(x_t, t, condition, "theta")
    # Lines 10 to 12, in the space of clean samples.
    x0_old, _ = predict_x0(x_t, out_old, alpha_t, sigma_t, model.prediction)
    x0_theta, slope = predict_x0(x_t, out_theta, alpha_t, sigma_t, model.prediction)
    # Departs from section 3.3 for eps- and v-prediction: an error of the output moves x_0 by slope,
    # for eps sigma / alpha = 14.6 at SD1.5's t = 999, and high noise would drive all learning. With
    # this weight, 1 for flow, the gradient scales as for flow: by sigma / (alpha + sigma).
    weight = (sigma_t / (alpha_t + sigma_t) / slope).flatten()
    losses = weight * loss(x0_theta, x0_old, x_0, pairs["r"], config.beta)
    kl = torch.zeros_like(losses)
    if config.kl:
        kl = (out_theta - out_ref).square().flatten(1).mean(1)
    deviation = (out_theta.detach() - out_old).square().flatten(1).mean(1)
    return losses, kl, deviation


def draw_pairs(config, times, iteration):
    """The pairs of an image and a time of each optimizer step, [(index (b,), t (b,))]."""
    N = config.groups * config.group_size
    noise = generator(config.seed, iteration, "training")
    # Departs from appendix C: at a few times of evaluation, each once, not at all of the rollout's.
    chosen = times[torch.rand(N, len(times), generator=noise).argsort(1)[:, : config.train_times]]
    steps = torch.randperm(N, generator=noise).tensor_split(config.updates)
    return [(i.repeat_interleave(chosen.shape[1]), chosen[i].flatten()) for i in steps]


def optimize(run, D, iteration, losses=pair_losses):
    """Lines 8 to 13: `updates` steps of AdamW, each on its part of D (tensors with a row an image
    of this process's share, on the CPU). Fields of a row."""
    config, device, lora = run.config, run.model.device, run.model.lora
    theta = lora.adapters["theta"]
    mine = share(config.groups * config.group_size)
    drawn = draw_pairs(config, run.model.times, iteration)
    sums = torch.zeros(3, dtype=torch.float64)
    row = {"grad_norm": 0.0}
    # Line 8; the loop ends with line 13.
    for step, (index, t) in enumerate(drawn, (iteration - 1) * config.updates + 1):
        for x in theta:
            x.grad = torch.zeros_like(x)
        places = ((index >= mine.start) & (index < mine.stop)).nonzero().flatten()
        for start in range(0, len(places), config.batch_size):
            batch = places[start : start + config.batch_size]
            images = index[batch] - mine.start
            pairs = map_tensors(lambda x, i=images: x[i].to(device), D)
            noise = [generator("eps", config.seed, step, place) for place in batch.tolist()]
            eps = torch.stack([torch.randn(D["x_0"].shape[1:], generator=g) for g in noise])
            terms = losses(run.model, pairs, t[batch].to(device), eps.to(device))
            # Departs from line 12: the KL term, as in the released code. A mean over the pairs of
            # all processes, whose gradients are added up.
            total = (terms[0] + config.kl * terms[1]).sum() / len(index)
            run.scaler.scale(total).backward()
            sums += torch.stack(terms).detach().cpu().double().sum(1)
        if WORLD > 1:
            for x in theta:
                dist.all_reduce(x.grad)
        # Departs from Algorithm 1: gradients are clipped, as in the released code at norm 1, which
        # is 0.2 for a loss without its factor of 5.
        run.scaler.unscale_(run.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(theta, 0.2).item()
        # In fp16 the scaler skips a step that is not, and halves its scale, until that is 1.
        if math.isfinite(norm):
            row["grad_norm"] = norm
        elif run.scaler.get_scale() <= 1:
            raise FloatingPointError("the gradient is not finite; try a smaller --lr")
        # Line 12: the gradient step.
        run.scaler.step(run.optimizer)
        run.scaler.update()
        # Departs from Algorithm 1, as the released code: an EMA is evaluated and saved, from which
        # the base has nearly gone after ten steps.
        lora.average("ema", min((1 + step) / (10 + step), config.ema))
    averages = sum(gather(sums / sum(len(index) for index, _ in drawn))).tolist()
    return row | dict(zip(("loss", "kl", "old_deviation"), averages, strict=True))


def train(
    config,
    make_model=Model,
    collect=collect,
    weigh=optimality_reward,
    losses=pair_losses,
    evaluate=evaluate,
):
    """Algorithm 1, of parts that a study may replace. Returns the rows of metrics.jsonl, a dict an
    iteration from 0, the base's. Raises UserError before anything is written, FloatingPointError
    for what is not finite."""
    prompts, held_out = load_prompt_sets(config)
    rewards = load_rewards(config.reward)
    for name, (_, function) in rewards.items():
        if hasattr(function, "check"):
            try:
                function.check(*zip(*(prompts + held_out), strict=True))
            except Exception as error:
                raise UserError(f"--reward {name}: {error}; take other --prompts") from error
    # Those of weight 0 are only evaluated.
    trained = {name: reward for name, reward in rewards.items() if reward[0]}
    if not trained:
        raise UserError("--reward: must have one whose weight is not 0; try jpeg")
    model = make_model(config)
    run = Run(config, model)
    say(f"{len(prompts)} prompts to train on, {len(held_out)} to evaluate on")
    K = config.group_size
    N = config.groups * K
    mine = share(N)
    started = time.time() - (run.rows[-1]["seconds"] if run.rows else 0)
    precision = torch.get_float32_matmul_precision()
    if model.device.type == "cuda":
        # TF32 for what is fp32, and a VAE that decodes images one by one.
        torch.set_float32_matmul_precision("high")
        model.pipe.vae.enable_slicing()
    try:
        if not run.rows:
            row = {"iteration": 0, "images": 0} | evaluate(run, rewards, held_out, 0)
            run.rows.append(row | {"seconds": time.time() - started})
            run.save()
        for iteration in range(len(run.rows), config.iterations + 1):  # line 1
            # Collect: prompts (line 2), and K images of each by the old policy and any solver (3).
            first = (iteration - 1) * config.groups
            numbered = [(i, *prompts[(first + i // K) % len(prompts)]) for i in mine]
            D = collect(model, trained, numbered, (config.seed, iteration), "old")

            # Reward: from r_raw the optimality r of each image (lines 4 and 5).
            row, raw = means(D.pop("scores"))
            r = weigh(raw, torch.arange(N) // K, config.z)
            # Line 6. Line 7 ends the loop over prompts, which all go together here.
            D["r"] = r[mine.start : mine.stop]

            # Optimize: theta by the loss of Eq. (5) on D (lines 8 to 13).
            row |= optimize(run, D, iteration, losses)

            # Update: theta_old <- eta_i theta_old + (1 - eta_i) theta, D <- {} (line 14).
            row["eta"] = soft_update_decay(iteration, config.eta)
            model.lora.average("old", row["eta"])
            D.clear()

            # Log, evaluate, save. Where r does not spread, the iteration taught nothing.
            row |= {"iteration": iteration, "images": run.rows[-1]["images"] + N}
            row["r_std"] = r.std(correction=0).item()
            text = f"reward {row['reward']:.3f}, r 0.5 +- {row['r_std']:.3f}"
            say(f"iteration {iteration:4d}   {text}")
            last = iteration == config.iterations
            if last or iteration % config.eval_every == 0:
                row |= evaluate(run, rewards, held_out, iteration)
            run.rows.append(row | {"seconds": time.time() - started})
            if last or iteration % config.save_every == 0:
                run.save()
    finally:
        torch.set_float32_matmul_precision(precision)
    values = [row["eval_reward"] for row in run.rows if "eval_reward" in row]
    say(f"held-out reward {values[0]:.3f} -> {values[-1]:.3f}; pictures and weights: {run.dir}")
    return run.rows


# ---- Settings and the command line -------------------------------------------------------------
def configure(**given):
    """Settings by the names of Config -> Config; a preset's, or to resume the run's own, stand
    where none are given. Raises UserError for what can be refused without a model."""
    given = {k: str(v) if isinstance(v, Path) else v for k, v in given.items()}
    name = given.get("model", Config.model)
    defaults = dict(PRESETS.get(name, {}))
    if "model" in given and defaults:
        given["model"] = defaults["model"]
    if given.get("resume") and not given.get("out"):
        raise UserError("--resume: must name the run; add --out DIR")
    saved = load_checkpoint(given["out"]) if given.get("resume") else None
    if saved:
        defaults = saved["config"]
        for fixed in ("model", "rank"):
            if given.get(fixed, defaults[fixed]) != defaults[fixed]:
                rule = f"must stay {defaults[fixed]} in this run; leave it out"
                raise UserError(f"--{fixed} {given[fixed]}: {rule}")
        if "reward" not in defaults | given:
            raise UserError("--resume: the reward of this run was a function; give it again")
    elif "prompts" in given:
        # Prompts of your own bring their own held-out ones.
        defaults.pop("eval_prompts", None)
    config = Config(**(defaults | given))
    # The process's number keeps two runs apart that start at once.
    out = f"runs/{Path(name).name}-{time.strftime('%m%d-%H%M%S')}-{os.getpid()}"
    config.out = config.out or gather(out)[0]
    return config


def parse(argv=None, **settings):
    """Command line, and settings that win -> Config. Raises UserError, or argparse's SystemExit."""
    text = f"{__doc__.splitlines()[0]} In brackets the defaults, which PRESETS changes for a model."
    usage = "python nft.py [--FLAG VALUE ...]"
    parser = argparse.ArgumentParser(usage=usage, description=text, allow_abbrev=False)
    for field in dataclasses.fields(Config):
        kind = {"type": field.type, "choices": field.metadata.get("choices")}
        if field.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        help = f"{field.metadata['help']} ({field.default!r})"
        name = "--" + field.name.replace("_", "-")
        parser.add_argument(name, default=argparse.SUPPRESS, help=help, **kind)
    return configure(**(vars(parser.parse_args(argv)) | settings))


def main(argv=None, settings=None, **parts):
    """Run the command line, with settings that win and parts for `train`; the exit status."""
    if WORLD > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        # Scores are gathered on the CPU, gradients on the GPU.
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    config = None
    try:
        config = parse(argv, **(settings or {}))
        train(config, **parts)
    except UserError as error:
        print("nft.py:", str(error).replace("\n", " "), file=sys.stderr)
        return 2
    except (Exception, KeyboardInterrupt) as error:
        if config is None:
            raise
        interrupted = isinstance(error, KeyboardInterrupt)
        reason = "interrupted" if interrupted else str(error)
        if not interrupted and not isinstance(error, FloatingPointError):
            traceback.print_exc()
            reason = "failed"
        state = load_checkpoint(config.out)
        saved = f"iteration {state['rows'][-1]['iteration']}" if state else "nothing"
        mend = f"to go on, add --out {shlex.quote(config.out)} --resume to the same command"
        print(f"nft.py: {reason}; {saved} is saved; {mend}", file=sys.stderr)
        return 130 if interrupted else 1
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
