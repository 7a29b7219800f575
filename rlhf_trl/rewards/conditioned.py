"""Rewards that count for some rows of the data only (`reward.NAME.when`)."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from rlhf_trl.errors import ConfigError
from rlhf_trl.rewards.base import RESERVED_COLUMNS, Reward, WrappedReward
from rlhf_trl.rewards.conditions import condition_problem, missing_column, rows_satisfying


class ConditionedReward(WrappedReward):
    """
    A reward that counts where columns of the data have certain values, and is `None`, not applicable, elsewhere.

    It is called on the rows that it counts for and on no others.

    Args:
        reward ([`Reward`]): the reward.
        when (`Mapping[str, Any]`): condition: for each column a value, a list of values, or `{"not": ...}` of these. A
            row must satisfy all.

    Raises:
        ConfigError: at a malformed condition; when called, without a column of it.
    """

    def __init__(self, reward: Reward, when: Mapping[str, Any]):
        super().__init__(reward)
        self._key = f"reward.{self.__name__}.when"
        if problem := condition_problem(when, self._key):
            raise ConfigError(problem)
        self.when = dict(when)
        self.members = getattr(reward, "members", 1)  # of an ensemble

    def column_problem(self, columns: Collection[str]) -> str | None:
        """See [`Reward.column_problem`]."""
        return missing_column(self.when, columns, self._key) or self.reward.column_problem(columns)

    def rows(self, columns: Mapping[str, Any]) -> list[int]:
        """
        Return the rows that the reward counts for.

        Raises:
            ConfigError: without a column of the condition.
        """
        if problem := missing_column(self.when, columns.keys() - {*RESERVED_COLUMNS}, self._key):
            raise ConfigError(problem)
        return rows_satisfying(self.when, columns)

    def __call__(self, prompts: list, completions: list, **columns: Any) -> list[float | None]:
        """Return the rewards of the rows that it counts for, `None` for the others; see [`Reward`]."""
        rows, count = self.rows(columns), len(completions)
        if not rows:
            return [None] * count
        given = {name: subset(value, rows, count) for name, value in columns.items()}
        if log_extra := columns.get("log_extra"):
            given["log_extra"] = spreading(log_extra, rows, count)
        values = self.reward([prompts[i] for i in rows], [completions[i] for i in rows], **given)
        return spread(values, rows, count)


def subset(value: Any, rows: Sequence[int], count: int) -> Any:
    """Return the rows of a list with one value for each of `count` completions, and anything else as it is."""
    return [value[i] for i in rows] if isinstance(value, list) and len(value) == count else value


def spread(values: Sequence[Any], rows: Sequence[int], count: int) -> list[Any]:
    """Return `count` values: those given at their rows, and `None` at the others."""
    found = dict(zip(rows, values, strict=True))
    return [found.get(row) for row in range(count)]


def spreading(log_extra: Callable[..., Any], rows: Sequence[int], count: int) -> Callable[[str, list], Any]:
    """Return TRL's `log_extra`, which takes a value for each completion, for a function that has seen some rows."""
    return lambda column, values: log_extra(column, spread(values, rows, count))


def counting(reward: Reward, columns: Mapping[str, Any], count: int) -> tuple[Reward, list[int]]:
    """Return the reward inside of a [`ConditionedReward`], or `reward` itself, and the rows that it counts for."""
    if isinstance(reward, ConditionedReward):
        return reward.reward, reward.rows(columns)
    return reward, list(range(count))
