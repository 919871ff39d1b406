"""Which long filters a checkpoint holds, by its headers: their names, how many, how long, and what becomes of them.

Standard library only. Kinds: a `bank` is a file of impulse responses; `implicit` filters are what a small network makes
of positions, as in Hyena and MultiHyena; `modal` ones are recurrences already, whose order is reduced, with complex
modes (StripedHyena) or real ones (StripedHyena 2).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from rewright.formats.dtypes import FLOATS
from rewright.passes.errors import InputError
from rewright.passes.spec import Layout

Kind = Literal["bank", "implicit", "modal", "real-modal"]

# Where filters stand in a model, by model type, and what a checkpoint of each kind says of itself.
IMPLICIT = frozenset({"hyenadna", "hyena", "multihyena"})
STRIPED = frozenset({"stripedhyena", "stripedhyena2"})
_LAST = re.compile(r"(?P<mixer>.+\.mixer(\.layer)?)\.filter_fn\.implicit_filter\.(?P<number>\d+)\.weight")
_EMBEDDING = re.compile(r"(^|\.)word_embeddings\.weight$")
_MODAL = re.compile(r"(?P<mixer>.+)\.(?P<poles>poles|log_poles)")
# Filters that are fitted together: as many as keep their samples within this, and at most so many.
SAMPLES, MOST = 1 << 21, 64


@dataclass(frozen=True, slots=True)
class Group:
    """The filters of one tensor or layer. `tensors` are those that the recurrences stand in for.

    `out` is what their names begin with, `length` how many samples of each count.
    """

    name: str
    kind: Kind
    filters: int
    length: int
    tensors: tuple[str, ...]
    out: str
    dtype: Literal["F32", "F64"] = "F32"

    @property
    def blocks(self) -> list[range]:
        """The filters that are fitted together; by shapes alone."""
        size = max(1, min(MOST, SAMPLES // self.length))
        return [range(first, min(first + size, self.filters)) for first in range(0, self.filters, size)]


def draw_up(layout: Layout, horizon: int | None) -> list[Group]:
    """The groups of a checkpoint in the order of its layers. Raises InputError where there is nothing to distil."""
    if layout.model_type in IMPLICIT:
        found = _implicit(layout)
    elif layout.model_type in STRIPED:
        found = _modal(layout, horizon)
    elif not layout.config:
        found = _bank(layout)
    else:
        raise InputError(
            f"model type `{layout.model_type}` is not one that `hyena-distill` takes",
            hint=f"it takes {', '.join(sorted(IMPLICIT | STRIPED))}, and files of impulse responses without a config",
        )
    return [_checked(group, horizon) for group in found]


def _checked(group: Group, horizon: int | None) -> Group:
    length = group.length if horizon is None else horizon
    if length < 2 or not group.filters:
        raise InputError(f"`{group.name}` is {group.filters} filters of {length} samples: there is nothing to distil")
    return group


def _bank(layout: Layout) -> list[Group]:
    found = []
    for name, (dtype, shape) in layout.tensors.items():
        if dtype in FLOATS and len(shape) == 2:
            wide: Literal["F32", "F64"] = "F64" if dtype == "F64" else "F32"
            found.append(Group(name, "bank", *shape, (name,), name, wide))
    if not found:
        raise InputError(
            "no tensor is a bank of impulse responses, which is floats of shape [channels, length]",
            hint="for a model, name its folder, with its `config.json`",
        )
    for group in found:
        for leaf in ("poles", "residues", "h0", "fir"):
            if f"{group.name}.{leaf}" in layout.tensors:
                raise InputError(f"`{group.name}.{leaf}` is there already, and is what `{group.name}` would become")
    return found


def _implicit(layout: Layout) -> list[Group]:
    """Hyena's and MultiHyena's filters: as many as the last matrix of the small network has rows."""
    last: dict[str, tuple[int, int]] = {}
    for name, (_, shape) in layout.tensors.items():
        found = _LAST.fullmatch(name)
        if found and len(shape) == 2:
            number = int(found["number"])
            if number >= last.get(found["mixer"], (-1, 0))[0]:
                last[found["mixer"]] = (number, shape[0])
    if layout.config.get("modal") is not None or any(name.endswith(".modal.poles") for name in layout.tensors):
        raise InputError(
            "the filters are recurrences already", hint="distil the model that they came from, to another order"
        )
    if not last:
        raise InputError("no filter is there: no tensor is called `...mixer.filter_fn.implicit_filter.N.weight`")
    _agree(layout, {mixer: rows for mixer, (_, rows) in last.items()})
    length = _length(layout)
    return [
        Group(
            mixer,
            "implicit",
            rows,
            length,
            tuple(name for name in layout.tensors if name.startswith(f"{mixer}.filter_fn.")),
            f"{mixer}.modal",
        )
        for mixer, (_, rows) in sorted(last.items(), key=lambda item: _numbers(item[0]))
    ]


def _agree(layout: Layout, filters: Mapping[str, int]) -> None:
    """Raise InputError where the config and the tensors differ in how many layers, channels or filters there are."""
    config = layout.config
    for key in ("n_layer", "d_model", "hyena_order", "num_heads"):
        said = config.get(key)
        if said is not None and (isinstance(said, bool) or not isinstance(said, int)):
            raise InputError(f"`config.json` says `{key}` {said}, which is no whole number")
    widths = [shape[1] for name, (_, shape) in layout.tensors.items() if _EMBEDDING.search(name) and len(shape) == 2]
    told = [("n_layer", len(filters), "layers with filters")] + [("d_model", width, "channels") for width in widths]
    if layout.model_type == "multihyena":
        told += [("num_heads", rows, f"filters of `{mixer}`") for mixer, rows in filters.items()]
    elif config.get("d_model") is not None:
        order = config.get("hyena_order")
        every = config["d_model"] * ((2 if order is None else order) - 1)
        wrong = next(((mixer, rows) for mixer, rows in filters.items() if rows != every), None)
        if wrong is not None:
            raise InputError(f"`config.json` makes {every} filters for each layer, and `{wrong[0]}` has {wrong[1]}")
    for key, found, what in told:
        said = config.get(key)
        if said is not None and said != found:
            raise InputError(f"`config.json` says `{key}` {said}, and the tensors have {found} {what}")


def _length(layout: Layout) -> int:
    keys = ("max_seq_len", "max_seqlen", "l_max")
    key = next((key for key in keys if key in layout.config), "max_seqlen" if layout.model_type in STRIPED else keys[0])
    said = layout.config.get(key)
    if not isinstance(said, int) or isinstance(said, bool) or said < 2:
        # a horizon alone tells how far to look at a recurrence, and not how long a model's filters are
        hint = f"it is `{key}`, as a number" + ("; or say `--horizon N`" if layout.model_type in STRIPED else "")
        raise InputError("`config.json` does not say how long the filters are", hint=hint)
    return said


def _modal(layout: Layout, horizon: int | None) -> list[Group]:
    """Recurrences by their poles; their impulse responses have no end, so a length is to be said."""
    found = []
    for name, (dtype, shape) in layout.tensors.items():
        match = _MODAL.fullmatch(name)
        if match is None:
            continue
        if dtype not in ("F32", "F64"):
            raise InputError(f"`{name}` is {dtype}: a pole in half precision has lost its filter")
        mixer, real = match["mixer"], match["poles"] == "log_poles"
        if f"{mixer}.residues" not in layout.tensors or len(shape) != (3 if real else 4):
            continue
        length = horizon or _length(layout)
        held = tuple(one for one in (name, f"{mixer}.residues", f"{mixer}.D") if one in layout.tensors)
        found.append(Group(mixer, "real-modal" if real else "modal", shape[0], length, held, mixer))
    if not found:
        raise InputError("no filter is there: no tensors are called `...poles` and `...residues`")
    return sorted(found, key=lambda group: _numbers(group.name))


def _numbers(name: str) -> tuple[int, ...]:
    return tuple(int(digits) for digits in re.findall(r"\d+", name))


def by_name(groups: list[Group]) -> Mapping[str, Group]:
    """Groups by name."""
    return {group.name: group for group in groups}
