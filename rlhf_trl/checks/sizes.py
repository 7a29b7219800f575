"""Sizes of models: positions and embeddings, compared with lengths and tokenizers without loading weights."""

from typing import Any

from rlhf_trl.build import models_of
from rlhf_trl.config.values import at, section
from rlhf_trl.models.sizes import tokenizer_problem


def size_problems(values: dict[str, Any]) -> list[str]:
    """Return the problems of the sizes of the models that don't depend on the data."""
    problems = []
    key = "stage.args.max_completion_length" if "args" in section(values, "stage") else "stage.max_completion_length"
    more = at(values, key) or 0
    for model in models_of(values):
        sizes = model.sizes()
        remedy = "Set `model.tokenizer`." if model.key == "model" else f"Set `{model.key}` to a model with its own."
        found = [tokenizer_problem(sizes, model.load_tokenizer(), remedy)]
        if model.writes and sizes.is_table and sizes.positions is not None and more >= sizes.positions:
            found.append(
                f"`{key}` is {more}, and `{model.path}` has {sizes.positions} positions for prompt and completion. "
                f"Set it lower, for example `{key}={sizes.positions // 2}`."
            )
        problems += [problem for problem in found if problem]
    return list(dict.fromkeys(problems))
