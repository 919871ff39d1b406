"""How tensors are spread over weight files, and what those files' headers and index are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from rewright.formats.dtypes import nbytes
from rewright.formats.errors import FormatError
from rewright.formats.header import check_name, encode_header
from rewright.formats.shards import SINGLE
from rewright.formats.strict import printable


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to be: `dtype` is a safetensors code."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return nbytes(self.dtype, self.shape)


@dataclass(frozen=True, slots=True)
class Shard:
    """One weight file to be: its header bytes, and each tensor's absolute [start, end) in it."""

    file: str
    header: bytes
    places: dict[str, tuple[int, int]]
    size: int


def plan_shards(layout: Sequence[TensorSpec], max_shard_bytes: int) -> list[Shard]:
    """Fill files in the order of `layout`, each up to `max_shard_bytes` of tensor data, at least one tensor each.

    Raises FormatError: a name given twice or unsafe, an unknown dtype, a negative size.
    """
    seen: set[str] = set()
    groups: list[list[TensorSpec]] = [[]]
    room = max_shard_bytes
    for spec in layout:
        check_name(spec.name, "the layout")
        if spec.name in seen:
            raise FormatError(f"the layout has the tensor `{printable(spec.name)}` twice")
        if any(length < 0 for length in spec.shape):
            raise FormatError(f"the layout gives `{printable(spec.name)}` the shape {list(spec.shape)}")
        seen.add(spec.name)
        if spec.nbytes > room and groups[-1]:
            groups.append([])
            room = max_shard_bytes
        groups[-1].append(spec)
        room -= spec.nbytes
    names = [SINGLE]
    if len(groups) > 1:
        names = [f"model-{at:05d}-of-{len(groups):05d}.safetensors" for at in range(1, len(groups) + 1)]
    return [_shard(name, group) for name, group in zip(names, groups, strict=True)]


def _shard(file: str, group: Sequence[TensorSpec]) -> Shard:
    # transformers refuses a file that does not say which framework wrote it.
    header, offsets = encode_header(group, {"format": "pt"})
    places = {name: (len(header) + start, len(header) + end) for name, (start, end) in offsets.items()}
    size = max((end for _, end in places.values()), default=len(header))
    return Shard(file, header, places, size)


def encode_index(shards: Sequence[Shard]) -> bytes:
    """`model.safetensors.index.json` of several shards."""
    total = sum(shard.size - len(shard.header) for shard in shards)
    weight_map = {name: shard.file for shard in shards for name in shard.places}
    document = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
