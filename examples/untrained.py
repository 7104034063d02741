"""Tiny untrained models in their real classes, under their real names, in a hub cache of their own.

    python examples/untrained.py /tmp/tiny
    HF_HUB_CACHE=/tmp/tiny/hub HF_HUB_OFFLINE=1 python nft.py --model sdxl --reward aesthetic \\
        --resolution 32 --groups 2 --iterations 2

So every preset of nft.py can be tried through its real loading path without a download: the pictures are
noise. The tests build theirs with it. No package beyond nft.py's own.
SPDX-License-Identifier: MIT
"""
import pathlib
import shutil
import sys

import torch

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import nft  # noqa: E402
import pretrain_tiny as tiny  # noqa: E402

REPOSITORIES = {                                        # that the rewards of nft.py load
    "clip": "openai/clip-vit-large-patch14", "head": "trl-lib/ddpo-aesthetic-predictor",
    "pickscore": "yuvalkirstain/PickScore_v1", "laion": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"}


def make_pipelines():
    """{preset: pipeline} for sd15, sdxl, sd3 and flux: 32x32 pixels, about a million parameters each."""
    import diffusers as d
    vae, words = tiny.make_vae(), tiny.make_tokenizer()
    vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)
    clip, clip_1, clip_2 = (tiny.make_text_encoder(words, 32, 1, projection=i > 0) for i in range(3))
    unet = d.UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, attention_head_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=64,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=80)
    euler = d.EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                     steps_offset=1, timestep_spacing="leading")
    transformer = d.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, guidance_embeds=True, axes_dims_rope=(4, 4, 8))
    flow = d.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return {
        "sd15": tiny.make_sd15(vae),
        "sdxl": d.StableDiffusionXLPipeline(vae, clip_1, clip_2, words, words, unet, euler),
        "sd3": tiny.make_sd3(vae),
        "flux": d.FluxPipeline(flow, vae, clip, words, tiny.make_silent_t5(words, 32), words, transformer)}


def make_clip():
    """A CLIPModel with embeddings of 768 numbers, as ViT-L/14's, and the tokenizer that goes with it."""
    from transformers import CLIPConfig, CLIPModel
    words = tiny.make_tokenizer()
    words.model_max_length = 77
    part = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, projection_dim=768)
    text = part | dict(vocab_size=len(words), bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=part, projection_dim=768)), words


def make_aesthetic_head():
    """The weights of five linear layers, under the names that the released head has."""
    head = {}
    for i, (n, m) in zip((0, 2, 4, 6, 7), ((768, 1024), (1024, 128), (128, 64), (64, 16), (16, 1))):
        layer = torch.nn.Linear(n, m)
        head |= {f"layers.{i}.weight": 3 * layer.weight.data, f"layers.{i}.bias": layer.bias.data}
    return head


def image_processor():
    """CLIP's image processor, the one that needs no torchvision."""
    import transformers
    return getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)()


def cache(hub, repository, files):
    """Put the files of a folder into `hub` as a download would: blobs, a snapshot of links to them, a branch."""
    folder = hub / ("models--" + repository.replace("/", "--"))
    for part in ("blobs", "refs", "snapshots/1"):
        (folder / part).mkdir(parents=True)
    (folder / "refs/main").write_text("1")
    for k, file in enumerate(p for p in sorted(files.rglob("*")) if p.is_file()):
        link = folder / "snapshots/1" / file.relative_to(files)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(shutil.copy(file, folder / f"blobs/{k}"))


def build(root):
    """Write each pipeline to root/NAME, and all of them and what nft.py's rewards load to the cache root/hub."""
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    torch.manual_seed(0)
    pipelines, (clip, words), real = make_pipelines(), make_clip(), root / "real"
    for name, pipe in pipelines.items():
        pipe.save_pretrained(root / name)
        pipe.save_pretrained(real / name)
        if name == "sd15":                              # the real repository has a safety checker
            checker = StableDiffusionSafetyChecker._from_config(clip.config, attn_implementation="eager")
            pipe.register_modules(safety_checker=checker, feature_extractor=image_processor())
            pipe.save_pretrained(real / name)
        cache(root / "hub", nft.PRESETS[name]["path"], real / name)
    for folder, model in (("clip", clip), ("pickscore", make_clip()[0])):
        model.save_pretrained(real / folder)
    for folder in ("clip", "laion"):
        clip.config.save_pretrained(real / folder)
        words.save_pretrained(real / folder)
        image_processor().save_pretrained(real / folder)
    (real / "head").mkdir()
    torch.save(make_aesthetic_head(), real / "head/aesthetic-model.pth")
    for folder, repository in REPOSITORIES.items():
        cache(root / "hub", repository, real / folder)
    shutil.rmtree(real)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    build(pathlib.Path(sys.argv[1]).resolve())
