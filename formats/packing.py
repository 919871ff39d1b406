"""Either packed form, `pack-quantized` or `bitmask-w4`, by what a config says or a matrix is to be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rewright.formats import bitmask, compressed_tensors
from rewright.formats.bitmask import Bitmask, BitmaskQuantization
from rewright.formats.compressed_tensors import Quantization, Scheme
from rewright.formats.layout import TensorSpec

Record = Scheme | Bitmask

# The tensor of a module by which each form is known, and all that a module may have.
MARKS = {compressed_tensors.PACKED: "weight_packed", bitmask.FORM: "weight_mask"}
SUFFIXES = {compressed_tensors.PACKED: compressed_tensors.SUFFIXES, bitmask.FORM: bitmask.SUFFIXES}


@dataclass(frozen=True, slots=True)
class Packing:
    """A `quantization_config` of either form; `ignore` are the modules that it says are dense, or their patterns."""

    form: str
    ignore: tuple[str, ...]
    stated: Quantization | BitmaskQuantization

    @property
    def mark(self) -> str:
        """The tensor by which a packed module is known."""
        return MARKS[self.form]

    def of(self, module: str) -> Record | None:
        """How a linear module of that full name is packed, None when it is dense."""
        if isinstance(self.stated, BitmaskQuantization):
            return self.stated.of(module)
        return self.stated.scheme_of(module)


def parse(config: Mapping[str, Any]) -> Packing | None:
    """Read a model's config.json; None when it is not quantised. Raises FormatError as the forms' own readers do."""
    masks = bitmask.parse(config)
    if masks is not None:
        return Packing(bitmask.FORM, masks.ignore, masks)
    stated = compressed_tensors.parse(config)
    return None if stated is None else Packing(compressed_tensors.PACKED, stated.ignore, stated)


def specs(module: str, shape: Sequence[int], record: Record, scale_dtype: str) -> list[TensorSpec]:
    """What stands in a file for `<module>.weight` of `shape` (O, I). Raises FormatError as the forms' own do."""
    if isinstance(record, Bitmask):
        return bitmask.bitmask_specs(module, shape, record, scale_dtype)
    return compressed_tensors.packed_specs(module, shape, record, scale_dtype)


def quantization_config(records: Mapping[str, Record], ignore: Iterable[str]) -> dict[str, Any]:
    """The value of config.json's `quantization_config` for modules that are all packed in one form."""
    schemes = {module: record for module, record in records.items() if isinstance(record, Scheme)}
    if schemes:
        return compressed_tensors.quantization_config(schemes, ignore)
    masks = {module: record for module, record in records.items() if isinstance(record, Bitmask)}
    return bitmask.quantization_config(masks, ignore)
