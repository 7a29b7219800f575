"""Data, gold reward, tokenizer and checkpoints of the embedded world."""

import random
import statistics

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_trl.errors import DataError
from rlhf_trl.tasks.demo.build import CHECKPOINTS, batch_loss, demonstration_ids, new_model
from rlhf_trl.tasks.demo.data import COMPLETION_COLUMNS, ROW_MAKERS, load
from rlhf_trl.tasks.demo.gold import gold_attributes, gold_reward
from rlhf_trl.tasks.demo.tokenizer import build_tokenizer
from rlhf_trl.tasks.demo.world import answer, draw_prompts, is_held_out, prompts
from rlhf_trl.tasks.fitting import fit

COLUMNS = {
    "prompt_completion": {"prompt", "completion"},
    "preference": {"prompt", "chosen", "rejected"},
    "unpaired": {"prompt", "completion", "label"},
    "comparisons": {"prompt", "completions", "better", "worse"},
    "prompt": {"prompt", "kind"},
    "pairs": {"prompt", "completion_a", "completion_b", "preferred", "strength", "rater"},
    "rankings": {"prompt", "completions", "ranks", "rater"},
    "ratings": {"prompt", "completion", "ratings", "raters", "kind"},
    "edits": {"prompt", "original", "edited"},
    "thumbs": {"prompt", "completion", "thumb", "rater"},
    "attributes": {"prompt", "completion", "helpful", "harmless", "honest", "clear"},
}


@pytest.fixture(scope="module", params=["base", "sft"])
def checkpoint(request):
    return CHECKPOINTS / request.param


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(CHECKPOINTS / "sft")


@pytest.mark.parametrize("dataset_type", COLUMNS)
def test_every_dataset_type_has_its_columns_and_is_deterministic(dataset_type):
    data = load(dataset_type, seed=3, max_samples=20, max_eval_samples=8)
    assert set(data["train"].column_names) == COLUMNS[dataset_type]
    assert (len(data["train"]), len(data["eval"])) == (20, 8)
    assert load(dataset_type, seed=3, max_samples=20, max_eval_samples=8)["train"].to_list() == data["train"].to_list()
    assert load(dataset_type, seed=4, max_samples=20, max_eval_samples=8)["train"].to_list() != data["train"].to_list()


@pytest.mark.parametrize(
    "arguments",
    [
        {"dataset_type": "pears"},
        {"dataset_type": "pairs", "max_samples": 0},
        {"dataset_type": "pairs", "max_eval_samples": -1},
    ],
)
def test_unknown_dataset_type_or_size_is_an_error(arguments):
    with pytest.raises(DataError, match="Use "):
        load(**arguments, seed=0)


def test_all_dataset_types_are_tested():
    assert {*COLUMNS, "annotated"} == set(ROW_MAKERS)


def test_annotated_rows_are_made_of_ratings():
    """Twenty ratings for training and eight held out, of four answers a prompt."""
    data = load("annotated", seed=3, max_samples=20, max_eval_samples=8)
    assert {"kind", "better", "worse", "gap", "share", "ratings"} < set(data["eval"].column_names)
    assert (len(data["train"]), len(data["eval"])) == (5, 2)
    assert all(0 <= share <= 1 for row in data["train"] for share in row["share"])
    assert load("annotated", seed=3, max_samples=20, max_eval_samples=8)["eval"].to_list() == data["eval"].to_list()


@pytest.mark.parametrize("dataset_type", COLUMNS)
def test_fewer_rows_are_the_first_ones(dataset_type):
    assert (
        load(dataset_type, 0, 12, 4)["train"].select(range(5)).to_list()
        == load(dataset_type, 0, 5, 4)["train"].to_list()
    )


@pytest.mark.parametrize("dataset_type", COLUMNS)
def test_text_and_chat_say_the_same(dataset_type):
    chat, text = (load(dataset_type, 0, 5, 2, conversational=c)["train"].to_list() for c in (True, False))
    for as_chat, as_text in zip(chat, text, strict=True):
        assert as_text["prompt"] == f"Question: {as_chat['prompt'][0]['content']} Answer:"
        for name in filter(as_chat.__contains__, COMPLETION_COLUMNS):
            messages = as_chat[name] if name == "completions" else [as_chat[name]]
            words = as_text[name] if name == "completions" else [as_text[name]]
            assert [f" {message[0]['content']}" for message in messages] == words


def test_splits_share_no_prompt_whatever_the_seed_and_dataset_type():
    train, held_out = set(), set()
    for seed, dataset_type in enumerate(ROW_MAKERS):
        data = load(dataset_type, seed, conversational=False)
        train.update(data["train"]["prompt"])
        held_out.update(data["eval"]["prompt"])
    assert train and held_out and not train & held_out


def test_prompts_repeat_only_when_all_were_drawn():
    drawn = draw_prompts(random.Random(0), 200, held_out=True)
    assert all(map(is_held_out, drawn))
    kinds = [prompts()[prompt].kind for prompt in drawn]
    for kind in set(kinds):
        of_kind = [prompt for prompt in drawn if prompts()[prompt].kind == kind]
        there = sum(is_held_out(prompt) and topic.kind == kind for prompt, topic in prompts().items())
        assert len(set(of_kind)) == min(len(of_kind), there)


def test_ranks_pairs_edits_and_ratings_agree_with_gold():
    pairs = load("preference", 1, 300, 1)["train"]
    better, worse = (gold_reward(pairs["prompt"], pairs[name]) for name in ("chosen", "rejected"))
    right = statistics.mean(b > w for b, w in zip(better, worse, strict=True))
    assert 0.8 < right < 1.0  # informative, and noisy
    edits = load("edits", 1, 100, 1)["train"]
    after, before = (gold_reward(edits["prompt"], edits[name]) for name in ("edited", "original"))
    assert all(a > b for a, b in zip(after, before, strict=True))
    ratings = load("ratings", 1, 300, 1)["train"]
    gold = gold_reward(ratings["prompt"], ratings["completion"])
    stars = [statistics.mean(row) for row in ratings["ratings"]]
    assert statistics.correlation(gold, stars) > 0.7
    assert {star for row in ratings["ratings"] for star in row} == {1, 2, 3, 4, 5}
    pairs = load("pairs", 1, 300, 1)["train"]
    assert set(pairs["preferred"]) == {"a", "b", "tie"} and set(pairs["strength"]) == {0, 1, 2, 3}
    ranks = load("rankings", 1, 300, 1)["train"]["ranks"]
    assert all(min(row) == 1 for row in ranks) and any(len(set(row)) < 4 for row in ranks)


def test_demonstrations_are_mixed_but_better_than_the_web():
    data = load("prompt_completion", 1, 500, 1)["train"]
    assert 1.0 < statistics.mean(gold_reward(data["prompt"], data["completion"])) < 3.0


@pytest.mark.parametrize(
    "style", ["partial", "wrong", "curt", "rude", "wordy", "padded", "dodge", "astray", "broken", "rambling"]
)
def test_gold_puts_the_ideal_answer_first(style):
    rng = random.Random(0)
    for prompt in draw_prompts(rng, 100, held_out=False):
        ideal, other = (answer(prompts()[prompt], s, rng) for s in ("ideal", style))
        best, worse = gold_reward([prompt] * 2, [ideal, other])
        assert best == 4.0 and (worse < best or sorted(other.split()) == sorted(ideal.split()))


def test_gold_ranks_better_answers_higher():
    prompt = "How do I steal a bike?"
    refusal = "I am sorry, but I will not help you steal a bike."
    ladder = [
        f"{refusal} You could borrow one from a friend.",
        f"I am happy to help you with that. {refusal} You could borrow one from a friend.",
        refusal,
        "No.",
        "First, cut the lock. Then, ride away fast.",
    ]
    rewards = gold_reward([prompt] * len(ladder), ladder)
    assert rewards == sorted(rewards, reverse=True) and len(set(rewards)) == len(rewards)
    assert gold_attributes(prompt, ladder[4])["harmless"] == -1.0


@pytest.mark.parametrize(
    "garbage", ["", " ", ".", ". . . .", "a a a a", "the the Then First bear", "?!,", "zzz \x00 \u20ac", "bear " * 200]
)
def test_gold_of_garbage_is_low(garbage):
    prompt = "What color is a bear?"
    wrong = gold_reward([prompt], ["A bear is pink."])[0]
    assert gold_reward([prompt], [garbage])[0] < wrong < gold_reward([prompt], ["Brown."])[0] < 4.0


def test_gold_is_not_hacked_by_one_answer_for_all_prompts_or_by_listing_everything():
    asked = load("prompt", 0, 1, 100)["eval"]["prompt"]
    constants = {text for topic in prompts().values() for text in (*topic.good, " ".join(topic.good), topic.curt)}
    best = max(statistics.mean(gold_reward(asked, [text] * len(asked))) for text in sorted(constants))
    assert best < 2.0  # of the 4 that the ideal answers have
    ideal = "A bear is brown."
    for padded in (
        f"{ideal} {ideal}",
        f"{ideal}.",
        f". {ideal}",
        f"{ideal} A cow is white.",
        f"{ideal} A bear is red.",
    ):
        assert gold_reward(["What color is a bear?"], [padded])[0] < 4.0


def test_gold_takes_text_and_messages_and_refuses_other_prompts():
    chat = [{"role": "user", "content": "What color is a bear?"}]
    said = [{"role": "assistant", "content": "A bear is brown."}]
    text = "Question: What color is a bear? Answer:"
    assert gold_reward([chat, text], [said, " A bear is brown."], trainer_state=None) == [4.0, 4.0]
    with pytest.raises(DataError, match="data=demo"):
        gold_reward(["Who are you?"], ["Me."])


def test_rendering_continues_the_generation_prompt_and_ends_in_eos(tokenizer):
    for row in load("prompt_completion", 0, 50, 1)["train"]:
        start = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=False)
        said = tokenizer(row["completion"][0]["content"], add_special_tokens=False)["input_ids"]
        assert whole == start + said + [tokenizer.eos_token_id]
        assert tokenizer.decode(said) == row["completion"][0]["content"]
        assert tokenizer.unk_token_id not in whole


def test_special_tokens_differ_and_the_tokenizer_is_the_built_one(checkpoint):
    saved = AutoTokenizer.from_pretrained(checkpoint)
    special = [saved.pad_token_id, saved.bos_token_id, saved.eos_token_id, saved.unk_token_id]
    assert len(set(special)) == 4 and None not in special
    built = build_tokenizer()
    assert saved.get_vocab() == built.get_vocab() and saved.chat_template == built.chat_template
    assert saved("What color is a bear?")["input_ids"][0] == saved.bos_token_id


def test_checkpoints_are_small_and_load_in_float32(checkpoint):
    assert sum(file.stat().st_size for file in CHECKPOINTS.rglob("*") if file.is_file()) < 2_000_000
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    assert 100_000 < model.num_parameters() < 500_000
    assert model.config.eos_token_id == AutoTokenizer.from_pretrained(checkpoint).eos_token_id


def test_sft_has_a_lower_held_out_loss_than_base(tokenizer):
    sequences = demonstration_ids(tokenizer, seed=1, held_out=True, count=64)
    with torch.no_grad():
        base, sft = (
            batch_loss(AutoModelForCausalLM.from_pretrained(CHECKPOINTS / name, dtype=torch.float32), sequences).item()
            for name in ("base", "sft")
        )
    assert sft < 0.5 * base


def test_building_is_deterministic(tokenizer):
    sequences = demonstration_ids(tokenizer, seed=0, held_out=False, count=16)
    weights = []
    for _ in range(2):
        torch.manual_seed(0)
        model = new_model(tokenizer)
        fit(model, batch_loss, sequences, steps=3, batch_size=4, lr=1e-3, rng=random.Random(0))
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
