"""results.py: results.json, the method's fingerprint, and what the pages show.

    python -m pytest examples/tests/test_results.py

Each test's docstring states a law. The last two speak of the results in this repository.
SPDX-License-Identifier: MIT
"""

import ast
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
    """A study's table goes into tables.json, beside those of others, and onto the page."""
    text = "<!-- results: speed -->old<!-- end -->"
    (tmp_path / "page.md").write_text(text)
    results.record("memory", "| b |\n")
    assert "Not measured" in (tmp_path / "page.md").read_text()
    monkeypatch.setitem(tables.TABLES, "speed", lambda: "| a |\n")
    tables.main(["speed"])
    found = json.loads(results.TABLES.read_text())
    assert [found[name]["table"] for name in ("memory", "speed")] == ["| b |\n", "| a |\n"]
    origin = found["speed"]["origin"]
    assert origin["fingerprint"] == results.TODAY
    told = f"*commit {origin['commit']} on {origin['cpu']}.*"
    shown = text.replace("old", f"\n| a |\n\n{told}\n")
    assert (tmp_path / "page.md").read_text() == shown


def test_unknown_tables_are_refused(capsys):
    """In one line, before anything is run."""
    with pytest.raises(SystemExit):
        tables.main(["speed,sped"])
    assert "sped: must be of blackbox, control, memory, speed" in capsys.readouterr().err


def test_tables_have_means_and_seeds():
    """The mean and each seed of the last values; medians and ranges of ratios; shares; GB."""
    seeds = [({"NFT": [9.0, value]}, 0, 0) for value in (1.0, 2.0, 6000.0)]
    assert "| NFT | 2,001 (1, 2, 6,000) |" in tables.blackbox_table({"ackley": seeds})
    text = tables.control_table([-5.0, -7.0], {"NFT": [[-4.0, -2.0], [-4.0, -1.0]]})
    assert "| cloned from it | -4 (-4, -4) |\n| NFT | -1.5 (-2, -1) |" in text
    shares = dict.fromkeys(tables.PARTS, 0.125)
    text = tables.speed_table({"tiny": ([1, 2, 4], [1, 1, 1], [3, 3, 3], shares)})
    assert "| 2.00 (1.00 to 4.00) |" in text and "| share of the rollout | 12% |" in text
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
    """results.json and tables.json are of today's nft.py and rows; else they must be made anew."""
    named = {row.name: row for wanted in rows.FIGURES.values() for row in wanted}
    for name, run in recorded().items():
        assert run["origin"]["fingerprint"] == results.TODAY, name
        row, _, seed = name.rpartition("-")
        today = results.settings(vars(figures.configure(named[row], "x", int(seed))))
        assert run["settings"].items() <= today.items(), name
    for name, found in results.read_tables().items():
        assert found["origin"]["fingerprint"] == results.TODAY, name


def test_pages_are_of_results_json():
    """What stands between a page's markers is what results.json gives."""
    runs = recorded()
    for page in results.PAGES:
        text = page.read_text("utf-8")
        assert text.count("<!-- results:") == text.count("<!-- end -->")
        assert results.fill(text, runs) == text
