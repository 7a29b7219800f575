"""Complete checkpoints: each appears when all of it is on the disk, and a resumed run is the uninterrupted one."""

from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerState

from rlhf_trl.errors import ConfigError
from rlhf_trl.hints import names_of
from rlhf_trl.runs.checkpoints import STATE_FILE, UNFINISHED, clear_unfinished, publish
from rlhf_trl.terminal import say


def resumed_state(callback: TrainerCallback, state: TrainerState, key: str) -> dict[str, Any] | None:
    """
    Return the attributes that a callback's `state()` left in the checkpoint a run is resumed from, if it is.

    Transformers would rebuild the callback from them without its trainer, so callbacks read them back themselves.

    Args:
        callback (`TrainerCallback`), state (`TrainerState`): the callback, and the state of the trainer.
        key (`str`): where the config names the callback, such as `kl`.

    Raises:
        ConfigError: if the checkpoint has none: the callback would begin anew in the middle of a run.
    """
    if state.global_step == 0:
        return None
    saved: Any = state.stateful_callbacks  # a dict, whatever its annotation says
    name = type(callback).__name__
    if name not in saved:
        raise ConfigError(
            f"The checkpoint at step {state.global_step} has no state of `{name}`: the run began with another "
            f"`{key}`. Resume it with that of its config.yaml, or begin a new run from its weights: "
            "`run_name=... model.run=...`."
        )
    return saved[name]["attributes"]


class CompleteCheckpoints(Trainer):
    """
    Mixin for `transformers.Trainer` that changes how it writes checkpoints and resumes from them.

    It overrides these private methods (transformers 5.23):

    - `_save_checkpoint`, `_get_output_dir`: all ranks write into a folder of another name, which is renamed as the
      last act. The Trainer writes under the final name, so that a killed run leaves half a checkpoint to resume from.
    - `_run_epoch`: the Trainer compares with `max_steps` after a step only, so that a run killed during its final
      evaluation would train one step too many after resuming, unless the last step ends an epoch.
    - `_issue_warnings_after_load`: a checkpoint holds tied weights once, and the Trainer calls the other name missing.
    - `_load_from_checkpoint`, `_load_best_model`: many models that read images are saved under other names than those
      of their modules, and the Trainer passes over what it can't place, so that a run went on from its first weights.
    - `_load_callback_state`: the Trainer drops what the checkpoint keeps of callbacks that this one doesn't have.
    """

    _checkpoints_dir: str | None = None

    def _get_output_dir(self, trial=None) -> str:
        return self._checkpoints_dir or super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial):
        args, state, wait = self.args, self.state, self.accelerator.wait_for_everyone
        assert args.output_dir
        run_dir = Path(args.output_dir)
        unfinished, name = run_dir / UNFINISHED, f"checkpoint-{state.global_step}"
        if args.should_save:
            clear_unfinished(run_dir)
        wait()
        self._checkpoints_dir = str(unfinished)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._checkpoints_dir = None
        wait()
        best_so_far = state.best_model_checkpoint == str(unfinished / name)
        if best_so_far:
            state.best_model_checkpoint = str(run_dir / name)
        if args.should_save:
            if best_so_far:
                state.save_to_json(str(unfinished / name / STATE_FILE))
            publish(run_dir, name, args.save_total_limit, state.best_model_checkpoint)
        wait()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_renamed(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_renamed(self.state.best_model_checkpoint)

    def _load_renamed(self, folder: str | None, model=None) -> None:
        """Load the weights of a checkpoint by `from_pretrained`, if it has them under other names than the model."""
        model = self.accelerator.unwrap_model(model or self.model)
        if (
            folder is None
            or not isinstance(model, PreTrainedModel)
            or self.is_fsdp_enabled
            or self.is_deepspeed_enabled
        ):
            return
        files = Path(folder).glob("model*.safetensors")
        names = set().union(*(safe_open(file, "pt").keys() for file in files))
        if not names <= model.state_dict().keys():
            model.load_state_dict(type(model).from_pretrained(folder, dtype=model.dtype).state_dict(), strict=False)

    def _load_callback_state(self) -> None:
        super()._load_callback_state()
        saved: Any = self.state.stateful_callbacks  # a dict, whatever its annotation says
        present = {type(callback).__name__ for callback in (*self.callback_handler.callbacks, self.control)}
        if lost := [name for name in saved if name not in present]:
            say(
                f"warning: the checkpoint at step {self.state.global_step} keeps the state of {names_of(lost)}, which "
                "this trainer doesn't have, and the run goes on without it. To resume the run that was interrupted, "
                "make the trainer with the same rewards, combination, normalizer and callbacks."
            )

    def _run_epoch(self, *args, **kwargs):
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _issue_warnings_after_load(self, load_result):
        tied = getattr(self.model, "all_tied_weights_keys", {})
        pairs = {**tied, **{source: name for name, source in tied.items()}}
        missing = [key for key in load_result.missing_keys if pairs.get(key, key) in load_result.missing_keys]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))
