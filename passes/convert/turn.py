"""Recurrences turned from our convention into StripedHyena's, or back, layer by layer."""

from __future__ import annotations

import torch
from safetensors.torch import save

from rewright.formats.checkpoint import Checkpoint
from rewright.formats.draft import Draft
from rewright.formats.dtypes import to_torch
from rewright.passes.context import Context
from rewright.passes.convert.recurrences import Convention, Layer, config, dtype, specs
from rewright.passes.errors import InputError
from rewright.passes.spec import Layout, Metrics
from rewright.passes.striped import from_striped, to_striped
from rewright.passes.writing import carry, write_by_layer

# Where what StripedHyena's `load_poles_residues` reads is put, one file a layer.
FOLDER = "attachments/stripedhyena"

Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def run(context: Context, to: Convention, source: Checkpoint, draft: Draft) -> Metrics:
    """Write every layer's recurrences in the other convention, and everything else as it is."""
    layout = Layout.of(source)
    made = specs(to, layout)
    owner = {spec.name: layer for spec, layer in made}
    kind = to_torch(dtype(to, layout))
    draft.declare([spec for spec, _ in made])

    def write(name: str) -> None:
        layer = owner[name]
        if layer is None:
            draft.copy(name, source)
            return
        found = turned(to, source, layer)
        place = ("poles", "residues").index(leaf) if (leaf := name.rpartition(".")[2]) in ("poles", "residues") else 2
        draft.write(name, found[place].to(kind).contiguous())

    write_by_layer(context, draft, "convert, tensors", list(owner), write)
    carry(context, source, draft)
    layers = [layer for spec, layer in made if layer is not None and spec.name.endswith(".poles")]
    if to == "stripedhyena-modal" and context.world.leads:
        for number, layer in enumerate(layers, 1):
            poles, residues, _ = turned(to, source, layer)
            for name, planes in (("poles", poles), ("residues", residues)):
                table = torch.view_as_complex(planes[:, :, 0].contiguous()).T.to(torch.complex64).contiguous()
                draft.put(f"{FOLDER}/approx_{name}_{number}.safetensors", save({name: table}))
    changes, gone = config(to, layout)
    draft.edit_config(changes, remove=gone)
    return {"recurrences": sum(layer.filters for layer in layers)}


def turned(to: Convention, source: Checkpoint, layer: Layer) -> Parts:
    """Poles, residues, and what is on top at t = 0, in float64 and the shapes of the other layout.

    Raises InputError where the numbers that there were do not come back.
    """
    own = _read(source, layer, theirs=to == "modal")
    found = _ours(*own) if to == "modal" else _theirs(*own)
    back = _theirs(*found) if to == "modal" else _ours(*found)
    stored = source.entries[f"{layer.stem}.{'filter' if to == 'modal' else 'modal'}.poles"].dtype
    kind = to_torch(stored)
    if stored == "F32" and not all(torch.equal(a.to(kind), b.to(kind)) for a, b in zip(own, back, strict=True)):
        raise InputError(
            f"a pole of `{layer.stem}` is so near 0 that its residue does not come back from StripedHyena's layout",
            hint="distil to another order",
        )
    return found


def _read(source: Checkpoint, layer: Layer, *, theirs: bool) -> Parts:
    stem = f"{layer.stem}.{'filter' if theirs else 'modal'}"
    first, second, third = (source.read(f"{stem}.{leaf}") for leaf in ("poles", "residues", "D" if theirs else "h0"))
    return first.double(), second.double(), third.double()


def _theirs(poles: torch.Tensor, residues: torch.Tensor, h0: torch.Tensor) -> Parts:
    """[D, N, 2] to [D, N, 1, 2]."""
    made, skip = to_striped(poles, residues, h0)
    return poles[:, :, None], made[:, :, None], skip


def _ours(poles: torch.Tensor, residues: torch.Tensor, skip: torch.Tensor) -> Parts:
    """[D, N, 1, 2] to [D, N, 2]."""
    return poles[:, :, 0], *from_striped(poles[:, :, 0], residues[:, :, 0], skip)
