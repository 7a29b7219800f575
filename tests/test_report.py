"""Pages of results: what is written, that it is safe and self-contained, and that a browser shows it."""

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

from rlhf_trl.report import Code, Details, Figure, Gap, Page, Section, SideBySide, Table, Text, plots, write_page
from rlhf_trl.report.page import to_html, to_markdown
from rlhf_trl.report.plots import Series

EVIL = "</p><script>alert(1)</script> | `a` \x00\ud800"


def page(*blocks, **options) -> Page:
    return Page("Title", "What came out.", [Section("A part", list(blocks))], **options)


def figures() -> list[str]:
    x = np.arange(5.0)
    points = [Series("best of n", x, x, x - 1, x + 1), Series("gold", [0, 1], [1, 2], [0, 1], [2, 3], line=False)]
    return [
        plots.curves([Series("train", x, x), Series("eval", x, [1, None, 2, 3, np.nan])], "curves", "step", "loss"),
        plots.frontier(points, "frontier", "KL", "reward", x_scale="sqrt"),
        plots.bars(["ppo", "dpo"], [0.6, 0.7], [0.5, 0.6], [0.7, 0.8], "bars", "wins", middle=0.5, form="{:.0%}"),
        plots.histogram({"sft": x, "ppo": x + 1, "none": [np.nan]}, "histogram", "reward"),
    ]


class Tags(HTMLParser):
    """What a browser would see as elements."""

    def __init__(self, html):
        super().__init__()
        self.found = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_a_page_escapes_what_models_write_and_fetches_nothing():
    blocks = [
        Text(EVIL),
        Gap(EVIL),
        Table([EVIL], [[EVIL]], EVIL, note=EVIL),
        SideBySide(EVIL, {EVIL: EVIL}, EVIL),
        Details(EVIL, [Code(EVIL)]),
        Figure(figures()[0], EVIL),
    ]
    html = to_html(Page(EVIL, EVIL, [Section(EVIL, blocks)], EVIL, {EVIL: EVIL}, EVIL))
    tags = Tags(html).found
    assert "script" not in {tag for tag, _ in tags} and html.count("&lt;script&gt;") > 10
    places = [value for _, attrs in tags for name, value in attrs.items() if name in ("src", "href", "xlink:href")]
    assert places and all(place.startswith(("#", "data:")) for place in places)
    assert "http" not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", html)
    assert "\x00" not in html and html.encode("utf-8")  # a half of a surrogate pair can't be written


def test_the_text_has_the_same_tables(tmp_path):
    table = Table(["policy", "reward", "KL"], [["sft", "1.5 [1, 2]", None], ["a|b", "-2", 0.25]], "All.", marked=[1])
    assert table.numeric == [False, True, True]
    path = write_page(
        page(table, Code("x: 1"), Gap("No reward model.\nType this."), facts={"prompts": "256"}), tmp_path
    )
    text = (tmp_path / "report.md").read_text()
    assert path.name == "index.html" and sorted(p.name for p in tmp_path.iterdir()) == ["index.html", "report.md"]
    assert "| a\\|b * |         -2 | 0.25 |" in text and "| ------ | ---------: | ---: |" in text
    assert "> No reward model. Type this." in text and "- prompts: 256" in text and "x: 1" not in text
    html = path.read_text()
    assert re.search(r'<td class="n">0.25</td>', html) and html.count('<tr class="marked">') == 1


def test_a_fence_is_longer_than_what_it_holds():
    text = to_markdown(page(SideBySide("Why ````?", {"sft": "so", "ppo": ""})))
    assert "`````\nWhy ````?" in text and "(empty)" in text


@pytest.mark.parametrize("place", range(4))
def test_figures_are_svg_in_the_colors_of_the_page(place):
    drawn = figures()[place]
    svgs = [part for part in re.split(r"(?=<svg )", drawn) if part.strip()]
    assert ['class="large-screen"' in svgs[0], 'class="small-screen"' in svgs[1]] == [True, True]
    for svg in svgs:
        root = ElementTree.fromstring(svg)  # well formed
        texts = ["".join(node.itertext()).strip() for node in root.iter("{http://www.w3.org/2000/svg}text")]
        assert any(text in texts for text in ("step", "KL", "wins", "reward"))
        assert "currentColor" in svg and "var(--c0" in svg and plots.INK not in svg and "DejaVu" not in svg
    assert figures()[place] == drawn  # nothing of a clock or of chance in it


def test_names_of_clip_paths_are_a_figures_own():
    names = [set(re.findall(r'clipPath id="([^"]+)"', drawn)) for drawn in figures()]
    assert all(names) and sum(map(len, names)) == len(set().union(*names))


def test_nothing_to_draw_is_drawn_empty():
    assert plots.histogram({"sft": [np.nan]}, "none", "reward").startswith("<svg")
    assert plots.curves([Series("loss", [1], [None])], "none", "step").startswith("<svg")
