"""Cross entropy of the tokens that a linear head predicts, without the logits of all tokens."""

from __future__ import annotations

import torch

from rewright.kernels import dispatch
from rewright.kernels.linear_cross_entropy import reference
from rewright.kernels.linear_loss import LinearLoss, check_head

__all__ = ["LinearLoss", "linear_cross_entropy"]


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor | None = None,
    *,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> LinearLoss:
    """How unlikely each target is under the softmax of its logits, and the weighted sum of that::

        z_t    = cap(hidden_t weight^T)        cap(z) = softcap * tanh(z / softcap)
        loss_t = log(sum over j of exp z_tj) - z_ty     y = targets_t; 0 where y is ignore_index
        total  = sum over t of weights_t * loss_t

    The products are in the dtype of the inputs, the logits rounded to it once, and everything after them is computed
    in float32 (float64 for float64). A product of float32 is in TF32 where torch is told so. At most 2^24 logits are
    held at a time on a CPU and 2^26 on a GPU, with a softcap in two buffers where there is no kernel.

    hidden   (T, d); bfloat16, float16, float32 or float64. Any strides.
    weight   (V, d) in the same dtype, V at least 1. Any strides.
    targets  (T,) int64, each from 0 to V - 1, or ignore_index.
    weights  (T,), floating point, or None for 1.
    softcap  above 0, or None for no cap.
    Returns `total`, a scalar, and `losses` (T,), both float32 (float64 for float64).

    `total` has a gradient in `hidden` and in `weight`, `losses` has none, nor do `weights` get one. Where one is asked
    for it is computed in the forward pass: a product more for that of `hidden`, and one for that of `weight`, which is
    added up in float32, so that a matrix of V x d of these is there beside the result in half precision. The backward
    pass multiplies both by a scalar. No second derivative.

    Raises ValueError for other shapes or dtypes, and on a CPU for other targets: on a GPU a check would wait for the
    device, and there the loss of such a token is NaN. `KernelError` when Triton was asked for and cannot run.
    """
    check_head(hidden, weight, weights, softcap)
    if targets.shape != (len(hidden),) or targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64 ({len(hidden)},), not {targets.dtype} {tuple(targets.shape)}")
    if not targets.is_cuda:
        wrong = ((targets < 0) | (targets >= len(weight))) & (targets != ignore_index)
        if bool(wrong.any()):
            place = int(wrong.nonzero()[0])
            raise ValueError(
                f"targets must be from 0 to {len(weight) - 1} or {ignore_index}, not {int(targets[place])} at {place}"
            )

    def supports() -> str | None:
        from rewright.kernels.linear_cross_entropy import triton

        return triton.supports(hidden)

    tensors = [t for t in (hidden, weight, targets, weights) if t is not None]
    if dispatch.pick("linear_cross_entropy", tensors, supports):
        from rewright.kernels.linear_cross_entropy import triton

        return triton.linear_cross_entropy(hidden, weight, targets, weights, softcap, ignore_index)
    return reference.linear_cross_entropy(hidden, weight, targets, weights, softcap, ignore_index)
