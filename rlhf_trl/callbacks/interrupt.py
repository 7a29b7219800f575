"""
Graceful shutdown at Ctrl-C and at the signals of schedulers: the first one saves a checkpoint and stops.

`enable_jit_checkpoint` of transformers 5.23 doesn't fit: it knows SIGTERM alone, each rank saves at the step at which
its own signal arrives, also in the middle of a rollout, and the run then ends as if it were finished.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

from rlhf_trl.callbacks.base import SaveAndStop
from rlhf_trl.errors import PREEMPTIONS, Preempted
from rlhf_trl.runs.ranks import highest_of_ranks, is_main_process
from rlhf_trl.trainers.steps import steps_per_rollout

# Some senders signal twice: `timeout` first the process and then its group, launchers on top of the terminal
SECONDS_OF_ONE_PRESS = 1.0
# What the ranks agree on: the highest counts
NOTHING, INTERRUPTED, PREEMPTED = range(3)


@contextlib.contextmanager
def raising_preempted() -> Iterator[None]:
    """
    Raise [`~rlhf_trl.errors.Preempted`] where the process stands at a signal of a scheduler, unless [`Interrupt`]
    handles it: while models load, in the last evaluation, and in stages that train nothing.
    """
    process, previous, first = os.getpid(), {}, None

    def handle(number, frame):
        nonlocal first
        now = time.monotonic()
        if os.getpid() != process or (first is not None and now - first < SECONDS_OF_ONE_PRESS):
            return  # a worker that was forked, or the same press
        first = now
        if is_main_process():
            name = signal.Signals(number).name
            os.write(2, f"\nPreempted ({name}) outside of the training steps: what is saved stands.\n".encode())
        raise Preempted

    if threading.current_thread() is threading.main_thread():
        previous = {number: signal.signal(number, handle) for number in PREEMPTIONS}
    try:
        yield
    finally:
        _restore(previous)


@contextlib.contextmanager
def ignoring_signals() -> Iterator[None]:
    """
    Ignore Ctrl-C and the signals of schedulers, which send more than one, for the moment in which the end of a run is
    recorded: an unfinished record would be that of a run in progress.
    """
    previous = {}
    if threading.current_thread() is threading.main_thread():
        previous = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, *PREEMPTIONS)}
    try:
        yield
    finally:
        _restore(previous)


def _restore(previous: dict) -> None:
    while previous:
        signal.signal(*previous.popitem())


class Interrupt(SaveAndStop):
    """
    End a run at SIGINT (Ctrl-C) or at a signal of a scheduler (SIGTERM, SIGUSR1, SIGUSR2): after the step, or for
    trainers with rollouts after the last step on the current rollout, with a checkpoint. Ctrl-C after the first signal
    raises `KeyboardInterrupt` where the run stands, and so does SIGTERM after Ctrl-C. After a signal of a scheduler
    others of its kind change nothing: they are sent several times. SIGHUP (the terminal is gone) counts as a first
    signal only, and not at all under `nohup`.

    `accelerate launch` with one process ends at the first Ctrl-C itself and leaves this process to finish alone: the
    shell then has the terminal, and a second Ctrl-C doesn't arrive here any more. The message names what does.

    All ranks stop at the same step, whichever of them got the signal. Add it last, so that its message stands last.

    Args:
        resume_command (`str`):
            The command that resumes the run, for the message.

    Attributes:
        interrupted (`bool`):
            Whether the run was ended by a signal before its last step.
        preempted (`bool`):
            Whether that was a signal of a scheduler, on any rank.
    """

    def __init__(self, resume_command: str):
        self.resume_command = resume_command
        self.interrupted = self.preempted = False
        self._first = None  # time of the first signal
        self._kind = NOTHING
        self._previous = {}
        self._terminals = []
        self._process = None
        self._loud = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.interrupted, self.preempted, self._first, self._kind, self._saved = False, False, None, NOTHING, None
        self._loud = state.is_world_process_zero
        self._process = os.getpid()
        # Python delivers signals to the main thread only, and only it may ask for them
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGHUP, *PREEMPTIONS):
                if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]

    def restore(self) -> None:
        """Restore the previous signal handlers. Call it when training raised: `on_train_end` is not called then."""
        _restore(self._previous)

    def _handle(self, number, frame) -> None:
        if os.getpid() != self._process:
            return  # a data loader's worker, which the terminal signals as well; it ends with this process
        now = time.monotonic()
        if number == signal.SIGHUP:
            self._hang_up()
        if self._first is None:
            self._first, self._kind = now, PREEMPTED if number in PREEMPTIONS else INTERRUPTED
            begin, again = "Stopping", f"Ctrl-C again, or `kill {os.getpid()}` if the launcher has ended"
            if self._kind == PREEMPTED:
                begin, again = f"Preempted ({signal.Signals(number).name})", f"`kill -INT {os.getpid()}`"
            self._say(f"{begin}: finishing this step and saving a checkpoint. To stop immediately, unsaved: {again}.")
        elif self._insists(number) and now - self._first > SECONDS_OF_ONE_PRESS:
            self.restore()
            raise KeyboardInterrupt

    def _insists(self, number: int) -> bool:
        """Return whether a signal after the first is one of somebody who doesn't want to wait for a checkpoint."""
        return number == signal.SIGINT or (number == signal.SIGTERM and self._kind == INTERRUPTED)

    def _hang_up(self) -> None:
        # Printing to a closed terminal raises, and would end the run before it is saved
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in self._terminals:
            os.dup2(nowhere, descriptor)
        os.close(nowhere)

    def _say(self, text: str) -> None:
        if self._loud:
            # Not `print`: a signal may arrive in the middle of one, and its buffer is not reentrant
            os.write(2, f"\n{text}\n".encode())

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % steps_per_rollout(args) or state.global_step >= state.max_steps:
            return
        if kind := highest_of_ranks(self._kind, args.device):
            self.interrupted, self.preempted = True, kind == PREEMPTED
            self.stop(state.global_step, control)

    def on_train_end(self, args, state, control, **kwargs):
        self.restore()
        if self.interrupted:
            checkpoint = f"{args.output_dir}/checkpoint-{state.global_step}"
            self._say(
                f"{'Preempted' if self.preempted else 'Stopped'} at step {state.global_step} of {state.max_steps}, "
                f"saved in {checkpoint}. Resume with: {self.resume_command}"
            )
