"""The launches of the ops on predicted neurons that are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tests.kernels.variant import Variant

OPTIONS = {"enable_fp_fusion": True}


def in_variants() -> Iterator[Variant]:
    import triton.language as tl

    from rewright.kernels.predictor_in import triton as op

    types = dict.fromkeys(("scale_ptr", "a0_ptr", "out_ptr"), "*fp32")
    for tokens, dtype, factor in ((1, "bf16", "i8"), (16, "bf16", "bf16")):
        constants = {"HAS_SCALE": factor == "i8", "ACC": tl.float32, "scale_stride": 1, "a0_stride": 1}
        constants |= {"BLOCK_M": tokens, "BLOCK_K": op.ELEMENTS // tokens}
        given = types | {"x_ptr": f"*{dtype}", "a_ptr": f"*{factor}"}
        options = OPTIONS | {"num_warps": op.WARPS}
        aligned = ("x_ptr", "a_ptr", "a_row")
        kernel = op.predictor_in_kernel
        yield Variant("predictor_in", f"{tokens} {dtype} by {factor}", kernel, given, constants, options, aligned)


def out_variants() -> Iterator[Variant]:
    import triton.language as tl

    from rewright.kernels.predictor_out import triton as op

    types = dict.fromkeys(("t_ptr", "scale_ptr", "c_ptr", "shift_ptr"), "*fp32") | {"shift": "fp32"}
    types |= {"index_ptr": "*i32", "count_ptr": "*i32"}
    for tokens, factor in ((1, "i8"), (1, "bf16"), (op.MOST_ROWS, "i8")):
        constants = {"HAS_SCALE": factor == "i8", "HAS_SHIFT": factor == "i8", "ACC": tl.float32, "BLOCK_N": op.BLOCK}
        constants |= {"BLOCK_M": tokens, "BLOCK_K": op.ONE if tokens == 1 else op.SEVERAL}
        constants |= {"scale_stride": 1, "c_stride": 1}
        options = OPTIONS | {"num_warps": op.WARPS}
        kernel, given = op.predictor_out_kernel, types | {"b_ptr": f"*{factor}"}
        yield Variant("predictor_out", f"{tokens} {factor}", kernel, given, constants, options, ("b_ptr", "b_row"))


ALIGNED = ("x_ptr", "up_ptr", "down_ptr", "gate_ptr", "out_ptr", "columns", "up_row", "down_row", "gate_row")


def mlp_variants() -> Iterator[Variant]:
    import triton.language as tl

    from rewright.kernels.sparse_mlp import triton as op

    halves = ("x_ptr", "up_ptr", "down_ptr", "bias_ptr", "gate_ptr", "gate_bias_ptr")
    fixed = {"index_ptr": "*i32", "count_ptr": "*i32", "out_ptr": "*fp32", "offset_ptr": "*fp32"}
    for tokens, (neurons, columns) in op.CONFIGS.items():
        # What takes most registers; float32 for the fewest rows and the most.
        for dtype, gated in (("bf16", True), ("fp32", False)) if tokens in (1, 16) else (("bf16", True),):
            flags = {"HAS_GATE": gated, "HAS_GATE_BIAS": gated, "HAS_OFFSET": gated, "HAS_BIAS": True, "SQUARE": False}
            sizes = {"BLOCK_M": tokens, "BLOCK_G": neurons, "BLOCK_K": columns, "LIST": op.BLOCK, "BLOCKS": 512}
            constants = {**flags, **sizes, "ACC": tl.float32}
            constants |= dict.fromkeys(("bias_stride", "gate_bias_stride", "offset_stride"), 1)
            types = dict.fromkeys(halves, f"*{dtype}") | fixed
            options = OPTIONS | {"num_warps": op.WARPS}
            label = f"{tokens} {dtype}{' gate' if gated else ''}"
            yield Variant("sparse_mlp", label, op.sparse_mlp_kernel, types, constants, options, ALIGNED)


def reduce_variants() -> Iterator[Variant]:
    import triton.language as tl

    from rewright.kernels.reduce_add import triton as op

    types = {"partial_ptr": "*fp32"} | dict.fromkeys(("bias_ptr", "residual_ptr", "out_ptr"), "*bf16")
    constants = {"HAS_BIAS": True, "HAS_RESIDUAL": True, "ACC": tl.float32, "BLOCK_P": op.PARTS, "BLOCK_D": op.COLUMNS}
    constants |= {"bias_stride": 1, "residual_column": 1}
    options = OPTIONS | {"num_warps": op.WARPS}
    yield Variant("reduce_add", "bf16", op.reduce_add_kernel, types, constants, options)


def thresholded_variants() -> Iterator[Variant]:
    import triton.language as tl

    from rewright.kernels.thresholded_linear import triton as op

    for tokens, tile in op.CONFIGS.items():
        for dtype in ("bf16", "fp32") if tokens in (1, 16) else ("bf16",):
            types = {"x_ptr": f"*{dtype}", "w_ptr": f"*{dtype}", "threshold_ptr": "*fp32", "out_ptr": "*fp32"}
            constants = {"ACC": tl.float32, "BLOCK_M": tokens, "BLOCK_K": tile.columns, "BLOCK_N": tile.outputs}
            constants |= {"x_column": 1, "threshold_stride": 1}
            options, aligned = OPTIONS | {"num_warps": op.WARPS}, ("x_ptr", "w_ptr", "out_ptr", "outputs", "w_row")
            kernel = op.thresholded_linear_kernel
            yield Variant("thresholded_linear", f"{tokens} {dtype}", kernel, types, constants, options, aligned)


NEURONS: dict[str, Callable[[], Iterator[Variant]]] = {
    "predictor_in": in_variants,
    "predictor_out": out_variants,
    "sparse_mlp": mlp_variants,
    "reduce_add": reduce_variants,
    "thresholded_linear": thresholded_variants,
}
