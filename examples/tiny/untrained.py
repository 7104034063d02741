"""Tiny untrained models in their real classes, under their real names, in a hub cache of their own.

    python examples/tiny/untrained.py /tmp/tiny
    HF_HUB_CACHE=/tmp/tiny/hub HF_HUB_OFFLINE=1 python nft.py --model sdxl --reward aesthetic \\
        --resolution 32 --groups 2 --iterations 2

So every preset of nft.py can be tried through its real loading path without a download: the
pictures are noise. The tests build theirs with it. It needs no package beyond nft.py's own.
SPDX-License-Identifier: MIT
"""

import shutil
import sys
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))
import pretrain

import nft

# What the rewards of nft.py and of examples/rewards load.
CLIP = "openai/clip-vit-large-patch14"
AESTHETIC = "trl-lib/ddpo-aesthetic-predictor"
PICKSCORE = "yuvalkirstain/PickScore_v1"
LAION = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
# Inputs and outputs of the aesthetic head's linear layers, by their numbers in the released file.
HEAD = {0: (768, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}


def make_sdxl_unet():
    """An untrained UNet of Stable Diffusion XL's form."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,
    )


def make_flux_transformer():
    """An untrained transformer of FLUX.1's form, with the guidance scale as an input."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )


def make_pipelines():
    """{preset: pipeline} for sd15, sdxl, sd3 and flux: 32x32 pixels, a million parameters or so."""
    import diffusers

    vae = pretrain.make_vae()
    vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)
    words = pretrain.make_tokenizer()
    clip = pretrain.make_text_encoder(words, width=32, layers=1)
    clip_1 = pretrain.make_text_encoder(words, width=32, layers=1, projection=True)
    clip_2 = pretrain.make_text_encoder(words, width=32, layers=1, projection=True)
    unet = make_sdxl_unet()
    euler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="leading",
    )
    transformer = make_flux_transformer()
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    sd15 = pretrain.make_sd15(vae)
    sdxl = diffusers.StableDiffusionXLPipeline(vae, clip_1, clip_2, words, words, unet, euler)
    sd3 = pretrain.make_sd3(vae)
    t5 = pretrain.make_silent_t5(words, width=32)
    flux = diffusers.FluxPipeline(flow, vae, clip, words, t5, words, transformer)
    return {"sd15": sd15, "sdxl": sdxl, "sd3": sd3, "flux": flux}


def make_clip():
    """A CLIPModel with embeddings of 768 numbers, as ViT-L/14's, and its tokenizer."""
    from transformers import CLIPConfig, CLIPModel

    words = pretrain.make_tokenizer()
    words.model_max_length = 77
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": 768,
    }
    text = vision | {
        "vocab_size": len(words),
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
    }
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=768)
    return CLIPModel(config), words


def make_aesthetic_head():
    """The weights of five linear layers, under the names that the released head has."""
    head = {}
    for i, (n, m) in HEAD.items():
        layer = torch.nn.Linear(n, m)
        head[f"layers.{i}.weight"] = 3 * layer.weight.data
        head[f"layers.{i}.bias"] = layer.bias.data
    return head


def image_processor():
    """CLIP's image processor, the one that needs no torchvision."""
    from transformers import CLIPImageProcessorPil

    return CLIPImageProcessorPil()


def add_safety_checker(pipe, config):
    """Give a Stable Diffusion pipeline an untrained safety checker, as the real repository has."""
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker

    checker = StableDiffusionSafetyChecker._from_config(config, attn_implementation="eager")
    pipe.register_modules(safety_checker=checker, feature_extractor=image_processor())


def cache(hub, repository, files):
    """Put a folder's files into the cache `hub`, in the form in which a download leaves them.

    That is: blobs, a snapshot of links to them, and a branch that names the snapshot.
    """
    folder = hub / ("models--" + repository.replace("/", "--"))
    for part in ("blobs", "refs", "snapshots/1"):
        (folder / part).mkdir(parents=True)
    (folder / "refs/main").write_text("1")
    for i, file in enumerate(sorted(files.rglob("*"))):
        if file.is_file():
            blob = folder / f"blobs/{i}"
            shutil.copy(file, blob)
            link = folder / "snapshots/1" / file.relative_to(files)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blob)


def build(root):
    """Write each pipeline to root/NAME, and all that nft.py may load to the cache root/hub.

    root: a pathlib.Path. The weights are the same every time.
    """
    torch.manual_seed(0)
    pipelines = make_pipelines()
    clip, words = make_clip()
    hub = root / "hub"
    real = root / "real"
    for name, pipe in pipelines.items():
        pipe.save_pretrained(root / name)
        if name == "sd15":
            add_safety_checker(pipe, clip.config)
        pipe.save_pretrained(real / name)
        cache(hub, nft.PRESETS[name]["model"], real / name)

    pick, _ = make_clip()
    clip.save_pretrained(real / "clip")
    pick.save_pretrained(real / "pickscore")
    for folder in ("clip", "laion"):
        clip.config.save_pretrained(real / folder)
        words.save_pretrained(real / folder)
        image_processor().save_pretrained(real / folder)
    (real / "head").mkdir()
    torch.save(make_aesthetic_head(), real / "head/aesthetic-model.pth")
    cache(hub, CLIP, real / "clip")
    cache(hub, PICKSCORE, real / "pickscore")
    cache(hub, LAION, real / "laion")
    cache(hub, AESTHETIC, real / "head")
    shutil.rmtree(real)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    build(Path(sys.argv[1]).resolve())
