"""The engine of a training: which one a launch asks for, whether it is in force, and whether its ranks have rows."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType

from rlhf_trl.data.counts import check_enough_rows, check_evaluated_groups
from rlhf_trl.errors import ConfigError
from rlhf_trl.runs.engines import engine
from rlhf_trl.stages.train import engine_left_out

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}


@pytest.mark.parametrize(
    ("environment", "kind", "name", "parts"),
    [
        ({}, DistributedType.NO, "none", []),
        ({"WORLD_SIZE": "2"}, DistributedType.MULTI_CPU, "DDP", []),
        (FSDP, DistributedType.FSDP, "FSDP2", []),
        (FSDP, DistributedType.NO, "FSDP2", ["asks for FSDP2", "this is one process", "several processes"]),
        (ZERO, DistributedType.DEEPSPEED, "DeepSpeed ZeRO-3", []),
        (
            ZERO,
            DistributedType.MULTI_CPU,
            "DeepSpeed ZeRO-3",
            ["asks for DeepSpeed ZeRO-3", "this is DDP", "`use_cpu`"],
        ),
    ],
)
def test_an_engine_that_accelerate_leaves_out_is_said(monkeypatch, environment, kind, name, parts):
    for variable in {*FSDP, *ZERO, "WORLD_SIZE"}:
        monkeypatch.delenv(variable, raising=False)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    text = engine_left_out(kind)
    assert engine() == name
    assert (text is None) == (not parts) and all(part in text for part in parts)


def test_more_ranks_than_rows_is_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    check_enough_rows(SimpleNamespace(), 4)
    with pytest.raises(ConfigError, match="The training has 3 rows and 4 ranks.*`--num_processes 3`"):
        check_enough_rows(SimpleNamespace(), 3)


@pytest.mark.parametrize(("ranks", "batch", "group", "remedy"), [(1, 6, 4, 12), (2, 3, 4, 6), (2, 4, 8, None)])
def test_an_evaluation_of_parts_of_groups_is_an_error(monkeypatch, ranks, batch, group, remedy):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    args = SimpleNamespace(per_device_eval_batch_size=batch, num_generations=group, num_generations_eval=None)
    says = f"per_device_eval_batch_size={remedy}`" if remedy else None
    with nullcontext() if says is None else pytest.raises(ConfigError, match=says):
        check_evaluated_groups(args)
