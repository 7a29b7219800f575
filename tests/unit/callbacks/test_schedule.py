"""Schedules that are all warmup."""

from types import SimpleNamespace

import pytest
from transformers import TrainingArguments

from rlhf_trl.callbacks.schedule import ScheduleWarning, schedule_problem


@pytest.mark.parametrize(
    ("kind", "warmup", "steps", "parts"),
    [
        ("linear", 0.05, 1, ["is 0 at every step", "nothing is learned", "has 1 optimizer step", "(0.05) makes 1 of"]),
        ("cosine", 3, 1, ["is 0 at every step"]),
        ("constant_with_warmup", 100, 10, ["doesn't get above 9% of", "little is learned", "has 10 optimizer steps"]),
        ("linear", 0, 1, []),
        ("linear", 0.05, 2, []),  # the second step has the whole of it
        ("linear", 1.0, 2, []),
        ("linear", 10, 10_000, []),
        ("constant", 0.05, 1, []),  # reads no warmup
    ],
)
def test_a_schedule_without_learning_is_said_before_training(tmp_path, capsys, kind, warmup, steps, parts):
    args = TrainingArguments(
        str(tmp_path), lr_scheduler_type=kind, warmup_steps=warmup, learning_rate=1e-4, use_cpu=True, report_to="none"
    )
    ScheduleWarning().on_train_begin(args, SimpleNamespace(max_steps=steps), None)
    said = " ".join(capsys.readouterr().out.split())
    assert bool(said) == bool(parts) and all(part in said for part in parts)
    assert not parts or "Set `stage.args.warmup_steps=0`" in said
    args.learning_rate = 0.0
    assert schedule_problem(args, steps) is None  # as it was asked for
