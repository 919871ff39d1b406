"""The element types of safetensors, their widths, and their names in torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rewright.formats.errors import FormatError

if TYPE_CHECKING:
    import torch

BITS: dict[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "I64": 64,
    "U64": 64,
    "F64": 64,
}

# What models are stored in, and computed on.
FLOATS = ("F64", "F32", "BF16", "F16")

# F4 and F6 have no entry: torch has no element of that width, so such tensors are copied and never computed on.
_TORCH: dict[str, str] = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "I64": "int64",
    "U64": "uint64",
    "F64": "float64",
}
_CODES = {name: code for code, name in _TORCH.items()}

# Sizes past this do not fit the signed 64-bit offsets of the system calls.
LARGEST = 2**63 - 1


def nbytes(code: str, shape: Sequence[int]) -> int:
    """Bytes that a tensor takes. Raises FormatError: unknown type, more than 2^63 - 1, not whole bytes."""
    if code not in BITS:
        raise FormatError(f"`{code}` is no safetensors dtype")
    bits = BITS[code]
    # Stopping at the first overflow keeps a hostile shape from building an enormous integer.
    for length in shape:
        bits *= length
        if bits > LARGEST:
            raise FormatError(f"a shape of {code} overflows 64 bits")
    if bits % 8:
        raise FormatError(f"shape {list(shape)} of {code} is {bits} bits, not whole bytes")
    return bits // 8


def to_torch(code: str) -> torch.dtype | None:
    """The torch dtype of a safetensors code; None where torch has no element of that width (F4, F6)."""
    import torch

    name = _TORCH.get(code)
    found: torch.dtype | None = getattr(torch, name) if name else None
    return found


def from_torch(dtype: torch.dtype) -> str:
    """The safetensors code of a torch dtype. Raises FormatError for one the format does not know."""
    name = str(dtype).removeprefix("torch.")
    if name not in _CODES:
        raise FormatError(f"safetensors has no dtype for torch's `{name}`")
    return _CODES[name]


def stored_float(tensors: Mapping[str, tuple[str, Sequence[int]]]) -> str:
    """The dtype that most of the floating-point bytes have: what a model is stored in. Scales of codes do not count."""
    sizes: dict[str, int] = {}
    for name, (dtype, shape) in tensors.items():
        if dtype in FLOATS and not name.endswith("_scale"):
            sizes[dtype] = sizes.get(dtype, 0) + nbytes(dtype, shape)
    return max(sizes, key=lambda dtype: sizes[dtype], default="F32")
