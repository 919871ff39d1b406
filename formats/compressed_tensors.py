"""The `pack-quantized` format of compressed-tensors: names, shapes and configuration, no arithmetic.

A module `m` with a weight (O, I) is stored as `m.weight_packed` int32 (O, ceil(I b / 32)), `m.weight_scale`
(O, I / group), `m.weight_shape` int64 (2,), and, when asymmetric, `m.weight_zero_point` int32
(ceil(O b / 32), I / group), packed along the output rows. There is no `m.weight`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from rewright.formats.errors import FormatError
from rewright.formats.layout import TensorSpec
from rewright.formats.strict import printable

METHOD = "compressed-tensors"
PACKED = "pack-quantized"
SUFFIXES = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
_SCALE_DTYPES = ("F16", "BF16", "F32")
_EXPERT = re.compile(r"(^|\.)experts\.")
_DENSE_HINT = "start from the unquantised checkpoint, or write a dense one with the tool that made this"


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a matrix is quantised: code width, columns that share a scale (None: one scale a row), zero point or not."""

    bits: int
    group_size: int | None
    symmetric: bool = True
    # of a group every weight has a code
    nnz: ClassVar[None] = None

    def groups(self, columns: int) -> int:
        """Scales a row. Raises FormatError when the group size does not divide the columns."""
        if self.group_size is None:
            return 1
        if self.group_size < 1 or columns % self.group_size:
            raise FormatError(f"groups of {self.group_size} do not divide {columns} columns")
        return columns // self.group_size


@dataclass(frozen=True, slots=True)
class _Group:
    """A config group as read: `scheme` is None for a group that leaves weights alone."""

    targets: tuple[str, ...]
    scheme: Scheme | None


@dataclass(frozen=True, slots=True)
class Quantization:
    """A `quantization_config` that this package reads; `raw` keeps it whole, unknown fields too."""

    groups: tuple[_Group, ...]
    ignore: tuple[str, ...]
    raw: Mapping[str, Any]

    def scheme_of(self, module: str) -> Scheme | None:
        """The scheme of a linear module of that full name, None when it is dense.

        As compressed-tensors resolves it: ignored first, then an exact name, then a pattern, then the class.
        """
        if any(_matches(target, module) for target in self.ignore):
            return None
        targets = {target: group.scheme for group in self.groups for target in group.targets}
        for matches in (_exact, _pattern, _class):
            for target in sorted(targets):
                if matches(target, module):
                    return targets[target]
        return None


def packed_specs(module: str, shape: Sequence[int], scheme: Scheme, scale_dtype: str) -> list[TensorSpec]:
    """What stands in a file for `<module>.weight` of `shape` (O, I); `scale_dtype` is `F16`, `BF16` or `F32`.

    Raises FormatError: not a matrix, another scale dtype, bits outside 1..8, a group size that does not divide I.
    """
    if len(shape) != 2:
        raise FormatError(f"`{module}.weight` has shape {list(shape)}, and only matrices are packed")
    if scale_dtype not in _SCALE_DTYPES:
        raise FormatError(f"scales are stored as {', '.join(_SCALE_DTYPES)}, not {scale_dtype}")
    if not 1 <= scheme.bits <= 8:
        raise FormatError(f"codes of {scheme.bits} bits are not packed, only 1 to 8")
    rows, columns = shape
    try:
        groups = scheme.groups(columns)
    except FormatError as error:
        raise FormatError(f"`{module}`: {error}") from None
    specs = [
        TensorSpec(f"{module}.weight_packed", "I32", (rows, words(columns, scheme.bits))),
        TensorSpec(f"{module}.weight_scale", scale_dtype, (rows, groups)),
        TensorSpec(f"{module}.weight_shape", "I64", (2,)),
    ]
    if not scheme.symmetric:
        specs.append(TensorSpec(f"{module}.weight_zero_point", "I32", (words(rows, scheme.bits), groups)))
    return specs


def is_expert(module: str) -> bool:
    """Whether readers take a module for one of a layer's experts, by its name."""
    return _EXPERT.search(module) is not None


def words(codes: int, bits: int) -> int:
    """32-bit words that hold `codes` codes of `bits` bits, packed without gaps."""
    return -(-codes * bits // 32)


def quantization_config(schemes: Mapping[str, Scheme], ignore: Iterable[str]) -> dict[str, Any]:
    """The value of config.json's `quantization_config`: the fewest keys that readers from 0.15 to 0.20 take.

    `schemes` maps full module names; the commonest scheme takes every `Linear` that `ignore` does not name (so
    `ignore` must list each dense linear layer, a tied head too), the others list their modules.
    """
    if not schemes:
        raise FormatError("there is no quantised module to describe")
    by_scheme: dict[Scheme, list[str]] = {}
    for module, scheme in schemes.items():
        by_scheme.setdefault(scheme, []).append(module)
    counts = Counter({scheme: len(modules) for scheme, modules in by_scheme.items()})
    groups = {}
    for at, (scheme, _) in enumerate(counts.most_common()):
        targets = ["Linear"] if at == 0 else [_target(module) for module in by_scheme[scheme]]
        groups[f"group_{at}"] = {"targets": targets, "weights": _weights(scheme)}
    return {
        "quant_method": METHOD,
        "format": PACKED,
        # Without it transformers leaves the packed tensors out and runs on random weights, silently.
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(dict.fromkeys(ignore)),
    }


def parse(config: Mapping[str, Any]) -> Quantization | None:
    """Read a model's config.json; None when it is not quantised. Looks into `text_config` too.

    Raises FormatError, saying what to do, for another method or format, for codes that are no integers (fp8), for
    quantised activations and for schemes without a per-group or per-row scale.
    """
    raw = config.get("quantization_config")
    if raw is None and isinstance(config.get("text_config"), dict):
        raw = config["text_config"].get("quantization_config")
    if raw is None:
        return None
    if not isinstance(raw, dict):
        raise FormatError("`quantization_config` is not an object")
    method = raw.get("quant_method")
    if method != METHOD:
        word = printable(str(method))
        raise FormatError(f"the checkpoint is quantised by `{word}`, which is not read", hint=_DENSE_HINT)
    groups = raw.get("config_groups")
    ignore = raw.get("ignore") or []
    if not isinstance(groups, dict) or not _texts(ignore):
        raise FormatError("`quantization_config` has no `config_groups`, or an `ignore` that is no list of names")
    parsed = tuple(_group(name, group, raw.get("format")) for name, group in groups.items())
    return Quantization(parsed, tuple(ignore), raw)


def _group(name: str, group: Any, default_format: Any) -> _Group:
    if not isinstance(group, dict) or not _texts(group.get("targets")):
        raise FormatError(f"config group `{printable(name)}` has no `targets`")
    weights = group.get("weights")
    if weights is None:
        return _Group(tuple(group["targets"]), None)
    where = f"config group `{printable(name)}`"
    if not isinstance(weights, dict):
        raise FormatError(f"{where} has `weights` that are not an object")
    bits, kind = weights.get("num_bits"), weights.get("type") or "int"
    if kind != "int":
        word = f"fp{bits}" if kind == "float" else printable(str(kind))
        raise FormatError(f"{where} holds {word} weights, which are not read", hint=_DENSE_HINT)
    form = group.get("format") or default_format
    if form != PACKED:
        raise FormatError(f"{where} is stored as `{printable(str(form))}`, which is not read", hint=_DENSE_HINT)
    for part in ("input_activations", "output_activations"):
        if group.get(part) is not None:
            raise FormatError(f"{where} quantises activations (`{part}`), which is not read", hint=_DENSE_HINT)
    if weights.get("actorder") in ("group", True):
        raise FormatError(f"{where} has columns out of order (`actorder`), which is not read", hint=_DENSE_HINT)
    if type(bits) is not int or not 1 <= bits <= 8:
        raise FormatError(f"{where} has codes of `{printable(str(bits))}` bits, not 1 to 8")
    symmetric = weights.get("symmetric", True)
    return _Group(tuple(group["targets"]), Scheme(bits, _group_size(where, weights), symmetric is not False))


def _group_size(where: str, weights: Mapping[str, Any]) -> int | None:
    strategy, size = weights.get("strategy"), weights.get("group_size")
    if strategy == "channel" or (strategy is None and size == -1):
        return None
    if strategy in ("group", None) and type(size) is int and size > 0:
        return size
    raise FormatError(
        f"{where} has one scale a `{printable(str(strategy))}`, and only groups and rows are read", hint=_DENSE_HINT
    )


def _weights(scheme: Scheme) -> dict[str, Any]:
    sized = (
        {"strategy": "channel"}
        if scheme.group_size is None
        else {
            "strategy": "group",
            "group_size": scheme.group_size,
        }
    )
    return {"num_bits": scheme.bits, "type": "int", "symmetric": scheme.symmetric, **sized, "dynamic": False}


def _target(module: str) -> str:
    # transformers looks for the experts' group among the patterns that say `experts`, and only there.
    if is_expert(module):
        return f"re:^{re.escape(module)}$"
    return module


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _matches(target: str, module: str) -> bool:
    return _exact(target, module) or _pattern(target, module) or _class(target, module)


def _exact(target: str, module: str) -> bool:
    return target == module


def _pattern(target: str, module: str) -> bool:
    if not target.startswith("re:"):
        return False
    try:
        return re.match(target.removeprefix("re:"), module) is not None
    except re.error as error:
        raise FormatError(f"`{printable(target)}` in `quantization_config` is no pattern: {error}") from None


def _class(target: str, module: str) -> bool:
    return target == "Linear"
