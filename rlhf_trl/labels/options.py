"""Rules of the options of selections and labelers. Imports no torch."""

from collections.abc import Mapping
from typing import Any

from rlhf_trl.config.ranges import POSITIVE

SELECTION = "rlhf_trl.labels.selection"
RULES = {
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
