"""People as labelers: a server of one page, until the answers that were asked for are given (`labeler=human`)."""

import contextlib
import ipaddress
import os
import secrets
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlencode

from rlhf_trl.errors import ConfigError
from rlhf_trl.hints import count_of
from rlhf_trl.labels.agreement import agreement
from rlhf_trl.labels.candidates import Candidates
from rlhf_trl.labels.options import human_problems, is_file_name
from rlhf_trl.labels.queue import Queue
from rlhf_trl.labels.store import LabelStore, read
from rlhf_trl.rewards.server import Guarded, bound_socket
from rlhf_trl.terminal import say

# Beside the labels. A server that is started again has the same token, so that pages that are open go on
TOKEN_FILE = ".label_token"


class HumanLabeler:
    """
    A page on which people answer the questions, see docs/labeling.md.

    Args:
        host (`str`), port (`int`): address to serve; port 0: any free one.
        labelers (`Sequence[str]`, *optional*): names that labelers may have.
        guidelines (`str`, *optional*): Markdown, or the path of a file that ends in `.md`.
        scale (`Sequence[int]`): lowest and highest rating.
        attributes (`Sequence[str]`): what is rated of each candidate; none: the candidate as a whole.
        both_bad (`bool`), confidence (`bool`), edits (`bool`), skip_reasons (`Sequence[str]`):
            what the page offers, see [`~rlhf_trl.labels.server.PageOptions`].
        gold (`str`, *optional*): file of labels with the known answers of some of the candidates.
        gold_every (`int`), repeat_every (`int`):
            a gold question, or an earlier question again, after each so many answers of a labeler; 0: never.
        hosts (`Sequence[str]`): names under which the page is opened, beside addresses and the names of this machine.
        linger (`float`): seconds between the last answer and the end of the server, in which it can be taken back.
    """

    def __init__(
        self,
        host: str,
        port: int,
        labelers: Sequence[str] | None,
        guidelines: str | None,
        scale: Sequence[int],
        attributes: Sequence[str],
        both_bad: bool,
        confidence: bool,
        edits: bool,
        skip_reasons: Sequence[str],
        gold: str | None,
        gold_every: int,
        repeat_every: int,
        linger: float,
        hosts: Sequence[str] = (),
    ):
        given = {
            "labelers": labelers,
            "attributes": attributes,
            "skip_reasons": skip_reasons,
            "scale": scale,
            "gold": gold,
            "hosts": hosts,
        }
        if problems := human_problems(given | {"guidelines": guidelines}):
            raise ConfigError.join(problems)
        self.host, self.port, self.linger = host, port, linger
        self.gold, self.gold_every, self.repeat_every = gold, gold_every, repeat_every
        self.labelers = labelers
        self.page = {
            "labelers": labelers,
            "guidelines": _guidelines(guidelines),
            "scale": scale,
            "attributes": attributes,
            "both_bad": both_bad,
            "confidence": confidence,
            "edits": edits,
            "skip_reasons": skip_reasons,
            "hosts": hosts,
        }

    def __call__(
        self,
        rows: Sequence[Candidates],
        store: LabelStore,
        form: str,
        budget: int | None = None,
        overlap: int = 1,
        seed: int = 0,
    ) -> bool:
        """
        Serve the page until every answer that was asked for is given, or until Ctrl-C.

        Args:
            rows (`Sequence[Candidates]`): candidates, with their questions.
            store ([`~rlhf_trl.labels.store.LabelStore`]): the file of labels; those in it count.
            form (`str`): pair, ranking, rating or edit.
            budget (`int`, *optional*): number of answers in all; `None`: `overlap` of each question.
            overlap (`int`): number of people who answer each question.
            seed (`int`): seeds the order of the answers.

        Returns:
            `bool`: whether all answers are given; of `labelers` that are named, those that they don't skip.

        Raises:
            [`~rlhf_trl.errors.ConfigError`]: if the port is taken, or there is nothing to ask.
        """
        import uvicorn

        from rlhf_trl.labels.server import LabelingApp, PageOptions, application

        queue = Queue(
            rows,
            form,
            store.read(),
            overlap=overlap,
            budget=budget,
            gold=read(self.gold) if self.gold else (),
            gold_every=self.gold_every,
            repeat_every=self.repeat_every,
            labelers=self.labelers,
            seed=seed,
        )
        if queue.is_filled:
            say(f"Nothing is left to ask: `{store.path}` has {queue.done:,} of {count_of(queue.total, 'answer')}.")
            return True
        token = _token(store.path.with_name(TOKEN_FILE))
        with bound_socket(self.host, self.port, "labeler") as listener:
            address, port = listener.getsockname()[:2]
            listener.listen()
            ending: list[threading.Timer] = []

            def on_change(filled: bool) -> None:
                for timer in ending:
                    timer.cancel()
                ending.clear()
                if filled:
                    ending.append(threading.Timer(self.linger, end))
                    ending[0].daemon = True
                    ending[0].start()

            def end() -> None:
                server.should_exit = True

            app = LabelingApp(queue, store, PageOptions(**self.page), token, on_change)
            config = uvicorn.Config(Guarded(application(app), None), log_level="warning", timeout_graceful_shutdown=2)
            server = uvicorn.Server(config)
            _announce(queue, address, port, token, self.labelers)
            with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again after its shutdown
                server.run(sockets=[listener])
            on_change(False)
        _sum_up(queue, store)
        return queue.is_filled


def _guidelines(text: str | None) -> str:
    if text is None or not is_file_name(text):
        return text or ""
    try:
        return Path(text.strip()).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"`labeler.guidelines` is `{text.strip()}`, which can't be read: {error}.") from error


def _token(file: Path) -> str:
    """Return the token of a file that only its owner can read; it is made if need be."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w", encoding="ascii") as opened:
            opened.write(secrets.token_urlsafe(16))
    token = file.read_text(encoding="ascii").strip()
    if len(token) < 16:  # its writer was killed
        file.unlink()
        return _token(file)
    return token


def _announce(queue: Queue, address: str, port: int, token: str, labelers: Sequence[str] | None) -> None:
    """Print where the page is, and how much there is to do."""
    wildcards = {"0.0.0.0": socket.gethostname(), "::": socket.gethostname()}
    host = wildcards.get(address, f"[{address}]" if ":" in address else address)
    say(
        f"{count_of(queue.total - queue.done, 'answer')} to give, of {count_of(len(queue.tasks), 'question')} "
        f"({queue.form}). Open the page; Ctrl-C ends the server, and nothing that was answered is lost:"
    )
    for name in labelers or [None]:
        query = {"token": token} | ({"labeler": name} if name else {})
        say(f"  http://{host}:{port}/?{urlencode(query)}")
    if not ipaddress.ip_address(address).is_loopback:
        say("It is open to other machines, unencrypted: whoever has the link can answer.")


def _sum_up(queue: Queue, store: LabelStore) -> None:
    """Print what was answered, by whom, and how well they agree."""
    names = [name for name, labels in queue.mine.items() if any(label.answer is not None for label in labels)]
    found = agreement(queue.labels, queue.form)
    alpha = f", Krippendorff's alpha {found.alpha:.2f} on {count_of(found.units, 'value')}" if found.units else ""
    people = f" by {count_of(len(names), 'labeler')}" if names else ""
    left = f"; {queue.total - queue.done:,} are left" if queue.done < queue.total else ""
    say(f"{count_of(queue.done, 'answer')} of {queue.total:,}{people}{alpha}{left}: {store.path}")
    if left and queue.mine and not queue.open_to(queue.mine):
        say(
            "  Whoever was here has answered or skipped each of those. "
            + (
                "They are left without an answer."
                if queue.is_filled
                else f"If nobody else comes, continue with `'labeler.labelers=[{','.join(queue.mine)}]'`, which ends "
                "the labeling."
            )
        )
