"""Properties: any layout makes the round trip, and no change to a file's bytes leads to a wrong tensor."""

from __future__ import annotations

import json
import struct
import tempfile
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rewright.formats.checkpoint import Checkpoint
from rewright.formats.draft import Draft, TensorSpec
from rewright.formats.dtypes import BITS, nbytes, to_torch
from rewright.formats.errors import FormatError
from rewright.formats.header import check_name, encode_header, read_header
from tests.formats.samples import tensors


def _safe(name: str) -> bool:
    try:
        check_name(name, "x")
    except FormatError:
        return False
    return name != "__metadata__"


NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(_safe)
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)
WHOLE = [code for code in BITS if BITS[code] % 8 == 0]


@st.composite
def layouts(draw: st.DrawFn) -> list[TensorSpec]:
    names = draw(st.lists(NAMES, max_size=8, unique=True))
    specs = []
    for name in names:
        code, shape = draw(st.sampled_from(sorted(BITS))), draw(SHAPES)
        if BITS[code] % 8:
            shape = (*shape, 4)
        specs.append(TensorSpec(name, code, shape))
    return specs


def deserialize(data: bytes) -> dict[str, Any] | None:
    """What the safetensors library reads; None for what it refuses."""
    try:
        return dict(safetensors.deserialize(data))  # type: ignore[no-untyped-call] # the library has no types here
    except safetensors.SafetensorError:
        return None


@settings(max_examples=60, deadline=None)
@given(layouts(), st.sampled_from([1, 50, 10**9]), st.randoms(use_true_random=False))
def test_round_trip(layout: list[TensorSpec], most: int, random: Any) -> None:
    """Written by us, read by us and by the safetensors library: equal bytes under equal names."""
    with tempfile.TemporaryDirectory() as folder:
        draft = Draft(folder)
        draft.declare(layout, most)
        expected: dict[str, bytes] = {}
        for spec in layout:
            expected[spec.name] = random.randbytes(spec.nbytes)
            dtype = to_torch(spec.dtype)
            if dtype is None:
                source = Path(folder, ".rewright-source.safetensors")
                source.write_bytes(encode_header([spec])[0] + expected[spec.name])
                draft.copy(spec.name, Checkpoint.open(source))
            else:
                flat = torch.frombuffer(bytearray(expected[spec.name] or b"\0"), dtype=torch.uint8)[: spec.nbytes]
                draft.write(spec.name, flat.view(dtype).reshape(spec.shape))
        draft.put("config.json", b"{}")
        draft.seal({})
        ckpt = Checkpoint.open(folder)
        assert ckpt.entries.keys() == expected.keys()
        for spec in layout:
            entry = ckpt.entries[spec.name]
            assert (entry.dtype, entry.shape, entry.nbytes) == (spec.dtype, spec.shape, spec.nbytes)
            assert b"".join(ckpt.chunks(spec.name, 3)) == expected[spec.name]
        for file in ckpt.files:
            for name, value in (deserialize(file.read_bytes()) or {}).items():
                assert bytes(value["data"]) == expected[name]
                assert tuple(value["shape"]) == ckpt.entries[name].shape


# A file of the safetensors library: six tensors, metadata, about a kilobyte.
ORIGINAL: bytes = safetensors.torch.save(tensors(), {"format": "pt"})


def agrees(data: bytes, path: Path) -> bool:
    """Read `data` with both readers. True when we read it: then every tensor is the library's, bit for bit."""
    path.write_bytes(data)
    theirs = deserialize(data)
    try:
        ckpt = Checkpoint.open(path)
    except FormatError:
        return False
    assert theirs is not None, "read a file that the library refuses"
    assert ckpt.entries.keys() == theirs.keys()
    for name, value in theirs.items():
        entry = ckpt.entries[name]
        assert tuple(value["shape"]) == entry.shape
        assert b"".join(ckpt.chunks(name)) == bytes(value["data"])
        if to_torch(entry.dtype) is not None:
            tensor = ckpt.read(name)
            assert tensor.shape == entry.shape
            assert tensor.nbytes == entry.nbytes
    return True


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mutants") / "m.safetensors"


MUTANT = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@MUTANT
@given(st.lists(st.tuples(st.integers(0, len(ORIGINAL) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_bytes(scratch: Path, changes: list[tuple[int, int]]) -> None:
    data = bytearray(ORIGINAL)
    for at, value in changes:
        data[at] = value
    agrees(bytes(data), scratch)


def test_every_byte_of_the_header_flipped(scratch: Path) -> None:
    """Each bit of length and header, one at a time."""
    (length,) = struct.unpack("<Q", ORIGINAL[:8])
    read = 0
    for at in range(8 + length):
        for bit in (1, 4, 32):
            data = bytearray(ORIGINAL)
            data[at] ^= bit
            read += agrees(bytes(data), scratch)
    # Changes inside names and padding leave a file that is still one.
    assert 0 < read < 3 * (8 + length)


@MUTANT
@given(st.integers(0, len(ORIGINAL)), st.binary(max_size=8), st.integers(0, 20))
def test_cut_and_spliced(scratch: Path, at: int, piece: bytes, drop: int) -> None:
    agrees(ORIGINAL[:at] + piece + ORIGINAL[at + drop :], scratch)


TOKENS = st.sampled_from(
    b'{ } [ ] : , "w" "dtype" "shape" "data_offsets" "__metadata__" "U8" "F32" '
    b"0 1 4 8 -1 1.0 1e3 18446744073709551615 null true NaN".split(b" ")
)


@MUTANT
@given(st.lists(TOKENS, max_size=30), st.binary(max_size=8))
def test_headers_of_tokens(scratch: Path, tokens: list[bytes], body: bytes) -> None:
    head = b"{" + b"".join(tokens)
    agrees(len(head).to_bytes(8, "little") + head + body, scratch)


NUMBERS = st.integers(-1, 9) | st.sampled_from([2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64])


@MUTANT
@given(
    st.dictionaries(
        st.sampled_from(["a", "b", "c"]),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["U8", "F32", "F4", "F6_E3M2", "X"]),
                "shape": st.lists(NUMBERS, max_size=3),
                "data_offsets": st.lists(NUMBERS, min_size=1, max_size=3),
            }
        ),
        max_size=3,
    ),
    st.binary(max_size=12),
)
def test_headers_of_any_numbers(scratch: Path, header: dict[str, Any], body: bytes) -> None:
    head = json.dumps(header).encode()
    agrees(len(head).to_bytes(8, "little") + head + body, scratch)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 5500), st.integers(0, 255))
def test_real_file_changed(scratch: Path, root: Path, at: int, value: int) -> None:
    """The real model's header: the outcome is a refusal or the header the library sees."""
    data = bytearray((root / "tests/data/stories260K/model.safetensors").read_bytes())
    data[at] = value
    scratch.write_bytes(data)
    try:
        header = read_header(scratch)
    except FormatError:
        return
    with safetensors.safe_open(scratch, "pt") as theirs:
        assert set(theirs.keys()) == set(header.tensors)
        for name, info in header.tensors.items():
            assert theirs.get_slice(name).get_shape() == list(info.shape)
            assert theirs.get_slice(name).get_dtype() == info.dtype


@settings(deadline=None)
@given(st.sampled_from(sorted(BITS)), SHAPES)
def test_sizes(code: str, shape: tuple[int, ...]) -> None:
    count = 1
    for length in shape:
        count *= length
    if count * BITS[code] % 8:
        with pytest.raises(FormatError):
            nbytes(code, shape)
    else:
        assert nbytes(code, shape) == count * BITS[code] // 8
