"""Questions of candidates, as labelers are asked them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from rlhf_trl.errors import ConfigError
from rlhf_trl.labels.agreement import Unit
from rlhf_trl.labels.candidates import Candidates, Text
from rlhf_trl.labels.store import asked_about, size_in_words


@dataclass(frozen=True)
class Task:
    """
    A question for one labeler.

    Args:
        row ([`~rlhf_trl.labels.candidates.Candidates`]): the candidates.
        question (`tuple[int, ...]`): indices of those that are asked about.
        form (`str`): form of the answer.
        turn (`int`): how often the labeler has answered it before.
        kind (`str`): open, gold (its answer is known) or repeat.
    """

    row: Candidates
    question: tuple[int, ...]
    form: str
    turn: int = 0
    kind: Literal["open", "gold", "repeat"] = "open"

    @property
    def texts(self) -> list[Text]:
        """The completions asked about."""
        return [self.row.candidates[i].completion for i in self.question]

    @property
    def unit(self) -> Unit:
        """The key of its labels."""
        return self.row.id, tuple(sorted(self.question)), self.form

    @property
    def key(self) -> str:
        """Name of the task: an answer that is sent twice is saved once."""
        return f"{self.row.id}|{'-'.join(map(str, self.question))}|{self.turn}"


def tasks_of(rows: Iterable[Candidates], form: str) -> dict[Unit, Task]:
    """
    Return the questions of candidates by the key of their labels, each once.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if a question doesn't fit the form.
    """
    found: dict[Unit, Task] = {}
    for row in rows:
        for question in row.questions:
            if (asked := asked_about(question, form)) is None:
                other = "ranking" if form == "pair" and len(question) > 1 else "rating"
                raise ConfigError(
                    f"The candidates of `{row.id}` have the question {list(question)}, of which `stage.ask={form}` "
                    f"can't be asked: it needs {size_in_words(form)}. Set `stage.ask={other}`, or collect with "
                    "another `stage.question_size`."
                )
            task = Task(row, tuple(asked), form)
            found.setdefault(task.unit, task)
    return found
