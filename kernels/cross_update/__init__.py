"""The mixed second moment of two inputs, accumulated in place."""

from __future__ import annotations

import torch

from rewright.kernels import dispatch
from rewright.kernels.cross_update import reference

__all__ = ["cross_update"]


def cross_update(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, alpha: float) -> None:
    """total += alpha left^T right, in place.

    With `left` the inputs of a matrix in the dense model and `right` those in the compressed one, token by token, the
    sum C makes W C (H + lambda I)^-1 the weights that repeat the dense outputs from the compressed inputs: the normal
    equations of a ridge regression.

    total   (a, b), float32 or float64. Any strides.
    left    (n, a), float16, bfloat16, float32 or float64; n may be 0. Any strides.
    right   (n, b), the same; its dtype may differ from that of `left`.
    alpha   the factor, rounded to the dtype of `total`.

    Sums are taken in the dtype of `total`: products of half-precision inputs are exact in float32, float32 inputs are
    never rounded to TF32. No gradient flows.

    Raises ValueError for shapes or dtypes other than these, `KernelError` when Triton was asked for and cannot run.
    """
    matrices = total.dim() == left.dim() == right.dim() == 2
    if not matrices or len(left) != len(right) or total.shape != (left.shape[1], right.shape[1]):
        raise ValueError(
            "total must be (a, b), left (n, a) and right (n, b), "
            f"not {tuple(total.shape)}, {tuple(left.shape)} and {tuple(right.shape)}"
        )
    floating = left.dtype.is_floating_point and right.dtype.is_floating_point
    if total.dtype not in (torch.float32, torch.float64) or not floating:
        raise ValueError(
            "total must be float32 or float64, left and right floating point, "
            f"not {total.dtype}, {left.dtype} and {right.dtype}"
        )
    total, left, right = total.detach(), left.detach(), right.detach()

    def supports() -> str | None:
        from rewright.kernels.cross_update import triton

        return triton.supports(total, left, right)

    if dispatch.pick("cross_update", (total, left, right), supports):
        from rewright.kernels.cross_update import triton

        triton.cross_update(total, left, right, alpha)
    else:
        reference.cross_update(total, left, right, alpha)
