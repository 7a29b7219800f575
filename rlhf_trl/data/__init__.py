"""Data: sources (files, hub, mixtures), what their rows become for a stage, and how rows become token ids."""

from rlhf_trl.data.feedback import Attributes, Edits, Pairs, Rankings, Ratings, Thumbs
from rlhf_trl.data.load import build, describe, load_files, load_hub
from rlhf_trl.data.mixture import mix
from rlhf_trl.data.tokens import (
    count_trained,
    filter_prompts,
    head_names,
    measure,
    prompt_ids,
    render_batch,
    render_sample,
    report_cut_rows,
    row_ids,
    tokenize_comparisons,
)

__all__ = [
    "Attributes",
    "Edits",
    "Pairs",
    "Rankings",
    "Ratings",
    "Thumbs",
    "build",
    "count_trained",
    "describe",
    "filter_prompts",
    "head_names",
    "load_files",
    "load_hub",
    "measure",
    "mix",
    "prompt_ids",
    "render_batch",
    "render_sample",
    "report_cut_rows",
    "row_ids",
    "tokenize_comparisons",
]
