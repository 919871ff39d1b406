"""Editing JSON as text."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewright.formats.errors import FormatError
from rewright.formats.jsonedit import edit_object

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
# Half surrogates cannot be written as UTF-8.
CLEAN = VALUES.filter(lambda value: not any("\ud800" <= c <= "\udfff" for c in json.dumps(value, ensure_ascii=False)))
KEYS = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)


@settings(deadline=None)
@given(
    st.dictionaries(KEYS, CLEAN, max_size=5),
    st.dictionaries(KEYS, CLEAN, max_size=4),
    st.sampled_from([None, 0, 1, 2, 4, "\t"]),
    st.booleans(),
    st.data(),
)
def test_is_an_update(
    old: dict[str, Any], changes: dict[str, Any], indent: int | str | None, ascii_only: bool, data: st.DataObject
) -> None:
    remove = data.draw(st.lists(st.sampled_from(sorted(old)), max_size=2)) if old else []
    text = json.dumps(old, indent=indent, ensure_ascii=ascii_only)
    edited = edit_object(text.encode(), changes, remove, "x").decode()
    expected = {key: value for key, value in (old | changes).items() if key not in remove}
    assert json.loads(edited) == expected
    assert list(json.loads(edited)) == list(expected)
    if not changes and not remove:
        assert edited == text or not old


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b'{"a": 1}', b'{"a": 1, "z": 0}'),
        (b'{"a":1e-05,"b":"\\u00e9"}\n', b'{"a":1e-05, "b":"\\u00e9", "z": 0}\n'),
        (b'{\r\n    "a": 1.50\r\n}\r\n', b'{\r\n    "a": 1.50,\r\n    "z": 0\r\n}\r\n'),
        (b'  {\n\t"a" : [ 1,\n 2 ]\n}', b'  {\n\t"a" : [ 1,\n 2 ],\n\t"z": 0\n}'),
    ],
)
def test_untouched_members_keep_their_bytes(before: bytes, after: bytes) -> None:
    assert edit_object(before, {"z": 0}, (), "x") == after


@pytest.mark.parametrize("data", [b"[]", b"1", b"", b'{"a": NaN}', b'{"a": 1, "a": 2}'])
def test_refuses(data: bytes) -> None:
    with pytest.raises(FormatError):
        edit_object(data, {}, (), "x")
