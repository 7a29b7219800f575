"""Checks of what [`PPOTrainer`] is given, before any model is loaded."""

import logging
from typing import Any

from datasets import Dataset
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel

from rlhf_trl.data.multimodal import processor_of
from rlhf_trl.errors import ConfigError
from rlhf_trl.ppo.config import PPOConfig
from rlhf_trl.runs.ranks import is_main_process

logger = logging.getLogger(__name__)


def check_prompt_images(dataset: Dataset | None, tokenizer: Any) -> None:
    """
    Check that prompts with images have a processor.

    Raises:
        ConfigError: if they have none.
    """
    images = {"image", "images"} & set((dataset and dataset.column_names) or [])
    if images and tokenizer is not None and processor_of(tokenizer) is None:
        raise ConfigError(
            f"The prompts have images (column `{images.pop()}`), and the model reads text alone. Pass the processor "
            "of a vision-language model as `processing_class`, or remove the column."
        )


def check_inputs(reward_funcs: list, dataset: Dataset | None, ptx_dataset: Dataset | None, args: PPOConfig) -> None:
    """
    Check that there is a reward, that prompts fill a rollout, and that `ptx_coef` has demonstrations.

    Raises:
        ConfigError: if something is missing; for demonstrations with images, and for a dataset of unknown length.
    """
    if not reward_funcs:
        raise ConfigError("PPO needs a reward. Pass at least one of `reward_funcs`.")
    if (ptx_dataset is None) != (args.ptx_coef == 0):
        raise ConfigError(
            f"`ptx_coef` is {args.ptx_coef} and there are {'no' if ptx_dataset is None else ''} demonstrations "
            "for it. Give both (`stage.args.ptx_coef=0.1 +data@ptx_data=demo`) or none."
        )
    if dataset is None:
        raise ConfigError("PPO needs prompts. Pass `train_dataset` with a column `prompt`.")
    images = {"image", "images"} & set((ptx_dataset and ptx_dataset.column_names) or [])
    if images:
        raise ConfigError(
            f"The demonstrations of `ptx_coef` have images (column `{images.pop()}`), and its loss reads text alone. "
            "Remove the column."
        )
    if not isinstance(dataset, Dataset):
        raise ConfigError("PPO needs a dataset of known length. Pass a `datasets.Dataset`, not an iterable one.")
    assert args.generation_batch_size is not None and args.num_generations is not None
    prompts = args.generation_batch_size // args.num_generations
    if len(dataset) < prompts:
        raise ConfigError(
            f"There are {len(dataset)} prompts, fewer than the {prompts} of one rollout. Lower "
            "`per_device_train_batch_size` or `steps_per_generation`, or give more prompts."
        )
    remainder = len(dataset) % prompts
    if remainder and is_main_process():
        logger.warning(
            "An epoch drops %d of %d prompts, other ones each time: rollouts take %d.",
            remainder,
            len(dataset),
            prompts,
        )


def check_adapter_dropout(
    model: str | PreTrainedModel | PeftModel, peft_config: PeftConfig | None, args: PPOConfig
) -> None:
    """
    Check that no adapter has a dropout which `disable_dropout` would silently undo.

    Raises:
        ConfigError: if one has.
    """
    configs = list(model.peft_config.values()) if isinstance(model, PeftModel) else [peft_config]
    dropout = max(getattr(config, "lora_dropout", 0.0) or 0.0 for config in configs)
    if dropout > 0 and args.disable_dropout:
        raise ConfigError(
            f"The adapter has a dropout of {dropout}, which `disable_dropout=True` would silently undo. Set the "
            "adapter's dropout to 0."
        )
