"""figures.py with rows.py and report.py, and plot_runs.py.

    python -m pytest examples/tests/test_figures.py

Each test's docstring states a law.
SPDX-License-Identifier: MIT
"""

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import baselines
import common
import figures
import plot_runs
import pytest
import report
import rows
import torch
from report import Amount
from torch.testing import assert_close

import nft


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """`figures.run` sets the process to one thread: others' tests get back what they had."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def small_row(iterations=2, method="nft", change=None, reuse=1, **settings):
    """A row of a second or two, on an untrained pipeline."""
    settings = common.settings("sd15", iterations=None, updates=1, **settings)
    model = str(settings.pop("model"))
    return rows.Row("row", "row", method, model, iterations, settings, change, reuse)


# ---- Rows ----------------------------------------------------------------------------------------
def all_rows():
    """Those of every figure."""
    return [row for wanted in rows.FIGURES.values() for row in wanted]


def test_a_name_is_one_row():
    """Rows of one name are one run, and every figure has a title."""
    named = {}
    for row in all_rows():
        assert named.setdefault(row.name, row) == row
    assert rows.FIGURES.keys() == rows.TITLES.keys()
    assert set(rows.QUICK) < rows.FIGURES.keys()


def test_every_row_can_be_run():
    """nft.py and the method take every row's settings; evaluations are evenly apart."""
    for row in all_rows():
        for one in (row, figures.quick(row)):
            settings, own = figures.split(one)
            config = nft.configure(model=one.model, out="x", **settings)
            if row.pinned:
                assert config.batch_size == 64
            if row.pinned and one == row:
                assert one.iterations % config.eval_every == 0
            parts = figures.parts(one, own)
            assert parts.keys() <= {"make_model", "collect", "weigh", "losses", "evaluate"}
        assert 4 <= figures.quick(row).iterations <= 8 < row.iterations


def test_settings_of_a_method():
    """A row's settings win over its method's, and those over the preset's."""
    row = rows.flowgrpo("x", "x", 60, kl=0.3, noise_level=0.5)
    settings, own = figures.split(row)
    config = nft.configure(model=row.model, out="x", **settings)
    assert own == {"clip_range": 1e-3, "noise_level": 0.5}
    assert (config.kl, config.lr, config.train_times, config.eta) == (0.3, 7.5e-4, 1000, "0")
    assert config.max_sequence_length == 2


def test_a_shared_row_is_one_task(tmp_path):
    """A row of several figures is run once a seed; the sweep has the first seed alone."""
    shared = {name: rows.FIGURES[name] for name in ("beta", "eta")}
    tasks = figures.plan(shared, [0, 1], tmp_path)
    folders = [folder for _, folder, _ in tasks]
    assert len(set(folders)) == len(folders) == 2 * 7
    swept = figures.plan({"sweep": rows.FIGURES["sweep"]}, [3, 4], tmp_path)
    assert {seed for _, _, seed in swept} == {3}
    assert len(swept) == len(rows.FIGURES["sweep"])


# ---- What rows change ----------------------------------------------------------------------------
def test_positive_only_lacks_the_negative_branch():
    """Eq. (5) minus positive_only_loss is (1 - r) times the negative's distance, over beta."""
    torch.manual_seed(0)
    theta, old, x_0 = torch.randn(3, 5, 4, 8, 8, dtype=torch.float64)
    r = torch.rand(5, dtype=torch.float64)
    beta = 0.3
    loss = nft.nft_loss(theta, old, x_0, r, beta)
    missing = loss - rows.positive_only_loss(theta, old, x_0, r, beta)
    negative = nft.adaptive_loss(old + beta * (old - theta), x_0)
    assert_close(missing, (1 - r) * negative / beta)


def test_positive_only_replaces_the_loss():
    """The row's loss is that of positive_only_loss, and r = 1 makes it nft.py's own."""
    model = common.new_model("sd15", filled=True)
    D, *pair = pairs(model, r=[1.0, 1.0, 1.0])
    losses = rows.positive_only()["losses"]
    assert_close(losses(model, D, *pair), nft.pair_losses(model, D, *pair))
    D["r"] = torch.zeros(3)
    loss, kl, _ = losses(model, D, *pair)
    assert loss.eq(0).all()
    assert kl.gt(0).all()


def pairs(model, r):
    """Images of a model, and a pair of each: D, index, t, eps."""
    numbered = [(i, text, {}) for i, text in enumerate(common.TEXTS[: len(r)])]
    D = nft.collect(model, [], numbered, (0, 1), "old")
    D["r"] = torch.tensor(r)
    index = torch.arange(len(r))
    eps = torch.randn(D["x_0"].shape, generator=nft.generator("test"))
    return D, index, model.times[index], eps


class Flow:
    """A flow that predicts fixed outputs of the policies theta, old and None."""

    prediction = "flow_prediction"

    def __init__(self, outputs, times, beta):
        self.outputs = outputs
        self.times = times
        self.config = SimpleNamespace(beta=beta, kl=0.1)

    def predict(self, x_t, t, condition, policy):
        return self.outputs[policy]

    def noise_level(self, t, ndim=1):
        return nft.alpha_sigma((t / 1000).view(-1, *[1] * (ndim - 1)))


@pytest.mark.parametrize(
    ("w", "formula"),
    [
        (rows.constant_weight, lambda t: 1),
        (rows.rising_weight, lambda t: t),
        (rows.falling_weight, lambda t: 1 - t),
    ],
)
def test_weighted_is_the_velocity_loss(w, formula):
    """A flow's loss is w(t) (r |v+ - v|^2 + (1 - r) |v- - v|^2) / beta, scaled alike at all t."""
    torch.manual_seed(1)
    x_0, eps, theta, old, base = torch.randn(5, 6, 4, 8, 8, dtype=torch.float64)
    times = torch.tensor([1000.0, 800, 500, 200, 100], dtype=torch.float64)
    index = torch.arange(6)
    t = times[[0, 1, 2, 3, 4, 2]]
    r = torch.rand(6, dtype=torch.float64)
    beta = 0.7
    model = Flow({"theta": theta, "old": old, None: base}, times, beta)
    D = {"x_0": x_0, "condition": {}, "r": r}
    loss, *rest = rows.weighted(w)["losses"](model, D, index, t, eps)
    weights = [formula(s / 1000) for s in times.tolist()]
    scale = times.sum().item() / 1000 / sum(weights)
    for i, s in enumerate(t.tolist()):
        v = eps[i] - x_0[i]
        positive = ((1 - beta) * old[i] + beta * theta[i] - v).square().mean()
        negative = ((1 + beta) * old[i] - beta * theta[i] - v).square().mean()
        mixed = r[i] * positive + (1 - r[i]) * negative
        assert_close(loss[i], scale * formula(s / 1000) * mixed / beta)
    assert_close(rest, list(nft.pair_losses(model, D, index, t, eps)[1:]))


@torch.no_grad()
@pytest.mark.parametrize(
    ("weight", "formula"),
    [
        # Over the default's sigma / (alpha + sigma).
        (rows.x0_weight, lambda alpha, sigma: (alpha + sigma) / alpha),
        (rows.even_weight, lambda alpha, sigma: (alpha + sigma) / sigma),
    ],
)
@pytest.mark.parametrize("scaled", [True, False])
def test_eps_weighted_changes_the_weight_alone(weight, formula, scaled):
    """A pair's loss is nft.py's own times a factor of its noise level; the KL term stays."""
    model = common.new_model("sd15", filled=True)
    n = len(model.times)
    numbered = [(i, common.TEXTS[0], {}) for i in range(n)]
    D = nft.collect(model, [], numbered, (0, 1), "old") | {"r": torch.full((n,), 0.7)}
    pairs = D, torch.arange(n), model.times, torch.randn(D["x_0"].shape)
    found = rows.eps_weighted(weight, scaled)["losses"](model, *pairs)
    plain = nft.pair_losses(model, *pairs)
    alpha, sigma = model.noise_level(model.times)
    factor = formula(alpha, sigma)
    if scaled:
        # The default's mean weight stays.
        default = sigma / (alpha + sigma)
        factor = factor * default.mean() / (default * factor).mean()
    assert_close(found[0], plain[0] * factor, rtol=1e-4, atol=0)
    assert_close(found[1:], plain[1:], rtol=0, atol=0)


@pytest.mark.parametrize("r", [[0.5, 0.7, 0.1], [0.5, 0.5, 0.5], [0.4, 0.6, 0.9]])
def test_skipping_leaves_out_what_has_no_direction(r):
    """Pairs of r = 1/2 are not evaluated and lose their loss, KL and gradient; the others' stay."""
    model = common.new_model("sd15", filled=True)
    theta = model.lora.adapters["theta"]
    D, *pair = pairs(model, r)
    useful = D["r"] != 0.5
    expected = [x * useful for x in nft.pair_losses(model, D, *pair)]
    wanted = torch.autograd.grad(expected[0].sum() + expected[1].sum(), theta)
    count = baselines.Count(model)
    found = rows.skipping()["losses"](model, D, *pair)
    gradient = torch.autograd.grad(found[0].sum() + found[1].sum(), theta, allow_unused=True)
    assert count.n == 3 * useful.sum()
    assert_close(list(found), expected)
    for ours, theirs in zip(gradient, wanted, strict=True):
        if ours is None:
            ours = torch.zeros_like(theirs)
        assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("k", [2, 3])
def test_reuse_samples_every_kth_iteration(k):
    """Iterations 1, k + 1, 2 k + 1 ... sample, and the others get these images."""
    model = common.new_model("sd15")
    numbered = [(0, "a red circle", {})]
    collect = rows.Reuse(k)
    count = baselines.Count(model)
    collect(model, [], numbered, ("probe",), "old")
    sampled = []
    for iteration in range(1, 8):
        count.n = 0
        D = collect(model, [], numbered, (0, iteration), "old")
        sampled.append(count.n > 0)
        first = iteration - (iteration - 1) % k
        fresh = nft.collect(model, [], numbered, (0, first), "old")
        assert_close(D["x_0"], fresh["x_0"])
        # As nft.train does.
        D.clear()
    assert sampled == [(iteration - 1) % k == 0 for iteration in range(1, 8)]


class Drawn:
    """Stands for nft.pair_losses: notes the image, time and noise of each pair."""

    def __init__(self, monkeypatch):
        self.pairs = []
        monkeypatch.setattr(nft, "pair_losses", self)

    def __call__(self, model, D, index, t, eps):
        for pair in zip(index.tolist(), t.tolist(), eps, strict=True):
            self.pairs.append(pair)

    def of_image(self, image):
        """Its times, and its noise."""
        mine = [(t, eps) for i, t, eps in self.pairs if i == image]
        return [t for t, _ in mine], torch.stack([eps for _, eps in mine])


def draw_literature(monkeypatch, **settings):
    """The pairs of an iteration of two prompts with three images, three times each of nine."""
    drawn = Drawn(monkeypatch)
    config = SimpleNamespace(seed=0, group_size=3, train_times=3)
    model = SimpleNamespace(config=config, times=torch.arange(9.0))
    losses = rows.literature(**settings)["losses"]
    index = torch.arange(6).repeat_interleave(3)
    eps = torch.randn(18, 4)
    # In batches that cut through an image.
    D = {}
    for part in torch.arange(18).split(4):
        losses(model, D, index[part], torch.zeros(len(part)), eps[part])
    return drawn, eps


def test_shared_noise(monkeypatch):
    """Images of a prompt have the same three times and noises; another prompt has its own."""
    drawn, _ = draw_literature(monkeypatch, shared=True)
    times, noise = drawn.of_image(0)
    assert len(set(times)) == 3
    for image in (1, 2):
        assert drawn.of_image(image)[0] == times
        assert torch.equal(drawn.of_image(image)[1], noise)
    assert not torch.equal(drawn.of_image(3)[1], noise)


def test_stratified_times(monkeypatch):
    """Each image has a time of each third, and its own noise."""
    drawn, eps = draw_literature(monkeypatch, stratified=True)
    for image in range(6):
        times, noise = drawn.of_image(image)
        assert [int(t) // 3 for t in times] == [0, 1, 2]
        assert torch.equal(noise, eps[3 * image : 3 * image + 3])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sd15", "sd3"])
def test_norm_hinge(kind):
    """A velocity longer than the base's costs its excess, squared; a shorter one costs nothing."""
    model = common.new_model(kind, kl=0.1)
    numbered = [(i, common.TEXTS[0], {}) for i in range(8)]
    D = nft.collect(model, [], numbered, (0, 1), "old") | {"r": torch.full((8,), 0.5)}
    for B in model.lora.adapters["theta"][1::2]:
        B.copy_(torch.randn(B.shape, generator=nft.generator(B.shape)))
    t = model.times[[0, 1] * 4]
    eps = torch.randn(D["x_0"].shape, generator=nft.generator("eps"))
    pairs = (model, D, torch.arange(8), t, eps)
    loss, kl, ratio = rows.hinged_losses(*pairs, weight=10.0)

    alpha, sigma = model.noise_level(t, eps.ndim)
    x_t = alpha * D["x_0"] + sigma * eps
    lengths = []
    for policy in ("theta", None):
        out = model.predict(x_t, t, D["condition"], policy)
        # A flow's output is v itself.
        v = out if kind == "sd3" else out - (x_t - sigma * out) / alpha
        lengths.append(v.flatten(1).norm(dim=1))
    stretch = lengths[0] / lengths[1]
    assert stretch.min() < 1 < stretch.max()
    assert_close(ratio, stretch)
    plain, plain_kl, _ = nft.pair_losses(*pairs)
    expected = plain + 10 * (stretch - 1).clamp_min(0) ** 2
    assert_close(loss, expected, atol=1e-4, rtol=1e-4)
    assert_close(kl, plain_kl)


def test_rank():
    """r is the share of a prompt's other images that are worse; equal ones count half."""
    raw = torch.tensor([3.0, 1, 2, 7, 7, 7, 0, 1, 1])
    r = rows.by_rank(raw, torch.arange(9) // 3, None)
    assert r.tolist() == [1, 0, 0.5, 0.5, 0.5, 0.5, 0, 0.75, 0.75]


def test_extremes():
    """Of twice as many images each prompt keeps its worst and best, with what belongs to them."""

    def red(images, prompts, metadata):
        return images[:, 0].mean((1, 2))

    model = common.new_model("sd15", group_size=4)
    rewards = [nft.Reward("red", 1.0, red)]
    numbered = [(i, common.TEXTS[i // 4], {}) for i in range(8)]
    D = rows.extreme_images(model, rewards, numbered, (0, 1), "old")
    more = numbered + [(i + 8, *rest) for i, *rest in numbered]
    both = nft.collect(model, rewards, more, (0, 1), "old")
    raw = both["scores"]["reward"]
    for prompt in range(2):
        mine = slice(4 * prompt, 4 * prompt + 4)
        candidates = [i for i in range(16) if i % 8 // 4 == prompt]
        order = sorted(candidates, key=lambda i: raw[i])
        kept = order[:2] + order[-2:]
        assert_close(D["scores"]["reward"][mine], raw[kept])
        assert_close(D["x_0"][mine], both["x_0"][kept], atol=1e-5, rtol=1e-5)


def test_half_resolution():
    """Rollouts have half the height and width; rewards see whole pictures; settings stay."""
    model = common.new_model("sd15")
    seen = []

    def size(images, prompts, metadata):
        seen.append(images.shape[-1])
        return [0.0] * len(images)

    numbered = [(0, common.TEXTS[0], {})]
    before = dict(model.settings)
    D = rows.half_resolution_images(model, [nft.Reward("x", 1.0, size)], numbered, (0, 1), "old")
    whole = nft.collect(model, [], numbered, (0, 1), "old")
    assert 2 * D["x_0"].shape[-1] == whole["x_0"].shape[-1]
    assert seen == [whole["images"].shape[-1]]
    assert model.settings == before


def test_guided_evaluation(tmp_path):
    """At the run's own scale the accuracy is its own, which stays what it is without this part."""
    found = {}
    for name, change in (("guided", rows.guided), ("plain", None)):
        row = small_row(1, change=change)
        figures.run(row, tmp_path / name, 0)
        found[name] = report.points(row, tmp_path / name)
    for point, plain in zip(found["guided"], found["plain"], strict=True):
        assert point["accuracy"] == plain["accuracy"] == point["guidance 1"]
        assert point["guidance 2"] != point["guidance 1"]


def test_points_have_what_was_watched(tmp_path):
    """But not the reward that is trained on, as a part of itself."""
    shapes = nft.PRESETS["tiny"]["reward"]
    for name, reward, expected in (("a", "jpeg", {"shapes:reward"}), ("b", shapes, set())):
        row = small_row(1, reward=reward, watch=shapes)
        figures.run(row, tmp_path / name, 0)
        point = report.points(row, tmp_path / name)[-1]
        assert point.keys() & set(report.WATCHED) == expected


# ---- What runs cost ------------------------------------------------------------------------------
def test_seconds_leave_out_loading_and_evaluation(tmp_path):
    """Where each rewarded image takes a second, `cpu` is the number of images trained on."""
    clock = SimpleNamespace(now=5.0)

    def paid(images, prompts, metadata):
        clock.now += len(images)
        return images.mean((1, 2, 3))

    def slow_model(config):
        clock.now += 1000
        return nft.Model(config)

    meter = figures.Meter(slow_model, clock=lambda: clock.now)
    settings = common.settings("sd15", reward={"paid": paid}, iterations=3)
    logged = nft.train(
        nft.configure(out=tmp_path / "run", **settings),
        make_model=meter.make_model,
        evaluate=meter.evaluate,
    )
    assert [row.get("cpu") for row in logged] == [0, None, 12, 18]


@pytest.mark.parametrize(
    ("changes", "spent"),
    [
        # Six images: three sampling steps, two times, by theta, old and base.
        ({}, [0, 108, 162]),
        # Sampled every other time, trained without base.
        ({"reuse": 2, "kl": 0}, [0, 66, 108]),
        # Three sampling steps, and two steps trained by theta alone.
        ({"method": "loop", "kl": 0, "eta": "0", "clip_range": 0.1}, [0, 60, 90]),
    ],
)
def test_evaluations_are_those_of_training(changes, spent, tmp_path):
    """`evaluations` is images times (solver's steps + times trained, by each policy) so far."""
    row = small_row(3, **changes)
    figures.run(row, tmp_path, 0)
    found = report.points(row, tmp_path)
    assert [point["evaluations"] for point in found] == spent
    images = [0, 12, 18] if row.reuse == 1 else [0, 6, 12]
    assert [point["images"] for point in found] == images
    seconds = [point["seconds"] for point in found]
    assert 0 == seconds[0] < seconds[1] < seconds[2]


def test_every_row_is_evaluated_by_the_same_solver(tmp_path):
    """The base model's evaluation is dpm2's for every solver; training is by the row's own."""
    logged = {}
    for solver in ("dpm2", "ddim"):
        folder = tmp_path / solver
        figures.run(small_row(1, solver=solver), folder, 0)
        logged[solver] = report.read(folder)
    by_dpm2, by_ddim = logged["dpm2"], logged["ddim"]
    assert by_ddim[0]["eval_reward"] == by_dpm2[0]["eval_reward"]
    assert by_ddim[1]["reward"] != by_dpm2[1]["reward"]
    plain = common.run("sd15", tmp_path / "plain", solver="ddim", iterations=1, updates=1)
    assert common.metrics(plain)[1]["reward"] == by_ddim[1]["reward"]


def test_dpm2_is_no_sde():
    """dpm2 is the ODE solver also where the rollouts' scheduler is its SDE sibling."""
    from diffusers import DDIMScheduler

    sde = nft.pick_solver("dpm2-sde", DDIMScheduler())
    assert sde.config.algorithm_type == "sde-dpmsolver++"
    assert nft.pick_solver("dpm2", sde).config.algorithm_type == "dpmsolver++"


# ---- Runs ----------------------------------------------------------------------------------------
def test_a_cut_off_run_starts_anew(tmp_path):
    """A run of fewer iterations is no finished one, and what follows it is as without it."""
    row = small_row(2)
    write_run(tmp_path / "cut", 0, gained=0.1, cpu=1)
    assert report.points(row, tmp_path / "cut") == []
    figures.run(row, tmp_path / "cut", 3)
    figures.run(row, tmp_path / "whole", 3)
    without = ("seconds", "cpu")
    whole = common.metrics(tmp_path / "whole", *without)
    assert common.metrics(tmp_path / "cut", *without) == whole


def test_a_finished_run_is_not_repeated(tmp_path):
    """A directory with all of the row's iterations stays, unless method or settings differ."""
    row = small_row(1)
    log = tmp_path / "metrics.jsonl"
    figures.run(row, tmp_path, 0)
    before = log.read_text()
    figures.run(row, tmp_path, 0)
    assert log.read_text() == before
    # The seconds differ in any case.
    figures.run(small_row(1, lr=0.02), tmp_path, 0)
    assert log.read_text() != before
    (tmp_path / "origin.json").write_text('{"fingerprint": "another"}')
    before = log.read_text()
    figures.run(small_row(1, lr=0.02), tmp_path, 0)
    assert log.read_text() != before
    assert figures.is_done(small_row(1, lr=0.02), tmp_path, 0)


def test_a_refused_row_says_why(tmp_path):
    """What nft.py refuses before training is passed on as it is."""
    with pytest.raises(nft.UserError, match="--solver none: must be"):
        figures.run(small_row(solver="none"), tmp_path / "run", 0)


def test_a_failed_run_is_not_to_be_resumed(tmp_path):
    """What fails in training says why, without nft.py's own advice, which would forget the row."""
    with pytest.raises(RuntimeError, match="is not finite") as failed:
        figures.run(small_row(lr=1e30, warmup=0), tmp_path / "run", 0)
    assert "--resume" not in str(failed.value)


def test_a_failed_run_does_not_stop_the_others(tmp_path, capfd):
    """run_all finishes what can be finished, names what failed, and exits with 1."""
    good = small_row(1)
    bad = small_row(2, solver="none")
    tasks = [(good, tmp_path / "good", 0), (bad, tmp_path / "bad", 0)]
    assert figures.run_all(tasks, jobs=1) == 1
    assert report.finished(good, tmp_path / "good")
    words = capfd.readouterr().err
    assert "figures.py: failed: bad: --solver none: must be" in words
    assert "good:" not in words


ENDLESS = """
import json, pathlib, sys
import figures, rows

if __name__ == "__main__":
    row = rows.Row(**json.loads(sys.argv[1]))
    sys.exit(figures.run_all([(row, pathlib.Path(sys.argv[2]), 0)], jobs=1))
"""


def test_an_interrupt_ends_all_processes(tmp_path):
    """Ctrl-C, which a terminal sends to all processes, ends them: exit status 130."""
    script = tmp_path / "endless.py"
    script.write_text(ENDLESS)
    row = json.dumps(dataclasses.asdict(small_row(100000)), default=str)
    environment = os.environ | {"PYTHONPATH": str(common.EXAMPLES / "studies")}
    log = tmp_path / "run/metrics.jsonl"
    process = subprocess.Popen(
        [sys.executable, script, row, tmp_path / "run"], env=environment, start_new_session=True
    )
    try:
        wait_for(log.exists)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 130
        wait_for(functools.partial(is_gone, process.pid))
    finally:
        if not is_gone(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for(happened, seconds=120):
    """Wait until happened() is true."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.1)


def is_gone(group):
    """Whether no process is left of a process group."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


# ---- Tables --------------------------------------------------------------------------------------
def test_first_crossing():
    """A target is reached where the line between evaluations first crosses it, for good or not."""
    run = []
    for images, accuracy in ((0, 0.3), (100, 0.4), (200, 0.6), (300, 0.45), (400, 0.7)):
        run.append({"images": images, "accuracy": accuracy})
    assert report.reach(run, "images", 0.5) == ("", pytest.approx(150))
    assert report.reach(run, "images", 0.7) == ("", pytest.approx(400))
    assert report.reach(run, "images", 0.71) == (">", 400)
    # There from the start.
    assert report.reach(run[1:], "images", 0.3) == ("", 100)


def test_ratio_of_bounds():
    """A ratio is a bound where one of the two is; of two bounds it says nothing."""
    three = Amount("", 300)
    assert report.ratio(three, Amount("", 100)) == ("", 3)
    assert report.ratio(Amount(">", 400), Amount("", 100)) == (">", 4)
    assert report.ratio(three, Amount(">", 600)) == ("<", 0.5)
    assert report.ratio(Amount(">", 300), Amount(">", 100)) is None


@pytest.mark.parametrize(
    ("amounts", "text"),
    [
        ([("", 3), ("", 1), ("", 2)], "2 (1 to 3)"),
        ([("", 1234.5)], "1,234"),
        ([("", 2), (">", 5), ("", 3)], "3 (2 to >5)"),
        ([("", 2), (">", 1), ("", 3)], ">2 (>1 to >3)"),
        ([("", 2), ("<", 5), ("", 3)], "<3 (<2 to <5)"),
        ([(">", 5)] * 3, ">5"),
        ([None], "unknown"),
        ([None, ("", 2), ("", 4)], "2 (2 to 4) 2 of 3 seeds"),
    ],
)
def test_spread_over_seeds(amounts, text):
    """Median and range; a number is marked as a bound just where a bound may change it."""
    assert report.spread([amount and Amount(*amount) for amount in amounts]) == text


def write_run(folder, iterations, gained, cpu):
    """The directory of a run whose accuracy rises from 0.3 by `gained` an iteration."""
    from PIL import Image

    (folder / "samples").mkdir(parents=True)
    Image.new("RGB", (80, 40)).save(folder / f"samples/{iterations:06d}.png")
    (folder / "config.json").write_text('{"groups": 16, "group_size": 12, "reward": "jpeg"}')
    lines = []
    for i in range(0, iterations + 1, 2):
        row = {
            "iteration": i,
            "evaluations": 1000 * i,
            "cpu": cpu * i,
            "eval_roughness": 1,
            "reward": i / 10,
            "eval_reward": 0.3 + gained * i,
        }
        lines.append(json.dumps(row) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines))


def test_report(tmp_path, capsys):
    """Tables and plots are of finished runs alone; a target never reached has bounds throughout."""
    pytest.importorskip("matplotlib")
    nft_row, ddpo_row = rows.FIGURES["tiny"][:2]
    for seed in (0, 1):
        write_run(tmp_path / f"{nft_row.name}-{seed}", 24, gained=0.05, cpu=seed + 1)
    for seed in (0, 2):
        write_run(tmp_path / f"{ddpo_row.name}-{seed}", 24, gained=0.0125, cpu=seed + 1)
    # Seed 1 is unfinished.
    write_run(tmp_path / f"{ddpo_row.name}-1", 22, gained=0.0125, cpu=2)
    report.report({"tiny": [nft_row, ddpo_row]}, [0, 1, 2], tmp_path)
    text = capsys.readouterr().out
    assert text.strip() == (tmp_path / "tables.md").read_text().strip()
    lines = text.splitlines()
    spent = "| 4,000 | 4 (4 to 8) | 8,000 | 8 (8 to 16) |"
    assert any(line.startswith("| NFT |") and line.endswith(spent) for line in lines)
    ddpo, over = (line for line in lines if line.startswith("| DDPO"))
    reached = "| 16,000 | 16 (16 to 48) "
    assert ddpo.endswith(reached + "| >24,000 | >24 (>24 to >72) |")
    # Seed 2 has no NFT.
    assert over.endswith("| 4 | 4 | >3 | >3 |")
    assert not any(line.startswith("| NFT / NFT") for line in lines)
    names = {file.name for file in tmp_path.glob("*.png")}
    assert names == {"comparison.png", "grids-tiny.png"}


def test_a_method_has_one_colour():
    """Whatever else a plot shows; rows of one method are told apart."""
    tiny = report.styles(rows.FIGURES["tiny"])
    assert len(set(tiny)) == len(rows.FIGURES["tiny"])
    assert report.styles(rows.FIGURES["tiny-sd3"])[0] == tiny[0]
    for name in ("default", *report.COMPARISONS, *report.ABLATIONS):
        wanted = rows.FIGURES[name]
        assert len(set(report.styles(wanted))) == len(wanted)


def test_images_count_once(tmp_path):
    """Images that are trained on in several iterations count when they are sampled."""
    write_run(tmp_path / "run", 8, gained=0.1, cpu=1)
    found = report.points(small_row(8, reuse=4), tmp_path / "run")
    assert [point["images"] for point in found] == [0, 192, 192, 384, 384]


def test_sweep_table(tmp_path):
    """The best of a method, model and length is bold; the training reward is of the last three."""
    first, second, third = rows.FIGURES["sweep"][:3]
    write_run(tmp_path / f"{first.name}-0", 10, gained=0.01, cpu=30)
    write_run(tmp_path / f"{second.name}-0", 10, gained=0.02, cpu=30)
    write_run(tmp_path / f"{third.name}-0", 8, gained=0.03, cpu=30)
    text = report.sweep_table(rows.FIGURES["sweep"], tmp_path, 0)
    lines = text.splitlines()
    assert lines[2].endswith("| 10 | 0.400 | 0.400 | 0.800 | 1.00 | 5.0 |")
    assert lines[3].endswith("| 10 | 0.500 | **0.500** | 0.800 | 1.00 | 5.0 |")
    assert lines[4:] == ["", "The sweep took 10 minutes of a core."]


# ---- Command line --------------------------------------------------------------------------------
def refusal(tmp_path, capsys, *words):
    """The last line of what figures.py says when it refuses; it has run nothing."""
    with pytest.raises(SystemExit) as stopped:
        figures.main([*words, "--out", str(tmp_path / "runs")])
    assert stopped.value.code == 2
    assert not (tmp_path / "runs").exists()
    return capsys.readouterr().err.splitlines()[-1]


def test_unknown_figures_are_refused(tmp_path, capsys):
    """A figure that is not there ends in one clear line before anything is run."""
    pytest.importorskip("matplotlib")
    assert "--figures none: must be of default," in refusal(
        tmp_path, capsys, "--figures", "tiny,none"
    )


def test_matplotlib_is_asked_for_first(tmp_path, capsys, monkeypatch):
    """Without matplotlib nothing is run."""
    # How Python marks a module that cannot be imported.
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in refusal(tmp_path, capsys)


def test_plot_runs_nothing(tmp_path, capsys):
    """--plot reports what is there, if only that there is nothing."""
    pytest.importorskip("matplotlib")
    assert figures.main(["--plot", "--out", str(tmp_path / "runs")]) == 0
    assert [file.name for file in (tmp_path / "runs").iterdir()] == ["tables.md"]
    assert report.NOTE in capsys.readouterr().out


# ---- Finished runs -------------------------------------------------------------------------------
def test_plot_runs(tmp_path, capsys):
    """Runs are compared at the iterations that all of a line were evaluated at."""
    pytest.importorskip("matplotlib")
    from PIL import Image

    for name, iterations in (("short", 4), ("long", 6)):
        write_run(tmp_path / name, iterations, gained=0.1, cpu=1)
        file = tmp_path / name / "metrics.jsonl"
        more = '{"images": 5, "seconds": 2, '
        file.write_text(file.read_text().replace("{", more))
    groups = [f"both={tmp_path}/short,{tmp_path}/long", f"one={tmp_path}/long"]
    plot_runs.main(tmp_path / "curve.png", *groups)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["both", "both", "one"]
    ends = [line.split(" -> ")[1].split()[0] for line in lines]
    assert ends == ["0.700", "0.700", "0.900"]
    with Image.open(tmp_path / "curve.png") as picture:
        assert picture.size == (880, 308)
