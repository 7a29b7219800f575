"""Data of the reward model in the rounds of `pipeline=iterated`: its parts, their shares, and what is held out."""

import json
import re
from pathlib import Path

import pytest

from rlhf_trl.build import instantiate_data
from rlhf_trl.cli.rounds import all_steps
from rlhf_trl.data.messages import as_chat
from rlhf_trl.data.splits import _position, held_out_keys, prompt_key, prompt_keys
from rlhf_trl.tasks.demo.data import rows
from tests.helpers.configs import composed

ROUNDS = 4


@pytest.fixture
def labeled(tmp_path, monkeypatch):
    """
    Write the labels of four rounds: each of a few prompts of its own, of which in the first two rounds none falls into
    the share that is held out.
    """
    monkeypatch.chdir(tmp_path)
    prompts = list(dict.fromkeys(row["prompt"] for row in rows("prompt", 42, False, 400)))
    high = [prompt for prompt in prompts if _position(prompt_key(as_chat(prompt, "user"))) > 0.25]
    asked = [high[:6], high[6:12], [prompt for prompt in prompts if prompt not in high[:12]][:20]]
    asked.append([prompt for prompt in prompts if not any(prompt in each for each in asked)][:20])
    for number, own in enumerate(asked, 1):
        folder = Path("runs", "iterated", f"label_{number}")
        folder.mkdir(parents=True)
        texts = {"completion_a": as_chat("Yes.", "assistant"), "completion_b": as_chat("No.", "assistant")}
        lines = [{"prompt": as_chat(prompt, "user"), **texts, "preferred": "a", "rater": "gold"} for prompt in own]
        (folder / "feedback.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize("mixture", ["pooled", "by_round"])
def test_no_prompt_that_was_held_out_is_trained_on_in_a_later_round(labeled, compose, capsys, mixture):
    steps = all_steps(composed("pipeline", "pipeline=iterated", f"rounds={ROUNDS}", f"mixture={mixture}", "align=dpo"))
    held_out = set()
    for number in range(1, ROUNDS + 1):
        for name in (f"reward_{number}", f"policy_{number}"):
            words = [word for word in steps[name] if not word.startswith("model.run")]
            loaded = instantiate_data(compose(*words, "project=iterated", f"run_name={name}"))
            assert held_out_keys(loaded) >= held_out, f"{name} trains on what was held out before"
            assert held_out.isdisjoint(prompt_keys(loaded["train"])) and len(loaded["eval"])
        held_out |= held_out_keys(loaded)
        assert len(held_out) >= number
    out = capsys.readouterr().out
    if mixture == "by_round":  # the last round: a third each, as `mix` says
        assert out.count("(33.3% of the mixture)") == 3 * (ROUNDS - 1)


def test_the_share_of_the_old_is_set(labeled, compose, capsys):
    mix = "mix={first: 1, earlier: 1, new: 2}"
    cfg = composed("pipeline", "pipeline=iterated", "rounds=3", "mixture=by_round", mix)
    words = [word for word in all_steps(cfg)["reward_3"] if not word.startswith("model.run")]
    loaded = instantiate_data(compose(*words, "project=iterated"))
    said = capsys.readouterr().out
    for part, share in (("first", "25.0"), ("earlier", "25.0"), ("new", "50.0")):
        assert re.search(rf"^ *{part}: .*\({share}% of the mixture\)", said, re.MULTILINE)
    assert "1 : 1 : 2 of the first data, the labels of the rounds before, and those of the round" in cfg.note
    assert len(loaded["train"]) > 200
