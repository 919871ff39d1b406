"""One call of an op that an implementation is judged on, and what such calls are made of."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Builder = Callable[[torch.Generator], dict[str, Any]]

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """One call of an op. `make` gives its keyword arguments, on the CPU; `dtype` is the one under test."""

    op: str
    label: str
    dtype: torch.dtype
    build: Builder
    exact: bool = False

    @property
    def id(self) -> str:
        return f"{self.op}-{str(self.dtype).removeprefix('torch.')}-{self.label}"

    def make(self) -> dict[str, Any]:
        return self.build(torch.Generator().manual_seed(zlib.crc32(self.id.encode())))


def normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def laid_out(values: torch.Tensor, layout: str) -> torch.Tensor:
    """The matrix with its values in `rows` or `columns` order, or as every other element of a NaN-filled one."""
    if layout == "columns":
        return values.t().contiguous().t()
    if layout == "slice":
        r, c = values.shape
        hole = 0 if not values.dtype.is_floating_point else torch.nan
        base = torch.full((2 * r + 3, 2 * c + 3), hole, dtype=values.dtype)
        view = base[1 : 2 * r + 1 : 2, 2 : 2 * c + 2 : 2]
        view.copy_(values)
        return view
    return values.contiguous()
