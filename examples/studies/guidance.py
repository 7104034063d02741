"""Held-out reward of finished runs when sampled with and without guidance.

    python nft.py --guidance 3 --out runs/guided
    python examples/studies/guidance.py runs/guided --scales 1,3

Prints a line a run: at each scale the base model's reward, then the trained one's.
SPDX-License-Identifier: MIT
"""

import argparse
import json
import sys
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))
import nft


def held_out_reward(folder, scale):
    """Of the base and of the trained model, both sampled at guidance `scale` from equal noise."""
    settings = json.loads((folder / "config.json").read_text())
    config = nft.configure(**settings | {"guidance": scale, "resume": False})
    rewards = nft.load_rewards(config.reward, "--reward")
    _, held_out = nft.load_prompt_sets(config)
    numbered = [(i, prompt, metadata) for i, (prompt, metadata) in enumerate(held_out)]
    model = nft.Model(config)
    saved = torch.load(folder / "checkpoint.pt", model.device, weights_only=True)
    model.lora.adapters["ema"] = saved["lora"]["ema"]
    found = []
    for policy in (None, "ema"):
        D = nft.collect(model, rewards, numbered, ("evaluation",), policy)
        found.append(D["scores"]["reward"].mean().item())
    return found


def numbers(text):
    """A comma-separated list of numbers."""
    return [float(word) for word in text.split(",")]


def main(argv=None):
    """Command line: runs, and the guidance scales to sample at."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run directories")
    parser.add_argument("--scales", type=numbers, default=[1.0, 3.0])
    args = parser.parse_args(argv)
    for folder in args.runs:
        trained = json.loads((folder / "config.json").read_text())["guidance"]
        line = f"{folder} (trained at guidance {trained:g})"
        for scale in args.scales:
            before, after = held_out_reward(folder, scale)
            line += f"   at {scale:g}: {before:.3f} -> {after:.3f}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
