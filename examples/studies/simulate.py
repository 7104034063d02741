"""What a run needs of a GPU's memory, simulated: full-size models without weights, memory or GPU.

    python examples/studies/bench.py --simulate                # sd15, sdxl, sd3 and flux
    python examples/studies/bench.py --simulate sd15,sd3 --rank 64 --resolution 768
    MALLOC_MMAP_THRESHOLD_=1000000 python examples/studies/simulate.py     # the check, 7 GB of RAM

Every figure that bench.py --simulate prints is simulated; none was seen on a GPU. The models are
diffusers' and transformers' own classes at the size of the released ones. Their tensors are
PyTorch's FakeTensors, which have a shape and no numbers. nft.py's own Model, collect and optimize
work on them, and a tracker adds up the bytes of all tensors that are alive. It sees what PyTorch's
CPU kernels hand out. It does not see what is inside one: the workspace of a convolution, the blocks
that CUDA's allocator keeps, CUDA itself. Weights count, and so do theta, old, EMA, gradients, AdamW
and D, an iteration's 192 images. A reward's model does not: `aesthetic` brings 1.7 GB more.

What the simulation changes of a run:

- One batch is sampled, the last of an iteration. The others' rows of D are copies.
- The rollout has two steps. A further one leaves one x_t and one output of the denoiser behind.
- One batch of pairs is trained on, after an optimizer step that made AdamW's state.
- Prompts are cut by the tokenizer of examples/tiny, which pads to the released one's length.

Run by itself this file checks the simulation on sd15, batch 1, in fp32 on the CPU. It builds the
same model with random weights and prints the simulated peak beside what the tracker finds with real
tensors, and beside what the process took from the system by /proc (Linux). The variable makes the C
library give freed memory back. Found: simulated and tracked are equal to 0.01 GB; the process took
5.39 GB in the rollout (simulated 5.15), 6.13 in training (6.10), 4.96 with checkpointing (4.88).
SPDX-License-Identifier: MIT
"""

import dataclasses
import functools
import gc
import re
import sys
import weakref
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))
sys.path.insert(0, str(REPOSITORY / "examples" / "studies"))
import bench

import nft

# ---- The simulation, and the tracker -------------------------------------------------------------

# Tensors made of nothing with so many elements or fewer stay real: times, levels, tokens, indices.
SMALL = 4096


def tensors_of(tree):
    """The tensors in nested dicts, lists and tuples."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, (list, tuple)):
        return []
    found = []
    for x in tree:
        found += tensors_of(x)
    return found


class Tracker(TorchDispatchMode):
    """Counts the bytes of the storages of living tensors, fake or real; views count once.

    live: bytes now. peaks: {part: the most bytes while it worked}, see `watch`. It knows the
    tensors that operations returned while it was on, and those given to `add`.
    """

    def __init__(self):
        super().__init__()
        self.live = 0
        self.part = "rest"
        self.peaks = Counter()
        self.storages = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.prim.device.default:
            # Half of all calls are autograd's, which asks fake tensors where they are.
            return args[0].fake_device
        out = self.compute(function, types, args, kwargs or {})
        self.add(tensors_of(out))
        return out

    def compute(self, function, types, args, kwargs):
        """What the operation returns."""
        return function(*args, **kwargs)

    def add(self, tensors):
        """Count these from now on, until their storages die."""
        for x in tensors:
            storage = x.untyped_storage()
            key = storage._cdata
            if key not in self.storages:
                size = storage.nbytes()
                dies = functools.partial(self.forget, key, size)
                self.storages[key] = weakref.ref(storage, dies)
                self.live += size
        self.peaks[self.part] = max(self.peaks[self.part], self.live)

    def forget(self, key, size, reference):
        """A storage died."""
        del self.storages[key]
        self.live -= size

    def restart(self):
        """Forget the peaks so far; what only a cycle of references holds is freed before."""
        gc.collect()
        self.peaks = Counter({self.part: self.live})

    def peak(self):
        """The most bytes since the last restart."""
        return max(self.peaks.values())

    def watch(self, module, part):
        """What happens in the forward pass of a module is booked under the name `part`."""

        def enter(*args):
            self.part = part

        def leave(*args):
            self.part = "rest"

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)


class Simulation(Tracker):
    """A tracker under which new large tensors are fake, and all that is computed from a fake one.

    What is computed from real tensors alone is real, so that schedulers and tokenizers work. A
    single number that is asked of fake tensors is 1: is it finite, what is its norm.
    """

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def compute(self, function, types, args, kwargs):
        """As Tracker.compute."""
        given = tensors_of(args) + tensors_of(kwargs)
        is_fake = any(isinstance(x, FakeTensor) for x in given)
        if given and not is_fake:
            return function(*args, **kwargs)
        if function is torch.ops.aten._local_scalar_dense.default:
            return torch.ones((), dtype=args[0].dtype).item()
        options = without_generators(kwargs)
        out = self.fake.__torch_dispatch__(function, types, args, options)
        if is_fake:
            return number_or_fake(out)
        if sum(x.numel() for x in tensors_of(out)) > SMALL:
            return out
        return function(*args, **kwargs)


def without_generators(kwargs):
    """A fake tensor has no numbers to draw, and refuses a generator."""
    kept = {}
    for name, value in kwargs.items():
        kept[name] = None if isinstance(value, torch.Generator) else value
    return kept


def number_or_fake(out):
    """The real number 1 in place of a fake tensor of no dimensions."""
    if isinstance(out, torch.Tensor) and out.ndim == 0:
        return torch.ones((), dtype=out.dtype)
    return out


# ---- The models ----------------------------------------------------------------------------------


def make_t5():
    """The encoder of T5-XXL, which SD3 and FLUX read prompts with."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=32128,
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=24,
        num_heads=64,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config)


def make_sd3():
    """Stable Diffusion 3.5 Medium, with its T5."""
    pipe = bench.make_sd3()
    pipe.register_modules(text_encoder_3=make_t5())
    return pipe


def make_sdxl_unet():
    """The UNet of Stable Diffusion XL."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
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


def make_sdxl():
    """Stable Diffusion XL, the base."""
    import diffusers
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = bench.make_tokenizer()
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="leading",
    )
    large = bench.make_clip(CLIPTextModelWithProjection, tokenizer, 1280, 32, 20, "gelu")
    return diffusers.StableDiffusionXLPipeline(
        vae=bench.make_vae(4, sample_size=1024, scaling_factor=0.13025),
        text_encoder=bench.make_clip(CLIPTextModel, tokenizer, 768, 12, 12, "quick_gelu"),
        text_encoder_2=large,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=make_sdxl_unet(),
        scheduler=scheduler,
        add_watermarker=False,
    )


def make_flux_transformer():
    """The transformer of FLUX.1-dev."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        in_channels=64,
        num_layers=19,
        num_single_layers=38,
        attention_head_dim=128,
        num_attention_heads=24,
        joint_attention_dim=4096,
        pooled_projection_dim=768,
        guidance_embeds=True,
    )


def make_flux():
    """FLUX.1-dev."""
    import diffusers
    from transformers import CLIPTextModel

    tokenizer = bench.make_tokenizer()
    vae = bench.make_vae(
        16,
        sample_size=1024,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=bench.make_clip(CLIPTextModel, tokenizer, 768, 12, 12, "quick_gelu"),
        tokenizer=tokenizer,
        text_encoder_2=make_t5(),
        tokenizer_2=tokenizer,
        transformer=make_flux_transformer(),
    )


PIPELINES = {"sd15": bench.make_sd15, "sdxl": make_sdxl, "sd3": make_sd3, "flux": make_flux}


def networks(pipe):
    """The networks of a pipeline by their names in it."""
    found = {}
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            found[name] = part
    return found


def state(module):
    """The parameters and buffers of a network."""
    return [*module.parameters(), *module.buffers()]


def size_of(module):
    """Bytes of a network's parameters and buffers."""
    return sum(x.numel() * x.element_size() for x in state(module))


def build(make, dtype):
    """A pipeline of a maker of PIPELINES, its networks in `dtype`, as from_pretrained gives it."""
    torch.set_default_dtype(dtype)
    try:
        pipe = make()
    finally:
        torch.set_default_dtype(torch.float32)
    for part in networks(pipe).values():
        for module in part.modules():
            # SD3 makes a table of places in fp32, and from_pretrained casts it.
            for name, x in module._buffers.items():
                if x is not None and x.is_floating_point():
                    module._buffers[name] = x.to(dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def build_fake(make, dtype, simulation):
    """The same under a simulation. The small parameters are fake, too: that is faster."""
    pipe = build(make, dtype)
    for part in networks(pipe).values():
        for module in part.modules():
            for name, x in module._parameters.items():
                if x is not None and not isinstance(x, FakeTensor):
                    fake = simulation.fake.from_tensor(x.detach())
                    module._parameters[name] = torch.nn.Parameter(fake, requires_grad=False)
        simulation.add(state(part))
    # It is where it should be, and fake parameters cannot be moved.
    pipe.to = lambda *args: pipe
    return pipe


# ---- An iteration --------------------------------------------------------------------------------


class Rehearsal(nft.Model):
    """nft.Model of a pipeline in memory, which samples only the last batch of an iteration.

    The others are copies of what it sampled before.
    """

    def __init__(self, config, pipe):
        # The batch that it sampled before, and its pictures' height and width.
        self.last = None
        self.size = None
        loaded = {"load_config": lambda *args: {}, "from_pretrained": lambda *args, **more: pipe}
        with mock.patch.multiple("diffusers.DiffusionPipeline", **loaded):
            super().__init__(config)

    def sample(self, prompts, keys, policy):
        """As nft.Model.sample."""
        n = len(prompts)
        images = self.config.groups * self.config.group_size
        if self.last is None or keys[-1][-1] == images - 1:
            batch = super().sample(prompts, keys, policy)
            self.last = {"x_0": batch["x_0"], "condition": batch["condition"]}
            self.size = batch["images"].shape[-1]
            return batch
        batch = nft.map_tensors(lambda x: torch.cat([x] * n), one_row(self))
        return batch | {"images": torch.zeros(1).expand(n, 3, self.size, self.size)}


def one_row(model):
    """A row of D: the last image that the model sampled."""
    row = nft.map_tensors(lambda x: x[-1:], model.last)
    # The first sample of all is made to find out which arguments have no row an image.
    for name in model.shared:
        row["condition"].pop(name, None)
    return row


def make_run(config, pipe, tracker):
    """All that nft.optimize needs, with AdamW's state; the networks are watched."""
    for name, part in networks(pipe).items():
        if name == "vae":
            tracker.watch(part.decoder, "decoder")
        else:
            tracker.watch(part, "text" if "text" in name else "denoiser")
    run = bench.Loop("nft.py", Rehearsal(config, pipe), nft.pair_losses)
    for x in run.model.lora.adapters["theta"]:
        x.grad = torch.zeros_like(x)
    nft.gradient_step(run, 1)
    return run


def darkness(images, prompts, metadata):
    """A reward without a model."""
    return -images.mean((1, 2, 3))


def rollout(model):
    """nft.collect of an iteration's images: D without its pictures, which lie on the CPU."""
    N = model.config.groups * model.config.group_size
    numbered = [(i, "a red circle left of a blue square", {}) for i in range(N)]
    rewards = [nft.Reward("darkness", 1.0, darkness)]
    D = nft.collect(model, rewards, numbered, ("simulated",), "old")
    D.pop("images")
    D["r"] = torch.full((N,), 0.5)
    return D


def train(run, D, checkpointing):
    """nft.optimize on one batch of pairs."""
    if checkpointing:
        run.model.net.enable_gradient_checkpointing()
    size = run.model.config.batch_size
    alone = {"groups": 1, "group_size": size, "updates": 1, "train_times": 1}
    run.config = dataclasses.replace(run.model.config, **alone)
    nft.optimize(run, D, 2)
    run.model.lora.active = None
    if checkpointing:
        run.model.net.disable_gradient_checkpointing()


def decode_in_slices(model):
    """The decoder on a batch, an image at a time by diffusers' own method."""
    vae = model.pipe.vae
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    side = model.size // scale
    shape = (model.config.batch_size, vae.config.latent_channels, side, side)
    vae.enable_slicing()
    with torch.no_grad():
        vae.decode(torch.zeros(shape, dtype=model.dtype))
    vae.disable_slicing()


def measure(run, tracker, batch):
    """{what: bytes at the peak} of an iteration with so many images a batch."""
    model = run.model
    model.config.batch_size = batch
    tracker.restart()
    D = rollout(model)
    peaks = {part: tracker.peaks[part] for part in ("text", "denoiser", "decoder")}
    peaks["rollout"] = tracker.peak()
    tracker.restart()
    decode_in_slices(model)
    peaks["sliced"] = tracker.peak()
    for name, checkpointing in (("training", False), ("checkpointing", True)):
        tracker.restart()
        train(run, D, checkpointing)
        peaks[name] = tracker.peak()
    peaks["D"] = sum(x.numel() * x.element_size() for x in tensors_of(D))
    return peaks


# ---- The table -----------------------------------------------------------------------------------

BATCHES = (1, 4, 8)
DEFAULTS = ["--reward=jpeg", "--precision=bf16", "--device=cpu", "--steps=2", "--out=simulated"]
COLUMNS = {
    "text": "text",
    "denoiser": "denoiser",
    "decoder": "decoder",
    "rollout": "rollout",
    "training": "training",
    "checkpointing": "training, --checkpointing",
    "D": "D",
    "sliced": "decoder, a picture at a time",
    "without": "the same, checkpointing, no text encoders",
}


def without_text(peaks, text):
    """The peak with checkpointing and a sliced decoder, less the text encoders' bytes.

    By arithmetic: they are whole tensors, which are there or not. It is the peak of a run whose
    prompts were encoded while the denoiser was elsewhere. Encoders that merely leave after each
    batch's prompts leave the "text" column as it is.
    """
    return max(peaks["denoiser"], peaks["sliced"], peaks["checkpointing"]) - text


def simulate(name, words):
    """Print the rows of a preset; words: flags of nft.py.

    Returns the rows, (preset and pixels, batch, {column: bytes}), and {network: its bytes}.
    """
    rows = []
    config = nft.parse([f"--model={name}", *DEFAULTS, *words])
    with Simulation() as tracker:
        pipe = build_fake(PIPELINES[name], nft.pick_device(config)[1], tracker)
        sizes = {part: size_of(network) for part, network in networks(pipe).items()}
        text = sum(size for part, size in sizes.items() if "text" in part)
        run = make_run(config, pipe, tracker)
        for batch in BATCHES:
            peaks = measure(run, tracker, batch)
            peaks["without"] = without_text(peaks, text)
            numbers = [f"{peaks[key] / 1e9:.2f}" for key in COLUMNS]
            label = f"{name} {run.model.size}"
            print(f"| {label} | {batch} | {' | '.join(numbers)} |", flush=True)
            rows.append((label, batch, peaks))
    return rows, sizes


def main(names, words):
    """bench.py --simulate: print the table of these presets, and return its rows.

    Raises nft.UserError.
    """
    import diffusers
    import transformers

    unknown = [name for name in names if name not in PIPELINES]
    if unknown:
        rule = f"--simulate {unknown[0]}: must be of {', '.join(PIPELINES)}"
        raise nft.UserError(f"{rule}; leave it out for all")
    transformers.logging.set_verbosity_error()
    print(f"simulated, GB at the peak | torch {torch.__version__}", end=", ")
    print(f"diffusers {diffusers.__version__}, transformers {transformers.__version__}\n")
    print(f"| simulated | batch | {' | '.join(COLUMNS.values())} |")
    print("|" + " --- |" * (2 + len(COLUMNS)))
    rows = []
    weights = []
    for name in names:
        found, sizes = simulate(name, words)
        rows += found
        numbers = [f"{part} {size / 1e9:.2f}" for part, size in sizes.items()]
        weights.append(f"{name}: {', '.join(numbers)}")
    print("\nweights among these, GB:")
    print("\n".join(weights))
    return rows


# ---- The check -----------------------------------------------------------------------------------


def system_memory(field):
    """Bytes of this process as Linux counts them: VmRSS now, or VmHWM at the highest."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{field}:\s*(\d+)", text).group(1))


def phases(config, pipe, tracker):
    """[(phase, tracked bytes, the process's bytes)] at the peaks, of one image and one pair."""
    found = []

    def note(phase):
        found.append((phase, tracker.peak(), system_memory("VmHWM")))
        tracker.restart()
        # The kernel forgets the highest point, too.
        Path("/proc/self/clear_refs").write_text("5")

    tracker.restart()
    Path("/proc/self/clear_refs").write_text("5")
    # The model samples once when it is made.
    run = make_run(config, pipe, tracker)
    note("rollout")
    D = one_row(run.model) | {"r": torch.full((1,), 0.5)}
    train(run, D, checkpointing=False)
    note("training")
    train(run, D, checkpointing=True)
    note("training, --checkpointing")
    return found


def check(name="sd15", words=("--precision=fp32", "--batch-size=1")):
    """Print simulated and real peaks of a preset beside what the system gave to the process."""
    config = nft.parse([f"--model={name}", *DEFAULTS, *words])
    dtype = nft.pick_device(config)[1]
    with Simulation() as tracker:
        pipe = build_fake(PIPELINES[name], dtype, tracker)
        simulated = phases(config, pipe, tracker)
    del pipe
    gc.collect()
    before = system_memory("VmRSS")
    with Tracker() as tracker:
        pipe = build(PIPELINES[name], dtype)
        real = phases(config, pipe, tracker)
    print(f"{name}, batch {config.batch_size}, {dtype}, GB at the peak\n")
    print("| | simulated | tracked, real tensors | taken from the system | simulated over that |")
    print("| --- | --- | --- | --- | --- |")
    for (phase, expected, _), (_, tracked, process) in zip(simulated, real, strict=True):
        taken = process - before
        numbers = [f"{size / 1e9:.2f}" for size in (expected, tracked, taken)]
        print(f"| {phase} | {' | '.join(numbers)} | {expected / taken:.3f} |")


if __name__ == "__main__":
    check(*sys.argv[1:2])
