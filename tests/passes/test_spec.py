"""Options as data: plain values in and out, bounds, and words that say what was wrong."""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewright.passes import registry
from rewright.passes.run_options import RunOptions
from rewright.passes.spec import Opt, fields_of, from_plain, to_plain
from rewright.passes.values import Bits, BitsFor, ByteSize, GroupSize, Pattern, Regex, SparsityFor


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """One option of every kind."""

    needed: Annotated[str, Opt("a text without default")]
    count: Annotated[int, Opt("whole", min=1, max=2**63 - 1)] = 4
    share: Annotated[float | None, Opt("a share", min=0, max=0.5)] = None
    least: Annotated[float, Opt("bounded below", min=-1)] = 0.0
    most: Annotated[int, Opt("bounded above", max=9)] = 0
    free: Annotated[float, Opt("any number")] = 0.0
    mode: Annotated[Literal["soft", "hard"], Opt("words")] = "soft"
    level: Annotated[Literal[2, 4], Opt("numbers")] = 4
    group: Annotated[GroupSize, Opt("a value")] = GroupSize(128)  # noqa: RUF009 - frozen
    pattern: Annotated[Pattern, Opt("another")] = Pattern()  # noqa: RUF009 - frozen
    even: Annotated[bool, Opt("on", negative="odd")] = True
    file: Annotated[Path | None, Opt("a file")] = None
    files: Annotated[tuple[Path, ...], Opt("files")] = ()
    words: Annotated[tuple[str, ...], Opt("words")] = ()
    haste: Annotated[int, Opt("speed only", affects="speed")] = 1


PATTERNS = st.sampled_from([Pattern(), Pattern(2, 4), Pattern(1, 2)])
GROUPS = st.builds(GroupSize, st.none() | st.integers(1, 10**6))
PATHS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1).map(Path)
OPTIONS = st.builds(
    Options,
    needed=st.text(),
    count=st.integers(1, 2**63 - 1),
    share=st.none() | st.floats(0, 0.5),
    least=st.floats(min_value=-1),
    most=st.integers(max_value=9),
    free=st.floats(allow_nan=False),
    mode=st.sampled_from(["soft", "hard"]),
    level=st.sampled_from([2, 4]),
    group=GROUPS,
    pattern=PATTERNS,
    even=st.booleans(),
    file=st.none() | PATHS,
    files=st.lists(PATHS).map(tuple),
    words=st.lists(st.text()).map(tuple),
    haste=st.integers(),
)
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(OPTIONS)
def test_plain_values_come_back(options: Options) -> None:
    plain = to_plain(options)
    assert from_plain(Options, plain) == options
    assert from_plain(Options, json.loads(json.dumps(plain))) == options
    assert {**to_plain(options, affects="result"), **to_plain(options, affects="speed")} == plain
    assert to_plain(options, affects="speed") == {"haste": options.haste}


@given(OPTIONS)
def test_every_item_is_read_from_its_word(options: Options) -> None:
    for item in fields_of(Options):
        value = getattr(options, item.name)
        for one in value if item.many else (value,):
            if one is not None:
                plain = item.plain(one)
                assert item.read(str(plain).lower() if item.type is bool else str(plain)) == one


@given(st.sampled_from(fields_of(Options)), JSON)
def test_whatever_is_given_is_read_or_refused(item: Any, raw: Any) -> None:
    """A recipe can say anything; never another error than ValueError, never a value out of bounds."""
    refused, options = "", Options(needed="")
    try:
        options = from_plain(Options, {"needed": "x", item.flag: raw})
    except ValueError as error:
        refused = str(error)
    if refused:
        assert refused.startswith(f"`{item.flag}` ")
        return
    assert from_plain(Options, to_plain(options)) == options
    value = getattr(options, item.name)
    if item.type in (int, float) and value is not None:
        assert type(value) is item.type
        assert item.opt.min is None or value >= item.opt.min
        assert item.opt.max is None or value <= item.opt.max


@pytest.mark.parametrize(
    ("plain", "said"),
    [
        ({}, "`needed` is required"),
        ({"needed": "x", "nedeed": 1}, "no option `nedeed`; there are needed, count, share"),
        ({"needed": None}, "`needed` takes one value, not `None`"),
        ({"needed": ["x"]}, "`needed` takes one value, not `['x']`"),
        ({"needed": 3}, "`needed` must be text, not `3`"),
        ({"count": 0}, "`count` must be from 1 to 9223372036854775807, not `0`"),
        ({"count": 1.5}, "`count` must be a whole number, not `1.5`"),
        ({"count": "1.0"}, "`count` must be a whole number, not `1.0`"),
        ({"count": True}, "`count` must be a whole number, not `True`"),
        ({"count": float("inf")}, "`count` must be a whole number, not `inf`"),
        ({"count": float("nan")}, "`count` must be a whole number, not `nan`"),
        ({"share": 0.51}, "`share` must be from 0 to 0.5, not `0.51`"),
        ({"share": "half"}, "`share` must be a number, not `half`"),
        ({"share": float("nan")}, "`share` must be from 0 to 0.5, not `nan`"),
        ({"least": -2}, "`least` must be at least -1, not `-2.0`"),
        ({"least": "nan"}, "`least` must be at least -1, not `nan`"),
        ({"most": 10}, "`most` must be at most 9, not `10`"),
        ({"free": "nan"}, "`free` must be a number, not `nan`"),
        ({"mode": "Soft"}, "`mode` must be one of soft, hard, not `Soft`"),
        ({"level": 3}, "`level` must be one of 2, 4, not `3`"),
        ({"level": True}, "`level` must be one of 2, 4, not `True`"),
        ({"group": "0"}, "`group` must be a number of columns or `channel`, not `0`"),
        ({"pattern": "4:2"}, "`pattern` must be `unstructured` or `N:M` with 0 < N < M, not `4:2`"),
        ({"even": "yes"}, "`even` must be true or false, not `yes`"),
        ({"even": 1}, "`even` must be true or false, not `1`"),
        ({"files": ["a", 3]}, "`files` must be text, not `3`"),
        ({"file": {"a": 1}}, "`file` takes one value, not `{'a': 1}`"),
        ({"words": None}, "`words` must be text, not `None`"),
    ],
)
def test_messages(plain: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(said)}"):
        from_plain(Options, plain if not plain or "needed" in plain else {"needed": "x", **plain})


def test_one_spelling_a_time() -> None:
    @dataclass(frozen=True)
    class Two:
        two_words: Annotated[int, Opt("a number")] = 0

    assert from_plain(Two, {"two-words": 1}) == from_plain(Two, {"two_words": 1}) == Two(1)
    with pytest.raises(ValueError, match=r"^`two-words` is given twice$"):
        from_plain(Two, {"two-words": 1, "two_words": 2})


def test_whole_numbers_however_they_are_written() -> None:
    for raw in (7, 7.0, "7", " 7 "):
        found = from_plain(Options, {"needed": "x", "count": raw}).count
        assert (found, type(found)) == (7, int)
    assert from_plain(RunOptions, {"seed": str(2**63 - 1)}).seed == 2**63 - 1
    assert from_plain(Options, {"needed": "x", "level": "2"}).level == 2


def test_one_item_stands_for_a_list() -> None:
    assert from_plain(Options, {"needed": "x", "files": "a"}).files == (Path("a"),)


BITS = st.builds(lambda n: Bits.parse(repr(n)), st.floats(2, 8) | st.sampled_from([2, 3, 4, 8, 16]))
EXPRESSIONS = st.text(st.characters(exclude_characters="\\()[]{}*+?|^$", exclude_categories=["Cs"]), min_size=1)
BITS_FOR = st.builds(BitsFor, EXPRESSIONS, st.sampled_from([2, 3, 4, 8, 16]))
SPARSITY_FOR = st.builds(SparsityFor, EXPRESSIONS, st.floats(0, 1, exclude_max=True))
SIZES = st.builds(
    ByteSize,
    st.integers(1, 2**63 - 1)
    | st.builds(lambda n, b, p: n * b**p, st.integers(1, 8), st.sampled_from([1000, 1024]), st.integers(1, 4)),
)


@given(PATTERNS | GROUPS | BITS | BITS_FOR | SPARSITY_FOR | SIZES | st.builds(Regex, EXPRESSIONS))
def test_values_are_read_from_their_text(value: Any) -> None:
    assert type(value).parse(str(value)) == value


KINDS = [Bits, BitsFor, SparsityFor, GroupSize, Pattern, ByteSize, Regex]


@given(st.sampled_from(KINDS), st.text() | st.text("q=.0123456789e-+ n:a(kMGTiB"))
def test_any_text_is_a_value_or_refused(kind: Any, text: str) -> None:
    with contextlib.suppress(ValueError):
        found = kind.parse(text)
        assert kind.parse(str(found)) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("q_proj=3", BitsFor("q_proj", 3)),
        ("a=b=16", BitsFor("a=b", 16)),
        (r"layers\.(0|1)\.= 4 ", BitsFor(r"layers\.(0|1)\.", 4)),
        ("q_proj=.25", SparsityFor("q_proj", 0.25)),
        ("q_proj=0", SparsityFor("q_proj", 0.0)),
        ("4.0", Bits(4)),
        ("3.5", Bits(3.5)),
        ("16", Bits(16)),
        ("16GiB", ByteSize(16 * 2**30)),
        ("5 GB", ByteSize(5 * 10**9)),
        ("1.5kB", ByteSize(1500)),
        ("0.5KiB", ByteSize(512)),
        ("9223372036854775807", ByteSize(2**63 - 1)),
    ],
)
def test_values_by_their_text(text: str, found: Any) -> None:
    assert type(found).parse(text) == found


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0",
        "0GB",
        "GB",
        "-1",
        "5gb",
        "5Gb",
        "5G",
        "1.0005kB",
        "1e9",
        "1,5GB",
        ".5GB",
        "8EiB",
        "9223372036854775808",
        "٣GB",
        "5GB\n",
    ],
)
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"^must be a size as `5GB`, `16GiB` or whole bytes, not "):
        ByteSize.parse(text)


@pytest.mark.parametrize("options", [RunOptions, *(spec.options for spec in registry.SPECS.values())])
def test_registered_options_fit_their_text_forms(options: type) -> None:
    """TOML and chain words cannot say `nothing`: it must be what an absent option means."""
    for item in fields_of(options):
        assert item.opt.help, item.name
        assert "." not in item.opt.help[-1:], item.name
        if item.many:
            assert item.default == ()
        if item.optional:
            assert item.default is None
        if not item.required and item.default is not None and not item.many:
            assert item.read(item.plain(item.default)) == item.default
    assert [item.name for item in fields_of(options)] == [item.name for item in fields(options)]
