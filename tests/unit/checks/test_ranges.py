"""Ranges of options: the command line, the dry run and the classes refuse the same values, with what to set."""

import inspect
import math
import re

import pytest
import trl
from trl.trainer import dpo_trainer, kto_trainer, sft_trainer

from rlhf_trl.callbacks.kl import AdaptiveKL, FixedKL, LinearKL
from rlhf_trl.callbacks.reward_norm import ReferenceNorm, RewardNorm
from rlhf_trl.checks import find_problems
from rlhf_trl.checks.ranges import RULES, RUN
from rlhf_trl.config.argument_names import arguments
from rlhf_trl.config.ranges import problem_of
from rlhf_trl.errors import ConfigError
from rlhf_trl.ppo import PPOConfig
from rlhf_trl.reward_modeling.config import RewardConfig
from rlhf_trl.rewards.function import FunctionReward


@pytest.mark.parametrize(
    ("rule", "inside", "outside", "words"),
    [
        ("(0, inf)", [1e-9, 3], [0, -1], "above 0"),
        ("[0, inf)", [0, 0.5], [-1e-9], "to 0 or more"),
        ("int [1, inf)", [1, 7], [0], "to 1 or more"),
        ("[0, 1]", [0, 1], [-0.1, 1.1], "to a number from 0 to 1"),
        ("[0, 1)", [0, 0.9], [1, -1], "to a number from 0 to below 1"),
        ("(0, 1]", [0.1, 1], [0, 2], "to a number above 0 and up to 1"),
        ("int -1 or [1, inf)", [-1, 1], [0, -2], "to 1 or more, or to -1 for no limit"),
        ("(-inf, inf)", [-3, 0], [], "to a number"),
    ],
)
def test_an_interval_and_its_words(rule, inside, outside, words):
    for value in inside:
        assert problem_of("x", value, rule) is None
    for value in outside:
        assert problem_of("x", value, rule) == f"`x` is {value!r}. Set it {words}."
    for value in (math.nan, math.inf, -math.inf):
        problem = problem_of("x", value, rule)
        assert problem is not None and ("a finite number" in problem or "an integer" in problem)
    for value in ("2", True, [1]):
        assert f"`x` is {value!r} and must be a" in problem_of("x", value, rule)
    assert problem_of("x", None, rule).startswith("`x` is null and must be a")
    assert problem_of("x", None, f"{rule}?") is None


def test_choices_and_truth_values():
    assert problem_of("x", ["a", "b"], "a|b") is None and problem_of("x", "a", "a|b") is None
    assert problem_of("x", ["sigmoide"], RULES["trl.DPOConfig"]["loss_type"]) == (
        "`x` is 'sigmoide'. Did you mean `sigmoid` or `sigmoid_norm`?"
    )
    assert problem_of("x", False, "bool") is None
    for value in ("no", 2, 0, None, "maybe"):
        assert "must be true or false. Set `x=true` or `x=false`." in problem_of("x", value, "bool")


SFT = "stage=sft"


@pytest.mark.parametrize(
    ("overrides", "key", "words"),
    [
        ([SFT, "stage.args.learning_rate=-1"], "stage.args.learning_rate", "0 or more"),
        ([SFT, "stage.args.learning_rate=inf"], "stage.args.learning_rate", "a finite number"),
        ([SFT, "stage.args.learning_rate=nan"], "stage.args.learning_rate", "a finite number"),
        ([SFT, "stage.args.learning_rate=null"], "stage.args.learning_rate", "is null and must be a number"),
        ([SFT, "stage.args.logging_steps=null"], "stage.args.logging_steps", "is null and must be a number"),
        ([SFT, "stage.args.save_strategy=null"], "stage.args.save_strategy", "is null and must have a value"),
        ([SFT, "stage.args.max_steps=0"], "stage.args.max_steps", "1 or more, or to -1"),
        ([SFT, "stage.args.num_train_epochs=-2"], "stage.args.num_train_epochs", "above 0"),
        ([SFT, "stage.args.max_length=0"], "stage.args.max_length", "1 or more"),
        ([SFT, "+stage.args.adam_beta1=2"], "stage.args.adam_beta1", "from 0 to below 1"),
        ([SFT, "+stage.args.dataloader_num_workers=-1"], "stage.args.dataloader_num_workers", "0 or more"),
        ([SFT, "stage.task_type=CAUSAL"], "stage.task_type", "`CAUSAL_LM`"),
        ([SFT, "seed=-1"], "seed", "from 0 to 4294967295"),
        ([SFT, "seed=1.5"], "seed", "an integer"),
        ([SFT, "seed=abc"], "seed", "an integer"),
        ([SFT, "seed=null"], "seed", "is null and must be an integer"),
        ([SFT, "overwrite=no"], "overwrite", "must be true or false"),
        ([SFT, "overwrite=2"], "overwrite", "must be true or false"),
        ([SFT, "resume=maybe"], "resume", "There are: `auto`, `false`, `true`"),
        ([SFT, "merge=maybe"], "merge", "must be true or false"),
        ([SFT, "model.trust_remote_code=maybe"], "model.trust_remote_code", "must be true or false"),
        ([SFT, "data.conversational=maybe"], "data.conversational", "must be true or false"),
        ([SFT, "data.max_samples=many"], "data.max_samples", "an integer"),
        ([SFT, "data.max_samples=0"], "data.max_samples", "1 or more"),
        ([SFT, "adapter=lora", "adapter.peft.r=0"], "adapter.peft.r", "1 or more"),
        ([SFT, "adapter=lora", "adapter.peft.lora_alpha=0"], "adapter.peft.lora_alpha", "above 0"),
        ([SFT, "adapter=lora", "adapter.peft.lora_dropout=2"], "adapter.peft.lora_dropout", "below 1"),
        (["stage=dpo", "stage.args.beta=-1"], "stage.args.beta", "above 0"),
        (["stage=dpo", "stage.args.loss_type=[sigmoide]"], "stage.args.loss_type", "`sigmoid`"),
        (["stage=dpo", "stage.args.label_smoothing=0.5"], "stage.args.label_smoothing", "below 0.5"),
        (["stage=kto", "stage.args.desirable_weight=-1"], "stage.args.desirable_weight", "0 or more"),
        (["stage=orpo", "stage.args.beta=-1"], "stage.args.beta", "0 or more"),
        (["stage=reward", "stage.args.center_rewards_coefficient=-1"], "center_rewards_coefficient", "0 or more"),
        (["stage=reward", "stage.args.loss_type=pairwize"], "stage.args.loss_type", "`pairwise`"),
        (["stage=reward", "stage.members=0"], "stage.members", "1 or more"),
        (["stage=ppo", "stage.args.temperature=0"], "stage.args.temperature", "above 0"),
        (["stage=grpo", "stage.args.temperature=-1"], "stage.args.temperature", "above 0"),
        (["stage=rloo", "stage.args.beta=-1"], "stage.args.beta", "0 or more"),
        (["stage=ppo", "stage.args.max_completion_length=0"], "stage.args.max_completion_length", "1 or more"),
        (["stage=ppo", "stage.args.lam=1.5"], "stage.args.lam", "from 0 to 1"),
        (["stage=ppo", "stage.args.critic=haed"], "stage.args.critic", "`head`"),
        (["stage=ppo", "stage.args.kl_estimator=k4"], "stage.args.kl_estimator", "`k1`"),
        (["stage=ppo", "stage.prepare.max_prompt_length=x"], "stage.prepare.max_prompt_length", "an integer"),
        (["stage=ppo", "kl=adaptive", "kl.target=low"], "kl.target", "a number. Set it above 0"),
        (["stage=ppo", "kl.guard=big"], "kl.guard", "a number"),
        (["stage=ppo", "kl.guard=nan"], "kl.guard", "a finite number"),
        (["stage=ppo", "kl.guard_action=stopp"], "kl.guard_action", "`stop`"),
        (["stage=ppo", "health.window=long"], "health.window", "an integer"),
        (["stage=ppo", "reward_norm=reference", "reward_norm.rows=all"], "reward_norm.rows", "an integer"),
        (["stage=ppo", "reward_norm=reference", "reward_norm.std=-1"], "reward_norm.std", "above 0"),
        (["stage=ppo", "reward.gold.weight=nan"], "reward.gold.weight", "a finite number"),
        (["stage=ppo", "reward.gold.weight=much"], "reward.gold.weight", "a number"),
        (["stage=generate", "stage.n=0"], "stage.n", "1 or more"),
        (["stage=generate", "stage.temperature=-1"], "stage.temperature", "0 or more"),
        (["stage=chat", "stage.remember=yes please"], "stage.remember", "true or false"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_values_that_can_not_be_are_named_before_anything_is_imported(
    compose, monkeypatch, tmp_path, overrides, key, words
):
    monkeypatch.chdir(tmp_path)
    found = find_problems(compose(*overrides))
    found = [problem for problem in found if "there is nothing to resume" not in problem]
    assert len(found) == 1 and f"{key}` is " in found[0] and words in found[0], found


def test_classes_refuse_the_same_in_python(tmp_path):
    for options, words in (
        ({"gamma": 2.0}, "`gamma` is 2.0. Set it to a number from 0 to 1"),
        ({"learning_rate": math.inf}, "`learning_rate` is inf. Set it to a finite number"),
        ({"ratio_threshold": 1.0}, "`ratio_threshold` is 1.0. Set it above 1"),
        ({"kl_estimator": "k4"}, "`kl_estimator` is 'k4'"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            PPOConfig(output_dir=str(tmp_path), bf16=False, **options)
    with pytest.raises(ValueError, match="`center_rewards_coefficient` is -1. Set it to 0 or more"):
        RewardConfig(output_dir=str(tmp_path), bf16=False, center_rewards_coefficient=-1)
    for make, words in (
        (lambda: FixedKL(math.nan), "`stage.args.beta` is nan. Set it to a finite number, 0 or more"),
        (lambda: FixedKL(0.1, guard=math.nan), "`kl.guard` is nan"),
        (lambda: AdaptiveKL(0.1, "low"), "`kl.target` is 'low' and must be a number. Set it above 0"),
        (lambda: LinearKL(0.1, math.inf), "`kl.final` is inf"),
        (lambda: RewardNorm(clip=0), "`reward_norm.clip` is 0. Set it above 0"),
        (lambda: ReferenceNorm(rows=1), "`reward_norm.rows` is 1. Set it to 2 or more"),
        (lambda: FunctionReward(len, weight=math.nan, name="x"), "`reward.x.weight` is nan"),
    ):
        with pytest.raises(ConfigError, match=re.escape(words)):
            make()


def test_the_smaller_of_both_budgets_counts(tmp_path, capsys):
    def steps(**budget) -> int:
        sizes = {"per_device_train_batch_size": 4, "steps_per_generation": 2, "num_iterations": 3}
        return PPOConfig(output_dir=str(tmp_path), bf16=False, **sizes, **budget).max_steps

    assert (
        steps(total_episodes=17) == 18 and not capsys.readouterr().out
    )  # 3 rollouts of 8, in 3 epochs of 2 mini-batches
    assert steps(total_episodes=17, max_steps=2) == 2
    assert (
        "`total_episodes=17` is 18 optimizer steps and `max_steps` is 2: the smaller counts" in capsys.readouterr().out
    )
    assert steps(total_episodes=17, max_steps=100) == 18


def test_every_rule_is_of_an_argument_that_there_is(compose):
    for target, rules in RULES.items():
        if arguments(target) is not None:
            assert not rules.keys() - arguments(target).keys(), target
    for rule in [rule for rules in [*RULES.values(), RUN] for rule in rules.values()]:
        problem_of("x", object(), rule)  # each can be read


def test_losses_are_those_of_trl():
    losses = {
        "trl.DPOConfig": re.findall(r'loss_type == "(\w+)"', inspect.getsource(dpo_trainer)),
        "trl.KTOConfig": re.findall(r'self\.loss_type == "(\w+)"', inspect.getsource(kto_trainer)),
        "trl.SFTConfig": ["nll", "dft"],
    }
    assert 'loss_type not in ("nll", "dft")' in inspect.getsource(sft_trainer)
    source = inspect.getsource(trl.GRPOTrainer._compute_loss)
    grpo = re.findall(r'loss_type == "(\w+)"', source)
    grpo += [name for names in re.findall(r"loss_type in \[(.*?)\]", source) for name in re.findall(r"\w+", names)]
    for target, found in {**losses, "trl.GRPOConfig": grpo}.items():
        assert set(RULES[target]["loss_type"].split("|")) == set(found), target


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["stage=ppo", "reward.gold.weight=0"], ["All rewards have weight 0", "`reward.gold.weight=1`"]),
        (["stage=sft", "merge=true"], ["`merge=true`", "`adapter=lora`"]),
        (["stage=sft", "+stage.args.resume_from_checkpoint=x"], ["`resume=true`"]),
        (["stage=sft", "stage.args.output_dir=x"], ["`stage.args.output_dir` is x", "`run_name=...`"]),
        (["stage=sft", "~stage.args.output_dir"], ["`stage.args.output_dir` is not set"]),
        (["stage=sft", "+stage.args.fsdp=full_shard"], ["several processes"]),
        (["stage=sft", "callbacks=3"], ["`callbacks` is 3 and must hold keys"]),
    ],
)
def test_values_that_do_nothing_are_refused(compose, monkeypatch, tmp_path, overrides, parts):
    monkeypatch.chdir(tmp_path)
    found = find_problems(compose(*overrides))
    assert len(found) == 1 and all(part in found[0] for part in parts), found
