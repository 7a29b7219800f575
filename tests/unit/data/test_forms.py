"""Feedback as people give it: what each kind becomes for each stage, its options, and every bad row's message."""

import dataclasses
import json
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml
from hydra import compose as compose_config
from hydra import initialize_config_dir
from hydra.utils import get_class, instantiate

from rlhf_trl import data
from rlhf_trl.data.build import build_dataset
from rlhf_trl.data.feedback.base import Feedback, key_of
from rlhf_trl.errors import ConfigError, DataError

CONF = Path(__file__).parents[3] / "conf/data/feedback"
FORMS = {
    "pairs": data.Pairs, "rankings": data.Rankings, "ratings": data.Ratings, "edits": data.Edits,
    "thumbs": data.Thumbs, "attributes": data.Attributes,
}  # fmt: skip
STAGES = {
    "comparisons": {"prompt", "completions"},
    "preference": {"prompt", "chosen", "rejected"},
    "unpaired": {"prompt", "completion", "label"},
    "prompt_completion": {"prompt", "completion"},
    "prompt": {"prompt"},
}


def made(
    feedback: Feedback, rows: list[dict], dataset_type: str = "comparisons", seed: int = 0, **options
) -> list[dict]:
    """Return the training rows that `rows` become, as dicts."""
    source = [("rows", ((f"rows, row {i}", row) for i, row in enumerate(rows, 1)))]
    return build_dataset(dataset_type, seed, source, feedback=feedback, **options)["train"].to_list()


def wins(row: dict) -> set[tuple]:
    """(better, worse) texts of a row of comparisons."""
    texts = row["completions"]
    return {(texts[a], texts[b]) for a, b in zip(row["better"], row["worse"], strict=True)}


def pair(a="x", b="y", preferred="a", prompt="p", **more):
    return {"prompt": prompt, "completion_a": a, "completion_b": b, "preferred": preferred, **more}


def rated(completion, ratings, prompt="p", **more):
    return {"prompt": prompt, "completion": completion, "ratings": ratings, **more}


# ---- The configs, and the embedded world ----


@pytest.mark.parametrize("name", FORMS)
def test_the_config_of_a_form_declares_all_that_its_class_takes(name):
    config = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    cls = get_class(config["_target_"])
    assert cls is FORMS[name] and instantiate(config) == cls(columns=config["columns"])
    fields = {field.name: field for field in dataclasses.fields(cls)}
    assert set(config) - {"_target_", "_convert_"} == set(fields)
    assert set(config["columns"]) == set(cls().known) - set(config.get("dimensions", []))


@pytest.mark.parametrize("stage", ["reward", "dpo", "orpo", "kto", "sft", "ppo"])
@pytest.mark.parametrize("name", FORMS)
def test_the_embedded_world_serves_every_form_to_every_stage(compose, name, stage):
    words = ["data.max_samples=80", "data.max_eval_samples=40", f"data/feedback={name}"]
    cfg = compose(f"stage={stage}", *words)
    rows = instantiate(cfg.data)(dataset_type=cfg.stage.dataset_type, seed=cfg.seed)
    for split in ("train", "eval"):
        assert len(rows[split]) > 5 and STAGES[cfg.stage.dataset_type] <= set(rows[split].column_names)
    prompts = [{json.dumps(row["prompt"]) for row in rows[split]} for split in ("train", "eval")]
    assert not prompts[0] & prompts[1]
    if cfg.stage.dataset_type == "unpaired":
        assert set(rows["train"]["label"]) == {True, False}


def test_the_examples_of_the_documentation_compose(tmp_path):
    section = (CONF.parents[2] / "docs" / "data.md").read_text().split("## Feedback")[1].split("\n## ")[0]
    whole, lines = re.findall(r"```yaml\n(.*?)```", section, re.S)
    (tmp_path / "experiment").mkdir()
    found = {"pairs": whole}
    for line in lines.split("---\n"):
        found[line.rsplit("# ", 1)[1].strip()] = line
    assert set(found) == set(FORMS)
    for name, text in found.items():
        head = "# @package _global_\ndefaults:\n  - override /stage: reward\n  - override /data: files\n"
        text = text if name == "pairs" else f"{head}  - override /data/feedback: {name}\n{text}"
        (tmp_path / "experiment" / f"{name}.yaml").write_text(text)
        words = [f"hydra.searchpath=[file://{tmp_path}]", f"experiment={name}", "data.paths=a.jsonl"]
        with initialize_config_dir(str(CONF.parents[1]), version_base="1.3"):
            cfg = compose_config("train", words)
        given = yaml.safe_load(text)["data"]["feedback"]
        declared = yaml.safe_load((CONF / f"{name}.yaml").read_text())
        assert set(given) <= set(declared) and set(given.get("columns", {})) <= set(declared["columns"])
        feedback = instantiate(cfg.data.feedback)
        assert isinstance(feedback, FORMS[name])
        assert all(getattr(feedback, key) == value for key, value in given.items() if key != "columns")
        assert given.get("columns", {}).items() <= feedback.columns.items()


def test_the_published_schemas_of_the_documentation_are_options():
    text = (CONF.parents[2] / "docs" / "data.md").read_text()
    rows = re.findall(r"^\| .* \| (\w+) \| (`columns: .*) \|$", text, re.M)
    assert len(rows) > 5
    for name, options in rows:
        FORMS[name](**yaml.safe_load("{" + ", ".join(re.findall(r"`([^`]*: [^`]*)`", options)) + "}"))


def test_files_serve_a_form_and_splits_share_no_prompt(tmp_path, capsys):
    path = tmp_path / "stars.csv"
    lines = [f'q{i},"a{i} {j}","[{j + 1}, {j + 2}]"' for i in range(20) for j in range(4)]
    path.write_text("\n".join(["question,answer,stars", *lines]))
    feedback = data.Ratings(columns={"prompt": "question", "completion": "answer", "ratings": "stars"})
    rows = data.load_files("comparisons", 0, str(path), eval_size=4, feedback=feedback, to_chat=True)
    assert {split: len(rows[split]) for split in rows} == {"train": 16, "eval": 4}
    assert rows["train"][0]["prompt"][0]["role"] == "user" and len(rows["train"][0]["better"]) == 6
    said = capsys.readouterr().out
    assert "train: 64 rows of ratings -> comparisons: 16 rows, 16 prompts, 64 completions, 96 pairs" in said
    assert "rows whose completions were shuffled: 16" in said


def test_forms_can_be_mixed():
    def source(feedback, row):
        return lambda dataset_type, seed: build_dataset(
            dataset_type, seed, [("rows", [("row 1", row)])], feedback=feedback
        )

    sources = {
        "pairs": source(data.Pairs(margin=1.0), pair(strength=2)),
        "rankings": source(data.Rankings(), {"prompt": "q", "completions": ["u", "v", "w"], "ranks": [1, 2, 3]}),
    }
    rows = data.mix("comparisons", 0, sources)["train"].to_list()
    assert sorted((len(row["completions"]), row["margin"]) for row in rows) == [(2, [2.0]), (3, None)]


# ---- What each kind becomes ----


def test_pairs_with_strength_and_ties():
    rows = [pair(strength=3), pair("u", "v", "b", "q", strength=1), pair("s", "t", "tie", "r", strength=0)]
    reward = made(data.Pairs(margin=1 / 3), rows)
    assert [wins(row) for row in reward] == [{("x", "y")}, {("v", "u")}]
    assert [row["margin"] for row in reward] == [pytest.approx([1.0]), pytest.approx([1 / 3])]
    dpo = made(data.Pairs(), rows, "preference")
    assert dpo == [
        {"prompt": "p", "chosen": "x", "rejected": "y"},
        {"prompt": "q", "chosen": "v", "rejected": "u"},
    ]
    labels = {(row["completion"], row["label"]) for row in made(data.Pairs(), rows, "unpaired")}
    assert labels == {("x", True), ("y", False), ("v", True), ("u", False)}
    assert [row["completion"] for row in made(data.Pairs(), rows, "prompt_completion")] == ["x", "v"]
    assert [row["prompt"] for row in made(data.Pairs(), rows, "prompt")] == ["p", "q", "r"]


def test_pairs_in_other_words():
    arena = data.Pairs(columns={"preferred": "winner"}, answers=["model_a", "model_b", "tie"])
    row = {"prompt": "p", "completion_a": "x", "completion_b": "y", "winner": "model_b"}
    assert wins(made(arena, [row])[0]) == {("y", "x")}
    chosen = data.Pairs(columns={"completion_a": "chosen", "completion_b": "rejected", "preferred": None})
    assert wins(made(chosen, [{"prompt": "p", "chosen": "x", "rejected": "y"}])[0]) == {("x", "y")}


def test_columns_are_paths_into_objects_and_lists_and_lists_of_columns(capsys):
    answers = [{"answer": text, "model": "m", "rank": rank} for text, rank in (("x", 2.0), ("y", 1.0), ("z", 3.0))]
    nectar = data.Rankings(columns={"completions": "answers.answer", "ranks": "answers.rank"})
    (row,) = made(nectar, [{"prompt": "p", "answers": answers, "turns": 1}])
    assert wins(row) == {("y", "x"), ("y", "z"), ("x", "z")}
    assert "columns dropped: turns" in capsys.readouterr().out

    columns = {"prompt": "info.post", "completion_a": "summaries.0.text", "completion_b": "summaries.1.text"}
    tldr = data.Pairs(columns=columns | {"preferred": "choice", "rater": "worker"}, answers=[0, 1])
    given = {"info": {"post": "p"}, "summaries": [{"text": "x"}, {"text": "y"}], "choice": 1, "worker": "w"}
    assert wins(made(tldr, [given])[0]) == {("y", "x")}

    webgpt = {"completions": ["answer_0", "answer_1"], "ranks": ["score_0", "score_1"]}
    given = {"prompt": "p", "answer_0": "x", "answer_1": "y", "score_0": -0.5, "score_1": 0.5}
    feedback = data.Rankings(columns=webgpt, highest_is_best=True, margin=1.0)
    assert wins(made(feedback, [given])[0]) == {("y", "x")} and made(feedback, [given])[0]["margin"] == [1.0]

    dotted = data.Rankings(columns={"completions": "a.b"})  # a column of that very name
    assert wins(made(dotted, [{"prompt": "p", "a.b": ["x", "y"], "ranks": [1, 2]}])[0]) == {("x", "y")}
    ratings = {"prompt": "p", "completion": "c", "annotations": {"kind": {"Rating": 3}}}
    feedback = data.Attributes(dimensions=["kind"], columns={"kind": "annotations.kind.Rating"}, scale=[1, 5])
    assert made(feedback, [ratings])[0]["targets"] == [{"kind": 0.0}]


@pytest.mark.parametrize(
    ("columns", "row", "message"),
    [
        ({"completions": "replies.text"}, {"ranks": [1]}, "it has no column `replies`, but `prompt`, `ranks`"),
        (
            {"completions": "answers.text"},
            {"answers": [{"text": "x"}, {}], "ranks": [1, 2]},
            "`answers.text` is missing",
        ),
        ({"completions": "answers.5"}, {"answers": [["x", "y"]], "ranks": [1, 2]}, "`answers.5` is missing"),
        ({"completions": ["a", "b"]}, {"a": "x", "ranks": [1, 2]}, "it has no column `b`, but `prompt`, `a`, `ranks`"),
    ],
)
def test_a_path_that_leads_nowhere_is_named(columns, row, message):
    with pytest.raises(DataError, match=re.escape(message)):
        made(data.Rankings(columns=columns), [{"prompt": "p", **row}])


def test_rows_without_feedback_read_paths_too():
    row = {"extra": {"question": "p"}, "reward_model": {"style": "rule", "ground_truth": "4"}}
    options = {"columns": {"prompt": "extra.question", "answer": "reward_model.ground_truth"}}
    rows = build_dataset("prompt", 0, [("rows", [("rows, row 1", row)])], **options)["train"].to_list()
    assert rows == [{"prompt": "p", "answer": "4"}]


FLAGS = {"preferred": ["winner_a", "winner_b", "winner_tie"]}


def test_battles_with_a_flag_per_answer_and_lists_of_turns():
    feedback = data.Pairs(columns=FLAGS, turns=True)
    flags = {"winner_a": 0, "winner_b": 1, "winner_tie": 0}
    texts = {"prompt": '["p", "q"]', "completion_a": '["x", "y"]', "completion_b": '["u", "v"]'}
    (row,) = made(feedback, [texts | flags], "preference")
    assert row["prompt"] == [{"role": "user", "content": "p"}]
    roles = [("assistant", "u"), ("user", "q"), ("assistant", "v")]
    assert row["chosen"] == [{"role": role, "content": text} for role, text in roles]
    tied = texts | {"winner_a": 0, "winner_b": 0, "winner_tie": 1}
    assert len(made(feedback, [texts | flags, tied])) == 1


def test_two_bad_ones_are_no_tie(capsys):
    feedback = data.Pairs(columns={"prompt": None}, answers=["a", "b", "tie", "tie (bothbad)"])

    def battle(preferred, a, b):
        chats = [[{"role": "user", "content": "p"}, {"role": "assistant", "content": text}] for text in (a, b)]
        return {"completion_a": chats[0], "completion_b": chats[1], "preferred": preferred}

    rows = [battle("tie (bothbad)", "u", "v"), battle("a", "x", "y"), battle("tie", "s", "t")]
    (row,) = made(feedback, rows)
    assert [better[0]["content"] for better, _ in [(row["completions"][row["better"][0]], 0)]] == ["x"]
    assert row["prompt"] == [{"role": "user", "content": "p"}]
    said = capsys.readouterr().out
    assert "rows dropped: both are bad: 1" in said and "rows dropped: all completions tie: 1" in said
    labels = {(row["completion"][0]["content"], row["label"]) for row in made(feedback, rows, "unpaired")}
    assert labels == {("x", True), ("y", False), ("u", False), ("v", False)}
    votes = [battle("a", "x", "y") | {"rater": 1}, battle("tie (bothbad)", "x", "y") | {"rater": 2}]
    (row,) = made(data.Pairs(columns={"prompt": None}, answers=feedback.answers, agreement="weights"), votes)
    assert row["weights"] == [1.0]  # who finds both bad votes for neither


def test_weak_preferences_are_ties_below_the_smallest_strength(capsys):
    feedback = data.Pairs(columns={"strength": "score_ratio"}, answers=[1, 0], min_strength=2)
    rows = [pair("x", "y", 1, score_ratio=3.0), pair("u", "v", 0, "q", score_ratio=1.2)]
    assert [wins(row) for row in made(feedback, rows)] == [{("x", "y")}]
    assert "ties: weaker than `min_strength` (1 rows)" in capsys.readouterr().out


def test_rankings_with_ties_and_partial_orders():
    row = {"prompt": "p", "completions": ["a", "b", "c", "d"], "ranks": [2, 1, 2, 4]}
    (reward,) = made(data.Rankings(margin=0.5), [row])
    assert wins(reward) == {("b", "a"), ("b", "c"), ("b", "d"), ("a", "d"), ("c", "d")}
    at = reward["completions"].index
    margins = dict(zip(zip(reward["better"], reward["worse"], strict=True), reward["margin"], strict=True))
    assert margins[at("b"), at("d")] == 1.5 and margins[at("a"), at("d")] == 1.0
    assert {(r["completion"], r["label"]) for r in made(data.Rankings(), [row], "unpaired")} == {
        ("b", True),
        ("d", False),
    }
    partial = data.Rankings(columns={"ranks": None, "better": "edges"})
    row = {"prompt": "p", "completions": ["a", "b", "c", "d"], "edges": [[0, 1], [1, 2]]}
    (reward,) = made(partial, [row])
    assert wins(reward) == {("a", "b"), ("b", "c"), ("a", "c")}  # a > c follows; d was compared with nothing
    assert set(reward["completions"]) == {"a", "b", "c"}


def test_ratings_as_pairs_with_a_margin_or_as_values():
    rows = [rated("a", [5, 4]), rated("b", 3), rated("c", [3]), rated("z", 1, prompt="q")]
    (reward,) = made(data.Ratings(margin=2.0), rows)
    assert wins(reward) == {("a", "b"), ("a", "c")} and reward["margin"] == [3.0, 3.0]
    values = made(data.Ratings(use="regression"), rows)
    targets = {c: t["score"] for row in values for c, t in zip(row["completions"], row["targets"], strict=True)}
    assert targets == {"a": 0.75, "b": 0.0, "c": 0.0, "z": -1.0}
    assert made(data.Ratings(use="regression"), rows, "preference") == made(data.Ratings(), rows, "preference")
    assert {(r["completion"], r["label"]) for r in made(data.Ratings(), rows, "unpaired")} == {
        ("a", True),
        ("z", False),
    }
    above = made(data.Ratings(good_above=2.5), rows, "prompt_completion")
    assert [row["completion"] for row in above] == ["a", "b", "c"]
    assert wins(made(data.Ratings(min_gap=2), [*rows, rated("d", 1)])[0]) == {("a", "d"), ("b", "d"), ("c", "d")}


def test_edits_are_preferred_and_are_demonstrations():
    rows = [{"prompt": "p", "original": "bad", "edited": "good"}]
    assert made(data.Edits(), rows, "preference") == [{"prompt": "p", "chosen": "good", "rejected": "bad"}]
    assert made(data.Edits(), rows, "prompt_completion") == [{"prompt": "p", "completion": "good"}]


def test_thumbs_are_labels_and_pairs_where_both_occur():
    words = [("a", "up", "p"), ("b", False, "p"), ("c", 1, "q"), ("d", "down", "r"), ("d", "0", "r"), ("d", True, "r")]
    rows = [{"prompt": p, "completion": c, "thumb": t} for c, t, p in words]
    labels = {(row["completion"], row["label"]) for row in made(data.Thumbs(), rows, "unpaired")}
    assert labels == {("a", True), ("b", False), ("c", True), ("d", False)}  # two of three are down
    (reward,) = made(data.Thumbs(), rows)
    assert wins(reward) == {("a", "b")}


def test_attributes_are_heads_with_missing_dimensions_or_a_weighted_mean():
    feedback = {"dimensions": ["kind", "true"], "scale": [0, 4]}
    rows = [
        {"prompt": "p", "completion": "a", "kind": 4, "true": None},
        {"prompt": "p", "completion": "b", "kind": [2, 4], "true": 0},
        {"prompt": "p", "completion": "c", "kind": None, "true": 3},
        {"prompt": "p", "completion": "d", "kind": None, "true": ""},
    ]
    (row,) = made(data.Attributes(**feedback), rows)
    targets = dict(zip(row["completions"], row["targets"], strict=True))
    assert targets == {
        "a": {"kind": 1.0, "true": None},
        "b": {"kind": 0.5, "true": -1.0},
        "c": {"kind": None, "true": 0.5},
    }
    pairs = data.Attributes(**feedback, use="pairs")
    assert wins(made(pairs, rows)[0]) == {("a", "b"), ("c", "b")}  # a and c have no dimension in common
    weighted = data.Attributes(**feedback, weights={"kind": 3})
    assert {row["completion"] for row in made(weighted, rows, "prompt_completion")} == {"a", "b", "c"}
    assert {row["completion"] for row in made(data.Attributes(**feedback), rows, "prompt_completion")} == {"a", "c"}


# ---- Raters who disagree ----


def test_the_share_of_raters_who_agree_is_a_weight_or_a_smoothing():
    votes = [("a", 1), ("a", 2), ("a", 3), ("b", 4)]
    rows = [pair(preferred=side, rater=rater, strength=2) for side, rater in votes]
    rows += [pair("y", "x", "tie", rater=5)]  # the same two, the other way round
    (row,) = made(data.Pairs(agreement="weights", margin=1.0), rows)
    assert wins(row) == {("x", "y")} and row["weights"] == pytest.approx([2 * 0.7 - 1])
    assert row["margin"] == pytest.approx([(3 * 2 - 2) / 5])
    (row,) = made(data.Pairs(agreement="smoothing"), rows)
    assert row["label_smoothing"] == pytest.approx([0.3])
    with pytest.raises(DataError, match="all completions tie: 1"):
        made(data.Pairs(agreement="smoothing"), [rows[0], rows[3]])

    # A preference of strength 0 is one: of two against one, the one is sure
    rows = [pair(preferred=side, rater=i, strength=by) for i, (side, by) in enumerate([("a", 0), ("a", 0), ("b", 3)])]
    (row,) = made(data.Pairs(agreement="weights", margin=1.0), rows)
    assert (wins(row), row["margin"]) == ({("x", "y")}, [0.0]) and row["weights"] == pytest.approx([1 / 3])
    (row,) = made(data.Pairs(), rows, "annotated")
    assert (wins(row), row["gap"]) == ({("x", "y")}, [0.0]) and row["share"] == pytest.approx([2 / 3])

    rankings = [
        {"prompt": "p", "completions": ["a", "b", "c"], "ranks": [1, 2, 3], "rater": 1},
        {"prompt": "p", "completions": ["c", "a", "b"], "ranks": [1, 2, 3], "rater": 2},
        {"prompt": "p", "completions": ["a", "b", "c"], "ranks": [1, 2, 3], "rater": 3},
    ]
    (row,) = made(data.Rankings(agreement="weights"), rankings)
    assert wins(row) == {("a", "b"), ("a", "c"), ("b", "c")}
    assert sorted(row["weights"]) == pytest.approx([1 / 3, 1 / 3, 1.0])

    (row,) = made(data.Ratings(agreement="smoothing"), [rated("a", [5, 3]), rated("b", [3, 2])])
    assert wins(row) == {("a", "b")} and row["label_smoothing"] == pytest.approx([1 - 3.5 / 4])


# Two who are not sure against one who is
VOTES = [("a", 0.6), ("a", 0.6), ("b", 1.0)]


@pytest.mark.parametrize(
    ("confidences", "weight"),
    [
        ((1.0,), 1.0),
        ((0.75,), 0.5),  # 2c - 1
        ((0.75, None), 0.75),  # (0.75 + 1) / 2 = 0.875 of the votes
        ((0.75, 0.75), 0.5),
        ((0.5, 1.0), 0.5),
        ((0.2, 1.0), 0.5),  # less than a guess is a guess
    ],
)
def test_a_vote_counts_by_its_confidence(confidences, weight):
    rows = [{**pair(), "rater": i, "confidence": confidence} for i, confidence in enumerate(confidences)]
    assert made(data.Pairs(agreement="weights"), rows)[0]["weights"] == pytest.approx([weight])
    assert made(data.Pairs(agreement="smoothing"), rows)[0]["label_smoothing"] == pytest.approx([(1 - weight) / 2])
    ignored = data.Pairs(agreement="weights", columns={"confidence": None})
    assert made(ignored, rows)[0]["weights"] == [1.0]
    ranked = {"prompt": "p", "completions": ["x", "y"], "ranks": [1, 2]}
    rankings = [{**ranked, "rater": i, "confidence": confidence} for i, confidence in enumerate(confidences)]
    assert made(data.Rankings(agreement="weights"), rankings)[0]["weights"] == pytest.approx([weight])


def test_who_is_sure_outvotes_who_guesses():
    rows = [{**pair(preferred=answer), "rater": i, "confidence": c} for i, (answer, c) in enumerate(VOTES)]
    (row,) = made(data.Pairs(agreement="weights", margin=1.0), rows)
    chosen = row["completions"][row["better"][0]]
    assert chosen == pair()["completion_b"] and row["weights"] == pytest.approx([(1.0 - 0.2 - 0.2) / 3])
    assert row["margin"] == pytest.approx([(1.0 - 0.2 - 0.2) / 1.4])
    guess = {**pair(), "rater": 1, "confidence": 0.5}
    with pytest.raises(DataError, match="no row of the dataset type"):
        made(data.Pairs(agreement="weights"), [guess])  # a guess alone says nothing
    assert made(data.Pairs(), [{**guess, "confidence": 7}])  # nothing reads it
    with pytest.raises(DataError, match="`confidence` is 7.*columns.confidence=null"):
        made(data.Pairs(agreement="weights"), [{**guess, "confidence": 7}])


def test_ratings_count_by_their_confidences():
    rows = [{**rated("a", [5]), "rater": 1, "confidence": 0.75}, {**rated("b", [2]), "rater": 1}]
    assert made(data.Ratings(agreement="weights"), rows)[0]["weights"] == pytest.approx([0.5])
    more = [*rows, {**rated("a", [4]), "rater": 2}]  # 0.75 and 1 of it
    assert made(data.Ratings(agreement="weights"), more)[0]["weights"] == pytest.approx([0.75])
    rows[1]["confidence"] = 0.75
    assert made(data.Ratings(agreement="smoothing"), rows)[0]["label_smoothing"] == pytest.approx([0.375])
    thumbs = [
        {"prompt": "p", "completion": c, "thumb": up, "confidence": 0.75} for c, up in (("a", True), ("b", False))
    ]
    assert made(data.Thumbs(agreement="weights"), thumbs)[0]["weights"] == pytest.approx([0.25])


def test_agreement_needs_to_know_the_raters():
    with pytest.raises(
        DataError, match=r"`data.feedback.columns.rater=NAME`, or `data.feedback.drop_duplicates=false"
    ):
        made(data.Pairs(agreement="weights"), [pair()])
    (row,) = made(data.Pairs(agreement="weights", drop_duplicates=False), [pair(), pair(), pair(preferred="b")])
    assert row["weights"] == pytest.approx([1 / 3])


def test_options_that_a_stage_has_no_use_for_are_said(capsys):
    feedback = data.Pairs(margin=1.0, max_pairs=1)
    made(feedback, [pair()])
    assert "note:" not in capsys.readouterr().out
    made(feedback, [pair()], "preference")
    assert "note: `data.feedback.margin` changes nothing in rows of preference" in capsys.readouterr().out
    made(feedback, [pair()], "unpaired")
    assert "`data.feedback.margin`, `data.feedback.max_pairs` changes nothing" in capsys.readouterr().out


# ---- Augmentation ----


def test_duplicates_are_dropped_and_counted_but_not_other_raters_votes(capsys):
    assert len(made(data.Pairs(), [pair(rater=1), pair(rater=1), pair(rater=2)])) == 2
    assert "rows dropped: they repeat another one: 1" in capsys.readouterr().out
    assert len(made(data.Pairs(drop_duplicates=False), [pair(rater=1), pair(rater=1)])) == 2
    thumbs = [{"prompt": "p", "completion": "a", "thumb": up} for up in (True, True, False)]
    other = {"prompt": "p", "completion": "b", "thumb": True}
    labels = [row["label"] for row in made(data.Thumbs(), [*thumbs, other], "unpaired")]
    assert labels == [True, True]  # two of three people liked `a`: it isn't even


def test_a_cap_of_pairs_is_of_each_prompt(capsys):
    rows = [{"prompt": p, "completions": list("abcd"), "ranks": [1, 2, 3, 4]} for p in "pq"]
    capped = made(data.Rankings(max_pairs=2), rows)
    assert [len(row["better"]) for row in capped] == [2, 2]
    assert all(len(row["completions"]) == len({*row["better"], *row["worse"]}) for row in capped)
    assert "more than `max_pairs=2` of one prompt: 8" in capsys.readouterr().out
    same = [{**row, "prompt": "p", "rater": i} for i, row in enumerate(rows)]
    assert sum(len(row["better"]) for row in made(data.Rankings(max_pairs=2), same)) == 2


def test_negatives_are_other_prompts_completions_and_worse_than_the_best(capsys):
    rows = [pair(f"good {i}", f"bad {i}", prompt=f"p{i}") for i in range(6)]
    for row, given in zip(made(data.Pairs(negatives=2), rows), rows, strict=True):
        own = {given["completion_a"], given["completion_b"]}
        others = {worse for better, worse in wins(row) if better == given["completion_a"]} - own
        assert len(others) == 2 and len(row["completions"]) == 4 and len(row["better"]) == 3
    assert "completions of other prompts added as negatives: 12" in capsys.readouterr().out
    with pytest.raises(DataError, match="all rows have the same prompt"):
        made(data.Pairs(negatives=1), [pair()])


@pytest.mark.parametrize("feedback", ["rankings", "ratings"])
def test_negatives_and_the_cap_of_pairs_together(feedback):
    if feedback == "rankings":
        rows = [{"prompt": p, "completions": [p + c for c in "abcd"], "ranks": [1, 2, 3, 4]} for p in "pqrs"]
    else:
        rows = [rated(p + c, 5 - i, prompt=p) for p in "pqrs" for i, c in enumerate("abcd")]
    make = data.Rankings if feedback == "rankings" else data.Ratings
    negatives, seen = Counter(), 0
    for seed in range(20):
        for row in made(make(negatives=2, max_pairs=4), rows, seed=seed):
            assert len(row["better"]) == 4
            pairs = [(a, b) for a, b in wins(row) if b[0] != row["prompt"]]
            negatives.update(a[1] for a, _ in pairs)
            seen += len(pairs)
    assert set(negatives) == {"a"} and 60 < seen < 100  # a quarter of the 8 pairs a prompt, of which 4 stay: about 80


def test_the_order_of_completions_tells_nothing():
    rows = [{"prompt": f"p{i}", "completions": list("abcd"), "ranks": [1, 2, 3, 4]} for i in range(200)]
    places = Counter(row["completions"].index("a") for row in made(data.Rankings(), rows))
    assert set(places) == {0, 1, 2, 3} and max(places.values()) < 80
    kept = made(data.Rankings(shuffle=False), rows)
    assert all(row["completions"] == list("abcd") for row in kept)
    assert made(data.Rankings(), rows, seed=1) == made(data.Rankings(), rows, seed=1)
    assert made(data.Rankings(), rows, seed=1) != made(data.Rankings(), rows, seed=2)


def test_groups_of_k_and_the_same_comparisons_as_pairs():
    rows = [rated(f"t{i}", 1 + 4 * i / 9) for i in range(10)]
    groups = made(data.Ratings(group_size=4, rounds=2), rows)
    assert sorted(len(row["completions"]) for row in groups) == [3, 3, 3, 3, 4, 4]
    assert Counter(text for row in groups for text in row["completions"]) == {f"t{i}": 2 for i in range(10)}
    alone = made(data.Ratings(group_size=4, rounds=2, pairwise_rows=True), rows)
    assert all(len(row["completions"]) == 2 and len(row["better"]) == 1 for row in alone)
    assert set().union(*map(wins, alone)) == set().union(*map(wins, groups))
    assert len(made(data.Ratings(group_size=None), rows)[0]["better"]) == 45


# ---- Chats ----


def test_chats_and_text_beside_them():
    chat = [{"role": "user", "content": "p"}]
    row = {"prompt": chat, "completions": ["a", [{"role": "assistant", "content": "b"}]], "ranks": [1, 2]}
    (reward,) = made(data.Rankings(shuffle=False), [row], system_prompt="Be kind.")
    assert [turn["role"] for turn in reward["prompt"]] == ["system", "user"]
    assert [completion[0]["content"] for completion in reward["completions"]] == ["a", "b"]
    assert key_of(reward["completions"][0]) != key_of(reward["completions"][1])


# ---- Bad input ----


@pytest.mark.parametrize(
    ("feedback", "row", "message"),
    [
        (data.Pairs(), pair(preferred="c"), "`preferred` is 'c', not one of `a`, `b`, `tie`"),
        (data.Pairs(), pair(strength=-1), "`strength` is -1, where a number from 0"),
        (data.Pairs(), pair(strength="much"), "`strength` is 'much', where a number"),
        (data.Pairs(), pair(strength=float("nan")), "`strength` is nan, where a finite number"),
        (data.Pairs(), pair("x", " x"), "`completion_b` is the same as `completion_a`"),
        (data.Pairs(), pair(b=""), "`completion_b` is empty"),
        (data.Pairs(), {**pair(), "prompt": None}, "`prompt` is null"),
        (
            data.Pairs(columns=FLAGS),
            {"prompt": "p", "completion_a": "x", "completion_b": "y", "winner_a": 1, "winner_b": 1, "winner_tie": 0},
            r"`winner_a, winner_b, winner_tie` holds \[1, 1, 0\], where one should be true",
        ),
        (
            data.Pairs(turns=True),
            {"prompt": ["p", "q"], "completion_a": ["x"], "completion_b": ["u", "v"], "preferred": "a"},
            "`completion_a` has 1 turns for 2 of `prompt`",
        ),
        (
            data.Pairs(turns=True),
            {"prompt": '["p"]', "completion_a": "[null]", "completion_b": '["u"]', "preferred": "a"},
            r"`completion_a\[0\]` is null, where text should be",
        ),
        (
            data.Pairs(columns={"prompt": None}),
            {"completion_a": "one and two", "completion_b": "three", "preferred": "a"},
            "`completion_b` shares no prompt with `completion_a`",
        ),
        (data.Rankings(), {"prompt": "p", "completions": ["a"], "ranks": [1]}, "`completions` has 1, .* 2 or more"),
        (data.Rankings(), {"prompt": "p", "completions": ["a", "b"], "ranks": [1]}, "`ranks` has 1 for 2"),
        (data.Rankings(), {"prompt": "p", "completions": ["a", "b"], "ranks": [1, None]}, r"`ranks\[1\]` is null"),
        (data.Rankings(), {"prompt": "p", "completions": ["a", ""], "ranks": [1, 2]}, r"`completions\[1\]` is empty"),
        (data.Rankings(), {"prompt": "p", "completions": "a", "ranks": [1, 2]}, "`completions` is text, .* a list"),
        (
            data.Rankings(),
            {"prompt": "p", "completions": ["a", "b", "a"], "ranks": [1, 2, 3]},
            r"`completions\[2\]` is the same as `completions\[0\]`, and is ranked otherwise",
        ),
        (data.Ratings(), rated("a", 6), "`ratings` is 6, outside the scale from 1 to 5"),
        (data.Ratings(), rated("a", [3, 0]), "`ratings` is 0, outside the scale"),
        (data.Ratings(), rated("a", []), "`ratings` is an empty list"),
        (data.Ratings(), rated("a", None), "`ratings` is null, where a number"),
        (data.Ratings(), rated("a", [4, None]), r"`ratings\[1\]` is null, where a number"),
        (data.Edits(), {"prompt": "p", "original": "a", "edited": "a "}, "`edited` is the same as `original`"),
        (data.Thumbs(), {"prompt": "p", "completion": "a", "thumb": "meh"}, "`thumb` is 'meh', where true or false"),
        (
            data.Attributes(dimensions=["kind"]),
            {"prompt": "p", "completion": "a", "kind": 7},
            "`kind` is 7, outside the scale from -1 to 1",
        ),
    ],
)
def test_a_bad_row_is_named_by_place_and_field(feedback, row, message):
    with pytest.raises(DataError, match=f"1 malformed row:\n  rows, row 1: {message}"):
        made(feedback, [row])


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        ([[0, 1], [1, 0]], "`edges` contains a cycle"),
        ([[0, 2]], r"`edges\[0\]` is \[0, 2\], and the completions are 0 to 1"),
        ([0, 1], r"`edges\[0\]` is 0, where two indices"),
    ],
)
def test_a_bad_partial_order_is_named(edges, message):
    feedback = data.Rankings(columns={"ranks": None, "better": "edges"})
    with pytest.raises(DataError, match=message):
        made(feedback, [{"prompt": "p", "completions": ["a", "b"], "edges": edges}])


def test_bad_rows_can_be_dropped_and_are_counted(capsys):
    rows = made(data.Pairs(), [pair(), pair(preferred="c")], bad_rows="drop")
    assert len(rows) == 1 and "1 malformed row dropped" in capsys.readouterr().out


def test_files_whose_rows_say_too_little_are_one_clear_error():
    thumbs = [{"prompt": p, "completion": f"a {p}", "thumb": True} for p in "pqr"]
    with pytest.raises(DataError, match="no row of the dataset type `comparisons` .*stage=kto"):
        made(data.Thumbs(), thumbs)
    with pytest.raises(DataError, match="no row has a score for the attribute `true`.*data.feedback.dimensions"):
        rows = [{"prompt": "p", "completion": "a", "kind": 1, "true": None}]
        made(data.Attributes(dimensions=["kind", "true"]), rows)
    with pytest.raises(DataError, match=r"no column `true`, but .*`data.feedback.dimensions=\[NAME,...\]`"):
        made(data.Attributes(dimensions=["true"]), [{"prompt": "p", "completion": "a", "kind": 1}])
    with pytest.raises(DataError, match="has no column `ranks`, but .*`data.feedback.columns.ranks=NAME`"):
        made(data.Rankings(), [{"prompt": "p", "completions": ["a", "b"], "order": [1, 2]}])
    with pytest.raises(DataError, match="all completions tie: 1"):
        made(data.Pairs(), [pair(preferred="tie")])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: data.Pairs(columns={"rank": "r"}), "`data.feedback.columns.rank` is no column of pairs"),
        (lambda: data.Rankings(columns={"prompt": None}), "`data.feedback.columns.prompt` is null"),
        (lambda: data.Pairs(margin=-1), "`data.feedback.margin` is -1. Set it to 0 or more"),
        (lambda: data.Pairs(max_pairs=0), "`data.feedback.max_pairs` is 0. Set it to 1 or more"),
        (lambda: data.Pairs(agreement="votes"), "Use weights, smoothing or null"),
        (lambda: data.Rankings(columns={"ranks": None}), "`data.feedback.columns.better` has to name the column"),
        (lambda: data.Pairs(max_pairs="x"), "`data.feedback.max_pairs` is 'x' and must be an integer or null."),
        (lambda: data.Pairs(answers=5), "`data.feedback.answers` is 5 and must be a list."),
        (lambda: data.Pairs(answers=["a", "A", "tie"]), "`data.feedback.answers` is .* different values."),
        (lambda: data.Pairs(shuffle="no"), "`data.feedback.shuffle` is 'no' and must be true or false."),
        (lambda: data.Pairs(margin=float("nan")), "`data.feedback.margin` is nan and must be a number."),
        (
            lambda: data.Pairs(columns={"prompt": 5}),
            r"`data.feedback.columns.prompt` is 5 and must be text in quotes or a list or null",
        ),
        (lambda: data.Ratings(scale=["a", "b"]), r"`data.feedback.scale\[0\]` is 'a' and must be a number."),
        (lambda: data.Ratings(good_above="x"), "`data.feedback.good_above` is 'x' and must be a number or null."),
        (lambda: data.Attributes(weights=5), "`data.feedback.weights` is 5 and must be names and values or null."),
        (lambda: data.Attributes(dimensions=["kind", "kind"]), "`data.feedback.dimensions` is .* each column once"),
        (lambda: data.Attributes(dimensions=["prompt"]), "and none of `prompt`, `completion`."),
        (lambda: data.Ratings(scale=[5, 1]), r"`data.feedback.scale` is \[5, 1\]"),
        (lambda: data.Ratings(group_size=1), "`data.feedback.group_size` is 1. Set it to 2 or more"),
        (lambda: data.Ratings(use="regression", margin=1), "`data.feedback.margin` would do nothing"),
        (lambda: data.Attributes(weights={"fun": 1}), "`data.feedback.weights` names `fun`"),
        (lambda: made(data.Pairs(), [pair()], row_type="preference"), "`data.feedback.columns`"),
    ],
)
def test_options_that_can_not_be_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
