"""The trainer that a config names."""

import traceback
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig
from transformers import Trainer

from rlhf_trl.data.multimodal import tokenizer_of
from rlhf_trl.data.preview import note_rows_without_end
from rlhf_trl.errors import ConfigError, DataError
from rlhf_trl.trainers.rollouts import extended


def build_trainer(cfg: DictConfig, **objects: Any) -> Trainer:
    """
    Make the trainer that `cfg.stage.trainer` names. Its dataset is prepared as it will be trained on.

    Where its class, such as one of TRL's own, isn't a [`~rlhf_trl.trainers.base.TrainerMixin`], a subclass of it is.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if it is no class of trainers, or TRL refuses the arguments or the rows, or
            leaves none.
    """
    named = instantiate(cfg.stage.trainer)
    if not (isinstance(named.func, type) and issubclass(named.func, Trainer)):
        raise ConfigError(
            f"`stage.trainer` names `{cfg.stage.trainer._target_}`, which is no class of trainers. Name a subclass of "
            "`transformers.Trainer`, such as one of TRL's."
        )
    try:
        trainer = extended(named.func)(*named.args, **named.keywords, **objects)
    except Exception as error:
        frame = traceback.walk_tb(error.__traceback__)
        *_, (last, _) = frame
        if isinstance(error, ConfigError) or not last.f_globals.get("__name__", "").startswith("trl."):
            raise
        raise ConfigError(f"`{cfg.stage.trainer._target_}` refuses the run: {error}") from error
    if len(trainer.train_dataset) == 0:
        raise DataError(
            f"`{cfg.stage.trainer._target_}` keeps no row of the {len(objects['train_dataset']):,} for training: in "
            "none is anything left to train on after `stage.args.max_length` tokens. Set it higher."
        )
    if hasattr(trainer.args, "eos_token"):  # SFT teaches where to stop
        rows = [trainer.train_dataset[i] for i in range(min(32, len(trainer.train_dataset)))]
        note_rows_without_end(trainer.data_collator(rows), tokenizer_of(trainer.processing_class))
    return trainer
