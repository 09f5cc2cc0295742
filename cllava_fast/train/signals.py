"""SIGTERM and Ctrl-C end a run at the next step, saved; a second one ends it at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from cllava_fast import distributed

SIGNALS = (signal.SIGINT, signal.SIGTERM)
NOTICE = b"\ncllava-fast: stopping after this step; once more stops at once\n"


class RunStopped(KeyboardInterrupt):
    """A signal ended the run. What is on disk is whole, and ``resume`` goes on from there.

    Attributes:
        exit_code: 128 and the signal's number, as shells have it.
    """

    def __init__(self, signum: int, at_once: bool = False) -> None:
        self.signum, self.exit_code = signum, 128 + signum
        self.reason = f"stopped{' at once' if at_once else ''} by {signal.Signals(signum).name}"
        super().__init__(f"{self.reason}; the last saved state is whole: resume=True goes on from it")


class Watch:
    """Notices the signals and says when to stop."""

    def __init__(self) -> None:
        self.requested = 0  # number of the signal that came, 0 for none
        self._pid = 0

    @contextmanager
    def catching(self) -> Iterator[None]:
        """Takes the place of the default handlers, those alone, and gives it back. In a thread it does nothing."""
        before, self._pid, self.requested = {}, os.getpid(), 0
        if threading.current_thread() is threading.main_thread():
            for signum in SIGNALS:
                # who ignores a signal (nohup) or has a handler of his own keeps it
                if signal.getsignal(signum) in (signal.SIG_DFL, signal.default_int_handler):
                    before[signum] = signal.signal(signum, self._handle)
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)
        if self.requested:  # behind the last step: whoever called must not go on either
            raise RunStopped(self.requested)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # of a fork: Ctrl-C is its parent's, and SIGTERM ends it
            if signum == signal.SIGTERM:
                os._exit(128 + signum)
            return
        if self.requested:
            raise RunStopped(signum, at_once=True)
        self.requested = signum
        os.write(2, NOTICE)  # print would fail where the signal came in the middle of another

    def check(self) -> None:
        """Raises RunStopped on every process if a signal reached one of them."""
        signum = distributed.highest(self.requested)
        if signum:
            raise RunStopped(signum)
