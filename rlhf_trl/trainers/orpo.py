"""ORPO, in a module of its own: TRL warns of its experimental trainers when they are imported."""

from trl.experimental import orpo

from rlhf_trl.trainers.base import TrainerMixin


class ORPOTrainer(TrainerMixin, orpo.ORPOTrainer):
    """`trl.experimental.orpo.ORPOTrainer` with [`~rlhf_trl.trainers.base.TrainerMixin`]."""

    READS_NO_IMAGES = (
        "TRL's ORPO tokenizes prompts and answers as text and has no collator for images. DPO reads them (`stage=dpo`)"
    )
