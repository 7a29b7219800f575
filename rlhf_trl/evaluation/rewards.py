"""How good rewards are, beside what people said of completions (`stage=evaluate_reward`)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset

from rlhf_trl.data.chat_template import template_kwargs
from rlhf_trl.data.dataset_types import ANNOTATED
from rlhf_trl.data.feedback.base import key_of
from rlhf_trl.data.formats import PASSED_ON
from rlhf_trl.data.messages import as_text
from rlhf_trl.data.tokenize import prompt_ids
from rlhf_trl.errors import ConfigError
from rlhf_trl.evaluation import rewardbench
from rlhf_trl.evaluation.comparison import draw_many, load_policy, score
from rlhf_trl.evaluation.reward_quality import (
    accuracy,
    best_of_n_gains,
    calibration,
    disagreement,
    gap_slices,
    in_parts,
    length_slices,
    rater_ceiling,
    share_slices,
    top_one,
    within,
)
from rlhf_trl.evaluation.statistics import pearson, spearman
from rlhf_trl.hints import count_of, names_of
from rlhf_trl.models.tokenizers import load_tokenizer
from rlhf_trl.rewards.model import ModelReward

# A column that was not asked for parts comparisons if it has so many different values
FEWEST_VALUES, MOST_VALUES = 2, 20
MISTAKES = 5


@dataclass
class Annotated:
    """
    Rows of the dataset type `annotated`, each completion of a prompt once.

    R rows, N completions, M comparisons. `prompts`, `completions`, `lengths` (characters), `prompt` (number of the
    prompt), `ratings` (lists, empty where there are none) and `first` (the first row) are of each completion;
    `better`, `worse` (indices of completions), `row`, `gap` and `share` (NaN where unknown) of each comparison;
    `of_row` has the indices of each row's completions; `columns` the other columns, R values each; `attributes`
    comparisons by dimension: `better`, `worse`, `row`.
    """

    prompts: list = field(default_factory=list)
    completions: list = field(default_factory=list)
    prompt: list[int] = field(default_factory=list)
    ratings: list[list[float]] = field(default_factory=list)
    first: list[int] = field(default_factory=list)
    of_row: list[list[int]] = field(default_factory=list)
    comparisons: list[tuple] = field(default_factory=list)
    columns: dict[str, list] = field(default_factory=dict)
    attributes: dict[str, list[tuple]] = field(default_factory=dict)

    def __post_init__(self):
        better, worse, row, gap, share = np.array(self.comparisons, dtype=float).reshape(-1, 5).T
        self.better, self.worse, self.row = better.astype(int), worse.astype(int), row.astype(int)
        self.gap, self.share = gap, share
        self.lengths = np.array([_length(completion) for completion in self.completions], dtype=float)

    @property
    def mean_ratings(self) -> np.ndarray:
        """Of each completion, shape (N,); NaN where there is none."""
        return np.array([np.mean(each) if each else np.nan for each in self.ratings])


def _length(completion: str | list[dict]) -> int:
    if isinstance(completion, str):
        return len(completion.strip())
    return sum(len(as_text(turn["content"] or "")) for turn in completion)


def read_annotated(dataset: Dataset) -> Annotated:
    """
    What `evaluate_reward` knows of the rows of a dataset.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if they compare nothing.
    """
    columns = {name: dataset[name][:] for name in dataset.column_names if name not in ("prompt", *ANNOTATED)}
    read = {name: [] for name in ("prompts", "completions", "prompt", "ratings", "first", "of_row", "comparisons")}
    numbers, place, attributes = {}, {}, {}
    for r, row in enumerate(dataset):
        prompt = numbers.setdefault(key_of(row["prompt"]), len(numbers))
        indices = []
        for i, completion in enumerate(row["completions"]):
            key = (prompt, key_of(completion))
            if key not in place:
                place[key] = len(place)
                for name, value in (("prompts", row["prompt"]), ("completions", completion), ("prompt", prompt)):
                    read[name].append(value)
                read["ratings"].append(list((row.get("ratings") or {i: []})[i] or []))
                read["first"].append(r)
            indices.append(place[key])
        read["of_row"].append(indices)
        gaps, shares = (row.get(name) or [None] * len(row["better"]) for name in ("gap", "share"))
        for a, b, gap, share in zip(row["better"], row["worse"], gaps, shares, strict=True):
            known = [np.nan if value is None else value for value in (gap, share)]
            read["comparisons"].append((indices[a], indices[b], r, *known))
        for name, pairs in _attribute_comparisons(row.get("attributes") or []).items():
            attributes.setdefault(name, []).extend((indices[a], indices[b], r) for a, b in pairs)
    if not read["comparisons"]:
        raise ConfigError(
            f"The data's {count_of(len(dataset), 'row')} for evaluation compare nothing: no completion is better than "
            "another one of its prompt. Give comparisons (`chosen` and `rejected`), or type `data/feedback=FORM` with "
            "the dataset type of the rows."
        )
    return Annotated(**read, columns=columns, attributes=attributes)


def _attribute_comparisons(scores: list[dict[str, float | None]]) -> dict[str, list[tuple[int, int]]]:
    """Of each dimension, the pairs of a row's completions of which the first has the higher score."""
    found = {}
    for name in scores[0] if scores else ():
        known = [(i, each[name]) for i, each in enumerate(scores) if each[name] is not None]
        found[name] = [(i, j) for i, a in known for j, b in known if a > b]
    return found


def slices_of(
    annotated: Annotated, gaps_above: Sequence[float] | None, columns: Sequence[str] | None, like_length: float
) -> dict[str, np.ndarray]:
    """
    Name -> whether each comparison is in the slice, shape (M,).

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: for a column that isn't there, or has more values than a table can hold.
    """
    lengths = annotated.lengths[annotated.better], annotated.lengths[annotated.worse]
    parts = (
        length_slices(*lengths, like_length) | gap_slices(annotated.gap, gaps_above) | share_slices(annotated.share)
    )
    if gaps_above is not None and np.isnan(annotated.gap).all():
        raise ConfigError(
            "`stage.gaps_above` parts comparisons by how far apart people see the two, and the data doesn't say. Give "
            "it a column `gap`, or leave `stage.gaps_above` out."
        )
    asked = columns is not None
    for name in columns if asked else annotated.columns:
        if name not in annotated.columns:
            raise ConfigError(
                f"`stage.slices` names the column `{name}`, and the data's rows have "
                f"{names_of(annotated.columns) or 'no column of their own'}. Name one of these, or leave it out."
            )
        values = np.array([str(value) for value in annotated.columns[name]], dtype=object)[annotated.row]
        found = sorted(set(values))
        if asked and len(found) > MOST_VALUES:
            raise ConfigError(
                f"`stage.slices` names the column `{name}`, which has {len(found):,} different values; "
                f"{MOST_VALUES} is the most. Name another column, or put its values into groups."
            )
        if asked or (name not in PASSED_ON and FEWEST_VALUES <= len(found) <= MOST_VALUES):
            parts |= {f"{name}: {value}": values == value for value in found}
    return parts


def measure(
    annotated: Annotated,
    rewards: Sequence[Callable],
    gaps_above: Sequence[float] | None = None,
    slices: Sequence[str] | None = None,
    like_length: float = 0.1,
    bins: int = 10,
    gold: str | None = None,
) -> dict[str, Any]:
    """
    What `reward_quality.json` holds, without a policy's samples.

    Args:
        annotated (`Annotated`): what people said.
        rewards (`Sequence[Callable]`): rewards as in `rlhf_trl.rewards.model`.
        gaps_above, slices, like_length, bins, gold: see conf/stage/evaluate_reward.yaml.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: see [`evaluate_reward`].
    """
    parts = slices_of(annotated, gaps_above, slices, like_length)
    notes, unrated = [], annotated.ratings.count([])
    if 0 < unrated < len(annotated.ratings):
        notes.append(f"{count_of(unrated, 'completion')} without a rating: left out where scores meet ratings")
    lone = sum(len(each) == 1 for each in annotated.ratings)
    if lone:
        notes.append(f"{count_of(lone, 'completion')} with a single rating: they say nothing of the raters' agreement")
    ceiling = rater_ceiling(annotated.ratings, annotated.better, annotated.worse)
    if ceiling is None and any(annotated.ratings):
        notes.append("fewer than three completions have two raters: how well raters predict each other isn't known")
    columns = {name: [values[row] for row in annotated.first] for name, values in annotated.columns.items()}
    given = Dataset.from_dict({"prompt": annotated.prompts, **columns})
    found = {}
    for reward in rewards:
        scores = score([reward], given, annotated.completions, [[] for _ in annotated.completions])[reward.__name__]
        found[reward.__name__] = np.where(np.isfinite(scores), scores, np.nan)
    truth = found[gold] if gold is not None else annotated.mean_ratings if any(annotated.ratings) else None
    quality = {
        "rows": len(annotated.of_row),
        "prompts": len(set(annotated.prompt)),
        "completions": len(annotated.completions),
        "comparisons": len(annotated.row),
        "raters": ceiling,
        "gold": None if truth is None else gold or "people's mean ratings",
        "longer_preferred": _longer(annotated, np.ones(len(annotated.row))),
        "rewards": {},
        "notes": notes,
    }
    for reward in rewards:
        name = reward.__name__
        quality["rewards"][name] = entry = _measure_one(name, annotated, found[name], parts, bins)
        if truth is not None and name != gold:
            entry["best_of_n"] = best_of_n_gains(found[name], truth, np.array(annotated.prompt))
        if isinstance(reward, ModelReward) and reward.members > 1:
            ids, ended = ([each] * len(annotated.completions) for each in ([], True))
            rows = reward.token_rows(annotated.prompts, annotated.completions, ids, ended, columns)
            members = reward.member_scores(rows).numpy()
            entry["disagreement"] = disagreement(members, annotated.better, annotated.worse, annotated.row)
    return quality


def _measure_one(
    name: str, annotated: Annotated, scores: np.ndarray, parts: dict[str, np.ndarray], bins: int
) -> dict[str, Any]:
    """The entry of one reward, `scores` of shape (N,)."""
    lead = scores[annotated.better] - scores[annotated.worse]
    valid = ~np.isnan(lead)
    if not valid.any():
        raise ConfigError(
            f"The reward `{name}` has no finite score for both completions of any of "
            f"{count_of(len(lead), 'comparison')}, so nothing can be said of it. Mend it."
        )
    known, ratings = np.isfinite(scores), annotated.mean_ratings
    rated = known & np.isfinite(ratings)
    groups = np.array(annotated.prompt)
    curve = calibration(lead, annotated.share, bins)
    attributes = {name: np.array(pairs, dtype=int).reshape(-1, 3).T for name, pairs in annotated.attributes.items()}
    entry = {
        "accuracy": accuracy(lead, annotated.row)._asdict(),
        "completions_without_score": int((~known).sum()),
        "comparisons_left_out": int((~valid).sum()),
        "slices": [_slice(name, lead[part], annotated.row[part]) for name, part in parts.items()]
        + [_slice(f"more {name}", scores[b] - scores[w], row) for name, (b, w, row) in attributes.items()],
        "top_one": top_one(scores, annotated.of_row, *_by_row(annotated))._asdict(),
        "calibration": curve._asdict(),
        "length": {
            "pearson": pearson(scores[known], annotated.lengths[known]),
            "spearman": spearman(scores[known], annotated.lengths[known]),
            "longer_preferred": _longer(annotated, lead),
            "curve": in_parts(annotated.lengths[known], scores[known]),
        },
        "ratings": {
            "completions": int(rated.sum()),
            "pearson": pearson(scores[rated], ratings[rated]),
            "spearman": spearman(scores[rated], ratings[rated]),
            "pearson_within_prompts": pearson(
                within(scores[rated], groups[rated]), within(ratings[rated], groups[rated])
            ),
            "curve": in_parts(ratings[rated], scores[rated]),
        }
        if rated.any()
        else None,
        "mistakes": _mistakes(annotated, scores, lead),
    }
    subsets = annotated.columns.get("subset", [])
    if rewardbench.SUBSETS.intersection(map(str, subsets)):
        entry["rewardbench"] = rewardbench.section_scores([subsets[row] for row in annotated.row], lead)
    return entry


def _slice(name: str, lead: np.ndarray, row: np.ndarray) -> dict[str, Any]:
    return {"slice": name, "n": int((~np.isnan(lead)).sum()), "accuracy": accuracy(lead, row)._asdict()}


def _by_row(annotated: Annotated) -> tuple[list[set[int]], list[set[int]]]:
    """The completions that win, and those that lose a comparison of each row."""
    better, worse = ([set() for _ in annotated.of_row] for _ in range(2))
    for row, a, b in zip(annotated.row, annotated.better, annotated.worse, strict=True):
        better[row].add(a)
        worse[row].add(b)
    return better, worse


def _longer(annotated: Annotated, lead: np.ndarray) -> float:
    """Share of comparisons of unequal lengths in which the longer completion is the one with the lead."""
    longer = np.sign(annotated.lengths[annotated.better] - annotated.lengths[annotated.worse])
    counted = (longer != 0) & ~np.isnan(lead)
    return float((0.5 + 0.5 * longer * np.sign(lead))[counted].mean()) if counted.any() else np.nan


def _mistakes(annotated: Annotated, scores: np.ndarray, lead: np.ndarray) -> list[dict[str, Any]]:
    """The comparisons in which the reward is surest of what people don't prefer."""
    order = np.argsort(np.where(np.isnan(lead), np.inf, lead), kind="stable")[:MISTAKES]
    return [
        {
            "prompt": as_text(annotated.prompts[annotated.better[m]]),
            "preferred": as_text(annotated.completions[annotated.better[m]]),
            "other": as_text(annotated.completions[annotated.worse[m]]),
            "scores": [float(scores[annotated.better[m]]), float(scores[annotated.worse[m]])],
            "gap": float(annotated.gap[m]),
        }
        for m in order
        if lead[m] < 0
    ]


def add_policy(
    quality: dict[str, Any],
    annotated: Annotated,
    rewards: Sequence[Callable],
    gold: str,
    policy: str,
    seed: int,
    prompts: int,
    completions: int,
    temperature: float,
    max_completion_length: int,
    batch_size: int,
    dtype: str,
) -> None:
    """Best-of-n of a policy's completions, so many for each of the first `prompts` prompts, in place of the data's."""
    tokenizer = load_tokenizer(policy)
    rows = list(dict(zip(annotated.prompt[::-1], annotated.first[::-1], strict=True)).values())
    rows = sorted(rows)[:prompts]
    texts = [annotated.prompts[annotated.first.index(row)] for row in rows]
    columns = {name: [values[row] for row in rows] for name, values in annotated.columns.items()}
    given = Dataset.from_dict({"prompt": texts, **columns})
    drawn = draw_many(
        load_policy(policy, dtype),
        tokenizer,
        [prompt_ids(tokenizer, row["prompt"], **template_kwargs(row)) for row in given],
        given,
        rewards,
        completions,
        max_completion_length,
        seed,
        {"temperature": temperature, "batch_size": batch_size},
    )
    number = np.repeat(np.arange(len(texts)), completions)
    quality["gold"] = f"{gold}, of a policy's completions"
    for name in quality["rewards"]:
        if name != gold:
            found = best_of_n_gains(drawn[name].ravel(), drawn[gold].ravel(), number)
            left_out = int((~(np.isfinite(drawn[name]) & np.isfinite(drawn[gold]))).sum())
            quality["rewards"][name] |= {"best_of_n": found, "samples_without_score": left_out}


def metrics_of(quality: dict[str, Any]) -> dict[str, float]:
    """`eval_<reward>/<metric>` of all that is one number, for `metrics.json` and sweeps."""
    found = {}
    for name, entry in quality["rewards"].items():
        values = {
            "accuracy": entry["accuracy"]["mean"],
            "accuracy_low": entry["accuracy"]["low"],
            "accuracy_high": entry["accuracy"]["high"],
            "top_one": entry["top_one"]["mean"],
            "ece": entry["calibration"]["ece"],
            "length_pearson": entry["length"]["pearson"],
            "length_spearman": entry["length"]["spearman"],
            "completions_without_score": entry["completions_without_score"],
        }
        values |= {f"accuracy_{_key(part['slice'])}": part["accuracy"]["mean"] for part in entry["slices"]}
        for kind in ("pearson", "spearman") if entry["ratings"] else ():
            values[f"rating_{kind}"] = entry["ratings"][kind]
        values |= {f"best_of_{point['n']}_gain": point["gain"]["mean"] for point in entry.get("best_of_n", [])[1:]}
        if "disagreement" in entry:
            values["disagreement"] = entry["disagreement"]["lead_std"]
        if "rewardbench" in entry:
            sections = {**entry["rewardbench"]["sections"], "score": entry["rewardbench"]["score"]}
            values |= {f"rewardbench_{_key(section)}": value for section, value in sections.items()}
        found |= {
            f"eval_{name}/{key}": value for key, value in values.items() if value is not None and not np.isnan(value)
        }
    return found


def _key(words: str) -> str:
    return words.replace(": ", "_").replace(" ", "_").replace("%", "percent").lower()
