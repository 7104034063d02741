"""results.json and tables.json: what was measured, on which code and machine; what pages show.

    python examples/studies/results.py      # write the pages anew from these files

figures.py does this after its runs, and tables.py after its studies; the plots need matplotlib.
results.json has a line a run, tables.json a table a study. Between the markers
`<!-- results: NAME -->` and `<!-- end -->` a page has what they give for NAME: a figure's or a
study's table, or for "ROW accuracy" a row's number (accuracy, roughness, images, evaluations,
minutes).

A run's fingerprint stands for the method: the statements in METHOD, as Python parses them, so
that comments, form, docstrings and messages do not count. Defaults and presets are compared as the
run's settings are. Neither sees what lies in examples/: a change there is yours to remember. A
study of tables.json has its own files and the presets in its fingerprint, too.
SPDX-License-Identifier: MIT
"""

import ast
import collections
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))
import report
import rows

import nft

FILE = REPOSITORY / "examples/studies/results.json"
TABLES = REPOSITORY / "examples/studies/tables.json"
# The studies of tables.py, and the files that they are made of.
STUDIES = {
    "blackbox": ["blackbox.py"],
    "control": ["control.py"],
    "memory": ["simulate.py", "bench.py"],
    "speed": ["bench.py"],
}
NOT_MEASURED = "\nNot measured on today's code.\n"
PAGES = (REPOSITORY / "README.md", REPOSITORY / "examples/studies/STUDIES.md")
# The pages' plots: the figures in each, and against what accuracy is drawn.
PLOTS = {
    "reward_curve.png": [("default", "images"), ("default", "seconds")],
    "comparison.png": [(name, "evaluations") for name in report.COMPARISONS],
    "ablations.png": [(name, "images") for name in report.ABLATIONS],
}
MARKED = re.compile(r"(<!-- results: (.+?) -->)(.*?)(<!-- end -->)", re.DOTALL)
# Of nft.py: functions, classes, and what they or the file assign to a name.
METHOD = """
    alpha_sigma predict_x0 optimality_reward adaptive_loss nft_loss soft_update_decay
    SCALE TARGETS generator LoRA pick_solver solver_level
    Model.sample Model.predict Model.noise_level Model.probe.times Model.probe.self.time_scale
    score draw_prompts laplacian open_run.optimizer collect evaluate.numbered evaluate.D
    pair_losses draw_pairs optimize gradient_step train
"""
# Functions of nft.py that only tell something.
TELLING = ("say", "tell", "blame")


# ---- The method's fingerprint --------------------------------------------------------------------
def definitions(node, prefix=""):
    """{name: node} of what is defined in a module, class or function, such as "LoRA.average"."""
    found = {}
    for child in node.body:
        if isinstance(child, ast.Assign):
            found[prefix + ast.unparse(child.targets[0])] = child
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            found[prefix + child.name] = child
            found |= definitions(child, f"{prefix}{child.name}.")
    return found


class WithoutWords(ast.NodeTransformer):
    """Takes off what is only said: docstrings, messages, and how a failure is told."""

    def visit_Call(self, node):
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id in TELLING:
            return ast.Constant("told")
        return node

    def visit_Expr(self, node):
        self.generic_visit(node)
        if isinstance(node.value, ast.Constant):
            return None
        return node

    def visit_Assign(self, node):
        # A text with values in it: what is drawn by such a text is given it at once.
        if isinstance(node.value, ast.JoinedStr):
            return None
        return self.generic_visit(node)

    def visit_Raise(self, node):
        return ast.Raise()

    def visit_ExceptHandler(self, node):
        return ast.ExceptHandler()


def spell(node):
    """A syntax tree as text, as ast.dump, but the same for every version of Python."""
    if isinstance(node, list):
        return f"[{' '.join(map(spell, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    text = type(node).__name__
    for name, value in ast.iter_fields(node):
        # Newer versions have more fields, which are empty.
        if value not in (None, []):
            text += f" {name}={spell(value)}"
    return f"({text})"


def fingerprint(source):
    """16 hexadecimal digits for the method in the text of an nft.py."""
    found = definitions(ast.parse(source))
    parts = [spell(WithoutWords().visit(found[name])) for name in METHOD.split() if name in found]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


# Of the module that this process has imported, whatever becomes of the file.
TODAY = fingerprint(Path(nft.__file__).read_text("utf-8"))


def study_fingerprint(name):
    """As `fingerprint`, of the method, the presets and all of a study's files."""
    parts = [TODAY, repr(nft.PRESETS)]
    for file in STUDIES[name]:
        tree = ast.parse((REPOSITORY / "examples/studies" / file).read_text("utf-8"))
        parts.append(spell(WithoutWords().visit(tree)))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


# ---- Runs ----------------------------------------------------------------------------------------
def git(*words):
    """What git says of this repository; nothing where there is none."""
    command = ["git", "--no-optional-locks", "-C", REPOSITORY, *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def origin():
    """The code, machine and versions of this process; `cores`: the machine's."""
    commit = git("rev-parse", "--short=12", "HEAD") or "unknown"
    if git("diff", "--name-only", "HEAD", "--", "*.py"):
        commit += " with changes"
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        named = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        cpu = named[1] if named else cpu
    found = {"fingerprint": TODAY, "commit": commit, "cpu": cpu, "cores": os.cpu_count()}
    found |= {"threads": torch.get_num_threads(), "python": platform.python_version()}
    for name in ("torch", "diffusers", "transformers"):
        found[name] = importlib.metadata.version(name)
    return found


def settings(config):
    """A run's settings, of a Config or of config.json, without its place, as JSON has them."""
    found = json.loads(json.dumps(config, default=str))
    return {name: value for name, value in found.items() if name not in ("out", "resume")}


def is_current(folder, config):
    """Whether a finished run is of today's method and these settings, a dict; new ones are free."""
    file = folder / "origin.json"
    if not file.exists() or json.loads(file.read_text())["fingerprint"] != TODAY:
        return False
    ran = json.loads((folder / "config.json").read_text())
    return settings(ran).items() <= settings(config).items()


def read():
    """The runs of results.json by name, those of today's method alone."""
    if not FILE.exists():
        return {}
    runs = json.loads(FILE.read_text("utf-8"))
    return {name: run for name, run in runs.items() if run["origin"]["fingerprint"] == TODAY}


def update(tasks):
    """Put finished runs, tasks (row, folder, seed), into results.json, and fill the pages."""
    if not tasks:
        return
    runs = read()
    for row, folder, _ in tasks:
        points = report.points(row, folder)
        runs[folder.name] = {
            "origin": json.loads((folder / "origin.json").read_text()),
            "settings": settings(json.loads((folder / "config.json").read_text())),
            "points": [{k: round(value, 6) for k, value in point.items()} for point in points],
        }
    lines = [f"{json.dumps(name)}: {json.dumps(runs[name])}" for name in sorted(runs)]
    nft.write_text(FILE, "{\n" + ",\n".join(lines) + "\n}\n")
    fill_pages()
    draw_plots()


def read_tables():
    """The studies of tables.json by name, those of today's code alone.

    Each is {"origin": its machine and code, "study": its fingerprint, "table": Markdown}.
    """
    if not TABLES.exists():
        return {}
    found = json.loads(TABLES.read_text("utf-8"))
    return {name: found[name] for name in STUDIES if is_today(name, found.get(name))}


def is_today(name, found):
    """Whether what tables.json has of a study is of today's code."""
    return found is not None and found["study"] == study_fingerprint(name)


def record(name, table, made, study):
    """Put a study's table, Markdown, into tables.json, and fill the pages.

    made, study: `origin` and `study_fingerprint` of when it began.
    """
    tables = read_tables()
    tables[name] = {"origin": made, "study": study, "table": table}
    nft.write_text(TABLES, json.dumps(tables, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    fill_pages()


def by_row(runs):
    """{row: {seed: points}} of the runs of results.json."""
    points = collections.defaultdict(dict)
    for key, run in runs.items():
        row, _, seed = key.rpartition("-")
        points[row][int(seed)] = run["points"]
    return points


# ---- Pages ---------------------------------------------------------------------------------------
def show(name, runs):
    """What a page shows between the markers of a name; `runs` are those of results.json."""
    if name in STUDIES:
        tables = read_tables()
        if name not in tables:
            return NOT_MEASURED
        made = tables[name]["origin"]
        return f"\n{tables[name]['table']}\n*commit {made['commit']} on {made['cpu']}.*\n"
    named = {row.name: row for wanted in rows.FIGURES.values() for row in wanted}
    points = by_row(runs)
    if name not in rows.FIGURES:
        row, _, field = name.rpartition(" ")
        if row not in named or field not in report.NUMBERS:
            raise SystemExit(
                f"results.py: {name}: must be a table, a figure, or a row and a number"
            )
        return report.numbers(points[row])[field] if row in points else "not measured"
    wanted = [row for row in rows.FIGURES[name] if row.name in points]
    if not wanted:
        return NOT_MEASURED
    # results.json has the versions as well.
    commits = collections.defaultdict(set)
    for row in wanted:
        for seed in points[row.name]:
            found = runs[f"{row.name}-{seed}"]["origin"]
            commits[found["cpu"]].add(found["commit"])
    told = [f"commit {', '.join(sorted(commits[cpu]))} on {cpu}" for cpu in sorted(commits)]
    return f"\n{report.figure_table(name, wanted, points)}\n*{'; '.join(told)}.*\n"


def fill(page, runs):
    """The text of a page with what is to be shown between its markers."""
    return MARKED.sub(lambda found: found[1] + show(found[2], runs) + found[4], page)


def fill_pages():
    """Write the pages anew from results.json and tables.json."""
    for page in PAGES:
        nft.write_text(page, fill(page.read_text("utf-8"), read()))


def draw_plots():
    """Draw the pages' plots anew from results.json, those of which a run is there."""
    points = by_row(read())
    for name, panels in PLOTS.items():
        there = []
        for figure, cost in panels:
            if any(row.name in points for row in rows.FIGURES[figure]):
                there.append((rows.TITLES[figure], rows.FIGURES[figure], cost))
        if there:
            report.plot(there, points, FILE.parent / name)


if __name__ == "__main__":
    fill_pages()
    draw_plots()
