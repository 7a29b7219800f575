"""
Token ids of a prompt and a completion, the same for reward models, PPO and evaluation.

A reward model must see in training just what a policy generates: the prompt's ids as TRL's
`GRPOTrainer._tokenize_prompts` makes them, the completion's own ids, and EOS if it was generated. Nothing follows it,
though a chat template often adds a newline there.
"""

import functools

from jinja2 import TemplateError

from rlhf_trl.data.chat_template import render_chat, without_bos
from rlhf_trl.data.multimodal import as_read
from rlhf_trl.errors import ConfigError
from rlhf_trl.terminal import say


def end_tokens(tokenizer) -> list[int]:
    """
    Return the ids of the tokens that end a turn: generation stops at the first of them, everywhere.

    These are the tokenizer's EOS, the ids that the model's generation_config lists (which a tokenizer of
    [`~rlhf_trl.models.tokenizers.load_tokenizer`] knows, see [`remember_ends`]), and the token that ends an
    assistant's turn in the chat template, if none of those does.
    """
    ends = dict.fromkeys([tokenizer.eos_token_id, *getattr(tokenizer, "model_ends", ())])
    ends.pop(None, None)
    if tokenizer.chat_template is not None:
        ends |= dict.fromkeys(_template_ends(tokenizer, str(tokenizer.chat_template), tuple(ends)))
    return list(ends)


def remember_ends(tokenizer, eos_token_id: int | list[int] | None) -> None:
    """Register the `eos_token_id` of the generation_config of the tokenizer's model for [`end_tokens`]."""
    ids = eos_token_id if isinstance(eos_token_id, list | tuple) else [eos_token_id]
    tokenizer.model_ends = [token for token in ids if token is not None]


@functools.lru_cache(maxsize=64)
def _template_ends(tokenizer, template: str, ends: tuple[int, ...]) -> list[int]:
    """Return the special token after an assistant's words, in a list; none if one of `ends` stands there."""
    words = "Hello"
    messages = [{"role": "user", "content": words}, {"role": "assistant", "content": words}]
    try:
        text = tokenizer.apply_chat_template(as_read(tokenizer, messages), tokenize=False)
    except TemplateError:  # a template that refuses even this is reported where the data are rendered
        return []
    _, found, after = text.rpartition(words)
    ids = tokenizer(after, add_special_tokens=False)["input_ids"] if found and after else []
    if not set(ends).isdisjoint(ids):
        return []
    added = tokenizer.added_tokens_decoder
    return [token for token in ids if token in added and added[token].special and token != tokenizer.unk_token_id][:1]


def prompt_ids(tokenizer, prompt: str | list[dict], **template_kwargs) -> list[int]:
    """
    Return the ids of a prompt as GRPOTrainer gives it to the policy.

    Args:
        prompt (`str` or `list[dict]`): text or chat.
        **template_kwargs: for the chat template, and `images`, of which each becomes as many ids as its model reads.
    """
    if isinstance(prompt, str):
        return tokenizer(without_bos(tokenizer, prompt))["input_ids"]
    return render_chat(tokenizer, prompt, tokenize=True, add_generation_prompt=True, **template_kwargs)["input_ids"]


def row_ids(
    tokenizer,
    prompt: str | list[dict],
    completion: str | list[dict],
    eos: bool = True,
    start: list[int] | None = None,
    **template_kwargs,
) -> list[int]:
    """
    Return the ids of a prompt and its completion, as the policy is trained to write it.

    Text: the ids of both together, as SFT has them, up to the end. Chat: what the template adds after the generation
    prompt, up to and with the first of the [`end_tokens`] (that of the last turn if `completion` has several). EOS is
    added if no such token ends the completion.

    Args:
        prompt, completion (`str` or `list[dict]`): text or chat.
        eos (`bool`, *optional*, defaults to `True`): `False` for a truncated completion, without an end token.
        start (`list[int]`, *optional*): the [`prompt_ids`], where they are known.
        **template_kwargs: for the chat template (`tools`, ...), and `images`.
    """
    ends = end_tokens(tokenizer)
    if not ends:
        raise ConfigError(
            "the tokenizer has no EOS token, so nothing says where a completion ends. "
            "Add `eos_token` to its tokenizer_config.json, or name another with `model.tokenizer=PATH`."
        )
    head: list[int] = prompt_ids(tokenizer, prompt, **template_kwargs) if start is None else start
    if isinstance(prompt, str) and isinstance(completion, str):
        ids = tokenizer(without_bos(tokenizer, prompt) + completion)["input_ids"]
        head = ids[: _common(head, ids)]
        ids = ids[len(head) :]
    elif isinstance(prompt, list) and isinstance(completion, list):
        ids = _turn_ids(tokenizer, prompt, completion, head, template_kwargs)
    else:
        raise TypeError("A prompt and its completion must both be text or both be messages.")
    if isinstance(completion, str) or len(completion) > 1:
        end = _last_end(tokenizer, ids, ends)
    else:
        end = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return head + ids[:end] + ((ids[end : end + 1] or ends[:1]) if eos else [])


def split_row_ids(
    tokenizer, prompt: str | list[dict], completion: str | list[dict], **template_kwargs
) -> tuple[list[int], list[int]]:
    """
    Return [`row_ids`] in two, the prompt's and the completion's, split where SFT does.

    That is at the prompt's end or, where tokens merge across it, before the first one that isn't the prompt's own.
    """
    ids = row_ids(tokenizer, prompt, completion, **template_kwargs)
    length = max(1, _common(prompt_ids(tokenizer, prompt, **template_kwargs), ids))
    return ids[:length], ids[length:]


def written_row_ids(tokenizer, prompt: str | list[dict], written: list[int], **template_kwargs) -> list[int]:
    """
    Return the ids of a prompt and of what a policy with this tokenizer has written after it, as training reads them.

    Those are the prompt's ids and then `written`; but if tokens of the same text merge across the end of the prompt,
    the text's ids, which are what [`row_ids`] gives.
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
        elif decode_ids(tokenizer, ids[i : i + 1]).strip():
            break
    return end


def _turn_ids(tokenizer, prompt: list[dict], completion: list[dict], start: list[int], template_kwargs) -> list[int]:
    """Return what the chat template adds for `completion` after the generation prompt, whose ids are `start`."""
    if not template_kwargs.get("images"):  # which would be read again
        ids = render_chat(tokenizer, prompt + completion, tokenize=True, **template_kwargs)["input_ids"]
        if ids[: len(start)] == start:
            return ids[len(start) :]
    # The prompt ends in other tokens alone than followed by the completion: tokens merge across the border, or the
    # template puts something (an empty thought) into the generation prompt only. The policy continues `start`.
    head = render_chat(tokenizer, prompt, tokenize=False, add_generation_prompt=True, **template_kwargs)
    text = render_chat(tokenizer, prompt + completion, tokenize=False, **template_kwargs)
    return tokenizer(text[_common(head, text) :], add_special_tokens=False)["input_ids"]


def _common(a, b) -> int:
    """Return the number of items (characters, ids) that both begin with."""
    length = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        length += 1
    return length


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


def decode_ids(tokenizer, ids: list[int]) -> str:
    """Return the text of ids, special tokens included."""
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
