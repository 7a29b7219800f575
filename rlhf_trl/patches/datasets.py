"""datasets: columns of JSON whose numbers are exact."""

import json
from dataclasses import replace

from datasets import Dataset, Features, Json


class ExactJson(Json):
    """
    `datasets.Json` that reads and writes with Python's parser.

    datasets uses pandas' parser, which reads 55.290184 as 55.290183999999996 and writes ten digits
    (https://github.com/huggingface/datasets/pull/8652). The feature stays with a dataset through `map`, `filter`,
    `select` and the like; what is saved and loaded again is `datasets.Json`, and so is what `Dataset.to_list` reads.

    Seen in: datasets 5.2.
    Test: `test_objects_keep_their_own_fields_and_nulls`.
    """

    def encode_example(self, example_data):
        """Return the JSON text of an object; text that is none is one."""
        if example_data is None or (isinstance(example_data, str) and _is_json(example_data)):
            return example_data
        return json.dumps(example_data)

    def decode_example(self, example_data, token_per_repo_id=None):
        """Return the object that JSON text stands for."""
        return None if example_data is None else json.loads(example_data)


def exact_json(dataset: Dataset) -> Dataset:
    """
    Make the columns of JSON of a dataset [`ExactJson`], in place.

    Args:
        dataset (`Dataset`):
            Dataset with or without such columns, also inside of objects and lists.

    Returns:
        `Dataset`: the same dataset.
    """
    dataset.info.features = Features({name: _exact(feature) for name, feature in dataset.features.items()})
    return dataset


def _exact(feature):
    if isinstance(feature, Json):
        return ExactJson(decode=feature.decode)
    if isinstance(feature, dict):
        return {name: _exact(part) for name, part in feature.items()}
    return replace(feature, feature=_exact(feature.feature)) if hasattr(feature, "feature") else feature


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
