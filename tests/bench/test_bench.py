"""The harness: its document, and its refusal to time what is not conformant."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rewright.kernels.joint_sweep import joint_sweep
from tests.bench import __main__ as bench
from tests.bench import harness, quality, solve
from tests.bench.joint_sweep import eager
from tests.kernels.bounds import Verdict


@pytest.fixture(autouse=True)
def _threads(threads: Callable[[int], None]) -> None:
    threads(torch.get_num_threads())


def test_the_document_has_times_rate_ceiling_and_peer(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["rng", "--device", "cpu", "--seconds", "0", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    (row,) = report["rows"]
    lower, upper = row["seconds"]["quartiles"]
    assert 0 < lower <= row["seconds"]["median"] <= upper
    assert row["seconds"]["calls"] >= 9
    assert row["fraction_of_ceiling"] == pytest.approx(row["gigabytes_per_second"] * 1e9 / report["ceilings"]["copy"])
    assert row["peer"]["median"] > 0
    assert report["machine"]["torch"] == torch.__version__
    assert report["conformant_cases"] > 0


def test_an_op_that_is_not_conformant_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(harness, "verdicts", lambda *_: {"rng-1": Verdict(False, 2.0, "not equal")})
    assert bench.main(["rng", "--device", "cpu"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "`rng` is not timed: rng-1 is not conformant: not equal" in captured.err


def test_the_peer_of_the_sweep_computes_the_same() -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(37, 24, generator=generator)
    factor = torch.eye(24) + torch.randn(24, 24, generator=generator).triu(1) / 16
    scale, keep = weight.abs().amax(dim=1) / 7.5, torch.rand(37, 24, generator=generator) > 0.5
    codes, value, error = eager(weight, factor, scale, keep, -8, 7)
    sweep = joint_sweep(weight, factor, scale, keep=keep, low=-8, high=7)
    assert torch.equal(codes, sweep.codes)
    assert torch.allclose(value, sweep.dequantised)
    assert torch.allclose(error, sweep.error, atol=1e-5)


@pytest.mark.parametrize("full", [False, True])
def test_the_solve_is_measured(full: bool) -> None:
    found = solve.measure(0.5, 128, full)
    assert found["linear_parameters"] == 6_422_528
    assert found["cpu_seconds"] > 0
    assert all(0 < layer["python_share"] < 1 for layer in found["layers"])
    assert "| 0.5 | 128 |" in solve.page([found])


def test_the_quality_study_makes_every_setting_once() -> None:
    seen = [(setting, recipe.name) for setting, recipe, _ in quality.cases(quality.RECIPES)]
    assert len(set(seen)) == len(seen)
    settings = {setting for setting, _ in seen}
    assert {"W4", "W3 + 50 %", "W8 + 2:4", "16:32"} <= settings
    assert ("W4", "Wanda, RTN") not in seen
    two = next(stages for at, recipe, stages in quality.cases(quality.RECIPES) if recipe.name.endswith("keeps them"))
    assert [stage["bits"] for stage in two] == [16, 8]
    assert "sparsity" in two[0]
    assert "sparsity" not in two[1]


def test_the_quality_study_is_done_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "measure", lambda *_: {"perplexity": {"stories": 5.0, "other stories": 6.0}})
    monkeypatch.setattr(quality.Texts, "score", lambda *_: {"stories": 4.0, "other stories": 4.5})
    said = [str(quality.DATA / "stories260K"), "--out", str(tmp_path), "--recipes=default", "--settings"]
    quality.main([*said, "W4"])
    monkeypatch.setattr(quality, "measure", lambda *_: {"perplexity": {"stories": 7.0, "other stories": 8.0}})
    quality.main([*said, "W4|W3"])
    page = (tmp_path / "compress.md").read_text()
    assert "| default | 5.00 | 7.00 |" in page
    assert "| default | 6.00 | 8.00 |" in page


def test_the_quality_study_measures_a_chain_under_other_constants(tmp_path: Path) -> None:
    given = argparse.Namespace(group_size=32, samples=2, threads=1)
    texts = quality.Texts(tmp_path, {})
    stages = [{"bits": 16, "sparsity": 0.5, "admm.RHO": 3.0}, {"bits": 4, "mask": "keep", "refine": 1}]
    found = quality.measure(quality.DATA / "stories260K", texts, stages, 0, given)
    assert found["sparsity"] >= 0.5
    assert found["perplexity"]["stories"] > 4
