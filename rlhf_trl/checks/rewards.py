"""Rewards: options that can't be, combinations of several, ensembles, and what is served."""

import os
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from rlhf_trl.checks.places import ENSEMBLE_FILE, model_folder
from rlhf_trl.checks.values import at, section
from rlhf_trl.hints import did_you_mean

ENSEMBLES = ("mean", "min", "mean_minus_std")


def reward_problems(values: dict[str, Any]) -> list[str]:
    """Of the group `reward` and of what goes with it."""
    rewards = {name: node for name, node in section(values, "reward").items() if isinstance(node, dict)}
    problems = _members(values) + _without_policy(values, rewards) + _combination(values, list(rewards))
    for name, node in rewards.items():
        if node.get("_target_") == "rlhf_trl.rewards.HttpReward":
            problems += http_problems(f"reward.{name}", node)
        if "ensemble" in node:
            folder = model_folder(node, values)
            single = folder.is_dir() and not (folder / ENSEMBLE_FILE).is_file()
            problems += ensemble_problems(f"reward.{name}", node, str(folder) if single else None)
    return problems


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


def _members(values: dict[str, Any]) -> list[str]:
    """Of an ensemble of reward models that is to be trained."""
    members, peft, problems = section(values, "stage").get("members", 1), section(values, "adapter.peft"), []
    if not isinstance(members, int):
        return []  # which is said elsewhere
    if members > 1 and not peft:
        problems.append(
            f"`stage.members={members}` trains adapters that share a base, and `adapter=none` trains that base. Type "
            "`adapter=lora` as well."
        )
    elif members > 1 and values.get("merge"):
        problems.append(
            f"`merge=true` would write {members} full models. Leave it out; `stage=merge "
            f"model.run={values.get('run_name')}/member_0` merges one."
        )
    return problems


def _without_policy(values: dict[str, Any], rewards: dict[str, dict[str, Any]]) -> list[str]:
    """Of rewards in a stage that trains no policy, and of one that is to be served."""
    stage, problems = section(values, "stage"), []
    if at(stage, "run._target_") == "rlhf_trl.serve.serve_reward" and len(rewards) != 1:
        problems.append(
            f"`stage=serve_reward` serves one reward, and `reward` has {len(rewards)} "
            f"({', '.join(rewards) or 'none'}). Start a server for each, with a `stage.port` of its own."
        )
    if at(stage, "run._target_") == "rlhf_trl.serve.serve_reward":
        problems += _server(stage)
    adapters = any(str(node.get("_target_")).endswith(".AdapterReward") for node in rewards.values())
    if adapters and not stage.get("args"):
        problems.append(
            f"`reward=adapter` scores on the base of a policy that is trained, and `stage={stage.get('name')}` trains "
            "none. Type `reward=model`, which loads the adapter with its base."
        )
    return problems


def _server(stage: dict[str, Any]) -> list[str]:
    """Of the address and the token of a server."""
    host, port, token, problems = stage.get("host"), stage.get("port"), stage.get("token_env"), []
    if not isinstance(host, str) or not host:
        problems.append(f"`stage.host` is {host!r} and must be an address. Type `stage.host=127.0.0.1`.")
    if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port < 65536:
        problems.append(f"`stage.port` is {port!r} and must be an integer from 0 to 65535. Type `stage.port=8000`.")
    if not isinstance(stage.get("anonymous"), bool):
        problems.append(f"`stage.anonymous` is {stage.get('anonymous')!r} and must be true or false.")
    if token is not None and not os.environ.get(str(token)):
        problems.append(
            f"`stage.token_env` names the environment variable `{token}`, which is not set. Type "
            f"`export {token}=...`, or `stage.token_env=null`."
        )
    return problems


def _combination(values: dict[str, Any], names: Sequence[str]) -> list[str]:
    kind = str(at(values, "combine._target_") or "weighted_sum").rsplit(".", 1)[-1]
    problems = []
    if kind != "weighted_sum" and (problem := combination_problem(section(values, "stage.args"))):
        problems.append(problem)
    if kind == "threshold":
        problems += [problem] if (problem := threshold_problem(at(values, "combine.constraints"), names)) else []
        if not isinstance(floor := at(values, "combine.floor"), int | float):
            problems.append(f"`combine.floor` is {floor!r} and must be a number. Type `combine.floor=0`.")
    normalizer = str(at(values, "reward_norm._target_") or "RewardNorm").rsplit(".", 1)[-1]
    if kind == "product" and normalizer != "RewardNorm":
        problems.append(
            f"`combine=product` takes rewards of 0 or more, and `{normalizer}` brings about half of them below. Type "
            "`reward_norm=none`, or another `combine`."
        )
    return problems


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
