"""The tensors of a checkpoint as a running model names them: tied, decoded, checked."""

from __future__ import annotations

import torch

from rewright.formats import packing
from rewright.formats.checkpoint import Checkpoint
from rewright.formats.compressed_tensors import is_expert
from rewright.formats.dtypes import to_torch
from rewright.formats.foreign import refuse_scaled
from rewright.passes.errors import InputError
from rewright.passes.finite import all_finite
from rewright.passes.models.families import FAMILIES
from rewright.passes.models.packed_forms import Arena, Bitmask, Stored, Stream
from rewright.passes.packed_tensors import PackedWeight, read_packed, stored_shape

RUNTIME_HEAD = "lm_head.weight"
# Elements that are turned into another dtype at once.
_PART = 1 << 17


class Weights:
    """The tensors of a checkpoint under the names that a running model gives them.

    Packed matrices come out decoded, tied names find the tensor that is stored, a base prefix that the file lacks
    is looked past. Every floating-point tensor is checked: a value that is not finite is refused by name.
    """

    def __init__(self, source: Checkpoint) -> None:
        self.source = source
        self.family = FAMILIES.get(str((source.config or {}).get("model_type")))
        self.packing = packing.parse(source.config or {})
        if self.packing is None:
            refuse_scaled(source.entries)
        self._others: dict[str, list[str]] = {}
        if self.family is not None:
            # GPT-NeoX files call the head `embed_out`, models of today `lm_head`
            self.tie({RUNTIME_HEAD: self.family.head})

    def tie(self, names: dict[str, str]) -> None:
        """Say which names are one tensor, so that either may be the stored one."""
        for alias, name in names.items():
            self._others.setdefault(alias, []).append(name)
            self._others.setdefault(name, []).append(alias)

    def stored_name(self, name: str) -> str | None:
        """The stored spelling of a running model's name, without regard to ties."""
        for candidate in self.family.stored_as(name) if self.family else (name,):
            if candidate in self.source.entries or self._packed(candidate):
                return candidate
        return None

    def _packed(self, name: str) -> bool:
        module, entries = name.removesuffix(".weight"), self.source.entries
        return module + ".weight_mask" in entries or (name not in entries and module + ".weight_packed" in entries)

    def find(self, name: str) -> str:
        """The stored name that serves for a running model's. Raises InputError when there is none."""
        spelled = (self.stored_name(other) for other in (name, *self._others.get(name, ())))
        stored = next((found for found in spelled if found is not None), None)
        if stored is None:
            raise InputError(
                f"tensor `{name}` is missing from `{self.source.path}`", hint="is a shard of the download absent?"
            )
        return stored

    def is_packed(self, name: str) -> bool:
        """Whether a running model's tensor is a matrix of codes in the file, by its own name."""
        stored = self.stored_name(name)
        return stored is not None and self._packed(stored) and not is_expert(stored)

    def packed(self, name: str) -> PackedWeight:
        """The stored tensors of a packed matrix, undecoded, by a running model's name. Raises InputError."""
        module = self.find(name).removesuffix(".weight")
        return read_packed(self.source, module, self._record(module))

    def packed_bytes(self, name: str) -> int:
        """Bytes of an arena that holds a packed matrix as the file does."""
        module = self.find(name).removesuffix(".weight")
        leaves = dict.fromkeys(leaf for suffixes in packing.SUFFIXES.values() for leaf in suffixes)
        held = [self.source.entries.get(f"{module}.{leaf}") for leaf in leaves]
        return sum(entry.nbytes + Arena.ALIGN for entry in held if entry is not None)

    def matrix(self, name: str) -> Stored:
        """The codes of a packed matrix, as the file has them. Raises InputError."""
        held = self.packed(name)
        if held.kind == "bitmask-w4":
            return Bitmask(held.tensors["weight_mask"], held.tensors["weight"], held.shape, held.scale)
        return Stream(held.tensors["weight_packed"], held.bits, held.shape, held.scale, held.zero())

    def differ(self, one: str, other: str) -> bool:
        """Whether both names are stored, with other values: then they are not one tensor, whatever the config says."""
        stored = self.stored_name(one), self.stored_name(other)
        if stored[0] is None or stored[1] is None or not set(stored) <= self.source.entries.keys():
            return False
        return not torch.equal(self.source.read(stored[0]), self.source.read(stored[1]))

    def experts_apart(self, layer: str) -> bool:
        """Whether the file has a matrix for each expert of a layer, where a running model has all in two tensors."""
        experts = self.family.experts if self.family else None
        return experts is not None and any(
            self.stored_name(f"{layer}.{fused}") is None and self._shares(f"{layer}.{fused}") for fused in experts.fused
        )

    def _shares(self, name: str) -> list[tuple[str, ...]]:
        """The matrices, from top to bottom, that make up each expert's share of a fused tensor; none for any other."""
        experts = self.family.experts if self.family else None
        for fused in experts.fused if experts else ():
            if experts is not None and experts.parts and name.endswith(f".{fused}"):
                layer = name.removesuffix(fused)
                count = range(experts.count(self.source.config or {}))
                return [tuple(f"{layer}{part}.weight" for part in experts.sources(fused, i)) for i in count]
        return []

    def _stored_shares(self, name: str) -> list[tuple[str, ...]]:
        spelled = (name, *self._others.get(name, ()))
        return self._shares(name) if all(self.stored_name(other) is None for other in spelled) else []

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """A tensor in `dtype` if it is floating point, else as stored. Raises InputError naming what is wrong.

        A tensor of all experts comes together from their matrices where the file has those.
        """
        shares = self._stored_shares(name)
        if shares:
            whole = torch.empty(self.shape(name), dtype=dtype)
            for target, parts in zip(whole, shares, strict=True):
                torch.cat([self.read(part, dtype) for part in parts], out=target)
            return whole
        stored = self.find(name)
        if self._packed(stored):
            return self._checked(stored, self._decoded(stored, dtype), dtype)
        if not self._turns(stored, dtype):
            return self._checked(stored, self.source.read(stored), dtype)
        rows, columns = self.source.entries[stored].shape
        whole = torch.empty(rows, columns, dtype=dtype)
        step = max(1, _PART // max(1, columns))
        for start in range(0, rows, step):
            part = self.source.read_rows(stored, start, start + step)
            whole[start : start + step] = self._checked(stored, part, dtype)
        return whole

    def _turns(self, stored: str, dtype: torch.dtype) -> bool:
        """Whether a stored matrix is wanted in another dtype: then it is turned a few rows at a time."""
        entry = self.source.entries[stored]
        held = to_torch(entry.dtype)
        return len(entry.shape) == 2 and held is not None and held.is_floating_point and held != dtype

    @staticmethod
    def _checked(stored: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor
        cast = tensor.to(dtype)
        if not all_finite(cast):
            if all_finite(tensor):
                raise InputError(
                    f"tensor `{stored}` holds values past what {dtype} can hold", hint="use another `--dtype`"
                )
            raise InputError(f"tensor `{stored}` holds values that are not finite")
        return cast

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from headers but for packed ones. Raises InputError when it is missing."""
        shares = self._stored_shares(name)
        if shares:
            return (len(shares), *self._shape_of_shares(shares))
        stored = self.find(name)
        if not self._packed(stored):
            return tuple(self.source.entries[stored].shape)
        module = stored.removesuffix(".weight")
        return stored_shape(self.source.read(module + ".weight_shape"), module)

    def _shape_of_shares(self, shares: list[tuple[str, ...]]) -> tuple[int, int]:
        """The shape that each expert's share has. Raises InputError for matrices that do not fit together."""
        first = [self.shape(part) for part in shares[0]]
        for parts in shares:
            for part, wanted in zip(parts, first, strict=True):
                found = self.shape(part)
                if found != wanted or len(found) != 2 or found[1] != first[0][1]:
                    raise InputError(
                        f"tensor `{part}` has shape {list(found)}, unlike the other experts' {list(wanted)}"
                    )
        return sum(shape[0] for shape in first), first[0][1]

    def _decoded(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        module = name.removesuffix(".weight")
        return read_packed(self.source, module, self._record(module)).decode(dtype)

    def _record(self, module: str) -> packing.Record:
        known = self.packing is not None and f"{module}.{self.packing.mark}" in self.source.entries
        record = self.packing.of(module) if self.packing is not None and known else None
        if record is None:
            raise InputError(f"`{module}` is packed, and `config.json` says nothing of how")
        return record
