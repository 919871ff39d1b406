"""The definition of `pack` and `unpack`: a little-endian stream of bits, made a byte at a time.

The pattern of codes over bytes repeats after `8 / gcd(8, bits)` codes: two at 4 bits, eight (in three bytes) at 3.
Packing is arithmetic on uint8, which torch vectorises. Unpacking reads each period into a word of as many bytes as it
has codes and spreads them there, several at a time.
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


# Steps that spread the codes of a word over its bytes: shift left, join, keep. The low code ends in the low byte.
_SPREAD = {
    2: (torch.int32, ((12, 0x000F000F), (6, 0x03030303))),
    3: (torch.int64, ((20, 0x00000FFF00000FFF), (10, 0x003F003F003F003F), (5, 0x0707070707070707))),
    4: (torch.int16, ((4, 0x0F0F),)),
}


def unpack(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """(O, ceil(columns*bits/32)) int32 to (O, columns) int8; see the package."""
    rows = packed.shape[0]
    if rows == 0 or columns == 0:
        return packed.new_empty((rows, columns), dtype=torch.int8)
    padded = cdiv(columns, 32) * 32
    whole = packed.contiguous()
    if padded != columns:
        whole = packed.new_zeros((rows, padded * bits // 32))
        whole[:, : packed.shape[1]] = packed
    stream = whole.view(torch.uint8)
    if bits == 8:
        unsigned = stream ^ 0x80
    else:
        wide, steps = _SPREAD[bits]
        word = _threes(stream.view(rows, -1, 3)) if bits == 3 else stream.to(wide)
        for shift, mask in steps:
            word |= word << shift
            word &= mask
        unsigned = word.view(torch.uint8)
        unsigned -= 1 << (bits - 1)
    return unsigned[:, :columns].contiguous().view(torch.int8)


def _threes(stream: torch.Tensor) -> torch.Tensor:
    """Eight codes of 3 bits lie in three bytes: (rows, words, 3) uint8 to (rows, words) int64."""
    word = stream[..., 2].to(torch.int64)
    for byte in (1, 0):
        word <<= 8
        word |= stream[..., byte]
    return word
