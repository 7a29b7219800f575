"""Verdicts on a comparison of policies, as a whole and policy by policy."""

from collections.abc import Sequence
from typing import NamedTuple

from rlhf_trl.report.measures import beside_best_of_n, difference_of, gain_of, names_in_words, part_of
from rlhf_trl.report.page import Table
from rlhf_trl.report.text import interval
from rlhf_trl.runs.results import Comparison, Estimate

SHIP, LOOK, DONT = "ship", "look", "don't ship"
PAIRS_SHOWN = 6  # policies whose differences between each other are shown; of more, those to the best one


def verdict(comparison: Comparison) -> str:
    """Return two sentences: whether a policy is better than the baseline, and what to change next."""
    base = comparison.baseline
    if not comparison.others:
        return f"Only the baseline `{base}` was evaluated. Add a policy: `+stage.policies.NAME=...`."
    differences = {name: result.difference for name, result in comparison.others.items() if result.difference}
    if not differences:
        return f"No policy's reward could be held beside that of `{base}`, so whether one is better is open."
    return f"{_result(comparison, differences)} {_next(comparison, list(differences))}"


def _result(comparison: Comparison, differences: dict[str, Estimate]) -> str:
    base, prompts = comparison.baseline, comparison.prompts
    better = [name for name, difference in differences.items() if difference.low > 0]
    worse = [name for name, difference in differences.items() if difference.high < 0]
    best = max(differences, key=lambda name: differences[name].mean)
    wins, kl = comparison.policies[best].win_rate, comparison.policies[best].kl
    gained = f"{interval(differences[best], '{:+.2f}')} reward"
    if wins:
        gained += f", {interval(wins, '{:.0%}')} wins"
    price = f" at a KL of {kl.mean:.2f} nats per sequence" if kl else ""
    if len(better) > 3:
        first = f"{len(better)} of {len(differences)} policies are better than {base} on {prompts:,} held-out prompts"
        return f"{first}, {best} most: {gained}{price}."
    if better:
        who = "is" if len(better) == 1 else "are"
        first = f"{names_in_words(better)} {who} better than {base} on {prompts:,} held-out prompts"
        first += f", {best} most" if len(better) > 1 else ""
        return f"{first}: {gained}{price}."
    told = f"No policy is better than {base} beyond chance on {prompts:,} held-out prompts"
    told += f" ({names_in_words(worse)} {'is' if len(worse) == 1 else 'are'} worse)" if worse else ""
    return f"{told}; {best} comes nearest: {gained}{price}."


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
    return "Nothing in its price is out of line, so more training, or a smaller `stage.args.beta`, is worth a try."


def _over_optimized(comparison: Comparison, name: str) -> str | None:
    result = comparison.policies[name]
    for proxy in comparison.proxies:
        gold, learned = gain_of(comparison, result, ""), gain_of(comparison, result, proxy)
        if gold is not None and learned is not None and learned > 0.25 and gold < learned / 2:
            return (
                f"{name} gained {learned:+.1f} standard deviations by `{proxy}` and {gold:+.1f} by the reward "
                "that counts: it is over-optimized, so raise its `stage.args.beta`, train it less, or refresh the "
                "reward model."
            )
    return None


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
    base = comparison.base.reward
    differences = {
        name: result.difference for name, result in comparison.others.items() if result.difference and result.reward
    }
    if differences and base:
        best = max(differences, key=lambda name: differences[name].mean)
        result = comparison.policies[best]
        facts[f"reward of {best}"] = f"{part_of(result.reward, 'mean'):.2f}"
        facts[f"reward of {comparison.baseline}"] = f"{base.mean:.2f}"
        if result.win_rate:
            facts[f"wins of {best}"] = f"{result.win_rate.mean:.0%}"
        if result.kl:
            facts[f"KL of {best}"] = f"{result.kl.mean:.2f}"
    return facts


# ---- Policy by policy ----


class Verdict(NamedTuple):
    """Whether to ship a policy (`ship`, `look`, `don't ship`), and why."""

    call: str
    reasons: list[str]


def policy_verdicts(comparison: Comparison) -> dict[str, Verdict]:
    """
    Return the verdict on each policy but the baseline.

    A policy that violates a constraint or is worse than the baseline, beyond chance, or that gained by the learned
    reward alone, is not to be shipped. One
    that is better beyond chance is, unless something is out of line that needs a look first: what it costs, best-of-n
    with more reward for the same KL, a judge who prefers the baseline, or another policy with more for no more KL.
    """
    return {name: _policy_verdict(comparison, name) for name in comparison.others}


def _policy_verdict(comparison: Comparison, name: str) -> Verdict:
    base, result = comparison.baseline, comparison.policies[name]
    difference = result.difference
    if difference is None:
        return Verdict(LOOK, [f"its reward could not be held beside that of {base}"])
    if violated := [f"{key} {each.bound}" for key, each in result.constraints.items() if each.is_violated]:
        return Verdict(DONT, [f"it violates {names_in_words(violated)} beyond chance"])
    if difference.high < 0:
        return Verdict(DONT, [f"it has less reward than {base}"])
    concerns = [found for check in (_over_optimized, _costly) if (found := check(comparison, name))]
    if not difference.low > 0:  # nor of a single prompt, which has no interval
        call = DONT if _over_optimized(comparison, name) else LOOK
        return Verdict(call, [f"no difference to {base} beyond chance on {comparison.prompts:,} prompts", *concerns])
    concerns += [
        f"the mean of {key} is beyond its bound {each.bound}, within chance"
        for key, each in result.constraints.items()
        if (each.excess or 0.0) > 0
    ]
    if result.win_rate and result.win_rate.high < 0.5:
        concerns.append(f"it has more reward, and {comparison.judge} prefers {base}")
    if (beside := beside_best_of_n(comparison, name)) and beside.is_below:
        concerns.append(f"the best of n samples of {base} has more reward for the same KL")
    for other in comparison.others:
        more = difference_of(comparison, other, name) if other != name else None
        if more and more.low > 0 and _is_no_further(comparison, other, name):
            concerns.append(f"{other} has more reward ({interval(more, '{:+.2f}')}), and no more KL beyond chance")
            break
    if concerns:
        return Verdict(LOOK, concerns)
    reasons = [f"better than {base} beyond chance, and nothing in its price is out of line"]
    if not comparison.proxies:
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
    base = comparison.baseline
    by = f" by {comparison.curves[-1].by}" if comparison.curves and comparison.curves[-1].by else ""
    rows, has_best = [], bool(comparison.curves)
    for name, (call, reasons) in found.items():
        beside = beside_best_of_n(comparison, name)
        row = [name, call, interval(comparison.policies[name].difference, "{:+.2f}")]
        if has_best:
            beyond = f"further than n = {beside.largest}" if beside else ""
            row += [interval(beside.difference, "{:+.2f}") or beyond if beside else "", beside.rank if beside else ""]
        rows.append([*row, "; ".join(reason.rstrip(".") for reason in reasons)])
    headers = ["policy", "verdict", f"reward vs {base} [95 %]"]
    headers += ["vs best of n, same KL [95 %]", "as good as best of"] if has_best else []
    note = f"Best of n is free of training: of n answers of {base} the best{by} is kept." if has_best else ""
    if len(found) > PAIRS_SHOWN:
        note += (
            f" Each interval holds by itself: of {len(found)} policies that are as good as {base}, about "
            f"{0.025 * len(found):.1g} would be called better by chance."
        )
    blocks = [Table([*headers, "why"], rows, note=note.strip())]
    if pairs := _pairs(comparison):
        blocks.append(Table(["policies", "difference in reward [95 %]", "reading"], pairs, "Between the policies."))
    return blocks


def _pairs(comparison: Comparison) -> list[list[str]]:
    """Return the differences between the policies; of many, those of the best one to the others."""
    names = [name for name, result in comparison.others.items() if result.reward]
    names.sort(key=lambda name: -(part_of(comparison.policies[name].reward, "mean") or 0.0))
    pairs = [(one, other) for i, one in enumerate(names) for other in names[i + 1 :]]
    if len(names) > PAIRS_SHOWN:
        pairs = [(names[0], other) for other in names[1:]]
    rows = []
    for one, other in pairs:
        if difference := difference_of(comparison, one, other):
            reading = f"{one} is better" if difference.low > 0 else "no difference beyond chance"
            rows.append([f"{one} - {other}", interval(difference, "{:+.2f}"), reading])
    return rows
