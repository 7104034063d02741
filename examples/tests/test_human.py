"""What a person clicks is what a run trains on, nothing that was clicked is lost, and nobody else
gets in. An automatic person talks to the server as the page does.
SPDX-License-Identifier: MIT
"""

import io
import json
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import common
import human
import numpy as np
import pytest
import torch
from PIL import Image

import nft

PROMPTS = ["a red circle", "<b>two</b> & 'blue' squares", "a green cross", "a sea"]
R = {1: 1, 0: 0, None: 0.5}


def images(side=16):
    """Four pictures, each of one grey."""
    return torch.linspace(0, 1, 4).view(4, 1, 1, 1).expand(4, 3, side, side)


def get(url):
    """What the server answers: bytes. Raises urllib.error.HTTPError."""
    with urllib.request.urlopen(url, timeout=5) as reply:
        return reply.read()


def post(address, **said):
    """Say this to the page's server; the state that it answers with."""
    return json.loads(get(urllib.request.Request(address, json.dumps(said).encode())))


def keys(address):
    """The keys of the pictures that wait, in the page's order."""
    return [image["key"] for image in post(address)["images"]]


def judge(key):
    """A judgement that depends on the picture alone: good, bad or none."""
    return (1, 0, None)[int(key, 16) % 3]


class Clicker:
    """An automatic person: marks by `judge` and is done, when the run prints the page's address.

    seen: the keys of all marks. leave: after so many it presses Ctrl-C.
    """

    leave = None

    def __init__(self, monkeypatch):
        self.seen = []
        monkeypatch.setattr(nft, "say", self.say)

    def say(self, text):
        """In the place of nft.say."""
        if "wait for you" not in text:
            return
        address = text.split()[-1]
        for key in keys(address):
            if len(self.seen) == self.leave:
                raise KeyboardInterrupt
            self.seen.append(key)
            post(address, key=key, r=judge(key))
        assert not post(address, done=post(address)["page"])["images"]


@pytest.fixture
def clicker(monkeypatch):
    return Clicker(monkeypatch)


@pytest.fixture
def person(tmp_path):
    made = human.Person()
    made.open(tmp_path / "answers.jsonl")
    return made


@pytest.fixture
def address(person):
    return f"http://127.0.0.1:{person.server.server_port}/{person.server.token}/"


@pytest.fixture
def question(person):
    """Four pictures that wait: the future of their rewards."""
    with ThreadPoolExecutor() as pool:
        future = pool.submit(person.reward, images(), PROMPTS, None)
        while not (person.waiting or future.done()):
            time.sleep(0.01)
        yield future
        # Also where a test failed.
        person.finished.set()


# ---- The page ------------------------------------------------------------------------------------
def test_r_is_as_clicked(person, address, question):
    """Good is 1, bad 0, unmarked 1/2; the last mark holds, each is in the file at once, and the run
    waits until the person is done."""
    a, b, _, d = keys(address)
    for key, r in ((a, 0), (a, 1), (b, 0), (d, 1), (d, None)):
        state = post(address, key=key, r=r)
        assert {image["key"]: image["r"] for image in state["images"]}[key] == r
        assert human.read_answers(person.file).get(key) == r
    time.sleep(0.6)
    assert not question.done()
    assert post(address, done=1)["images"] == []
    assert question.result(5) == [1, 0, 0.5, 0.5]
    assert list(human.read_answers(person.file).values()) == [1, 0, 0.5, 0.5]


def test_pictures_and_prompts(address, question):
    """The page is told prompts in the batch's order, and gets the very pixels."""
    state = post(address)
    assert [image["prompt"] for image in state["images"]] == PROMPTS
    for image, sent in zip(state["images"], images(), strict=True):
        found = Image.open(io.BytesIO(get(address + image["key"])))
        assert np.array_equal(found, nft.to_pil(sent))


def test_a_cut_off_line_spoils_no_other(person, address, question):
    """Another process knows all answers of the file, also those before and after a line that was
    cut off, as by a kill."""
    a, b, *_ = keys(address)
    post(address, key=a, r=1)
    with person.file.open("a") as file:
        file.write('\n{"key": "')
    post(address, key=b, r=0)
    other = human.Person()
    other.open(person.file)
    assert other.answers == {a: 1, b: 0}


def test_key_is_of_pixels_and_prompt(person, clicker):
    """Equal pictures with one prompt are one question; another prompt or pixel is another."""
    one, two, *_ = images()
    person.reward(torch.stack([one, one, one, two]), ["sea", "sea", "sky", "sea"], None)
    assert len(set(clicker.seen)) == len(clicker.seen) == 3


def test_an_old_tab_ends_no_new_page(person, address, question, monkeypatch):
    """Done with one page, clicked twice, is not done with the next; nor does a late mark count."""
    old = keys(address)
    post(address, done=1)
    question.result(5)

    def visit(text):
        post(address, key=old[0], r=1)
        assert len(post(address, done=1)["images"]) == 4
        post(address, done=2)

    monkeypatch.setattr(nft, "say", visit)
    person.reward(images(side=8), PROMPTS, None)
    assert list(person.answers.values()) == [0.5] * 8


def test_nobody_else_gets_in(person, address, question):
    """Without the token nothing is served, and nothing taken; with it no file is."""
    (key, *_) = keys(address)
    strange = address.replace(person.server.token, "x" * 22)
    requests = [strange, strange + key, f"{address}../../etc/passwd", address + "0000"]
    for request in [*requests, urllib.request.Request(strange, b"{}")]:
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get(request)


def test_the_page_is_of_this_machine(person, address):
    """The server listens on this machine alone, tokens are long and new, no other site is used."""
    assert person.server.server_address[0] == "127.0.0.1"
    assert len(person.server.token) >= 22
    assert person.server.token != human.Person().server.token
    assert "http" not in get(address).decode()


def test_a_mark_that_the_disk_refuses_does_not_count(person, address, question):
    """Where an answer cannot be kept the page is not told that it was."""
    person.file.mkdir()
    with pytest.raises(OSError):
        post(address, key=keys(address)[0], r=1)
    assert not person.answers


# ---- Runs ----------------------------------------------------------------------------------------
def run(out, status=0, **changes):
    """Run human.py on an untrained pipeline; returns its rows."""
    words = common.command_line("sd15", out=out, **({"reward": None} | changes))
    assert human.main(words) == status
    return common.metrics(out, "seconds")


def test_a_run_trains_on_what_was_clicked(tmp_path, clicker):
    """r of each image is the click itself; with --reward nobody is asked at evaluation, whose
    reward is then that one."""
    rows = run(tmp_path, reward="jpeg")
    # Two iterations of six images.
    expected = torch.tensor([R[judge(key)] for key in clicker.seen]).view(2, 6)
    for row, r in zip(rows[1:], expected, strict=True):
        assert row["reward"] == pytest.approx(r.mean().item())
        assert row["r_std"] == pytest.approx(r.std(correction=0).item())
    assert rows[0]["eval_reward"] == rows[0]["eval_reward/jpeg"] < 0
    assert "eval_reward/human" not in rows[0]
    assert set(human.read_answers(tmp_path / "answers.jsonl")) == set(clicker.seen)


def test_evaluation_asks_without_another_reward(tmp_path, clicker):
    """Without --reward the held-out reward is the person's, before training and at its end."""
    rows = run(tmp_path, iterations=1)
    held_out = len(common.TEXTS)
    assert len(clicker.seen) == 6 + 2 * held_out
    said = [R[judge(key)] for key in clicker.seen[:held_out]]
    assert rows[0]["eval_reward"] == pytest.approx(sum(said) / held_out)


def test_interrupted_and_resumed(tmp_path, clicker):
    """Ctrl-C amid a page ends with 130; --resume asks what is open, and gets to the same end."""
    whole = run(tmp_path / "whole", reward="jpeg")
    # After 12 pictures of the whole run, and 8, two of them of iteration 2.
    clicker.leave = 20
    run(tmp_path / "run", status=130, reward="jpeg")
    clicker.leave = None
    assert human.main([f"--out={tmp_path}/run", "--resume", "--reward=jpeg"]) == 0
    seen = clicker.seen
    # What was left unmarked is open, too.
    assert seen[20:] == [key for key in seen[6:8] if judge(key) is None] + seen[8:12]
    assert common.metrics(tmp_path / "run", "seconds") == whole


def test_as_any_reward(tmp_path, monkeypatch, clicker):
    """`nft.py --reward human` takes the clicks as rewards; answers go to runs/answers.jsonl."""
    monkeypatch.chdir(tmp_path)
    ((_, reward),) = nft.load_rewards("human").values()
    assert reward(images(), PROMPTS, None) == [R[judge(key)] for key in clicker.seen]
    assert set(human.read_answers(human.DEFAULT_FILE)) == set(clicker.seen)


def test_several_processes_are_refused(person, monkeypatch):
    """A person would keep the other processes waiting."""
    monkeypatch.setattr(nft, "WORLD", 2)
    with pytest.raises(RuntimeError, match="use one"):
        person.reward(images(), PROMPTS, None)
