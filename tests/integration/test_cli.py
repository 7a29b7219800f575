"""The command line: what a new user mistypes ends in one message, at once, and nothing is written."""

import json
import logging
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from rlhf_trl.cli import app, overrides
from rlhf_trl.cli import main as cli
from rlhf_trl.config.command_line import quote_text, unquote_text
from rlhf_trl.config.groups import option_groups
from rlhf_trl.runs.paths import conf_dir

ROOT = conf_dir().parent


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["stage.args.bta=1"], ["`stage.args.beta=1`"]),
        (["+stage.args.bta=1"], ["`stage.args.bta`", "PPOConfig", "`beta`"]),
        (["stage.args.max_grad_norm=1"], ["`+stage.args.max_grad_norm=1`"]),
        (["stage.args.max_grad_nrm=1"], ["`+stage.args.max_grad_norm=1`"]),
        (["+stage.args.beta=1"], ["Use it without the plus: `stage.args.beta=1`"]),
        (["stage.arg.beta=1"], ["`stage.args.beta=1`"]),
        (["stage=ppp"], ["`ppo`"]),
        (["model=dmeo"], ["`demo`"]),
        (["reward=[demo,modle]"], ["`modle`", "`model`"]),
        (["experiment=nope"], ["`experiment=nope`", "`reviews/...`", "`own/...`"]),
        (["experiment=reviews_tiny_sft"], ["Use `experiment=reviews/tiny/sft`."]),
        (["experiment=reviews/tiny/stf"], ["no option `reviews/tiny/stf`. Did you mean `reviews/tiny/sft`"]),
        (["stage=sft", "reward=model"], ["`stage=sft` doesn't read the group `reward`", "`stage=ppo`"]),
        (["stage=sft", "reward_norm.clip=1"], ["`stage=sft` doesn't read the group `reward_norm`", "`stage=ppo`"]),
        (["critic.path=x"], ["the chosen option of `critic` has no keys. Set `critic=...` as well: adapter, head"]),
        (["data.feedback.use=x"], ["`data.feedback` has none here. Set `data/feedback=...` as well"]),
        (["foo=1"], ["no key `foo`", "`seed`"]),
        (["sed=1"], ["`seed=1`"]),
        (["+stage=sft"], ["Use it without the plus: `stage=sft`"]),
        (["+foo=1"], ["`+foo=1`", "nothing reads"]),
        (["+model.revison=main"], ["`model.revision=...`"]),
        (["dpo"], ["`stage=dpo`"]),
        (["stage.args.beta=0.1,0.2"], ["launch/sweep.py -m stage.args.beta=0.1,0.2`", "[0.1,0.2]"]),
        (["stage.args=3"], ["`stage.args`"]),
        (["seed=[1,"], ["`seed=[1,`"]),
        (["stage=sft", "=3"], ["`=3` has no key"]),
        (["stage=null"], ["names no option of the group `stage`", "`ppo`"]),
        (["logger=null"], ["`logger=none`"]),
        (["stage=[sft,ppo]"], ["the group `stage` takes one option"]),
        (["stage=../model/demo"], ["leads out of the group `stage`"]),
        (["~model"], ["`~model` removes a key that is read"]),
        (["~logger"], ["`logger=none`"]),
        (["~seed"], ["`~seed` removes a key that is read", "`seed=...`"]),
        (["stage=sft", "~stage.dataset_type"], ["`~stage.dataset_type` removes a key that is read"]),
        (["~stage.args.output_dir"], ["`~stage.args.output_dir` removes a key that is read"]),
        (["--stage", "sft"], ["Keys have no dashes: use `stage=...`"]),
        (["--stage=sft"], ["use `stage=sft`"]),
        (["seed.value=3"], ["`seed` is 42 and holds no keys. Use `seed=3`"]),
        (["+seed.value=3"], ["`+seed.value=3` adds a key that nothing reads"]),
        (["args.learning_rate=1"], ["`stage.args.learning_rate=1`"]),
        (["learning_rate=1"], ["`stage.args.learning_rate=1`"]),
        (["stage.learning_rate=1"], ["`stage.args.learning_rate=1`"]),
        (["learing_rate=1"], ["`stage.args.learning_rate=1`"]),
        (["stage.args.lr=1"], ["no key `stage.args.lr`", "`stage.args.learning_rate=1`"]),
        (["lr=1"], ["`stage.args.learning_rate=1`"]),
        (["epochs=3"], ["`stage.args.num_train_epochs=3`"]),
        (["stage.args.batch_size=4"], ["`stage.args.per_device_train_batch_size=4`"]),
        (["kl_coef=1"], ["`stage.args.beta=1`"]),
        (["total_episode=4"], ["`stage.args.total_episodes=4`"]),
        (["model_path=x"], ["`model.path=x`"]),
        (["adapter=lora", "adapter.lora_r=8"], ["`adapter.peft.r=8`"]),
        (["lora=true"], ["`adapter=lora`"]),
        (["temprature=1"], ["`stage.args.temperature=1`"]),
        (["max_grad_norm=1"], ["`+stage.args.max_grad_norm=1`"]),
        (["stage.args.learning_rate", "=", "1e-4"], ["a space around `=`. Use `stage.args.learning_rate=1e-4`"]),
        (["++seed=abc"], ["`seed` is 'abc'"]),
        (["++sed=1"], ["`++sed=1` adds a key that nothing reads", "`seed=...`"]),
        (["data.x=[a,b"], ["`[` isn't closed", """`'data.x="[a,b"'`"""]),
        (["runs_dir=a, b"], ["text with a comma is `'runs_dir=\"a, b\"'`"]),
        (["--config-dir", "nowhere"], ["`--config-dir nowhere`"]),
        (["-m", "stage.args.bta=1,2"], ["`stage.args.beta=1`"]),
    ],
)
def test_a_mistake_gets_a_suggestion(command, tmp_path, words, expected):
    status, _, message = command(*words)
    assert status == 2 and message.startswith("Error: ") and "Traceback" not in message
    assert all(part in message for part in expected), message
    assert list(tmp_path.iterdir()) == []


MEANT = [
    ("run_name=1_1", "1_1"),
    ("run_name=1e5", "1e5"),
    ("model.run=2024", "2024"),
    ("model.run=null", None),
    ("project=true", "true"),
    ("data.system_prompt=123", "123"),
    ("data.columns.prompt=1", "1"),
    ("data.paths=lr=1e-4/rows.jsonl", "lr=1e-4/rows.jsonl"),
    ("data.paths=données.jsonl", "données.jsonl"),
    ("data.paths=rows[1].jsonl", "rows[1].jsonl"),
    ("data.paths=[1_1,é.jsonl]", ["1_1", "é.jsonl"]),
    ("+stage.policies.new=2024", "2024"),
    ("stage.policies=[2024,sft]", ["2024", "sft"]),
    ("reward.format.kwargs.pattern=(?s)it's \\d+\\", "(?s)it's \\d+\\"),
    ("judge.template=<|im_end|> {a}", "<|im_end|> {a}"),
    ("seed=1_1", 11),
    ("stage.args.beta=1e-4", 1e-4),
]


@pytest.mark.parametrize(("word", "value"), MEANT)
def test_text_keeps_its_value(word, value):
    (meant,) = quote_text([word])
    assert OverridesParser.create().parse_override(meant).value() == value
    assert unquote_text([meant]) == [word] and quote_text([meant]) == [meant]


@pytest.mark.parametrize(
    "word", ["seed=[1,", "dpo", "été=1", "-m", "--config-dir", "stage.args.beta=0.1,0.2", "run_name="]
)
def test_words_that_are_no_text_are_left_alone(word):
    assert quote_text([word]) == [word]


def test_names_that_look_like_numbers_are_names(command, tmp_path):
    few = ["data.max_samples=16", "data.max_eval_samples=8", "stage.args.max_steps=1"]
    status, _, message = command("stage=sft", "run_name=1_1", *few)
    assert status == 0, message
    record = json.loads((tmp_path / "runs/default/1_1/run.json").read_text())
    assert record["command"].split()[2:4] == ["stage=sft", "run_name=1_1"]  # as it was typed
    status, shown, message = command("stage=dpo", "model.run=1_1", "debug=dry_run", *few)
    assert status == 0 and "runs/default/1_1" in shown, message


def test_a_name_that_a_file_reads_as_a_number_is_refused(command, tmp_path):
    (tmp_path / "conf/experiment").mkdir(parents=True)
    (tmp_path / "conf/experiment/mine.yaml").write_text("# @package _global_\nrun_name: 1_1\nmodel: {run: 2024}\n")
    status, _, message = command("--config-dir", "conf", "stage=sft", "experiment=mine")
    assert status == 2 and '`run_name: "..."`' in message and '`run: "..."`' in message, message


@pytest.mark.parametrize("value", ["a=b", "it's", "[x", "a, b", 'say "x"', "~/x", "\u65e5", "{a", "#1", "a(b)"])
def test_a_suggested_quoted_word_has_the_value(value):
    (word,) = shlex.split(overrides._as_text("run_name", value))
    assert overrides.compose([word])[0].run_name == value


def test_what_may_be_taken_away(command):
    for words in (["stage=evaluate", "~stage.policies.dpo"], ["~stage.args.learning_rate"], ["~reward.gold"]):
        assert overrides.compose(words)[1] == []


def test_all_problems_are_reported_at_once(command):
    words = ["stage=sft", "model=hf", "model.path=/nowhere", "stage.args.lerning_rate=1", "stage.args.bf16=maybe"]
    status, _, message = command(*words, "sed=1", "+stage.args.packin=true")
    assert status == 2 and "5 problems" in message
    for part in ("`/nowhere`", "`stage.args.learning_rate=1`", "`stage.args.bf16`", "`seed=1`", "`packing`"):
        assert part in message


def test_the_checks_import_nothing_heavy():
    code = (
        "import sys; sys.argv = ['train.py', 'model.path=/nowhere', 'stage.args.bta=1']\n"
        "from rlhf_trl.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'transformers', 'trl', 'datasets', 'numpy', 'peft') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "2 problems" in done.stderr and done.stdout.strip() == "[]"


def test_the_config_is_shown(command):
    status, shown, _ = command("--cfg", "job")
    assert status == 0 and "stage:" in shown and "PPOConfig" in shown


def test_a_users_own_options_stand_beside_ours(command, tmp_path):
    (tmp_path / "mine" / "reward").mkdir(parents=True)
    (tmp_path / "mine" / "reward" / "brief.yaml").write_text(
        "brief: {_target_: rlhf_trl.rewards.FunctionReward, function: my_rewards.brevity, weight: 2.0}\n"
    )
    words = ["--config-dir", "mine", "reward=brief", "stage.args.num_generations=0"]
    _, _, message = command(*words)
    assert "no module `my_rewards`" in message
    (tmp_path / "my_rewards.py").write_text(
        "def brevity(completions, **kwargs):\n    return [0.0] * len(completions)\n"
    )
    _, _, message = command(*words)
    assert "my_rewards" not in message
    (tmp_path / "my_rewards.py").write_text(
        "def brevety(completions, **kwargs):\n    return [0.0] * len(completions)\n"
    )
    _, _, message = command(*words)
    assert "`my_rewards` has no `brevity`. Did you mean `brevety`?" in message


GLOBAL = "# @package _global_\n"


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (GLOBAL + "proyect: mine", ["`proyect` in `d/experiment/mine.yaml`", "`project`"]),
        (GLOBAL + "model: {pth: x}", ["`model.pth` in `d/experiment/mine.yaml`", "`model.path`"]),
        (GLOBAL + "stage: {argz: {x: 1}}", ["`stage.argz` in `d/experiment/mine.yaml`", "`stage.args`"]),
        (
            GLOBAL + "stage: {args: {bta: 1}}",
            ["`stage.args.bta` is no argument of `rlhf_trl.ppo.PPOConfig`", "`beta`"],
        ),
        ("seed: 3", ["`d/experiment/mine.yaml` has no line `# @package _global_`"]),
        ("defaults: [override /stage: sft]\nseed: 3", ["has no line `# @package _global_`"]),
        ("# My task\n" + GLOBAL + "seed: 3", ["the line `# @package _global_` below others", "Move it to the top"]),
        (GLOBAL + "- seed: 3", ["`d/experiment/mine.yaml` must hold keys", "holds a list"]),
        (GLOBAL + "some text", ["holds `some text`"]),
        (GLOBAL + "seed: [", ["`d/experiment/mine.yaml`, line 2, is no YAML"]),
        (GLOBAL + "defaults: [/stage: sft]", ["`d/experiment/mine.yaml`", "`- override /stage: sft`"]),
    ],
)
def test_an_experiment_file_is_held_to_what_the_command_line_is(command, tmp_path, content, parts):
    (tmp_path / "d" / "experiment").mkdir(parents=True)
    (tmp_path / "d" / "experiment" / "mine.yaml").write_text(content)
    status, _, message = command("--config-dir", "d", "experiment=mine", "debug=dry_run")
    assert status == 2 and message.startswith("Error: ") and "problems" not in message
    assert all(part in message for part in parts), message


def test_an_experiment_file_may_add_what_a_command_line_may(command, tmp_path):
    (tmp_path / "d" / "experiment").mkdir(parents=True)
    (tmp_path / "d" / "experiment" / "mine.yaml").write_text(
        GLOBAL + "defaults: [/data@ptx_data: demo, override /stage: ppo, override /reward: [demo, eos]]\n"
        "stage: {args: {ptx_coef: 0.1, max_grad_norm: 3}}\nreward: {eos: {weight: 2}, mine: {_target_: "
        "rlhf_trl.rewards.FunctionReward, function: rlhf_trl.rewards.shaping.eos}}\nhydra: {verbose: false}\n"
        "callbacks: {x: {_target_: rlhf_trl.callbacks.base.SaveAndStop}}\ndry_run: true"
    )
    status, _, message = command("--config-dir", "d", "experiment=mine", "sed=x")
    assert status == 2 and message.startswith("Error: `sed=x`")


@pytest.mark.parametrize("name", sorted(option_groups([str(conf_dir())])["experiment"]))
def test_our_experiments_hold_no_key_that_nothing_reads(name):
    assert overrides.compose([f"experiment={name}"])[1] == []


def test_the_first_rank_speaks_for_all_that_the_launcher_ends_with_it(command, monkeypatch):
    class Ended(Exception):
        pass

    def end(seconds):
        raise Ended

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(app.time, "sleep", end)
    with pytest.raises(Ended):
        command("stage=ppp")


def test_the_report_of_torchrun_ends_with_our_message(command, monkeypatch, tmp_path):
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    status, _, message = command("stage=ppp")
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=status, error_file=str(file))
    report = str(ChildFailedError("train.py", {0: failure})).rstrip("=\n ")
    assert report.endswith(f"traceback : {message.strip()}")


def test_another_rank_speaks_of_an_error_of_its_own(command, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(app.time, "sleep", lambda seconds: None)
    status, _, message = command("stage=ppp")
    assert status == 2 and message.startswith("\nOn rank 1: Error: `stage=ppp`")


def test_the_log_of_a_rank_has_its_error_before_it_can_be_ended(command, monkeypatch, tmp_path):
    class Ended(Exception):
        pass

    def end(seconds):
        raise Ended

    handler = logging.FileHandler(tmp_path / "train_rank_1.log")
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(app.time, "sleep", end)
    with pytest.raises(Ended):
        command("stage=ppp")
    handler.close()
    assert (tmp_path / "train_rank_1.log").read_text().startswith("Error: `stage=ppp`")


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_a_rank_that_is_no_number_is_reported(command, monkeypatch, name):
    monkeypatch.setenv(name, "abc")
    status, _, message = command("stage=sft", "debug=dry_run")
    assert status == 2 and message.startswith(f"Error: the environment variable `{name}` is 'abc'")


@pytest.mark.parametrize("variable", ["ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"])
def test_a_launcher_starts_no_sweep(command, monkeypatch, variable):
    monkeypatch.setenv(variable, "no")
    status, _, message = command("-m", "stage=dpo", "seed=1,2")
    assert status == 2 and "launch/sweep.py -m stage=dpo seed=1,2`" in message


def test_the_first_line_of_a_run_stands_there_before_torch_is_imported(tmp_path):
    code = """
import sys
sys.argv = ["train.py", "stage=ppo"]
import rlhf_trl.cli.main as cli
def stop(cfg):
    print("torch" in sys.modules)
    sys.exit()
cli.check = stop
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "rlhf_trl ppo -> runs/default/ppo\nFalse\n"


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["--cfg", "job"], ["stage=sft", "--cfg", "job"]])
def test_what_only_shows_something_imports_no_torch_and_survives_a_closed_pipe(words):
    code = (
        f"import sys; sys.argv = ['train.py', *{words}]\n"
        "from rlhf_trl.cli.main import main\nmain()\n"
        "assert not {'torch', 'transformers', 'trl', 'datasets', 'numpy', 'peft'} & sys.modules.keys()"
    )
    command = f"set -o pipefail; {shlex.quote(sys.executable)} -c {shlex.quote(code)}"
    for reader in ("cat", "head -n 1", "true"):
        done = subprocess.run(["bash", "-c", f"{command} | {reader}"], cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


def test_a_refused_run_leaves_the_directory_as_it_was(command, tmp_path):
    run_dir = tmp_path / "runs/default/dpo"
    run_dir.mkdir(parents=True)
    (run_dir / "run.json").write_text('{"status": "done", "stage": "dpo"}')
    status, _, message = command("stage=dpo")
    assert status == 2 and all(way in message for way in ("resume=true", "run_name=", "overwrite=true"))
    assert [path.name for path in run_dir.iterdir()] == ["run.json"]


def test_unexpected_errors_keep_their_traceback(command, monkeypatch):
    monkeypatch.setattr(cli, "check", json.loads)  # which no config suits
    with pytest.raises(TypeError, match="the JSON object must be str"):
        command("stage=dpo", "debug=dry_run")


def test_ctrl_c_ends_in_one_line(command, monkeypatch):
    def interrupted(cfg):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "check", interrupted)
    status, _, message = command("stage=dpo", "debug=dry_run")
    assert status == 130 and len(message.splitlines()) == 1


def test_nothing_phones_home_unless_asked(command, monkeypatch):
    for name in cli.DEFAULT_ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    command("foo=1")
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1" and os.environ["WANDB_ERROR_REPORTING"] == "false"
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "0")
    command("foo=1")
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "0"


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "ppo", "chat"])
def test_a_dry_run_prints_the_plan_and_leaves_nothing(command, tmp_path, stage):
    limits = [] if stage == "chat" else ["data.max_samples=128", "data.max_eval_samples=8"]
    status, shown, message = command(f"stage={stage}", "debug=dry_run", *limits)
    assert status == 0, message
    assert "Dry run: nothing was started" in shown and ("128 rows for train" in shown) == (stage != "chat")
    if stage == "sft":
        assert "4 optimizer steps" in shown and "[[" in shown  # what is trained on
    if stage == "ppo":
        assert "128 completions of 128 prompts" in shown and "= 16 optimizer steps" in shown
    assert list(tmp_path.iterdir()) == []


def test_a_smoke_run_takes_two_steps_and_again(command, tmp_path):
    for _ in range(2):
        status, _, message = command("stage=dpo", "debug=smoke", "data.max_samples=64")
        assert status == 0, message
    assert (tmp_path / "runs/default/smoke_dpo/model.safetensors").is_file()
    assert (tmp_path / "runs/default/smoke_dpo/.hydra/rank_0/config.yaml").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "reward", "ppo", "orpo", "kto", "rloo", "grpo"])
def test_smoke_goes_with_every_training_stage(command, stage):
    status, _, message = command(f"stage={stage}", "debug=smoke")
    assert status == 0, message
    metrics = json.loads(Path(f"runs/default/smoke_{stage}/metrics.json").read_text())
    assert max(entry["step"] for entry in metrics["history"]) == 2


def test_a_broken_row_of_a_relative_path_is_a_message(command, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "compl\n')
    status, _, message = command("stage=sft", "data=files", "data.paths=rows.jsonl", "debug=dry_run")
    assert status == 2 and "rows.jsonl, line 2" in message and "Traceback" not in message


def test_a_multirun_on_one_device_gives_each_job_a_directory(command, tmp_path):
    words = ["stage=dpo", "data.max_samples=32", "data.max_eval_samples=8", "stage.args.max_steps=1"]
    status, _, message = command("-m", *words, "stage.args.beta=0.1,0.2")
    assert status == 0, message
    jobs = sorted(Path("runs/default/dpo_sweep").glob("*/run.json"))
    assert [job.parent.name for job in jobs] == ["0", "1"] and not Path("runs/default/dpo").exists()
    for number, job in enumerate(jobs):  # the recorded command runs this job alone, in its own directory
        assert json.loads(job.read_text())["command"].endswith(f"0.{number + 1} run_name=dpo_sweep/{number}")


def test_a_deleted_working_directory_is_reported(tmp_path, monkeypatch, capsys):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2 and "The working directory was deleted" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
