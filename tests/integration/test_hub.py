"""Uploads to a hub on loopback: after training, and of a finished run, with a model card of our own."""

import io
import json
from pathlib import Path

import huggingface_hub.constants
import pytest
import transformers.utils.hub
from hydra.utils import instantiate
from PIL import Image
from transformers import AutoModelForCausalLM

from rlhf_trl.errors import ConfigError
from rlhf_trl.runs.record import is_done
from tests.helpers.fake_hub import TOKEN, fake_hub


@pytest.fixture
def hub(monkeypatch):
    """Return a hub that huggingface_hub takes for its own."""
    with fake_hub() as found:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", found.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)  # the one that transformers keeps
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found


PUSH = ["+stage.args.push_to_hub=true", "+stage.args.hub_strategy=end", "+stage.args.hub_private_repo=true"]


def test_a_trained_model_is_uploaded_with_our_card_and_without_logs(train, tmp_path, hub):
    run_dir = Path(train(tmp_path, "stage=sft", "stage.args.max_steps=2", *PUSH, "+stage.args.hub_model_id=me/mine"))
    files = hub.repos["me/mine"]["main"]
    assert hub.private == {"me/mine"}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "config.yaml", "metrics.json"} <= set(
        files
    )
    assert not [
        name for name in files if "/" in name or name.endswith((".log", ".bin", ".jsonl")) or "run.json" in name
    ]
    assert files["model.safetensors"] == (run_dir / "model.safetensors").read_bytes()
    with Image.open(io.BytesIO(files["report.png"])) as figure:
        assert figure.width > 300
    card = files["README.md"].decode()
    assert card.startswith("---\n") and "None" not in card
    assert not [name for name, content in files.items() if str(tmp_path).encode() in content]
    assert "run_dir: .../" in files["config.yaml"].decode() and str(tmp_path) in (run_dir / "config.yaml").read_text()
    last = json.loads(files["metrics.json"])["eval"]["eval_loss"]
    assert (
        f"| {last:.3g}"[:6] in card
        and "- rlhf_trl\n" in card
        and "demo:base" in card
        and "me/mine" in card
        and "by way" not in card
    )
    assert (run_dir / "README.md").read_text() == card


def test_a_finished_run_is_uploaded_later_to_a_branch(train, compose, tmp_path, hub):
    run_dir = train(tmp_path, "stage=sft", "stage.args.max_steps=2")
    assert "fine-tuned version of" not in Path(run_dir, "README.md").read_text()  # TRL's draft
    words = [f"runs_dir={tmp_path}", "project=test", "stage=push", "model.run=sft", "stage.repo=me/later"]
    cfg = compose(*words, "stage.revision=v2", "stage.private=false")
    instantiate(cfg.stage.run)(cfg)
    assert hub.commits == ["test/sft"] and hub.private == set()
    assert "README.md" in hub.repos["me/later"]["v2"] and hub.repos["me/later"]["main"] == {}
    loaded = tmp_path / "loaded"
    loaded.mkdir()
    for name, content in hub.repos["me/later"]["v2"].items():
        (loaded / name).write_bytes(content)
    assert AutoModelForCausalLM.from_pretrained(loaded).num_parameters() > 1000


def test_a_refused_upload_is_one_error_that_says_how_to_repeat_it(train, compose, tmp_path, hub, monkeypatch):
    train(tmp_path, "stage=sft", "stage.args.max_steps=2")
    words = [f"runs_dir={tmp_path}", "project=test", "stage=push", "stage.repo=me/later"]
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(ConfigError, match="can't be uploaded to `me/later`.*`stage=push`"):
        instantiate((cfg := compose(*words, "model.run=sft")).stage.run)(cfg)
    with pytest.raises(ConfigError, match="Name it: `model.run="):
        instantiate((cfg := compose(*words)).stage.run)(cfg)
    with pytest.raises(ConfigError, match="`stage=merge model.run=sft`"):
        instantiate((cfg := compose(*words, "model.run=sft", "stage.merged=true")).stage.run)(cfg)


def test_an_adapter_on_a_local_base_is_not_uploaded_alone(train, compose, tmp_path, hub):
    train(tmp_path, "stage=sft", "adapter=lora", "stage.args.max_steps=2", "merge=true")
    words = [f"runs_dir={tmp_path}", "project=test", "stage=push", "model.run=sft", "stage.repo=me/lora"]
    with pytest.raises(ConfigError, match="which others don't have.*`stage.merged=true`"):
        instantiate((cfg := compose(*words)).stage.run)(cfg)
    cfg = compose(*words, "stage.merged=true")
    instantiate(cfg.stage.run)(cfg)
    files = hub.repos["me/lora"]["main"]
    assert "model.safetensors" in files and "adapter_model.safetensors" not in files
    assert "LoraConfig of rank" in files["README.md"].decode()


def test_a_model_whose_upload_fails_is_kept(train, tmp_path, hub, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise ConfigError("the hub is away")

    monkeypatch.setattr("rlhf_trl.trainers.publishing.upload_model", refuse)
    words = ["stage.args.save_strategy=no", *PUSH, "+stage.args.hub_model_id=me/mine"]
    run_dir = train(tmp_path, "stage=sft", "stage.args.max_steps=2", *words)
    assert is_done(run_dir) and Path(run_dir, "model.safetensors").is_file()
    assert "warning: the hub is away" in capsys.readouterr().out


def test_checkpoints_are_uploaded_as_models_alone(train, tmp_path, hub):
    words = ["+stage.args.push_to_hub=true", "+stage.args.hub_model_id=me/mine"]
    save = ["stage.args.save_strategy=steps", "stage.args.save_steps=1"]
    train(tmp_path, "stage=sft", "stage.args.max_steps=2", *save, *words)
    files = hub.repos["me/mine"]["main"]
    assert hub.commits == ["Training in progress, step 1", "Training in progress, step 2", "Model save"]
    assert not [name for name in files if "/" in name or name.endswith((".log", ".bin", ".pt")) or name == "run.json"]
