"""The definition of `bitmask_w4_gemv`: decoded in float32 by blocks of rows that stay in a core's cache."""

from __future__ import annotations

import torch

from rewright.kernels.bitmask.reference import unpack_bitmask
from rewright.kernels.w4a16_gemv.reference import by_blocks


def bitmask_w4_gemv(
    x: torch.Tensor, mask: torch.Tensor, values: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """(M, N) in the dtype of x; see the package for the mathematics, shapes and dtypes."""

    def codes(part: slice) -> torch.Tensor:
        return unpack_bitmask(mask[part], values[part])

    return by_blocks(x, codes, scale, None, bias)
