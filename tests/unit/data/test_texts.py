"""Texts and templates as people have them: borders that merge, BOS and EOS twice, refusals, repetitions, no ends."""

import json

import pytest
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from rlhf_trl.data import Rankings
from rlhf_trl.data.chat_template import refusals_named
from rlhf_trl.data.lengths import keep_one_bos
from rlhf_trl.data.preview import note_rows_without_end
from rlhf_trl.data.sources.files import load_files
from rlhf_trl.data.tokenize import note_template_end, prompt_ids, row_ids, split_row_ids, written_row_ids
from rlhf_trl.errors import DataError
from rlhf_trl.models.tokenizers import load_tokenizer
from tests.helpers.chat_tokenizers import turn_tokenizer
from tests.helpers.tiny import CHAT_TEMPLATE, make_tokenizer

GEMMA = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}<user> {{ m['content'] }} <eos>{% endfor %}"
)


def sentencepiece(path, adds="<s> $A") -> str:
    """Return a tokenizer like Llama 2's: it writes a space as `▁` and puts one before each text; `:▁` is a token."""
    letters = [*"▁:.ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz", ":▁", "▁i"]
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *letters])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[(":", "▁"), ("▁", "i")], unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.post_processor = processors.TemplateProcessing(single=adds, special_tokens=[("<s>", 1), ("</s>", 2)])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    made.save_pretrained(path)
    return str(path)


def sft_trainer(tokenizer, rows, out, **args):
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    args = SFTConfig(str(out), report_to="none", use_cpu=True, bf16=False, **args)
    return SFTTrainer(
        LlamaForCausalLM(config), args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )


# ---- The border of prompt and completion ----


def test_a_text_row_has_the_ids_and_the_border_of_sft(tmp_path):
    tokenizer = load_tokenizer(sentencepiece(tmp_path / "tokenizer"))
    pairs = [("Answer:", " it is so."), ("Answer:", "it is so."), ("Say", " it"), ("Say ", "it"), ("Say", "ing")]
    trainer = sft_trainer(tokenizer, [{"prompt": p, "completion": c} for p, c in pairs], tmp_path / "out")
    for (prompt, completion), row in zip(pairs, trainer.train_dataset, strict=True):
        assert row_ids(tokenizer, prompt, completion) == row["input_ids"]
        start, end = split_row_ids(tokenizer, prompt, completion)
        assert [-100] * len(start) + end == row["labels"]
    # `▁i` of a text of its own, with another space before it, is in no row
    words = tokenizer.convert_ids_to_tokens(row_ids(tokenizer, *pairs[0]))
    assert words == ["<s>", "▁", *"Answer", ":▁", "i", "t", "▁i", "s", "▁", "s", "o", ".", "</s>"]


def test_what_a_policy_writes_is_read_as_the_text_is_in_training(tmp_path):
    tokenizer = load_tokenizer(sentencepiece(tmp_path / "tokenizer"))
    ids = tokenizer.convert_tokens_to_ids
    written = ids(["▁", "i", "t", "</s>"])  # after `:`, the prompt's own last token
    row = row_ids(tokenizer, "Answer:", " it")
    assert prompt_ids(tokenizer, "Answer:") + written != row
    assert written_row_ids(tokenizer, "Answer:", written) == row
    assert written_row_ids(tokenizer, "Answer:", written[:-1]) == row[:-1]
    # where nothing merges, the ids stay the policy's, also those that no text has
    assert written_row_ids(tokenizer, "Say", written) == prompt_ids(tokenizer, "Say") + written


# ---- BOS and EOS that the tokenizer adds ----


def test_a_tokenizer_that_adds_eos_adds_it_no_more(tmp_path, capsys):
    tokenizer = load_tokenizer(sentencepiece(tmp_path / "tokenizer", adds="<s> $A </s>"))
    assert "adds EOS (`</s>`) to every text, also between prompt and completion" in capsys.readouterr().out
    assert prompt_ids(tokenizer, "Say") == [1, *tokenizer.convert_tokens_to_ids(["▁", *"Say"])]
    assert row_ids(tokenizer, "Say", " it").count(2) == 1
    (row,) = sft_trainer(tokenizer, [{"prompt": "Say", "completion": " it"}], tmp_path / "out").train_dataset
    assert row["input_ids"] == row_ids(tokenizer, "Say", " it")
    tokenizer.save_pretrained(tmp_path / "saved")
    assert prompt_ids(load_tokenizer(str(tmp_path / "saved")), "Say") == prompt_ids(tokenizer, "Say")


def test_text_that_begins_with_bos_has_one(tmp_path, capsys):
    tokenizer = load_tokenizer(sentencepiece(tmp_path / "tokenizer"))
    expected = prompt_ids(tokenizer, "Say")
    assert expected.count(1) == 1 and prompt_ids(tokenizer, "<s>Say") == expected
    assert row_ids(tokenizer, "<s>Say", " it") == row_ids(tokenizer, "Say", " it")
    rows = Dataset.from_list([{"prompt": "<s>Say"}, {"prompt": "Say"}])
    kept = keep_one_bos(DatasetDict(train=rows), tokenizer)
    assert kept["train"]["prompt"][:] == ["Say", "Say"]
    assert "1 of 2 train rows begin with the BOS token `<s>`" in capsys.readouterr().out
    other = make_tokenizer()
    other.bos_token = "<user>"  # which this tokenizer doesn't add
    assert prompt_ids(other, "<user> a") == [3, 5]


# ---- Templates that refuse a chat ----


def chats(path, *rows) -> str:
    turns = [[{"role": role, "content": text} for role, text in zip(row.split(), "abc", strict=False)] for row in rows]
    path.write_text(
        "".join(
            json.dumps({"prompt": chat, "completion": [{"role": "assistant", "content": "d"}]}) + "\n"
            for chat in turns
        )
    )
    return str(path)


@pytest.mark.parametrize(
    ("roles", "options", "message"),
    [
        (
            "system user",
            {},
            "line 2 is refused by the chat template (Roles must alternate): its turns are system, user",
        ),
        ("user user", {}, "line 2 is refused by the chat template (Roles must alternate): its turns are user, user"),
        ("user", {"system_prompt": "Be kind."}, "line 1 is refused by the chat template"),
    ],
)
def test_refused_chats_are_named_by_file_and_line(tmp_path, roles, options, message):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = GEMMA
    file = chats(tmp_path / "chats.jsonl", "user", roles, "user")
    for dataset_type in ("prompt_completion", "prompt"):
        with refusals_named(tokenizer), pytest.raises(DataError) as error:
            load_files(dataset_type, seed=0, paths=file, **options)
        assert f"{file}, {message}" in str(error.value)
        assert ("data.system_prompt" in str(error.value)) == ("system" in message or bool(options))
    if not options:
        with refusals_named(tokenizer):
            assert len(load_files("prompt", seed=0, paths=file, bad_rows="drop")["train"]) == 2
    load_files("prompt", seed=0, paths=file, **options)  # for no tokenizer in particular


def test_a_refusal_elsewhere_shows_the_chat():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = GEMMA
    with pytest.raises(
        DataError, match="begins with 'Be kind.' is refused by the chat template .Roles must alternate"
    ):
        prompt_ids(tokenizer, [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "a"}])


# ---- Chats as text, prompts in answers ----


def test_chats_written_as_json_text_are_chats(tmp_path, capsys):
    prompt, answer = [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]
    file = tmp_path / "rows.csv"
    cell = '"{}"'.format
    quoted = [cell(json.dumps(value).replace('"', '""')) for value in (prompt, answer)]
    file.write_text(f"prompt,completion\n{','.join(quoted)}\n")
    (row,) = load_files("prompt_completion", seed=0, paths=str(file))["train"]
    assert (row["prompt"], row["completion"]) == (prompt, answer)
    assert "`prompt`: chats written as JSON text were read as chats (1 rows)" in capsys.readouterr().out
    file.write_text(f"prompt,completion\n{cell(str(prompt))},{cell(str(answer))}\n")
    with pytest.raises(DataError, match="rows.csv, line 2: `prompt` is text that looks like a chat and is no JSON"):
        load_files("prompt_completion", seed=0, paths=str(file))
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "a b", "completion": '[{"name": "f", "value": 3}]'}) + "\n")
    assert load_files("prompt_completion", seed=0, paths=str(file))["train"][0]["completion"].startswith("[{")


def test_a_prompt_that_all_answers_repeat_is_taken_out(tmp_path, capsys):
    file = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"How {i}?", "chosen": f"How {i}? Mix.", "rejected": f"How {i}? No."} for i in range(4)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for dataset_type, first in (("preference", " Mix."), ("comparisons", [" Mix.", " No."])):
        row = load_files(dataset_type, seed=0, paths=str(file))["train"][0]
        assert row.get("chosen", row.get("completions")) == first and row["prompt"] == "How 0?"
        assert "the prompt is repeated at the beginning of the answers: it is taken out" in capsys.readouterr().out
    rows[3] |= {"chosen": "Mix."}
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load_files("preference", seed=0, paths=str(file))["train"][0]["chosen"] == "How 0? Mix."
    assert "it stays there, since other rows' don't (3 rows)" in capsys.readouterr().out


def test_a_prompt_that_completions_of_feedback_repeat_is_said(tmp_path, capsys):
    file = tmp_path / "rankings.jsonl"
    rows = [
        {"prompt": f"How {i}?", "completions": [f"How {i}? Mix.", f"How {i}? No."], "ranks": [1, 2]} for i in range(4)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    load_files("comparisons", seed=0, paths=str(file), feedback=Rankings())
    assert "the prompt is repeated at the beginning of the completions, and stays there" in capsys.readouterr().out


# ---- Where training teaches no end ----


def test_rows_that_train_no_end_are_said(tmp_path, capsys):
    rows = [{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}] * 4

    def said(tokenizer, **args):
        trainer = sft_trainer(tokenizer, rows, tmp_path / "out", **args)
        capsys.readouterr()
        note_template_end(tokenizer)
        note_rows_without_end(trainer.data_collator(list(trainer.train_dataset)), tokenizer)
        return capsys.readouterr().out

    tokenizer = make_tokenizer()
    assert said(tokenizer) == ""
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<eos>", "")
    assert "no token that ends generation (`<eos>`) is trained on in the first 4 rows" in said(tokenizer)
    tokenizer = turn_tokenizer()  # of a base model, whose turns don't end with its EOS
    assert "the chat template ends turns with `<end>`, which is neither the tokenizer's EOS (`<eos>`)" in (
        found := said(tokenizer)
    )
    assert "+stage.args.eos_token='<end>'" in found and "no token that ends generation" not in found
    assert said(tokenizer, eos_token="<end>") == ""
