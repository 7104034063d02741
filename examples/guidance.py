"""Held-out reward of finished runs when sampled with and without guidance.

    python nft.py --guidance 3 --out runs/guided
    python examples/guidance.py runs/guided --scales 1,3        # a line a run: the base model, then the trained

SPDX-License-Identifier: MIT
"""
import argparse
import json
import pathlib
import sys

import torch

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import nft  # noqa: E402


def held_out_reward(folder, scale):
    """(of the base model, of the trained model), both sampled at guidance `scale` from the same noise."""
    settings = json.loads((folder / "config.json").read_text())
    config = nft.Config(**settings | {"guidance": scale, "resume": False})
    model, prompts = nft.Model(config), nft.load_prompts(config.eval_prompts, "--eval-prompts")
    rewards = nft.load_rewards(config.reward)
    model.lora.sets["ema"] = torch.load(folder / "checkpoint.pt", model.device, weights_only=True)["lora"]["ema"]
    return [nft.collect(model, rewards, prompts, ("evaluation",), policy)[1].mean().item()
            for policy in (None, "ema")]


def main():
    """Command line: runs, and the guidance scales to sample at."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=pathlib.Path, help="run directories, made with --eval-prompts")
    parser.add_argument("--scales", type=lambda s: [float(x) for x in s.split(",")], default=[1.0, 3.0])
    args = parser.parse_args()
    for folder in args.runs:
        trained = json.loads((folder / "config.json").read_text())["guidance"]
        found = [f"at {scale:g}: {' -> '.join(f'{x:.3f}' for x in held_out_reward(folder, scale))}"
                 for scale in args.scales]
        print(f"{folder} (trained at guidance {trained:g})  " + "   ".join(found), flush=True)


if __name__ == "__main__":
    main()
