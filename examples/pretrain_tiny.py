"""Make examples/tiny-sd15 and examples/tiny-sd3 from nothing: real diffusers pipelines that paint shapes.py.

One AutoencoderKL serves both. tiny-sd15 is a StableDiffusionPipeline (UNet2DConditionModel,
eps-prediction on SD1.5's noise schedule), tiny-sd3 a StableDiffusion3Pipeline (SD3Transformer2DModel,
flow matching, a T5 that says nothing). First the captions are true; in the last steps a share of
them (`--noise`) belongs to another picture, so that without guidance the base model follows its
prompt in about a third of the cases: room for reinforcement learning. Held-out compositions are
never shown. A fixed seed, a progress bar, no package beyond nft.py's own.

    python examples/pretrain_tiny.py                   # both, with the settings that we would take now

The shipped weights were found in stages, each tuned on what the last one gave, a denoiser on one
core beside the other (P stands for `python examples/pretrain_tiny.py --only`):

    P vae
    P sd15 --noise 0.6 --noisy-share 0.25              # too noisy: 0.07 right without guidance
    P sd15 --more --steps 2100                         # 0.54
    P sd15 --more --steps 300 --noise 0.38 --noisy-share 1 --images 20000 --keep 0.4
    P sd3 --noise 0.3 --noisy-share 0.1
    P sd3 --more --steps 2600 --noise 0                # 0.62
    P sd3 --more --steps 300 --noise 0.4 --noisy-share 1 --images 20000 --keep 0.45
    P sd3 --more --steps 5000 --noise 0                # 0.62, and 0.74 with guidance 3
    P sd3 --more --steps 2000 --noise 0 --images 60000 --weights 1,3.5,3.5,2 --shift-t 0.7 --seed 5
                                                       # 0.64, and 0.76 with guidance 3
    P sd3 --more --steps 300 --noise 0.4 --noisy-share 1 --images 20000 --keep 0.285

SPDX-License-Identifier: MIT
"""
import argparse
import collections
import copy
import json
import math
import pathlib
import random
import string
import sys
import tempfile

import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import shapes  # noqa: E402

TOKENS = 12                                            # the longest caption has 10, with start and end


def make_tokenizer():
    """A CLIPTokenizer of about 150 tokens: every word of the grammar is one, the rest is spelled out."""
    from transformers import CLIPTokenizer
    words = {w for split in ("train", "heldout") for group in shapes.captions(split).values()
             for text in group for w in text.split()}
    letters = string.ascii_lowercase + string.digits + string.punctuation
    vocab = ["<|startoftext|>", "<|endoftext|>", *letters, *(c + "</w>" for c in letters)]
    merges, split = [], [[*w[:-1], w[-1] + "</w>"] for w in sorted(words)]
    while any(len(parts) > 1 for parts in split):      # byte-pair encoding until each word is one token
        pairs = collections.Counter(p for parts in split for p in zip(parts, parts[1:]))
        pair = max(sorted(pairs), key=pairs.get)
        merges.append(" ".join(pair))
        vocab.append("".join(pair))
        for parts in split:
            for i in range(len(parts) - 1, 0, -1):
                if tuple(parts[i - 1:i + 1]) == pair:
                    parts[i - 1:i + 1] = ["".join(pair)]
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(vocab)}))
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
        return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"),
                             model_max_length=TOKENS)


def make_text_encoder(tokenizer, width, layers, projection=False):
    """A small CLIP text encoder, (B, 12) token numbers -> (B, 12, width)."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=4, max_position_embeddings=TOKENS, projection_dim=width,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id)
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def make_silent_t5(tokenizer, width):
    """A T5 encoder that answers every token with zeros, which is what StableDiffusion3Pipeline itself
    feeds where T5 is left out; from_pretrained wants one in the directory all the same."""
    from transformers import T5Config, T5EncoderModel
    t5 = T5EncoderModel(T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=16, num_layers=1,
                                 num_heads=1, pad_token_id=tokenizer.pad_token_id))
    torch.nn.init.zeros_(t5.encoder.final_layer_norm.weight)
    return t5


def make_vae():
    """An AutoencoderKL: (B, 3, 32, 32) in [-1, 1] <-> (B, 4, 8, 8)."""
    from diffusers import AutoencoderKL
    return AutoencoderKL(
        in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, block_out_channels=(16, 32, 48), layers_per_block=1,
        latent_channels=4, norm_num_groups=8, sample_size=32, force_upcast=False)


def make_sd15(vae):
    """An untrained StableDiffusionPipeline of 1.7 M parameters in the UNet."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    tokenizer = make_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(48, 80), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=96, norm_num_groups=8,
        attention_head_dim=8)
    scheduler = DDIMScheduler(                         # SD1.5's own numbers
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type="epsilon")
    return StableDiffusionPipeline(
        vae=vae, text_encoder=make_text_encoder(tokenizer, 96, 3), tokenizer=tokenizer, unet=unet,
        scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def make_sd3(vae):
    """An untrained StableDiffusion3Pipeline of 1.8 M parameters in the transformer."""
    from diffusers import (FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel,
                           StableDiffusion3Pipeline)
    tokenizer = make_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=4, attention_head_dim=28,
        num_attention_heads=4, joint_attention_dim=128, caption_projection_dim=112,
        pooled_projection_dim=128, pos_embed_max_size=8)
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae,
        text_encoder=make_text_encoder(tokenizer, 64, 2, True), tokenizer=tokenizer,
        text_encoder_2=make_text_encoder(tokenizer, 64, 2, True), tokenizer_2=tokenizer,
        text_encoder_3=make_silent_t5(tokenizer, 128), tokenizer_3=tokenizer)


def dataset(count, seed, weights=(1, 1, 1, 1)):
    """`count` pictures (N, 3, 32, 32) and their captions, the four categories in parts of `weights`."""
    rng, pools = random.Random(seed), shapes.captions("train")
    texts = [rng.choice(pools[c]) for c in rng.choices(shapes.CATEGORIES, weights, k=count)]
    return shapes.render(texts, seed), texts


def optimize(parameters, loss_of, steps, lr, name):
    """AdamW with 200 steps of warm-up and a cosine to zero; loss_of(step) -> scalar."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=1e-3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, (s + 1) / 200) * max(
        0.01, 0.5 + 0.5 * math.cos(math.pi * s / steps)))
    mean = 0.0
    for step in (bar := tqdm(range(steps), desc=name, mininterval=2)):
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        mean += (loss.item() - mean) * max(0.01, 1 / (step + 1))
        bar.set_postfix(loss=f"{mean:.4f}", refresh=False)


def train_vae(images, steps):
    """Train the autoencoder: L1 and squared error of the pixels, and a small KL that keeps latents smooth."""
    vae, batch = make_vae(), 64
    def loss_of(_):
        x = images[torch.randint(len(images), (batch,))] * 2 - 1
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample
        return (y - x).abs().mean() + (y - x).pow(2).mean() + 2e-3 * posterior.kl().mean() / 256
    optimize(list(vae.parameters()), loss_of, steps, 2e-3, "vae")
    with torch.no_grad():
        z = torch.cat([vae.encode(x * 2 - 1).latent_dist.mean for x in images[:4096].split(256)])
    # Both pipelines scale latents to mean 0 and spread 1 over all entries (SD1.5's has no shift).
    vae.register_to_config(scaling_factor=1 / z.std().item(), shift_factor=0.0)
    return vae.eval().requires_grad_(False)


def train_denoiser(pipe, images, texts, steps, noise, noisy_share, lr, keep, shift_t, name):
    """Train denoiser and text encoders; the weights that remain are a running mean (EMA)."""
    vae, batch, rng = pipe.vae, 128, random.Random(1)
    with torch.no_grad():
        z = torch.cat([vae.encode(x * 2 - 1).latent_dist.mean for x in images.split(256)])
        z = z * vae.config.scaling_factor
    flow = hasattr(pipe, "transformer")
    models = [pipe.transformer, pipe.text_encoder, pipe.text_encoder_2] if flow else \
        [pipe.unet, pipe.text_encoder]
    parameters = [p for m in models for p in m.parameters()]
    mean, start = ([copy.deepcopy(p.data) for p in parameters] for _ in range(2))

    def embed(captions):
        if flow:
            # Any number of T5's zeros must do, the pipeline's default of 256 too; two cost least.
            zeros = rng.choices((2, 16, 64, 256), (78, 15, 6, 1))[0]
            return pipe.encode_prompt(captions, captions, captions, do_classifier_free_guidance=False,
                                      max_sequence_length=zeros)[::2]
        return (pipe.encode_prompt(captions, "cpu", 1, False)[0],)

    def loss_of(step):
        wrong = noise if step >= (1 - noisy_share) * steps else 0.0
        index = torch.randint(len(z), (batch,))
        captions = [texts[i] for i in index.tolist()]
        for i in range(batch):
            u = rng.random()                           # 10% no caption: guidance stays possible
            captions[i] = "" if u < 0.1 else rng.choice(texts) if u < 0.1 + 0.9 * wrong else captions[i]
        x_0 = z[index]
        eps = torch.randn_like(x_0)
        with torch.autocast("cpu", torch.bfloat16):
            if flow:
                t = torch.sigmoid(torch.randn(batch) + shift_t).view(-1, 1, 1, 1)    # logit-normal, as SD3
                embeds, pooled = embed(captions)
                out = pipe.transformer((1 - t) * x_0 + t * eps, embeds, pooled, t.view(-1) * 1000).sample
                target = eps - x_0
            else:
                t = torch.randint(1000, (batch,))
                out = pipe.unet(pipe.scheduler.add_noise(x_0, eps, t), t, *embed(captions)).sample
                target = eps
        if step % 10 == 0:
            decay = min(0.99, (1 + step / 10) / (10 + step / 10))
            for m, p in zip(mean, parameters):
                m.lerp_(p.data, 1 - decay)
        return F.mse_loss(out.float(), target)

    optimize(parameters, loss_of, steps, lr, name)
    for m, s, p in zip(mean, start, parameters):
        p.data.copy_(keep * s + (1 - keep) * m)


def measure(pipe, texts, **call):
    """Share of right pictures per category, and of all: [(category, share)]."""
    pipe.set_progress_bar_config(disable=True)
    images = torch.cat([
        pipe(texts[i:i + 64], output_type="pt", generator=torch.Generator().manual_seed(i), **call).images
        for i in range(0, len(texts), 64)])
    ok = shapes.check(images, texts)
    rows = {c: [o for o, t in zip(ok, texts) if shapes.parse(t)[0] == c] for c in shapes.CATEGORIES}
    return [(c, sum(v) / len(v)) for c, v in rows.items()] + [("all", sum(ok) / len(ok))]


def save(pipe, folder):
    """Write a pipeline with weights in fp16 that loads in fp32 unless asked otherwise."""
    pipe.to(torch.float16).save_pretrained(folder)
    for file in folder.glob("text_encoder*/config.json"):      # transformers would take fp16 from here
        file.write_text(file.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))


def main():
    """Command line: train the autoencoder, then each pipeline, print its accuracy, save it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent)
    parser.add_argument("--only", choices=["vae", "sd15", "sd3"], help="with vae: stop after it; else reuse it")
    parser.add_argument("--more", action="store_true", help="train the pipelines in --out further")
    parser.add_argument("--keep", type=float, default=0.0, help="with --more: share of the old weights")
    parser.add_argument("--noise", type=float, default=0.3, help="share of wrong captions at the end")
    parser.add_argument("--noisy-share", type=float, default=0.15, help="share of steps that are the end")
    parser.add_argument("--vae-steps", type=int, default=2500)
    parser.add_argument("--steps", type=int, help="of each denoiser; default 8000 for sd15, 7000 for sd3")
    parser.add_argument("--images", type=int, default=50000)
    parser.add_argument("--weights", type=lambda s: [float(x) for x in s.split(",")], default=[1.0] * 4,
                        help="shares of the categories " + ", ".join(shapes.CATEGORIES))
    parser.add_argument("--shift-t", type=float, default=0.0, help="sd3: more noise in training where > 0")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    import diffusers
    import transformers
    diffusers.utils.logging.set_verbosity_error()      # silent about captions that T5's two tokens cut
    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(args.seed)
    for split, number in (("train", 240), ("heldout", 64)):
        lines = shapes.prompt_list(split, number)
        (args.out / f"shapes_{split}.txt").write_text("\n".join(lines) + "\n")
    images, texts = dataset(args.images, args.seed, args.weights)
    if args.only in (None, "vae"):
        vae = train_vae(images, args.vae_steps)
        with torch.no_grad():
            clean, names = dataset(2000, seed=1)
            again = (vae.decode(vae.encode(clean * 2 - 1).latent_dist.mean).sample / 2 + 0.5).clamp(0, 1)
        print(f"vae: {sum(shapes.check(again, names)) / len(names):.3f} of the round trips pass the checker")
        vae.save_pretrained(args.out / "vae")
    vae = diffusers.AutoencoderKL.from_pretrained(args.out / "vae").requires_grad_(False)
    for name, make, steps in (("sd15", make_sd15, 8000), ("sd3", make_sd3, 7000)):
        if args.only not in (None, name):
            continue
        torch.manual_seed(args.seed)
        pipe = make(vae)
        if args.more:
            pipe = type(pipe).from_pretrained(args.out / f"tiny-{name}", vae=vae)
            for part in (getattr(pipe, "unet", None), getattr(pipe, "transformer", None),
                         pipe.text_encoder, getattr(pipe, "text_encoder_2", None)):
                part and part.train().requires_grad_()
        train_denoiser(pipe, images, texts, args.steps or steps, args.noise, args.noisy_share,
                       1e-3 if args.more else 2e-3, args.keep, args.shift_t, f"tiny-{name}")
        extra = {"max_sequence_length": 2} if name == "sd3" else {}
        for guidance in (1.0, 3.0):
            rows = measure(pipe, shapes.prompt_list("heldout", 64), num_inference_steps=20,
                           guidance_scale=guidance, **extra)
            print(f"tiny-{name}, guidance {guidance}:", "  ".join(f"{c} {v:.2f}" for c, v in rows))
        save(pipe, args.out / f"tiny-{name}")


if __name__ == "__main__":
    main()
