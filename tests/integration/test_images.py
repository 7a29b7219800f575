"""Stages on data with images, on a tiny LLaVA: what trains, what is evaluated, and what is refused before it loads."""

import json
from pathlib import Path

import pytest
from hydra.utils import instantiate
from transformers import AutoModelForImageTextToText, AutoProcessor

from rlhf_trl.cli.dry_run import show_plan
from rlhf_trl.data.multimodal import opened
from rlhf_trl.errors import ConfigError
from rlhf_trl.labels.candidates import read_candidates
from rlhf_trl.models.loading import load_reward_model
from rlhf_trl.report.project import write_report
from rlhf_trl.runs.record import read_metrics
from tests.helpers.configs import composed
from tests.helpers.vision import ARCHITECTURES, COLOURS, picture, save_vlm

QUESTIONS = [
    "what colour is it ?",
    "is it red ?",
    "is it a blue colour ?",
    "what is it ?",
    "is it green ?",
    "colour ?",
]
SMALL = (
    "stage.args.max_steps=2",
    "stage.args.per_device_train_batch_size=4",
    "stage.args.gradient_accumulation_steps=1",
    "stage.args.gradient_checkpointing=false",
)
ROLLOUT = (*SMALL, "stage.args.max_completion_length=6")
REWARD = ("reward=function", f"reward.function.function={__name__}.redness")


def redness(completions, images, **columns) -> list[float]:
    """Score by the picture and the length of the answer."""
    return [
        len(text[0]["content"]) + shown[0].getpixel((0, 0))[0] for text, shown in zip(completions, images, strict=True)
    ]


def length(completions, images, **columns) -> list[float]:
    """Score by the length of the answer."""
    assert all(len(shown) == 1 for shown in images)
    return [float(len(text[0]["content"])) for text in completions]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for architecture in ARCHITECTURES:
        save_vlm(folder / architecture, architecture)
    (folder / "vlm").symlink_to(folder / "llava")
    colours = list(COLOURS)
    for colour in colours:
        picture(colour).save(folder / f"{colour}.png")
    rows = [
        {"prompt": text, "image": f"{colour}.png", "chosen": f"{colour} .", "rejected": f"{colours[i - 1]} ."}
        for text in QUESTIONS
        for i, colour in enumerate(colours)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for i, row in enumerate(rows):
        row |= {"prompt": f"{'a ' * (i // 6)}{row['prompt']}"}
        if i % 2:
            del row["image"]
    (folder / "mixed.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def run(compose, folder):
    """`run(stage, *overrides)` runs a stage on the pictures, from the tiny LLaVA, and returns its run directory."""

    def ran(stage: str, *overrides: str, model: bool = True) -> str:
        words = [f"stage={stage}", f"runs_dir={folder}", "project=test", "data=files", "overwrite=true"]
        words += [f"data.paths={folder}/pairs.jsonl"]
        words += ["model=hf", f"model.path={folder}/vlm"] if model else []
        cfg = compose(*words, *overrides)
        instantiate(cfg.stage.run)(cfg)
        return cfg.run_dir

    return ran


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "options"),
    [
        ("sft", SMALL),
        ("dpo", SMALL),
        ("kto", SMALL),
        ("grpo", (*ROLLOUT, *REWARD, "stage.args.num_generations=4")),
        ("rloo", (*ROLLOUT, *REWARD, "stage.args.num_generations=4")),
        ("ppo", (*ROLLOUT, *REWARD, "stage.args.steps_per_generation=2")),
    ],
)
def test_a_policy_that_reads_images_is_trained_and_saved_with_its_processor(run, folder, stage, options):
    path = run(stage, *options, "stage.args.learning_rate=1e-2")
    before, after = (AutoModelForImageTextToText.from_pretrained(each).state_dict() for each in (folder / "vlm", path))
    assert before.keys() == after.keys()
    moved = {name for name in after if not after[name].equal(before[name])}
    assert any("vision_tower" in name for name in moved) and any("language_model" in name for name in moved)
    assert AutoProcessor.from_pretrained(path).image_token == "<image>"
    assert read_metrics(path)["history"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "dpo", "kto", "grpo", "rloo", "reward"])
def test_each_stage_learns_from_images(run, stage):
    """The loss falls in one epoch after another; of GRPO and RLOO, whose loss says nothing, the reward rises."""
    options = [*SMALL, "stage.args.max_steps=24", "stage.args.learning_rate=1e-2", "stage.args.logging_steps=1"]
    measure, sign = "loss", 1
    if stage in ("grpo", "rloo"):
        options += [*ROLLOUT[-1:], REWARD[0], f"reward.function.function={__name__}.length"]
        options += ["stage.args.num_generations=4"]
        measure, sign = "reward", -1
    history = read_metrics(run(stage, *options, f"run_name={stage}_learns"))["history"]
    values = [sign * entry[measure] for entry in history if measure in entry]
    assert len(values) >= 20 and sum(values[-6:]) < sum(values[:6])


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("stage", ["sft", "dpo", "kto", "reward"])
def test_rows_with_and_without_images_share_a_batch(run, folder, stage, architecture):
    """The loss of held-out rows is the same in batches of four as row by row."""
    losses = []
    for size in (1, 4):
        options = [*SMALL, "stage.args.max_steps=1", "stage.args.learning_rate=0", "stage.args.eval_strategy=steps"]
        options += ["stage.args.eval_steps=1", f"stage.args.per_device_eval_batch_size={size}", "seed=1"]
        options += [f"data.paths={folder}/mixed.jsonl", f"model.path={folder}/{architecture}", "data.eval_size=9"]
        # The KL of the other loss is that of a batch
        options += ["+stage.args.loss_type=apo_zero_unpaired"] if stage == "kto" else []
        history = read_metrics(run(stage, *options, f"run_name=mixed_{stage}_{size}"))["history"]
        losses.append(next(entry["eval_loss"] for entry in history if "eval_loss" in entry))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ppo_samples_and_scores_rows_with_and_without_images(run, folder, architecture):
    mixed = (f"data.paths={folder}/mixed.jsonl", f"model.path={folder}/{architecture}")
    reward = f"{architecture}_reward"
    run("reward", *SMALL, *mixed, f"run_name={reward}")
    roles = ("reward=model", f"reward.model.run={reward}", "critic=model", f"critic.run={reward}")
    path = run("ppo", *ROLLOUT, "stage.args.steps_per_generation=2", *roles, *mixed, f"run_name={architecture}_ppo")
    assert [entry for entry in read_metrics(path)["history"] if "value/loss" in entry]
    rows = [json.loads(line) for line in Path(path, "samples.jsonl").read_text().splitlines()]
    assert {len(row["images"]) for row in rows} == {0, 1}


@pytest.mark.slow
def test_adapters_on_a_base_in_four_bits_read_images(run):
    four = (*SMALL, "adapter=qlora")
    run("reward", *four, "run_name=four_reward")
    update = (*four, *ROLLOUT[-1:], "stage.args.steps_per_generation=2")
    path = run("ppo", *update, "reward=adapter", "reward.adapter.run=four_reward", "critic=adapter", "run_name=four")
    assert [entry for entry in read_metrics(path)["history"] if "value/loss" in entry]


@pytest.mark.slow
def test_reward_models_score_images_for_ppo_evaluation_and_generation(run, folder):
    reward = run("reward", *SMALL)
    assert load_reward_model(reward).config.num_labels == 1
    run("reward", *SMALL, "adapter=lora", "stage.members=2", "run_name=ensemble")
    run("reward", *SMALL, "adapter=lora", "run_name=lora")
    update = (*ROLLOUT, "stage.args.steps_per_generation=2")
    run("ppo", *update, "reward=model", "critic=model", "critic.run=reward")
    run("ppo", *update, "reward=adapter", "reward.adapter.run=lora", "critic=adapter", "adapter=lora", "run_name=one")
    run("evaluate_reward", "reward=model", "reward.model.run=ensemble", model=False)
    policies = ("stage.policies={sft: ppo, ppo: one, dpo: null}", "stage.baseline=sft", "stage.best_of_n=2")
    path = run("evaluate", *policies, "reward=model", "stage.max_completion_length=6", model=False)
    samples = json.loads(Path(path, "comparison.json").read_text())["samples"]
    assert samples and all(sample["images"][0].startswith("data:image/png;base64,") for sample in samples)
    assert 'src="data:image/png;base64,' in write_report(Path(path).parent).read_text()
    options = ("reward=model", "stage.n=2", "stage.keep=best_per_prompt", "stage.max_completion_length=2")
    path = run("generate", *options, "stage.split=train", "run_name=written")
    rows = [json.loads(line) for line in Path(path, "completions.jsonl").read_text().splitlines()]
    assert {Path(row["images"][0]).name for row in rows} == {f"{colour}.png" for colour in COLOURS}


@pytest.mark.slow
def test_the_pipeline_of_shapes_goes_through_all_its_steps(compose, tmp_path):
    """Two optimizer steps each, on the embedded model: the runs start from each other and are compared on one page."""
    few = {"max_steps": 2, "total_episodes": None, "max_samples": 256, "max_eval_samples": 16, "best_of_n": 2}
    pipeline = composed("pipeline", "pipeline=demo_images")
    for name, words in pipeline.steps.items():
        cfg = compose(
            *words, *pipeline.overrides, f"project={tmp_path.name}", f"runs_dir={tmp_path}", f"run_name={name}"
        )
        for node in (cfg.data, cfg.stage, cfg.stage.get("args", {})):
            for key in few.keys() & node.keys():
                node[key] = few[key]
        instantiate(cfg.stage.run)(cfg)
    comparison = json.loads((tmp_path / tmp_path.name / "compare" / "comparison.json").read_text())
    assert list(comparison["policies"]) == ["sft", "ppo", "dpo"] and comparison["weights"] == {
        "gold": 1.0,
        "model": 0.0,
    }
    assert comparison["samples"][0]["images"][0].startswith("data:image/png;base64,")


@pytest.mark.slow
def test_the_logged_samples_have_images(run):
    path = Path(run("grpo", *ROLLOUT, *REWARD, "stage.args.num_generations=4", "logger=wandb", "run_name=logged"))
    rows = [json.loads(line) for line in (path / "samples.jsonl").read_text().splitlines()]
    assert rows and all(opened(row["images"][0]).size == (16, 16) for row in rows)
    tables = [json.loads(file.read_text()) for file in path.glob("wandb/*/files/media/table/*.json")]
    cells = [row[table["columns"].index("images")] for table in tables for row in table["data"]]
    assert cells and set(cells) == {"Image"}  # which stand in the table's artifact
    staged = [file.read_bytes()[:4] for file in path.glob("wandb/artifacts/staging/*")]
    assert b"\x89PNG" in staged


@pytest.mark.parametrize(
    ("stage", "options", "message"),
    [
        ("orpo", SMALL, "`ORPOTrainer` doesn't read: .*no collator for images"),
        ("online_dpo", (*ROLLOUT, *REWARD), "`OnlineDPOTrainer` doesn't read: its prompts are text"),
        ("sft", (*SMALL, "+stage.args.packing=true"), "`stage.args.packing` doesn't go with images"),
        ("dpo", (*SMALL, "+stage.args.precompute_ref_log_probs=true"), "precompute_ref_log_probs.*images"),
        ("dpo", (*SMALL, "stage.args.max_length=16"), "rows with images can't be cut"),
        ("ppo", (*ROLLOUT, "stage.args.steps_per_generation=2", "reward=http", "reward.http.url=http://127.0.0.1:9/"),
         "`reward.http` sends text alone"),
        ("collect", ("reward=none",), "`stage=collect` keeps text alone"),
        ("paraphrase", (), "`stage=paraphrase` writes text"),
    ],
)  # fmt: skip
def test_what_reads_no_images_is_refused(run, stage, options, message):
    with pytest.raises(ConfigError, match=message):
        run(stage, *options, f"run_name=refused_{stage}")


def test_a_model_that_reads_text_alone_is_refused(run):
    for stage, options in (
        ("sft", SMALL),
        ("evaluate", ("stage.policies={sft: 'demo:sft', ppo: null, dpo: null}", "stage.baseline=sft")),
    ):
        with pytest.raises(ConfigError, match="has images, and the model of .* reads text alone"):
            run(stage, *options, "run_name=refused", model=False)


def test_a_judge_of_text_is_refused(run, folder):
    policies = (f"stage.policies={{sft: '{folder}/vlm', ppo: null, dpo: null}}", "stage.baseline=sft", "reward=none")
    with pytest.raises(ConfigError, match="the judge reads text alone"):
        run("evaluate", *policies, "judge=model", "judge.path=demo:sft", "run_name=judged", model=False)


def test_label_refuses_candidates_with_images(folder):
    row = {"prompt": "is it red ?", "images": ["red.png"], "candidates": [{"completion": "a"}, {"completion": "b"}]}
    (folder / "candidates.jsonl").write_text(json.dumps(row))
    with pytest.raises(ConfigError, match="has images, and `stage=label` shows text alone"):
        read_candidates(str(folder / "candidates.jsonl"))


def test_the_plan_of_a_run_counts_the_tokens_of_images(compose, folder, capsys):
    cfg = compose("stage=dpo", f"runs_dir={folder}", "project=dry", "data=files", f"data.paths={folder}/pairs.jsonl",
                  "model=hf", f"model.path={folder}/vlm", *SMALL)  # fmt: skip
    show_plan(cfg)
    assert "<image> <image> <image> <image> " in capsys.readouterr().out
