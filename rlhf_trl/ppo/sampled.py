"""Old log-probabilities and values from the very passes that sampled the tokens."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_trl.data.multimodal import ExtraInputs
from rlhf_trl.ppo.critic import critic_values
from rlhf_trl.ppo.rollout import TokenScores

logger = logging.getLogger(__name__)

# Nats by which a token's log-probability may differ between `generate` and a forward pass; float32 gives about 1e-6.
MAX_DIFFERENCE = 1e-3


class SampledTokens:
    """
    Log-probabilities and values that `generate` computes of each token it samples, so that the policy needs no second
    pass over its completions.

    Good for a model in float32 alone: in half precision, a pass with a cache and one without differ by far more than
    the steps of PPO should start from.

    Args:
        policy (`PreTrainedModel`): the causal language model that samples, below an adapter.
        temperature (`float`): that of sampling.
        value_head (`nn.Module`, *optional*): a critic's head on the policy's own hidden states.

    Attributes:
        usable (`bool`): whether the numbers of sampling are those of a pass, as far as is known.
    """

    def __init__(self, policy: PreTrainedModel, temperature: float, value_head: nn.Module | None):
        self.policy = policy
        self.temperature = temperature
        self.value_head = value_head
        self.compared, self.usable = False, True
        self._kept: tuple[Tensor, Tensor | None, Tensor] | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch a call of `generate`, whose completions [`keep`] is given next."""
        self._kept = None
        self._logits: Tensor | None = None
        self._log_probs: list[Tensor] = []
        self._values: list[Tensor] = []
        if not self.usable:
            yield
            return
        hooks = [self.policy.register_forward_hook(self._after_policy, with_kwargs=True)]
        if self.value_head is not None:
            # not `base_model`, which OPT's own forward goes around
            hooks.append(self.policy.get_decoder().register_forward_hook(self._after_trunk))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def keep(self, completions: list[list[int]]) -> None:
        """Keep what was computed of the completions that were sampled, one list of ids per row."""
        logits, self._logits = self._logits, None
        steps = len(self._log_probs) + 1
        lengths = torch.tensor([len(ids) for ids in completions])
        if logits is None or len(lengths) != len(logits) or lengths.max() != steps:
            return  # not a plain call of `generate`, such as a prefill in chunks
        if self.value_head is not None and len(self._values) != steps:
            return  # hidden states that don't come from the decoder
        last = torch.tensor([ids[-1] if len(ids) == steps else 0 for ids in completions], device=logits.device)
        log_probs = [*self._log_probs, self._log_prob(logits, last)]
        values = torch.stack(self._values, dim=1) if self._values else None
        self._kept = torch.stack(log_probs, dim=1), values, lengths

    def _after_policy(self, module, args, kwargs, output):
        if self._logits is not None:  # the pass before chose the token that this one reads
            self._log_probs.append(self._log_prob(self._logits, kwargs["input_ids"][:, -1]))
        self._logits = output.logits[:, -1]

    def _after_trunk(self, module, args, output):
        assert self.value_head is not None
        self._values.append(self.value_head(output.last_hidden_state[:, -1]).squeeze(-1))

    def _log_prob(self, logits: Tensor, tokens: Tensor) -> Tensor:
        logits = logits.float() / self.temperature
        return logits.gather(1, tokens.unsqueeze(1)).squeeze(1) - logits.logsumexp(dim=1)

    def take(self, mask: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """
        Return what was kept of the completions with `mask` (N, T), once.

        Returns:
            log-probabilities of each token, (N, T), and, with a `value_head`, the values before it, (N, T) or
            (N, T, S) of S > 1 signals, 0 at padding; `None` if the completions are not those that were sampled last.
        """
        kept, self._kept = self._kept, None
        if kept is None or mask.sum(dim=1).tolist() != kept[2].tolist():
            return None

        def padded(x: Tensor) -> Tensor:
            more = (1,) * (x.dim() - 2)
            padding = (0, 0) * len(more) + (0, mask.size(1) - x.size(1))
            return nn.functional.pad(x, padding) * mask.view(*mask.shape, *more)

        return padded(kept[0]), None if kept[1] is None else padded(kept[1])

    def scores(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        width: int,
        batch_size: int,
        forward_pass: Callable[[Tensor, Tensor, Sequence[ExtraInputs] | None], TokenScores],
        extra: Sequence[ExtraInputs] | None = None,
    ) -> TokenScores | None:
        """
        Return log-probabilities and values of completions, if they are those that were sampled last.

        The first time, they are compared with those of a pass over `batch_size` rows.

        Args:
            model (`nn.Module`): the policy's module, with the critic.
            input_ids (`Tensor` of shape (N, P + T)), attention_mask (`Tensor` of shape (N, P + T)): prompts and
                completions.
            width (`int`): completion tokens, T.
            batch_size (`int`): rows of a pass.
            forward_pass (callable): gives the scores of some rows by a pass over their ids, mask and other inputs.
            extra (`Sequence[ExtraInputs]`, *optional*): inputs of each row beside its ids.

        Returns:
            [`TokenScores`], 0 at padding; `None` if `generate` computed none, or other ones than a pass.
        """
        taken = self.take(attention_mask[:, -width:])
        if taken is None:
            return None
        log_probs, values = taken
        if not self.compared:
            first = forward_pass(input_ids[:batch_size], attention_mask[:batch_size], extra and extra[:batch_size])
            self.compared, self.usable = True, _agree(log_probs[:batch_size], first.logps)
        if not self.usable:
            return None
        if values is None:
            values = critic_values(model, input_ids, attention_mask, width, batch_size, extra)
        return TokenScores(log_probs, values)


def _agree(log_probs: Tensor, of_a_pass: Tensor) -> bool:
    difference = (log_probs - of_a_pass).abs().max().item()
    if difference > MAX_DIFFERENCE:
        logger.warning(
            "The policy gives sampled tokens other log-probabilities with a cache than without, by up to %.2g nats. "
            "Those without are used, at the price of one more pass per rollout.",
            difference,
        )
    return difference <= MAX_DIFFERENCE
