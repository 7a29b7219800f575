"""Rules of the options of selections and labelers. Imports no torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_trl.config.ranges import COUNT, NONNEGATIVE, POSITIVE
from rlhf_trl.runs.directory import PEOPLE

SELECTION = "rlhf_trl.labels.selection"
SCORED = {"tie_margin": NONNEGATIVE, "noise": NONNEGATIVE, "name": "text"}
ASKED = {"samples": COUNT, "temperature": NONNEGATIVE, "schema": "bool", "max_tokens": f"{COUNT}?"}
RULES = {
    PEOPLE: {
        "host": "text",
        "port": "int [0, 65535]",
        "both_bad": "bool",
        "confidence": "bool",
        "edits": "bool",
        "gold_every": "int [0, inf)",
        "repeat_every": "int [0, inf)",
        "linger": NONNEGATIVE,
    },
    "rlhf_trl.labels.machine.RewardLabeler": SCORED,
    "rlhf_trl.labels.machine.GoldLabeler": SCORED,
    "rlhf_trl.labels.judging.JudgeLabeler": ASKED | {"inconsistent": "tie|skip"},
    "rlhf_trl.labels.judging.RubricLabeler": ASKED | {"tie_margin": NONNEGATIVE},
    "rlhf_trl.labels.judging.RevisionLabeler": {"temperature": NONNEGATIVE, "max_tokens": COUNT},
    f"{SELECTION}.uncertainty": {"measure": "scores|probabilities|bernoulli", "temperature": POSITIVE},
    f"{SELECTION}.thompson": {"rule": "best_arm|double"},
    f"{SELECTION}.d_optimal": {"ridge": POSITIVE},
}
# Selections that read the scores of the rewards, and those that need several members of an ensemble
BY_SCORE = tuple(f"{SELECTION}.{name}" for name in ("best_worst", "uncertainty", "thompson"))
BY_MEMBERS = tuple(f"{SELECTION}.{name}" for name in ("uncertainty", "thompson"))
BY_FEATURES = (f"{SELECTION}.d_optimal",)


def selection_problem(select: Mapping[str, Any], rewards: bool, members: int | None = None) -> str | None:
    """
    Return the problem of a selection that lacks what it reads, `None` if there is none.

    Args:
        select (`Mapping`): the group `select`.
        rewards (`bool`): whether there is a reward.
        members (`int`, *optional*): the number of members of the largest ensemble, where it is known.
    """
    target = str(select.get("_target_"))
    name = target.rpartition(".")[2]
    if target in BY_SCORE and not rewards:
        return (
            f"`select={name}` reads scores, and there is no reward. Set `reward=model` (a reward model that you "
            "trained) or another reward, or `select=random`."
        )
    single = members is not None and members < 2 and select.get("measure") != "bernoulli"
    if target in BY_MEMBERS and rewards and single:
        one = " `select.measure=bernoulli` needs one reward model only." if name == "uncertainty" else ""
        return (
            f"`select={name}` compares the members of an ensemble, and every reward has one. Train an ensemble: "
            f"`stage=reward adapter=lora stage.members=4`.{one}"
        )
    return None


def human_problems(options: Mapping[str, Any], form: Any = None) -> list[str]:
    """
    Return the problems of the options of [`~rlhf_trl.labels.human.HumanLabeler`], or none.

    Args:
        options (`Mapping[str, Any]`): options by name.
        form (`str`, *optional*): form of the answers.
    """
    problems = []
    for name, example in (
        ("labelers", "[ann, bob]"),
        ("attributes", "[helpful, honest]"),
        ("skip_reasons", "[Unclear]"),
        ("hosts", "[labels.example.org]"),
    ):
        value = options.get(name)
        if value is not None and (
            not isinstance(value, list) or not all(isinstance(each, str) and each.strip() for each in value)
        ):
            problems.append(
                f"`labeler.{name}` is {value!r} and must be a list of texts. Set `'labeler.{name}={example}'`."
            )
        elif value is not None and len({each.strip() for each in value}) < len(value):
            problems.append(f"`labeler.{name}` holds an entry twice: {', '.join(value)}. Remove one.")
    scale: Any = options.get("scale")
    is_scale = isinstance(scale, list) and len(scale) == 2 and all(type(each) is int for each in scale)
    if not (is_scale and 0 <= scale[0] < scale[1] <= 9):
        problems.append(
            f"`labeler.scale` is {scale!r} and must hold the lowest and the highest rating, whole numbers from 0 to 9 "
            "(each is a key). Set `'labeler.scale=[1,5]'`."
        )
    if options.get("attributes") and form not in (None, "rating"):
        problems.append(
            f"`labeler.attributes` are rated, and `stage.ask={form}` asks for no rating. Set `stage.ask=rating`, or "
            "remove them."
        )
    guidelines, gold = options.get("guidelines"), options.get("gold")
    files = {"gold": gold}
    if isinstance(guidelines, str) and is_file_name(guidelines):
        files["guidelines"] = guidelines.strip()
    elif not isinstance(guidelines, str | None):
        problems.append(f"`labeler.guidelines` is {guidelines!r} and must be text, or a file that ends in .md.")
    problems += [
        f"`labeler.{name}` is `{file}`, and there is no such file."
        for name, file in files.items()
        if file is not None and not Path(str(file)).expanduser().is_file()
    ]
    return problems


def is_file_name(guidelines: str) -> bool:
    """Return whether guidelines are the name of a file, and no text."""
    return guidelines.strip().endswith(".md") and "\n" not in guidelines.strip()
