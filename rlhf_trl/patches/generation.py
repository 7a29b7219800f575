"""Transformers: `generate` with the given settings only, and without a copy of the output layer for each row."""

from collections.abc import Iterator
from contextlib import contextmanager

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
