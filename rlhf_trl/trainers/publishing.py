"""Model card and upload of a trained model."""

from pathlib import Path

from transformers import Trainer

from rlhf_trl.models.hub import upload_model
from rlhf_trl.report.card import write_card
from rlhf_trl.runs.record import RUN_FILE
from rlhf_trl.terminal import say


class Publishing(Trainer):
    """
    Mixin for `transformers.Trainer` with a model card of our own, and uploads that hold the model alone.

    TRL drafts a card at every checkpoint that names neither base nor data where these are local ("fine-tuned version
    of None"), and transformers uploads whatever stands in the run directory, logs and the record of Hydra too.
    """

    def create_model_card(self, *args, **kwargs):
        """Write the card of the run in `args.output_dir`; outside of a run TRL's."""
        if self.args.output_dir is None or not Path(self.args.output_dir, RUN_FILE).is_file():
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            write_card(self.args.output_dir, repo=self.args.hub_model_id or "")

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

        Raises:
            [`~rlhf_trl.errors.ConfigError`]: if the hub can't be reached, or refuses the upload.
        """
        args = self.args
        if args.output_dir is None or not Path(args.output_dir, RUN_FILE).is_file():
            return super().push_to_hub(commit_message, blocking, token, revision, private, **kwargs)
        self.save_model(_internal_call=True)
        if self.is_world_process_zero():
            self._finish_current_push()  # of a checkpoint, which must not come after this one
            repo = self.hub_model_id or args.hub_model_id or Path(args.output_dir).absolute().name
            write_card(args.output_dir, repo=repo, figure=True)
            url = upload_model(
                args.output_dir,
                repo,
                commit_message or "End of training",
                private=args.hub_private_repo if private is None else private,
                revision=revision or args.hub_revision,
                token=token or args.hub_token,
            )
            say(f"Uploaded to {url}")
