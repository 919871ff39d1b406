"""The definition of `thresholded_linear`."""

from __future__ import annotations

import torch
from torch.nn import functional

from rewright.kernels.neurons import ELEMENTS, wider

# The share of columns up to which a CPU sums their rows one by one sooner than it multiplies by all.
BAGGED = 0.5


def thresholded_linear(
    x: torch.Tensor, weight_t: torch.Tensor, threshold: torch.Tensor, out: torch.Tensor | None
) -> torch.Tensor:
    """One partial; see the package for the mathematics, shapes and dtypes."""
    wide = wider(x.dtype)
    inputs = x.to(wide)
    kept = (inputs.abs() > threshold.to(wide)).any(0)
    y = torch.zeros((1, len(x), weight_t.shape[1]), dtype=wide, device=x.device) if out is None else out.zero_()
    if x.device.type == "cpu" and len(x) == 1 and weight_t.dtype == wide:
        columns = kept.nonzero()[:, 0]
        if len(columns) <= BAGGED * len(weight_t):
            begin = torch.zeros(1, dtype=torch.int64)
            y[0] += functional.embedding_bag(
                columns, weight_t, begin, mode="sum", per_sample_weights=inputs[0, columns].contiguous()
            )
            return y
    inputs = inputs * kept
    step = max(1, ELEMENTS // max(weight_t.shape[1], 1)) if weight_t.dtype != wide else max(1, len(weight_t))
    for first in range(0, len(weight_t), step):
        part = slice(first, first + step)
        y[0] += inputs[:, part] @ weight_t[part].to(wide)
    return y
