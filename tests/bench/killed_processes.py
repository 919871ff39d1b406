"""Processes of a run killed at random moments: `python -m tests.bench.killed_processes MODEL --times 10`.

Each time two processes compress a model, one of them is killed while they work, and the same command is given again to
one, two or three. Printed are the moment, counted from where work begins, who was killed, how long the other took to
end and what was said. A moment at which the run had ended is drawn again. A run that does not end in 30 s, leaves
anything but the whole result at the destination, or ends in other bytes, is an error.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.bench.processes import TEXT, digest
from tests.passes.processes import Launched

WORDS = ("--sparsity", "0.5", "--samples", "32", "--sequence-length", "256", "--threads", "1")
MOST_SECONDS = 30


def words(model: Path, dst: Path) -> list[str | Path]:
    return ["compress", model, dst, *WORDS, "--calibration-text", TEXT]


def start(model: Path, dst: Path) -> Launched:
    """A run of two processes that has begun its work, or has ended."""
    run = Launched(dst.parent, 2, words(model, dst))
    while not (dst.with_name(f"{dst.name}.partial").exists() or dst.exists() or run.ended()):
        time.sleep(0.01)
    return run


def once(model: Path, folder: Path, lasts: float, expected: str) -> str | None:
    """One kill and what came of it; None where the run had ended. Raises AssertionError."""
    dst, who = folder / "out", random.randrange(2)
    run = start(model, dst)
    time.sleep(moment := random.uniform(0, lasts))
    with contextlib.suppress(KeyError, ProcessLookupError):
        os.kill(run.workers()[who], signal.SIGKILL)
    began = time.monotonic()
    code, _, err = run.wait()
    ended = time.monotonic() - began
    if code == 0 or dst.exists():
        # published, whether or not a process was killed on its way out
        assert digest(dst) == expected
        return None
    assert ended < MOST_SECONDS, f"{ended:.1f} s until all had ended"
    said = next((line for line in err.splitlines() if line.startswith("error:")), "nothing: it was not up yet")
    size = random.choice((1, 2, 3))
    code, _, err = Launched(folder, size, words(model, dst)).wait()
    assert code == 0, err
    assert digest(dst) == expected, "other bytes"
    return f"at {moment:.1f} s, process {who}: all ended {ended:.1f} s later; {said}; {size} went on to equal bytes"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--times", type=int, default=10)
    given = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        run = start(given.model, Path(name) / "out")
        began = time.monotonic()
        code, _, err = run.wait()
        assert code == 0, err
        lasts, expected = time.monotonic() - began, digest(Path(name) / "out")
    for number in range(given.times):
        said = None
        while said is None:
            with tempfile.TemporaryDirectory() as name:
                said = once(given.model, Path(name), lasts, expected)
        print(number + 1, said, flush=True)


if __name__ == "__main__":
    main()
