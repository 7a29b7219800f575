"""bitsandbytes: 4-bit weights that stay trainable on every CPU."""

from transformers import PreTrainedModel


def keep_trainable(model: PreTrainedModel) -> None:
    """
    Keep bitsandbytes from repacking 4-bit weights in evaluation mode on a CPU with AVX512-BF16.

    The packed form (https://github.com/bitsandbytes-foundation/bitsandbytes/pull/1804) has no backward, so training
    would go on with wrong gradients. It also fails on widths that are not a multiple of 64.

    Seen in: bitsandbytes 0.50.
    Test: `test_4bit_weights_are_never_repacked`.

    Args:
        model (`PreTrainedModel`):
            Model loaded in 4 bits.
    """
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
