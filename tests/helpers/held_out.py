"""
The figures that an evaluation of each stage gives, for tests of what they may not depend on. As a program:
`held_out.py MODEL FOLDER BATCH_SIZE` writes them to `FOLDER/figures.json`.
"""

import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from rlhf_trl.build import load_data, make_trainer, training_arguments
from rlhf_trl.models.tokenizers import load_tokenizer
from rlhf_trl.runs.paths import conf_dir
from tests.helpers.tiny import WORDS

ROWS = 11
SEED = 2  # by which the mean log-ratio in KTO's loss is above 0
STAGES = ("sft", "dpo", "kto", "orpo", "ppo", "grpo", "rloo", "reward", "regression")


def text(generator, least: int, most: int) -> str:
    length = int(torch.randint(least, most + 1, (1,), generator=generator))
    return " ".join(WORDS[int(i)] for i in torch.randint(0, len(WORDS), (length,), generator=generator))


def score(completions, **kwargs):
    """None where it doesn't apply, and of unlike size."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [None if "b" in words.split() else float(len(words.split()) ** 2) for words in texts]


def rows_of(stage: str, seed: int) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    prompts = [f"{text(generator, 1, 3)} {WORDS[i]}" for i in range(ROWS)]
    answers = [[text(generator, 1, 9) for _ in range(2 + i % 3)] for i in range(ROWS)]
    made = []
    for i, (prompt, each) in enumerate(zip(prompts, answers, strict=True)):
        if stage == "sft":
            made.append({"prompt": prompt, "completion": " " + each[0]})
        elif stage == "kto":
            made.append({"prompt": prompt, "completion": " " + each[0], "label": i % 3 > 0})
        elif stage in ("dpo", "orpo"):
            made.append({"prompt": prompt, "chosen": " " + each[0], "rejected": " " + each[1]})
        elif stage in ("reward", "regression"):
            row = {"prompt": prompt, "completions": [" " + one for one in each]}
            if stage == "reward":  # one prompt has ties alone
                better = [] if i == 4 else [0] * (len(each) - 1)
                row |= {"better": better, "worse": list(range(1, len(better) + 1))}
            else:
                targets = [{"score": None if i == 3 and j else float(len(one))} for j, one in enumerate(each)]
                row |= {"better": [], "worse": [], "targets": targets}
            made.append(row)
        else:
            made.append({"prompt": prompt})
    return made


def deterministic(prompt_ids, *args):
    """Completions by the prompt alone."""
    made = []
    for ids in prompt_ids:
        generator = torch.Generator().manual_seed(sum(ids))
        length = int(torch.randint(1, 6, (1,), generator=generator))
        made.append(torch.randint(5, 12, (length,), generator=generator).tolist() + [1] * (length < 5))
    return made


def trainer_of(stage: str, model: str, folder: Path, batch_size: int, *words: str):
    folder.mkdir(parents=True, exist_ok=True)
    name = "reward" if stage == "regression" else stage
    files = {}
    for split, seed in (("train", 0), ("eval", 1)):
        files[split] = folder / f"{stage}-{split}.jsonl"
        files[split].write_text("".join(json.dumps(row) + "\n" for row in rows_of(stage, seed)))
    words = [f"stage={name}", "model=hf", f"model.path={model}", "data=files", f"data.paths={files['train']}",
             "data.to_chat=false", f"data.eval_paths={files['eval']}", f"runs_dir={folder}",
             "stage.args.per_device_train_batch_size=4",
             f"stage.args.per_device_eval_batch_size={batch_size}", *words]  # fmt: skip
    rl = name in ("ppo", "grpo", "rloo")
    if rl:
        words += ["reward=function", "reward.function.function=tests.helpers.held_out.score", "health=none"]
        words += ["stage.args.max_completion_length=5"]
        words += ["stage.args.num_generations=2"] if name != "ppo" else []
        words += ["stage.args.steps_per_generation=1", "stage.args.gradient_accumulation_steps=1"]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("train", words)
    tokenizer = load_tokenizer(model, None, None)
    if name == "reward":  # rows with what their feedback would give
        datasets = {}
        for split, file in files.items():
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            datasets[split] = Dataset.from_list(rows)
        dataset = instantiate(cfg.stage.prepare)(datasets, tokenizer)
    else:
        dataset = load_data(cfg, tokenizer)
    args = training_arguments(cfg.stage.args)
    trainer = make_trainer(cfg, args, model, tokenizer, dataset)
    if rl:
        ids = deterministic
        trainer._generate_single_turn = ids if name == "rloo" else lambda *args: (ids(*args), None)
    return trainer


def figures(stage: str, model: str, folder: Path, batch_size: int) -> dict[str, float]:
    trainer = trainer_of(stage, model, folder, batch_size)
    generator = torch.Generator().manual_seed(SEED)
    for parameter in trainer.model.parameters():  # away from its reference
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    found = trainer.evaluate()
    found |= {key: value for entry in trainer.state.log_history for key, value in entry.items()}
    if stage in ("reward", "regression"):
        found |= {f"calibration_{key}": value for key, value in trainer.calibrate().to_json().items() if key != "on"}
    skipped = ("runtime", "per_second", "preparation_time", "epoch", "step")
    return {key: value for key, value in found.items() if not key.endswith(skipped)}


if __name__ == "__main__":
    model, out, size = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    found = {stage: figures(stage, model, out, size) for stage in sys.argv[4:] or STAGES}
    Path(out, f"figures_{PartialState().process_index}.json").write_text(json.dumps(found))
