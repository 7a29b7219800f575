"""Model cards: what they say of a run, and what they keep to themselves."""

import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from rlhf_trl.errors import ConfigError
from rlhf_trl.report.card import write_card


def make_run(folder: Path, stage: str, model: str, config: dict, **record) -> Path:
    folder.mkdir(parents=True)
    record = {
        "stage": stage,
        "command": f"python train.py stage={stage} project=mine",
        "status": "done",
        "model": model,
        "started": "2026-01-01T10:00:00+00:00",
        "ended": "2026-01-01T10:10:00+00:00",
        "versions": {"rlhf_trl": "0.1.0", "torch": "2.13.0"},
        **record,
    }
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture
def ppo(tmp_path):
    """Return a run of ppo, from a run of sft that began with a model of the hub."""
    sft = make_run(tmp_path / "mine" / "sft", "sft", "HuggingFaceTB/SmolLM2-135M", {"stage": {"name": "sft"}})
    reward = {"_target_": "rlhf_trl.rewards.ModelReward", "run": "reward", "path": None, "weight": 1.0}
    config = {
        "stage": {"name": "ppo", "task_type": "CAUSAL_LM"},
        "data": {"_target_": "rlhf_trl.data.load_hub", "path": "trl-lib/ultrafeedback-prompt"},
        "reward": {"model": reward},
        "adapter": {"peft": {"_target_": "peft.LoraConfig", "r": 16}, "quantization": None},
    }
    run_dir = make_run(tmp_path / "mine" / "ppo", "ppo", str(sft), config)
    history = [
        {"step": 0, "eval_objective/scores": 0.5, "eval_objective/kl": -4e-7, "eval_completions/max_length": 9},
        {"step": 9, "eval_objective/scores": 1.25, "eval_objective/kl": 0.9, "eval_completions/max_length": 9},
    ]
    metrics = {"train": {}, "eval": history[-1] | {"eval_runtime": 3.0}, "history": history}
    (run_dir / "metrics.json").write_text(json.dumps(metrics))
    return run_dir


def evaluate(ppo: Path, started: str) -> None:
    policy = {"completion_length": 9.0, "eos_rate": 1.0, "rewards": {"gold": 1.0}, "reward_std": {"gold": 1.0}}
    estimate = {"mean": 1.5, "low": 1.0, "high": 2.0}
    found = {
        "baseline": "sft",
        "prompts": 40,
        "left_out": 0,
        "weights": {"gold": 1.0},
        "policies": {
            "sft": policy | {"path": str(ppo.parent / "sft"), "reward": estimate},
            "tuned": policy | {"path": str(ppo), "reward": estimate, "difference": estimate, "kl": estimate},
        },
        "samples": [],
    }
    folder = make_run(ppo.parent / "evaluate", "evaluate", "", {}, started=started)
    (folder / "comparison.json").write_text(json.dumps(found))


def test_a_card_says_what_the_model_is_and_how_it_was_made(ppo):
    text = write_card(ppo, repo="me/ppo").read_text()
    card = ModelCard(text)
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M"
    assert card.data.datasets == ["trl-lib/ultrafeedback-prompt"] and card.data.pipeline_tag == "text-generation"
    assert card.data.tags == ["trl", "rlhf_trl", "ppo"] and card.data.library_name == "transformers"
    assert "by way of `sft`" in text and "LoraConfig of rank 16" in text and "`model` (reward; weight 1)" in text
    assert "| objective/scores |   0.5 | 1.25 |" in text and "| objective/kl     |     0 |  0.9 |" in text
    assert "max_length" not in text and "runtime" not in text
    assert "python train.py stage=ppo project=mine" in text and "2.13.0" in text and "'me/ppo'" in text
    assert str(ppo.parent) not in text and "report.png" not in text and "Evaluation" not in text
    assert text.count("## Versions") == 1


def test_a_card_shows_the_evaluation_of_this_model_with_its_figure(ppo):
    evaluate(ppo, started="2026-01-01T10:20:00+00:00")
    text = write_card(ppo, figure=True).read_text()
    assert "| difference " in text and "+1.50 [+1.00, +2.00]" in text and "| KL to sft, nats per sequence" in text
    assert (
        "Verdict of the report: ship" in text and "report.png" in text and (ppo / "report.png").stat().st_size > 1000
    )


def test_an_evaluation_of_an_earlier_model_in_the_same_folder_is_not_shown(ppo):
    evaluate(ppo, started="2026-01-01T09:00:00+00:00")
    assert "Verdict" not in write_card(ppo).read_text()


def test_an_adapter_is_loaded_by_peft(ppo):
    (ppo / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x/y"}))
    text = write_card(ppo).read_text()
    assert "from peft import AutoPeftModelForCausalLM" in text and ModelCard(text).data.library_name == "peft"


def test_a_folder_without_a_run_has_no_card(tmp_path):
    with pytest.raises(ConfigError, match="holds no run"):
        write_card(tmp_path)
