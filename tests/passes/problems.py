"""Layer problems small enough to check by other means: weights, inputs, and the matrices they stand for."""

from __future__ import annotations

from typing import Any

import torch

from rewright.passes.compress.plan import Matrix
from rewright.passes.compress.solve import Solved
from rewright.passes.compress.spec import CompressOptions


def problem(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and the Hessian of inputs that hang together, with a few large channels."""
    draws = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=draws) / columns**0.5 + torch.eye(columns)
    gain = torch.exp(torch.randn(columns, generator=draws))
    inputs = torch.randn(8 * columns, columns, generator=draws) @ mix * gain
    return torch.randn(rows, columns, generator=draws) * 0.05, inputs.T @ inputs / len(inputs)


def options(**said: Any) -> CompressOptions:
    """Options whose text is never read."""
    if said.get("saliency") == "quant-aware":
        said.setdefault("mask", "sweep")
    return CompressOptions(**{"calibration_text": ("text",), **said})


def damped(own: torch.Tensor, share: float) -> torch.Tensor:
    """A Hessian with a share of its mean diagonal added, by other means than the code's own."""
    return own + share * own.diagonal().mean() * torch.eye(len(own), dtype=own.dtype)


def matrices(asked: CompressOptions, *rows: int, columns: int = 48) -> list[Matrix]:
    """The matrices of so many rows each, planned as the options say; their names end in their places."""
    bits, group = int(asked.bits.number), asked.group_size.columns
    return [
        Matrix(
            name=f"model.layers.0.m{place}.weight",
            written=f"model.layers.0.m{place}.weight",
            layer=0,
            rows=count,
            columns=columns,
            dtype="F32",
            group=group,
            transposed=False,
            bits=bits,
            sparsity=asked.zeros,
        )
        for place, count in enumerate(rows)
    ]


def decoded(solved: Solved, columns: int) -> torch.Tensor:
    """What codes, scales and zero points say, float32."""
    assert solved.codes is not None
    assert solved.scale is not None
    group = columns // solved.scale.shape[1]
    levels = solved.codes.float()
    if solved.zero is not None:
        levels = levels - solved.zero.float().repeat_interleave(group, 1)
    return levels * solved.scale.float().repeat_interleave(group, 1)
