"""harness.py with rows.py and report.py: what is run, what is kept of it, and what pages show.

SPDX-License-Identifier: MIT
"""

import json
import multiprocessing
import os
import time

import baselines
import common
import harness
import pytest
import report
import rows
import torch
from torch.testing import assert_close

import nft


# ---- What is run ---------------------------------------------------------------------------------
def test_settings_reach_the_run(tmp_path):
    """A row's settings are its run's; a baseline's own its method's; what is open the preset's."""
    for row in [row for row in rows.ROWS.values() if not row.script]:
        config, parts = harness.prepare(row, 7, tmp_path)
        expected = vars(nft.configure(model=row.settings["model"], out=tmp_path)) | {"seed": 7}
        if row.method != "nft":
            expected |= baselines.METHODS[row.method].settings
        for setting, value in row.settings.items():
            if setting in harness.OWN:
                # The part is a method of the baselines.Method.
                assert getattr(parts["make_model"].__self__, setting) == value
            elif setting != "model":
                expected[setting] = value
        assert vars(config) == expected
        assert bool(parts) == (row.method != "nft" or row.parts != "")


def test_a_row_has_the_settings_of_sd15(tmp_path):
    """as-sd15 is the preset of sd15 but for model, reward, prompts and the batches' size."""
    config, _ = harness.prepare(rows.ROWS["as-sd15"], 0, tmp_path)
    own = ("model", "reward", "prompts", "eval_prompts", "batch_size")
    kept = {name: getattr(config, name) for name in own}
    assert vars(config) == vars(nft.configure(model="sd15", out=tmp_path)) | kept


# ---- What a row changes in the loss --------------------------------------------------------------
def pairs_of(kind):
    """An image at each time of the sampler, for losses: model, pairs, t, eps."""
    model = common.new_model(kind, filled=True)
    t = model.times
    numbered = [(i, common.TEXTS[0], {}) for i in range(len(t))]
    D = nft.collect(model, {}, numbered, (0, 1), "old")
    pairs = {"x_0": D["x_0"], "condition": D["condition"], "r": torch.linspace(0.2, 0.9, len(t))}
    return model, pairs, t, torch.randn(D["x_0"].shape, generator=nft.generator("test"))


@pytest.mark.parametrize(
    ("part", "formula"),
    [("w = 1", torch.ones_like), ("w = t", lambda t: t), ("w = 1 - t", lambda t: 1 - t)],
)
@torch.no_grad()
def test_weighted_is_the_velocity_loss(part, formula):
    """A flow's loss is w(t) (r |v+ - v|^2 + (1 - r) |v- - v|^2) / beta, scaled alike at all t."""
    model, pairs, t, eps = pairs_of("sd3")
    loss, *rest = rows.PARTS[part]["losses"](model, pairs, t, eps)
    assert_close(rest, list(nft.pair_losses(model, pairs, t, eps)[1:]))
    s = t / 1000
    sigma = s.view(-1, 1, 1, 1)
    x_t = (1 - sigma) * pairs["x_0"] + sigma * eps
    old, theta = (model.predict(x_t, t, pairs["condition"], name) for name in ("old", "theta"))
    beta = model.config.beta
    v = eps - pairs["x_0"]
    positive = ((1 - beta) * old + beta * theta - v).square().flatten(1).mean(1)
    negative = ((1 + beta) * old - beta * theta - v).square().flatten(1).mean(1)
    mixed = pairs["r"] * positive + (1 - pairs["r"]) * negative
    scale = s.mean() / formula(s).mean()
    assert_close(loss, scale * formula(s) * mixed / beta, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_other_losses_of_an_eps_model():
    """The weights of eps's errors are (sigma / alpha)^k; "positive only" is the whole at r = 1."""
    model, pairs, t, eps = pairs_of("sd15")
    loss, *rest = nft.pair_losses(model, pairs, t, eps)
    alpha, sigma = model.noise_level(t)
    for part, weight in (("weight σ/α", sigma / alpha), ("weight 1", torch.ones(len(t)))):
        found = rows.PARTS[part]["losses"](model, pairs, t, eps)
        assert_close(found[0] / weight, loss * (alpha + sigma) / sigma, rtol=1e-4, atol=0)
        assert_close(list(found[1:]), rest, rtol=0, atol=0)
    pairs["r"] = torch.ones(len(t))
    positive, *_ = rows.PARTS["positive only"]["losses"](model, pairs, t, eps)
    assert_close(positive, nft.pair_losses(model, pairs, t, eps)[0])
    pairs["r"] = torch.zeros(len(t))
    assert rows.PARTS["positive only"]["losses"](model, pairs, t, eps)[0].eq(0).all()


# ---- Runs ----------------------------------------------------------------------------------------
def small(**changes):
    """Settings of a run of some seconds: 8 images an iteration, 3 steps, 2 levels."""
    held_out = common.ROOT / "four.txt"
    held_out.write_text("a red circle\ntwo blue squares\na green triangle\na yellow cross\n")
    settings = {"model": "tiny", "eval_prompts": str(held_out), "iterations": 2, "groups": 2}
    settings |= {"group_size": 4, "batch_size": 8, "steps": 3, "eval_steps": 3, "eval_every": 1}
    return settings | changes


def test_a_run_is_kept_and_not_repeated(tmp_path, monkeypatch):
    """Its numbers are those of `python nft.py`, and a page shows them. It is not run again, unless
    nft.py or the row has changed; one that was cut off begins anew."""
    file = tmp_path / "results.json"
    page = tmp_path / "page.md"
    monkeypatch.setattr(report, "FILE", file)
    monkeypatch.setattr(report, "PAGES", [page])
    row = rows.Row(small(reward=rows.ROUGH))
    monkeypatch.setitem(rows.ROWS, "tiny", row)
    page.write_text("<!-- results: tiny end -->?<!-- end -->")
    words = ["--rows", "tiny", "--seeds", "4", "--out", str(tmp_path / "runs")]
    folder = tmp_path / "runs/tiny-4"
    folder.mkdir(parents=True)
    (folder / "checkpoint.pt").write_text("cut off")
    assert harness.main(words) == 0
    kept = report.read(file)["tiny/4"]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    nft.train(nft.configure(seed=4, out=tmp_path / "plain", **row.settings))
    torch.set_num_threads(threads)
    logged = common.metrics(folder)
    without = ("seconds", "cpu", "evaluations")
    assert common.metrics(folder, *without) == common.metrics(tmp_path / "plain", *without)
    # An image takes three evaluations in its rollout, and theta, old and base at two levels.
    assert [entry["evaluations"] for entry in logged] == [0, 8 * (3 + 3 * 2), 16 * (3 + 3 * 2)]
    for point, entry in zip(kept["curve"], logged, strict=True):
        spent = [entry["evaluations"], round(entry["cpu"], 1)]
        assert point == [*spent, round(entry["eval_reward"], 4)]
    rough = [round(logged[i]["eval_reward/roughness"], 4) for i in (0, -1)]
    assert (kept["images"], kept["watched"]) == (16, {"roughness": rough})
    assert f"-->{logged[-1]['eval_reward']:.3f}<!--" in page.read_text()
    assert (tmp_path / "reward_curve.png").exists()

    written = file.stat().st_mtime_ns
    assert harness.main(words) == 0
    assert file.stat().st_mtime_ns == written
    assert harness.is_done(kept, row)
    assert not harness.is_done(kept | {"nft": "another"}, row)
    assert not harness.is_done(kept, rows.Row(small(reward=rows.ROUGH, lr=0.1)))


def test_baselines_and_parts_run(tmp_path):
    """They train. Evaluation is not counted, and is by dpm2, whatever the rollouts' solver is."""
    settings = small(iterations=1, reward=rows.ROUGH)
    kept = {}
    for name, row in (
        ("rft", rows.Row(settings | {"solver": "ddim"}, "rft")),
        ("guided", rows.Row(settings, parts="guidance 1, 2, 3")),
    ):
        config, parts = harness.prepare(row, 0, tmp_path / name)
        meter = harness.Meter(parts)
        nft.train(config, **parts | {"make_model": meter.make_model, "evaluate": meter.evaluate})
        kept[name] = harness.summarize(row, tmp_path / name)
    # RFT needs theta alone, for images that are not left out.
    assert 8 * 3 <= kept["rft"]["curve"][1][0] <= 8 * (3 + 2)
    assert kept["guided"]["curve"][1][0] == 8 * (3 + 3 * 2)
    watched = kept["guided"]["watched"]
    assert watched["roughness"][0] == kept["rft"]["watched"]["roughness"][0]
    assert watched["guidance 1"] == [point[2] for point in kept["guided"]["curve"]]


def test_scripts(tmp_path):
    """A script's row is given its settings as flags, --seed and --out, and its metrics.jsonl is
    read; one that prints is given nothing, and its table is kept; one that fails leaves nothing."""
    script = tmp_path / "script.py"
    script.write_text(
        "import json, pathlib, sys\n"
        "print('words\\n| a |\\n| --- |\\n| b |\\nmore words')\n"
        "words = sys.argv[1:]\n"
        "if words:\n"
        "    assert words[:-1] == ['rated', '--train-times', '2', '--seed', '5', '--out']\n"
        f"    row = {{'images': 8, 'eval_reward': 0.5, 'eval_reward/{rows.EXACT}': 0.5}}\n"
        "    pathlib.Path(words[-1], 'metrics.jsonl').write_text(json.dumps(row) + '\\n')\n"
    )
    tasks = [
        ("offline", rows.Row({"train_times": 2}, script=f"{script} rated"), 5),
        ("table", rows.Row(script=str(script), prints=True), 0),
        ("failed", rows.Row(script=f"{script} failed"), 0),
    ]
    assert harness.run_all(tasks, tmp_path, tmp_path / "results.json", 2) == 1
    found = report.read(tmp_path / "results.json")
    assert found.keys() == {"offline/5", "table/0"}
    assert found["table/0"]["table"] == "| a |\n| --- |\n| b |\n"
    assert found["offline/5"]["curve"] == [[0, 0, 0.5]]


def test_a_kill_ends_all_and_leaves_no_result(tmp_path):
    """SIGTERM to the harness ends the run that it had started; nothing of it is recorded."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, pathlib, sys, time\n"
        "pathlib.Path(sys.argv[-1], 'pid').write_text(str(os.getpid()))\n"
        "time.sleep(600)\n"
    )
    file = tmp_path / "results.json"
    tasks = [("tiny", rows.Row(script=str(script)), 0)]
    start = multiprocessing.get_context("spawn").Process
    process = start(target=harness.run_all, args=(tasks, tmp_path, file, 1))
    process.start()
    started = tmp_path / "tiny-0/pid"
    while not (started.exists() and started.read_text()):
        assert process.is_alive()
        time.sleep(0.1)
    process.terminate()
    process.join()
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)
    assert not file.exists()


def test_names_of_rows():
    """--rows takes rows, tables and patterns, each row once."""
    assert harness.chosen("few-nft,few,few-d*") == ["few-nft", *rows.TABLES["few"][0][1:]]


# ---- Tables and pages ----------------------------------------------------------------------------
NFT = (
    "[[0, 0, 0.25], [1000, 60, 0.75], [2000, 120, 0.8]]",
    "[[0, 0, 0.25], [1000, 60, 0.75], [2000, 120, 0.7]]",
)
# Two of three seeds reach 0.5: after 4000 and 3000; the third one spends 8000 in vain.
DDPO = (
    "[[0, 0, 0.25], [8000, 300, 0.75]]",
    "[[0, 0, 0.25], [6000, 200, 0.75], [8000, 300, 0.125]]",
    "[[0, 0, 0.25], [8000, 300, 0.375]]",
)


def recorded(name, *curves, **changes):
    """Results of a row: a curve a seed."""
    made = {"nft": report.sha(), "commit": "abc", "cpu": "X", "row": rows.ROWS[name].digest()}
    made |= {"images": 1920, "watched": {}} | changes
    results = {}
    for seed, curve in enumerate(curves):
        results[f"{name}/{seed}"] = made | {"curve": json.loads(curve)}
    return results


def test_a_table_has_the_numbers_of_results():
    """Means and seeds; medians, ranges, bounds, and how many times the first row's they are."""
    results = recorded("tiny-nft", *NFT) | recorded("tiny-ddpo", *DDPO)
    lines = report.table("comparison", results).splitlines()
    cells = {line.split(" | ")[0]: line.split(" | ")[1:] for line in lines if " | " in line}
    settings, end, best, *race = cells["| tiny-nft"]
    assert settings == report.flags({"train_times": 3} | rows.TUNED["nft"])
    assert (end, best) == ("0.750 (0.800, 0.700)", "0.775 (0.800, 0.750)")
    assert race == ["500", "900", "30", "54 |"]
    _, end, best, *race = cells["| tiny-ddpo"]
    assert (end, best) == ("0.417 (0.750, 0.125, 0.375)", "0.625 (0.750, 0.750, 0.375)")
    assert race[:2] == ["4,000 (3,000–>8,000), 8×", "7,200 (5,400–>8,000), 8×"]
    assert cells["| tiny-rft"][1] == "not measured yet"
    assert "Unless a row says otherwise: `--steps 10 --eval-steps 10" in "\n".join(lines)


def test_pages_are_filled_between_markers_alone():
    """A table, a cell or what a script printed stands there; nothing else of the page changes."""
    page = "# A\n<!-- results: {} -->old<!-- end --> b\n<!-- results: base end -->x<!-- end --> %s"
    results = recorded("tiny", *NFT, watched={"roughness": [0.25, 0.5]})
    results |= recorded("speed", "[]", table="| 1 |\n")
    for name, shown in (
        ("tiny accuracy", "0.250 → 0.750 (0.800, 0.700)"),
        ("tiny roughness", "0.250 → 0.500 (0.500, 0.500)"),
        ("speed", "\n| 1 |\n\n*commit abc on X*\n"),
        ("default", report.table("default", results)),
    ):
        expected = page.format(name).replace("old", shown).replace(">x<", ">not measured yet<")
        assert report.fill(page.format(name), results) == expected
    with pytest.raises(KeyError, match="default-run"):
        report.fill("<!-- results: default-run -->old<!-- end -->", results)


def test_earlier_code_is_named():
    """Results of an earlier nft.py say so, and give way to any of today's; other settings' go."""
    earlier = recorded("tiny-nft", *NFT, nft="0123", commit="old")
    told = "*commit old on X, with an earlier nft.py (0123)*"
    assert report.show("tiny-nft end", earlier).endswith(f"0.700) ({told})")
    assert told in report.show("comparison", earlier)
    assert report.show("tiny-nft end", earlier | recorded("tiny-nft", NFT[1])) == "0.700"
    changed = recorded("tiny-nft", *NFT, row="of other settings")
    assert report.show("tiny-nft end", changed) == "not measured yet"


def test_this_repository():
    """results.json has at most 100 KB, and the pages show what it has: else harness.py --write."""
    assert report.FILE.stat().st_size <= 100_000
    for page in report.PAGES:
        text = page.read_text("utf-8")
        assert text.count("<!-- results:") == text.count("<!-- end -->")
        assert report.fill(text, json.loads(report.FILE.read_text("utf-8"))) == text
