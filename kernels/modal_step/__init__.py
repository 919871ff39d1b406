"""One token through a distilled Hyena operator of order 2."""

from __future__ import annotations

import torch

from rewright.kernels import dispatch
from rewright.kernels.modal import check_planes
from rewright.kernels.modal_step import reference
from rewright.kernels.operands import FLOATING

__all__ = ["modal_step"]


def modal_step(
    z: torch.Tensor,
    recent: torch.Tensor,
    taps: torch.Tensor,
    bias: torch.Tensor | None,
    state: torch.Tensor,
    poles: torch.Tensor,
    residues: torch.Tensor,
    h0: torch.Tensor,
) -> torch.Tensor:
    """Short convolution, gates, readout and update of the state, in one launch::

        s_t = sum over j of taps_j z_(t-S+1+j) + bias          [x0, x1, v] = s_t in three parts of D
        u_t = x1 v
        y_t = x0 (h0 u_t + Re sum over k of R_k x_(t-1),k)
        x_t = p x_(t-1) + u_t                                  complex, for each entry

    z         [B, 3D] floating point: the projections of this token, before the short convolution.
    recent    [B, 3D, S-1] in the dtype of z: those of the tokens before it, the oldest first. Moved on by one in place.
    taps      [3D, S] floating point, S from 1 to 16: the last one multiplies z, as in `torch.nn.Conv1d`.
    bias      [3D] floating point, or None.
    state     [B, D, K, 2] contiguous: real and imaginary part of x, in the wider of the dtypes of z and `residues`.
              Updated in place.
    poles     [D, K, 2] float32 or float64: real and imaginary part of p, |p| < 1.
    residues  [D, K, 2] float32 or float64: real and imaginary part of R.
    h0        [D] float32 or float64.
    Returns y [B, D] in the dtype of z. All is computed in the dtype of the state.

    No gradient flows. Raises ValueError for other shapes or dtypes, `KernelError` when Triton was asked for and cannot
    run.
    """
    check_planes("poles", poles)
    check_planes("residues", residues, tuple(poles.shape))
    width, entries, _ = poles.shape
    check_planes("h0", h0, (width,))
    if z.dim() != 2 or z.shape[1] != 3 * width or z.dtype not in FLOATING:
        raise ValueError(f"z must be floating point [batch, {3 * width}], not {z.dtype} {tuple(z.shape)}")
    if taps.dim() != 2 or len(taps) != 3 * width or not 1 <= taps.shape[1] <= 16 or taps.dtype not in FLOATING:
        raise ValueError(f"taps must be floating point [{3 * width}, 1 to 16], not {taps.dtype} {tuple(taps.shape)}")
    shape = (len(z), 3 * width, taps.shape[1] - 1)
    if recent.shape != shape or recent.dtype != z.dtype:
        raise ValueError(f"recent must be {z.dtype} {shape}, not {recent.dtype} {tuple(recent.shape)}")
    if bias is not None and (bias.shape != (3 * width,) or bias.dtype not in FLOATING):
        raise ValueError(f"bias must be floating point ({3 * width},), not {bias.dtype} {tuple(bias.shape)}")
    check_planes("state", state, (len(z), width, entries, 2))
    wide = torch.promote_types(z.dtype, residues.dtype)
    if state.dtype != wide or not state.is_contiguous():
        raise ValueError(f"state must be contiguous {wide}, not {state.dtype} of strides {state.stride()}")
    tensors = [t.detach() for t in (z, recent, taps, state, poles, residues, h0)]
    z, recent, taps, state, poles, residues, h0 = tensors
    bias = None if bias is None else bias.detach()

    def supports() -> str | None:
        from rewright.kernels.modal_step import triton

        return triton.supports(z, poles, residues)

    if dispatch.pick("modal_step", tensors if bias is None else [*tensors, bias], supports):
        from rewright.kernels.modal_step import triton

        return triton.modal_step(z, recent, taps, bias, state, poles, residues, h0)
    return reference.modal_step(z, recent, taps, bias, state, poles, residues, h0)
