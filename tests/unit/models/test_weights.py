"""Loading of models and adapters: all weights are in their files, or it is an error."""

import json
import logging
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_trl.checks import check
from rlhf_trl.errors import ConfigError
from rlhf_trl.models.initial import load_initial_model
from rlhf_trl.models.loading import load_model, load_reward_model
from rlhf_trl.models.tokenizers import load_tokenizer
from rlhf_trl.ppo.config import PPOConfig
from rlhf_trl.ppo.critic import add_critic
from rlhf_trl.rewards.adapter import AdapterReward
from rlhf_trl.rewards.model import ModelReward
from tests.helpers.architectures import ARCHITECTURES, save_architecture
from tests.helpers.spies import logits
from tests.helpers.tiny import save_model

OPTIONS = {"dtype": "float32"}


def rewrite(folder: str, change, file: str = "model.safetensors") -> str:
    """Let `change` edit the dict of a folder's weights."""
    weights = load_file(f"{folder}/{file}")
    change(weights)
    save_file(weights, f"{folder}/{file}", metadata={"format": "pt"})
    return folder


def trunk_weight(folder: str) -> str:
    """Return the name of a matrix inside the layers."""
    weights = load_file(f"{folder}/model.safetensors")
    return next(name for name, weight in weights.items() if ".1." in name and weight.dim() == 2)


def save_reward_model(base: str, out, lora: bool = False) -> str:
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    if lora:
        torch.manual_seed(1)
        config = LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS", init_lora_weights=False)
        model = get_peft_model(model, config)
    model.save_pretrained(out)
    return str(out)


def save_adapter(base: str, out, **options) -> str:
    torch.manual_seed(1)
    config = LoraConfig(
        **{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_lora_weights": False} | options
    )
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(out)
    return str(out)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_weights_that_may_be_missing_are_neither_error_nor_warning(tmp_path, caplog, name):
    path = save_architecture(tmp_path / "policy", name)
    full, adapter = (save_reward_model(path, tmp_path / f"lora_{lora}", lora) for lora in (False, True))
    caplog.clear()
    assert logits(load_model(path)).isfinite().all()
    scorer, _ = load_initial_model(path, "SEQ_CLS", None, str(tmp_path / "start"), heads=["a", "b"], **OPTIONS)
    assert logits(scorer).shape == (2, 2)
    assert logits(load_reward_model(full)).shape == logits(load_reward_model(adapter)).shape == (2, 1)
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("task_type", ["CAUSAL_LM", "SEQ_CLS"])
def test_missing_weight_of_the_trunk_is_named(tmp_path, name, task_type):
    path = save_architecture(tmp_path / "policy", name)
    lost = trunk_weight(path)
    rewrite(path, lambda weights: weights.pop(lost))
    with pytest.raises(ConfigError, match=rf"lacks 1 weight of \w+: `[\w.]*{lost.split('.', 1)[1]}`"):
        load_initial_model(path, task_type, None, str(tmp_path / "start"), **OPTIONS)


def test_a_wrappers_prefix_is_named(tiny_llama):
    def prefix(weights):
        for name in list(weights):
            weights[f"pretrained_model.{name}"] = weights.pop(name)

    rewrite(tiny_llama, prefix)
    with pytest.raises(
        ConfigError, match=r"lacks 21 weights of LlamaForCausalLM.*`pretrained_model\.lm_head\.weight`"
    ):
        load_model(tiny_llama)


def test_missing_layers_are_an_error_and_superfluous_ones_a_warning(tiny_llama, caplog):
    file = Path(tiny_llama, "config.json")
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ConfigError, match=r"lacks 9 weights of LlamaForCausalLM: `model\.layers\.2\."):
        load_model(tiny_llama)
    file.write_text(json.dumps(config | {"num_hidden_layers": 1}))
    load_model(tiny_llama)
    assert any("9 weights that LlamaForCausalLM has no place for" in record.message for record in caplog.records)


@pytest.mark.parametrize("load", [load_reward_model, ModelReward], ids=["model", "reward"])
@pytest.mark.parametrize("instead", ["v_head.summary.weight", None])
def test_a_reward_model_without_its_score_head_is_an_error(tiny_llama, tmp_path, load, instead):
    path = save_reward_model(tiny_llama, tmp_path / "reward")

    def behead(weights):
        head = weights.pop("score.weight")
        if instead:
            weights[instead] = head

    rewrite(path, behead)
    with pytest.raises(ConfigError, match=rf"`score\.weight`.*{instead or 'Rename'}"):
        load(path)


def test_separate_critic_needs_all_weights_of_its_reward_model(tiny_llama, tmp_path):
    path = rewrite(save_reward_model(tiny_llama, tmp_path / "reward"), lambda weights: weights.pop("score.weight"))
    (tmp_path / "llama/tokenizer.json").replace(tmp_path / "reward/tokenizer.json")
    (tmp_path / "llama/tokenizer_config.json").replace(tmp_path / "reward/tokenizer_config.json")
    args = PPOConfig(str(tmp_path), critic="model", critic_path=path, report_to="none", bf16=False, use_cpu=True)
    with pytest.raises(ConfigError, match=r"`score\.weight`"):
        add_critic(load_model(tiny_llama), args, load_tokenizer(path))


def test_a_config_without_num_labels_is_explained(tiny_llama, tmp_path):
    path = save_reward_model(tiny_llama, tmp_path / "reward")
    file = Path(path, "config.json")
    config = json.loads(file.read_text())
    file.write_text(json.dumps({key: config[key] for key in config if key not in ("id2label", "label2id")}))
    with pytest.raises(ConfigError, match=r'`score\.weight` is 1 x 16, and 2 x 16 .*Write `"num_labels": 1`'):
        load_reward_model(path)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_labels": 1}))
    assert logits(load_reward_model(path)).shape == (2, 1)


def test_a_weight_of_another_shape_is_named(tiny_llama):
    rewrite(tiny_llama, lambda weights: weights.update({"model.norm.weight": torch.ones(8)}))
    with pytest.raises(ConfigError, match=r"`model\.norm\.weight` is 8, and 16 is expected"):
        load_model(tiny_llama)


def test_nonfinite_weights_are_named(tiny_llama, tmp_path):
    adapter = save_adapter(tiny_llama, tmp_path / "adapter")
    file, spoilt = "adapter_model.safetensors", "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    rewrite(adapter, lambda weights: weights[spoilt].fill_(float("inf")), file)
    with pytest.raises(ConfigError, match=r"up_proj\.lora_A\.weight` of .* holds NaN"):
        load_model(adapter)
    rewrite(tiny_llama, lambda weights: weights["model.norm.weight"].fill_(float("nan")))
    with pytest.raises(ConfigError, match=r"`model\.norm\.weight` of .* holds NaN"):
        load_model(tiny_llama)


def test_damaged_files_are_one_error_message(tiny_llama, tmp_path):
    adapter = save_adapter(tiny_llama, tmp_path / "adapter")
    for file in (f"{adapter}/adapter_model.safetensors", f"{tiny_llama}/model.safetensors"):
        Path(file).write_bytes(Path(file).read_bytes()[:100])
        with pytest.raises(ConfigError, match="can't be read"):
            load_model(adapter if "adapter" in file else tiny_llama)


# ---- Adapters ----


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dora": True},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"trainable_token_indices": [3, 4]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"bias": "all"},
        {"bias": "lora_only"},
    ],
    ids=["lora", "dora", "modules_to_save", "tokens", "embeddings", "biases", "its layers' biases"],
)
@pytest.mark.parametrize("name", ["llama", "qwen2"])  # separate and tied output layers, without and with biases
def test_missing_weights_of_an_adapter_are_named(tmp_path, options, name):
    base = save_architecture(tmp_path / "base", name)
    path = save_adapter(base, tmp_path / "adapter", **options)
    load_model(path)
    weights = load_file(f"{path}/adapter_model.safetensors")
    for lost in weights:
        if "base_layer" in lost:  # PEFT saves the base's own embedding beside its adapter
            continue
        kept = {name: weight for name, weight in weights.items() if name != lost}
        save_file(kept, f"{path}/adapter_model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ConfigError, match="missing from its files"):
            load_model(path)
    save_file(weights | {"base_model.model.q.lora_A.weight": torch.ones(1)}, f"{path}/adapter_model.safetensors")
    with pytest.raises(ConfigError, match=r"1 weight without a place \(`base_model\.model\.q\.lora_A"):
        load_model(path)


def test_an_adapter_of_another_base_is_refused_by_every_load(tiny_llama, tmp_path):
    other = save_model(tmp_path / "wide", hidden_size=32)
    policy = save_adapter(other, tmp_path / "policy")
    reward = save_reward_model(other, tmp_path / "reward", lora=True)
    for path in (policy, reward):
        file = Path(path, "adapter_config.json")
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": tiny_llama}))
    wanted, scored = (
        LoraConfig(r=4, target_modules="all-linear", task_type=task) for task in ("CAUSAL_LM", "SEQ_CLS")
    )
    said = "size mismatch.*Give the base that it was trained on"
    for load in (
        lambda: load_model(policy),
        lambda: load_initial_model(policy, "CAUSAL_LM", wanted, str(tmp_path / "start"), **OPTIONS),
        lambda: load_initial_model(policy, "SEQ_CLS", scored, str(tmp_path / "start"), **OPTIONS),
        lambda: load_initial_model(policy, "CAUSAL_LM", None, str(tmp_path / "start"), **OPTIONS),
        lambda: load_reward_model(reward),
    ):
        with pytest.raises(ConfigError, match=said):
            load()
    model, _ = load_initial_model(save_adapter(tiny_llama, tmp_path / "ours"), "CAUSAL_LM", wanted, "", **OPTIONS)
    file = f"{tiny_llama}/tokenizer.json"
    Path(reward, "tokenizer.json").write_bytes(Path(file).read_bytes())
    Path(reward, "tokenizer_config.json").write_bytes(Path(tiny_llama, "tokenizer_config.json").read_bytes())
    function = AdapterReward(reward)
    function.bind(load_tokenizer(tiny_llama))
    with pytest.raises(ConfigError, match=said):
        function.attach(model)


def test_a_member_of_an_ensemble_without_its_head_is_named(tiny_llama, tmp_path):
    for i in range(2):
        save_reward_model(tiny_llama, tmp_path / f"ensemble/member_{i}", lora=True)
    Path(tmp_path, "ensemble/ensemble.json").write_text('{"members": ["member_0", "member_1"]}')
    assert load_reward_model(str(tmp_path / "ensemble")).peft_config.keys() == {"default", "member_1"}
    rewrite(
        str(tmp_path / "ensemble/member_1"),
        lambda weights: weights.pop("base_model.model.score.weight"),
        "adapter_model.safetensors",
    )
    with pytest.raises(ConfigError, match=r"member_1` doesn't fit.*score\.weight"):
        load_reward_model(str(tmp_path / "ensemble"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda file: file.write_text("{"), r"adapter_config\.json` of the adapter .* can't be read"),
        (lambda file: edit(file, peft_type="FROB"), r"adapter_config\.json` of the adapter .* can't be read"),
        (lambda file: edit(file, base_model_name_or_path=None), "doesn't say what its base model is"),
        (lambda file: edit(file, base_model_name_or_path="no/such"), "The model `no/such` can't be loaded"),
        (lambda file: file.with_name("adapter_model.safetensors").unlink(), "can't be read"),
    ],
    ids=["broken", "unknown kind", "no base", "base of the hub", "no weights"],
)
def test_broken_adapter_is_one_error_message(tiny_llama, tmp_path, change, said):
    adapter = save_adapter(tiny_llama, tmp_path / "adapter")
    change(Path(adapter, "adapter_config.json"))
    with pytest.raises(ConfigError, match=said):
        load_model(adapter)


def edit(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_broken_config_of_a_model_is_not_reported_as_the_tokenizers(tiny_llama):
    Path(tiny_llama, "config.json").write_text("{")
    with pytest.raises(ConfigError, match=f"The model `{tiny_llama}` can't be loaded"):
        load_tokenizer(tiny_llama)


def test_a_template_in_another_encoding_and_a_revision_of_a_folder(compose, tiny_llama, tmp_path):
    (tmp_path / "latin1.jinja").write_bytes("é".encode("latin1"))
    with pytest.raises(ConfigError, match="is not UTF-8"):
        load_tokenizer(tiny_llama, chat_template=str(tmp_path / "latin1.jinja"))
    words = ["stage=sft", "model=hf", f"model.path={tiny_llama}", "model.revision=v9", f"runs_dir={tmp_path}"]
    with pytest.raises(ConfigError, match="`model.revision` is v9, and .* is a folder of this machine"):
        check(compose(*words))
