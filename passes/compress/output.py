"""What `compress` writes: tensors of the result, and their rows in the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from rewright.formats.checkpoint import Checkpoint
from rewright.formats.compressed_tensors import Scheme
from rewright.formats.draft import Draft
from rewright.formats.dtypes import FLOATS, nbytes, to_torch
from rewright.formats.packing import Record
from rewright.kernels.bitmask import fits, pack_bitmask
from rewright.kernels.pack import pack
from rewright.passes.compress.fit import Fitted
from rewright.passes.compress.plan import Matrix, Plan, scheme_of
from rewright.passes.compress.solve import Solved
from rewright.passes.errors import InputError
from rewright.passes.finite import all_finite
from rewright.passes.loading import Assembly
from rewright.passes.models.linears import is_linear
from rewright.passes.packed_tensors import read_packed

if TYPE_CHECKING:
    from rewright.passes.compress.spec import CompressOptions
    from rewright.passes.context import Context


def read_matrix(source: Checkpoint, matrix: Matrix) -> torch.Tensor:
    """A matrix of the source in the stored orientation. Raises InputError naming it when a value is not finite."""
    if matrix.is_cut:
        return _finite(source.read_rows(matrix.tensor, matrix.first, matrix.first + matrix.rows), matrix.name)
    if matrix.part is None:
        return read_finite(source, matrix.name)
    found = source.read_rows(matrix.tensor, matrix.part, matrix.part + 1)[0]
    return _finite(found, matrix.name)


def read_finite(source: Checkpoint, name: str) -> torch.Tensor:
    """A tensor of the source. Raises InputError naming it when a value is not finite."""
    return _finite(source.read(name), name)


def _finite(tensor: torch.Tensor, name: str) -> torch.Tensor:
    if tensor.is_floating_point() and not all_finite(tensor):
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
    source, family = assembly.weights.source, plan.family
    # a router is no linear module to transformers, but it is one to servers
    stored = {
        (plan.names[name] or name).removesuffix(".weight")
        for name, entry in source.entries.items()
        if name.endswith(".weight") and len(entry.shape) == 2 and family.layer_of(name) is not None
    }
    packed = {matrix.module for matrix in plan.matrices if matrix.quantised}
    return sorted((running | stored | {family.head.removesuffix(".weight"), *plan.skipped}) - packed)


def copy_rest(context: Context, plan: Plan, source: Checkpoint, draft: Draft) -> None:
    """Every tensor that is not compressed, bit for bit; those of ordinary float dtypes must be finite."""
    if "rest" in context.journal.done:
        return
    planned = {matrix.tensor for matrix in plan.matrices}
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


def write(draft: Draft, fitted: Fitted, options: CompressOptions) -> dict[str, Any]:
    """Write a compressed matrix, or some rows of one; what its row of the report takes from them."""
    matrix, result = fitted.matrix, fitted.solved
    part: dict[str, Any] = {
        "name": matrix.name,
        "zeros": int((result.weight == 0).sum()),
        "clip": _clip(fitted),
        "damp": fitted.damp,
    }
    scheme = scheme_of(matrix, options)
    if scheme is not None:
        part["bytes"] = _write_packed(draft, matrix, result, scheme)
    else:
        held = matrix.turned(result.weight).to(to_torch(matrix.dtype)).cpu()
        draft.write(matrix.target, held, matrix.part, rows=matrix.first if matrix.is_cut else None)
        part["bytes"] = nbytes(matrix.dtype, (matrix.rows, matrix.columns))
    return part


def row(matrix: Matrix, parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A matrix's row of the report as far as what was written tells it, from those of its parts in their order."""
    zeros, clips = sum(part["zeros"] for part in parts), [part["clip"] for part in parts if part["clip"]]
    groups = sum(count for _, count in clips)
    return {
        "name": matrix.name,
        "layer": matrix.layer,
        "rows": matrix.rows,
        "columns": matrix.columns,
        "bits": matrix.bits,
        "group_size": (matrix.group or "channel") if matrix.quantised else None,
        "zeros": zeros,
        "clip": sum(total for total, _ in clips) / groups if groups else None,
        "damp": parts[0]["damp"],
        "sparsity": zeros / (matrix.rows * matrix.columns),
        "bytes": sum(part["bytes"] for part in parts),
    }


def _clip(fitted: Fitted) -> tuple[float, int] | None:
    """The grid's range as a share of that of the weights that were asked for: the sum over groups, and how many."""
    scale, keep = fitted.solved.scale, fitted.solved.keep
    if scale is None:
        return None
    wanted = fitted.wanted if keep is None else fitted.wanted * keep
    parts = wanted.view(len(scale), scale.shape[1], -1)
    if fitted.solved.zero is None:
        span = 2 * parts.abs().amax(dim=2)
    else:
        span = parts.amax(dim=2).clamp(min=0) - parts.amin(dim=2).clamp(max=0)
    there = span > 0
    shares = scale.float() * ((1 << fitted.matrix.bits) - 1) / torch.where(there, span, 1.0)
    return float(shares[there].sum(dtype=torch.float64)), int(there.sum())


def _write_packed(draft: Draft, matrix: Matrix, result: Solved, scheme: Record) -> int:
    """The tensors of one packed matrix, or some of their rows; returns their bytes."""
    assert result.codes is not None
    assert result.scale is not None
    tensors = {**_packed_codes(result.codes, scheme, matrix.name), "weight_scale": result.scale}
    if result.zero is not None and isinstance(scheme, Scheme):
        tensors["weight_zero_point"] = pack(result.zero.t().contiguous(), scheme.bits).t().contiguous()
    for leaf, tensor in tensors.items():
        first = matrix.first
        if leaf == "weight_zero_point":
            # packed along the rows; a part begins where a word does
            first = first * matrix.bits // 32
        draft.write(f"{matrix.module}.{leaf}", tensor.cpu(), rows=first if matrix.is_cut else None)
    written = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if matrix.first:
        return written
    shape = torch.tensor([matrix.height, matrix.columns], dtype=torch.int64)
    draft.write(f"{matrix.module}.weight_shape", shape)
    return written + shape.nbytes


def _packed_codes(codes: torch.Tensor, scheme: Record, name: str) -> dict[str, torch.Tensor]:
    if isinstance(scheme, Scheme):
        return {"weight_packed": pack(codes, scheme.bits)}
    if not fits(codes, scheme.group_size, scheme.nnz):
        raise ValueError(f"`{name}` has more than {scheme.nnz} codes that are not 0 in {scheme.group_size} columns")
    mask, values = pack_bitmask(codes, scheme.group_size, scheme.nnz)
    return {"weight_mask": mask, "weight": values}


def read_back(draft: Draft, matrix: Matrix, options: CompressOptions, dtype: torch.dtype) -> torch.Tensor:
    """A written matrix as whoever loads the result will have it, in `dtype` and the stored orientation.

    The walk goes on with this and not with what the solver held, so that a resumed run sees the same weights.
    """
    scheme = scheme_of(matrix, options)
    if scheme is None:
        return draft.read(matrix.target, matrix.part).to(dtype)
    return read_packed(draft, matrix.module, scheme).decode(dtype)
