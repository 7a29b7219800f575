"""Keys of a command line that the config doesn't have."""

import pytest

from rlhf_trl.cli.overrides import compose
from rlhf_trl.cli.unknown_keys import SYNONYMS
from rlhf_trl.config.argument_names import arguments
from rlhf_trl.config.values import as_dict, nodes
from tests.helpers.configs import STAGES, composed


def test_every_synonym_names_a_key():
    names: set[str] = set()
    for stage in STAGES:
        for _, node in nodes(as_dict(composed("train", f"stage={stage}"), resolve=False)):
            names |= {str(name) for name in node} | set(arguments(str(node.get("_target_"))) or ())
    names |= set(arguments("peft.LoraConfig") or ())
    assert set(SYNONYMS.values()) <= names


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (
            ["stage=evaluate", "stage.policies={sft:sft,mine:mine}"],
            "`stage.policies.mine` is a new key. Add it by itself: `+stage.policies.mine=mine`.",
        ),
        (
            ["stage=dpo", "stage.args={beta:1,bta:2}"],
            "`stage.args.bta=2`: there is no key `stage.args.bta`. Did you mean `stage.args.beta=2`?",
        ),
        (
            ["stage=evaluate", "stage.policies=[sft,mine]"],
            "`stage.policies=[sft,mine]` is a list, and `stage.policies` holds keys (`sft`, `ppo`, `dpo`). Set one of "
            "them, or add one: `+stage.policies.NAME=...`.",
        ),
    ],
)
def test_several_keys_at_once(words, problem):
    assert compose(words)[1] == [problem]


def test_keys_of_hydra():
    (problem,) = compose(["hydra.rum.dir=x"])[1]
    assert problem.startswith("`hydra.rum.dir=x`: Hydra has no such key. `") and "--cfg hydra` prints" in problem
