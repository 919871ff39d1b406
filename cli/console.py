"""The one console on stderr, and the writers of stdout: plain text, tables and JSON."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rewright.cli import environment
from rewright.cli.progress import Bars, Drawing, Lines, Nothing, opened
from rewright.formats.errors import reason
from rewright.passes.errors import ResourceError

if TYPE_CHECKING:
    from rewright.passes.context import Progress

QUIET, NORMAL, VERBOSE, EVERYTHING = -1, 0, 1, 2
_STYLES = {"error": "1;31", "warning": "1;33", "hint": "1;36"}
# Control characters in a file's name would move the cursor or colour the terminal; they are shown, not sent.
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class Console:
    """Talks on stderr at a level, and tells `--events` the same in JSON lines. A `Reporter` for the passes."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.level = NORMAL
        self._stream = sys.stderr if stream is None else stream
        self._colour = environment.colour(self._stream)
        self._events: TextIO | None = None
        self._drawing = self._choose()

    def configure(self, *, quiet: bool = False, verbose: int = 0, events: Path | None = None) -> None:
        """Take the level and the events file from a command's own options. Raises ResourceError."""
        self.level = QUIET if quiet else min(verbose, EVERYTHING)
        self._drawing = self._choose()
        if events is not None:
            try:
                self._events = events.open("w", encoding="utf-8", buffering=1)
            except OSError as error:
                raise ResourceError(f"cannot write events to `{events}`: {reason(error)}") from None

    def close(self) -> None:
        """Close the events file."""
        if self._events is not None:
            with contextlib.suppress(OSError):
                self._events.close()
            self._events = None

    @property
    def live(self) -> bool:
        """Whether bars redraw themselves, hence hide the cursor."""
        return isinstance(self._drawing, Bars)

    def _choose(self) -> Drawing:
        if self.level == QUIET or environment.value(environment.NO_PROGRESS):
            return Nothing(self._write)
        return Bars(self._stream) if environment.live(self._stream) else Lines(self._write)

    def _write(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()

    def _say(self, text: str, heading: str | None = None) -> None:
        text = text.translate(_CONTROLS)
        if heading is not None:
            shown = f"\x1b[{_STYLES[heading]}m{heading}:\x1b[0m" if self._colour else f"{heading}:"
            text = f"{shown} {text}"
        self._drawing.line(text)

    def info(self, text: str) -> None:
        """Something worth knowing in passing."""
        if self.level >= NORMAL:
            self._say(text)

    def warn(self, text: str) -> None:
        """Something that may not be what was meant."""
        self.event("warning", text=text)
        if self.level >= NORMAL:
            self._say(text, "warning")

    def debug(self, text: str) -> None:
        """A detail, shown with `-v`."""
        if self.level >= VERBOSE:
            self._say(text)

    def error(self, text: str, hint: str | None = None) -> None:
        """The last thing said: one line that is never wrapped, a blank line, a hint."""
        self.event("error", text=text, hint=hint)
        self._say(text, "error")
        if hint:
            self._write("")
            self._say(hint, "hint")

    def event(self, kind: str, **fields: Any) -> None:
        """One JSON line in the `--events` file; `time` is in seconds since 1970."""
        if self._events is None:
            return
        try:
            self._events.write(json.dumps(plain({"time": time.time(), "event": kind, **fields})) + "\n")
        except OSError as error:
            # the run goes on without: events are about it, not for it
            self._events = None
            self.warn(f"events are not written any more: {reason(error)}")

    def progress(self, label: str, total: float | None) -> AbstractContextManager[Progress]:
        """A bar under way; `total` is in whatever unit the work advances by, None when nobody knows."""
        return opened(self._drawing, label.translate(_CONTROLS), total)


_current: Console | None = None


def current() -> Console:
    """The process's console, made when first asked for."""
    global _current
    if _current is None:
        _current = Console()
    return _current


def plain(value: Any) -> Any:
    """`value` in JSON's terms: paths and other objects as text, numbers that are not finite as null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def write(text: str, *, end: str = "\n") -> None:
    """Send a product to stdout at once. What its encoding lacks is replaced, as set when the process starts."""
    sys.stdout.write(text + end)
    sys.stdout.flush()


def write_json(document: Any) -> None:
    """One JSON document on stdout, in ASCII, whatever the stream's encoding."""
    write(json.dumps(plain(document), indent=2, allow_nan=False))


def safe(text: str) -> str:
    """Text from a file, with control characters shown instead of sent."""
    return text.translate(_CONTROLS)


def table(rows: Iterable[Sequence[str]], *, head: Sequence[str] | None = None) -> str:
    """Rows in aligned columns, two spaces apart. The last column is never padded, and no cell is ever cut."""
    listed = [[safe(cell) for cell in row] for row in ([head] if head else []) + [list(row) for row in rows]]
    widths = [max(len(row[i]) for row in listed if i < len(row)) for i in range(max(map(len, listed), default=0))]
    lines = []
    for row in listed:
        cells = [cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=False)]
        lines.append("  ".join([*cells, *row[-1:]]).rstrip())
    return "\n".join(lines)
