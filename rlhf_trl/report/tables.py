"""A comparison of policies as plain rows, for loggers that show tables."""

from collections.abc import Sequence
from typing import NamedTuple

from rlhf_trl.report.measures import beside_best_of_n, part_of
from rlhf_trl.report.verdicts import policy_verdicts
from rlhf_trl.runs.results import Comparison


class Rows(NamedTuple):
    """Names of the columns, and rows of numbers, texts and `None`."""

    columns: list[str]
    rows: Sequence[list]


def comparison_tables(comparison: Comparison) -> dict[str, Rows]:
    """Return the policies with what was measured of each, and the prompts with every policy's answer and reward."""
    return {"report/comparison": _policies(comparison), "report/answers": _answers(comparison)}


def _policies(comparison: Comparison) -> Rows:
    verdicts = policy_verdicts(comparison)
    estimates = ("reward", "difference", "win_rate", "kl")
    columns = ["policy", "verdict", "why"]
    columns += [f"{name}{end}" for name in estimates for end in ("", "_low", "_high")]
    columns += ["vs_best_of_n", "completion_length", "eos_rate", "entropy", "repetition", "parameters"]
    constrained = list(comparison.base.constraints)
    columns += [f"{name}{end}" for name in constrained for end in ("_mean", "_violation_rate")]
    rows = []
    for name, result in comparison.policies.items():
        verdict, beside = verdicts.get(name), beside_best_of_n(comparison, name)
        row: list = [name, verdict and verdict.call, verdict and "; ".join(verdict.reasons)]
        row += [part_of(getattr(result, each), part) for each in estimates for part in ("mean", "low", "high")]
        row.append(part_of(beside and beside.difference, "mean"))
        row += [result.completion_length, result.eos_rate, result.entropy, result.repetition, result.parameters]
        for key in constrained:
            row += [part_of(result.constraints[key].value, "mean"), result.constraints[key].violation_rate]
        rows.append(row)
    return Rows(columns, rows)


def _answers(comparison: Comparison) -> Rows:
    names = list(comparison.policies)
    columns = ["prompt", *(column for name in names for column in (name, f"{name} reward"))]
    rows = [
        [sample.prompt, *(cell for name in names for cell in (sample.completions[name], sample.rewards[name]))]
        for sample in comparison.samples
    ]
    return Rows(columns, rows)
