"""Arguments of [`~rlhf_trl.reward_modeling.RewardTrainer`]."""

from dataclasses import dataclass, field

import trl

from rlhf_trl.config.ranges import TRAINING, check_values
from rlhf_trl.reward_modeling.options import REWARD_MODEL

LOSS_TYPES = ("pairwise", "plackett_luce")


@dataclass
class RewardConfig(trl.RewardConfig):
    """
    Arguments of [`~rlhf_trl.reward_modeling.RewardTrainer`], on top of those of `trl.RewardConfig`.

    `per_device_train_batch_size` counts prompts, each with all of its completions.

    Args:
        loss_type (`str`, *optional*, defaults to `"pairwise"`):
            Loss of rows with comparisons, `"pairwise"` or `"plackett_luce"`, see
            [`~rlhf_trl.reward_modeling.losses.comparison_losses`].
        label_smoothing (`float`, *optional*, defaults to `0.0`):
            Probability, below 0.5, that a comparison is reversed. Rows with shares of raters who agree (`agreement:
            smoothing`) have their own.
        head_init (`str`, *optional*):
            `"normal"` draws the score head with standard deviation 1/sqrt(d + 1) and bias 0, d the width of its input
            (arXiv 2403.17031). When unset, a new head has the model's `initializer_range`.
        border_coef (`float`, *optional*, defaults to `1.0`), border_l2_coef (`float`, *optional*, defaults to `1e-3`):
            Where rows say which completions are safe, weights of the loss that makes the score's zero the border
            between safe and unsafe, and of the square of the scores, see
            [`~rlhf_trl.reward_modeling.border.border_loss`].
        calibrate_on (`str`, *optional*, defaults to `"all"`):
            Held-out completions that `calibration.json` is measured on: `"all"`, or `"best"`, those that are worse
            than no other one of their prompt.
    """

    loss_type: str = field(default="pairwise", metadata={"help": "`pairwise` or `plackett_luce`."})
    label_smoothing: float = field(default=0.0, metadata={"help": "Probability that a comparison is reversed."})
    head_init: str | None = field(
        default=None, metadata={"help": "`normal`: score head with standard deviation 1/sqrt(d + 1)."}
    )
    border_coef: float = field(
        default=1.0, metadata={"help": "Weight of the loss that makes 0 the border between safe and unsafe."}
    )
    border_l2_coef: float = field(
        default=1e-3, metadata={"help": "Weight of the square of the scores of labeled completions."}
    )
    calibrate_on: str = field(default="all", metadata={"help": "Completions the calibration is measured on."})

    def __post_init__(self):
        super().__post_init__()
        check_values(TRAINING | REWARD_MODEL, vars(self), error=ValueError)
