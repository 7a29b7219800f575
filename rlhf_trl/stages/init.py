"""A small language model with random weights (`stage=init`)."""

from rlhf_trl.models.scratch import random_model, texts_of


def init(cfg) -> None:
    """
    The stage `init`: fits the tokenizer to the training texts and saves it with random weights as a run.

    Raises:
        `ConfigError`: the data is missing, malformed, or no text.
    """
    from rlhf_trl.stages.base import claims_directory

    claims_directory(_init)(cfg)


def _init(cfg) -> None:
    from accelerate import PartialState
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    from rlhf_trl.build import instantiate_data
    from rlhf_trl.stages.base import begin, end, fail

    OmegaConf.resolve(cfg)
    rows = instantiate_data(cfg)["train"]
    tokenizer = instantiate(cfg.stage.tokenizer)(texts_of(rows))
    begin(cfg, "random weights")
    try:
        model = random_model(instantiate(cfg.stage.config), tokenizer, cfg.seed)
        if PartialState().is_main_process:
            model.save_pretrained(cfg.run_dir)
            tokenizer.save_pretrained(cfg.run_dir)
            print(f"{model.num_parameters():,} parameters, {len(tokenizer):,} words: {cfg.run_dir}")
    except BaseException as error:
        fail(cfg, error)
        raise
    end(cfg, "done")
