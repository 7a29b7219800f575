"""Results of an evaluation of rewards: the content of `reward_quality.json`."""

from dataclasses import dataclass, field

from rlhf_trl.runs.results import Estimate
from rlhf_trl.runs.serialization import JsonDataclass


@dataclass(frozen=True, kw_only=True)
class SliceAccuracy(JsonDataclass):
    """Accuracy and expected calibration error on a part of the `n` comparisons."""

    name: str = field(metadata={"key": "slice"})
    n: int
    accuracy: Estimate
    ece: float | None = field(default=None, metadata={"without": "ece"})


@dataclass(frozen=True, kw_only=True)
class ReliabilityBin(JsonDataclass):
    """`n` comparisons with a predicted share from `low` to `high`: means of the predicted and the observed share."""

    low: float
    high: float
    n: int
    predicted: float
    observed: float


@dataclass(frozen=True, kw_only=True)
class Reliability(JsonDataclass):
    """
    Reliability curve: whether sigmoid(margin) is the share of raters who agree.

    Attributes:
        ece: expected calibration error.
        bins: those that hold any comparison.
    """

    ece: float
    bins: list[ReliabilityBin]


@dataclass(frozen=True, kw_only=True)
class QuantilePoint(JsonDataclass):
    """`n` completions with mean `x`: median `y` and quartiles `low`, `high` of their scores."""

    x: float
    y: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, kw_only=True)
class LengthBias(JsonDataclass):
    """Correlation of scores and numbers of characters, and how often the longer completion has the higher score."""

    pearson: float
    spearman: float
    longer_preferred: float
    curve: list[QuantilePoint]


@dataclass(frozen=True, kw_only=True)
class RatingCorrelation(JsonDataclass):
    """Correlation of scores and mean ratings over the `completions` that have both."""

    completions: int
    pearson: float
    spearman: float
    pearson_within_prompts: float
    curve: list[QuantilePoint]


@dataclass(frozen=True, kw_only=True)
class BorderResult(JsonDataclass):
    """
    Whether the zero of the scores is the border between safe and unsafe.

    Attributes:
        completions: number of those with a label and a score.
        safe: share of them that are safe.
        accuracy: share on the right side of 0; a score of 0 counts half.
        ece: expected calibration error of sigmoid(score) as the probability of being safe.
    """

    completions: int
    safe: float
    accuracy: Estimate
    ece: float


@dataclass(frozen=True, kw_only=True)
class Mistake(JsonDataclass):
    """
    A comparison in which the reward prefers the `other` completion; `scores` of the preferred one and of it.

    `images` are thumbnails of the prompt's images, as data URIs.
    """

    prompt: str
    preferred: str
    other: str
    scores: list[float]
    rating_gap: float = field(metadata={"key": "gap"})
    images: list[str] | None = field(default=None, metadata={"without": "images"})


@dataclass(frozen=True, kw_only=True)
class BestOfNGain(JsonDataclass):
    """
    Gain of best-of-n in gold reward over one completion.

    Attributes:
        prompts: number of prompts with `n` completions or more.
        kl: KL to the policy that the completions are from, in nats.
        gain, best_gain: chosen by the reward, and by the gold reward itself.
    """

    n: int
    prompts: int
    kl: float
    gain: Estimate
    best_gain: Estimate


@dataclass(frozen=True, kw_only=True)
class DisagreementSlice(JsonDataclass):
    """Accuracy on `n` comparisons with a like standard deviation of the members' margins."""

    margin_std: float = field(metadata={"key": "lead_std"})
    n: int
    accuracy: Estimate


@dataclass(frozen=True, kw_only=True)
class Disagreement(JsonDataclass):
    """
    Disagreement of the members of an ensemble.

    Attributes:
        std, margin_std: standard deviation of the members' scores and of their margins, means over completions and
            comparisons.
        members: accuracy of each.
        slices: accuracy in thirds of the comparisons, the least disagreement first.
    """

    std: float
    margin_std: float = field(metadata={"key": "lead_std"})
    members: list[Estimate]
    slices: list[DisagreementSlice]


@dataclass(frozen=True, kw_only=True)
class SubsetAccuracy(JsonDataclass):
    """Accuracy on the `n` comparisons of a subset."""

    accuracy: float
    n: int


@dataclass(frozen=True, kw_only=True)
class RewardBenchScores(JsonDataclass):
    """
    Scores as RewardBench computes them.

    Attributes:
        sections: score of each section over the subsets that occur; `None` if none does.
        subsets: accuracy by subset.
        score: mean of the sections; `None` unless every subset occurs.
        missing: subsets without a comparison.
    """

    sections: dict[str, float | None]
    subsets: dict[str, SubsetAccuracy]
    score: float | None
    missing: list[str]


@dataclass(frozen=True, kw_only=True)
class RewardResult(JsonDataclass):
    """
    Evaluation of a reward on annotated completions.

    Attributes:
        accuracy: share of comparisons with the higher score on the preferred completion.
        completions_without_score, comparisons_dropped: number of completions without a finite score, and of the
            comparisons that they are in.
        top_one: see [`~rlhf_trl.evaluation.reward_quality.top_one`].
        best_of_n: by n; `None` without a gold reward.
        border: `None` without labels of what is safe.
        samples_without_score: of the completions that a policy wrote for best-of-n.
    """

    accuracy: Estimate
    completions_without_score: int
    comparisons_dropped: int = field(metadata={"key": "comparisons_left_out"})
    slices: list[SliceAccuracy]
    top_one: Estimate
    reliability: Reliability = field(metadata={"key": "calibration"})
    length: LengthBias
    ratings: RatingCorrelation | None
    mistakes: list[Mistake]
    rewardbench: RewardBenchScores | None = field(default=None, metadata={"without": "rewardbench"})
    best_of_n: list[BestOfNGain] | None = field(default=None, metadata={"without": "best_of_n"})
    border: BorderResult | None = field(default=None, metadata={"without": "border"})
    disagreement: Disagreement | None = field(default=None, metadata={"without": "disagreement"})
    samples_without_score: int | None = field(default=None, metadata={"without": "samples_without_score"})

    def slice(self, name: str) -> SliceAccuracy:
        """Return the slice of this name."""
        return next(part for part in self.slices if part.name == name)


@dataclass(frozen=True, kw_only=True)
class RaterPrediction(JsonDataclass):
    """Prediction of some raters' ratings by others: correlations, and the share of pairs in the same order."""

    pearson: float
    spearman: float
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class HalfPrediction(RaterPrediction):
    """Prediction of one half of the raters by the other; `spearman_brown`: correlation for as many as there are."""

    spearman_brown: float


@dataclass(frozen=True, kw_only=True)
class RaterCeiling(JsonDataclass):
    """
    Agreement of the raters with each other, which a reward can't be expected to exceed by much.

    Attributes:
        completions, comparisons: number of those with two or more raters.
        raters: mean number of raters per completion.
        one_rater: one rater against the mean of the others.
        half: one half of the raters against the other.
    """

    completions: int
    comparisons: int
    raters: float
    one_rater: RaterPrediction
    half: HalfPrediction


@dataclass(frozen=True, kw_only=True)
class RewardQuality(JsonDataclass):
    """
    Evaluation of rewards on annotated completions (`reward_quality.json`).

    Attributes:
        rows, prompts, completions, comparisons: their numbers.
        gold: what best-of-n is measured in, in words.
        longer_preferred: share of comparisons in which people prefer the longer completion.
        rewards: results by name.
        notes: remarks on the data.
    """

    rows: int
    prompts: int
    completions: int
    comparisons: int
    raters: RaterCeiling | None
    gold: str | None
    longer_preferred: float
    rewards: dict[str, RewardResult]
    notes: list[str] = field(default_factory=list)
