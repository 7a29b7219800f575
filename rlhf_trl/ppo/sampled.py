"""Old log-probabilities and values from the very passes that sampled the tokens."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# Nats by which a token's log-probability may differ between `generate` and a forward pass; float32 gives about 1e-6.
MOST_DIFFERENCE = 1e-3


class SampledTokens:
    """
    Keeps what `generate` has computed of each token it sampled, so that no second pass of the policy is needed for it.

    Good for a model in float32 alone: in half precision, a pass with a cache and one without differ by far more than
    the steps of PPO should start from.

    Args:
        policy (`PreTrainedModel`): the causal language model that samples, below an adapter.
        temperature (`float`): that of sampling.
        value_head (`nn.Module`, *optional*): a critic's head on the policy's own hidden states.
    """

    def __init__(self, policy: PreTrainedModel, temperature: float, value_head: nn.Module | None):
        self.policy = policy
        self.temperature = temperature
        self.value_head = value_head
        self.compared = False
        self._kept: tuple[Tensor, Tensor | None, Tensor] | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch a call of `generate`, whose completions [`keep`] takes next."""
        self._kept = None
        self._logits: Tensor | None = None
        self._log_probs: list[Tensor] = []
        self._values: list[Tensor] = []
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
        """Keep what was computed of the completions that were sampled, one list of ids a row."""
        logits, self._logits = self._logits, None
        steps = len(self._log_probs) + 1
        lengths = torch.tensor([len(ids) for ids in completions])
        if logits is None or len(lengths) != len(logits) or lengths.max() != steps:
            return  # not a plain call of `generate`, such as a prefill in chunks
        if self.value_head is not None and len(self._values) != steps:
            return  # hidden states that don't come from the decoder
        last = torch.tensor([ids[-1] if len(ids) == steps else 0 for ids in completions], device=logits.device)
        log_probs = [*self._log_probs, self._of(logits, last)]
        values = torch.stack(self._values, dim=1) if self._values else None
        self._kept = torch.stack(log_probs, dim=1), values, lengths

    def _after_policy(self, module, args, kwargs, output):
        if self._logits is not None:  # the pass before chose the token that this one reads
            self._log_probs.append(self._of(self._logits, kwargs["input_ids"][:, -1]))
        self._logits = output.logits[:, -1]

    def _after_trunk(self, module, args, output):
        self._values.append(self.value_head(output.last_hidden_state[:, -1].float()).squeeze(-1))

    def _of(self, logits: Tensor, tokens: Tensor) -> Tensor:
        logits = logits.float() / self.temperature
        return logits.gather(1, tokens.unsqueeze(1)).squeeze(1) - logits.logsumexp(dim=1)

    def take(self, mask: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """
        What was kept of the completions with `mask` (N, T), once.

        Returns:
            log-probabilities of each token and, of a `value_head`, the values before it, both (N, T) and 0 at padding;
            `None` if the completions are not those that were sampled last.
        """
        kept, self._kept = self._kept, None
        if kept is None or mask.sum(dim=1).tolist() != kept[2].tolist():
            return None

        def padded(x: Tensor) -> Tensor:
            return nn.functional.pad(x, (0, mask.size(1) - x.size(1))) * mask

        return padded(kept[0]), None if kept[1] is None else padded(kept[1])

    def agrees(self, log_probs: Tensor, of_a_pass: Tensor) -> bool:
        """Whether log-probabilities are those of a forward pass; if not, say so once."""
        self.compared = True
        difference = (log_probs - of_a_pass).abs().max().item()
        if difference <= MOST_DIFFERENCE:
            return True
        logger.warning(
            "The policy gives sampled tokens other log-probabilities with a cache than without, by up to %.2g nats. "
            "Those without are used, at the price of one more pass a rollout.",
            difference,
        )
        return False
