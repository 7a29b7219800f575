"""A tiny Llama, a tiny GPT-2 and a word-level tokenizer, made on the fly, for tests of the trainers."""

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = "a b c d e f g h i j k l m n o p".split()
# Arguments of a trainer that says and saves nothing, on a CPU
QUIET_ON_CPU = {
    "report_to": "none",
    "bf16": False,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "disable_tqdm": True,
    "logging_steps": 1,
    "save_strategy": "no",
}
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}<user> {{ message['content'] }} "
    "{% else %}<assistant> {{ message['content'] }} <eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def make_tokenizer(pad_is_eos: bool = False) -> PreTrainedTokenizerFast:
    special = ["<pad>", "<eos>", "<unk>", "<user>", "<assistant>"]
    vocab = {word: i for i, word in enumerate(special + WORDS)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    # Single letters are words, also where no space parts them: a prompt and a completion in one text keep theirs
    letters = pre_tokenizers.Split(Regex(f"[{''.join(WORDS)}]"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), letters])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<eos>" if pad_is_eos else "<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>"],
        padding_side="left",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_model(path, pad_is_eos: bool = False, seed: int = 0, **config) -> str:
    """Write a randomly initialised Llama and its tokenizer to `path`, and return it as a string."""
    tokenizer = make_tokenizer(pad_is_eos)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2} | config
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
            initializer_range=0.3,  # wide, so that log-probabilities differ from token to token
            **sizes,
        )
    )
    model.config.pad_token_id = tokenizer.pad_token_id  # set now: the constructor would zero its embedding
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def save_gpt2(path) -> str:
    """Write a randomly initialised GPT-2, whose positions are absolute, and its tokenizer; return the path."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.4)
    )
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)
