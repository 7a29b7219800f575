"""A reward model's calibration: mean and standard deviation of its scores of reference answers, beside the model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_trl.errors import ConfigError

CALIBRATION_FILE = "calibration.json"


def write_calibration(folder: str | Path, calibration: dict[str, Any]) -> None:
    """Writes `calibration.json` into a reward model's folder."""
    Path(folder, CALIBRATION_FILE).write_text(json.dumps(calibration, indent=2) + "\n", encoding="utf-8")


def read_calibration(path: str) -> dict[str, Any] | None:
    """
    What the `calibration.json` in the folder of a reward model holds, or `None` where there is none: `mean` and `std`
    of its scores of reference answers; of a model with several heads lists, with `heads` and `covariance`; of an
    ensemble these of its members' mean, and all `members`' scores, shape (members, n, heads).

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if the file doesn't hold these numbers, each std above 0.
    """
    file = Path(path, CALIBRATION_FILE)
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        mean, std = (torch.tensor(content[key], dtype=torch.float64).reshape(-1) for key in ("mean", "std"))
        if "heads" in content:
            covariance = torch.tensor(content["covariance"], dtype=torch.float64)
            whole = covariance.shape == (len(mean), len(mean)) and len(mean) == len(content["heads"])
        else:
            whole = len(mean) == 1
        if "members" in content:
            members = torch.tensor(content["members"], dtype=torch.float64)
            whole = whole and members.ndim == 3 and members.size(2) == len(mean) and bool(members.isfinite().all())
        whole = whole and len(std) == len(mean) and bool(mean.isfinite().all() and (std > 0).all())
        if whole and std.isfinite().all():
            return content
    except (ValueError, TypeError, KeyError):
        pass
    raise ConfigError(
        f'`{file}` must hold `{{"mean": ..., "std": ...}}`, two numbers, the std above 0 (of a model with several '
        "heads lists, with `heads` and `covariance`). Mend it, or delete it."
    )


def calibration_of(scores: Tensor, heads: list[str], on: str) -> dict[str, Any]:
    """
    What `calibration.json` holds of a reward model's scores of reference answers.

    Args:
        scores (`Tensor` of shape `(n, heads)`, float64). heads (`list[str]`): their names. on (`str`): which answers.
    """
    mean, std = scores.mean(0).tolist(), scores.std(0, unbiased=len(scores) > 1).tolist()
    # A weighted sum of the heads, chosen at use, has a std of its own: the covariance gives it
    several = {"heads": heads, "covariance": scores.T.cov().tolist()} if len(heads) > 1 else {}
    return {
        "mean": mean if several else mean[0],
        "std": std if several else std[0],
        "n": len(scores),
        "on": on,
        **several,
    }


def weighted_calibration(
    calibration: dict[str, Any] | None, weights: Tensor, combine: Callable[[Tensor], Tensor]
) -> dict[str, float] | None:
    """
    Mean and std of the reference answers' rewards: of the weighted sum of head scores, w^T mean and sqrt(w^T C w); of
    an ensemble measured on its members' scores.

    Args:
        calibration (`dict`, *optional*): what [`read_calibration`] gives.
        weights (`Tensor` of shape `(heads,)`): factors of the heads.
        combine (callable): makes rewards, shape `(n,)`, of the scores of an ensemble's members, `(members, n)`.
    """
    if calibration is None:
        return None
    weights = weights.double()
    if "members" in calibration:
        rewards = combine(torch.tensor(calibration["members"], dtype=torch.float64) @ weights)
        return {"mean": rewards.mean().item(), "std": rewards.std(unbiased=len(rewards) > 1).item()}
    mean = torch.tensor(calibration["mean"], dtype=torch.float64).reshape(-1)
    default = torch.tensor(calibration["std"], dtype=torch.float64).reshape(-1).square().diag()
    covariance = torch.tensor(calibration["covariance"]).double() if "covariance" in calibration else default
    return {"mean": (weights @ mean).item(), "std": (weights @ covariance @ weights).clamp(min=0).sqrt().item()}
