"""Rules of the options of PPO. Imports no torch."""

from collections.abc import Mapping
from typing import Any

from rlhf_trl.config.ranges import COUNT, GRPO, NONNEGATIVE, NUMBER, SHARE, TRAINING

# Mini-batches of an epoch where neither `steps_per_generation` nor `generation_batch_size` is set
MINI_BATCHES = 4
PPO = GRPO | {
    "kl_estimator": "k1|k2|k3",
    "gamma": SHARE,
    "lam": SHARE,
    "vf_coef": NONNEGATIVE,
    "cliprange_value": NONNEGATIVE,
    "entropy_coef": NONNEGATIVE,
    "missing_eos_penalty": f"{NONNEGATIVE}?",
    "missing_eos_score": f"{NUMBER}?",
    "length_penalty": NONNEGATIVE,
    "total_episodes": f"{COUNT}?",
    "ratio_threshold": "(1, inf)?",  # the ratio of a policy that didn't change is 1
    "ptx_coef": NONNEGATIVE,
    "critic": "head|adapter|model",
    "critic_dtype": "float32|bfloat16|float16?",
    "critic_learning_rate": f"{NONNEGATIVE}?",
    "critic_warmup_steps": "int [0, inf)",
    "ref_dtype": "float32|bfloat16|float16?",
    "head_init": "zero|normal",
    "max_invalid_fraction": SHARE,
}
RULES = {
    "rlhf_trl.ppo.PPOConfig": TRAINING | PPO,
}
# Inherited options that would do nothing, or something else than their name says, in a per-token PPO. Each is held to
# GRPOConfig's default (or the value PPO fixes) and refused otherwise, with the reason.
REFUSED: dict[str, tuple[Any, str]] = {
    "loss_type": ("dapo", "PPO's loss is the clipped policy and value loss, normalized by the tokens of a mini-batch"),
    "scale_rewards": ("none", "PPO has no groups to scale by; use `whiten_rewards` or a reward normalizer"),
    "multi_objective_aggregation": ("sum_then_normalize", "PPO adds the weighted rewards and normalizes advantages"),
    "importance_sampling_level": ("token", "PPO's ratio is per token"),
    "mask_truncated_completions": (False, "use `missing_eos_penalty` to discourage completions without an end"),
    "top_entropy_quantile": (1.0, "PPO trains on every token of a completion"),
    "use_adaptive_entropy": (False, "only a constant `entropy_coef` is supported"),
    "entropy_coef_min": (0.0, "only a constant `entropy_coef` is supported"),
    "entropy_coef_max": (1.0, "only a constant `entropy_coef` is supported"),
    "entropy_coef_delta": (0.005, "only a constant `entropy_coef` is supported"),
    "entropy_target": (0.2, "only a constant `entropy_coef` is supported"),
    "off_policy_mask_threshold": (None, "it masks sequences by group advantages, which PPO doesn't have"),
    "use_bias_correction_kl": (True, "PPO's KL is in the reward; choose its estimator with `kl_estimator`"),
    "sync_ref_model": (False, "PPO's reference is the policy's starting point, for the whole run"),
    "ref_model_mixup_alpha": (0.6, "PPO's reference is the policy's starting point, for the whole run"),
    "ref_model_sync_steps": (512, "PPO's reference is the policy's starting point, for the whole run"),
    "sapo_temperature_neg": (1.05, "it belongs to `loss_type='sapo'`"),
    "sapo_temperature_pos": (1.0, "it belongs to `loss_type='sapo'`"),
    "vespo_k_pos": (2.0, "it belongs to `loss_type='vespo'`"),
    "vespo_lambda_pos": (3.0, "it belongs to `loss_type='vespo'`"),
    "vespo_k_neg": (3.0, "it belongs to `loss_type='vespo'`"),
    "vespo_lambda_neg": (2.0, "it belongs to `loss_type='vespo'`"),
    "router_aux_loss_coef": (None, "the load-balancing loss of mixture-of-experts models is not part of PPO's loss"),
}


def critic_warmup_problem(steps: Any, is_deepspeed: bool) -> str | None:
    """Return the problem of a critic's warm-up, in which the policy's weights don't move, under DeepSpeed, or none."""
    if not steps or not is_deepspeed:
        return None
    return (
        "`stage.args.critic_warmup_steps` withholds the policy's updates, which DeepSpeed makes within `backward`. "
        "Set it to 0, or launch with ddp or fsdp2."
    )


def argument_problem(args: Mapping[str, Any]) -> str | None:
    """Return the first problem of the arguments that are valid by themselves, and what to set; `None` without one."""
    rules = (_refused_problem, _mini_batch_problem, _critic_problem, _missing_eos_problem)
    return next((problem for rule in rules if (problem := rule(args))), None)


def _refused_problem(args: Mapping[str, Any]) -> str | None:
    for name, (default, reason) in REFUSED.items():
        if args[name] != default:
            return f"`{name}={args[name]!r}` has no place in PPO: {reason}. Leave `{name}` at {default!r}."
    return None


def _mini_batch_problem(args: Mapping[str, Any]) -> str | None:
    steps, accumulation = args["steps_per_generation"], args["gradient_accumulation_steps"]
    if steps % accumulation == 0:
        return None
    return (
        f"A rollout of {steps} micro-batches (`steps_per_generation`) can't be split into mini-batches of "
        f"{accumulation} (`gradient_accumulation_steps`). Set `steps_per_generation` to a multiple of "
        "`gradient_accumulation_steps`."
    )


def _critic_problem(args: Mapping[str, Any]) -> str | None:
    for name, unset in (("critic_path", None), ("critic_score_head", False)):
        if args["critic"] == "head" and args[name] != unset:
            return (
                f"`{name}` starts a critic from a reward model, and `critic='head'` reads the policy's own hidden "
                f"states. Set `critic` to 'adapter' or 'model', or remove `{name}`."
            )
    if args["critic_dtype"] is not None and args["critic"] != "model":
        return "`critic_dtype` is for `critic='model'`; the other critics compute in the policy's type."
    return None


def _missing_eos_problem(args: Mapping[str, Any]) -> str | None:
    if args["missing_eos_penalty"] is None or args["missing_eos_score"] is None:
        return None
    return (
        "`missing_eos_penalty` subtracts from the score of a completion without EOS, `missing_eos_score` replaces it. "
        "Set one of them to null."
    )
