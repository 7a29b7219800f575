"""The scripts for Slurm, run with stand-ins for its commands and for the launchers: what they start, and requeue."""

import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

from rlhf_trl.checks import find_problems
from rlhf_trl.cli import overrides
from rlhf_trl.cli.launcher import launch_dir

ROOT = launch_dir().parent
SCRIPTS = sorted((ROOT / "launch" / "slurm").glob("*.sbatch"))
PAGES = [*SCRIPTS, *sorted(ROOT.glob("docs/*.md")), ROOT / "README.md"]
# A task for each node, unless an option says how many; a signal reaches all, as srun has it
SRUN = """
options=() tasks=$SLURM_NNODES
while [[ $1 == --* ]]; do
    options+=("$1")
    [[ $1 == --ntasks=* ]] && tasks=${1#*=}
    shift
done
echo "${options[*]}" >> srun.txt
pids=()
trap 'kill -USR1 "${pids[@]}"' USR1
trap 'kill "${pids[@]}"' TERM
for ((i = 0; i < tasks; i++)); do
    SLURM_PROCID=$i "$@" &
    pids+=($!)
done
worst=0
for pid in "${pids[@]}"; do
    wait "$pid"
    status=$?
    while kill -0 "$pid" 2>/dev/null; do wait "$pid"; status=$?; done
    ((status > worst)) && worst=$status
done
exit "$worst"
"""
SCONTROL = """
if [ "$1" = show ]; then printf '%s\\n' gpu01 gpu02 gpu03 | head -n "$SLURM_NNODES"; else echo "$@" >> scontrol.txt; fi
"""
# What starts the ranks: it ends at once or, where a file `waits` is there, after USR1
LAUNCH = """
name=${0##*/}
[ "$name $1 $2" = "python -m rlhf_trl.cli.nodes" ] && name=nodes
{ printf '%s ' "$name"; printf '%q ' "$@"; echo; } >> "calls_$name.txt"
[ "$name" = nodes ] && exit 0
asked=false
trap 'asked=true' USR1
trap 'exit 143' TERM
while { [ -f waits ] || [ "$name" = vllm ]; } && ! $asked; do sleep 0.02; done
$asked && exit 1
[ ! -f fails ]
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Make the folder of a clone whose commands are stand-ins, and return it."""
    for name, text in {
        "srun": SRUN,
        "scontrol": SCONTROL,
        **dict.fromkeys(("accelerate", "python", "vllm"), LAUNCH),
    }.items():
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!/bin/bash\n{text}")
        file.chmod(0o755)
    (tmp_path / "train.py").touch()
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    return tmp_path


def start(cluster: Path, script: str, *words: str, nodes: int = 2, gpus: int = 8, **environment) -> subprocess.Popen:
    slurm = {"NNODES": nodes, "GPUS_ON_NODE": gpus, "JOB_ID": 4711, "JOB_NODELIST": "gpu[01-03]", "CPUS_PER_TASK": 8}
    path = {"PATH": f"{cluster / 'bin'}:{os.environ['PATH']}"}
    named = {f"SLURM_{name}": str(value) for name, value in slurm.items()}
    command = ["bash", str(ROOT / "launch" / "slurm" / f"{script}.sbatch"), *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=cluster, env={**os.environ, **path, **named, **environment}, **pipes)


def calls(cluster: Path, name: str) -> list[list[str]]:
    """Return the words of each call of a command, in no order: tasks run side by side."""
    file = cluster / f"calls_{name}.txt"
    return sorted(shlex.split(line) for line in file.read_text().splitlines()) if file.exists() else []


def wait_for(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it didn't come"
        time.sleep(0.02)


def launched(words: list[str]):
    """Return the arguments of `accelerate launch`, by its own parser."""
    assert words[:2] == ["accelerate", "launch"]
    return launch_command_parser().parse_args(words[2:])


def test_one_gpu_is_one_process_without_a_launcher(cluster):
    process = start(cluster, "one_node", "stage=ppo", "data.system_prompt='Be kind, and brief.'", nodes=1, gpus=1)
    assert process.wait(timeout=30) == 0
    (words,) = calls(cluster, "python")
    assert words == ["python", "train.py", "stage=ppo", "data.system_prompt='Be kind, and brief.'", "resume=auto"]
    assert not (cluster / "scontrol.txt").exists()


def test_several_gpus_of_a_node_are_ranks_of_one_launch(cluster):
    process = start(cluster, "one_node", "stage=sft", nodes=1, gpus=4, ACCELERATE="zero3")
    assert process.wait(timeout=30) == 0
    (words,) = calls(cluster, "accelerate")
    args = launched(words)
    assert (args.config_file, args.num_processes) == ("launch/accelerate/zero3.yaml", 4)
    assert [args.training_script, *args.training_script_args] == ["train.py", "stage=sft", "resume=auto"]


def test_each_node_launches_its_own_ranks(cluster):
    words = ("stage=ppo", "data.system_prompt='Be kind, and brief.'")
    assert start(cluster, "multi_node", *words).wait(timeout=30) == 0
    found = [launched(each) for each in calls(cluster, "accelerate")]
    assert [each.machine_rank for each in found] == [0, 1]
    for args in found:
        assert (args.num_machines, args.num_processes, args.main_process_ip) == (2, 16, "gpu01")
        assert args.main_process_port == 20000 + 4711 and args.config_file == "launch/accelerate/fsdp2.yaml"
        assert [args.training_script, *args.training_script_args] == ["train.py", *words, "resume=auto"]
    met = calls(cluster, "nodes")
    assert [each[3:] for each in met] == [
        ["--hosts", "gpu01", "gpu02", "--rank", rank, "--port", "24711"] for rank in ("0", "1")
    ]


def test_the_last_node_serves_and_the_others_train(cluster):
    process = start(cluster, "vllm", "stage=grpo", nodes=3, MODEL="/shared/model", VLLM="--max-model-len 4096")
    assert process.wait(timeout=30) == 0
    (server,) = calls(cluster, "vllm")
    assert server[:3] == ["vllm", "serve", "/shared/model"] and server[-2:] == ["--max-model-len", "4096"]
    assert server[server.index("--weight-transfer-config") + 1] == '{"backend": "nccl"}'
    assert any("--nodelist=gpu03" in line for line in (cluster / "srun.txt").read_text().splitlines())
    found = [launched(each) for each in calls(cluster, "accelerate")]
    assert [(each.machine_rank, each.num_machines, each.num_processes) for each in found] == [(0, 2, 16), (1, 2, 16)]
    assert "stage.args.vllm_server_host=gpu03" in found[0].training_script_args
    # The words are those of a config that passes the checks
    given = [word for word in found[0].training_script_args if word not in ("model.path=/shared/model", "resume=auto")]
    cfg, problems = overrides.compose([*given, "model.path=organization/name"])
    assert not problems and cfg.stage.args.vllm_mode == "server"


@pytest.mark.parametrize(
    ("nodes", "environment", "part"), [(2, {}, "MODEL: is not set"), (1, {"MODEL": "m"}, "one more must train")]
)
def test_a_server_needs_a_model_and_a_node_more(cluster, nodes, environment, part):
    process = start(cluster, "vllm", "stage=grpo", nodes=nodes, **environment)
    said, _ = process.communicate(timeout=30)
    assert process.returncode != 0 and part in said and not (cluster / "srun.txt").exists()


@pytest.mark.parametrize("script", [path.stem for path in SCRIPTS])
def test_before_the_time_limit_the_ranks_save_and_the_job_is_queued_again(cluster, script):
    (cluster / "waits").touch()
    process = start(cluster, script, "stage=sft", nodes=1 if script == "one_node" else 2, MODEL="/shared/model")
    wait_for(lambda: len(calls(cluster, "accelerate")) == (2 if script == "multi_node" else 1))
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)  # of a preemption: the script waits for the ranks, which get it from Slurm
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=30) == 1
    assert (cluster / "scontrol.txt").read_text() == "requeue 4711\n"


def test_a_job_that_never_gets_done_is_not_queued_again_for_ever(cluster):
    """Such as one whose time limit is over before its models are loaded."""
    (cluster / "waits").touch()
    process = start(cluster, "one_node", "stage=sft", nodes=1, SLURM_RESTART_COUNT="3", REQUEUES="3")
    wait_for(lambda: calls(cluster, "accelerate"))
    time.sleep(0.2)
    process.send_signal(signal.SIGUSR1)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 1 and "queued again 3 times" in said and "REQUEUES" in said
    assert not (cluster / "scontrol.txt").exists()


@pytest.mark.parametrize("asked", [False, True])
def test_a_run_that_fails_or_is_done_is_not_queued_again(cluster, asked):
    (cluster / ("waits" if asked else "fails")).touch()
    process = start(cluster, "one_node", "stage=sft", nodes=1)
    wait_for(lambda: calls(cluster, "accelerate"))
    if asked:
        (cluster / "waits").unlink()
    assert process.wait(timeout=30) == (0 if asked else 1)
    assert not (cluster / "scontrol.txt").exists()


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_is_valid_and_asks_for_what_it_needs(path):
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True).stderr == ""
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", path.read_text(), re.M))
    assert asked["ntasks-per-node"] == "1" and asked["open-mode"] == "append" and "requeue" in asked
    seconds = int(re.fullmatch(r"B:USR1@(\d+)", asked["signal"])[1])
    (patience,) = re.findall(r"TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+)", path.read_text())
    assert 300 <= int(patience) < seconds
    assert max(map(len, path.read_text().splitlines())) <= 120


def test_the_scripts_forward_signals_that_torchrun_knows():
    from torch.distributed.run import get_args_parser

    (line,) = {line for path in SCRIPTS for line in re.findall(r"PET_SIGNALS_TO_HANDLE=(\S+)", path.read_text())}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PET_SIGNALS_TO_HANDLE", line)
        assert get_args_parser().parse_args(["train.py"]).signals_to_handle == line
    assert all(hasattr(signal, name) for name in line.split(",")) and "SIGUSR1" in line


def test_the_words_of_a_submission_pass_the_checks(tmp_path, monkeypatch):
    """Those in the scripts' heads and on the pages, each once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    texts = [re.sub(r"\\\n\s*#?\s*", " ", path.read_text(encoding="utf-8")) for path in PAGES]
    line = re.compile(r"^[#\s]*((?:\w+=\S+ |\w+=\".*?\" )*sbatch .*\.sbatch .*)$", re.M)
    lines = [shlex.split(found, comments=True) for text in texts for found in line.findall(text)]
    assert len(lines) > len(SCRIPTS)
    submitted = set()
    for words in lines:
        (script,) = [word for word in words if word.endswith(".sbatch")]
        assert (ROOT / script).is_file()
        given = {word for word in words[words.index(script) + 1 :] if not word.startswith("model.path=")}
        submitted.add(frozenset(given | ({"model=hf"} if "vllm" in script else set())))
    for given in submitted:
        path = ["model.path=organization/name"] if "model=hf" in given else []
        cfg, problems = overrides.compose([*sorted(given, reverse=True), *path])
        assert not problems and find_problems(cfg) == [], given
