"""
What the result of a run depends on besides its config, kept in `run.json`: a resumed run must go on with the same.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from accelerate import PartialState
from datasets import Dataset
from omegaconf import DictConfig

from rlhf_trl.config.values import at, nodes, plain
from rlhf_trl.models.adapters import model_fingerprint
from rlhf_trl.runs.paths import resolve_path

ROWS_AT_ONCE = 1000


def inputs_of(cfg: DictConfig, path: str, dataset: Mapping[str, Dataset]) -> dict[str, Any]:
    """
    The number of ranks, a hash of the rows of each split, and fingerprints of the models that the config names: the
    start (which is the reference too), reward models, the critic's start.

    Args:
        path (`str`): folder or hub id of the start. dataset (`Mapping`): the rows as the trainer gets them.
    """
    values, _ = plain(cfg)
    inputs = {"ranks": PartialState().num_processes}
    inputs |= {f"data ({split})": rows_fingerprint(rows) for split, rows in dataset.items()}
    models = {"model": (path, at(values, "model.revision"))}
    for name, node in nodes({key: values.get(key) for key in ("reward", "critic")}):
        if node.get("run") or isinstance(node.get("path"), str):
            where = resolve_path(node.get("path"), node.get("run"), f"{cfg.runs_dir}/{cfg.project}")
            models[name] = (where, node.get("revision"))
    for name, (where, revision) in models.items():
        if found := model_fingerprint(where, revision):
            inputs[name] = found
    return inputs


def rows_fingerprint(rows: Dataset) -> str:
    """Number and hash of the rows of a dataset, in their order."""
    digest = hashlib.sha256()
    for table in rows.with_format("arrow").iter(ROWS_AT_ONCE):
        for name in sorted(table.column_names):
            # As a file of its own: a column's buffers may hold more rows than these
            column = pa.table({name: table[name].combine_chunks()})
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, column.schema.remove_metadata()) as writer:
                writer.write_table(column.replace_schema_metadata())
            digest.update(sink.getvalue())
    return f"{len(rows)} rows (hash {digest.hexdigest()[:12]})"


def resume_problems(run_dir: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """
    What keeps a run from going on as it began: inputs that have changed.

    Args:
        before, now (`Mapping`): inputs, those recorded and today's.
    """
    changed = [
        f"`{key}` was {before[key]} and is {now[key]}" for key in before if key in now and before[key] != now[key]
    ]
    if not changed:
        return []
    return [
        f"The run in `{run_dir}` can't be resumed, since what it depends on has changed: {'; '.join(changed)}. "
        "Give it what it began with, or start again with another `run_name=...` or `overwrite=true`."
    ]
