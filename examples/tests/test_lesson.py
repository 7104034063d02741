"""The lesson: minimal.py, the solutions of the exercises, and the notebook from first to last cell.

Each test's docstring states a promise.
SPDX-License-Identifier: MIT
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap

import common
import pytest
import torch

LESSON = common.EXAMPLES / "lesson"
NOTEBOOK = LESSON / "lesson.ipynb"
for room in (LESSON, common.EXAMPLES / "studies"):
    sys.path.insert(0, str(room))
import minimal
import pictures
import solutions

import nft


@pytest.fixture(autouse=True)
def one_thread():
    """At layers as small as these, two threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---- minimal.py ----------------------------------------------------------------------------------
def test_two_files_alone_suffice(tmp_path):
    """minimal.py and nft.py, copied alone, print a mean reward that rises from 0 to nearly 1."""
    shutil.copy(LESSON / "minimal.py", tmp_path)
    shutil.copy(common.REPOSITORY / "nft.py", tmp_path)
    quiet = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    quiet["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "minimal.py"]
    done = subprocess.run(command, cwd=tmp_path, env=quiet, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rewards = [float(number) for number in re.findall(r"mean reward (\S+)", done.stdout)]
    assert len(rewards) == 4
    assert rewards[0] < 0.6
    assert rewards[-1] > 0.95


def test_readme_shows_the_loop():
    """The loop that README.md shows is minimal.py's."""
    readme = (common.REPOSITORY / "README.md").read_text("utf-8")
    (shown,) = re.findall(r"```python\n(for i in range.*?)```", readme, re.DOTALL)
    source = (LESSON / "minimal.py").read_text("utf-8")
    assert textwrap.indent(shown, "    ") in source


def test_minimal_learns_from_its_reward_alone():
    """Where rewards are shuffled among the images, nothing is learned."""

    def shuffled(x_0, c):
        raw = minimal.reward(x_0, c)
        return raw[torch.randperm(len(raw))]

    net = solutions.ring(0)
    found = {}
    for name, reward in (("true", minimal.reward), ("shuffled", shuffled)):
        torch.manual_seed(0)
        theta, _ = minimal.train(net, 15, reward=reward)
        c = minimal.prompts(2000)
        found[name] = minimal.reward(minimal.sample(theta, c), c).mean().item()
    assert found["true"] > 0.6
    assert abs(found["shuffled"]) < 0.2


# ---- The exercises: what the lesson tells readers to expect --------------------------------------
def test_without_the_negative_branch_the_reward_falls():
    """Exercise 1: both branches raise it far above the base's 0.22; the positive one loses it."""
    found = solutions.drop_the_negative_branch()
    assert found["both branches"][0] > 0.75
    assert found["positive only"][0] < 0.15
    assert found["positive only"][1] > 3


def test_smaller_beta_goes_farther():
    """Exercise 2: the smaller beta, the higher the reward at the optimum, and its spread falls."""
    found = solutions.change_beta()
    optima = [found[beta][0] for beta in (0.05, 0.3, 1.0, 3.0)]
    assert optima == sorted(optima, reverse=True)
    assert found[0.05][1] < 0.1 < found[1.0][1]
    assert found[0.05][2] > found[3.0][2] + 0.2


def test_eta_slows_the_old_policy():
    """Exercise 3: eta 0.9 is behind; 0 and the default, nearly 0 in 40 rounds, are alike."""
    found = solutions.change_eta()
    assert found["0"] == pytest.approx(found["0,0.001,0.5"], abs=0.05)
    assert found["0.9"] < found["0"] - 0.15


def test_one_z_drowns_quiet_prompts():
    """Exercise 4: with a Z_c of their own the quiet prompts learn as much as the loud ones."""
    found = solutions.change_z()
    loud, quiet = found["Z_c of the iteration"]
    assert quiet < loud - 0.2
    loud, quiet = found["Z_c of each prompt"]
    assert quiet == pytest.approx(loud, abs=0.1)


def test_a_reward_without_a_top_is_hacked():
    """Exercise 5: the projection rises beyond the ring's 2, and the points leave the ring."""
    found = solutions.hack_a_reward()
    assert found["projection"][0] > 2.5
    assert found["projection"][2] > 2 * found["cosine"][2]


def test_predictions_have_one_loss():
    """Exercise 6: mixing outputs of any kind is mixing clean samples."""
    for direct, mixed in solutions.compare_predictions().values():
        assert direct == pytest.approx(mixed, rel=1e-9)


def test_eq_6_on_a_table():
    """Exercise 7: gradient descent on Eq. (5) finds Eq. (6)."""
    predicted, found = solutions.check_eq_6()
    assert found == pytest.approx(predicted, rel=1e-9)


def test_rough_samples_teach_as_well():
    """Exercise 8: rollouts of 3 steps lead to nearly the reward of 20."""
    found = solutions.use_rough_samples()
    assert found[3] == pytest.approx(found[20], abs=0.1)


def test_solutions_by_number(monkeypatch, capsys):
    """The command line solves those that are asked for, and refuses others in one line."""
    solutions.main(["7"])
    assert "gradient descent" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        solutions.main(["9"])
    assert "must be from 1 to 8" in capsys.readouterr().err


# ---- The notebook --------------------------------------------------------------------------------
def code_cells():
    return [c for c in json.loads(NOTEBOOK.read_text("utf-8"))["cells"] if c["cell_type"] == "code"]


def test_notebook_is_committed_with_outputs():
    """Run in order from first to last cell, no error, at most 2 MB, no path of a machine."""
    assert NOTEBOOK.stat().st_size < 2e6
    cells = code_cells()
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    texts = NOTEBOOK.read_text("utf-8")
    assert '"output_type": "error"' not in texts
    assert '"name": "stderr"' not in texts
    assert not re.search(r"/(home|work|tmp|Users)/", texts)


def test_notebook_has_each_exercise():
    """Each solution has its exercise, with a folded answer."""
    text = NOTEBOOK.read_text("utf-8")
    for number in range(1, len(solutions.EXERCISES) + 1):
        assert f"### Exercise {number}" in text
    assert text.count("<details>") == len(solutions.EXERCISES)


def test_notebook_shows_the_lines_of_today(capsys):
    """The lines of nft.py beside the symbols are where the notebook says; else run it anew."""
    (cell,) = (c for c in code_cells() if "".join(c["source"]).startswith("pictures.lines("))
    exec("".join(cell["source"]), {"nft": nft, "pictures": pictures})
    assert capsys.readouterr().out == "".join(cell["outputs"][0]["text"])


# What the text between the cells says of the outputs: of the plane, and of the runs on tiny.
CLAIMS = """
assert abs(correlation) < 0.3
assert toy.reward(toy.sample(theta, 4000)).mean() > 2 * toy.reward(toy.sample(base, 4000)).mean()
"""
CLAIMS_OF_RUNS = """
accuracy = {name: [row["eval_reward"] for row in rows if "eval_reward" in row]
            for name, rows in (("exact", exact), ("rough", rough))}
assert accuracy["exact"][-1] > accuracy["exact"][0] + 0.15
assert accuracy["rough"][-1] > accuracy["rough"][0] + 0.1
assert rough[1]["reward"] < accuracy["rough"][-1]
proxy = [row["eval_reward/named_colours"] for row in hacked if "eval_reward" in row]
watched = [row["eval_reward/exact"] for row in hacked if "eval_reward" in row]
assert proxy[-1] > 1.5 * proxy[0]
assert max(watched) > watched[0] + 0.05
assert watched[-1] < max(watched) - 0.2
assert share_right() > before + 0.1
"""
SHORTER = {"toy.flow_matching)": "toy.flow_matching, steps=800)", "eq_5)": "eq_5, steps=500)"}
SHORTER |= {'"iterations": 8': '"iterations": 1', "iterations=14": "iterations=2", "128": "16"}


@pytest.mark.skipif(importlib.util.find_spec("nbclient") is None, reason="needs nbclient")
@pytest.mark.skipif(importlib.util.find_spec("ipykernel") is None, reason="needs ipykernel")
@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
def test_notebook_runs(tmp_path):
    """From first to last cell, and then what its text says holds.

    Its runs on tiny are shorter here than a reader's, unless WHOLE_NOTEBOOK is set.
    """
    import nbclient
    import nbformat

    whole = "WHOLE_NOTEBOOK" in os.environ
    changes = {"runs/lesson": str(tmp_path / "lesson")} | ({} if whole else SHORTER)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        for old, new in changes.items():
            cell.source = cell.source.replace(old, new)
    claims = CLAIMS + CLAIMS_OF_RUNS if whole else CLAIMS
    notebook.cells.append(nbformat.v4.new_code_cell(claims))
    where = {"metadata": {"path": str(LESSON)}}
    # Seconds a cell: the longest takes one or two minutes where nothing else runs.
    client = nbclient.NotebookClient(notebook, timeout=1800, kernel_name="python3", resources=where)
    client.execute()
