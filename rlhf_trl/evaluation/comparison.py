"""Policies side by side on the same held-out prompts: what they gained, and what it cost (`stage=evaluate`)."""

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_trl.data.chat_template import template_columns, template_kwargs
from rlhf_trl.data.messages import as_text
from rlhf_trl.data.tokenize import end_tokens, prompt_ids, split_row_ids
from rlhf_trl.errors import ConfigError
from rlhf_trl.evaluation.generation import TokenStatistics, sample, sample_in_turns, token_statistics
from rlhf_trl.evaluation.judges import Answers, Verdicts
from rlhf_trl.evaluation.statistics import (
    best_of_n,
    best_of_n_kl,
    bootstrap_mean,
    bradley_terry,
    distinct_n,
    length_controlled_win_rate,
    paired_difference,
    repetition,
)
from rlhf_trl.models.loading import load_model
from rlhf_trl.models.tokenizers import load_tokenizer
from rlhf_trl.rewards.combine import combined, reward_array, weighted_sum

NOT_DRAWN = (
    "At `stage.temperature=0` answers are the likeliest ones and no draws from a policy, so KL and entropy can't be "
    "estimated from them. Type `stage.temperature=1` for these."
)


class Policy(NamedTuple):
    """Folder or hub id of a policy, and the name it shares with its checkpoints, or with the runs of its sweep."""

    path: str
    family: str


def evaluate_policies(
    policies: dict[str, Policy],
    baseline: str,
    dataset: Dataset,
    rewards: Sequence[Callable],
    judge,
    temperature: float,
    max_completion_length: int,
    batch_size: int,
    dtype: str,
    seed: int,
    samples: int = 0,
    best_of_n_batch_size: int | None = None,
    references: Dataset | None = None,
    combine: Callable = weighted_sum,
) -> dict:
    """
    Samples one completion a prompt from each policy, with the same prompts and seed, and compares them.

    Args:
        policies (`dict[str, Policy]`):
            By name. One whose vocabulary is not the baseline's has no KL to it; the entry says so under `gaps`.
        baseline (`str`):
            Name of the policy that differences, win rates and KL are taken to.
        dataset (`Dataset`):
            Rows with `prompt` and whatever columns the reward functions read.
        rewards (`Sequence[Callable]`):
            Rewards as in `rlhf_trl.rewards.model`; those of weight 0 are shown beside the reward.
        judge:
            From `rlhf_trl.evaluation.judges`.
        temperature (`float`), max_completion_length (`int`), batch_size (`int`), seed (`int`):
            See [`~rlhf_trl.evaluation.generation.sample`].
        dtype (`str`):
            Type of the weights.
        samples (`int`):
            Completions a prompt of the baseline, of which the best of n is measured; 0: none.
        best_of_n_batch_size (`int`, *optional*):
            How many of these at a time; `None`: `batch_size`.
        references (`Dataset`, *optional*):
            Rows with `prompt` and `completion` whose perplexity is measured.
        combine (`Callable`):
            Makes a completion's reward of all of them, see `rlhf_trl.rewards.combine`.

    Returns:
        `dict`: what `comparison.json` holds.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if no prompt has a reward from every policy.
    """
    sampling = {"temperature": temperature, "batch_size": batch_size}
    answers, entries, drawn = {}, {}, None
    reference = load_policy(policies[baseline].path, dtype)
    base_tokenizer = load_tokenizer(policies[baseline].path)
    for name, policy in tqdm(policies.items(), desc="evaluating", unit="policy"):
        tokenizer = load_tokenizer(policy.path)
        model = reference if name == baseline else load_policy(policy.path, dtype)
        prompts = [prompt_ids(tokenizer, row["prompt"], **template_kwargs(row)) for row in dataset]
        written = sample(model, tokenizer, prompts, max_completion_length, seed=seed, **sampling)
        texts = _as_completions(tokenizer, dataset["prompt"], written)
        scores = score(rewards, dataset, texts, written, tokenizer)
        total = combined(scores, rewards, combine)
        answers[name] = Answers([as_text(text) for text in texts], {**scores, "": total})
        own = token_statistics(model, prompts, written, **sampling) if temperature > 0 else None
        entries[name] = entry = {
            "path": policy.path,
            "family": policy.family,
            "completion_length": float(np.mean([len(ids) for ids in written])),
            "eos_rate": float(np.mean([ids[-1] in end_tokens(tokenizer) for ids in written])),
            "entropy": float(torch.cat([row.entropy for row in own]).mean()) if own else None,
            **text_statistics(answers[name].texts),
            "kl": None,
            "gaps": {},
        }
        if name == baseline:
            if samples and own:
                many = {"temperature": temperature, "batch_size": best_of_n_batch_size or batch_size}
                drawn = draw_many(
                    model, tokenizer, prompts, dataset, rewards, samples, max_completion_length, seed, many, combine
                )
        elif own is None:
            entry["gaps"]["kl"] = NOT_DRAWN
        elif tokenizer.get_vocab() != base_tokenizer.get_vocab():
            entry["gaps"]["kl"] = (
                f"`{name}` has another vocabulary than the baseline `{baseline}`, so its KL to it can't be computed."
            )
        else:
            entry.update(kl_statistics(own, token_statistics(reference, prompts, written, **sampling)))
        if references is not None:
            entry["reference_perplexity"] = perplexity(model, tokenizer, references, batch_size)
        del model
    totals = {name: each.rewards[""] for name, each in answers.items()}
    # A prompt whose reward is missing for one policy is left out for all: the comparison is paired
    valid = np.all([np.isfinite(total) for total in totals.values()], axis=0)
    if not valid.any():
        raise ConfigError("No prompt has a finite reward for every policy. Mend the reward functions.")
    kept = {name: _rows(each, valid) for name, each in answers.items()}
    asked = [as_text(prompt) for prompt, keep in zip(dataset["prompt"], valid, strict=True) if keep]
    outcomes = {}
    for name, entry in entries.items():
        entry.update(reward_statistics(kept[name], kept[baseline] if name != baseline else None, rewards))
        entry["win_rate"] = None
        if name != baseline:
            verdicts = judge.compare(asked, kept[name], kept[baseline])
            outcomes[name, baseline] = verdicts.outcomes
            entry.update(win_statistics(verdicts, kept[name].texts, kept[baseline].texts))
    if judge.all_pairs:
        others = [name for name in policies if name != baseline]
        for one, other in combinations(others, 2):
            outcomes[one, other] = judge.compare(asked, kept[one], kept[other]).outcomes
    ranking = bradley_terry(outcomes, list(policies), baseline) if len(policies) > 2 else {}
    return {
        "baseline": baseline,
        "prompts": int(valid.sum()),
        "left_out": int((~valid).sum()),
        "seed": seed,
        "temperature": temperature,
        "max_completion_length": max_completion_length,
        "judge": judge.name,
        "combine": getattr(combine, "func", combine).__name__,
        "weights": {reward.__name__: reward.weight for reward in rewards},
        "policies": entries,
        "bradley_terry": {name: strength and strength._asdict() for name, strength in ranking.items()},
        "best_of_n": best_of_n_curves(drawn, rewards) if drawn else None,
        "samples": [
            {
                "prompt": as_text(dataset[row]["prompt"]),
                "completions": {name: answers[name].texts[row] for name in policies},
                "rewards": {name: float(totals[name][row]) for name in policies},
            }
            for row in range(len(dataset))
        ],
    }


def text_statistics(texts: Sequence[str]) -> dict[str, float]:
    """How varied a policy's texts are."""
    return {"distinct_1": distinct_n(texts, 1), "distinct_2": distinct_n(texts, 2), "repetition": repetition(texts)}


def kl_statistics(own: Sequence[TokenStatistics], reference: Sequence[TokenStatistics]) -> dict[str, Any]:
    """
    KL(policy || baseline) from the policy's own samples, in nats: summed over a sequence (k1 in `kl`, k3 in `kl_k3`),
    and a token. Both estimators are without bias; k3 is never negative (Schulman, "Approximating KL divergence").
    """
    ratios = [(a.logps - b.logps).double().numpy() for a, b in zip(own, reference, strict=True)]
    k3 = [np.exp(-ratio) - 1 + ratio for ratio in ratios]
    tokens = sum(map(len, ratios))
    return {
        "kl": bootstrap_mean(np.array([ratio.sum() for ratio in ratios]))._asdict(),
        "kl_k3": bootstrap_mean(np.array([each.sum() for each in k3]))._asdict(),
        "kl_per_token": float(np.concatenate(ratios).sum() / tokens),
        "kl_k3_per_token": float(np.concatenate(k3).sum() / tokens),
    }


def perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset, batch_size: int) -> float:
    """exp of the mean loss over the tokens of the rows' completions, the end token among them."""
    parts = [split_row_ids(tokenizer, row["prompt"], row["completion"], **template_kwargs(row)) for row in rows]
    starts, ends = zip(*parts, strict=True)
    found = token_statistics(model, starts, ends, temperature=1.0, batch_size=batch_size)
    return float(torch.cat([row.logps for row in found]).double().mean().neg().exp())


def reward_statistics(answers: Answers, baseline: Answers | None, rewards: Sequence[Callable]) -> dict[str, Any]:
    """The reward with its interval, each one that it is made of, and the paired difference to the baseline."""
    single = {reward.__name__: answers.rewards[reward.__name__] for reward in rewards}
    finite = {name: values[np.isfinite(values)] for name, values in single.items()}
    return {
        "reward": bootstrap_mean(answers.rewards[""])._asdict(),
        "rewards": {name: float(values.mean()) if len(values) else None for name, values in finite.items()},
        "reward_intervals": {name: bootstrap_mean(v)._asdict() if len(v) else None for name, v in finite.items()},
        "reward_std": {name: float(values.std()) if len(values) else None for name, values in finite.items()},
        "difference": paired_difference(answers.rewards[""], baseline.rewards[""])._asdict() if baseline else None,
    }


def win_statistics(verdicts: Verdicts, texts: Sequence[str], baseline: Sequence[str]) -> dict[str, Any]:
    """The win rate over the prompts that have a verdict, as it is and at equal length (in characters)."""
    judged = np.isfinite(verdicts.outcomes)
    found = {
        "win_rate": None,
        "judgements": verdicts.judgements,
        "unclear": verdicts.unclear,
        "position_bias": verdicts.first,
        "order_agreement": verdicts.agreement,
    }
    if judged.any():
        outcomes = verdicts.outcomes[judged]
        lengths = np.array([len(a) - len(b) for a, b in zip(texts, baseline, strict=True)])[judged]
        found["win_rate"] = bootstrap_mean(outcomes)._asdict()
        found["length_controlled_win_rate"] = length_controlled_win_rate(outcomes, lengths)._asdict()
        found["tie_rate"] = float((outcomes == 0.5).mean())
    return found


def draw_many(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    dataset: Dataset,
    rewards: Sequence[Callable],
    samples: int,
    max_completion_length: int,
    seed: int,
    sampling: dict[str, Any],
    combine: Callable = weighted_sum,
) -> dict[str, np.ndarray]:
    """Each reward of `samples` completions a prompt, shape (P, samples); `""` is what they are combined to."""
    rows = np.repeat(np.arange(len(dataset)), samples)
    # Others than those of the comparison: the baseline shall not be measured against itself
    starts = [prompts[row] for row in rows]
    written = sample_in_turns(model, tokenizer, starts, max_completion_length, seed=seed + 1, **sampling)
    many = dataset.select(rows)
    scores = score(rewards, many, _as_completions(tokenizer, many["prompt"], written), written, tokenizer)
    scores[""] = combined(scores, rewards, combine)
    return {name: values.reshape(len(dataset), samples) for name, values in scores.items()}


def best_of_n_curves(drawn: dict[str, np.ndarray], rewards: Sequence[Callable]) -> dict[str, Any]:
    """
    The reward of the baseline's best of n, for n = 1, 2, 4 ... up to the samples at hand, with the KL that it costs:
    chosen by the reward itself, and by each reward of weight 0, which is then also measured (`chosen_by`).
    """
    samples = drawn[""].shape[1]
    curves = []
    for name in ["", *(reward.__name__ for reward in rewards if reward.weight == 0)]:
        valid = np.isfinite(drawn[""]).all(axis=1) & np.isfinite(drawn[name]).all(axis=1)
        if not valid.any():
            continue
        by, worth = drawn[name][valid], drawn[""][valid]
        curves.append(
            {
                "by": name,
                "points": [
                    {
                        "n": n,
                        "kl": best_of_n_kl(n),
                        "reward": bootstrap_mean(best_of_n(by, worth, n), resamples=1000)._asdict(),
                        "chosen_by": float(best_of_n(by, by, n).mean()),
                    }
                    for n in (2**i for i in range(samples.bit_length()))
                ],
            }
        )
    return {"samples": samples, "curves": curves}


def load_policy(path: str, dtype: str):
    return load_model(path, dtype=dtype).eval().to(PartialState().device)


def _rows(answers: Answers, keep: np.ndarray) -> Answers:
    texts = [text for text, kept in zip(answers.texts, keep, strict=True) if kept]
    return Answers(texts, {name: values[keep] for name, values in answers.rewards.items()})


def _as_completions(tokenizer: PreTrainedTokenizerBase, prompts: Sequence, ids: Sequence[list[int]]) -> list:
    """Texts, or one assistant message each where the prompts are chats: as TRL hands them to reward functions."""
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    chat = not isinstance(prompts[0], str)
    return [[{"role": "assistant", "content": text}] for text in texts] if chat else texts


def score(
    rewards: Sequence[Callable],
    dataset: Dataset,
    completions: list,
    completion_ids: list[list[int]],
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> dict[str, np.ndarray]:
    """
    Values of each reward, shape (P,): NaN where it doesn't apply (`None`), infinite where it isn't finite.

    `tokenizer` is that of the ids; policies may have different ones.
    """
    columns = {name: dataset[name][:] for name in dataset.column_names if name not in ("prompt", "completion")}
    if tokenizer is not None:
        columns = template_columns(tokenizer, columns, len(dataset))
    scores = {}
    for reward in rewards:
        reward.bind(tokenizer)
        values = reward(
            prompts=dataset["prompt"][:], completions=completions, completion_ids=completion_ids, **columns
        )
        scores[reward.__name__] = reward_array(values)
    return scores
