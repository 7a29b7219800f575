"""The memory plan: weights, gradients and states by hand, and passes without weights against real ones."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_trl.models.dry_passes import Batch, Computation, Kernels, Passes
from rlhf_trl.models.memory import (
    Engine,
    Training,
    adapted,
    plan_memory,
    rollout_moment,
    update_moment,
)
from rlhf_trl.models.optimizers import optimizer_bytes
from rlhf_trl.models.tracking import StorageTracker, parameters_and_buffers
from rlhf_trl.models.weight_bytes import weight_bytes
from rlhf_trl.patches.dropout import disable_dropout
from tests.helpers.architectures import ARCHITECTURES, make_architecture

ON_CPU, ON_GPU = Computation(None, False), Computation(torch.bfloat16, True)
# Of the Llama below: the embedding and the output layer, two layers of attention (2 heads of keys), MLP and norms
VOCABULARY, WIDTH, INNER, LAYERS, LENGTH = 96, 32, 64, 2, 24
LAYER = 2 * WIDTH * WIDTH + 2 * WIDTH * (WIDTH // 2) + 3 * WIDTH * INNER + 2 * WIDTH
WEIGHTS = 2 * VOCABULARY * WIDTH + LAYERS * LAYER + WIDTH
LORA = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
TRAINED_BY_LORA = LAYERS * 4 * ((WIDTH + WIDTH) + (INNER + WIDTH))


def llama(dtype: torch.dtype = torch.float32, **options) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        **options,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config).to(dtype)


def training(policy=None, **options) -> Training:
    values = {"output": "log_probs", "batch": Batch(4, LENGTH, 8), "computation": ON_CPU} | options
    return Training(policy or llama(), **values)


def roles(**options) -> dict[str, tuple[float, float, float]]:
    plan = plan_memory(training(**options))
    return {role.name: (role.weights, role.gradients, role.optimizer) for role in plan.roles}


# ---- By hand ----


def test_a_full_policy_has_weights_gradients_and_two_moments_in_the_type_of_its_weights():
    buffers = 4 * (WIDTH // 4 // 2) * 2  # of the rotary positions, and their originals
    assert roles() == {"policy": (4 * WEIGHTS + buffers, 4 * WEIGHTS, 8 * WEIGHTS)}
    _, gradients, states = roles(policy=llama(torch.bfloat16))["policy"]
    assert (gradients, states) == (2 * WEIGHTS, 4 * WEIGHTS)


def test_a_full_policy_of_ppo_has_a_reference_and_each_kind_of_critic():
    found = roles(reference=True, critic="head")
    head = 4 * (WIDTH + 1)
    assert found["reference"][0] == found["policy"][0] and found["reference"][1:] == (0, 0)
    assert found["critic"] == (head, head, 2 * head)
    trunk = llama().base_model
    size = 4 * (WEIGHTS - VOCABULARY * WIDTH)  # without the output layer
    assert roles(reference=True, critic="model", critic_trunk=trunk)["critic"] == (size, size, 2 * size)


def test_roles_on_one_base_take_their_adapters():
    policy = adapted(llama(torch.bfloat16), LORA)
    lora = 4 * TRAINED_BY_LORA  # in float32
    found = roles(policy=policy, critic="adapter", rewards=[("reward adapter", None, float(lora), 4)])
    weights, gradients, states = found["policy"]
    assert weights == pytest.approx(2 * WEIGHTS + lora, abs=64) and (gradients, states) == (lora, 2 * lora)
    assert found["critic"] == (lora, lora, 2 * lora)
    assert found["reference"] == (0, 0, 0) and found["reward adapter"] == (lora, 0, 0)


def test_a_base_in_4_bits_takes_half_a_byte_per_weight_and_its_constants():
    policy = adapted(llama(torch.bfloat16), LORA)
    quantization = SimpleNamespace(load_in_4bit=True, bnb_4bit_use_double_quant=False)
    linear = LAYERS * (LAYER - 2 * WIDTH)
    rest = 2 * (WEIGHTS - linear) + 4 * TRAINED_BY_LORA
    assert weight_bytes(policy, quantization) == pytest.approx(rest + linear * (0.5 + 1 / 16), abs=64)
    quantization.bnb_4bit_use_double_quant = True
    assert weight_bytes(policy, quantization) == pytest.approx(rest + linear * (0.5 + 1 / 64 + 1 / 4096), abs=64)


@pytest.mark.parametrize(
    ("name", "per_weight"),
    [
        ("adamw_torch_fused", 8),
        ("adamw_8bit", 2),
        ("paged_adamw_8bit", 2),
        ("adamw_torch_4bit", 1),
        ("lion_32bit", 4),
        ("lion_8bit", 1),
        ("ademamix", 12),
        ("paged_ademamix_8bit", 3),
        ("rmsprop_bnb_8bit", 1),
        ("sgd", 0),
        ("galore_adamw", 8),
    ],
)
def test_states_of_optimizers(name, per_weight):
    assert optimizer_bytes(name, 1000, 4) == 1000 * per_weight
    assert optimizer_bytes("adamw_torch", 1000, 2) == 4000 and optimizer_bytes("adamw_8bit", 1000, 2) == 2000


def test_ddp_holds_its_gradients_twice_and_sharding_divides():
    whole = roles()["policy"]
    plan = plan_memory(training(engine=Engine("DDP", 4)))
    assert plan.other == whole[1] and (plan.roles[0].weights, plan.roles[0].optimizer) == (whole[0], whole[2])
    assert roles(engine=Engine("FSDP2", 4))["policy"] == tuple(part / 4 for part in whole)
    weights, gradients, states = roles(engine=Engine("DeepSpeed ZeRO-2", 4, bf16=True))["policy"]
    # The estimates that DeepSpeed publishes, `estimate_zero2_model_states_mem_needs` and `..._zero3_...`, count
    # 4 + 16 / N and 18 / N bytes per weight: gradients whole in one, and once more in float32 in both
    assert weights == pytest.approx(2 * WEIGHTS, abs=64)
    assert (gradients, states) == (2 * WEIGHTS / 4, 12 * WEIGHTS / 4)
    assert weights + gradients + states <= 4 * WEIGHTS + 16 * WEIGHTS / 4
    sharded = sum(roles(engine=Engine("DeepSpeed ZeRO-3", 4, bf16=True))["policy"])
    assert 0.8 * 18 * WEIGHTS / 4 <= sharded <= 18 * WEIGHTS / 4


@pytest.mark.parametrize(
    ("engine", "per_weight"),
    [("FSDP2", 4 / 4), ("DeepSpeed ZeRO-2", 2), ("DeepSpeed ZeRO-3", 2 / 4)],  # DeepSpeed casts what it is given
)
def test_a_reference_is_in_the_type_of_its_engine_and_sharded_with_the_policy(engine, per_weight):
    weights, *_ = roles(reference=True, engine=Engine(engine, 4, bf16=True))["reference"]
    assert weights == pytest.approx(per_weight * WEIGHTS, abs=64)


def test_vllm_takes_its_share_and_gives_it_back_where_it_sleeps():
    share = {"vllm": 0.5, "device_memory": 10**9}
    awake, asleep = plan_memory(training(**share)), plan_memory(training(**share, vllm_sleeps=True))
    assert awake.total - plan_memory(training()).total == asleep.peak.total == 5e8
    assert asleep.peak.name == "rollout" and awake.peak.name == "update"


# ---- Architectures ----


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_weights_and_cache_of_architectures(name):
    """Tied output layers count once, and the cache has the heads of keys and values, not those of queries."""
    model = make_architecture(name)
    with torch.device("meta"):
        empty = make_architecture(name)
    parameters = sum(p.numel() for p in model.parameters())
    buffers = sum(4 * b.numel() for b in model.buffers() if b.dtype == torch.float32)
    assert weight_bytes(empty) == pytest.approx(4 * parameters + buffers, rel=0.02)
    with torch.no_grad():
        cache = model(torch.zeros(3, 15, dtype=torch.long), use_cache=True).past_key_values
    held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    planned = rollout_moment(training(empty, rollout=(3, 6, 10)))
    ids = 2 * 8 * 3 * 16
    assert planned.parts["cache"] == pytest.approx(4 * held, abs=4 * ids)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_planned_update_is_that_of_a_real_step(name, checkpointing):
    """With dropout disabled, which a checkpoint without dropout must not miss."""
    with torch.device("meta"):
        empty = make_architecture(name)
    batch = Batch(4, 32, 8)
    plan = training(empty, output="scores", batch=batch, checkpointing=checkpointing, disable_dropout=True)
    planned = update_moment(plan, 0.0).total

    model = make_architecture(name)
    disable_dropout(model)
    model.train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    ids, mask = torch.zeros(4, 32, dtype=torch.long), torch.ones(4, 32, dtype=torch.long)
    mask[0, :5] = 0
    head = nn.Linear(model.get_output_embeddings().in_features, 1)
    tracker = StorageTracker()
    tracker.ignore(parameters_and_buffers(model, head))
    with tracker:
        head(model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state).sum().backward()
    assert planned == pytest.approx(tracker.peak, rel=0.1)


def test_checkpointing_adapters_and_smaller_critics_take_less():
    trunk = llama().base_model
    full = plan_memory(training(reference=True, critic="model", critic_trunk=trunk, batch=Batch(16, 64, 32))).total
    for change in ({"checkpointing": True}, {"policy": adapted(llama(), LORA), "reference": False}):
        values = {"reference": True, "critic": "model", "critic_trunk": trunk, "batch": Batch(16, 64, 32)} | change
        assert plan_memory(training(**values)).total < full
    assert plan_memory(training(reference=True, critic="head", batch=Batch(16, 64, 32))).total < full
    assert plan_memory(training(reference=True, critic="head", batch=Batch(16, 64, 32), accumulates=True)).total > (
        plan_memory(training(reference=True, critic="head", batch=Batch(16, 64, 32))).total
    )


# ---- Tools ----


def test_the_tracker_counts_storages_once_and_lets_them_go():
    tracker = StorageTracker()
    kept = torch.ones(256)
    with tracker:
        tracker.add(kept)
        made = kept * 2
        view = made[:128].view(2, 64)
        assert tracker.current == 2 * 1024
        (kept + 1).sum()
        assert tracker.current == 2 * 1024 and tracker.peak >= 3 * 1024
        del made
        assert tracker.current == 2 * 1024  # the view holds it
        del view
        assert tracker.current == 1024
        tracker.reset_peak()
    assert tracker.peak == 1024


def test_autocast_without_weights_makes_the_types_of_autocast():
    def types(device: str) -> list[torch.dtype]:
        layer, x = nn.Linear(8, 8, device=device), torch.ones(2, 8, device=device)
        seen = [layer(x), layer(x.bfloat16()), x + layer(x), layer(x) @ x.T, torch.nn.functional.layer_norm(x, (8,))]
        return [each.dtype for each in seen]

    with torch.autocast("cpu", torch.bfloat16):
        expected = types("cpu")
    with Kernels(torch.bfloat16, padded=True):
        assert types("meta") == expected


def test_mixed_precision_keeps_a_copy_of_trained_weights_for_the_backward():
    model = llama()
    with Passes(model, computation=ON_GPU) as passes:
        hidden = passes.hidden_states(model, Batch(1, 2, 1))
        copies = 2 * LAYERS * (LAYER - 2 * WIDTH)
        assert copies < passes.tracker.current < 1.5 * copies
        assert hidden.dtype == torch.float32
