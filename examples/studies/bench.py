"""What an iteration of nft.py costs: seconds beside a plain loop, and memory without a GPU.

    python examples/studies/bench.py                        # seconds, of tiny and tiny-sd3
    python examples/studies/bench.py --simulate             # memory, of sd15, sdxl, sd3 and flux
    python examples/studies/bench.py --simulate --of sd15,sd3 --rank 64 --resolution 768

Other flags are those of nft.py.

Seconds: "plain" works as the authors' scripts/train_nft_sd3.py does. A layer adds peft's
B(A x) * 2. A batch takes three forward passes: old, theta and reference, the last one also where
its weight is 0. Adaptive weights are in float64. An iteration is one optimizer step. Left out is
what else slows the released code: a base in fp32 under autocast, and DistributedDataParallel.
"apart" says how far images, losses and gradients differ. The learning rate is 0, so that each round
does the same work. The other columns are shares of nft.py's iteration.

Memory: simulated, not seen on a GPU. nft.py's own Model, collect and optimize work on the released
models' classes at full size, with PyTorch's FakeTensors, which have a shape and no numbers. A
tracker adds up the bytes of all tensors that are alive: weights, adapters, gradients, AdamW,
activations. It does not see what is inside a kernel, the blocks that CUDA's allocator keeps, CUDA
itself, or a reward's model. One batch is sampled, in two steps, and one is trained on.
SPDX-License-Identifier: MIT
"""

import argparse
import dataclasses
import functools
import gc
import statistics
import sys
import time
import weakref
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "examples/tiny")]
import untrained

import nft


# ---- The two loops -------------------------------------------------------------------------------
class Loop:
    """A way to do an iteration: all that nft.optimize needs of a run, at a learning rate of 0."""

    def __init__(self, model, losses=nft.pair_losses):
        self.model = model
        self.config = model.config
        self.losses = losses
        self.optimizer = torch.optim.AdamW(model.lora.adapters["theta"], lr=0.0)
        self.scaler = torch.amp.GradScaler(enabled=False)

    def collect(self, rewards, prompts):
        """D with r, as nft.train makes it, of an image for each (prompt, metadata)."""
        numbered = [(i, *pair) for i, pair in enumerate(prompts)]
        D = nft.collect(self.model, rewards, numbered, ("bench",), "old")
        groups = torch.arange(len(prompts)) // self.config.group_size
        D["r"] = nft.optimality_reward(D.pop("scores")["reward"], groups, self.config.z)
        return D

    def train(self, D):
        """Train on D as nft.train does."""
        nft.optimize(self, D, 1, self.losses)


class PlainLoRA(nft.LoRA):
    """Adapters in peft's order of work."""

    def add_adapter(self, i, layer, args, out):
        """The hook of layer i: out + B(A x) * 2."""
        if self.active is None:
            return out
        self.called.add(i)
        A, B = self.adapters[self.active][2 * i : 2 * i + 2]
        return out + F.linear(F.linear(args[0], A.to(out.dtype)), B.to(out.dtype)) * nft.SCALE


def plain_losses(model, pairs, t, eps):
    """What nft.pair_losses returns, as the released code computes it."""
    beta = model.config.beta
    x_0 = pairs["x_0"]
    r = pairs["r"]
    alpha_t, sigma_t = model.noise_level(t, x_0.ndim)
    x_t = alpha_t * x_0 + sigma_t * eps
    with torch.no_grad():
        old = model.predict(x_t, t, pairs["condition"], "old")
    theta = model.predict(x_t, t, pairs["condition"], "theta")
    with torch.no_grad():
        # Whatever its weight.
        reference = model.predict(x_t, t, pairs["condition"], None)
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


def make_loops(config):
    """nft.py's loop and the plain one, whose adapters are equal and differ from the base model."""
    ours = Loop(nft.Model(config))
    with mock.patch.object(nft, "LoRA", PlainLoRA):
        plain = Loop(nft.Model(dataclasses.replace(config, updates=1)), plain_losses)
    for loop in (ours, plain):
        for policy in ("theta", "old"):
            for i, x in enumerate(loop.model.lora.adapters[policy]):
                noise = torch.randn(x.shape, generator=nft.generator(policy, i))
                x.data += 0.003 * noise.to(x.device)
    return ours, plain


# ---- Seconds -------------------------------------------------------------------------------------
def now():
    """Seconds, when the GPU has done what it was asked to."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def flat(tensors):
    """All numbers in one vector."""
    return torch.cat([x.detach().flatten() for x in tensors])


def differences(loops, prompts):
    """{"images", "losses", "gradients": how far the two loops lie apart, relative to their size}"""
    found = {"images": [], "losses": [], "gradients": []}
    pairs = loops[0].collect({}, prompts)
    noise = nft.generator("differences")
    pairs["r"] = torch.rand(len(prompts), generator=noise)
    eps = torch.randn(pairs["x_0"].shape, generator=noise)
    times = loops[0].model.times
    t = times[torch.arange(len(prompts)) % len(times)]
    for loop in loops:
        model = loop.model
        found["images"].append(flat([loop.collect({}, prompts)["x_0"]]))
        given = nft.map_tensors(lambda x, device=model.device: x.to(device), (pairs, t, eps))
        loss, kl, _ = loop.losses(model, *given)
        losses = [loss, model.config.kl * kl]
        found["losses"].append(flat(losses))
        gradients = torch.autograd.grad(sum(losses).sum(), model.lora.adapters["theta"])
        found["gradients"].append(flat(gradients))
    return {name: ((a - b).norm() / b.norm()).item() for name, (a, b) in found.items()}


# The parts of an iteration.
PARTS = ("rollout", "reward", "old", "reference", "theta", "backward and rest")


def shares(loop, rewards, prompts):
    """{part of PARTS: its share of an iteration}; the device is waited for around each."""
    model = loop.model
    spent = Counter()

    def timed(function, name_part):
        def call(*args):
            started = now()
            result = function(*args)
            spent[name_part(args)] += now() - started
            return result

        return call

    score = timed(nft.score, lambda args: "reward")
    # The last argument is the policy, None for the reference.
    predict = timed(model.predict, lambda args: args[-1] or "reference")
    with mock.patch.object(nft, "score", score), mock.patch.object(model, "predict", predict):
        started = now()
        D = loop.collect(rewards, prompts)
        spent["rollout"] = now() - started - spent["reward"]
        loop.train(D)
        total = now() - started
    spent["backward and rest"] = total - spent.total()
    return {part: spent[part] / total for part in PARTS}


def median(values):
    """Median (lowest to highest)."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def compare(name, words=(), repeats=5):
    """Both loops on a preset: its row of the table, in a list; words: flags of nft.py."""
    config = nft.parse([f"--model={name}", "--groups=4", "--out=unused", *words])
    prompts, _ = nft.load_prompt_sets(config)
    rewards = nft.load_rewards(config.reward)
    K = config.group_size
    prompts = [prompts[i // K % len(prompts)] for i in range(config.groups * K)]
    loops = make_loops(config)
    apart = differences(loops, prompts[: config.batch_size])
    seconds = [[], []]
    for k in range(repeats + 1):
        # In an order that turns around each round.
        for which in (k % 2, 1 - k % 2):
            started = now()
            loops[which].train(loops[which].collect(rewards, prompts))
            seconds[which].append(now() - started)
    # The first round is a warm-up.
    ours, plain = [values[1:] for values in seconds]
    ratio = median([b / a for a, b in zip(ours, plain, strict=True)])
    cells = [name, median(ours), median(plain), ratio]
    cells += [", ".join(f"{x:.0e}" for x in apart.values())]
    cells += [f"{x:.0%}" for x in shares(loops[0], rewards, prompts).values()]
    return [cells]


# ---- Memory: the tracker -------------------------------------------------------------------------
def tensors_of(*trees):
    """The tensors in nested dicts, lists and tuples."""
    return [x for x in tree_leaves(trees) if isinstance(x, torch.Tensor)]


class Tracker(TorchDispatchMode):
    """Counts the bytes of the storages that operations returned while it was on; views count once.

    live: bytes now; peak: the most since `restart`. With fake=True new large tensors are fake, and
    all that is computed from a fake one. What is computed from real tensors alone is real, so that
    schedulers and tokenizers work. A single number that is asked of fake tensors is 1.
    """

    # Tensors made of nothing with so many elements or fewer stay real: times, levels, indices.
    small = 4096

    def __init__(self, fake):
        super().__init__()
        self.live = 0
        self.peak = 0
        self.storages = set()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True) if fake else None

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.prim.device.default:
            # Half of all calls are autograd's, which asks fake tensors where they are.
            return args[0].fake_device
        out = self.compute(function, types, args, kwargs or {})
        for x in tensors_of(out):
            storage = x.untyped_storage()
            if storage._cdata not in self.storages:
                self.storages.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out

    def compute(self, function, types, args, kwargs):
        """What the operation returns."""
        given = tensors_of(args, kwargs)
        is_fake = any(isinstance(x, FakeTensor) for x in given)
        if self.fake is None or (given and not is_fake):
            return function(*args, **kwargs)
        if function is torch.ops.aten._local_scalar_dense.default:
            return torch.ones((), dtype=args[0].dtype).item()
        # A fake tensor has no numbers to draw, and refuses a generator.
        options = {k: None if isinstance(x, torch.Generator) else x for k, x in kwargs.items()}
        out = self.fake.__torch_dispatch__(function, types, args, options)
        if is_fake and isinstance(out, torch.Tensor) and out.ndim == 0:
            return torch.ones((), dtype=out.dtype)
        if is_fake or sum(x.numel() for x in tensors_of(out)) > self.small:
            return out
        return function(*args, **kwargs)

    def forget(self, key, size):
        """A storage died."""
        self.storages.discard(key)
        self.live -= size

    def restart(self):
        """Forget the peak so far; what only a cycle of references holds is freed before."""
        gc.collect()
        self.peak = self.live


# ---- Memory: models of full size -----------------------------------------------------------------
def make_clip(width, layers, heads, projection):
    """A text encoder of CLIP's form."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=width,
    )
    return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


def make_denoiser(name):
    """The denoiser of Stable Diffusion 1.5, XL, 3.5 Medium, or of FLUX.1-dev."""
    import diffusers

    if name == "sd15":
        return diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    if name == "flux":
        return diffusers.FluxTransformer2DModel(guidance_embeds=True)
    if name == "sd3":
        net = diffusers.SD3Transformer2DModel(
            num_layers=24,
            num_attention_heads=24,
            caption_projection_dim=1536,
            pos_embed_max_size=384,
            dual_attention_layers=tuple(range(13)),
            qk_norm="rms_norm",
        )
        # A table in fp32, which from_pretrained casts.
        net.pos_embed.pos_embed = net.pos_embed.pos_embed.to(torch.get_default_dtype())
        return net
    return diffusers.UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        transformer_layers_per_block=(1, 2, 10),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def make_pipeline(name, tracker):
    """A preset's pipeline with networks of full size, and the tokenizer of examples/tiny."""
    import diffusers
    import transformers

    with mock.patch.object(untrained.pretrain, "TOKENS", 77):
        tiny = untrained.make_pipelines()[name]
    parts = dict(tiny.components)
    # Every parameter is fake, as operations on fake tensors alone are cached.
    tracker.small = 0
    projection = name in ("sdxl", "sd3")
    parts["text_encoder"] = make_clip(768, 12, 12, projection)
    if projection:
        parts["text_encoder_2"] = make_clip(1280, 32, 20, projection)
    if name in ("sd3", "flux"):
        # The encoder of T5-XXL.
        form = dict(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)
        t5 = transformers.T5EncoderModel(
            transformers.T5Config(feed_forward_proj="gated-gelu", **form)
        )
        parts["text_encoder_3" if name == "sd3" else "text_encoder_2"] = t5
    parts["vae"] = diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4 if name in ("sd15", "sdxl") else 16,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        shift_factor=0.0,
    )
    parts["unet" if "unet" in parts else "transformer"] = make_denoiser(name)
    del tracker.small
    return type(tiny)(**parts)


# ---- Memory: an iteration ------------------------------------------------------------------------
def make_loop(config, make):
    """nft.py's loop on a pipeline of a maker, with AdamW's state, as nft.train has it on CUDA."""
    torch.set_default_dtype(nft.PRECISIONS[config.precision])
    pipe = make()
    torch.set_default_dtype(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.vae.enable_slicing()
    with (
        mock.patch.object(nft, "load_pipeline", lambda *args: pipe),
        # It is where it should be, and fake parameters cannot be moved.
        mock.patch.object(torch.nn.Module, "to", lambda module, *args, **more: module),
        # Fake tensors have no numbers to check.
        mock.patch.object(nft.Model, "refuse", lambda *args: None),
    ):
        loop = Loop(nft.Model(config))
    for x in loop.model.lora.adapters["theta"]:
        x.grad = torch.zeros_like(x)
    loop.optimizer.step()
    return loop


def peaks_of(loop, tracker, batch):
    """Bytes at the peak: of the rollout, of training, and of training with --checkpointing."""
    loop.config.batch_size = batch
    tracker.restart()
    rewards = {"darkness": (1.0, lambda images, *more: -images.mean((1, 2, 3)))}
    D = loop.collect(rewards, [("a red circle", {})] * (4 * batch))
    peaks = [tracker.peak]
    loop.config.group_size = batch
    D = nft.map_tensors(lambda x: x[:batch].clone(), D)
    # D lies on the CPU, of which all is here.
    size = sum(x.untyped_storage().nbytes() for x in tensors_of(D))
    net = loop.model.net
    for how in (net.disable_gradient_checkpointing, net.enable_gradient_checkpointing):
        how()
        tracker.restart()
        loop.train(D)
        peaks.append(tracker.peak - size)
    return peaks


def simulate(name, words=(), batches=(1, 4, 8)):
    """A preset's rows of the table, one a batch size; words: flags of nft.py."""
    own = ["--groups=1", "--steps=2", "--updates=1", "--train-times=1", "--no-checkpointing"]
    own += [f"--model={name}", "--precision=bf16", "--device=cpu", "--out=unused"]
    config = nft.parse([*own, *words])
    with Tracker(fake=True) as tracker:
        loop = make_loop(config, functools.partial(make_pipeline, name, tracker))
        for batch in batches:
            numbers = [f"{size / 1e9:.1f}" for size in peaks_of(loop, tracker, batch)]
            yield [name, str(batch), *numbers]


def main(argv=None):
    """Run the command line."""
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--simulate", action="store_true", help="memory, not seconds")
    parser.add_argument("--of", help="presets, such as sd15,sd3")
    own, words = parser.parse_known_args(argv)
    measure = compare
    names = "tiny,tiny-sd3"
    head = ["model", "nft.py, s", "plain, s", "plain over nft.py", "apart", *PARTS]
    if own.simulate:
        measure = simulate
        names = "sd15,sdxl,sd3,flux"
        head = ["simulated, GB", "batch", "rollout", "training", "training, `--checkpointing`"]
    rows = [head, ["---"] * len(head)]
    for name in (own.of or names).split(","):
        rows += measure(name, words)
    for row in rows:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
