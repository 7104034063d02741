"""Tiny untrained models in their real classes, under their real names, in a hub cache of their own.

    python examples/tiny/untrained.py /tmp/tiny
    HF_HUB_CACHE=/tmp/tiny/hub HF_HUB_OFFLINE=1 python nft.py --model sdxl --reward aesthetic \\
        --resolution 32 --groups 2 --iterations 2

So every preset of nft.py can be tried through its real loading path without a download: the
pictures are noise. The tests build theirs with it. It needs no package beyond nft.py's own.
SPDX-License-Identifier: MIT
"""

import sys
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))
import pretrain

import nft

# What the rewards of nft.py and of examples/rewards load.
CLIP = "openai/clip-vit-large-patch14"
PICKSCORE = "yuvalkirstain/PickScore_v1"
# Inputs and outputs of the aesthetic head's linear layers, by their numbers in the released file.
HEAD = {0: (768, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}


def make_pipelines():
    """{preset: pipeline} for sd15, sdxl, sd3 and flux: 32x32 pixels, a million parameters or so."""
    vae = pretrain.make_vae()
    vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)
    words = pretrain.make_tokenizer()
    clip = pretrain.make_text_encoder(words, width=32, layers=1)
    clip_1 = pretrain.make_text_encoder(words, width=32, layers=1, projection=True)
    clip_2 = pretrain.make_text_encoder(words, width=32, layers=1, projection=True)
    unet = diffusers.UNet2DConditionModel(
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
    euler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="leading",
    )
    transformer = diffusers.FluxTransformer2DModel(
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
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    sd15 = pretrain.make_sd15(vae)
    sdxl = diffusers.StableDiffusionXLPipeline(vae, clip_1, clip_2, words, words, unet, euler)
    sd3 = pretrain.make_sd3(vae)
    t5 = pretrain.make_silent_t5(words, width=32)
    flux = diffusers.FluxPipeline(flow, vae, clip, words, t5, words, transformer)
    return {"sd15": sd15, "sdxl": sdxl, "sd3": sd3, "flux": flux}


def make_clip():
    """A CLIPModel with embeddings of 768 numbers, as ViT-L/14's, and its tokenizer."""
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
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=768)
    return transformers.CLIPModel(config), words


def image_processor():
    """CLIP's image processor, the one that needs no torchvision."""
    return transformers.CLIPImageProcessorPil()


def cached(hub, repository):
    """The folder of the cache `hub` that a download of a repository would fill."""
    folder = hub / ("models--" + repository.replace("/", "--"))
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text("1")
    (folder / "snapshots/1").mkdir(parents=True)
    return folder / "snapshots/1"


def build(root):
    """Write each pipeline to root/NAME, and all that nft.py may load to the cache root/hub.

    root: a pathlib.Path. The weights are the same every time.
    """
    torch.manual_seed(0)
    pipelines = make_pipelines()
    clip, words = make_clip()
    hub = root / "hub"
    for name, pipe in pipelines.items():
        pipe.save_pretrained(root / name)
        if name == "sd15":
            # As in the real repository.
            eager = {"attn_implementation": "eager"}
            checker = StableDiffusionSafetyChecker._from_config(clip.config, **eager)
            pipe.register_modules(safety_checker=checker, feature_extractor=image_processor())
        pipe.save_pretrained(cached(hub, nft.PRESETS[name]["model"]))

    pick, _ = make_clip()
    parts = {
        CLIP: [clip, words, image_processor()],
        PICKSCORE: [pick],
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": [clip.config, words, image_processor()],
    }
    for repository, saved in parts.items():
        folder = cached(hub, repository)
        for part in saved:
            part.save_pretrained(folder)
    head = {}
    for i, (n, m) in HEAD.items():
        layer = torch.nn.Linear(n, m)
        head[f"layers.{i}.weight"] = 3 * layer.weight.data
        head[f"layers.{i}.bias"] = layer.bias.data
    torch.save(head, cached(hub, "trl-lib/ddpo-aesthetic-predictor") / "aesthetic-model.pth")


if __name__ == "__main__":
    build(Path(sys.argv[1]).resolve())
