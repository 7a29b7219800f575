"""
Pictures of the labeling page for the documentation: `python -m tests.helpers.labeling_page [FOLDER]`.

Serves each form with a few answers, and writes what Chromium shows of it: by default docs/assets/labeling.png, a pair
in a wide window beside a ranking on a phone; with a folder every form, wide and on a phone, in light and dark.
"""

import socket
import sys
import tempfile
import threading
from pathlib import Path

import uvicorn
from PIL import Image

from rlhf_trl.labels.candidates import Candidate, Candidates
from rlhf_trl.labels.queue import Queue
from rlhf_trl.labels.server import LabelingApp, PageOptions, application
from rlhf_trl.labels.store import Label, LabelStore
from tests.helpers.browser import Browser

ASSETS = Path(__file__).parents[2] / "docs" / "assets"
TOKEN = "0123456789abcdef"
GUIDELINES = """Prefer the answer that a careful person would rather have got: **right first**, then clear, then short.

- A wrong fact outweighs a pleasant tone.
- Length alone is no merit.
"""
PROMPT = [{"role": "user", "content": "Why is the sky blue during the day, and red in the evening?"}]
ANSWERS = (
    "Air scatters sunlight, and blue far more than red, so blue reaches us from the whole sky. In the evening the "
    "light takes a longer way through the air: most of the blue is gone by the time it arrives, and red remains.",
    "The sky is blue because it reflects the oceans. In the evening the oceans are dark, so it's red.",
    "Blue light has a shorter wavelength.\n\n1. It is scattered more.\n2. Red is scattered less.",
    "Nobody knows.",
)
OPTIONS = {
    "pair": {"confidence": True},
    "ranking": {},
    "rating": {"attributes": ["helpful", "honest"]},
    "edit": {},
}
KEYS = {"pair": "2c", "ranking": "21", "rating": "45", "edit": ""}
SIZES = {"wide": (1100, 620), "phone": (390, 620)}


def serve(form: str, folder: Path) -> str:
    """Serve a form with some answers in this process, and return its address."""
    count = 4 if form == "ranking" else 2
    candidates = [Candidate(completion=[{"role": "assistant", "content": text}]) for text in ANSWERS[:count]]
    rows = [
        Candidates(id=f"p{i}", prompt=PROMPT, candidates=candidates, questions=[tuple(range(count))])
        for i in range(30)
    ]
    queue = Queue(rows, form, overlap=2)
    for i, (name, answer) in enumerate([("bob", 0), ("eve", 0), ("bob", 1), ("eve", 1), ("bob", 0), ("eve", "tie")]):
        if form == "pair":
            label = Label(id=f"p{i // 2}", question=[0, 1], form=form, order=[1, 0], answer=answer, labeler=name)
            queue.add(label)
    options = PageOptions(guidelines=GUIDELINES, skip_reasons=["I can't judge it", "It is broken"], **OPTIONS[form])
    app = application(LabelingApp(queue, LabelStore(folder / f"{form}.jsonl"), options, TOKEN))
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True).start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


def picture(browser: Browser, address: str, form: str, size: str, dark: bool, path: Path) -> None:
    """Write a picture of a form."""
    page = browser.open(f"{address}/?labeler=ann&token={TOKEN}", *SIZES[size], dark=dark)
    page.press(*KEYS[form])
    page.picture(path, whole=False)


def main(folder: str | None = None) -> None:
    with tempfile.TemporaryDirectory() as temporary, Browser() as browser:
        here = Path(temporary)
        addresses = {form: serve(form, here) for form in KEYS}
        if folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
            for form, address in addresses.items():
                for size in SIZES:
                    for dark in (False, True):
                        name = f"{form}_{size}_{'dark' if dark else 'light'}.png"
                        picture(browser, address, form, size, dark, Path(folder, name))
            return
        picture(browser, addresses["pair"], "pair", "wide", False, here / "wide.png")
        picture(browser, addresses["ranking"], "ranking", "phone", True, here / "phone.png")
        parts = [Image.open(here / name).convert("RGB") for name in ("wide.png", "phone.png")]
        whole = Image.new("RGB", (sum(part.width for part in parts) + 20, parts[0].height), "#888888")
        whole.paste(parts[0], (0, 0))
        whole.paste(parts[1], (parts[0].width + 20, 0))
        small = whole.quantize(64, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        small.save(ASSETS / "labeling.png", optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
