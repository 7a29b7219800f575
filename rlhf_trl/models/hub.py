"""Upload of models to the Hugging Face hub."""

from pathlib import Path

import httpx
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError

from rlhf_trl.config.shareable import shareable
from rlhf_trl.errors import ConfigError
from rlhf_trl.models.adapters import adapter_config
from rlhf_trl.models.calibration import CALIBRATION_FILE
from rlhf_trl.runs.record import CONFIG_FILE, METRICS_FILE

CARD_FILE, FIGURE_FILE = "README.md", "report.png"
# Files that plain transformers or peft load, and those that document the run; no checkpoints, no critic, no logs
MODEL_FILES = (
    "model*.safetensors",
    "adapter_model.safetensors",
    "*config.json",
    "model.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.jinja",
    CALIBRATION_FILE,
    CONFIG_FILE,
    METRICS_FILE,
)


def model_files(folder: str | Path) -> list[Path]:
    """Return the files of a model and those that document its run, without those of folders below (checkpoints)."""
    return [path for pattern in MODEL_FILES for path in sorted(Path(folder).glob(pattern)) if path.is_file()]


def upload_model(
    folder: str | Path,
    repo: str,
    message: str,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> str:
    """
    Upload the model in a folder with its card as a commit; what else a run left there (checkpoints, logs) stays. The
    config goes without secrets and folders of this machine.

    Args:
        folder (`str` or `Path`):
            Folder of the model, with `README.md` and `report.png` where there are any.
        repo (`str`):
            Hub id, created if missing; without an owner it is the user's.
        message (`str`):
            Message of the commit.
        private (`bool`, *optional*):
            Whether a new repository is private; `None`: as the owner's default is.
        revision (`str`, *optional*):
            Branch, created if missing; `None`: main.
        token (`str`, *optional*):
            Token; `None`: that of the login.

    Returns:
        `str`: address of the repository.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if the model is an adapter on a folder of this machine, or the hub can't be
            reached or refuses the upload.
    """
    adapter = adapter_config(str(folder))
    if adapter is not None and Path(adapter.base_model_name_or_path or "").is_dir():
        raise ConfigError(
            f"`{folder}` is an adapter on the folder `{adapter.base_model_name_or_path}`, which others don't have. "
            "Merge the two with `stage=merge`, and upload that: `stage=push` with `stage.merged=true`."
        )
    api = HfApi(token=token)
    try:
        url = api.create_repo(repo, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(url.repo_id, branch=revision, exist_ok=True)
        files = {
            path.name: path for path in [*model_files(folder), Path(folder, CARD_FILE), Path(folder, FIGURE_FILE)]
        }
        operations = [
            CommitOperationAdd(name, shareable(path.read_text("utf-8")).encode() if name == CONFIG_FILE else path)
            for name, path in files.items()
            if path.is_file()
        ]
        api.create_commit(url.repo_id, operations, commit_message=message, revision=revision)
    except (HfHubHTTPError, httpx.HTTPError, OSError, ValueError) as error:
        raise ConfigError(
            f"`{folder}` can't be uploaded to `{repo}`: {' '.join(str(error).split())} The model is there; when that "
            "is fixed, upload it with `stage=push`."
        ) from error
    return str(url)
