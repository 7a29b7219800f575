"""How often rewards agree with people about which of two completions is better (`stage=reward_pairs`)."""

from collections.abc import Callable, Sequence

import numpy as np
from accelerate import PartialState
from datasets import Dataset
from omegaconf import DictConfig, OmegaConf

from rlhf_trl.callbacks.record import write_metrics
from rlhf_trl.evaluation.evaluate import held_out
from rlhf_trl.evaluation.statistics import Estimate, win_rate
from rlhf_trl.evaluation.tables import table
from rlhf_trl.quiet import quiet
from rlhf_trl.run import begin, end, instantiate_data, reward_functions


def reward_pairs(cfg: DictConfig) -> None:
    """
    Scores the eval pairs of `cfg.data` with each reward of `cfg.reward`; writes `metrics.json` and prints a table.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if a reward model is missing, or the data has no held-out pairs.
    """
    OmegaConf.resolve(cfg)
    quiet()
    begin(cfg, ", ".join(cfg.reward))
    if not PartialState().is_main_process:
        return  # one rank scores and writes
    try:
        pairs = held_out(instantiate_data(cfg))
        found = {
            reward.__name__: accuracy_by_gap(
                *scores_of(reward, pairs), gaps=gaps_of(pairs), above=cfg.stage.gaps_above
            )
            for reward in reward_functions(cfg, tokenizer=None)
        }
    except BaseException as error:
        end(cfg, "failed", error=f"{type(error).__name__}: {error}")
        raise
    metrics = {f"eval_{name}/{key}": value.mean for name, each in found.items() for key, value in each.items()}
    write_metrics(cfg.run_dir, [{"step": 0, **metrics}])
    end(cfg, "done")
    rows = [
        [name, key, f"{value.mean:.3f}", f"{value.low:.3f} to {value.high:.3f}"]
        for name, each in found.items()
        for key, value in each.items()
    ]
    print("\n" + table(["reward", f"on {len(pairs):,} pairs", "share", "95 % interval"], rows))


def scores_of(reward: Callable, pairs: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """A reward's scores of the chosen and the rejected completions, shape (P,) each."""
    prompts = pairs["prompt"][:]
    chosen, rejected = (
        np.array(reward(prompts=prompts, completions=pairs[side][:], completion_ids=[[]] * len(pairs)), dtype=float)
        for side in ("chosen", "rejected")
    )
    return chosen, rejected


def gaps_of(pairs: Dataset) -> np.ndarray | None:
    """How far apart people see the two completions, shape (P,), where the data has a column `gap`."""
    return np.array(pairs["gap"][:]) if "gap" in pairs.column_names else None


def accuracy_by_gap(
    chosen: np.ndarray, rejected: np.ndarray, gaps: np.ndarray | None = None, above: Sequence[float] = ()
) -> dict[str, Estimate]:
    """
    Share of pairs whose chosen completion scores higher (a tie counts half), with its 95 % interval.

    Args:
        chosen, rejected (`np.ndarray` of shape `(P,)`):
            Scores.
        gaps (`np.ndarray` of shape `(P,)`, *optional*):
            How far apart people see the two.
        above (`Sequence[float]`):
            The share is also taken over the pairs with a gap above each of these; needs `gaps`.
    """
    found = {"accuracy": win_rate(chosen, rejected)}
    for limit in above if gaps is not None else ():
        wide = gaps > limit
        if wide.any():
            found[f"accuracy_gap_above_{limit:g}"] = win_rate(chosen[wide], rejected[wide])
    return found
