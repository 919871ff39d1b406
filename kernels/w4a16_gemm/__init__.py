"""Activations times a matrix of packed codes, for any number of rows, with a gradient to the activations."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from rewright.kernels import dispatch
from rewright.kernels.operands import check_codes, check_inputs
from rewright.kernels.w4a16_gemm import reference

__all__ = ["w4a16_gemm", "w4a16_gemm_dx"]


def w4a16_gemm(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    bits: int = 4,
) -> torch.Tensor:
    """y = x W^T + bias, W being what plain transformers decodes the codes to in the dtype of x::

        w_nk = round(round(code_nk - zero_nG) * round(scale_nG))      k in group G, round to the dtype of x
        y_mn = round(bias_n + sum over k of w_nk x_mk)

    Sums are taken in float32 (float64 for a float64 x), a product of float32 never in TF32. W is decoded piece by
    piece, never whole.

    x       (M, K); bfloat16, float16, float32 or float64. Any strides.
    packed  (N, K*bits/32) int32, the layout of `pack`: at 4 bits eight codes a word, the lowest column in the lowest
            bits, each as code + 8.
    scale   (N, G), floating point; G groups of K / G consecutive columns each.
    zero    (N, G) int8, or None for 0.
    bias    (N,), floating point, or None.
    bits    2, 4 or 8.
    Returns (M, N) in the dtype of x, contiguous.

    The gradient of x is dy W (`w4a16_gemm_dx`), that of the bias the sum of dy over rows; the codes, scales and zero
    points get none. W is decoded again for it, by the implementation that the product ran on. No second derivative.

    Raises ValueError for shapes, dtypes or widths other than these, `KernelError` when Triton was asked for and
    cannot run.
    """
    check_inputs(x, packed.shape[0], bias)
    check_codes(x.shape[1], packed, scale, zero, bits)
    product: torch.Tensor = _Product.apply(x, bias, packed, scale, zero, bits)  # type: ignore[no-untyped-call]  # torch's
    return product


def w4a16_gemm_dx(
    dy: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None = None,
    *,
    bits: int = 4,
) -> torch.Tensor:
    """dx = dy W, (M, N) to (M, K): the gradient of x through `w4a16_gemm`, with W in the dtype of dy.

    The other arguments are as there; raises as there. No gradient flows.
    """
    check_inputs(dy, packed.shape[0], None, "dy")
    check_codes(packed.shape[-1] * 32 // max(bits, 1), packed, scale, zero, bits)
    if dy.shape[1] != packed.shape[0]:
        raise ValueError(f"dy must be (M, {packed.shape[0]}), not {tuple(dy.shape)}")
    dy, scale = dy.detach(), scale.detach()
    if _on_triton("w4a16_gemm_dx", dy, packed, scale, zero, None, bits):
        from rewright.kernels.w4a16_gemm import triton

        return triton.w4a16_gemm_dx(dy, packed, scale, zero, bits)
    return reference.w4a16_gemm_dx(dy, packed, scale, zero, bits)


def _on_triton(
    op: str,
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
) -> bool:
    def supports() -> str | None:
        from rewright.kernels.w4a16_gemv.triton import supports as takes

        return takes(x, packed, scale, bias, bits)

    return dispatch.pick(op, [t for t in (x, packed, scale, zero, bias) if t is not None], supports)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        packed: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor | None,
        bits: int,
    ) -> torch.Tensor:
        ctx.save_for_backward(packed, scale, zero)
        ctx.bits = bits
        ctx.bias_dtype = None if bias is None else bias.dtype
        # A GPU's gradients are taken in another thread, which knows nothing of `use`.
        ctx.choice = "reference"
        if _on_triton("w4a16_gemm", x, packed, scale, zero, bias, bits):
            from rewright.kernels.w4a16_gemm import triton

            ctx.choice = "triton"
            return triton.w4a16_gemm(x, packed, scale, zero, bias, bits)
        return reference.w4a16_gemm(x, packed, scale, zero, bias, bits)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        packed, scale, zero = ctx.saved_tensors
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            with dispatch.use(ctx.choice):
                dx = w4a16_gemm_dx(dy, packed, scale, zero, bits=ctx.bits)
        if ctx.needs_input_grad[1]:
            dbias = dy.sum(dim=0, dtype=torch.promote_types(dy.dtype, torch.float32)).to(ctx.bias_dtype)
        return dx, dbias, None, None, None, None
