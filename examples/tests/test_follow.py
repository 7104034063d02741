"""Following a run: what follow.py sends, read back from each tracker, and what plot_runs.py draws.

    pip install tensorboard wandb trackio
    python -m pytest examples/tests/test_follow.py

Where a tracker is missing its test is skipped. W&B runs offline and Trackio locally: nothing leaves
the machine. Each test's docstring states a law.
SPDX-License-Identifier: MIT
"""

import importlib.util
import io
import json
import os
import sqlite3
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import plot_runs
import pytest
from PIL import Image

EXAMPLES = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(EXAMPLES))
import follow

ITERATIONS = 4


# ---- A run that does not train -------------------------------------------------------------------
def row(iteration, **more):
    """A row of metrics.jsonl; even iterations are evaluated."""
    made = {"iteration": iteration, "images": 48 * iteration, "seconds": 2.5 * iteration}
    if iteration:
        made |= {"reward/jpeg": -40.0 + iteration, "reward": -20.0 + iteration / 2}
    if iteration % 2 == 0:
        made |= {
            "eval_reward/jpeg": -40.5 + iteration,
            "eval_reward/shapes:reward": 0.25 + iteration / 16,
            "eval_reward": -20.25 + iteration / 2,
            "eval_roughness": 1 + iteration / 64,
        }
    return made | more


def replace(file, text):
    """Write a file whole, as nft.py does."""
    new = file.with_suffix(".new")
    new.write_text(text)
    os.replace(new, file)


def write_rows(folder, rows):
    """Write a run's directory with these rows, and the pictures of those that are evaluated."""
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    for one in rows:
        if "eval_reward" in one:
            i = one["iteration"]
            grid = Image.new("RGB", (24, 16), (50 * i, 100, 200))
            grid.save(folder / f"samples/{i:06d}.png")
    replace(folder / "config.json", json.dumps({"model": "tiny", "iterations": ITERATIONS}))
    replace(folder / "metrics.jsonl", "".join(json.dumps(one) + "\n" for one in rows))
    return rows


def run_until(folder, iteration):
    """Write a run that has come to an iteration."""
    return write_rows(folder, [row(i) for i in range(iteration + 1)])


class Recorder:
    """A tracker that remembers what it was sent."""

    def __init__(self, folder, config):
        assert config["iterations"] == ITERATIONS
        self.sent = []
        self.closed = False

    def __call__(self, folder, config):
        return self

    def send(self, step, numbers, picture):
        if picture:
            assert picture.exists()
        self.sent.append((step, numbers, picture and picture.name))

    def close(self):
        self.closed = True


def expected(rows):
    """What is to be sent of rows: each number, and each picture with its evaluation."""
    all_sent = []
    for one in rows:
        numbers = {name: x for name, x in one.items() if name != "iteration"}
        picture = f"{one['iteration']:06d}.png" if "eval_reward" in one else None
        all_sent.append((one["iteration"], numbers, picture))
    return all_sent


@pytest.fixture
def recorder():
    """A Recorder, which opens as itself."""
    return Recorder(None, {"iterations": ITERATIONS})


def between_looks(monkeypatch, *steps):
    """The steps, functions, happen one after the other while follow.py sleeps."""
    left = list(steps)
    monkeypatch.setattr(follow.time, "sleep", lambda seconds: left.pop(0)())
    return left


# ---- What is sent, and when ----------------------------------------------------------------------
def test_a_run_that_goes_on(tmp_path, recorder, monkeypatch):
    """Each row is sent once, as soon as it is there; the end of the run is the end."""
    came = []

    def go_on(iteration):
        came.append(len(recorder.sent))
        run_until(tmp_path, iteration)

    run_until(tmp_path, 0)
    steps = [lambda i=i: go_on(i) for i in (1, 1, 3, 4)]
    left = between_looks(monkeypatch, *steps)
    follow.follow(tmp_path, recorder, every=1, once=False)
    assert came == [1, 2, 2, 4]
    assert recorder.sent == expected(run_until(tmp_path, 4))
    assert left == []
    assert recorder.closed


def test_once(tmp_path, recorder, monkeypatch):
    """--once sends what is there, and waits for nothing."""
    between_looks(monkeypatch)
    rows = run_until(tmp_path, 3)
    follow.follow(tmp_path, recorder, every=1, once=True)
    assert recorder.sent == expected(rows)
    assert recorder.closed


def test_a_row_that_grows(tmp_path, recorder, monkeypatch):
    """A last row that is evaluated when the run is resumed to end there sends what is new."""
    short = {"iteration": 4, "images": 192}
    rows = run_until(tmp_path, 3)
    write_rows(tmp_path, [*rows, short])
    grown = short | {"eval_reward": -18.25}
    between_looks(monkeypatch, lambda: write_rows(tmp_path, [*rows, grown]))
    follow.follow(tmp_path, recorder, every=1, once=False)
    assert recorder.sent[4:] == [
        (4, {"images": 192}, None),
        (4, {"eval_reward": -18.25}, "000004.png"),
    ]


def test_a_run_to_come(tmp_path, recorder, monkeypatch):
    """follow.py may be started first: it waits for the run."""
    between_looks(monkeypatch, lambda: None, lambda: run_until(tmp_path, 4))
    monkeypatch.setitem(follow.TRACKERS, "wandb", recorder)
    assert follow.main([str(tmp_path), "--to", "wandb"]) == 0
    assert recorder.sent == expected(run_until(tmp_path, 4))


def interrupt():
    raise KeyboardInterrupt


def test_interrupted(tmp_path, recorder, monkeypatch):
    """Ctrl-C closes the tracker, which has what was sent: exit status 130."""
    rows = run_until(tmp_path, 2)
    between_looks(monkeypatch, interrupt)
    monkeypatch.setitem(follow.TRACKERS, "wandb", recorder)
    assert follow.main([str(tmp_path), "--to", "wandb"]) == 130
    assert recorder.sent == expected(rows)
    assert recorder.closed


def refusal(capsys, *words):
    """The one line that follow.py says where it cannot go on, with status 2."""
    assert follow.main([str(word) for word in words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_another_run(tmp_path, recorder, monkeypatch, capsys):
    """A run that begins anew in the directory is not mixed with the one before."""
    rows = run_until(tmp_path, 2)
    other = [row(0, seconds=7.0), *(row(i) for i in range(1, 5))]
    between_looks(monkeypatch, lambda: write_rows(tmp_path, other))
    monkeypatch.setitem(follow.TRACKERS, "wandb", recorder)
    assert "another run has begun" in refusal(capsys, tmp_path, "--to", "wandb")
    assert recorder.sent == expected(rows)
    assert recorder.closed


def test_no_run(tmp_path, capsys):
    """--once in a directory without a run is refused in a line that names it."""
    said = refusal(capsys, tmp_path / "none", "--to", "wandb", "--once")
    assert f"{tmp_path}/none: must be" in said


@pytest.mark.parametrize("tracker", follow.TRACKERS)
def test_no_tracker(tracker, tmp_path, monkeypatch, capsys):
    """A tracker that is not installed is named, and how to install it."""
    run_until(tmp_path, 4)
    # How Python marks a module that cannot be imported.
    monkeypatch.setitem(sys.modules, tracker, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    assert f"pip install {tracker}" in refusal(capsys, tmp_path, "--to", tracker)


# ---- Read back from the trackers -----------------------------------------------------------------
def send(tracker, folder, **environment):
    """Run the command line for a finished run in a new process; skip without the tracker."""
    if importlib.util.find_spec(tracker) is None:
        pytest.skip(f"pip install {tracker}")
    command = [sys.executable, EXAMPLES / "follow.py", folder, "--to", tracker, "--once"]
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"{folder}: 5 rows sent, to iteration 4" in done.stdout


def pixels(file):
    """The pixels of a picture, a file or a path."""
    return np.asarray(Image.open(file).convert("RGB"))


def test_tensorboard(tmp_path):
    """TensorBoard's own reader finds each number and picture at its iteration, once, however often
    the run was sent."""
    rows = run_until(tmp_path / "run", 4)
    for _ in range(2):
        send("tensorboard", tmp_path / "run")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run/tensorboard"), {"images": 0, "scalars": 0})
    events.Reload()
    found = {i: {"iteration": i} for i in range(5)}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            assert name not in found[event.step]
            found[event.step][name] = pytest.approx(event.value)
    assert list(found.values()) == rows
    assert [event.step for event in events.Images("samples")] == [0, 2, 4]
    for event in events.Images("samples"):
        shown = pixels(io.BytesIO(event.encoded_image_string))
        assert np.array_equal(shown, pixels(tmp_path / f"run/samples/{event.step:06d}.png"))


def wandb_records(file):
    """The records of W&B's offline file, in LevelDB's log format, as protobuf messages."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = file.read_bytes()
    # After W&B's own header.
    at = 7
    whole = b""
    while at + 7 <= len(data):
        # A block of 32 KiB ends where no record's header fits.
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        # 1 is whole, 4 the last of several fragments.
        if kind in (1, 4):
            yield Record.FromString(whole)
            whole = b""


def test_wandb(tmp_path):
    """W&B's offline file has each row with its iteration, each picture and the settings."""
    rows = run_until(tmp_path / "run", 4)
    send("wandb", tmp_path / "run", WANDB_MODE="offline", WANDB_SILENT="true")
    (file,) = (tmp_path / "run/wandb").glob("offline-run-*/*.wandb")
    found = []
    pictures = []
    config = {}
    for record in wandb_records(file):
        if record.HasField("run"):
            config |= {item.key: item.value_json for item in record.run.config.update}
        if record.HasField("history"):
            items = {}
            for item in record.history.item:
                items[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
            found.append({name: x for name, x in items.items() if name in rows[-1]})
            if "samples/path" in items:
                shown = pixels(file.parent / "files" / items["samples/path"])
                name = f"run/samples/{items['iteration']:06d}.png"
                pictures.append(items["iteration"])
                assert np.array_equal(shown, pixels(tmp_path / name))
    assert found == rows
    assert pictures == [0, 2, 4]
    assert json.loads(config["model"]) == "tiny"


def test_trackio(tmp_path, monkeypatch):
    """Trackio's database has each row at its iteration, each picture and the settings."""
    rows = run_until(tmp_path / "run", 4)
    # Not to a place on the net that this machine may be set to.
    for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)
    send("trackio", tmp_path / "run", TRACKIO_DIR=str(tmp_path / "own"))
    database = sqlite3.connect(tmp_path / "own/nft.db")
    found = []
    pictures = []
    for step, text in database.execute("SELECT step, metrics FROM metrics ORDER BY id"):
        items = json.loads(text)
        picture = items.pop("samples", None)
        found.append({"iteration": step} | items)
        if picture:
            pictures.append(step)
            shown = pixels(tmp_path / "own/media" / picture["file_path"])
            assert np.array_equal(shown, pixels(tmp_path / f"run/samples/{step:06d}.png"))
    ((config,),) = database.execute("SELECT config FROM configs")
    database.close()
    assert found == rows
    assert pictures == [0, 2, 4]
    assert json.loads(config)["model"] == "tiny"


# ---- plot_runs.py --------------------------------------------------------------------------------
def figure_of(*groups):
    """The axes of a figure by their titles, and the labels of its legend."""
    pytest.importorskip("matplotlib")
    lines = {}
    for group in groups:
        label, folders = plot_runs.parse(str(group))
        lines[label] = [plot_runs.read(folder) for folder in folders]
    figure = plot_runs.make_figure(lines)
    axes = {axis.get_title(): axis for axis in figure.axes}
    return axes, [text.get_text() for text in figure.legends[0].get_texts()]


def test_plot_without_labels(tmp_path, capsys):
    """A directory is a line of its name, two of one name by their paths, during a run as well."""
    pytest.importorskip("matplotlib")
    run_until(tmp_path / "a/mine", 0)
    run_until(tmp_path / "b/mine", 4)
    run_until(tmp_path / "x=1", 2)
    folders = [str(tmp_path / name) for name in ("a/mine", "b/mine", "x=1")]
    plot_runs.main(tmp_path / "curve.png", *folders)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["mine", folders[1], "x=1"]
    assert (tmp_path / "curve.png").exists()


def test_plot_has_parts_and_watched(tmp_path):
    """The whole reward, its parts, what is only watched and the roughness each have their plot,
    with the rows' own numbers, on an axis that fits them."""
    rows = run_until(tmp_path / "run", 4)
    axes, labels = figure_of(tmp_path / "run")
    (label,) = labels
    assert label.startswith(f"run ({rows[-1]['images']:,} images, ")
    names = {
        "held-out reward": "eval_reward",
        "jpeg": "eval_reward/jpeg",
        "shapes:reward (watched)": "eval_reward/shapes:reward",
        "roughness (base = 1)": "eval_roughness",
    }
    assert list(axes) == list(names)
    for title, field in names.items():
        (line,) = axes[title].lines
        y = [one[field] for one in rows[::2]]
        assert line.get_xdata().tolist() == [0, 2, 4]
        assert line.get_ydata().tolist() == y
        low, high = axes[title].get_ylim()
        assert low <= min(y)
        assert high >= max(y)
        if field != "eval_roughness":
            assert high - low < 1.5 * (max(y) - min(y))


def test_plot_has_no_part_twice(tmp_path):
    """A part that is the whole reward has no plot of its own."""
    rows = [{"iteration": i, "eval_reward": i / 8, "eval_reward/x": i / 8} for i in range(3)]
    write_rows(tmp_path / "run", [one | {"reward/x": 1.0} for one in rows])
    axes, _ = figure_of(tmp_path / "run")
    assert list(axes) == ["held-out reward"]


NOTHING = [("none", "must be a run's directory"), ("both", "in common"), ("early", "wait for it")]


@pytest.mark.parametrize(("group", "says"), NOTHING)
def test_nothing_to_plot(group, says, tmp_path, monkeypatch):
    """What cannot be plotted is said in one line."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "even", [row(2)])
    write_rows(tmp_path / "zero", [row(0)])
    write_rows(tmp_path / "early", [row(1)])
    words = {"both": "both=even,zero"}.get(group, group)
    with pytest.raises(ValueError, match=says) as error:
        plot_runs.main("curve.png", words)
    assert "\n" not in str(error.value)
