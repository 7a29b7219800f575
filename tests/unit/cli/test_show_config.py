"""`--cfg job`: YAML, with a comment behind each value that names where it comes from."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from rlhf_trl.cli.overrides import composed, parse_command_line
from rlhf_trl.cli.show_config import annotated_config
from rlhf_trl.errors import ConfigError
from tests.helpers.configs import GROUPS, NEEDS, STAGES


def shown(*words: str, config: str = "train") -> str:
    return annotated_config(parse_command_line(["--cfg", "job", *words]), config)


def comments(text: str) -> dict[str, str]:
    """Return the comment behind each key of a YAML text; keys of equal names are the last one's."""
    pairs = [line.partition("  # ") for line in text.splitlines() if "  # " in line]
    return {line.partition(":")[0].strip(): comment for line, _, comment in pairs}


def test_each_value_names_the_file_that_set_it_last_or_the_command_line(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\nproject: own\nstage: {args: {beta: 0.3}}\n"
    )
    found = comments(
        shown("--config-dir", str(tmp_path), "stage=dpo", "model=hf", "adapter=qlora", "experiment=mine", "seed=3")
    )
    assert found["project"] == found["beta"] == f"{tmp_path}/experiment/mine.yaml"
    assert found["seed"] == "3, command line"  # of `stage.args`, a reference
    assert found["learning_rate"] == "5.0e-06, conf/adapter/qlora.yaml"
    assert found["dpo"] == "conf/adapter/qlora.yaml" and found["sft"] == "conf/adapter/qlora.yaml"
    assert found["max_length"] == "1024, conf/stage/_base/offline.yaml"
    assert found["dtype"] == "conf/model/hf.yaml" and found["load_in_4bit"] == "conf/adapter/qlora.yaml"
    found = comments(shown("stage=ppo", "stage.args.beta=0.2", "+stage.args.adam_beta1=0.8", "-p", "stage.args"))
    assert found["beta"] == found["adam_beta1"] == "command line"
    assert found["learning_rate"] == "conf/model/_demo/ppo.yaml"
    assert found["critic_learning_rate"] == "conf/critic/_values/demo/head.yaml"


@pytest.mark.parametrize("stage", STAGES)
def test_it_is_the_yaml_of_the_composed_config(stage):
    words = (
        [f"stage={stage}", "model=hf"] if "model" in composed("train", [f"stage={stage}"], ()) else [f"stage={stage}"]
    )
    text = shown(*words)
    assert OmegaConf.to_container(OmegaConf.create(text)) == OmegaConf.to_container(composed("train", words, ()))
    # A text of several lines has one comment, behind its last
    text = re.sub(r"(?m)^( *\w+: )'[^'\n]*\n[^']*'", r"\1''", text)
    bare = [line for line in text.splitlines() if not line.rstrip().endswith(":") and "  # " not in line]
    assert all(line.lstrip().startswith("- ") for line in bare)  # items of a list, whose key has the comment


@pytest.mark.parametrize("option", sorted(GROUPS["judge"]))
def test_texts_of_several_lines_stay_what_they_are(option):
    words = ["stage=evaluate", f"judge={option}", *NEEDS.get(f"judge/{option}", [])]
    assert yaml.safe_load(shown(*words)) == yaml.safe_load(OmegaConf.to_yaml(composed("train", words, ())))


def test_a_multirun_shows_its_first_job():
    found = comments(shown("-m", "stage=dpo", "stage.args.beta=0.3,0.2", config="sweep"))
    assert found["beta"] == "command line"
    assert "    beta: 0.3  #" in shown("-m", "stage=dpo", "stage.args.beta=0.3,0.2", config="sweep")


def test_a_node_or_a_value_alone():
    assert shown("stage=ppo", "-p", "stage.args.beta") == "0.05\n"
    assert shown("stage=ppo", "-p", "combine").startswith("# @package combine\n_target_: ")
    assert "${" not in shown("stage=ppo", "--resolve")
    with pytest.raises(ConfigError, match="names no node"):
        shown("stage=ppo", "-p", "stage.nothing")


def test_the_program_shows_it_and_names_a_misspelt_key():
    def run(*words: str):
        command = [sys.executable, "train.py", *words, "--cfg", "job"]
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3])

    assert "  beta: 0.1  # conf/stage/dpo.yaml\n" in run("stage=dpo").stdout
    wrong = run("stage=dpo", "stage.args.bta=1")
    assert wrong.returncode == 2 and "Did you mean `stage.args.beta=1`" in wrong.stderr
    several = run("stage=dpo", "stage.args.beta=1,2").stderr
    assert "one run takes one value" in several and "sweep.py -m stage.args.beta=1,2" in several
