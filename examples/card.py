"""Writes DIR/README.md, a run's model card, whose code paints the first held-out prompt.

`python examples/card.py DIR`, in the directory in which the run was started.
SPDX-License-Identifier: MIT
"""

import inspect
import json
import sys
from pathlib import Path

import diffusers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import nft

PATCH = """# This solver may draw noise, and not all pipelines hand their generator on to it.
step = pipe.scheduler.step
pipe.scheduler.step = lambda *args, **more: step(*args, generator=noise, **more)
"""


def painting(folder, config, prompt):
    """Code that paints a prompt as nft.load_pipeline and nft.Model.sample do in evaluation."""
    device, dtype = nft.pick_device(config)
    base = str(nft.locate(config.model)) if config.model.startswith("examples/") else config.model
    index = diffusers.DiffusionPipeline.load_config(base)
    options = {name: None for name, kind in index.items() if kind == [None, None]}
    if "safety_checker" in index:
        options |= dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    if index["_class_name"] == "StableDiffusionXLPipeline":
        options["add_watermarker"] = False
    size = config.resolution
    settings = dict(num_inference_steps=config.eval_steps or config.steps, height=size, width=size)
    settings |= dict(guidance_scale=config.guidance, max_sequence_length=config.max_sequence_length)
    settings = {name: value for name, value in settings.items() if value}
    solver = json.loads((folder / "scheduler/scheduler_config.json").read_text())["_class_name"]
    draws = "generator" in inspect.signature(getattr(diffusers, solver).step).parameters
    return f"""import diffusers
import torch

options = {options}
pipe = diffusers.DiffusionPipeline.from_pretrained({base!r}, dtype={dtype}, **options)
pipe.to({str(device)!r})
pipe.load_lora_weights({str(folder)!r})
pipe.scheduler = diffusers.{solver}.from_pretrained({str(folder)!r}, subfolder="scheduler")
noise = torch.Generator().manual_seed({nft.generator("evaluation", 0).initial_seed()})
{PATCH if draws else ""}settings = {settings}
image = pipe({prompt!r}, generator=noise, **settings).images[0]"""


def write_card(folder):
    """Write README.md into a run's directory, of its config.json, scheduler/ and prompts."""
    config = nft.Config(**json.loads((folder / "config.json").read_text()))
    prompts = [prompt for prompt, _ in nft.load_prompt_sets(config)[1]]
    shown = "\n- ".join(prompts[: nft.SHOWN])
    text = f"""---
base_model: {config.model}
library_name: diffusers
pipeline_tag: text-to-image
tags: [text-to-image, lora, diffusion-nft]
---
# {config.model} after DiffusionNFT
A LoRA, trained by DiffusionNFT, arXiv 2509.16117, on `{config.reward}`. Sample it at the guidance
and by the solver of its training, as this code, which paints the first prompt below. It needs peft.

```python
{painting(folder, config, prompts[0])}
```

Held-out prompts before and after training, from the same noise; in brackets the reward:

![](before_after.png)
- {shown}
"""
    (folder / "README.md").write_text(text, "utf-8")


if __name__ == "__main__":
    write_card(Path(sys.argv[1]))
