"""Blocks of a page that show a comparison of policies."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rlhf_trl.report import plots
from rlhf_trl.report.page import Figure, Missing, SideBySide, Table, Text
from rlhf_trl.report.pareto import pareto
from rlhf_trl.report.plots import Series
from rlhf_trl.report.text import interval, number
from rlhf_trl.runs.results import Comparison, Estimate, PolicyResult, PromptSample

ANSWERS_SHOWN = 10


# ---- The result in words ----


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
        first = f"{_names(better)} {who} better than {base} on {prompts:,} held-out prompts"
        first += f", {best} most" if len(better) > 1 else ""
        return f"{first}: {gained}{price}."
    told = f"No policy is better than {base} beyond chance on {prompts:,} held-out prompts"
    told += f" ({_names(worse)} {'is' if len(worse) == 1 else 'are'} worse)" if worse else ""
    return f"{told}; {best} comes nearest: {gained}{price}."


def _next(comparison: Comparison, names: Sequence[str]) -> str:
    """Return the first thing in the evaluation that is out of line, and the option for it."""
    for check in (_over_optimized, _costly):
        for name in names:
            if said := check(comparison, name):
                return said
    under = [name for name in names if _is_below_best_of_n(comparison, comparison.policies[name])]
    if under:
        chosen_by = comparison.curves[-1].by
        by = f" by `{chosen_by}`" if chosen_by else ""
        return (
            f"{_names(under)} {'is' if len(under) == 1 else 'are'} below what the best of n samples of "
            f"{comparison.baseline}{by} gets for the same KL: train longer, or look at the reward model first."
        )
    return "Nothing in its price is out of line, so more training, or a smaller `stage.args.beta`, is worth a try."


def _over_optimized(comparison: Comparison, name: str) -> str | None:
    result = comparison.policies[name]
    for proxy in comparison.proxies:
        gold, learned = _gain(comparison, result, ""), _gain(comparison, result, proxy)
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


def _is_below_best_of_n(comparison: Comparison, result: PolicyResult) -> bool:
    if not comparison.curves or not result.kl or not result.reward:
        return False
    # Chosen by what the policies were trained on, where that was measured
    points = [(point.kl, point.reward.low) for point in comparison.curves[-1].points if point.reward]
    if not points or not points[0][0] <= result.kl.mean <= points[-1][0]:
        return False
    kl, low = zip(*points, strict=True)
    return bool(result.reward.high < np.interp(result.kl.mean, kl, low))


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
        facts[f"reward of {best}"] = f"{_of(result.reward, 'mean'):.2f}"
        facts[f"reward of {comparison.baseline}"] = f"{base.mean:.2f}"
        if result.win_rate:
            facts[f"wins of {best}"] = f"{result.win_rate.mean:.0%}"
        if result.kl:
            facts[f"KL of {best}"] = f"{result.kl.mean:.2f}"
    return facts


# ---- The evaluation ----


def frontier_blocks(comparison: Comparison) -> list:
    """Return reward against KL: every policy, and the best of n as the curve to beat."""
    shown = [name for name, result in comparison.policies.items() if result.kl or name == comparison.baseline]
    return [
        _frontier(comparison, shown),
        *_over_optimization(comparison, shown),
        _reward_table(comparison),
        *_not_measured(comparison),
    ]


def _frontier(comparison: Comparison, shown: Sequence[str]) -> Figure:
    series = [*_best_of_n_series(comparison), *_family_series(comparison, shown)]
    x_label = f"KL to {comparison.baseline}, nats per sequence"
    return Figure(
        plots.frontier(series, "Reward against KL", x_label, _reward_label(comparison), x_scale="sqrt"),
        "What each policy gained, and how far it went from its start for it; up and to the left is better. Bars "
        "and bands are 95 % intervals. The curves are the free frontier: drawing n answers and keeping the best, "
        "without any training.",
        wide=True,
    )


def _reward_label(comparison: Comparison) -> str:
    counted = [name for name, weight in comparison.weights.items() if weight]
    kind = comparison.combine
    said = " + ".join(counted) if kind == "weighted_sum" else f"{kind}: {', '.join(counted)}"
    return f"reward ({said})" if counted else "reward"


def _best_of_n_series(comparison: Comparison) -> list[Series]:
    return [
        Series(
            f"best of n by {curve.by or 'the reward itself'}",
            x=[point.kl for point in curve.points],
            y=[_of(point.reward, "mean") for point in curve.points],
            low=[_of(point.reward, "low") for point in curve.points],
            high=[_of(point.reward, "high") for point in curve.points],
            labels=[f"n={point.n}" if point.n in (4, 16, 64) else "" for point in curve.points],
            color=7 - i,
        )
        for i, curve in enumerate(comparison.curves)
    ]


def _family_series(comparison: Comparison, shown: Sequence[str]) -> list[Series]:
    """Return the points of each run and its checkpoints, or of the runs of a sweep, by KL."""
    policies = comparison.policies
    members: dict[str, list[str]] = {}
    for name in shown:
        members.setdefault(policies[name].family or name, []).append(name)
    series = []
    for i, (family, names) in enumerate(members.items()):
        names = sorted(names, key=lambda name: _kl(comparison, name))
        rewards = [policies[name].reward for name in names]
        series.append(
            Series(
                family,
                x=[_kl(comparison, name) for name in names],
                y=[_of(reward, "mean") for reward in rewards],
                low=[_of(reward, "low") for reward in rewards],
                high=[_of(reward, "high") for reward in rewards],
                line=False,
                joined=True,
                color=i,
                # `ppo beta=0.1` of the sweep `ppo_sweep`, which the legend names
                labels=[name.removeprefix(f"{family.removesuffix('_sweep')} ") for name in names],
            )
        )
    return series


def _reward_table(comparison: Comparison) -> Table:
    base, policies, proxies = comparison.baseline, comparison.policies, comparison.proxies
    best = pareto(
        [_of(result.reward, "mean") for result in policies.values()], [_kl(comparison, name) for name in policies]
    )
    return Table(
        ["policy", "reward [95 %]", f"vs {base} [95 %]", *proxies, "KL"],
        [
            [
                name,
                interval(result.reward, "{:.2f}"),
                interval(result.difference, "{:+.2f}"),
                *(interval(result.reward_intervals[proxy], "{:.2f}") for proxy in proxies),
                interval(result.kl, "{:.2f}"),
            ]
            for name, result in policies.items()
        ],
        "Reward and its price.",
        marked=[i for i, is_best in enumerate(best) if is_best],
        note="Marked: no other policy has as much reward for as little KL."
        + (f" {comparison.dropped} prompts are dropped, as they have no reward." if comparison.dropped else ""),
    )


def _not_measured(comparison: Comparison) -> list[Missing]:
    blocks = [Missing(text) for text in dict.fromkeys(_missing(comparison))]
    if not comparison.curves and comparison.temperature == 0:
        blocks.append(Missing("The best of n samples needs samples that differ. Set `stage.temperature=1`."))
    elif not comparison.curves:
        blocks.append(
            Missing("The best of n samples was not measured. Set `stage.best_of_n=16` with `stage=evaluate`.")
        )
    return blocks


def _missing(comparison: Comparison) -> list[str]:
    return [text for result in comparison.policies.values() for text in result.missing.values()]


def _over_optimization(comparison: Comparison, shown: Sequence[str]) -> list:
    """Return gold and proxy rewards on one scale: where they part, the proxy is over-optimized."""
    proxies = comparison.proxies
    if not proxies:
        return [
            Missing(
                "Over-optimization shows as the parting of two rewards, and only one was measured. Add what the "
                "policies were trained on, with weight 0: `'reward=[demo,model]' reward.model.weight=0`."
            )
        ]
    names = sorted(shown, key=lambda name: _kl(comparison, name))
    series = [
        Series(
            reward or "the reward that counts",
            x=[_kl(comparison, name) for name in names],
            y=[_gain(comparison, comparison.policies[name], reward) for name in names],
            line=False,
            hollow=bool(reward),
            color=i,
            labels=names if not reward else (),
        )
        for i, reward in enumerate(["", *proxies])
    ]
    for curve in comparison.curves[1:]:
        x = [point.kl for point in curve.points]
        base = _base(comparison, "")
        y = [_scaled(_of(point.reward, "mean"), *base) for point in curve.points]
        series.append(Series(f"best of n by {curve.by}: the reward that counts", x=x, y=y, color=0))
        base = _base(comparison, curve.by)
        y = [_scaled(point.chosen_by, *base) for point in curve.points]
        color = 1 + proxies.index(curve.by)
        series.append(Series(f"best of n by {curve.by}: {curve.by}", x=x, y=y, hollow=True, color=color))
    base = comparison.baseline
    return [
        Figure(
            plots.frontier(
                series,
                "Two rewards",
                f"KL to {base}, nats per sequence",
                "gain in standard deviations",
                x_scale="sqrt",
            ),
            f"The same policies by each reward, in standard deviations of {base}'s answers. As long as both rise, the "
            "learned reward is a good guide; where only the hollow ones keep rising, it is being fooled.",
            wide=True,
        )
    ]


def win_blocks(comparison: Comparison) -> list:
    """Return who wins against the baseline, by which judge."""
    rates = {name: result.win_rate for name, result in comparison.others.items() if result.win_rate}
    blocks: list = [_win_figure(comparison.baseline, rates)] if rates else []
    blocks.append(_win_table(comparison))
    blocks += [
        Missing(
            f"{result.unclear} of {result.judgements} judgements of {name} named neither answer nor a tie; they "
            "count for nobody."
        )
        for name, result in comparison.others.items()
        if result.unclear
    ]
    ranking = comparison.bradley_terry
    if apart := [name for name in comparison.policies if ranking and not ranking.get(name)]:
        base = comparison.baseline
        blocks.append(
            Missing(
                f"No judgement leads from {_names(apart)} to {base}, so the strength on {base}'s scale is unknown."
            )
        )
    return blocks


def _win_figure(base: str, rates: dict[str, Estimate]) -> Figure:
    return Figure(
        plots.bars(
            list(rates),
            [rate.mean for rate in rates.values()],
            [rate.low for rate in rates.values()],
            [rate.high for rate in rates.values()],
            title="Win rates",
            x_label=f"win rate against {base}",
            middle=0.5,
            form="{:.0%}",
        ),
        "Share of prompts on which a policy's answer is judged better; a tie counts half. Lines are 95 % intervals.",
    )


def _win_table(comparison: Comparison) -> Table:
    base, ranking = comparison.baseline, comparison.bradley_terry
    judged = any(result.win_rate and result.position_bias is not None for result in comparison.others.values())
    headers = ["policy", f"wins vs {base} [95 %]", "at equal length [95 %]", "ties"]
    headers += (["first wins", "orders agree"] if judged else []) + (["strength [95 %]"] if ranking else [])
    strengths = {name: _of(ranking.get(name), "mean") or 0.0 for name in comparison.policies}
    rows = []
    for name in sorted(comparison.policies, key=lambda name: -strengths[name]):
        result = comparison.policies[name]
        row = [name, interval(result.win_rate, "{:.0%}"), interval(result.length_controlled_win_rate, "{:.0%}")]
        row.append(_share(result.tie_rate))
        row += [_share(result.position_bias), _share(result.order_agreement)] if judged else []
        rows.append(row + ([interval(ranking.get(name), "{:+.2f}")] if ranking else []))
    note = (
        "At equal length: AlpacaEval 2's logistic regression on the difference in length (Dubois et al. 2024), "
        "without its term for the prompt."
    )
    if judged:
        note += " First wins: how often the judge names the answer it is shown first; 50 % is no position bias."
    if ranking:
        note += f" Strength: Bradley-Terry, where a beats b with probability sigmoid(a - b); {base} is 0."
    return Table(headers, rows, f"The judge is {comparison.judge}.", note=note)


def cost_blocks(comparison: Comparison) -> list:
    """Return KL, entropy, length and variety of each policy."""
    columns: tuple[tuple[str, Callable[[PolicyResult], str]], ...] = (
        ("KL", lambda each: number(_of(each.kl, "mean"), "{:.2f}")),
        ("KL (k3)", lambda each: number(_of(each.kl_k3, "mean"), "{:.2f}")),
        ("KL per token", lambda each: number(each.kl_per_token, "{:.3f}")),
        ("k3 per token", lambda each: number(each.kl_k3_per_token, "{:.3f}")),
        ("entropy", lambda each: number(each.entropy, "{:.2f}")),
        ("tokens", lambda each: number(each.completion_length, "{:.1f}")),
        ("EOS", lambda each: _share(each.eos_rate)),
        ("distinct-1", lambda each: number(each.distinct_1, "{:.3f}")),
        ("distinct-2", lambda each: number(each.distinct_2, "{:.3f}")),
        ("repeated", lambda each: _share(each.repetition)),
        ("perplexity", lambda each: number(each.reference_perplexity, "{:.2f}")),
    )
    policies = comparison.policies
    kept = [(name, read) for name, read in columns if any(read(result) for result in policies.values())]
    return [
        Table(
            ["policy", *(name for name, _ in kept)],
            [[name, *(read(result) for _, read in kept)] for name, result in policies.items()],
            note=f"KL to {comparison.baseline} in nats, k1 and k3 on the policy's own answers, summed over a "
            "sequence and per token. Entropy in nats per token. Distinct-n: different n-grams of words among all. "
            "Repeated: 4-grams that an answer has had before. Perplexity: of the data's own answers, a token.",
        )
    ]


def distribution_blocks(comparison: Comparison) -> list:
    """Return histograms and quantiles of the rewards."""
    base, policies = comparison.baseline, comparison.policies
    rewards = {
        name: [value for sample in comparison.samples if (value := sample.rewards[name]) is not None]
        for name in policies
    }
    main = [name for name, result in policies.items() if (result.family or name) == name]
    blocks: list = [
        Figure(
            plots.histogram({base: rewards[base], name: rewards[name]}, f"Rewards of {base} and {name}", "reward"),
            f"{base} and {name}; the upright lines are the means.",
        )
        for name in main
        if name != base
    ]
    rows = [
        [
            name,
            *(f"{value:.2f}" for value in np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95])),
            f"{np.mean(values):.2f}",
        ]
        for name, values in rewards.items()
        if values
    ]
    return [
        *blocks,
        Table(["policy", "5 %", "25 %", "median", "75 %", "95 %", "mean"], rows, "Quantiles of the reward."),
    ]


def answer_blocks(comparison: Comparison) -> list:
    """Return the prompts on which the policies' rewards are furthest apart."""

    def spread(sample: PromptSample) -> float:
        values = [value for value in sample.rewards.values() if value is not None]
        return max(values) - min(values) if values else 0.0

    samples = sorted(comparison.samples, key=spread, reverse=True)
    samples = [sample for sample in samples if len(set(sample.completions.values())) > 1][:ANSWERS_SHOWN]
    if not samples:
        return [Text("All policies gave the same answer to every prompt.")]
    shown = [
        SideBySide(
            sample.prompt,
            {
                f"{name} ({number(sample.rewards[name], '{:.2f}') or 'no reward'})": text
                for name, text in sample.completions.items()
            },
            note=f"rewards differ by {spread(sample):.2f}",
        )
        for sample in samples
    ]
    return [Text(f"The {len(shown)} prompts on which the policies' rewards (in brackets) are furthest apart."), *shown]


# ---- Small helpers ----


def known(comparison: Comparison) -> Comparison:
    """Return the comparison with `None` in place of estimates without a mean, which could not be made."""

    def without(value: Any) -> Any:
        if isinstance(value, dict):
            is_unknown = "mean" in value and value["mean"] is None
            return None if is_unknown else {key: without(item) for key, item in value.items()}
        return [without(item) for item in value] if isinstance(value, list) else value

    return Comparison.from_json(without(comparison.to_json()))


def _kl(comparison: Comparison, name: str) -> float:
    kl = comparison.policies[name].kl
    return kl.mean if kl else 0.0 if name == comparison.baseline else float("nan")


def _base(comparison: Comparison, reward: str) -> tuple[float | None, float | None]:
    """Return mean and standard deviation of a reward over the baseline's answers; `""` is the combined reward."""
    if reward:
        return comparison.base.rewards[reward], comparison.base.reward_std[reward]
    rewards = [sample.rewards[comparison.baseline] for sample in comparison.samples]
    values = [value for value in rewards if value is not None]
    return (float(np.mean(values)), float(np.std(values))) if values else (None, None)


def _gain(comparison: Comparison, result: PolicyResult, reward: str) -> float | None:
    value = result.rewards[reward] if reward else _of(result.reward, "mean")
    return _scaled(value, *_base(comparison, reward))


def _scaled(value: float | None, mean: float | None, std: float | None) -> float | None:
    """Return a value in standard deviations; `None` where one of the three is missing, or nothing varies."""
    return None if value is None or mean is None or not std else (value - mean) / std


def _of(estimate: Estimate | None, part: str) -> float | None:
    """Return the mean, or an end of the interval, of an estimate; `None` where it could not be made."""
    return None if estimate is None else getattr(estimate, part)


def _share(value: float | None) -> str:
    return number(value, "{:.0%}")


def _names(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
