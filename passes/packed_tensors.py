"""A matrix of codes as a file holds it, in either packed form, checked before anything is made of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from rewright.formats.bitmask import Bitmask
from rewright.formats.compressed_tensors import Scheme, is_expert
from rewright.formats.dtypes import from_torch
from rewright.formats.packing import Record, specs
from rewright.kernels.bitmask import counts, unpack_bitmask
from rewright.kernels.pack import WIDTHS, unpack
from rewright.passes.errors import InputError
from rewright.passes.matrices import check_spec

Kind = Literal["pack-quantized", "bitmask-w4"]


class Reads(Protocol):
    """Whatever gives tensors by name: a checkpoint, or a draft."""

    def read(self, name: str) -> torch.Tensor: ...


def decode(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Weights from codes, as plain transformers decodes them when it loads a model in `dtype`.

    `codes` int8 (rows, columns), `scale` (rows, groups) in its stored dtype, `zero` int8 (rows, groups) or None.
    The difference and the product are taken in `dtype`. Returns (rows, columns) in `dtype`.
    """
    group = codes.shape[1] // scale.shape[1]
    signed = codes.to(dtype)
    if zero is not None:
        signed = signed - zero.to(dtype).repeat_interleave(group, dim=1)
    return signed * scale.to(dtype).repeat_interleave(group, dim=1)


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """The stored tensors of a quantised matrix of `shape` (rows, columns), by the last word of their names.

    `pack-quantized` has `weight_packed` and, asymmetric, `weight_zero_point`; `bitmask-w4` has `weight_mask` and
    `weight`; both have `weight_scale` (rows, groups) and `weight_shape`. `group_size` columns share a scale.
    """

    module: str
    kind: Kind
    bits: int
    group_size: int
    shape: tuple[int, int]
    tensors: Mapping[str, torch.Tensor]

    @property
    def scale(self) -> torch.Tensor:
        """Scales (rows, groups) in their stored dtype."""
        return self.tensors["weight_scale"]

    def codes(self) -> torch.Tensor:
        """Signed codes, int8 (rows, columns)."""
        if self.kind == "bitmask-w4":
            return unpack_bitmask(self.tensors["weight_mask"], self.tensors["weight"])
        return unpack(self.tensors["weight_packed"], self.bits, self.shape[1])

    def zero(self) -> torch.Tensor | None:
        """Zero points, int8 (rows, groups), or None."""
        packed = self.tensors.get("weight_zero_point")
        return None if packed is None else unpack_zero(packed, self.bits, self.shape[0])

    def decode(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight (rows, columns) in `dtype`."""
        return decode_module(self.module, self.codes(), self.scale, self.zero(), dtype)


def decode_module(
    module: str, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """`decode`, but plain transformers decodes experts in the dtype of their scales, and so does this."""
    return decode(codes, scale, zero, scale.dtype if is_expert(module) else dtype).to(dtype)


def unpack_zero(packed: torch.Tensor, bits: int, rows: int) -> torch.Tensor:
    """Zero points, int8 (rows, groups), from a stored `weight_zero_point`, which is packed along the rows."""
    return unpack(packed.t().contiguous(), bits, rows).t().contiguous()


def read_packed(held: Reads, module: str, record: Record) -> PackedWeight:
    """The stored tensors of a module in either form. Raises InputError or FormatError for what they cannot be."""
    if isinstance(record, Scheme) and record.bits not in WIDTHS:
        raise InputError(f"`{module}` has codes of {record.bits} bits, and those of 2, 3, 4 and 8 are read")
    shape = stored_shape(held.read(f"{module}.weight_shape"), module)
    scale = held.read(f"{module}.weight_scale")
    code = from_torch(scale.dtype)
    tensors = {"weight_scale": scale}
    for spec in specs(module, shape, record, code):
        leaf = spec.name.removeprefix(f"{module}.")
        if leaf == "weight_shape":
            continue
        found = tensors.get(leaf)
        found = tensors[leaf] = held.read(spec.name) if found is None else found
        check_spec(spec, from_torch(found.dtype), found.shape, shape)
    kind: Kind = "pack-quantized"
    if isinstance(record, Bitmask):
        kind = "bitmask-w4"
        check_mask(tensors["weight_mask"], record.nnz, module)
    return PackedWeight(module, kind, record.bits, record.group_size or shape[1], shape, tensors)


def stored_shape(said: torch.Tensor, module: str) -> tuple[int, int]:
    """The rows and columns that a `weight_shape` says. Raises InputError for one that says none."""
    numbers = said.flatten().tolist() if said.numel() == 2 and not said.is_floating_point() else []
    if len(numbers) != 2 or min(numbers) < 0:
        raise InputError(f"tensor `{module}.weight_shape` does not give rows and columns")
    return int(numbers[0]), int(numbers[1])


def check_mask(mask: torch.Tensor, nnz: int, module: str, first: int = 0) -> None:
    """Raise InputError naming the first group of a mask, of rows from `first` on, that keeps another number."""
    kept = counts(mask)
    wrong = (kept != nnz).nonzero()
    if len(wrong):
        row, group = wrong[0].tolist()
        raise InputError(
            f"tensor `{module}.weight_mask` keeps {int(kept[row, group])} weights in group {group}"
            f" of row {first + row}, and every group has {nnz}"
        )
