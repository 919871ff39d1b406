"""The matrices of a checkpoint's layers by kind, the zeros in them, and what its parts take on disk.

Sizes come from headers alone. Zeros are counted in the bytes, a piece at a time, without torch where codes have 4 bits.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from rewright.formats.bitmask import BITS as BITMASK_BITS
from rewright.formats.checkpoint import Checkpoint
from rewright.formats.dtypes import BITS
from rewright.formats.layout import TensorSpec
from rewright.formats.packing import MARKS, parse
from rewright.passes.errors import InputError
from rewright.passes.kinds import LAYER_KINDS, kind_of

# What stands in a file for the weight of one packed module, and the part that it is of what a model takes.
_PARTS = {
    "weight_packed": "codes",
    "weight_mask": "masks",
    "weight": "codes",
    "weight_scale": "scales",
    "weight_zero_point": "scales",
    "weight_shape": "scales",
}
_MARKS = tuple(MARKS.values())
PARTS = ("codes", "masks", "scales", "dense", "embedding", "head", "rest")
_FUSED = re.compile(r"experts\.\w+_proj$")
_PIECE = 1 << 24


def packed_module(source: Checkpoint, name: str) -> str | None:
    """The packed module that a stored tensor is a part of, by its name; None for any other tensor."""
    module, _, leaf = name.rpartition(".")
    return module if leaf in _PARTS and any(f"{module}.{mark}" in source.entries for mark in _MARKS) else None


def takes(source: Checkpoint) -> dict[str, int]:
    """Bytes by part; together they are those of all tensors. Matrices of layers that are not packed are `dense`."""
    found = dict.fromkeys(PARTS, 0)
    for name, entry in source.entries.items():
        kind = kind_of(name)
        if packed_module(source, name) is not None:
            part = _PARTS[name.rpartition(".")[2]]
        elif kind in LAYER_KINDS and _dense(source, name):
            part = "dense"
        else:
            part = kind if kind in ("embedding", "head") else "rest"
        found[part] += entry.nbytes
    return found


def _dense(source: Checkpoint, name: str) -> bool:
    """Whether a stored tensor holds the weights of a matrix, or of all experts' matrices, as they are."""
    axes = len(source.entries[name].shape)
    return (name.endswith(".weight") and axes == 2) or (axes == 3 and _FUSED.search(name) is not None)


def by_kind(source: Checkpoint, count: bool) -> dict[str, Any]:
    """For each name that matrices of layers have (`q_proj`, ...): how many there are, weights, bytes, bits, zeros.

    `zeros` and `sparsity` are None where they were not counted, or cannot be. Raises InputError or FormatError for a
    packed matrix that cannot be read.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, weights, stored in _matrices(source):
        module = name.removesuffix(".weight")
        leaf = next(part for part in reversed(module.split(".")) if not part.isdecimal())
        kind = found.setdefault(leaf, {"matrices": 0, "weights": 0, "bytes": 0, "zeros": 0 if count else None})
        kind["matrices"] += 1
        kind["weights"] += weights
        kind["bytes"] += stored
        if kind["zeros"] is not None:
            zeros = _zeros(source, name, weights)
            kind["zeros"] = None if zeros is None else kind["zeros"] + zeros
    if found:
        found["all"] = {key: _total(found, key) for key in ("matrices", "weights", "bytes", "zeros")}
    for kind in found.values():
        known = kind["weights"] and kind["zeros"] is not None
        kind["sparsity"] = kind["zeros"] / kind["weights"] if known else None
        kind["bits_per_weight"] = 8 * kind["bytes"] / kind["weights"] if kind["weights"] else None
    return found


def _total(found: dict[str, dict[str, Any]], key: str) -> int | None:
    values = [kind[key] for kind in found.values()]
    return None if None in values else sum(values)


def _matrices(source: Checkpoint) -> Iterator[tuple[str, int, int]]:
    """The name that a dense file would give each matrix of a layer, its weights, and the bytes that it takes here."""
    for name, entry in source.entries.items():
        module, _, leaf = name.rpartition(".")
        if kind_of(name) not in LAYER_KINDS:
            continue
        if leaf in _MARKS:
            parts = [source.entries.get(f"{module}.{part}") for part in _PARTS]
            yield f"{module}.weight", packed_weights(source, module), sum(part.nbytes for part in parts if part)
        elif _dense(source, name) and packed_module(source, name) is None:
            yield name, math.prod(entry.shape), entry.nbytes


def packed_weights(source: Checkpoint, module: str) -> int:
    """How many weights a packed module stands for: by its `weight_shape`, else by what its codes would make."""
    shape = packed_shape(source, module)
    if shape is None:
        mark = next(f"{module}.{mark}" for mark in _MARKS if f"{module}.{mark}" in source.entries)
        shape = source.entries[mark].shape
    return math.prod(shape)


def packed_shape(source: Checkpoint, module: str) -> tuple[int, ...] | None:
    """The shape a packed matrix has when decoded, from its `weight_shape`; None where that is not stored."""
    entry = source.entries.get(f"{module}.weight_shape")
    if entry is None or entry.dtype not in ("I64", "I32") or entry.nbytes > 64:
        return None
    data, width = b"".join(source.chunks(entry.name)), 8 if entry.dtype == "I64" else 4
    return tuple(int.from_bytes(data[i : i + width], "little", signed=True) for i in range(0, len(data), width))


def check_spec(spec: TensorSpec, dtype: str, shape: Sequence[int], matrix: Sequence[int]) -> None:
    """Raise InputError for a stored tensor that is not what a matrix (rows, columns) has there."""
    if dtype != spec.dtype or tuple(shape) != spec.shape:
        raise InputError(
            f"tensor `{spec.name}` is {dtype} {list(shape)},"
            f" and a matrix of {matrix[0]} rows and {matrix[1]} columns has {spec.dtype} {list(spec.shape)} there"
        )


def to_count(source: Checkpoint) -> int:
    """The bytes that counting zeros would read, or little more."""
    return sum(stored for _, _, stored in _matrices(source))


def _zeros(source: Checkpoint, name: str, weights: int) -> int | None:
    """Zeros among the weights of a matrix, by the name that a dense file gives it; None for a dtype of under 8 bits."""
    module = name.removesuffix(".weight")
    if f"{module}.weight_mask" in source.entries:
        return weights - _codes_in(source, name)
    if f"{module}.weight_packed" not in source.entries:
        bits = BITS[source.entries[name].dtype]
        return None if bits < 8 else weights - _numbers_in(source, name, bits)
    packing = parse(source.config or {})
    record = packing.of(module) if packing is not None else None
    if record is None:
        return None
    columns = (packed_shape(source, module) or (0, 0))[-1]
    if record.bits == BITMASK_BITS and record.symmetric and columns % 8 == 0:
        return weights - _codes_in(source, f"{module}.weight_packed")
    from rewright.passes.packed_tensors import read_packed

    held = read_packed(source, module, record)
    codes, zero = held.codes().view(held.shape[0], -1, held.group_size), held.zero()
    return int((codes == (0 if zero is None else zero[:, :, None])).sum())


def _numbers_in(source: Checkpoint, name: str, bits: int) -> int:
    """Elements of a tensor that are not zero, whatever the sign of a zero."""
    import numpy as np

    signed = source.entries[name].dtype not in ("U8", "U16", "U32", "U64", "BOOL")
    found = 0
    for piece in source.chunks(name, _PIECE):
        numbers = np.frombuffer(piece, f"<u{bits // 8}")
        found += int(np.count_nonzero(numbers << 1 if signed else numbers))
    return found


def _codes_in(source: Checkpoint, name: str) -> int:
    """4-bit codes that are not zero, two a byte and each stored plus 8."""
    import numpy as np

    found = 0
    for piece in source.chunks(name, _PIECE):
        pairs = np.frombuffer(piece, "u1") ^ 0x88
        found += int(np.count_nonzero(pairs & 0x0F)) + int(np.count_nonzero(pairs & 0xF0))
    return found
