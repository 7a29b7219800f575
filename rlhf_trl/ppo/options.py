"""Rules of the options of PPO. Imports no torch."""

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
