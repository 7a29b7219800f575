"""
Rules of the options of rewards: ranges, servers, ensembles, combinations.

The classes call them when they are made, and `rlhf_trl.checks` before anything loads, so this module imports no torch.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from rlhf_trl.config.ranges import COUNT, NONNEGATIVE, NUMBER, POSITIVE
from rlhf_trl.hints import did_you_mean

CLASSIFIER = "rlhf_trl.rewards.ClassifierReward"
REWARD = {"weight": NUMBER}
MODEL_REWARD = REWARD | {
    "batch_size": COUNT,
    "std_coef": NONNEGATIVE,
    "trust_remote_code": "bool",
    "dtype": "auto|float32|bfloat16|float16?",
}
CLASSIFIER_REWARD = REWARD | {
    "output": "logit|probability",
    "threshold": f"{NUMBER}?",
    "text": "completion|both|pair",
    "max_length": f"{COUNT}?",
    "batch_size": COUNT,
    "trust_remote_code": "bool",
    "dtype": "auto|float32|bfloat16|float16?",
}
HTTP_REWARD = REWARD | {"timeout": POSITIVE, "retries": "int [0, inf)", "backoff": NONNEGATIVE, "batch_size": COUNT}
LAGRANGE = {
    "lambda_init": POSITIVE,
    "lambda_lr": NONNEGATIVE,
    "lambda_max": POSITIVE,
    "delay": "int [0, inf)",
    "window": COUNT,
}
RULES = {
    "rlhf_trl.rewards.lagrange.Lagrange": LAGRANGE,
    "rlhf_trl.rewards.FunctionReward": REWARD,
    "rlhf_trl.rewards.ModelReward": MODEL_REWARD,
    "rlhf_trl.rewards.AdapterReward": MODEL_REWARD,
    CLASSIFIER: CLASSIFIER_REWARD,
    "rlhf_trl.rewards.HttpReward": HTTP_REWARD,
}
ENSEMBLES = ("mean", "min", "mean_minus_std", "mean_minus_var")


def http_problems(key: str, options: Mapping[str, Any]) -> list[str]:
    """
    Return the problems of the options of an [`~rlhf_trl.rewards.HttpReward`], or none.

    Args:
        key (`str`): where the config has them, such as `reward.http`.
        options (`Mapping[str, Any]`): options by name.
    """
    url, token, columns, problems = options["url"], options.get("token_env"), options.get("columns"), []
    if url is not None and not _is_address(str(url)):
        problems.append(f"`{key}.url` is {url!r}. Set the whole address: `{key}.url=http://HOST:PORT/score`.")
    if columns and (isinstance(columns, str) or not all(isinstance(name, str) for name in columns)):
        problems.append(f"`{key}.columns` is {columns!r} and must be a list of names. Set `'{key}.columns=[answer]'`.")
    if token is not None and token not in os.environ:
        problems.append(_unset_token(f"{key}.token_env", token))
    return problems


def server_problems(options: Mapping[str, Any]) -> list[str]:
    """Return the problems of the address and the token of `stage=serve_reward`, or none."""
    host, port, token, problems = options.get("host"), options.get("port"), options.get("token_env"), []
    if not isinstance(host, str) or not host:
        problems.append(f"`stage.host` is {host!r} and must be an address. Set `stage.host=127.0.0.1`.")
    if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port < 65536:
        problems.append(f"`stage.port` is {port!r} and must be an integer from 0 to 65535. Set `stage.port=8000`.")
    if not isinstance(options.get("anonymous"), bool):
        problems.append(f"`stage.anonymous` is {options.get('anonymous')!r} and must be true or false.")
    if token is not None and not os.environ.get(str(token)):
        problems.append(_unset_token("stage.token_env", token))
    return problems


def _unset_token(key: str, variable: Any) -> str:
    return (
        f"`{key}` names the environment variable `{variable}`, which is not set. Run `export {variable}=...`, or set "
        f"`{key}=null`."
    )


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port beyond 65535, or none that is a number
        return False


def ensemble_problem(key: str, ensemble: str, single: str | None = None) -> str | None:
    """
    Return the problem of how a reward combines the scores of an ensemble, `None` if there is none.

    Args:
        key (`str`): where the config has the reward, such as `reward.model`.
        ensemble (`str`): one of `ENSEMBLES`.
        single (`str`, *optional*): path of the reward model if it is no ensemble.
    """
    if ensemble not in ENSEMBLES:
        return f"`{key}.ensemble` is {ensemble!r}. Use one of: {', '.join(ENSEMBLES)}."
    if ensemble != "mean" and single is not None:
        return (
            f"`{key}.ensemble` is `{ensemble}`, and `{single}` is a single reward model. Remove the option, or train "
            "an ensemble: `stage=reward adapter=lora stage.members=4`."
        )
    return None


def combination_problem(args: Mapping[str, Any]) -> str | None:
    """Return the trainer's argument that leaves no single score to combine rewards to, `None` if there is none."""
    if args.get("multi_objective_aggregation") != "normalize_then_sum":
        return None
    return (
        "`stage.args.multi_objective_aggregation=normalize_then_sum` normalizes every reward function over a prompt's "
        "completions and sums them. Set it to `sum_then_normalize`, or set `combine=sum`."
    )


def scaling_problem(args: Mapping[str, Any]) -> str | None:
    """Return the scaling of advantages that GDPO doesn't read, `None` where it is the default or another method's."""
    if args.get("multi_objective_aggregation") != "normalize_then_sum":
        return None
    if (scaling := args.get("scale_rewards", "group")) in ("group", True):
        return None
    return (
        f"`stage.args.scale_rewards={scaling}` has no effect with "
        "`stage.args.multi_objective_aggregation=normalize_then_sum`, which scales every reward over a prompt's "
        "completions and their sum over the rollout. Remove it, or set `sum_then_normalize`."
    )


def threshold_problem(constraints: Mapping[str, float] | None, names: Sequence[str]) -> str | None:
    """Return the problem of the constraints of `combine=threshold`, `None` if there is none."""
    example = f"Set for example `'combine.constraints={{{names[-1] if names else 'NAME'}: 0.5}}'`."
    if constraints and not isinstance(constraints, Mapping):
        return f"`combine.constraints` is {constraints!r} and must name rewards. {example}"
    if not constraints:
        return f"`combine=threshold` needs to know which rewards are constraints, and how high each must be. {example}"
    for name, limit in constraints.items():
        if name not in names:
            return f"`combine.constraints` names `{name}`, and there is no such reward. {did_you_mean(name, names)}"
        if isinstance(limit, bool) or not isinstance(limit, int | float):
            return f"`combine.constraints.{name}` is {limit!r} and must be a number. {example}"
    if len(constraints) == len(names):
        return (
            "`combine.constraints` names all rewards, so there is none that counts once they are satisfied. Add one "
            "to `reward`, such as `'reward=[demo,format]'`, or remove one from `combine.constraints`."
        )
    return None


def floor_problem(floor: Any) -> str | None:
    """Return the problem of the floor of `combine=threshold`, `None` if there is none."""
    if isinstance(floor, int | float):
        return None
    return f"`combine.floor` is {floor!r} and must be a number. Set `combine.floor=0`."


def product_problem(normalizer: str) -> str | None:
    """Return the problem of `combine=product` with a normalizer, by the name of its class; `None` if there is none."""
    if normalizer == "RewardNorm":  # clips, and moves no reward below 0
        return None
    return (
        f"`combine=product` takes rewards of 0 or more, and `{normalizer}` brings about half of them below. Set "
        "`reward_norm=none`, or another `combine`."
    )
