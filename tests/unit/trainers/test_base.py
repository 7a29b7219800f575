"""The mixin of all trainers, which TRL's own classes get as well."""

import pytest
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from rlhf_trl.errors import ConfigError
from rlhf_trl.runs.checkpoints import FILES_FILE, last_checkpoint
from rlhf_trl.trainers import DPOTrainer
from rlhf_trl.trainers.base import TrainerMixin
from rlhf_trl.trainers.rollouts import extended
from tests.helpers.architectures import save_architecture

SMALL = ["data.max_samples=32", "data.max_eval_samples=8", "stage.args.max_steps=2", "stage.args.save_steps=2"]


@pytest.mark.parametrize("trainer_class", [trl.SFTTrainer, trl.KTOTrainer, Trainer])
def test_a_class_without_the_mixin_gets_a_subclass_with_it(trainer_class):
    made = extended(trainer_class)
    assert issubclass(made, trainer_class) and issubclass(made, TrainerMixin)
    assert made.__name__ == trainer_class.__name__ and not issubclass(trainer_class, TrainerMixin)
    assert extended(made) is made and extended(DPOTrainer) is DPOTrainer


def test_a_stage_can_name_a_trainer_of_trl(train, tmp_path):
    run_dir = train(tmp_path, "stage=dpo", "stage.trainer._target_=trl.DPOTrainer", *SMALL)
    checkpoint = last_checkpoint(run_dir)
    assert checkpoint.endswith("checkpoint-2")
    with open(f"{checkpoint}/{FILES_FILE}") as file:
        assert "model.safetensors" in file.read()


def make_trainer(**objects) -> Trainer:
    return DPOTrainer(**objects)


def test_a_function_that_makes_a_trainer_is_refused(train, tmp_path):
    with pytest.raises(ConfigError, match="make_trainer`, which is no class of trainers"):
        train(tmp_path, "stage=dpo", "stage.trainer._target_=tests.unit.trainers.test_base.make_trainer", *SMALL)


def test_reference_log_probabilities_are_precomputed_with_trained_tokens(tmp_path):
    """DPO computes them in its constructor, with an output layer that is tied to an embedding with trained tokens."""
    path = save_architecture(tmp_path / "model", "qwen2")
    rows = Dataset.from_list([{"prompt": "a b", "chosen": " c", "rejected": " d e"}] * 2)
    args = {"report_to": "none", "bf16": False, "use_cpu": True, "precompute_ref_log_probs": True}
    lora = LoraConfig(r=2, trainable_token_indices=[5, 6], task_type="CAUSAL_LM")
    trainer = DPOTrainer(
        get_peft_model(AutoModelForCausalLM.from_pretrained(path), lora),
        args=trl.DPOConfig(str(tmp_path / "run"), **args),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(path),
    )
    assert "ref_chosen_logps" in trainer.train_dataset.column_names
