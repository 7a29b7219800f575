"""Patches of FSDP and DeepSpeed: types of outputs, and models that no engine shards."""

import os

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import FullyShardedDataParallelPlugin
from peft import LoraConfig
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled, set_hf_deepspeed_config
from trl import SFTConfig

from rlhf_trl import build
from rlhf_trl.errors import ConfigError
from rlhf_trl.models import initial, loading, merging, sizes
from rlhf_trl.patches.engines import (
    EFFICIENT_LOADING,
    cast_to_shards,
    fsdp_on_cpu_ranks,
    keep_output_types,
    whole_weights,
)
from tests.helpers.ppo import save_reward_model
from tests.helpers.tiny import save_model


@pytest.mark.parametrize("before", ["bf16", None])
def test_fsdp_keeps_the_types_of_outputs(before):
    """Also where the precision is set after the patch, as transformers does for a base in 4 bits."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    if before:
        plugin.set_mixed_precision(before)
        assert plugin.mixed_precision_policy.output_dtype == torch.bfloat16  # else the patch isn't needed any more
    keep_output_types(plugin)
    kept = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    assert plugin.mixed_precision_policy == (kept if before else None)
    plugin.set_mixed_precision("bf16", override=True)
    assert plugin.mixed_precision_policy == kept


def test_fsdp1_has_no_type_of_outputs_to_keep():
    plugin = FullyShardedDataParallelPlugin(fsdp_version=1)
    keep_output_types(plugin)
    plugin.set_mixed_precision("bf16")
    assert plugin.mixed_precision_policy.param_dtype == torch.bfloat16


def test_weights_that_zero3_has_not_dealt_out_get_the_type_of_the_others():
    model = nn.ModuleDict({"base": nn.Linear(2, 2), "adapter": nn.Linear(2, 2), "head": nn.Linear(2, 1)})
    packed = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    model["base"].register_parameter("packed", packed)
    model["adapter"].bfloat16()
    cast_to_shards(model)
    assert model["head"].weight.dtype == torch.float32  # no engine has dealt anything out
    for weight in model["base"].parameters():
        weight.ds_id = 0
        weight.data = weight.data.to(torch.bfloat16 if weight.is_floating_point() else weight.dtype)
    cast_to_shards(model)
    types = {name: weight.dtype for name, weight in model.named_parameters()}
    assert types.pop("base.packed") == torch.uint8 and set(types.values()) == {torch.bfloat16}


@pytest.mark.parametrize("on_cpu", [True, False])
def test_bf16_on_cpu_ranks_of_deepspeed(monkeypatch, compose, on_cpu):
    """With `use_cpu`, which transformers asks for otherwise, accelerate would leave DeepSpeed out."""
    monkeypatch.setattr(build, "deepspeed_on_cpu", lambda: on_cpu)
    monkeypatch.setattr(build, "cpu_arguments", dict)
    with pytest.raises(ValueError, match="use_cpu"):
        SFTConfig("sft", bf16=True)  # else the patch isn't needed any more
    node = compose("stage=sft", "stage.args.bf16=true").stage.args
    if on_cpu:
        args = build.training_arguments(node)
        assert args.bf16 and not args.use_cpu
    else:
        with pytest.raises(ConfigError, match="no accelerator"):
            build.training_arguments(node)


class Zero3:
    """The part of a DeepSpeed config that transformers asks."""

    def is_zero3(self):
        return True


@pytest.fixture
def zero3(monkeypatch):
    """Leave the process as it is once the trainer's arguments name ZeRO-3, with FSDP's efficient loading besides."""
    config = Zero3()
    monkeypatch.setattr("transformers.integrations.deepspeed._hf_deepspeed_config_weak_ref", None)
    monkeypatch.setenv(EFFICIENT_LOADING, "true")
    set_hf_deepspeed_config(config)
    yield config
    assert is_deepspeed_zero3_enabled() and os.environ[EFFICIENT_LOADING] == "true"  # whatever was loaded


def test_whole_weights_ends_with_its_context(zero3):
    with whole_weights():
        assert not is_deepspeed_zero3_enabled() and EFFICIENT_LOADING not in os.environ
        with whole_weights():
            pass
        assert not is_deepspeed_zero3_enabled()
    assert is_deepspeed_zero3_enabled()
    with pytest.raises(ValueError, match="no such file"), whole_weights():
        raise ValueError("no such file")
    assert is_deepspeed_zero3_enabled() and os.environ[EFFICIENT_LOADING] == "true"


def test_whole_weights_without_an_engine_changes_nothing(monkeypatch):
    monkeypatch.delenv(EFFICIENT_LOADING, raising=False)
    with whole_weights():
        assert not is_deepspeed_zero3_enabled()
    assert EFFICIENT_LOADING not in os.environ


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Return the folders of a policy, and of reward models as an adapter on it and as a full model."""
    folder = tmp_path_factory.mktemp("models")
    base = save_model(folder / "base")
    full = save_reward_model(base, folder / "full", lora=False)
    return {"base": base, "adapter": save_reward_model(base, folder / "adapter"), "full": full}


def test_models_are_loaded_whole_beside_a_sharded_policy(folders, zero3, tmp_path):
    """Without the patch each of these imports DeepSpeed, which would deal their weights out to the ranks."""
    for load, path in (
        (loading.load_reward_model, folders["full"]),
        (loading.load_reward_model, folders["adapter"]),
        (merging.load_merged, folders["adapter"]),
    ):
        model = load(path)
        assert {weight.device.type for weight in model.parameters()} == {"cpu"}
        assert all(weight.numel() for weight in model.parameters())
    assert sizes.empty_model(folders["base"]).num_parameters() > 0
    with whole_weights():
        policy = loading.load_full(folders["base"], "CAUSAL_LM")
    assert initial._adapted_layers(LoraConfig(target_modules="all-linear"), policy, "CAUSAL_LM")
    merging.merge_adapter(folders["adapter"], str(tmp_path / "merged"))
    assert loading.load_reward_model(str(tmp_path / "merged")).config.num_labels == 1


def test_fsdp_on_cpu_ranks_ends_with_its_context():
    initialize = AcceleratorState.__init__
    with fsdp_on_cpu_ranks():
        assert AcceleratorState.__init__ is not initialize
    assert AcceleratorState.__init__ is initialize
