"""Conversion of GGUF files."""

import pytest

from rlhf_trl.errors import ConfigError
from rlhf_trl.models import gguf


def test_wrong_folders_are_named(tmp_path):
    with pytest.raises(ConfigError, match="holds 0 GGUF files"):
        gguf.export(tmp_path, tmp_path / "out")
    (tmp_path / "a.gguf").touch()
    with pytest.raises(ConfigError, match="is not empty"):
        gguf.export(tmp_path, tmp_path)
    with pytest.raises(SystemExit, match="2"):
        gguf.main([str(tmp_path / "nowhere"), str(tmp_path / "out")])
