"""Merging of an adapter into its base (`stage=merge`)."""

from pathlib import Path

from omegaconf import DictConfig

from rlhf_trl.build import from_pretrained_kwargs
from rlhf_trl.models.merging import merge_adapter
from rlhf_trl.models.quantization import trained_quantization
from rlhf_trl.runs.paths import project_dir, resolve_path
from rlhf_trl.runs.ranks import is_main_process


def merge(cfg: DictConfig) -> None:
    """
    Write the merged model of the adapter that `cfg.model` names: into `merged` inside its folder, or inside
    `cfg.run_dir` for an adapter of the hub.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if it is no adapter, or a run that is missing or not finished.
    """
    path = resolve_path(cfg.model.path, cfg.model.run, project_dir(cfg))
    output_dir = Path(path if Path(path).is_dir() else cfg.run_dir, "merged")
    if is_main_process():
        merge_adapter(path, str(output_dir), dequantize=cfg.stage.dequantize, **from_pretrained_kwargs(cfg))
        print(f"Merged model: {output_dir}")
        if trained_quantization(path) is not None and cfg.stage.dequantize:
            print("Its base is the quantized one that the adapter was trained on, dequantized.")
        elif trained_quantization(path) is not None:
            print("Its base is the unquantized one, which the adapter was not trained on: it is another model.")
