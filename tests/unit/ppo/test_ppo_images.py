"""PPO of models that read images, or whatever else their processor makes."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

from rlhf_trl.data.multimodal import processor_of
from rlhf_trl.models.loading import load_model
from rlhf_trl.models.tokenizers import load_tokenizer
from rlhf_trl.ppo.critic import read_critic
from tests.helpers.plain_ppo import moved, reference_ppo, same
from tests.helpers.ppo_images import Rollouts, make_trainer, questions, written
from tests.helpers.vision import give_ear, give_sounds, save_vlm


def read(tokenizer, asked):
    """Return the ids of a prompt and of its completion, and its other inputs, straight from the processor."""
    prompt, images = asked
    parts = [*({"type": "image"} for _ in images), {"type": "text", "text": prompt[0]["content"]}]
    processor = processor_of(tokenizer)
    text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    made = dict(
        processor(text=[text], images=[images] if images else None, return_tensors="pt", add_special_tokens=False)
    )
    completion = written(tokenizer, prompt, images)
    ids = made.pop("input_ids")[0].tolist()
    made.pop("attention_mask")
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in made:
            made[name] = torch.cat([made[name], torch.zeros(1, len(completion), dtype=torch.long)], dim=1)
    return ids, completion, made


@pytest.mark.parametrize(
    ("architecture", "critic", "mixed"),
    [
        ("llava", "head", False),
        ("llava", "model", True),
        ("gemma3", "model", False),
        ("idefics3", "head", False),
        ("idefics3", "model", True),
    ],
)
def test_one_update_with_images_equals_plain_pytorch(tmp_path, architecture, critic, mixed):
    path = save_vlm(tmp_path / "model", architecture)
    tokenizer = load_tokenizer(path)
    rollouts = Rollouts(tokenizer)
    trainer = make_trainer(path, tmp_path, tokenizer, questions(16, mixed), rollouts, critic=critic)
    start = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    head = copy.deepcopy(trainer.model.value_head)
    trainer.train()
    assert len(rollouts.calls) == 2

    policy, reference, network = (AutoModelForImageTextToText.from_pretrained(path) for _ in range(3))
    network = network if critic == "model" else policy
    reference_ppo(policy, reference, network, head, rollouts.calls, trainer.args, tokenizer, read=read)
    actual = trainer.model.state_dict()
    same(actual, policy.state_dict())
    same(actual, {f"value_head.{name}": value for name, value in head.state_dict().items()})
    if critic == "model":
        same(actual, {f"critic.{name}": value for name, value in network.model.state_dict().items()})
    assert moved(start, policy.state_dict())
    vision = [name for name in actual if name.startswith(("model.vision", "model.connector", "model.multi"))]
    assert moved({name: start[name] for name in vision}, {name: actual[name] for name in vision})


class Listening(LlavaForConditionalGeneration):
    """A model with an input that no library knows: `sounds`, of shape (rows, 2)."""

    # By these names `generate` checks what it is given
    def forward(self, input_ids=None, attention_mask=None, pixel_values=None, sounds=None, **kwargs):
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "pixel_values": pixel_values}
        return super().forward(**given, **kwargs, **({} if sounds is None else {"sounds": sounds}))

    def prepare_inputs_for_generation(self, *args, sounds=None, **kwargs):
        made = super().prepare_inputs_for_generation(*args, **kwargs)
        return made | ({} if sounds is None else {"sounds": sounds})


def test_whatever_a_processor_makes_reaches_policy_critic_and_reference(tmp_path):
    path = save_vlm(tmp_path / "model")
    tokenizer = load_tokenizer(path)
    give_sounds(processor_of(tokenizer))
    model = LlavaForConditionalGeneration.from_pretrained(path)
    model.__class__ = Listening
    heard = give_ear(model)
    trainer = make_trainer(model, tmp_path, tokenizer, questions(11).filter(lambda row: len(row["images"]) == 1))
    before = model.model.ear.weight.clone()
    trainer.train()
    assert sum(heard) > 3 * len(trainer.train_dataset)
    assert not torch.equal(before, model.model.ear.weight)


def saved_run(path, out, resume=None):
    tokenizer = load_tokenizer(path)
    trainer = make_trainer(path, out, tokenizer, questions(24), save_strategy="steps", save_steps=1, critic="model")
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.slow
def test_a_run_with_images_resumes_exactly(tmp_path):
    path = save_vlm(tmp_path / "model")
    whole = saved_run(path, tmp_path / "whole")
    first = tmp_path / "whole" / "run" / f"checkpoint-{whole.args.steps_per_rollout}"
    again = saved_run(path, tmp_path / "again", resume=str(first))
    assert whole.state.global_step == again.state.global_step == 3 * whole.args.steps_per_rollout
    resumed = again.model.state_dict()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed[name], value), name


def test_the_best_checkpoint_is_loaded_where_weights_are_renamed_on_save(tmp_path, monkeypatch):
    """The critic's as well."""
    path = save_vlm(tmp_path / "model")
    tokenizer = load_tokenizer(path)
    options = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_found", "critic": "model"}
    trainer = make_trainer(path, tmp_path, tokenizer, questions(24), eval_dataset=questions(2), **options)
    second = 2 * trainer.args.steps_per_rollout
    monkeypatch.setattr(trainer, "evaluate", lambda **kwargs: {"eval_found": trainer.state.global_step == second})
    trainer.train()
    best = f"{trainer.args.output_dir}/checkpoint-{second}"
    assert trainer.state.best_model_checkpoint == best and trainer.state.global_step > second
    actual, policy = trainer.model.state_dict(), load_model(best).state_dict()
    assert not load_file(f"{best}/model.safetensors").keys() <= actual.keys()
    same(actual, policy)
    critic = read_critic(trainer.model, best, "model")
    assert len(critic) > 10
    for name, value in critic.items():
        assert torch.equal(actual[name], value), name
