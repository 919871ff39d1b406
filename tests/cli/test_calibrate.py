"""`bench --calibrate`: what it writes, what it tells, what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from rewright.passes.flexgen_policy_search import calibrate, machine_file
from tests.cli.conftest import Ended
from tests.passes.flexing import hasten


def test_the_command_writes_what_the_search_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[..., Ended]
) -> None:
    hasten(monkeypatch)
    monkeypatch.setattr(calibrate, "calibrate", partial(calibrate.calibrate, share=0.01))
    box = tmp_path / "box.toml"
    words = ("bench", "--calibrate", str(box), "--threads", "1")
    told = json.loads(call(*words, "--json").out)
    assert told["machine"] == str(box)
    assert len(told["held_out"]) == 12
    machine = machine_file.parse(box.read_bytes(), box)
    assert machine.holdout == pytest.approx(told["holdout"], abs=1e-3)
    # its own file may be written again, another's not
    assert "not fitted to" in call(*words).out
    box.write_text('base = "laptop"\n')
    ended = call(*words)
    assert ended.code == 2
    assert "is there, and no calibration" in ended.err
    assert box.read_text() == 'base = "laptop"\n'


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--calibrate", "box.txt"), "writes a .toml file"),
        (("--calibrate", "nowhere/box.toml"), "there is no folder"),
        (("model", "--calibrate", "box.toml"), "times this machine, and no model"),
        ((), "nothing to time"),
    ],
)
def test_what_cannot_be_calibrated(words: tuple[str, ...], told: str, call: Callable[..., Ended]) -> None:
    ended = call("bench", *words)
    assert ended.code == 2
    assert told in ended.err
