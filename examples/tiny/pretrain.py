"""Make examples/tiny/sd15 and examples/tiny/sd3 from nothing: pipelines that paint shapes.

One AutoencoderKL serves both. sd15 is a StableDiffusionPipeline (UNet2DConditionModel,
eps-prediction on SD1.5's noise schedule). sd3 is a StableDiffusion3Pipeline (SD3Transformer2DModel,
flow matching, with a T5 that says nothing). At first the captions are true. In the last steps a
share of them (`--noise`) belongs to another picture, so that without guidance the base model
follows its prompt in about a third of the cases: that leaves room for reinforcement learning.
Held-out compositions are never shown. The seed is fixed, and no package beyond nft.py's own is
needed.

    python examples/tiny/pretrain.py                   # both, with the settings one would take now

The shipped weights were found in stages, each tuned on what the last one gave. Here P stands for
`python examples/tiny/pretrain.py --only`:

    P vae
    P sd15 --noise 0.6 --noisy-share 0.25
    P sd15 --more --steps 2100
    P sd15 --more --steps 300 --noise 0.38 --noisy-share 1 --images 20000 --keep 0.4
    P sd3 --noise 0.3 --noisy-share 0.1
    P sd3 --more --steps 2600 --noise 0
    P sd3 --more --steps 300 --noise 0.4 --noisy-share 1 --images 20000 --keep 0.45
    P sd3 --more --steps 5000 --noise 0
    P sd3 --more --steps 2000 --noise 0 --images 60000 --weights 1,3.5,3.5,2 --shift-t 0.7 --seed 5
    P sd3 --more --steps 300 --noise 0.4 --noisy-share 1 --images 20000 --keep 0.285

SPDX-License-Identifier: MIT
"""

import argparse
import collections
import itertools
import math
import random
import string
from pathlib import Path

import shapes
import torch
import torch.nn.functional as F
from tqdm import tqdm

# The longest caption has 10 tokens, with start and end.
TOKENS = 12
VAE_BATCH = 64
DENOISER_BATCH = 128
# Prompts of each category in the lists that nft.py trains and evaluates on.
PROMPTS = {"train": 240, "heldout": 64}
# Steps of training a denoiser, where --steps does not say.
STEPS = {"sd15": 8000, "sd3": 7000}


# ---- The parts of the pipelines ------------------------------------------------------------------
def grammar_words():
    """All words of all captions, sorted."""
    words = set()
    for split in PROMPTS:
        for texts in shapes.captions(split).values():
            for text in texts:
                words.update(text.split())
    return sorted(words)


def merge(tokens, pair):
    """Join each two neighbours that are `pair`, in place, from the end of a list of tokens."""
    for i in reversed(range(1, len(tokens))):
        if (tokens[i - 1], tokens[i]) == pair:
            tokens[i - 1 : i + 1] = ["".join(pair)]


def byte_pairs(words):
    """Byte-pair encoding until each word is one token: the pairs that are merged, in order."""
    split = [[*word[:-1], word[-1] + "</w>"] for word in words]
    pairs = []
    while any(len(tokens) > 1 for tokens in split):
        counts = collections.Counter()
        for tokens in split:
            counts.update(itertools.pairwise(tokens))
        # Of equally frequent pairs the first in the alphabet.
        pair = max(sorted(counts), key=counts.get)
        pairs.append(pair)
        for tokens in split:
            merge(tokens, pair)
    return pairs


def make_tokenizer():
    """A CLIPTokenizer of about 150 tokens: one for each word of the grammar, and all characters."""
    from transformers import CLIPTokenizer

    letters = string.ascii_lowercase + string.digits + string.punctuation
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters]
    tokens += [letter + "</w>" for letter in letters]
    pairs = byte_pairs(grammar_words())
    tokens += ["".join(pair) for pair in pairs]
    numbers = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=numbers, merges=pairs, model_max_length=TOKENS)


def make_text_encoder(tokenizer, width, layers, projection=False):
    """A small CLIP text encoder: (B, 12) token numbers -> (B, 12, width)."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    if projection:
        return CLIPTextModelWithProjection(config)
    return CLIPTextModel(config)


def make_silent_t5(tokenizer, width):
    """A T5 encoder that answers every token with zeros.

    Zeros are what StableDiffusion3Pipeline itself feeds where T5 is left out; from_pretrained
    wants a T5 in the directory all the same.
    """
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=8,
        d_ff=16,
        num_layers=1,
        num_heads=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    t5 = T5EncoderModel(config)
    torch.nn.init.zeros_(t5.encoder.final_layer_norm.weight)
    return t5


def make_vae():
    """An untrained AutoencoderKL: (B, 3, 32, 32) in [-1, 1] <-> (B, 4, 8, 8)."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 48),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
        force_upcast=False,
    )


def make_sd15(vae):
    """An untrained StableDiffusionPipeline with 1.7 million parameters in its UNet."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    tokenizer = make_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(48, 80),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=96,
        norm_num_groups=8,
        attention_head_dim=8,
    )
    # SD1.5's own numbers.
    scheduler = DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=make_text_encoder(tokenizer, width=96, layers=3),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def make_sd3(vae):
    """An untrained StableDiffusion3Pipeline with 1.8 million parameters in its transformer."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    tokenizer = make_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=28,
        num_attention_heads=4,
        joint_attention_dim=128,
        caption_projection_dim=112,
        pooled_projection_dim=128,
        pos_embed_max_size=8,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=make_text_encoder(tokenizer, width=64, layers=2, projection=True),
        tokenizer=tokenizer,
        text_encoder_2=make_text_encoder(tokenizer, width=64, layers=2, projection=True),
        tokenizer_2=tokenizer,
        text_encoder_3=make_silent_t5(tokenizer, width=128),
        tokenizer_3=tokenizer,
    )


# ---- Training ------------------------------------------------------------------------------------
def dataset(count, seed, weights=(1, 1, 1, 1)):
    """`count` pictures (N, 3, 32, 32) in [0, 1] and their N captions, all of the training split.

    weights: the shares of the four categories, in the order of shapes.CATEGORIES.
    """
    rng = random.Random(seed)
    pools = shapes.captions("train")
    categories = rng.choices(shapes.CATEGORIES, weights, k=count)
    texts = [rng.choice(pools[category]) for category in categories]
    return shapes.render(texts, seed), texts


def optimize(parameters, loss_of, steps, lr, name):
    """AdamW with 200 steps of warm-up and a cosine to 1% of `lr`. loss_of(step) -> scalar."""

    def rate(step):
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
        return min(1, (step + 1) / 200) * max(0.01, cosine)

    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=1e-3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    mean = 0.0
    bar = tqdm(range(steps), desc=name, mininterval=2)
    for step in bar:
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        mean += (loss.item() - mean) * max(0.01, 1 / (step + 1))
        bar.set_postfix(loss=f"{mean:.4f}", refresh=False)


@torch.no_grad()
def encode(vae, images):
    """Pictures (N, 3, 32, 32) in [0, 1] -> latents (N, 4, 8, 8): the means of their posteriors."""
    means = [vae.encode(some * 2 - 1).latent_dist.mean for some in images.split(256)]
    return torch.cat(means)


@torch.no_grad()
def round_trip_accuracy(vae):
    """The share of 2000 pictures that the checker still accepts after encoding and decoding."""
    images, texts = dataset(2000, seed=1)
    decoded = vae.decode(encode(vae, images)).sample
    passed = shapes.check((decoded / 2 + 0.5).clamp(0, 1), texts)
    return sum(passed) / len(texts)


def train_vae(images, steps):
    """An autoencoder trained on `images` (N, 3, 32, 32).

    The loss is the absolute and the squared error of the pixels, and a small KL divergence that
    keeps the latents smooth.
    """
    vae = make_vae()

    def loss_of(_):
        index = torch.randint(len(images), (VAE_BATCH,))
        x = images[index] * 2 - 1
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample
        error = (y - x).abs().mean() + (y - x).pow(2).mean()
        return error + 2e-3 * posterior.kl().mean() / 256

    optimize(list(vae.parameters()), loss_of, steps, 2e-3, "vae")
    # Both pipelines scale latents to spread 1 over all entries (SD1.5's has no shift).
    spread = encode(vae, images[:4096]).std().item()
    vae.register_to_config(scaling_factor=1 / spread, shift_factor=0.0)
    return vae.eval().requires_grad_(False)


def is_flow(pipe):
    """Whether a pipeline is sd3, which learns a velocity; sd15 learns the noise."""
    return hasattr(pipe, "transformer")


def trained_parts(pipe):
    """The denoiser and the text encoders that learn; T5 stays silent."""
    if is_flow(pipe):
        return [pipe.transformer, pipe.text_encoder, pipe.text_encoder_2]
    return [pipe.unet, pipe.text_encoder]


def predict_noise(pipe, x_0, eps, captions):
    """sd15's output and its target, each (B, 4, 8, 8), at random times."""
    t = torch.randint(1000, (len(x_0),))
    x_t = pipe.scheduler.add_noise(x_0, eps, t)
    embeds, _ = pipe.encode_prompt(captions, "cpu", 1, False)
    return pipe.unet(x_t, t, embeds).sample, eps


def predict_velocity(pipe, x_0, eps, captions, shift_t, rng):
    """sd3's output and its target, each (B, 4, 8, 8), at logit-normal times, as SD3's."""
    t = torch.sigmoid(torch.randn(len(x_0)) + shift_t)
    share = t.view(-1, 1, 1, 1)
    x_t = (1 - share) * x_0 + share * eps
    # Any number of T5's zeros must do, the pipeline's default of 256 too; two cost least.
    (zeros,) = rng.choices((2, 16, 64, 256), (78, 15, 6, 1))
    embeds, _, pooled, _ = pipe.encode_prompt(
        captions,
        captions,
        captions,
        do_classifier_free_guidance=False,
        max_sequence_length=zeros,
    )
    return pipe.transformer(x_t, embeds, pooled, t * 1000).sample, eps - x_0


def spoil(caption, texts, wrong, rng):
    """The caption to train with: none in a tenth of the cases, so that guidance is possible.

    In the share `wrong` of the other cases it is that of any picture.
    """
    u = rng.random()
    if u < 0.1:
        return ""
    if u < 0.1 + 0.9 * wrong:
        return rng.choice(texts)
    return caption


@torch.no_grad()
def follow(average, parameters, step):
    """Move a running mean of the weights towards them; it forgets more slowly with time."""
    decay = min(0.99, (1 + step / 10) / (10 + step / 10))
    for mean, parameter in zip(average, parameters, strict=True):
        mean.lerp_(parameter, 1 - decay)


def train_denoiser(pipe, images, texts, args, steps, name):
    """Train a pipeline's denoiser and text encoders; what stays is a running mean of the weights.

    With --keep, the weights from before this call keep that share.
    """
    latents = encode(pipe.vae, images) * pipe.vae.config.scaling_factor
    parameters = [x for part in trained_parts(pipe) for x in part.parameters()]
    average = [x.detach().clone() for x in parameters]
    start = [x.detach().clone() for x in parameters]
    rng = random.Random(1)

    def loss_of(step):
        late = step >= (1 - args.noisy_share) * steps
        wrong = args.noise if late else 0.0
        index = torch.randint(len(latents), (DENOISER_BATCH,))
        captions = [spoil(texts[i], texts, wrong, rng) for i in index.tolist()]
        x_0 = latents[index]
        eps = torch.randn_like(x_0)
        with torch.autocast("cpu", torch.bfloat16):
            if is_flow(pipe):
                out, target = predict_velocity(pipe, x_0, eps, captions, args.shift_t, rng)
            else:
                out, target = predict_noise(pipe, x_0, eps, captions)
        if step % 10 == 0:
            follow(average, parameters, step)
        return F.mse_loss(out.float(), target)

    optimize(parameters, loss_of, steps, 1e-3 if args.more else 2e-3, name)
    for parameter, mean, before in zip(parameters, average, start, strict=True):
        parameter.data.copy_(args.keep * before + (1 - args.keep) * mean)


# ---- The command line ----------------------------------------------------------------------------
def measure(pipe, texts, **call):
    """The share of right pictures, of each category and of all: {category or "all": share}.

    `call`: the pipeline's further arguments.
    """
    pipe.set_progress_bar_config(disable=True)
    images = []
    for i in range(0, len(texts), 64):
        noise = torch.Generator().manual_seed(i)
        done = pipe(texts[i : i + 64], output_type="pt", generator=noise, **call)
        images.append(done.images)
    passed = {category: [] for category in [*shapes.CATEGORIES, "all"]}
    for text, right in zip(texts, shapes.check(torch.cat(images), texts), strict=True):
        category, _, _ = shapes.parse(text)
        passed[category].append(right)
        passed["all"].append(right)
    return {category: sum(right) / len(right) for category, right in passed.items()}


def save(pipe, folder):
    """Write a pipeline with weights in fp16 that loads in fp32 unless asked otherwise."""
    pipe.to(torch.float16).save_pretrained(folder)
    # transformers would take fp16 from here.
    for file in folder.glob("text_encoder*/config.json"):
        text = file.read_text()
        file.write_text(text.replace('"dtype": "float16"', '"dtype": "float32"'))


def shares(text):
    """Four numbers, separated by commas, of the command line."""
    numbers = [float(number) for number in text.split(",")]
    if len(numbers) != len(shapes.CATEGORIES):
        raise ValueError
    return numbers


def parse(argv=None):
    """The command line's settings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path(__file__).resolve().parent)
    add("--only", choices=["vae", "sd15", "sd3"], help="vae: stop after it; else reuse it")
    add("--more", action="store_true", help="train the pipelines in --out further")
    add("--keep", type=float, default=0.0, help="with --more: share of the old weights")
    add("--noise", type=float, default=0.3, help="share of wrong captions at the end")
    add("--noisy-share", type=float, default=0.15, help="share of steps that are the end")
    add("--vae-steps", type=int, default=2500)
    add("--steps", type=int, help=f"of each denoiser; default {STEPS}")
    add("--images", type=int, default=50000)
    categories = ", ".join(shapes.CATEGORIES)
    add("--weights", type=shares, default=[1.0] * 4, help=f"shares of {categories}")
    add("--shift-t", type=float, default=0.0, help="sd3: more noise in training where > 0")
    add("--seed", type=int, default=0)
    return parser.parse_args(argv)


def make_pipeline(name, vae, images, texts, args):
    """Train one pipeline, print its accuracy on held-out prompts, and save it."""
    torch.manual_seed(args.seed)
    pipe = make_sd15(vae) if name == "sd15" else make_sd3(vae)
    if args.more:
        pipe = type(pipe).from_pretrained(args.out / name, vae=vae)
        for part in trained_parts(pipe):
            part.train().requires_grad_()
    train_denoiser(pipe, images, texts, args, args.steps or STEPS[name], name)
    call = {"num_inference_steps": 20}
    if is_flow(pipe):
        call["max_sequence_length"] = 2
    held_out = shapes.prompt_list("heldout", PROMPTS["heldout"])
    for guidance in (1.0, 3.0):
        rows = measure(pipe, held_out, guidance_scale=guidance, **call)
        row = "  ".join(f"{category} {share:.2f}" for category, share in rows.items())
        print(f"{name}, guidance {guidance}: {row}")
    save(pipe, args.out / name)


def main(argv=None):
    """Write the prompts, train the autoencoder, then each pipeline."""
    args = parse(argv)
    import diffusers
    import transformers

    # Silent about captions that T5's two tokens cut.
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(args.seed)
    for split, count in PROMPTS.items():
        lines = shapes.prompt_list(split, count)
        (args.out / f"{split}.txt").write_text("\n".join(lines) + "\n")
    images, texts = dataset(args.images, args.seed, args.weights)
    if args.only in (None, "vae"):
        vae = train_vae(images, args.vae_steps)
        share = round_trip_accuracy(vae)
        print(f"vae: {share:.3f} of the round trips pass the checker")
        vae.save_pretrained(args.out / "vae")
    vae = diffusers.AutoencoderKL.from_pretrained(args.out / "vae").requires_grad_(False)
    for name in STEPS:
        if args.only in (None, name):
            make_pipeline(name, vae, images, texts, args)


if __name__ == "__main__":
    main()
