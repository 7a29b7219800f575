"""Labeling in a browser, by keyboard, while the server is killed."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf_trl.labels.store import read, read_rows
from rlhf_trl.runs.record import read_run
from tests.helpers.browser import PROGRAM, Browser, Page

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(PROGRAM is None, reason="no Chromium is installed")]


class Server:
    """`stage=label` in a folder, on a port that stays the same."""

    def __init__(self, folder: Path, *words: str):
        pytest.importorskip("fastapi")
        pytest.importorskip("markdown_it")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder, self.words = folder, [f"labeler.port={self.port}", "stage.candidates=candidates.jsonl", *words]

    def start(self, *more: str) -> str:
        """Start it, and return the address that it prints."""
        env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, str(ROOT / "train.py"), "stage=label", *self.words, *more]
        self.process = subprocess.Popen(
            command, cwd=self.folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        said = ""
        for line in self.process.stdout:
            said += line
            if found := re.search(r"http://\S+", line):
                return found[0]
        raise AssertionError(said)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture
def server(tmp_path):
    made = []

    def make(*words: str, rows: int = 60, completions=("red", "blue")) -> Server:
        lines = [
            {
                "id": f"p{i:02d}",
                "prompt": f"What color is thing {i}?",
                "candidates": [{"completion": f"Thing {i} is {color}."} for color in completions],
                "questions": [list(range(len(completions)))],
            }
            for i in range(rows)
        ]
        (tmp_path / "candidates.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        made.append(Server(tmp_path, *words))
        return made[-1]

    yield make
    for one in made:
        if one.process.poll() is None:
            one.kill()


def question(page: Page) -> str:
    return page.run("document.querySelector('[name=task]')?.value || ''")


def texts(page: Page) -> list[str]:
    return page.run("Array.from(document.querySelectorAll('article .text'), each => each.textContent)")


def test_sixty_pairs_by_keyboard_with_two_kills_lose_nothing_and_ask_nothing_twice(server, tmp_path):
    one = server("labeler.linger=0")
    address = one.start()
    asked, started = [], time.monotonic()
    with Browser() as browser:
        page = browser.open(f"{address}&labeler=ann")
        for i in range(60):
            before = question(page)
            asked.append(before)
            (place,) = [place for place, text in enumerate(texts(page)) if text.endswith("red.")]
            page.press(str(place + 1))
            if i == 20:  # killed before the answer: the page holds it
                one.kill()
                page.press("Enter")
                page.wait("document.querySelector('#status').textContent.includes(\"doesn't answer\")")
                assert len(read(tmp_path / "runs/default/label/labels.jsonl")) == 20
                one.start("resume=true")
            elif i == 40:  # killed as it arrives: saved or not, nobody knows
                page.press("Enter")
                one.kill()
                one.start("resume=true")
            else:
                page.press("Enter")
            done = "document.querySelector('h1').textContent.startsWith('All 60')"
            page.wait(done if i == 59 else f"document.querySelector('[name=task]')?.value !== {json.dumps(before)}")
    assert one.process.wait(timeout=60) == 0 and "60 answers of 60 by 1 labeler" in one.process.stdout.read()
    assert time.monotonic() - started < 300
    labels = read(tmp_path / "runs/default/label/labels.jsonl")
    assert [label.id for label in labels] == [f"p{i:02d}" for i in range(60)] and len(set(asked)) == 60
    assert {label.answer for label in labels} == {0}  # the red one, wherever it stood
    assert {tuple(label.order) for label in labels} == {(0, 1), (1, 0)} and all(label.seconds > 0 for label in labels)
    assert read_run(tmp_path / "runs/default/label").status == "done"


def test_the_keys_of_the_page(server, tmp_path):
    """Backspace, skip, edit, ranks and ratings by digits, and two tabs."""
    one = server("labeler.repeat_every=0", rows=6)
    address = one.start()
    labels = tmp_path / "runs/default/label/labels.jsonl"
    with Browser() as browser:
        page, other = (browser.open(f"{address}&labeler=ann") for _ in range(2))
        first = question(page)
        assert question(other) == first
        page.press("1", "Enter")
        page.wait(f"document.querySelector('[name=task]').value !== {json.dumps(first)}")
        other.press("2", "Enter")  # the same question in the other tab
        other.wait("document.querySelector('#status').textContent.includes('answered before')")
        assert len(read(labels)) == 1 and question(other) == question(page)
        page.press("Backspace")
        page.wait(f"document.querySelector('[name=task]').value === {json.dumps(first)}")
        assert read(labels) == [] and len(read_rows(labels)) == 2
        page.press("s", "2")
        page.wait(f"document.querySelector('[name=task]').value !== {json.dumps(first)}")
        assert read(labels)[0].skipped == "The prompt makes no sense"
        second = question(page)
        page.press("2", "e")
        page.run("document.activeElement.select()")
        for letter in "Both b1":  # b and 1 are letters here
            page.press(letter)
        page.run("document.activeElement.form.requestSubmit()")
        page.wait("document.querySelector('#status').textContent.includes('saved')")
        edit = read(labels)[-1]
        assert (edit.form, edit.answer, question(page)) == ("edit", "Both b1", second)
        assert page.run("document.querySelector('[name=choice]:checked').value") == "2"  # the choice is kept
        page.press("?")
        assert page.run("document.querySelector('#help').open")
        page.press("Escape", "b", "Enter")
        page.wait(f"document.querySelector('[name=task]').value !== {json.dumps(second)}")
        assert read(labels)[-1].answer == "both_bad"
    one.process.send_signal(signal.SIGINT)
    said = one.process.stdout.read()
    assert one.process.wait(timeout=60) == 130 and "1 answer of 6 by 1 labeler; 5 are left" in said, said
    assert "resume=true" in said and read_run(tmp_path / "runs/default/label").status == "stopped"


@pytest.mark.parametrize("ask", ["ranking", "rating"])
def test_ranks_and_ratings_by_digits(server, tmp_path, ask):
    one = server(f"stage.ask={ask}", "labeler.linger=0", rows=2, completions=("red", "blue", "green"))
    address = one.start()
    with Browser() as browser:
        page = browser.open(f"{address}&labeler=ann", width=390, height=800)
        wanted = {"red": "3", "blue": "1", "green": "3"}
        for i in range(2):
            before = question(page)
            page.press(*(wanted[text.rstrip(".").split()[-1]] for text in texts(page)))
            page.press("ArrowUp", "ArrowUp", "ArrowDown", "Enter")
            done = "document.querySelector('h1').textContent.startsWith('All 2')"
            page.wait(done if i else f"document.querySelector('[name=task]')?.value !== {json.dumps(before)}")
    assert one.process.wait(timeout=60) == 0
    assert [label.answer for label in read(tmp_path / "runs/default/label/labels.jsonl")] == (
        [[2, 1, 2]] * 2 if ask == "ranking" else [[3, 1, 3]] * 2
    )


def test_an_answer_with_a_script_in_it_runs_nothing_in_a_browser(server):
    evil = '<img src=x onerror="document.title=1"><script>document.title=1</script>'
    one = server(rows=1, completions=(evil, f"</textarea>{evil}"))
    address = one.start()
    with Browser() as browser:
        page = browser.open(f"{address}&labeler=ann")
        page.press("1", "e")
        assert page.run("document.title") == "Question 1" and page.run("document.querySelectorAll('img').length") == 0
        assert any(evil in text for text in texts(page))
