"""A person as the reward: pictures on a page of this machine, and clicks that say good or bad.

    python examples/rewards/human.py --out runs/mine --iterations 5     # r exactly as clicked
    python examples/rewards/human.py --out runs/mine --resume           # asks only what is open
    python examples/rewards/human.py --model sd15 --prompts my.txt --reward aesthetic
    python nft.py --reward human                                        # r normalised, as for any

The run prints the address of a page, http://127.0.0.1:PORT/TOKEN/, and waits there for every batch
of pictures. Click or press g for good (1) and b for bad (0), then Done: what is not marked counts
1/2. The page is served to this machine alone, and to nobody who does not know the random token.
If the run is on another machine: ssh -L PORT:127.0.0.1:PORT THAT-MACHINE.

This file is a main program of its own because nft.py normalises every reward by the prompt's mean
(`optimality_reward`). It takes all of nft.py's flags and changes two things: r is what was clicked,
so --z plays no part; and --reward is only what the held-out pictures are scored by. Without one it
asks you about all held-out prompts, before training and at every evaluation.

Answers are kept in DIR/answers.jsonl of `--out DIR`, a line a click, as soon as it is made; with
`nft.py --reward human`, which does not tell a reward its directory, in runs/answers.jsonl for all
runs. They go by a hash of the picture's 8-bit pixels and its prompt. So a run that is resumed, and
paints the same pictures again, asks only about those without an answer. On a GPU, or with another
--batch-size, a picture may differ in a bit, and is then a new one.
SPDX-License-Identifier: MIT
"""

import argparse
import hashlib
import io
import json
import secrets
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import nft

# Where answers are kept with `nft.py --reward human`.
DEFAULT_FILE = Path("runs/answers.jsonl")

PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<title>nft.py asks</title>
<style>
body { margin: 0; background: #f3f3f0; font: 15px/1.4 sans-serif; }
header { position: sticky; top: 0; padding: 10px 16px; background: white; }
header p { display: inline; margin-right: 20px; }
#trouble { color: #b00020; font-weight: bold; }
#cards { display: flex; flex-wrap: wrap; gap: 10px; padding: 12px 16px; }
figure { width: min-content; margin: 0; padding: 6px; background: white; border: 3px solid #ccc; }
figure.current { outline: 3px solid #3b6fd4; }
figure.good { border-color: #1b8a3a; background: #e4f5e8; }
figure.bad { border-color: #c62828; background: #fbe6e6; }
img { display: block; min-width: 150px; max-width: 300px; }
img.small { image-rendering: pixelated; }
figcaption { margin: 4px 0; overflow-wrap: anywhere; }
.good button.good { background: #1b8a3a; color: white; }
.bad button.bad { background: #c62828; color: white; }
</style>
<header>
<p id="progress">One moment ...</p>
<p><button id="done" hidden>Done</button></p>
<p>g good, b bad, u unmarked, arrows move, Ctrl+Enter done</p>
<p id="trouble"></p>
</header>
<main id="cards"></main>
<script>
"use strict";
const find = (id) => document.getElementById(id);
const cards = find("cards");
let state = {page: 0, answered: 0, images: []};
let current = 0;

// Whatever is said, the answer is the state as it is then.
async function talk(said) {
  try {
    const answer = await fetch("", {method: "POST", body: JSON.stringify(said)});
    show(await answer.json());
    find("trouble").textContent = "";
  } catch {
    find("trouble").textContent = "The run does not answer. Marks made until now are kept.";
  }
}

function mark(i, r) {
  if (i < state.images.length) talk({key: state.images[i].key, r: r});
}

function done() {
  talk({done: state.page});
}

function go(i) {
  current = Math.max(0, Math.min(i, state.images.length - 1));
  [...cards.children].forEach((card, j) => card.classList.toggle("current", j === current));
  cards.children[current]?.scrollIntoView({block: "nearest"});
}

function button(i, name, r) {
  const made = document.createElement("button");
  made.className = made.textContent = name;
  // A second click takes the mark back.
  made.onclick = () => { go(i); mark(i, state.images[i].r === r ? null : r); };
  return made;
}

function card(image, i) {
  const picture = document.createElement("img");
  picture.onload = () => picture.classList.toggle("small", picture.naturalWidth < 128);
  picture.onclick = () => go(i);
  picture.src = image.key;
  const text = document.createElement("figcaption");
  text.textContent = image.prompt;
  const made = document.createElement("figure");
  made.append(picture, text, button(i, "good", 1), " ", button(i, "bad", 0));
  return made;
}

function show(next) {
  const turned = next.page !== state.page || next.images.length !== state.images.length;
  state = next;
  if (turned) {
    cards.replaceChildren(...state.images.map(card));
    go(0);
  }
  state.images.forEach((image, i) => {
    cards.children[i].classList.toggle("good", image.r === 1);
    cards.children[i].classList.toggle("bad", image.r === 0);
  });
  const n = state.images.length;
  const marked = state.images.filter((image) => image.r !== null).length;
  const here = n ? `Page ${state.page}: ${marked} of ${n} marked` : "The run is at work";
  find("progress").textContent = `${here}, ${state.answered} answered in all.`;
  find("done").hidden = !n;
  find("done").textContent = marked < n ? `Done, ${n - marked} unmarked count 1/2` : "Done";
  document.title = n ? `(${marked}/${n}) nft.py asks` : "nft.py at work";
}

find("done").onclick = done;
document.onkeydown = (event) => {
  if (event.ctrlKey && event.key === "Enter") done();
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  const marks = {g: 1, b: 0, u: null};
  const moves = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1};
  if (event.key in marks) { mark(current, marks[event.key]); go(current + 1); }
  if (event.key in moves) { event.preventDefault(); go(current + moves[event.key]); }
};
talk({});
setInterval(() => talk({}), 1000);
</script>
"""


# ---- Answers -------------------------------------------------------------------------------------
def identify(picture, prompt):
    """The key of a PIL picture with its prompt: the same for the same pixels and text."""
    head = json.dumps([prompt, picture.size])
    return hashlib.sha256(head.encode() + picture.tobytes()).hexdigest()


def read_answers(file):
    """{key: r} of a file of answers; of two lines with one key the later holds."""
    answers = {}
    if file.exists():
        for line in file.read_text("utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                # Cut off by the end of its process: the picture is asked anew.
                continue
            answers[row["key"]] = row["r"]
    return {key: r for key, r in answers.items() if r is not None}


class Person:
    """Who is asked: the answers until now, the pictures that wait for one, and the page.

    answers: {key: r}. waiting: {key: (prompt, PNG)}, in the page's order; empty while the run is at
    work. The run and the browser's requests are threads; the lock guards all that they change.
    """

    def __init__(self):
        self.lock = threading.Lock()
        self.finished = threading.Event()
        self.waiting = {}
        # The number of the page that waits, or of the last one.
        self.page = 0
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.person = self
        self.server.token = secrets.token_urlsafe(16)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def open(self, file):
        """Keep answers in this file, and know those that it has."""
        self.file = file
        self.answers = read_answers(file)

    def reward(self, images, prompts, metadata):
        """1 for each picture that the person calls good, 0 for bad, 1/2 for unmarked: B numbers.

        images: (B, 3, H, W) in [0, 1]. prompts: B strings. Waits until the person is done with
        those that have no answer.
        """
        if nft.WORLD > 1:
            raise RuntimeError("a person would keep the other processes waiting: use one")
        keys = []
        waiting = {}
        for image, prompt in zip(images, prompts, strict=True):
            picture = nft.to_pil(image)
            key = identify(picture, prompt)
            keys.append(key)
            if key not in self.answers:
                buffer = io.BytesIO()
                picture.save(buffer, "PNG")
                waiting[key] = (prompt, buffer.getvalue())
        if waiting:
            self.ask(waiting)
        return [self.answers[key] for key in keys]

    def ask(self, waiting):
        """Show these pictures until the person is done with them."""
        self.finished.clear()
        with self.lock:
            self.waiting = waiting
            self.page += 1
        address = f"http://127.0.0.1:{self.server.server_port}/{self.server.token}/"
        nft.say(f"pictures that wait for you: {len(waiting)}, at {address}")
        # Not without an end, which would keep Ctrl-C out on Windows.
        while not self.finished.wait(0.5):
            pass

    def record(self, key, r):
        """Keep an answer, or take it back if r is None; in the file before it counts."""
        row = {"key": key, "r": r, "prompt": self.waiting[key][0]}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as file:
            # The newline comes first: so a line that was cut off does not spoil the next.
            file.write("\n" + json.dumps(row))
        self.answers.pop(key, None)
        if r is not None:
            self.answers[key] = r

    def mark(self, key, r):
        """1 (good), 0 (bad), or None for neither; nothing if that picture does not wait."""
        if key in self.waiting:
            self.record(key, r)

    def finish(self, page):
        """Count what is unmarked 1/2, and go on; nothing if another page waits, as for an old tab
        or a second click."""
        if self.waiting and page == self.page:
            for key in self.waiting:
                if key not in self.answers:
                    self.record(key, 0.5)
            self.waiting = {}
            self.finished.set()

    def state(self):
        """What a browser shows, for JSON."""
        images = []
        for key, (prompt, _) in self.waiting.items():
            images.append({"key": key, "prompt": prompt, "r": self.answers.get(key)})
        return {"page": self.page, "answered": len(self.answers), "images": images}


class Handler(BaseHTTPRequestHandler):
    """Serves the page and its pictures to GET, and what a person does to POST, behind the token."""

    def log_message(self, *args):
        """Print nothing: the terminal is the run's."""

    def answer(self, kind, content):
        """Send 200 with content, bytes of a media type."""
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        home = f"/{self.server.token}/"
        name = self.path.removeprefix(home)
        waiting = self.server.person.waiting
        if self.path == home:
            self.answer("text/html; charset=utf-8", PAGE.encode())
        elif self.path.startswith(home) and name in waiting:
            self.answer("image/png", waiting[name][1])
        else:
            self.send_error(404)

    def do_POST(self):
        """{"key": of a picture, "r": its mark}, {"done": page} or {}; answers with the state."""
        if self.path != f"/{self.server.token}/":
            self.send_error(404)
            return
        said = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        person = self.server.person
        with person.lock:
            if "key" in said:
                person.mark(said["key"], said["r"])
            if "done" in said:
                person.finish(said["done"])
            state = person.state()
        self.answer("application/json", json.dumps(state).encode())


# ---- The reward ----------------------------------------------------------------------------------
def reward():
    """For `nft.py --reward human`, which normalises it as any reward."""
    person = Person()
    person.open(DEFAULT_FILE)
    return person.reward


def weigh(raw, groups, z):
    """r is r_raw: (N,), 0, 1/2 or 1 as clicked, in place of nft.optimality_reward."""
    return raw


def main(argv=None):
    """Run nft.py's command line with a person as its reward; returns the exit status."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--reward")
    known, rest = parser.parse_known_args(argv)
    try:
        others = nft.load_rewards(known.reward) if known.reward else {}
    except nft.UserError as error:
        parser.error(str(error))
    person = Person()
    rewards = {"human": (1.0, person.reward)}
    # With a weight of 0 they check the prompts, and train nothing.
    for name, (_, function) in others.items():
        rewards[name] = (0.0, function)

    def make_model(config):
        # The first part that is told the run's directory.
        person.open(Path(config.out) / "answers.jsonl")
        return nft.Model(config)

    def evaluate(run, rewards, prompts, iteration):
        return nft.evaluate(run, others or rewards, prompts, iteration)

    parts = {"make_model": make_model, "weigh": weigh, "evaluate": evaluate}
    return nft.main(rest, settings={"reward": rewards}, **parts)


if __name__ == "__main__":
    sys.exit(main())
