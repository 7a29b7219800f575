"""Conditions on columns of the data under which a reward counts, such as `{task: code}`. Imports no torch."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from rlhf_trl.hints import names_of

if TYPE_CHECKING:
    from datasets import Dataset

# What a dataset has besides the columns that rewards get
NOT_COLUMNS = ("prompt", "completion", "chosen", "rejected")
FORM = (
    "It names columns of the data, each with a value, a list of values, or `{not: ...}` of these: "
    "`'%s={task: code}'`, `'%s={task: [code, math]}'`, `'%s={answer: {not: null}}'`."
)


class ValueTest(NamedTuple):
    """
    Test of the value of a column.

    Attributes:
        values (`tuple`): text, numbers, booleans or None.
        negated (`bool`): whether the value must be none of these, instead of one of them.
    """

    values: tuple
    negated: bool = False

    @classmethod
    def parse(cls, given: Any) -> "ValueTest":
        """
        Return the test that the config says by a value, a list of values, or `{not: ...}` of these.

        Raises:
            ValueError: for anything else.
        """
        negated = isinstance(given, Mapping)
        if negated and list(given) != ["not"]:
            raise ValueError(given)
        inner = given["not"] if negated else given
        values = tuple(inner) if isinstance(inner, Sequence) and not isinstance(inner, str) else (inner,)
        if not values or not all(value is None or isinstance(value, str | int | float) for value in values):
            raise ValueError(given)
        return cls(values, negated)

    def __call__(self, value: Any) -> bool:
        """Return whether a value passes. True is no 1, and text no number."""
        same = any(isinstance(value, bool) == isinstance(each, bool) and value == each for each in self.values)
        return same != self.negated

    def __str__(self) -> str:
        return f"{'not ' if self.negated else ''}{' or '.join(map(repr, self.values))}"


def condition_problem(when: Any, key: str) -> str | None:
    """
    Return the problem of a condition, `None` if there is none.

    Args:
        when: `{column: value, list of values, or {not: ...} of these}`, or `None`, as the config has it.
        key (`str`): where the config has it, such as `reward.math.when`.
    """
    if when is None:
        return None
    form = FORM % (key, key, key)
    if not isinstance(when, Mapping) or not when:
        return f"`{key}` is {when!r} and must be a condition. {form}"
    for column, given in when.items():
        try:
            ValueTest.parse(given)
        except ValueError:
            return f"`{key}.{column}` is {given!r} and must be a value, or several. {form}"
    return None


def missing_column(when: Mapping[str, Any], columns: Collection[str], key: str) -> str | None:
    """Return the problem of a condition on a column that the data doesn't have, `None` if it has all."""
    there = sorted(set(columns) - {*NOT_COLUMNS})
    for column in when:
        if column not in there and {"chosen", "rejected"} <= set(columns):
            return (
                f"`{key}` is about the column `{column}`, and pairs keep no columns but their own: "
                f"{names_of(sorted(columns))}. Set `{key}=null`."
            )
        if column not in there:
            return (
                f"`{key}` is about the column `{column}`, and the data has no such column (it has "
                f"{names_of(there) or 'none besides the prompt'}). Rename a column (`+data.columns.{column}=...`), or "
                f"set `{key}=null`."
            )
    return None


def unmet_condition(when: Mapping[str, Any], rows: Iterable[Mapping[str, Any]], key: str) -> str | None:
    """
    Return the problem of a condition that no row of the data satisfies, `None` if one does.

    Args:
        when (`Mapping[str, Any]`): condition without a [`condition_problem`], on columns of the rows.
        rows (`Iterable[Mapping[str, Any]]`): rows of the data.
        key (`str`): where the config has the condition.
    """
    tests = {column: ValueTest.parse(given) for column, given in when.items()}
    seen: dict[str, dict[str, None]] = {column: {} for column in tests}  # values in the order they were met
    for row in rows:
        if all(test(row[column]) for column, test in tests.items()):
            return None
        for column, values in seen.items():
            values[repr(row[column])] = None
    parts = [
        f"`{column}` must be {test}, and the data has {', '.join(list(seen[column])[:5])}"
        f"{' ...' if len(seen[column]) > 5 else ''}"
        for column, test in tests.items()
    ]
    return (
        f"No row of the data satisfies `{key}`, so that this reward would count for none: {'; '.join(parts)}. "
        f"Correct it, or set `{key}=null`."
    )


def unmet_conditions(rewards: Mapping[str, Mapping[str, Any]], rows: "Dataset") -> list[str]:
    """
    Return the problems of rewards whose condition no row of the data satisfies, or none.

    Args:
        rewards (`Mapping[str, Mapping[str, Any]]`): options of each reward, `when` among them, by its name.
        rows (`Dataset`): the data.
    """
    conditions = {f"reward.{name}.when": options.get("when") for name, options in rewards.items()}
    problems = [
        unmet_condition(when, cast(Iterable[dict[str, Any]], rows.select_columns(list(when))), key)
        for key, when in conditions.items()
        if when and not missing_column(when, rows.column_names, key)
    ]
    return [problem for problem in problems if problem]


def rows_satisfying(when: Mapping[str, Any], columns: Mapping[str, Sequence]) -> list[int]:
    """
    Return the rows that satisfy a condition.

    Args:
        when (`Mapping[str, Any]`): condition without a [`condition_problem`].
        columns (`Mapping[str, Sequence]`): columns of the data, those of the condition among them.
    """
    tests = [(columns[column], ValueTest.parse(given)) for column, given in when.items()]
    count = min(len(values) for values, _ in tests)
    return [row for row in range(count) if all(test(values[row]) for values, test in tests)]
