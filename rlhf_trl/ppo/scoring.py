"""
Log-probabilities and values of a rollout's tokens, each computed once.

[`TokenScoring`] overrides two private methods of TRL 1.16:

- `_generate_single_turn`: `generate` computes the log-probabilities that a pass over the completions would compute
  again ([`~rlhf_trl.ppo.sampled.SampledTokens`]).
- `_get_per_token_logps_and_entropies`: the pass that gives a rollout's log-probabilities gives the values as well, and
  the model reads whatever inputs its processor makes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, Trainer

from rlhf_trl.data.multimodal import ExtraInputs
from rlhf_trl.models.inputs import reading, split_rows
from rlhf_trl.models.roles import policy_is_active
from rlhf_trl.ppo.rollout import TokenScores
from rlhf_trl.ppo.sampled import SampledTokens


class TokenScoring(Trainer):
    """Mixin for `trl.GRPOTrainer` with a critic, see the module."""

    args: Any
    accelerator: Any
    model: Any
    tools: list
    use_vllm: bool
    rollout_func: Any
    generation_config: GenerationConfig
    _policy: Any
    _adapter_layers: list
    _sampled: SampledTokens | None
    _last_pass: tuple[Tensor, TokenScores] | None  # see `_old_scores`
    _extra: list[ExtraInputs] | None  # inputs beside ids of the rollout that is being made

    def _can_reuse_generation_logprobs(self) -> bool:
        """Return whether `generate` computes what the first pass over a rollout would, see [`SampledTokens`]."""
        return (
            not (self.use_vllm or self.rollout_func or self.tools)
            and not (self.is_deepspeed_enabled or self.is_fsdp_enabled)
            and self._policy.dtype == torch.float32
            and getattr(self._policy, "hf_quantizer", None) is None
            and self.accelerator.mixed_precision == "no"
            and torch.get_float32_matmul_precision() == "highest"
            and self.args.disable_dropout
            and self.generation_config.cache_implementation is None  # a static one may be compiled
        )

    def _generate_single_turn(self, *args, **kwargs):
        if self._sampled is None:
            return super()._generate_single_turn(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue] GRPO's
        with self._sampled.watching():
            completion_ids, logprobs = super()._generate_single_turn(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue] GRPO's
        self._sampled.keep(completion_ids)
        return completion_ids, logprobs

    def _get_per_token_logps_and_entropies(
        self,
        model,
        input_ids,
        attention_mask,
        logits_to_keep,
        batch_size=None,
        compute_entropy=False,
        compute_aux_loss=False,
        num_images=None,
        num_tiles=None,
        **inputs,
    ):
        """Score tokens as TRL does, with whatever inputs the processor makes: TRL's own method knows some names."""
        if any(value is not None for value in inputs.values()):
            self._extra = split_rows(inputs, attention_mask, num_images, num_tiles)
        if model is self.model and policy_is_active(self._adapter_layers) and not torch.is_grad_enabled():
            return self._old_scores(input_ids, attention_mask, logits_to_keep).logps, None, None
        return super()._get_per_token_logps_and_entropies(  # pyright: ignore[reportAttributeAccessIssue] GRPO's
            reading(model, self._extra),
            input_ids,
            attention_mask,
            logits_to_keep,
            batch_size,
            compute_entropy,
            compute_aux_loss,
        )

    @torch.no_grad()
    def _old_scores(self, input_ids: Tensor, attention_mask: Tensor, width: int) -> TokenScores:
        """
        Return log-probabilities and values of a rollout's tokens under the policy that wrote them.

        TRL asks for the log-probabilities while it makes the rollout, unless each rollout gets one optimizer step, and
        knows no values: the last pass is kept, so that one pass serves both.
        """
        if self._last_pass is None or not torch.equal(self._last_pass[0], input_ids):
            train, args = self.model.training, self.args
            batch_size = args.per_device_train_batch_size if train else args.per_device_eval_batch_size

            def forward_pass(ids: Tensor, mask: Tensor, extra: Sequence[ExtraInputs] | None) -> TokenScores:
                return self._score_tokens(self.model, ids, mask, width, batch_size, extra)

            rows, scores = (input_ids, attention_mask), None
            if self._sampled is not None:
                scores = self._sampled.scores(self.model, *rows, width, batch_size, forward_pass, self._extra)
            self._last_pass = input_ids, scores or forward_pass(*rows, self._extra)
        return self._last_pass[1]

    def _score_tokens(
        self,
        model,
        input_ids: Tensor,
        attention_mask: Tensor,
        width: int,
        batch_size: int | None = None,
        extra: Sequence[ExtraInputs] | None = None,
        **kwargs,
    ) -> TokenScores:
        """Return the scores of the last `width` tokens: one forward for log-probabilities, values and entropies."""
        values, model = [], reading(model, extra)

        def forward(**inputs):
            output = model(**inputs, with_values=True)
            values.append(output.value_preds)
            return output

        logps, entropies, _ = super()._get_per_token_logps_and_entropies(  # pyright: ignore[reportAttributeAccessIssue] GRPO's
            forward, input_ids, attention_mask, width, batch_size, **kwargs
        )
        return TokenScores(logps, torch.cat(values)[:, -width:], entropies)
