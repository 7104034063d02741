"""The model card's code paints what the run's last evaluation painted.

SPDX-License-Identifier: MIT
"""

import re
import sys
from pathlib import Path

import common
import numpy as np
import pytest

import nft

sys.path.insert(0, str(common.EXAMPLES))
import card

pytest.importorskip("peft")

RUNS = {
    "sd15": {"guidance": 2.0, "eval_steps": 4},
    "sdxl": {"solver": "euler-a"},
    "sd3": {"solver": "dpm2-sde"},
    "flux": {"guidance": 3.5},
}


@pytest.mark.parametrize("name", RUNS)
def test_card(name, tmp_path, monkeypatch):
    """Run where the run was started, the first python block leaves in `image` the first held-out
    prompt as it was painted last: by the EMA, from the noise of evaluation, to 1 of 255."""
    scored = []

    def reward(images, prompts, metadata):
        scored.append(images)
        return images[:, 0].mean((1, 2))

    monkeypatch.chdir(tmp_path)
    common.train(name, "run", iterations=3, lr=0.1, reward=reward, **RUNS[name])
    card.write_card(Path("run"))
    text = Path("run/README.md").read_text()
    keys = re.findall(r"^\w+", text.split("---\n")[1], re.MULTILINE)
    assert keys == ["base_model", "library_name", "pipeline_tag", "tags"]
    assert all(f"- {prompt}\n" in text for prompt in common.TEXTS)
    found = {}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], found)
    # The last batch that was scored is the last evaluation's.
    painted = nft.to_pil(scored[-1][0])
    assert np.abs(np.subtract(found["image"], painted, dtype=float)).max() <= 1
