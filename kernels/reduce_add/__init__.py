"""What several programs have summed, added up in a fixed order with what else a block adds."""

from __future__ import annotations

import torch

from rewright.kernels import dispatch
from rewright.kernels.neurons import check_out, check_vector
from rewright.kernels.operands import FLOATING
from rewright.kernels.reduce_add import reference

__all__ = ["reduce_add"]


def reduce_add(
    partial: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    dtype: torch.dtype,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = sum over p of partial_p + bias + residual, rounded once to `dtype`.

    partial   [P, B, d] float32 or float64, as `sparse_mlp` returns it. Any strides, the last one 1.
    bias      [d] floating point, or None.
    residual  [B, d] floating point, or None. Any strides.
    dtype     floating point.
    out       the result's buffer, contiguous [B, d], or None.
    Returns y [B, d]. Sums are in the dtype of `partial`, in an order that shapes alone decide.

    No gradient flows. Raises ValueError for other shapes or dtypes, `KernelError` when Triton was asked for and cannot
    run.
    """
    if partial.dim() != 3 or partial.dtype not in (torch.float32, torch.float64) or partial.stride(2) != 1:
        raise ValueError(
            f"partial must be float32 or float64 [parts, rows, width] of numbers that lie side by side, "
            f"not {partial.dtype} {tuple(partial.shape)} of strides {partial.stride()}"
        )
    shape = tuple(partial.shape[1:])
    check_vector("bias", bias, shape[1])
    if residual is not None and (residual.shape != shape or residual.dtype not in FLOATING):
        raise ValueError(f"residual must be floating point {shape}, not {residual.dtype} {tuple(residual.shape)}")
    if dtype not in FLOATING:
        raise ValueError(f"dtype must be floating point, not {dtype}")
    check_out("out", out, shape, dtype)
    tensors = [t for t in (partial, bias, residual, out) if t is not None]

    def supports() -> str | None:
        from rewright.kernels.reduce_add import triton

        return triton.supports(tensors)

    if dispatch.pick("reduce_add", tensors, supports):
        from rewright.kernels.reduce_add import triton

        return triton.reduce_add(partial, bias, residual, dtype, out)
    return reference.reduce_add(partial, bias, residual, dtype, out)
