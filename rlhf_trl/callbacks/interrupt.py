"""Graceful shutdown at Ctrl-C: the first one saves a checkpoint and stops, the second one stops immediately."""

import os
import signal
import threading
import time

from rlhf_trl.callbacks.base import SaveAndStop
from rlhf_trl.runs.ranks import any_rank
from rlhf_trl.trainers.steps import steps_per_rollout

# Some senders signal twice: `timeout` first the process and then its group, launchers on top of the terminal
SECONDS_OF_ONE_PRESS = 1.0


class Interrupt(SaveAndStop):
    """
    End a run on SIGINT (Ctrl-C) or SIGTERM: after the step, or for trainers with rollouts after the last step on the
    current rollout, with a checkpoint. A second signal raises `KeyboardInterrupt` where the run stands. SIGHUP (the
    terminal is gone) counts as a first signal only, and not at all under `nohup`.

    `accelerate launch` with one process ends at the first Ctrl-C itself and leaves this process to finish alone: the
    shell then has the terminal, and a second Ctrl-C doesn't arrive here any more. The message names what does.

    All ranks stop at the same step, whichever of them got the signal. Add it last, so that its message stands last.

    Args:
        resume_command (`str`):
            The command that resumes the run, for the message.

    Attributes:
        interrupted (`bool`):
            Whether the run was ended by a signal before its last step.
    """

    def __init__(self, resume_command: str):
        self.resume_command = resume_command
        self.interrupted = False
        self._first = None  # time of the first signal
        self._previous = {}
        self._terminals = []
        self._process = None
        self._loud = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.interrupted, self._first, self._saved = False, None, None
        self._loud = state.is_world_process_zero
        self._process = os.getpid()
        # Python delivers signals to the main thread only, and only it may ask for them
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]

    def restore(self) -> None:
        """Restore the previous signal handlers. Call it when training raised: `on_train_end` is not called then."""
        while self._previous:
            signal.signal(*self._previous.popitem())

    def _handle(self, number, frame) -> None:
        if os.getpid() != self._process:
            return  # a data loader's worker, which the terminal signals as well; it ends with this process
        now = time.monotonic()
        if number == signal.SIGHUP:
            self._hang_up()
        if self._first is None:
            self._first = now
            self._say(
                "Stopping: finishing this step and saving a checkpoint. To stop immediately, unsaved: Ctrl-C again, "
                f"or `kill {os.getpid()}` if the launcher has ended."
            )
        elif number != signal.SIGHUP and now - self._first > SECONDS_OF_ONE_PRESS:
            self.restore()
            raise KeyboardInterrupt

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
        if any_rank(self._first is not None, args.device):
            self.interrupted = True
            self.stop(state.global_step, control)

    def on_train_end(self, args, state, control, **kwargs):
        self.restore()
        if self.interrupted:
            checkpoint = f"{args.output_dir}/checkpoint-{state.global_step}"
            self._say(
                f"Stopped at step {state.global_step} of {state.max_steps}, saved in {checkpoint}. "
                f"Resume with: {self.resume_command}"
            )
