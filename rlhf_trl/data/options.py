"""Rules of the options of data sources. Imports no torch."""

from rlhf_trl.config.ranges import COUNT, POSITIVE

LIMITS = {"max_samples": f"{COUNT}?", "max_eval_samples": f"{COUNT}?"}
ROWS = LIMITS | {"eval_size": f"{POSITIVE}?", "to_chat": "bool"}
RULES = {
    "rlhf_trl.data.load_files": ROWS,
    "rlhf_trl.data.load_hub": ROWS,
    "rlhf_trl.data.mix": LIMITS | {"repeat": "bool"},
    "rlhf_trl.data.filter_prompts": {"max_prompt_length": f"{COUNT}?"},
}
