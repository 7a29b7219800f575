"""Every recipe of conf/experiment passes the checks, and takes two steps with a tiny model and rows of its schema."""

import math
import re
import subprocess
from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from rlhf_trl.checks import find_problems
from rlhf_trl.config.values import flatten
from tests.helpers.configs import CONF, GROUPS, composed
from tests.helpers.recipes import ROWS, START, START_VISION, localize
from tests.helpers.run_files import metrics, record

# Recipes by project, in the order in which they start from each other
RECIPES = {
    "tldr": ["sft", "reward", "ppo", "rloo", "dpo", "compare"],
    "hh/pythia": ["sft", "dpo"],
    "hh/llama3": ["reward", "ppo"],
    "ultrafeedback/zephyr": ["sft", "dpo"],
    "ultrafeedback/zephyr_qlora": ["sft", "dpo"],
    "smollm2": ["sft", "dpo"],
    "smollm3": ["dpo"],
    "olmo2": ["sft", "dpo", "grpo"],
    "tulu3": ["sft", "dpo", "reward", "ppo"],
    "gsm8k": ["ppo", "compare"],
    "helpsteer2": ["reward"],
    "nectar": ["reward"],
    "arena": ["reward"],
    "safe_rlhf": ["helpful", "cost", "ppo"],
    "rlaif_v/smolvlm": ["reward", "ppo", "dpo"],
    "rlaif_v/qwen": ["dpo"],
    "own": ["sft", "reward", "ppo", "compare"],
}
# Two steps of tiny batches. Everything else is as in the recipe
SMALL = {
    "max_steps": 2,
    "total_episodes": None,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "steps_per_generation": 1,
    "num_iterations": 1,
    "num_generations": 2,
    "max_completion_length": 4,
    "logging_steps": 1,
    "eval_strategy": "no",
    "eval_on_start": False,
    "save_strategy": "no",
}
PAIRS = """{"prompt": "What is %d?", "chosen": "A number, %d.", "rejected": "No."}\n"""
REWARDS = """
def short(completions, **columns):
    texts = [each if isinstance(each, str) else each[-1]["content"] for each in completions]
    return [-max(0, len(text.split()) - 100) / 100 for text in texts]
"""


@pytest.fixture(scope="session")
def starts(tmp_path_factory) -> Path:
    """Folder of the models and data sets that recipes share."""
    return tmp_path_factory.mktemp("starts")


def small(cfg, starts):
    """Return the config of a recipe on tiny models, rows and batches."""
    localize(cfg, starts)
    cfg.data.max_samples, cfg.data.max_eval_samples = 8, 2
    if "args" in cfg.stage:
        for name, value in SMALL.items():
            if name in cfg.stage.args and (name != "num_generations" or cfg.stage.name != "ppo"):
                cfg.stage.args[name] = value
    else:
        cfg.stage.max_completion_length, cfg.stage.best_of_n = 4, 0
    return cfg


def test_the_recipe_to_copy_works_as_a_copy(tmp_path):
    """The commands of docs/your-own.md copy the experiments and their pipeline, whose steps are then the copies."""
    lines = (CONF.parent / "docs" / "your-own.md").read_text().splitlines()
    copying = [line for line in lines if line.split(" ")[0] in ("mkdir", "cp", "sed")]
    (tmp_path / "conf").symlink_to(CONF)
    subprocess.run(" && ".join(copying), shell=True, cwd=tmp_path, check=True)
    mine = f"hydra.searchpath=[file://{tmp_path}/my_conf]"
    steps = composed("pipeline", mine, "pipeline=mine").steps
    assert list(steps) == RECIPES["own"]
    for name, words in steps.items():
        cfg = composed("train", mine, *words)
        assert words[0] == f"experiment=mine/{name}" and cfg.data.paths == "pairs.jsonl"


# What a published result depends on: a recipe says it, whether or not it is today's default
PUBLISHED = {
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "steps_per_generation",
    "num_generations",
    "num_iterations",
    "num_train_epochs",
    "learning_rate",
    "critic_learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "beta",
    "temperature",
    "max_length",
    "max_completion_length",
    "r",
}


@pytest.mark.slow
def test_an_experiment_repeats_no_default_that_is_not_published(tmp_path):
    """`own` does, since it shows what to change."""
    repeated = []
    for name in sorted(name for name in GROUPS["experiment"] if not name.startswith("own/")):
        given = OmegaConf.to_container(OmegaConf.load(CONF / "experiment" / f"{name}.yaml"), resolve=False)
        bare = tmp_path / "experiment" / "bare" / f"{name}.yaml"
        bare.parent.mkdir(parents=True, exist_ok=True)
        bare.write_text("# @package _global_\n" + OmegaConf.to_yaml({"defaults": given.pop("defaults")}))
        default = OmegaConf.to_container(
            composed("train", f"hydra.searchpath=[file://{tmp_path}]", f"experiment=bare/{name}"), resolve=False
        )
        kept = set() if name.startswith("reviews/") else PUBLISHED
        given.pop("published", None)
        defaults = flatten(default)
        repeated += [
            f"{name}: {key}"
            for key, value in flatten(given).items()
            if key.split(".")[-1] not in kept and key in defaults and defaults[key] == value
        ]
    assert repeated == []


def test_every_recipe_is_listed():
    listed = {f"{family}/{name}" for family, names in RECIPES.items() for name in names}
    assert listed == {name for name in GROUPS["experiment"] if not name.startswith("reviews/")}


@pytest.mark.parametrize("family", RECIPES)
def test_a_recipe_takes_two_steps_with_a_model_of_its_architecture(family, compose, starts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("pairs.jsonl").write_text("".join(PAIRS % (i, i) for i in range(30)))
    Path("my_rewards.py").write_text(REWARDS)
    for name in RECIPES[family]:
        given = OmegaConf.load(CONF / "experiment" / family / f"{name}.yaml")
        cfg = small(compose(f"experiment={family}/{name}", f"run_name={name}"), starts)
        assert cfg.project == family.replace("/", "_")
        assert find_problems(cfg) == [], name
        instantiate(cfg.stage.run)(cfg)
        run = record(cfg.run_dir)
        assert run["status"] == "done" and run["published"] == given.get("published", {})
        if "args" in cfg.stage:
            steps = [entry for entry in metrics(cfg.run_dir)["history"] if "loss" in entry]
            assert [entry["step"] for entry in steps] == [1, 2], name


def test_the_head_of_a_recipe_says_what_it_takes_and_what_came_of_it():
    for family, names in RECIPES.items():
        for name in names:
            text = (CONF / "experiment" / family / f"{name}.yaml").read_text()
            head = text.split("defaults:")[0].replace("\n#", "")
            assert f"experiment={family}/{name}" in head and "ot run here" in head and "Hardware" in head, (
                family,
                name,
            )


def test_the_batches_of_a_head_are_those_of_the_file(compose):
    seen = 0
    for name in [f"{family}/{name}" for family, names in RECIPES.items() for name in names]:
        head = " ".join((CONF / "experiment" / f"{name}.yaml").read_text().split("defaults:")[0].split("\n# "))
        args = compose(f"experiment={name}").stage.get("args", {})
        for text in re.findall(r"((?:\d+ (?:\w+ )?x )+\d+ GPUs) = ([\d,]+)", head):
            numbers = [int(number) for number in re.findall(r"\d+", text[0])]
            assert math.prod(numbers) == int(text[1].replace(",", "")), name
            steps = (args.gradient_accumulation_steps, args.get("steps_per_generation"))
            if "as here" not in head:
                assert numbers[0] == args.per_device_train_batch_size and numbers[1] in steps, name
            seen += 1
    assert seen > 15


def test_the_rows_and_models_of_this_test_are_those_of_the_recipes(compose):
    paths = {value for name in GROUPS["experiment"] if not name.startswith("reviews/") for value in paths_of(name)}
    assert paths == {*ROWS, *START, *START_VISION}


def paths_of(name: str) -> list[str]:
    """Return the hub ids in a recipe."""
    given = OmegaConf.to_container(OmegaConf.load(CONF / "experiment" / f"{name}.yaml"))
    model, data = given.get("model", {}), given.get("data", {})
    found = [node.get("path") for node in (model, data, *data.get("sources", {}).values())]
    found += given["stage"].get("policies", {}).values()
    return [path for path in found if path and path.count("/") == 1 and not path.startswith("$")]
