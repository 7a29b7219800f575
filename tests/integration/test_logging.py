"""W&B and TensorBoard get config, metrics and samples; read back from the files they leave."""

import json

import pytest
from omegaconf import OmegaConf

from rlhf_trl.callbacks.loggers import earlier_id, no_logger, tensorboard, wandb
from rlhf_trl.callbacks.samples import SAMPLES_FILE
from rlhf_trl.callbacks.wandb_sections import WandbSections
from rlhf_trl.errors import ConfigError
from rlhf_trl.runs.paths import conf_dir
from tests.helpers.wandb_file import read_run
from tests.helpers.watching import WORDS, add_callbacks, grpo, sft

CONFIG = {"stage": {"name": "grpo", "args": {"beta": 0.1}}, "seed": 1}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    for name in ("WANDB_MODE", "WANDB_DATA_DIR", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)


def train(trainer, run_dir):
    add_callbacks(trainer, run_dir)
    trainer.train()
    trainer.evaluate()
    return trainer


def test_wandb_offline_run_holds_config_metrics_and_samples(tmp_path, capsys):
    with wandb(str(tmp_path), "grpo", CONFIG, project="demo", group="pipeline", tags=["grpo"]):
        trainer = train(grpo(tmp_path, report_to="wandb"), tmp_path)
    output = capsys.readouterr()
    assert "wandb sync" in output.out
    assert "wandb:" not in output.out + output.err

    found = read_run(tmp_path)
    run = found["run"]
    assert (run.project, run.display_name, run.run_group, list(run.tags)) == ("demo", "grpo", "pipeline", ["grpo"])
    assert found["config"]["stage"] == CONFIG["stage"]
    assert found["config"]["num_iterations"] == 2  # the trainer's arguments are there too

    # Every metric that the trainer logged, with its step
    logged = {(row["train/global_step"], key): value for row in found["history"] for key, value in row.items()}
    for entry in trainer.state.log_history:
        if "train_runtime" in entry:
            assert found["summary"]["train_loss"] == pytest.approx(entry["train_loss"])
            continue
        evaluation = any(key.startswith("eval_") for key in entry)
        for key, value in entry.items():
            if key not in ("step", "epoch"):
                name = f"eval/{key[5:]}" if evaluation else f"train/{key}"
                assert logged[entry["step"], name] == pytest.approx(value, abs=1e-7), name

    # The table grows: each step adds rows, and together they are the rows of the file
    increments = [row for row in found["history"] if "samples/path" in row]
    assert [row["train/global_step"] for row in increments] == [1, 3, 4]  # a rollout each 2 steps, an evaluation
    assert [row["samples/nrows"] for row in increments] == [4, 8, 12]
    tables = [json.loads((found["files"] / row["samples/path"]).read_text()) for row in increments]
    rows = [dict(zip(table["columns"], row, strict=True)) for table in tables for row in table["data"]]
    samples = [json.loads(line) for line in (tmp_path / SAMPLES_FILE).read_text().splitlines()]
    assert len(rows) == len(samples) == 12
    for row, sample in zip(rows, samples, strict=True):
        assert sample["rewards"].keys() == {"count_cats", "shortness"}
        assert row == {**sample.pop("rewards"), **sample}
        assert set(row["completion"].split()) <= set(WORDS)
        assert row["count_cats"] == row["completion"].split().count("cat")


def test_resumed_wandb_run_keeps_its_id(tmp_path):
    assert earlier_id(tmp_path) is None
    (tmp_path / "wandb" / "offline-run-20260101_000000-first").mkdir(parents=True)
    (tmp_path / "wandb" / "run-20260102_000000-second").mkdir()
    assert earlier_id(tmp_path) == "second"
    with wandb(str(tmp_path), "sft", CONFIG, project="demo"):
        pass
    assert len(list(tmp_path.glob("wandb/offline-run-*-second"))) == 1


def test_wandb_writes_on_the_first_rank_only(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with wandb(str(tmp_path), "sft", CONFIG, project="demo"):
        pass
    assert not (tmp_path / "wandb").exists()


def test_tensorboard_holds_metrics_and_samples(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with tensorboard(str(tmp_path), "grpo", CONFIG):
        trainer = train(grpo(tmp_path, report_to="tensorboard"), tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for entry in trainer.state.log_history:
        if "reward" in entry:
            assert (entry["step"], pytest.approx(entry["reward"])) in [
                (event.step, event.value) for event in events.Scalars("train/reward")
            ]
    texts = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("samples/text_summary")]
    samples = [json.loads(line) for line in (tmp_path / SAMPLES_FILE).read_text().splitlines()]
    assert len(samples) == 12
    assert all(any(sample["completion"] in text for text in texts) for sample in samples)


def test_no_logger_writes_nothing(tmp_path):
    with no_logger(str(tmp_path), "sft", CONFIG):
        train(sft(tmp_path), tmp_path)
    assert not (tmp_path / "wandb").exists() and not (tmp_path / "tensorboard").exists()


@pytest.mark.parametrize("context", [wandb, tensorboard])
def test_missing_package_is_one_clear_error(tmp_path, monkeypatch, context):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    options = {"project": "demo"} if context is wandb else {}
    with pytest.raises(ConfigError, match="pip install"), context(str(tmp_path), "sft", CONFIG, **options):
        pass


@pytest.mark.parametrize("name", ["none", "wandb", "tensorboard"])
def test_logger_options_name_real_targets(name):
    from hydra.utils import instantiate

    path = conf_dir() / "logger" / f"{name}.yaml"
    root = OmegaConf.create({"project": "demo", "stage": {"name": "sft"}})
    root.logger = OmegaConf.load(path)
    assert root.logger.report_to == name
    context = instantiate(root.logger.run)
    assert context.func in (no_logger, wandb, tensorboard)
    if name == "wandb":
        own = {"project": "rlhf_trl", "group": None, "tags": ["sft"], "entity": None, "log_model": False}
        assert context.keywords == own
        assert instantiate(root.logger.callback).func is WandbSections
