"""Sizes of optimizer states. Imports nothing heavy."""

# States that an optimizer has of a weight, by a part of its name, the first one that is found in it; otherwise the two
# moments of AdamW. And the bytes of one where they are quantized
STATES = {"adafactor": 0.01, "ademamix": 3.0, "lion": 1.0, "rmsprop": 1.0, "adagrad": 1.0, "sgd": 0.0}
MOMENTS = 2.0
QUANTIZED = {"4bit": 0.5, "8bit": 1.0}


def optimizer_bytes(name: str, weights: int, itemsize: int) -> float:
    """
    Return the bytes of an optimizer's state.

    Args:
        name (`str`): `optim` of the training arguments.
        weights (`int`), itemsize (`int`): trained weights, and bytes of one.
    """
    states = next((states for part, states in STATES.items() if part in name), MOMENTS)
    return states * weights * next((size for part, size in QUANTIZED.items() if part in name), itemsize)
