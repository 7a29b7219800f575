"""Calibration of reward models: mean and standard deviation of their scores of reference answers."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from rlhf_trl.errors import ConfigError

CALIBRATION_FILE = "calibration.json"


class Moments(NamedTuple):
    """Mean and standard deviation of rewards."""

    mean: float
    std: float


@dataclass(frozen=True)
class Calibration:
    """
    Scores of reference answers by a reward model with H heads, as in the `calibration.json` beside the model.

    Attributes:
        mean, std (`Tensor` of shape `(H,)`): float64, with the unbiased std.
        heads (`list[str]`): names of the heads; empty for a model with one head.
        covariance (`Tensor` of shape `(H, H)`, *optional*): of a model with several heads.
        members (`Tensor` of shape `(members, n, H)`, *optional*): all scores by each member of an ensemble. `mean`,
            `std` and `covariance` are then those of the members' mean score.
        n (`int`, *optional*), on (`str`, *optional*): how many answers were scored, and which.
    """

    mean: Tensor
    std: Tensor
    heads: list[str]
    covariance: Tensor | None = None
    members: Tensor | None = None
    n: int | None = None
    on: str | None = None

    @classmethod
    def of(cls, scores: Tensor, heads: list[str], on: str) -> Self:
        """
        Return the calibration of one reward model.

        Args:
            scores (`Tensor` of shape `(n, H)`): scores of the reference answers, float64.
            heads (`list[str]`): names of the heads.
            on (`str`): which answers these are.
        """
        several = len(heads) > 1
        # A weighted sum of the heads has a std of its own, which follows from the covariance
        covariance = scores.T.cov() if several else None
        std = scores.std(0, unbiased=len(scores) > 1)
        return cls(scores.mean(0), std, heads if several else [], covariance, n=len(scores), on=on)

    @classmethod
    def of_ensemble(cls, members: Tensor, heads: list[str], on: str) -> Self:
        """Return the calibration of an ensemble from its members' scores, shape `(members, n, H)`; see [`of`]."""
        mean = cls.of(members.mean(dim=0), heads, on)
        return cls(mean.mean, mean.std, mean.heads, mean.covariance, members, mean.n, mean.on)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        """
        Return the calibration that `calibration.json` holds.

        Raises:
            ValueError, TypeError or KeyError: if numbers are missing or don't fit together, or a std isn't above 0.
        """
        mean, std = (torch.tensor(content[key], dtype=torch.float64).reshape(-1) for key in ("mean", "std"))
        heads, covariance, members = content.get("heads", []), None, None
        if not (len(std) == len(mean) == max(1, len(heads)) and mean.isfinite().all() and std.isfinite().all()):
            raise ValueError("mean and std")
        if not (std > 0).all():
            raise ValueError("std")
        if "heads" in content:
            covariance = torch.tensor(content["covariance"], dtype=torch.float64)
            if covariance.shape != (len(heads), len(heads)):
                raise ValueError("covariance")
        if "members" in content:
            members = torch.tensor(content["members"], dtype=torch.float64)
            if members.ndim != 3 or members.size(2) != len(mean) or not members.isfinite().all():
                raise ValueError("members")
        return cls(mean, std, heads, covariance, members, content.get("n"), content.get("on"))

    def to_json(self) -> dict[str, Any]:
        """Return what `calibration.json` holds: numbers for one head, lists for several."""
        mean, std = self.mean.tolist(), self.std.tolist()
        content: dict[str, Any] = {"mean": mean, "std": std} if self.heads else {"mean": mean[0], "std": std[0]}
        content |= {"n": self.n, "on": self.on}
        if self.covariance is not None:
            content |= {"heads": self.heads, "covariance": self.covariance.tolist()}
        if self.members is not None:
            content["members"] = self.members.tolist()
        return content

    def moments(self, weights: Tensor, combine: Callable[[Tensor], Tensor]) -> Moments:
        """
        Return mean and std of the rewards of the reference answers.

        For the weighted sum of heads these are w^T mean and sqrt(w^T C w), with C the covariance; for an ensemble they
        are measured on its members' scores.

        Args:
            weights (`Tensor` of shape `(H,)`): weights of the heads.
            combine (callable): function that makes rewards, shape `(n,)`, of the scores of an ensemble's members,
                `(members, n)`.
        """
        weights = weights.double()
        if self.members is not None:
            rewards = combine(self.members @ weights)
            return Moments(rewards.mean().item(), rewards.std(unbiased=len(rewards) > 1).item())
        covariance = self.std.square().diag() if self.covariance is None else self.covariance
        variance = weights @ covariance @ weights
        return Moments((weights @ self.mean).item(), variance.clamp(min=0).sqrt().item())


def write_calibration(folder: str | Path, calibration: Calibration) -> None:
    """Write `calibration.json` into the folder of a reward model."""
    text = json.dumps(calibration.to_json(), indent=2)
    Path(folder, CALIBRATION_FILE).write_text(text + "\n", encoding="utf-8")


def read_calibration(path: str) -> Calibration | None:
    """
    Return the calibration of the reward model in a folder, `None` if it has none.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if `calibration.json` lacks numbers, or a std isn't above 0.
    """
    file = Path(path, CALIBRATION_FILE)
    if not file.is_file():
        return None
    try:
        return Calibration.from_json(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f'`{file}` must hold `{{"mean": ..., "std": ...}}`, two numbers, the std above 0 (for a model with '
            "several heads lists, with `heads` and `covariance`). Fix or delete it."
        ) from error
