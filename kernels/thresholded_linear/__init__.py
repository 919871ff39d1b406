"""A product of which only those rows of the matrix are read whose factor is past a threshold."""

from __future__ import annotations

import torch

from rewright.kernels import dispatch
from rewright.kernels.neurons import check_rows, check_vector, wider
from rewright.kernels.operands import FLOATING
from rewright.kernels.thresholded_linear import reference

__all__ = ["thresholded_linear"]


def thresholded_linear(
    x: torch.Tensor, weight_t: torch.Tensor, threshold: torch.Tensor, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Partial sums over the columns of at most 16 rows of x that are past their thresholds in any of these rows::

        y_m = sum over those i with |x_bi| > threshold_i for some b of x_mi * weight_t_i
        and y is the sum over all P partials

    x          [B, d] floating point, B <= 16. Any strides.
    weight_t   [d, N] finite floating point: a linear module's matrix transposed, so that what a column of x is
               multiplied by lies together; of several modules that are fed by one x beside each other.
    threshold  [d] floating point; below 0 a column is always read, at infinity never.
    out        a buffer for the result, contiguous [P, B, N] with any P of at least 1, or None.
    Returns partial [P, B, N] float32 (float64 for a float64 x), for `reduce_add`. P depends on shapes and the device
    alone, and is 1 on a CPU. All sums are in that dtype; equal inputs give equal bits.

    No gradient flows. Raises ValueError for other shapes or dtypes, `KernelError` when Triton was asked for and cannot
    run. Source: Liu et al., TEAL (2024), section 4.
    """
    check_rows("x", x)
    width = x.shape[1]
    if weight_t.dim() != 2 or weight_t.shape[0] != width or weight_t.dtype not in FLOATING:
        raise ValueError(
            f"weight_t must be floating point [{width}, rows], not {weight_t.dtype} {tuple(weight_t.shape)}"
        )
    check_vector("threshold", threshold, width)
    shape = (len(x), weight_t.shape[1])
    if out is not None and (
        out.dim() != 3
        or out.shape[1:] != shape
        or out.dtype != wider(x.dtype)
        or not len(out)
        or not out.is_contiguous()
    ):
        raise ValueError(
            f"out must be contiguous {wider(x.dtype)} {('programs', *shape)}, not {out.dtype} {tuple(out.shape)}"
        )
    tensors = [t for t in (x, weight_t, threshold, out) if t is not None]

    def supports() -> str | None:
        from rewright.kernels.thresholded_linear import triton

        return triton.supports(tensors)

    if dispatch.pick("thresholded_linear", tensors, supports):
        from rewright.kernels.thresholded_linear import triton

        return triton.thresholded_linear(x, weight_t, threshold, out)
    return reference.thresholded_linear(x, weight_t, threshold, out)
