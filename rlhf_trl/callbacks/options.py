"""Rules of the options of KL controllers, reward normalizers and the health monitor. Imports no torch."""

from collections.abc import Mapping
from typing import Any

from rlhf_trl.config.ranges import COUNT, NONNEGATIVE, NUMBER, POSITIVE

KL = {"guard": f"{POSITIVE}?", "guard_action": "stop|skip"}
ADAPTIVE_KL = KL | {"target": POSITIVE, "horizon": POSITIVE}
FINAL_KL = KL | {"final": NONNEGATIVE}
HEALTH = {"baseline": COUNT, "window": COUNT}
REWARD_NORM = {"clip": f"{POSITIVE}?"}
MOVING_NORM = REWARD_NORM | {"shift_mean": "bool"}
REFERENCE_NORM = REWARD_NORM | {"rows": "int [2, inf)", "mean": f"{NUMBER}?", "std": f"{POSITIVE}?"}
RULES = {
    "rlhf_trl.callbacks.kl.FixedKL": KL,
    "rlhf_trl.callbacks.kl.AdaptiveKL": ADAPTIVE_KL,
    "rlhf_trl.callbacks.kl.LinearKL": FINAL_KL,
    "rlhf_trl.callbacks.kl.CosineKL": FINAL_KL,
    "rlhf_trl.callbacks.health.HealthMonitor": HEALTH,
    "rlhf_trl.callbacks.reward_norm.RewardNorm": REWARD_NORM,
    "rlhf_trl.callbacks.reward_norm.BatchNorm": MOVING_NORM,
    "rlhf_trl.callbacks.reward_norm.RunningNorm": MOVING_NORM,
    "rlhf_trl.callbacks.reward_norm.ReferenceNorm": REFERENCE_NORM,
}


def kl_problems(kl: Mapping[str, Any], beta: float | None, keeps_reference: bool, is_deepspeed: bool) -> list[str]:
    """
    Return what keeps a KL controller from working with a trainer.

    Args:
        kl (`Mapping[str, Any]`): the group `kl` of the config, empty without one.
        beta (`float`, *optional*): `beta` of the trainer's arguments, the coefficient at the start.
        keeps_reference (`bool`): whether the trainer keeps its reference, and measures the KL, at `beta=0`.
        is_deepspeed (`bool`): whether DeepSpeed makes the updates.
    """
    controller = str(kl.get("_target_") or "FixedKL").rsplit(".", 1)[-1]
    problems = []
    if beta == 0:
        # A controller may lead from 0 to another value, but no factor does, and GRPO and RLOO keep no reference there
        stays = not keeps_reference or controller == "AdaptiveKL" or kl.get("final") == 0
        if controller != "FixedKL" and stays:
            problems.append(
                f"`{controller}` changes the KL coefficient from its start value, and `stage.args.beta` is 0. "
                "Set `stage.args.beta` above 0, or `kl=fixed`."
            )
        elif kl.get("guard") is not None and not keeps_reference:
            problems.append(
                "`kl.guard` needs the KL to the reference, and this trainer keeps none at `stage.args.beta=0`. "
                "Set `stage.args.beta` above 0, or `kl.guard=null`."
            )
    if problem := guard_problem(kl.get("guard"), kl.get("guard_action"), is_deepspeed):
        problems.append(problem)
    return problems


def guard_problem(guard: float | None, action: str | None, is_deepspeed: bool) -> str | None:
    """Return what keeps the KL guard from its action, `None` where nothing does."""
    if guard is None or action != "skip" or not is_deepspeed:
        return None
    return (
        "`kl.guard_action=skip` can't withhold an update from DeepSpeed, which makes it within `backward`. "
        "Set `kl.guard_action=stop`."
    )


def normalizer_problem(args: Mapping[str, Any]) -> str | None:
    """Return the trainer's argument that a reward normalizer doesn't go with, `None` if there is none."""
    if args.get("critic_score_head"):
        return (
            "`stage.args.critic_score_head=true` starts the critic at the reward model's own scores, and a reward "
            "normalizer puts rewards on another scale: its first values would be off by mean and spread. Set "
            "`reward_norm=none`, or `stage.args.critic_score_head=false`, with which the critic still starts from "
            "the reward model's weights."
        )
    if args.get("multi_objective_aggregation") == "normalize_then_sum":
        cause, way = "multi_objective_aggregation=normalize_then_sum", "multi_objective_aggregation=sum_then_normalize"
        what = "normalizes every reward function over a prompt's completions"
    elif args.get("scale_rewards") in ("group", "batch", True):
        cause, way = f"scale_rewards={args['scale_rewards']}", "scale_rewards=none"
        what = "divides the advantages by the std of their rewards, whatever scale these have"
    elif args.get("normalize_advantages") and args.get("beta") == 0:
        cause, way = "normalize_advantages=true", "normalize_advantages=false"
        what = "with `stage.args.beta=0` brings advantages to std 1, whatever scale the rewards have"
    else:
        return None
    return (
        f"A reward normalizer would be cancelled: `stage.args.{cause}` {what}. Set `stage.args.{way}`, or "
        "`reward_norm=none`."
    )
