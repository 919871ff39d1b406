"""Integer codes as a dense stream of bits in 32-bit words, the `pack-quantized` layout of compressed-tensors."""

from __future__ import annotations

import torch

from rewright.kernels import dispatch
from rewright.kernels.pack import reference

__all__ = ["WIDTHS", "pack", "unpack"]

WIDTHS = (2, 3, 4, 8)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack signed codes, `bits` bits each, into int32 words along the columns.

    Column i of a row becomes the unsigned number code + 2^(bits-1) at bits [i*bits, (i+1)*bits) of the row's stream;
    bit k of the stream is bit k mod 32 of word k // 32. Bits past the last column are 0. At 3 bits a code may lie
    across two words. Equal bit for bit to `pack_to_int32` of compressed-tensors >= 0.18 (older ones pad 3 bits).

    codes   (O, I) int8 in [-2^(bits-1), 2^(bits-1) - 1]; what lies outside is undefined. Any strides.
    bits    2, 3, 4 or 8.
    Returns (O, ceil(I*bits/32)) int32, contiguous. Zero points are packed along rows: `pack(zero.t(), bits).t()`.

    Raises ValueError for other shapes, dtypes or widths, `KernelError` when Triton was asked for and cannot run.
    """
    if codes.dim() != 2 or codes.dtype != torch.int8:
        raise ValueError(f"codes must be an int8 matrix, not {codes.dtype} {tuple(codes.shape)}")
    _check_width(bits)
    if dispatch.pick("pack", (codes,), _supports):
        from rewright.kernels.pack import triton

        return triton.pack(codes, bits)
    return reference.pack(codes, bits)


def unpack(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """The inverse of `pack`: (O, ceil(columns*bits/32)) int32 to (O, columns) int8, contiguous.

    Raises ValueError for other shapes, dtypes or widths, `KernelError` when Triton was asked for and cannot run.
    """
    _check_width(bits)
    words = -(-columns * bits // 32)
    if packed.dim() != 2 or packed.dtype != torch.int32 or columns < 0 or packed.shape[1] != words:
        raise ValueError(
            f"{columns} columns of {bits} bits take int32 rows of {words} words, "
            f"not {packed.dtype} {tuple(packed.shape)}"
        )
    if dispatch.pick("unpack", (packed,), _supports):
        from rewright.kernels.pack import triton

        return triton.unpack(packed, bits, columns)
    return reference.unpack(packed, bits, columns)


def _check_width(bits: int) -> None:
    if bits not in WIDTHS:
        raise ValueError(f"codes of {bits} bits cannot be packed; widths are 2, 3, 4 and 8")


def _supports() -> str | None:
    return None
