"""Chat templates that can't be read or that lose the answers, and files of a model that are broken, named as such."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from rlhf_trl.checks import find_problems
from rlhf_trl.errors import ConfigError
from rlhf_trl.models.loading import load_model
from rlhf_trl.models.tokenizers import load_tokenizer
from tests.helpers.tiny import CHAT_TEMPLATE, save_model

ONLY_USERS = "{% for m in messages %}{% if m['role'] == 'user' %}<user> {{ m['content'] }} {% endif %}{% endfor %}"
TWO_STEPS = ("data.max_samples=64", "stage.args.max_steps=2", "stage.args.per_device_train_batch_size=8")


@pytest.mark.parametrize("stage", ["sft", "dpo", "reward"])
def test_a_template_without_the_answers_is_refused(train, tmp_path, stage):
    path = save_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = ONLY_USERS
    tokenizer.save_pretrained(path)
    with pytest.raises(ConfigError, match="The chat template of `.*model` leaves out what the assistant says"):
        train(tmp_path, f"stage={stage}", "model=hf", f"model.path={path}", *TWO_STEPS)


def test_a_template_that_is_no_jinja_is_named_with_its_line(train, tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text(CHAT_TEMPLATE + "\n{% for message in }}")
    with pytest.raises(ConfigError, match="The chat template of `.*mine.jinja` is no Jinja template: .*, line 2. Fix"):
        train(tmp_path, "stage=sft", f"model.chat_template={file}", *TWO_STEPS)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_the_broken_file_of_a_tokenizer_is_named(tmp_path, name):
    path = save_model(tmp_path / "model")
    Path(path, name).write_text("{")
    with pytest.raises(ConfigError, match=rf"model/{name}` is no JSON"):
        load_tokenizer(path)


@pytest.mark.parametrize("size", [0, 5, 2000])
def test_the_broken_file_of_weights_is_named(tmp_path, size):
    path = Path(save_model(tmp_path / "model"))
    shutil.copy(path / "model.safetensors", path / "whole.safetensors")
    with open(path / "model.safetensors", "r+b") as file:
        file.truncate(size)
    with pytest.raises(ConfigError, match=r"weights of `.*model/model.safetensors` can't be read"):
        load_model(str(path))


def test_pickled_code_is_not_run(tmp_path):
    path = Path(save_model(tmp_path / "model"))
    (path / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Touch(tmp_path / "touched")}, path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"weights of `.*pytorch_model.bin` can't be read \(a pickle .* run code\)"):
        load_model(str(path))
    assert not (tmp_path / "touched").exists()


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_baseline_that_is_not_evaluated_is_said_before_anything_runs(compose, tmp_path):
    words = ("stage=evaluate", f"runs_dir={tmp_path}")
    for policies in ("stage.policies=null", "~stage.policies.sft"):
        problems = find_problems(compose(*words, policies))
        assert any("`stage.baseline` is `sft`, which `stage.policies` doesn't have" in text for text in problems)


@pytest.mark.parametrize("value", ["[a]", "1", "[1,nan]"])
def test_gaps_are_numbers(compose, tmp_path, value):
    problems = find_problems(compose("stage=evaluate_reward", f"runs_dir={tmp_path}", f"stage.gaps_above={value}"))
    assert any("`stage.gaps_above` is" in text and "must be a list of numbers" in text for text in problems)
