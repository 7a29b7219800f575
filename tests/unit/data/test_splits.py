"""Splits: which prompts are held out depends on the prompts alone, in every stage, format and kind of feedback."""

import json

import pytest
from omegaconf import OmegaConf

from rlhf_trl import data
from rlhf_trl.build import demonstrations
from rlhf_trl.data.build import build_dataset
from rlhf_trl.data.dataset_types import SOURCES
from rlhf_trl.data.row_types import row_types_in
from rlhf_trl.data.splits import held_out_keys, hold_out, prompt_key, prompt_keys
from rlhf_trl.errors import DataError
from rlhf_trl.runs.paths import conf_dir
from tests.helpers.tiny import make_tokenizer

SYSTEM = {"role": "system", "content": "Be brief."}
PROMPTS = [f"What is {i}?" for i in range(100)]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


# What one person may have in a file of each format. Of every third prompt all that there is is bad.
ROW_TYPES = {
    "preference": lambda i, p: {"prompt": p, "chosen": "yes", "rejected": "no"},
    "preference, conversations": lambda i, p: {
        "chosen": [user(p), assistant("yes")],
        "rejected": [user(p), assistant("no")],
    },
    "preference, odd spelling": lambda i, p: {"prompt": f"{p.upper()}  ", "chosen": "yes", "rejected": "no"},
    "prompt_completion": lambda i, p: {"prompt": p, "completion": "yes"},
    "prompt_completion, chat": lambda i, p: {"prompt": [user(p)], "completion": [assistant("yes")]},
    "prompt_completion, system": lambda i, p: {"prompt": [SYSTEM, user(p)], "completion": [assistant("yes")]},
    "messages": lambda i, p: {"messages": [user(p + "\n"), assistant("yes")]},
    "unpaired": lambda i, p: {"prompt": p, "completion": "yes", "label": bool(i % 3)},
    "prompt": lambda i, p: {"prompt": p, "answer": i},
}
FEEDBACK = {
    "pairs": (
        data.Pairs(negatives=1),
        lambda i, p: {"prompt": p, "completion_a": "x", "completion_b": f"y{i}", "preferred": "a" if i % 3 else "tie"},
    ),
    "rankings": (
        data.Rankings(max_pairs=1),
        lambda i, p: {"prompt": [user(p)], "completions": ["x", f"y{i}"], "ranks": [1, 2 if i % 3 else 1]},
    ),
    "edits": (data.Edits(), lambda i, p: {"prompt": p, "original": "x", "edited": "y"}),
    "ratings": (
        data.Ratings(min_gap=1),
        lambda i, p: [{"prompt": p, "completion": f"{c}", "ratings": c if i % 3 else 1} for c in (1, 4, 5)],
    ),
    "thumbs": (
        data.Thumbs(),
        lambda i, p: [{"prompt": p, "completion": f"{c}", "thumb": bool(i % 3 and c)} for c in (0, 1)],
    ),
    "attributes": (
        data.Attributes(dimensions=["kind"], use="pairs"),
        lambda i, p: [{"prompt": p, "completion": f"{c}", "kind": c if i % 3 else None} for c in (-1, 1)],
    ),
}
CASES = [(name, None, row, {}) for name, row in ROW_TYPES.items()]
CASES += [(name, feedback, row, {}) for name, (feedback, row) in FEEDBACK.items()]
CASES += [
    (f"{name}, system_prompt", feedback, row, {"to_chat": True, "system_prompt": "Be brief."})
    for name, feedback, row, _ in CASES
]


def rows_of(row, prompts=PROMPTS):
    made = [row(PROMPTS.index(prompt), prompt) for prompt in prompts]
    return [one for many in made for one in (many if isinstance(many, list) else [many])]


def named(rows):
    return [("file", [(f"row {i}", row) for i, row in enumerate(rows)])]


def load(dataset_type, rows, held_out=None, **options):
    return build_dataset(dataset_type, 0, named(rows), None if held_out is None else named(held_out), **options)


@pytest.fixture(scope="module")
def dataset_types(compose) -> set[str]:
    """Return the types that the stages ask for."""
    stages = [compose(f"stage={path.stem}").stage for path in conf_dir().glob("stage/*.yaml")]
    return {stage.dataset_type for stage in stages if "dataset_type" in stage}


@pytest.mark.parametrize(("eval_size", "count"), [(0.2, 18), (10, 10)])
@pytest.mark.parametrize(("name", "feedback", "row", "options"), CASES, ids=[case[0] for case in CASES])
def test_every_stage_holds_the_same_prompts_out(dataset_types, name, feedback, row, options, eval_size, count):
    expected = hold_out(map(prompt_key, PROMPTS), eval_size)
    assert len(expected) == count
    options = options | {"feedback": feedback, "eval_size": eval_size}
    rows, some = rows_of(row), PROMPTS[::2]
    last = next(key for key in reversed(rows[0]) if key != "prompt")
    row_types = row_types_in(rows[0])
    served = {each for each in dataset_types if feedback or {*SOURCES[each]} & {*row_types}}
    for dataset_type in served:
        loaded = load(dataset_type, rows, max_samples=60, max_eval_samples=8, **options)
        assert held_out_keys(loaded) == expected, dataset_type
        loaded = load(dataset_type, [*rows, {**rows[0], last: {"no": "thing"}}], bad_rows="drop", **options)
        assert held_out_keys(loaded) == expected, dataset_type
        assert set(prompt_keys(loaded["eval"])) <= expected, dataset_type
        assert not set(prompt_keys(loaded["train"])) & expected, dataset_type
        if eval_size < 1:  # another file with some of the prompts
            loaded = load(dataset_type, rows_of(row, some), **options)
            assert held_out_keys(loaded) == expected & {*map(prompt_key, some)}, dataset_type
    assert len(served) >= (len(dataset_types) if feedback else 1)


def test_prompts_that_ask_the_same():
    key = prompt_key("What is caf\u00e9?")
    same = ["  what  IS cafe\u0301?\n", [user("What is caf\u00e9? ")], [SYSTEM, user("what is caf\u00e9?")]]
    assert [prompt_key(prompt) == key for prompt in same] == [True, True, True]
    other = ["What is cafe?", [user("What is caf\u00e9?"), assistant("A place."), user("Where?")], [user("What")]]
    assert [prompt_key(prompt) == key for prompt in other] == [False, False, False]


def test_rows_labelled_false_do_not_move_the_split():
    # Of each prompt a bad answer, of half of them a good one too: sft sees half of the prompts, kto and ppo all
    rows = [{"prompt": p, "completion": "x", "label": False} for p in PROMPTS]
    rows += [{"prompt": p, "completion": "y", "label": True} for p in PROMPTS[:50]]
    for eval_size in (0.2, 20):
        sides = {
            dataset_type: load(dataset_type, rows, eval_size=eval_size)
            for dataset_type in ("prompt_completion", "prompt", "unpaired")
        }
        trained = set(prompt_keys(sides["prompt_completion"]["train"]))
        assert trained and not trained & set(prompt_keys(sides["prompt"]["eval"]))
        assert not trained & set(prompt_keys(sides["unpaired"]["eval"]))
        trained = set(prompt_keys(sides["prompt"]["train"]))
        assert trained and not trained & set(prompt_keys(sides["prompt_completion"]["eval"]))


def test_rows_labelled_false_do_not_move_a_split_by_row():
    rows = [{"prompt": "Review:", "completion": f"{i}", "label": i % 2 == 1} for i in range(100)]
    for eval_size in (0.2, 20):
        sft, kto = (
            load(dataset_type, rows, eval_size=eval_size, split_by="row")
            for dataset_type in ("prompt_completion", "unpaired")
        )
        held_out = [row["completion"] for row in kto["eval"] if row["label"]]
        assert sft["eval"]["completion"][:] == held_out and 0 < len(held_out) < 20
    assert len(kto["eval"]) == 20


def test_training_rows_leave_out_the_prompts_of_evaluation_files():
    rows = rows_of(ROW_TYPES["unpaired"])
    asked = [{"prompt": [SYSTEM, user(p.upper())], "completion": "no", "label": False} for p in PROMPTS[:10]]
    # The last prompt's only row is malformed where a completion is read
    held_out = [*asked, {"prompt": [user(PROMPTS[10])], "completion": None, "label": True}]
    held_out += [{"prompt": [user("Why?")], "completion": "yes", "label": True}]
    for dataset_type in ("prompt_completion", "unpaired", "prompt"):
        loaded = load(dataset_type, rows, held_out, bad_rows="drop", to_chat=True)
        assert set(prompt_keys(loaded["train"])) == {
            prompt_key(p) for i, p in enumerate(PROMPTS) if i > 10 and (i % 3 or dataset_type != "prompt_completion")
        }


def test_a_mixture_keeps_what_one_source_holds_out_from_all(tmp_path):
    own, other = rows_of(ROW_TYPES["unpaired"]), rows_of(ROW_TYPES["prompt_completion"])
    expected = hold_out(map(prompt_key, PROMPTS), 0.2)
    sources = {
        # A limit and rows labelled false leave few of the prompts that are held out in `eval`
        "own": lambda dataset_type, seed: build_dataset(
            dataset_type, seed, named(own), eval_size=0.2, max_eval_samples=2
        ),
        "other": lambda dataset_type, seed: build_dataset(dataset_type, seed, named(other)),
    }
    for dataset_type in ("prompt_completion", "prompt"):
        mixed = data.mix(dataset_type, 0, sources)
        assert not set(prompt_keys(mixed["train"])) & expected and len(mixed["eval"]) == 2
        assert (
            held_out_keys(
                data.mix(dataset_type, 0, {"inner": lambda dataset_type, seed: data.mix(dataset_type, seed, sources)})
            )
            == expected
        )


def test_a_side_without_a_row_of_use_is_an_error():
    rows = [{"prompt": p, "completion": "x", "label": p == PROMPTS[0]} for p in PROMPTS]
    with pytest.raises(DataError, match="no row of use to this stage is left for `(eval|train)`.*eval_size"):
        load("prompt_completion", rows, eval_size=0.2)


def test_demonstrations_beside_ppo_have_no_held_out_prompts(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows_of(ROW_TYPES["prompt_completion"])))
    node = {"_target_": "rlhf_trl.data.load_files", "_partial_": True, "paths": str(path)}  # no split of its own
    dataset = load("prompt", rows_of(ROW_TYPES["messages"]), eval_size=0.2)
    cfg = OmegaConf.create({"ptx_data": node, "data": {"split_by": "prompt"}, "seed": 0})
    rows = demonstrations(cfg, dataset, make_tokenizer())
    assert len(rows) == 82 and not set(prompt_keys(rows)) & set(prompt_keys(dataset["eval"]))
    assert "ptx_data: 18 rows dropped whose prompts are held out" in capsys.readouterr().out
    cfg.data.split_by = "row"
    assert len(demonstrations(cfg, dataset, make_tokenizer())) == 100
