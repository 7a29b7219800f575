"""Blocks of a page that show a comparison of policies."""

from collections.abc import Callable, Sequence

from rlhf_trl.report import plots
from rlhf_trl.report.measures import (
    base_of,
    curve_color,
    gain_of,
    has_interval,
    is_rewarded,
    kl_of,
    names_in_words,
    part_of,
    policy_colors,
    scaled,
    share,
)
from rlhf_trl.report.page import Figure, Missing, Table
from rlhf_trl.report.pareto import pareto
from rlhf_trl.report.plots import Series
from rlhf_trl.report.text import interval, number
from rlhf_trl.runs.results import Comparison, Estimate, PolicyResult


def frontier_blocks(comparison: Comparison) -> list:
    """Return reward against KL: every policy, and the best of n as the curve to beat."""
    if not is_rewarded(comparison):
        tables = [_reward_table(comparison), *_constraint_tables(comparison)] if comparison.weights else []
        return [_unrewarded(comparison), *tables, *map(Missing, dict.fromkeys(_missing(comparison)))]
    return [
        frontier_figure(comparison),
        *_over_optimization(comparison, _placed(comparison)),
        _reward_table(comparison),
        *_constraint_tables(comparison),
        *_not_measured(comparison),
    ]


def _unrewarded(comparison: Comparison) -> Missing:
    found, option = "none was measured", "reward=..."
    if comparison.weights:
        found, option = f"of {names_in_words(list(comparison.weights))} none has one", "reward.NAME.weight=1"
    return Missing(
        "Reward against KL, and best-of-n, need a reward of a weight other than 0, and "
        f"{found}. Set `{option}` with `stage=evaluate`."
    )


def _placed(comparison: Comparison) -> list[str]:
    """Return the policies that have a place on an axis of KL."""
    return [name for name, result in comparison.policies.items() if result.kl or name == comparison.baseline]


def frontier_figure(comparison: Comparison) -> Figure:
    """Return reward against KL: every policy, and the best-of-n curves."""
    series = [*_best_of_n_series(comparison), *_family_series(comparison, _placed(comparison))]
    x_label = f"KL to {comparison.baseline}, nats per sequence"
    base = comparison.baseline
    caption = f"What each policy gained, and how far it went from {base} for it; up and to the left is better."
    if any(has_interval(comparison.policies[name].reward) for name in _placed(comparison)):
        caption += f" Bars{' and bands' if comparison.curves else ''} are 95 % intervals."
    if comparison.curves:
        which = "curves are" if len(comparison.curves) > 1 else "curve is"
        caption += f" The {which} the free frontier: drawing n answers and keeping the best, without any training."
    if unplaced := [name for name in comparison.policies if name not in _placed(comparison)]:
        caption += f" Without a KL, and so not drawn: {', '.join(unplaced)}."
    return Figure(
        plots.frontier(series, "Reward against KL", x_label, _reward_label(comparison), x_scale="sqrt"),
        caption,
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
            y=[part_of(point.reward, "mean") for point in curve.points],
            low=[part_of(point.reward, "low") for point in curve.points],
            high=[part_of(point.reward, "high") for point in curve.points],
            labels=[f"n={point.n}" if point.n in (4, 16, 64) else "" for point in curve.points],
            color=curve_color(i),
        )
        for i, curve in enumerate(comparison.curves)
    ]


def _family_series(comparison: Comparison, shown: Sequence[str]) -> list[Series]:
    """Return the points of each run and its checkpoints, or of the runs of a sweep, by KL."""
    policies, colors = comparison.policies, policy_colors(comparison)
    members: dict[str, list[str]] = {}
    for name in shown:
        members.setdefault(policies[name].family or name, []).append(name)
    series = []
    for family, names in members.items():
        names = sorted(names, key=lambda name: kl_of(comparison, name))
        rewards = [policies[name].reward for name in names]
        series.append(
            Series(
                family,
                x=[kl_of(comparison, name) for name in names],
                y=[part_of(reward, "mean") for reward in rewards],
                low=[part_of(reward, "low") for reward in rewards],
                high=[part_of(reward, "high") for reward in rewards],
                line=False,
                joined=True,
                color=colors[names[0]],
                # `ppo beta=0.1` of the sweep `ppo_sweep`, which the legend names
                labels=[name.removeprefix(f"{family.removesuffix('_sweep')} ") for name in names],
            )
        )
    return series


def _reward_table(comparison: Comparison) -> Table:
    base, policies, proxies = comparison.baseline, comparison.policies, comparison.proxies
    if not is_rewarded(comparison):
        rows = [
            [
                name,
                *(interval(result.reward_intervals[proxy], "{:.2f}") for proxy in proxies),
                interval(result.kl, "{:.2f}"),
            ]
            for name, result in policies.items()
        ]
        return Table(["policy", *proxies, "KL"], rows, "Rewards of weight 0.")
    best = pareto(
        [part_of(result.reward, "mean") for result in policies.values()],
        [kl_of(comparison, name) for name in policies],
    )
    if all(best):
        best = []  # nothing to set off
    note = ["Marked: no other policy has as much reward for as little KL."] if any(best) else []
    if comparison.dropped:
        note.append(f"{comparison.dropped} prompts are dropped, as they have no reward.")
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
        note=" ".join(note),
    )


def _constraint_tables(comparison: Comparison) -> list[Table]:
    """Return which policies satisfy the constraints on the means of rewards, where any were asked for."""
    rows = [
        [
            name,
            f"{reward} {each.bound}",
            interval(each.value, "{:.2f}"),
            each.reading,
            share(each.violation_rate),
        ]
        for name, result in comparison.policies.items()
        for reward, each in result.constraints.items()
    ]
    if not rows:
        return []
    note = "Violating answers: the share of single answers beyond the bound; a bound of the mean lets some of them be."
    headers = ["policy", "constraint", "mean [95 %]", "the mean's bound is", "violating answers"]
    return [Table(headers, rows, "Constraints on the means of rewards.", note=note)]


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
    return [_two_rewards(comparison, shown, proxy) for proxy in proxies]


def _two_rewards(comparison: Comparison, shown: Sequence[str], proxy: str) -> Figure | Missing:
    base = comparison.baseline
    for reward, words in (("", "the reward that counts"), (proxy, f"`{proxy}`")):
        if not base_of(comparison, reward)[1]:
            return Missing(
                f"Gains are shown in standard deviations over the answers of {base}, and {words} is the same for all "
                "of these."
            )
    names, colors = sorted(shown, key=lambda name: kl_of(comparison, name)), policy_colors(comparison)
    series = [
        Series(
            f"by {reward}" if reward else "by the reward that counts",
            x=[kl_of(comparison, name)],
            y=[gain_of(comparison, comparison.policies[name], reward)],
            line=False,
            hollow=bool(reward),
            color=colors[name],
            labels=[name] if not reward else (),
        )
        for reward in ("", proxy)
        for name in names
    ]
    for i, curve in enumerate(comparison.curves):
        if curve.by != proxy:
            continue
        x, color = [point.kl for point in curve.points], curve_color(i)
        counted = [scaled(part_of(point.reward, "mean"), *base_of(comparison, "")) for point in curve.points]
        chosen_by = [scaled(point.chosen_by, *base_of(comparison, proxy)) for point in curve.points]
        series.append(Series(f"best of n by {proxy}: the reward that counts", x=x, y=counted, color=color))
        series.append(Series(f"best of n by {proxy}: {proxy}", x=x, y=chosen_by, hollow=True, color=color))
    lines = f" Lines: the best of n by `{proxy}`." if any(curve.by == proxy for curve in comparison.curves) else ""
    return Figure(
        plots.frontier(
            series,
            f"Two rewards: {proxy}",
            f"KL to {base}, nats per sequence",
            "gain in standard deviations",
            x_scale="sqrt",
        ),
        f"The same policies by the reward that counts (filled) and by `{proxy}` (hollow), in standard deviations of "
        f"{base}'s answers. As long as both rise, `{proxy}` is a good guide; where only the hollow ones keep rising, "
        f"it is being fooled.{lines}",
        wide=True,
    )


def win_blocks(comparison: Comparison) -> list:
    """Return who wins against the baseline, by which judge."""
    rates = {name: result.win_rate for name, result in comparison.others.items() if result.win_rate}
    blocks: list = [_win_figure(comparison, rates)] if rates else []
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
                f"No judgement leads from {names_in_words(apart)} to {base}, so the strength on the scale of {base} "
                "is unknown."
            )
        )
    return blocks


def _win_figure(comparison: Comparison, rates: dict[str, Estimate]) -> Figure:
    base, colors = comparison.baseline, policy_colors(comparison)
    bars = " Lines are 95 % intervals." if any(map(has_interval, rates.values())) else ""
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
            colors=[colors[name] for name in rates],
        ),
        f"Share of prompts on which a policy's answer is judged better; a tie counts half.{bars}",
    )


def _win_table(comparison: Comparison) -> Table:
    base, ranking = comparison.baseline, comparison.bradley_terry
    judged = any(result.win_rate and result.position_bias is not None for result in comparison.others.values())
    headers = ["policy", f"wins vs {base} [95 %]", "at equal length [95 %]", "ties"]
    headers += (["first wins", "orders agree"] if judged else []) + (["strength [95 %]"] if ranking else [])
    rows = []
    for name, result in comparison.policies.items():
        row = [name, interval(result.win_rate, "{:.0%}"), interval(result.length_controlled_win_rate, "{:.0%}")]
        row.append(share(result.tie_rate))
        row += [share(result.position_bias), share(result.order_agreement)] if judged else []
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
        ("KL", lambda each: number(part_of(each.kl, "mean"), "{:.2f}")),
        ("KL (k3)", lambda each: number(part_of(each.kl_k3, "mean"), "{:.2f}")),
        ("KL per token", lambda each: number(each.kl_per_token, "{:.3f}")),
        ("k3 per token", lambda each: number(each.kl_k3_per_token, "{:.3f}")),
        ("entropy", lambda each: number(each.entropy, "{:.2f}")),
        ("tokens", lambda each: number(each.completion_length, "{:.1f}")),
        ("EOS", lambda each: share(each.eos_rate)),
        ("distinct-1", lambda each: number(each.distinct_1, "{:.3f}")),
        ("distinct-2", lambda each: number(each.distinct_2, "{:.3f}")),
        ("repeated", lambda each: share(each.repetition)),
        ("perplexity", lambda each: number(each.reference_perplexity, "{:.2f}")),
        ("baseline's perplexity", lambda each: number(each.baseline_perplexity, "{:.2f}")),
    )
    policies = comparison.policies
    kept = [(name, read) for name, read in columns if any(read(result) for result in policies.values())]
    return [
        Table(
            ["policy", *(name for name, _ in kept)],
            [[name, *(read(result) for _, read in kept)] for name, result in policies.items()],
            note=f"KL to {comparison.baseline} in nats, k1 and k3 on the policy's own answers, summed over a "
            "sequence and per token. Entropy in nats per token. Distinct-n: different n-grams of words among all. "
            "Repeated: 4-grams that an answer has had before. Perplexity: of the data's own answers, a token; the "
            f"baseline's: of the policy's answers under {comparison.baseline}, which is high where they are no text "
            "that it would write.",
        )
    ]
