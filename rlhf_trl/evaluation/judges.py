"""Judges of two policies' answers: the group `judge`."""

import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, NamedTuple, Protocol

import numpy as np

from rlhf_trl.errors import ConfigError
from rlhf_trl.runs.paths import resolve_path

# A verdict alone: a sentence that begins with the article "A" isn't one
VERDICT = re.compile(
    r"(?:(?:final )?(?:answer|verdict|winner|response)\s*(?:is)?\W*)?(A|B|C|tie)(?: (?:is better|wins))?", re.I
)
# A server's word for a question that is longer than its model's context
TOO_LONG = re.compile(
    r"context.?(length|size|window)|maximum.{0,40}tokens|(prompt|input|request).{0,20}too long", re.I
)
BRACKETS = re.compile(r"\[\[\s*(A|B|C|tie)\s*\]\]", re.I)


class Answers(NamedTuple):
    """
    Answers of a policy to P prompts.

    Attributes:
        texts: the completions.
        rewards: rewards by name, shape (P,); the combined one under [`~rlhf_trl.evaluation.rewards.COMBINED`].
    """

    texts: Sequence[str]
    rewards: dict[str, np.ndarray]

    def subset(self, keep: np.ndarray) -> "Answers":
        """Return the answers to some of the prompts, `keep` of shape (P,)."""
        texts = [text for text, kept in zip(self.texts, keep, strict=True) if kept]
        return Answers(texts, {name: values[keep] for name, values in self.rewards.items()})


class Verdicts(NamedTuple):
    """
    Outcomes of a comparison.

    Attributes:
        outcomes: shape (P,): 1 where the policy wins, 0.5 for a tie, 0 where the baseline wins; NaN where the judge
            gave no verdict.
        unclear: how many judgements named neither answer nor a tie.
        judgements: how many there were.
        first: of the verdicts that name a winner, the share that names the answer shown first (0.5: no position
            bias); `None` where the judge sees no order.
        agreement: share of prompts on which both orders have the same winner; `None` likewise.
    """

    outcomes: np.ndarray
    unclear: int = 0
    judgements: int = 0
    first: float | None = None
    agreement: float | None = None


class Judge(Protocol):
    """
    Decides between the answers of two policies: an option of the group `judge`.

    Attributes:
        name: the judge in words.
        all_pairs: whether all pairs of policies are judged, or each against the baseline only.
    """

    name: str
    all_pairs: bool

    def check(self) -> None:
        """
        Check before policies are sampled that the judge can be asked.

        Raises:
            [`~rlhf_trl.errors.ConfigError`]: if it can't.
        """

    def compare(self, prompts: Sequence[str], policy: Answers, baseline: Answers) -> Verdicts:
        """
        Judge the answers of two policies to P prompts.

        Raises:
            [`~rlhf_trl.errors.ConfigError`]: if the judge can't be asked.
        """
        ...


def pair_judge(judge: Judge) -> Callable[[Sequence[str], Sequence[str], Sequence[str]], np.ndarray]:
    """
    Check a judge, and return it as a function of prompts with a first and a second answer each.

    The function returns 1 where the first is better, 0 where the second is, 0.5 for a tie, and NaN where the judge
    gave no verdict; shape (P,).
    """
    judge.check()

    def outcomes(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> np.ndarray:
        return judge.compare(prompts, Answers(first, {}), Answers(second, {})).outcomes

    return outcomes


class RewardJudge:
    """
    Judge by a reward: the answer with the higher one wins.

    Args:
        reward (`str`, *optional*):
            Name of one of the group `reward`; `None`: the combined reward.
        tie_margin (`float`):
            Rewards no further apart than this are a tie.
    """

    all_pairs = True  # the rewards are there already

    def __init__(self, reward: str | None = None, tie_margin: float = 0.0):
        self.reward, self.tie_margin = reward or "", tie_margin
        self.name = f"the reward `{reward}`" if reward else "the reward"

    def check(self) -> None:
        """See [`Judge.check`]: the checks of the config have found everything."""

    def compare(self, prompts: Sequence[str], policy: Answers, baseline: Answers) -> Verdicts:
        """See [`Judge.compare`]."""
        if self.reward not in policy.rewards:
            names = ", ".join(f"`{name}`" for name in policy.rewards if name)
            raise ConfigError(
                f"`judge.reward` is `{self.reward}`, and the group `reward` has {names}. Set one of them."
            )
        one, other = policy.rewards[self.reward], baseline.rewards[self.reward]
        with np.errstate(invalid="ignore"):
            gap = one - other
        outcomes = np.where(np.abs(gap) <= self.tie_margin, 0.5, (gap > 0).astype(float))
        valid = np.isfinite(one) & np.isfinite(other)
        return Verdicts(np.where(valid, outcomes, np.nan), int((~valid).sum()), len(outcomes))


class Reply(NamedTuple):
    """
    Reply of a language model.

    Attributes:
        text: as it was written.
        is_cut: whether the limit of tokens ended it.
        is_refused: whether the server says that the model refused.
        is_too_long: whether the question doesn't fit into the model, which wrote nothing.
    """

    text: str
    is_cut: bool = False
    is_refused: bool = False
    is_too_long: bool = False


class TextJudge:
    """
    Base of judges that read both answers, each pair in both orders.

    Args:
        template (`str`):
            Question, with `{prompt}`, `{a}` and `{b}`.
        all_pairs (`bool`):
            Judge all pairs of policies, instead of each against the baseline.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if the template lacks one of the three.
    """

    name = "a judge"

    def __init__(self, template: str, all_pairs: bool = False):
        missing = [key for key in ("{prompt}", "{a}", "{b}") if key not in template]
        if missing:
            raise ConfigError(f"`judge.template` has no `{missing[0]}`, so the judge wouldn't see it. Add it.")
        self.template, self.all_pairs = template, all_pairs

    def check(self) -> None:
        """
        Check before policies are sampled that the judge can be asked.

        Raises:
            [`~rlhf_trl.errors.ConfigError`]: if it can't.
        """

    @property
    def settings(self) -> dict[str, Any]:
        """The model and how it decodes: all that a reply depends on besides the question."""
        raise NotImplementedError

    def replies(
        self,
        questions: Sequence[str],
        temperature: float = 0.0,
        seed: int = 0,
        max_tokens: int | None = None,
        schema: dict[str, Any] | None = None,
    ) -> Iterator[tuple[int, Reply]]:
        """
        Yield the index of each question with its reply, as they come.

        Args:
            questions (`Sequence[str]`): what the user's turn says.
            temperature (`float`), seed (`int`): of the sampling; at temperature 0 decoding is greedy.
            max_tokens (`int`, *optional*): limit of a reply; `None`: the judge's own.
            schema (`dict`, *optional*): JSON schema of a reply, for servers that can keep to one.

        Raises:
            [`~rlhf_trl.errors.ConfigError`]: if the judge can't be asked.
        """
        raise NotImplementedError

    def ask(self, questions: Sequence[str]) -> list[str]:
        """Return the text of one reply per question."""
        found = dict(self.replies(questions))
        return [found[i].text for i in range(len(questions))]

    def compare(self, prompts: Sequence[str], policy: Answers, baseline: Answers) -> Verdicts:
        """See [`Judge.compare`]. A prompt counts if both orders have a verdict; its outcome is their mean."""
        questions = [
            self.question(prompt, *order)
            for prompt, one, other in zip(prompts, policy.texts, baseline.texts, strict=True)
            for order in ((one, other), (other, one))
        ]
        # Prompts with equal answers of two policies have equal questions: each is asked once
        distinct = list(dict.fromkeys(questions))
        replies = dict(zip(distinct, self.ask(distinct), strict=True))
        return outcomes_of([verdict(replies[question]) for question in questions])

    def question(self, prompt: str, a: str, b: str) -> str:
        """Fill in the template. Braces in the texts are kept."""
        parts = {"{prompt}": prompt, "{a}": a, "{b}": b}
        return re.sub(r"\{(?:prompt|a|b)\}", lambda match: parts[match.group()], self.template)


def verdict(reply: str) -> str | None:
    """Return `A`, `B` or `tie` as a judge's reply says, `None` if it names none or several."""
    found = {match.upper() for match in BRACKETS.findall(reply)}
    if not found:
        lines = [line for line in reply.splitlines() if line.strip()]
        ends = {re.sub(r"^\W+|\W+$", "", line) for line in (lines[:1] + lines[-1:])}
        found = {match.group(1).upper() for end in ends if (match := VERDICT.fullmatch(end))}
    if len(found) != 1:
        return None
    only = found.pop()
    return "tie" if only in ("C", "TIE") else only


def outcomes_of(verdicts: Sequence[str | None]) -> Verdicts:
    """
    Combine the verdicts of both orders.

    Args:
        verdicts (`Sequence[str | None]`):
            Two per prompt: with the policy's answer as A, then as B.
    """
    worth = {"A": (1.0, 0.0), "B": (0.0, 1.0), "tie": (0.5, 0.5), None: (np.nan, np.nan)}
    orders = np.array([worth[one][place % 2] for place, one in enumerate(verdicts)]).reshape(-1, 2)
    named = [one for one in verdicts if one in ("A", "B")]
    both = orders[np.isfinite(orders).all(axis=1)]
    return Verdicts(
        outcomes=orders.mean(axis=1),
        unclear=sum(one is None for one in verdicts),
        judgements=len(verdicts),
        first=float(np.mean([one == "A" for one in named])) if named else None,
        agreement=float((both[:, 0] == both[:, 1]).mean()) if len(both) else None,
    )


class ModelJudge(TextJudge):
    """
    A local language model that replies with greedy decoding.

    Args:
        path (`str`):
            Folder or hub id.
        template (`str`), all_pairs (`bool`):
            See [`TextJudge`]; a user's turn where the model has a chat template.
        max_new_tokens (`int`), batch_size (`int`), dtype (`str`):
            Limit of its replies, number of questions at a time, and type of the weights.
    """

    def __init__(
        self,
        path: str,
        template: str,
        all_pairs: bool = False,
        max_new_tokens: int = 16,
        batch_size: int = 8,
        dtype: str = "auto",
    ):
        super().__init__(template, all_pairs)
        self.path = resolve_path(path, None, "")
        self.max_new_tokens, self.batch_size, self.dtype = max_new_tokens, batch_size, dtype
        self.name = f"the language model `{path}`, in both orders"
        self._loaded: tuple[Any, Any] | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """See [`TextJudge.settings`]."""
        return {"model": self.path, "max_tokens": self.max_new_tokens, "dtype": self.dtype}

    def replies(
        self,
        questions: Sequence[str],
        temperature: float = 0.0,
        seed: int = 0,
        max_tokens: int | None = None,
        schema: dict[str, Any] | None = None,
    ) -> Iterator[tuple[int, Reply]]:
        """See [`TextJudge.replies`]; a schema has no effect."""
        from rlhf_trl.data.tokenize import end_tokens, prompt_ids
        from rlhf_trl.evaluation.generation import sample
        from rlhf_trl.models.sizes import sizes_of

        model, tokenizer = self._load()
        chat, ends = tokenizer.chat_template is not None, end_tokens(tokenizer)
        asked = [[{"role": "user", "content": question}] if chat else question for question in questions]
        ids = [prompt_ids(tokenizer, one) for one in asked]
        limit, sizes = max_tokens or self.max_new_tokens, sizes_of(model)
        most = sizes.positions - limit if sizes.is_table and sizes.positions else math.inf
        fitting = [i for i, one in enumerate(ids) if len(one) <= most]
        yield from ((i, Reply("", is_too_long=True)) for i, one in enumerate(ids) if len(one) > most)
        for start in range(0, len(fitting), self.batch_size):
            numbers = fitting[start : start + self.batch_size]
            batch = [ids[i] for i in numbers]
            written = sample(model, tokenizer, batch, limit, temperature, self.batch_size, seed=seed + start)
            for i, reply in zip(numbers, written, strict=True):
                text = str(tokenizer.decode(reply, skip_special_tokens=True))
                yield i, Reply(text, is_cut=not reply or reply[-1] not in ends)

    def _load(self) -> tuple[Any, Any]:
        """Return model and tokenizer, loaded at the first question."""
        from accelerate import PartialState

        from rlhf_trl.models.loading import load_model
        from rlhf_trl.models.tokenizers import load_tokenizer

        if self._loaded is None:
            model: Any = load_model(self.path, dtype=self.dtype)  # `PreTrainedModel.to` is declared without `self`
            self._loaded = model.eval().to(PartialState().device), load_tokenizer(self.path)
        return self._loaded


class HTTPJudge(TextJudge):
    """
    A model behind an OpenAI-compatible endpoint: `POST <url>/chat/completions`.

    Args:
        url (`str`):
            Base address, such as `http://localhost:8000/v1`.
        model (`str`):
            Name of the model at that endpoint.
        template (`str`), all_pairs (`bool`):
            See [`TextJudge`].
        api_key_env (`str`, *optional*):
            Environment variable that holds the key.
        timeout (`float`):
            Limit in seconds for a complete reply.
        retries (`int`):
            Number of retries after a broken connection, a timeout, status 429 or 5xx, with pauses of 1, 2, 4 ... s.
        concurrency (`int`):
            Number of concurrent requests.
        max_tokens (`int`):
            Limit of a reply.
    """

    def __init__(
        self,
        url: str,
        model: str,
        template: str,
        all_pairs: bool = False,
        api_key_env: str | None = None,
        timeout: float = 60.0,
        retries: int = 3,
        concurrency: int = 8,
        max_tokens: int = 16,
    ):
        super().__init__(template, all_pairs)
        self.url, self.model, self.timeout, self.retries = url.rstrip("/"), model, timeout, retries
        self.concurrency, self.max_tokens = concurrency, max_tokens
        self.takes_schemas = True
        self.name = f"`{model}` at {url}, in both orders"
        self.headers = {}
        if api_key_env is not None:
            if not os.environ.get(api_key_env):
                raise ConfigError(
                    f"`judge.api_key_env` names the environment variable `{api_key_env}`, which is not set. "
                    f"`export {api_key_env}=...`, or set `judge.api_key_env=null`."
                )
            self.headers["Authorization"] = f"Bearer {os.environ[api_key_env]}"

    def check(self) -> None:
        """See [`TextJudge.check`]: ask one question, so that a wrong address or key stops before the sampling."""
        self.ask([self.question("1 + 1 =", "2", "3")])

    @property
    def settings(self) -> dict[str, Any]:
        """See [`TextJudge.settings`]."""
        return {"model": self.model, "max_tokens": self.max_tokens}

    def replies(
        self,
        questions: Sequence[str],
        temperature: float = 0.0,
        seed: int = 0,
        max_tokens: int | None = None,
        schema: dict[str, Any] | None = None,
    ) -> Iterator[tuple[int, Reply]]:
        """See [`TextJudge.replies`]; a server that refuses a schema is asked without."""
        import httpx

        options: dict[str, Any] = {"temperature": temperature, "max_tokens": max_tokens or self.max_tokens}
        if temperature > 0:
            options["seed"] = seed
        headers = {"Content-Type": "application/json", **self.headers}
        with (
            httpx.Client(timeout=self.timeout, headers=headers) as client,
            ThreadPoolExecutor(self.concurrency) as pool,
        ):
            futures = {
                pool.submit(self._reply, client, question, options, schema): i for i, question in enumerate(questions)
            }
            try:
                for future in as_completed(futures):
                    yield futures[future], future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # the others would fail the same way
                raise

    def _reply(self, client, question: str, options: dict[str, Any], schema: dict[str, Any] | None) -> Reply:
        import httpx

        from rlhf_trl.rewards.http import TooLongError, post

        problem = ""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(min(2 ** (attempt - 1), 30))
            body = {"model": self.model, "messages": [{"role": "user", "content": question}], **options}
            if schema is not None and self.takes_schemas:
                named = {"name": "reply", "schema": schema, "strict": True}
                body["response_format"] = {"type": "json_schema", "json_schema": named}
            try:
                answer = post(client, f"{self.url}/chat/completions", json.dumps(body), self.timeout)
            except TooLongError:
                raise ConfigError(f"The judge at `{self.url}` answers without end. Correct `judge.url`.") from None
            except httpx.HTTPError as error:
                problem = f"{type(error).__name__}: {error}"
                continue
            except httpx.InvalidURL as error:
                raise ConfigError(f"`judge.url` is `{self.url}`, which is no address ({error}).") from None
            if answer.status == 429 or answer.status >= 500:
                problem = f"it answered {answer.status}: {answer}"
                continue
            if answer.status in (400, 413, 422) and TOO_LONG.search(answer.content.decode(errors="replace")):
                return Reply("", is_too_long=True)
            if answer.status in (400, 422) and "response_format" in body:
                self.takes_schemas = False
                return self._reply(client, question, options, None)
            if answer.status != 200:
                raise ConfigError(
                    f"The judge at `{self.url}` refused with status {answer.status}: {answer}. Check `judge.url`, "
                    "`judge.model` and `judge.api_key_env`."
                )
            try:
                choice = json.loads(answer.content)["choices"][0]
                message, end = choice["message"], choice.get("finish_reason")
                refusal = message.get("refusal")
                is_refused = bool(refusal) or end == "content_filter"
                return Reply(message["content"] or refusal or "", is_cut=end == "length", is_refused=is_refused)
            except (AttributeError, ValueError, KeyError, IndexError, TypeError, RecursionError):
                raise ConfigError(
                    f"The judge at `{self.url}` doesn't answer as an OpenAI-compatible endpoint does: {answer}. Give "
                    "the address up to and with `/v1`."
                ) from None
        raise ConfigError(
            f"The judge at `{self.url}` can't be asked, after {self.retries + 1} tries ({problem}). Start it, fix "
            "`judge.url`, or raise `judge.timeout` or `judge.retries`; `judge=reward` needs none."
        )
