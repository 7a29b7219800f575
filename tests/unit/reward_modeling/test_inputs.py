"""Reward models that read more than token ids."""

import torch

from rlhf_trl.data.multimodal import processor_of
from rlhf_trl.data.tokenize import row_ids
from rlhf_trl.models.loading import load_full
from rlhf_trl.models.tokenizers import load_tokenizer
from rlhf_trl.reward_modeling import RewardConfig, RewardTrainer
from rlhf_trl.reward_modeling.collator import NOT_INPUTS
from rlhf_trl.rewards import ModelReward
from tests.helpers.ppo_images import questions
from tests.helpers.vision import give_ear, give_sounds, save_vlm


def test_whatever_a_processor_makes_reaches_a_reward_model(tmp_path):
    """In training and evaluation, and as the reward of another trainer, with the same scores."""
    path = save_vlm(tmp_path / "model")
    tokenizer = load_tokenizer(path)
    give_sounds(processor_of(tokenizer))
    model = load_full(path, "SEQ_CLS", heads=["score"])
    heard = give_ear(model)
    answers = [[{"role": "assistant", "content": text}] for text in ("red .", "a blue .")]
    data = questions(8)
    for name, value in {"completions": answers, "better": [0], "worse": [1]}.items():
        data = data.add_column(name, [value] * len(data))
    args = RewardConfig(
        str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, max_length=None,
        eval_strategy="steps", eval_steps=2, bf16=False, use_cpu=True, gradient_checkpointing=False, report_to="none",
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = RewardTrainer(model, args, data, processor_of(tokenizer), eval_dataset=data.select(range(4)))
    before = model.base_model.ear.weight.clone()
    trainer.train()
    # Both completions of each prompt, two steps of four prompts and one evaluation of four
    assert sum(heard) >= 2 * (2 * 4 + 4) and not torch.equal(before, model.base_model.ear.weight)

    reward = ModelReward(model)
    reward.tokenizer = tokenizer  # whose processor hears
    rows = [row_ids(tokenizer, row["prompt"], answer, images=row["images"]) for row in data for answer in answers]
    scores = torch.tensor(reward.score_ids(rows))
    batch = trainer.data_collator(list(trainer.train_dataset))
    with torch.no_grad():
        trained = model(**{name: value for name, value in batch.items() if name not in NOT_INPUTS}).logits[:, 0]
    torch.testing.assert_close(scores, trained, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        model.base_model.ear.weight.zero_()
    assert (torch.tensor(reward.score_ids(rows)) - scores).abs().min() > 1e-4
