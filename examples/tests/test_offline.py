"""offline.py: learning from rated pictures on disk. Each test's docstring states a promise.

SPDX-License-Identifier: MIT
"""

import json
import sys

import common
import pytest
import torch

import nft

sys.path.insert(0, str(common.EXAMPLES))
import offline

TINY = ["--model=tiny", "--device=cpu"]
SHORT = [*TINY, "--groups=4", "--batch-size=64", "--eval-every=99", "--beta=0.1"]


@pytest.fixture(scope="module")
def rated(tmp_path_factory):
    """Pictures of the shipped pipeline, rated by the exact checker."""
    file = tmp_path_factory.mktemp("rated") / "ratings.jsonl"
    assert offline.main([str(file), "--sample=192", *SHORT, "--batch-size=96"]) == 0
    return file


def rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_r_of_uneven_groups(rated, tmp_path, capsys):
    """r is the paper's over the whole pool, whose prompts may have any number of pictures."""
    image = str(rated.parent / "000000.png")
    ratings = [("a", 1.0), ("b", 5.0), ("a", 3.0), ("a", 5.0), ("c", 4.0), ("c", 4.0)]
    lines = [json.dumps({"image": image, "prompt": c, "reward": x}) for c, x in ratings]
    file = tmp_path / "r.jsonl"
    file.write_text("\n".join(lines))
    raw = torch.tensor([x for _, x in ratings]).double()
    Z_c = 1.5 * (raw.std(correction=0) + 1e-4)
    means = {"prompt": torch.tensor([3.0, 5, 3, 3, 4, 4]), "all": raw.mean()}
    for baseline, mean in means.items():
        pool = offline.Pool(file, 2, baseline)
        config = nft.parse([*TINY, "--groups=2", "--group-size=4"])
        pool.make_model(config)
        expected = 0.5 + 0.5 * ((raw - mean) / Z_c).clamp(-1, 1)
        torch.testing.assert_close(pool.r, expected.float())
    # Twelve pictures, in iterations of eight.
    assert config.iterations == 2
    assert sorted(pool.order[:6]) == sorted(pool.order[6:12]) == list(range(6))
    assert "6 pictures of 3 prompts, 2 of equal ratings" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["tiny", "tiny-sd3"])
def test_x_0_is_the_latent_of_the_picture(name):
    """It is, but for eight bits a colour and the VAE, the latent that was painted from."""
    model = nft.Model(nft.parse([f"--model={name}", "--device=cpu"]))
    painted = model.sample(["a red circle"], [("x",)], None)
    images = painted["images"]
    x_0 = offline.encode(model, nft.to_pil(images[0]), images.shape[2:])
    own = painted["x_0"]
    # A forgotten scaling would make it 0.74 or 1.35.
    assert ((x_0 * own).sum() / own.square().sum()).item() == pytest.approx(1, abs=0.05)
    assert (x_0 - own).abs().mean() < 0.2 * own.abs().mean()


def test_a_vae_that_does_not_give_pictures_back_is_refused():
    """An untrained one does not."""
    model = common.new_model("sd15")
    images = model.sample(common.TEXTS, common.SEEDS, None)["images"]
    with pytest.raises(nft.UserError, match="VAE must give pictures back"):
        offline.encode(model, nft.to_pil(images[0]), images.shape[2:])


BAD = {
    "no such file": {"image": "none.png"},
    "not a picture": {"image": "ratings.jsonl"},
    "no number": {"reward": "good"},
    "not finite": {"reward": float("nan")},
    "no prompt": {"prompt": " "},
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_lines(rated, capsys, fault):
    """They are named by their number in one line, exit 2, and nothing is written."""
    good, *_ = rows(rated)
    file = rated.parent / "bad.jsonl"
    file.write_text(json.dumps(good) + "\n" + json.dumps(good | BAD[fault]) + "\n")
    out = rated.parent / "never"
    assert offline.main([str(file), *SHORT, f"--out={out}"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "line 2 must" in line
    assert not out.exists()


def test_packed_latents_are_refused(rated, capsys):
    """FLUX's denoiser does not take what its VAE gives."""
    words = common.command_line("flux", out=rated.parent / "flux")
    assert offline.main([str(rated), *words]) == 2
    assert "packed" in capsys.readouterr().err


def test_accuracy_rises_and_with_shuffled_ratings_does_not(rated, tmp_path):
    """One pass over 192 pictures, in a run as every other, which can be resumed."""
    captions = (common.EXAMPLES / "tiny/heldout.txt").read_text().splitlines()[:64]
    (tmp_path / "heldout.txt").write_text("\n".join(captions))
    words = [*SHORT, "--passes=1", f"--eval-prompts={tmp_path}/heldout.txt"]
    found = rows(rated)
    rewards = [row["reward"] for row in found]
    order = torch.randperm(len(rewards), generator=nft.generator("shuffled")).tolist()
    shuffled = rated.parent / "shuffled.jsonl"
    lines = [json.dumps(row | {"reward": rewards[i]}) for row, i in zip(found, order, strict=True)]
    shuffled.write_text("\n".join(lines))
    changes = []
    for file in (rated, shuffled):
        out = tmp_path / file.stem
        assert offline.main([str(file), *words, f"--out={out}"]) == 0
        evaluated = [r["eval_reward"] for r in common.metrics(out) if "eval_reward" in r]
        changes.append(evaluated[-1] - evaluated[0])
    assert changes[0] > 0.1
    assert changes[1] < 0.05
    assert (out / "pytorch_lora_weights.safetensors").exists()
    assert common.metrics(out)[1]["eta"] == 1
    assert offline.main([str(shuffled), f"--out={out}", "--resume", "--passes=1.5"]) == 0
    assert len(common.metrics(out)) == 7
