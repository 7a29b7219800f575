"""Templates of HTML pages."""

import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

CODE = re.compile("`([^`]+)`")


def html_templates(folder: Path) -> Environment:
    """
    Return the templates in a folder, which escape what is filled in and refuse to leave a value out.

    Their filters: `prose` shows what stands between backticks as code; `breakable` does so too, and allows line breaks
    behind slashes, as in long names of metrics; `plain`, for attributes and titles, drops the backticks.
    """
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["prose"] = lambda text: _with_code(str(escape(text)))
    environment.filters["breakable"] = lambda text: _with_code(str(escape(text)).replace("/", "/<wbr>"))
    environment.filters["plain"] = lambda text: CODE.sub(r"\1", text)
    return environment


def _with_code(escaped: str) -> Markup:
    return Markup(CODE.sub(r"<code>\1</code>", escaped))
