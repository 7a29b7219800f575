"""Output to a terminal: no control characters of others, and no message behind a progress bar."""

import io
import logging
import subprocess
import sys
import warnings

from tqdm import tqdm

from rlhf_trl.callbacks.progress import ProgressLine
from rlhf_trl.stages.chat import Stream
from rlhf_trl.terminal import AboveBars, close_bars, keep_output_above_bars, printable, say
from tests.helpers.tiny import make_tokenizer


def test_control_characters_are_shown_and_not_obeyed():
    wiped = "a\x1b[2Jb\rc\x07\x9b31m\u202ed\x00"
    assert printable(wiped) == r"a\x1b[2Jb\rc\x07\x9b31m\u202ed\x00"
    assert printable("a\tb\nc\u00e9 \u4f60 \U0001f600") == "a\tb\nc\u00e9 \u4f60 \U0001f600"


def test_a_streamed_answer_steers_no_terminal():
    out = io.StringIO()
    Stream(make_tokenizer(), out).on_finalized_text("a\x1b]0;title\x07", stream_end=True)
    assert out.getvalue() == r"a\x1b]0;title\x07" + "\n"


def test_a_line_of_metrics_steers_no_terminal(capsys):
    class State:
        is_world_process_zero, global_step, max_steps = True, 1, 2

    ProgressLine().on_log(None, State, None, logs={"loss": 1.0, "grad_norm": "\x1b[2J"})
    assert "\\x1b[2J" in capsys.readouterr().out


def test_messages_stand_on_a_line_of_their_own():
    close_bars()  # of earlier tests that ended in an error
    out = io.StringIO()
    bar = tqdm(total=2, file=out, delay=0, leave=True)
    handler = logging.StreamHandler(AboveBars(out))
    handler.emit(logging.LogRecord("name", logging.WARNING, "", 0, "a warning", None, None))
    assert "\ra warning\n" in out.getvalue()
    assert not bar.disable
    close_bars()
    assert out.getvalue().endswith("\n") and not tqdm._instances


def test_what_is_said_while_a_bar_stands_has_a_line_of_its_own(monkeypatch):
    close_bars()  # of other tests
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    say("no bar")
    bar = tqdm(total=2, file=out, delay=0, leave=True)
    say("a \x1b[2Jwarning")
    assert out.getvalue().startswith("no bar\n") and "\ra \\x1b[2Jwarning\n" in out.getvalue()
    assert not bar.disable
    close_bars()


def test_warnings_and_the_handlers_of_libraries_write_above_the_bars(monkeypatch):
    out, library = io.StringIO(), logging.getLogger("a_library")
    monkeypatch.setattr(sys, "stderr", out)
    handler = logging.StreamHandler()
    library.addHandler(handler)
    try:
        close_bars()  # of other tests
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            keep_output_above_bars()
            keep_output_above_bars()
            assert isinstance(handler.stream, AboveBars) and handler.stream.stream is out
            bar = tqdm(total=2, file=out, delay=0, leave=True)
            warnings.warn("Something is odd", UserWarning, stacklevel=1)
            library.warning("said")
            bar.close()
    finally:
        library.removeHandler(handler)
    assert "\rUserWarning: Something is odd (" in out.getvalue() and "\rsaid\n" in out.getvalue()


def test_bars_of_libraries_appear_late_and_leave_no_line():
    code = "import rlhf_trl.cli.main, tqdm\nbar = tqdm.tqdm(total=9)\nprint(bar.delay, bar.leave, bar.mininterval)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2.0", "False", "30.0"] and done.stderr == ""
