"""The study of running packed models, on one so small that it takes seconds."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from tests.bench import run_packed
from tests.bench.run_packed_page import page
from tests.passes.conftest import make


def test_every_way_is_run_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama", tmp_path / "model", max_position_embeddings=512)
    given = argparse.Namespace(rounds=1, windows=1, prompt_tokens=8, new_tokens=2, use="generate")
    asked: list[Path] = []

    def launch(model: Path, small: Path, way: run_packed.Way, folder: Path, *_: object) -> dict[str, int]:
        asked.append(run_packed.quantise(small, way, folder / "small-made"))
        return {"opened": 1_000_000, "peak": 2_000_000}

    monkeypatch.setattr(run_packed, "launch", launch)
    found = run_packed.study(model, tmp_path / "made", given)
    assert found["group_size"] == 32
    assert len(asked) == 2 * len(run_packed.WAYS)
    ways = found["ways"]
    assert ways["dense f32, transformers"]["to"]["dense f32, transformers"] == dict.fromkeys(
        ("prefill", "decode", "eval"), 1.0
    )
    # packed through transformers and here are one model
    one, other = ways["W4 bf16, transformers"], ways["W4 bf16, Rewright"]
    assert one["loss"] == pytest.approx(other["loss"], abs=0.05)
    assert other["weight_bytes"] < one["weight_bytes"]
    results = {"prompt_tokens": 8, "new_tokens": 2, "rounds": 1, "machine": {}, "command": "", "models": {"m": found}}
    assert all(f"| {way.name} |" in page(results) for way in run_packed.WAYS)
    taken = run_packed.memory(run_packed.WAYS[3], asked[6], asked[6], given)
    assert 0 <= taken["opened"] <= taken["peak"]
