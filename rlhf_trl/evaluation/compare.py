"""Policies side by side on the same held-out prompts (`stage=compare`)."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from accelerate import PartialState
from datasets import Dataset
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from rlhf_trl.callbacks.record import write_json
from rlhf_trl.callbacks.samples import as_text
from rlhf_trl.data.tokens import prompt_ids
from rlhf_trl.errors import ConfigError
from rlhf_trl.evaluation.sampling import sample, sequence_logps
from rlhf_trl.evaluation.statistics import bootstrap_mean, paired_difference, win_rate
from rlhf_trl.evaluation.tables import comparison_text
from rlhf_trl.models import load_model, load_tokenizer
from rlhf_trl.paths import resolve_path
from rlhf_trl.quiet import quiet
from rlhf_trl.run import begin, end, instantiate_data, project_dir, reward_functions


def compare(cfg: DictConfig) -> None:
    """
    Compares the policies of `cfg.stage`, writes `comparison.json` beside their runs and prints the tables.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if a policy is missing, or can't be compared with the others.
    """
    OmegaConf.resolve(cfg)
    quiet()
    stage, where = cfg.stage, project_dir(cfg)
    if stage.baseline not in stage.policies:
        raise ConfigError(
            f"`stage.baseline` is `{stage.baseline}`, which `stage.policies` doesn't have (it has "
            f"{', '.join(stage.policies)}). Set it to one of them, or add it: `+stage.policies.{stage.baseline}=...`."
        )
    policies = {name: find_policy(place, where) for name, place in stage.policies.items()}
    begin(cfg, policies[stage.baseline])
    if not PartialState().is_main_process:
        return  # one rank samples and writes
    try:
        comparison = compare_policies(
            policies,
            stage.baseline,
            dataset=held_out(instantiate_data(cfg)),
            rewards=reward_functions(cfg, load_tokenizer(policies[stage.baseline])),
            temperature=stage.temperature,
            max_completion_length=stage.max_completion_length,
            batch_size=stage.batch_size,
            dtype=stage.dtype,
            seed=cfg.seed,
        )
    except BaseException as error:
        end(cfg, "failed", error=f"{type(error).__name__}: {error}")
        raise
    write_json(Path(where, "comparison.json"), comparison)
    end(cfg, "done")
    if stage.show:
        print("\n" + comparison_text(comparison))


def find_policy(place: str, project_dir: str) -> str:
    """The folder or hub id of a policy: a run of the project where there is one of that name, else a path."""
    is_run = Path(project_dir, place, "run.json").exists() or not any(sign in place for sign in "/:.~")
    return resolve_path(place, place if is_run and not Path(place).is_dir() else None, project_dir)


def held_out(datasets: dict[str, Dataset]) -> Dataset:
    """
    The eval split.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if there is none, or nothing in it.
    """
    dataset = datasets.get("eval")
    if dataset is None or len(dataset) == 0:
        raise ConfigError(
            "A comparison needs held-out prompts, and the data has no `eval` split with rows in it. Give `data` one."
        )
    return dataset


def compare_policies(
    policies: dict[str, str],
    baseline: str,
    dataset: Dataset,
    rewards: Sequence[Callable],
    temperature: float,
    max_completion_length: int,
    batch_size: int,
    dtype: str,
    seed: int,
) -> dict:
    """
    Samples one completion a prompt from each policy, with the same prompts and seed, and compares them.

    Args:
        policies (`dict[str, str]`):
            Name and folder or hub id.
        baseline (`str`):
            Name of the policy that differences, win rates and KL are taken to.
        dataset (`Dataset`):
            Rows with `prompt` and whatever columns the reward functions read.
        rewards (`Sequence[Callable]`):
            Rewards as in `rlhf_trl.rewards`, bound to the baseline's tokenizer; a completion's reward is their
            weighted sum.
        temperature (`float`), max_completion_length (`int`), batch_size (`int`), seed (`int`):
            See [`~rlhf_trl.evaluation.sampling.sample`].
        dtype (`str`):
            Type of the weights.

    Returns:
        `dict`: what `comparison.json` holds.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if a policy has another vocabulary than the baseline: KL would mean nothing.
    """
    base_tokenizer = load_tokenizer(policies[baseline])
    prompts = [prompt_ids(base_tokenizer, prompt) for prompt in dataset["prompt"]]
    sampling = {"temperature": temperature, "batch_size": batch_size}
    written, texts, own_logps = {}, {}, {}
    for name, path in tqdm(policies.items(), desc="sampling", unit="policy"):
        tokenizer = load_tokenizer(path)
        if tokenizer.get_vocab() != base_tokenizer.get_vocab():
            raise ConfigError(
                f"The policy `{name}` ({path}) has another vocabulary than the baseline `{baseline}` "
                f"({policies[baseline]}). Compare policies that come from one base."
            )
        model = load_policy(path, dtype)
        written[name] = sample(model, tokenizer, prompts, max_completion_length, seed=seed, **sampling)
        texts[name] = as_completions(tokenizer, dataset["prompt"], written[name])
        own_logps[name] = sequence_logps(model, prompts, written[name], **sampling)
        del model
    reference = load_policy(policies[baseline], dtype)
    scores = {name: score(rewards, dataset, texts[name], written[name]) for name in policies}
    totals = {name: weighted_sum(scores[name], [reward.weight for reward in rewards]) for name in policies}
    # A prompt whose reward is missing for one policy is left out for all: the comparison is paired
    valid = np.all([np.isfinite(total) for total in totals.values()], axis=0)
    if not valid.any():
        raise ConfigError("No prompt has a finite reward for every policy. Mend the reward functions.")
    entries = {}
    for name in policies:
        log_ratio = own_logps[name] - sequence_logps(reference, prompts, written[name], **sampling)
        lengths = np.array([len(ids) for ids in written[name]])
        ended = np.array([base_tokenizer.eos_token_id in ids for ids in written[name]])
        other = name != baseline
        total, base = totals[name][valid], totals[baseline][valid]
        entries[name] = {
            "path": policies[name],
            "reward": bootstrap_mean(total)._asdict(),
            "rewards": {key: float(np.nanmean(values)) for key, values in scores[name].items()},
            "difference": paired_difference(total, base)._asdict() if other else None,
            "win_rate": win_rate(total, base)._asdict() if other else None,
            # k1 on the policy's own samples, summed over a sequence: unbiased for KL(policy || baseline)
            "kl": bootstrap_mean(log_ratio.numpy())._asdict() if other else None,
            "completion_length": float(lengths.mean()),
            "eos_rate": float(ended.mean()),
        }
    return {
        "baseline": baseline,
        "prompts": int(valid.sum()),
        "left_out": int((~valid).sum()),
        "seed": seed,
        "temperature": temperature,
        "max_completion_length": max_completion_length,
        "policies": entries,
        "samples": [
            {
                "prompt": as_text(dataset[row]["prompt"]),
                "completions": {name: as_text(texts[name][row]) for name in policies},
                "rewards": {name: float(totals[name][row]) for name in policies},
            }
            for row in range(len(dataset))
        ],
    }


def load_policy(path: str, dtype: str):
    return load_model(path, dtype=dtype).eval().to(PartialState().device)


def as_completions(tokenizer: PreTrainedTokenizerBase, prompts: Sequence, ids: Sequence[list[int]]) -> list:
    """Texts, or one assistant message each where the prompts are chats: as TRL hands them to reward functions."""
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    chat = not isinstance(prompts[0], str)
    return [[{"role": "assistant", "content": text}] for text in texts] if chat else texts


def score(
    rewards: Sequence[Callable],
    dataset: Dataset,
    completions: list,
    completion_ids: list[list[int]],
) -> dict[str, np.ndarray]:
    """Values of each reward, shape (P,): NaN where it doesn't apply (`None`), infinite where it isn't finite."""
    columns = {name: dataset[name][:] for name in dataset.column_names if name not in ("prompt", "completion")}
    scores = {}
    for reward in rewards:
        values = reward(
            prompts=dataset["prompt"][:], completions=completions, completion_ids=completion_ids, **columns
        )
        scores[reward.__name__] = np.array([_number(value) for value in values])
    return scores


def _number(value: float | None) -> float:
    if value is None:
        return np.nan
    return float(value) if np.isfinite(value) else np.inf


def weighted_sum(scores: dict[str, np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """Sum over the rewards that apply, shape (P,); not finite where none applies, or where one is no number."""
    values = np.stack(list(scores.values()))
    total = np.nansum(values * np.asarray(weights)[:, None], axis=0)
    return np.where(np.isnan(values).all(axis=0), np.nan, total)
