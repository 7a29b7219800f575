"""
Our PPOTrainer.

Options: `critic`, and `reward`, either `model` (a separate network, the default) or `adapter` (on the policy's base).
"""

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, GenerationConfig

from bench.setting import LORA, Meter, Setting, contend
from rlhf_trl.patches.malloc import keep_freed_memory
from rlhf_trl.ppo import PPOConfig, PPOTrainer
from rlhf_trl.rewards import AdapterReward, ModelReward


def train(setting: Setting, options: dict, meter: Meter) -> PPOTrainer:
    """Train for `setting.rollouts` rollouts."""
    critic, on_base = options.get("critic", "head"), options.get("reward") == "adapter"
    start = {"head": {}, "model": {"critic_path": setting.reward}, "adapter": {"critic_path": setting.reward_adapter}}
    unsampled = GenerationConfig.from_pretrained(setting.policy).suppress_tokens
    args = PPOConfig(
        f"{setting.folder}/ours",
        per_device_train_batch_size=setting.mini_batch,
        steps_per_generation=setting.mini_batches,
        num_iterations=setting.epochs,
        total_episodes=setting.batch * setting.rollouts,
        max_completion_length=setting.new_tokens,
        generation_kwargs={"suppress_tokens": unsampled},  # PPO doesn't read the model's own generation config
        learning_rate=setting.learning_rate,
        beta=setting.beta,
        seed=setting.seed,
        model_init_kwargs={"dtype": setting.dtype},
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        critic=critic,
        **start[critic],
    )
    if on_base:
        reward = AdapterReward(setting.reward_adapter, batch_size=setting.mini_batch)
    else:
        reward = ModelReward(setting.reward, dtype=setting.dtype, batch_size=setting.mini_batch)
    trainer = PPOTrainer(
        setting.policy,
        reward_funcs=reward,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": [prompt["text"] for prompt in setting.prompts()]}),
        processing_class=AutoTokenizer.from_pretrained(setting.policy),
        peft_config=LoraConfig(**LORA) if setting.lora else None,
    )
    _time_phases(trainer, reward, meter)
    trainer.train()
    return trainer


def _time_phases(trainer: PPOTrainer, reward: ModelReward, meter: Meter):
    """Count the phases of a rollout; what runs outside of it is its optimization."""
    make_rollout, forward = trainer._generate_and_score_completions, trainer._get_per_token_logps_and_entropies

    def rollout(inputs):
        meter.start_rollout()
        result = make_rollout(inputs)
        meter.switch("update")
        return result

    def per_token(*args, **kwargs):
        with meter.phase("update" if torch.is_grad_enabled() else "log-probabilities"):
            return forward(*args, **kwargs)

    trainer._generate_and_score_completions = rollout
    trainer._get_per_token_logps_and_entropies = per_token
    trainer.model.generate = meter.timed(trainer.model.generate, "generate")
    reward.member_scores = meter.timed(reward.member_scores, "score")


if __name__ == "__main__":
    keep_freed_memory()  # as train.py does
    contend(train)
