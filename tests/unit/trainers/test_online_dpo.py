"""Online DPO: its loss, its rollouts on every architecture, references, judges, and what hangs on the rollouts."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.experimental.online_dpo import online_dpo_trainer

from rlhf_trl.callbacks.health import HealthMonitor
from rlhf_trl.callbacks.samples import SAMPLES_FILE, SampleLog
from rlhf_trl.errors import ConfigError
from rlhf_trl.evaluation.judges import TextJudge, pair_judge
from rlhf_trl.models.roles import begin_training
from rlhf_trl.patches.online_dpo import models_as_in_other_trainers
from rlhf_trl.trainers.online_dpo import OnlineDPOConfig, OnlineDPOTrainer, pair_losses, preferences
from tests.helpers.architectures import ARCHITECTURES, save_architecture
from tests.helpers.ppo import prompts
from tests.helpers.rl import count_of_a, logged
from tests.helpers.tiny import QUIET_ON_CPU, save_model

QUICK = ("llama", "gpt2")
NAMES = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in ARCHITECTURES]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def make(path, out, peft_config=None, model=None, rewards=(count_of_a,), data=None, judge=None, **kwargs):
    """Return a trainer with two steps, each of 4 prompts, and completions of up to 6 tokens."""
    defaults = {
        "output_dir": str(out),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_completion_length": 6,
        "num_train_epochs": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        **QUIET_ON_CPU,
    }
    trainer = OnlineDPOTrainer(
        AutoModelForCausalLM.from_pretrained(path) if model is None else model,
        reward_funcs=list(rewards),
        judge=judge,
        args=OnlineDPOConfig(**(defaults | kwargs)),
        train_dataset=prompts(8) if data is None else data,
        eval_dataset=prompts(5),
        peft_config=peft_config,
        processing_class=AutoTokenizer.from_pretrained(path),
    )
    if hasattr(trainer.model, "peft_config"):
        begin_training(trainer.model)
    return trainer


def length_of(completions, **columns):
    return [float(len(text)) for text in completions]


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


# ---- Pure functions ----


def test_the_completion_with_the_higher_score_is_preferred():
    scores = torch.tensor([1.0, 0.5, -2.0, 3.0, 1.0, 1.0, math.nan, 1.0])
    torch.testing.assert_close(preferences(scores), torch.tensor([1.0, -1.0, 0.0, math.nan]), equal_nan=True)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_the_loss_of_a_pair_is_that_of_the_preferred_one_over_the_other(loss_type):
    ratios = torch.tensor([[0.3, -0.2], [0.3, -0.2], [5.0, -5.0]], requires_grad=True)
    losses = pair_losses(ratios, torch.tensor([1.0, -1.0, 0.0]), 0.5, loss_type)
    expected = [-logsigmoid(torch.tensor(x)) if loss_type == "sigmoid" else (2 * x - 1) ** 2 for x in (0.25, -0.25)]
    torch.testing.assert_close(losses, torch.tensor([*map(float, expected), 0.0]))
    losses.sum().backward()
    assert ratios.grad is not None and ratios.grad[2].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_length": 100}, "max_prompt_length"),
        ({"max_new_tokens": 10}, "Set `max_completion_length`"),
        ({"use_vllm": True}, "sampled from the weights"),
        ({"beta": 0.0}, "Set it above 0"),
        ({"beta": [0.1, -1]}, "one per epoch"),
        ({"loss_type": "hinge"}, "sigmoid"),
        ({"missing_eos_penalty": -1.0}, "above 0"),
    ],
)
def test_arguments_without_effect_or_out_of_range_are_refused(tmp_path, given, message):
    with pytest.raises(ConfigError, match=message):
        OnlineDPOConfig(str(tmp_path), report_to="none", bf16=False, use_cpu=True, **given)


def test_online_dpo_needs_a_reward_or_a_judge_and_no_images(path, tmp_path):
    with pytest.raises(ConfigError, match="needs a reward or a judge"):
        make(path, tmp_path, rewards=())
    rows = Dataset.from_list([{"prompt": "a", "image": None}])
    with pytest.raises(ConfigError, match="have images"):
        make(path, tmp_path, data=rows)


# ---- Rollouts ----


@pytest.mark.parametrize("name", NAMES)
def test_policies_of_every_architecture_learn_from_pairs_scored_as_each_row_alone(tmp_path, name):
    path = save_architecture(tmp_path / "model", name)
    trainer = make(path, tmp_path, rewards=[length_of], temperature=1.0)
    before = weights(trainer)
    plain, batches, compute = AutoModelForCausalLM.from_pretrained(path), [], trainer._compute_loss
    trainer._compute_loss = lambda model, inputs: batches.append(inputs) or compute(model, inputs)
    trainer.train()
    first = batches[0]
    assert first["preference"].shape == (4,) and set(first["preference"].tolist()) <= {-1.0, 0.0, 1.0}
    for i in range(8):
        prompt = first["prompt_ids"][i][first["prompt_mask"][i].bool()]
        written = first["completion_ids"][i][first["completion_mask"][i].bool()]
        with torch.no_grad():
            logits = plain(torch.cat([prompt, written])[None]).logits[0, len(prompt) - 1 : -1]
        alone = logits.log_softmax(-1).gather(1, written[:, None])[:, 0]
        scored = first["ref_per_token_logps"][i][first["completion_mask"][i].bool()]
        torch.testing.assert_close(scored, alone, atol=1e-4, rtol=1e-4)
    assert torch.equal(first["prompt_ids"][0], first["prompt_ids"][1])  # a pair has one prompt
    assert any(not torch.equal(before[key], value) for key, value in trainer.model.state_dict().items())
    first, second = logged(trainer, "objective/kl")
    assert first == pytest.approx(0.0, abs=1e-4) and second != 0


def test_accumulated_micro_batches_give_the_gradient_of_one_batch(path, tmp_path):
    """TRL's own trainer adds the gradients of micro-batches up, and samples each by itself."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    trained = []
    for rows, steps in ((4, 1), (2, 2)):
        trainer = make(
            path, tmp_path / str(steps), per_device_train_batch_size=rows, gradient_accumulation_steps=steps
        )
        calls = []

        def written(model, prompt_ids, calls=calls):
            calls.append(len(prompt_ids))
            answers = [f"{'a ' * ((sum(ids) + i) % 4)}b c" for i, ids in enumerate(prompt_ids)]
            return [[*tokenizer(answer)["input_ids"], tokenizer.eos_token_id] for answer in answers]

        trainer._sample = written
        trainer.train()
        assert calls[:2] == [8, 8]  # a step's micro-batches together
        trained.append(weights(trainer))
    for name, value in trained[0].items():
        torch.testing.assert_close(value, trained[1][name], atol=1e-6, rtol=1e-5)


def test_equal_scores_teach_nothing(path, tmp_path):
    trainer = make(path, tmp_path, rewards=[lambda completions, **columns: [1.0] * len(completions)])
    before = weights(trainer)
    trainer.train()
    assert logged(trainer, "pairs/ties") == [1.0, 1.0] and logged(trainer, "loss") == [0.0, 0.0]
    assert all(torch.equal(before[name], value) for name, value in trainer.model.state_dict().items())


def test_a_completion_without_an_end_loses_the_penalty(path, tmp_path):
    trainer = make(path, tmp_path, rewards=[lambda completions, **columns: [1.0] * len(completions)])
    trainer.args.missing_eos_penalty = 0.5
    end = trainer.eos_token_ids[0]
    trainer._generate_and_score_completions([{"prompt": "a"}] * 2)
    assert trainer._preference(["a"] * 2, ["x", "y"], [[5, end], [5, 6]]).tolist() == [1.0]


def test_beta_is_one_per_epoch(path, tmp_path):
    trainer = make(path, tmp_path, beta=[0.5, 0.1], num_train_epochs=3, max_steps=6)
    trainer.train()
    assert logged(trainer, "objective/kl_coef") == [0.5, 0.5, 0.1, 0.1, 0.1, 0.1]


def test_a_smaller_last_step_of_an_epoch_has_its_own_kl(path, tmp_path):
    arguments = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    trainer = make(path, tmp_path, data=prompts(8), num_train_epochs=2, max_steps=-1, **arguments)
    counts = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            assert trainer.last_rollout is not None
            counts.append(trainer.last_rollout.num_sequences)

    trainer.add_callback(Watch())
    trainer.train()
    assert counts == [12, 4, 12, 4] and len(logged(trainer, "objective/kl")) == 4


def test_the_ranks_take_parts_of_one_order(path, tmp_path):
    """Each rank has random numbers of its own by then, which its shuffle must not come from."""
    trainer, orders = make(path, tmp_path), []
    for rank in range(2):
        torch.manual_seed(trainer.args.seed + rank)
        orders.append([row["prompt"] for rows in trainer.get_train_dataloader() for row in rows])
    assert orders[0] == orders[1] != sorted(orders[0])


# ---- References ----


def test_the_reference_of_an_adapter_is_an_adapter(path, tmp_path):
    """A fresh adapter's is the base, and that of one which is trained further a frozen copy beside it."""
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    fresh = make(path, tmp_path / "fresh", peft_config=config)
    assert fresh.ref_model is None and list(fresh.model.peft_config) == ["default"]
    torch.manual_seed(1)
    begun = get_peft_model(
        AutoModelForCausalLM.from_pretrained(path),
        LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False),
    )
    base = next(iter(begun.get_base_model().parameters()))
    trainer = make(path, tmp_path / "begun", model=begun)
    assert trainer.ref_model is None and list(trainer.model.peft_config) == ["default", "ref"]
    assert next(iter(trainer.model.get_base_model().parameters())) is base
    before = weights(trainer)
    trainer.train()
    moved = {name for name, value in trainer.model.state_dict().items() if not torch.equal(before[name], value)}
    assert moved and all(".default." in name for name in moved)
    assert logged(trainer, "objective/kl")[0] == pytest.approx(0.0, abs=1e-5)


def test_a_reference_that_cannot_be_copied_is_loaded(path, tmp_path):
    """ZeRO-3 has marked the weights of which it gave each rank a part."""
    model = AutoModelForCausalLM.from_pretrained(path)
    for weight in model.parameters():
        weight.ds_id = 0
    args = OnlineDPOConfig(str(tmp_path), model_init_kwargs={"use_cache": False}, **QUIET_ON_CPU)
    with models_as_in_other_trainers(args):
        reference = online_dpo_trainer.create_reference_model(model)
    assert not reference.config.use_cache and reference.dtype == model.dtype and not reference.training
    for name, weight in reference.named_parameters():
        assert torch.equal(weight, model.get_parameter(name)) and not weight.requires_grad


# ---- Judges ----


class ShorterIsBetter(TextJudge):
    """A judge that draws at random as well."""

    def ask(self, questions):
        torch.manual_seed(0)
        np.random.seed(0)
        pairs = [question.split("|")[1:3] for question in questions]
        return ["C" if len(a) == len(b) else "A" if len(a) < len(b) else "B" for a, b in pairs]


def test_a_judge_decides_without_a_reward_and_leaves_the_random_state(path, tmp_path):
    trainer = make(path, tmp_path, rewards=(), judge=pair_judge(ShorterIsBetter("{prompt}|{a}|{b}")), logging_steps=1)
    batches, compute = [], trainer._compute_loss
    trainer._compute_loss = lambda model, inputs: batches.append(inputs) or compute(model, inputs)
    trainer.train()
    assert not torch.equal(batches[0]["completion_ids"], batches[1]["completion_ids"])
    for batch in batches:
        ids = [
            row[mask.bool()].tolist()
            for row, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True)
        ]
        lengths = [len(text) for text in trainer._tokenizer.batch_decode(ids, skip_special_tokens=True)]
        expected = [float(np.sign(b - a)) for a, b in zip(lengths[::2], lengths[1::2], strict=True)]
        assert batch["preference"].tolist() == expected
    metrics = trainer.evaluate()
    assert 0 <= metrics["eval_win_rate"] <= 1 and "eval_reward" not in metrics


def test_rewards_beside_a_judge_are_logged_and_not_learned_from(path, tmp_path):
    judge = lambda prompts, first, second: [1.0] * len(prompts)  # noqa: E731
    trainer = make(path, tmp_path, judge=judge)
    trainer.train()
    assert logged(trainer, "reward") and logged(trainer, "pairs/ties") == [0.0, 0.0]


# ---- Evaluation, callbacks, resuming ----


def test_evaluation_counts_each_prompt_once_and_leaves_the_random_state(path, tmp_path):
    trainer = make(path, tmp_path)
    state = torch.get_rng_state()
    first, again = trainer.evaluate(), trainer.evaluate()
    assert torch.equal(state, torch.get_rng_state())
    names = ("eval_reward", "eval_completions/mean_length", "eval_objective/kl", "eval_rewards/count_of_a/mean")
    assert all(first[name] == again[name] and math.isfinite(first[name]) for name in names)
    assert first["eval_objective/kl"] == pytest.approx(0.0, abs=1e-4)
    trainer.args.per_device_eval_batch_size = 5  # one batch: other draws, as many rows
    trainer._sample = lambda model, prompt_ids: [[5 + sum(row) % 7, trainer.eos_token_ids[0]] for row in prompt_ids]
    whole = trainer.evaluate()
    trainer.args.per_device_eval_batch_size = 2
    assert trainer.evaluate()["eval_reward"] == pytest.approx(whole["eval_reward"])


def test_samples_and_health_signs_work(path, tmp_path):
    trainer = make(path, tmp_path, eval_strategy="steps", eval_steps=1)
    trainer.add_callback(HealthMonitor(trainer, baseline=1, window=1))
    trainer.add_callback(SampleLog(trainer, str(tmp_path)))
    trainer.train()
    lines = (tmp_path / SAMPLES_FILE).read_text().splitlines()
    assert len(lines) == 2 * 8 + 2 * 5 and logged(trainer, "health/level")


def test_a_resumed_run_is_the_uninterrupted_one(path, tmp_path):
    settings = {"max_steps": 4, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 1}
    whole = make(path, tmp_path / "whole", **settings)
    whole.train()
    resumed = make(path, tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(resumed).items())
