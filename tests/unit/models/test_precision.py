"""Types of the weights: what is trained is in float32, what is frozen in bfloat16 where the device supports it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from rlhf_trl.models import precision
from rlhf_trl.models.loading import load_model, load_reward_model
from rlhf_trl.models.precision import LEAST_UPDATE, dtype_name, rounding_problem, weights_dtype
from tests.helpers.data import write_letter_pairs
from tests.helpers.tiny import save_model


@pytest.fixture
def with_bf16(monkeypatch):
    monkeypatch.setattr(precision, "is_torch_bf16_gpu_available", lambda: True)


@pytest.mark.parametrize(
    ("dtype", "is_trained", "bf16", "expected"),
    [
        (None, True, True, "float32"),
        (None, False, True, "bfloat16"),
        (None, True, False, "float32"),
        (None, False, False, "float32"),
        ("auto", False, True, "auto"),
        ("bfloat16", True, False, "bfloat16"),
    ],
)
def test_type_of_the_weights(dtype, is_trained, bf16, expected):
    assert weights_dtype(dtype, is_trained, bf16) == expected


def test_what_is_only_evaluated_follows_the_device(tmp_path, with_bf16, monkeypatch):
    path = save_model(tmp_path / "model")
    assert load_model(path).dtype == torch.bfloat16
    assert load_model(path, dtype="float32").dtype == torch.float32
    monkeypatch.undo()
    assert load_model(path).dtype == torch.float32


def test_the_score_head_of_a_bfloat16_reward_model_is_in_float32(tmp_path, with_bf16):
    path = save_model(tmp_path / "policy")
    classifier = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)
    classifier.save_pretrained(path := str(tmp_path / "scores"))
    model, exact = load_reward_model(path), load_reward_model(path, "float32")
    ids = torch.randint(3, 20, (8, 12))
    with torch.no_grad():
        scores, expected = model(input_ids=ids).logits, exact(input_ids=ids).logits
    assert model.dtype == torch.bfloat16 and scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, atol=0.1 * expected.abs().max().item(), rtol=0)
    assert not torch.equal(scores, scores.bfloat16().float())


@pytest.mark.parametrize(("dtype", "share"), [(torch.bfloat16, 0.002), (torch.float16, 0.0002)])
def test_16_bits_lose_updates_that_float32_keeps(dtype, share):
    """The shares of [`rlhf_trl.models.precision.LEAST_UPDATE`]: no update below is kept, some above are."""
    assert float(LEAST_UPDATE[dtype_name(dtype)].removesuffix(" %")) / 100 == share
    weights = torch.linspace(0.01, 0.02, 1000, dtype=torch.float64)
    for update, kept in ((0.97 * share, False), (1.4 * share, True)):
        rounded = weights.to(dtype)
        moved = (rounded.double() * (1 + update)).to(dtype) != rounded
        assert bool(moved.any()) == kept
        assert bool((weights.float() * (1 + update) != weights.float()).all())


@pytest.mark.parametrize(
    ("trained", "keeps_float32", "found"),
    [
        ("float32", False, None),
        ("bfloat16", True, None),
        ("bfloat16", False, "trained in bfloat16, which rounds away every update below 0.2 %"),
        ("bfloat16 and float32", False, "trained in bfloat16"),  # the score head of a reward model is in float32
        ("float16", False, "trained in float16, which rounds away every update below 0.02 %"),
    ],
)
def test_training_in_16_bits_is_warned_of(trained, keeps_float32, found):
    problem = rounding_problem(trained, keeps_float32)
    assert problem is None if found is None else found in str(problem)


# Of the weights that are trained and of those that are frozen
TYPES = {
    "stage=sft": ("float32", None),
    "stage=sft adapter=lora": ("float32", "bfloat16"),
    "stage=sft adapter=lora model.dtype=float32": ("float32", "float32"),
    "stage=sft adapter=qlora": ("float32", "4 bits and bfloat16"),
    "stage=dpo adapter=dora": ("float32", "bfloat16"),
    "stage=reward adapter=lora": ("float32", "bfloat16 and float32"),
    "stage=ppo adapter=lora critic=model": ("float32", "bfloat16"),
    "stage=ppo adapter=lora critic=adapter": ("float32", "bfloat16"),
}


@pytest.mark.parametrize("words", TYPES)
def test_trained_weights_are_in_float32_on_a_base_in_bfloat16(train, tmp_path, capsys, words):
    """A run in mixed precision, here on the CPU, says its types and learns."""
    path = save_model(tmp_path / "model", hidden_size=32)
    rows = write_letter_pairs(tmp_path / "pairs.jsonl")
    given = [
        "model=hf",
        f"model.path={path}",
        "data=files",
        f"data.paths={rows}",
        "stage.args.bf16=true",
        "+stage.args.use_cpu=true",
    ]
    few = [
        "stage.args.max_steps=2",
        "stage.args.logging_steps=1",
        "stage.args.eval_strategy=no",
        "stage.args.eval_on_start=false",
    ]
    few += ["data.max_eval_samples=8"]
    if "ppo" in words:
        few += [
            "stage.args.steps_per_generation=2",
            "stage.args.gradient_accumulation_steps=1",
            "stage.args.max_steps=8",
        ]
        few += ["stage.args.max_completion_length=8", "reward=function"]
        few += ["reward.function.function=tests.helpers.held_out.score"]
    run = Path(train(tmp_path, *given, *few, *words.split()))
    trained, frozen = TYPES[words]
    said = capsys.readouterr().out
    line = f"Precision: trained weights in {trained}" + (f", frozen ones in {frozen}" if frozen else "")
    assert f"{line}; mixed precision, computed in bfloat16." in said
    assert "rounds away" not in said
    assert ("Layers in 4 bits are computed in bfloat16." in said) == ("qlora" in words)
    losses = [entry["loss"] for entry in json.loads((run / "metrics.json").read_text())["history"] if "loss" in entry]
    assert losses and all(loss is not None for loss in losses)
    saved = load_file(run / ("adapter_model.safetensors" if frozen else "model.safetensors"))
    assert {weight.dtype for weight in saved.values()} == {torch.float32}
    assert all(weight.any() for name, weight in saved.items() if "lora_B" in name)  # which are 0 at the start
