"""The expected duration of a training (`debug=plan`)."""

from pathlib import Path

import pytest

from rlhf_trl.cli.timing import TIMED, Timing, duration, parts_of, time_steps, timing_lines

ROLLOUTS = Timing(micro_batch=0.5, rollout=3.0, micro_batches=80, rollouts=10, tokens=100, peak=None)
ROWS = Timing(micro_batch=2.0, rollout=None, micro_batches=100, rollouts=0, tokens=64, peak=2**30)


@pytest.mark.parametrize(
    ("timing", "total", "text"),
    [
        (
            ROLLOUTS,
            70.0,
            "about 70 s without evaluations and checkpoints: 10 rollouts x 3 s + 80 micro-batches x 0.5 s",
        ),
        (
            ROLLOUTS._replace(rollout=None, rollouts=80),
            40.0,
            "about 40 s without evaluations and checkpoints: 80 micro-batches x 0.5 s, each with its rollout",
        ),
        (ROWS, 200.0, "about 3 min without evaluations and checkpoints: 100 micro-batches x 2 s"),
        (ROWS._replace(members=4), 800.0, "about 13 min without evaluations and checkpoints: 4 members x (100 micro-"),
    ],
)
def test_the_parts_add_up(timing, total, text):
    lines = timing_lines(timing)
    assert timing.total == pytest.approx(total) and lines["time"].startswith(text)
    assert lines["speed"].startswith("200 tokens" if timing.tokens == 100 else "32 tokens")
    assert ("memory measured" in lines) == (timing.peak is not None)


@pytest.mark.parametrize(
    ("durations", "per_rollout", "parts"),
    [
        ([9.0, 2.0, 1.0], None, (1.5, None)),  # the first one waits for kernels
        ([9.0, 1.0, 3.0], 16, (2.0, 7.0)),
        ([9.0, 2.0, 8.0], 2, (2.0, 7.0)),  # the third one begins a rollout too
        ([9.0, 4.0, 6.0], 1, (5.0, None)),  # as all do
    ],
)
def test_a_rollout_is_told_from_the_micro_batches_that_wait_for_it(durations, per_rollout, parts):
    assert parts_of(durations, per_rollout) == parts


@pytest.mark.parametrize(("seconds", "text"), [(99, "99 s"), (600, "10 min"), (9000, "2.5 h"), (300_000, "3.5 days")])
def test_durations_are_for_people(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("words", "micro_batches", "rollouts", "members"),
    [
        # Rollouts of 2 x 4 completions in two epochs: four micro-batches each
        (
            "stage=ppo stage.args.total_episodes=32 stage.args.num_iterations=2 stage.args.steps_per_generation=2 "
            "stage.args.max_completion_length=4",
            16,
            4,
            1,
        ),
        ("stage=reward adapter=lora stage.members=2 stage.args.max_steps=7", 7, 0, 2),
    ],
)
def test_a_few_micro_batches_are_timed_and_nothing_is_written(
    compose, tmp_path, monkeypatch, capsys, words, micro_batches, rollouts, members
):
    monkeypatch.chdir(tmp_path)
    sizes = "debug=plan data.max_samples=48 data.max_eval_samples=8 stage.args.per_device_train_batch_size=4"
    timing = time_steps(compose(*words.split(), *sizes.split(), "stage.args.gradient_accumulation_steps=1"))
    assert (timing.micro_batches, timing.rollouts, timing.members) == (micro_batches, rollouts, members)
    assert timing.micro_batch > 0 and timing.tokens > 4 and (timing.rollout is not None) == (rollouts > 0)
    assert f"micro-batch {TIMED} of {TIMED}" in capsys.readouterr().out
    assert list(Path().iterdir()) == []
