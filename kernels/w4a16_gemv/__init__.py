"""A few rows of activations times a matrix of packed codes, as decoding one token at a time needs it."""

from __future__ import annotations

import torch

from rewright.kernels import dispatch
from rewright.kernels.operands import check_codes, check_inputs
from rewright.kernels.w4a16_gemv import reference

__all__ = ["MOST_ROWS", "w4a16_gemv"]

MOST_ROWS = 8


def w4a16_gemv(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    bits: int = 4,
) -> torch.Tensor:
    """y = x W^T + bias for at most 8 rows of x, W being the codes less their zero points, times their scales::

        y_mn = bias_n + sum over groups G of  scale_nG * sum over k in G of  (code_nk - zero_nG) x_mk

    Everything is computed in float32 (float64 for a float64 x) from codes as they are and scales as stored: no weight
    is rounded to the dtype of x, only y is. So it differs from `w4a16_gemm` by what rounding those weights costs.

    x       (M, K), M <= 8; bfloat16, float16, float32 or float64. Any strides.
    packed  (N, K*bits/32) int32, the layout of `pack`: at 4 bits eight codes a word, the lowest column in the lowest
            bits, each as code + 8.
    scale   (N, G), floating point; G groups of K / G consecutive columns each.
    zero    (N, G) int8, or None for 0.
    bias    (N,), floating point, or None.
    bits    2, 4 or 8.
    Returns (M, N) in the dtype of x, contiguous; equal inputs give equal bits. No gradient flows: `w4a16_gemm` has one.

    Raises ValueError for shapes, dtypes or widths other than these, `KernelError` when Triton was asked for and
    cannot run.
    """
    check_inputs(x, packed.shape[0], bias)
    check_codes(x.shape[1], packed, scale, zero, bits)
    if x.shape[0] > MOST_ROWS:
        raise ValueError(f"x must have at most {MOST_ROWS} rows, not {x.shape[0]}")
    x, scale = x.detach(), scale.detach()
    bias = None if bias is None else bias.detach()

    def supports() -> str | None:
        from rewright.kernels.w4a16_gemv import triton

        return triton.supports(x, packed, scale, bias, bits)

    tensors = [t for t in (x, packed, scale, zero, bias) if t is not None]
    if dispatch.pick("w4a16_gemv", tensors, supports):
        from rewright.kernels.w4a16_gemv import triton

        return triton.w4a16_gemv(x, packed, scale, zero, bias, bits)
    return reference.w4a16_gemv(x, packed, scale, zero, bias, bits)
