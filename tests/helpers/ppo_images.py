"""PPO of tiny models that read images: prompts, rollouts that are the same each time, and trainers."""

from datasets import Dataset, Image, List

from rlhf_trl.data.images import take_images
from rlhf_trl.data.multimodal import processor_of
from rlhf_trl.data.tokenize import prompt_ids
from rlhf_trl.ppo import PPOConfig, PPOTrainer
from tests.helpers.ppo import score
from tests.helpers.vision import COLOURS, picture

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


def questions(count: int, mixed: bool = False) -> Dataset:
    """Return prompts with one or two pictures each, of several sizes and lengths; if `mixed`, a third has none."""
    colours, rows = list(COLOURS), []
    for i in range(count):
        text = ["what colour is it ?", "is it red ?", "is it a blue colour ?"][i % 3]
        images = [picture(colours[(i + j) % 3], SIZES[i % 3]) for j in range(1 + (i % 4 == 3))]
        images = [] if mixed and i % 3 == 1 else images
        rows.append({"prompt": [{"role": "user", "content": text}], "images": images})
    return Dataset.from_list(rows).cast_column("images", List(Image()))


def written(tokenizer, prompt, images) -> list[int]:
    """Return a completion that depends on the prompt and its pictures alone."""
    shown = sum(sum(image.getpixel((0, 0))) for image in images[:1])
    number = len(prompt[0]["content"]) + shown + 7 * len(images)
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


def make_trainer(model, tmp_path, tokenizer, data, rollout_func=None, eval_dataset=None, **options):
    return PPOTrainer(
        model,
        reward_funcs=lambda completions, **_: score([each[0]["content"] for each in completions]),
        args=PPOConfig(str(tmp_path / "run"), **(SETTINGS | options)),
        train_dataset=data,
        eval_dataset=eval_dataset,
        processing_class=processor_of(tokenizer),
        rollout_func=rollout_func,
    )
