"""
Maximization of rewards subject to constraints on the means of others (`combine=lagrange`), by the method of Lagrange
multipliers as in Safe RLHF (arXiv 2310.12773, section 3.2).

N completions, F reward functions, C constraints; NaN in rewards is one that doesn't apply.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_trl.config.ranges import check_values
from rlhf_trl.errors import ConfigError
from rlhf_trl.rewards.combine import without_reward
from rlhf_trl.rewards.constraints import Bound, constraint_problems, lagrange_problems, multiplier_problem
from rlhf_trl.rewards.options import LAGRANGE


class Lagrange:
    """
    Combination of rewards, see `rlhf_trl.rewards.combine`: maximize R subject to E[c] <= 0 for every cost c.

    A constraint bounds the mean of a reward r, raw and not normalized: `">= b"` or `"<= b"`. Its cost is
    c = |w| (b - r) or |w| (r - b), with the reward's weight w as scale; R is the weighted sum of the other rewards.
    The score of a completion is

        (R - sum_c lambda_c c) / (1 + sum_c lambda_c)

    with a multiplier lambda_c >= 0 for each constraint. After each rollout, before the policy learns from it, a step
    of gradient ascent on the logarithm moves each multiplier by the mean cost of the newest completions:

        log lambda <- min(log lambda + lambda_lr * mean(c) * lambda, log lambda_max)

    PPO has a value for R and for each cost, and combines their advantages as above.

    Args:
        constraints (`Mapping[str, str]`): bound of each constraint, by the name of the reward.
        lambda_init (`float`, defaults to `1.0`): multipliers of the first rollout.
        lambda_lr (`float`, defaults to `0.1`): learning rate of the logarithms, per rollout.
        lambda_max (`float`, defaults to `5.0`): upper limit of the multipliers.
        delay (`int`, defaults to `0`): rollouts at the start that don't move the multipliers.
        window (`int`, defaults to `128`): newest completions, of all ranks, whose mean cost moves a multiplier; at
            least those of the rollout.

    Raises:
        ConfigError: at a malformed bound, a value out of range, or a `lambda_init` above `lambda_max`.
    """

    def __init__(
        self,
        constraints: Mapping[str, str] | None,
        lambda_init: float = 1.0,
        lambda_lr: float = 0.1,
        lambda_max: float = 5.0,
        delay: int = 0,
        window: int = 128,
    ):
        given = {"lambda_init": lambda_init, "lambda_lr": lambda_lr, "lambda_max": lambda_max}
        check_values(LAGRANGE, given | {"delay": delay, "window": window}, "combine.")
        problem = multiplier_problem(lambda_init, lambda_max)
        if problems := constraint_problems(constraints, list(constraints or ())) + ([problem] if problem else []):
            raise ConfigError.join(problems)
        assert constraints is not None
        self.bounds = {name: Bound.parse(text) for name, text in constraints.items()}
        self.lambda_lr, self.lambda_max, self.delay, self.window = lambda_lr, lambda_max, delay, window
        self.log_lambda = dict.fromkeys(self.bounds, math.log(lambda_init))
        self.rollouts = 0  # seen so far
        self.costs: dict[str, list[float]] = {name: [] for name in self.bounds}  # of the newest completions

    @property
    def multipliers(self) -> dict[str, float]:
        """Multiplier of each constraint."""
        return {name: math.exp(value) for name, value in self.log_lambda.items()}

    def __call__(self, values: Tensor, raw: Tensor, weights: Tensor, names: Sequence[str]) -> Tensor:
        """
        Return the scores, shape (N,); see `rlhf_trl.rewards.combine`.

        Raises:
            ConfigError: if a constraint names no reward, or one of weight 0, or every reward is a constraint.
        """
        scores = self.weigh(self.signals(values, raw, weights, names))
        return scores.masked_fill(without_reward(values, weights), torch.nan)

    def signals(self, values: Tensor, raw: Tensor, weights: Tensor, names: Sequence[str]) -> Tensor:
        """
        Return R and the cost of each constraint, shape (N, 1 + C). A reward that doesn't apply adds 0 to R, and its
        cost is 0, that of a completion at the bound.

        Args:
            values (`Tensor` of shape (N, F)): rewards on the scale that is learned from; R is on it.
            raw (`Tensor` of shape (N, F)): rewards as the functions gave them; costs are on their scale.
            weights (`Tensor` of shape (F,)), names (`Sequence[str]`): weight and name of each function.
        """
        if problems := lagrange_problems(self._texts(), dict(zip(names, weights.tolist(), strict=True))):
            raise ConfigError.join(problems)
        others = [column for column, name in enumerate(names) if name not in self.bounds]
        signals = [(values[:, others] * weights[others]).nansum(dim=1)]
        for name, bound in self.bounds.items():
            column = names.index(name)
            cost = weights[column].abs() * bound.excess(raw[:, column])
            signals.append(cost.masked_fill(cost.isnan(), 0.0))  # an infinite one stays, and guards see it
        return torch.stack(signals, dim=1)

    def weigh(self, signals: Tensor) -> Tensor:
        """Return (R - sum_c lambda_c c) / (1 + sum_c lambda_c) of signals, or of their advantages: (..., 1 + C)."""
        multipliers = signals.new_tensor(list(self.multipliers.values()))
        return (signals[..., 0] - (signals[..., 1:] * multipliers).sum(dim=-1)) / (1 + multipliers.sum())

    def update(self, raw: Tensor, weights: Tensor, names: Sequence[str], is_warmup: bool = False) -> None:
        """
        Move the multipliers by the costs of a rollout, the same on every rank.

        Args:
            raw (`Tensor` of shape (N, F)), weights (`Tensor` of shape (F,)), names (`Sequence[str]`): see
                [`Lagrange.signals`]; NaN and infinite rewards are skipped.
            is_warmup (`bool`, defaults to `False`): whether the policy doesn't learn from the rollout. Then the costs
                are kept and the multipliers stay: no price changes what it does.
        """
        self.rollouts += 1
        for name, bound in self.bounds.items():
            column = names.index(name)
            rewards = raw[:, column].double()
            costs = (weights[column].double().abs() * bound.excess(rewards[rewards.isfinite()])).tolist()
            kept = max(self.window, len(costs))
            self.costs[name] = [*self.costs[name], *costs][-kept:]
            if self.rollouts > self.delay and self.costs[name] and not is_warmup:
                step = self.lambda_lr * self.mean_cost(name) * math.exp(self.log_lambda[name])
                self.log_lambda[name] = min(self.log_lambda[name] + step, math.log(self.lambda_max))

    def mean_cost(self, name: str) -> float:
        """Return the mean cost of a constraint over the newest completions, above 0 where it is violated."""
        # Exact, so that the order in which ranks are gathered doesn't matter
        return math.fsum(self.costs[name]) / max(len(self.costs[name]), 1)

    def measures(self, raw: Tensor, names: Sequence[str]) -> dict[str, dict[str, float]]:
        """
        Return `mean`, the raw mean, and `violation_rate`, the share of single completions that violate the bound, of
        each constraint with a reward among `raw` (N, F).
        """
        found = {}
        for name, bound in self.bounds.items():
            rewards = raw[:, names.index(name)]
            rewards = rewards[rewards.isfinite()]
            if len(rewards):
                rate = (bound.excess(rewards) > 0).double().mean().item()
                found[name] = {"mean": rewards.double().mean().item(), "violation_rate": rate}
        return found

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"log_lambda": self.log_lambda, "rollouts": self.rollouts, "costs": self.costs}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """
        Continue from what [`Lagrange.state`] returned.

        Raises:
            ConfigError: if it is of other constraints.
        """
        if list(state["log_lambda"]) != list(self.bounds):
            raise ConfigError(
                f"The checkpoint has the constraints {list(state['log_lambda'])}, and `combine.constraints` has "
                f"{list(self.bounds)}. Resume with those that the run began with."
            )
        self.log_lambda, self.rollouts = dict(state["log_lambda"]), state["rollouts"]
        self.costs = {name: list(costs) for name, costs in state["costs"].items()}

    def _texts(self) -> dict[str, str]:
        return {name: str(bound) for name, bound in self.bounds.items()}
