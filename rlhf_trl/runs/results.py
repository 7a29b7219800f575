"""Results of runs: the content of `run.json`, `sweep.json` and `comparison.json`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple, Self

from rlhf_trl.runs.serialization import JsonDataclass, decode, encode


class Estimate(NamedTuple):
    """A mean with the lower and upper end of its interval; NaN where it could not be made."""

    mean: float
    low: float
    high: float

    def to_json(self) -> dict[str, float | None]:
        """Return the object that stands in JSON files."""
        return encode(self._asdict())

    @classmethod
    def from_json(cls, content: Any) -> Self:
        """
        Read an estimate.

        Raises:
            ValueError: if it lacks one of the three numbers.
        """
        if not isinstance(content, Mapping) or not content.keys() >= set(cls._fields):
            raise ValueError(f"an estimate lacks one of {', '.join(f'`{name}`' for name in cls._fields)}")
        return cls(*(decode(float, content[name], name) for name in cls._fields))


# ---- Runs ----


@dataclass(frozen=True, kw_only=True)
class RunRecord(JsonDataclass):
    """
    Record of a run (`run.json`).

    Attributes:
        status: `running`, `done`, `stopped` (by Ctrl-C), `preempted` (by a signal of a scheduler) or `failed`.
        model: path or hub id of the model that the run started from.
        pid, host: process and machine of rank 0.
        inputs: what its result depends on besides the config, see [`~rlhf_trl.stages.train.inputs_of`].
        quantization: quantization of the base under its adapter.
        published: what others measured with these settings: metric -> `value` (a number, or the lowest and the
            highest) and `source`.
        base, base_fingerprint: of a saved adapter its base, and a hash of that where it is a folder.
        reason: why a callback ended the training.
        error: error that ended the run.
    """

    stage: str = ""
    command: str = ""
    status: str
    model: str | None = None
    pid: int | None = None
    host: str | None = field(default=None, metadata={"without": "host"})
    started: str | None = None
    ended: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)
    quantization: dict[str, Any] | None = None
    published: dict[str, Any] = field(default_factory=dict)
    reason: str | None = field(default=None, metadata={"without": "reason"})
    error: str | None = field(default=None, metadata={"without": "error"})
    base: str | None = field(default=None, metadata={"without": "base"})
    base_fingerprint: str | None = field(default=None, metadata={"without": "base"})

    @property
    def seconds(self) -> float | None:
        """Time from start to end; `None` while the run is under way."""
        if self.started is None or self.ended is None:
            return None
        return (datetime.fromisoformat(self.ended) - datetime.fromisoformat(self.started)).total_seconds()


@dataclass(frozen=True, kw_only=True)
class SweepJob(JsonDataclass):
    """
    Job of a sweep (one entry of `sweep.json`).

    Attributes:
        number: its number, which is its folder's name.
        overrides: overrides of the job, name to value.
        status: `done` or `failed`.
        objective, value: name of the metric that counts, and its last value.
        direction: `minimize` or `maximize`; `None` where it isn't known.
        health: worst level of the health monitor with its signs; empty where nothing was watched.
        eval: last value of each metric of the evaluation.
        weights: weight of each reward of the config, where no override sets it.
        message: error message of a failed job.
        log: file with its output.
    """

    number: int
    overrides: dict[str, str]
    status: str
    seconds: float = 0.0
    objective: str | None = None
    value: float | None = None
    direction: str | None = None
    health: str = ""
    eval: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict, metadata={"without": "weights"})
    message: str | None = None
    log: str = ""

    @property
    def done(self) -> bool:
        """True for a job that ended well."""
        return self.status == "done"


@dataclass(frozen=True, kw_only=True)
class Rounds(JsonDataclass):
    """
    Metric of the rounds of a pipeline that stops early, and its best one (`rounds.json` in the folder of the project).

    Attributes:
        metric, step: name of the metric in the last round, and the run that has it.
        values: the metric by round; that of 0 is from before the first round.
        best: the best round; `None` where no value is finite.
        stopped: the round after which the rounds ended early; `None` where they did not.
        total: number of rounds that there were to be.
    """

    metric: str = ""
    step: str = ""
    values: dict[str, float]
    best: int | None = None
    stopped: int | None = None
    total: int | None = None

    @property
    def in_words(self) -> str:
        """The best round, and where the rounds ended early, in a sentence."""
        best = "none has a finite value" if self.best is None else f"the best one is round {self.best}"
        if self.best == 0:
            best = "the best policy is the one before the first round"
        values = ", ".join(f"{number}: {value:.4g}" for number, value in self.values.items())
        if self.stopped is None:
            return f"Rounds by `{self.metric}` ({values}): {best}."
        end = f"Early stopping after round {self.stopped} of {self.total}"
        return f"{end}: `{self.metric}` improves no more ({values}); {best}."


@dataclass(frozen=True)
class Promotion(JsonDataclass):
    """
    Whether the policy of a round became the current one.

    Attributes:
        round, policy: the round, and its policy.
        former: the policy that was the current one before.
        is_promoted: whether it is `policy` now.
        measure, value, former_value: what decided, and its means; `None` where nothing was measured.
        difference: mean of the differences on the same prompts, with its interval; `None` likewise.
        rule: `not_worse` or `better`, see `promotion.rule` in `conf/pipeline.yaml`.
    """

    round: int
    policy: str
    former: str
    is_promoted: bool
    measure: str | None = None
    value: float | None = None
    former_value: float | None = None
    difference: Estimate | None = None
    rule: str = "not_worse"

    @property
    def in_words(self) -> str:
        """The decision in a sentence."""
        if self.value is None or self.former_value is None:
            return f"`{self.policy}` is the current policy; it was not compared by a reward or a judge."
        values = (
            f"{(self.measure or '').replace('_', ' ')} {self.value:.4g}, and `{self.former}` {self.former_value:.4g}"
        )
        if self.difference is not None:
            low, high = self.difference.low, self.difference.high
            ends = "no interval" if low != low else f"{low:+.2g} to {high:+.2g}"
            values += f"; on the same prompts {self.difference.mean:+.2g}, {ends}"
        if self.is_promoted:
            return f"`{self.policy}` is the current policy: {values}."
        than = "no better than" if self.rule == "better" else "worse than"
        return f"`{self.policy}` is {than} the one before ({values}), so `{self.former}` stays the current policy."


@dataclass(frozen=True, kw_only=True)
class Promotions(JsonDataclass):
    """
    Policies that the rounds of a pipeline promoted (`promotions.json` in the folder of the project).

    Attributes:
        current: name of the policy that the next round builds on, which is the one to serve.
        rounds: the decision of each round that is compared.
    """

    current: str
    rounds: list[Promotion] = field(default_factory=list)


# ---- Comparison of policies ----


@dataclass(frozen=True, kw_only=True)
class ConstraintResult(JsonDataclass):
    """
    A constraint on the mean of a reward, of one policy's completions.

    Attributes:
        bound: the bound in words, such as `>= 0.5`.
        value: mean of the raw reward.
        violation_rate: share of single completions that violate the bound.
        excess, excess_low, excess_high: by how much the mean, and the ends of its interval, violate the bound; below 0
            they satisfy it.
    """

    bound: str
    value: Estimate | None
    violation_rate: float | None
    excess: float | None
    excess_low: float | None
    excess_high: float | None

    @property
    def is_violated(self) -> bool:
        """True where the bound is violated beyond chance."""
        return self.excess_low is not None and self.excess_low > 0

    @property
    def reading(self) -> str:
        """Whether the bound is satisfied, in words."""
        if self.excess is None or self.excess_low is None or self.excess_high is None:
            return "no rewards"
        open_ = "" if self.is_violated or self.excess_high <= 0 else ", within chance"
        return f"{'violated' if self.excess > 0 else 'satisfied'}{open_}"


@dataclass(frozen=True, kw_only=True)
class PolicyResult(JsonDataclass):
    """
    Evaluation of a policy on held-out prompts.

    Attributes:
        path, family: folder or hub id, and the name that it shares with its checkpoints or the runs of its sweep.
        parameters: number of parameters, those of adapters and their base included.
        completion_length: mean number of tokens.
        eos_rate: share of the completions that end with an end token.
        entropy: mean over tokens, in nats.
        distinct_1, distinct_2, repetition: see [`~rlhf_trl.evaluation.statistics.distinct_n`] and
            [`~rlhf_trl.evaluation.statistics.repetition`].
        kl, kl_k3: KL to the baseline in nats, summed over a completion, by the estimators k1 and k3.
        kl_per_token, kl_k3_per_token: the same per token.
        missing: for each measure that could not be computed the reason, with what to do about it.
        reference_perplexity: perplexity of the data's own answers, per token.
        baseline_perplexity: perplexity of the policy's completions under the baseline, per token.
        reward: combined reward.
        rewards, reward_intervals, reward_std: mean, mean with interval, and standard deviation of each reward.
        constraints: the constraints on the means of rewards, by reward.
        difference: combined reward minus that of the baseline on the same prompts.
        win_rate, length_controlled_win_rate: share of the prompts that it wins against the baseline, as it is and at
            equal length.
        judgements, unclear: number of judgements, and of those that name neither answer nor a tie.
        position_bias, order_agreement: see [`~rlhf_trl.evaluation.judges.Verdicts`].
        tie_rate: share of ties.
    """

    path: str
    family: str | None = None
    parameters: int | None = field(default=None, metadata={"without": "parameters"})
    completion_length: float
    eos_rate: float
    entropy: float | None = None
    distinct_1: float | None = None
    distinct_2: float | None = None
    repetition: float | None = None
    kl: Estimate | None = None
    missing: dict[str, str] = field(default_factory=dict, metadata={"key": "gaps"})
    kl_k3: Estimate | None = field(default=None, metadata={"without": "kl_k3"})
    kl_per_token: float | None = field(default=None, metadata={"without": "kl_k3"})
    kl_k3_per_token: float | None = field(default=None, metadata={"without": "kl_k3"})
    reference_perplexity: float | None = field(default=None, metadata={"without": "reference_perplexity"})
    baseline_perplexity: float | None = field(default=None, metadata={"without": "baseline_perplexity"})
    reward: Estimate | None = None
    rewards: dict[str, float | None] = field(default_factory=dict)
    reward_intervals: dict[str, Estimate | None] = field(default_factory=dict)
    reward_std: dict[str, float | None] = field(default_factory=dict)
    constraints: dict[str, ConstraintResult] = field(default_factory=dict, metadata={"without": "constraints"})
    difference: Estimate | None = None
    win_rate: Estimate | None = None
    judgements: int | None = field(default=None, metadata={"without": "judgements"})
    unclear: int | None = field(default=None, metadata={"without": "judgements"})
    position_bias: float | None = field(default=None, metadata={"without": "judgements"})
    order_agreement: float | None = field(default=None, metadata={"without": "judgements"})
    length_controlled_win_rate: Estimate | None = field(
        default=None, metadata={"without": "length_controlled_win_rate"}
    )
    tie_rate: float | None = field(default=None, metadata={"without": "tie_rate"})


@dataclass(frozen=True, kw_only=True)
class BestOfNPoint(JsonDataclass):
    """
    Best of `n` samples per prompt.

    Attributes:
        kl: KL to the policy that the samples are from, in nats.
        reward: combined reward of the chosen samples.
        chosen_by: their mean by the reward that chose them.
    """

    n: int
    kl: float
    reward: Estimate | None
    chosen_by: float | None


@dataclass(frozen=True, kw_only=True)
class BestOfNCurve(JsonDataclass):
    """Best of n, n = 1, 2, 4 ..., as chosen by the reward `by`, or by the combined reward (`""`)."""

    by: str
    points: list[BestOfNPoint]


@dataclass(frozen=True, kw_only=True)
class BestOfN(JsonDataclass):
    """Best-of-n of the baseline from `samples` completions per prompt."""

    samples: int
    curves: list[BestOfNCurve]


@dataclass(frozen=True, kw_only=True)
class PromptSample(JsonDataclass):
    """
    A prompt with the completion of each policy and its combined reward; `None` where there is no finite one.

    `images` are thumbnails of the prompt's images, as data URIs.
    """

    prompt: str
    completions: dict[str, str]
    rewards: dict[str, float | None]
    images: list[str] | None = field(default=None, metadata={"without": "images"})


@dataclass(frozen=True, kw_only=True)
class PolicyDifference(JsonDataclass):
    """
    Policy `one` minus `other` on the same prompts; neither is the baseline.

    Attributes:
        difference: of the combined reward; `None` without rewards.
        wins: of the outcomes against the baseline (1: won, 0.5: a tie), on the prompts that are judged of both;
            `None` where none is.
    """

    one: str
    other: str
    difference: Estimate | None
    wins: Estimate | None = None


@dataclass(frozen=True, kw_only=True)
class PromptSlice(JsonDataclass):
    """
    The `prompts` whose column of the data has a value.

    Attributes:
        rewards: combined reward of each policy on them.
        differences: the same minus that of the baseline, by policy; without the baseline.
    """

    column: str
    value: str
    prompts: int
    rewards: dict[str, Estimate]
    differences: dict[str, Estimate]


@dataclass(frozen=True, kw_only=True)
class Front(JsonDataclass):
    """
    Policies by the means of several rewards at once.

    Attributes:
        rewards: names of the rewards.
        minimized: those of them of which less is better.
        reference_point: where the hypervolume begins, by reward.
        policies: the policies whose means no other one's are as good as in every reward, and better in one.
        chosen, rule: the policy that is chosen, `None` where none is, and by which rule, in words.
        hypervolumes: volume between the reference point and what the policies of a family (runs of one sweep, or one
            policy) dominate, in units of the rewards multiplied; of all policies under `""`.
        missing: policies or runs that have no place on it, with the reason.
    """

    rewards: list[str]
    minimized: list[str] = field(default_factory=list)
    reference_point: dict[str, float]
    policies: list[str]
    chosen: str | None = None
    rule: str = ""
    hypervolumes: dict[str, Estimate] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Comparison(JsonDataclass):
    """
    Evaluation of several policies on the same held-out prompts (`comparison.json`).

    Attributes:
        baseline: name of the policy that the others are compared with.
        prompts: number of prompts with a reward from every policy.
        dropped: number of the other prompts.
        seed, temperature, max_completion_length: of the sampling.
        judge: the judge in words.
        combine: name of the function that combines the rewards.
        weights: weight of each reward.
        policies: results by name.
        bradley_terry: strength of each policy; `None` where no judgements lead from it to the baseline.
        best_of_n: best-of-n of the baseline.
        differences: of the other policies between each other.
        slices: parts of the prompts by the columns of the data.
        front: the policies by several rewards, where there are two or more.
        samples: every prompt, those without a reward included.
    """

    baseline: str
    prompts: int
    dropped: int = field(metadata={"key": "left_out"})
    seed: int | None = None
    temperature: float | None = None
    max_completion_length: int | None = None
    judge: str = "the reward"
    combine: str = "weighted_sum"
    weights: dict[str, float] = field(default_factory=dict)
    policies: dict[str, PolicyResult]
    bradley_terry: dict[str, Estimate | None] = field(default_factory=dict)
    best_of_n: BestOfN | None = None
    differences: list[PolicyDifference] = field(default_factory=list)
    slices: list[PromptSlice] = field(default_factory=list)
    front: Front | None = field(default=None, metadata={"without": "front"})
    samples: list[PromptSample]

    @property
    def measures(self) -> dict[str, float]:
        """All that was measured, as `{policy}/{measure}`."""
        found = {}
        for name, result in self.policies.items():
            estimates = {"reward": result.reward, "difference": result.difference}
            estimates |= {"win_rate": result.win_rate, "kl": result.kl}
            rates = {key: each.violation_rate for key, each in result.constraints.items()}
            found |= {f"{name}/violation_rate/{key}": rate for key, rate in rates.items() if rate is not None}
            found |= {f"{name}/{key}": estimate.mean for key, estimate in estimates.items() if estimate}
        return found

    @property
    def base(self) -> PolicyResult:
        """The result of the baseline."""
        return self.policies[self.baseline]

    @property
    def others(self) -> dict[str, PolicyResult]:
        """The results of the other policies."""
        return {name: result for name, result in self.policies.items() if name != self.baseline}

    @property
    def curves(self) -> list[BestOfNCurve]:
        """The best-of-n curves, none where best-of-n was not measured."""
        return self.best_of_n.curves if self.best_of_n else []

    @property
    def proxies(self) -> list[str]:
        """Rewards of weight 0: measured, and not part of the combined reward."""
        return [name for name, weight in self.weights.items() if not weight]
