"""Tables, plots and pictures of the runs of figures.py.

The functions that draw import matplotlib themselves.
SPDX-License-Identifier: MIT
"""

import itertools
import json
import math
from operator import attrgetter
from typing import NamedTuple

import rows

# What a run spends, and the title of its axis.
COSTS = {
    "images": "images",
    "evaluations": "network evaluations",
    "seconds": "seconds of a core",
}
# A low and a high accuracy.
TARGETS = (0.5, 0.7)
# What some rows watch on the held-out images: rewards, and the accuracy when they are sampled with
# guidance.
WATCHED = ("brightness", "saturation", "shapes:reward")
WATCHED += tuple(f"guidance {scale}" for scale in rows.SCALES)
COMPARISONS = ("tiny", "few-tiny", "tiny-sd3", "few")
ABLATIONS = ("negative", "solvers", "eta", "weighting", "beta", "off-policy")
# The costs in the table of a figure, where they are not images alone.
SHOWN_COSTS = {
    "tiny": ("evaluations", "seconds"),
    "few-tiny": ("evaluations", "seconds"),
    "tiny-sd3": ("evaluations", "seconds"),
    "few": ("evaluations", "seconds"),
    "released": ("evaluations", "seconds"),
    "signal": ("evaluations",),
    "literature": ("images", "evaluations"),
    # About where they end.
    "epsilon": (),
    "learned": (),
    "long": (),
    "guidance": (),
}
# In the other figures a row's name says what it changes.
SHOWN_SETTINGS = (*COMPARISONS, "released", "sweep")
# What was trained, where it is not accuracy.
TRAINED = {"learned": "learned reward"}
# Of this figure's rows the coarser ones hardly get above 0.65.
SHOWN_TARGETS = {"released": (0.5, 0.65)}
NOTE = """An accuracy is that of 256 held-out prompts, one picture each, with a standard error of
about 0.03; all rows share prompts and noise. `>` marks what was spent where the accuracy was not
reached, and what rests on that (a ratio to an NFT run that did not reach it: `<`). Images are those
sampled, evaluations samples through the denoiser, seconds those of one core; the evaluation of
accuracy is left out.
"""


# ---- What a run spent, and what came out ---------------------------------------------------------
def read(folder):
    """The rows of a run's metrics.jsonl; none where there is no run."""
    file = folder / "metrics.jsonl"
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines()]


def finished(row, folder):
    """Whether `folder` has all of the row's iterations."""
    logged = read(folder)
    return bool(logged) and logged[-1]["iteration"] >= row.iterations


def points(row, folder):
    """The evaluations of a finished run, in order; none of an unfinished one.

    Each is a dict of `accuracy`, `roughness`, what there is of WATCHED, and what the run had spent
    by then: `images`, `evaluations` and `seconds`.
    """
    if not finished(row, folder):
        return []
    config = json.loads((folder / "config.json").read_text())
    images = config["groups"] * config["group_size"]
    # Not what is trained on.
    watched = [name for name in WATCHED if name.partition(":")[0] not in config["reward"]]
    found = []
    for logged in read(folder):
        if "eval_reward" not in logged:
            continue
        sampled = math.ceil(logged["iteration"] / row.reuse)
        point = {
            "images": images * sampled,
            "evaluations": logged["evaluations"],
            "seconds": logged["cpu"],
            "accuracy": logged["eval_reward"],
            "roughness": logged["eval_roughness"],
        }
        for name in watched:
            if f"eval_reward/{name}" in logged:
                point[name] = logged[f"eval_reward/{name}"]
        found.append(point)
    return found


class Amount(NamedTuple):
    """A number, or a bound on it: `mark` is "", ">" for a lower and "<" for an upper bound."""

    mark: str
    value: float


def reach(run, cost, target):
    """The Amount of `cost` that a run (of `points`) had spent when its accuracy first was `target`.

    Between two evaluations it is interpolated. Where the target is never reached, all that the run
    spent is a lower bound.
    """
    for before, after in itertools.pairwise(run):
        if after["accuracy"] >= target:
            missing = max(0, target - before["accuracy"])
            gained = max(1e-9, after["accuracy"] - before["accuracy"])
            spent = after[cost] - before[cost]
            return Amount("", before[cost] + missing / gained * spent)
    return Amount(">", run[-1][cost])


def ratio(theirs, ours):
    """theirs / ours of two Amounts of `reach`; None where both are bounds, which says nothing."""
    if theirs.mark and ours.mark:
        return None
    mark = theirs.mark
    if ours.mark:
        mark = "<"
    return Amount(mark, theirs.value / ours.value)


def number(value):
    """Three digits, or all those before the point of a large number."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def order_statistic(amounts, i):
    """Number i of sorted Amounts as text, marked as a bound where one can move across it."""
    mark = ""
    if any(amount.mark == ">" for amount in amounts[: i + 1]):
        mark += ">"
    if any(amount.mark == "<" for amount in amounts[i:]):
        mark += "<"
    return mark + number(amounts[i].value)


def spread(amounts):
    """Lower median and range over seeds of Amounts, some of which may be None, as text."""
    known = [amount for amount in amounts if amount is not None]
    if not known:
        return "unknown"
    known.sort(key=attrgetter("value"))
    last = len(known) - 1
    low = order_statistic(known, 0)
    high = order_statistic(known, last)
    text = order_statistic(known, last // 2)
    if low != high:
        text += f" ({low} to {high})"
    if len(known) < len(amounts):
        text += f" {len(known)} of {len(amounts)} seeds"
    return text


def mean(values, form=".3f"):
    """Mean over seeds, and in parentheses each value where there are several, as text."""
    text = format(sum(values) / len(values), form)
    if len(values) > 1:
        each = ", ".join(format(value, form) for value in values)
        text += f" ({each})"
    return text


# ---- Tables --------------------------------------------------------------------------------------
def table(titles, lines):
    """A table of markdown from lists of texts."""
    rules = ["---"] * len(titles)
    return "".join(f"| {' | '.join(line)} |\n" for line in [titles, rules, *lines])


def best_accuracy(logged):
    """The best held-out accuracy among rows of metrics.jsonl."""
    return max(entry["eval_reward"] for entry in logged if "eval_reward" in entry)


def sweep_table(wanted, out, seed):
    """Each setting of each method; the best of a method, model and length is bold."""
    done = []
    record = {}
    for row in wanted:
        folder = out / f"{row.name}-{seed}"
        if not finished(row, folder):
            continue
        logged = read(folder)
        done.append((row, logged))
        group = (row.method, row.model, row.iterations)
        record[group] = max(record.get(group, 0), best_accuracy(logged))
    lines = []
    for row, logged in done:
        last = logged[-1]
        best = f"{best_accuracy(logged):.3f}"
        if best_accuracy(logged) == record[row.method, row.model, row.iterations]:
            best = f"**{best}**"
        rewards = [entry["reward"] for entry in logged[-3:]]
        line = [
            f"{row.method}, {row.model}",
            rows.describe(row.settings, row.method),
            str(row.iterations),
            f"{last['eval_reward']:.3f}",
            best,
            f"{sum(rewards) / len(rewards):.3f}",
            f"{last['eval_roughness']:.2f}",
            f"{last['cpu'] / 60:.1f}",
        ]
        lines.append(line)
    titles = [
        "method",
        "settings",
        "iterations",
        "accuracy at the end",
        "at its best",
        "training reward, last 3 iterations",
        "roughness",
        "minutes",
    ]
    minutes = sum(logged[-1]["cpu"] for _, logged in done) / 60
    return f"{table(titles, lines)}\nThe sweep took {minutes:.0f} minutes of a core.\n"


def results_of(runs, watched, costs, targets):
    """What a row's runs, lists of points, came to: a line of `result_tables` without its head."""
    line = [
        mean([run[-1]["accuracy"] for run in runs]),
        mean([max(point["accuracy"] for point in run) for run in runs]),
        mean([run[-1]["roughness"] for run in runs], ".2f"),
    ]
    for name in watched:
        ends = mean([run[-1][name] for run in runs])
        line.append(f"{runs[0][0][name]:.3f} → {ends}")
    for target in targets:
        for cost in costs:
            line.append(spread([reach(run, cost, target) for run in runs]))
    return line


def ratio_line(row, runs, nft_runs, costs, targets):
    """What a method spent over what NFT spent with the same seed; runs are {seed: points}."""
    pairs = [(runs[seed], nft_runs[seed]) for seed in runs if seed in nft_runs]
    line = [f"{row.label} / NFT"]
    for target in targets:
        for cost in costs:
            ratios = []
            for theirs, ours in pairs:
                ratios.append(ratio(reach(theirs, cost, target), reach(ours, cost, target)))
            line.append(spread(ratios))
    return line


def result_tables(name, wanted, runs):
    """What each row of a figure came to, and what it spent to reach targets.

    name: the figure. wanted: its rows. runs: {row: {seed: points}}. In a comparison a second table
    has what the other methods spent over what NFT spent.
    """
    costs = SHOWN_COSTS.get(name, ("images",))
    targets = SHOWN_TARGETS.get(name, TARGETS)
    titles = [f"{COSTS[cost]} to {target}" for target in targets for cost in costs]
    made = [run for row in wanted for run in runs[row.name].values()]
    watched = [word for word in WATCHED if all(word in run[-1] for run in made)]
    first = ["row", f"{TRAINED.get(name, 'accuracy')} at the end", "at its best", "roughness"]
    if name in SHOWN_SETTINGS:
        first.insert(1, "settings")
    ours = [row for row in wanted if row.method == "nft"]
    models = {row.model for row in wanted}
    lines = []
    ratios = []
    for row in wanted:
        mine = runs[row.name]
        if not mine:
            continue
        label = row.label
        # The others' settings or commands name it.
        if name in ABLATIONS and len(models) > 1:
            label += f", {row.model}"
        line = [label]
        if name in SHOWN_SETTINGS:
            line.append(f"{row.model}, {rows.describe(row.settings, row.method)}")
        lines.append(line + results_of(list(mine.values()), watched, costs, targets))
        if name in COMPARISONS and ours and row.method != "nft":
            ratios.append(ratio_line(row, mine, runs[ours[0].name], costs, targets))
    text = table(first + watched + titles, lines)
    if ratios:
        text += "\n" + table(["median (range)", *titles], ratios)
    return text


def numbers(runs):
    """What the runs {seed: points} of a row came to, as texts: over seeds a mean, and each."""
    first = next(iter(runs.values()))[0]
    last = [run[-1] for run in runs.values()]
    accuracy = mean([point["accuracy"] for point in last])
    return {
        # The base model's is the same for all seeds.
        "accuracy": f"{first['accuracy']:.3f} → {accuracy}",
        "roughness": mean([point["roughness"] for point in last], ".2f"),
        "images": f"{last[0]['images']:,}",
        # RFT and the policy gradients leave out images of weight 0: so seeds differ.
        "evaluations": f"{sum(point['evaluations'] for point in last) / len(last):,.0f}",
        "minutes": mean([point["seconds"] / 60 for point in last], ".1f"),
    }


NUMBERS = {
    "accuracy": "held-out accuracy: mean (each seed)",
    "roughness": "roughness at the end",
    "images": "images",
    "evaluations": "network evaluations",
    "minutes": "minutes of a core, without evaluation",
}


def preset_table(wanted, runs):
    """A line a preset, by its command."""
    lines = []
    for row in wanted:
        if runs[row.name]:
            lines.append([f"`{row.label}`", *numbers(runs[row.name]).values()])
    return table(["command", *NUMBERS.values()], lines)


def figure_table(name, wanted, runs):
    """The table of a figure, as pages have it; runs: {name: {seed: points}}."""
    if name in ("default", "third"):
        return preset_table(wanted, runs)
    return result_tables(name, wanted, runs)


# ---- Plots and pictures --------------------------------------------------------------------------
# Okabe and Ito's, for all eyes, and a brown and a grey. A method has the same in all plots.
COLOURS = {
    "nft": "#000000",
    "ddpo": "#D55E00",
    "dpok": "#0072B2",
    "loop": "#009E73",
    "coca": "#CC79A7",
    "rtb": "#E69F00",
    "rwr": "#56B4E9",
    "rft": "#8C564B",
    "flowgrpo": "#888888",
}
MARKERS = "osD^v<>PX"


def styles(wanted):
    """A colour and a marker a row: its method's, or where all rows are of one method its own."""
    pairs = list(zip(COLOURS.values(), MARKERS, strict=True))
    methods = list(COLOURS)
    if len({row.method for row in wanted}) == 1:
        return pairs[: len(wanted)]
    return [pairs[methods.index(row.method)] for row in wanted]


def draw_panel(axis, title, wanted, runs, cost):
    """Accuracy against a cost: a line a row, the mean over seeds with their range shaded."""
    import numpy as np
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    for row, (colour, marker) in zip(wanted, styles(wanted), strict=True):
        mine = runs[row.name].values()
        if not mine:
            continue
        x = np.mean([[point[cost] for point in run] for run in mine], axis=0)
        y = np.array([[point["accuracy"] for point in run] for run in mine])
        label = row.label
        style = "-"
        # A panel of two models: the second one's lines are dashed.
        if row.model != wanted[0].model:
            if row.model not in label:
                label += f", {row.model}"
            style = "--"
        axis.plot(x, y.mean(0), style, color=colour, marker=marker, markersize=3, label=label)
        axis.fill_between(x, y.min(0), y.max(0), color=colour, alpha=0.15, linewidth=0)
    axis.set_title(title, fontsize=11)
    axis.set(xlabel=COSTS[cost], ylabel="held-out accuracy", ylim=(0, 1))
    if cost == "evaluations":
        axis.set_xscale("log", nonpositive="mask")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_minor_formatter(NullFormatter())
    # After the scale, which brings its own.
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    for target in TARGETS:
        axis.axhline(target, color="gray", linestyle="--", linewidth=0.8)
        place = {"transform": axis.get_yaxis_transform(), "fontsize": 8, "color": "gray"}
        axis.text(0.99, target + 0.01, f"accuracy {target}", ha="right", **place)
    axis.legend(fontsize=8, loc="upper left")


def plot(panels, runs, file):
    """Draw panels (title, rows, cost), at most three a line, into a PNG."""
    from matplotlib.figure import Figure

    lines = math.ceil(len(panels) / 3)
    columns = math.ceil(len(panels) / lines)
    size = (min(13, 8 * columns), 3.8 * lines)
    figure = Figure(figsize=size, layout="constrained")
    for number, (title, wanted, cost) in enumerate(panels, 1):
        axis = figure.add_subplot(lines, columns, number)
        draw_panel(axis, title, wanted, runs, cost)
    figure.savefig(file, dpi=95)


def pictures(wanted, out, seed, file):
    """Each row's last pictures of the same prompts and noise, under those of the base model."""
    from PIL import Image, ImageDraw, ImageFont

    strips = []
    for row in wanted:
        samples = sorted((out / f"{row.name}-{seed}" / "samples").glob("*.png"))
        if not samples:
            continue
        if not strips:
            strips.append(("base model", samples[0]))
        strips.append((f"{row.label}\n{row.model}", samples[-1]))
    if not strips:
        return
    with Image.open(strips[0][1]) as first:
        width = first.width
        # The upper half of each grid is enough.
        height = first.height // 2
    margin = 140
    sheet = Image.new("RGB", (margin + width, height * len(strips)), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(14)
    for number, (text, path) in enumerate(strips):
        top = number * height
        with Image.open(path) as grid:
            sheet.paste(grid.crop((0, 0, width, height)), (margin, top))
        draw.text((8, top + 30), text, fill=0, font=font)
    sheet.save(file)


# ---- All of it -----------------------------------------------------------------------------------
def load(figures, seeds, out):
    """{name: {seed: points}} of the finished runs of all rows."""
    runs = {}
    for row in itertools.chain.from_iterable(figures.values()):
        runs[row.name] = {}
        for seed in seeds:
            run = points(row, out / f"{row.name}-{seed}")
            if run:
                runs[row.name][seed] = run
    return runs


def tables(figures, runs, seeds, out):
    """The tables of all figures, as markdown."""
    text = ""
    for name, wanted in figures.items():
        if name == "sweep":
            made = sweep_table(wanted, out, seeds[0])
        else:
            made = figure_table(name, wanted, runs)
        text += f"### {rows.TITLES[name]}\n\n{made}\n"
    return text + NOTE


def report(figures, seeds, out):
    """Print the tables of the finished runs, write them to tables.md, and draw.

    figures: {name: rows}. out: the directory of the runs.
    """
    runs = load(figures, seeds, out)
    there = {}
    for name, wanted in figures.items():
        if any(runs[row.name] for row in wanted):
            there[name] = wanted
    text = tables(there, runs, seeds, out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "tables.md").write_text(text)
    print(text)
    comparison = []
    ablations = []
    for name, wanted in there.items():
        title = rows.TITLES[name]
        if name in COMPARISONS:
            comparison.append((title, wanted, "evaluations"))
        elif name in ABLATIONS:
            ablations.append((title, wanted, "images"))
        if name != "sweep":
            pictures(wanted, out, seeds[0], out / f"grids-{name}.png")
    if comparison:
        plot(comparison, runs, out / "comparison.png")
    if ablations:
        plot(ablations, runs, out / "ablations.png")
