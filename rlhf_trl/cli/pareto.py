"""Runs of `sweep=pareto`: weights over a simplex of the rewards, or bounds of constraints."""

import itertools
from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf

from rlhf_trl.config.values import at, section
from rlhf_trl.errors import ConfigError
from rlhf_trl.hints import did_you_mean
from rlhf_trl.models.options import simplex
from rlhf_trl.report.options import front_problems


def points(pareto: Mapping[str, Any], reward: Mapping[str, Any] | None) -> list[dict[str, float | str]]:
    """Return what each run sets: shares of the rewards' weights that sum to 1, or bounds, by reward."""
    if thresholds := pareto.get("thresholds"):
        return [dict(zip(thresholds, each, strict=True)) for each in itertools.product(*thresholds.values())]
    return [dict(point) for point in simplex(list(pareto.get("rewards") or reward or ()), pareto["grid"])]


def choices(pareto: Any, reward: Any) -> str:
    """Return the runs as a choice sweep of Hydra: `{gold:1.0,tokens:0.0},{gold:0.5,tokens:0.5}`."""
    found = points(*(OmegaConf.to_container(node, resolve=True) for node in (pareto, reward)))  # pyright: ignore[reportArgumentType] mappings
    texts = [
        ",".join(f"{name}:'{value}'" if isinstance(value, str) else f"{name}:{value}" for name, value in each.items())
        for each in found
    ]
    if not texts:
        raise ConfigError("`sweep=pareto` has no runs. Set `pareto.grid` or `pareto.thresholds`.")
    return ",".join(f"{{{text}}}" for text in texts)


# When the module is imported, so that the processes of Hydra's launchers have it too
OmegaConf.register_new_resolver("rlhf_trl.pareto_points", choices, replace=True)


def problems(values: dict[str, Any]) -> list[str]:
    """Return the problems of `sweep=pareto`, none for another sweep."""
    pareto, rewards = section(values, "pareto"), section(values, "reward")
    if not pareto:
        return []
    if len(rewards) < 2:
        return [
            f"`sweep=pareto` weighs two rewards or more, and `stage={at(values, 'stage.name')}` has {len(rewards)}. "
            "Set for example `'reward=[demo,tokens]'`."
        ]
    thresholds, named = pareto.get("thresholds"), pareto.get("rewards")
    own = weights(values)
    counted = [name for name in rewards if own.get(name) != 0]
    found = front_problems(
        None, pareto.get("reference_point"), pareto.get("choose"), list(rewards), counted, "pareto."
    )
    for key, names in (("thresholds", thresholds), ("rewards", named)):
        for name in names or ():
            if name not in rewards:
                found.append(f"`pareto.{key}` names the reward `{name}`. {did_you_mean(str(name), rewards)}")
    if named is not None and len(named) < 2:
        found.append(f"`pareto.rewards` names {len(named)} of the rewards, and two or more are weighed. Add one.")
    elif thresholds is None:
        grid = pareto.get("grid")
        if not isinstance(grid, list) or not all(isinstance(each, int | float) and 0 <= each <= 1 for each in grid):
            found.append(f"`pareto.grid` is {grid!r} and must be a list of shares from 0 to 1.")
        elif not simplex(list(named or rewards), grid):
            found.append(f"No {len(named or rewards)} values of `pareto.grid` sum to 1. Add 1 and 0, for example.")
        if at(values, "combine.lambda_init") is not None:
            found.append(
                "`combine=lagrange` finds the weights of its constraints itself. Set `pareto.thresholds`, the bounds "
                "of its runs, or `combine=sum`."
            )
    elif not isinstance(thresholds, dict) or not all(isinstance(each, list) and each for each in thresholds.values()):
        found.append(
            f"`pareto.thresholds` is {thresholds!r} and must hold a list of bounds for each constraint, such as "
            '`{tokens: ["<= 10", "<= 14"]}`.'
        )
    elif at(values, "combine.lambda_init") is None:
        found.append("`pareto.thresholds` are bounds of constraints. Set `combine=lagrange` as well.")
    return found


def overrides(values: dict[str, Any]) -> list[str]:
    """Return what a run of `sweep=pareto` sets of `train.py`, nothing for another sweep."""
    pareto = section(values, "pareto")
    if not pareto:
        return []
    point = pareto["point"]
    if pareto["thresholds"]:
        bounds = {**(at(values, "combine.constraints") or {}), **point}
        return ["combine.constraints={" + ", ".join(f"{name}: '{bound}'" for name, bound in bounds.items()) + "}"]
    own = weights(values)
    shares = {name: share * own.get(name, 1.0) + 0.0 for name, share in point.items()}  # no -0
    return [f"reward.{name}.weight={weight:g}" for name, weight in shares.items()]


def weights(values: dict[str, Any]) -> dict[str, float]:
    """Return the weight of each reward of a config."""
    nodes = section(values, "reward")
    found = {name: node.get("weight", 1) for name, node in nodes.items() if isinstance(node, dict)}
    return {name: float(weight) for name, weight in found.items() if isinstance(weight, int | float)}
