"""Divergence of a linear head's predictions from a teacher of which the likeliest tokens are known."""

from __future__ import annotations

import torch

from rewright.kernels import dispatch
from rewright.kernels.linear_kl import reference
from rewright.kernels.linear_loss import LinearLoss, check_head
from rewright.kernels.operands import FLOATING

__all__ = ["LinearLoss", "linear_kl"]

# Ids sorted at a time to see whether one is there twice.
_SORTED = 1 << 22


def linear_kl(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    logits: torch.Tensor,
    log_sum_exp: torch.Tensor,
    weights: torch.Tensor | None = None,
    *,
    softcap: float | None = None,
) -> LinearLoss:
    """KL(teacher || student) over k + 1 outcomes: the teacher's k known tokens, and all others as one::

        p_ti   = exp(logits_ti - log_sum_exp_t)             rest_t = max(1 - sum over i of p_ti, 0)
        q_t    = softmax(cap(hidden_t weight^T))            r_t = sum of q_tj over the j outside ids_t
        loss_t = sum over i of p_ti * (log p_ti - log q_t,ids_ti) + rest_t * (log rest_t - log r_t)
        total  = sum over t of weights_t * loss_t           cap(z) = softcap * tanh(z / softcap)

    Merging outcomes loses information, so this is a lower bound of the divergence over all tokens; with k = V there are
    no others, the last term is 0, and it is that divergence. r_t is summed over the others, never 1 minus the rest.

    hidden       (T, d); bfloat16, float16, float32 or float64. Any strides.
    weight       (V, d) in the same dtype, V at least 1. Any strides.
    ids          (T, k) int32 or int64, k from 1 to V, each from 0 to V - 1 and once in a row.
    logits       (T, k), floating point: the teacher's, as they enter its softmax, so with a cap already applied.
    log_sum_exp  (T,), floating point: of all V of the teacher's logits.
    weights      (T,), floating point, or None for 1.
    softcap      above 0, or None for no cap; of the student.
    Returns `total`, a scalar, and `losses` (T,), both float32 (float64 for float64).

    `total` has a gradient in `hidden` and `weight`, the other arguments and `losses` have none. In the capped logits it
    is s q_j - p_j for a known token, else s q_j - rest q_j / r, where s = sum p + rest is 1 but for rounding.
    Precision, memory and when the gradient is computed are as in `linear_cross_entropy`.

    Raises ValueError for other shapes or dtypes, and on a CPU for other ids: on a GPU a check would wait for the
    device, which stops at an id out of range. `KernelError` when Triton was asked for and cannot run.
    """
    check_head(hidden, weight, weights, softcap)
    tokens, columns = len(hidden), len(weight)
    if ids.dim() != 2 or len(ids) != tokens or ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"ids must be int32 or int64 ({tokens}, k), not {ids.dtype} {tuple(ids.shape)}")
    if not 1 <= ids.shape[1] <= columns:
        raise ValueError(f"ids must be from 1 to {columns} for a token, not {ids.shape[1]}")
    for name, given, shape in (("logits", logits, ids.shape), ("log_sum_exp", log_sum_exp, (tokens,))):
        if given.shape != shape or given.dtype not in FLOATING:
            raise ValueError(f"{name} must be floating point {tuple(shape)}, not {given.dtype} {tuple(given.shape)}")
    if not ids.is_cuda:
        _check_ids(ids, columns)
    logits, log_sum_exp = logits.detach(), log_sum_exp.detach()

    def supports() -> str | None:
        from rewright.kernels.linear_cross_entropy import triton

        return triton.supports(hidden)

    tensors = [t for t in (hidden, weight, ids, logits, log_sum_exp, weights) if t is not None]
    if dispatch.pick("linear_kl", tensors, supports):
        from rewright.kernels.linear_kl import triton

        return triton.linear_kl(hidden, weight, ids, logits, log_sum_exp, weights, softcap)
    return reference.linear_kl(hidden, weight, ids, logits, log_sum_exp, weights, softcap)


def _check_ids(ids: torch.Tensor, columns: int) -> None:
    step = max(1, _SORTED // ids.shape[1])
    for start in range(0, len(ids), step):
        some = ids[start : start + step]
        if bool(((some < 0) | (some >= columns)).any()):
            raise ValueError(f"ids must be from 0 to {columns - 1}")
        if bool((some.sort(dim=1).values.diff(dim=1) == 0).any()):
            raise ValueError("ids must not be there twice for a token")
