"""Tensors that mean nothing without a scale or a table: never to be read as plain numbers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rewright.formats.dtypes import FLOATS
from rewright.formats.errors import FormatError
from rewright.formats.strict import printable

# What stands for a weight, what stands beside it, and what people call it.
_KINDS = (
    ("", ("_scale_inv",), "fp8 with block scales"),
    ("", ("_scale",), "a weight with a scale of its own"),
    ("weight", ("scale_weight",), "a weight with a scale of its own"),
    ("qweight", ("scales",), "GPTQ or AWQ"),
    ("weight", ("weight.absmax", "weight.quant_map"), "bitsandbytes"),
    ("_blocks", ("_scales",), "mxfp4"),
)
_PACKED = "weight_packed"
# Where a config says that a model is quantised, whatever the method.
STATED = ("quantization_config", "compression_config")


def refuse_scaled(names: Collection[str]) -> None:
    """Refuse (FormatError) a checkpoint with tensors whose values need another tensor to be what they stand for.

    Call it where `compressed_tensors.parse` finds no quantisation: a config that lost its entry, or a format
    that has none. `pack-quantized` tensors without their config are refused too.
    """
    for name in names:
        if name.endswith(f".{_PACKED}"):
            raise _error(name, "pack-quantized, without the `quantization_config` that says how")
        for suffix, beside, kind in _KINDS:
            if name.endswith(suffix):
                stem = name.removesuffix(suffix)
                if any(stem + other in names for other in beside):
                    raise _error(name, kind)


def bound(tensors: Mapping[str, tuple[str, Sequence[int]]], config: Mapping[str, Any]) -> set[str]:
    """The tensors of a quantised model that are what they are only together: codes, and their scales and tables.

    Codes are what has no plain float dtype. Bound to them is, but for biases, what is in the same module or has a name
    below theirs, and every `_scale` elsewhere, as a cache of keys has one. Refuses what `refuse_scaled` does where the
    config says nothing of a quantisation; then nothing is bound.
    """
    text = config.get("text_config")
    if not any(key in said for said in (config, text) if isinstance(said, Mapping) for key in STATED):
        refuse_scaled(tensors)
        return set()
    codes = {name for name, (dtype, _) in tensors.items() if dtype not in FLOATS}
    owners = codes | {name.rpartition(".")[0] for name in codes}
    beside = {name for name in tensors if name.rpartition(".")[0] in owners and not name.endswith("bias")}
    return codes | beside | {name for name in tensors if name.endswith("_scale")}


def _error(name: str, kind: str) -> FormatError:
    return FormatError(
        f"tensor `{printable(name)}` is quantised ({kind}), which is not read",
        hint="start from the unquantised checkpoint, or write a dense one with the tool that made this",
    )
