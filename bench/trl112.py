"""The last PPOTrainer of TRL, `trl.experimental.ppo` of 1.12.0. Its critic is always a separate network."""

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

from bench.setting import LORA, Meter, Setting, contend


def train(setting: Setting, options: dict, meter: Meter) -> PPOTrainer:
    """Train for `setting.rollouts` rollouts. The value network starts from the reward model and is trained in full."""
    args = PPOConfig(
        f"{setting.folder}/trl112",
        per_device_train_batch_size=setting.mini_batch,
        gradient_accumulation_steps=setting.mini_batches,
        num_mini_batches=setting.mini_batches,
        num_ppo_epochs=setting.epochs,
        total_episodes=setting.batch * setting.rollouts,
        local_rollout_forward_batch_size=setting.batch,
        response_length=setting.new_tokens,
        temperature=1.0,
        learning_rate=setting.learning_rate,
        kl_coef=setting.beta,
        seed=setting.seed,
        bf16=setting.autocast,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        logging_steps=1,
        num_sample_generations=0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    dtype = getattr(torch, setting.dtype)

    def classifier():
        return AutoModelForSequenceClassification.from_pretrained(setting.reward, dtype=dtype)

    prompts = Dataset.from_dict({"input_ids": [prompt["ids"] for prompt in setting.prompts()]})
    trainer = PPOTrainer(
        args=args,
        processing_class=AutoTokenizer.from_pretrained(setting.policy),
        model=AutoModelForCausalLM.from_pretrained(setting.policy, dtype=dtype),
        ref_model=None,
        reward_model=classifier(),
        value_model=classifier(),
        train_dataset=prompts,
        eval_dataset=prompts.select(range(setting.batch)),
        peft_config=LoraConfig(**LORA) if setting.lora else None,
    )
    _time_phases(trainer, meter, setting)
    meter.ready()
    trainer.train()
    return trainer


def _time_phases(trainer: PPOTrainer, meter: Meter, setting: Setting):
    """Count the phases by the functions of TRL's module; the update begins with the first pass with gradients."""
    generate, forward, get_reward = ppo_trainer.batch_generation, ppo_trainer.forward, ppo_trainer.get_reward

    def rollout(*args):
        meter.start_rollout()
        with meter.phase("generate"):
            responses, logits = generate(*args)
        assert responses.size(1) == setting.prompt_tokens + setting.new_tokens
        return responses, logits

    def policy_and_critic(*args):
        if torch.is_grad_enabled():
            meter.switch("update")
            return forward(*args)
        with meter.phase("log-probabilities"):
            return forward(*args)

    def scores(model, *args):
        with meter.phase("score" if model is trainer.reward_model else "log-probabilities"):
            return get_reward(model, *args)

    ppo_trainer.batch_generation, ppo_trainer.forward, ppo_trainer.get_reward = rollout, policy_and_critic, scores
    ppo_trainer.selective_log_softmax = _outside_of_update(ppo_trainer.selective_log_softmax, meter)


def _outside_of_update(function, meter: Meter):
    def wrapped(*args):
        if torch.is_grad_enabled():
            return function(*args)
        with meter.phase("log-probabilities"):
            return function(*args)

    return wrapped


if __name__ == "__main__":
    contend(train)
