"""Language of the embedded world: prompts and their topics, answers, and the meaning of each sentence."""

import random
import re
import zlib
from dataclasses import dataclass
from functools import cache

from rlhf_trl.tasks.demo import facts

# Shares of the kinds of prompts
KINDS = {"fact": 0.3, "task": 0.2, "harm": 0.2, "secret": 0.2, "feeling": 0.1}
# One prompt in this many is held out, for every kind of feedback and whatever the seed.
HELD_OUT = 6


@dataclass(frozen=True)
class Topic:
    """
    Topic of a prompt.

    Attributes:
        kind (`str`): one of `KINDS`.
        name (`str`): topic, for instance `"bake bread"` or `"where Tom is now"`.
        good (`tuple[str, ...]`): sentences of the ideal answer, in order.
        bad (`tuple[tuple[str, ...], ...]`): wrong, invented or harmful answers.
        curt (`str`): correct answer that is too short.
    """

    kind: str
    name: str
    good: tuple[str, ...]
    bad: tuple[tuple[str, ...], ...]
    curt: str


def capital(text: str) -> str:
    """Return a text with its first letter in upper case, the others as they are."""
    return text[0].upper() + text[1:]


def article(noun: str) -> str:
    """Return a noun with `a` or `an`."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def steps(first: str, second: str) -> tuple[str, str]:
    """Return two steps as two sentences."""
    return f"First, {first}.", f"Then, {second}."


def fact_sentence(relation: str, noun: str, value: str) -> str:
    """Return a statement about a thing, true or false."""
    verb = {"color": "is", "kind": "is a kind of", "home": "lives", "food": "eats"}[relation]
    return f"{capital(article(noun))} {verb} {value}."


@cache
def true_facts() -> dict[tuple[str, str], str]:
    """Return the true value of each `(relation, thing)`."""
    values = {}
    for noun, (color, home, food) in facts.ANIMALS.items():
        values |= {("color", noun): color, ("home", noun): home, ("food", noun): food}
    for noun, (color, kind) in facts.THINGS.items():
        values |= {("color", noun): color, ("kind", noun): kind}
    return values


@cache
def relation_values(relation: str) -> tuple[str, ...]:
    """Return all values of a relation, sorted."""
    return tuple(sorted({value for (name, _), value in true_facts().items() if name == relation}))


def _fact_topics():
    for (relation, noun), value in true_facts().items():
        thing = article(noun)
        question, clause = {
            "color": (f"What color is {thing}", f"what color {thing} is"),
            "kind": (f"What kind of thing is {thing}", f"what kind of thing {thing} is"),
            "home": (f"Where does {thing} live", f"where {thing} lives"),
            "food": (f"What does {thing} eat", f"what {thing} eats"),
        }[relation]
        wrong = tuple((fact_sentence(relation, noun, v),) for v in relation_values(relation) if v != value)
        good = (fact_sentence(relation, noun, value),)
        yield Topic("fact", clause, good, wrong, f"{capital(value)}."), question, clause


def _task_topics():
    for name, pair in facts.TASKS.items():
        wrong = tuple(steps(*other) for key, other in facts.TASKS.items() if key != name)
        wrong += tuple((steps(*pair)[0], second) for _, second in wrong)
        yield Topic("task", name, steps(*pair), wrong, f"{capital(pair[0])}."), f"How do I {name}", f"how to {name}"


def _harm_topics():
    for name, (first, second, instead) in facts.HARMS.items():
        good = (f"I am sorry, but I will not help you {name}.", f"You could {instead}.")
        yield Topic("harm", name, good, (steps(first, second),), "No."), f"How do I {name}", f"how to {name}"


def _secret_topics():
    for person in facts.PEOPLE:
        for question, clause, invented, values in facts.SECRETS.values():
            clause = clause.format(p=person)
            good = (f"I do not know {clause}.", f"You could ask {person}.")
            bad = tuple((f"{invented.format(p=person, v=value)}.",) for value in values)
            yield Topic("secret", clause, good, bad, "I do not know."), question.format(p=person), clause


@cache
def prompts() -> dict[str, Topic]:
    """Return every prompt of the world (about 5,000) with its topic."""
    table = {}
    for topics in (_fact_topics, _task_topics, _harm_topics, _secret_topics):
        for topic, question, clause in topics():
            for opener in facts.OPENERS:
                table |= {opener + text.format(q=question, c=clause): topic for text in facts.QUESTIONS}
    for name, advice in facts.FEELINGS.items():
        good = (f"I am sorry that you feel {name}.", f"You could {advice}.")
        bad = tuple((good[0], f"You could {other}.") for key, other in facts.FEELINGS.items() if key != name)
        topic = Topic("feeling", name, good, bad, good[1])
        table |= {o + text.format(f=name): topic for o in facts.OPENERS for text in facts.COMPLAINTS}
    return table


def is_held_out(prompt: str) -> bool:
    """Return whether a prompt is of the evaluation split. That depends on its text only, so no seed mixes splits."""
    return zlib.crc32(prompt.encode()) % HELD_OUT == 0


def draw_prompts(rng: random.Random, count: int, held_out: bool) -> list[str]:
    """Draw `count` prompts of one split in the shares of `KINDS`; none again before all of its kind were drawn."""
    pools = {kind: [] for kind in KINDS}
    for prompt, topic in prompts().items():
        if is_held_out(prompt) == held_out:
            pools[topic.kind].append(prompt)
    decks, drawn = {kind: [] for kind in KINDS}, []
    for kind in rng.choices(list(KINDS), list(KINDS.values()), k=count):
        decks[kind] = decks[kind] or rng.sample(pools[kind], len(pools[kind]))
        drawn.append(decks[kind].pop())
    return drawn


def answer(topic: Topic, style: str, rng: random.Random) -> str:
    """
    Return an answer in one of the styles.

    These are `ideal`, `partial` (half of the ideal one), `wrong` (false, invented or harmful), `curt`, `rude`,
    `wordy`, `padded` (wordy and wrong), `dodge`, `astray` (of another topic), `broken` (ungrammatical), `rambling`
    (the ideal one, continued without end).
    """
    good = list(topic.good)
    if style == "partial":
        # The answer to a fact is one sentence, so half of it is the bare value, as in `curt`
        good = good[:1] if len(good) > 1 else [topic.curt]
    elif style == "wrong":
        good = list(rng.choice(topic.bad))
    elif style == "curt":
        good = [topic.curt]
    elif style == "rude":
        good = [rng.choice(facts.RUDE)] + (good if rng.random() < 0.5 else [])
    elif style in ("wordy", "padded"):
        # Bad answers are padded as often as good ones, so that length doesn't indicate quality
        good = good if style == "wordy" else list(rng.choice(topic.bad))
        before, after = rng.sample(facts.FILLER, 2)
        good = [before, *good] + ([after] if rng.random() < 0.6 else []) + (good if rng.random() < 0.2 else [])
    elif style == "dodge":
        good = [rng.choice(facts.DODGES)]
    elif style == "astray":
        good = list(rng.choice(list(prompts().values())).good)
    elif style == "rambling":
        others = [text for other in rng.sample(list(prompts().values()), 2) for text in other.good]
        good += rng.sample([*good, *others, *facts.FILLER], rng.randint(2, 5))
    text = " ".join(good)
    if style == "broken":
        words = text.split()
        i, j = rng.randrange(len(words)), rng.randrange(len(words))
        words[i], words[j] = words[j], words[i]
        text = " ".join(words + words[i : i + rng.randrange(3)])
    return text


def split_sentences(text: str) -> list[str]:
    """Return the sentences of a text, lower case, without punctuation but commas; the last may lack its full stop."""
    parts = re.split(r"[.!?]", text.lower())
    return [" ".join(re.findall(r"[a-z]+|[^\sa-z]", part)) for part in parts if part.strip()]


@cache
def meanings() -> dict[str, tuple]:
    """Return the meaning of each sentence of the language, a tuple whose first entry is its kind."""
    said = {}

    def add(text, *meaning):
        said.setdefault(split_sentences(text)[0], meaning)

    for (relation, noun), value in true_facts().items():
        add(f"{value}.", "value", value)
        for other in relation_values(relation):
            add(fact_sentence(relation, noun, other), "fact", relation, noun, other == value)
    for first, second, *_ in (*facts.TASKS.values(), *facts.HARMS.values()):
        for step in (first, second):
            for text in (f"First, {step}.", f"Then, {step}.", f"{step}."):
                add(text, "step", step)
    for topic in prompts().values():
        if topic.kind == "harm":
            add(topic.good[0], "refuse", topic.name)
        elif topic.kind == "secret":
            add(topic.good[0], "unknown", topic.name)
            for (invented,) in topic.bad:
                add(invented, "invent", topic.name)
        elif topic.kind == "feeling":
            add(topic.good[0], "sorry", topic.name)
        if topic.kind in ("harm", "secret", "feeling"):
            add(topic.good[1], "could", topic.good[1])
    for sentences, what in ((facts.RUDE, "rude"), (facts.FILLER, "filler"), (facts.DODGES, "dodge")):
        for text in sentences:
            add(text, what, text)
    return said


@cache
def word_pairs() -> frozenset[tuple[str, str]]:
    """Return all pairs of neighboring words of the language."""
    return frozenset(pair for text in meanings() for pair in zip(text.split(), text.split()[1:], strict=False))
