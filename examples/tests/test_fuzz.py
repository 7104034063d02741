"""Any input at all: each law holds for whatever hypothesis thinks of, or the input is refused.

    python -m pytest examples/tests/test_fuzz.py

SPDX-License-Identifier: MIT
"""

import contextlib
import io
import json
import math
import re
import sys

import common
import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

import nft

FUZZ = settings(
    max_examples=150,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
FIELDS = nft.Config.__dataclass_fields__
SETTINGS = st.sampled_from(sorted(FIELDS))


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """Rewards are found in a directory of our own, and sys.path comes back."""
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.chdir(common.root())


# ---- The method --------------------------------------------------------------------------------
REWARD = st.floats(-1e300, 1e300) | st.floats(-1, 1, width=32) | st.sampled_from([0.0, 1.0])
GROUP = st.integers(-(2**63), 2**63 - 1) | st.integers(0, 2)
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


@FUZZ
@given(
    pairs=st.lists(st.tuples(REWARD, GROUP), min_size=1, max_size=12),
    z=st.floats(1e-9, 1e9),
    rng=st.randoms(use_true_random=False),
)
def test_any_rewards(pairs, z, rng):
    """r lies in [0, 1], averages 1/2 in a group where nothing is clipped, rises with the reward.

    And it does not depend on the order of the images.
    """
    raw = torch.tensor([reward for reward, _ in pairs], dtype=torch.float64)
    groups = torch.tensor([group for _, group in pairs])
    r = nft.optimality_reward(raw.tolist(), groups.tolist(), z)
    assert r.shape == raw.shape
    assert r.dtype == torch.float32
    assert ((r >= 0) & (r <= 1)).all()

    spread = z * (raw.std(correction=0) + 1e-4)
    rounding = 1e-6 + 1e-15 * len(raw) * raw.abs().max() / spread
    order = rng.sample(range(len(raw)), len(raw))
    reordered = nft.optimality_reward(raw[order], groups[order], z)
    assert ((reordered - r[order]).abs() <= rounding).all()

    for group in groups.unique():
        members = groups == group
        by_reward = r[members][raw[members].argsort()]
        assert (by_reward.diff() >= 0).all()
        if ((by_reward > 0) & (by_reward < 1)).all():
            assert abs(by_reward.double().mean() - 0.5) <= rounding


@FUZZ
@given(value=FINITE, n=st.integers(1, 50))
def test_equal_rewards_teach_nothing(value, n):
    """However many images have the same reward, whatever it is: r is 1/2, exactly."""
    r = nft.optimality_reward([value] * n, [7] * n)
    assert (r == 0.5).all()


@FUZZ
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 5)),
    beta=st.floats(1e-3, 10),
    r=st.floats(0, 1),
    data=st.data(),
)
def test_any_loss(shape, beta, r, data):
    """Finite, not negative, and (r L+ + (1 - r) L-) / beta for any samples and any r in [0, 1]."""
    size = math.prod(shape)
    numbers = st.lists(st.floats(-1e12, 1e12), min_size=size, max_size=size)

    def draw():
        return torch.tensor(data.draw(numbers), dtype=torch.float64).view(shape)

    def branch(x):
        error = x - x_0
        return error.square().mean(1) / error.abs().mean(1).clamp_min(1e-5)

    def loss(share):
        of_each = torch.full(shape[:1], share, dtype=torch.float64)
        return nft.nft_loss(theta, old, x_0, of_each, beta)

    theta, old, x_0 = draw(), draw(), draw()
    positive = branch((1 - beta) * old + beta * theta)
    negative = branch((1 + beta) * old - beta * theta)
    value = loss(r)
    assert value.shape == shape[:1]
    assert value.isfinite().all()
    assert (value >= 0).all()
    expected = (r * positive + (1 - r) * negative) / beta
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
    affine = r * loss(1.0) + (1 - r) * loss(0.0)
    torch.testing.assert_close(value, affine, rtol=1e-9, atol=1e-9)


START = st.integers(-9, 99) | st.floats()
SLOPE = st.sampled_from([-1, -0.01, 0.001, 1])
THREE = st.tuples(START, SLOPE, st.floats(0, 1)) | st.tuples(*[st.floats()] * 3)
SCHEDULE = (
    st.text("0123456789.,-e")
    | st.text()
    | st.floats()
    | THREE.map(lambda numbers: ",".join(str(number) for number in numbers))
)


@FUZZ
@given(schedule=SCHEDULE)
def test_any_eta(schedule):
    """eta lies in [0, 1] and never falls, or the schedule is refused with ValueError."""
    try:
        etas = [nft.soft_update_decay(i, schedule) for i in (1, 2, 3, 10, 99, 1000, 10**6)]
    except ValueError:
        return
    assert etas == sorted(etas)
    assert etas[0] >= 0
    assert etas[-1] <= 1


# ---- Files and flags ---------------------------------------------------------------------------
def containers(values):
    """Lists and dicts of JSON values, some of the dicts with a prompt."""
    keys = st.text(max_size=4) | st.just("prompt")
    return st.lists(values, max_size=3) | st.dictionaries(keys, values, max_size=3)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
JSON = st.recursive(SCALARS, containers, max_leaves=6)
PROMPT_ROWS = st.dictionaries(st.just("prompt"), st.text() | JSON, min_size=1)
JSON_LINES = st.lists((JSON | PROMPT_ROWS).map(json.dumps)).map("\n".join)
CONTENT = st.binary() | (st.text() | JSON_LINES).map(str.encode)
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@FUZZ
@given(
    kind=st.sampled_from(["txt", "jsonl"]),
    content=CONTENT,
    mark=st.sampled_from([b"", BYTE_ORDER_MARK]),
)
def test_any_prompts_file(tmp_path, kind, content, mark):
    """Any file gives stripped text that can be encoded, with a dict each, or is refused."""
    file = tmp_path / f"any.{kind}"
    file.write_bytes(mark + content)
    try:
        prompts = nft.load_prompts(str(file), "--prompts")
    except nft.UserError as error:
        assert str(error).startswith(f"--prompts {file}")
        assert "; " in str(error)
        return
    assert prompts
    for prompt, metadata in prompts:
        assert isinstance(metadata, dict)
        assert prompt.encode()
        assert prompt == prompt.strip()
    if kind == "txt":
        lines = re.split("\r\n|\n|\r", (mark + content).decode("utf-8-sig"))
        stripped = [line.strip() for line in lines]
        assert [prompt for prompt, _ in prompts] == [line for line in stripped if line]


REWARD_WORDS = ["jpeg", "reward.py", "reward", ":", ":red", "=", ",", "1", "0.5", "-", "nan"]
REWARD_WORDS += ["1e999", " ", "\0", "/", "."]
REWARD_SPEC = st.text(max_size=12) | st.lists(st.sampled_from(REWARD_WORDS)).map("".join)


@FUZZ
@given(spec=REWARD_SPEC)
def test_any_reward(spec):
    """Any --reward gives a name, a finite weight and a function for each part, or is refused."""
    try:
        rewards = nft.load_rewards(spec, "--reward")
    except nft.UserError as error:
        assert str(error).startswith("--reward")
        return
    assert len(rewards) == len([part for part in spec.split(",") if part.strip()])
    for reward in rewards:
        assert math.isfinite(reward.weight)
        assert callable(reward.function)


def check_types(config):
    """Every setting is of its type, in its range, and one of its choices."""
    for name, field in FIELDS.items():
        value = getattr(config, name)
        assert type(value) is field.type
        rule = field.metadata
        if rule["low"] is not None:
            assert rule["low"] <= value < rule["high"]
        if rule["choices"] is not None:
            assert value in rule["choices"]


FLAG = SETTINGS.map(lambda name: "--" + name.replace("_", "-"))
VALUE = (
    st.sampled_from(["0", "-1", "inf"])
    | st.text(max_size=5)
    | st.integers().map(str)
    | st.floats().map(str)
)
WORD = st.tuples(FLAG, VALUE).map("=".join) | FLAG | st.sampled_from(["-h", "--", "run"]) | VALUE


@FUZZ
@given(words=st.lists(WORD, max_size=6))
def test_any_command_line(words):
    """Any command line gives settings as they must be, or is refused; -h ends with 0."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            config = nft.parse(words)
    except nft.UserError as error:
        assert ";" in str(error)
    except SystemExit as error:
        assert error.code == 0
        assert not {"-h", "--help"}.isdisjoint(words)
    else:
        check_types(config)


@FUZZ
@given(content=CONTENT | JSON.map(json.dumps).map(str.encode))
def test_any_settings_of_a_run(tmp_path, content):
    """Any config.json of a run to go on with gives settings, or is refused."""
    (tmp_path / "config.json").write_bytes(content)
    try:
        config = nft.parse(["--resume", "--out", str(tmp_path)])
    except nft.UserError as error:
        assert "; " in str(error)
    else:
        check_types(config)
