"""Tiny models and rows in place of those of the recipes in conf/experiment: same architecture, same schema."""

import json
from pathlib import Path

import torch
import transformers
from datasets import Dataset, DatasetDict
from omegaconf import DictConfig, OmegaConf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from rlhf_trl.models.options import template_file
from tests.helpers.vision import picture, save_vlm

SPECIAL = ["<|endoftext|>", "<pad>", "<|im_start|>", "<|im_end|>"]
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 65536,
}
# Architecture of each model that a recipe starts from, and whether its tokenizer has a chat template
START = {
    "EleutherAI/pythia-1b-deduped": ("GPTNeoX", False),
    "EleutherAI/pythia-2.8b": ("GPTNeoX", False),
    "OpenRLHF/Llama-3-8b-sft-mixture": ("Llama", True),
    "mistralai/Mistral-7B-v0.1": ("Mistral", False),
    "alignment-handbook/zephyr-7b-sft-full": ("Mistral", True),
    "HuggingFaceTB/SmolLM2-360M": ("Llama", False),
    "HuggingFaceTB/SmolLM3-3B-checkpoints": ("SmolLM3", True),
    "allenai/OLMo-2-0425-1B": ("Olmo2", False),
    "allenai/OLMo-2-0425-1B-SFT": ("Olmo2", True),
    "allenai/OLMo-2-0425-1B-DPO": ("Olmo2", True),
    "meta-llama/Llama-3.1-8B": ("Llama", False),
    "allenai/Llama-3.1-Tulu-3-8B-SFT": ("Llama", True),
    "allenai/Llama-3.1-Tulu-3-8B-DPO": ("Llama", True),
    "meta-llama/Llama-2-7b-chat-hf": ("Llama", True),
    "Qwen/Qwen2.5-0.5B-Instruct": ("Qwen2", True),
    "Qwen/Qwen2.5-1.5B-Instruct": ("Qwen2", True),
}
# Those that read images. The processor of Qwen-VL needs torchvision, which is no dependency: another stands for it
START_VISION = {"HuggingFaceTB/SmolVLM-256M-Instruct": "idefics3", "Qwen/Qwen2-VL-7B-Instruct": "llava"}


def save_tokenizer(path: Path, has_template: bool) -> None:
    """Write a tokenizer of bytes, which takes any text."""
    vocab = {token: i for i, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<pad>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        padding_side="left",
    )
    if has_template:
        tokenizer.chat_template = template_file("tulu").read_text()
    tokenizer.save_pretrained(path)


def save_start(folder: Path, name: str) -> str:
    """Write a tiny model of the architecture of `name`, once, and return its path."""
    if name in START_VISION:
        path = folder / START_VISION[name]
        return str(path) if path.exists() else save_vlm(path, START_VISION[name])
    family, has_template = START[name]
    path = folder / f"{family}-{has_template}"
    if not path.exists():
        options = SIZES | ({} if family == "GPTNeoX" else {"num_key_value_heads": 2})
        config = getattr(transformers, f"{family}Config")(
            vocab_size=len(SPECIAL) + 256, bos_token_id=0, eos_token_id=0, pad_token_id=1, **options
        )
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(path)
        save_tokenizer(path, has_template)
    return str(path)


# ---- Rows of the same columns and types as the data sets of the hub ----


def chat(*turns: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


def _tldr(i):
    post = f"SUBREDDIT: r/tests\n\nTITLE: Post {i}\n\nPOST: It is {i}.\n\nTL;DR:"
    return {"prompt": post, "completion": f" It is {i}."}


def _tldr_preference(i):
    return {"prompt": _tldr(i)["prompt"], "chosen": f" It is {i}.", "rejected": " No idea."}


def _hh(i):
    start = f"\n\nHuman: What is {i} and {i}?\n\nAssistant:"
    return {"chosen": f"{start} {2 * i}", "rejected": f"{start} I won't say."}


def _hh_chat(i):
    return {
        "prompt": chat(f"What is {i} and {i}?"),
        "chosen": chat("", f"It is {2 * i}.")[1:],
        "rejected": chat("", "No.")[1:],
    }


def _messages(i):
    messages = chat(f"What is {i}?", f"A number, {i}.", "And more?", f"It comes before {i + 1}.")
    return {"messages": messages, "id": str(i), "source": "tests"}


def _ultrachat(i):
    return {"prompt": f"What is {i}?", "prompt_id": str(i), "messages": _messages(i)["messages"]}


def _ultrafeedback(i):
    prompt, answers = f"What is {i}?", (f"A number, {i}.", "" if i == 0 else "No.")  # some answers are empty
    chosen, rejected = (chat(prompt, answer) for answer in answers)
    return {
        "prompt": prompt,
        "prompt_id": str(i),
        "chosen": chosen,
        "rejected": rejected,
        "messages": chosen,
        "score_chosen": 8.0,
        "score_rejected": 3.5,
    }


def _pairs_of_chats(i):
    chosen, rejected = chat(f"What is {i}?", f"A number, {i}."), chat(f"What is {i}?", "No.")
    return {"id": str(i), "source": "tests", "chosen": chosen, "rejected": rejected}


def _smoltalk2(i):
    return _pairs_of_chats(i) | {"prompt": f"What is {i}?", "chat_template_kwargs": {"enable_thinking": i % 2 == 0}}


def _rlvr(i):
    return {"messages": chat(f"What is {i} and {i}?"), "ground_truth": str(2 * i), "dataset": "gsm8k"}


def _gsm8k(i):
    return {"question": f"What is {i} and {i}?", "answer": f"{i} + {i} = <<{i}+{i}={2 * i}>>{2 * i}\n#### {2 * i}"}


def _helpsteer2(i):
    names = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
    return {"prompt": f"What is {i // 2}?", "response": f"It is {i}."} | dict.fromkeys(names, (i + 1) % 5)


def _nectar(i):
    answers = [{"answer": f"{i} {j}", "model": f"model {j}", "rank": float(1 + (i + j) % 7)} for j in range(7)]
    return {
        "prompt": f"\n\nHuman: What is {i}?\n\nAssistant: ",
        "answers": answers,
        "turns": 1,
        "num_responses": 7,
        "source": ["tests"],
        "good_natured": True,
    }


def _arena(i):
    responses = {f"response_{side}": json.dumps([f"{side} says {i}", "More."]) for side in "ab"}
    if i == 0:
        responses["response_a"] = "[null, null]"  # some are
    flags = {"winner_model_a": int(i % 3 == 0), "winner_model_b": int(i % 3 == 1), "winner_tie": int(i % 3 == 2)}
    models = {"id": i, "model_a": "one", "model_b": "two"}
    return models | {"prompt": json.dumps([f"What is {i}?", "And more?"])} | responses | flags


def _safe_rlhf(i):
    return {
        "prompt": f"What is {i}?",
        "response_0": f"It is {i}.",
        "response_1": f"I won't say {i}.",
        "is_response_0_safe": True,
        "is_response_1_safe": i % 2 == 0,
        "better_response_id": i % 2,
        "safer_response_id": 0,
    }


def _rlaif_v(i):
    image = picture("red" if i % 2 else "blue", (16, 16 + i))
    return {"question": f"what colour is it {i} ?", "image": image, "chosen": "red .", "rejected": "blue .", "idx": i}


ROWS = {
    "trl-lib/tldr": _tldr,
    "trl-lib/tldr-preference": _tldr_preference,
    "Anthropic/hh-rlhf": _hh,
    "trl-lib/hh-rlhf-helpful-base": _hh_chat,
    "HuggingFaceH4/ultrachat_200k": _ultrachat,
    "HuggingFaceH4/ultrafeedback_binarized": _ultrafeedback,
    "HuggingFaceTB/smol-smoltalk": _messages,
    "HuggingFaceTB/smoltalk2": _smoltalk2,
    "allenai/tulu-3-sft-olmo-2-mixture-0225": _messages,
    "allenai/tulu-3-sft-mixture": _messages,
    "allenai/olmo-2-0425-1b-preference-mix": _pairs_of_chats,
    "allenai/llama-3.1-tulu-3-8b-preference-mixture": _pairs_of_chats,
    "allenai/RLVR-GSM": _rlvr,
    "allenai/RLVR-MATH": _rlvr,
    "openai/gsm8k": _gsm8k,
    "nvidia/HelpSteer2": _helpsteer2,
    "berkeley-nest/Nectar": _nectar,
    "lmarena-ai/arena-human-preference-55k": _arena,
    "PKU-Alignment/PKU-SafeRLHF": _safe_rlhf,
    "openbmb/RLAIF-V-Dataset": _rlaif_v,
}


def save_dataset(folder: Path, name: str, splits: list[str]) -> str:
    """Write a few rows of the schema of `name` as each of `splits`, once, and return their path."""
    path = folder / f"{name.replace('/', '--')}-{'-'.join(splits)}"
    if not path.exists():
        made = {
            split: Dataset.from_list([ROWS[name](i + 30 * n) for i in range(14)]) for n, split in enumerate(splits)
        }
        DatasetDict(made).save_to_disk(str(path))
    return str(path)


def localize(cfg: DictConfig, folder: Path) -> DictConfig:
    """Replace the hub's models and data sets in a recipe's config by tiny local ones, in place."""
    OmegaConf.set_struct(cfg, False)
    for source in [cfg.data, *cfg.data.get("sources", {}).values()]:
        if source._target_ == "rlhf_trl.data.load_hub":
            name, source.name, source.split = source.path, None, source.split.split("[")[0]
            splits = [source.split] + ([source.eval_split] if source.eval_split else [])
            source.path = save_dataset(folder, name, splits)
            source.eval_size = None if source.eval_split else 4
    if "model" in cfg and cfg.model.run is None and cfg.model.path in (*START, *START_VISION):
        cfg.model.path, cfg.model.revision = save_start(folder, cfg.model.path), None
    if "policies" in cfg.stage:
        places = cfg.stage.policies.items()
        cfg.stage.policies = {name: save_start(folder, at) if at in START else at for name, at in places}
    return cfg
