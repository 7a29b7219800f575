"""A small language model with random weights (`stage=init`)."""

from collections.abc import Iterable
from typing import cast

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from rlhf_trl.build import instantiate_data
from rlhf_trl.models.scratch import random_model, texts_of
from rlhf_trl.runs.ranks import is_main_process
from rlhf_trl.runs.record import RANDOM_WEIGHTS
from rlhf_trl.stages.base import open_run
from rlhf_trl.terminal import say


def init(cfg: DictConfig) -> None:
    """
    Fit the tokenizer to the training texts, and save it with random weights as a run.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if the data is missing, malformed, or no text.
    """
    OmegaConf.resolve(cfg)
    rows = instantiate_data(cfg)["train"]
    tokenizer = instantiate(cfg.stage.tokenizer)(texts_of(cast(Iterable[dict], rows)))
    with open_run(cfg, start=RANDOM_WEIGHTS):
        model = random_model(instantiate(cfg.stage.config), tokenizer, cfg.seed)
        if is_main_process():
            model.save_pretrained(cfg.run_dir)
            tokenizer.save_pretrained(cfg.run_dir)
        say(f"{model.num_parameters():,} parameters, {len(tokenizer):,} words: {cfg.run_dir}")
