"""Rewards from Python functions."""

import asyncio
import contextlib
import inspect
import math
import os
from collections.abc import Callable, Collection
from typing import Any

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_trl.config.dotpaths import find, not_taken, signature
from rlhf_trl.errors import ConfigError
from rlhf_trl.hints import names_of
from rlhf_trl.rewards.base import GIVEN, Reward
from rlhf_trl.rewards.model import await_result


class FunctionReward(Reward):
    """
    A Python function as reward.

    Args:
        function (`str` or callable): the function, or its dot path (`my_package.my_module.my_reward`), sync or async.
            It is called with `prompts`, `completions`, `completion_ids` and the dataset's other columns as lists, and
            with `tokenizer`, the policy's, as far as its signature takes them, and returns one number a completion,
            or None where it doesn't apply. A path may lead to what Hydra allows as `_target_`.
        kwargs (`dict`, *optional*): further arguments of the function.
        weight (`float`), name (`str`, *optional*, defaults to the function's name): see [`Reward`].

    Raises:
        ConfigError: for a function that can't be imported, or `kwargs` that it doesn't take; when called, if an
            argument of the function is missing, or it returns a wrong number of values or something that is no number.
    """

    def __init__(
        self,
        function: str | Callable,
        kwargs: dict[str, Any] | None = None,
        weight: float = 1.0,
        name: str | None = None,
    ):
        self.function = find(function) if isinstance(function, str) else function
        inner = getattr(self.function, "func", self.function)  # of a partial
        super().__init__(name or getattr(inner, "__name__", type(inner).__name__), weight)
        self._said = f"`{function}`" if isinstance(function, str) else f"`{self.__name__}`"
        self.kwargs = dict(kwargs or {})
        parameters = signature(self.function)
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self._takes = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        self._needs = [
            p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
        self._check_arguments()
        self._tokenizer: PreTrainedTokenizerBase | None = None

    def _check_arguments(self) -> None:
        where = f"reward.{self.__name__}.kwargs"
        if taken := [key for key in self.kwargs if key in GIVEN]:
            raise ConfigError(
                f"`{where}.{taken[0]}` would replace the `{taken[0]}` that every reward function gets. Name it "
                f"otherwise, in the signature of {self._said} too."
            )
        if unknown := not_taken(self.function, self.kwargs, strict=True, given=GIVEN):
            key, hint = next(iter(unknown.items()))
            raise ConfigError(
                f"`{where}.{key}` is no argument of {self._said}. {hint} (One that is meant has to stand in the "
                "function's signature.)"
            )
        if by_position := [name for name in self._needs if name not in self._takes]:
            raise ConfigError(
                f"The reward function {self._said} takes `{by_position[0]}` by position only, and a reward gets its "
                "arguments by name. Take the `/` out of its signature."
            )

    def bind(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """See [`Reward.bind`]."""
        self._tokenizer = tokenizer

    def column_problem(self, columns: Collection[str]) -> str | None:
        """See [`Reward.column_problem`]."""
        return self._missing({*columns, *GIVEN, *self.kwargs}, columns)

    def _missing(self, given: Collection[str], columns: Collection[str]) -> str | None:
        missing = [name for name in self._needs if name not in given]
        if not missing:
            return None
        name = missing[0]
        return (
            f"The reward function {self._said} needs an argument `{name}`, and the data has no such column (it has "
            f"{names_of(sorted(columns)) or 'none besides the prompt'}). Name the column so "
            f"(`+data.columns.{name}=...` renames one), type `+reward.{self.__name__}.kwargs.{name}=...`, or give "
            f"`{name}` a default in the function."
        )

    def __call__(self, prompts: list, completions: list, **columns) -> list[float | None]:
        """Rewards of the completions, one each. `prompts` and `completions` are texts or chat messages."""
        given = {"tokenizer": self._tokenizer} | columns | {"prompts": prompts, "completions": completions}
        given |= self.kwargs
        if problem := self._missing(given, [name for name in columns if name not in GIVEN]):
            raise ConfigError(problem)
        if not self._takes_all:
            given = {key: value for key, value in given.items() if key in self._takes}
        with contextlib.chdir(os.curdir):  # and back: the run's own paths may be relative
            values = self.function(**given)
            if inspect.isawaitable(values):
                values = asyncio.run(await_result(values))
        return self._checked(values, len(completions))

    def _checked(self, values, expected: int) -> list[float | None]:
        says = f"The reward function {self._said} returned"
        todo = "Return a list with one number (or None) for each completion."
        if getattr(values, "ndim", 1) != 1:  # of arrays and tensors
            raise ConfigError(f"{says} values of shape {tuple(values.shape)} for {expected} completions. {todo}")
        if not hasattr(values, "__len__") or isinstance(values, (str, bytes, dict, set)):
            raise ConfigError(f"{says} {type(values).__name__}. {todo}")
        if len(values) != expected:
            raise ConfigError(f"{says} {len(values)} values for {expected} completions. {todo}")
        if isinstance(values, Tensor):
            values = values.tolist()
        return [self._number(value, row) for row, value in enumerate(values)]

    def _number(self, value: Any, row: int) -> float | None:
        if value is None:
            return None
        says = f"The reward function {self._said} returned"
        if hasattr(value, "__float__") and not isinstance(value, str):
            try:
                return float(value)
            except OverflowError:
                raise ConfigError(
                    f"{says} for completion {row} a number beyond what a float can hold. Scale it, or bound it."
                ) from None
            except (TypeError, ValueError, RuntimeError):  # an array or tensor of several
                pass
        shown = repr(value) if len(repr(value)) < 60 else f"{repr(value)[:60]}..."
        raise ConfigError(
            f"{says} {shown} for completion {row}. Return a number, or None where the function doesn't apply."
        )


class FiniteReward(Reward):
    """
    A reward for trainers that would count NaN as "not applicable" and choke on infinity (TRL's GRPO and RLOO): a NaN
    or infinite value is an error there. `PPOTrainer` leaves such rows out and counts them instead.
    """

    def __init__(self, reward: Reward):
        super().__init__(reward.__name__, reward.weight)
        self.reward, self.calibration = reward, reward.calibration

    def check(self) -> None:
        """See [`Reward.check`]."""
        self.reward.check()

    def column_problem(self, columns: Collection[str]) -> str | None:
        """See [`Reward.column_problem`]."""
        return self.reward.column_problem(columns)

    def attach(self, policy: PreTrainedModel | PeftModel) -> None:
        """See [`Reward.attach`]."""
        self.reward.attach(policy)

    def __call__(self, prompts: list, completions: list, **columns) -> list[float | None]:
        """The wrapped reward's values."""
        values = self.reward(prompts, completions, **columns)
        for row, value in enumerate(values):
            if value is not None and not math.isfinite(value):
                raise ConfigError(
                    f"The reward `{self.__name__}` is {value} for completion {row}: {str(completions[row])[:200]!r}. "
                    "Mend it, or let it return None where it doesn't apply."
                )
        return values
