"""The definition of `linear_kl`, in place on the logits of some tokens at a time."""

from __future__ import annotations

import torch

from rewright.kernels.linear_loss import LinearLoss, cap_, exp_, linear_loss


def linear_kl(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    logits: torch.Tensor,
    log_sum_exp: torch.Tensor,
    weights: torch.Tensor | None,
    softcap: float | None,
) -> LinearLoss:
    """`total` and `losses`; see the package for the mathematics, shapes and dtypes."""
    wide = torch.promote_types(hidden.dtype, torch.float32)

    def rows(z: torch.Tensor, part: slice, gradient: bool) -> torch.Tensor:
        slope = cap_(z, softcap, gradient)
        at = ids[part].long()
        known = z.gather(1, at)
        # What is left without the known tokens is summed by itself: it may be far less than the rounding of 1.
        z.scatter_(1, at, -torch.inf)
        peak, total = exp_(z)
        others = peak + total.log()
        norm = torch.logaddexp(others, known.logsumexp(dim=1))
        log_q, log_r = known - norm[:, None], others - norm
        log_p = logits[part].to(wide) - log_sum_exp[part].to(wide)[:, None]
        p = log_p.exp()
        mass = p.sum(dim=1)
        rest = (1 - mass).clamp_(min=0) if at.shape[1] < z.shape[1] else torch.zeros_like(mass)
        loss = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(dim=1)
        loss += torch.where(rest > 0, rest * (rest.log() - log_r), 0.0)
        if gradient:
            scale = mass + rest
            # Without any others the sum is 0, else at least 1.
            z.mul_(((scale * log_r.exp() - rest) / total.clamp(min=1))[:, None])
            z.scatter_(1, at, scale[:, None] * log_q.exp() - p)
            if slope is not None:
                z.mul_(slope)
        return loss

    buffers = 1 if softcap is None else 2
    return linear_loss(hidden, weight, weights, rows, dtype=wide, buffers=buffers)
