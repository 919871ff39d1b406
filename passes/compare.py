"""How two checkpoints differ: config, tensors, bytes, and the files beside them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rewright.formats.checkpoint import Checkpoint, Entry
from rewright.formats.dtypes import to_torch

_BLOCK = 1 << 22  # elements of a tensor held at a time, of each side


def compare(a: Path, b: Path) -> dict[str, Any]:
    """Compare two checkpoints. Torch is imported only when tensors of one shape differ in bytes.

    `max_difference` is the largest absolute difference of two elements, `relative_difference` the norm of the
    difference over the norm of `a`, both in float64; None where shapes differ or torch cannot read the dtype, and
    infinity or NaN where an element is. Raises FormatError for a checkpoint that cannot be read.
    """
    one, other = Checkpoint.open(a), Checkpoint.open(b)
    config = dict(_config(one.config or {}, other.config or {}))
    tensors = _tensors(one, other)
    sidecars = dict(_sidecars(one, other))
    differs = config or sidecars or tensors["only_a"] or tensors["only_b"] or tensors["changed"]
    return {
        "a": str(a),
        "b": str(b),
        "equal": not differs,
        "bytes": {"a": one.total_bytes, "b": other.total_bytes},
        "config": config,
        "tensors": tensors,
        "sidecars": sidecars,
    }


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _config(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The keys that differ, nested ones joined by dots; a side that lacks the key has no entry of its own."""
    one, other = dict(_flat(a)), dict(_flat(b))
    for key in [*one, *(key for key in other if key not in one)]:
        sides = {side: flat[key] for side, flat in (("a", one), ("b", other)) if key in flat}
        if len(sides) == 1 or sides["a"] != sides["b"] or type(sides["a"]) is not type(sides["b"]):
            yield key, sides


def _tensors(a: Checkpoint, b: Checkpoint) -> dict[str, Any]:
    shared = [name for name in a.entries if name in b.entries]
    changed = [item for name in shared if (item := _change(a, b, name)) is not None]
    return {
        "only_a": [name for name in a.entries if name not in b.entries],
        "only_b": [name for name in b.entries if name not in a.entries],
        "changed": changed,
        "equal": len(shared) - len(changed),
    }


def _change(a: Checkpoint, b: Checkpoint, name: str) -> dict[str, Any] | None:
    one, other = a.entries[name], b.entries[name]
    same_kind = (one.dtype, one.shape) == (other.dtype, other.shape)
    if same_kind and all(x == y for x, y in zip(a.chunks(name), b.chunks(name), strict=True)):
        return None
    largest, relative = _distance(a, b, name) if one.shape == other.shape else (None, None)
    return {
        "name": name,
        "a": _described(one),
        "b": _described(other),
        "max_difference": largest,
        "relative_difference": relative,
    }


def _described(entry: Entry) -> str:
    return f"{entry.dtype} {list(entry.shape)}"


def _distance(a: Checkpoint, b: Checkpoint, name: str) -> tuple[float | None, float | None]:
    """The largest and the relative difference of two tensors of one shape, a block of rows at a time."""
    import torch

    entry = a.entries[name]
    if to_torch(entry.dtype) is None or to_torch(b.entries[name].dtype) is None:
        return None, None
    largest, squares, norm = 0.0, 0.0, 0.0
    for x, y in _blocks(a, b, name, entry.shape):
        left, right = (t.to(torch.complex128 if t.is_complex() else torch.float64) for t in (x, y))
        gap = (left - right).abs()
        if gap.numel():
            worst = float(gap.max())
            largest = worst if math.isnan(worst) or worst > largest else largest
        squares += float(gap.square().sum())
        norm += float(left.abs().square().sum())
    if norm == 0:
        return largest, 0.0 if squares == 0 else math.inf
    return largest, math.sqrt(squares / norm)


def _blocks(a: Checkpoint, b: Checkpoint, name: str, shape: tuple[int, ...]) -> Iterator[tuple[Any, Any]]:
    if not shape:
        yield a.read(name), b.read(name)
        return
    rows = max(1, _BLOCK // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], rows):
        yield a.read_rows(name, start, start + rows), b.read_rows(name, start, start + rows)


def _sidecars(a: Checkpoint, b: Checkpoint) -> Iterator[tuple[str, str]]:
    one, other = dict(a.sidecars()), dict(b.sidecars())
    for name in sorted({*one, *other} - {"config.json"}):
        if name not in other or name not in one:
            yield name, "only in A" if name in one else "only in B"
        elif not _same_bytes(one[name], other[name]):
            yield name, "differs"


def _same_bytes(a: Path, b: Path) -> bool:
    if a.stat().st_size != b.stat().st_size:
        return False
    with a.open("rb") as one, b.open("rb") as other:
        while block := one.read(1 << 20):
            if block != other.read(1 << 20):
                return False
    return True
