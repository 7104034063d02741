"""Sends a run of nft.py to TensorBoard, Weights & Biases or Trackio, as it goes on or afterwards.

    python examples/follow.py runs/tiny --to tensorboard    # tensorboard --logdir runs shows it
    python examples/follow.py runs/tiny --to wandb          # WANDB_MODE=offline needs no account
    python examples/follow.py runs/tiny --to trackio        # trackio show --project nft shows it

It sends the rows of metrics.jsonl and samples/*.png, with the iteration as step, and config.json.
Start it before, during or after the run, which is sent from its beginning. It ends with the run's
last iteration; of a run that was stopped before, --once sends what is there. Needs the tracker's
package.
SPDX-License-Identifier: MIT
"""

import argparse
import importlib
import json
import time
from pathlib import Path


class TensorBoard:
    """Event files in DIR/tensorboard, which replace those of an earlier start."""

    def __init__(self, folder, config):
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard forgets what earlier files have from step 0 on.
        self.writer = SummaryWriter(folder / "tensorboard", purge_step=0)
        self.writer.add_text("config", f"```\n{json.dumps(config, indent=1)}\n```", 0)

    def send(self, row, picture):
        """A row of metrics.jsonl, and the path of its picture or None."""
        for name, number in row.items():
            self.writer.add_scalar(name, number, row["iteration"])
        if picture:
            import numpy as np
            from PIL import Image

            pixels = np.asarray(Image.open(picture))
            self.writer.add_image("samples", pixels, row["iteration"], dataformats="HWC")
        self.writer.flush()

    def close(self):
        """Write what is left."""
        self.writer.close()


class Online:
    """A new run of wandb, or of trackio, whose functions are the same."""

    def __init__(self, package, folder, config):
        self.package = importlib.import_module(package)
        self.package.init(project="nft", name=folder.resolve().name, config=config)

    def send(self, row, picture):
        """As TensorBoard.send. The package's own steps count rows: they are iterations, too."""
        if picture:
            row = row | {"samples": self.package.Image(str(picture))}
        self.package.log(row)

    def close(self):
        """Upload what is left."""
        self.package.finish()


def whole_rows(file):
    """The rows of metrics.jsonl, without one that is being written."""
    lines = file.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]


def follow(folder, to, every=10.0, once=False):
    """Send the rows of a run as they come, to its last one; look every so many seconds, or once."""
    file = folder / "metrics.jsonl"
    while not (file.exists() or once):
        time.sleep(every)
    config = json.loads((folder / "config.json").read_text())
    tracker = TensorBoard(folder, config) if to == "tensorboard" else Online(to, folder, config)
    sent = 0
    try:
        while True:
            for row in whole_rows(file)[sent:]:
                picture = folder / f"samples/{row['iteration']:06d}.png"
                tracker.send(row, picture if picture.exists() else None)
                sent += 1
            if once or sent > config["iterations"]:
                break
            time.sleep(every)
    finally:
        tracker.close()
    print(f"follow.py: {folder}: {sent} rows sent")


if __name__ == "__main__":
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("folder", metavar="DIR", type=Path, help="the run's directory")
    parser.add_argument("--to", required=True, choices=("tensorboard", "wandb", "trackio"))
    parser.add_argument("--every", type=float, default=10, help="seconds between looks (10)")
    parser.add_argument("--once", action="store_true", help="send what is there now, and end")
    args = parser.parse_args()
    follow(args.folder, args.to, args.every, args.once)
