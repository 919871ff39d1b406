"""4-bit codes of groups that keep a fixed number of weights: a mask of bits, and the kept codes, two a byte."""

from __future__ import annotations

import torch

from rewright.kernels import dispatch
from rewright.kernels.bitmask import reference
from rewright.kernels.bitmask.reference import counts

__all__ = ["counts", "fits", "pack_bitmask", "unpack_bitmask"]


def fits(codes: torch.Tensor, group: int, nnz: int) -> bool:
    """Whether no group of `group` columns has more than `nnz` codes that are not 0.

    codes   (O, I) int8; `group` divides I.
    """
    _check_codes(codes, group, nnz)
    return bool((codes.reshape(codes.shape[0], codes.shape[1] // group, group).count_nonzero(dim=2) <= nnz).all())


def pack_bitmask(codes: torch.Tensor, group: int, nnz: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes by groups of columns: which `nnz` of each are kept, and what those are.

    A group keeps its codes that are not 0 and, where those are fewer than `nnz`, the first of its columns whose code
    is 0. Bit k mod 8 of byte k // 8 of the mask is set where column k of the group is kept. The code of the j-th kept
    column becomes the number code + 8 in the low (j even) or high (j odd) half of byte j // 2.

    codes   (O, I) int8 in [-8, 7]; what lies outside is undefined. Any strides.
    group   a multiple of 8 that divides I.
    nnz     even, 2 .. group; no group may have more codes that are not 0 (`fits` tells; else undefined).
    Returns uint8 (O, I/group, group/8) and uint8 (O, I/group, nnz/2), contiguous.

    Raises ValueError for other shapes, dtypes or sizes, `KernelError` when Triton was asked for and cannot run.
    """
    _check_codes(codes, group, nnz)
    if dispatch.pick("pack_bitmask", (codes,), _supports):
        from rewright.kernels.bitmask import triton

        return triton.pack_bitmask(codes, group, nnz)
    return reference.pack_bitmask(codes, group, nnz)


def unpack_bitmask(mask: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_bitmask`; columns that are not kept get the code 0.

    mask    (O, G, group/8) uint8, each group with as many bits set as `values` has codes for it; with other counts
            the result is undefined (an error, or any codes), and nothing outside the tensors is read.
    values  (O, G, nnz/2) uint8.
    Returns (O, G * group) int8, contiguous.

    Raises ValueError for other shapes or dtypes, `KernelError` when Triton was asked for and cannot run.
    """
    if (
        mask.dtype != torch.uint8
        or values.dtype != torch.uint8
        or mask.dim() != 3
        or values.dim() != 3
        or mask.shape[:2] != values.shape[:2]
        or not 0 < values.shape[2] <= 4 * mask.shape[2]
    ):
        raise ValueError(
            f"mask and values must be uint8 (O, G, group/8) and (O, G, nnz/2), not "
            f"{mask.dtype} {tuple(mask.shape)} and {values.dtype} {tuple(values.shape)}"
        )
    if dispatch.pick("unpack_bitmask", (mask, values), _supports):
        from rewright.kernels.bitmask import triton

        return triton.unpack_bitmask(mask, values)
    return reference.unpack_bitmask(mask, values)


def _check_codes(codes: torch.Tensor, group: int, nnz: int) -> None:
    if codes.dim() != 2 or codes.dtype != torch.int8:
        raise ValueError(f"codes must be an int8 matrix, not {codes.dtype} {tuple(codes.shape)}")
    if group < 8 or group % 8 or codes.shape[1] % group:
        raise ValueError(f"groups are multiples of 8 that divide {codes.shape[1]} columns, which {group} is not")
    if nnz % 2 or not 0 < nnz <= group:
        raise ValueError(f"an even number of {group} columns is kept, not {nnz}")


def _supports() -> str | None:
    return None
