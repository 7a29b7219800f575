"""
Synthetic comparisons where feedback is sparse: worse copies of the best completions, completions that somebody else
wrote, and prompts in other words. And comparisons that length and style can't decide.

They are made of training rows alone. Each comparison has a `source`: `feedback` for what people said, else the option
that made it.
"""

import random
import re
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

from rlhf_trl.data.feedback.base import Comparison, Feedback, Group, Text, key_of
from rlhf_trl.data.file_rows import checked_rows, resolve_paths
from rlhf_trl.data.images import refuse_images
from rlhf_trl.data.messages import as_chat, as_text, check_text_or_chat, read_json_chats
from rlhf_trl.data.rows import Problems, RowError
from rlhf_trl.data.splits import prompt_key
from rlhf_trl.errors import DataError

GIVEN = "feedback"
TRIES = 20  # draws of a completion that a row doesn't have; all completions of a small dataset may be alike
LIKE = 1.25  # length that counts as alike: from this many times shorter to as many times longer
WORD = re.compile(r"\s*\S+")
# Features of style: markup that a reward model may take for quality
STYLE = {
    "list": re.compile(r"^\s*(?:[-*+•]|\d+[.)])\s+\S", re.M),
    "heading": re.compile(r"^\s*#{1,6}\s+\S", re.M),
    "code": re.compile(r"`[^`]+`|^ {4}\S", re.M),
    "emphasis": re.compile(r"\*\*\S|__\S|[!?]{2}|!"),
    "paragraphs": re.compile(r"\S\s*\n\s*\n\s*\S"),
}


def style_of(text: str) -> tuple[bool, ...]:
    """Return which features of `STYLE` a text has."""
    return tuple(pattern.search(text) is not None for pattern in STYLE.values())


def with_answer(completion: Text, answer: str) -> Text:
    """Return a completion with another text: of a chat, as that of its last turn."""
    return answer if isinstance(completion, str) else [*completion[:-1], {**completion[-1], "content": answer}]


def answer_of(completion: Text) -> str:
    """Return the text of a completion: of a chat, that of its last turn."""
    return completion if isinstance(completion, str) else str(completion[-1].get("content") or "")


# ---- Worse copies ----


def truncated(text: str, rng: random.Random) -> str | None:
    """Return the first quarter to three quarters of a text's words; `None` for fewer than four words."""
    words = WORD.findall(text)
    if len(words) < 4:
        return None
    return "".join(words[: rng.randint(max(1, len(words) // 4), 3 * len(words) // 4)])


def perturbed(text: str, rng: random.Random) -> str | None:
    """Return a text with words dropped, shuffled or repeated; `None` for fewer than four words."""
    words = WORD.findall(text)
    if len(words) < 4:
        return None
    kind = rng.choice(("dropped", "shuffled", "repeated"))
    size = rng.randint(2, max(2, len(words) // 2))
    start = rng.randint(0, len(words) - size)
    span = words[start : start + size]
    if kind == "dropped":
        changed = words[:start] + words[start + size :]
        if start == 0:  # the space before a word in the middle is none at the beginning
            changed[0] = words[0][: len(words[0]) - len(words[0].lstrip())] + changed[0].lstrip()
    elif kind == "repeated":
        changed = [*words[: start + size], f" {span[0].strip()}", *span[1:], *words[start + size :]]
    else:
        order = rng.sample([word.strip() for word in span], size)
        spaces = [word[: len(word) - len(word.lstrip())] for word in span]
        changed = words[:start] + [space + word for space, word in zip(spaces, order, strict=True)]
        changed += words[start + size :]
    return "".join(changed if changed != words else [*words, f" {words[0].strip()}", *words[1:]])


# ---- Completions of other prompts ----


class Pool:
    """
    Completions of the training rows, to draw some of other prompts.

    Args:
        rows (`Sequence`): checked rows, see `rlhf_trl.data.feedback.base`.
    """

    def __init__(self, rows: Sequence[Any]):
        self.all: list[tuple[str, Text]] = []
        self.own: dict[str, set[str]] = {}
        for row in rows:
            for completion in row.get("completions") or [row["completion"]]:
                self.all.append((key_of(row["prompt"]), completion))
                self.own.setdefault(key_of(row["prompt"]), set()).add(key_of(completion))
        self._by_style: dict[tuple[bool, ...], tuple[list[int], list[tuple[str, Text]]]] = {}

    def draw(self, rng: random.Random, prompt: str, taken: Collection[str], like: Text | None = None) -> Text | None:
        """
        Return a completion of another prompt that isn't among `taken`, `None` if none was found.

        Args:
            rng (`random.Random`): draws it.
            prompt (`str`): key of the prompt.
            taken (`Collection[str]`): keys of completions.
            like (`str` or `list[dict]`, *optional*): completion whose length and style it has, up to `LIKE`.
        """
        pool = self.all if like is None else self._alike(answer_of(like))
        if not pool:
            return None
        others = (rng.choice(pool) for _ in range(TRIES))
        return next((text for key, text in others if key != prompt and key_of(text) not in taken), None)

    def _alike(self, text: str) -> list[tuple[str, Text]]:
        if not self._by_style:
            found: dict[tuple[bool, ...], list[tuple[int, str, Text]]] = {}
            for key, completion in self.all:
                answer = answer_of(completion)
                found.setdefault(style_of(answer), []).append((len(answer), key, completion))
            for style, each in found.items():
                each.sort(key=lambda one: one[0])
                self._by_style[style] = ([size for size, *_ in each], [(key, one) for _, key, one in each])
        sizes, each = self._by_style.get(style_of(text), ([], []))
        return each[bisect_left(sizes, len(text) / LIKE) : bisect_right(sizes, len(text) * LIKE)]


# ---- Files ----


class FileRow(NamedTuple):
    """A row of a file: the [`~rlhf_trl.data.splits.prompt_key`] of its prompt, and its texts or chats."""

    key: bytes
    texts: list[Text]


def read_texts(key: str, paths: str | list[str], read: Callable[[dict], list[Text]]) -> list[list[FileRow]]:
    """
    Read the rows of files with a `prompt` each.

    Args:
        key (`str`): key of the config, for messages.
        paths (`str` or `list[str]`): files and globs.
        read (callable): function that returns the texts of a row.

    Returns:
        `list[list[FileRow]]`: the rows of each file.

    Raises:
        [`~rlhf_trl.errors.DataError`]: with file and row, if one is malformed; for a file without rows.
    """
    files, problems, notes = [], Problems(), Counter()

    def check(row: dict) -> FileRow:
        row = read_json_chats(row, notes)
        prompt = check_text_or_chat(row, "prompt")
        refuse_images(row, prompt, "these files are matched with prompts by their text alone")
        return FileRow(prompt_key(prompt), read(row))

    for file in resolve_paths(paths, key):
        rows = list(checked_rows(file, check, problems))
        if not rows and not problems.count:
            raise DataError(f"`{key}`: {file} holds no rows. Name a file that has some.")
        files.append(rows)
    if problems.count:
        raise DataError(f"{problems.count} rows of `{key}` can't be used:\n{problems.text()}\nFix or remove them.")
    return files


def completions_of(row: dict) -> list[Text]:
    """Return the completions of a row of `stage=generate` (`completion`) or `stage=collect` (`candidates`)."""
    if row.get("candidates") is None:
        return [check_text_or_chat(row, "completion")]
    candidates = row["candidates"]
    if not isinstance(candidates, list) or not all(isinstance(each, dict) for each in candidates):
        raise RowError("candidates", "is no list of objects with a `completion`")
    return [check_text_or_chat(each, "completion") for each in candidates]


def paraphrase_of(row: dict) -> list[Text]:
    """Return the paraphrase of a row of `stage=paraphrase`."""
    return [check_text_or_chat(row, "paraphrase")]


def as_the_prompt(text: Text, prompt: Text) -> Text:
    """Return a paraphrase in the format of its prompt: of a chat, as its last turn."""
    if isinstance(prompt, str):
        return as_text(text) if isinstance(text, str) else answer_of(text)
    return with_answer(prompt, answer_of(text))


# ---- The options ----


def drop_unlike(feedback: Feedback, groups: Sequence[Group], notes: Counter) -> list[Group]:
    """Drop the comparisons of completions whose lengths or styles differ, where `feedback` says so."""

    def is_kept(group: Group, comparison: Comparison) -> bool:
        better, worse = (answer_of(group.completions[i]) for i in comparison[:2])
        short, long = sorted((len(better), len(worse)))
        if feedback.length_ratio is not None and long > feedback.length_ratio * max(short, 1):
            notes[f"comparisons dropped: lengths differ by more than `length_ratio={feedback.length_ratio:g}`"] += 1
            return False
        if feedback.same_style and style_of(better) != style_of(worse):
            notes["comparisons dropped: of two styles (`same_style`)"] += 1
            return False
        return True

    return [
        group._replace(comparisons=[each for each in group.comparisons if is_kept(group, each)]) for group in groups
    ]


def add_synthetic(
    feedback: Feedback,
    groups: Sequence[Group],
    rows: Sequence[Any],
    rng: random.Random,
    notes: Counter,
    held_out: Collection[bytes] = (),
) -> list[Group]:
    """
    Add the comparisons that the options of `feedback` ask for to each group of training rows.

    Args:
        feedback (`Feedback`): the options.
        groups (`Sequence[Group]`): completions of training prompts with what people said of them.
        rows (`Sequence`): the checked rows that they come from.
        rng (`random.Random`): makes every random choice.
        notes (`Counter`): counts what was added, and what could not be.
        held_out (`Collection[bytes]`): [`~rlhf_trl.data.splits.prompt_key`] of each held-out prompt.

    Raises:
        [`~rlhf_trl.errors.DataError`]: of a file, or of rows that have all the same prompt where others are needed.
    """
    pool = Pool(rows)
    for name in ("negatives", "matched"):
        if getattr(feedback, name) and len(pool.own) < 2:
            raise DataError(
                f"`data.feedback.{name}={getattr(feedback, name)}` takes completions of other prompts, and all rows "
                "have the same prompt. Set it to 0."
            )
    weaker = _weaker(feedback, groups, notes)
    made = []
    for group in groups:
        group, taken = _worse_copies(feedback, group, set(pool.own[key_of(group.prompt)]), rng, notes)
        if best := _best(group):
            prompt, like = key_of(group.prompt), group.completions[best[0]]
            for texts in weaker(group, rng):
                group = _add(feedback, group, next(texts, None), "weaker", taken, notes)
            for _ in range(feedback.matched):
                group = _add(feedback, group, pool.draw(rng, prompt, taken, like), "matched", taken, notes)
            for _ in range(feedback.negatives):
                group = _add(feedback, group, pool.draw(rng, prompt, taken), "negatives", taken, notes)
        made.append(group)
    return made + list(_paraphrased(feedback, groups, notes, held_out))


ADDED = {
    "negatives": "completions of other prompts added as negatives",
    "matched": "completions of other prompts, of like length and style, added as negatives",
    "truncated": "truncated copies of the best completion added as rejected",
    "perturbed": "copies of the best completion with changed words added as rejected",
    "weaker": "completions of weaker policies added as rejected",
}
NOT_FOUND = {
    "negatives": "negatives not found: other prompts have the same completions",
    "matched": "negatives of like length and style not found",
    "truncated": "truncated copies not made: fewer than four words, or the row has such a completion",
    "perturbed": "copies with changed words not made: fewer than four words, or the row has such a completion",
    "weaker": "rows for which a weaker policy has no completion of its own",
}


def _best(group: Group) -> list[int]:
    """Return the completions of a group that are better than another one, and than which none is better."""
    return sorted({c.better for c in group.comparisons} - {c.worse for c in group.comparisons})


def _add(feedback: Feedback, group: Group, text: Text | None, source: str, taken: set[str], notes: Counter) -> Group:
    """Return a group with one more completion, worse than the best ones of people; without one it is counted."""
    if text is None or key_of(text) in taken:
        notes[NOT_FOUND[source]] += 1
        return group
    taken.add(key_of(text))
    notes[ADDED[source]] += 1
    share = None if feedback.agreement is None else 1.0
    new = len(group.completions)
    comparisons = [Comparison(i, new, 1.0, share, source) for i in _best(group)]
    # Nobody rated what was added
    return group._replace(
        completions=[*group.completions, text],
        comparisons=[*group.comparisons, *comparisons],
        ratings=None,
        safe=None if group.safe is None else [*group.safe, None],
    )


def _worse_copies(
    feedback: Feedback, group: Group, taken: set[str], rng: random.Random, notes: Counter
) -> tuple[Group, set[str]]:
    """Return a group with the worse copies of its best completions, and the keys of its completions."""
    for source, make in (("truncated", truncated), ("perturbed", perturbed)):
        for _ in range(getattr(feedback, source) if _best(group) else 0):
            best = group.completions[rng.choice(_best(group))]
            changed = make(answer_of(best), rng)
            text = None if changed is None else with_answer(best, changed)
            group = _add(feedback, group, text, source, taken, notes)
    return group, taken


def _weaker(
    feedback: Feedback, groups: Sequence[Group], notes: Counter
) -> Callable[[Group, random.Random], list[Iterator[Text]]]:
    """Return a function that gives, for each file of weaker policies, its completions of a group's prompt."""
    if feedback.weaker is None:
        return lambda group, rng: []
    files = read_texts("data.feedback.weaker", feedback.weaker, completions_of)
    known = {prompt_key(group.prompt) for group in groups}
    found: list[dict[bytes, list[Text]]] = []
    for rows in files:
        by_prompt: dict[bytes, list[Text]] = {}
        for row in rows:
            notes["rows of `weaker` not used: their prompts aren't compared in training"] += row.key not in known
            by_prompt.setdefault(row.key, []).extend(row.texts)
        found.append(by_prompt)

    def draw(group: Group, rng: random.Random) -> list[Iterator[Text]]:
        chat, own = isinstance(group.prompt, list), {key_of(each) for each in group.completions}
        drawn = []
        for by_prompt in found:
            each = by_prompt.get(prompt_key(group.prompt), [])
            texts = [as_chat(text, "assistant") if chat else answer_of(text) for text in rng.sample(each, len(each))]
            drawn.append(iter([text for text in texts if key_of(text) not in own]))
        return drawn

    return draw


def _paraphrased(
    feedback: Feedback, groups: Sequence[Group], notes: Counter, held_out: Collection[bytes]
) -> Iterator[Group]:
    """Yield each group once more per paraphrase of its prompt, but for those that say a held-out prompt."""
    if feedback.paraphrased is None:
        return
    paraphrases: dict[bytes, list[Text]] = {}
    known = {prompt_key(group.prompt) for group in groups}
    for rows in read_texts("data.feedback.paraphrased", feedback.paraphrased, paraphrase_of):
        for row in rows:
            notes["rows of `paraphrased` not used: their prompts aren't compared in training"] += row.key not in known
            paraphrases.setdefault(row.key, []).extend(row.texts)
    for group in groups:
        if not group.comparisons:
            continue
        seen = {prompt_key(group.prompt)}
        for text in paraphrases.get(prompt_key(group.prompt), []):
            prompt = as_the_prompt(text, group.prompt)
            if prompt_key(prompt) in held_out:
                notes["paraphrases dropped: they are held-out prompts"] += 1
            elif prompt_key(prompt) in seen:
                notes["paraphrases dropped: they repeat their prompt or another paraphrase of it"] += 1
            else:
                seen.add(prompt_key(prompt))
                notes["rows added with a paraphrased prompt"] += 1
                comparisons = [each._replace(source="paraphrased") for each in group.comparisons]
                yield group._replace(prompt=prompt, comparisons=comparisons, ratings=None)
