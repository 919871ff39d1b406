"""What is written: tensors, configuration, and what that takes. Standard library only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from rewright.formats import packing
from rewright.formats.compressed_tensors import Scheme
from rewright.formats.dtypes import nbytes
from rewright.formats.files import CHUNK
from rewright.formats.layout import TensorSpec
from rewright.formats.packing import Record
from rewright.passes.convert.order import ordered
from rewright.passes.convert.plan import SHARED, Form, Module, Plan, draw_up
from rewright.passes.spec import Estimate, Layout

# Codes taken through memory together, and the bytes that each holds there, by what is made of them; as measured.
BLOCK = 1 << 20
_HELD = {"pack-quantized": 10, "bitmask-w4": 14, "dense": 18}
# The table by which the codes that a mask keeps are drawn together.
_TABLE = {"pack-quantized": 0, "bitmask-w4": 4 << 20, "dense": 0}
# What a process takes beside what it imports, as measured: the command line, and a file's digest; then torch's code as
# it is run for the first time.
_STARTED, LOADED = 18 << 20, 21 << 20
# Bytes that a code moves through memory when it is read from a form, and when it is written in one; as measured.
_READ = {"pack-quantized": 8, "bitmask-w4": 34}
_MADE = {"pack-quantized": 12, "bitmask-w4": 38, "dense": 24}


def specs(plan: Plan, layout: Layout) -> tuple[TensorSpec, ...]:
    """The tensors of the result, in their order."""
    found: list[TensorSpec] = []
    for name in ordered(plan, layout):
        if name in plan.modules:
            found += _written(plan, plan.modules[name], layout)
        else:
            dtype, shape = layout.tensors[name]
            found.append(TensorSpec(name, dtype, tuple(shape)))
    return tuple(found)


def _written(plan: Plan, module: Module, layout: Layout) -> Iterator[TensorSpec]:
    shape = (module.rows, module.columns)
    if plan.to == "dense":
        yield TensorSpec(module.tensor("weight"), plan.dtype, shape)
        return
    for spec in packing.specs(module.name, shape, _record(plan, module), "BF16"):
        held = layout.tensors[spec.name] if spec.name.rpartition(".")[2] in SHARED else None
        yield spec if held is None else TensorSpec(spec.name, held[0], tuple(held[1]))


def _record(plan: Plan, module: Module) -> Record:
    """What a module is packed as in the result."""
    if plan.to == "bitmask-w4":
        return plan.bitmask_of(module)
    return Scheme(module.bits, module.group, symmetric=module.symmetric)


def config(plan: Plan, stated: Mapping[str, Any]) -> dict[str, Any]:
    """The top-level keys of config.json that change; None marks one to be removed."""
    said: dict[str, Any] | None = None
    if plan.to != "dense":
        records = {name: _record(plan, module) for name, module in plan.modules.items()}
        groups = {module.group for module in plan.modules.values()}
        if len(groups) > 1 and all(module.group == module.columns for module in plan.modules.values()):
            # a scale a row, said once for all widths
            schemes = {name: r for name, r in records.items() if isinstance(r, Scheme)}
            records |= {name: replace(scheme, group_size=None) for name, scheme in schemes.items()}
        said = packing.quantization_config(records, plan.ignore)
    changes: dict[str, Any] = {"quantization_config": said}
    text = stated.get("text_config")
    if "quantization_config" not in stated and isinstance(text, Mapping):
        changes["text_config"] = {key: value for key, value in text.items() if key != "quantization_config"}
    return changes


def copied_bytes(plan: Plan, layout: Layout) -> int:
    """The bytes of tensors that are no part of a packed matrix."""
    return sum(nbytes(dtype, shape) for name, (dtype, shape) in layout.tensors.items() if plan.owner(name) is None)


def _peak(plan: Plan, layout: Layout) -> int:
    """The most memory that is in use: a matrix in its new form and a block of its codes, or pieces that are copied."""
    # to count zeros every matrix is read before anything is written
    held, peak = LOADED if plan.to == "bitmask-w4" else _STARTED, 0
    for name in ordered(plan, layout):
        if name in plan.modules:
            module = plan.modules[name]
            block = min(module.rows * module.columns, max(BLOCK, module.columns))
            # what a block took does not all go back to the system before another tensor is copied
            held = max(held, LOADED + _TABLE[plan.to] + _HELD[plan.to] * block)
            peak = max(peak, held + _whole(plan, module, layout))
        else:
            # three pieces are there at a time: read, handed over, and the one before
            peak = max(peak, held + 3 * min(CHUNK, nbytes(*layout.tensors[name])))
    return peak


def _whole(plan: Plan, module: Module, layout: Layout) -> int:
    """What a matrix holds all the while: its scales and zero points, and what it becomes."""
    written = sum(spec.nbytes for spec in _written(plan, module, layout) if spec.name.rpartition(".")[2] not in SHARED)
    zeros = 0 if module.symmetric else module.rows * module.columns // module.group
    return written + zeros + nbytes(*layout.tensors[module.tensor("weight_scale")])


def estimate(to: Form, layout: Layout) -> Estimate:
    """What a run writes and takes. Records of the bitmask form are taken for half full where nothing foretells them."""
    plan = draw_up(to, layout)
    if plan.form == plan.to:
        return linked(layout, plan)
    guessed = plan.to == "bitmask-w4" and plan.kept is None
    if guessed:
        plan = replace(plan, kept=0.5)
    tensors = {spec.name: (spec.dtype, spec.shape) for spec in specs(plan, layout)}
    written = sum(nbytes(*spec) for spec in tensors.values())
    read = sum(nbytes(dtype, shape) for dtype, shape in layout.tensors.values())
    codes = sum(module.rows * module.columns for module in plan.modules.values())
    stated = {**layout.config, **config(plan, layout.config)}
    details: dict[str, Any] = {"from": plan.form, "matrices": len(plan.modules)}
    if plan.kept is not None:
        details["kept"] = "half a record, unless counting finds more" if guessed else plan.kept
    return Estimate(
        layout=Layout(tensors, {key: value for key, value in stated.items() if value is not None}),
        output_bytes=written,
        peak_host_bytes=_peak(plan, layout),
        peak_device_bytes=0,
        flops=0,
        bytes_moved=read + written + (_READ[plan.form] + _MADE[plan.to]) * codes,
        details=details,
    )


def linked(layout: Layout, plan: Plan) -> Estimate:
    """A source that is in the form already: its weight files are linked, or copied where they cannot be."""
    total = sum(nbytes(dtype, shape) for dtype, shape in layout.tensors.values())
    details = {"from": plan.form, "matrices": len(plan.modules), "weights": "in that form already, linked"}
    return Estimate(
        layout=layout,
        output_bytes=total,
        peak_host_bytes=_STARTED,
        peak_device_bytes=0,
        flops=0,
        bytes_moved=0,
        details=details,
    )
