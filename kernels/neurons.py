"""What the ops on predicted neurons share: checks of their operands, and the product by a factor of a predictor.

A predictor's factors A and B are floating point, or int8 with a scale for every row. Which neurons are active is a list
for every block of `BLOCK` neurons, `index` int32 [blocks, BLOCK] of which the first `count` int32 [blocks] are meant.
"""

from __future__ import annotations

import torch

from rewright.kernels.launch import cdiv
from rewright.kernels.operands import FLOATING

# Rows of x that these ops take: a few tokens that are decoded together.
MOST_ROWS = 16
# Neurons of a list.
BLOCK = 128
# Numbers of a factor that the reference converts at a time.
ELEMENTS = 1 << 19


def wider(dtype: torch.dtype) -> torch.dtype:
    """The dtype that results of a dtype are computed in: float32, or float64."""
    return torch.promote_types(dtype, torch.float32)


def check_rows(name: str, x: torch.Tensor) -> None:
    """Raise ValueError unless `x` is a floating-point matrix of at most `MOST_ROWS` rows."""
    if x.dim() != 2 or x.dtype not in FLOATING:
        raise ValueError(f"{name} must be a floating-point matrix, not {x.dtype} {tuple(x.shape)}")
    if x.shape[0] > MOST_ROWS:
        raise ValueError(f"{name} must have at most {MOST_ROWS} rows, not {x.shape[0]}")


def check_vector(name: str, vector: torch.Tensor | None, length: int) -> None:
    """Raise ValueError unless `vector` is None or floating point (length,)."""
    if vector is not None and (vector.shape != (length,) or vector.dtype not in FLOATING):
        raise ValueError(f"{name} must be floating point ({length},), not {vector.dtype} {tuple(vector.shape)}")


def check_factor(name: str, factor: torch.Tensor, columns: int, scale: torch.Tensor | None) -> None:
    """Raise ValueError unless `factor` is a floating-point matrix of so many columns, or an int8 one with `scale`."""
    coded = factor.dtype == torch.int8
    if factor.dim() != 2 or factor.shape[1] != columns or not (coded or factor.dtype in FLOATING):
        raise ValueError(
            f"{name} must be floating point or int8 [rows, {columns}], not {factor.dtype} {tuple(factor.shape)}"
        )
    if coded != (scale is not None):
        raise ValueError(f"{name} is {factor.dtype}, {'which needs a scale' if coded else 'which has no scale'}")
    check_vector(f"{name}_scale", scale, factor.shape[0])


def check_out(name: str, out: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise ValueError unless `out` is None or contiguous of a shape and dtype."""
    if out is not None and (out.shape != shape or out.dtype != dtype or not out.is_contiguous()):
        raise ValueError(f"{name} must be contiguous {dtype} {shape}, not {out.dtype} {tuple(out.shape)}")


def check_lists(index: torch.Tensor, count: torch.Tensor, neurons: int) -> None:
    """Raise ValueError unless these are contiguous lists of active neurons of so many."""
    check_out("index", index, (cdiv(neurons, BLOCK), BLOCK), torch.int32)
    check_out("count", count, (cdiv(neurons, BLOCK),), torch.int32)


def taken(count: torch.Tensor) -> torch.Tensor:
    """Which entries of the lists are meant, bool [blocks, BLOCK]."""
    return torch.arange(BLOCK, dtype=count.dtype, device=count.device) < count[:, None]


def room(neurons: int, programs: int) -> int:
    """Numbers behind a row of a partial sum: activations of a program's share of the neurons, and their numbers."""
    return 2 * cdiv(cdiv(neurons, programs), 4) * 4


def empty_partial(x: torch.Tensor, neurons: int, programs: int | None = None) -> torch.Tensor:
    """A buffer for the partial sums of `sparse_mlp` of x [B, d] and so many neurons: [P, B, d] in `wider(x.dtype)`.

    P is `programs`, or what suits the device: 1 on a CPU, two for each multiprocessor of a GPU, fewer where that would
    leave one less than four neurons. A row has `room` for what its program keeps between its two halves.
    """
    if programs is None:
        programs = 1
        if x.is_cuda:
            programs = 2 * torch.cuda.get_device_properties(x.device).multi_processor_count
    programs = max(1, min(programs, cdiv(neurons, 4)))
    tokens, width = x.shape
    shape = (programs, tokens, width + room(neurons, programs))
    return torch.empty(shape, dtype=wider(x.dtype), device=x.device)[:, :, :width]


def product(x: torch.Tensor, factor: torch.Tensor, scale: torch.Tensor | None, offset: torch.Tensor) -> torch.Tensor:
    """x F^T (* scale) + offset [B, rows] of x [B, columns] and F [rows, columns], in float32 (float64 for float64)."""
    wide = wider(x.dtype)
    inputs, offset = x.to(wide), offset.to(wide)
    if factor.dtype == wide:
        return torch.addmm(offset, inputs, factor.t())
    rows, columns = factor.shape
    y = inputs.new_empty((len(x), rows))
    step = max(1, ELEMENTS // max(columns, 1))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        y[:, part] = inputs @ factor[part].to(wide).t()
    if scale is not None:
        y *= scale.to(wide)
    return y.add_(offset)
