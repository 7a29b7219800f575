"""Rows beyond a model's positions, and ids without an embedding: error messages instead of IndexError."""

import json
import logging
import re

import pytest
import torch
import transformers
from hydra.utils import instantiate

from rlhf_trl.checks.libraries import library_problems
from rlhf_trl.cli.dry_run import show_plan
from rlhf_trl.errors import ConfigError
from rlhf_trl.evaluation.generation import sample, token_statistics
from rlhf_trl.models.loading import load_model
from rlhf_trl.models.sizes import check_rows, empty_model, sizes_of, tokenizer_problem
from rlhf_trl.rewards.model import ModelReward
from tests.helpers.tiny import make_tokenizer, save_gpt2, save_model

POSITIONS = 16
COMMON = {
    "vocab_size": 32,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
}


def write_rows(path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Llama", {"intermediate_size": 32}),
        ("Qwen2", {"intermediate_size": 32, "num_key_value_heads": 2}),
        ("Gemma", {"intermediate_size": 32, "head_dim": 8, "num_key_value_heads": 2}),
        ("GPTNeoX", {"intermediate_size": 32}),
        ("Falcon", {"alibi": True}),
        ("Bloom", {}),
        ("GPT2LMHead", {}),
        ("GPTBigCode", {}),
        ("OPT", {"ffn_dim": 32, "word_embed_proj_dim": 32}),
        ("BioGpt", {"intermediate_size": 32}),
        ("GPTJ", {"rotary_dim": 4}),
        ("CodeGen", {"rotary_dim": 4}),
        ("CTRLLMHead", {"dff": 32}),
    ],
)
def test_a_table_of_positions_is_found_where_the_model_ends_at_it(tmp_path, name, options):
    suffix = "Model" if name.endswith("LMHead") else "ForCausalLM"
    config = getattr(transformers, f"{name.removesuffix('LMHead')}Config")(**COMMON, **options)
    model = getattr(transformers, name + suffix)(config).eval()

    def takes(tokens: int) -> bool:
        ids = torch.randint(0, 32, (1, tokens))
        try:
            with torch.no_grad():
                model(input_ids=ids, attention_mask=torch.ones_like(ids))
        except (IndexError, RuntimeError):
            return False
        return True

    config.save_pretrained(tmp_path)
    sizes = sizes_of(empty_model(str(tmp_path)), str(tmp_path))
    assert sizes == sizes_of(model, str(tmp_path)) and sizes.embeddings == 32
    assert takes(POSITIONS) and takes(POSITIONS + 1) == (not sizes.is_table)
    if name != "Bloom":
        assert sizes.positions == POSITIONS


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text[:-9], "can't be loaded .*not a valid JSON"),
        (lambda text: text.replace('"gpt2"', '"gpt9"'), "can't be loaded .*`gpt9`"),
        (
            lambda text: json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "code.Config"}}),
            "has code of its own.*`trust_remote_code`",
        ),
    ],
    ids=["broken", "unknown", "own-code"],
)
def test_unusable_config_is_named(compose, tmp_path, change, said):
    save_gpt2(tmp_path / "m")
    (tmp_path / "m/code.py").write_text("class Config: ...\n")
    file = tmp_path / "m/config.json"
    file.write_text(change(file.read_text()))
    cfg = compose("stage=sft", "model=hf", f"model.path={tmp_path / 'm'}", f"runs_dir={tmp_path}")
    (problem,) = library_problems(cfg)
    assert re.search(said, problem), problem


def test_an_encoder_decoder_is_named(tmp_path):
    transformers.T5Config(vocab_size=32, d_model=16, d_ff=16, num_layers=1, num_heads=2).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"encoder-decoder model \(`t5`\)"):
        empty_model(str(tmp_path))


def test_rotary_positions_warn_once_and_tables_stop(tmp_path, caplog):
    rotary = sizes_of(empty_model(save_model(tmp_path / "llama", max_position_embeddings=64)), "llama")
    table = sizes_of(empty_model(save_gpt2(tmp_path / "gpt2")), "gpt2")
    with caplog.at_level(logging.WARNING, logger="rlhf_trl.models.sizes"):
        for _ in range(2):
            check_rows(rotary, [[1] * 65, [1]], 0, "Shorten it.")
        check_rows(rotary._replace(name="other"), [[1] * 64], 25, "Shorten it.")  # most completions end before
        check_rows(table, [[1] * 40, [1]], 24, "Shorten it.")
    said = [record.message for record in caplog.records if record.name == "rlhf_trl.models.sizes"]
    assert len(said) == 1 and "`llama` was made for 64 positions" in said[0]
    with pytest.raises(ConfigError, match="`gpt2` has 64 positions, and a row has 40 tokens and up to 25 generated"):
        check_rows(table, [[1] * 40, [1]], 25, "Shorten it.")
    check_rows(table, [[table.embeddings - 1]], 0, "")
    with pytest.raises(ConfigError, match=f"for {table.embeddings} ids, and a row holds the id {table.embeddings}"):
        check_rows(table, [[0], [table.embeddings]], 0, "")


def test_tokenizer_of_another_model_is_distinguished_from_added_tokens(tmp_path):
    sizes = sizes_of(empty_model(save_model(tmp_path)))
    tokenizer = make_tokenizer()
    assert len(tokenizer) == sizes.embeddings and tokenizer_problem(sizes, tokenizer, "") is None
    tokenizer.add_tokens(["<image>"])  # which no row need hold
    assert tokenizer_problem(sizes, tokenizer, "") is None
    tokenizer.pad_token = "<image>"
    assert "the tokenizer's `pad_token` is 21" in tokenizer_problem(sizes, tokenizer, "Remedy.")
    assert "has 21 tokens" in tokenizer_problem(sizes._replace(embeddings=20), make_tokenizer(), "Remedy.")


def config_of(compose, tmp_path, stage, model, rows, *overrides):
    data = [
        "data=files",
        f"data.paths={write_rows(tmp_path / 'rows.jsonl', rows)}",
        "data.eval_size=null",
        "data.to_chat=false",
    ]
    given = ["model=hf", f"model.path={model}", f"runs_dir={tmp_path / 'runs'}"]
    small = ["stage.args.max_steps=1", "stage.args.per_device_train_batch_size=4"]
    return compose(f"stage={stage}", *given, *data, *small, *overrides)


@pytest.mark.parametrize("stage", ["ppo", "grpo", "rloo"])
def test_rollouts_beyond_the_positions_are_refused_before_the_model_loads(compose, tmp_path, monkeypatch, stage):
    monkeypatch.setattr(
        "rlhf_trl.models.initial.load_initial_model", lambda *_, **__: pytest.fail("the model is loaded")
    )
    group = ["reward=length", "reward.length.kwargs.max_length=5"] + ["stage.args.num_generations=2"] * (
        stage != "ppo"
    )
    group += ["stage.args.steps_per_generation=1", "stage.args.gradient_accumulation_steps=1"]
    rows = [{"prompt": " ".join("abcdefghij"[: 2 + i])} for i in range(8)]  # up to 9 tokens
    cfg = config_of(
        compose, tmp_path, stage, save_gpt2(tmp_path / "m"), rows, *group, "stage.args.max_completion_length=56"
    )
    for run in (show_plan, instantiate(cfg.stage.run)):
        with pytest.raises(ConfigError, match="has 64 positions.*9 tokens and up to 56.*max_completion_length=55`"):
            run(cfg)
    cfg.stage.args.max_completion_length = 55
    show_plan(cfg)


@pytest.mark.parametrize(("stage", "max_length"), [("sft", 512), ("sft", "null"), ("dpo", 65), ("kto", 512)])
def test_rows_beyond_the_positions_are_refused_before_the_model_loads(
    compose, tmp_path, monkeypatch, stage, max_length
):
    monkeypatch.setattr(
        "rlhf_trl.models.initial.load_initial_model", lambda *_, **__: pytest.fail("the model is loaded")
    )
    model, length = save_gpt2(tmp_path / "m"), f"stage.args.max_length={max_length}"

    def rows(tokens: int) -> list[dict]:
        answers = {"sft": ["completion"], "dpo": ["chosen", "rejected"], "kto": ["completion"]}[stage]
        answer = {"prompt": "a b ", **{name: " ".join(["c"] * tokens) for name in answers}}
        answer |= {"rejected": "d"} if stage == "dpo" else {}
        return [answer | ({"label": i % 2 == 0} if stage == "kto" else {}) for i in range(8)]

    show_plan(config_of(compose, tmp_path, stage, model, rows(61), length))  # 64 with the prompt and EOS
    cfg = config_of(compose, tmp_path, stage, model, rows(62), length)
    for run in (show_plan, instantiate(cfg.stage.run)):
        with pytest.raises(
            ConfigError, match="has 64 positions, and a row has 65 tokens. Set `stage.args.max_length=64`"
        ):
            run(cfg)


@pytest.mark.parametrize("stage", ["sft", "ppo", "generate", "chat", "evaluate", "evaluate_reward"])
def test_a_tokenizer_larger_than_the_model_is_refused_before_it_loads(compose, tmp_path, stage):
    model, runs = str(tmp_path / "m"), f"runs_dir={tmp_path}"
    config = transformers.GPT2Config(vocab_size=12, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1)
    transformers.GPT2LMHeadModel(config).save_pretrained(model)
    make_tokenizer().save_pretrained(model)
    named = {
        "evaluate": ["~stage.policies.ppo", "~stage.policies.dpo", f"stage.policies.sft={model}"],
        "evaluate_reward": [f"stage.policy={model}", "reward=demo"],
    }
    (problem,) = library_problems(
        compose(f"stage={stage}", runs, *named.get(stage, ["model=hf", f"model.path={model}"]))
    )
    assert "embeddings for 12 ids, and the tokenizer has 21 tokens" in problem


def test_sampling_and_scoring_beyond_the_positions_are_errors(tmp_path):
    path = save_gpt2(tmp_path / "policy")
    model, tokenizer = load_model(path), make_tokenizer()
    assert len(sample(model, tokenizer, [[5] * 60], 4, 1.0, 1, seed=0)) == 1
    with pytest.raises(ConfigError, match="64 positions, and a row has 60 tokens and up to 5 generated"):
        sample(model, tokenizer, [[5] * 60], 5, 1.0, 1, seed=0)
    with pytest.raises(ConfigError, match="64 positions, and a row has 65 tokens"):
        token_statistics(model, [[5] * 60], [[5] * 5], 1.0, 1)
    config = transformers.GPT2Config(vocab_size=21, n_embd=16, n_layer=1, n_head=2, n_positions=64, num_labels=1)
    transformers.GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "reward")
    tokenizer.save_pretrained(tmp_path / "reward")
    reward = ModelReward(str(tmp_path / "reward"), name="score")
    assert len(reward.score_ids([[5] * 64])) == 1
    with pytest.raises(ConfigError, match="`reward.score` has 64 positions, and a row has 65 tokens"):
        reward.score_ids([[5] * 65])


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["adapter=lora", "adapter.peft.target_modules=[q_prj]"], ["`q_prj`", "LlamaForCausalLM", "`q_proj`"]),
        (["adapter=lora", "adapter.peft.target_modules=[q_proj,nope]"], ["`nope`"]),
        (["adapter=lora", "adapter.peft.modules_to_save=[lm_hed]"], ["`lm_hed`", "`lm_head`"]),
        (["model.dtype=flot32"], ["`model.dtype` is 'flot32'", "`bfloat16`"]),
        (["model.attn_implementation=sdp"], ["`model.attn_implementation` is 'sdp'", "`sdpa`"]),
    ],
)
def test_options_of_loading_and_training_a_model_are_checked(compose, tmp_path, overrides, parts):
    (problem,) = library_problems(compose("stage=sft", f"runs_dir={tmp_path}", *overrides))
    assert all(part in problem for part in parts), problem
    right = ["adapter=lora", "adapter.peft.target_modules=[q_proj,layers.0.mlp.up_proj]", "model.dtype=bfloat16"]
    assert library_problems(compose("stage=sft", f"runs_dir={tmp_path}", *right)) == []
