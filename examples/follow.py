"""Sends a run of nft.py to TensorBoard, Weights & Biases or Trackio, as it goes on or afterwards.

    python examples/follow.py runs/tiny --to tensorboard    # tensorboard --logdir runs shows it
    python examples/follow.py runs/tiny --to wandb          # WANDB_MODE=offline needs no account
    python examples/follow.py runs/tiny --to trackio        # trackio show --project nft shows it
    python examples/follow.py runs/tiny --to wandb --once   # what is there now, and no more

nft.py writes files and knows of no tracker. This program reads them and changes none: the numbers
of metrics.jsonl go to their iteration as step, samples/*.png likewise, and config.json goes along.
Start it in a terminal of its own, before, during or after the run. It looks every --every seconds
and ends when the run is finished. A run that fails does not tell: end it with Ctrl-C.

Each start sends the run from its beginning. TensorBoard's files lie in DIR/tensorboard and replace
what an earlier start sent; in W&B, whose files lie in DIR/wandb, and in Trackio it is a new run.
Needs the tracker: pip install tensorboard, wandb or trackio.
SPDX-License-Identifier: MIT
"""

import argparse
import json
import sys
import time
from pathlib import Path

# The name under which W&B and Trackio gather runs.
PROJECT = "nft"


# ---- The trackers --------------------------------------------------------------------------------
class TensorBoard:
    """Event files in DIR/tensorboard."""

    def __init__(self, folder, config):
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard forgets what earlier files have from step 0 on.
        self.writer = SummaryWriter(folder / "tensorboard", purge_step=0)
        lines = [f"    {name}: {value}" for name, value in config.items()]
        self.writer.add_text("config", "\n".join(lines), 0)

    def send(self, step, numbers, picture):
        """A row's numbers, {name: number}, and the path of its picture or None."""
        for name, number in numbers.items():
            self.writer.add_scalar(name, number, step)
        if picture:
            import numpy as np
            from PIL import Image

            pixels = np.asarray(Image.open(picture).convert("RGB"))
            self.writer.add_image("samples", pixels, step, dataformats="HWC")
        self.writer.flush()

    def close(self):
        """Write what is left."""
        self.writer.close()


class Wandb:
    """A run of Weights & Biases."""

    def __init__(self, folder, config):
        import wandb

        self.image = wandb.Image
        name = folder.resolve().name
        self.run = wandb.init(project=PROJECT, name=name, config=config, dir=folder)
        # W&B's own steps may not go back, and hold a row until the next one comes.
        self.run.define_metric("iteration")
        self.run.define_metric("*", step_metric="iteration")

    def send(self, step, numbers, picture):
        """As TensorBoard.send."""
        row = {"iteration": step} | numbers
        if picture:
            row["samples"] = self.image(str(picture))
        self.run.log(row)

    def close(self):
        """Upload what is left."""
        self.run.finish()


class Trackio:
    """A run of Trackio, by default on this machine."""

    def __init__(self, folder, config):
        import trackio

        self.image = trackio.Image
        # The load of this program's machine need not be the run's.
        quiet = {"auto_log_cpu": False, "auto_log_gpu": False}
        name = folder.resolve().name
        self.run = trackio.init(project=PROJECT, name=name, config=config, **quiet)
        self.finish = trackio.finish

    def send(self, step, numbers, picture):
        """As TensorBoard.send."""
        row = dict(numbers)
        if picture:
            row["samples"] = self.image(str(picture))
        self.run.log(row, step=step)

    def close(self):
        """Write what is left."""
        self.finish()


TRACKERS = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}


# ---- The run -------------------------------------------------------------------------------------
def read(folder):
    """The settings and the rows of a run; nft.py replaces both files whole, so none is half."""
    config = json.loads((folder / "config.json").read_text())
    text = (folder / "metrics.jsonl").read_text()
    return config, [json.loads(line) for line in text.splitlines()]


def news(folder, rows, sent):
    """(iteration, {name: number}, path of its picture or None) of each row with something new.

    sent: {iteration: names that were sent}, which this fills. The last row of a run may grow: it is
    evaluated later where the run is resumed to end there.
    """
    for row in rows:
        step = row["iteration"]
        names = sent.setdefault(step, {"iteration"})
        numbers = {name: x for name, x in row.items() if name not in names}
        names.update(numbers)
        picture = folder / f"samples/{step:06d}.png"
        if "eval_reward" not in numbers or not picture.exists():
            picture = None
        if numbers:
            yield step, numbers, picture


def is_finished(config, rows):
    """Whether the run has made and evaluated its last iteration."""
    return rows[-1]["iteration"] >= config["iterations"] and "eval_reward" in rows[-1]


def follow(folder, open_tracker, every, once):
    """Send all rows until the run is finished, or once; look every so many seconds.

    Raises ValueError where another run has begun in the folder.
    """
    config, rows = read(folder)
    first = rows[0]
    sent = {}
    tracker = open_tracker(folder, config)
    try:
        while True:
            if rows[0] != first:
                raise ValueError(f"{folder}: another run has begun here; start follow.py again")
            for step, numbers, picture in news(folder, rows, sent):
                tracker.send(step, numbers, picture)
            if once or is_finished(config, rows):
                break
            time.sleep(every)
            config, rows = read(folder)
    finally:
        tracker.close()
    print(f"follow.py: {folder}: {len(rows)} rows sent, to iteration {rows[-1]['iteration']}")


# ---- Command line --------------------------------------------------------------------------------
def parse(argv):
    """The command line's arguments."""
    about, _, more = __doc__.partition("\n")
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=about, epilog=more, formatter_class=plain)
    parser.add_argument("folder", metavar="DIR", type=Path, help="the run's directory")
    parser.add_argument("--to", required=True, choices=TRACKERS, help="where it is sent")
    parser.add_argument("--every", type=float, default=10, help="seconds between looks (10)")
    parser.add_argument("--once", action="store_true", help="send what is there now, and end")
    args = parser.parse_args(argv)
    if not args.every > 0:
        parser.error(f"--every {args.every}: must be above 0; give seconds")
    return args


def wait(folder, every, once):
    """Wait until a run has begun in a folder. Raises ValueError where only one look is wanted."""
    file = folder / "metrics.jsonl"
    if not file.exists() and once:
        raise ValueError(f"{folder}: must be a run's directory, with {file.name}; correct it")
    if not file.exists():
        print(f"follow.py: waiting for {file}", file=sys.stderr)
    while not file.exists():
        time.sleep(every)


def main(argv=None):
    """Follow a run; returns the exit status: 0, 2 for what cannot be done, 130 interrupted."""
    args = parse(argv)
    try:
        wait(args.folder, args.every, args.once)
        follow(args.folder, TRACKERS[args.to], args.every, args.once)
        return 0
    except KeyboardInterrupt:
        return 130
    except ImportError as error:
        said = f"--to {args.to}: must be installed ({error}); run: pip install {args.to}"
    except ValueError as error:
        said = str(error)
    # Trackers have errors of their own: no account, no network.
    except Exception as error:
        said = f"--to {args.to}: must take the run ({type(error).__name__}: {error}); start again"
    print("follow.py: " + " ".join(said.split()), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
