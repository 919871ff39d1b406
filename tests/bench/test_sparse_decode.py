"""The study of decoding by listed neurons, on a small MLP."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rewright.kernels.sparse_mlp import break_even
from tests.bench import sparse_decode


def test_the_study_of_listed_neurons(
    tmp_path: Path, threads: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    threads(torch.get_num_threads())
    small = ["--width", "16", "--neurons", "256", "--rank", "4", "--rounds", "3", "--rows", "1", "3"]
    densities = ["--densities", "0.1", "1.0"]
    assert sparse_decode.main([*small, *densities, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "sparse-decode.json").read_text())
    tenth, whole = found["decode"]
    assert tenth["listed"] == pytest.approx(0.1, abs=0.002)
    assert (whole["listed"], whole["left_as_it_was"], tenth["left_as_it_was"]) == (1.0, True, False)
    assert tenth["step_times_faster"] == tenth["times_faster"] > 0
    assert [row["used"] for row in found["break_even"]] == [break_even(1), break_even(3)]
    page = (tmp_path / "sparse-decode.md").read_text()
    assert "| 100.0% | " in page
    assert "x, dense |" in page
    assert f"Machine: device {found['machine']['device']}" in page
    assert sparse_decode.main([*small, "--densities", "0.5"]) == 0
    assert "| 50.0% | " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("against", "share"), [((0.5, 1.5), 0.45), ((2.0, 3.0), 0.15), ((0.5, 1.0), 1.0), ((0.25, 1.25), 0.525)]
)
def test_where_two_are_equal(against: tuple[float, float], share: float) -> None:
    assert sparse_decode.equal((0.3, 0.6), against) == pytest.approx(share)
