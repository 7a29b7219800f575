"""Figures of an evaluation of rewards in words: where a reward is weak, how sure it is, how far it can be trusted."""

import math

from rlhf_trl.report.measures import among
from rlhf_trl.report.text import interval
from rlhf_trl.runs.results import Estimate
from rlhf_trl.runs.reward_results import RewardQuality, RewardResult, SliceAccuracy

FEWEST = 20  # comparisons of a slice that is worth naming
# Slices by how hard the comparisons are for people: every reward is weaker on the harder ones
HARD = ("gap ", "raters agree")
CONFIDENCE = 0.03  # smallest difference of predicted and observed share that is worth naming


def reading(quality: RewardQuality, name: str) -> list[str]:
    """Return what the figures of a reward mean, a sentence for each that says something."""
    result = quality.rewards[name]
    said = [
        _accuracy(quality, result),
        _weakest(result),
        _confidence(result),
        _best_n(quality, result),
        _length(quality, result),
    ]
    return [sentence for sentence in said if sentence]


def _accuracy(quality: RewardQuality, result: RewardResult) -> str:
    accuracy, raters = result.accuracy, quality.raters
    if accuracy.low <= 0.5:
        return "It can't be told from chance: don't train on it."
    if raters is None or math.isnan(raters.one_rater.accuracy) or math.isnan(accuracy.low):
        return ""
    one = raters.one_rater.accuracy
    if accuracy.high < one:
        return f"It agrees less with people than one rater does with the others ({one:.1%}): there is more to learn."
    if accuracy.low > one:
        return f"It agrees more with people's mean than a single rater does ({one:.1%})."
    return f"It can't be told from a single rater, who agrees with the others in {one:.1%} of the comparisons."


def _weakest(result: RewardResult) -> str:
    parts = [part for part in result.slices if part.n >= FEWEST and not any(word in part.name for word in HARD)]
    if not parts:
        return ""
    worst = min(parts, key=lambda part: part.accuracy.mean)
    shown = f"`{worst.name}`, {interval(worst.accuracy, '{:.2f}')} of {worst.n:,} comparisons"
    # The lowest of several: its interval is the one for all of them
    if not among(worst.accuracy, len(parts)).high < result.accuracy.mean:  # nor where there is no interval
        return f"No slice is weaker than the whole beyond chance; the lowest is {shown}."
    return f"Weakest slice: {shown}{_how_weak(worst)}."


def _how_weak(part: SliceAccuracy) -> str:
    if part.accuracy.high < 0.5:
        return ", where it prefers what people don't: add such comparisons to its data before training on it"
    if part.accuracy.low <= 0.5:
        return ", no better than chance: a policy can drift there unpunished"
    return ""


def _confidence(result: RewardResult) -> str:
    bins = result.reliability.bins
    count = sum(each.n for each in bins)
    if not count:
        return ""
    predicted = sum(each.n * each.predicted for each in bins) / count
    observed = sum(each.n * each.observed for each in bins) / count
    gap, error = predicted - observed, math.sqrt(max(observed * (1 - observed), 1e-9) / count)
    told = f"on average its scores predict that {predicted:.0%} of raters agree with it, and {observed:.0%} do"
    if abs(gap) < max(CONFIDENCE, 1.96 * error):
        return f"Its confidence fits: {told}."
    if gap > 0:
        return (
            f"Over-confident: {told}. Its scores are further apart than what people's answers justify, which a policy "
            "exploits: raise `stage.args.beta`, or train the reward model with fewer epochs or "
            "`stage.args.label_smoothing`."
        )
    return f"Under-confident: {told}, so its scores are closer together than they need to be."


def _best_n(quality: RewardQuality, result: RewardResult) -> str:
    points = [point for point in result.best_of_n or [] if math.isfinite(point.gain.mean)]
    if len(points) < 2:
        return ""
    best = max(points, key=lambda point: point.gain.mean)
    last = points[-1]
    there = f"{best.gain.mean:+.2f} of the {best.best_gain.mean:+.2f} there is in {quality.gold}"
    if best.gain.mean <= 0:
        return f"Best of n by it gains nothing in {quality.gold}: don't optimize it."
    if best.n == last.n:
        return f"Best of n by it still rises at the largest n, {last.n}: {there}."
    fallen = best.gain.mean - last.gain.mean
    if fallen > _half(best.gain):
        return (
            f"Best of n by it is best at n = {best.n} ({there}); up to n = {last.n} it loses {fallen:.2f} of that, so "
            f"stop training at a KL of about {best.kl:.1f} nats."
        )
    return f"Best of n by it rises up to n = {best.n} ({there}) and is level from there on."


def _half(estimate: Estimate) -> float:
    return 0.0 if math.isnan(estimate.low) else (estimate.high - estimate.low) / 2


def _length(quality: RewardQuality, result: RewardResult) -> str:
    ours, people = result.length.longer_preferred, quality.longer_preferred
    if math.isnan(ours) or math.isnan(people) or ours - people < 0.1:
        return ""
    return (
        f"It prefers the longer completion in {ours:.0%} of the comparisons, people in {people:.0%}: it has learned "
        "length, so look at `like length`, and set `stage.args.length_penalty` in ppo."
    )
