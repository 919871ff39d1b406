"""`pack` and `unpack` on a GPU. Both are bound by memory; every code and word is moved once."""

# The arguments of a jit function are Triton's own values, which no annotation describes; triton ships no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from rewright.kernels.launch import cdiv, device_guard, next_power_of_2

WORDS = 128
COLUMNS = 1024


@triton.jit
def pack_kernel(
    codes_ptr, packed_ptr, columns, words, codes_row, codes_column,
    BITS: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    # The codes that reach into a word: from the one that holds its first bit, SLOTS of them at most.
    column = (word * 32 // BITS)[:, None] + tl.arange(0, SLOTS)[None, :]
    shift = (column * BITS - (word * 32)[:, None]).to(tl.int32)
    inside = (column < columns) & (shift < 32)
    code = tl.load(codes_ptr + row * codes_row + column * codes_column, mask=inside, other=0).to(tl.int32)
    unsigned = (code + (1 << (BITS - 1))).to(tl.uint32)
    left = tl.where(inside & (shift >= 0), shift, 0).to(tl.uint32)
    right = tl.where(shift < 0, -shift, 0).to(tl.uint32)
    piece = tl.where(inside, (unsigned << left) >> right, 0)
    # The pieces share no bits, so exclusive or joins them.
    joined = tl.xor_sum(piece, axis=1).to(tl.int32, bitcast=True)
    tl.store(packed_ptr + row * words + word, joined, mask=word < words)


@triton.jit
def unpack_kernel(packed_ptr, codes_ptr, columns, packed_row, packed_column, BITS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    word = column * BITS // 32
    shift = (column * BITS % 32).to(tl.uint32)
    source = packed_ptr + row * packed_row + word * packed_column
    code = tl.load(source, mask=inside, other=0).to(tl.uint32, bitcast=True) >> shift
    if 32 % BITS != 0:
        over = inside & (shift + BITS > 32)
        rest = tl.load(source + packed_column, mask=over, other=0).to(tl.uint32, bitcast=True)
        code |= rest << tl.where(over, 32 - shift, 0).to(tl.uint32)
    code = (code & ((1 << BITS) - 1)).to(tl.int32) - (1 << (BITS - 1))
    tl.store(codes_ptr + row * columns + column, code.to(tl.int8), mask=inside)


def slots(bits: int) -> int:
    """How many codes may reach into one word, rounded up to a power of two."""
    return next_power_of_2(32 // bits if 32 % bits == 0 else cdiv(32, bits) + 1)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """(O, I) int8 to (O, ceil(I*bits/32)) int32; see the package."""
    rows, columns = codes.shape
    words = cdiv(columns * bits, 32)
    packed = torch.empty((rows, words), dtype=torch.int32, device=codes.device)
    if packed.numel():
        with device_guard(codes):
            pack_kernel[(rows, cdiv(words, WORDS))](
                codes,
                packed,
                columns,
                words,
                *codes.stride(),
                BITS=bits,
                SLOTS=slots(bits),
                BLOCK=WORDS,
                enable_fp_fusion=False,
            )
    return packed


def unpack(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """(O, ceil(columns*bits/32)) int32 to (O, columns) int8; see the package."""
    rows = packed.shape[0]
    codes = torch.empty((rows, columns), dtype=torch.int8, device=packed.device)
    if codes.numel():
        with device_guard(packed):
            unpack_kernel[(rows, cdiv(columns, COLUMNS))](
                packed, codes, columns, *packed.stride(), BITS=bits, BLOCK=COLUMNS, enable_fp_fusion=False
            )
    return codes
