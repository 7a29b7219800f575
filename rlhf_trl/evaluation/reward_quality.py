"""Evaluation of rewards on annotated completions (`stage=evaluate_reward`)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from rlhf_trl.data.images import decode_images
from rlhf_trl.data.messages import as_text
from rlhf_trl.data.multimodal import thumbnail
from rlhf_trl.errors import ConfigError
from rlhf_trl.evaluation import rewardbench
from rlhf_trl.evaluation.annotations import Annotations, slices_of
from rlhf_trl.evaluation.generation import Policy
from rlhf_trl.evaluation.policies import Benchmark, draw_many
from rlhf_trl.evaluation.reward_measures import (
    accuracy,
    best_of_n_gains,
    disagreement,
    quantile_curve,
    rater_ceiling,
    reliability,
    top_one,
    within,
)
from rlhf_trl.evaluation.rewards import as_arrays, score
from rlhf_trl.evaluation.statistics import pearson, spearman
from rlhf_trl.hints import count_of
from rlhf_trl.reward_modeling.border import border_ece
from rlhf_trl.rewards.base import Reward
from rlhf_trl.rewards.conditioned import counting
from rlhf_trl.rewards.model import ModelReward
from rlhf_trl.runs.reward_results import (
    BorderResult,
    Disagreement,
    LengthBias,
    Mistake,
    RatingCorrelation,
    Reliability,
    RewardQuality,
    RewardResult,
    SliceAccuracy,
)

MISTAKES = 5


def evaluate_rewards(
    annotations: Annotations,
    rewards: Sequence[Reward],
    gaps_above: Sequence[float] | None = None,
    slices: Sequence[str] | None = None,
    like_length: float = 0.1,
    bins: int = 10,
    gold: str | None = None,
) -> RewardQuality:
    """
    Evaluate rewards on annotated completions.

    Args:
        annotations (`Annotations`): completions with people's comparisons and ratings.
        rewards (`Sequence[Reward]`): as in `rlhf_trl.rewards`.
        gaps_above, slices, like_length, bins, gold: see conf/stage/evaluate_reward.yaml.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if a reward has no finite score for both completions of any comparison, or a
            slice can't be made.
    """
    parts = slices_of(annotations, gaps_above, slices, like_length)
    ceiling = rater_ceiling(annotations.ratings, annotations.better, annotations.worse)
    given = decode_images(annotations.of_completions(), False)
    columns = {name: given[name][:] for name in given.column_names if name not in ("prompt", "completion")}
    ids: list[list[int]] = [[] for _ in annotations.completions]
    scores = as_arrays(score(rewards, given["prompt"][:], annotations.completions, ids, columns))
    scores = {name: np.where(np.isfinite(values), values, np.nan) for name, values in scores.items()}
    truth = scores[gold] if gold is not None else annotations.mean_ratings if any(annotations.ratings) else None
    results = {}
    for reward in rewards:
        name = reward.__name__
        result = evaluate_reward(name, annotations, scores[name], parts, bins)
        if truth is not None and name != gold:
            gains = best_of_n_gains(scores[name], truth, np.array(annotations.prompt_numbers))
            result = replace(result, best_of_n=gains)
        model, rows = counting(reward, columns, len(annotations.completions))
        if isinstance(model, ModelReward) and model.members > 1:
            result = replace(result, disagreement=ensemble_disagreement(model, annotations, columns, rows))
        results[name] = result
    return RewardQuality(
        rows=len(annotations.of_row),
        prompts=len(set(annotations.prompt_numbers)),
        completions=len(annotations.completions),
        comparisons=len(annotations.row),
        raters=ceiling,
        gold=None if truth is None else gold or "people's mean ratings",
        longer_preferred=_longer_preferred(annotations, np.ones(len(annotations.row))),
        rewards=results,
        notes=_notes(annotations, has_ceiling=ceiling is not None),
    )


def _notes(annotations: Annotations, has_ceiling: bool) -> list[str]:
    notes, unrated = [], annotations.ratings.count([])
    if 0 < unrated < len(annotations.ratings):
        notes.append(f"{count_of(unrated, 'completion')} without a rating: dropped from comparisons with ratings")
    single = sum(len(each) == 1 for each in annotations.ratings)
    if single:
        notes.append(
            f"{count_of(single, 'completion')} with a single rating: they say nothing of the raters' agreement"
        )
    if not has_ceiling and any(annotations.ratings):
        notes.append("fewer than three completions have two raters: how well raters predict each other isn't known")
    return notes


def evaluate_reward(
    name: str, annotations: Annotations, scores: np.ndarray, slices: Mapping[str, np.ndarray], bins: int
) -> RewardResult:
    """
    Measure one reward's `scores` of the completions, shape (N,).

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if no comparison has finite scores.
    """
    margin = scores[annotations.better] - scores[annotations.worse]
    valid = ~np.isnan(margin)
    if not valid.any():
        raise ConfigError(
            f"The reward `{name}` has no finite score for both completions of any of "
            f"{count_of(len(margin), 'comparison')}, so nothing can be said of it. Fix it."
        )
    known = np.isfinite(scores)
    subsets = annotations.columns.get("subset", [])
    is_rewardbench = bool(rewardbench.SUBSETS.intersection(map(str, subsets)))
    return RewardResult(
        accuracy=accuracy(margin, annotations.row),
        completions_without_score=int((~known).sum()),
        comparisons_dropped=int((~valid).sum()),
        slices=[
            _slice(name, margin[part], annotations.row[part], reliability(margin[part], annotations.share[part], bins))
            for name, part in slices.items()
        ]
        + [
            _slice(f"more {name}", scores[better] - scores[worse], row)
            for name, (better, worse, row) in annotations.attribute_arrays().items()
        ],
        top_one=top_one(scores, annotations.of_row, *_winners_and_losers(annotations)),
        reliability=reliability(margin, annotations.share, bins),
        length=LengthBias(
            pearson=pearson(scores[known], annotations.lengths[known]),
            spearman=spearman(scores[known], annotations.lengths[known]),
            longer_preferred=_longer_preferred(annotations, margin),
            curve=quantile_curve(annotations.lengths[known], scores[known]),
        ),
        ratings=_rating_correlation(annotations, scores),
        mistakes=_mistakes(annotations, scores, margin),
        border=_border(annotations, scores),
        rewardbench=rewardbench.section_scores([subsets[row] for row in annotations.row], margin)
        if is_rewardbench
        else None,
    )


def _slice(name: str, margin: np.ndarray, row: np.ndarray, curve: Reliability | None = None) -> SliceAccuracy:
    n = int((~np.isnan(margin)).sum())
    return SliceAccuracy(name=name, n=n, accuracy=accuracy(margin, row), ece=curve.ece if curve and n else None)


def _rating_correlation(annotations: Annotations, scores: np.ndarray) -> RatingCorrelation | None:
    ratings, groups = annotations.mean_ratings, np.array(annotations.prompt_numbers)
    rated = np.isfinite(scores) & np.isfinite(ratings)
    if not rated.any():
        return None
    scores, ratings, groups = scores[rated], ratings[rated], groups[rated]
    return RatingCorrelation(
        completions=int(rated.sum()),
        pearson=pearson(scores, ratings),
        spearman=spearman(scores, ratings),
        pearson_within_prompts=pearson(within(scores, groups), within(ratings, groups)),
        curve=quantile_curve(ratings, scores),
    )


def _border(annotations: Annotations, scores: np.ndarray) -> BorderResult | None:
    labeled = np.isfinite(scores) & np.isfinite(annotations.sides)
    if not labeled.any():
        return None
    scores, sides = scores[labeled], annotations.sides[labeled]
    return BorderResult(
        completions=len(sides),
        safe=float((sides > 0).mean()),
        accuracy=accuracy(sides * scores, np.array(annotations.first_row)[labeled]),
        ece=border_ece(torch.from_numpy(scores), torch.from_numpy(sides)),
    )


def _winners_and_losers(annotations: Annotations) -> tuple[list[set[int]], list[set[int]]]:
    """Return the completions that win, and those that lose a comparison of each row."""
    better, worse = ([set() for _ in annotations.of_row] for _ in range(2))
    for row, a, b in zip(annotations.row, annotations.better, annotations.worse, strict=True):
        better[row].add(a)
        worse[row].add(b)
    return better, worse


def _longer_preferred(annotations: Annotations, margin: np.ndarray) -> float:
    """Return the share of comparisons of unequal lengths in which the longer completion has the higher score."""
    longer = np.sign(annotations.lengths[annotations.better] - annotations.lengths[annotations.worse])
    counted = (longer != 0) & ~np.isnan(margin)
    return float((0.5 + 0.5 * longer * np.sign(margin))[counted].mean()) if counted.any() else np.nan


def _mistakes(annotations: Annotations, scores: np.ndarray, margin: np.ndarray) -> list[Mistake]:
    """Return the comparisons with the lowest margins below 0."""
    order = np.argsort(np.where(np.isnan(margin), np.inf, margin), kind="stable")[:MISTAKES]
    shown = annotations.columns.get("images")
    return [
        Mistake(
            prompt=as_text(annotations.prompts[better]),
            preferred=as_text(annotations.completions[better]),
            other=as_text(annotations.completions[worse]),
            scores=[float(scores[better]), float(scores[worse])],
            rating_gap=float(annotations.rating_gap[m]),
            images=list(map(thumbnail, shown[annotations.row[m]])) if shown else None,
        )
        for m in order
        if margin[m] < 0
        for better, worse in [(annotations.better[m], annotations.worse[m])]
    ]


def ensemble_disagreement(
    reward: ModelReward, annotations: Annotations, columns: dict[str, list], counted: Sequence[int]
) -> Disagreement:
    """Measure how much the members of a reward model ensemble disagree about the completions `counted`."""
    count = len(annotations.completions)
    rows = reward.token_rows(annotations.prompts, annotations.completions, [[]] * count, [True] * count, columns)
    members = reward.member_scores(rows).numpy()
    members[:, ~np.isin(np.arange(count), counted)] = np.nan
    return disagreement(members, annotations.better, annotations.worse, annotations.row)


def with_policy_samples(
    quality: RewardQuality, policy: Policy, benchmark: Benchmark, gold: str, samples: int
) -> RewardQuality:
    """Return results with best-of-n among `samples` completions per prompt of a policy, in place of the data's."""
    drawn = draw_many(policy, benchmark, samples)
    prompts = np.repeat(np.arange(len(benchmark.dataset)), samples)
    results = {}
    for name, result in quality.rewards.items():
        if name != gold:
            gains = best_of_n_gains(drawn[name].ravel(), drawn[gold].ravel(), prompts)
            dropped = int((~(np.isfinite(drawn[name]) & np.isfinite(drawn[gold]))).sum())
            result = replace(result, best_of_n=gains, samples_without_score=dropped)
        results[name] = result
    return replace(quality, gold=f"{gold}, of a policy's completions", rewards=results)


def metrics_of(quality: RewardQuality) -> dict[str, float]:
    """Return all that is one number as `eval_<reward>/<metric>`, for `metrics.json` and sweeps."""
    return {
        f"eval_{name}/{key}": value
        for name, result in quality.rewards.items()
        for key, value in _metrics(result).items()
        if value is not None and not np.isnan(value)
    }


def _metrics(result: RewardResult) -> dict[str, float | None]:
    values: dict[str, float | None] = {
        "accuracy": result.accuracy.mean,
        "accuracy_low": result.accuracy.low,
        "accuracy_high": result.accuracy.high,
        "top_one": result.top_one.mean,
        "ece": result.reliability.ece,
        "length_pearson": result.length.pearson,
        "length_spearman": result.length.spearman,
        "completions_without_score": result.completions_without_score,
    }
    values |= {f"accuracy_{_key(part.name)}": part.accuracy.mean for part in result.slices}
    if result.ratings:
        values |= {"rating_pearson": result.ratings.pearson, "rating_spearman": result.ratings.spearman}
    values |= {f"best_of_{point.n}_gain": point.gain.mean for point in (result.best_of_n or [])[1:]}
    if result.border:
        values |= {"border_accuracy": result.border.accuracy.mean, "border_ece": result.border.ece}
    if result.disagreement:
        values["disagreement"] = result.disagreement.margin_std
    if result.rewardbench:
        sections = {**result.rewardbench.sections, "score": result.rewardbench.score}
        values |= {f"rewardbench_{_key(section)}": value for section, value in sections.items()}
    return values


def _key(words: str) -> str:
    return words.replace(": ", "_").replace(" ", "_").replace("%", "percent").lower()
