"""
Losses of reward models: Bradley-Terry (pairwise), Plackett-Luce, regression. Pure functions.

Shapes: N completions of one micro-batch, M comparisons between two of them, G prompts, H heads.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from rlhf_trl.reward_modeling.config import LOSS_TYPES


def ranking_loss(
    scores: Tensor,
    ranks: Tensor,
    groups: Tensor,
    loss_type: str = "pairwise",
    margin: float | Tensor | None = None,
    label_smoothing: float = 0.0,
    center: float = 0.0,
) -> Tensor:
    """
    Return the loss of scores that should follow rankings, each within one prompt.

    Args:
        scores (`Tensor` of shape `(N,)`): scores of the completions.
        ranks (`Tensor` of shape `(N,)`): their ranks; the smallest is best, and equal ranks tie, which makes no
            comparison.
        groups (`Tensor` of shape `(N,)`): number of the prompt of each completion.
        loss_type (`str`): `pairwise` (InstructGPT, arXiv 2203.02155 eq. 1) or `plackett_luce`, see
            [`comparison_losses`].
        margin (`float` or `Tensor`, *optional*): margin of all comparisons; as `(G,)` of each prompt, in the order of
            their numbers; or as `(N,)` a level of each completion, so that a comparison's margin is the difference of
            two levels.
        label_smoothing (`float`): probability that a comparison is reversed.
        center (`float`): coefficient of the centering term.

    Returns:
        `Tensor`: scalar; mean over each prompt's untied pairs, then over the prompts that have any. 0 without any.

    Raises:
        ValueError: for shapes that don't fit, or another `loss_type`.
    """
    if not (scores.ndim == 1 and scores.shape == ranks.shape == groups.shape):
        raise ValueError(
            f"`scores`, `ranks` and `groups` have shapes {tuple(scores.shape)}, {tuple(ranks.shape)} and "
            f"{tuple(groups.shape)}, and must be 1-D and of one length."
        )
    _, groups = groups.unique(return_inverse=True)
    same = groups[:, None] == groups[None, :]
    better, worse = torch.nonzero(same & (ranks[:, None] < ranks[None, :]), as_tuple=True)
    if isinstance(margin, Tensor) and margin.ndim > 0:
        if margin.shape == scores.shape:
            margin = margin[better] - margin[worse]
        elif margin.shape == (int(groups.max()) + 1 if len(groups) else 0,):
            margin = margin[groups[better]]
        else:
            raise ValueError(
                f"`margin` has shape {tuple(margin.shape)}, and must have one entry per prompt or one per completion."
            )
    losses, compared = comparison_losses(scores, better, worse, groups, loss_type, margin, label_smoothing, center)
    return losses.sum() / compared.sum().clamp(min=1)


def comparison_losses(
    scores: Tensor,
    better: Tensor,
    worse: Tensor,
    groups: Tensor,
    loss_type: str = "pairwise",
    margin: float | Tensor | None = None,
    label_smoothing: float | Tensor = 0.0,
    center: float = 0.0,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """
    Return the ranking loss of each prompt.

    With d = r_better - r_worse - margin:

    - `pairwise`: mean over the prompt's comparisons of -log sigmoid(d), the negative log-likelihood of the
      Bradley-Terry model; the margin as in Llama 2 (arXiv 2307.09288, eq. 2).
    - `plackett_luce`: sum over the prompt's completions of log(1 + sum exp(-d)), the inner sum over the completions
      that this one is better than. For a full order that is the negative log-likelihood of the Plackett-Luce model;
      tied completions don't compete.

    Both are equal for two completions. Label smoothing e takes (1 - e) of the loss and e of the loss of the reversed
    comparisons (-d for d), as in conservative DPO (https://ericmitchell.ai/cdpo.pdf). Centering adds `center` times
    the mean over the comparisons of (r_better + r_worse)^2 (arXiv 2312.09244).

    Args:
        scores (`Tensor` of shape `(N,)`): scores of the completions.
        better (`Tensor` of shape `(M,)`), worse (`Tensor` of shape `(M,)`): indices into `scores`, both of one prompt.
        groups (`Tensor` of shape `(N,)`): number of each completion's prompt, from 0.
        loss_type (`str`): see above.
        margin (`float` or `Tensor` of shape `(M,)`, *optional*): margin of each comparison.
        label_smoothing (`float` or `Tensor` of shape `(M,)`): probability that a comparison is reversed.
        center (`float`): coefficient of the centering term.
        weights (`Tensor` of shape `(M,)`, *optional*): weight of each comparison's loss. `plackett_luce` takes the
            mean over a completion's comparisons, as it does for `label_smoothing`.

    Returns:
        `tuple[Tensor, Tensor]`: loss of each prompt, shape `(G,)`, 0 for one without comparisons; and whether it has
            any, shape `(G,)`.

    Raises:
        ValueError: for another `loss_type`.
    """
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"`loss_type` is {loss_type!r}. Use one of: {', '.join(LOSS_TYPES)}.")
    prompts = int(groups.max()) + 1 if len(groups) else 0
    ones = scores.new_ones(len(better))
    smoothing = ones * label_smoothing
    weights = ones if weights is None else weights.to(scores)
    # Bradley-Terry: P(better > worse) = sigmoid(r_better - r_worse), so these are log-odds (less the margin)
    logits = scores[better] - scores[worse] - (0.0 if margin is None else margin)
    if loss_type == "pairwise":
        # -log sigmoid(d) = softplus(-d); a prompt's K completions give up to C(K, 2) comparisons, of which the mean is
        # taken, so that every prompt counts alike (InstructGPT, arXiv 2203.02155 eq. 1)
        losses = (1 - smoothing) * F.softplus(-logits) + smoothing * F.softplus(logits)
        ranking = _mean_by(weights * losses, groups[better], prompts)
    else:
        # Plackett-Luce: the best of what is left is chosen again and again, each time with probability
        # exp(r_winner) / sum exp(r of winner and losers)
        count = len(scores)
        forward = _choice_losses(logits, better, worse, count) * _mean_by(weights * (1 - smoothing), better, count)
        backward = _choice_losses(-logits, worse, better, count) * _mean_by(weights * smoothing, worse, count)
        ranking = scores.new_zeros(prompts).index_add(0, groups, forward + backward)
    # Comparisons determine scores up to a constant per prompt; the penalty sets it so that scores are around 0
    centering = _mean_by((scores[better] + scores[worse]) ** 2, groups[better], prompts)
    compared = torch.bincount(groups[better], minlength=prompts) > 0
    return ranking + center * centering, compared


def _mean_by(values: Tensor, index: Tensor, size: int) -> Tensor:
    """Return the mean of `values` by `index`, shape `(size,)`; 0 for an index without values."""
    counts = torch.bincount(index, minlength=size).clamp(min=1)
    return values.new_zeros(size).index_add(0, index, values) / counts


def _choice_losses(logits: Tensor, winner: Tensor, loser: Tensor, size: int) -> Tensor:
    """
    Return -log of the probability that each winner is chosen among itself and its losers.

    That is log(1 + sum over the losers of exp(-logits)), shape `(size,)`; 0 for a completion that wins nothing.
    """
    rivals = logits.new_full((size, size), -torch.inf).index_put((winner, loser), -logits)
    return torch.cat([logits.new_zeros(size, 1), rivals], dim=1).logsumexp(dim=1)


def regression_loss(scores: Tensor, targets: Tensor, count: Tensor | None = None) -> Tensor:
    """
    Return the mean squared error over the targets that aren't missing.

    Args:
        scores (`Tensor` of shape `(N, H)`): scores of the completions.
        targets (`Tensor` of shape `(N, H)`): their targets; NaN is a missing one, without loss and gradient.
        count (`Tensor`, *optional*): divisor of the sum, the number of targets of the whole batch; those of `targets`
            when unset.
    """
    known = ~targets.isnan()
    if count is None:
        count = known.sum()
    return ((scores - targets.nan_to_num()) ** 2 * known).sum() / count.clamp(min=1)


def loss_counts(inputs: dict[str, Tensor]) -> Tensor:
    """
    Return the number of prompts with comparisons, of known targets and of completions with a label of safety in a
    micro-batch, shape `(3,)`.
    """
    prompts = inputs["groups"][inputs["better"]].unique()
    known = [int((~inputs[name].isnan()).sum()) if name in inputs else 0 for name in ("targets", "safe")]
    return torch.tensor([len(prompts), *known], dtype=torch.float)


def score_margins(scores: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """
    Return the score margins of a micro-batch, the differences that should be positive.

    They are those of its comparisons or, if it has none, of the pairs of each head that [`target_margins`] finds.

    Args:
        scores (`Tensor` of shape `(N, H)`): scores of the completions.
        inputs (`dict[str, Tensor]`): micro-batch of [`~rlhf_trl.reward_modeling.collator.ComparisonCollator`].
    """
    if len(inputs["better"]) or "targets" not in inputs:
        return scores[inputs["better"], 0] - scores[inputs["worse"], 0]
    pairs = zip(scores.unbind(dim=1), inputs["targets"].unbind(dim=1), strict=True)
    return torch.cat([target_margins(head, targets, inputs["groups"]) for head, targets in pairs])


def target_margins(scores: Tensor, targets: Tensor, groups: Tensor) -> Tensor:
    """
    Return the score margins of all pairs of one prompt whose targets differ, higher minus lower target.

    Args:
        scores, targets, groups (`Tensor` of shape `(N,)`): scores, targets and numbers of the prompts of the
            completions.
    """
    higher = (groups[:, None] == groups[None, :]) & (targets[:, None] > targets[None, :])  # false for NaN
    better, worse = torch.nonzero(higher, as_tuple=True)
    return scores[better] - scores[worse]


def reference_scores(scores: Tensor, inputs: dict[str, Tensor], calibrate_on: str) -> Tensor:
    """
    Return the scores of the completions that a calibration is measured on.

    Args:
        scores (`Tensor` of shape `(N, ...)`): scores of a micro-batch.
        inputs (`dict[str, Tensor]`): the micro-batch.
        calibrate_on (`str`): `all`, or `best` for the completions that are worse than no other one.
    """
    if calibrate_on == "all":
        return scores
    beaten = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    beaten[inputs["worse"]] = True
    return scores[~beaten]
