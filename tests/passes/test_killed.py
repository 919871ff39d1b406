"""Runs of every step of the method that are killed in the middle of it: the same command ends in equal bytes."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from rewright.formats.verify import verify
from tests.passes.forks import Forks, Strike
from tests.passes.outputs import beside, contents, journal

STEPS = ("--sparsity", "0.5", "--budget", "measured", "--tune", "12", "--polish", "12")


@dataclass(frozen=True)
class Whole:
    """What an uninterrupted run made, and how long it took."""

    source: Path
    text: Path
    out: Path
    seconds: float

    def words(self, dst: Path) -> list[str | Path]:
        calibrate = ("--samples", "8", "--sequence-length", "64", "--calibration-text", self.text)
        return ["compress", "--threads", "1", self.source, dst, "--group-size", "16", *calibrate, *STEPS]


@pytest.fixture(scope="module")
def whole(forks: Forks, tiny: Callable[[str], Path], text: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    made = Whole(tiny("llama"), text, tmp_path_factory.mktemp("whole") / "out", 0)
    began = time.monotonic()
    ended = forks.run(*made.words(made.out))
    assert ended.code == 0, ended.err
    return Whole(made.source, text, made.out, time.monotonic() - began)


def _scratch(dst: Path) -> Path:
    return dst.with_name(f"{dst.name}.partial") / "1-compress.work"


def _goes_on(forks: Forks, whole: Whole, dst: Path) -> None:
    ended = forks.run(*whole.words(dst))
    assert ended.code == 0, ended.err
    assert contents(dst) == contents(whole.out)
    assert beside(dst) == []
    assert verify(dst).problems == []


@pytest.mark.parametrize(
    ("strike", "done", "kept"),
    [
        # changes to the journal: it is begun, then comes the budget of either layer, what was dealt, and so on
        (Strike(3, "journal.jsonl"), {"budget 0"}, None),
        (Strike(4, "journal.jsonl"), {"budget 0", "budget 1"}, None),
        (Strike(5, "journal.jsonl"), {"budget 0", "budget 1", "budget of zeros"}, None),
        (Strike(7, "journal.jsonl"), {"rest", "layer 0"}, None),
        (Strike(8, "journal.jsonl"), {"layer 0", "layer 1"}, None),
        (Strike(9, "journal.jsonl"), {"walk"}, "polish.safetensors"),
        (Strike(1, "tune.safetensors"), {"rest"}, None),
        (Strike(4, "tune.safetensors"), {"rest"}, "tune.safetensors"),
        (Strike(1, "polish.safetensors"), {"walk"}, None),
        (Strike(4, "polish.safetensors"), {"walk"}, "polish.safetensors"),
    ],
    # a set's own order is not the same in two processes
    ids=lambda value: " ".join(sorted(value)) if isinstance(value, set) else str(value),
)
def test_killed_in_the_middle_of_a_step(
    strike: Strike, done: set[str], kept: str | None, forks: Forks, whole: Whole, tmp_path: Path
) -> None:
    dst = tmp_path / "out"
    ended = forks.run(*whole.words(dst), strike=strike)
    assert ended.code == -signal.SIGKILL, ended.err
    found = journal(_scratch(dst))
    assert done <= set(found)
    assert "polish" not in found
    assert kept is None or (_scratch(dst) / kept).exists()
    _goes_on(forks, whole, dst)


@pytest.mark.parametrize("number", range(6))
def test_killed_at_a_random_moment(number: int, forks: Forks, whole: Whole, tmp_path: Path) -> None:
    """Wherever it is; a second time, and at last left alone."""
    dst = tmp_path / "out"
    for _ in range(2):
        job = forks.start(*whole.words(dst))
        time.sleep(random.Random().uniform(0, whole.seconds * (number + 1) / 6))
        with contextlib.suppress(ProcessLookupError):
            os.kill(job.pid, signal.SIGKILL)
        ended = forks.wait(job)
        assert ended.code in (0, -signal.SIGKILL), ended.err
        if ended.code == 0:
            return
    _goes_on(forks, whole, dst)
