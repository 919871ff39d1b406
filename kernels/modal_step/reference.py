"""The definition of `modal_step`."""

from __future__ import annotations

import torch


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
    """`y`, with `recent` and `state` brought up to date; see the package for the mathematics, shapes and dtypes."""
    dtype = state.dtype
    past = recent.shape[2]
    weight = taps.to(dtype)
    short = z * weight[:, past]
    if past:
        short += (recent * weight[:, :past]).sum(dim=2)
        recent.copy_(torch.cat((recent[:, :, 1:], z[:, :, None]), dim=2))
    if bias is not None:
        short += bias
    outer, inner, value = short.chunk(3, dim=1)
    u = inner * value
    x = torch.view_as_complex(state)
    y = (x * _complex(residues, dtype)).sum(dim=2).real
    y = torch.addcmul(y, h0.to(dtype), u).mul_(outer)
    x.mul_(_complex(poles, dtype)).add_(u[:, :, None])
    return y.to(z.dtype)


def _complex(planes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # not as a view: what a file holds is not aligned as complex numbers are taken to be
    return torch.complex(*planes.to(dtype).unbind(-1))
