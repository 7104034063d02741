"""What follow.py sends, read back from each tracker that is installed, and what plot_runs.py draws.

W&B runs offline and Trackio locally: nothing leaves the machine.
SPDX-License-Identifier: MIT
"""

import io
import json
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import plot_runs
import pytest
from PIL import Image

COMMAND = [sys.executable, Path(__file__).resolve().parents[1] / "follow.py"]


def write_run(folder, offset=0.0, iterations=4):
    """A run's directory without a run: even iterations are evaluated."""
    (folder / "samples").mkdir(parents=True)
    rows = []
    for i in range(iterations + 1):
        rows.append({"iteration": i, "reward": offset + i / 2, "seconds": 2.5 * i})
        if i % 2 == 0:
            rows[i] |= {"eval_reward": offset + i, "eval_reward/a": i / 8, "eval_reward/b": 1.0}
            Image.new("RGB", (24, 16), (50 * i, 100, 200)).save(folder / f"samples/{i:06d}.png")
    (folder / "config.json").write_text(json.dumps({"model": "tiny", "iterations": iterations}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def run(tmp_path):
    """A finished run's directory."""
    return write_run(tmp_path / "run")


def send(tracker, run, *flags, **environment):
    """Send a run by the command line; skip where the tracker is not installed."""
    pytest.importorskip(tracker)
    command = [*COMMAND, "run", "--to", tracker, *flags]
    subprocess.run(command, cwd=run.parent, env=os.environ | environment, check=True, timeout=100)


def rows_of(run):
    """{iteration: row} of a run."""
    return dict(enumerate(map(json.loads, (run / "metrics.jsonl").read_text().splitlines())))


def check_pictures(pictures, run):
    """The pictures {step: file} that a tracker has are the run's."""
    assert list(pictures) == [0, 2, 4]
    for i, file in pictures.items():
        assert np.array_equal(Image.open(file), Image.open(run / f"samples/{i:06d}.png"))


def test_tensorboard(run):
    """TensorBoard's own reader finds each number and picture at its iteration, once, though it was
    sent what there was of the run before, and rows and a half were there when it was followed."""
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text[: len(text) // 2])
    send("tensorboard", run, "--once")
    with subprocess.Popen([*COMMAND, run, "--to", "tensorboard", "--every", "0.1"]) as process:
        while process.poll() is None and len(list(run.glob("tensorboard/*"))) < 2:
            time.sleep(0.1)
        (run / "metrics.jsonl").write_text(text)
        assert process.wait(100) == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), {"images": 0, "scalars": 0}).Reload()
    found = {i: {} for i in range(5)}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            assert name not in found[event.step]
            found[event.step][name] = event.value
    pictures = {event.step: event.encoded_image_string for event in events.Images("samples")}
    assert found == rows_of(run)
    check_pictures({i: io.BytesIO(code) for i, code in pictures.items()}, run)


def test_trackio(run):
    """Trackio's database has each row and each picture at its iteration."""
    send("trackio", run, TRACKIO_DIR=str(run / "own"))
    rows = sqlite3.connect(run / "own/nft.db").execute("SELECT step, metrics FROM metrics")
    found = {step: json.loads(text) for step, text in rows}
    names = {i: found[i].pop("samples")["file_path"] for i in (0, 2, 4)}
    assert found == rows_of(run)
    check_pictures({i: run / "own/media" / name for i, name in names.items()}, run)


def test_wandb(run):
    """W&B's offline files name the rows' fields, and have each picture at its iteration."""
    send("wandb", run, WANDB_MODE="offline")
    (file,) = run.parent.glob("wandb/offline-run-*/*.wandb")
    assert b"eval_reward/a" in file.read_bytes()
    found = sorted(file.parent.rglob("*.png"))
    check_pictures({int(path.name.split("_")[1]): path for path in found}, run)


def test_plot_runs(tmp_path, monkeypatch, capsys):
    """A line is the mean over its runs, with their range, at the iterations that all have, in a
    plot for the reward and each of several; what is printed are its ends."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    write_run(Path("short"), offset=1.0)
    write_run(Path("long"), iterations=6)
    axes = plot_runs.make_figure(list(map(plot_runs.parse, ("both=short,long", "long")))).axes
    assert [axis.get_title() for axis in axes] == ["reward", "a", "b"]
    both, alone = axes[0].lines
    assert both.get_xydata().tolist() == [[0, 0.5], [2, 2.5], [4, 4.5]]
    assert alone.get_xydata().tolist() == [[i, i] for i in (0, 2, 4, 6)]
    assert axes[0].collections[0].get_datalim(axes[0].transData).intervaly.tolist() == [0, 5]
    plot_runs.main("curve.png", "both=short,long")
    assert "both: held-out reward 0.500 -> 4.500 (5.000, 4.000)" in capsys.readouterr().out
