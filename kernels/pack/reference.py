"""The definition of `pack` and `unpack`: a little-endian stream of bits, made a byte at a time.

The pattern of codes over bytes repeats after `8 / gcd(8, bits)` codes: two at 4 bits, eight (in three bytes) at 3.
All arithmetic is on uint8, which torch vectorises.
"""

from __future__ import annotations

import math

import torch

from rewright.kernels.launch import cdiv


def period(bits: int) -> tuple[int, int]:
    """After how many codes, and bytes, the pattern of codes over bytes repeats."""
    common = math.gcd(8, bits)
    return 8 // common, bits // common


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """(O, I) int8 to (O, ceil(I*bits/32)) int32; see the package."""
    rows, columns = codes.shape
    words = cdiv(columns * bits, 32)
    if rows == 0 or words == 0:
        return codes.new_empty((rows, words), dtype=torch.int32)
    lanes, width = period(bits)
    # 32 columns are `bits` whole words and whole periods.
    padded = cdiv(columns, 32) * 32
    offset = 1 << (bits - 1)
    unsigned = codes.new_zeros((rows, padded), dtype=torch.uint8)
    # Two's complement: adding modulo 256 takes the signed range to the unsigned one.
    torch.add(codes.view(torch.uint8), offset, out=unsigned[:, :columns])
    periods = unsigned.view(rows, padded // lanes, lanes)
    stream = codes.new_zeros((rows, padded // lanes, width), dtype=torch.uint8)
    for lane in range(lanes):
        byte, shift = divmod(lane * bits, 8)
        code = periods[:, :, lane]
        stream[:, :, byte].bitwise_or_(code << shift)
        if shift + bits > 8:
            stream[:, :, byte + 1].bitwise_or_(code >> (8 - shift))
    return stream.view(rows, padded * bits // 8).view(torch.int32)[:, :words].contiguous()


def unpack(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """(O, ceil(columns*bits/32)) int32 to (O, columns) int8; see the package."""
    rows = packed.shape[0]
    if rows == 0 or columns == 0:
        return packed.new_empty((rows, columns), dtype=torch.int8)
    padded = cdiv(columns, 32) * 32
    whole = packed.new_zeros((rows, padded * bits // 32))
    whole[:, : packed.shape[1]] = packed
    lanes, width = period(bits)
    stream = whole.view(torch.uint8).view(rows, padded // lanes, width)
    periods = packed.new_empty((rows, padded // lanes, lanes), dtype=torch.uint8)
    mask = (1 << bits) - 1
    for lane in range(lanes):
        byte, shift = divmod(lane * bits, 8)
        code = stream[:, :, byte] >> shift
        if shift + bits > 8:
            code |= stream[:, :, byte + 1] << (8 - shift)
        torch.bitwise_and(code, mask, out=periods[:, :, lane])
    periods -= 1 << (bits - 1)
    return periods.view(rows, padded)[:, :columns].contiguous().view(torch.int8)
