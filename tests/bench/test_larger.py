"""The checkpoint that `tests.bench.larger` makes, in small, and its page."""

from __future__ import annotations

from pathlib import Path

import pytest

from rewright.formats.checkpoint import Checkpoint
from rewright.passes.loading import load
from tests.bench import larger


def test_the_checkpoint_is_as_large_as_asked_and_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(larger, "HIDDEN", 64)
    monkeypatch.setattr(larger, "FFN", 96)
    square, up, down = (64, 64), (96, 64), (64, 96)
    shapes = dict(zip(larger.MATRICES, (square, square, square, square, up, up, down), strict=True))
    monkeypatch.setattr(larger, "MATRICES", shapes)
    weights = 4 * 64 * 64 + 3 * 96 * 64
    monkeypatch.setattr(larger, "WEIGHTS", weights)
    layers = larger.write_model(tmp_path / "source", 2.5 * 2 * weights / 2**30)
    assert layers == 3
    source = Checkpoint.open(tmp_path / "source")
    assert len(source.files) == layers + 1
    assert source.total_bytes >= 2.5 * 2 * weights
    model, tokenizer = load(source)
    assert model.num_parameters() == source.total_bytes // 2
    assert tokenizer is not None


def test_the_page_has_what_was_foretold_beside_what_was() -> None:
    foretold = {"peak_host_bytes": 2**30, "seconds_estimated": 90.0, "output_bytes": 2 * 10**9}
    steps = {
        "compress": {"mib": 1000.0, "seconds": 100.0, "output_bytes": 2 * 10**9, "foretold": foretold},
        "verify, source": {"mib": 9.0, "seconds": 3.0},
    }
    said = larger.page(
        {"layers": 3, "bytes": 2**30, "idle_mib": 400.0, "steps": steps, "machine": {"device": "x"}, "command": "c"}
    )
    assert "| compress | 1000 (1024) | 100 (90) | 2.000 (2.000) |" in said
    assert "| verify, source | 9 | 3 | - |" in said
