"""What the ops on sums of powers share: checks of their operands, and tables of powers of poles.

A pole p is given by `logs`, log|p| and arg p, since its decay is what matters near 1. log|p| = -inf is the pole 0, of
which every power but p^0 = 1 is 0. A power p^t is made in float64 from a phase that is reduced exactly, so that its
relative error does not grow with t, and an impulse response is a product of two tables: t = width a + b,
p^t = p^(width a) p^b. `exp(t log p)` in float32 would lose four digits.
"""

from __future__ import annotations

import torch

WIDE = (torch.float32, torch.float64)
# 2 pi in three parts. The first two have 26 bits, so that their products with integers below 2^26 are exact.
TURN = (6.283185243606567, 6.357301884918343e-08, 2.4492935982947064e-16)
# Elements that a reference holds at a time in its largest table.
ELEMENTS = 1 << 20


def check_planes(name: str, tensor: torch.Tensor, shape: tuple[int, ...] | None = None) -> None:
    """Raise ValueError unless `tensor` is float32 or float64 [C, K, 2], or of the shape given."""
    if shape is None:
        if tensor.dim() != 3 or tensor.shape[2] != 2 or tensor.dtype not in WIDE:
            raise ValueError(
                f"{name} must be float32 or float64 [channels, entries, 2], not {tensor.dtype} {tuple(tensor.shape)}"
            )
    elif tensor.shape != shape or tensor.dtype not in WIDE:
        raise ValueError(f"{name} must be float32 or float64 {shape}, not {tensor.dtype} {tuple(tensor.shape)}")


def check_length(length: int) -> None:
    """Raise ValueError unless 0 <= length < 2^26, up to which phases are exact."""
    if not 0 <= length < 1 << 26:
        raise ValueError(f"length must be from 0 to {(1 << 26) - 1}, not {length}")


def reduced(angle: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """times * angle modulo 2 pi, from -pi to pi, to the rounding of the result.

    `angle` is float64, within a few turns; `times` float64 integers below 2^26. The product is made of two halves of
    the angle's bits, of which the first and the multiples of a turn are exact (Cody and Waite 1980).
    """
    turns = torch.round(times * (angle / TURN[0]))
    carry = angle * 134217729.0
    high = carry - (carry - angle)
    low = angle - high
    return ((times * high - turns * TURN[0]) - turns * TURN[1]) + (times * low - turns * TURN[2])


def powers(logs: torch.Tensor, count: int, step: int = 1) -> torch.Tensor:
    """p^(step i) for i = 0 .. count - 1, complex128 [C, K, count], for float64 `logs` [C, K, 2].

    More than 32 of them are products of two shorter tables.
    """
    if count > 32:
        fine = 1 << ((count - 1).bit_length() // 2)
        coarse = -(-count // fine)
        table = powers(logs, coarse, step * fine)[..., None] * powers(logs, fine, step)[..., None, :]
        return table.flatten(2)[..., :count]
    times = step * torch.arange(count, dtype=torch.float64, device=logs.device)
    # 0 times minus infinity would be no number.
    size = torch.where(times == 0, 0.0, times * logs[..., :1]).exp()
    return torch.polar(size, reduced(logs[..., 1:], times))


def columns(table: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A complex table [C, K, n] as real rows [C, 2 K, n]: real and imaginary part of each pole in turn."""
    planes = torch.view_as_real(table).to(dtype)
    return planes.transpose(2, 3).reshape(table.shape[0], 2 * table.shape[1], table.shape[2])


def rows(table: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A complex table [C, K, n] as [C, n, 2 K]: real part and minus the imaginary part of each pole in turn.

    rows(x) @ columns(y) is Re sum over k of x_k y_k.
    """
    planes = torch.view_as_real(table.conj().resolve_conj()).to(dtype)
    return planes.transpose(1, 2).reshape(table.shape[0], table.shape[2], 2 * table.shape[1])


def to_complex(planes: torch.Tensor) -> torch.Tensor:
    """[..., 2] in any floating dtype as complex128 [...], in memory of its own: a file's is not aligned for it."""
    return torch.complex(*planes.double().unbind(-1))


def width_of(length: int) -> int:
    """How many of `length` steps the finer of two tables covers: a power of two, at least 16."""
    return max(16, 1 << (max(length - 1, 0).bit_length() + 1) // 2)


def groups(count: int, size: int) -> list[slice]:
    """Channels that go through at a time, where one takes `size` elements."""
    step = max(1, ELEMENTS // max(size, 1))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def slopes(residues: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
    """The gradient in logs, (Re RM, -Im RM), of planes R and M [C, K, 2]."""
    real = residues[..., 0] * moments[..., 0] - residues[..., 1] * moments[..., 1]
    imaginary = residues[..., 0] * moments[..., 1] + residues[..., 1] * moments[..., 0]
    return torch.stack((real, -imaginary), dim=-1)
