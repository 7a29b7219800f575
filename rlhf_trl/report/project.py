"""
Page of a project: whether alignment worked, at what price, and what to change next (`runs/<project>/report`).

It is made from the files of the runs and of one evaluation, the newest or the one named, so it can be made again at
any time (`stage=report`).
What is missing is named, with the command that makes it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import yaml

from rlhf_trl.config.program import command_line
from rlhf_trl.errors import ConfigError
from rlhf_trl.health.signs import LEVELS, SIGNS, signs_seen
from rlhf_trl.report import plots
from rlhf_trl.report.answers import answer_blocks, distribution_blocks, slice_blocks
from rlhf_trl.report.fronts import front_blocks
from rlhf_trl.report.measures import POLICY_COLORS, known, policy_colors
from rlhf_trl.report.page import Code, Details, Figure, Missing, Page, Section, Table, Text, write_page
from rlhf_trl.report.plots import Series
from rlhf_trl.report.policies import cost_blocks, frontier_blocks, win_blocks
from rlhf_trl.report.published import published_tables
from rlhf_trl.report.records import Evaluation, Run, chosen_evaluation, load_evaluations, load_runs
from rlhf_trl.report.rewards import summary_table
from rlhf_trl.report.rounds import round_blocks
from rlhf_trl.report.setup import setup_of
from rlhf_trl.report.text import duration
from rlhf_trl.report.verdicts import headline, verdict, verdict_blocks
from rlhf_trl.runs.record import COMPARISON_FILE, read_quality
from rlhf_trl.runs.results import Comparison


class Curve(NamedTuple):
    """
    A figure of training curves.

    Attributes:
        title: its title.
        metrics: metrics by their name in the legend; those that a run didn't log are dropped.
        reading: how to read it.
        compared: how to read several of the metrics together.
    """

    title: str
    metrics: Mapping[str, str]
    reading: str = ""
    compared: str = ""


# Of several figures with one title the first that the run logged is shown
CURVES = (
    Curve(
        "reward",
        {"rollouts": "objective/scores", "held out": "eval_objective/scores"},
        compared="Held out it should rise as well.",
    ),
    Curve("reward", {"rollouts": "reward", "held out": "eval_reward"}, compared="Held out it should rise as well."),
    Curve(
        "KL to the start, nats per sequence",
        {"rollouts": "objective/kl", "held out": "eval_objective/kl"},
        "How far the policy went; one that grows without end is being pulled by the reward alone.",
    ),
    Curve("KL to the start, nats per token", {"rollouts": "kl"}, "How far the policy went."),
    Curve(
        "accuracy",
        {"training": "accuracy", "held out": "eval_accuracy"},
        compared="Training far above held out is overfitting.",
    ),
    Curve(
        "accuracy",
        {"training": "rewards/accuracies", "held out": "eval_rewards/accuracies"},
        "Share of pairs whose chosen answer the policy prefers, next to its start; there it is 0, as all are ties.",
    ),
    Curve(
        "margin of the rewards",
        {"training": "rewards/margins", "held out": "eval_rewards/margins"},
        "By how much it prefers the chosen answer.",
    ),
    Curve("entropy, nats per token", {"rollouts": "policy/entropy"}, "Near 0 the policy has stopped exploring."),
    Curve(
        "tokens per completion",
        {"rollouts": "completions/mean_length", "held out": "eval_completions/mean_length"},
        "A steady drift means that length is being rewarded.",
    ),
    Curve(
        "explained variance of the critic",
        {"rollouts": "value/explained_variance"},
        "1 is perfect; at 0 it explains nothing.",
    ),
    Curve("clip fraction", {"rollouts": "policy/clipfrac"}, "Above 0.3 the steps are too large."),
    Curve(
        "loss", {"training": "loss", "held out": "eval_loss"}, compared="Training far below held out is overfitting."
    ),
)
RL_ONLY_NOISE = "objective/kl"  # where it is logged, the loss of a policy gradient says nothing


def write_report(project_dir: str | Path, evaluation: str | None = None) -> Path:
    """
    Write `report/index.html` and `report/report.md` into a project's folder; return the path of the first.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if the project has no run, or no evaluation of that name.
    """
    project_dir = Path(project_dir)
    return write_page(project_page(project_dir, evaluation), project_dir / "report")


def project_page(project_dir: Path, evaluation: str | None = None, ending: str | None = None) -> Page:
    """
    Return the page of a project.

    Args:
        project_dir (`Path`): folder of the project.
        evaluation (`str`, *optional*): name of the evaluation to show; `None`: the newest.
        ending (`str`, *optional*): name of the run that makes the page as its last act.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if the project has no run, no evaluation of that name, or a file of one is
            damaged.
    """
    runs, evaluations = load_runs(project_dir), load_evaluations(project_dir)
    shown = chosen_evaluation(evaluations, evaluation)
    if not runs and not shown:
        raise ConfigError(
            f"There is nothing to report: `{project_dir}` holds no run. Set `project=...` with one that does."
        )
    runs = [ended(run) if run.name == ending else run for run in runs]
    sections, facts, setup, colors = [], {}, {}, run_colors(runs, None)
    if shown:
        comparison = known(shown.comparison)
        setup, colors = setup_of(replace(shown, comparison=comparison)), run_colors(runs, comparison)
        lead = verdict(comparison)
        facts = headline(comparison)
        sections += [
            Section("Verdict", verdict_blocks(comparison)),
            Section("Reward and KL", frontier_blocks(comparison)),
            Section("Several rewards", front_blocks(comparison)),
            Section("Wins", win_blocks(comparison)),
            Section("Kinds of prompts", slice_blocks(comparison)),
            Section("What it cost", cost_blocks(comparison)),
            Section("Rewards before and after", distribution_blocks(comparison)),
            Section("Answers", answer_blocks(comparison)),
        ]
    else:
        command = command_line("stage=evaluate", f"project={project_dir.name}")
        lead = f"The policies of this project were not evaluated, so whether training helped is open. Run `{command}`."
        sections.append(Section("Evaluation", [Missing(f"No run left a `{COMPARISON_FILE}`. Run `{command}`.")]))
    sections += [
        Section("Rounds", round_blocks(runs)),
        Section("Training", [*training_blocks(runs, colors), *published_tables(runs)]),
        Section("Reward model", reward_model_blocks(runs, project_dir.name)),
        Section("Runs", [*evaluation_blocks(evaluations, shown, project_dir.name), *run_blocks(runs)]),
    ]
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    version = runs[-1].record.versions.get("rlhf_trl", "") if runs else ""
    return Page(
        title=project_dir.resolve().name,
        kicker="Alignment report",
        lead=lead,
        facts=facts,
        setup=setup,
        sections=[section for section in sections if section.blocks],
        footer=f"Made {made} by rlhf_trl {version} from {project_dir}.",
    )


def ended(run: Run) -> Run:
    """Return a run that is under way as if it ended now."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return replace(run, record=replace(run.record, status="done", ended=now))


def run_colors(runs: Sequence[Run], comparison: Comparison | None) -> dict[str, int]:
    """Return the color of each run by name: that of the policy which it made, else one of those that are left."""
    policies = policy_colors(comparison) if comparison else {}
    folders = (
        {str(Path(result.path).resolve()): name for name, result in comparison.policies.items()} if comparison else {}
    )
    found: dict[str, int] = {}
    for run in runs:
        name = folders.get(str(run.folder.resolve()), run.name)  # a project that was moved has other paths
        if name in policies:
            found[run.name] = policies[name]
    free = len(set(policies.values()))
    for run in runs:
        if run.name not in found and run.metrics:
            found[run.name] = free % POLICY_COLORS
            free += 1
    return found


def training_blocks(runs: Sequence[Run], colors: Mapping[str, int]) -> list:
    """Return the training curves of each run that trains."""
    blocks: list = []
    for run in runs:
        trains = bool((run.config.get("stage") or {}).get("args"))
        if not trains:
            continue
        figures = curve_figures(run, colors.get(run.name, 0))
        if figures:
            blocks += [Text(f"`{run.name}` ({run.record.stage}), {_ending(run)}"), *health_blocks(run), *figures]
        else:
            blocks.append(Missing(f"The run `{run.name}` left no metrics (its status is `{run.record.status}`)."))
    return blocks or [Missing("No run of this project trained anything.")]


def health_blocks(run: Run) -> list:
    """Return the signs that the health monitor saw in a run; nothing for a run without monitor."""
    if not any("health/level" in entry for entry in run.history):
        return []
    seen = signs_seen(run.history)
    if not seen:
        return [Text("Health: the monitor saw no sign of trouble.")]
    rows = [
        [LEVELS[sign.level], f"`{sign.sign}`", f"{sign.first} to {sign.last}", SIGNS[sign.sign].remedy]
        for sign in seen
    ]
    return [
        Table(["level", "sign", "optimizer steps", "what to turn"], rows, f"What the monitor saw in `{run.name}`.")
    ]


def curve_figures(run: Run, color: int) -> list[Figure]:
    """Return a figure for each metric of `CURVES` that the run logged, in the color of the run; each metric once."""
    logged = {key for entry in run.history for key in entry}
    figures: dict[str, Figure] = {}
    for title, metrics, reading, compared in CURVES:
        if title in figures or (title == "loss" and RL_ONLY_NOISE in logged):
            continue
        series = [
            Series(name, *run.curve(key), color=color, hollow=bool(i))
            for i, (name, key) in enumerate(metrics.items())
            if len(run.curve(key)[0]) > 1
        ]
        if series:
            drawn = plots.curves(series, f"{run.name}: {title}", "optimizer step", title)
            figures[title] = Figure(drawn, reading or (compared if len(series) > 1 else ""))
    return list(figures.values())


def _ending(run: Run) -> str:
    took = f" in {duration(run.record.seconds)}" if run.record.seconds is not None else ""
    return f"{run.record.status}{took}."


def reward_model_blocks(runs: Sequence[Run], project: str) -> list:
    """Return the quality of the reward models: by their training's evaluation, and by stage=evaluate_reward."""
    blocks: list = []
    for run in runs:
        if run.record.stage == "reward" and run.metrics:
            first = next((entry for entry in run.history if "eval_accuracy" in entry), {})
            rows = [
                [key.removeprefix("eval_"), f"{first[key]:.3f}" if key in first else "", f"{value:.3f}"]
                for key, value in run.metrics["eval"].items()
                if isinstance(value, (int, float)) and re.search("accuracy|loss|margin|mse|border", key)
            ]
            headers = ["on held-out rows", "at the start", "at the end"]
            blocks.append(Table(headers, rows, f"Training of the reward model `{run.name}`."))
    measured = [run for run in runs if run.record.stage == "evaluate_reward"]
    for run in measured:
        quality = read_quality(run.folder)
        if quality:
            blocks += [
                Text(f"`{run.name}` (all of it: `{run.folder / 'report' / 'index.html'}`)"),
                summary_table(quality),
            ]
        else:
            blocks.append(Missing(f"The run `{run.name}` left no results (its status is `{run.record.status}`)."))
    if not measured:
        blocks.append(
            Missing(
                "Reliability and weak spots of the reward model were not measured. Type "
                f"`{command_line('stage=evaluate_reward', f'project={project}')}`."
            )
        )
    return blocks


def evaluation_blocks(evaluations: Sequence[Evaluation], shown: Evaluation | None, project: str) -> list:
    """Return the evaluations of a project, where there are several: each keeps its result, and one is shown."""
    if len(evaluations) < 2:
        return []
    rows = [
        [
            each.name,
            (each.run.record.started or "")[:16].replace("T", " ") if each.run else "",
            each.comparison.prompts,
            ", ".join(each.comparison.policies),
        ]
        for each in reversed(evaluations)
    ]
    marked = [i for i, each in enumerate(reversed(evaluations)) if each is shown]
    note = f"Marked: the one on this page. Another: `stage=report project={project} stage.evaluation=NAME`."
    headers = ["evaluation", "started (UTC)", "prompts", "policies"]
    return [Table(headers, rows, "Evaluations of this project.", marked=marked, note=note)]


def run_blocks(runs: Sequence[Run]) -> list:
    """Return the runs with their times, configs and versions."""
    rows = [
        [
            run.name,
            run.record.stage,
            run.record.status,
            (run.record.started or "")[:16].replace("T", " "),
            duration(run.record.seconds) if run.record.seconds is not None else "",
        ]
        for run in runs
    ]
    versions: dict[str, list[str]] = {}
    for run in runs:
        for package, version in run.record.versions.items():
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
                [Code(run.record.command), Code(yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True))],
            )
            for run in runs
        ),
    ]
