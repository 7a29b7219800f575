"""Conversion of rows to the dataset type that a stage trains on."""

import json
import math

from rlhf_trl.data.messages import check_turns, split_last_turn
from rlhf_trl.data.row_types import prompt_of, row_types_in
from rlhf_trl.data.rows import RowError

# Formats that can be converted to a dataset type without inventing anything, the most direct first
SOURCES = {
    "prompt_completion": ("prompt_completion", "messages", "preference", "unpaired", "text"),
    "preference": ("preference",),
    "unpaired": ("unpaired", "preference"),
    "comparisons": ("preference",),
    "annotated": ("preference",),
    "prompt": ("preference", "prompt_completion", "prompt", "messages", "unpaired"),
}

CONVERSIONS = {
    ("preference", "prompt_completion"): "`chosen` is the completion",
    ("preference", "unpaired"): "`chosen` and `rejected` make a row each, labelled true and false",
    ("preference", "comparisons"): "two completions, `chosen` the better one",
    ("preference", "annotated"): "two completions, `chosen` the better one",
    ("preference", "prompt"): "prompts alone",
    ("unpaired", "prompt_completion"): "rows labelled true alone",
    ("unpaired", "prompt"): "prompts alone",
    ("prompt_completion", "prompt"): "prompts alone",
    ("messages", "prompt_completion"): "the last assistant turn is the completion",
    ("messages", "prompt"): "what stands before the last assistant turn is the prompt",
    ("text", "prompt_completion"): "plain text, all of it trained on",
}
# Columns of annotated rows beside the prompt and those of the source
ANNOTATED = ("completions", "better", "worse", "gap", "share", "ratings", "attributes", "border")


def choose_row_type(dataset_type: str, columns) -> str | None:
    """Return the row type among `columns` that serves `dataset_type` best, or `None`."""
    row_types = row_types_in(columns)
    if dataset_type == "prompt":  # a label is then no feedback but a column for the reward function
        row_types = ["prompt_completion" if name == "unpaired" else name for name in row_types]
    return next((name for name in SOURCES[dataset_type] if name in row_types), None)


def convert(row: dict, row_type: str, dataset_type: str, whole_messages: bool = False) -> list[dict]:
    """
    Convert a row of `read_row`: to one row, two (`unpaired` of a pair), or none (`prompt_completion` labelled false).
    """
    match row_type, dataset_type:
        case ("messages", "prompt_completion") if whole_messages:
            split_last_turn(row["messages"], "messages")
            return [row]
        case "messages", "prompt_completion":
            prompt, completion = split_last_turn(row["messages"], "messages")
            if not prompt:
                raise RowError("messages", "holds no turn before the assistant's")
            check_turns(prompt, {"completion": completion})
            return [{"prompt": prompt, "completion": completion}]
        case "messages", "prompt":
            prompt = prompt_of(row)
            if not prompt:
                raise RowError("messages", "holds no turn before the assistant's")
            check_turns(prompt, {})
            return [{"prompt": prompt}]
        case _, "prompt":
            return [{"prompt": row["prompt"]}]
        case "preference", "prompt_completion":
            return [{"prompt": row["prompt"], "completion": row["chosen"]}]
        case "preference", "unpaired":
            return [
                {"prompt": row["prompt"], "completion": row["chosen"], "label": True},
                {"prompt": row["prompt"], "completion": row["rejected"], "label": False},
            ]
        case "preference", "comparisons" | "annotated":
            return [comparisons_of(row)]
        case "unpaired", "prompt_completion":
            return [{"prompt": row["prompt"], "completion": row["completion"]}] if row["label"] else []
    return [row]


def comparisons_of(row: dict) -> dict:
    """Convert a row with `chosen` and `rejected` to one with `completions`, `better` and `worse`."""
    rest = {key: value for key, value in row.items() if key not in ("chosen", "rejected", "margin")}
    margin = {"margin": [row["margin"]]} if row.get("margin") is not None else {}
    return {**rest, "completions": [row["chosen"], row["rejected"]], "better": [0], "worse": [1], **margin}


def annotated_of(row: dict) -> dict:
    """
    Convert a row of two completions to an annotated one: its `margin`, or its columns `gap` and `share`, become those
    of its one comparison.
    """
    made = {key: value for key, value in row.items() if key != "margin"}
    if "margin" in row:
        made["gap"] = row["margin"]
    for name, least, most in (("gap", -math.inf, math.inf), ("share", 0, 1)):
        value = row.get(name)
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise RowError(name, f"is {value!r}, where a number should be")
            if not least <= value <= most:
                raise RowError(name, f"is {value:g}, where a share from {least} to {most} should be")
            made[name] = [float(value)]
    return made


# What belongs to each comparison of a row, and to each completion.
BY_COMPARISON = ("better", "worse", "margin", "weights", "label_smoothing", "source")
BY_COMPLETION = ("completions", "completion_ids", "targets", "safe")


def select_completions(row: dict, keep: list[int]) -> dict:
    """Return a row of comparisons with only the completions `keep`, in this order, and the comparisons among them."""
    place = {old: new for new, old in enumerate(keep)}
    pairs = list(zip(row.get("better") or [], row.get("worse") or [], strict=True))
    left = [m for m, (a, b) in enumerate(pairs) if a in place and b in place]
    made = dict(row)
    made |= {name: [row[name][i] for i in keep] for name in BY_COMPLETION if row.get(name) is not None}
    made |= {name: [row[name][m] for m in left] for name in BY_COMPARISON if row.get(name) is not None}
    made |= {name: [place[i] for i in made[name]] for name in ("better", "worse") if row.get(name) is not None}
    return made


def contents(rows: list[dict], dataset_type: str) -> str:
    """Return the numbers of rows, prompts, completions, pairs, targets, and labels as text."""
    counts = {"rows": len(rows), "prompts": len({json.dumps(row["prompt"]) for row in rows})}
    if dataset_type in ("comparisons", "annotated"):
        counts["completions"] = sum(len(row["completions"]) for row in rows)
        counts["pairs"] = sum(len(row.get("better") or []) for row in rows)
        targets = [target for row in rows for target in row.get("targets") or []]
        counts["targets"] = sum(value is not None for target in targets for value in target.values())
        sides = [side for row in rows for side in row.get("safe") or []]
        counts |= {"safe": sides.count(1.0), "unsafe": sides.count(-1.0)}
    elif dataset_type == "unpaired":
        counts["good"] = sum(row["label"] for row in rows)
        counts["bad"] = len(rows) - counts["good"]
    return f"{dataset_type}: " + ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
