"""The machine: card, versions, packages, and the rate of its matrix products."""

import re
import time
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement
from packaging.version import Version

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
SHOWN = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "liger_kernel", "flash_attn", "triton")


def describe() -> dict[str, Any]:
    """Return the card's name and memory in GiB, CUDA's version, and the versions of the packages that matter."""
    found: dict[str, Any] = {name: installed for name in SHOWN if (installed := _installed(name))}
    if not torch.cuda.is_available():
        return {"card": "CPU", "versions": found}
    properties = torch.cuda.get_device_properties(0)
    memory = properties.total_memory / 2**30
    return {"card": properties.name, "memory": round(memory, 1), "cuda": torch.version.cuda, "versions": found}


def outside_of_range() -> list[str]:
    """Return a sentence for each package that is missing, or outside of the range of pyproject.toml."""
    sentences = []
    for line in tomllib.loads(PYPROJECT.read_text())["project"]["dependencies"]:
        requirement = Requirement(line)
        found = _installed(requirement.name)
        if found is None:
            sentences.append(f"{requirement.name} is not installed, and {requirement} is needed.")
        elif not requirement.specifier.contains(Version(found).base_version, prereleases=True):
            sentences.append(f"{requirement.name} {found} is outside of {requirement}: what follows may fail by it.")
    return sentences


def matrix_rate(device: str, width: int = 8192) -> float:
    """Return the rate of a bfloat16 matrix product of random square matrices, in FLOP/s: median of ten."""
    a, b = (torch.randn(width, width, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(13):
        _synchronize()
        start = time.perf_counter()
        torch.mm(a, b)
        _synchronize()
        times.append(time.perf_counter() - start)
    return 2 * width**3 / sorted(times[3:])[5]


def _synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _installed(name: str) -> str | None:
    try:
        return version(re.sub("_", "-", name))
    except PackageNotFoundError:
        return None
