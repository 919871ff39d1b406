"""Philox-4x32-10 on a GPU: one thread a block of four words. `philox` is for other kernels to draw in place."""

# The arguments of a jit function are Triton's own values, which no annotation describes; triton ships no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from rewright.kernels.launch import cdiv, device_guard

BLOCK = 256


@triton.jit
def philox(seed, block):
    """The four uint32 words of the blocks numbered by the int64 tensor `block`, under the 64-bit `seed`."""
    low = (block & 0xFFFFFFFF).to(tl.uint32)
    high = (block >> 32).to(tl.uint32)
    return tl.philox(seed, low, high, tl.zeros_like(low), tl.zeros_like(low))


@triton.jit(do_not_specialize=["seed", "counter"])
def random_bits_kernel(out_ptr, seed, counter, count, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a, b, c, d = philox(seed, index + counter)
    start = out_ptr + index * 4
    tl.store(start, a.to(tl.int32, bitcast=True), mask=index * 4 < count)
    tl.store(start + 1, b.to(tl.int32, bitcast=True), mask=index * 4 + 1 < count)
    tl.store(start + 2, c.to(tl.int32, bitcast=True), mask=index * 4 + 2 < count)
    tl.store(start + 3, d.to(tl.int32, bitcast=True), mask=index * 4 + 3 < count)


def random_bits(out: torch.Tensor, seed: int, counter: int) -> None:
    """Fill the int32 vector `out`; see the package."""
    count = out.numel()
    if count:
        with device_guard(out):
            random_bits_kernel[(cdiv(cdiv(count, 4), BLOCK),)](
                out, seed, counter, count, BLOCK=BLOCK, enable_fp_fusion=False
            )
