"""W&B's view of a run: sections, one x-axis, tables, figures, groups, a summary to sort by, the model. Offline."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers.integrations import WandbCallback

from rlhf_trl.callbacks import loggers
from rlhf_trl.callbacks.base import progress_counts
from rlhf_trl.callbacks.health import HealthMonitor
from rlhf_trl.callbacks.loggers import log_images, log_summary, log_tables, summary_of
from rlhf_trl.callbacks.samples import SampleLog
from rlhf_trl.callbacks.wandb_sections import WandbSections, sectioned
from rlhf_trl.checks import check
from rlhf_trl.errors import ConfigError
from rlhf_trl.health.signs import SIGNS
from rlhf_trl.report import plots
from rlhf_trl.report.tables import Rows, comparison_tables
from rlhf_trl.runs.results import Comparison, Estimate, PolicyResult, PromptSample
from tests.helpers.ppo import prompts
from tests.helpers.rl import TRAINERS, rl_trainer
from tests.helpers.tiny import save_model
from tests.helpers.wandb_file import read_run
from tests.helpers.watching import add_callbacks, sft

SECRET = "something-that-nobody-else-says"


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    for name in ("WANDB_MODE", "WANDB_DATA_DIR", "WANDB_PROJECT", "WANDB_LOG_MODEL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def axis_of_all(found: dict) -> str:
    """Return the x-axis of the last definition that holds for every metric."""
    return [metric.step_metric for metric in found["defined"] if metric.glob_name == "*"][-1]


@pytest.mark.parametrize("kind", TRAINERS)
def test_metrics_of_rollouts_stand_in_sections_over_rollouts(path, tmp_path, monkeypatch, kind):
    config = {"stage": {"name": kind}, "objective": "eval_reward", "reward": {"mine": {"api_key": SECRET}}}
    monkeypatch.setattr("sys.argv", ["train.py", f"stage={kind}", f"+reward.mine.api_key={SECRET}"])
    with loggers.wandb(str(tmp_path), f"demo/{kind}", config, project="p"):
        trainer = rl_trainer(
            kind, path, tmp_path, data=prompts(24), eval_dataset=prompts(4), report_to="wandb",
            eval_strategy="steps", eval_steps=2 if kind == "ppo" else 4, num_iterations=2,
        )  # fmt: skip
        for callback in (
            HealthMonitor(trainer, baseline=1, window=1), WandbSections(trainer), SampleLog(trainer, str(tmp_path))
        ):  # fmt: skip
            trainer.add_callback(callback)
        add_callbacks(trainer, tmp_path)
        trainer.train()
    assert [type(c) for c in trainer.callback_handler.callbacks if isinstance(c, WandbCallback)] == [WandbSections]
    found = read_run(tmp_path)
    assert axis_of_all(found) == "train/rollout"
    entries = [entry for entry in trainer.state.log_history if "train_runtime" not in entry]
    assert not [name for row in found["history"] for name in row if name.startswith("profiling")]
    rows = [row for row in found["history"] if "samples/path" not in row]
    assert len(rows) == len(entries) > 6
    for row, entry in zip(rows, entries, strict=True):
        for name, value in entry.items():
            if name not in ("step", "epoch") and value is not None:
                assert row[sectioned(name)] == pytest.approx(value, abs=1e-7), name
        assert row["train/global_step"] == entry["step"]
        assert row["train/rollout"] == (entry["step"] + 1) // 2 and row["train/episodes"] == 8 * row["train/rollout"]
    sections = {name.split("/")[0] for row in rows for name in row if not name.startswith("_")}
    assert {"train", "eval", "objective", "completions", "rewards", "health"} <= sections
    assert ({"policy", "value"} <= sections) == (kind == "ppo")
    assert found["config"]["reward"] == {"mine": {"api_key": "HIDDEN"}}
    kept = [file.read_bytes() for file in tmp_path.glob("wandb/**/*") if file.is_file()]
    assert b"+reward.mine.api_key=HIDDEN" in b"".join(kept) and SECRET.encode() not in b"".join(kept)
    # The verdict is there at the step it is about, sign by sign
    judged = [row for row in rows if "health/level" in row]
    assert len(judged) > 3 and "health/kl_high" in judged[-1]
    tables = [row for row in found["history"] if "samples/path" in row]
    assert [row["samples/nrows"] for row in tables] == sorted(row["samples/nrows"] for row in tables)
    assert len(tables) > 3 and all(row["train/rollout"] == (row["train/global_step"] + 1) // 2 for row in tables)


def test_metrics_of_a_stage_without_rollouts_stand_over_steps(tmp_path):
    with loggers.wandb(str(tmp_path), "demo/sft", {"objective": "eval_loss"}, project="p"):
        trainer = sft(tmp_path, report_to="wandb")
        trainer.add_callback(WandbSections(trainer))
        add_callbacks(trainer, tmp_path)
        trainer.train()
    found = read_run(tmp_path)
    assert axis_of_all(found) == "train/global_step"
    losses = [(row["train/global_step"], row["train/loss"]) for row in found["history"] if "train/loss" in row]
    assert losses == [(e["step"], pytest.approx(e["loss"])) for e in trainer.state.log_history if "loss" in e]
    assert not any("train/rollout" in row for row in found["history"])
    last = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry][-1]
    assert found["summary"]["objective"] == pytest.approx(last)
    assert found["summary"]["objective_name"] == "eval_loss" and found["summary"]["train/train_runtime"] > 0
    assert "health/worst" not in found["summary"]


def test_names_have_one_section():
    assert sectioned("objective/kl") == "objective/kl" and sectioned("loss") == "train/loss"
    assert sectioned("eval_objective/kl") == "eval/objective/kl" and sectioned("eval_loss") == "eval/loss"


def test_rollouts_are_counted_through_accumulation(path, tmp_path):
    sizes = {"per_device_train_batch_size": 4, "steps_per_generation": 4, "gradient_accumulation_steps": 2}
    args = rl_trainer("ppo", path, tmp_path, data=prompts(16), num_iterations=3, **sizes).args
    counts = [progress_counts(args, step) for step in (0, 1, 6, 7)]
    assert [found["train/rollout"] for found in counts] == [0, 1, 1, 2]
    assert [found["train/episodes"] for found in counts] == [0, 16, 16, 32]


# ---- A whole run by its config ----


def test_a_run_of_a_sweep_has_its_group_a_summary_and_its_model(train, tmp_path):
    words = ["stage=grpo", "logger=wandb", "logger.run.log_model=true", "run_name=grpo_sweep/3"]
    short = ["stage.args.max_steps=4", "health.baseline=1", "health.window=1", "data.max_eval_samples=8"]
    run_dir = train(tmp_path, *words, *short, "health.signs.missing_eos.note=1")
    found = read_run(run_dir)
    run = found["run"]
    assert (run.run_group, run.job_type, run.display_name) == ("test/grpo_sweep", "grpo", "test/grpo_sweep/3")
    assert list(run.tags) == ["grpo"]
    history = json.loads(Path(run_dir, "metrics.json").read_text())["history"]
    objective = [entry["eval_reward"] for entry in history if "eval_reward" in entry][-1]
    assert found["summary"]["objective"] == pytest.approx(objective)
    assert found["summary"]["objective_name"] == "eval_reward"
    assert found["summary"]["health/worst"] >= 1 and "missing_eos" in found["summary"]["health/signs"]
    (artifact,) = [artifact for artifact in found["artifacts"] if artifact.type == "model"]  # others are of the table
    assert artifact.name == "model-test-grpo_sweep-3" and "final" in artifact.aliases
    kept = {entry.path for entry in artifact.manifest.contents}
    assert {"model.safetensors", "config.json", "tokenizer.json", "config.yaml", "metrics.json"} <= kept
    assert not any("checkpoint" in name or "critic" in name or "log" in name for name in kept)


def test_stages_of_a_project_are_one_group_and_an_artifact_is_made_on_request_only(train, tmp_path):
    run_dir = train(tmp_path, "stage=sft", "logger=wandb", "stage.args.max_steps=2", "data.max_samples=64")
    found = read_run(run_dir)
    assert (found["run"].run_group, found["run"].job_type) == ("test", "sft") and found["artifacts"] == []
    assert "eval/loss" in found["summary"] and found["summary"]["objective"] == found["summary"]["eval/loss"]


def test_a_given_group_wins(tmp_path):
    with loggers.wandb(str(tmp_path), "demo/sft", {}, project="p", group="mine"):
        pass
    assert read_run(tmp_path)["run"].run_group == "mine"


# ---- Figures and summary ----


def drawings():
    return {"report/Win rates": plots.bars(["ppo"], [0.6], [0.5], [0.7])}


def test_figures_are_images(tmp_path):
    with loggers.wandb(str(tmp_path), "demo/evaluate", {}, project="p"):
        log_summary({"ppo/reward": 1.5})
        log_images(drawings())
    found = read_run(tmp_path)
    (row,) = found["history"]
    assert row["report/Win rates/_type"] == "image-file" and row["report/Win rates/width"] > 300
    with Image.open(found["files"] / row["report/Win rates/path"]) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert (pixels == 255).mean() > 0.5 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 5  # drawn, on white
    assert found["summary"]["ppo/reward"] == 1.5


def test_the_comparison_and_the_answers_are_tables(tmp_path):
    estimate = Estimate(1.5, 1.0, 2.0)
    policy = {"completion_length": 9.0, "eos_rate": 1.0, "reward": estimate, "rewards": {"gold": 1.5}}
    results = {
        "sft": PolicyResult(path="a", **policy),
        "ppo": PolicyResult(path="b", **policy, difference=estimate, win_rate=estimate, kl=None),
    }
    sample = PromptSample(prompt="Why?", completions={"sft": "So.", "ppo": "No."}, rewards={"sft": 1.0, "ppo": None})
    comparison = Comparison(baseline="sft", prompts=1, dropped=0, policies=results, samples=[sample])
    with loggers.wandb(str(tmp_path), "demo/evaluate", {}, project="p"):
        log_tables(comparison_tables(comparison))
    (row,) = read_run(tmp_path)["history"]
    tables = {}
    for name in ("comparison", "answers"):
        assert row[f"report/{name}/_type"] == "table-file"
        tables[name] = json.loads((read_run(tmp_path)["files"] / row[f"report/{name}/path"]).read_text())
    assert tables["answers"]["columns"] == ["prompt", "sft", "sft reward", "ppo", "ppo reward"]
    assert tables["answers"]["data"] == [["Why?", "So.", 1.0, "No.", None]]
    rows = [dict(zip(tables["comparison"]["columns"], row, strict=True)) for row in tables["comparison"]["data"]]
    assert [(row["policy"], row["verdict"], row["reward_low"]) for row in rows] == [
        ("sft", None, 1.0), ("ppo", "ship", 1.0)
    ]  # fmt: skip


def test_figures_without_a_run_are_not_drawn():
    drawing = plots.bars(["ppo"], [0.6])
    drawing.pixels = lambda: pytest.fail("drawn")
    log_images({"report/Win rates": drawing})
    log_summary({"ppo/reward": 1.5})
    log_tables({"report/answers": Rows(["prompt"], [["a"]])})


def test_a_summary_is_of_what_was_measured(tmp_path):
    assert summary_of(str(tmp_path), "eval_loss") == {}
    history = [
        {"step": 0, "eval_loss": 2.0}, {"step": 1, "health/level": 2, "health/kl_high": 2, "health/mode_collapse": 1},
        {"step": 2, "eval_loss": None}, {"step": 2, "health/level": 0},
    ]  # fmt: skip
    (tmp_path / "metrics.json").write_text(json.dumps({"eval": {}, "history": history}))
    assert summary_of(str(tmp_path), "eval_loss") == {
        "objective": 2.0, "objective_name": "eval_loss", "health/worst": 2, "health/signs": "kl_high mode_collapse"
    }  # fmt: skip
    assert "objective" not in summary_of(str(tmp_path), None)


def test_signs_are_names_that_a_chart_can_have():
    assert all(re.fullmatch("[a-z_]+", name) for name in SIGNS)


def test_a_disabled_run_names_no_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with loggers.wandb(str(tmp_path), "p/sft", {}, project="p"):
        assert capsys.readouterr().out == "W&B keeps nothing (WANDB_MODE=disabled).\n"
    assert not list(tmp_path.rglob("*run-*"))


@pytest.mark.parametrize(
    ("mode", "says"),
    [
        ("onlin", "is `onlin`. Did you mean `online`"),
        ("online", "`WANDB_API_KEY`"),
        ("offline", ""),
        ("disabled", ""),
    ],
)
def test_what_keeps_wandb_from_a_run_is_reported_first(compose, tmp_path, monkeypatch, mode, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    if not says:
        return check(compose("stage=sft", "logger=wandb"))
    with pytest.raises(ConfigError) as raised:
        check(compose("stage=sft", "logger=wandb"))
    assert says in str(raised.value) and "\n" not in str(raised.value)


def test_a_server_that_cannot_be_reached_is_an_error_of_the_config(tmp_path, monkeypatch):
    import wandb

    def refused(**options):
        raise wandb.errors.CommError("Run initialization has timed out after 90.0 sec.")

    monkeypatch.setattr(wandb, "init", refused)
    refusal = "timed out after 90.0 sec. To keep the run here instead: `unset WANDB_MODE`"
    with pytest.raises(ConfigError, match=refusal), loggers.wandb(str(tmp_path), "p/sft", {}, project="p"):
        pass
