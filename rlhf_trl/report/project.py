"""
The report of a project: whether alignment worked, at what price, and what to turn next (`runs/<project>/report`).

It is made from what the runs and the last evaluation left on disk, so it can be made anew at any time
(`stage=report`). What is not there is said, with the command that makes it.
"""

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from omegaconf import DictConfig

from rlhf_trl.evaluation.statistics import pareto
from rlhf_trl.evaluation.tables import duration
from rlhf_trl.report import plots
from rlhf_trl.report.page import Code, Details, Figure, Gap, Page, Section, SideBySide, Table, Text, write_page
from rlhf_trl.report.plots import Series
from rlhf_trl.report.records import Run, read_json, read_runs
from rlhf_trl.report.reward_page import summary_table

ANSWERS_SHOWN = 10
# Training curves: the title of a figure, how to read it, and its metrics by their name in the legend. What a run
# didn't log is left out, and of several with one title the first is shown.
CURVES = (
    (
        "reward",
        "Held out it should rise as well.",
        {"rollouts": "objective/scores", "held out": "eval_objective/scores"},
    ),
    ("reward", "Held out it should rise as well.", {"rollouts": "reward", "held out": "eval_reward"}),
    (
        "KL to the start, nats a sequence",
        "How far the policy went; one that grows without end is being pulled by the reward alone.",
        {"rollouts": "objective/kl", "held out": "eval_objective/kl"},
    ),
    ("KL to the start, nats a token", "How far the policy went.", {"rollouts": "kl"}),
    ("accuracy", "Training far above held out is overfitting.", {"training": "accuracy", "held out": "eval_accuracy"}),
    (
        "accuracy",
        "Share of pairs whose chosen answer the policy prefers, next to its start; there it is 0, as all are ties.",
        {"training": "rewards/accuracies", "held out": "eval_rewards/accuracies"},
    ),
    (
        "margin of the rewards",
        "By how much it prefers the chosen answer.",
        {"training": "rewards/margins", "held out": "eval_rewards/margins"},
    ),
    ("entropy, nats a token", "Near 0 the policy has stopped exploring.", {"rollouts": "policy/entropy"}),
    (
        "tokens a completion",
        "A steady drift means that length is being rewarded.",
        {"rollouts": "completions/mean_length", "held out": "eval_completions/mean_length"},
    ),
    (
        "explained variance of the critic",
        "1 is perfect; at 0 it explains nothing.",
        {"rollouts": "value/explained_variance"},
    ),
    ("clip fraction", "Above 0.3 the steps are too large.", {"rollouts": "policy/clipfrac"}),
    ("loss", "Training far below held out is overfitting.", {"training": "loss", "held out": "eval_loss"}),
)
RL_ONLY_NOISE = "objective/kl"  # where it is logged, the loss of a policy gradient says nothing


def report(cfg: DictConfig) -> None:
    """
    `stage=report`: makes the report of `cfg.project` anew.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if the project has no run.
    """
    from accelerate import PartialState

    if PartialState().is_main_process:
        print(f"Report: {write_report(Path(cfg.runs_dir, cfg.project))}")


def write_report(project_dir: str | Path) -> Path:
    """
    Writes `report/index.html` and `report/report.md` into a project's folder; returns the path of the first.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if the project has no run.
    """
    project_dir = Path(project_dir)
    return write_page(project_page(project_dir), project_dir / "report")


def project_page(project_dir: Path) -> Page:
    """The page of a project."""
    from rlhf_trl.errors import ConfigError

    runs, comparison = read_runs(project_dir), read_json(project_dir / "comparison.json")
    if not runs:
        raise ConfigError(
            f"There is nothing to report: `{project_dir}` holds no run. Type `project=...` with one that does."
        )
    sections, facts = [], {}
    if comparison:
        lead = verdict(comparison)
        facts = headline(comparison)
        sections += [
            Section("Reward and KL", frontier_blocks(comparison)),
            Section("Wins", win_blocks(comparison)),
            Section("What it cost", cost_blocks(comparison)),
            Section("Rewards before and after", distribution_blocks(comparison)),
            Section("Answers", answer_blocks(comparison)),
        ]
    else:
        command = f"accelerate launch train.py stage=evaluate project={project_dir.name}"
        lead = (
            f"The policies of this project were not evaluated, so whether training helped is open. Type `{command}`."
        )
        sections.append(Section("Evaluation", [Gap(f"There is no `comparison.json`. Type `{command}`.")]))
    sections += [
        Section("Training", training_blocks(runs)),
        Section("Reward model", reward_model_blocks(runs, project_dir.name)),
        Section("Runs", run_blocks(runs)),
    ]
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    version = runs[-1].record.get("versions", {}).get("rlhf_trl", "")
    return Page(
        title=project_dir.resolve().name,
        kicker="Alignment report",
        lead=lead,
        facts=facts,
        sections=sections,
        footer=f"Made {made} by rlhf_trl {version} from {project_dir}.",
    )


# ---- The result in words ----


def verdict(comparison: dict[str, Any]) -> str:
    """Whether a policy is better than the baseline, and what to turn next: two sentences."""
    others = _others(comparison)
    if not others:
        return f"Only the baseline `{comparison['baseline']}` was evaluated. Add a policy: `+stage.policies.NAME=...`."
    return f"{_result(comparison, others)} {_next(comparison, others)}"


def _result(comparison: dict[str, Any], others: dict[str, dict]) -> str:
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


def _next(comparison: dict[str, Any], others: dict[str, dict]) -> str:
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


def _below_best_of_n(comparison: dict[str, Any], entry: dict) -> bool:
    curves = _curves(comparison)
    if not curves or not entry["kl"]:
        return False
    points = curves[-1]["points"]  # chosen by what the policies were trained on, where that was measured
    kl = entry["kl"]["mean"]
    if not points[0]["kl"] <= kl <= points[-1]["kl"]:
        return False
    reached = np.interp(kl, [point["kl"] for point in points], [point["reward"]["low"] for point in points])
    return entry["reward"]["high"] < reached


def headline(comparison: dict[str, Any]) -> dict[str, str]:
    """The numbers under the verdict."""
    facts = {"held-out prompts": f"{comparison['prompts']:,}", "policies": str(len(comparison["policies"]))}
    others = _others(comparison)
    if others:
        best = max(others, key=lambda name: others[name]["difference"]["mean"])
        facts[f"reward of {best}"] = f"{others[best]['reward']['mean']:.2f}"
        facts[f"reward of {comparison['baseline']}"] = (
            f"{comparison['policies'][comparison['baseline']]['reward']['mean']:.2f}"
        )
        if others[best]["win_rate"]:
            facts[f"wins of {best}"] = f"{others[best]['win_rate']['mean']:.0%}"
        if others[best]["kl"]:
            facts[f"KL of {best}"] = f"{others[best]['kl']['mean']:.2f}"
    return facts


# ---- The evaluation ----


def frontier_blocks(comparison: dict[str, Any]) -> list:
    """Reward against KL: every policy, and the best of n as the curve to beat."""
    base, policies = comparison["baseline"], comparison["policies"]
    counted = [name for name, weight in comparison.get("weights", {}).items() if weight]
    reward = f"reward ({' + '.join(counted)})" if counted else "reward"
    shown = {name: entry for name, entry in policies.items() if entry["kl"] or name == base}
    series = [
        Series(
            f"best of n by {curve['by'] or 'the reward itself'}",
            x=[point["kl"] for point in curve["points"]],
            y=[point["reward"]["mean"] for point in curve["points"]],
            low=[point["reward"]["low"] for point in curve["points"]],
            high=[point["reward"]["high"] for point in curve["points"]],
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
        names = sorted(members[family], key=lambda name: _kl(policies[name]))
        series.append(
            Series(
                family,
                x=[_kl(policies[name]) for name in names],
                y=[policies[name]["reward"]["mean"] for name in names],
                low=[policies[name]["reward"]["low"] for name in names],
                high=[policies[name]["reward"]["high"] for name in names],
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
    best = pareto([policies[name]["reward"]["mean"] for name in policies], [_kl(policies[name]) for name in policies])
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
    blocks += [Gap(text) for entry in policies.values() for text in entry.get("gaps", {}).values()]
    if not _curves(comparison):
        blocks.append(Gap("The best of n samples was not measured. Type `stage.best_of_n=16` with `stage=evaluate`."))
    return blocks


def _parting(comparison: dict[str, Any], shown: dict[str, dict]) -> list:
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
    names = sorted(shown, key=lambda name: _kl(shown[name]))
    for i, reward in enumerate(["", *proxies]):
        title = reward or "the reward that counts"
        series.append(
            Series(
                title,
                x=[_kl(shown[name]) for name in names],
                y=[_gain(comparison, shown[name], reward) for name in names],
                line=False,
                hollow=bool(reward),
                color=i,
                labels=names if not reward else (),
            )
        )
    for curve in _curves(comparison)[1:]:
        x = [point["kl"] for point in curve["points"]]
        mean, std = _base(comparison, "")
        y = [(point["reward"]["mean"] - mean) / std for point in curve["points"]]
        series.append(Series(f"best of n by {curve['by']}: the reward that counts", x=x, y=y, color=0))
        mean, std = _base(comparison, curve["by"])
        y = [(point["chosen_by"] - mean) / std for point in curve["points"]]
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


def win_blocks(comparison: dict[str, Any]) -> list:
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
        rows.append(row + ([_interval(ranking[name], "{:+.2f}")] if ranking else []))
    note = (
        "At equal length: AlpacaEval 2's logistic regression on the difference in length (Dubois et al. 2024), "
        "without its term for the prompt."
    )
    if judged:
        note += " First wins: how often the judge names the answer it is shown first; 50 % is no position bias."
    if ranking:
        note += f" Strength: Bradley-Terry, where a beats b with probability sigmoid(a - b); {base} is 0."
    blocks.append(Table(headers, rows, f"The judge is {comparison.get('judge', 'the reward')}.", note=note))
    blocks += [
        Gap(
            f"{entry['unclear']} of {entry['judgements']} judgements of {name} named neither answer nor a tie; they "
            "count for nobody."
        )
        for name, entry in unclear.items()
    ]
    return blocks


def cost_blocks(comparison: dict[str, Any]) -> list:
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


def distribution_blocks(comparison: dict[str, Any]) -> list:
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


def answer_blocks(comparison: dict[str, Any]) -> list:
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


# ---- The runs ----


def training_blocks(runs: Sequence[Run]) -> list:
    """The training curves of each run that trains."""
    blocks: list = []
    for run in runs:
        trains = bool((run.config.get("stage") or {}).get("args"))
        if not trains:
            continue
        figures = curve_figures(run)
        if figures:
            blocks += [Text(f"`{run.name}` ({run.record['stage']}), {_ending(run)}"), *figures]
        else:
            blocks.append(Gap(f"The run `{run.name}` left no metrics (its status is `{run.record['status']}`)."))
    return blocks or [Gap("No run of this project trained anything.")]


def curve_figures(run: Run) -> list[Figure]:
    """A figure for each metric of `CURVES` that the run logged; each metric once."""
    logged = {key for entry in run.history for key in entry}
    figures: dict[str, Figure] = {}
    for title, reading, keys in CURVES:
        if title in figures or (title == "loss" and RL_ONLY_NOISE in logged):
            continue
        series = [
            Series(name, *run.curve(key), color=i)
            for i, (name, key) in enumerate(keys.items())
            if len(run.curve(key)[0]) > 1
        ]
        if series:
            drawn = plots.curves(series, f"{run.name}: {title}", "optimizer step", title)
            figures[title] = Figure(drawn, reading)
    return list(figures.values())


def _ending(run: Run) -> str:
    took = f" in {duration(run.seconds)}" if run.seconds is not None else ""
    return f"{run.record['status']}{took}."


def reward_model_blocks(runs: Sequence[Run], project: str) -> list:
    """How good the reward models are: by their training's evaluation, and as measured by stage=evaluate_reward."""
    blocks: list = []
    for run in runs:
        if run.record["stage"] == "reward" and run.metrics:
            first = next((entry for entry in run.history if "eval_accuracy" in entry), {})
            rows = [
                [key.removeprefix("eval_"), _number(first.get(key), "{:.3f}"), f"{value:.3f}"]
                for key, value in run.metrics["eval"].items()
                if isinstance(value, (int, float)) and re.search("accuracy|loss|margin|mse", key)
            ]
            headers = ["on held-out rows", "at the start", "at the end"]
            blocks.append(Table(headers, rows, f"Training of the reward model `{run.name}`."))
    measured = [run for run in runs if run.record["stage"] == "evaluate_reward"]
    for run in measured:
        quality = read_json(run.folder / "reward_quality.json")
        if quality:
            blocks += [
                Text(f"`{run.name}` (all of it: `{run.folder / 'report' / 'index.html'}`)"),
                summary_table(quality),
            ]
        else:
            blocks.append(Gap(f"The run `{run.name}` left no results (its status is `{run.record['status']}`)."))
    if not measured:
        blocks.append(
            Gap(
                "Calibration and weak spots of the reward model were not measured. Type "
                f"`accelerate launch train.py stage=evaluate_reward project={project}`."
            )
        )
    return blocks


def run_blocks(runs: Sequence[Run]) -> list:
    """What was run, with which config, versions and in which time."""
    rows = [
        [
            run.name,
            run.record["stage"],
            run.record["status"],
            run.record["started"][:16].replace("T", " "),
            duration(run.seconds) if run.seconds is not None else "",
        ]
        for run in runs
    ]
    versions: dict[str, list[str]] = {}
    for run in runs:
        for package, version in run.record.get("versions", {}).items():
            versions.setdefault(package, [])
            if version not in versions[package]:
                versions[package].append(version)
    return [
        Table(["run", "stage", "status", "started (UTC)", "time"], rows),
        Details(
            "Versions", [Table(["package", "version"], [[name, ", ".join(found)] for name, found in versions.items()])]
        ),
        *(
            Details(
                f"{run.name}: command and config",
                [Code(run.record["command"]), Code(yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True))],
            )
            for run in runs
        ),
    ]


# ---- Small helpers ----


def _others(comparison: dict[str, Any]) -> dict[str, dict]:
    return {name: entry for name, entry in comparison["policies"].items() if name != comparison["baseline"]}


def _proxies(comparison: dict[str, Any]) -> list[str]:
    """Rewards that are shown and don't count."""
    return [name for name, weight in comparison.get("weights", {}).items() if not weight]


def _curves(comparison: dict[str, Any]) -> list[dict]:
    return (comparison.get("best_of_n") or {}).get("curves") or []


def _kl(entry: dict) -> float:
    return entry["kl"]["mean"] if entry["kl"] else (0.0 if entry["difference"] is None else float("nan"))


def _base(comparison: dict[str, Any], reward: str) -> tuple[float, float]:
    """Mean and standard deviation of a reward over the baseline's answers; `""`: of the weighted sum."""
    base = comparison["policies"][comparison["baseline"]]
    if reward:
        mean, std = base["rewards"][reward], base["reward_std"][reward]
    else:
        values = [row["rewards"][comparison["baseline"]] for row in comparison["samples"]]
        values = [value for value in values if value is not None]
        mean, std = float(np.mean(values)), float(np.std(values))
    return mean, std or float("nan")


def _gain(comparison: dict[str, Any], entry: dict, reward: str) -> float | None:
    mean, std = _base(comparison, reward)
    value = entry["rewards"][reward] if reward else entry["reward"]["mean"]
    return None if value is None or not std > 0 else (value - mean) / std


def _interval(estimate: dict | None, form: str) -> str:
    if estimate is None:
        return ""
    mean, low, high = (form.format(estimate[key]) for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _share(value: float | None) -> str:
    return _number(value, "{:.0%}")


def _names(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
