import itertools
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf_trl.errors import ConfigError, DivergedError
from rlhf_trl.runs.paths import resolve_path
from rlhf_trl.stages import train as train_module
from tests.helpers.spies import SPY, Spoil, Spy

SPOIL = "+callbacks.spoil._target_=tests.helpers.spies.Spoil"
SMALL = ("stage.args.max_steps=5", "data.max_samples=128", "stage.args.lr_scheduler_type=constant")


@pytest.fixture
def spoil(monkeypatch):
    """`spoil(*steps, weight=None)`: the steps with NaN gradients, and the one after which a weight is infinite."""

    def spoiled(*steps, weight=None):
        monkeypatch.setattr(Spoil, "steps", steps)
        monkeypatch.setattr(Spoil, "weight", weight)

    return spoiled


def record(run_dir) -> dict:
    return json.loads(Path(run_dir, "run.json").read_text())


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "orpo", "kto"])
def test_a_training_that_diverges_fails_and_saves_no_model(train, tmp_path, spoil, stage):
    spoil(2, 3, 4, 5)
    with pytest.raises(DivergedError, match="The updates 2 to 4 had NaN .* Lower `stage.args.learning_rate`"):
        train(tmp_path, f"stage={stage}", *SMALL, SPOIL, "data.max_eval_samples=4")
    run_dir = tmp_path / "test" / stage
    assert record(run_dir)["status"] == "failed" and "NaN" in record(run_dir)["error"]
    assert not list(run_dir.glob("*.safetensors"))


def test_a_single_update_with_nan_is_withheld_and_said(train, tmp_path, spoil, capsys):
    spoil(3)
    words = ("stage.args.save_steps=1", "stage.args.save_total_limit=null", "stage.args.logging_steps=1")
    run_dir = Path(train(tmp_path, "stage=sft", *SMALL, *words, SPOIL))
    at = [load_file(run_dir / f"checkpoint-{step}" / "model.safetensors") for step in range(1, 6)]
    unchanged = [all(torch.equal(a[name], b[name]) for name in a) for a, b in itertools.pairwise(at)]
    assert unchanged == [False, True, False, False] and record(run_dir)["status"] == "done"
    assert "Step 3 had NaN or infinite gradients: this update is skipped." in capsys.readouterr().out


@pytest.mark.parametrize("steps, weight, words", [((), 5, "weights, such as"), ((5,), None, "ended at step 5")])
def test_a_run_that_ends_with_nan_is_not_saved(train, tmp_path, spoil, steps, weight, words):
    spoil(*steps, weight=weight)
    with pytest.raises(DivergedError, match=words):
        train(tmp_path, "stage=sft", *SMALL, SPOIL)
    assert record(tmp_path / "test" / "sft")["status"] == "failed"
    assert not list((tmp_path / "test" / "sft").glob("*.safetensors"))


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_start_with_nan_weights_is_refused(train, tmp_path, stage):
    path = Path(shutil.copytree(resolve_path("demo:sft", None, tmp_path), tmp_path / "broken"))
    weights = load_file(path / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = math.nan
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"`model.layers.1.mlp.up_proj.weight` of `.*broken` holds NaN"):
        train(tmp_path, f"stage={stage}", "model=hf", f"model.path={path}", *SMALL)
    assert not (tmp_path / "test" / stage / "run.json").exists()


def test_a_loss_of_nan_is_logged_as_it_is(train, tmp_path, spoil):
    spoil(weight=3)
    with pytest.raises(DivergedError):
        train(tmp_path, "stage=sft", *SMALL, SPOIL, "stage.args.logging_steps=1")
    history = json.loads((tmp_path / "test" / "sft" / "metrics.json").read_text())["history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[3:] == [None, None] and None not in losses[:3]  # JSON has no NaN


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "kto", "ppo", "grpo"])
def test_a_run_killed_after_its_last_step_takes_no_step_more(train, tmp_path, monkeypatch, capsys, stage):
    """Its final evaluation is what is left; the fifth of eight steps of an epoch is not the epoch's last one."""
    words = [f"stage={stage}", *SMALL, "stage.args.save_steps=5", "data.max_samples=256", "data.max_eval_samples=4"]
    words += ["stage.args.max_steps=20", "stage.args.save_steps=20", "data.max_samples=256"] * (stage == "ppo")
    words += [SPY]
    finish = train_module.finish

    def killed(*args):
        raise RuntimeError("killed")

    monkeypatch.setattr(train_module, "finish", killed)
    with pytest.raises(RuntimeError, match="killed"):
        train(tmp_path, *words)
    trained = {name: weight.clone() for name, weight in Spy.model.state_dict().items()}
    monkeypatch.setattr(train_module, "finish", finish)
    capsys.readouterr()
    train(tmp_path, *words, "resume=true")
    assert all(torch.equal(weight, trained[name]) for name, weight in Spy.model.state_dict().items())
    steps = 20 if stage == "ppo" else 5
    assert f"all {steps} steps were trained before" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "test" / stage / "metrics.json").read_text())
    assert metrics["train"]["step"] == steps and metrics["eval"]["step"] == steps
