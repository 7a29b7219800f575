"""Tables as plain text."""

import textwrap
from collections.abc import Sequence

WIDTH = 100  # columns of a terminal that everybody has


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: the first one to the left, the others to the right."""
    cells = [list(headers), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]
    cells.insert(1, ["-" * width for width in widths])
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in cells]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def side_by_side(texts: dict[str, str], width: int = WIDTH) -> str:
    """Texts in columns under their names; one below the other where the columns would be too narrow to read."""
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


def duration(seconds: float) -> str:
    """`48 s`, `3 min 05 s` or `2 h 07 min`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02} min"


def comparison_text(comparison: dict, samples: int = 3) -> str:
    """
    The tables of a comparison, as `rlhf_trl.evaluation.comparison` makes it, and side by side the first samples in
    which the policies don't all say the same.
    """
    baseline = comparison["baseline"]
    headers = ["policy", "reward [95 %]", f"vs {baseline} [95 %]", "wins [95 %]", f"KL to {baseline}", "tokens", "EOS"]
    rows = [
        [
            name,
            _interval(entry["reward"], "{:.2f}"),
            _interval(entry["difference"], "{:+.2f}"),
            _interval(entry["win_rate"], "{:.0%}"),
            f"{entry['kl']['mean']:.2f}" if entry["kl"] else "",
            f"{entry['completion_length']:.1f}",
            f"{entry['eos_rate']:.0%}",
        ]
        for name, entry in comparison["policies"].items()
    ]
    left_out = f"; {comparison['left_out']} left out for want of a reward" if comparison["left_out"] else ""
    parts = [
        "\n".join([f"{comparison['prompts']} held-out prompts{left_out}", table(headers, rows), *_notes(comparison)])
    ]
    differing = [sample for sample in comparison["samples"] if len(set(sample["completions"].values())) > 1]
    for sample in differing[:samples]:
        columns = {
            f"{name} ({_number(sample['rewards'][name])})": text for name, text in sample["completions"].items()
        }
        parts.append(f"{_wrapped(sample['prompt'], WIDTH)}\n\n{side_by_side(columns)}")
    return f"\n\n{'=' * WIDTH}\n".join(parts)


def _notes(comparison: dict) -> list[str]:
    """What the table can't show: who judged, what was unclear, what is missing."""
    judge, policies = comparison.get("judge", ""), comparison["policies"]
    asked = {name: entry for name, entry in policies.items() if entry.get("position_bias") is not None}
    notes = []
    if asked:
        first = ", ".join(f"{entry['position_bias']:.0%} ({name})" for name, entry in asked.items())
        notes.append(f"Wins are judged by {judge}; the answer shown first wins {first}.")
    for name, entry in policies.items():
        if entry.get("unclear"):
            notes.append(
                f"{entry['unclear']} of {entry['judgements']} judgements of {name} named neither answer nor a tie."
            )
        notes += entry.get("gaps", {}).values()
    return [_wrapped(note, WIDTH) for note in dict.fromkeys(notes)]


def _number(value: float | None) -> str:
    return "no reward" if value is None else f"{value:.2f}"


def _interval(estimate: dict | None, form: str) -> str:
    if estimate is None:
        return ""
    low, high = form.format(estimate["low"]), form.format(estimate["high"])
    return f"{form.format(estimate['mean'])} [{low}, {high}]"
