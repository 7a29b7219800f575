"""KL controllers and the KL guard on PPO, RLOO and GRPO, and the sentence about a negative KL."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from rlhf_trl.callbacks.kl import AdaptiveKL, CosineKL, FixedKL, LinearKL, is_negative, why_negative
from rlhf_trl.errors import ConfigError
from rlhf_trl.trainers.rollout_hook import RolloutRecord
from rlhf_trl.trainers.sampling import sampling_differences
from tests.helpers.architectures import save_architecture
from tests.helpers.ppo import prompts
from tests.helpers.rl import TRAINERS, logged, plain_kl, rl_trainer
from tests.helpers.tiny import save_model


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


class AtFirstStep(TrainerCallback):
    """Calls `look` before the first optimizer step on each rollout."""

    def __init__(self, steps_per_rollout, look):
        self.steps, self.look = steps_per_rollout, look

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step % self.steps == 0:
            self.look()


def measured(kl, kl_std=1.0, num_sequences=8) -> RolloutRecord:
    """Return a rollout of which the KL alone is known."""
    return RolloutRecord(True, [], [], None, kl, kl_std, num_sequences)


# ---- What a rollout's KL is ----


@pytest.mark.parametrize(
    ("kind", "options", "steps"),
    [
        ("grpo", {}, 1),
        ("grpo", {"per_device_train_batch_size": 2, "steps_per_generation": 4, "gradient_accumulation_steps": 4}, 1),
        ("grpo", {"per_device_train_batch_size": 4, "steps_per_generation": 2, "num_iterations": 2}, 4),
        ("rloo", {}, 1),
        ("rloo", {"per_device_train_batch_size": 4, "steps_per_generation": 2, "gradient_accumulation_steps": 2}, 1),
    ],
    ids=["grpo aligned", "grpo aligned, accumulated", "grpo off-policy", "rloo", "rloo accumulated"],
)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_kl_of_a_rollout_is_that_of_forwards_of_its_own(path, tmp_path, kind, options, steps, lora):
    peft_config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
    trainer = rl_trainer(kind, path, tmp_path, data=prompts(16), peft_config=peft_config, **options)
    assert trainer.keeps_reference
    forwards, found = [], []
    original = trainer._get_per_token_logps_and_entropies

    def counted(*args, **kwargs):
        forwards.append(1)
        return original(*args, **kwargs)

    trainer._get_per_token_logps_and_entropies = counted

    def look():
        found.append((plain_kl(trainer.model, path, trainer._buffered_inputs), trainer.last_rollout))

    trainer.add_callback(AtFirstStep(steps, look))
    trainer.train()
    assert len(found) == 4
    for expected, rollout in found:
        assert rollout.num_sequences == 8
        assert rollout.kl == pytest.approx(expected.mean().item(), abs=1e-5)
        assert rollout.kl_std == pytest.approx(expected.std(unbiased=False).item(), abs=1e-5)
    assert abs(found[-1][1].kl) > 1e-3
    assert logged(trainer, "objective/kl") == pytest.approx([rollout.kl for _, rollout in found], abs=1e-6)
    # per rollout: the reference's, the policy's unless GRPO leaves it out, and those of the losses
    micro_batches = trainer.args.steps_per_generation * trainer.args.num_iterations
    aligned = kind == "grpo" and trainer.args.gradient_accumulation_steps % micro_batches == 0
    assert len(forwards) == 4 * (micro_batches + (1 if aligned else 2))


def test_rollouts_within_one_optimizer_step_count_as_one(path, tmp_path):
    trainer = rl_trainer(
        "grpo", path, tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2, beta=0.1
    )
    trainer.add_callback(AdaptiveKL(0.1, target=6, horizon=100, trainer=trainer))
    trainer.train()
    assert trainer.state.global_step == 2 and trainer.last_rollout.num_sequences == 8
    assert trainer.beta == pytest.approx(0.1 * (1 - 0.2 * 8 / 100) ** 2)


# ---- Controllers ----


@pytest.mark.parametrize("kind", TRAINERS)
def test_an_adaptive_coefficient_follows_the_kl_that_is_logged(path, tmp_path, kind):
    trainer = rl_trainer(kind, path, tmp_path, data=prompts(16), num_iterations=2)
    trainer.add_callback(AdaptiveKL(0.1, target=1e-3, horizon=100, trainer=trainer))
    trainer.train()
    coefs, kls = logged(trainer, "objective/kl_coef"), logged(trainer, "objective/kl")
    assert len(coefs) == 4 and kls[0] == pytest.approx(0, abs=1e-5) and max(kls) > 1e-2
    expected = 0.1
    for coef, kl in zip(coefs, kls, strict=True):
        assert coef == pytest.approx(expected, rel=1e-6)
        expected *= 1 + min(max(kl / 1e-3 - 1, -0.2), 0.2) * 8 / 100
    assert trainer.beta == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_cosine_is_written_between_rollouts_only(path, tmp_path, kind):
    trainer = rl_trainer(kind, path, tmp_path, data=prompts(16), num_iterations=2, beta=0.4)
    trainer.add_callback(CosineKL(0.4, 0.2, trainer=trainer))
    betas = []
    loss = trainer._compute_loss

    def spy(*args, **kwargs):
        betas.append(trainer.beta)
        return loss(*args, **kwargs)

    trainer._compute_loss = spy
    trainer.train()
    expected = [0.2 + 0.2 * (1 + math.cos(math.pi * share)) / 2 for share in (0, 0.25, 0.5, 0.75)]
    assert logged(trainer, "objective/kl_coef") == pytest.approx(expected)
    assert betas == pytest.approx([beta for beta in expected for _ in range(2)])  # both epochs of a rollout


def test_a_line_and_a_cosine_meet_at_both_ends_and_half_way():
    linear, cosine = LinearKL(0.4, 0.1), CosineKL(0.4, 0.1)
    for progress, line, wave in ((0, 0.4, 0.4), (0.25, 0.325, 0.3560660), (0.5, 0.25, 0.25), (1, 0.1, 0.1)):
        linear.progress = cosine.progress = progress
        assert linear.update(1.0, 8) == pytest.approx(line) and cosine.update(1.0, 8) == pytest.approx(wave, abs=1e-7)


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_without_a_reference_a_controller_is_refused(path, tmp_path, kind):
    trainer = rl_trainer(kind, path, tmp_path, beta=0.0)
    with pytest.raises(ConfigError, match="`LinearKL` needs the KL.*Set `stage.args.beta` above 0"):
        LinearKL(0.0, 0.1, trainer=trainer)
    with pytest.raises(ConfigError, match="The KL guard needs the KL"):
        FixedKL(0.0, trainer=trainer, guard=5.0)
    trainer.add_callback(FixedKL(0.0, trainer=trainer))
    trainer.train()
    assert logged(trainer, "objective/kl") == [] and trainer.last_rollout.kl is None


def test_ppo_measures_kl_at_beta_zero_and_a_line_leads_away_from_it(path, tmp_path):
    trainer = rl_trainer("ppo", path, tmp_path, beta=0.0)
    trainer.add_callback(LinearKL(0.0, 0.4, trainer=trainer))
    trainer.train()
    assert logged(trainer, "objective/kl_coef") == pytest.approx([0.0, 0.2])


# ---- The guard ----


def parameters(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_skipped_rollout_moves_no_parameter(path, tmp_path, kind, caplog):
    trainer = rl_trainer(kind, path, tmp_path, data=prompts(16), num_iterations=2, weight_decay=0.1)
    controller = AdaptiveKL(0.1, 1e-3, horizon=100, trainer=trainer, guard=1e-3, guard_action="skip")
    trainer.add_callback(controller)
    before = []
    trainer.add_callback(AtFirstStep(2, lambda: before.append((parameters(trainer), trainer.last_rollout.kl))))
    trainer.train()
    over = [kl > 1e-3 for _, kl in before]
    assert not over[0] and any(over)
    states = [state for state, _ in before] + [parameters(trainer)]
    for (state, after), skipped in zip(itertools.pairwise(states), over, strict=True):
        assert all(torch.equal(state[name], after[name]) for name in state) == skipped
    counts = [sum(over[: i + 1]) for i in range(4)]
    assert logged(trainer, "objective/skipped_rollouts") == counts and controller.skipped == counts[-1]
    assert caplog.text.count("Its update is skipped") == counts[-1]
    expected = 0.1
    for _, kl in before:  # the controller sees what was skipped
        expected *= 1 + min(max(kl / 1e-3 - 1, -0.2), 0.2) * 8 / 100
    assert trainer.beta == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("strategy", ["no", "epoch"])
def test_a_guard_saves_and_stops_with_the_reason(path, tmp_path, kind, strategy, caplog):
    trainer = rl_trainer(kind, path, tmp_path, data=prompts(32), num_iterations=2, save_strategy=strategy)
    controller = FixedKL(0.1, trainer=trainer, guard=1e-3)
    trainer.add_callback(controller)
    states = []
    trainer.add_callback(AtFirstStep(2, lambda: states.append((parameters(trainer), trainer.last_rollout.kl))))
    trainer.train()
    last, kl = states[-1]
    assert kl > 1e-3 and all(kl <= 1e-3 for _, kl in states[:-1])
    assert trainer.state.global_step == 2 * len(states) < trainer.state.max_steps
    assert all(torch.equal(last[name], value) for name, value in parameters(trainer).items())
    assert controller.reason == f"KL guard: rollout {len(states)} has a KL of {kl:.4g} nats per sequence, over " + (
        "`kl.guard=0.001`."
    )
    assert f"{controller.reason} Training stops here, with a checkpoint of step {2 * len(states)}." in caplog.text
    saved = json.loads(Path(tmp_path, f"checkpoint-{2 * len(states)}", "trainer_state.json").read_text())
    assert saved["stateful_callbacks"]["FixedKL"]["attributes"] == {"coef": 0.1, "skipped": 0}


def test_a_kl_that_is_no_number_is_over_any_guard():
    controller = FixedKL(0.1, guard=5.0)
    controller._keep(rollout := measured(math.nan))
    assert controller._is_over()
    rollout.kl = 5.0
    assert not controller._is_over()


def test_the_record_of_a_run_says_why_it_was_stopped(train, tmp_path):
    words = ("stage.args.per_device_train_batch_size=8", "stage.args.steps_per_generation=2", "kl.guard=1e-6")
    run_dir = train(tmp_path, "stage=ppo", *words, "stage.args.num_iterations=1")
    record = json.loads(Path(run_dir, "run.json").read_text())
    assert record["status"] == "done" and "over `kl.guard=1e-06`" in record["reason"]
    assert Path(run_dir, "model.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guard": 0.0}, "`kl.guard` is 0.0. Set it above 0"),
        ({"guard": 1.0, "guard_action": "halt"}, "`kl.guard_action` is 'halt'"),
    ],
)
def test_guards_out_of_range_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        FixedKL(0.1, **options)


def test_skipping_under_deepspeed_is_refused(path, tmp_path):
    trainer = rl_trainer("ppo", path, tmp_path)
    trainer.is_deepspeed_enabled = True
    with pytest.raises(ConfigError, match="DeepSpeed"):
        FixedKL(0.1, trainer=trainer, guard=1.0, guard_action="skip")
    FixedKL(0.1, trainer=trainer, guard=1.0)


# ---- Negative KL ----


@pytest.mark.parametrize(
    ("kl", "std", "n", "negative"),
    [
        (-0.5, 1.0, 101, True),
        (-0.25, 1.0, 101, False),  # 2.5 standard errors: noise, now and then
        (-0.5, 1.0, 10, False),
        (-5e-4, 1e-6, 1000, False),  # rounding
        (0.5, 1.0, 101, False),
        (-5.0, 0.0, 1, False),
    ],
)
def test_only_a_kl_below_its_noise_is_negative(kl, std, n, negative):
    assert is_negative(measured(kl, std, n)) == negative


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("ppo", {}, []),
        ("grpo", {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}, []),
        ("ppo", {"top_k": 5, "top_p": 0.9}, ["`top_k=5`", "`top_p=0.9`"]),
        ("rloo", {"min_p": 0.1, "repetition_penalty": 1.2}, ["`min_p=0.1`", "`repetition_penalty=1.2`"]),
        (
            "grpo",
            {"generation_kwargs": {"no_repeat_ngram_size": 2, "temperature": 0.5}},
            ["`no_repeat_ngram_size=2`", "a sampling `temperature=0.5` beside `1.0`"],
        ),
    ],
)
def test_settings_that_change_what_is_sampled_are_named(path, tmp_path, kind, options, expected):
    assert sampling_differences(rl_trainer(kind, path, tmp_path, **options)) == expected


@pytest.mark.parametrize("kind", ["ppo", "grpo"])
def test_dropout_is_named(tmp_path, kind):
    path = save_architecture(tmp_path / "model", "opt", dropout=0.1)
    assert sampling_differences(rl_trainer(kind, path, tmp_path)) == []
    trainer = rl_trainer(kind, path, tmp_path, disable_dropout=False)
    assert sampling_differences(trainer) == ["dropout (`disable_dropout=false`)"]


def flattened(kind, path, out, **kwargs):
    """Return a run with a constant reward and an entropy bonus, which makes likely tokens less likely."""
    own = {"head_init": "zero", "vf_coef": 0.0} if kind == "ppo" else {}
    options = {"per_device_train_batch_size": 32, "beta": 1e-4, "entropy_coef": 1.0, "optim": "sgd"}
    trainer = rl_trainer(
        kind,
        path,
        out,
        data=prompts(64),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        learning_rate=0.02,
        max_grad_norm=100.0,
        **(options | own | kwargs),
    )
    trainer.add_callback(FixedKL(1e-4, trainer=trainer))
    trainer.train()
    return logged(trainer, "objective/kl")


@pytest.mark.parametrize("kind", ["ppo", "grpo"])
def test_a_negative_kl_is_explained_once_and_a_healthy_one_is_not(path, tmp_path, kind, caplog):
    kls = flattened(kind, path, tmp_path / "greedy", top_k=1)
    assert sum(kl < 0 for kl in kls) > 1
    said = [record.message for record in caplog.records if "is negative" in record.message]
    assert len(said) == 1 and said[0].endswith("sampling differs by `top_k=1`.")
    caplog.clear()
    kls = flattened(kind, path, tmp_path / "healthy")
    assert max(kls) > 0 and "is negative" not in caplog.text


def test_a_negative_kl_without_a_known_cause_says_that_too():
    assert why_negative(measured(-0.5, 1.0, 101), 3, []) == (
        "The KL of rollout 3 is negative, -0.5 nats per sequence (standard error 0.1), which no KL can be: the "
        "completions don't come from the distribution that scores them; no sampling setting, rollout function, vLLM "
        "or dropout differs, so look for what changes the model between sampling and scoring."
    )
