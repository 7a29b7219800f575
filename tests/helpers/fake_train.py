"""
A stand-in for `train.py` that trains nothing and leaves the same files, for tests of the pipeline and the sweep.

`+fails=true` makes it fail as long as there is no file `mended` where it stands; `+waits=true` makes it run until it
is interrupted (it then leaves a complete checkpoint), unless it is resumed; `+left=true` makes it stop with labels
that are left, until there is a file `mended`.
"""

import json
import os
import signal
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from rlhf_trl.runs.lock import locked

given = dict(item.lstrip("+").split("=", 1) for item in sys.argv[1:] if "=" in item)
run_dir = Path(given.get("runs_dir", "runs"), given.get("project", "default"), given.get("run_name", given["stage"]))
record = {
    "stage": given["stage"],
    "command": " ".join(["accelerate launch train.py", *sys.argv[1:]]),
    "pid": os.getpid(),
    "devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
}


def write(status: str) -> None:
    now = datetime.now(UTC).isoformat(timespec="microseconds")
    record.update(status=status, started=record.get("started", now), ended=now)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "run.json").write_text(json.dumps(record))


if (run_dir / "run.json").exists() and not {"resume", "overwrite"} & set(given):
    sys.exit(f"{run_dir} is in use")
with open("calls.txt", "a") as calls:
    calls.write(" ".join(sys.argv[1:]) + "\n")
lock = locked(run_dir)
lock.__enter__()
interrupted = []
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
    signal.signal(number, lambda *_: interrupted.append(True))
write("running")
if "fails" in given and not Path("mended").exists():
    write("failed")
    sys.exit("the data is missing: give it")
if "left" in given and not Path("mended").exists():
    (run_dir / "labels.jsonl").touch()
    write("stopped")
    sys.exit(130)
while "waits" in given and "resume" not in given:
    time.sleep(0.02)
    if interrupted:
        (run_dir / "checkpoint-1").mkdir()
        write("stopped")
        sys.exit()
(run_dir / "config.yaml").write_text("objective: eval_loss\n")
last = float(given.get("stage.args.beta", 0.5))
metrics = {
    "train": {},
    "eval": {"eval_loss": last},
    "history": [{"eval_loss": 2.0}, {"loss": 1.0}, {"eval_loss": last}],
}
for key, value in given.items():  # rewards that rise with the root of their share of the weights
    if key.startswith("reward.") and key.endswith(".weight"):
        metrics["eval"][f"eval_rewards/{key.split('.')[1]}/mean"] = abs(float(value)) ** 0.5 * (
            1 if float(value) > 0 else -1
        )
(run_dir / "metrics.json").write_text(json.dumps(metrics))
write("done")
