"""Broken files of models: chat templates, tokenizers and weights, each named in the error."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from rlhf_trl.errors import ConfigError
from rlhf_trl.models.loading import load_model
from rlhf_trl.models.tokenizers import load_tokenizer
from rlhf_trl.runs.paths import resolve_path
from tests.helpers.tiny import CHAT_TEMPLATE, save_model

ONLY_USERS = "{% for m in messages %}{% if m['role'] == 'user' %}<user> {{ m['content'] }} {% endif %}{% endfor %}"
TWO_STEPS = ("data.max_samples=64", "stage.args.max_steps=2", "stage.args.per_device_train_batch_size=8")


@pytest.mark.parametrize("stage", ["sft", "dpo", "reward"])
def test_chat_template_that_drops_the_answers_is_an_error(train, tmp_path, stage):
    # Of a model that knows the words of the data
    path = shutil.copytree(resolve_path("demo:sft", None, tmp_path), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = ONLY_USERS
    tokenizer.save_pretrained(path)
    with pytest.raises(ConfigError, match="The chat template of `.*model` drops what the assistant says"):
        train(tmp_path, f"stage={stage}", "model=hf", f"model.path={path}", *TWO_STEPS)


def test_malformed_chat_template_is_named_with_its_line(train, tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text(CHAT_TEMPLATE + "\n{% for message in }}")
    with pytest.raises(ConfigError, match="The chat template of `.*mine.jinja` is no Jinja template: .*, line 2. Fix"):
        train(tmp_path, "stage=sft", f"model.chat_template={file}", *TWO_STEPS)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_broken_file_of_a_tokenizer_is_named(tmp_path, name):
    path = save_model(tmp_path / "model")
    Path(path, name).write_text("{")
    with pytest.raises(ConfigError, match=rf"model/{name}` is no JSON"):
        load_tokenizer(path)


@pytest.mark.parametrize("size", [0, 5, 2000])
def test_broken_weight_file_is_named(tmp_path, size):
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
    """Object that makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)
