"""What several ops ask of their operands: the products by packed codes, and the sweeps that choose codes."""

from __future__ import annotations

import torch

# A word of int32 holds whole codes of these widths.
WIDTHS = (2, 4, 8)
FLOATING = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_inputs(x: torch.Tensor, rows: int, bias: torch.Tensor | None, name: str = "x") -> None:
    """Raise ValueError unless `x`, called `name`, is a floating-point matrix and `bias`, if there is one, (rows,)."""
    if x.dim() != 2 or x.dtype not in FLOATING:
        raise ValueError(f"{name} must be a floating-point matrix, not {x.dtype} {tuple(x.shape)}")
    if bias is not None and (bias.shape != (rows,) or bias.dtype not in FLOATING):
        raise ValueError(f"bias must be floating point ({rows},), not {bias.dtype} {tuple(bias.shape)}")


def check_codes(columns: int, packed: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bits: int) -> None:
    """Raise ValueError unless these are packed codes of `columns` columns, with a scale and a zero a row and group."""
    if bits not in WIDTHS:
        raise ValueError(f"codes of 2, 4 and 8 bits are multiplied by, not of {bits}")
    if packed.dim() != 2 or packed.dtype != torch.int32 or packed.shape[1] * 32 != columns * bits:
        raise ValueError(
            f"{columns} columns of {bits} bits are int32 rows of {columns * bits / 32:g} words, "
            f"not {packed.dtype} {tuple(packed.shape)}"
        )
    if scale.dim() != 2 or scale.dtype not in FLOATING or scale.shape[0] != packed.shape[0]:
        raise ValueError(
            f"scale must be floating point ({packed.shape[0]}, groups), not {scale.dtype} {tuple(scale.shape)}"
        )
    if scale.shape[1] == 0 if columns else scale.shape[1] > 1:
        raise ValueError(f"{columns} columns are not in {scale.shape[1]} groups")
    if columns and columns % scale.shape[1]:
        raise ValueError(f"{columns} columns are not {scale.shape[1]} groups of equal size")
    if zero is not None and (zero.dtype != torch.int8 or zero.shape != scale.shape):
        raise ValueError(f"zero must be int8 {tuple(scale.shape)}, not {zero.dtype} {tuple(zero.shape)}")


def check_grid(
    rows: int,
    width: int,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    keep: torch.Tensor | None,
    low: int,
    high: int,
) -> None:
    """Raise ValueError unless `keep` is bool (rows, width), the grid (rows,), and the codes fit int8."""
    for name, vector in (("scale", scale), ("zero", zero)):
        if vector is not None and vector.shape != (rows,):
            raise ValueError(f"{name} must be ({rows},), not {tuple(vector.shape)}")
    if keep is not None and (keep.shape != (rows, width) or keep.dtype != torch.bool):
        raise ValueError(f"keep must be bool ({rows}, {width}), not {keep.dtype} {tuple(keep.shape)}")
    if not -128 <= low <= high <= 127:
        raise ValueError(f"codes must fit int8: low {low}, high {high}")
