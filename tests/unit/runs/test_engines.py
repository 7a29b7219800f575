"""The engine that a launch asks for, and what its ranks need on a machine without an accelerator."""

import pytest

from rlhf_trl.runs.engines import cpu_arguments, shards_parameters, uses_zero3

ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
VARIABLES = (*ZERO, "ACCELERATE_USE_FSDP", "WORLD_SIZE")


@pytest.mark.parametrize(
    ("environment", "shards", "arguments"),
    [
        ({}, False, {"use_cpu": True}),
        ({"WORLD_SIZE": "2"}, False, {"use_cpu": True}),
        ({"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"}, True, {"use_cpu": True}),
        (ZERO | {"WORLD_SIZE": "2"}, True, {"ddp_backend": "gloo"}),
        (ZERO | {"WORLD_SIZE": "2", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, False, {"ddp_backend": "gloo"}),
        (ZERO, True, {}),
        ({"ACCELERATE_USE_DEEPSPEED": "false", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, False, {"use_cpu": True}),
    ],
)
def test_cpu_ranks_keep_the_engine_of_their_launch(monkeypatch, environment, shards, arguments):
    """`use_cpu` would make DeepSpeed plain DDP, in silence."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert shards_parameters() is shards and cpu_arguments() == arguments
    assert uses_zero3() == (shards and "ACCELERATE_USE_FSDP" not in environment)
