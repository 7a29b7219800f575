"""Upload of models to the Hugging Face hub."""

from pathlib import Path

import httpx
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from rlhf_trl.errors import ConfigError
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


def upload_model(
    folder: str | Path,
    repo: str,
    message: str,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> str:
    """
    Upload the model in a folder with its card as a commit; what else a run left there (checkpoints, logs) stays.

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
        [`~rlhf_trl.errors.ConfigError`]: if the hub can't be reached, or refuses the upload.
    """
    api = HfApi(token=token)
    try:
        url = api.create_repo(repo, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(url.repo_id, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id,
            folder_path=folder,
            allow_patterns=[*MODEL_FILES, CARD_FILE, FIGURE_FILE],
            ignore_patterns=["*/*"],  # members, merged models and checkpoints are models of their own
            commit_message=message,
            revision=revision,
        )
    except (HfHubHTTPError, httpx.HTTPError, OSError, ValueError) as error:
        raise ConfigError(
            f"`{folder}` can't be uploaded to `{repo}`: {' '.join(str(error).split())} The model is there; when that "
            "is fixed, upload it with `stage=push`."
        ) from error
    return str(url)
