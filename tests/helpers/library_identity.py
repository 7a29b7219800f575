"""
Compare the libraries before and after rlhf_trl is imported and has run: `library_identity.py FOLDER`.

Exits with an error if a function, class or method of a library is another object than before, or if plain trainers of
TRL give other numbers.
"""

import importlib
import json
import pkgutil
import sys
import types
from pathlib import Path

import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers.tiny import save_model

LIBRARIES = ("trl", "transformers", "peft", "accelerate", "datasets")
# Grow while a library runs: caches, registries and lazily imported names
CACHES = {"__abstractmethods__", "_abc_impl", "__subclasshook__", "__annotations__", "__annotate__"}


def members(holder: types.ModuleType | type) -> dict[str, object]:
    kinds = (types.FunctionType, classmethod, staticmethod, property, type)
    return {name: value for name, value in vars(holder).items() if isinstance(value, kinds) and name not in CACHES}


def snapshot() -> dict[str, dict[str, object]]:
    """Return the functions, classes and methods of the imported modules of the libraries, the objects themselves."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in LIBRARIES and type(module) is types.ModuleType:
            found[name] = members(module)
            for key, value in found[name].items():
                if isinstance(value, type) and value.__module__.partition(".")[0] in LIBRARIES:
                    found[f"{name}.{key}"] = members(value)
    return found


def changes(before: dict[str, dict[str, object]], after: dict[str, dict[str, object]]) -> list[str]:
    """Return the names that are other objects than before, and methods that a class didn't have."""
    found = []
    for holder, values in before.items():
        found += [f"{holder}.{name}" for name, value in values.items() if after[holder].get(name) is not value]
        if holder not in sys.modules:
            found += [f"{holder}.{name}" for name in after[holder].keys() - values.keys()]
    return found


def losses(path: str, out: str) -> list[float]:
    """Return the losses of plain trainers of TRL on a tiny model."""
    common = {"output_dir": out, "report_to": "none", "max_steps": 2, "logging_steps": 1, "save_strategy": "no"}
    common |= {"use_cpu": True, "bf16": False, "disable_tqdm": True, "per_device_train_batch_size": 4}
    rows = Dataset.from_dict({"prompt": ["a b", "c", "d e f", "g"], "completion": [" h", " i j", " k", " l m"]})
    tokenizer, found = AutoTokenizer.from_pretrained(path), []
    for trainer, config, options in (
        (trl.SFTTrainer, trl.SFTConfig, {}),
        (trl.GRPOTrainer, trl.GRPOConfig, {"num_generations": 2, "max_completion_length": 4, "beta": 0.1}),
    ):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(path)
        lora = LoraConfig(r=2, trainable_token_indices=[5, 6], task_type="CAUSAL_LM")
        extra = {"peft_config": lora} if trainer is trl.SFTTrainer else {}
        if trainer is trl.GRPOTrainer:
            extra["reward_funcs"] = lambda completions, **kwargs: [float(len(text)) for text in completions]
        made = trainer(
            model, args=config(**common, **options), train_dataset=rows, processing_class=tokenizer, **extra
        )
        made.train()
        found += [entry[key] for entry in made.state.log_history for key in ("loss", "grad_norm") if key in entry]
    return found


def run(path: str, folder: str) -> None:
    """Import all of rlhf_trl, read objects of any fields, and train PPO with a critic that is an adapter."""
    import rlhf_trl

    for module in pkgutil.walk_packages(rlhf_trl.__path__, "rlhf_trl."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate

    from rlhf_trl.data import load_files
    from rlhf_trl.runs.paths import conf_dir

    rows = [{"prompt": "a", "check": {"x": 55.290184}}, {"prompt": "b", "check": {"y": None}}]
    Path(folder, "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert list(load_files("prompt", 0, f"{folder}/rows.jsonl", eval_size=None)["train"]) == rows
    words = [
        f"runs_dir={folder}/runs",
        "stage=ppo",
        "model=hf",
        f"model.path={path}",
        "adapter=lora",
        "critic=adapter",
    ]
    words += ["data.max_samples=64", "data.max_eval_samples=4", "stage.args.max_steps=4", "reward=function"]
    words += ["reward.function.function=tests.helpers.held_out.score"]
    words += ["+adapter.peft.trainable_token_indices=[5,6]", "stage.args.max_completion_length=4"]
    words += ["stage.args.per_device_train_batch_size=8", "stage.args.steps_per_generation=2", "health=none"]
    words += ["stage.args.gradient_accumulation_steps=1"]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("train", words)
    instantiate(cfg.stage.run)(cfg)


def main() -> None:
    folder = sys.argv[1]
    path = save_model(f"{folder}/model")
    for name in ("sft_trainer", "dpo_trainer", "kto_trainer", "grpo_trainer", "rloo_trainer", "reward_trainer"):
        importlib.import_module(f"trl.trainer.{name}")
    before = losses(path, f"{folder}/before")
    libraries = snapshot()
    run(path, folder)
    changed = changes(libraries, snapshot())
    after = losses(path, f"{folder}/after")
    assert not changed, changed
    assert after == before, (before, after)


if __name__ == "__main__":
    main()
