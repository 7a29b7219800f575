"""
Candidate completions of prompts, of which some are asked about: the file `candidates.jsonl` of `stage=collect`.

A row holds the candidates of one prompt:

    {"id": "5f0c...", "prompt": "...",                        short hash of the prompt; text or messages
     "candidates": [{"completion": "...",                     text or messages
                     "policy": "ppo",                         name of the policy that wrote it
                     "sampling": {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 512},
                     "seed": 0,
                     "scores": {"model": [0.3, 0.5]}}],       by reward, a number (or null) per member of an ensemble
     "questions": [[0, 1], [2, 3, 1]]}                        indices of the candidates that are asked about together

Other fields of rows and candidates are kept.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_trl.data.file_rows import read_file
from rlhf_trl.data.images import refuse_images
from rlhf_trl.data.messages import check_text_or_chat
from rlhf_trl.data.rows import Problems, RowError, type_of
from rlhf_trl.errors import DataError
from rlhf_trl.runs.record import replacing

CANDIDATES_FILE = "candidates.jsonl"
Text = str | list[dict[str, Any]]


@dataclass(kw_only=True)
class Candidate:
    """
    A completion that a policy wrote.

    Attributes:
        completion: text or messages.
        policy: name of the policy.
        sampling: settings that it was sampled with.
        seed: seed that it was sampled with.
        scores: by the name of a reward, a score per member of an ensemble, `None` where it doesn't apply.
        extra: other fields of the file.
    """

    completion: Text
    policy: str | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    scores: dict[str, list[float | None]] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    def to_row(self) -> dict[str, Any]:
        """Return the object of the file."""
        return {
            "completion": self.completion,
            "policy": self.policy,
            "sampling": self.sampling,
            "seed": self.seed,
            "scores": self.scores,
            **self.extra,
        }


@dataclass(kw_only=True)
class Candidates:
    """
    The candidates of one prompt.

    Attributes:
        id: short hash of the prompt, see [`prompt_id`].
        prompt: text or messages.
        candidates: the completions.
        questions: tuples of indices of `candidates` that are asked about together, of one index for a rating.
        extra: other fields of the file.
    """

    id: str
    prompt: Text
    candidates: list[Candidate]
    questions: list[tuple[int, ...]] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)

    def to_row(self) -> dict[str, Any]:
        """Return the object of the file."""
        return {
            "id": self.id,
            "prompt": self.prompt,
            "candidates": [each.to_row() for each in self.candidates],
            "questions": [list(question) for question in self.questions],
            **self.extra,
        }


def prompt_id(prompt: Text) -> str:
    """Return a short hash of a prompt, text or messages, which names it in the files of labels."""
    content = prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(content.encode(errors="surrogatepass"), digest_size=8).hexdigest()


def read_candidates(path: str | os.PathLike, allow_empty: bool = False) -> list[Candidates]:
    """
    Read a file of candidates.

    Args:
        path (`str` or `os.PathLike`): the file.
        allow_empty (`bool`): whether it may hold none, as that of a log with new thumbs on old answers alone.

    Raises:
        [`~rlhf_trl.errors.DataError`]: with file and row, for rows that are none, and for an id that is there twice.
    """
    rows: list[Candidates] = []
    places: dict[str, str] = {}
    problems = Problems()
    if not Path(path).is_file():
        raise DataError(f"There is no file of candidates `{path}`. Make it with `stage=collect`.")
    for place, row in read_file(str(path)):
        try:
            if isinstance(row, RowError):
                raise row
            made = parse_candidates(row)
            if made.id in places:
                raise RowError("id", f"is `{made.id}`, as in {places[made.id]}: a prompt has one row")
        except RowError as error:
            problems.add(place, error)
            continue
        places[made.id] = place
        rows.append(made)
    if problems.count:
        raise DataError(f"{problems.count} rows of `{path}` can't be used as candidates:\n{problems.text()}")
    if not rows and not allow_empty:
        raise DataError(f"`{path}` holds no candidates. Make it with `stage=collect`.")
    return rows


def parse_candidates(row: dict[str, Any]) -> Candidates:
    """
    Return the candidates of a row.

    Raises:
        [`~rlhf_trl.data.rows.RowError`]: if it isn't as the head of this module says.
    """
    row = dict(row)
    prompt = check_text_or_chat(row, "prompt")
    refuse_images(row, prompt, "`stage=label` shows text alone")
    listed, questions = row.pop("candidates", None), row.pop("questions", [])
    if not isinstance(listed, list) or not listed:
        raise RowError("candidates", "is missing" if listed is None else "is not a list of candidates")
    candidates = [_candidate(each, f"candidates[{i}]") for i, each in enumerate(listed)]
    del row["prompt"]
    given = row.pop("id", None)
    if given is not None and not isinstance(given, str):
        raise RowError("id", f"is {type_of(given)}, where text should be")
    return Candidates(
        id=given or prompt_id(prompt),
        prompt=prompt,
        candidates=candidates,
        questions=_questions(questions, len(candidates)),
        extra=row,
    )


def _candidate(value: Any, at: str) -> Candidate:
    if not isinstance(value, dict):
        raise RowError(at, f"is {type_of(value)}, where an object with a `completion` should be")
    try:
        completion = _completion(value)
    except RowError as error:
        raise RowError(f"{at}.{error.field}", error.what) from None
    policy, seed = value.get("policy"), value.get("seed")
    sampling, scores = value.get("sampling") or {}, value.get("scores") or {}
    if policy is not None and not isinstance(policy, str):
        raise RowError(f"{at}.policy", f"is {type_of(policy)}, where a name should be")
    if seed is not None and type(seed) is not int:
        raise RowError(f"{at}.seed", f"is {type_of(seed)}, where an integer should be")
    if not isinstance(sampling, dict):
        raise RowError(f"{at}.sampling", f"is {type_of(sampling)}, where an object should be")
    if not isinstance(scores, dict) or not all(_are_scores(each) for each in scores.values()):
        raise RowError(f"{at}.scores", "must hold a list of numbers, one per member, for each reward")
    known = ("completion", "policy", "sampling", "seed", "scores")
    extra = {name: each for name, each in value.items() if name not in known}
    return Candidate(completion=completion, policy=policy, sampling=sampling, seed=seed, scores=scores, extra=extra)


def _completion(value: dict[str, Any]) -> Text:
    """Return a completion: unlike a prompt it may be an empty text, which a policy can write."""
    given = value.get("completion")
    if isinstance(given, str):
        return given
    if (
        isinstance(given, list)
        and given
        and all(isinstance(turn, dict) and turn.get("content") == "" for turn in given)
    ):
        return given
    return check_text_or_chat(value, "completion")


def _are_scores(value: Any) -> bool:
    numbers = [each for each in value if each is not None] if isinstance(value, list) else [None]
    return all(isinstance(each, int | float) and not isinstance(each, bool) for each in numbers)


def _questions(value: Any, count: int) -> list[tuple[int, ...]]:
    if not isinstance(value, list):
        raise RowError("questions", f"is {type_of(value)}, where a list of lists of indices should be")
    for i, question in enumerate(value):
        at = f"questions[{i}]"
        if not isinstance(question, list) or not question or not all(type(index) is int for index in question):
            raise RowError(at, f"is {question!r}, where a list of indices of `candidates` should be")
        if len(set(question)) < len(question):
            raise RowError(at, f"is {question}, which asks about a candidate twice")
        if not all(0 <= index < count for index in question):
            raise RowError(at, f"is {question}, and the candidates are 0 to {count - 1}")
    return [tuple(question) for question in value]


def write_candidates(path: str | os.PathLike, rows: Iterable[Candidates]) -> None:
    """Write a file of candidates that is there whole or not at all."""
    write_rows(path, (row.to_row() for row in rows))


def write_rows(path: str | os.PathLike, rows: Iterable[dict[str, Any]]) -> None:
    """Write JSON lines that are there whole or not at all, whenever the process is killed."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
