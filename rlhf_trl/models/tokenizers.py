"""Loading of tokenizers."""

import json
from pathlib import Path

from transformers import AutoProcessor, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin

from rlhf_trl.data.multimodal import remember_processor
from rlhf_trl.data.tokenize import remember_ends
from rlhf_trl.errors import ConfigError
from rlhf_trl.hints import names_of
from rlhf_trl.models.adapters import adapter_config, base_path
from rlhf_trl.models.loading import model_config
from rlhf_trl.models.options import CHAT_TEMPLATES, template_file
from rlhf_trl.models.vision import has_processor
from rlhf_trl.terminal import say


def load_tokenizer(
    path: str,
    name: str | None = None,
    chat_template: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> PreTrainedTokenizerBase:
    """
    Load the tokenizer of a model.

    It has a padding token (the end token if it has none of its own), adds no EOS to a text, and knows which tokens end
    the model's turns, see [`~rlhf_trl.data.tokenize.end_tokens`]. That of a model that reads images knows its
    processor, see [`~rlhf_trl.data.multimodal.processor_of`].

    Args:
        path (`str`):
            Folder or hub id of the model. An adapter without tokenizer files has its base's.
        name (`str`, *optional*):
            Folder or hub id of another tokenizer.
        chat_template (`str`, *optional*):
            Jinja file with a template that replaces the tokenizer's own, or the name of one that comes with the
            package (`chatml`, `olmo`, `tulu`, `zephyr`).
        trust_remote_code (`bool`), revision (`str`, *optional*):
            As in `from_pretrained`.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if there is no tokenizer, or no such template.
    """
    source = name or path
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code, revision=revision)
    except (OSError, ValueError) as error:
        config = adapter_config(source, revision) if name is None else None
        if config is None:
            if broken := _broken_json(source):
                raise ConfigError(
                    f"`{broken}` is no JSON ({error}). Copy or download the folder again, or set `model.tokenizer`."
                ) from error
            if name is None:
                model_config(path, trust_remote_code, revision)  # raises if the model itself is the cause
            raise ConfigError(
                f"No tokenizer can be loaded from `{source}` ({error}). Set `model.tokenizer`."
            ) from error
        tokenizer = AutoTokenizer.from_pretrained(base_path(path, config), trust_remote_code=trust_remote_code)
    if (processor := _load_processor(path, source, trust_remote_code, revision)) is not None:
        tokenizer = processor.tokenizer
        tokenizer.chat_template = processor.chat_template or tokenizer.chat_template
        remember_processor(tokenizer, processor)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    _stop_adding_eos(tokenizer, source)
    remember_ends(tokenizer, _eos_token_id(path, trust_remote_code, revision))
    if chat_template is not None:
        if not (file := template_file(chat_template)).is_file():
            raise ConfigError(
                f"The chat template `{chat_template}` doesn't exist. Give a Jinja file, or one of "
                f"{names_of(CHAT_TEMPLATES)}."
            )
        try:
            tokenizer.chat_template = file.read_text(encoding="utf-8")
            if processor is not None:
                processor.chat_template = tokenizer.chat_template
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"The chat template `{chat_template}` is not UTF-8 ({error}). Save it as UTF-8."
            ) from error
    return tokenizer


def _load_processor(path: str, source: str, trust_remote_code: bool, revision: str | None) -> ProcessorMixin | None:
    """Return the processor of a model that reads more than text, `None` for a language model."""
    config = adapter_config(path, revision)
    base = (path, revision) if config is None else (base_path(path, config), config.revision)
    try:
        values, _ = PreTrainedConfig.get_config_dict(base[0], revision=base[1])
    except OSError:  # a tokenizer by itself
        return None
    if not has_processor(values.get("model_type")):
        return None
    last = None
    for place in dict.fromkeys([source, base[0]]):  # an adapter without files of its own has its base's
        try:
            processor = AutoProcessor.from_pretrained(
                place, trust_remote_code=trust_remote_code, revision=revision if place == source else base[1]
            )
        except (OSError, ValueError, ImportError) as error:
            last = last or error
            continue
        if isinstance(processor, ProcessorMixin):
            return processor
    if last is not None:
        say(
            f"note: `{source}` reads more than text, and its processor can't be loaded "
            f"({' '.join(str(last).split())[:160]}): it is used for text alone"
        )
    return None


def _broken_json(folder: str) -> Path | None:
    """Return the malformed JSON file of a local tokenizer, `None` if all can be read."""
    for path in sorted(Path(folder).glob("*token*.json")) if Path(folder).is_dir() else ():
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return path
    return None


def _stop_adding_eos(tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """Keep the tokenizer from adding EOS to a text, which would stand between prompt and completion."""

    def ids() -> list[int]:
        return tokenizer("a")["input_ids"]

    if tokenizer.eos_token_id is None or ids()[-1:] != [tokenizer.eos_token_id]:
        return
    tokenizer.add_bos_token, tokenizer.add_eos_token = ids()[0] == tokenizer.bos_token_id, False
    if ids()[-1:] == [tokenizer.eos_token_id]:
        raise ConfigError(
            f"The tokenizer of `{source}` adds EOS (`{tokenizer.eos_token}`) to every text, also between prompt and "
            "completion. Set `add_eos_token` to false in its tokenizer_config.json, or name another tokenizer with "
            "`model.tokenizer=PATH`."
        )
    say(
        f"note: the tokenizer of `{source}` adds EOS (`{tokenizer.eos_token}`) to every text, also between prompt and "
        "completion. Here it doesn't: EOS is added where a completion ends."
    )


def _eos_token_id(path: str, trust_remote_code: bool, revision: str | None) -> int | list[int] | None:
    """Return `eos_token_id` of a model's generation config, of an adapter's base, as `from_pretrained` reads it."""
    config = adapter_config(path, revision)
    if config is not None:
        path, revision = base_path(path, config), config.revision
    for file in ("generation_config.json", "config.json"):
        try:
            values, _ = PreTrainedConfig.get_config_dict(path, revision=revision, _configuration_file=file)
        except OSError:  # no such file
            continue
        ids = values.get("eos_token_id", values.get("text_config", {}).get("eos_token_id"))
        if ids is not None:
            return ids
    return None
