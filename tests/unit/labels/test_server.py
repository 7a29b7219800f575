"""The labeling page: what is asked, what is saved, and what a browser is shown."""

import html
import re
from urllib.parse import parse_qs, urlsplit

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("markdown_it")

from fastapi.testclient import TestClient

from rlhf_trl.errors import ConfigError
from rlhf_trl.labels.candidates import Candidate, Candidates
from rlhf_trl.labels.queue import Queue
from rlhf_trl.labels.server import LabelingApp, PageOptions, application
from rlhf_trl.labels.store import Label, LabelStore, read_rows

TOKEN = "0123456789abcdef"
ADDRESS = "http://127.0.0.1:8008"


def candidates(count: int = 4, size: int = 2, questions=None, **texts) -> list[Candidates]:
    return [
        Candidates(
            id=f"p{i}",
            prompt=texts.get("prompt", f"prompt {i}"),
            candidates=[Candidate(completion=texts.get("completion", f"answer {i}.{k}")) for k in range(size)],
            questions=questions or [tuple(range(size))],
        )
        for i in range(count)
    ]


class Page:
    """A labeler's browser."""

    def __init__(self, folder, rows, form="pair", name="ann", options=None, **queue):
        self.store = LabelStore(folder / "labels.jsonl")
        self.filled = []
        self.app = LabelingApp(
            Queue(rows, form, self.store.read(), **queue),
            self.store,
            PageOptions(skip_reasons=["I can't judge it", "It is broken"], **(options or {})),
            TOKEN,
            self.filled.append,
        )
        self.client = TestClient(application(self.app), base_url=ADDRESS, cookies={self.app.cookie: TOKEN})
        self.name = name

    def get(self) -> str:
        return self.client.get("/", params={"labeler": self.name}).text

    @property
    def task(self) -> str | None:
        """Key of the question that is shown."""
        found = re.search(r'name="task" value="([^"]*)"', self.get())
        return html.unescape(found[1]) if found else None

    def post(self, path="answer", task=None, name=None, **fields):
        data = {"task": task or self.task, **fields} if path != "undo" else fields
        return self.client.post(f"/{path}", params={"labeler": name or self.name}, data=data, follow_redirects=False)

    def place(self, text: str) -> int:
        """Return the place at which an answer stands on the page."""
        shown = re.findall(r'<article.*?<p class="text" dir="auto">(.*?)</p>', self.get(), re.S)
        return shown.index(text)


def note_of(response) -> str | None:
    return parse_qs(urlsplit(response.headers["location"]).query).get("note", [None])[0]


# ---- Forms ----


def test_a_pair_is_saved_in_the_order_of_the_question_and_as_it_was_shown(tmp_path):
    page = Page(tmp_path, candidates(40))
    orders = set()
    for i in range(40):
        better = page.place(f"answer {i}.1")
        assert page.post(choice=str(better + 1), seconds="2.5").status_code == 303
        label = page.store.read()[-1]
        assert (label.id, label.question, label.answer, label.seconds) == (f"p{i}", [0, 1], 1, 2.5)
        assert label.order == [1, 0] if better == 0 else [0, 1]
        assert label.labeler == "ann" and label.time
        orders.add(tuple(label.order))
    assert orders == {(0, 1), (1, 0)} and page.filled == [False] * 39 + [True]


@pytest.mark.parametrize("choice, answer", [("0", "tie"), ("both_bad", "both_bad")])
def test_a_tie_and_two_bad_ones_are_two_things(tmp_path, choice, answer):
    page = Page(tmp_path, candidates())
    page.post(choice=choice)
    assert page.store.read()[0].answer == answer
    assert (
        Page(tmp_path / "other", candidates(), options={"both_bad": False}).post(choice="both_bad").status_code == 422
    )


def test_ranks_go_to_the_answers_that_they_were_given_for(tmp_path):
    page = Page(tmp_path, candidates(1, size=3), "ranking")
    places = [page.place(f"answer 0.{k}") for k in range(3)]
    assert page.post(rank_0="1", rank_1="2").status_code == 422 and not page.store.read()
    assert page.post(rank_0="1", rank_1="2", rank_2="4").status_code == 422
    ranks = {f"rank_{places[0]}": "2", f"rank_{places[1]}": "1", f"rank_{places[2]}": "2"}
    assert page.post(**ranks).status_code == 303
    assert page.store.read()[0].answer == [2, 1, 2]


def test_ratings_as_a_whole_and_by_attribute(tmp_path):
    page = Page(tmp_path, candidates(1), "rating")
    places = [page.place(f"answer 0.{k}") for k in range(2)]
    assert page.post(**{f"rating_{places[0]}": "6", f"rating_{places[1]}": "1"}).status_code == 422
    page.post(**{f"rating_{places[0]}": "5", f"rating_{places[1]}": "1"})
    assert page.store.read()[0].answer == [5, 1]
    options = {"attributes": ["helpful", "honest"], "scale": (0, 9)}
    page = Page(tmp_path / "more", candidates(1), "rating", options=options)
    first = page.place("answer 0.0")
    fields = {f"rating_{first}_0": "9", f"rating_{first}_1": "0"}
    other = {f"rating_{1 - first}_0": "3", f"rating_{1 - first}_1": "4"}
    assert page.post(**fields).status_code == 422
    page.post(**fields, **other)
    assert page.store.read()[0].answer == [{"helpful": 9, "honest": 0}, {"helpful": 3, "honest": 4}]


def test_edits_as_the_form_and_beside_another_one(tmp_path):
    page = Page(tmp_path, candidates(2), "edit")
    assert page.post(text="answer 0.0").status_code == 422  # as it was
    page.post(text="a better\r\nanswer")
    label = page.store.read()[0]
    assert (label.form, label.question, label.answer) == ("edit", [0], "a better\nanswer")
    page = Page(tmp_path / "pair", candidates(2))
    task, place = page.task, page.place("answer 0.1")
    for _ in range(2):  # sent again, since the response was lost
        assert note_of(page.post("edit", place=str(place), text="better")) == "edited"
    assert page.post("edit", place="7", text="better").status_code == 422
    (label,) = page.store.read()
    assert (label.form, label.question, label.answer, page.task) == ("edit", [1], "better", task)
    assert 'name="place"' not in Page(tmp_path / "none", candidates(), options={"edits": False}).get()


def test_an_edit_of_a_chat_is_of_its_last_turn(tmp_path):
    chat = [
        {"role": "assistant", "content": "Hm."},
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "Yes."},
    ]
    page = Page(tmp_path, candidates(1, completion=chat, prompt=[{"role": "user", "content": "Hello"}]), "edit")
    assert re.search(r"<textarea[^>]*>\n*Yes\.</textarea>", page.get()) and "Hm." in page.get()


def test_a_skip_has_a_reason_and_is_asked_of_others_only(tmp_path):
    page = Page(tmp_path, candidates(2))
    first = page.task
    assert page.post(skip="").status_code == 422
    page.post(skip="It is broken")
    label = page.store.read()[0]
    assert (label.answer, label.skipped) == (None, "It is broken") and page.task != first
    page.post(skip="", other="in Danish")
    assert page.store.read()[1].skipped == "in Danish"
    assert page.task is None and "No question for you" in page.get() and page.filled == [False, False]
    page.name = "bob"
    assert page.task.startswith("p0")


def test_questions_that_all_named_labelers_skip_end_the_labeling(tmp_path):
    page = Page(tmp_path, candidates(2), labelers=["ann", "bob"])
    page.post(skip="It is broken")
    page.post(choice="1")
    assert page.filled == [False, False] and page.task is None and "No question for you" in page.get()
    page.name = "bob"
    assert page.task.startswith("p0")
    page.post(skip="It is broken")
    assert page.filled[-1] and "answered or skipped</h1>" in page.get()
    page.post("undo")
    assert not page.filled[-1] and page.task.startswith("p0")


def test_confidence_is_saved_where_it_is_asked_for(tmp_path):
    page = Page(tmp_path, candidates(2), options={"confidence": True})
    assert "How sure are you?" in page.get()
    page.post(choice="1", confidence="0.75")
    page.post(choice="1")
    assert [label.confidence for label in page.store.read()] == [0.75, None]


# ---- Once, and only once ----


def test_an_answer_that_arrives_twice_is_saved_once(tmp_path):
    page = Page(tmp_path, candidates())
    task = page.task
    assert note_of(page.post(task=task, choice="1")) is None
    assert note_of(page.post(task=task, choice="1")) is None  # the response was lost
    assert note_of(page.post(task=task, choice="2")) == "twice"  # another tab had it open
    assert len(page.store.read()) == 1
    assert note_of(page.post(task="p9|0-1|0", choice="2")) == "gone"
    assert note_of(page.post(task="nonsense", choice="2")) == "gone"


def test_a_restarted_server_asks_what_is_open_and_takes_what_was_on_its_way(tmp_path):
    page = Page(tmp_path, candidates())
    page.post(choice="1")
    task, order = page.task, page.get()
    again = Page(tmp_path, candidates())
    assert again.task == task and again.get() == order  # the same order of the answers, too
    again.post(task=task, choice="2")
    once_more = Page(tmp_path, candidates())
    once_more.post(task=task, choice="2")
    assert [label.id for label in once_more.store.read()] == ["p0", "p1"]


def test_the_last_answer_is_taken_back_once_and_asked_again(tmp_path):
    page = Page(tmp_path, candidates(3))
    page.post(choice="1")
    page.post(choice="2")
    last = re.search(r'name="last" value="([^"]*)"', page.get())[1]
    assert note_of(page.post("undo", last=html.unescape(last))) == "back"
    page.post("undo", last=html.unescape(last))  # a second tab
    assert [label.id for label in page.store.read()] == ["p0"] and page.task.startswith("p1|")
    assert len(read_rows(page.store.path)) == 3  # nothing is deleted
    page.post(choice="0")
    assert [label.answer for label in page.store.read()][1] == "tie"
    assert note_of(page.post("undo", name="bob")) == "nothing"


def test_the_last_answer_of_all_can_be_taken_back(tmp_path):
    page = Page(tmp_path, candidates(1))
    page.post(choice="1")
    assert page.task is None and "All 1 answers are given" in page.get() and 'id="undo"' in page.get()
    page.post("undo")
    assert page.filled == [True, False] and page.task.startswith("p0")


def test_a_full_disk_is_said_and_the_question_stays(tmp_path, monkeypatch):
    page = Page(tmp_path, candidates())
    task = page.task

    def full(label):
        raise ConfigError("`labels.jsonl` can't be written: No space left on device.")

    monkeypatch.setattr(page.store, "append", full)
    response = page.post(choice="1")
    assert response.status_code == 507 and "No space left" in response.text and page.task == task
    assert "<code>labels.jsonl</code> can&#39;t be written" in response.text


# ---- Who ----


def test_two_labelers_share_the_questions_unless_both_are_to_answer(tmp_path):
    page = Page(tmp_path, candidates(2))
    assert page.task.startswith("p0")
    page.name = "bob"
    assert page.task.startswith("p1")
    page.name = "eve"
    assert page.task is None
    page = Page(tmp_path / "both", candidates(2), overlap=2)
    for name in ("ann", "bob"):
        page.name = name
        for _ in range(2):
            page.post(choice="1")
    assert len(page.store.read()) == 4 and page.app.queue.is_filled
    alphas = page.client.get("/quality").text
    assert "Krippendorff" in alphas and "ann, bob" in alphas


def test_a_budget_ends_the_labeling(tmp_path):
    page = Page(tmp_path, candidates(9), budget=2)
    page.post(choice="1")
    assert "<b>1</b> of 2 answers, 1 left" in page.get()
    page.name = "bob"
    assert page.task is None  # ann has the last one on her page
    page.name = "ann"
    page.post(choice="1")
    assert page.filled == [False, True] and page.task is None


def test_a_question_that_nobody_answers_becomes_free_again(tmp_path):
    now = [0.0]
    page = Page(tmp_path, candidates(1), clock=lambda: now[0])
    assert page.task.startswith("p0")
    page.name = "bob"
    assert page.task is None
    now[0] = 601.0
    assert page.task.startswith("p0")


def test_gold_questions_and_repeats_are_mixed_in_and_measured(tmp_path):
    gold = [Label(id="p0", question=[0, 1], form="pair", answer=1, labeler="expert")]
    page = Page(tmp_path, candidates(12), gold=gold, gold_every=3, repeat_every=6)
    asked = []
    for _ in range(13):
        asked.append(page.task)
        text = f"answer {re.search('p([0-9]+)', asked[-1])[1]}.1"
        page.post(choice=str(page.place(text) + 1))
    assert asked[3] == "p0|0-1|0" and [task for task in asked if task.endswith("|1")] == ["p1|0-1|1"]
    assert page.app.queue.is_filled and page.app.queue.done == 11
    assert "100% of 1" in page.client.get("/quality").text


def test_names_are_asked_for_and_checked(tmp_path):
    page = Page(tmp_path, candidates(), options={"labelers": ["ann", "bob"]})
    asked = page.client.get("/").text
    assert 'value="ann"' in asked and 'name="task"' not in asked
    for name in ("eve", "a" * 65, "a\nb"):
        page.name = name
        assert 'name="task"' not in page.get() and page.post(task="p0|0-1|0", choice="1").status_code == 422
    assert not page.store.read()


def test_the_page_is_locked_without_its_token(tmp_path):
    page = Page(tmp_path, candidates())
    stranger = TestClient(application(page.app), base_url=ADDRESS)
    assert stranger.get("/?labeler=eve").status_code == 401
    assert stranger.get("/?labeler=eve&token=wrong").status_code == 401
    answer = stranger.post("/answer?labeler=eve", data={"task": "p0|0-1|0", "choice": "1"})
    assert answer.status_code == 401 and not page.store.read() and stranger.get("/quality").status_code == 401
    first = stranger.get("/", params={"labeler": "eve", "token": TOKEN}, follow_redirects=False)
    cookie = first.headers["set-cookie"].lower()
    assert TOKEN not in first.headers["location"] and "httponly" in cookie and "samesite=strict" in cookie
    assert "prompt 0" in stranger.get("/?labeler=eve").text  # by the cookie
    assert page.client.get("/docs").status_code == 404


OWN = {"origin": ADDRESS, "sec-fetch-site": "same-origin", "sec-fetch-mode": "cors", "sec-fetch-dest": "empty"}
LINK = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://127.0.0.1:3000"},  # another page of this machine, whose requests have the cookie
        {"origin": "http://localhost:8008"},
        {"origin": "null"},  # a page that hides its own
        {"origin": ADDRESS, "host": "evil.example:8008"},  # a name of somebody else that leads here
        {"host": "evil.example"},
        {"sec-fetch-site": "same-site"},
        {"sec-fetch-site": "cross-site"},
        LINK,  # a form of another page
    ],
)
def test_another_page_can_not_answer(tmp_path, headers):
    page = Page(tmp_path, candidates())
    answer = {"data": {"task": page.task, "choice": "1"}, "params": {"labeler": "ann"}}
    for path in ("answer", "edit", "undo"):
        assert page.client.post(f"/{path}", **answer, headers=OWN | headers).status_code == 403
    assert not page.store.read()
    assert page.client.post("/answer", **answer, headers=OWN, follow_redirects=False).status_code == 303
    assert len(page.store.read()) == 1


def test_a_link_leads_to_the_page_and_nothing_else_of_another_page_does(tmp_path):
    page = Page(tmp_path, candidates(), options={"hosts": ["labels.example.org"]})
    assert page.client.get("/", params={"labeler": "ann"}, headers=LINK).status_code == 200
    framed = LINK | {"sec-fetch-dest": "iframe"}
    image = LINK | {"sec-fetch-mode": "no-cors", "sec-fetch-dest": "image"}
    for headers in (framed, image, {"host": "evil.example"}):  # which would reserve a question
        assert page.client.get("/", params={"labeler": "eve"}, headers=headers).status_code == 403
    assert "eve" not in page.app.queue.reserved
    for host in ("localhost:8008", "[::1]:8008", "10.0.0.7", "labels.example.org", "me.localhost:1"):
        assert page.client.get("/", params={"labeler": "ann"}, headers={"host": host}).status_code == 200
    assert "labeler.hosts=[evil.example]" in page.client.get("/", headers={"host": "evil.example"}).text


# ---- Texts ----

EVIL = '<script>alert(1)</script><img src=x onerror="alert(2)">"\'</textarea><script>alert(3)</script>'


@pytest.mark.parametrize("form", ["pair", "ranking", "rating", "edit"])
def test_a_text_never_becomes_markup(tmp_path, form):
    rows = candidates(1, prompt=EVIL, completion=EVIL)
    page = Page(
        tmp_path, rows, form, name=EVIL[:40], options={"attributes": [EVIL], "guidelines": f"**Be kind** {EVIL}"}
    )
    shown = page.get()
    assert "<b>" in shown and "<strong>Be kind</strong>" in shown
    assert re.findall(r"<script[^>]*>", shown) == ['<script src="page.js" defer>'] and "<img" not in shown
    assert shown.count("</textarea>") == shown.count("<textarea")
    response = page.client.get("/", params={"labeler": "ann", "note": EVIL})
    assert "alert" in response.text and re.findall(r"<script[^>]*>", response.text) == ['<script src="page.js" defer>']
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'self'" in policy and "unsafe" not in policy


def test_a_link_in_the_guidelines_runs_nothing(tmp_path):
    page = Page(
        tmp_path, candidates(), options={"guidelines": "[a](javascript:alert(1)) and [b](https://example.org)"}
    )
    assert 'href="javascript' not in page.get() and 'href="https://example.org"' in page.get()


def test_nothing_is_loaded_from_elsewhere(tmp_path):
    page = Page(tmp_path, candidates())
    texts = [
        page.get(),
        page.client.get("/quality").text,
        page.client.get("/page.css").text,
        page.client.get("/page.js").text,
    ]
    assert all(len(text) > 500 for text in texts) and not re.search(r"https?://|url\(", "".join(texts))


def test_a_chat_is_shown_turn_by_turn_and_text_keeps_its_lines(tmp_path):
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "two\n  lines"}]
    page = Page(tmp_path, candidates(1, prompt=prompt, completion=""))
    shown = page.get()
    assert shown.index("Be brief.") < shown.index("two\n  lines") and shown.count("(an empty answer)") == 2
    assert '<p class="role">system</p>' in shown


def test_questions_that_the_form_cannot_ask_are_named(tmp_path):
    with pytest.raises(ConfigError, match="p0.*\\[0, 1, 2\\].*stage.ask=ranking"):
        Page(tmp_path, candidates(1, size=3))
    with pytest.raises(ConfigError, match="nothing to ask"):
        Queue([Candidates(id="p", prompt="x", candidates=[Candidate(completion="y")])], "pair")
    stranger = Label(id="p9", question=[0, 1], form="pair", answer=1, labeler="expert")
    with pytest.raises(ConfigError, match="p9"):
        Queue(candidates(), "pair", gold=[stranger])
