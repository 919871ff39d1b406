"""The console on stderr, progress, and the writers of stdout."""

from __future__ import annotations

import io
import json
import math
import os
import pty
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewright.cli import console, figures, progress
from rewright.cli.console import Console
from rewright.passes.context import Reporter


def _console(**settings: Any) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    talk = Console(stream)
    talk.configure(**settings)
    return talk, stream


def test_levels() -> None:
    shown = {}
    for level, settings in {"q": {"quiet": True}, "": {}, "v": {"verbose": 1}, "vv": {"verbose": 2}}.items():
        talk, stream = _console(**settings)
        reporter: Reporter = talk
        reporter.info("i")
        reporter.warn("w")
        reporter.debug("d")
        talk.error("e")
        shown[level] = stream.getvalue().split("\n")[:-1]
    assert shown == {
        "q": ["error: e"],
        "": ["i", "warning: w", "error: e"],
        "v": ["i", "warning: w", "d", "error: e"],
        "vv": ["i", "warning: w", "d", "error: e"],
    }


def test_plain_progress_is_a_line_every_thirty_seconds() -> None:
    now, said = 0.0, []
    drawing = progress.Lines(said.append, clock=lambda: now)
    with progress.opened(drawing, "compress", 40) as bar:
        for _ in range(40):
            now += 8
            bar.advance(1, note="layer")
    assert said[0] == "compress: 4 of 40, 4 min 48 s left (layer)"
    assert len(said) == 10
    assert said[-1] == "compress: 40 of 40 (layer)"


def test_progress_of_unknown_length() -> None:
    now, said = 0.0, []
    drawing = progress.Lines(said.append, clock=lambda: now)
    with progress.opened(drawing, "hash", None) as bar:
        now = 31
        bar.advance(2.5)
    assert said == ["hash: 2.5"]


@pytest.mark.parametrize("settings", [{"quiet": True}, {}])
def test_progress_can_be_silenced(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    if not settings:
        monkeypatch.setenv("REWRIGHT_NO_PROGRESS", "1")
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    talk, stream = _console(**settings)
    with talk.progress("x", 2) as bar:
        bar.advance()
    assert stream.getvalue() == ""


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_bars_on_a_terminal(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "REWRIGHT_NO_PROGRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    leader, follower = pty.openpty()
    blocks: list[bytes] = []
    with os.fdopen(follower, "w", encoding=encoding, errors="backslashreplace") as stream:
        talk = Console(stream)
        assert talk.live
        with talk.progress("[red] ü", 2) as outer, talk.progress("inner", None) as inner:
            outer.advance(1, note="[bold]")
            inner.advance()
            time.sleep(0.3)  # a redraw or two
            blocks.append(os.read(leader, 1 << 16))
            talk.info("a line [not] markup " + "long " * 60 + "end")
        talk.info("after")
        while not blocks or not blocks[-1].endswith(b"after\r\n"):
            blocks.append(os.read(leader, 1 << 16))
    got = b"".join(blocks).decode(errors="replace")
    os.close(leader)
    assert "[red]" in got
    assert "[bold]" in got
    assert "a line [not] markup " + "long " * 60 + "end" in got.replace("\r\n", "")
    assert "\x1b[?25h" in got, "the cursor is shown again"
    assert got.endswith("after\r\n")


def test_no_live_bar_without_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w") as stream:
        for name in ("NO_COLOR", "REWRIGHT_NO_PROGRESS"):
            with monkeypatch.context() as patch:
                patch.setenv(name, "1")
                assert not Console(stream).live
    os.close(leader)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text() | st.builds(Path, st.just("a b")),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
    max_leaves=20,
)


@given(_JSON)
def test_whatever_is_written_is_json(value: Any) -> None:
    text = json.dumps(console.plain(value), allow_nan=False)
    assert text.isascii()
    if isinstance(value, float):
        assert json.loads(text) == (value if math.isfinite(value) else None)


def test_sets_come_sorted() -> None:
    assert console.plain(frozenset({"b", "a"})) == ["a", "b"]


@pytest.mark.parametrize(
    ("count", "said"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1_038_444, "1.04 MB"), (999_600, "1 MB"), (15e9, "15 GB")],
)
def test_sizes(count: float, said: str) -> None:
    assert figures.size(count) == said


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.04, "0.0 s"), (9.96, "10.0 s"), (41.4, "41 s"), (185, "3 min 5 s"), (7800, "2 h 10 min")]
)
def test_durations(seconds: float, said: str) -> None:
    assert figures.duration(seconds) == said


def test_table_aligns_and_never_cuts() -> None:
    text = console.table([("a", "bb", "c" * 200), ("aaa", "b", "")], head=("x", "y", "z\x1b"))
    assert text.splitlines() == ["x    y   z\\x1b", "a    bb  " + "c" * 200, "aaa  b"]
