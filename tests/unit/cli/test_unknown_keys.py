"""Keys of a command line that the config doesn't have."""

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
