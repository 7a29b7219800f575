"""Models that read images: how they are found out, loaded, adapted, scored and batched."""

import gc
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText

from rlhf_trl.data.multimodal import extra_inputs, extra_of, processor_of
from rlhf_trl.data.tokenize import prompt_ids, row_ids
from rlhf_trl.errors import ConfigError
from rlhf_trl.models.initial import load_initial_model
from rlhf_trl.models.inputs import batch_inputs, split_rows
from rlhf_trl.models.loading import load_full, load_model, load_reward_model
from rlhf_trl.models.tokenizers import load_tokenizer
from tests.helpers.tiny import save_model
from tests.helpers.vision import ARCHITECTURES, COLOURS, picture, save_vlm

ROWS = [("what colour is it ?", ["red"]), ("is it red ?", ["blue", "green"]), ("is it a colour ?", ["green"])]


def chat(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


@pytest.fixture(params=ARCHITECTURES)
def path(request, tmp_path) -> str:
    return save_vlm(tmp_path / "model", request.param)


def batch_of(tokenizer, rows) -> tuple[torch.Tensor, torch.Tensor, list[list[int]]]:
    """Return ids padded on the left, their mask, and the rows with their other inputs."""
    ids = [prompt_ids(tokenizer, chat(text), images=[picture(each) for each in shown]) for text, shown in rows]
    width = max(map(len, ids))
    padded = torch.tensor([[0] * (width - len(row)) + row for row in ids])
    return padded, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids]), ids


def test_rows_read_one_by_one_make_the_batch_of_the_processor(path):
    tokenizer = load_tokenizer(path)
    ids, mask, rows = batch_of(tokenizer, ROWS)
    ours = {"input_ids": ids, "attention_mask": mask} | batch_inputs(extra_of(rows), mask)
    parts = [[*({"type": "image", "image": picture(each)} for each in shown), {"type": "text", "text": text}]
             for text, shown in ROWS]  # fmt: skip
    theirs = processor_of(tokenizer).apply_chat_template(
        [[{"role": "user", "content": each}] for each in parts],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    )
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=0)
    rest = {name: value for name, value in theirs.items() if name not in ("input_ids", "attention_mask")}
    again = batch_inputs(split_rows(rest, mask, [len(shown) for _, shown in ROWS]), mask)
    assert again.keys() == rest.keys()
    for name, value in rest.items():
        torch.testing.assert_close(again[name], value, rtol=0, atol=0)


def test_each_row_of_a_batch_gets_its_own_images(path):
    """Three images of three rows, which have none, one and two of them."""
    tokenizer = load_tokenizer(path)
    shown = [[], ["red"], ["blue", "green"]]
    parts = [[*({"type": "image", "image": picture(each)} for each in row), {"type": "text", "text": "is it red ?"}]
             for row in shown]  # fmt: skip
    made = processor_of(tokenizer).apply_chat_template(
        [[{"role": "user", "content": each}] for each in parts],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    )
    mask = made.pop("attention_mask")
    made.pop("input_ids")
    for row, colours in zip(split_rows(dict(made), mask, list(map(len, shown))), shown, strict=True):
        pixels = row.others.get("pixel_values", torch.zeros(0, 3, 16, 16)).flatten(0, -4)
        kept = pixels[pixels.flatten(1).any(dim=1)]  # a row of images is padded with empty ones
        assert len(kept) == len(colours)
        for image, colour in zip(kept, colours, strict=True):
            alone = prompt_ids(tokenizer, chat("is it red ?"), images=[picture(colour)]).extra.others["pixel_values"]
            assert torch.equal(image, alone.flatten(0, -4)[0])


def test_an_input_of_no_row_is_refused():
    with pytest.raises(ConfigError, match=r"`strange` has the shape \(5, 2\) for 2 rows"):
        split_rows({"strange": torch.zeros(5, 2)}, torch.ones(2, 4), [1, 2])


def test_a_score_head_on_any_model_that_reads_images_loads_again(path, tmp_path):
    tokenizer = load_tokenizer(path)
    assert isinstance(load_model(path), type(AutoModelForImageTextToText.from_pretrained(path)))
    model = load_full(path, "SEQ_CLS", heads=["score"])
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    ids, mask, rows = batch_of(tokenizer, ROWS)
    inputs = {"input_ids": ids, "attention_mask": mask} | batch_inputs(extra_of(rows), mask)
    scores = model(**inputs).logits
    hidden = model.base_model(**inputs).last_hidden_state
    torch.testing.assert_close(scores, model.score(hidden[:, -1]))
    assert len(set(scores.flatten().tolist())) == 3
    model.save_pretrained(tmp_path / "reward")
    processor_of(tokenizer).save_pretrained(tmp_path / "reward")
    again = load_reward_model(str(tmp_path / "reward"))
    torch.testing.assert_close(again(**inputs).logits, scores, rtol=0, atol=0)
    with pytest.raises(ConfigError, match="is a reward model"):
        load_model(str(tmp_path / "reward"))


def test_images_are_seen(path):
    tokenizer, model = load_tokenizer(path), load_model(path)
    scores = []
    for colour in ("red", "blue"):
        ids, mask, rows = batch_of(tokenizer, [("what colour is it ?", [colour])])
        scores.append(model(input_ids=ids, attention_mask=mask, **batch_inputs(extra_of(rows), mask)).logits[0, -1])
    assert (scores[0] - scores[1]).abs().max() > 1e-4


@pytest.mark.parametrize("vision", ["frozen", "lora", "full"])
def test_an_adapter_leaves_the_vision_tower_or_adapts_it_or_trains_it(path, vision):
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    model, config = load_initial_model(path, "CAUSAL_LM", config, "", vision=vision)
    peft = get_peft_model(model, config)  # as TRL does
    names = [name for name, each in peft.named_parameters() if "lora_" in name or "modules_to_save" in name]
    tower = [name for name in names if "vision" in name or "connector" in name or "projector" in name]
    assert any("lora_" in name for name in names if name not in tower)
    assert bool([name for name in tower if "lora_" in name]) == (vision == "lora")
    assert bool([name for name in tower if "modules_to_save" in name]) == (vision == "full")


def test_the_rows_of_a_language_model_have_no_processor(tmp_path):
    tokenizer = load_tokenizer(save_model(tmp_path / "text"))
    assert processor_of(tokenizer) is None
    assert not extra_inputs(tokenizer, chat("a"))
    with pytest.raises(ConfigError, match="reads text alone"):
        prompt_ids(tokenizer, chat("a"), images=[picture("red")])


def test_completions_follow_a_prompt_with_its_images(path):
    tokenizer, images = load_tokenizer(path), [picture("red")]
    start = prompt_ids(tokenizer, chat("is it red ?"), images=images)
    ids = row_ids(tokenizer, chat("is it red ?"), [{"role": "assistant", "content": "it is ."}], images=images)
    assert ids[: len(start)] == start and ids.extra.others.keys() == start.extra.others.keys()
    assert tokenizer.decode(ids[len(start) :]) == "it is . <eos>"


def test_rows_that_wait_for_their_batch_hold_no_pixels(path):
    tokenizer, colours = load_tokenizer(path), list(COLOURS)
    rows = [prompt_ids(tokenizer, chat("colour ?"), images=[picture(colours[i % 3])]) for i in range(40)]
    first = weakref.ref(rows[0].extra.others["pixel_values"])
    expected = batch_inputs(extra_of(rows[:3]), torch.ones(3, len(rows[0])))["pixel_values"]
    assert len({tuple(pixels.flatten().tolist()) for pixels in expected}) == 3
    for row in rows:
        assert row.extra
    gc.collect()
    assert first() is None
    again = batch_inputs(extra_of(rows[:3]), torch.ones(3, len(rows[0])))["pixel_values"]
    assert torch.equal(again, expected)
