"""A person as the reward: pictures on a page of this machine, and clicks that say good or bad.

    python examples/rewards/human.py --out runs/mine --iterations 5     # r exactly as clicked
    python examples/rewards/human.py --out runs/mine --resume           # asks only what is open
    python examples/rewards/human.py --model sd15 --prompts my.txt --reward aesthetic
    python nft.py --reward human                                        # r normalised, as for any

The run prints the address of a page, http://127.0.0.1:PORT/TOKEN/, and waits there for every batch
of pictures. Click or press g for good (1) and b for bad (0), then Done: what is not
marked counts 1/2. Any --model will do, and no package beyond nft.py's own is needed. If the run is
on another machine: ssh -L PORT:127.0.0.1:PORT THAT-MACHINE.

This file is a main program of its own because nft.py normalises every reward by the prompt's mean
(`optimality_reward`). It takes all of nft.py's flags and changes two things: r is what was clicked;
and nobody is asked at evaluation if there is a --reward, whose unweighted sum is then the held-out
reward. Without one it asks you about all held-out prompts, before training and at every evaluation.
--z plays no part.

Answers are kept in DIR/answers.jsonl of `--out DIR`, a line a click, as soon as it is made; with
`nft.py --reward human`, which does not tell a reward its directory, in runs/answers.jsonl for all
runs. They go by a hash of the picture's 8-bit pixels and its prompt. So a run that is resumed, and
paints the same pictures again, asks only about those without an answer. On a GPU, or with another
--batch-size, a picture may differ in a bit, and is then a new one.

HERO (arXiv 2410.05116) learns a representation from the clicks, scores all pictures by how near
they are to the best one in it, and starts the next pictures from the noise of good ones: it needs
far fewer clicks. Here the clicks are all there is, each is used in one iteration, and nothing is
learned that could be fooled.
SPDX-License-Identifier: MIT
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import secrets
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import nft

# Where answers are kept, if this file is not the main program.
DEFAULT_FILE = Path("runs/answers.jsonl")

PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>nft.py asks</title>
<style>
body { margin: 0; background: #f3f3f0; color: #222; font: 15px/1.4 sans-serif; }
header { position: sticky; top: 0; display: flex; flex-wrap: wrap; gap: 6px 24px;
  align-items: center; padding: 10px 16px; background: white; border-bottom: 1px solid #bbb; }
header p { margin: 0; }
#keys { color: #666; }
#trouble { color: #b00020; font-weight: bold; }
#cards { display: grid; gap: 10px; padding: 12px 16px;
  grid-template-columns: repeat(auto-fill, minmax(var(--width, 150px), 1fr)); }
figure { margin: 0; padding: 6px; background: white; border: 3px solid #ccc; border-radius: 6px; }
figure.current { outline: 3px solid #3b6fd4; }
figure.good { border-color: #1b8a3a; background: #e4f5e8; }
figure.bad { border-color: #c62828; background: #fbe6e6; }
figure img { display: block; width: 100%; }
figure img.small { image-rendering: pixelated; }
figcaption { min-height: 2.8em; margin: 4px 0; overflow-wrap: anywhere; }
button { padding: 4px 12px; font: inherit; cursor: pointer; }
button[aria-pressed=true] { font-weight: bold; }
.good button.good { background: #1b8a3a; color: white; }
.bad button.bad { background: #c62828; color: white; }
</style>
<header>
<p id="progress" role="status">One moment ...</p>
<button id="done" hidden>Done</button>
<p id="keys">g good, b bad, u unmarked, arrows move, Ctrl+Enter done</p>
<p id="trouble" role="alert"></p>
</header>
<main id="cards"></main>
<script>
"use strict";
const find = (id) => document.getElementById(id);
let state = {version: -1, page: 0, images: []};
let current = 0;

async function talk(path, body) {
  const options = {cache: "no-store"};
  if (body) {
    options.method = "POST";
    options.headers = {"Content-Type": "application/json"};
    options.body = JSON.stringify(body);
  }
  try {
    const answer = await fetch(path, options);
    // Another tab was faster.
    if (answer.status === 409) return talk("state");
    if (!answer.ok) throw new Error(answer.status);
    show(await answer.json());
    find("trouble").textContent = "";
  } catch {
    const told = "The run does not answer: it has ended, or is out of reach. ";
    find("trouble").textContent = told + "Marks made until now are kept.";
  }
}

function mark(i, r) {
  const image = state.images[i];
  if (image) talk("mark", {key: image.key, r: r});
}

function go(i) {
  current = Math.max(0, Math.min(i, state.images.length - 1));
  [...find("cards").children].forEach((card, j) => card.classList.toggle("current", j === current));
  find("cards").children[current]?.scrollIntoView({block: "nearest"});
}

function button(i, name, r) {
  const made = document.createElement("button");
  made.className = made.textContent = name;
  made.onclick = () => { go(i); mark(i, state.images[i].r === r ? null : r); };
  return made;
}

function card(image, i) {
  const made = document.createElement("figure");
  const picture = document.createElement("img");
  picture.alt = image.prompt;
  picture.onload = () => {
    picture.classList.toggle("small", picture.naturalWidth < 128);
    const width = Math.max(150, Math.min(picture.naturalWidth, 300));
    find("cards").style.setProperty("--width", width + "px");
  };
  picture.onclick = () => go(i);
  picture.src = image.key + ".png";
  const text = document.createElement("figcaption");
  text.textContent = image.prompt;
  made.append(picture, text, button(i, "good", 1), " ", button(i, "bad", 0));
  return made;
}

function show(next) {
  if (next.version < state.version) return;
  const turned = next.page !== state.page || next.images.length !== state.images.length;
  state = next;
  if (turned) {
    find("cards").replaceChildren(...state.images.map(card));
    go(0);
  }
  state.images.forEach((image, i) => {
    const made = find("cards").children[i];
    made.classList.toggle("good", image.r === 1);
    made.classList.toggle("bad", image.r === 0);
    made.querySelector(".good").ariaPressed = image.r === 1;
    made.querySelector(".bad").ariaPressed = image.r === 0;
  });
  const n = state.images.length;
  const marked = state.images.filter((image) => image.r !== null).length;
  const all = state.answered + " answered in all";
  const here = `Page ${state.page}: ${marked} of ${n} marked, ${all}.`;
  const work = `The run is at work, ${all}. The next pictures come by themselves.`;
  find("progress").textContent = n ? here : work;
  find("done").hidden = !n;
  find("done").textContent = marked < n ? `Done, ${n - marked} unmarked count \\u00bd` : "Done";
  document.title = n ? `(${marked}/${n}) nft.py asks` : "nft.py at work";
}

function done() {
  if (state.images.length) talk("done", {page: state.page});
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
talk("state");
setInterval(() => talk("state"), 1000);
</script>
"""

HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'self' 'unsafe-inline'; frame-ancestors 'none'",
    # Nobody else is told the token.
    "Referrer-Policy": "no-referrer",
}


# ---- Answers -------------------------------------------------------------------------------------
def identify(picture, prompt):
    """The key of a PIL picture with its prompt: the same for the same pixels and text."""
    head = json.dumps([prompt, picture.size])
    return hashlib.sha256(head.encode() + picture.tobytes()).hexdigest()


def read_answers(file):
    """{key: r} of a file of answers; of two lines with one key the later holds.

    A line that is not whole was cut off by the end of its process: its picture is asked anew.
    """
    answers = {}
    if not file.exists():
        return answers
    for line in file.read_text("utf-8", "replace").splitlines():
        try:
            row = json.loads(line)
            answers[row["key"]] = row["r"]
        except (ValueError, TypeError, KeyError):
            continue
    return {key: r for key, r in answers.items() if r in (0, 0.5, 1)}


class Person:
    """Who is asked: the answers until now, and the pictures that wait for one.

    answers: {key: r}. waiting: {key: (prompt, PNG)}, in the page's order; empty while the run is at
    work. page counts the pages, version all changes, so that a browser knows what is newer. The
    lock of `changed` guards all of these: the run and the browser's requests are threads.
    """

    def __init__(self):
        self.changed = threading.Condition()
        self.server = None
        self.file = None
        self.answers = {}
        self.waiting = {}
        self.page = 0
        self.version = 0

    def open(self, file):
        """Keep answers in this file, and know those that it has. Raises OSError."""
        answers = read_answers(file)
        with self.changed:
            self.file = file
            self.answers = answers

    def close(self):
        """End the page, and forget the file."""
        if self.server is not None:
            self.server.shutdown()
            self.server.server_close()
        self.server = None
        self.file = None

    def address(self):
        """Where the page is; it is served from the first question on."""
        if self.server is None:
            self.server = Server(self)
            threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self.server.server_port}/{self.server.token}/"

    def ask(self, pictures, prompts):
        """The r of each PIL picture, once the person has said it: a list in 0, 1/2, 1."""
        keys = []
        waiting = {}
        for picture, prompt in zip(pictures, prompts, strict=True):
            key = identify(picture, prompt)
            keys.append(key)
            if key not in self.answers:
                buffer = io.BytesIO()
                picture.save(buffer, "PNG")
                waiting[key] = (prompt, buffer.getvalue())
        if waiting:
            self.wait(waiting)
        return [self.answers[key] for key in keys]

    def wait(self, waiting):
        """Show these pictures until the person is done with them."""
        with self.changed:
            self.waiting = waiting
            self.page += 1
            self.version += 1
        nft.say(f"pictures that wait for you: {len(waiting)}, at {self.address()}")
        try:
            with self.changed:
                while self.waiting:
                    # Not without an end, which would keep Ctrl-C out on Windows.
                    self.changed.wait(0.5)
        finally:
            # Also after Ctrl-C: nobody should go on clicking.
            with self.changed:
                self.waiting = {}

    def record(self, marks):
        """Keep {key: r or None}; on the disk before it counts. The caller holds the lock."""
        lines = []
        for key, r in marks.items():
            row = {"key": key, "r": r, "prompt": self.waiting[key][0]}
            # It begins with the newline: so a line that was cut off does not spoil the next.
            lines.append("\n" + json.dumps(row))
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as file:
            file.write("".join(lines))
            file.flush()
            os.fsync(file.fileno())
        self.version += 1
        for key, r in marks.items():
            self.answers.pop(key, None)
            if r is not None:
                self.answers[key] = r

    def mark(self, key, r):
        """1 (good), 0 (bad), or None for neither. Returns whether that picture waits."""
        with self.changed:
            if key not in self.waiting or r not in (0, 1, None):
                return False
            self.record({key: r})
            return True

    def finish(self, page):
        """The person is done with a page: unmarked ones count 1/2, and the run goes on.

        Returns whether it was the page that waits: a click in an old tab ends no other.
        """
        with self.changed:
            if not self.waiting or page != self.page:
                return False
            self.record({key: 0.5 for key in self.waiting if key not in self.answers})
            self.waiting = {}
            self.changed.notify_all()
            return True

    def state(self):
        """What a browser shows, for JSON."""
        with self.changed:
            images = []
            for key, (prompt, _) in self.waiting.items():
                images.append({"key": key, "prompt": prompt, "r": self.answers.get(key)})
            return {
                "page": self.page,
                "version": self.version,
                "answered": len(self.answers),
                "images": images,
            }


# ---- The page ------------------------------------------------------------------------------------
class Server(ThreadingHTTPServer):
    """The page of a Person, on a free port of this machine alone, behind a random token."""

    def __init__(self, person):
        super().__init__(("127.0.0.1", 0), Handler)
        self.person = person
        self.token = secrets.token_urlsafe(16)

    def handle_error(self, request, client_address):
        """Tell of a request that failed, such as a mark that the disk did not take."""
        nft.say(f"human.py: the page failed: {sys.exception()!r}")


class Handler(BaseHTTPRequestHandler):
    """Serves GET of the page, its state and its pictures, POST of marks, and nothing else."""

    # Seconds of silence after which a connection is given up.
    timeout = 10

    def log_message(self, *args):
        """Print nothing: the terminal is the run's."""

    def name(self):
        """What follows the token in the address; None where this is not our page.

        A page of another site, whose name leads to this machine, has its own name as the host.
        """
        host = self.headers.get("Host", "").split(":")[0]
        if host not in ("127.0.0.1", "localhost"):
            return None
        ours = f"/{self.server.token}/"
        start = self.path[: len(ours)]
        if not secrets.compare_digest(start.encode(), ours.encode()):
            return None
        return self.path[len(ours) :]

    def answer(self, kind, content):
        """Send 200 with content, bytes of a media type."""
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def answer_state(self):
        """Send the state as JSON."""
        self.answer("application/json", json.dumps(self.server.person.state()).encode())

    def do_GET(self):
        name = self.name()
        waiting = self.server.person.waiting
        if name == "":
            self.answer("text/html; charset=utf-8", PAGE.encode())
        elif name == "state":
            self.answer_state()
        elif name and name.endswith(".png") and name[:-4] in waiting:
            _, content = waiting[name[:-4]]
            self.answer("image/png", content)
        else:
            self.send_error(404)

    def do_POST(self):
        name = self.name()
        if name not in ("mark", "done"):
            self.send_error(404)
            return
        # A form of another site cannot send JSON.
        if self.headers.get_content_type() != "application/json":
            self.send_error(415)
            return
        said = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        person = self.server.person
        if name == "mark":
            known = person.mark(said["key"], said["r"])
        else:
            known = person.finish(said["page"])
        if known:
            self.answer_state()
        else:
            # Another tab was faster: this one shows the new page at its next look.
            self.send_error(409)


# ---- The reward ----------------------------------------------------------------------------------
# Who is asked in this process.
PERSON = Person()


def ask(images, prompts, metadata):
    """1 for each picture that the person calls good, 0 for bad, 1/2 for unmarked: B floats.

    images: (B, 3, H, W) in [0, 1]. prompts: B strings. Waits until the person is done.
    """
    if nft.WORLD > 1:
        raise RuntimeError("a person would keep the other processes waiting: use one")
    if PERSON.file is None:
        PERSON.open(DEFAULT_FILE)
    return PERSON.ask([nft.to_pil(image) for image in images], prompts)


# `--reward human` looks for this name.
reward = ask


# ---- Parts of nft.train, for r exactly as clicked ------------------------------------------------
def weigh(raw, groups, z):
    """r is r_raw: (N,), 0, 1/2 or 1 as clicked, in place of nft.optimality_reward."""
    return raw.float()


def make_model(config):
    """nft.Model; answers are kept in the run's directory from now on."""
    PERSON.open(Path(config.out) / "answers.jsonl")
    return nft.Model(config)


def evaluate(run, rewards, prompts, iteration):
    """nft.evaluate by the other rewards, each of weight 1, or by the person without them."""
    others = {}
    for name, (_, function) in rewards.items():
        if function is not ask:
            others[name] = (1.0, function)
    return nft.evaluate(run, others or rewards, prompts, iteration)


PARTS = {"make_model": make_model, "evaluate": evaluate, "weigh": weigh}


def main(argv=None, **more):
    """Run nft.py's command line with a person as its reward; returns the exit status."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--reward", default="")
    known, rest = parser.parse_known_args(argv)
    rewards = {"human": ask}
    try:
        others = nft.load_rewards(known.reward) if known.reward else {}
    except nft.UserError as error:
        parser.error(str(error))
    for name, (_, function) in others.items():
        rewards[name] = (0.0, function)
    with contextlib.closing(PERSON):
        return nft.main(rest, settings={"reward": rewards}, **(PARTS | more))


if __name__ == "__main__":
    # By its name, so that nft.py's human:ask is this module's and not a second one's.
    import human

    sys.exit(human.main())
