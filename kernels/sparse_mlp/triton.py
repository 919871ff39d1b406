"""`sparse_mlp` on a GPU: as many programs as the device holds, each with an equal share of the listed neurons.

A program finds its share by running sums over the counts, so that nobody has to be told how many there are and the grid
depends on shapes alone. It goes through its rows of `up` (and `gate`) first, a few at once, and leaves activations and
the numbers of the neurons that are not 0 behind its rows of the result; then through its rows of `down`, columns by
columns, with sums that stay with the thread. Order and shares depend on shapes and counts alone.
"""

# The arguments of a jit function are Triton's own values, which no annotation describes; triton ships no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from rewright.kernels.launch import device_guard, interpreter, next_power_of_2
from rewright.kernels.neurons import BLOCK, empty_partial, room
from rewright.kernels.poles import accumulator, refused
from rewright.kernels.sparse_mlp.reference import Operands


class Config(NamedTuple):
    """Neurons at once, and columns of them."""

    neurons: int
    columns: int


# By the rows of x, padded to a power of two; a multiprocessor holds two programs of each. For one row of bfloat16 a
# thread has 8 neighbouring columns of x and of a matrix alike: a narrower tile would be exchanged in each turn.
CONFIGS = {1: Config(2, 2048), 2: Config(2, 2048), 4: Config(1, 2048), 8: Config(1, 1024), 16: Config(1, 512)}
WARPS = 8
# Counts that a program holds.
MOST_BLOCKS = 1024
# In the interpreter there is no device to ask.
INTERPRETED = 3


@triton.jit
def dots(
    x_ptr, w_ptr, bias_ptr, neuron, here, token, in_token, columns, x_row, w_row, bias_stride,
    HAS_BIAS: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Products of the rows of x with some rows of a matrix, plus their biases, [BLOCK_M, BLOCK_G]."""
    total = tl.zeros([BLOCK_M, BLOCK_G, BLOCK_K], ACC)
    lane = tl.arange(0, BLOCK_K)
    x_at = x_ptr + token.to(tl.int64)[:, None, None] * x_row
    w_at = w_ptr + neuron[None, :, None] * w_row
    for first in range(0, columns, BLOCK_K):
        k = (first + lane)[None, None, :]
        known = k < columns
        w = tl.load(w_at + k, mask=here[None, :, None] & known, other=0.0).to(ACC)
        x = tl.load(x_at + k, mask=in_token[:, None, None] & known, other=0.0).to(ACC)
        total += x * w
    h = tl.sum(total, axis=2)
    if HAS_BIAS:
        h += tl.load(bias_ptr + neuron * bias_stride, mask=here, other=0.0).to(ACC)[None, :]
    return h


@triton.jit
def activated(h, SQUARE: tl.constexpr):
    h = tl.where(h < 0, 0.0, h)
    return h * h if SQUARE else h


@triton.jit
def sparse_mlp_kernel(
    x_ptr, up_ptr, down_ptr, bias_ptr, gate_ptr, gate_bias_ptr, offset_ptr, index_ptr, count_ptr, out_ptr,
    tokens, columns, blocks, share,
    x_row, up_row, down_row, gate_row, bias_stride, gate_bias_stride, offset_stride, out_part, out_row,
    HAS_BIAS: tl.constexpr, HAS_GATE: tl.constexpr, HAS_GATE_BIAS: tl.constexpr, HAS_OFFSET: tl.constexpr,
    SQUARE: tl.constexpr, ACC: tl.constexpr, LIST: tl.constexpr, BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    token = tl.arange(0, BLOCK_M)
    in_token = token < tokens
    several = tl.arange(0, BLOCK_G)
    block = tl.arange(0, BLOCKS)
    counts = tl.load(count_ptr + block, mask=block < blocks, other=0)
    until = tl.cumsum(counts, axis=0)
    listed = tl.sum(counts, axis=0)
    begin = program * listed // tl.num_programs(0)
    end = (program + 1) * listed // tl.num_programs(0)
    out_at = out_ptr + program.to(tl.int64) * out_part
    kept_at = out_at + columns
    rows_at = token.to(tl.int64)[:, None] * out_row
    for first in range(begin, end, BLOCK_G):
        place = first + several
        here = place < end
        past = until[None, :] <= place[:, None]
        which = tl.sum(past.to(tl.int32), axis=1)
        before = tl.max(tl.where(past, until[None, :], 0), axis=1)
        neuron = tl.load(index_ptr + which * LIST + place - before, mask=here, other=0).to(tl.int64)
        h = dots(
            x_ptr, up_ptr, bias_ptr, neuron, here, token, in_token, columns, x_row, up_row, bias_stride,
            HAS_BIAS, ACC, BLOCK_M, BLOCK_G, BLOCK_K,
        )  # fmt: skip
        if HAS_GATE:
            opened = dots(
                x_ptr, gate_ptr, gate_bias_ptr, neuron, here, token, in_token, columns, x_row, gate_row,
                gate_bias_stride, HAS_GATE_BIAS, ACC, BLOCK_M, BLOCK_G, BLOCK_K,
            )  # fmt: skip
            h *= activated(opened, SQUARE)
        else:
            h = activated(h, SQUARE)
        if HAS_OFFSET:
            h -= tl.load(offset_ptr + neuron * offset_stride, mask=here, other=0.0).to(ACC)[None, :]
        live = tl.max(((h != 0) & in_token[:, None]).to(tl.int32), axis=0) > 0
        held = place - begin
        tl.store(kept_at + rows_at + held[None, :], h, mask=in_token[:, None] & here[None, :])
        tl.store(kept_at + share + held, tl.where(live, neuron, -1).to(ACC), mask=here)
    # What some threads of this program stored others load.
    tl.debug_barrier()
    lane = tl.arange(0, BLOCK_K)
    for start in range(0, columns, BLOCK_K):
        k = start + lane
        known = k < columns
        total = tl.zeros([BLOCK_M, BLOCK_G, BLOCK_K], ACC)
        for first in range(0, end - begin, BLOCK_G):
            held = first + several
            here = held < end - begin
            neuron = tl.load(kept_at + share + held, mask=here, other=-1.0).to(tl.int64)
            h = tl.load(kept_at + rows_at + held[None, :], mask=in_token[:, None] & here[None, :], other=0.0)
            down_at = down_ptr + neuron[None, :, None] * down_row + k[None, None, :]
            w = tl.load(down_at, mask=(neuron >= 0)[None, :, None] & known[None, None, :], other=0.0).to(ACC)
            total += h[:, :, None] * w
        tl.store(out_at + rows_at + k[None, :], tl.sum(total, axis=1), mask=in_token[:, None] & known[None, :])


def supports(tensors: Sequence[torch.Tensor], neurons: int) -> str | None:
    """None, or why the kernel cannot take these tensors."""
    if neurons > MOST_BLOCKS * BLOCK:
        return f"at most {MOST_BLOCKS * BLOCK} neurons are listed"
    return refused(*tensors)


def side_by_side(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix with the numbers of a row side by side."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def sparse_mlp(given: Operands, index: torch.Tensor, count: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """`partial`; see the package for the mathematics, shapes and dtypes."""
    x, up, down = side_by_side(given.x), side_by_side(given.up), side_by_side(given.down)
    gate = None if given.gate is None else side_by_side(given.gate)
    neurons, columns = up.shape
    partial = empty_partial(x, neurons, INTERPRETED if interpreter() else None) if out is None else out
    if partial.numel() == 0:
        return partial
    tokens = next_power_of_2(len(x))
    tile = CONFIGS[tokens]
    with device_guard(x):
        sparse_mlp_kernel[(len(partial),)](
            x,
            up,
            down,
            *(x if t is None else t for t in (given.bias, gate, given.gate_bias, given.offset)),
            index,
            count,
            partial,
            len(x),
            columns,
            len(count),
            room(neurons, len(partial)) // 2,
            x.stride(0),
            up.stride(0),
            down.stride(0),
            1 if gate is None else gate.stride(0),
            *(1 if t is None else t.stride(0) for t in (given.bias, given.gate_bias, given.offset)),
            partial.stride(0),
            partial.stride(1),
            HAS_BIAS=given.bias is not None,
            HAS_GATE=gate is not None,
            HAS_GATE_BIAS=given.gate_bias is not None,
            HAS_OFFSET=given.offset is not None,
            SQUARE=given.activation == "relu2",
            ACC=accumulator(partial.dtype),
            LIST=BLOCK,
            BLOCKS=next_power_of_2(len(count)),
            BLOCK_M=tokens,
            BLOCK_G=tile.neurons,
            BLOCK_K=min(tile.columns, next_power_of_2(columns)),
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
    return partial
