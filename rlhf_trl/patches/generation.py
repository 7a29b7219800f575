"""Transformers: `generate` with the given settings only, and without a copy of the output layer for each row."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig, PreTrainedModel


@contextmanager
def special_tokens_only(model: PreTrainedModel) -> Iterator[None]:
    """
    Reduce the model's own generation config to its special tokens.

    `generate` fills what the given settings leave open from the model's generation_config.json, so that rollouts would
    be sampled with settings that the stage doesn't name.

    Seen in: transformers 5.23.
    Test: `test_rollouts_take_nothing_from_the_models_own_generation_config`.

    Args:
        model (`PreTrainedModel`):
            Model that generates. Its config is restored when the context closes.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig(
        bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id
    )
    try:
        yield
    finally:
        model.generation_config = own


def make_output_layer_inputs_contiguous(model: PreTrainedModel) -> None:
    """
    Make the inputs of a model's output layer contiguous.

    `generate` projects the last position of its prompts, a strided view, for which torch copies the whole weight of
    the output layer once per row: for 16 rows of SmolLM2-135M 0.9 GB and a second on a CPU.

    Seen in: transformers 5.23, torch 2.13.
    Test: `test_generation_gives_the_output_layer_contiguous_states`.

    Args:
        model (`PreTrainedModel`):
            Model that generates.
    """
    output_layer = model.get_output_embeddings()
    assert output_layer is not None, "a model that generates has an output layer"
    output_layer.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))


@contextmanager
def weights_preserved(model: PreTrainedModel) -> Iterator[None]:
    """
    Preserve the weights and the buffers of a model from the cast with which continuous batching begins.

    TRL casts the model that is trained to bfloat16 or float16 in place before each call of `generate_batch`, and never
    back: from the first rollout on, float32 weights would be trained in half precision, where small updates vanish.
    The cast takes buffers too, and frequencies of rotary embeddings in bfloat16 are off by a radian after some hundred
    tokens; they are put back before anything is generated.

    Seen in: TRL 1.16.
    Test: `test_continuous_batching_leaves_the_weights_in_float32`.

    Args:
        model (`PreTrainedModel`):
            Model that generates, below an adapter.
    """
    weights = [(parameter, parameter.data) for parameter in model.parameters()]
    buffers = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False)
    ]
    generate_batch: Any = model.generate_batch

    def put_back_buffers() -> None:
        for module, name, buffer in buffers:
            setattr(module, name, buffer)

    def generating(*args, **kwargs):
        put_back_buffers()
        return generate_batch(*args, **kwargs)

    model.generate_batch = generating  # pyright: ignore[reportArgumentType]  # of this instance
    try:
        yield
    finally:
        del model.generate_batch
        put_back_buffers()
        for parameter, data in weights:
            parameter.data = data
