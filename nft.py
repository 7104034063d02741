"""DiffusionNFT in one file: online reinforcement learning of diffusion on the forward process.

Sample images with any solver, score them, and fine-tune with a supervised loss that contrasts an
implicit positive and an implicit negative policy: no likelihoods, no trajectories, no guidance.
Numbers of equations, sections and lines are those of the paper, arXiv 2509.16117. "Departs" marks
where the code differs from it; README.md lists these places.

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
import contextlib
import dataclasses
import functools
import importlib.util
import inspect
import io
import json
import math
import os
import random
import re
import sys
import textwrap
import time
import traceback
import zipfile
from collections import namedtuple
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves, tree_map
from tqdm import tqdm

# Under torchrun each process samples, scores and trains its share of the images.
RANK = int(os.environ.get("RANK", "0"))
WORLD = int(os.environ.get("WORLD_SIZE", "1"))


class UserError(Exception):
    """A flag, file, reward or run is at fault: one line with the value, the rule and the mend."""

    status = 2  # of the command: 1 once training has begun, 130 where it was interrupted


def reason(error):
    """An exception in one line: its type, its text, and the user's own FILE:LINE."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return text
    if len(text) > 400:
        # Libraries are plain at the start or at the end, seldom in between.
        text = f"{text[:150]} ... {text[-250:]}"
    kind = type(error).__name__
    text = f"{kind}: {text}" if text else kind
    # This file, and Python's own.
    others = (reason.__code__.co_filename, os.path.dirname(os.__file__), "<")
    # site-packages, or dist-packages.
    installed = f"-packages{os.sep}"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(others) and installed not in frame.filename:
            return f"{text} at {frame.filename}:{frame.lineno}"
    return text


@contextlib.contextmanager
def blame(rule, mend="correct it"):
    """Around a call into other people's code or files: where it fails, UserError with `rule`."""
    try:
        yield
    except (Exception, SystemExit) as error:
        raise UserError(f"{rule} ({reason(error)}); {mend}") from error


# ---- Config ------------------------------------------------------------------------------------
def flag(default, help, low=None, high=math.inf, choices=None):
    """A field of Config that is also a command-line flag. A number lies in [low, high)."""
    metadata = {"help": help, "low": low, "high": high, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class Config:
    """Every setting. As a library, `reward` may be a function or a dict {name: function}, too."""

    model: str = flag("tiny", "tiny, tiny-sd3, sd15, sdxl, sd3, flux, a directory or a hub id")
    reward: str = flag("aesthetic", "NAME, NAME=W,NAME=W, FILE.py:FUNCTION or package:FUNCTION")
    watch: str = flag("", "same form as --reward: logged at evaluation, never trained on")
    prompts: str = flag("", ".txt (one a line) or .jsonl (`prompt`, metadata); empty: animals")
    eval_prompts: str = flag("", "held-out prompts; empty: a tenth of --prompts, at most 64")
    out: str = flag("", "run directory; empty: a new one under runs/")
    resume: bool = flag(False, "go on with the run in --out")
    iterations: int = flag(100, "iterations i of Algorithm 1", low=1)
    groups: int = flag(16, "prompts an iteration", low=1)
    group_size: int = flag(12, "images a prompt, K", low=2)
    batch_size: int = flag(4, "images in one forward pass: memory and speed", low=1)
    updates: int = flag(1, "optimizer steps an iteration: each takes its part of the images", low=1)
    train_times: int = flag(2, "noise levels t an image, at most those of the sampler", low=1)
    lr: float = flag(3e-4, "learning rate of AdamW", low=1e-9)
    warmup: int = flag(10, "optimizer steps over which the learning rate rises", low=0)
    beta: float = flag(1.0, "beta of Eq. (5): smaller is faster and less stable", low=1e-9)
    kl: float = flag(1e-4, "weight of the squared distance to the base model's output", low=0)
    eta: str = flag("0,0.001,0.5", "soft update eta_i: a constant, or START,SLOPE,MAX")
    z: float = flag(5.0, "Z_c = z * std of the rewards: smaller spreads r more", low=1e-9)
    ema: float = flag(0.9, "decay of the average of theta that is evaluated, saved", low=0, high=1)
    rank: int = flag(32, "LoRA rank; alpha is twice the rank", low=1, high=4097)
    solver: str = flag("", "dpm2, euler ... or a class of diffusers; empty: the pipeline's own")
    steps: int = flag(10, "sampling steps of the rollouts", low=1)
    eval_steps: int = flag(0, "of evaluation, whose times are trained; 0: as --steps", low=0)
    guidance: float = flag(1.0, "guidance scale of the rollout; 1 is none, as in the paper", low=1)
    resolution: int = flag(0, "height and width in pixels; 0: the pipeline's own", low=0)
    max_sequence_length: int = flag(0, "text tokens, if a pipeline takes it; 0: its own", low=0)
    precision: str = flag("auto", "of the frozen base", choices=("auto", "fp32", "bf16", "fp16"))
    checkpointing: bool = flag(False, "recompute activations: less memory, slower")
    device: str = flag("auto", "auto, cpu, cuda, cuda:1 ...")
    seed: int = flag(0, "fixes prompts, noise and the adapter's start")
    eval_every: int = flag(10, "iterations between evaluations, from iteration 0 on", low=1)
    save_every: int = flag(1, "iterations between saves: what a failure can lose", low=1)


FIELDS = {field.name: field for field in dataclasses.fields(Config)}
FLAGS = {name: "--" + name.replace("_", "-") for name in FIELDS}
# The first flag of each group in --help.
GROUPS = {"model": "model, reward and prompts", "out": "run", "iterations": "Algorithm 1"}
GROUPS |= {"rank": "adapter and sampler", "precision": "hardware", "seed": "the rest"}

TINY = dict(reward="examples/tiny/shapes.py:reward", prompts="examples/tiny/train.txt")
TINY |= dict(eval_prompts="examples/tiny/heldout.txt", solver="dpm2", batch_size=96, updates=4)
# Departs from section 4: rollouts are coarser than evaluation. Clean pictures are learned from
# rough ones.
QUICK = dict(iterations=11, steps=5, eval_steps=10, eval_every=6)
QUICK |= dict(lr=2e-3, warmup=4, beta=0.3, kl=0.1, z=1.5, ema=0.8)
TINY_SD3 = dict(iterations=40, train_times=9, eval_every=10, max_sequence_length=2)
TINY_SD3 |= dict(lr=3e-3, warmup=4, kl=0.03, z=1.5, ema=0.95)
PRESETS = {  # defaults that a model replaces; a flag always wins
    "tiny": TINY | QUICK,
    "tiny-sd3": TINY | TINY_SD3,
    "sd15": dict(kl=0.1, solver="dpm2"),
    "sdxl": dict(kl=0.1, solver="dpm2"),
    "sd3": dict(resolution=512, solver="dpm2"),
    # Departs from section 4, which has no guidance: to this distilled model it is an input.
    "flux": dict(resolution=512, guidance=3.5),
}
MODELS = dict(sdxl="stabilityai/stable-diffusion-xl-base-1.0", flux="black-forest-labs/FLUX.1-dev")
MODELS |= {"sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5", "tiny": "examples/tiny/sd15"}
MODELS |= {"sd3": "stabilityai/stable-diffusion-3.5-medium", "tiny-sd3": "examples/tiny/sd3"}


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

    raw: (B,) finite rewards of any unit. groups: (B,) integers, equal for images of one prompt.
    Z_c = z * (population std of all B rewards + 1e-4). Raises ValueError where one is not finite.
    """
    # In double precision equal rewards have their own mean to the last digit: r is exactly 1/2.
    raw = torch.as_tensor(raw, dtype=torch.float64)
    groups = torch.as_tensor(groups, device=raw.device)
    if not raw.isfinite().all():
        raise ValueError("a reward is not finite")
    # Line 4's mean over the images of one prompt.
    mean = torch.stack([raw[groups == group].mean() for group in groups])
    # Departs from section 3.3, as the released code: Z_c is the spread of the whole iteration.
    Z_c = z * (raw.std(correction=0) + 1e-4)
    # Lines 4 and 5: the reward less this mean, over Z_c, clipped, moved into [0, 1].
    return (0.5 + 0.5 * ((raw - mean) / Z_c).clamp(-1, 1)).float()


def adaptive_loss(x0_hat, x_0):
    """||x0_hat - x_0||^2 / sg(mean |x0_hat - x_0|), section 3.3, for Eq. (1)'s w(t): -> (B,).

    ||.||^2 is a mean over elements.
    """
    error = (x0_hat - x_0).flatten(1)
    return error.square().mean(1) / error.detach().abs().mean(1).clamp_min(1e-5)


def nft_loss(x0_theta, x0_old, x_0, r, beta, distance=adaptive_loss):
    """The DiffusionNFT loss of each sample, Eq. (5), in the space of clean samples: (B,).

    x0_theta, x0_old: (B, ...), predicted from the same (x_t, t) by the trained and the old policy;
    no gradient flows into the latter. x_0: (B, ...), the sampled images. r: (B,), in [0, 1].
    beta: a number, the same for all samples.

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
    min(max(SLOPE (i - START), 0), MAX): in the paper's OCR run 75,0.0075,0.999. Else ValueError.
    """
    numbers = [float(number) for number in str(schedule).split(",")]
    if len(numbers) == 1 and 0 <= numbers[0] <= 1:
        return numbers[0]
    if len(numbers) == 3:
        start, slope, maximum = numbers
        if math.isfinite(start) and 0 <= slope < math.inf and 0 <= maximum <= 1:
            return min(max(slope * (i - start), 0.0), maximum)
    raise ValueError(f"eta {schedule}: must be a constant in [0, 1], or START,SLOPE,MAX")


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
        start = []
        noise = generator(seed, "lora")
        for name, layer in net.named_modules():
            if isinstance(layer, torch.nn.Linear) and TARGETS.search(name):
                # peft's "gaussian" start, and B = 0: theta = old = base, as before line 1.
                A = torch.randn(rank, layer.in_features, generator=noise) / rank
                start += [A, torch.zeros(layer.out_features, rank)]
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
        A, B = self.adapters[self.active][2 * i : 2 * i + 2]
        return out + F.linear(F.linear(args[0], A.to(out.dtype)), SCALE * B.to(out.dtype))

    @torch.no_grad()
    def average(self, name, decay):
        """adapter <- decay * adapter + (1 - decay) * theta: line 14 for "old", and the EMA."""
        for x, theta in zip(self.adapters[name], self.adapters["theta"], strict=True):
            x.copy_(decay * x + (1 - decay) * theta)


# ---- Mixed precision ---------------------------------------------------------------------------
# In half precision: the frozen base (denoiser, text encoders, VAE) and all that flows through it;
# bf16 where the GPU has it, else fp16 (a VAE that overflows there is found by `sample`).
# In fp32: the adapters (cast where a layer uses them), their gradients, AdamW; x_0, x_t, and the
# denoiser's outputs from `predict` on; the loss, r, and what rewards return.
# fp16 has no gradients below 6e-8. So the GradScaler multiplies the loss before backward(), divides
# the gradients before they are clipped, and makes no step where one overflowed (`gradient_step`).
def pick_device(config):
    """The device of --device, and the dtype of the frozen base. Raises UserError."""
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    with blame(f"--device {config.device}: must be usable here", "try auto"):
        device = torch.empty(0, device=config.device.replace("auto", automatic)).device
    precision = config.precision
    if precision == "auto" and device.type == "cuda":
        # T4 and V100 only emulate bf16.
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if native else "fp16"
    return device, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)


# ---- The pipeline: sampler, denoiser and forward process ---------------------------------------
SOLVERS = dict(ddim="DDIM", ddpm="DDPM", euler="EulerDiscrete", heun="HeunDiscrete", lcm="LCM")
SOLVERS |= {"euler-a": "EulerAncestralDiscrete", "unipc": "UniPCMultistep"}
SOLVERS |= {"dpm2": "DPMSolverMultistep", "dpm2-sde": "DPMSolverMultistep"}


def locate(path):
    """A path as it is; examples/... else beside nft.py, so that presets work from anywhere."""
    beside = Path(__file__).resolve().parent / path
    if os.path.exists(path) or not path.startswith("examples/"):
        return path
    if not beside.exists():
        mend = "check the name"
        if not beside.parent.exists():
            mend = "clone the repository, or give --model and --reward of your own"
        raise UserError(f"{path}: must lie beside nft.py; {mend}")
    return str(beside)


def map_tensors(f, *trees):
    """Apply f to the tensors of nested dicts, lists and tuples of equal form; other leaves stay."""
    return tree_map(lambda x, *others: f(x, *others) if torch.is_tensor(x) else x, *trees)


def load_pipeline(config, dtype):
    """The pipeline of --model, and the options that it was loaded with: without its safety checker,
    which would black images out. Raises UserError."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    path = locate(MODELS.get(config.model, config.model))
    known = ", ".join(PRESETS)
    rule = f"--model {config.model}: must be {known}, a directory, or a hub id in reach"
    mend = "check the name, and for a hub id the network"
    if os.path.isfile(path):
        mend = "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(DIR) converts it"
    with blame(rule, mend):
        index = diffusers.DiffusionPipeline.load_config(path)
        # Components that were saved as missing, such as SD3's T5, must be named.
        off = {name: None for name, kind in index.items() if kind == [None, None]}
        off |= dict(safety_checker=None, feature_extractor=None, add_watermarker=False)
        weights = [file.name for file in Path(path).glob("*/*.safetensors")]
        if weights and all(".fp16." in name for name in weights):
            off["variant"] = "fp16"
        pipe = diffusers.DiffusionPipeline.from_pretrained(path, dtype=dtype, **off)
    pipe.set_progress_bar_config(disable=True)
    return pipe, off


def is_flow(scheduler):
    """Is it the scheduler of a rectified flow?"""
    named = scheduler.config.get("prediction_type") == "flow_prediction"
    return named or "FlowMatch" in type(scheduler).__name__


def pick_solver(name, scheduler):
    """A scheduler of diffusers by short or class name, with the forward process of `scheduler`."""
    import diffusers

    kind = SOLVERS.get(name, name.removesuffix("Scheduler")) + "Scheduler"
    solver = getattr(diffusers, kind, None)
    needed = "beta_schedule"
    options = {"clip_sample": False}
    if name in ("dpm2", "dpm2-sde"):
        options["algorithm_type"] = "dpmsolver++" if name == "dpm2" else "sde-dpmsolver++"
    if is_flow(scheduler):
        solver = getattr(diffusers, f"FlowMatch{kind}", solver)
        needed = "shift" if "FlowMatch" in str(solver) else "use_flow_sigmas"
        shift = scheduler.config.get("shift", scheduler.config.get("flow_shift", 1.0))
        options |= dict(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift)
    known = inspect.signature(solver).parameters if hasattr(solver, "set_timesteps") else ()
    if needed not in known:
        rule = f"must be of {', '.join(SOLVERS)} or a scheduler of diffusers that takes {needed}"
        raise UserError(f"--solver {name}: {rule}; leave it out")
    return solver.from_config(scheduler.config, **{k: options[k] for k in options if k in known})


def solver_level(scheduler, t):
    """alpha_t, sigma_t (2, 1) of what the denoiser is given at a step, as the solver has them."""
    # Row 0 has x_0 = 1 and eps = 0, row 1 the reverse: so x_t is [alpha_t, sigma_t].
    x_0 = torch.tensor([[1.0], [0.0]])
    if hasattr(scheduler, "scale_noise"):
        x_t = scheduler.scale_noise(x_0, t.reshape(1).cpu(), 1 - x_0)
    else:
        x_t = scheduler.add_noise(x_0, 1 - x_0, t.reshape(1).cpu())
    if hasattr(scheduler, "scale_model_input"):
        x_t = scheduler.scale_model_input(x_t, t)
    return x_t


# What `sample` hears. Call, of each call of the denoiser: t, its other arguments, its output. Step,
# of each step of the solver: t, the output that it is given (with guidance the guided one), the
# next x_t, and (alpha_t, sigma_t).
Call = namedtuple("Call", "t arguments out")
Step = namedtuple("Step", "t out sample level")


class Model:
    """A text-to-image pipeline as a black box: a sampler, a denoiser, a forward process."""

    def __init__(self, config):
        self.config = config
        self.device, self.dtype = pick_device(config)
        self.pipe, self.options = load_pipeline(config, self.dtype)
        self.pipe.to(self.device)
        self.component = "unet" if hasattr(self.pipe, "unet") else "transformer"
        self.net = getattr(self.pipe, self.component, None)
        scheduler = self.pipe.scheduler
        flow = is_flow(scheduler)
        self.prediction = "flow_prediction" if flow else scheduler.config.get("prediction_type")
        discrete = hasattr(scheduler, "alphas_cumprod")
        known = flow or (discrete and self.prediction in ("epsilon", "v_prediction"))
        if self.net is None or not known:
            self.refuse("must have one denoiser, unet or transformer, of flow, epsilon or v")
        self.alphas_cumprod = None if flow else scheduler.alphas_cumprod.to(self.device)
        self.signature = inspect.signature(self.net.forward)
        # The argument that takes x_t: "sample" or "hidden_states".
        self.input = next(iter(self.signature.parameters))
        self.T = scheduler.config.num_train_timesteps
        if config.solver:
            self.pipe.scheduler = pick_solver(config.solver, scheduler)
        self.eval_steps = config.eval_steps or config.steps
        self.settings = {"guidance_scale": config.guidance}
        if config.resolution:
            self.settings |= dict(height=config.resolution, width=config.resolution)
        if config.max_sequence_length:
            self.settings["max_sequence_length"] = config.max_sequence_length
        # What `sample` hears of the denoiser and of the solver.
        self.calls, self.steps = [], []
        # The denoiser's arguments without a row an image: see `probe`.
        self.shared = {}
        self.lora = LoRA(self.net, config.rank, config.seed)
        if not self.lora.layers:
            self.refuse("must have attention projections in its denoiser")
        self.probe()
        if config.checkpointing:
            self.net.enable_gradient_checkpointing()

    def refuse(self, rule):
        """Raise the UserError that this pipeline is none for us."""
        raise UserError(f"--model {self.config.model}: {rule}; take another text-to-image pipeline")

    @torch.no_grad()
    def sample(self, prompts, keys, policy):
        """The pipeline's own picture of each prompt, from the noise of its key; `policy` "old" in
        --steps, others in --eval-steps. Returns x_0: latents (B, ...), fp32; images: (B, 3, H, W)
        in [0, 1]; condition: the denoiser's arguments with a row an image."""
        generators = [generator(*key) for key in keys]
        steps = self.config.steps if policy == "old" else self.eval_steps
        settings = self.settings | {"generator": generators, "num_inference_steps": steps}
        solver_step = self.pipe.scheduler.step
        draws = "generator" in inspect.signature(solver_step).parameters
        self.calls, self.steps = [], []

        def hear_denoiser(net, args, kwargs, out):
            given = dict(self.signature.bind(*args, **kwargs).arguments)
            channels = given.pop(self.input).shape[1]
            t = torch.as_tensor(given.pop("timestep")).flatten()[:1].cpu()
            # A learned variance would come after the sample's channels.
            self.calls.append(Call(t, given, out[0][:, :channels]))

        @functools.wraps(solver_step)  # pipelines look at its signature
        def hear_solver(out, t, *args, **kwargs):
            if draws:
                # SD3 and FLUX do not hand their generators on.
                kwargs.setdefault("generator", generators)
            level = solver_level(self.pipe.scheduler, t)
            result = solver_step(out, t, *args, **kwargs)
            self.steps.append(Step(float(t), out, result[0], level))
            return result

        self.lora.active = policy
        hook = self.net.register_forward_hook(hear_denoiser, with_kwargs=True)
        self.pipe.scheduler.step = hear_solver
        try:
            images = self.pipe(list(prompts), output_type="pt", **settings).images
        finally:
            del self.pipe.scheduler.step
            hook.remove()
            self.lora.active = None
        x_0 = self.steps[-1].sample.float()
        if not (x_0.isfinite().all() and images.isfinite().all()):
            raise UserError("a sample is not finite; try --precision bf16, or a smaller --lr")
        arguments = {k: v for k, v in self.calls[0].arguments.items() if k not in self.shared}
        # With guidance the batch is [unconditional, conditional]: we train the latter.
        condition = map_tensors(lambda x: x[-len(prompts) :], arguments)
        return {"x_0": x_0, "images": images.float().clamp(0, 1), "condition": condition}

    def probe(self):
        """Sample, and set self.times (S,), those of evaluation in the denoiser's unit;
        self.time_scale, this unit over the solver's; self.shared. Raises UserError."""
        from diffusers.utils import logging

        names = ("model", "solver", "steps", "eval_steps", "guidance", "resolution")
        flags = ", ".join(f"{FLAGS[name]} {getattr(self.config, name)}" for name in names)
        # Of settings that it does not take the pipeline warns once.
        logging.set_verbosity_warning()
        with blame(f"{flags}: must fit each other, and text to image", "change one of them"):
            _, *shape = self.sample([""], [("probe",)], policy=None)["images"].shape
            logging.set_verbosity_error()
            empty = self.calls[0].arguments
            self.sample([9 * "word "], [("probe",)], policy=None)
        size = self.config.resolution
        if shape != [3, size or shape[1], size or shape[2]]:
            self.refuse(f"must paint red, green, blue of --resolution {size}, not {shape}")
        times = torch.cat([call.t for call in self.calls])
        self.times = times.unique()
        self.time_scale = times[0].item() / (self.steps[0].t or 1)
        self.find_shared()
        self.check_lengths(empty)
        with blame(f"{flags}: times must be those of the model's training", "change one"):
            # A pipeline may call its denoiser several times a step.
            levels = self.noise_level(times[:: len(times) // len(self.steps)])
        self.check_solver(torch.stack(levels).cpu())

    def find_shared(self):
        """Set self.shared, the denoiser's arguments without a row an image."""
        first = self.calls[0]
        for name, value in first.arguments.items():
            tensors = filter(torch.is_tensor, tree_leaves(value))
            rows = [x.shape[:1] == first.out.shape[:1] for x in tensors]
            if any(rows) and not all(rows):
                self.refuse(f"its denoiser's {name} must have a row an image throughout")
            if not all(rows):
                self.shared[name] = map_tensors(torch.clone, value)

    def check_lengths(self, empty):
        """Refuse a denoiser whose arguments, `empty` those of an empty prompt, differ in form."""
        given = self.calls[0].arguments
        # Some pipelines pad to the longest prompt of a batch: their batches cannot be joined.
        if map_tensors(lambda x: x.shape, empty) != map_tensors(lambda x: x.shape, given):
            self.refuse("must give its denoiser as much of a short prompt as of a long one")

    def check_solver(self, levels):
        """Refuse a solver of other calls, signs or noise levels than (alpha_t, sigma_t) (2, S)."""
        if self.config.guidance > 1 and len(self.calls) != len(self.steps):
            self.refuse("must guide in one call of its denoiser a step")
        if levels.shape[1] != len(self.steps):
            self.refuse("must call its denoiser equally often in each step")
        # Some negate its output, which predict_x0 would take for the other velocity. The last row
        # is, with guidance, the conditional one.
        if (self.calls[-1].out[-1].float() * self.steps[-1].out[-1].float()).sum() <= 0:
            self.refuse("its solver must be given the denoiser's output with its own sign")
        theirs = torch.cat([step.level for step in self.steps], 1)
        # "not <" refuses NaN, too.
        if not (levels - theirs).abs().max() < 0.02:
            self.refuse("its solver must visit the noise levels that its times stand for")

    def text_encoders(self):
        """(name, tokenizer, number of tokens that it is given of a prompt) of each text encoder."""
        known = inspect.signature(self.pipe.__call__).parameters
        for name, encoder in self.pipe.components.items():
            tokenizer = getattr(self.pipe, name.replace("text_encoder", "tokenizer"), None)
            if name.startswith("text_encoder") and None not in (encoder, tokenizer):
                limit = tokenizer.model_max_length
                if "max_sequence_length" in known and "CLIP" not in type(encoder).__name__:
                    limit = self.config.max_sequence_length or known["max_sequence_length"].default
                yield name, tokenizer, limit

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
Reward = namedtuple("Reward", "name weight function")


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


BUILT_IN = {"aesthetic": aesthetic, "jpeg": jpeg}


def load_module(path, modules):
    """Import FILE.py or package.module of a reward; modules: {file: module} of the run so far."""
    file = Path(locate(path)).resolve()
    # What it imports lies beside it, a package where we are; `train` gives the path back.
    sys.path.insert(0, str(file.parent))
    if not path.endswith(".py"):
        return importlib.import_module(path)
    if file not in modules:
        for beside in file.parent.glob("*.py"):
            # A file of this name beside another reward may have been imported.
            loaded = getattr(sys.modules.get(beside.stem), "__file__", str(beside))
            if loaded != str(beside) and beside.stem not in {*sys.stdlib_module_names, __name__}:
                del sys.modules[beside.stem]
        name = f"nft_{file.stem}" if file.stem in sys.stdlib_module_names else file.stem
        spec = importlib.util.spec_from_file_location(name, file)
        modules[file] = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(modules[file])
    return modules[file]


def load_rewards(spec, flag, modules=None):
    """ "NAME=W,FILE.py:FUNCTION", a function or a dict of these -> [Reward]. Raises UserError."""
    modules = {} if modules is None else modules
    if callable(spec):
        spec = {getattr(spec, "__name__", "reward"): spec}
    rewards = []
    parts = []
    if isinstance(spec, dict):
        rewards = [Reward(name, 1.0, function) for name, function in spec.items()]
    else:
        parts = [part.strip() for part in spec.split(",") if part.strip()]
    for part in parts:
        label, _, weight = part.partition("=")
        if label.endswith(".py"):
            raise UserError(f"{flag} {part}: must name a function; write {label}:FUNCTION")
        source = label if ":" in label else f"examples/rewards/{label}.py:reward"
        path, _, name = source.rpartition(":")
        with blame(f"{flag} {part}: must have a finite number after =", "give one, or neither"):
            if not math.isfinite(float(weight or 1)):
                raise ValueError(f"{weight} is not finite")
        rule = f"{flag} {part}: must be a reward that loads"
        with blame(rule, "mend it, or take another NAME, FILE.py:FUNCTION or package:FUNCTION"):
            function = BUILT_IN.get(label) or getattr(load_module(path, modules), name)
            # A factory: it loads a model, and returns the reward.
            if not inspect.signature(function).parameters:
                function = function()
        stem = Path(path).name.removesuffix(".py")
        # FILE:FUNCTION by its short name, unless two files share it.
        if ":" in label and [file.stem for file in modules].count(stem) < 2:
            label = f"{stem}:{name}"
        rewards.append(Reward(label, float(weight or 1), function))
    if not rewards and flag == "--reward":
        raise UserError("--reward: must name one; try jpeg")
    return rewards


@torch.no_grad()
def score(rewards, images, prompts, metadata):
    """{"reward": r_raw, their weighted sum, "reward/NAME": ...}, each (B,) in fp32 on the CPU."""
    total = torch.zeros(len(images))
    scores = {"reward": total}
    for name, weight, function in rewards:
        rule = f"reward {name}: must return one finite number an image"
        with blame(rule):
            result = function(images.clone(), list(prompts), [dict(m) for m in metadata])
            result = result[0] if isinstance(result, tuple) else result
            part = torch.as_tensor(result, dtype=torch.float32).cpu()
        if part.shape != total.shape:
            raise UserError(f"{rule}, not {tuple(part.shape)} of {len(images)}; correct it")
        for value, prompt in zip((weight * part).tolist(), prompts, strict=True):
            if not math.isfinite(value):
                raise UserError(f"{rule}, not {value} for {prompt!r}; correct it")
        scores[f"reward/{name}"] = part
        total += weight * part
    return scores


# ---- Prompts and pictures ----------------------------------------------------------------------
ANIMALS = ["cat", "dog", "horse", "owl", "fox", "rabbit", "bear", "duck", "tiger", "camel"]
PLACES = ["in a forest", "on a beach", "in the snow", "in a meadow", "at sunset", "by a lake"]


def load_prompts(path, flag):
    """.txt (one a line) or .jsonl ({"prompt": ..., metadata}) -> [(prompt, metadata)]."""
    rule = f"{flag} {path}: must be a .txt of a prompt a line, or a .jsonl of an object a line"
    file = Path(locate(path))
    with blame(rule, "give such a file, in UTF-8"):
        # A link may have no suffix, and its file one.
        kind = (file.suffix or file.resolve().suffix).lower()
        text = file.read_text("utf-8-sig")
    like_json = text.lstrip().startswith(('{"', "[{", '["'))
    if kind not in (".txt", ".jsonl") or (kind == ".txt" and like_json):
        raise UserError(f'{rule}; convert it to {{"prompt": "...", other keys}} a line')
    prompts = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        row = {"prompt": line}
        with blame(f"{rule}; line {number}", 'write {"prompt": "...", other keys}'):
            if kind == ".jsonl":
                row = json.loads(line)
            prompt = row.pop("prompt").strip()
            # Lone surrogates of JSON are no text.
            prompt.encode()
            if not prompt:
                raise ValueError("it is empty")
        prompts.append((prompt, row))
    if not prompts:
        raise UserError(f"{rule}, and not empty; give some")
    return prompts


def load_prompt_sets(config):
    """The prompts to train on and those to evaluate on: two lists of (prompt, metadata)."""
    prompts = [(f"a photo of a {x} {y}", {}) for x in ANIMALS for y in PLACES]
    if config.prompts:
        prompts = load_prompts(config.prompts, "--prompts")
    if config.eval_prompts:
        held_out = load_prompts(config.eval_prompts, "--eval-prompts")
    else:
        # By their place among the distinct ones, so that a mended line changes no other.
        distinct = dict(prompts)
        chosen = random.Random(config.seed).sample(list(distinct), min(64, len(distinct) // 10))
        held_out = [(prompt, distinct[prompt]) for prompt in chosen] or prompts
        prompts = [pair for pair in prompts if pair[0] not in chosen]
    if len(held_out) < WORLD:
        raise UserError(f"--eval-prompts: must be {WORLD} or more, one a process; give more")
    return prompts, held_out


def draw_prompts(prompts, iteration, config):
    """The next `groups` prompts of a deck that is shuffled anew each time it is used up."""
    n = len(prompts)
    first = (iteration - 1) * config.groups
    drawn = []
    for deck in range(first // n, (first + config.groups - 1) // n + 1):
        drawn += random.Random(f"{config.seed} {deck}").sample(prompts, n)
    return drawn[first % n : first % n + config.groups]


def laplacian(images):
    """Mean absolute Laplacian of each image (B, 3, H, W): rises with speckle, falls with blur."""
    kernel = images.new_tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]]).expand(3, 1, 3, 3)
    return F.conv2d(images, kernel, groups=3).abs().mean((1, 2, 3)).cpu()


def picture_grid(images, captions):
    """A picture of images (N, 3, H, W), 96 or 256 pixels high and eight a row, over captions."""
    from PIL import Image, ImageDraw

    height = 96 if images.shape[2] < 96 else 256
    width = height * images.shape[3] // images.shape[2]
    size = ((width + 12) * 8, (height + 62) * math.ceil(len(images) / 8))
    sheet = Image.new("RGB", size, "lightgray")
    for n, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x = n % 8 * (width + 12) + 6
        y = n // 8 * (height + 62) + 4
        sheet.paste(to_pil(image).resize((width, height), Image.Resampling.BOX), (x, y))
        # PIL's own font has Latin letters alone; README.md of the run lists the prompts.
        text = caption.encode("latin-1", "replace").decode("latin-1")
        text = textwrap.fill(text, width // 6, max_lines=4, placeholder=" ...")
        ImageDraw.Draw(sheet).text((x, y + height + 2), text, fill="black")
    return sheet


# ---- Processes, and the run directory ----------------------------------------------------------
SHOWN = 16  # images in a grid
# For tqdm: True hides a bar, None hides it where there is no terminal.
HIDDEN = True if RANK > 0 else None


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
        encoding = sys.stdout.encoding or "utf-8"
        tqdm.write(text.encode(encoding, "replace").decode(encoding))


def say_cut(who, tokenizer, limit, prompts):
    """Say how many prompts have more tokens than `who` takes: it does not see what follows."""
    lengths = [len(tokens) for tokens in tokenizer(prompts).input_ids]
    cut = sum(length > limit for length in lengths)
    if cut:
        say(f"{cut} of {len(prompts)} prompts are cut: {who} takes {limit} tokens")


def write_file(path, write):
    """Let write(file) write a binary file, then rename it: whoever reads `path` finds it whole."""
    if RANK == 0:
        with open(f"{path}.tmp", "wb") as file:
            write(file)
        os.replace(f"{path}.tmp", path)


def write_text(path, text):
    """As `write_file`, of a text."""
    write_file(path, lambda file: file.write(text.encode()))


# The state of a run. rows: those of metrics.jsonl, the first the base model's. inputs: its
# prompts, and the text of its rewards' files.
Run = namedtuple("Run", "config model optimizer scaler inputs rows dir")


def open_run(config, model, rewards, prompts):
    """Claim --out, for a new run or for the one to resume. Raises UserError."""
    trained, held_out = prompts
    inputs = {"prompts": [json.dumps(row) for row in trained + held_out]}
    for reward in rewards:
        with contextlib.suppress(TypeError, OSError):  # not of a file
            inputs[f"reward {reward.name}"] = inspect.getsource(inspect.getmodule(reward.function))
    theta = model.lora.adapters["theta"]
    optimizer = torch.optim.AdamW(theta, betas=(0.9, 0.999), weight_decay=1e-4)
    scaler = torch.amp.GradScaler(model.device.type, enabled=model.dtype == torch.float16)
    # It has a scale from its first use on, and a process may have no pair in a step.
    scaler.scale(torch.zeros((), device=model.device))
    run = Run(config, model, optimizer, scaler, inputs, [], Path(config.out))
    if config.resume and os.path.exists(run.dir / "checkpoint.pt"):
        restore(run, run.dir / "checkpoint.pt")
    elif not config.resume and RANK == 0 and os.path.exists(run.dir / "config.json"):
        raise UserError(f"--out {run.dir}: holds a run; add --resume, or take another one")
    with blame(f"--out {run.dir}: must be a directory to write to", "take another one"):
        (run.dir / "samples").mkdir(parents=True, exist_ok=True)
        write_text(run.dir / "config.json", json.dumps(vars(config), indent=1, default=str))
    write_card(run, held_out)
    distinct = list(dict(trained + held_out))
    both = dict(trained).keys() & dict(held_out).keys()
    warning = f"; {len(both)} of these are trained on, so they are not held out" if both else ""
    say(f"{len(trained)} prompts to train on, {len(held_out)} to evaluate on{warning}")
    for name, tokenizer, limit in model.text_encoders():
        say_cut(f"the pipeline's {name}", tokenizer, limit, distinct)
    return run


def restore(run, file):
    """Go on from a checkpoint, none of which is executed. UserError where it does not fit."""
    with blame(f"--out {run.dir}: its {file.name} must be whole and of this run", "begin anew"):
        if zipfile.ZipFile(file).testzip():
            raise ValueError("its checksums differ")
        state = torch.load(file, map_location="cpu", weights_only=True)
        own = run.model.lora.adapters
        map_tensors(lambda x, y: x.data.copy_(y.view(x.shape)), own, state["lora"])
        run.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:
            run.scaler.load_state_dict(state["scaler"])
        run.rows.extend(state["rows"])
        before = state["inputs"]
    # Mended lines may go on, another file may not.
    old, new = before["prompts"], run.inputs["prompts"]
    changed = sum(x != y for x, y in zip(old, new, strict=False))
    if len(old) != len(new) or 2 * changed > len(old):
        files = f"--prompts {run.config.prompts} or --eval-prompts {run.config.eval_prompts}"
        raise UserError(f"{files}: must be as when the run began; bring them back")
    for name in run.inputs.keys() & before.keys():
        if run.inputs[name] != before[name]:
            say(f"{name}: edited since the run began")
    done = len(run.rows) - 1
    if done > run.config.iterations:
        raise UserError(f"--iterations {run.config.iterations}: {done} are done; give more")


def solver_patch(pipe):
    """Code for a card: it hands the noise on to a random solver, as `sample` does."""
    draws = "generator" in inspect.signature(pipe.scheduler.step).parameters
    if not draws or hasattr(pipe, "prepare_extra_step_kwargs"):
        # The solver draws nothing, or the pipeline itself hands it on.
        return ""
    return """step = pipe.scheduler.step
pipe.scheduler.step = lambda *args, **more: step(*args, generator=noise, **more)
"""


def write_card(run, held_out):
    """DIR/README.md, whose code paints the first held-out prompt, and DIR/scheduler/."""
    config, model, pipe = run.config, run.model, run.model.pipe
    base = MODELS.get(config.model, config.model)
    settings = model.settings | {"num_inference_steps": model.eval_steps}
    known = inspect.signature(type(pipe).__init__).parameters
    options = {k: x for k, x in model.options.items() if k == "variant" or k in known}
    shown = "\n".join(f"{n}. {prompt}" for n, (prompt, _) in enumerate(held_out[:SHOWN], 1))
    text = f"""---
base_model: {base}
library_name: diffusers
pipeline_tag: text-to-image
tags: [text-to-image, lora, diffusion-nft]
---
# {base} after DiffusionNFT

A LoRA, trained on the reward {config.reward} by DiffusionNFT, arXiv 2509.16117. Sample it at the
guidance and by the solver of its training. This paints the first prompt below; it needs peft.

```python
import diffusers
import torch

options = {options}
pipe = diffusers.DiffusionPipeline.from_pretrained({locate(base)!r}, dtype={model.dtype}, **options)
pipe.to({str(model.device)!r})
pipe.load_lora_weights({str(run.dir)!r})
solver = diffusers.{type(pipe.scheduler).__name__}
pipe.scheduler = solver.from_pretrained({str(run.dir)!r}, subfolder="scheduler")
noise = torch.Generator().manual_seed({generator("evaluation", 0).initial_seed()})
{solver_patch(pipe)}image = pipe({held_out[0][0]!r}, generator=noise, **{settings}).images[0]
```

Held-out prompts before and after training, from the same noise; in brackets the reward:

![](before_after.png)

{shown}
"""
    write_text(run.dir / "README.md", text)
    if RANK == 0:
        pipe.scheduler.save_pretrained(run.dir / "scheduler")


def save(run):
    """Write metrics.jsonl, the EMA of theta for pipe.load_lora_weights(DIR), and the checkpoint."""
    import safetensors.torch

    write_text(run.dir / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in run.rows))
    lora = run.model.lora
    weights = {}
    for i, name in enumerate(lora.layers):
        A, B = lora.adapters["ema"][2 * i : 2 * i + 2]
        weights[f"{run.model.component}.{name}.lora_A.weight"] = A
        weights[f"{run.model.component}.{name}.lora_B.weight"] = SCALE * B
    data = safetensors.torch.save(weights, {"format": "pt"})
    write_file(run.dir / "pytorch_lora_weights.safetensors", lambda file: file.write(data))
    # All that --resume needs: random draws have keys, and no state.
    state = {"rows": run.rows, "inputs": run.inputs, "lora": lora.adapters}
    state |= {"optimizer": run.optimizer.state_dict(), "scaler": run.scaler.state_dict()}
    # Values alone, for whoever else reads the file.
    state = map_tensors(torch.Tensor.detach, state)
    write_file(run.dir / "checkpoint.pt", lambda file: torch.save(state, file))


# ---- Algorithm 1 -------------------------------------------------------------------------------
def collect(model, rewards, numbered, key, policy):
    """Lines 2 and 3: an image, scored, for each (i, prompt, metadata), from the noise of (*key, i).

    Returns what Model.sample does, but only SHOWN images; prompts; and on the CPU scores
    {"reward": (B,), "reward/NAME": (B,), "laplacian": (B,)}.
    """
    size = model.config.batch_size
    what = "sampling" if policy == "old" else "evaluating"
    batches = []
    for start in tqdm(range(0, len(numbered), size), what, leave=False, disable=HIDDEN):
        numbers, prompts, metadata = zip(*numbered[start : start + size], strict=True)
        batch = model.sample(prompts, [(*key, i) for i in numbers], policy)
        batch["scores"] = score(rewards, batch["images"], prompts, metadata)
        batch["scores"]["laplacian"] = laplacian(batch["images"])
        batch["images"] = batch["images"].cpu()[: max(0, SHOWN - start)]
        batches.append(batch)
    D = map_tensors(lambda *x: torch.cat(x), *batches)
    return D | {"prompts": [prompt for _, prompt, _ in numbered]}


def means(D, prefix=""):
    """Fields of a row, and r_raw (N,), from the scores of all processes."""
    scores = map_tensors(lambda *x: torch.cat(x), *gather(D["scores"]))
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
    row, raw = means(D, "eval_")
    base = run.rows[0] if run.rows else row
    row["eval_roughness"] = row["eval_laplacian"] / max(base["eval_laplacian"], 1e-9)
    summary = f"held-out reward {row['eval_reward']:.3f}"
    if len(rewards) > 1:
        # The parts of a sum, and what is watched.
        for name in dict.fromkeys(reward.name for reward in rewards):
            summary += f", {name} {row[f'eval_reward/{name}']:.3f}"
    say(f"iteration {iteration:4d}   {summary}   roughness {row['eval_roughness']:.2f}")

    # The pictures, and those of the base model above them.
    images = torch.cat(gather(D["images"]))[:SHOWN]
    when = "after" if iteration else "before"
    pairs = zip(raw.tolist(), prompts[: len(images)], strict=False)
    captions = [f"{when} ({value:.3g}): {prompt}" for value, (prompt, _) in pairs]
    grid = picture_grid(images, captions)
    write_file(run.dir / f"samples/{iteration:06d}.png", lambda file: grid.save(file, "PNG"))
    if iteration and RANK == 0:
        before = Image.open(run.dir / "samples/000000.png")
        both = make_image_grid([before, grid], rows=2, cols=1)
        write_file(run.dir / "before_after.png", lambda file: both.save(file, "PNG"))
    return row


def pair_losses(model, D, index, t, eps, loss=nft_loss):
    """Lines 9 to 12 for the b images D[index] at times t (b,), on the CPU, with noise eps: three
    tensors (b,), Eq. (5)'s loss; and as means over elements ||out_theta - out_ref||^2, the KL term,
    and ||out_theta - out_old||^2, which is only logged. `loss` may be any function like nft_loss;
    what depends on t calls model.noise_level(t, eps.ndim) for alpha_t and sigma_t."""
    config = model.config
    x_0 = D["x_0"][index]
    condition = map_tensors(lambda x: x[index], D["condition"])
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
    losses = weight * loss(x0_theta, x0_old, x_0, D["r"][index], config.beta)
    kl = torch.zeros_like(losses)
    if config.kl:
        kl = (out_theta - out_ref).square().flatten(1).mean(1)
    deviation = (out_theta.detach() - out_old).square().flatten(1).mean(1)
    return losses, kl, deviation


def draw_pairs(config, times, iteration):
    """The pairs of an image and a time of each optimizer step, [(index (b,), t (b,))]."""
    N = config.groups * config.group_size
    noise = generator(config.seed, iteration, "training")
    # Departs from section 4: at a few of evaluation's times, each once, not at all of a rollout's.
    chosen = times[torch.rand(N, len(times), generator=noise).argsort(1)[:, : config.train_times]]
    steps = torch.randperm(N, generator=noise).tensor_split(config.updates)
    return [(i.repeat_interleave(chosen.shape[1]), chosen[i].flatten()) for i in steps]


def optimize(run, D, iteration, losses=pair_losses):
    """Lines 8 to 13: `updates` steps of AdamW, each on its part of D. Fields of a row."""
    config = run.config
    model = run.model
    mine = share(config.groups * config.group_size)
    drawn = draw_pairs(config, model.times, iteration)
    sums = torch.zeros(3, dtype=torch.float64)
    norms = []
    # Line 8; the loop ends with line 13.
    for step, (index, t) in enumerate(drawn, (iteration - 1) * config.updates + 1):
        for x in model.lora.adapters["theta"]:
            x.grad = torch.zeros_like(x)
        pairs = ((index >= mine.start) & (index < mine.stop)).nonzero().flatten()
        for start in range(0, len(pairs), config.batch_size):
            batch = pairs[start : start + config.batch_size]
            noise = [generator("eps", config.seed, step, pair) for pair in batch.tolist()]
            eps = torch.stack([torch.randn(D["x_0"].shape[1:], generator=g) for g in noise])
            images = (index[batch] - mine.start).to(model.device)
            terms = losses(model, D, images, t[batch], eps.to(model.device))
            # Departs from line 12: the KL term, as in the released code. The mean is over the pairs
            # of all processes, whose gradients are added up.
            total = (terms[0] + config.kl * terms[1]).sum() / len(index)
            run.scaler.scale(total).backward()
            sums += torch.stack(terms).detach().cpu().double().sum(1)
        if not sums.isfinite().all():
            raise UserError("the loss is not finite; try a smaller --lr, or --precision bf16")
        norms.append(gradient_step(run, step))
    averages = sum(gather(sums / sum(len(index) for index, _ in drawn))).tolist()
    row = dict(zip(("loss", "kl", "old_deviation"), averages, strict=True))
    finite = [norm for norm in norms if math.isfinite(norm)]
    skipped = run.rows[-1]["skipped_steps"] + len(norms) - len(finite)
    return row | {"grad_norm": sum(finite) / max(1, len(finite)), "skipped_steps": skipped}


def gradient_step(run, step):
    """AdamW on theta (line 12), and its EMA; `step` counts from 1. Returns the gradient's norm."""
    theta = run.model.lora.adapters["theta"]
    if WORLD > 1:
        for x in theta:
            dist.all_reduce(x.grad)
    run.scaler.unscale_(run.optimizer)
    # Departs from Algorithm 1, as the released code: gradients are clipped.
    norm = torch.nn.utils.clip_grad_norm_(theta, 1.0).item()
    if not math.isfinite(norm) and not run.scaler.is_enabled():
        raise UserError("the gradient is not finite; try a smaller --lr")
    # Departs from Algorithm 1: the learning rate rises at the start.
    run.optimizer.param_groups[0]["lr"] = run.config.lr * min(1, step / max(1, run.config.warmup))
    run.scaler.step(run.optimizer)
    run.scaler.update()
    # Departs from Algorithm 1, as the released code: the EMA is what is evaluated and saved.
    run.model.lora.average("ema", run.config.ema)
    return norm


def try_rewards(model, rewards, prompts):
    """What is wrong with a reward fails here, before anything is written: a name of two rewards,
    its own `check` of all prompts and metadata, where it has one, and a trial image."""
    named = {}
    for reward in rewards:
        if named.setdefault(reward.name, reward.function) is not reward.function:
            rule = "must be one reward alone, trained on or watched"
            raise UserError(f"reward {reward.name}: {rule}; give one another name")
        if hasattr(reward.function, "check"):
            with blame(f"reward {reward.name}: must accept --prompts and --eval-prompts"):
                reward.function.check(*map(list, zip(*prompts, strict=True)))
    collect(model, rewards, [(0, *prompts[0])], ("probe",), "old")


def tell(run, bar):
    """How the iteration went: beside the bar or, where there is none, in a line of its own."""
    row = run.rows[-1]
    # Where r does not spread, the iteration taught nothing.
    progress = f"reward {row['reward']:.3f}, r 0.5 +- {row['r_std']:.3f}"
    bar.set_postfix_str(progress)
    if bar.disable:
        left = (run.config.iterations / row["iteration"] - 1) * row["seconds"] / 60
        say(f"iteration {row['iteration']:4d}   {progress}, {left:.0f} minutes left")
    recent = [row["r_std"] for row in run.rows[-5:] if "r_std" in row]
    if len(recent) == 5 and not any(recent):
        say("five iterations in a row had equal rewards for each prompt, and taught nothing")


def how_to_resume(run, parts):
    """The command that goes on with a run; a call where the command line would lose something."""
    own = [parameter.default for parameter in inspect.signature(train).parameters.values()]
    rewards = (run.config.reward, run.config.watch)
    if parts == own[1:] and all(isinstance(reward, str) for reward in rewards):
        return f"python nft.py --out {run.dir} --resume"
    call = f"nft.configure(out={str(run.dir)!r}, resume=True)"
    return f"nft.train of {call} with the same rewards and parts"


@contextlib.contextmanager
def sys_path_restored():
    """Take off sys.path what `load_module` puts on it."""
    path = sys.path.copy()
    try:
        yield
    finally:
        sys.path[:] = path


@sys_path_restored()
def train(
    config,
    make_model=Model,
    collect=collect,
    weigh=optimality_reward,
    losses=pair_losses,
    evaluate=evaluate,
):
    """Algorithm 1, of parts that a study may replace. Returns the rows of metrics.jsonl, a dict an
    iteration from 0, the base's. Raises UserError, of status 2 before anything is written."""
    prompts, held_out = load_prompt_sets(config)
    # A reward's file is run once for both flags.
    modules = {}
    rewards = load_rewards(config.reward, "--reward", modules)
    watched = load_rewards(config.watch, "--watch", modules)
    # All rewards; those of --watch add nothing to r_raw.
    watched = rewards + [reward._replace(weight=0.0) for reward in watched]
    model = make_model(config)
    try_rewards(model, watched, prompts + held_out)
    run = open_run(config, model, watched, [prompts, held_out])
    K = config.group_size
    N = config.groups * K
    mine = share(N)
    started = time.time() - (run.rows[-1]["seconds"] if run.rows else 0)
    saved = "nothing"
    try:
        if not run.rows:
            row = {"iteration": 0, "images": 0, "skipped_steps": 0}
            row |= evaluate(run, watched, held_out, 0) | {"roughness": 1.0}
            run.rows.append(row | {"seconds": time.time() - started})
            save(run)
        saved = f"iteration {run.rows[-1]['iteration']}"
        bar = tqdm(range(len(run.rows), config.iterations + 1), "train", position=1, disable=HIDDEN)
        for iteration in bar:  # line 1
            # Collect: prompts (line 2), and K images of each by the old policy and any solver (3).
            drawn = draw_prompts(prompts, iteration, config)
            numbered = [(i, *drawn[i // K]) for i in mine]
            D = collect(model, rewards, numbered, (config.seed, iteration), "old")

            # Reward: from r_raw the optimality r of each image (lines 4 and 5).
            row, raw = means(D)
            r = weigh(raw, torch.arange(N) // K, config.z)
            # Line 6. Line 7 ends the loop over prompts, which all go together here.
            D["r"] = r[mine.start : mine.stop].to(model.device)

            # Optimize: theta by the loss of Eq. (5) on D (lines 8 to 13).
            row |= optimize(run, D, iteration, losses)

            # Update: theta_old <- eta_i theta_old + (1 - eta_i) theta, D <- {} (line 14).
            row["eta"] = soft_update_decay(iteration, config.eta)
            model.lora.average("old", row["eta"])
            D.clear()

            # Log, evaluate, save.
            row |= {
                "iteration": iteration,
                "images": iteration * N,
                "r_std": r.std(correction=0).item(),
            }
            # The images of iteration 1 are the base model's.
            base = run.rows[1] if iteration > 1 else row
            row["roughness"] = row["laplacian"] / max(base["laplacian"], 1e-9)
            last = iteration == config.iterations
            if last or iteration % config.eval_every == 0:
                row |= evaluate(run, watched, held_out, iteration)
            run.rows.append(row | {"seconds": time.time() - started})
            if last or iteration % config.save_every == 0:
                save(run)
                saved = f"iteration {iteration}"
            tell(run, bar)
        if "eval_reward" not in run.rows[-1]:
            # Resumed to end where it is.
            run.rows[-1] |= evaluate(run, watched, held_out, config.iterations)
            save(run)
    except (Exception, KeyboardInterrupt) as error:
        parts = [make_model, collect, weigh, losses, evaluate]
        mend = f"{saved} is saved, go on with: {how_to_resume(run, parts)}"
        number = min(len(run.rows), config.iterations)
        failure = UserError(f"iteration {number}: {reason(error)}; {mend}")
        failure.status = 130 if isinstance(error, KeyboardInterrupt) else 1
        raise failure from error
    change = f"{run.rows[0]['eval_reward']:.3f} -> {run.rows[-1]['eval_reward']:.3f}"
    say(f"held-out reward {change}; pictures and how to use it: {run.dir}/README.md")
    return run.rows


# ---- Settings and the command line -------------------------------------------------------------
MAY_CHANGE = {"out", "resume", "iterations", "eval_every", "save_every"}
MAY_CHANGE |= {"device", "batch_size", "checkpointing"}


def check(config):
    """Refuse what can be refused before a model is loaded. Raises UserError."""
    for name, field in FIELDS.items():
        value, rule = getattr(config, name), None
        low, high, choices = (field.metadata[x] for x in ("low", "high", "choices"))
        kind = (int, float) if field.type is float else field.type
        if name in ("reward", "watch"):
            right = callable(value) or isinstance(value, (str, dict))
        else:
            # eta may be a number, too.
            right = name == "eta" or isinstance(value, kind)
        if not right:
            rule = f"must be of type {field.type.__name__}"
        elif low is not None and not low <= value < high:
            rule = f"must be a number from {low} to below {high}"
        elif choices and value not in choices:
            rule = f"must be one of {', '.join(choices)}"
        if rule:
            raise UserError(f"{FLAGS[name]} {value}: {rule}; try {field.default!r}")
    images = config.groups * config.group_size
    if max(config.updates, WORLD) > images:
        rule = f"must be at most the {images} images of an iteration, as must the processes"
        raise UserError(f"--updates {config.updates}: {rule}; give fewer")
    with blame(f"--eta {config.eta}: must stay in [0, 1]", f"try {Config.eta}"):
        soft_update_decay(1, config.eta)


def configure(**given):
    """Settings by the names of Config -> Config; a preset's, or to resume the run's own, stand
    where none are given. Raises UserError for what can be refused without a model."""
    given = {k: os.fspath(v) if isinstance(v, os.PathLike) else v for k, v in given.items()}
    defaults = dict(PRESETS.get(given.get("model", Config.model), {}))
    if given.get("resume"):
        if "out" not in given:
            raise UserError("--resume: must name the run; add --out DIR")
        with blame(f"--resume: --out {given['out']} must hold a run"):
            defaults = dict(json.loads((Path(given["out"]) / "config.json").read_text("utf-8")))
        for name in ("reward", "watch"):
            # As Python shows a function.
            if name not in given and " at 0x" in str(defaults.get(name)):
                rule = f"--resume: the {name} of this run must be given again, as it was no text"
                raise UserError(f"{rule}; give {name}=... to nft.configure, too")
        for name, value in given.items():
            # A function may be another object of the same code.
            fixed = name not in MAY_CHANGE and isinstance(value, (str, int, float))
            if fixed and value != defaults.get(name, value):
                rule = f"{FLAGS[name]} {value}: must stay {defaults[name]} in this run"
                raise UserError(f"{rule}; leave it out, or take another --out without --resume")
    elif "prompts" in given:
        # Prompts of your own bring their own held-out ones.
        defaults.pop("eval_prompts", None)
    with blame("settings must be those of python nft.py --help"):
        config = Config(**(defaults | given))
    check(config)
    name = os.path.basename(os.path.abspath(config.model))
    # The process's number keeps two runs apart that start at once.
    out = f"runs/{name}-{time.strftime('%m%d-%H%M%S')}-{os.getpid()}"
    config.out = config.out or gather(out)[0]
    return config


def parse(argv=None):
    """Command line -> Config. Raises UserError."""

    def refuse(message):
        raise UserError(f"{message}; see python nft.py --help")

    text = f"{__doc__.splitlines()[0]}\n\nIn brackets the defaults, which a preset changes:\n"
    for name, preset in PRESETS.items():
        text += f"\n  {name:10}" + " ".join(f"{FLAGS[key]} {preset[key]}" for key in preset)
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=text, formatter_class=form, allow_abbrev=False)
    parser.error = refuse
    for name, field in FIELDS.items():
        if name in GROUPS:
            group = parser.add_argument_group(GROUPS[name])
        kind = {"type": field.type, "choices": field.metadata["choices"]}
        if field.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        help = f"{field.metadata['help']} ({field.default!r})"
        group.add_argument(FLAGS[name], default=argparse.SUPPRESS, help=help, **kind)
    return configure(**vars(parser.parse_args(argv)))


def main(argv=None, **parts):
    """Run the command line, with parts for `train`; returns the exit status, 0 if all went well."""
    try:
        if WORLD > 1 and not dist.is_initialized():
            local = int(os.environ.get("LOCAL_RANK", "0"))
            if local < torch.cuda.device_count():
                torch.cuda.set_device(local)
            dist.init_process_group()
        train(parse(argv), **parts)
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # UserError, or such as a model that does not fit the memory
        who = f"process {RANK}: " if WORLD > 1 else ""
        print(f"nft.py: {who}{reason(error)}", file=sys.stderr)
        return getattr(error, "status", 1)


if __name__ == "__main__":
    sys.exit(main())
