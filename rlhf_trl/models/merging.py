"""Merging of adapters into their base, also a quantized one."""

import shutil
from pathlib import Path
from typing import cast

import torch
from peft import PeftConfig
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.bitsandbytes import dequantize_bnb_weight
from transformers.pytorch_utils import Conv1D

from rlhf_trl.data.multimodal import processor_of
from rlhf_trl.data.tokenize import end_tokens
from rlhf_trl.errors import ConfigError
from rlhf_trl.models.adapters import adapter_config, base_path, with_adapter
from rlhf_trl.models.calibration import CALIBRATION_FILE
from rlhf_trl.models.heads import adapter_head_names
from rlhf_trl.models.loading import load_full
from rlhf_trl.models.quantization import trained_quantization
from rlhf_trl.models.tokenizers import load_tokenizer
from rlhf_trl.patches.engines import whole_weights
from rlhf_trl.runs.paths import ensemble_members


@whole_weights()
def load_merged(
    source: str,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    revision: str | None = None,
    dequantize: bool = True,
) -> PreTrainedModel:
    """
    Return an adapter merged into its base: a full model with the same outputs, all of it on each rank that calls this.

    Args:
        source (`str`):
            Folder or hub id of the adapter.
        dtype (`str`), trust_remote_code (`bool`), revision (`str`, *optional*):
            See [`~rlhf_trl.models.loading.load_model`].
        dequantize (`bool`):
            Whether a base that was quantized in training gets its dequantized weights. Otherwise it gets the
            unquantized ones, which the adapter was not trained on.
    """
    config = cast(PeftConfig, adapter_config(source, revision))
    place, task_type = base_path(source, config), str(config.task_type)
    heads = adapter_head_names(source, revision) if task_type == "SEQ_CLS" else None
    options = {"dtype": dtype, "trust_remote_code": trust_remote_code, "revision": config.revision, "heads": heads}
    base = load_full(place, task_type, **options)
    quantization = trained_quantization(source) if dequantize else None
    if quantization is not None:
        _copy_dequantized(load_full(place, task_type, quantization_config=quantization, **options), base)
    embedding, output = _ends(base)
    tied = output is not None and output.weight is embedding.weight
    model = with_adapter(base, source, config, revision)
    if tied:  # else what is merged into one layer would be in the other, too
        shared = embedding.weight
        for module in model.modules():
            if module is not embedding and dict(module.named_parameters(recurse=False)).get("weight") is shared:
                module.register_parameter("weight", nn.Parameter(shared.detach().clone()))
    merged = cast(PreTrainedModel, model.merge_and_unload())
    if tied:
        embedding, output = _ends(merged)
        still = output is not None and torch.equal(embedding.weight, output.weight)
        if output is not None and still:
            output.weight = embedding.weight
        merged.config.tie_word_embeddings = merged.config.get_text_config().tie_word_embeddings = still
        merged.all_tied_weights_keys = merged.get_expanded_tied_weights_keys(all_submodels=True)
    return merged


def _ends(model: PreTrainedModel) -> tuple[nn.Embedding, nn.Linear | None]:
    """Return the embedding of a model, and its output layer if it has one."""
    return cast(nn.Embedding, model.get_input_embeddings()), cast(nn.Linear | None, model.get_output_embeddings())


def _copy_dequantized(quantized: PreTrainedModel, model: PreTrainedModel) -> None:
    """Copy the dequantized weights of `quantized` to `model`."""
    import bitsandbytes

    for name, module in quantized.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit | bitsandbytes.nn.Linear8bitLt):
            weight = dequantize_bnb_weight(cast(nn.Parameter, module.weight), getattr(module, "state", None))
            target = model.get_submodule(name)
            target.get_parameter("weight").data.copy_(weight.T if isinstance(target, Conv1D) else weight)


def merge_adapter(
    source: str,
    output_dir: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
    dequantize: bool = True,
) -> None:
    """
    Write an adapter merged into its base, with its tokenizer, as a full model. Call it on one rank.

    If the adapter changes one of two tied layers, embedding and output layer, they are untied in the merged model.

    Args:
        source (`str`):
            Folder or hub id of the adapter.
        output_dir (`str`):
            Folder to write; it appears once it is complete.
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
        raise ConfigError(f"`{source}` is a full model, so there is nothing to merge. Use it as it is.")
    merged = load_merged(source, "auto", trust_remote_code, revision, dequantize)
    partial = Path(f"{output_dir}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    save_whole(merged, load_tokenizer(source, trust_remote_code=trust_remote_code, revision=revision), partial)
    if Path(source, CALIBRATION_FILE).is_file():  # merging doesn't change a score
        shutil.copy(Path(source, CALIBRATION_FILE), partial)
    shutil.rmtree(output_dir, ignore_errors=True)
    partial.rename(output_dir)


def save_whole(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Write a full model, made of others, with the tokens that pad and end its texts, and its tokenizer."""
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if model.can_generate():  # an adapter's folder has no generation_config; a trained full model's lists them
        model.generation_config.eos_token_id = end_tokens(tokenizer) or None
    model.save_pretrained(folder)
    (processor_of(tokenizer) or tokenizer).save_pretrained(folder)
