"""
Loss curves of the training stages on the embedded model: ten steps of each, a step of PPO being a rollout.

`python -m tests.helpers.loss_curves` writes those of the code as it is to tests/integration/loss_curves.json. Run it
only where a change is meant to change the numbers, and say in the commit why.
"""

import json
import tempfile
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from rlhf_trl.runs.paths import conf_dir
from rlhf_trl.runs.record import METRICS_FILE

STORED = Path(__file__).parents[1] / "integration" / "loss_curves.json"
STEPS = 10
SMALL = (
    "data.max_samples=96",
    "data.max_eval_samples=4",
    "stage.args.per_device_train_batch_size=8",
    "stage.args.logging_steps=1",
    "stage.args.eval_strategy=no",
    "stage.args.eval_on_start=false",
    "stage.args.save_strategy=no",
)
# Two epochs of two mini-batches per rollout, so that ratios and clipping take part
PPO = (
    "stage=ppo",
    "stage.args.steps_per_generation=2",
    "stage.args.num_iterations=2",
    "stage.args.learning_rate=3e-4",
)
PPO_METRICS = ("loss", "policy/loss", "value/loss", "objective/scores", "objective/kl")

# What is run, and which metrics are compared
CURVES = {
    "sft": (["stage=sft"], ("loss", "grad_norm", "entropy", "mean_token_accuracy")),
    "reward": (["stage=reward"], ("loss", "grad_norm", "accuracy", "margin")),
    "dpo": (["stage=dpo"], ("loss", "grad_norm", "rewards/margins", "logps/chosen")),
    "orpo": (["stage=orpo"], ("loss", "grad_norm", "nll_loss", "log_odds_ratio")),
    "kto": (["stage=kto"], ("loss", "grad_norm", "rewards/margins", "logps/chosen")),
    "rloo": (["stage=rloo"], ("loss", "grad_norm", "reward", "objective/kl")),
    "grpo": (["stage=grpo"], ("loss", "grad_norm", "reward", "objective/kl")),
    "ppo_head": ([*PPO, "critic=head"], PPO_METRICS),
    "ppo_adapter": ([*PPO, "critic=adapter", "adapter=lora", "stage.args.learning_rate=2e-3"], PPO_METRICS),
    "ppo_model": ([*PPO, "critic=model"], PPO_METRICS),
}


def curve(name: str, runs_dir: str) -> dict[str, list[float]]:
    """Train the run `name` of `CURVES` and return its metrics, step by step."""
    overrides, metrics = CURVES[name]
    steps = STEPS * 2 * 2 if name.startswith("ppo") else STEPS
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose(
            "train", [f"runs_dir={runs_dir}", f"run_name={name}", f"stage.args.max_steps={steps}", *SMALL, *overrides]
        )
    instantiate(cfg.stage.run)(cfg)
    history = json.loads(Path(cfg.run_dir, METRICS_FILE).read_text())["history"][:STEPS]
    return {metric: [entry.get(metric) for entry in history] for metric in metrics}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        curves = {name: curve(name, folder) for name in CURVES}
    STORED.write_text(json.dumps(curves, indent=1) + "\n")
