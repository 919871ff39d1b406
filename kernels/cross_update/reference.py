"""The definition of `cross_update`: one matrix product, widened a piece at a time."""

from __future__ import annotations

import torch

# A half-precision input is widened this many values at a time: 2**22 are 16 MiB of float32.
_WIDENED = 1 << 22


def cross_update(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, alpha: float) -> None:
    """total += alpha left^T right, in place; see the package for shapes and dtypes."""
    n, width = len(left), max(left.shape[1], right.shape[1])
    if n == 0 or total.numel() == 0:
        return
    step = n if left.dtype == right.dtype == total.dtype else max(1, _WIDENED // width)
    for start in range(0, n, step):
        piece = slice(start, start + step)
        total.addmm_(left[piece].to(total.dtype).t(), right[piece].to(total.dtype), alpha=alpha)
