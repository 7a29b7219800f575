"""
Conversion of feedback to the dataset type that a stage trains on.

`comparisons` (reward models) holds `prompt`, `completions` (a list), `better` and `worse` (indices of the completions
of each comparison) and, where the options ask for them, `margin`, `weights`, `label_smoothing` (a number per
comparison), `source` (where each comparison comes from, with synthetic ones), or `targets` (a number per head for each
completion); and `safe` (1, -1 or null for each completion) where rows say which completions are safe.

`annotated` holds what people said, for the evaluation of rewards: `prompt`, `completions`, `better` and `worse`, `gap`
(by how much, a number per comparison), `share` (of the raters who agree, a number per comparison, or null), `ratings`
(the raters' numbers, a list per completion) or `attributes` (a dict of dimension and mean score per completion), and
every other column of the source that holds text or numbers.
"""

import json
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import cast

from rlhf_trl.data.dataset_types import select_completions
from rlhf_trl.data.feedback import pairwise, rated
from rlhf_trl.data.feedback.base import ComparedRow, Feedback, Group, RatedRow, Text, key_of
from rlhf_trl.data.feedback.rated import Rated
from rlhf_trl.data.feedback.synthetic import add_synthetic, drop_unlike
from rlhf_trl.errors import DataError


def convert(
    feedback: Feedback,
    rows: Sequence[ComparedRow | RatedRow],
    dataset_type: str,
    seed: str,
    notes: Counter,
    held_out: Collection[bytes] | None = (),
    limit: Callable[[int], Sequence[int]] | None = None,
) -> list[dict]:
    """
    Convert the checked rows of one split.

    Args:
        feedback (`Feedback`): the options.
        rows (`Sequence`): as `feedback.read` gave them.
        dataset_type (`str`): see the head of this module; or `preference` (DPO, ORPO), `unpaired` (KTO),
            `prompt_completion` (SFT), `prompt`.
        seed (`str`): seeds every random choice.
        notes (`Counter`): counts what was made, dropped and added.
        held_out (`Collection[bytes]`, *optional*): keys of the held-out prompts; `None` for rows that are held out,
            which get no synthetic comparisons.
        limit (`Callable`, *optional*): returns which ones of a number of rows are kept, before synthetic comparisons
            are added to these.

    Raises:
        DataError: if no row is left.
    """
    rng = random.Random(f"{seed}-{feedback.name}")
    if isinstance(feedback, Rated):
        rows = rated.drop_unrated(feedback, cast(list[RatedRow], rows), dataset_type, notes)
    if feedback.drop_duplicates:
        rows = drop_duplicates(rows, notes)
    if dataset_type == "prompt":
        return [{"prompt": prompt} for prompt in {key_of(row["prompt"]): row["prompt"] for row in rows}.values()]
    if dataset_type in ("unpaired", "prompt_completion"):
        converted = labelled_rows(label(feedback, rows, notes), dataset_type, notes)
    else:
        groups = list(compare(feedback, rows, dataset_type, rng, notes))
        if held_out is not None and dataset_type != "annotated":
            groups = drop_unlike(feedback, groups, notes)
            if limit is not None:
                groups = limit_groups(groups, dataset_type == "preference" or feedback.pairwise_rows, limit)
            if adds_synthetic(feedback, dataset_type):
                groups = add_synthetic(feedback, groups, rows, rng, notes, held_out)
        if feedback.max_pairs is not None:  # last: the best shows in all pairs only, and negatives count too
            groups = limit_pairs(groups, feedback.max_pairs, rng, notes)
        converted = grouped_rows(feedback, groups, dataset_type, rng, notes)
    if not converted:
        counted = "; ".join(f"{what}: {count:,}" for what, count in notes.items() if count)
        reasons = f" ({counted})" if counted else ""
        raise DataError(
            f"{len(rows):,} rows of {feedback.name} give no row of the dataset type `{dataset_type}`{reasons}. "
            f"{feedback.ADVICE}"
        )
    return converted


def adds_synthetic(feedback: Feedback, dataset_type: str) -> bool:
    """Return whether training rows of a dataset type get synthetic comparisons."""
    return feedback.marks_sources and dataset_type in ("comparisons", "preference")


def compare(feedback: Feedback, rows, dataset_type: str, rng: random.Random, notes: Counter) -> Iterable[Group]:
    """Return groups of completions with the comparisons, or the regression targets, of each."""
    if isinstance(feedback, Rated):
        return rated.compare(feedback, rows, dataset_type, rng, notes)
    return pairwise.compare(feedback, rows, dataset_type, notes)


def label(feedback: Feedback, rows, notes: Counter) -> Iterable[tuple[Text, Text, bool | None]]:
    """Return (prompt, completion, label) of each completion."""
    return rated.label(feedback, rows, notes) if isinstance(feedback, Rated) else pairwise.label(rows)


def drop_duplicates(rows: Sequence[ComparedRow | RatedRow], notes: Counter) -> list:
    """Drop rows that repeat another one; ratings without a rater may be another person's and are kept."""
    seen, kept, beside = set(), [], ("columns", "confidence", "confidences")
    for row in rows:
        key = json.dumps({name: value for name, value in row.items() if name not in beside}, sort_keys=True)
        if "ratings" in row and "rater" not in row:
            kept.append(row)
            continue
        notes["rows dropped: they repeat another one"] += key in seen
        kept += [] if key in seen else [row]
        seen.add(key)
    return kept


def labelled_rows(
    labels: Iterable[tuple[Text, Text, bool | None]], dataset_type: str, notes: Counter
) -> list[dict[str, Text | bool]]:
    """Make rows of `unpaired` of all good and bad completions, or rows of `prompt_completion` of the good ones."""
    made = []
    for prompt, completion, good in labels:
        if good is None:
            notes["completions dropped: neither good nor bad"] += 1
        elif dataset_type == "unpaired":
            made.append({"prompt": prompt, "completion": completion, "label": good})
        elif good:
            made.append({"prompt": prompt, "completion": completion})
        else:
            notes["completions dropped: bad ones are no demonstrations"] += 1
    return made


def grouped_rows(
    feedback: Feedback, groups: Iterable[Group], dataset_type: str, rng: random.Random, notes: Counter
) -> list[dict]:
    """Make rows of `preference`, `comparisons` or `annotated` of groups of completions."""
    made = []
    for group in groups:
        annotated = dataset_type == "annotated" and group.ratings is not None
        labeled = dataset_type == "comparisons" and group.safe is not None
        if not group.comparisons and group.targets is None and not annotated and not labeled:
            continue
        if feedback.shuffle:
            group = shuffle_completions(group, rng)
        if dataset_type == "preference":
            made += [
                {"prompt": group.prompt, "chosen": group.completions[c.better], "rejected": group.completions[c.worse]}
                | ({"source": c.source} if feedback.marks_sources else {})
                for c in group.comparisons
            ]
        elif dataset_type == "annotated":
            made.append(annotated_row(feedback, group))
        else:
            made += comparison_rows(feedback, group)
    if feedback.shuffle and dataset_type == "comparisons":
        notes["rows whose completions were shuffled"] = len(made)
    if dataset_type == "annotated":  # every row has the columns of all
        names = dict.fromkeys(name for row in made for name in row)
        return [{name: row.get(name) for name in names} for row in made]
    return made


def comparison_rows(feedback: Feedback, group: Group) -> list[dict]:
    """Make the row of `comparisons` of a group or, with `pairwise_rows`, one row per comparison."""
    row = {"prompt": group.prompt, "completions": group.completions}
    if group.targets is not None:
        return [{**row, "targets": group.targets}]
    row |= {"better": [c.better for c in group.comparisons], "worse": [c.worse for c in group.comparisons]}
    if feedback.margin:
        row["margin"] = [feedback.margin * c.gap for c in group.comparisons]
    if group.safe is not None:
        row["safe"] = group.safe
    if feedback.marks_sources:
        row["source"] = [c.source for c in group.comparisons]
    shares = [c.share for c in group.comparisons if c.share is not None]  # all have one, or none has
    if feedback.agreement == "weights":
        row["weights"] = [2 * share - 1 for share in shares]
    elif feedback.agreement == "smoothing":
        row["label_smoothing"] = [1 - share for share in shares]
    compared = {*row["better"], *row["worse"]}
    labeled = {i for i, side in enumerate(group.safe or ()) if side is not None}
    if feedback.pairwise_rows:
        lists = {name: row[name] for name in row if name not in ("prompt", "completions", "safe")}
        single = [row | {name: [values[m]] for name, values in lists.items()} for m in range(len(group.comparisons))]
        made = [select_completions(one, sorted([*one["better"], *one["worse"]])) for one in single]
        alone = sorted(labeled - compared)
        return [*made, select_completions(row, alone)] if alone else made
    return [select_completions(row, sorted(compared | labeled))]


def annotated_row(feedback: Feedback, group: Group) -> dict:
    """Make the row of `annotated` of a group."""
    row = {
        **(group.columns or {}),
        "prompt": group.prompt,
        "completions": group.completions,
        "better": [c.better for c in group.comparisons],
        "worse": [c.worse for c in group.comparisons],
        "gap": [float(c.gap) for c in group.comparisons],
        "share": [c.share for c in group.comparisons],
    }
    if group.safe is not None:
        row["border"] = group.safe
    if group.ratings is not None and isinstance(feedback, Rated):
        row |= feedback.annotations(group.ratings)
    return row


def limit_groups(groups: list[Group], is_paired: bool, limit: Callable[[int], Sequence[int]]) -> list[Group]:
    """
    Keep the comparisons of as many rows as there are to be.

    Args:
        groups (`list[Group]`): groups of completions.
        is_paired (`bool`): whether each comparison makes a row, and not each group.
        limit (`Callable`): see [`convert`].
    """
    rows = [
        (number, m)
        for number, group in enumerate(groups)
        for m in range(len(group.comparisons) if is_paired else bool(group.comparisons or group.safe))
    ]
    kept = {rows[i] for i in limit(len(rows))}
    if not is_paired:
        return [group for number, group in enumerate(groups) if (number, 0) in kept]
    return [
        group._replace(comparisons=[c for m, c in enumerate(group.comparisons) if (number, m) in kept])
        for number, group in enumerate(groups)
    ]


def limit_pairs(groups: list[Group], max_pairs: int, rng: random.Random, notes: Counter) -> list[Group]:
    """Keep at most `max_pairs` comparisons per prompt, whatever number of groups it has."""
    by_prompt: dict[str, list[tuple[int, int]]] = {}
    for number, group in enumerate(groups):
        by_prompt.setdefault(key_of(group.prompt), []).extend((number, m) for m in range(len(group.comparisons)))
    kept = set()
    for pairs in by_prompt.values():
        kept.update(pairs if len(pairs) <= max_pairs else rng.sample(pairs, max_pairs))
        notes[f"pairs dropped: more than `max_pairs={max_pairs}` of one prompt"] += max(0, len(pairs) - max_pairs)
    return [
        group._replace(comparisons=[c for m, c in enumerate(group.comparisons) if (number, m) in kept])
        for number, group in enumerate(groups)
    ]


def shuffle_completions(group: Group, rng: random.Random) -> Group:
    """Put the completions of a group into random order."""
    order = rng.sample(range(len(group.completions)), len(group.completions))
    place = {old: new for new, old in enumerate(order)}
    return group._replace(
        completions=[group.completions[i] for i in order],
        comparisons=[c._replace(better=place[c.better], worse=place[c.worse]) for c in group.comparisons],
        targets=None if group.targets is None else [group.targets[i] for i in order],
        ratings=None if group.ratings is None else [group.ratings[i] for i in order],
        safe=None if group.safe is None else [group.safe[i] for i in order],
    )
