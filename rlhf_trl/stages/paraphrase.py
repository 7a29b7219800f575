"""Prompts in other words, by a language model, into a file (`stage=paraphrase`)."""

import json
from collections import Counter

from omegaconf import DictConfig, OmegaConf

from rlhf_trl.build import load_policies
from rlhf_trl.data.feedback.synthetic import answer_of
from rlhf_trl.data.splits import prompt_key
from rlhf_trl.errors import ConfigError
from rlhf_trl.runs.ranks import is_main_process
from rlhf_trl.runs.record import replacing
from rlhf_trl.stages.base import open_run
from rlhf_trl.stages.generate import completions, new_output, prompts_of
from rlhf_trl.terminal import say


def paraphrase(cfg: DictConfig) -> None:
    """
    Write paraphrases of the prompts by the model that `cfg.model` names to `cfg.stage.output`.

    A row has the `prompt`, its `paraphrase` (text), the `model`, and the number of the `sample`.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if there are no prompts, the template has no place for one, the output
            exists, or no paraphrase is left.
    """
    OmegaConf.resolve(cfg)
    stage = cfg.stage
    if "{prompt}" not in stage.template:
        raise ConfigError("`stage.template` has no `{prompt}`, so the model wouldn't see the request. Add it.")
    asked = prompts_of(cfg, stage.max_prompts)
    if any(row.get("images") for row in asked):
        raise ConfigError(
            "The prompts have images, and `stage=paraphrase` writes text in other words. Give prompts without images."
        )
    given = {prompt_key(row["prompt"]): row["prompt"] for row in asked}
    output = new_output(cfg)
    (policy,) = load_policies(cfg)
    with open_run(cfg, start=policy.path):
        if not is_main_process():
            return  # one rank samples and writes
        prompts = list(given.values())
        questions = [{"prompt": stage.template.replace("{prompt}", answer_of(prompt))} for prompt in prompts]
        options = ("n", "temperature", "max_completion_length", "batch_size")
        written = completions(policy, questions, [], seed=cfg.seed, **{name: stage[name] for name in options})
        rows, dropped = kept_paraphrases(prompts, list(written), stage.n)
        for reason, count in dropped.items():
            say(f"{count:,} of {len(prompts) * stage.n:,} paraphrases dropped: {reason}")
        if not rows:
            raise ConfigError(
                f"`{policy.path}` wrote no paraphrase that could be used. Try another model, or another "
                "`stage.template`."
            )
        output.parent.mkdir(parents=True, exist_ok=True)
        with replacing(output) as file:
            for row in rows:
                file.write(json.dumps(row | {"model": policy.path}, ensure_ascii=False) + "\n")
        say(f"{len(rows):,} paraphrases of {len(prompts):,} prompts: {output}")


def kept_paraphrases(prompts: list, written: list[dict], n: int) -> tuple[list[dict], Counter]:
    """
    Return the rows of the paraphrases that can be used, and why the others can't.

    Args:
        prompts (`list`): the prompts, text or messages.
        written (`list[dict]`): rows of [`~rlhf_trl.stages.generate.completions`], `n` consecutive ones per prompt.
        n (`int`): paraphrases per prompt.
    """
    rows, dropped = [], Counter()
    for number, prompt in enumerate(prompts):
        seen = {prompt_key(answer_of(prompt))}
        for row in written[n * number : n * (number + 1)]:
            text = row["completion"].strip().strip('"“”').strip()
            key = prompt_key(text)
            if not row["ended"]:
                dropped["cut at `stage.max_completion_length`"] += 1
            elif not text:
                dropped["empty"] += 1
            elif key in seen:
                dropped["the prompt itself, or another paraphrase of it"] += 1
            else:
                seen.add(key)
                rows.append({"prompt": prompt, "paraphrase": text, "sample": row["sample"]})
    return rows, dropped
