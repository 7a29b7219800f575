"""Merging of adapters, on quantized bases as well."""

import shutil
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel
from transformers.integrations.bitsandbytes import dequantize_bnb_weight
from transformers.pytorch_utils import Conv1D

from rlhf_trl.data.tokenize import end_tokens
from rlhf_trl.errors import ConfigError
from rlhf_trl.models.adapters import adapter_config, adapter_heads, base_path, with_adapter
from rlhf_trl.models.calibration import CALIBRATION_FILE
from rlhf_trl.models.loading import load_full
from rlhf_trl.models.quantization import trained_quantization
from rlhf_trl.models.tokenizers import load_tokenizer
from rlhf_trl.runs.paths import ensemble_members

# In the folder of a merged model that a run starts from
MADE_OF_FILE = "made_of.txt"


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
    assert config is not None, f"{source} is no adapter"
    task_type = str(config.task_type or "CAUSAL_LM")
    scores = task_type == "SEQ_CLS"
    place, heads = base_path(source, config), adapter_heads(source, revision) if scores else None
    options = {"dtype": dtype, "trust_remote_code": trust_remote_code, "revision": config.revision, "heads": heads}
    base: Any = load_full(place, task_type, **options)
    quantization = trained_quantization(source) if dequantize else None
    if quantization is not None:
        _copy_dequantized(load_full(place, task_type, quantization_config=quantization, **options), base)
    embedding = base.get_input_embeddings()
    tied = base.get_output_embeddings() is not None and base.get_output_embeddings().weight is embedding.weight
    model: Any = with_adapter(base, source, config, revision)
    if tied:  # or what is merged into the one layer would be in the other as well
        shared = embedding.weight
        for module in model.modules():
            if module is not embedding and dict(module.named_parameters(recurse=False)).get("weight") is shared:
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
            weight = dequantize_bnb_weight(cast(torch.nn.Parameter, module.weight), getattr(module, "state", None))
            target: Any = model.get_submodule(name)
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
