"""
Weighted averages of the weights of models that were trained from one start: model soups (arXiv 2203.05482), of
policies trained on different rewards (rewarded soups, 2306.04488), and of reward models (WARM, 2401.12187).
"""

import copy
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftConfig
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from rlhf_trl.data.multimodal import processor_of
from rlhf_trl.hints import count_of
from rlhf_trl.models.adapters import adapter_config, adapter_weights, base_path, changes_base
from rlhf_trl.models.fingerprints import tokenizer_fingerprint
from rlhf_trl.models.heads import adapter_head_names
from rlhf_trl.models.lineage import start_problem
from rlhf_trl.models.loading import load_full, model_config, task_type
from rlhf_trl.models.merging import load_merged, save_whole
from rlhf_trl.models.precision import dtype_name
from rlhf_trl.models.quantization import trained_quantization
from rlhf_trl.models.sizes import empty_model
from rlhf_trl.models.tokenizers import load_tokenizer
from rlhf_trl.terminal import say

# Options of a LoRA adapter that make its layers' outputs depend on more than the base and the product B A
MORE_THAN_DELTAS = (
    *("use_dora", "lora_bias", "trainable_token_indices", "layer_replication", "target_parameters", "use_qalora"),
    *("use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config"),
)
# Name of a matrix of LoRA: of which layer, and which of the two
MATRIX = re.compile(r"(?:base_model\.model\.)?(?P<layer>.+)\.lora_(?:embedding_)?(?P<matrix>[AB])(?:\.weight)?")
# Options in which two adapters that are concatenated must be alike
ALIKE = ("modules_to_save", "fan_in_fan_out", "layers_to_transform", "layers_pattern", "exclude_modules")
# Keys of a model's config that its weights have nothing to do with, or that are compared by themselves
NOT_COMPARED = {
    *("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "tie_word_embeddings"),
    *("use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id", "num_labels"),
    *("problem_type", "quantization_config", "return_dict", "output_hidden_states", "name_or_path"),
}


def soup_problem(paths: Mapping[str, str], assume_shared_start: bool, trust_remote_code: bool = False) -> str | None:
    """
    Return why the average of several models, by name, would be no model; `None` where it would be one.

    Args:
        paths (`Mapping[str, str]`): folders or hub ids, by name.
        assume_shared_start (`bool`): whether to take a shared start for granted.
        trust_remote_code (`bool`): as in `from_pretrained`.
    """
    if len(paths) < 2:
        return f"A soup is of two models or more, and `stage.models` names {len(paths)}. Name another one"
    (first, path), *others = paths.items()
    tasks = {name: task_type(each, trust_remote_code) for name, each in paths.items()}
    if len(set(tasks.values())) > 1:
        kinds = {"SEQ_CLS": "a reward model", "CAUSAL_LM": "a policy"}
        told = ", ".join(f"`{name}` is {kinds[task]}" for name, task in tasks.items())
        return f"{told}. Average policies with policies, and reward models with reward models"
    for name, each in paths.items():
        if trained_in := getattr(_config(each, trust_remote_code), "quantization_config", None):
            method = getattr(trained_in, "quant_method", None) or dict(trained_in).get("quant_method")
            return f"The files of `{name}` (`{each}`) are quantized ({method}). Give the model with its full weights"
    tokenizer = tokenizer_fingerprint(load_tokenizer(path, trust_remote_code=trust_remote_code))
    for name, each in others:
        if difference := _difference(path, each, tasks[first], trust_remote_code):
            return f"`{first}` and `{name}` are no models of one architecture: {difference}. Average models of one"
        if tokenizer_fingerprint(load_tokenizer(each, trust_remote_code=trust_remote_code)) != tokenizer:
            return (
                f"`{first}` and `{name}` have different tokenizers (vocabulary, special tokens or chat template). "
                "Average models with one tokenizer"
            )
    return None if assume_shared_start else _not_shared(paths)


def _not_shared(paths: Mapping[str, str]) -> str | None:
    problem = start_problem(paths)
    names = " and ".join(f"`{name}`" for name in paths)
    return f"{names} don't share the weights that they were trained from: {problem}" if problem else None


def _config(path: str, trust_remote_code: bool) -> PreTrainedConfig:
    adapter = adapter_config(path)
    return model_config(path if adapter is None else base_path(path, adapter), trust_remote_code)


def _difference(one: str, other: str, task: str, trust_remote_code: bool) -> str | None:
    """Return in what the architectures of two models differ, `None` where they don't."""
    here, there = (_compared(_config(path, trust_remote_code).to_dict()) for path in (one, other))
    for key in sorted(here.keys() | there.keys()):
        if here.get(key) != there.get(key):
            return f"`{key}` of their configs is {here.get(key)} and {there.get(key)}"
    if task == "SEQ_CLS" and (heads := _heads(one, trust_remote_code)) != (others := _heads(other, trust_remote_code)):
        return f"their heads are {heads} and {others}"
    if task == "SEQ_CLS":
        return None  # whose number of heads an adapter's base doesn't know
    shapes = [
        {name: tuple(tensor.shape) for name, tensor in empty_model(path, task, trust_remote_code).state_dict().items()}
        for path in (one, other)
    ]
    odd = sorted(name for name in shapes[0].keys() | shapes[1].keys() if shapes[0].get(name) != shapes[1].get(name))
    return f"{count_of(len(odd), 'weight')} of other shapes, such as `{odd[0]}`" if odd else None


def _compared(config: dict[str, Any]) -> dict[str, Any]:
    """Return what counts of a config, and of those inside of it."""
    kept = {key: value for key, value in config.items() if key not in NOT_COMPARED}
    return {key: _compared(value) if isinstance(value, dict) else value for key, value in kept.items()}


def _heads(path: str, trust_remote_code: bool) -> list[str]:
    if adapter_config(path) is not None:
        return adapter_head_names(path)
    labels = cast(dict[int, str], model_config(path, trust_remote_code).id2label)
    return ["score"] if len(labels) == 1 else [str(name) for name in labels.values()]


# ---- Adapters ----


def is_concatenable(paths: Sequence[str]) -> bool:
    """
    Return whether the soup of several models is an adapter: all are LoRA adapters on one base, which they leave as it
    is and add nothing to but products B A and, alike, layers in full.
    """
    configs = [adapter_config(path) for path in paths]
    if not all(isinstance(config, LoraConfig) for config in configs):
        return False
    loras = cast(list[LoraConfig], configs)
    bases = {(base_path(path, config), config.revision) for path, config in zip(paths, loras, strict=True)}
    alike = {tuple(str(_sorted(getattr(config, name))) for name in ALIKE) for config in loras}
    quantized = {str(trained_quantization(path)) for path in paths}
    return (
        len(bases) == len(alike) == len(quantized) == 1
        and all(config.bias == "none" and not changes_base(config) for config in loras)
        and not any(getattr(config, name, None) for config in loras for name in MORE_THAN_DELTAS)
    )


def _have_only_deltas(weights: Sequence[dict[str, Tensor]]) -> bool:
    """Return whether adapters have matrices A and B, and besides them all the same layers."""
    others = {tuple(sorted(name for name in own if not MATRIX.fullmatch(name))) for own in weights}
    matrices = [each for own in weights for name, each in own.items() if MATRIX.fullmatch(name)]
    return len(others) == 1 and all(each.dim() == 2 for each in matrices)


def _sorted(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, (set, list, tuple)) else value


def concatenate_adapters(
    configs: Sequence[LoraConfig], weights: Sequence[dict[str, Tensor]], lambdas: Sequence[float]
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """
    Return the adapter whose change of each layer is the weighted sum of those of several adapters on one base.

    With rank r_i, scaling s_i and weight l_i that is sum_i l_i s_i B_i A_i, exactly: A stacks the l_i s_i A_i and B
    the B_i (PEFT's `add_weighted_adapter(combination_type="cat")`, here also for rsLoRA and with score heads). The
    mean of the A_i times that of the B_i would have the products of one adapter's A and another's B. Layers in full
    (`modules_to_save`) are averaged.

    Args:
        configs (`Sequence[peft.LoraConfig]`), weights (`Sequence[dict[str, Tensor]]`): of each adapter, see
            [`~rlhf_trl.models.adapters.adapter_weights`] and [`is_concatenable`].
        lambdas (`Sequence[float]`): weight of each adapter. Those of weight 0 are left out.

    Returns:
        `tuple[peft.LoraConfig, dict[str, Tensor]]`: config and weights, float32; its rank is the sum of the ranks.
    """
    kept = [each for each in zip(configs, weights, lambdas, strict=True) if each[2] != 0]
    names = list(dict.fromkeys(name for _, own, _ in kept for name in own))
    matrices = {name: found for name in names if (found := MATRIX.fullmatch(name))}
    stacked, mean = {}, {}
    for name in names:
        having = [(config, own[name].float(), share) for config, own, share in kept if name in own]
        if name not in matrices:
            mean[name] = torch.stack([share * each.double() for _, each, share in having]).sum(dim=0).float()
        elif matrices[name]["matrix"] == "A":
            layer = matrices[name]["layer"]
            stacked[name] = torch.cat([share * _scaling(config, layer, a) * a for config, a, share in having], dim=0)
        else:
            stacked[name] = torch.cat([b for _, b, _ in having], dim=1)
    rank = max((len(each) for name, each in stacked.items() if matrices[name]["matrix"] == "A"), default=1)
    for name, each in stacked.items():  # layers that fewer adapters change: further rows and columns of zeros
        rows = (0, 0, 0, rank - len(each)) if matrices[name]["matrix"] == "A" else (0, rank - each.shape[1])
        stacked[name] = nn.functional.pad(each, rows).contiguous()
    config = copy.deepcopy(kept[0][0])
    config.r = config.lora_alpha = rank  # a scaling of 1
    config.use_rslora, config.rank_pattern, config.alpha_pattern = False, {}, {}
    config.init_lora_weights, config.eva_config, config.inference_mode = True, None, True
    if len({str(_sorted(each.target_modules)) for each, _, _ in kept}) > 1:
        layers = sorted({found["layer"] for found in matrices.values()})
        config.target_modules, config.layers_to_transform = layers, None
    return config, stacked | mean


def _scaling(config: LoraConfig, layer: str, a: Tensor) -> float:
    """Return alpha / r (rsLoRA: alpha / sqrt(r)) of the layer that has the matrix `a`."""
    patterns = config.alpha_pattern or {}
    alpha = patterns.get(get_pattern_key(list(patterns), layer), config.lora_alpha)
    return alpha / (len(a) ** 0.5 if config.use_rslora else len(a))


# ---- Full models ----


@torch.no_grad()
def average_weights(models: Sequence[PreTrainedModel], lambdas: Sequence[float], target: PreTrainedModel) -> None:
    """
    Write the weighted mean of the weights of several models of one architecture into another one. It is summed in
    float64 and rounded once to the type of the target's.
    """
    states = [model.state_dict() for model in models]
    for name, tensor in target.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(sum(share * state[name].double() for share, state in zip(lambdas, states, strict=True)))


def write_soups(
    paths: Sequence[str], lambdas_of: Mapping[str, Sequence[float]], trust_remote_code: bool = False
) -> None:
    """
    Write soups of models that [`soup_problem`] has no problem with, each with its tokenizer.

    LoRA adapters on one base give an adapter on that base, also a quantized one. All others are averaged in full,
    adapters merged into their base first: a quantized base gives its dequantized weights, as they were in training.
    Models of several types of weights give one of the type that holds them all.

    Args:
        paths (`Sequence[str]`): folders or hub ids.
        lambdas_of (`Mapping[str, Sequence[float]]`): the weight of each model, by the folder to write.
        trust_remote_code (`bool`): as in `from_pretrained`.
    """
    tokenizer = load_tokenizer(paths[0], trust_remote_code=trust_remote_code)
    concatenable = is_concatenable(paths)
    weights = [adapter_weights(path) for path in paths] if concatenable else []
    if concatenable and _have_only_deltas(weights):
        configs = [cast(LoraConfig, adapter_config(path)) for path in paths]
        for folder, lambdas in lambdas_of.items():
            config, state = concatenate_adapters(configs, weights, lambdas)
            config.base_model_name_or_path = base_path(paths[0], cast(PeftConfig, adapter_config(paths[0])))
            Path(folder).mkdir(parents=True, exist_ok=True)
            save_file(state, Path(folder, "adapter_model.safetensors"), metadata={"format": "pt"})
            config.save_pretrained(folder)
            (processor_of(tokenizer) or tokenizer).save_pretrained(folder)
        return
    models = [_whole(path, trust_remote_code, "float32") for path in paths]
    target = _whole(paths[_untied(models)], trust_remote_code, "auto")
    types = {path: _type(path, model, trust_remote_code) for path, model in zip(paths, models, strict=True)}
    if len(set(types.values())) > 1:
        nn.Module.to(target, functools.reduce(torch.promote_types, types.values()))  # in place
        told = ", ".join(f"`{path}` {dtype_name(dtype)}" for path, dtype in types.items())
        say(f"The models have weights of several types ({told}): their soup is {dtype_name(target.dtype)}.")
    for folder, lambdas in lambdas_of.items():
        average_weights(models, lambdas, target)
        save_whole(target, tokenizer, folder)


def _untied(models: Sequence[PreTrainedModel]) -> int:
    """Return the index of a model with an output layer of its own where there is one: the mean has one, too."""
    ends = [(model.get_input_embeddings(), model.get_output_embeddings()) for model in models]
    return next((i for i, (first, last) in enumerate(ends) if last is not None and last.weight is not first.weight), 0)


def _type(path: str, model: PreTrainedModel, trust_remote_code: bool) -> torch.dtype:
    """Return the type of a model's weights; of an adapter, which `model` is merged from, that of its base's."""
    recorded = None if adapter_config(path) is None else _config(path, trust_remote_code).dtype
    return recorded if isinstance(recorded, torch.dtype) else model.dtype


def _whole(path: str, trust_remote_code: bool, adapter_dtype: str) -> PreTrainedModel:
    """Return a full model as it was saved, or an adapter merged into its base in another type."""
    if adapter_config(path) is not None:
        return load_merged(path, adapter_dtype, trust_remote_code)
    return load_full(path, task_type(path, trust_remote_code), trust_remote_code, dtype="auto")
