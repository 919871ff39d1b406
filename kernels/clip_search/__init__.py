"""Scale and zero point of a group of weights: the clip of least weighted rounding error."""

from __future__ import annotations

from typing import NamedTuple

import torch

from rewright.kernels import dispatch
from rewright.kernels.clip_search import reference

__all__ = ["ClipSearch", "clip_search"]

STORED = (torch.float16, torch.bfloat16, torch.float32)


class ClipSearch(NamedTuple):
    """The grid of each of r rows.

    scale   (r,) float32, positive: a value of the dtype in which scales are stored
    zero    (r,) float32: a whole number among the codes, 0 when symmetric
    """

    scale: torch.Tensor
    zero: torch.Tensor


def clip_search(
    weight: torch.Tensor,
    keep: torch.Tensor | None = None,
    importance: torch.Tensor | None = None,
    *,
    bits: int,
    symmetric: bool,
    shares: tuple[float, ...],
    stored: torch.dtype,
) -> ClipSearch:
    """Choose each row's grid for one group of g columns, by trying shares of the range that its weights span.

    With a the least kept weight of a row or 0, b the greatest or 0, and codes from -2^(bits-1) to 2^(bits-1) - 1,
    each share p makes the grid::

        scale = guard(2 max(-p a, p b) / (2^bits - 1)),   zero = 0                        when symmetric
        scale = guard((p b - p a) / (2^bits - 1)),        zero = rhe(-p a / scale) - 2^(bits-1), clamped to the codes

    guard rounds to `stored` and keeps the result positive and finite there; a row without kept weights gets 1. The
    grid of least sum_j importance_j (q_j - w_j)^2 over the kept columns wins, q_j being the grid's nearest value to
    w_j; of equals the first. `shares == (1.0,)` is the grid of the full range. Clipping by search is from Choukroun et
    al. (2019, section 3); weighting it with the diagonal of the Hessian is the diagonal term of GPTQ's objective.

    weight      (r, g) float16, bfloat16, float32 or float64, finite. Any strides; a transposed view of a (g, r)
                tensor is read without a copy. Half precision is computed in float32.
    keep        (r, g) bool, False where pruned, or None to keep all.
    importance  (g,) floating point, not negative, or None for 1.
    bits        2 to 8.
    shares      fractions of the range, the first of which is the default; positive, at most 1.
    stored      float16, bfloat16 or float32.

    Raises ValueError for shapes, dtypes or ranges other than these, `KernelError` when Triton was asked for and
    cannot run.
    """
    _check(weight, keep, importance, bits, shares, stored)
    weight = weight.detach()

    def supports() -> str | None:
        from rewright.kernels.clip_search import triton

        return triton.supports(weight)

    tensors = [t for t in (weight, keep, importance) if t is not None]
    if dispatch.pick("clip_search", tensors, supports):
        from rewright.kernels.clip_search import triton

        return ClipSearch(*triton.clip_search(weight, keep, importance, bits, symmetric, shares, stored))
    return ClipSearch(*reference.clip_search(weight, keep, importance, bits, symmetric, shares, stored))


def _check(
    weight: torch.Tensor,
    keep: torch.Tensor | None,
    importance: torch.Tensor | None,
    bits: int,
    shares: tuple[float, ...],
    stored: torch.dtype,
) -> None:
    if weight.dim() != 2 or not weight.dtype.is_floating_point:
        raise ValueError(f"weight must be a floating-point matrix, not {weight.dtype} {tuple(weight.shape)}")
    r, size = weight.shape
    if keep is not None and (keep.shape != weight.shape or keep.dtype != torch.bool):
        raise ValueError(f"keep must be bool ({r}, {size}), not {keep.dtype} {tuple(keep.shape)}")
    if importance is not None and (importance.shape != (size,) or not importance.dtype.is_floating_point):
        raise ValueError(f"importance must be ({size},), not {importance.dtype} {tuple(importance.shape)}")
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be 2 to 8, not {bits}")
    if not shares or not all(0 < share <= 1 for share in shares):
        raise ValueError(f"shares must be positive and at most 1, not {shares}")
    if stored not in STORED:
        raise ValueError(f"scales must be stored in float16, bfloat16 or float32, not {stored}")
