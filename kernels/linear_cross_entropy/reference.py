"""The definition of `linear_cross_entropy`, in place on the logits of some tokens at a time."""

from __future__ import annotations

import torch

from rewright.kernels.linear_loss import LinearLoss, cap_, exp_, linear_loss


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor | None,
    softcap: float | None,
    ignore_index: int,
) -> LinearLoss:
    """`total` and `losses`; see the package for the mathematics, shapes and dtypes."""
    columns = len(weight)

    def rows(logits: torch.Tensor, part: slice, gradient: bool) -> torch.Tensor:
        target = targets[part]
        slope = cap_(logits, softcap, gradient)
        at = target.clamp(0, columns - 1)[:, None]
        chosen = logits.gather(1, at)[:, 0]
        peak, total = exp_(logits)
        loss = peak + total.log() - chosen
        ignored = target == ignore_index
        if gradient:
            logits.mul_(total.reciprocal()[:, None])
            logits.scatter_add_(1, at, logits.new_full((1, 1), -1.0).expand_as(at))
            if slope is not None:
                logits.mul_(slope)
            # What is ignored may hold anything, so it is not multiplied by 0.
            logits.index_fill_(0, ignored.nonzero()[:, 0], 0.0)
        known = torch.where((target >= 0) & (target < columns), loss, torch.nan)
        return torch.where(ignored, 0.0, known)

    wide = torch.promote_types(hidden.dtype, torch.float32)
    buffers = 1 if softcap is None else 2
    return linear_loss(hidden, weight, weights, rows, dtype=wide, buffers=buffers)
