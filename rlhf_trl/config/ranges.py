"""
Ranges of options: their notation, and those of the arguments of TRL, PEFT and transformers. Imports nothing heavy.

The ranges of our own classes stand beside them, in the module `options` of their folder (`rlhf_trl.ppo.options`, ...),
which imports no torch, so that the command line, the dry run and the classes themselves allow the same values. A rule
is `bool`, `text`, the choices `a|b|c` (`true` and `false` may be among them), or an interval of numbers in
mathematical notation, `(0, inf)` or `[0, 1]`, with `int` before it for whole numbers only; `?` at its end allows null.
NaN and infinity are in none.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from rlhf_trl.errors import ConfigError
from rlhf_trl.hints import did_you_mean

NUMBER = "(-inf, inf)"
POSITIVE, NONNEGATIVE, COUNT, SHARE = "(0, inf)", "[0, inf)", "int [1, inf)", "[0, 1]"
SEED = "int [0, 4294967295]"  # NumPy's
MAX_STEPS = "int -1 or [1, inf)"
INTERVAL = re.compile(r"(int )?(-1 or )?([(\[])(\S+), (\S+)([)\]])")

TRAINING = {
    "learning_rate": NONNEGATIVE,
    "weight_decay": NONNEGATIVE,
    "adam_beta1": "[0, 1)",
    "adam_beta2": "[0, 1)",
    "adam_epsilon": POSITIVE,
    "max_grad_norm": NONNEGATIVE,
    "num_train_epochs": POSITIVE,
    "max_steps": MAX_STEPS,
    "warmup_steps": NONNEGATIVE,
    "per_device_train_batch_size": COUNT,
    "per_device_eval_batch_size": COUNT,
    "gradient_accumulation_steps": COUNT,
    "eval_accumulation_steps": f"{COUNT}?",
    "logging_steps": POSITIVE,
    "eval_steps": f"{POSITIVE}?",
    "save_steps": POSITIVE,
    "save_total_limit": f"{COUNT}?",
    "seed": SEED,
    "data_seed": f"{SEED}?",
    "dataloader_num_workers": "int [0, inf)",
    "label_smoothing_factor": SHARE,
    "neftune_noise_alpha": f"{NONNEGATIVE}?",
}
ROLLOUTS = {
    "beta": NONNEGATIVE,
    "temperature": POSITIVE,
    "top_p": "(0, 1]",
    "top_k": "int [0, inf)?",
    "min_p": f"{SHARE}?",
    "repetition_penalty": POSITIVE,
    "max_completion_length": f"{COUNT}?",
    "num_generations": f"{COUNT}?",
    "num_generations_eval": f"{COUNT}?",
    "num_iterations": COUNT,
    "steps_per_generation": f"{COUNT}?",
    "generation_batch_size": f"{COUNT}?",
    "epsilon": NONNEGATIVE,
    "vllm_mode": "colocate|server",
    "vllm_gpu_memory_utilization": "(0, 1]",
    "vllm_tensor_parallel_size": COUNT,
    "vllm_max_model_length": f"{COUNT}?",
    "vllm_server_port": "int [1, 65535]",
    "vllm_group_port": "int [1, 65535]",
    "vllm_server_timeout": NONNEGATIVE,
}
GRPO = ROLLOUTS | {
    "epsilon_high": f"{NONNEGATIVE}?",
    "delta": f"{POSITIVE}?",
    "vllm_importance_sampling_mode": "token_truncate|token_mask|sequence_truncate|sequence_mask",
    "vllm_importance_sampling_clip_max": f"{POSITIVE}?",
    "vllm_importance_sampling_clip_min": f"{NONNEGATIVE}?",
}
MAX_LENGTH = {"max_length": f"{COUNT}?"}
DPO_LOSSES = (
    "sigmoid|hinge|ipo|exo_pair|nca_pair|robust|bco_pair|sppo_hard|aot|aot_unpaired|apo_zero|apo_down|discopop|sft|"
    "sigmoid_norm"
)
GRPO_LOSSES = "grpo|bnpo|dr_grpo|dapo|luspo|cispo|sapo|vespo"

# By the dot path of a `_target_`
RULES: dict[str, dict[str, str]] = {
    "trl.SFTConfig": TRAINING | MAX_LENGTH | {"loss_type": "nll|dft"},
    "trl.DPOConfig": TRAINING
    | MAX_LENGTH
    | {"beta": POSITIVE, "label_smoothing": "[0, 0.5)", "loss_type": DPO_LOSSES},
    "trl.experimental.orpo.ORPOConfig": TRAINING | MAX_LENGTH | {"beta": NONNEGATIVE},
    "trl.KTOConfig": TRAINING
    | MAX_LENGTH
    | {
        "beta": POSITIVE,
        "desirable_weight": NONNEGATIVE,
        "undesirable_weight": NONNEGATIVE,
        "loss_type": "kto|apo_zero_unpaired",
    },
    "trl.RewardConfig": TRAINING | MAX_LENGTH | {"center_rewards_coefficient": f"{NONNEGATIVE}?"},
    "trl.GRPOConfig": TRAINING | GRPO | {"loss_type": GRPO_LOSSES},
    "trl.RLOOConfig": TRAINING | ROLLOUTS,
    "peft.LoraConfig": {"r": COUNT, "lora_alpha": POSITIVE, "lora_dropout": "[0, 1)", "bias": "none|all|lora_only"},
    "transformers.BitsAndBytesConfig": {
        "load_in_4bit": "bool",
        "load_in_8bit": "bool",
        "bnb_4bit_quant_type": "fp4|nf4",
    },
}


def problem_of(key: str, value: Any, rule: str) -> str | None:
    """Return what is wrong with the value of `key` and what to set, `None` where nothing is."""
    if value is None and rule.endswith("?"):
        return None
    rule, shown = rule.removesuffix("?"), "null" if value is None else repr(value)
    if rule == "bool":
        wrong = None if isinstance(value, bool) else f"and must be true or false. Set `{key}=true` or `{key}=false`."
    elif rule == "text":
        wrong = None if isinstance(value, str) else f"and must be a text. Set `{key}=...`."
    elif rule == "numbers":
        whole = isinstance(value, list) and all(_outside(each, NUMBER) is None for each in value)
        wrong = None if whole else f"and must be a list of numbers. Set `{key}=[1,2]`."
    elif rule[-1] not in ")]":
        choices = rule.split("|")
        given = [str(each).lower() if isinstance(each, bool) else each for each in _listed(value)]
        unknown = [each for each in given if each not in choices]
        if unknown:
            return f"`{key}` is {unknown[0]!r}. {did_you_mean(str(unknown[0]), choices)}"
        return None
    else:
        wrong = _outside(value, rule)
    return f"`{key}` is {shown}{wrong if wrong[0] == '.' else f' {wrong}'}" if wrong else None


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _outside(value: Any, rule: str) -> str | None:
    interval = INTERVAL.fullmatch(rule)
    assert interval, rule
    whole, unset, opens, low, high, closes = interval.groups()
    words = _words(opens, low, high, closes) + (", or to -1 for no limit" if unset else "")
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        return f"and must be {'an integer' if whole else 'a number'}. Set it {words}."
    low, high = float(low), float(high)
    above = value > low or (opens == "[" and value == low)
    below = value < high or (closes == "]" and value == high)
    if (math.isfinite(value) and above and below) or (unset and value == -1):
        return None
    return f". Set it {words}." if math.isfinite(value) else f". Set it to a finite number{_and(words)}."


def _words(opens: str, low: str, high: str, closes: str) -> str:
    if high == "inf":
        return "to a number" if low == "-inf" else f"above {low}" if opens == "(" else f"to {low} or more"
    start = f"above {low} and" if opens == "(" else f"from {low}"
    return f"to a number {start} {'to' if closes == ']' else 'to below'} {high}".replace("and to", "and up to")


def _and(words: str) -> str:
    return "" if words == "to a number" else f", {words.removeprefix('to ').removeprefix('a number ')}"


def check_values(
    rules: Mapping[str, str], values: Mapping[str, Any], prefix: str = "", error: type[ValueError] = ConfigError
) -> None:
    """
    Raise an error for values that their rules don't allow.

    Args:
        rules (`Mapping[str, str]`): by argument.
        values (`Mapping[str, Any]`): by argument; those without a rule are skipped.
        prefix (`str`): key of the arguments in the config, for the message, with a dot at the end.
        error (`type`): the exception to raise.

    Raises:
        `error`: with every problem.
    """
    problems = [
        problem
        for name, rule in rules.items()
        if name in values and (problem := problem_of(f"{prefix}{name}", values[name], rule))
    ]
    if problems:
        raise error(str(ConfigError.join(problems)))
