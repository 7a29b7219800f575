"""The life of a run directory: who may write into it, and what is never deleted with it."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from rlhf_trl.checks import find_problems
from rlhf_trl.errors import ConfigError, disk_is_full
from rlhf_trl.runs import directory
from rlhf_trl.runs.lock import lock_owner, locked
from rlhf_trl.runs.paths import conf_dir
from tests.helpers.spies import CRASH, Crash
from tests.helpers.tiny import WORDS, save_model

LOCK = """
import sys, time
from rlhf_trl.runs.lock import locked
with locked(sys.argv[1]):
    print("mine", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def problems(compose, monkeypatch, tmp_path):
    """`problems(*overrides)` returns the problems of a config, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return lambda *words: find_problems(compose(*words))


@pytest.fixture
def locker():
    """`locker(run_dir)` starts a process that locks it, and returns that process."""
    started = []

    def start(run_dir: Path) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", LOCK, run_dir.absolute()], stdout=subprocess.PIPE, text=True, cwd=conf_dir().parent
        )
        started.append(process)
        assert process.stdout.readline() == "mine\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def make_run(name: str, status: str = "done", folder: str = "runs/default") -> Path:
    run_dir = Path(folder, name)
    run_dir.mkdir(parents=True)
    (run_dir / "run.json").write_text(json.dumps({"status": status, "stage": "sft"}))
    (run_dir / "model.safetensors").write_text(name)
    return run_dir


def files(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


# ---- Locks ----


def test_a_directory_is_locked_by_one_process(tmp_path, locker):
    other = locker(tmp_path)
    refusal = f"in progress, as process {other.pid}. .*`kill {other.pid}`"
    with pytest.raises(ConfigError, match=refusal), locked(tmp_path):
        pass
    other.send_signal(signal.SIGKILL)
    other.wait()
    with locked(tmp_path):  # a killed process leaves no lock
        assert (tmp_path / ".lock").read_text().split()[0] == str(os.getpid())
        assert lock_owner(tmp_path) is None  # not of another process
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("words", [[], ["resume=true"], ["overwrite=true"]])
def test_a_run_in_progress_is_left_alone(problems, locker, words):
    other = locker(make_run("ppo", "running"))
    (found,) = problems("stage=ppo", *words)
    assert f"still in progress, as process {other.pid}" in found
    assert problems("stage=ppo", "run_name=other") == []


def test_a_killed_run_is_not_in_progress(problems):
    make_run("ppo", "running")
    assert problems("stage=ppo", "overwrite=true") == []


def test_what_began_since_the_checks_is_not_overwritten(train, tmp_path, locker):
    """Two starts within seconds: both are checked while the directory is free."""
    run_dir = tmp_path / "test/sft"
    other = locker(run_dir)
    with pytest.raises(ConfigError, match=f"process {other.pid}"):
        train(tmp_path, "stage=sft", "overwrite=true")
    other.kill()
    other.wait()
    (run_dir / "run.json").write_text('{"status": "done", "stage": "sft"}')  # it was quick
    with pytest.raises(ConfigError, match="already holds a run"):
        train(tmp_path, "stage=sft")
    assert files(run_dir) == {"run.json": '{"status": "done", "stage": "sft"}'}


# ---- Names ----


@pytest.mark.parametrize("name", ["", ".", "..", "../other", "a/../b", "/abs", "a//b", "a/", "' '", "null"])
@pytest.mark.parametrize("key", ["run_name", "project"])
@pytest.mark.parametrize("stage", ["sft", "init"])
def test_a_name_is_one_path_below(problems, stage, key, name):
    (found,) = problems(f"stage={stage}", f"{key}={name}", "overwrite=true")
    assert found.startswith(f"`{key}` is ") and f"`{key}=mine`" in found


def test_names_of_several_parts_are_names(problems):
    assert problems("stage=sft", "run_name=a/b.c-1", "project=team/mine") == []


@pytest.mark.parametrize("key", ["runs_dir", "run_dir"])
def test_a_folder_has_a_name(problems, key):
    assert problems("stage=sft", f"{key}=") == [f"`{key}` is empty. Set `{key}=FOLDER`, or remove it."]


# ---- What overwrite=true never deletes ----

SFT = "runs/default/sft"
EVALUATE = ("stage=evaluate", "stage.policies.ppo=demo:sft", "stage.policies.dpo=demo:sft")
OVERWRITE = {
    "start": ("stage=dpo", "run_name=sft", "model.run=sft", "model.run"),
    "start by its path": ("stage=dpo", "run_name=sft", f"model.path={SFT}", "model.path"),
    "checkpoint": ("stage=dpo", "run_name=sft", f"model.path={SFT}/checkpoint-5", "model.path"),
    "reward": ("stage=ppo", "run_name=reward", "reward=model", "reward.model.run"),
    "reward by its path": (
        *("stage=ppo", "run_name=reward", "reward=model", "reward.model.run=null"),
        *("reward.model.path=runs/default/reward", "reward.model.path"),
    ),
    "evaluated reward": ("stage=evaluate_reward", "run_name=reward", "reward.model.run"),
    "critic": ("stage=ppo", "run_name=reward", "critic=model", "critic.run=reward", "critic.run"),
    "policy": (*EVALUATE, "run_name=sft", "stage.policies.sft=sft", "stage.policies.sft"),
    "policy of a list": ("stage=chat", "run_name=sft", "stage.policies=[sft]", "stage.policies[0]"),
    "policy of best-of-n": (
        *("stage=evaluate_reward", "run_name=sft", "reward=demo", "stage.policy=sft", "stage.policy"),
    ),
    "data": ("stage=sft", "data=files", f"data.paths={SFT}/rows.jsonl", "data.paths"),
    "glob": ("stage=sft", "data=files", "data.paths=runs/*/sft/*.jsonl", "data.paths"),
    "data of ptx": (
        *("stage=ppo", "run_name=sft", "+data@ptx_data=files", f"ptx_data.paths=[{SFT}/rows.jsonl]"),
        *("stage.args.ptx_coef=0.1", "ptx_data.paths[0]"),
    ),
    "prompts": ("stage=generate", "run_name=sft", f"stage.prompts={SFT}/rows.jsonl", "stage.prompts"),
    "judge": (*(*EVALUATE, "run_name=judge", "judge=model", "judge.path=runs/default/judge", "judge.path"),),
    "base of an adapter": ("stage=dpo", "run_name=sft", "model.run=adapter", "model.run"),
    "base of a member": ("stage=ppo", "run_name=sft", "reward=model", "reward.model.run=ensemble", "reward.model.run"),
}


@pytest.mark.parametrize("case", OVERWRITE)
def test_what_the_command_reads_is_not_deleted(problems, case):
    *words, key = OVERWRITE[case]
    sft = make_run("sft")
    for name in ("reward", "adapter", "ensemble/member_0", "ensemble/member_1"):
        (make_run(name) / "config.json").write_text('{"architectures": ["LlamaForSequenceClassification"]}')
    (sft / "rows.jsonl").write_text("{}")
    (sft / "config.json").write_text("{}")
    (sft / "checkpoint-5").mkdir()
    (sft / "checkpoint-5/config.json").write_text("{}")
    (make_run("judge") / "config.json").write_text("{}")
    for name in ("adapter", "ensemble/member_0", "ensemble/member_1"):
        base = {"base_model_name_or_path": str(sft.resolve())}
        Path("runs/default", name, "adapter_config.json").write_text(json.dumps(base))
        Path("runs/default", name, "config.json").unlink()
    Path("runs/default/ensemble/run.json").write_text('{"status": "done", "stage": "reward"}')
    Path("runs/default/ensemble/ensemble.json").write_text('{"members": ["member_0", "member_1"]}')
    (found,) = problems(*words, "overwrite=true")
    assert found.startswith("`overwrite=true` would delete `") and f"the command needs it: `{key}`" in found
    assert (
        problems(*[word for word in words if not word.startswith("run_name")], "run_name=fresh", "overwrite=true")
        == []
    )


def test_answers_of_people_are_not_deleted(problems):
    run = make_run("label")
    for labeler, count in (("human", 1), ("gold", 0)):
        target = OmegaConf.load(conf_dir() / f"labeler/{labeler}.yaml")._target_
        (run / "config.yaml").write_text(f"labeler: {{_target_: {target}}}\n")
        (run / "labels.jsonl").write_text('{"id": "a"}\n')
        found = problems("stage=sft", "run_name=label", "overwrite=true")
        assert len(found) == count and all(
            "what people answered, `runs/default/label/labels.jsonl`" in f for f in found
        )


def test_other_runs_are_not_deleted(problems):
    make_run("sft")
    make_run("sft/nested")
    (found,) = problems("stage=sft", "overwrite=true")
    assert "would delete `runs/default/sft/nested`, another run" in found
    reward = make_run("reward")
    make_run("reward/member_0")
    (reward / "config.yaml").write_text("stage: {members: 2}\n")
    assert problems("stage=reward", "overwrite=true") == []  # a part of it
    (reward / "config.yaml").write_text("stage: {members: 1}\n")
    assert len(problems("stage=reward", "overwrite=true")) == 1


@pytest.mark.parametrize("words", [[], ["overwrite=true"], ["resume=true"]])
@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("run.json", '{"name": "something"}', "holds a `run.json` that isn't ours"),
        ("run.json", "no json", "holds a `run.json` that isn't ours"),
        ("model.safetensors", "weights", "holds a model (`model.safetensors`) without `run.json`"),
        ("adapter_config.json", "{}", "holds a model (`adapter_config.json`) without `run.json`"),
    ],
)
def test_a_folder_that_is_not_ours_is_left_alone(problems, tmp_path, words, name, text, says):
    folder = tmp_path / "elsewhere/thing"
    folder.mkdir(parents=True)
    (folder / name).write_text(text)
    for where in (["runs_dir=elsewhere/..", "project=elsewhere", "run_name=thing"], [f"run_dir={folder}"]):
        (found,) = problems("stage=init", *where, *words)
        assert says in found and "`run_name=...`" in found


def test_output_does_not_take_the_place_of_what_is_read(problems):
    Path("prompts.jsonl").write_text('{"prompt": "a"}')
    words = ["stage=generate", "stage.prompts=prompts.jsonl", "overwrite=true"]
    (found,) = problems(*words, "stage.output=./prompts.jsonl")
    assert "the command reads itself (`stage.prompts`)" in found
    Path("folder").mkdir()
    (found,) = problems(*words, "stage.output=folder")
    assert "is the folder `folder`" in found
    assert problems(*words, "stage.output=folder/answers.jsonl") == []


@pytest.mark.parametrize("words", [[], ["run_name=sft"], ["run_name=a/b"], ["run_name=''"]])
def test_a_smoke_run_has_a_directory_of_its_own(compose, problems, words):
    for name in ("sft", "a/b"):
        make_run(name)
    cfg = compose("stage=sft", "debug=smoke", *words)
    name = cfg.run_name
    assert cfg.run_dir == f"runs/default/smoke_{name}" and cfg.stage.args.output_dir == cfg.run_dir
    assert len(problems("stage=sft", "debug=smoke", *words)) == (name == "")


# ---- A run that overwrites another ----


@pytest.fixture
def used(tmp_path) -> Path:
    (tmp_path / "checkpoint-3").mkdir()
    for name in ("run.json", "model.safetensors", "checkpoint-3/optimizer.pt"):
        (tmp_path / name).write_text("old")
    return tmp_path


def test_a_backup_is_restored_complete(used):
    before = files(used)
    directory.back_up(used)
    (used / "run.json").write_text("new")
    (used / "start").mkdir()
    (used / "train.log").write_text("said")
    assert directory.has_backup(used)
    directory.restore_backup(used)
    assert files(used) == before | {"train.log": "said"} and not (used / "start").exists()


@pytest.mark.parametrize("step", range(8))
def test_a_kill_at_any_moment_loses_neither_run(used, monkeypatch, step):
    """Every rename of a backup and its restoration may be the last that is done."""
    before, done = files(used), []
    rename = Path.rename

    def dies(path, target):
        if len(done) == step:
            raise KeyboardInterrupt
        done.append(path)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", dies)
    try:
        directory.back_up(used)
        (used / "run.json").write_text("new")
        directory.restore_backup(used)
    except KeyboardInterrupt:
        pass
    monkeypatch.setattr(Path, "rename", rename)
    directory.recover(used)
    assert files(used) == before
    assert {path.name for path in used.iterdir()} == {"run.json", "model.safetensors", "checkpoint-3"}


def test_a_run_that_has_begun_is_kept(used):
    directory.back_up(used)
    (used / "run.json").write_text("new")
    (used / "checkpoint-1").mkdir()
    directory.recover(used)
    assert files(used) == {"run.json": "new"} and not directory.has_backup(used)


@pytest.mark.parametrize("names", [("metrics.json", "adapter_model.safetensors"), ("comparison.json",)])
def test_a_run_has_begun_where_its_result_is_there(tmp_path, names):
    for name in names:
        assert not directory.has_begun(tmp_path)
        (tmp_path / name).write_text("{}")
    assert directory.has_begun(tmp_path)


OLD = ("stage=sft", "stage.args.max_steps=2", "data.max_samples=64")
FAILURES = {
    "a crash at loading": (["adapter=lora", "adapter.peft.target_modules=[nothing]"], ValueError),
    "an error before the first step": (["+callbacks.wrong._target_=tests.helpers.spies.Wrong"], ConfigError),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_run_that_cannot_begin_costs_nothing(train, tmp_path, failure):
    run_dir = Path(train(tmp_path, *OLD))
    before = files_of(run_dir)
    words, error = FAILURES[failure]
    with pytest.raises(error):
        train(tmp_path, *OLD, "overwrite=true", *words)
    assert files_of(run_dir) == before
    train(tmp_path, *OLD, "overwrite=true", "seed=7")
    assert (run_dir / "model.safetensors").read_bytes() != before[str(run_dir / "model.safetensors")]
    assert not directory.has_backup(run_dir)


# ---- Resume ----


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.fixture(scope="module")
def stopped(train, tmp_path_factory) -> Path:
    """Return a folder with a model, rows, and the run that began from both and crashed after a checkpoint."""
    folder = tmp_path_factory.mktemp("stopped")
    words = [(WORDS[i // 8], WORDS[i % 8]) for i in range(60)]
    rows = [json.dumps({"prompt": f"a {one} {other}", "completion": f" {other} {one}"}) for one, other in words]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    save_model(folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Crash, "at", 3)
        with pytest.raises(RuntimeError, match="on purpose"):
            train(folder, *resumable(folder))
    return folder


def resumable(folder: Path) -> list[str]:
    return [
        *("stage=sft", "model=hf", f"model.path={folder}/model", "data=files", f"data.paths={folder}/rows.jsonl"),
        *("stage.args.save_steps=2", "stage.args.per_device_train_batch_size=4", CRASH),
    ]


def change_rows(folder):
    lines = (folder / "rows.jsonl").read_text().splitlines()
    (folder / "rows.jsonl").write_text("\n".join(reversed(lines)))
    return r"`data \(train\)` was (\d+) rows \(hash \w+\) and is \1 rows"


def drop_rows(folder):
    (folder / "rows.jsonl").write_text("\n".join((folder / "rows.jsonl").read_text().splitlines()[:30]))
    return r"`data \(train\)` was (\d+) rows \(hash \w+\) and is (?!\1)\d+ rows"


def change_the_start(folder):
    save_model(folder / "model", seed=1)
    return "`model` was .* and is .*"


def change_ranks(folder):
    file = folder / "test/sft/run.json"
    record = json.loads(file.read_text())
    assert record["inputs"]["ranks"] == 1
    record["inputs"] |= {"ranks": 2, directory.STEP: 8}  # four rows on each
    file.write_text(json.dumps(record))
    return r"`ranks` was 2 and is 1.*\(`stage.args.per_device_train_batch_size=8`\)"


def change_engine(folder):
    file = folder / "test/sft/run.json"
    record = json.loads(file.read_text())
    record["inputs"]["engine"] = "FSDP2"
    file.write_text(json.dumps(record))
    return "`engine` was FSDP2 and is none"


@pytest.mark.parametrize(
    ("engines", "now", "rows", "parts"),
    [
        (("DDP", "DDP"), 4, 8, []),
        (("DDP", "none"), 1, 8, []),
        (("FSDP2", "FSDP2"), 4, 8, []),
        (("DDP", "DDP"), 4, 16, ["`ranks` was 2 and is 4", "(`stage.args.per_device_train_batch_size=2`)"]),
        (("DDP", "DDP"), 3, 12, ["`ranks` was 2 and is 3", "started with, or start again"]),
        (("DeepSpeed ZeRO-3", "DeepSpeed ZeRO-3"), 4, 8, ["`ranks` was 2 and is 4", "started with, or start again"]),
        (("DDP", "FSDP2"), 4, 8, ["`ranks` was 2 and is 4", "`engine` was DDP and is FSDP2"]),
    ],
)
def test_a_resume_on_other_ranks_keeps_the_rows_of_a_step(tmp_path, engines, now, rows, parts):
    before, after = ({"engine": engine, "data": "x"} for engine in engines)
    problems = directory.input_changes(
        tmp_path, before | {"ranks": 2, directory.STEP: 8}, after | {"ranks": now, directory.STEP: rows}
    )
    assert len(problems) == bool(parts) and all(part in problems[0] for part in parts)


@pytest.mark.parametrize(("ranks", "rows", "count"), [(1, 8, 0), (2, 4, 0), (4, 2, 0), (2, 8, 1), (1, 2, 1)])
def test_a_resume_takes_another_batch_size_on_other_ranks_only(tmp_path, monkeypatch, ranks, rows, count):
    """The run began on two ranks with four rows each."""
    (tmp_path / "config.yaml").write_text("seed: 1\nstage: {args: {per_device_train_batch_size: 4}}")
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    values = {"seed": 1, "stage": {"args": {"per_device_train_batch_size": rows}}}
    assert len(directory.resume_changes(tmp_path, values, 2)) == count
    assert directory.resume_changes(tmp_path, values | {"seed": 2}, 2)


def lose(name):
    def change(folder):
        (folder / "test/sft/checkpoint-2" / name).unlink()
        return rf"No checkpoint can be resumed: `.*checkpoint-2` is incomplete \({name} missing or truncated\)"

    return change


def cut(name):
    def change(folder):
        os.truncate(folder / "test/sft/checkpoint-2" / name, 100)
        return rf"No checkpoint can be resumed: `.*checkpoint-2` is incomplete \({name} missing or truncated\)"

    return change


CHANGES = {
    "rows in another order": change_rows,
    "fewer rows": drop_rows,
    "another start": change_the_start,
    "another number of ranks": change_ranks,
    "another engine": change_engine,
    "optimizer": lose("optimizer.pt"),
    "scheduler": lose("scheduler.pt"),
    "random state": lose("rng_state.pth"),
    "part of the weights": cut("model.safetensors"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_resume_notices_what_has_changed(train, stopped, monkeypatch, change):
    saved = shutil.copytree(stopped, stopped.with_name("saved"), dirs_exist_ok=True)
    monkeypatch.setattr(Crash, "at", None)
    try:
        says = CHANGES[change](stopped)
        before = files_of(stopped)
        with pytest.raises(ConfigError, match=says):
            train(stopped, *resumable(stopped), "resume=true")
        assert files_of(stopped) == before
    finally:
        shutil.rmtree(stopped)
        saved.rename(stopped)


@pytest.mark.parametrize("damage", ["empty", "cut", "no state"])
def test_a_resume_falls_back_to_the_checkpoint_before_a_damaged_one(train, stopped, monkeypatch, capsys, damage):
    monkeypatch.setattr(Crash, "at", None)
    saved = shutil.copytree(stopped, stopped.with_name("saved"), dirs_exist_ok=True)
    run_dir = stopped / "test/sft"
    if damage == "empty":
        (run_dir / "checkpoint-9").mkdir()
    else:
        shutil.copytree(run_dir / "checkpoint-2", run_dir / "checkpoint-9")
    if damage == "cut":
        os.truncate(run_dir / "checkpoint-9/optimizer.pt", 100)
    if damage == "no state":
        (run_dir / "checkpoint-9/trainer_state.json").unlink()
    try:
        train(stopped, *resumable(stopped), "resume=true")
        assert json.loads((run_dir / "run.json").read_text())["status"] == "done"
        out = capsys.readouterr().out
        assert re.search(r"checkpoint-9` is incomplete \(.* missing or truncated\), so the one before it is used", out)
        assert re.search(r"Resuming from .*checkpoint-2\.", out)
    finally:
        shutil.rmtree(stopped)
        saved.rename(stopped)


def test_a_run_without_its_config_can_not_be_resumed(train, stopped, monkeypatch):
    monkeypatch.setattr(Crash, "at", None)
    config = stopped / "test/sft/config.yaml"
    content = config.read_text()
    config.unlink()
    try:
        with pytest.raises(ConfigError, match="has no `config.yaml`, so the config it was started with isn't known"):
            train(stopped, *resumable(stopped), "resume=true", "stage.args.learning_rate=9")
    finally:
        config.write_text(content)


def test_a_resume_with_the_same_config_is_done(train, stopped, monkeypatch):
    monkeypatch.setattr(Crash, "at", None)
    run_dir = Path(train(stopped, *resumable(stopped), "resume=true"))
    record = json.loads((run_dir / "run.json").read_text())
    assert record["status"] == "done" and set(record["inputs"]) == {
        *("ranks", "engine", "rows per step", "data (train)", "data (eval)", "model")
    }


def test_inputs_are_the_models_of_all_roles(compose, tmp_path):
    from datasets import Dataset, DatasetDict

    from rlhf_trl.stages.train import inputs_of

    for seed, name in enumerate(("start", "scores", "values")):
        save_model(tmp_path / name, seed=seed)
    words = ("stage=ppo", "reward=model", "reward.model.run=null", "critic=model")
    cfg = compose(*words, f"reward.model.path={tmp_path}/scores", f"critic.path={tmp_path}/values")
    rows = Dataset.from_list([{"prompt": "a"}, {"prompt": None}, {"prompt": "b"}])
    start = str(tmp_path / "start")
    before = inputs_of(cfg, start, DatasetDict(train=rows))
    assert before == inputs_of(cfg, start, DatasetDict(train=rows.select([0, 1, 2])))
    for name, key in (("start", "model"), ("scores", "reward.model"), ("values", "critic")):
        save_model(tmp_path / name, seed=99)
        now = inputs_of(cfg, start, DatasetDict(train=rows))
        assert {key for key in now if now[key] != before[key]} == {key}
        before = now
    now = inputs_of(cfg, start, DatasetDict(train=rows.select([2, 1, 0])))
    assert {key for key in before if now[key] != before[key]} == {"data (train)"}


def test_demonstrations_beside_ppo_are_inputs(train, tmp_path):
    words = ["stage=ppo", "+data@ptx_data=demo", "stage.args.ptx_coef=0.1", "ptx_data.max_samples=8"]
    run_dir = Path(train(tmp_path, *words, "stage.args.max_steps=1", "data.max_samples=128"))
    inputs = json.loads((run_dir / "run.json").read_text())["inputs"]
    assert inputs["data (ptx_dataset)"].startswith("8 rows (hash ") and inputs["data (train)"].startswith("128 rows")


def test_an_adapters_fingerprint_is_its_bases_too(tmp_path):
    from rlhf_trl.models.adapters import model_fingerprint

    save_model(tmp_path / "base")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_model.safetensors").write_bytes(b"weights")
    config = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "base")}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    found = [model_fingerprint(str(tmp_path / "adapter"))]
    save_model(tmp_path / "base", seed=1)
    found.append(model_fingerprint(str(tmp_path / "adapter")))
    (tmp_path / "adapter/adapter_model.safetensors").write_bytes(b"others")
    found.append(model_fingerprint(str(tmp_path / "adapter")))
    assert len(set(found)) == 3


def test_the_name_of_the_page_is_no_runs(problems):
    assert any("`run_name` is `report`" in text for text in problems("stage=sft", "run_name=report"))


def test_an_output_takes_no_files_place_in_a_model(problems):
    sft = make_run("sft")
    (sft / "config.json").write_text("{}")
    words = ("stage=generate", "model.run=sft", "reward=none", "overwrite=true")
    found = problems(*words, f"stage.output={sft}/config.json")
    assert any("which the command reads itself (`model.run`)" in text for text in found)
    assert not any("stage.output" in text for text in problems(*words, f"stage.output={sft}/completions.jsonl"))


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:603] . PytorchStreamWriter failed writing file data/0"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 1328768 vs 1328660"),
        ValueError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_leaves_a_record_and_one_message(train, tmp_path, monkeypatch, error):
    def full(*args, **kwargs):
        (Path(tmp_path) / "test/sft/.unfinished").mkdir(exist_ok=True)
        raise error

    from transformers import PreTrainedModel

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    with pytest.raises(type(error)) as raised:
        train(tmp_path, "stage=sft", "stage.args.save_steps=2")
    assert disk_is_full(raised.value) and not disk_is_full(ValueError("no"))
    record = json.loads((tmp_path / "test/sft/run.json").read_text())
    assert record["status"] == "failed" and not (tmp_path / "test/sft/.unfinished").exists()


# ---- Longer runs ----


def steps_of(run_dir: str) -> int:
    return json.loads(Path(run_dir, "metrics.json").read_text())["history"][-1]["step"]


def test_a_finished_run_that_is_lengthened_is_the_longer_run(train, tmp_path, capsys):
    """With a constant learning rate; with another one the schedule is the longer run's from there on."""
    words = ["stage=sft", "stage.args.lr_scheduler_type=constant"]
    whole = train(tmp_path / "whole", *words, "stage.args.num_train_epochs=2", "stage.args.max_steps=-1")
    run_dir = train(tmp_path / "parts", *words, "stage.args.max_steps=-1")
    assert steps_of(run_dir) * 2 == steps_of(whole)
    assert "Lengthened" not in capsys.readouterr().out
    train(tmp_path / "parts", *words, "stage.args.max_steps=-1", "stage.args.num_train_epochs=2", "resume=true")
    assert "Lengthened from 8 to 16 steps; step 8 is done." in capsys.readouterr().out
    assert steps_of(run_dir) == steps_of(whole)
    assert Path(run_dir, "model.safetensors").read_bytes() == Path(whole, "model.safetensors").read_bytes()
    assert json.loads(Path(run_dir, "run.json").read_text())["status"] == "done"


def test_more_episodes_lengthen_ppo_and_the_schedule_is_said(train, tmp_path, capsys):
    words = ["stage=ppo", "stage.args.max_steps=-1", "stage.args.learning_rate=1e-3", "stage.args.warmup_steps=0"]
    words += ["stage.args.num_iterations=1", "stage.args.eval_on_start=false"]
    run_dir = train(tmp_path, *words, "stage.args.total_episodes=128")
    train(tmp_path, *words, "stage.args.total_episodes=512", "resume=true")
    said = "The learning rate follows the linear schedule of the longer run: 7.5e-04 from here, where it was 0."
    assert "Lengthened from 4 to 16 steps; step 4 is done. " + said in capsys.readouterr().out
    assert steps_of(run_dir) == 16
