"""A prompt that several processes learn: the bytes of one, also when they do not finish it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rewright.passes.prompt import units
from rewright.passes.training import Training
from tests.passes.outputs import stamp
from tests.passes.processes import Launched
from tests.passes.prompting import prompt, words
from tests.passes.test_torchrun import same

# units so small that a step has several, and so has what the teacher is asked
SMALL = """
from rewright.passes.prompt import teacher, units as cut
cut.UNIT_TOKENS, teacher.TOGETHER = 80, 400
"""
# what is on the disk in the middle of learning, as if all were killed there; a state is kept at every step
COPIED = """
import shutil
from rewright.passes import training
training.PAUSE = 0
whole = training.Training._update
def update(self, step, gradients):
    whole(self, step, gradients)
    if step == 4 and os.environ['RANK'] == '0':
        partial = self.path.parent.parent
        shutil.copytree(partial, partial.with_name('cut.partial'))
training.Training._update = update
"""
STEPS = 7


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_TOKENS", 80)
    monkeypatch.setattr("rewright.passes.prompt.teacher.TOGETHER", 400)


def test_two_make_the_bytes_of_one_and_one_finishes_what_two_began(
    half: Path, tiny: Callable[[str], Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dst, cut, alone = tmp_path / "out", tmp_path / "cut", tmp_path / "alone"
    options = {"steps": STEPS, "loss": "mix", "teacher": tiny("llama")}
    asked = ["prompt", "--threads", "1", half, dst, *words(text, **options)]
    code, out, err = Launched(tmp_path, 2, asked, SMALL + COPIED).wait()
    assert (code, out) == (0, ""), err
    assert err.count("done in") == 1, "one speaks"
    prompt(half, alone, text, **options)
    same(dst, alone)
    made = stamp(dst)["stages"][0]
    assert made["processes"] == 2
    # of each step's sum half goes to the other, and comes back
    assert made["bytes_sent"] >= STEPS * 4 * 4 * 32

    told = [line for file in tmp_path.glob("cut.partial/*/journal*.jsonl") for line in file.read_text().splitlines()]
    assert len([line for line in told if '"teacher' in line]) > 2
    steps: list[int] = []
    real = Training._update

    def counted(self: Training, step: int, gradients: Any) -> None:
        steps.append(step)
        real(self, step, gradients)

    monkeypatch.setattr(Training, "_update", counted)
    prompt(half, cut, text, **options)
    assert steps == [4, 5, 6], "the fifth step was taken but not yet kept"
    same(cut, alone)
