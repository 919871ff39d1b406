"""`modal_fit_step` on a GPU: a program makes a channel's impulse response by tiles and folds each error back at once.

Tables and products are those of `vandermonde`. The target is read once, and nothing of its length is written.
"""

# The arguments of a jit function are Triton's own values, which no annotation describes; triton ships no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from rewright.kernels.launch import device_guard
from rewright.kernels.poles import accumulator, apart, load_planes, power, refused, side_by_side

# What poles are padded to -> blocks in a tile, steps of a block, warps. All poles are in registers at once.
CONFIGS = {8: (64, 32, 8), 16: (16, 32, 4)}
MOST = max(CONFIGS)


@triton.jit
def modal_fit_step_kernel(
    target_ptr, logs_ptr, residues_ptr, loss_ptr, d_logs_ptr, d_residues_ptr,
    entries, length, channel_stride, time_stride,
    ACC: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    rate, angle = load_planes(logs_ptr + channel * entries * 2, k, entries)
    rate, angle = rate[None, :], angle[None, :]
    weight, turned = load_planes(residues_ptr + channel * entries * 2, k, entries)
    weight, turned = weight.to(ACC), turned.to(ACC)
    block = tl.arange(0, BLOCKS) * WIDTH
    step = tl.arange(0, WIDTH)
    cosine, sine = power(rate, angle, step.to(tl.float64)[:, None], ACC)
    near = side_by_side(cosine, sine)
    far = near * step.to(ACC)[:, None]
    loss = tl.zeros([BLOCKS], ACC)
    sums, swung = tl.zeros([BLOCK_K], ACC), tl.zeros([BLOCK_K], ACC)
    moments, twisted = tl.zeros([BLOCK_K], ACC), tl.zeros([BLOCK_K], ACC)
    target_at = target_ptr + channel * channel_stride
    for first in range(0, length, BLOCKS * WIDTH):
        start = (first + block)[:, None]
        place = start + step[None, :]
        real, imaginary = power(rate, angle, start.to(tl.float64), ACC)
        left = side_by_side(
            weight[None, :] * real - turned[None, :] * imaginary,
            -(weight[None, :] * imaginary + turned[None, :] * real),
        )
        tile = tl.dot(left, tl.trans(near), input_precision="ieee", out_dtype=ACC)
        tile -= tl.load(target_at + place.to(tl.int64) * time_stride, mask=place < length, other=0.0).to(ACC)
        tile = tl.where(place < length, tile, 0.0)
        loss += tl.sum(tile * tile, axis=1)
        inner, crossed = apart(tl.dot(tile, near, input_precision="ieee", out_dtype=ACC))
        sums += tl.sum(real * inner - imaginary * crossed, axis=0)
        swung += tl.sum(real * crossed + imaginary * inner, axis=0)
        outer, bent = apart(tl.dot(tile, far, input_precision="ieee", out_dtype=ACC))
        outer += start.to(ACC) * inner
        bent += start.to(ACC) * crossed
        moments += tl.sum(real * outer - imaginary * bent, axis=0)
        twisted += tl.sum(real * bent + imaginary * outer, axis=0)
    tl.store(loss_ptr + channel, tl.sum(loss, axis=0))
    at = channel * entries * 2 + 2 * k
    tl.store(d_residues_ptr + at, 2 * sums, mask=k < entries)
    tl.store(d_residues_ptr + at + 1, -2 * swung, mask=k < entries)
    tl.store(d_logs_ptr + at, 2 * (weight * moments - turned * twisted), mask=k < entries)
    tl.store(d_logs_ptr + at + 1, -2 * (weight * twisted + turned * moments), mask=k < entries)


def supports(target: torch.Tensor, logs: torch.Tensor, residues: torch.Tensor) -> str | None:
    """None, or why the kernel cannot take these tensors; logs may be float64."""
    if logs.shape[1] > MOST:
        return f"at most {MOST} entries are fitted at once"
    return refused(target, residues)


def modal_fit_step(
    target: torch.Tensor, logs: torch.Tensor, residues: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`loss`, `d_logs` and `d_residues`; see the package for shapes and dtypes."""
    channels, entries, _ = logs.shape
    dtype = torch.promote_types(target.dtype, residues.dtype)
    loss = torch.empty(channels, dtype=dtype, device=target.device)
    logs, residues = logs.contiguous(), residues.contiguous()
    d_logs, d_residues = torch.empty_like(logs), torch.empty_like(residues)
    if channels == 0:
        return loss, d_logs, d_residues
    size = next(size for size in CONFIGS if entries <= size)
    blocks, width, warps = CONFIGS[size]
    with device_guard(target):
        modal_fit_step_kernel[(channels,)](
            target,
            logs,
            residues,
            loss,
            d_logs,
            d_residues,
            entries,
            target.shape[1],
            *target.stride(),
            ACC=accumulator(dtype),
            BLOCKS=blocks,
            WIDTH=width,
            BLOCK_K=size,
            num_warps=warps,
            enable_fp_fusion=True,
        )
    return loss, d_logs, d_residues
