"""Numbers, tables and texts side by side, as plain text."""

import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence

from rlhf_trl.runs.results import Comparison, Estimate, Front, PromptSample

WIDTH = 100  # columns of a terminal that everybody has
# Characters that HTML and XML don't allow, and lone surrogates, which can't be written as UTF-8
FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


# ---- Numbers ----


def number(value: object, form: str = "{:.3f}") -> str:
    """Return a number as text, an empty one for NaN and for what is no number, such as `None`."""
    return form.format(value) if isinstance(value, (int, float)) and not math.isnan(value) else ""


def compact_number(value: float) -> str:
    """Return a number with three significant digits, `0.693` or `-1.5e-05`; integers in full, `12345`."""
    if value and not 1e-2 <= abs(value) < 1e3:
        return f"{value:.0f}" if value % 1 == 0 and abs(value) < 1e9 else f"{value:.1e}"
    return f"{value:.3g}"


def interval(estimate: Estimate | None, form: str = "{:.3f}") -> str:
    """Return an estimate as `mean [low, high]`, the mean alone where the interval is unknown."""
    mean, low, high = (number(each, form) for each in (estimate or (None, None, None)))
    return f"{mean} [{low}, {high}]" if mean and low and high else mean


def short_value(value: str) -> str:
    """Return the value of an override with four significant digits where that is shorter: a search has 17 of them."""
    try:
        return min(value, f"{float(value):.4g}", key=len)
    except ValueError:
        return value


def duration(seconds: float) -> str:
    """Return a duration as `48 s`, `3 min 05 s` or `2 h 07 min`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02} min"


# ---- Tables and columns ----


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return aligned columns: the first one to the left, the others to the right."""
    cells = [list(headers), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]
    cells.insert(1, ["-" * width for width in widths])
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in cells]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def side_by_side(texts: dict[str, str], width: int = WIDTH) -> str:
    """Return texts in columns under their names; one below the other where columns would be too narrow to read."""
    column = (width - 2 * (len(texts) - 1)) // len(texts)
    if column < 24:
        return "\n".join(f"[{name}]\n{_wrapped(text, width)}" for name, text in texts.items())
    columns = [[name, "-" * len(name), *_wrapped(text, column).split("\n")] for name, text in texts.items()]
    height = max(len(lines) for lines in columns)
    rows = zip(*(lines + [""] * (height - len(lines)) for lines in columns), strict=True)
    return "\n".join("  ".join(cell.ljust(column) for cell in row).rstrip() for row in rows)


def _wrapped(text: str, width: int) -> str:
    lines = [textwrap.fill(line, width) for line in text.strip().splitlines()]
    return "\n".join(lines) or "(empty)"


# ---- Comparison of policies ----


def comparison_text(comparison: Comparison, samples: int = 3) -> str:
    """Return the table of a comparison, and side by side the first `samples` prompts with differing answers."""
    baseline = comparison.baseline
    headers = ["policy", "reward [95 %]", f"vs {baseline} [95 %]", "wins [95 %]", f"KL to {baseline}", "tokens", "EOS"]
    rows = [
        [
            name,
            interval(result.reward, "{:.2f}"),
            interval(result.difference, "{:+.2f}"),
            interval(result.win_rate, "{:.0%}"),
            number(result.kl and result.kl.mean, "{:.2f}"),
            number(result.completion_length, "{:.1f}"),
            number(result.eos_rate, "{:.0%}"),
        ]
        for name, result in comparison.policies.items()
    ]
    dropped = f"; {comparison.dropped} dropped, as they have no reward" if comparison.dropped else ""
    parts = ["\n".join([f"{comparison.prompts} held-out prompts{dropped}", table(headers, rows), *_notes(comparison)])]
    if comparison.front:
        points = {name: result.reward_intervals for name, result in comparison.policies.items()}
        parts.append(front_text(comparison.front, points))
    differing = [sample for sample in comparison.samples if len(set(sample.completions.values())) > 1]
    for sample in differing[:samples]:
        parts.append(f"{_wrapped(sample.prompt, WIDTH)}\n\n{side_by_side(with_rewards(sample))}")
    return f"\n\n{'=' * WIDTH}\n".join(parts)


def with_rewards(sample: PromptSample) -> dict[str, str]:
    """Return the completions of a prompt by the name of their policy, with the reward where one of them has any."""
    if all(value is None for value in sample.rewards.values()):
        return dict(sample.completions)
    return {
        f"{name} ({number(sample.rewards[name], '{:.2f}') or 'no reward'})": text
        for name, text in sample.completions.items()
    }


# ---- Fronts ----


def front_rows(front: Front, points: Mapping[str, Mapping[str, Estimate | None]]) -> tuple[list[str], list[list[str]]]:
    """Return headers and rows of a table of policies by their rewards, {policy: {reward: mean with its interval}}."""
    columns = {name: [rewards.get(name) for rewards in points.values()] for name in front.rewards}
    headers = ["policy", *(_with_level(name, each) for name, each in columns.items()), "non-dominated", "chosen"]
    rows = [
        [
            name,
            *(interval(rewards.get(reward), "{:.3g}") for reward in front.rewards),
            "yes" if name in front.policies else front.missing.get(name, "no"),
            "yes" if name == front.chosen else "",
        ]
        for name, rewards in points.items()
    ]
    return headers, rows


def hypervolume_rows(front: Front) -> tuple[list[str], list[list[str]]]:
    """Return headers and rows of a table of hypervolumes."""
    rows = [[name or "all policies", interval(each, "{:.4g}")] for name, each in front.hypervolumes.items()]
    return ["policies", _with_level("hypervolume", front.hypervolumes.values())], rows


def _with_level(name: str, estimates: Iterable[Estimate | None]) -> str:
    """Return the header of a column of estimates, with the level where one of them has an interval."""
    return f"{name} [95 %]" if any(each is not None and math.isfinite(each.low) for each in estimates) else name


def front_note(front: Front) -> str:
    """Return where a front's hypervolume begins, which policy is chosen and why, and what has no place on it."""
    point = ", ".join(f"{name} {round(value, 9) + 0.0:.4g}" for name, value in front.reference_point.items())
    said = [f"Hypervolume over the reference point {point}."]
    said.append(f"Chosen: {front.chosen}, {front.rule}." if front.chosen else f"No policy is chosen: {front.rule}.")
    if front.missing:
        absent = "; ".join(f"{name} ({why})" for name, why in front.missing.items())
        said.append(f"Not on the front, {len(front.missing)}: {absent}.")
    return " ".join(said)


def front_text(front: Front, points: Mapping[str, Mapping[str, Estimate | None]]) -> str:
    """Return the tables of a front and their note."""
    tables = [table(*front_rows(front, points)), table(*hypervolume_rows(front))]
    return "\n\n".join([f"Front of {', '.join(front.rewards)}", *tables, _wrapped(front_note(front), WIDTH)])


def _notes(comparison: Comparison) -> list[str]:
    """Return remarks that the table can't hold: the judge, unclear judgements, missing measures."""
    policies = comparison.policies
    first = [f"{each.position_bias:.0%} ({name})" for name, each in policies.items() if each.position_bias is not None]
    notes = []
    for key in dict.fromkeys(key for each in policies.values() for key in each.constraints):
        told = {name: each.constraints[key] for name, each in policies.items()}
        notes.append(
            f"{key} {next(iter(told.values())).bound}: "
            + ", ".join(
                f"{name} {each.reading} ({number(each.value and each.value.mean, '{:.2f}')}, "
                f"{number(each.violation_rate, '{:.0%}')} of the answers violate it)"
                for name, each in told.items()
            )
            + "."
        )
    if first:
        notes.append(f"Wins are judged by {comparison.judge}; the answer shown first wins {', '.join(first)}.")
    for name, result in policies.items():
        if result.unclear:
            notes.append(
                f"{result.unclear} of {result.judgements} judgements of {name} named neither answer nor a tie."
            )
        notes += result.missing.values()
    return [_wrapped(note, WIDTH) for note in dict.fromkeys(notes)]
