"""
All problems of a composed config, in one error before any model loads.

[`find_problems`] reads the config, the file system and the environment, and imports nothing heavy: it takes about a
second. [`check`] adds the checks that need the libraries. A problem is a sentence or two: what is wrong and where,
and what to set.
"""

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from omegaconf import DictConfig

from rlhf_trl.checks.batches import batch_problems
from rlhf_trl.checks.combinations import combination_problems
from rlhf_trl.checks.machine import machine_problems
from rlhf_trl.checks.names import argument_problems, section_problems, target_problems, text_problems
from rlhf_trl.checks.outputs import folder_problems, published_problems
from rlhf_trl.checks.paths import data_problems, model_problems, output_problems, unmade_runs
from rlhf_trl.checks.ranges import range_problems
from rlhf_trl.checks.renamed import renamed_problems
from rlhf_trl.checks.rewards import reward_problems
from rlhf_trl.checks.vllm import vllm_problems
from rlhf_trl.config.values import plain, sources
from rlhf_trl.errors import ConfigError
from rlhf_trl.runs.directory import run_directory_problems
from rlhf_trl.runs.nodes import problems_of_all_nodes
from rlhf_trl.runs.ranks import world_size


def check(cfg: DictConfig) -> None:
    """
    Stop a run that can't succeed. All ranks must call it, and leave it together.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: with every problem found. The checks that need the libraries run only if the
            others found nothing: importing them takes seconds.
    """
    problems = find_problems(cfg)
    if not problems:
        from rlhf_trl.checks.libraries import library_problems

        problems = library_problems(cfg)
    problems = problems_of_all_nodes(problems, "libraries")
    if problems:
        raise ConfigError.join(problems)
    if world_size() > 1:
        from accelerate import PartialState

        # Rank 0 is about to mark the run directory as used; each rank has to have seen it unused before
        PartialState().wait_for_everyone()


# Checks of the config alone, of single keys and of several: they read neither what a run starts from nor the ranks
# that it will have
OF_KEYS = (
    section_problems,
    renamed_problems,
    target_problems,
    argument_problems,
    range_problems,
    text_problems,
)
OF_COMBINATIONS = (combination_problems, reward_problems)


def find_problems(cfg: DictConfig) -> list[str]:
    """Return every problem that can be found without importing torch, transformers or TRL."""
    return _found(
        cfg,
        *OF_KEYS,
        model_problems,
        data_problems,
        output_problems,
        batch_problems,
        combination_problems,
        machine_problems,
        vllm_problems,
        reward_problems,
        run_directory_problems,
        folder_problems,
        published_problems,
    )


def step_problems(cfg: DictConfig, earlier: Collection[str]) -> list[str]:
    """
    Return the problems of a run that is to start later, after those named `earlier` have made what it reads: those of
    the config alone, and the runs that it names and nothing makes.
    """
    return _found(cfg, *OF_KEYS, *OF_COMBINATIONS, partial(unmade_runs, earlier=earlier))


def _found(cfg: DictConfig, *checks: Callable[[dict[str, Any]], list[str]]) -> list[str]:
    values, problems = plain(cfg)
    for find in checks:
        problems += find(values)
    for path, source in sources(cfg).items():  # name the key that was set, `seed`, not `stage.args.seed`
        problems = [text.replace(f"`{path}`", f"`{source}`").replace(f"`{path}=", f"`{source}=") for text in problems]
    once: dict[str, str] = {}  # by the first sentence, which says what is wrong
    for text in problems:
        once.setdefault(text.split(". ")[0], text)
    return list(once.values())
