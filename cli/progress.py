"""Progress, drawn two ways: bars that redraw themselves on a terminal, else a plain line every 30 seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

    from rewright.passes.context import Progress

INTERVAL = 30.0


def duration(seconds: float) -> str:
    """A time span as a person says it: `0.4 s`, `41 s`, `3 min 5 s`, `2 h 10 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _count(amount: float) -> str:
    return f"{amount:.0f}" if amount == int(amount) or amount >= 100 else f"{amount:.1f}"


class Drawing(Protocol):
    """A way to show progress."""

    def bar(self, label: str, total: float | None) -> Iterator[Progress]: ...
    def line(self, text: str) -> None: ...


class Nothing:
    """No progress at all: under `--quiet` and REWRIGHT_NO_PROGRESS."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self.line = write

    def bar(self, label: str, total: float | None) -> Iterator[Progress]:
        yield self

    def advance(self, amount: float = 1, note: str = "") -> None:
        """Take note of nothing."""


class Lines:
    """A line every `INTERVAL` seconds, for logs. It is written as the work moves, so no thread is needed."""

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self.line = write
        self._clock = clock
        self.last = clock()

    def bar(self, label: str, total: float | None) -> Iterator[Progress]:
        yield _LineBar(self, self._clock, label, total)


class _LineBar:
    def __init__(self, lines: Lines, clock: Callable[[], float], label: str, total: float | None) -> None:
        self._lines, self._clock, self._label, self._total = lines, clock, label, total
        self._done = 0.0
        self._start = clock()

    def advance(self, amount: float = 1, note: str = "") -> None:
        self._done += amount
        now = self._clock()
        if now - self._lines.last < INTERVAL:
            return
        self._lines.last = now
        self._lines.line(self._text(now - self._start, note))

    def _text(self, elapsed: float, note: str) -> str:
        said = f"{self._label}: {_count(self._done)}"
        if self._total:
            said += f" of {_count(self._total)}"
            if 0 < self._done < self._total:
                said += f", {duration(elapsed / self._done * (self._total - self._done))} left"
        return f"{said} ({note})" if note else said


class Bars:
    """Rich's bars, one under another, gone when the work is done."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._screen: RichProgress | None = None

    def line(self, text: str) -> None:
        """Write above the bars, at any length, read as plain text with its own escape codes."""
        if self._screen is None:
            self._stream.write(text + "\n")
            self._stream.flush()
            return
        from rich.text import Text

        self._screen.console.print(Text.from_ansi(text), soft_wrap=True, highlight=False)

    def bar(self, label: str, total: float | None) -> Iterator[Progress]:
        outermost = self._screen is None
        screen = self._screen or self._open()
        task = screen.add_task(label, total=total, note="")
        try:
            yield _RichBar(screen, task)
        finally:
            screen.remove_task(task)
            if outermost:
                screen.stop()
                self._screen = None

    def _open(self) -> RichProgress:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._screen = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=Console(file=self._stream, force_terminal=True),
            transient=True,
            redirect_stdout=False,  # stdout is data, and goes where it was sent
        )
        self._screen.start()
        return self._screen


class _RichBar:
    def __init__(self, screen: RichProgress, task: int) -> None:
        self._screen, self._task = screen, task

    def advance(self, amount: float = 1, note: str = "") -> None:
        from rich.progress import TaskID

        self._screen.update(TaskID(self._task), advance=amount, note=note)


@contextmanager
def opened(drawing: Drawing, label: str, total: float | None) -> Iterator[Progress]:
    """The bar as a context manager, whichever way it is drawn."""
    yield from drawing.bar(label, total)
