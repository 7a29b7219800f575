"""Options that this launch and this machine can't run: processes, precision, packages."""

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from rlhf_trl.config.values import at, section
from rlhf_trl.runs.directory import PEOPLE
from rlhf_trl.runs.engines import deepspeed_on_cpu, uses_fsdp
from rlhf_trl.runs.ranks import world_size

MATH_ANSWER = "rlhf_trl.rewards.math.math_answer"
# Extras of pyproject.toml that have another name than their package
EXTRAS = {
    **{"bitsandbytes": "qlora", "fastapi": "serve", "uvicorn": "serve", "markdown_it": "serve"},
    "math_verify": "math",
}


def machine_problems(values: dict[str, Any]) -> list[str]:
    """Return the problems of options that this launch or this machine can't run."""
    return (
        _machines(values)
        + _ranks_of_cpus()
        + _processes(values)
        + _sharded_files(values)
        + _precision(values)
        + _packages(values)
    )


def _machines(values: dict[str, Any]) -> list[str]:
    """Return the problem of a launch for fewer machines than Slurm has started it on, or none."""
    tasks, machines = (int(os.environ.get(name) or 1) for name in ("SLURM_STEP_NUM_TASKS", "GROUP_WORLD_SIZE"))
    if tasks == 1 or world_size() == tasks or machines == tasks:
        return []
    return [
        f"Slurm has started this launch {tasks} times, and it is for {machines} machine{'s' * (machines > 1)}: each "
        "would be a run of its own in one directory. Start it once for each node (`--ntasks-per-node=1`), with "
        f"`--num_machines {tasks} --machine_rank $SLURM_PROCID` as `launch/slurm/multi_node.sbatch` does."
    ]


def _ranks_of_cpus() -> list[str]:
    """Return the problem of several CPU processes that accelerate was to start and has not started, or none."""
    started = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")  # by torchrun, or by mpirun
    asked = os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_PORT" in os.environ
    if not asked or any(name in os.environ for name in started):
        return []
    return [
        "Accelerate was to start several processes, of this machine or of several, and with `--cpu` or "
        "`use_cpu: true` it starts one: each would be a run of its own. Remove it, and start "
        "`ACCELERATE_USE_CPU=true accelerate launch --config_file launch/accelerate/ddp.yaml ...`, or set "
        "`--num_machines 1 --num_processes 1` (and unset `MASTER_PORT`)."
    ]


def _processes(values: dict[str, Any]) -> list[str]:
    if not at(values, "stage.args.fsdp") or world_size() > 1:
        return []
    return ["`stage.args.fsdp` needs several processes. Launch with `accelerate launch`, or remove it."]


def _sharded_files(values: dict[str, Any]) -> list[str]:
    """Return the problem of FSDP that saves shares of the weights, which ends without a model, or none."""
    config = at(values, "stage.args.fsdp_config")
    own = {str(key).removeprefix("fsdp_"): value for key, value in config.items()} if isinstance(config, dict) else {}
    where, kind = "`stage.args.fsdp_config.state_dict_type`", own.get("state_dict_type")
    remedy = "Set it to `FULL_STATE_DICT`."
    if uses_fsdp() and not at(values, "stage.args.fsdp"):
        # As accelerate has it where its file says nothing
        default = "FULL_STATE_DICT" if os.environ.get("FSDP_VERSION", "1") == "1" else "SHARDED_STATE_DICT"
        where, kind = "`fsdp_state_dict_type` of accelerate's file", os.environ.get("FSDP_STATE_DICT_TYPE", default)
        remedy = "Set `fsdp_state_dict_type: FULL_STATE_DICT` there, as `launch/accelerate/fsdp2.yaml` has it."
    if kind is None or str(kind).upper() in ("FULL_STATE_DICT", "1") or not section(values, "stage.args"):
        return []
    return [f"{where} is `{kind}`, which saves a share of the weights for each rank and no model at the end. {remedy}"]


def _precision(values: dict[str, Any]) -> list[str]:
    """Return the problems of a precision that this machine has no accelerator for."""
    args = section(values, "stage.args")
    asked = [name for name in ("bf16", "fp16") if args.get(name) is True]
    on_cpu = args.get("use_cpu") is True or deepspeed_on_cpu()
    if not asked or (on_cpu and asked == ["bf16"]) or _may_have_accelerator():
        return []
    out = {
        "bf16": "Set `stage.args.bf16=false`, or `+stage.args.use_cpu=true` to compute in bfloat16 on the CPU.",
        "fp16": "Remove `stage.args.fp16`.",
    }
    return [
        f"`stage.args.{name}` is true, and there is no accelerator here that computes in it. {out[name]}"
        for name in asked
    ]


def _may_have_accelerator() -> bool:
    """Return `False` only where there is certainly none: no device file of an accelerator, and no Mac."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") or os.environ.get("ACCELERATE_USE_CPU") == "True":
        return False
    patterns = ("nvidia[0-9]*", "nvidiactl", "dxg", "kfd", "dri/render*", "accel*", "davinci*", "vfio/*", "neuron*")
    return sys.platform != "linux" or any(True for pattern in patterns for _ in Path("/dev").glob(pattern))


def _packages(values: dict[str, Any]) -> list[str]:
    """Return the problems of options that need a package which is not installed."""
    args, report_to = section(values, "stage.args"), at(values, "stage.args.report_to")
    wanted = {name: f"`logger={name}`" for name in ("wandb", "tensorboard") if name in (report_to or ())}
    if args.get("use_vllm") is True:
        wanted["vllm"] = "`stage.args.use_vllm=true`"
    if at(values, "model.init_kwargs.use_kernels"):
        wanted["kernels"] = "`model.init_kwargs.use_kernels=true`"
    if section(values, "adapter.quantization"):
        wanted["bitsandbytes"] = "`adapter.quantization`"
    if at(values, "stage.run._target_") == "rlhf_trl.stages.serve_reward.serve_reward":
        wanted |= dict.fromkeys(("fastapi", "uvicorn"), "`stage=serve_reward`")
    if at(values, "labeler._target_") == PEOPLE:
        wanted |= dict.fromkeys(("fastapi", "uvicorn", "markdown_it"), "`labeler=human`")
    rewards = section(values, "reward").values()
    if any(isinstance(node, dict) and node.get("function") == MATH_ANSWER for node in rewards):
        wanted["math_verify"] = "`reward=math_answer`"
    extras = {name: name for name in wanted} | EXTRAS
    return [
        f"{why} needs the package `{name}`, which is not installed. Run `pip install 'rlhf-trl[{extras[name]}]'`."
        for name, why in wanted.items()
        if importlib.util.find_spec(name) is None
    ]
