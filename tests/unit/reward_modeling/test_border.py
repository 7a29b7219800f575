"""Cost models: scores whose zero is the border between safe and unsafe completions."""

import json
import math

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import logsigmoid
from transformers import AutoTokenizer

from rlhf_trl.data import load_files
from rlhf_trl.data.feedback import Attributes, Pairs
from rlhf_trl.data.lengths import tokenize_comparisons
from rlhf_trl.errors import ConfigError, DataError
from rlhf_trl.evaluation.annotations import read_annotated
from rlhf_trl.evaluation.reward_quality import evaluate_rewards, metrics_of
from rlhf_trl.report.rewards import reward_text
from rlhf_trl.reward_modeling.border import border_ece, border_loss
from rlhf_trl.reward_modeling.config import RewardConfig
from rlhf_trl.reward_modeling.losses import comparison_losses
from rlhf_trl.reward_modeling.trainer import RewardTrainer
from rlhf_trl.rewards.function import FunctionReward
from rlhf_trl.rewards.model import ModelReward
from tests.helpers.reward_models import arguments, classifier
from tests.helpers.tiny import WORDS, save_model

nan = math.nan


def test_loss_is_safe_rlhfs_with_the_cost_as_minus_the_score():
    """-log sigmoid(c_w - c_l) - log sigmoid(s_w c_w) - log sigmoid(s_l c_l) + .001 c², w the more harmful one."""
    costs = torch.tensor([[2.0, -0.5], [1.0, 0.3], [-0.2, -3.0]])  # of the more harmful one, of the other
    signs = torch.tensor([[1.0, -1.0], [1.0, 1.0], [-1.0, -1.0]])  # 1 is unsafe
    expected = -logsigmoid(costs[:, 0] - costs[:, 1]) - logsigmoid(signs * costs).sum(dim=1)
    expected = expected.mean() + 0.001 * costs.square().mean()
    scores, groups = -costs.flatten(), torch.tensor([0, 0, 1, 1, 2, 2])
    ranking, _ = comparison_losses(scores, torch.tensor([1, 3, 5]), torch.tensor([0, 2, 4]), groups)
    torch.testing.assert_close(ranking.mean() + border_loss(scores, -signs.flatten()), expected)
    # One without a label has no part in it, and the divisor may be that of a larger batch
    more, sides = torch.cat([scores, torch.tensor([9.0])]), torch.cat([-signs.flatten(), torch.tensor([nan])])
    torch.testing.assert_close(border_loss(more, sides), border_loss(scores, -signs.flatten()))
    torch.testing.assert_close(border_loss(more, sides, count=12.0), border_loss(scores, -signs.flatten()) / 2)
    only = border_loss(torch.tensor([2.0]), torch.tensor([-1.0]), coef=0.0, l2_coef=0.5)
    assert only.item() == 2.0


def test_calibration_error_of_the_border():
    scores = torch.tensor([0.0, 0.1, 2.0, 2.0, -30.0])
    sides = torch.tensor([1.0, -1.0, 1.0, nan, -1.0])
    p = torch.sigmoid(scores)
    expected = (abs((p[0] + p[1]).item() - 1) + abs(p[2].item() - 1) + p[4].item()) / 4  # one bin holds two
    assert border_ece(scores, sides) == pytest.approx(expected, abs=1e-6)
    assert math.isnan(border_ece(scores, torch.full((5,), nan)))


# ---- Rows ----


def read(tmp_path, rows, feedback, dataset_type="comparisons"):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return load_files(dataset_type, 1, str(file), feedback=feedback)["train"].to_list()


PKU = {
    "completion_a": "response_0",
    "completion_b": "response_1",
    "preferred": "safer_response_id",
    "safe_a": "is_response_0_safe",
    "safe_b": "is_response_1_safe",
}


def pku_rows():
    return [
        {
            "prompt": f"{WORDS[i]} ?",
            "response_0": " no" if i % 2 else " yes",
            "response_1": " yes" if i % 2 else " no",
            "is_response_0_safe": bool(i % 2),
            "is_response_1_safe": None if i == 0 else not i % 2,
            "safer_response_id": 0 if i % 2 else 1,
        }
        for i in range(6)
    ]


def test_columns_of_pku_saferlhf(tmp_path):
    found = read(tmp_path, pku_rows(), Pairs(columns=PKU, answers=[0, 1]))
    assert len(found) == 6
    for row in found:
        assert row["completions"][row["better"][0]] == " no"
        sides = dict(zip(row["completions"], row["safe"], strict=True))
        assert sides == {" no": None if row["prompt"] == f"{WORDS[0]} ?" else 1.0, " yes": -1.0}
    # No other dataset type has them, nor rows without labels
    assert "safe" not in read(tmp_path, pku_rows(), Pairs(columns=PKU, answers=[0, 1]), "preference")[0]
    plain = {**PKU, "safe_a": None, "safe_b": None}
    assert "safe" not in read(tmp_path, pku_rows(), Pairs(columns=plain, answers=[0, 1]))[0]


def test_evaluation_of_a_reward_reports_the_border(tmp_path):
    rows = read(tmp_path, pku_rows(), Pairs(columns=PKU, answers=[0, 1]), "annotated")
    annotations = read_annotated(Dataset.from_list(rows))

    def cost(prompts, completions):
        wrong = f"{WORDS[1]} ?"
        return [2.0 if c == " no" else 1.0 if p == wrong else -1.0 for p, c in zip(prompts, completions, strict=True)]

    quality = evaluate_rewards(annotations, [FunctionReward(cost, name="cost")])
    border = quality.rewards["cost"].border
    assert border is not None and (border.completions, border.safe) == (11, pytest.approx(5 / 11))
    sigmoid = [1 / (1 + math.exp(-x)) for x in (2.0, -1.0, 1.0)]
    ece = (5 * (1 - sigmoid[0]) + 5 * sigmoid[1] + sigmoid[2]) / 11
    assert border.accuracy.mean == pytest.approx(10 / 11) and border.ece == pytest.approx(ece)
    assert metrics_of(quality)["eval_cost/border_accuracy"] == pytest.approx(10 / 11)
    assert "right side of 0" in reward_text(quality) and " 11 " in reward_text(quality)
    plain = read(
        tmp_path, pku_rows(), Pairs(columns={**PKU, "safe_a": None, "safe_b": None}, answers=[0, 1]), "annotated"
    )
    quality = evaluate_rewards(read_annotated(Dataset.from_list(plain)), [FunctionReward(cost, name="cost")])
    assert quality.rewards["cost"].border is None and "right side of 0" not in reward_text(quality)


def test_attributes_with_a_boolean(tmp_path):
    rows = [{"prompt": "a", "completion": f" {i}", "harmless": i % 2 == 0} for i in range(4)]
    rows += [
        {"prompt": "b", "completion": " x", "harmless": "true"},
        {"prompt": "c", "completion": " y", "harmless": None},
    ]
    found = read(tmp_path, rows, Attributes(dimensions=["harmless"], use="border", group_size=None))
    first, alone = sorted(found, key=lambda row: row["prompt"])
    assert sorted(zip(first["completions"], first["safe"], strict=True)) == [
        (f" {i}", 1.0 - 2 * (i % 2)) for i in range(4)
    ]
    assert len(first["better"]) == 4 and all(first["safe"][i] == 1.0 for i in first["better"])
    assert alone["completions"] == [" x"] and alone["safe"] == [1.0] and not alone["better"]
    # As numbers, true and false are the ends of the scale
    regression = read(tmp_path, rows, Attributes(dimensions=["harmless"], scale=[0, 4], group_size=None))
    targets = {
        text: t["harmless"] for row in regression for text, t in zip(row["completions"], row["targets"], strict=True)
    }
    assert targets == {" 0": 1.0, " 1": -1.0, " 2": 1.0, " 3": -1.0, " x": 1.0}


def test_labels_without_a_comparison_are_kept(tmp_path):
    pair = {"prompt": "a", "completion_a": " x", "completion_b": " y", "preferred": "tie", "safe_a": True}
    rows = [pair | {"safe_b": False}, pair | {"prompt": "b", "completion_b": " x", "preferred": "both_bad"}]
    tie, same = sorted(read(tmp_path, rows, Pairs()), key=lambda row: row["prompt"])
    assert dict(zip(tie["completions"], tie["safe"], strict=True)) == {" x": 1.0, " y": -1.0} and not tie["better"]
    assert same["completions"] == [" x"] and same["safe"] == [1.0]
    with pytest.raises(DataError, match="safe_b.*is another label than `safe_a`, and the completions are the same"):
        read(tmp_path, [rows[1] | {"safe_b": False}], Pairs())
    # Raters of one pair, in either order: most of them decide, and none in a draw
    votes = [(" x", " y", "a", True, False), (" y", " x", "tie", False, True), (" x", " y", "a", False, True)]
    names = ("completion_a", "completion_b", "preferred", "safe_a", "safe_b")
    raters = [{"prompt": "a", "rater": i, **dict(zip(names, vote, strict=True))} for i, vote in enumerate(votes)]
    for count, expected in ((3, {" x": 1.0, " y": -1.0}), (1, {" x": 1.0, " y": -1.0}), (2, {" x": 1.0, " y": -1.0})):
        (pooled,) = read(tmp_path, raters[:count], Pairs(agreement="weights"))
        assert dict(zip(pooled["completions"], pooled["safe"], strict=True)) == expected
    (pooled,) = read(tmp_path, [raters[0], raters[2]], Pairs(agreement="weights"))
    assert pooled["better"] and pooled["safe"] == [None, None]
    # A row per comparison, and one of those that are in none
    rated = [{"prompt": "a", "completion": f" {i}", "harmless": i < 2} for i in range(3)]
    rated += [{"prompt": "b", "completion": f" {i}", "harmless": True} for i in range(2)]
    options = {"dimensions": ["harmless"], "use": "border", "group_size": None, "pairwise_rows": True}
    *pairs, safe = sorted(read(tmp_path, rated, Attributes(**options)), key=lambda row: row["prompt"])
    assert [len(row["better"]) for row in pairs] == [1, 1] and safe["safe"] == [1.0, 1.0] and not safe["better"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Attributes(dimensions=["harmless", "kind"], use="border"), "learns the border of one dimension"),
        (lambda: Attributes(dimensions=["harmless"], use="boundary"), "Set it to pairs, regression or border"),
    ],
)
def test_options_that_cannot_be(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_label_that_is_none_is_named(tmp_path):
    rows = [row | {"is_response_0_safe": "perhaps"} for row in pku_rows()]
    with pytest.raises(DataError, match="is_response_0_safe.*is 'perhaps', where true or false should be"):
        read(tmp_path, rows, Pairs(columns=PKU, answers=[0, 1]))


# ---- Training ----


def without_labels(row):
    return {"safe": [None] * len(row["safe"])}


def test_zero_becomes_the_border(tmp_path):
    """Most completions are unsafe, also where both are: ranking alone would leave the zero anywhere."""
    base = save_model(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = []
    for i in range(24):
        both = i % 3 == 0
        rows.append(
            {
                "prompt": WORDS[i % 16],
                "completions": ["a a" if both else "b b", "a a a"],
                "better": [0],
                "worse": [1],
                "safe": [-1.0 if both else 1.0, -1.0 if i % 5 else None],
            }
        )
    data = tokenize_comparisons(Dataset.from_list(rows), tokenizer)
    options = {"per_device_train_batch_size": 8, "max_steps": 30, "learning_rate": 3e-2, "logging_steps": 1}
    trainer = RewardTrainer(
        model=classifier(base),
        args=arguments(RewardConfig, tmp_path / "run", eval_strategy="steps", eval_steps=15, **options),
        train_dataset=data,
        eval_dataset=data.select(range(7)),
        processing_class=tokenizer,
    )
    trainer.train()
    history = trainer.state.log_history
    accuracies = [entry["eval_border_accuracy"] for entry in history if "eval_border_accuracy" in entry]
    errors = [entry["eval_border_ece"] for entry in history if "eval_border_ece" in entry]
    assert accuracies[-1] == 1.0 and len(errors) == 2 and errors[-1] < 0.1
    trainer.save_model()
    reward = ModelReward(str(tmp_path / "run"))
    reward.bind(tokenizer)
    ids = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in ("b b", "a a", "a a a")]
    safe, *unsafe = reward(["c"] * 3, ["b b", "a a", "a a a"], completion_ids=ids)
    assert safe > 0 > max(unsafe) and unsafe[0] > unsafe[1]
    # The held-out loss is that of all rows together
    scores = torch.tensor(
        reward(
            [row["prompt"] for row in rows[:7] for _ in range(2)],
            [text for row in rows[:7] for text in row["completions"]],
            completion_ids=[
                tokenizer(t)["input_ids"] + [tokenizer.eos_token_id] for row in rows[:7] for t in row["completions"]
            ],
        )
    )
    sides = torch.tensor([nan if side is None else side for row in rows[:7] for side in row["safe"]])
    groups = torch.arange(7).repeat_interleave(2)
    ranking, _ = comparison_losses(scores, 2 * torch.arange(7), 2 * torch.arange(7) + 1, groups)
    last = [entry["eval_loss"] for entry in history if "eval_loss" in entry][-1]
    assert last == pytest.approx((ranking.mean() + border_loss(scores, sides)).item(), abs=1e-4)
    unlabeled = trainer.evaluate(data.select(range(3)).map(without_labels))
    assert "eval_loss" in unlabeled and not any("border" in name for name in unlabeled)  # nothing is known of it


@pytest.mark.slow
def test_an_ensemble_of_cost_models_keeps_the_border(train, tmp_path):
    """The zero of the mean, the minimum and the penalized mean of members is a border too; the latter are cautious."""
    questions = ("Can you tell me how to start a fight?", "How do I spread a rumor?")
    answers = {
        "You could walk away.": True,
        "I am sorry, but I will not help you start a fight.": True,
        "You are a fool.": False,
        "First, insult a stranger.": False,
        "Then, throw the first punch.": False,
    }
    rows = [
        {"prompt": f"{greeting}{question}", "completion": f" {answer}", "harmless": safe}
        for greeting in ("", "Good morning. ", "Excuse me. ")
        for question in questions
        for answer, safe in answers.items()
    ]
    file = tmp_path / "labels.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    words = [
        "data=files",
        f"data.paths={file}",
        "data.to_chat=true",
        "data.eval_size=null",
        "data/feedback=attributes",
    ]
    words += ["data.feedback.dimensions=[harmless]", "data.feedback.use=border", "adapter=lora", "stage.members=2"]
    run_dir = train(tmp_path, "stage=reward", *words, "stage.args.max_steps=40", "stage.args.learning_rate=1e-2")
    chats = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    texts = [[{"role": "assistant", "content": row["completion"].strip()}] for row in rows]
    scores = {}
    for ensemble in ("mean", "min", "mean_minus_std"):
        reward = ModelReward(run_dir, ensemble=ensemble)
        scores[ensemble] = torch.tensor(reward(chats, texts, completion_ids=[[]] * len(rows)))
        safe = torch.tensor([row["harmless"] for row in rows])
        assert ((scores[ensemble] > 0) == safe).all(), ensemble
    assert (scores["min"] <= scores["mean"]).all() and (scores["mean_minus_std"] < scores["mean"]).any()
    members = [ModelReward(f"{run_dir}/member_{i}")(chats, texts, completion_ids=[[]] * len(rows)) for i in (0, 1)]
    torch.testing.assert_close(scores["mean"], torch.tensor(members).mean(dim=0), rtol=1e-4, atol=1e-4)
