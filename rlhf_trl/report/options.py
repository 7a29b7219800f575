"""Rules of the options of fronts. Imports no torch and no matplotlib."""

from collections.abc import Mapping, Sequence

from rlhf_trl.hints import names_of, nearest, suggestion

KNEE = "knee"


def front_problems(
    rewards: Sequence[str] | None,
    reference_point: Mapping[str, float] | None,
    choose: object,
    measured: Sequence[str],
    counted: Sequence[str],
    prefix: str = "stage.",
) -> list[str]:
    """
    Return what is wrong with the options of a front.

    Args:
        rewards (`Sequence[str]`, *optional*), reference_point (`Mapping[str, float]`, *optional*), choose (`str` or
            `Mapping[str, float]`): see [`~rlhf_trl.report.fronts.FrontOptions`].
        measured (`Sequence[str]`): names of the rewards that there are.
        counted (`Sequence[str]`): those of a weight other than 0, whose front it is where `rewards` is `None`.
        prefix (`str`): of the keys.
    """
    problems = []
    if rewards is not None and not isinstance(rewards, list):
        return [
            f"`{prefix}front` is {rewards!r} and must be a list of rewards, such as `'{prefix}front=[gold,brief]'`."
        ]
    if reference_point is not None and not isinstance(reference_point, Mapping):
        return [f"`{prefix}reference_point` is {reference_point!r} and must name rewards: `{{gold: 0, brief: 0}}`."]
    if not isinstance(choose, Mapping) and choose != KNEE:
        problems.append(
            f"`{prefix}choose` is `{choose}`. Set it to `{KNEE}`, or to weights of the rewards: "
            f"`'{prefix}choose={{{measured[0] if measured else 'reward'}: 1}}'`."
        )
    named = {"front": rewards, "reference_point": reference_point, "choose": choose}
    for key, names in named.items():
        for name in names if isinstance(names, Mapping | list) else ():
            if name not in measured:
                near = f" {suggestion(found)}" if (found := nearest(name, measured)) else ""
                problems.append(
                    f"`{prefix}{key}` names `{name}`, and the rewards are {names_of(measured) or 'none'}.{near}"
                )
    if rewards is not None and len(rewards) < 2:
        problems.append(f"`{prefix}front` names {len(rewards)} of the rewards, and a front has two or more. Add one.")
    shown = counted if rewards is None else rewards
    lacking = [name for name in shown if name not in (reference_point or ())]
    if reference_point is not None and lacking and len(shown) > 1:
        problems.append(f"`{prefix}reference_point` lacks {names_of(lacking)}, a reward of the front. Add its value.")
    return problems
