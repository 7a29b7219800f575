"""Logged traffic of a running service: prompts, answers, and the thumbs of users, as candidates and feedback."""

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

from rlhf_trl.data.columns import rename_columns
from rlhf_trl.data.feedback.rated import DOWN, UP
from rlhf_trl.data.file_rows import read_file
from rlhf_trl.data.images import refuse_images
from rlhf_trl.data.messages import check_text_or_chat, read_json_chats
from rlhf_trl.data.rows import Problems, RowError
from rlhf_trl.errors import ConfigError, DataError, user_location
from rlhf_trl.labels.candidates import Candidate, Text, prompt_id
from rlhf_trl.labels.collection import completion_key

POLICY = "traffic"
COLUMNS = ("prompt", "completion", "thumb", "policy", "time", "rater")
# Takes a row, and returns it without what is private, or None to drop it
Privacy = Callable[[dict[str, Any]], dict[str, Any] | None]
TOO_LONG = "logged rows dropped: too long a prompt"


class Traffic(NamedTuple):
    """
    Rows of a log, checked.

    Attributes:
        rows: `prompt`, `completion` and the other columns of [`COLUMNS`] that a row has; each answer to a prompt once.
        thumbs: the rows with a thumb, for `data/feedback=thumbs`; several of an answer where several users gave one.
        notes: counts of what was left out.
        too_long: rows with too long a prompt, the first few.
    """

    rows: list[dict[str, Any]]
    thumbs: list[dict[str, Any]]
    notes: Counter
    too_long: Problems

    def candidate(self, row: Mapping[str, Any]) -> Candidate:
        """Return the logged answer of a row as a candidate."""
        extra = {name: row[name] for name in ("thumb", "time") if row.get(name) is not None}
        return Candidate(completion=row["completion"], policy=row.get("policy") or POLICY, extra=extra)


def read_traffic(
    files: Sequence[str],
    columns: Mapping[str, str | None],
    privacy: Privacy | None = None,
    used: Collection[Hashable] = (),
    length_problem: Callable[[Text], str | None] = lambda prompt: None,
) -> Traffic:
    """
    Read logs.

    Args:
        files (`Sequence[str]`): jsonl, json, csv, tsv or parquet.
        columns (`dict[str, str]`): our names, see [`COLUMNS`], to the file's; null for one that it doesn't have.
        privacy (`Callable`, *optional*): filter of each row, before anything else reads it.
        used (`Collection`): what was collected before: the [`used_key`] of answers, and the [`thumb_key`] of thumbs.
        length_problem (`Callable`): says why a prompt is too long, in a sentence without its subject; its rows are
            dropped.

    Raises:
        [`~rlhf_trl.errors.DataError`]: with file and row, for rows without a prompt or an answer, or with a thumb that
            is none.
        [`~rlhf_trl.errors.ConfigError`]: if the filter raises, or returns something else than a row.
    """
    rows, thumbs, notes, problems, too_long = [], [], Counter(), Problems(), Problems()
    seen = set(used)
    mapping = {ours: theirs for ours, theirs in columns.items() if theirs is not None}
    for file in files:
        for place, row in read_file(file):
            try:
                if isinstance(row, RowError):
                    raise row
                if privacy is not None and (row := _filtered(privacy, row, place)) is None:
                    notes["logged rows dropped: by the privacy filter"] += 1
                    continue
                made = _checked(rename_columns(read_json_chats(row, notes), mapping))
            except RowError as error:
                problems.add(place, error, mapping.get(error.field or ""))
                continue
            key = used_key(made["prompt"], made["completion"])
            is_new, has_new_thumb = key not in seen, "thumb" in made and thumb_key(made) not in seen
            if (is_new or has_new_thumb) and (problem := length_problem(made["prompt"])):
                too_long.add(place, RowError("prompt", problem), mapping["prompt"])
                notes[TOO_LONG] += 1
                continue
            if is_new:
                seen.add(key)
                rows.append(made)
            if has_new_thumb:
                seen.add(thumb_key(made))
                thumbs.append(made)
            if not is_new and not has_new_thumb:
                notes[f"logged rows dropped: {'used before' if key in used else 'they repeat another one'}"] += 1
    if problems.count:
        raise DataError(f"{problems.count} rows of `stage.traffic` can't be used:\n{problems.text()}")
    return Traffic(rows, thumbs, notes, too_long)


def used_key(prompt: Text, completion: Text) -> tuple[str, str]:
    """Return a key by which logged answers are the same."""
    return prompt_id(prompt), completion_key(completion)


def thumb_key(row: Mapping[str, Any]) -> tuple[Hashable, ...]:
    """Return a key by which thumbs are the same: answer, thumb, and who gave it when, as far as the log says."""
    own = (str(row.get(name)) for name in ("thumb", "rater", "time"))
    return *used_key(row["prompt"], row["completion"]), *own


def _filtered(privacy: Privacy, row: dict[str, Any], place: str) -> dict[str, Any] | None:
    try:
        found = privacy(dict(row))
    except Exception as error:
        where = f" ({user_location(error)})" if user_location(error) else ""
        raise ConfigError(
            f"The privacy filter `stage.privacy` raised {type(error).__name__}: {error}{where} at {place}. Correct "
            "it; nothing was collected."
        ) from error
    if found is not None and not isinstance(found, dict):
        raise ConfigError(
            f"The privacy filter `stage.privacy` returned {type(found).__name__} at {place}. Let it return the row, "
            "or None to drop it."
        )
    return found


def _checked(row: dict[str, Any]) -> dict[str, Any]:
    prompt, completion = check_text_or_chat(row, "prompt"), check_text_or_chat(row, "completion")
    refuse_images(row, prompt, "`stage=collect` keeps text alone")
    made: dict[str, Any] = {"prompt": prompt, "completion": completion}
    made |= {name: row[name] for name in ("policy", "time", "rater") if row.get(name) is not None}
    for name in ("policy", "rater"):
        if name in made:
            made[name] = str(made[name])
    thumb = row.get("thumb")
    if thumb is not None and str(thumb).strip():
        known = UP | DOWN
        if str(thumb).strip().lower() not in known:
            raise RowError("thumb", f"is {thumb!r}, where true or false, up or down should be")
        made["thumb"] = bool(known[str(thumb).strip().lower()])
    return made
