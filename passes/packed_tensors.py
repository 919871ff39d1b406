"""A matrix of codes as a file holds it, in either packed form, checked before anything is made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from rewright.formats.bitmask import BITS, Bitmask, bitmask_specs
from rewright.formats.compressed_tensors import Scheme, is_expert, packed_specs
from rewright.formats.dtypes import from_torch
from rewright.formats.layout import TensorSpec
from rewright.kernels.bitmask import counts, unpack_bitmask
from rewright.kernels.pack import WIDTHS, unpack
from rewright.passes.errors import InputError

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
        return None if packed is None else unpack(packed.t().contiguous(), self.bits, self.shape[0]).t().contiguous()

    def decode(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight in `dtype`. Plain transformers decodes experts in the dtype of their scales, and so does this."""
        own = self.scale.dtype if is_expert(self.module) else dtype
        return decode(self.codes(), self.scale, self.zero(), own).to(dtype)


def read_packed(held: Reads, module: str, form: Scheme | Bitmask) -> PackedWeight:
    """The stored tensors of a module in either form. Raises InputError or FormatError for what they cannot be."""
    if isinstance(form, Scheme) and form.bits not in WIDTHS:
        raise InputError(f"`{module}` has codes of {form.bits} bits, and those of 2, 3, 4 and 8 are read")
    shape = stored_shape(held.read(f"{module}.weight_shape"), module)
    scale = held.read(f"{module}.weight_scale")
    code = from_torch(scale.dtype)
    if isinstance(form, Bitmask):
        specs = bitmask_specs(module, shape, form, code)
    else:
        specs = packed_specs(module, shape, form, code)
    tensors = {"weight_scale": scale}
    for spec in specs:
        leaf = spec.name.removeprefix(f"{module}.")
        if leaf == "weight_shape":
            continue
        found = tensors.get(leaf)
        found = tensors[leaf] = held.read(spec.name) if found is None else found
        check_spec(spec, from_torch(found.dtype), found.shape, shape)
    if not isinstance(form, Bitmask):
        return PackedWeight(module, "pack-quantized", form.bits, form.group_size or shape[1], shape, tensors)
    check_mask(tensors["weight_mask"], form.nnz, module)
    return PackedWeight(module, "bitmask-w4", BITS, form.group_size, shape, tensors)


def check_spec(spec: TensorSpec, dtype: str, shape: Sequence[int], matrix: Sequence[int]) -> None:
    """Raise InputError for a stored tensor that is not what a matrix (rows, columns) has there."""
    if dtype != spec.dtype or tuple(shape) != spec.shape:
        raise InputError(
            f"tensor `{spec.name}` is {dtype} {list(shape)},"
            f" and a matrix of {matrix[0]} rows and {matrix[1]} columns has {spec.dtype} {list(spec.shape)} there"
        )


def stored_shape(said: torch.Tensor, module: str) -> tuple[int, int]:
    """The rows and columns that a `weight_shape` says. Raises InputError for one that says none."""
    numbers = said.flatten().tolist() if said.numel() == 2 and not said.is_floating_point() else []
    if len(numbers) != 2 or min(numbers) < 0:
        raise InputError(f"tensor `{module}.weight_shape` does not give rows and columns")
    return int(numbers[0]), int(numbers[1])


def check_mask(mask: torch.Tensor, nnz: int, module: str) -> None:
    """Raise InputError naming the first group of a mask that keeps another number than `nnz`."""
    kept = counts(mask)
    wrong = (kept != nnz).nonzero()
    if len(wrong):
        row, group = wrong[0].tolist()
        raise InputError(
            f"tensor `{module}.weight_mask` keeps {int(kept[row, group])} weights in group {group} of row {row},"
            f" and every group has {nnz}"
        )
