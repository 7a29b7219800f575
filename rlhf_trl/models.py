"""Loading policies, reward models and tokenizers: full models, adapters on a base, 4-bit bases; merging."""

import copy
import hashlib
import json
import logging
import pickle
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from peft import (
    LoraConfig,
    LoraModel,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.bitsandbytes import dequantize_bnb_weight
from transformers.pytorch_utils import Conv1D
from transformers.utils.peft_utils import find_adapter_config_file

from rlhf_trl.calibration import CALIBRATION_FILE, read_calibration
from rlhf_trl.data.tokenize import end_tokens, remember_ends
from rlhf_trl.errors import ConfigError
from rlhf_trl.hints import count_of
from rlhf_trl.patches.bitsandbytes import keep_trainable
from rlhf_trl.patches.warnings import no_load_report
from rlhf_trl.paths import resolve_path
from rlhf_trl.runs.record import read_run
from rlhf_trl.terminal import say

__all__ = [
    "adapter_config",
    "base_path",
    "ensemble_members",
    "fingerprint",
    "load_model",
    "load_reward_model",
    "load_start",
    "load_tokenizer",
    "merge_adapter",
    "model_config",
    "model_fingerprint",
    "resolve_path",
]

logger = logging.getLogger(__name__)

AUTO_CLASSES = {"CAUSAL_LM": AutoModelForCausalLM, "SEQ_CLS": AutoModelForSequenceClassification}
# What makes two adapters the same network; the rest of a LoraConfig is about how they begin or are trained.
SHAPE = ("r", "lora_alpha", "use_rslora", "use_dora", "bias")
# Of those that may be left open, since the saved adapter has them
OPEN = ("trainable_token_indices", "rank_pattern", "alpha_pattern")
# Values of `init_lora_weights` that leave the base as it is, and add nothing to it at first
NEUTRAL_INIT = (True, "gaussian", "eva", "orthogonal", "mica")
HEADS = {"lm_head", "score", "classifier"}
# In the folder of an ensemble of reward models
ENSEMBLE_FILE = "ensemble.json"
# In the folder of a merged model that a run starts from
MADE_OF_FILE = "made_of.txt"


def adapter_config(path: str, revision: str | None = None) -> PeftConfig | None:
    """The adapter's config if `path` (folder or hub id) holds an adapter, else `None`."""
    missing = Path(path).is_absolute() and not Path(path).is_dir()  # which the hub would call a malformed id
    if missing or find_adapter_config_file(path, revision=revision) is None:
        return None
    try:
        return PeftConfig.from_pretrained(path, revision=revision)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"`adapter_config.json` of the adapter `{path}` can't be read ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}). Copy or download it again."
        ) from error


def base_path(path: str, config: PeftConfig) -> str:
    """
    The base model of an adapter: an absolute folder, or a hub id.

    A relative folder is looked for where the user stands, as PEFT does, and then beside the adapter.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if the base was a folder that is gone, or whose weights are others than those
            that a run's adapter was trained on.
    """
    base = config.base_model_name_or_path
    if not isinstance(base, str) or not base:
        raise ConfigError(
            f"The adapter `{path}` doesn't say what its base model is. Write its folder or hub id into "
            f"`base_model_name_or_path` of `{path}/adapter_config.json`."
        )
    for folder in (Path(base), Path(path, base)):
        if folder.is_dir():
            trained_on = _record(path).get("base_fingerprint")
            if trained_on is not None and trained_on != fingerprint(str(folder)):
                raise ConfigError(
                    f"The adapter `{path}` was trained on `{folder.resolve()}`, whose weights have changed since. "
                    "Train it again."
                )
            return str(folder.resolve())
    if Path(base).is_absolute() or base.startswith("."):
        raise ConfigError(
            f"The base model `{base}` of the adapter `{path}` doesn't exist. Put it there, or write its new place "
            f"into `base_model_name_or_path` of `{path}/adapter_config.json`."
        )
    return base


def model_config(path: str, trust_remote_code: bool = False, revision: str | None = None) -> PreTrainedConfig:
    """
    The config of a full model.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if there is none that Transformers knows, or it is not of a decoder-only
            language model: all stages read and write from left to right.
    """
    if Path(path).is_absolute() and not Path(path).is_dir():  # which the hub would call a malformed id
        raise ConfigError(f"The model folder `{path}` doesn't exist. Give an existing folder or a hub id.")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, revision=revision)
    except (OSError, ValueError) as error:
        remedy = "Give the folder of a model, or a hub id."
        if "trust_remote_code" in str(error):
            remedy = "It has code of its own: read it, and set `trust_remote_code` to true where you trust it."
        raise ConfigError(
            f"The model `{path}` can't be loaded ({' '.join(str(error).split())[:200]}). {remedy}"
        ) from error
    encodes = type(config) in MODEL_FOR_MASKED_LM_MAPPING
    decodes = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    if getattr(config, "is_encoder_decoder", False) or (encodes and not decodes):
        kind = "encoder-decoder" if getattr(config, "is_encoder_decoder", False) else "encoder-only"
        raise ConfigError(
            f"`{path}` is an {kind} model (`{config.model_type}`), and all stages take decoder-only ones, which read "
            "and write from left to right: give one such as Llama, Qwen or GPT-2."
        )
    return config


def load_tokenizer(
    path: str,
    name: str | None = None,
    chat_template: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> PreTrainedTokenizerBase:
    """
    The tokenizer of a model, with a padding token (the end token where it has none of its own). It knows which tokens
    end the model's turns, see [`~rlhf_trl.data.tokenize.end_tokens`].

    Args:
        path (`str`):
            The model's folder or hub id; for an adapter without tokenizer files, its base's is taken.
        name (`str`, *optional*):
            Folder or hub id of another tokenizer.
        chat_template (`str`, *optional*):
            File with a Jinja template that replaces the tokenizer's own.
        trust_remote_code (`bool`), revision (`str`, *optional*):
            As for the model.

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
                model_config(path, trust_remote_code, revision)  # which says so where the model itself is wrong
            raise ConfigError(
                f"No tokenizer can be loaded from `{source}` ({error}). Set `model.tokenizer`."
            ) from error
        tokenizer = AutoTokenizer.from_pretrained(base_path(path, config), trust_remote_code=trust_remote_code)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    _let_add_no_eos(tokenizer, source)
    remember_ends(tokenizer, _eos_token_id(path, trust_remote_code, revision))
    if chat_template is not None:
        if not Path(chat_template).is_file():
            raise ConfigError(f"The chat template `{chat_template}` doesn't exist. Give a Jinja file.")
        try:
            tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"The chat template `{chat_template}` is not UTF-8 ({error}). Save it as UTF-8."
            ) from error
    return tokenizer


def _broken_json(folder: str) -> Path | None:
    """The file that keeps the tokenizer of a local model from being loaded, if it is one of the tokenizer's."""
    for path in sorted(Path(folder).glob("*token*.json")) if Path(folder).is_dir() else ():
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return path
    return None


def _let_add_no_eos(tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """A policy would go on after its prompt's EOS, and training would have one between prompt and completion."""

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
        "completion. Here it doesn't, and EOS stands where a completion ends."
    )


def _eos_token_id(path: str, trust_remote_code: bool, revision: str | None) -> int | list[int] | None:
    """`eos_token_id` of a model's generation config, as `from_pretrained` makes it; of an adapter's base."""
    config = adapter_config(path, revision)
    if config is not None:
        path, revision = base_path(path, config), config.revision
    for file in ("generation_config.json", "config.json"):
        try:
            values, _ = PreTrainedConfig.get_config_dict(path, revision=revision, _configuration_file=file)
        except OSError:  # a file that isn't there
            continue
        ids = values.get("eos_token_id", values.get("text_config", {}).get("eos_token_id"))
        if ids is not None:
            return ids
    return None


def load_model(
    path: str,
    task_type: str = "CAUSAL_LM",
    dtype: str = "float32",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    quantization: BitsAndBytesConfig | None = None,
    device_map: str | None = None,
) -> PreTrainedModel | PeftModel:
    """
    A model as it was saved: a full one, or an adapter (not trainable) on its base.

    Args:
        path (`str`):
            Folder or hub id.
        task_type (`str`):
            `CAUSAL_LM`, or `SEQ_CLS` for one score a sequence.
        dtype (`str`):
            Type of the weights (of the base's, for an adapter): `float32`, `bfloat16`, `auto` (as saved) ...
        attn_implementation (`str`, *optional*), trust_remote_code (`bool`), revision (`str`, *optional*):
            As in `from_pretrained`.
        quantization (`transformers.BitsAndBytesConfig`, *optional*):
            Quantizes the weights (the base's, for an adapter) at loading. An adapter's base is by default as it was
            trained.
        device_map (`str`, *optional*):
            As in `from_pretrained`; `meta` looks at the files and takes no memory.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if a reward model is asked to write, or the base of an adapter is gone.
    """
    options = {
        "dtype": dtype,
        "attn_implementation": attn_implementation,
        "trust_remote_code": trust_remote_code,
        "quantization_config": quantization,
        "device_map": device_map,
    }
    config = adapter_config(path, revision)
    if config is None:
        return _load_full(path, task_type, revision=revision, **options)
    _refuse_reward_model(path, task_type, config.task_type == "SEQ_CLS")
    if device_map != "meta":  # where nothing is computed
        options["quantization_config"] = quantization or trained_quantization(path)
    heads = adapter_heads(path, revision) if task_type == "SEQ_CLS" else None
    base = _load_full(base_path(path, config), task_type, revision=config.revision, heads=heads, **options)
    return _with_adapter(base, path, config, revision).eval()


def load_reward_model(
    path: str, dtype: str | None = None, trust_remote_code: bool = False, device_map: str | None = None
) -> PreTrainedModel | PeftModel:
    """
    A trained reward model, full or an adapter on its base: one score a sequence, or one a head; the names of the heads
    are in `config.id2label`. An ensemble is one base with an adapter for each member.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if the model has no trained score head, or the members of an ensemble don't
            share a base.
    """
    if members := ensemble_members(path):
        bases = {base_path(member, adapter_config(member)) for member in members}
        if len(bases) > 1:
            raise ConfigError(f"The members of the ensemble `{path}` have several bases: {', '.join(sorted(bases))}.")
        if len({str(trained_quantization(member)) for member in members}) > 1:
            raise ConfigError(f"The members of the ensemble `{path}` were trained on differently quantized bases.")
        model = load_reward_model(members[0], dtype, trust_remote_code, device_map)
        for i, member in enumerate(members[1:], 1):
            config = adapter_config(member)
            config.inference_mode = True
            model.add_adapter(f"member_{i}", config)
            set_adapter_weights(model, adapter_weights(member), f"member_{i}", member)
        return model.eval()
    config = adapter_config(path)
    if config is None:
        architectures = model_config(path, trust_remote_code).architectures or [""]
        scores = "SequenceClassification" in architectures[0]
    else:
        scores = config.task_type == "SEQ_CLS"
    if not scores:
        raise ConfigError(f"`{path}` is no reward model: it has no score head. Train one with `stage=reward`.")
    return load_model(path, "SEQ_CLS", dtype or "float32", trust_remote_code=trust_remote_code, device_map=device_map)


def ensemble_members(path: str) -> list[str]:
    """
    Folders of the reward models, all adapters, that the ensemble in the folder `path` consists of; none where it is
    no ensemble.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if its `ensemble.json` doesn't name two adapters that are there.
    """
    file = Path(path, ENSEMBLE_FILE)
    if not file.is_file():
        return []
    try:
        members = [str(file.parent / name) for name in json.loads(file.read_text(encoding="utf-8"))["members"]]
    except (ValueError, TypeError, KeyError):
        members = []
    if len(members) > 1 and all(Path(member, "adapter_config.json").is_file() for member in members):
        return members
    raise ConfigError(
        f'`{file}` must hold `{{"members": [...]}}` with the folders of two or more adapters beside it. Mend it, or '
        "train the ensemble again."
    )


def load_start(
    path: str,
    task_type: str,
    peft_config: PeftConfig | None,
    merge_dir: str,
    revision: str | None = None,
    heads: Sequence[str] | None = None,
    **options,
) -> tuple[PreTrainedModel | PeftModel, PeftConfig | None]:
    """
    The model that a run starts from, for a TRL trainer, and the `peft_config` to give to that trainer.

    An adapter is frozen until [`~rlhf_trl.adapters.begin_training`]: on a quantized base TRL rounds what is trainable
    to bfloat16, and neither a saved adapter nor a copy of the base's embedding would be what it was.

    - a full model: itself; the trainer puts a fresh adapter on it if `peft_config` is given;
    - an adapter, `peft_config` given: the same adapter on its unmerged base. TRL keeps a frozen copy of
      it as the reference. For `SEQ_CLS` a policy's adapter gets a score head;
    - an adapter, no `peft_config`: merged into its base, written to `merge_dir` and loaded from there, so that TRL,
      which loads a reference from where the model came from, finds the merged one.

    Args:
        path (`str`):
            Folder or hub id.
        task_type (`str`):
            `CAUSAL_LM` or `SEQ_CLS`.
        peft_config (`peft.PeftConfig`, *optional*):
            The adapter that is asked for.
        merge_dir (`str`):
            Folder for the merged start.
        heads (`Sequence[str]`, *optional*):
            Names of the scores of a `SEQ_CLS` model; one score without them.
        revision (`str`, *optional*), **options:
            See [`load_model`].

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if the adapter at `path` isn't of the shape that is asked for.
    """
    saved = adapter_config(path, revision)
    if saved is None:
        if peft_config is not None:
            peft_config.inference_mode = True
        return _load_full(path, task_type, revision=revision, heads=heads, **options), peft_config
    _refuse_reward_model(path, task_type, saved.task_type == "SEQ_CLS")
    if peft_config is None:
        with PartialState().main_process_first():
            # What an earlier run merged may be of another adapter, or of a base that has been trained again since
            made_of = f"{path} {model_fingerprint(path, revision)} {trained_quantization(path)}"
            stamp = Path(merge_dir, MADE_OF_FILE)
            if not stamp.is_file() or stamp.read_text(encoding="utf-8") != made_of:
                merge_adapter(path, merge_dir, revision, options.get("trust_remote_code", False))
                stamp.write_text(made_of, encoding="utf-8")
        return _load_full(merge_dir, task_type, heads=heads, **options), None
    if options.get("device_map") != "meta":  # where nothing is computed
        options["quantization_config"] = start_quantization(path, options.get("quantization_config"))
        if options["quantization_config"] is not None and trained_quantization(path) is None:
            logger.warning("The adapter `%s` goes on over a quantized base, which it was not trained on.", path)
    base = _load_full(base_path(path, saved), task_type, revision=saved.revision, heads=heads, **options)
    _check_shape(path, saved, peft_config, base)
    saved.base_model_name_or_path = base.config._name_or_path
    saved.lora_dropout = peft_config.lora_dropout
    if saved.task_type == task_type:
        if task_type == "SEQ_CLS":
            _check_heads(path, len(adapter_heads(path, revision)), len(heads or ["score"]))
        model = _with_adapter(base, path, saved, revision)
        if isinstance(model.get_output_embeddings(), BaseTunerLayer):
            raise ConfigError(
                f"The adapter `{path}` changes the output layer, and TRL's trainers read that layer's own weights. "
                f"Write its merged model with `stage=merge model.path={path}` and start from `{path}/merged`."
            )
        return model, None
    return _with_score_head(base, path, saved, revision), None


def fingerprint(folder: str) -> str | None:
    """
    A hash that tells a folder's weights from others: of the headers and of 64 blocks of each weight file, so that it
    takes no time for large models. `None` for a folder without weights.
    """
    digest = hashlib.sha256()
    files = sorted([*Path(folder).glob("*.safetensors"), *Path(folder).glob("*.bin")])
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            for block in range(64):
                file.seek(block * size // 64)
                digest.update(file.read(4096))
    return digest.hexdigest()[:16] if files else None


def model_fingerprint(path: str, revision: str | None = None) -> str | None:
    """
    What tells the weights at `path` from others: of an adapter its own and its base's, of an ensemble its members', of
    a model of the hub its commit. `None` where there is nothing to tell by.
    """
    if not Path(path).is_dir():
        file = try_to_load_from_cache(path, "config.json", revision=revision)
        return Path(file).parent.name if isinstance(file, str) else None
    parts = [fingerprint(folder) for folder in [path, *ensemble_members(path)]]
    config = adapter_config(path)
    if config is not None:
        parts.append(model_fingerprint(base_path(path, config), config.revision))
    return "-".join(part for part in parts if part) or None


def trained_quantization(path: str) -> BitsAndBytesConfig | None:
    """How the base of the adapter in the folder `path`, a run or one of its checkpoints, was quantized in training."""
    saved = _record(path).get("quantization")
    return BitsAndBytesConfig.from_dict(saved) if saved else None


def _record(path: str) -> dict[str, Any]:
    """`run.json` of the run that is the folder `path`, or of which it is a checkpoint; nothing where there is none."""
    if not Path(path).is_dir():
        return {}
    run = Path(path).parent if Path(path).name.startswith("checkpoint-") else path
    return read_run(path) or read_run(run) or {}


def start_quantization(path: str, wanted: BitsAndBytesConfig | None) -> BitsAndBytesConfig | None:
    """
    How the base of an adapter that goes on is quantized: as it was in training.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if another quantization is `wanted`.
    """
    trained = trained_quantization(path)
    if trained is None or wanted is None:
        return wanted or trained
    there, here = trained.to_dict(), wanted.to_dict()
    if differing := [key for key in there if here.get(key) != there[key]]:
        raise ConfigError(
            f"The adapter `{path}` was trained on a base quantized with `{differing[0]}={there[differing[0]]}`, and "
            f"`adapter.quantization` has {here.get(differing[0])}. Set it to the same."
        )
    return trained


def load_merged(
    source: str,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    revision: str | None = None,
    dequantize: bool = True,
) -> PreTrainedModel:
    """
    An adapter merged into its base: a full model that computes what the adapter does on its base.

    Args:
        source (`str`):
            Folder or hub id of the adapter.
        dtype (`str`), trust_remote_code (`bool`), revision (`str`, *optional*):
            As in [`load_model`].
        dequantize (`bool`):
            Whether the base of an adapter that was trained on a quantized one gets the weights that it had there.
            Without, they are the unquantized ones, and the model is another than was trained.
    """
    config = adapter_config(source, revision)
    scores = config.task_type == "SEQ_CLS"
    place, heads = base_path(source, config), adapter_heads(source, revision) if scores else None
    options = {"dtype": dtype, "trust_remote_code": trust_remote_code, "revision": config.revision, "heads": heads}
    base = _load_full(place, config.task_type, **options)
    quantization = trained_quantization(source) if dequantize else None
    if quantization is not None:
        _copy_dequantized(_load_full(place, config.task_type, quantization_config=quantization, **options), base)
    embedding = base.get_input_embeddings()
    tied = base.get_output_embeddings() is not None and base.get_output_embeddings().weight is embedding.weight
    model = _with_adapter(base, source, config, revision)
    if tied:  # or what is merged into the one layer would be in the other as well
        shared = embedding.weight
        for module in model.modules():
            if module is not embedding and module._parameters.get("weight") is shared:
                module.weight = torch.nn.Parameter(shared.detach().clone())
    merged = model.merge_and_unload()
    if tied:
        first, last = merged.get_input_embeddings(), merged.get_output_embeddings()
        still = torch.equal(first.weight, last.weight)
        if still:
            last.weight = first.weight
        merged.config.tie_word_embeddings = merged.config.get_text_config().tie_word_embeddings = still
        merged.all_tied_weights_keys = merged.get_expanded_tied_weights_keys(all_submodels=True)
    return merged


def _copy_dequantized(quantized: PreTrainedModel, model: PreTrainedModel) -> None:
    """Give `model` the weights that its `quantized` copy computes with."""
    import bitsandbytes

    for name, module in quantized.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit | bitsandbytes.nn.Linear8bitLt):
            weight = dequantize_bnb_weight(module.weight, getattr(module, "state", None))
            target = model.get_submodule(name)
            target.weight.data.copy_(weight.T if isinstance(target, Conv1D) else weight)


def merge_adapter(
    source: str,
    output_dir: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
    dequantize: bool = True,
) -> None:
    """
    Writes an adapter merged into its base, with its tokenizer, as a full model. Call it on one rank.

    Where the adapter changes one of two tied layers, embedding and output layer, the merged model has both.

    Args:
        source (`str`):
            Folder or hub id of the adapter.
        output_dir (`str`):
            Folder to write; it appears whole or not at all.
        revision (`str`, *optional*), trust_remote_code (`bool`):
            As in `from_pretrained`.
        dequantize (`bool`):
            See [`load_merged`].

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if `source` is no adapter.
    """
    if members := ensemble_members(source):
        raise ConfigError(
            f"`{source}` is an ensemble of {len(members)} reward models, which don't merge into one. Merge a member: "
            f"`stage=merge model.run=null model.path={members[0]}`."
        )
    if adapter_config(source, revision) is None:
        raise ConfigError(f"`{source}` is a full model, there is nothing to merge. Use it as it is.")
    merged = load_merged(source, "auto", trust_remote_code, revision, dequantize)
    partial = Path(f"{output_dir}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code, revision=revision)
    merged.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if merged.can_generate():  # an adapter's folder has no generation_config; a trained full model's lists them
        merged.generation_config.eos_token_id = end_tokens(tokenizer) or None
    merged.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    if Path(source, CALIBRATION_FILE).is_file():  # merging doesn't change a score
        shutil.copy(Path(source, CALIBRATION_FILE), partial)
    shutil.rmtree(output_dir, ignore_errors=True)
    partial.rename(output_dir)


def score_heads(model: PreTrainedModel | PeftModel) -> list[torch.nn.Linear]:
    """The layers that give a classifier's scores; under an adapter the original and the trained copy."""
    labels = model.config.num_labels
    return [
        module
        for name, module in model.named_modules()
        if {"score", "classifier"} & set(name.split("."))
        and isinstance(module, torch.nn.Linear)
        and module.out_features == labels
    ]


def adapter_heads(path: str, revision: str | None = None) -> list[str]:
    """Names of the scores of a reward model's adapter, whose files hold the head but not the model's config."""
    weights = adapter_weights(path, revision)
    count = next(
        (len(weight) for name, weight in weights.items() if re.search(r"\.(score|classifier)\.weight$", name)), 1
    )
    names = (read_calibration(path) or {}).get("heads", [])
    return names if len(names) == count else ["score"] if count == 1 else [f"LABEL_{i}" for i in range(count)]


def _check_heads(path: str, found: int, wanted: int) -> None:
    if found != wanted:
        plural = "s" * (found != 1)
        raise ConfigError(
            f"The reward model `{path}` gives {found} score{plural} a completion, and the data is for {wanted}. Start "
            "from a policy, or give the data that the reward model was trained on."
        )


def _load_full(
    path: str,
    task_type: str,
    trust_remote_code: bool = False,
    revision: str | None = None,
    heads: Sequence[str] | None = None,
    **options,
):
    config = model_config(path, trust_remote_code, revision)
    architecture = (config.architectures or [""])[0]
    _refuse_reward_model(path, task_type, "SequenceClassification" in architecture)
    if revision is not None and not Path(path).is_dir():
        # TRL loads the reference by the model's path alone: the path must already mean this revision
        from huggingface_hub import snapshot_download

        path, revision = snapshot_download(path, revision=revision), None
    is_scored = "SequenceClassification" in architecture
    if task_type == "SEQ_CLS" and not is_scored:
        names = list(heads or ["score"])
        options |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    model = load_weights(
        AUTO_CLASSES[task_type], path, new_head=not is_scored, trust_remote_code=trust_remote_code, **options
    )
    if task_type == "SEQ_CLS":
        if heads is not None:
            _check_heads(path, model.config.num_labels, len(heads))
        for name, head in model.named_children():
            if name in HEADS and isinstance(head, torch.nn.Linear):
                # PEFT trains a head in float32, whatever the type of the base; the hook is copied with the layer
                head.register_forward_pre_hook(_cast_to_weight)
    if getattr(model, "is_loaded_in_4bit", False):
        keep_trainable(model)
    return model


def load_weights(auto_class: type, path: str, new_head: bool = False, **options) -> PreTrainedModel:
    """
    Load a full model, each of whose weights is in its files.

    Args:
        auto_class (`type`):
            Such as `transformers.AutoModelForCausalLM`.
        path (`str`):
            Folder or hub id.
        new_head (`bool`):
            Whether a classifier may get a new head, and leave the one of the files, since they are a policy's.
        **options:
            As in `from_pretrained`.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if weights are missing, have another shape than `config.json` says, aren't
            finite, or can't be read.
    """
    with no_load_report(), _readable(path):
        # Sizes are ignored only here: what doesn't fit is named below
        model, found = auto_class.from_pretrained(
            path, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    missing, unexpected = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    if new_head and auto_class is AutoModelForSequenceClassification:
        trunk = f"{model.base_model_prefix}."
        missing, unexpected = ([key for key in keys if key.startswith(trunk)] for keys in (missing, unexpected))
    if mismatched := sorted(found["mismatched_keys"]):
        key, there, wanted = mismatched[0]
        labels = model.config.num_labels
        text = (
            f"{count_of(len(mismatched), 'weight')} of `{path}` {'has' if len(mismatched) == 1 else 'have'} another "
            f"shape than its config.json says: `{key}` is {_shape(there)}, and {_shape(wanted)} is expected."
        )
        if wanted[0] == labels != there[0] and not key.startswith(f"{model.base_model_prefix}."):
            text += (
                f" `num_labels` is {labels} there (2 where config.json doesn't name it). "
                f'Write `"num_labels": {there[0]}` into `{path}/config.json`.'
            )
        raise ConfigError(text)
    if missing:
        text = f"`{path}` lacks {count_of(len(missing), 'weight')} of {type(model).__name__}: {_first(missing)}. "
        if unexpected:
            text += f"Its files hold {_first(unexpected)} instead, which have no place there. "
        raise ConfigError(f"{text}Rename what has another name, or give a folder that holds the whole model.")
    if unexpected:
        logger.warning(
            "`%s` holds %s that %s has no place for and that stay unused: %s.",
            path,
            count_of(len(unexpected), "weight"),
            type(model).__name__,
            _first(unexpected),
        )
    _check_finite(path, model.named_parameters())
    return model


@contextmanager
def _readable(path: str) -> Iterator[None]:
    """
    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if files of weights are missing or damaged.
    """
    try:
        yield
    except (OSError, EOFError, SafetensorError, pickle.UnpicklingError, HFValidationError) as error:
        why, remedy = " ".join(str(error).split())[:200], "Copy or download the folder again."
        if isinstance(error, pickle.UnpicklingError):
            why = "a pickle that is damaged, or that holds more than weights and could run code"
            remedy = "Give the model as safetensors."
        where = _broken_weights(path) or path
        raise ConfigError(f"The weights of `{where}` can't be read ({why}). {remedy}") from error


def _broken_weights(folder: str) -> Path | None:
    """The safetensors file of a local model that can't be opened, if there is one."""
    for path in sorted(Path(folder).glob("*.safetensors")) if Path(folder).is_dir() else ():
        try:
            with safe_open(path, framework="pt"):
                pass
        except (OSError, SafetensorError):
            return path
    return next(iter(sorted(Path(folder).glob("*.bin"))), None)


def _check_finite(path: str, weights: Iterator[tuple[str, Tensor]]) -> None:
    for name, weight in weights:
        number = weight.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        # Ranks that get their weights from the first, as under FSDP and ZeRO-3, have none yet
        if not number or not weight.numel() or weight.is_meta:
            continue
        if not all(bound.isfinite() for bound in weight.detach().aminmax()):
            raise ConfigError(
                f"`{name}` of `{path}` holds NaN or infinite numbers, so it can't compute anything. Start from "
                "an earlier model, such as one of the run's checkpoints."
            )


def _first(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names[:3]) + (" ..." if len(names) > 3 else "")


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _cast_to_weight(module: torch.nn.Linear, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    return (inputs[0].to(module.weight.dtype),)


def _refuse_reward_model(path: str, task_type: str, is_reward_model: bool) -> None:
    if is_reward_model and task_type == "CAUSAL_LM":
        raise ConfigError(
            f"`{path}` is a reward model and can't write text. Start from a policy: `model.run=sft`, or its path."
        )


def _check_shape(path: str, saved: PeftConfig, wanted: PeftConfig, base: PreTrainedModel) -> None:
    if not isinstance(saved, LoraConfig) or not isinstance(wanted, LoraConfig):
        raise ConfigError(
            f"`{path}` is an adapter of the kind `{saved.peft_type.value}`, which a run can't go on training. "
            "Set `adapter=none` (it is merged, and everything is trained)."
        )
    if changes_base(saved):
        raise ConfigError(
            f"The adapter `{path}` began with `init_lora_weights={saved.init_lora_weights}`, which changes its base, "
            "so a second adapter can't stand on that base. Write its merged model with `stage=merge "
            f"model.path={path}` and start from `{path}/merged`."
        )
    differing = [
        f"`{name}` is {getattr(saved, name)} there and {getattr(wanted, name)} in `adapter.peft`"
        for name in SHAPE
        if getattr(saved, name) != getattr(wanted, name)
    ]
    if _targets(saved, base, wanted.task_type) != _targets(wanted, base, wanted.task_type):
        differing.append(f"`target_modules` is {_shown(saved)} there and {_shown(wanted)} in `adapter.peft`")
    if wanted.modules_to_save and set(wanted.modules_to_save) - HEADS != set(saved.modules_to_save or []) - HEADS:
        differing.append(
            f"`modules_to_save` is {saved.modules_to_save} there and {wanted.modules_to_save} in `adapter.peft`"
        )
    differing += [
        f"`{name}` is {getattr(saved, name)} there and {getattr(wanted, name)} in `adapter.peft`"
        for name in OPEN
        if getattr(wanted, name) and getattr(saved, name) != getattr(wanted, name)
    ]
    if differing:
        raise ConfigError(
            f"The run would go on training the adapter `{path}`, but an adapter of another shape is asked for: "
            f"{'; '.join(differing)}. Set `adapter.peft` to the same, or write the adapter's merged model with "
            f"`stage=merge model.path={path}` and start from `{path}/merged`."
        )


def changes_base(config: PeftConfig) -> bool:
    """Whether an adapter subtracts from the base's weights what it begins with, as PiSSA and OLoRA do."""
    init = getattr(config, "init_lora_weights", True)
    return isinstance(init, str) and init not in NEUTRAL_INIT


def _targets(config: LoraConfig, base: PreTrainedModel, task_type: str) -> set[str]:
    """Names of the layers that get an adapter, found on a copy of the base without weights."""
    config = copy.deepcopy(config)
    config.task_type = task_type  # says which head `all-linear` leaves out
    with torch.device("meta"):
        return set(LoraModel(type(base)._from_config(base.config), config, "default").targeted_module_names)


def _shown(config: LoraConfig) -> str:
    targets = config.target_modules
    return targets if isinstance(targets, str) else str(sorted(targets))


def _with_score_head(base: PreTrainedModel, path: str, saved: LoraConfig, revision: str | None) -> PeftModel:
    config = copy.deepcopy(saved)
    config.task_type = "SEQ_CLS"  # PEFT adds the score head to `modules_to_save`
    config.inference_mode = True
    config.modules_to_save = [name for name in saved.modules_to_save or [] if name not in HEADS]
    model = get_peft_model(base, config)
    head = {name: weight for name, weight in get_peft_model_state_dict(model).items() if ".score." in name}
    policy = {name: weight for name, weight in adapter_weights(path, revision).items() if "lm_head" not in name}
    set_adapter_weights(model, head | policy, "default", path)
    return model


def _with_adapter(base: PreTrainedModel, path: str, config: PeftConfig, revision: str | None) -> PeftModel:
    config.base_model_name_or_path = base.config._name_or_path
    config.inference_mode = True
    model = get_peft_model(base, config)
    set_adapter_weights(model, adapter_weights(path, revision), "default", path)
    return model


def adapter_weights(path: str, revision: str | None = None) -> dict[str, Tensor]:
    """
    The weights of a saved adapter, on the CPU.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if there are none, or they can't be read or aren't finite.
    """
    with _readable(path):
        weights = load_peft_weights(path, device="cpu", revision=revision)
    _check_finite(path, weights.items())
    return weights


def set_adapter_weights(model: PeftModel, weights: dict[str, Tensor], name: str, path: str) -> None:
    """
    Give the adapter `name` of `model` the weights that were saved at `path`, each of them and no others.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if weights are missing, have no place, or another shape: an adapter of
            another base.
    """
    base = model.get_base_model().config._name_or_path
    unexpected = []
    try:
        found = set_peft_model_state_dict(model, weights, adapter_name=name)
    except KeyError as error:  # of a layer in `modules_to_save`
        lacking = [error.args[0]]
    except RuntimeError as error:
        sizes = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
        if not sizes:
            raise
        raise ConfigError(
            f"The adapter `{path}` doesn't fit the base `{base}`: {sizes[0]} Give the base that it was trained on."
        ) from error
    else:
        unexpected = list(found.unexpected_keys)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        filled = {id(parameter) for key, parameter in parameters.items() if key not in found.missing_keys}
        biases = {"all": ".bias", "lora_only": ".base_layer.bias"}.get(getattr(model.peft_config[name], "bias", None))
        # Buffers aren't saved, and neither is the second of two tied layers
        lacking = [
            key
            for key in found.missing_keys
            if (name in key.split(".") or (biases and key.endswith(biases)))
            and key in parameters
            and id(parameters[key]) not in filled
        ]
    if lacking or unexpected:
        said = [f"{count_of(len(lacking), 'weight')} missing from its files ({_first(lacking)})"] * bool(lacking)
        said += [f"{count_of(len(unexpected), 'weight')} without a place ({_first(unexpected)})"] * bool(unexpected)
        raise ConfigError(
            f"The adapter `{path}` doesn't fit the base `{base}`: {' and '.join(said)}. Give the base that it was "
            "trained on, or train it again."
        )
