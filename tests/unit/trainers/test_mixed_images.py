"""Rollouts of prompts of which some have images and some have none."""

import json

import pytest
import torch
from datasets import Dataset, DatasetDict, Image, List
from transformers import AutoModelForImageTextToText
from trl import GRPOConfig, RLOOConfig

from rlhf_trl.callbacks.samples import SAMPLES_FILE, SampleLog
from rlhf_trl.data.multimodal import processor_of, thumbnail
from rlhf_trl.models.tokenizers import load_tokenizer
from rlhf_trl.trainers import rollout_hook
from rlhf_trl.trainers.images import image_problems
from rlhf_trl.trainers.rollouts import GRPOTrainer, RLOOTrainer
from tests.helpers.vision import COLOURS, picture, save_vlm

# As many images as prompts, in the first half as well, so that neither number tells what pixels count
COUNTS = [2, 0, 1, 1, 0, 2, 1, 1]
WORDS = ["what colour is it ?", "is it red ?", "is it a blue colour ?", "it is green ."]


def mixed_prompts(counts: list[int]) -> Dataset:
    """Return different prompts with so many images each."""
    colours, rows = list(COLOURS), []
    for i, count in enumerate(counts):
        images = [picture(colours[(i + j) % 3]) for j in range(count)]
        rows.append({"prompt": [{"role": "user", "content": f"{'a ' * (i // 4)}{WORDS[i % 4]}"}], "images": images})
    return Dataset.from_list(rows).cast_column("images", List(Image()))


def read_alone(processor, row) -> dict[str, torch.Tensor]:
    """Return what a processor makes of one prompt."""
    parts = [*({"type": "image"} for _ in row["images"]), {"type": "text", "text": row["prompt"][0]["content"]}]
    text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    return dict(processor(text=[text], images=[row["images"]] if row["images"] else None, return_tensors="pt"))


@pytest.mark.parametrize(("kind", "architecture"), [("grpo", "llava"), ("grpo", "gemma3"), ("rloo", "idefics3")])
def test_each_row_is_scored_with_its_own_images(tmp_path, kind, architecture):
    """In the rollout, by policy and reference, and in the update, whose micro-batches are shuffled."""
    path, data = save_vlm(tmp_path / "model", architecture), mixed_prompts(COUNTS)
    processor = processor_of(load_tokenizer(path))
    trainer_class, config = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}[kind]
    heard = []

    class Heard(trainer_class):
        def _get_per_token_logps_and_entropies(self, model, ids, mask, *args, **kwargs):
            made = super()._get_per_token_logps_and_entropies(model, ids, mask, *args, **kwargs)
            heard.extend(zip(ids, mask, made[0].detach(), strict=True))
            return made

    args = config(
        str(tmp_path / "run"), per_device_train_batch_size=4, gradient_accumulation_steps=1, steps_per_generation=4,
        num_iterations=2, num_generations=2, max_completion_length=6, max_steps=4, learning_rate=0.0, beta=0.1,
        bf16=False, use_cpu=True, gradient_checkpointing=False, report_to="none", save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    trainer = Heard(path, lambda completions, **_: [float(len(x[0]["content"])) for x in completions], args,
                    train_dataset=data, processing_class=processor)  # fmt: skip
    trainer.train()

    model = AutoModelForImageTextToText.from_pretrained(path).eval()
    asked = {tuple(made["input_ids"][0].tolist()): made for made in (read_alone(processor, row) for row in data)}
    assert len(heard) == 2 * 16 + 16 and len(asked) == len(data)
    for ids, mask, logps in heard:
        row = ids[mask.bool()].tolist()
        inputs = dict(next(made for prompt, made in asked.items() if row[: len(prompt)] == list(prompt)))
        written = len(row) - inputs["input_ids"].size(1)
        inputs |= {"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row), dtype=torch.long)}
        for name in ("token_type_ids", "mm_token_type_ids"):
            if name in inputs:
                inputs[name] = torch.nn.functional.pad(inputs[name], (0, written))
        with torch.no_grad():
            alone = model(**inputs).logits[0, -written - 1 : -1].log_softmax(-1)
        alone = alone.gather(1, torch.tensor(row[-written:])[:, None])[:, 0]
        torch.testing.assert_close(logps[:written], alone, atol=1e-4, rtol=1e-4)


def test_only_the_images_of_logged_samples_become_thumbnails(tmp_path, monkeypatch):
    path, data = save_vlm(tmp_path / "model"), mixed_prompts(COUNTS)
    made = []
    monkeypatch.setattr(rollout_hook, "thumbnail", lambda image: made.append(image) or thumbnail(image))
    args = GRPOConfig(
        str(tmp_path / "run"), per_device_train_batch_size=8, per_device_eval_batch_size=4, num_generations=2,
        gradient_accumulation_steps=1, max_completion_length=2, max_steps=2, logging_steps=1, eval_strategy="steps",
        eval_steps=2, bf16=False, use_cpu=True, gradient_checkpointing=False, report_to="none", save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    trainer = GRPOTrainer(path, lambda completions, **_: [0.0] * len(completions), args, train_dataset=data,
                          eval_dataset=data.select(range(5)),
                          processing_class=processor_of(load_tokenizer(path)))  # fmt: skip
    trainer.add_callback(SampleLog(trainer, str(tmp_path), max_rows=3))
    trainer.train()
    rows = [json.loads(line) for line in (tmp_path / SAMPLES_FILE).read_text().splitlines()]
    images = {row["prompt"][0]["content"]: list(map(thumbnail, row["images"])) for row in data}
    assert [row["split"] for row in rows] == ["train"] * 6 + ["eval"] * 3
    for row in rows:
        assert row["images"] == images[max((said for said in images if row["prompt"].endswith(said)), key=len)]
    assert len(made) == sum(len(row["images"]) for row in rows) > 0


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "FSDP2"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "DeepSpeed ZeRO-3"),
    ],
)
def test_a_sharded_vision_tower_wants_an_image_in_each_row(monkeypatch, environment, name):
    mixed = DatasetDict(train=mixed_prompts(COUNTS))
    assert image_problems(GRPOTrainer, None, mixed) == []
    for key, value in {**environment, "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(key, value)
    (problem,) = image_problems(GRPOTrainer, None, mixed)
    assert problem.startswith(f"Row 2 of the split `train` has no image, and others have. {name} shards")
    whole = mixed_prompts([1, 2, 1])
    assert image_problems(GRPOTrainer, None, DatasetDict(train=whole, eval=mixed_prompts([0, 0]))) == []
    (problem,) = image_problems(GRPOTrainer, None, DatasetDict(train=whole, eval=mixed_prompts([1, 1, 0])))
    assert problem.startswith("Row 3 of the split `eval` has no image")
