"""The second half of a predictor of active neurons: scores, and lists of the neurons that are read."""

from __future__ import annotations

import torch

from rewright.kernels import dispatch
from rewright.kernels.launch import cdiv
from rewright.kernels.neurons import BLOCK, check_factor, check_out, check_rows, check_vector
from rewright.kernels.operands import FLOATING
from rewright.kernels.predictor_out import reference

__all__ = ["active_neurons", "predictor_out"]


def predictor_out(
    t: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    shift: float | torch.Tensor = 0.0,
    b_scale: torch.Tensor | None = None,
    *,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The neurons that any row of t lets through, in ascending lists, one for each 128 of them::

        s_mi = b_scale_i * (sum over k of b_ik t_mk) + c_i + shift        neuron i is active where s_mi > 0 for any m

    t        [B, r] floating point, B <= 16. Any strides.
    b        [F, r] floating point, or int8.
    c        [F] floating point; -inf is never active, and so is a score that is no number.
    shift    a number, or a tensor of one floating-point number on the device of t, which a captured graph reads anew.
    b_scale  [F] floating point for an int8 B, else None.
    out      the buffers of the results, contiguous, or None.
    Returns `index` int32 [blocks, 128], of which the first `count` int32 [blocks] of each row are the active neurons of
    that block, by their numbers among all F. What stands after them is not specified; the reference has -1 there.

    Scores are in float32 (float64 for a float64 t). Equal inputs give equal lists. No gradient flows. Raises ValueError
    for other shapes or dtypes, `KernelError` when Triton was asked for and cannot run. Source: Liu et al., Deja Vu
    (2023), section 4.1, with a threshold for every neuron in place of a number of them.
    """
    _check(t, b, c, shift, b_scale)
    if out is not None:
        blocks = cdiv(b.shape[0], BLOCK)
        check_out("index", out[0], (blocks, BLOCK), torch.int32)
        check_out("count", out[1], (blocks,), torch.int32)
    tensors = [tensor for tensor in (t, b, c, shift, b_scale, *(out or ())) if isinstance(tensor, torch.Tensor)]

    def supports() -> str | None:
        from rewright.kernels.predictor_out import triton

        return triton.supports(tensors)

    if dispatch.pick("predictor_out", tensors, supports):
        from rewright.kernels.predictor_out import triton

        return triton.predictor_out(t, b, c, shift, b_scale, out)
    return reference.predictor_out(t, b, c, shift, b_scale, out)


def active_neurons(
    t: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    shift: float | torch.Tensor = 0.0,
    b_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same neurons as one list, int64 [n], which `sparse_mlp` takes too: what a CPU is fastest with.

    It is always the reference that makes it, and whoever asks waits for the device to count. Arguments and errors are
    those of `predictor_out`.
    """
    _check(t, b, c, shift, b_scale)
    return reference.active_neurons(t, b, c, shift, b_scale)


def _check(
    t: torch.Tensor, b: torch.Tensor, c: torch.Tensor, shift: float | torch.Tensor, b_scale: torch.Tensor | None
) -> None:
    check_rows("t", t)
    check_factor("b", b, t.shape[1], b_scale)
    check_vector("c", c, b.shape[0])
    if isinstance(shift, torch.Tensor) and (shift.dim() != 0 or shift.dtype not in FLOATING):
        raise ValueError(f"shift must be one floating-point number, not {shift.dtype} {tuple(shift.shape)}")
