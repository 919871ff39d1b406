"""Scales and zero points of groups of weights, chosen in the dtype they are stored in."""

from __future__ import annotations

import torch

from rewright.kernels.clip_search import clip_search

# Shares of the full range that the search tries as clips.
CLIPS = tuple(1 - 0.025 * step for step in range(25))


def code_range(bits: int) -> tuple[int, int]:
    """The lowest and highest code: signed, zero included."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def choose(
    weight: torch.Tensor,
    keep: torch.Tensor | None,
    importance: torch.Tensor | None,
    *,
    bits: int,
    symmetric: bool,
    clip: str,
    stored: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of each row for one group.

    `weight` float32 (columns, rows): a group's columns, each contiguous. `keep` bool, same shape, or None; weights
    that are not kept do not count. `clip` takes the full range (`minmax`), or the share of it with the least squared
    rounding error (`mse`), each column's weighed by its `importance`, (columns), in `hdiag`. Returns (scale, zero),
    float32 (rows): the scale is a value of the dtype `stored`, the zero point a whole number among the codes.
    """
    found = clip_search(
        weight.t(),
        None if keep is None else keep.t(),
        importance if clip == "hdiag" else None,
        bits=bits,
        symmetric=symmetric,
        shares=CLIPS[:1] if clip == "minmax" else CLIPS,
        stored=stored,
    )
    return found.scale, found.zero
