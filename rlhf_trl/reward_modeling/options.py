"""Rules of the options of the reward model trainer. Imports no torch."""

from rlhf_trl.config.ranges import MAX_LENGTH, NONNEGATIVE, TRAINING

REWARD_MODEL = {
    "loss_type": "pairwise|plackett_luce",
    "label_smoothing": "[0, 0.5)",
    "head_init": "normal?",
    "border_coef": NONNEGATIVE,
    "border_l2_coef": NONNEGATIVE,
    "calibrate_on": "all|best",
    "center_rewards_coefficient": f"{NONNEGATIVE}?",
}
RULES = {
    "rlhf_trl.reward_modeling.RewardConfig": TRAINING | MAX_LENGTH | REWARD_MODEL,
}
