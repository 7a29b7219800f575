"""Starts of models: what each was trained from, as the records of the runs say."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from rlhf_trl.models.adapters import adapter_config, base_path, model_fingerprint
from rlhf_trl.runs.record import RANDOM_WEIGHTS, read_run
from rlhf_trl.runs.results import RunRecord


class Start(NamedTuple):
    """
    A model that another one was trained from, or that model itself.

    Attributes:
        path (`str`): folder or hub id.
        fingerprint (`str`, *optional*): hash of its weights at that time, `None` where none was recorded.
    """

    path: str
    fingerprint: str | None

    def is_same(self, other: "Start") -> bool:
        """Return whether both are the same weights: by their fingerprints, else by where they are."""
        if self.fingerprint and other.fingerprint:
            return self.fingerprint == other.fingerprint
        return self.path == other.path


def starts_of(path: str) -> list[Start]:
    """
    Return the model at `path` and what it was trained from, run by run, the nearest first. An adapter without a record
    starts from its base. Where a start has been trained again since, what that was trained from is unknown.
    """
    return list(_starts(path))


def _starts(path: str) -> Iterator[Start]:
    found, seen = Start(path, model_fingerprint(path)), set()
    while found.path not in seen:
        yield found
        seen.add(found.path)
        if not Path(found.path).is_dir() or found.fingerprint != model_fingerprint(found.path):
            return
        record = _record(Path(found.path))
        if record is None:
            if (adapter := adapter_config(found.path)) is None:
                return
            path = base_path(found.path, adapter)
            found = Start(path, model_fingerprint(path, adapter.revision))
        elif record.model and record.model != RANDOM_WEIGHTS:
            found = Start(record.model, record.inputs.get("model"))


def _record(folder: Path) -> RunRecord | None:
    """Return the record of the run that left a model: in its folder, or above a checkpoint or a merged adapter."""
    above = folder.name == "merged" or folder.name.startswith("checkpoint-")
    return read_run(folder) or (read_run(folder.parent) if above else None)


def common_start(paths: Mapping[str, str]) -> Start | None:
    """Return the nearest start that several models have in common, `None` where the records name none."""
    first, *others = (starts_of(path) for path in paths.values())
    return next((one for one in first if all(any(map(one.is_same, other)) for other in others)), None)


def start_problem(paths: Mapping[str, str]) -> str | None:
    """Return why several models, by name, can't be said to share a start; `None` where they do."""
    if common_start(paths) is not None:
        return None
    known = {name: starts_of(path)[1:] for name, path in paths.items()}
    if unknown := [name for name, starts in known.items() if not starts]:
        return (
            f"`{unknown[0]}` (`{paths[unknown[0]]}`) has no record of a run that says what it was trained from. Where "
            "you know that all models were trained from the same weights, set `stage.assume_shared_start=true`"
        )
    changed = next(
        (
            one.path
            for starts in known.values()
            for one in starts
            for others in known.values()
            for other in others
            if one.path == other.path and not one.is_same(other)
        ),
        None,
    )
    if changed:
        return f"`{changed}`, which they were trained from, was trained again in between. Train all from the same one"
    told = "; ".join(f"`{name}` from `{starts[0].path}`" for name, starts in known.items())
    return f"they were trained from different ones: {told}. Train all from the same one"
