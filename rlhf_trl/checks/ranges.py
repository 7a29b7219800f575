"""Options outside of their range: the ranges that stand beside each class, wherever the config has its options."""

from typing import Any

from rlhf_trl.callbacks.options import RULES as CALLBACK_RULES
from rlhf_trl.checks.names import type_problem
from rlhf_trl.config.argument_names import arguments
from rlhf_trl.config.ranges import COUNT, NONNEGATIVE, SEED, SHARE, problem_of
from rlhf_trl.config.ranges import RULES as LIBRARY_RULES
from rlhf_trl.config.values import at, nodes, section
from rlhf_trl.data.options import LIMITS
from rlhf_trl.data.options import RULES as DATA_RULES
from rlhf_trl.evaluation.options import RULES as JUDGE_RULES
from rlhf_trl.labels.options import RULES as LABEL_RULES
from rlhf_trl.models.options import RULES as MODEL_RULES
from rlhf_trl.ppo.options import RULES as PPO_RULES
from rlhf_trl.reward_modeling.options import RULES as REWARD_MODEL_RULES
from rlhf_trl.rewards.options import RULES as REWARD_RULES
from rlhf_trl.trainers.options import RULES as TRAINER_RULES

# The examples stand outside the core, which imports nothing from them
TASK_RULES = {
    "rlhf_trl.tasks.demo.load": LIMITS | {"conversational": "bool"},
    "rlhf_trl.tasks.reviews.load": LIMITS
    | {"prompt_words": COUNT, "rounds": COUNT, "min_gap": NONNEGATIVE, "judge_share": SHARE},
}
# By the dot path of a `_target_`
RULES: dict[str, dict[str, str]] = {
    **LIBRARY_RULES,
    **PPO_RULES,
    **REWARD_MODEL_RULES,
    **TRAINER_RULES,
    **CALLBACK_RULES,
    **REWARD_RULES,
    **DATA_RULES,
    **JUDGE_RULES,
    **LABEL_RULES,
    **MODEL_RULES,
    **TASK_RULES,
}
# By key: options of stages and of the run itself
RUN = {
    "seed": SEED,
    "resume": "true|false|auto",
    "overwrite": "bool",
    "merge": "bool",
    "dry_run": "bool",
    "time_steps": "bool",
    "model.trust_remote_code": "bool",
    "logger.log_model": "bool",
    "stage.members": COUNT,
    "stage.temperature": NONNEGATIVE,
    "stage.max_completion_length": COUNT,
    "stage.batch_size": COUNT,
    "stage.n": COUNT,
    "stage.split": "train|eval",
    "stage.keep": "best_per_prompt|best_overall?",
    "stage.top_p": "(0, 1]",
    "stage.budget": f"{COUNT}?",
    "stage.per_prompt": COUNT,
    "stage.min_thumbs": f"{COUNT}?",
    "stage.question_size": COUNT,
    "stage.overlap": COUNT,
    "stage.ask": "pair|ranking|rating|edit",
    "stage.max_prompts": f"{COUNT}?",
    "stage.to_chat": "bool?",
    "stage.remember": "bool",
    "stage.score": "bool",
    "stage.checkpoints": "bool",
    "stage.assume_shared_start": "bool",
    "stage.trust_remote_code": "bool",
    "stage.grid": "numbers?",
    "stage.references": "bool",
    "stage.show": "bool",
    "stage.best_of_n": "int [0, inf)",
    "stage.best_of_n_batch_size": f"{COUNT}?",
    "stage.like_length": NONNEGATIVE,
    "stage.bins": COUNT,
    "stage.completions": "int [2, inf)",
    "stage.gaps_above": "numbers?",
    "stage.task_type": "CAUSAL_LM|SEQ_CLS",
}


def range_problems(values: dict[str, Any]) -> list[str]:
    """Return the problems of numbers, choices and booleans. Another type than the class declares is no range's."""
    problems = []
    for path, node in nodes(values):
        target = str(node.get("_target_"))
        known, rules = arguments(target) or {}, RULES.get(target, {})
        for key, value in node.items():
            place = f"{path}.{key}"
            if key in rules and not (key in known and type_problem(place, value, known[key][0])):
                problems.append(problem_of(place, value, rules[key]))
            elif value is None and key in known and known[key][0] and not known[key][0].endswith("?"):
                problems.append(f"`{place}` is null and must have a value. Remove it for {known[key][1]!r}.")
    for place, rule in RUN.items():
        parent, _, key = place.rpartition(".")
        if key in (section(values, parent) if parent else values):
            problems.append(problem_of(place, at(values, place), rule))
    return [problem for problem in problems if problem]
