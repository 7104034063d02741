"""What the tests of faults share: files good and bad, and what a refusal is.

SPDX-License-Identifier: MIT
"""

import contextlib
import functools
import os
import shutil

import common
import torch

import nft

# The tests run in this directory, so that names of files are short.
AREA = common.ROOT / "faults"
HACKED = AREA / "hacked"


class Hostile:
    """Pickled, it is a command that leaves a file."""

    def __reduce__(self):
        return os.system, (f"touch {HACKED}",)


@functools.cache
def area():
    """AREA with a finished run, a folder, good prompts, and two links that lead nowhere."""
    AREA.mkdir()
    shutil.copytree(common.finished("sd15"), AREA / "run")
    (AREA / "folder").mkdir()
    (AREA / "p.txt").write_text("a red circle\na blue square\n")
    (AREA / "loop").symlink_to("loop")
    (AREA / "nowhere").symlink_to("gone/away")
    return AREA


@contextlib.contextmanager
def one_thread():
    """PyTorch on one thread: the sums of runs that are compared bit for bit depend on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def command(**changes):
    """The words of a small run's command line; `changes` win, and None leaves a setting out."""
    wanted = common.settings("sd15", out="new") | changes
    return common.flags(**{name: value for name, value in wanted.items() if value is not None})


def resume(out, **changes):
    """The words of a command line that goes on with a run."""
    return common.flags(resume=True, out=out, **changes)


def copy_of_run(to):
    """A copy of the finished run that a test may damage."""
    shutil.rmtree(to, ignore_errors=True)
    return shutil.copytree(area() / "run", to)


def tree():
    """All that is on disk: {path: what a change of it would change}."""
    found = {}
    for path in common.ROOT.rglob("*"):
        # Python may compile a reward that it imports.
        if "__pycache__" in path.parts:
            continue
        status = path.lstat()
        found[path] = status.st_mode
        # A directory's own time changes with what Python compiles in it.
        if not path.is_dir():
            found[path] = (status.st_mode, status.st_ino, status.st_size, status.st_mtime_ns)
    return found


def stderr_lines(capfd):
    """The lines on stderr since the last time that somebody asked."""
    return [line for line in capfd.readouterr().err.splitlines() if line.strip()]


def fails(capfd, words, status, *says):
    """A command line ends with this status, and one line on stderr that says all of `says`."""
    capfd.readouterr()
    ended = nft.main(words)
    (line,) = stderr_lines(capfd)
    assert ended == status, line
    assert line.startswith("nft.py: ")
    for text in says:
        assert text in line, line
    return line


def refused(capfd, words, *says):
    """A command line is refused: one line with the value and a mend, and nothing has changed."""
    before = tree()
    line = fails(capfd, words, 2, *says)
    _, semicolon, mend = line.rpartition("; ")
    assert semicolon
    assert mend
    assert tree() == before
