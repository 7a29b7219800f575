"""
Sizes, models, prompts and the meter that all contenders share.

Imports nothing of rlhf_trl or TRL: each contender runs in its own process, and TRL 1.12 in its own environment.
"""

import json
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch

PHASES = ("generate", "score", "log-probabilities", "update", "rest")
WORDS = 1024  # vocabulary of the small Llama
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


@dataclass(frozen=True)
class Setting:
    """
    A training setup, the same for every contender.

    `folder` holds the models `policy`, `reward` and `reward_adapter`, and the prompts. A rollout is `batch` prompts of
    `prompt_tokens`, each with one completion of exactly `new_tokens`. All networks have `dtype`, but for LoRA weights
    and value heads, which are float32 as PEFT and PPOTrainer make them, and for a policy with `policy_dtype`.
    With `autocast` the passes of the policy compute in bfloat16.
    """

    folder: str
    batch: int
    prompt_tokens: int
    new_tokens: int
    epochs: int
    mini_batches: int
    lora: bool
    dtype: str
    rollouts: int
    learning_rate: float = 1e-5
    beta: float = 0.05
    seed: int = 1
    policy_dtype: str | None = None
    autocast: bool = False

    @property
    def policy(self) -> str:
        return f"{self.folder}/policy"

    @property
    def reward(self) -> str:
        return f"{self.folder}/reward"

    @property
    def reward_adapter(self) -> str:
        return f"{self.folder}/reward_adapter"

    @property
    def mini_batch(self) -> int:
        """Rows of a mini-batch, which is also the batch of every forward pass."""
        return self.batch // self.mini_batches

    def prompts(self) -> list[dict]:
        return json.loads(Path(self.folder, "prompts.json").read_text())


class Meter:
    """Meter of each rollout's time by phase, and of the process's peak memory above that after its imports."""

    def __init__(self):
        self.base = _resident()
        self.rollouts: list[dict[str, float]] = []
        self._phase, self._since = "rest", time.perf_counter()
        self._seconds: dict[str, float] | None = None
        self._cpu = 0.0
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def ready(self):
        """Say that everything is loaded, and the training begins."""

    def switch(self, phase: str) -> str:
        """Count the time from now on for `phase`, and return the phase until now."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._seconds is not None:
            self._seconds[self._phase] += now - self._since
        self._since, before, self._phase = now, self._phase, phase
        return before

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        before = self.switch(name)
        try:
            yield
        finally:
            self.switch(before)

    def timed(self, function: Callable, name: str) -> Callable:
        """Return `function` with its time counted for the phase `name`."""

        def wrapped(*args, **kwargs):
            with self.phase(name):
                return function(*args, **kwargs)

        return wrapped

    def start_rollout(self):
        """End the last rollout, if there was one, and start the next."""
        self.end()
        self._seconds, self._cpu = defaultdict(float), time.process_time()

    def end(self):
        """End the last rollout."""
        self.switch("rest")
        if self._seconds is not None:
            self.rollouts.append(dict(self._seconds) | {"cpu": time.process_time() - self._cpu})
        self._seconds = None

    def report(self, setting: Setting) -> dict:
        """Return medians over all rollouts but the first, times in seconds per rollout and memory in MiB."""
        steady = self.rollouts[1:] or self.rollouts
        phases = {phase: median(r.get(phase, 0.0) for r in steady) for phase in PHASES}
        seconds = median(sum(r.get(phase, 0.0) for phase in PHASES) for r in steady)
        report = {
            "samples_per_second": setting.batch / seconds,
            "seconds": seconds,
            "cpu_seconds": median(r["cpu"] for r in steady),
            "phases": phases,
            "peak_memory": (_peak_resident() - self.base) / 2**20,
        }
        if torch.cuda.is_available():
            report["peak_gpu_memory"] = torch.cuda.max_memory_allocated() / 2**20
        return report


def contend(train: Callable[[Setting, dict, Meter], object]):
    """Train and print the report as the last line: `python -m bench.<contender> SETTING OPTIONS`, both JSON."""
    setting, options = Setting(**json.loads(sys.argv[1])), json.loads(sys.argv[2])
    torch.manual_seed(setting.seed)
    meter = Meter()
    train(setting, options, meter)
    meter.end()
    print(json.dumps(meter.report(setting)))


def as_json(setting: Setting) -> str:
    """Return a setting as [`contend`] reads it."""
    return json.dumps(asdict(setting))


def make_small_llama(folder: Path):
    """Write a Llama of 3 M random parameters with a word-level tokenizer, and a reward model of the same shape."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate(["<pad>", "<eos>", *(f"w{i}" for i in range(2, WORDS))])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        eos_token_id=1,
        bos_token_id=None,
        pad_token_id=0,
        num_labels=1,
    )
    torch.manual_seed(0)
    _save(folder, LlamaForCausalLM(config), LlamaForSequenceClassification(config), tokenizer)


def make_from(path: str, folder: Path):
    """Write the causal language model in `path` as the policy, and with a random score head as the reward model."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    reward = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.bfloat16, num_labels=1)
    _save(folder, policy, reward, AutoTokenizer.from_pretrained(path, padding_side="left"))


def _save(folder: Path, policy, reward, tokenizer):
    # No contender samples EOS or padding, so all completions have the same length: what its caller doesn't set,
    # `generate` takes from the model's generation_config.json
    policy.generation_config.suppress_tokens = sorted({tokenizer.eos_token_id, tokenizer.pad_token_id})
    reward.config.pad_token_id = tokenizer.pad_token_id
    policy.save_pretrained(folder / "policy")
    reward.save_pretrained(folder / "reward")
    tokenizer.save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "reward")
    # The reward model again, as an adapter on the policy's base
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained(folder / "policy", dtype=policy.dtype, num_labels=1)
    get_peft_model(base, LoraConfig(**LORA | {"task_type": "SEQ_CLS"})).save_pretrained(folder / "reward_adapter")
    tokenizer.save_pretrained(folder / "reward_adapter")


def make_prompts(folder: Path, count: int, tokens: int):
    """Write `count` texts of exactly `tokens` tokens each, so that no contender pads."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    candidates = sorted(i for word, i in tokenizer.get_vocab().items() if word.lstrip("Ġ").isalnum() and len(word) > 2)
    words = [word for word in map(tokenizer.decode, candidates) if len(tokenizer(f"{word} {word.strip()}")[0]) == 2]
    generator = torch.Generator().manual_seed(0)
    prompts = []
    while len(prompts) < count:
        drawn = torch.randint(len(words), (tokens,), generator=generator)
        text = " ".join(words[i].strip() for i in drawn.tolist())
        ids = tokenizer(text)["input_ids"]
        if len(ids) == tokens:
            prompts.append({"text": text, "ids": ids})
    (folder / "prompts.json").write_text(json.dumps(prompts))


def _resident() -> int:
    """Return the resident memory of this process, in bytes."""
    import psutil

    return psutil.Process().memory_info().rss


def _peak_resident() -> int:
    """Return the peak resident memory of this process, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
