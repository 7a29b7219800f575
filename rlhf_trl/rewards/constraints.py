"""Constraints on the means of rewards, such as `{harmless: ">= 0.5", tokens: "<= 60"}`. Imports no torch."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rlhf_trl.hints import did_you_mean

BOUND = re.compile(r"\s*(>=|<=)\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*")


class Bound(NamedTuple):
    """
    Bound of the mean of a reward.

    Attributes:
        sign (`float`): 1 for a largest mean (`<=`), -1 for a smallest one (`>=`).
        limit (`float`): the bound, on the scale of the raw reward.
    """

    sign: float
    limit: float

    @classmethod
    def parse(cls, text: str) -> "Bound":
        """
        Return the bound that a text such as `">= 0.5"` says.

        Raises:
            ValueError: for another text.
        """
        found = BOUND.fullmatch(text)
        if found is None or not math.isfinite(float(found[2])):
            raise ValueError(text)
        return cls(1.0 if found[1] == "<=" else -1.0, float(found[2]))

    def __str__(self) -> str:
        return f"{'<=' if self.sign > 0 else '>='} {self.limit:g}"

    def excess(self, value: Any) -> Any:
        """Return by how much a value, or an array or tensor of them, violates the bound; below 0 it satisfies it."""
        return self.sign * (value - self.limit)


def constraint_problems(constraints: Any, names: Sequence[str], key: str = "combine.constraints") -> list[str]:
    """
    Return the problems of constraints on the means of rewards, or none.

    Args:
        constraints: `{name of a reward: bound}`, as the config has it.
        names (`Sequence[str]`): names of the rewards.
        key (`str`): where the config has the constraints.
    """
    example = f"""Set for example `'{key}={{{names[-1] if names else "NAME"}: ">= 0.5"}}'`."""
    if not isinstance(constraints, Mapping) or not constraints:
        given = "not set" if not constraints else repr(constraints)
        return [f"`{key}` is {given} and must name rewards, each with a bound of its mean. {example}"]
    problems = []
    for name, text in constraints.items():
        if name not in names:
            problems.append(f"`{key}` names `{name}`, and there is no such reward. {did_you_mean(str(name), names)}")
        if not _is_bound(text):
            way = f'">= {text}" or "<= {text}"' if _is_number(text) else '">= NUMBER" or "<= NUMBER"'
            problems.append(f"`{key}.{name}` is {text!r} and must be a bound: {way}, in quotes.")
    return problems


def lagrange_problems(constraints: Any, weights: Mapping[str, Any]) -> list[str]:
    """
    Return the problems of the constraints of `combine=lagrange`, or none.

    Args:
        constraints: `{name of a reward: bound}`, as the config has it.
        weights (`Mapping[str, Any]`): weight of each reward, by its name.
    """
    names = list(weights)
    if problems := constraint_problems(constraints, names):
        return problems
    problems = [
        f"`combine.constraints` names `{name}`, whose weight is 0. The weight is the scale of the constraint's cost: "
        f"set `reward.{name}.weight=1`, or remove the constraint."
        for name in constraints
        if weights[name] == 0
    ]
    if all(name in constraints or weights[name] == 0 for name in names):
        problems.append(
            "`combine.constraints` leaves no reward to maximize. Add one to `reward`, such as "
            "`'reward=[demo,tokens]'`, or remove a constraint."
        )
    return problems


def multiplier_problem(lambda_init: Any, lambda_max: Any) -> str | None:
    """Return that the multipliers of `combine=lagrange` would begin above their limit, `None` if they don't."""
    if not (_is_number(lambda_init) and _is_number(lambda_max) and lambda_init > lambda_max):
        return None
    return (
        f"`combine.lambda_init={lambda_init:g}` is above `combine.lambda_max={lambda_max:g}`, the upper limit of the "
        f"multipliers. Set `combine.lambda_max={2 * lambda_init:g}`, or a lower `combine.lambda_init`."
    )


def _is_bound(text: Any) -> bool:
    try:
        Bound.parse(str(text))
    except ValueError:
        return False
    return isinstance(text, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
