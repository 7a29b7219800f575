"""Rewards from Python functions."""

import asyncio
import contextlib
import inspect
import os
from collections.abc import Awaitable, Callable, Collection
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_trl.config.dotpaths import find, not_taken, signature
from rlhf_trl.errors import ConfigError
from rlhf_trl.hints import names_of
from rlhf_trl.rewards.base import RESERVED_COLUMNS, BaseReward


class FunctionReward(BaseReward):
    """
    A reward from a Python function.

    Args:
        function (`str` or callable): function, sync or async, or its dot path (`my_package.my_module.my_reward`);
            anything that Hydra allows as `_target_`. It is called with `prompts`, `completions`,
            `completion_ids` and the dataset's other columns as lists, and with the policy's `tokenizer`, as far as its
            signature takes them. It returns one number per completion, or None where it doesn't apply.
        kwargs (`dict`, *optional*): further arguments of the function.
        weight (`float`): see [`Reward`].
        name (`str`, *optional*, defaults to the function's name): see [`Reward`].

    Raises:
        ConfigError: if the function can't be imported or doesn't take the `kwargs`; when called, if an argument of the
            function is missing, or if it returns a wrong number of values or something that isn't a number.
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
        self._label = f"`{function}`" if isinstance(function, str) else f"`{self.__name__}`"
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
        if taken := [key for key in self.kwargs if key in RESERVED_COLUMNS]:
            raise ConfigError(
                f"`{where}.{taken[0]}` would replace the `{taken[0]}` that every reward function gets. Rename "
                f"it, in the signature of {self._label} as well."
            )
        if unknown := not_taken(self.function, self.kwargs, strict=True, given=RESERVED_COLUMNS):
            key, hint = next(iter(unknown.items()))
            raise ConfigError(
                f"`{where}.{key}` is no argument of {self._label}. {hint} (An intended one must be in the "
                "function's signature.)"
            )
        if by_position := [name for name in self._needs if name not in self._takes]:
            raise ConfigError(
                f"The reward function {self._label} takes `{by_position[0]}` by position only, and a reward gets its "
                "arguments by name. Take the `/` out of its signature."
            )

    def bind(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """See [`Reward.bind`]."""
        self._tokenizer = tokenizer

    def column_problem(self, columns: Collection[str]) -> str | None:
        """See [`Reward.column_problem`]."""
        return self._missing({*columns, *RESERVED_COLUMNS, *self.kwargs}, columns)

    def _missing(self, given: Collection[str], columns: Collection[str]) -> str | None:
        missing = [name for name in self._needs if name not in given]
        if not missing:
            return None
        name = missing[0]
        return (
            f"The reward function {self._label} needs an argument `{name}`, and the data has no such column (it has "
            f"{names_of(sorted(columns)) or 'none besides the prompt'}). Rename a column "
            f"(`+data.columns.{name}=...`), set `+reward.{self.__name__}.kwargs.{name}=...`, or give "
            f"`{name}` a default in the function."
        )

    def __call__(self, prompts: list, completions: list, **columns: Any) -> list[float | None]:
        """Return one reward per completion; see [`Reward`]."""
        given = {"tokenizer": self._tokenizer} | columns | {"prompts": prompts, "completions": completions}
        given |= self.kwargs
        if problem := self._missing(given, [name for name in columns if name not in RESERVED_COLUMNS]):
            raise ConfigError(problem)
        if not self._takes_all:
            given = {key: value for key, value in given.items() if key in self._takes}
        with contextlib.chdir(os.curdir):  # the function may change it, and the run's own paths may be relative
            values = self.function(**given)
            if inspect.isawaitable(values):
                values = asyncio.run(_await(values))
        return self._checked(values, len(completions))

    def _checked(self, values: Any, expected: int) -> list[float | None]:
        returned = f"The reward function {self._label} returned"
        remedy = "Return a list with one number (or None) for each completion."
        if getattr(values, "ndim", 1) != 1:  # of arrays and tensors
            raise ConfigError(f"{returned} values of shape {tuple(values.shape)} for {expected} completions. {remedy}")
        if not hasattr(values, "__len__") or isinstance(values, (str, bytes, dict, set)):
            raise ConfigError(f"{returned} {type(values).__name__}. {remedy}")
        if len(values) != expected:
            raise ConfigError(f"{returned} {len(values)} values for {expected} completions. {remedy}")
        if isinstance(values, Tensor):
            values = values.tolist()
        return [self._number(value, row) for row, value in enumerate(values)]

    def _number(self, value: Any, row: int) -> float | None:
        if value is None:
            return None
        returned = f"The reward function {self._label} returned"
        if hasattr(value, "__float__") and not isinstance(value, str):
            try:
                return float(value)
            except OverflowError:
                raise ConfigError(
                    f"{returned} for completion {row} a number beyond what a float can hold. Scale it, or bound it."
                ) from None
            except (TypeError, ValueError, RuntimeError):  # an array or tensor of several
                pass
        shown = repr(value) if len(repr(value)) < 60 else f"{repr(value)[:60]}..."
        raise ConfigError(
            f"{returned} {shown} for completion {row}. Return a number, or None where the function doesn't apply."
        )


async def _await(awaitable: Awaitable) -> Any:
    return await awaitable
