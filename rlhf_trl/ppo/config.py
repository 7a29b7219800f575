"""`PPOConfig`: the arguments of [`PPOTrainer`], a `trl.GRPOConfig` with PPO's names, defaults and rules."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

from trl import GRPOConfig

from rlhf_trl.config.ranges import TRAINING, check_values
from rlhf_trl.ppo.options import MINI_BATCHES, PPO, argument_problem
from rlhf_trl.terminal import say
from rlhf_trl.trainers.steps import steps_per_rollout


@dataclass
class PPOConfig(GRPOConfig):
    """
    Arguments of [`PPOTrainer`]. Everything `trl.GRPOConfig` takes is accepted, but for the options in
    `rlhf_trl.ppo.options.REFUSED`; what is listed here is added, or has another default.

    A *rollout* is `generation_batch_size = per_device_train_batch_size * world size * steps_per_generation`
    completions. It is optimized in `num_iterations` epochs of `steps_per_generation / gradient_accumulation_steps`
    mini-batches, each one optimizer step. `logging_steps`, `eval_steps` and `save_steps` count rollouts.

    Args:
        beta (`float`, defaults to `0.05`): KL coefficient in the reward, the start value where a controller changes
            it. The reference is kept at 0, too, so that KL is measured.
        kl_estimator (`str`, defaults to `"k1"`): `"k1"`, `"k2"` or `"k3"`, see [`kl_estimate`].
        num_generations (`int`, defaults to `1`): completions per prompt.
        num_iterations (`int`, defaults to `4`): PPO epochs over a rollout.
        steps_per_generation (`int`, *optional*): micro-batches per rollout; unset (and `generation_batch_size` unset)
            it is 4 mini-batches, `4 * gradient_accumulation_steps`.
        total_episodes (`int`, *optional*): budget in completions; sets `max_steps` to the number of optimizer steps of
            the rollouts needed for it, rounded up, where that is not fewer already.
        epsilon (`float`, defaults to `0.2`): clip range of the policy's ratio; `epsilon_high` makes it asymmetric.
        delta (`float`, *optional*): upper bound of the ratio in the unclipped term (dual clip).
        cliprange_value (`float`, defaults to `0.2`): clip range of the value around the rollout's value.
        vf_coef (`float`, defaults to `0.1`): weight of the value loss.
        gamma (`float`, defaults to `1.0`), lam (`float`, defaults to `0.95`): discount and lambda of GAE.
        whiten_rewards (`bool`, defaults to `False`): scale the KL-shaped rewards to variance 1 (the mean is kept).
        missing_eos_penalty (`float`, *optional*): positive number subtracted from the score of a completion that does
            not end with an EOS token.
        missing_eos_score (`float`, *optional*): takes the place of such a completion's score; instead of the penalty.
        length_penalty (`float`, defaults to `0.0`): subtracted from the score for every generated token. Rewards are
            first normalized and clipped (`rlhf_trl.callbacks.reward_norm`); then come EOS and the length.
        entropy_coef (`float`, defaults to `0.0`): weight of the entropy bonus (mean over the tokens of a mini-batch).
        ratio_threshold (`float`, *optional*): a micro-batch whose mean ratio exceeds this is skipped (its loss is 0)
            and counted in `policy/skipped`.
        ptx_coef (`float`, defaults to `0.0`): weight of a language-model loss on demonstrations beside PPO's
            (PPO-ptx, arXiv 2203.02155, equation 2; 27.8 there). Above 0 the trainer needs a `ptx_dataset`.
        critic (`str`, defaults to `"head"`): `"head"` is a value head on the policy's last hidden states, `"adapter"`
            one on a LoRA adapter of its own on the policy's base, `"model"` one on a network of its own.
        critic_path (`str`, *optional*): reward model that an `"adapter"` or `"model"` starts from, folder or hub id.
            Unset, it starts as a copy of the policy.
        critic_score_head (`bool`, defaults to `False`): start the value head as that reward model's score head.
        critic_dtype (`str`, *optional*): type of the weights of `critic="model"`, such as `"bfloat16"`. Unset,
            float32.
        critic_learning_rate (`float`, *optional*): learning rate of the critic, unset the policy's. A head that
            starts at zero learns slowly at the small rates a policy needs.
        critic_warmup_steps (`int`, defaults to `0`): rollouts at the start that train the critic alone. The value
            gradient stops at the head, and the policy's weights don't change.
        critic_detach (`bool`, defaults to `False`): stop the value loss's gradient at a head on the policy's trunk.
        ref_dtype (`str`, *optional*): type of the weights of a full reference model, unset the policy's.
        head_init (`str`, defaults to `"zero"`): initial weights of the value head: `"zero"`
            (openai/lm-human-preferences) or `"normal"` with std 1/sqrt(d + 1) (arXiv 2403.17031). The bias is 0.
        max_invalid_fraction (`float`, defaults to `0.1`): completions whose reward is NaN or infinite are dropped from
            loss, whitening and metrics and counted in `objective/invalid_rewards`; more than this share of a rollout
            stops the run.
        disable_dropout (`bool`, defaults to `True`), adam_epsilon (`float`, defaults to `1e-5`), temperature
            (`float`, defaults to `1.0`): PPO's usual values.

    Raises:
        ValueError: at an option PPO has no use for, batch sizes that don't divide, or a value out of range.
    """

    beta: float = field(default=0.05, metadata={"help": "KL coefficient in the reward."})
    num_generations: int | None = field(default=1, metadata={"help": "Completions per prompt."})
    num_iterations: int = field(default=4, metadata={"help": "PPO epochs over a rollout."})
    disable_dropout: bool = field(default=True, metadata={"help": "Whether to disable dropout in the models."})
    adam_epsilon: float = field(default=1e-5, metadata={"help": "Epsilon of AdamW."})
    scale_rewards: str = field(default="none", metadata={"help": "Held to 'none': PPO has no groups."})
    kl_estimator: str = field(default="k1", metadata={"help": "Per-token KL estimator: 'k1', 'k2' or 'k3'."})
    gamma: float = field(default=1.0, metadata={"help": "Discount factor."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of generalized advantage estimation."})
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss."})
    cliprange_value: float = field(default=0.2, metadata={"help": "Clip range of the value function."})
    whiten_rewards: bool = field(default=False, metadata={"help": "Whether to whiten the KL-shaped rewards."})
    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "Positive number subtracted from the score of a completion without EOS."}
    )
    missing_eos_score: float | None = field(
        default=None, metadata={"help": "Score of a completion without EOS, whatever its reward."}
    )
    length_penalty: float = field(
        default=0.0, metadata={"help": "Number subtracted from the score for every generated token."}
    )
    total_episodes: int | None = field(default=None, metadata={"help": "Budget of the run in completions."})
    ratio_threshold: float | None = field(
        default=None, metadata={"help": "Micro-batches with a larger mean ratio are skipped."}
    )
    ptx_coef: float = field(default=0.0, metadata={"help": "Weight of the language-model loss on demonstrations."})
    critic: str = field(default="head", metadata={"help": "Kind of critic: 'head', 'adapter' or 'model'."})
    critic_path: str | None = field(default=None, metadata={"help": "Reward model that the critic starts from."})
    critic_score_head: bool = field(
        default=False, metadata={"help": "Whether the value head starts as the reward model's score head."}
    )
    critic_dtype: str | None = field(default=None, metadata={"help": "Type of the weights of `critic='model'`."})
    critic_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the critic; unset, the policy's."}
    )
    critic_warmup_steps: int = field(default=0, metadata={"help": "Rollouts at first that train the critic alone."})
    ref_dtype: str | None = field(default=None, metadata={"help": "Type of the weights of a full reference model."})
    critic_detach: bool = field(
        default=False, metadata={"help": "Whether the value loss's gradient stops at the value head."}
    )
    head_init: str = field(default="zero", metadata={"help": "Initial weights of the value head: 'zero' or 'normal'."})
    max_invalid_fraction: float = field(
        default=0.1, metadata={"help": "Largest share of NaN or infinite rewards in a rollout before the run stops."}
    )

    def __post_init__(self):
        if self.steps_per_generation is None and self.generation_batch_size is None:
            self.steps_per_generation = MINI_BATCHES * self.gradient_accumulation_steps
        if self.ddp_find_unused_parameters is None:
            # every trainable parameter, the value head's too, is used in every forward: looking for others costs time
            self.ddp_find_unused_parameters = False
        with self._checked_as_groups():
            super().__post_init__()
        if self.reward_weights is not None:
            self.reward_weights = [float(weight) for weight in self.reward_weights]
        check_values(TRAINING | PPO, vars(self), error=ValueError)
        if problem := argument_problem(vars(self)):
            raise ValueError(problem)
        if self.total_episodes is not None:
            assert self.generation_batch_size is not None
            steps = math.ceil(self.total_episodes / self.generation_batch_size) * self.steps_per_rollout
            if self.max_steps > 0 and self.max_steps != steps:
                say(
                    f"`total_episodes={self.total_episodes}` is {steps} optimizer steps and `max_steps` is "
                    f"{self.max_steps}: the smaller counts."
                )
            self.max_steps = min(steps, self.max_steps) if self.max_steps > 0 else steps

    @contextmanager
    def _checked_as_groups(self) -> Iterator[None]:
        """
        Let GRPOConfig accept one completion per prompt.

        It refuses groups of fewer than two, without which GRPO has no baseline, and checks that groups fill a rollout:
        a given rollout is checked as one group, and another one with twice its size as groups of two.
        """
        if self.num_generations != 1:
            yield
            return
        num_generations_eval, doubled = self.num_generations_eval, self.generation_batch_size is None
        self.num_generations = 2 if doubled else self.generation_batch_size
        self.num_generations_eval = num_generations_eval or 1
        steps: Any = self.steps_per_generation
        self.steps_per_generation = 2 * steps if doubled else steps
        yield
        self.num_generations, self.num_generations_eval = 1, num_generations_eval
        if doubled and self.generation_batch_size is not None:
            self.steps_per_generation = steps
            self.generation_batch_size //= 2

    @property
    def num_mini_batches(self) -> int:
        """Optimizer steps in one epoch over a rollout."""
        assert self.steps_per_generation is not None  # once the arguments are checked
        return self.steps_per_generation // self.gradient_accumulation_steps

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps from one rollout to the next: epochs x mini-batches."""
        return steps_per_rollout(self)


def added_fields() -> list[str]:
    """Names of the arguments that PPO adds to `trl.GRPOConfig`."""
    inherited = {f.name for f in fields(GRPOConfig)}
    return [f.name for f in fields(PPOConfig) if f.name not in inherited]
