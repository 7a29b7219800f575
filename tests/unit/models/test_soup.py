"""Averages of weights: full models and adapters of several architectures, and what is no soup."""

import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_trl.models.lineage import common_start, starts_of
from rlhf_trl.models.loading import load_model, load_reward_model
from rlhf_trl.models.merging import load_merged
from rlhf_trl.models.soup import concatenate_adapters, is_concatenable, soup_problem, write_soups
from rlhf_trl.runs.record import finish_run, start_run
from tests.helpers.adapter_kinds import LAYERS, config, move, save_adapter
from tests.helpers.architectures import ARCHITECTURES, save_architecture
from tests.helpers.spies import IDS, logits
from tests.helpers.tiny import save_model


def moved(base: str, out: Path, seed: int) -> str:
    """Return a full model all of whose weights have moved from those of another one."""
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(base).save_pretrained(out)
    return str(out)


def adapter(base: str, out: Path, seed: int, task_type: str = "CAUSAL_LM", **options) -> str:
    """Return an adapter whose weights have moved by draws of their own."""
    from peft import get_peft_model

    auto_class = AutoModelForSequenceClassification if task_type == "SEQ_CLS" else AutoModelForCausalLM
    torch.manual_seed(0)  # of the score head
    labels = {"num_labels": 1} if task_type == "SEQ_CLS" else {}
    model = get_peft_model(auto_class.from_pretrained(base, **labels), config(options, task_type))
    torch.manual_seed(seed)
    move(model)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(base).save_pretrained(out)
    return str(out)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gpt_neox"])
def test_soup_of_full_models_is_the_mean_of_their_weights(tmp_path, name):
    base = save_architecture(tmp_path / "base", name)
    paths = [moved(base, tmp_path / f"{seed}", seed) for seed in (1, 2)]
    write_soups(paths, {str(tmp_path / "soup"): [0.25, 0.75], str(tmp_path / "end"): [0, 1]})
    one, other, soup, end = (
        AutoModelForCausalLM.from_pretrained(path) for path in (*paths, tmp_path / "soup", tmp_path / "end")
    )
    states = [model.state_dict() for model in (one, other, soup, end)]
    for key, tensor in states[2].items():
        torch.testing.assert_close(tensor, 0.25 * states[0][key] + 0.75 * states[1][key], msg=key)
        torch.testing.assert_close(states[3][key], states[1][key], rtol=0, atol=0, msg=key)
    tied = one.get_input_embeddings().weight is one.get_output_embeddings().weight
    assert (soup.get_input_embeddings().weight is soup.get_output_embeddings().weight) == tied
    assert tied == (name in ("gpt2", "gemma2"))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gpt_neox"])
def test_soup_of_adapters_has_the_mean_of_their_deltas(tmp_path, name):
    base = save_architecture(tmp_path / "base", name)
    embedding, _, attention = LAYERS[name]
    options = [
        {"use_rslora": True, "alpha_pattern": {attention[0]: 3}, "target_modules": [*attention, embedding]},
        {"r": 2, "lora_alpha": 5, "target_modules": [attention[0], embedding]},
    ]
    paths = [adapter(base, tmp_path / f"{i}", i, **each) for i, each in enumerate(options)]
    soup = str(tmp_path / "soup")
    write_soups(paths, {soup: [0.3, 0.7]})
    start = AutoModelForCausalLM.from_pretrained(base).state_dict()
    one, other, got = (load_merged(path, "float32").state_dict() for path in (*paths, soup))
    for key in start:
        wanted = start[key] + 0.3 * (one[key] - start[key]) + 0.7 * (other[key] - start[key])
        torch.testing.assert_close(got[key], wanted, rtol=0, atol=1e-6, msg=key)
    assert max((one[key] - start[key]).abs().max() for key in start) > 0.05
    # Plain PEFT loads it on the base
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), soup)
    assert plain.peft_config["default"].r == 6
    torch.testing.assert_close(logits(plain), logits(load_merged(soup, "float32")), rtol=1e-3, atol=1e-3)


def test_soup_of_adapters_is_w_plus_sum_of_b_a_and_not_the_product_of_means(tmp_path):
    base = save_architecture(tmp_path / "base", "llama")
    paths = [adapter(base, tmp_path / f"{i}", i, lora_alpha=12) for i in (1, 2)]
    write_soups(paths, {str(tmp_path / "soup"): [0.5, 0.5]})
    files = [load_file(f"{path}/adapter_model.safetensors") for path in (*paths, tmp_path / "soup")]
    for key in files[0]:
        if "lora_A" not in key:
            continue
        a, b = ([file[each] for file in files] for each in (key, key.replace("lora_A", "lora_B")))
        wanted = 0.5 * 3 * b[0] @ a[0] + 0.5 * 3 * b[1] @ a[1]
        torch.testing.assert_close(b[2] @ a[2], wanted, rtol=0, atol=1e-6)
        means = 3 * ((b[0] + b[1]) / 2) @ ((a[0] + a[1]) / 2)
        assert (means - wanted).abs().max() > 1e-2


@pytest.mark.parametrize(
    "options",
    [
        [{"use_dora": True}, {}],
        [{"init_lora_weights": "pissa"}, {"init_lora_weights": "pissa"}],
        [{"bias": "all"}, {}],
        [{"modules_to_save": ["lm_head"]}, {}],
        [{"trainable_token_indices": [6, 7]}, {}],
    ],
    ids=["dora", "pissa", "biases", "output layer in full", "tokens"],
)
def test_adapters_of_other_kinds_are_merged_and_averaged_in_full(tmp_path, options):
    base = save_architecture(tmp_path / "base", "llama")
    paths = [adapter(base, tmp_path / f"{i}", i, **each) for i, each in enumerate(options)]
    assert not is_concatenable(paths)
    write_soups(paths, {str(tmp_path / "soup"): [0.5, 0.5]})
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "soup").state_dict()
    one, other = (load_merged(path, "float32").state_dict() for path in paths)
    for key in got:
        torch.testing.assert_close(got[key], (one[key] + other[key]) / 2, rtol=0, atol=1e-6, msg=key)


def test_soup_of_a_full_model_and_an_adapter_of_other_types(tmp_path, capsys):
    base = save_architecture(tmp_path / "base", "gpt2")
    full = AutoModelForCausalLM.from_pretrained(moved(base, tmp_path / "full", 2)).bfloat16()
    full.save_pretrained(tmp_path / "full")
    paths = [str(tmp_path / "full"), adapter(base, tmp_path / "lora", 1)]
    write_soups(paths, {str(tmp_path / "soup"): [0.5, 0.5]})
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "soup", dtype="auto").state_dict()
    one, other = load_model(paths[0], dtype="float32").state_dict(), load_merged(paths[1], "float32").state_dict()
    torch.testing.assert_close(
        got["transformer.wte.weight"], (one["transformer.wte.weight"] + other["transformer.wte.weight"]) / 2
    )
    assert got["lm_head.weight"].equal(got["transformer.wte.weight"])
    assert "full` bfloat16" in (said := capsys.readouterr().out) and "lora` float32): their soup is float32" in said


def test_adapters_of_layers_that_are_called_as_lora_calls_its_matrices():
    configs = [LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["in_A", "lora_B"]) for rank in (1, 2)]
    torch.manual_seed(0)
    weights = [
        {
            f"base_model.model.h.{layer}.lora_{matrix}.weight": torch.randn(*shape)
            for layer in ("in_A", "lora_B")
            for matrix, shape in (("A", (config.r, 5)), ("B", (7, config.r)))
        }
        for config in configs
    ]
    config, got = concatenate_adapters(configs, weights, [0.3, 0.7])
    assert config.r == config.lora_alpha == 3
    for layer in ("in_A", "lora_B"):
        a, b = f"base_model.model.h.{layer}.lora_A.weight", f"base_model.model.h.{layer}.lora_B.weight"
        wanted = sum(2 * share * own[b] @ own[a] for own, share in zip(weights, (0.3, 0.7), strict=True))
        torch.testing.assert_close(got[b] @ got[a], wanted)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_soup_of_reward_models_scores_as_the_mean_weights_do(tmp_path, name):
    base = save_architecture(tmp_path / "base", name)
    paths = [adapter(base, tmp_path / f"{i}", i, "SEQ_CLS") for i in (1, 2)]
    write_soups(paths, {str(tmp_path / "soup"): [0.5, 0.5]})
    merged = [load_merged(path, "float32") for path in paths]
    for tensor, other in zip(merged[0].state_dict().values(), merged[1].state_dict().values(), strict=True):
        tensor.copy_((tensor + other) / 2)
    scores = logits(load_reward_model(str(tmp_path / "soup"), dtype="float32"))
    torch.testing.assert_close(scores, logits(merged[0]), rtol=1e-4, atol=1e-4)
    # The head is averaged too: by itself, on the last hidden state
    heads = [load_file(f"{path}/adapter_model.safetensors")["base_model.model.score.weight"] for path in paths]
    soup = load_reward_model(str(tmp_path / "soup"), dtype="float32")
    hidden = soup.base_model.model.base_model(IDS).last_hidden_state[:, -1]
    torch.testing.assert_close(scores, hidden @ (sum(heads) / 2).T, rtol=1e-4, atol=1e-4)
    # And so are full reward models
    for path, out in zip(paths, ("full1", "full2"), strict=True):
        load_merged(path, "float32").save_pretrained(tmp_path / out)
        AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / out)
    write_soups([str(tmp_path / "full1"), str(tmp_path / "full2")], {str(tmp_path / "warm"): [0.5, 0.5]})
    full = AutoModelForSequenceClassification.from_pretrained(tmp_path / "warm")
    torch.testing.assert_close(logits(full), scores, rtol=1e-4, atol=1e-4)


def run(folder: str, start: str, **inputs: str | None) -> str:
    """Record in a model's folder which run left it, and no other one before."""
    Path(folder, "run.json").unlink(missing_ok=True)
    start_run(folder, stage="dpo", command="train.py", model=start, inputs=inputs)
    finish_run(folder, "done")
    return folder


def test_models_that_share_no_start_are_refused(tmp_path):
    from rlhf_trl.models.adapters import model_fingerprint

    base, other = (save_model(tmp_path / f"base{seed}", seed=seed) for seed in (0, 1))
    a, b, c = (moved(base, tmp_path / name, seed) for seed, name in enumerate("abc"))
    assert "`a` (`" in (problem := soup_problem({"a": a, "b": b}, False)) and "no record of a run" in problem
    assert "`stage.assume_shared_start=true`" in problem
    assert soup_problem({"a": a, "b": b}, assume_shared_start=True) is None
    hashed = model_fingerprint(base)
    run(a, base, model=hashed), run(b, a, model=model_fingerprint(a)), run(c, other, model=model_fingerprint(other))
    # From the base, and from what was trained from it
    assert [start.path for start in starts_of(b)] == [b, a, base]
    assert common_start({"a": a, "b": b}).path == a and soup_problem({"a": a, "b": b, "base": base}, False) is None
    problem = soup_problem({"a": a, "c": c}, False)
    assert f"`a` from `{base}`; `c` from `{other}`" in problem
    # The start was trained again between the two
    run(c, base, model="another")  # hash of what it was
    assert f"`{base}`, which they were trained from, was trained again" in soup_problem({"a": a, "c": c}, False)
    # A copy elsewhere is the same start
    shutil.copytree(base, tmp_path / "copy")
    run(c, str(tmp_path / "copy"), model=hashed)
    assert soup_problem({"a": a, "c": c}, False) is None
    # Adapters on one base share it
    loras = {f"{i}": adapter(base, tmp_path / f"lora{i}", i) for i in (1, 2)}
    assert soup_problem(loras, False) is None and common_start(loras).path == base
    loras["other"] = save_adapter(other, str(tmp_path / "lora3"), {})
    assert "different ones" in soup_problem(loras, False)


def test_models_of_another_architecture_tokenizer_or_task_are_refused(tmp_path):
    base = save_model(tmp_path / "base")
    wide = save_model(tmp_path / "wide", intermediate_size=48)
    assert "`intermediate_size` of their configs is 32 and 48" in soup_problem({"a": base, "b": wide}, True)
    other = save_model(tmp_path / "other", seed=1)
    assert soup_problem({"a": base, "b": other}, True) is None
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(other)
    assert "different tokenizers" in soup_problem({"a": base, "b": other}, True)
    scores = save_adapter(base, str(tmp_path / "reward"), {}, "SEQ_CLS")
    assert "`a` is a policy, `b` is a reward model" in soup_problem({"a": base, "b": scores}, True)
    assert "names 1" in soup_problem({"a": base}, True)
    gpt2 = save_architecture(tmp_path / "gpt2", "gpt2")
    assert "no models of one architecture" in soup_problem({"a": base, "b": gpt2}, True)
    assert set(ARCHITECTURES) >= {"llama", "gpt2"}
