"""
Review sentences rated by people: a real task without a hub (`data=reviews`).

C. J. Hutto and E. Gilbert, VADER (ICWSM 2014), MIT licence: sentences of movie and product reviews, each rated by 15
to 29 people from -4 (most negative) to 4 (most positive). The data is not part of this package. It is read from either

- the unpacked source distribution of `vaderSentiment` 3.3.2 on PyPI, which carries the original files; here the 1,000
  test sentences and their 2,000 evaluation pairs are chosen by a fixed rule, or
- a folder of JSON lines, `movie_train.jsonl`, `movie_test.jsonl`, `amazon.jsonl` (`id`, `text`, `mean`, `ratings`) and
  `movie_test_pairs.jsonl` (`chosen_id`, `rejected_id`, `gap`).

The task is controlled sentiment generation. The sentences have no prompt of their own, so they follow one fixed
prompt: preference pairs are two sentences under it, and a policy is asked to continue it and the first words of a
sentence. Test sentences are only ever in the `eval` split. A share of the training sentences is kept out of every
dataset_type, for the classifier that judges the policies (`rlhf_trl.tasks.reviews.judges.sentiment`).
"""

import hashlib
import io
import json
import random
import statistics
import tarfile
from collections import Counter
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple

from rlhf_trl.data.build import build_dataset
from rlhf_trl.data.dataset_types import comparisons_of
from rlhf_trl.data.feedback.base import Feedback
from rlhf_trl.data.feedback.rated import preference_share
from rlhf_trl.data.file_rows import read_file
from rlhf_trl.data.messages import to_chat
from rlhf_trl.data.rows import RowError
from rlhf_trl.errors import DataError

ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"
TEST_SENTENCES, TEST_PAIRS, MIN_GAP = 1000, 2000, 0.5
HOW_TO_GET = (
    "Get the sentences with `pip download --no-deps --no-binary :all: vaderSentiment==3.3.2` and "
    "`tar xzf vaderSentiment-3.3.2.tar.gz`, then set `data.path=vaderSentiment-3.3.2` or set "
    "`RLHF_TRL_REVIEWS` to that folder."
)

Row = dict[str, Any]
SENTENCE = {"id": str, "text": str, "mean": int | float, "ratings": list}


class Reviews(NamedTuple):
    """
    The rated sentences, each a dict of `id`, `text`, `mean` (float) and `ratings` (list of int).

    `train` and `judge` part the training sentences; `test` holds the movie sentences that nothing is trained on;
    `products` are the product review sentences; `pairs` are the evaluation pairs of `test`.
    """

    train: list[Row]
    judge: list[Row]
    test: list[Row]
    products: list[Row]
    pairs: list[Row]


def load(
    dataset_type: str,
    seed: int = 42,
    path: str | None = None,
    prompt: str = "Review:",
    prompt_words: int = 4,
    rounds: int = 1,
    min_gap: float = MIN_GAP,
    judge_share: float = 0.3,
    max_samples: int | None = None,
    max_eval_samples: int | None = None,
    conversational: bool = False,
    feedback: Feedback | None = None,
):
    """
    Return the review sentences as a `datasets.DatasetDict` with `train` and `eval` (the test sentences).

    Args:
        dataset_type (`str`):
            `prompt_completion`: the fixed prompt and a sentence; `preference`: the fixed prompt and two sentences,
            with the `gap` of their mean ratings; `comparisons`: the same pairs as completions; `annotated`: these with
            the raters' numbers and the share of pairs of raters who agree; `unpaired`:
            the fixed prompt, a sentence, and whether its mean rating is positive; `prompt`: the fixed prompt and a
            sentence's first words.
        seed (`int`): Order of the rows and choice of the training pairs. `eval` doesn't depend on it.
        path (`str`): The unpacked source distribution of `vaderSentiment`, or the folder of JSON lines.
        prompt (`str`): The fixed prompt.
        prompt_words (`int`): First words a `prompt` row takes, at most half of the sentence's.
        rounds (`int`): Pairs made of each training sentence at most, in `preference`.
        min_gap (`float`): Least gap of the mean ratings of a training pair.
        judge_share (`float`): Share of the training sentences that is kept out, for the judge.
        max_samples, max_eval_samples (`int`, *optional*): Limits of the two splits.
        conversational (`bool`): Whether rows hold chat messages: the prompt as the user's turn, a sentence as the
            assistant's.
        feedback (`rlhf_trl.data.Ratings`, *optional*): make the training rows of the raters' own ratings (scale -4 to
            4) instead; `rounds` and `min_gap` are then those of `feedback`, and `max_samples` counts sentences.

    Raises:
        `DataError`: no data under `path`, or a malformed row.
    """
    from datasets import Dataset, DatasetDict

    reviews = read(path, judge_share)
    train = list(reviews.train)
    random.Random(seed).shuffle(train)
    if dataset_type == "annotated":
        row_of = {row["id"]: row for row in reviews.test}
        splits = {
            "train": [_annotated(prompt, *pair) for pair in pairs(train, rounds, min_gap, seed)],
            "eval": [
                _annotated(prompt, row_of[p["chosen_id"]], row_of[p["rejected_id"]], p["gap"]) for p in reviews.pairs
            ],
        }
    elif dataset_type in ("preference", "comparisons"):
        text = {row["id"]: row["text"] for row in reviews.test}
        splits = {
            "train": [_pair(prompt, *pair) for pair in pairs(train, rounds, min_gap, seed)],
            "eval": [
                {"prompt": prompt, "chosen": " " + text[p["chosen_id"]], "rejected": " " + text[p["rejected_id"]]}
                | {"gap": p["gap"]}
                for p in reviews.pairs
            ],
        }
        if dataset_type == "comparisons":
            splits = {name: [comparisons_of(row) for row in rows] for name, rows in splits.items()}
    else:
        make = {
            "prompt_completion": lambda row: {"prompt": prompt, "completion": " " + row["text"]},
            "unpaired": lambda row: {"prompt": prompt, "completion": " " + row["text"], "label": row["mean"] > 0},
            "prompt": lambda row: {"prompt": " ".join([prompt, *first_words(row["text"], prompt_words)])},
        }[dataset_type]
        splits = {"train": [make(row) for row in train], "eval": [make(row) for row in reviews.test]}
    if conversational:
        splits = {name: [_chat(row) for row in rows] for name, rows in splits.items()}
    limits = {"train": max_samples, "eval": max_eval_samples}
    if feedback:
        raw = [
            {"prompt": prompt, "completion": " " + row["text"], "ratings": row["ratings"]}
            for row in train[:max_samples]
        ]
        raw = [_chat(row) for row in raw] if conversational else raw
        named = [("reviews", ((f"reviews, sentence {train[i]['id']}", row) for i, row in enumerate(raw)))]
        made = build_dataset(dataset_type, seed, named, feedback=feedback, to_chat=False)["train"]
        held_out = Dataset.from_list(splits["eval"][:max_eval_samples])
        return DatasetDict({"train": made, "eval": held_out})
    return DatasetDict({name: Dataset.from_list(rows[: limits[name]]) for name, rows in splits.items()})


def read(path: str | None, judge_share: float = 0.3) -> Reviews:
    """
    Return the sentences under `path`, in a fixed order.

    Raises:
        `DataError`: `path` is null or holds neither layout, or a row is malformed (file, row and field are named).
    """
    if path is None:
        raise DataError(f"`data.path` is not set. {HOW_TO_GET}")
    folder = Path(path)
    if (folder / "movie_train.jsonl").is_file():
        train, test, products = (
            _read_jsonl(folder / f"{name}.jsonl", SENTENCE) for name in ("movie_train", "movie_test", "amazon")
        )
        test_pairs = _read_pairs(folder / "movie_test_pairs.jsonl", {row["id"] for row in test})
    elif (folder / ARCHIVE).is_file():
        movies, products = _read_archive(folder / ARCHIVE)
        movies.sort(key=_hash)
        test, train = movies[:TEST_SENTENCES], movies[TEST_SENTENCES:]
        test_pairs = [
            {"chosen_id": better["id"], "rejected_id": worse["id"], "gap": better["mean"] - worse["mean"]}
            for better, worse in pairs(test, rounds=8, min_gap=MIN_GAP, seed=0)[:TEST_PAIRS]
        ]
    else:
        raise DataError(f"`{path}` holds neither `movie_train.jsonl` nor `{ARCHIVE}`. {HOW_TO_GET}")
    train.sort(key=_hash)
    judge = int(judge_share * len(train))
    return Reviews(train[judge:], train[:judge], test, products, test_pairs)


def pairs(rows: list[Row], rounds: int, min_gap: float, seed: int) -> list[tuple[Row, Row]]:
    """
    Return (better, worse) by mean rating: each round pairs every row with one other, and drops gaps below `min_gap`.
    """
    generator, made = random.Random(seed), []
    for _ in range(rounds):
        order = generator.sample(rows, len(rows))
        for a, b in zip(order[::2], order[1::2], strict=False):
            if abs(a["mean"] - b["mean"]) >= min_gap:
                made.append((a, b) if a["mean"] > b["mean"] else (b, a))
    return made


def first_words(text: str, n: int) -> list[str]:
    """Return the first `n` words of `text`, at most half of them, so that an ending is left to write."""
    words = text.split()
    return words[: min(n, len(words) // 2)]


def _pair(prompt: str, better: Row, worse: Row) -> Row:
    gap = better["mean"] - worse["mean"]
    return {"prompt": prompt, "chosen": " " + better["text"], "rejected": " " + worse["text"], "gap": gap}


def _annotated(prompt: str, better: Row, worse: Row, gap: float | None = None) -> Row:
    return {
        "prompt": prompt,
        "completions": [" " + better["text"], " " + worse["text"]],
        "better": [0],
        "worse": [1],
        "gap": [better["mean"] - worse["mean"] if gap is None else gap],
        "share": [preference_share(better["ratings"], worse["ratings"])],
        "ratings": [better["ratings"], worse["ratings"]],
    }


def _chat(row: Row) -> Row:
    """Return a row of texts as messages."""
    answers = {key: row[key].strip() for key in ("completion", "chosen", "rejected") if key in row}
    if "completions" in row:
        answers["completions"] = [text.strip() for text in row["completions"]]
    return to_chat(row | answers, Counter(), wanted=True, place="reviews")


def _hash(row: Row) -> str:
    # An order that depends on neither the file's order nor a random generator's version.
    return hashlib.sha1(row["id"].encode()).hexdigest()


def _read_jsonl(file: Path, types: dict[str, type | UnionType]) -> list[Row]:
    if not file.is_file():
        raise DataError(f"`{file}` is missing. {HOW_TO_GET}")
    rows = []
    for place, row in read_file(str(file)):
        if isinstance(row, RowError):
            raise DataError(f"{place}: the row {row.what}. {HOW_TO_GET}")
        for field, kind in types.items():
            if not isinstance(row.get(field), kind):
                raise DataError(f"{place}: `{field}` is missing or of another type. {HOW_TO_GET}")
        rows.append(row)
    return rows


def _read_pairs(file: Path, known: set[str]) -> list[Row]:
    rows = _read_jsonl(file, {"chosen_id": str, "rejected_id": str, "gap": int | float})
    for number, row in enumerate(rows, 1):
        for field in ("chosen_id", "rejected_id"):
            if row[field] not in known:
                raise DataError(f"{file}, pair {number}: `{field}` names no sentence of the test file. {HOW_TO_GET}")
    return rows


def _read_archive(file: Path) -> tuple[list[Row], list[Row]]:
    """Return movie and product sentences from the tables of the release, each text once."""
    with tarfile.open(file) as archive:

        def table(name: str) -> list[list[str]]:
            member = archive.extractfile(f"hutto_ICWSM_2014/{name}.txt")
            assert member is not None  # a file, and no folder
            # Some of the files start with a byte order mark; split("\n"), since sentences hold other line separators.
            lines = io.TextIOWrapper(member, encoding="utf-8-sig", newline="").read().split("\n")
            return [line.rstrip("\r").split("\t") for line in lines if line.strip()]

        movies, products = (
            _join(table(f"{name}ReviewSnippets_GroundTruth"), table(f"{name}ReviewSnippets_anonDataRatings"), name)
            for name in ("movie", "amazon")
        )
    return movies, products


def _join(sentences: list[list[str]], raters: list[list[str]], source: str) -> list[Row]:
    ratings = {number: json.loads(values) for number, _, _, values in raters}
    rows, seen = [], set()
    for number, _, text in sentences:
        text = text.strip().replace("''", '"')
        if text not in seen:
            seen.add(text)
            mean = round(statistics.fmean(ratings[number]), 4)
            rows.append({"id": f"{source}-{number}", "text": text, "mean": mean, "ratings": ratings[number]})
    return rows
