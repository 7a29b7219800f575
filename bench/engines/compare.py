"""Comparison of what two runs left: the distance of their weights, a load by a plain library, names in their logs."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

CAUSAL, CLASSIFIER = "CAUSAL_LM", "SEQ_CLS"
PLAIN = {CAUSAL: AutoModelForCausalLM, CLASSIFIER: AutoModelForSequenceClassification}
PEFT = {CAUSAL: AutoPeftModelForCausalLM, CLASSIFIER: AutoPeftModelForSequenceClassification}


def models_in(run_dir: Path) -> list[Path]:
    """Return the folders of a run that hold its models: itself, or the members of an ensemble; and what was merged."""
    found = sorted(run_dir.glob("member_*")) or [run_dir]
    return found + [path for path in [run_dir / "merged"] if path.is_dir()]


def weights_of(run_dir: Path) -> dict[str, Tensor]:
    """Return all weights that a run has saved, policy's and critic's."""
    return {
        f"{folder.name if folder != run_dir else ''}/{file.stem}/{name}": weight.float()
        for folder in models_in(run_dir)
        for file in sorted(folder.glob("*.safetensors"))
        for name, weight in load_file(file).items()
    }


def difference(run_dir: Path, other: Path) -> float:
    """
    Return the largest difference of a weight of two runs; NaN if a weight of either is.

    Raises:
        AssertionError: if one of them lacks weights, but for tied ones that one of them has twice.
    """
    ours, theirs = weights_of(run_dir), weights_of(other)
    lacking = {name for name in ours.keys() ^ theirs.keys() if not name.endswith("lm_head.weight")}
    assert ours and not lacking, f"weights of one run only: {sorted(lacking)[:3]}"
    largest = [(ours[name] - theirs[name]).abs().max() for name in ours.keys() & theirs.keys()]
    return torch.stack(largest).max().item()  # Python's `max` would skip a NaN


def twice_tied(run_dir: Path) -> bool:
    """Return whether the files of a model with tied embeddings hold the output layer a second time."""
    names = [name.rpartition("/")[2] for name in weights_of(run_dir)]
    config = run_dir / "config.json"
    tied = config.is_file() and json.loads(config.read_text()).get("tie_word_embeddings", False)
    return bool(tied) and "lm_head.weight" in names


def load(run_dir: Path) -> None:
    """Load what a run has saved with plain transformers or PEFT, on one process, and compute with it."""
    for folder in models_in(run_dir):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        adapter = folder / "adapter_config.json"
        if adapter.is_file():
            kind = json.loads(adapter.read_text())["task_type"]
            more = {"num_labels": 1} if kind == CLASSIFIER else {}
            model = PEFT[kind].from_pretrained(folder, **more)
        else:
            architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
            kind = CLASSIFIER if "SequenceClassification" in architecture else CAUSAL
            model, found = PLAIN[kind].from_pretrained(folder, output_loading_info=True)
            wrong = {key: value for key, value in found.items() if value}
            assert not wrong, f"{folder}: {wrong}"
        with torch.no_grad():
            logits = model(**tokenizer("How do I bake bread?", return_tensors="pt")).logits
        assert logits.isfinite().all(), folder


def logged(run_dir: Path) -> set[str]:
    """Return the names of what a run has logged."""
    return {name for entry in json.loads((run_dir / "metrics.json").read_text())["history"] for name in entry}


def files(run_dir: Path) -> set[str]:
    """Return what a run directory holds, without the logs and folders of single ranks."""
    found = {path.name for path in run_dir.iterdir() if "rank_" not in path.name}
    return {name for name in found if not name.startswith("checkpoint-")}


def break_off(run_dir: Path) -> None:
    """Make of a finished run one that failed after its first checkpoint."""
    for folder in sorted(run_dir.glob("member_*"))[-1:] or [run_dir]:
        checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        shutil.rmtree(checkpoints[-1])
        for each in {run_dir, folder}:
            for path in (*each.glob("*.safetensors"), *each.glob("ensemble.json"), *each.glob("metrics.json")):
                path.unlink()
            record: dict[str, Any] = json.loads((each / "run.json").read_text())
            (each / "run.json").write_text(json.dumps(record | {"status": "failed"}))
