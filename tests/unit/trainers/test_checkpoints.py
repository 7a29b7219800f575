"""Checkpoints on a disk that becomes full: the earlier one stays whole, and the run resumes from it."""

import errno
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerControl, TrainerState

from rlhf_trl.callbacks.kl import FixedKL
from rlhf_trl.callbacks.reward_norm import RunningNorm
from rlhf_trl.cli.main import error_message
from rlhf_trl.errors import ConfigError
from rlhf_trl.rewards.lagrange import Lagrange
from rlhf_trl.runs.checkpoints import UNFINISHED, clear_unfinished, last_whole_checkpoint
from rlhf_trl.runs.record import write_json
from rlhf_trl.trainers.checkpoints import CompleteCheckpoints
from rlhf_trl.trainers.multipliers import Multipliers
from tests.helpers.watching import add_callbacks, sft


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def write_some_and_fail(content, path, *args, **kwargs):
    """As torch does it: the file is there, and the error is its own."""
    Path(path).write_bytes(b"half")
    raise RuntimeError("[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file data/0")


@pytest.mark.parametrize(
    ("place", "fails"),
    [
        ("torch.save", write_some_and_fail),  # optimizer
        pytest.param("rlhf_trl.runs.checkpoints._sync", full, marks=pytest.mark.slow),
        pytest.param("rlhf_trl.runs.checkpoints.write_json", full, marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch, place, fails):
    run_dir = tmp_path / "run"
    trainer = sft(run_dir, save_steps=2, max_steps=6, save_total_limit=1)
    trainer.train()
    whole = load_file(run_dir / "checkpoint-6" / "model.safetensors")
    shutil.rmtree(run_dir)

    trainer = sft(run_dir, save_steps=2, max_steps=6, save_total_limit=1)
    add_callbacks(trainer, run_dir)
    publish = trainer._save_checkpoint

    def save(*args):
        with pytest.MonkeyPatch.context() as patch:
            if trainer.state.global_step == 4:
                patch.setattr(place, fails)
            publish(*args)

    monkeypatch.setattr(trainer, "_save_checkpoint", save)
    with pytest.raises((OSError, RuntimeError)) as error:
        trainer.train()
    assert last_whole_checkpoint(run_dir) == (str(run_dir / "checkpoint-2"), {})
    assert (run_dir / UNFINISHED / "checkpoint-4").is_dir()
    clear_unfinished(run_dir)  # as `open_run` does with this error

    usage = SimpleNamespace(free=123_456_789)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage if Path(folder) == run_dir else None)
    message = error_message(error.value, SimpleNamespace(run_dir=str(run_dir)))
    assert f"`{run_dir}`: 0.1 GB are free" in message and f"`{run_dir / 'checkpoint-2'}`" in message

    trainer = sft(run_dir, save_steps=2, max_steps=6, save_total_limit=1)
    trainer.train(resume_from_checkpoint=str(run_dir / "checkpoint-2"))
    resumed = load_file(run_dir / "checkpoint-6" / "model.safetensors")
    assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())


def test_a_full_disk_leaves_a_json_file_as_it_was(tmp_path, monkeypatch):
    write_json(tmp_path / "run.json", {"status": "running"})
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_json(tmp_path / "run.json", {"status": "done"})
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    assert "running" in (tmp_path / "run.json").read_text()


def test_a_full_disk_before_the_first_checkpoint(tmp_path):
    message = error_message(
        OSError(errno.EDQUOT, "Disk quota exceeded"), SimpleNamespace(run_dir=str(tmp_path / "run"))
    )
    assert "`overwrite=true`" in message and "are free" in message


@pytest.mark.parametrize(
    ("callback", "key"),
    [
        (Multipliers(Lagrange({"tokens": "<= 9"})), "combine"),
        (RunningNorm(), "reward_norm"),
        (FixedKL(0.1), "kl"),
    ],
)
def test_a_checkpoint_without_the_state_of_a_callback_is_not_resumed(callback, key):
    callback.trainer = SimpleNamespace(beta=0.0)
    fresh, resumed = TrainerState(global_step=0), TrainerState(global_step=4)
    callback.on_train_begin(None, fresh, None)
    with pytest.raises(
        ConfigError, match=f"checkpoint at step 4 has no state of .* the run began with another `{key}`"
    ):
        callback.on_train_begin(None, resumed, None)


def test_the_state_of_a_callback_that_is_gone_is_named(capsys):
    """A checkpoint of a training with a constraint, which is resumed without it."""
    trainer = object.__new__(CompleteCheckpoints)
    trainer.args = SimpleNamespace(restore_callback_states_from_checkpoint=False)
    trainer.control = TrainerControl()
    trainer.callback_handler = SimpleNamespace(callbacks=[RunningNorm()])
    kept = {callback: {} for callback in ("TrainerControl", "RunningNorm")}
    trainer.state = TrainerState(global_step=4, stateful_callbacks=dict(kept))
    trainer._load_callback_state()
    assert capsys.readouterr().out == ""
    trainer.state = TrainerState(global_step=4, stateful_callbacks=kept | {"Multipliers": {}})
    trainer._load_callback_state()
    assert "checkpoint at step 4 keeps the state of `Multipliers`" in capsys.readouterr().out
