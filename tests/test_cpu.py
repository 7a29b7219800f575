"""What makes training on a CPU quicker changes no number."""

import platform

import torch
from transformers import AutoModelForCausalLM
from trl.trainer import utils

from rlhf_trl import cpu
from tests.tiny import save_model


def log_probs_and_gradients(path):
    model = AutoModelForCausalLM.from_pretrained(path)
    utils.add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    ids = torch.arange(24).reshape(2, 12) % 20
    labels = ids.clone()
    labels[:, :7] = -100
    labels[1, 9:] = -100
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, fused_lm_head=True)
    (output.loss + output.entropy.sum()).backward()
    return output, [p.grad.clone() for p in model.parameters()]


def test_only_labelled_positions_are_scored_and_the_numbers_stay(tmp_path, monkeypatch):
    path = save_model(tmp_path / "model")
    plain = getattr(utils._use_triton, "on_gpus", utils._use_triton)
    monkeypatch.setattr(utils, "_use_triton", plain)
    scored = []
    kernel = utils._ChunkedLogProbFunction.apply
    monkeypatch.setattr(
        utils._ChunkedLogProbFunction,
        "apply",
        lambda hidden, *rest: scored.append(len(hidden)) or kernel(hidden, *rest),
    )
    before, gradients_before = log_probs_and_gradients(path)
    cpu.score_labels_only()
    cpu.score_labels_only()  # a second call changes nothing
    after, gradients = log_probs_and_gradients(path)
    assert scored == [2 * 11, 5 + 2]
    assert utils._use_triton.on_gpus is plain
    for name in ("loss", "log_probs", "entropy"):
        torch.testing.assert_close(after[name], before[name])
    for one, other in zip(gradients, gradients_before, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_freed_memory_is_kept_unless_the_user_says_otherwise(monkeypatch):
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"):
        monkeypatch.delenv(name, raising=False)
    assert cpu.keep_freed_memory() == (platform.libc_ver()[0] == "glibc")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    assert not cpu.keep_freed_memory()
