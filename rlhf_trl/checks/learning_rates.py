"""Learning rates that a training doesn't stand, or that an adapter doesn't learn from."""

from typing import Any, NamedTuple

from rlhf_trl.hints import size_of


class Range(NamedTuple):
    """
    Learning rates of one kind of training.

    Attributes:
        usual (`float`): learning rate of full tuning in published recipes of models of billions of parameters.
        highest (`float`): what full tuning of a model of 1e9 parameters stands.
    """

    usual: float
    highest: float


# By the type of dataset that a stage trains on. The highest published ones, scaled to 1e9 parameters, are below
# `highest`: SFT 3e-4 at 1.7 B and 1e-3 at 360 M (SmolLM2); reward models 5e-5 at 0.6 B (RLHF book) and 9e-6 at 8 B
# (OpenRLHF); ORPO 8e-6 at 7 B (arXiv 2403.07691), DPO 5e-6 at 1 B (RLHF book); PPO 3e-6 at 1 B (arXiv 2403.17031) and
# 8e-6 at 125 M (trlx).
RANGES = {
    "prompt_completion": Range(2e-5, 6.1e-4),
    "comparisons": Range(1e-5, 1e-4),
    "preference": Range(1e-6, 2.5e-5),
    "unpaired": Range(1e-6, 2.5e-5),
    "prompt": Range(1e-6, 3e-5),
}
CRITIC = RANGES["comparisons"]  # a critic with a network of its own is trained as a reward model is
# LoRA needs about ten times the learning rate of full tuning (Schulman et al. 2025, "LoRA Without Regret")
ADAPTER_FACTOR = 10


def learning_rate_problem(
    key: str, learning_rate: float, known: Range, parameters: int, has_adapter: bool
) -> str | None:
    """
    Return what is to be expected of a learning rate that is far off, `None` for any other.

    Args:
        key (`str`): where it is set.
        learning_rate (`float`): peak learning rate of AdamW.
        known ([`Range`]): learning rates of this kind of training.
        parameters (`int`): parameters of the network.
        has_adapter (`bool`): whether an adapter is trained in place of the network.
    """
    if learning_rate == 0:
        return None
    # Larger networks stand less: the published learning rates fall about as the inverse square root of the parameters
    highest = known.highest * (1e9 / parameters) ** 0.5 * (ADAPTER_FACTOR if has_adapter else 1)
    what = "an adapter on" if has_adapter else "full tuning of"
    if learning_rate > highest:
        usual = known.usual * (ADAPTER_FACTOR if has_adapter else 1)
        return (
            f"`{key}={learning_rate:g}` is above what {what} {size_of(parameters)} parameters stands (about "
            f"{highest:.1g}): expect it to diverge or to forget. Published recipes have about {usual:g}."
        )
    if has_adapter and learning_rate < known.usual:
        return (
            f"`{key}={learning_rate:g}` is a learning rate of full tuning, or below, and an adapter needs about ten "
            f"times that: expect it to learn very little. Published recipes have about "
            f"{known.usual * ADAPTER_FACTOR:g}."
        )
    return None


def learning_rate_warnings(
    args: Any, dataset_type: str, parameters: int, critic_parameters: int, has_adapter: bool
) -> list[str]:
    """
    Return what is to be expected of the learning rates of a training with AdamW that are far off.

    Args:
        args (`transformers.TrainingArguments`): arguments of the trainer.
        dataset_type (`str`): what the stage trains on.
        parameters (`int`), critic_parameters (`int`): parameters of the model, and of a critic with a network of its
            own.
        has_adapter (`bool`): whether an adapter is trained in place of the model.
    """
    optimizer = str(getattr(args.optim, "value", args.optim))
    if not optimizer.removeprefix("paged_").startswith("adamw"):
        return []  # those of other optimizers differ by orders: SGD's and GaLore's are higher, Lion's lower
    found = []
    if known := RANGES.get(dataset_type):
        key = "stage.args.learning_rate"
        found.append(learning_rate_problem(key, args.learning_rate, known, parameters, has_adapter))
    kind, critic = getattr(args, "critic", "head"), getattr(args, "critic_learning_rate", None)
    if kind != "head" and critic is not None:  # a new head stands any
        size, key = critic_parameters if kind == "model" else parameters, "stage.args.critic_learning_rate"
        found.append(learning_rate_problem(key, critic, CRITIC, size, has_adapter=kind == "adapter"))
    return [problem for problem in found if problem]
