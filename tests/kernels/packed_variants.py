"""The launches of the products by packed codes that are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator

from tests.kernels.variant import Variant

UNIT_STRIDES = {"scale_column": 1, "zero_column": 1, "bias_stride": 1}


def gemv_variants() -> Iterator[Variant]:
    import triton.language as tl

    from rewright.kernels.w4a16_gemv import triton as op

    def variant(label: str, tokens: int, dtype: str, zero: bool, bits: int, out: str) -> Variant:
        tile = op.tile_of(tokens, bits, zero)
        types = {"packed_ptr": "*i32", "zero_ptr": "*i8", "x_ptr": f"*{dtype}", "out_ptr": f"*{out}"}
        types |= {"scale_ptr": "*bf16", "bias_ptr": "*bf16"}
        flags = {"HAS_ZERO": zero, "HAS_BIAS": out == dtype, "BITS": bits, "GROUP_WORDS": 16, "ACC": tl.float32}
        blocks = {"BLOCK_M": tokens, "BLOCK_N": tile.rows, "BLOCK_W": tile.warps * op.LANES}
        constants = {**flags, **blocks, **UNIT_STRIDES} | ({"tokens": 1} if tokens == 1 else {})
        aligned = ("x_ptr", "out_ptr", "scale_ptr", "x_row", "packed_row", "words", "span")
        options = {"num_warps": tile.warps, "enable_fp_fusion": True}
        return Variant("w4a16_gemv", label, op.w4a16_gemv_kernel, types, constants, options, aligned)

    for tokens in op.CONFIGS:
        yield variant(f"{tokens} bf16", tokens, "bf16", False, 4, "bf16")
        yield variant(f"{tokens} bf16 zero parts", tokens, "bf16", True, 4, "fp32")
        yield variant(f"{tokens} fp32 zero", tokens, "fp32", True, 4, "fp32")
    for bits in (2, 8):
        yield variant(f"8 fp16 zero {bits} bits", 8, "fp16", True, bits, "fp16")
    types = {"part_ptr": "*fp32", "bias_ptr": "*bf16", "out_ptr": "*bf16"}
    constants = {"HAS_BIAS": True, "BLOCK": op.REDUCE}
    yield Variant("w4a16_gemv", "join", op.join_kernel, types, constants, {"enable_fp_fusion": False})


def gemm_variants() -> Iterator[Variant]:
    import triton.language as tl

    from rewright.kernels.w4a16_gemm import triton as op

    dots = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
    configs = {name: getattr(op, name) for name in ("NARROW", "MIDDLE", "WIDE", "FULL", "SMALL")}
    for kernel, tiles, name in (
        (op.w4a16_gemm_kernel, configs, "x"),
        (op.w4a16_gemm_dx_kernel, {"DX": op.DX, "DX FULL": op.DX_FULL, "DX SMALL": op.SMALL}, "dy"),
    ):
        out = "out_ptr" if name == "x" else "dx_ptr"
        for label, tile in tiles.items():
            for dtype in ("fp32",) if "FULL" in label else ("bf16", "fp16"):
                for kind in ("plain", "zero", "channel words", "zero strided"):
                    types = {f"{name}_ptr": f"*{dtype}", out: f"*{dtype}", "packed_ptr": "*i32", "zero_ptr": "*i8"}
                    types |= {"scale_ptr": "*bf16", "bias_ptr": "*bf16"}
                    flags = {"HAS_ZERO": "zero" in kind, "BITS": 4, "GROUP_WORDS": 0 if "words" in kind else 16}
                    flags |= {"DOT": dots[dtype], "ACC": tl.float32}
                    blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_W": tile.words}
                    ones = {} if "strided" in kind else {**UNIT_STRIDES, f"{name}_column": 1}
                    if name == "dy":
                        ones.pop("bias_stride", None)
                    else:
                        flags["HAS_BIAS"] = True
                    aligned = ["packed_ptr", f"{name}_ptr", out, "scale_ptr", "packed_row", "words", "rows"]
                    aligned += ["span"] if name == "x" else []
                    aligned += [f"{name}_row", "scale_row"] if ones else []
                    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
                    constants = {**flags, **blocks, **ones}
                    text = f"{label} {dtype} {kind}"
                    only: tuple[str, ...] | None = None
                    if label in ("MIDDLE", "WIDE", "DX"):
                        only = ("sm_80", "sm_90")
                    elif "SMALL" in label:
                        only = ("gfx942",)
                    yield Variant("w4a16_gemm", text, kernel, types, constants, options, tuple(aligned), only)


def bitmask_gemv_variants() -> Iterator[Variant]:
    import triton.language as tl

    from rewright.kernels.bitmask_w4_gemv import triton as op

    usual = (("bf16", 128, 4, 4), ("fp32", 128, 4, 4))
    others = (("bf16", 64, 4, 4), ("fp16", 48, 2, 1), ("bf16", 8, 1, 1))
    for tokens in op.CONFIGS:
        for dtype, group, size, unit in usual + (others if tokens == 8 else ()):
            tile = op.tile_of(tokens, dtype == "fp32")
            types = {"x_ptr": f"*{dtype}", "mask_ptr": f"*u{8 * size}", "values_ptr": f"*u{8 * unit}"}
            types |= {"scale_ptr": "*bf16", "bias_ptr": "*bf16", "out_ptr": f"*{dtype}"}
            block_w, block_g = op.blocks(group // 8 // size, tile)
            blocks = {"BLOCK_M": tokens, "BLOCK_N": tile.rows, "BLOCK_W": block_w, "BLOCK_G": block_g}
            flags = {"HAS_BIAS": True, "BYTES": size, "UNIT": unit, "ACC": tl.float32}
            constants = {**flags, **blocks, "scale_column": 1, "bias_stride": 1} | (
                {"tokens": 1} if tokens == 1 else {}
            )
            aligned = ("x_ptr", "mask_ptr", "values_ptr", "out_ptr", "x_row", "mask_row", "values_row")
            options = {"num_warps": tile.warps, "enable_fp_fusion": True}
            label = f"{tokens} {dtype} {group}"
            kernel = op.bitmask_w4_gemv_kernel
            yield Variant("bitmask_w4_gemv", label, kernel, types, constants, options, aligned)
