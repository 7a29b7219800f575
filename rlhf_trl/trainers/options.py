"""Rules of the options of online DPO and MODPO. Imports no torch."""

import math
from collections.abc import Mapping
from typing import Any

from rlhf_trl.config.ranges import COUNT, MAX_LENGTH, POSITIVE, ROLLOUTS, TRAINING

# Of rollouts, without what TRL's config has no argument for; `beta` is a number or a list of them
ABSENT = {
    "beta",
    "epsilon",
    "generation_batch_size",
    "num_generations",
    "num_generations_eval",
    "num_iterations",
    "steps_per_generation",
    "vllm_max_model_length",
}
ONLINE_DPO = {name: rule for name, rule in ROLLOUTS.items() if name not in ABSENT} | {
    "loss_type": "sigmoid|ipo",
    "missing_eos_penalty": f"{POSITIVE}?",
    "max_completion_length": COUNT,
}
# The margin stands in the sigmoid of DPO's loss, which reads no other divergence and no label smoothing
MODPO = MAX_LENGTH | {
    "beta": POSITIVE,
    "preference_weight": "(0, 1]",
    "loss_type": "sigmoid",
    "f_divergence_type": "reverse_kl",
    "label_smoothing": "[0, 0]",
}
RULES = {
    "rlhf_trl.trainers.modpo.MODPOConfig": TRAINING | MODPO,
    "rlhf_trl.trainers.online_dpo.OnlineDPOConfig": TRAINING | ONLINE_DPO,
}
# Arguments of TRL's config that would do nothing here, with their defaults and what to set in their place
REFUSED: dict[str, tuple[Any, str]] = {
    "max_new_tokens": (64, "Set `max_completion_length`, as in the other stages that generate."),
    "max_length": (512, "It would cut prompts. Drop long ones with `stage.prepare.max_prompt_length`."),
    "reward_model_path": (None, "Set `reward=model reward.model.path=...`."),
    "use_vllm": (False, "Completions are sampled from the weights that are trained. `stage=grpo` can use vLLM."),
}


def online_dpo_problem(args: Mapping[str, Any]) -> str | None:
    """Return the first problem of the arguments that the ranges don't know, and what to set; `None` without one."""
    for name, (default, remedy) in REFUSED.items():
        if args[name] != default:
            return f"`{name}={args[name]!r}` has no effect in online DPO. {remedy}"
    betas = args["beta"] if isinstance(args["beta"], list | tuple) else [args["beta"]]
    for beta in betas or [None]:
        if isinstance(beta, bool) or not isinstance(beta, int | float) or not (math.isfinite(beta) and beta > 0):
            return f"`beta` is {args['beta']!r}. Set it above 0, or to a list of such numbers, one per epoch."
    return None
