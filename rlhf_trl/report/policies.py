"""An evaluation as blocks of a page: the verdict, reward against KL, wins, what it cost, rewards, answers."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np

from rlhf_trl.report import plots
from rlhf_trl.report.page import Figure, Gap, SideBySide, Table, Text
from rlhf_trl.report.pareto import pareto
from rlhf_trl.report.plots import Series

ANSWERS_SHOWN = 10
Comparison = dict[str, Any]  # what `comparison.json` holds


# ---- The result in words ----


def verdict(comparison: Comparison) -> str:
    """Whether a policy is better than the baseline, and what to turn next: two sentences."""
    others = _others(comparison)
    if not others:
        return f"Only the baseline `{comparison['baseline']}` was evaluated. Add a policy: `+stage.policies.NAME=...`."
    others = {name: entry for name, entry in others.items() if entry["difference"]}
    if not others:
        base = comparison["baseline"]
        return f"No policy's reward could be held beside that of `{base}`, so whether one is better is open."
    return f"{_result(comparison, others)} {_next(comparison, others)}"


def _result(comparison: Comparison, others: dict[str, dict]) -> str:
    base, prompts = comparison["baseline"], comparison["prompts"]
    better = [name for name, entry in others.items() if entry["difference"]["low"] > 0]
    worse = [name for name, entry in others.items() if entry["difference"]["high"] < 0]
    best = max(others, key=lambda name: others[name]["difference"]["mean"])
    wins, kl = others[best]["win_rate"], others[best]["kl"]
    gained = f"{_interval(others[best]['difference'], '{:+.2f}')} reward"
    if wins:
        gained += f", {_interval(wins, '{:.0%}')} wins"
    price = f" at a KL of {kl['mean']:.2f} nats a sequence" if kl else ""
    if len(better) > 3:
        first = f"{len(better)} of {len(others)} policies are better than {base} on {prompts:,} held-out prompts"
        return f"{first}, {best} most: {gained}{price}."
    if better:
        who = "is" if len(better) == 1 else "are"
        first = f"{_names(better)} {who} better than {base} on {prompts:,} held-out prompts"
        first += f", {best} most" if len(better) > 1 else ""
        return f"{first}: {gained}{price}."
    told = f"No policy is better than {base} beyond chance on {prompts:,} held-out prompts"
    told += f" ({_names(worse)} {'is' if len(worse) == 1 else 'are'} worse)" if worse else ""
    return f"{told}; {best} comes nearest: {gained}{price}."


def _next(comparison: Comparison, others: dict[str, dict]) -> str:
    """The first thing in the evaluation that is out of line, and the knob for it."""
    base = comparison["policies"][comparison["baseline"]]
    for name, entry in others.items():
        for proxy in _proxies(comparison):
            gold, learned = _gain(comparison, entry, ""), _gain(comparison, entry, proxy)
            if gold is not None and learned is not None and learned > 0.25 and gold < learned / 2:
                return (
                    f"{name} gained {learned:+.1f} standard deviations by `{proxy}` and {gold:+.1f} by the reward "
                    "that counts: it is over-optimized, so raise its `stage.args.beta`, train it less, or refresh the "
                    "reward model."
                )
    for name, entry in others.items():
        if base["eos_rate"] - entry["eos_rate"] > 0.05:
            return (
                f"{name} ends {entry['eos_rate']:.0%} of its answers and {comparison['baseline']} "
                f"{base['eos_rate']:.0%}: set `stage.args.missing_eos_penalty`."
            )
        if entry.get("repetition", 0) - base.get("repetition", 0) > 0.1:
            return f"{name} repeats itself more than {comparison['baseline']}: raise its `stage.args.beta`."
        if entry["completion_length"] > 1.5 * base["completion_length"]:
            return (
                f"{name} writes {entry['completion_length'] / base['completion_length']:.1f} times as long as "
                f"{comparison['baseline']}: look at the wins at equal length, and at `stage.args.length_penalty`."
            )
    under = [name for name, entry in others.items() if _below_best_of_n(comparison, entry)]
    if under:
        by = f" by `{_curves(comparison)[-1]['by']}`" if _curves(comparison)[-1]["by"] else ""
        return (
            f"{_names(under)} {'is' if len(under) == 1 else 'are'} below what the best of n samples of "
            f"{comparison['baseline']}{by} gets for the same KL: train longer, or look at the reward model first."
        )
    return "Nothing in its price is out of line, so more training, or a smaller `stage.args.beta`, is worth a try."


def _below_best_of_n(comparison: Comparison, entry: dict) -> bool:
    curves = _curves(comparison)
    if not curves or not entry["kl"] or not entry["reward"]:
        return False
    # Chosen by what the policies were trained on, where that was measured
    points = [point for point in curves[-1]["points"] if point["reward"]]
    if not points:
        return False
    kl = entry["kl"]["mean"]
    if not points[0]["kl"] <= kl <= points[-1]["kl"]:
        return False
    reached = np.interp(kl, [point["kl"] for point in points], [point["reward"]["low"] for point in points])
    return entry["reward"]["high"] < reached


def headline(comparison: Comparison) -> dict[str, str]:
    """The numbers under the verdict."""
    facts = {"held-out prompts": f"{comparison['prompts']:,}", "policies": str(len(comparison["policies"]))}
    base = comparison["policies"][comparison["baseline"]]["reward"]
    others = {name: entry for name, entry in _others(comparison).items() if entry["difference"] and entry["reward"]}
    if others and base:
        best = max(others, key=lambda name: others[name]["difference"]["mean"])
        facts[f"reward of {best}"] = f"{others[best]['reward']['mean']:.2f}"
        facts[f"reward of {comparison['baseline']}"] = f"{base['mean']:.2f}"
        if others[best]["win_rate"]:
            facts[f"wins of {best}"] = f"{others[best]['win_rate']['mean']:.0%}"
        if others[best]["kl"]:
            facts[f"KL of {best}"] = f"{others[best]['kl']['mean']:.2f}"
    return facts


# ---- The evaluation ----


def frontier_blocks(comparison: Comparison) -> list:
    """Reward against KL: every policy, and the best of n as the curve to beat."""
    base, policies = comparison["baseline"], comparison["policies"]
    counted = [name for name, weight in comparison.get("weights", {}).items() if weight]
    kind = comparison.get("combine", "weighted_sum")
    said = " + ".join(counted) if kind == "weighted_sum" else f"{kind}: {', '.join(counted)}"
    reward = f"reward ({said})" if counted else "reward"
    shown = {name: entry for name, entry in policies.items() if entry["kl"] or name == base}
    series = [
        Series(
            f"best of n by {curve['by'] or 'the reward itself'}",
            x=[point["kl"] for point in curve["points"]],
            y=[_of(point["reward"], "mean") for point in curve["points"]],
            low=[_of(point["reward"], "low") for point in curve["points"]],
            high=[_of(point["reward"], "high") for point in curve["points"]],
            labels=[f"n={point['n']}" if point["n"] in (4, 16, 64) else "" for point in curve["points"]],
            color=7 - i,
        )
        for i, curve in enumerate(_curves(comparison))
    ]
    families = groupby(
        sorted(shown, key=lambda name: policies[name].get("family", name)), key=lambda n: policies[n].get("family", n)
    )
    members = {family: list(names) for family, names in families}
    for i, family in enumerate(sorted(members, key=lambda family: list(shown).index(members[family][0]))):
        names = sorted(members[family], key=lambda name: _kl(comparison, name))
        series.append(
            Series(
                family,
                x=[_kl(comparison, name) for name in names],
                y=[_of(policies[name]["reward"], "mean") for name in names],
                low=[_of(policies[name]["reward"], "low") for name in names],
                high=[_of(policies[name]["reward"], "high") for name in names],
                line=False,
                joined=True,
                color=i,
                # `ppo beta=0.1` of the sweep `ppo_sweep`, which the legend names
                labels=[name.removeprefix(f"{family.removesuffix('_sweep')} ") for name in names],
            )
        )
    blocks: list = [
        Figure(
            plots.frontier(series, "Reward against KL", f"KL to {base}, nats a sequence", reward, x_scale="sqrt"),
            "What each policy gained, and how far it went from its start for it; up and to the left is better. Bars "
            "and bands are 95 % intervals. The curves are the free frontier: drawing n answers and keeping the best, "
            "without any training.",
            wide=True,
        )
    ]
    blocks += _parting(comparison, shown)
    best = pareto(
        [_of(policies[name]["reward"], "mean") for name in policies], [_kl(comparison, name) for name in policies]
    )
    proxies = _proxies(comparison)
    blocks.append(
        Table(
            ["policy", "reward [95 %]", f"vs {base} [95 %]", *(f"{name}" for name in proxies), "KL"],
            [
                [
                    name,
                    _interval(entry["reward"], "{:.2f}"),
                    _interval(entry["difference"], "{:+.2f}"),
                    *(_interval(entry["reward_intervals"][proxy], "{:.2f}") for proxy in proxies),
                    _interval(entry["kl"], "{:.2f}"),
                ]
                for name, entry in policies.items()
            ],
            "Reward and its price.",
            marked=[i for i, is_best in enumerate(best) if is_best],
            note="Marked: no other policy has as much reward for as little KL."
            + (
                f" {comparison['left_out']} prompts are left out for want of a reward."
                if comparison["left_out"]
                else ""
            ),
        )
    )
    gaps = [text for entry in policies.values() for text in entry.get("gaps", {}).values()]
    blocks += [Gap(text) for text in dict.fromkeys(gaps)]
    if not _curves(comparison) and comparison.get("temperature") == 0:
        blocks.append(Gap("The best of n samples needs samples that differ. Type `stage.temperature=1`."))
    elif not _curves(comparison):
        blocks.append(Gap("The best of n samples was not measured. Type `stage.best_of_n=16` with `stage=evaluate`."))
    return blocks


def _parting(comparison: Comparison, shown: dict[str, dict]) -> list:
    """Gold and proxy rewards on one scale: where they part, the proxy is over-optimized."""
    proxies = _proxies(comparison)
    if not proxies:
        return [
            Gap(
                "Over-optimization shows as the parting of two rewards, and only one was measured. Add what the "
                "policies were trained on, with weight 0: `'reward=[demo,model]' reward.model.weight=0`."
            )
        ]
    series = []
    names = sorted(shown, key=lambda name: _kl(comparison, name))
    for i, reward in enumerate(["", *proxies]):
        title = reward or "the reward that counts"
        series.append(
            Series(
                title,
                x=[_kl(comparison, name) for name in names],
                y=[_gain(comparison, shown[name], reward) for name in names],
                line=False,
                hollow=bool(reward),
                color=i,
                labels=names if not reward else (),
            )
        )
    for curve in _curves(comparison)[1:]:
        x = [point["kl"] for point in curve["points"]]
        base = _base(comparison, "")
        y = [_scaled(_of(point["reward"], "mean"), *base) for point in curve["points"]]
        series.append(Series(f"best of n by {curve['by']}: the reward that counts", x=x, y=y, color=0))
        base = _base(comparison, curve["by"])
        y = [_scaled(point["chosen_by"], *base) for point in curve["points"]]
        color = 1 + proxies.index(curve["by"])
        series.append(Series(f"best of n by {curve['by']}: {curve['by']}", x=x, y=y, hollow=True, color=color))
    base = comparison["baseline"]
    return [
        Figure(
            plots.frontier(
                series, "Two rewards", f"KL to {base}, nats a sequence", "gain in standard deviations", x_scale="sqrt"
            ),
            f"The same policies by each reward, in standard deviations of {base}'s answers. As long as both rise, the "
            "learned reward is a good guide; where the hollow ones go on and the others don't, it is being fooled.",
            wide=True,
        )
    ]


def win_blocks(comparison: Comparison) -> list:
    """Who wins against the baseline, by which judge."""
    base, others = comparison["baseline"], {n: e for n, e in _others(comparison).items() if e["win_rate"]}
    unclear = {name: entry for name, entry in _others(comparison).items() if entry.get("unclear")}
    blocks: list = []
    if others:
        rates = [entry["win_rate"] for entry in others.values()]
        blocks.append(
            Figure(
                plots.bars(
                    list(others),
                    [rate["mean"] for rate in rates],
                    [rate["low"] for rate in rates],
                    [rate["high"] for rate in rates],
                    title="Win rates",
                    x_label=f"win rate against {base}",
                    middle=0.5,
                    form="{:.0%}",
                ),
                "Share of prompts on which a policy's answer is judged better; a tie counts half. Lines are 95 % "
                "intervals.",
            )
        )
    ranking = comparison.get("bradley_terry") or {}
    judged = any(entry.get("position_bias") is not None for entry in others.values())
    headers = ["policy", f"wins vs {base} [95 %]", "at equal length [95 %]", "ties"]
    headers += (["first wins", "orders agree"] if judged else []) + (["strength [95 %]"] if ranking else [])
    rows = []
    for name, entry in sorted(
        comparison["policies"].items(), key=lambda item: -(ranking.get(item[0]) or {"mean": 0})["mean"]
    ):
        row = [
            name,
            _interval(entry["win_rate"], "{:.0%}"),
            _interval(entry.get("length_controlled_win_rate"), "{:.0%}"),
            _share(entry.get("tie_rate")),
        ]
        row += [_share(entry.get("position_bias")), _share(entry.get("order_agreement"))] if judged else []
        rows.append(row + ([_interval(ranking.get(name), "{:+.2f}")] if ranking else []))
    note = (
        "At equal length: AlpacaEval 2's logistic regression on the difference in length (Dubois et al. 2024), "
        "without its term for the prompt."
    )
    if judged:
        note += " First wins: how often the judge names the answer it is shown first; 50 % is no position bias."
    if ranking:
        note += f" Strength: Bradley-Terry, where a beats b with probability sigmoid(a - b); {base} is 0."
    apart = [name for name in comparison["policies"] if ranking and not ranking.get(name)]
    blocks.append(Table(headers, rows, f"The judge is {comparison.get('judge', 'the reward')}.", note=note))
    blocks += [
        Gap(
            f"{entry['unclear']} of {entry['judgements']} judgements of {name} named neither answer nor a tie; they "
            "count for nobody."
        )
        for name, entry in unclear.items()
    ]
    if apart:
        blocks.append(
            Gap(f"No judgement leads from {_names(apart)} to {base}, so the strength on {base}'s scale is unknown.")
        )
    return blocks


def cost_blocks(comparison: Comparison) -> list:
    """KL, entropy, length and variety of each policy."""
    columns = (
        ("KL", lambda e: _number((e["kl"] or {}).get("mean"), "{:.2f}")),
        ("KL (k3)", lambda e: _number((e.get("kl_k3") or {}).get("mean"), "{:.2f}")),
        ("KL a token", lambda e: _number(e.get("kl_per_token"), "{:.3f}")),
        ("k3 a token", lambda e: _number(e.get("kl_k3_per_token"), "{:.3f}")),
        ("entropy", lambda e: _number(e.get("entropy"), "{:.2f}")),
        ("tokens", lambda e: _number(e["completion_length"], "{:.1f}")),
        ("EOS", lambda e: _share(e["eos_rate"])),
        ("distinct-1", lambda e: _number(e.get("distinct_1"), "{:.3f}")),
        ("distinct-2", lambda e: _number(e.get("distinct_2"), "{:.3f}")),
        ("repeated", lambda e: _share(e.get("repetition"))),
        ("perplexity", lambda e: _number(e.get("reference_perplexity"), "{:.2f}")),
    )
    policies = comparison["policies"]
    kept = [(name, read) for name, read in columns if any(read(entry) for entry in policies.values())]
    return [
        Table(
            ["policy", *(name for name, _ in kept)],
            [[name, *(read(entry) for _, read in kept)] for name, entry in policies.items()],
            note=f"KL to {comparison['baseline']} in nats, k1 and k3 on the policy's own answers, summed over a "
            "sequence and a token. Entropy in nats a token. Distinct-n: different n-grams of words among all. "
            "Repeated: 4-grams that an answer has had before. Perplexity: of the data's own answers, a token.",
        )
    ]


def distribution_blocks(comparison: Comparison) -> list:
    """Histograms of the rewards."""
    base, policies = comparison["baseline"], comparison["policies"]
    rewards = {
        name: [row["rewards"][name] for row in comparison["samples"] if row["rewards"][name] is not None]
        for name in policies
    }
    main = [name for name in policies if policies[name].get("family", name) == name]
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
    """The prompts on which the policies' rewards are furthest apart."""

    def disagreement(row: dict) -> float:
        values = [value for value in row["rewards"].values() if value is not None and np.isfinite(value)]
        return max(values) - min(values) if values else 0.0

    rows = sorted(comparison["samples"], key=disagreement, reverse=True)
    rows = [row for row in rows if len(set(row["completions"].values())) > 1][:ANSWERS_SHOWN]
    if not rows:
        return [Text("All policies gave the same answer to every prompt.")]
    shown = [
        SideBySide(
            row["prompt"],
            {
                f"{name} ({_number(row['rewards'][name], '{:.2f}') or 'no reward'})": text
                for name, text in row["completions"].items()
            },
            note=f"rewards differ by {disagreement(row):.2f}",
        )
        for row in rows
    ]
    return [Text(f"The {len(shown)} prompts on which the policies' rewards (in brackets) are furthest apart."), *shown]


# ---- Small helpers ----


def _others(comparison: Comparison) -> dict[str, dict]:
    return {name: entry for name, entry in comparison["policies"].items() if name != comparison["baseline"]}


def _proxies(comparison: Comparison) -> list[str]:
    """Rewards that are shown and don't count."""
    return [name for name, weight in comparison.get("weights", {}).items() if not weight]


def _curves(comparison: Comparison) -> list[dict]:
    return (comparison.get("best_of_n") or {}).get("curves") or []


def _kl(comparison: Comparison, name: str) -> float:
    kl = comparison["policies"][name]["kl"]
    return kl["mean"] if kl else 0.0 if name == comparison["baseline"] else float("nan")


def _base(comparison: Comparison, reward: str) -> tuple[float | None, float | None]:
    """Mean and standard deviation of a reward over the baseline's answers; `""`: of the weighted sum."""
    base = comparison["policies"][comparison["baseline"]]
    if reward:
        mean, std = base["rewards"][reward], base["reward_std"][reward]
    else:
        values = [row["rewards"][comparison["baseline"]] for row in comparison["samples"]]
        values = [value for value in values if value is not None]
        mean, std = (float(np.mean(values)), float(np.std(values))) if values else (None, None)
    return mean, std


def _gain(comparison: Comparison, entry: dict, reward: str) -> float | None:
    return _scaled(entry["rewards"][reward] if reward else _of(entry["reward"], "mean"), *_base(comparison, reward))


def _scaled(value: float | None, mean: float | None, std: float | None) -> float | None:
    """In standard deviations; `None` where one of the three is missing, or nothing varies."""
    return None if value is None or mean is None or not std else (value - mean) / std


def _of(estimate: dict | None, part: str) -> float | None:
    """The mean, or an end of the interval, of an estimate; `None` where it could not be made."""
    return estimate and estimate[part]


def _interval(estimate: dict | None, form: str) -> str:
    if estimate is None:
        return ""
    mean, low, high = (_number(estimate[key], form) for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]" if low and high else mean


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _share(value: float | None) -> str:
    return _number(value, "{:.0%}")


def _names(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
