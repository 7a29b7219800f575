"""The model that a training starts from."""

import logging
from collections.abc import Sequence
from pathlib import Path

from accelerate import PartialState
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from rlhf_trl.errors import ConfigError
from rlhf_trl.models.adapters import (
    adapter_config,
    adapter_heads,
    base_path,
    check_heads,
    check_shape,
    model_fingerprint,
    with_adapter,
    with_score_head,
)
from rlhf_trl.models.loading import load_full, refuse_reward_model
from rlhf_trl.models.merging import MADE_OF_FILE, merge_adapter
from rlhf_trl.models.quantization import start_quantization, trained_quantization

logger = logging.getLogger(__name__)


def load_start(
    path: str,
    task_type: str,
    peft_config: PeftConfig | None,
    merge_dir: str,
    revision: str | None = None,
    heads: Sequence[str] | None = None,
    **options,
) -> tuple[PreTrainedModel | PeftModel, PeftConfig | None]:
    """
    The model that a run starts from, for a TRL trainer, and the `peft_config` to give to that trainer.

    An adapter is frozen until [`~rlhf_trl.models.roles.begin_training`]: on a quantized base TRL rounds what is
    trainable to bfloat16, and neither a saved adapter nor a copy of the base's embedding would be what it was.

    - a full model: itself; the trainer puts a fresh adapter on it if `peft_config` is given;
    - an adapter, `peft_config` given: the same adapter on its unmerged base. TRL keeps a frozen copy of
      it as the reference. For `SEQ_CLS` a policy's adapter gets a score head;
    - an adapter, no `peft_config`: merged into its base, written to `merge_dir` and loaded from there, so that TRL,
      which loads a reference from where the model came from, finds the merged one.

    Args:
        path (`str`):
            Folder or hub id.
        task_type (`str`):
            `CAUSAL_LM` or `SEQ_CLS`.
        peft_config (`peft.PeftConfig`, *optional*):
            The adapter that is asked for.
        merge_dir (`str`):
            Folder for the merged start.
        heads (`Sequence[str]`, *optional*):
            Names of the scores of a `SEQ_CLS` model; one score without them.
        revision (`str`, *optional*), **options:
            See [`load_model`].

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if the adapter at `path` isn't of the shape that is asked for.
    """
    saved = adapter_config(path, revision)
    if saved is None:
        if peft_config is not None:
            peft_config.inference_mode = True
        return load_full(path, task_type, revision=revision, heads=heads, **options), peft_config
    refuse_reward_model(path, task_type, saved.task_type == "SEQ_CLS")
    if peft_config is None:
        with PartialState().main_process_first():
            # What an earlier run merged may be of another adapter, or of a base that has been trained again since
            made_of = f"{path} {model_fingerprint(path, revision)} {trained_quantization(path)}"
            stamp = Path(merge_dir, MADE_OF_FILE)
            if not stamp.is_file() or stamp.read_text(encoding="utf-8") != made_of:
                merge_adapter(path, merge_dir, revision, options.get("trust_remote_code", False))
                stamp.write_text(made_of, encoding="utf-8")
        return load_full(merge_dir, task_type, heads=heads, **options), None
    if options.get("device_map") != "meta":  # where nothing is computed
        options["quantization_config"] = start_quantization(path, options.get("quantization_config"))
        if options["quantization_config"] is not None and trained_quantization(path) is None:
            logger.warning("The adapter `%s` goes on over a quantized base, which it was not trained on.", path)
    base = load_full(base_path(path, saved), task_type, revision=saved.revision, heads=heads, **options)
    check_shape(path, saved, peft_config, base)
    saved.base_model_name_or_path = base.config.name_or_path
    assert isinstance(saved, LoraConfig) and isinstance(peft_config, LoraConfig)  # which `check_shape` says
    saved.lora_dropout = peft_config.lora_dropout
    if saved.task_type == task_type:
        if task_type == "SEQ_CLS":
            check_heads(path, len(adapter_heads(path, revision)), len(heads or ["score"]))
        model = with_adapter(base, path, saved, revision)
        if isinstance(model.get_output_embeddings(), BaseTunerLayer):
            raise ConfigError(
                f"The adapter `{path}` changes the output layer, and TRL's trainers read that layer's own weights. "
                f"Write its merged model with `stage=merge model.path={path}` and start from `{path}/merged`."
            )
        return model, None
    return with_score_head(base, path, saved, revision), None
