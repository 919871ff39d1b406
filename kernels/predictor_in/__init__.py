"""The first half of a predictor of active neurons: what it is given, in a few directions."""

from __future__ import annotations

import torch

from rewright.kernels import dispatch
from rewright.kernels.neurons import check_factor, check_out, check_rows, check_vector, wider
from rewright.kernels.predictor_in import reference

__all__ = ["predictor_in"]


def predictor_in(
    x: torch.Tensor,
    a: torch.Tensor,
    a0: torch.Tensor,
    a_scale: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """t = x A^T + a0 for at most 16 rows of x; of an int8 A a row is codes times its scale::

        t_bi = a_scale_i * (sum over k of a_ik x_bk) + a0_i

    x        [B, d] floating point, B <= 16. Any strides.
    a        [r, d] floating point, or int8.
    a0       [r] floating point.
    a_scale  [r] floating point for an int8 A, else None.
    out      the result's buffer, contiguous [B, r], or None.
    Returns t [B, r] float32 (float64 for a float64 x). All sums are in that dtype.

    No gradient flows. Raises ValueError for other shapes or dtypes, `KernelError` when Triton was asked for and cannot
    run. Source: Liu et al., Deja Vu (2023), section 4.1: a predictor of low rank without a nonlinearity.
    """
    check_rows("x", x)
    check_factor("a", a, x.shape[1], a_scale)
    check_vector("a0", a0, a.shape[0])
    check_out("out", out, (x.shape[0], a.shape[0]), wider(x.dtype))
    tensors = [t for t in (x, a, a0, a_scale, out) if t is not None]

    def supports() -> str | None:
        from rewright.kernels.predictor_in import triton

        return triton.supports(tensors)

    if dispatch.pick("predictor_in", tensors, supports):
        from rewright.kernels.predictor_in import triton

        return triton.predictor_in(x, a, a0, a_scale, out)
    return reference.predictor_in(x, a, a0, a_scale, out)
