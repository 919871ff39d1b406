"""`--require` and `--eval-text`: what is published only if it is good enough, and scores that are taken once."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewright.passes import bounds
from rewright.passes.errors import BoundError, StaleError, UsageError
from tests.passes.conftest import DATA, STORIES
from tests.passes.fakes import ACTS, fake, go
from tests.passes.forks import Forks
from tests.passes.outputs import beside, contents, stamp


def _document(*metrics: dict[str, Any] | None, evaluation: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"stages": [{"pass": "fake", "metrics": found} for found in metrics], "evaluation": evaluation}


@pytest.mark.parametrize(
    ("word", "holds"),
    [
        ("loss<2", True),
        ("loss<1", False),
        ("loss<=1", True),
        (" loss >= 1.0 ", True),
        ("loss>1e0", False),
        ("loss<inf", True),
        ("fake.loss<2", True),
        ("1.loss<2", False),
        ("2.loss<2", True),
        ("perplexity_ratio<1.05", True),
        ("count<4", True),
    ],
)
def test_a_bound_is_held(word: str, holds: bool) -> None:
    document = _document({"loss": 7.5}, {"loss": 1.0, "count": 3}, evaluation={"perplexity_ratio": 1.04, "text": {}})
    bounds.check_words([word])
    if holds:
        bounds.hold([word], document, "said")
        return
    with pytest.raises(BoundError) as caught:
        bounds.hold([word], document, "said")
    assert caught.value.hint == "said"


def test_a_missed_bound_names_both_numbers() -> None:
    with pytest.raises(BoundError, match=r"^`loss` is 7\.25, required < 2$"):
        bounds.hold(["loss<2"], _document({"loss": 7.25}), "")


@pytest.mark.parametrize(
    "word", ["", "loss", "loss<", "<1", "loss=1", "loss<one", "loss<<1", "1<loss", "loss<1 2", "a b<1"]
)
def test_what_is_no_bound(word: str) -> None:
    with pytest.raises(UsageError, match="is not a bound"):
        bounds.check_words([word])


@given(st.floats(allow_nan=True), st.floats(allow_nan=False, allow_infinity=False))
def test_nothing_that_is_not_a_number_meets_a_bound(value: float, limit: float) -> None:
    def held(sign: str) -> bool:
        try:
            bounds.hold([f"x{sign}{limit!r}"], _document({"x": value}), "")
        except BoundError:
            return False
        return True

    if math.isnan(value):
        assert not any(held(sign) for sign in ("<", "<=", ">", ">="))
    else:
        assert held("<") != held(">=")
        assert held(">") != held("<=")


@pytest.mark.parametrize("missing", [None, "text", []])
def test_a_metric_nobody_reports(missing: Any) -> None:
    with pytest.raises(UsageError, match="no stage reports `los`") as caught:
        bounds.hold(["los<1"], _document(None, {"loss": 1.0, "los": missing}), "")
    assert str(caught.value.hint).startswith("metrics: loss;")


def test_a_bad_bound_is_refused_before_any_work(forks: Forks, tmp_path: Path) -> None:
    for more in ((), ("--dry-run",), ("--check",)):
        ended = forks.run("compress", "--require", "loss", *more, STORIES, tmp_path / "out", "--method", "rtn")
        assert (ended.code, beside(tmp_path / "out")) == (2, []), ended.err


def test_a_missed_bound_publishes_nothing_and_a_relaxed_one_takes_no_time(tmp_path: Path) -> None:
    dst, ran = tmp_path / "out", []
    ACTS["count"] = lambda *_: ran.append(1)
    chain = (fake(act="count"), fake(act="count", level=7))
    with pytest.raises(BoundError) as caught:
        go(STORIES, dst, *chain, require=("2.level<7",))
    assert "nothing was published; the work is kept" in str(caught.value.hint)
    assert not dst.exists()
    assert sorted(path.name for path in dst.with_name("out.partial").iterdir()) == ["2-fake", "run.json"]
    with pytest.raises(UsageError, match="no stage reports `levl`"):
        go(STORIES, dst, *chain, require=("levl<8",))
    assert go(STORIES, dst, *chain, require=("2.level<8",))["state"] == "done"
    assert ran == [1, 1]
    assert beside(dst) == []


def test_a_missed_bound_leaves_the_previous_output(tmp_path: Path) -> None:
    dst = tmp_path / "out"
    go(STORIES, dst, fake(level=1))
    was = contents(dst)
    with pytest.raises(BoundError):
        go(STORIES, dst, fake(level=2), update=True, require=("level<2",))
    assert contents(dst) == was
    go(STORIES, dst, fake(level=2), update=True, require=("level<3",))
    assert stamp(dst)["stages"][0]["metrics"]["level"] == 2


@pytest.mark.parametrize("check", [True, False])
def test_a_current_output_is_held_to_the_bound_and_not_touched(check: bool, tmp_path: Path) -> None:
    """make deletes a target that a failing recipe has touched."""
    dst = tmp_path / "out"
    go(STORIES, dst)
    os.utime(dst / "rewright.json", ns=(10**18, 10**18))
    with pytest.raises(BoundError) as caught:
        go(STORIES, dst, require=("level<1",), check=check)
    assert caught.value.hint == f"`{dst}` stays as it is"
    assert (dst / "rewright.json").stat().st_mtime_ns == 10**18
    assert go(STORIES, dst, require=("level<2",), check=check)["state"] == "up-to-date"


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, int]]:
    """Scores without a model; what they were asked for, with how many threads."""
    asked: list[tuple[Path, int]] = []

    def evaluate(path: Path, *, text: Path, threads: int, inputs: Any, **_: Any) -> dict[str, Any]:
        asked.append((path, threads))
        return {"perplexity_ratio": 1.5, "text": {"name": text.name, "digest": inputs.digest(text)}}

    monkeypatch.setattr("rewright.passes.evaluate.evaluate", evaluate)
    return asked


def test_scores_are_taken_once(tmp_path: Path, scored: list[Any]) -> None:
    dst, text = tmp_path / "out", tmp_path / "text.txt"
    text.write_text("one")
    with pytest.raises(BoundError):
        go(STORIES, dst, eval_text=text, require=("perplexity_ratio<1.2",))
    document = go(STORIES, dst, eval_text=text, require=("perplexity_ratio<1.6",))
    assert document["evaluation"]["perplexity_ratio"] == 1.5
    assert go(STORIES, dst, eval_text=text)["evaluation"] == document["evaluation"] == stamp(dst)["evaluation"]
    assert go(STORIES, dst, eval_text=text, check=True)["evaluation"] == document["evaluation"]
    assert scored == [(dst.with_name("out.partial") / "1-fake", 1)]

    text.write_text("two")
    with pytest.raises(StaleError, match="has no scores on"):
        go(STORIES, dst, eval_text=text, check=True)
    assert len(scored) == 1
    go(STORIES, dst, eval_text=text)
    go(STORIES, dst, eval_text=text)
    assert scored[1:] == [(dst, 1)]
    assert stamp(dst)["evaluation"]["text"]["digest"] != document["evaluation"]["text"]["digest"]
    assert go(STORIES, dst)["evaluation"] is None
    assert stamp(dst)["files"].keys() == {path.name for path in dst.iterdir()} - {"rewright.json"}


def test_real_scores(forks: Forks, tmp_path: Path) -> None:
    text = tmp_path / "held_out.txt"
    text.write_bytes((DATA / "tinystories_heldout.txt").read_bytes()[:4000])
    words = ("--eval-text", text, "--threads", "1", "--json", STORIES, tmp_path / "out", "--method", "rtn")
    ended = forks.run("compress", "--require", "perplexity_ratio<1.0001", *words)
    assert ended.code == 5
    assert ended.err.startswith("error: `perplexity_ratio` is 1.")
    assert not (tmp_path / "out").exists()
    ended = forks.run("compress", "--require", "perplexity_ratio<1.5", *words)
    assert ended.code == 0, ended.err
    scores = json.loads(ended.out)["evaluation"]
    assert 1 < scores["perplexity_ratio"] == scores["perplexity"] / scores["other"]["perplexity"] < 1.5
    assert json.loads(forks.run("compress", *words).out)["evaluation"] == scores
