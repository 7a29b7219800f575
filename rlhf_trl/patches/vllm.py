"""TRL: the weights that are sent to vLLM."""

from collections.abc import Callable

from trl.generation.vllm_generation import VLLMGeneration


def send_only(vllm_generation: VLLMGeneration, is_sent: Callable[[str], bool]) -> None:
    """
    Make TRL send vLLM only some of the weights of the policy's module.

    vLLM refuses a weight that its model doesn't have, such as a critic's that lives in the policy's module.

    Seen in: TRL 1.16.
    Test: `test_vllm_gets_the_weights_of_the_policy_only`.

    Args:
        vllm_generation (`VLLMGeneration`):
            TRL's generation backend of a trainer, `trainer.vllm_generation`.
        is_sent (callable):
            Whether to send a weight, by its name.
    """
    named_params = vllm_generation._iter_named_params
    vllm_generation._iter_named_params = lambda: (
        (name, parameter) for name, parameter in named_params() if is_sent(name)
    )
