"""Rules of the options of judges. Imports no torch."""

from rlhf_trl.config.ranges import COUNT, NONNEGATIVE, POSITIVE

JUDGE = {"all_pairs": "bool"}
RULES = {
    "rlhf_trl.evaluation.judges.RewardJudge": {"tie_margin": NONNEGATIVE},
    "rlhf_trl.evaluation.judges.ModelJudge": JUDGE | {"max_new_tokens": COUNT, "batch_size": COUNT},
    "rlhf_trl.evaluation.judges.HTTPJudge": JUDGE
    | {"timeout": POSITIVE, "retries": "int [0, inf)", "concurrency": COUNT, "max_tokens": COUNT},
}
