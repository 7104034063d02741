"""Make examples/tiny/sd15 and examples/tiny/sd3 from nothing: pipelines that paint shapes.

    python examples/tiny/pretrain.py             # all, in hours; or one of: vae sd15 sd3

One AutoencoderKL serves both. sd15 is a StableDiffusionPipeline (UNet2DConditionModel,
eps-prediction on SD1.5's noise schedule). sd3 is a StableDiffusion3Pipeline (SD3Transformer2DModel,
flow matching, with a T5 that says nothing). At first the captions are true. In the last steps a
share of them belongs to another picture, so that without guidance the base model follows its prompt
in about a third of the cases: that leaves room for reinforcement learning. Held-out compositions
are never shown. The stages below were found one by one, each tuned on what the last one gave. The
seeds are fixed, and no package beyond nft.py's own is needed.
SPDX-License-Identifier: MIT
"""

import collections
import itertools
import math
import random
import string
import sys
import typing
from pathlib import Path

import diffusers
import shapes
import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm

# What is made, and the autoencoder, lie here.
ROOT = Path(__file__).resolve().parent
# The longest caption has 10 tokens, with start and end.
TOKENS = 12
# Prompts of each category in the lists that nft.py trains and evaluates on.
PROMPTS = {"train": 240, "heldout": 64}


class Stage(typing.NamedTuple):
    """A part of a denoiser's training."""

    steps: int
    # The share of wrong captions, and that of the steps, the last ones, that have them.
    noise: float = 0.0
    noisy_share: float = 0.15
    images: int = 50000
    # The share that the weights from before this stage keep.
    keep: float = 0.0
    # Of the pictures, those of each of shapes.CATEGORIES.
    weights: tuple = (1, 1, 1, 1)
    # sd3: more noise in training where > 0.
    shift_t: float = 0.0
    seed: int = 0


STAGES = {
    "sd15": [
        Stage(8000, noise=0.6, noisy_share=0.25),
        Stage(2100, noise=0.3),
        Stage(300, noise=0.38, noisy_share=1, images=20000, keep=0.4),
    ],
    "sd3": [
        Stage(7000, noise=0.3, noisy_share=0.1),
        Stage(2600),
        Stage(300, noise=0.4, noisy_share=1, images=20000, keep=0.45),
        Stage(5000),
        Stage(2000, images=60000, weights=(1, 3.5, 3.5, 2), shift_t=0.7, seed=5),
        Stage(300, noise=0.4, noisy_share=1, images=20000, keep=0.285),
    ],
}


# ---- The parts of the pipelines ------------------------------------------------------------------
def byte_pairs(words):
    """Byte-pair encoding until each word is one token: the pairs that are merged, in order."""
    split = [f" {' '.join(word)}</w> " for word in words]
    pairs = []
    while True:
        counts = collections.Counter()
        for word in split:
            counts.update(itertools.pairwise(word.split()))
        if not counts:
            return pairs
        # Of equally frequent pairs the first in the alphabet.
        pair = max(sorted(counts), key=counts.get)
        pairs.append(pair)
        split = [word.replace(f" {pair[0]} {pair[1]} ", f" {pair[0]}{pair[1]} ") for word in split]


def make_tokenizer():
    """A CLIPTokenizer of about 150 tokens: one for each word of the grammar, and all characters."""
    letters = string.ascii_lowercase + string.digits + string.punctuation
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters]
    tokens += [letter + "</w>" for letter in letters]
    words = set(" ".join(shapes.grammar()).split())
    pairs = byte_pairs(sorted(words))
    tokens += ["".join(pair) for pair in pairs]
    numbers = {token: i for i, token in enumerate(tokens)}
    return transformers.CLIPTokenizer(vocab=numbers, merges=pairs, model_max_length=TOKENS)


def make_text_encoder(tokenizer, width, layers, projection=False):
    """A small CLIP text encoder: (B, 12) token numbers -> (B, 12, width)."""
    config = transformers.CLIPTextConfig(
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
        return transformers.CLIPTextModelWithProjection(config)
    return transformers.CLIPTextModel(config)


def make_silent_t5(tokenizer, width):
    """A T5 encoder that answers every token with zeros.

    Zeros are what StableDiffusion3Pipeline itself feeds where T5 is left out; from_pretrained
    wants a T5 in the directory all the same.
    """
    config = transformers.T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=8,
        d_ff=16,
        num_layers=1,
        num_heads=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    t5 = transformers.T5EncoderModel(config)
    torch.nn.init.zeros_(t5.encoder.final_layer_norm.weight)
    return t5


def make_vae():
    """An untrained AutoencoderKL: (B, 3, 32, 32) in [-1, 1] <-> (B, 4, 8, 8)."""
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 48),
        norm_num_groups=8,
        force_upcast=False,
    )


def make_sd15(vae):
    """An untrained StableDiffusionPipeline with 1.7 million parameters in its UNet."""
    tokenizer = make_tokenizer()
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(48, 80),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=96,
        norm_num_groups=8,
        attention_head_dim=8,
    )
    # SD1.5's own numbers.
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )
    return diffusers.StableDiffusionPipeline(
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
    tokenizer = make_tokenizer()
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
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
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
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
    """`count` pictures (N, 3, 32, 32) in [0, 1] and their N captions, all of the training split."""
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
    for step in tqdm(range(steps), desc=name, mininterval=2):
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def encode(vae, images):
    """Pictures (N, 3, 32, 32) in [0, 1] -> latents (N, 4, 8, 8): the means of their posteriors."""
    means = [vae.encode(some * 2 - 1).latent_dist.mean for some in images.split(256)]
    return torch.cat(means)


def train_vae():
    """Train the autoencoder, print what share of round trips the checker accepts, and save it.

    The loss is the absolute and the squared error of the pixels, and a small KL divergence that
    keeps the latents smooth.
    """
    torch.manual_seed(0)
    images, _ = dataset(50000, seed=0)
    vae = make_vae()

    def loss_of(_):
        index = torch.randint(len(images), (64,))
        x = images[index] * 2 - 1
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample
        error = (y - x).abs().mean() + (y - x).pow(2).mean()
        return error + 2e-3 * posterior.kl().mean() / 256

    optimize(list(vae.parameters()), loss_of, 2500, 2e-3, "vae")
    # Both pipelines scale latents to spread 1 over all entries (SD1.5's has no shift).
    spread = encode(vae, images[:4096]).std().item()
    vae.register_to_config(scaling_factor=1 / spread, shift_factor=0.0)
    images, texts = dataset(2000, seed=1)
    with torch.no_grad():
        decoded = vae.decode(encode(vae, images)).sample
    passed = shapes.check((decoded / 2 + 0.5).clamp(0, 1), texts)
    print(f"vae: {sum(passed) / len(passed):.3f} of the round trips pass the checker")
    vae.save_pretrained(ROOT / "vae")


def predict(pipe, x_0, eps, captions, shift_t, rng):
    """A denoiser's output and its target, each (B, 4, 8, 8), at random times: sd15's, or sd3's."""
    if hasattr(pipe, "unet"):
        t = torch.randint(1000, (len(x_0),))
        x_t = pipe.scheduler.add_noise(x_0, eps, t)
        embeds, _ = pipe.encode_prompt(captions, "cpu", 1, False)
        return pipe.unet(x_t, t, embeds).sample, eps

    # Logit-normal times, as SD3's.
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


def train_denoiser(pipe, stage, lr, name):
    """Train a denoiser and its text encoders; what stays is a running mean of their weights."""
    images, texts = dataset(stage.images, stage.seed, stage.weights)
    latents = encode(pipe.vae, images) * pipe.vae.config.scaling_factor
    if hasattr(pipe, "unet"):
        parts = [pipe.unet, pipe.text_encoder]
    else:
        # T5 stays silent.
        parts = [pipe.transformer, pipe.text_encoder, pipe.text_encoder_2]
    parameters = []
    for part in parts:
        parameters += part.train().requires_grad_().parameters()
    average = [x.detach().clone() for x in parameters]
    start = [x.detach().clone() for x in parameters]
    rng = random.Random(1)

    def loss_of(step):
        late = step >= (1 - stage.noisy_share) * stage.steps
        wrong = stage.noise if late else 0.0
        index = torch.randint(len(latents), (128,))
        captions = [spoil(texts[i], texts, wrong, rng) for i in index.tolist()]
        x_0 = latents[index]
        eps = torch.randn_like(x_0)
        with torch.autocast("cpu", torch.bfloat16):
            out, target = predict(pipe, x_0, eps, captions, stage.shift_t, rng)
        if step % 10 == 0:
            # It forgets more slowly with time.
            decay = min(0.99, (1 + step / 10) / (10 + step / 10))
            for mean, parameter in zip(average, parameters, strict=True):
                mean.lerp_(parameter.detach(), 1 - decay)
        return F.mse_loss(out.float(), target)

    optimize(parameters, loss_of, stage.steps, lr, name)
    for parameter, mean, before in zip(parameters, average, start, strict=True):
        parameter.data.copy_(stage.keep * before + (1 - stage.keep) * mean)


@torch.no_grad()
def accuracy(pipe, guidance):
    """The share of right pictures of the held-out prompts."""
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 20, "guidance_scale": guidance, "output_type": "pt"}
    if hasattr(pipe, "transformer"):
        call["max_sequence_length"] = 2
    texts = shapes.prompt_list("heldout", PROMPTS["heldout"])
    passed = []
    for i in range(0, len(texts), 64):
        noise = torch.Generator().manual_seed(i)
        some = texts[i : i + 64]
        passed += shapes.check(pipe(some, generator=noise, **call).images, some)
    return sum(passed) / len(passed)


def save(pipe, folder):
    """Write a pipeline with weights in fp16 that loads in fp32 unless asked otherwise."""
    pipe.to(torch.float16).save_pretrained(folder)
    # transformers would take fp16 from here.
    for file in folder.glob("text_encoder*/config.json"):
        text = file.read_text()
        file.write_text(text.replace('"dtype": "float16"', '"dtype": "float32"'))


def make_pipeline(name):
    """Train a pipeline in its stages; after each print its accuracy and save it."""
    for i, stage in enumerate(STAGES[name]):
        vae = diffusers.AutoencoderKL.from_pretrained(ROOT / "vae").requires_grad_(False)
        torch.manual_seed(stage.seed)
        pipe = make_sd15(vae) if name == "sd15" else make_sd3(vae)
        if i > 0:
            pipe = type(pipe).from_pretrained(ROOT / name, vae=vae)
        train_denoiser(pipe, stage, 1e-3 if i > 0 else 2e-3, name)
        for guidance in (1.0, 3.0):
            print(f"{name}, stage {i}, guidance {guidance}: {accuracy(pipe, guidance):.3f}")
        save(pipe, ROOT / name)


def main(names):
    """Write the prompts, then make each of `names`: vae, sd15, sd3."""
    # Silent about captions that T5's two tokens cut.
    diffusers.utils.logging.set_verbosity_error()
    for split, count in PROMPTS.items():
        lines = shapes.prompt_list(split, count)
        (ROOT / f"{split}.txt").write_text("\n".join(lines) + "\n")
    for name in names:
        if name == "vae":
            train_vae()
        else:
            make_pipeline(name)


if __name__ == "__main__":
    main(sys.argv[1:] or ["vae", *STAGES])
