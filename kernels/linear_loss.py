"""What the losses of a linear head share: no logits of all tokens, and the gradient taken in the forward pass.

A loss here is a sum over tokens, so that its gradient in the logits of a token needs nothing of the others. Logits are
made for some tokens at a time, turned in place into that gradient, and multiplied back at once (Hsu et al. 2024,
arXiv:2410.10989). The backward pass multiplies what is there by a scalar.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from rewright.kernels.operands import FLOATING

# Logits held at a time; on a CPU those of so many tokens at most, since more are not multiplied faster.
ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 26}
TOKENS_ON_CPU = 256
# Elements of a half-precision matrix that are widened at a time, and of a product that is added to a wider one.
BLOCK = 1 << 20

# Of the logits of some tokens, which they are, and whether to leave the gradient in the logits' place: the losses.
RowLosses = Callable[[torch.Tensor, slice, bool], torch.Tensor]


class LinearLoss(NamedTuple):
    """`total`, a scalar, which gradients flow through, and `losses` (T,), which they do not."""

    total: torch.Tensor
    losses: torch.Tensor


def check_head(hidden: torch.Tensor, weight: torch.Tensor, weights: torch.Tensor | None, softcap: float | None) -> None:
    """Raise ValueError unless `hidden` (T, d) and `weight` (V, d) are of one dtype and `weights` is (T,)."""
    for name, matrix in (("hidden", hidden), ("weight", weight)):
        if matrix.dim() != 2 or matrix.dtype not in FLOATING:
            raise ValueError(f"{name} must be a floating-point matrix, not {matrix.dtype} {tuple(matrix.shape)}")
    if weight.dtype != hidden.dtype or weight.shape[1] != hidden.shape[1] or len(weight) == 0:
        raise ValueError(
            f"weight must be {hidden.dtype} (V, {hidden.shape[1]}), not {weight.dtype} {tuple(weight.shape)}"
        )
    if weights is not None and (weights.shape != (len(hidden),) or weights.dtype not in FLOATING):
        raise ValueError(f"weights must be floating point ({len(hidden)},), not {weights.dtype} {tuple(weights.shape)}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be above 0, not {softcap}")


def linear_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    weights: torch.Tensor | None,
    rows: RowLosses,
    *,
    dtype: torch.dtype,
    buffers: int = 1,
) -> LinearLoss:
    """Losses of all tokens and their weighted sum, for a loss of which `rows` does those of some.

    Logits are rounded to the dtype of `hidden` and handed to `rows` in `dtype`, which is that one or float32 for half
    precision; the products are in `dtype`. `buffers` says how many copies of the logits `rows` holds.
    """
    taken = torch.is_grad_enabled() and hidden.requires_grad, torch.is_grad_enabled() and weight.requires_grad
    with torch.no_grad():
        wide = torch.promote_types(hidden.dtype, torch.float32)
        losses = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        dhidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if taken[0] else None
        dweight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if taken[1] else None
        # A product copies a matrix that is neither stored by rows nor by columns, each time.
        weight_read = weight if 1 in weight.stride() else weight.contiguous()
        weights = None if weights is None else weights.to(wide)
        share, most = _parted(weights)
        for part, logits in _chunks(hidden, len(weight), dtype, buffers):
            own = hidden[part].to(dtype)
            _multiply(own, weight_read, logits)
            losses[part] = rows(logits, part, any(taken))
            if dhidden is not None:
                back = _multiply_back(logits, weight_read)
                dhidden[part] = back if share is None else back.mul_(share[part, None])
            if dweight is not None:
                _add_outer(dweight, logits, own if share is None else (own * share[part, None]).to(dtype))
        if dweight is not None:
            dweight = dweight.to(weight.dtype)
        if not any(taken):
            return LinearLoss(_sum(losses, weights), losses)
    total: torch.Tensor = _Total.apply(hidden, weight, losses, weights, most, dhidden, dweight)  # type: ignore[no-untyped-call]  # torch's
    return LinearLoss(total, losses)


def _parted(weights: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Weights as shares of the greatest, and that one, which is multiplied by at last.

    Gradients weighted by one over the number of tokens would be lost in half precision before a loss scale comes.
    """
    if weights is None or len(weights) == 0:
        return None, None
    most = weights.abs().amax()
    return weights / most.clamp(min=torch.finfo(weights.dtype).tiny), most


def _chunks(
    hidden: torch.Tensor, columns: int, dtype: torch.dtype, buffers: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Some tokens, and room for their logits, which is the same each time."""
    kind = hidden.device.type
    step = max(1, ELEMENTS.get(kind, ELEMENTS["cuda"]) // (columns * buffers))
    step = min(step, len(hidden), TOKENS_ON_CPU if kind == "cpu" else len(hidden))
    room = torch.empty((step, columns), dtype=dtype, device=hidden.device)
    for start in range(0, len(hidden), max(step, 1)):
        part = slice(start, min(start + step, len(hidden)))
        yield part, room[: part.stop - part.start]


def _widened(weight: torch.Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    """Blocks of rows in `dtype`, in the same room each time."""
    step = max(1, BLOCK // max(weight.shape[1], 1))
    room = torch.empty((min(step, len(weight)), weight.shape[1]), dtype=dtype, device=weight.device)
    for start in range(0, len(weight), step):
        part = slice(start, min(start + step, len(weight)))
        yield part, room[: part.stop - part.start].copy_(weight[part])


def _multiply(rows: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """out = rows weight^T, rounded to the dtype of `weight`."""
    if weight.dtype == out.dtype:
        torch.mm(rows, weight.t(), out=out)
        return
    for part, block in _widened(weight, out.dtype):
        out[:, part] = (rows @ block.t()).to(weight.dtype)


def _multiply_back(gradient: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """gradient weight, (n, d) in the dtype of `gradient`."""
    if weight.dtype == gradient.dtype:
        return gradient @ weight
    back = gradient.new_zeros((len(gradient), weight.shape[1]))
    for part, block in _widened(weight, gradient.dtype):
        back.addmm_(gradient[:, part], block)
    return back


def _add_outer(total: torch.Tensor, gradient: torch.Tensor, rows: torch.Tensor) -> None:
    """total += gradient^T rows, of which half precision is added up in float32."""
    if total.dtype == gradient.dtype:
        total.addmm_(gradient.t(), rows)
        return
    step = max(1, ELEMENTS["cpu"] // max(rows.shape[1], 1))
    for start in range(0, len(total), step):
        total[start : start + step] += gradient[:, start : start + step].t() @ rows


def _sum(losses: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    return losses.sum() if weights is None else (losses * weights).sum()


class _Total(torch.autograd.Function):
    """The weighted sum, with gradients that are known already but for a factor."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        losses: torch.Tensor,
        weights: torch.Tensor | None,
        most: torch.Tensor | None,
        dhidden: torch.Tensor | None,
        dweight: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(most, dhidden, dweight)
        return _sum(losses, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        most, *gradients = ctx.saved_tensors
        factor = upstream if most is None else upstream * most
        return (*(None if known is None else _scaled(known, factor) for known in gradients), *(None,) * 5)


def _scaled(gradient: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    # On a GPU a factor without dimensions would be rounded to half precision before it multiplies.
    scaled: torch.Tensor = torch.mul(gradient, factor.view(1, 1), out=torch.empty_like(gradient))
    return scaled


def cap_(logits: torch.Tensor, softcap: float | None, slope: bool) -> torch.Tensor | None:
    """softcap * tanh(logits / softcap) in place; returns its derivative 1 - tanh^2 where `slope` is asked for."""
    if softcap is None:
        return None
    logits.div_(softcap).tanh_()
    found = logits.square().neg_().add_(1) if slope else None
    logits.mul_(softcap)
    return found


def exp_(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """exp(logits - peak) in place; returns the peak of each row and the sum of what is in it.

    A row of nothing but minus infinity becomes 0 and has the sum 0.
    """
    peak = logits.amax(dim=1).clamp_(min=torch.finfo(logits.dtype).min)
    logits.sub_(peak[:, None]).exp_()
    return peak, logits.sum(dim=1)
