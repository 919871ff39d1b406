"""The `bitmask-w4` form: 4-bit codes of the weights that are kept, and a bit for each weight that says which.

A module `m` with a weight (O, I), whose columns are taken in G = I / group groups, is stored as `m.weight_mask` uint8
(O, G, group / 8), `m.weight` uint8 (O, G, nnz / 2), `m.weight_scale` (O, G) of 16 bits and `m.weight_shape` int64
(2,). Bit k of a group's mask, lowest first, is set where the group's column k is kept; just `nnz` bits are. The kept
columns' codes follow in their order, two a byte, the low half first, each as the unsigned number code + 8. A weight is
its code times the scale of its group, and 0 where it is not kept.

The mask is canonical: it marks the codes that are not 0 and, where those are fewer than `nnz`, the first columns of
the group whose codes are 0. So equal weights make equal files.

`m.weight` has the name of the dense tensor and not its shape: a reader that does not know the form refuses it, where
it would fill a weight that it did not find with noise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from rewright.formats.errors import FormatError
from rewright.formats.layout import TensorSpec
from rewright.formats.strict import printable

METHOD = "rewright-bitmask-w4"
FORM = "bitmask-w4"
BITS = 4
SUFFIXES = ("weight_mask", "weight", "weight_scale", "weight_shape")
SCALE_DTYPES = ("F16", "BF16")
_MOST = 2**31 - 1
_HINT = "the file is damaged, or of a later version"


@dataclass(frozen=True, slots=True)
class Bitmask:
    """A record of the form: of every `group_size` columns of a row, `nnz` are kept."""

    group_size: int
    nnz: int
    bits: ClassVar[int] = BITS
    symmetric: ClassVar[bool] = True

    def fault(self) -> str | None:
        """What keeps this from being a record, or None."""
        if self.group_size < 1 or self.group_size % 8:
            return f"groups of {self.group_size} are no whole bytes of mask"
        if not 0 < self.nnz <= self.group_size or self.nnz % 2:
            return f"{self.nnz} weights of {self.group_size} are no whole bytes of codes"
        return None


@dataclass(frozen=True, slots=True)
class BitmaskQuantization:
    """A `quantization_config` of the form: the record of most modules, and of those that have another."""

    default: Bitmask
    modules: Mapping[str, Bitmask]
    ignore: tuple[str, ...]

    def of(self, module: str) -> Bitmask | None:
        """The record of a linear module of that full name, None when it is dense."""
        if module in self.modules:
            return self.modules[module]
        return None if module in self.ignore else self.default


def bitmask_specs(module: str, shape: Sequence[int], bitmask: Bitmask, scale_dtype: str) -> list[TensorSpec]:
    """What stands in a file for `<module>.weight` of `shape` (O, I); `scale_dtype` is `F16` or `BF16`.

    Raises FormatError: not a matrix, another scale dtype, a record that cannot be, groups that do not divide I.
    """
    if len(shape) != 2:
        raise FormatError(f"`{printable(module)}.weight` has shape {list(shape)}, and only matrices are packed")
    if scale_dtype not in SCALE_DTYPES:
        raise FormatError(f"scales of `{FORM}` are {' or '.join(SCALE_DTYPES)}, not {scale_dtype}")
    fault = bitmask.fault()
    rows, columns = shape
    if fault is None and columns % bitmask.group_size:
        fault = f"groups of {bitmask.group_size} do not divide {columns} columns"
    if fault is not None:
        raise FormatError(f"`{printable(module)}`: {fault}")
    groups = columns // bitmask.group_size
    return [
        TensorSpec(f"{module}.weight_mask", "U8", (rows, groups, bitmask.group_size // 8)),
        TensorSpec(f"{module}.weight", "U8", (rows, groups, bitmask.nnz // 2)),
        TensorSpec(f"{module}.weight_scale", scale_dtype, (rows, groups)),
        TensorSpec(f"{module}.weight_shape", "I64", (2,)),
    ]


def quantization_config(modules: Mapping[str, Bitmask], ignore: Iterable[str]) -> dict[str, Any]:
    """The value of config.json's `quantization_config`.

    `modules` maps full module names. The commonest record is stated once and is that of every linear layer which is
    neither named nor ignored, so `ignore` must list each dense one.
    """
    if not modules:
        raise FormatError("there is no quantised module to describe")
    default = Counter(modules.values()).most_common(1)[0][0]
    others = {name: _stated(record) for name, record in modules.items() if record != default}
    return {
        "quant_method": METHOD,
        "format": FORM,
        **_stated(default),
        **({"modules": others} if others else {}),
        "ignore": list(dict.fromkeys(ignore)),
    }


def parse(config: Mapping[str, Any]) -> BitmaskQuantization | None:
    """Read a model's config.json; None when it says nothing of this form. Looks into `text_config` too.

    Raises FormatError naming the key whose value cannot be meant. Keys that are not known are left alone.
    """
    raw = config.get("quantization_config")
    if raw is None and isinstance(config.get("text_config"), dict):
        raw = config["text_config"].get("quantization_config")
    if not isinstance(raw, dict) or raw.get("quant_method") != METHOD:
        return None
    return read_config(raw)


def read_config(raw: Mapping[str, Any]) -> BitmaskQuantization:
    """What a `quantization_config` of this method says. Raises FormatError as `parse` does."""
    form = raw.get("format", FORM)
    if form != FORM:
        raise FormatError(f"`{METHOD}` is stored as `{printable(str(form))}`, which is not read", hint=_HINT)
    ignore, modules = raw.get("ignore", []), raw.get("modules", {})
    if not isinstance(ignore, list) or not all(isinstance(name, str) for name in ignore):
        raise FormatError(f"`ignore` of `{METHOD}` is no list of names", hint=_HINT)
    if not isinstance(modules, dict):
        raise FormatError(f"`modules` of `{METHOD}` is no object", hint=_HINT)
    named = {name: _record(stated, f"module `{printable(name)}` of `{METHOD}`") for name, stated in modules.items()}
    return BitmaskQuantization(_record(raw, f"`{METHOD}`"), named, tuple(ignore))


def _record(stated: Any, where: str) -> Bitmask:
    if not isinstance(stated, Mapping):
        raise FormatError(f"{where} has no `group_size` and `nnz`", hint=_HINT)
    found: dict[str, int] = {}
    for key in ("group_size", "nnz"):
        value = stated.get(key)
        if type(value) is not int or not 0 < value <= _MOST:
            raise FormatError(f"{where} has the `{key}` `{printable(str(value))}`, which is no size", hint=_HINT)
        found[key] = value
    record = Bitmask(**found)
    fault = record.fault()
    if fault is not None:
        raise FormatError(f"{where}: {fault}", hint=_HINT)
    return record


def _stated(record: Bitmask) -> dict[str, int]:
    return {"group_size": record.group_size, "nnz": record.nnz}
