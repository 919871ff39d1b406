"""`vandermonde` and its adjoint on a GPU: both tables of powers are made in registers, and multiplied there.

A program takes one channel and some blocks of WIDTH steps, t = WIDTH a + b. Poles are read in float64, so that phases
are exact; the tables and products are float32 (float64 in the interpreter), never TF32.
"""

# The arguments of a jit function are Triton's own values, which no annotation describes; triton ships no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from rewright.kernels.launch import cdiv, device_guard
from rewright.kernels.poles import accumulator, apart, load_planes, power, refused, side_by_side

# Blocks in a tile, steps of a block, poles at a time. The adjoint's product goes over the steps of a block, which all
# have to be in registers at once.
SUM = {"BLOCKS": 64, "WIDTH": 64, "BLOCK_K": 8}
ADJOINT = {"BLOCKS": 64, "WIDTH": 32, "BLOCK_K": 8}
WARPS = 8
# Below so many programs, the steps of a channel are split among several.
PROGRAMS = 512


@triton.jit
def vandermonde_kernel(
    logs_ptr, residues_ptr, out_ptr, entries, length,
    ACC: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * (BLOCKS * WIDTH)
    logs_at = logs_ptr + channel * entries * 2
    residues_at = residues_ptr + channel * entries * 2
    block = tl.arange(0, BLOCKS) * WIDTH
    step = tl.arange(0, WIDTH)
    coarse = (first + block).to(tl.float64)[:, None]
    fine = step.to(tl.float64)[:, None]
    tile = tl.zeros([BLOCKS, WIDTH], ACC)
    for start in range(0, entries, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        rate, angle = load_planes(logs_at, k, entries)
        weight, turned = load_planes(residues_at, k, entries)
        weight, turned = weight.to(ACC)[None, :], turned.to(ACC)[None, :]
        real, imaginary = power(rate[None, :], angle[None, :], coarse, ACC)
        left = side_by_side(weight * real - turned * imaginary, -(weight * imaginary + turned * real))
        real, imaginary = power(rate[None, :], angle[None, :], fine, ACC)
        right = tl.trans(side_by_side(real, imaginary))
        tile = tl.dot(left, right, tile, input_precision="ieee", out_dtype=ACC)
    place = first + block[:, None] + step[None, :]
    tl.store(out_ptr + channel * length + place, tile, mask=place < length)


@triton.jit
def vandermonde_adjoint_kernel(
    logs_ptr, values_ptr, out_ptr, channels, entries, length, span, channel_stride, time_stride,
    ACC: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    part = tl.program_id(2).to(tl.int64)
    rate, angle = load_planes(logs_ptr + channel * entries * 2, k, entries)
    rate, angle = rate[None, :], angle[None, :]
    block = tl.arange(0, BLOCKS) * WIDTH
    step = tl.arange(0, WIDTH)
    cosine, sine = power(rate, angle, step.to(tl.float64)[:, None], ACC)
    near = side_by_side(cosine, sine)
    far = near * step.to(ACC)[:, None]
    sums, turned = tl.zeros([BLOCK_K], ACC), tl.zeros([BLOCK_K], ACC)
    moments, twisted = tl.zeros([BLOCK_K], ACC), tl.zeros([BLOCK_K], ACC)
    values_at = values_ptr + channel * channel_stride
    begin = part.to(tl.int32) * span
    for first in range(begin, tl.minimum(begin + span, length), BLOCKS * WIDTH):
        place = first + block[:, None] + step[None, :]
        tile = tl.load(values_at + place.to(tl.int64) * time_stride, mask=place < length, other=0.0).to(ACC)
        start = (first + block)[:, None]
        real, imaginary = power(rate, angle, start.to(tl.float64), ACC)
        inner, crossed = apart(tl.dot(tile, near, input_precision="ieee", out_dtype=ACC))
        sums += tl.sum(real * inner - imaginary * crossed, axis=0)
        turned += tl.sum(real * crossed + imaginary * inner, axis=0)
        outer, bent = apart(tl.dot(tile, far, input_precision="ieee", out_dtype=ACC))
        outer += start.to(ACC) * inner
        bent += start.to(ACC) * crossed
        moments += tl.sum(real * outer - imaginary * bent, axis=0)
        twisted += tl.sum(real * bent + imaginary * outer, axis=0)
    out_at = out_ptr + ((part * 2 * channels + channel) * entries + k) * 2
    tl.store(out_at, sums, mask=k < entries)
    tl.store(out_at + 1, turned, mask=k < entries)
    out_at += tl.cast(channels, tl.int64) * entries * 2
    tl.store(out_at, moments, mask=k < entries)
    tl.store(out_at + 1, twisted, mask=k < entries)


def supports(logs: torch.Tensor, values: torch.Tensor) -> str | None:
    """None, or why the kernels cannot take residues or values of this dtype; logs may be float64."""
    return refused(values)


def vandermonde(logs: torch.Tensor, residues: torch.Tensor, length: int) -> torch.Tensor:
    """h [C, length]; see the package for shapes and dtypes."""
    channels, entries, _ = logs.shape
    out = torch.empty((channels, length), dtype=residues.dtype, device=residues.device)
    if out.numel() == 0:
        return out
    with device_guard(out):
        vandermonde_kernel[(channels, cdiv(length, SUM["BLOCKS"] * SUM["WIDTH"]))](
            logs.contiguous(),
            residues.contiguous(),
            out,
            entries,
            length,
            ACC=accumulator(out.dtype),
            **SUM,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
    return out


def vandermonde_adjoint(logs: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`sums` and `moments` [C, K, 2]; see the package for shapes and dtypes."""
    channels, entries, _ = logs.shape
    length = values.shape[1]
    dtype = torch.promote_types(values.dtype, torch.float32)
    steps = ADJOINT["BLOCKS"] * ADJOINT["WIDTH"]
    groups = cdiv(entries, ADJOINT["BLOCK_K"])
    parts = max(1, min(cdiv(length, steps), PROGRAMS // max(channels * groups, 1)))
    span = cdiv(cdiv(length, steps), parts) * steps
    out = torch.empty((parts, 2, channels, entries, 2), dtype=dtype, device=values.device)
    if out.numel() > 0:
        with device_guard(values):
            vandermonde_adjoint_kernel[(channels, groups, parts)](
                logs.contiguous(),
                values,
                out,
                channels,
                entries,
                length,
                span,
                *values.stride(),
                ACC=accumulator(dtype),
                **ADJOINT,
                num_warps=WARPS,
                enable_fp_fusion=True,
            )
    total = out[0] if parts == 1 else out.sum(dim=0)
    return total[0], total[1]
