"""A prompt that several processes learn: the bytes of one, also when they do not finish it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rewright.passes.prompt import units
from tests.passes.outputs import beside, stamp
from tests.passes.processes import Launched
from tests.passes.prompting import prompt, report, words
from tests.passes.test_torchrun import same

# units so small that a step has several, and so has what the teacher is asked
SMALL = """
from rewright.passes.prompt import teacher, units as cut
cut.UNIT_TOKENS, teacher.TOGETHER = 80, 400
"""
# the second process is gone in the middle of learning; a state is on disk at every step
KILLED = """
import signal
from rewright.passes import training
training.PAUSE = 0
whole = training.Training._update
def update(self, step, gradients):
    whole(self, step, gradients)
    if step == 4 and os.environ['RANK'] == '1':
        os.kill(os.getpid(), signal.SIGKILL)
training.Training._update = update
"""
STEPS = 7


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_TOKENS", 80)
    monkeypatch.setattr("rewright.passes.prompt.teacher.TOGETHER", 400)


@pytest.fixture
def alone(half: Path, tiny: Callable[[str], Path], text: Path, tmp_path: Path) -> Path:
    """What one process makes, cut as finely."""
    prompt(half, tmp_path / "alone", text, steps=STEPS, loss="mix", teacher=tiny("llama"))
    return tmp_path / "alone"


def _asked(half: Path, dst: Path, text: Path, teacher: Path) -> list[str | Path]:
    return ["prompt", "--threads", "1", half, dst, *words(text, steps=STEPS, loss="mix", teacher=teacher)]


def test_two_make_the_bytes_of_one(
    alone: Path, half: Path, tiny: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    dst = tmp_path / "out"
    code, out, err = Launched(tmp_path, 2, _asked(half, dst, text, tiny("llama")), SMALL).wait()
    assert (code, out) == (0, ""), err
    same(dst, alone)
    made = stamp(dst)["stages"][0]
    assert made["processes"] == 2
    # of each step's sum half goes to the other, and comes back
    assert made["bytes_sent"] >= STEPS * 4 * 4 * 32
    assert err.count("done in") == 1, "one speaks"
    assert report(dst)["losses"] == report(alone)["losses"]


def test_begun_by_two_and_finished_by_one(
    alone: Path, half: Path, tiny: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    dst = tmp_path / "out"
    code, _, err = Launched(tmp_path, 2, _asked(half, dst, text, tiny("llama")), SMALL + KILLED).wait()
    assert code != 0
    assert "error: the run lost a process" in err or "error: terminated; partial work is kept" in err, err
    assert not dst.exists()
    scratch = tmp_path / "out.partial" / "1-prompt.work"
    assert (scratch / "prompt.safetensors").exists()
    told = [json.loads(line) for file in scratch.glob("journal*.jsonl") for line in file.read_text().splitlines()]
    assert len([record for record in told if record["unit"].startswith("teacher")]) > 2
    prompt(half, dst, text, steps=STEPS, loss="mix", teacher=tiny("llama"))
    same(dst, alone)
    assert beside(dst) == []
