"""Columns of the data whose values part an evaluation into slices."""

from collections.abc import Mapping, Sequence

from rlhf_trl.data.row_types import PASSED_ON
from rlhf_trl.errors import ConfigError
from rlhf_trl.hints import names_of

# A column that was not asked for is one of slices if it has so many different values
FEWEST_VALUES, MOST_VALUES = 2, 20


def slice_columns(columns: Mapping[str, Sequence], names: Sequence[str] | None) -> dict[str, list[str]]:
    """
    Return the values of the columns to slice by, as text.

    Args:
        columns (`Mapping[str, Sequence]`):
            Columns of the data besides prompts and completions.
        names (`Sequence[str]`, *optional*):
            Those to slice by (`stage.slices`); `None`: all with 2 to 20 different values.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if a column is missing, or has more values than a table can hold.
    """
    chosen = {}
    for name in columns if names is None else names:
        if name not in columns:
            raise ConfigError(
                f"`stage.slices` names the column `{name}`, and the data's rows have "
                f"{names_of(columns) or 'no column of their own'}. Name one of these, or remove it."
            )
        values = [str(value) for value in columns[name]]
        count = len(set(values))
        if names is not None and count > MOST_VALUES:
            raise ConfigError(
                f"`stage.slices` names the column `{name}`, which has {count:,} different values; {MOST_VALUES} is "
                "the most. Name another column, or put its values into groups."
            )
        if names is not None or (name not in PASSED_ON and FEWEST_VALUES <= count <= MOST_VALUES):
            chosen[name] = values
    return chosen
