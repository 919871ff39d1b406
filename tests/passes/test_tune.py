"""Tuning and polish: what they win, and what they leave as it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rewright.passes.errors import BoundError
from rewright.passes.loading import load
from rewright.passes.training import Training, shuffled
from tests.passes.compressing import compress, logits, plain, report
from tests.passes.conftest import STORIES


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
    loss = training.by_autograd(lambda step: training.parameters["w"].sum() * float("nan"))
    with pytest.raises(BoundError, match="the loss of tuning layer 3 is not finite at step 0"):
        training.run(loss, lambda loss: None)


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
