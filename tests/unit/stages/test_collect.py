"""Candidates and questions by `stage=collect`."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import rlhf_trl.stages.collect as stage
from rlhf_trl.checks import find_problems
from rlhf_trl.data.messages import as_chat
from rlhf_trl.errors import ConfigError
from rlhf_trl.labels.candidates import read_candidates
from rlhf_trl.labels.store import read
from rlhf_trl.rewards.model import ModelReward
from rlhf_trl.runs.paths import resolve_path
from rlhf_trl.runs.record import read_run
from tests.helpers.architectures import save_architecture
from tests.helpers.killed_collection import kill_collections
from tests.helpers.tiny import CHAT_TEMPLATE

FEW = ("stage=collect", "project=test", "stage.max_prompts=6", "stage.n=2", "stage.batch_size=4")


def collect(cfg) -> Path:
    instantiate(cfg.stage.run)(cfg)
    return Path(cfg.run_dir, "candidates.jsonl")


@pytest.fixture(scope="module")
def whole(compose, tmp_path_factory):
    """Return the config of a collection from two policies and its candidates."""
    words = [*FEW, "reward=demo", "select=best_worst", "stage.budget=4"]
    words += ["stage.policies={base: 'demo:base', sft: 'demo:sft'}", "stage.sampling={base: {n: 1, top_p: 0.9}}"]
    words += ["stage.max_completion_length=24"]
    runs = tmp_path_factory.mktemp("runs")
    return words, collect(compose(*words, f"runs_dir={runs}"))


def test_candidates_say_where_they_come_from_and_what_they_are_worth(whole):
    rows = read_candidates(whole[1])
    assert len(rows) == 6 and sum(len(row.questions) for row in rows) == 4
    found = [each for row in rows for each in row.candidates]
    assert {each.policy for each in found} == {"base", "sft"}
    sampling = {each.policy: each.sampling for each in found}
    assert sampling["base"] == {"temperature": 1.0, "top_p": 0.9, "max_new_tokens": 24}
    assert sampling["sft"] == {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 24}
    for row in rows:
        assert len({json.dumps(each.completion) for each in row.candidates}) == len(row.candidates)
        scores = [each.scores["gold"][0] for each in row.candidates]
        for first, second in row.questions:
            assert scores[first] == max(scores) and scores[second] == min(scores)


def test_candidates_that_another_reward_scored_are_not_resumed(compose):
    plans = [stage.plan_of([], {}, compose(*FEW, *words)) for words in ([], [], ["reward=demo"])]
    plans.append(stage.plan_of([], {}, compose(*FEW, "stage.system_prompt=Hm")))
    assert plans[0] == plans[1] and len(set(plans)) == 3


def test_a_killed_collection_resumes_with_the_batches_that_are_left(whole, compose, tmp_path, monkeypatch):
    words, expected = whole
    drawn, sample = [], stage.sample

    def killed(*args, **kwargs):
        if len(drawn) == 2:
            raise MemoryError
        drawn.append(kwargs["seed"])
        return sample(*args, **kwargs)

    monkeypatch.setattr(stage, "sample", killed)
    with pytest.raises(MemoryError):
        collect(compose(*words, f"runs_dir={tmp_path}"))
    assert read_run(tmp_path / "test" / "collect").status == "failed"
    assert not (tmp_path / "test" / "collect" / "candidates.jsonl").exists()
    monkeypatch.setattr(
        stage, "sample", lambda *args, **kwargs: drawn.append(kwargs["seed"]) or sample(*args, **kwargs)
    )
    again = collect(compose(*words, f"runs_dir={tmp_path}", "resume=true"))
    assert again.read_bytes() == expected.read_bytes()
    assert len(drawn) == len(set(drawn)) == 5  # 6 completions by base and 12 by sft, 4 a batch
    assert not (again.parent / "draws.partial").exists()


def save_ensemble(folder: Path) -> str:
    """Save two reward models with random weights, adapters on a policy, and return the ensemble's folder."""
    base = resolve_path("demo:sft", None, folder)
    for seed in range(2):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
        config = LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS", init_lora_weights=False)
        get_peft_model(model, config).save_pretrained(folder / f"member_{seed}")
        AutoTokenizer.from_pretrained(base).save_pretrained(folder / f"member_{seed}")
    (folder / "ensemble.json").write_text(json.dumps({"members": ["member_0", "member_1"]}))
    return str(folder)


def test_a_collection_killed_anywhere_resumes_to_the_same_bytes(compose, tmp_path, monkeypatch):
    """By SIGKILL, in a process of its own: with an ensemble, by whose scores the questions are chosen."""
    ensemble = save_ensemble(tmp_path)
    words = [*FEW, "reward=model", "reward.model.run=null", f"reward.model.path={ensemble}", "select=uncertainty"]
    words += ["stage.policies={base: 'demo:base', sft: 'demo:sft'}", "stage.sampling={base: {n: 1, top_p: 0.9}}"]
    words += ["stage.budget=4", "stage.max_completion_length=24"]
    expected = collect(compose(*words, f"runs_dir={tmp_path}/whole"))
    rows = read_candidates(expected)
    assert sum(len(row.questions) for row in rows) == 4
    assert {len(each.scores["model"]) for row in rows for each in row.candidates} == {2}
    points = {
        "0": 0,
        "1": 1,
        "3": 3,
        "4": 4,
        "end": 5,
    }  # with the batches that are drawn then, of 5: 2 by base, 3 by sft
    kill_collections(tmp_path, list(points), words)
    sample, drawn = stage.sample, []
    monkeypatch.setattr(
        stage, "sample", lambda *args, **kwargs: drawn.append(kwargs["seed"]) or sample(*args, **kwargs)
    )
    for point, done in points.items():
        killed = tmp_path / point / "test" / "collect"
        assert read_run(killed).status == "running" and (killed / "candidates.jsonl").exists() == (point == "end")
        partial = killed / "draws.partial"
        assert partial.exists() == (done > 0)
        if point == "3":
            partial.write_bytes(partial.read_bytes() + b'{"batch": 3, "rows": [{"row": 1, "candi')
        drawn.clear()
        words_again = [*words, f"runs_dir={tmp_path}/{point}"]
        if not done:  # as the message says
            with pytest.raises(ConfigError, match="nothing to resume. Start again: remove `resume=true`"):
                collect(compose(*words_again, "resume=true"))
        again = collect(compose(*words_again, *(["resume=true"] if done else [])))
        assert drawn == [42 + batch for batch in range(done, 5)]
        assert again.read_bytes() == expected.read_bytes() and not partial.exists()
        metrics = [json.loads((path.parent / "metrics.json").read_text())["eval"] for path in (again, expected)]
        assert metrics[0] == metrics[1] and read_run(killed).status == "done"


def test_labeled_prompts_are_left_out_and_none_left_is_an_error(whole, compose, tmp_path):
    rows = read_candidates(whole[1])
    labels = tmp_path / "labels.jsonl"
    row = {"question": [0, 1], "form": "pair", "answer": 0, "labeler": "ada"}
    labels.write_text("".join(json.dumps(row | {"id": each.id}) + "\n" for each in rows))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": each.prompt}) + "\n" for each in rows))
    words = [*FEW, f"stage.prompts={prompts}", f"stage.labels={labels}", f"runs_dir={tmp_path}"]
    with pytest.raises(ConfigError, match="labeled already: 6"):
        collect(compose(*words))
    assert not (tmp_path / "test" / "collect" / "run.json").exists()


def test_last_hidden_states_choose_without_a_reward_and_logs_have_thumbs(compose, tmp_path):
    log = tmp_path / "log.jsonl"
    rows = [{"prompt": f"What color is a {what}?", "answer": "It is blue.", "vote": "up"} for what in ("cow", "dog")]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [*FEW, "select=d_optimal", f"stage.traffic={log}", f"runs_dir={tmp_path}", "stage.budget=1"]
    words += ["stage.columns={completion: answer, thumb: vote}", "stage.max_completion_length=24"]
    with pytest.raises(ConfigError, match="2 new thumbs up and 0 down, and `stage.min_thumbs=1`"):
        collect(compose(*words, "stage.min_thumbs=1"))
    assert not (tmp_path / "test" / "collect" / "run.json").exists()
    path = collect(compose(*words))
    rows = read_candidates(path)
    assert [row.candidates[0].policy for row in rows] == ["traffic", "traffic"]
    assert all(len(row.candidates) > 1 for row in rows) and sum(len(row.questions) for row in rows) == 1
    thumbs = [json.loads(line) for line in (path.parent / "thumbs.jsonl").read_text().splitlines()]
    assert [row["thumb"] for row in thumbs] == [True, True]
    with pytest.raises(ConfigError, match="nothing new: logged rows dropped: used before: 2"):
        collect(compose(*words, "run_name=again", "stage.used=[collect]"))
    with pytest.raises(ConfigError, match="`stage.traffic` names none"):
        collect(compose(*FEW, f"runs_dir={tmp_path}", "run_name=again", "stage.min_thumbs=1"))


def write_log(path: Path, *rows: tuple[str, str, str | None]) -> str:
    lines = [{"prompt": prompt, "completion": answer, "thumb": thumb} for prompt, answer, thumb in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in lines))
    return str(path)


def test_new_thumbs_on_old_answers_are_a_round_of_their_own(compose, tmp_path, capsys):
    log = write_log(tmp_path / "log.jsonl", ("What color is a cow?", "It is blue.", None))
    words = [*FEW, f"runs_dir={tmp_path}", "stage.max_completion_length=4"]
    collect(compose(*words, "run_name=first", f"stage.traffic={log}"))
    later = write_log(tmp_path / "later.jsonl", ("What color is a cow?", "It is blue.", "down"))
    words += [f"stage.traffic={later}", "stage.used=[first]", "run_name=second"]
    with pytest.raises(ConfigError, match="No prompt is left .* `stage.budget=null`"):
        collect(compose(*words, "stage.budget=1"))  # a labeling would find no question
    path = collect(compose(*words))
    assert read_candidates(path, allow_empty=True) == []
    assert json.loads((path.parent / "thumbs.jsonl").read_text())["thumb"] is False
    assert read_run(path.parent).status == "done" and "thumbs of users: 1" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="nothing new: logged rows dropped: used before: 1"):
        collect(compose(*words, "stage.used=[first,second]", "run_name=third"))


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_logged_rows_that_a_table_of_positions_is_too_small_for_are_dropped_and_named(compose, tmp_path, capsys, name):
    path = save_architecture(tmp_path / name, name)
    (tmp_path / name / "chat_template.jinja").unlink(missing_ok=True)
    reward = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)
    reward.config.pad_token_id = 0
    shutil.copytree(path, tmp_path / "reward")
    reward.save_pretrained(tmp_path / "reward")
    rows = [("a b", "c d", "up"), ("c " * 80, "d", "down"), ("e f", "g h", None), ("h", "a " * 80, "down")]
    words = ["stage=collect", "project=test", "model=hf", f"model.path={path}", f"runs_dir={tmp_path}/runs"]
    words += [f"stage.traffic={write_log(tmp_path / 'log.jsonl', *rows)}", "stage.max_completion_length=4"]
    words += [
        "reward=[model,tokens]",
        "reward.model.run=null",
        f"reward.model.path={tmp_path}/reward",
        "select=best_worst",
    ]
    found = read_candidates(collect(compose(*words)))
    assert [row.prompt for row in found] == ["a b", "e f", "h"]
    out = capsys.readouterr().out
    assert "log.jsonl, line 2: `prompt` has 80 tokens" in out and "too long a prompt: 1" in out
    thumbs = (tmp_path / "runs" / "test" / "collect" / "thumbs.jsonl").read_text().splitlines()
    assert [json.loads(row)["prompt"] for row in thumbs] == ["a b", "h"]
    # Answers of the log have the scores that the reward gives them elsewhere, and are asked about
    assert [each.candidates[0].policy for each in found] == ["traffic"] * 3
    (score,) = found[0].candidates[0].scores["model"]
    alone = ModelReward(str(tmp_path / "reward"), dtype="float32")
    assert score == pytest.approx(alone(["a b"], ["c d"], [[]])[0], abs=1e-5)
    assert found[0].candidates[0].scores["tokens"] == [3.0]  # with the end token
    assert found[2].candidates[0].scores == {} and "too long for the reward model: 1" in out
    assert all(0 not in question for question in found[2].questions)


def test_a_selection_without_its_ensemble_stops_before_the_sampling(compose, tmp_path):
    cfg = compose(*FEW, "select=thompson", f"runs_dir={tmp_path}")
    assert any("`select=thompson` reads scores" in problem for problem in find_problems(cfg))
    with pytest.raises(ConfigError, match="every reward has one"):
        collect(compose(*FEW, "select=thompson", "reward=demo", f"runs_dir={tmp_path}"))
    assert not (tmp_path / "test" / "collect" / "run.json").exists()
    with pytest.raises(ConfigError, match="names `dpo`, which is no policy"):
        collect(compose(*FEW, "stage.sampling={dpo: {n: 2}}", f"runs_dir={tmp_path}"))


def write_prompts(path: Path, prompts) -> str:
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return str(path)


NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role') }}{% endif %}"


@pytest.mark.parametrize(
    ("name", "prompts", "says"),
    [
        ("gemma2", [[{"role": role, "content": "a"}] for role in ("user", "user", "system")], "No system role"),
        ("gpt2", ["a", "b", "c " * 80], "has 64 positions, and a row has 80 tokens"),
    ],
)
def test_a_prompt_that_a_policy_can_not_take_is_found_before_the_first_batch(compose, tmp_path, name, prompts, says):
    path = save_architecture(tmp_path / name, name)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = NO_SYSTEM + CHAT_TEMPLATE if name == "gemma2" else None
    shutil.rmtree(path)
    save_architecture(tmp_path / name, name)
    tokenizer.save_pretrained(path)
    if name != "gemma2":
        (tmp_path / name / "chat_template.jinja").unlink(missing_ok=True)
    words = ["model=hf", f"model.path={path}", f"stage.prompts={write_prompts(tmp_path / 'p.jsonl', prompts)}"]
    for name_of_stage in ("collect", "generate"):
        extra = ["stage.batch_size=1", "stage.max_completion_length=4", f"runs_dir={tmp_path}/runs", "reward=none"]
        cfg = compose(f"stage={name_of_stage}", "project=test", *words, *extra)
        with pytest.raises(ConfigError, match=says):
            instantiate(cfg.stage.run)(cfg)
        assert not list((tmp_path / "runs").rglob("draws.partial"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gpt2", "gpt_neox", "opt"])
def test_every_architecture_is_collected_from_and_labels(compose, tmp_path, monkeypatch, name):
    """Policies with and without a chat template, d-optimal features, reward models, and judges."""
    path = save_architecture(tmp_path / name, name)
    has_template = name in ("llama", "qwen2", "gemma2")
    if not has_template:
        (tmp_path / name / "chat_template.jinja").unlink()
    reward = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)
    reward.config.pad_token_id = 0
    shutil.copytree(path, tmp_path / "reward")
    reward.save_pretrained(tmp_path / "reward")
    prompts = [f"{a} {b}" for a in "abcd" for b in "ef"]
    kinds = {"text": prompts} | ({"chat": [as_chat(prompt, "user") for prompt in prompts]} if has_template else {})
    common = ["project=test", f"runs_dir={tmp_path}/runs"]
    for kind, given in kinds.items():
        file = write_prompts(tmp_path / f"{kind}.jsonl", given)
        words = ["model=hf", f"model.path={path}", f"stage.prompts={file}", "select=d_optimal", "stage.budget=4"]
        words += ["stage.max_completion_length=8", f"run_name={kind}"]
        rows = read_candidates(collect(compose("stage=collect", *common, *words)))
        assert sum(len(row.questions) for row in rows) == 4
        assert all(isinstance(each.completion, str) == (kind == "text") for row in rows for each in row.candidates)
        for labeler in (
            ["labeler=reward", "reward=model", "reward.model.run=null", f"reward.model.path={tmp_path}/reward"],
            ["labeler=judge", "judge=model", f"judge.path={path}", "labeler.max_tokens=8"],
        ):
            cfg = compose(
                "stage=label", *common, f"stage.candidates={kind}", *labeler, f"run_name={kind}_{labeler[0][8:]}"
            )
            instantiate(cfg.stage.run)(cfg)
            assert len(read(Path(cfg.run_dir, "labels.jsonl"))) == 4
