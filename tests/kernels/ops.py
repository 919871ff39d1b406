"""The ops that there are: every folder of `kernels/`."""

from __future__ import annotations

from pathlib import Path

OPS = tuple(sorted(path.parent.name for path in Path(__file__).parents[2].glob("kernels/*/triton.py")))

# Most of what a small op's process takes is torch's import, so these share one.
SHARED = (
    "hyena_filter",
    "modal_chunk_prefill",
    "modal_fit_step",
    "modal_step",
    "predictor_in",
    "predictor_out",
    "rational",
    "reduce_add",
    "sparse_mlp",
    "thresholded_linear",
    "vandermonde",
    "vandermonde_adjoint",
    "vp_gram",
)


def company(op: str) -> tuple[str, ...]:
    """The ops that are judged, and compiled, in the same process as this one."""
    return SHARED if op in SHARED else (op,)
