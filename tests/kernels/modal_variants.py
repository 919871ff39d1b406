"""The launches of the ops on sums of powers that are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tests.kernels.variant import Variant


def vandermonde_variants() -> Iterator[Variant]:
    import triton.language as tl

    from rewright.kernels.vandermonde import triton as op

    types = dict.fromkeys(("logs_ptr", "residues_ptr", "out_ptr"), "*fp32")
    constants = {"ACC": tl.float32, **op.SUM}
    options = {"num_warps": op.WARPS, "enable_fp_fusion": True}
    yield Variant("vandermonde", "sum", op.vandermonde_kernel, types, constants, options)
    types |= {"values_ptr": "*bf16"}
    constants = {"ACC": tl.float32, **op.ADJOINT}
    yield Variant("vandermonde", "adjoint bf16", op.vandermonde_adjoint_kernel, types, constants, options)


def fit_step_variants() -> Iterator[Variant]:
    import triton.language as tl

    from rewright.kernels.modal_fit_step import triton as op

    names = ("target_ptr", "logs_ptr", "residues_ptr", "loss_ptr", "d_logs_ptr", "d_residues_ptr")
    for entries, (blocks, width, warps) in op.CONFIGS.items():
        constants = {"ACC": tl.float32, "BLOCKS": blocks, "WIDTH": width, "BLOCK_K": entries}
        options = {"num_warps": warps, "enable_fp_fusion": True}
        kernel = op.modal_fit_step_kernel
        yield Variant("modal_fit_step", f"{entries}", kernel, dict.fromkeys(names, "*fp32"), constants, options)


def rational_variants() -> Iterator[Variant]:
    from rewright.kernels.rational import triton as op

    names = ("points_ptr", "poles_ptr", "residues_ptr", "direct_ptr", "out_ptr", "gradient_ptr")
    types = dict.fromkeys((*names, "d_poles_ptr", "d_residues_ptr"), "*fp32")
    options = {"num_warps": op.WARPS, "enable_fp_fusion": True}
    for label, kernel in (("values", op.rational_kernel), ("gradient", op.rational_backward_kernel)):
        yield Variant("rational", label, kernel, types, {"BLOCK": op.POINTS}, options)


def step_variants() -> Iterator[Variant]:
    import triton.language as tl

    from rewright.kernels.modal_step import triton as op

    halves = dict.fromkeys(("z_ptr", "recent_ptr", "taps_ptr", "bias_ptr", "y_ptr"), "*bf16")
    types = halves | dict.fromkeys(("state_ptr", "poles_ptr", "residues_ptr", "h0_ptr"), "*fp32")
    sizes = {"BLOCK_D": op.ELEMENTS // 8, "BLOCK_K": 8}
    constants = {"PAST": 2, "HAS_BIAS": True, "ACC": tl.float32, **sizes, "z_column": 1}
    options = {"num_warps": op.WARPS, "enable_fp_fusion": True}
    yield Variant("modal_step", "8 bf16", op.modal_step_kernel, types, constants, options)


def gram_variants() -> Iterator[Variant]:
    from rewright.kernels.vp_gram import triton as op

    types = dict.fromkeys(("logs_ptr", "factors_ptr", "out_ptr"), "*fp64")
    options = {"num_warps": op.WARPS, "enable_fp_fusion": True}
    constants = {"TERMS": op.TERMS, "BLOCK": op.BLOCK}
    yield Variant("vp_gram", "fp64", op.vp_gram_kernel, types, constants, options)


def filter_variants() -> Iterator[Variant]:
    import triton.language as tl

    from rewright.kernels.hyena_filter import triton as op

    names = ("features_ptr", "times_ptr", "first_ptr", "inner_ptr", "last_ptr", "biases_ptr", "frequencies_ptr")
    types = dict.fromkeys((*names, "deltas_ptr", "out_ptr"), "*fp32") | {"shift": "fp32"}
    sizes = {"BLOCK_L": op.POSITIONS, "BLOCK_E": op.MOST, "BLOCK_W": op.MOST, "BLOCK_D": op.CHANNELS}
    options = {"num_warps": op.WARPS, "enable_fp_fusion": True}
    yield Variant("hyena_filter", "64", op.hyena_filter_kernel, types, {"ACC": tl.float32, **sizes}, options)


def prefill_variants() -> Iterator[Variant]:
    import triton.language as tl

    from rewright.kernels.modal_chunk_prefill import triton as op

    names = ("logs_ptr", "residues_ptr", "response_ptr", "h0_ptr", "state_ptr", "out_ptr")
    types = dict.fromkeys(names, "*fp32") | dict.fromkeys(("u_ptr", "y_ptr"), "*bf16")
    constants = {"HAS_STATE": True, "ACC": tl.float32, "ROWS": op.ROWS, "CHUNK": op.CHUNK}
    for size, warps in op.CONFIGS.items():
        kernel, sizes = op.modal_chunk_prefill_kernel, {"BLOCK_K": size}
        options = {"num_warps": warps, "enable_fp_fusion": True}
        yield Variant("modal_chunk_prefill", f"{size} bf16", kernel, types, constants | sizes, options)


MODAL: dict[str, Callable[[], Iterator[Variant]]] = {
    "vandermonde": vandermonde_variants,
    "modal_fit_step": fit_step_variants,
    "vp_gram": gram_variants,
    "modal_chunk_prefill": prefill_variants,
    "modal_step": step_variants,
    "hyena_filter": filter_variants,
    "rational": rational_variants,
}
