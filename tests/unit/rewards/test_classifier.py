"""Rewards from text classifiers, encoders and decoders, made from their configs."""

import pytest
import torch
import transformers
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from transformers import pipeline

from rlhf_trl.build import reward_functions, training_arguments
from rlhf_trl.checks import find_problems
from rlhf_trl.checks.memory import estimate
from rlhf_trl.cli.dry_run import show_plan
from rlhf_trl.errors import ConfigError
from rlhf_trl.models.tokenizers import load_tokenizer
from rlhf_trl.rewards import ClassifierReward
from rlhf_trl.rewards.classifier import readable_tokens
from rlhf_trl.runs.paths import find_policy
from tests.helpers.tiny import make_tokenizer, save_model

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TWO = {"id2label": {0: "NEGATIVE", 1: "POSITIVE"}, "label2id": {"NEGATIVE": 0, "POSITIVE": 1}}
COMMON = {"vocab_size": 21, "pad_token_id": 0, "initializer_range": 0.5}
CONFIGS = {
    "bert": lambda **given: transformers.BertConfig(**COMMON, **SIZES, max_position_embeddings=24, **given),
    "roberta": lambda **given: transformers.RobertaConfig(
        **COMMON, **SIZES, max_position_embeddings=25, bos_token_id=1, eos_token_id=1, **given
    ),
    "distilbert": lambda **given: transformers.DistilBertConfig(
        **COMMON, dim=16, hidden_dim=32, n_layers=2, n_heads=2, max_position_embeddings=24, **given
    ),
    "deberta-v2": lambda **given: transformers.DebertaV2Config(
        **COMMON, **SIZES, max_position_embeddings=24, **given
    ),
    "modernbert": lambda **given: transformers.ModernBertConfig(
        **COMMON, **SIZES, max_position_embeddings=24, bos_token_id=1, eos_token_id=1, cls_token_id=1, sep_token_id=1,
        **given,
    ),
    "llama": lambda **given: transformers.LlamaConfig(
        **COMMON, **SIZES, max_position_embeddings=24, bos_token_id=1, eos_token_id=1, **given
    ),
}  # fmt: skip
PROMPTS = ["a b", "c", "d e f"]
COMPLETIONS = [" g h", " i", " j k l m"]


def save_classifier(path, kind: str = "bert", **given) -> str:
    """Write a randomly initialized classifier and its tokenizer, which sets special tokens around texts."""
    torch.manual_seed(0)
    config = CONFIGS[kind](**given or TWO)
    transformers.AutoModelForSequenceClassification.from_config(config).eval().save_pretrained(path)
    tokenizer = make_tokenizer()
    if kind != "llama":
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<user> $A <eos>", pair="<user> $A <eos> $B <eos>", special_tokens=[("<user>", 3), ("<eos>", 1)]
        )
    tokenizer.save_pretrained(path)  # padding on the left, as a policy's
    return str(path)


def scored(reward, prompts=PROMPTS, completions=COMPLETIONS, **given):
    return reward(prompts=prompts, completions=completions, completion_ids=[[]] * len(prompts), **given)


@pytest.mark.parametrize("kind", CONFIGS)
def test_scores_are_those_of_the_pipeline_of_transformers(tmp_path, kind):
    path = save_classifier(tmp_path, kind)
    classify = pipeline("text-classification", path, device="cpu", top_k=None)
    wanted = [
        next(each["score"] for each in labels if each["label"] == "POSITIVE")
        for labels in classify(COMPLETIONS, function_to_apply="softmax")
    ]
    assert max(wanted) - min(wanted) > 1e-3
    reward = ClassifierReward(path, "POSITIVE", "probability", dtype="float32", batch_size=2)
    assert scored(reward) == pytest.approx(wanted, abs=1e-5)
    logits = ClassifierReward(path, "POSITIVE", dtype="float32")
    other = ClassifierReward(path, "NEGATIVE", dtype="float32")
    odds = torch.tensor(scored(logits)) - torch.tensor(scored(other))
    assert odds.sigmoid().tolist() == pytest.approx(wanted, abs=1e-5)
    threshold = sum(sorted(wanted)[1:]) / 2
    passed = ClassifierReward(path, "POSITIVE", "probability", threshold=threshold, dtype="float32")
    assert scored(passed) == [float(value > threshold) for value in wanted]


@pytest.mark.parametrize("kind", ["bert", "deberta-v2", "llama"])
def test_a_single_output_and_a_pair_of_texts(tmp_path, kind):
    path = save_classifier(tmp_path, kind, num_labels=1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path).eval()
    texts = {
        "completion": [(end,) for end in COMPLETIONS],
        "both": [(start + end,) for start, end in zip(PROMPTS, COMPLETIONS, strict=True)],
        "pair": list(zip(PROMPTS, COMPLETIONS, strict=True)),
    }
    found = {}
    for text, rows in texts.items():
        with torch.no_grad():
            wanted = [model(**tokenizer(*row, return_tensors="pt")).logits.item() for row in rows]
        found[text] = scored(ClassifierReward(path, text=text, dtype="float32"))
        assert found[text] == pytest.approx(wanted, abs=1e-5)
    assert found["completion"] != found["both"]
    assert (found["pair"] == found["both"]) == (kind == "llama")  # a policy's tokenizer knows no pairs
    probabilities = scored(ClassifierReward(path, output="probability", dtype="float32"))
    assert probabilities == pytest.approx(torch.tensor(found["completion"]).sigmoid().tolist(), abs=1e-5)


def test_labels_that_may_hold_at_once_have_probabilities_of_their_own(tmp_path):
    path = save_classifier(tmp_path, num_labels=3, problem_type="multi_label_classification")
    logits = [scored(ClassifierReward(path, f"LABEL_{i}", dtype="float32")) for i in range(3)]
    found = [scored(ClassifierReward(path, f"LABEL_{i}", "probability", dtype="float32")) for i in range(3)]
    assert torch.tensor(found).tolist() == [pytest.approx(each) for each in torch.tensor(logits).sigmoid().tolist()]


def test_chats_are_read_as_their_contents(tmp_path):
    path = save_classifier(tmp_path)
    prompts = [[{"role": "user", "content": text}] for text in PROMPTS]
    completions = [[{"role": "assistant", "content": text}] for text in COMPLETIONS]
    for text in ("completion", "pair"):
        reward = ClassifierReward(path, "POSITIVE", text=text, dtype="float32")
        assert scored(reward, prompts, completions) == pytest.approx(scored(reward))
    both = ClassifierReward(path, "POSITIVE", text="both", dtype="float32")
    assert scored(both, prompts, completions) == pytest.approx(scored(both, [f"{text}\n" for text in PROMPTS]))


def test_long_texts_are_cut_where_the_completion_is_kept_and_counted(tmp_path, caplog):
    path, metrics = save_classifier(tmp_path), {}
    long = "a b c d " * 8  # 32 tokens of 24, with two special ones
    reward = ClassifierReward(path, "POSITIVE", dtype="float32")
    assert reward.max_length == 24
    found = scored(reward, ["a"] * 2, [long, "b"], log_metric=metrics.__setitem__)
    assert metrics == {"rewards/classifier/truncated": 0.5}
    assert found[0] == pytest.approx(scored(reward, ["a"], [long[: 2 * 22]])[0])
    assert caplog.text.count("reads 24 tokens: 1 of 2 texts are longer") == 1  # said once
    both = ClassifierReward(path, "POSITIVE", text="both", dtype="float32")
    whole = scored(both, [long], [" j k l"])
    assert whole == pytest.approx(scored(both, [long[-2 * 19 :]], [" j k l"]))  # the end of the prompt
    assert whole != pytest.approx(scored(both, [long], [" j k m"]))
    assert len(scored(ClassifierReward(path, "POSITIVE", max_length=8, text="pair"), [long], ["b"])) == 1


def test_roberta_reads_fewer_tokens_than_it_has_positions():
    config = CONFIGS["roberta"](**TWO)
    assert readable_tokens(config, make_tokenizer()) == 24
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 12
    assert readable_tokens(config, tokenizer) == 12


def test_what_is_no_classifier_or_no_label_is_named(tmp_path):
    path = save_classifier(tmp_path / "two")
    with pytest.raises(ConfigError, match=r"has 2 labels.*`reward.toxic.label=NEGATIVE`, `reward.toxic.label=POSI"):
        ClassifierReward(path, name="toxic")
    with pytest.raises(ConfigError, match=r"`reward.classifier.label` is `POSITIV`.*Did you mean `POSITIVE`"):
        ClassifierReward(path, "POSITIV")
    with pytest.raises(ConfigError, match=r"a LlamaForCausalLM, which is no classifier"):
        ClassifierReward(save_model(tmp_path / "policy"))
    with pytest.raises(ConfigError, match="`reward.classifier.max_length` is 25, and .* reads 24 tokens"):
        ClassifierReward(path, "POSITIVE", max_length=25)
    with pytest.raises(ConfigError, match="output"):
        ClassifierReward(path, "POSITIVE", output="logits")
    (tmp_path / "two" / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="two"):
        ClassifierReward(path, "POSITIVE")


def test_the_option_composes_and_a_dry_run_loads_no_weights(compose, tmp_path, capsys, monkeypatch):
    path = save_classifier(tmp_path / "classifier")
    words = ["stage=ppo", "reward=classifier", f"reward.classifier.path={path}", f"runs_dir={tmp_path}"]
    cfg = compose(*words, "reward.classifier.label=POSITIVE")
    (reward,) = reward_functions(cfg, None)
    assert reward.__name__ == "classifier" and len(scored(reward)) == 3
    assert "no such column" not in (reward.column_problem(["a"]) or "") and "images" in reward.column_problem(
        ["images"]
    )
    monkeypatch.setattr("rlhf_trl.rewards.classifier.load_weights", None)
    assert not reward_functions(cfg, None, models=False)
    show_plan(compose(*words, "reward.classifier.label=POSITIVE"))
    shown = capsys.readouterr().out
    assert "classifier x 1.0" in shown and "reward classifier" in shown
    with pytest.raises(ConfigError, match="`reward.classifier.label` is not set"):
        show_plan(compose(*words))
    (problem,) = find_problems(compose(*words, f"reward.classifier.path={tmp_path / 'classifer'}"))
    assert problem.startswith("`reward.classifier.path` is ") and "classifer" in problem


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_memory_plan_has_the_classifier(compose, tmp_path, kind):
    path = save_classifier(tmp_path / "classifier", kind)
    words = ["stage=ppo", "reward=classifier", f"reward.classifier.path={path}", f"runs_dir={tmp_path}"]
    cfg = compose(*words, "reward.classifier.label=POSITIVE")
    args = training_arguments(cfg.stage.args, output_dir=str(tmp_path))
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "What color is a duck?"}]}])
    plan = estimate(cfg, args, load_tokenizer(find_policy("demo:sft", ".")), rows).plan
    assert plan is not None, estimate(cfg, args, load_tokenizer(find_policy("demo:sft", ".")), rows).text
    (role,) = [role for role in plan.roles if role.name == "reward classifier"]
    weights = 4 * transformers.AutoModelForSequenceClassification.from_pretrained(path).num_parameters()
    assert weights <= role.weights < 1.05 * weights  # buffers beside
