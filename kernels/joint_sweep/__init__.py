"""One block of the joint quantise-and-prune sweep with shared error feedback."""

from __future__ import annotations

from typing import NamedTuple

import torch

from rewright.kernels import dispatch
from rewright.kernels.joint_sweep import reference
from rewright.kernels.operands import check_grid

__all__ = ["JointSweep", "joint_sweep"]


class JointSweep(NamedTuple):
    """What a sweep over a block of B columns yields for r rows.

    codes        (r, B) int8: the integer codes; the zero point where pruned, 0 without a grid
    dequantised  (r, B): (code - zero) * scale, or the kept weight itself without a grid; zeros are +0.0
    error        (r, B): e_j = (w_j - q_j) / U_jj; the caller applies W[:, later] -= error @ U[block, later]
    loss         (r,): sum_j e_j^2 / 2, the rise of the layer's squared output error

    The floating-point ones have the weight's dtype. All are views with contiguous columns, as sweeps read them.
    """

    codes: torch.Tensor
    dequantised: torch.Tensor
    error: torch.Tensor
    loss: torch.Tensor


def joint_sweep(
    weight: torch.Tensor,
    factor: torch.Tensor,
    scale: torch.Tensor | None = None,
    zero: torch.Tensor | None = None,
    keep: torch.Tensor | None = None,
    *,
    low: int,
    high: int,
) -> JointSweep:
    """Quantise and prune B columns left to right, each column's error fed into the columns after it.

    For j = 0 .. B-1, with w_j the current column (corrected for the errors before it)::

        z_j    = w_j where kept, else 0
        code_j = clamp(round_half_even(z_j / scale) + zero, low, high)
        q_j    = (code_j - zero) * scale                 (z_j itself when scale is None)
        e_j    = (w_j - q_j) / U_jj                      (w_j unmasked: pruning is part of the error)
        w_k   -= e_j U_jk  for k > j,   loss += e_j^2 / 2

    This is GPTQ's inner loop (Frantar et al. 2022, algorithm 1) with SparseGPT's mask (2023, algorithm 1) applied
    before rounding.

    weight  (r, B) float16, bfloat16, float32 or float64, finite; not modified. Any strides; a transposed view of a
            (B, r) tensor is read without a copy. Half precision is computed in float32 and rounded at the end.
    factor  (B, B): the diagonal block of the upper Cholesky factor U of the inverse Hessian, H^-1 = U^T U. Only the
            upper triangle is read; its diagonal is positive.
    scale   (r,) or None for pruning alone. Where it is 0 the value is 0 and the code is the zero point.
    zero    (r,) integers in any dtype, low <= zero <= high, or None for 0.
    keep    (r, B) bool, False where pruned, or None to keep all.
    low, high   the range of codes, within int8.

    The division is IEEE-rounded and ties go to even in both implementations, so that they choose equal codes
    wherever their sums are equal. No gradient.

    Raises ValueError for shapes, dtypes or ranges other than these, `KernelError` when Triton was asked for and
    cannot run.
    """
    _check(weight, factor, scale, zero, keep, low, high)
    weight = weight.detach()

    def supports() -> str | None:
        from rewright.kernels.joint_sweep import triton

        return triton.supports(weight)

    tensors = [t for t in (weight, factor, scale, zero, keep) if t is not None]
    if dispatch.pick("joint_sweep", tensors, supports):
        from rewright.kernels.joint_sweep import triton

        return JointSweep(*triton.joint_sweep(weight, factor, scale, zero, keep, low, high))
    return JointSweep(*reference.joint_sweep(weight, factor, scale, zero, keep, low, high))


def _check(
    weight: torch.Tensor,
    factor: torch.Tensor,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    keep: torch.Tensor | None,
    low: int,
    high: int,
) -> None:
    if weight.dim() != 2 or not weight.dtype.is_floating_point:
        raise ValueError(f"weight must be a floating-point matrix, not {weight.dtype} {tuple(weight.shape)}")
    r, width = weight.shape
    if factor.shape != (width, width) or not factor.dtype.is_floating_point:
        raise ValueError(f"factor must be ({width}, {width}), not {factor.dtype} {tuple(factor.shape)}")
    check_grid(r, width, scale, zero, keep, low, high)
