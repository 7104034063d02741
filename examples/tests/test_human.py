"""What a person clicks is what a run trains on, nothing that was clicked is lost, and nobody else
gets in.

    pip install playwright            # and a chromium or Chrome of the system
    python -m pytest examples/tests/test_human.py

The tests of the page itself need a browser, and are skipped where there is none. The others talk to
its server as the page does. Each test's docstring states a law.
SPDX-License-Identifier: MIT
"""

import contextlib
import functools
import http.client
import io
import json
import os
import shutil
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
import shapes
import torch
from PIL import Image

import nft

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
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
    "no slash": ("http://127.0.0.1:{port}/{token}", None, {}, 404),
    "a file": ("../../../../etc/passwd", None, {}, 404),
    "the answers": ("answers.jsonl", None, {}, 404),
    "an unknown picture": ("0000.png", None, {}, 404),
    "a query": ("state?all", None, {}, 404),
    "another site's name": ("state", None, {"Host": "evil.example"}, 404),
    "another site, to mark": ("mark", {"key": "{key}", "r": 1}, {"Host": "evil.example"}, 404),
    "another action": ("stop", {"page": 1}, {}, 404),
    "a form": ("mark", b"key=1", {"Content-Type": "text/plain"}, 415),
    "no JSON": ("mark", b"{", {}, 400),
    "deep JSON": ("mark", b"[" * 900, {}, 400),
    "a list": ("mark", [1], {}, 400),
    "true": ("mark", {"key": "{key}", "r": True}, {}, 400),
    "two": ("mark", {"key": "{key}", "r": 2}, {}, 400),
    "a half": ("mark", {"key": "{key}", "r": 0.5}, {}, 400),
    "a list as the key": ("mark", {"key": [], "r": 1}, {}, 400),
    "more": ("mark", {"key": "{key}", "r": 1, "x": 1}, {}, 400),
    "a text as the page": ("done", {"page": "1"}, {}, 400),
    "too long": ("mark", b" " * 1001, {}, 413),
    "a length of many digits": ("mark", b"{}", {"Content-Length": "9" * 5000}, 413),
    "a negative length": ("mark", b"{}", {"Content-Length": "-1"}, 411),
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


@pytest.mark.parametrize("method", ("PUT", "DELETE", "OPTIONS", "HEAD", "PATCH"))
def test_other_methods_are_refused(person, method):
    """Only GET and POST are known."""
    asked(person)
    connection = http.client.HTTPConnection("127.0.0.1", person.server.server_port, timeout=5)
    connection.request(method, f"/{person.server.token}/state")
    assert connection.getresponse().status == 501
    connection.close()


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
    assert "default-src 'none'" in policy
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
    assert human.main(["--reward=nonsense"]) == 2
    assert "nonsense" in capsys.readouterr().err
    monkeypatch.setattr(nft, "WORLD", 2)
    with pytest.raises(RuntimeError, match="use one"):
        human.ask(torch.zeros(1, 3, 8, 8), ["sea"], [{}])


# ---- The page in a browser -----------------------------------------------------------------------
@pytest.fixture(scope="module")
def browser():
    """A headless chromium of the system, or skip."""
    playwright = pytest.importorskip("playwright.sync_api")
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip("no chromium or Chrome on this machine")
    with playwright.sync_playwright() as play:
        opened = play.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()


def classes(page):
    """good, bad or none, of each picture as the page shows it."""
    found = page.eval_on_selector_all("figure", "all => all.map(x => x.className)")
    return [" ".join(sorted(set(names.split()) & {"good", "bad"})) or "none" for names in found]


def wait_in(page, condition):
    """As `until`, but the browser goes on meanwhile."""
    until(lambda: condition() or page.wait_for_timeout(20))


def expect(page, marks):
    """Wait until the page shows these marks."""
    wait_in(page, lambda: classes(page) == marks.split())


def test_page_in_a_browser(person, browser):
    """Clicks and keys mark; a reload, a second tab and a closed browser show the same; prompts are
    text, whatever they contain; done goes on with just these marks."""
    question, _ = asked(person)
    errors = []
    context = browser.new_context()
    page = context.new_page()
    page.on("pageerror", lambda error: errors.append(error))
    page.goto(person.address())
    page.wait_for_selector("figure")
    assert page.eval_on_selector_all("figcaption", "all => all.map(x => x.textContent)") == PROMPTS
    assert page.eval_on_selector_all("img", "all => all.every(x => x.naturalWidth === 16)")
    page.locator("figure >> nth=0 >> button.good").click()
    page.locator("figure >> nth=1 >> button.bad").click()
    expect(page, "good bad none none")
    assert "2 of 4 marked" in page.inner_text("#progress")
    # The same button again takes the mark back.
    page.locator("figure >> nth=1 >> button.bad").click()
    expect(page, "good none none none")
    # The keys go on from picture to picture.
    for key in ("b", "g", "b"):
        page.keyboard.press(key)
    expect(page, "good bad good bad")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("u")
    expect(page, "good bad none bad")
    page.reload()
    expect(page, "good bad none bad")
    second = context.new_page()
    second.goto(person.address())
    expect(second, "good bad none bad")
    second.locator("figure >> nth=3 >> button.good").click()
    expect(page, "good bad none good")
    # Closing the browser loses nothing.
    context.close()
    third = browser.new_page()
    third.goto(person.address())
    expect(third, "good bad none good")
    assert "1 unmarked" in third.inner_text("#done")
    third.click("#done")
    assert question.answer() == [1, 0, 0.5, 1]
    expect(third, "")
    # The next page comes by itself; and Ctrl+Enter is done, too.
    question, _ = asked(person, pictures(side=8))
    expect(third, "none none none none")
    third.keyboard.press("g")
    expect(third, "good none none none")
    third.keyboard.press("Control+Enter")
    assert question.answer() == [1, 0.5, 0.5, 0.5]
    person.close()
    wait_in(third, lambda: third.inner_text("#trouble"))
    assert errors == []
    third.close()


@functools.cache
def few_prompts(n=64):
    """A file of n held-out prompts of tiny, of all categories."""
    lines = (common.EXAMPLES / "tiny/heldout.txt").read_text().splitlines()
    file = common.root() / "few.txt"
    file.write_text("\n".join(lines[:: len(lines) // n]))
    return file


def verdicts(page):
    """What the exact checker says of the pictures as the browser got them: [bool]."""
    said = page.eval_on_selector_all(
        "figure", "all => all.map(x => [x.querySelector('img').src, x.innerText.split('\\n')[0]])"
    )
    images = []
    prompts = []
    for source, prompt in said:
        with urllib.request.urlopen(source, timeout=5) as reply:
            pixels = np.array(Image.open(io.BytesIO(reply.read())))
        images.append(torch.from_numpy(pixels).permute(2, 0, 1) / 255)
        prompts.append(prompt)
    return shapes.check(torch.stack(images), prompts)


def press_all(page, n):
    """Mark the n pictures of the page that is due by its keys, and click Done."""
    wait_in(page, lambda: len(classes(page)) == n)
    for right in verdicts(page):
        page.keyboard.press("g" if right else "b")
    wait_in(page, lambda: "none" not in classes(page))
    page.click("#done")
    wait_in(page, lambda: not human.PERSON.waiting)


def test_a_person_teaches(browser, tmp_path):
    """Whoever presses g where the exact checker accepts, and b elsewhere, in a real browser, raises
    the held-out accuracy of tiny."""
    words = common.flags(
        out=tmp_path / "run",
        reward=common.EXAMPLES / "tiny/shapes.py:reward",
        eval_prompts=few_prompts(),
        iterations=2,
        eval_every=2,
        lr=4e-3,
        ema=0.5,
    )
    work = threading.Thread(target=human.main, args=[words], daemon=True)
    work.start()
    page = browser.new_page()
    while work.is_alive():
        # The run's own work takes its time.
        time.sleep(0.05)
        if human.PERSON.waiting and human.PERSON.server:
            if page.url == "about:blank":
                page.goto(human.PERSON.address())
            press_all(page, len(human.PERSON.waiting))
    page.close()
    rows = common.metrics(tmp_path / "run")
    accuracy = [row["eval_reward"] for row in rows if "eval_reward" in row]
    print("held-out accuracy", accuracy, "reward", [row["reward"] for row in rows[1:]])
    assert accuracy[-1] > accuracy[0] + 0.1
