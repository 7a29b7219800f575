"""Accuracy and reliability of rewards on annotated completions (`stage=evaluate_reward`)."""

from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset, DatasetDict
from omegaconf import DictConfig, OmegaConf

from rlhf_trl.build import instantiate_data, reward_functions
from rlhf_trl.errors import ConfigError
from rlhf_trl.evaluation.annotations import Annotations, read_annotated
from rlhf_trl.evaluation.generation import load_policy
from rlhf_trl.evaluation.policies import Benchmark
from rlhf_trl.evaluation.reward_quality import evaluate_rewards, metrics_of, with_policy_samples
from rlhf_trl.hints import did_you_mean, names_of
from rlhf_trl.report.page import write_page
from rlhf_trl.report.rewards import reward_page, reward_text
from rlhf_trl.rewards.base import Reward
from rlhf_trl.runs.directory import delete_backup
from rlhf_trl.runs.paths import find_policy, project_dir
from rlhf_trl.runs.ranks import is_main_process
from rlhf_trl.runs.record import QUALITY_FILE, write_json, write_metrics
from rlhf_trl.stages.base import command, open_run
from rlhf_trl.terminal import printable, say


def evaluate_reward(cfg: DictConfig) -> float | None:
    """
    Evaluate each reward of `cfg.reward` on the held-out rows of `cfg.data`: write `reward_quality.json`,
    `metrics.json` and the page `report/index.html`, and print the tables.

    Returns:
        `float` or `None`: the metric named by `cfg.objective`; None on ranks other than the first, which does it all.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if a reward model or policy is missing, the data has no comparisons, a column
            named for slices isn't there, or a reward returns no finite score.
    """
    OmegaConf.resolve(cfg)
    stage = cfg.stage
    if problems := _problems(stage, list(cfg.reward)):
        raise ConfigError.join(problems)
    policy = None if stage.policy is None else (stage.policy, find_policy(stage.policy, project_dir(cfg)))
    with open_run(cfg, start=", ".join(cfg.reward)):
        if not is_main_process():
            return None  # one rank scores and writes
        annotations = read_annotated(rows_of(instantiate_data(cfg)))
        rewards = reward_functions(cfg, tokenizer=None)
        quality = evaluate_rewards(
            annotations,
            rewards,
            gaps_above=stage.gaps_above,
            slices=stage.slices,
            like_length=stage.like_length,
            bins=stage.bins,
            gold=stage.gold,
        )
        if policy is not None:
            quality = with_policy_samples(
                quality,
                load_policy(*policy, dtype=stage.dtype),
                _benchmark(cfg, annotations, rewards),
                stage.gold,
                stage.completions,
            )
        metrics = metrics_of(quality)
        delete_backup(cfg.run_dir)
        write_json(Path(cfg.run_dir, QUALITY_FILE), quality)  # before anything that could go wrong with the page
        write_metrics(cfg.run_dir, [{"step": 0, **metrics}])
        page = reward_page(quality, f"{cfg.project}/{cfg.run_name}", command(cfg))
        path = write_page(page, Path(cfg.run_dir, "report"))
        print(f"\n{printable(reward_text(quality))}\n\n{path}")
    if cfg.objective is not None and cfg.objective not in metrics:
        others = did_you_mean(cfg.objective, metrics)
        say(f"The objective `{cfg.objective}` was not measured, so a sweep would get nothing from this run. {others}")
    return None if cfg.objective is None else metrics.get(cfg.objective)


def _problems(stage: DictConfig, rewards: list[str]) -> list[str]:
    problems = [
        f"`stage.{name}` is {stage[name]}. Set it to {least} or more."
        for name, least in (("bins", 1), ("prompts", 1), ("completions", 2), ("like_length", 0), ("batch_size", 1))
        if not stage[name] >= least
    ]
    if stage.gold is not None and stage.gold not in rewards:
        problems.append(
            f"`stage.gold` is `{stage.gold}`, and the rewards are {names_of(rewards)}. Name one of them, or add it to "
            "`reward`: `'reward=[model,demo]' stage.gold=gold`."
        )
    if stage.gold is not None and stage.gold in rewards and len(rewards) == 1:
        problems.append(
            f"`stage.gold` is `{stage.gold}`, the only reward, so there is none to hold beside it. Add another to "
            "`reward`, or set `stage.gold=null`."
        )
    if stage.policy is not None and stage.gold is None:
        problems.append(
            "`stage.policy` writes completions that nobody has rated, so best-of-n needs a gold reward to judge them. "
            "Set `stage.gold=NAME` with the name of one of `reward`, or `stage.policy=null`."
        )
    if stage.policy is not None and stage.temperature == 0:
        problems.append(
            "`stage.temperature` is 0, so `stage.policy` would write the same completion each time, and the best of "
            "them is no choice. Set it above 0."
        )
    return problems


def _benchmark(cfg: DictConfig, annotations: Annotations, rewards: Sequence[Reward]) -> Benchmark:
    """Return the first prompts, as `cfg.stage` samples completions for them."""
    names = ("temperature", "max_completion_length", "batch_size")
    options = {name: cfg.stage[name] for name in names}
    return Benchmark(dataset=annotations.first_prompts(cfg.stage.prompts), rewards=rewards, seed=cfg.seed, **options)


def rows_of(datasets: DatasetDict) -> Dataset:
    """Return the eval split; with a note all rows, where the data has no other split than `train`."""
    if "eval" in datasets:
        return datasets["eval"]
    say(f"the data has no `eval` split, so rewards are evaluated on all of its {len(datasets['train']):,} rows")
    return datasets["train"]
