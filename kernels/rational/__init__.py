"""Values of a sum of poles at points of the complex plane."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from rewright.kernels import dispatch
from rewright.kernels.modal import WIDE, check_planes
from rewright.kernels.rational import reference

__all__ = ["rational"]


def rational(points: torch.Tensor, poles: torch.Tensor, residues: torch.Tensor, direct: torch.Tensor) -> torch.Tensor:
    """Frequency responses, with complex numbers as planes [..., 2] of real and imaginary part::

        values_cj = d_c + sum over k of r_ck / (x_j - p_ck)

    On x = e^(i omega) that is the transfer function of h_0 = d, h_t = sum r p^(t-1), on x = i omega that of a system in
    continuous time. A pole and its conjugate are two entries. A point at a pole gives what a division by 0 gives; an
    entry with r = 0 adds nothing, also there.

    points    [P, 2] float32 or float64: x.
    poles     [C, K, 2], residues [C, K, 2] and direct [C, 2] in the same dtype: p, r and d.
    Returns values [C, P, 2] in that dtype.

    Differentiable once in poles, residues and direct: with f = 1 / (x - p) and an upstream gradient g, those are the
    sums over points of g conj(r f^2), g conj(f) and g.

    Raises ValueError for other shapes or dtypes, `KernelError` when Triton was asked for and cannot run.
    """
    check_planes("poles", poles)
    if points.dim() != 2 or points.shape[1] != 2 or points.dtype not in WIDE:
        raise ValueError(f"points must be float32 or float64 [P, 2], not {points.dtype} {tuple(points.shape)}")
    check_planes("residues", residues, tuple(poles.shape))
    check_planes("direct", direct, (len(poles), 2))
    if not points.dtype == poles.dtype == residues.dtype == direct.dtype:
        raise ValueError(
            f"points, poles, residues and direct must be of one dtype, not {points.dtype}, {poles.dtype}, "
            f"{residues.dtype} and {direct.dtype}"
        )
    found: torch.Tensor = _Rational.apply(points, poles, residues, direct)  # type: ignore[no-untyped-call]  # torch's
    return found


class _Rational(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, points: torch.Tensor, poles: torch.Tensor, residues: torch.Tensor, direct: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(points, poles, residues)
        # A GPU's gradients are taken in another thread, which knows nothing of `use`.
        ctx.triton = dispatch.pick("rational", [points, poles, residues, direct], lambda: None)
        if ctx.triton:
            from rewright.kernels.rational import triton

            return triton.rational(points, poles, residues, direct)
        return reference.rational(points, poles, residues, direct)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.triton:
            from rewright.kernels.rational import triton

            return None, *triton.rational_backward(gradient, *ctx.saved_tensors)
        return None, *reference.rational_backward(gradient, *ctx.saved_tensors)
