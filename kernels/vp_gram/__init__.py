"""Gram matrices of the real basis of a set of poles, in closed form."""

from __future__ import annotations

import torch

from rewright.kernels import dispatch
from rewright.kernels.modal import check_length, check_planes
from rewright.kernels.vp_gram import reference

__all__ = ["vp_gram"]


def vp_gram(logs: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inner products over t = 0 .. L-1 of the 2K columns phi that make h = phi @ [Re R; Im R] of a sum of modes::

        phi = [Re p_1^t .. Re p_K^t, -Im p_1^t .. -Im p_K^t]
        gram = sum of phi_t phi_t^T     gram_t = sum of t phi_t phi_t^T     gram_tt = sum of t^2 phi_t phi_t^T

    With q = p_i p_j and q = p_i conj(p_j) each entry is half a sum or a difference of (1 - q^L) / (1 - q) and its first
    two derivatives in log q, so that nothing grows with L. The derivative of h in log p_k is a column pair of t phi, so
    these are the blocks of the normal equations of variable projection.

    logs    [C, K, 2] float64: log|p| and arg p. log|p| is at most 0, -inf where p = 0, whose powers are 1, 0, 0, ...
    length  L, from 0 to 2^26 - 1.
    Returns `gram`, `gram_t` and `gram_tt` [C, 2K, 2K] float64, symmetric. The error of an entry is some units in the
    last place of the sum of the absolute values of its terms, also for poles on the unit circle or nearly equal: where
    |L log q| < 1 the quotients give way to a series.

    No gradient flows. Raises ValueError for other shapes or dtypes, `KernelError` when Triton was asked for and cannot
    run.
    """
    check_planes("logs", logs)
    if logs.dtype != torch.float64:
        raise ValueError(f"logs must be float64, not {logs.dtype}: the condition of a Gram matrix is a square")
    check_length(length)
    logs = logs.detach()
    if dispatch.pick("vp_gram", [logs], lambda: None):
        from rewright.kernels.vp_gram import triton

        return triton.vp_gram(logs, length)
    return reference.vp_gram(logs, length)
