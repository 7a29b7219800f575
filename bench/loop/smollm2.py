"""
Two rounds of `pipeline=reviews/rounds`: SmolLM2-135M, with the raters of the review sentences as the people.

The steps are those of the pipeline; `python -m bench.loop smollm2` prints the one command that runs the same.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bench.loop.results import interval, markdown, pair_accuracy
from bench.loop.steps import Steps
from rlhf_trl.cli.launcher import shell_line
from rlhf_trl.cli.overrides import compose
from rlhf_trl.cli.rounds import all_steps, register_rounds
from rlhf_trl.errors import ConfigError
from rlhf_trl.runs.record import read_quality
from rlhf_trl.tasks.reviews.judges import sentiment

PIPELINE = "reviews/rounds"
SIZES = {"rounds": 2}  # and the pipeline's own
QUICK = SIZES | {
    "sft_steps": 1,
    "ratings": 32,
    "prompts": 8,
    "completions": 2,
    "labels": 8,
    "reward_steps": 1,
    "episodes": 64,
    "held_out": 8,
    "pairs": 10,
}


def measure(steps: Steps, setting: Mapping[str, Any]) -> dict[str, Any]:
    """
    Run the steps of the pipeline.

    Returns:
        `dict[str, Any]`: `rounds`, for each the measures of its policy, labels and reward models; `start`, the share
        of positive endings of the first policy.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if data or model are missing, or a step fails.
    """
    need_folders()
    register_rounds()
    words = [f"pipeline={PIPELINE}", *(f"{name}={size}" for name, size in setting.items()), f"project={steps.project}"]
    print(shell_line(["python", "launch/pipeline.py", *words]), flush=True)
    cfg, problems = compose(words, [], "pipeline")
    if cfg is None or problems:
        raise ConfigError("\n".join(problems))
    for name, overrides in all_steps(cfg).items():
        steps.run(name, *overrides)
    rounds = [measures(steps, number) for number in range(1, setting["rounds"] + 1)]
    first = steps.comparison(f"compare_{setting['rounds']}").policies["policy_0"].reward
    assert first is not None
    return {"start": list(first), "rounds": rounds}


def need_folders() -> None:
    """Raise a [`~rlhf_trl.errors.ConfigError`] unless the sentences and the model are there."""
    missing = [
        name for name in ("RLHF_TRL_REVIEWS", "RLHF_TRL_SMOLLM2") if not Path(os.environ.get(name, "-")).is_dir()
    ]
    if missing:
        raise ConfigError(f"{' and '.join(missing)} must name a folder (docs/recipes.md).")
    for name in ("RLHF_TRL_REVIEWS", "RLHF_TRL_SMOLLM2"):  # the steps have another working directory
        os.environ[name] = str(Path(os.environ[name]).resolve())


def measures(steps: Steps, number: int) -> dict[str, Any]:
    """Return the measures of a round."""
    policy = steps.comparison(f"compare_{number}").policies[f"policy_{number}"]
    quality = read_quality(steps.path(f"quality_{number}"))
    assert policy.reward is not None and policy.kl is not None and quality is not None
    return {
        "positive": list(policy.reward),
        "proxy": policy.rewards["model"],
        "kl": policy.kl.mean,
        "labels": steps.metrics(f"label_{number}")["eval_labels"],
        "people": {name: list(result.accuracy) for name, result in quality.rewards.items()},
        "own": own_accuracy(steps, number),
    }


def own_accuracy(steps: Steps, number: int) -> float | None:
    """
    Return the accuracy on a round's completions of the reward model before its refresh, which scored them when they
    were collected, by the classifier that answers about them.
    """
    rows = steps.candidates(f"collect_{number}")
    path = os.environ["RLHF_TRL_REVIEWS"]
    found = []
    for row in rows:
        texts = [str(candidate.completion) for candidate in row.candidates]
        truth = sentiment([row.prompt] * len(texts), texts, path=path, prompt="Review:")
        scores = [
            float(np.mean([s for s in candidate.scores["model"] if s is not None])) for candidate in row.candidates
        ]
        found.append((truth, scores))
    return pair_accuracy(found)


def report(found: Mapping[str, Mapping[str, Any]], setting: Mapping[str, Any]) -> str:
    """Return the table, from the result of the first seed."""
    result = next(iter(found.values()))
    rows = [["0", _estimate(result["start"]), "", "0", "", "", "", ""]]
    for number, each in enumerate(result["rounds"], 1):
        people = each["people"]
        rows.append(
            [
                str(number),
                _estimate(each["positive"]),
                f"{each['proxy']:.2f}",
                f"{each['kl']:.1f}",
                f"{each['labels']:.0f}",
                interval([each["own"]]),
                _estimate(people["before"]),
                _estimate(people["model"]),
            ]
        )
    headers = ["policy", "positive endings [95 %]", "reward model", "KL", "labels"]
    headers += ["accuracy on its prompts' completions before the refresh", "on people's pairs before", "after"]
    return markdown(headers, rows)


def _estimate(values: list[float]) -> str:
    mean, low, high = values
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def settings_of(quick: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the setting, and what stands of it in the file of results."""
    setting = QUICK if quick else SIZES
    return setting, dict(setting)
