"""`modal_chunk_prefill` on a GPU: a program goes once through one channel of one sequence, ROWS chunks at a time.

Within a tile of ROWS chunks, what each chunk adds to the state is one product; four rounds of doubling give the state
before each chunk, which a second product turns into outputs; a third is the Toeplitz matrix. u is read once and y
written once; the state stays in registers.
"""

# The arguments of a jit function are Triton's own values, which no annotation describes; triton ships no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from rewright.kernels.launch import device_guard
from rewright.kernels.poles import accumulator, apart, load_planes, power, refused, side_by_side
from rewright.kernels.vandermonde.triton import vandermonde

# What poles are padded to -> warps. All of them are in registers at once.
CONFIGS = {8: 4, 16: 8}
MOST = max(CONFIGS)
# Chunks of a tile, samples of a chunk.
ROWS = 16
CHUNK = 32


@triton.jit
def row_of(tile, row, place):
    """A row of a tile, as a sum of it and zeros."""
    return tl.sum(tl.where(row == place, tile, 0.0), axis=0)


@triton.jit
def lowered(real, imaginary, by, ACC: tl.constexpr):
    """Both tiles with their rows moved down, zeros above: a product with ones and zeros, which is exact."""
    ROWS: tl.constexpr = real.shape[0]
    move = tl.arange(0, ROWS)[:, None] == tl.arange(0, ROWS)[None, :] + by
    return apart(tl.dot(move.to(ACC), side_by_side(real, imaginary), input_precision="ieee", out_dtype=ACC))


@triton.jit
def modal_chunk_prefill_kernel(
    u_ptr, logs_ptr, residues_ptr, response_ptr, h0_ptr, state_ptr, y_ptr, out_ptr, channels, times, entries,
    u_batch, u_channel, u_time,
    HAS_STATE: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    row = tl.arange(0, ROWS)[:, None]
    step = tl.arange(0, CHUNK)
    rate, angle = load_planes(logs_ptr + channel * entries * 2, k, entries)
    rate, angle = rate[None, :], angle[None, :]
    weight, turned = load_planes(residues_ptr + channel * entries * 2, k, entries)
    weight, turned = weight.to(ACC)[None, :], turned.to(ACC)[None, :]
    # What a chunk is multiplied by: see the reference.
    lag = step[None, :] - step[:, None]
    response_at = response_ptr + channel * (CHUNK - 1)
    within = tl.load(response_at + lag - 1, mask=lag > 0, other=0.0).to(ACC)
    within = tl.where(lag == 0, tl.load(h0_ptr + channel).to(ACC), within)
    real, imaginary = power(rate, angle, step.to(tl.float64)[:, None], ACC)
    readout = side_by_side(weight * real - turned * imaginary, -(weight * imaginary + turned * real))
    readout = tl.trans(readout)
    late, later = power(rate, angle, (CHUNK - 1 - step).to(tl.float64)[:, None], ACC)
    gather = side_by_side(late, later)
    # p^(CHUNK row).
    fade, turn = power(rate, angle, (CHUNK * row).to(tl.float64), ACC)
    decay, spin = row_of(fade, row, 1), row_of(turn, row, 1)
    at = ((batch * channels + channel) * entries + k) * 2
    carried, swung = tl.zeros([BLOCK_K], ACC), tl.zeros([BLOCK_K], ACC)
    if HAS_STATE:
        carried += tl.load(state_ptr + at, mask=k < entries, other=0.0)
        swung += tl.load(state_ptr + at + 1, mask=k < entries, other=0.0)
    before, beside = tl.zeros([ROWS, BLOCK_K], ACC), tl.zeros([ROWS, BLOCK_K], ACC)
    u_at = u_ptr + batch * u_batch + channel * u_channel
    y_at = y_ptr + (batch * channels + channel) * times
    for first in range(0, times, ROWS * CHUNK):
        place = first + row * CHUNK + step[None, :]
        tile = tl.load(u_at + place.to(tl.int64) * u_time, mask=place < times, other=0.0).to(ACC)
        added, bent = apart(tl.dot(tile, gather, input_precision="ieee", out_dtype=ACC))
        # The state before each chunk as if none were carried: after n rounds it has come through 2^n chunks.
        before, beside = lowered(added, bent, 1, ACC)
        for level in range(4):
            slow, skew = row_of(fade, row, 1 << level)[None, :], row_of(turn, row, 1 << level)[None, :]
            above, aside = lowered(before, beside, 1 << level, ACC)
            before += slow * above - skew * aside
            beside += slow * aside + skew * above
        before += fade * carried[None, :] - turn * swung[None, :]
        beside += fade * swung[None, :] + turn * carried[None, :]
        y = tl.dot(tile, within, input_precision="ieee", out_dtype=ACC)
        y = tl.dot(side_by_side(before, beside), readout, y, input_precision="ieee", out_dtype=ACC)
        tl.store(y_at + place, y, mask=place < times)
        far, wide = row_of(before, row, ROWS - 1), row_of(beside, row, ROWS - 1)
        carried = row_of(added, row, ROWS - 1) + decay * far - spin * wide
        swung = row_of(bent, row, ROWS - 1) + decay * wide + spin * far
    left = times % (ROWS * CHUNK)
    if left > 0:
        # The last tile was not full: from the state before its last chunk through the samples of that one.
        whole = left // CHUNK
        rest = left % CHUNK
        far, wide = row_of(before, row, whole), row_of(beside, row, whole)
        last = times - rest + step
        u = tl.load(u_at + last.to(tl.int64) * u_time, mask=step < rest, other=0.0).to(ACC)[:, None]
        late, later = power(rate, angle, tl.maximum(rest - 1 - step, 0).to(tl.float64)[:, None], ACC)
        past, drift = power(rate, angle, tl.zeros([1, 1], tl.float64) + rest, ACC)
        carried = tl.sum(late * u, axis=0) + tl.sum(past * far[None, :] - drift * wide[None, :], axis=0)
        swung = tl.sum(later * u, axis=0) + tl.sum(past * wide[None, :] + drift * far[None, :], axis=0)
    tl.store(out_ptr + at, carried, mask=k < entries)
    tl.store(out_ptr + at + 1, swung, mask=k < entries)


def supports(u: torch.Tensor, logs: torch.Tensor, residues: torch.Tensor) -> str | None:
    """None, or why the kernel cannot take these tensors; logs may be float64."""
    if logs.shape[1] > MOST:
        return f"at most {MOST} entries are carried at once"
    return refused(u, residues)


def modal_chunk_prefill(
    u: torch.Tensor, logs: torch.Tensor, residues: torch.Tensor, h0: torch.Tensor, state: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`y` and `state`; see the package for shapes and dtypes."""
    batch, channels, times = u.shape
    entries = logs.shape[1]
    dtype = torch.promote_types(u.dtype, residues.dtype)
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    out = torch.empty((batch, channels, entries, 2), dtype=dtype, device=u.device)
    if batch * channels == 0:
        return y, out
    size = next(size for size in CONFIGS if entries <= size)
    logs, residues = logs.contiguous(), residues.contiguous()
    with device_guard(u):
        modal_chunk_prefill_kernel[(channels, batch)](
            u,
            logs,
            residues,
            vandermonde(logs, residues, CHUNK - 1),
            h0.contiguous(),
            None if state is None else state.contiguous(),
            y,
            out,
            channels,
            times,
            entries,
            *u.stride(),
            HAS_STATE=state is not None,
            ACC=accumulator(dtype),
            ROWS=ROWS,
            CHUNK=CHUNK,
            BLOCK_K=size,
            num_warps=CONFIGS[size],
            enable_fp_fusion=True,
        )
    return y, out
