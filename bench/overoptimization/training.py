"""Reward models, PPO and DPO of the benchmark, by the package's trainers, all in one process."""

import copy
import tempfile
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback, set_seed
from trl import DPOConfig, DPOTrainer

from bench.overoptimization.samples import LONGEST, POLICY, Pair, Sample, chat, rated, reward_rows
from rlhf_trl.data.tokenize import prompt_ids
from rlhf_trl.evaluation.generation import sample, token_statistics
from rlhf_trl.models.loading import load_full, load_model
from rlhf_trl.models.soup import average_weights
from rlhf_trl.models.tokenizers import load_tokenizer
from rlhf_trl.ppo import PPOConfig, PPOTrainer
from rlhf_trl.reward_modeling import RewardConfig, RewardTrainer
from rlhf_trl.rewards import FunctionReward, ModelReward
from rlhf_trl.rewards.model import Member
from rlhf_trl.tasks.demo import gold_reward

ROLLOUT = 128

Point = dict[str, float]


def quiet(logging_steps: int = 100) -> dict[str, Any]:
    """Return the arguments that all trainers share: nothing is shown or saved."""
    return {
        "save_strategy": "no",
        "logging_steps": logging_steps,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
    }


class Members(ModelReward):
    """
    The reward of several full reward models in memory, aggregated as an ensemble of adapters.

    Args:
        models (`Sequence[PreTrainedModel]`): the reward models.
        ensemble (`str`), std_coef (`float`): see [`ModelReward`].
    """

    def __init__(self, models: Sequence[PreTrainedModel], ensemble: str = "mean", std_coef: float = 1.0):
        super().__init__(models[0], name="proxy", batch_size=ROLLOUT)
        self.ensemble, self.std_coef = ensemble, std_coef
        self._members = [Member("default", model.requires_grad_(False).eval()) for model in models]


def start(seed: int) -> PreTrainedModel:
    """Return the first policy with a new score head, from which all members of an ensemble start."""
    set_seed(seed)
    return load_full(POLICY, "SEQ_CLS", dtype="float32")


def reward_model(
    pairs: Sequence[Pair], first: PreTrainedModel, steps: int, batch: int, rate: float, seed: int, **options: Any
) -> PreTrainedModel:
    """Train a copy of a model on comparisons; `options` are other arguments of the trainer."""
    with tempfile.TemporaryDirectory() as folder:
        args = RewardConfig(
            folder, per_device_train_batch_size=batch, max_steps=steps, learning_rate=rate, seed=seed,
            warmup_steps=0.05, lr_scheduler_type="cosine", max_length=256, **quiet(), **options,
        )  # fmt: skip
        trainer = RewardTrainer(copy.deepcopy(first), args, reward_rows(pairs), load_tokenizer(POLICY))
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model: Any = trainer.model
    return model.requires_grad_(False).eval()


def average(models: Sequence[PreTrainedModel]) -> PreTrainedModel:
    """Return the mean of the weights of reward models that share their start (WARM, arXiv 2401.12187)."""
    merged = copy.deepcopy(models[0])
    average_weights(models, [1 / len(models)] * len(models), merged)
    return merged.eval()


def scores(reward: ModelReward, samples: Sequence[Sample]) -> np.ndarray:
    """Return the rewards of samples, each different one scored once."""
    unique = list(dict.fromkeys(each.ids for each in samples))
    found = dict(zip(unique, reward.score_ids([list(ids) for ids in unique]), strict=True))
    return np.array([found[each.ids] for each in samples])


def ppo(
    reward: ModelReward, questions: Sequence[str], rollouts: int, epochs: int, beta: float, rate: float, seed: int
) -> list[Point]:
    """
    Train the first policy by PPO, and watch the gold reward.

    Returns:
        `list[Point]`: of each rollout `kl`, `proxy`, `gold`, their standard deviations over the completions,
        `gold_64`, the mean gold reward of the first 64 of them, an ensemble's `disagreement`, `length`, `eos` and
        `entropy`.
    """
    with tempfile.TemporaryDirectory() as folder:
        args = PPOConfig(
            folder,
            per_device_train_batch_size=ROLLOUT // 2,
            steps_per_generation=2,
            gradient_accumulation_steps=1,
            num_iterations=epochs,
            total_episodes=rollouts * ROLLOUT,
            beta=beta,
            learning_rate=rate,
            lr_scheduler_type="constant",
            max_completion_length=LONGEST,
            missing_eos_penalty=1.0,
            # At such a learning rate the value loss, where it moves the trunk, makes the policy worse by any reward
            critic_detach=True,
            critic_learning_rate=1e-2,
            cliprange_value=10.0,
            seed=seed,
            **quiet(logging_steps=1),
        )
        trainer = PPOTrainer(
            load_model(POLICY, dtype="float32"),
            reward_funcs=[reward, FunctionReward(gold_reward, weight=0.0, name="gold")],
            args=args,
            train_dataset=Dataset.from_dict({"prompt": [chat(text) for text in questions]}),
            processing_class=load_tokenizer(POLICY),
        )
        few: list[float] = []
        trainer.on_rollout(lambda rollout: few.append(rollout.rewards.values[:64, 1].mean().item()))
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    names = {
        "kl": "objective/kl",
        "proxy": "rewards/proxy/mean",
        "gold": "rewards/gold/mean",
        "proxy_std": "rewards/proxy/std",
        "gold_std": "rewards/gold/std",
        "disagreement": "rewards/proxy/disagreement",
        "length": "completions/mean_length",
        "eos": "completions/eos_rate",
        "entropy": "policy/entropy",
    }
    logs = [entry for entry in trainer.state.log_history if "objective/kl" in entry]
    return [
        {name: round(float(entry[key]), 4) for name, key in names.items() if key in entry}
        | {"gold_64": round(mean, 4)}
        for entry, mean in zip(logs, few, strict=True)
    ]


class Watch(TrainerCallback):
    """
    Measure a policy by its samples on held-out prompts after some steps.

    Args:
        reward (`ModelReward`): the proxy.
        questions (`Sequence[str]`): held-out prompts, one completion each.
        steps (`Sequence[int]`): the steps.

    Attributes:
        points (`list[Point]`): `step`, `kl`, `proxy` and `gold`.
    """

    def __init__(self, reward: ModelReward, questions: Sequence[str], steps: Sequence[int]):
        self.reward, self.questions, self.steps = reward, list(questions), set(steps)
        self.first = load_model(POLICY, dtype="float32").eval()
        self.tokenizer = load_tokenizer(POLICY)
        self.points: list[Point] = []

    def on_train_begin(self, args, state, control, model: Any = None, **kwargs):
        self.measure(model, 0)

    def on_step_end(self, args, state, control, model: Any = None, **kwargs):
        if state.global_step in self.steps:
            self.measure(model, state.global_step)

    def measure(self, model: PreTrainedModel, step: int) -> None:
        """Add a point."""
        starts = [prompt_ids(self.tokenizer, chat(text)) for text in self.questions]
        model.eval()
        written = sample(model, self.tokenizer, starts, LONGEST, 1.0, 256, seed=step)
        now, before = (
            torch.stack([found.logps.sum() for found in token_statistics(each, starts, written, 1.0, 256)])
            for each in (model, self.first)
        )
        model.train()
        samples = rated(self.tokenizer, self.questions, starts, written)
        proxy = self.reward.score_ids([list(each.ids) for each in samples])
        gold = [each.gold for each in samples]
        values = {"kl": float((now - before).mean()), "proxy": fmean(proxy), "gold": fmean(gold)}
        self.points.append({"step": step} | {name: round(value, 4) for name, value in values.items()})


def dpo(
    reward: ModelReward,
    pairs: Sequence[Pair],
    questions: Sequence[str],
    steps: Sequence[int],
    beta: float,
    rate: float,
    seed: int,
) -> list[Point]:
    """Train the first policy by DPO on comparisons, and return the points of [`Watch`] after `steps`."""
    tokenizer = load_tokenizer(POLICY)
    texts = [[_answer(tokenizer, each) for each in pair] for pair in pairs]
    rows = {
        "prompt": [chat(better.prompt) for better, _ in pairs],
        "chosen": [better for better, _ in texts],
        "rejected": [worse for _, worse in texts],
    }
    watch = Watch(reward, questions, steps)
    with tempfile.TemporaryDirectory() as folder:
        args = DPOConfig(
            folder,
            per_device_train_batch_size=32,
            max_steps=max(steps),
            beta=beta,
            learning_rate=rate,
            lr_scheduler_type="constant",
            max_length=256,
            seed=seed,
            **quiet(),
        )
        trainer = DPOTrainer(
            load_model(POLICY, dtype="float32"),
            args=args,
            train_dataset=Dataset.from_dict(rows),
            processing_class=tokenizer,
            callbacks=[watch],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return watch.points


def _answer(tokenizer: PreTrainedTokenizerBase, each: Sample) -> list[dict[str, str]]:
    text = str(tokenizer.decode(list(each.ids[each.start :]), skip_special_tokens=True))
    return [{"role": "assistant", "content": text}]
