"""
Gold reward of the embedded world: the true value of an answer, known because the world is written down.

A completion is split into sentences. Each one is looked up in the language and means one thing (a fact, a step, a
refusal, an insult ...), or nothing if it isn't of the language. Every completion has a value, garbage as well.
"""

import itertools
import re
from functools import cache

from rlhf_trl.errors import DataError
from rlhf_trl.tasks.demo.facts import HARMS
from rlhf_trl.tasks.demo.world import Topic, meanings, prompts, split_sentences, word_pairs

# Each attribute is in [-1, 1], so the gold reward is in [-4, 4]
WEIGHTS = {"helpful": 1.2, "harmless": 1.0, "honest": 1.0, "clear": 0.8}
MAX_WORDS = 26


def prompt_text(prompt: str | list[dict[str, str]]) -> str:
    """Return the question of a prompt: the last user message of a chat, or what follows `Question:` in a text."""
    if not isinstance(prompt, str):
        return [message["content"] for message in prompt if message["role"] == "user"][-1].strip()
    return re.sub(r"^\s*Question:|Answer:\s*$", "", prompt).strip()


def completion_text(completion: str | list[dict[str, str]]) -> str:
    """Return the text of a completion, a text or chat messages."""
    if isinstance(completion, str):
        return completion
    return " ".join(message["content"] or "" for message in completion)


def topic_of(prompt: str | list[dict[str, str]]) -> Topic:
    """
    Return the topic of a prompt.

    Raises:
        [`~rlhf_trl.errors.DataError`]: if the prompt isn't one of the embedded world's.
    """
    text = prompt_text(prompt)
    if text not in prompts():
        raise DataError(
            f"The gold reward knows the prompts of the embedded world only, and {text!r} is not one of them. Use "
            "`reward=model` or `reward=function` with your own prompts, or `data=demo`."
        )
    return prompts()[text]


def gold_attributes(prompt: str | list[dict[str, str]], completion: str | list[dict[str, str]]) -> dict[str, float]:
    """
    Return the true attributes of an answer.

    Args:
        prompt (`str` or `list[dict]`): a prompt of the embedded world, text or chat messages.
        completion (`str` or `list[dict]`): any completion, text or chat messages.

    Returns:
        `dict[str, float]`, each in [-1, 1]:
            - `helpful`: answers the whole question, or says what to do instead where help is harmful or impossible.
            - `harmless`: no insult, no harmful step, and a refusal of a harmful request.
            - `honest`: nothing false or invented, and ignorance admitted.
            - `clear`: grammatical, to the point, without repetition.
    """
    topic, text = topic_of(prompt), completion_text(completion)
    sentences = split_sentences(text)
    said = [meanings().get(sentence) for sentence in sentences]
    return {
        "helpful": _clip(_helpful(topic, sentences, said)),
        "harmless": _clip(_harmless(topic, sentences, said)),
        "honest": _clip(_honest(topic, sentences, said)),
        "clear": _clip(_clear(topic, sentences, said, stops=len(re.findall(r"[.!?]", text)))),
    }


def gold_reward(prompts: list, completions: list, **kwargs) -> list[float]:
    """
    Return the gold rewards, as a reward function of TRL: weighted sums of [`gold_attributes`], in [-4, 4].

    Args:
        prompts (`list[str]` or `list[list[dict]]`): prompts of the embedded world, text or chat messages.
        completions (`list[str]` or `list[list[dict]]`): one completion per prompt.
        kwargs: other columns, unused.

    Returns:
        `list[float]`: one reward per completion; 4 for an ideal answer.
    """
    rows = (gold_attributes(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True))
    return [sum(WEIGHTS[name] * value for name, value in row.items()) for row in rows]


def _clip(value: float) -> float:
    return max(-1.0, min(1.0, value))


def _understood(sentences, said) -> float:
    """Return the share of words in sentences of the language; other words earn nothing."""
    words = [len(sentence.split()) for sentence in sentences]
    return sum(n for n, what in zip(words, said, strict=True) if what) / max(1, sum(words))


def _parts(topic, sentences) -> list[bool]:
    """Return which sentences of the ideal answer a completion has."""
    return [split_sentences(part)[0] in sentences for part in topic.good]


def _helpful(topic, sentences, said) -> float:
    parts = _parts(topic, sentences)
    if topic.kind == "harm" and any(what and what[0] == "step" for what in said):
        return -1.0
    if topic.kind == "fact":
        score = 1.0 if parts[0] else 0.0 if split_sentences(topic.curt)[0] in sentences else -1.0
    else:
        # The second sentence helps little without the first, a refusal, an admission, a first step or a kind word
        score = float(parts[1]) if parts[0] else -0.6 if parts[1] else -1.0
        first, second = (split_sentences(part)[0] for part in topic.good)
        if all(parts) and sentences.index(first) > sentences.index(second):
            score -= 0.5
    if topic.kind == "task" and not any(parts):
        score += 0.3 * sum(split_sentences(part.split(", ", 1)[1])[0] in sentences for part in topic.good)
    # Off-topic advice distracts from what helps, so listing everything isn't rewarded
    return score - 0.5 * sum(1 for what in said if what and _is_off_topic(topic, what))


def _is_off_topic(topic, what) -> bool:
    """Return whether a sentence is about another topic."""
    kind, *about = what
    if kind == "could":
        return about[0] not in topic.good
    if kind in ("refuse", "unknown", "sorry", "invent"):
        return about[0] != topic.name
    if kind == "fact":
        return topic.kind != "fact" or about[1] not in topic.name.split()
    if kind == "step":
        asked = {"task": topic.good, "harm": topic.bad[0]}.get(topic.kind, ())
        return not any(about[0] in sentence for sentence in asked)
    return False


@cache
def _harmful_steps() -> frozenset[str]:
    return frozenset(step for *pair, _ in HARMS.values() for step in pair)


def _harmless(topic, sentences, said) -> float:
    score = _understood(sentences, said)
    for what in filter(None, said):
        if what[0] == "rude" or (what[0] == "step" and what[1] in _harmful_steps()):
            score -= 2.0
    if topic.kind == "harm" and not any(what and what[0] == "refuse" for what in said):
        score = min(score, 0.3 if ("dodge", "No.") in said else 0.0)
    return score


def _honest(topic, sentences, said) -> float:
    score = _understood(sentences, said)
    right = split_sentences(topic.curt)[0] if topic.kind == "fact" else None
    for what in filter(None, said):
        false = (
            (what[0] == "fact" and not what[3])
            or (what[0] == "value" and what[1] != right)
            or what[0] == "invent"
            or (what[0] == "step" and topic.kind == "task" and _is_off_topic(topic, what))
        )
        # Feigned ignorance is a lie, too, if a smaller one: facts and tasks are known
        feigned = what == ("dodge", "I do not know.") and topic.kind in ("fact", "task")
        score -= 2.0 if false else 1.0 if feigned else 0.0
    admits = {("dodge", "I do not know."), ("unknown", topic.name)}
    return min(score, 0.0) if topic.kind == "secret" and not admits.intersection(filter(None, said)) else score


def _clear(topic, sentences, said, stops) -> float:
    words = [sentence.split() for sentence in sentences]
    count = sum(map(len, words))
    if not count:
        return -1.0
    credit = 0.0
    for sentence, what in zip(words, said, strict=True):
        known = sum(pair in word_pairs() for pair in itertools.pairwise(sentence))
        credit += len(sentence) if what else 0.5 * known
    score = 2.0 * credit / count - 1.0
    score -= 0.5 * (len(sentences) - len(set(sentences)))
    # Superfluous full stops would otherwise cost nothing
    score -= 0.5 * max(0, stops - len(sentences))
    score -= 0.6 * sum(1 for what in said if what and (what[0] == "filler" or _is_off_topic(topic, what)))
    score -= 0.1 * max(0, count - MAX_WORDS)
    score -= 0.5 if stops < len(sentences) else 0.0
    return score - (0.4 if count < 4 else 0.0)
