"""MODPO: its loss against the formula, where it is DPO, margin rewards, and what it refuses."""

import copy

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_trl.build import instantiate_data
from rlhf_trl.checks import find_problems
from rlhf_trl.errors import ConfigError
from rlhf_trl.evaluation.generation import load_policy, sample
from rlhf_trl.rewards.conditioned import ConditionedReward
from rlhf_trl.rewards.function import FunctionReward
from rlhf_trl.trainers.base import DPOTrainer
from rlhf_trl.trainers.modpo import MODPOConfig, MODPOTrainer, with_margin_rewards
from tests.helpers.architectures import save_architecture
from tests.helpers.configs import composed
from tests.helpers.data import load, write
from tests.helpers.run_files import metrics
from tests.helpers.tiny import QUIET_ON_CPU, make_tokenizer

ROWS = {
    "prompt": ["a b", "c d", "e", "f g"],
    "chosen": [" c c d", " e", " f g h", " a"],
    "rejected": [" d", " e f a b", " g", " a b"],
}
LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_lora_weights": False}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    names = ("llama", "gpt2", "gemma2")
    return {name: save_architecture(tmp_path_factory.mktemp(name), name) for name in names}


def words(completions):
    return [float(len(text.split())) for text in completions]


def words_of_c(completions):
    return [float(text.split().count("c")) for text in completions]


def made(cls, config, model, tmp_path, path, **options):
    objects = {name: options.pop(name) for name in ("reward_funcs", "peft_config") if name in options}
    args = config(
        str(tmp_path), per_device_train_batch_size=2, num_train_epochs=1, learning_rate=1e-2, **QUIET_ON_CPU, **options
    )
    data = Dataset.from_dict(ROWS)
    tokenizer = AutoTokenizer.from_pretrained(path)
    return cls(
        model, args=args, train_dataset=data, eval_dataset=data, processing_class=tokenizer, **objects
    )  # fmt: skip


def log_prob(model, tokenizer, prompt, completion):
    """Return log pi(completion, end token | prompt), by a forward of its own."""
    start = tokenizer(prompt)["input_ids"]
    end = [*tokenizer(completion)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        logits = model(torch.tensor([start + end])).logits[0, len(start) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(end)[:, None]).sum()


@pytest.mark.parametrize(
    ("name", "kind", "precompute"),
    [
        ("llama", "full", False),
        ("gpt2", "full", True),
        ("gemma2", "new adapter", False),
        ("llama", "trained adapter", False),
        ("gemma2", "trained adapter", True),
    ],
)
def test_the_loss_is_that_of_the_formula(paths, tmp_path, name, kind, precompute):
    path, weight, beta = paths[name], 0.3, 0.2
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    reference = copy.deepcopy(model)
    peft_config = LoraConfig(**LORA) if kind == "new adapter" else None
    if kind == "trained adapter":
        torch.manual_seed(1)
        get_peft_model(model, LoraConfig(**LORA)).save_pretrained(tmp_path / "adapter")
        base = AutoModelForCausalLM.from_pretrained(path)
        model = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
        reference = copy.deepcopy(model)
    rewards = [FunctionReward(words, weight=-0.5), FunctionReward(words_of_c, weight=2.0)]
    options = {"beta": beta, "preference_weight": weight, "precompute_ref_log_probs": precompute}
    trainer = made(
        MODPOTrainer, MODPOConfig, model, tmp_path, path, reward_funcs=rewards, peft_config=peft_config, **options
    )
    policy = trainer.model
    with torch.no_grad():  # away from the reference
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    losses = []
    for row in range(4):
        implied = []
        for side in ("chosen", "rejected"):
            prompt, answer = ROWS["prompt"][row], ROWS[side][row]
            ratio = log_prob(policy, tokenizer, prompt, answer) - log_prob(reference, tokenizer, prompt, answer)
            margin = -0.5 * len(answer.split()) + 2.0 * answer.split().count("c")
            implied.append((beta * ratio - (1 - weight) * margin) / weight)
        losses.append(-logsigmoid(implied[0] - implied[1]))
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)
    assert metrics["eval_margin_rewards/chosen"] == pytest.approx(-0.5 * 8 / 4 + 2.0 * 2 / 4)
    assert metrics["eval_margin_rewards/margins"] == pytest.approx(metrics["eval_margin_rewards/chosen"] + 0.5 * 8 / 4)


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_with_all_weight_on_the_preferences_it_is_dpo(paths, tmp_path, adapter):
    runs = []
    for cls, config, options in (
        (DPOTrainer, trl.DPOConfig, {}),
        (MODPOTrainer, MODPOConfig, {"preference_weight": 1.0, "reward_funcs": [FunctionReward(words)]}),
    ):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(paths["llama"])
        model = get_peft_model(model, LoraConfig(**LORA)) if adapter else model
        trainer = made(cls, config, model, tmp_path, paths["llama"], **options)
        trainer.train()
        runs.append((trainer.model.state_dict(), [entry["loss"] for entry in trainer.state.log_history[:2]]))
    (weights, losses), (others, again) = runs
    assert losses == again and len(losses) == 2
    assert all(torch.equal(weight, others[name]) for name, weight in weights.items())


def test_margin_rewards_count_where_they_apply_to_both_answers(capsys):
    data = Dataset.from_dict(ROWS | {"task": ["x", "y", "x", "x"]})
    partly = FunctionReward(lambda completions: [None if "d" in text else 1.0 for text in completions], name="partly")
    only_y = ConditionedReward(FunctionReward(words, weight=10.0), {"task": "y"})
    found = with_margin_rewards(data, [partly, only_y], make_tokenizer())
    assert found["chosen_reward"][:] == [0.0, 11.0, 1.0, 1.0] and found["rejected_reward"][:] == [0.0, 41.0, 1.0, 1.0]
    shown = capsys.readouterr().out
    assert "`partly` is the same for both answers of every pair; it applies to 3 of 4 pairs" in shown
    assert (
        "`words`, weighted: chosen less rejected has mean -30" in shown and "chosen answer of 0% of 1 pair;" in shown
    )
    with pytest.raises(ConfigError, match="The margin reward `words` is nan for ' c c d'"):
        with_margin_rewards(data, [FunctionReward(lambda completions: [float("nan")] * 8, name="words")], None)


def test_a_margin_of_the_data_stands_for_rewards(tmp_path):
    rows = [{"prompt": "a", "chosen": " b", "rejected": " c", "good": 3, "bad": 1.5}]
    path = write(tmp_path / "rows.jsonl", rows * 2)
    data = load(path, columns={"margin": ["good", "bad"]})["train"]
    assert data["margin"][:] == [1.5, 1.5]
    found = with_margin_rewards(data, [], None)
    assert found["chosen_reward"][:] == [1.5, 1.5] and found["rejected_reward"][:] == [0.0, 0.0]


def test_what_it_refuses(paths, tmp_path, compose):
    model = AutoModelForCausalLM.from_pretrained(paths["llama"])
    with pytest.raises(ConfigError, match="MODPO needs a margin reward of each answer"):
        made(MODPOTrainer, MODPOConfig, model, tmp_path, paths["llama"]).train()
    for options, message in (
        ({"preference_weight": 0.0}, "`preference_weight` is 0"),
        ({"loss_type": ["ipo"]}, "`loss_type`"),
        ({"f_divergence_type": "forward_kl"}, "`f_divergence_type`"),
        ({"label_smoothing": 0.1}, "`label_smoothing`"),
    ):
        with pytest.raises(ConfigError, match=message):
            MODPOConfig(str(tmp_path), bf16=False, use_cpu=True, **options)
    words = ["stage=modpo", "reward=adapter", "adapter=lora", "stage.args.preference_weight=2"]
    problems = "\n".join(find_problems(compose(*words)))
    assert "`reward=adapter` scores on the base" in problems and "`stage.args.preference_weight`" in problems


SHORT = ["data.max_eval_samples=8", "stage.args.save_strategy=no"]


def test_the_stage_scores_with_the_group_reward(train, tmp_path):
    words = ["reward=[tokens,eos]", "reward.tokens.weight=-0.1", "reward.eos.weight=0.5", "data.max_samples=32"]
    run_dir = train(tmp_path, "stage=modpo", *words, *SHORT, "stage.args.max_steps=2", "stage.args.logging_steps=1")
    found = metrics(run_dir)
    assert found["eval"]["eval_margin_rewards/margins"] != 0
    assert len({entry["margin_rewards/chosen"] for entry in found["history"] if "margin_rewards/chosen" in entry}) == 2


@pytest.mark.slow
def test_answers_become_shorter_with_the_weight_of_brevity(train, tmp_path):
    words = ["stage=modpo", "reward=tokens", "reward.tokens.weight=-0.2", *SHORT, "stage.args.max_steps=80"]
    prompts = [row["prompt"] for row in instantiate_data(composed("train", "stage=ppo"))["eval"].select(range(64))]
    lengths = []
    for weight in ("1.0", "0.2"):
        run_dir = train(tmp_path, *words, f"run_name=w{weight}", f"stage.args.preference_weight={weight}")
        policy = load_policy(weight, run_dir, "float32")
        ids = [policy.ids(prompt) for prompt in prompts]
        found = sample(policy.model, policy.tokenizer, ids, 64, temperature=1.0, batch_size=64, seed=0)
        lengths.append(sum(map(len, found)) / len(found))
    assert lengths[1] < 0.8 * lengths[0]
