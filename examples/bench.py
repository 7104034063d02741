"""What an iteration costs: nft.py's functions beside a plain loop in the released DiffusionNFT code's order of work.

    python examples/bench.py                                            # --model tiny
    python examples/bench.py --model tiny-sd3 --growth
    python examples/bench.py --model sd15 --random-weights --precision bf16 --groups 2 --group-size 4

Own flags: --repeats, --random-weights, --cache, --growth, --clock; all others are nft.py's (python nft.py --help).

`nft.py` calls nft.collect and nft.pair_losses, and steps the optimizer as nft.train does. `plain` takes the same
prompts, noise, noise levels and batches, and computes the same images, losses and gradients to rounding: the line
"apart" says how far they differ. Its order of work is that of the authors' scripts/train_nft_sd3.py: each image's
prompt encoded; in rollouts the adapter beside its layer, as peft's B(A x) * 2; three forward passes a batch: old,
theta, reference, the last one also where its weight is 0; adaptive weights in float64; one optimizer step an iteration.
Left out is what else slows the released code: a frozen base in fp32 under autocast, cast in each pass, and DDP; and
of nft.train a noise generator a pair, the check for finite losses and the log.

The loops alternate in one process, the order turned around each round; the first round is a warm-up. The learning
rate is 0, so that each round does the same work. Tables give the median [lowest, highest] of --repeats rounds. A pair
is an image at a noise level. Peak memory: torch.cuda.max_memory_allocated, on a CPU the highest resident set (Linux).
The last lines say which share of an iteration each part takes; there the device is waited for around each part.

--random-weights builds SD1.5 (UNet, CLIP-L, VAE) or SD3.5-Medium (MMDiT-X, CLIP-L, CLIP-G, VAE) at full size without
a download, in a temporary directory or that of --cache, with the tokenizer of examples/pretrain_tiny.py. In place of
SD3's T5-XXL one answers zeros of the same shape: it would run once a rollout, the denoiser --steps times, and idle in
training. The reward is then jpeg unless --reward is given.

Its lines for CUDA have not run: no CUDA device was at hand. Needs no package beyond nft.py's own.
SPDX-License-Identifier: MIT
"""
import argparse
import collections
import functools
import math
import pathlib
import platform
import re
import statistics
import sys
import tempfile
import time
from unittest import mock

import torch
import torch.nn.functional as F

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import nft  # noqa: E402

Loop = collections.namedtuple("Loop", "name model pair_losses updates")


# ------------------------------------------------------------------------------------ the plain loop
class Plain(nft.Model):
    """`model` itself, sampled and called in the released code's way: by hooks of our own, nft.py's being off."""
    def __init__(self, model):
        vars(self).update(vars(model))
        self.policy = None
        for i, name in enumerate(self.lora.names):
            self.net.get_submodule(name).register_forward_hook(functools.partial(self.add, i))

    def add(self, i, layer, args, out):
        """peft's forward of layer i: the adapter beside the base layer."""
        if self.policy is None:
            return out
        A, B = (x.to(out.dtype) for x in self.lora.sets[self.policy][2 * i:2 * i + 2])
        return out + F.linear(F.linear(args[0], A), B) * 2

    @torch.no_grad()
    def sample(self, prompts, seeds, policy):
        """nft.Model.sample's dict, by the pipeline on a list of prompts, one an image."""
        seen, last = [], {}
        self.policy, self.lora.active, noise = policy, None, [nft.generator(*seed) for seed in seeds]
        with self.net.register_forward_pre_hook(lambda _, *given: seen.append(given), with_kwargs=True):
            images = self.pipe(list(prompts), generator=noise, output_type="pt", **self.call,
                               callback_on_step_end=lambda pipe, step, t, given: last.update(given) or {}).images
        self.policy = None
        condition = dict(self.signature.bind(*seen[0][0], **seen[0][1]).arguments)
        condition = {name: x for name, x in condition.items() if name not in (self.input, "timestep")}
        condition = nft.map_tensors(lambda x, shared: functools.partial(x.clone) if shared else x[-len(prompts):],
                                    condition, self.shared)     # the conditional half; FLUX's ids whole: see nft.py
        return {"x_0": last["latents"].float(), "images": images.float().clamp(0, 1), "condition": condition}

    def predict(self, x_t, t, condition, policy):
        """The denoiser's output under "theta", "old" or None."""
        self.policy = policy
        out = super().predict(x_t, t, condition, None)
        self.policy = None
        return out


def plain_losses(model, rollout, index, t, eps, r):
    """The losses of nft.pair_losses as the released code computes them; `model` is Plain."""
    beta, x_0 = model.config.beta, rollout["x_0"][index]
    condition = nft.map_tensors(lambda x: x[index], rollout["condition"])
    alpha_t, sigma_t = model.alpha_sigma(t, x_0.ndim)
    x_t = alpha_t * x_0 + sigma_t * eps
    with torch.no_grad():
        old = model.predict(x_t, t, condition, "old")
    theta = model.predict(x_t, t, condition, "theta")
    with torch.no_grad():
        reference = model.predict(x_t, t, condition, None)      # whatever its weight

    def distance(out):
        x0_hat, slope = nft.predict_x0(x_t, out, alpha_t, sigma_t, model.prediction)
        norm = (x0_hat.detach().double() - x_0.double()).flatten(1).abs().mean(1).clip(min=1e-5)
        weight = (sigma_t / (alpha_t + sigma_t) / slope).flatten()      # 1 for flow, which the released code is for
        return weight * (x0_hat - x_0).flatten(1).square().mean(1) / norm
    positive, negative = beta * theta + (1 - beta) * old, (1 + beta) * old - beta * theta
    loss = r * distance(positive) / beta + (1 - r) * distance(negative) / beta
    model.policy = "theta"                                      # with --checkpointing backward calls the layers again
    return loss, (theta - reference).square().flatten(1).mean(1)


# ------------------------------------------------------------------------------------ measurement
def iterate(loop, rewards, prompts, now):
    """One iteration of `loop` on `prompts`, K of each in a row; returns seconds of rollout and of training."""
    model, config, device = loop.model, loop.model.config, loop.model.device
    theta, noise, N = model.lora.sets["theta"], nft.generator(config.seed, "bench"), len(prompts)
    optimizer = torch.optim.AdamW(theta, lr=0.0, betas=(0.9, 0.999), weight_decay=1e-4)
    scaler = torch.amp.GradScaler(device.type, enabled=model.dtype == torch.float16)
    started = now()
    rollout, raw, _ = nft.collect(model, rewards, prompts, (config.seed, 1), "old")
    collected = now()
    r = nft.optimality_reward(raw, torch.arange(N) // config.group_size, config.z).to(device)
    shuffled = torch.rand(N, len(model.times), generator=noise).argsort(1)
    chosen = model.times[shuffled[:, :config.train_times]]
    for shard in torch.randperm(N, generator=noise).tensor_split(loop.updates):
        index, t = shard.repeat_interleave(chosen.shape[1]), chosen[shard].flatten()
        for some in torch.arange(len(index)).split(config.batch_size):
            eps = torch.randn(len(some), *rollout["x_0"].shape[1:], generator=noise)
            i = index[some].to(device)
            losses = loop.pair_losses(model, rollout, i, t[some], eps.to(device), r[i])
            scaler.scale((losses[0] + config.kl * losses[1]).sum() / len(index)).backward()
            model.policy = None                                 # plain's: see plain_losses
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(theta, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        model.lora.average("ema", config.ema)
    model.lora.average("old", 1.0)                              # stays as it is: each round does the same work
    return collected - started, now() - collected


def differences(loops, prompts):
    """How far the loops' images, losses and gradients lie apart, each relative to its size."""
    found, noise = {}, nft.generator("differences")
    rollouts = [nft.collect(loop.model, [], prompts, ("differences",), "old")[0] for loop in loops]
    model, n, r = loops[0].model, len(prompts), torch.rand(len(prompts), generator=noise)
    eps = torch.randn(rollouts[0]["x_0"].shape, generator=noise)
    given = [x.to(model.device) for x in (torch.arange(n), model.times[torch.arange(n) % len(model.times)], eps, r)]
    for loop, rollout in zip(loops, rollouts):
        loss, kl = loop.pair_losses(loop.model, rollouts[0], *given)[:2]
        losses = loss, model.config.kl * kl
        gradients = torch.autograd.grad(sum(losses).sum(), model.lora.sets["theta"])
        loop.model.policy = None
        found[loop.name] = {"images": [rollout["x_0"]], "losses": losses, "gradients": gradients}
    def apart(a, b):
        return (sum((x - y).square().sum() for x, y in zip(a, b)) / sum(x.square().sum() for x in b)).sqrt().item()
    a, b = found.values()
    return {name: apart(a[name], b[name]) for name in a}


def shares(loop, rewards, prompts, now):
    """{part: its share of an iteration}."""
    spent, parts = collections.Counter(), {"old": "old", "theta": "theta forward", None: "reference"}

    def timed(f, name):
        def call(*args, **kwargs):
            start, out = now(), f(*args, **kwargs)
            spent[name or parts.get(args[-1], str(args[-1]))] += now() - start
            return out
        return call
    with mock.patch.object(loop.model, "predict", timed(loop.model.predict, None)), \
            mock.patch.object(nft, "score", timed(nft.score, "reward")), \
            mock.patch.object(torch.Tensor, "backward", timed(torch.Tensor.backward, "backward")):
        rollout, training = iterate(loop, rewards, prompts, now)
    spent["rollout"] = rollout - spent["reward"]
    spent["rest"] = rollout + training - sum(spent.values())
    return {name: x / (rollout + training) for name, x in spent.items()}


def overhead(model, prompts, now):
    """Seconds of nft.py's rollout over those of the pipeline alone, without adapter, scoring or records."""
    size, start = model.config.batch_size, now()
    nft.collect(model, [], prompts, ("overhead",), "old")
    between = now()
    for i in range(0, len(prompts), size):
        texts = [text for text, _ in prompts[i:i + size]]
        noise = [nft.generator("overhead", i + k) for k in range(len(texts))]
        model.pipe(texts, generator=noise, output_type="pt", **model.call)
    return (between - start) / (now() - between)


def kept(model, prompts):
    """Bytes that one batch of pairs keeps for its backward pass, the frozen weights left out."""
    found, prompts = {}, prompts[:model.config.batch_size]
    weights = {x.untyped_storage().data_ptr() for x in model.net.parameters()}
    rollout, n = nft.collect(model, [], prompts, ("kept",), "old")[0], len(prompts)
    def pack(x):
        if (storage := x.untyped_storage()).data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()        # views of one tensor count once
        return x
    eps, r = torch.randn_like(rollout["x_0"]), torch.rand(n, device=model.device)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        losses = nft.pair_losses(model, rollout, torch.arange(n, device=model.device),
                                 model.times[torch.arange(n) % len(model.times)], eps, r)
        assert losses                                           # alive: no two of its tensors had one place
    return sum(found.values())


def peak_memory(device, reset=False):
    """Bytes at the highest point since the last reset; nan where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.reset_peak_memory_stats(device) if reset else torch.cuda.max_memory_allocated(device)
    try:
        if reset:
            return pathlib.Path("/proc/self/clear_refs").write_text("5")
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())[1])
    except OSError:
        return math.nan


# ------------------------------------------------------------------------------------ full-size models
def random_pipeline(name):
    """Stable Diffusion 1.5 or 3.5-Medium at full size, with PyTorch's own starting weights in the default dtype."""
    import diffusers as d
    import transformers as hf
    import pretrain_tiny as tiny
    words = tiny.make_tokenizer()
    words.model_max_length, marks = 77, ("bos_token_id", "eos_token_id", "pad_token_id")

    def clip(kind, width, layers, heads, act):
        return kind(hf.CLIPTextConfig(
            vocab_size=49408, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
            num_attention_heads=heads, projection_dim=width, hidden_act=act, **{x: getattr(words, x) for x in marks}))

    def vae(channels, **more):
        return d.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, **more)
    if name == "sd15":
        scheduler = d.PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                    skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
        unet = d.UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        return d.StableDiffusionPipeline(
            vae(4, sample_size=512), clip(hf.CLIPTextModel, 768, 12, 12, "quick_gelu"), words, unet, scheduler,
            safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    kind = hf.CLIPTextModelWithProjection
    transformer = d.SD3Transformer2DModel(
        sample_size=128, num_layers=24, attention_head_dim=64, num_attention_heads=24, joint_attention_dim=4096,
        caption_projection_dim=1536, pooled_projection_dim=2048, out_channels=16, pos_embed_max_size=384,
        dual_attention_layers=tuple(range(13)), qk_norm="rms_norm")
    return d.StableDiffusion3Pipeline(
        transformer, d.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae(16, sample_size=1024, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False,
            use_post_quant_conv=False),
        clip(kind, 768, 12, 12, "quick_gelu"), words, clip(kind, 1280, 32, 20, "gelu"), words,
        tiny.make_silent_t5(words, 4096), words)


def build(config, root):
    """Write the pipeline of --model with random weights under `root`, unless it is there; returns its path."""
    dtype = nft.pick_device(config)[1]
    path = root / f"{config.model}-{str(dtype).removeprefix('torch.')}"
    if config.model not in ("sd15", "sd3"):
        nft.refuse(f"--random-weights: --model {config.model} must be sd15 or sd3")
    if not (path / "model_index.json").exists():
        torch.set_default_dtype(dtype)                          # half the memory and time of a cast afterwards
        try:
            random_pipeline(config.model).save_pretrained(path)
        finally:
            torch.set_default_dtype(torch.float32)
    return str(path)


# ------------------------------------------------------------------------------------ the tables
def show(values, digits=2):
    """Median [lowest, highest]."""
    return "{:.{d}f} [{:.{d}f}, {:.{d}f}]".format(statistics.median(values), min(values), max(values), d=digits)


def bench(own, config, name):
    """Measure, and print the tables."""
    import diffusers
    prompts, rewards = nft.draw_prompts(nft.load_prompts(config.prompts), 1, config), nft.load_rewards(config.reward)
    prompts, model = [prompt for prompt in prompts for _ in range(config.group_size)], nft.Model(config)
    torch.set_float32_matmul_precision("high")                  # as nft.train
    cuda, noise = model.device.type == "cuda", nft.generator("bench")
    for B in model.lora.sets["theta"][1::2] + model.lora.sets["old"][1::2]:
        B.data += (0.003 * torch.randn(B.shape, generator=noise)).to(B.device)  # so that theta, old, base differ

    def now():
        if cuda:
            torch.cuda.synchronize(model.device)
        return time.process_time() if own.clock == "cpu" else time.perf_counter()
    loops = Loop("nft.py", model, nft.pair_losses, config.updates), Loop("plain", Plain(model), plain_losses, 1)
    rows, spent, peak = [(kl, loop) for kl in (config.kl or 1e-4, 0.0) for loop in loops], {}, {}
    pairs = len(prompts) * min(config.train_times, len(model.times))
    device = torch.cuda.get_device_name(model.device) if cuda else f"CPU {platform.machine()}"
    print(f"{name} | {device}, {torch.get_num_threads()} threads | {model.dtype} | torch {torch.__version__}, "
          f"diffusers {diffusers.__version__} | {len(prompts)} images, {pairs} pairs, batch {config.batch_size}, "
          f"{config.updates} updates, {config.steps} steps | {own.clock} seconds")
    print("apart, relative: " + ", ".join(
        f"{name} {x:.0e}" for name, x in differences(loops, prompts[:config.batch_size]).items()))
    for k in range(own.repeats + 1):                            # round 0 warms up
        for kl, loop in rows[::-1] if k % 2 else rows:
            config.kl, key = kl, (kl, loop.name)
            peak_memory(model.device, reset=True)
            seconds = iterate(loop, rewards, prompts, now)
            spent[key] = (spent[key] if k > 1 else []) + [seconds]
            peak[key] = peak_memory(model.device)
    print("\n| kl | loop | rollout images/s | training pairs/s | s an iteration | peak, GB | plain over nft.py |\n"
          "| --- | --- | --- | --- | --- | --- | --- |")
    for kl, loop in rows:
        mine, plain = spent[kl, loop.name], spent[kl, "plain"]
        ratio = [sum(b) / sum(a) for a, b in zip(mine, plain)]
        print(f"| {kl:g} | {loop.name} | {show([len(prompts) / a for a, _ in mine])} | "
              f"{show([pairs / b for _, b in mine])} | {show([sum(x) for x in mine], 3)} | "
              f"{peak[kl, loop.name] / 1e9:.2f} | {'' if mine is plain else show(ratio)} |")
    over = [overhead(model, prompts, now) for _ in range(own.repeats)]
    print(f"\nseconds of the rollout over those of the pipeline alone: {show(over)}; kept for the backward pass of "
          f"{min(len(prompts), config.batch_size)} pairs: {kept(model, prompts) / 1e6:,.1f} MB\n")
    for config.kl, loop in rows:
        parts = shares(loop, rewards, prompts, now).items()
        print(f"kl {config.kl:g}, {loop.name}: " + ", ".join(f"{part} {100 * x:.1f}%" for part, x in parts))
    if own.growth:
        config.kl, grown = rows[0][0], collections.defaultdict(list)
        for n in (1, 2, 4, 8) * own.repeats:
            grown[n * len(prompts)].append(sum(iterate(loops[0], rewards, prompts * n, now)))
        print("\n| images | s an iteration | ms an image |\n| --- | --- | --- |")
        for images, mine in grown.items():
            print(f"| {images} | {show(mine, 3)} | {show([1000 * x / images for x in mine])} |")


def main(argv=None):
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds (5)")
    parser.add_argument("--random-weights", action="store_true", help="sd15 or sd3 without a download")
    parser.add_argument("--cache", type=pathlib.Path, help="keep those weights in this directory")
    parser.add_argument("--growth", action="store_true", help="also time 1, 2, 4 and 8 times the images")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall",
                        help="cpu: CPU time of all threads, steadier where others use the machine (wall)")
    own, rest = parser.parse_known_args(argv)
    try:
        config = nft.parse(["--reward", "jpeg"] * own.random_weights + rest)
        name = config.model
        with tempfile.TemporaryDirectory() as folder:
            if own.random_weights:
                config.model = build(config, own.cache or pathlib.Path(folder))
            bench(own, config, name)
        return 0
    except nft.Failure as e:
        print(f"bench.py: {e.args[0]}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
