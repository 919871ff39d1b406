"""Which of a tensor's scores are the largest: exact counts, ties broken by position."""

from __future__ import annotations

import torch

from rewright.kernels import dispatch
from rewright.kernels.select import reference

__all__ = ["keep_largest", "keep_of"]


def keep_largest(score: torch.Tensor, prune: int) -> torch.Tensor:
    """True for all but the `prune` smallest of a tensor; of equals the earlier in row-major order is pruned first.

    score   any shape, float16, bfloat16, float32 or float64, finite; -0.0 equals 0.0. Any strides.
    prune   0 to the number of scores.
    Returns bool in the shape of `score`, contiguous, with exactly `prune` of them False.

    Raises ValueError for other dtypes or counts, `KernelError` when Triton was asked for and cannot run.
    """
    if not score.dtype.is_floating_point:
        raise ValueError(f"score must be floating point, not {score.dtype}")
    if not 0 <= prune <= score.numel():
        raise ValueError(f"of {score.numel()} scores {prune} cannot be pruned")
    score = score.detach()

    def supports() -> str | None:
        from rewright.kernels.select import triton

        return triton.supports(score)

    if dispatch.pick("keep_largest", (score,), supports):
        from rewright.kernels.select import triton

        return triton.keep_largest(score, prune)
    return reference.keep_largest(score, prune)


def keep_of(score: torch.Tensor, keep: int, of: int) -> torch.Tensor:
    """True for the `keep` largest of every `of` columns of a row; of equals the earlier is pruned first.

    `of` equal to the number of columns selects within whole rows.

    score   (r, c) float16, bfloat16, float32 or float64, finite; -0.0 equals 0.0. Any strides; a transposed view of a
            (c, r) tensor is read without a copy.
    keep, of    0 <= keep <= of, c a multiple of of.
    Returns bool (r, c), its columns contiguous where those of `score` are, else its rows.

    Raises ValueError for other shapes, dtypes or counts, `KernelError` when Triton was asked for and cannot run.
    """
    if score.dim() != 2 or not score.dtype.is_floating_point:
        raise ValueError(f"score must be a floating-point matrix, not {score.dtype} {tuple(score.shape)}")
    if of < 1 or not 0 <= keep <= of or score.shape[1] % of:
        raise ValueError(f"{keep} of every {of} columns cannot be kept in {score.shape[1]} columns")
    score = score.detach()

    def supports() -> str | None:
        from rewright.kernels.select import triton

        return triton.supports(score)

    if dispatch.pick("keep_of", (score,), supports):
        from rewright.kernels.select import triton

        return triton.keep_of(score, keep, of)
    return reference.keep_of(score, keep, of)
