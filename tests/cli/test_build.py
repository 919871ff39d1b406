"""Options on the command line, from a dataclass."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from rewright.passes.run_options import RunOptions
from rewright.passes.values import Pattern

from .conftest import FakeOptions


def _options(pipeline: Any) -> FakeOptions:
    (run,) = pipeline.runs
    (stage,) = run.stages
    options = stage.options
    assert isinstance(options, FakeOptions)
    return options


def test_defaults(call: Any, pipeline: Any) -> None:
    ended = call("fake", "src", "dst")
    assert (ended.code, ended.out) == (0, "")
    assert _options(pipeline) == FakeOptions()
    assert pipeline.runs[0].options == RunOptions()
    assert (pipeline.runs[0].src, pipeline.runs[0].dst) == (Path("src"), Path("dst"))


def test_every_kind_of_option(call: Any, pipeline: Any) -> None:
    words = shlex.split("--size 3 --share 0.5 --mode hard --level 2 --pattern 2:4 --inputs a --inputs b --odd --loud")
    assert call("fake", *words, "src", "dst").code == 0
    assert _options(pipeline) == FakeOptions(
        size=3,
        share=0.5,
        mode="hard",
        level=2,
        pattern=Pattern(2, 4),
        inputs=(Path("a"), Path("b")),
        even=False,
        loud=True,
    )


def test_run_options_stand_anywhere_in_a_pass_command(call: Any, pipeline: Any) -> None:
    words = ("--require", "loss<1", "src", "dst", "--seed", "7", "--require", "kl<1", "-vv", "--dtype", "bf16")
    assert call("fake", *words).code == 0
    assert pipeline.runs[0].options == RunOptions(seed=7, require=("loss<1", "kl<1"), verbose=2, dtype="bf16")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--size", "10"), "`--size` must be from 1 to 9, not `10`"),
        (("--size", "x"), "`--size` must be a whole number, not `x`"),
        (("--size", "7"), "`--size 7` is never right"),
        (("--level", "3"), "`--level` must be one of 2, 4, not `3`"),
        (("--mode", "softer"), "`--mode` must be one of soft, hard, not `softer`"),
        (("--pattern", "4:2"), "`--pattern` must be `unstructured` or `N:M` with 0 < N < M, not `4:2`"),
        (("--share", "nan"), "`--share` must be from 0 to 1, not `nan`"),
        (("--threads", "0"), "`--threads` must be from 1 to 1024, not `0`"),
        (("--seed", "-1"), "`--seed` must be from 0 to 9223372036854775807, not `-1`"),
        (("--size",), "option `--size` requires an argument"),
        (("third",), "unexpected word `third`"),
    ],
)
def test_a_bad_value_is_named(call: Any, pipeline: Any, words: tuple[str, ...], said: str) -> None:
    ended = call("fake", "src", "dst", *words)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err == f"error: {said}\n"
    assert not pipeline.runs


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("fake", "--syze", "3"), "error: no option `--syze`\n\nhint: did you mean `--size`?\n"),
        (("fakes",), "error: no command or pass `fakes`\n\nhint: did you mean `fake`?\n"),
        (("fake",), "error: missing argument `SRC`\n"),
    ],
)
def test_the_nearest_word_is_suggested(call: Any, pipeline: Any, words: tuple[str, ...], said: str) -> None:
    ended = call(*words)
    assert (ended.code, ended.err) == (2, said)


def test_help_shows_both_panels_bounds_and_brackets(call: Any, pipeline: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    ended = call("fake", "--help")
    assert ended.code == 0
    for text in ("Pass options", "Run options", "1..9", "soft|hard", "[in brackets]", "--odd", "A Paper (2020)"):
        assert text in ended.out
    assert ended.out.index("Pass options") < ended.out.index("--size") < ended.out.index("Run options")


def test_dashes_end_the_options(call: Any, pipeline: Any) -> None:
    assert call("fake", "--", "-src", "--dst").code == 0
    assert (pipeline.runs[0].src, pipeline.runs[0].dst) == (Path("-src"), Path("--dst"))
