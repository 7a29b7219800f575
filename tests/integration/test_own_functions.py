"""Functions and classes of the user's own, whose errors are reported with their place."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from rlhf_trl.config.dotpaths import find, problem
from rlhf_trl.errors import ConfigError
from rlhf_trl.rewards.function import FunctionReward

SMALL = ["data.max_samples=64", "data.max_eval_samples=8", "stage.args.max_steps=4", "stage.args.eval_on_start=false"]
SMALL += ["stage.args.per_device_train_batch_size=8", "stage.args.steps_per_generation=1", "health=none"]
SMALL += ["stage.args.num_iterations=1", "stage.args.save_strategy=no", "stage.args.max_completion_length=4"]


@pytest.fixture
def own(tmp_path, monkeypatch):
    """`own(source)` writes the module `own_code`, where the command stands."""

    def write(source: str) -> Path:
        (tmp_path / "own_code.py").write_text(source)
        return tmp_path / "own_code.py"

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_code", raising=False)
    yield write
    sys.modules.pop("own_code", None)


def reward(*words: str) -> list[str]:
    return ["stage=ppo", *SMALL, "reward=function", "reward.function.function=own_code.f", *words]


@pytest.mark.parametrize(
    ("source", "words", "parts"),
    [
        ("def f(completions, scale=1): ...", ["+reward.function.kwargs.scael=2"], ["kwargs.scael`", "`scale`"]),
        ("def f(completions, scale=1, **k): ...", ["+reward.function.kwargs.scael=2"], ["kwargs.scael`", "`scale`"]),
        ("def f(completions): ...", ["+reward.function.kwargs.prompts=3"], ["kwargs.prompts` would replace"]),
        ("def f(completions, /): ...", [], ["`own_code.f` takes `completions` by position only"]),
        (
            "def f(completions, answer): ...",
            [],
            ["`own_code.f` needs an argument `answer`", "it has `kind`, `prompt`"],
        ),
        ("def f(completions) return 1", [], ["own_code.py`, line 1: expected ':'"]),
        ("import nowhere\ndef f(completions): ...", [], ["No module named 'nowhere' (own_code.py, line 1)"]),
        ("def f(c): ...\nraise RuntimeError('boom')", [], ["RuntimeError: boom (own_code.py, line 2)"]),
        ("def f(c): ...\nimport sys\nsys.exit()", [], ["`own_code.f` can't be imported: its module ends the program"]),
        ("f = 3", [], ["`own_code.f` can't be used: Expected a callable"]),
        ("from os import system as f", [], ["`own_code.f` can't be used", "'os.system' (resolved from 'own_code.f')"]),
        ("", ["reward.function.function=os.system"], ["`os.system` can't be used", "blocklisted"]),
        ("", ["reward.function.function=shutil.rmtree"], ["`shutil.rmtree` can't be used", "blocklisted"]),
        ("", ["reward.function.function=3"], ["`reward.function.function` is 3 and must be a dot path"]),
        ("def f(c): ...", ["+callbacks.x._target_=os.system"], ["`callbacks.x._target_`: `os.system` can't be used"]),
        ("def f(c): ...", ["+callbacks.x._target_=collections.Counter"], ["`collections.Counter` is no callback"]),
        ("def f(c): ...", ["reward.function.weight=abc"], ["`reward.function.weight` is 'abc'"]),
        ("def f(c): ...", ["reward.function.weight=nan"], ["`reward.function.weight` is nan"]),
        ("def f(c): ...", ["stage.run._target_=os.getcwd"], ["`os.getcwd` can't be called with the config"]),
        ("def f(c): ...", ["stage.run._partial_=false"], ["`stage.run` needs `_partial_: true`"]),
        ("def f(c): ...", ["+callbacks.x.y=3"], ["`callbacks.x` has no `_target_`"]),
        ("def f(c): ...", ["callbacks=3"], ["`callbacks` is 3 and must hold keys"]),
        (
            "from transformers import TrainerCallback\ndef f(c): ...\nclass C(TrainerCallback):\n"
            "  def __init__(self, patience): ...",
            ["+callbacks.x._target_=own_code.C"],
            ["`callbacks.x` needs the argument `patience`"],
        ),
    ],
)
def test_a_dry_run_reports_what_is_wrong(own, command, source, words, parts):
    own(source)
    status, _, message = command(*reward(*words), "debug=dry_run")
    assert status == 2 and "\nError: " in f"\n{message}" and "Traceback" not in message
    message = message[message.index("Error: ") :]
    assert len(message.splitlines()) == 1 and "Error in call to target" not in message
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("column", ["completions", "tokenizer"])
def test_a_column_can_not_have_the_name_of_what_a_reward_is_given(own, command, tmp_path, column):
    own("def f(completions): return [0.0] * len(completions)")
    rows = [json.dumps({"prompt": f"What color is a bear {i}?", column: "x"}) for i in range(64)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    status, _, message = command(*reward("data=files", "data.paths=rows.jsonl"), "debug=dry_run")
    assert status == 2 and f"The data has a column `{column}`" in message


@pytest.mark.parametrize("name", ["length", "format"])
def test_our_own_reward_functions_drop_no_argument(command, name):
    words = {"length": ["reward.length.kwargs.max_length=5"], "format": ["reward.format.kwargs.pattern=x"]}[name]
    status, _, message = command("stage=ppo", f"reward={name}", *words, f"+reward.{name}.kwargs.wole=1")
    assert status == 2 and f"`reward.{name}.kwargs.wole` is no argument of" in message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.ones((2, 1)), r"returned values of shape \(2, 1\) for 2 completions"),
        (torch.ones(2, 1), r"returned values of shape \(2, 1\) for 2 completions"),
        (np.float64(1), r"returned values of shape \(\) for 2 completions"),
        ([1, 10**9999], "returned for completion 1 a number beyond what a float can hold"),
        ([torch.ones(2), 1], r"returned tensor\(\[1., 1.\]\) for completion 0"),
        ([[1.0], [1.0]], r"returned \[1.0\] for completion 0"),
        (["1", 2], "returned '1' for completion 0"),
        ([1, 1 + 2j], r"returned \(1\+2j\) for completion 1"),
        ({1, 2}, "returned set"),
        (None, "returned NoneType"),
        ((1.0 for _ in "ab"), "returned generator"),
    ],
)
def test_returns_that_are_no_list_of_numbers(values, message):
    with pytest.raises(ConfigError, match=f"The reward function `wrong` {message}"):
        FunctionReward(lambda completions: values, name="wrong")(prompts=["a", "b"], completions=["c", "d"])


def test_numbers_of_any_library_are_numbers():
    values = [None, True, 2, np.float32(3), torch.tensor(4.0), np.int64(5)]
    given = FunctionReward(lambda completions: values)(prompts=["a"] * 6, completions=["b"] * 6)
    assert given == [None, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert FunctionReward(lambda completions: np.arange(2))(prompts=["a"] * 2, completions=["b"] * 2) == [0.0, 1.0]


def test_an_argument_that_is_missing_when_called_is_named():
    def needs(completions, answer):
        return [0.0]

    with pytest.raises(ConfigError, match="`needs` needs an argument `answer`.*it has `kind`"):
        FunctionReward(needs)(prompts=["a"], completions=["b"], completion_ids=[[1]], kind=["x"])


@pytest.mark.parametrize(
    ("source", "told", "status"),
    [
        (
            "def f(completions, **columns):\n    return columns['answer']",
            "`f` in own_code.py raised KeyError",
            "failed",
        ),
        (
            "async def f(completions):\n    raise ValueError('boom')",
            "`f` in own_code.py raised ValueError: boom",
            "failed",
        ),
        ("import sys\ndef f(completions):\n    sys.exit()", "`f` in own_code.py ended the program", "failed"),
    ],
)
def test_an_error_in_the_users_code_shows_the_users_frames(own, command, tmp_path, source, told, status):
    own(source)
    code, _, message = command(*reward())
    assert code == 2
    message = message[message.index("Error: ") :]
    assert message.startswith(f"Error: {told}") and 'own_code.py", line ' in message
    assert "rlhf_trl" not in message and "site-packages" not in message and len(message.splitlines()) <= 4
    assert json.loads((tmp_path / "runs" / "default" / "ppo" / "run.json").read_text())["status"] == status


def test_a_function_that_goes_elsewhere_takes_nothing_along(own, command, tmp_path):
    own("import os\nos.chdir('/')\ndef f(completions):\n    os.chdir('/')\n    return [0.5] * len(completions)")
    code, _, message = command(*reward("run_name=moved"))
    assert code == 0, message
    assert Path.cwd() == tmp_path and (tmp_path / "runs" / "default" / "moved" / "model.safetensors").is_file()


def test_an_error_in_a_callback_shows_its_frames(own, command):
    own(
        "from transformers import TrainerCallback\nclass C(TrainerCallback):\n"
        "    def on_step_end(self, *args, **kwargs):\n        raise ValueError('boom')"
    )
    code, _, message = command("stage=sft", *SMALL[:3], "+callbacks.x._target_=own_code.C")
    message = message[message.index("Error: ") :]
    assert code == 2 and message.startswith("Error: `on_step_end` in own_code.py raised ValueError: boom")
    assert len(message.splitlines()) <= 4


def test_a_path_follows_the_rule_of_targets():
    with pytest.raises(ConfigError, match="`shutil.rmtree` can't be used: Target 'shutil.rmtree'"):
        find("shutil.rmtree")
    assert find("math.sqrt")(4) == 2.0
    assert problem("tests.integration.test_own_functions.own") is None
