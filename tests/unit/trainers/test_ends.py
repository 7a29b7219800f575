"""End tokens of a model whose turns end with another token than the tokenizer's EOS, as Gemma's do."""

import json

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GenerationConfig

from rlhf_trl.data.lengths import tokenize_comparisons
from rlhf_trl.data.tokenize import end_tokens, prompt_ids, row_ids
from rlhf_trl.evaluation.generation import Policy, sample, sample_in_turns
from rlhf_trl.models.merging import merge_adapter
from rlhf_trl.models.tokenizers import load_tokenizer
from rlhf_trl.reward_modeling.config import RewardConfig
from rlhf_trl.reward_modeling.trainer import RewardTrainer
from rlhf_trl.rewards.http import HttpReward
from rlhf_trl.rewards.model import ModelReward
from rlhf_trl.rewards.shaping import eos
from rlhf_trl.stages.generate import completions
from tests.helpers.chat_tokenizers import END, EOS, PAD, turn_tokenizer
from tests.helpers.rl import TRAINERS, rl_trainer
from tests.helpers.tiny import CHAT_TEMPLATE, save_model

CHATS = [[{"role": "user", "content": text}] for text in ("a b", "c", "d e f g", "h")]


def save_turn_model(path, declared=(EOS, END), seed=0) -> str:
    """`tests.helpers.tiny`'s Llama with that tokenizer; its generation_config lists `declared`."""
    save_model(path, seed=seed)
    tokenizer = turn_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(path)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    torch.nn.init.normal_(model.lm_head.weight, std=0.3, generator=torch.Generator().manual_seed(seed))
    model.generation_config = GenerationConfig(eos_token_id=list(declared), pad_token_id=PAD)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.mark.parametrize(
    ("template", "declared", "expected"),
    [
        (None, [EOS], [EOS]),
        (None, [EOS, 9], [EOS, 9]),
        ("<eos>", [EOS], [EOS]),
        ("<end>", [EOS], [EOS, END]),  # a base model with a chat template of another one
        ("<end>", [EOS, END], [EOS, END]),
        ("<end> <eos>", [EOS], [EOS]),  # as in Phi-3, whose generation_config lists `<|end|>` too
        ("<unk>", [EOS], [EOS]),
        ("", [9, EOS], [EOS, 9]),  # as in GLM, where the user's next turn ends the assistant's
    ],
)
def test_end_tokens(tmp_path, template, declared, expected):
    path = save_turn_model(tmp_path, declared)
    tokenizer = load_tokenizer(path)
    tokenizer.chat_template = None if template is None else CHAT_TEMPLATE.replace("<eos>", template)
    assert end_tokens(tokenizer) == expected


def test_ids_are_found_without_a_generation_config_and_below_an_adapter(tmp_path):
    from peft import LoraConfig, get_peft_model

    path = save_turn_model(tmp_path / "base", [EOS, 9])
    adapter = get_peft_model(
        AutoModelForCausalLM.from_pretrained(path), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    adapter.save_pretrained(tmp_path / "adapter")
    assert end_tokens(load_tokenizer(str(tmp_path / "adapter"))) == [EOS, 9, END]
    merge_adapter(str(tmp_path / "adapter"), str(tmp_path / "merged"))
    assert GenerationConfig.from_pretrained(tmp_path / "merged").eos_token_id == [EOS, 9, END]
    (tmp_path / "base" / "generation_config.json").unlink()
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"eos_token_id": [EOS, 8]}))
    assert end_tokens(load_tokenizer(path)) == [EOS, 8, END]


def test_a_row_ends_as_the_policy_ends_it(tmp_path):
    tokenizer = load_tokenizer(save_turn_model(tmp_path))
    answer = tokenizer.convert_tokens_to_ids(["i", "j"])
    start = prompt_ids(tokenizer, CHATS[0])
    chat = [{"role": "assistant", "content": "i j"}]
    assert row_ids(tokenizer, CHATS[0], chat) == start + answer + [END]
    assert row_ids(tokenizer, CHATS[0], chat, eos=False) == start + answer
    turns = [*chat, *CHATS[1], *chat]
    assert row_ids(tokenizer, CHATS[0], turns)[-3:] == [*answer, END]
    for text, ends in (("i j", [EOS]), ("i j <eos>", [EOS]), ("i j <end>", [END]), ("i j <end> <eos>", [END])):
        assert row_ids(tokenizer, "a b", text)[2:] == answer + ends
        assert row_ids(tokenizer, "a b", text, eos=False)[2:] == answer


@pytest.mark.parametrize("declared", [[EOS, END], [EOS]], ids=["listed", "of the template alone"])
def test_evaluation_samples_as_long_as_transformers_does_with_all_ends(tmp_path, declared):
    path = save_turn_model(tmp_path, declared)
    tokenizer, model = load_tokenizer(path), AutoModelForCausalLM.from_pretrained(path)
    prompts = [prompt_ids(tokenizer, chat) for chat in CHATS * 8]
    options = {"max_completion_length": 40, "temperature": 1.0, "batch_size": 32}
    for written in (sample(model, tokenizer, prompts, seed=3, **options),
                    sample_in_turns(model, tokenizer, prompts, seed=3, **options)):  # fmt: skip
        last = [ids[-1] for ids in written]
        assert last.count(END) > 3 and last.count(EOS) > 3
        assert all(not {EOS, END} & set(ids[:-1]) for ids in written)
        assert all(len(ids) == 40 for ids in written if ids[-1] not in (EOS, END))
    policy = Policy("own", path, model, tokenizer)
    rows = list(completions(policy, [{"prompt": CHATS[0]}] * 16, [], 1, 1.0, 40, 16, seed=3))
    assert {row["ended"] for row in rows if row["tokens"] < 40} == {True}


def test_rewards_know_how_a_completion_ended(tmp_path):
    tokenizer = load_tokenizer(save_turn_model(tmp_path))
    ids = [[7, EOS], [7, END], [7], []]
    assert eos(ids, tokenizer) == [1, 1, 0, 0]
    reward, sent = HttpReward("http://127.0.0.1:1"), []
    reward.bind(tokenizer)
    reward._post = sent.append
    reward._read = lambda answer, expected: ([0.0] * expected, {})
    reward(prompts=["a"] * 4, completions=["b"] * 4, completion_ids=ids)
    assert sent[0]["ended"] == [True, True, False, False]


def save_reward_model(tmp_path, policy: str) -> str:
    model = AutoModelForSequenceClassification.from_pretrained(policy, num_labels=1)
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(0))
    model.config.pad_token_id = PAD
    model.save_pretrained(tmp_path / "reward")
    load_tokenizer(policy).save_pretrained(tmp_path / "reward")
    return str(tmp_path / "reward")


def test_ppo_scores_what_it_samples_as_reward_trainer_scores_the_row(tmp_path):
    """From the sampled ids, over another tokenizer's text, and by RewardTrainer: one score, however the turn ended."""
    policy = save_turn_model(tmp_path / "policy")
    reward, seen = ModelReward(save_reward_model(tmp_path, policy)), {}

    def score(prompts, completions, completion_ids, **columns):
        seen.update(prompts=prompts, completions=completions, completion_ids=completion_ids)
        return reward(prompts, completions, completion_ids)

    trainer = rl_trainer(
        "ppo", policy, tmp_path / "out", data=Dataset.from_dict({"prompt": CHATS * 16}), reward_funcs=score,
        max_completion_length=24, per_device_train_batch_size=64, num_generations=1,
    )  # fmt: skip
    reward.bind(trainer._tokenizer)
    trainer.on_rollout(lambda rollout: seen.update(rewards=rollout.rewards.values[:, 0]))
    trainer.train()
    ended = [i for i, ids in enumerate(seen["completion_ids"]) if ids[-1] == END and not {0, 1, 2, 3, 4} & set(ids)]
    assert len(ended) > 2
    pairs = {key: [seen[f"{key}s"][i] for i in ended] for key in ("prompt", "completion")}
    dataset = Dataset.from_dict(
        {"prompt": pairs["prompt"], "chosen": pairs["completion"], "rejected": CHATS[:1] * len(ended)}
    )
    dataset = tokenize_comparisons(dataset, load_tokenizer(policy))
    args = RewardConfig(str(tmp_path / "rm"), use_cpu=True, bf16=False, report_to="none", remove_unused_columns=False)
    other = RewardTrainer(reward.model, args=args, train_dataset=dataset, processing_class=reward.tokenizer)
    batch = other.data_collator([dataset[i] for i in range(len(dataset))])
    with torch.no_grad():
        logits = other.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[::2, 0]
    assert seen["rewards"][ended].tolist() == pytest.approx(logits.tolist(), abs=1e-5)


@pytest.mark.parametrize("kind", TRAINERS)
def test_rollouts_stop_at_the_turn_end_of_the_template(tmp_path, train, kind):
    """`generation_config` lists EOS alone; a run writes the template's end into it, so that all that follows stops."""
    path = save_turn_model(tmp_path / "policy", [EOS])
    file = tmp_path / "chats.jsonl"
    chats = [[{"role": "user", "content": f"{a} {b}"}] for a in "abcdefgh" for b in "abcdefgh"]
    file.write_text("".join(json.dumps({"prompt": chat}) + "\n" for chat in chats))
    run = train(
        tmp_path, f"stage={kind}", "model=hf", f"model.path={path}", "data=files", f"data.paths={file}", "reward=eos",
        "data.eval_size=8", "stage.args.max_steps=1", "stage.args.max_completion_length=32", "kl=fixed",
        "stage.args.learning_rate=0", "stage.args.per_device_train_batch_size=8", "stage.args.steps_per_generation=4",
    )  # fmt: skip
    assert GenerationConfig.from_pretrained(run).eos_token_id == [EOS, END]


@pytest.mark.parametrize("kind", TRAINERS)
def test_rollouts_end_at_every_end(tmp_path, kind):
    """Those of the tokenizer, of the template, and what the arguments name; rewards are told the same."""
    path, told = save_turn_model(tmp_path / "policy", [EOS]), []

    def score(prompts, completions, completion_ids, **columns):
        told.extend(zip(completion_ids, eos(completion_ids, trainer._tokenizer), strict=True))
        return [0.0] * len(prompts)

    trainer = rl_trainer(
        kind, path, tmp_path / "out", data=Dataset.from_dict({"prompt": CHATS * 2}), reward_funcs=score,
        max_completion_length=24, generation_kwargs={"eos_token_id": 9},
    )  # fmt: skip
    trainer.train()
    assert trainer.eos_token_ids == [EOS, 9, END]
    assert all(not {EOS, 9, END} & set(ids[:-1]) for ids, _ in told)
    assert [ended for _, ended in told] == [float(ids[-1] in (EOS, 9, END)) for ids, _ in told]
    assert {ids[-1] for ids, _ in told} >= {EOS, 9, END}
