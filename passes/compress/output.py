"""What `compress` writes: tensors of the result, and their rows in the report."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from rewright.formats.checkpoint import Checkpoint
from rewright.formats.draft import Draft
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


def settle(plan: Plan, source: Checkpoint) -> Plan:
    """The plan with a head that its config calls tied, but whose stored copy differs, written like any tensor."""
    head = plan.family.head
    if head not in source.entries or plan.names[head] is not None:
        return plan
    embedding = next(name for name in plan.family.spellings(plan.family.embedding) if name in source.entries)
    if torch.equal(source.read(head), source.read(embedding)):
        return plan
    return replace(plan, names={**plan.names, head: head})


def left_dense(plan: Plan, assembly: Assembly) -> list[str]:
    """Linear modules that are not compressed, under the names they have in a running model and on disk.

    Readers take every other linear module for packed, and fill what they do not find with noise.
    """
    running = {path for path, module in assembly.model.named_modules() if is_linear(module)}
    packed = {matrix.module for matrix in plan.matrices}
    return sorted((running | {plan.family.head.removesuffix(".weight"), *plan.skipped}) - packed)


def copy_rest(context: Context, plan: Plan, source: Checkpoint, draft: Draft) -> None:
    """Every tensor that is not compressed, bit for bit; those of ordinary float dtypes must be finite."""
    if "rest" in context.journal.done:
        return
    planned = {matrix.name for matrix in plan.matrices}
    for name, entry in source.entries.items():
        if name in planned:
            continue
        if entry.dtype in FLOATS:
            read_finite(source, name)
        written = plan.names[name]
        if written is not None:
            draft.copy(written, source, name)
    draft.sync()
    context.journal.record("rest", {})


def write(draft: Draft, matrix: Matrix, result: Solved, options: CompressOptions) -> dict[str, Any]:
    """Write a compressed matrix; returns its row of the report.

    `proxy_loss` is the sum of the sweep's e^2: how much the squared output error of a token rises, in the mean, for
    the damped Hessian.
    """
    row: dict[str, Any] = {
        "name": matrix.name,
        "layer": matrix.layer,
        "rows": matrix.rows,
        "columns": matrix.columns,
        "bits": options.bits,
        "group_size": None if options.bits == 16 else matrix.group or "channel",
        "zeros": int((result.weight == 0).sum()),
        "proxy_loss": None if result.loss is None else 2 * float(result.loss.sum(dtype=torch.float64)),
    }
    row["sparsity"] = row["zeros"] / (matrix.rows * matrix.columns)
    if options.packs:
        row["bytes"] = _write_packed(draft, matrix, result, options)
    else:
        draft.write(matrix.written, matrix.turned(result.weight).to(to_torch(matrix.dtype)).cpu())
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
        return draft.read(matrix.written).to(dtype)
    return read_packed(draft, matrix.module, scheme_of(matrix, options), dtype)
