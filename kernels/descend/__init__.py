"""One pass of coordinate descent over the codes of a block of columns."""

from __future__ import annotations

from typing import NamedTuple

import torch

from rewright.kernels import dispatch
from rewright.kernels.descend import reference
from rewright.kernels.operands import check_grid

__all__ = ["Descent", "descend"]


class Descent(NamedTuple):
    """What a pass over a block of B columns yields for r rows, as views with contiguous columns.

    codes        (r, B) int8: the integer codes; the zero point where pruned, 0 without a grid
    dequantised  (r, B) in the value's dtype: (code - zero) * scale, or the weight itself without a grid; no -0.0
    """

    codes: torch.Tensor
    dequantised: torch.Tensor


def descend(
    value: torch.Tensor,
    gradient: torch.Tensor,
    hessian: torch.Tensor,
    scale: torch.Tensor | None = None,
    zero: torch.Tensor | None = None,
    keep: torch.Tensor | None = None,
    *,
    low: int,
    high: int,
) -> Descent:
    """Set B columns of Q in turn to the values of least tr (Q - W) H (Q - W)^T, all other columns being fixed.

    With q_j a column of `value` and G = (Q - W) H in the block's columns on entry, for j = 0 .. B-1::

        z_j    = q_j - G_j / H_jj                        (where the objective is least along the column)
        code_j = clamp(round_half_even(z_j / scale) + zero, low, high), the zero point where not kept
        q'_j   = (code_j - zero) * scale                 (without a scale: z_j where kept, else 0)
        G_k   += (q'_j - q_j) H_jk  for k > j

    The objective is a parabola along a column, so the nearest point of the grid is the best one: where q_j is itself
    on the grid and q_j is 0 where pruned, no step raises it. It is the cyclic coordinate descent of QuantEase (Behdad
    et al. 2023, section 3) for a fixed grid and mask.

    value     (r, B) float16, bfloat16, float32 or float64, finite; not modified. Any strides; a transposed view of a
              (B, r) tensor is read without a copy. Half precision is computed in float32 and rounded at the end.
    gradient  (r, B) floating point, not modified. The caller adds (q' - q) H[block, others] to the other columns.
    hessian   (B, B): the diagonal block of H. Only the upper triangle is read; its diagonal is positive.
    scale     (r,) or None for pruning alone. Where it is 0 the value is 0 and the code is the zero point.
    zero      (r,) integers in any dtype, low <= zero <= high, or None for 0.
    keep      (r, B) bool, False where pruned, or None to keep all.
    low, high   the range of codes, within int8.

    Divisions are IEEE-rounded and ties go to even in both implementations, so that they choose equal codes wherever
    their sums are equal. No gradient flows.

    Raises ValueError for shapes, dtypes or ranges other than these, `KernelError` when Triton was asked for and
    cannot run.
    """
    _check(value, gradient, hessian, scale, zero, keep, low, high)
    value, gradient = value.detach(), gradient.detach()

    def supports() -> str | None:
        from rewright.kernels.descend import triton

        return triton.supports(value)

    tensors = [t for t in (value, gradient, hessian, scale, zero, keep) if t is not None]
    if dispatch.pick("descend", tensors, supports):
        from rewright.kernels.descend import triton

        return Descent(*triton.descend(value, gradient, hessian, scale, zero, keep, low, high))
    return Descent(*reference.descend(value, gradient, hessian, scale, zero, keep, low, high))


def _check(
    value: torch.Tensor,
    gradient: torch.Tensor,
    hessian: torch.Tensor,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    keep: torch.Tensor | None,
    low: int,
    high: int,
) -> None:
    if value.dim() != 2 or not value.dtype.is_floating_point:
        raise ValueError(f"value must be a floating-point matrix, not {value.dtype} {tuple(value.shape)}")
    r, width = value.shape
    for name, tensor, shape in (("gradient", gradient, (r, width)), ("hessian", hessian, (width, width))):
        if tensor.shape != shape or not tensor.dtype.is_floating_point:
            raise ValueError(f"{name} must be floating point {shape}, not {tensor.dtype} {tuple(tensor.shape)}")
    check_grid(r, width, scale, zero, keep, low, high)
