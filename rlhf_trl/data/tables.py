"""Rows as Arrow tables."""

import json
from collections.abc import Container

from rlhf_trl.errors import DataError


def needs_json(value) -> bool:
    """
    Return whether Arrow has no type for a value.

    An object other than a plain `role` and `content` has fields that those of other rows lack, and an integer may have
    more than 64 bits.
    """
    if isinstance(value, list):
        return any(map(needs_json, value))
    if isinstance(value, int):
        return not -(2**63) <= value < 2**63
    return isinstance(value, dict) and not (
        value.keys() == {"role", "content"} and all(isinstance(item, str) for item in value.values())
    )


BATCH_ROWS = 1000
# What stands for a column that a row doesn't have, where it isn't null: TRL passes this one on with `**`.
ABSENT = {"chat_template_kwargs": {}, "images": []}


def make_table(rows: list[tuple[str, dict]], of_objects: Container[str] | None = None):
    """
    Return rows as an Arrow table.

    A column with objects of any fields becomes a column of JSON: Arrow's own objects all have the same fields, and
    null in those that a row lacks, which templates would render. So does one with integers of more than 64 bits.

    Args:
        rows (`list[tuple[str, dict]]`): place and columns of each row.
        of_objects (`Container[str]`, *optional*): columns that may hold such values, if not all.
    """
    import pyarrow as pa

    columns = {}
    for key in dict.fromkeys(key for _, row in rows for key in row):
        values = [row.get(key, ABSENT.get(key)) for _, row in rows]
        if key == "images":
            columns[key] = _as_images(values)
            continue
        json_column = (of_objects is None or key in of_objects) and any(map(needs_json, values))
        columns[key] = _as_json(values) if json_column else as_array(key, values, rows)
    return pa.table(columns)


def concatenate(tables: list):
    """Concatenate Arrow tables, null where one lacks a column; raise a `DataError` where types conflict."""
    import pyarrow as pa

    names = {name for table in tables for name in table.column_names if table.schema.field(name).type == pa.json_()}
    tables = [table.replace_schema_metadata(None) for table in tables]
    for name in names:
        for i, table in enumerate(tables):
            at = table.schema.get_field_index(name)
            values = table[name].to_pylist() if at >= 0 else [ABSENT.get(name)] * len(table)
            if at < 0:
                tables[i] = table.append_column(name, _as_json(values))
            elif table.schema.field(name).type != pa.json_():
                tables[i] = table.set_column(at, name, _as_json(values))
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(f"a column holds values of several types ({error}). Give it one type in every row.") from None


def _as_json(values: list):
    import pyarrow as pa

    texts = pa.array([None if value is None else json.dumps(value) for value in values], pa.string())
    return pa.ExtensionArray.from_storage(pa.json_(), texts)


def _as_images(values: list):
    """Return lists of images, `{"bytes", "path"}`, as an Arrow array of the type that `datasets.Image` reads."""
    import pyarrow as pa

    return pa.array(values, pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()})))


def as_dataset(table):
    """Return an Arrow table as a `Dataset`: columns of JSON give objects, `images` gives PIL images."""
    import pyarrow as pa
    from datasets import Dataset, Features, Image, List

    from rlhf_trl.patches.datasets import exact_json

    at = table.schema.get_field_index("images")
    if at < 0 or not pa.types.is_list(table.schema.field("images").type):
        return exact_json(Dataset(table))
    if table["images"].null_count:  # rows of a source without images, which TRL reads as none
        table = table.set_column(at, "images", _as_images([value or [] for value in table["images"].to_pylist()]))
    dataset = exact_json(Dataset(table))
    dataset.info.features = Features({**dataset.features, "images": List(Image())})
    return dataset


def as_array(key: str, values: list, batch: list[tuple[str, dict]]):
    """Return values as an Arrow array; raise a `DataError` that names the column and the rows if types conflict."""
    import pyarrow as pa

    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(
            f"{batch[0][0]} and the rows after it: `{key}` holds values of several types ({error}). Give it one."
        ) from None
