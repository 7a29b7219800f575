"""Values that the table of `rlhf_trl.config.ranges` doesn't allow, wherever the config has them."""

from typing import Any

from rlhf_trl.checks.names import type_problem
from rlhf_trl.config.argument_names import arguments
from rlhf_trl.config.ranges import RULES, RUN, problem_of
from rlhf_trl.config.values import at, nodes, section


def range_problems(values: dict[str, Any]) -> list[str]:
    """Of numbers, choices and truth values; what has another type than its class says is left to the names."""
    problems = []
    for path, node in nodes(values):
        target = str(node.get("_target_"))
        known, rules = arguments(target) or {}, RULES.get(target, {})
        for key, value in node.items():
            place = f"{path}.{key}"
            if key in rules and not (key in known and type_problem(place, value, known[key][0])):
                problems.append(problem_of(place, value, rules[key]))
            elif value is None and key in known and known[key][0] and not known[key][0].endswith("?"):
                problems.append(f"`{place}` is null and must have a value. Leave it out for {known[key][1]!r}.")
    for place, rule in RUN.items():
        parent, _, key = place.rpartition(".")
        if key in (section(values, parent) if parent else values):
            problems.append(problem_of(place, at(values, place), rule))
    return [problem for problem in problems if problem]
