"""How long work will take, and work that is part of other work."""

from __future__ import annotations

import pytest

from rewright.cli import progress


class Clock:
    """Stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_nobody_knows_before_anything_is_done() -> None:
    clock = Clock()
    pace = progress.Pace(4, clock)
    clock.now = 100
    assert pace.left() is None
    pace.advance(0)
    assert pace.left() is None, "a note is no work"


def test_time_left_runs_on_between_two_steps() -> None:
    clock = Clock()
    pace = progress.Pace(4, clock)
    clock.now = 120  # longer than half a minute, which some bars remember
    pace.advance(1)
    assert pace.left() == 360
    clock.now = 150
    assert pace.left() == 330
    clock.now = 900
    assert pace.left() is None, "it was a guess"
    for _ in range(3):
        pace.advance(1)
    assert pace.left() is None, "it is done"


def test_what_an_earlier_run_did_says_nothing_of_speed() -> None:
    clock = Clock()
    pace = progress.Pace(100, clock)
    pace.advance(80)
    assert pace.left() is None
    for _ in range(10):
        clock.now += 3
        pace.advance(1)
    assert pace.left() == pytest.approx(30)


def test_only_the_last_steps_count() -> None:
    clock = Clock()
    pace = progress.Pace(40, clock)
    for seconds in [0.2] * 10 + [10.0] * 8:
        clock.now += seconds
        pace.advance(1)
    assert pace.left() == pytest.approx(220)


def test_nobody_knows_without_a_total() -> None:
    clock = Clock()
    pace = progress.Pace(None, clock)
    clock.now = 5
    pace.advance(3)
    assert (pace.done, pace.left()) == (3, None)


def test_a_line_tells_all_that_is_under_way() -> None:
    clock = Clock()
    said: list[str] = []
    lines = progress.Lines(said.append, clock)
    with progress.opened(lines, "layers", 4) as outer:
        clock.now = 20
        outer.advance(1, "layer 0 error 0.1")
        with progress.opened(lines, "tune layer 1", 10) as inner:
            clock.now = 35
            inner.advance(5, "loss 0.2")
        clock.now = 70
        outer.advance()
    assert said == [
        "layers: 1 of 4, 45 s left (layer 0 error 0.1); tune layer 1: 5 of 10, 15 s left (loss 0.2)",
        "layers: 2 of 4, 1 min 10 s left",
    ]
