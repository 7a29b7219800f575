"""Verdicts on a comparison of policies, as a whole and policy by policy."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from rlhf_trl.report.measures import (
    advantage_of,
    base_of,
    beside_best_of_n,
    gain_of,
    is_rewarded,
    minus,
    names_in_words,
    part_of,
    scaled,
)
from rlhf_trl.report.page import Table
from rlhf_trl.report.text import interval
from rlhf_trl.runs.results import Comparison, Estimate

SHIP, LOOK, DONT, OPEN = "ship", "look", "don't ship", "no verdict"
PAIRS_SHOWN = 6  # policies whose differences between each other are shown; of more, those to the best one
# A proxy has risen if it gained more standard deviations than this. The reward that counts has not followed if it
# gained less than this share of what the proxy did
RISE, FOLLOWING = 0.25, 0.5
NO_REWARD = (
    "no reward of a weight other than 0 was measured, so over-optimization would not show. Set `reward=...`, with "
    "`reward.NAME.weight=1`"
)


def verdict(comparison: Comparison) -> str:
    """Return two sentences: whether a policy is better than the baseline, and what to change next."""
    base = comparison.baseline
    if not comparison.others:
        return f"Only the baseline `{base}` was evaluated. Add a policy: `+stage.policies.NAME=...`."
    found = {name: advantage_of(comparison, name, base) for name in comparison.others}
    advantages = {name: advantage for name, advantage in found.items() if advantage}
    if not advantages and not is_rewarded(comparison):
        return f"{_no_judgement(comparison)}."
    if not advantages:
        return f"No policy's reward could be held beside that of `{base}`, so whether one is better is open."
    return f"{_result(comparison, advantages)} {_next(comparison, list(advantages))}"


def _no_judgement(comparison: Comparison) -> str:
    return (
        f"No reward counts and no judge preferred an answer, so whether a policy is better than {comparison.baseline} "
        "is open. Set `reward=...`, with `reward.NAME.weight=1`, or a `judge` that can be asked"
    )


def _result(comparison: Comparison, advantages: dict[str, Estimate]) -> str:
    base, rewarded = comparison.baseline, is_rewarded(comparison)
    better = [name for name, advantage in advantages.items() if advantage.low > 0]
    worse = [name for name, advantage in advantages.items() if advantage.high < 0]
    best = max(advantages, key=lambda name: advantages[name].mean)
    wins, kl = comparison.policies[best].win_rate, comparison.policies[best].kl
    gained = [f"{interval(advantages[best], '{:+.2f}')} reward"] if rewarded else []
    gained += [f"{interval(wins, '{:.0%}')} wins"] if wins else []
    price = f" at a KL of {kl.mean:.2f} nats per sequence" if kl else ""
    came = f"{', '.join(gained)}{price}"
    on = f"on {comparison.prompts:,} held-out prompts"
    if not rewarded:
        on += f" by the verdicts of {comparison.judge}"
    if len(better) > 3:
        return f"{len(better)} of {len(advantages)} policies are better than {base} {on}, {best} most: {came}."
    if better:
        who = "is" if len(better) == 1 else "are"
        most = f", {best} most" if len(better) > 1 else ""
        return f"{names_in_words(better)} {who} better than {base} {on}{most}: {came}."
    told = f"No policy is better than {base} beyond chance {on}"
    told += f" ({names_in_words(worse)} {'is' if len(worse) == 1 else 'are'} worse)" if worse else ""
    return f"{told}; {best} comes nearest: {came}."


def _next(comparison: Comparison, names: Sequence[str]) -> str:
    """Return the first thing in the evaluation that is out of line, and the option for it."""
    for check in (_over_optimized, _costly):
        for name in names:
            if said := check(comparison, name):
                return said
    under = [name for name in names if (beside := beside_best_of_n(comparison, name)) and beside.is_below]
    if under:
        chosen_by = comparison.curves[-1].by
        by = f" by `{chosen_by}`" if chosen_by else ""
        return (
            f"{names_in_words(under)} {'is' if len(under) == 1 else 'are'} below what the best of n samples of "
            f"{comparison.baseline}{by} gets for the same KL: train longer, or look at the reward model first."
        )
    if not is_rewarded(comparison):
        return f"{NO_REWARD[0].upper()}{NO_REWARD[1:]}."
    return "Nothing in its price is out of line, so more training, or a smaller `stage.args.beta`, is worth a try."


def _over_optimized(comparison: Comparison, name: str) -> str | None:
    """
    Return that a proxy rose beyond chance while the reward that counts fell, or stayed below what it would have gained
    by following, beyond chance; `None` otherwise. One that rises follows, by however few standard deviations: a reward
    of 0 or 1 can gain less of them than a score, and none can rise above what the best answers have.
    """
    result = comparison.policies[name]
    difference = result.difference if is_rewarded(comparison) else None
    if difference is None or difference.low > 0:
        return None
    has_fallen, (mean, std) = difference.high < 0, base_of(comparison, "")
    gained_at_most = difference.high / std if std else math.inf  # no measure where it doesn't vary
    values = [value for sample in comparison.samples for value in sample.rewards.values() if value is not None]
    could_gain = scaled(max(values, default=None), mean, std) or 0.0
    for proxy in comparison.proxies:
        learned, risen = gain_of(comparison, result, proxy), _proxy_difference(comparison, name, proxy)
        if learned is None or learned <= RISE or risen is None or not risen.low > 0:
            continue
        if has_fallen or gained_at_most < FOLLOWING * min(learned, could_gain):
            return (
                f"{name} gained {learned:+.1f} standard deviations by `{proxy}`, and by the reward that counts "
                f"{'it lost' if has_fallen else 'nothing beyond chance'} ({interval(difference, '{:+.2f}')}): it is "
                "over-optimized, so raise its `stage.args.beta`, train it less, or refresh the reward model."
            )
    return None


def _proxy_difference(comparison: Comparison, name: str, proxy: str) -> Estimate | None:
    ours, base = (each.reward_intervals.get(proxy) for each in (comparison.policies[name], comparison.base))
    return minus(ours, base) if ours and base else None


def _costly(comparison: Comparison, name: str) -> str | None:
    base, result = comparison.base, comparison.policies[name]
    if base.eos_rate - result.eos_rate > 0.05:
        return (
            f"{name} ends {result.eos_rate:.0%} of its answers and {comparison.baseline} "
            f"{base.eos_rate:.0%}: set `stage.args.missing_eos_penalty`."
        )
    if (result.repetition or 0.0) - (base.repetition or 0.0) > 0.1:
        return f"{name} repeats itself more than {comparison.baseline}: raise its `stage.args.beta`."
    if result.completion_length > 1.5 * base.completion_length:
        return (
            f"{name} writes {result.completion_length / base.completion_length:.1f} times as long as "
            f"{comparison.baseline}: look at the wins at equal length, and at `stage.args.length_penalty`."
        )
    return None


def headline(comparison: Comparison) -> dict[str, str]:
    """Return the numbers under the verdict."""
    facts = {"held-out prompts": f"{comparison.prompts:,}", "policies": str(len(comparison.policies))}
    found = {name: advantage_of(comparison, name, comparison.baseline) for name in comparison.others}
    advantages = {name: advantage.mean for name, advantage in found.items() if advantage}
    if advantages:
        best = max(advantages, key=advantages.__getitem__)
        result, base = comparison.policies[best], comparison.base.reward
        if is_rewarded(comparison) and result.reward and base:
            facts[f"reward of {best}"] = f"{result.reward.mean:.2f}"
            facts[f"reward of {comparison.baseline}"] = f"{base.mean:.2f}"
        if result.win_rate:
            facts[f"wins of {best}"] = f"{result.win_rate.mean:.0%}"
        if result.kl:
            facts[f"KL of {best}"] = f"{result.kl.mean:.2f}"
    return facts


# ---- Policy by policy ----


class Verdict(NamedTuple):
    """Whether to ship a policy (`ship`, `look`, `don't ship`; `no verdict` where nothing compares it), and why."""

    call: str
    reasons: list[str]


def policy_verdicts(comparison: Comparison) -> dict[str, Verdict]:
    """
    Return the verdict on each policy but the baseline.

    A policy that violates a constraint or is worse than the baseline, beyond chance, or that gained by the learned
    reward alone, is not to be shipped. One
    that is better beyond chance is, unless something is out of line that needs a look first: what it costs, best-of-n
    with more reward for the same KL, a judge who prefers the baseline, or another policy with more for no more KL.
    Better and worse are by the reward that counts; where none does, by the judge's verdicts.
    """
    return {name: _policy_verdict(comparison, name) for name in comparison.others}


def _policy_verdict(comparison: Comparison, name: str) -> Verdict:
    base, result, rewarded = comparison.baseline, comparison.policies[name], is_rewarded(comparison)
    advantage = advantage_of(comparison, name, base)
    if violated := [f"{key} {each.bound}" for key, each in result.constraints.items() if each.is_violated]:
        return Verdict(DONT, [f"it violates {names_in_words(violated)} beyond chance"])
    if advantage is None:
        held = f"its reward could not be held beside that of {base}"
        return Verdict(OPEN, [held if rewarded else _no_judgement(comparison)])
    over_optimized, costly = _over_optimized(comparison, name), _costly(comparison, name)
    concerns = [found for found in (over_optimized, costly) if found]
    if advantage.high < 0:
        worse = f"it has less reward than {base}" if rewarded else f"{comparison.judge} prefers {base}"
        return Verdict(DONT, [worse, *([over_optimized] if over_optimized else [])])
    if not advantage.low > 0:  # nor of a single prompt, which has no interval
        call = DONT if over_optimized else LOOK
        return Verdict(call, [f"no difference to {base} beyond chance on {comparison.prompts:,} prompts", *concerns])
    concerns += [
        f"the mean of {key} is beyond its bound {each.bound}, within chance"
        for key, each in result.constraints.items()
        if (each.excess or 0.0) > 0
    ]
    if rewarded and result.win_rate and result.win_rate.high < 0.5:
        concerns.append(f"it has more reward, and {comparison.judge} prefers {base}")
    if (beside := beside_best_of_n(comparison, name)) and beside.is_below:
        concerns.append(f"the best of n samples of {base} has more reward for the same KL")
    for other in comparison.others:
        more = advantage_of(comparison, other, name) if other != name else None
        if more and more.low > 0 and _is_no_further(comparison, other, name):
            kind, form = ("reward", "{:+.2f}") if rewarded else ("wins", "{:+.0%}")
            concerns.append(f"{other} has more {kind} ({interval(more, form)}), and no more KL beyond chance")
            break
    if concerns:
        return Verdict(LOOK, concerns)
    reasons = [f"better than {base} beyond chance, and nothing in its price is out of line"]
    if not rewarded:
        reasons = [f"{comparison.judge} prefers it beyond chance, and nothing in its price is out of line", NO_REWARD]
    elif not comparison.proxies:
        reasons.append("no second reward was measured, so over-optimization would not show")
    return Verdict(SHIP, reasons)


def _is_no_further(comparison: Comparison, one: str, other: str) -> bool:
    """Return whether a policy's KL is not above that of another beyond chance."""
    kl, limit = comparison.policies[one].kl, comparison.policies[other].kl
    return kl is not None and limit is not None and kl.low <= limit.high


def verdict_blocks(comparison: Comparison) -> list:
    """Return the verdict on each policy, with what best-of-n and the other policies have."""
    found = policy_verdicts(comparison)
    if not found:
        return []
    base, rewarded = comparison.baseline, is_rewarded(comparison)
    by = f" by {comparison.curves[-1].by}" if comparison.curves and comparison.curves[-1].by else ""
    rows, has_best = [], bool(comparison.curves)
    for name, (call, reasons) in found.items():
        beside = beside_best_of_n(comparison, name)
        result = comparison.policies[name]
        row = [name, call]
        row.append(interval(result.difference, "{:+.2f}") if rewarded else interval(result.win_rate, "{:.0%}"))
        if has_best:
            beyond = f"further than n = {beside.largest}" if beside else ""
            row += [interval(beside.difference, "{:+.2f}") or beyond if beside else "", beside.rank if beside else ""]
        rows.append([*row, "; ".join(reason.rstrip(".") for reason in reasons)])
    headers = ["policy", "verdict", f"{'reward' if rewarded else 'wins'} vs {base} [95 %]"]
    headers += ["vs best of n, same KL [95 %]", "as good as best of"] if has_best else []
    note = f"Best of n is free of training: of n answers of {base} the best{by} is kept." if has_best else ""
    if len(found) > PAIRS_SHOWN:
        note += (
            f" Each interval holds by itself: of {len(found)} policies that are as good as {base}, about "
            f"{0.025 * len(found):.1g} would be called better by chance."
        )
    blocks = [Table([*headers, "why"], rows, note=note.strip())]
    if pairs := _pairs(comparison):
        of = "difference in reward [95 %]" if rewarded else f"difference in wins vs {base} [95 %]"
        blocks.append(Table(["policies", of, "reading"], pairs, "Between the policies."))
    return blocks


def _pairs(comparison: Comparison) -> list[list[str]]:
    """Return the differences between the policies; of many, those of the best one to the others."""
    rewarded = is_rewarded(comparison)
    means = {
        name: mean
        for name, result in comparison.others.items()
        if (mean := part_of(result.reward if rewarded else result.win_rate, "mean")) is not None
    }
    names = sorted(means, key=lambda name: -means[name])
    pairs = [(one, other) for i, one in enumerate(names) for other in names[i + 1 :]]
    if len(names) > PAIRS_SHOWN:
        pairs = [(names[0], other) for other in names[1:]]
    rows = []
    for one, other in pairs:
        if difference := advantage_of(comparison, one, other):
            reading = f"{one} is better" if difference.low > 0 else "no difference beyond chance"
            rows.append([f"{one} - {other}", interval(difference, "{:+.2f}" if rewarded else "{:+.0%}"), reading])
    return rows
