"""Directions of metrics: whether an objective is to be minimized or maximized. Imports nothing heavy."""

import re

MINIMIZE, MAXIMIZE = "minimize", "maximize"
# Ends of names, `eval_` aside. What is neither a cost nor a score by its name, such as `rewards/rejected`, `entropy`
# or `completions/mean_length`, has no direction of its own
COSTS = re.compile(r"(loss|mse|ece|perplexity|(^|[/_])kl(_per_token|_k3)?)$")
SCORES = re.compile(
    r"((^|[/_])(reward|scores|scores_normalized|margins?|top_one|explained_variance|win_rate|mean_token_accuracy)"
    r"|accuracy|accuracies|[/_]accuracy_\w+|[/_]rating_(pearson|spearman)|best_of_\d+_gain|[/_]rewardbench_\w+"
    r"|log_odds_chosen|(^|/)rewards/.+/mean)$"
)


def direction_of(metric: str | None) -> str | None:
    """Return `minimize` or `maximize` for a metric by its name, `None` where the name doesn't tell."""
    name = (metric or "").removeprefix("eval_")
    if COSTS.search(name):
        return MINIMIZE
    return MAXIMIZE if SCORES.search(name) else None


def direction_problem(metric: str | None) -> str:
    """Return what is wrong with a search for the best value of a metric without a known direction."""
    return (
        f"Whether a high or a low `{metric}` is better can't be told by its name. Set `direction=maximize` or "
        "`direction=minimize`, or another `objective=...`."
    )
