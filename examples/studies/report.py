"""results.json: what was measured; and the tables, pages and plots that are made of it.

A page shows, between the markers `<!-- results: NAME -->` and `<!-- end -->`, a table of
rows.TABLES, what a row prints, or for NAME = "ROW COLUMN" one cell. results.json has a line a run:

    "ROW/SEED": {"nft": the first digits of nft.py's sha256, "commit", "cpu", "row": its digest,
                 "curve": [[evaluations, seconds, accuracy], ...], "images", "watched": {...}}

Runs of an earlier nft.py are shown where there is none of today's, and it is said. An evaluation is
a sample through the denoiser, a second one of a core; both leave out what evaluating a run takes.
SPDX-License-Identifier: MIT
"""

import hashlib
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
from pathlib import Path

import rows

FILE = rows.REPOSITORY / "examples/studies/results.json"
PAGES = (rows.REPOSITORY / "README.md", rows.REPOSITORY / "examples/studies/STUDIES.md")
MARKED = re.compile(r"(<!-- results: (.+?) -->)(.*?)(<!-- end -->)", re.DOTALL)
# What a run is made of, beside its row: the commit of a result is the last one that changed these.
CODE = ("nft.py", "examples/tiny", "examples/rewards", "examples/studies/baselines.py")
# Settings that change no number of a run; and the model, which a row's name tells.
UNTOLD = ("reward", "eval_every", "batch_size", "model")


# ---- Code, machine, file -------------------------------------------------------------------------
def sha():
    """The first 12 hexadecimal digits of the sha256 of nft.py."""
    return hashlib.sha256((rows.REPOSITORY / "nft.py").read_bytes()).hexdigest()[:12]


def git(*words):
    """What git says of this repository; nothing where there is none."""
    call = ["git", "--no-optional-locks", "-C", rows.REPOSITORY, *words]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def origin():
    """The code and the machine of a run that ends now."""
    commit = git("log", "-1", "--format=%h", "--abbrev=12", "--", *CODE) or "unknown"
    if git("status", "--porcelain", "--", *CODE):
        commit += " with changes"
    info = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    return {"nft": sha(), "commit": commit, "cpu": named[1] if named else platform.machine()}


def read(file=FILE):
    """The results by their names."""
    return json.loads(file.read_text("utf-8")) if file.exists() else {}


def write(results, file=FILE):
    """Write results.json, a line a run."""
    lines = [json.dumps({name: results[name]}, separators=(",", ":")) for name in sorted(results)]
    # A kill while writing leaves the last file whole.
    new = file.with_suffix(".tmp")
    new.write_text("{\n" + ",\n".join(line[1:-1] for line in lines) + "\n}\n")
    os.replace(new, file)


def runs_of(name, results):
    """A row's runs: those of today's nft.py, or if there is none the earlier ones."""
    digest = rows.ROWS[name].digest()
    named = [run for key, run in results.items() if key.rpartition("/")[0] == name]
    runs = [run for run in named if run["row"] == digest]
    return [run for run in runs if run["nft"] == sha()] or runs


def source(runs):
    """Of which code and machine runs are, as text."""
    told = set()
    for run in runs:
        text = f"commit {run['commit']} on {run['cpu']}"
        if run["nft"] != sha():
            text += f", with an earlier nft.py ({run['nft']})"
        told.add(text)
    return f"*{'; '.join(sorted(told)) or 'not measured yet'}*"


# ---- Numbers -------------------------------------------------------------------------------------
def number(value):
    """Three digits, or all those before the point of a large number."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def mean(values):
    """The mean over seeds, and each in brackets where there are several, as text."""
    text = f"{statistics.mean(values):.3f}"
    if len(values) > 1:
        text += f" ({', '.join(f'{value:.3f}' for value in values)})"
    return text


def reach(run, column, target):
    """(False, what a run had spent when its accuracy first was `target`), or (True, all it spent).

    column: 0 for evaluations, 1 for seconds. Between two points of the curve it is interpolated.
    """
    curve = run["curve"]
    for before, after in itertools.pairwise(curve):
        if before[2] < target <= after[2]:
            part = (target - before[2]) / (after[2] - before[2])
            return False, before[column] + part * (after[column] - before[column])
    return True, curve[-1][column]


def bound(amount):
    """An amount of `reach` as text: > where the target was not reached."""
    missed, spent = amount
    return f">{number(spent)}" if missed else number(spent)


def median(amounts):
    """The median of amounts of `reach`, the lower one of two; what was not reached comes last."""
    return sorted(amounts)[(len(amounts) - 1) // 2]


def race(runs, first, cost, target):
    """The median (and range) of a cost to a target, and over that of the runs `first`, as text."""
    column = ("evaluations", "seconds").index(cost)
    amounts = sorted(reach(run, column, target) for run in runs)
    low, middle, high = bound(amounts[0]), median(amounts), bound(amounts[-1])
    text = bound(middle)
    if low != high:
        text += f" ({low}–{high})"
    if first:
        missed, theirs = median([reach(run, column, target) for run in first])
        if not missed:
            text += f", {'>' if middle[0] else ''}{middle[1] / theirs:.2g}×"
    return text


def cell(column, runs, first):
    """What a column says of a row's runs, as text; see `race` for `first`."""
    if " to " in column:
        cost, target = column.split(" to ")
        return race(runs, first, cost, float(target))
    evaluations, seconds, end = zip(*[run["curve"][-1] for run in runs], strict=True)
    texts = {
        "end": mean(end),
        "best": mean([max(accuracy for _, _, accuracy in run["curve"]) for run in runs]),
        # The base model's is the same for all seeds.
        "accuracy": f"{runs[0]['curve'][0][2]:.3f} → {mean(end)}",
        "evaluations": number(statistics.mean(evaluations)),
        "minutes": f"{statistics.mean(seconds) / 60:.1f}",
        "images": number(statistics.mean(run["images"] for run in runs)),
    }
    for name in runs[0]["watched"]:
        before = statistics.mean(run["watched"][name][0] for run in runs)
        texts[name] = f"{before:.3f} → {mean([run['watched'][name][1] for run in runs])}"
    return texts[column]


# ---- Tables and pages ----------------------------------------------------------------------------
def flags(settings):
    """Settings as flags, but for UNTOLD."""
    told = {name: value for name, value in settings.items() if name not in UNTOLD}
    words = [f"--{name.replace('_', '-')} {value}" for name, value in told.items()]
    return f"`{' '.join(words)}`" if words else ""


def is_preset(row):
    """Whether a row begins from its model's preset, and not from rows.SCHEDULE."""
    return not rows.SCHEDULE.keys() <= row.settings.keys()


def usual(names):
    """The settings that most rows share, of those that all have; presets do not count."""
    settings = [rows.ROWS[name].settings for name in names if not is_preset(rows.ROWS[name])]
    found = {}
    for name in settings[0] if settings else ():
        values = [each.get(name) for each in settings]
        value = statistics.mode(values)
        if None not in values and 2 * values.count(value) > len(values):
            found[name] = value
    return found


def describe(row, shared):
    """What a row changes of the shared settings, or of its preset."""
    words = [row.parts, flags(dict(pair for pair in row.settings.items() if pair not in shared))]
    if is_preset(row):
        words = ["the preset", row.parts, flags(row.settings)]
    return " ".join(filter(None, words))


def table(name, results):
    """A table of rows.TABLES as Markdown, and below it of which code and machine it is."""
    names, columns = rows.TABLES[name]
    shared = usual(names)
    lines = [["row", "settings", *columns], ["---"] * (2 + len(columns))]
    measured = {other: runs_of(other, results) for other in names}
    for other, runs in measured.items():
        first = measured[names[0]]
        models = [rows.ROWS[one].settings["model"] for one in (other, names[0])]
        if other == names[0] or models[0] != models[1]:
            first = []
        cells = ["not measured yet"] + [""] * (len(columns) - 1)
        if runs:
            cells = [cell(column, runs, first) for column in columns]
        lines.append([other, describe(rows.ROWS[other], shared.items()), *cells])
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    if shared:
        text += f"\nUnless a row says otherwise: {flags(shared)}.\n"
    return f"\n{text}\n{source(itertools.chain.from_iterable(measured.values()))}\n"


def show(name, results):
    """What a page has between the markers of a name. Raises KeyError for one that is none."""
    if name in rows.TABLES:
        return table(name, results)
    row, _, column = name.partition(" ")
    runs = runs_of(row, results)
    if not runs:
        return "not measured yet"
    if rows.ROWS[row].prints:
        return f"\n{runs[0]['table']}\n{source(runs)}\n"
    text = cell(column, runs, [])
    return text if runs[0]["nft"] == sha() else f"{text} ({source(runs)})"


def fill(text, results):
    """The text of a page with what is to be shown between its markers."""
    return MARKED.sub(lambda found: found[1] + show(found[2], results) + found[4], text)


# ---- Plots ---------------------------------------------------------------------------------------
def draw_panel(axis, title, names, results):
    """Held-out accuracy against network evaluations: a colour a row, a thin line a seed."""
    ends = []
    for i, name in enumerate(names):
        for j, run in enumerate(runs_of(name, results)):
            x, _, y = zip(*run["curve"], strict=True)
            style = {"linestyle": "-" if i < 10 else "--", "label": None if j else name}
            axis.plot(x, y, color=f"C{i}", linewidth=0.9, marker=".", **style)
            ends.append(x[-1])
    axis.set(title=title, xlabel="network evaluations", ylabel="held-out accuracy", ylim=(0, 1))
    if ends:
        axis.legend(fontsize=7)
        if max(ends) > 4 * min(ends):
            axis.set_xscale("log")


def draw(results, folder=FILE.parent):
    """Draw the plots of which there is a run; needs matplotlib."""
    from matplotlib.figure import Figure

    for file, panels in rows.PLOTS.items():
        if not any(runs_of(name, results) for names in panels.values() for name in names):
            continue
        columns = min(3, len(panels))
        lines = -(-len(panels) // columns)
        figure = Figure(figsize=(4.3 * columns, 3.6 * lines), layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False).flatten()
        for axis, (title, names) in zip(axes, panels.items(), strict=False):
            draw_panel(axis, title, names, results)
        figure.savefig(folder / file, dpi=95)
