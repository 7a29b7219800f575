"""Promotion between the rounds of a pipeline: a policy that its own comparison finds worse is not built upon."""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from rlhf_trl.config.values import as_dict
from rlhf_trl.errors import ConfigError
from rlhf_trl.hints import names_of
from rlhf_trl.report.measures import difference_of, wins_of
from rlhf_trl.runs.record import PROMOTIONS_FILE, is_done, read_comparison, read_promotions, write_json
from rlhf_trl.runs.results import Comparison, Promotion, Promotions

# What a policy is judged by where `promotion.measure` is null: the first of these that the comparison has
MEASURES = ("reward", "win_rate")
DIFFERENCES = {"reward": difference_of, "win_rate": wins_of}
RULES = ("not_worse", "better")


def promotions(cfg: DictConfig, last: int) -> Promotions | None:
    """
    Return the decisions of the rounds up to `last` whose comparison is done, `None` where nothing is decided. They
    follow from the files of the runs alone.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if a comparison lacks a policy or the measure.
    """
    options = cfg.get("promotion")
    if not options or options.step is None:
        return None
    current, found = options.first, []
    for number in range(1, last + 1):
        run_dir = Path(cfg.runs_dir, cfg.project, f"{options.step}_{number}")
        comparison = read_comparison(run_dir) if is_done(run_dir) else None
        if comparison is None:
            break
        policy = f"{options.policy}_{number}"
        made = decide(comparison, number, policy, current, options.measure, options.rule, run_dir)
        found.append(made)
        current = made.policy if made.is_promoted else current
    return Promotions(current=current, rounds=found)


def current_before(cfg: DictConfig, number: int) -> int:
    """
    Return the round whose policy the round `number` builds on, 0 for what there was before the first one: the last
    promoted one; without promotion, or where a round isn't compared yet, the one before.
    """
    found = promotions(cfg, number - 1)
    if found is None or len(found.rounds) < number - 1:
        return number - 1
    return max((each.round for each in found.rounds if each.is_promoted), default=0)


def decide(
    comparison: Comparison, number: int, policy: str, former: str, measure: str | None, rule: str, run_dir: Path
) -> Promotion:
    """
    Return whether the policy of a round becomes the current one, by the paired difference to the former one and its
    95 % interval over the prompts.

    Args:
        comparison (`Comparison`): of both.
        number (`int`), policy (`str`), former (`str`): the round, and the names of its policy and of the current one.
        measure (`str`, *optional*): what counts; `None`: the first of [`MEASURES`] that the comparison has.
        rule (`str`): `not_worse`: unless the interval is below 0; `better`: if it is above 0. A single prompt has no
            interval, so that neither is known of it.
        run_dir (`Path`): the run of the comparison, for messages.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: if the comparison lacks a policy, the measure or the paired difference.
    """
    if missing := [name for name in (policy, former) if name not in comparison.policies]:
        raise ConfigError(
            f"`promotion.step`: the comparison `{run_dir}` has no policy `{missing[0]}` (it has "
            f"{names_of(comparison.policies)}), so that none can be promoted. Compare both, or set "
            "`promotion.step=null`."
        )
    for name in MEASURES if measure is None else (measure,):
        value, before = (_value(comparison, each, name) for each in (policy, former))
        if value is not None and before is not None:
            found = DIFFERENCES[name](comparison, policy, former)
            if found is None:
                raise ConfigError(
                    f"`promotion`: the comparison `{run_dir}` has no difference in {name} between `{policy}` and "
                    f"`{former}` on the same prompts, as it is of an earlier version or no prompt is judged of both. "
                    "Remove its folder, so that it is made again."
                )
            is_promoted = found.low > 0 if rule == "better" else not found.high < 0
            return Promotion(number, policy, former, is_promoted, name, value, before, found, rule)
    if measure is not None:
        raise ConfigError(f"`promotion.measure={measure}`, which the comparison `{run_dir}` didn't measure.")
    return Promotion(number, policy, former, True, rule=rule)


def _value(comparison: Comparison, policy: str, measure: str) -> float | None:
    """Return the mean of a measure of a policy; the baseline wins against itself half of the time."""
    estimate = getattr(comparison.policies[policy], measure)
    if estimate is None and measure == "win_rate" and policy == comparison.baseline:
        others = comparison.others.values()
        return 0.5 if any(each.win_rate is not None for each in others) else None
    return None if estimate is None else estimate.mean


def promotion_problems(cfg: DictConfig) -> list[str]:
    """Return the problems of `promotion`."""
    known = ("step", "policy", "first", "measure", "rule")
    if not isinstance(cfg.promotion, DictConfig) or set(cfg.promotion) - set(known):
        return [f"`promotion` must hold {names_of(known)}, and nothing else. `promotion.step=null` turns it off."]
    options = as_dict(cfg.promotion)
    if options["step"] is None:
        return []
    steps = [name for name, words in as_dict(cfg.each_round).items() if words is not None]
    for key in ("step", "policy"):
        if options[key] not in steps:
            return [
                f"`promotion.{key}` is {options[key]!r}, and no step of `each_round`. Set it to {names_of(steps)}."
            ]
    if options["first"] is None:
        return ["`promotion.first` is null. Set it to the name that the comparison has for the policy before round 1."]
    if options["measure"] not in (None, *MEASURES):
        return [f"`promotion.measure` is {options['measure']!r}. Set it to {names_of(MEASURES)}, or null for either."]
    if options["rule"] not in RULES:
        return [f"`promotion.rule` is {options['rule']!r}. Set it to {names_of(RULES)}."]
    if OmegaConf.select(cfg, "early_stopping.patience") is not None:
        return ["`promotion.step` and `early_stopping.patience` are both set. Set one of them to null."]
    return []


def note_promotions(found: Promotions | None, project_dir: Path) -> None:
    """Write the decisions, for the report and for whoever serves the policy, or delete them where there are none."""
    if found is None or not found.rounds:
        Path(project_dir, PROMOTIONS_FILE).unlink(missing_ok=True)
    elif found != read_promotions(project_dir):
        write_json(project_dir / PROMOTIONS_FILE, found)
