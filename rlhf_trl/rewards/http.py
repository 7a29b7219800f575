"""
Rewards from an HTTP server: the client, and the JSON schema that `stage=serve_reward` serves as well.

A request (POST) holds lists of equal length, one entry per completion:

    {"prompts": [...], "completions": [...],          texts, or chats: lists of {"role", "content"}
     "completion_ids": [[...]], "ended": [true],      generated tokens; whether they end with an end token
     "tokenizer": "3f0c...",                          fingerprint of the tokenizer that made them, or null; see
                                                      `rlhf_trl.models.fingerprints.tokenizer_fingerprint`
     "columns": {"answer": [...]}}                    columns of the data that `columns` names, and `tools` and
                                                      `chat_template_kwargs` (of the chat template) where it has them

The answer (status 200) is `{"rewards": [0.5, null]}`: one number per completion, or null where the reward doesn't
apply. `"metrics": {"disagreement": 0.1}` is optional: numbers about the batch, logged as
`rewards/<name>/disagreement`. NaN and infinity, which JSON can't write as numbers, are strings as in the JSON of
Protocol Buffers: `"NaN"`, `"Infinity"`, `"-Infinity"`. A trainer treats them as those of any other reward.
"""

import json
import logging
import math
import os
import re
import sys
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import httpx
from transformers import PreTrainedTokenizerBase

from rlhf_trl.config.ranges import check_values
from rlhf_trl.data.row_types import PASSED_ON
from rlhf_trl.data.tokenize import end_tokens
from rlhf_trl.errors import ConfigError
from rlhf_trl.models.fingerprints import tokenizer_fingerprint
from rlhf_trl.rewards.base import RESERVED_COLUMNS, BaseReward
from rlhf_trl.rewards.options import HTTP_REWARD, http_problems

logger = logging.getLogger(__name__)

# Statuses that a retry may fix: too many requests, and errors of the server or of a proxy in front of it
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
# Bytes of an answer: many times the size of a batch of numbers, and small beside the memory
MAX_ANSWER = 16 * 2**20
# Names that a server may give its metrics, and those that every reward has already
METRIC_NAME, MAX_METRICS = re.compile(r"[\w.-]{1,64}"), 64
RESERVED_METRICS = ("mean", "std", "frac_applied")
SCHEMA = 'It must be `{"rewards": [...]}` with a number or null for each completion'
NON_FINITE = ("NaN", "Infinity", "-Infinity")


class Answer(NamedTuple):
    """A complete HTTP answer."""

    status: int
    reason: str
    kind: str
    content: bytes

    def __str__(self) -> str:
        text = " ".join(self.content[:1000].decode(errors="replace").split())
        return repr(text[:200] + ("..." if len(text) > 200 or len(self.content) > 1000 else ""))


class TooLongError(Exception):
    """An answer of more than `MAX_ANSWER` bytes."""


def post(client: httpx.Client, url: str, body: bytes | str, seconds: float) -> Answer:
    """
    Send a request and return the complete answer.

    Args:
        client (`httpx.Client`): client to send it with.
        url (`str`): address.
        body (`bytes` or `str`): content of the request.
        seconds (`float`): time limit for the whole answer. httpx's own holds for each piece of it.

    Raises:
        TooLongError: after `MAX_ANSWER` bytes.
        httpx.HTTPError: as httpx does; `httpx.ReadTimeout` also for an answer that isn't complete after `seconds`.
    """
    ends, content = time.monotonic() + seconds, bytearray()
    with client.stream("POST", url, content=body) as response:
        for chunk in response.iter_bytes():
            content += chunk
            if len(content) > MAX_ANSWER:
                raise TooLongError
            if time.monotonic() > ends:
                raise httpx.ReadTimeout(f"the answer is not complete after {seconds:g} s")
        kind = response.headers.get("content-type", "no content type")
        return Answer(response.status_code, response.reason_phrase, kind, bytes(content))


class HttpReward(BaseReward):
    """
    A reward from an HTTP server, by the schema of this module.

    Requests that fail for a reason that may pass (no connection, no answer in time, a status of `TRANSIENT`) are sent
    again after `backoff`, 2 `backoff`, 4 `backoff` ... seconds. Another status and a malformed answer are errors at
    once.

    Args:
        url (`str`): address of the server, such as `http://127.0.0.1:8000/score`.
        timeout (`float`): seconds until an answer must be complete.
        retries (`int`): how often a request is sent again.
        backoff (`float`): seconds before the first retry.
        batch_size (`int`): completions per request.
        columns (`Sequence[str]`): columns of the data to send.
        token_env (`str`, *optional*): environment variable with a token, sent as `Authorization: Bearer`.
        weight (`float`), name (`str`): see [`Reward`].

    Raises:
        ConfigError: for an invalid option; when called, if the server can't be reached, or its answer doesn't follow
            the schema.
    """

    def __init__(
        self,
        url: str,
        timeout: float = 60.0,
        retries: int = 4,
        backoff: float = 1.0,
        batch_size: int = 64,
        columns: Sequence[str] = (),
        token_env: str | None = None,
        weight: float = 1.0,
        name: str = "http",
    ):
        super().__init__(name, weight)
        if problems := http_problems(f"reward.{name}", {"url": url, "token_env": token_env, "columns": columns}):
            raise ConfigError.join(problems)
        numbers = {"timeout": timeout, "retries": retries, "backoff": backoff, "batch_size": batch_size}
        check_values(HTTP_REWARD, numbers, f"reward.{name}.")
        self.url, self.retries, self.backoff, self.batch_size = url, retries, backoff, batch_size
        self.timeout, self.columns = timeout, [columns] if isinstance(columns, str) else list(columns)
        headers = {"Content-Type": "application/json"}
        if token_env is not None:
            headers["Authorization"] = f"Bearer {os.environ[token_env]}"
        self._client = httpx.Client(timeout=timeout, headers=headers)
        self._ends: list[int] | None = None
        self._tokenizer: str | None = None

    def check(self) -> None:
        """See [`Reward.check`]: any answer of the server will do."""
        try:
            self._client.get(self.url)
        except httpx.HTTPError as error:
            raise ConfigError(
                f"The server of the reward `{self.__name__}` at {self.url} can't be reached ({error}). Start it, or "
                f"set `reward.{self.__name__}.url`."
            ) from error

    def bind(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """See [`Reward.bind`]."""
        self._ends = None if tokenizer is None else end_tokens(tokenizer)
        self._tokenizer = None if tokenizer is None else tokenizer_fingerprint(tokenizer)

    def column_problem(self, columns: Collection[str]) -> str | None:
        """See [`Reward.column_problem`]."""
        if "images" in columns:
            return (
                f"The data has images, and `reward.{self.__name__}` sends text alone to its server. Use "
                "`reward=model` or `reward=function`, which get the images, or leave the column of images out."
            )
        missing = [name for name in self.columns if name not in columns]
        there = ", ".join(f"`{name}`" for name in columns) or "none besides the prompt"
        if not missing:
            return None
        return (
            f"`reward.{self.__name__}.columns` names `{missing[0]}`, and the data has no such column (it has {there})."
        )

    def __call__(
        self,
        prompts: list,
        completions: list,
        completion_ids: list[list[int]],
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """
        Return one reward per completion; see [`Reward`].

        Args:
            prompts (`list`), completions (`list`), completion_ids (`list[list[int]]`), **columns: see [`Reward`].
            log_metric (callable, *optional*): receives name and value of the server's metrics.
        """
        if problem := self.column_problem([name for name in columns if name not in RESERVED_COLUMNS]):
            raise ConfigError(problem)
        sent = {name: columns[name] for name in (*self.columns, *PASSED_ON) if columns.get(name) is not None}
        rewards = []
        for start in range(0, len(completions), self.batch_size):
            rows = slice(start, start + self.batch_size)
            ids = [[int(token) for token in row] for row in completion_ids[rows]]
            answer = self._post(
                {
                    "prompts": prompts[rows],
                    "completions": completions[rows],
                    "completion_ids": ids,
                    "ended": [self._ends is None or (len(row) > 0 and row[-1] in self._ends) for row in ids],
                    "tokenizer": self._tokenizer,
                    "columns": {name: values[rows] for name, values in sent.items()},
                }
            )
            values, metrics = self._read(answer, len(ids))
            rewards += values
            if log_metric is not None:
                for name, value in metrics.items():
                    log_metric(f"rewards/{self.__name__}/{name}", value)
        return rewards

    def _post(self, content: dict[str, Any]) -> Answer:
        try:
            body = json.dumps(content, allow_nan=False)
        except (TypeError, ValueError) as error:
            names = ", ".join(self.columns) or "none"
            raise ConfigError(
                f"What the reward `{self.__name__}` is to send is no JSON ({error}). Keep only text, finite numbers "
                f"and lists of them in `reward.{self.__name__}.columns` (now: {names})."
            ) from error
        failure = remedy = ""
        for attempt in range(self.retries + 1):
            if attempt:
                pause = self.backoff * 2 ** (attempt - 1)
                logger.warning("The server of `%s` %s. Trying again in %g s.", self.__name__, failure, pause)
                time.sleep(pause)
            try:
                answer = post(self._client, self.url, body, self.timeout)
            except TooLongError:
                raise self._error(
                    f"answers with more than {MAX_ANSWER >> 20} MiB, which no rewards take. Correct "
                    f"`reward.{self.__name__}.url`"
                ) from None
            except httpx.TimeoutException:
                failure = f"gave no answer within {self.timeout:g} s"
                remedy = f"Give it more time (`reward.{self.__name__}.timeout=...`) or less at a time (`batch_size`)"
            except httpx.DecodingError as error:
                raise self._error(f"gave an answer that can't be unpacked ({error}). {SCHEMA}") from None
            except httpx.HTTPError as error:
                failure = f"can't be reached ({error})"
                remedy = f"Start it, or correct `reward.{self.__name__}.url`"
            else:
                if answer.status == 200:
                    return answer
                failure = f"answered {answer.status} {answer.reason}: {answer}"
                remedy = f"Look into its log, or correct `reward.{self.__name__}.url`"
                if answer.status not in TRANSIENT:
                    raise self._error(f"{failure}. {remedy}")
        tries = f"{self.retries + 1} tries were" if self.retries else "one try was"
        raise self._error(f"{failure}, and {tries} made. {remedy}")

    def _read(self, answer: Answer, expected: int) -> tuple[list[float | None], dict[str, float]]:
        try:
            content = json.loads(answer.content)
        except (ValueError, RecursionError):
            raise self._error(f"answered with {answer.kind}, which is no JSON: {answer}. {SCHEMA}") from None
        values = content.get("rewards") if isinstance(content, dict) else None
        if not isinstance(values, list):
            raise self._error(f"answered without `rewards`: {answer}. {SCHEMA}")
        if len(values) != expected:
            raise self._error(f"gave {len(values)} rewards for {expected} completions. {SCHEMA}")
        for row, value in enumerate(values):
            if value is not None and not _is_number(value):
                raise self._error(f"gave {_short(value)} as reward {row} of {expected}. {SCHEMA}")
        metrics = content.get("metrics") or {}
        if not isinstance(metrics, dict) or not all(_is_number(value) for value in metrics.values()):
            raise self._error(f"gave {_short(metrics)} as `metrics`. They must be numbers by name")
        if taken := [name for name in metrics if name in RESERVED_METRICS or not METRIC_NAME.fullmatch(name)]:
            raise self._error(
                f"gave a metric {_short(taken[0])}. Its name must be of letters, digits, `_`, `.` and `-`, and not "
                f"one of every reward ({', '.join(RESERVED_METRICS)})"
            )
        if len(metrics) > MAX_METRICS:
            raise self._error(f"gave {len(metrics)} metrics. It may give {MAX_METRICS}")
        numbers = {name: float(value) for name, value in metrics.items()}
        return [None if value is None else float(value) for value in values], numbers

    def _error(self, what: str) -> ConfigError:
        return ConfigError(f"The server of the reward `{self.__name__}` at {self.url} {what}.")


def json_number(value: float | None) -> float | str | None:
    """Return a number as the schema writes it: NaN and infinity as strings."""
    if value is None or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _is_number(value: Any) -> bool:
    if isinstance(value, str):
        return value in NON_FINITE
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _short(value: Any) -> str:
    try:
        text = json.dumps(value)
    except ValueError:  # an integer of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:80]}..."
