"""Rewards: options that can't be, combinations of several, ensembles, and what is served."""

import os
from collections.abc import Sequence
from typing import Any

from rlhf_trl.checks.places import model_folder
from rlhf_trl.config.values import at, section
from rlhf_trl.rewards.options import combination_problem, ensemble_problems, http_problems, threshold_problem
from rlhf_trl.runs.paths import ENSEMBLE_FILE


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
    if at(stage, "run._target_") == "rlhf_trl.stages.serve_reward.serve_reward" and len(rewards) != 1:
        problems.append(
            f"`stage=serve_reward` serves one reward, and `reward` has {len(rewards)} "
            f"({', '.join(rewards) or 'none'}). Start a server for each, with a `stage.port` of its own."
        )
    if at(stage, "run._target_") == "rlhf_trl.stages.serve_reward.serve_reward":
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
