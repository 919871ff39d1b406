"""Squared error of a sum of modes against a target, and its gradient."""

from __future__ import annotations

import torch

from rewright.kernels import dispatch
from rewright.kernels.modal import check_length, check_planes
from rewright.kernels.modal_fit_step import reference
from rewright.kernels.operands import FLOATING

__all__ = ["modal_fit_step"]


def modal_fit_step(
    target: torch.Tensor, logs: torch.Tensor, residues: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss and gradient of a fit by gradient descent, with nothing of the target's length kept::

        loss_c = sum over t of (h_ct - target_ct)^2       h = vandermonde(logs, residues, L)
        d_logs = d loss / d logs                          d_residues = d loss / d residues

    target    [C, L] floating point, L below 2^26. Any strides.
    logs      [C, K, 2] float32 or float64: log|p| and arg p. log|p| is at most 0, -inf where p = 0, and has the
              gradient 0 there.
    residues  [C, K, 2] float32 or float64: real and imaginary part of R.
    Returns `loss` [C] in the wider of the dtypes of `target` and `residues`, in which all is computed, and `d_logs` and
    `d_residues` [C, K, 2], each in the dtype of what it is the gradient in.

    No gradient flows through these. Raises ValueError for other shapes or dtypes, `KernelError` when Triton was asked
    for and cannot run.
    """
    check_planes("logs", logs)
    check_planes("residues", residues, tuple(logs.shape))
    if target.dim() != 2 or len(target) != len(logs) or target.dtype not in FLOATING:
        raise ValueError(f"target must be floating point [{len(logs)}, L], not {target.dtype} {tuple(target.shape)}")
    check_length(target.shape[1])
    target, logs, residues = target.detach(), logs.detach(), residues.detach()

    def supports() -> str | None:
        from rewright.kernels.modal_fit_step import triton

        return triton.supports(target, logs, residues)

    if dispatch.pick("modal_fit_step", [target, logs, residues], supports):
        from rewright.kernels.modal_fit_step import triton

        return triton.modal_fit_step(target, logs, residues)
    return reference.modal_fit_step(target, logs, residues)
