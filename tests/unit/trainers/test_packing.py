"""Rows that share a sequence don't see each other in SFT, on any architecture and attention, or it is refused."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import SFTConfig

from rlhf_trl.errors import ConfigError
from rlhf_trl.trainers.packing import SFTTrainer
from tests.helpers.architectures import MORE_ARCHITECTURES, make_architecture, save_architecture

# Those that give no positions to the masks of transformers 5.23
REFUSED = {"opt", "xglm", "biogpt", "bloom", "mpt", "falcon", "falcon-alibi"}
ROWS = {"prompt": ["a b", "c d e", "f", "g h i j"], "completion": [" f g h", " i j", " k l m n o", " p"]}


def sft_trainer(name, path, attn_implementation="eager", **kwargs) -> SFTTrainer:
    defaults = {"max_length": 32, "per_device_train_batch_size": 4, "learning_rate": 0.0, "max_steps": 1}
    defaults |= {"report_to": "none", "bf16": False, "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    defaults |= {"gradient_checkpointing": False, "logging_steps": 1, "router_aux_loss_coef": 0.0}
    return SFTTrainer(
        make_architecture(name, 0.0, attn_implementation=attn_implementation),
        args=SFTConfig(str(path / "run"), **(defaults | kwargs)),
        train_dataset=Dataset.from_dict(ROWS),
        eval_dataset=Dataset.from_dict(ROWS),
        processing_class=AutoTokenizer.from_pretrained(save_architecture(path / "model", "llama")),
    )


def loss_alone(trainer) -> float:
    """Mean over the completions' tokens, each row by itself."""
    tokenizer, losses = trainer.processing_class, []
    trainer.model.eval()
    for prompt, completion in zip(*ROWS.values(), strict=True):
        start, row = tokenizer(prompt)["input_ids"], tokenizer(prompt + completion)["input_ids"]
        ids = torch.tensor([[*row, tokenizer.eos_token_id]])
        with torch.no_grad():
            logits = trainer.model(ids, use_cache=False).logits[0, len(start) - 1 : -1]
        losses.append(-logits.log_softmax(-1).gather(1, ids[0, len(start) :, None]))
    return torch.cat(losses).mean().item()


PADDING_FREE = {"padding_free": True, "max_length": None}


@pytest.mark.parametrize(
    ("name", "attention", "options"),
    [(name, "eager", {"packing": True}) for name in MORE_ARCHITECTURES]
    + [(name, "sdpa", {"packing": True}) for name in ("gpt2", "mistral", "opt", "falcon")]
    + [(name, "sdpa", PADDING_FREE) for name in ("gpt_neox", "biogpt")],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_rows_of_a_sequence_are_trained_as_each_alone_or_refused(tmp_path, name, attention, options):
    trainer = sft_trainer(name, tmp_path, attention, **options)
    assert len(trainer.data_collator(list(trainer.train_dataset))["input_ids"]) == 1
    if name in REFUSED:
        with pytest.raises(ConfigError, match=f"`{type(trainer.model).__name__}`.*`{attention}` attention"):
            trainer.train()
        return
    alone = loss_alone(trainer)
    trainer.train()
    if name != "mixtral":  # whose router is noisy in training
        assert trainer.state.log_history[0]["loss"] == pytest.approx(alone, abs=1e-4)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"packing": True, "packing_strategy": "wrapped"},
        {"eval_packing": True},  # whose batches TRL pads
    ],
    ids=lambda options: list(options)[-1],
)
def test_other_ways_in_which_rows_would_see_each_other_are_refused(tmp_path, options):
    with pytest.raises(ConfigError, match="would see each other"):
        sft_trainer("llama", tmp_path, **options).train()


def test_rows_of_their_own_need_no_trial(tmp_path):
    trainer = sft_trainer("opt", tmp_path)
    alone = loss_alone(trainer)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(alone, abs=1e-4)
