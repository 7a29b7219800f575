"""PPO of models that read images, or whatever else their processor makes."""

import copy

import pytest
import torch
from datasets import Dataset, Image, List
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

from rlhf_trl.data.images import take_images
from rlhf_trl.data.multimodal import processor_of
from rlhf_trl.data.tokenize import prompt_ids
from rlhf_trl.models.tokenizers import load_tokenizer
from rlhf_trl.ppo import PPOConfig, PPOTrainer
from tests.helpers.plain_ppo import moved, reference_ppo, same
from tests.helpers.ppo import score
from tests.helpers.vision import COLOURS, picture, save_vlm

SIZES = [(16, 16), (24, 16), (16, 32)]
SETTINGS = {
    "per_device_train_batch_size": 4,
    "steps_per_generation": 2,
    "num_iterations": 2,
    "num_train_epochs": 1,
    "learning_rate": 1e-2,
    "adam_epsilon": 1e-4,
    "lr_scheduler_type": "constant",
    "max_completion_length": 6,
    "report_to": "none",
    "bf16": False,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "disable_tqdm": True,
    "logging_steps": 1,
    "save_strategy": "no",
    "head_init": "normal",
    "vf_coef": 0.5,
    "beta": 0.1,
    "temperature": 0.7,
}


def questions(count: int) -> Dataset:
    """Return prompts with one or two pictures each, of several sizes and lengths."""
    colours, rows = list(COLOURS), []
    for i in range(count):
        text = ["what colour is it ?", "is it red ?", "is it a blue colour ?"][i % 3]
        images = [picture(colours[(i + j) % 3], SIZES[i % 3]) for j in range(1 + (i % 4 == 3))]
        rows.append({"prompt": [{"role": "user", "content": text}], "images": images})
    return Dataset.from_list(rows).cast_column("images", List(Image()))


def written(tokenizer, prompt, images) -> list[int]:
    """Return a completion that depends on the prompt and its pictures alone."""
    number = len(prompt[0]["content"]) + sum(images[0].getpixel((0, 0))) + 7 * len(images)
    words = ["red", "blue", "green", "a", "."][: 2 + number % 4]
    return tokenizer(" ".join(words))["input_ids"] + [tokenizer.eos_token_id] * (number % 3 > 0)


class Rollouts:
    """A `rollout_func` that answers each prompt the same way, and remembers what it was asked."""

    def __init__(self, tokenizer):
        self.tokenizer, self.calls = tokenizer, []

    def __call__(self, batch, trainer):
        asked = [take_images(prompt) for prompt in batch]
        self.calls.append(asked)
        ids = [written(self.tokenizer, *each) for each in asked]
        return {
            "prompt_ids": [list(prompt_ids(self.tokenizer, prompt, images=images)) for prompt, images in asked],
            "completion_ids": ids,
            "logprobs": [[0.0] * len(row) for row in ids],
        }


def read(tokenizer, asked):
    """Return the ids of a prompt and of its completion, and its other inputs, straight from the processor."""
    prompt, images = asked
    parts = [*({"type": "image"} for _ in images), {"type": "text", "text": prompt[0]["content"]}]
    processor = processor_of(tokenizer)
    text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    made = dict(processor(text=[text], images=[images], return_tensors="pt", add_special_tokens=False))
    completion = written(tokenizer, prompt, images)
    ids = made.pop("input_ids")[0].tolist()
    made.pop("attention_mask")
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in made:
            made[name] = torch.cat([made[name], torch.zeros(1, len(completion), dtype=torch.long)], dim=1)
    return ids, completion, made


def make_trainer(model, tmp_path, tokenizer, data, rollout_func=None, **options):
    return PPOTrainer(
        model,
        reward_funcs=lambda completions, **_: score([each[0]["content"] for each in completions]),
        args=PPOConfig(str(tmp_path / "run"), **(SETTINGS | options)),
        train_dataset=data,
        processing_class=processor_of(tokenizer),
        rollout_func=rollout_func,
    )


@pytest.mark.parametrize(
    ("architecture", "critic"),
    [("llava", "head"), ("llava", "model"), ("gemma3", "model"), ("idefics3", "head")],
)
def test_one_update_with_images_equals_plain_pytorch(tmp_path, architecture, critic):
    path = save_vlm(tmp_path / "model", architecture)
    tokenizer = load_tokenizer(path)
    rollouts = Rollouts(tokenizer)
    trainer = make_trainer(path, tmp_path, tokenizer, questions(16), rollouts, critic=critic)
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


def give_ear(model: LlavaForConditionalGeneration) -> list[int]:
    """Let a model add `sounds` to the embeddings of its tokens; return where the rows of each pass are noted."""
    model.__class__, heard, forward = Listening, [], model.model.forward
    model.model.ear = torch.nn.Linear(2, model.config.text_config.hidden_size)

    def hearing(input_ids=None, sounds=None, pixel_values=None, inputs_embeds=None, **inputs):
        assert len(sounds) == len(input_ids)
        heard.append(len(sounds))
        embedded = model.get_input_embeddings()(input_ids) + model.model.ear(sounds)[:, None]
        return forward(inputs_embeds=embedded, **inputs)

    model.model.forward = hearing
    return heard


def test_whatever_a_processor_makes_reaches_policy_critic_and_reference(tmp_path):
    path = save_vlm(tmp_path / "model")
    tokenizer = load_tokenizer(path)
    processor = processor_of(tokenizer)
    makes = type(processor).__call__

    class Hearing(type(processor)):
        def __call__(self, *args, **kwargs):
            made = makes(self, *args, **kwargs)
            count = len(made["input_ids"])
            made["sounds"] = torch.arange(2.0 * count).reshape(count, 2) / 10
            return made

    processor.__class__ = Hearing
    model = LlavaForConditionalGeneration.from_pretrained(path)
    heard = give_ear(model)
    trainer = make_trainer(model, tmp_path, tokenizer, questions(11).filter(lambda row: len(row["images"]) == 1))
    before = model.model.ear.weight.clone()
    trainer.train()
    assert sum(heard) > 3 * len(trainer.train_dataset)
    assert not torch.equal(before, model.model.ear.weight)
