"""The studies of sparse decoding: what their pages say of what was measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench import sparse_widths
from tests.bench.dejavu import bytes_at, page


def test_bytes_between_budgets() -> None:
    rows = [{"kl": 0.1, "bytes_share": 0.1}, {"kl": 0.001, "bytes_share": 0.3}]
    assert bytes_at(rows, 0.01) == pytest.approx(0.2)
    assert bytes_at(rows, 0.1) == pytest.approx(0.1)
    assert bytes_at(rows, 0.5) is None


def test_the_page_has_every_variant() -> None:
    rows = [{"kl": 0.1, "bytes_share": 0.1}, {"kl": 0.001, "bytes_share": 0.3}]
    keys = ("natural_density", "density", "recall", "precision", "energy_recall")
    place = {"layer": 0, "site": "mlp", **dict.fromkeys(keys, 0.5)}
    variants = {"default": {"rows": rows, "places": [place]}, "random": {"rows": rows[:1]}}
    told = page({"machine": {"device": "this"}, "models": {"small": {"told": "a model", "variants": variants}}})
    assert "| default | 13.0 % | 17.0 % | 20.0 % | 23.0 % | 27.0 % |" in told
    assert "| random | - | - | - | - | - |" in told
    assert "| 0 | mlp | 0.500 |" in told


def test_widths(tmp_path: Path) -> None:
    assert sparse_widths.main(["--out", str(tmp_path), "--widths", "32"]) == 0
    lines = (tmp_path / "sparse-widths.md").read_text().splitlines()
    assert sum(line.startswith("| 32 |") for line in lines) == len(sparse_widths.DENSITIES)
