"""`hyena_filter` on a GPU: a program takes some positions through the whole network, activations in registers.

Sines are those of the device's library in full precision, never the fast ones: arguments reach hundreds.
"""

# The arguments of a jit function are Triton's own values, which no annotation describes; triton ships no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from rewright.kernels.launch import cdiv, device_guard, next_power_of_2
from rewright.kernels.poles import accumulator, refused

# The widest layer; positions of a program, channels at a time.
MOST = 64
POSITIONS = 16
CHANNELS = 16
WARPS = 8


@triton.jit
def wave(x, bias_at, frequency_at, inside):
    """sin(frequency (x + bias)), rows of x alike; 0 past the last column, where both are 0."""
    bias = tl.load(bias_at, mask=inside, other=0.0)
    frequency = tl.load(frequency_at, mask=inside, other=0.0)
    return tl.sin(frequency[None, :] * (x + bias[None, :]))


@triton.jit
def hyena_filter_kernel(
    features_ptr, times_ptr, first_ptr, inner_ptr, last_ptr, biases_ptr, frequencies_ptr, deltas_ptr, out_ptr,
    length, inputs, width, layers, channels, shift,
    features_row, features_column, times_stride,
    ACC: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    place = (tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)).to(tl.int64)
    here = place < length
    e = tl.arange(0, BLOCK_E)
    column = tl.arange(0, BLOCK_W)
    row = tl.arange(0, BLOCK_W)
    x = tl.load(
        features_ptr + place[:, None] * features_row + e[None, :] * features_column,
        mask=here[:, None] & (e < inputs)[None, :],
        other=0.0,
    )
    into = (e < inputs)[:, None] & (column < width)[None, :]
    weight = tl.load(first_ptr + column[None, :] * inputs + e[:, None], mask=into, other=0.0)
    x = tl.dot(x, weight, input_precision="ieee", out_dtype=ACC)
    x = wave(x, biases_ptr + column, frequencies_ptr + column, column < width)
    between = (row < width)[:, None] & (column < width)[None, :]
    for layer in range(1, layers):
        matrix = inner_ptr + (layer - 1) * width * width + column[None, :] * width + row[:, None]
        x = tl.dot(x, tl.load(matrix, mask=between, other=0.0), input_precision="ieee", out_dtype=ACC)
        at = layer * width + column
        x = wave(x, biases_ptr + at, frequencies_ptr + at, column < width)
    time = tl.load(times_ptr + place * times_stride, mask=here, other=0.0).to(ACC)
    inputs_of_last = tl.trans(x)
    for start in range(0, channels, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        out_of = (d < channels)[:, None] & (column < width)[None, :]
        final = tl.load(last_ptr + d[:, None] * width + column[None, :], mask=out_of, other=0.0)
        tile = tl.dot(final, inputs_of_last, input_precision="ieee", out_dtype=ACC)
        rate = tl.abs(tl.load(deltas_ptr + d, mask=d < channels, other=0.0))
        tile *= tl.exp(-rate[:, None] * time[None, :]) + shift
        out_at = out_ptr + d[:, None].to(tl.int64) * length + place[None, :]
        tl.store(out_at, tile, mask=(d < channels)[:, None] & here[None, :])


def supports(features: torch.Tensor, weights: Sequence[torch.Tensor]) -> str | None:
    """None, or why the kernel cannot take this network."""
    if max(features.shape[1], weights[0].shape[0]) > MOST:
        return f"a layer is wider than {MOST}"
    return refused(features)


def hyena_filter(
    features: torch.Tensor,
    times: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    frequencies: Sequence[torch.Tensor],
    deltas: torch.Tensor,
    shift: float,
) -> torch.Tensor:
    """h [D, L]; see the package for shapes and dtypes."""
    dtype = features.dtype
    (length, inputs), (width, layers) = features.shape, (len(biases[0]), len(biases))
    out = torch.empty((len(deltas), length), dtype=dtype, device=features.device)
    if out.numel() == 0:
        return out
    first, *inner, last = (weight.to(dtype).contiguous() for weight in weights)
    with device_guard(features):
        hyena_filter_kernel[(cdiv(length, POSITIONS),)](
            features,
            times,
            first,
            torch.stack(inner) if inner else first,
            last,
            torch.stack(tuple(biases)).to(dtype),
            torch.stack(tuple(frequencies)).to(dtype),
            deltas.to(dtype).contiguous(),
            out,
            length,
            inputs,
            width,
            layers,
            len(deltas),
            shift,
            *features.stride(),
            times.stride(0),
            ACC=accumulator(dtype),
            BLOCK_L=POSITIONS,
            BLOCK_E=max(16, next_power_of_2(inputs)),
            BLOCK_W=max(16, next_power_of_2(width)),
            BLOCK_D=CHANNELS,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
    return out
