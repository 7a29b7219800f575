"""Comparison of policies on held-out prompts (`stage=evaluate`)."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from datasets import Dataset
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from rlhf_trl.build import instantiate_data, instantiated, reward_functions
from rlhf_trl.callbacks.loggers import log_images, log_summary, log_tables
from rlhf_trl.config.program import command_line
from rlhf_trl.config.values import as_dict
from rlhf_trl.data.splits import eval_split
from rlhf_trl.errors import ConfigError
from rlhf_trl.evaluation.judges import TextJudge
from rlhf_trl.evaluation.policies import Benchmark, Candidate, evaluate_policies
from rlhf_trl.models.tokenizers import load_tokenizer
from rlhf_trl.report.fronts import FrontOptions
from rlhf_trl.report.measures import known
from rlhf_trl.report.page import write_page
from rlhf_trl.report.project import project_page
from rlhf_trl.report.records import short_names, swept_keys
from rlhf_trl.report.tables import comparison_tables
from rlhf_trl.report.text import comparison_text, short_value
from rlhf_trl.rewards.conditions import unmet_conditions
from rlhf_trl.runs.checkpoints import checkpoints
from rlhf_trl.runs.directory import delete_backup
from rlhf_trl.runs.paths import baseline_problem, find_policy, named_policies, project_dir
from rlhf_trl.runs.ranks import is_main_process
from rlhf_trl.runs.record import COMPARISON_FILE, SWEEP_FILE, read_jobs, read_metrics, write_json
from rlhf_trl.stages.base import open_run
from rlhf_trl.terminal import printable, say


def evaluate(cfg: DictConfig) -> None:
    """
    Compare the policies of `cfg.stage`, write `comparison.json` into the run directory and the report beside the runs,
    and print tables.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if a policy is missing, the data has no held-out prompts, or the judge can't
            be asked.
    """
    OmegaConf.resolve(cfg)
    stage, runs = cfg.stage, project_dir(cfg)
    named = named_policies(cast(dict[str, str | None] | list[str], OmegaConf.to_container(stage.policies)))
    if problem := baseline_problem(stage.baseline, named):
        raise ConfigError(problem)
    policies = policies_of(named, stage.checkpoints, stage.sweeps, runs)
    base = policies[stage.baseline].path
    with open_run(cfg, start=base):
        if not is_main_process():
            return  # one rank samples and writes
        judge = instantiated(cfg.judge)
        judge.check()
        dataset = eval_split(instantiate_data(cfg))
        if "images" in dataset.column_names and isinstance(judge, TextJudge):
            raise ConfigError("The prompts have images, and the judge reads text alone. Set `judge=reward`.")
        for problem in unmet_conditions(as_dict(cfg.reward), dataset):
            say(f"warning: {problem}")
        benchmark = Benchmark(
            dataset=dataset,
            rewards=reward_functions(cfg, load_tokenizer(base), dataset.column_names),
            combine=instantiate(cfg.combine),
            constraints=as_dict(stage.constraints) if stage.constraints else {},
            temperature=stage.temperature,
            max_completion_length=stage.max_completion_length,
            batch_size=stage.batch_size,
            seed=cfg.seed,
        )
        comparison = evaluate_policies(
            policies,
            stage.baseline,
            benchmark,
            judge,
            stage.dtype,
            samples=stage.best_of_n,
            samples_batch_size=stage.best_of_n_batch_size,
            references=reference_answers(cfg) if stage.references else None,
            slices=stage.slices,
            front=front_options(cfg),
        )
        delete_backup(cfg.run_dir)
        write_json(Path(cfg.run_dir, COMPARISON_FILE), comparison)  # before anything that could go wrong with the page
        page = project_page(runs, evaluation=cfg.run_name, ending=cfg.run_name)
        path = write_page(page, runs / "report")
        logger = instantiate(cfg.logger.run)
        with logger(run_dir=cfg.run_dir, name=f"{cfg.project}/{cfg.run_name}", config=as_dict(cfg, resolve=False)):
            log_summary(comparison.measures)
            log_tables(comparison_tables(known(comparison)))
            log_images(page.figures())
        if stage.show:
            print("\n" + printable(comparison_text(comparison)))
        print(f"\nReport: {path}")


def front_options(cfg: DictConfig) -> FrontOptions:
    """Return the options of the front by several rewards."""
    stage = as_dict(cfg.stage)
    return FrontOptions(rewards=stage["front"], reference_point=stage["reference_point"], choose=stage["choose"])


def policies_of(
    places: dict[str, str], with_checkpoints: bool, sweeps: Sequence[str], project_dir: str | os.PathLike
) -> dict[str, Candidate]:
    """
    Return every policy to evaluate: those named, on request the checkpoints of runs among them (`ppo@96`), and the
    finished runs of sweeps (`ppo beta=0.1`).

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if one is missing.
    """
    found = {name: Candidate(find_policy(place, project_dir), name) for name, place in places.items()}
    for name, policy in list(found.items()) if with_checkpoints else ():
        metrics = read_metrics(policy.path) or {"history": []}
        last = max((entry.get("step", 0) for entry in metrics["history"]), default=0)
        for path in checkpoints(policy.path):
            step = int(path.name.split("-")[1])
            if step != last:  # that one is the run's result
                found[f"{name}@{step}"] = Candidate(str(path), name)
    for sweep in sweeps:
        for label, path in sweep_runs(Path(project_dir, sweep)).items():
            found[label] = Candidate(path, sweep)
    return found


def sweep_runs(folder: Path) -> dict[str, str]:
    """
    Return the directories of the finished runs of a sweep, by a name with the options that differ.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if there is no sweep, or no run of it is done.
    """
    jobs = read_jobs(folder / SWEEP_FILE)
    done = [job for job in jobs if job.done]
    if not done:
        sweep = command_line("-m", app="sweep")
        raise ConfigError(
            f"`stage.sweeps` names `{folder.name}`, and there is no sweep with finished runs in `{folder}`. Make it "
            f"with `{sweep} stage=... project={folder.parent.name} ...`, or remove it."
        )
    keys, title = swept_keys(jobs), folder.name.removesuffix("_sweep")
    values = [[job.overrides.get(key, "") for key in keys] for job in done]
    shown = [[short_value(value) for value in each] for each in values]
    if len({tuple(each) for each in shown}) < len(done):
        shown = values  # rounded, two of them would have one name
    paths = [str((folder / str(job.number)).resolve()) for job in done]
    names = [
        " ".join([title, *(f"{key}={value}" for key, value in zip(short_names(keys).values(), each, strict=True))])
        for each in shown
    ]
    return dict(zip(names, paths, strict=True))


def reference_answers(cfg: DictConfig) -> Dataset:
    """
    Return the held-out rows of the data with its own answers, `prompt` and `completion`.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if the data has no answers.
    """
    try:
        return eval_split(instantiate_data(cfg, dataset_type="prompt_completion"))
    except ConfigError as error:
        raise ConfigError(
            f"`stage.references=true` measures the perplexity of the data's own answers, and it has none: {error} Set "
            "`stage.references=false`."
        ) from error
