"""The header of a safetensors file: read with every check before anything is allocated, and written.

Layout (safetensors' own description): 8 bytes little-endian header length, the header as JSON, padded with
spaces, then the bytes of the tensors back to back.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeGuard

from rewright.formats.dtypes import BITS, LARGEST, nbytes
from rewright.formats.errors import FormatError, unreadable
from rewright.formats.strict import LFS_PREFIX, pointer_error, printable, regular_size, strict_json

__all__ = ["MAX_HEADER", "Header", "TensorInfo", "check_name", "encode_header", "read_header"]

MAX_HEADER = 100_000_000
# What torch's operations take.
_MAX_AXES = 64
_CONTROL = re.compile(r"[\x00-\x1f\x7f\x80-\x9f\u2028\u2029]")


class Spec(Protocol):
    """What a header says of a tensor before it has a place."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: safetensors dtype code, shape, and its bytes [start, end) counted from `Header.data_start`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """`tensors` in the order of their offsets; `data_start` is the file offset of the first tensor byte."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read and check the header of the file at `path`, links followed.

    Raises FormatError naming file and tensor: absent, a Git LFS pointer, a length that reaches past the file or
    100 MB, JSON that `strict_json` refuses, an unknown dtype, offsets that overlap, leave gaps or do not
    cover the file exactly, a shape whose bytes are not the span, a name that leaves the directory.
    """
    path = Path(path)
    size = regular_size(path)
    try:
        with path.open("rb") as file:
            first = file.read(8)
            if LFS_PREFIX.startswith(first) and len(first) == 8:
                raise pointer_error(path, first + file.read(1024))
            length = _header_length(path, first, size)
            body = file.read(length)
    except OSError as error:
        raise unreadable(path, error) from None
    if len(body) != length:
        raise FormatError(f"`{path}` ended inside its header")
    if not body.startswith(b"{"):
        raise FormatError(f"`{path}` is not a safetensors file: its header does not start with a brace")
    document = strict_json(body, f"the header of `{path}`")
    metadata = _metadata(path, document.pop("__metadata__", None))
    infos = [_info(path, name, value) for name, value in document.items()]
    data_start = 8 + length
    return Header(_check_spans(path, infos, size - data_start), metadata, data_start)


def encode_header(
    specs: Iterable[Spec], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Header bytes (with the length in front, a multiple of 8 long) and each tensor's [start, end).

    Widest elements come first, else in the order given, so that every tensor starts at a multiple of its
    element size: readers that view bytes in place need that. Raises FormatError: a name given twice, a dtype
    that is unknown, a header past 100 MB.
    """
    ordered = sorted(specs, key=lambda spec: -BITS.get(spec.dtype, 0))
    document: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offsets: dict[str, tuple[int, int]] = {}
    at = 0
    for spec in ordered:
        if spec.name in offsets or spec.name == "__metadata__":
            raise FormatError(f"the tensor name `{printable(spec.name)}` cannot be written twice")
        check_name(spec.name, "the layout")
        end = at + nbytes(spec.dtype, spec.shape)
        document[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [at, end]}
        offsets[spec.name] = (at, end)
        at = end
    body = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    body += b" " * (-len(body) % 8)
    if len(body) > MAX_HEADER:
        raise FormatError(
            f"{len(offsets)} tensors need a header of {len(body)} bytes, past the {MAX_HEADER} readers take",
            hint="write more and smaller shards",
        )
    return len(body).to_bytes(8, "little") + body, offsets


def check_name(name: str, where: str) -> None:
    """Refuse (FormatError) a tensor name with control characters, or that is a path out of a directory."""
    parts = name.replace("\\", "/").split("/")
    if _CONTROL.search(name) or ".." in parts or (len(parts) > 1 and parts[0] == ""):
        raise FormatError(f"{where} has a tensor of an unsafe name, `{printable(name)}`")


def _header_length(path: Path, first: bytes, size: int) -> int:
    if len(first) < 8:
        raise FormatError(f"`{path}` has {size} bytes, too few for a safetensors file")
    length = int.from_bytes(first, "little")
    if length > size - 8:
        raise FormatError(
            f"`{path}` says its header has {length} bytes, but the file has {size}",
            hint="the file is truncated or is not a safetensors file; fetch it again",
        )
    if length > MAX_HEADER:
        raise FormatError(
            f"`{path}` has a header of {length} bytes, past the {MAX_HEADER} that safetensors allows",
            hint="write the tensors again as several smaller files",
        )
    return length


def _metadata(path: Path, value: Any) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise FormatError(f"the header of `{path}` has a `__metadata__` that is not text by name")
    return value


def _info(path: Path, name: str, value: Any) -> TensorInfo:
    where = f"`{path}`: tensor `{printable(name)}`"
    check_name(name, f"`{path}`")
    if not isinstance(value, dict):
        raise FormatError(f"{where} is not described by an object")
    dtype, shape, span = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in BITS:
        raise FormatError(f"{where} has the unknown dtype `{printable(str(dtype), 40)}`")
    if not _counts(shape):
        raise FormatError(f"{where} has a shape that is not a list of counts")
    if len(shape) > _MAX_AXES:
        raise FormatError(f"{where} has {len(shape)} axes, more than {_MAX_AXES}")
    if not _counts(span) or len(span) != 2 or span[0] > span[1]:
        raise FormatError(f"{where} has data offsets that are not a start and an end")
    try:
        need = nbytes(dtype, shape)
    except FormatError as error:
        raise FormatError(f"{where}: {error}") from None
    if span[1] - span[0] != need:
        raise FormatError(
            f"{where} spans {span[1] - span[0]} bytes, but {dtype} of shape {printable(str(shape))} takes {need}"
        )
    return TensorInfo(name, dtype, tuple(shape), span[0], span[1])


def _counts(value: Any) -> TypeGuard[list[int]]:
    # bool is an int to isinstance, and no count.
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= LARGEST for item in value)


def _check_spans(path: Path, infos: list[TensorInfo], room: int) -> dict[str, TensorInfo]:
    infos.sort(key=lambda info: (info.start, info.end))
    at = 0
    for info in infos:
        if info.end > room:
            raise FormatError(
                f"`{path}`: tensor `{printable(info.name)}` ends at byte {info.end} of {room}",
                hint="the file is truncated; fetch it again",
            )
        if info.start != at:
            kind = "overlaps the one before" if info.start < at else f"leaves {info.start - at} bytes unused before it"
            raise FormatError(f"`{path}`: tensor `{printable(info.name)}` {kind}")
        at = info.end
    if at != room:
        raise FormatError(f"`{path}` has {room - at} bytes after its last tensor")
    return {info.name: info for info in infos}
