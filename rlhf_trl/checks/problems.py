"""
Everything that can be wrong before a model loads, in one error.

[`find_problems`] reads the composed config, the file system and the environment, and imports nothing heavy: it answers
in about a second. [`check`] adds what only the libraries themselves can tell. A problem is a sentence or two: what is
wrong and where, and what to type.
"""

from omegaconf import DictConfig

from rlhf_trl.checks.batches import batch_problems, world_size
from rlhf_trl.checks.combinations import combination_problems
from rlhf_trl.checks.names import argument_problems, section_problems, target_problems, text_problems
from rlhf_trl.checks.places import data_problems, model_problems, output_problems
from rlhf_trl.checks.ranges import range_problems
from rlhf_trl.checks.renamed import renamed_problems
from rlhf_trl.checks.rewards import reward_problems
from rlhf_trl.checks.room import room_problems
from rlhf_trl.config.values import plain, sources
from rlhf_trl.errors import ConfigError
from rlhf_trl.runs.conflicts import run_directory_problems


def check(cfg: DictConfig) -> None:
    """
    Stop a run that can't succeed. Every rank calls it, and they leave it together.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: with every problem found. The libraries are asked when the rest is in order:
            importing them takes seconds.
    """
    problems = find_problems(cfg)
    if not problems:
        from rlhf_trl.checks.libraries import library_problems

        problems = library_problems(cfg)
    if problems:
        raise ConfigError.join(problems)
    if world_size() > 1:
        from accelerate import PartialState

        # Rank 0 is about to mark the run directory as used; each rank has to have seen it unused before
        PartialState().wait_for_everyone()


def find_problems(cfg: DictConfig) -> list[str]:
    """Every problem that can be found without importing torch, transformers or TRL."""
    values, problems = plain(cfg)
    for look in (
        section_problems,
        renamed_problems,
        target_problems,
        argument_problems,
        range_problems,
        text_problems,
        model_problems,
        data_problems,
        output_problems,
        batch_problems,
        combination_problems,
        reward_problems,
        run_directory_problems,
        room_problems,
    ):
        problems += look(values)
    for path, source in sources(cfg).items():  # `stage.args.seed` is what was typed as `seed`
        problems = [text.replace(f"`{path}`", f"`{source}`").replace(f"`{path}=", f"`{source}=") for text in problems]
    once: dict[str, str] = {}  # by what is wrong, whatever there is to set
    for text in problems:
        once.setdefault(text.split(". ")[0], text)
    return list(once.values())
