"""The RLHF pipeline (SFT, reward model, PPO, DPO and their kin) on Hugging Face TRL, configured with Hydra."""

import os

__version__ = "0.1.0"

# TRL reports every trainer's start to the hub. huggingface_hub reads this when it is imported, so it is set before.
# Who wants to report says HF_HUB_DISABLE_TELEMETRY=0.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
