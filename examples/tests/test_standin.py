"""nft.py on standin.py's tensors, which refuse what CUDA refuses: no GPU is needed, or replaced.

Each test's docstring states a promise. Not run here is code that asks for the type "cuda".
SPDX-License-Identifier: MIT
"""

import json
import subprocess
import sys

import common
import pytest
import standin
import torch

RUN = """
import json, sys
sys.path[:0] = json.loads(sys.argv[1])
import nft, standin

optimize = nft.optimize


def checked(run, D, *args):
    # An iteration's images may be more than a device holds.
    assert D["x_0"].device.type == "cpu"
    return optimize(run, D, *args)


nft.optimize = checked
for words in json.loads(sys.argv[2]):
    assert standin.main(words) == 0, words
"""


def on_device(*runs, nft=common.REPOSITORY):
    """Run command lines in one process, on nft.py of a directory; how it ended."""
    paths = [str(nft), str(common.EXAMPLES / "tests")]
    call = [sys.executable, "-W", "ignore", "-c", RUN, json.dumps(paths), json.dumps(runs)]
    return subprocess.run(call, capture_output=True, text=True, check=False)


def words(pipeline, out, **changes):
    """A rollout, two optimizer steps, and a save."""
    small = {"iterations": 1, "groups": 1, "group_size": 2, "steps": 2, "train_times": 1}
    small |= {"checkpointing": True, "eval_prompts": common.root() / "one.txt"}
    (common.root() / "one.txt").write_text("a red circle")
    return common.command_line(pipeline, out=out, **small | changes)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_four_kinds_of_pipelines(tmp_path, precision):
    """Collect, optimize and save, in both half precisions, mix no devices."""
    kinds = ("sd15", "sdxl", "sd3", "flux")
    runs = [words(kind, tmp_path / kind, precision=precision) for kind in kinds]
    done = on_device(*runs)
    assert done.returncode == 0, done.stderr
    assert [len(common.metrics(tmp_path / kind)) for kind in kinds] == [2] * 4
    # What was learned is read on the CPU.
    after = common.checkpoint(tmp_path / "sd3")["lora"]["theta"]
    assert all(x.isfinite().all() for x in after)
    assert any(x.abs().max() > 0 for x in after[1::2])


def test_other_methods(tmp_path):
    """Rejection fine-tuning, DDPO and FlowGRPO take a step without mixing devices."""
    given = {"kl": None, "beta": None, "z": None, "eta": None, "precision": "bf16"}
    runs = []
    for method, pipeline in (("rft", "sd15"), ("ddpo", "sd15"), ("flowgrpo", "sd3")):
        runs.append([method, *words(pipeline, tmp_path / method, **given)])
    done = on_device(*runs)
    assert done.returncode == 0, done.stderr


def test_a_cpu_tensor_in_training_is_caught(tmp_path):
    """The stand-in sees what it is for: noise that was left on the CPU."""
    source = (common.REPOSITORY / "nft.py").read_text("utf-8")
    assert source.count("eps.to(device)") == 1
    (tmp_path / "nft.py").write_text(source.replace("eps.to(device)", "eps"))
    done = on_device(words("sd15", tmp_path / "run"), nft=tmp_path)
    assert done.returncode == 1
    assert "must be on the same device" in done.stderr


def test_what_is_refused():
    """Two devices, an index on the device, NumPy and a CPU generator; a plain number is none."""
    near = torch.ones(3)
    with standin.Mode():
        far = near.to("meta")
        assert (far * 2 + torch.tensor(1.0)).sum().item() == 9
        assert far[torch.tensor([0, 2])].tolist() == [1, 1]
        for mixed in (lambda: far + near, lambda: near[far.long()], lambda: torch.cat([far, near])):
            with pytest.raises(RuntimeError, match="device"):
                mixed()
        with pytest.raises(RuntimeError, match="generator"):
            torch.randn(3, generator=torch.Generator(), device="meta")
        with pytest.raises(TypeError, match="numpy"):
            far.numpy()
