"""The study of filters: that it runs, resumes and prints, and that its peers speak of the same errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rewright.passes.hyena_distill.fit import error, fit
from tests.bench import filters, filters_peers
from tests.bench.filters_page import page
from tests.passes import filter_suite as suite


def test_a_study_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = filters.Row("short noise", 40, (2, 4), lambda seed: suite.noise(seed, 40, rate=2.0))
    monkeypatch.setattr(filters, "ROWS", (row,))
    said = ["--out", str(tmp_path), "--seeds", "2"]
    filters.main([*said, "--methods", "bound|closed form"])
    first = filters.load(tmp_path / "filters.json")
    assert [(case["method"], case["order"]) for case in first["cases"]] == [
        ("bound", 2),
        ("bound", 4),
        ("closed form", 2),
        ("closed form", 4),
    ]
    filters.main([*said, "--methods", "bound|start alone"])
    second = filters.load(tmp_path / "filters.json")
    assert second["cases"][:4] == first["cases"]
    assert len(second["cases"]) == 6
    text = (tmp_path / "filters.md").read_text()
    assert "| short noise | 40 | 2 |" in text
    assert "| short noise | 4 | 1." in text


def test_a_page_says_what_is_over_what() -> None:
    common = {"row": "r", "length": 9, "order": 2, "cpu_seconds": 0.5}
    cases = [
        {**common, "method": "bound", "errors": [0.1, 0.4]},
        {**common, "method": "closed form", "errors": [0.2, 0.4]},
        {**common, "method": "gradient", "published": [0.5, 0.5], "errors": [0.25, 0.5]},
        {**common, "method": "balanced truncation (slycot)", "errors": [0.3]},
    ]
    text = page({"cases": cases, "speed": [{"name": "f", "filters": 3, "cpu_seconds": 1.0, "seconds": 2.0}]})
    assert "| r | 9 | 2 | 0.200 | - | - | 0.300 (1) | - | - | 0.283 | 0.500 | 0.354 |" in text
    assert "| r | 2 | 1.414 | 1.000 | 2.000 | 0.800 | 0.500, 0.500 |" in text
    assert "| HyenaDNA's init, f | 3 | 1.0 | 2.0 |" in text


def test_peers_reduce_the_same_filter() -> None:
    whole = torch.cat([suite.modal(3, 300, 2, 0), suite.hyena(3, 300)])
    assert filters_peers.aaa(whole[0], 4) < 1e-6
    assert 0.1 < filters_peers.aaa(whole[1], 4) < 1
    pytest.importorskip("slycot")
    ours = filters.relative(whole, error(whole, fit(whole, 4, method="balanced")))
    assert filters_peers.slycot_balanced(whole[1], 4) == pytest.approx(ours[1], rel=1e-3)
