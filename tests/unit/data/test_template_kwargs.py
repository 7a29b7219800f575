"""A policy is prompted, and a reward model reads, with the chat template and arguments that each was trained with."""

import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Json
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_trl.data.chat_template import keep_template_kwargs
from rlhf_trl.data.lengths import tokenize_comparisons
from rlhf_trl.data.tokenize import prompt_ids, row_ids
from rlhf_trl.evaluation.generation import Policy
from rlhf_trl.evaluation.rewards import score
from rlhf_trl.models.tokenizers import load_tokenizer
from rlhf_trl.rewards.http import HttpReward
from rlhf_trl.rewards.model import ModelReward
from rlhf_trl.stages.generate import completions
from tests.helpers.reward_servers import serving
from tests.helpers.rl import TRAINERS, rl_trainer
from tests.helpers.tiny import CHAT_TEMPLATE, save_model

# As Qwen3's: the thought is in the prompt where thinking is off, and else in what the policy writes
THINKING = CHAT_TEMPLATE.replace(
    "<assistant> {% endif %}", "<assistant> {% if think is false %}p p {% endif %}{% endif %}"
)
OFF, ON = {"think": False}, {"think": True}
CHATS = [[{"role": "user", "content": text}] for text in ("a b", "c", "d e f g", "h")]
ANSWERS = [[{"role": "assistant", "content": text}] for text in ("i j k", "l", "m n", "o p a b c d")]


def save_reward_model(path, template=THINKING, **recorded) -> str:
    """Return a reward model on `tests.helpers.tiny`'s Llama, trained with `recorded` arguments of the template."""
    save_model(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = template
    tokenizer.init_kwargs |= recorded
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, pad_token_id=0)
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def policy_tokenizer(path, template=THINKING):
    tokenizer = load_tokenizer(save_model(path))
    tokenizer.chat_template = template
    return tokenizer


def written(tokenizer):
    """Return the ids that a policy generates for each of `ANSWERS`; the last one was truncated."""
    ids = [tokenizer(turn[0]["content"])["input_ids"] + [tokenizer.eos_token_id] for turn in ANSWERS]
    return [*ids[:-1], ids[-1][:-1]]


def expected(reward, **kwargs):
    """Return RewardTrainer's scores of the rows, whose ids `tokenize_comparisons` makes."""
    rows = [{"prompt": p, "chosen": a, "rejected": a, "chat_template_kwargs": kwargs}
            for p, a in zip(CHATS, ANSWERS, strict=True)]  # fmt: skip
    ids = [row[0] for row in tokenize_comparisons(Dataset.from_list(rows), reward.tokenizer)["completion_ids"]]
    return reward.score_ids([*ids[:-1], ids[-1][:-1]])


@pytest.mark.parametrize("trained", [{}, OFF])
def test_a_reward_model_reads_prompts_with_the_arguments_of_its_training(tmp_path, trained):
    reward = ModelReward(save_reward_model(tmp_path / "rm", chat_template_kwargs=trained))
    tokenizer = policy_tokenizer(tmp_path / "policy")
    rows = {"prompts": CHATS, "completions": ANSWERS, "completion_ids": written(tokenizer)}
    scores = {name: expected(reward, **kwargs) for name, kwargs in (("off", OFF), ("on", ON), ("own", trained))}
    assert scores["off"] != pytest.approx(scores["on"], abs=1e-3)
    with serving(reward) as url:
        over_http = HttpReward(url)
        for prompted in ({}, OFF, ON):
            for scored in (over_http, reward):  # the server binds the reward itself
                scored.bind(tokenizer)
                found = scored(**rows, chat_template_kwargs=[prompted] * 4)
                assert found == pytest.approx(scores["own"], abs=1e-6)


@pytest.mark.parametrize("over_http", [False, True], ids=["here", "http"])
def test_rows_of_several_kinds_in_training_are_read_each_as_it_is(tmp_path, over_http):
    reward = ModelReward(save_reward_model(tmp_path / "rm"))  # nothing is recorded
    tokenizer = policy_tokenizer(tmp_path / "policy")
    rows = {"prompts": CHATS, "completions": ANSWERS, "completion_ids": written(tokenizer)}
    with serving(reward) as url:
        scored = HttpReward(url) if over_http else reward
        scored.bind(tokenizer)
        found = scored(**rows, chat_template_kwargs=[OFF, {}, OFF, None])
    off, on = expected(reward, **OFF), expected(reward)
    assert found == pytest.approx([off[0], on[1], off[2], on[3]], abs=1e-6)


@pytest.mark.parametrize("over_http", [False, True], ids=["here", "http"])
def test_another_template_of_the_same_vocabulary_is_not_the_same_tokenizer(tmp_path, over_http):
    reward = ModelReward(save_reward_model(tmp_path / "rm"))
    tokenizer = policy_tokenizer(
        tmp_path / "policy", CHAT_TEMPLATE.replace("<user> ", "<user> k k ").replace("<eos>", "<assistant>")
    )
    ids = [[*ids[:-1], 4] for ids in written(tokenizer)]  # this policy ends its turns with `<assistant>`
    ids[-1] = ids[-1][:-1]
    with serving(reward) as url:
        scored = HttpReward(url) if over_http else reward
        scored.bind(tokenizer)
        found = scored(prompts=CHATS, completions=ANSWERS, completion_ids=ids)
    assert found == pytest.approx(expected(reward), abs=1e-6)


def test_a_run_records_what_its_rows_share_and_completes_them():
    def data(*kwargs):
        rows = [{"prompt": CHATS[0], "chat_template_kwargs": each} for each in kwargs]
        return DatasetDict(train=Dataset.from_list(rows), eval=Dataset.from_list(rows[:1]))

    from tests.helpers.tiny import make_tokenizer

    tokenizer = make_tokenizer()
    keep_template_kwargs(DatasetDict(train=Dataset.from_dict({"prompt": CHATS})), tokenizer)
    assert tokenizer.init_kwargs["chat_template_kwargs"] == {}
    keep_template_kwargs(data(OFF, OFF), tokenizer)
    assert tokenizer.init_kwargs["chat_template_kwargs"] == OFF
    # what the next run of this model says goes before it: the stage, then the row
    rows = keep_template_kwargs(data(None, ON), tokenizer, given={"depth": 2})
    assert rows["train"]["chat_template_kwargs"][:] == [OFF | {"depth": 2}, ON | {"depth": 2}]
    assert rows["eval"]["chat_template_kwargs"][:] == [OFF | {"depth": 2}]
    assert "chat_template_kwargs" not in tokenizer.init_kwargs
    text = DatasetDict(train=Dataset.from_dict({"prompt": ["a"]}))
    assert keep_template_kwargs(text, tokenizer, given={"depth": 2}) is text


def test_a_policy_is_prompted_as_in_its_training(tmp_path):
    """By the arguments that its tokenizer was saved with: prompts, and what the rewards are told of them."""
    tokenizer = policy_tokenizer(tmp_path / "policy")
    plain, off = prompt_ids(tokenizer, CHATS[0]), prompt_ids(tokenizer, CHATS[0], **OFF)
    assert off == plain + tokenizer("p p")["input_ids"]
    tokenizer.init_kwargs["chat_template_kwargs"] = OFF
    tokenizer.save_pretrained(tmp_path / "policy")
    tokenizer = load_tokenizer(str(tmp_path / "policy"))
    assert prompt_ids(tokenizer, CHATS[0]) == off and prompt_ids(tokenizer, CHATS[0], **ON) == plain
    assert row_ids(tokenizer, CHATS[0], ANSWERS[0])[: len(off)] == off
    seen = []

    def reward(prompts, completions, completion_ids, chat_template_kwargs):
        seen.append(chat_template_kwargs)
        return [0.0] * len(prompts)

    reward.bind, reward.__name__ = lambda tokenizer: None, "reward"
    score([reward], CHATS, ANSWERS, written(tokenizer), {}, tokenizer)
    assert seen == [[OFF] * 4]


def test_a_reward_run_records_the_arguments_of_its_rows(tmp_path, train):
    import json

    path = save_model(tmp_path / "policy")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = THINKING
    tokenizer.save_pretrained(path)
    file = tmp_path / "pairs.jsonl"
    answers = {"chosen": ANSWERS[0], "rejected": ANSWERS[1], "chat_template_kwargs": OFF}
    prompts = [[{"role": "user", "content": f"{a} {b}"}] for a in "abcdefgh" for b in "abcdefgh"]
    file.write_text("".join(json.dumps({"prompt": prompt} | answers) + "\n" for prompt in prompts))
    run = train(tmp_path, "stage=reward", "model=hf", f"model.path={path}", "data=files", f"data.paths={file}")
    assert AutoTokenizer.from_pretrained(run).init_kwargs["chat_template_kwargs"] == OFF


WITH_TOOLS = "{% for tool in tools or [] %}{{ tool['function']['name'] }} {% endfor %}" + THINKING
ROWS = [
    {"tools": None, "chat_template_kwargs": {}},
    {"tools": None, "chat_template_kwargs": OFF},
    {"tools": [{"type": "function", "function": {"name": "k"}}], "chat_template_kwargs": {}},
    {"tools": [{"type": "function", "function": {"name": "l"}}], "chat_template_kwargs": OFF},
]


@pytest.mark.parametrize("kind", TRAINERS)
def test_rollouts_and_rewards_read_a_rows_own_tools_and_arguments(tmp_path, kind):
    path, given, told = save_model(tmp_path / "policy"), [], {}
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = WITH_TOOLS
    tokenizer.save_pretrained(path)
    reward = ModelReward(save_reward_model(tmp_path / "rm", WITH_TOOLS))
    reward.bind(tokenizer)

    def score(prompts, completions, completion_ids, **columns):
        told.update(columns, prompts=prompts, ids=completion_ids)
        told["scores"] = reward(prompts, completions, completion_ids, **columns)
        return told["scores"]

    rows = [{"prompt": chat, **row, "number": i} for i, (chat, row) in enumerate(zip(CHATS, ROWS, strict=True))]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    features = Features({name: Json() for name in rows[0]})
    data = Dataset.from_dict(columns, features=features)
    trainer = rl_trainer(
        kind, path, tmp_path / "out", data=data, reward_funcs=score, chat_template_kwargs={"depth": 2}
    )
    single_turn = trainer._generate_single_turn
    trainer._generate_single_turn = lambda ids, *rest, **kw: given.extend(ids) or single_turn(ids, *rest, **kw)
    trainer.train()
    expected = []
    for number in told["number"]:
        kwargs = ROWS[number]["chat_template_kwargs"]
        names = [tool["function"]["name"] for tool in ROWS[number]["tools"] or []]
        text = " ".join([*names, "<user>", CHATS[number][0]["content"], "<assistant>", *(["p p"] if kwargs else [])])
        expected.append(tokenizer(text)["input_ids"])
    assert sorted(set(told["number"])) == [0, 1, 2, 3]
    assert given[: len(expected)] == expected
    rows = [prompt + ids for prompt, ids in zip(expected, told["ids"], strict=True)]
    assert told["scores"] == pytest.approx(reward.score_ids(rows), abs=1e-6)
    assert told["chat_template_kwargs"] == [{"depth": 2} | ROWS[i]["chat_template_kwargs"] for i in told["number"]]


def test_generate_reads_a_rows_own_tools_and_arguments(tmp_path):
    tokenizer = policy_tokenizer(tmp_path / "policy", WITH_TOOLS)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    policy, lengths = Policy("p", str(tmp_path / "policy"), model, tokenizer), []
    generate = model.generate
    model.generate = lambda **kw: lengths.extend(kw["attention_mask"].sum(1).tolist()) or generate(**kw)
    rows = [{"prompt": CHATS[0], **row} for row in ROWS]
    list(completions(policy, rows, [], n=1, temperature=1.0, max_completion_length=4, batch_size=4, seed=0))
    assert lengths == [4, 6, 5, 7]
