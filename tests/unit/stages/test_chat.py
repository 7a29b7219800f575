"""Talking to policies (`stage=chat`) and completions of a file of prompts (`stage=generate`)."""

import functools
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate

from rlhf_trl.checks import find_problems
from rlhf_trl.errors import ConfigError, DataError
from rlhf_trl.evaluation.generation import Policy, as_prompt, generation_config, sample
from rlhf_trl.models.loading import load_model
from rlhf_trl.models.tokenizers import load_tokenizer
from rlhf_trl.rewards.combine import minimum, product, threshold, weighted_sum
from rlhf_trl.rewards.function import FunctionReward
from rlhf_trl.runs.paths import named_policies, resolve_path
from rlhf_trl.stages.chat import Answer, read_lines, talk
from rlhf_trl.stages.generate import completions, prompts_of, read_prompts
from rlhf_trl.tasks.demo.data import load as load_demo
from rlhf_trl.tasks.demo.gold import gold_reward
from tests.helpers.tiny import save_model

ROOT = Path(__file__).parents[3]
GREEDY = generation_config(0.0, 24)


def policy(name: str, path: str, chats: bool = True) -> Policy:
    tokenizer = load_tokenizer(path)
    if not chats:
        tokenizer.chat_template = None
    return Policy(name, path, load_model(path).eval(), tokenizer)


@pytest.fixture(scope="module")
def sft():
    return policy("sft", resolve_path("demo:sft", None, ""))


@pytest.fixture(scope="module")
def base():
    return policy("base", resolve_path("demo:base", None, ""))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Return a policy with another tokenizer, without a chat template."""
    return policy("tiny", save_model(tmp_path_factory.mktemp("tiny")), chats=False)


@pytest.fixture(scope="module")
def questions():
    return [row["prompt"][-1]["content"] for row in load_demo(dataset_type="prompt", seed=0)["eval"].to_list()[:3]]


@pytest.fixture(scope="module")
def gold():
    return FunctionReward(gold_reward, name="gold")


def conversation(policies, lines, rewards=(), **options) -> str:
    out = io.StringIO()
    talk(policies, rewards, GREEDY, lines=iter(lines), out=out, **options)
    return out.getvalue()


def expected(policy: Policy, prompt) -> str:
    ids = torch.tensor([policy.ids(prompt)])
    with torch.no_grad():
        written = policy.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24,
            eos_token_id=policy.tokenizer.eos_token_id, pad_token_id=policy.tokenizer.pad_token_id,
        )  # fmt: skip
    return policy.tokenizer.decode(written[0, ids.size(1) :], skip_special_tokens=True)


# ---- Chat ----


def test_an_answer_is_streamed_piece_by_piece(sft, questions, monkeypatch):
    pieces = []

    class Out(io.StringIO):
        def write(self, text):
            pieces.append(text)
            return super().write(text)

    out = Out()
    talk([sft], [], GREEDY, lines=iter([questions[0]]), out=out)
    answer = expected(sft, as_prompt(questions[0], sft))
    assert out.getvalue().splitlines()[1:] == [answer]
    assert len([piece for piece in pieces if piece.strip()]) > 4  # the first line, and a word at a time


def test_scores_are_told_on_request_or_always(sft, questions, gold):
    prompt = as_prompt(questions[0], sft)
    (value,) = gold_reward([prompt], [[{"role": "assistant", "content": expected(sft, prompt)}]])
    told = conversation([sft], ["/score", questions[0], "/score"], [gold]).splitlines()
    assert told[1] == "There is no answer yet." and told[-1] == f"  {value:.2f}"
    assert conversation([sft], [questions[0]], [gold], always_score=True).splitlines()[-1] == f"  ({value:.2f})"
    assert "Start with reward=model" in conversation([sft], [questions[0], "/score"])
    # A reward that doesn't know the prompt is no end
    odd = conversation([sft], ["zzz", "/score", questions[0], "/score"], [gold]).splitlines()
    assert odd[2].startswith("  no score: The gold reward knows") and odd[-1] == f"  {value:.2f}"


def test_several_rewards_are_summed_by_weight(sft, questions):
    one = FunctionReward(lambda completions, **_: [1.0] * len(completions), weight=2.0, name="one")
    none = FunctionReward(lambda completions, **_: [None] * len(completions), name="other")
    assert (
        conversation([sft], [questions[0], "/score"], [one, none]).splitlines()[-1] == "  2.00: 1.00 one, none other"
    )


def test_several_policies_answer_side_by_side_each_with_its_own_tokenizer(sft, base, tiny, questions, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    seen = []
    ids = FunctionReward(lambda completion_ids, **_: seen.append(completion_ids) or [len(completion_ids[0])], name="n")
    told = conversation([sft, base, tiny], ["a b c", "/score"], [ids], always_score=True)
    lines = told.splitlines()
    assert "3 answers side by side" in lines[0] and lines[1].split(")")[0].startswith("sft (")
    assert [name in lines[1] for name in ("sft (", "base (", "tiny (")] == [True] * 3
    words = expected(tiny, "a b c").split()
    assert words and all(word in told for word in words)
    assert expected(sft, as_prompt("a b c", sft)).split()[0] in lines[3]
    assert {line.split(":")[0].strip() for line in lines[-3:]} <= {"sft", "base", "tiny"}
    assert len(seen) == 6


def test_turns_are_remembered_on_request_only(sft, questions):
    first, second = questions[:2]
    answer = expected(sft, as_prompt(first, sft))
    history = [{"role": "user", "content": first}, {"role": "assistant", "content": answer}]
    with_history = expected(sft, [*history, {"role": "user", "content": second}])
    assert with_history != expected(sft, as_prompt(second, sft))
    lines = [first, second, "/again", "/new", second]
    told = conversation([sft], lines, remember=True).splitlines()
    assert told[1:] == [
        answer, with_history, with_history, "(a new conversation)", expected(sft, as_prompt(second, sft))
    ]  # fmt: skip
    assert conversation([sft], [first, second]).splitlines()[2] == expected(sft, as_prompt(second, sft))


@pytest.mark.parametrize(
    "lines",
    [
        ["first", "second!", "/again", "third"],  # stopped, and asked again
        ["first", "second", "/again!", "third"],  # answered; another answer was stopped, and the first one holds
        ["first", "second", "/again!", "/again", "third"],
        ["first", "second", "/again", "/again", "third"],
    ],
)
def test_ctrl_c_and_again_forget_nothing_else(sft, questions, monkeypatch, lines):
    generate, stops = sft.model.generate, [line.endswith("!") for line in lines]
    asked = dict(zip(("first", "second", "third"), questions, strict=False))
    seen = []

    def maybe(**kwargs):
        if stops.pop(0):
            raise KeyboardInterrupt
        return generate(**kwargs)

    monkeypatch.setattr(sft.model, "generate", maybe)
    policy = Watched(*sft)
    policy.seen = seen
    conversation([policy], [asked.get(line.strip("!"), line.strip("!")) for line in lines], remember=True)
    assert seen[-1] == [asked["first"], asked["second"], asked["third"]]
    assert all(turns == [asked["first"], asked["second"]] for turns in seen[1:-1])


class Watched(Policy):
    """A policy that remembers which turns it was asked with."""

    def ids(self, prompt):
        self.seen.append([turn["content"] for turn in prompt if turn["role"] == "user"])
        return super().ids(prompt)


def test_a_system_prompt_stands_first(sft, tiny):
    assert as_prompt("hello", tiny, "be kind") == "be kind\n\nhello"
    assert [turn["role"] for turn in as_prompt("hello", sft, "be kind")] == ["system", "user"]


def test_ctrl_c_stops_an_answer_and_then_the_conversation(sft, questions, monkeypatch, capsys):
    generate, calls = sft.model.generate, []

    def interrupted(**kwargs):
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return generate(**kwargs)

    monkeypatch.setattr(sft.model, "generate", interrupted)
    told = conversation([sft], [questions[0], questions[0]]).splitlines()
    assert "(stopped)" in told and told[-1] == expected(sft, as_prompt(questions[0], sft))

    def pressed(prompt):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", pressed)
    assert list(read_lines(io.StringIO())) == []


def test_unknown_commands_and_help(sft):
    told = conversation([sft], ["/scroe", "/help", "", "/quit", "a"])
    assert "There is no /scroe. Did you mean `/score`?" in told
    assert all(f"  {name}" in told for name in ("/score", "/again", "/new", "/help", "/quit"))
    assert told.splitlines()[-1].startswith("  /quit")


def test_an_answer_has_its_text(sft):
    ids = sft.tokenizer("It depends.", add_special_tokens=False)["input_ids"] + [sft.tokenizer.eos_token_id]
    assert Answer(sft, as_prompt("?", sft), ids).text == "It depends."


def run(tmp_path, *words: str, given: str | None = None):
    command = [sys.executable, "train.py", f"runs_dir={tmp_path}/runs", *words]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=ROOT, env=env, input=given, capture_output=True, text=True, timeout=300)


def test_chat_works_at_once_in_a_pipe_and_leaves_nothing(tmp_path, questions):
    done = run(tmp_path, "stage=chat", given=f"{questions[0]}\n/score\n")
    assert done.returncode == 0, done.stderr
    first, *told = done.stdout.splitlines()
    assert first == "rlhf_trl chat"
    assert told[0].startswith("demo:sft: one prompt a line") and told[1] == f"> {questions[0]}"
    assert told[2].strip() and told[3] == "> /score" and -4 <= float(told[4]) <= 4
    assert not (tmp_path / "runs").exists()


# ---- Names of policies ----


def test_policies_are_named_by_a_list_or_a_mapping(compose, tmp_path):
    assert named_policies(["sft", "runs/x/ppo", "demo:base"]) == {
        "sft": "sft", "ppo": "runs/x/ppo", "base": "demo:base"
    }  # fmt: skip
    assert named_policies({"sft": "sft", "dpo": None}) == {"sft": "sft"}
    assert named_policies(["a/sft", "b/sft"]) == {"a/sft": "a/sft", "b/sft": "b/sft"}
    assert named_policies({"old": "sft"}) == {"old": "sft"}
    for run_name in ("sft", "ppo"):
        (tmp_path / "p" / run_name).mkdir(parents=True)
        (tmp_path / "p" / run_name / "run.json").write_text('{"stage": "sft", "status": "done"}')
    where = ["stage=chat", f"runs_dir={tmp_path}", "project=p"]
    for given in ("[sft,ppo]", "{old: sft, new: ppo}", "[demo:sft]"):
        assert find_problems(compose(*where, f"stage.policies={given}")) == []
    for given in ("[sft,pppo]", "{new: pppo}"):
        (problem,) = find_problems(compose(*where, f"stage.policies={given}"))
        assert "no such run" in problem and "Did you mean `ppo`?" in problem


@pytest.mark.parametrize("option", ["n=0", "batch_size=0", "temperature=-1", "max_completion_length=0"])
def test_numbers_out_of_range_are_told_before_a_model_loads(compose, option):
    (problem,) = find_problems(compose("stage=generate", f"stage.{option}"))
    assert f"`stage.{option.split('=')[0]}` is" in problem


# ---- Generate ----


def write(path: Path, *rows: dict) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def generated(compose, tmp_path, *words: str) -> list[dict]:
    cfg = compose("stage=generate", f"runs_dir={tmp_path}", "stage.max_completion_length=24", *words)
    instantiate(cfg.stage.run)(cfg)
    return [json.loads(line) for line in Path(cfg.stage.output).read_text().splitlines()]


def test_completions_of_a_file_have_rewards_and_what_the_row_held(compose, tmp_path, questions, sft):
    prompts = write(tmp_path / "p.jsonl", *[{"prompt": text, "id": i} for i, text in enumerate(questions)])
    rows = generated(compose, tmp_path, f"stage.prompts={prompts}", "stage.n=2", "stage.batch_size=4")
    assert [(row["id"], row["sample"]) for row in rows] == [(i, j) for i in range(3) for j in range(2)]
    for row in rows:
        assert row["prompt"] == questions[row["id"]]
        chat = [as_prompt(row["prompt"], sft)], [[{"role": "assistant", "content": row["completion"]}]]
        assert row["rewards"] == {"gold": pytest.approx(gold_reward(*chat)[0])}
        assert row["reward"] == row["rewards"]["gold"]
        assert row["tokens"] <= 24 and (row["ended"] or row["tokens"] == 24)
    # The very samples of the evaluation's sampler, a seed a batch
    ids = [sft.ids(as_prompt(questions[i], sft)) for i in (0, 0, 1, 1)]
    written = sample(sft.model, sft.tokenizer, ids, 24, 1.0, 4, seed=42)
    assert [row["tokens"] for row in rows[:4]] == [len(row) for row in written]
    assert [row["completion"] for row in rows[:4]] == sft.tokenizer.batch_decode(written, skip_special_tokens=True)


def test_the_seed_decides(compose, tmp_path):
    words = ("stage.max_prompts=6", "stage.n=2", "reward=none")
    a, b, c = (
        generated(compose, tmp_path, f"run_name=r{i}", f"seed={seed}", *words) for i, seed in enumerate((1, 1, 2))
    )
    assert a == b and a != c and len(a) == 12
    assert "reward" not in a[0] and a[0]["prompt"][0]["role"] == "user"


def test_text_models_go_on_with_a_text(tiny):
    count = FunctionReward(lambda completions, **_: [float(len(text)) for text in completions], name="count")
    rows = list(completions(tiny, [{"prompt": "a b"}], [count], 3, 1.0, 5, 2, seed=0))
    assert len(rows) == 3 and all(row["reward"] == len(row["completion"]) for row in rows)
    with pytest.raises(ConfigError, match="has no chat template"):
        list(completions(tiny, [{"prompt": "a b"}], [], 1, 1.0, 5, 2, seed=0, to_chat=True))


def test_a_reward_that_is_no_number_is_told_from_one_that_does_not_apply(tiny, sft, questions):
    odd = FunctionReward(lambda completions, **_: [math.nan, None, -math.inf][: len(completions)], name="odd")
    one = FunctionReward(lambda completions, **_: [1.0] * len(completions), name="one")
    rows = list(completions(tiny, [{"prompt": "a"}], [odd, one], 3, 1.0, 3, 3, seed=0))
    rows = [json.loads(json.dumps(row, allow_nan=False)) for row in rows]
    assert [row["rewards"]["odd"] for row in rows] == ["NaN", None, "-Infinity"]
    assert [row["reward"] for row in rows] == ["NaN", 1.0, "NaN"]
    assert (
        conversation([sft], [questions[0], "/score"], [odd, one]).splitlines()[-1] == "  no number: nan odd, 1.00 one"
    )


def test_several_rewards_are_combined_as_in_training(tiny, sft, questions):
    rewards = [
        FunctionReward(lambda completions, value=value, **_: [value] * len(completions), name=name)
        for name, value in (("two", 2.0), ("three", 3.0))
    ]
    at_least = functools.partial(threshold, constraints={"two": 2.5})
    for combine, expected in ((weighted_sum, 5.0), (minimum, 2.0), (product, 6.0), (at_least, -0.5)):
        (row,) = completions(tiny, [{"prompt": "a"}], rewards, 1, 1.0, 3, 3, seed=0, combine=combine)
        assert row["reward"] == expected
        told = conversation([sft], [questions[0], "/score"], rewards, combine=combine)
        assert told.splitlines()[-1] == f"  {expected:.2f}: 2.00 two, 3.00 three"


def test_rewards_that_cannot_be_combined_do_not_end_a_conversation(sft, questions):
    rewards = [
        FunctionReward(lambda completions, value=value, **_: [value] * len(completions), name=name)
        for name, value in (("two", 2.0), ("below", -3.0))
    ]
    told = conversation([sft], [questions[0], "/score", "/quit"], rewards, combine=product)
    assert "no score: The reward `below` is -3" in told


def test_columns_reach_the_rewards(tiny):
    seen = FunctionReward(lambda completions, target, **_: [0.0 if t is None else t for t in target], name="seen")
    prompts = [{"prompt": "a", "target": 2.0}, {"prompt": "b"}]
    assert [row["reward"] for row in completions(tiny, prompts, [seen], 1, 1.0, 3, 2, seed=0)] == [2.0, 0.0]


def test_an_existing_file_is_not_written_over(compose, tmp_path, questions):
    output = tmp_path / "out.jsonl"
    output.write_text("precious")
    words = (f"stage.output={output}", "stage.max_prompts=1")
    with pytest.raises(ConfigError, match="which exists. Name another file"):
        generated(compose, tmp_path, *words)
    assert output.read_text() == "precious" and not (tmp_path / "default/generate/run.json").exists()
    assert len(generated(compose, tmp_path, *words, "overwrite=true")) == 1


def test_a_reward_that_fails_leaves_no_half_file(compose, tmp_path):
    prompts = write(tmp_path / "p.jsonl", {"prompt": "nobody asked this"})
    with pytest.raises(ConfigError, match="gold reward knows.*without rewards: `reward=none`"):
        generated(compose, tmp_path, f"stage.prompts={prompts}")
    assert not list((tmp_path / "default/generate").glob("*.jsonl"))
    assert not (tmp_path / "default/generate/run.json").exists()  # the same command may be typed again
    assert len(generated(compose, tmp_path, f"stage.prompts={prompts}", "reward=none")) == 1


def test_bad_prompts_are_named_by_file_and_row(tmp_path):
    bad = write(tmp_path / "bad.jsonl", {"prompt": "a"}, {"promt": "b"}, {"prompt": " "}, {"prompt": [{"role": "x"}]})
    with pytest.raises(DataError) as error:
        read_prompts(bad)
    lines = str(error.value).splitlines()
    assert lines[0].startswith("3 rows of `stage.prompts`")
    assert lines[1].endswith("bad.jsonl, line 2: `prompt` is missing")
    assert lines[2].endswith("bad.jsonl, line 3: `prompt` is empty")
    assert "line 4: `prompt[0].role`" in lines[3]
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match="empty.jsonl.* holds no prompt"):
        read_prompts(str(tmp_path / "empty.jsonl"))
    with pytest.raises(DataError, match="names no file"):
        read_prompts(str(tmp_path / "missing.jsonl"))
    csv = tmp_path / "p.csv"
    csv.write_text("prompt,id\nhello,1\n")
    assert read_prompts([str(csv)])[0] == {"prompt": "hello", "id": "1"}


def test_prompts_are_the_held_out_ones_of_the_data_unless_files_are_named(compose, tmp_path):
    cfg = compose(f"runs_dir={tmp_path}", "stage=generate", "stage.max_prompts=5", "data.max_eval_samples=7")
    held_out = instantiate(cfg.data)(dataset_type="prompt", seed=cfg.seed)["eval"]
    assert prompts_of(cfg, cfg.stage.max_prompts) == held_out.to_list()[:5]
