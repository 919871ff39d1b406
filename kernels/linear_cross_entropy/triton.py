"""`linear_cross_entropy` on a GPU: the products are torch's, between them one kernel goes over a token's logits twice.

The first time it finds their greatest and the sum of exponentials, the second time it writes the gradient over them.
"""

# The arguments of a jit function are Triton's own values, which no annotation describes; triton ships no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from rewright.kernels.launch import device_guard, interpreter
from rewright.kernels.linear_loss import LinearLoss, linear_loss

BLOCK = 2048
WARPS = 8
# Below every logit, and not infinite: the difference of two infinities is no number.
LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def tanh(x):
    """tanh in the dtype of x; in float32 exact to some units in the last place near 0 too, where 1 - e^-2x is not."""
    size = tl.abs(x)
    decay = tl.exp(-2 * size)
    value = (1 - decay) / (1 + decay)
    if x.dtype == tl.float32:
        square = x * x
        series = 1 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315 - square * (62 / 2835))))
        value = tl.where(size < 0.25, size * series, value)
    return tl.where(x < 0, -value, value)


@triton.jit
def capped(x, softcap, HAS_CAP: tl.constexpr):
    """softcap * tanh(x / softcap) and its derivative; minus infinity stays what it is."""
    if HAS_CAP:
        share = tanh(x / softcap)
        return tl.where(x > float("-inf"), softcap * share, x), 1 - share * share
    return x, tl.full(x.shape, 1, x.dtype)


@triton.jit
def row_sum(z_at, columns, softcap, HAS_CAP: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """The greatest logit of a row, and the sum of exp(logit - greatest)."""
    peak = tl.full([], LOWEST, ACC)
    total = tl.full([], 0, ACC)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z, _ = capped(tl.load(z_at + column, mask=column < columns, other=float("-inf")).to(ACC), softcap, HAS_CAP)
        above = tl.maximum(peak, tl.max(z, axis=0))
        total = total * tl.exp(peak - above) + tl.sum(tl.exp(z - above), axis=0)
        peak = above
    return peak, total


@triton.jit(do_not_specialize=["softcap", "ignore_index"])
def linear_cross_entropy_kernel(
    z_ptr, target_ptr, loss_ptr, columns, target_stride, softcap, ignore_index,
    HAS_CAP: tl.constexpr, GRADIENT: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row * target_stride)
    z_at = z_ptr + row * columns
    if target == ignore_index:
        tl.store(loss_ptr + row, 0.0)
        if GRADIENT:
            for start in range(0, columns, BLOCK):
                column = start + tl.arange(0, BLOCK)
                tl.store(z_at + column, tl.zeros([BLOCK], z_ptr.dtype.element_ty), mask=column < columns)
    else:
        known = (target >= 0) & (target < columns)
        chosen, _ = capped(tl.load(z_at + target, mask=known, other=float("nan")).to(ACC), softcap, HAS_CAP)
        peak, total = row_sum(z_at, columns, softcap, HAS_CAP, ACC, BLOCK)
        tl.store(loss_ptr + row, tl.log(total) + peak - chosen)
        if GRADIENT:
            for start in range(0, columns, BLOCK):
                column = start + tl.arange(0, BLOCK)
                inside = column < columns
                z, slope = capped(tl.load(z_at + column, mask=inside, other=float("-inf")).to(ACC), softcap, HAS_CAP)
                gradient = (tl.exp(z - peak) / total - (column == target).to(ACC)) * slope
                tl.store(z_at + column, gradient, mask=inside)


def supports(hidden: torch.Tensor) -> str | None:
    """None, or why the kernels cannot take inputs of this dtype."""
    if hidden.dtype == torch.float64 and not interpreter():
        return "float64 is for the interpreter only"
    return None


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor | None,
    softcap: float | None,
    ignore_index: int,
) -> LinearLoss:
    """`total` and `losses`; see the package for the mathematics, shapes and dtypes."""

    def rows(logits: torch.Tensor, part: slice, gradient: bool) -> torch.Tensor:
        target = targets[part]
        wide = hidden.dtype == torch.float64
        loss = torch.empty(len(logits), dtype=torch.float64 if wide else torch.float32, device=logits.device)
        with device_guard(logits):
            linear_cross_entropy_kernel[(len(logits),)](
                logits,
                target,
                loss,
                logits.shape[1],
                target.stride(0),
                1.0 if softcap is None else softcap,
                ignore_index,
                HAS_CAP=softcap is not None,
                GRADIENT=gradient,
                ACC=tl.float64 if wide else tl.float32,
                BLOCK=BLOCK,
                num_warps=WARPS,
                enable_fp_fusion=True,
            )
        return loss

    return linear_loss(hidden, weight, weights, rows, dtype=hidden.dtype)
