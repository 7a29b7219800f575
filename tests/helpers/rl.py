"""PPO, RLOO and GRPO trainers alike, on `tests.helpers.tiny`, for tests of what works with all three."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, RLOOConfig

from rlhf_trl.ppo import PPOConfig, PPOTrainer
from rlhf_trl.trainers.rollouts import GRPOTrainer, RLOOTrainer
from tests.helpers.ppo import prompts
from tests.helpers.tiny import QUIET_ON_CPU

TRAINERS = {
    "ppo": (PPOTrainer, PPOConfig, {"num_generations": 2, "head_init": "normal"}),
    "rloo": (RLOOTrainer, RLOOConfig, {"num_generations": 2}),
    "grpo": (GRPOTrainer, GRPOConfig, {"num_generations": 2, "scale_rewards": "none"}),
}


def count_of_a(completions, **kwargs):
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(text.split().count("a")) for text in texts]


def rl_trainer(
    kind, path, out, data=None, reward_funcs=count_of_a, eval_dataset=None, peft_config=None, combine=None, **kwargs
):
    """Return a trainer of `kind` with two rollouts, each 8 completions of up to 6 tokens in one mini-batch."""
    trainer, config, own = TRAINERS[kind]
    defaults = {
        "output_dir": str(out),
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 4,
        "steps_per_generation": 1,
        "num_iterations": 1,
        "num_train_epochs": 1,
        "max_completion_length": 6,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "beta": 0.1,
        "disable_dropout": True,
        **QUIET_ON_CPU,
    }
    return trainer(
        path,
        reward_funcs=reward_funcs,
        args=config(**(defaults | own | kwargs)),
        train_dataset=data if data is not None else prompts(8),
        eval_dataset=eval_dataset,
        peft_config=peft_config,
        combine=combine,
        processing_class=AutoTokenizer.from_pretrained(path),
    )


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def plain_kl(model, path, batches) -> torch.Tensor:
    """Return the summed k1 of each row of the micro-batches to the model in `path`, row by row and without padding."""
    reference = AutoModelForCausalLM.from_pretrained(path)
    sums = []
    for batch in batches:
        for i in range(len(batch["completion_ids"])):
            prompt = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()]
            completion = batch["completion_ids"][i][batch["completion_mask"][i].bool()]
            logps = []
            for scored in (model, reference):
                with torch.no_grad():
                    logits = scored(torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
                logps.append(logits.log_softmax(-1).gather(1, completion[:, None])[:, 0])
            sums.append((logps[0] - logps[1]).sum())
    return torch.stack(sums)
