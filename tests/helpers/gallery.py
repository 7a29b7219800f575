"""
Pictures of the report for the documentation: `python -m tests.helpers.gallery runs/demo` after `make demo`.

Copies the page of a project's report to docs/assets/report.html, and writes pictures of parts of it, by Chromium,
to docs/assets/report*.png.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from html import unescape
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / "docs" / "assets"
WIDTH, COLORS = 1100, 128
# By picture: the heading where it begins (none: the top of the page), and its height at most, in pixels
PICTURES = {
    "report": (None, 872),
    "report_frontier": ("Reward and KL", 600),
    "report_wins": ("Wins", 620),
    "report_answers": ("Answers", 872),
    "report_training": ("Training", 2250),
}
# Writes the places of the headings into the page, where Chromium's dump has them
PROBE = """<script>document.addEventListener('DOMContentLoaded', () => {
const places = Array.from(document.querySelectorAll('h2'), h => [h.textContent.trim(), h.getBoundingClientRect().top + scrollY]);
document.body.setAttribute('data-places', JSON.stringify([...places, ['end', document.documentElement.scrollHeight]]));
});</script>"""  # noqa: E501


def chromium(*options: str) -> str:
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *options]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main(project: str) -> None:
    # commands as they are typed in a clone, wherever this one is
    text = Path(project, "report", "index.html").read_text(encoding="utf-8").replace(f"{ROOT}/", "")
    (ASSETS / "report.html").write_text(text, encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        probe, whole = Path(folder, "probe.html"), Path(folder, "whole.png")
        probe.write_text(text.replace("</head>", f"{PROBE}</head>"), encoding="utf-8")
        dumped = chromium(f"--window-size={WIDTH},800", "--dump-dom", probe.as_uri())
        places = dict(json.loads(unescape(re.search(r'data-places="([^"]*)"', dumped)[1])))
        chromium(f"--window-size={WIDTH},{round(places['end'])}", f"--screenshot={whole}", probe.as_uri())
        page = Image.open(whole).convert("RGB")
    tops = sorted(places.values())
    for name, (heading, height) in PICTURES.items():
        top = 0 if heading is None else round(places[heading]) - 24
        end = top + height if heading is None else min(top + height, round(min(x for x in tops if x > top + 48)) - 24)
        part = page.crop((0, top, WIDTH, end)).quantize(
            COLORS, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE
        )
        part.save(ASSETS / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
