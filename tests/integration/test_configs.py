"""Every file in conf/ composes and passes the checks, and every command in docs/ and conf/ can be typed."""

import fnmatch
import functools
import importlib
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from rlhf_trl.checks import find_problems
from rlhf_trl.checks.libraries import _callables
from rlhf_trl.checks.renamed import RENAMED_KEYS, renamed_key
from rlhf_trl.cli import overrides
from rlhf_trl.cli.help import help_text
from rlhf_trl.cli.rounds import all_steps
from rlhf_trl.config.values import plain
from tests.helpers.config_reads import interpolations, reads_below, unread_keys
from tests.helpers.configs import CONF, OPTIONS, PIPELINES, STAGES, composed, every_config, every_key, words_of

# Keys of a sweep, which its jobs lack
SWEEPS = ("sweep", "pareto", "accelerate", "launch", "program", "gpus_per_job")
# Pipelines, and what else they may run
VARIANTS = [[f"pipeline={name}", *(["rounds=2"] if name == "nightly" else [])] for name in PIPELINES] + [
    ["pipeline=iterated", "rounds=2", "mixture=by_round", *words]
    for words in (["align=dpo"], ["align=rejection"], ["align=kto", "prompts_of=log"], ["prompts_of=log"])
]
PAGES = [*CONF.parent.glob("*.md"), *CONF.parent.glob("docs/**/*.md")]


@pytest.fixture(scope="module")
def users_folder(tmp_path_factory) -> Path:
    """Return a folder with what the options expect: data, models, and earlier runs of every project."""
    users = tmp_path_factory.mktemp("user")
    for name in ("reviews", "smollm2"):
        (users / name).mkdir()
    (users / "smollm2" / "config.json").write_text("{}")
    for name in ("pairs.jsonl", "own.jsonl", "my.jsonl", "prompts.jsonl", "log.jsonl"):
        (users / name).touch()
    texts = [path.read_text() for path in CONF.glob("**/*.yaml")]
    projects = {"default"} | {name for text in texts for name in re.findall(r"\bproject[:=] ?(\w+)", text)}
    for project in projects:
        names = ("policy", "control", "reward", "collect", "label", "draw")
        rounds = [f"{name}_{number}" for name in names for number in range(4)]
        for run in ("init", "sft", "reward", "ppo", "dpo", "helpful", "cost", "collect", *rounds):
            folder = users / "runs" / project / run
            (folder / "merged").mkdir(parents=True)
            (folder / "merged" / "config.json").write_text("{}")
            (folder / "run.json").write_text(json.dumps({"status": "done", "stage": run}))
            for name in ("feedback.jsonl", "thumbs.jsonl", "candidates.jsonl"):  # of a labeling, and of a collection
                (folder / name).touch()
            for kept in ("best", "random"):
                (folder / f"completions.{kept}.jsonl").touch()
    importlib.import_module("rlhf_trl.trainers.online_dpo")  # imports vLLM where there is one
    (users / "vllm.py").touch()  # stands for the package
    (users / "my_rewards.py").write_text("def short(completions): return [0.0] * len(completions)")
    return users


@pytest.fixture(autouse=True)
def stand_in_users_folder(users_folder, monkeypatch):
    """Make the user's folder the current one; no test changes it."""
    monkeypatch.chdir(users_folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    for name in ("reviews", "smollm2"):
        monkeypatch.setenv(f"RLHF_TRL_{name.upper()}", name)
    monkeypatch.syspath_prepend(users_folder)


def problems_of(*words: str) -> list[str]:
    cfg, problems = overrides.compose([*words, "overwrite=true"])
    return problems + (find_problems(cfg) if cfg else [])


@pytest.mark.parametrize(("group", "option"), [name for name in OPTIONS if name[0] not in ("pipeline", "sweep")])
def test_every_option_composes_and_passes_the_checks(group, option):
    assert problems_of(*words_of(group, option)) == []


def test_a_helper_file_is_no_option():
    assert STAGES and not [name for name in OPTIONS if "/_" in f"/{'/'.join(name)}"]
    for word in ("stage=_base/offline", "model=_demo/ppo"):
        (problem,) = problems_of(word)
        assert f"`{word}` names a helper file" in problem and ("`dpo`" in problem or "`hf`" in problem)
    assert not re.search(r"\b_(base|demo|values)\b", help_text("train", []))


@pytest.mark.parametrize("file", sorted([*CONF.rglob("*.yaml"), *(CONF.parent / "launch").rglob("*.yaml")]))
def test_comments_stand_above_their_keys_and_lines_are_short(file):
    lines = file.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if " #" in line.lstrip() and not line.lstrip().startswith("#")] == []
    text = OmegaConf.load(file).get("template", "")  # of a judge: a line of it is one of the prompt
    assert [line for line in lines if len(line) > 119 and line.strip() not in text] == []


@pytest.fixture(scope="module")
def read() -> dict[str, set[str]]:
    """Return the keys that some part of the code reads, and those that an interpolation does."""
    runs = {values["stage"]["run"]["_target_"] for _, values in every_config() if "stage" in values}
    read = reads_below("rlhf_trl.cli.main", "rlhf_trl.cli.pipeline", "rlhf_trl.cli.sweep", *runs)
    return {"read": read, "interpolated": set().union(*(interpolations(values) for _, values in every_config()))}


def test_every_key_is_read(read):
    assert {name: unread for name, values in every_config() if (unread := unread_keys(values, **read))} == {}


@pytest.mark.parametrize(
    "key",
    [
        "unknown",
        "model.unknown",
        "stage.unknown",
        "stage.batch_size",
        "stage.args.unknown",
        "kl.unknown",
        "reward.gold.unknown",
        "reward.gold.kwargs.unknown",
        "data.unknown",
    ],
)
def test_a_key_that_nothing_reads_is_found(read, key):
    cfg = composed("train", "stage=ppo")  # a stage that reads no `stage.batch_size`
    OmegaConf.update(cfg, key, 1, force_add=True)
    assert unread_keys(OmegaConf.to_container(cfg), **read) == [key]


@pytest.fixture(scope="module")
def validator():
    """Return the validator of conf/schema.json."""
    jsonschema = pytest.importorskip("jsonschema")
    return jsonschema.Draft7Validator(json.loads((CONF / "schema.json").read_text(encoding="utf-8")))


def test_the_schema_allows_every_config_and_every_experiment(validator):
    configs = [
        (name, values) for name, values in every_config() if "steps" not in values and "accelerate" not in values
    ]
    files = [(str(path), OmegaConf.to_container(OmegaConf.load(path))) for path in CONF.glob("experiment/**/*.yaml")]
    assert len(configs) > 50 and files
    errors = [
        (name, error.json_path, error.message[:200])
        for name, values in configs + files
        for error in validator.iter_errors(values)
    ]
    assert not errors


@pytest.mark.parametrize(
    "text",
    [
        "projekt: a",
        "stage: {args: {learning_rat: 1.0e-5}}",
        "stage: {args: {learning_rate: fast}}",
        "stage: {args: {vf_coef: -1}}",
        "stage: {args: {kl_estimator: k4}}",
        "stage: {polices: {a: b}}",
        "model: {pathh: a}",
    ],
)
def test_the_schema_finds_what_is_misspelt(validator, text):
    assert not validator.is_valid(OmegaConf.to_container(OmegaConf.create(text)))


def test_no_key_of_ours_has_a_former_name():
    assert [key for key in every_key() if renamed_key(key)] == []


@pytest.mark.parametrize("new", [new for new in RENAMED_KEYS.values() if new])
def test_every_new_name_of_a_renamed_key_is_a_key(new):
    assert fnmatch.filter(every_key(), new)


@pytest.mark.parametrize("stage", STAGES)
def test_every_callable_of_a_stage_takes_what_it_is_given(stage):
    words = ["stage=ppo", "kl=adaptive", "adapter=qlora", "logger=wandb"] if stage == "ppo" else [f"stage={stage}"]
    values, _ = plain(composed("train", *words))
    assert _callables(values) == []


@pytest.mark.parametrize("pipeline", VARIANTS, ids=" ".join)
def test_every_step_of_a_pipeline_passes_the_checks(pipeline):
    cfg = composed("pipeline", *pipeline)
    assert all_steps(cfg)
    for name, words in all_steps(cfg).items():
        assert problems_of(*words, f"project={cfg.project}", f"run_name={name}") == [], name


@pytest.mark.parametrize("pipeline", VARIANTS, ids=" ".join)
def test_the_steps_of_a_pipeline_come_after_what_they_start_from(pipeline, users_folder, tmp_path, monkeypatch):
    cfg = composed("pipeline", *pipeline)
    monkeypatch.chdir(shutil.copytree(users_folder, tmp_path / "user"))
    for record in Path("runs", cfg.project).glob("*/run.json"):
        record.unlink()
    for name, words in all_steps(cfg).items():
        step = composed("train", *words, f"project={cfg.project}", f"run_name={name}")
        assert find_problems(step) == [], name
        Path(step.run_dir).mkdir(exist_ok=True)
        Path(step.run_dir, "run.json").write_text('{"status": "done"}')


def test_every_target_of_make_that_is_named_is_there():
    texts = [
        *PAGES,
        *CONF.glob("**/*.yaml"),
        *CONF.parent.glob("launch/*.py"),
        CONF.parent / ".ci/run",
    ]
    named = {target for path in texts for target in re.findall(r"(?:^\s*|`)make ([a-z-]+)", path.read_text(), re.M)}
    makefile = (CONF.parent / "Makefile").read_text()
    assert "test" in named and not {target for target in named if not re.search(rf"^{target}:", makefile, re.M)}


@pytest.mark.parametrize("sweep", sorted(path.stem for path in CONF.glob("sweep/*.yaml")))
def test_every_sweep_composes(sweep):
    if sweep == "optuna":
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    assert "stage" in composed("sweep", f"sweep={sweep}")


def commands() -> list[tuple[str, str]]:
    """(file, command) of all commands in the documentation, the experiments and the other files of conf/."""
    found = []
    for path in sorted([*PAGES, *CONF.glob("**/*.yaml"), *CONF.parent.glob("launch/*.py")]):
        text = re.sub(r"\\\n\s*#?\s*", " ", path.read_text(encoding="utf-8"))
        starts = r"(?:accelerate launch|torchrun|python (?:train|launch/\w+)\.py|rlhf-trl(?:-pipeline|-sweep)?)(?= )"
        for line in re.findall(rf"^[#\s$>]*((?:\w+=\S+ )*{starts}.*)$|`({starts}[^`]*)`", text, re.M):
            found.append((path.name, next(filter(None, line))))
    return found


@pytest.mark.parametrize(("file", "line"), commands())
def test_every_command_can_be_typed(file, line):
    words = shlex.split(line, comments=True)
    kind = next((k for k in ("pipeline", "sweep") if any(k in word for word in words[:3] if "=" not in word)), "train")
    given = [word for word in words if re.match(r"^[+~]{0,2}[\w./@]+=", word) and not word.startswith("-")]
    given = [word for word in given if not word.split("=")[0].isupper() and "..." not in word]
    if "--config-dir" in words or "-sc" in words:
        return  # options of the user's own, and Hydra's completion of a shell
    assert problems_of_words(kind, tuple(given)) == []


@functools.cache
def problems_of_words(kind: str, given: tuple[str, ...]) -> list[str]:
    """Return the problems of the words of a command; many commands have the same ones."""
    if kind == "pipeline":
        composed("pipeline", *given)
        return []
    if kind == "sweep":
        composed("sweep", *[w for w in given if re.split("[=.]", w)[0] in SWEEPS])
    given = [w for w in given if re.split("[=.]", w)[0] not in SWEEPS]
    return overrides.compose(overrides.without_sweeps([w for w in given if not w.startswith("hydra")]))[1]


def test_commands_for_one_device_start_without_a_launcher():
    """Without a file of options accelerate prints six lines at each start, and a traceback below our messages."""
    launched = [line for _, line in commands() if re.search(r"accelerate launch.* train\.py \w+=", line)]
    assert launched and [line for line in launched if "--config_file" not in line] == []


def test_there_are_commands_to_try():
    assert len(commands()) > 5 and Path(CONF, "train.yaml").is_file()
