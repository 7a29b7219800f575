"""
How a prompt and a completion become token ids: the one way for reward models, PPO and evaluation alike.

A reward model must see in training just what a policy generates: the prompt's ids as TRL's
`GRPOTrainer._tokenize_prompts` makes them, the completion's own ids, and EOS where it was generated. Nothing comes
after it, though a chat template often adds a newline there.
"""

import functools
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from jinja2 import TemplateError, TemplateSyntaxError

from rlhf_trl.data.forms import CHAT_CHECK, comparisons_of, is_chat, select_completions
from rlhf_trl.data.read import RowError
from rlhf_trl.data.words import count_of, say
from rlhf_trl.errors import ConfigError, DataError


def end_tokens(tokenizer) -> list[int]:
    """
    Return the ids of the tokens that end a turn: generation stops at the first of them, everywhere.

    These are the tokenizer's EOS, the ids that the model's generation_config lists (which a tokenizer of
    [`~rlhf_trl.models.load_tokenizer`] knows, see [`remember_ends`]), and the token that ends an assistant's turn in
    the chat template, if none of those does.
    """
    ends = dict.fromkeys([tokenizer.eos_token_id, *getattr(tokenizer, "model_ends", ())])
    ends.pop(None, None)
    if tokenizer.chat_template is not None:
        ends |= dict.fromkeys(_template_ends(tokenizer, str(tokenizer.chat_template), tuple(ends)))
    return list(ends)


def remember_ends(tokenizer, eos_token_id: int | list[int] | None) -> None:
    """Let [`end_tokens`] know the `eos_token_id` of the generation_config of the tokenizer's model."""
    ids = eos_token_id if isinstance(eos_token_id, list | tuple) else [eos_token_id]
    tokenizer.model_ends = [token for token in ids if token is not None]


@functools.lru_cache(maxsize=64)
def _template_ends(tokenizer, template: str, ends: tuple[int, ...]) -> list[int]:
    """Return the special token after an assistant's words, in a list; none if one of `ends` stands there."""
    words = "Hello"
    messages = [{"role": "user", "content": words}, {"role": "assistant", "content": words}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except TemplateError:  # a template that refuses even this is reported where the data are rendered
        return []
    _, found, after = text.rpartition(words)
    ids = tokenizer(after, add_special_tokens=False)["input_ids"] if found and after else []
    if not set(ends).isdisjoint(ids):
        return []
    added = tokenizer.added_tokens_decoder
    return [token for token in ids if token in added and added[token].special and token != tokenizer.unk_token_id][:1]


def prompt_ids(tokenizer, prompt: str | list[dict], **template_kwargs) -> list[int]:
    """Ids of a prompt, text or chat, as GRPOTrainer gives it to the policy; `template_kwargs` are the template's."""
    if isinstance(prompt, str):
        return tokenizer(without_bos(tokenizer, prompt))["input_ids"]
    return _render(tokenizer, prompt, tokenize=True, add_generation_prompt=True, **template_kwargs)["input_ids"]


def without_bos(tokenizer, text: str) -> str:
    """Return `text` (perhaps rendered with a chat template before) without the BOS that the tokenizer adds itself."""
    bos = tokenizer.bos_token
    if bos is None or not text.startswith(bos) or tokenizer("")["input_ids"][:1] != [tokenizer.bos_token_id]:
        return text
    return text.removeprefix(bos)


def row_ids(
    tokenizer, prompt: str | list[dict], completion: str | list[dict], eos: bool = True, **template_kwargs
) -> list[int]:
    """
    Ids of a prompt and its completion, as the policy is trained to write it.

    Text: the ids of both in one, as SFT has them, up to the end. Chat: what the template adds after the generation
    prompt, up to and with the first of the [`end_tokens`] (that of the last turn where `completion` has several). EOS
    is added where no such token ends the completion.

    Args:
        eos (`bool`): `False` for a completion that was cut off: its ids end before the end token.
        **template_kwargs: for the chat template (`tools`, ...).
    """
    ends = end_tokens(tokenizer)
    if not ends:
        raise ConfigError(
            "the tokenizer has no EOS token, so nothing says where a completion ends. "
            "Add `eos_token` to its tokenizer_config.json, or name another with `model.tokenizer=PATH`."
        )
    start = prompt_ids(tokenizer, prompt, **template_kwargs)
    if isinstance(completion, str):
        ids = tokenizer(without_bos(tokenizer, prompt) + completion)["input_ids"]
        start = ids[: _common(start, ids)]
        ids = ids[len(start) :]
    else:
        ids = _turn_ids(tokenizer, prompt, completion, start, template_kwargs)
    if isinstance(completion, str) or len(completion) > 1:
        end = _last_end(tokenizer, ids, ends)
    else:
        end = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return start + ids[:end] + ((ids[end : end + 1] or ends[:1]) if eos else [])


def split_row_ids(
    tokenizer, prompt: str | list[dict], completion: str | list[dict], **template_kwargs
) -> tuple[list[int], list[int]]:
    """
    Return [`row_ids`] in two, the prompt's and the completion's, where SFT parts them: at the prompt's end or, where
    tokens merge across it, before the first one that isn't the prompt's own.
    """
    ids = row_ids(tokenizer, prompt, completion, **template_kwargs)
    length = max(1, _common(prompt_ids(tokenizer, prompt, **template_kwargs), ids))
    return ids[:length], ids[length:]


def written_row_ids(tokenizer, prompt: str | list[dict], written: list[int], **template_kwargs) -> list[int]:
    """
    Return the ids of a prompt and of what a policy with this tokenizer has written after it, as training reads them.

    Those are the prompt's ids and then `written`; but where the same text has other tokens at the end of the prompt
    (they merge across it), the text's, which are what [`row_ids`] gives.
    """
    start = prompt_ids(tokenizer, prompt, **template_kwargs)
    if isinstance(prompt, str):
        words = written[:-1] if written and written[-1] in end_tokens(tokenizer) else written
        before, text = (
            tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for ids in (start, start + words)
        )
        ids = tokenizer(text)["input_ids"]
        if ids[: len(start)] != start and tokenizer(before)["input_ids"] == start:
            return ids + written[len(words) :]
    return start + written


def _last_end(tokenizer, ids: list[int], ends: list[int]) -> int:
    """Return the index of the token that ends the last turn (blanks and end tokens may follow), or `len(ids)`."""
    end = len(ids)
    for i in reversed(range(len(ids))):
        if ids[i] in ends:
            end = i
        elif _decode(tokenizer, ids[i : i + 1]).strip():
            break
    return end


def _turn_ids(tokenizer, prompt: list[dict], completion: list[dict], start: list[int], template_kwargs) -> list[int]:
    """What the chat template adds for `completion` after the generation prompt, whose ids are `start`."""
    ids = _render(tokenizer, prompt + completion, tokenize=True, **template_kwargs)["input_ids"]
    if ids[: len(start)] == start:
        return ids[len(start) :]
    # The prompt ends in other tokens alone than followed by the completion: tokens merge across the border, or the
    # template puts something (an empty thought) into the generation prompt only. The policy goes on from `start`.
    head = _render(tokenizer, prompt, tokenize=False, add_generation_prompt=True, **template_kwargs)
    text = _render(tokenizer, prompt + completion, tokenize=False, **template_kwargs)
    return tokenizer(text[_common(head, text) :], add_special_tokens=False)["input_ids"]


def _render(tokenizer, messages: list[dict], tokenize: bool, **kwargs):
    if tokenizer.chat_template is None:
        raise ConfigError(
            f"the data holds chat messages, but the tokenizer of `{tokenizer.name_or_path}` has no chat template. "
            "Type `model.chat_template=FILE.jinja` (a reward model's is saved with its tokenizer), or give data "
            "whose prompts are text."
        )
    # Arrow gives every message all keys of all messages: what is null wasn't there.
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    kwargs = (trained_template_kwargs(tokenizer) or {}) | kwargs
    try:
        return tokenizer.apply_chat_template(messages, tokenize=tokenize, return_dict=tokenize, **kwargs)
    except TemplateError as error:
        raise TemplateRefusal(str(error), messages) from error


class TemplateRefusal(DataError):
    """A chat template that raises an error for a chat, with what it `said` and what can be done."""

    def __init__(self, said: str, messages: list[dict]):
        roles = [message["role"] for message in messages]
        self.said = f"is refused by the chat template ({said.strip()}): its turns are {', '.join(roles)}. "
        if {"system", "developer"} & set(roles):
            self.said += (
                "Leave out the system turn (`data.system_prompt`), or put its text into the user's first turn."
            )
        else:
            self.said += "Put turns of one role in a row into one turn, or give another template."
        super().__init__(
            f"The chat that begins with {str(messages[0].get('content'))[:80]!r} {self.said} Another template is "
            "`model.chat_template=FILE.jinja`."
        )


@contextmanager
def refusals_named(tokenizer) -> Iterator[None]:
    """Let readers of files name the rows that the tokenizer's chat template refuses, see [`forms.CHAT_CHECK`]."""
    known: dict[str, str | None] = {}

    def check(messages: list[dict], row: dict) -> None:
        # Templates look at roles, and at what else a turn has, not at words: chats of one kind are rendered once
        kwargs = template_kwargs(row)
        kind = json.dumps([[(turn["role"], *turn) for turn in messages], kwargs])
        if kind not in known:
            known[kind] = None
            try:
                _render(tokenizer, messages, tokenize=False, add_generation_prompt=False, **kwargs)
            except TemplateRefusal as refusal:
                known[kind] = refusal.said
        if known[kind] is not None:
            raise RowError(None, known[kind])

    token = CHAT_CHECK.set(check if tokenizer.chat_template is not None else None)
    try:
        yield
    finally:
        CHAT_CHECK.reset(token)


def _common(a, b) -> int:
    """How many items (characters, ids) `a` and `b` begin with alike."""
    length = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        length += 1
    return length


def template_kwargs(row: dict) -> dict:
    """Return what a row's own `tools` and `chat_template_kwargs` columns give to the chat template."""
    kwargs = dict(row.get("chat_template_kwargs") or {})
    if row.get("tools"):  # TRL takes them as JSON text too
        kwargs["tools"] = json.loads(row["tools"]) if isinstance(row["tools"], str) else row["tools"]
    return kwargs


def trained_template_kwargs(tokenizer) -> dict | None:
    """
    Return the arguments of the chat template with which the tokenizer's model was trained, as its
    tokenizer_config.json records them (see [`keep_template_kwargs`]); `None` if it doesn't, or if rows had several.
    """
    return tokenizer.init_kwargs.get("chat_template_kwargs")


def keep_template_kwargs(dataset, tokenizer, given: dict | None = None):
    """
    Return a `DatasetDict` of chats whose rows all say how they are rendered, and record it in the tokenizer.

    A row's own `chat_template_kwargs` go before `given` (the stage's), and these before what the tokenizer's model was
    trained with: so a policy is prompted as it was, unless the data or the stage say otherwise. What all training rows
    have is saved with the tokenizer, for those who prompt the model or ask it for a score.
    """
    from datasets import Features, Json

    if not is_chat(dataset["train"][0]):
        return dataset
    shared = (trained_template_kwargs(tokenizer) or {}) | (given or {})
    for side, rows in dataset.items() if shared else ():
        dataset[side] = rows.map(
            lambda row: {"chat_template_kwargs": shared | (row.get("chat_template_kwargs") or {})},
            features=Features({**rows.features, "chat_template_kwargs": Json()}),
            desc="Completing chat_template_kwargs",
        )
    found = [{}]
    if "chat_template_kwargs" in dataset["train"].column_names:
        found = []
        for kwargs in dataset["train"]["chat_template_kwargs"]:
            if (kwargs or {}) not in found:
                found.append(kwargs or {})
    if len(found) == 1:
        tokenizer.init_kwargs["chat_template_kwargs"] = found[0]
    else:
        tokenizer.init_kwargs.pop("chat_template_kwargs", None)
    return dataset


def keep_one_bos(dataset, tokenizer):
    """Return a `DatasetDict` without the BOS, at the beginning of texts, that the tokenizer adds; how many is said."""
    for side, rows in dataset.items():
        field = next((name for name in ("prompt", "text") if name in rows.column_names), None)
        if field is None or not isinstance(rows[0][field], str):
            continue
        begin = sum(without_bos(tokenizer, text) != text for text in rows[field])
        if begin:
            say(
                f"data: {begin:,} of {len(rows):,} {side} rows begin with the BOS token `{tokenizer.bos_token}`, and "
                "the tokenizer adds one: it is taken out of their text, so that it stands there once"
            )
            dataset[side] = rows.map(
                lambda row, field=field: {field: without_bos(tokenizer, row[field])}, desc="Keeping one BOS"
            )
    return dataset


def note_template_end(tokenizer, eos_token: str | None = None) -> None:
    """Print which token ends generation because the chat template writes it and for no other reason."""
    named = {tokenizer.eos_token_id, *getattr(tokenizer, "model_ends", ())}
    for token in tokenizer.convert_ids_to_tokens([token for token in end_tokens(tokenizer) if token not in named]):
        if token != eos_token:
            say(
                f"note: the chat template ends turns with `{token}`, which is neither the tokenizer's EOS "
                f"(`{tokenizer.eos_token}`) nor in the model's generation_config.json. Here it ends generation, and a "
                f"trained model's generation_config.json will list it; `+stage.args.eos_token='{token}'` of stage=sft "
                "makes it the EOS."
            )


def check_template_syntax(tokenizer, source: str) -> None:
    """
    Stop at a chat template that is no Jinja template.

    Args:
        source (`str`): where the template comes from, for the message.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: with the line.
    """
    try:
        _rendered_answer(tokenizer, "Hello")
    except TemplateSyntaxError as error:
        raise ConfigError(
            f"The chat template of `{source}` is no Jinja template: {error}, line {error.lineno}. Fix it, or give "
            "another with `model.chat_template=FILE.jinja`."
        ) from error
    except TemplateError:
        pass  # it refuses this chat; whether it refuses those of the data is told where they are rendered


def check_template_answers(tokenizer, source: str) -> None:
    """
    Stop at a chat template that doesn't write what the assistant says: every answer would be the same.

    Args:
        source (`str`): where the template comes from, for the message.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if it doesn't.
    """
    words = "Words that stand in no template"
    try:
        text = _rendered_answer(tokenizer, words)
    except TemplateError:
        return
    if words not in text:
        raise ConfigError(
            f"The chat template of `{source}` leaves out what the assistant says, so nothing could be learned from "
            "any answer. Give another with `model.chat_template=FILE.jinja`."
        )


def _rendered_answer(tokenizer, words: str) -> str:
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": words}]
    return tokenizer.apply_chat_template(chat, tokenize=False)


def note_rows_without_end(batch, tokenizer) -> None:
    """Print that nothing which is trained in a batch of a trainer ends a turn, if so."""
    ends = set(end_tokens(tokenizer))
    rows = [row for _, side in _sides(batch) for row in side]
    trained = [{token for token, counts in zip(ids, mask, strict=True) if counts} for ids, mask in rows]
    if not any(ends & tokens for tokens in trained):
        names = ", ".join(f"`{token}`" for token in tokenizer.convert_ids_to_tokens(list(ends))) or "none is known"
        say(
            f"note: no token that ends generation ({names}) is trained on in the first {count_of(len(rows), 'row')}, "
            "so the model doesn't learn to stop. Name the token that ends its turns "
            "(`+stage.args.eos_token=TOKEN`), give a chat template that writes the EOS after the assistant's turns "
            "(`model.chat_template=FILE.jinja`), or raise `stage.args.max_length` if it cuts all rows."
        )


def template_columns(tokenizer, columns: dict[str, list], rows: int) -> dict[str, list]:
    """Return the columns of `rows` prompts with `chat_template_kwargs` as the tokenizer's policy was prompted."""
    trained = trained_template_kwargs(tokenizer)
    if not trained:
        return columns
    own = columns.get("chat_template_kwargs") or [None] * rows
    return columns | {"chat_template_kwargs": [trained | (kwargs or {}) for kwargs in own]}


def tokenize_comparisons(dataset, tokenizer, max_length: int | None = None, split: str = ""):
    """
    Adds `completion_ids` (a list of ints for each completion, by `row_ids`) and `length` (of the longest) to a
    `Dataset` or `DatasetDict` for the reward stage.

    Rows hold `prompt` and `completions`, or `prompt`, `chosen` and `rejected`, which become two completions of which
    the first is `better`. What is longer than `max_length` is left out as [`keep_short_completions`] says; `split`
    names the rows there.
    """

    def tokenize(row):
        row = comparisons_of(row) if "chosen" in row else row
        kwargs = template_kwargs(row)
        ids = [row_ids(tokenizer, row["prompt"], completion, **kwargs) for completion in row["completions"]]
        return {**row, "completion_ids": ids, "length": max(map(len, ids))}

    if isinstance(dataset, dict):
        sides = {side: tokenize_comparisons(rows, tokenizer, max_length, side) for side, rows in dataset.items()}
        return type(dataset)(sides)
    pairs = [name for name in ("chosen", "rejected") if name in dataset.column_names]
    dataset = dataset.map(tokenize, desc="Tokenizing completions", remove_columns=pairs)
    return keep_short_completions(dataset, max_length, split)


def keep_short_completions(dataset, max_length: int | None, split: str = ""):
    """
    `dataset` (with `completion_ids`) without completions of more than `max_length` tokens, and without the comparisons
    and targets they have a part in; rows that then say nothing are left out. How much that is, is printed.
    """
    if max_length is None or max(dataset["length"]) <= max_length:
        return dataset
    counts = Counter()

    def shorten(row):
        keep = [i for i, ids in enumerate(row["completion_ids"]) if len(ids) <= max_length]
        counts["completions"] += len(row["completion_ids"]) - len(keep)
        before = len(row.get("better") or [])
        short = select_completions(row, keep)
        counts["comparisons"] += before - len(short.get("better") or [])
        return {**short, "length": max(map(len, short["completion_ids"]), default=0)}

    total, longest = sum(map(len, dataset["completion_ids"])), max(dataset["length"])
    shortest = min(len(ids) for row in dataset["completion_ids"] for ids in row)
    # No cache: the counts are made by going over the rows
    short = dataset.map(shorten, load_from_cache_file=False, desc="Leaving out long completions")
    informed = [i for i, row in enumerate(short) if row.get("better") or (row.get("targets") and row["completions"])]
    split = f"{split} " if split else ""
    if not informed:
        raise DataError(
            f"no {split}row is left: the completions are longer than `max_length={max_length}` "
            f"(the shortest has {shortest} tokens with its prompt). Type `stage.args.max_length={longest}` to keep "
            "all."
        )
    say(
        f"data: {counts['completions']:,} of {total:,} {split}completions left out, longer than "
        f"`max_length={max_length}` tokens (the longest: {longest:,}), and with them {counts['comparisons']:,} "
        f"comparisons; {len(dataset) - len(informed):,} of {len(dataset):,} rows say nothing more and are left out"
    )
    return short.select(informed)


def head_names(dataset) -> list[str] | None:
    """The names of what completions have targets for, from the columns' types; `None` without targets."""
    from datasets import List

    targets = dataset.features.get("targets")  # of that name there may be a column for a reward function too
    return list(targets.feature) if isinstance(targets, List) and isinstance(targets.feature, dict) else None


def report_cut_rows(dataset, tokenizer, max_length: int | None = None):
    """
    `dataset` (a `DatasetDict`) as it is, for trainers that cut each row after `max_length` tokens themselves.

    How many rows are cut is printed, and how many of them lose the whole completion, which then teaches nothing.

    Raises:
        [`~rlhf_trl.errors.DataError`]: if no row of a split keeps any of its completion, or all training rows have one
            label.
    """
    if "label" in dataset["train"].column_names:
        labels = set(dataset["train"]["label"])
        if len(labels) == 1:
            raise DataError(
                f"all {len(dataset['train']):,} training rows are labelled {str(labels.pop()).lower()}, and this "
                "stage learns from good and bad completions. Give data that has both."
            )
    for split, rows in dataset.items() if max_length is not None else ():
        measured = rows.map(
            lambda row: dict(zip(("prompt_tokens", "tokens"), _lengths(tokenizer, row), strict=True)),
            remove_columns=rows.column_names,
            desc="Measuring rows",
        )
        longest = max(measured["tokens"])
        cut = sum(tokens > max_length for tokens in measured["tokens"])
        lost = sum(tokens >= max_length for tokens in measured["prompt_tokens"])
        if lost == len(rows):
            raise DataError(
                f"all {len(rows):,} {split} rows have prompts of `max_length={max_length}` tokens or more, so nothing "
                f"of any completion is left. Type `stage.args.max_length={longest}` to keep all."
            )
        if cut:
            what = f"; {lost:,} lose the whole completion" if lost else ""
            say(
                f"data: {cut:,} of {len(rows):,} {split} rows are cut after `max_length={max_length}` tokens "
                f"(the longest: {longest:,}){what}"
            )
    return dataset


def _lengths(tokenizer, row: dict) -> tuple[int, int]:
    """Tokens of a row's prompt, and of the whole row (with the longer completion of a pair)."""
    prompt = len(prompt_ids(tokenizer, row["prompt"], **template_kwargs(row))) if "prompt" in row else 0
    return prompt, max(map(len, _whole_rows(tokenizer, row)))


def _whole_rows(tokenizer, row: dict) -> list[list[int]]:
    """Ids of what a trainer reads of a row: of a pair both sides; of a mere prompt, that."""
    kwargs = template_kwargs(row)
    if "completion_ids" in row and "length" in row:  # of `tokenize_comparisons`; a column of that name may be anything
        return row["completion_ids"]
    if "messages" in row:
        return [_render(tokenizer, row["messages"], tokenize=True, **kwargs)["input_ids"]]
    if "text" in row:
        return [[*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]]
    completions = [row[name] for name in ("completion", "chosen", "rejected") if name in row]
    if not completions:
        return [prompt_ids(tokenizer, row["prompt"], **kwargs)]
    return [
        row_ids(tokenizer, row["prompt"], completion, **kwargs)
        if isinstance(completion, str)
        # with what the template adds after the end of a turn
        else _render(tokenizer, row["prompt"] + completion, tokenize=True, **kwargs)["input_ids"]
        for completion in completions
    ]


def measure(dataset, tokenizer, max_length: int | None = None) -> tuple[int, int]:
    """
    Return the tokens of the longest row of a `DatasetDict` and the largest id in it, of rows that are cut after
    `max_length` tokens.
    """

    def sizes(row):
        ids = [ids[:max_length] for ids in _whole_rows(tokenizer, row)]
        return {
            "tokens": max(map(len, ids), default=0),
            "largest": max((max(row, default=0) for row in ids), default=0),
        }

    tokens, largest = [0], [0]
    for rows in dataset.values():
        measured = rows.map(sizes, remove_columns=rows.column_names, desc="Measuring rows")
        tokens.append(max(measured["tokens"]))
        largest.append(max(measured["largest"]))
    return max(tokens), max(largest)


def filter_prompts(dataset, tokenizer, max_prompt_length: int | None = None):
    """
    `dataset` (a `Dataset` or `DatasetDict`) without prompts of more than `max_prompt_length` tokens.

    How many are left out is printed.
    """

    def length(row):
        return len(prompt_ids(tokenizer, row["prompt"], **template_kwargs(row)))

    return _keep_short(
        dataset, length, max_prompt_length, "prompts", "max_prompt_length", "stage.prepare.max_prompt_length"
    )


def _keep_short(dataset, length, limit: int | None, noun: str, name: str, key: str):
    """The rows of which `length(row)` is at most `limit`. A `DataError` where there is none."""
    if isinstance(dataset, dict):
        kept = {side: _keep_short(rows, length, limit, f"{side} {noun}", name, key) for side, rows in dataset.items()}
        return type(dataset)(kept)
    if limit is None:
        return dataset
    lengths = [length(row) for row in dataset]
    short = [i for i, tokens in enumerate(lengths) if tokens <= limit]
    if not short:
        raise DataError(
            f"all {len(dataset):,} {noun} are longer than `{name}={limit}`: the shortest has {min(lengths)} tokens. "
            f"Type `{key}={max(lengths)}` to keep all."
        )
    if len(short) == len(dataset):
        return dataset
    say(
        f"data: {len(dataset) - len(short):,} of {len(dataset):,} {noun} left out, longer than `{name}={limit}` "
        f"tokens (the longest: {max(lengths):,}); {count_of(len(short), 'row')} kept"
    )
    return dataset.select(short)


def count_trained(batch) -> tuple[int, int]:
    """How many tokens of a trainer's batch are trained on (labels that aren't -100), and how many it holds."""
    counted = [(sum(trained), len(ids)) for _, rows in _sides(batch) for ids, trained in rows]
    return sum(trained for trained, _ in counted), sum(tokens for _, tokens in counted)


def render_batch(tokenizer, batch) -> str:
    """
    The first row of a batch as text, as the trainer's collator made it (both sides of a pair), with the tokens that
    are trained on between [[ and ]].
    """
    shown = [f"label: {bool(batch['label'][0])}"] if "label" in batch else []
    for side, rows in _sides(batch):
        shown += [f"{side}:"] if side else []
        shown += [_marked(tokenizer, *rows[0])]
    return "\n".join(shown)


def _sides(batch) -> list[tuple[str, list[tuple[list[int], list[bool]]]]]:
    """The rows of a batch, by side of a pair (else ""): ids without padding, and which of them are trained on."""
    if "chosen_input_ids" in batch:  # ORPO
        return [(side, _rows(batch, f"{side}_")) for side in ("chosen", "rejected")]
    rows = _rows(batch)
    if "completion_mask" in batch and "label" not in batch:  # DPO: all chosen ones, then all rejected ones
        return [("chosen", rows[: len(rows) // 2]), ("rejected", rows[len(rows) // 2 :])]
    return [("", rows)]


def _rows(batch, prefix: str = "") -> list[tuple[list[int], list[bool]]]:
    ids = batch[f"{prefix}input_ids"]
    # Rows in one line (`padding_free`) have no mask; what a reward model scores has no labels, and counts as a whole
    kept = batch[f"{prefix}attention_mask"].bool() if f"{prefix}attention_mask" in batch else ids >= 0
    if f"{prefix}labels" in batch:
        trained = batch[f"{prefix}labels"] != -100
    else:
        trained = batch["completion_mask"].bool() if "completion_mask" in batch else kept
    return [(row[real].tolist(), mask[real].tolist()) for row, mask, real in zip(ids, trained, kept, strict=True)]


def render_sample(tokenizer, row: dict) -> str:
    """A row of which nothing is marked, as text: what the policy goes on from, or what a reward model scores."""
    if "completion_ids" in row and "length" in row:
        return "\n".join(_judged(tokenizer, row, i) for i in range(len(row["completion_ids"])))
    ids = prompt_ids(tokenizer, row["prompt"], **template_kwargs(row))
    return f"{_decode(tokenizer, ids)}\n({len(ids)} tokens, from which the policy goes on)"


def _judged(tokenizer, row: dict, i: int) -> str:
    """Completion `i` of a row of the reward stage, with what is known of it."""
    beaten = sorted(b + 1 for a, b in zip(row.get("better") or [], row.get("worse") or [], strict=True) if a == i)
    known = [f"better than {', '.join(map(str, beaten))}"] if beaten else []
    targets = row["targets"][i] if row.get("targets") else {}
    known += [f"{name} {value:.3g}" for name, value in targets.items() if value is not None]
    return (
        f"completion {i + 1}{': ' if known else ''}{'; '.join(known)}\n{_decode(tokenizer, row['completion_ids'][i])}"
    )


def _marked(tokenizer, ids: list[int], trained: list[bool]) -> str:
    """`ids` as text, each run of trained tokens between [[ and ]]."""
    text, start = "", 0
    for is_trained, run in itertools.groupby(trained):
        end = start + len(list(run))
        part = _decode(tokenizer, ids[start:end])
        text += f"[[{part}]]" if is_trained else part
        start = end
    return f"{text}\n({sum(trained)} of {len(ids)} tokens trained on)"


def _decode(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
