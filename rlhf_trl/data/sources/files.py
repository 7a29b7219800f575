"""Local files as a source."""

from rlhf_trl.data.build import build_dataset
from rlhf_trl.data.file_rows import read_file, resolve_paths


def load_files(
    dataset_type: str,
    seed: int,
    paths: str | list[str],
    eval_paths: str | list[str] | None = None,
    **options,
):
    """
    Load local files: .jsonl, .json, .csv, .tsv, .parquet; all but the last also as .gz.

    Args:
        dataset_type (`str`): what the stage trains on, `prompt_completion`, `preference`, `unpaired`, `comparisons` or
            `prompt`; or `annotated`: comparisons with all annotations, for evaluation.
        seed (`int`): seeds the choice of rows that a limit keeps.
        paths (`str` or `list[str]`): files or globs for training, relative to the working directory.
        eval_paths (`str` or `list[str]`, *optional*): files for evaluation; without them `eval_size` is split off.
        **options: see [`~rlhf_trl.data.LoadOptions`].

    Returns:
        `DatasetDict`: `train` and, if there is any, `eval`.

    Raises:
        DataError: that lists the file, line and field of malformed rows; or says which column is missing.
    """
    train = [(path, read_file(path)) for path in resolve_paths(paths)]
    held_out = None
    if eval_paths is not None:
        held_out = [(path, read_file(path)) for path in resolve_paths(eval_paths, "data.eval_paths")]
    return build_dataset(dataset_type, seed, train, held_out, **options)
