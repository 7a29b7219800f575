"""
Images of rows: where they are read from, checks, and their places in a chat.

A row has its images in `image` (one) or `images` (a list), or in the parts of its turns. While rows are read, each
image stands in the chat, as a part with the image's key: so what compares prompts compares their images as well. A
dataset has them in the column `images`, as TRL's trainers read them.
"""

import base64
import functools
import hashlib
import http.client
import io
import json
import os
import urllib.request
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rlhf_trl.data.rows import RowError, type_of
from rlhf_trl.hints import count_of

# Columns of a source, one image or a list of them
IMAGE_COLUMNS = ("image", "images")
# Fields of a turn's part that hold an image
PAYLOADS = ("image", "path", "bytes", "url", "image_url")
URL = ("http://", "https://")
SECONDS = 30.0


def image_key(image: dict[str, Any]) -> str:
    """Return a hash of the bytes of an image as a dataset has it, `{"bytes", "path"}`."""
    if image["bytes"] is not None:
        return _key(image["bytes"])
    return _key_of_file(image["path"], os.stat(image["path"]).st_mtime_ns)


@functools.lru_cache(maxsize=2**20)
def _key_of_file(path: str, changed: int) -> str:
    return _key(Path(path).read_bytes())


def _key(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


class ImageStore:
    """
    The images of the rows of a reader, each once.

    Args:
        allow_urls (`bool`): whether images of URLs are downloaded.
    """

    def __init__(self, allow_urls: bool = False):
        self.allow_urls = allow_urls
        self.images: dict[str, dict[str, Any]] = {}  # key -> as a dataset has it

    def columns_of(self, row: dict, folder: Path) -> list[str]:
        """
        Return the keys of the images in the columns of a row.

        Args:
            row (`dict`): the row, by our names of the columns.
            folder (`Path`): where relative paths start.

        Raises:
            RowError: if an image is missing, or can't be read as one.
        """
        given = [name for name in IMAGE_COLUMNS if row.get(name) is not None]
        if not given:
            return []
        if len(given) > 1:
            raise RowError("image", "stands beside `images`, and a row has one of them")
        name, value = given[0], row[given[0]]
        if name == "image":
            return [self.add(value, name, folder)]
        if isinstance(value, str):  # a CSV file has no other way
            try:
                value = json.loads(value)
            except ValueError:
                raise RowError(name, "is text, where a list of images should be") from None
        if not isinstance(value, list):
            raise RowError(name, f"is {type_of(value)}, where a list of images should be")
        return [self.add(each, f"{name}[{i}]", folder) for i, each in enumerate(value)]

    def add(self, value: Any, field: str, folder: Path) -> str:
        """Read and check one image: a path, bytes, or an object with one of them; return its key."""
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path") or value.get("url")
        path = None
        if isinstance(value, str) and value.startswith("data:"):
            content = _decode(value, field)
        elif isinstance(value, str) and value.startswith(URL):
            content = self._download(value, field)
        elif isinstance(value, str) and value:
            path, content = _read_file(value, field, folder)
        elif isinstance(value, bytes):
            content = value
        else:
            raise RowError(field, f"is {type_of(value)}, where a path or the bytes of an image should be")
        key = _key(content)
        if key not in self.images:
            check_image(content, field)
            self.images[key] = {"bytes": None if path else content, "path": path}
        return key

    def _download(self, url: str, field: str) -> bytes:
        if not self.allow_urls:
            raise RowError(
                field,
                f"is the URL {url[:80]}, and nothing is downloaded unless asked for. Set `data.image_urls=true`, or "
                "download the images and give their paths",
            )
        try:
            with urllib.request.urlopen(url, timeout=SECONDS) as response:
                return response.read()
        except (OSError, ValueError, http.client.HTTPException) as error:  # the last two for what is no URL
            raise RowError(field, f"is the URL {url[:80]}, which can't be downloaded ({error})") from None

    def read_prompt(self, row: dict, folder: Path) -> dict:
        """
        Return a row with a checked prompt whose images are in the column `images`, for a prompt outside of a dataset.

        Raises:
            RowError: as [`ImageStore.columns_of`] and [`place_images`].
        """
        keys, prompt = self.columns_of(row, folder), row["prompt"]
        rest = {name: value for name, value in row.items() if name not in IMAGE_COLUMNS}
        if not keys and not has_images(prompt):
            return rest
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return self.take({**rest, "prompt": place_images(turns, keys, self, folder)})

    def take(self, row: dict) -> dict:
        """Return a row whose chat has no images in it any more, with the column `images` if it had any."""
        field = "messages" if "messages" in row else "prompt"
        if not isinstance(row.get(field), list):
            return row
        messages, keys = take_images(row[field])
        return {**row, field: messages, "images": [self.images[key] for key in keys]} if keys else row


def _read_file(given: str, field: str, folder: Path) -> tuple[str, bytes]:
    """Return the whole path of a file and its content."""
    shown = given if len(given) <= 200 else f"{given[:80]}..."
    try:
        file = Path(folder, Path(given).expanduser())
        if not file.is_file():
            raise RowError(field, f"names the file `{shown}`, which doesn't exist (seen from {folder.resolve()})")
        return str(file.resolve()), file.read_bytes()
    except (OSError, RuntimeError) as error:  # too long for a name, no rights; no such home folder
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise RowError(
            field,
            f"names the file `{shown}`, which can't be read ({why}). An image in base64 must be a data URI, "
            "`data:image/png;base64,...`",
        ) from None


def _decode(uri: str, field: str) -> bytes:
    head, _, content = uri.partition(",")
    if not head.endswith(";base64"):
        raise RowError(field, "is a data URI, and must hold the image in base64: `data:image/png;base64,...`")
    try:
        return base64.b64decode(content, validate=True)
    except ValueError as error:
        raise RowError(field, f"is a data URI that is no base64 ({error})") from None


def check_image(content: bytes, field: str) -> None:
    """
    Decode an image, all of it: a file that was cut off has a head that looks well.

    Raises:
        RowError: if it can't be decoded.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content)) as image:
            image.draft("L", (64, 64))  # of a JPEG a small version is decoded, from all of its bytes
            image.load()
    except UnidentifiedImageError:  # its message is the address of the bytes
        what = "it is of no format that Pillow knows" if content else "it is empty"
        raise RowError(field, f"can't be read as an image ({what})") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise RowError(field, f"can't be read as an image ({' '.join(str(error).split())[:120]})") from None


def check_parts(parts: list, field: str, role: str) -> list[dict] | str:
    """
    Return the parts of a turn's `content`, text and images; one text where there are no images.

    Raises:
        RowError: for any other part, and for an image in a turn that isn't the user's.
    """
    made = []
    for i, part in enumerate(parts):
        at = f"{field}[{i}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            made.append({"type": "text", "text": part["text"]})
        elif kind in ("image", "image_url"):
            if role not in ("user", "tool"):
                raise RowError(at, f"is an image in a turn of `{role}`, and images are read in the user's")
            payload = next((part[name] for name in PAYLOADS if part.get(name) is not None), None)
            made.append({"type": "image"} | ({} if payload is None else {"image": payload}))
        else:
            found = f"of the type `{kind}`" if kind else type_of(part)
            raise RowError(at, f"is {found}, where a part of the type `text` or `image` should be")
    if any(part["type"] == "image" for part in made):
        return made
    return "".join(part["text"] for part in made)


def has_images(messages: Any) -> bool:
    """Return whether a chat has images, or places for them, among the parts of its turns."""
    return isinstance(messages, list) and any(isinstance(turn.get("content"), list) for turn in messages)


def refuse_images(row: dict, prompt: Any, reason: str) -> None:
    """
    Raise a `RowError` for a row with images, in columns or in its chat, where text alone is read.

    Args:
        row (`dict`): the row, by our names of the columns.
        prompt (`str` or `list[dict]`): its checked prompt.
        reason (`str`): what reads text alone, as a sentence goes on after "has images, and".
    """
    given = [name for name in IMAGE_COLUMNS if row.get(name) is not None]
    if given or has_images(prompt):
        raise RowError(given[0] if given else "prompt", f"has images, and {reason}")


def place_images(messages: list[dict], keys: Sequence[str], store: ImageStore, folder: Path) -> list[dict]:
    """
    Return a chat with the keys of its images in it.

    Images of the row's columns go to the places that its turns have for them, in order or, where there are none,
    before the first words of the user, as in TRL.

    Args:
        messages (`list[dict]`): the chat.
        keys (`Sequence[str]`): of the images in the row's columns.
        store ([`ImageStore`]): gets the images that the turns have themselves.
        folder (`Path`): where relative paths start.

    Raises:
        RowError: if there are more or fewer images than places.
    """
    left, places, made = list(keys), 0, []
    for number, turn in enumerate(messages):
        parts = turn.get("content")
        if not isinstance(parts, list):
            made.append(turn)
            continue
        placed = []
        for i, part in enumerate(parts):
            if part["type"] == "image" and "image" in part:
                key = part["image"] if part["image"] in store.images else None
                key = key or store.add(part["image"], f"prompt[{number}].content[{i}]", folder)
                part = {"type": "image", "image": key}
            elif part["type"] == "image":
                places += 1
                part = {"type": "image", "image": left.pop(0) if left else ""}
            placed.append(part)
        made.append({**turn, "content": placed})
    if places and places != len(keys):
        raise RowError("images", f"holds {count_of(len(keys), 'image')}, and the turns have places for {places}")
    if not places and keys:
        first = next((i for i, turn in enumerate(made) if turn["role"] == "user"), None)
        if first is None:
            raise RowError("images", "has no place: the chat has no turn of the user")
        images = [{"type": "image", "image": key} for key in keys]
        content = made[first]["content"]
        words = content if isinstance(content, list) else [{"type": "text", "text": content}]
        made[first] = {**made[first], "content": [*images, *words]}
    return made


def take_images(messages: list[dict]) -> tuple[list[dict], list]:
    """
    Return a chat without its images, and the images (or their keys) in order.

    A chat whose images all stand before the first words of the user has text alone, as TRL puts them there; another
    one keeps its parts, with a place for each image.
    """
    keys = [key for turn in messages for key in _keys_in(turn)]
    messages = [_as_words(turn) for turn in messages]
    if not keys:
        return messages, []
    users = [turn for turn in messages if turn["role"] == "user"]
    with_images = [turn for turn in messages if _keys_in(turn)]
    kinds = [part["type"] for part in with_images[0]["content"]]
    if len(with_images) == 1 and users[:1] == with_images and kinds == ["image"] * len(keys) + ["text"]:
        text = with_images[0]["content"][-1]["text"]
        return [{**turn, "content": text} if turn is with_images[0] else turn for turn in messages], keys
    return [_with_places(turn) for turn in messages], keys


def _as_words(turn: dict) -> dict:
    """Return a turn of one part of text as that text, which TRL makes a part of."""
    parts = turn.get("content")
    if isinstance(parts, list) and len(parts) == 1 and parts[0]["type"] == "text":
        return {**turn, "content": parts[0]["text"]}
    return turn


def _keys_in(turn: dict) -> list:
    parts = turn.get("content")
    return [part["image"] for part in parts if "image" in part] if isinstance(parts, list) else []


def _with_places(turn: dict) -> dict:
    if not isinstance(turn.get("content"), list):
        return turn
    return {**turn, "content": [{"type": "image"} if part["type"] == "image" else part for part in turn["content"]]}


def image_as_text(image: dict[str, Any]) -> str:
    """Return an image of a dataset as text that `data` reads again: its path, or a data URI of its bytes."""
    if image["path"] is not None and image["bytes"] is None:
        return image["path"]
    return f"data:image;base64,{base64.b64encode(image['bytes']).decode()}"


def keys_of(images: Iterable[dict[str, Any]] | None) -> list[str]:
    """Return the keys of a dataset's `images` of a row, not decoded."""
    return [image_key(image) for image in images or ()]


def decode_images(dataset, decode: bool = True):
    """Return a dataset whose images are read as PIL images or, with `decode=False`, as `{"bytes", "path"}`."""
    from datasets import Image, List

    for name, feature in dataset.features.items():
        if isinstance(feature, Image):
            dataset = dataset.cast_column(name, Image(decode=decode))
        elif isinstance(feature, List) and isinstance(feature.feature, Image):
            dataset = dataset.cast_column(name, List(Image(decode=decode)))
    return dataset
