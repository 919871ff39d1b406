"""`rational` and its gradient on a GPU: elementwise work, a program for some points or for one pole.

Complex numbers are pairs of planes. Points stay in the cache, so that the gradient reads them anew for each pole.
"""

# The arguments of a jit function are Triton's own values, which no annotation describes; triton ships no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from rewright.kernels.launch import cdiv, device_guard

POINTS = 256
WARPS = 4


@triton.jit
def divide(a, b):
    # Plain `/` on float32 is an approximation on NVIDIA GPUs; on float64 it is IEEE division.
    if b.dtype == tl.float32:
        return tl.div_rn(a, b)
    return a / b


@triton.jit
def inverse(x, y, pole, height, bulk):
    """1 / (x + i y - pole - i height), and 0 where that is 1 / 0 and the entry's bulk is 0."""
    right = x - pole
    up = y - height
    size = right * right + up * up
    size = tl.where(tl.maximum(size, bulk) == 0, 1.0, size)
    return divide(right, size), divide(-up, size)


@triton.jit
def rational_kernel(
    points_ptr, poles_ptr, residues_ptr, direct_ptr, out_ptr, points, entries, BLOCK: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = place < points
    x = tl.load(points_ptr + 2 * place, mask=here, other=0.0)
    y = tl.load(points_ptr + 2 * place + 1, mask=here, other=0.0)
    real = tl.zeros_like(x) + tl.load(direct_ptr + 2 * channel)
    imaginary = tl.zeros_like(x) + tl.load(direct_ptr + 2 * channel + 1)
    poles_at = poles_ptr + channel * entries * 2
    residues_at = residues_ptr + channel * entries * 2
    for k in range(entries):
        weight, turned = tl.load(residues_at + 2 * k), tl.load(residues_at + 2 * k + 1)
        bulk = tl.abs(weight) + tl.abs(turned)
        right, up = inverse(x, y, tl.load(poles_at + 2 * k), tl.load(poles_at + 2 * k + 1), bulk)
        real += weight * right - turned * up
        imaginary += weight * up + turned * right
    out_at = out_ptr + channel * points * 2 + 2 * place
    tl.store(out_at, real, mask=here)
    tl.store(out_at + 1, imaginary, mask=here)


@triton.jit
def rational_backward_kernel(
    gradient_ptr, points_ptr, poles_ptr, residues_ptr, d_poles_ptr, d_residues_ptr, points, entries,
    BLOCK: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0).to(tl.int64)
    at = (channel * entries + tl.program_id(1)) * 2
    pole, height = tl.load(poles_ptr + at), tl.load(poles_ptr + at + 1)
    weight, turned = tl.load(residues_ptr + at), tl.load(residues_ptr + at + 1)
    back, swung = tl.zeros([BLOCK], pole.dtype), tl.zeros([BLOCK], pole.dtype)
    slope, bent = tl.zeros([BLOCK], pole.dtype), tl.zeros([BLOCK], pole.dtype)
    gradient_at = gradient_ptr + channel * points * 2
    for first in range(0, points, BLOCK):
        place = first + tl.arange(0, BLOCK)
        here = place < points
        x = tl.load(points_ptr + 2 * place, mask=here, other=0.0)
        y = tl.load(points_ptr + 2 * place + 1, mask=here, other=0.0)
        g = tl.load(gradient_at + 2 * place, mask=here, other=0.0)
        h = tl.load(gradient_at + 2 * place + 1, mask=here, other=0.0)
        # A point past the last may lie on the pole.
        right, up = inverse(x, y, pole, height, tl.where(here, tl.abs(weight) + tl.abs(turned), 0.0))
        # g conj(f), and that times conj(f) once more.
        real, imaginary = g * right + h * up, h * right - g * up
        back += real
        swung += imaginary
        slope += real * right + imaginary * up
        bent += imaginary * right - real * up
    tl.store(d_residues_ptr + at, tl.sum(back, axis=0))
    tl.store(d_residues_ptr + at + 1, tl.sum(swung, axis=0))
    real, imaginary = tl.sum(slope, axis=0), tl.sum(bent, axis=0)
    tl.store(d_poles_ptr + at, weight * real + turned * imaginary)
    tl.store(d_poles_ptr + at + 1, weight * imaginary - turned * real)


def rational(points: torch.Tensor, poles: torch.Tensor, residues: torch.Tensor, direct: torch.Tensor) -> torch.Tensor:
    """values [C, P, 2]; see the package for shapes and dtypes."""
    channels, entries, _ = poles.shape
    out = torch.empty((channels, len(points), 2), dtype=points.dtype, device=points.device)
    if out.numel() > 0:
        with device_guard(points):
            rational_kernel[(channels, cdiv(len(points), POINTS))](
                points.contiguous(),
                poles.contiguous(),
                residues.contiguous(),
                direct.contiguous(),
                out,
                len(points),
                entries,
                BLOCK=POINTS,
                num_warps=WARPS,
                enable_fp_fusion=True,
            )
    return out


def rational_backward(
    gradient: torch.Tensor, points: torch.Tensor, poles: torch.Tensor, residues: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients in poles, residues and direct."""
    channels, entries, _ = poles.shape
    poles, residues = poles.contiguous(), residues.contiguous()
    d_poles, d_residues = torch.empty_like(poles), torch.empty_like(residues)
    if poles.numel() > 0:
        with device_guard(points):
            rational_backward_kernel[(channels, entries)](
                gradient.contiguous(),
                points.contiguous(),
                poles,
                residues,
                d_poles,
                d_residues,
                len(points),
                entries,
                BLOCK=POINTS,
                num_warps=WARPS,
                enable_fp_fusion=True,
            )
    return d_poles, d_residues, gradient.sum(dim=1)
