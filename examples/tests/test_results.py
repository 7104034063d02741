"""results.py and tables.py: what was measured, the method's fingerprint, and what pages show.

    python -m pytest examples/tests/test_results.py

Each test's docstring states a law. The last three speak of the results in this repository.
SPDX-License-Identifier: MIT
"""

import ast
import importlib.util
import json
from pathlib import Path

import common
import figures
import pytest
import results
import rows
import tables
import torch

import nft

SOURCE = '''
SCALE = 2
WORDS = "not of the method"


def nft_loss(x, r):
    """The loss."""
    # Of the first.
    if not r.isfinite().all():
        raise ValueError("r is not finite")
    return r * x[:1]


def train(config):
    with blame("a rule", "a mend"):
        x = torch.randn(3, generator=generator("eps", 0))
    try:
        loss = nft_loss(x, 1)
    except Exception as error:
        mend = f"{error}: go on"
        raise UserError(mend) from error
    ending = f"{loss:.3f} at the end"
    say(ending)
    return loss
'''


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """`figures.run` sets the process to one thread: others' tests get back what they had."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("The loss.", "Eq. (5)."),
        ("# Of the first.", "# Not of the others."),
        ("r * x[:1]", "(r  *  x[ :1])"),
        ("r is not finite", "must be finite"),
        ('"a rule", "a mend"', '"another rule"'),
        ("{error}: go on", "begin anew: {error}"),
        ("{loss:.3f} at the end", "{loss} it is"),
        ("say(ending)", "say(ending, 2)"),
        ("not of the method", "of no method"),
    ],
)
def test_words_do_not_count(old, new):
    """Comments, docstrings, form, messages and what METHOD leaves out have no part in it."""
    assert SOURCE.count(old) == 1
    assert results.fingerprint(SOURCE.replace(old, new)) == results.fingerprint(SOURCE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("SCALE = 2", "SCALE = 1"),
        ("x[:1]", "x[1:]"),
        ("r * x", "x * r"),
        ("not r", "r"),
        ('"eps", 0', '"noise", 0'),
        ("nft_loss(x, 1)", "nft_loss(x, 1.0)"),
        ("def nft_loss", "@torch.no_grad()\ndef nft_loss"),
    ],
)
def test_the_method_counts(old, new):
    """Whatever is calculated, down to a key of the noise, changes the fingerprint."""
    assert SOURCE.count(old) == 1
    assert results.fingerprint(SOURCE.replace(old, new)) != results.fingerprint(SOURCE)


def test_all_of_the_method_is_there():
    """nft.py has every name of METHOD: one that was renamed would go unseen."""
    found = results.definitions(ast.parse(Path(nft.__file__).read_text("utf-8")))
    assert set(results.METHOD.split()) <= found.keys()


def small_preset(monkeypatch, **changes):
    """Make `tiny` a preset of a second or two; returns its row."""
    preset = common.settings("sd15", **changes)
    preset = {k: str(value) if isinstance(value, Path) else value for k, value in preset.items()}
    monkeypatch.setitem(nft.MODELS, "tiny", preset.pop("model"))
    monkeypatch.setitem(nft.PRESETS, "tiny", preset)
    return rows.preset("tiny")


def test_a_preset_row_is_nft_itself(tmp_path, monkeypatch):
    """Its run is `python nft.py --model NAME`, number for number."""
    for row in rows.FIGURES["default"]:
        config = figures.configure(row, tmp_path, 0)
        assert config == nft.configure(model=row.model, out=tmp_path)
        assert config.solver == figures.EVALUATION_SOLVER
    row = small_preset(monkeypatch, solver=figures.EVALUATION_SOLVER)
    figures.run(row, tmp_path / "row", 0)
    assert nft.main(["--out", str(tmp_path / "plain")]) == 0
    without = ("seconds", "cpu", "evaluations")
    plain = common.metrics(tmp_path / "plain", *without)
    assert common.metrics(tmp_path / "row", *without) == plain


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A page in place of the repository's, beside a results.json of its own; its text has a %s."""
    monkeypatch.setattr(results, "FILE", tmp_path / "results.json")
    monkeypatch.setattr(results, "TABLES", tmp_path / "tables.json")
    monkeypatch.setattr(results, "PAGES", [tmp_path / "page.md"])
    text = "From <!-- results: preset-tiny accuracy -->%s<!-- end -->.\n"
    (tmp_path / "page.md").write_text(text % "nothing yet")
    return text


def test_results_are_written(page, tmp_path, monkeypatch):
    """A run's figures go into results.json and onto the page; runs of another method go."""
    row = small_preset(monkeypatch, lr=0.02)
    monkeypatch.setitem(rows.FIGURES, "default", [row])
    kept = {"origin": {"fingerprint": results.TODAY}, "settings": {}, "points": []}
    left = kept | {"origin": {"fingerprint": "another"}}
    results.FILE.write_text(json.dumps({"kept-0": kept, "left-0": left}))
    words = ["--figures", "default", "--seeds", "4", "--out", str(tmp_path / "runs"), "--plot"]
    figures.run(row, tmp_path / "runs/preset-tiny-4", 4)
    assert figures.main(words) == 0
    found = json.loads(results.FILE.read_text())
    assert found.keys() == {"kept-0", "preset-tiny-4"}
    run = found["preset-tiny-4"]
    assert run["origin"].items() >= {"fingerprint": results.TODAY, "threads": 1}.items()
    assert (run["settings"]["seed"], run["settings"]["lr"]) == (4, 0.02)
    logged = common.metrics(tmp_path / "runs/preset-tiny-4")
    assert run["points"][-1]["evaluations"] == logged[-1]["evaluations"]
    first, last = (f"{logged[i]['eval_reward']:.3f}" for i in (0, -1))
    assert (tmp_path / "page.md").read_text() == page % f"{first} → {last}"
    results.FILE.unlink()
    (tmp_path / "runs/preset-tiny-4/origin.json").write_text('{"fingerprint": "another"}')
    assert figures.main(words) == 0
    assert not results.FILE.exists()


def test_tables_are_written(page, tmp_path, monkeypatch):
    """A study's table goes into tables.json and onto the page; those of other code go."""
    text = "<!-- results: speed -->old<!-- end --><!-- results: memory -->old<!-- end -->"
    (tmp_path / "page.md").write_text(text)
    made = {"commit": "abc", "cpu": "X"}
    results.record("memory", "| b |\n", made, results.study_fingerprint("memory"))
    left = {"origin": made, "study": "another", "table": "| c |\n"}
    kept = json.loads(results.TABLES.read_text())
    results.TABLES.write_text(json.dumps(kept | {"control": left}))
    monkeypatch.setattr(results, "origin", lambda: made)
    monkeypatch.setitem(tables.TABLES, "speed", lambda: "| a |\n")
    monkeypatch.chdir(tmp_path)
    assert tables.main(["speed"]) == 0
    found = json.loads(results.TABLES.read_text())
    assert {name: study["table"] for name, study in found.items()} == {
        "memory": "| b |\n",
        "speed": "| a |\n",
    }
    shown = (tmp_path / "page.md").read_text()
    for line in ("| a |", "| b |"):
        assert f"-->\n{line}\n\n*commit abc on X.*\n<!--" in shown


@pytest.mark.parametrize("changed", ["method", "preset", "study"])
def test_tables_of_other_code_are_not_shown(page, monkeypatch, changed):
    """Neither of another method, nor of other presets, nor of another study."""
    monkeypatch.setattr(results, "PAGES", [])
    made = {"commit": "abc", "cpu": "X"}
    results.record("blackbox", "| a |\n", made, results.study_fingerprint("blackbox"))
    assert "| a |" in results.show("blackbox", {})
    if changed == "method":
        monkeypatch.setattr(results, "TODAY", "another")
    elif changed == "preset":
        monkeypatch.setitem(nft.PRESETS, "tiny", nft.PRESETS["tiny"] | {"steps": 4})
    else:
        monkeypatch.setitem(results.STUDIES, "blackbox", ["control.py"])
    assert results.show("blackbox", {}) == results.NOT_MEASURED


def test_a_study_that_is_edited_while_it_runs_is_not_shown(page, tmp_path, monkeypatch):
    """What counts is the code that ran, not the file as it is when the study ends."""
    (tmp_path / "page.md").write_text("<!-- results: blackbox -->old<!-- end -->")

    def edited():
        monkeypatch.setitem(results.STUDIES, "blackbox", ["control.py"])
        return "| a |\n"

    monkeypatch.setitem(tables.TABLES, "blackbox", edited)
    monkeypatch.chdir(tmp_path)
    assert tables.main(["blackbox"]) == 0
    assert results.NOT_MEASURED in (tmp_path / "page.md").read_text()


def test_studies_have_tables():
    """tables.py makes what results.py names."""
    assert tables.TABLES.keys() == results.STUDIES.keys()


@pytest.mark.parametrize(
    ("words", "missing", "told"),
    [
        ("speed,sped", None, "sped: must be of blackbox, control, memory, speed"),
        ("speed,blackbox", "cma", "blackbox needs cma: pip install cma"),
        ("speed,control", "gymnasium", "control needs gymnasium: pip install gymnasium"),
        ("speed,control", "matplotlib", "control needs matplotlib: pip install matplotlib"),
    ],
)
def test_tables_that_cannot_be_made_are_refused(monkeypatch, capsys, words, missing, told):
    """Before any is made."""
    made = []
    for name in tables.TABLES:
        monkeypatch.setitem(tables.TABLES, name, lambda: made.append(1))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name != missing or None)
    with pytest.raises(SystemExit):
        tables.main([words])
    assert capsys.readouterr().err.endswith(f"error: {told}\n")
    assert not made


def test_tables_have_means_and_seeds():
    """The mean and each seed of the last values, a line a method, a column a function."""

    def seeds(*values):
        return [({"NFT": [9.0, value], "RWR": [9.0, 2 * value]}, 0, 0) for value in values]

    text = tables.blackbox_table({"ackley": seeds(1.0, 2.0, 6000.0), "other": seeds(0.5, 1.5)})
    assert "| method | Ackley | Other |" in text
    assert "| NFT | 2,001 (1, 2, 6,000) | 1 (0.5, 1.5) |\n" in text
    assert "| RWR | 4,002 (2, 4, 12,000) | 2 (1, 3) |\n" in text
    text = tables.control_table([-5.0, -7.0], {"NFT": [[-4.0, -2.0], [-4.0, -1.0]]})
    lines = text.splitlines()
    assert lines[2].endswith("| -6 (-5, -7) |")
    assert lines[3:] == ["| cloned from it | -4 (-4, -4) |", "| NFT | -1.5 (-2, -1) |"]


def test_tables_of_bytes_and_seconds(monkeypatch):
    """Medians and ranges of ratios, shares of an iteration; peaks in GB."""
    shares = {part: (i + 1) / 100 for i, part in enumerate(tables.PARTS)}
    measured = ([1, 2, 4], [5, 5, 6], [7, 8, 9], shares)
    lines = tables.speed_table({"tiny": measured, "other": measured}).splitlines()
    cells = [line.split(" | ", 1)[1] for line in lines[2:]]
    ratios = ["2.00 (1.00 to 4.00)", "5.00 (5.00 to 6.00)", "8.00 (7.00 to 9.00)"]
    told = [*ratios, "1%", "2%", "3%", "4%", "5%", "6%"]
    assert cells == [f"{cell} | {cell} |" for cell in told]
    peaks = {"rollout": 1e9, "training": 25e8, "checkpointing": 2e9}
    assert "| x 32 | 4 | 1.00 | 2.50 | 2.00 |" in tables.memory_table([("x 32", 4, peaks)])


@pytest.mark.parametrize("name", [*rows.FIGURES, "preset-tiny minutes"])
def test_what_was_not_measured_says_so(name):
    """A page has no figures where results.json has none, and a table of those that it has."""
    assert "ot measured" in results.show(name, {})
    row = name.split()[0]
    if name in rows.FIGURES:
        row = rows.FIGURES[name][0].name
    point = {"accuracy": 0.5, "roughness": 1, "images": 8, "evaluations": 1000, "seconds": 66}
    run = {"origin": {"commit": "abc", "cpu": "X"}, "points": [point | {"accuracy": 0.25}, point]}
    text = results.show(name, {f"{row}-0": run})
    assert ("0.500" in text and "*commit abc on X.*" in text) or text == "1.1"


# ---- This repository's ---------------------------------------------------------------------------
def recorded():
    """The runs of results.json, of whatever method."""
    if not results.FILE.exists():
        pytest.skip("there is no results.json yet")
    return json.loads(results.FILE.read_text("utf-8"))


def test_results_are_of_this_code():
    """results.json is of today's nft.py and rows; else figures.py must be run once more."""
    named = {row.name: row for wanted in rows.FIGURES.values() for row in wanted}
    for name, run in recorded().items():
        assert run["origin"]["fingerprint"] == results.TODAY, name
        row, _, seed = name.rpartition("-")
        today = results.settings(vars(figures.configure(named[row], "x", int(seed))))
        assert run["settings"].items() <= today.items(), name


def test_tables_are_of_this_code():
    """tables.json is of today's nft.py, presets and studies; else tables.py must be run anew."""
    found = json.loads(results.TABLES.read_text("utf-8"))
    assert results.read_tables() == found
    assert found.keys() == results.STUDIES.keys()


def test_pages_are_of_results_json():
    """What stands between a page's markers is what results.json and tables.json give."""
    runs = recorded()
    for page in results.PAGES:
        text = page.read_text("utf-8")
        assert text.count("<!-- results:") == text.count("<!-- end -->")
        assert results.fill(text, runs) == text
