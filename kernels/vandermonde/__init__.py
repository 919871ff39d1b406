"""Sums of powers: impulse responses of recurrences in modal form, and the sums that are their adjoint."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from rewright.kernels import dispatch
from rewright.kernels.modal import check_length, check_planes, slopes
from rewright.kernels.operands import FLOATING
from rewright.kernels.vandermonde import reference

__all__ = ["vandermonde", "vandermonde_adjoint"]


def vandermonde(logs: torch.Tensor, residues: torch.Tensor, length: int) -> torch.Tensor:
    """The impulse response of a sum of modes::

        h_ct = Re sum over k of R_ck p_ck^t        t = 0 .. length-1,  p = exp(logs_0 + i logs_1),  p^0 = 1

    With t = B a + b it is a real product of two tables, R p^(B a) and p^b, which are made from exactly reduced
    phases: in float32 the relative error is that of the product, near 1e-7, where exp(t log p) has 1e-4.

    logs      [C, K, 2] float32 or float64: log|p| and arg p. log|p| is at most 0, -inf where p = 0.
    residues  [C, K, 2] float32 or float64: real and imaginary part of R. An unused entry has p = 0 and R = 0.
    length    from 0 to 2^26 - 1.
    Returns h [C, length] in the dtype of `residues`. `logs` may be wider or narrower than that.

    Differentiable once in `logs` and `residues`; with G and M the sums and moments of `vandermonde_adjoint` of the
    gradient in h, that in R is (Re G, -Im G), and that in logs (Re RM, -Im RM).

    Raises ValueError for other shapes or dtypes, `KernelError` when Triton was asked for and cannot run.
    """
    check_planes("logs", logs)
    check_planes("residues", residues, tuple(logs.shape))
    check_length(length)
    if torch.is_grad_enabled() and (logs.requires_grad or residues.requires_grad):
        found: torch.Tensor = _Sum.apply(logs, residues, length)  # type: ignore[no-untyped-call]  # torch's
        return found
    return _evaluate(logs, residues, length)[0]


def vandermonde_adjoint(logs: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of values with powers, as complex planes::

        sums_ck = sum over t of g_ct p_ck^t        moments_ck = sum over t of t g_ct p_ck^t        t = 0 .. L-1

    logs    [C, K, 2] float32 or float64: log|p| and arg p. log|p| is at most 0, -inf where p = 0.
    values  [C, L] floating point: g. Any strides.
    Returns `sums` and `moments` [C, K, 2], added up in the dtype of `values`, half precision in float32.

    No gradient flows. Raises as `vandermonde` does.
    """
    check_planes("logs", logs)
    if values.dim() != 2 or len(values) != len(logs) or values.dtype not in FLOATING:
        raise ValueError(f"values must be floating point [{len(logs)}, L], not {values.dtype} {tuple(values.shape)}")
    check_length(values.shape[1])
    logs, values = logs.detach(), values.detach()

    def supports() -> str | None:
        from rewright.kernels.vandermonde import triton

        return triton.supports(logs, values)

    if dispatch.pick("vandermonde_adjoint", [logs, values], supports):
        from rewright.kernels.vandermonde import triton

        return triton.vandermonde_adjoint(logs, values)
    return reference.vandermonde_adjoint(logs, values)


def _evaluate(logs: torch.Tensor, residues: torch.Tensor, length: int) -> tuple[torch.Tensor, str]:
    """h, and which implementation made it."""

    def supports() -> str | None:
        from rewright.kernels.vandermonde import triton

        return triton.supports(logs, residues)

    if dispatch.pick("vandermonde", [logs, residues], supports):
        from rewright.kernels.vandermonde import triton

        return triton.vandermonde(logs.detach(), residues.detach(), length), "triton"
    return reference.vandermonde(logs.detach(), residues.detach(), length), "reference"


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logs: torch.Tensor, residues: torch.Tensor, length: int) -> torch.Tensor:
        ctx.save_for_backward(logs, residues)
        h, ctx.choice = _evaluate(logs, residues, length)
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        logs, residues = ctx.saved_tensors
        # A GPU's gradients are taken in another thread, which knows nothing of `use`.
        with dispatch.use(ctx.choice):
            sums, moments = vandermonde_adjoint(logs, dh)
        wanted = ctx.needs_input_grad
        return (
            slopes(residues, moments).to(logs.dtype) if wanted[0] else None,
            sums * sums.new_tensor((1.0, -1.0)) if wanted[1] else None,
            None,
        )
