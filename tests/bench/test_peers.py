"""The study beside llm-compressor, on our side of it: no peer is installed where tests run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.bench import peers
from tests.bench.peer_llmcompressor import timed
from tests.bench.peers_page import page


def test_our_side_is_timed_and_scored_on_the_tokens_of_the_peers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = peers.Work("small", peers.DATA / "stories260K", 2, 32, 32)
    _, digest = peers.draw(work, tmp_path)
    found = peers.run_ours({}, work, digest, "W4 + 2:4", tmp_path / "out")
    assert found["wall_seconds"] > 0
    assert found["peak_bytes"] > found["bytes_before"] > 0
    scored = peers.score(work, "W4 + 2:4", tmp_path / "out")
    assert scored["cannot"] is None
    assert scored["zeros"]["blocks"] > 0
    assert scored["kl"] > 0
    monkeypatch.setattr(peers, "launch", lambda *_, **__: found)
    with pytest.raises(peers.RunError, match="other tokens"):
        peers.run_ours({}, work, "0", "W4 + 2:4", tmp_path / "out")
    results = {
        "command": "",
        "machine": {},
        "models": {
            "small": {
                "samples": 2,
                "length": 32,
                "group_size": 32,
                "dense": 4.0,
                "times": {"default": {"setting": "W4 + 2:4", **peers.summary([found])}},
                "scores": {"default": {"W4 + 2:4": scored, "W4": {"cannot": "no"}}},
            }
        },
    }
    written = page(results)
    assert f"{scored['perplexity']:.3f} ({scored['kl']:.4f}) | cannot |" in written
    assert "- `compress`, defaults, W4: cannot: no" in written


@pytest.mark.parametrize(
    ("setting", "share", "broken", "said"),
    [
        ("W4", 0.1, 0, None),
        ("W4 + 50 %", 0.5, 0, None),
        ("W4 + 50 %", 0.46, 0, "46.0% zeros, 40.0% in one matrix"),
        ("W4 + 2:4", 0.5, 1, "25.0% of the blocks hold too few zeros"),
    ],
)
def test_a_checkpoint_without_its_zeros_is_told(setting: str, share: float, broken: int, said: str | None) -> None:
    found: dict[str, Any] = {"share": share, "least": 0.4, "broken": broken, "blocks": 4}
    assert peers.verdict(setting, found) == said


def test_a_side_that_fails_says_why() -> None:
    with pytest.raises(peers.RunError, match="ValueError: no such mask"):
        peers.launch([sys.executable, "-c", "raise ValueError('no such mask')"], ours=False)


def test_the_clock_runs_around_the_call() -> None:
    ran: list[int] = []
    found = timed(lambda: ran.append(1), ("torch",))
    assert ran == [1]
    assert found["wall_seconds"] < 1
    assert found["versions"]["torch"]
