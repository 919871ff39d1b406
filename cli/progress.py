"""Progress, drawn two ways: bars that redraw themselves on a terminal, else a plain line every 30 seconds."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TextIO

from rewright.cli.figures import duration

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

    from rewright.passes.context import Progress

INTERVAL = 30.0


def _count(amount: float) -> str:
    return f"{amount:.0f}" if amount == int(amount) or amount >= 100 else f"{amount:.1f}"


class Pace:
    """How fast work has gone of late, and hence how long the rest will take.

    What is done at once when the work begins was done before, by a run that was interrupted: it says nothing of speed.
    """

    RECENT = 8
    AT_ONCE = 0.05

    def __init__(self, total: float | None, clock: Callable[[], float]) -> None:
        self.done = 0.0
        self.total = total
        self._clock = clock
        self._marks = deque([(clock(), 0.0)], maxlen=self.RECENT + 1)

    def advance(self, amount: float) -> None:
        """So much more is done."""
        if not amount:
            return
        self.done += amount
        now = self._clock()
        if len(self._marks) == 1 and now - self._marks[0][0] < self.AT_ONCE:
            self._marks.pop()
        self._marks.append((now, self.done))

    def left(self) -> float | None:
        """Seconds until the end; None while nobody can know, as when a step takes longer than those before it."""
        (since, before), (last, done) = self._marks[0], self._marks[-1]
        if not self.total or done <= before or self.done >= self.total:
            return None
        left = (last - since) / (done - before) * (self.total - done) - (self._clock() - last)
        return left if left > 0 else None


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
    """A line every `INTERVAL` seconds, for logs. It is written as the work moves, so no thread is needed.

    Where one piece of work is part of another, the line says how far both are.
    """

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self.line = write
        self._clock = clock
        self._last = clock()
        self._open: list[_LineBar] = []

    def bar(self, label: str, total: float | None) -> Iterator[Progress]:
        bar = _LineBar(self, label, Pace(total, self._clock))
        self._open.append(bar)
        try:
            yield bar
        finally:
            self._open.remove(bar)

    def moved(self) -> None:
        """Write a line if it is time for one."""
        now = self._clock()
        if now - self._last >= INTERVAL:
            self._last = now
            self.line("; ".join(bar.text() for bar in self._open))


class _LineBar:
    def __init__(self, lines: Lines, label: str, pace: Pace) -> None:
        self._lines, self._label, self._pace = lines, label, pace
        self._note = ""

    def advance(self, amount: float = 1, note: str = "") -> None:
        self._pace.advance(amount)
        self._note = note
        self._lines.moved()

    def text(self) -> str:
        said = f"{self._label}: {_count(self._pace.done)}"
        if self._pace.total:
            said += f" of {_count(self._pace.total)}"
        left = self._pace.left()
        if left is not None:
            said += f", {duration(left)} left"
        return f"{said} ({self._note})" if self._note else said


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
        pace = Pace(total, time.monotonic)
        task = screen.add_task(label, total=total, note="", pace=pace)
        try:
            yield _RichBar(screen, task, pace)
        finally:
            screen.remove_task(task)
            if outermost:
                screen.stop()
                self._screen = None

    def _open(self) -> RichProgress:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
        from rich.text import Text

        class Left(ProgressColumn):
            """Rich's own column forgets steps older than half a minute, and a layer may take longer."""

            def render(self, task: Task) -> Text:
                left = task.fields["pace"].left()
                return Text("" if left is None else f"{duration(left)} left")

        self._screen = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            Left(),
            TextColumn("{task.fields[note]}", markup=False),
            console=Console(file=self._stream, force_terminal=True),
            transient=True,
            redirect_stdout=False,  # stdout is data, and goes where it was sent
        )
        self._screen.start()
        return self._screen


class _RichBar:
    def __init__(self, screen: RichProgress, task: int, pace: Pace) -> None:
        self._screen, self._task, self._pace = screen, task, pace

    def advance(self, amount: float = 1, note: str = "") -> None:
        from rich.progress import TaskID

        self._pace.advance(amount)
        self._screen.update(TaskID(self._task), advance=amount, note=note)


@contextmanager
def opened(drawing: Drawing, label: str, total: float | None) -> Iterator[Progress]:
    """The bar as a context manager, whichever way it is drawn."""
    yield from drawing.bar(label, total)
