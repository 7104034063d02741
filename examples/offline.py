"""Learn from rated pictures on disk: DiffusionNFT needs clean images and rewards, and no more.

    python examples/offline.py ratings.jsonl --model sd15 --out runs/rated
    python examples/offline.py rated/ratings.jsonl --sample 2000 --model tiny    # paint some first

A line of ratings.jsonl is {"image": "a.png", "prompt": "a cat", "reward": 4}, the path beside the
file. This model should have painted them: of pictures of others the split into good and bad has a
meaning, Eq. (6) has none. r is normalised once, by the mean of each prompt, or with --baseline all
of all; theta_old stays the base. All other flags are nft.py's, --reward and --eval-prompts for
evaluation. --sample N paints N pictures of --prompts, and rates them by --reward.
SPDX-License-Identifier: MIT
"""

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import nft


def read(file):
    """[(PIL image, prompt, reward)] of a ratings.jsonl; UserError names the line at fault."""
    rows = []
    for number, line in enumerate(nft.locate(file).read_text("utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            image = Image.open(nft.locate(file).parent / row["image"]).convert("RGB")
            prompt, reward = row["prompt"].strip(), float(row["reward"])
        except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
            raise nft.UserError(f"{file}: line {number} must be a rating ({error!r})") from error
        if not prompt or not math.isfinite(reward):
            raise nft.UserError(f"{file}: line {number} must have a prompt and a finite reward")
        rows.append((image, prompt, reward))
    return rows


@torch.no_grad()
def encode(model, image, size):
    """x_0 (1, ...) of a PIL image, resized to size (H, W). UserError where it cannot be painted."""
    vae = model.pipe.vae
    shift = getattr(vae.config, "shift_factor", None) or 0
    picture = model.pipe.image_processor.preprocess(image, *size).to(model.device, model.dtype)
    latents = vae.encode(picture).latent_dist.mode()
    lost = (vae.decode(latents).sample - picture).abs().mean() / 2
    if not lost < 0.1:
        raise nft.UserError(f"--model: its VAE must give pictures back to 0.1, not {lost:.2f}")
    return ((latents - shift) * vae.config.scaling_factor).float().cpu()


class Pool:
    """Rated pictures in the place of Algorithm 1's rollouts: parts of nft.train."""

    def __init__(self, file, passes, baseline):
        self.file, self.passes, self.baseline = file, passes, baseline

    def make_model(self, config):
        """Read all pictures, and load the model that they are for."""
        images, self.prompts, rewards = zip(*read(self.file), strict=True)
        self.raw = torch.tensor(rewards)
        names = list(dict.fromkeys(self.prompts))
        groups = torch.tensor([names.index(prompt) for prompt in self.prompts])
        self.r = nft.optimality_reward(self.raw, groups, config.z)
        silent = sum(bool((self.r[groups == g] == 0.5).all()) for g in range(len(names)))
        if self.baseline == "all":
            self.r = nft.optimality_reward(self.raw, torch.zeros_like(groups), config.z)
        nft.say(f"{len(images)} pictures of {len(names)} prompts, {silent} of equal ratings")
        # Passes, each in an order of its own, and enough for the last iteration.
        N = config.groups * config.group_size
        config.iterations = math.ceil(self.passes * len(images) / N)
        laps = math.ceil(config.iterations * N / len(images))
        noise = nft.generator(config.seed, "passes")
        self.order = torch.cat([torch.randperm(len(images), generator=noise) for _ in range(laps)])
        model = nft.Model(config)
        # What the denoiser is given of a prompt does not depend on the number of steps.
        model.config = dataclasses.replace(config, steps=1)
        self.conditions = {}
        for name in names:
            painted = model.sample([name], [("condition", name)], "old")
            self.conditions[name] = nft.map_tensors(torch.Tensor.cpu, painted["condition"])
        model.config = config
        if painted["x_0"].ndim != 4:
            model.refuse("must have latents as its VAE gives them, not packed ones")
        self.x_0 = torch.cat([encode(model, x, painted["images"].shape[2:]) for x in images])
        return model

    def collect(self, model, rewards, numbered, key, policy):
        """Lines 2 and 3, from disk; evaluation paints as ever."""
        if policy != "old":
            return nft.collect(model, rewards, numbered, key, policy)
        N = model.config.groups * model.config.group_size
        self.drawn = self.order[(key[1] - 1) * N : key[1] * N]
        mine = self.drawn[[i for i, _, _ in numbered]]
        rows = [self.conditions[self.prompts[i]] for i in mine]
        condition = nft.map_tensors(lambda *x: torch.cat(x), *rows)
        return {"x_0": self.x_0[mine], "condition": condition, "scores": {"reward": self.raw[mine]}}

    def weigh(self, raw, groups, z):
        """Lines 4 and 5: r of the pictures just drawn, normalised over the whole pool."""
        return self.r[self.drawn]


def sample(config, number, file):
    """Paint `number` pictures by the base, rate them, write them and the file; the exit status."""
    prompts, _ = nft.load_prompt_sets(config)
    rewards = nft.load_rewards(config.reward)
    model = nft.Model(config)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as lines:
        for start in range(0, number, config.batch_size):
            places = range(start, min(start + config.batch_size, number))
            chosen = [prompts[i // config.group_size % len(prompts)] for i in places]
            texts, metadata = zip(*chosen, strict=True)
            keys = [("rated", config.seed, i) for i in places]
            images = model.sample(texts, keys, None)["images"]
            scores = nft.score(rewards, images, texts, metadata)["reward"].tolist()
            for i, image, text, reward in zip(places, images, texts, scores, strict=True):
                row = {"image": f"{i:06d}.png", "prompt": text, "reward": reward}
                nft.to_pil(image).save(file.parent / row["image"])
                lines.write(json.dumps(row) + "\n")
    return 0


def main(argv=None):
    """Run the command line; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("ratings", type=Path, help="a ratings.jsonl")
    parser.add_argument("--passes", type=float, default=2, help="over all pictures (%(default)s)")
    parser.add_argument("--baseline", choices=("prompt", "all"), default="prompt")
    parser.add_argument("--sample", type=int, metavar="N", help="paint and rate N pictures")
    own, rest = parser.parse_known_args(argv)
    if own.sample:
        try:
            return sample(nft.parse(rest), own.sample, own.ratings)
        except nft.UserError as error:
            parser.error(str(error))
    pool = Pool(own.ratings, own.passes, own.baseline)
    parts = {"make_model": pool.make_model, "collect": pool.collect, "weigh": pool.weigh}
    # theta_old stays the policy that painted the pictures.
    return nft.main(["--eta=1", *rest], **parts)


if __name__ == "__main__":
    sys.exit(main())
