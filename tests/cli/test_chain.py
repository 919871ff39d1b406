"""The grammar of `chain` and `run`."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rewright.cli.chain import split, stage_of
from rewright.passes import recipe, registry
from rewright.passes.errors import UsageError
from rewright.passes.recipe import Stage
from rewright.passes.run_options import RunOptions
from rewright.passes.values import Pattern

from .conftest import FAKE, FakeOptions


def test_stages_are_split_at_plus(call: Any, pipeline: Any) -> None:
    words = shlex.split("--seed 3 src dst fake --size 1 + fake --inputs + --mode hard")
    ended = call("chain", *words)
    assert ended.code == 2, "`--inputs` has no value: `+` ends the stage whatever stands before it"
    words = shlex.split("--seed 3 src dst fake --size 1 + fake --inputs=+ --mode hard")
    assert call("chain", *words).code == 0
    (run,) = pipeline.runs
    assert run.options == RunOptions(seed=3)
    assert [stage.options for stage in run.stages] == [
        FakeOptions(size=1),
        FakeOptions(inputs=(Path("+"),), mode="hard"),
    ]


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        ("src dst fake --seed 3", "stage 1 (fake): no option `--seed`", "`--seed` is a run option: put it before SRC"),
        ("src dst fake + fake -q", "stage 2 (fake): no option `-q`", "`-q` is a run option: put it before SRC"),
        ("src dst -v fake", "stage 1 starts with `-v`, which is no pass", "`-v` is a run option: put it before SRC"),
        ("src dst --size fake", "stage 1 starts with `--size`, which is no pass", None),
        ("src dst fake + fakee", "stage 2: no pass `fakee`", "did you mean `fake`?"),
        ("src dst fake --sise 3", "stage 1 (fake): no option `--sise`", "did you mean `--size`?"),
        ("src dst fake --size 99", "stage 1 (fake): `--size` must be from 1 to 9, not `99`", None),
        ("src dst fake fake", "stage 1 (fake): unexpected word `fake`", "put `+` between two passes"),
        ("src dst fake + ", "stage 2 of the chain is empty", "a chain is `PASS [OPTIONS] + PASS [OPTIONS] ...`"),
        ("src dst + fake", "stage 1 of the chain is empty", "a chain is `PASS [OPTIONS] + PASS [OPTIONS] ...`"),
        ("src dst", "missing argument `STAGE`", None),
        ("--emit json src dst fake", "`--emit` must be toml, not `json`", None),
    ],
)  # fmt: skip
def test_refusals_name_stage_and_word(call: Any, pipeline: Any, words: str, message: str, hint: str | None) -> None:
    ended = call("chain", *shlex.split(words))
    assert ended.code == 2
    assert ended.err == f"error: {message}\n" + (f"\nhint: {hint}\n" if hint else "")
    assert not pipeline.runs


def test_help_inside_a_stage(call: Any, pipeline: Any) -> None:
    ended = call("chain", "src", "dst", "fake", "--help")
    assert (ended.code, ended.err) == (0, "")
    assert "Usage: rewright chain SRC DST fake" in ended.out
    assert "Pass options" in ended.out
    assert "Run options" not in ended.out
    assert not pipeline.runs


def test_emitted_recipe_runs_the_same_stages(call: Any, pipeline: Any, tmp_path: Path) -> None:
    stages = shlex.split("fake --size 3 --pattern 1:2 + fake --odd --share 0.25")
    emitted = call("chain", "--emit", "toml", "src", "dst", *stages)
    assert emitted.code == 0
    assert not pipeline.runs
    file = tmp_path / "recipe [red] ü.toml"
    file.write_text(emitted.out, encoding="utf-8")
    assert call("chain", "src", "dst", *stages).code == 0
    assert call("run", str(file), "src", "dst").code == 0
    assert call("run", str(file), "src", "dst", "--set", "2.size=5", "--seed", "1").code == 0
    chained, read, changed = pipeline.runs
    assert chained == read
    assert changed.stages[1].options == FakeOptions(even=False, share=0.25, size=5)
    assert changed.options == RunOptions(seed=1)


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        (b"[[stage]]\npass = 'fake'\nbogus = 1", 2, "stage 1 (fake): no option `bogus`"),
        (b"[[stage]]\npass = 'fakr'", 2, "stage 1 (fakr): no pass `fakr`"),
        (b"stage = ", 2, "the recipe is not TOML"),
        (b"\xff", 3, "is not UTF-8: byte 0"),
        (None, 3, "cannot read recipe"),
    ],
)
def test_bad_recipes(call: Any, pipeline: Any, tmp_path: Path, text: bytes | None, code: int, said: str) -> None:
    file = tmp_path / "recipe.toml"
    if text is not None:
        file.write_bytes(text)
    ended = call("run", str(file), "src", "dst")
    assert ended.code == code
    assert said in ended.err.splitlines()[0]


def test_json_is_one_document_dry_or_not(call: Any, pipeline: Any) -> None:
    dry = json.loads(call("chain", "--dry-run", "--json", "src", "dst", "fake").out)
    real = json.loads(call("chain", "--json", "src", "dst", "fake").out)
    assert dry.keys() == real.keys()
    assert (dry["state"], real["state"]) == ("fresh", "done")


def test_dry_run_is_told_on_stderr(call: Any, pipeline: Any) -> None:
    ended = call("fake", "--dry-run", "src", "dst")
    assert (ended.code, ended.out) == (0, "")
    for text in ("dst: nothing is there yet", "stage 1: fake", "1.2 kB", "about 2.0 s", "a.weight"):
        assert text in ended.err


def _stages() -> st.SearchStrategy[tuple[Stage, ...]]:
    texts = st.text(st.characters(codec="utf-8", exclude_characters="\0", exclude_categories=("Cs",)), min_size=1)
    patterns = st.sampled_from([Pattern(), Pattern(2, 4), Pattern(1, 2)])
    options = st.builds(
        FakeOptions,
        size=st.sampled_from([1, 2, 4, 9]),
        share=st.none() | st.floats(0, 1),
        mode=st.sampled_from(["soft", "hard"]),
        level=st.sampled_from([2, 4]),
        pattern=patterns,
        inputs=st.lists(texts.map(Path), max_size=3).map(tuple),
        even=st.booleans(),
        loud=st.booleans(),
    )
    return st.lists(options.map(lambda made: Stage(FAKE, made)), min_size=1, max_size=3).map(tuple)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stages=_stages())
def test_words_and_recipes_round_trip(monkeypatch: pytest.MonkeyPatch, stages: tuple[Stage, ...]) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(registry.SPECS, "fake", FAKE)
        assert recipe.parse(recipe.dump(stages)) == stages
        words = recipe.words(stages)
        if "+" not in [str(path) for stage in stages for path in stage.options.inputs]:
            again = tuple(stage_of(number, said) for number, said in enumerate(split(words), start=1))
            assert again == stages


def test_split_keeps_words_verbatim() -> None:
    assert split(["a", "--x", "b+c", "+", "d", "--", "++"]) == [["a", "--x", "b+c"], ["d", "--", "++"]]
    with pytest.raises(UsageError):
        split(["+"])
