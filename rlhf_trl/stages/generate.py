"""Completions of many prompts, with their rewards, into a file (`stage=generate`)."""

import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, islice
from math import isinf, isnan
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from rlhf_trl.build import instantiate_data, load_policies, reward_functions
from rlhf_trl.data.chat_template import template_kwargs
from rlhf_trl.data.file_rows import checked_rows, read_file, resolve_paths
from rlhf_trl.data.images import ImageStore, image_as_text
from rlhf_trl.data.messages import as_chat as chat_of
from rlhf_trl.data.messages import as_text, check_text_or_chat, read_json_chats
from rlhf_trl.data.row_types import PASSED_ON
from rlhf_trl.data.rows import Problems
from rlhf_trl.data.splits import eval_split
from rlhf_trl.data.tokenize import end_tokens
from rlhf_trl.errors import ConfigError, DataError
from rlhf_trl.evaluation.generation import TOO_LONG, Policy, Prompt, as_prompt, sample
from rlhf_trl.evaluation.rewards import combine_scores, score
from rlhf_trl.models.sizes import check_rows, sizes_of
from rlhf_trl.rewards.base import Reward
from rlhf_trl.rewards.combine import weighted_sum
from rlhf_trl.rewards.http import json_number
from rlhf_trl.runs.ranks import is_main_process
from rlhf_trl.runs.record import replacing
from rlhf_trl.stages.base import open_run
from rlhf_trl.terminal import say

# Values of `stage.keep`
BEST_PER_PROMPT, BEST_OVERALL = "best_per_prompt", "best_overall"


def generate(cfg: DictConfig) -> None:
    """
    Write completions of the prompts by the policy that `cfg.model` names to `cfg.stage.output`.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if there are no prompts, a row has none, or the output exists.
    """
    OmegaConf.resolve(cfg)
    stage, prompts = cfg.stage, prompts_of(cfg, cfg.stage.max_prompts)
    output = new_output(cfg)
    (policy,) = load_policies(cfg)
    with open_run(cfg, start=policy.path):
        if not is_main_process():
            return  # one rank samples and writes
        partial = output.with_name(f".{output.name}.partial")  # one, however often a long sampling is killed
        output.parent.mkdir(parents=True, exist_ok=True)
        count, rewarded = 0, []  # rows; their rewards
        with open(partial, "w", encoding="utf-8") as file:
            for row in completions(
                policy,
                prompts,
                reward_functions(cfg, policy.tokenizer, columns=sorted(set().union(*prompts))),
                n=stage.n,
                temperature=stage.temperature,
                max_completion_length=stage.max_completion_length,
                batch_size=stage.batch_size,
                seed=cfg.seed,
                to_chat=stage.to_chat,
                system_prompt=stage.system_prompt,
                combine=instantiate(cfg.combine),
            ):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
                if isinstance(row.get("reward"), float):
                    rewarded.append(row["reward"])
        os.replace(partial, output)
        if stage.keep is not None:
            keep(output, stage.keep, cfg.seed)
        mean = f", mean reward {sum(rewarded) / len(rewarded):.3f}" if rewarded else ""
        print(f"{count} completions of {len(prompts)} prompts{mean}: {output}")


def new_output(cfg: DictConfig) -> Path:
    """
    Return the file `cfg.stage.output`, which a stage is about to write.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if it exists and may not be overwritten.
    """
    output = Path(cfg.stage.output)
    if output.exists() and not cfg.overwrite:
        raise ConfigError(
            f"`stage.output` is `{output}`, which exists. Name another file, or delete it first with `overwrite=true`."
        )
    return output


def keep(output: Path, rule: str, seed: int) -> None:
    """
    Write the completions with the highest rewards, and beside them as many random ones, for rejection sampling:
    `<output>.best.jsonl` and `<output>.random.jsonl`, as rows of the dataset type prompt-completion.

    Args:
        output (`Path`): the completions.
        rule (`str`), seed (`int`): see [`chosen`].

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if no completion can be chosen.
    """
    rows = [row for _, row in read_file(str(output)) if isinstance(row, dict)]
    notes: Counter[str] = Counter()
    best, control = chosen(rows, rule, seed, notes)
    noted = "".join(f"; {note}: {count:,}" for note, count in notes.items() if count)
    if not best:
        raise ConfigError(
            f"`stage.keep={rule}` finds no completion to keep in `{output}`{noted}. Raise "
            "`stage.max_completion_length`, or give another reward."
        )
    for name, made in (("best", best), ("random", control)):
        with replacing(output.with_name(f"{output.stem}.{name}.jsonl")) as file:
            file.writelines(json.dumps(_pair(row), ensure_ascii=False) + "\n" for row in made)
    means = [sum(row["reward"] for row in made) / len(made) for made in (best, control)]
    file = output.with_name(f"{output.stem}.best.jsonl")
    say(f"{len(best):,} best ones, mean reward {means[0]:.3f}, and as many random ones, {means[1]:.3f}{noted}: {file}")


def chosen(rows: Sequence[dict], rule: str, seed: int, notes: Counter) -> tuple[list[dict], list[dict]]:
    """
    Return the best completions, and a control of equal size: random ones of the same completions.

    Args:
        rows (`Sequence[dict]`): rows of [`completions`]. Those without a finite reward, and those that were cut, of
            which a policy would learn to end in the middle, are not chosen.
        rule (`str`): `best_per_prompt`: one of each prompt; `best_overall`: as many as there are prompts, of all.
        seed (`int`): draws the control.
        notes (`Counter`): counts what can't be chosen.
    """
    usable, rng = [], random.Random(f"{seed}-keep")
    for row in rows:
        notes["not chosen: without a finite reward"] += (no_reward := not isinstance(row.get("reward"), int | float))
        notes["not chosen: cut at `stage.max_completion_length`"] += not no_reward and not row["ended"]
        usable += [] if no_reward or not row["ended"] else [row]
    prompts: dict[str, list[dict]] = {}
    for row in usable:
        prompts.setdefault(json.dumps([row["prompt"], row.get("images")]), []).append(row)
    if rule == BEST_PER_PROMPT:
        groups = list(prompts.values())
        return [max(group, key=lambda row: row["reward"]) for group in groups], [rng.choice(group) for group in groups]
    best = sorted(usable, key=lambda row: -row["reward"])[: len(prompts)]
    return best, rng.sample(usable, len(prompts))


def _pair(row: dict) -> dict:
    """Return a completion as a row of the dataset type prompt-completion, chat where the prompt is one."""
    text = row["completion"]
    completion = chat_of(text, "assistant") if isinstance(row["prompt"], list) else text
    made = {"prompt": row["prompt"], "completion": completion, "reward": row["reward"]}
    return made | {name: row[name] for name in PASSED_ON if row.get(name) is not None}


def prompts_of(cfg: DictConfig, limit: int | None = None) -> list[dict]:
    """
    Return the rows to complete: those of the files `cfg.stage.prompts`, or of the split `cfg.stage.split` of
    `cfg.data`; at most `limit`, the first ones.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if there are none, or a row has no prompt.
    """
    if cfg.stage.prompts is not None:
        return read_prompts(cfg.stage.prompts, limit)
    # Texts stay texts here, unless the data say otherwise: `stage.to_chat` decides, see `as_chat`
    datasets = instantiate_data(cfg, "prompt", tokenizers=())
    return (eval_split(datasets) if cfg.stage.split == "eval" else datasets["train"]).to_list()[:limit]


def read_prompts(source: str | list[str], limit: int | None = None) -> list[dict]:
    """
    Read rows with `prompt` (text or messages) and any other columns.

    Args:
        source (`str` or `list[str]`):
            Files (jsonl, json, csv, parquet) and globs.
        limit (`int`, *optional*):
            Number of rows to read, the first ones.

    Raises:
        [`~rlhf_trl.errors.DataError`]: with file and row, if one has no prompt; if there is none at all.
    """
    notes, problems, files = Counter(), Problems(), resolve_paths(source, "stage.prompts")
    images = ImageStore()

    def check(folder: Path, row: dict) -> dict:
        row = read_json_chats(row, notes)
        return images.read_prompt({**row, "prompt": check_text_or_chat(row, "prompt")}, folder)

    rows = chain.from_iterable(checked_rows(file, partial(check, Path(file).parent), problems) for file in files)
    rows = list(islice(rows, limit))
    if problems.count:
        raise DataError(f"{problems.count} rows of `stage.prompts` can't be used:\n{problems.text()}")
    if not rows:
        raise DataError(f"`stage.prompts` ({', '.join(files)}) holds no prompt. Give rows with a column `prompt`.")
    for note, count in notes.items():
        print(f"{note} ({count:,} rows)")
    return rows


def as_chat(policy: Policy, to_chat: bool | None) -> bool:
    """
    Return whether a text becomes a user's turn for a policy; `None`: where it has a chat template.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if it should, and there is no template.
    """
    if to_chat and not policy.chats:
        raise ConfigError(
            f"`stage.to_chat=true`, and the tokenizer of `{policy.path}` has no chat template. Set "
            "`model.chat_template=FILE.jinja`, or leave `stage.to_chat` at null: then the prompts stay texts."
        )
    return policy.chats if to_chat is None else to_chat


def given_prompt(prompt: Prompt, policy: Policy, wants_chat: bool, system_prompt: str | None) -> Prompt:
    """Return a row's prompt as the policy takes it."""
    return as_prompt(prompt, policy, system_prompt) if wants_chat and isinstance(prompt, str) else prompt


def check_prompts(
    policy: Policy,
    prompts: Iterable[tuple[Prompt, Mapping[str, Any]]],
    wants_chat: bool,
    system_prompt: str | None,
    new_tokens: int,
) -> None:
    """
    Check that a policy can take all prompts, before it completes the first one.

    Args:
        policy ([`~rlhf_trl.evaluation.generation.Policy`]): the policy.
        prompts (`Iterable`): prompts, with the other columns of their rows.
        wants_chat (`bool`), system_prompt (`str`, *optional*): see [`given_prompt`].
        new_tokens (`int`): limit of a completion.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if its chat template refuses one, or one is too long.
    """
    ids = [
        policy.ids(given_prompt(prompt, policy, wants_chat, system_prompt), **template_kwargs(row))
        for prompt, row in prompts
    ]
    check_rows(sizes_of(policy.model), ids, new_tokens, TOO_LONG)


def completions(
    policy: Policy,
    prompts: Sequence[dict],
    rewards: Sequence[Reward],
    n: int,
    temperature: float,
    max_completion_length: int,
    batch_size: int,
    seed: int,
    to_chat: bool | None = None,
    system_prompt: str | None = None,
    combine: Callable = weighted_sum,
) -> Iterator[dict]:
    """
    Yield one row per completion, `n` consecutive ones per prompt. The same seed and batch size give the same rows.

    Args:
        policy ([`~rlhf_trl.evaluation.generation.Policy`]), rewards (`Sequence[Callable]`):
            The policy to sample from, and the rewards of its completions.
        prompts (`Sequence[dict]`):
            Rows of [`read_prompts`].
        n (`int`), temperature (`float`), max_completion_length (`int`), batch_size (`int`), seed (`int`):
            Completions per prompt, and how to sample them, see [`~rlhf_trl.evaluation.generation.sample`].
        to_chat (`bool`, *optional*):
            Whether a text becomes a user's turn; `None`: where the policy has a chat template.
        system_prompt (`str`, *optional*):
            System prompt of every prompt that is a text.
        combine (`Callable`):
            Combines the rewards into one, see `rlhf_trl.rewards.combine`.

    Yields:
        `dict`: `prompt` and the other columns of its row, `completion` (text), `sample` (0 to n - 1), `tokens`,
        `ended` (whether the end token was generated), and with rewards `rewards` by name and `reward`, their
        combination: `None` where none applies, `"NaN"` where one is not finite.
    """
    ends = end_tokens(policy.tokenizer)
    rows = [{**row, "sample": i} for row in prompts for i in range(n)]
    wants_chat = as_chat(policy, to_chat)
    check_prompts(policy, ((row["prompt"], row) for row in prompts), wants_chat, system_prompt, max_completion_length)
    with tqdm(total=len(rows), unit="completion") as bar:
        for number, start in enumerate(range(0, len(rows), batch_size)):
            batch = rows[start : start + batch_size]
            given = [given_prompt(row["prompt"], policy, wants_chat, system_prompt) for row in batch]
            written = sample(
                policy.model,
                policy.tokenizer,
                [policy.ids(prompt, **template_kwargs(row)) for prompt, row in zip(given, batch, strict=True)],
                max_completion_length,
                temperature,
                batch_size,
                seed=seed + number,
            )
            names = {name for row in batch for name in row} - {"prompt", "completion", "sample"}
            columns = {name: [row.get(name) for row in batch] for name in sorted(names)}
            texts = [policy.completion(prompt, ids) for prompt, ids in zip(given, written, strict=True)]
            try:
                scores = score(rewards, given, texts, written, columns, policy.tokenizer)
            except ConfigError as error:
                raise ConfigError(f"{error} To generate without rewards: `reward=none`.") from error
            combined = combine_scores(scores, rewards, combine).tolist() if rewards else []
            for i, (row, text, ids) in enumerate(zip(batch, texts, written, strict=True)):
                out = {name: value for name, value in row.items() if name != "sample"} | {
                    "completion": as_text(text),
                    "sample": row["sample"],
                    "tokens": len(ids),
                    "ended": bool(ids) and ids[-1] in ends,
                }
                if row.get("images"):
                    out["images"] = list(map(image_as_text, row["images"]))
                if rewards:
                    named = {name: json_number(values[i]) for name, values in scores.items()}
                    reward = None if isnan(combined[i]) else "NaN" if isinf(combined[i]) else combined[i]
                    out |= {"rewards": named, "reward": reward}
                yield out
            bar.update(len(batch))
