"""Model card and upload of a trained model."""

from pathlib import Path

from transformers import Trainer

from rlhf_trl.errors import ConfigError
from rlhf_trl.models.hub import upload_model
from rlhf_trl.report.card import write_card
from rlhf_trl.runs.record import RUN_FILE
from rlhf_trl.terminal import say


class Publishing(Trainer):
    """
    Mixin for `transformers.Trainer` with a model card of our own, and uploads that hold the model alone.

    TRL drafts a card at every checkpoint that names neither base nor data where these are local ("fine-tuned version
    of None"), and transformers uploads whatever stands in the run directory, logs and the record of Hydra too.

    It overrides this private method (transformers 5.23): `_push_from_checkpoint`.
    """

    def create_model_card(self, *args, **kwargs):
        """Write the card of the run in `args.output_dir`; outside of a run TRL's."""
        run_dir = self._run_dir()
        if run_dir is None:
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            write_card(run_dir, repo=self.args.hub_model_id or "")

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ):
        """
        Upload the model with its card, as `Trainer.push_to_hub` does without our files; it always blocks.

        An upload that fails is a warning: the training is done, and `stage=push` repeats the upload.
        """
        args, run_dir = self.args, self._run_dir()
        if run_dir is None:
            return super().push_to_hub(commit_message, blocking, token, revision, private, **kwargs)
        self.save_model(_internal_call=True)
        if self.is_world_process_zero():
            repo = self._repo()
            write_card(run_dir, repo=repo, figure=True)
            self._upload(
                run_dir,
                repo,
                commit_message or "End of training",
                private=args.hub_private_repo if private is None else private,
                revision=revision or args.hub_revision,
                token=token or args.hub_token,
            )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """
        Upload the model of a checkpoint.

        transformers uploads the whole run directory meanwhile: logs, and the checkpoint that is being written there.
        """
        args = self.args
        if self._run_dir() is None:
            super()._push_from_checkpoint(checkpoint_folder)
        elif self.is_world_process_zero() and args.hub_strategy != "end":
            message = f"Training in progress, step {self.state.global_step}"
            self._upload(checkpoint_folder, self._repo(), message, revision=args.hub_revision, token=args.hub_token)

    def _run_dir(self) -> str | None:
        """Return `args.output_dir` where it is the directory of a run."""
        folder = self.args.output_dir
        return folder if folder is not None and Path(folder, RUN_FILE).is_file() else None

    def _repo(self) -> str:
        return self.hub_model_id or self.args.hub_model_id or Path(str(self.args.output_dir)).absolute().name

    def _upload(self, *args, **kwargs) -> None:
        try:
            say(f"Uploaded to {upload_model(*args, **kwargs)}")
        except ConfigError as error:
            say(f"warning: {error}")
