"""Rules of the options of models. Imports no torch."""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlhf_trl.config.ranges import COUNT
from rlhf_trl.hints import names_of

# Templates that come with the package, by name
CHAT_TEMPLATES = {path.stem: path for path in sorted((Path(__file__).parent / "chat_templates").glob("*.jinja"))}

RULES = {
    "rlhf_trl.models.scratch.word_tokenizer": {"vocab_size": COUNT, "min_frequency": COUNT, "lowercase": "bool"},
}


def template_file(name: str) -> Path:
    """Return the file of a chat template: one that comes with the package, or the file of that name."""
    return CHAT_TEMPLATES.get(name) or Path(name).expanduser()


def soup_points(
    names: Sequence[str], weights: Mapping[str, float] | None, grid: Sequence[float] | None
) -> list[dict[str, float]]:
    """
    Return the weights of each soup of several models: those given, or alike, or every combination of the values of a
    grid that sums to 1, the first model's weight falling.
    """
    if grid is None:
        return [{name: float(weights[name]) if weights else 1 / len(names) for name in names}]
    return simplex(names, grid)


def simplex(names: Sequence[str], grid: Sequence[float]) -> list[dict[str, float]]:
    """Return every combination of values of a grid that sums to 1, by name, that of the first name falling."""
    values = sorted(set(map(float, grid)), reverse=True)
    return [
        dict(zip(names, point, strict=True))
        for point in itertools.product(values, repeat=len(names))
        if math.isclose(sum(point), 1, abs_tol=1e-6)
    ]


def soup_weight_problem(names: Sequence[str], weights: object, grid: Sequence[float] | None) -> str | None:
    """Return what is wrong with the weights or the grid of a soup of several models, `None` where nothing is."""
    if weights is not None and grid is not None:
        return "`stage.weights` is one soup, and `stage.grid` is many. Set one of them to null."
    if weights is not None:
        if not isinstance(weights, Mapping) or not all(
            isinstance(each, int | float) and math.isfinite(each) for each in weights.values()
        ):
            example = ", ".join(f"{name}: {1 / len(names):.2g}" for name in names)
            return (
                f"`stage.weights` is {weights!r} and must give each model a number: `'stage.weights={{{example}}}'`."
            )
        if set(weights) != set(names):
            return (
                f"`stage.weights` has {names_of(weights)}, and the models are {names_of(names)}. Give each a weight."
            )
        if not math.isclose(sum(weights.values()), 1, abs_tol=1e-6):
            return f"`stage.weights` sum to {sum(weights.values()):g}, and a weighted average needs 1. Scale them."
    if grid is not None and any(not 0 <= value <= 1 for value in grid):
        return (
            "`stage.grid` has values that aren't from 0 to 1. A soup outside of its models is set by `stage.weights`."
        )
    if grid is not None and not simplex(names, grid):
        example = "[0,0.25,0.5,0.75,1]"
        return f"No {len(names)} values of `stage.grid` sum to 1. Set for example `'stage.grid={example}'`."
    return None
