"""Rules of the options of rewards, their combination and their normalization. Imports no torch."""

import os
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from rlhf_trl.hints import did_you_mean


def normalizer_problem(args: Mapping[str, Any]) -> str | None:
    """What in a trainer's arguments would cancel a reward normalizer, and what to set; `None` where nothing does."""
    if args.get("scale_rewards") in ("group", "batch", True):
        cause, way = f"scale_rewards={args['scale_rewards']}", "scale_rewards=none"
        what = "divides the advantages by the std of their rewards, whatever scale these have"
    elif args.get("multi_objective_aggregation") == "normalize_then_sum":
        cause, way = "multi_objective_aggregation=normalize_then_sum", "multi_objective_aggregation=sum_then_normalize"
        what = "normalizes every reward function over a prompt's completions"
    elif args.get("normalize_advantages") and args.get("beta") == 0:
        cause, way = "normalize_advantages=true", "normalize_advantages=false"
        what = "with `stage.args.beta=0` brings advantages to std 1, whatever scale the rewards have"
    else:
        return None
    return (
        f"A reward normalizer would be cancelled: `stage.args.{cause}` {what}. Set `stage.args.{way}`, or type "
        "`reward_norm=none`."
    )


ENSEMBLES = ("mean", "min", "mean_minus_std")


def http_problems(key: str, options: Mapping[str, Any]) -> list[str]:
    """What is wrong with the options of a `HttpReward` that the config has at `key`, and what to type."""
    url, token, columns, problems = options["url"], options.get("token_env"), options.get("columns"), []
    if url is not None and not _is_address(str(url)):
        problems.append(f"`{key}.url` is {url!r}. Give the whole address: `{key}.url=http://HOST:PORT/score`.")
    if columns and (isinstance(columns, str) or not all(isinstance(name, str) for name in columns)):
        problems.append(
            f"`{key}.columns` is {columns!r} and must be a list of names. Type `'{key}.columns=[answer]'`."
        )
    if token is not None and token not in os.environ:
        problems.append(
            f"`{key}.token_env` names the environment variable `{token}`, which is not set. Type "
            f"`export {token}=...`, or `{key}.token_env=null`."
        )
    return problems


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port beyond 65535, or none that is a number
        return False


def ensemble_problems(key: str, options: Mapping[str, Any], single: str | None = None) -> list[str]:
    """
    What is wrong with how a reward at `key` takes the scores of an ensemble, and what to type.

    Args:
        single (`str`, *optional*): where the reward model is, if it is no ensemble.
    """
    kind = options["ensemble"]
    if kind not in ENSEMBLES:
        return [f"`{key}.ensemble` is {kind!r}. Use one of: {', '.join(ENSEMBLES)}."]
    if kind != "mean" and single is not None:
        return [
            f"`{key}.ensemble` is `{kind}`, and `{single}` is a single reward model. Leave it out, or train an "
            "ensemble: `stage=reward adapter=lora stage.members=4`."
        ]
    return []


def combination_problem(args: Mapping[str, Any]) -> str | None:
    """What in a trainer's arguments leaves no single score to combine rewards to; `None` where nothing does."""
    if args.get("multi_objective_aggregation") != "normalize_then_sum":
        return None
    return (
        "`stage.args.multi_objective_aggregation=normalize_then_sum` normalizes every reward function over a prompt's "
        "completions and sums them. Set it to `sum_then_normalize`, or type `combine=sum`."
    )


def threshold_problem(constraints: Mapping[str, float] | None, names: Sequence[str]) -> str | None:
    """What is wrong with the constraints on rewards of these names, and what to type; `None` if nothing."""
    example = f"Type for example `'combine.constraints={{{names[-1] if names else 'NAME'}: 0.5}}'`."
    if constraints and not isinstance(constraints, Mapping):
        return f"`combine.constraints` is {constraints!r} and must name rewards. {example}"
    if not constraints:
        return f"`combine=threshold` needs to know which rewards are constraints, and how high each must be. {example}"
    for name, least in constraints.items():
        if name not in names:
            return f"`combine.constraints` names `{name}`, and there is no such reward. {did_you_mean(name, names)}"
        if isinstance(least, bool) or not isinstance(least, int | float):
            return f"`combine.constraints.{name}` is {least!r} and must be a number. {example}"
    if len(constraints) == len(names):
        return (
            "`combine.constraints` names all rewards, so there is none that counts once they are satisfied. Add one "
            "to `reward`, such as `'reward=[demo,format]'`, or take one out of `combine.constraints`."
        )
    return None
