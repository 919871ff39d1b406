"""`modal_step` on a GPU: a program takes some channels of one sequence through short convolution, gates and recurrence.

Everything but the state is small beside it: 16 K bytes of state a channel are read and written once.
"""

# The arguments of a jit function are Triton's own values, which no annotation describes; triton ships no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from rewright.kernels.launch import cdiv, device_guard, next_power_of_2
from rewright.kernels.poles import accumulator, refused

# Entries of the state in a program: 4 a thread.
ELEMENTS = 512
WARPS = 4
MOST = 512


@triton.jit
def short(
    z_at, recent_at, taps_at, bias_at, here, z_column, recent_column, recent_time, taps_row, taps_column, bias_stride,
    row, PAST: tl.constexpr, HAS_BIAS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One of the three parts: the short convolution of some channels, with what it remembers moved on by one."""
    z = tl.load(z_at + row * z_column, mask=here, other=0.0)
    total = tl.load(taps_at + row * taps_row + PAST * taps_column, mask=here, other=0.0).to(ACC) * z.to(ACC)
    if HAS_BIAS:
        total += tl.load(bias_at + row * bias_stride, mask=here, other=0.0).to(ACC)
    slot = recent_at + row * recent_column
    for j in tl.static_range(PAST):
        old = tl.load(slot + j * recent_time, mask=here, other=0.0)
        total += tl.load(taps_at + row * taps_row + j * taps_column, mask=here, other=0.0).to(ACC) * old.to(ACC)
        if j > 0:
            tl.store(slot + (j - 1) * recent_time, old, mask=here)
    if PAST > 0:
        tl.store(slot + (PAST - 1) * recent_time, z, mask=here)
    return total


@triton.jit
def modal_step_kernel(
    z_ptr, recent_ptr, taps_ptr, bias_ptr, state_ptr, poles_ptr, residues_ptr, h0_ptr, y_ptr, width, entries,
    z_row, z_column, recent_row, recent_column, recent_time, taps_row, taps_column, bias_stride,
    PAST: tl.constexpr, HAS_BIAS: tl.constexpr, ACC: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    row = (tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    here = row < width
    z_at = z_ptr + batch * z_row
    recent_at = recent_ptr + batch * recent_row
    outer = short(
        z_at, recent_at, taps_ptr, bias_ptr, here, z_column, recent_column, recent_time, taps_row, taps_column,
        bias_stride, row, PAST, HAS_BIAS, ACC,
    )  # fmt: skip
    inner = short(
        z_at, recent_at, taps_ptr, bias_ptr, here, z_column, recent_column, recent_time, taps_row, taps_column,
        bias_stride, row + width, PAST, HAS_BIAS, ACC,
    )  # fmt: skip
    value = short(
        z_at, recent_at, taps_ptr, bias_ptr, here, z_column, recent_column, recent_time, taps_row, taps_column,
        bias_stride, row + 2 * width, PAST, HAS_BIAS, ACC,
    )  # fmt: skip
    u = inner * value
    # Both planes of an entry lie side by side: they are read as one vector.
    plane = tl.arange(0, 2 * BLOCK_K)
    at = row[:, None] * (2 * entries) + plane[None, :]
    inside = here[:, None] & (plane < 2 * entries)[None, :]
    state_at = state_ptr + batch * width * entries * 2 + at
    state = tl.load(state_at, mask=inside, other=0.0)
    real, imaginary = tl.split(tl.reshape(state, [BLOCK_D, BLOCK_K, 2]))
    residues = tl.load(residues_ptr + at, mask=inside, other=0.0).to(ACC)
    weight, turned = tl.split(tl.reshape(residues, [BLOCK_D, BLOCK_K, 2]))
    poles = tl.load(poles_ptr + at, mask=inside, other=0.0).to(ACC)
    right, up = tl.split(tl.reshape(poles, [BLOCK_D, BLOCK_K, 2]))
    read = tl.sum(real * weight - imaginary * turned, axis=1)
    h0 = tl.load(h0_ptr + row, mask=here, other=0.0).to(ACC)
    tl.store(y_ptr + batch * width + row, outer * (h0 * u + read), mask=here)
    moved = tl.join(real * right - imaginary * up + u[:, None], real * up + imaginary * right)
    tl.store(state_at, tl.reshape(moved, [BLOCK_D, 2 * BLOCK_K]), mask=inside)


def supports(z: torch.Tensor, poles: torch.Tensor, residues: torch.Tensor) -> str | None:
    """None, or why the kernel cannot take these tensors."""
    if poles.shape[1] > MOST:
        return f"at most {MOST} entries are updated at once"
    return refused(z, poles, residues)


def modal_step(
    z: torch.Tensor,
    recent: torch.Tensor,
    taps: torch.Tensor,
    bias: torch.Tensor | None,
    state: torch.Tensor,
    poles: torch.Tensor,
    residues: torch.Tensor,
    h0: torch.Tensor,
) -> torch.Tensor:
    """`y`, with `recent` and `state` brought up to date; see the package for shapes and dtypes."""
    width, entries, _ = poles.shape
    y = torch.empty((len(z), width), dtype=z.dtype, device=z.device)
    if y.numel() == 0:
        return y
    size = next_power_of_2(entries)
    rows = max(1, min(ELEMENTS // size, next_power_of_2(width)))
    with device_guard(z):
        modal_step_kernel[(cdiv(width, rows), len(z))](
            z,
            recent,
            taps,
            bias,
            state,
            poles.contiguous(),
            residues.contiguous(),
            h0.contiguous(),
            y,
            width,
            entries,
            *z.stride(),
            *recent.stride(),
            *taps.stride(),
            0 if bias is None else bias.stride(0),
            PAST=recent.shape[2],
            HAS_BIAS=bias is not None,
            ACC=accumulator(state.dtype),
            BLOCK_D=rows,
            BLOCK_K=size,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
    return y
