"""Paraphrases of prompts: which are kept, and a stage that writes them for `data.feedback.paraphrased`."""

import json
from pathlib import Path

import pytest
from hydra.utils import instantiate

from rlhf_trl import data
from rlhf_trl.errors import ConfigError
from rlhf_trl.stages.paraphrase import kept_paraphrases

FEW = ("stage=paraphrase", "data/feedback=pairs", "data.max_samples=8", "data.max_eval_samples=4")


def row(text: str, sample: int = 0, ended: bool = True) -> dict:
    return {"completion": text, "sample": sample, "ended": ended}


def test_empty_cut_and_repeated_paraphrases_are_dropped_and_counted():
    chat = [{"role": "user", "content": "What is it?"}]
    written = [row("What  IS it?"), row('"Say what it is."', 1), row("", 0), row("Tell me", 1, ended=False)]
    rows, dropped = kept_paraphrases([chat, "Who?"], written, 2)
    assert rows == [{"prompt": chat, "paraphrase": "Say what it is.", "sample": 1}]
    assert sum(dropped.values()) == 3 and len(dropped) == 3
    again, dropped = kept_paraphrases(["Who?"], [row("Who, then?"), row("who, then? ", 1)], 2)
    assert len(again) == 1 and dropped == {"the prompt itself, or another paraphrase of it": 1}


def test_a_template_without_the_prompt_is_an_error(compose, tmp_path):
    cfg = compose(*FEW, f"runs_dir={tmp_path}", "stage.template=Say it otherwise.")
    with pytest.raises(ConfigError, match=r"`stage.template` has no `\{prompt\}`"):
        instantiate(cfg.stage.run)(cfg)


@pytest.mark.slow
def test_what_the_stage_writes_becomes_rows_of_training(compose, tmp_path, capsys):
    cfg = compose(
        *FEW, f"runs_dir={tmp_path}", "stage.max_completion_length=16", "stage.n=3", "stage.template='{prompt}'"
    )
    instantiate(cfg.stage.run)(cfg)
    lines = [json.loads(line) for line in Path(cfg.stage.output).read_text().splitlines()]
    assert lines and {"prompt", "paraphrase", "model", "sample"} == set(lines[0])
    words = (
        "stage=reward",
        "data/feedback=pairs",
        "data.max_samples=8",
        f"data.feedback.paraphrased={cfg.stage.output}",
    )
    cfg = compose(*words, f"runs_dir={tmp_path}")
    dataset = instantiate(cfg.data)(dataset_type="comparisons", seed=cfg.seed)
    assert isinstance(instantiate(cfg.data.feedback), data.Pairs)
    assert "paraphrased" in {source for each in dataset["train"] for source in each["source"]}
    assert {source for each in dataset["eval"] for source in each["source"]} == {"feedback"}
