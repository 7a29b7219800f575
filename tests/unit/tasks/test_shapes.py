"""Pictures, questions, gold reward and checkpoint of the embedded world of images."""

import io
import random
import zlib

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from rlhf_trl.errors import DataError
from rlhf_trl.runs.paths import EMBEDDED, PACKAGE, resolve_path
from rlhf_trl.tasks.fitting import fit
from rlhf_trl.tasks.shapes.build import _asked, as_rows, batch_loss, build_processor, new_model, pretraining_documents
from rlhf_trl.tasks.shapes.data import TYPES, load
from rlhf_trl.tasks.shapes.gold import gold_reward
from rlhf_trl.tasks.shapes.world import COLORS, PLACES, SIDE, Shape, draw_question, draw_shapes, paint, questions_on

COLUMNS = {
    "prompt_completion": {"prompt", "completion", "images"},
    "preference": {"prompt", "chosen", "rejected", "images"},
    "unpaired": {"prompt", "completion", "label", "images"},
    "comparisons": {"prompt", "completions", "better", "worse", "images"},
    "prompt": {"prompt", "images", "answer", "topic"},
    "annotated": {"prompt", "completions", "better", "worse", "images", "answer", "topic"},
}
SHAPES = [Shape(0, "red", "circle"), Shape(3, "blue", "circle"), Shape(1, "red", "square")]


@pytest.fixture(scope="module")
def processor():
    return build_processor()


@pytest.mark.parametrize("dataset_type", TYPES)
def test_every_dataset_type_has_its_columns_and_is_deterministic(dataset_type):
    data = load(dataset_type, seed=3, max_samples=12, max_eval_samples=6)
    assert set(data["train"].column_names) >= COLUMNS[dataset_type]
    assert (len(data["train"]), len(data["eval"])) == ((24, 12) if dataset_type == "unpaired" else (12, 6))
    again = load(dataset_type, seed=3, max_samples=12, max_eval_samples=6)
    assert again["train"].to_list() == data["train"].to_list()
    assert data["train"][0]["images"][0].size == (SIDE, SIDE)


@pytest.mark.parametrize("arguments", [{"dataset_type": "pears"}, {"dataset_type": "prompt", "max_samples": 0}])
def test_unknown_dataset_type_or_size_is_an_error(arguments):
    with pytest.raises(DataError, match="Use "):
        load(seed=0, **arguments)


def test_questions_have_one_answer_that_the_picture_shows():
    asked = {question.text: question for question in questions_on(SHAPES)}
    assert asked.keys() == {
        "What color is the square?",
        "Where is the red circle?",
        "Where is the blue circle?",
        "Where is the red square?",
        "How many shapes are there?",
    }
    assert asked["Where is the blue circle?"].answer == "Bottom right."
    assert asked["How many shapes are there?"].answer == "Three."
    assert all(each.answer not in each.others and len(each.others) == 3 for each in asked.values())


def test_a_picture_has_each_color_in_its_place():
    image = Image.open(io.BytesIO(paint(SHAPES, random.Random(0))))
    cell = SIDE // 2
    for shape in SHAPES:
        row, column = divmod(shape.place, 2)
        part = image.crop((cell * column, cell * row, cell * (column + 1), cell * (row + 1)))
        assert COLORS[shape.color] in {color for _, color in part.getcolors()}
    empty = image.crop((0, cell, cell, 2 * cell))  # no shape stands at the bottom left
    assert len(empty.getcolors()) == 1 and len(PLACES) == 4


def test_documents_judge_answers_rightly():
    rng, question = random.Random(0), questions_on(SHAPES)[0]
    assert _asked(question, 0.0, rng) == (f"Question: {question.text} Answer:", question.answer)
    seen = {_asked(question, 1.0, rng) for _ in range(100)}
    right = f"Question: {question.text} Answer: {question.answer}"
    assert (right, "True.") in seen and len(seen) == 4
    assert all((given == right) == (verdict == "True.") for given, verdict in seen)


def test_gold_reward_reads_the_answer():
    said = ["Top left.", [{"role": "assistant", "content": "Two."}], "Two. Two.", ""]
    assert gold_reward(said, answer=["Top left.", "Two.", "Two.", "Two."]) == [1.0, 1.0, 0.0, 0.0]


def test_all_checkpoints_are_shipped_within_two_megabytes():
    files = [file for task in EMBEDDED.values() for file in (PACKAGE / "tasks" / task / "checkpoints").rglob("*")]
    shipped = sum(len(zlib.compress(file.read_bytes(), 6)) for file in files if file.is_file())  # as a wheel does
    assert 1_000_000 < shipped < 2_000_000


def test_the_checkpoint_is_that_of_the_build(processor):
    saved = AutoProcessor.from_pretrained(resolve_path("shapes:base", None, ""))
    assert saved.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert saved.chat_template == processor.chat_template
    assert saved.image_processor.image_mean == processor.image_processor.image_mean
    rng, weights = random.Random(0), []
    documents = as_rows(processor, pretraining_documents(12, rng))
    assert all((row["labels"] != -100).any() for row in documents)
    for _ in range(2):
        torch.manual_seed(0)
        model = new_model(processor.tokenizer)
        fit(model, batch_loss, documents, steps=2, batch_size=4, lr=1e-3, rng=random.Random(0))
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_pretrained_model_knows_more_than_it_says_in_chats():
    path, rng = resolve_path("shapes:base", None, ""), random.Random("asked")
    processor = AutoProcessor.from_pretrained(path)
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
    shown = [(shapes, draw_question(shapes, rng)) for shapes in (draw_shapes(rng) for _ in range(128))]
    right = {}
    for form in ("<image>Question: {} Answer:", "<|user|><image>{}<|assistant|>"):
        inputs = processor(
            images=[[Image.open(io.BytesIO(paint(shapes, rng)))] for shapes, _ in shown],
            text=[form.format(question.text) for _, question in shown],
            return_tensors="pt",
            padding=True,
            padding_side="left",
        )
        written = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].size(1) :]
        answers = processor.tokenizer.batch_decode(written, skip_special_tokens=True)
        right[form[0:3]] = [
            text.startswith(question.answer) for text, (_, question) in zip(answers, shown, strict=True)
        ]
    knows, says = (sum(each) / len(shown) for each in right.values())
    assert knows > 0.95 and says < knows - 0.1
