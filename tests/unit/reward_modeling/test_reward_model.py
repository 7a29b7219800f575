"""The ranking losses against published numbers, and the trainer for rankings, ratings and several heads."""

import json
import math
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
from rlhf_trl.models.initial import load_initial_model
from rlhf_trl.models.loading import load_reward_model
from rlhf_trl.models.merging import merge_adapter
from rlhf_trl.reward_modeling.collator import ComparisonCollator
from rlhf_trl.reward_modeling.config import RewardConfig
from rlhf_trl.reward_modeling.losses import comparison_losses, ranking_loss, regression_loss
from rlhf_trl.reward_modeling.trainer import RewardTrainer
from rlhf_trl.rewards.model import ModelReward
from tests.helpers.tiny import make_tokenizer, save_model

FOUR = [2.0, 1.0, 0.5, -1.0]
WORDS = "abcdefghijklmnop"


def loss(scores, ranks, groups=None, **options) -> float:
    groups = [0] * len(scores) if groups is None else groups
    return ranking_loss(
        torch.tensor(scores, dtype=torch.float64), torch.tensor(ranks), torch.tensor(groups), **options
    ).item()


# ---- The losses ----


@pytest.mark.parametrize(
    ("margin", "expected"),
    [
        (None, 0.31326168751822286),
        (1 / 3, 0.41437008685),
        (2 / 3, 0.54030557469),
        (1.0, 0.69314718056),
        (2.0, 1.31326168752),
        (3.0, 2.12692801104),
    ],
)
@pytest.mark.parametrize("kind", ["pairwise", "plackett_luce"])
def test_a_pair_with_a_margin(kind, margin, expected):
    assert loss([0.5, 1.5], [2, 1], loss_type=kind, margin=margin) == pytest.approx(expected, abs=1e-6)
    if margin is not None:
        by_prompt, by_completion = torch.tensor([margin]).double(), torch.tensor([-margin, 0.0]).double()
        for tensor in (by_prompt, by_completion):
            assert loss([0.5, 1.5], [2, 1], loss_type=kind, margin=tensor) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 0, 3, 1)])
def test_a_ranking_of_four(order):
    scores, ranks = [FOUR[i] for i in order], [i + 1 for i in order]
    assert loss(scores, ranks) == pytest.approx(0.22761343171342482, abs=1e-9)
    assert loss(scores, ranks, loss_type="plackett_luce") == pytest.approx(1.251552095710599, abs=1e-9)


def test_prompts_count_alike_whatever_their_number_of_pairs():
    both = loss([*FOUR, 1.5, 0.5], [1, 2, 3, 4, 1, 2], [7, 7, 7, 7, 3, 3])
    assert both == pytest.approx((0.22761343171342482 + 0.31326168751822286) / 2, abs=1e-9)
    mixed = loss([1.5, *FOUR, 0.5], [1, 1, 2, 3, 4, 2], [3, 7, 7, 7, 7, 3])
    assert mixed == pytest.approx(both, abs=1e-12)
    alone = loss([*FOUR, 9.0], [1, 2, 3, 4, 1], [0, 0, 0, 0, 1])  # a prompt with nothing to compare doesn't count
    assert alone == pytest.approx(0.22761343171342482, abs=1e-9)


@pytest.mark.parametrize("kind", ["pairwise", "plackett_luce"])
def test_ties_are_not_compared(kind):
    scores = torch.tensor([1.5, 3.0, 0.5], requires_grad=True)
    value = ranking_loss(scores, torch.tensor([1, 1, 2]), torch.zeros(3, dtype=torch.long), kind)
    lone = [math.log1p(math.exp(-1.0)), math.log1p(math.exp(-2.5))]
    assert value.item() == pytest.approx(sum(lone) / (2 if kind == "pairwise" else 1), abs=1e-6)
    tied = ranking_loss(scores, torch.ones(3), torch.zeros(3, dtype=torch.long), kind)
    tied.backward()
    assert tied.item() == 0.0 and scores.grad.tolist() == [0.0, 0.0, 0.0]


def test_smoothing_turns_comparisons_round():
    right, wrong = 0.31326168751822286, 1.3132616875182228
    for kind in ("pairwise", "plackett_luce"):
        smooth = loss([1.5, 0.5], [1, 2], loss_type=kind, label_smoothing=0.1)
        assert smooth == pytest.approx(0.9 * right + 0.1 * wrong, abs=1e-9)
    turned = loss(FOUR, [4, 3, 2, 1], loss_type="plackett_luce")
    smooth = loss(FOUR, [1, 2, 3, 4], loss_type="plackett_luce", label_smoothing=0.2)
    assert smooth == pytest.approx(0.8 * 1.251552095710599 + 0.2 * turned, abs=1e-9)


def test_centering_is_of_each_pairs_sum():
    plain, centered = loss([1.5, 0.5], [1, 2]), loss([1.5, 0.5], [1, 2], center=0.01)
    assert centered - plain == pytest.approx(0.01 * 4.0, abs=1e-12)
    sums = [(a + b) ** 2 for i, a in enumerate(FOUR) for b in FOUR[i + 1 :]]
    assert loss(FOUR, [1, 2, 3, 4], center=0.1) - loss(FOUR, [1, 2, 3, 4]) == pytest.approx(0.1 * sum(sums) / 6)


def test_weights_and_margins_are_of_single_comparisons():
    scores, groups = torch.tensor(FOUR).double(), torch.tensor([0, 0, 1, 1])
    better, worse = torch.tensor([0, 2]), torch.tensor([1, 3])
    weights, margin = torch.tensor([0.5, 2.0]), torch.tensor([0.0, 1.0])
    losses, compared = comparison_losses(scores, better, worse, groups, weights=weights, margin=margin)
    assert losses.tolist() == pytest.approx([0.5 * math.log1p(math.exp(-1)), 2 * math.log1p(math.exp(-0.5))])
    assert compared.tolist() == [True, True]


def test_shapes_and_kinds_that_do_not_fit_are_refused():
    two, three = torch.zeros(2), torch.zeros(3)
    with pytest.raises(ValueError, match="1-D and of one length"):
        ranking_loss(two, three, two.long())
    with pytest.raises(ValueError, match="one entry per prompt or one per completion"):
        ranking_loss(two, torch.tensor([1, 2]), two.long(), margin=three)
    with pytest.raises(ValueError, match="pairwise, plackett_luce"):
        ranking_loss(two, two, two.long(), loss_type="listwise")


def test_missing_targets_have_no_loss_and_no_gradient():
    scores = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    value = regression_loss(scores, torch.tensor([[0.0, torch.nan], [torch.nan, 2.0]]))
    value.backward()
    assert value.item() == (1.0 + 4.0) / 2 and scores.grad.tolist() == [[1.0, 0.0], [0.0, 2.0]]


# ---- The trainer ----


def comparisons(rows) -> Dataset:
    return Dataset.from_list(rows)


PAIRS = [
    {"prompt": "a b", "chosen": "i j k", "rejected": "p"},
    {"prompt": "c", "chosen": "l", "rejected": "o n m"},
    {"prompt": "d e f g", "chosen": "m n", "rejected": "l"},
    {"prompt": "h", "chosen": "o p a b c d", "rejected": "k j"},
]


def arguments(cls, folder, **options):
    common = {"report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True, "save_strategy": "no"}
    return cls(str(folder), **(common | options))


def classifier(path, heads=("score",), seed=0):
    torch.manual_seed(seed)
    return load_initial_model(path, "SEQ_CLS", None, merge_dir=f"{path}/start", heads=heads, dtype="float32")[0]


@pytest.mark.parametrize("margin", [False, True], ids=["plain", "margin"])
def test_pairs_have_the_losses_and_steps_of_trls_own_trainer(tmp_path, margin):
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


def rankings(count: int, k: int = 4) -> Dataset:
    """Completions of 1 to `k` words, the more the better."""
    rows = []
    for i in range(count):
        order = [(i * 5 + j * 3) % k for j in range(k)] if k == 4 else list(range(k))
        texts = [" ".join(WORDS[(i + j) % 16] for j in range(n + 1)) for n in order]
        pairs = [(a, b) for a in range(k) for b in range(k) if order[a] > order[b]]
        better, worse = map(list, zip(*pairs, strict=True))
        rows.append({"prompt": WORDS[i % 16], "completions": texts, "better": better, "worse": worse})
    return Dataset.from_list(rows)


def test_a_ranking_goes_through_the_model_once(tmp_path):
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
def test_it_learns_rankings_and_calibrates_what_it_saves(tmp_path, loss_type, lora):
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


def test_calibration_on_the_best_is_of_what_nothing_beats(tmp_path):
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
def test_heads_learn_their_dimension_and_the_weights_are_chosen_at_use(tmp_path, lora):
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


def test_head_init_is_the_papers(tmp_path):
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


def test_a_reward_model_with_other_heads_than_the_data_is_refused(tmp_path):
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
def test_arguments_that_can_not_be_are_named(tmp_path, option, value, message):
    with pytest.raises(ValueError, match=f"`{option}` is .*{message}"):
        arguments(RewardConfig, tmp_path, **{option: value})


SCRIPT = """
import json
import pathlib
import sys
from tests.unit.reward_modeling.test_reward_model import *
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
def test_the_reward_stage_learns_from_every_form(train, tmp_path, feedback, rows):
    options = [f"data.max_samples={rows}", "data.max_eval_samples=128", "stage.args.max_steps=16"]
    options += ["stage.args.per_device_train_batch_size=16", "stage.args.learning_rate=1e-3"]
    run_dir = train(tmp_path, "stage=reward", f"data/feedback={feedback}", *options, "stage.args.eval_strategy='no'")
    history = json.loads(Path(run_dir, "metrics.json").read_text())["history"]
    first, last = (next(entry for entry in order if "eval_loss" in entry) for order in (history, history[::-1]))
    assert last["eval_loss"] < first["eval_loss"]
    if feedback != "attributes":
        assert last["eval_accuracy"] > first["eval_accuracy"]
    assert json.loads(Path(run_dir, "calibration.json").read_text()).keys() >= {"mean", "std", "n", "on"}


def test_data_of_one_form_are_configured_like_any_other(compose):
    words = ["stage=reward", "data/feedback=rankings", "data.max_samples=8", "data.max_eval_samples=8"]
    cfg = compose(*words, "data.feedback.margin=0.5", "data.feedback.pairwise_rows=true")
    rows = instantiate(cfg.data)(dataset_type=cfg.stage.dataset_type, seed=1)["train"]
    assert all(len(row["completions"]) == 2 and len(row["margin"]) == 1 and row["margin"][0] >= 0.5 for row in rows)
