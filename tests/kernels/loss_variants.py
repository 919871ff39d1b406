"""The launches of the losses of a linear head that are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.kernels.variant import Variant


def _flags(op: Any) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Types, labels and flags. Of float16 only what takes most registers: it is loaded as bfloat16 is."""
    import triton.language as tl

    for dtype in ("bf16", "fp16", "fp32"):
        for gradient in (True, False):
            for cap in (True, False):
                if dtype != "fp16" or (gradient and cap):
                    label = f"{dtype} {'gradient' if gradient else 'losses'}{' cap' if cap else ''}"
                    yield dtype, label, {"HAS_CAP": cap, "GRADIENT": gradient, "ACC": tl.float32, "BLOCK": op.BLOCK}


def cross_entropy_variants() -> Iterator[Variant]:
    from rewright.kernels.linear_cross_entropy import triton as op

    options = {"num_warps": op.WARPS, "enable_fp_fusion": True}
    for dtype, label, flags in _flags(op):
        types = {"z_ptr": f"*{dtype}", "target_ptr": "*i64", "loss_ptr": "*fp32", "softcap": "fp32"}
        constants = flags | {"target_stride": 1}
        for text, aligned in ((label, ("z_ptr", "columns")), (f"{label} odd", ())):
            kernel = op.linear_cross_entropy_kernel
            yield Variant("linear_cross_entropy", text, kernel, types, constants, options, aligned)


def kl_variants() -> Iterator[Variant]:
    from rewright.kernels.linear_kl import triton as op

    options = {"num_warps": op.WARPS, "enable_fp_fusion": True}
    for dtype, label, flags in _flags(op):
        types = dict.fromkeys(("z_ptr", "known_ptr", "back_ptr"), f"*{dtype}")
        types |= dict.fromkeys(("teacher_ptr", "norm_ptr", "loss_ptr"), "*fp32") | {"softcap": "fp32"}
        for known, rest in ((64, True), (op.KNOWN, False)):
            constants = flags | {"HAS_REST": rest, "KNOWN": known, "norm_stride": 1}
            aligned = ("z_ptr", "columns") if known == 64 else ()
            kernel = op.linear_kl_kernel
            yield Variant("linear_kl", f"{label} {known}", kernel, types, constants, options, aligned)
