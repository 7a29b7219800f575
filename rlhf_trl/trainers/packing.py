"""SFT on packed sequences (`packing`, `padding_free`), refused where rows would attend to each other."""

import torch
import trl
from accelerate.utils import is_peft_model
from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from rlhf_trl.errors import ConfigError
from rlhf_trl.trainers.base import TrainerMixin

LENGTH = 4  # tokens per row of the check
# Relative to the largest logit. Inputs of one shape give the same logits to the bit, except for a router that groups
# tokens
TOLERANCE = 1e-3


class SFTTrainer(TrainerMixin, trl.SFTTrainer):
    """`trl.SFTTrainer` that refuses to train where the rows of a packed sequence attend to each other."""

    args: trl.SFTConfig
    model: PreTrainedModel
    model_wrapped: Module
    processing_class: PreTrainedTokenizerBase

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.packing or self.args.eval_packing or self.padding_free:
            self.add_callback(PackingCheck(self))


class PackingCheck(TrainerCallback):
    """
    Callback that checks, before training begins, that the logits of a row don't depend on another row of its sequence.

    TRL marks rows by position ids that restart at 0. An architecture that passes its position ids to transformers'
    masks attends within a row only. OPT, BLOOM, Falcon and others don't, and each of their rows attends to all before
    it.

    Args:
        trainer ([`SFTTrainer`]):
            The trainer.
    """

    def __init__(self, trainer: SFTTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: trl.SFTConfig, state, control, **kwargs):
        """
        Run the check.

        Raises:
            [`~rlhf_trl.errors.ConfigError`]: if rows attend to each other, naming architecture and attention.
        """
        packed = {args.packing, args.packing if args.eval_packing is None else args.eval_packing}
        for is_packed in packed:
            if (is_packed or self.trainer.padding_free) and self._rows_attend_to_each_other(is_packed):
                model = self.trainer.accelerator.unwrap_model(self.trainer.model)
                model = model.get_base_model() if is_peft_model(model) else model
                names = [name for name in ("packing", "eval_packing", "padding_free") if getattr(args, name)]
                raise ConfigError(
                    f"Rows that share a sequence would see each other: `{type(model).__name__}` doesn't keep "
                    f"them apart with `{model.config._attn_implementation}` attention. Set "
                    + " and ".join(f"`stage.args.{name}=false`" for name in names)
                    + "."
                )

    def _rows_attend_to_each_other(self, packed: bool) -> bool:
        tokenizer = self.trainer.processing_class
        ids = (i for i in range(len(tokenizer)) if i not in tokenizer.all_special_ids)
        one, other, last = ([next(ids)] * LENGTH for _ in range(3))
        after_one, after_other = self._logits(one, last, packed), self._logits(other, last, packed)
        return bool((after_one - after_other).abs().max() > TOLERANCE * after_one.abs().max())

    @torch.no_grad()
    def _logits(self, first: list[int], last: list[int], packed: bool) -> Tensor:
        """Return the logits at the tokens of the row `last`, from a batch of the trainer's collator."""
        trainer, rows = self.trainer, [{"input_ids": first}, {"input_ids": last}]
        if packed:
            rows = [{"input_ids": first + last, "seq_lengths": [LENGTH, LENGTH]}]
            if trainer.args.packing_strategy == "wrapped":
                del rows[0]["seq_lengths"]
        inputs = trainer._prepare_inputs(trainer.data_collator(rows))
        del inputs["labels"]
        training = trainer.model.training
        trainer.model_wrapped.eval()
        with trainer.compute_loss_context_manager():
            logits = trainer.model_wrapped(**inputs, use_cache=False).logits
        trainer.model_wrapped.train(training)
        return logits[inputs["input_ids"] == last[0]].float()
