"""Candidate completions of prompts, and the questions about them that are worth a label (`stage=collect`)."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from rlhf_trl.build import each_policy, models_of, policy_paths, reward_functions
from rlhf_trl.config.dotpaths import find
from rlhf_trl.config.ranges import COUNT, NONNEGATIVE, check_values
from rlhf_trl.config.values import as_dict
from rlhf_trl.data.chat_template import template_kwargs
from rlhf_trl.data.file_rows import read_file, resolve_paths
from rlhf_trl.data.messages import as_chat as chat_of
from rlhf_trl.data.messages import as_text
from rlhf_trl.data.tokenize import end_tokens, split_row_ids
from rlhf_trl.errors import ConfigError
from rlhf_trl.evaluation.generation import Policy, last_hidden_states, sample
from rlhf_trl.evaluation.rewards import score_members
from rlhf_trl.hints import did_you_mean, names_of
from rlhf_trl.labels.candidates import (
    CANDIDATES_FILE,
    Candidate,
    Candidates,
    Text,
    prompt_id,
    read_candidates,
    write_candidates,
    write_rows,
)
from rlhf_trl.labels.collection import (
    REPEATED_PROMPT,
    Collected,
    Draws,
    add_candidates,
    ask,
    merge_prompts,
    without_labeled,
)
from rlhf_trl.labels.options import BY_FEATURES, BY_SCORE, selection_problem
from rlhf_trl.labels.store import Label, read
from rlhf_trl.labels.traffic import COLUMNS, TOO_LONG, Traffic, read_traffic, thumb_key, used_key
from rlhf_trl.models.sizes import empty_model, sizes_of
from rlhf_trl.rewards.base import Reward
from rlhf_trl.rewards.model import ModelReward
from rlhf_trl.runs.directory import delete_backup
from rlhf_trl.runs.ranks import is_main_process
from rlhf_trl.runs.record import DRAWS_FILE, LABELS_FILE, write_metrics
from rlhf_trl.stages.base import files_of, open_run
from rlhf_trl.stages.generate import as_chat, check_prompts, given_prompt, prompts_of
from rlhf_trl.terminal import say

# The thumbs that a log has, beside its candidates
THUMBS_FILE = "thumbs.jsonl"
# Settings of a policy's completions, and their rules
SETTINGS = {"n": COUNT, "temperature": NONNEGATIVE, "top_p": "(0, 1]", "max_completion_length": COUNT}


class Sampling(NamedTuple):
    """Settings of a policy's completions; `n` of them per prompt."""

    n: int
    temperature: float
    top_p: float
    max_completion_length: int


def collect(cfg: DictConfig) -> None:
    """
    Write candidates of prompts, and the questions about them, to `candidates.jsonl` in the run directory.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if there are no prompts, a policy is missing, the selection lacks what it
            reads, or no question is left.
    """
    OmegaConf.resolve(cfg)
    stage = cfg.stage
    traffic = traffic_of(cfg)
    prompts = prompts_of(cfg) if traffic is None else [{"prompt": row["prompt"]} for row in traffic.rows]
    if any(row.get("images") for row in prompts):
        raise ConfigError(
            "The prompts have images, and `stage=collect` keeps text alone, as `stage=label` shows it. Give prompts "
            "without images, or feedback on images that was given elsewhere (`data/feedback`)."
        )
    found = without_labeled(merge_prompts(prompts), earlier_labels(cfg), stage.overlap)
    found.rows = found.rows[: stage.max_prompts]
    if traffic is not None:
        del found.notes[REPEATED_PROMPT]  # a prompt may be asked often
        found.notes.update(traffic.notes)
    if not found.rows and not (traffic is not None and traffic.thumbs and stage.budget is None):
        raise ConfigError(
            f"No prompt is left to collect for{_noted(found, ': ')}. Give more prompts (`data`, `stage.prompts`, a "
            "log of a later time), or ask several people about each: `stage.overlap=2`. To take the thumbs of a log "
            "without any question: `stage.budget=null`."
        )
    paths = policy_paths(cfg)
    settings = {name: sampling_of(cfg, name) for name in paths}
    with open_run(cfg, start=next(iter(paths.values()))):
        if not is_main_process():
            return  # one rank samples and writes
        columns = sorted({name for row in found.rows for name in row.extra})
        rewards = reward_functions(cfg, None, columns=columns)
        members = max((getattr(reward, "members", 1) for reward in rewards), default=1)
        if problem := selection_problem(as_dict(cfg.select), bool(rewards), members):
            raise ConfigError(problem)
        draws = Draws(Path(cfg.run_dir, DRAWS_FILE), plan_of(found.rows, settings, cfg))
        delete_backup(cfg.run_dir)
        draw(cfg, found.rows, settings, rewards, draws)
        add_candidates(found, logged(cfg, found, traffic, rewards))
        add_candidates(found, ((row["row"], Candidate(**row["candidate"])) for row in draws.rows()))
        by_score = cfg.select._target_ in BY_SCORE
        ask(
            found,
            select=instantiate(cfg.select),
            budget=stage.budget,
            per_prompt=stage.per_prompt,
            size=stage.question_size,
            seed=cfg.seed,
            weights={reward.__name__: reward.weight for reward in rewards} if by_score else {},
            features=features_of(cfg, found.rows) if cfg.select._target_ in BY_FEATURES else None,
        )
        finish(cfg, found, draws, traffic)


def finish(cfg: DictConfig, found: Collected, draws: Draws, traffic: Traffic | None) -> None:
    """Write the candidates, the thumbs and the counts, and print what was collected."""
    output = Path(cfg.run_dir, CANDIDATES_FILE)
    write_candidates(output, found.rows)
    thumbs = traffic.thumbs if traffic is not None else []
    if thumbs:
        write_rows(Path(cfg.run_dir, THUMBS_FILE), thumbs)
        found.notes["thumbs of users"] = len(thumbs)
    questions = sum(len(row.questions) for row in found.rows)
    counts = {
        "eval_prompts": len(found.rows),
        "eval_candidates": sum(len(row.candidates) for row in found.rows),
        "eval_questions": questions,
    }
    counts |= {"eval_" + re.sub(r"\W+", "_", note): count for note, count in found.notes.items() if count}
    write_metrics(cfg.run_dir, [counts])
    draws.delete()
    say(f"{counts['eval_candidates']:,} candidates of {len(found.rows):,} prompts, {questions:,} questions: {output}")
    if noted := _noted(found):
        say(f"  {noted}")
    if thumbs:
        say(f"Thumbs, for `data/feedback=thumbs`: {Path(cfg.run_dir, THUMBS_FILE)}")
    if not questions and not (thumbs and cfg.stage.budget is None):
        raise ConfigError(
            f"There is nothing to ask{_noted(found, ': ')}. Collect more candidates per prompt (`stage.n`), at a "
            "higher `stage.temperature`, or from several policies (`stage.policies`)."
        )


def _noted(found: Collected, before: str = "") -> str:
    noted = "; ".join(f"{note}: {count:,}" for note, count in found.notes.items() if count)
    return f"{before}{noted}" if noted else ""


def traffic_of(cfg: DictConfig) -> Traffic | None:
    """Return the log in `cfg.stage.traffic` without what earlier collections used, `None` where there is none."""
    stage = cfg.stage
    if stage.traffic is None and stage.min_thumbs is not None:
        raise ConfigError(
            f"`stage.min_thumbs={stage.min_thumbs}` counts the thumbs of a log, and `stage.traffic` names none. Name "
            "one (of `pipeline=iterated`: `prompts_of=log log=...`)."
        )
    if stage.traffic is None:
        return None
    files = resolve_paths(_list(stage.traffic), "stage.traffic")
    columns = as_dict(stage.columns)
    if unknown := [name for name in columns if name not in COLUMNS]:
        raise ConfigError(f"`stage.columns.{unknown[0]}` is no column of a log. {did_you_mean(unknown[0], COLUMNS)}")
    used = set()
    for file in files_of(cfg, stage.used, "stage.used", CANDIDATES_FILE):
        for row in read_candidates(file, allow_empty=True):
            used |= {used_key(row.prompt, candidate.completion) for candidate in row.candidates}
        if (thumbs := Path(file).with_name(THUMBS_FILE)).exists():
            used |= {thumb_key(row) for _, row in read_file(str(thumbs)) if isinstance(row, dict)}
    privacy = find(stage.privacy) if stage.privacy is not None else None
    traffic = read_traffic(files, columns, privacy, used, prompt_problem(cfg))
    if traffic.too_long.count:
        say(f"warning: {TOO_LONG} ({traffic.too_long.count:,}):\n{traffic.too_long.text()}")
    if not traffic.rows and not traffic.thumbs:
        noted = _noted(Collected([], traffic.notes), ": ")
        raise ConfigError(f"`stage.traffic` holds nothing new{noted}. Give the log of a later time.")
    ups = sum(row["thumb"] for row in traffic.thumbs)
    downs = len(traffic.thumbs) - ups
    if stage.min_thumbs is not None and min(ups, downs) < stage.min_thumbs:
        raise ConfigError(
            f"`stage.traffic` has {ups} new thumbs up and {downs} down, and `stage.min_thumbs={stage.min_thumbs}` "
            "asks for that many of each. Nothing was used: the log of a later time has these too."
        )
    return traffic


def weightless_policies(cfg: DictConfig) -> Iterator[Policy]:
    """Yield the policies of `cfg` without their weights, for what their tokenizers and configs say."""
    for each in models_of(as_dict(cfg)):
        if each.writes:
            model = empty_model(each.path, each.task_type, each.trust_remote_code, each.revision)
            yield Policy(each.key, each.path, model, each.load_tokenizer())


def prompt_problem(cfg: DictConfig) -> Callable[[Text], str | None]:
    """
    Return a function that says why a prompt is too long for a policy with a table of positions, such as GPT-2's, and
    `None` where it isn't.
    """
    stage, limits = cfg.stage, []
    for name, policy in zip(policy_paths(cfg), weightless_policies(cfg), strict=True):
        if (sizes := sizes_of(policy.model, policy.path)).is_table:
            limits.append((policy, sizes, sampling_of(cfg, name).max_completion_length))

    def problem(prompt: Text) -> str | None:
        for policy, sizes, new_tokens in limits:
            given = given_prompt(prompt, policy, as_chat(policy, stage.to_chat), stage.system_prompt)
            tokens = len(policy.ids(given))
            if tokens + new_tokens > sizes.positions:
                return (
                    f"has {tokens:,} tokens, and `{sizes.name}` {sizes.positions:,} positions for it and up to "
                    f"{new_tokens:,} generated ones (`stage.max_completion_length`)"
                )
        return None

    return problem


def logged(
    cfg: DictConfig, found: Collected, traffic: Traffic | None, rewards: Sequence[Reward]
) -> Iterator[tuple[int, Candidate]]:
    """
    Yield the logged answers to the prompts of `found`, each with the index of its prompt and its scores. One that is
    too long for a reward model with a table of positions has none, and is counted.
    """
    if traffic is None:
        return
    numbers = {row.id: number for number, row in enumerate(found.rows)}
    rows = [row for row in traffic.rows if prompt_id(row["prompt"]) in numbers]
    scores: list[dict[str, list[float | None]]] = [{} for _ in rows]
    if rewards and rows:
        policy, stage = next(weightless_policies(cfg)), cfg.stage
        wants_chat = as_chat(policy, stage.to_chat)
        given = [given_prompt(row["prompt"], policy, wants_chat, stage.system_prompt) for row in rows]
        answers = [
            row["completion"] if isinstance(prompt, str) else chat_of(row["completion"], "assistant")
            for row, prompt in zip(rows, given, strict=True)
        ]
        # With the end token, which an answer that users saw has
        written = [
            split_row_ids(policy.tokenizer, prompt, answer)[1] for prompt, answer in zip(given, answers, strict=True)
        ]
        fits = rows_that_fit(rewards, given, answers)
        found.notes["logged answers without a score: too long for the reward model"] += len(rows) - len(fits)
        chosen, ids = ([given[i] for i in fits], [answers[i] for i in fits]), [written[i] for i in fits]
        found_scores = score_members(rewards, *chosen, ids, {}, policy.tokenizer)
        for i, scored in zip(fits, found_scores, strict=True):
            scores[i] = scored
    for row, scored in zip(rows, scores, strict=True):
        candidate = traffic.candidate(row)
        candidate.scores = scored
        yield numbers[prompt_id(row["prompt"])], candidate


def rows_that_fit(rewards: Sequence[Reward], prompts: list, completions: list) -> list[int]:
    """Return the indices of the rows that no reward model with a table of positions is too small for."""
    fits = [True] * len(prompts)
    for reward in rewards:
        if isinstance(reward, ModelReward) and (sizes := sizes_of(reward.model)).is_table:
            reward.bind(None)
            lengths, limit = map(len, reward.token_rows(prompts, completions, [[] for _ in prompts])), sizes.positions
            fits = [fit and (limit is None or size <= limit) for fit, size in zip(fits, lengths, strict=True)]
    return [i for i, fit in enumerate(fits) if fit]


def _list(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def earlier_labels(cfg: DictConfig) -> list[Label]:
    """Return the labels in `cfg.stage.labels`, names of runs and files."""
    return [label for file in files_of(cfg, cfg.stage.labels, "stage.labels", LABELS_FILE) for label in read(file)]


def sampling_of(cfg: DictConfig, name: str) -> Sampling:
    """
    Return the settings of a policy: those of the stage, unless `cfg.stage.sampling` has its own.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: for a setting or a policy that there isn't.
    """
    given = as_dict(cfg.stage.sampling) if cfg.stage.sampling else {}
    policies = list(policy_paths(cfg))
    if unknown := [each for each in given if each not in policies]:
        raise ConfigError(
            f"`stage.sampling` names `{unknown[0]}`, which is no policy of this stage (it has {', '.join(policies)})."
        )
    own = given.get(name) or {}
    if wrong := [key for key in own if key not in SETTINGS]:
        raise ConfigError(f"`stage.sampling.{name}.{wrong[0]}` is no setting. Use {names_of(SETTINGS)}.")
    stage = cfg.stage
    values = {
        "n": stage.n,
        "temperature": stage.temperature,
        "top_p": stage.top_p,
        "max_completion_length": stage.max_completion_length,
    } | own
    check_values(SETTINGS, values, f"stage.sampling.{name}.")
    return Sampling(**values)


def plan_of(rows: Sequence[Candidates], settings: dict[str, Sampling], cfg: DictConfig) -> str:
    """Return a digest of what is drawn, in which batches, and how it is scored."""
    plan = [[row.id for row in rows], settings, policy_paths(cfg), cfg.stage.batch_size, cfg.seed]
    plan += [cfg.stage.to_chat, cfg.stage.system_prompt, as_dict(cfg.reward)]
    return hashlib.blake2b(json.dumps(plan, default=str).encode(), digest_size=16).hexdigest()


def draw(
    cfg: DictConfig,
    rows: Sequence[Candidates],
    settings: dict[str, Sampling],
    rewards: Sequence[Reward],
    draws: Draws,
) -> None:
    """
    Sample and score the completions that are not drawn yet, a batch at a time. The same seed and batch size give the
    same completions, whether or not the run was interrupted.
    """
    size = cfg.stage.batch_size
    plan: dict[str, list[tuple[int, list[int]]]] = {}  # by policy: number of the batch, and the prompts in it
    number = 0
    for name, setting in settings.items():
        places = [i for i in range(len(rows)) for _ in range(setting.n)]
        plan[name] = []
        for start in range(0, len(places), size):
            plan[name].append((number, places[start : start + size]))
            number += 1
    total = sum(len(places) for batches in plan.values() for _, places in batches)
    done = len(draws.rows())
    if not any(number not in draws.batches for batches in plan.values() for number, _ in batches):
        return
    with tqdm(total=total, initial=done, unit="completion") as bar:
        for policy in each_policy(cfg):
            setting, wants_chat = settings[policy.name], as_chat(policy, cfg.stage.to_chat)
            prompts = ((row.prompt, row.extra) for row in rows)
            check_prompts(policy, prompts, wants_chat, cfg.stage.system_prompt, setting.max_completion_length)
            for number, places in plan[policy.name]:
                if number in draws.batches:
                    continue
                seed = cfg.seed + number
                batch = list(completions(policy, rows, places, setting, seed, rewards, cfg.stage))
                draws.add(number, batch)
                bar.update(len(batch))


def completions(
    policy: Policy,
    rows: Sequence[Candidates],
    places: Sequence[int],
    setting: Sampling,
    seed: int,
    rewards: Sequence[Reward],
    stage: Any,
) -> Iterator[dict[str, Any]]:
    """
    Yield a completion of the prompt at each of `places`: `row`, its place, and `candidate`, the fields of a
    [`~rlhf_trl.labels.candidates.Candidate`].
    """
    wants_chat, ends = as_chat(policy, stage.to_chat), end_tokens(policy.tokenizer)
    given = [given_prompt(rows[i].prompt, policy, wants_chat, stage.system_prompt) for i in places]
    kwargs = [template_kwargs(rows[i].extra) for i in places]
    written = sample(
        policy.model,
        policy.tokenizer,
        [policy.ids(prompt, **each) for prompt, each in zip(given, kwargs, strict=True)],
        setting.max_completion_length,
        setting.temperature,
        stage.batch_size,
        seed=seed,
        top_p=setting.top_p,
    )
    texts = [policy.completion(prompt, ids) for prompt, ids in zip(given, written, strict=True)]
    names = sorted({name for i in places for name in rows[i].extra})
    columns = {name: [rows[i].extra.get(name) for i in places] for name in names}
    scores = score_members(rewards, given, texts, written, columns, policy.tokenizer)
    for place, text, ids, scored in zip(places, texts, written, scores, strict=True):
        is_text = isinstance(rows[place].prompt, str)  # a text has texts as completions, whatever the policy read
        candidate = Candidate(
            completion=as_text(text) if is_text else text,
            policy=policy.name,
            sampling={
                "temperature": setting.temperature,
                "top_p": setting.top_p,
                "max_new_tokens": setting.max_completion_length,
            },
            seed=seed,
            scores=scored,
            extra={"tokens": len(ids), "ended": bool(ids) and ids[-1] in ends},
        )
        yield {"row": place, "candidate": vars(candidate)}


def features_of(cfg: DictConfig, rows: Sequence[Candidates]) -> Callable[[list[tuple[int, int]]], np.ndarray]:
    """
    Return a function that takes M candidates (row, candidate), and returns the first policy's last hidden states of
    them, shape (M, hidden size).
    """

    def features(places: list[tuple[int, int]]) -> np.ndarray:
        policy = next(each_policy(cfg))
        wants_chat = as_chat(policy, cfg.stage.to_chat)
        prompts, answers = [], []
        for row, candidate in places:
            given = given_prompt(rows[row].prompt, policy, wants_chat, cfg.stage.system_prompt)
            prompts.append(policy.ids(given, **template_kwargs(rows[row].extra)))
            text = as_text(rows[row].candidates[candidate].completion)
            answers.append(policy.tokenizer(text, add_special_tokens=False)["input_ids"])
        return last_hidden_states(policy.model, prompts, answers, cfg.stage.batch_size).numpy()

    return features
