"""Datasets: sources, conversion to the dataset type of a stage, and tokenization."""

from typing import TYPE_CHECKING

from rlhf_trl.config.lazy import lazy_attributes

if TYPE_CHECKING:
    from rlhf_trl.data.build import build_dataset, describe
    from rlhf_trl.data.feedback import Attributes, Edits, Pairs, Rankings, Ratings, Thumbs
    from rlhf_trl.data.lengths import filter_prompts, head_names, measure, report_cut_rows, tokenize_comparisons
    from rlhf_trl.data.options import LoadOptions
    from rlhf_trl.data.preview import count_trained, render_batch, render_sample
    from rlhf_trl.data.sources.files import load_files
    from rlhf_trl.data.sources.hub import load_hub
    from rlhf_trl.data.sources.mixture import mix
    from rlhf_trl.data.tokenize import prompt_ids, row_ids

__all__ = [
    "Attributes",
    "Edits",
    "LoadOptions",
    "Pairs",
    "Rankings",
    "Ratings",
    "Thumbs",
    "build_dataset",
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

__getattr__ = lazy_attributes(
    __name__,
    {
        "Attributes": "feedback",
        "Edits": "feedback",
        "LoadOptions": "options",
        "Pairs": "feedback",
        "Rankings": "feedback",
        "Ratings": "feedback",
        "Thumbs": "feedback",
        "build_dataset": "build",
        "count_trained": "preview",
        "describe": "build",
        "filter_prompts": "lengths",
        "head_names": "lengths",
        "load_files": "sources.files",
        "load_hub": "sources.hub",
        "measure": "lengths",
        "mix": "sources.mixture",
        "prompt_ids": "tokenize",
        "render_batch": "preview",
        "render_sample": "preview",
        "report_cut_rows": "lengths",
        "row_ids": "tokenize",
        "tokenize_comparisons": "lengths",
    },
)
