"""Which matrices a source holds packed, and whether they can take another form: from headers, standard library only."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from rewright.formats import bitmask, packing
from rewright.formats.bitmask import Bitmask
from rewright.formats.dtypes import stored_float
from rewright.formats.foreign import refuse_scaled
from rewright.formats.packing import Packing, Record
from rewright.passes.errors import InputError
from rewright.passes.matrices import check_spec
from rewright.passes.spec import Layout
from rewright.passes.values import CODE_BITS

Form = Literal["pack-quantized", "bitmask-w4", "dense"]

# What the two packed forms share, which is copied.
SHARED = ("weight_scale", "weight_shape")
# Kept weights of a group from which on mask and codes take no less than the codes of all.
_NO_GAIN = 0.75
# How full records of a pattern are: a kept weight has a code of zero now and then. Unstructured zeros leave more room.
_FULL = 0.9
Shapes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Module:
    """A packed matrix of the source, (rows, columns) of codes, `group` columns to a scale.

    `nnz` is how many weights of a group are kept in the source's bitmask form, None in any other.
    """

    name: str
    rows: int
    columns: int
    bits: int
    group: int
    symmetric: bool
    nnz: int | None

    def tensor(self, leaf: str) -> str:
        return f"{self.name}.{leaf}"


@dataclass(frozen=True, slots=True)
class Plan:
    """Source and target form, the packed modules in file order, and what else a result is made of.

    `dtype` is the safetensors dtype of decoded weights. `kept` is the share of a group's weights that bitmask
    records have room for, None where it is still to be counted. `ignore` are the modules that stay dense.
    """

    form: Form
    to: Form
    modules: Mapping[str, Module]
    dtype: str
    ignore: tuple[str, ...]
    kept: float | None

    def bitmask_of(self, module: Module) -> Bitmask:
        """The record of a module in the bitmask form. Needs `kept`."""
        assert self.kept is not None
        count = max(1, math.ceil(module.group * self.kept - 1e-9))
        return Bitmask(module.group, count + count % 2)

    def owner(self, name: str) -> Module | None:
        """The packed module that a stored tensor is a part of."""
        module, _, leaf = name.rpartition(".")
        found = self.modules.get(module)
        return found if found is not None and leaf in packing.SUFFIXES[self.form] else None


def form_of(layout: Layout) -> Form:
    """The form a checkpoint is in. Raises FormatError for one that is not read."""
    stated = packing.parse(layout.config)
    if stated is None:
        refuse_scaled(layout.tensors)
        return "dense"
    return "bitmask-w4" if stated.form == bitmask.FORM else "pack-quantized"


def draw_up(to: Form, layout: Layout, shapes: Shapes | None = None) -> Plan:
    """Decide every tensor; `shapes` are those that modules say they have, without which headers must do.

    Raises InputError for a source that cannot take the form: a dense one, whose codes nobody knows, or one whose
    matrices the bitmask form has no room for.
    """
    form, stated = form_of(layout), packing.parse(layout.config)
    modules = {} if stated is None else dict(_modules(stated, layout, shapes))
    if form == "dense" and to != "dense":
        raise InputError(
            "the checkpoint is dense: it has no codes to write in another form",
            hint="`rewright compress` chooses codes, and writes either form",
        )
    if form != "dense" and not modules:
        raise InputError(f"`config.json` says {form}, and no tensor is in that form")
    if form != to and to == "bitmask-w4":
        for module in modules.values():
            _refuse_module(module, layout)
    kept = _kept(form, to, layout, modules)
    ignore = () if stated is None or to in ("dense", form) else _ignored(stated, layout)
    return Plan(form, to, modules, stored_float(layout.tensors), ignore, kept)


def _modules(stated: Packing, layout: Layout, shapes: Shapes | None) -> Iterator[tuple[str, Module]]:
    for name in layout.tensors:
        module, _, leaf = name.rpartition(".")
        if leaf != stated.mark:
            continue
        said = None
        if shapes is not None:
            _held(layout, f"{module}.weight_shape", 1)
            said = shapes.get(module)
            if said is None:
                raise InputError(f"tensor `{module}.weight_shape` does not give rows and columns")
        record = stated.of(module)
        if record is None:
            raise InputError(f"`{module}` is packed, and `config.json` says nothing of how")
        if record.bits not in CODE_BITS:
            raise InputError(f"`{name}` has codes of {record.bits} bits, which are not read")
        shape = said or _shape(module, record, layout)
        for spec in packing.specs(module, shape, record, _scales(layout, module)):
            found = _held(layout, spec.name, len(spec.shape))
            check_spec(spec, layout.tensors[spec.name][0], found, shape)
        yield module, Module(module, *shape, record.bits, record.group_size or shape[1], record.symmetric, record.nnz)


def _shape(module: str, record: Record, layout: Layout) -> tuple[int, int]:
    """Rows and columns by the shapes of what a packed module has."""
    if isinstance(record, Bitmask):
        rows, groups, _ = _held(layout, f"{module}.weight_mask", 3)
        return rows, groups * record.group_size
    rows, words = _held(layout, f"{module}.weight_packed", 2)
    # a row of whole words may be some columns shorter, which headers do not tell where a row has one scale
    columns = record.group_size or words * 32 // record.bits
    return rows, _held(layout, f"{module}.weight_scale", 2)[1] * columns


def _scales(layout: Layout, module: str) -> str:
    """The dtype of a module's scales."""
    name = f"{module}.weight_scale"
    _held(layout, name, 2)
    return layout.tensors[name][0]


def _held(layout: Layout, name: str, axes: int) -> tuple[int, ...]:
    """The shape of a tensor that must be there with so many axes. Raises InputError."""
    if name not in layout.tensors:
        raise InputError(f"tensor `{name}` is missing", hint="is a shard of the download absent?")
    shape = tuple(layout.tensors[name][1])
    if len(shape) != axes:
        raise InputError(f"tensor `{name}` has shape {list(shape)}, and only packed matrices are read")
    return shape


def _refuse_module(module: Module, layout: Layout) -> None:
    """Raise InputError for a matrix that a bitmask record cannot hold, whatever its codes are."""
    name = module.tensor("weight_packed")
    hint = "the bitmask form holds symmetric 4-bit codes: compress with `--bits 4 --pattern 64:128`"
    if module.bits != 4:
        raise InputError(f"`{name}` has codes of {module.bits} bits", hint=hint)
    if not module.symmetric:
        raise InputError(f"`{name}` has asymmetric codes", hint=hint)
    if module.group % 8:
        raise InputError(f"`{name}` has groups of {module.group}, which is no multiple of 8", hint=hint)
    scale = module.tensor("weight_scale")
    if layout.tensors[scale][0] not in ("F16", "BF16"):
        raise InputError(
            f"`{scale}` is {layout.tensors[scale][0]}, and the bitmask form holds scales of 16 bits",
            hint="`rewright compress` writes scales of 16 bits",
        )


def _kept(form: Form, to: Form, layout: Layout, modules: Mapping[str, Module]) -> float | None:
    """The share of weights that every record keeps, as far as the source's form or what made it tells it.

    Raises InputError where records are wanted and the source was made to keep now more, now fewer.
    """
    if form == "bitmask-w4":
        shares = {(module.nnz or 0) / module.group for module in modules.values()}
        return shares.pop() if len(shares) == 1 else None
    for stage in reversed(layout.made):
        options, metrics = stage.get("options") or {}, stage.get("metrics") or {}
        if stage.get("pass") == "convert" and isinstance(metrics.get("kept"), float):
            return float(metrics["kept"])
        if stage.get("pass") == "compress":
            keep, colon, of = str(options.get("pattern", "")).partition(":")
            if colon and keep.isdecimal() and of.isdecimal() and int(of):
                return int(keep) / int(of)
            if to != form and to == "bitmask-w4" and options.get("mask") != "keep":
                raise unstructured("the model was compressed without a pattern: its groups keep any number of weights")
            return None
    return None


def settle(plan: Plan, counts: Mapping[str, tuple[int, int, int]]) -> Plan:
    """The plan with records for what was counted: in each matrix the most non-zero codes of a group, all of them,
    and the groups that have any.

    Every matrix keeps one share, the largest that any group needs, since that is how patterns are asked for: a matrix
    whose kept weights happen to have codes of zero has the records of the others. Raises InputError where a record
    would save nothing, and where groups keep now more, now fewer.
    """
    shares = {name: largest / plan.modules[name].group for name, (largest, _, _) in counts.items()}
    needed = max(shares.values())
    if plan.kept is not None and needed <= plan.kept:
        return plan
    filled = sum(total for _, total, _ in counts.values())
    room = sum(largest * groups for largest, _, groups in counts.values())
    if needed < _NO_GAIN and filled >= _FULL * room:
        return replace(plan, kept=needed)
    for name, (largest, total, groups) in counts.items():
        if shares[name] >= _NO_GAIN or total < _FULL * largest * groups:
            group = plan.modules[name].group
            raise unstructured(
                f"`{name}.weight` keeps up to {largest} of {group} weights, {total / groups:.4g} in the mean",
                group,
            )
    return replace(plan, kept=needed)


def unstructured(message: str, group: int = 128) -> InputError:
    """The refusal of matrices that keep now more weights of a group, now fewer."""
    return InputError(
        message,
        hint=f"a record of the bitmask form holds a fixed number: compress with `--pattern {group // 2}:{group}`",
    )


def _ignored(stated: Packing, layout: Layout) -> tuple[str, ...]:
    """The modules that stay dense: those the source lists, and those that its patterns or targets leave dense.

    The result says of every linear module it does not name here that it is packed.
    """
    if stated.form == bitmask.FORM:
        return stated.ignore
    dense = (
        name.removesuffix(".weight")
        for name, (_, shape) in layout.tensors.items()
        if name.endswith(".weight") and len(shape) == 2
    )
    return tuple(dict.fromkeys((*stated.ignore, *(n for n in (*dense, "lm_head") if stated.of(n) is None))))
