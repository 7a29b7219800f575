"""Checks of rewards: their options, combinations, ensembles, and what `stage=serve_reward` serves."""

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_trl.checks.paths import model_folder
from rlhf_trl.config.values import at, section
from rlhf_trl.report.options import front_problems
from rlhf_trl.rewards.conditions import condition_problem
from rlhf_trl.rewards.constraints import constraint_problems, lagrange_problems, multiplier_problem
from rlhf_trl.rewards.options import (
    combination_problem,
    ensemble_problem,
    floor_problem,
    http_problems,
    product_problem,
    scaling_problem,
    server_problems,
    threshold_problem,
)
from rlhf_trl.runs.record import ENSEMBLE_FILE

MODPO_CONFIG = "rlhf_trl.trainers.modpo.MODPOConfig"
ONLINE_DPO_CONFIG = "rlhf_trl.trainers.online_dpo.OnlineDPOConfig"


def reward_problems(values: dict[str, Any]) -> list[str]:
    """Return the problems of the group `reward` and of the options that belong to it, or none."""
    rewards = {name: node for name, node in section(values, "reward").items() if isinstance(node, dict)}
    weights = {name: node.get("weight", 1) for name, node in rewards.items()}
    problems: list[str | None] = [
        *_members(values),
        *_without_policy(values, rewards),
        *_reported_constraints(values, list(rewards)),
        *_front(values, weights),
        *_combination(values, weights),
    ]
    for name, node in rewards.items():
        problems.append(condition_problem(node.get("when"), f"reward.{name}.when"))
        if node.get("_target_") == "rlhf_trl.rewards.HttpReward":
            problems += http_problems(f"reward.{name}", node)
        if "ensemble" in node:
            folder = model_folder(node, values)
            single = folder.is_dir() and not (folder / ENSEMBLE_FILE).is_file()
            problems.append(ensemble_problem(f"reward.{name}", node["ensemble"], str(folder) if single else None))
    return [problem for problem in problems if problem]


def _members(values: dict[str, Any]) -> list[str]:
    """Return the problems of an ensemble of reward models that is to be trained."""
    members, peft, problems = section(values, "stage").get("members", 1), section(values, "adapter.peft"), []
    if not isinstance(members, int):
        return []  # another check names it
    if members > 1 and not peft:
        problems.append(
            f"`stage.members={members}` trains adapters that share a base, and `adapter=none` trains that base. Set "
            "`adapter=lora` as well."
        )
    elif members > 1 and values.get("merge"):
        problems.append(
            f"`merge=true` would write {members} full models. Remove it; `stage=merge "
            f"model.run={values.get('run_name')}/member_0` merges one."
        )
    return problems


def _without_policy(values: dict[str, Any], rewards: dict[str, dict[str, Any]]) -> list[str]:
    """Return the problems of rewards in a stage that trains no policy, and of those that are to be served."""
    stage, problems = section(values, "stage"), []
    if at(stage, "run._target_") == "rlhf_trl.stages.serve_reward.serve_reward" and len(rewards) != 1:
        problems.append(
            f"`stage=serve_reward` serves one reward, and `reward` has {len(rewards)} "
            f"({', '.join(rewards) or 'none'}). Start a server for each, with a `stage.port` of its own."
        )
    if at(stage, "run._target_") == "rlhf_trl.stages.serve_reward.serve_reward":
        problems += server_problems(stage)
        problems += [
            f"`reward.{name}.when` is about columns of the data, and the server scores what it is sent. Set "
            "`reward.http.when` where the server is asked."
            for name, node in rewards.items()
            if node.get("when") is not None
        ]
    adapters = any(str(node.get("_target_")).endswith(".AdapterReward") for node in rewards.values())
    if adapters and at(stage, "args._target_") == MODPO_CONFIG:
        problems.append(
            "`reward=adapter` scores on the base of a policy that is trained, and margin rewards are scored before "
            "there is one. Set `reward=model`, which loads the adapter with its base."
        )
    elif adapters and not stage.get("args"):
        problems.append(
            f"`reward=adapter` scores on the base of a policy that is trained, and `stage={stage.get('name')}` trains "
            "none. Set `reward=model`, which loads the adapter with its base."
        )
    return problems


def _front(values: dict[str, Any], weights: Mapping[str, Any]) -> list[str]:
    """Return the problems of the front of `stage=evaluate`."""
    stage = section(values, "stage")
    if "reference_point" not in stage:
        return []
    counted = [name for name, weight in weights.items() if weight != 0]
    return front_problems(stage.get("front"), stage["reference_point"], stage.get("choose"), list(weights), counted)


def _combination(values: dict[str, Any], weights: Mapping[str, Any]) -> list[str | None]:
    """Return the problems of the group `combine`; `None` for a rule that is kept."""
    kind = str(at(values, "combine._target_") or "weighted_sum").rsplit(".", 1)[-1]
    normalizer = str(at(values, "reward_norm._target_") or "RewardNorm").rsplit(".", 1)[-1]
    args = section(values, "stage.args")
    problems = [scaling_problem(args) if kind == "weighted_sum" else combination_problem(args)]
    if kind == "Lagrange":
        problems += _lagrange(values, weights)
    if kind == "threshold":
        problems.append(threshold_problem(at(values, "combine.constraints"), list(weights)))
        problems.append(floor_problem(at(values, "combine.floor")))
    if kind == "product":
        problems.append(product_problem(normalizer))
    return problems


def _reported_constraints(values: dict[str, Any], names: Sequence[str]) -> list[str]:
    """Return the problems of the constraints whose satisfaction `stage=evaluate` reports."""
    constraints = at(values, "stage.constraints")
    return [] if constraints is None else constraint_problems(constraints, names, "stage.constraints")


def _lagrange(values: dict[str, Any], weights: Mapping[str, Any]) -> list[str]:
    """Return the problems of `combine=lagrange`."""
    stage = section(values, "stage")
    if not stage.get("args"):
        way = "`combine=sum` and, to see whether bounds hold, `stage.constraints`" if "constraints" in stage else ""
        return [
            f"`combine=lagrange` has multipliers that a training moves, and `stage={stage.get('name')}` trains "
            f"nothing. Set {way or '`combine=sum`'}."
        ]
    if at(values, "stage.args._target_") == ONLINE_DPO_CONFIG:
        return [
            "`combine=lagrange` weighs rewards in the advantages of a rollout, and online DPO has none. Set "
            "`combine=threshold`, in which bounds decide a pair first, or `stage=ppo`, `grpo` or `rloo`."
        ]
    problem = multiplier_problem(at(values, "combine.lambda_init"), at(values, "combine.lambda_max"))
    return lagrange_problems(at(values, "combine.constraints"), weights) + ([problem] if problem else [])
