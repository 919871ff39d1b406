"""Codes of packed matrices, a block of rows at a time, and what each form makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from rewright.formats.checkpoint import Checkpoint
from rewright.formats.dtypes import to_torch
from rewright.kernels.bitmask import pack_bitmask, unpack_bitmask
from rewright.kernels.pack import pack, unpack
from rewright.passes.convert.output import BLOCK
from rewright.passes.convert.plan import Module, Plan
from rewright.passes.errors import InputError
from rewright.passes.finite import all_finite
from rewright.passes.packed_tensors import check_mask, decode_module, unpack_zero

# What a block of codes becomes, by the name of the tensor it goes to.
Turn = Callable[[torch.Tensor, int, int], dict[str, torch.Tensor]]


class Reader:
    """One packed matrix of the source. Raises InputError, when made, for scales that are not finite."""

    def __init__(self, source: Checkpoint, module: Module) -> None:
        self.source, self.module = source, module
        self.scale = source.read(module.tensor("weight_scale"))
        if not all_finite(self.scale):
            raise InputError(f"tensor `{module.tensor('weight_scale')}` holds values that are not finite")
        self.zero: torch.Tensor | None = None
        if not module.symmetric:
            self.zero = unpack_zero(source.read(module.tensor("weight_zero_point")), module.bits, module.rows)

    def blocks(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Rows [start, stop) and their codes, int8 (rows, columns); from first to last."""
        step = max(1, BLOCK // max(1, self.module.columns))
        for start in range(0, self.module.rows, step):
            stop = min(start + step, self.module.rows)
            yield start, stop, self._codes(start, stop)

    def _codes(self, start: int, stop: int) -> torch.Tensor:
        module = self.module
        if module.nnz is None:
            packed = self.source.read_rows(module.tensor("weight_packed"), start, stop)
            return unpack(packed, module.bits, module.columns)
        mask = self.source.read_rows(module.tensor("weight_mask"), start, stop)
        check_mask(mask, module.nnz, module.name, start)
        return unpack_bitmask(mask, self.source.read_rows(module.tensor("weight"), start, stop))

    def zeros(self, codes: torch.Tensor, start: int, stop: int) -> int:
        """How many of a block's codes stand for a weight of zero."""
        if self.zero is None:
            return codes.numel() - int(torch.count_nonzero(codes))
        grouped = codes.view(stop - start, -1, self.module.group)
        return int((grouped == self.zero[start:stop, :, None]).sum())

    def decode(self, codes: torch.Tensor, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """A block's weights in `dtype`, as plain transformers decodes them."""
        zero = self.zero[start:stop] if self.zero is not None else None
        return decode_module(self.module.name, codes, self.scale[start:stop], zero, dtype)


def most(reader: Reader) -> tuple[int, int, int]:
    """Of the records of a matrix: the most codes that are not zero in one, those in all, records that have any."""
    largest, total, filled = 0, 0, 0
    for start, stop, codes in reader.blocks():
        found = codes.view(stop - start, -1, reader.module.group).count_nonzero(dim=2)
        largest = max(largest, int(found.max()))
        total += int(found.sum())
        filled += int(found.count_nonzero())
    return largest, total, filled


def converted(plan: Plan, reader: Reader) -> tuple[dict[str, torch.Tensor], int]:
    """The tensors of a matrix in the target form that its source does not have, by leaf; and its zero weights.

    Raises InputError for weights that are not finite in the dtype they are decoded in.
    """
    turn = _turn(plan, reader)
    whole: dict[str, torch.Tensor] = {}
    zeros = 0
    for start, stop, codes in reader.blocks():
        zeros += reader.zeros(codes, start, stop)
        for leaf, part in turn(codes, start, stop).items():
            if leaf not in whole:
                whole[leaf] = part.new_empty((reader.module.rows, *part.shape[1:]))
            whole[leaf][start:stop] = part
    return whole, zeros


def _turn(plan: Plan, reader: Reader) -> Turn:
    module = reader.module
    if plan.to == "pack-quantized":
        return lambda codes, start, stop: {"weight_packed": pack(codes, module.bits)}
    if plan.to == "bitmask-w4":
        nnz = plan.bitmask_of(module).nnz

        def masked(codes: torch.Tensor, start: int, stop: int) -> dict[str, torch.Tensor]:
            mask, values = pack_bitmask(codes, module.group, nnz)
            return {"weight_mask": mask, "weight": values}

        return masked
    dtype = to_torch(plan.dtype)
    assert dtype is not None

    def dense(codes: torch.Tensor, start: int, stop: int) -> dict[str, torch.Tensor]:
        weight = reader.decode(codes, start, stop, dtype)
        if not all_finite(weight):
            raise InputError(f"`{module.name}` decodes to values past what {dtype} can hold")
        return {"weight": weight}

    return dense
