"""Every file under conf/ composes and passes the checks, and every command that we print works as far as its words."""

import ast
import json
import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep
from omegaconf import DictConfig, OmegaConf

from rlhf_trl.checks import find_problems
from rlhf_trl.launching import launch_dir
from rlhf_trl.paths import conf_dir

ROOT = conf_dir().parent
STAGES = sorted(path.stem for path in conf_dir().glob("stage/*.yaml"))
EXPERIMENTS = sorted(path.stem for path in conf_dir().glob("experiment/*.yaml"))
PIPELINES = sorted(path.stem for path in conf_dir().glob("pipeline/*.yaml"))
# Groups of `train.yaml` whose options are a run's own; the others are covered by a test each
GROUPS = ("model", "data", "adapter", "reward", "kl", "logger")
# What an option leaves to the user, with stand-ins
GIVEN = {
    "model=hf": ["model.path=policy"],
    "data=files": ["data.paths=[rows.jsonl]"],
    "data=hub": ["data.path=somebody/something"],
    "data=mix": ["data.sources={own:{_target_:rlhf_trl.data.load_files,_partial_:true,paths:rows.jsonl}}"],
    "reward=function": ["reward.function.function=rlhf_trl.demo.gold_reward"],
    # judges of the review sentences
    "reward=sentiment": ["data=reviews"],
    "reward=vader": ["data=reviews"],
}


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


def finished_run(run_dir: Path, architecture: str = "LlamaForCausalLM") -> None:
    """As much of a run as a later stage is checked for."""
    run_dir.mkdir(parents=True)
    (run_dir / "run.json").write_text(json.dumps({"status": "done", "stage": run_dir.name}))
    (run_dir / "config.json").write_text(json.dumps({"architectures": [architecture]}))


@pytest.fixture
def stand_ins(tmp_path, monkeypatch) -> Path:
    """A folder to stand in, with what the options leave to the user: models, data, and where both are."""
    finished_run(tmp_path / "policy")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "reviews").mkdir()
    monkeypatch.setenv("RLHF_TRL_REVIEWS", "reviews")
    monkeypatch.setenv("RLHF_TRL_SMOLLM2", "policy")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)  # the checks ask no hub
    monkeypatch.chdir(tmp_path)
    return tmp_path


def finished_project(project: str) -> None:
    for name in ("init", "sft", "ppo", "dpo"):
        finished_run(Path("runs", project, name))
    finished_run(Path("runs", project, "reward"), "LlamaForSequenceClassification")


def needed(choice: str) -> list[str]:
    return [choice, *GIVEN.get(choice, [])]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_with_each_option_of_its_groups(compose, stand_ins, stage):
    finished_project("default")
    groups = [group for group in GROUPS if group in compose(f"stage={stage}")]
    # Options of different groups at once, each at least once; a reward of the reviews decides about the data
    turns = max(len(options(group)) for group in groups) if groups else 1
    for turn in range(turns):
        chosen = {group: options(group)[turn % len(options(group))] for group in groups}
        if chosen.get("reward") in ("sentiment", "vader"):
            chosen["data"] = "reviews"
        words = [word for group, option in chosen.items() for word in needed(f"{group}={option}")]
        assert find_problems(compose(f"stage={stage}", "run_name=new", *dict.fromkeys(words))) == [], words


def test_each_option_is_read_by_a_stage(compose):
    """No folder or file of conf/ that no command reaches."""
    read = {group for stage in STAGES for group in compose(f"stage={stage}") if group in GROUPS}
    assert read == set(GROUPS)
    others = {"stage", "experiment", "debug", "pipeline", "sweep"}
    assert {path.name for path in conf_dir().iterdir() if path.is_dir()} == {*GROUPS, *others}
    assert {path.name for path in conf_dir().glob("*.yaml")} == {"train.yaml", "pipeline.yaml", "sweep.yaml"}
    assert all(path.parent.parent == conf_dir() for path in conf_dir().glob("*/**/*.yaml"))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_composes_and_passes_the_checks(compose, stand_ins, experiment):
    cfg = compose(f"experiment={experiment}", "run_name=new")
    finished_project(cfg.project)
    assert find_problems(cfg) == []


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_holds_only_differences(compose, experiment):
    """Each value changes what its groups say, so that it can't fall behind them unnoticed."""
    written = OmegaConf.load(conf_dir() / "experiment" / f"{experiment}.yaml")
    defaults = written.pop("defaults", [])
    choices = [
        f"{group.removeprefix('override /')}={'[' + ','.join(option) + ']' if not isinstance(option, str) else option}"
        for entry in defaults
        if isinstance(entry, DictConfig)
        for group, option in entry.items()
    ]
    without = compose(*choices)
    for key, value in leaves(written):
        assert OmegaConf.select(without, key, throw_on_missing=False) != value, f"{key} says nothing new"


def leaves(node: DictConfig, path: str = ""):
    for key in node:
        value, name = node._get_node(key), f"{path}.{key}".lstrip(".")
        if isinstance(value, DictConfig):
            yield from leaves(value, name)
        else:
            yield name, node[key]


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_a_pipelines_steps_find_what_the_earlier_ones_left(compose, stand_ins, pipeline):
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = hydra_compose("pipeline", [f"pipeline={pipeline}"])
    assert cfg.project == pipeline  # `make demo-clean` and the README name it so
    for name, overrides in cfg.steps.items():
        step = compose(*overrides, f"project={cfg.project}", f"run_name={name}")
        assert step.run_dir == f"runs/{cfg.project}/{name}"
        assert find_problems(step) == [], name
        is_scorer = step.stage.get("task_type") == "SEQ_CLS"
        finished_run(Path(step.run_dir), "LlamaForSequenceClassification" if is_scorer else "LlamaForCausalLM")


@pytest.mark.parametrize("debug", options("debug"))
@pytest.mark.parametrize(
    "stage", [stage for stage in STAGES if stage not in ("compare", "init", "merge", "reward_pairs")]
)
def test_debug_goes_with_each_training_stage(compose, stand_ins, stage, debug):
    assert find_problems(compose(f"stage={stage}", f"debug={debug}")) == []


# ---- Commands ----

PROGRAMS = ("python", "accelerate", "torchrun", "rlhf-trl", "make")
COMPOSED = {"train.py": "train", "pipeline.py": "pipeline", "sweep.py": "sweep"}
COMPOSED |= {"rlhf-trl": "train", "rlhf-trl-pipeline": "pipeline", "rlhf-trl-sweep": "sweep"}


def commands_in(text: str) -> list[str]:
    """Lines that are a command, and commands between backticks; `...` and `<...>` stand for something."""
    text = re.sub(r"\\\n[#\s]*", " ", text)
    found = re.findall(r"`([^`\n]+)`", text)
    found += [re.sub(r"^[#\s$]+", "", line) for line in text.splitlines() if "`" not in line]
    start = re.compile(rf"([A-Z_0-9]+=\S+ )*({'|'.join(PROGRAMS)})\b|\S*(train|pipeline|sweep)\.py( |$)")
    return [command for command in found if start.match(command) and not re.search(r"\.\.\.|[<>|…]", command)]


def written_commands() -> list[tuple[str, str]]:
    """Of README.md, of the comments in the YAML files, and of the docstrings in launch/."""
    texts = {path: path.read_text() for path in [ROOT / "README.md"] if path.exists()}
    for path in [*conf_dir().rglob("*.yaml"), *launch_dir().rglob("*.yaml")]:
        texts[path] = "\n".join(line for line in path.read_text().splitlines() if line.lstrip().startswith("#"))
    for path in launch_dir().glob("*.py"):
        texts[path] = ast.get_docstring(ast.parse(path.read_text()))
    return [
        (str(path.relative_to(ROOT)), command) for path, text in sorted(texts.items()) for command in commands_in(text)
    ]


COMMANDS = written_commands()


def one_job(override: str) -> str:
    """An override that sweeps becomes one with the first of its values."""
    parsed = OverridesParser.create().parse_override(override)
    if not parsed.is_sweep_override():
        return override
    value = parsed.value()
    first = value.start if isinstance(value, IntervalSweep) else next(parsed.sweep_string_iterator())
    return f"{parsed.get_key_element()}={first}"


@pytest.mark.parametrize(("place", "command"), COMMANDS, ids=[f"{place}: {command}" for place, command in COMMANDS])
def test_a_written_command_composes(compose, place, command):
    words = shlex.split(command, comments=True)
    words = words[next(i for i, word in enumerate(words) if not re.match(r"[A-Z_0-9]+=", word)) :]
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text()
        for target in (word for word in words[1:] if "=" not in word):
            assert re.search(rf"^{target}:", makefile, re.M), target
        return
    for option, value in pairwise(words):
        if option == "--config_file":
            assert (ROOT / value).is_file()
    program = next((i for i, word in enumerate(words) if Path(word).name in COMPOSED), None)
    if program is None:
        assert (ROOT / words[1]).is_file() or words[1].startswith("-"), f"{place}: no file of ours"
        return
    rest = words[program + 1 :]
    if "--config-dir" in rest:
        pytest.skip("what the user's own folder holds isn't known here")
    overrides = [one_job(word) for word in rest if "=" in word and not word.startswith("-")]
    if "sweep=optuna" in overrides:
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        hydra_compose(COMPOSED[Path(words[program]).name], overrides)


def test_commands_are_found():
    assert {"train.py", "pipeline.py", "sweep.py"} <= {
        Path(word).name for _, text in COMMANDS for word in text.split()
    }
    text = "Text `make demo` and `stage.x=...`:\n\n    accelerate launch train.py \\\n        stage=sft  # why\n"
    assert commands_in(text) == ["make demo", "accelerate launch train.py  stage=sft  # why"]
    assert (
        one_job("seed=1,2") == "seed=1" and one_job("a=interval(0.5,1)") == "a=0.5" and one_job("a=[1,2]") == "a=[1,2]"
    )
