"""Ctrl-C and termination: the first asks, the second ends the process at once.

A handler in Python runs only between bytecodes, and a matrix product can keep it waiting for seconds. The second
signal is therefore read from a pipe that the C-level handler writes to, by a thread that needs nothing else.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

from rewright.cli import console, exits

_CODES = {signal.SIGINT: exits.INTERRUPTED, signal.SIGTERM: exits.TERMINATED}


class Signals:
    """The signals seen so far. `first` is the exit code that the first of them asks for, or None."""

    def __init__(self) -> None:
        self.first: int | None = None

    def listen(self) -> None:
        """Install the handlers; the main thread calls it once. What was ignored (`nohup`, `&`) stays ignored."""
        heard = [number for number in _CODES if signal.getsignal(number) is not signal.SIG_IGN]
        for number in heard:
            signal.signal(number, self._ask)
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reader,), name="signals", daemon=True).start()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.first is None:
            self.first = _CODES[signal.Signals(number)]
            raise KeyboardInterrupt

    def _watch(self, reader: int) -> None:
        seen = 0
        while True:
            for number in os.read(reader, 64):
                if number in _CODES:
                    seen += 1
                    if seen == 2:
                        self._leave(_CODES[signal.Signals(number)])

    def _leave(self, code: int) -> None:
        """End without any Python clean-up: what is on disk is fit for a kill at any moment."""
        if console.current().live:
            os.write(2, b"\x1b[?25h\n")  # a live bar hides the cursor
        os._exit(code)
