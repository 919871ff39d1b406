"""A few rows of activations times a matrix of 4-bit codes of which each group keeps a fixed number."""

from __future__ import annotations

import torch

from rewright.kernels import dispatch
from rewright.kernels.bitmask_w4_gemv import reference
from rewright.kernels.operands import FLOATING, check_inputs
from rewright.kernels.w4a16_gemv import MOST_ROWS

__all__ = ["bitmask_w4_gemv"]


def bitmask_w4_gemv(
    x: torch.Tensor,
    mask: torch.Tensor,
    values: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = x W^T + bias for at most 8 rows of x, W being the kept codes times their scales and 0 elsewhere::

        y_mn = bias_n + sum over groups G of  scale_nG * sum over kept k in G of  code_nk x_mk

    The j-th kept column of a group, counted from the left, has the j-th code of its record. Everything is computed in
    float32 (float64 for a float64 x) from codes as they are and scales as stored; only y is rounded.

    x       (M, K), M <= 8; bfloat16, float16, float32 or float64. Any strides.
    mask    (N, G, group/8) uint8, K = G * group: bit k mod 8 of byte k // 8 is set where column k of the group is kept.
            Each group has as many bits set as `values` has codes for it; with other counts the result is undefined, and
            nothing outside the tensors is read.
    values  (N, G, nnz/2) uint8: two codes a byte, the first in the low half, each as code + 8.
    scale   (N, G), floating point.
    bias    (N,), floating point, or None.
    Returns (M, N) in the dtype of x, contiguous; equal inputs give equal bits. No gradient flows.

    Raises ValueError for other shapes or dtypes, `KernelError` when Triton was asked for and cannot run.
    """
    check_inputs(x, mask.shape[0], bias)
    _check(x, mask, values, scale)
    x, scale = x.detach(), scale.detach()
    bias = None if bias is None else bias.detach()

    def supports() -> str | None:
        from rewright.kernels.bitmask_w4_gemv import triton

        return triton.supports(x, mask, scale, bias)

    tensors = [t for t in (x, mask, values, scale, bias) if t is not None]
    if dispatch.pick("bitmask_w4_gemv", tensors, supports):
        from rewright.kernels.bitmask_w4_gemv import triton

        return triton.bitmask_w4_gemv(x, mask, values, scale, bias)
    return reference.bitmask_w4_gemv(x, mask, values, scale, bias)


def _check(x: torch.Tensor, mask: torch.Tensor, values: torch.Tensor, scale: torch.Tensor) -> None:
    if x.shape[0] > MOST_ROWS:
        raise ValueError(f"x must have at most {MOST_ROWS} rows, not {x.shape[0]}")
    if (
        mask.dtype != torch.uint8
        or values.dtype != torch.uint8
        or mask.dim() != 3
        or values.dim() != 3
        or mask.shape[:2] != values.shape[:2]
        or values.shape[2] > 4 * mask.shape[2]
    ):
        raise ValueError(
            f"mask and values must be uint8 (N, G, group/8) and (N, G, nnz/2), not "
            f"{mask.dtype} {tuple(mask.shape)} and {values.dtype} {tuple(values.shape)}"
        )
    if mask.shape[1] * mask.shape[2] * 8 != x.shape[1]:
        raise ValueError(f"{tuple(mask.shape)} bytes of mask are not those of {x.shape[1]} columns")
    if scale.shape != mask.shape[:2] or scale.dtype not in FLOATING:
        raise ValueError(
            f"scale must be floating point {tuple(mask.shape[:2])}, not {scale.dtype} {tuple(scale.shape)}"
        )
