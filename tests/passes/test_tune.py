"""Tuning, polish and measured budgets end to end: what they win, and that an interruption changes no byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rewright.passes.compress import budget, polish
from rewright.passes.compress.training import Training, shuffled
from rewright.passes.errors import BoundError
from rewright.passes.loading import load
from tests.passes.compressing import compress, logits, plain, report
from tests.passes.conftest import STORIES
from tests.passes.outputs import contents

ALL: dict[str, Any] = {"sparsity": 0.5, "budget": "measured", "tune": 6, "polish": 5}


@pytest.fixture
def whole(tiny: Callable[[str], Path], text: Path, tmp_path: Path) -> Path:
    compress(tiny("llama"), tmp_path / "whole", text, **ALL)
    return tmp_path / "whole"


def _raise_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> None:
    """Interrupt the run at a call of something, once it has been done."""
    real, calls = getattr(owner, name), []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        result = real(*args, **kwargs)
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(owner, name, interrupted)


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
    monkeypatch.setattr("rewright.passes.compress.training.PAUSE", pause)
    with monkeypatch.context() as patched:
        _raise_at(patched, owner, name, call)
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
    monkeypatch.setattr("rewright.passes.compress.training.PAUSE", 0.0)
    with monkeypatch.context() as patched:
        _raise_at(patched, Training, "_update", call)
        with pytest.raises(KeyboardInterrupt):
            compress(tiny("mixtral"), tmp_path / "cut", text, **asked)
    compress(tiny("mixtral"), tmp_path / "cut", text, **asked)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_budget_goes_on_to_equal_bytes_with_more_rows_than_it_looks_at(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows go through layers in other batches than those whose logits are compared, and round otherwise."""
    asked = {"bits": 3.5, "budget": "measured", "samples": 19, "refine": 0, "mask": "sweep", "target": "own"}
    compress(STORIES, tmp_path / "whole", text, **asked)
    with monkeypatch.context() as patched:
        _raise_at(patched, budget, "_measure_layer", 3)
        with pytest.raises(KeyboardInterrupt):
            compress(STORIES, tmp_path / "cut", text, **asked)
    compress(STORIES, tmp_path / "cut", text, **asked)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_what_is_kept_is_not_done_again(
    tiny: Callable[[str], Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rewright.passes.compress.training.PAUSE", 0.0)
    steps: list[int] = []
    with monkeypatch.context() as patched:
        _raise_at(patched, Training, "_update", 9)
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


def test_tuning_and_polish_win_on_a_real_model(text: Path, tmp_path: Path) -> None:
    found = {}
    for name, more in {"default": {}, "tune": {"tune": 30}, "polish": {"polish": 30}}.items():
        options = {"sparsity": 0.5, "group_size": 32, "samples": 16, **more}
        document, _ = compress(STORIES, tmp_path / name, text, **options)
        found[name] = document["stages"][0]["metrics"]
    assert found["tune"]["layer_error_held_out"] < 0.9 * found["default"]["layer_error_held_out"]
    told = report(tmp_path / "polish")["polish"]
    assert told["kl_last"] < 0.9 * told["kl_first"]


@pytest.mark.parametrize(
    "more", [{}, {"bits": 16}, {"format": "dense"}, {"symmetric": False, "format": "dense"}], ids=str
)
def test_polish_keeps_codes_and_zeros(
    more: dict[str, Any], tiny: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    for steps in (0, 4):
        compress(tiny("llama"), tmp_path / str(steps), text, sparsity=0.5, polish=steps, **more)
    before, after = (load(tmp_path / name)[0] for name in ("0", "4"))
    moved = 0
    for (name, one), (_, other) in zip(before.named_parameters(), after.named_parameters(), strict=True):
        assert torch.equal(one == 0, other == 0)
        moved += not torch.equal(one, other)
        assert ("embed" in name or "head" in name) <= torch.equal(one, other)
    assert moved > 10
    assert torch.equal(plain(tmp_path / "4", dtype=torch.float32), logits(after))


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    start = {"w": torch.ones(3)}
    training = Training.begin("layer 3", tmp_path / "state", 4, start, {"w": 0.1}, {})
    with pytest.raises(BoundError, match="the loss of tuning layer 3 is not finite at step 0"):
        training.run(lambda step: training.parameters["w"].sum() * float("nan"), lambda loss: None)


def test_a_state_of_something_else_is_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "state"
    Training.begin("layer 3", path, 4, {"w": torch.ones(3)}, {"w": 0.1}, {})
    assert Training.resume("layer 4", path, 4, torch.device("cpu")) is None
    assert Training.resume("layer 3", path, 5, torch.device("cpu")) is None
    assert Training.resume("layer 3", tmp_path / "none", 4, torch.device("cpu")) is None


def test_every_row_comes_once_a_round() -> None:
    first = torch.cat([shuffled(12, 3, step, seed=5) for step in range(4)])
    second = torch.cat([shuffled(12, 3, step, seed=5) for step in range(4, 8)])
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(12))
    assert first.tolist() != second.tolist()
    assert len(shuffled(2, 8, 0, seed=5)) == 2
