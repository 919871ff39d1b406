"""The definition of `modal_fit_step`: some channels at a time, through the two tables that `vandermonde` has."""

from __future__ import annotations

import torch

from rewright.kernels.modal import columns, groups, powers, rows, slopes, to_complex, width_of
from rewright.kernels.vandermonde.reference import folded


def modal_fit_step(
    target: torch.Tensor, logs: torch.Tensor, residues: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`loss`, `d_logs` and `d_residues`; see the package for the mathematics, shapes and dtypes."""
    channels, entries, _ = logs.shape
    length = target.shape[1]
    dtype = torch.promote_types(target.dtype, residues.dtype)
    loss = torch.zeros(channels, dtype=dtype, device=target.device)
    d_logs, d_residues = torch.zeros_like(logs), torch.zeros_like(residues)
    if target.numel() == 0:
        return loss, d_logs, d_residues
    width = width_of(length)
    blocks = -(-length // width)
    for part in groups(channels, blocks * width + 4 * entries * (blocks + width)):
        own, weight = logs[part].double(), residues[part].double()
        fine = columns(powers(own, width), dtype)
        left = rows(powers(own, blocks, width) * to_complex(weight)[..., None], dtype)
        tile = left @ fine
        flat = tile.flatten(1)
        flat[:, :length] -= target[part]
        flat[:, length:] = 0
        loss[part] = torch.linalg.vecdot(flat, flat)
        sums, moments = (torch.view_as_real(t) for t in folded(own, tile, fine))
        d_logs[part] = 2 * slopes(weight, moments)
        d_residues[part] = 2 * sums * sums.new_tensor((1.0, -1.0))
    return loss, d_logs, d_residues
