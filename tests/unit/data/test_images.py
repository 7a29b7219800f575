"""Images of rows: where they are read from, what is checked, and how they travel through every dataset type."""

import base64
import io
import json

import pytest
from datasets import Dataset, Features, Image, List, Value
from PIL import ExifTags
from PIL import Image as PILImage

from rlhf_trl.data import Edits, Pairs, Rankings, Ratings, Thumbs, load_files, load_hub
from rlhf_trl.data.chat_template import text_as_chat
from rlhf_trl.data.images import decode_images
from rlhf_trl.data.multimodal import as_pil, decoded, opened, read_prompt, thumbnail, tokenizer_of
from rlhf_trl.data.splits import prompt_keys
from rlhf_trl.errors import ConfigError, DataError
from tests.helpers.vision import COLOURS, llava, picture

ASK = "What color is it?"


def content(colour: str, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    picture(colour).save(stream, kind)
    return stream.getvalue()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pics").mkdir()
    for colour in COLOURS:
        (tmp_path / "pics" / f"{colour}.png").write_bytes(content(colour))
    return tmp_path


def write(folder, *rows: dict, name: str = "rows.jsonl") -> str:
    path = folder / name
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def pair(colour: str, other: str = "black", **more) -> dict:
    return {"prompt": ASK, "image": f"pics/{colour}.png", "chosen": colour, "rejected": other} | more


def load(path: str, dataset_type: str, **options) -> Dataset:
    return load_files(dataset_type, 0, path, **({"eval_size": None} | options))["train"]


def colours_of(rows: Dataset) -> list[list[tuple]]:
    return [[image.convert("RGB").getpixel((0, 0)) for image in row["images"]] for row in rows]


@pytest.mark.parametrize(
    "dataset_type", ["prompt_completion", "preference", "unpaired", "comparisons", "prompt", "annotated"]
)
def test_rows_of_every_dataset_type_keep_their_images(folder, dataset_type):
    rows = load(write(folder, pair("red"), pair("blue")), dataset_type)
    repeats = 2 if dataset_type == "unpaired" else 1
    expected = [[COLOURS[colour]] for colour in ("red", "blue") for _ in range(repeats)]
    assert colours_of(rows) == expected
    assert rows[0]["prompt"] == [{"role": "user", "content": ASK}]


def test_images_are_read_from_paths_bytes_and_data_uris(folder, tmp_path):
    uri = f"data:image/png;base64,{base64.b64encode(content('green')).decode()}"
    path = write(folder, pair("red"), pair("red", image=str(folder / "pics/blue.png")), pair("red", image=uri))
    assert colours_of(load(path, "preference")) == [[COLOURS[name]] for name in ("red", "blue", "green")]

    features = Features({"prompt": Value("string"), "images": List(Image())})
    kept = Dataset.from_list([{"prompt": ASK, "images": [picture("red"), picture("blue")]}], features=features)
    kept.to_parquet(str(tmp_path / "kept.parquet"))
    kept.save_to_disk(str(tmp_path / "saved"))
    expected = [[COLOURS["red"], COLOURS["blue"]]]
    assert colours_of(load(str(tmp_path / "kept.parquet"), "prompt")) == expected
    assert colours_of(load_hub("prompt", 0, str(tmp_path / "saved"))["train"]) == expected

    (folder / "rows.csv").write_text('prompt,images\nWhich?,"[""pics/red.png"", ""pics/blue.png""]"\n')
    assert colours_of(load(str(folder / "rows.csv"), "prompt")) == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "pics/pink.png"}, "`image` names the file `pics/pink.png`, which doesn't exist"),
        ({"image": "pics/broken.png"}, "`image` can't be read as an image"),
        ({"image": "pics/cut.jpg"}, "`image` can't be read as an image ("),
        ({"image": "pics/empty.png"}, "`image` can't be read as an image (it is empty)"),
        ({"image": base64.b64encode(bytes(999)).decode()}, "An image in base64 must be a data URI"),
        ({"image": "https://example.org/a.png"}, "`image` is the URL https://example.org/a.png, and nothing is down"),
        ({"image": None, "images": ["pics/red.png", 3]}, "`images[1]` is a number (3), where a path or the bytes"),
        ({"image": None, "images": {"a": 1}}, "`images` is an object, where a list of images should be"),
        ({"images": ["pics/red.png"]}, "`image` stands beside `images`"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}], "chosen": "a"},
            "`images` holds 1 image, and the turns have places for 2",
        ),
        (
            {"prompt": [{"role": "user", "content": [{"type": "video"}]}]},
            "`prompt[0].content[0]` is of the type `video`, where a part of the type `text` or `image` should be",
        ),
        (
            {"chosen": [{"role": "assistant", "content": [{"type": "image"}]}]},
            "`chosen[0].content[0]` is an image in a turn of `assistant`",
        ),
    ],
)
def test_every_bad_image_is_named(folder, row, message):
    (folder / "pics" / "broken.png").write_bytes(b"no image at all")
    (folder / "pics" / "empty.png").write_bytes(b"")
    (folder / "pics" / "cut.jpg").write_bytes(content("red", "JPEG")[:-40])
    path = write(folder, pair("red"), pair("red") | row)
    with pytest.raises(DataError) as error:
        load(path, "preference")
    assert "rows.jsonl, line 2: " in str(error.value) and message in str(error.value)
    if "type" not in message and "places" not in message and "turn" not in message:
        assert len(load(path, "preference", bad_rows="drop")) == 1


@pytest.mark.parametrize(
    ("feedback", "row", "field"),
    [
        (None, {"prompt": f"<image> {ASK}"}, "prompt"),
        (None, {"prompt": f"{ASK} <image>", "image": None}, "prompt"),
        (None, {"prompt": [{"role": "user", "content": [{"type": "text", "text": "<image>"}]}]}, "prompt"),
        (None, {"rejected": "<image>"}, "rejected"),
        (Pairs(), {"completion_b": "a <image>"}, "completions"),
    ],
)
@pytest.mark.parametrize("dataset_type", ["comparisons", "annotated"])
def test_the_token_of_an_image_is_none_of_the_words(folder, feedback, row, field, dataset_type):
    """Which would be one image more than the row has, for the processor."""
    given = {"completion_a": "a", "completion_b": "b", "preferred": "a"}
    path = write(folder, pair("red", **given), pair("blue", **given) | row)
    processor = llava()[0]
    tokenizer = tokenizer_of(processor)
    with text_as_chat([tokenizer]):
        with pytest.raises(DataError) as error:
            load(path, dataset_type, to_chat=True, feedback=feedback)
        assert len(load(path, dataset_type, to_chat=True, feedback=feedback, bad_rows="drop")) == 1
    assert f"rows.jsonl, line 2: `{field}` holds `<image>` in its text, which the model reads as" in str(error.value)


def test_a_prompt_with_more_places_than_images_is_an_error_of_the_config():
    """As `stage=chat` shows and goes on after."""
    asked = [{"role": "user", "content": "<image> what is it ?"}]
    with pytest.raises(ConfigError, match="The processor can't read the chat: .* total 2 <image> tokens and 1 images"):
        read_prompt(tokenizer_of(llava()[0]), asked, [picture("red")], add_generation_prompt=True)


@pytest.mark.parametrize("url", ["http://a b/c d.png", "http://[bad/x.png", "http://127.0.0.1:9/\u20ac.png"])
def test_what_is_no_url_is_named_where_urls_are_read(folder, url):
    with pytest.raises(DataError, match="line 1: `image` is the URL .* which can't be downloaded"):
        load(write(folder, pair("red", image=url)), "preference", image_urls=True)


def test_a_photograph_is_turned_as_its_camera_says_wherever_it_is_read(folder):
    photo = PILImage.new("RGB", (40, 20))
    exif = photo.getexif()
    exif[ExifTags.Base.Orientation] = 6
    photo.save(folder / "turned.jpg", exif=exif)
    rows = load(write(folder, pair("red", image="turned.jpg")), "preference")
    kept = decode_images(rows, False)[0]["images"][0]
    assert rows[0]["images"][0].size == as_pil(kept).size == opened(thumbnail(kept)).size == (20, 40)


def test_images_go_to_their_places_or_before_the_first_words(folder):
    parts = [{"type": "text", "text": "Is "}, {"type": "image"}, {"type": "text", "text": " red?"}]
    inline = [{"type": "image", "image": "pics/blue.png"}, {"type": "text", "text": ASK}]
    path = write(
        folder,
        {"prompt": [{"role": "user", "content": parts}], "image": "pics/red.png"},
        {"prompt": [{"role": "user", "content": inline}]},
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": ASK}]}]},
    )
    rows = load(path, "prompt")
    assert colours_of(rows) == [[COLOURS["red"]], [COLOURS["blue"]], []]
    assert [row["prompt"][0]["content"] for row in rows] == [parts, ASK, ASK]


def test_prompts_with_other_images_are_other_prompts(folder):
    rows = [pair(colour, other) for colour in COLOURS for other in ("black", "white")]
    splits = load_files("preference", 0, write(folder, *rows), eval_size=1)
    assert len(set(prompt_keys(splits["train"]))) == 2
    assert not set(prompt_keys(splits["train"])) & set(prompt_keys(splits["eval"]))
    assert len(splits["train"]) == 4 and len(splits["eval"]) == 2


FEEDBACK = [
    (Pairs(), {"completion_a": "Red.", "completion_b": "Black.", "preferred": "a"}),
    (Rankings(), {"completions": ["Red.", "Black.", "Pink."], "ranks": [1, 2, 3]}),
    (Edits(), {"original": "Black.", "edited": "Red."}),
    (Ratings(), [{"completion": "Red.", "ratings": 5}, {"completion": "Black.", "ratings": 1}]),
    (Thumbs(), [{"completion": "Red.", "thumb": True}, {"completion": "Black.", "thumb": False}]),
]


@pytest.mark.parametrize(("feedback", "given"), FEEDBACK, ids=[each.name for each, _ in FEEDBACK])
@pytest.mark.parametrize("dataset_type", ["comparisons", "preference", "unpaired", "annotated", "prompt"])
def test_all_forms_of_feedback_keep_images(folder, feedback, given, dataset_type):
    made = [
        {"prompt": ASK, "image": f"pics/{colour}.png"} | each
        for colour in ("red", "blue")
        for each in (given if isinstance(given, list) else [given])
    ]
    rows = load(write(folder, *made), dataset_type, feedback=feedback)
    assert {tuple(each) for each in colours_of(rows)} == {(COLOURS["red"],), (COLOURS["blue"],)}
    assert all(row["prompt"] == [{"role": "user", "content": ASK}] for row in rows)


def test_an_image_of_many_rows_is_decoded_once(folder):
    rows = decode_images(load(write(folder, pair("red"), pair("blue")), "prompt"), False)["images"][:]
    first, again, other, none = decoded([rows[0], rows[0], rows[1], None])
    assert first[0] is again[0] and none == []
    assert [each[0].getpixel((0, 0)) for each in (first, other)] == [COLOURS["red"], COLOURS["blue"]]
