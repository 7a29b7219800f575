"""Every option of conf/, and the configs they are composed to."""

import functools

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from rlhf_trl.config.groups import option_groups
from rlhf_trl.config.values import nodes
from rlhf_trl.runs.paths import conf_dir

CONF = conf_dir()
GROUPS = option_groups([str(CONF)])
OPTIONS = sorted((group, option) for group, options in GROUPS.items() for option in options)
STAGES = sorted(GROUPS["stage"])
PIPELINES = sorted(GROUPS["pipeline"])
# What a user has to say besides
NEEDS = {
    "stage/merge": ["model.run=sft"],  # what `model=demo` names is a full model
    "stage/push": ["model.run=sft", "stage.repo=me/my-model"],
    "stage/soup": ["stage.models=[ppo,dpo]"],
    "critic/adapter": ["adapter=lora"],
    # The embedded model has learning rates of its own
    "adapter/lora": ["model=hf", "model.path=organization/name"],
    "model/hf": ["model.path=organization/name"],
    "data/files": ["data.paths=pairs.jsonl"],
    "data/hub": ["data.path=organization/name"],
    "data/mix": ["data.sources={own:{_target_:rlhf_trl.tasks.demo.load,_partial_:true}}"],
    "judge/model": ["judge.path=organization/name"],
    "judge/http": ["judge.url=http://localhost:8000/v1", "judge.model=name"],
    "labeler/rubric": ["labeler.principles={kind: {text: Be kind.}}"],
    "reward/adapter": ["adapter=lora"],
    "select/best_worst": ["reward=demo"],
    "select/thompson": ["reward=model"],
    "select/uncertainty": ["reward=model"],
    "combine/lagrange": ["reward=[demo,tokens]", "combine.constraints={tokens: '<= 20'}"],
    "combine/threshold": ["reward=[demo,eos]", "combine.constraints={eos: 1}"],
    "reward/format": ["reward.format.kwargs.pattern=.*"],
    "reward/classifier": ["reward.classifier.path=organization/name"],
    "reward/http": ["reward.http.url=http://127.0.0.1:8000/score"],
    "reward/length": ["reward.length.kwargs.max_length=20"],
    "reward/function": ["reward.function.function=rlhf_trl.tasks.demo.gold_reward"],
    "reward/sentiment": ["data=reviews"],
}


def composed(name: str, *words: str) -> DictConfig:
    """Return the config `train`, `sweep` or `pipeline` with the words of a command line."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(name, list(words))


def reader_of(group: str) -> list[str]:
    """Return a stage that reads the group."""
    group = group.split("/")[0]  # `data/feedback` is read where `data` is
    readers = [stage for stage in STAGES if f"- /{group}:" in (CONF / "stage" / f"{stage}.yaml").read_text()]
    return [f"stage={'ppo' if 'ppo' in readers else readers[0]}"] if readers else []


def words_of(group: str, option: str) -> list[str]:
    """Return the words that choose an option, with a stage that reads its group."""
    first = [] if group in ("stage", "experiment") else reader_of(group)
    if (group, option) == ("reward", "none"):  # what learns from a reward needs one
        first = ["stage=generate"]
    return [*first, f"{group}={option}", *NEEDS.get(f"{group}/{option}", [])]


@functools.cache
def every_config() -> list[tuple[str, dict]]:
    """Return the composed config of every option as nested dicts, by its name."""
    found = [(name, composed(name)) for name in ("train", "sweep", "pipeline")]
    for group, option in OPTIONS:
        name = "pipeline" if group == "pipeline" else "train"
        words = [f"pipeline={option}"] if group == "pipeline" else words_of(group, option)
        found += [(f"{group}={option}", composed(name, *words))] if group != "sweep" else []
    return [(name, OmegaConf.to_container(cfg)) for name, cfg in found]


@functools.cache
def every_key() -> set[str]:
    """Return the dotted path of every key of every config."""
    return {
        f"{path}.{key}".removeprefix(".")
        for _, values in every_config()
        for path, node in nodes(values)
        for key in node
    }
