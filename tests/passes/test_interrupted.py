"""Budgets, tuning and polish that are interrupted: the same command goes on, and no byte differs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rewright.formats.draft import Draft
from rewright.passes.compress import budget, polish
from rewright.passes.training import Training
from tests.passes.compressing import compress
from tests.passes.conftest import STORIES
from tests.passes.interruptions import raise_at
from tests.passes.outputs import contents

ALL: dict[str, Any] = {"sparsity": 0.5, "budget": "measured", "tune": 6, "polish": 5}


@pytest.fixture(scope="module")
def whole(tiny: Callable[[str], Path], text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    compress(tiny("llama"), out, text, **ALL)
    return out


@pytest.mark.parametrize("pause", [0.0, 1e9], ids=["kept at every step", "kept at the first"])
@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (budget, "_measure_layer", 1),
        (budget, "_measure_layer", 2),
        (Training, "_update", 3),
        (Training, "_update", 6),
        (Training, "_update", 9),
        (Training, "done", 2),
        (Training, "_update", 14),
        (polish._Student, "write", 1),
        # 14 matrices have three tensors each; then come the scales once more, and the norms
        (Draft, "write", 14 * 3 + 5),
        (Draft, "write", 14 * 3 + 14 + 3),
    ],
    ids=str,
)
def test_an_interruption_changes_no_byte(
    owner: Any,
    name: str,
    call: int,
    pause: float,
    whole: Path,
    tiny: Callable[[str], Path],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rewright.passes.training.PAUSE", pause)
    with monkeypatch.context() as patched:
        raise_at(patched, owner, name, call)
        with pytest.raises(KeyboardInterrupt):
            compress(tiny("llama"), tmp_path / "cut", text, **ALL)
    assert not (tmp_path / "cut").exists()
    compress(tiny("llama"), tmp_path / "cut", text, **ALL)
    assert contents(tmp_path / "cut") == contents(whole)


@pytest.mark.parametrize("sequential", ["module", "layer"])
@pytest.mark.parametrize("call", [4, 9])
def test_an_interruption_changes_no_byte_of_what_is_not_tuned(
    sequential: str,
    call: int,
    tiny: Callable[[str], Path],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Experts are pruned before a layer is tuned, and stay as they are while it is: also in a run that goes on."""
    asked = {"sparsity": 0.5, "tune": 6, "format": "dense", "sequential": sequential, "target": "own", "mask": "sweep"}
    compress(tiny("mixtral"), tmp_path / "whole", text, **asked)
    monkeypatch.setattr("rewright.passes.training.PAUSE", 0.0)
    with monkeypatch.context() as patched:
        raise_at(patched, Training, "_update", call)
        with pytest.raises(KeyboardInterrupt):
            compress(tiny("mixtral"), tmp_path / "cut", text, **asked)
    compress(tiny("mixtral"), tmp_path / "cut", text, **asked)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_budget_goes_on_to_equal_bytes_with_more_rows_than_it_looks_at(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows go through layers in other batches than those whose logits are compared, and may be rounded otherwise."""
    asked = {"bits": 3.5, "budget": "measured", "samples": 19, "refine": 0, "mask": "sweep", "target": "own"}
    compress(STORIES, tmp_path / "whole", text, **asked)
    with monkeypatch.context() as patched:
        raise_at(patched, budget, "_measure_layer", 3)
        with pytest.raises(KeyboardInterrupt):
            compress(STORIES, tmp_path / "cut", text, **asked)
    compress(STORIES, tmp_path / "cut", text, **asked)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_what_is_kept_is_not_done_again(
    tiny: Callable[[str], Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rewright.passes.training.PAUSE", 0.0)
    steps: list[int] = []
    with monkeypatch.context() as patched:
        raise_at(patched, Training, "_update", 9)
        with pytest.raises(KeyboardInterrupt):
            compress(tiny("llama"), tmp_path / "out", text, **ALL)
    real = Training._update

    def counted(self: Training, step: int, gradients: Any) -> None:
        steps.append(step)
        real(self, step, gradients)

    monkeypatch.setattr(Training, "_update", counted)
    compress(tiny("llama"), tmp_path / "out", text, **ALL)
    # the second layer's third step was taken but not yet kept
    assert steps == [2, 3, 4, 5, *range(5)]
