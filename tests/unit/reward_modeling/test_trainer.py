"""Trainer of reward models: rankings, ratings, several heads, calibration, and the stage `reward`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from hydra.utils import instantiate
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

from rlhf_trl.data.lengths import tokenize_comparisons
from rlhf_trl.errors import ConfigError
from rlhf_trl.models.heads import score_heads
from rlhf_trl.models.loading import load_reward_model
from rlhf_trl.models.merging import merge_adapter
from rlhf_trl.reward_modeling.collator import ComparisonCollator
from rlhf_trl.reward_modeling.config import RewardConfig
from rlhf_trl.reward_modeling.losses import ranking_loss
from rlhf_trl.reward_modeling.trainer import RewardTrainer
from rlhf_trl.rewards.model import ModelReward
from tests.helpers.reward_models import arguments, classifier, rankings
from tests.helpers.tiny import WORDS, make_tokenizer, save_model

# ---- The trainer ----


PAIRS = [
    {"prompt": "a b", "chosen": "i j k", "rejected": "p"},
    {"prompt": "c", "chosen": "l", "rejected": "o n m"},
    {"prompt": "d e f g", "chosen": "m n", "rejected": "l"},
    {"prompt": "h", "chosen": "o p a b c d", "rejected": "k j"},
]


@pytest.mark.parametrize("margin", [False, True], ids=["plain", "margin"])
def test_pairs_have_the_losses_and_steps_of_trls_trainer(tmp_path, margin):
    base = save_model(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = [{**row, "margin": float(i)} if margin else row for i, row in enumerate(PAIRS)]
    ours = tokenize_comparisons(Dataset.from_list(rows), tokenizer)
    theirs = Dataset.from_list(
        [
            {"chosen_ids": ids[0], "rejected_ids": ids[1], **({"margin": float(i)} if margin else {})}
            for i, ids in enumerate(ours["completion_ids"])
        ]
    )
    options = {"per_device_train_batch_size": 2, "num_train_epochs": 3, "logging_steps": 1, "learning_rate": 1e-2}
    options |= {"eval_strategy": "epoch", "center_rewards_coefficient": 0.01}
    histories = []
    for trainer_class, config, dataset in (
        (RewardTrainer, RewardConfig, ours),
        (trl.RewardTrainer, trl.RewardConfig, theirs),
    ):
        trainer = trainer_class(
            model=classifier(base),
            args=arguments(config, tmp_path / trainer_class.__module__, **options),
            train_dataset=dataset,
            eval_dataset=dataset,
            processing_class=tokenizer,
        )
        trainer.train()
        histories.append(trainer.state.log_history)
    names = ("loss", "eval_loss", "accuracy", "margin", "mean_reward", "grad_norm", "eval_accuracy", "num_tokens")
    for i, (mine, trls) in enumerate(zip(*histories, strict=True)):
        # The completions stand in another order in the batch: from the second step on rounding has gone through Adam
        tolerance = {"abs": 1e-6, "rel": 1e-6} if i == 0 else {"abs": 1e-3, "rel": 1e-3}
        known = [name for name in names if name in trls]
        assert {name: mine[name] for name in known} == pytest.approx({name: trls[name] for name in known}, **tolerance)


def uneven_rows(kind: str) -> Dataset:
    """Seven prompts of one to four completions: comparisons, or ratings of which some are missing, or both."""
    rows = []
    for i in range(7):
        texts = [" ".join(WORDS[(3 * i + j + n) % 16] for n in range(1 + j)) for j in range(1 + i % 4)]
        row = {"prompt": WORDS[i], "completions": texts, "better": [0] * (i % 4), "worse": list(range(1, 1 + i % 4))}
        if kind != "comparisons":
            row["targets"] = [{"score": None if (i + j) % 3 == 0 else float(i - j)} for j in range(len(texts))]
        if kind == "targets":
            row |= {"better": [], "worse": []}
        rows.append(row)
    return Dataset.from_list(rows)


@pytest.mark.parametrize("kind", ["comparisons", "targets", "both"])
def test_gradients_do_not_depend_on_accumulation(tmp_path, kind):
    base = save_model(tmp_path / "base")
    found, logged = {}, {}
    for accumulation in (1, 2, 4):
        options = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
        options |= {"max_steps": 1, "max_grad_norm": 1e9, "logging_steps": 1, "center_rewards_coefficient": 0.1}
        trainer = RewardTrainer(
            model=classifier(base),
            args=arguments(RewardConfig, tmp_path / str(accumulation), **options),
            train_dataset=uneven_rows(kind),
            processing_class=AutoTokenizer.from_pretrained(base),
        )
        gradients = found[accumulation] = {}

        class Keep(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, model=None, gradients=gradients, **kwargs):
                gradients |= {name: each.grad.clone() for name, each in model.named_parameters()}

        trainer.add_callback(Keep())
        trainer.train()
        logged[accumulation] = trainer.state.log_history[0]["loss"]
    assert max(each.abs().max() for each in found[1].values()) > 0.1
    for accumulation in (2, 4):
        for name, each in found[1].items():
            torch.testing.assert_close(found[accumulation][name], each, atol=1e-6, rtol=1e-5)
        assert logged[accumulation] == pytest.approx(logged[1], rel=1e-5)


def test_each_completion_of_a_ranking_is_scored_once(tmp_path):
    base = save_model(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    trainer = RewardTrainer(
        model=classifier(base),
        args=arguments(RewardConfig, tmp_path / "out", per_device_train_batch_size=3, loss_type="plackett_luce"),
        train_dataset=rankings(6),
        processing_class=tokenizer,
    )
    seen = []
    trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    batch = next(iter(trainer.get_train_dataloader()))
    value = trainer.compute_loss(trainer.model, dict(batch))
    assert seen == [
        (12, int(batch["attention_mask"].sum(1).max()))
    ]  # three prompts of four; no column is padding alone
    scores = trainer.model(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits[:, 0]
    lengths = batch["attention_mask"].sum(1)  # more words are better
    expected = ranking_loss(scores, -lengths, batch["groups"], loss_type="plackett_luce")
    assert value.item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("loss_type", ["pairwise", "plackett_luce"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_trainer_learns_rankings_and_saves_their_calibration(tmp_path, loss_type, lora):
    base = save_model(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    options = {"per_device_train_batch_size": 8, "max_steps": 25, "learning_rate": 1e-2, "loss_type": loss_type}
    peft = LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS") if lora else None
    trainer = RewardTrainer(
        model=classifier(base),
        args=arguments(RewardConfig, tmp_path / "out", **options, head_init="normal"),
        train_dataset=rankings(64),
        eval_dataset=rankings(16),
        processing_class=tokenizer,
        peft_config=peft,
    )
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    assert trainer.evaluate()["eval_accuracy"] > max(0.9, before)
    trainer.save_model(str(tmp_path / "rm"))
    calibration = json.loads((tmp_path / "rm/calibration.json").read_text())
    reward = ModelReward(str(tmp_path / "rm"))
    rows = tokenize_comparisons(rankings(16), tokenizer)["completion_ids"]
    scores = torch.tensor(reward.score_ids([ids for row in rows for ids in row]))
    assert calibration["n"] == 64 and calibration["on"] == "all completions of eval"
    assert calibration["mean"] == pytest.approx(scores.mean().item(), abs=1e-4)
    assert calibration["std"] == pytest.approx(scores.std().item(), abs=1e-4)
    if lora:
        merge_adapter(str(tmp_path / "rm"), str(tmp_path / "merged"))
        assert json.loads((tmp_path / "merged/calibration.json").read_text()) == calibration


def test_calibration_on_best_is_of_completions_that_none_beats(tmp_path):
    base = save_model(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    trainer = RewardTrainer(
        model=classifier(base),
        args=arguments(RewardConfig, tmp_path / "out", calibrate_on="best"),
        train_dataset=rankings(10),
        processing_class=tokenizer,
    )
    calibration = trainer.calibrate().to_json()
    best = [max(row["completion_ids"], key=len) for row in trainer.train_dataset]
    collate = ComparisonCollator(tokenizer.pad_token_id)
    batch = collate([{"completion_ids": best}])
    with torch.no_grad():
        scores = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    assert (calibration["n"], calibration["on"]) == (10, "best completions of train")
    assert calibration["mean"] == pytest.approx(scores.mean().item(), abs=1e-5)


def attributes(count: int) -> Dataset:
    """Two heads: `long` grows with the completion, `early` falls with its first letter; every third one is missing."""
    rows = []
    for i in range(count):
        texts = [" ".join(WORDS[(i * 3 + j) % 16] for _ in range(1 + (i + j) % 4)) for j in range(2)]
        targets = [
            {
                "long": None if (i + j) % 3 == 0 else (len(text.split()) - 2.5) / 1.5,
                "early": None if (i + j) % 3 == 1 else 1 - WORDS.index(text[0]) / 7.5,
            }
            for j, text in enumerate(texts)
        ]
        rows.append({"prompt": WORDS[i % 16], "completions": texts, "targets": targets})
    return Dataset.from_list(rows)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_heads_learn_their_attribute_and_are_weighted_at_use(tmp_path, lora):
    base = save_model(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    peft = LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS") if lora else None
    trainer = RewardTrainer(
        model=classifier(base, heads=("long", "early")),
        args=arguments(
            RewardConfig, tmp_path / "out", per_device_train_batch_size=16, max_steps=60, learning_rate=1e-2
        ),
        train_dataset=attributes(96),
        eval_dataset=attributes(24),
        processing_class=tokenizer,
        peft_config=peft,
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    for name in ("eval_mse", "eval_mse_long", "eval_mse_early"):
        assert after[name] < 0.6 * before[name]
    assert after["eval_accuracy_long"] > 0.8 and {"eval_accuracy", "eval_accuracy_early"} <= after.keys()
    path = str(tmp_path / "rm")
    trainer.save_model(path)
    calibration = json.loads(Path(path, "calibration.json").read_text())
    assert calibration["heads"] == ["long", "early"] and len(calibration["mean"]) == len(calibration["std"]) == 2

    with pytest.raises(ConfigError, match="heads `long`, `early`.*reward.reward_model.head_weights={long: 1.0}"):
        ModelReward(path)
    with pytest.raises(ConfigError, match="names `short`, and the heads of .* are `long`, `early`"):
        ModelReward(path, head_weights={"short": 1})
    rows = [ids for row in trainer.eval_dataset["completion_ids"] for ids in row]
    long, early, both = (
        torch.tensor(ModelReward(path, head_weights=weights).score_ids(rows))
        for weights in ({"long": 1}, {"early": 1}, {"long": 2, "early": -0.5})
    )
    assert torch.allclose(both, 2 * long - 0.5 * early, atol=1e-5)
    assert long.mean().item() == pytest.approx(calibration["mean"][0], abs=1e-3)
    assert not torch.allclose(long, early, atol=1e-2)
    of_both = ModelReward(path, head_weights={"long": 2, "early": -0.5}).calibration
    assert of_both.mean == pytest.approx(both.mean().item(), abs=1e-3)
    assert of_both.std == pytest.approx(both.std().item(), abs=1e-3)


def test_head_init_has_the_papers_std(tmp_path):
    base = save_model(tmp_path / "base", hidden_size=256)
    drawn = []
    for seed in (1, 1, 2):
        trainer = RewardTrainer(
            model=classifier(base, heads=[f"h{i}" for i in range(8)]),
            args=arguments(RewardConfig, tmp_path / "out", head_init="normal", seed=seed),
            train_dataset=Dataset.from_list(
                [{"prompt": "a", "completions": ["b"], "targets": [{f"h{i}": 0.0 for i in range(8)}]}]
            ),
            processing_class=make_tokenizer(),
        )
        (head,) = score_heads(trainer.model)
        drawn.append(head.weight.detach().clone())
    assert drawn[0].std().item() == pytest.approx(257**-0.5, rel=0.05)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_reward_model_with_other_heads_than_the_data_is_an_error(tmp_path):
    base = save_model(tmp_path / "base")
    model = classifier(base, heads=("long", "early"))
    with pytest.raises(ConfigError, match="2 heads, and the data has targets for 1"):
        RewardTrainer(model, arguments(RewardConfig, tmp_path), rankings(2), processing_class=make_tokenizer())
    model.save_pretrained(tmp_path / "saved")
    assert list(load_reward_model(str(tmp_path / "saved")).config.id2label.values()) == ["long", "early"]
    with pytest.raises(ConfigError, match="gives 2 scores per completion, and the data is for 1"):
        classifier(str(tmp_path / "saved"))
    assert classifier(str(tmp_path / "saved"), heads=("long", "early")).config.num_labels == 2
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")  # the names are in the config
    assert plain.config.id2label == {0: "long", 1: "early"}


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("loss_type", "listwise", "Did you mean `pairwise`"),
        ("head_init", "zero", "There are: `normal`"),
        ("label_smoothing", 0.5, "from 0 to below 0.5"),
        ("calibrate_on", "worst", "There are: `all`, `best`"),
    ],
)
def test_invalid_arguments_are_named(tmp_path, option, value, message):
    with pytest.raises(ValueError, match=f"`{option}` is .*{message}"):
        arguments(RewardConfig, tmp_path, **{option: value})


SCRIPT = """
import json
import pathlib
import sys
from transformers import AutoTokenizer
from rlhf_trl.reward_modeling import RewardConfig, RewardTrainer
from tests.helpers.reward_models import arguments, classifier, rankings
base, out, ranks = sys.argv[1], pathlib.Path(sys.argv[2]), int(sys.argv[3])
trainer = RewardTrainer(
    model=classifier(base),
    args=arguments(
        RewardConfig, out, per_device_train_batch_size=8 // ranks, per_device_eval_batch_size=8 // ranks,
        max_steps=6, logging_steps=1, learning_rate=1e-3,
    ),
    train_dataset=rankings(64),
    eval_dataset=rankings(16),
    processing_class=AutoTokenizer.from_pretrained(base),
)
assert trainer.accelerator.num_processes == ranks
trainer.train()
trainer.evaluate()
trainer.save_model(str(out))
if trainer.accelerator.is_main_process:
    pathlib.Path(out, "log.json").write_text(json.dumps(trainer.state.log_history))
"""


@pytest.mark.slow
def test_two_ranks_give_the_numbers_of_one(tmp_path):
    base = save_model(tmp_path / "base")
    (tmp_path / "script.py").write_text(SCRIPT)
    root = Path(__file__).parents[3]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": ""}
    logs, calibrations = {}, {}
    for ranks in (1, 2):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        launch = launch if ranks == 2 else [sys.executable]
        out = tmp_path / str(ranks)
        arguments = [str(tmp_path / "script.py"), base, str(out), str(ranks)]
        done = subprocess.run([*launch, *arguments], cwd=root, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        logs[ranks] = json.loads((out / "log.json").read_text())
        calibrations[ranks] = json.loads((out / "calibration.json").read_text())
    assert calibrations[2] == {
        **calibrations[1],
        **{name: pytest.approx(calibrations[1][name], abs=1e-4) for name in ("mean", "std")},
    }
    for key in ("loss", "accuracy", "margin", "num_tokens", "eval_loss", "eval_accuracy", "eval_margin"):
        one, two = ([entry[key] for entry in logs[ranks] if key in entry] for ranks in (1, 2))
        assert one and two == pytest.approx(one, abs=1e-4), key


# ---- The stage, on the embedded world's feedback ----


@pytest.mark.parametrize(
    ("feedback", "rows"),
    [("pairs", 600), ("rankings", 300), ("ratings", 1000), ("edits", 400), ("thumbs", 1000), ("attributes", 600)],
)
def test_reward_stage_learns_from_every_kind_of_feedback(train, tmp_path, feedback, rows):
    options = [f"data.max_samples={rows}", "data.max_eval_samples=128", "stage.args.max_steps=16"]
    options += ["stage.args.per_device_train_batch_size=16", "stage.args.learning_rate=1e-3"]
    run_dir = train(tmp_path, "stage=reward", f"data/feedback={feedback}", *options, "stage.args.eval_strategy='no'")
    history = json.loads(Path(run_dir, "metrics.json").read_text())["history"]
    first, last = (next(entry for entry in order if "eval_loss" in entry) for order in (history, history[::-1]))
    assert last["eval_loss"] < first["eval_loss"]
    if feedback != "attributes":
        assert last["eval_accuracy"] > first["eval_accuracy"]
    assert json.loads(Path(run_dir, "calibration.json").read_text()).keys() >= {"mean", "std", "n", "on"}


def test_feedback_of_the_embedded_world_has_the_options_of_any_other(compose):
    words = ["stage=reward", "data/feedback=rankings", "data.max_samples=8", "data.max_eval_samples=8"]
    cfg = compose(*words, "data.feedback.margin=0.5", "data.feedback.pairwise_rows=true")
    rows = instantiate(cfg.data)(dataset_type=cfg.stage.dataset_type, seed=1)["train"]
    assert all(len(row["completions"]) == 2 and len(row["margin"]) == 1 and row["margin"][0] >= 0.5 for row in rows)
