"""Sources of rows: local files, datasets of the hub, and mixtures of several sources."""

from rlhf_trl.data.sources.files import load_files
from rlhf_trl.data.sources.hub import load_hub
from rlhf_trl.data.sources.mixture import mix

__all__ = ["load_files", "load_hub", "mix"]
