"""Options that don't go together."""

from typing import Any

from rlhf_trl.callbacks.options import kl_problems, normalizer_problem
from rlhf_trl.checks.paths import model_folder
from rlhf_trl.checks.renamed import renamed_key
from rlhf_trl.config.values import at, section
from rlhf_trl.errors import ConfigError
from rlhf_trl.health.signs import limit_problems
from rlhf_trl.labels.options import human_problems, selection_problem
from rlhf_trl.models.options import soup_weight_problem
from rlhf_trl.ppo.options import critic_warmup_problem
from rlhf_trl.runs.directory import PEOPLE
from rlhf_trl.runs.engines import shards_parameters, uses_deepspeed
from rlhf_trl.runs.paths import ADAPTER_FILE, project_dir, read_model_config, soup_models

# Arguments of `from_pretrained` that have a key of their own, or that the trainer sets
OWN_KEYS = {
    "dtype": "Set `model.dtype`.",
    "torch_dtype": "Set `model.dtype`.",
    "attn_implementation": "Set `model.attn_implementation`.",
    "trust_remote_code": "Set `model.trust_remote_code`.",
    "revision": "Set `model.revision`.",
    "quantization_config": "Set `adapter.quantization`, as `adapter=qlora` does.",
    "device_map": "Remove it: the launcher gives each rank its device.",
}
PPO_CONFIG = "rlhf_trl.ppo.PPOConfig"
REWARD_JUDGE = "rlhf_trl.evaluation.judges.RewardJudge"
MERGE = "rlhf_trl.stages.merge.merge"


def combination_problems(values: dict[str, Any]) -> list[str]:
    """Return the problems of options that are valid by themselves and don't go together."""
    steps = (
        _objective,
        _noise,
        _generation,
        _packing,
        _shared_base,
        _critic_start,
        _critic_warmup,
        _demonstrations,
        _kl,
        _health,
        _reward_norm,
        _unused_adapter_options,
        _merge,
        _soup,
        _directories,
        _no_training,
        _quantization,
        _selection,
        _compared_by,
        _labeler,
        _init_kwargs,
    )
    return [problem for step in steps for problem in step(values)]


def _is_rl(values: dict[str, Any]) -> bool:
    return at(values, "stage.dataset_type") == "prompt"


def _objective(values: dict[str, Any]) -> list[str]:
    """Return the problem of an RL stage with nothing to maximize, or none."""
    stage, rewards, judge = at(values, "stage.name"), section(values, "reward"), section(values, "judge")
    if not _is_rl(values) or not section(values, "stage.args"):
        return []
    if judge.get("_target_") == REWARD_JUDGE:
        return [
            f"`judge=reward` prefers what has the higher reward, as `stage={stage}` does without a judge. Set "
            "`judge=null`, or `judge=http` or `judge=model`."
        ]
    if judge:
        return []
    weights = [reward.get("weight", 1) for reward in rewards.values() if isinstance(reward, dict)]
    if not weights:
        return [f"`stage={stage}` has no reward to maximize. Set `reward=demo` or another option."]
    if any(weight != 0 for weight in weights):
        return []
    return [
        f"All rewards have weight 0, so `stage={stage}` has nothing to maximize. Set the weight of one: "
        f"`reward.{next(iter(rewards))}.weight=1`."
    ]


def _kl(values: dict[str, Any]) -> list[str]:
    args = section(values, "stage.args")
    return kl_problems(
        section(values, "kl"),
        beta=args.get("beta"),
        keeps_reference=args.get("_target_") == PPO_CONFIG,
        is_deepspeed=uses_deepspeed(),
    )


def _health(values: dict[str, Any]) -> list[str]:
    signs = section(values, "health.signs")
    return limit_problems({name: signs[name] for name in signs if not renamed_key(f"health.signs.{name}")})


def _reward_norm(values: dict[str, Any]) -> list[str]:
    if str(at(values, "reward_norm._target_") or "RewardNorm").endswith(".RewardNorm"):
        return []
    problem = normalizer_problem(section(values, "stage.args"))
    return [problem] if problem else []


def _unused_adapter_options(values: dict[str, Any]) -> list[str]:
    """Return the problems of options of an adapter or of its quantization that the chosen adapter doesn't have."""
    return [
        f"`adapter.{name}` is not used by this `adapter`. Set `adapter={option}` as well."
        for name, option in (("peft", "lora"), ("quantization", "qlora"))
        if at(values, f"adapter.{name}") and "_target_" not in section(values, f"adapter.{name}")
    ]


def _merge(values: dict[str, Any]) -> list[str]:
    """Return the problems of a merge without an adapter."""
    problems = []
    if at(values, "stage.run._target_") == MERGE:
        folder = model_folder(section(values, "model"), values)
        if (folder / "config.json").is_file() and not (folder / ADAPTER_FILE).is_file():
            problems.append(f"`{folder}` is a full model, there is nothing to merge. Use it as it is.")
    if section(values, "stage.args") and values.get("merge") is True and not section(values, "adapter.peft"):
        problems.append(
            "`merge=true` writes the merged model of an adapter, and `adapter=none` trains none. Remove "
            "`merge=true`, or set `adapter=lora`."
        )
    return problems


def _soup(values: dict[str, Any]) -> list[str]:
    """Return the problem of the weights of a soup, or none."""
    if (models := at(values, "stage.models")) is None:
        return []
    try:
        names = list(soup_models(models, project_dir(values)))
    except ConfigError:
        return []  # which is said by the key
    grid = at(values, "stage.grid")
    problem = soup_weight_problem(names, at(values, "stage.weights"), grid if isinstance(grid, list) else None)
    return [problem] if problem else []


def _directories(values: dict[str, Any]) -> list[str]:
    """Return the problems of trainer arguments that would move the checkpoints elsewhere, or do nothing."""
    args, problems = section(values, "stage.args"), []
    if args.get("resume_from_checkpoint") is not None:
        problems.append("`stage.args.resume_from_checkpoint` is not read. Set `resume=true` to resume this run.")
    if args.get("enable_jit_checkpoint"):
        problems.append(
            "`stage.args.enable_jit_checkpoint` is not read: every run saves a checkpoint at SIGTERM. Remove it."
        )
    if "_target_" in args and args.get("output_dir") != values.get("run_dir"):
        problems.append(
            f"`stage.args.output_dir` is {args.get('output_dir', 'not set')}, and a run's checkpoints are looked for "
            "in `run_dir`. Don't change `stage.args.output_dir`; set `run_name=...` or `runs_dir=...`."
        )
    return problems


def _selection(values: dict[str, Any]) -> list[str]:
    rewards, keep = bool(section(values, "reward")), at(values, "stage.keep")
    problem = selection_problem(section(values, "select"), rewards)
    if keep is not None and not rewards:
        problem = f"`stage.keep={keep}` chooses by a reward, and there is none. Set `reward=model`, or another one."
    return [problem] if problem else []


def _compared_by(values: dict[str, Any]) -> list[str]:
    """Return the problems of a comparison of policies without a reward, in which a judge alone decides."""
    if at(values, "stage.name") != "evaluate" or section(values, "reward"):
        return []
    problems = []
    if section(values, "judge").get("_target_") == REWARD_JUDGE:
        problems.append("`judge=reward` reads a reward, and there is none. Set `reward=demo`, or another judge.")
    if samples := at(values, "stage.best_of_n"):
        problems.append(
            f"`stage.best_of_n={samples}` chooses by a reward, and there is none. Set `stage.best_of_n=0`."
        )
    return problems


def _labeler(values: dict[str, Any]) -> list[str]:
    labeler = section(values, "labeler")
    return human_problems(labeler, at(values, "stage.ask")) if labeler.get("_target_") == PEOPLE else []


def _no_training(values: dict[str, Any]) -> list[str]:
    """Return the problem of trainer arguments in a stage that trains nothing, or none."""
    args = section(values, "stage.args")
    if not args or "_target_" in args:
        return []
    return [
        f"`stage={at(values, 'stage.name')}` trains nothing and has no `stage.args`. Remove `debug=smoke` (or "
        "`stage.args`), which is for stages that train."
    ]


def _noise(values: dict[str, Any]) -> list[str]:
    """Return the problems of noise in training that would be undone, or make the policy differ from its rollouts."""
    args, peft = section(values, "stage.args"), section(values, "adapter.peft")
    why, or_else = "in an RL stage rollout and update must see the same policy", ""
    if not _is_rl(values):
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


def _generation(values: dict[str, Any]) -> list[str]:
    """Return the problems of generation options that change the shape of a rollout."""
    args = section(values, "stage.args")
    if args.get("use_vllm"):
        return []
    return [
        f"`stage.args.generation_kwargs.{name}` has no place in a rollout: TRL asks `generate` for the ids of one "
        "completion a prompt, up to an end token. Remove it."
        for name in ("num_return_sequences", "return_dict_in_generate", "stop_strings")
        if section(args, "generation_kwargs").get(name)
    ]


def _packing(values: dict[str, Any]) -> list[str]:
    """Return the problems of packing that would let rows in one sequence attend to each other with any model."""
    args = section(values, "stage.args")
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


def _shared_base(values: dict[str, Any]) -> list[str]:
    """Return the problems of adapters beside the policy's: they need a frozen base, all of it on each rank."""
    args, peft = section(values, "stage.args"), section(values, "adapter.peft")
    asked = ["critic=adapter"] if args.get("critic") == "adapter" else []
    targets = [at(values, f"reward.{name}._target_") for name in section(values, "reward")]
    asked += ["reward=adapter"] if "rlhf_trl.rewards.AdapterReward" in targets else []
    problems = []
    if asked and not peft and args:
        problems.append(
            f"`{asked[0]}` is an adapter on the policy's frozen base, and `adapter=none` trains that base. Set "
            f"`adapter=lora` as well, or `{asked[0].split('=')[0]}=model`."
        )
    if "reward=adapter" in asked and shards_parameters():
        problems.append(
            "`reward=adapter` computes on the policy's base outside of its training forward, which FSDP and ZeRO-3, "
            "where no rank has all of it, don't allow. Set `reward=model`, or launch with ddp or zero2."
        )
    return problems


def _critic_start(values: dict[str, Any]) -> list[str]:
    """Return the problem of a critic with the score head of no reward model, or none."""
    args, start = section(values, "stage.args"), section(values, "critic")
    named = start.get("run") is not None or start.get("path") is not None
    if args.get("critic_score_head") is not True or named or args.get("critic_path"):
        return []
    return [
        "`stage.args.critic_score_head` starts the value head as a reward model's score head, and no reward model is "
        "named. Set `critic.run=reward`, or `critic.path=...`."
    ]


def _critic_warmup(values: dict[str, Any]) -> list[str]:
    """Return the problem of a critic's warm-up under DeepSpeed, or none."""
    problem = critic_warmup_problem(section(values, "stage.args").get("critic_warmup_steps"), uses_deepspeed())
    return [problem] if problem else []


def _demonstrations(values: dict[str, Any]) -> list[str]:
    """Return the problems of a loss on demonstrations without data, or of data without the loss."""
    args, problems = section(values, "stage.args"), []
    if (args.get("ptx_coef") or 0) > 0 and not section(values, "ptx_data"):
        problems.append(
            "`stage.args.ptx_coef` weights a language-model loss on demonstrations, and there are none. Set "
            "`+data@ptx_data=demo` or another option of `data`."
        )
    if section(values, "ptx_data") and not args.get("ptx_coef"):
        problems.append("`ptx_data` is read with `stage.args.ptx_coef` above 0 only. Set it, or remove `ptx_data`.")
    return problems


def _quantization(values: dict[str, Any]) -> list[str]:
    """Return the problems of quantizing weights that are trained, or quantized already."""
    if not section(values, "adapter.quantization"):
        return []
    problems = []
    if not section(values, "adapter.peft"):
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


def _init_kwargs(values: dict[str, Any]) -> list[str]:
    """Return the problems of arguments of `from_pretrained` that have another key, or reach one model only."""
    given, args = section(values, "model.init_kwargs"), section(values, "stage.args")
    problems = [f"`model.init_kwargs.{name}` is set. {OWN_KEYS[name]}" for name in given if name in OWN_KEYS]
    if args.get("model_init_kwargs") not in (None, at(values, "model.init_kwargs")):
        problems.append(
            "`stage.args.model_init_kwargs` reaches the reference only, since the policy is loaded before. Set "
            "`model.init_kwargs`, which is for both."
        )
    return problems
