"""TRL's fused log-probabilities on a CPU: quicker, and the same numbers."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from trl.kernels import ChunkedLogProbFunction
from trl.trainer import utils

from rlhf_trl.patches import log_probs
from tests.helpers.tiny import save_model

OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
POSITIONS, WIDTH, VOCABULARY = 40, 12, 30


def log_probs_and_gradients(path, fast=False):
    model = AutoModelForCausalLM.from_pretrained(path)
    utils.add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    if fast:
        log_probs.speed_up_log_probs(model)
        log_probs.speed_up_log_probs(model)  # a second call changes nothing
    ids = torch.arange(24).reshape(2, 12) % 20
    labels = ids.clone()
    labels[:, :7] = -100
    labels[1, 9:] = -100
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, fused_lm_head=True)
    (output.loss + output.entropy.sum()).backward()
    return output, [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("max_logits", [0, log_probs.MAX_LOGITS])
def test_only_labelled_positions_are_scored_and_the_numbers_stay(tmp_path, monkeypatch, max_logits):
    path = save_model(tmp_path / "model")
    before, gradients_before = log_probs_and_gradients(path)
    tiled, kept = [], []
    tiles, whole = ChunkedLogProbFunction.apply, log_probs._log_probs_of_kept_logits
    monkeypatch.setattr(
        ChunkedLogProbFunction, "apply", lambda hidden, *rest: tiled.append(len(hidden)) or tiles(hidden, *rest)
    )
    monkeypatch.setattr(
        log_probs, "_log_probs_of_kept_logits", lambda hidden, *rest: kept.append(len(hidden)) or whole(hidden, *rest)
    )
    monkeypatch.setattr(log_probs, "MAX_LOGITS", max_logits)
    originals = utils._use_triton, utils._ChunkedLogProbFunction
    after, gradients = log_probs_and_gradients(path, fast=True)
    assert (utils._use_triton, utils._ChunkedLogProbFunction) == originals
    assert (kept if max_logits else tiled) == [5 + 2]
    assert not (tiled if max_logits else kept)
    for name in ("loss", "log_probs", "entropy"):
        torch.testing.assert_close(after[name], before[name])
    for one, other in zip(gradients, gradients_before, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"softcap": 2.0, "logit_scale": 3.0, "temperature": 1.5},
        {"bias": True},
        {"outputs": ("log_probs",)},
        {"dtype": torch.bfloat16},
    ],
    ids=str,
)
def test_kept_logits_give_what_the_tiles_give(options):
    dtype, outputs = options.get("dtype", torch.float32), options.get("outputs", OUTPUTS)
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    hidden, weight, bias = random(POSITIONS, WIDTH), random(VOCABULARY, WIDTH), random(VOCABULARY)
    targets = torch.randint(VOCABULARY, (POSITIONS,), generator=generator)
    targets[:20] = (hidden @ weight.t())[:20].argmax(dim=1)
    of_log_probs, of_entropy = torch.randn(2, POSITIONS, generator=generator)
    settings = (options.get("temperature", 1.0), options.get("softcap"), options.get("logit_scale", 1.0), outputs)

    def results(function):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)[: 3 if options.get("bias") else 2]]
        values = function(*leaves, *[None] * (3 - len(leaves)), targets, settings)
        loss = (values[0] * of_log_probs).sum() + (0 if values[1] is None else (values[1] * of_entropy).sum())
        loss.backward()
        return values, [leaf.grad for leaf in leaves]

    def tiles(hidden, weight, bias, targets, settings):
        temperature, *rest = settings
        return ChunkedLogProbFunction.apply(hidden, weight, bias, targets, temperature, 7, *rest)

    def kept(hidden, weight, bias, targets, settings):
        return log_probs._log_probs_of_kept_logits(hidden, weight, bias, targets, *settings)

    (expected, gradients), (values, ours) = results(tiles), results(kept)
    for value, other in zip(values, expected, strict=True):
        if other is None:
            assert value is None
        else:
            torch.testing.assert_close(value, other, atol=1e-5, rtol=1e-5)
            assert value.dtype == other.dtype
    # in bfloat16 the tiles round the gradient of each logit, and so does autograd, at another place
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.06, "rtol": 0.02}
    for one, other in zip(ours, gradients, strict=True):
        torch.testing.assert_close(one, other, **tolerance)
    if "is_top1" in outputs:
        assert 0 < values[4].sum() < POSITIONS
