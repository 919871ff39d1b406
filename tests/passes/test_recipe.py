"""Recipes and chain words: what is printed is what is read, and what cannot be meant is named."""

from __future__ import annotations

import contextlib
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewright.cli.chain import split, stage_of
from rewright.formats.errors import Refusal
from rewright.passes import recipe
from rewright.passes.compress.spec import COMPRESS, CompressOptions
from rewright.passes.errors import InputError, UsageError
from rewright.passes.recipe import Stage
from rewright.passes.spec import to_plain
from rewright.passes.values import Bits, BitsFor, GroupSize, Pattern, Regex, SparsityFor

TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)


def _is_regex(text: str) -> bool:
    with contextlib.suppress(ValueError):
        return bool(Regex.parse(text))
    return False


def _options(**given: Any) -> CompressOptions | None:
    """Options of draws, less the commonest contradictions; None where there are others."""
    if given["format"] == "bitmask-w4":
        given.update(bits=Bits(4), bits_for=(), symmetric=True, budget="flat", pattern=Pattern(2, 4))
    if given["method"] != "gptq":
        given["budget"] = "flat"
    if given["budget"] == "flat" and not given["bits"].whole:
        given["bits"] = Bits(3)
    if given["pattern"].of is not None:
        given.update(sparsity=None, sparsity_for=())
    elif given["method"] in ("magnitude", "wanda") or given["bits"].number == 16:
        given["sparsity"] = given["sparsity"] or 0.5
    prunes = given["pattern"].of or given["sparsity"] or any(one.sparsity for one in given["sparsity_for"])
    if given["method"] != "gptq" or not prunes:
        given.update(mask_block=None, saliency="obs")
    if given["mask"] != "sweep":
        given["saliency"] = "obs"
    if given["method"] in ("gptq", "wanda"):
        given["calibration_text"] = given["calibration_text"] or (Path("text"),)
    try:
        return CompressOptions(**given)
    except UsageError:
        return None


COMPRESSES = st.builds(
    _options,
    bits=st.sampled_from([Bits(2), Bits(3), Bits(3.5), Bits(4), Bits(8), Bits(16)]),
    budget=st.sampled_from(["flat", "measured"]),
    group_size=st.builds(GroupSize, st.none() | st.integers(1, 4096)),
    symmetric=st.booleans(),
    sparsity=st.none() | st.floats(0, 0.99),
    pattern=st.sampled_from([Pattern(), Pattern(2, 4), Pattern(1, 2)]),
    method=st.sampled_from(["gptq", "rtn", "magnitude", "wanda"]),
    target=st.sampled_from(["dense", "own"]),
    mask=st.sampled_from(["admm", "sweep", "keep"]),
    mask_block=st.none() | st.integers(1),
    saliency=st.sampled_from(["quant-aware", "obs"]),
    clip=st.sampled_from(["hdiag", "minmax", "mse"]),
    sequential=st.sampled_from(["module", "layer"]),
    refine=st.integers(0, 100),
    damp=st.floats(0, 1),
    bits_for=st.lists(st.sampled_from([BitsFor("a=b", 3), BitsFor("v_proj", 8)]), max_size=2).map(tuple),
    sparsity_for=st.lists(st.sampled_from([SparsityFor("a=b", 0.1), SparsityFor("up", 0.0)]), max_size=2).map(tuple),
    calibration_text=st.lists(TEXT.map(Path), max_size=3).map(tuple),
    samples=st.integers(1),
    sequence_length=st.none() | st.integers(2),
    skip=st.lists(TEXT.filter(_is_regex).map(Regex), max_size=3).map(tuple),
    format=st.sampled_from(["pack-quantized", "bitmask-w4", "dense"]),
).filter(lambda options: options is not None)
STAGES = st.lists(COMPRESSES.map(lambda options: Stage(COMPRESS, options)), min_size=1, max_size=3).map(tuple)


@given(STAGES)
def test_a_recipe_reads_as_it_was_written(stages: tuple[Stage, ...]) -> None:
    assert recipe.parse(recipe.dump(stages)) == stages


@settings(deadline=None, max_examples=50)
@given(STAGES)
def test_chain_words_read_as_they_were_written(stages: tuple[Stage, ...]) -> None:
    words = recipe.words(stages)
    assert tuple(stage_of(number, said) for number, said in enumerate(split(words), start=1)) == stages


@given(STAGES)
def test_a_stamp_gives_its_stages_back(stages: tuple[Stage, ...]) -> None:
    made = [{"pass": stage.spec.name, "options": to_plain(stage.options), "seconds": 1} for stage in stages]
    assert recipe.stages_of_stamp({"stages": made}) == stages


@given(STAGES, st.data())
def test_set_says_what_a_recipe_says(stages: tuple[Stage, ...], data: st.DataObject) -> None:
    """An option set from a word is the option written into the recipe."""
    number = data.draw(st.integers(1, len(stages)))
    table = tomllib.loads(recipe.dump(stages))["stage"][number - 1]
    words = [f"{number}.{key}={value}" for key, value in table.items() if isinstance(value, int | float)]
    words = [word.replace("=True", "=true").replace("=False", "=false") for word in words]
    assert recipe.parse(recipe.dump(stages), words) == stages


def test_a_recipe_has_only_what_differs_from_the_defaults() -> None:
    options = CompressOptions(method="rtn", bits=Bits(3), symmetric=False, skip=(Regex("a"), Regex("b")))
    said = (
        '[[stage]]\npass = "compress"\nbits = 3\nsymmetric = false\nmethod = "rtn"\nskip = [\n    "a",\n    "b",\n]\n'
    )
    assert recipe.dump([Stage(COMPRESS, options)]) == said
    words = ["compress", "--bits", "3", "--asymmetric", "--method", "rtn", "--skip", "a", "--skip", "b"]
    assert recipe.words([Stage(COMPRESS, options)]) == words
    assert recipe.words([Stage(COMPRESS, options)] * 2) == [*words, "+", *words]


ONE = '[[stage]]\npass = "compress"\nmethod = "rtn"\n'


@pytest.mark.parametrize(
    ("sets", "changed"),
    [
        (["compress.bits=3"], {"bits": Bits(3)}),
        (["1.bits=8", "compress.bits=3"], {"bits": Bits(3)}),
        (["1.group_size=32"], {"group_size": GroupSize(32)}),
        (["1.group-size=channel"], {"group_size": GroupSize(None)}),
        (["1.symmetric=false"], {"symmetric": False}),
        (["1.pattern=2:4"], {"pattern": Pattern(2, 4)}),
        (["1.damp=1e-3"], {"damp": 0.001}),
        (["1.skip=12"], {"skip": (Regex("12"),)}),
        (['1.skip=["a", "b c"]'], {"skip": (Regex("a"), Regex("b c"))}),
        (['1.skip="a, b"'], {"skip": (Regex("a, b"),)}),
        (["1.skip=a=b"], {"skip": (Regex("a=b"),)}),
        (["1.calibration-text=2020-01-01"], {"calibration_text": (Path("2020-01-01"),)}),
        (["1.calibration-text=a b.txt"], {"calibration_text": (Path("a b.txt"),)}),
        (["1.calibration-text=" + "[" * 5000], {"calibration_text": (Path("[" * 5000),)}),
        (["1.skip=3\nbits = 2"], {"skip": (Regex("3\nbits = 2"),)}),
    ],
)
def test_set(sets: Sequence[str], changed: dict[str, Any]) -> None:
    (stage,) = recipe.parse(ONE, sets)
    assert stage.options == CompressOptions(**{"method": "rtn", **changed})


@pytest.mark.parametrize(
    ("text", "sets", "said"),
    [
        ("stage = ", [], "the recipe is not TOML: "),
        ("a = " + "[" * 5000, [], "the recipe is not TOML: "),
        (f"a = {'9' * 5000}", [], "the recipe is not TOML: "),
        ("", [], "the recipe has no stage"),
        ("stage = 3", [], "the recipe has no stage"),
        ("stage = []", [], "the recipe has no stage"),
        ("[stage]\npass = 'compress'", [], "the recipe has no stage"),
        (f"seed = 1\n{ONE}", [], "the recipe has `seed`"),
        ("stage = [1]", ["1.bits=3"], 'stage 1 has no `pass = "NAME"`'),
        ("[[stage]]\nbits = 3", ["compress.bits=3"], 'stage 1 has no `pass = "NAME"`'),
        (f"{ONE}[[stage]]\npass = 3", [], 'stage 2 has no `pass = "NAME"`'),
        (f"{ONE}[[stage]]\npass = 'compres'", [], "stage 2 (compres): no pass `compres`"),
        (f"{ONE}bitz = 3", [], "stage 1 (compress): no option `bitz`"),
        (f"{ONE}bits = 5", [], "stage 1 (compress): `--bits 5` can only be an average"),
        (f"{ONE}bits = 2020-01-01", [], "stage 1 (compress): `bits` must be 2, 3, 4, 8, 16 or an average"),
        (f"{ONE}damp = 2020-01-01", [], "stage 1 (compress): `damp` must be a number, not `2020-01-01`"),
        (f"{ONE}samples = inf", [], "stage 1 (compress): `samples` must be a whole number, not `inf`"),
        (f"{ONE}skip = [[1]]", [], "stage 1 (compress): `skip` must be text, not `[1]`"),
        (f"{ONE}skip = true", [], "stage 1 (compress): `skip` must be text, not `True`"),
        (f"{ONE}skip = ['(']", [], "stage 1 (compress): `skip` `(` is not a regular expression: "),
        (f"{ONE}calibration-text = 3", [], "stage 1 (compress): `calibration-text` must be text, not `3`"),
        (f"{ONE}group-size = 2\ngroup_size = 3", [], "stage 1 (compress): `group-size` is given twice"),
        (f"{ONE}bits = 16", [], "stage 1 (compress): `--bits 16` without `--sparsity` leaves nothing to do"),
        (ONE, ["bits=3"], "`--set bits=3` is not `pass.option=value`"),
        (ONE, ["compress.bits"], "`--set compress.bits` is not `pass.option=value`"),
        (ONE, ["compress.=3"], "`--set compress.=3` is not `pass.option=value`"),
        (ONE, ["1.pass=other"], "`--set 1.pass=other` is not `pass.option=value`"),
        (ONE, ["2.bits=3"], "`--set 2.bits=3` names no stage"),
        (ONE + ONE, ["compress.bits=3"], "`--set compress.bits=3` names several stages"),
        (ONE, ["1.bits="], "stage 1 (compress): `bits` must be 2, 3, 4, 8, 16 or an average between 2 and 8, not ``"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_named(text: str, sets: Sequence[str], said: str) -> None:
    with pytest.raises(UsageError, match=f"^{re.escape(said)}") as caught:
        recipe.parse(text, sets)
    assert "\n" not in caught.value.message


@given(st.text() | st.text("[]{}=.,'\"\n stagepbi1234567890-:TZ"), st.lists(st.text(), max_size=2))
def test_any_text_is_a_recipe_or_refused(text: str, sets: list[str]) -> None:
    for said in (text, ONE + text):
        with contextlib.suppress(Refusal):
            assert recipe.parse(said, sets)


@pytest.mark.parametrize("stages", [None, {}, [], [3], [{"pass": "compress"}], [{"pass": "compress", "options": 3}]])
def test_a_stamp_that_does_not_say(stages: Any) -> None:
    with pytest.raises(InputError, match="does not say which passes"):
        recipe.stages_of_stamp({} if stages is None else {"stages": stages})
    with pytest.raises(UsageError, match="no pass `gone`"):
        recipe.stages_of_stamp({"stages": [{"pass": "gone", "options": {}}]})
