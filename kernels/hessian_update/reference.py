"""The definition of `hessian_update`, blocked so that only the lower half is multiplied."""

from __future__ import annotations

import torch

# Wide enough for BLAS to run at full speed, narrow enough that little above the diagonal is computed.
_COLUMNS = 256
# A half-precision X is widened this many rows at a time: 2**22 elements are 16 MiB of float32.
_WIDENED = 1 << 22


def hessian_update(H: torch.Tensor, X: torch.Tensor, alpha: float) -> None:
    """H += alpha X^T X, in place; see the package for shapes and dtypes."""
    n, c = X.shape
    if n == 0 or c == 0:
        return
    if X.dtype == H.dtype:
        _accumulate(H, X, alpha)
        return
    step = max(1, _WIDENED // c)
    for start in range(0, n, step):
        _accumulate(H, X[start : start + step].to(H.dtype), alpha)


def _accumulate(H: torch.Tensor, X: torch.Tensor, alpha: float) -> None:
    c = H.shape[0]
    for start in range(0, c, _COLUMNS):
        stop = min(start + _COLUMNS, c)
        rows = H[start:stop, :stop]
        rows.addmm_(X[:, start:stop].t(), X[:, :stop], alpha=alpha)
        H[:start, start:stop] = rows[:, :start].t()
        square = rows[:, start:]
        square.copy_(square.tril() + square.tril(-1).t())
