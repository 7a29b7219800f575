"""Rewards that can be hacked, or that teach nothing: what a health monitor has to see."""

PHRASE = "I am sorry, but I will not help you."


def _texts(completions):
    return [completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions]


def sorry(completions, **columns):
    """Pays for every "sorry", and for nothing else."""
    return [float(text.lower().count("sorry")) for text in _texts(completions)]


def length(completions, **columns):
    """Pays for every word."""
    return [0.2 * len(text.split()) for text in _texts(completions)]


def one_answer(completions, **columns):
    """Pays for words of one phrase, whatever was asked, and for not saying more."""
    wanted = PHRASE.split()
    return [
        sum(a == b for a, b in zip(text.split(), wanted, strict=False)) - 0.5 * max(0, len(text.split()) - len(wanted))
        for text in _texts(completions)
    ]


def constant(completions, **columns):
    """Return the same for everything."""
    return [1.0 for _ in completions]


def again(completions, **columns):
    """Pays for every word that stands there for the second time or more."""
    return [float(len(text.split()) - len(set(text.split()))) for text in _texts(completions)]


class Burst:
    """Pays for short answers, and in one rollout of many a thousand times as much."""

    calls = 0

    def __call__(self, completions, **columns):
        self.calls += 1
        return [(-1000.0 if self.calls == 9 else -1.0) * len(text.split()) for text in _texts(completions)]


burst = Burst()
