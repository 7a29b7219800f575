"""
The page on which people answer questions: the web application of a [`~rlhf_trl.labels.queue.Queue`].

A page is a form that works without scripts; `page/page.js` adds the keys, and sends an answer again until the server
has it. Each question has a key, so that an answer which arrives twice, from a second tab or after the server was
killed, is saved once. Everything that comes from models and people is escaped, and the browser runs no script but
ours.
"""

import hashlib
import ipaddress
import math
import secrets
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import parse_qs, urlencode, urlsplit

from fastapi import Depends, FastAPI, Request
from fastapi.responses import FileResponse, HTMLResponse, PlainTextResponse, RedirectResponse, Response
from markdown_it import MarkdownIt
from markupsafe import Markup

from rlhf_trl.data.messages import as_text
from rlhf_trl.data.rows import RowError
from rlhf_trl.errors import ConfigError
from rlhf_trl.labels.agreement import agreement, quality
from rlhf_trl.labels.queue import Queue
from rlhf_trl.labels.store import Label, LabelStore, now
from rlhf_trl.labels.tasks import Task
from rlhf_trl.report.templates import html_templates

PAGES = Path(__file__).parent / "page"
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
    ),
    "Cache-Control": "no-store",
    # Not `no-referrer`, with which browsers hide the origin of a form
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}
LONGEST_NAME = 64
# Notes above a question, by what the address says
NOTES = {
    "twice": "That question was answered before, in another tab. The first answer counts; Backspace takes it back.",
    "back": "Your last answer was taken back. Here is its question again.",
    "nothing": "There is no answer of yours to take back.",
    "edited": "The edited answer was saved.",
    "gone": "That question is not asked any more.",
}
CONFIDENCES = (("a guess", 0.5), ("fairly sure", 0.75), ("sure", 1.0))


@dataclass(frozen=True, kw_only=True)
class PageOptions:
    """
    Options of the page.

    Args:
        labelers (`Sequence[str]`, *optional*): names that labelers may have; `None`: any.
        guidelines (`str`): Markdown.
        scale (`tuple[int, int]`): lowest and highest rating, whole numbers from 0 to 9.
        attributes (`Sequence[str]`): what is rated of each candidate; none: the candidate as a whole.
        both_bad (`bool`): whether a pair may be answered with "both are bad", which is no tie.
        confidence (`bool`): whether labelers are asked how sure they are.
        edits (`bool`): whether labelers may also save a better version of an answer.
        skip_reasons (`Sequence[str]`): reasons to choose from.
        hosts (`Sequence[str]`): names under which the page is opened, beside those of this machine.
    """

    labelers: Sequence[str] | None = None
    guidelines: str = ""
    scale: Sequence[int] = (1, 5)
    attributes: Sequence[str] = ()
    both_bad: bool = True
    confidence: bool = False
    edits: bool = True
    skip_reasons: Sequence[str] = field(default_factory=list)
    hosts: Sequence[str] = ()


class Refused(Exception):
    """An answer that can't be saved. The message says why."""


class LabelingApp:
    """
    The state behind the page: questions, labels and their file. One thread at a time works on it.

    Args:
        queue ([`~rlhf_trl.labels.queue.Queue`]): the questions.
        store ([`~rlhf_trl.labels.store.LabelStore`]): the file of labels.
        options ([`PageOptions`]): options of the page.
        token (`str`): token that opens the page.
        on_change (`Callable`): called after each label, with whether all is answered.
    """

    def __init__(
        self,
        queue: Queue,
        store: LabelStore,
        options: PageOptions,
        token: str,
        on_change: Callable[[bool], None] = lambda filled: None,
    ):
        self.queue, self.store, self.options, self.token, self.on_change = queue, store, options, token, on_change
        self.lock = threading.Lock()
        environment = html_templates(PAGES)
        self.question_page = environment.get_template("question.html.jinja")
        self.quality_page = environment.get_template("quality.html.jinja")
        self.locked = environment.get_template("locked.html.jinja").render()
        # Raw HTML in the guidelines is shown, not run
        rendered = MarkdownIt("commonmark", {"html": False}).enable("table").render(options.guidelines)
        self.guidelines = Markup(rendered)
        self.cookie = f"rlhf_trl_{hashlib.sha256(token.encode()).hexdigest()[:8]}"

    # ---- Answers ----

    def answer(self, labeler: str, form: dict[str, str]) -> str | None:
        """
        Save an answer, or a skip, once.

        Args:
            labeler (`str`): who answers.
            form (`dict`): fields of the page: `task`, the answer by place (`choice`; `rank_0`, ...; `rating_0`, ... or
                `rating_0_1`, the second attribute of the first one; `text`) or `skip` and `other`, `seconds`,
                `confidence`.

        Returns:
            `str`, *optional*: key of a note to show.

        Raises:
            [`Refused`]: if it is no answer.
        """
        with self.lock:
            task = self.queue.find(form.get("task", ""))
            if task is None:
                return "gone"
            order = self.queue.order(task, labeler)
            skipped = (form.get("other", "").strip() or form["skip"].strip()) if "skip" in form else None
            if skipped == "":
                raise Refused("Give a reason for skipping the question.")
            label = self._label(
                task,
                labeler,
                form,
                order=order,
                answer=None if skipped else self._read(task, order, form),
                skipped=skipped,
            )
            if self.queue.times_answered(labeler, task.unit) > task.turn:
                earlier = [each for each in self.queue.mine[labeler] if each.key == task.unit][task.turn]
                same = (earlier.answer, earlier.skipped) == (label.answer, label.skipped)
                return None if same else "twice"
            self._save(label)
        return None

    def edit(self, labeler: str, form: dict[str, str]) -> str | None:
        """Save a better version of one of the answers that are shown, and stay at the question; see [`answer`]."""
        with self.lock:
            task = self.queue.find(form.get("task", ""))
            if task is None:
                return "gone"
            order = self.queue.order(task, labeler)
            place = form.get("place", "")
            if not (place.isdecimal() and int(place) < len(order)):
                raise Refused("Choose the answer that you edit.")
            candidate = order[int(place)]
            text = _newlines(form.get("text", ""))
            if text.strip() == editable(task.row.candidates[candidate].completion).strip() or not text.strip():
                raise Refused("The text is empty or as it was. Change it, or leave with Escape.")
            edit = Task(task.row, (candidate,), "edit")
            label = self._label(edit, labeler, form, order=[candidate], answer=text, skipped=None)
            mine = [each for each in self.queue.mine.get(labeler, []) if each.key == edit.unit]
            if not mine or mine[-1].answer != text:
                self._save(label)
        return "edited"

    def take_back(self, labeler: str, form: dict[str, str]) -> str:
        """Withdraw the last label of a labeler, if it is still the one that the page had in mind."""
        with self.lock:
            last = self.queue.last(labeler)
            if last is None:
                return "nothing"
            if form.get("last") in (None, "", last.time):
                self.store.append(last.withdrawal())
                self.queue.remove(last)
                self.on_change(self.queue.is_filled)
        return "back"

    def _save(self, label: Label) -> None:
        self.store.append(label)  # first: what isn't on the disk hasn't been answered
        self.queue.add(label)
        self.on_change(self.queue.is_filled)

    def _label(self, task: Task, labeler: str, form: dict[str, str], order: list[int], answer, skipped) -> Label:
        try:
            return Label(
                id=task.row.id,
                question=list(task.question),
                form=task.form,
                order=order,
                answer=answer,
                labeler=labeler,
                time=now(),
                seconds=_number(form.get("seconds")),
                confidence=_number(form.get("confidence")) if self.options.confidence and answer is not None else None,
                skipped=skipped,
            )
        except RowError as error:
            raise Refused(f"{error.field} {error.what}.") from error

    def _read(self, task: Task, order: list[int], form: dict[str, str]) -> Any:
        """Return the answer in the order of the question from the fields, which are in the order shown."""
        places = [order.index(candidate) for candidate in task.question]
        if task.form == "pair":
            choice = form.get("choice")
            if choice in ("1", "2"):
                return list(task.question).index(order[int(choice) - 1])
            if choice == "0" or (choice == "both_bad" and self.options.both_bad):
                return "tie" if choice == "0" else "both_bad"
            raise Refused("Choose an answer first: 1, 2, or 0 for a tie.")
        if task.form == "edit":
            text = _newlines(form.get("text", ""))
            if not text.strip():
                raise Refused("The text is empty.")
            if text.strip() == editable(task.row.candidates[task.question[0]].completion).strip():
                raise Refused("The text is as it was. Change it, or skip the question.")
            return text
        if task.form == "ranking":
            given = [_whole(form.get(f"rank_{place}"), 1, len(order)) for place in places]
            ranks = [rank for rank in given if rank is not None]
            if len(ranks) < len(given):
                raise Refused(f"Give each answer a rank from 1, the best, to {len(order)}. Equal ranks are ties.")
            # Ranks 2, 2, 3 are 1, 1, 3: what counts is what is before what
            return [1 + sum(other < rank for other in ranks) for rank in ranks]
        return [self._rating(place, form) for place in places]

    def _rating(self, place: int, form: dict[str, str]) -> int | dict[str, int]:
        low, high = self.options.scale
        names = self.options.attributes
        keys = [f"rating_{place}_{n}" for n in range(len(names))] or [f"rating_{place}"]
        numbers = [_whole(form.get(key), low, high) for key in keys]
        given = [number for number in numbers if number is not None]
        if len(given) < len(keys):
            raise Refused(f"Rate everything from {low} to {high}.")
        return dict(zip(names, given, strict=True)) if names else given[0]

    # ---- Pages ----

    def question(self, labeler: str, note: str | None = None, problem: str | None = None) -> str:
        """Return the page with the next question of a labeler."""
        with self.lock:
            task = self.queue.next(labeler)
            order = self.queue.order(task, labeler) if task else []
            last = self.queue.last(labeler)
            progress, filled = self.queue.progress(labeler), self.queue.is_filled
        low, high = self.options.scale
        return self.question_page.render(
            labeler=labeler,
            known_labelers=self.options.labelers,
            task=task,
            prompt=turns(task.row.prompt, "user") if task else [],
            answers=[
                {"turns": turns(completion, "assistant"), "text": editable(completion)}
                for completion in (task.row.candidates[i].completion for i in order if task)
            ],
            letters="ABCDEFGHIJKLMNOPQRSTUVWXYZ",
            scale=range(low, high + 1),
            options=self.options,
            confidences=CONFIDENCES,
            guidelines=self.guidelines,
            progress=progress,
            filled=filled,
            last=last.time if last else None,
            note=NOTES.get(note or ""),
            problem=problem,
        )

    def name_form(self, problem: str | None = None) -> str:
        """Return the page that asks for the labeler's name."""
        return self.question_page.render(
            labeler=None,
            known_labelers=self.options.labelers,
            guidelines=self.guidelines,
            problem=problem,
            options=self.options,
            task=None,
        )

    def quality(self) -> str:
        """Return the page with the labelers' agreement and quality."""
        with self.lock:
            labels, progress = list(self.queue.labels), self.queue.progress("")
        found = agreement(labels, self.queue.form)
        return self.quality_page.render(
            form=self.queue.form,
            agreement=found,
            quality=quality([label for label in labels if label.form == self.queue.form], self.queue.gold),
            progress=progress,
            share=_share,
            number=_shown,
        )

    def name_problem(self, labeler: str) -> str | None:
        """Return why a name can't be a labeler's, `None` if it can."""
        if not labeler.isprintable() or len(labeler) > LONGEST_NAME:
            return f"A name has {LONGEST_NAME} characters at most, on one line."
        if self.options.labelers is not None and labeler not in self.options.labelers:
            return f"“{labeler}” is not one of the labelers: {', '.join(self.options.labelers)}."
        return None


async def _fields(request: Request) -> dict[str, str]:
    """Return the fields of a form."""
    parsed = parse_qs((await request.body()).decode(errors="replace"), keep_blank_values=True)
    return {name: values[-1] for name, values in parsed.items()}


Fields = Annotated[dict[str, str], Depends(_fields)]


def application(app: LabelingApp) -> FastAPI:
    """Return the web application of a page."""
    web = FastAPI(title="rlhf_trl: labels", docs_url=None, redoc_url=None, openapi_url=None)

    @web.middleware("http")
    async def guard(request: Request, call_next):
        if foreign := foreign_request(request.method, request.headers, app.options.hosts):
            response: Response = PlainTextResponse(foreign, 403)
        else:
            response = await call_next(request) if _may_enter(app, request) else HTMLResponse(app.locked, 401)
        response.headers.update(HEADERS)
        return response

    @web.get("/")
    def page(labeler: str = "", token: str | None = None, note: str | None = None) -> Response:
        name = labeler.strip()
        if token is not None:  # out of the address, which people copy
            response: Response = RedirectResponse(_address(name), 303)
            response.set_cookie(app.cookie, token, httponly=True, samesite="strict", max_age=30 * 86400)
            return response
        if not name or (problem := app.name_problem(name)):
            return HTMLResponse(app.name_form(problem if name else None))
        return HTMLResponse(app.question(name, note))

    def after(labeler: str, act: Callable[[str, dict[str, str]], str | None], form: dict[str, str]) -> Response:
        name = labeler.strip()
        if not name or (problem := app.name_problem(name)):
            return HTMLResponse(app.name_form(problem if name else None), 422)
        try:
            note = act(name, form)
        except Refused as error:
            return HTMLResponse(app.question(name, problem=str(error)), 422)
        except ConfigError as error:  # the disk is full: the page must not move on
            return HTMLResponse(app.question(name, problem=str(error)), 507)
        return RedirectResponse(_address(name, note), 303)

    @web.post("/answer")
    def answer(form: Fields, labeler: str = "") -> Response:
        return after(labeler, app.answer, form)

    @web.post("/edit")
    def edit(form: Fields, labeler: str = "") -> Response:
        return after(labeler, app.edit, form)

    @web.post("/undo")
    def undo(form: Fields, labeler: str = "") -> Response:
        return after(labeler, app.take_back, form)

    @web.get("/quality")
    def quality_of_labels() -> Response:
        return HTMLResponse(app.quality())

    @web.get("/page.css")
    def style() -> Response:
        return FileResponse(PAGES / "page.css", media_type="text/css")

    @web.get("/page.js")
    def script() -> Response:
        return FileResponse(PAGES / "page.js", media_type="text/javascript")

    return web


def foreign_request(method: str, headers: Mapping[str, str], hosts: Sequence[str]) -> str | None:
    """
    Return why a request is not of this page's own, or `None`. A page of another port of this machine has the cookie
    too, and a name of somebody else may lead here.

    Args:
        method (`str`), headers (`Mapping[str, str]`): of the request.
        hosts (`Sequence[str]`): names of the page, beside addresses and the names of this machine.
    """
    host = headers.get("host", "")
    name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
    if not _is_own_name(name, hosts):
        return f"The page is not served as {name!r}. If that is its name: 'labeler.hosts=[{name}]'.\n"
    # https://www.w3.org/TR/fetch-metadata; links and typed addresses may lead here, nothing else from elsewhere
    is_link = method == "GET" and headers.get("sec-fetch-mode") == "navigate"
    is_link &= headers.get("sec-fetch-dest") == "document"
    if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and not is_link:
        return "The request is of another page.\n"
    origin = headers.get("origin")
    if method != "GET" and origin is not None and urlsplit(origin).netloc != host:
        return f"The request is of another page, {origin}. Let a proxy pass the header `Host` on.\n"
    return None


def _is_own_name(name: str, hosts: Sequence[str]) -> bool:
    """Return whether the page may be opened under a name; an address is never somebody else's name."""
    with suppress(ValueError):
        return bool(ipaddress.ip_address(name))
    machine = socket.gethostname().lower()
    own = {"localhost", machine, machine.partition(".")[0], f"{machine.partition('.')[0]}.local"}
    return name in own | {host.lower() for host in hosts} or name.endswith(".localhost")


def _may_enter(app: LabelingApp, request: Request) -> bool:
    """Return whether a request has the token, in its address or in the cookie that an earlier one left."""
    given = request.query_params.get("token") or request.cookies.get(app.cookie) or ""
    return secrets.compare_digest(given.encode(), app.token.encode()) or request.url.path == "/page.css"


def _address(labeler: str, note: str | None = None) -> str:
    """Return the address of a labeler's page, relative to the request's, so that a proxy may stand before it."""
    query = {"labeler": labeler} | ({"note": note} if note else {})
    return f"./?{urlencode(query)}" if labeler else "./"


def turns(value: str | list[dict[str, Any]], role: str) -> list[tuple[str, str]]:
    """Return a prompt or a completion as turns of a chat: roles and texts. A text is a turn of `role`."""
    if isinstance(value, str):
        return [(role, value)]
    return [(str(turn["role"]), as_text([{**turn, "role": "assistant"}])) for turn in value]


def editable(completion: str | list[dict[str, Any]]) -> str:
    """Return the text of a completion that an edit replaces: that of its last turn."""
    return turns(completion, "assistant")[-1][1]


def _newlines(text: str) -> str:
    """Return a text with the line ends that it was shown with: a browser sends others."""
    return text.replace("\r\n", "\n")


def _number(text: str | None) -> float | None:
    try:
        number = float(text or "nan")
    except ValueError:
        return None
    return number if math.isfinite(number) and number >= 0 else None


def _whole(text: str | None, low: int, high: int) -> int | None:
    """Return a whole number of a range, `None` for anything else."""
    return int(text) if text and text.isdecimal() and len(text) < 5 and low <= int(text) <= high else None


def _shown(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2f}"


def _share(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.0%}"
