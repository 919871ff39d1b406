"""Compile every Triton kernel ahead of time, on a machine without a GPU.  `python -m tests.kernels.aot` prints a table.

Each kernel is compiled as its launcher would for each of its configurations, for sm_80, sm_90 and gfx942, and the
registers, shared memory and spills of the result are read: through `ptxas -v` for CUDA, from the metadata of the
assembly for AMD. Triton's interpreter replaces the type of kernels, so this needs a process without it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.kernels.loss_variants import cross_entropy_variants, kl_variants
from tests.kernels.modal_variants import MODAL
from tests.kernels.neuron_variants import NEURONS
from tests.kernels.ops import OPS
from tests.kernels.packed_variants import bitmask_gemv_variants, gemm_variants, gemv_variants
from tests.kernels.variant import Variant

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes. Spills are bytes on CUDA, vector registers or bytes of stack on AMD."""

    op: str
    label: str
    target: str
    registers: int
    shared: int
    spills: int


def _hessian_variants() -> Iterator[Variant]:
    import triton.language as tl

    from rewright.kernels.hessian_update import triton as op

    unit = {"h_column": 1, "x_column": 1}
    aligned = ("h_ptr", "x_ptr", "h_row", "x_row")
    for label, config, dtype, ones, divisible in (
        ("wide bf16", op.WIDE, "bf16", unit, aligned),
        ("wide fp16", op.WIDE, "fp16", unit, aligned),
        ("half bf16 strided", op.HALF, "bf16", {}, ()),
        ("half fp16 odd", op.HALF, "fp16", unit, ()),
        ("full fp32", op.FULL, "fp32", unit, aligned),
        ("full fp32 strided", op.FULL, "fp32", {}, ()),
        ("small bf16 strided", op.SMALL, "bf16", {}, ()),
        ("small fp32 strided", op.SMALL, "fp32", {}, ()),
    ):
        dot = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}[dtype]
        blocks = {"BLOCK_I": config.block_i, "BLOCK_J": config.block_j, "BLOCK_K": config.block_k}
        yield Variant(
            "hessian_update",
            label,
            op.hessian_update_kernel,
            {"h_ptr": "*fp32", "x_ptr": f"*{dtype}", "alpha": "fp32"},
            {"DOT": dot, "ACC": tl.float32, **blocks, **ones},
            {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": True},
            divisible,
        )
    options = {"enable_fp_fusion": False}
    yield Variant("hessian_update", "mirror", op.mirror_kernel, {"h_ptr": "*fp32"}, {"BLOCK": op.MIRROR}, options)


def _cross_variants() -> Iterator[Variant]:
    import triton.language as tl

    from rewright.kernels.cross_update import triton as op
    from rewright.kernels.hessian_update import triton as tiles

    unit = {"total_column": 1, "left_column": 1, "right_column": 1}
    aligned = ("total_ptr", "left_ptr", "right_ptr", "total_row", "left_row", "right_row")
    for label, config, left, right, ones, divisible in (
        ("wide bf16", tiles.WIDE, "bf16", "bf16", unit, aligned),
        ("wide fp16", tiles.WIDE, "fp16", "fp16", unit, aligned),
        ("half bf16 strided", tiles.HALF, "bf16", "bf16", {}, ()),
        ("half fp16 odd", tiles.HALF, "fp16", "fp16", unit, ()),
        ("full fp32", tiles.FULL, "fp32", "fp32", unit, aligned),
        ("full fp32 strided", tiles.FULL, "fp32", "fp32", {}, ()),
        ("full bf16 by fp32", tiles.FULL, "bf16", "fp32", {}, ()),
        ("small bf16 strided", tiles.SMALL, "bf16", "bf16", {}, ()),
        ("small fp32 strided", tiles.SMALL, "fp32", "fp32", {}, ()),
    ):
        half = {"bf16": tl.bfloat16, "fp16": tl.float16}.get(left)
        blocks = {"BLOCK_I": config.block_i, "BLOCK_J": config.block_j, "BLOCK_K": config.block_k}
        yield Variant(
            "cross_update",
            label,
            op.cross_update_kernel,
            {"total_ptr": "*fp32", "left_ptr": f"*{left}", "right_ptr": f"*{right}", "alpha": "fp32"},
            {"DOT": half if half and left == right else tl.float32, "ACC": tl.float32, **blocks, **ones},
            {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": True},
            divisible,
        )


def _sweep_variants() -> Iterator[Variant]:
    import triton.language as tl

    from rewright.kernels.joint_sweep import triton as op

    def types(dtype: str) -> dict[str, str]:
        floating = dict.fromkeys(
            ("weight_ptr", "factor_ptr", "scale_ptr", "value_ptr", "error_ptr", "loss_ptr"), f"*{dtype}"
        )
        return floating | {"zero_ptr": "*i32", "keep_ptr": "*u8", "codes_ptr": "*i8"}

    columns = {"weight_row": 1, "keep_row": 1, "factor_column": 1, "scale_stride": 1, "zero_stride": 1}
    everything = {"HAS_SCALE": True, "HAS_ZERO": True, "HAS_KEEP": True}
    pruning = {"HAS_SCALE": False, "HAS_ZERO": False, "HAS_KEEP": True}
    for width, (rows, warps) in op.CONFIGS.items():
        blocks = {"ACC": tl.float32, "BLOCK_R": rows, "BLOCK_C": width}
        options = {"num_warps": warps, "enable_fp_fusion": False}
        for label, dtype, flags, ones in (
            ("fp32 columns", "fp32", everything, columns),
            ("fp32 strided", "fp32", everything, {}),
            ("bf16 columns", "bf16", everything, columns),
            ("fp32 prune", "fp32", pruning, columns),
        ):
            constants = {**blocks, **flags, **ones}
            yield Variant("joint_sweep", f"{width} {label}", op.joint_sweep_kernel, types(dtype), constants, options)


def _descend_variants() -> Iterator[Variant]:
    import triton.language as tl

    from rewright.kernels.descend import triton as op
    from rewright.kernels.joint_sweep.triton import CONFIGS

    def types(dtype: str) -> dict[str, str]:
        floating = dict.fromkeys(("value_ptr", "gradient_ptr", "hessian_ptr", "scale_ptr", "new_ptr"), f"*{dtype}")
        return floating | {"zero_ptr": "*fp32", "keep_ptr": "*u8", "codes_ptr": "*i8"}

    ones = ("value_row", "gradient_row", "keep_row", "hessian_column", "scale_stride", "zero_stride")
    columns = dict.fromkeys(ones, 1)
    everything = {"HAS_SCALE": True, "HAS_ZERO": True, "HAS_KEEP": True}
    pruning = {"HAS_SCALE": False, "HAS_ZERO": False, "HAS_KEEP": True}
    for width, (rows, warps) in CONFIGS.items():
        blocks = {"ACC": tl.float32, "BLOCK_R": rows, "BLOCK_C": width}
        options = {"num_warps": warps, "enable_fp_fusion": False}
        for label, dtype, flags, strides in (
            ("fp32 columns", "fp32", everything, columns),
            ("fp32 strided", "fp32", everything, {}),
            ("bf16 columns", "bf16", everything, columns),
            ("fp32 prune", "fp32", pruning, columns),
        ):
            constants = {**blocks, **flags, **strides}
            yield Variant("descend", f"{width} {label}", op.descend_kernel, types(dtype), constants, options)


def _clip_variants() -> Iterator[Variant]:
    import triton.language as tl

    from rewright.kernels.clip_search import triton as op

    types = {"keep_ptr": "*u8", "greatest": "fp32", "least": "fp32"}
    types |= dict.fromkeys(("importance_ptr", "shares_ptr", "scale_ptr", "zero_ptr"), "*fp32")
    blocks = {"ACC": tl.float32, "BLOCK_R": op.ROWS, "BLOCK_C": op.COLUMNS}
    options = {"num_warps": op.WARPS, "enable_fp_fusion": False}
    columns = {"weight_row": 1, "keep_row": 1, "importance_stride": 1}
    for label, dtype, symmetric, stored, ones in (
        ("fp32 columns bf16", "fp32", True, tl.bfloat16, columns),
        ("fp32 columns fp16", "fp32", False, tl.float16, columns),
        ("fp32 strided fp32", "fp32", False, tl.float32, {}),
        ("bf16 rows bf16", "bf16", True, tl.bfloat16, {"weight_column": 1, "keep_column": 1}),
        ("plain fp32 columns bf16", "fp32", True, tl.bfloat16, columns),
    ):
        counted = not label.startswith("plain")
        flags = {"HAS_KEEP": counted, "HAS_IMPORTANCE": counted, "SYMMETRIC": symmetric, "STORED": stored}
        constants = {**blocks, **flags, **ones}
        kernel = op.clip_search_kernel
        yield Variant("clip_search", label, kernel, types | {"weight_ptr": f"*{dtype}"}, constants, options)


def _select_variants() -> Iterator[Variant]:
    import triton.language as tl

    from rewright.kernels.select import triton as op

    options = {"num_warps": op.WARPS, "enable_fp_fusion": False}
    flat = {"WIDE": False, "BLOCK": op.BLOCK}
    table = {"state_ptr": "*i64", "table_ptr": "*i32"}
    for top in (True, False):
        which = "top" if top else "other"
        yield Variant("select", f"digit {which}", op.digit_kernel, table, {"TOP": top}, options)
        for dtype in ("fp32", "bf16"):
            types = {"score_ptr": f"*{dtype}"} | table
            constants = {**flat, "SHIFT": 24 if top else 8, "TOP": top}
            yield Variant("select", f"count {which} {dtype}", op.count_kernel, types, constants, options)
    for dtype in ("fp32", "bf16"):
        types = {"score_ptr": f"*{dtype}", "keep_ptr": "*u8", "state_ptr": "*i64"}
        yield Variant("select", f"ties {dtype}", op.ties_kernel, types | {"ties_ptr": "*i32"}, flat, options)
        yield Variant("select", f"above {dtype}", op.above_kernel, types | {"ties_ptr": "*i64"}, flat, options)
        for label, ones in (
            ("rows", {"score_column": 1, "keep_column": 1}),
            ("columns", {"score_row": 1, "keep_row": 1}),
            ("strided", {}),
        ):
            tile = {"ACC": tl.float32, "BLOCK": op.TILE, **ones}
            yield Variant("select", f"rank {dtype} {label}", op.rank_kernel, types, tile, options)
        whole = {**flat, **op.limits(False), "keep_column": 1}
        yield Variant("select", f"segment {dtype}", op.segment_kernel, types, whole, options)


def _admm_variants() -> Iterator[Variant]:
    import triton.language as tl

    from rewright.kernels.admm_step import triton as op

    constants = {"ACC": tl.float32, "BLOCK": op.BLOCK}
    options = {"num_warps": op.WARPS, "enable_fp_fusion": False}
    floating = ("target_ptr", "weight_ptr", "dual_ptr", "rhs_ptr")
    unit = dict.fromkeys(("target_column", "weight_column", "dual_column", "keep_column"), 1)
    for dtype in ("fp32", "bf16"):
        types = dict.fromkeys(floating, f"*{dtype}") | {"keep_ptr": "*u8"}
        for label, ones in (("rows", unit), ("strided", {})):
            kernel = op.admm_step_kernel
            yield Variant("admm_step", f"{dtype} {label}", kernel, types, {**constants, **ones}, options)


def _pack_variants() -> Iterator[Variant]:
    from rewright.kernels.pack import triton as op

    types = {"codes_ptr": "*i8", "packed_ptr": "*i32"}
    options = {"enable_fp_fusion": False}
    for bits in (2, 3, 4, 8):
        packing = {"BITS": bits, "SLOTS": op.slots(bits), "BLOCK": op.WORDS}
        yield Variant("pack", f"pack {bits} bits", op.pack_kernel, types, packing, options)
        unpacking = {"BITS": bits, "BLOCK": op.COLUMNS}
        yield Variant("pack", f"unpack {bits} bits", op.unpack_kernel, types, unpacking, options)


def _bitmask_variants() -> Iterator[Variant]:
    from rewright.kernels.bitmask import triton as op

    options = {"enable_fp_fusion": False}
    packing = {"codes_ptr": "*i8", "mask_ptr": "*u8", "values_ptr": "*u8"}
    for group in (8, 32, 128, 2048):
        sizes = op.tile(group)
        for label, ones in (("rows", {"codes_column": 1}), ("strided", {})):
            kernel = op.pack_kernel
            yield Variant("bitmask", f"pack {group} {label}", kernel, packing, {**sizes, **ones}, options)
        yield Variant("bitmask", f"unpack {group}", op.unpack_kernel, packing, sizes, options)


def _rng_variants() -> Iterator[Variant]:
    from rewright.kernels.rng import triton as op

    types = {"out_ptr": "*i32", "seed": "i64", "counter": "i64"}
    yield Variant("rng", "bits", op.random_bits_kernel, types, {"BLOCK": op.BLOCK}, {"enable_fp_fusion": False})


def variants(op: str) -> list[Variant]:
    """Every variant of an op that is compiled."""
    makers = {
        "hessian_update": _hessian_variants,
        "cross_update": _cross_variants,
        "joint_sweep": _sweep_variants,
        "descend": _descend_variants,
        "clip_search": _clip_variants,
        "select": _select_variants,
        "admm_step": _admm_variants,
        "pack": _pack_variants,
        "bitmask": _bitmask_variants,
        "rng": _rng_variants,
        "w4a16_gemv": gemv_variants,
        "w4a16_gemm": gemm_variants,
        "bitmask_w4_gemv": bitmask_gemv_variants,
        "linear_cross_entropy": cross_entropy_variants,
        "linear_kl": kl_variants,
        **MODAL,
        **NEURONS,
    }
    return list(makers[op]())


def compile_variant(variant: Variant, target: str) -> Resources:
    """Compile one variant for one target and read what it takes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    signature = {name: "constexpr" if name in variant.constants else variant.types.get(name, "i32") for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned}
    source = ASTSource(variant.kernel, signature, variant.constants, attributes)
    compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=variant.options)
    registers, spills = (_amd if target.startswith("gfx") else _nvidia)(compiled.asm, TARGETS[target][1])
    return Resources(variant.op, variant.label, target, registers, compiled.metadata.shared, spills)


def _nvidia(asm: Any, arch: Any) -> tuple[int, int]:
    from triton.backends.nvidia.compiler import get_ptxas

    gpu = re.search(r"^\.target (sm_\w+)", asm["ptx"], re.MULTILINE)
    if gpu is None:
        raise ValueError("the PTX names no target")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(asm["ptx"])
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={gpu[1]}", str(path), "-o", os.devnull]
        talk = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", talk)]
    used = re.search(r"Used (\d+) registers", talk)
    if used is None or not found:
        raise ValueError(f"`ptxas -v` said nothing of registers and spills: {talk}")
    return int(used[1]), sum(found)


def _amd(asm: Any, _arch: Any) -> tuple[int, int]:
    def read(key: str) -> int:
        found = re.search(rf"\.{key}: +(\d+)", asm["amdgcn"])
        if found is None:
            raise ValueError(f"the assembly does not give `{key}`")
        return int(found[1])

    # Scalar registers spill into vector ones, which is normal and costs no memory.
    return read("vgpr_count"), read("vgpr_spill_count") + read("private_segment_fixed_size")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kernels.aot", description="Compile the Triton kernels.")
    parser.add_argument("ops", nargs="*", default=OPS, help="ops to compile (all)")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    rows = [compile_variant(v, target) for op in given.ops for v in variants(op) for target in v.targets or TARGETS]
    if given.json:
        print(json.dumps([asdict(row) for row in rows]))
    else:
        print(f"{'op':20}{'variant':24}{'target':8}{'registers':>10}{'shared':>8}{'spills':>8}")
        for row in rows:
            line = f"{row.op:20}{row.label:24}{row.target:8}{row.registers:10}{row.shared:8}{row.spills:8}"
            print(line)
    return 1 if any(row.spills for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
