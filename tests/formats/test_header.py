"""Headers: what is refused, with which words, and what is read."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from rewright.formats.dtypes import BITS, from_torch, nbytes, to_torch
from rewright.formats.errors import FormatError
from rewright.formats.header import MAX_HEADER, encode_header, read_header
from rewright.formats.layout import TensorSpec
from rewright.formats.strict import MAX_DEPTH, read_json, strict_json
from tests.formats.samples import raw


def one(dtype: Any = "F32", shape: Any = (2,), span: Any = (0, 8), name: str = "w", **more: Any) -> dict[str, Any]:
    return {name: {"dtype": dtype, "shape": shape, "data_offsets": span, **more}}


BIG = 2**63
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "too few"),
    "seven bytes": (b"\0" * 7, "too few"),
    "header past the file": (raw(b"{}", length=3), "says its header has 3 bytes"),
    "header of 2^64 - 1": (raw(b"{}", length=2**64 - 1), "says its header"),
    "no header": (raw(b""), "does not start with a brace"),
    "blank first": (raw(b" {}"), "does not start with a brace"),
    "list": (raw(b"[]"), "does not start with a brace"),
    "not JSON": (raw(b'{"w": }'), "is not JSON"),
    "cut JSON": (raw(b'{"w": {"dtype": "F32"'), "brackets do not match"),
    "two documents": (raw(b"{}{}"), "is not JSON"),
    "not UTF-8": (raw(b'{"\xff": 1}'), "not UTF-8"),
    "half a surrogate": (raw(b'{"\\ud800": {"dtype":"F32","shape":[],"data_offsets":[0,4]}}', b"1234"), "surrogate"),
    "twice": (
        raw(
            b'{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
            b"1",
        ),
        "the key `w` twice",
    ),
    "twice inside": (raw(b'{"w":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"1"), "`dtype` twice"),
    "metadata twice": (raw(b'{"__metadata__":{},"__metadata__":{}}'), "twice"),
    "NaN": (raw(b'{"w":{"dtype":"U8","shape":[NaN],"data_offsets":[0,1]}}', b"1"), "`NaN`"),
    "deep": (raw(b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}"), "nested more than"),
    "very deep": (raw(b'{"a":' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}"), "nested more than"),
    "unclosed": (raw(b"{" + b"[" * 1_000_000), "brackets do not match"),
    "long number": (
        raw(b'{"w":{"dtype":"U8","shape":[' + b"9" * 100_000 + b'],"data_offsets":[0,1]}}', b"1"),
        "digits",
    ),
    "metadata of numbers": (raw({"__metadata__": {"a": 1}}), "`__metadata__`"),
    "metadata a list": (raw({"__metadata__": []}), "`__metadata__`"),
    "not an object": (raw({"w": 1}), "not described by an object"),
    "nothing said": (raw({"w": {}}), "unknown dtype"),
    "unknown dtype": (raw(one("F31"), b"0" * 8), "unknown dtype `F31`"),
    "dtype a list": (raw(one(["F32"]), b"0" * 8), "unknown dtype"),
    "shape a number": (raw(one(shape=2), b"0" * 8), "not a list of counts"),
    "shape negative": (raw(one(shape=[-2]), b"0" * 8), "not a list of counts"),
    "shape a fraction": (raw(one(shape=[2.0]), b"0" * 8), "not a list of counts"),
    "shape true": (raw(one(shape=[2, True]), b"0" * 8), "not a list of counts"),
    "shape past 64 bits": (raw(one(shape=[BIG]), b"0" * 8), "not a list of counts"),
    "shape overflows": (raw(one(shape=[2**40, 2**40]), b"0" * 8), "overflows"),
    "shape wraps to the span": (raw(one("U8", [2**33, 2**31 + 1], [0, 2**33]), b"0" * 8), "overflows"),
    "shape overflows, then zero": (raw(one(shape=[2**40, 2**40, 0], span=[0, 0])), "overflows"),
    "many axes": (raw(one("U8", [1] * 10_000, [0, 1]), b"0"), "10000 axes"),
    "enormous axes": (raw(one("U8", [2**62] * 100_000, [0, 1]), b"0"), "axes"),
    "span one number": (raw(one(span=[0]), b"0" * 8), "start and an end"),
    "span backwards": (raw(one(span=[8, 0]), b"0" * 8), "start and an end"),
    "span negative": (raw(one(span=[-8, 0]), b"0" * 8), "start and an end"),
    "span past the file": (raw(one(shape=[4], span=[0, 16]), b"0" * 8), "ends at byte 16 of 8"),
    "span far past the file": (raw(one("U8", [2**59], [0, 2**59]), b"0" * 8), "ends at byte"),
    "span unlike shape": (raw(one(shape=[3]), b"0" * 8), "takes 12"),
    "half a byte": (raw(one("F4", [3], [0, 1]), b"0"), "not whole bytes"),
    "gap in front": (raw(one(span=[8, 16]), b"0" * 16), "leaves 8 bytes unused"),
    "gap between": (raw(one() | one(span=[12, 20], name="v"), b"0" * 20), "leaves 4 bytes unused"),
    "overlap": (raw(one() | one(span=[4, 12], name="v"), b"0" * 12), "overlaps"),
    "same place": (raw(one() | one(name="v"), b"0" * 8), "overlaps"),
    "bytes after": (raw(one(), b"0" * 9), "1 bytes after"),
    "bytes of no tensor": (raw({}, b"0"), "1 bytes after"),
    "name climbs": (raw(one(name="../../etc/passwd"), b"0" * 8), "unsafe name"),
    "name climbs, backslashes": (raw(one(name="a\\..\\b"), b"0" * 8), "unsafe name"),
    "name absolute": (raw(one(name="/etc/passwd"), b"0" * 8), "unsafe name"),
    "name with NUL": (raw(one(name="a\0b"), b"0" * 8), "unsafe name"),
    "name with a line break": (raw(one(name="a\nb"), b"0" * 8), "unsafe name"),
    "LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 4567\n",
        "Git LFS pointer: the 4567 bytes",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_refuses(case: str, tmp_path: Path) -> None:
    data, words = HOSTILE[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(FormatError) as caught:
        read_header(path)
    message = str(caught.value)
    assert words in message
    assert str(path) in message
    assert "\n" not in message
    assert not message.endswith(".")
    assert len(message) < 500 + len(str(path))


def test_refuses_before_allocating(tmp_path: Path) -> None:
    """A legal length of 126 MB, in a file that has it, is refused by size, not read (sparse: no disk is used)."""
    path = tmp_path / "model.safetensors"
    path.write_bytes((126_000_000).to_bytes(8, "little"))
    os.truncate(path, 126_000_008)
    tracemalloc.start()
    with pytest.raises(FormatError, match="header of 126000000 bytes") as caught:
        read_header(path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    assert caught.value.hint
    assert MAX_HEADER == 100_000_000


@pytest.mark.parametrize("kind", ["absent", "dangling", "folder", "pipe"])
def test_refuses_what_is_no_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    if kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(FormatError, match=r"model\.safetensors"):
        read_header(path)


def test_reads_what_is_odd_and_legal(tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    document = {
        "__metadata__": None,
        "b": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [1, 4]},
        "": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1], "later": "field"},
        "empty": {"dtype": "F64", "shape": [0, 2**40], "data_offsets": [1, 1]},
        "ünï/cödé": {"dtype": "BOOL", "shape": [], "data_offsets": [4, 5]},
    }
    path.write_bytes(raw(json.dumps(document, ensure_ascii=False).encode() + b"   ", b"12345"))
    header = read_header(path)
    assert list(header.tensors) == ["", "empty", "b", "ünï/cödé"]
    assert header.metadata == {}
    assert header.tensors["empty"].shape == (0, 2**40)


def test_written_headers_are_the_librarys(tmp_path: Path) -> None:
    specs = [TensorSpec("bytes", "U8", (3,)), TensorSpec("wide", "F64", (2, 1)), TensorSpec("none", "F16", (0, 7))]
    head, places = encode_header(specs, {"format": "pt"})
    assert len(head) % 8 == 0
    assert places == {"wide": (0, 16), "none": (16, 16), "bytes": (16, 19)}
    path = tmp_path / "x.safetensors"
    path.write_bytes(head + torch.tensor([[1.0], [2.0]], dtype=torch.float64).numpy().tobytes() + b"abc")
    loaded = safetensors.torch.load_file(path)
    assert loaded["wide"].flatten().tolist() == [1.0, 2.0]
    assert bytes(loaded["bytes"].tolist()) == b"abc"
    assert loaded["none"].shape == (0, 7)


@pytest.mark.parametrize("names", [["w", "w"], ["__metadata__"]])
def test_writes_no_name_twice(names: list[str]) -> None:
    with pytest.raises(FormatError, match="twice"):
        encode_header([TensorSpec(name, "U8", (1,)) for name in names])


def test_dtypes_agree_with_torch() -> None:
    computable = [code for code in BITS if to_torch(code) is not None]
    assert set(BITS) - set(computable) == {"F4", "F6_E2M3", "F6_E3M2"}
    for code in computable:
        dtype = to_torch(code)
        assert dtype is not None
        assert dtype.itemsize * 8 == BITS[code]
        assert from_torch(dtype) == code
    with pytest.raises(FormatError, match="complex128"):
        from_torch(torch.complex128)
    assert nbytes("F4", (3, 2)) == 3
    with pytest.raises(FormatError, match="no safetensors dtype"):
        nbytes("F1", ())


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "expecting value at line 1"),
        (b'{"a": Infinity}', "`Infinity`"),
        (b'{"a": -Infinity}', "`-Infinity`"),
        (b'{"a": 1e999}', "too large"),
        (b'{"a": 1, "a": 2}', "the key `a` twice"),
        (b'{"a": {"b": [{"c": 1, "c": 1}]}}', "the key `c` twice"),
        (b"\xef\xbb\xbf{}", "is not JSON"),
        (b'{"a": "\xe9"}', "not UTF-8 at byte 7"),
        (b"{'a': 1}", "is not JSON"),
        (b'{"a": "\n"}', "is not JSON"),
        (b'["' + b"[" * 99 + b'"', "do not match"),
    ],
)
def test_strict_json_refuses(data: bytes, words: str) -> None:
    with pytest.raises(FormatError, match="config") as caught:
        strict_json(data, "config")
    assert words in str(caught.value)


def test_strict_json_takes_the_rest() -> None:
    deepest = b"[" * MAX_DEPTH + b"]" * MAX_DEPTH
    assert strict_json(deepest, "x") == json.loads(deepest)
    text = '{"brackets": "]]}}[[\\"{{", "\\ud83d\\ude00": "é", "big": 123456789012345678901234567890, "f": -1.5e-7}'
    assert strict_json(text.encode(), "x") == json.loads(text)


def test_read_json_knows_pointers(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 99\n")
    with pytest.raises(FormatError, match="99 bytes") as caught:
        read_json(path)
    assert "git lfs pull" in (caught.value.hint or "")
