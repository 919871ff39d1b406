"""A long convolution by a modal filter, chunk by chunk, and the state of its recurrence after it."""

from __future__ import annotations

import torch

from rewright.kernels import dispatch
from rewright.kernels.modal import check_planes
from rewright.kernels.modal_chunk_prefill import reference
from rewright.kernels.operands import FLOATING

__all__ = ["modal_chunk_prefill"]


def modal_chunk_prefill(
    u: torch.Tensor,
    logs: torch.Tensor,
    residues: torch.Tensor,
    h0: torch.Tensor,
    state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output of a recurrence for T samples at once, and its state after them::

        x_t = p x_(t-1) + u_t                        p = exp(logs_0 + i logs_1), complex, for each entry
        y_t = h0 u_t + Re sum over k of R_k x_(t-1),k

    which is the causal convolution with h_0 = h0, h_t = Re sum R p^(t-1), continued from the state given. A chunk of C
    samples takes a product with the C x C Toeplitz matrix of h_0 .. h_(C-1), one of the state before it, and one that
    makes the state after it: no FFT, nothing of size T K, and calls that split T anyhow give the same results up to
    rounding.

    u         [B, C, T] floating point. Any strides: a transposed view of [B, T, C] is read without a copy.
    logs      [C, K, 2] float32 or float64: log|p| and arg p. log|p| is at most 0, -inf where p = 0.
    residues  [C, K, 2] float32 or float64: real and imaginary part of R.
    h0        [C] float32 or float64.
    state     [B, C, K, 2] float32 or float64: real and imaginary part of x_-1, or None for 0. Not modified.
    Returns `y` [B, C, T] in the dtype of `u`, contiguous, and the state x_(T-1) [B, C, K, 2], which is the one given
    if T = 0. All is computed in the wider of the dtypes of `u` and `residues`, which is the dtype of the state.

    No gradient flows. Raises ValueError for other shapes or dtypes, `KernelError` when Triton was asked for and cannot
    run.
    """
    check_planes("logs", logs)
    check_planes("residues", residues, tuple(logs.shape))
    channels, entries, _ = logs.shape
    check_planes("h0", h0, (channels,))
    if u.dim() != 3 or u.shape[1] != channels or u.dtype not in FLOATING:
        raise ValueError(f"u must be floating point [batch, {channels}, times], not {u.dtype} {tuple(u.shape)}")
    if state is not None:
        check_planes("state", state, (len(u), channels, entries, 2))
    tensors = [t.detach() for t in (u, logs, residues, h0, state) if t is not None]
    u, logs, residues, h0 = tensors[:4]
    state = None if state is None else tensors[4]

    def supports() -> str | None:
        from rewright.kernels.modal_chunk_prefill import triton

        return triton.supports(u, logs, residues)

    if dispatch.pick("modal_chunk_prefill", tensors, supports):
        from rewright.kernels.modal_chunk_prefill import triton

        return triton.modal_chunk_prefill(u, logs, residues, h0, state)
    return reference.modal_chunk_prefill(u, logs, residues, h0, state)
