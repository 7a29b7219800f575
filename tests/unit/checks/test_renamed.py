"""Former names of config keys and dot paths: each is an error that names the new one."""

import pytest
from hydra.utils import get_object

from rlhf_trl.checks import renamed

KEYS = {
    "stage.kind": "stage.dataset_type",
    "stage.lost": None,
    "reward.*.factor": "reward.*.weight",
    "normalizer": "reward_norm",
    "stage.args.kl_coef": "stage.args.beta",
}
DOT_PATHS = {"rlhf_trl.old": "rlhf_trl.data", "rlhf_trl.old.load": "rlhf_trl.tasks.demo.load"}


@pytest.fixture
def former_names(monkeypatch):
    monkeypatch.setattr(renamed, "RENAMED_KEYS", KEYS)
    monkeypatch.setattr(renamed, "RENAMED_DOT_PATHS", DOT_PATHS)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("stage.kind=prompt", "`stage.kind` was renamed to `stage.dataset_type`. Use `stage.dataset_type=prompt`."),
        ("+stage.kind=prompt", "`stage.kind` was renamed to `stage.dataset_type`. Use `stage.dataset_type=prompt`."),
        ("~stage.kind", "`stage.kind` was renamed to `stage.dataset_type`. Use `~stage.dataset_type`."),
        ("stage.lost=1", "`stage.lost` was removed: nothing reads it. Remove it."),
        (
            "reward.gold.factor=2",
            "`reward.gold.factor` was renamed to `reward.gold.weight`. Use `reward.gold.weight=2`.",
        ),
        ("normalizer=batch", "`normalizer` was renamed to `reward_norm`. Use `reward_norm=batch`."),
        ("normalizer.clip=3", "`normalizer` was renamed to `reward_norm`. Use `reward_norm.clip=3`."),
        ("+stage.args.kl_coef=0", "`stage.args.kl_coef` was renamed to `stage.args.beta`. Use `stage.args.beta=0`."),
    ],
)
def test_a_former_key_on_the_command_line_names_the_new_one(command, former_names, word, expected):
    status, _, message = command(word)
    assert status == 2 and message == f"Error: `{word}`: {expected}\n"


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        (
            "experiment",
            "# @package _global_\nstage: {kind: prompt}",
            "`stage.kind` was renamed to `stage.dataset_type`.",
        ),
        ("experiment", "# @package _global_\nstage: {lost: 1}", "`stage.lost` was removed: nothing reads it."),
        (
            "experiment",
            "# @package _global_\nstage: {args: {kl_coef: 1}}",
            "`stage.args.kl_coef` was renamed to `stage.args.beta`.",
        ),
        ("reward", "defaults: [demo, _self_]\ngold: {factor: 2}", "`reward.gold.factor` was renamed to"),
        ("data", "_target_: rlhf_trl.old.load\n_partial_: true", "Use `rlhf_trl.tasks.demo.load`."),
        ("data", "_target_: rlhf_trl.old.load_files\n_partial_: true", "Use `rlhf_trl.data.load_files`."),
    ],
)
def test_a_former_name_in_a_file_names_the_new_one(command, former_names, tmp_path, file, content, expected):
    (tmp_path / "d" / file).mkdir(parents=True)
    (tmp_path / "d" / file / "mine.yaml").write_text(content)
    status, _, message = command("--config-dir", "d", f"{file}=mine", "debug=dry_run")
    assert status == 2 and expected in message and "problems:" not in message, message


def test_a_removed_key_is_a_stages_own_where_its_function_is(former_names):
    values = {"stage": {"lost": 1, "run": {"_target_": "mine.run"}}}
    assert renamed.renamed_problems(values) == []


@pytest.mark.parametrize(("old", "new"), renamed.RENAMED_DOT_PATHS.items())
def test_every_former_dot_path_is_gone_and_its_new_one_is_there(old, new):
    assert get_object(new) is not None
    with pytest.raises(Exception, match="Error loading"):
        get_object(old)
