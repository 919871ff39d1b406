"""The definition of `sparse_mlp`.

What it costs is reading the rows. For one row of x in the dtype of the weights they are multiplied where they lie, by
two operations of torch that skip what is not listed: a product of which some entries are asked for, and a weighted sum
of rows. Else `ROWS` of them at a time are copied together, to where a core's cache holds them.
"""

from __future__ import annotations

import functools
import warnings
from bisect import bisect_left
from typing import NamedTuple

import torch

from rewright.kernels.neurons import taken, wider

# Rows that are copied together.
ROWS = 128
# The share of listed neurons up to which a CPU is faster here than by two dense products, by the rows of x; and the
# share that takes as long as asking the predictor. Measured in float32 at a width of 2048, 8192 neurons and a rank of
# 128 by `python -m tests.bench.sparse_decode`, on the machine that docs/results/sparse-decode.md names.
BREAK_EVEN = {1: 0.55, 2: 0.6, 16: 0.75}
ASKING = 0.12


def break_even(rows: int) -> float:
    """The share of all neurons above which a CPU multiplies so many rows of x faster by all of them.

    That is for a step that knows its list. `worth_asking` is for a layer.
    """
    known = sorted(BREAK_EVEN)
    return BREAK_EVEN[known[min(bisect_left(known, rows), len(known) - 1)]]


def worth_asking(rows: int) -> float:
    """The share of all neurons, listed on the average, above which a CPU is faster without a predictor."""
    return break_even(rows) - ASKING


class Operands(NamedTuple):
    """What is multiplied; see the package."""

    x: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    bias: torch.Tensor | None
    gate: torch.Tensor | None
    gate_bias: torch.Tensor | None
    offset: torch.Tensor | None
    activation: str


@torch.no_grad()
def sparse_mlp(
    given: Operands, index: torch.Tensor, count: torch.Tensor | None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """`partial`, all of it in the first; see the package for the mathematics, shapes and dtypes."""
    total = over(given, index if count is None else index.masked_select(taken(count)).long())
    if out is None:
        return total[None]
    out[1:].zero_()
    out[0].copy_(total)
    return out


def over(given: Operands, neurons: torch.Tensor) -> torch.Tensor:
    """The sum over neurons that are given by their numbers, int64 [n], as [B, d]."""
    wide = wider(given.x.dtype)
    x = given.x.to(wide)
    if len(neurons) == 0 or x.numel() == 0:
        return torch.zeros_like(x)
    h = dots(x, given.up, given.bias, neurons)
    if given.gate is None:
        h = _activated(h, given.activation)
    else:
        h *= _activated(dots(x, given.gate, given.gate_bias, neurons), given.activation)
    if given.offset is not None:
        h -= given.offset.to(wide)[neurons, None]
    live = (h if len(x) == 1 else (h != 0).any(dim=1)).nonzero()[:, 0]
    if len(live) < len(neurons):
        h, neurons = h[live], neurons[live]
    return weighted(h, given.down, neurons)


def _activated(h: torch.Tensor, activation: str) -> torch.Tensor:
    h = h.relu_()
    return h.square_() if activation == "relu2" else h


def dots(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, neurons: torch.Tensor) -> torch.Tensor:
    """The products of some rows of `weight` with all of x [B, d], plus their biases: [n, B] in the dtype of x."""
    first = x.new_zeros(len(neurons)) if bias is None else bias.index_select(0, neurons).to(x.dtype)
    if _in_place(x, weight):
        _quiet()
        ends = torch.tensor([0, len(neurons)])
        asked = torch.sparse_csr_tensor(ends, neurons, first, (1, len(weight)), check_invariants=False)
        found: torch.Tensor = torch.sparse.sampled_addmm(asked, x, weight.t())
        return found.values()[:, None]
    h = first[:, None].repeat(1, len(x))
    held = weight.new_empty((ROWS, weight.shape[1]))
    for start in range(0, len(neurons), ROWS):
        rows = _together(weight, neurons[start : start + ROWS], held).to(x.dtype)
        h[start : start + ROWS].addmm_(rows, x.t())
    return h


def weighted(h: torch.Tensor, weight: torch.Tensor, neurons: torch.Tensor) -> torch.Tensor:
    """The sum of some rows of `weight` times h [n, B], as [B, d] in the dtype of h."""
    if _in_place(h.t(), weight):
        whole = torch.zeros(1, dtype=torch.int64)
        return torch.nn.functional.embedding_bag(neurons, weight, whole, mode="sum", per_sample_weights=h[:, 0])
    total = h.new_zeros((h.shape[1], weight.shape[1]))
    held = weight.new_empty((ROWS, weight.shape[1]))
    for start in range(0, len(neurons), ROWS):
        rows = _together(weight, neurons[start : start + ROWS], held).to(h.dtype)
        total.addmm_(h[start : start + ROWS].t(), rows)
    return total


def _in_place(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether torch has operations that read rows of `weight` where they lie."""
    return len(x) == 1 and x.dtype == weight.dtype and weight.device.type == "cpu" and weight.is_contiguous()


def _together(weight: torch.Tensor, neurons: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
    """Rows of `weight`, copied into `held`."""
    return torch.index_select(weight, 0, neurons, out=held[: len(neurons)])


@functools.cache
def _quiet() -> None:
    """Have torch say once, and to nobody, that its sparse tensors may change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.zeros(0, dtype=torch.int64), torch.zeros(0), (1, 1))
