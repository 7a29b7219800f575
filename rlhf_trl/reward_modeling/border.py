"""
Loss and measures of a score whose zero is a border, such as that between safe and unsafe completions (the cost models
of Safe RLHF, arXiv 2310.12773, equation 6, whose cost is this score with its sign reversed). Pure functions.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def border_loss(
    scores: Tensor, sides: Tensor, coef: float = 1.0, l2_coef: float = 1e-3, count: Tensor | float | None = None
) -> Tensor:
    """
    Return coef * 2 * mean(-log sigmoid(side * score)) + l2_coef * mean(score²) over the labeled completions.

    For pairs of completions that are both labeled, the first term is the mean over the pairs of the sum over the two.

    Args:
        scores (`Tensor` of shape `(N,)`): scores of the completions.
        sides (`Tensor` of shape `(N,)`): 1 for a completion above the border (safe), -1 for one below (unsafe); NaN
            for one without a label.
        coef (`float`): weight of the classification.
        l2_coef (`float`): weight of the square of the scores.
        count (`Tensor`, *optional*): divisor of the sums, the labeled completions of the whole batch; those of `sides`
            when unset.
    """
    known = ~sides.isnan()
    count = known.sum().clamp(min=1) if count is None else count
    classification = torch.where(known, F.softplus(-sides.nan_to_num() * scores), 0.0).sum() / count
    squares = torch.where(known, scores.square(), 0.0).sum() / count
    return 2 * coef * classification + l2_coef * squares


def border_ece(scores: Tensor, sides: Tensor, bins: int = 10) -> float:
    """
    Return the expected calibration error of sigmoid(score) as the probability of being above the border (Guo et al.
    2017, arXiv 1706.04599, equation 3), over the labeled completions; NaN without any.

    Args:
        scores (`Tensor` of shape `(N,)`), sides (`Tensor` of shape `(N,)`): see [`border_loss`].
        bins (`int`): number of bins of equal width.
    """
    known = ~sides.isnan()
    predicted, above = torch.sigmoid(scores[known].double()), (sides[known] > 0).double()
    if not len(predicted):
        return float("nan")
    place = (predicted * bins).long().clamp(max=bins - 1)
    differences = torch.zeros(bins, dtype=torch.float64).index_add(0, place.cpu(), (predicted - above).cpu())
    return (differences.abs().sum() / len(predicted)).item()
