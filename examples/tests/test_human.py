"""What a person clicks is what a run trains on, nothing that was clicked is lost, and nobody else
gets in.

They talk to the page's server as the page does. Each test's docstring states a law.
SPDX-License-Identifier: MIT
"""

import contextlib
import http.client
import io
import json
import os
import signal
import sys
import threading
import time
import urllib.error
import urllib.request

import common
import human
import numpy as np
import pytest
import torch
from PIL import Image

import nft

PROMPTS = ["a red circle", "<b>two</b> & 'blue' squares", "a green cross", "a sea"]
# Seconds after which something that should happen has not.
PATIENCE = 60


def pictures(n=4, side=16):
    """n PIL pictures, each of one grey."""
    return [Image.new("RGB", (side, side), (40 * i, 40 * i, 40 * i)) for i in range(n)]


def until(condition):
    """Wait until condition() is true, and return it."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.01)
    raise AssertionError("it did not happen")


class Asked:
    """A question to a Person in a thread of its own; `answer()` waits for what it returns."""

    def __init__(self, person, shown, prompts=PROMPTS):
        self.returned = []
        self.thread = threading.Thread(target=self.ask, args=(person, shown, prompts), daemon=True)
        self.thread.start()

    def ask(self, person, shown, prompts):
        self.returned.append(person.ask(shown, prompts))

    def answer(self):
        self.thread.join(PATIENCE)
        (returned,) = self.returned
        return returned


@pytest.fixture
def person(tmp_path):
    """A new person, whose answers go to answers.jsonl."""
    made = human.Person()
    made.open(tmp_path / "answers.jsonl")
    yield made
    made.close()


def asked(person, shown=None):
    """(the question, the keys in the page's order), once it waits."""
    question = Asked(person, shown or pictures())
    until(lambda: person.waiting and person.server)
    return question, list(person.waiting)


def fetch(person, name, body=None, **headers):
    """What the server answers: bytes. Raises urllib.error.HTTPError."""
    data = None
    if body is not None:
        headers = {"Content-Type": "application/json"} | headers
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
    url = name if name.startswith("http") else person.address() + name
    with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=5) as reply:
        return reply.read()


def status(person, name, body=None, **headers):
    """The status that the server answers with."""
    try:
        fetch(person, name, body, **headers)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code
    return 200


def lines(person):
    """The answers on the disk: [(key, r)]."""
    rows = map(json.loads, person.file.read_text().split())
    return [(row["key"], row["r"]) for row in rows]


# ---- The protocol --------------------------------------------------------------------------------
def test_r_is_as_clicked(person):
    """Good is 1, bad 0, unmarked 1/2; the last mark holds, and each is on the disk at once."""
    question, keys = asked(person)
    for key, r in ((keys[0], 0), (keys[0], 1), (keys[1], 0), (keys[3], 1), (keys[3], None)):
        state = json.loads(fetch(person, "mark", {"key": key, "r": r}))
        (image,) = (image for image in state["images"] if image["key"] == key)
        assert image["r"] == r
        assert json.loads(person.file.read_text().splitlines()[-1])["r"] == r
    fetch(person, "done", {"page": state["page"]})
    assert question.answer() == [1, 0, 0.5, 0.5]
    assert human.read_answers(person.file) == dict(zip(keys, [1, 0, 0.5, 0.5], strict=True))
    assert json.loads(fetch(person, "state"))["images"] == []


def test_state_and_pictures(person):
    """The page is told prompts and marks in the batch's order, and gets the very pixels."""
    _, keys = asked(person)
    state = json.loads(fetch(person, "state"))
    assert [image["prompt"] for image in state["images"]] == PROMPTS
    assert [image["key"] for image in state["images"]] == keys
    for key, picture in zip(keys, pictures(), strict=True):
        found = Image.open(io.BytesIO(fetch(person, f"{key}.png")))
        assert np.array_equal(found, picture)


def test_only_what_is_open_is_asked(person):
    """Another process with the same file asks about what has no answer, and no more.

    A line that was cut off, as by a kill, spoils neither those before nor those after it.
    """
    _, keys = asked(person)
    fetch(person, "mark", {"key": keys[1], "r": 0})
    fetch(person, "mark", {"key": keys[2], "r": 1})
    with person.file.open("ab") as file:
        file.write(b'\n{"key": "' + keys[3].encode())
    other = human.Person()
    other.open(person.file)
    with contextlib.closing(other):
        question, again = asked(other)
        assert again == [keys[0], keys[3]]
        fetch(other, "mark", {"key": keys[3], "r": 1})
        fetch(other, "done", {"page": 1})
        assert question.answer() == [0.5, 0, 1, 1]
        known = dict(zip(keys, [0.5, 0, 1, 1], strict=True))
        assert human.read_answers(person.file) == known
        # So nobody is asked.
        other.open(person.file)
        assert other.ask(pictures(), PROMPTS) == [0.5, 0, 1, 1]
        assert other.page == 1


def test_key_is_of_pixels_and_prompt(person):
    """Equal pictures with one prompt are one question; another prompt, size or pixel is another."""
    one, two, *_ = pictures()
    wide = Image.new("RGB", (32, 8), (0, 0, 0))
    shown = [one, one.copy(), one, two, wide]
    question = Asked(person, shown, ["sea", "sea", "sky", "sea", "sea"])
    until(lambda: person.waiting)
    assert len(person.waiting) == 4
    first = next(iter(person.waiting))
    fetch(person, "mark", {"key": first, "r": 1})
    fetch(person, "done", {"page": 1})
    assert question.answer() == [1, 1, 0.5, 0.5, 0.5]


def test_an_old_tab_ends_no_new_page(person):
    """Done with one page, clicked twice, is not done with the next; nor does a late mark count."""
    question, keys = asked(person)
    fetch(person, "done", {"page": 1})
    question.answer()
    assert status(person, "done", {"page": 1}) == 409
    second, _ = asked(person, pictures(side=8))
    assert status(person, "done", {"page": 1}) == 409
    assert status(person, "mark", {"key": keys[0], "r": 1}) == 409
    assert person.answers[keys[0]] == 0.5
    fetch(person, "done", {"page": 2})
    assert second.answer() == [0.5] * 4


# {address}: that of the page; {key}: of a picture that waits.
STRANGE = {
    "no token": ("http://127.0.0.1:{port}/", None, {}, 404),
    "another token": ("http://127.0.0.1:{port}/{other}/state", None, {}, 404),
    "a file": ("../../../../etc/passwd", None, {}, 404),
    "an unknown picture": ("0000.png", None, {}, 404),
    "another site's name": ("state", None, {"Host": "evil.example"}, 404),
    "another site, to mark": ("mark", {"key": "{key}", "r": 1}, {"Host": "evil.example"}, 404),
    "another action": ("stop", {"page": 1}, {}, 404),
    "a form": ("mark", b"key=1", {"Content-Type": "text/plain"}, 415),
    "two": ("mark", {"key": "{key}", "r": 2}, {}, 409),
}


@pytest.mark.parametrize("case", STRANGE)
def test_nothing_else_is_served(person, case, capsys):
    """What is not the page, its pictures or a well-formed mark is refused, and changes nothing."""
    _, keys = asked(person)
    name, body, headers, expected = STRANGE[case]
    names = {"port": person.server.server_port, "token": person.server.token, "other": "x" * 22}
    if isinstance(body, dict) and body.get("key") == "{key}":
        body = body | {"key": keys[0]}
    assert status(person, name.format(**names), body, **headers) == expected
    assert not person.answers
    assert len(person.waiting) == 4
    assert not person.file.exists()
    said = capsys.readouterr()
    assert "failed" not in said.out
    assert said.err == ""
    # It goes on.
    assert status(person, "state") == 200


def test_page_is_private(person):
    """The server listens on this machine alone, tokens are long and new, no other site is used."""
    asked(person)
    assert person.server.server_address[0] == "127.0.0.1"
    assert len(person.server.token) >= 22
    other = human.Person()
    with contextlib.closing(other):
        assert other.address().split("/")[3] != person.server.token
    with urllib.request.urlopen(person.address(), timeout=5) as reply:
        policy = reply.headers["Content-Security-Policy"]
        page = reply.read().decode()
    assert "default-src 'self'" in policy
    assert "http" not in policy
    assert "http" not in page
    # Prompts are other people's text.
    assert "innerHTML" not in page


def test_a_mark_that_the_disk_refuses_does_not_count(person, capsys):
    """Where an answer cannot be kept the page is not told that it was."""
    _, keys = asked(person)
    person.file.mkdir()
    with pytest.raises((urllib.error.URLError, http.client.HTTPException, ConnectionError)):
        fetch(person, "mark", {"key": keys[0], "r": 1})
    assert not person.answers
    until(lambda: "the page failed" in capsys.readouterr().out)


# ---- Runs ----------------------------------------------------------------------------------------
class Clicker(threading.Thread):
    """An automatic person, who speaks the page's protocol until the run ends.

    judge(key, prompt, image) says 1, 0 or None for an image (H, W, 3) of 8 bits. `seen` are the
    keys of all pages. With `leave` it marks that many pictures, presses Ctrl-C, and is gone.
    """

    def __init__(self, judge, leave=None):
        super().__init__(daemon=True)
        self.judge = judge
        self.leave = leave
        self.seen = []
        self.over = False
        self.start()

    def run(self):
        while not self.over:
            if human.PERSON.waiting:
                self.answer_page()
            time.sleep(0.005)

    def answer_page(self):
        state = json.loads(fetch(human.PERSON, "state"))
        for image in state["images"]:
            self.seen.append(image["key"])
            png = fetch(human.PERSON, image["key"] + ".png")
            pixels = np.asarray(Image.open(io.BytesIO(png)))
            r = self.judge(image["key"], image["prompt"], pixels)
            fetch(human.PERSON, "mark", {"key": image["key"], "r": r})
            if len(self.seen) == self.leave:
                self.over = True
                os.kill(os.getpid(), signal.SIGINT)
                return
        if state["images"]:
            fetch(human.PERSON, "done", {"page": state["page"]})


@pytest.fixture(autouse=True)
def as_in_a_program(monkeypatch):
    """Ctrl-C interrupts, which pytest-xdist's workers ignore, and `human` is this module: runs of
    other tests may have dropped it."""
    monkeypatch.setitem(sys.modules, "human", human)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def by_key(key, prompt, pixels):
    """A judgement that depends on the picture alone: good, bad or none."""
    return (1, 0, None)[int(key, 16) % 3]


R = {1: 1, 0: 0, None: 0.5}


def run(out, judge=by_key, leave=None, status=0, more=None, **changes):
    """Run human.py on an untrained pipeline; returns the automatic person."""
    words = common.command_line("sd15", out=out, **({"reward": None} | changes))
    clicker = Clicker(judge, leave)
    try:
        assert human.main(words, **(more or {})) == status
    finally:
        clicker.over = True
        clicker.join(PATIENCE)
    assert human.PERSON.server is None
    return clicker


WATCH = {"reward": "jpeg"}


def test_a_run_trains_on_what_was_clicked(tmp_path):
    """r of each image is the click itself; with --reward nobody is asked at evaluation, whose
    reward is then that one."""
    given = []

    def weigh(raw, groups, z):
        given.append(human.weigh(raw, groups, z))
        return given[-1]

    clicker = run(tmp_path / "run", more={"weigh": weigh}, **WATCH)
    # Two iterations of six images, batch by batch.
    assert len(clicker.seen) == 12
    expected = torch.tensor([R[by_key(key, "", None)] for key in clicker.seen])
    assert torch.equal(torch.cat(given), expected)
    rows = common.metrics(tmp_path / "run")
    for row, r in zip(rows[1:], expected.view(2, 6), strict=True):
        assert row["reward"] == pytest.approx(r.mean().item())
        assert row["r_std"] == pytest.approx(r.std(correction=0).item())
    assert rows[0]["eval_reward"] == rows[0]["eval_reward/jpeg"] < 0
    assert "eval_reward/human" not in rows[0]
    assert set(human.read_answers(tmp_path / "run/answers.jsonl")) == set(clicker.seen)


def test_evaluation_asks_without_another_reward(tmp_path):
    """Without --reward the held-out reward is the person's, before training and at its end."""
    clicker = run(tmp_path / "run", iterations=1)
    rows = common.metrics(tmp_path / "run")
    held_out = len(common.TEXTS)
    assert len(clicker.seen) == 6 + 2 * held_out
    said = [R[by_key(key, "", None)] for key in clicker.seen[:held_out]]
    assert rows[0]["eval_reward"] == pytest.approx(sum(said) / held_out)


def test_interrupted_and_resumed(tmp_path, capsys):
    """Ctrl-C amid a page ends with 130; --resume asks only what is open, and gets to the same end.

    It comes at picture 8, the second of iteration 2. What the person left unmarked is open, too.
    """
    whole = run(tmp_path / "whole", **WATCH)
    before = run(tmp_path / "run", leave=8, status=130, **WATCH)
    said = capsys.readouterr().err
    assert f"--out {tmp_path}/run --resume" in said.splitlines()[-1]
    assert "Traceback" not in said
    clicker = Clicker(by_key)
    try:
        assert human.main([f"--out={tmp_path}/run", "--resume", "--reward=jpeg"]) == 0
    finally:
        clicker.over = True
        clicker.join(PATIENCE)
    known = {key for key in before.seen if by_key(key, "", None) is not None}
    unmarked_page = [key for key in before.seen[6:] if key not in known]
    assert clicker.seen == unmarked_page + whole.seen[8:]
    expected = common.metrics(tmp_path / "whole", "seconds")
    assert common.metrics(tmp_path / "run", "seconds") == expected
    ours = common.checkpoint(tmp_path / "run")["lora"]["theta"]
    theirs = common.checkpoint(tmp_path / "whole")["lora"]["theta"]
    for x, y in zip(ours, theirs, strict=True):
        assert torch.equal(x, y)


def test_as_any_reward(tmp_path, monkeypatch):
    """`nft.py --reward human` takes the clicks as rewards; answers go to runs/answers.jsonl."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(human, "PERSON", human.Person())
    images = torch.rand(3, 3, 8, 8)
    clicker = Clicker(by_key)
    with contextlib.closing(human.PERSON):
        found = human.reward(images, PROMPTS[:3], [{}] * 3)
        clicker.over = True
        clicker.join(PATIENCE)
    assert found == [R[by_key(key, "", None)] for key in clicker.seen]
    assert set(human.read_answers(tmp_path / human.DEFAULT_FILE)) == set(clicker.seen)


def test_what_a_person_cannot(monkeypatch, capsys):
    """A reward that does not exist, and several processes, are refused."""
    with pytest.raises(SystemExit, match="2"):
        human.main(["--reward=nonsense"])
    assert "nonsense" in capsys.readouterr().err
    monkeypatch.setattr(nft, "WORLD", 2)
    with pytest.raises(RuntimeError, match="use one"):
        human.ask(torch.zeros(1, 3, 8, 8), ["sea"], [{}])
