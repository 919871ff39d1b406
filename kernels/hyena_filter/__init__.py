"""The implicit long filter of a Hyena operator, as an impulse response."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rewright.kernels import dispatch
from rewright.kernels.hyena_filter import reference
from rewright.kernels.modal import WIDE
from rewright.kernels.operands import FLOATING

__all__ = ["hyena_filter"]


def hyena_filter(
    features: torch.Tensor,
    times: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    frequencies: Sequence[torch.Tensor],
    deltas: torch.Tensor,
    shift: float = 0.0,
) -> torch.Tensor:
    """What a network of sines makes of positions, under an exponential window (Poli et al. 2023, arXiv:2302.10866)::

        x_1 = features    x_(i+1) = sin(frequencies_i (weights_i x_i + biases_i))    i = 1 .. n
        h_dl = (weights_(n+1) x_(n+1))_dl (exp(-times_l |deltas_d|) + shift)

    features     [L, E] float32 or float64. Any strides. Everything is computed in this dtype, sines of arguments of any
                 size to its rounding.
    times        [L] floating point, from 0 to 1 over the positions that the filter was trained for.
    weights      n + 1 matrices, floating point: [W, E], then [W, W], at last [D, W].
    biases       n of [W]. frequencies  n of [W], the same tensor where layers share one.
    deltas       [D] floating point.
    Returns h [D, L], contiguous, in the dtype of `features`.

    No gradient flows. Raises ValueError for other shapes or dtypes, `KernelError` when Triton was asked for and cannot
    run.
    """
    _check(features, times, weights, biases, frequencies, deltas)
    features, times, deltas = features.detach(), times.detach(), deltas.detach()
    layers = [[t.detach() for t in part] for part in (weights, biases, frequencies)]

    def supports() -> str | None:
        from rewright.kernels.hyena_filter import triton

        return triton.supports(features, layers[0])

    if dispatch.pick("hyena_filter", [features, times, deltas, *(t for part in layers for t in part)], supports):
        from rewright.kernels.hyena_filter import triton

        return triton.hyena_filter(features, times, layers[0], layers[1], layers[2], deltas, shift)
    return reference.hyena_filter(features, times, layers[0], layers[1], layers[2], deltas, shift)


def _check(
    features: torch.Tensor,
    times: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    frequencies: Sequence[torch.Tensor],
    deltas: torch.Tensor,
) -> None:
    if features.dim() != 2 or features.dtype not in WIDE:
        raise ValueError(f"features must be a float32 or float64 matrix, not {features.dtype} {tuple(features.shape)}")
    layers = len(biases)
    if layers == 0 or len(weights) != layers + 1 or len(frequencies) != layers:
        raise ValueError(
            f"{len(weights)} weights, {layers} biases and {len(frequencies)} frequencies are no network of sines"
        )
    width = len(biases[0])
    inputs = [features.shape[1], *[width] * layers]
    outputs = [*[width] * layers, len(deltas)]
    wanted: list[tuple[str, torch.Tensor, tuple[int, ...]]] = [
        ("times", times, (len(features),)),
        ("deltas", deltas, (len(deltas),)),
    ]
    wanted += [("weights", w, shape) for w, shape in zip(weights, zip(outputs, inputs, strict=True), strict=True)]
    wanted += [("biases", b, (width,)) for b in biases] + [("frequencies", f, (width,)) for f in frequencies]
    for name, tensor, shape in wanted:
        if tensor.shape != shape or tensor.dtype not in FLOATING:
            raise ValueError(f"{name} must be floating point {shape}, not {tensor.dtype} {tuple(tensor.shape)}")
