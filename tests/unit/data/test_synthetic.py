"""Synthetic comparisons of `data/feedback`: counted, marked, deterministic, and never of held-out rows."""

import json
import random

import pytest

from rlhf_trl import data
from rlhf_trl.data.build import build_dataset
from rlhf_trl.data.feedback.synthetic import perturbed, style_of, truncated
from rlhf_trl.data.messages import as_chat
from rlhf_trl.errors import ConfigError, DataError

GOOD, BAD = "The sky over the sea is blue today.", "It is a kind of green, I think."
PROMPTS = [f"Which color is number {i}?" for i in range(30)]


def rows_of(chat: bool = False) -> list[dict]:
    rows = []
    for i, prompt in enumerate(PROMPTS):
        row = {"prompt": prompt, "completion_a": f"{GOOD} {i}", "completion_b": f"{BAD} {i}", "preferred": "a"}
        if chat:
            answers = {name: as_chat(row[name], "assistant") for name in ("completion_a", "completion_b")}
            row |= {"prompt": as_chat(prompt, "user"), **answers}
        rows.append(row)
    return rows


def build(dataset_type="comparisons", rows=None, seed=0, eval_size=0.2, max_samples=None, **options):
    rows = rows_of() if rows is None else rows
    source = [("rows", ((f"rows, row {i}", row) for i, row in enumerate(rows, 1)))]
    limits = {"eval_size": eval_size, "max_samples": max_samples}
    return build_dataset(dataset_type, seed, source, feedback=data.Pairs(**options), **limits)


def by_source(dataset) -> dict[str, list[tuple[str, str, str]]]:
    """Return (prompt, better, worse) of each comparison, by its source."""
    found: dict[str, list] = {}
    for row in dataset:
        for better, worse, source in zip(row["better"], row["worse"], row["source"], strict=True):
            texts = [row["completions"][i] for i in (better, worse)]
            found.setdefault(source, []).append((row["prompt"], *texts))
    return found


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("chat", [False, True])
def test_each_option_adds_marked_comparisons_to_training_rows_alone(capsys, tmp_path, chat):
    weaker = write(tmp_path / "weaker.jsonl", [{"prompt": p, "completion": f"No idea {p}"} for p in PROMPTS])
    candidates = [
        {"prompt": p, "candidates": [{"completion": f"Hm {p}"}, {"completion": f"Well {p}"}]} for p in PROMPTS
    ]
    collected = write(tmp_path / "candidates.jsonl", candidates)
    options = {"truncated": 1, "perturbed": 2, "matched": 1, "negatives": 1, "weaker": [weaker, collected]}
    splits = build(rows=rows_of(chat), **options)
    shown = capsys.readouterr().out
    train, held_out = splits["train"], splits["eval"]
    assert set(by_source(held_out)) == {"feedback"} and all(len(row["completions"]) == 2 for row in held_out)
    found, count = by_source(train), len(train)
    sizes = {name: len(each) for name, each in found.items()}
    assert sizes["feedback"] == sizes["truncated"] == sizes["matched"] == sizes["negatives"] == count
    assert sizes["weaker"] == 2 * count and count < sizes["perturbed"] <= 2 * count
    for counted in (
        f"truncated copies of the best completion added as rejected: {count}",
        f"completions of weaker policies added as rejected: {2 * count}",
        f"rows of `weaker` not used: their prompts aren't compared in training: {2 * len(held_out)}",
        f"completions of other prompts, of like length and style, added as negatives: {count}",
    ):
        assert counted in shown
    text = (lambda value: value[-1]["content"]) if chat else (lambda value: value)
    for source, each in found.items():
        for prompt, better, worse in each:
            assert text(better).startswith(GOOD)
            if source == "truncated":
                assert text(better).startswith(text(worse)) and text(worse) != text(better)
            elif source == "matched":
                assert len(text(better)) / 1.25 <= len(text(worse)) <= 1.25 * len(text(better))
            elif source == "weaker":
                assert text(worse).endswith(text(prompt))
    again = build(rows=rows_of(chat), **options)["train"]
    assert again.to_list() == train.to_list()
    assert build(rows=rows_of(chat), seed=1, **options)["train"].to_list() != train.to_list()


def test_rows_of_pairs_say_their_source(capsys):
    train = build("preference", truncated=1)["train"]
    assert {row["source"] for row in train} == {"feedback", "truncated"}
    assert "source" not in build("preference", same_style=True)["train"].column_names
    assert build("unpaired", truncated=1)["train"].column_names == ["prompt", "completion", "label"]
    assert "`data.feedback.truncated` changes nothing in rows of unpaired" in capsys.readouterr().out


def test_a_paraphrase_is_no_held_out_prompt_and_no_repetition(capsys, tmp_path):
    held_out = {row["prompt"] for row in build()["eval"]}
    trained = [prompt for prompt in PROMPTS if prompt not in held_out]
    given = [{"prompt": p, "paraphrase": f"Tell me: {p}"} for p in PROMPTS]
    given += [{"prompt": trained[0], "paraphrase": text} for text in (next(iter(held_out)).upper(), f"{trained[0]} ")]
    capsys.readouterr()
    train = build(paraphrased=write(tmp_path / "p.jsonl", given))["train"]
    shown, found = capsys.readouterr().out, by_source(train)
    assert len(found["paraphrased"]) == len(found["feedback"]) == len(trained)
    assert {prompt for prompt, *_ in found["paraphrased"]} == {f"Tell me: {prompt}" for prompt in trained}
    assert "paraphrases dropped: they are held-out prompts: 1" in shown
    assert "paraphrases dropped: they repeat their prompt or another paraphrase of it: 1" in shown
    assert f"rows of `paraphrased` not used: their prompts aren't compared in training: {len(held_out)}" in shown


@pytest.mark.parametrize("dataset_type", ["comparisons", "preference"])
def test_the_limit_of_rows_counts_what_people_said_alone(capsys, tmp_path, dataset_type):
    given = [{"prompt": p, "paraphrase": f"Tell me: {p}"} for p in PROMPTS]
    alone = build(dataset_type, max_samples=10)["train"]["prompt"]
    options = {"paraphrased": write(tmp_path / "p.jsonl", given), "truncated": 1}
    train = build(dataset_type, max_samples=10, **options)["train"]
    prompts = list(dict.fromkeys(row["prompt"] for row in train))
    assert prompts == [*alone, *(f"Tell me: {prompt}" for prompt in alone)]  # the rows of the same seed
    assert len(train) == (20 if dataset_type == "comparisons" else 30)
    assert "`max_samples=10`: 10 of" in capsys.readouterr().out
    assert len(build(dataset_type, max_samples=1000, **options)["train"]) > 30


def test_comparisons_that_length_or_style_could_decide_are_dropped_and_counted(capsys):
    rows = [
        *rows_of(),
        {"prompt": "x", "completion_a": "word " * 30, "completion_b": "word", "preferred": "a"},
        {"prompt": "y", "completion_a": "- one\n- two and", "completion_b": "one, two and", "preferred": "a"},
    ]
    splits = build(rows=rows, eval_size=None, length_ratio=1.5, same_style=True)
    assert len(splits["train"]) == 30
    shown = capsys.readouterr().out
    assert "lengths differ by more than `length_ratio=1.5`: 1" in shown
    assert "of two styles (`same_style`): 1" in shown
    assert style_of("# A\n- b `c`") != style_of("A b c") == style_of("Other words")


def test_negatives_stay_out_of_held_out_rows():
    splits = build(negatives=2)
    assert all(len(row["completions"]) == 4 for row in splits["train"])
    assert all(len(row["completions"]) == 2 for row in splits["eval"])


def test_agreement_and_the_limit_of_pairs_hold_for_what_is_added():
    rows = [{**row, "rater": rater} for row in rows_of() for rater in (1, 2)]
    train = build(rows=rows, agreement="weights", truncated=1, negatives=1)["train"]
    assert all(row["weights"] == [1.0] * 3 for row in train)
    assert all(len(row["better"]) == len(row["source"]) == 2 for row in build(truncated=3, max_pairs=2)["train"])
    single = build(truncated=1, pairwise_rows=True)["train"]
    assert {tuple(row["source"]) for row in single} == {("feedback",), ("truncated",)}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a"}], r"weaker.jsonl, line 1: `completion` is missing"),
        ([{"prompt": "a", "candidates": ["x"]}], r"weaker.jsonl, line 1: `candidates` is no list of objects"),
        ([{"completion": "a"}], r"weaker.jsonl, line 1: `prompt` is missing"),
    ],
)
def test_a_malformed_row_of_a_file_is_named(tmp_path, rows, message):
    with pytest.raises(DataError, match=message) as error:
        build(weaker=write(tmp_path / "weaker.jsonl", rows))
    assert "`data.feedback.weaker`" in str(error.value)


def test_wrong_options_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"`data.feedback.paraphrased`: `.*` names no file"):
        build(paraphrased=str(tmp_path / "none.jsonl"))
    with pytest.raises(ConfigError, match=r"`data.feedback.length_ratio` is 0.5. Set it to 1 or more"):
        data.Pairs(length_ratio=0.5)
    with pytest.raises(ConfigError, match=r"`data.feedback.truncated` is -1"):
        data.Pairs(truncated=-1)
    with pytest.raises(ConfigError, match=r"regression.* compares nothing, so `data.feedback.truncated`"):
        data.Ratings(use="regression", truncated=1)


@pytest.mark.parametrize("make", [truncated, perturbed])
def test_copies_differ_from_their_text_and_short_texts_have_none(make):
    for seed in range(50):
        assert make(GOOD, random.Random(seed)) not in (None, GOOD)
        made = make(GOOD, random.Random(seed))
        assert made == made.strip() and "  " not in made and set(made.split()) <= set(GOOD.split())
    assert make("Two words", random.Random(0)) is None
    assert perturbed("a a a a", random.Random(0)) in ("a a", "a a a", "a a a a a", "a a a a a a", "a a a a a a a a")
