"""Patches of libraries: documented, tested, and without effect on anyone else in the process."""

import ast
import copy
import inspect
import logging
import os
import platform
import re
import subprocess
import sys
import types
import warnings
from pathlib import Path

import bitsandbytes
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import rlhf_trl
from rlhf_trl.patches.bitsandbytes import keep_trainable
from rlhf_trl.patches.forward import wrap_forward
from rlhf_trl.patches.malloc import keep_freed_memory
from rlhf_trl.patches.peft import cast_head_inputs
from rlhf_trl.patches.warnings import LOGS, WARNINGS, filter_warnings, no_load_report
from tests.helpers.library_identity import changes, members
from tests.helpers.tiny import save_model

PATCHES = Path(rlhf_trl.__file__).parent / "patches"
TESTS = Path(__file__).parents[2]


def public_patches() -> list:
    found = []
    for file in sorted(PATCHES.glob("*.py")):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                found.append(pytest.param(ast.get_docstring(node) or "", id=f"{file.stem}.{node.name}"))
    return found


# Parts of the patch above them
PARTS = ("repair_token_wrappers", "DropPrefix", "exact_json", ".positions", "takes_positions", "counts_positions")


@pytest.mark.parametrize("docstring", [p for p in public_patches() if not p.id.endswith(PARTS)])
def test_a_patch_names_its_version_and_a_test_that_exists(docstring):
    assert re.search(r"^Seen in: .*\d", docstring, re.MULTILINE)
    names = re.search(r"^Test: (.+)\.$", docstring, re.MULTILINE).group(1)
    defined = "\n".join(file.read_text() for file in TESTS.rglob("test_*.py"))
    for name in re.findall(r"`(\w+)`", names):
        assert f"def {name}(" in defined


def test_library_messages_that_help_nobody_are_dropped_and_others_stay(caplog):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        filter_warnings()
        filter_warnings()
        for message, category, _ in WARNINGS:
            warnings.warn(f"{message} and more", category, stacklevel=1)
        warnings.warn("Another one", FutureWarning, stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["Another one"]
    for name, message, _ in LOGS:
        library = logging.getLogger(name)
        assert len(library.filters) == len(set(map(id, library.filters)))
        library.warning("%s 1", message)
        library.warning("[RANK 0] %s", message)  # as accelerate's loggers write
        library.warning("Another message")
    assert [record.message for record in caplog.records] == ["Another message"] * len(LOGS)


def test_the_load_report_is_dropped_while_a_model_loads(caplog):
    library = logging.getLogger("transformers.modeling_utils")
    for context, count in ((no_load_report(), 0), (warnings.catch_warnings(), 1)):
        with context:
            library.warning("LlamaForCausalLM LOAD REPORT from: x")
        assert len(caplog.records) == count


def test_4bit_weights_are_never_repacked():
    model = nn.Sequential(bitsandbytes.nn.Linear4bit(8, 8), nn.Linear(8, 8))
    model[0].support_avx512bf16_for_cpu = True  # as on a CPU that has it
    keep_trainable(model)
    assert model[0].support_avx512bf16_for_cpu is False


def test_freed_memory_is_kept_unless_the_user_says_otherwise(monkeypatch):
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"):
        monkeypatch.delenv(name, raising=False)
    assert keep_freed_memory() == (platform.libc_ver()[0] == "glibc")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    assert not keep_freed_memory()


def test_the_libraries_stay_as_they_are_for_everything_else_in_the_process(tmp_path):
    """No function, class or method is another one after an import and a run; plain trainers give the same numbers."""
    environment = os.environ | {"PYTHONPATH": str(TESTS.parent)}
    command = [sys.executable, "-m", "tests.helpers.library_identity", str(tmp_path)]
    done = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_changed_library_is_seen():
    class Layer:
        def forward(self):
            """As it comes."""

    library = types.ModuleType("library")
    library.Layer, library.head = Layer, lambda: 0

    def snapshot():
        return {"sys": members(library), "library.Layer": members(Layer)}

    before = snapshot()
    assert changes(before, snapshot()) == []
    library.head, Layer.forward, Layer.bias = lambda: 1, lambda self: 1, property(lambda self: None)
    assert changes(before, snapshot()) == ["sys.head", "library.Layer.forward", "library.Layer.bias"]


def test_a_score_head_in_float32_reads_a_bfloat16_base():
    head = nn.Linear(4, 1)
    cast_head_inputs(head)
    hidden = torch.ones(2, 4, dtype=torch.bfloat16)
    assert head(hidden).dtype == copy.deepcopy(head)(hidden).dtype == torch.float32


def test_a_wrapped_forward_keeps_its_signature(tmp_path):
    path = save_model(tmp_path / "model")
    model, other = (AutoModelForCausalLM.from_pretrained(path) for _ in range(2))
    ids = torch.arange(4).reshape(1, 4)
    logits = model(input_ids=ids).logits
    wrap_forward(
        model, lambda model, forward, *args, extra=0, **kwargs: (model, forward(*args, **kwargs).logits + extra)
    )
    assert inspect.signature(model.forward).parameters.keys() == inspect.signature(other.forward).parameters.keys()
    assert model(input_ids=ids)[0] is model
    torch.testing.assert_close(model(input_ids=ids, extra=1)[1], logits + 1)
    torch.testing.assert_close(other(input_ids=ids).logits, logits)


def stored_on_others(path: Path) -> set[str]:
    """Return how a module replaces methods or private attributes of objects of others."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        targets = node.targets if isinstance(node, ast.Assign) else []
        for target in (target for target in targets if isinstance(target, ast.Attribute)):
            own = isinstance(target.value, ast.Name) and target.value.id == "self"
            if target.attr == "__class__" or (not own and target.attr.startswith("_")):
                found.add(ast.unparse(target))
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "types.MethodType":
            found.add("types.MethodType")
    return found


def test_nothing_else_in_the_package_replaces_methods_of_libraries():
    found = {str(path.relative_to(PATCHES.parent)): stored_on_others(path) for path in PATCHES.parent.rglob("*.py")}
    assert {name for name, stores in found.items() if stores and not name.startswith("patches/")} == set()
