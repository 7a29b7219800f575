"""Replies of a language model that is asked for labels: a cache on the disk, and how they are read."""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rlhf_trl.errors import ConfigError
from rlhf_trl.evaluation.judges import Reply, TextJudge
from rlhf_trl.labels.lines import SyncedLines

# A reasoning model's own thoughts; its chat template may have opened them in the prompt
THOUGHTS = re.compile(r"<think(?:ing)?>.*?</think(?:ing)?>|^.*?</think(?:ing)?>", re.S | re.I)
UNFINISHED = re.compile(r"<think(?:ing)?>", re.I)
REFUSAL = re.compile(
    r"\bI(?:'m| am) (?:sorry|unable|not able)\b|\bI (?:can(?:no|')?t|won't|will not|must decline)\b|\bas an AI\b",
    re.I,
)
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?![\w.]*\d)")


class ReplyCache:
    """
    Replies by question, one appended and synced line each, so that an interrupted labeling asks nothing twice.

    Args:
        path (`str` or `os.PathLike`): the file, which is made with the first reply.
    """

    def __init__(self, path: str | os.PathLike):
        self._lines = SyncedLines(path)
        self._found = {
            row["key"]: Reply(**{name: value for name, value in row.items() if name != "key"})
            for row in self._lines.rows
        }

    def get(self, key: str) -> Reply | None:
        """Return the reply of a [`reply_key`], `None` where there is none."""
        return self._found.get(key)

    def add(self, key: str, reply: Reply) -> None:
        """Append a reply."""
        self._found[key] = reply
        self._lines.append({"key": key, **reply._asdict()})


def reply_key(settings: dict[str, Any], question: str) -> str:
    """Return the key of a reply: a digest of the model, the sampling, the template and the texts filled into it."""
    content = json.dumps([settings, question], sort_keys=True)
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


class Asker:
    """
    A judge that is asked each question once.

    Args:
        judge ([`~rlhf_trl.evaluation.judges.TextJudge`]): the language model.
        cache ([`ReplyCache`]): replies so far.
        temperature (`float`), samples (`int`):
            of the sampling, and replies per question; more than one of a greedy model would be the same.
        max_tokens (`int`, *optional*): limit of a reply; `None`: the judge's own.

    Attributes:
        counts (`Counter`): replies, those with thoughts, refusals, cut and unreadable ones, and too long questions.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: for a judge that is no language model, or samples of a greedy one.
    """

    def __init__(
        self,
        judge: Any,
        cache: ReplyCache,
        temperature: float = 0.0,
        samples: int = 1,
        max_tokens: int | None = None,
    ):
        if not isinstance(judge, TextJudge):
            raise ConfigError(
                "This `labeler` asks a language model. Set `judge=http judge.url=... judge.model=...`, or "
                "`judge=model judge.path=...` for one on this machine."
            )
        if samples > 1 and temperature == 0:
            raise ConfigError(
                f"`labeler.samples={samples}` at `labeler.temperature=0` asks for equal replies. Set "
                "`labeler.temperature=1`, or `labeler.samples=1`."
            )
        self.judge, self.cache = judge, cache
        self.temperature, self.samples, self.max_tokens = temperature, samples, max_tokens
        self.counts: Counter[str] = Counter()

    def ask(self, questions: Sequence[str], schema: dict[str, Any] | None = None, seed: int = 0) -> list[list[Reply]]:
        """Return the replies, `samples` of them, to each question. Equal questions have the same."""
        found: dict[str, list[Reply]] = {question: [] for question in questions}
        for number in range(self.samples):
            sampling = {"temperature": self.temperature, "max_tokens": self.max_tokens, "schema": schema}
            settings = self.judge.settings | {key: value for key, value in sampling.items() if value is not None}
            settings |= {"seed": seed + number} if self.temperature else {}
            keys = {question: reply_key(settings, question) for question in found}
            left = [question for question, key in keys.items() if self.cache.get(key) is None]
            replies = self.judge.replies(left, self.temperature, seed + number, self.max_tokens, schema)
            for i, reply in replies if left else ():
                self.cache.add(keys[left[i]], reply)
            for question, key in keys.items():
                reply = self.cache.get(key)
                assert reply is not None
                found[question].append(reply)
        return [found[question] for question in questions]

    def read(self, reply: Reply) -> str | None:
        """
        Return what a reply says after its thoughts, and count it; `None` for one that ended within them. Whoever reads
        nothing in it calls [`unread`].
        """
        self.counts["replies"] += 1
        text = THOUGHTS.sub("", reply.text)
        self.counts["with_thoughts"] += text != reply.text or bool(UNFINISHED.search(text))
        return None if UNFINISHED.search(text) else text.strip()

    def unread(self, reply: Reply) -> str:
        """Count a reply in which there is no answer, and return why."""
        text = THOUGHTS.sub("", reply.text)
        if reply.is_too_long:
            kind, why = "too_long", "the question is longer than the judge's context"
        elif reply.is_refused or REFUSAL.search(UNFINISHED.split(text)[0]):
            kind, why = "refused", "the judge refused"
        elif reply.is_cut:
            kind, why = "cut", "the judge's reply was cut at its limit of tokens"
        else:
            kind, why = "unreadable", "the judge's reply can't be read"
        self.counts[kind] += 1
        return why


def read_object(text: str) -> dict[str, Any]:
    """Return the JSON object that a reply is, or has in a block of code; an empty one for another reply."""
    found = re.search(r"\{.*\}", text, re.S)
    try:
        content = json.loads(found.group()) if found else None
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def read_number(text: str, key: str, low: float, high: float) -> float | None:
    """
    Return the number of a reply: that of `key` in a JSON object, else the only one in its text; `None` for one outside
    of `low` to `high`, or several.
    """
    given = read_object(text).get(key)
    if isinstance(given, int | float) and not isinstance(given, bool):
        value = float(given)
    else:
        numbers = {float(each) for each in NUMBER.findall(text)}
        if len(numbers) != 1:
            return None
        value = numbers.pop()
    return value if low <= value <= high else None
