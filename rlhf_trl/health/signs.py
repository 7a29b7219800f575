"""
Signs of trouble in an RLHF run: pure functions of the metrics that a trainer logs. Imports nothing heavy.

A sign is a number that is compared with three limits (note, warn, stop). [`rlhf_trl.callbacks.health`] measures and
reports; metrics that trainers don't log are computed from a rollout's texts by
[`~rlhf_trl.health.text_statistics.rollout_measures`].
"""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, median
from typing import Any, NamedTuple

from rlhf_trl.errors import ConfigError
from rlhf_trl.health.series import Series, sampling_noise
from rlhf_trl.hints import did_you_mean

LEVELS = ("ok", "note", "warn", "stop")
NOTE = LEVELS.index("note")
# A difference of means counts from so many of its standard errors on: it is looked for at every log step
STANDARD_ERRORS = 4
# Times as long, or as short, as at the start: completions whose length has changed
LENGTH_CHANGE = 1.25
# Number of log steps whose gradient norms the newest one is compared with
GRADIENT_WINDOW = 20
# Share of its maximum from which on a multiplier counts as being there
AT_CEILING = 0.999

KL = ("objective/kl",)
SCORE = ("objective/scores", "reward")
# With combine=lagrange, whose score changes with its multipliers
MAXIMIZED = "objective/maximized"
SCORE_STD = ("objective/scores_std", "reward_std")
ENTROPY = ("policy/entropy", "entropy")
CLIPPED = ("policy/clipfrac", "clip_ratio/region_mean")
LENGTH = ("completions/mean_length",)


def _negative(series: Series) -> float | None:
    kl, error = series.recent(*KL), series.recent("objective/kl_standard_error")
    return None if kl is None or error is None else -kl / max(error, 1e-3)


def _growth(series: Series) -> float | None:
    kl, values = series.recent(*KL), series.values(*KL)
    before = values[: -series.window][-series.window :]
    return None if kl is None or fmean(before) <= 0 else kl / fmean(before)


def _entropy(series: Series) -> float | None:
    now = series.recent(*ENTROPY)
    return None if now is None or series.start(*ENTROPY) <= 0 else now / series.start(*ENTROPY)


def _over_optimization(series: Series) -> float | None:
    drops = []
    for prefix in ("", "eval_"):
        scores = series.values(*(f"{prefix}{name}" for name in (MAXIMIZED, *SCORE)))
        for name in series.watched:
            stem = f"{prefix}rewards/{name}"
            drops.append(_drop(series, series.values(f"{stem}/mean"), f"{stem}/std", scores))
        for stem in series.stems(f"{prefix}rewards/", "/disagreement"):
            means, spread = series.values(f"{stem}/mean"), series.values(f"{stem}/disagreement")
            count = min(len(means), len(spread))
            least = [m - s for m, s in zip(means[-count:], spread[-count:], strict=True)] if count else []
            drops.append(_drop(series, least, f"{stem}/std", scores))
    return max((drop for drop in drops if drop is not None), default=None)


def _drop(series: Series, watched: Sequence[float], std: str, scores: Sequence[float]) -> float | None:
    """
    Return how many standard deviations a watched reward is below its best; 0 unless the score has risen since, or if
    sampling may be the reason.
    """
    spread, count, window = series.recent(std), min(len(watched), len(scores)), series.window
    if not spread or count < series.baseline + window:
        return None
    # Both are logged together: the newest values belong to the same log steps
    watched, scores = watched[-count:], scores[-count:]
    means = [fmean(watched[i : i + window]) for i in range(count - window + 1)]
    best = max(range(len(means)), key=means.__getitem__)
    if fmean(scores[-window:]) <= fmean(scores[best : best + window]):
        return 0.0
    drop = means[best] - means[-1]
    return drop / spread if drop > STANDARD_ERRORS * sampling_noise(watched) * math.sqrt(2 / window) else 0.0


def _explained(series: Series) -> float | None:
    std, scores = series.recent(*SCORE_STD), series.recent(*SCORE)
    # A constant reward has no variance to explain
    constant = std is not None and scores is not None and std <= 1e-6 * max(1.0, abs(scores))
    return None if constant else series.recent("value/explained_variance")


def _fall(series: Series) -> float | None:
    rise, std = series.rise(*SCORE), series.recent(*SCORE_STD)
    # The score of combine=lagrange falls while multipliers rise, whatever the policy does
    if rise is None or std is None or series.stems("constraints/", "/lambda_share"):
        return None
    # The std of the start counts as well: a policy that has collapsed has none of its own
    std = max(std, series.start(*SCORE_STD))
    if std <= 0:
        return None
    error = sampling_noise(series.values(*SCORE)) * math.sqrt(1 / series.baseline + 1 / series.window)
    return -rise / std if -rise > STANDARD_ERRORS * error else min(0.0, -rise / std)


def _length(series: Series) -> float | None:
    now = series.recent(*LENGTH)
    if now is None:
        return None
    factor = now / max(series.start(*LENGTH), 1e-9)
    return max(factor, 1 / max(factor, 1e-9))


def _length_bias(series: Series) -> float | None:
    """
    Return the correlation of reward and length, 0 unless lengths have moved the way that it pays: prompts that need
    long answers and score high correlate too, and a policy can't gain by that.
    """
    correlation, now = series.recent("objective/length_correlation"), series.recent(*LENGTH)
    if correlation is None or now is None:
        return None
    factor = now / max(series.start(*LENGTH), 1e-9)
    paid = factor if correlation > 0 else 1 / max(factor, 1e-9)
    return abs(correlation) if paid >= LENGTH_CHANGE else 0.0


def _eos(series: Series) -> float | None:
    if series.values("completions/eos_rate"):
        return series.recent("completions/eos_rate")
    cut = series.recent("completions/clipped_ratio")
    return None if cut is None else 1 - cut


def _spike(series: Series) -> float | None:
    norms = series.values("grad_norm")
    if len(norms) < series.baseline + series.window:
        return None
    usual = median(norms[:-1][-GRADIENT_WINDOW:])
    return norms[-1] / usual if usual > 0 else None


def _ceiling(series: Series) -> float | None:
    shares = [series.recent(f"{stem}/lambda_share") for stem in series.stems("constraints/", "/lambda_share")]
    return max((share for share in shares if share is not None), default=None)


def _unmet(series: Series) -> float | None:
    """Return for how many log steps in a row a multiplier has been at its maximum, and its constraint violated."""
    longest = None
    for stem in series.stems("constraints/", "/lambda_share"):
        costs, shares = series.values(f"{stem}/cost"), series.values(f"{stem}/lambda_share")
        if len(costs) < series.baseline + series.window:
            continue
        count = 0
        for cost, share in zip(reversed(costs), reversed(shares), strict=False):
            if cost <= 0 or share < AT_CEILING:
                break
            count += 1
        longest = max(longest or 0.0, float(count))
    return longest


class Sign(NamedTuple):
    """
    A sign of trouble.

    Attributes:
        measure: returns the value, `None` where it isn't known (yet).
        message: the value in words, with `{value}`.
        remedy: options to change.
        limits: value from which on a level is reached; `None` for never.
        falls: whether low values are the bad ones.
        when: name of a metric and a number: the sign is `ok` while the metric's recent mean is below it.
        note_after: number of log steps before which nothing is noted; warnings and stops don't wait.
    """

    measure: Callable[[Series], float | None]
    message: str
    remedy: str
    limits: dict[str, float | None]
    falls: bool = False
    when: tuple[tuple[str, ...], float] | None = None
    note_after: int = 0


SIGNS: dict[str, Sign] = {
    "nan": Sign(
        lambda series: (series.values("health/nonfinite_updates") or [None])[-1],
        "{value:.0f} updates had NaN or infinite gradients; they were dropped",
        "Lower `stage.args.learning_rate`, or look for rewards of an extreme scale (`reward_norm=running`)",
        {"note": None, "warn": None, "stop": 1},
    ),
    "kl_high": Sign(
        lambda series: series.recent(*KL),
        "the KL to the reference is {value:.3g} nats per sequence",
        "Raise `stage.args.beta`, hold it with `kl=adaptive kl.target=6`, or lower `stage.args.learning_rate`",
        {"note": 15.0, "warn": 30.0, "stop": None},
    ),
    "kl_growing": Sign(
        _growth,
        "the KL to the reference has become {value:.2g} times what it was some log steps ago",
        "Raise `stage.args.beta`, or stop in time with `kl.guard`",
        {"note": 1.3, "warn": 2.0, "stop": None},
        when=(KL, 10.0),
    ),
    "kl_negative": Sign(
        _negative,
        "the KL to the reference is {value:.2g} standard errors below 0, which no KL can be",
        "Sample from what is scored: no `top_k`, `top_p` or `repetition_penalty`",
        {"note": None, "warn": 3.0, "stop": None},
    ),
    "entropy_collapse": Sign(
        _entropy,
        "the policy's entropy is {value:.0%} of what it was",
        "Raise `stage.args.beta` or `+stage.args.entropy_coef`, or lower `stage.args.learning_rate`",
        {"note": 0.3, "warn": 0.15, "stop": None},
        falls=True,
    ),
    "clip_fraction": Sign(
        lambda series: series.recent(*CLIPPED),
        "{value:.0%} of the tokens are clipped: updates are too large",
        "Lower `stage.args.learning_rate` or `stage.args.num_iterations`",
        {"note": 0.3, "warn": 0.5, "stop": None},
    ),
    "low_explained_variance": Sign(
        _explained,
        "the critic explains {value:.0%} of the returns' variance",
        "Raise `stage.args.critic_learning_rate` or `stage.args.cliprange_value`, or start it from the reward model "
        "(`critic=model critic.run=reward`)",
        {"note": 0.05, "warn": -0.2, "stop": None},
        falls=True,
        # A critic that starts at zero explains nothing at first, and the policy learns all the same
        note_after=30,
    ),
    "over_optimization": Sign(
        _over_optimization,
        "the reward rises, and a watched reward (or an ensemble's lower end) is {value:.2g} standard deviations below "
        "its best",
        "Raise `stage.args.beta`, stop earlier, or train the reward model on this policy's completions",
        {"note": 0.3, "warn": 0.6, "stop": None},
    ),
    "reward_falling": Sign(
        _fall,
        "the reward is {value:.2g} standard deviations below its start",
        "Lower `stage.args.learning_rate`",
        {"note": 0.3, "warn": 0.6, "stop": None},
    ),
    "constant_reward": Sign(
        lambda series: series.recent("objective/most_common_score"),
        "{value:.0%} of the completions have the same reward: there is little to learn from",
        "Look at samples.jsonl: a solved or impossible task, or a reward that is cut off (`reward_norm.clip`)",
        {"note": 0.9, "warn": 0.98, "stop": None},
    ),
    "length_drift": Sign(
        _length,
        "completions have become {value:.2g} times as long, or as short, as they were",
        "Set `stage.args.length_penalty` (ppo), fix a reward that pays for length, or raise `stage.args.beta`",
        {"note": 1.6, "warn": 2.0, "stop": None},
    ),
    "length_bias": Sign(
        _length_bias,
        "reward and length of a completion correlate by {value:.2f} either way, and lengths move the way that it pays",
        "Train the reward model on pairs of like length, or set `stage.args.length_penalty` (ppo)",
        {"note": 0.7, "warn": 0.85, "stop": None},
    ),
    "repetition": Sign(
        lambda series: series.rise("completions/repetition"),
        "{value:.0%} more of a completion's word trigrams are repeated than at the start",
        "Raise `stage.args.beta`, or penalize it with a reward function (`reward=[...,function]`)",
        {"note": 0.1, "warn": 0.25, "stop": None},
    ),
    "mode_collapse": Sign(
        lambda series: series.rise("completions/similarity"),
        "answers to different prompts share {value:.0%} more of their word trigrams than at the start",
        "Raise `stage.args.beta` or `stage.args.temperature`; see in samples.jsonl what the reward pays for",
        {"note": 0.1, "warn": 0.25, "stop": None},
    ),
    "missing_eos": Sign(
        _eos,
        "only {value:.0%} of the completions end with EOS",
        "Raise `stage.args.max_completion_length`, or set `stage.args.missing_eos_penalty` (ppo)",
        {"note": 0.8, "warn": 0.5, "stop": None},
        falls=True,
    ),
    "multiplier_ceiling": Sign(
        _ceiling,
        "the multiplier of a constraint is at {value:.0%} of its maximum: there it no longer reacts to violations",
        "Raise `combine.lambda_max`, or the `weight` of the constraint's reward if its cost is small beside others",
        {"note": 0.95, "warn": AT_CEILING, "stop": None},
    ),
    "constraint_unmet": Sign(
        _unmet,
        "for {value:.0f} log steps in a row a constraint has been violated with its multiplier at the maximum: it "
        "can't be met like this",
        "Loosen the bound in `combine.constraints`, raise `combine.lambda_max`, or lower `stage.args.beta` if the KL "
        "holds the policy back",
        {"note": 3.0, "warn": 7.0, "stop": None},
    ),
    "gradient_spike": Sign(
        _spike,
        "the gradient norm is {value:.3g} times its usual value",
        "Lower `stage.args.learning_rate` or `+stage.args.max_grad_norm`, or lengthen `stage.args.warmup_steps`",
        {"note": 10.0, "warn": 50.0, "stop": None},
    ),
    "sampler_mismatch": Sign(
        lambda series: series.recent("sampling/prob_error"),
        "vLLM and the policy give a sampled token probabilities that differ by {value:.1%}",
        "If it grows, vLLM doesn't get all weights: use a version that TRL supports. If it is so from the start, "
        "compute alike in both: in float16 (`+stage.args.fp16=true`) or float32, and nothing quantized",
        # NeMo RL: above 1 to 2 % the update of the weights is usually at fault (docs/guides/grpo.md), and above 5 % it
        # is to be investigated (docs/adding-new-models.md)
        {"note": 0.02, "warn": 0.05, "stop": None},
    ),
    "clipped_completions": Sign(
        lambda series: series.recent("sampling/clipfrac_long"),
        "in the longer half of the completions {value:.0%} of the importance-sampling ratios are outside of their "
        "bounds; where it is less in the shorter half (`sampling/clipfrac_short`), short completions count for more",
        "With a mode `sequence_...` set `stage.args.vllm_importance_sampling_mode=token_truncate`, whose ratios don't "
        "grow with the length, or raise `stage.args.vllm_importance_sampling_clip_max`",
        {"note": 0.1, "warn": 0.3, "stop": None},
    ),
}


class Finding(NamedTuple):
    """
    Value of a sign at a log step.

    Attributes:
        level: index of `LEVELS`.
        text: message with the limit and the remedy; empty at the level `ok`.
    """

    level: int
    value: float
    text: str


def evaluate_signs(series: Series, limits: Mapping[str, Mapping[str, float | None]]) -> dict[str, Finding]:
    """
    Return the signs that can be evaluated on what was logged so far, whatever their level.

    Args:
        series ([`Series`]): the logged metrics.
        limits (`dict`): `{sign: {"note": ..., "warn": ..., "stop": ...}}`, see [`all_limits`].
    """
    found = {}
    for name, sign in SIGNS.items():
        value = sign.measure(series)
        if value is None or not math.isfinite(value):
            continue
        level = _level(value, limits[name], sign.falls)
        if sign.when is not None and (series.recent(*sign.when[0]) or 0.0) < sign.when[1]:
            level = 0
        if level == NOTE and series.log_steps < sign.note_after:
            level = 0
        limit = limits[name][LEVELS[level]] if level else None
        text = f"{sign.message.format(value=value)} ({LEVELS[level]} from {limit:g}). {sign.remedy}." if level else ""
        found[name] = Finding(level, value, text)
    return found


def _level(value: float, limits: Mapping[str, float | None], falls: bool) -> int:
    reached = [
        level
        for level, name in enumerate(LEVELS)
        if (limit := limits.get(name)) is not None and (value <= limit if falls else value >= limit)
    ]
    return max(reached, default=0)


def all_limits(changed: Mapping[str, Mapping[str, float | None]] | None = None) -> dict[str, dict[str, float | None]]:
    """
    Return the limits of every sign: the defaults, updated with `changed`.

    Raises:
        [`~rlhf_trl.errors.ConfigError`]: with all problems of `changed`.
    """
    if problems := limit_problems(changed or {}):
        raise ConfigError.join(problems)
    return {name: sign.limits | dict((changed or {}).get(name, {})) for name, sign in SIGNS.items()}


def limit_problems(changed: Mapping[str, Mapping[str, float | None]], key: str = "health.signs") -> list[str]:
    """Return the problems of `changed`: unknown signs and levels, values that aren't numbers, limits out of order."""
    problems = []
    for name, given in changed.items():
        if name not in SIGNS:
            problems.append(f"`{key}.{name}` is no sign. {did_you_mean(name, SIGNS)}")
            continue
        if not isinstance(given, Mapping):
            problems.append(f"`{key}.{name}` is {given!r}. Set `{key}.{name}.warn=...` to a number or null.")
            continue
        unknown = [level for level in given if level not in LEVELS[1:]]
        wrong = [v for k, v in given.items() if k not in unknown and v is not None and not _is_number(v)]
        problems += [f"`{key}.{name}.{level}` is no level. Use note, warn and stop." for level in unknown]
        problems += [f"`{key}.{name}` has the limit {value!r}. Use a number, or null for never." for value in wrong]
        if unknown or wrong:
            continue
        merged = SIGNS[name].limits | dict(given)
        there = [(level, limit) for level in LEVELS[1:] if (limit := merged[level]) is not None]
        ordered = sorted(there, key=lambda item: item[1], reverse=SIGNS[name].falls)
        if [value for _, value in ordered] != [value for _, value in there]:
            shown = ", ".join(f"{level} {value:g}" for level, value in there)
            worse = "lower" if SIGNS[name].falls else "higher"
            problems.append(
                f"`{key}.{name}` has the limits {shown}, and this sign is worse the {worse} it is. Order them from "
                "note to stop, or set some to null."
            )
    return problems


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def verdict(logs: Mapping[str, float | None]) -> str:
    """
    Return the health of a log step for a line of metrics: `health ok`, or the worst level with its signs, such as
    `health warn kl_high`.

    Args:
        logs (`dict`): the logged metrics, with `health/level` and `health/<sign>`; without these the text is empty.
    """
    logged = logs.get("health/level")
    if logged is None:
        return ""
    level = int(logged)
    shown = [name for name in SIGNS if level and logs.get(f"health/{name}") == level]
    more = sum(1 for name in SIGNS if 0 < (logs.get(f"health/{name}") or 0) < level)
    return " ".join(["health", LEVELS[level], *shown, *([f"+{more}"] if more else [])])


class Seen(NamedTuple):
    """
    A sign that appeared in a run.

    Attributes:
        level: its highest level, an index of `LEVELS`.
        first, last: optimizer steps at which it was logged first and last.
        count: number of log steps.
    """

    sign: str
    level: int
    first: int
    last: int
    count: int


def signs_seen(history: Sequence[Mapping[str, Any]]) -> list[Seen]:
    """
    Return the signs that appeared in a run, the worst first.

    Args:
        history (`list[dict]`): `trainer.state.log_history`, or `history` of a run's `metrics.json`.
    """
    seen = []
    for name in SIGNS:
        entries = [entry for entry in history if (entry.get(f"health/{name}") or 0) > 0]
        if entries:
            steps = [int(entry["step"]) for entry in entries]
            level = max(int(entry[f"health/{name}"]) for entry in entries)
            seen.append(Seen(name, level, min(steps), max(steps), len(entries)))
    return sorted(seen, key=lambda found: -found.level)


def health_of(history: Sequence[Mapping[str, Any]]) -> str:
    """Return the health of a run in a word or two, `ok` or `warn kl_high`; empty where no monitor watched it."""
    if not any("health/level" in entry for entry in history):
        return ""
    seen = signs_seen(history)
    if not seen:
        return LEVELS[0]
    worst = seen[0].level
    more = sum(sign.level < worst for sign in seen)
    shown = [sign.sign for sign in seen if sign.level == worst]
    return " ".join([LEVELS[worst], *shown, *([f"+{more}"] if more else [])])
