"""The neurons of an MLP that a few tokens need, and no others."""

from __future__ import annotations

import torch

from rewright.kernels import dispatch
from rewright.kernels.neurons import check_lists, check_rows, check_vector, empty_partial, room, wider
from rewright.kernels.operands import FLOATING
from rewright.kernels.sparse_mlp import reference
from rewright.kernels.sparse_mlp.reference import break_even, worth_asking

__all__ = ["ACTIVATIONS", "break_even", "empty_partial", "sparse_mlp", "worth_asking"]

ACTIVATIONS = ("relu", "relu2")


def sparse_mlp(
    x: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    bias: torch.Tensor | None,
    index: torch.Tensor,
    count: torch.Tensor | None,
    activation: str,
    gate: torch.Tensor | None = None,
    gate_bias: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Partial sums over the listed neurons, of at most 16 rows of x::

        h_mi = f(up_i . x_m + bias_i)                                       without a gate
        h_mi = f(gate_i . x_m + gate_bias_i) * (up_i . x_m + bias_i)        with one
        y_m  = sum over the listed i of (h_mi - offset_i) * down_i          and y is the sum over all P partials

    f is the positive part ("relu") or its square ("relu2"). What a neuron is listed for need not hold: a row of `down`
    is read only where h_mi - offset_i is not exactly 0 for some m.

    x          [B, d] floating point, B <= 16. Any strides.
    up, gate   [F, d] floating point.
    down       [F, d] floating point: the last matrix by neurons, which is the transpose of how a linear module has it.
    bias, gate_bias, offset  [F] floating point, or None for 0. `offset` is what a neuron is worth when it is not read,
               where the caller adds the sum over all i of offset_i down_i to y.
    index, count  the lists of `predictor_out`; or that of `active_neurons` and None, for the reference.
    out        what `empty_partial(x, F)` made, or None. What lies behind its rows is overwritten too.
    Returns partial [P, B, d] float32 (float64 for a float64 x), for `reduce_add`. P depends on shapes and the device
    alone, and is 1 on a CPU. All sums are in that dtype; equal inputs give equal bits.

    No gradient flows. Raises ValueError for other shapes, dtypes or activations, `KernelError` when Triton was asked
    for and cannot run. Source: Liu et al., Deja Vu (2023), sections 4.3 and appendix D.
    """
    check_rows("x", x)
    width = x.shape[1]
    if up.dim() != 2 or up.shape[1] != width or up.dtype not in FLOATING:
        raise ValueError(f"up must be floating point [neurons, {width}], not {up.dtype} {tuple(up.shape)}")
    for name, matrix in (("down", down), ("gate", gate)):
        if matrix is not None and (matrix.shape != up.shape or matrix.dtype not in FLOATING):
            shape = tuple(up.shape)
            raise ValueError(f"{name} must be floating point {shape}, not {matrix.dtype} {tuple(matrix.shape)}")
    neurons = up.shape[0]
    for name, vector in (("bias", bias), ("gate_bias", gate_bias), ("offset", offset)):
        check_vector(name, vector, neurons)
    if gate is None and gate_bias is not None:
        raise ValueError("there is a gate_bias, and no gate")
    if count is not None:
        check_lists(index, count, neurons)
    elif index.dim() != 1 or index.dtype != torch.int64:
        raise ValueError(f"index without counts must be int64 [listed], not {index.dtype} {tuple(index.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {activation}")
    if out is not None:
        _check_partial(out, x, neurons)
    operands = reference.Operands(x, up, down, bias, gate, gate_bias, offset, activation)
    given = (x, up, down, bias, gate, gate_bias, offset, index, count, out)
    tensors = [t for t in given if t is not None]

    def supports() -> str | None:
        from rewright.kernels.sparse_mlp import triton

        return "neurons are given as one list" if count is None else triton.supports(tensors, neurons)

    if dispatch.pick("sparse_mlp", tensors, supports) and count is not None:
        from rewright.kernels.sparse_mlp import triton

        return triton.sparse_mlp(operands, index, count, out)
    return reference.sparse_mlp(operands, index, count, out)


def _check_partial(out: torch.Tensor, x: torch.Tensor, neurons: int) -> None:
    if out.dim() != 3 or out.shape[1:] != x.shape or out.dtype != wider(x.dtype) or not len(out):
        shape = ("programs", *x.shape)
        raise ValueError(f"out must be {wider(x.dtype)} {shape}, not {out.dtype} {tuple(out.shape)}")
    row = x.shape[1] + room(neurons, len(out))
    if out.stride() != (row * len(x), row, 1):
        raise ValueError(f"out has strides {out.stride()}: it must be what `empty_partial` made for {neurons} neurons")
