"""The elementwise half of an iteration of ADMM that chooses zeros."""

from __future__ import annotations

import torch

from rewright.kernels import dispatch
from rewright.kernels.admm_step import reference

__all__ = ["admm_step"]


def admm_step(target: torch.Tensor, weight: torch.Tensor, dual: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Project on the kept weights, update the dual in place and return the right-hand side of the next solve.

    One step of the alternating direction method with scaled dual (Boyd et al. 2011, section 3.1.1; Boža 2024,
    algorithm 1, for pruning), with rho = 1 and the projection Z on the weights that may be other than zero::

        S   = weight + dual
        Z   = S where kept, else 0
        U   = S - Z                              (the new dual: S where pruned, else 0)
        rhs = target + Z - U

    The caller then sets weight = rhs (G + I)^-1 for target = V G.

    target  (r, c) float16, bfloat16, float32 or float64. Any strides. Not modified.
    weight  (r, c) in the dtype of `target`. Any strides. Not modified.
    dual    (r, c) in the dtype of `target`; becomes U. Any strides, no two elements in one place.
    keep    (r, c) bool, False where pruned. Any strides.
    Returns rhs, (r, c) in the dtype of `target`, contiguous.

    Half precision is computed in float32 and rounded at the end. Each result is one or two IEEE sums, so that both
    implementations are equal to the last bit. No gradient flows.

    Raises ValueError for shapes or dtypes other than these, `KernelError` when Triton was asked for and cannot run.
    """
    if target.dim() != 2 or not target.dtype.is_floating_point:
        raise ValueError(f"target must be a floating-point matrix, not {target.dtype} {tuple(target.shape)}")
    for name, tensor, dtype in (
        ("weight", weight, target.dtype),
        ("dual", dual, target.dtype),
        ("keep", keep, torch.bool),
    ):
        if tensor.shape != target.shape or tensor.dtype != dtype:
            raise ValueError(f"{name} must be {dtype} {tuple(target.shape)}, not {tensor.dtype} {tuple(tensor.shape)}")
    target, weight, dual = target.detach(), weight.detach(), dual.detach()

    def supports() -> str | None:
        from rewright.kernels.admm_step import triton

        return triton.supports(target)

    if dispatch.pick("admm_step", (target, weight, dual, keep), supports):
        from rewright.kernels.admm_step import triton

        return triton.admm_step(target, weight, dual, keep)
    return reference.admm_step(target, weight, dual, keep)
