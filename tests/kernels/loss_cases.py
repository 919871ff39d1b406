"""Inputs for the losses of a linear head, and how results and gradients are judged: against float64 autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from rewright.kernels.linear_cross_entropy import LinearLoss, linear_cross_entropy
from rewright.kernels.linear_kl import linear_kl
from tests.kernels.bounds import Bounds, Verdict, on
from tests.kernels.case import DTYPES, Case, laid_out, normal

Results = tuple[torch.Tensor, ...]
LOSSES: dict[str, Callable[..., LinearLoss]] = {
    "linear_cross_entropy": linear_cross_entropy,
    "linear_kl": linear_kl,
}
# Exact in float32, which a kernel takes it in.
SOFTCAP = 2.5


def _head(size: tuple[int, int, int], dtype: torch.dtype, extra: str, layout: str) -> Callable[..., dict[str, Any]]:
    """`extra` names what there is besides: `weights`, `cap`."""
    tokens, columns, width = size

    def build(generator: torch.Generator) -> dict[str, Any]:
        hidden, weight = normal(generator, tokens, width), normal(generator, columns, width) / max(width, 1) ** 0.25
        weights = torch.rand(tokens, generator=generator) - 0.25
        return {
            "hidden": laid_out(hidden.to(dtype), layout),
            "weight": laid_out(weight.to(dtype), layout),
            "weights": weights if "weights" in extra else None,
            "softcap": SOFTCAP if "cap" in extra else None,
        }

    return build


def _cross_entropy(size: tuple[int, int, int], dtype: torch.dtype, extra: str = "", layout: str = "rows") -> Case:
    head = _head(size, dtype, extra, layout)

    def build(generator: torch.Generator) -> dict[str, Any]:
        given = head(generator)
        targets = torch.randint(0, size[1], (size[0],), generator=generator)
        if "ignored" in extra:
            targets[::3] = -7
            given["ignore_index"] = -7
        return given | {"targets": laid_out(targets[:, None], layout)[:, 0]}

    return Case("linear_cross_entropy", f"{'x'.join(map(str, size))}-{extra}-{layout}", dtype, build)


def _kl(size: tuple[int, int, int], known: int, dtype: torch.dtype, extra: str = "", layout: str = "rows") -> Case:
    """With `sharp` the teacher leaves nothing to others, with `sure` the student leaves them next to nothing."""
    head = _head(size, dtype, extra, layout)

    def build(generator: torch.Generator) -> dict[str, Any]:
        given = head(generator)
        teacher = normal(generator, size[0], size[1]) * (40 if "sharp" in extra else 2)
        top = teacher.topk(known, dim=1)
        if "sure" in extra:
            given["weight"][top.indices[0]] += 24 * given["hidden"][0] / given["hidden"][0].norm()
        stored = torch.promote_types(dtype, torch.float32)
        return given | {
            "ids": laid_out(top.indices.to(torch.int32 if layout == "rows" else torch.int64), layout),
            "logits": laid_out(top.values.to(stored), layout),
            "log_sum_exp": teacher.logsumexp(dim=1).to(stored),
        }

    return Case("linear_kl", f"{'x'.join(map(str, size))}-{known}known-{extra}-{layout}", dtype, build)


def loss_cases() -> Iterator[Case]:
    """Every case of these ops, in a fixed order."""
    # More columns than a block of the kernel; more tokens than the reference takes at a time.
    shapes = ((0, 5, 3), (1, 1, 1), (2, 3, 0), (7, 31, 5), (23, 61, 67), (3, 4099, 13), (263, 37, 11))
    for dtype in DTYPES:
        for size in shapes:
            yield _cross_entropy(size, dtype)
            yield _kl(size, min(size[1], 3), dtype)
        for extra in ("cap", "weights", "ignored", "weights-ignored-cap"):
            yield _cross_entropy((23, 61, 7), dtype, extra)
        yield _cross_entropy((3, 4099, 13), dtype, "weights-ignored-cap")
        for layout in ("columns", "slice"):
            yield _cross_entropy((13, 31, 17), dtype, "weights-ignored", layout)
            yield _kl((13, 31, 17), 5, dtype, "weights", layout)
        for known in (1, 30, 31):
            yield _kl((7, 31, 5), known, dtype)
        # More known tokens than the kernel looks at together.
        yield _kl((3, 4099, 13), 1031, dtype, "weights-cap")
        for extra in ("cap", "weights", "weights-cap", "sharp", "sure"):
            yield _kl((11, 61, 7), 4, dtype, extra)


def results(op: str, arguments: dict[str, Any]) -> Results:
    """`total` and `losses`, and the gradients of three times the total in `hidden` and `weight`."""
    leaves = arguments["hidden"].requires_grad_(), arguments["weight"].requires_grad_()
    loss = LOSSES[op](**arguments)
    return loss.total.detach(), loss.losses, *torch.autograd.grad(3 * loss.total, leaves)


def naive(given: dict[str, Any]) -> tuple[Results, Results]:
    """What `results` gives, in float64 by autograd, and how much was added up in each."""
    given = on(given, "cpu", torch.float64)
    hidden, weight = given["hidden"].requires_grad_(), given["weight"].requires_grad_()
    z = hidden @ weight.t()
    if given["softcap"] is not None:
        z = given["softcap"] * torch.tanh(z / given["softcap"])
    log_q = z.log_softmax(dim=1)
    if "targets" in given:
        ignored = given["targets"] == given.get("ignore_index", -100)
        at = given["targets"].masked_fill(ignored, 0)[:, None]
        p = torch.zeros_like(z).scatter_(1, at, 1.0) * ~ignored[:, None]
        losses = -log_q.gather(1, at)[:, 0].masked_fill(ignored, 0.0)
    else:
        at = given["ids"].long()
        log_p = given["logits"] - given["log_sum_exp"][:, None]
        p = torch.zeros_like(z).scatter_(1, at, log_p.exp())
        losses = (log_p.exp() * (log_p - log_q.gather(1, at))).sum(dim=1)
        if at.shape[1] < z.shape[1]:
            rest = (1 - log_p.exp().sum(dim=1)).clamp(min=0)
            log_r = log_q.scatter(1, at, -torch.inf).logsumexp(dim=1)
            # Of an outcome of no mass there is nothing to lose.
            losses = losses + rest * torch.where(rest > 0, rest, 1.0).log() - rest * log_r
            p = p + torch.where(p == 0, rest[:, None] * (log_q - log_r[:, None]).exp(), 0.0)
    weights = torch.ones(len(z), dtype=torch.float64) if given["weights"] is None else given["weights"]
    total = (losses * weights).sum()
    grads = torch.autograd.grad(3 * total, (hidden, weight))
    with torch.no_grad():
        # A logit's error is one of what its product added up, and a loss adds a logit to a logarithm of their sum.
        spread = 1 + hidden.abs() @ weight.abs().t()
        each = spread.amax(dim=1) + (losses + 1).log1p()
        if "log_sum_exp" in given:
            each += given["log_sum_exp"].abs()
        dz = (log_q.exp() + p) * spread
        size = 3 * weights.abs()[:, None]
        scales = (each * weights.abs()).sum(), each, size * (dz @ weight.abs()), dz.t() @ (size * hidden.abs())
    return (total.detach(), losses.detach(), *grads), scales


def _judge(case: Case, got: Results, base: Results) -> Verdict:
    truth, scales = naive(case.make())
    bounds = Bounds(case.dtype)
    wide = torch.promote_types(case.dtype, torch.float32)
    dtypes = (wide, wide, case.dtype, case.dtype)
    names = ("total", "losses", "gradient in hidden", "gradient in weight")
    for name, exact, scale, dtype, mine, theirs in zip(names, truth, scales, dtypes, got, base, strict=True):
        bounds.add(name, mine.double() - exact, theirs.double() - exact, scale)
        bounds.check(f"{name} has another dtype", mine.dtype == dtype)
        bounds.check(f"{name} has another shape", mine.shape == exact.shape)
    return bounds.verdict()


LOSS_JUDGES: dict[str, Callable[[Case, Results, Results], Verdict]] = dict.fromkeys(LOSSES, _judge)
