"""Rewards from functions and reward models, and their errors."""

import math

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from rlhf_trl.data.lengths import tokenize_comparisons
from rlhf_trl.ppo.trainer import PPOTrainer
from rlhf_trl.reward_modeling.config import RewardConfig
from rlhf_trl.reward_modeling.trainer import RewardTrainer
from rlhf_trl.rewards.finite import FiniteReward
from rlhf_trl.rewards.function import FunctionReward
from rlhf_trl.rewards.model import ModelReward
from tests.helpers.ppo import logged, sampled
from tests.helpers.reward_models import ROWS, as_chat, save_reward_model
from tests.helpers.tiny import make_tokenizer, save_model


@pytest.mark.parametrize("pad_is_eos", [False, True], ids=["pad", "pad is eos"])
@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_reward_equals_the_score_of_reward_trainer(tmp_path, pad_is_eos, chat, lora):
    path = save_reward_model(tmp_path, pad_is_eos, lora)
    tokenizer = AutoTokenizer.from_pretrained(path)
    rows = as_chat(ROWS) if chat else ROWS
    dataset = tokenize_comparisons(Dataset.from_dict(rows), tokenizer, max_length=None)
    reward = ModelReward(path, batch_size=3)
    trainer = RewardTrainer(
        reward.model,
        args=RewardConfig(
            str(tmp_path / "out"), use_cpu=True, bf16=False, report_to="none", remove_unused_columns=False
        ),
        train_dataset=dataset,
        processing_class=tokenizer,
    )
    batch = trainer.data_collator([dataset[i] for i in range(4)])
    with torch.no_grad():
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logits = trainer.model(**inputs).logits[:, 0].tolist()

    reward.bind(make_tokenizer(pad_is_eos))
    for side, expected in (("chosen", logits[::2]), ("rejected", logits[1::2])):
        words = [c[0]["content"] if chat else c for c in rows[side]]
        ids = [tokenizer(w, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for w in words]
        scores = reward(prompts=rows["prompt"], completions=rows[side], completion_ids=ids)
        assert scores == pytest.approx(expected, abs=1e-5)
        if not pad_is_eos:  # a completion that was cut off has no EOS to be scored at
            cut = reward(prompts=rows["prompt"], completions=rows[side], completion_ids=[row[:-1] for row in ids])
            assert all(abs(a - b) > 1e-4 for a, b in zip(cut, scores, strict=True))


def test_other_tokenizer_scores_the_text_as_in_its_training(tmp_path):
    path = save_reward_model(tmp_path)
    reward = ModelReward(path)
    ids = [reward.tokenizer(c)["input_ids"] + [reward.tokenizer.eos_token_id] for c in ROWS["chosen"]]
    reward.bind(reward.tokenizer)
    same = reward(prompts=ROWS["prompt"], completions=ROWS["chosen"], completion_ids=ids)

    other = make_tokenizer()
    other.add_tokens(["zebra"])
    shifted = [[i + 1 for i in row[:-1]] + [other.eos_token_id] for row in ids]  # its ids mean something else
    reward.bind(other)
    assert reward(prompts=ROWS["prompt"], completions=ROWS["chosen"], completion_ids=shifted) == pytest.approx(same)
    cut = [row[:-1] for row in shifted]
    assert reward(prompts=ROWS["prompt"], completions=ROWS["chosen"], completion_ids=cut) != pytest.approx(same)


def test_ppo_accepts_the_path_of_a_reward_model(tmp_path):
    path = save_reward_model(tmp_path)
    trainer = sampled(save_model(tmp_path / "policy"), tmp_path, reward_funcs=[path])
    assert isinstance(trainer, PPOTrainer)
    trainer.train()
    assert math.isfinite(logged(trainer, "rewards/reward_model/mean")[0])


def test_functions_get_the_arguments_of_their_signature():
    def narrow(completions, scale):
        return [scale * len(c) for c in completions]

    reward = FunctionReward(narrow, kwargs={"scale": 2}, weight=3, name="length")
    assert reward(prompts=["a"], completions=["bcd"], completion_ids=[[1]], column=["x"]) == [6.0]
    assert (reward.__name__, reward.weight) == ("length", 3.0)

    async def slow(completions, **columns):
        return torch.ones(len(completions))

    assert FunctionReward(slow)(prompts=["a", "b"], completions=["c", "d"]) == [1.0, 1.0]
    assert FunctionReward("tests.helpers.ppo.count_of_a")(prompts=["a"], completions=["a b a"]) == [2.0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0], "returned 1 values for 2 completions"),
        (1.0, "returned float"),
        ({"a": 1}, "returned dict"),
        (["good", "bad"], "returned 'good' for completion 0"),
    ],
)
def test_wrong_return_values_are_named(values, message):
    def wrong(completions):
        return values

    with pytest.raises(ValueError, match=f"The reward function `wrong` {message}"):
        FunctionReward(wrong)(prompts=["a", "b"], completions=["c", "d"])


def test_finite_reward_raises_for_nan():
    reward = FiniteReward(FunctionReward(lambda completions: [1.0, math.nan], name="odd", weight=2))
    assert (reward.__name__, reward.weight) == ("odd", 2.0)
    with pytest.raises(ValueError, match="`odd` is nan for completion 1: 'd'"):
        reward(prompts=["a", "b"], completions=["c", "d"])
