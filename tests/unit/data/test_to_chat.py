"""Texts as chats: one decision of `data.to_chat` for every stage that reads the same rows for the same model."""

import json

import pytest
from datasets import Dataset

from rlhf_trl.build import demonstrations, instantiate_data, load_data
from rlhf_trl.data.build import build_dataset
from rlhf_trl.data.chat_template import text_as_chat
from rlhf_trl.data.sources.files import load_files
from rlhf_trl.data.sources.mixture import mix
from rlhf_trl.data.splits import prompt_keys
from rlhf_trl.errors import DataError
from rlhf_trl.models.tokenizers import load_tokenizer
from rlhf_trl.tasks.demo import load as load_demo
from tests.helpers.chat_tokenizers import CHATML, chatml_tokenizer
from tests.helpers.reward_models import save_reward_model
from tests.helpers.tiny import make_tokenizer, save_model

ROWS = [
    {"prompt": f"a {word}", "chosen": f" b {word}", "rejected": " c", "completion": " b", "label": bool(i % 2)}
    for i, word in enumerate("d e f g h i j k l m n o p".split())
]


def without_template():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    return tokenizer


@pytest.fixture
def file(tmp_path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


@pytest.mark.parametrize("dataset_type", ["preference", "prompt_completion", "unpaired", "comparisons", "prompt"])
def test_null_makes_chats_for_a_model_with_a_template(file, capsys, dataset_type):
    def load(to_chat, *tokenizers) -> dict:
        with text_as_chat(tokenizers):
            return load_files(dataset_type, 0, file, to_chat=to_chat, row_type="preference" if pairs else None)

    pairs = dataset_type in ("preference", "comparisons")
    text, chat = load(False), load(True)
    capsys.readouterr()
    found = load(None, make_tokenizer())
    assert found["train"].to_list() == chat["train"].to_list() and isinstance(chat["train"][0]["prompt"], list)
    said = capsys.readouterr().out
    assert "since the model has a chat template (`data.to_chat=false` keeps text) (13 rows)" in said
    for tokenizers in ([], [without_template()], [make_tokenizer(), without_template()]):
        assert load(None, *tokenizers)["train"].to_list() == text["train"].to_list()
    assert "note: not all of the models have a chat template" in capsys.readouterr().out
    assert load(False, make_tokenizer())["train"].to_list() == text["train"].to_list()
    assert prompt_keys(text["train"]) == prompt_keys(chat["train"])


def test_the_sources_of_a_mixture_decide_alike(file):
    def source(dataset_type, seed):
        return load_files(dataset_type, seed, file)

    chats = [{"prompt": [{"role": "user", "content": "a b c"}]}] * 2

    def other(dataset_type, seed):
        return build_dataset(dataset_type, seed, [("chats", [(f"row {i}", row) for i, row in enumerate(chats)])])

    with text_as_chat([make_tokenizer()]):
        assert len(mix("prompt", 0, {"text": source, "chat": other})["train"]) == len(ROWS) + 2
    with text_as_chat([without_template()]), pytest.raises(DataError, match="several kinds"):
        mix("prompt", 0, {"text": source, "chat": other})


def test_text_that_is_rendered_already_is_an_error(tmp_path):
    tokenizer = chatml_tokenizer(template=CHATML)
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    path = tmp_path / "rendered.jsonl"
    path.write_text(json.dumps({"prompt": rendered, "completion": "Hello"}) + "\n")
    with text_as_chat([tokenizer]):
        with pytest.raises(DataError, match=r"line 1: the text in `prompt` holds `<\|im_end\|>`, .*to_chat=false"):
            load_files("prompt_completion", 0, str(path))
        for to_chat in (True, False):
            load_files("prompt_completion", 0, str(path), to_chat=to_chat)


@pytest.mark.parametrize("kind", ["ratings", "pairs"])
def test_the_embedded_worlds_text_stays_text(compose, kind):
    cfg = compose("stage=reward", f"data/feedback={kind}", "data.conversational=false", "data.max_samples=8")
    with text_as_chat([make_tokenizer()]):
        rows = instantiate_data(cfg, tokenizers=[make_tokenizer()])["train"]
        assert rows.to_list() == instantiate_data(cfg, tokenizers=[])["train"].to_list()
        assert isinstance(load_demo("prompt", 0, 2, 2, conversational=False)["train"][0]["prompt"], str)
    assert isinstance(rows[0]["prompt"], str)


def test_every_stage_decides_alike(compose, tmp_path, file):
    model, plain = save_model(tmp_path / "model"), save_model(tmp_path / "plain")
    without_template().save_pretrained(plain)
    (tmp_path / "plain" / "chat_template.jinja").unlink(missing_ok=True)
    reward = save_reward_model(tmp_path)
    data = ["data=files", f"data.paths={file}", "data.eval_size=3", f"runs_dir={tmp_path / 'runs'}"]

    def is_chat(splits) -> bool:
        prompts = Dataset.to_list(splits["train"].select_columns("prompt"))
        return isinstance(prompts[0]["prompt"], list)

    for path, expected in ((model, True), (plain, False)):
        for stage, *more in (
            ("sft", "data.row_type=prompt_completion"),
            ("dpo", "data.row_type=preference"),
            ("kto", "data.row_type=unpaired"),
            ("reward", "data.row_type=preference"),
            ("ppo", "reward=eos", "stage.args.max_completion_length=4"),
        ):
            cfg = compose(f"stage={stage}", "model=hf", f"model.path={path}", *data, *more)
            tokenizer = load_tokenizer(path)
            assert (tokenizer.chat_template is not None) is expected
            dataset = load_data(cfg, tokenizer)
            assert is_chat(dataset) is expected, stage
        ptx = ["+data@ptx_data=files", f"ptx_data.paths={file}", "ptx_data.row_type=prompt_completion"]
        cfg = compose("stage=ppo", "model=hf", f"model.path={path}", "reward=eos", *data, *ptx)
        assert is_chat({"train": demonstrations(cfg, dataset, tokenizer)}) is expected
        cfg = compose(
            "stage=evaluate", f"stage.policies.sft={path}", "~stage.policies.ppo", "~stage.policies.dpo", *data
        )
        assert is_chat(instantiate_data(cfg)) is expected
        scored = ["reward.model.run=null", f"reward.model.path={reward}", "data.row_type=preference"]
        assert is_chat(instantiate_data(compose("stage=evaluate_reward", *scored, *data)))
