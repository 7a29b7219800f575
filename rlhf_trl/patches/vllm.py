"""TRL: the weights that are sent to vLLM, and the log-probabilities that come back."""

# Methods of instances are replaced, and a PeftModel forwards attributes: no types say so
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOperatorIssue=false

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from accelerate.utils import is_peft_model
from peft.tuners.lora import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from trl.generation.vllm_generation import VLLMGeneration

FSDP1 = 1
# In the name of a weight under an adapter, behind the name of its layer
BASE_LAYER = ".base_layer."


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


def merge_for_sending(vllm_generation: VLLMGeneration) -> None:
    """
    Make TRL merge adapters into copies of the weights that it sends to vLLM, one layer at a time.

    TRL merges them into the base itself and subtracts them again after it, which leaves a rounding error in the base
    at every sync. In bfloat16 a base of std 0.02 is off by 0.4 % (root mean square) after 100 syncs and by 1.2 % after
    1000, a sixth of what the adapter does; the reference, which is that base, moves with it. In 4 bits every sync
    quantizes the base anew.

    Under FSDP 1 and with adapters on bare parameters (of experts) it stays TRL's way.

    Seen in: TRL 1.16, PEFT 0.21.
    Test: `test_a_sync_leaves_the_base_under_an_adapter_as_it_was`.

    Args:
        vllm_generation (`VLLMGeneration`):
            TRL's generation backend of a trainer, `trainer.vllm_generation`.
    """
    of_trl, dist = vllm_generation._iter_named_params, vllm_generation._dist

    def named_params() -> Iterator[tuple[str, Tensor]]:
        model = vllm_generation.model
        if not is_peft_model(model) or dist.fsdp_version == FSDP1 or _has_bare_parameters(model):
            yield from of_trl()
            return
        with dist.gather_params(list(model.parameters())):
            for name, parameter in model.named_parameters():
                sent = name.removeprefix("base_model.model.").replace(".base_layer", "")
                # An adapter's own weights, and what a layer was that is trained as a whole
                if model.prefix in sent or "original_module" in sent:
                    continue
                weight = _merged(model, name) if BASE_LAYER in name else parameter.data
                if dist.is_fsdp:
                    weight = weight.to(vllm_generation.accelerator.device).full_tensor()
                yield vllm_generation._fix_param_name_to_vllm(sent, ["modules_to_save.default."]), weight

    vllm_generation._iter_named_params = named_params


def _has_bare_parameters(model) -> bool:
    return any(isinstance(module, ParamWrapper) for module in model.modules())


def _merged(model, name: str) -> Tensor:
    """Return a weight of the base with the active adapters of its layer merged into it; the weight stays as it is."""
    layer, _, attribute = name.rpartition(BASE_LAYER)
    tuned = model.get_submodule(layer)
    with _merged_copies(tuned):
        return getattr(tuned.get_base_layer(), attribute).data


@contextmanager
def _merged_copies(layer: BaseTunerLayer) -> Iterator[None]:
    """Merge the active adapters of a layer into copies of its weights, and put the weights back at the end."""
    base = layer.get_base_layer()
    own = [
        (name, parameter, parameter.data, dict(vars(parameter)))
        for name, parameter in base.named_parameters(recurse=False)
    ]
    for _, parameter, data, _ in own:
        parameter.data = data.clone()
    try:
        layer.merge()
        yield
    finally:
        for name, parameter, data, attributes in own:
            parameter.data = data
            vars(parameter).update(attributes)  # `merge` marks a weight in 4 bits as not quantized yet,
            setattr(base, name, parameter)  # and makes a new one
        layer.merged_adapters.clear()


def keep_log_probs(vllm_generation: VLLMGeneration) -> list[list[float | None]]:
    """
    Make vLLM return the log-probabilities of the tokens that it samples, and keep those of the latest call.

    `trl.RLOOTrainer` neither asks for them nor returns them.

    Seen in: TRL 1.16.
    Test: `test_the_difference_of_sampler_and_policy_is_logged`.

    Args:
        vllm_generation (`VLLMGeneration`):
            TRL's generation backend of a trainer, `trainer.vllm_generation`.

    Returns:
        `list[list[float | None]]`:
            What is kept, one list per completion, in nats; `None` where vLLM gave NaN. Each call of `generate`
            replaces it.
    """
    kept: list[list[float | None]] = []
    generate, vllm_generation.logprobs = vllm_generation.generate, 0

    def keeping(*args, **kwargs):
        output = generate(*args, **kwargs)
        kept[:] = [[token[0] for token in completion] for completion in output[2]]
        return output

    vllm_generation.generate = keeping
    return kept
