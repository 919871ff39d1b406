"""What `compress` writes: tensors of the result, and their rows in the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from rewright.formats.checkpoint import Checkpoint
from rewright.formats.draft import Draft, TensorSpec
from rewright.formats.dtypes import nbytes, to_torch
from rewright.kernels.pack import pack
from rewright.passes.compress.plan import Matrix, Plan, scheme_of
from rewright.passes.compress.solve import Solved
from rewright.passes.errors import InputError
from rewright.passes.loading import Assembly, read_packed
from rewright.passes.walk import is_linear

if TYPE_CHECKING:
    from rewright.passes.compress.spec import CompressOptions
    from rewright.passes.context import Context

FLOATS = ("F64", "F32", "BF16", "F16")


def read_finite(source: Checkpoint, name: str) -> torch.Tensor:
    """A tensor of the source. Raises InputError naming it when a value is not finite."""
    tensor = source.read(name)
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise InputError(f"tensor `{name}` holds values that are not finite")
    return tensor


def settle_aliases(plan: Plan, source: Checkpoint) -> dict[str, str]:
    """The tied names that really are one tensor: two copies with other bytes both stay."""
    return {
        alias: name
        for alias, name in plan.aliases.items()
        if name not in source.entries or torch.equal(source.read(alias), source.read(name))
    }


def specs(plan: Plan, source: Checkpoint, aliases: Mapping[str, str]) -> tuple[TensorSpec, ...]:
    """The result's tensors: as planned, with a head that turned out not to be tied."""
    apart = [name for name in plan.aliases if name not in aliases]
    kept = [TensorSpec(name, source.entries[name].dtype, source.entries[name].shape) for name in apart]
    return (*plan.specs, *kept)


def left_dense(plan: Plan, source: Checkpoint) -> list[str]:
    """Linear modules that are not compressed, under the names they have in a running model and on disk.

    Readers take every other linear module for packed, and fill what they do not find with noise.
    """
    assembly = Assembly(source, torch.float32, torch.device("meta"))
    running = {path for path, module in assembly.model.named_modules() if is_linear(module)}
    packed = {spelled for matrix in plan.matrices for spelled in plan.family.spellings(matrix.module)}
    return sorted((running | {plan.family.head.removesuffix(".weight"), *plan.skipped}) - packed)


def copy_rest(context: Context, plan: Plan, source: Checkpoint, draft: Draft, aliases: Mapping[str, str]) -> None:
    """Every tensor that is not compressed, bit for bit; those of ordinary float dtypes must be finite."""
    if "rest" in context.journal.done:
        return
    planned = {matrix.name for matrix in plan.matrices}
    for name, entry in source.entries.items():
        if name in planned:
            continue
        if entry.dtype in FLOATS:
            read_finite(source, name)
        if name not in aliases:
            draft.copy(name, source)
        elif aliases[name] not in source.entries:
            draft.copy(aliases[name], source, name)
    draft.sync()
    context.journal.record("rest", {})


def write(draft: Draft, matrix: Matrix, result: Solved, options: CompressOptions) -> dict[str, Any]:
    """Write a compressed matrix; returns its row of the report."""
    row: dict[str, Any] = {
        "name": matrix.name,
        "layer": matrix.layer,
        "rows": matrix.rows,
        "columns": matrix.columns,
        "bits": options.bits,
        "group_size": None if options.bits == 16 else matrix.group or "channel",
        "zeros": int((result.weight == 0).sum()),
        "proxy_loss": None if result.loss is None else float(result.loss.sum(dtype=torch.float64)),
    }
    row["sparsity"] = row["zeros"] / (matrix.rows * matrix.columns)
    if options.packs:
        row["bytes"] = _write_packed(draft, matrix, result, options)
    else:
        draft.write(matrix.name, matrix.turned(result.weight).to(to_torch(matrix.dtype)).cpu())
        row["bytes"] = nbytes(matrix.dtype, (matrix.rows, matrix.columns))
    return row


def _write_packed(draft: Draft, matrix: Matrix, result: Solved, options: CompressOptions) -> int:
    """The tensors of one packed matrix; returns their bytes."""
    assert result.codes is not None
    assert result.scale is not None
    parts = {
        "weight_packed": pack(result.codes, options.bits),
        "weight_scale": result.scale,
        "weight_shape": torch.tensor([matrix.rows, matrix.columns], dtype=torch.int64),
    }
    if result.zero is not None:
        parts["weight_zero_point"] = pack(result.zero.t().contiguous(), options.bits).t().contiguous()
    for leaf, tensor in parts.items():
        draft.write(f"{matrix.module}.{leaf}", tensor.cpu())
    return sum(tensor.numel() * tensor.element_size() for tensor in parts.values())


def read_back(draft: Draft, matrix: Matrix, options: CompressOptions, dtype: torch.dtype) -> torch.Tensor:
    """A written matrix as whoever loads the result will have it, in `dtype` and the stored orientation.

    The walk goes on with this and not with what the solver held, so that a resumed run sees the same weights.
    """
    if not options.packs:
        return draft.read(matrix.name).to(dtype)
    return read_packed(draft, matrix.module, scheme_of(matrix, options), dtype)
