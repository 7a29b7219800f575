"""The memory plan of configs: its roles and batches, and what it names where it doesn't fit."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_trl.build import training_arguments
from rlhf_trl.checks import memory
from rlhf_trl.checks.memory import (
    Device,
    estimate,
    gib,
    memory_line,
    memory_lines,
    memory_warning,
    remedies,
    training_of,
)
from rlhf_trl.models.dry_passes import Batch, Computation
from rlhf_trl.models.memory import Engine, Training, adapted, plan_memory
from rlhf_trl.models.tokenizers import load_tokenizer
from tests.helpers.ppo import save_reward_model
from tests.helpers.tiny import save_model

PAIR = {"prompt": "a b c", "chosen": " d e f g", "rejected": " h"}
ROWS = {
    "sft": {"prompt": "a b c", "completion": " d e f g"},
    "dpo": PAIR,
    "kto": {"prompt": "a b c", "completion": " d e f g", "label": True},
    "orpo": PAIR,
    "ppo": {"prompt": "a b c"},
    "grpo": {"prompt": "a b c"},
    "online_dpo": {"prompt": "a b c"},
    "reward": {"completion_ids": [[0, 1, 2], [0, 1]], "length": 3, "better": [0], "worse": [1]},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def planned(compose, model):
    """`planned(stage, *words)` is the training that a config describes."""

    def training(stage: str, *words: str, **options) -> Training:
        cfg = compose(f"stage={stage}", "model=hf", f"model.path={model}", *words)
        args = training_arguments(cfg.stage.args)
        rows = Dataset.from_list([ROWS[stage]] * 4)
        return training_of(cfg, args, load_tokenizer(model), rows, **options)

    return training


@pytest.mark.parametrize(
    ("stage", "output", "reference", "beside", "batch"),
    [
        ("sft", "log_probs", False, False, Batch(4, 8, 5)),
        ("dpo", "log_probs", True, True, Batch(8, 8, 5)),
        ("kto", "log_probs", True, True, Batch(4, 8, 5)),
        ("orpo", "logits", False, False, Batch(8, 8, 5)),
        ("grpo", "log_probs", True, False, Batch(4, 3 + 512, 512)),
        ("ppo", "log_probs", True, False, Batch(4, 3 + 512, 512)),
        ("online_dpo", "log_probs", True, False, Batch(8, 3 + 512, 512)),
    ],
)
def test_each_stage_has_its_output_layer_its_reference_and_its_batch(planned, stage, output, reference, beside, batch):
    training = planned(stage, "stage.args.per_device_train_batch_size=4")
    assert (training.output, training.reference, training.scores_reference) == (output, reference, beside)
    assert training.batch == batch
    assert training.checkpointing and training.computation == Computation(None, False)
    lora = planned(stage, "adapter=lora")
    assert isinstance(lora.policy, PeftModel) and not lora.reference and lora.scores_reference == beside


def test_a_reward_model_that_goes_on_with_the_adapter_of_a_policy_has_a_plan(planned, model, tmp_path):
    policy = LlamaForCausalLM.from_pretrained(model)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(policy, lora).save_pretrained(str(tmp_path))
    training = planned("reward", "adapter=lora", f"model.path={tmp_path}")
    trained = {name for name, weight in training.policy.named_parameters() if weight.requires_grad}
    assert any(".score." in name for name in trained) and any("lora_A" in name for name in trained)
    assert plan_memory(training).total > 0


def test_rollouts_rewards_and_critics_of_a_config(planned, model, tmp_path):
    reward = save_reward_model(model, tmp_path / "reward")
    names = ["reward=model", "reward.model.run=null", f"reward.model.path={reward}", "critic=model"]
    training = planned("ppo", "stage.args.steps_per_generation=4", "stage.args.gradient_accumulation_steps=2", *names)
    assert training.rollout == (32, 3, 512) and training.accumulates and training.reuses_sampling
    assert training.critic_trunk is not None and all(p.requires_grad for p in training.critic_trunk.parameters())
    [(name, network, size, rows)] = training.rewards
    assert name == "reward model" and network is not None and size > 0 and rows == 32
    lines = memory_lines(plan_memory(training), Device("a card", 2**30))
    assert lines["memory"].endswith("a card has 1.00 GiB. In GiB:")
    assert list(lines)[1:5] == ["  policy", "  reference", "  critic", "  reward model"]
    half = plan_memory(planned("ppo", "+stage.args.ref_dtype=bfloat16")).roles[1]
    assert half.name == "reference" and half.weights == 2 * training.policy.num_parameters()
    vllm = planned("grpo", "rollout=vllm_colocate")
    assert vllm.rollout is None and vllm.vllm == pytest.approx(0.3)


def test_engines_of_a_launch(planned, monkeypatch):
    args = SimpleNamespace(bf16=False, use_cpu=True)
    assert planned("sft").engine == memory.launched_engine(args) == Engine("none", 1, False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert memory.launched_engine(args).name == "DDP"
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert memory.launched_engine(args) == Engine("FSDP2", 2, False)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    assert memory.launched_engine(args) == Engine("DDP", 2, False)  # with `use_cpu` accelerate leaves it out
    args.use_cpu, args.bf16 = False, True
    assert memory.launched_engine(args) == Engine("DeepSpeed ZeRO-3", 2, True)


def big(**options) -> Training:
    """Return a PPO of a Llama with a critic of its own, whose activations take more than its weights."""
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, vocab_size=512
    )
    with torch.device("meta"):
        policy, critic = LlamaForCausalLM(config), LlamaForCausalLM(config).base_model
    values = {"policy": policy, "reference": True, "critic": "model", "critic_trunk": critic}
    sizes = {"batch": Batch(32, 256, 192), "rollout": (8, 64, 192), "computation": Computation(None, True)}
    return Training(**{"output": "log_probs", **values, **sizes, **options})


def test_what_is_run_once_for_several_plans_is_what_each_would_run():
    reward = [("reward model", big().critic_trunk, 0.0, 32)]
    first = big(rewards=reward, engine=Engine("none", 1), vllm=0.0)
    changed = [each for _, each in remedies(first, 0.0)]
    assert len(changed) >= 6
    for each in changed:
        assert each.known is first.known and each.plan == replace(each, known={}).plan
    rollouts = [key for key in first.known if key[0] == "rollout"]
    assert len(rollouts) < len(changed)  # smaller micro-batches and recomputation change no rollout


def test_what_to_set_is_named_in_the_order_of_its_price():
    found = list(remedies(big(), 0.0))
    words = [text.split("`")[1] for text, _ in found]
    assert words == [
        "stage.args.per_device_train_batch_size=1",
        "stage.args.gradient_checkpointing=true",
        "adapter=lora",
        "critic=adapter",
        "adapter=qlora",
        "stage.args.max_completion_length=96",
    ]
    totals = [plan_memory(changed).total for _, changed in found]
    assert totals[0] > 1.2 * totals[-1]


def test_a_reward_model_that_takes_most_scores_fewer_rows_at_a_time():
    with torch.device("meta"):
        network = LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=4096, num_hidden_layers=1))
    training = big(batch=Batch(2, 64, 32), rollout=(2, 32, 32), rewards=[("reward model", network, 0.0, 256)])
    plan = plan_memory(training)
    assert plan.peak.name == "scores of reward model"
    words, changed = next(remedies(training, 0.6 * plan.total))
    assert words == "`reward.model.batch_size=128`" and plan_memory(changed).total <= 0.6 * plan.total


def test_a_full_policy_is_sharded_where_no_adapter_is_on_a_quantized_base():
    lora = adapted(big().policy, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    quantized = big(policy=lora, reference=False, quantization=memory.NF4)
    assert not any("fsdp2" in text for text, _ in remedies(quantized, 0.0))
    assert memory._sharding(big(computation=Computation(None, False)), 0.0) is None  # ranks of one machine share it
    sharded = memory._sharding(big(), 0.0)
    assert sharded is not None and "--num_processes 8" in sharded[0] and sharded[1].engine == Engine("FSDP2", 8, False)


def test_a_warning_stops_at_the_first_remedy_that_is_enough(monkeypatch):
    training = big()
    plan = plan_memory(training)
    enough, little = Device("a card", 2 * int(plan.total)), Device("a card", int(plan.total))
    assert memory_warning(training, plan, enough) is None
    text = memory_warning(training, plan, little)
    assert text is not None and "may not fit: a card has" in text
    assert text.count("(") == 1 and "`stage.args.per_device_train_batch_size=16` with 2 times as many" in text
    nothing = memory_warning(training, plan, Device("a card", 2**20))
    assert nothing is not None and "doesn't fit" in nothing and "Nothing here is enough" in nothing
    assert "Take a smaller model" in nothing
    monkeypatch.setattr(memory, "CHANGES", memory.CHANGES[-1:])
    sampling = replace(training, rollout=(4096, 64, 192))
    text = str(memory_warning(sampling, plan_memory(sampling), Device("a card", 2**20)))
    assert "Take smaller rollouts (`stage.args.steps_per_generation`), a smaller model or larger devices." in text


def test_a_model_that_cant_run_without_weights_has_no_plan_and_says_why(compose, model, monkeypatch):
    cfg = compose("stage=sft", "model=hf", f"model.path={model}")
    args = training_arguments(cfg.stage.args)

    def fail(training):
        raise RuntimeError("Tensor.item() cannot be called on meta tensors")

    monkeypatch.setattr("rlhf_trl.models.memory.plan_memory", fail)
    found = estimate(cfg, args, load_tokenizer(model), Dataset.from_list([ROWS["sft"]]))
    assert found.plan is None and found.warning is None and list(found.lines) == ["memory"]
    assert "can't be run without weights (Tensor.item()" in found.text


def test_sizes_in_words():
    assert [gib(count * 2**30) for count in (141.3, 9.96, 1.234, 0.1, 0.00123)] == [
        "141.3",
        "10.0",
        "1.23",
        "0.10",
        "0.0012",
    ]
    line = memory_line(plan_memory(replace(big(), critic="head", critic_trunk=None)), Device("a card", 2**34))
    assert line.startswith("Memory per rank, planned: ") and "of 16.0 GiB (a card)" in line and "policy" in line
