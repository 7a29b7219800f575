"""
Pages of results as data: sections of a few kinds of blocks, written as HTML and as text.

The HTML is one file without scripts, fonts or pictures from elsewhere: it can be mailed, and reads on a phone, in dark
mode and on paper. Everything but the SVG of a [`Figure`] is escaped, so that no model's text can become markup.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rlhf_trl.config.shareable import hide_secrets
from rlhf_trl.report.plots import Drawing
from rlhf_trl.report.templates import html_templates
from rlhf_trl.report.text import FORBIDDEN, WIDTH, side_by_side
from rlhf_trl.runs.record import replacing

TEMPLATES = Path(__file__).parent
IMAGE = re.compile(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/=]+\Z")
NUMBER = re.compile(r"\s*[-+±−]?\.?\d")


@dataclass(frozen=True)
class Text:
    """Paragraphs, apart by an empty line."""

    text: str
    kind = "text"


@dataclass(frozen=True)
class Missing:
    """A measure that is missing, and how to get it."""

    text: str
    kind = "missing"


@dataclass(frozen=True)
class Table:
    """
    A table of strings. A column whose cells are all numbers (or empty) is aligned to the right.

    Args:
        headers (`Sequence[str]`), rows (`Sequence[Sequence[str]]`):
            Cells; what isn't a string is turned into one, `None` into an empty cell.
        caption (`str`):
            What it shows, in a sentence.
        marked (`Sequence[int]`):
            Rows to set off, and in text to put a `*` behind.
        note (`str`):
            What the reader must know about it, below.
    """

    headers: Sequence[str]
    rows: Sequence[Sequence]
    caption: str = ""
    marked: Sequence[int] = ()
    note: str = ""
    kind = "table"

    @property
    def cells(self) -> list[list[str]]:
        """The rows as strings."""
        return [["" if cell is None else str(cell) for cell in row] for row in self.rows]

    @property
    def numeric(self) -> list[bool]:
        """The columns that are aligned to the right."""
        columns = zip(*self.cells, strict=True) if self.rows else [()] * len(self.headers)
        return [any(column) and all(not cell or NUMBER.match(cell) for cell in column) for column in columns]


@dataclass(frozen=True)
class Figure:
    """
    A picture.

    Args:
        svg (`Drawing`):
            From `rlhf_trl.report.plots`; the one thing that isn't escaped.
        caption (`str`):
            What to see in it.
        wide (`bool`):
            Over the whole width; two that aren't stand side by side where there is room.
    """

    svg: Drawing
    caption: str
    wide: bool = False
    kind = "figure"


@dataclass(frozen=True)
class SideBySide:
    """
    A prompt and what each policy wrote.

    Args:
        prompt (`str`):
            Text.
        answers (`dict[str, str]`):
            Heading and text of each.
        note (`str`):
            Beside the prompt.
        images (`Sequence[str]`):
            Under the prompt: data URIs, see [`~rlhf_trl.data.multimodal.thumbnail`].
    """

    prompt: str
    answers: dict[str, str]
    note: str = ""
    images: Sequence[str] = ()
    kind = "side_by_side"

    def __post_init__(self):
        if strange := [image for image in self.images if not IMAGE.match(image)]:
            raise ValueError(f"an image is {strange[0][:40]!r}, where a data URI of a PNG or JPEG should be")


@dataclass(frozen=True)
class Code:
    """A command or a config, shown without secrets. `report.md` doesn't have it."""

    text: str
    kind = "code"

    @property
    def shown(self) -> str:
        """Text of the page."""
        return hide_secrets(self.text)


@dataclass(frozen=True)
class Details:
    """Blocks that open by a click; on paper they are open."""

    summary: str
    blocks: Sequence
    kind = "details"


@dataclass(frozen=True)
class Section:
    """Blocks under a heading."""

    title: str
    blocks: Sequence
    kind = "section"

    @property
    def anchor(self) -> str:
        """The heading as the end of an address."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


@dataclass(frozen=True)
class Page:
    """
    The whole page.

    Args:
        title (`str`):
            Its heading.
        lead (`str`):
            The result in a sentence or two, in large letters.
        sections (`Sequence[Section]`):
            In order.
        kicker (`str`):
            A few words above the heading: what kind of page it is.
        facts (`dict[str, str]`):
            A few numbers with their names, under the lead.
        setup (`dict[str, str]`):
            What was measured and how, in small letters under the numbers.
        footer (`str`):
            When and by what it was made.
    """

    title: str
    lead: str
    sections: Sequence[Section]
    kicker: str = ""
    facts: dict[str, str] = field(default_factory=dict)
    footer: str = ""
    setup: dict[str, str] = field(default_factory=dict)

    def figures(self) -> dict[str, Drawing]:
        """Return the drawings of the sections by name, `report/{title}`, for loggers."""
        figures = [block.svg for section in self.sections for block in section.blocks if isinstance(block, Figure)]
        return {f"report/{figure.title}": figure for figure in figures}


def write_page(page: Page, folder: str | os.PathLike) -> Path:
    """Write `index.html` and `report.md` into a folder, created if missing; return the path of the HTML file."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("report.md", to_markdown(page)), ("index.html", to_html(page))):
        with replacing(folder / name) as file:  # a reader sees the old page or the new one
            file.write(content)
    return folder / "index.html"


def to_html(page: Page) -> str:
    """Return the page as one HTML file. Text between backticks is shown as code, but not in prompts and answers."""
    return _writable(html_templates(TEMPLATES).get_template("page.html.jinja").render(page=page))


def to_markdown(page: Page) -> str:
    """Return the page's texts and tables as Markdown for a terminal; figures and code are in the HTML only."""
    parts = [f"# {_line(page.title)}", page.lead]
    if page.facts:
        parts.append("\n".join(f"- {name}: {value}" for name, value in page.facts.items()))
    parts.append("\n".join(f"- {name}: {_line(text)}" for name, text in page.setup.items()))
    for section in page.sections:
        parts += [f"## {_line(section.title)}", *_blocks(section.blocks)]
    return _writable("\n\n".join(filter(None, [*parts, page.footer])) + "\n")


def _blocks(blocks: Sequence) -> list[str]:
    return [text for block in blocks if (text := _MARKDOWN[block.kind](block))]


def table_markdown(table: Table) -> str:
    """Return a table with its caption and note as Markdown."""
    rows = [[_line(cell).replace("|", "\\|") for cell in row] for row in [table.headers, *table.cells]]
    for i in table.marked:
        rows[i + 1][0] += " *"
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(table.headers))]
    rule = ["-" * (width - right) + ":" * right for width, right in zip(widths, table.numeric, strict=True)]
    lines = [
        "| "
        + " | ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, table.numeric, strict=True)
        )
        + " |"
        for row in [rows[0], rule, *rows[1:]]
    ]
    return "\n\n".join(filter(None, [table.caption, "\n".join(lines), table.note]))


def _answers(block: SideBySide) -> str:
    body = side_by_side(block.answers)
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", body + block.prompt)), 3)
    note = f"{block.note}\n\n" if block.note else ""
    return f"{note}{fence}\n{block.prompt}\n{'-' * WIDTH}\n{body}\n{fence}"


_MARKDOWN = {
    "text": lambda block: block.text,
    "missing": lambda block: f"> {_line(block.text)}",
    "table": table_markdown,
    "figure": lambda block: "",
    "code": lambda block: "",
    "side_by_side": _answers,
    "details": lambda block: (
        "\n\n".join([f"### {_line(block.summary)}", *body]) if (body := _blocks(block.blocks)) else ""
    ),
}


def _line(text: str) -> str:
    return " ".join(str(text).split())


def _writable(text: str) -> str:
    return FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", text)
