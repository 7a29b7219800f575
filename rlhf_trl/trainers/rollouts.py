"""
Rollouts of PPO, GRPO and RLOO: completions are sampled from the very policy that scores and learns from them.

[`Rollouts`] holds for TRL's trainers, on every architecture, that sampling takes the stage's settings alone, that
prompts are rendered with what their rows say, that padding doesn't move a token to another position, that there is no
dropout, and that an evaluation stays one. The methods with a leading underscore override private ones of TRL 1.16;
`tests/unit/trainers/test_rollouts.py` compares what comes out with forwards of its own.
"""

import contextlib
import logging
from typing import Any

import torch
import trl
from accelerate.utils import is_peft_model
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, Trainer

from rlhf_trl.data.chat_template import template_kwargs
from rlhf_trl.data.tokenize import end_tokens, prompt_ids, remember_ends
from rlhf_trl.errors import ConfigError
from rlhf_trl.models.inputs import holds_rows
from rlhf_trl.patches.generation import special_tokens_only, weights_preserved
from rlhf_trl.patches.positions import count_positions_from_mask
from rlhf_trl.patches.vllm import keep_log_probs, merge_for_sending
from rlhf_trl.trainers.base import TrainerMixin
from rlhf_trl.trainers.mismatch import Correction, mismatch_metrics, mismatch_statistics
from rlhf_trl.trainers.rollout_hook import RolloutHookWithKL
from rlhf_trl.trainers.sampling import biasing_settings

logger = logging.getLogger(__name__)


def settings_left_open(model: PreTrainedModel, sampling: GenerationConfig) -> dict[str, Any]:
    """Return the settings of the model's own generation config that `generate` would use where `sampling` has none."""
    own, defaults = model.generation_config, GenerationConfig._get_default_generation_params()
    ids = {"bos_token_id", "eos_token_id", "pad_token_id"}
    length = {"max_length"}  # `max_new_tokens` goes before it
    return {
        name: value
        for name, value in own.to_diff_dict().items()
        if value
        and not (name.startswith("_") or name == "transformers_version" or name in ids | length)
        and getattr(sampling, name, None) is None
        and value != defaults.get(name)
    }


class Rollouts(Trainer):
    """Mixin for `trl.GRPOTrainer` and `trl.RLOOTrainer`, see the module."""

    args: Any
    accelerator: Any
    model: Any
    ref_model: PreTrainedModel | None
    tools: list
    chat_template: str | None
    chat_template_kwargs: dict[str, Any]
    eos_token_ids: list[int]
    use_vllm: bool
    vllm_generation: Any
    generation_config: GenerationConfig
    generation_kwargs: dict[str, Any]
    _metrics: dict[str, dict[str, list[float]]]
    _tokenizer: PreTrainedTokenizerBase
    _is_vlm: bool

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._stop_at_every_end()
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        self._policy = model.get_base_model() if is_peft_model(model) else model
        count_positions_from_mask(self._policy)
        if self.ref_model is not None:
            count_positions_from_mask(self.accelerator.unwrap_model(self.ref_model, keep_torch_compile=False))
        self._sampled_logps = None
        if self.use_vllm:
            merge_for_sending(self.vllm_generation)
            if self.vllm_generation.logprobs is None:
                self._sampled_logps = keep_log_probs(self.vllm_generation)
        if self.accelerator.is_main_process:
            self._say_what_samples()

    def _stop_at_every_end(self) -> None:
        """Stop where evaluation and rewards see an end, see [`~rlhf_trl.data.tokenize.end_tokens`]."""
        asked = (self.args.generation_kwargs or {}).get("eos_token_id") or []
        asked = [asked] if isinstance(asked, int) else asked
        remember_ends(self._tokenizer, [*self.eos_token_ids, *asked])  # the rewards have this tokenizer
        self.eos_token_ids = end_tokens(self._tokenizer)
        if self.use_vllm:  # knows those of the files that it loads
            sampling = self.vllm_generation.generation_kwargs
            self.vllm_generation.generation_kwargs = {"stop_token_ids": self.eos_token_ids, **sampling}
        else:
            self.generation_config.eos_token_id = self.generation_kwargs["eos_token_id"] = self.eos_token_ids

    def _say_what_samples(self) -> None:
        open_settings = {} if self.use_vllm else settings_left_open(self._policy, self.generation_config)
        if open_settings:
            logger.warning(
                "The policy's generation_config.json sets %s. Rollouts are sampled without; what you set in "
                "`stage.args.generation_kwargs` is in force.",
                ", ".join(f"`{name}={value}`" for name, value in open_settings.items()),
            )
        if biased := biasing_settings(self.args):
            logger.warning(
                "Rollouts are sampled with %s, and scored without: the completions come from another distribution "
                "than the policy's, so KL and ratios are biased.",
                ", ".join(biased),
            )

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if self.chat_template_kwargs:
            # The rewards get what a row was rendered with, as a column of the row's own would give it
            inputs = [
                row | {"chat_template_kwargs": self.chat_template_kwargs | (row.get("chat_template_kwargs") or {})}
                for row in inputs
            ]
        if (tools := getattr(self, "tools", None)) and any(row.get("tools") for row in inputs):
            raise ConfigError(
                f"The rows have tools of their own, and the trainer has {len(tools)} to call. Remove the column "
                "`tools`, or the trainer's argument."
            )
        self._rows = inputs
        # Of the trainer that this class is mixed into
        output = super()._generate_and_score_completions(inputs)  # pyright: ignore[reportAttributeAccessIssue]
        return output | {"num_images": [1] * len(inputs)} if holds_rows(output) else output

    def _get_per_token_logps_and_entropies(self, model, input_ids, *args, num_images=None, **kwargs):
        """
        Score tokens as TRL does, with the images of each row.

        Idefics and SmolVLM have one row of pixels for each prompt, padded to the most images of one. TRL 1.16 splits
        them by images where there happen to be as many of these as prompts.
        """
        if holds_rows(kwargs):
            num_images = [1] * len(input_ids)
        # Of the trainer that this class is mixed into
        return super()._get_per_token_logps_and_entropies(  # pyright: ignore[reportAttributeAccessIssue]
            model, input_ids, *args, num_images=num_images, **kwargs
        )

    def _tokenize_prompts(self, prompts: list) -> tuple[list[list[int]], list | None, dict[str, Any]]:
        """Return the prompts' ids, with the `tools` and `chat_template_kwargs` of their rows, which TRL ignores."""
        if self._is_vlm or getattr(self, "environment_factories", None) is not None:
            # Of the trainer that this class is mixed into
            ids, images, inputs = super()._tokenize_prompts(prompts)  # pyright: ignore[reportAttributeAccessIssue]
            # TRL 1.16 has None for a prompt without images in a batch with some, and processors read empty lists alone
            return ids, images and [each or [] for each in images], inputs
        own = {"tools": self.tools, "chat_template": self.chat_template} if getattr(self, "tools", None) else {}
        ids = [
            prompt_ids(self._tokenizer, prompt, **own, **template_kwargs(row))
            for prompt, row in zip(prompts, self._rows, strict=True)
        ]
        return ids, None, {}

    def _generate_single_turn(self, prompt_ids: list, images: list | None, *args, **kwargs):
        training = self.model.training
        images = images and [each or None for each in images]  # as TRL passes them to vLLM
        with special_tokens_only(self._policy), self._weights_preserved():
            # Of the trainer that this class is mixed into
            output = super()._generate_single_turn(prompt_ids, images, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        if self.model.training != training:  # continuous batching ends in training mode, in an evaluation too
            self.model.train(training)
        return output

    def _weights_preserved(self) -> contextlib.AbstractContextManager[None]:
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled  # an engine has weights of its own to train
        if sharded or not self.args.use_transformers_continuous_batching:
            return contextlib.nullcontext()
        return weights_preserved(self._policy)

    # ---- The difference between vLLM and the policy ----

    def _log_mismatch(self, output: dict[str, Any], logps: Tensor) -> None:
        """
        Log how far vLLM's log-probabilities of a rollout are from the policy's, and what the correction of it does.

        Args:
            output (`dict`): this rank's completions, as TRL's `_generate_and_score_completions` returns them.
            logps (`Tensor` of shape (N, T)): log-probabilities of their tokens under the policy.
        """
        if not self.use_vllm or not self.model.training:
            return
        mask = output["completion_mask"].bool()
        if "tool_mask" in output:
            mask = mask & output["tool_mask"].bool()
        if self._sampled_logps is None:
            sampled = output["sampling_per_token_logps"]
        else:
            sampled = torch.zeros_like(logps)
            for row, values in zip(sampled, self._sampled_logps, strict=True):
                row[: len(values)] = torch.tensor([torch.nan if x is None else x for x in values])
        correction = None
        if getattr(self.args, "vllm_importance_sampling_correction", False):
            options = ("mode", "clip_min", "clip_max")
            correction = Correction(*(getattr(self.args, f"vllm_importance_sampling_{name}") for name in options))
        statistics = self.accelerator.gather(mismatch_statistics(logps, sampled, mask, correction))
        for name, value in mismatch_metrics(statistics).items():
            if correction is None or "sampling_logp_difference" not in name:  # which TRL logs with a correction
                self._metrics["train"][name].append(value)


class GRPOTrainer(RolloutHookWithKL, Rollouts, TrainerMixin, trl.GRPOTrainer):
    """`trl.GRPOTrainer` with [`Rollouts`], the hook on them, and [`~rlhf_trl.trainers.base.TrainerMixin`]."""


class RLOOTrainer(RolloutHookWithKL, Rollouts, TrainerMixin, trl.RLOOTrainer):
    """`trl.RLOOTrainer` with [`Rollouts`], the hook on them, and [`~rlhf_trl.trainers.base.TrainerMixin`]."""


def extended(trainer_class: type) -> type:
    """
    Return a class of trainers with [`~rlhf_trl.trainers.base.TrainerMixin`], and with [`Rollouts`] and the hook on
    them if it is one of TRL's GRPO or RLOO: the class itself, or a subclass of it with the same name.
    """
    if issubclass(trainer_class, TrainerMixin):
        return trainer_class
    samples = issubclass(trainer_class, trl.GRPOTrainer | trl.RLOOTrainer)
    mixins = (RolloutHookWithKL, Rollouts, TrainerMixin) if samples else (TrainerMixin,)
    return type(trainer_class.__name__, (*mixins, trainer_class), {"__doc__": trainer_class.__doc__})
