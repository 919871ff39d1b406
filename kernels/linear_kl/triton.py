"""`linear_kl` on a GPU: the products are torch's, between them one kernel goes over a token's logits twice.

The known tokens are taken out of a token's logits before, minus infinity in their place, and their gradients put there
after: one program's threads would have to wait for each other to do so inside.
"""

# The arguments of a jit function are Triton's own values, which no annotation describes; triton ships no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from rewright.kernels.launch import device_guard, next_power_of_2
from rewright.kernels.linear_cross_entropy.triton import BLOCK, WARPS, capped, row_sum
from rewright.kernels.linear_loss import LinearLoss, linear_loss

# Known tokens that a program looks at together.
KNOWN = 1024


@triton.jit
def _logarithms(known_at, teacher_at, lane, count, softcap, norm, mass_log, HAS_CAP: tl.constexpr, ACC: tl.constexpr):
    """log p, log q and the slope of the cap for some known tokens; minus infinity past the last."""
    inside = lane < count
    z, slope = capped(tl.load(known_at + lane, mask=inside, other=float("-inf")).to(ACC), softcap, HAS_CAP)
    log_p = tl.load(teacher_at + lane, mask=inside, other=float("-inf")).to(ACC) - mass_log
    return log_p, z - norm, slope


@triton.jit(do_not_specialize=["softcap"])
def linear_kl_kernel(
    z_ptr, known_ptr, back_ptr, teacher_ptr, norm_ptr, loss_ptr, columns, count, teacher_row, norm_stride, softcap,
    HAS_CAP: tl.constexpr, HAS_REST: tl.constexpr, GRADIENT: tl.constexpr, ACC: tl.constexpr,
    BLOCK: tl.constexpr, KNOWN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    z_at = z_ptr + row * columns
    known_at = known_ptr + row * count
    teacher_at = teacher_ptr + row * teacher_row
    mass_log = tl.load(norm_ptr + row * norm_stride).to(ACC)
    peak, total = row_sum(z_at, columns, softcap, HAS_CAP, ACC, BLOCK)
    top, within = row_sum(known_at, count, softcap, HAS_CAP, ACC, KNOWN)
    above = tl.maximum(peak, top)
    others = total * tl.exp(peak - above)
    both = others + within * tl.exp(top - above)
    norm = above + tl.log(both)
    mass = tl.full([], 0, ACC)
    loss = tl.full([], 0, ACC)
    for start in range(0, count, KNOWN):
        lane = start + tl.arange(0, KNOWN)
        log_p, log_q, _ = _logarithms(known_at, teacher_at, lane, count, softcap, norm, mass_log, HAS_CAP, ACC)
        p = tl.exp(log_p)
        mass += tl.sum(p, axis=0)
        loss += tl.sum(tl.where(p > 0, p * (log_p - log_q), 0.0), axis=0)
    rest = tl.full([], 0, ACC)
    if HAS_REST:
        rest = tl.maximum(1 - mass, 0.0)
        loss += tl.where(rest > 0, rest * (tl.log(rest) - (peak - norm) - tl.log(total)), 0.0)
    tl.store(loss_ptr + row, loss)
    if GRADIENT:
        scale = mass + rest
        # Without any others the sum is 0, else at least 1.
        factor = (scale * (others / both) - rest) / tl.maximum(total, 1.0)
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < columns
            z, slope = capped(tl.load(z_at + column, mask=inside, other=float("-inf")).to(ACC), softcap, HAS_CAP)
            tl.store(z_at + column, factor * tl.exp(z - peak) * slope, mask=inside)
        for start in range(0, count, KNOWN):
            lane = start + tl.arange(0, KNOWN)
            log_p, log_q, slope = _logarithms(known_at, teacher_at, lane, count, softcap, norm, mass_log, HAS_CAP, ACC)
            gradient = (scale * tl.exp(log_q) - tl.exp(log_p)) * slope
            tl.store(back_ptr + row * count + lane, gradient, mask=lane < count)


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
    count = ids.shape[1]
    teacher = logits if logits.stride(1) == 1 or count == 1 else logits.contiguous()
    wide = hidden.dtype == torch.float64

    def rows(z: torch.Tensor, part: slice, gradient: bool) -> torch.Tensor:
        at = ids[part].long()
        known = z.gather(1, at)
        back = torch.empty_like(known) if gradient else known
        z.scatter_(1, at, -torch.inf)
        loss = torch.empty(len(z), dtype=torch.float64 if wide else torch.float32, device=z.device)
        with device_guard(z):
            linear_kl_kernel[(len(z),)](
                z,
                known,
                back,
                teacher[part],
                log_sum_exp[part],
                loss,
                z.shape[1],
                count,
                teacher.stride(0),
                log_sum_exp.stride(0),
                1.0 if softcap is None else softcap,
                HAS_CAP=softcap is not None,
                HAS_REST=count < z.shape[1],
                GRADIENT=gradient,
                ACC=tl.float64 if wide else tl.float32,
                BLOCK=BLOCK,
                KNOWN=min(next_power_of_2(count), KNOWN),
                num_warps=WARPS,
                enable_fp_fusion=True,
            )
        if gradient:
            z.scatter_(1, at, back)
        return loss

    return linear_loss(hidden, weight, weights, rows, dtype=hidden.dtype)
