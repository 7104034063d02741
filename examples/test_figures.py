"""figures.py: what its rows change, what it counts, its tables; each test's docstring states a law.

    python -m pytest -q examples/test_figures.py
SPDX-License-Identifier: MIT
"""
import json
import pathlib
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import baselines  # noqa: E402
import figures  # noqa: E402
import nft  # noqa: E402

SMALL = {"device": "cpu", "precision": "fp32", "reward": "jpeg", "groups": 2, "group_size": 3, "steps": 3, "updates": 1,
         "train_times": 5, "rank": 2, "warmup": 0, "eval_every": 2}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """`run` sets the process to one thread: others' tests get back what they had."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_rows():
    """Rows of one name are one run; each can be started, as it is and with --quick, and is evaluated at its end."""
    named = {}
    for rows in figures.FIGURES.values():
        for row in rows:
            assert named.setdefault(row[0], row) == row
            _, method, model, iterations, flags, change = row
            assert change in figures.CHANGES and method in ("nft", *baselines.METHODS)
            argv = [x for k, v in flags.items() for x in ("--" + k.replace("_", "-"), str(v))]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(nft, "Config", baselines.Config)
                nft.parse(["--model", model, "--out", "x", *argv])
            assert iterations % flags["eval_every"] == 0
            assert 4 <= figures.quick(row)[3] < iterations and figures.quick(row)[0] == row[0]


def test_positive_only_lacks_the_negative_branch():
    """Eq. (5) minus positive_only is (1 - r) times the distance of the negative policy, over beta."""
    torch.manual_seed(0)
    theta, old, x_0 = torch.randn(3, 5, 4, 8, 8, dtype=torch.float64)
    r, beta = torch.rand(5, dtype=torch.float64), 0.3
    missing = nft.nft_loss(theta, old, x_0, r, beta) - figures.positive_only(theta, old, x_0, r, beta)
    assert_close(missing, (1 - r) * nft.adaptive_loss(old + beta * (old - theta), x_0) / beta)


@pytest.mark.parametrize(("change", "w"), [("w=1", lambda t: 1), ("w=t", lambda t: t), ("w=1-t", lambda t: 1 - t)])
def test_weighted_is_the_velocity_loss(change, w):
    """A flow's loss is w(t) (r |v+ - v|^2 + (1 - r) |v- - v|^2) / beta, scaled alike at all t; all else stays."""
    torch.manual_seed(1)
    x_0, eps, theta, old, base = torch.randn(5, 6, 4, 8, 8, dtype=torch.float64)
    times, r, beta = torch.tensor([1000.0, 800, 500, 200, 100], dtype=torch.float64), torch.rand(6).double(), 0.7
    t = times[[0, 1, 2, 3, 4, 2]]
    model = SimpleNamespace(
        times=times, prediction="flow_prediction", config=SimpleNamespace(beta=beta, kl=0.1),
        predict=lambda x, t, condition, policy: {"theta": theta, "old": old, None: base}[policy],
        alpha_sigma=lambda t, ndim=1: nft.alpha_sigma((t / 1000).view(-1, *[1] * (ndim - 1))))
    args = model, {"x_0": x_0, "condition": {}}, torch.arange(6), t, eps, r
    before = nft.pair_losses(*args)
    with figures.CHANGES[change]():
        found = nft.pair_losses(*args)
    scale = sum(times.tolist()) / sum(1000 * w(s / 1000) for s in times.tolist())
    for i, s in enumerate((t / 1000).tolist()):
        v = eps[i] - x_0[i]
        positive, negative = (((1 - b) * old[i] + b * theta[i] - v).square().mean() for b in (beta, -beta))
        assert_close(found[0][i], scale * w(s) * (r[i] * positive + (1 - r[i]) * negative) / beta)
    assert_close(found[1:], before[1:])
    assert_close(nft.pair_losses(*args), before)                # and nothing stays patched


@pytest.mark.parametrize(("change", "dtype", "scale"), [("bf16", torch.bfloat16, 1), ("fp16", torch.float16, 1024)])
def test_rounded_is_as_far_from_fp32_as_the_real_precision(change, dtype, scale):
    """Emulated, a loss and its gradient are not fp32's, and lie as far from these as --precision takes them."""
    torch.manual_seed(2)
    eps, r, index, found = torch.randn(4, 4, 8, 8), torch.rand(4), torch.arange(4), []
    for name, precision in (("", "fp32"), ("", change), (change, "fp32")):
        with figures.CHANGES[name]():
            model = nft.Model(nft.parse(["--out", "x", "--device", "cpu", "--precision", precision]))
            assert model.dtype == (dtype if precision == change else torch.float32)
            noise = nft.generator("test")
            for x in model.lora.sets["theta"] + model.lora.sets["old"]:
                x.data += 0.01 * torch.randn(x.shape, generator=noise)
            rollout = nft.collect(model, [], [("a red circle", {}), ("two blue squares", {})] * 2, (0,), "old")[0]
            rollout["x_0"] = found[0][2] if found else rollout["x_0"]
            loss, kl, _ = nft.pair_losses(model, rollout, index, model.times[index], eps, r)
            ((loss + kl).sum() * scale).backward()
            theta = model.lora.sets["theta"]
            assert {x.dtype for x in theta} == {torch.float32}
            found.append((loss.detach(), torch.cat([x.grad.flatten() for x in theta]) / scale, rollout["x_0"]))
    for exact, real, emulated in list(zip(*found))[:2]:
        assert 1 / 3 < (emulated - exact).norm() / (real - exact).norm() < 3


@pytest.mark.parametrize("r", [[0.5, 0.7, 0.5, 0.1], [0.5] * 4, [0.4, 0.6, 0.7, 0.9]])
def test_skipping_leaves_out_what_has_no_direction(r, monkeypatch):
    """Pairs of r = 1/2 are not evaluated and lose their loss, KL and gradient; the others' stay."""
    theta, seen = torch.randn(7, requires_grad=True), []
    def pair_losses(model, rollout, index, t, eps, r):
        seen.extend(index.tolist())
        loss = theta[index] * r + t
        return loss, loss * 2, loss.detach() * 3
    monkeypatch.setattr(nft, "pair_losses", pair_losses)
    model = SimpleNamespace(lora=SimpleNamespace(sets={"theta": [theta]}))
    index, t, r = torch.tensor([6, 2, 0, 3]), torch.arange(4.0), torch.tensor(r)
    useful = r != 0.5
    wish = [x * useful for x in pair_losses(None, None, index, t, None, r)]
    gradient = torch.autograd.grad(wish[0].sum(), theta)[0]
    seen.clear()
    with figures.CHANGES["skip"]():
        found = nft.pair_losses(model, None, index, t, torch.zeros(4, 1), r)
    assert seen == index[useful].tolist()
    assert_close(list(found), wish)
    assert_close(torch.autograd.grad(found[0].sum(), theta)[0], gradient)


@pytest.mark.parametrize("k", [2, 4])
def test_reused_samples_every_kth_iteration(k, monkeypatch):
    """Iterations 1, k + 1, 2 k + 1 ... sample, the others get those images; evaluation is left alone."""
    sampled = []
    def collect(model, rewards, prompts, key, policy):
        sampled.append((policy, key[-1]))
        return policy, key[-1]
    monkeypatch.setattr(nft, "collect", collect)
    with figures.reused(k):
        for i in range(1, 9):
            assert nft.collect(None, None, None, (0, i), "old") == ("old", i - (i - 1) % k)
            assert nft.collect(None, None, None, ("evaluation", i), "ema") == ("ema", i)
    assert [i for policy, i in sampled if policy == "old"] == list(range(1, 9, k))
    assert [i for policy, i in sampled if policy == "ema"] == list(range(1, 9))


def test_costs_leave_out_loading_and_evaluation(monkeypatch):
    """Seconds and network evaluations are 0 before training, then those of sampling and training alone; the next run
    of the process, resumed, goes on."""
    clock, solvers = [1000.0], []
    def spend(seconds):
        clock[0] += seconds
    def evaluate(model, run, rewards, prompts, iteration):
        solvers.append(model.pipe.scheduler)
        nft.collect(model, rewards, prompts, ("evaluation",), "ema")
        spend(70)
    monkeypatch.setattr(time, "process_time", lambda: clock[0])
    monkeypatch.setattr(nft, "collect", lambda model, *args: (spend(3), model.net(torch.zeros(5, 2))))
    monkeypatch.setattr(nft, "evaluate", evaluate)
    monkeypatch.setattr(nft.Run, "log", lambda run, row: run.rows.append(row))
    monkeypatch.setattr(nft, "pick_solver", lambda name, own, flow: name)
    class Net(torch.nn.Module):
        def forward(self, x):
            return (x,)
    model = SimpleNamespace(pipe=SimpleNamespace(scheduler=SimpleNamespace(config={})), alphas_cumprod=None, net=Net())
    run, own = SimpleNamespace(rows=[]), model.pipe.scheduler
    def train(iterations):
        with figures.measured("dpm2"):
            spend(500)                                                      # loading
            if not run.rows:
                nft.evaluate(model, run, None, None, 0)
                nft.Run.log(run, {"iteration": 0})
            for i in iterations:
                nft.collect(model, None, None, (0, i), "old")
                spend(10)
                if i % 2 == 0:
                    nft.evaluate(model, run, None, None, i)
                nft.Run.log(run, {"iteration": i})
    train([1, 2])
    train([3, 4])
    assert [row["cpu"] for row in run.rows] == [0, 13, 26, 39, 52]
    assert [row["evaluations"] for row in run.rows] == [0, 5, 10, 15, 20]
    assert solvers == ["dpm2"] * 3 and model.pipe.scheduler is own


@pytest.mark.parametrize(("kl", "change", "sampled"), [(0.1, "", [0, 12, 18]), (0, "reused-2", [0, 6, 12])])
def test_run(kl, change, sampled, tmp_path, monkeypatch):
    """A row's run goes on where it was cut off, is not repeated, and its evaluations are those that a hook counts."""
    spent, counted, log, losses = [0], [], nft.Run.log, nft.pair_losses
    def counting(f):
        def call(model, *args):
            count, result = baselines.Count(model), f(model, *args)
            spent[0] += count.n if f is losses or args[-1] == "old" else 0    # not evaluation
            return result
        return call
    monkeypatch.setattr(nft, "collect", counting(nft.collect))
    monkeypatch.setattr(nft, "pair_losses", counting(losses))
    monkeypatch.setattr(nft.Run, "log", lambda run, row: (log(run, row), counted.append(spent[0])))
    few, folder = tmp_path / "few.txt", tmp_path / "row-0"
    few.write_text("a red circle\ntwo blue squares\n")
    folder.mkdir()
    (folder / "config.json").write_text("{}")                               # killed before its first checkpoint
    flags = SMALL | {"kl": kl, "eval_prompts": few}
    rows = [("row", "nft", "tiny", iterations, flags, change) for iterations in (2, 3)]
    assert figures.points(rows[1], folder) == []
    assert figures.run(rows[0], folder, 0) == 0 and figures.points(rows[1], folder) == []
    cpu = [row["cpu"] for row in figures.read(folder)]
    assert figures.run(rows[1], folder, 0) == 0
    found = figures.points(rows[1], folder)
    assert [point["images"] for point in found] == sampled
    assert [point["evaluations"] for point in found] == [counted[i] for i in (0, 2, 3)]
    more = [row["cpu"] for row in figures.read(folder)]
    assert len(more) == 4 and more[:3] == cpu and 0 == more[0] < more[1] < more[2] < more[3]
    monkeypatch.setattr(nft, "main", None)
    assert figures.run(rows[1], folder, 0) == 0


def test_first_crossing():
    """A target is reached where the line between two evaluations first crosses it, whatever comes after."""
    run = [{"images": n, "accuracy": a} for n, a in ((0, 0.3), (100, 0.4), (200, 0.6), (300, 0.45), (400, 0.7))]
    assert figures.reach(run, "images", 0.5) == ("", pytest.approx(150))
    assert figures.reach(run, "images", 0.7) == ("", pytest.approx(400))
    assert figures.reach(run, "images", 0.71) == (">", 400)
    assert figures.reach(run[1:], "images", 0.3) == ("", 100)               # there from the start


def test_spread_and_bounds():
    """Median and range over seeds; a number is marked as a bound just where a bound may change it."""
    ratio, spread = figures.ratio, figures.spread
    assert ratio(("", 300), ("", 100)) == ("", 3) and ratio((">", 400), ("", 100)) == (">", 4)
    assert ratio(("", 300), (">", 600)) == ("<", 0.5) and ratio((">", 300), (">", 100)) is None
    assert spread([("", 3), ("", 1), ("", 2)]) == "2 (1 to 3)" and spread([("", 1234.5)]) == "1,234"
    assert spread([("", 2), (">", 5), ("", 3)]) == "3 (2 to >5)"
    assert spread([("", 2), (">", 1), ("", 3)]) == ">2 (>1 to >3)"
    assert spread([("", 2), ("<", 5), ("", 3)]) == "<3 (<2 to <5)"
    assert spread([(">", 5)] * 3) == ">5" and spread([None]) == "unknown"
    assert spread([None, ("", 2), ("", 4)]) == "2 (2 to 4) 2 of 3 seeds"


def test_report(tmp_path, capsys):
    """Tables and plots come from finished runs alone; a method that never reaches a target has bounds throughout."""
    pytest.importorskip("matplotlib")
    from PIL import Image
    rows = figures.FIGURES["tiny"][:2]
    for row in rows:
        for seed in (0, 1, 2)[:2 if row[1] == "nft" else 3]:
            (samples := tmp_path / f"{row[0]}-{seed}/samples").mkdir(parents=True)
            Image.new("RGB", (80, 40)).save(samples / f"{row[3]:06d}.png")
            (samples.parent / "config.json").write_text(json.dumps(vars(nft.parse(["--out", "x"]))))
            slope, last = 0.1 / (2 if row[1] == "nft" else 8), row[3] - 2 * (row[1] == "ddpo" and seed == 1)
            (samples.parent / "metrics.jsonl").write_text("".join(json.dumps(
                {"iteration": i, "images": 192 * i, "evaluations": 1000 * i, "cpu": i * (seed + 1), "roughness": 1,
                 "eval_reward": 0.3 + slope * i}) + "\n" for i in range(0, last + 1, 2)))
    figures.report({"tiny": rows}, [0, 1, 2], tmp_path)
    text = capsys.readouterr().out
    assert text.strip() == (tmp_path / "tables.md").read_text().strip()
    end = "| 768 | 4,000 | 4 (4 to 8) | 1,536 | 8,000 | 8 (8 to 16) |"
    assert any(line.startswith("| NFT |") and line.endswith(end) for line in text.splitlines())
    ddpo, over = (line for line in text.splitlines() if line.startswith("| DDPO"))
    assert ddpo.endswith("| 3,072 | 16,000 | 16 (16 to 48) | >4,608 | >24,000 | >24 (>24 to >72) |")   # 1 is unfinished
    assert over.endswith("| 4 | 4 | 4 | >3 | >3 | >3 |")                                       # 2 has no NFT
    assert {"comparison.png", "grids-tiny.png"} <= {file.name for file in tmp_path.glob("*.png")}


@pytest.mark.parametrize("missing, flags, says", [(["matplotlib"], [], "pip install matplotlib"),
                                                  ([], ["--figures", "tiny,none"], "--figures none")])
def test_refusals(monkeypatch, capsys, missing, flags, says):
    """No matplotlib, or a figure that is not there: one clear line before anything is run."""
    monkeypatch.setattr(figures.importlib.util, "find_spec", lambda name: name not in missing)
    monkeypatch.setattr(figures, "run_all", lambda *_: pytest.fail("it ran"))
    monkeypatch.setattr(sys, "argv", ["figures.py", *flags])
    with pytest.raises(SystemExit) as stopped:
        figures.main()
    assert stopped.value.code == 2 and says in capsys.readouterr().err.splitlines()[-1]


def test_every_row_is_evaluated_by_the_same_solver():
    """dpm2 is the ODE solver also where the rollouts' scheduler, whose settings it takes, is its SDE sibling."""
    from diffusers import DDIMScheduler
    sde = nft.pick_solver("dpm2-sde", DDIMScheduler().config, False)
    kinds = [nft.pick_solver(name, sde.config, False).config.algorithm_type for name in ("dpm2", "dpm2-sde")]
    assert kinds == ["dpmsolver++", "sde-dpmsolver++"]
