"""Rounds of a pipeline: the steps that repeat, and their early stopping."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError

from rlhf_trl.cli.promotion import current_before, promotion_problems
from rlhf_trl.config.ranges import problem_of
from rlhf_trl.config.values import as_dict, plain, texts
from rlhf_trl.errors import ConfigError
from rlhf_trl.hints import names_of
from rlhf_trl.runs.record import ROUNDS_FILE, is_done, read_comparison, read_metrics, read_rounds, write_json
from rlhf_trl.runs.results import Rounds

# `rounds=next`, for a scheduler that starts the same command every night
NEXT = "next"
# A key that chooses another one: ${policies.${reference}}
CHOICE = re.compile(r"\$\{(\w[\w.]*)\.\$\{(\w[\w.]*)\}\}")
# A round's number, for the name of the metric of round 0, where no step has been
START = 0


def flat(overrides: Any) -> Any:
    """Return a list of overrides in which lists of some of them are joined; anything else as it is."""
    if not isinstance(overrides, list):
        return overrides
    return [word for given in overrides for word in (flat(given) if isinstance(given, list) else [given])]


def numbered(pattern: str, first: int, last: int) -> list[str]:
    """Return `pattern` with each number from `first` to `last` in place of its `*`."""
    return [pattern.replace("*", str(number)) for number in range(first, last + 1)]


def register_rounds() -> None:
    """
    Register `${earlier:PATTERN}` and `${so_far:PATTERN}`: what [`numbered`] makes of the rounds before this one, and
    of these and this one, as a list of a command line; and `${each:PATTERN}`, as overrides. They are from round 1 on,
    or from that of a second argument. `${since_current:PATTERN}` has those after the round of the current policy, up
    to this one. `${first_or_later:A,B}` is A in the first round, B in the others; `${first_or_current:A,B}` is A while
    the current policy is the one before the rounds, else B.
    """

    def listed(key: str, as_words: bool = False):
        def resolve(pattern: str, first: int = 1, *, _root_):
            found = numbered(pattern, first, _root_[key])
            return found if as_words else f"[{','.join(found)}]"

        return resolve

    def first_or_later(first: Any, later: Any, *, _root_):
        return first if _root_["round"] < 2 else later

    def since_current(pattern: str, *, _root_):
        return f"[{','.join(numbered(pattern, _root_['current'] + 1, _root_['round']))}]"

    def first_or_current(first: Any, later: Any, *, _root_):
        return first if _root_["current"] < 1 else later

    for name, resolver in (
        ("earlier", listed("previous")),
        ("so_far", listed("round")),
        ("each", listed("round", as_words=True)),
        ("since_current", since_current),
        ("first_or_later", first_or_later),
        ("first_or_current", first_or_current),
    ):
        OmegaConf.register_new_resolver(name, resolver, replace=True)


def set_round(cfg: DictConfig, number: int) -> None:
    """Set the round in which the overrides of `each_round` are read, and the one whose policy it builds on."""
    cfg.round, cfg.previous, cfg.current = number, number - 1, current_before(cfg, number)


def all_steps(cfg: DictConfig) -> dict[str, list[str]]:
    """
    Return the steps of a pipeline in order, those of its rounds included. A step that is null is none.

    A step of `each_round` is the run `<name>_<round>`. `${round}` in its overrides, and in whatever these refer to, is
    the number of the round, from 1 on, and `${previous}` that of the one before.
    """
    register_rounds()
    found = {name: flat(own) for name, own in as_dict(cfg.steps).items() if own is not None}
    for number in range(1, cfg.rounds + 1):
        set_round(cfg, number)
        own = as_dict(cfg.each_round)
        found |= {f"{name}_{number}": flat(words) for name, words in own.items() if words is not None}
    return found


def steps_of_a_round(cfg: DictConfig) -> list[str]:
    """Return the names of the steps of a round."""
    return [name for name, words in as_dict(cfg.each_round).items() if words is not None]


def rounds_to_run(rounds: int | str, names: list[str], project_dir: Path) -> int:
    """
    Return how many rounds there are to be: `next` is the first one that isn't done.

    Args:
        rounds (`int` or `str`): as given.
        names (`list[str]`): steps of a round.
        project_dir (`Path`): folder of the runs.
    """
    if rounds != NEXT:
        return int(rounds)
    number = 1
    while all(is_done(project_dir / f"{name}_{number}") for name in names):
        number += 1
    return number


def rounds_at_a_time(cfg: DictConfig) -> list[int]:
    """
    Return up to which rounds the steps are run, one call after another: at once up to the last one; with promotion
    each by itself, as what a round measures decides what the next one builds on.
    """
    if cfg.promotion.step is None:
        return [cfg.rounds]
    following = rounds_to_run(NEXT, steps_of_a_round(cfg), Path(cfg.runs_dir, cfg.project))
    return [*range(min(following, cfg.rounds), cfg.rounds + 1)]


def round_problems(cfg: DictConfig) -> list[str]:
    """Return the problems of the keys of a pipeline that repeat steps."""
    rounds, repeated = cfg.rounds, cfg.each_round
    if not isinstance(repeated, DictConfig):
        return [f"`each_round` is {repeated!r} and must hold names of steps, each with a list of overrides."]
    if rounds != NEXT and (problem := problem_of("rounds", rounds, "int [0, inf)")):
        return [f"{problem.rstrip('.')}, or to `{NEXT}`: the first round that isn't done."]
    if bool(rounds) != bool(repeated):
        way = "Name the steps of a round there." if not repeated else "Set `rounds=1` or more."
        return [f"`rounds={rounds}`, and `each_round` holds {len(repeated)} steps. {way}"]
    if found := promotion_problems(cfg):
        return found
    # A round that lacks something fails before the first one runs. Those after the second are like it
    for number in range(1, 3 if rounds == NEXT else rounds + 1):
        set_round(cfg, number)
        if found := choice_problems(cfg) or plain(cfg)[1]:
            return found
    return []


def choice_problems(cfg: DictConfig) -> list[str]:
    """Return the problems of keys that choose another one, `${policies.${reference}}`, which isn't there."""
    found: dict[str, str] = {}
    for _, text in texts(as_dict(cfg, resolve=False)):
        for match in CHOICE.finditer(text):
            try:
                choices, key, chosen = OmegaConf.select(cfg, match[1]), match[2], OmegaConf.select(cfg, match[2])
            except InterpolationKeyError:
                continue  # the key that it depends on is wrong itself
            if isinstance(choices, DictConfig) and str(chosen) not in (known := [str(name) for name in choices]):
                found[key] = f"`{key}` is `{chosen}`. Use one of {names_of(known)}."
    return list(found.values())


def stopping_problems(options: Any, repeated: Mapping[str, Any]) -> list[str]:
    """Return the problems of `early_stopping`, for the steps `repeated` of a round."""
    known = ("step", "metric", "patience", "threshold", "greater_is_better")
    if not isinstance(options, dict) or set(options) - set(known):
        return [f"`early_stopping` must hold {names_of(known)}, and nothing else."]
    rules = {"patience": "int [1, inf)?", "threshold": "[0, inf)", "greater_is_better": "bool"}
    problems = [problem_of(f"early_stopping.{name}", options.get(name), rule) for name, rule in rules.items()]
    if problems := [problem for problem in problems if problem]:
        return problems
    if options["patience"] is None:
        return []
    step = options["step"]
    if not repeated or step not in repeated or repeated[step] is None:
        steps = names_of(name for name, words in repeated.items() if words is not None)
        what = f"`early_stopping.step` is {step!r}, and no step of `each_round`"
        return [f"{what}. Set it to the one that measures: {steps}." if steps else f"{what}, which holds none."]
    if not options["metric"]:
        return [
            "`early_stopping.metric` is null. Set it to what the step measures, such as 'policy_${round}/reward' of a "
            "stage=evaluate."
        ]
    return []


@dataclass(frozen=True)
class EarlyStopping:
    """
    Early stopping of rounds, by what a step of each one measured. The decision depends on the files of the runs alone,
    so a resumed pipeline makes the same one.

    Args:
        steps (`dict[int, str]`): of each round the run that measures.
        ends (`dict[str, int]`): last step of each round -> the round.
        metrics (`dict[int, str]`): of each round the name of the metric; that of round 0 is read from the first one,
            where it is another name.
        patience (`int`), threshold (`float`): the rounds end after `patience` ones in a row that were not better than
            the best one before by more than `threshold`.
        greater_is_better (`bool`): whether the best value is the largest.
    """

    steps: dict[int, str]
    ends: dict[str, int]
    metrics: dict[int, str]
    patience: int
    threshold: float
    greater_is_better: bool

    def after(self, step: str, project_dir: Path) -> Rounds | None:
        """
        Return what is known after a step that is done, `None` unless it is the last one of a round.

        Raises:
            [`~rlhf_trl.errors.ConfigError`]: if a run doesn't have the metric.
        """
        if step not in self.ends:
            return None
        last, values = self.ends[step], {}
        for number in range(1, last + 1):
            measured = measures_of(project_dir / self.steps[number])
            if number == 1 and self.metrics[START] != self.metrics[1] and self.metrics[START] in measured:
                values[START] = measured[self.metrics[START]]
            if (value := measured.get(self.metrics[number])) is None:
                raise ConfigError(
                    f"`early_stopping.metric` is `{self.metrics[number]}` in round {number}, which the run "
                    f"`{project_dir / self.steps[number]}` didn't measure. "
                    + (f"It has {names_of(measured)}." if measured else "It has no metrics.")
                )
            values[number] = value
        found = decide(values, self.patience, self.threshold, self.greater_is_better)
        stopped = None if found.stopped == len(self.steps) else found.stopped  # all rounds ran
        return replace(found, metric=self.metrics[last], step=self.steps[last], stopped=stopped, total=len(self.steps))


def decide(values: Mapping[int, float], patience: int, threshold: float, greater_is_better: bool) -> Rounds:
    """
    Return the best round, and after which one they end.

    Args:
        values (`dict[int, float]`): what each round measured, in order.
        patience (`int`), threshold (`float`), greater_is_better (`bool`): see [`EarlyStopping`].
    """
    sign, best, bad, stopped = (1 if greater_is_better else -1), None, 0, None
    for number, value in values.items():
        if math.isfinite(value) and (best is None or sign * (value - values[best]) > threshold):
            best, bad = number, 0
        else:
            bad += 1
        if bad >= patience and stopped is None:
            stopped = number
            break
    return Rounds(values={str(number): value for number, value in values.items()}, best=best, stopped=stopped)


def early_stopping(cfg: DictConfig) -> EarlyStopping | None:
    """Return the early stopping of a pipeline whose `rounds` is a number, `None` where it has none."""
    options, names = cfg.early_stopping, steps_of_a_round(cfg)
    if options.patience is None:
        return None
    metrics = {}
    for number in range(cfg.rounds + 1):
        set_round(cfg, number)
        metrics[number] = str(options.metric)
    numbers = range(1, cfg.rounds + 1)
    return EarlyStopping(
        steps={number: f"{options.step}_{number}" for number in numbers},
        ends={f"{names[-1]}_{number}": number for number in numbers},
        metrics=metrics,
        patience=options.patience,
        threshold=options.threshold,
        greater_is_better=options.greater_is_better,
    )


def measures_of(run_dir: Path) -> dict[str, float]:
    """Return what a run measured: the last evaluation of `metrics.json`, and of a comparison `POLICY/MEASURE`."""
    comparison, metrics = read_comparison(run_dir), read_metrics(run_dir)
    found: dict[str, Any] = dict((metrics or {"eval": {}})["eval"])
    if comparison is not None:
        found |= comparison.measures
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float)}


def note_rounds(found: Rounds | None, project_dir: Path) -> None:
    """Write what is known of the rounds, for the report, or delete it where rounds don't stop early."""
    if found is None:
        Path(project_dir, ROUNDS_FILE).unlink(missing_ok=True)
    elif found != read_rounds(project_dir):
        write_json(project_dir / ROUNDS_FILE, found)
