"""PPO on a GPU: its numbers are those of a CPU, and in bfloat16 close to them. `make test-gpu` runs these tests."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from rlhf_trl.models.initial import load_initial_model
from rlhf_trl.models.roles import begin_training
from rlhf_trl.rewards.adapter import AdapterReward
from tests.helpers.architectures import save_architecture
from tests.helpers.ppo import LORA, logged, make_trainer, prompts, sampled, save_reward_model

pytestmark = pytest.mark.gpu
# Wide enough for NF4's blocks and for Triton's tiles
WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
BF16 = {"bf16": True, "use_cpu": False}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}


@pytest.fixture(autouse=True)
def full_float32():
    """Let float32 be float32: with TF32 a matrix product has ten bits."""
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.fixture
def path(tmp_path) -> str:
    from tests.helpers.tiny import save_model

    return save_model(tmp_path / "model", **WIDE)


def critic_of(kind: str) -> dict:
    peft = {"peft_config": LoraConfig(**LORA, task_type="CAUSAL_LM")} if kind == "adapter" else {}
    return {"critic": kind} | peft


def update(path, out, **options):
    """Return how far each trained weight of PPO moves in a plain gradient step on one rollout, and the logs."""
    torch.manual_seed(0)
    whole = {"per_device_train_batch_size": 8, "steps_per_generation": 1}
    options = {"optim": "sgd", "max_grad_norm": 0.0, "use_cpu": False} | whole | options
    trainer, _ = make_trainer(path, out, data=prompts(8), **options)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in trainer.model.named_parameters():
        if "lora_" in name or "value_head.weight" in name:  # a GPU draws other numbers than a CPU
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)
    before = {name: p.detach().cpu().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    after = {name: p.detach().cpu() for name, p in trainer.model.named_parameters()}
    return {name: after[name] - value for name, value in before.items()}, trainer.state.log_history[0]


def flat(moves: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([value.float().flatten() for value in moves.values()])


@pytest.mark.parametrize("kind", ["head", "adapter", "model"])
def test_an_update_equals_that_of_a_cpu(path, tmp_path, kind):
    expected, logs = update(path, tmp_path, use_cpu=True, **critic_of(kind))
    found, gpu_logs = update(path, tmp_path, **critic_of(kind))
    assert found.keys() == expected.keys() and flat(expected).norm() > 1e-3
    assert (flat(found) - flat(expected)).norm() < 1e-3 * flat(expected).norm()
    for key in ("policy/loss", "value/loss", "objective/kl", "policy/entropy"):
        assert gpu_logs[key] == pytest.approx(logs[key], rel=1e-3, abs=1e-4), key


@pytest.mark.parametrize("kind", ["head", "adapter", "model"])
def test_an_update_in_bfloat16_is_close_to_float32(path, tmp_path, kind):
    expected, logs = update(path, tmp_path, **critic_of(kind))
    found, half_logs = update(path, tmp_path, **critic_of(kind), **BF16)
    assert (flat(found) - flat(expected)).norm() < 0.1 * flat(expected).norm()
    assert half_logs["policy/entropy"] == pytest.approx(logs["policy/entropy"], rel=0.02)
    assert half_logs["value/loss"] == pytest.approx(logs["value/loss"], rel=0.05)


@pytest.mark.parametrize("kind", ["head", "adapter", "model"])
def test_gradient_checkpointing_changes_nothing(path, tmp_path, kind):
    expected, _ = update(path, tmp_path, **critic_of(kind), **BF16)
    found, _ = update(path, tmp_path, gradient_checkpointing=True, **critic_of(kind), **BF16)
    assert (flat(found) - flat(expected)).norm() < 1e-2 * flat(expected).norm()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gpt2", "gpt_neox", "opt"])
def test_fused_log_probabilities_are_those_of_the_logits(tmp_path, name, dtype):
    path = save_architecture(tmp_path / name, name)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
    trainer, _ = make_trainer(model, tmp_path, path=path, use_cpu=False)
    ids = torch.randint(5, 21, (4, 12), device="cuda")
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # padded on the left
    with torch.no_grad():
        fused = trainer._score_tokens(trainer.model, ids, mask, 6).logps
        plain = trainer.model(input_ids=ids[1:], attention_mask=mask[1:]).logits[:, 5:-1].float()
    expected = (plain / trainer.temperature).log_softmax(-1).gather(-1, ids[1:, 6:, None])[..., 0]
    assert fused.dtype == torch.float32
    tolerance = 1e-4 if dtype == "float32" else 0.05
    torch.testing.assert_close(fused[1:], expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("quantized", [False, True], ids=["bfloat16", "NF4"])
def test_four_roles_on_one_base(path, tmp_path, quantized):
    """KL begins at exactly 0, policy and critic move, reference, reward and base stay."""
    pytest.importorskip("bitsandbytes") if quantized else None
    start = str(tmp_path / "start")
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    PeftModel(AutoModelForCausalLM.from_pretrained(path), config).save_pretrained(start)
    wanted = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model, peft_config = load_initial_model(
        start,
        "CAUSAL_LM",
        wanted,
        "",
        dtype="bfloat16",
        quantization_config=BitsAndBytesConfig(**NF4) if quantized else None,
    )
    reward = save_reward_model(path, tmp_path / "reward")
    trainer = sampled(
        model,
        tmp_path,
        path=path,
        peft_config=peft_config,
        critic="adapter",
        critic_path=reward,
        reward_funcs=AdapterReward(reward),
        num_iterations=2,
        num_train_epochs=2,
        **BF16,
    )
    begin_training(trainer.model)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    roles = {part for name in moved for part in name.split(".")} & {"default", "critic", "ref", "value_head"}
    assert roles == {"default", "critic", "value_head"}
    assert all(roles & set(name.split(".")) for name in moved)
    assert logged(trainer, "objective/kl")[0] == 0.0 and logged(trainer, "objective/kl")[1] != 0.0
    if quantized:
        kinds = {type(module).__name__ for module in trainer.model.modules()}
        assert "Linear4bit" in kinds


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gpt2", "gpt_neox", "opt"])
def test_kl_of_a_full_model_begins_at_0(tmp_path, name):
    path = save_architecture(tmp_path / name, name)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    trainer = sampled(model, tmp_path, path=path, max_steps=1, **BF16)
    trainer.train()
    assert logged(trainer, "objective/kl")[0] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("kind", ["head", "adapter", "model"])
def test_a_resumed_run_ends_as_one_that_never_stopped(path, tmp_path, kind):
    """Bit by bit, on the same card."""
    options = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 3, **BF16}
    whole = sampled(path, tmp_path / "whole", **critic_of(kind), **options)
    whole.train()
    checkpoints = sorted(Path(whole.args.output_dir).glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    assert len(checkpoints) == 3
    resumed = sampled(path, tmp_path / "resumed", **critic_of(kind), **options)
    resumed.train(resume_from_checkpoint=str(checkpoints[0]))
    expected = dict(whole.model.named_parameters())
    for name, value in resumed.model.named_parameters():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")
    assert json.loads(Path(checkpoints[0], "trainer_state.json").read_text())["global_step"] == 2
