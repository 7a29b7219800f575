"""Trainings to measure: TRL's own GRPO and RLOO beside our PPO (`bench.ours`)."""

from datasets import Dataset
from peft import PeftModel
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from bench import ours
from bench.setting import Meter, Setting
from rlhf_trl.rewards import ModelReward

GENERATIONS = 8  # completions per prompt


def grpo(setting: Setting, options: dict, meter: Meter) -> GRPOTrainer:
    """Train TRL's GRPO on as many completions, epochs and mini-batches as PPO."""
    return _train(GRPOTrainer, GRPOConfig, setting, options, meter)


def rloo(setting: Setting, options: dict, meter: Meter) -> RLOOTrainer:
    """Train TRL's RLOO on as many completions, epochs and mini-batches as PPO."""
    return _train(RLOOTrainer, RLOOConfig, setting, options, meter)


def _train(trainer_class, config_class, setting: Setting, options: dict, meter: Meter):
    steps = setting.epochs * setting.mini_batches * setting.rollouts
    own = {"num_generations": min(GENERATIONS, setting.mini_batch), "max_steps": steps}
    args = config_class(f"{setting.folder}/trl", **(ours.arguments(setting) | own | options.get("arguments", {})))
    tokenizer = AutoTokenizer.from_pretrained(setting.policy)
    reward = ModelReward(setting.reward, dtype=setting.dtype, batch_size=setting.mini_batch)
    reward.bind(tokenizer)
    model, peft_config = ours.initial_model(setting, options)
    trainer = trainer_class(
        model,
        reward_funcs=reward,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": [prompt["text"] for prompt in setting.prompts()]}),
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    if isinstance(trainer.model, PeftModel):
        ours.begin_training(trainer.model)
    ours.time_phases(trainer, reward, meter)
    meter.ready()
    trainer.train()
    return trainer
