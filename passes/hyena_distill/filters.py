"""The filters of a checkpoint as impulse responses, in float64."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from rewright.formats.checkpoint import Checkpoint
from rewright.passes.errors import InputError
from rewright.passes.hyena_distill.plan import Group

# Filters as large, or as small, as this or its inverse are fitted: of their squares' squares nothing is lost.
LARGEST = 1e30


def read(source: Checkpoint, group: Group, block: range, horizon: int | None) -> torch.Tensor:
    """h_0 to h_(L-1) of some filters of a group, float64 [filters, L]; zeros where the horizon is past them.

    Raises InputError for a filter that is not finite, or so large or small that its powers are not.
    """
    length = min(group.length, horizon or group.length)
    if group.kind == "bank":
        found = source.read_rows(group.name, block.start, block.stop)[:, :length].double()
    elif group.kind == "implicit":
        found = _implicit(source, group, block, length)
    else:
        found = _modal(source, group, block, length)
    finite = found.isfinite().all(1)
    if not finite.all():
        place = block.start + int((~finite).nonzero()[0])
        raise InputError(f"filter {place} of `{group.name}` is not finite", hint="is the checkpoint damaged?")
    size = found.abs().amax(1)
    odd = ((size > LARGEST) | ((size > 0) & (size < 1 / LARGEST))).nonzero()
    if len(odd):
        place = int(odd[0])
        raise InputError(
            f"filter {block.start + place} of `{group.name}` is up to {float(size[place]):.1e} in size, out of reach",
            hint=f"scale it: sizes from {1 / LARGEST:.0e} to {LARGEST:.0e} are taken",
        )
    if horizon is not None and horizon > length:
        found = torch.cat([found, found.new_zeros(len(found), horizon - length)], 1)
    return found


def _implicit(source: Checkpoint, group: Group, block: range, length: int) -> torch.Tensor:
    """What the network of a layer makes of its positions, for the rows of its last matrix that are asked for."""
    from rewright.passes.loading import config_of
    from rewright.passes.models.hyena_filter import ImplicitFilter, filled

    module = ImplicitFilter(SimpleNamespace(**{**config_of(source).to_dict(), "filters": len(block)})).double()
    stem = f"{group.name}.filter_fn."
    last = max(int(name.removeprefix(stem).split(".")[1]) for name in group.tensors if ".implicit_filter." in name)
    cut = {f"implicit_filter.{last}.weight": 0, "bias": 0, "modulation.deltas": 2}
    tensors = {}
    for name in group.tensors:
        tensor, leaf = source.read(name).double(), name.removeprefix(stem)
        tensors[leaf] = tensor.narrow(cut[leaf], block.start, len(block)) if leaf in cut else tensor
    with torch.no_grad():
        return filled(module, tensors, group.name).impulse(length, torch.float64)


def real_logs(source: Checkpoint, group: Group) -> torch.Tensor:
    """The logarithms of the real poles of all filters of a group, float64 [filters, modes]."""
    return source.read(f"{group.name}.log_poles").double().flatten(1)


def _modal(source: Checkpoint, group: Group, block: range, length: int) -> torch.Tensor:
    """StripedHyena's: sum R p^t for t >= 0, and D on top at t = 0."""
    from rewright.kernels.vandermonde import vandermonde

    residues = source.read_rows(f"{group.name}.residues", block.start, block.stop).double()
    if group.kind == "real-modal":
        decay = real_logs(source, group)[block.start : block.stop]
        logs = torch.stack([decay, torch.zeros_like(decay)], 2)
        residues = torch.stack([residues.flatten(1), torch.zeros_like(decay)], 2)
    else:
        poles = torch.view_as_complex(
            source.read_rows(f"{group.name}.poles", block.start, block.stop).double().flatten(1, -2).contiguous()
        )
        logs, residues = torch.stack([poles.abs().log(), poles.angle()], 2), residues.flatten(1, -2)
    if logs[..., 0].isnan().any() or (logs[..., 0] > 0).any():
        raise InputError(f"a pole of `{group.name}` is outside the unit circle: its response has no end")
    found = vandermonde(logs, residues.contiguous(), length)
    skip = f"{group.name}.D"
    if skip in group.tensors:
        found[:, 0] += source.read_rows(skip, block.start, block.stop).double()
    return found
