"""What an iteration costs, beside a plain loop in the released DiffusionNFT code's order of work.

    python examples/studies/bench.py                                    # --model tiny
    python examples/studies/bench.py --model tiny-sd3 --repeats 9
    python examples/studies/bench.py --model sd15 --random-weights /tmp/random --precision bf16
    python examples/studies/bench.py --simulate               # memory at full size, without a GPU

Own flags: --repeats, --random-weights and --simulate. All others are nft.py's (python nft.py
--help). --simulate does none of this: see examples/studies/simulate.py.

Two loops run on one network, through nft.collect and nft.optimize:

    nft.py    as it is.
    plain     Works as the authors' scripts/train_nft_sd3.py does. A layer adds peft's B(A x) * 2.
              A batch takes three forward passes: old, theta and reference, the last one also where
              its weight is 0. Adaptive weights are in float64. An iteration is one optimizer step.

The line "apart" says how far their images, losses and gradients differ. Left out of the plain loop
is what else slows the released code: a base in fp32 under autocast, which is cast in each pass, and
DistributedDataParallel.

The loops take turns in one process, in an order that turns around each round; the first round is a
warm-up. The learning rate is 0, so that each round does the same work. Tables give the median
[lowest, highest] of --repeats rounds. A pair is an image at a noise level. The peak memory is the
GPU's. The last lines say which share of an iteration each part takes; for these the device is
waited for around each part.

--random-weights DIR builds SD1.5 (UNet, CLIP-L, VAE) or SD3.5-Medium (MMDiT-X, CLIP-L, CLIP-G, VAE)
at full size in DIR, without a download, with the tokenizer of examples/tiny/pretrain.py. In place
of SD3's T5-XXL stands one that answers zeros of the same shape. The reward is then jpeg, unless
--reward is given.
SPDX-License-Identifier: MIT
"""

import argparse
import collections
import copy
import dataclasses
import functools
import itertools
import math
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))
sys.path.insert(0, str(REPOSITORY / "examples" / "tiny"))
import pretrain

import nft

# ---- The two loops -------------------------------------------------------------------------------


class Loop:
    """A way to do an iteration: all that nft.optimize needs of a run.

    losses: as nft.pair_losses.
    """

    def __init__(self, name, model, losses):
        self.name = name
        self.model = model
        self.losses = losses
        self.config = model.config
        self.optimizer = torch.optim.AdamW(model.lora.adapters["theta"], lr=self.config.lr)
        half = model.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(model.device.type, enabled=half)
        self.rows = [{"skipped_steps": 0}]


class PlainLoRA:
    """The adapters of an nft.LoRA, added to the layers of `net` in peft's order of work."""

    def __init__(self, net, lora):
        self.adapters = lora.adapters
        self.average = lora.average
        self.active = None
        for i, name in enumerate(lora.layers):
            hook = functools.partial(self.add_adapter, i)
            net.get_submodule(name).register_forward_hook(hook)

    def add_adapter(self, i, layer, args, out):
        """The hook of layer i: out + B(A x) * 2."""
        if self.active is None:
            return out
        A, B = self.adapters[self.active][2 * i : 2 * i + 2]
        x = F.linear(args[0], A.to(out.dtype))
        return out + F.linear(x, B.to(out.dtype)) * 2


def plain_losses(model, D, index, t, eps):
    """What nft.pair_losses returns, as the released code computes it."""
    beta = model.config.beta
    x_0 = D["x_0"][index]
    r = D["r"][index]
    condition = nft.map_tensors(lambda x: x[index], D["condition"])
    alpha_t, sigma_t = model.noise_level(t, x_0.ndim)
    x_t = alpha_t * x_0 + sigma_t * eps
    with torch.no_grad():
        old = model.predict(x_t, t, condition, "old")
    theta = model.predict(x_t, t, condition, "theta")
    with torch.no_grad():
        # Whatever its weight.
        reference = model.predict(x_t, t, condition, None)
    # With --checkpointing the backward pass calls theta's layers again.
    model.lora.active = "theta"

    def distance(out):
        x0_hat, slope = nft.predict_x0(x_t, out, alpha_t, sigma_t, model.prediction)
        error = x0_hat.detach().double() - x_0.double()
        scale = error.flatten(1).abs().mean(1).clip(min=1e-5)
        # 1 for flow, which the released code is for.
        weight = (sigma_t / (alpha_t + sigma_t) / slope).flatten()
        return weight * (x0_hat - x_0).flatten(1).square().mean(1) / scale

    positive = beta * theta + (1 - beta) * old
    negative = (1 + beta) * old - beta * theta
    loss = r * distance(positive) / beta + (1 - r) * distance(negative) / beta
    kl = (theta - reference).square().flatten(1).mean(1)
    deviation = (theta.detach() - old).square().flatten(1).mean(1)
    return loss.float(), kl, deviation


def make_loops(model):
    """The two loops of a model. They share its network and its adapters."""
    # So that each round does the same work.
    model.config.lr = 0.0
    plain = copy.copy(model)
    plain.config = dataclasses.replace(model.config, updates=1)
    plain.lora = PlainLoRA(model.net, model.lora)
    return [
        Loop("nft.py", model, nft.pair_losses),
        Loop("plain", plain, plain_losses),
    ]


def disturb(lora):
    """Move theta and old a little, so that they and the base model differ."""
    noise = nft.generator("bench")
    for policy in ("theta", "old"):
        for B in lora.adapters[policy][1::2]:
            B.data += 0.003 * torch.randn(B.shape, generator=noise).to(B.device)


def collect(model, rewards, prompts, key):
    """nft.collect of one image a prompt of [(prompt, metadata)], by the old policy."""
    numbered = []
    for i, (prompt, metadata) in enumerate(prompts):
        numbered.append((i, prompt, metadata))
    return nft.collect(model, rewards, numbered, key, "old")


def rollout(loop, rewards, prompts):
    """Sample and score as nft.train does: D, with r."""
    config = loop.config
    D = collect(loop.model, rewards, prompts, (config.seed, 1))
    groups = torch.arange(len(prompts)) // config.group_size
    r = nft.optimality_reward(D["scores"]["reward"], groups, config.z)
    D["r"] = r.to(loop.model.device)
    return D


def train(loop, D):
    """Train on D as nft.train does. The weights stay as they are."""
    lora = loop.model.lora
    nft.optimize(loop, D, 1, loop.losses)
    lora.average("old", 1.0)
    # The hooks of both loops are on the network: these must rest now.
    lora.active = None


# ---- What is measured ----------------------------------------------------------------------------


def now(device):
    """Seconds, when the device has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def iterate(loop, rewards, prompts):
    """One iteration; returns the seconds of its rollout and of its training."""
    device = loop.model.device
    started = now(device)
    D = rollout(loop, rewards, prompts)
    collected = now(device)
    train(loop, D)
    return collected - started, now(device) - collected


def relative(some, others):
    """How far two lists of tensors lie apart, relative to the size of the second."""
    difference = 0.0
    size = 0.0
    for x, y in zip(some, others, strict=True):
        difference += (x - y).square().sum().item()
        size += y.square().sum().item()
    return math.sqrt(difference / size)


def differences(loops, prompts):
    """{"images", "losses", "gradients": how far the two loops lie apart}."""
    model = loops[0].model
    noise = nft.generator("differences")
    index = torch.arange(len(prompts))
    t = model.times[index % len(model.times)]
    D = collect(model, [], prompts, ("differences",))
    D["r"] = torch.rand(len(prompts), generator=noise).to(model.device)
    eps = torch.randn(D["x_0"].shape, generator=noise).to(model.device)
    found = {"images": [], "losses": [], "gradients": []}
    for loop in loops:
        model = loop.model
        own = collect(model, [], prompts, ("differences",))
        loss, kl, _ = loop.losses(model, D, index.to(model.device), t, eps)
        losses = [loss, model.config.kl * kl]
        gradients = torch.autograd.grad(sum(losses).sum(), model.lora.adapters["theta"])
        model.lora.active = None
        found["images"].append([own["x_0"]])
        found["losses"].append(losses)
        found["gradients"].append(gradients)
    return {name: relative(*pair) for name, pair in found.items()}


def parts(loop, rewards, prompts):
    """{part: its share of an iteration}."""
    model = loop.model
    device = model.device
    names = {"old": "old", "theta": "theta forward", None: "reference"}
    spent = collections.Counter()
    passes = []

    def timed(function):
        def call(*args):
            started = now(device)
            result = function(*args)
            spent["reward"] += now(device) - started
            return result

        return call

    def before_pass(net, args):
        passes.append(now(device))

    def after_pass(net, args, out):
        spent[names[model.lora.active]] += now(device) - passes.pop()

    timed_rewards = [reward._replace(function=timed(reward.function)) for reward in rewards]
    started = now(device)
    D = rollout(loop, timed_rewards, prompts)
    collected = now(device)
    spent["rollout"] = collected - started - spent["reward"]
    hooks = [
        model.net.register_forward_pre_hook(before_pass),
        model.net.register_forward_hook(after_pass),
    ]
    train(loop, D)
    total = now(device) - started
    for hook in hooks:
        hook.remove()
    spent["backward and rest"] = total - spent.total()
    return {name: seconds / total for name, seconds in spent.items()}


def overhead(model, prompts):
    """Seconds of nft.py's rollout over those of the pipeline alone, without scores and records."""
    size = model.config.batch_size
    started = now(model.device)
    collect(model, [], prompts, ("overhead",))
    collected = now(model.device)
    for start in range(0, len(prompts), size):
        texts = [prompt for prompt, _ in prompts[start : start + size]]
        noise = [nft.generator("overhead", start + k) for k in range(len(texts))]
        settings = model.settings | {"num_inference_steps": model.config.steps}
        model.pipe(texts, generator=noise, output_type="pt", **settings)
    return (collected - started) / (now(model.device) - collected)


def kept(model, prompts):
    """Bytes that one batch of pairs keeps for its backward pass, without the frozen weights."""
    prompts = prompts[: model.config.batch_size]
    n = len(prompts)
    D = collect(model, [], prompts, ("kept",))
    D["r"] = torch.rand(n, device=model.device)
    weights = {x.untyped_storage().data_ptr() for x in model.net.parameters()}
    found = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            # Views of one tensor count once.
            found[storage.data_ptr()] = storage.nbytes()
        return x

    index = torch.arange(n)
    t = model.times[index % len(model.times)]
    eps = torch.randn_like(D["x_0"])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        losses = nft.pair_losses(model, D, index.to(model.device), t, eps)
    # The graph lived until here, so that no two of its tensors had one address.
    del losses
    model.lora.active = None
    return sum(found.values())


def peak_memory(device):
    """Gigabytes of the GPU at the highest point since the last call; nan without a GPU."""
    if device.type != "cuda":
        return math.nan
    highest = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return highest / 1e9


# ---- Full-size models without a download ---------------------------------------------------------


def make_clip(kind, tokenizer, width, layers, heads, activation):
    """A text encoder of CLIP's form; kind: a class of transformers."""
    from transformers import CLIPTextConfig

    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=width,
        hidden_act=activation,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return kind(config)


def make_vae(channels, **more):
    """The VAE of Stable Diffusion, with so many latent channels."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        **more,
    )


def make_tokenizer():
    """The tiny pipelines' tokenizer with CLIP's number of tokens."""
    tokenizer = pretrain.make_tokenizer()
    tokenizer.model_max_length = 77
    return tokenizer


def make_sd15():
    """Stable Diffusion 1.5, with PyTorch's own starting weights."""
    import diffusers
    from transformers import CLIPTextModel

    tokenizer = make_tokenizer()
    scheduler = diffusers.PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    unet = diffusers.UNet2DConditionModel(
        sample_size=64, cross_attention_dim=768, attention_head_dim=8
    )
    return diffusers.StableDiffusionPipeline(
        vae=make_vae(4, sample_size=512),
        text_encoder=make_clip(CLIPTextModel, tokenizer, 768, 12, 12, "quick_gelu"),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def make_sd3():
    """Stable Diffusion 3.5 Medium, with PyTorch's own starting weights."""
    import diffusers
    from transformers import CLIPTextModelWithProjection as Clip

    tokenizer = make_tokenizer()
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=128,
        num_layers=24,
        attention_head_dim=64,
        num_attention_heads=24,
        joint_attention_dim=4096,
        caption_projection_dim=1536,
        pooled_projection_dim=2048,
        out_channels=16,
        pos_embed_max_size=384,
        dual_attention_layers=tuple(range(13)),
        qk_norm="rms_norm",
    )
    vae = make_vae(
        16,
        sample_size=1024,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=make_clip(Clip, tokenizer, 768, 12, 12, "quick_gelu"),
        tokenizer=tokenizer,
        text_encoder_2=make_clip(Clip, tokenizer, 1280, 32, 20, "gelu"),
        tokenizer_2=tokenizer,
        text_encoder_3=pretrain.make_silent_t5(tokenizer, 4096),
        tokenizer_3=tokenizer,
    )


FULL_SIZE = {"sd15": make_sd15, "sd3": make_sd3}


def build(config, root):
    """The path of --model with random weights under `root`; writes it unless it is there."""
    if config.model not in FULL_SIZE:
        names = " or ".join(FULL_SIZE)
        raise nft.UserError(f"--random-weights: --model {config.model} must be {names}")
    _, dtype = nft.pick_device(config)
    path = root / f"{config.model}-{str(dtype).removeprefix('torch.')}"
    if not (path / "model_index.json").exists():
        # Half the memory and time of a cast afterwards.
        torch.set_default_dtype(dtype)
        try:
            FULL_SIZE[config.model]().save_pretrained(path)
        finally:
            torch.set_default_dtype(torch.float32)
    return path


# ---- The tables ----------------------------------------------------------------------------------


def show(values, digits=2):
    """Median [lowest, highest]."""
    numbers = [statistics.median(values), min(values), max(values)]
    middle, low, high = [f"{number:.{digits}f}" for number in numbers]
    return f"{middle} [{low}, {high}]"


def print_heading(name, model, images):
    """What is measured, where; `images`: their number."""
    import diffusers

    config = model.config
    device = f"CPU {platform.machine()}, {torch.get_num_threads()} threads"
    if model.device.type == "cuda":
        device = torch.cuda.get_device_name(model.device)
    print(f"{name} | {device} | {model.dtype}", end=" | ")
    print(f"torch {torch.__version__}, diffusers {diffusers.__version__}", end=" | ")
    print(f"{images} images, {config.train_times} noise levels each", end=", ")
    print(f"batch {config.batch_size}, {config.updates} updates, {config.steps} steps")


def measure(cases, rewards, prompts, repeats):
    """Time every case, (kl, loop), so many times, after a round to warm up.

    Returns a list for each case, [(seconds of the rollout, of the training)], and its peak memory.
    """
    seconds = [[] for _ in cases]
    peaks = [math.nan for _ in cases]
    for k in range(repeats + 1):
        order = list(range(len(cases)))
        if k % 2:
            order.reverse()
        for case in order:
            kl, loop = cases[case]
            loop.config.kl = kl
            peak_memory(loop.model.device)
            spent = iterate(loop, rewards, prompts)
            peaks[case] = peak_memory(loop.model.device)
            if k > 0:
                seconds[case].append(spent)
    return seconds, peaks


def plain_ratios(seconds, case):
    """The plain loop's seconds over nft.py's, a round each; its case is the next one."""
    ours = [sum(spent) for spent in seconds[case]]
    plain = [sum(spent) for spent in seconds[case + 1]]
    return [b / a for a, b in zip(ours, plain, strict=True)]


def print_table(cases, seconds, peaks, images, pairs):
    """A row a case. The last case of a KL weight is the plain loop's, with which it is compared."""
    print("\n| kl | loop | rollout images/s | training pairs/s | s an iteration ", end="")
    print("| peak, GB | plain over nft.py |\n| --- | --- | --- | --- | --- | --- | --- |")
    for case, (kl, loop) in enumerate(cases):
        rollouts = [images / rollout for rollout, _ in seconds[case]]
        trainings = [pairs / training for _, training in seconds[case]]
        totals = [sum(spent) for spent in seconds[case]]
        ratio = ""
        if loop.name != "plain":
            ratio = show(plain_ratios(seconds, case))
        speeds = f"{show(rollouts)} | {show(trainings)} | {show(totals, 3)}"
        print(f"| {kl:g} | {loop.name} | {speeds} | {peaks[case]:.2f} | {ratio} |")


def bench(config, name, repeats):
    """Measure, and print the tables.

    Returns three lists of ratios, a round each: the plain loop's seconds over nft.py's, with KL and
    without, and the rollout's over those of the pipeline alone. Then {part: its share} of one
    iteration of nft.py with KL.
    """
    prompts, _ = nft.load_prompt_sets(config)
    rewards = nft.load_rewards(config.reward, "--reward")
    repeated = []
    for pair in nft.draw_prompts(prompts, 1, config):
        repeated += [pair] * config.group_size
    model = nft.Model(config)
    disturb(model.lora)
    config.train_times = min(config.train_times, len(model.times))
    weights = [config.kl or 1e-4, 0.0]
    loops = make_loops(model)
    cases = list(itertools.product(weights, loops))
    images = len(repeated)
    print_heading(name, model, images)
    apart = differences(loops, repeated[: config.batch_size])
    numbers = [f"{what} {x:.0e}" for what, x in apart.items()]
    print(f"apart, relative: {', '.join(numbers)}")
    seconds, peaks = measure(cases, rewards, repeated, repeats)
    print_table(cases, seconds, peaks, images, pairs=images * config.train_times)
    ratios = [overhead(model, repeated) for _ in range(repeats)]
    print(f"\nseconds of the rollout over those of the pipeline alone: {show(ratios)}")
    megabytes = kept(model, repeated) / 1e6
    batch = min(images, config.batch_size)
    print(f"kept for the backward pass of {batch} pairs: {megabytes:,.1f} MB\n")
    shares = []
    for kl, loop in cases:
        loop.config.kl = kl
        shares.append(parts(loop, rewards, repeated))
        numbers = [f"{part} {100 * share:.1f}%" for part, share in shares[-1].items()]
        print(f"kl {kl:g}, {loop.name}: {', '.join(numbers)}")
    return plain_ratios(seconds, 0), plain_ratios(seconds, 2), ratios, shares[0]


def main(argv=None):
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds (5)")
    parser.add_argument(
        "--random-weights", type=Path, metavar="DIR", help="sd15 or sd3 without a download"
    )
    parser.add_argument(
        "--simulate",
        nargs="?",
        const="sd15,sdxl,sd3,flux",
        metavar="MODELS",
        help="print the peak memory of these at full size, simulated (sd15,sdxl,sd3,flux)",
    )
    own, rest = parser.parse_known_args(argv)
    try:
        if own.simulate is not None:
            import simulate

            simulate.main(own.simulate.split(","), rest)
            return 0
        if own.random_weights is None:
            config = nft.parse(rest)
            name = config.model
        else:
            config = nft.parse(["--reward=jpeg", *rest])
            name = config.model
            config.model = str(build(config, own.random_weights))
        bench(config, name, own.repeats)
    except nft.UserError as error:
        print(f"bench.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
