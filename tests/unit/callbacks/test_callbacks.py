"""Progress lines, the run's record, samples, and Ctrl-C, on trainings of seconds."""

import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainerControl, TrainerState

from rlhf_trl.callbacks.interrupt import Interrupt, ignoring_signals, raising_preempted
from rlhf_trl.callbacks.progress import choose_columns, metrics_line
from rlhf_trl.callbacks.samples import SAMPLES_FILE
from rlhf_trl.data.messages import as_text
from rlhf_trl.errors import PREEMPTED_STATUS, PREEMPTIONS, Preempted
from rlhf_trl.report.text import compact_number
from rlhf_trl.runs.checkpoints import _sync, checkpoints, last_checkpoint, rotate
from rlhf_trl.runs.record import METRICS_FILE, finish_run, read_run, start_run, write_json, write_metrics
from rlhf_trl.trainers.checkpoints import CompleteCheckpoints
from rlhf_trl.trainers.steps import steps_per_rollout
from tests.helpers.watching import add_callbacks, count_cats, grpo, sft

ROOT = Path(__file__).parents[3]


# steps_per_rollout


@pytest.mark.parametrize(
    ("micro_batches", "iterations", "accumulation", "expected"),
    [(4, 4, 1, 16), (4, 1, 4, 1), (8, 2, 4, 4), (1, 1, 1, 1), (3, 1, 2, 3), (2, 1, 4, 1)],
)
def test_steps_per_rollout(micro_batches, iterations, accumulation, expected):
    args = SimpleNamespace(
        steps_per_generation=micro_batches, num_iterations=iterations, gradient_accumulation_steps=accumulation
    )
    assert steps_per_rollout(args) == expected


def test_steps_per_rollout_counts_what_the_trainer_does(tmp_path):
    trainer = grpo(tmp_path, max_steps=8, steps_per_generation=4, gradient_accumulation_steps=2)
    assert steps_per_rollout(trainer.args) == 4
    steps = []

    def reward(completions, **kwargs):
        steps.append(trainer.state.global_step)
        return count_cats(completions)

    trainer.reward_funcs[0] = reward
    trainer.train()
    assert steps == [0, 4]
    assert steps_per_rollout(sft(tmp_path).args) == 1


# Progress


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.693147, "0.693"), (-2.0, "-2"), (1.5e-5, "1.5e-05"), (0, "0"), (12345.0, "12345"), (12345.67, "1.2e+04")],
)
def test_numbers_have_few_digits(value, text):
    assert compact_number(value) == text


def test_lines_stand_under_each_other():
    first = {"objective/scores": 0.5, "objective/kl": 1.23456, "loss": 9.0, "completions/mean_length": 12.0}
    columns = choose_columns(first)
    assert list(columns.values()) == ["score", "kl", "len"]
    lines = [metrics_line(first, columns, 8, 100), metrics_line({"objective/kl": math.nan}, columns, 16, 100)]
    assert lines == ["  8/100  score 0.5     kl 1.23    len 12", " 16/100  score -       kl nan     len -"]


def test_a_kl_of_rounding_is_0():
    columns = {"objective/kl": "kl", "policy/approxkl": "approxkl"}
    logs = {"objective/kl": -1.2e-7, "policy/approxkl": 1.2e-7}
    assert metrics_line(logs, columns, 1, 1) == "1/1  kl 0       approxkl 1.2e-07"


def test_unknown_trainers_show_their_first_metrics():
    assert list(choose_columns({f"m{i}": 0.0 for i in range(20)})) == [f"m{i}" for i in range(8)]


def test_one_line_a_log_step_and_no_dict(tmp_path, capsys):
    trainer = sft(tmp_path)
    add_callbacks(trainer, tmp_path)
    trainer.train()
    trainer.evaluate()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines if line.startswith(("train ", "eval "))] == [
        *("train 1/4", "train 2/4", "eval", "train 3/4", "train 4/4", "eval", "eval")
    ]
    assert "{" not in "".join(lines)
    train_lines = [line for line in lines if line.startswith("train ")]
    assert all("loss " in line and "accuracy " in line for line in train_lines)
    assert len({line.index("lr ") for line in train_lines}) == 1


# Record


def test_run_json_tells_how_a_run_began_and_ended(tmp_path):
    run_dir = tmp_path / "runs" / "sft"
    assert read_run(run_dir) is None
    start_run(run_dir, "sft", "accelerate launch train.py stage=sft", "demo:base")
    begun = read_run(run_dir)
    assert begun.status == "running" and begun.ended is None
    assert {"python", "torch", "transformers", "trl"} <= begun.versions.keys()
    finish_run(run_dir, "stopped")
    start_run(run_dir, "sft", "accelerate launch train.py stage=sft resume=true", "demo:base")
    finish_run(run_dir, "done")
    ended = read_run(run_dir)
    assert ended.status == "done" and ended.started == begun.started <= ended.ended


def test_json_is_valid_and_whole(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"kept": 1})
    with pytest.raises(TypeError):
        write_json(path, {"good": 1, "bad": object()})
    assert json.loads(path.read_text()) == {"kept": 1}
    write_json(path, {"nan": math.nan, "list": [math.inf, 1.5]})
    assert path.read_text().count("null") == 2 and "NaN" not in path.read_text()


def test_metrics_are_the_last_of_each_and_all(tmp_path):
    history = [
        {"loss": 2.0, "step": 1},
        {"eval_loss": 1.5, "step": 1},
        {"loss": 1.0, "step": 2},
        {"train_runtime": 3.0, "step": 2},
    ]
    write_metrics(tmp_path, history)
    found = json.loads((tmp_path / METRICS_FILE).read_text())
    assert found["train"] == {"loss": 1.0, "train_runtime": 3.0, "step": 2}
    assert found["eval"] == {"eval_loss": 1.5, "step": 1}
    assert found["history"] == history


def test_record_of_a_training(tmp_path):
    trainer = sft(tmp_path)
    add_callbacks(trainer, tmp_path)
    trainer.train()
    found = json.loads((tmp_path / METRICS_FILE).read_text())
    assert found["history"] == trainer.state.log_history
    assert found["eval"]["eval_loss"] == trainer.state.log_history[-2]["eval_loss"]
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")


def test_the_newest_checkpoint_is_found_by_its_step(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-best", ".unfinished"):
        (tmp_path / name).mkdir()
    (tmp_path / ".unfinished" / "checkpoint-100").mkdir()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_rotation_keeps_the_newest_and_the_best(tmp_path):
    for step in (1, 2, 3):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "model.safetensors").write_text("weights")
    rotate(tmp_path, 2, str(tmp_path / "checkpoint-1"))
    assert sorted(path.name for path in tmp_path.glob("c*")) == ["checkpoint-1", "checkpoint-3"]
    rotate(tmp_path, 1, None)
    assert [path.name for path in tmp_path.glob("c*")] == ["checkpoint-3"]


def test_a_whole_checkpoint_exists_at_any_moment(tmp_path, monkeypatch):
    """With `save_total_limit=1`: whatever is being written, all that has a checkpoint's name is whole."""
    seen = []

    def look(function):
        def looked(*args, **kwargs):
            found = [path.name for path in checkpoints(tmp_path)]
            for path in checkpoints(tmp_path):
                assert {"model.safetensors", "optimizer.pt", "trainer_state.json"} <= {p.name for p in path.iterdir()}
            seen.append(found)
            return function(*args, **kwargs)

        return looked

    trainer = sft(tmp_path, save_total_limit=1, save_steps=1, max_steps=3)
    trainer.save_model = look(trainer.save_model)
    trainer._save_rng_state = look(trainer._save_rng_state)
    monkeypatch.setattr("rlhf_trl.runs.checkpoints._sync", look(_sync))
    monkeypatch.setattr(shutil, "rmtree", look(shutil.rmtree))
    add_callbacks(trainer, tmp_path)
    trainer.train()
    first, second, third = (f"checkpoint-{step}" for step in (1, 2, 3))
    assert [found for found, _ in itertools.groupby(seen)] == [
        *([], [first], [first, second], [second], [second, third], [third]),
    ]
    assert not (tmp_path / ".unfinished").exists() and trainer.args.save_total_limit == 1


def test_the_best_checkpoint_is_known_by_its_final_name(tmp_path):
    trainer = sft(tmp_path, save_steps=2, max_steps=4, metric_for_best_model="eval_loss", save_total_limit=1)
    add_callbacks(trainer, tmp_path)
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    saved = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert saved["best_model_checkpoint"] == str(tmp_path / "checkpoint-4")


def test_what_a_killed_run_left_is_cleared(tmp_path):
    torn = tmp_path / ".unfinished" / "checkpoint-7"
    torn.mkdir(parents=True)
    (torn / "model.safetensors").write_text("half")
    trainer = sft(tmp_path, save_steps=2, max_steps=2)
    add_callbacks(trainer, tmp_path)
    trainer.train()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2"] and not torn.parent.exists()


# Samples


def test_samples_of_each_rollout_once(tmp_path):
    trainer = grpo(tmp_path, max_rows=2, max_steps=6, eval_strategy="steps", eval_steps=2)
    trainer.train()
    rows = [json.loads(line) for line in (tmp_path / SAMPLES_FILE).read_text().splitlines()]
    found = [(row["step"], row["rollout"], row["split"]) for row in rows]
    expected = [(1, 1, "train"), (2, 1, "eval"), (3, 2, "train"), (4, 2, "eval"), (5, 3, "train"), (6, 3, "eval")]
    assert found == [place for place in expected for _ in range(2)]
    # Rows are spread over a rollout, whose neighbours answer the same prompt
    assert all(first["prompt"] != second["prompt"] for first, second in zip(rows[::2], rows[1::2], strict=True))


def test_resumed_samples_do_not_repeat_steps(tmp_path):
    grpo(tmp_path, max_steps=4).train()
    before = (tmp_path / SAMPLES_FILE).read_text().splitlines()
    with open(tmp_path / SAMPLES_FILE, "a") as file:
        file.write('{"step": 4, "torn')
    grpo(tmp_path, max_steps=4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    steps = [json.loads(line)["step"] for line in (tmp_path / SAMPLES_FILE).read_text().splitlines()]
    assert steps == [1] * 4 + [3] * 4
    assert (tmp_path / SAMPLES_FILE).read_text().splitlines()[:4] == before[:4]


def test_messages_become_text():
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    assert as_text(chat) == "system: Be kind.\nuser: Hi"
    assert as_text([{"role": "assistant", "content": "Hello"}]) == "Hello"
    assert as_text("plain") == "plain"


# Interrupt


class Press(TrainerCallback):
    """Sends this process a signal in the middle of a step."""

    def __init__(self, *steps, number=signal.SIGINT):
        self.steps, self.number = steps, number

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 in self.steps:
            os.kill(os.getpid(), self.number)


@pytest.fixture
def in_a_terminal():
    """Set SIGHUP's default handler, as in a terminal: under `nohup` it is ignored, and the callback leaves it so."""
    previous = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, previous)


@pytest.mark.parametrize(
    "number",
    [signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2],
    ids=lambda number: number.name,
)
def test_first_signal_finishes_the_step_saves_and_stops(tmp_path, number, capfd, in_a_terminal):
    handled = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    before = [signal.getsignal(each) for each in handled]
    trainer = sft(tmp_path, save_steps=100, max_steps=50, callbacks=[Press(3, number=number)])
    interrupt = add_callbacks(trainer, tmp_path)
    trainer.train()
    assert interrupt.interrupted and trainer.state.global_step == 3
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")
    assert before == [signal.getsignal(each) for each in handled]
    said = capfd.readouterr().err
    assert "resume=true" in said
    assert interrupt.preempted == (f"Preempted ({number.name})" in said) == (number in PREEMPTIONS)


def test_rollouts_are_finished_first(tmp_path):
    trainer = grpo(tmp_path, save_steps=100, max_steps=20)
    trainer.add_callback(Press(3))
    add_callbacks(trainer, tmp_path)
    trainer.train()
    assert trainer.state.global_step == 4
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")


@pytest.mark.parametrize(
    "strategies",
    [
        {"save_strategy": "no"},
        {"save_strategy": "epoch", "eval_strategy": "epoch"},
        {"save_strategy": "best", "eval_steps": 3, "metric_for_best_model": "eval_entropy", "greater_is_better": True},
    ],
)
def test_stop_saves_whatever_the_strategy(tmp_path, strategies):
    # Twice at the last step with `best`: once as the best or not, and then because of the signal, but never both
    trainer = sft(tmp_path, max_steps=50, callbacks=[Press(3)], **strategies)
    saves = []

    class Saves(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            saves.append(state.global_step)

    trainer.add_callback(Saves())
    add_callbacks(trainer, tmp_path)
    trainer.train()
    assert saves == [3]
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")


def test_signal_in_the_last_step_is_no_interruption(tmp_path):
    trainer = sft(tmp_path, max_steps=3, callbacks=[Press(3)])
    interrupt = add_callbacks(trainer, tmp_path)
    trainer.train()
    assert not interrupt.interrupted and trainer.state.global_step == 3


def begin(interrupt):
    state = TrainerState(is_world_process_zero=True, max_steps=10)
    interrupt.on_train_begin(SimpleNamespace(), state, TrainerControl())


def test_second_signal_stops_at_once(monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    interrupt = Interrupt("resume")
    begin(interrupt)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)  # an echo of the first
    os.kill(os.getpid(), signal.SIGHUP)
    now += 5
    os.kill(os.getpid(), signal.SIGHUP)  # never more than a first signal
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("later", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_scheduler_may_signal_again_while_the_checkpoint_is_written(monkeypatch, later):
    interrupt = Interrupt("resume")
    begin(interrupt)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    os.kill(os.getpid(), signal.SIGUSR1)
    now += 5
    os.kill(os.getpid(), later)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)  # somebody who doesn't want to wait


def test_outside_of_training_a_scheduler_ends_the_run_where_it_stands():
    before = signal.getsignal(signal.SIGUSR1)
    with pytest.raises(Preempted) as ended, raising_preempted():
        os.kill(os.getpid(), signal.SIGUSR1)
    assert ended.value.code == PREEMPTED_STATUS == 75 and signal.getsignal(signal.SIGUSR1) is before
    with raising_preempted(), ignoring_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)


def test_nohup_is_respected(monkeypatch):
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    interrupt = Interrupt("resume")
    begin(interrupt)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    interrupt.restore()
    signal.signal(signal.SIGHUP, previous)


def start(command, *options):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    script = str(ROOT / "tests" / "helpers" / "watching.py")
    return subprocess.Popen([*command, script, *options], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.stdout.read().decode()
        time.sleep(0.05)


def test_ctrl_c_in_a_process_and_resume(tmp_path):
    process = start([sys.executable], "sft", str(tmp_path), "--seconds", "0.3")
    wait_for(tmp_path / METRICS_FILE, process)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=120)[0].decode()
    assert process.returncode == 130, output
    assert "resume=true" in output and "Traceback" not in output
    assert read_run(tmp_path).status == "stopped"
    stopped = int(last_checkpoint(tmp_path).rsplit("-", 1)[1])
    assert f"Stopped at step {stopped} of" in output

    trainer = sft(tmp_path, max_steps=stopped + 2)
    add_callbacks(trainer, tmp_path)
    trainer.train(resume_from_checkpoint=last_checkpoint(tmp_path))
    steps = [entry["step"] for entry in trainer.state.log_history if "loss" in entry]
    assert steps == list(range(1, stopped + 3))


@pytest.mark.slow
def test_killed_while_it_saves(tmp_path):
    """SIGKILL at whatever moment leaves the newest whole checkpoint loadable."""
    process = start([sys.executable], "sft", str(tmp_path), "--save-steps", "1")
    wait_for(tmp_path / "checkpoint-3", process)
    process.kill()
    process.communicate()
    checkpoint = last_checkpoint(tmp_path)
    assert checkpoint is not None
    done = int(checkpoint.rsplit("-", 1)[1])
    trainer = sft(tmp_path, max_steps=done + 1)
    add_callbacks(trainer, tmp_path)
    trainer.train(resume_from_checkpoint=checkpoint)
    assert last_checkpoint(tmp_path) == str(tmp_path / f"checkpoint-{done + 1}")


@pytest.mark.slow
def test_all_ranks_stop_at_the_step_of_one(tmp_path):
    """Only one rank gets the signal; both stop, save their random states, and write one record."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    process = start(torchrun, "sft", str(tmp_path), "--seconds", "0.5")
    wait_for(tmp_path / METRICS_FILE, process)
    listing = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True, check=True).stdout.split("\n")
    workers = [int(line.split()[0]) for line in listing[1:-1] if line.split()[1] == str(process.pid)]
    assert len(workers) == 2
    first_rank = read_run(tmp_path).pid
    os.kill(next(pid for pid in workers if pid != first_rank), signal.SIGINT)
    output = process.communicate(timeout=300)[0].decode()
    assert output.count("Stopped at step") == 1, output
    assert read_run(tmp_path).status == "stopped"
    checkpoint = Path(last_checkpoint(tmp_path))
    assert (checkpoint / "rng_state_0.pth").exists() and (checkpoint / "rng_state_1.pth").exists()
    lines = [line for line in output.splitlines() if line.startswith("train ")]
    assert len(lines) == len(set(lines)) == int(checkpoint.name.split("-")[1])


def test_tied_weights_are_not_missing_from_a_checkpoint(tmp_path, monkeypatch):
    trainer, said = sft(tmp_path, max_steps=1), []
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    trainer.model = LlamaForCausalLM(LlamaConfig(vocab_size=16, tie_word_embeddings=True, **sizes))
    monkeypatch.setattr("transformers.trainer.logger.warning", said.append)
    trainer.save_model(str(tmp_path / "checkpoint"))
    with monkeypatch.context() as stock:
        stock.delattr(CompleteCheckpoints, "_issue_warnings_after_load")
        trainer._load_from_checkpoint(str(tmp_path / "checkpoint"))
    assert len(said) == 1 and "'lm_head.weight'" in said.pop()
    trainer._load_from_checkpoint(str(tmp_path / "checkpoint"))
    assert not said
    load = trainer.model.load_state_dict({}, strict=False)
    trainer._issue_warnings_after_load(load)  # both names of it are missing, and all others
    assert len(said) == 1 and "'lm_head.weight'" in said[0] and "norm.weight" in said[0]
