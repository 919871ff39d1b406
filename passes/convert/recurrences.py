"""Recurrences of distilled models in the layout of StripedHyena, and back: names, shapes, config. No torch.

Ours is h_0 = h0, h_t = Re sum R p^(t-1) for t >= 1; StripedHyena's is h_t = Re sum R p^t from t = 0 on, with D on top
at t = 0. Residues are divided by their poles on the way there and multiplied on the way back. That is done in float64,
and what it is made of says what it came from, so that both ways make the bytes that there were.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, Literal

from rewright.formats.dtypes import nbytes
from rewright.formats.layout import TensorSpec
from rewright.passes.errors import InputError
from rewright.passes.spec import Estimate, Layout

Convention = Literal["modal", "stripedhyena-modal"]

# In `config.json`: what our tensors are, and what it says of them in the other layout.
OURS, THEIRS = "modal", "stripedhyena_modal"
_SOURCES = {"stripedhyena-modal": r"(.+)\.modal\.poles", "modal": r"(.+)\.filter\.poles"}


@dataclass(frozen=True, slots=True)
class Layer:
    """The recurrences of one layer: what their names begin with, how many there are, and the entries of each."""

    stem: str
    filters: int
    entries: int


def draw_up(to: Convention, layout: Layout) -> list[Layer]:
    """The layers in file order. Raises InputError where there are none, or what the other layout has no room for."""
    found = []
    for name, (_, shape) in layout.tensors.items():
        match = re.fullmatch(_SOURCES[to], name)
        if match and len(shape) == (3 if to == "stripedhyena-modal" else 4):
            found.append(Layer(match[1], shape[0], shape[1]))
    if not found:
        raise InputError(
            "no recurrences are there to convert",
            hint="`hyena-distill` makes them" if to == "stripedhyena-modal" else "they are called `...filter.poles`",
        )
    for layer in found:
        for name, shape in _shapes(layer, to, theirs=to == "modal").items():
            if layout.tensors.get(name, ("", ()))[1] != shape:
                raise InputError(f"tensor `{name}` is missing, or is not of shape {list(shape)}")
    if to == "stripedhyena-modal" and (layout.config.get(OURS) or {}).get("fir_head"):
        raise InputError("StripedHyena's layout has no `fir`", hint="distil with `--fir-head 0`")
    return found


def _shapes(layer: Layer, to: Convention, *, theirs: bool) -> dict[str, tuple[int, ...]]:
    """The tensors of a layer, in either layout."""
    parts, skip, middle = (f"{layer.stem}.filter", "D", (1,)) if theirs else (f"{layer.stem}.modal", "h0", ())
    pairs = (layer.filters, layer.entries, *middle, 2)
    return {f"{parts}.poles": pairs, f"{parts}.residues": pairs, f"{parts}.{skip}": (layer.filters,)}


def dtype(to: Convention, layout: Layout) -> str:
    """The dtype of what is written: that which the source was made of, else float64."""
    said = layout.config.get(OURS if to == "stripedhyena-modal" else THEIRS)
    return str((said or {}).get("from", "F64")) if isinstance(said, dict) else "F64"


def specs(to: Convention, layout: Layout) -> list[tuple[TensorSpec, Layer | None]]:
    """Every tensor of the result, those of a layer where its poles stood."""
    layers = {layer.stem: layer for layer in draw_up(to, layout)}
    kind = dtype(to, layout)
    taken = {name: layer for layer in layers.values() for name in _shapes(layer, to, theirs=to == "modal")}
    found: list[tuple[TensorSpec, Layer | None]] = []
    for name, (own, shape) in layout.tensors.items():
        if name not in taken:
            found.append((TensorSpec(name, own, shape), None))
        elif name.endswith(".poles"):
            made = _shapes(taken[name], to, theirs=to != "modal")
            found += [(TensorSpec(one, kind, size), taken[name]) for one, size in made.items()]
    return found


def config(to: Convention, layout: Layout) -> tuple[dict[str, Any], list[str]]:
    """Keys of `config.json` that change, and those that go."""
    layers = draw_up(to, layout)
    first = f"{layers[0].stem}.{'modal' if to == 'stripedhyena-modal' else 'filter'}.poles"
    stored = layout.tensors[first][0]
    if to == "stripedhyena-modal":
        said = {key: value for key, value in (layout.config.get(OURS) or {}).items() if key != "from"}
        return {THEIRS: {**said, "from": stored}}, [OURS]
    said = {key: value for key, value in (layout.config.get(THEIRS) or {}).items() if key != "from"}
    if not said:
        said = {
            "entries": [layer.entries for layer in layers],
            "states": [2 * layer.entries for layer in layers],
            "fir_head": 0,
        }
    if dtype(to, layout) == "F64":
        said["from"] = stored
    return {OURS: said}, [THEIRS] if THEIRS in layout.config else []


def estimate(to: Convention, layout: Layout) -> Estimate:
    made = specs(to, layout)
    written = sum(spec.nbytes for spec, _ in made)
    changes, gone = config(to, layout)
    kept = {key: value for key, value in layout.config.items() if key not in gone}
    return Estimate(
        layout=replace(
            layout, tensors={spec.name: (spec.dtype, spec.shape) for spec, _ in made}, config={**kept, **changes}
        ),
        output_bytes=written,
        peak_host_bytes=8 * max((nbytes("F64", spec.shape) for spec, layer in made if layer), default=0),
        peak_device_bytes=0,
        flops=0,
        bytes_moved=2 * written,
        details={"layers": sum(spec.name.endswith(".poles") and layer is not None for spec, layer in made)},
    )
