"""
Losses of reward models: pairwise, Plackett-Luce, regression. Pure functions.

N completions of one micro-batch, M comparisons between two of them.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from rlhf_trl.reward_modeling.config import KINDS


def ranking_loss(
    scores: Tensor,
    ranks: Tensor,
    groups: Tensor,
    kind: str = "pairwise",
    margin: float | Tensor | None = None,
    label_smoothing: float = 0.0,
    center: float = 0.0,
) -> Tensor:
    """
    Loss of scores that should follow rankings, each within one prompt.

    Args:
        scores (`Tensor` of shape `(N,)`): of the completions.
        ranks (`Tensor` of shape `(N,)`): the smallest is best; equal ranks tie, and a tie gives no comparison.
        groups (`Tensor` of shape `(N,)`): which prompt a completion belongs to.
        kind (`str`): `pairwise` (InstructGPT, arXiv 2203.02155 eq. 1) or `plackett_luce`, see [`comparison_losses`].
        margin (`float` or `Tensor`, *optional*): by how much the better one should lead, for all comparisons, or as
            `(G,)` one for each prompt (in the order of its group's number), or as `(N,)` a level of each completion:
            the margin of two is the better one's level less the worse one's.
        label_smoothing (`float`): probability that a comparison is the wrong way round.
        center (`float`): factor of the centering term.

    Returns:
        `Tensor`: mean over each prompt's untied pairs, then over the prompts that have any; 0 without any.

    Raises:
        ValueError: for shapes that don't fit, or another `kind`.
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
            raise ValueError(f"`margin` has shape {tuple(margin.shape)}: one a prompt or one a completion is needed.")
    losses, compared = comparison_losses(scores, better, worse, groups, kind, margin, label_smoothing, center)
    return losses.sum() / compared.sum().clamp(min=1)


def comparison_losses(
    scores: Tensor,
    better: Tensor,
    worse: Tensor,
    groups: Tensor,
    kind: str = "pairwise",
    margin: float | Tensor | None = None,
    label_smoothing: float | Tensor = 0.0,
    center: float = 0.0,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """
    Ranking loss of each prompt. With d = score of the better one - score of the worse one - margin:

    - `pairwise`: mean over the prompt's comparisons of -log sigmoid(d) (Bradley-Terry; the margin as in Llama 2, arXiv
      2307.09288);
    - `plackett_luce`: sum over the prompt's completions of log(1 + sum exp(-d)), the inner sum over what the
      completion is better than. For a full order that is the negative log-likelihood of the Plackett-Luce model; tied
      completions don't compete.

    Both are the same for two completions. Label smoothing e is (1 - e) of the loss and e of the loss with all
    comparisons turned round (d becomes -d), as in conservative DPO. Centering adds `center` times the mean over the
    comparisons of (better + worse)² (arXiv 2312.09244).

    Args:
        scores (`Tensor` of shape `(N,)`): of the completions.
        better, worse (`Tensor` of shape `(M,)`): indices into `scores`, both of one prompt.
        groups (`Tensor` of shape `(N,)`): the prompt's number, from 0.
        margin, label_smoothing (`float` or `Tensor` of shape `(M,)`): of each comparison.
        weights (`Tensor` of shape `(M,)`, *optional*): factor of each comparison's loss. `plackett_luce` takes the
            mean over a completion's comparisons, as it does for `label_smoothing`.

    Returns:
        the loss of each prompt, shape `(G,)`, 0 where nothing is compared; and whether something is, `(G,)`.

    Raises:
        ValueError: for another `kind`.
    """
    if kind not in KINDS:
        raise ValueError(f"`kind` is {kind!r}. Use one of: {', '.join(KINDS)}.")
    prompts = int(groups.max()) + 1 if len(groups) else 0
    ones = scores.new_ones(len(better))
    smoothing = ones * label_smoothing
    weights = ones if weights is None else weights.to(scores)
    lead = scores[better] - scores[worse] - (0.0 if margin is None else margin)
    if kind == "pairwise":
        values = (1 - smoothing) * F.softplus(-lead) + smoothing * F.softplus(lead)
        ranking = _mean_by(weights * values, groups[better], prompts)
    else:
        right = _stages(lead, better, worse, len(scores)) * _mean_by(weights * (1 - smoothing), better, len(scores))
        turned = _stages(-lead, worse, better, len(scores)) * _mean_by(weights * smoothing, worse, len(scores))
        ranking = scores.new_zeros(prompts).index_add(0, groups, right + turned)
    centering = _mean_by((scores[better] + scores[worse]) ** 2, groups[better], prompts)
    compared = torch.bincount(groups[better], minlength=prompts) > 0
    return ranking + center * centering, compared


def _mean_by(values: Tensor, index: Tensor, size: int) -> Tensor:
    """Mean of `values` by `index`, shape `(size,)`; 0 where there is none."""
    counts = torch.bincount(index, minlength=size).clamp(min=1)
    return values.new_zeros(size).index_add(0, index, values) / counts


def _stages(lead: Tensor, winner: Tensor, loser: Tensor, size: int) -> Tensor:
    """log(1 + sum over the losers of exp(-lead)) of each winner, shape `(size,)`; 0 for one that wins nothing."""
    rivals = lead.new_full((size, size), -torch.inf).index_put((winner, loser), -lead)
    return torch.cat([lead.new_zeros(size, 1), rivals], dim=1).logsumexp(dim=1)


def regression_loss(scores: Tensor, targets: Tensor, count: Tensor | None = None) -> Tensor:
    """
    Mean squared error over the targets that are given.

    Args:
        scores, targets (`Tensor` of shape `(N, H)`): a NaN target is a missing one: it has no loss and no gradient.
        count (`Tensor`, *optional*): what the sum is divided by, of a batch of which these are a part.
    """
    given = ~targets.isnan()
    count = given.sum() if count is None else count
    return ((scores - targets.nan_to_num()) ** 2 * given).sum() / count.clamp(min=1)


def loss_counts(inputs: dict[str, Tensor]) -> Tensor:
    """How many prompts of a micro-batch have comparisons, and how many targets are given; shape (2,)."""
    prompts, targets = inputs["groups"][inputs["better"]].unique(), inputs.get("targets")
    given = 0 if targets is None else int((~targets.isnan()).sum())
    return torch.tensor([len(prompts), given], dtype=torch.float)


def score_margins(scores: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """
    Score differences that should be positive, of a micro-batch's `scores`, shape (N, H): of its comparisons; without
    any, of the pairs of each head that [`comparison_margins`] finds.
    """
    if len(inputs["better"]) or "targets" not in inputs:
        return scores[inputs["better"], 0] - scores[inputs["worse"], 0]
    pairs = zip(scores.unbind(dim=1), inputs["targets"].unbind(dim=1), strict=True)
    return torch.cat([comparison_margins(head, targets, inputs["groups"]) for head, targets in pairs])


def comparison_margins(scores: Tensor, targets: Tensor, groups: Tensor) -> Tensor:
    """Score differences of all pairs of one prompt whose targets differ, the one with the higher target first."""
    ahead = (groups[:, None] == groups[None, :]) & (targets[:, None] > targets[None, :])  # NaN is not ahead of any
    better, worse = torch.nonzero(ahead, as_tuple=True)
    return scores[better] - scores[worse]


def reference_scores(scores: Tensor, inputs: dict[str, Tensor], which: str) -> Tensor:
    """Of `scores`, shape (N, ...), those of the completions that a calibration is about (`calibrate_on`)."""
    if which == "all":
        return scores
    beaten = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    beaten[inputs["worse"]] = True
    return scores[~beaten]
