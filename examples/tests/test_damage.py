"""A run that is damaged, foreign or hostile does not go on, and a run keeps its settings.

--resume refuses such a run in one line, with exit status 2. Nothing of it is executed or changed.

    python -m pytest examples/tests/test_damage.py

SPDX-License-Identifier: MIT
"""

import json
import pickle

import common
import faults
import pytest
import torch

import nft


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """Names of files are relative to AREA."""
    with faults.one_thread():
        monkeypatch.chdir(faults.area())
        yield


@pytest.fixture
def run():
    """A copy of a finished run of two iterations."""
    return faults.copy_of_run(faults.AREA / "damaged")


def cannot_go_on(capfd, run, *says):
    """--resume refuses the run."""
    faults.refused(capfd, faults.resume(run, iterations=3), *says)


# ---- The bytes of a checkpoint -----------------------------------------------------------------
def torn(content):
    """The second half is missing."""
    return content[: len(content) // 2]


def without_its_end(content):
    """The last byte is missing."""
    return content[:-1]


def empty(content):
    """Nothing is there."""
    return b""


def text(content):
    """It is no checkpoint."""
    return b"not a checkpoint\n"


def wrong_bit(content):
    """One bit in the middle has flipped."""
    changed = bytearray(content)
    changed[len(changed) // 2] ^= 1
    return bytes(changed)


def hostile_pickle(content):
    """A pickle that runs a command."""
    return pickle.dumps(faults.Hostile())


@pytest.mark.parametrize("damage", [torn, without_its_end, empty, text, wrong_bit, hostile_pickle])
def test_damaged_checkpoints(capfd, run, damage):
    """The message names the run, and says that it must begin anew."""
    file = run / "checkpoint.pt"
    file.write_bytes(damage(file.read_bytes()))
    cannot_go_on(capfd, run, str(run), "checkpoint.pt", "begin anew")


# ---- What a checkpoint holds -------------------------------------------------------------------
def hostile(state):
    """All of it is an object that runs a command."""
    return faults.Hostile()


def hostile_inside(state):
    """A part of it is an object that runs a command."""
    return state | {"scaler": faults.Hostile()}


def in_a_list(state):
    """A list, not a dict."""
    return [state]


def state_dict(state):
    """The weights of some model."""
    return {"unet.conv_in.weight": torch.zeros(3)}


def of_another_program(state):
    """A checkpoint of another trainer."""
    return {"epoch": 3, "model": state["lora"], "optimizer": {}}


def no_adapters(state):
    """The entry for the adapters is missing."""
    del state["lora"]
    return state


def null_adapters(state):
    """No adapters, but an entry for them."""
    return state | {"lora": None}


def adapter_missing(state):
    """Only two of the three adapters."""
    del state["lora"]["old"]
    return state


def adapter_more(state):
    """A fourth adapter."""
    state["lora"]["other"] = state["lora"]["old"]
    return state


def adapters_of_other_names(state):
    """Three adapters of other names."""
    return state | {"lora": dict(zip("abc", state["lora"].values(), strict=True))}


def layer_missing(state):
    """Adapters of one layer fewer."""
    return state | {"lora": {name: adapter[2:] for name, adapter in state["lora"].items()}}


def layer_more(state):
    """Adapters of one layer more."""
    longer = {name: adapter + adapter[:2] for name, adapter in state["lora"].items()}
    return state | {"lora": longer}


def no_optimizer(state):
    """The entry for the optimizer is missing."""
    del state["optimizer"]
    return state


def empty_optimizer(state):
    """No optimizer, but an entry for it."""
    return state | {"optimizer": {}}


def number_for_rows(state):
    """A number for the rows."""
    return state | {"rows": 2}


STATES = [
    hostile,
    hostile_inside,
    in_a_list,
    state_dict,
    of_another_program,
    no_adapters,
    null_adapters,
    adapter_missing,
    adapter_more,
    adapters_of_other_names,
    layer_missing,
    layer_more,
    no_optimizer,
    empty_optimizer,
    number_for_rows,
]


@pytest.mark.parametrize("change", STATES)
def test_foreign_checkpoints(capfd, run, change):
    """A whole checkpoint that holds something else is refused, and none of it is executed."""
    torch.save(change(common.checkpoint(run)), run / "checkpoint.pt")
    cannot_go_on(capfd, run, str(run), "begin anew")


def of_another_rank(x):
    """The adapter of a run with twice the rank."""
    return torch.zeros([8 if size == 4 else size for size in x.shape])


def scalar(x):
    """A number without an axis."""
    return x.sum()


def single_number(x):
    """A number that would broadcast."""
    return x.sum().view(1, 1)


@pytest.mark.parametrize("change", [of_another_rank, scalar, single_number])
def test_adapters_of_another_form(capfd, run, change):
    """Adapters of another size are refused; they do not broadcast."""
    state = common.checkpoint(run)
    state["lora"] = nft.map_tensors(change, state["lora"])
    torch.save(state, run / "checkpoint.pt")
    cannot_go_on(capfd, run, str(run), "begin anew")


# ---- config.json -------------------------------------------------------------------------------
# {what is wrong: what config.json holds}.
CONFIG_FILES = {
    "empty": b"",
    "torn": b'{\n "model": "sd15",\n "rew',
    "binary": b"\x89PNG\xff\0",
    "a list": b"[]",
    "a number": b"3",
    "nested too deep": b"[" * 100_000,
}
# {what is wrong: (entries that change, what the message says)}.
CONFIG_ENTRIES = {
    "an unknown setting": ({"nonsense": 1}, "nonsense"),
    "text for a number": ({"lr": "fast"}, "fast"),
    "a list for a number": ({"save_every": [2]}, "[2]"),
    "a number for a path": ({"prompts": 5}, "--prompts 5"),
    "nan": ({"beta": float("nan")}, "--beta nan"),
    "an unknown choice": ({"precision": "fp8"}, "--precision fp8"),
    "out of range": ({"group_size": -1}, "--group-size -1"),
    "prompts that are gone": ({"prompts": "gone.txt"}, "--prompts gone.txt"),
    "another model": ({"model": str(common.ROOT / "sdxl")}, "begin anew"),
}


@pytest.mark.parametrize("content", CONFIG_FILES.values(), ids=CONFIG_FILES.keys())
def test_damaged_settings(capfd, run, content):
    """A config.json that cannot be read, or holds no settings, is refused."""
    (run / "config.json").write_bytes(content)
    cannot_go_on(capfd, run, f"--out {run}")


@pytest.mark.parametrize("changes, says", CONFIG_ENTRIES.values(), ids=CONFIG_ENTRIES.keys())
def test_foreign_settings(capfd, run, changes, says):
    """A setting in config.json that no command line would give is named."""
    file = run / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    cannot_go_on(capfd, run, says)


@pytest.mark.parametrize("folder", [False, True], ids=["gone", "a folder"])
def test_missing_settings(capfd, run, folder):
    """A directory without config.json holds no run."""
    (run / "config.json").unlink()
    if folder:
        (run / "config.json").mkdir()
    cannot_go_on(capfd, run, f"--out {run}")


# ---- What must stay ----------------------------------------------------------------------------
# (words after --resume, what the message says: the new value and the old one).
CHANGES = [
    ("--lr=0.5", ["--lr 0.5", "0.01"]),
    ("--groups=3", ["--groups 3", "stay 2"]),
    ("--seed=1", ["--seed 1", "stay 0"]),
    ("--model=tiny", ["--model tiny", "sd15"]),
    ("--reward=jpeg", ["--reward jpeg", "red"]),
    ("--updates=1", ["--updates 1", "stay 2"]),
    ("--prompts=p.txt", ["--prompts p.txt", "train.txt"]),
    ("--precision=fp32", ["--precision fp32", "auto"]),
    ("--eta=0.1", ["--eta 0.1", "0.4"]),
    ("--iterations=1", ["--iterations 1", "2"]),
    # What may change must be as good as in a new run.
    ("--iterations=0", ["--iterations 0"]),
    ("--device=tpu", ["--device tpu"]),
    ("--batch-size=0", ["--batch-size 0"]),
    ("--nonsense=1", ["--nonsense"]),
]


@pytest.mark.parametrize("word, says", CHANGES)
def test_settings_that_must_stay(capfd, word, says):
    """A flag that would change the run is refused; so are fewer iterations than are done."""
    faults.refused(capfd, [*faults.resume("run"), word], *says)


@pytest.mark.parametrize("name", ["prompts", "eval_prompts"])
def test_changed_prompts(capfd, name):
    """A prompts file with more or fewer lines than when the run began is named."""
    file = faults.AREA / "own.txt"
    file.write_text("a red circle\na blue square\n")
    out = faults.AREA / f"changed_{name}"
    common.run("sd15", out, iterations=1, **{name: file})
    file.write_text("a red circle\n")
    cannot_go_on(capfd, out, str(file), "bring them back")
