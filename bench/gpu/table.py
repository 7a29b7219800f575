"""Results of the benchmark as Markdown."""

from typing import Any

from bench.setting import PHASES


def tables(rows: list[dict[str, Any]]) -> str:
    """Return the results: the machine, a table per size, what was skipped or failed, and the tests."""
    lines = [heading(rows), ""]
    measured = [row for row in rows if "samples_per_second" in row]
    for size in dict.fromkeys(row["size"] for row in measured):
        lines += [f"### {size}", "", *table([row for row in measured if row["size"] == size]), ""]
    for row in rows:
        if "skipped" in row:
            lines.append(f"- {row['size']}, {row['name']}: skipped, {row['skipped']}")
        elif "problem" in row:
            lines.append(f"- {row['size']}, {row['name']}: {row['problem']}")
        elif "tests" in row:
            lines += [f"- tests marked `gpu`: {row['tests']}", *(f"  - {line}" for line in row["failures"])]
    return "\n".join(lines)


def heading(rows: list[dict[str, Any]]) -> str:
    """Return card, versions, command, and the rate of a matrix product."""
    machine = next(row for row in rows if "card" in row)
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    rate = next((row["matrix_rate"] for row in rows if "matrix_rate" in row), None)
    text = f"{machine['card']}, {versions}. `{machine['command']}`."
    return text if rate is None else f"{text} A bfloat16 matrix product runs at {rate / 1e12:.0f} TFLOP/s."


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Return a row per configuration: speed, seconds of each phase of a rollout, MFU of the update, memory."""
    columns = ["", "samples/s", "tokens/s", "s per rollout", *PHASES, "MFU", "GiB", "planned"]
    lines = [_row(columns), _row(["---", *["---:"] * (len(columns) - 1)])]
    for row in rows:
        phases = [f"{row['phases'][phase]:.2f}" for phase in PHASES]
        cells = [
            row["name"] + ("" if row["warm"] else " (first rollout)"),
            f"{row['samples_per_second']:.1f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['seconds']:.2f}",
            *phases,
            f"{row['mfu']:.0%}",
            f"{row['peak_gib']:.1f}",
            f"{row['planned_gib']['peak']:.1f}" if "planned_gib" in row else "-",
        ]
        lines.append(_row(cells))
    return lines


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
