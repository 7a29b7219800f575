"""
Our PPOTrainer.

Options: `critic`; `reward`, either `model` (a separate network, the default) or `adapter` (on the policy's base);
`quantized` (a base in NF4); `loading`, arguments of the policy's `from_pretrained`; `arguments` of PPOConfig.
"""

from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoTokenizer, BitsAndBytesConfig, GenerationConfig

from bench.setting import LORA, Meter, Setting, contend
from rlhf_trl.models.initial import load_initial_model
from rlhf_trl.models.roles import begin_training
from rlhf_trl.patches.malloc import keep_freed_memory
from rlhf_trl.ppo import PPOConfig, PPOTrainer
from rlhf_trl.rewards import AdapterReward, ModelReward


def train(setting: Setting, options: dict, meter: Meter) -> PPOTrainer:
    """Train for `setting.rollouts` rollouts."""
    critic, on_base = options.get("critic", "head"), options.get("reward") == "adapter"
    start = {"head": {}, "model": {"critic_path": setting.reward}, "adapter": {"critic_path": setting.reward_adapter}}
    own = start[critic] | {"critic": critic, "total_episodes": setting.batch * setting.rollouts}
    args = PPOConfig(f"{setting.folder}/ours", **(arguments(setting) | own | options.get("arguments", {})))
    if on_base:
        reward = AdapterReward(setting.reward_adapter, batch_size=setting.mini_batch)
    else:
        reward = ModelReward(setting.reward, dtype=setting.dtype, batch_size=setting.mini_batch)
    model, peft_config = initial_model(setting, options)
    trainer = PPOTrainer(
        model,
        reward_funcs=reward,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": [prompt["text"] for prompt in setting.prompts()]}),
        processing_class=AutoTokenizer.from_pretrained(setting.policy),
        peft_config=peft_config,
    )
    if isinstance(trainer.model, PeftModel):
        begin_training(trainer.model)
    time_phases(trainer, reward, meter)
    meter.ready()
    trainer.train()
    return trainer


def arguments(setting: Setting) -> dict[str, Any]:
    """Return the arguments that PPO shares with GRPO and RLOO."""
    # The trainers don't read the model's own generation config
    unsampled = GenerationConfig.from_pretrained(setting.policy).suppress_tokens
    return {
        "per_device_train_batch_size": setting.mini_batch,
        "steps_per_generation": setting.mini_batches,
        "num_iterations": setting.epochs,
        "max_completion_length": setting.new_tokens,
        "generation_kwargs": {"suppress_tokens": unsampled},
        "learning_rate": setting.learning_rate,
        "beta": setting.beta,
        "seed": setting.seed,
        "bf16": setting.autocast,
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def initial_model(setting: Setting, options: dict) -> tuple[Any, Any]:
    """Return the policy and its `peft_config`, as the stages load them."""
    quantization = None
    if options.get("quantized"):
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    return load_initial_model(
        setting.policy,
        "CAUSAL_LM",
        LoraConfig(**LORA) if setting.lora else None,
        merge_dir="",
        dtype=setting.policy_dtype or setting.dtype,
        quantization_config=quantization,
        **options.get("loading", {}),
    )


def time_phases(trainer, reward: ModelReward, meter: Meter):
    """Count the phases of a rollout of PPO, GRPO or RLOO; what runs outside of it is its optimization."""
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
    for name in ("generate", "generate_batch"):  # the second is that of continuous batching
        setattr(trainer.model, name, meter.timed(getattr(trainer.model, name), "generate"))
    reward.member_scores = meter.timed(reward.member_scores, "score")


if __name__ == "__main__":
    keep_freed_memory()  # as train.py does
    contend(train)
