"""The second moment of a layer's inputs, accumulated in place."""

from __future__ import annotations

import torch

from rewright.kernels import dispatch
from rewright.kernels.hessian_update import reference

__all__ = ["hessian_update"]


def hessian_update(H: torch.Tensor, X: torch.Tensor, alpha: float) -> None:
    """H += alpha X^T X, in place.

    With alpha = 2/N summed over N calibration tokens, H is the Hessian of ||W X^T - Q X^T||^2 for every row of Q
    (Frantar et al., GPTQ, 2022, section 3; SparseGPT, 2023, equation 3).

    H       (c, c), float32 or float64, symmetric on entry and exit: the lower triangle is read and updated, the
            upper one is its mirror, so the result is symmetric to the last bit. Any strides.
    X       (n, c), float16, bfloat16, float32 or float64; n may be 0. Any strides. Nothing flows back: no gradient.
    alpha   the factor, rounded to H's dtype.

    Sums are taken in H's dtype: products of half-precision inputs are exact in float32, float32 inputs are never
    rounded to TF32.

    Raises ValueError for shapes or dtypes other than these, `KernelError` when Triton was asked for and cannot run.
    """
    if H.dim() != 2 or H.shape[0] != H.shape[1] or X.dim() != 2 or X.shape[1] != H.shape[0]:
        raise ValueError(f"H must be (c, c) and X (n, c), not {tuple(H.shape)} and {tuple(X.shape)}")
    if H.dtype not in (torch.float32, torch.float64) or not X.dtype.is_floating_point:
        raise ValueError(f"H must be float32 or float64 and X floating point, not {H.dtype} and {X.dtype}")
    if H.requires_grad or X.requires_grad:
        H, X = H.detach(), X.detach()

    def supports() -> str | None:
        from rewright.kernels.hessian_update import triton

        return triton.supports(H, X)

    if dispatch.pick("hessian_update", (H, X), supports):
        from rewright.kernels.hessian_update import triton

        triton.hessian_update(H, X, alpha)
    else:
        reference.hessian_update(H, X, alpha)
