"""Pictures of colored shapes, and questions on them whose answers are known."""

import io
import random
from typing import NamedTuple

from PIL import Image, ImageDraw

COLORS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 119, 180),
    "yellow": (240, 200, 20),
}
SHAPES = ("circle", "square", "triangle", "cross")
PLACES = ("top left", "top right", "bottom left", "bottom right")
# What a document calls a wrong and a right answer
VERDICTS = ("False.", "True.")
NUMBERS = ("zero", "one", "two", "three", "four")
# Side of a place in pixels, and of a picture
CELL = 12
SIDE = 2 * CELL
# Half of a shape's width, in pixels
RADIUS = 5


class Shape(NamedTuple):
    """
    A shape in a picture.

    Attributes:
        place (`int`): index into `PLACES`.
        color (`str`), kind (`str`): one of `COLORS` and of `SHAPES`.
    """

    place: int
    color: str
    kind: str


class Question(NamedTuple):
    """
    A question on a picture.

    Attributes:
        text (`str`): its words.
        topic (`str`): `color`, `count` or `position`.
        answer (`str`): the right answer.
        others (`tuple[str, ...]`): the wrong ones of the same kind.
    """

    text: str
    topic: str
    answer: str
    others: tuple[str, ...]


def draw_shapes(rng: random.Random) -> list[Shape]:
    """Draw one to four shapes in places of their own, fewer more often."""
    places = rng.sample(range(len(PLACES)), rng.choices((1, 2, 3, 4), (3, 3, 2, 2))[0])
    return [Shape(place, rng.choice(list(COLORS)), rng.choice(SHAPES)) for place in sorted(places)]


def paint(shapes: list[Shape], rng: random.Random) -> bytes:
    """Return a picture of shapes as PNG, on a background that is nearly white."""
    shade = rng.randint(235, 255)
    image = Image.new("RGB", (SIDE, SIDE), (shade, shade, shade))
    pen = ImageDraw.Draw(image)
    for shape in shapes:
        row, column = divmod(shape.place, 2)
        x, y = (CELL * at + CELL // 2 for at in (column, row))
        box, color = (x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS), COLORS[shape.color]
        if shape.kind == "circle":
            pen.ellipse(box, fill=color)
        elif shape.kind == "square":
            pen.rectangle(box, fill=color)
        elif shape.kind == "triangle":
            pen.polygon([(x, y - RADIUS), (x - RADIUS, y + RADIUS), (x + RADIUS, y + RADIUS)], fill=color)
        else:
            pen.rectangle((x - 1, y - RADIUS, x + 1, y + RADIUS), fill=color)
            pen.rectangle((x - RADIUS, y - 1, x + RADIUS, y + 1), fill=color)
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def as_answer(words: str) -> str:
    """Return words as an answer is written: `Top left.`"""
    return f"{words[0].upper()}{words[1:]}."


def questions_on(shapes: list[Shape]) -> list[Question]:
    """Return all questions on a picture that have one answer."""
    made = []
    kinds = [shape.kind for shape in shapes]
    looks = [(shape.color, shape.kind) for shape in shapes]
    for shape in shapes:
        if kinds.count(shape.kind) == 1:
            made.append(_question(f"What color is the {shape.kind}?", "color", shape.color, tuple(COLORS)))
        if looks.count((shape.color, shape.kind)) == 1:
            text = f"Where is the {shape.color} {shape.kind}?"
            made.append(_question(text, "position", PLACES[shape.place], PLACES))
    made.append(_question("How many shapes are there?", "count", NUMBERS[len(shapes)], NUMBERS[1:]))
    return made


def _question(text: str, topic: str, answer: str, answers: tuple[str, ...]) -> Question:
    return Question(text, topic, as_answer(answer), tuple(as_answer(each) for each in answers if each != answer))


def draw_question(shapes: list[Shape], rng: random.Random) -> Question:
    """Draw a question on a picture, each topic as often as it can be asked."""
    asked = questions_on(shapes)
    topic = rng.choice(sorted({question.topic for question in asked}))
    return rng.choice([question for question in asked if question.topic == topic])


def describe(shapes: list[Shape]) -> str:
    """Return a true description of a picture."""
    return " ".join(f"A {shape.color} {shape.kind} is {PLACES[shape.place]}." for shape in shapes)


def all_texts() -> list[str]:
    """Return texts that hold every word of the language."""
    return [
        "Question: Answer: How many shapes are there? What color is the? Where is the? A is .",
        *(as_answer(each) for each in (*COLORS, *NUMBERS, *PLACES)),
        " ".join((*COLORS, *SHAPES, *PLACES, *VERDICTS)),
    ]
