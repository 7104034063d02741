"""epsilon_study.py: what its rows change, its table and its numbers of pictures.

    python -m pytest examples/tests/test_epsilon_study.py

Each test's docstring states a law.
SPDX-License-Identifier: MIT
"""

import argparse
import functools
import json

import common
import epsilon_study
import pytest
import torch
from torch.testing import assert_close

import nft

# At noise level (alpha, sigma): a row's loss over the default's, up to one factor for all levels.
LOSS_FACTORS = {
    "x_0": lambda alpha, sigma: (alpha + sigma) / alpha,
    "eps": lambda alpha, sigma: (alpha + sigma) / sigma,
    "capped": lambda alpha, sigma: (alpha + sigma) / torch.maximum(alpha, sigma),
    "released": lambda alpha, sigma: (alpha + sigma) / alpha,
}
KL_FACTORS = {"kl-x_0": lambda alpha, sigma: (sigma / alpha) ** 2}


@functools.cache
def losses_of(name):
    """A row's three losses, nft.py's own, and alpha and sigma, at the ten times of its sampler."""
    row = epsilon_study.ROWS[name]
    parts = epsilon_study.parts(row)
    config = nft.configure(model="tiny", device="cpu", out="x", **row.settings)
    model = parts["make_model"](config)
    torch.manual_seed(0)
    for x in model.lora.adapters["theta"]:
        x.data += 0.01 * torch.randn_like(x)
    n = len(model.times)
    D = model.sample(["a red circle"] * n, [(i,) for i in range(n)], "old")
    D["r"] = torch.full((n,), 0.7)
    eps = torch.randn(D["x_0"].shape)
    pairs = model, D, torch.arange(n), model.times, eps
    with torch.no_grad():
        found = parts["losses"](*pairs)
        plain = nft.pair_losses(*pairs)
    return found, plain, model.noise_level(model.times)


@pytest.mark.parametrize("name", ["default", "low-noise", "kl-x_0", *LOSS_FACTORS])
def test_a_row_changes_one_thing(name):
    """Loss and KL at a noise level are nft.py's own, times a factor of that level alone."""
    found, plain, level = losses_of(name)
    loss_factor = torch.ones_like(level[0])
    kl_factor = torch.ones_like(level[0])
    if name in LOSS_FACTORS:
        loss_factor = LOSS_FACTORS[name](*level)
    if name in KL_FACTORS:
        kl_factor = KL_FACTORS[name](*level)
    if name != "released":
        # The default's mean weight stays.
        alpha, sigma = level
        default = sigma / (alpha + sigma)
        loss_factor = loss_factor * default.mean() / (default * loss_factor).mean()
        kl_factor = kl_factor / kl_factor.mean()
    assert_close(found[0], plain[0] * loss_factor, rtol=1e-4, atol=0)
    assert_close(found[1], plain[1] * kl_factor, rtol=1e-4, atol=0)
    assert_close(found[2], plain[2], rtol=0, atol=0)


def test_low_noise_is_trained_at_low_noise_alone():
    """The row trains at exactly the sampler's times with sigma / alpha up to 5; others at all."""
    _, _, (alpha, sigma) = losses_of("default")
    _, _, (low_alpha, low_sigma) = losses_of("low-noise")
    low = sigma / alpha <= 5
    assert 0 < low.sum() < len(low) == 10
    assert_close(low_sigma / low_alpha, (sigma / alpha)[low])


def test_numbers_of_pictures():
    """A grey picture has neither spread nor saturation; a red one is saturated and even."""
    grey = torch.full((3, 8, 8), 0.5)
    red = torch.zeros(3, 8, 8)
    red[0] = 1
    images = torch.stack([grey, red])
    assert_close(epsilon_study.pixel_mean(images, [], []), torch.tensor([0.5, 1 / 3]))
    assert_close(epsilon_study.saturation(images, [], []), torch.tensor([0.0, 1.0]))
    std = epsilon_study.pixel_std(images, [], [])
    assert std[0] == 0
    assert_close(std[1], red.std())


def arguments(out, **changes):
    """A parsed command line."""
    given = {"model": "tiny", "iterations": 1, "lr": 2e-3, "seeds": [0, 1], "out": out}
    given |= {"rows": ["default", "kl-0"], "reward": epsilon_study.EXACT}
    return argparse.Namespace(**(given | changes))


def write_run(folder, iterations, accuracy):
    """The directory of a run that ends at an accuracy."""
    folder.mkdir(parents=True)
    lines = []
    for i in range(iterations + 1):
        row = {"iteration": i, "loss": 1.0 + i, "old_deviation": 1e-3, "eval_roughness": 1 + i / 10}
        row["eval_reward"] = 0.9
        row[epsilon_study.ACCURACY] = 0.3 if i == 0 else accuracy
        for name in epsilon_study.HEALTH:
            row[f"eval_reward/epsilon_study:{name}"] = 0.25
        lines.append(json.dumps(row) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines))


def test_table(tmp_path):
    """A line a row of the finished runs, to the iterations asked for, and the base model's."""
    write_run(tmp_path / "default-0", 2, 0.7)
    write_run(tmp_path / "default-1", 3, 0.8)
    write_run(tmp_path / "kl-0-0", 1, 0.8)
    found = epsilon_study.load(arguments(tmp_path, iterations=2))
    lines = epsilon_study.table(found, learned=False).splitlines()
    assert lines[2] == (
        "| weight σ/(α+σ), KL 0.1, sampler's times | 0.750 (0.700, 0.800) | 1.20, 1.20 "
        "| 0.25, 0.25, 0.25 | 1.50 | 1.0e-03 |"
    )
    assert lines[3] == "| the base model | 0.300 | 1 | 0.25, 0.25, 0.25 |  |  |"
    learned = epsilon_study.table(found, learned=True).splitlines()
    assert learned[0].startswith("| row | trained reward | held-out accuracy |")
    assert [line.count("|") for line in learned] == [8, 8, 8, 8]


def test_plot(tmp_path):
    """The plot of the finished runs is a picture."""
    pytest.importorskip("matplotlib")
    from PIL import Image

    write_run(tmp_path / "default-0", 1, 0.7)
    found = epsilon_study.load(arguments(tmp_path))
    epsilon_study.plot(found, "title", tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.size == (800, 360)


def test_a_row_trains(tmp_path):
    """A run has the row's settings and what the table needs, whatever reward it is trained on."""
    captions = tmp_path / "captions.txt"
    captions.write_text("a red circle\ntwo blue squares\n")
    args = arguments(tmp_path, reward="jpeg", rows=["kl-0"])
    given = epsilon_study.settings("kl-0", 1, args)
    small = common.settings("sd15", prompts=captions, eval_prompts=captions)
    for name in ("model", "prompts", "eval_prompts", "groups", "group_size", "steps"):
        given[name] = small[name]
    config = nft.configure(**given)
    assert (config.kl, config.seed, config.beta, config.updates) == (0.0, 1, 1.0, 4)
    nft.train(config, **epsilon_study.parts(epsilon_study.ROWS["kl-0"]))
    lines = epsilon_study.table(epsilon_study.load(arguments(tmp_path, seeds=[1])), learned=True)
    assert lines.splitlines()[2].startswith("| KL 0 | ")


def test_a_finished_run_is_not_repeated(tmp_path):
    """A directory with the iterations asked for stays as it is."""
    write_run(tmp_path / "default-0", 1, 0.7)
    (tmp_path / "default-0/config.json").write_text("{}")
    epsilon_study.run("default", 0, arguments(tmp_path))
    assert (tmp_path / "default-0/config.json").read_text() == "{}"


def test_unknown_rows_are_refused(capsys):
    """A row that is not there ends in one clear line before anything is run."""
    with pytest.raises(SystemExit) as stopped:
        epsilon_study.main(["--rows", "default,none"])
    assert stopped.value.code == 2
    assert "--rows none: must be of default," in capsys.readouterr().err
