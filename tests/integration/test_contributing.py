"""The examples of CONTRIBUTING.md, extracted from it and run."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from tests.helpers.blocks import name_of

TEXT = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
EXAMPLES = dict(part.split("\n", 1) for part in TEXT.split("\n### A ")[1:])
SMALL = ["stage.args.max_steps=2", "stage.args.per_device_train_batch_size=8"]
SMALL += ["data.max_samples=64", "data.max_eval_samples=16"]


@pytest.fixture(autouse=True)
def forget_modules():
    """Forget the modules that the examples write."""
    yield
    for name in ("my_rewards", "my_feedback", "my_kl"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["stage", "reward", "data format", "KL controller"])
def test_an_example_runs(command, tmp_path, name):
    blocks = re.findall(r"```(\w+)\n(.*?)```", EXAMPLES[name], re.DOTALL)
    for kind, block in blocks:
        if kind in ("yaml", "python"):
            file = tmp_path / name_of(block)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block)
            assert 1 < len(block.splitlines()) < 11
        elif kind == "json":  # one row of a file: a few more with other prompts
            row = json.loads(block)
            rows = [row | {"prompt": f"{i}. {row['prompt']}"} for i in range(32)]
            Path(tmp_path, "best.jsonl").write_text("\n".join(map(json.dumps, rows)))
    ((_, typed),) = [block for block in blocks if block[0] == "sh"]
    words = shlex.split(typed)
    assert words[:2] == ["python", "train.py"]
    status, _, err = command(*words[2:], *SMALL)
    assert status == 0, err
    (run,) = tmp_path.glob("runs/default/*/run.json")
    assert json.loads(run.read_text())["status"] == "done"
