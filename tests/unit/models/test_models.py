"""Paths, tokenizers, and the initial models of runs."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, LlamaForCausalLM

from rlhf_trl.checks import check
from rlhf_trl.errors import ConfigError
from rlhf_trl.models.adapters import adapter_config, base_path
from rlhf_trl.models.initial import load_initial_model
from rlhf_trl.models.loading import load_model, load_reward_model, model_config
from rlhf_trl.models.merging import merge_adapter
from rlhf_trl.models.roles import begin_training
from rlhf_trl.models.tokenizers import load_tokenizer
from rlhf_trl.runs.paths import resolve_path
from tests.helpers.architectures import ARCHITECTURES, save_architecture
from tests.helpers.spies import logits
from tests.helpers.tiny import make_tokenizer

OPTIONS = {"dtype": "float32"}


def lora(r: int = 4, task_type: str = "CAUSAL_LM", **kwargs) -> LoraConfig:
    return LoraConfig(r=r, lora_alpha=8, target_modules="all-linear", task_type=task_type, **kwargs)


@pytest.fixture
def adapter(tiny_llama, tmp_path) -> str:
    """Return an adapter that does something, on the tiny Llama."""
    torch.manual_seed(1)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(tiny_llama), lora(init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter")


def adapter_weights(model: PeftModel, name: str = "default") -> dict[str, torch.Tensor]:
    return {k: v for k, v in model.state_dict().items() if "lora_" in k and f".{name}." in k}


# ---- Paths ----


def test_a_path_is_a_folder_an_embedded_checkpoint_or_a_hub_id(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_path("mine", None, "runs/demo") == str(tmp_path / "mine")
    assert resolve_path("demo:base", None, "runs/demo").endswith("rlhf_trl/tasks/demo/checkpoints/base")
    assert resolve_path("Qwen/Qwen3-0.6B", None, "runs/demo") == "Qwen/Qwen3-0.6B"
    with pytest.raises(ConfigError, match="`./gone` doesn't exist"):
        resolve_path("./gone", None, "runs/demo")
    with pytest.raises(ConfigError, match="`demo:basis`"):
        resolve_path("demo:basis", None, "runs/demo")


@pytest.mark.parametrize(
    ("left", "command"),
    [
        (None, "train.py stage=sft project=demo`"),
        ("checkpoint-4", "train.py stage=sft project=demo resume=true`"),
        ("logs", "train.py stage=sft project=demo overwrite=true`"),
    ],
)
def test_a_run_that_is_missing_or_unfinished_is_an_error_with_the_command(tmp_path, monkeypatch, left, command):
    monkeypatch.chdir(tmp_path)
    if left:
        (tmp_path / "runs/demo/sft" / left).mkdir(parents=True)
        (tmp_path / "runs/demo/sft/run.json").write_text(json.dumps({"stage": "sft", "status": "stopped"}))
    with pytest.raises(ConfigError) as error:
        resolve_path("demo:sft", "sft", "runs/demo")
    assert command in str(error.value)


def test_a_finished_run_wins_over_the_path(tmp_path):
    (tmp_path / "demo/sft").mkdir(parents=True)
    (tmp_path / "demo/sft/run.json").write_text('{"stage": "sft", "status": "done"}')
    assert resolve_path("demo:sft", "sft", f"{tmp_path}/demo") == str(tmp_path / "demo/sft")


def test_a_relative_base_is_found_from_here_and_from_the_adapter(adapter, tiny_llama, tmp_path, monkeypatch):
    config = adapter_config(adapter)
    assert base_path(adapter, config) == tiny_llama
    config.base_model_name_or_path = "../llama"
    assert base_path(adapter, config) == tiny_llama
    monkeypatch.chdir(tmp_path)
    config.base_model_name_or_path = "llama"
    assert base_path(adapter, config) == tiny_llama
    config.base_model_name_or_path = "/gone/llama"
    with pytest.raises(ConfigError, match="base_model_name_or_path"):
        base_path(adapter, config)


# ---- Tokenizers ----


def test_a_tokenizer_gets_a_pad_token_and_a_template(tiny_llama, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "template.jinja").write_text("{{ messages[0]['content'] }}")
    loaded = load_tokenizer(tiny_llama, str(tmp_path / "tokenizer"), str(tmp_path / "template.jinja"))
    assert loaded.pad_token == loaded.eos_token
    assert loaded.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    with pytest.raises(ConfigError, match="gone.jinja"):
        load_tokenizer(tiny_llama, chat_template="gone.jinja")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "chatml",
            "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n",
        ),
        ("zephyr", "<|user|>\na<eos>\n<|assistant|>\nb<eos>\n<|user|>\nc<eos>\n"),
        ("tulu", "<|user|>\na\n<|assistant|>\nb<eos>\n<|user|>\nc\n"),
        ("olmo", "<pad><|user|>\na\n<|assistant|>\nb<eos>\n<|user|>\nc\n"),
    ],
)
def test_the_templates_of_the_package_have_names(tiny_llama, name, text):
    tokenizer = load_tokenizer(tiny_llama, chat_template=name)
    tokenizer.bos_token = "<pad>"
    turns = [("user", "a"), ("assistant", "b"), ("user", "c")]
    chat = [{"role": role, "content": content} for role, content in turns]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == text
    start = {"chatml": "<|im_start|>assistant\n"}.get(name, "<|assistant|>\n")
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == text + start
    answer = [*chat[:1], chat[1]]  # the last turn ends with the end token
    assert tokenizer.apply_chat_template(answer, tokenize=False).rstrip().endswith(("<eos>", "<|im_end|>"))


def test_an_adapter_without_a_tokenizer_has_its_bases(tiny_llama, tmp_path):
    get_peft_model(LlamaForCausalLM.from_pretrained(tiny_llama), lora()).save_pretrained(tmp_path / "bare")
    assert load_tokenizer(str(tmp_path / "bare")).get_vocab() == load_tokenizer(tiny_llama).get_vocab()


# ---- Starts ----


def test_full_initial_model_leaves_the_adapter_to_the_trainer(tiny_llama, tmp_path):
    config = lora()
    model, peft_config = load_initial_model(tiny_llama, "CAUSAL_LM", config, str(tmp_path / "start"), **OPTIONS)
    assert isinstance(model, LlamaForCausalLM) and peft_config is config
    assert model.config._name_or_path == tiny_llama


def test_adapter_is_trained_further_as_the_same_adapter(adapter, tiny_llama, tmp_path):
    wanted = lora(lora_dropout=0.1)
    model, peft_config = load_initial_model(adapter, "CAUSAL_LM", wanted, str(tmp_path / "start"), **OPTIONS)
    assert peft_config is None and model.active_adapter == "default"
    assert not any(p.requires_grad for p in model.parameters())  # until TRL's trainer can't round it any more
    begin_training(model)
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())
    assert model.peft_config["default"].base_model_name_or_path == tiny_llama
    assert model.peft_config["default"].lora_dropout == 0.1
    torch.testing.assert_close(logits(model), logits(load_model(adapter)), rtol=0, atol=0)


def test_adapter_is_merged_for_full_training(adapter, tmp_path):
    model, peft_config = load_initial_model(adapter, "CAUSAL_LM", None, str(tmp_path / "start"), **OPTIONS)
    assert peft_config is None and isinstance(model, LlamaForCausalLM)
    # TRL loads the reference from here
    reference = AutoModelForCausalLM.from_pretrained(model.config._name_or_path)
    torch.testing.assert_close(logits(reference), logits(load_model(adapter)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(model), logits(reference), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (lora(r=8), "`r` is 4 there and 8 in `adapter.peft`"),
        (lora(use_rslora=True), "`use_rslora` is False there and True"),
        (lora(use_dora=True), "`use_dora`"),
        (LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM"), "`target_modules`"),
        (lora(modules_to_save=["embed_tokens"]), "`modules_to_save`"),
    ],
)
def test_adapter_of_another_shape_is_an_error(adapter, tmp_path, wanted, said):
    with pytest.raises(ConfigError) as error:
        load_initial_model(adapter, "CAUSAL_LM", wanted, str(tmp_path / "start"), **OPTIONS)
    assert said in str(error.value) and "stage=merge" in str(error.value)


def test_adapter_of_a_policy_gets_a_score_head(adapter, tmp_path):
    wanted = lora(task_type="SEQ_CLS")
    model, peft_config = load_initial_model(adapter, "SEQ_CLS", wanted, str(tmp_path / "start"), **OPTIONS)
    assert peft_config is None and logits(model).shape == (2, 1)
    policy = adapter_weights(load_model(adapter))
    trunk = adapter_weights(model)
    assert policy.keys() == trunk.keys()
    assert all(torch.equal(trunk[name], policy[name]) for name in trunk)
    begin_training(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == trunk.keys() | {"base_model.model.score.modules_to_save.default.weight"}
    assert "score" in model.peft_config["default"].modules_to_save


def test_reward_model_is_not_loaded_as_a_policy(tiny_llama, adapter, tmp_path):
    AutoModelForSequenceClassification.from_pretrained(tiny_llama, num_labels=1).save_pretrained(tmp_path / "full")
    model, _ = load_initial_model(adapter, "SEQ_CLS", lora(task_type="SEQ_CLS"), str(tmp_path / "start"), **OPTIONS)
    model.save_pretrained(tmp_path / "scores")
    for path in ("full", "scores"):
        assert logits(load_reward_model(str(tmp_path / path))).shape == (2, 1)
        with pytest.raises(ConfigError, match="reward model and can't write"):
            load_initial_model(str(tmp_path / path), "CAUSAL_LM", lora(), str(tmp_path / "start"), **OPTIONS)
    for path in (tiny_llama, adapter):
        with pytest.raises(ConfigError, match="no reward model"):
            load_reward_model(path)


# ---- Merging ----


def test_a_merged_model_has_the_adapters_logits(adapter, tmp_path):
    merge_adapter(adapter, str(tmp_path / "merged"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(load_model(adapter)), rtol=1e-4, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").eos_token == "<eos>"


def test_a_merged_reward_model_has_the_adapters_scores(adapter, tmp_path):
    model, _ = load_initial_model(adapter, "SEQ_CLS", lora(task_type="SEQ_CLS"), str(tmp_path / "start"), **OPTIONS)
    model.save_pretrained(tmp_path / "scores")
    AutoTokenizer.from_pretrained(adapter).save_pretrained(tmp_path / "scores")
    merge_adapter(str(tmp_path / "scores"), str(tmp_path / "merged"))
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert merged.config.num_labels == 1
    torch.testing.assert_close(logits(merged)[:, 0], logits(model)[:, 0], rtol=1e-4, atol=1e-5)


def test_merging_a_full_model_is_an_error(tiny_llama, tmp_path):
    with pytest.raises(ConfigError, match="nothing to merge"):
        merge_adapter(tiny_llama, str(tmp_path / "merged"))


# ---- Kinds of models ----

SMALL = {
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
ENCODERS = {
    "encoder-decoder": [
        transformers.T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2),
        transformers.BartConfig(vocab_size=30, d_model=16, encoder_layers=1, decoder_layers=1),
    ],
    "encoder-only": [
        transformers.BertConfig(**SMALL),
        transformers.RobertaConfig(**SMALL),
        transformers.DistilBertConfig(vocab_size=30, dim=16, n_layers=1, n_heads=2),
    ],
}


@pytest.mark.parametrize(("kind", "config"), [(kind, config) for kind in ENCODERS for config in ENCODERS[kind]])
def test_encoders_are_refused_by_their_config_only(compose, tmp_path, kind, config):
    make_tokenizer().save_pretrained(tmp_path / "model")
    config.save_pretrained(tmp_path / "model")  # and no weights
    path, runs = str(tmp_path / "model"), f"runs_dir={tmp_path}"
    said = f"is an {kind} model \\(`{config.model_type}`\\)"
    for load in (load_model, lambda path: load_initial_model(path, "SEQ_CLS", None, "", **OPTIONS), load_reward_model):
        with pytest.raises(ConfigError, match=said):
            load(path)
    ours = ("model=hf", f"model.path={path}")
    reward = ("reward=model", "reward.model.run=null", f"reward.model.path={path}")
    words = [[f"stage={stage}", *ours] for stage in ("sft", "dpo", "ppo", "reward", "generate", "chat")]
    words += [["stage=ppo", *reward], ["stage=evaluate_reward", *reward], ["stage=sft", *ours, "adapter=qlora"]]
    words += [["stage=evaluate", "~stage.policies.ppo", "stage.policies.sft=demo:sft", f"stage.policies.dpo={path}"]]
    for given in words:
        with pytest.raises(ConfigError, match=said):
            check(compose(*given, runs))


def test_decoders_load_and_folders_without_a_model_are_errors(tiny_llama, tmp_path):
    for name in ARCHITECTURES:
        model_config(save_architecture(tmp_path / name, name))
    transformers.BertConfig(**SMALL, is_decoder=True).save_pretrained(tmp_path / "decoder")
    assert model_config(str(tmp_path / "decoder")).is_decoder
    for text in ("{", '{"hidden_size": 16}', '{"model_type": "frobnicator"}'):
        Path(tiny_llama, "config.json").write_text(text)
        with pytest.raises(ConfigError, match="can't be loaded .*Give the folder of a model"):
            load_model(tiny_llama)
