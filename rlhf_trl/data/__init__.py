"""Data: sources (files, hub, mixtures), what their rows become for a stage, and how rows become token ids."""

from rlhf_trl.data.load import build, describe, load_files, load_hub
from rlhf_trl.data.mixture import mix
from rlhf_trl.data.tokens import (
    filter_prompts,
    prompt_ids,
    render_sample,
    report_cut_rows,
    row_ids,
    tokenize_preferences,
)

__all__ = [
    "build",
    "describe",
    "filter_prompts",
    "load_files",
    "load_hub",
    "mix",
    "prompt_ids",
    "render_sample",
    "report_cut_rows",
    "row_ids",
    "tokenize_preferences",
]
