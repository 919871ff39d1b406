"""Tensors that mean nothing without a scale or a table: never to be read as plain numbers."""

from __future__ import annotations

from collections.abc import Collection

from rewright.formats.errors import FormatError
from rewright.formats.strict import printable

# What stands for a weight, what stands beside it, and what people call it.
_KINDS = (
    ("weight", ("weight_scale_inv",), "fp8 with block scales"),
    ("weight", ("weight_scale", "scale_weight"), "a weight with a scale of its own"),
    ("qweight", ("scales",), "GPTQ or AWQ"),
    ("weight", ("weight.absmax", "weight.quant_map"), "bitsandbytes"),
    ("_blocks", ("_scales",), "mxfp4"),
)
_PACKED = "weight_packed"


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


def _error(name: str, kind: str) -> FormatError:
    return FormatError(
        f"tensor `{printable(name)}` is quantised ({kind}), which is not read",
        hint="start from the unquantised checkpoint, or write a dense one with the tool that made this",
    )
