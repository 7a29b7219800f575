"""Rows of the matrix: each stage, full and LoRA, and the runs that need a second model."""

import re
from dataclasses import dataclass

from bench.engines.architectures import ARCHITECTURES, MODELS

# Files of launch/accelerate
ENGINES = {"ddp": "DDP", "fsdp2": "FSDP2", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}
RANKS = 2

BASE = (
    *("data.max_samples=96", "data.max_eval_samples=16", "stage.args.max_steps=4", "stage.args.save_steps=2"),
    *("stage.args.logging_steps=1", "stage.args.per_device_eval_batch_size=4"),
)
# Eight steps: two rollouts of two mini-batches, two epochs each. Saved after each rollout
PPO = (
    *("stage.args.max_steps=8", "stage.args.num_iterations=2", "stage.args.steps_per_generation=2"),
    *("stage.args.save_steps=1", "stage.args.max_completion_length=12"),
)
GROUPS = ("stage.args.max_completion_length=12", "stage.args.num_generations=4")
LORA = ("adapter=lora",)
# Which the embedded model brings with it
OF_SMALL_MODELS = ("stage.args.learning_rate=1e-3", "stage.args.gradient_accumulation_steps=1")


@dataclass(frozen=True)
class Cell:
    """
    A row of the table.

    Attributes:
        name (`str`): its name, for `--only` and for the table.
        overrides (`tuple[str, ...]`): those of `train.py`, besides `BASE`.
        rows (`int`): rows of a step on all ranks.
        needs (`tuple[str, ...]`): rows whose run under DDP this one starts from.
        samples (`bool`): whether it generates, by numbers of each rank. Compared with one rank by the same numbers.
        half (`bool`): whether it computes in bfloat16, in which engines round at other places: it has to run.
        architecture (`str`, *optional*): one of `ARCHITECTURES`; the embedded model where unset.
    """

    name: str
    overrides: tuple[str, ...]
    rows: int = 8
    needs: tuple[str, ...] = ()
    samples: bool = False
    half: bool = False
    architecture: str | None = None

    @property
    def folder(self) -> str:
        """Name of its runs."""
        return re.sub(r"\W+", "_", self.name)

    def command(self, ranks: int, project: str, *more: str) -> list[str]:
        """Return the overrides of a run on some ranks."""
        words = [*BASE, f"stage.args.per_device_train_batch_size={self.rows // ranks}", *self.overrides]
        if self.half:  # `use_cpu` would leave DeepSpeed out
            words += ["stage.args.bf16=true", *(["+stage.args.use_cpu=true"] if "zero" not in project else [])]
        if self.architecture is not None:
            words += ["model=hf", f"model.path={MODELS}/{self.architecture}", *OF_SMALL_MODELS]
        return [*words, f"project={project}", f"run_name={self.folder}", *more]


def cells() -> list[Cell]:
    """Return all rows: first those that others need."""
    found = []
    for weights, adapter in (("full", ()), ("lora", LORA)):
        for stage in ("sft", "reward", "dpo", "modpo", "orpo", "kto"):
            found.append(Cell(f"{stage} {weights}", (f"stage={stage}", *adapter)))
        for stage in ("rloo", "grpo"):
            found.append(Cell(f"{stage} {weights}", (f"stage={stage}", *GROUPS, *adapter), samples=True))
        pairs = ("stage=online_dpo", "stage.args.max_completion_length=12", *adapter)
        found.append(Cell(f"online_dpo {weights}", pairs, samples=True))
        for critic in ("head", "adapter", "model"):
            if critic != "adapter" or adapter:
                options = (f"stage=ppo critic={critic}".split(), PPO, adapter)
                found.append(Cell(f"ppo/{critic} {weights}", sum(map(tuple, options), ()), 16, samples=True))
    return found + constraints() + second_models() + checkpointing() + half_precision() + architectures()


def constraints() -> list[Cell]:
    """Return the rows with a value and a multiplier for a constraint, which a checkpoint has to hold too."""
    bound = ("reward=[demo,tokens]", "combine=lagrange", 'combine.constraints={tokens: "<= 8"}')
    ppo = ("stage=ppo", *PPO, *bound, "reward.tokens.weight=0.1")
    return [
        Cell("ppo/head full, combine=lagrange", (*ppo, "critic=head"), 16, samples=True),
        Cell("ppo/adapter lora, combine=lagrange", (*ppo, *LORA, "critic=adapter"), 16, samples=True),
    ]


def second_models() -> list[Cell]:
    """Return the rows with more than one model, or with one that starts from an adapter."""
    ppo = ("stage=ppo", *PPO)
    sft, reward, adapter = Cell("sft lora", ()).folder, Cell("reward full", ()).folder, Cell("reward lora", ()).folder
    start = ("model=hf", f"model.run={sft}", *LORA)
    return [
        Cell("dpo lora, from an adapter, merge=true", ("stage=dpo", *start, "merge=true"), needs=("sft lora",)),
        Cell("dpo full, from a merged adapter", ("stage=dpo", *start[:2]), needs=("sft lora",)),
        Cell("reward lora, from a policy's adapter", ("stage=reward", *start), needs=("sft lora",)),
        Cell("reward lora, members=2", ("stage=reward", *LORA, "stage.members=2")),
        Cell(
            "ppo/model full, critic.run, reward=model",
            (
                *(*ppo, "critic=model", f"critic.run={reward}", "stage.args.critic_score_head=true"),
                *("reward=model", f"reward.model.run={reward}"),
            ),
            rows=16,
            needs=("reward full",),
            samples=True,
        ),
        Cell(
            "ppo/adapter lora, critic.run, reward=model of an adapter",
            (*ppo, *LORA, "critic=adapter", f"critic.run={adapter}", "reward=model", f"reward.model.run={adapter}"),
            rows=16,
            needs=("reward lora",),
            samples=True,
        ),
        Cell(
            "ppo/model lora, critic.run of an adapter",
            (*ppo, *LORA, "critic=model", f"critic.run={adapter}"),
            rows=16,
            needs=("reward lora",),
            samples=True,
        ),
    ]


def checkpointing() -> list[Cell]:
    """Return the rows whose layers are recomputed in the backward, as is the default for models of real sizes."""
    again = "stage.args.gradient_checkpointing=true"
    ppo = ("stage=ppo", *PPO, again)
    return [
        Cell("sft full, checkpointing", ("stage=sft", again)),
        Cell("dpo lora, checkpointing", ("stage=dpo", *LORA, again)),
        Cell("reward lora, checkpointing", ("stage=reward", *LORA, again)),
        Cell("ppo/head full, checkpointing", (*ppo, "critic=head"), 16, samples=True),
        Cell("ppo/adapter lora, checkpointing", (*ppo, "critic=adapter", *LORA), 16, samples=True),
        Cell("ppo/model lora, checkpointing", (*ppo, "critic=model", *LORA), 16, samples=True),
    ]


def half_precision() -> list[Cell]:
    """Return the rows in bfloat16, in which the score and value heads, float32 elsewhere, get the engine's type."""
    ppo = ("stage=ppo", *PPO)
    start = ("model=hf", "model.run=sft_lora", *LORA)
    scored = ("critic.run=reward_full", "stage.args.critic_score_head=true", "reward=model")
    scored += ("reward.model.run=reward_full",)
    rows: dict[str, tuple[str, ...]] = {
        "sft full": ("stage=sft",),
        "reward full": ("stage=reward",),
        "dpo full": ("stage=dpo",),
        "grpo full": ("stage=grpo", *GROUPS),
        "ppo/head full": (*ppo, "critic=head"),
        "ppo/model full": (*ppo, "critic=model"),
        "ppo/model full, critic.run, reward=model": (*ppo, "critic=model", *scored),
        "ppo/adapter lora": (*ppo, "critic=adapter", *LORA),
        "reward lora, from a policy's adapter": ("stage=reward", *start),
    }
    return [
        Cell(
            f"{name}, bf16",
            overrides,
            rows=16 if name.startswith("ppo") else 8,
            needs=("sft lora",) if "from" in name else ("reward full",) if "critic.run" in name else (),
            samples="stage=ppo" in overrides or "stage=grpo" in overrides,
            half=True,
        )
        for name, overrides in rows.items()
    ]


def architectures() -> list[Cell]:
    """Return the rows of other models: a reward model of each, and PPO, whose critic reads its hidden states."""
    found = []
    for name in ARCHITECTURES:
        found.append(Cell(f"reward full, {name}", ("stage=reward",), architecture=name))
        head = ("stage=ppo", *PPO, "critic=head")
        found.append(Cell(f"ppo/head full, {name}", head, 16, samples=True, architecture=name))
    return found
