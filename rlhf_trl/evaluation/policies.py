"""Comparison of policies on the same held-out prompts (`stage=evaluate`)."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from datasets import Dataset
from tqdm import tqdm

from rlhf_trl.data.chat_template import template_kwargs
from rlhf_trl.data.images import decode_images
from rlhf_trl.data.messages import as_text
from rlhf_trl.data.multimodal import thumbnail
from rlhf_trl.data.tokenize import end_tokens, split_row_ids
from rlhf_trl.errors import ConfigError
from rlhf_trl.evaluation.columns import slice_columns
from rlhf_trl.evaluation.differences import policy_differences, prompt_slices
from rlhf_trl.evaluation.fronts import front_rewards, policy_front
from rlhf_trl.evaluation.generation import (
    Policy,
    TokenStatistics,
    load_policy,
    sample,
    sample_in_turns,
    token_statistics,
)
from rlhf_trl.evaluation.judges import Answers, Judge, Verdicts
from rlhf_trl.evaluation.rewards import COMBINED, as_arrays, combine_scores, score
from rlhf_trl.evaluation.statistics import (
    best_of_n,
    best_of_n_kl,
    bootstrap_mean,
    bradley_terry,
    distinct_n,
    length_controlled_win_rate,
    paired_difference,
    repetition,
    win_rate,
)
from rlhf_trl.report.fronts import FrontOptions
from rlhf_trl.rewards.base import Reward
from rlhf_trl.rewards.combine import weighted_sum
from rlhf_trl.rewards.constraints import Bound
from rlhf_trl.runs.results import (
    BestOfN,
    BestOfNCurve,
    BestOfNPoint,
    Comparison,
    ConstraintResult,
    PolicyResult,
    PromptSample,
)

NOT_DRAWN = (
    "At `stage.temperature=0` answers are the likeliest ones and no draws from a policy, so KL and entropy can't be "
    "estimated from them. Set `stage.temperature=1` for these."
)


class Candidate(NamedTuple):
    """Folder or hub id of a policy to evaluate, and the name it shares with its checkpoints or its sweep's runs."""

    path: str
    family: str


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """
    Held-out prompts, the sampling of completions for them, and the rewards that score these.

    Attributes:
        dataset: rows with `prompt` and whatever columns the rewards read.
        rewards: as in `rlhf_trl.rewards`; those of weight 0 are reported beside the combined reward. Without any, the
            judge alone compares.
        combine: function of `rlhf_trl.rewards.combine`, which makes one reward of all.
        constraints: bounds of the means of rewards that are reported, by reward, such as `">= 0.5"`.
        temperature, max_completion_length, batch_size, seed: see [`~rlhf_trl.evaluation.generation.sample`].
    """

    dataset: Dataset
    rewards: Sequence[Reward]
    combine: Callable = weighted_sum
    constraints: Mapping[str, str] = field(default_factory=dict)
    temperature: float
    max_completion_length: int
    batch_size: int
    seed: int

    @property
    def columns(self) -> dict[str, list]:
        """The columns of the data besides prompts and completions."""
        return _columns(self.dataset)

    def prompt_ids(self, policy: Policy) -> list[list[int]]:
        """Return the token ids of the prompts, as training gives them to the policy."""
        rows = cast(Iterable[dict[str, Any]], decode_images(self.dataset, False))
        return [policy.ids(row["prompt"], **template_kwargs(row)) for row in rows]

    def scored(self, policy: Policy, dataset: Dataset, completion_ids: list[list[int]]) -> Answers:
        """Return a policy's completions for the prompts of `dataset` with their rewards."""
        prompts = dataset["prompt"][:]
        completions = [policy.completion(prompt, ids) for prompt, ids in zip(prompts, completion_ids, strict=True)]
        columns = _columns(dataset)
        scores = score(self.rewards, prompts, completions, completion_ids, columns, policy.tokenizer)
        rewards = as_arrays(scores)
        if self.rewards:
            rewards[COMBINED] = combine_scores(scores, self.rewards, self.combine)
        return Answers([as_text(completion) for completion in completions], rewards)


def _columns(dataset: Dataset) -> dict[str, list]:
    dataset = decode_images(dataset, False)  # which of all prompts at once could fill the memory
    return {name: dataset[name][:] for name in dataset.column_names if name not in ("prompt", "completion")}


def evaluate_policies(
    candidates: Mapping[str, Candidate],
    baseline: str,
    benchmark: Benchmark,
    judge: Judge,
    dtype: str | None,
    samples: int = 0,
    samples_batch_size: int | None = None,
    references: Dataset | None = None,
    slices: Sequence[str] | None = None,
    front: FrontOptions | None = None,
) -> Comparison:
    """
    Compare policies by one completion per prompt of each, sampled with the same prompts and seed.

    Args:
        candidates (`dict[str, Candidate]`):
            By name. One whose vocabulary is not the baseline's has no KL to it; its result says so under `missing`.
        baseline (`str`):
            Name of the policy that differences, win rates and KL are relative to.
        benchmark ([`Benchmark`]):
            Prompts, sampling and rewards.
        judge ([`~rlhf_trl.evaluation.judges.Judge`]):
            Judge of the win rates.
        dtype (`str`, *optional*):
            Type of the weights. Unset, bfloat16 where the device supports it.
        samples (`int`):
            Completions per prompt of the baseline, of which best-of-n is measured; 0: none.
        samples_batch_size (`int`, *optional*):
            Number of these at a time; `None`: the benchmark's.
        references (`Dataset`, *optional*):
            Rows with `prompt` and `completion` whose perplexity is measured.
        slices (`Sequence[str]`, *optional*):
            Columns of the data to part the prompts by; `None`: all with 2 to 20 different values.
        front ([`~rlhf_trl.report.fronts.FrontOptions`], *optional*):
            Options of the front by several rewards; `None`: the rewards that count, and the knee.

    Returns:
        [`~rlhf_trl.runs.results.Comparison`]: content of `comparison.json`.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if no prompt has a reward from every policy, or a column of `slices` or a
            reward of `front` is missing.
    """
    columns = slice_columns(benchmark.columns, slices)
    options = front or FrontOptions()
    objectives = front_rewards(benchmark.rewards, options)
    answers, results, curves = {}, {}, None
    base = load_policy(baseline, candidates[baseline].path, dtype)
    for name, candidate in tqdm(candidates.items(), desc="evaluating", unit="policy"):
        policy = base if name == baseline else load_policy(name, candidate.path, dtype)
        answers[name], results[name] = evaluate_policy(policy, candidate, base, benchmark)
        if policy is base and samples and benchmark.temperature > 0:
            drawn = draw_many(base, benchmark, samples, samples_batch_size)
            curves = best_of_n_curves(drawn, benchmark.rewards)
        if references is not None:
            found = perplexity(policy, references, benchmark.batch_size)
            results[name] = replace(results[name], reference_perplexity=found)
        del policy  # one at a time besides the baseline
    kept, valid = paired(answers)
    for name, result in results.items():
        base_answers = kept[baseline] if name != baseline else None
        result = with_rewards(result, kept[name], base_answers, benchmark.rewards)
        results[name] = replace(result, constraints=constraint_results(kept[name], benchmark.constraints))
    prompts = [as_text(prompt) for prompt in benchmark.dataset["prompt"]]
    verdicts = judge_pairs(
        judge, [prompt for prompt, keep in zip(prompts, valid, strict=True) if keep], kept, baseline
    )
    for (name, other), verdict in verdicts.items():
        if other == baseline:
            results[name] = with_wins(results[name], verdict, kept[name].texts, kept[baseline].texts)
    rewards = {name: each.rewards[COMBINED] for name, each in kept.items()} if benchmark.rewards else {}
    columns = {name: np.array(values, dtype=object)[valid] for name, values in columns.items()}
    outcomes = {pair: verdict.outcomes for pair, verdict in verdicts.items()}
    return Comparison(
        baseline=baseline,
        prompts=int(valid.sum()),
        dropped=int((~valid).sum()),
        seed=benchmark.seed,
        temperature=benchmark.temperature,
        max_completion_length=benchmark.max_completion_length,
        judge=judge.name,
        combine=getattr(benchmark.combine, "func", benchmark.combine).__name__,
        weights={reward.__name__: reward.weight for reward in benchmark.rewards},
        policies=results,
        bradley_terry=bradley_terry(outcomes, list(candidates), baseline) if len(candidates) > 2 else {},
        best_of_n=curves,
        differences=policy_differences(list(candidates), baseline, rewards, outcomes),
        slices=prompt_slices(rewards, columns, baseline),
        front=policy_front(kept, results, objectives, options) if objectives else None,
        samples=prompt_samples(prompts, answers, benchmark.columns.get("images")),
    )


def evaluate_policy(
    policy: Policy, candidate: Candidate, base: Policy, benchmark: Benchmark
) -> tuple[Answers, PolicyResult]:
    """
    Sample and score a policy's completions.

    Args:
        policy, base ([`~rlhf_trl.evaluation.generation.Policy`]): the policy, and the baseline, which may be it.

    Returns:
        `tuple[Answers, PolicyResult]`: the completions with their rewards, and statistics of them without the rewards.
    """
    prompts = benchmark.prompt_ids(policy)
    sampling = {"temperature": benchmark.temperature, "batch_size": benchmark.batch_size}
    ids = sample(
        policy.model,
        policy.tokenizer,
        prompts,
        benchmark.max_completion_length,
        seed=benchmark.seed,
        **sampling,
    )
    answers = benchmark.scored(policy, benchmark.dataset, ids)
    own = token_statistics(policy.model, prompts, ids, **sampling) if benchmark.temperature > 0 else None
    result = PolicyResult(
        path=candidate.path,
        family=candidate.family,
        parameters=policy.model.num_parameters(),
        completion_length=float(np.mean([len(row) for row in ids])),
        eos_rate=float(np.mean([row[-1] in end_tokens(policy.tokenizer) for row in ids])),
        entropy=float(torch.cat([row.entropy for row in own]).mean()) if own else None,
        distinct_1=distinct_n(answers.texts, 1),
        distinct_2=distinct_n(answers.texts, 2),
        repetition=repetition(answers.texts),
    )
    # Completions that weren't drawn have a perplexity too, under the baseline's own distribution
    under_baseline = functools.partial(
        token_statistics, base.model, prompts, ids, **sampling | {"temperature": benchmark.temperature or 1.0}
    )
    if policy is base:
        return answers, replace(result, baseline_perplexity=perplexity_of(own or under_baseline()))
    if policy.tokenizer.get_vocab() != base.tokenizer.get_vocab():
        why = (
            f"`{policy.name}` has another vocabulary than the baseline `{base.name}`, so its KL to it can't be "
            "computed."
        )
        return answers, replace(result, missing={"kl": why if own else NOT_DRAWN})
    if own is None:
        perplexity = perplexity_of(under_baseline())
        return answers, replace(result, baseline_perplexity=perplexity, missing={"kl": NOT_DRAWN})
    return answers, with_kl(result, own, under_baseline())


def paired(answers: Mapping[str, Answers]) -> tuple[dict[str, Answers], np.ndarray]:
    """
    Drop the prompts whose combined reward is missing for one policy: the comparison is paired.

    Returns:
        `tuple[dict[str, Answers], np.ndarray]`: the other answers, and which prompts they are of, shape (P,).

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if none is left.
    """
    valid = np.all([_has_reward(each) for each in answers.values()], axis=0)
    if not valid.any():
        raise ConfigError("No prompt has a finite reward for every policy. Fix the reward functions.")
    return {name: each.subset(valid) for name, each in answers.items()}, valid


def _has_reward(answers: Answers) -> np.ndarray:
    """Return which answers have a combined reward, shape (P,): all, where nothing is rewarded."""
    return np.isfinite(answers.rewards[COMBINED]) if answers.rewards else np.ones(len(answers.texts), dtype=bool)


def judge_pairs(
    judge: Judge, prompts: Sequence[str], answers: Mapping[str, Answers], baseline: str
) -> dict[tuple[str, str], Verdicts]:
    """Judge each policy against the baseline, and the others against each other where the judge is to."""
    others = [name for name in answers if name != baseline]
    pairs = [(name, baseline) for name in others] + (list(combinations(others, 2)) if judge.all_pairs else [])
    return {(one, other): judge.compare(prompts, answers[one], answers[other]) for one, other in pairs}


def with_kl(
    result: PolicyResult, own: Sequence[TokenStatistics], reference: Sequence[TokenStatistics]
) -> PolicyResult:
    """
    Return a result with the perplexity of the policy's own samples under the baseline, and with KL(policy || baseline)
    from them, in nats: summed over a completion, and per token, by the estimators k1 and k3. Both are unbiased; k3 is
    never negative (Schulman, "Approximating KL divergence").
    """
    ratios = [(a.logps - b.logps).double().numpy() for a, b in zip(own, reference, strict=True)]
    k3 = [np.exp(-ratio) - 1 + ratio for ratio in ratios]
    tokens = sum(map(len, ratios))
    return replace(
        result,
        kl=bootstrap_mean(np.array([ratio.sum() for ratio in ratios])),
        kl_k3=bootstrap_mean(np.array([each.sum() for each in k3])),
        kl_per_token=float(np.concatenate(ratios).sum() / tokens),
        kl_k3_per_token=float(np.concatenate(k3).sum() / tokens),
        baseline_perplexity=perplexity_of(reference),
    )


def perplexity_of(rows: Sequence[TokenStatistics]) -> float:
    """Return exp of the mean loss over the tokens of completions."""
    return float(torch.cat([row.logps for row in rows]).double().mean().neg().exp())


def perplexity(policy: Policy, rows: Dataset, batch_size: int) -> float:
    """Return exp of the mean loss over the tokens of the rows' completions, the end token among them."""
    parts = [
        split_row_ids(policy.tokenizer, row["prompt"], row["completion"], **template_kwargs(row))
        for row in cast(Iterable[dict[str, Any]], decode_images(rows, False))
    ]
    starts, ends = zip(*parts, strict=True)
    return perplexity_of(token_statistics(policy.model, starts, ends, temperature=1.0, batch_size=batch_size))


def with_rewards(
    result: PolicyResult, answers: Answers, baseline: Answers | None, rewards: Sequence[Reward]
) -> PolicyResult:
    """
    Return a result with the combined reward, each single one, and the paired difference to the baseline; without
    rewards as it is.
    """
    if not rewards:
        return result
    single = {reward.__name__: answers.rewards[reward.__name__] for reward in rewards}
    finite = {name: values[np.isfinite(values)] for name, values in single.items()}
    combined = answers.rewards[COMBINED]
    return replace(
        result,
        reward=bootstrap_mean(combined),
        rewards={name: float(values.mean()) if len(values) else None for name, values in finite.items()},
        reward_intervals={name: bootstrap_mean(values) if len(values) else None for name, values in finite.items()},
        reward_std={name: float(values.std()) if len(values) else None for name, values in finite.items()},
        difference=paired_difference(combined, baseline.rewards[COMBINED]) if baseline else None,
    )


def constraint_results(answers: Answers, constraints: Mapping[str, str]) -> dict[str, ConstraintResult]:
    """Return how far a policy's completions satisfy bounds of the means of rewards, by reward."""
    found = {}
    for name, text in constraints.items():
        bound = Bound.parse(text)
        values = answers.rewards[name][np.isfinite(answers.rewards[name])]
        value = bootstrap_mean(values) if len(values) else None
        ends = sorted(bound.excess(end) for end in value[1:]) if value else (None, None)
        found[name] = ConstraintResult(
            bound=str(bound),
            value=value,
            violation_rate=float((bound.excess(values) > 0).mean()) if len(values) else None,
            excess=bound.excess(value.mean) if value else None,
            excess_low=ends[0],
            excess_high=ends[1],
        )
    return found


def with_wins(result: PolicyResult, verdicts: Verdicts, texts: Sequence[str], baseline: Sequence[str]) -> PolicyResult:
    """Return a result with the win rate over the judged prompts, as it is and at equal length (in characters)."""
    result = replace(
        result,
        judgements=verdicts.judgements,
        unclear=verdicts.unclear,
        position_bias=verdicts.first,
        order_agreement=verdicts.agreement,
    )
    judged = np.isfinite(verdicts.outcomes)
    if not judged.any():
        return result
    outcomes = verdicts.outcomes[judged]
    lengths = np.array([len(a) - len(b) for a, b in zip(texts, baseline, strict=True)])[judged]
    return replace(
        result,
        win_rate=win_rate(outcomes),
        length_controlled_win_rate=length_controlled_win_rate(outcomes, lengths),
        tie_rate=float((outcomes == 0.5).mean()),
    )


def prompt_samples(
    prompts: Sequence[str], answers: Mapping[str, Answers], images: Sequence[Sequence] | None = None
) -> list[PromptSample]:
    """Return every prompt, with its images, and the policies' completions and their combined rewards."""
    finite = {
        name: [float(value) if np.isfinite(value) else None for value in each.rewards[COMBINED]]
        if each.rewards
        else [None] * len(each.texts)
        for name, each in answers.items()
    }
    return [
        PromptSample(
            prompt=prompt,
            completions={name: each.texts[row] for name, each in answers.items()},
            rewards={name: values[row] for name, values in finite.items()},
            images=list(map(thumbnail, images[row])) if images else None,
        )
        for row, prompt in enumerate(prompts)
    ]


# ---- Best of n ----


def draw_many(
    policy: Policy, benchmark: Benchmark, samples: int, batch_size: int | None = None
) -> dict[str, np.ndarray]:
    """
    Score `samples` completions per prompt by each reward.

    Returns:
        `dict[str, np.ndarray]`: arrays of shape (P, samples), the combined reward under `COMBINED`.
    """
    prompts = benchmark.prompt_ids(policy)
    rows = np.repeat(np.arange(len(prompts)), samples)
    # Other draws than those of the comparison: the baseline must not be measured against itself
    ids = sample_in_turns(
        policy.model,
        policy.tokenizer,
        [prompts[row] for row in rows],
        benchmark.max_completion_length,
        temperature=benchmark.temperature,
        batch_size=batch_size or benchmark.batch_size,
        seed=benchmark.seed + 1,
    )
    answers = benchmark.scored(policy, benchmark.dataset.select(rows), ids)
    return {name: values.reshape(len(prompts), samples) for name, values in answers.rewards.items()}


def best_of_n_curves(drawn: Mapping[str, np.ndarray], rewards: Sequence[Reward]) -> BestOfN:
    """
    Return the combined reward of the best of n samples, for n = 1, 2, 4 ... up to those at hand, with its KL: chosen
    by the combined reward itself, and by each reward of weight 0, whose own mean is given too (`chosen_by`).
    """
    samples = drawn[COMBINED].shape[1]
    curves = []
    for name in [COMBINED, *(reward.__name__ for reward in rewards if reward.weight == 0)]:
        valid = np.isfinite(drawn[COMBINED]).all(axis=1) & np.isfinite(drawn[name]).all(axis=1)
        if not valid.any():
            continue
        by, worth = drawn[name][valid], drawn[COMBINED][valid]
        points = [
            BestOfNPoint(
                n=n,
                kl=best_of_n_kl(n),
                reward=bootstrap_mean(best_of_n(by, worth, n), resamples=1000),
                chosen_by=float(best_of_n(by, by, n).mean()),
            )
            for n in (2**i for i in range(samples.bit_length()))
        ]
        curves.append(BestOfNCurve(by=name, points=points))
    return BestOfN(samples=samples, curves=curves)
