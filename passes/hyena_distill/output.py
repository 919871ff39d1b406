"""What a distilled checkpoint holds: its tensors, and what its config says of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from rewright.formats.dtypes import to_torch
from rewright.formats.layout import TensorSpec
from rewright.passes.errors import InputError
from rewright.passes.hyena_distill.fits import Job
from rewright.passes.hyena_distill.modal import Modal
from rewright.passes.hyena_distill.plan import Group
from rewright.passes.spec import Layout
from rewright.passes.striped import to_striped


def tensors(job: Job) -> dict[str, tuple[Group, str]]:
    """The tensors that hold recurrences, by name: their group, and which of its parts they are."""
    found: dict[str, tuple[Group, str]] = {}
    for group in job.groups:
        if group.kind == "real-modal":
            leaves = ("log_poles", "residues", *(["D"] if f"{group.out}.D" in group.tensors else []))
        elif group.kind == "modal":
            leaves = ("poles", "residues", "D")
        else:
            leaves = ("poles", "residues", "h0", *(["fir"] if job.options.fir_head else []))
        found |= {f"{group.out}.{leaf}": (group, leaf) for leaf in leaves}
    return found


def specs(job: Job, layout: Layout, modals: Mapping[str, Modal]) -> list[TensorSpec]:
    """Every tensor of the result: what is taken over as it is, and the recurrences where their filters stood."""
    own = tensors(job)
    gone = {
        name
        for group in job.groups
        for name in group.tensors
        if not (job.options.keep_filters and group.kind in ("bank", "implicit"))
    }
    first = {group.tensors[0]: group for group in job.groups}
    found: list[TensorSpec] = []
    for name, (dtype, shape) in layout.tensors.items():
        if name in first:
            group = first[name]
            for made, (_, leaf_name) in own.items():
                if own[made][0] is group:
                    found.append(TensorSpec(made, group.dtype, tuple(leaf(modals[group.name], group, leaf_name).shape)))
        if name not in gone and name not in own:
            found.append(TensorSpec(name, dtype, shape))
    return found


def refuse_near_zero(job: Job, modals: Mapping[str, Modal]) -> None:
    """Refuse recurrences that StripedHyena's layout does not hold: their residues are divided by poles near 0.

    Raises InputError where what is stored makes another h_0, or a pole that is used is 0.
    """
    for group in job.groups:
        if group.kind in ("bank", "implicit"):
            continue
        modal = modals[group.name]
        residues, skip = (part.float().double() for part in to_striped(modal.poles, modal.residues, modal.h0))
        off = (skip + residues[..., 0].sum(1) - modal.h0).abs()
        lost = ((modal.poles == 0).all(2) & (modal.residues != 0).any(2)).any(1)
        wrong = lost | (off > 1e-4 * modal.impulse(2).abs().amax(1))
        if wrong.any():
            place = int(wrong.nonzero()[0])
            raise InputError(
                f"filter {place} of `{group.name}` needs a pole so near 0 that StripedHyena's layout does not hold it",
                hint="try another `--order`",
            )


def leaf(modal: Modal, group: Group, name: str) -> torch.Tensor:
    """One tensor of a group's recurrences, in the layout of its kind and the dtype that it is stored in."""
    return _values(modal, group, name).to(to_torch(group.dtype)).contiguous()


def _values(modal: Modal, group: Group, name: str) -> torch.Tensor:
    if group.kind in ("bank", "implicit"):
        values: torch.Tensor = getattr(modal, name)
        return values
    residues, skip = to_striped(modal.poles, modal.residues, modal.h0)
    if name == "log_poles":
        return modal.poles[..., :1].clamp(min=torch.finfo(torch.float32).tiny).log()
    if name == "D":
        return skip
    if group.kind == "real-modal":
        return residues[..., 0]
    return (modal.poles if name == "poles" else residues)[:, :, None, :]


def config(job: Job, modals: Mapping[str, Modal]) -> dict[str, Any]:
    """The keys of `config.json` that change."""
    head = job.options.fir_head
    if all(group.kind == "bank" for group in job.groups):
        return {
            "filters": {
                group.name: {
                    "length": group.length,
                    "entries": modals[group.name].poles.shape[1],
                    "fir_head": head,
                    "states": modals[group.name].states.tolist(),
                }
                for group in job.groups
            }
        }
    if all(group.kind == "implicit" for group in job.groups):
        return {
            "modal": {
                "entries": [modals[group.name].poles.shape[1] for group in job.groups],
                "states": [int(modals[group.name].states.max()) for group in job.groups],
                "fir_head": head,
            }
        }
    return {"state_size": max(modals[group.name].poles.shape[1] for group in job.groups)}
