"""
Reads the file of an offline W&B run, which W&B itself reads in Go only.

A header of 7 bytes, then blocks of 32 KiB of records: checksum (4 bytes), length (2), type (1), data; a record that is
too long for its block goes on in the next (type 1 whole, 2 first, 3 middle, 4 last). Each is one protobuf `Record`.
"""

import json
import time
from pathlib import Path

from wandb.proto import wandb_internal_pb2

BLOCK = 32768


def records(path):
    data = Path(path).read_bytes()
    assert data[:4] == b":W&B"
    position, parts = 7, b""
    while position + 7 <= len(data):
        left = BLOCK - position % BLOCK
        if left < 7:  # too little for a record's head
            position += left
            continue
        length = int.from_bytes(data[position + 4 : position + 6], "little")
        kind = data[position + 6]
        if position + 7 + length > len(data):
            return  # not yet written to its end
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def read_run(run_dir):
    """One offline run kept in `run_dir`: its config, the rows of its history, its summary, and what it is called."""
    (path,) = Path(run_dir, "wandb").glob("offline-run-*/run-*.wandb")
    # W&B's own process may write the end of the file some moments after `wandb.finish`
    deadline = time.monotonic() + 60
    while not any(record.HasField("exit") for record in records(path)):
        assert time.monotonic() < deadline, f"{path} has no end"
        time.sleep(0.1)
    config, history, summary, run, defined, artifacts = {}, [], {}, None, [], []
    for record in records(path):
        if record.HasField("run"):
            run = record.run
        for update in (*record.run.config.update, *record.config.update):
            config[update.key or update.nested_key[0]] = json.loads(update.value_json)
        if record.HasField("metric"):
            defined.append(record.metric)
        if record.HasField("artifact"):
            artifacts.append(record.artifact)
        if record.HasField("history"):
            history.append(
                {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            )
        for update in record.summary.update:
            summary[update.key or "/".join(update.nested_key)] = json.loads(update.value_json)
    return {
        "run": run,
        "config": config,
        "history": history,
        "summary": summary,
        "files": path.parent / "files",
        "defined": defined,  # metrics with their x-axis
        "artifacts": artifacts,
    }
