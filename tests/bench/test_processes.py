"""What the page on several processes says, and what it reckons from."""

from __future__ import annotations

import pytest

from tests.bench.processes import GPU, PROCESSES, SHAPES, page, reckoned

SMALL = (1024, 2816, 4, 256, 1000)


def test_more_processes_take_less_time_and_one_sends_nothing() -> None:
    rows = [reckoned(SMALL, size, GPU) for size in PROCESSES]
    times = [row["seconds"] for row in rows]
    assert times == sorted(times, reverse=True)
    assert times[0] / times[1] == pytest.approx(2, rel=0.2)
    assert rows[0]["sent"] == 0
    assert all(row["sent"] > 0 for row in rows[1:])


def test_the_page_has_what_was_measured_apart() -> None:
    row = {"seconds": 120.0, "sent": 2e9, "sending": 60.0}
    told = page(
        {
            "model": "m",
            "runs": 3,
            "wall_seconds": {"1": 20.0, "2": 11.0},
            "stage_seconds": {"1": 16.0, "2": 8.0},
            "bytes_sent": 3_000_000,
            "bytes_foretold": 3_000_000,
            "equal_bytes": True,
            "link_bytes_a_second": 1e9,
            "reckoned": {name: {str(size): row for size in PROCESSES} for name in SHAPES},
            "machine": {"device": "x"},
            "command": "c",
        }
    )
    assert "| 2 | 11.0 (1.82x) | 8.0 (2.00x) | 3.0 |" in told
    assert "| 64 | 3.0 | 1.0 | 2 | 3.0 | 1.0 | 2 |" in told
    assert told.index("## Measured") < told.index("Equal bytes: yes") < told.index("## Reckoned")
