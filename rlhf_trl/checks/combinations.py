"""Options that don't go together, with each other or with this machine."""

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from rlhf_trl.callbacks.options import kl_problems, normalizer_problem
from rlhf_trl.checks.paths import model_folder
from rlhf_trl.checks.renamed import renamed_key
from rlhf_trl.config.values import at, section
from rlhf_trl.health.signs import limit_problems
from rlhf_trl.runs.paths import ADAPTER_FILE, read_model_config
from rlhf_trl.runs.ranks import world_size

PPO_CONFIG = "rlhf_trl.ppo.PPOConfig"
DEEPSPEED = "ACCELERATE_USE_DEEPSPEED"  # `accelerate launch` sets it to "true"


def combination_problems(values: dict[str, Any]) -> list[str]:
    """Return the problems of values that are valid by themselves."""
    stage, args = section(values, "stage"), section(values, "stage.args")
    peft, quantization = section(values, "adapter.peft"), section(values, "adapter.quantization")
    is_rl = stage.get("dataset_type") == "prompt"
    problems = []
    if is_rl and not any(isinstance(reward, dict) for reward in section(values, "reward").values()):
        problems.append(f"`stage={stage.get('name')}` has no reward to maximize. Set `reward=demo` or another option.")
    weights = [reward.get("weight", 1) for reward in section(values, "reward").values() if isinstance(reward, dict)]
    if is_rl and weights and all(weight == 0 for weight in weights):
        problems.append(
            f"All rewards have weight 0, so `stage={stage.get('name')}` has nothing to maximize. Set the weight of "
            f"one: `reward.{next(iter(section(values, 'reward')))}.weight=1`."
        )
    problems += _noise(args, peft, is_rl)
    problems += _generation(args)
    problems += _packing(args)
    problems += _shared_base(values, args, peft)
    problems += kl_problems(
        section(values, "kl"),
        beta=args.get("beta"),
        keeps_reference=args.get("_target_") == PPO_CONFIG,
        is_deepspeed=os.environ.get(DEEPSPEED) == "true",
    )
    signs = section(values, "health.signs")
    problems += limit_problems({name: signs[name] for name in signs if not renamed_key(f"health.signs.{name}")})
    if not str(at(values, "reward_norm._target_") or "RewardNorm").endswith(".RewardNorm"):
        problems += [problem] if (problem := normalizer_problem(args)) else []
    for name, option in (("peft", "lora"), ("quantization", "qlora")):
        node = at(values, f"adapter.{name}")
        if node and "_target_" not in section(values, f"adapter.{name}"):
            problems.append(f"`adapter.{name}` is not used by this `adapter`. Set `adapter={option}` as well.")
    if at(stage, "run._target_") == "rlhf_trl.stages.merge.merge":
        folder = model_folder(section(values, "model"), values)
        if (folder / "config.json").is_file() and not (folder / ADAPTER_FILE).is_file():
            problems.append(f"`{folder}` is a full model, there is nothing to merge. Use it as it is.")
    if args and values.get("merge") is True and not peft:
        problems.append(
            "`merge=true` writes the merged model of an adapter, and `adapter=none` trains none. Remove "
            "`merge=true`, or set `adapter=lora`."
        )
    if args and args.get("resume_from_checkpoint") is not None:
        problems.append("`stage.args.resume_from_checkpoint` is not read. Set `resume=true` to resume this run.")
    if "_target_" in args and args.get("output_dir") != values.get("run_dir"):
        problems.append(
            f"`stage.args.output_dir` is {args.get('output_dir', 'not set')}, and a run's checkpoints are looked for "
            "in `run_dir`. Don't change `stage.args.output_dir`; set `run_name=...` or `runs_dir=...`."
        )
    if args.get("fsdp") and world_size() == 1:
        problems.append("`stage.args.fsdp` needs several processes. Launch with `accelerate launch`, or remove it.")
    if args and "_target_" not in args:
        problems.append(
            f"`stage={stage.get('name')}` trains nothing and has no `stage.args`. Remove `debug=smoke` (or "
            "`stage.args`), which is for stages that train."
        )
    problems += _quantization(values, peft, quantization)
    problems += _precision(args)
    problems += _packages(values, args, quantization)
    return problems


def _noise(args: dict[str, Any], peft: dict[str, Any], is_rl: bool) -> list[str]:
    """Return the problems of noise in training that would be undone, or make the policy differ from its rollouts."""
    why, or_else = "in an RL stage rollout and update must see the same policy", ""
    if not is_rl:
        if not args.get("disable_dropout"):
            return []
        why, or_else = "`stage.args.disable_dropout` would undo it", ", or `stage.args.disable_dropout=false`"
    found = {
        "adapter.peft.lora_dropout": (peft.get("lora_dropout"), 0),
        "stage.args.neftune_noise_alpha": (args.get("neftune_noise_alpha"), "null"),
    }
    return [
        f"`{name}` is {value}, and {why}. Set `{name}={off}`{or_else}."
        for name, (value, off) in found.items()
        if isinstance(value, int | float) and value > 0
    ]


def _generation(args: dict[str, Any]) -> list[str]:
    if args.get("use_vllm"):
        return []
    return [
        f"`stage.args.generation_kwargs.{name}` has no place in a rollout: TRL asks `generate` for the ids of one "
        "completion a prompt, up to an end token. Remove it."
        for name in ("num_return_sequences", "return_dict_in_generate", "stop_strings")
        if section(args, "generation_kwargs").get(name)
    ]


def _packing(args: dict[str, Any]) -> list[str]:
    """Return the problems of packing that would let rows in one sequence attend to each other with any model."""
    if args.get("packing_strategy") == "wrapped" and (args.get("packing") or args.get("eval_packing")):
        return [
            "`stage.args.packing_strategy=wrapped` cuts rows anywhere and lets those in one sequence see each other. "
            "Set it to `bfd`, or to `bfd_split` to lose no token."
        ]
    if args.get("eval_packing") and not (args.get("packing") or args.get("padding_free")):
        return [
            "With `stage.args.eval_packing=true` alone TRL pads the packed batches, and rows in one sequence see each "
            "other. Set `stage.args.packing=true` as well, or remove `eval_packing`."
        ]
    return []


def _shared_base(values: dict[str, Any], args: dict[str, Any], peft: Any) -> list[str]:
    """Return the problems of adapters beside the policy's: they need a frozen base, all of it on each rank."""
    asked = ["critic=adapter"] if args.get("critic") == "adapter" else []
    targets = [at(values, f"reward.{name}._target_") for name in section(values, "reward")]
    asked += ["reward=adapter"] if "rlhf_trl.rewards.AdapterReward" in targets else []
    problems = []
    if asked and not peft and args:
        problems.append(
            f"`{asked[0]}` is an adapter on the policy's frozen base, and `adapter=none` trains that base. Set "
            f"`adapter=lora` as well, or `{asked[0].split('=')[0]}=model`."
        )
    if "reward=adapter" in asked and _shards_parameters():
        problems.append(
            "`reward=adapter` computes on the policy's base outside of its training forward, which FSDP and ZeRO-3, "
            "where no rank has all of it, don't allow. Set `reward=model`, or launch with ddp or zero2."
        )
    start = section(values, "critic")
    named = start.get("run") is not None or start.get("path") is not None
    if args.get("critic_score_head") is True and not (named or args.get("critic_path")):
        problems.append(
            "`stage.args.critic_score_head` starts the value head as a reward model's score head, and no reward model "
            "is named. Set `critic.run=reward`, or `critic.path=...`."
        )
    if (args.get("ptx_coef") or 0) > 0 and not section(values, "ptx_data"):
        problems.append(
            "`stage.args.ptx_coef` weights a language-model loss on demonstrations, and there are none. Set "
            "`+data@ptx_data=demo` or another option of `data`."
        )
    if section(values, "ptx_data") and not args.get("ptx_coef"):
        problems.append("`ptx_data` is read with `stage.args.ptx_coef` above 0 only. Set it, or remove `ptx_data`.")
    return problems


def _shards_parameters() -> bool:
    """Return whether FSDP or ZeRO-3 shards the parameters, by the environment that `accelerate launch` sets."""
    zero3 = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"
    return zero3 or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def _quantization(values: dict[str, Any], peft: Any, quantization: Any) -> list[str]:
    if not quantization:
        return []
    problems = []
    if not peft:
        problems.append(
            "`adapter.quantization` is set without `adapter.peft`, and 4-bit weights can't be trained themselves. "
            "Set `adapter=qlora` (with an adapter) or `adapter=none`."
        )
    folder = model_folder(section(values, "model"), values)
    config = read_model_config(folder / "config.json")
    if method := (config.get("quantization_config") or {}).get("quant_method"):
        problems.append(
            f"`{folder}` is quantized already ({method}), so `adapter.quantization` can't quantize it. "
            "Set `adapter=lora`, or start from the model as it was before."
        )
    return problems


def _precision(args: dict[str, Any]) -> list[str]:
    asked = [name for name in ("bf16", "fp16") if args.get(name) is True]
    if not asked or (args.get("use_cpu") is True and asked == ["bf16"]) or _may_have_accelerator():
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


def _packages(values: dict[str, Any], args: dict[str, Any], quantization: Any) -> list[str]:
    report_to = args.get("report_to")
    wanted = {name: f"`logger={name}`" for name in ("wandb", "tensorboard") if name in (report_to or ())}
    if args.get("use_vllm") is True:
        wanted["vllm"] = "`stage.args.use_vllm=true`"
    if quantization:
        wanted["bitsandbytes"] = "`adapter.quantization`"
    if at(values, "stage.run._target_") == "rlhf_trl.stages.serve_reward.serve_reward":
        wanted |= dict.fromkeys(("fastapi", "uvicorn"), "`stage=serve_reward`")
    extras = {name: name for name in wanted} | {"bitsandbytes": "qlora", "fastapi": "serve", "uvicorn": "serve"}
    return [
        f"{why} needs the package `{name}`, which is not installed. Run `pip install 'rlhf-trl[{extras[name]}]'`."
        for name, why in wanted.items()
        if importlib.util.find_spec(name) is None
    ]
