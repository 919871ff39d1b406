"""The definitions of `vandermonde` and its adjoint: a real matrix product a channel, by two short tables of powers."""

from __future__ import annotations

import torch

from rewright.kernels.modal import columns, groups, powers, rows, to_complex, width_of


def vandermonde(logs: torch.Tensor, residues: torch.Tensor, length: int) -> torch.Tensor:
    """h [C, length]; see the package for the mathematics, shapes and dtypes."""
    channels, entries, _ = logs.shape
    out = torch.zeros((channels, length), dtype=residues.dtype, device=residues.device)
    if out.numel() == 0 or entries == 0:
        return out
    width = width_of(length)
    blocks = -(-length // width)
    for part in groups(channels, blocks * width + 4 * entries * (blocks + width)):
        own = logs[part].double()
        left = powers(own, blocks, width) * to_complex(residues[part])[..., None]
        tile = rows(left, out.dtype) @ columns(powers(own, width), out.dtype)
        out[part] = tile.flatten(1)[:, :length]
    return out


def vandermonde_adjoint(logs: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`sums` and `moments` [C, K, 2]; see the package for the mathematics, shapes and dtypes."""
    channels, entries, _ = logs.shape
    length = values.shape[1]
    dtype = torch.promote_types(values.dtype, torch.float32)
    found = torch.zeros((2, channels, entries, 2), dtype=dtype, device=values.device)
    if found.numel() == 0 or length == 0:
        return found[0], found[1]
    width = width_of(length)
    blocks = -(-length // width)
    for part in groups(channels, blocks * width + 4 * entries * (blocks + width)):
        own = logs[part].double()
        tile = torch.nn.functional.pad(values[part].to(dtype), (0, blocks * width - length))
        sums, moments = folded(own, tile.view(-1, blocks, width), columns(powers(own, width), dtype))
        found[0, part], found[1, part] = torch.view_as_real(sums), torch.view_as_real(moments)
    return found[0], found[1]


def folded(logs: torch.Tensor, tile: torch.Tensor, fine: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Complex sums and moments [C, K] of values laid out as [C, blocks, width], with the table of p^b [C, 2 K, width].

    Within a block the sum over b of g p^b and of b g p^b; then over blocks, where t = width a + b.
    """
    channels, blocks, width = tile.shape
    place = torch.arange(width, dtype=tile.dtype, device=tile.device)
    inner = tile @ torch.cat((fine, fine * place), dim=1).transpose(1, 2)
    near, far = to_complex(inner.view(channels, blocks, 2, -1, 2)).transpose(1, 3).unbind(2)
    coarse = powers(logs, blocks, width)
    start = width * torch.arange(blocks, dtype=torch.float64, device=tile.device)
    return (coarse * near).sum(dim=2), (coarse * (far + start * near)).sum(dim=2)
